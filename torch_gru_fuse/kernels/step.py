"""The recurrence of one GRU layer, both directions at once, one launch a time step.

The route for what does not fit a single resident launch.  The input projection of the whole sequence is one matrix product
made before (gi, without bias); a launch then does what depends on the previous state.  Sizes: D directions, T steps,
B batch, H units.  Direction 0 runs forward and direction 1 backward in time; a launch does one step of each.

Rows of a sequence are found as (t*B + b) * width with a width known when compiling, so neither B nor T takes part in the
choice of code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .gates import dot, gru_gates, gru_gates_backward, keep_rows, project, round_tf32
from .launch import launch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..planner.tiles import Tile


@triton.jit(do_not_specialize=["N"])
def round_tf32_kernel(p_x, p_y, N, BLOCK: tl.constexpr):
    """y = x rounded to tf32, elementwise: reads and writes N fp32, bound by memory bandwidth."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < N
    tl.store(p_y + o, round_tf32(tl.load(p_x + o, m)), m)


@triton.jit
def transpose_kernel(p_x, p_y, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr):
    """y [COLUMNS, ROWS] = x^T, rounded to tf32 if ROUND, a tile of BLOCK x BLOCK a program: bound by memory bandwidth."""
    o_r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(
        p_x + o_r[:, None].to(tl.int64) * COLUMNS + o_c[None, :], (o_r[:, None] < ROWS) & (o_c[None, :] < COLUMNS), 0.0
    )
    if ROUND:
        b_x = round_tf32(b_x)
    m = (o_c[:, None] < COLUMNS) & (o_r[None, :] < ROWS)
    tl.store(p_y + o_c[:, None].to(tl.int64) * ROWS + o_r[None, :], tl.trans(b_x), m)


@triton.jit(do_not_specialize=["s", "T", "B"])
def sequence_forward_kernel(
    p_gi, p_h, p_w_hh0, p_w_hh1, p_b_ih0, p_b_ih1, p_b_hh0, p_b_hh1, p_keep,
    p_out, p_gates,
    s, T, B,
    D: tl.constexpr, H: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_B_IH: tl.constexpr, HAS_B_HH: tl.constexpr, SAVE_GATES: tl.constexpr, TF32: tl.constexpr,
    W_ROUNDED: tl.constexpr,
):  # fmt: skip
    """Step s of each direction, t = s or T-1-s, for a tile [batch, units].

        r, z  = sigmoid(gi_t + b_i + h W_h^T + b_h)         each
        hn    = h W_hn^T + b_hn
        n     = tanh(gi_t + b_in + r * hn)
        out_t = n + z * (h - n)

    h is the state of the step before: out itself, or, at s = 0, the initial state, laid out like one step of out.  With keep
    [T, B] it is multiplied by keep_t; of h W^T each row is, after the product.
    If TF32, W_hh comes rounded (W_ROUNDED): T launches read what one has made; or it is rounded on the way.
    Every other step walks k from its end: what a step has read last is what L2 still holds for the next.  So weights that are
    larger than L2 come from memory only in part (H=4096, B=16, H200: fp16 1.79 and 1.59 ms for 64 steps, tf32 3.47 and 3.21).
    Saved for the backward, if SAVE_GATES: r, z, n, hn.

    Bytes a step and direction: W_hh 3H^2 once if the batch fits one tile (from L2: the same at every step), gi 3BH, h BH for
    each tile of units, out BH (and gates 4BH).  Bound by the launch and by the latency of one pass over k for small
    layers, then by L2 bandwidth.
    """
    i_b, i_u, i_d = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_b = (i_b * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    o_u = (i_u * BLOCK_U + tl.arange(0, BLOCK_U)).to(tl.int64)
    m_b = o_b < B
    m_u = (o_u < H) | (H % BLOCK_U == 0)
    m = m_b[:, None] & m_u[None, :]

    t, t_before = s, tl.maximum(s - 1, 0)
    p_w, p_b_ih, p_b_hh = p_w_hh0, p_b_ih0, p_b_hh0
    if D == 2:
        t = tl.where(i_d == 0, s, T - 1 - s)
        t_before = tl.where(s == 0, 0, tl.where(i_d == 0, s - 1, T - s))
        p_w = tl.where(i_d == 0, p_w_hh0, p_w_hh1)
        if HAS_B_IH:
            p_b_ih = tl.where(i_d == 0, p_b_ih0, p_b_ih1)
        if HAS_B_HH:
            p_b_hh = tl.where(i_d == 0, p_b_hh0, p_b_hh1)
    r_out = (t.to(tl.int64) * B + o_b)[:, None]  # row of step t in a sequence [T, B]
    r_h = t_before.to(tl.int64) * B + o_b
    r_d = ((i_d * T + t).to(tl.int64) * B + o_b)[:, None]  # the same in [D, T, B]
    p_h += i_d * H

    b_hn = tl.full((BLOCK_B, BLOCK_U), 0.0, tl.float32)
    if p_keep is not None:
        b_keep = tl.load(p_keep + t.to(tl.int64) * B + o_b, m_b, 0)
        b_hr, b_hz, b_hn = project(
            b_hn, b_hn, b_hn, p_h, p_w, r_h, o_u, m_b, m_u, D * H, 1, H, 1, H, H, BLOCK_K, TF32, W_ROUNDED,
            s % 2,
        )  # fmt: skip
        b_hr, b_hz, b_hn = keep_rows(b_hr, b_keep), keep_rows(b_hz, b_keep), keep_rows(b_hn, b_keep)
    p_g = p_gi + r_d * (3 * H) + o_u[None, :]
    b_ar = tl.load(p_g, m, 0.0).to(tl.float32)
    b_az = tl.load(p_g + H, m, 0.0).to(tl.float32)
    b_anx = tl.load(p_g + 2 * H, m, 0.0).to(tl.float32)
    if HAS_B_IH:
        b_ar += tl.load(p_b_ih + o_u, m_u, 0.0).to(tl.float32)[None, :]
        b_az += tl.load(p_b_ih + o_u + H, m_u, 0.0).to(tl.float32)[None, :]
        b_anx += tl.load(p_b_ih + o_u + 2 * H, m_u, 0.0).to(tl.float32)[None, :]
    if HAS_B_HH:
        b_ar += tl.load(p_b_hh + o_u, m_u, 0.0).to(tl.float32)[None, :]
        b_az += tl.load(p_b_hh + o_u + H, m_u, 0.0).to(tl.float32)[None, :]
        b_hn += tl.load(p_b_hh + o_u + 2 * H, m_u, 0.0).to(tl.float32)[None, :]
    b_h = tl.load(p_h + r_h[:, None] * (D * H) + o_u[None, :], m, 0.0).to(tl.float32)

    if p_keep is not None:
        b_ar += b_hr
        b_az += b_hz
        b_h = keep_rows(b_h, b_keep)
    else:
        b_ar, b_az, b_hn = project(
            b_ar, b_az, b_hn, p_h, p_w, r_h, o_u, m_b, m_u, D * H, 1, H, 1, H, H, BLOCK_K, TF32, W_ROUNDED,
            s % 2,
        )  # fmt: skip
    b_out, b_r, b_z, b_n = gru_gates(b_ar, b_az, b_anx, b_hn, b_h)

    tl.store(p_out + r_out * (D * H) + i_d * H + o_u[None, :], b_out, m)
    if SAVE_GATES:
        p_g = p_gates + r_d * (4 * H) + o_u[None, :]
        tl.store(p_g, b_r, m)
        tl.store(p_g + H, b_z, m)
        tl.store(p_g + 2 * H, b_n, m)
        tl.store(p_g + 3 * H, b_hn, m)


@triton.jit(do_not_specialize=["s", "T", "B"])
def sequence_backward_kernel(
    p_grad_out, p_h, p_w_hh0, p_w_hh1, p_gates, p_keep,
    p_d_gates, p_carry, p_d_h0,
    s, T, B,
    D: tl.constexpr, H: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_GRAD_OUT: tl.constexpr, TRANSPOSED: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """Step s of the backward of each direction, for a tile [batch, units]: gate gradients of t = T-1-s or s.

        g    = carry + (d_hn, d_r, d_z)_after @ (W_hn, W_hr, W_hz) + grad_out_t
        d_n  = g * (1 - z) * (1 - n^2)
        d_hn = d_n * r
        d_r  = d_n * hn * r * (1 - r)
        d_z  = g * (h - n) * z * (1 - z)
        carry = g * z

    With keep [T, B] the first two terms of g are multiplied by keep_after, and h by keep_t.
    W_hh comes [3H, H], or TRANSPOSED; if TF32, rounded.
    "after" is the step that the forward did next; at s = 0 there is none and carry is the gradient of the last state.
    Launch s = T writes the g of "before the first step", without a grad_out: the gradient of h0.
    carry [D, B, H] is fp32 and updated in place, each element by the program that read it.  It is added to the whole product:
    every block of one that is added to carry would round like carry, which is larger (H=256, fp32: an error of dh of 1.5e-7
    instead of 0.8e-7).

    Bytes a step and direction: W_hh 3H^2 once if the batch fits one tile (from L2), d_gates 3BH for each tile of units,
    another 4BH written, gates 4BH, h, grad_out BH each, carry 2BH in fp32.  Bound as the forward, with a reduction over 3H.
    """
    i_b, i_u, i_d = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    o_b = (i_b * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    o_u = (i_u * BLOCK_U + tl.arange(0, BLOCK_U)).to(tl.int64)
    m_b = o_b < B
    m_u = (o_u < H) | (H % BLOCK_U == 0)
    m = m_b[:, None] & m_u[None, :]

    t, t_after, t_before = T - 1 - s, T - s, tl.maximum(T - 2 - s, 0)
    p_w = p_w_hh0
    if D == 2:
        t = tl.where(i_d == 0, t, s)
        t_after = tl.where(i_d == 0, t_after, s - 1)
        t_before = tl.where(s == T - 1, 0, tl.where(i_d == 0, t_before, s + 1))
        p_w = tl.where(i_d == 0, p_w_hh0, p_w_hh1)
    o_state = (i_d * B + o_b)[:, None] * H + o_u[None, :]  # in a state [D, B, H]

    b_carry = tl.load(p_carry + o_state, m, 0.0)
    b_g = tl.full((BLOCK_B, BLOCK_U), 0.0, tl.float32)
    if s > 0:
        p_d_after = p_d_gates + (((i_d * T + t_after).to(tl.int64) * B + o_b) * (4 * H))[:, None]
        LAST: tl.constexpr = (3 * H - 1) // BLOCK_K * BLOCK_K
        for k in range(0, 3 * H, BLOCK_K):
            # every other step from the end: what of the weights the last step left in L2 comes first
            o_k = k + (LAST - 2 * k) * (s % 2) + tl.arange(0, BLOCK_K)
            m_k = (o_k < 3 * H) | (3 * H % BLOCK_K == 0)
            o_w = tl.where(o_k < H, o_k + 2 * H, o_k - H).to(tl.int64)  # (n, r, z) -> rows of (r, z, n)
            b_d = tl.load(p_d_after + o_k[None, :], m_b[:, None] & m_k[None, :], 0.0)
            if TRANSPOSED:
                p_kw = p_w + o_u[None, :].to(tl.int64) * (3 * H) + o_w[:, None]
            else:
                p_kw = p_w + o_w[:, None] * H + o_u[None, :]
            b_w = tl.load(p_kw, m_k[:, None] & m_u[None, :], 0.0)
            b_g = dot(b_d, b_w, b_g, TF32, True)
    b_g += b_carry
    if p_keep is not None:  # noqa: SIM102  (when compiling, and when running)
        if s > 0:
            b_g = keep_rows(b_g, tl.load(p_keep + t_after.to(tl.int64) * B + o_b, m_b, 0))

    if s == T:
        tl.store(p_d_h0 + o_state, b_g, m)
    else:
        r_out = (t.to(tl.int64) * B + o_b)[:, None]
        r_h = (t_before.to(tl.int64) * B + o_b)[:, None]
        r_d = ((i_d * T + t).to(tl.int64) * B + o_b)[:, None]
        if HAS_GRAD_OUT:
            b_g += tl.load(p_grad_out + r_out * (D * H) + i_d * H + o_u[None, :], m, 0.0).to(tl.float32)
        b_h = tl.load(p_h + r_h * (D * H) + i_d * H + o_u[None, :], m, 0.0).to(tl.float32)
        if p_keep is not None:
            b_h = keep_rows(b_h, tl.load(p_keep + t.to(tl.int64) * B + o_b, m_b, 0))
        p_g = p_gates + r_d * (4 * H) + o_u[None, :]
        b_r = tl.load(p_g, m, 0.0).to(tl.float32)
        b_z = tl.load(p_g + H, m, 0.0).to(tl.float32)
        b_n = tl.load(p_g + 2 * H, m, 0.0).to(tl.float32)
        b_hn = tl.load(p_g + 3 * H, m, 0.0).to(tl.float32)

        b_dhn, b_dr, b_dz, b_dn, b_carry = gru_gates_backward(b_g, b_h, b_r, b_z, b_n, b_hn)

        p_d = p_d_gates + r_d * (4 * H) + o_u[None, :]
        tl.store(p_d, b_dhn, m)
        tl.store(p_d + H, b_dr, m)
        tl.store(p_d + 2 * H, b_dz, m)
        tl.store(p_d + 3 * H, b_dn, m)
        tl.store(p_carry + o_state, b_carry, m)


def _bytes_of_bool(keep: Tensor | None, steps: int, batch: int) -> Tensor | None:
    """keep [T, B] as the kernels take it."""
    if keep is None:
        return None
    assert keep.shape == (steps, batch)
    return keep.contiguous().view(torch.uint8) if keep.dtype == torch.bool else keep.contiguous()


def sequence_forward_launch(gi, h0, w_hh, b_ih, b_hh, out, gates, *, tile: Tile, tf32: bool, keep: Tensor | None = None):
    """Grid and keyword arguments of `sequence_forward_kernel` at step 0."""
    D, T, B, H = (*gi.shape[:3], h0.shape[2])
    assert gi.shape == (D, T, B, 3 * H) and h0.shape == (D, B, H) and out.shape == (T, B, D * H)
    assert gates is None or gates.shape == (D, T, B, 4, H) and gates.is_contiguous()
    assert out.is_contiguous() and len(w_hh) == D
    first, last = 0, D - 1  # one direction: its own pointers fill the places of the second
    arguments = dict(
        p_gi=gi.contiguous(), p_h=h0.transpose(0, 1).contiguous(),
        p_w_hh0=w_hh[first].contiguous(), p_w_hh1=w_hh[last].contiguous(),
        p_b_ih0=None if b_ih is None else b_ih[first].contiguous(),
        p_b_ih1=None if b_ih is None else b_ih[last].contiguous(),
        p_b_hh0=None if b_hh is None else b_hh[first].contiguous(),
        p_b_hh1=None if b_hh is None else b_hh[last].contiguous(),
        p_keep=_bytes_of_bool(keep, T, B),
        p_out=out, p_gates=gates,
        s=0, T=T, B=B,
        D=D, H=H,
        BLOCK_B=tile.block_b, BLOCK_U=tile.block_u, BLOCK_K=tile.block_k,
        HAS_B_IH=b_ih is not None, HAS_B_HH=b_hh is not None, SAVE_GATES=gates is not None,
        TF32=tf32 and out.dtype == torch.float32, W_ROUNDED=H < _FROM_MEMORY,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return (triton.cdiv(B, tile.block_b), triton.cdiv(H, tile.block_u), D), arguments


# From here on W_hh comes from memory at every step.  The backward reads its columns, rows of its transpose are faster (H=4096,
# batch 16, 64 steps: fp16 1.70 and 1.93 ms, tf32 3.85 and 4.21).
_FROM_MEMORY = 2048


def sequence_backward_launch(
    grad_out, grad_hn, out, h0, w_hh, gates, d_gates, d_h0, *, tile: Tile, tf32: bool, keep: Tensor | None = None
):
    """Grid and keyword arguments of `sequence_backward_kernel` at step 0."""
    D, T, B, _, H = gates.shape
    assert out.shape == (T, B, D * H) and h0.shape == d_h0.shape == (D, B, H) and d_gates.shape == gates.shape
    assert out.is_contiguous() and gates.is_contiguous() and d_gates.is_contiguous() and d_h0.is_contiguous()
    assert len(w_hh) == D
    carry = torch.empty(D, B, H, dtype=torch.float32, device=out.device)
    if grad_hn is None:
        carry.zero_()
    else:
        carry.copy_(grad_hn)
    arguments = dict(
        p_grad_out=None if grad_out is None else grad_out.contiguous(), p_h=out,
        p_w_hh0=w_hh[0].contiguous(), p_w_hh1=w_hh[D - 1].contiguous(), p_gates=gates,
        p_keep=_bytes_of_bool(keep, T, B),
        p_d_gates=d_gates, p_carry=carry, p_d_h0=d_h0,
        s=0, T=T, B=B,
        D=D, H=H,
        BLOCK_B=tile.block_b, BLOCK_U=tile.block_u, BLOCK_K=tile.block_k,
        HAS_GRAD_OUT=grad_out is not None, TRANSPOSED=H >= _FROM_MEMORY, TF32=tf32 and out.dtype == torch.float32,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return (triton.cdiv(B, tile.block_b), triton.cdiv(H, tile.block_u), D), arguments


def _rounded(w_hh: Sequence[Tensor]) -> Sequence[Tensor]:
    rounded = []
    for weight in w_hh:
        weight = weight.contiguous()
        rounded.append(torch.empty_like(weight))
        grid = (triton.cdiv(weight.numel(), 1024),)
        launch(round_tf32_kernel, grid, dict(p_x=weight, p_y=rounded[-1], N=weight.numel(), BLOCK=1024))
    return rounded


def _transposed(w_hh: Sequence[Tensor], *, rounded: bool) -> Sequence[Tensor]:
    transposed = []
    for weight in w_hh:
        weight, (rows, columns) = weight.contiguous(), weight.shape
        transposed.append(weight.new_empty(columns, rows))
        grid = (triton.cdiv(rows, 64), triton.cdiv(columns, 64))
        arguments = dict(p_x=weight, p_y=transposed[-1], ROWS=rows, COLUMNS=columns, ROUND=rounded, BLOCK=64)
        launch(transpose_kernel, grid, arguments)
    return transposed


def _launch_steps(kernel, grid: tuple[int, ...], arguments: dict, steps: range) -> None:
    """Launches the steps, whose arguments differ in s alone.

    s takes no part in the choice of code, so what the first launch found serves the others.
    """
    if not steps:
        return
    arguments["s"] = steps[0]
    started = launch(kernel, grid, arguments)
    if started is None:  # interpreted
        for s in steps[1:]:
            arguments["s"] = s
            kernel[grid](**arguments)
        return
    code, grid, stream, values = started
    i_s = kernel.arg_names.index("s")
    for s in steps[1:]:
        values[i_s] = s
        code.start(grid, stream, tuple(values))


def sequence_forward(
    gi: Tensor,
    h0: Tensor,
    w_hh: Sequence[Tensor],
    b_ih: Sequence[Tensor] | None,
    b_hh: Sequence[Tensor] | None,
    out: Tensor,
    gates: Tensor | None,
    *,
    tile: Tile,
    tf32: bool,
    keep: Tensor | None = None,
) -> None:
    """Fills out [T, B, D*H] and, if given, gates [D, T, B, 4, H] = (r, z, n, hn), T >= 1.

    gi [D, T, B, 3H]: input projection without bias, in the dtype of the rest or float32; h0 [D, B, H]; w_hh, b_ih, b_hh:
    one tensor [3H, H], [3H], [3H] a direction; keep [T, B], bool or in the dtype of the rest, multiplies the state before each
    step.  The outputs are contiguous; other tensors that are not are copied once.
    """
    if tf32 and out.dtype == torch.float32 and h0.shape[2] < _FROM_MEMORY:
        w_hh = _rounded(w_hh)
    grid, arguments = sequence_forward_launch(gi, h0, w_hh, b_ih, b_hh, out, gates, tile=tile, tf32=tf32, keep=keep)
    _launch_steps(sequence_forward_kernel, grid, arguments, range(1))
    arguments["p_h"] = out
    _launch_steps(sequence_forward_kernel, grid, arguments, range(1, gi.shape[1]))


def sequence_backward(
    grad_out: Tensor | None,
    grad_hn: Tensor | None,
    out: Tensor,
    h0: Tensor,
    w_hh: Sequence[Tensor],
    gates: Tensor,
    d_gates: Tensor,
    d_h0: Tensor,
    *,
    tile: Tile,
    tf32: bool,
    keep: Tensor | None = None,
) -> None:
    """Fills d_gates [D, T, B, 4, H] = gradients of (hn, r, z, n) and d_h0 [D, B, H], T >= 1.

    grad_out [T, B, D*H] and grad_hn [D, B, H] may be None (zero); out, gates and keep are those of :func:`sequence_forward`.
    ``d_gates[d].view(T, B, 4*H)`` then holds the gradient of the input projection in its last 3H columns, and that of
    the hidden projection in its first, gates rotated to (n, r, z); the products with them are left to the caller.
    """
    tf32 = tf32 and out.dtype == torch.float32
    if h0.shape[2] >= _FROM_MEMORY:
        w_hh = _transposed(w_hh, rounded=tf32)
    elif tf32:
        w_hh = _rounded(w_hh)
    grid, arguments = sequence_backward_launch(
        grad_out, grad_hn, out, h0, w_hh, gates, d_gates, d_h0, tile=tile, tf32=tf32, keep=keep
    )
    steps = out.shape[0]
    _launch_steps(sequence_backward_kernel, grid, arguments, range(steps - 1))
    arguments["p_h"] = h0.transpose(0, 1).contiguous()  # like one step of out
    _launch_steps(sequence_backward_kernel, grid, arguments, range(steps - 1, steps + 1))
