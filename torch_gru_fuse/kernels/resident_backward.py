"""The backward of ``resident``: a program holds W_hh^T of a lane and does all T steps of its rows, the last step first.

Gradients of gates cross from step to step in shared memory, behind one barrier.  Layers of a stack run one behind the other,
from the highest down, and ``handover`` brings the gradients of the layer above as the gradient of the output; nobody waits for
it on the way back.  Only ``p_d_gates`` of all lanes but the lowest has to be filled, and a single lane or two directions need no
preparation at all.

What a step waits for is short: from the barrier through shared memory to three chains of products, additions, one
multiplication, and through shared memory to the next barrier.  All else is to fall into the gaps of that: a thread takes its
gates from shared memory in the step before, so what the gradient is multiplied with is known when the gradient is.  Four steps
have no branch between them, for registers move where branches join.

Names as in ``lanes``; besides: the gradients are d_r, d_z, d_n of pre-activations, d_hn of hn, and dh of a state; f_ is what dh
is multiplied with to make the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .handover import issue, settle
from .lanes import (
    async_load,
    backward_arguments,
    barrier,
    check_backward,
    dot,
    gate_factors,
    most_registers,
    round_operand,
    round_parameter,
    select,
    without_pattern,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..planner.whole_sequence import ResidentPlan


# ---- products ---------------------------------------------------------------------------------------------------------------


@gluon.jit
def load_transposed(p_w, H: gl.constexpr, U: gl.constexpr, layout: gl.constexpr):
    """W^T [U, U] of the gates r, z and n, from W [3H, H]; zeros beyond H.

    Of 16 units the even ones come first: a thread makes rows i and i + 8 of a product, and these then are neighbours.
    """
    o_i = gl.arange(0, U, gl.SliceLayout(1, layout))
    o_u = gl.expand_dims(o_i // 16 * 16 + o_i % 8 * 2 + o_i // 8 % 2, 1)
    o_k = gl.expand_dims(gl.arange(0, U, gl.SliceLayout(0, layout)), 0)
    m = (o_u < H) & (o_k < H)
    p_w += o_k * H + o_u
    b_r = round_parameter(gl.load(p_w, mask=m, other=0.0))
    b_z = round_parameter(gl.load(p_w + H * H, mask=m, other=0.0))
    b_n = round_parameter(gl.load(p_w + 2 * H * H, mask=m, other=0.0))
    return (b_r, b_z, b_n)


@gluon.jit
def in_order(b, U: gl.constexpr, N: gl.constexpr, layout: gl.constexpr):
    """A product with ``load_transposed``, its units in order.  No element leaves its thread."""
    return gl.convert_layout(b.reshape([U // 16, 2, 8, N]).permute([0, 2, 1, 3]).reshape([U, N]), layout)


@gluon.jit
def multiply(weights, b_r, b_z, b_n, zero):
    """W_r^T d_r + W_z^T d_z + W_n^T d_n [units, batch]: chains a third as long as one would be."""
    return (dot(weights[0], b_r, zero) + dot(weights[1], b_z, zero)) + dot(weights[2], b_n, zero)


@gluon.jit
def load_operand(s, layout: gl.constexpr):
    """Shared memory [batch, units] as the right operand of a product, [units, batch]."""
    return round_operand(s.permute([1, 0]).load(layout))


# ---- what a step reads and makes --------------------------------------------------------------------------------------------


@gluon.jit
def allocate_step(
    dtype: gl.constexpr, U: gl.constexpr, N: gl.constexpr, layout: gl.constexpr, HAS_Y: gl.constexpr, MASKED: gl.constexpr
):
    """Room for what a step reads: r, z, n and hn; the state before it; dy and its dropout mask."""
    s_gates = gl.allocate_shared_memory(dtype, [4 * N, U], layout)
    s_h = gl.allocate_shared_memory(dtype, [N, U], layout)
    s_y = s_h
    s_mask = s_h
    if HAS_Y:
        s_y = gl.allocate_shared_memory(dtype, [N, U], layout)
    if MASKED:
        s_mask = gl.allocate_shared_memory(dtype, [N, U], layout)
    return (s_gates, s_h, s_y, s_mask)


@gluon.jit
def fetch(s, p, p_h, m_g, m_h, COPIES_Y: gl.constexpr, MASKED: gl.constexpr):
    """Starts to copy it there; p are pointers to gates, states, dy and masks, p_h is the one for the state."""
    async_load(s[0], p[0], mask=m_g)
    async_load(s[1], p_h, mask=m_h)
    if COPIES_Y:
        async_load(s[2], p[2], mask=m_h)
    if MASKED:
        async_load(s[3], p[3], mask=m_h)
    async_copy.commit_group()


@gluon.jit
def advance(p, strides, COPIES_Y: gl.constexpr, MASKED: gl.constexpr):
    """These pointers, a step on."""
    p_y = p[2]
    p_mask = p[3]
    if COPIES_Y:
        p_y += strides[1]
    if MASKED:
        p_mask += strides[1]
    return (p[0] + strides[0], p[1] + strides[1], p_y, p_mask)


@gluon.jit
def take(s, N: gl.constexpr, layout: gl.constexpr, HAS_Y: gl.constexpr, MASKED: gl.constexpr):
    """A thread's part of it, [units, batch]."""
    b_r = s[0].slice(0, N).permute([1, 0]).load(layout)
    b_z = s[0].slice(N, N).permute([1, 0]).load(layout)
    b_n = s[0].slice(2 * N, N).permute([1, 0]).load(layout)
    b_hn = s[0].slice(3 * N, N).permute([1, 0]).load(layout)
    b_h = s[1].permute([1, 0]).load(layout)
    b_y = b_h
    b_mask = b_h
    if HAS_Y:
        b_y = s[2].permute([1, 0]).load(layout)
    if MASKED:
        b_mask = s[3].permute([1, 0]).load(layout)
    return (b_r, b_z, b_n, b_hn, b_h, b_y, b_mask)


@gluon.jit
def allocate_gradients(dtype: gl.constexpr, U: gl.constexpr, N: gl.constexpr, layout: gl.constexpr, BELOW: gl.constexpr):
    """Room for d_hn, d_r, d_z and d_n of a step, and for dy of the lane below.  Writing two parts of one piece would take a
    barrier in between."""
    s_hn = gl.allocate_shared_memory(dtype, [N, U], layout)
    s_r = gl.allocate_shared_memory(dtype, [N, U], layout)
    s_z = gl.allocate_shared_memory(dtype, [N, U], layout)
    s_n = gl.allocate_shared_memory(dtype, [N, U], layout)
    s_y = s_n
    if BELOW:
        s_y = gl.allocate_shared_memory(dtype, [N, U], layout)
    return (s_hn, s_r, s_z, s_n, s_y)


@gluon.jit
def put(s, b):
    """A gradient [units, batch] to shared memory.  In 16 bits every NaN is the canonical one anyway."""
    if s.dtype.primitive_bitwidth == 32:
        b = without_pattern(b)
    s.permute([1, 0]).store(b.to(s.dtype))


@gluon.jit
def receive(s, b, p, p_error, EACH: gl.constexpr, TIMEOUT: gl.constexpr):
    """dy [batch, units] from the lane above to shared memory, as soon as it is there; b is what ``issue`` saw of it."""
    b = settle(b, p, p_error, 1, 1, EACH * p.dtype.element_ty.primitive_bitwidth // 8, EACH, TIMEOUT)
    if b.dtype == gl.float32:
        b = (b.to(gl.int32, bitcast=True) & -8192).to(gl.float32, bitcast=True)  # what settle leaves to the product: tf32
    s.store(b)


@gluon.jit
def request(p, EACH: gl.constexpr):
    """Starts to read it: a vector a thread."""
    return issue(p, 1, 1, EACH * p.dtype.element_ty.primitive_bitwidth // 8, EACH)


@gluon.jit
def add_up(b_sum, b, U: gl.constexpr, N: gl.constexpr):
    """A sum over steps and pairs of rows [U, N / 2]: a pair is in one thread."""
    return b_sum + gl.sum(b.reshape([U, N // 2, 2]), axis=2)


@gluon.jit
def step(
    i: gl.constexpr, t, T,
    p, p_h0, p_y, p_d, o_below, p_error, strides, m_g, m_h, m_d, m,
    weights, weights_below, s_gradients, s_steps, zero,
    carried,
    H: gl.constexpr, U: gl.constexpr, N: gl.constexpr, EACH: gl.constexpr,
    right: gl.constexpr, pairs: gl.constexpr, leave: gl.constexpr,
    COPIES_Y: gl.constexpr, ABOVE: gl.constexpr, BELOW: gl.constexpr, MASKED: gl.constexpr, TIMEOUT: gl.constexpr,
):  # fmt: skip
    """Step t of T, counted from the last of the forward; i is t modulo 4.  Pointers are where it reads or writes next.

    What a step hands on: dh without what comes through the product; what was seen of dy from the lane above; what was taken
    from shared memory for the next step; sums.
    """
    HAS_Y: gl.constexpr = COPIES_Y or ABOVE
    b_dh, b_y, b_below, b_taken, sums = carried
    s_old = s_gradients[i % 2]
    s_new = s_gradients[1 - i % 2]
    async_copy.wait_group(2)
    barrier()  # gradients of the step before are there, so is what the next step reads; what this one reads has been taken
    b_r = load_operand(s_old[1], right)
    b_z = load_operand(s_old[2], right)
    b_product = multiply(weights, b_r, b_z, load_operand(s_old[0], right), zero)
    EARLY: gl.constexpr = not BELOW
    AHEAD: gl.constexpr = 4 if EARLY else 3
    b_next = take(s_steps[(i + 1 if EARLY else i) % 4], N, pairs, HAS_Y, MASKED)
    if not EARLY:
        b_taken = b_next
        b_next = ()
    b_left = (s_old[0].load(leave), s_old[1].load(leave), s_old[2].load(leave), s_old[3].load(leave), s_old[4].load(leave))
    more = t + AHEAD < T
    p_h = gl.where(t + (AHEAD + 1) == T, p_h0, p[1])
    fetch(s_steps[(i + AHEAD) % 4], p, p_h, m_g & more, m_h & more, COPIES_Y, MASKED)
    m_left = m_d & (t > 0)
    for g in gl.static_range(4):
        gl.store(p_d + g * H, b_left[g], mask=m_left)
    if BELOW:
        gl.store(p_d + o_below, b_left[4], mask=m_d & (t > 2))  # of two steps earlier

    b_update = b_taken[1].to(gl.float32)
    f_hn, f_r, f_z, f_n = gate_factors(
        b_taken[0].to(gl.float32), b_update, b_taken[2].to(gl.float32), b_taken[3].to(gl.float32), b_taken[4].to(gl.float32)
    )
    if HAS_Y:
        b_dy = b_taken[5].to(gl.float32)
        if MASKED:
            b_dy *= b_taken[6].to(gl.float32)
        b_dh += b_dy
    if ABOVE:
        receive(s_steps[(i + 2) % 4][2], b_y, p_y, p_error, EACH, TIMEOUT)
        p_y += gl.where(t + 3 < T, strides[0], 0)
        b_y = request(p_y, EACH)
    b_below_next = b_below
    if BELOW:
        b_below_next = multiply(weights_below, b_r, b_z, load_operand(s_old[3], right), zero)
    b_dh += in_order(b_product, U, N, pairs)
    if ABOVE or U > H:
        b_dh = gl.where(m, b_dh, 0.0)  # rows beyond B have read another's; beyond H an Inf was multiplied with 0
    b_dhn = b_dh * f_hn
    b_dr = b_dh * f_r
    b_dz = b_dh * f_z
    b_dn = b_dh * f_n
    put(s_new[0], b_dhn)
    put(s_new[1], b_dr)
    put(s_new[2], b_dz)
    put(s_new[3], b_dn)
    if BELOW:
        put(s_new[4], in_order(b_below, U, N, pairs))
        b_below = b_below_next
    sums = (
        add_up(sums[0], b_dhn, U, N), add_up(sums[1], b_dr, U, N), add_up(sums[2], b_dz, U, N), add_up(sums[3], b_dn, U, N)
    )  # fmt: skip
    p = advance(p, strides, COPIES_Y, MASKED)
    return p, p_y, p_d + strides[0], (b_dh * b_update, b_y, b_below, b_next, sums)


@gluon.jit
def finish(
    s_old, s_new, b_dh, b_below, p_d, o_below, m_d, weights, weights_below, zero, T, stride,
    H: gl.constexpr, U: gl.constexpr, N: gl.constexpr,
    right: gl.constexpr, pairs: gl.constexpr, leave: gl.constexpr, BELOW: gl.constexpr,
):  # fmt: skip
    """After all steps: the last gradients leave; the gradient of the initial state."""
    for g in gl.static_range(4):
        gl.store(p_d + g * H, s_old[g].load(leave), mask=m_d)
    b_r = load_operand(s_old[1], right)
    b_z = load_operand(s_old[2], right)
    if BELOW:
        # s_old has that of two steps before, b_below is that of the step before
        gl.store(p_d + o_below, s_old[4].load(leave), mask=m_d & (T > 2))
        put(s_new[4], in_order(b_below, U, N, pairs))
        b_below = multiply(weights_below, b_r, b_z, load_operand(s_old[3], right), zero)
        barrier()
        put(s_old[4], in_order(b_below, U, N, pairs))
        gl.store(p_d + (o_below + stride), s_new[4].load(leave), mask=m_d & (T > 1))
        barrier()
        gl.store(p_d + (o_below + 2 * stride), s_old[4].load(leave), mask=m_d)
    return b_dh + in_order(multiply(weights, b_r, b_z, load_operand(s_old[0], right), zero), U, N, pairs)


@gluon.jit
def all_steps(
    p_g, p_h, p_h0, p_y, p_mask, p_dhn, p_w_ih, p_w_hh,
    p_d, p_dhx, p_sums, p_error,
    strides, o_below, l, i_b, T, B,
    H: gl.constexpr, ROW_H: gl.constexpr, U: gl.constexpr, N: gl.constexpr, num_warps: gl.constexpr,
    COPIES_Y: gl.constexpr, ABOVE: gl.constexpr, BELOW: gl.constexpr, MASKED: gl.constexpr, TIMEOUT: gl.constexpr,
):  # fmt: skip
    """All steps of a lane.  Pointers are those of its last step, strides lead to the one before: of gates, of states.

    COPIES_Y: dy comes from memory; ABOVE: from the lane above; BELOW: makes that of the lane below, MASKED: with dropout.
    """
    dtype: gl.constexpr = p_d.dtype.element_ty
    BYTES: gl.constexpr = dtype.primitive_bitwidth // 8
    VECTOR: gl.constexpr = 16 // BYTES
    HAS_Y: gl.constexpr = COPIES_Y or ABOVE
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 4 // BYTES)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 4 // BYTES)
    # Where a product has 8 rows i and i + 8 a warp, this has 8 times two neighbours; a thread has two rows of the batch in both.
    pairs: gl.constexpr = gl.BlockedLayout([2, 2], [8, 4], [num_warps, 1], [1, 0])
    ACROSS: gl.constexpr = min(32, U // VECTOR)
    copy: gl.constexpr = gl.BlockedLayout([1, VECTOR], [32 // ACROSS, ACROSS], [num_warps, 1], [1, 0])
    EACH: gl.constexpr = min(VECTOR, U * N // (32 * num_warps))  # all threads: on the way out registers are scarce
    LEAVE: gl.constexpr = min(32, U // EACH)
    leave: gl.constexpr = gl.BlockedLayout([1, EACH], [32 // LEAVE, LEAVE], [num_warps, 1], [1, 0])
    # All banks for 16 bytes of 8 rows.
    swizzled: gl.constexpr = gl.SwizzledSharedLayout(VECTOR, max(1, 8 * VECTOR // U), min(8, U // VECTOR), [1, 0])

    weights = load_transposed(p_w_hh, H, U, left)
    weights_below = weights
    if BELOW:
        weights_below = load_transposed(p_w_ih, H, U, left)
    zero = gl.zeros([U, N], gl.float32, mma)

    # Gates and gradients [units, batch].
    o_u = gl.expand_dims(gl.arange(0, U, gl.SliceLayout(1, pairs)), 1)
    o_b = i_b * N + gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, pairs)), 0)
    m = (o_u < H) & (o_b < B)
    b_dh = gl.zeros([U, N], gl.float32, pairs)
    b_sum = gl.sum(b_dh.reshape([U, N // 2, 2]), axis=2)
    if p_dhn is not None:
        b_dh = gl.load(p_dhn + (o_b * H + o_u), mask=m, other=0.0).to(gl.float32)

    # Vectors [batch, units], of four gates [gate and batch, units], from and to global memory.
    o_cu = gl.expand_dims(gl.arange(0, U, gl.SliceLayout(0, copy)), 0)
    o_cb = i_b * N + gl.expand_dims(gl.arange(0, N, gl.SliceLayout(1, copy)), 1)
    m_h = (o_cu < H) & (o_cb < B)
    o_h = o_cb * ROW_H + o_cu
    p_h0 += o_cb * H + o_cu
    o_cr = gl.expand_dims(gl.arange(0, 4 * N, gl.SliceLayout(1, copy)), 1)
    o_cb = i_b * N + o_cr % N
    m_g = (o_cu < H) & (o_cb < B)
    o_g = o_cb * (4 * H) + (o_cr // N * H + o_cu)
    o_lu = gl.expand_dims(gl.arange(0, U, gl.SliceLayout(0, leave)), 0)
    o_lb = i_b * N + gl.expand_dims(gl.arange(0, N, gl.SliceLayout(1, leave)), 1)
    m_d = (o_lu < H) & (o_lb < B)
    p_d += o_lb * (4 * H) + o_lu - strides[0]  # they leave a step late
    p_copy_y = p_y
    if COPIES_Y:
        p_copy_y += o_h
    if MASKED:
        p_mask += o_h
    p = (p_g + o_g, p_h + o_h, p_copy_y, p_mask)

    s_even = allocate_gradients(dtype, U, N, swizzled, BELOW)
    s_odd = allocate_gradients(dtype, U, N, swizzled, BELOW)
    s_gradients = (s_even, s_odd)
    s_0 = allocate_step(dtype, U, N, swizzled, HAS_Y, MASKED)
    s_1 = allocate_step(dtype, U, N, swizzled, HAS_Y, MASKED)
    s_2 = allocate_step(dtype, U, N, swizzled, HAS_Y, MASKED)
    s_3 = allocate_step(dtype, U, N, swizzled, HAS_Y, MASKED)
    s_steps = (s_0, s_1, s_2, s_3)
    for g in gl.static_range(4):
        s_even[g].store(gl.zeros([N, U], dtype, copy))
    EARLY: gl.constexpr = not BELOW
    for i in gl.static_range(4 if EARLY else 3):
        p_now = gl.where(i + 1 == T, p_h0, p[1])
        fetch(s_steps[i], p, p_now, m_g & (i < T), m_h & (i < T), COPIES_Y, MASKED)
        p = advance(p, strides, COPIES_Y, MASKED)
    b_y = zero
    if ABOVE:
        p_y += gl.minimum(o_lb, B - 1) * (4 * H) + gl.where(o_lu < H, o_lu, o_lu % EACH)
        for i in gl.static_range(2):
            receive(s_steps[i][2], request(p_y, EACH), p_y, p_error, EACH, TIMEOUT)
            p_y += gl.where(i + 1 < T, strides[0], 0)
        b_y = request(p_y, EACH)

    async_copy.wait_group(3 if EARLY else 2)
    barrier()
    b_taken = ()
    if EARLY:
        b_taken = take(s_0, N, pairs, HAS_Y, MASKED)
    carried = (b_dh, b_y, zero, b_taken, (b_sum, b_sum, b_sum, b_sum))
    fours = T // 4 * 4
    for t in range(0, fours, 4):
        for i in gl.static_range(4):
            p, p_y, p_d, carried = step(
                i, t + i, T, p, p_h0, p_y, p_d, o_below, p_error, strides, m_g, m_h, m_d, m,
                weights, weights_below, s_gradients, s_steps, zero, carried,
                H, U, N, EACH, right, pairs, leave, COPIES_Y, ABOVE, BELOW, MASKED, TIMEOUT,
            )  # fmt: skip
    for i in gl.static_range(3):
        if fours + i < T:
            p, p_y, p_d, carried = step(
                i, fours + i, T, p, p_h0, p_y, p_d, o_below, p_error, strides, m_g, m_h, m_d, m,
                weights, weights_below, s_gradients, s_steps, zero, carried,
                H, U, N, EACH, right, pairs, leave, COPIES_Y, ABOVE, BELOW, MASKED, TIMEOUT,
            )  # fmt: skip
    async_copy.wait_group(0)
    barrier()
    b_dh, b_y, b_below, b_taken, sums = carried
    if T % 2 == 0:
        b_dh = finish(
            s_even, s_odd, b_dh, b_below, p_d, o_below, m_d, weights, weights_below, zero, T, strides[0],
            H, U, N, right, pairs, leave, BELOW,
        )  # fmt: skip
    else:
        b_dh = finish(
            s_odd, s_even, b_dh, b_below, p_d, o_below, m_d, weights, weights_below, zero, T, strides[0],
            H, U, N, right, pairs, leave, BELOW,
        )  # fmt: skip
    rows = gl.cast(B, gl.int64)
    p_dhx += l * (rows * H)
    gl.store(p_dhx + (o_b * H + o_u), b_dh.to(dtype), mask=m)
    o_u = gl.arange(0, U, gl.SliceLayout(1, pairs))
    p_sums += (l * ((B + N - 1) // N) + i_b) * (4 * H)
    for g in gl.static_range(4):
        b_sum = gl.convert_layout(gl.sum(sums[g], axis=1), gl.SliceLayout(1, pairs))
        gl.store(p_sums + g * H + o_u, b_sum, mask=o_u < H)


# ---- kernel -----------------------------------------------------------------------------------------------------------------


@gluon.jit(do_not_specialize=["T", "B"])
def resident_backward_kernel(
    p_dy, p_dhn, p_h0, p_out, p_below, p_gates, p_w_ih, p_w_hh, p_masks,
    p_d_gates, p_dhx, p_sums, p_error,
    T, B,
    LANES: gl.constexpr, H: gl.constexpr,
    U: gl.constexpr, N: gl.constexpr,
    REVERSE: gl.constexpr, TIMEOUT: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """All T steps of one lane for N batch rows, the last first; equations, arguments and results are those of
    ``wavefront_backward_kernel``.  d_gates of the lowest lane, of a single one and of two directions may come with anything.

    Each warp makes dh of 16 (or more) units from the gradients of all of a step's gates, and these gradients of its units.
    Gates, the state before the step and dy come by asynchronous copies three steps ahead; gradients leave, in vectors, during
    the step after theirs.

    Bytes a step: gates 4NH, state NH, dy or mask NH read, gradients 4NH written, and 3NH for each warp that reads those of the
    lane above.  Bound by latency: shared memory, a chain of H products, a barrier.
    """
    STACK: gl.constexpr = LANES > 1 and not REVERSE
    ROW_H: gl.constexpr = 2 * H if REVERSE else H
    pid = gl.program_id(0)
    PROGRAMS_B = (B + N - 1) // N
    i_b = pid % PROGRAMS_B
    l = pid // PROGRAMS_B

    # Where the lane's last step reads and writes, and how far it is to the one before.
    rows = gl.cast(B, gl.int64)
    steps = T * rows
    last = (T - 1) * rows
    stride_g = -B * (4 * H)
    stride_h = -B * ROW_H
    p_seq = p_out
    p_y = p_gates
    if p_dy is not None:
        p_y = p_dy
    if REVERSE:
        last *= 1 - l
        stride_g *= 1 - 2 * l
        stride_h *= 1 - 2 * l
        p_seq += l * H
        if p_dy is not None:
            p_y += l * H
    elif STACK:
        p_seq = gl.where(l == LANES - 1, p_out, p_below + l * (steps * H))
    if p_dy is not None:
        p_y += last * ROW_H
    o_g = (l * steps + last) * (4 * H)
    o_l = l * (rows * H)
    p_g = p_gates + o_g
    p_h = p_seq + (last * ROW_H + stride_h)
    p_d = p_d_gates + o_g
    p_last = p_dhn
    if p_dhn is not None:
        p_last += o_l
    p_w = select(p_w_hh, l)
    p_v = select(p_w_ih, l - 1)
    p_s = p_sums + (l * PROGRAMS_B + i_b) * (4 * H)
    strides = (stride_g, stride_h)
    o_below = 3 * H - steps * (4 * H) - 2 * stride_g  # from d of a step to dy of the lane below, two steps before
    p_mask = p_gates
    if p_masks is not None:
        p_mask = p_masks + (l * steps + last) * H
    if STACK and l < LANES - 1:
        if LANES > 2 and l > 0:
            all_steps(
                p_g, p_h, p_h0 + o_l, p_d + 3 * H, p_mask, p_last, p_v, p_w, p_d, p_dhx, p_sums, p_error, strides, o_below,
                l, i_b, T, B, H, ROW_H, U, N, num_warps, False, True, True, p_masks is not None, TIMEOUT,
            )  # fmt: skip
        else:
            all_steps(
                p_g, p_h, p_h0 + o_l, p_d + 3 * H, p_mask, p_last, p_v, p_w, p_d, p_dhx, p_sums, p_error, strides, o_below,
                l, i_b, T, B, H, ROW_H, U, N, num_warps, False, True, False, p_masks is not None, TIMEOUT,
            )  # fmt: skip
    else:
        all_steps(
            p_g, p_h, p_h0 + o_l, p_y, p_mask, p_last, p_v, p_w, p_d, p_dhx, p_sums, p_error, strides, o_below,
            l, i_b, T, B, H, ROW_H, U, N, num_warps, p_dy is not None, False, STACK, False, TIMEOUT,
        )  # fmt: skip


def resident_backward_constants(
    plan: ResidentPlan, *, lanes: int, hidden: int, reverse: bool, timeout_ns: int
) -> dict[str, Any]:
    """What selects the code of ``resident_backward_kernel``: its constants and options."""
    return dict(
        LANES=lanes, H=hidden, U=plan.units, N=plan.rows,
        REVERSE=reverse, TIMEOUT=timeout_ns,
        num_warps=plan.num_warps, maxnreg=most_registers(plan.num_warps),
        launch_cooperative_grid=lanes > 1 and not reverse,
    )  # fmt: skip


def resident_backward_launch(
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
    plan: ResidentPlan,
    masks: Tensor | None = None,
    timeout_ns: int = 10_000_000_000,
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and arguments of ``resident_backward_kernel``; the tensors are those of ``wavefront_backward_launch``.

    Of d_gates only what is of lanes above the lowest one of a stack has to be filled with the pattern.
    """
    lanes, batch, hidden = h0.shape
    reverse = check_backward(dy, dhn, h0, out, below, gates, w_ih, w_hh, masks, d_gates, dhx, sums)
    assert sums.shape[1] == -(-batch // plan.rows)
    arguments = backward_arguments(dy, dhn, h0, out, below, gates, w_ih, w_hh, masks, d_gates, dhx, sums, error)
    arguments |= resident_backward_constants(plan, lanes=lanes, hidden=hidden, reverse=reverse, timeout_ns=timeout_ns)
    return (plan.programs(lanes, batch),), arguments
