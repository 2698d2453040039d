"""Whole sequences of small GRU layers in one launch: a program holds all weights of a lane and does all T steps of its rows.

No state crosses between programs of a layer: a step hands h over in shared memory, behind one barrier.  Layers of a stack run
one behind the other as in ``wavefront``, and ``handover`` brings h_t of the layer below as x; nobody waits for it on the way
back, so it costs no latency but that of the first step.  Only ``p_below`` of a stack has to be filled, and a single lane or two
directions need no preparation at all.

Names as in ``lanes``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .handover import clear_beyond, issue, settle
from .lanes import (
    async_load,
    barrier,
    check_launch,
    dot,
    dot_kept,
    if_in_step,
    in_step,
    keep_of,
    kept,
    launch_arguments,
    load_biases,
    masked,
    most_registers,
    round_operand,
    round_parameter,
    row_steps,
    rows_after,
    rows_of,
    select,
    share_rows,
    shared_row,
    sigmoid,
    tanh,
    walks_back,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..planner.whole_sequence import ResidentPlan


@gluon.jit
def load_weights(p_w, H: gl.constexpr, U: gl.constexpr, layout: gl.constexpr):
    """A gate's W [H, H], padded to [U, U] with zeros."""
    o_u = gl.expand_dims(gl.arange(0, U, gl.SliceLayout(1, layout)), 1)
    o_k = gl.expand_dims(gl.arange(0, U, gl.SliceLayout(0, layout)), 0)
    return round_parameter(gl.load(p_w + o_u * H + o_k, mask=(o_u < H) & (o_k < H), other=0.0))


@gluon.jit
def fetch(s_gi, p_g, m_c, H: gl.constexpr):
    """Starts to copy gi of one step, three gates, to shared memory."""
    async_load(s_gi[0], p_g, mask=m_c)
    async_load(s_gi[1], p_g + H, mask=m_c)
    async_load(s_gi[2], p_g + 2 * H, mask=m_c)
    async_copy.commit_group()


@gluon.jit
def allocate_gi(dtype: gl.constexpr, U: gl.constexpr, N: gl.constexpr, layout: gl.constexpr):
    """Room for gi of one step."""
    s_r = gl.allocate_shared_memory(dtype, [N, U], layout)
    s_z = gl.allocate_shared_memory(dtype, [N, U], layout)
    s_n = gl.allocate_shared_memory(dtype, [N, U], layout)
    return (s_r, s_z, s_n)


@gluon.jit
def save_step(p_save, b_r, b_z, b_n, b_hn, m, dtype: gl.constexpr, H: gl.constexpr):
    """Gates of one step, for the backward."""
    gl.store(p_save, b_r.to(dtype), mask=m)
    gl.store(p_save + H, b_z.to(dtype), mask=m)
    gl.store(p_save + 2 * H, b_n.to(dtype), mask=m)
    gl.store(p_save + 3 * H, b_hn.to(dtype), mask=m)


@gluon.jit(do_not_specialize=["T", "B"])
def resident_kernel(
    p_gi, p_h0, p_below, p_w_ih, p_w_hh, p_b_ih, p_b_hh, p_masks, p_masked,
    p_out, p_h_n, p_gates, p_error, p_offsets, p_keep,
    T, B,
    LANES: gl.constexpr, H: gl.constexpr, HX: gl.constexpr,
    U: gl.constexpr, N: gl.constexpr,
    REVERSE: gl.constexpr, PAIRED: gl.constexpr, SAVE_GATES: gl.constexpr,
    EARLY: gl.constexpr, TIMEOUT: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """All T steps of one lane for N batch rows; equations, arguments and what is saved are those of ``wavefront_kernel``, but
    p_h0 is [lanes, B, H] throughout and may hold anything.  Packed sequences and resets, too, are as there.

    Each warp makes r, z and n of 16 (or more) units from all of h, so the gates of a unit meet in one thread.  gi comes by
    asynchronous copies three steps ahead; h_t leaves, in vectors, during the step after it.  EARLY: reads x of the next step
    before this step's recurrence.

    Bytes a step: gi 3NH read, h NH written, gates 4NH written if SAVE_GATES, and x NH for each warp of a higher layer.
    Bound by latency: shared memory, a chain of H products, four special functions, a barrier.
    """
    dtype: gl.constexpr = p_out.dtype.element_ty
    STACK: gl.constexpr = LANES > 1 and not REVERSE and PAIRED is None
    ROW_H: gl.constexpr = 2 * H if REVERSE else H
    ROW_G: gl.constexpr = 3 * H
    BYTES: gl.constexpr = dtype.primitive_bitwidth // 8
    VECTOR: gl.constexpr = 16 // BYTES
    KW: gl.constexpr = min(VECTOR, U // 8)
    PACK: gl.constexpr = U * N // 32
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, 8])
    left_x: gl.constexpr = gl.DotOperandLayout(0, mma, KW)
    right_x: gl.constexpr = gl.DotOperandLayout(1, mma, KW)
    left_h: gl.constexpr = gl.DotOperandLayout(0, mma, 4 // BYTES)
    right_h: gl.constexpr = gl.DotOperandLayout(1, mma, 4 // BYTES)
    ACROSS: gl.constexpr = min(32, U // VECTOR)
    copy: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // ACROSS, ACROSS], [num_warps, 1], [1, 0])
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(VECTOR, 1, min(8, U // VECTOR), [1, 0])

    pid = gl.program_id(0)
    PROGRAMS_B = (B + N - 1) // N
    i_b = pid % PROGRAMS_B
    l = pid // PROGRAMS_B

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
    p_seq = p_out
    p_save = p_gates
    p_mask = p_masks
    p_hand = p_masked
    if REVERSE:
        p_seq += l * (H + last * ROW_H)
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
        p_seq += first * ROW_H
        p_gi += first * ROW_G
        if SAVE_GATES:
            p_save += first * (4 * H)
        sign = 1 - 2 * back
        stride_ht *= sign
        stride_gt *= sign
        stride_st *= sign
    elif STACK:
        p_seq = gl.where(l == LANES - 1, p_out, p_below + l * (steps * H))
        if p_masks is not None:
            p_mask += gl.minimum(l, LANES - 2) * (steps * H)
            p_hand += gl.minimum(l, LANES - 2) * (steps * H)
        if SAVE_GATES:
            p_save += l * (steps * (4 * H))
    if p_offsets is not None:
        stride_ht = rows_after(p_offsets, 0, T, backwards) * ROW_H

    p_w = select(p_w_hh, l)
    b_wr = load_weights(p_w, H, U, left_h)
    b_wz = load_weights(p_w + H * H, H, U, left_h)
    b_wn = load_weights(p_w + 2 * H * H, H, U, left_h)

    # Gates [units, batch].
    o_u = gl.expand_dims(gl.arange(0, U, gl.SliceLayout(1, mma)), 1)
    o_b = i_b * N + gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, mma)), 0)
    m_u = o_u < H
    m = m_u & (o_b < B)
    zero = gl.zeros([U, N], gl.float32, mma)
    o_u1 = gl.arange(0, U, gl.SliceLayout(1, mma))
    biases = load_biases(p_b_ih, p_b_hh, l, o_u1, o_u1 < H, H)
    b_bias_r = gl.expand_dims(biases[0], 1) + zero
    b_bias_z = gl.expand_dims(biases[1], 1) + zero
    b_bias_n = gl.expand_dims(biases[2], 1) + zero
    b_bias_hn = gl.expand_dims(biases[3], 1) + zero
    b_h0 = gl.load(p_h0 + l * (rows * H) + (o_b * H + o_u), mask=m, other=0.0)
    b_h = b_h0.to(gl.float32)
    b_h = gl.where(b_h == b_h, b_h, float("nan"))
    s_h0 = gl.allocate_shared_memory(dtype, [N, U], swizzled)
    s_h1 = gl.allocate_shared_memory(dtype, [N, U], swizzled)
    s_hs = (s_h0, s_h1)
    s_h0.permute([1, 0]).store(b_h.to(dtype))
    p_save += o_b * (4 * H) + o_u
    steps_b = row_steps(p_lengths, gl.minimum(o_b, B - 1), T, backwards)

    # Vectors [batch, units] to and from global memory.
    o_cu = gl.expand_dims(gl.arange(0, U, gl.SliceLayout(0, copy)), 0)
    o_cb = i_b * N + gl.expand_dims(gl.arange(0, N, gl.SliceLayout(1, copy)), 1)
    m_c = (o_cu < H) & (o_cb < B)
    o_c = o_cb * ROW_H + o_cu
    steps_c = row_steps(p_lengths, gl.minimum(o_cb, B - 1), T, backwards)
    p_new = p_seq - stride_ht + o_c
    m_m = m_c & (l < LANES - 1)
    if p_masks is not None:
        p_mask += o_c - stride_ht
        p_hand += o_c - stride_ht

    if STACK and l > 0:
        p_v = select(p_w_ih, l - 1)
        b_vr = load_weights(p_v, H, U, left_x)
        b_vz = load_weights(p_v + H * H, H, U, left_x)
        b_vn = load_weights(p_v + 2 * H * H, H, U, left_x)
        o_k = gl.expand_dims(gl.arange(0, U, gl.SliceLayout(1, right_x)), 1)
        m_k = o_k < H
        o_k = gl.where(m_k, o_k, o_k % KW)
        o_n = i_b * N + gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, right_x)), 0)
        p_handed = p_below
        if p_masks is not None:
            p_handed = p_masked
        p_from = p_handed + (l - 1) * (steps * H)
        p_x = p_from + (o_k + gl.minimum(o_n, B - 1) * ROW_H)
        b_x = issue(p_x, PACK // KW, 1, KW * BYTES, PACK)
        for t in range(0, T, 2):
            for i in gl.static_range(2):
                if t + i < T:
                    if p_offsets is not None:
                        stride_ht = rows_after(p_offsets, gl.maximum(t + i - 1, 0), T, backwards) * ROW_H
                        stride_xt = rows_after(p_offsets, t + i, T, backwards) * ROW_H
                        stride_st = stride_xt * 4
                    b_keep = keep_of(p_keep, t + i, T, backwards, o_b, B)
                    if p_masks is not None:
                        m_mt = in_step(p_offsets, m_m & (t + i > 0), t + i - 1, steps_c)
                        b_mask = gl.load(p_mask, mask=m_mt, other=0.0)
                    b_x = settle(b_x, p_x, p_error, PACK // KW, 1, KW * BYTES, PACK, TIMEOUT)
                    b_x = clear_beyond(b_x, m_k, U == H)
                    b_ar = dot(b_vr, b_x, b_bias_r)
                    b_az = dot(b_vz, b_x, b_bias_z)
                    b_an = dot(b_vn, b_x, b_bias_n)
                    if p_offsets is None:
                        p_x += gl.where(t + i + 1 < T, stride_ht, 0)
                    else:
                        p_from += stride_xt
                        B_x = rows_of(p_offsets, t + i + 1, T, backwards, B)
                        p_x = p_from + (o_k + gl.minimum(o_n, B_x - 1) * ROW_H)
                    if EARLY:
                        b_x = issue(p_x, PACK // KW, 1, KW * BYTES, PACK)
                    b_t = round_operand(s_hs[i].permute([1, 0]).load(right_h))
                    b_r = sigmoid(dot_kept(p_keep, b_wr, b_t, b_ar, b_keep, zero))
                    b_hn = dot_kept(p_keep, b_wn, b_t, b_bias_hn, b_keep, zero)
                    b_z = sigmoid(dot_kept(p_keep, b_wz, b_t, b_az, b_keep, zero))
                    b_n = tanh(b_an + b_r * b_hn)
                    b_old = b_h
                    b_h = kept(p_keep, b_h, b_keep)
                    b_h = b_n + b_z * (b_h - b_n)
                    b_h = gl.where(b_h == b_h, b_h, float("nan"))
                    if HX < H:
                        b_h = gl.where(o_u < HX, b_h, 0.0)
                    b_h = if_in_step(p_offsets, b_h, b_old, t + i, steps_b)
                    s_hs[1 - i].permute([1, 0]).store(b_h.to(dtype))
                    b_before = s_hs[i].load(copy)  # the state before this step
                    gl.store(p_new, b_before, mask=in_step(p_offsets, m_c & (t + i > 0), t + i - 1, steps_c))
                    p_new += stride_ht
                    if p_masks is not None:
                        gl.store(p_hand, masked(b_before, b_mask), mask=m_mt)
                        p_mask += stride_ht
                        p_hand += stride_ht
                    if SAVE_GATES:
                        save_step(p_save, b_r, b_z, b_n, b_hn, in_step(p_offsets, m, t + i, steps_b), dtype, H)
                        p_save += stride_st
                    if not EARLY:
                        b_x = issue(p_x, PACK // KW, 1, KW * BYTES, PACK)
    else:
        SHARE_BIAS: gl.constexpr = 3 * U * BYTES > 768  # weights take more than 96 registers
        if SHARE_BIAS:
            s_bias = share_rows(biases, U)
        s_gi0 = allocate_gi(dtype, U, N, swizzled)
        s_gi1 = allocate_gi(dtype, U, N, swizzled)
        s_gi2 = allocate_gi(dtype, U, N, swizzled)
        s_gi3 = allocate_gi(dtype, U, N, swizzled)
        s_gis = (s_gi0, s_gi1, s_gi2, s_gi3)
        p_g = p_gi + o_cb * ROW_G + o_cu
        for i in gl.static_range(3):
            fetch(s_gis[i], p_g, in_step(p_offsets, m_c & (i < T), i, steps_c), H)
            if p_offsets is not None:
                stride_gt = rows_after(p_offsets, i, T, backwards) * ROW_G
            p_g += stride_gt
        for t in range(0, T, 4):
            for i in gl.static_range(4):
                if t + i < T:
                    if p_offsets is not None:
                        stride_ht = rows_after(p_offsets, gl.maximum(t + i - 1, 0), T, backwards) * ROW_H
                        stride_gt = rows_after(p_offsets, t + i + 3, T, backwards) * ROW_G
                        stride_st = rows_after(p_offsets, t + i, T, backwards) * (4 * H)
                    b_keep = keep_of(p_keep, t + i, T, backwards, o_b, B)
                    if p_masks is not None:
                        m_mt = in_step(p_offsets, m_m & (t + i > 0), t + i - 1, steps_c)
                        b_mask = gl.load(p_mask, mask=m_mt, other=0.0)
                    async_copy.wait_group(2)
                    barrier()  # gi of this step and h before it are there, gi of the step before has been read
                    fetch(s_gis[(i + 3) % 4], p_g, in_step(p_offsets, m_c & (t + i + 3 < T), t + i + 3, steps_c), H)
                    p_g += stride_gt
                    b_t = round_operand(s_hs[i % 2].permute([1, 0]).load(right_h))
                    if SHARE_BIAS:
                        b_ar = dot_kept(p_keep, b_wr, b_t, shared_row(s_bias, 0, mma) + zero, b_keep, zero)
                        b_hn = dot_kept(p_keep, b_wn, b_t, shared_row(s_bias, 3, mma) + zero, b_keep, zero)
                        b_az = dot_kept(p_keep, b_wz, b_t, shared_row(s_bias, 1, mma) + zero, b_keep, zero)
                        b_an = shared_row(s_bias, 2, mma) + zero
                    else:
                        b_ar = dot_kept(p_keep, b_wr, b_t, b_bias_r, b_keep, zero)
                        b_hn = dot_kept(p_keep, b_wn, b_t, b_bias_hn, b_keep, zero)
                        b_az = dot_kept(p_keep, b_wz, b_t, b_bias_z, b_keep, zero)
                        b_an = b_bias_n
                    b_r = sigmoid(b_ar + s_gis[i][0].permute([1, 0]).load(mma).to(gl.float32))
                    b_z = sigmoid(b_az + s_gis[i][1].permute([1, 0]).load(mma).to(gl.float32))
                    b_n = tanh(s_gis[i][2].permute([1, 0]).load(mma).to(gl.float32) + b_an + b_r * b_hn)
                    b_old = b_h
                    b_h = kept(p_keep, b_h, b_keep)
                    b_h = b_n + b_z * (b_h - b_n)
                    b_h = gl.where(b_h == b_h, b_h, float("nan"))
                    if HX < H:
                        b_h = gl.where(o_u < HX, b_h, 0.0)
                    b_h = if_in_step(p_offsets, b_h, b_old, t + i, steps_b)
                    s_hs[1 - i % 2].permute([1, 0]).store(b_h.to(dtype))
                    b_before = s_hs[i % 2].load(copy)  # the state before this step
                    gl.store(p_new, b_before, mask=in_step(p_offsets, m_c & (t + i > 0), t + i - 1, steps_c))
                    p_new += stride_ht
                    if p_masks is not None:
                        gl.store(p_hand, masked(b_before, b_mask), mask=m_mt)
                        p_mask += stride_ht
                        p_hand += stride_ht
                    if SAVE_GATES:
                        save_step(p_save, b_r, b_z, b_n, b_hn, in_step(p_offsets, m, t + i, steps_b), dtype, H)
                        p_save += stride_st
        async_copy.wait_group(0)
    barrier()
    gl.store(p_h_n + l * (rows * H) + (o_b * H + o_u), b_h.to(dtype), mask=m)
    if T % 2 == 0:
        b_last = s_h0.load(copy)
    else:
        b_last = s_h1.load(copy)
    gl.store(p_new, b_last, mask=in_step(p_offsets, m_c, T - 1, steps_c))
    if p_masks is not None:
        m_mt = in_step(p_offsets, m_m, T - 1, steps_c)
        gl.store(p_hand, masked(b_last, gl.load(p_mask, mask=m_mt, other=0.0)), mask=m_mt)


def resident_constants(
    plan: ResidentPlan, *, lanes: int, hidden: int, units: int, reverse: bool, save_gates: bool, timeout_ns: int,
    pair: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What selects the code of ``resident_kernel``: its constants and options.  units: without padding."""
    return dict(
        LANES=lanes, H=hidden, HX=units,
        U=plan.units, N=plan.rows,
        REVERSE=reverse, PAIRED=pair, SAVE_GATES=save_gates,
        EARLY=plan.early, TIMEOUT=timeout_ns,
        num_warps=plan.num_warps, maxnreg=most_registers(plan.num_warps),
        launch_cooperative_grid=lanes > 1 and not reverse and pair is None,
    )  # fmt: skip


def resident_launch(
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
    plan: ResidentPlan,
    units: int | None = None,
    masks: Tensor | None = None,
    handed: Tensor | None = None,
    pair: int | None = None,
    offsets: Tensor | None = None,
    keep: Tensor | None = None,
    timeout_ns: int = 10_000_000_000,
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and arguments of ``resident_kernel``; the tensors are those of ``wavefront_launch``, h0 is [lanes, B, H]."""
    lanes, (batch, hidden) = len(w_hh), h_n.shape[1:]
    assert h0.shape == h_n.shape and h0.is_contiguous()
    reverse = pair is None and gi.dim() == out.dim() + 1
    p_h0 = h0.view(batch, -1) if reverse else h0
    check_launch(gi, p_h0, below, w_ih, w_hh, out, h_n, gates, masks, handed, pair, offsets, keep)
    arguments = launch_arguments(gi, h0, below, w_ih, w_hh, b_ih, b_hh, out, h_n, gates, error, masks, handed, offsets, keep)
    arguments |= resident_constants(
        plan, lanes=lanes, hidden=hidden, units=units or hidden, reverse=reverse, save_gates=gates is not None,
        timeout_ns=timeout_ns, pair=pair,
    )
    return (plan.programs(lanes, batch),), arguments
