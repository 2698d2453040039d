"""The state that each row of a packed layer started from, which gradients of hidden weights are products with.

The rows of a step are in the sequence of states those of the step before, but a sequence is the same row of every step, and
steps have different numbers of them: no slice of the memory holds what is wanted, so it is copied.

Names as in ``gates``; besides, ``d`` is a direction.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T", "B"])
def states_before_kernel(
    p_out, p_h0, p_offsets,
    p_before,
    T, B,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a block of the rows of one step and direction the states before the step.

        before[t, b] = out[t', b] if step t' has a row b, else h0[b]          t' = t - 1, of direction 1 t + 1

    p_out: states [N, D*H] after the steps.  p_h0: [D, B, H].  p_offsets: int32 [T + 1 + B], as the kernels of whole sequences
    take it.  p_before: [D, N, H].

    Bytes: the states twice.  Bound by memory bandwidth, or by the launch.
    """
    t = tl.program_id(0)
    d = tl.program_id(2)
    start = tl.load(p_offsets + t)
    rows = tl.load(p_offsets + t + 1) - start
    t_before = tl.where(d == 0, t - 1, t + 1)
    there = (t_before >= 0) & (t_before < T)
    t_before = tl.where(there, t_before, t)
    start_before = tl.load(p_offsets + t_before)
    rows_before = tl.where(there, tl.load(p_offsets + t_before + 1) - start_before, 0)

    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    o_b = o // H
    o_u = o % H
    m = o_b < rows
    m_out = m & (o_b < rows_before)
    o_out = (start_before + o_b).to(tl.int64) * (D * H) + d * H + o_u
    o_h0 = (d * B + o_b) * H + o_u
    b_out = tl.load(p_out + o_out, m_out, 0.0)
    b_h0 = tl.load(p_h0 + o_h0, m & (o_b >= rows_before), 0.0)
    o_before = (d * tl.load(p_offsets + T) + start + o_b).to(tl.int64) * H + o_u
    tl.store(p_before + o_before, tl.where(m_out, b_out, b_h0), m)


_BLOCK = 1024


def states_before_constants(*, hidden: int, directions: int) -> dict[str, Any]:
    """What selects the code: constants and options."""
    return dict(H=hidden, D=directions, BLOCK=_BLOCK, num_warps=4)


def states_before_grid(*, steps: int, batch: int, hidden: int, directions: int) -> tuple[int, int, int]:
    """Programs."""
    return steps, -(-batch * hidden // _BLOCK), directions
