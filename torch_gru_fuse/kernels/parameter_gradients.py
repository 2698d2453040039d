"""From what the recurrence of a backward and its matrix products leave to gradients of parameters: all lanes in one launch.

The recurrence makes gate gradients in the order (hn, r, z, n), of which the first three neighbours belong to the hidden
projection.  So a product over all steps gives the gradient of its weights with rows in that order, and so do the sums of gate
gradients that are the gradients of biases; parameters want (r, z, hn).

Names as in ``gates``; besides, ``l`` is a lane: a layer and direction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from .gates import add_up

if TYPE_CHECKING:
    import torch


@triton.jit
def rotate_rows(p_rotated, p_w, i_block, H: tl.constexpr, BLOCK: tl.constexpr):
    """A block of w [3H, H]: rows (r, z, hn) from rows (hn, r, z), which is a rotation of the memory by a third."""
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    o_from = tl.where(o < 2 * H * H, o + H * H, o - 2 * H * H)
    m = o < 3 * H * H
    tl.store(p_w + o, tl.load(p_rotated + o_from, m), m)


@triton.jit
def sum_biases(p_sums, p_b_ih, p_b_hh, i_block, PROGRAMS, H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr):
    """A block of units of b_ih = (r, z, n) and b_hh = (r, z, hn), [3H], from the sums [PROGRAMS, 4, H] of (hn, r, z, n)."""
    o_u = i_block * BLOCK_H + tl.arange(0, BLOCK_H)
    m_u = o_u < H
    o_p = tl.arange(0, BLOCK_P)
    b_hn = tl.full((BLOCK_P, BLOCK_H), 0.0, tl.float32)
    b_r, b_z, b_n = b_hn, b_hn, b_hn
    p = PROGRAMS * 0
    while p < PROGRAMS:  # the interpreter of Triton 3.6 has no `range` up to an argument
        o = (p + o_p)[:, None] * (4 * H) + o_u[None, :]
        m = (p + o_p < PROGRAMS)[:, None] & m_u[None, :]
        b_hn += tl.load(p_sums + o, m, 0.0).to(tl.float32)
        b_r += tl.load(p_sums + H + o, m, 0.0).to(tl.float32)
        b_z += tl.load(p_sums + 2 * H + o, m, 0.0).to(tl.float32)
        b_n += tl.load(p_sums + 3 * H + o, m, 0.0).to(tl.float32)
        p += BLOCK_P
    b_r, b_z = add_up(b_r, 0), add_up(b_z, 0)
    tl.store(p_b_ih + o_u, b_r, m_u)
    tl.store(p_b_ih + H + o_u, b_z, m_u)
    tl.store(p_b_ih + 2 * H + o_u, add_up(b_n, 0), m_u)
    tl.store(p_b_hh + o_u, b_r, m_u)
    tl.store(p_b_hh + H + o_u, b_z, m_u)
    tl.store(p_b_hh + 2 * H + o_u, add_up(b_hn, 0), m_u)


@triton.jit(do_not_specialize=["PROGRAMS"])
def parameter_gradients_kernel(
    p_sums, p_rotated, p_w, p_b_ih, p_b_hh,
    PROGRAMS,
    LANES: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Gradients of hidden weights and of biases, a lane by each row of programs.

        dW_hh = rows (r, z, hn) of p_rotated = d(hn, r, z)^T h
        db_ih = sums of d(r, z, n),   db_hh = sums of d(r, z, hn)

    p_rotated, p_w: tuples of [3H, H], or None: the weights are right already.  p_b_ih, p_b_hh: tuples of [3H], or None: no
    biases.  p_sums: tuple of [PROGRAMS, 4, H].  Sums are float32, each in one order.

    Bytes: the weights twice, the sums once.  Bound by the launch up to H = 512 or so, then by memory.
    """
    l = tl.program_id(1)
    pid = tl.program_id(0)
    BIAS_BLOCKS: tl.constexpr = 0 if p_b_ih is None else (H + BLOCK_H - 1) // BLOCK_H
    for i in tl.static_range(LANES):
        if l == i:
            if pid < BIAS_BLOCKS:
                if p_b_ih is not None:
                    sum_biases(p_sums[i], p_b_ih[i], p_b_hh[i], pid, PROGRAMS, H, BLOCK_P, BLOCK_H)
            elif p_w is not None:
                rotate_rows(p_rotated[i], p_w[i], pid - BIAS_BLOCKS, H, BLOCK)


_BLOCK, _BLOCK_P, _BLOCK_H = 2048, 32, 32
#: Lanes of a launch: the code has a copy for each.
MOST_LANES = 16


def parameter_gradients_constants(*, lanes: int, hidden: int) -> dict[str, Any]:
    """What selects the code: constants and options."""
    return dict(LANES=lanes, H=hidden, BLOCK=_BLOCK, BLOCK_P=_BLOCK_P, BLOCK_H=_BLOCK_H, num_warps=4)


def parameter_gradients_types(dtype: torch.dtype, sums: torch.dtype | None, lanes: int, *, rotated: bool) -> list[Any]:
    """Types of the other arguments, as a `Launcher` takes them; sums None: no biases."""
    weights, biases = (dtype, lanes) if rotated else None, None if sums is None else (dtype, lanes)
    return [None if sums is None else (sums, lanes), weights, weights, biases, biases, None]


def parameter_gradients_grid(*, lanes: int, hidden: int, rotated: bool, biases: bool) -> tuple[int, int, int]:
    """Programs."""
    weight_blocks = -(-3 * hidden * hidden // _BLOCK) if rotated else 0
    return weight_blocks + (-(-hidden // _BLOCK_H) if biases else 0), lanes, 1
