"""Whole sequences of a GRU in one launch: the weights of all lanes stay in registers, layers run one behind the other.

A lane is a layer of a stack, a direction of a single layer, or a layer of a pair.  Its units are spread over programs; each
keeps the rows of W that make its units, for the whole sequence, and states cross from program to program as ``handover`` says.
In a stack, layer l does step t while layer l-1 does step t+1, so L layers take T+L-1 steps, not L*T.

Written in Gluon, because the layout is the point: a warp takes a slice of k, and the vectors that a thread polls are its own
operands of the product.  Nothing is shared before the product, and one barrier adds the slices up.

Names as in ``lanes``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .handover import clear_beyond, issue, prefetch, settle
from .lanes import (
    add_slices,
    barrier,
    check_launch,
    dot,
    dot_kept,
    first_row,
    gate_layout,
    if_in_step,
    in_step,
    keep_of,
    kept,
    launch_arguments,
    load_biases,
    masked,
    most_registers,
    round_parameter,
    row_steps,
    rows_after,
    rows_of,
    select,
    share_rows,
    shared_bases,
    shared_row,
    sigmoid,
    tanh,
    walks_back,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..planner.whole_sequence import WavefrontPlan


@gluon.constexpr_function
def _slice_length(hidden, slices):
    return (1 << (hidden - 1).bit_length()) // slices


@gluon.jit
def tile_of(p_offsets, p_x, p_h, o_s, o_k, o_n, B_x, B_h, ROW_H: gl.constexpr, KX: gl.constexpr):
    """Addresses of a polled tile [slices, k, batch]: slices of x, then of h, which have so many rows; others read the last."""
    rows = B_h
    if KX > 0 and p_offsets is not None:
        rows = gl.where(o_s < KX, B_x, B_h)
    o = o_k + gl.minimum(o_n, rows - 1) * ROW_H
    if KX > 0:
        return gl.where(o_s < KX, p_x, p_h) + o
    else:
        return p_h + o


@gluon.jit
def strides(rows, ROW_H: gl.constexpr, H: gl.constexpr):
    """Elements of so many rows of states, of gi, and of saved gates."""
    return rows * ROW_H, rows * (3 * H), rows * (4 * H)


@gluon.jit(do_not_specialize=["T", "B"])
def wavefront_kernel(
    p_gi, p_h0, p_below, p_w_ih, p_w_hh, p_b_ih, p_b_hh, p_masks, p_masked,
    p_out, p_h_n, p_gates, p_error, p_offsets, p_keep,
    T, B,
    LANES: gl.constexpr, H: gl.constexpr, HX: gl.constexpr,
    U: gl.constexpr, N: gl.constexpr,
    KX: gl.constexpr, KH: gl.constexpr, MS: gl.constexpr,
    REVERSE: gl.constexpr, PAIRED: gl.constexpr, SAVE_GATES: gl.constexpr,
    STORE_FIRST: gl.constexpr, AHEAD: gl.constexpr, TIMEOUT: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """All T steps of U units of one lane, for N batch rows.

        r, z = sigmoid(x_t W_i^T + b_i + h W_h^T + b_h)         each
        hn   = h W_hn^T + b_hn
        n    = tanh(x_t W_in^T + b_in + r * hn)
        h_t  = n + z * (h - n)

    x_t W_i^T of lane 0, or [2, T, B, 3H] of both directions or of a pair, comes as gi; x of a higher layer is h_t of the lane
    below.

    States.  A stack: p_h0 [lanes, B, H], the highest lane's sequence is p_out [T, B, H], the others' are p_below
    [lanes-1, T, B, H].  Two directions (REVERSE): p_h0 [B, 2H], p_out [T, B, 2H]; lane 1 walks memory backwards, from row T-1.
    A pair (PAIRED, else None): p_h0 [2, B, H], p_out [2, T, B, H]; lane l walks memory backwards where bit l of PAIRED is set.
    The state before the first step is in p_h0, those before others in the lane's sequence.  p_h_n [lanes, B, H].
    Dropout in a stack: p_masks, like p_below, multiply what a lane hands to the one above, which then takes it from p_masked,
    which is like p_below and filled with the pattern, too.

    H is a multiple of 16.  Units from HX on are padding: their parameters are 0 and they stay 0, also beside Inf and NaN.

    The warps: KH slices of k for h, beside them KX for the x of the next step (0: after h_t is on its way, the same warps take
    x of the next step, from a second set of weights), times MS along the units.
    Saved for the backward, if SAVE_GATES: r, z, n, hn.

    Packed sequences: p_offsets, see ``lanes``; rows [N] of all steps take the place of [T, B].  A program ends with its longest
    sequence.  Before and after the steps of a shorter one its h stays as it is, which at the end is h_n; what it polls then is
    there in any case, the state of another row or h0, and what it makes of it is not stored.

    Resets: p_keep [T, B], see ``lanes``: k_t h_{t-1} takes the place of h_{t-1} in all terms.  A step reads keep of a program's
    rows, one value a row, before it waits.

    AHEAD steps before they are due, lines of gi and of states are brought to L2: the fill had pushed them out.

    Bytes a step and lane: each program reads the B*H states of its rows and writes its own, gi 3BH once, gates 4BH written;
    weights none.  Bound by latency: one crossing through L2, a chain of K/KH of products, one exchange of partial sums through
    shared memory, four special functions.
    """
    dtype: gl.constexpr = p_out.dtype.element_ty
    BYTES: gl.constexpr = dtype.primitive_bitwidth // 8
    STACK: gl.constexpr = LANES > 1 and not REVERSE and PAIRED is None
    ROW_H: gl.constexpr = 2 * H if REVERSE else H
    ROW_G: gl.constexpr = 3 * H
    KS: gl.constexpr = KX + KH
    AFTER: gl.constexpr = STACK and KX == 0
    KC: gl.constexpr = _slice_length(H, KH)
    KW: gl.constexpr = min(16 // BYTES, KC // 8)
    PACK: gl.constexpr = KC * N // 32
    VECTORS: gl.constexpr = PACK // KW
    VECTOR_BYTES: gl.constexpr = KW * BYTES
    WEIGHTS: gl.constexpr = 3 * (U // MS) * KC * BYTES // 128 * (2 if AFTER else 1)  # registers of a thread
    SHARE_BIAS: gl.constexpr = WEIGHTS > 96
    K_VECTORS: gl.constexpr = KC // (4 * KW) if KC * KH == H else 1
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[KS, MS, 1], instr_shape=[1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, KW)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, KW)
    over_h: gl.constexpr = gate_layout(KH, N, KS * MS)
    over_x: gl.constexpr = gate_layout(max(KX, 1), N, KS * MS)
    gate: gl.constexpr = gl.SliceLayout(0, over_h)
    banked: gl.constexpr = gl.SharedLinearLayout(shared_bases(KS, U, N))

    PROGRAMS_U: gl.constexpr = (H + U - 1) // U
    pid = gl.program_id(0)
    i_u = pid % PROGRAMS_U
    PROGRAMS_B = (B + N - 1) // N
    i_b = pid // PROGRAMS_U % PROGRAMS_B
    l = pid // (PROGRAMS_U * PROGRAMS_B)

    # Where the lane's first step reads and writes, and how far it is to the next; ``steps`` are rows of all steps, and ``last``
    # is the first row of the last one.
    rows = gl.cast(B, gl.int64)
    steps = T * rows
    last = steps - B
    backwards = l if REVERSE else 0
    p_lengths = p_offsets
    if p_offsets is not None:
        p_lengths += T + 1
        steps = gl.cast(gl.load(p_offsets + T), gl.int64)
        T = gl.load(p_lengths + i_b * N)
        last = gl.cast(gl.load(p_offsets + (T - 1)), gl.int64)
    stride_ht = B * ROW_H
    stride_gt = B * ROW_G
    stride_st = B * (4 * H)
    p_save = p_gates
    p_x = p_h0
    if REVERSE:
        p_h0 += l * H
        p_seq = p_out + l * (H + last * ROW_H)
        p_gi += l * ((steps + last) * ROW_G)
        if SAVE_GATES:
            p_save += l * ((steps + last) * (4 * H))
        sign = 1 - 2 * l
        stride_ht *= sign
        stride_gt *= sign
        stride_st *= sign
    elif PAIRED is not None:
        back = walks_back(l, PAIRED)
        first = l * steps + back * (steps - B)
        p_h0 += l * stride_ht
        p_seq = p_out + first * ROW_H
        p_gi += first * ROW_G
        if SAVE_GATES:
            p_save += first * (4 * H)
        sign = 1 - 2 * back
        stride_ht *= sign
        stride_gt *= sign
        stride_st *= sign
    else:
        p_seq = p_out
        if STACK:
            p_h0 += l * stride_ht
            p_seq = gl.where(l == LANES - 1, p_out, p_below + l * (steps * H))
            p_handed = p_below
            if p_masks is not None:
                p_handed = p_masked
                p_mask = p_masks + gl.minimum(l, LANES - 2) * (steps * H)
                p_hand = p_masked + gl.minimum(l, LANES - 2) * (steps * H)
            p_x = gl.where(l > 0, p_handed + gl.maximum(l - 1, 0) * (steps * H), p_h0)
            if SAVE_GATES:
                p_save += l * (steps * (4 * H))
    if p_offsets is not None:
        stride_ht, stride_gt, stride_st = strides(rows_after(p_offsets, 0, T, backwards), ROW_H, H)

    # Partial sums.
    s_r = gl.allocate_shared_memory(gl.float32, [KS, U, N], banked)
    s_z = gl.allocate_shared_memory(gl.float32, [KS, U, N], banked)
    s_n = gl.allocate_shared_memory(gl.float32, [KS, U, N], banked)

    # Weights [slices, units, k]: slices of W_ih (if KX), then of W_hh.
    o_wu = gl.arange(0, U, gl.SliceLayout(0, gl.SliceLayout(2, left)))
    o_wu = i_u * U + gl.expand_dims(gl.expand_dims(o_wu, 0), 2)
    o_wk = gl.expand_dims(gl.expand_dims(gl.arange(0, KC, gl.SliceLayout(0, gl.SliceLayout(1, left))), 0), 1)
    o_ws = gl.expand_dims(gl.expand_dims(gl.arange(0, KS, gl.SliceLayout(1, gl.SliceLayout(2, left))), 1), 2)
    p_w = select(p_w_hh, l)
    if KX > 0:
        p_w = gl.where(o_ws < KX, select(p_w_ih, l - 1), p_w)
        o_wk += gl.where(o_ws < KX, o_ws, o_ws - KX) * KC
    else:
        o_wk += o_ws * KC
    m_w = (o_wu < H) & (o_wk < H)
    if KX > 0:
        m_w = m_w & ((o_ws >= KX) | (l > 0))
    o_w = o_wu * H + o_wk
    b_wr = round_parameter(gl.load(p_w + o_w, mask=m_w, other=0.0))
    b_wz = round_parameter(gl.load(p_w + o_w + H * H, mask=m_w, other=0.0))
    b_wn = round_parameter(gl.load(p_w + o_w + 2 * H * H, mask=m_w, other=0.0))

    # Gates [units, batch].
    o_u1 = i_u * U + gl.arange(0, U, gl.SliceLayout(1, gate))
    o_u = gl.expand_dims(o_u1, 1)
    m_u = o_u < H
    o_b = i_b * N + gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, gate)), 0)
    biases = load_biases(p_b_ih, p_b_hh, l, o_u1, o_u1 < H, H)
    if SHARE_BIAS:
        s_bias = share_rows(biases, U)
    b_bias_r = gl.expand_dims(biases[0], 1)
    b_bias_z = gl.expand_dims(biases[1], 1)
    b_bias_n = gl.expand_dims(biases[2], 1)
    b_bias_hn = gl.expand_dims(biases[3], 1)
    m = m_u & (o_b < B)
    o_h = o_b * ROW_H + o_u
    if p_masks is not None:
        m_m = m & (l < LANES - 1)
    b_h = gl.load(p_h0 + o_h, mask=m, other=0.0).to(gl.float32)
    p_h_n += l * (rows * H)
    p_old, p_new = p_h0, p_seq  # the states before and after a step
    p_g = p_gi
    m_g = m
    if STACK:
        m_g = m & (l == 0)
    steps_b = row_steps(p_lengths, gl.minimum(o_b, B - 1), T, backwards)

    # The polled tile [slices, k, batch].  Rows beyond the batch read its last row, vectors beyond H the first ones.
    o_k = gl.expand_dims(gl.expand_dims(gl.arange(0, KC, gl.SliceLayout(0, gl.SliceLayout(2, right))), 0), 2)
    o_s = gl.expand_dims(gl.expand_dims(gl.arange(0, KS, gl.SliceLayout(1, gl.SliceLayout(2, right))), 1), 2)
    o_n = gl.expand_dims(gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(1, right))), 0), 1)
    o_n = i_b * N + o_n
    if KX > 0:
        o_k += gl.where(o_s < KX, o_s, o_s - KX) * KC
    else:
        o_k += o_s * KC
    WHOLE: gl.constexpr = KC * KH == H
    m_k = o_k < H
    o_k = gl.where(m_k, o_k, o_k % KW)
    if REVERSE:
        steps_n = row_steps(p_lengths, gl.minimum(o_n, B - 1), T, backwards)
    zero = gl.zeros([KS, U, N], gl.float32, mma)
    o_m = i_b * N + gl.expand_dims(gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(1, mma))), 0), 1)
    B_x = B  # rows of the polled x, and of h
    B_h = B

    # Lines to prefetch: one address a thread, of states that this program will write and of gi that it will read.
    LINES: gl.constexpr = max(1, U * BYTES // 128)
    o_f = gl.arange(0, 4 * N * LINES, gl.BlockedLayout([1], [32], [num_warps], [0]))
    o_fb = gl.minimum(i_b * N + o_f % N, B - 1)
    o_fu = gl.minimum(i_u * U + o_f // (4 * N) * (128 // BYTES), H - 1)
    o_fg = o_f // N % 4
    if STACK:
        o_fg = gl.where(l > 0, 0, o_fg)
    o_fh = o_fb * ROW_H + o_fu
    a_f = (p_gi + o_fb * ROW_G + o_fu + (o_fg - 1) * H).to(gl.int64)
    a_f = gl.where(o_fg == 0, (p_seq + o_fh).to(gl.int64), a_f)
    if p_offsets is None:
        step_f = gl.where(o_fg == 0, stride_ht, stride_gt) * BYTES
        a_f += gl.minimum(AHEAD, T - 1) * step_f
    else:
        row_f = gl.where(o_fg == 0, ROW_H, ROW_G) * gl.cast(BYTES, gl.int64)
        row_f0 = first_row(p_offsets, 0, T, backwards)

    if AFTER and l > 0:
        s_x = gl.allocate_shared_memory(gl.float32, [KS, U, N], banked)
        p_v = select(p_w_ih, l - 1) + o_w
        b_vr = round_parameter(gl.load(p_v, mask=m_w, other=0.0))
        b_vz = round_parameter(gl.load(p_v + H * H, mask=m_w, other=0.0))
        b_vn = round_parameter(gl.load(p_v + 2 * H * H, mask=m_w, other=0.0))
        p_t = p_x + (o_k + gl.minimum(o_n, B - 1) * ROW_H)
        b_x = issue(p_t, VECTORS, K_VECTORS, VECTOR_BYTES, PACK)
        b_x = settle(b_x, p_t, p_error, VECTORS, K_VECTORS, VECTOR_BYTES, PACK, TIMEOUT)
        b_x = clear_beyond(b_x, m_k, WHOLE)
        b_xr = dot(b_vr, b_x, zero)
        b_xz = dot(b_vz, b_x, zero)
        s_x.store(dot(b_vn, b_x, zero))
        b_xn = add_slices(s_x, 0, KH, over_h, gate)
        for t in range(T):
            m_t = in_step(p_offsets, m, t, steps_b)
            b_keep = keep_of(p_keep, t, T, backwards, o_b, B)
            b_keep_m = keep_of(p_keep, t, T, backwards, o_m, B)
            if p_offsets is not None:
                stride_ht, stride_gt, stride_st = strides(rows_after(p_offsets, t, T, backwards), ROW_H, H)
            p_x += gl.where(t + 1 < T, stride_ht, 0)
            if p_masks is not None:
                m_mt = in_step(p_offsets, m_m, t, steps_b)
                b_mask = gl.load(p_mask + o_h, mask=m_mt, other=0.0)
            p_t = p_old + (o_k + gl.minimum(o_n, B_h - 1) * ROW_H)
            b_t = issue(p_t, VECTORS, K_VECTORS, VECTOR_BYTES, PACK)
            b_t = settle(b_t, p_t, p_error, VECTORS, K_VECTORS, VECTOR_BYTES, PACK, TIMEOUT)
            b_t = clear_beyond(b_t, m_k, WHOLE)
            s_r.store(dot_kept(p_keep, b_wr, b_t, b_xr, b_keep_m, zero))
            s_n.store(kept(p_keep, dot(b_wn, b_t, zero), b_keep_m))
            s_z.store(dot_kept(p_keep, b_wz, b_t, b_xz, b_keep_m, zero))
            if SHARE_BIAS:
                b_r = sigmoid(add_slices(s_r, 0, KH, over_h, gate) + shared_row(s_bias, 0, gate))
                b_hn = add_slices(s_n, 0, KH, over_h, gate) + shared_row(s_bias, 3, gate)
                b_z = sigmoid(add_slices(s_z, 0, KH, over_h, gate) + shared_row(s_bias, 1, gate))
                b_n = tanh(b_xn + shared_row(s_bias, 2, gate) + b_r * b_hn)
            else:
                b_r = sigmoid(add_slices(s_r, 0, KH, over_h, gate) + b_bias_r)
                b_hn = add_slices(s_n, 0, KH, over_h, gate) + b_bias_hn
                b_z = sigmoid(add_slices(s_z, 0, KH, over_h, gate) + b_bias_z)
                b_n = tanh(b_xn + b_bias_n + b_r * b_hn)
            b_before = b_h
            b_h = kept(p_keep, b_h, b_keep)
            b_h = b_n + b_z * (b_h - b_n)
            b_h = gl.where(b_h == b_h, b_h, float("nan"))
            if HX < H:
                b_h = gl.where(o_u < HX, b_h, 0.0)
            b_h = if_in_step(p_offsets, b_h, b_before, t, steps_b)
            gl.store(p_new + o_h, b_h.to(dtype), mask=m_t)
            if p_masks is not None:
                gl.store(p_hand + o_h, masked(b_h.to(dtype), b_mask), mask=m_mt)
                p_mask += stride_ht
                p_hand += stride_ht
            if SAVE_GATES:
                p_st = p_save + (o_b * (4 * H) + o_u)
                gl.store(p_st, b_r.to(dtype), mask=m_t)
                gl.store(p_st + H, b_z.to(dtype), mask=m_t)
                gl.store(p_st + 2 * H, b_n.to(dtype), mask=m_t)
                gl.store(p_st + 3 * H, b_hn.to(dtype), mask=m_t)
                p_save += stride_st
            B_x = rows_of(p_offsets, t + 1, T, backwards, B)
            p_t = p_x + (o_k + gl.minimum(o_n, B_x - 1) * ROW_H)
            b_x = issue(p_t, VECTORS, K_VECTORS, VECTOR_BYTES, PACK)
            b_x = settle(b_x, p_t, p_error, VECTORS, K_VECTORS, VECTOR_BYTES, PACK, TIMEOUT)
            b_x = clear_beyond(b_x, m_k, WHOLE)
            b_xr = dot(b_vr, b_x, zero)
            b_xz = dot(b_vz, b_x, zero)
            s_x.store(dot(b_vn, b_x, zero))
            b_xn = add_slices(s_x, 0, KH, over_h, gate)
            p_old = p_new
            p_new += stride_ht
            if p_offsets is None:
                if AHEAD > 0:  # of a higher lane all lines are states
                    prefetch((p_old + gl.minimum(AHEAD, T - 1 - t) * stride_ht + o_fh).to(gl.int64))
            else:
                B_h = rows_of(p_offsets, t, T, backwards, B)
                if AHEAD > 0:
                    rows_f = first_row(p_offsets, t + AHEAD, T, backwards) - first_row(p_offsets, t, T, backwards)
                    prefetch((p_old + rows_f * ROW_H + o_fh).to(gl.int64))
        gl.store(p_h_n + (o_b * H + o_u), b_h.to(dtype), mask=m)
    else:
        if KX > 0:
            p_t = tile_of(p_offsets, p_x, p_old, o_s, o_k, o_n, B_x, B_h, ROW_H, KX)
            b_t = issue(p_t, VECTORS, K_VECTORS, VECTOR_BYTES, PACK)
            b_t = settle(b_t, p_t, p_error, VECTORS, K_VECTORS, VECTOR_BYTES, PACK, TIMEOUT)
            b_t = clear_beyond(b_t, m_k, WHOLE)
            s_r.store(dot(b_wr, b_t, zero))
            s_z.store(dot(b_wz, b_t, zero))
            s_n.store(dot(b_wn, b_t, zero))
            b_xr = add_slices(s_r, 0, KX, over_x, gate)
            b_xz = add_slices(s_z, 0, KX, over_x, gate)
            b_xn = add_slices(s_n, 0, KX, over_x, gate)
            p_x += gl.where((l > 0) & (T > 1), stride_ht, 0)
        for t in range(T):
            m_t = in_step(p_offsets, m, t, steps_b)
            m_gt = in_step(p_offsets, m_g, t, steps_b)
            b_keep = keep_of(p_keep, t, T, backwards, o_b, B)
            if p_offsets is not None:
                stride_ht, stride_gt, stride_st = strides(rows_after(p_offsets, t, T, backwards), ROW_H, H)
                rows_x = rows_after(p_offsets, t + 1, T, backwards)
            if p_masks is not None:
                m_mt = in_step(p_offsets, m_m, t, steps_b)
                b_mask = gl.load(p_mask + o_h, mask=m_mt, other=0.0)
            p_gt = p_g + (o_b * ROW_G + o_u)
            b_ar = gl.load(p_gt, mask=m_gt, other=0.0).to(gl.float32)
            b_az = gl.load(p_gt + H, mask=m_gt, other=0.0).to(gl.float32)
            b_an = gl.load(p_gt + 2 * H, mask=m_gt, other=0.0).to(gl.float32)
            if KX > 0:
                b_ar += gl.where(l > 0, b_xr, 0.0)
                b_az += gl.where(l > 0, b_xz, 0.0)
                b_an += gl.where(l > 0, b_xn, 0.0)
            p_ht = p_old
            if REVERSE:
                p_ht = if_in_step(p_offsets, p_old, p_h0, t - 1, steps_n)
            if KX > 0:
                B_x = rows_of(p_offsets, t + 1, T, backwards, B)
            p_t = tile_of(p_offsets, p_x, p_ht, o_s, o_k, o_n, B_x, B_h, ROW_H, KX)
            b_t = issue(p_t, VECTORS, K_VECTORS, VECTOR_BYTES, PACK)
            b_t = settle(b_t, p_t, p_error, VECTORS, K_VECTORS, VECTOR_BYTES, PACK, TIMEOUT)
            b_t = clear_beyond(b_t, m_k, WHOLE)
            s_r.store(dot(b_wr, b_t, zero))
            s_z.store(dot(b_wz, b_t, zero))
            s_n.store(dot(b_wn, b_t, zero))
            if SHARE_BIAS:
                b_ar += shared_row(s_bias, 0, gate)
                b_az += shared_row(s_bias, 1, gate)
                b_an += shared_row(s_bias, 2, gate)
                b_ahn = shared_row(s_bias, 3, gate)
            else:
                b_ar += b_bias_r
                b_az += b_bias_z
                b_an += b_bias_n
                b_ahn = b_bias_hn
            b_r = sigmoid(kept(p_keep, add_slices(s_r, KX, KH, over_h, gate), b_keep) + b_ar)
            b_hn = kept(p_keep, add_slices(s_n, KX, KH, over_h, gate), b_keep) + b_ahn
            b_z = sigmoid(kept(p_keep, add_slices(s_z, KX, KH, over_h, gate), b_keep) + b_az)
            b_n = tanh(b_an + b_r * b_hn)
            b_before = b_h
            b_h = kept(p_keep, b_h, b_keep)
            b_h = b_n + b_z * (b_h - b_n)
            b_h = gl.where(b_h == b_h, b_h, float("nan"))
            if HX < H:
                b_h = gl.where(o_u < HX, b_h, 0.0)
            b_h = if_in_step(p_offsets, b_h, b_before, t, steps_b)
            gl.store(p_new + o_h, b_h.to(dtype), mask=m_t)
            if p_masks is not None:
                gl.store(p_hand + o_h, masked(b_h.to(dtype), b_mask), mask=m_mt)
                p_mask += stride_ht
                p_hand += stride_ht
            if SAVE_GATES:
                p_st = p_save + (o_b * (4 * H) + o_u)
                gl.store(p_st, b_r.to(dtype), mask=m_t)
                gl.store(p_st + H, b_z.to(dtype), mask=m_t)
                gl.store(p_st + 2 * H, b_n.to(dtype), mask=m_t)
                gl.store(p_st + 3 * H, b_hn.to(dtype), mask=m_t)
            if STORE_FIRST:
                barrier()  # else the loads of the x slices are scheduled before the store that all others wait for
            if KX > 0:
                b_xr = add_slices(s_r, 0, KX, over_x, gate)
                b_xz = add_slices(s_z, 0, KX, over_x, gate)
                b_xn = add_slices(s_n, 0, KX, over_x, gate)
            barrier()  # the partial sums have been read; here no one waits for it
            p_old = p_new
            p_new += stride_ht
            p_g += stride_gt
            if SAVE_GATES:
                p_save += stride_st
            if p_offsets is not None:
                if not REVERSE:
                    B_h = rows_of(p_offsets, t, T, backwards, B)
                stride_ht = rows_x * ROW_H
            p_x += gl.where((l > 0) & (t + 2 < T), stride_ht, 0)
            if AHEAD > 0:
                if p_offsets is None:
                    prefetch(a_f)
                    a_f += gl.where(t + 1 + AHEAD < T, step_f, 0)
                else:
                    prefetch(a_f + (first_row(p_offsets, t + AHEAD, T, backwards) - row_f0) * row_f)
        gl.store(p_h_n + (o_b * H + o_u), b_h.to(dtype), mask=m)


def wavefront_constants(
    plan: WavefrontPlan, *, lanes: int, hidden: int, units: int, reverse: bool, save_gates: bool, timeout_ns: int,
    pair: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What selects the code of ``wavefront_kernel``: its constants and options.  units: without padding."""
    return dict(
        LANES=lanes, H=hidden, HX=units,
        U=plan.units, N=plan.rows,
        KX=plan.input_slices if lanes > 1 and not reverse and pair is None else 0, KH=plan.slices, MS=plan.unit_warps,
        REVERSE=reverse, PAIRED=pair, SAVE_GATES=save_gates,
        STORE_FIRST=plan.store_first, AHEAD=plan.ahead, TIMEOUT=timeout_ns,
        num_warps=plan.num_warps, maxnreg=most_registers(plan.num_warps), launch_cooperative_grid=True,
    )  # fmt: skip


def wavefront_launch(
    gi: Tensor,
    h0: Tensor,
    below: Tensor | None,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    b_ih: Sequence[Tensor] | None,
    b_hh: Sequence[Tensor] | None,
    out: Tensor,
    h_n: Tensor,
    gates: Tensor | None,
    error: Tensor,
    *,
    plan: WavefrontPlan,
    units: int | None = None,
    masks: Tensor | None = None,
    handed: Tensor | None = None,
    pair: int | None = None,
    offsets: Tensor | None = None,
    keep: Tensor | None = None,
    timeout_ns: int = 10_000_000_000,
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and arguments of ``wavefront_kernel``; all tensors are contiguous, and H is a multiple of 16.

    gi: [T, B, 3H] of the lowest layer, or [2, T, B, 3H] of both directions or of a pair, without biases, in the dtype of the
    states.
    h0, out, below: of ``prepare``.  h0 [lanes, B, H], out [T, B, H], below [lanes-1, T, B, H], or None of a single lane;
    of two directions h0 [B, 2H], out [T, B, 2H]; of a pair h0 [2, B, H], out [2, T, B, H].
    w_ih: [3H, H] of each lane but the lowest, empty where there is none.  w_hh, b_ih, b_hh: one of each lane.
    h_n: [lanes, B, H].  gates: [lanes, T, B, 4, H] or None.  error: int64[4], see ``handover``.
    units: those that are no padding.  masks, handed: with dropout in a stack, both like below; handed is filled like that.
    pair: None, or which lanes of a pair walk backwards, a bit each.
    offsets: of packed sequences, int32 [T + 1 + B], see ``lanes``; then [N] takes the place of [T, B] everywhere.
    keep: with resets, bool or of the dtype of the states [T, B]; not of a pair or of packed sequences.
    """
    lanes, (batch, hidden) = len(w_hh), h_n.shape[1:]
    reverse = check_launch(gi, h0, below, w_ih, w_hh, out, h_n, gates, masks, handed, pair, offsets, keep)
    arguments = launch_arguments(gi, h0, below, w_ih, w_hh, b_ih, b_hh, out, h_n, gates, error, masks, handed, offsets, keep)
    arguments |= wavefront_constants(
        plan, lanes=lanes, hidden=hidden, units=units or hidden, reverse=reverse, save_gates=gates is not None,
        timeout_ns=timeout_ns, pair=pair,
    )
    return (plan.programs(lanes, batch, hidden),), arguments
