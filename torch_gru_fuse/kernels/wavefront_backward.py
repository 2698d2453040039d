"""Gradients of whole sequences in one launch: the backward of ``wavefront``, step by step from the last to the first.

Units are spread over programs as in the forward, each keeps the columns of W that lead back to its units, and what crosses
from program to program is the gradients of the gates, as ``handover`` says.  In a stack, layer l does step t while layer l+1
does step t-1.

Names as in ``lanes``; b_d is a gradient, ``b_f`` what dh is multiplied with to make it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .handover import clear_beyond, issue, prefetch, settle
from .lanes import (
    add_slices,
    backward_arguments,
    barrier,
    check_backward,
    dot,
    first_row,
    gate_factors,
    gate_layout,
    if_in_step,
    in_step,
    is_step,
    keep_of,
    kept,
    most_registers,
    round_parameter,
    row_steps,
    rows_after,
    rows_of,
    select,
    shared_bases,
    walks_back,
    without_pattern,
)
from .wavefront import _slice_length

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..planner.whole_sequence import WavefrontPlan


@gluon.jit
def tile_of(p_x, p_h, o_s, o, KX: gl.constexpr):
    """Addresses of a polled tile [slices, k, batch] of gate gradients: slices of the lane above, then of the own lane."""
    if KX > 0:
        return gl.where(o_s < KX, p_x, p_h) + o
    else:
        return p_h + o


@gluon.jit
def load_saved(p_gates, p_h, p_dy, m, m_dy, b_zero, H: gl.constexpr):
    """r, z, n, hn, the state before the step, and the gradient of the output: what a step needs of its own units."""
    b_r = gl.load(p_gates, mask=m, other=0.0).to(gl.float32)
    b_z = gl.load(p_gates + H, mask=m, other=0.0).to(gl.float32)
    b_n = gl.load(p_gates + 2 * H, mask=m, other=0.0).to(gl.float32)
    b_hn = gl.load(p_gates + 3 * H, mask=m, other=0.0).to(gl.float32)
    b_h = gl.load(p_h, mask=m, other=0.0).to(gl.float32)
    if p_dy is None:
        b_dy = b_zero
    else:
        b_dy = gl.load(p_dy, mask=m_dy, other=0.0).to(gl.float32)
    return b_r, b_z, b_n, b_hn, b_h, b_dy


@gluon.jit
def poll(p_r, p_z, p_n, p_error, m_k, WHOLE: gl.constexpr,
         vectors: gl.constexpr, k_vectors: gl.constexpr, vector_bytes: gl.constexpr, pack: gl.constexpr,
         TIMEOUT: gl.constexpr):  # fmt: skip
    """Three tiles of gate gradients, as soon as all of them are there."""
    b_r = issue(p_r, vectors, k_vectors, vector_bytes, pack)
    b_z = issue(p_z, vectors, k_vectors, vector_bytes, pack)
    b_n = issue(p_n, vectors, k_vectors, vector_bytes, pack)
    b_r = settle(b_r, p_r, p_error, vectors, k_vectors, vector_bytes, pack, TIMEOUT)
    b_z = settle(b_z, p_z, p_error, vectors, k_vectors, vector_bytes, pack, TIMEOUT)
    b_n = settle(b_n, p_n, p_error, vectors, k_vectors, vector_bytes, pack, TIMEOUT)
    return clear_beyond(b_r, m_k, WHOLE), clear_beyond(b_z, m_k, WHOLE), clear_beyond(b_n, m_k, WHOLE)


@gluon.jit(do_not_specialize=["T", "B"])
def wavefront_backward_kernel(
    p_dy, p_dhn, p_h0, p_out, p_below, p_gates, p_w_ih, p_w_hh, p_masks,
    p_d_gates, p_dhx, p_sums, p_error, p_offsets, p_keep,
    T, B,
    LANES: gl.constexpr, H: gl.constexpr,
    U: gl.constexpr, N: gl.constexpr,
    KX: gl.constexpr, KH: gl.constexpr, MS: gl.constexpr,
    REVERSE: gl.constexpr, PAIRED: gl.constexpr, AHEAD: gl.constexpr, TIMEOUT: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """All T steps of U units of one lane, for N batch rows, from the last step to the first.

        dh_t = dy_t + z_{t+1} dh_{t+1} + (dr, dz, dhn)_{t+1} W_h         dh_{T-1} = dy_{T-1} + gradient of h_n
        dn   = dh_t (1 - z) (1 - n^2),   dhn = dn r                       gates of step t
        dr   = dn hn r (1 - r),          dz  = dh_t (h_{t-1} - n) z (1 - z)
        gradient of h_0 = z_0 dh_0 + (dr, dz, dhn)_0 W_h

    dy of the highest lane, of both directions, or of a pair (PAIRED: as in ``wavefront_kernel``) is p_dy [T, B, H], [T, B, 2H]
    or [2, T, B, H], as the sequences p_out are, or None for 0; of a lane below another it is (dr, dz, dn)_t W_i of that, times
    p_masks [lanes-1, T, B, H] if given (dropout).  The gradient of h_n is p_dhn [lanes, B, H], or None for 0.  Of the forward:
    p_h0 [lanes, B, H] as its caller gave it, its sequences p_out and p_below, and p_gates [lanes, T, B, 4, H] = r, z, n, hn.

    Results: p_d_gates [lanes, T, B, 4, H] = dhn, dr, dz, dn, which comes filled with the pattern; p_dhx [lanes, B, H], the
    gradient of h0; p_sums [lanes, programs along the batch, 4, H], float32 sums of d_gates over steps and rows.

    Packed sequences: p_offsets, see ``lanes``; rows [N] of all steps take the place of [T, B].  A program begins with the last
    step of its longest sequence.  The gradient of a sequence's h_n waits for the steps of the sequence, and that of its h0
    stays as it is after them; what such a row polls then are the gradients of another.

    Resets: p_keep [T, B], see ``lanes``: k_t h_{t-1} takes the place of h_{t-1}, and dh_{t-1} - dy_{t-1}, or the gradient of
    h_0, is k_t times what it is above.  A step reads keep of a program's rows, a step ahead.

    H is a multiple of 16.  The warps: KH slices of k for the own lane, beside them KX for the lane above, one step ahead (0:
    once the gradients are on their way, the same warps take those of the lane above for the next step, from a second set of
    weights), times MS along the units.  AHEAD steps before they are due, lines are brought to L2: the fill had pushed them out.

    Bytes a step and lane: each program reads 3BH gate gradients of its rows and writes 4BH of its own; gates, state and dy of
    its own units, 6BH in all, are read once; weights none.  Bound by latency, as the forward.
    """
    dtype: gl.constexpr = p_d_gates.dtype.element_ty
    BYTES: gl.constexpr = dtype.primitive_bitwidth // 8
    STACK: gl.constexpr = LANES > 1 and not REVERSE and PAIRED is None
    ROW_H: gl.constexpr = 2 * H if REVERSE else H
    ROW_D: gl.constexpr = 4 * H
    KS: gl.constexpr = KX + KH
    AFTER: gl.constexpr = STACK and KX == 0
    KC: gl.constexpr = _slice_length(H, KH)
    KW: gl.constexpr = min(16 // BYTES, KC // 8)
    PACK: gl.constexpr = KC * N // 32
    VECTORS: gl.constexpr = PACK // KW
    VECTOR_BYTES: gl.constexpr = KW * BYTES
    WHOLE: gl.constexpr = KC * KH == H
    K_VECTORS: gl.constexpr = KC // (4 * KW) if WHOLE else 1
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

    # Where the lane's first step, which is the last of its forward, reads and writes, and how far it is to the next; ``steps``
    # are rows of all steps, and ``last`` is the first row of the last one.
    rows = gl.cast(B, gl.int64)
    steps = T * rows
    stride_h = -B * ROW_H
    stride_d = -B * ROW_D
    p_dhx += l * (rows * H)
    p_h0 += l * (rows * H)
    last = steps - rows
    backwards = 1 - l if REVERSE else 1
    p_lengths = p_offsets
    if p_offsets is not None:
        p_lengths += T + 1
        steps = gl.cast(gl.load(p_offsets + T), gl.int64)
        T = gl.load(p_lengths + i_b * N)
        last = gl.cast(gl.load(p_offsets + (T - 1)), gl.int64)
    p_d = p_d_gates + (l * steps + last) * ROW_D
    p_g = p_gates + (l * steps + last) * ROW_D
    p_x = p_d
    o_y = last * ROW_H  # row of p_dy, p_out
    p_seq = p_out
    if REVERSE:
        sign = 2 * l - 1
        stride_h = sign * B * ROW_H
        stride_d = sign * B * ROW_D
        p_d -= l * (last * ROW_D)
        p_g -= l * (last * ROW_D)
        o_y += l * (H - last * ROW_H)
    elif PAIRED is not None:
        back = walks_back(l, PAIRED)
        sign = 2 * back - 1
        stride_h = sign * B * ROW_H
        stride_d = sign * B * ROW_D
        p_d -= back * ((steps - rows) * ROW_D)
        p_g -= back * ((steps - rows) * ROW_D)
        o_y += (l * steps - back * (steps - rows)) * ROW_H
    elif STACK:
        p_seq = gl.where(l == LANES - 1, p_out, p_below + gl.minimum(l, LANES - 2) * (steps * H))
        p_x = gl.where(l < LANES - 1, p_d + steps * ROW_D, p_d)
    p_seq += o_y
    above = l < LANES - 1 if STACK else False
    if p_offsets is not None:
        rows_t = rows_after(p_offsets, 0, T, backwards)
        stride_h = rows_t * ROW_H
        stride_d = rows_t * ROW_D

    # Partial sums.
    # Of the lane above apart: dropout applies to their sum, resets to that of the own one, and a row may take part in its step
    # and not in the own one.
    APART: gl.constexpr = p_masks is not None or p_offsets is not None or p_keep is not None
    s_sum = gl.allocate_shared_memory(gl.float32, [KS, U, N], banked)
    if AFTER and APART:
        s_x = gl.allocate_shared_memory(gl.float32, [KS, U, N], banked)

    # Weights [slices, units, k], transposed: slices of W_ih of the lane above (if KX), then of W_hh.
    o_wu = gl.arange(0, U, gl.SliceLayout(0, gl.SliceLayout(2, left)))
    o_wu = i_u * U + gl.expand_dims(gl.expand_dims(o_wu, 0), 2)
    o_wk = gl.expand_dims(gl.expand_dims(gl.arange(0, KC, gl.SliceLayout(0, gl.SliceLayout(1, left))), 0), 1)
    o_ws = gl.expand_dims(gl.expand_dims(gl.arange(0, KS, gl.SliceLayout(1, gl.SliceLayout(2, left))), 1), 2)
    p_w = select(p_w_hh, l)
    if KX > 0:
        p_w = gl.where(o_ws < KX, select(p_w_ih, l), p_w)
        o_wk += gl.where(o_ws < KX, o_ws, o_ws - KX) * KC
    else:
        o_wk += o_ws * KC
    m_w = (o_wu < H) & (o_wk < H)
    if KX > 0:
        m_w = m_w & ((o_ws >= KX) | above)
    o_w = o_wk * H + o_wu
    b_wr = round_parameter(gl.load(p_w + o_w, mask=m_w, other=0.0))
    b_wz = round_parameter(gl.load(p_w + o_w + H * H, mask=m_w, other=0.0))
    b_wn = round_parameter(gl.load(p_w + o_w + 2 * H * H, mask=m_w, other=0.0))

    # Gates [units, batch].
    o_u = i_u * U + gl.expand_dims(gl.arange(0, U, gl.SliceLayout(1, gate)), 1)
    o_b = i_b * N + gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, gate)), 0)
    m = (o_u < H) & (o_b < B)
    m_dy = m
    if STACK:
        m_dy = m & (l == LANES - 1)
    o_h = o_b * ROW_H + o_u
    o_d = o_b * ROW_D + o_u
    b_zero = gl.zeros([U, N], gl.float32, gate)
    if p_dhn is None:
        b_c = b_zero
    else:
        b_c = gl.load(p_dhn + l * (rows * H) + (o_b * H + o_u), mask=m, other=0.0).to(gl.float32)
    p_y = p_dy
    if p_dy is not None:
        p_y = p_dy + (o_y + o_h)
    if p_masks is not None:
        p_m = p_masks + gl.minimum(l, LANES - 2) * (steps * H) + (o_y + o_h)
        m_m = m & (l < LANES - 1)
    # the state before a step lies where the walk goes next; before the last one it is h0
    p_before = p_seq + stride_h + o_h
    p_first = p_h0 + (o_b * H + o_u)
    steps_b = row_steps(p_lengths, gl.minimum(o_b, B - 1), T, backwards)
    m_t = in_step(p_offsets, m, 0, steps_b)
    m_dyt = in_step(p_offsets, m_dy, 0, steps_b)
    saved = load_saved(p_g + o_d, gl.where(is_step(p_offsets, 1, steps_b), p_before, p_first), p_y, m_t, m_dyt, b_zero, H)
    b_r, b_z, b_n, b_hn, b_h, b_dy = saved
    b_keep = keep_of(p_keep, 0, T, backwards, o_b, B)
    b_h = kept(p_keep, b_h, b_keep)

    # The polled tile [slices, k, batch].  Rows beyond the batch read its last row, vectors beyond H the first ones.
    o_k = gl.expand_dims(gl.expand_dims(gl.arange(0, KC, gl.SliceLayout(0, gl.SliceLayout(2, right))), 0), 2)
    o_s = gl.expand_dims(gl.expand_dims(gl.arange(0, KS, gl.SliceLayout(1, gl.SliceLayout(2, right))), 1), 2)
    o_n = gl.expand_dims(gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(1, right))), 0), 1)
    if KX > 0:
        o_k += gl.where(o_s < KX, o_s, o_s - KX) * KC
    else:
        o_k += o_s * KC
    m_k = o_k < H
    o_k = gl.where(m_k, o_k, o_k % KW)
    o_n = i_b * N + o_n
    o_t = o_k + gl.minimum(o_n, rows_of(p_offsets, 0, T, backwards, B) - 1) * ROW_D
    zero = gl.zeros([KS, U, N], gl.float32, mma)

    # Lines to prefetch, one address a thread: d_gates that this program will write, gates, states and dy that it will read.
    LINES: gl.constexpr = max(1, U * BYTES // 128)
    o_f = gl.arange(0, 16 * N * LINES, gl.BlockedLayout([1], [32], [num_warps], [0]))
    o_fb = gl.minimum(i_b * N + o_f % N, B - 1)
    o_fu = gl.minimum(i_u * U + o_f // (16 * N) * (128 // BYTES), H - 1)
    o_fg = o_f // N % 16
    wide = o_fg < 8
    a_f = (p_seq + (o_fb * ROW_H + o_fu)).to(gl.int64)
    if p_dy is not None:
        top = o_fg % 2 == 0
        if STACK:
            top = top & (l == LANES - 1)
        a_f = gl.where(top, (p_dy + (o_y + o_fb * ROW_H + o_fu)).to(gl.int64), a_f)
    o_fd = o_fb * ROW_D + (o_fg % 4) * H + o_fu
    a_f = gl.where(wide, gl.where(o_fg < 4, (p_d + o_fd).to(gl.int64), (p_g + o_fd).to(gl.int64)), a_f)
    if p_offsets is None:
        step_f = gl.where(wide, stride_d, stride_h) * BYTES
        a_f += gl.minimum(AHEAD, T - 1) * step_f
    else:
        row_f = gl.where(wide, ROW_D, ROW_H) * gl.cast(BYTES, gl.int64)
        row_f0 = first_row(p_offsets, 0, T, backwards)

    # dy of the first step, where it comes from the lane above.
    if AFTER:
        p_v = select(p_w_ih, l) + o_w
        m_v = m_w & above
        b_vr = round_parameter(gl.load(p_v, mask=m_v, other=0.0))
        b_vz = round_parameter(gl.load(p_v + H * H, mask=m_v, other=0.0))
        b_vn = round_parameter(gl.load(p_v + 2 * H * H, mask=m_v, other=0.0))
    if STACK and above:
        p_t = p_x + o_t
        b_tr, b_tz, b_tn = poll(
            p_t + H, p_t + 2 * H, p_t + 3 * H, p_error, m_k, WHOLE, VECTORS, K_VECTORS, VECTOR_BYTES, PACK, TIMEOUT
        )
        if AFTER:
            s_sum.store(dot(b_vr, b_tr, zero) + dot(b_vz, b_tz, zero) + dot(b_vn, b_tn, zero))
            b_dy = add_slices(s_sum, 0, KH, over_h, gate)
        else:
            s_sum.store(dot(b_wr, b_tr, zero) + dot(b_wz, b_tz, zero) + dot(b_wn, b_tn, zero))
            b_dy = add_slices(s_sum, 0, KX, over_x, gate)
        barrier()
    if p_masks is not None:
        m_mt = in_step(p_offsets, m_m, 0, steps_b)
        b_dy *= gl.load(p_m, mask=m_mt, other=1.0).to(gl.float32)

    b_sum_hn = b_zero
    b_sum_r = b_zero
    b_sum_z = b_zero
    b_sum_n = b_zero
    b_fhn, b_fr, b_fz, b_fn = gate_factors(b_r, b_z, b_n, b_hn, b_h)
    for t in range(T):  # steps done
        m_t = in_step(p_offsets, m, t, steps_b)
        b_dh = if_in_step(p_offsets, b_c + b_dy, b_zero, t, steps_b)
        b_dhn = without_pattern(b_dh * b_fhn)
        b_dr = without_pattern(b_dh * b_fr)
        b_dz = without_pattern(b_dh * b_fz)
        b_dn = without_pattern(b_dh * b_fn)
        p_dt = p_d + o_d
        gl.store(p_dt, b_dhn.to(dtype), mask=m_t)
        gl.store(p_dt + H, b_dr.to(dtype), mask=m_t)
        gl.store(p_dt + 2 * H, b_dz.to(dtype), mask=m_t)
        gl.store(p_dt + 3 * H, b_dn.to(dtype), mask=m_t)
        b_sum_hn += b_dhn
        b_sum_r += b_dr
        b_sum_z += b_dz
        b_sum_n += b_dn
        b_c = if_in_step(p_offsets, b_z * b_dh, b_c, t, steps_b)
        # the next step's own values, on their way while this one waits
        more = t + 1 < T
        stride_before = stride_h
        if p_offsets is not None:
            rows_t = rows_after(p_offsets, t, T, backwards)
            stride_h = rows_t * ROW_H
            stride_d = rows_t * ROW_D
            stride_before = rows_after(p_offsets, t + 1, T, backwards) * ROW_H
        p_g += gl.where(more, stride_d, 0)
        p_before += gl.where(more, stride_before, 0)
        if p_dy is not None:
            p_y += gl.where(more, stride_h, 0)
        m_t = in_step(p_offsets, m, t + 1, steps_b)
        m_dyt = in_step(p_offsets, m_dy, t + 1, steps_b)
        b_keep_next = keep_of(p_keep, gl.minimum(t + 1, T - 1), T, backwards, o_b, B)
        b_r, b_z, b_n, b_hn, b_h, b_dy = load_saved(
            p_g + o_d, gl.where(is_step(p_offsets, t + 2, steps_b), p_before, p_first), p_y, m_t, m_dyt, b_zero, H
        )
        if p_masks is not None:
            p_m += gl.where(more, stride_h, 0)
            m_mt = in_step(p_offsets, m_m, t + 1, steps_b)
            b_mask = gl.load(p_m, mask=m_mt, other=1.0).to(gl.float32)
        if STACK:
            p_x += gl.where(more & above, stride_d, 0)
        b_ar = zero
        b_az = zero
        b_an = zero
        if AFTER and (above & more):
            if p_offsets is not None:
                o_t = o_k + gl.minimum(o_n, rows_of(p_offsets, t + 1, T, backwards, B) - 1) * ROW_D
            p_t = p_x + o_t
            b_tr, b_tz, b_tn = poll(
                p_t + H, p_t + 2 * H, p_t + 3 * H, p_error, m_k, WHOLE, VECTORS, K_VECTORS, VECTOR_BYTES, PACK, TIMEOUT
            )
            b_ar = dot(b_vr, b_tr, zero)
            b_az = dot(b_vz, b_tz, zero)
            b_an = dot(b_vn, b_tn, zero)
            if APART:
                s_x.store(b_ar + b_az + b_an)
                b_dy = add_slices(s_x, 0, KH, over_h, gate)
                if p_masks is not None:
                    b_dy = b_mask * b_dy
                b_ar = zero
                b_az = zero
                b_an = zero
        if p_offsets is not None:
            rows_n = rows_of(p_offsets, t, T, backwards, B)
            if KX > 0:
                rows_n = gl.where((o_s < KX) & above, rows_of(p_offsets, t + 1, T, backwards, B), rows_n)
            o_t = o_k + gl.minimum(o_n, rows_n - 1) * ROW_D
        p_tr = tile_of(p_x + H, p_d + H, o_s, o_t, KX)
        p_tn = tile_of(p_x + 3 * H, p_d, o_s, o_t, KX)
        b_tr, b_tz, b_tn = poll(p_tr, p_tr + H, p_tn, p_error, m_k, WHOLE, VECTORS, K_VECTORS, VECTOR_BYTES, PACK, TIMEOUT)
        b_ar = dot(b_wr, b_tr, b_ar)
        b_az = dot(b_wz, b_tz, b_az)
        b_an = dot(b_wn, b_tn, b_an)
        s_sum.store(b_ar + b_az + b_an)
        b_h = kept(p_keep, b_h, b_keep_next)
        b_fhn, b_fr, b_fz, b_fn = gate_factors(b_r, b_z, b_n, b_hn, b_h)
        b_c += if_in_step(p_offsets, add_slices(s_sum, KX, KH, over_h, gate), b_zero, t, steps_b)
        b_c = kept(p_keep, b_c, b_keep)
        b_keep = b_keep_next
        if KX > 0:
            b_dx = add_slices(s_sum, 0, KX, over_x, gate)
            if p_masks is not None:
                b_dx *= b_mask
            b_dy = gl.where(above, b_dx, b_dy)
        barrier()  # the partial sums have been read; here no one waits for it
        p_d += stride_d
        if STACK:
            p_x += gl.where(above, 0, stride_d)
        if AHEAD > 0:
            if p_offsets is None:
                prefetch(a_f)
                a_f += gl.where(t + 1 + AHEAD < T, step_f, 0)
            else:
                prefetch(a_f + (first_row(p_offsets, t + AHEAD, T, backwards) - row_f0) * row_f)
    gl.store(p_dhx + (o_b * H + o_u), b_c.to(dtype), mask=m)
    p_sums += (l * PROGRAMS_B + i_b) * (4 * H)
    o_u1 = i_u * U + gl.arange(0, U, gl.SliceLayout(1, gate))
    gl.store(p_sums + o_u1, gl.sum(gl.where(m, b_sum_hn, 0.0), axis=1), mask=o_u1 < H)
    gl.store(p_sums + H + o_u1, gl.sum(gl.where(m, b_sum_r, 0.0), axis=1), mask=o_u1 < H)
    gl.store(p_sums + 2 * H + o_u1, gl.sum(gl.where(m, b_sum_z, 0.0), axis=1), mask=o_u1 < H)
    gl.store(p_sums + 3 * H + o_u1, gl.sum(gl.where(m, b_sum_n, 0.0), axis=1), mask=o_u1 < H)


def wavefront_backward_constants(
    plan: WavefrontPlan, *, lanes: int, hidden: int, reverse: bool, timeout_ns: int, pair: int | None = None
) -> dict[str, Any]:
    """What selects the code of ``wavefront_backward_kernel``: its constants and options."""
    return dict(
        LANES=lanes, H=hidden, U=plan.units, N=plan.rows,
        KX=plan.input_slices if lanes > 1 and not reverse and pair is None else 0, KH=plan.slices, MS=plan.unit_warps,
        REVERSE=reverse, PAIRED=pair, AHEAD=plan.ahead, TIMEOUT=timeout_ns,
        num_warps=plan.num_warps, maxnreg=most_registers(plan.num_warps), launch_cooperative_grid=True,
    )  # fmt: skip


def wavefront_backward_launch(
    dy: Tensor | None,
    dhn: Tensor | None,
    h0: Tensor,
    out: Tensor,
    below: Tensor | None,
    gates: Tensor,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    d_gates: Tensor,
    dhx: Tensor,
    sums: Tensor,
    error: Tensor,
    *,
    plan: WavefrontPlan,
    masks: Tensor | None = None,
    pair: int | None = None,
    offsets: Tensor | None = None,
    keep: Tensor | None = None,
    timeout_ns: int = 10_000_000_000,
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and arguments of ``wavefront_backward_kernel``; all tensors are contiguous, and H is a multiple of 16.

    dy: like out, or None.  dhn: [lanes, B, H] or None.  h0: [lanes, B, H].  out: [T, B, H] of a stack, [T, B, 2H] of two
    directions, [2, T, B, H] of a pair.  below: [lanes-1, T, B, H] of a stack.  gates: [lanes, T, B, 4, H].  w_ih: [3H, H] of
    each lane of a stack but the lowest.  w_hh: one of each lane.  d_gates: like gates, filled with the pattern.  dhx:
    [lanes, B, H].
    sums: float32 [lanes, -(-B // rows), 4, H].  error: int64[4], see ``handover``.  masks: like below, or None.
    pair: None, or which lanes of a pair walked backwards, a bit each.
    offsets: of packed sequences, int32 [T + 1 + B], see ``lanes``; then [N] takes the place of [T, B] everywhere.
    keep: with resets, bool or of the dtype of the states [T, B]; not of a pair or of packed sequences.
    """
    lanes, batch, hidden = h0.shape
    reverse = check_backward(dy, dhn, h0, out, below, gates, w_ih, w_hh, masks, d_gates, dhx, sums, pair, offsets, keep)
    assert sums.shape[1] == -(-batch // plan.rows)
    arguments = backward_arguments(dy, dhn, h0, out, below, gates, w_ih, w_hh, masks, d_gates, dhx, sums, error, offsets, keep)
    arguments |= wavefront_backward_constants(
        plan, lanes=lanes, hidden=hidden, reverse=reverse, timeout_ns=timeout_ns, pair=pair
    )
    return (plan.programs(lanes, batch, hidden),), arguments
