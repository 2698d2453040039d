"""One step of a GRU for a tiny batch: every weight is read once, and that is all that takes time.

A launch makes one layer, a program U units of it for all batch rows.  The program asks for its rows of W_hh and W_ih before it
does anything else, multiplies on FMA units (a tensor core's tile would be empty but for a row or eight, and float32 stays
exact), and adds up along k within threads first, then across the lanes of a warp.

Launches of a stack may overlap (programmatic dependent launch): layer l begins while the layer below still runs, and has its
weights under way or multiplied by h when its input is there.  Measured on an H200, B = 1, I = H = 512, two layers of fp16, in a
CUDA graph: 3.9 us, and 5.0 without overlap; cuDNN 18.8.  (All layers in one launch, which wait for each other: 6.3.)

Why that is safe.  Call the launches of a stack K0, K1, ...
K0 is an ordinary launch, so it begins after everything before it in the stream is done and visible: whoever wrote weights or
h0, say an optimizer, comes before K0.  K1 and those above carry the attribute: they may begin as soon as every program of the
launch below has signalled (``gdc_launch_dependents``) or ended, that is, at the earliest when every program of K0 runs.
1. What is read before ``gdc_wait``: weights, biases and h0.  No launch of the stack writes any of these, and all else was done
   before K0 began.  So it does not matter that the signal is a program's first instruction, and that K2 may begin before K0
   has ended.
2. What is read after it: x, which is h of the layer below.  ``gdc_wait`` returns when the launch below has ended and what it
   wrote is visible.  Only that launch writes it.
3. Older launches.  Every program of a launch that begins early waits before it ends, and before it stores.  So that K(l-1) has
   ended means that K(l-2) had, and so on to K0 and what came before it: what K(l) writes, nobody older still reads, and an
   ordinary launch after the stack waits for the top layer and thereby for all.
4. The top layer does not signal: nothing behind the stack begins early because of it.
5. Programs that wait keep none out that they wait for: a layer's are started when all of the layer below have been.
For that, output and h_n overlap nothing, and nothing that writes parameters comes into the stream between the launches, from
another thread; whatever copies are needed are made before K0.

Names as in ``gates``; besides, V elements of k make a vector of 16 bytes.
"""

from __future__ import annotations

import functools
from operator import or_
from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl
from triton.runtime import driver

from .gates import INTERPRETED, add_up, gru_gates
from .launch import launcher

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..planner.stream import StreamPlan
    from .launch import Launcher


@triton.jit
def load_gates(p_w, o_u, o_k, K: tl.constexpr, H: tl.constexpr, WHOLE: tl.constexpr):
    """Rows o_u of all three gates, columns o_k of K: a tuple of three tiles.  WHOLE: nothing to mask."""
    o_w = o_u * K + o_k
    if WHOLE:
        return tl.load(p_w + o_w), tl.load(p_w + K * H + o_w), tl.load(p_w + 2 * K * H + o_w)
    else:
        m_w = (o_u < H) & (o_k < K)
        b_r = tl.load(p_w + o_w, m_w, 0.0)
        return b_r, tl.load(p_w + K * H + o_w, m_w, 0.0), tl.load(p_w + 2 * K * H + o_w, m_w, 0.0)


@triton.jit
def load_rows(p, o_b, o_k, K: tl.constexpr, WHOLE: tl.constexpr, SPREAD: tl.constexpr):
    """Rows of an operand [B, K]: [B, SPREAD, KV, V], the same for each of SPREAD units.

    SPREAD is U: in the layout of the weights, so that nothing moves between threads, at the price of registers and of loads,
    which the first level of cache answers.  SPREAD is 1: in a layout of its own.
    """
    o = tl.broadcast_to(o_b * K + o_k, (o_b.shape[0], SPREAD, o_k.shape[2], o_k.shape[3]))
    if WHOLE:
        return tl.load(p + o)
    else:
        return tl.load(p + o, o_k < K, 0.0)


@triton.jit
def multiply(b_w, b_x, b_r, b_z, b_n):
    """(r, z, n) + w x of the gates, summed along the vector: [1, U, KV, V], [B, 1, KV, V] -> [B, U, KV]."""
    b_x = b_x.to(tl.float32)
    b_r += add_up(b_w[0].to(tl.float32) * b_x, 3)
    b_z += add_up(b_w[1].to(tl.float32) * b_x, 3)
    b_n += add_up(b_w[2].to(tl.float32) * b_x, 3)
    return b_r, b_z, b_n


@triton.jit
def walk(
    b_r, b_z, b_n, p_x, p_w, o_b, o_u, o_k, started,
    K: tl.constexpr, H: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """(r, z, n) + w x of all steps along k, one after the other: where too much would be under way if unrolled.

    started: true, but not as a constant, for which the loop would be unrolled after all.
    """
    end = tl.where(started, K, 0)
    b_w = load_gates(p_w, o_u, o_k, K, H, WHOLE)
    for k in range(0, K if INTERPRETED else end, BLOCK_K):
        b_x = tl.load(p_x + (o_b * K + (k + o_k)), (k + o_k < K) | WHOLE, 0.0)
        o_next = tl.minimum(k + BLOCK_K, (K - 1) // BLOCK_K * BLOCK_K) + o_k  # the last time those at hand once more
        b_next = load_gates(p_w, o_u, o_next, K, H, WHOLE)
        b_r, b_z, b_n = multiply(b_w, b_x, b_r, b_z, b_n)
        b_w = b_next
    return b_r, b_z, b_n


@triton.jit
def load_bias(p, o_u, m_u):
    return tl.load(p + o_u, m_u, 0.0).to(tl.float32)


@triton.jit
def signal():
    """The launch of the next layer may begin, once all programs have come here."""
    if not INTERPRETED:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait():
    """For the end of the launch of the layer below; what it wrote is visible then."""
    if not INTERPRETED:
        tl.extra.cuda.gdc_wait()


@triton.jit
def stream_kernel(
    p_x, p_h0, p_w_ih, p_w_hh, p_b_ih, p_b_hh,
    p_out, p_h_n,
    B: tl.constexpr, I: tl.constexpr, H: tl.constexpr,
    BLOCK_B: tl.constexpr, U: tl.constexpr, BLOCK_K: tl.constexpr, V: tl.constexpr, DEPTH: tl.constexpr,
    BEFORE: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    """h' of U units of a layer, for all B rows.

        r, z = sigmoid(x W_i^T + b_i + h W_h^T + b_h)           each
        hn   = h W_hn^T + b_hn
        n    = tanh(x W_in^T + b_in + r * hn)
        h'   = n + z * (h - n)

    x [B, I], h0 [B, H]; h_n [B, H] takes h', and so does out [B, H] unless it is None.  No biases: None.

    BEFORE: lets the launch of the next layer begin.  AFTER: this one began so, and x is there after a wait; the module says why
    all else is there already.

    k is walked in steps of BLOCK_K, first along h, then along x; weights of the next DEPTH steps are always under way.  DEPTH
    0: a step is multiplied while the next is under way, and nothing is unrolled.

    Bytes: all weights once, 3H(I+H) elements; x and h0 by every program.  Bound by the launch and the latency of the first
    weights (1.6 us together on an H200), then by the bandwidth of L2 or memory; from about four rows on by FMA units.
    """
    STEPS_H: tl.constexpr = (H + BLOCK_K - 1) // BLOCK_K
    STEPS_X: tl.constexpr = (I + BLOCK_K - 1) // BLOCK_K
    WHOLE_H: tl.constexpr = H % U == 0 and H % BLOCK_K == 0
    WHOLE_X: tl.constexpr = H % U == 0 and I % BLOCK_K == 0
    KV: tl.constexpr = BLOCK_K // V
    SPREAD: tl.constexpr = U if BLOCK_B <= 2 else 1

    if BEFORE:
        signal()
    i_u = tl.program_id(0)

    # Tiles of all batch rows, units, vectors along k and elements of a vector.
    o_k = tl.arange(0, KV)[None, None, :, None] * V + tl.arange(0, V)[None, None, None, :]
    o_u4 = i_u * U + tl.arange(0, U)[None, :, None, None]
    o_b4 = tl.minimum(tl.arange(0, BLOCK_B), B - 1)[:, None, None, None]
    b_hs = ()
    b_xs = ()
    flight = ()
    if DEPTH > 0:
        for i in tl.static_range(STEPS_H):
            b_hs = b_hs + (load_rows(p_h0, o_b4, i * BLOCK_K + o_k, H, H % BLOCK_K == 0, SPREAD),)
        if not AFTER:
            for i in tl.static_range(STEPS_X):
                b_xs = b_xs + (load_rows(p_x, o_b4, i * BLOCK_K + o_k, I, I % BLOCK_K == 0, SPREAD),)
    # After the operands: the compiler multiplies in the layout of what is loaded last, and the other moves to it.
    for i in tl.static_range(DEPTH):
        if i < STEPS_H:
            flight = flight + (load_gates(p_w_hh, o_u4, i * BLOCK_K + o_k, H, H, WHOLE_H),)
        else:
            flight = flight + (load_gates(p_w_ih, o_u4, (i - STEPS_H) * BLOCK_K + o_k, I, H, WHOLE_X),)

    # Tiles of batch rows and units.
    o_u = i_u * U + tl.arange(0, U)[None, :]
    o_b = tl.arange(0, BLOCK_B)[:, None]
    m_u = (o_u < H) | (H % U == 0)
    m = m_u & (o_b < B)
    o_h = o_b * H + o_u
    b_h = tl.load(p_h0 + o_h, m, 0.0).to(tl.float32)
    if p_b_ih is not None:
        b_bias_r = load_bias(p_b_ih, o_u, m_u) + load_bias(p_b_hh, o_u, m_u)
        b_bias_z = load_bias(p_b_ih + H, o_u, m_u) + load_bias(p_b_hh + H, o_u, m_u)
        b_bias_nx = load_bias(p_b_ih + 2 * H, o_u, m_u)
        b_bias_hn = load_bias(p_b_hh + 2 * H, o_u, m_u)

    b_ar = tl.full((BLOCK_B, U, KV), 0.0, tl.float32)
    b_az = tl.full((BLOCK_B, U, KV), 0.0, tl.float32)
    b_anx = tl.full((BLOCK_B, U, KV), 0.0, tl.float32)
    b_hn = tl.full((BLOCK_B, U, KV), 0.0, tl.float32)
    if DEPTH == 0:
        started = i_u * U < H
        b_ar, b_az, b_hn = walk(b_ar, b_az, b_hn, p_h0, p_w_hh, o_b4, o_u4, o_k, started, H, H, BLOCK_K, WHOLE_H)
        if AFTER:
            wait()
        b_ar, b_az, b_anx = walk(b_ar, b_az, b_anx, p_x, p_w_ih, o_b4, o_u4, o_k, started, I, H, BLOCK_K, WHOLE_X)
    else:
        for i in tl.static_range(STEPS_H):
            b_ar, b_az, b_hn = multiply(flight[i], b_hs[i], b_ar, b_az, b_hn)
            if i + DEPTH < STEPS_H:
                flight = flight + (load_gates(p_w_hh, o_u4, (i + DEPTH) * BLOCK_K + o_k, H, H, WHOLE_H),)
            elif i + DEPTH < STEPS_H + STEPS_X:
                flight = flight + (load_gates(p_w_ih, o_u4, (i + DEPTH - STEPS_H) * BLOCK_K + o_k, I, H, WHOLE_X),)
        if AFTER:
            wait()
            for i in tl.static_range(STEPS_X):  # what these take is seen in full: no time to move them
                b_xs = b_xs + (load_rows(p_x, o_b4, i * BLOCK_K + o_k, I, I % BLOCK_K == 0, U),)
        for i in tl.static_range(STEPS_X):
            b_ar, b_az, b_anx = multiply(flight[STEPS_H + i], b_xs[i], b_ar, b_az, b_anx)
            if i + DEPTH < STEPS_X:
                flight = flight + (load_gates(p_w_ih, o_u4, (i + DEPTH) * BLOCK_K + o_k, I, H, WHOLE_X),)

    b_r = add_up(b_ar, 2)
    b_z = add_up(b_az, 2)
    b_nx = add_up(b_anx, 2)
    b_n = add_up(b_hn, 2)
    if p_b_ih is not None:
        b_r += b_bias_r
        b_z += b_bias_z
        b_nx += b_bias_nx
        b_n += b_bias_hn
    b_new, _, _, _ = gru_gates(b_r, b_z, b_nx, b_n, b_h)
    b_new = b_new.to(p_h_n.dtype.element_ty)
    tl.store(p_h_n + o_h, b_new, m)
    if p_out is not None:
        tl.store(p_out + o_h, b_new, m)


def stream_constants(
    plan: StreamPlan, *, batch: int, inputs: int, hidden: int, element_bytes: int, before: bool, after: bool
) -> dict[str, Any]:
    """What selects the code of ``stream_kernel`` for a layer: its constants and options.  inputs: of that layer."""
    steps = -(-hidden // plan.block_k) + -(-inputs // plan.block_k)
    return dict(
        B=batch, I=inputs, H=hidden,
        BLOCK_B=1 << (batch - 1).bit_length(), U=plan.units, BLOCK_K=plan.block_k, V=16 // element_bytes,
        DEPTH=min(plan.depth, steps),
        BEFORE=before, AFTER=after,
        num_warps=plan.num_warps, launch_pdl=after,
    )  # fmt: skip


def stream_launch(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    output: Tensor | None,
    h_n: Tensor,
    *,
    plan: StreamPlan,
    before: bool = False,
    after: bool = False,
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and arguments of ``stream_kernel`` for one layer: x [B, I], h0, h_n and output [B, H].

    before: lets the next launch begin before this one ends.  after: is that next launch.
    """
    batch, hidden = h0.shape
    inputs = x.shape[-1]
    assert w_ih.shape == (3 * hidden, inputs) and w_hh.shape == (3 * hidden, hidden) and (b_ih is None) == (b_hh is None)
    arguments = dict(p_x=x, p_h0=h0, p_w_ih=w_ih, p_w_hh=w_hh, p_b_ih=b_ih, p_b_hh=b_hh, p_out=output, p_h_n=h_n)
    constants = stream_constants(
        plan, batch=batch, inputs=inputs, hidden=hidden, element_bytes=x.element_size(), before=before, after=after
    )  # fmt: skip
    return (plan.programs(hidden),), arguments | constants


def _edges(plan: StreamPlan, layers: int) -> list[tuple[bool, bool]]:
    """(before, after) of each layer."""
    return [(plan.overlap and l + 1 < layers, plan.overlap and l > 0) for l in range(layers)]


class Stack(NamedTuple):
    """What calls with the same sizes have in common.

    below, top: to be called with addresses, once a layer.  each: parameters of a layer.  state_bytes: of h of a layer.
    """

    below: list[Launcher]
    top: Launcher
    grid: tuple[int, int, int]
    each: int
    state_bytes: int
    device: int

    def launch(self, p_x: int, p_h0: int, p_params: Sequence[int], p_out: int, p_h_n: int) -> None:
        """One step at these addresses, all of them multiples of 16.

        p_params: of each layer, from the lowest, w_ih, w_hh and, with biases, b_ih, b_hh.
        """
        _, top, grid, each, state_bytes, device = self
        stream = driver.active.get_current_stream(device)
        no_biases = (None, None) if each == 2 else ()
        i = 0
        for run in self.below:
            run(grid, stream, (p_x, p_h0, *p_params[i : i + each], *no_biases, None, p_h_n), True)
            p_x = p_h_n
            p_h0 += state_bytes
            p_h_n += state_bytes
            i += each
        top(grid, stream, (p_x, p_h0, *p_params[i:], *no_biases, p_out, p_h_n), True)


_stacks: dict[tuple, Stack] = {}


def stack_of(x: Tensor, h0: Tensor, has_biases: bool, plan: StreamPlan) -> Stack:
    """The one for contiguous x, T = 1 or without time, and h0 [L, B, H] on their GPU."""
    key = (plan, x.shape, h0.shape, x.dtype, x.get_device(), has_biases)
    found = _stacks.get(key)
    if found is None:
        if len(_stacks) >= 4096:
            _stacks.clear()
        found = _stacks[key] = _make_stack(x, h0, has_biases, plan)
    return found


def _make_stack(x: Tensor, h0: Tensor, has_biases: bool, plan: StreamPlan) -> Stack:
    layers, batch, hidden = h0.shape
    dtype, device = x.dtype, x.get_device()
    bias = dtype if has_biases else None
    state_bytes = batch * hidden * dtype.itemsize
    assert x.is_contiguous() and h0.is_contiguous() and x.numel() == batch * x.shape[-1] and not state_bytes % 16
    launchers = []
    for l, (before, after) in enumerate(_edges(plan, layers)):
        constants = stream_constants(
            plan, batch=batch, inputs=hidden if l else x.shape[-1], hidden=hidden, element_bytes=dtype.itemsize,
            before=before, after=after,
        )  # fmt: skip
        types = (dtype, dtype, dtype, dtype, bias, bias, dtype if l + 1 == layers else None, dtype)
        launchers.append(launcher(stream_kernel, device, constants, types))
    each = 4 if has_biases else 2
    return Stack(launchers[:-1], launchers[-1], (plan.programs(hidden), 1, 1), each, state_bytes, device)


def stream_forward(
    x: Tensor,
    h0: Tensor,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    b_ih: Sequence[Tensor] | None,
    b_hh: Sequence[Tensor] | None,
    output: Tensor,
    h_n: Tensor,
    *,
    plan: StreamPlan,
) -> None:
    """One step of a stack on the current GPU: x [B, I], h0 [L, B, H] to output [1, B, H] or [B, H] and h_n [L, B, H].

    w_ih [3H, I] or [3H, H], w_hh [3H, H] and the biases [3H] (None: no biases) of each layer, from the lowest.  All are of one
    dtype and contiguous, which is not checked; output and h_n overlap nothing and, like all new tensors, begin at multiples of
    16 bytes.  An operand that does not is copied.
    """
    layers = len(w_ih)
    if not isinstance(stream_kernel, triton.JITFunction):  # interpreted
        for l, (before, after) in enumerate(_edges(plan, layers)):
            grid, arguments = stream_launch(
                h_n[l - 1] if l else x, h0[l], w_ih[l], w_hh[l], b_ih and b_ih[l], b_hh and b_hh[l],
                output if l == layers - 1 else None, h_n[l], plan=plan, before=before, after=after,
            )  # fmt: skip
            stream_kernel[grid](**arguments)
        return

    kinds = (w_ih, w_hh) if b_ih is None else (w_ih, w_hh, b_ih, b_hh)
    tensors = [x, h0, output, h_n, *(parameter for layer in zip(*kinds, strict=True) for parameter in layer)]
    pointers = [t.data_ptr() for t in tensors]
    if functools.reduce(or_, pointers) % 16:
        assert not (pointers[2] | pointers[3]) % 16
        tensors = [t.clone() if p % 16 else t for t, p in zip(tensors, pointers, strict=True)]  # kept until all is launched
        pointers = [t.data_ptr() for t in tensors]
    p_x, p_h0, p_out, p_h_n, *p_params = pointers
    stack_of(x, h0, b_ih is not None, plan).launch(p_x, p_h0, p_params, p_out, p_h_n)
