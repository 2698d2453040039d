"""The backward of ``resident``: a program holds W_hh^T of a lane and does all T steps of its rows, the last step first.

Gradients of gates cross from step to step in shared memory, behind one barrier.  The layers of a stack run one behind the
other, from the highest down.  Between two of them stand programs of their own: they wait, as ``handover`` says, for the
gradients of the layer above, multiply them with its W_ih, and hand the product on as dy, for which the layer below waits.
Nobody waits on the way back, and a lane's step takes hardly longer than that of a single layer.

What a step waits for is short: from the barrier through shared memory to three chains of products, additions, one
multiplication, and through shared memory to the next barrier.  All else is to fall into the gaps of that.  A thread takes its
gates from shared memory in the step before, so that what the gradient is multiplied with is known when the gradient is.  What
leaves is read from shared memory before anything is written there, for these stay in order.  Four steps have no branch between
them: registers move where branches join.

Names as in ``lanes``; besides: b_r, b_z, b_n, b_hn are gates or their gradients, dh is the gradient of a state, dy that of
what a lane puts out, and f_ is what dh is multiplied with.
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
    if_in_step,
    in_step,
    is_step,
    keep_of,
    kept,
    masked,
    most_registers,
    round_operand,
    round_parameter,
    row_steps,
    rows_after,
    select,
    walks_back,
    without_pattern,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..planner.whole_sequence import ResidentPlan


# ---- layouts and products ---------------------------------------------------------------------------------------------------


@gluon.constexpr_function
def product_layout(num_warps):
    """A product [units, batch]: a warp makes 16 units, a thread rows i and i + 8 of them, two columns."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[num_warps, 1], instr_shape=[16, 8])


@gluon.constexpr_function
def gate_layout(num_warps):
    """Gates [units, batch]: the same, but a thread has two units that are neighbours."""
    return gl.BlockedLayout([2, 2], [8, 4], [num_warps, 1], [1, 0])


@gluon.constexpr_function
def vector_layout(U, length, num_warps):
    """Vectors of that length [batch, units], or of several gates, one below the other."""
    across = min(32, U // length)
    return gl.BlockedLayout([1, length], [32 // across, across], [num_warps, 1], [1, 0])


@gluon.constexpr_function
def shared_layout(U, vector):
    """[batch, units] in shared memory: 16 bytes of 8 rows, as operands are read, are in all banks."""
    return gl.SwizzledSharedLayout(vector, max(1, 8 * vector // U), min(8, U // vector), [1, 0])


@gluon.jit
def load_transposed(p_w, H: gl.constexpr, U: gl.constexpr, layout: gl.constexpr):
    """W^T [U, U] of the gates r, z and n, from W [3H, H]; zeros beyond H.

    Units in the order of ``in_order``: of 16, the even ones first.
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
def multiply(
    weights, s_r, s_z, s_n, U: gl.constexpr, N: gl.constexpr, num_warps: gl.constexpr, right: gl.constexpr, ROUND: gl.constexpr
):  # fmt: skip
    """W_r^T d_r + W_z^T d_z + W_n^T d_n [units, batch], d in shared memory: three chains instead of a long one."""
    b_r = s_r.permute([1, 0]).load(right)
    b_z = s_z.permute([1, 0]).load(right)
    b_n = s_n.permute([1, 0]).load(right)
    if ROUND:
        b_r = round_operand(b_r)
        b_z = round_operand(b_z)
        b_n = round_operand(b_n)
    zero = gl.zeros([U, N], gl.float32, product_layout(num_warps))
    return (dot(weights[0], b_r, zero) + dot(weights[1], b_z, zero)) + dot(weights[2], b_n, zero)


@gluon.jit
def in_order(b, U: gl.constexpr, N: gl.constexpr, num_warps: gl.constexpr):
    """A product with ``load_transposed`` as gates, units in order.  No element leaves its thread."""
    b = b.reshape([U // 16, 2, 8, N]).permute([0, 2, 1, 3]).reshape([U, N])
    return gl.convert_layout(b, gate_layout(num_warps))


# ---- what a step reads and makes --------------------------------------------------------------------------------------------


@gluon.jit
def allocate_step(dtype: gl.constexpr, U: gl.constexpr, N: gl.constexpr, layout: gl.constexpr, HAS_Y: gl.constexpr):
    """Room for what a step reads: r, z, n and hn, the state before it, dy."""
    s_gates = gl.allocate_shared_memory(dtype, [4 * N, U], layout)
    s_h = gl.allocate_shared_memory(dtype, [N, U], layout)
    s_y = s_h
    if HAS_Y:
        s_y = gl.allocate_shared_memory(dtype, [N, U], layout)
    return (s_gates, s_h, s_y)


@gluon.jit
def fetch(s, p_g, p_h, p_y, m_g, m_h, COPIES_Y: gl.constexpr):
    """Starts to copy it there."""
    async_load(s[0], p_g, mask=m_g)
    async_load(s[1], p_h, mask=m_h)
    if COPIES_Y:
        async_load(s[2], p_y, mask=m_h)
    async_copy.commit_group()


@gluon.jit
def take(s, N: gl.constexpr, layout: gl.constexpr, HAS_Y: gl.constexpr):
    """A thread's part of it, as gates."""
    b_r = s[0].slice(0, N).permute([1, 0]).load(layout)
    b_z = s[0].slice(N, N).permute([1, 0]).load(layout)
    b_n = s[0].slice(2 * N, N).permute([1, 0]).load(layout)
    b_hn = s[0].slice(3 * N, N).permute([1, 0]).load(layout)
    b_h = s[1].permute([1, 0]).load(layout)
    b_y = b_h
    if HAS_Y:
        b_y = s[2].permute([1, 0]).load(layout)
    return (b_r, b_z, b_n, b_hn, b_h, b_y)


@gluon.jit
def allocate_gradients(dtype: gl.constexpr, U: gl.constexpr, N: gl.constexpr, layout: gl.constexpr):
    """Room for those of hn, r, z and n of a step.  Stores to parts of one piece would take barriers between them."""
    s_hn = gl.allocate_shared_memory(dtype, [N, U], layout)
    s_r = gl.allocate_shared_memory(dtype, [N, U], layout)
    s_z = gl.allocate_shared_memory(dtype, [N, U], layout)
    s_n = gl.allocate_shared_memory(dtype, [N, U], layout)
    return (s_hn, s_r, s_z, s_n)


@gluon.jit
def put(s, b, dtype: gl.constexpr):
    """Gates to shared memory.  In 16 bits every NaN is the canonical one anyway."""
    if dtype.primitive_bitwidth == 32:
        b = without_pattern(b)
    s.permute([1, 0]).store(b.to(dtype))


@gluon.jit
def add_up(b_sum, b, U: gl.constexpr, N: gl.constexpr):
    """A sum over steps and pairs of rows [U, N / 2]; a thread has both rows."""
    return b_sum + gl.sum(b.reshape([U, N // 2, 2]), axis=2)


# ---- what crosses from program to program -----------------------------------------------------------------------------------


@gluon.jit
def request(p, COUNT: gl.constexpr, LENGTH: gl.constexpr):
    """Starts to read what another program makes: ``COUNT`` vectors of that length a thread."""
    return issue(p, COUNT, 1, LENGTH * p.dtype.element_ty.primitive_bitwidth // 8, COUNT * LENGTH)


@gluon.jit
def receive(b, p, p_error, COUNT: gl.constexpr, LENGTH: gl.constexpr, TIMEOUT: gl.constexpr):
    """It, as soon as it is there; fp32 as tf32."""
    BITS: gl.constexpr = p.dtype.element_ty.primitive_bitwidth
    b = settle(b, p, p_error, COUNT, 1, LENGTH * BITS // 8, COUNT * LENGTH, TIMEOUT)
    if BITS == 32:  # products ignore what settle leaves in the other bits, sums do not
        b = (b.to(gl.int32, bitcast=True) & -8192).to(gl.float32, bitcast=True)
    return b


# ---- a lane -----------------------------------------------------------------------------------------------------------------


@gluon.jit
def distance(p_offsets, i, T, backwards, stride):
    """From the i-th step to the next; stride: of a step, of packed sequences of a row."""
    if p_offsets is None:
        return stride
    else:
        return rows_after(p_offsets, i, T, backwards) * stride


@gluon.jit
def before(p_offsets, i, T, p_h0, p_h, rows):
    """Where the state before the i-th step is: before the first in time p_h0; rows: of ``row_steps``."""
    if p_offsets is None:
        return gl.where(i + 1 == T, p_h0, p_h)
    else:
        return gl.where(is_step(p_offsets, i + 1, rows), p_h, p_h0)


@gluon.jit
def step(
    i: gl.constexpr, t, T,
    p_g, p_h, p_h0, p_y, p_d, p_error, p_offsets, p_keep, backwards, B, strides, o_b, m_g, m_h, m_d, m, lives,
    weights, s_gradients, s_steps,
    carried,
    H: gl.constexpr, U: gl.constexpr, N: gl.constexpr, num_warps: gl.constexpr,
    right: gl.constexpr, leave: gl.constexpr, LENGTH: gl.constexpr,
    EARLY: gl.constexpr, COPIES_Y: gl.constexpr, ABOVE: gl.constexpr, TIMEOUT: gl.constexpr,
):  # fmt: skip
    """Step t of T, counted from the last of the forward; i is t modulo 4.  Pointers are where it reads or writes next.

    lives: ``row_steps`` of m_g, m_h, m_d and m.  A row of packed sequences that does not take part has zeros for gradients and
    keeps dh, to which the product of the step before is still added.

    With resets dh, and the product, are what a reset before the step above has left of them.

    What a step hands on: dh without what comes through the product; what was seen of dy that another program makes; if EARLY,
    what was taken from shared memory for the next step; sums; keep of this step.
    """
    dtype: gl.constexpr = p_d.dtype.element_ty
    gates: gl.constexpr = gate_layout(num_warps)
    HAS_Y: gl.constexpr = COPIES_Y or ABOVE
    AHEAD: gl.constexpr = 4 if EARLY else 3
    b_dh, b_y, b_taken, sums, b_keep_old = carried
    b_keep = keep_of(p_keep, t, T, backwards, o_b, B)
    s_old = s_gradients[i % 2]
    s_new = s_gradients[1 - i % 2]
    async_copy.wait_group(2)
    barrier()  # the gradients of the step before are there and what is taken now; what is fetched now has been taken
    b_product = multiply(weights, s_old[1], s_old[2], s_old[0], U, N, num_warps, right, True)
    if EARLY:
        b_next = take(s_steps[(i + 1) % 4], N, gates, HAS_Y)
    else:
        b_taken = take(s_steps[i], N, gates, HAS_Y)
        b_next = ()
    b_left = (s_old[0].load(leave), s_old[1].load(leave), s_old[2].load(leave), s_old[3].load(leave))
    more = t + AHEAD < T
    p_before = before(p_offsets, t + AHEAD, T, p_h0, p_h, lives[1])
    m_g = in_step(p_offsets, m_g & more, t + AHEAD, lives[0])
    m_h = in_step(p_offsets, m_h & more, t + AHEAD, lives[1])
    fetch(s_steps[(i + AHEAD) % 4], p_g, p_before, p_y, m_g, m_h, COPIES_Y)
    m_d = in_step(p_offsets, m_d & (t > 0), t - 1, lives[2])
    for g in gl.static_range(4):
        gl.store(p_d + g * H, b_left[g], mask=m_d)

    b_z = b_taken[1].to(gl.float32)
    b_r = b_taken[0].to(gl.float32)
    b_n = b_taken[2].to(gl.float32)
    b_hn = b_taken[3].to(gl.float32)
    b_h = b_taken[4].to(gl.float32)
    b_h = kept(p_keep, b_h, b_keep)
    f_hn, f_r, f_z, f_n = gate_factors(b_r, b_z, b_n, b_hn, b_h)
    if HAS_Y:
        b_dy = b_taken[5].to(gl.float32)
        if ABOVE:
            b_dy = gl.where(m, b_dy, 0.0)  # rows beyond B have another's
        b_dh += b_dy
    if ABOVE:
        s_steps[(i + 2) % 4][2].store(receive(b_y, p_y, p_error, 1, LENGTH, TIMEOUT))
        p_y += gl.where(t + 3 < T, strides[0], 0)
        b_y = request(p_y, 1, LENGTH)
    b_dh += kept(p_keep, in_order(b_product, U, N, num_warps), b_keep_old)
    b_now = if_in_step(p_offsets, b_dh, gl.zeros([U, N], gl.float32, gates), t, lives[3])
    b_hn = b_now * f_hn
    b_r = b_now * f_r
    b_dz = b_now * f_z
    b_n = b_now * f_n
    put(s_new[0], b_hn, dtype)
    put(s_new[1], b_r, dtype)
    put(s_new[2], b_dz, dtype)
    put(s_new[3], b_n, dtype)
    sums = (add_up(sums[0], b_hn, U, N), add_up(sums[1], b_r, U, N), add_up(sums[2], b_dz, U, N), add_up(sums[3], b_n, U, N))
    if COPIES_Y:
        p_y += distance(p_offsets, t + AHEAD, T, backwards, strides[1])
    p_g += distance(p_offsets, t + AHEAD, T, backwards, strides[0])
    p_h += distance(p_offsets, t + AHEAD + 1, T, backwards, strides[1])
    p_d += distance(p_offsets, gl.maximum(t - 1, 0), T, backwards, strides[0])
    b_dh = if_in_step(p_offsets, b_dh * b_z, b_dh, t, lives[3])
    b_dh = kept(p_keep, b_dh, b_keep)
    return p_g, p_h, p_y, p_d, (b_dh, b_y, b_next, sums, b_keep)


@gluon.jit
def finish(
    s_old, b_dh, p_d, m_d, weights, p_keep, b_keep,
    H: gl.constexpr, U: gl.constexpr, N: gl.constexpr, num_warps: gl.constexpr, right: gl.constexpr, leave: gl.constexpr,
):  # fmt: skip
    """After all steps: the last gradients leave; the gradient of the initial state."""
    for g in gl.static_range(4):
        gl.store(p_d + g * H, s_old[g].load(leave), mask=m_d)
    b_product = in_order(multiply(weights, s_old[1], s_old[2], s_old[0], U, N, num_warps, right, True), U, N, num_warps)
    return b_dh + kept(p_keep, b_product, b_keep)


@gluon.jit
def all_steps(
    p_g, p_h, p_h0, p_y, p_dhn, p_w, p_d, p_dhx, p_sums, p_error, p_offsets, p_lengths, p_keep, backwards,
    strides, l, i_b, T, B,
    H: gl.constexpr, ROW_H: gl.constexpr, U: gl.constexpr, N: gl.constexpr, num_warps: gl.constexpr,
    COPIES_Y: gl.constexpr, ABOVE: gl.constexpr, TIMEOUT: gl.constexpr,
):  # fmt: skip
    """A lane.  Pointers are those of its last step; strides, of gates and of states, lead to the one before, or, of packed
    sequences, to the next row.

    COPIES_Y: dy is in memory.  ABOVE: another program makes it.
    """
    dtype: gl.constexpr = p_d.dtype.element_ty
    BYTES: gl.constexpr = dtype.primitive_bitwidth // 8
    VECTOR: gl.constexpr = 16 // BYTES
    LENGTH: gl.constexpr = min(VECTOR, U * N // (32 * num_warps))  # a vector for each thread: registers are scarce
    HAS_Y: gl.constexpr = COPIES_Y or ABOVE
    EARLY: gl.constexpr = BYTES == 2 or U < 64  # else 24 registers more are too many
    mma: gl.constexpr = product_layout(num_warps)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 4 // BYTES)
    gates: gl.constexpr = gate_layout(num_warps)
    copy: gl.constexpr = vector_layout(U, VECTOR, num_warps)
    leave: gl.constexpr = vector_layout(U, LENGTH, num_warps)
    shared: gl.constexpr = shared_layout(U, VECTOR)
    weights = load_transposed(p_w, H, U, gl.DotOperandLayout(0, mma, 4 // BYTES))

    # Gates [units, batch].
    o_u = gl.expand_dims(gl.arange(0, U, gl.SliceLayout(1, gates)), 1)
    o_b = i_b * N + gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, gates)), 0)
    m = (o_u < H) & (o_b < B)
    b_dh = gl.zeros([U, N], gl.float32, gates)
    b_sum = gl.sum(b_dh.reshape([U, N // 2, 2]), axis=2)
    if p_dhn is not None:
        b_dh = gl.load(p_dhn + (o_b * H + o_u), mask=m, other=0.0).to(gl.float32)

    # Vectors from global memory: [batch, units] and [gate and batch, units].
    o_cu = gl.expand_dims(gl.arange(0, U, gl.SliceLayout(0, copy)), 0)
    o_cb = i_b * N + gl.expand_dims(gl.arange(0, N, gl.SliceLayout(1, copy)), 1)
    m_h = (o_cu < H) & (o_cb < B)
    steps_h = row_steps(p_lengths, gl.minimum(o_cb, B - 1), T, backwards)
    p_h0 += o_cb * H + o_cu
    p_h += o_cb * ROW_H + o_cu
    if COPIES_Y:
        p_y += o_cb * ROW_H + o_cu
    o_cr = gl.expand_dims(gl.arange(0, 4 * N, gl.SliceLayout(1, copy)), 1)
    o_cb = i_b * N + o_cr % N
    m_g = (o_cu < H) & (o_cb < B)
    steps_g = row_steps(p_lengths, gl.minimum(o_cb, B - 1), T, backwards)
    p_g += o_cb * (4 * H) + (o_cr // N * H + o_cu)

    # Vectors to global memory, and what another program makes.
    o_lu = gl.expand_dims(gl.arange(0, U, gl.SliceLayout(0, leave)), 0)
    o_lb = i_b * N + gl.expand_dims(gl.arange(0, N, gl.SliceLayout(1, leave)), 1)
    m_d = (o_lu < H) & (o_lb < B)
    p_d += o_lb * (4 * H) + o_lu - distance(p_offsets, 0, T, backwards, strides[0])  # they leave a step late
    steps_d = row_steps(p_lengths, gl.minimum(o_lb, B - 1), T, backwards)
    lives = (steps_g, steps_h, steps_d, row_steps(p_lengths, gl.minimum(o_b, B - 1), T, backwards))

    s_even = allocate_gradients(dtype, U, N, shared)
    s_odd = allocate_gradients(dtype, U, N, shared)
    s_gradients = (s_even, s_odd)
    s_0 = allocate_step(dtype, U, N, shared, HAS_Y)
    s_1 = allocate_step(dtype, U, N, shared, HAS_Y)
    s_2 = allocate_step(dtype, U, N, shared, HAS_Y)
    s_3 = allocate_step(dtype, U, N, shared, HAS_Y)
    s_steps = (s_0, s_1, s_2, s_3)
    for g in gl.static_range(3):
        s_even[g].store(gl.zeros([N, U], dtype, copy))
    for i in gl.static_range(4 if EARLY else 3):
        p_before = before(p_offsets, i, T, p_h0, p_h, steps_h)
        m_gt = in_step(p_offsets, m_g & (i < T), i, steps_g)
        m_ht = in_step(p_offsets, m_h & (i < T), i, steps_h)
        fetch(s_steps[i], p_g, p_before, p_y, m_gt, m_ht, COPIES_Y)
        p_g += distance(p_offsets, i, T, backwards, strides[0])
        p_h += distance(p_offsets, i + 1, T, backwards, strides[1])
        if COPIES_Y:
            p_y += distance(p_offsets, i, T, backwards, strides[1])
    b_y = b_dh
    if ABOVE:
        p_y += gl.minimum(o_lb, B - 1) * (4 * H) + gl.where(o_lu < H, o_lu, o_lu % LENGTH)
        for i in gl.static_range(2):
            s_steps[i][2].store(receive(request(p_y, 1, LENGTH), p_y, p_error, 1, LENGTH, TIMEOUT))
            p_y += gl.where(i + 1 < T, strides[0], 0)
        b_y = request(p_y, 1, LENGTH)
    b_taken = ()
    if EARLY:
        async_copy.wait_group(3)
        barrier()
        b_taken = take(s_0, N, gates, HAS_Y)

    b_keep = keep_of(p_keep, 0, T, backwards, o_b, B)  # of the first step the product is 0, whatever is left of it
    carried = (b_dh, b_y, b_taken, (b_sum, b_sum, b_sum, b_sum), b_keep)
    fours = T // 4 * 4
    for t in range(0, fours, 4):
        for i in gl.static_range(4):
            p_g, p_h, p_y, p_d, carried = step(
                i, t + i, T, p_g, p_h, p_h0, p_y, p_d, p_error, p_offsets, p_keep, backwards, B, strides,
                o_b, m_g, m_h, m_d, m, lives, weights, s_gradients, s_steps, carried,
                H, U, N, num_warps, right, leave, LENGTH, EARLY, COPIES_Y, ABOVE, TIMEOUT,
            )  # fmt: skip
    for i in gl.static_range(3):
        if fours + i < T:
            p_g, p_h, p_y, p_d, carried = step(
                i, fours + i, T, p_g, p_h, p_h0, p_y, p_d, p_error, p_offsets, p_keep, backwards, B, strides,
                o_b, m_g, m_h, m_d, m, lives, weights, s_gradients, s_steps, carried,
                H, U, N, num_warps, right, leave, LENGTH, EARLY, COPIES_Y, ABOVE, TIMEOUT,
            )  # fmt: skip
    async_copy.wait_group(0)
    barrier()
    b_dh, b_y, b_taken, sums, b_keep = carried
    m_d = in_step(p_offsets, m_d, T - 1, steps_d)
    if T % 2 == 0:
        b_dh = finish(s_even, b_dh, p_d, m_d, weights, p_keep, b_keep, H, U, N, num_warps, right, leave)
    else:
        b_dh = finish(s_odd, b_dh, p_d, m_d, weights, p_keep, b_keep, H, U, N, num_warps, right, leave)
    # these addresses are made only now, for they would hold registers
    p_dhx += l * (gl.cast(B, gl.int64) * H)
    p_sums += (l * ((B + N - 1) // N) + i_b) * (4 * H)
    gl.store(p_dhx + (o_b * H + o_u), b_dh.to(dtype), mask=m)
    o_u = gl.arange(0, U, gl.SliceLayout(1, gates))
    for g in gl.static_range(4):
        b_sum = gl.convert_layout(gl.sum(sums[g], axis=1), gl.SliceLayout(1, gates))
        gl.store(p_sums + g * H + o_u, b_sum, mask=o_u < H)


# ---- between two lanes ------------------------------------------------------------------------------------------------------


@gluon.jit
def hand_on(p_y, s_y, b_mask, m, layout: gl.constexpr, MASKED: gl.constexpr):
    """dy out of shared memory."""
    b_y = s_y.load(layout)
    if MASKED:
        b_y = masked(b_y, b_mask)
    gl.store(p_y, b_y, mask=m)


@gluon.jit
def project_step(
    s_d, s_y, s_y_before, t, T,
    p_d, p_mask, p_y, p_error, strides, m, weights,
    carried,
    H: gl.constexpr, U: gl.constexpr, N: gl.constexpr, num_warps: gl.constexpr,
    right: gl.constexpr, leave: gl.constexpr, LENGTH: gl.constexpr, MASKED: gl.constexpr, TIMEOUT: gl.constexpr,
):  # fmt: skip
    """Step t: its dy to shared memory, that of the step before from there."""
    b_d, b_mask = carried
    s_d.store(receive(b_d, p_d, p_error, 4, LENGTH, TIMEOUT))
    p_d += gl.where(t + 1 < T, strides[0], 0)
    b_d = request(p_d, 4, LENGTH)
    b_next = b_mask
    if MASKED:
        b_next = gl.load(p_mask, mask=m, other=0.0)
        p_mask += strides[1]
    barrier()
    s_r = s_d.slice(N, N)
    b_y = multiply(weights, s_r, s_d.slice(2 * N, N), s_d.slice(3 * N, N), U, N, num_warps, right, False)
    hand_on(p_y, s_y_before, b_mask, m & (t > 0), leave, MASKED)
    put(s_y, in_order(b_y, U, N, num_warps), p_d.dtype.element_ty)
    return p_d, p_mask, p_y + strides[0], (b_d, b_next)


@gluon.jit
def project(
    p_d, p_w, p_mask, p_y, p_error,
    strides, i_b, T, B,
    H: gl.constexpr, U: gl.constexpr, N: gl.constexpr, num_warps: gl.constexpr, MASKED: gl.constexpr, TIMEOUT: gl.constexpr,
):  # fmt: skip
    """dy of a lane, step by step, from the gradients of r, z, n of the lane above.  In the place of hn there may be any."""
    dtype: gl.constexpr = p_d.dtype.element_ty
    BYTES: gl.constexpr = dtype.primitive_bitwidth // 8
    VECTOR: gl.constexpr = 16 // BYTES
    LENGTH: gl.constexpr = min(VECTOR, U * N // (32 * num_warps))
    mma: gl.constexpr = product_layout(num_warps)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 4 // BYTES)
    leave: gl.constexpr = vector_layout(U, LENGTH, num_warps)
    shared: gl.constexpr = shared_layout(U, VECTOR)
    weights = load_transposed(p_w, H, U, gl.DotOperandLayout(0, mma, 4 // BYTES))

    o_u = gl.expand_dims(gl.arange(0, U, gl.SliceLayout(0, leave)), 0)
    o_b = i_b * N + gl.expand_dims(gl.arange(0, N, gl.SliceLayout(1, leave)), 1)
    o_r = gl.expand_dims(gl.arange(0, 4 * N, gl.SliceLayout(1, leave)), 1)
    m = (o_u < H) & (o_b < B)
    # rows beyond B read the last, vectors beyond H the first: a row that is not finite there is not finite anyway
    p_d += gl.minimum(i_b * N + o_r % N, B - 1) * (4 * H) + (o_r // N * H + gl.where(o_u < H, o_u, o_u % LENGTH))
    p_y += o_b * (4 * H) + o_u - strides[0]  # it leaves a step late
    if MASKED:
        p_mask += o_b * H + o_u
    s_d0 = gl.allocate_shared_memory(dtype, [4 * N, U], shared)
    s_d1 = gl.allocate_shared_memory(dtype, [4 * N, U], shared)
    s_y0 = gl.allocate_shared_memory(dtype, [N, U], shared)
    s_y1 = gl.allocate_shared_memory(dtype, [N, U], shared)
    s_ds = (s_d0, s_d1)
    s_ys = (s_y0, s_y1)
    carried = (request(p_d, 4, LENGTH), gl.zeros([N, U], dtype, leave))
    for t in range(0, T // 2 * 2, 2):
        for i in gl.static_range(2):
            p_d, p_mask, p_y, carried = project_step(
                s_ds[i], s_ys[i], s_ys[1 - i], t + i, T, p_d, p_mask, p_y, p_error, strides, m, weights, carried,
                H, U, N, num_warps, right, leave, LENGTH, MASKED, TIMEOUT,
            )  # fmt: skip
    if T % 2 == 1:
        p_d, p_mask, p_y, carried = project_step(
            s_d0, s_y0, s_y1, T - 1, T, p_d, p_mask, p_y, p_error, strides, m, weights, carried,
            H, U, N, num_warps, right, leave, LENGTH, MASKED, TIMEOUT,
        )  # fmt: skip
    barrier()
    if T % 2 == 1:
        hand_on(p_y, s_y0, carried[1], m, leave, MASKED)
    else:
        hand_on(p_y, s_y1, carried[1], m, leave, MASKED)


# ---- kernel -----------------------------------------------------------------------------------------------------------------


@gluon.jit(do_not_specialize=["T", "B"])
def resident_backward_kernel(
    p_dy, p_dhn, p_h0, p_out, p_below, p_gates, p_w_ih, p_w_hh, p_masks,
    p_d_gates, p_dhx, p_sums, p_error, p_offsets, p_keep,
    T, B,
    LANES: gl.constexpr, H: gl.constexpr,
    U: gl.constexpr, N: gl.constexpr,
    REVERSE: gl.constexpr, PAIRED: gl.constexpr, TIMEOUT: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """All T steps of one lane for N batch rows, the last step first; equations, arguments and results are those of
    ``wavefront_backward_kernel``.  Programs: of the lanes, then, of a stack, those between lanes 0 and 1, 1 and 2, ...

    Only a stack's p_d_gates comes filled with the pattern.  On its way to a lane dy lies there in the place of that lane's
    gradient of hn of the same step, rounded to the dtype, or to tf32.

    Each warp makes dh of 16 (or more) units from all gradients of the step before, and the gradients of its units from that.
    Gates, states and dy come by asynchronous copies three steps ahead; gradients leave, in vectors, during the step after
    theirs.

    Resets are as there, and so are packed sequences, but not of a stack.

    Bytes a step: gates 4NH, state NH and dy NH read, gradients 4NH written; between lanes 3NH read, a mask NH, NH written.
    Bound by latency: shared memory, a chain of H products, a barrier.
    """
    STACK: gl.constexpr = LANES > 1 and not REVERSE and PAIRED is None
    ROW_H: gl.constexpr = 2 * H if REVERSE else H
    pid = gl.program_id(0)
    PROGRAMS_B = (B + N - 1) // N
    i_b = pid % PROGRAMS_B
    l = pid // PROGRAMS_B

    # Where the last step of the forward reads and writes, and how far it is to the one before.
    rows = gl.cast(B, gl.int64)
    steps = T * rows
    last = (T - 1) * rows
    backwards = 1 - l if REVERSE else 1
    p_lengths = p_offsets
    if p_offsets is not None:
        p_lengths += T + 1
        steps = gl.cast(gl.load(p_offsets + T), gl.int64)
        T = gl.load(p_lengths + i_b * N)
        last = gl.cast(gl.load(p_offsets + (T - 1)), gl.int64)
    sign = -1
    if REVERSE:
        last *= 1 - l
        sign = 2 * l - 1
    elif PAIRED is not None:
        back = walks_back(l, PAIRED)
        last *= 1 - back
        sign = 2 * back - 1
    strides = (sign * B * (4 * H), sign * B * ROW_H)
    if p_offsets is not None:
        strides = (4 * H, ROW_H)
    if STACK and l >= LANES:
        o_d = ((l - LANES) * steps + last) * (4 * H)
        p_mask = p_d_gates  # not used
        if p_masks is not None:
            p_mask = p_masks + ((l - LANES) * steps + last) * H
        project(
            p_d_gates + (o_d + steps * (4 * H)), select(p_w_ih, l - LANES), p_mask, p_d_gates + o_d, p_error,
            strides, i_b, T, B, H, U, N, num_warps, p_masks is not None, TIMEOUT,
        )  # fmt: skip
    else:
        o_d = (l * steps + last) * (4 * H)
        p_d = p_d_gates + o_d
        o_h = last * ROW_H
        if REVERSE:
            o_h += l * H
        elif PAIRED is not None:
            o_h += l * (steps * H)
        p_h = p_out
        if STACK:
            p_h = gl.where(l == LANES - 1, p_out, p_below + l * (steps * H))
        p_h += o_h + distance(p_offsets, 0, T, backwards, strides[1])
        p_y = p_d  # not used
        if p_dy is not None:
            p_y = p_dy + o_h
        p_last = p_dhn
        if p_dhn is not None:
            p_last += l * (rows * H)
        p_first = p_h0 + l * (rows * H)
        p_w = select(p_w_hh, l)
        if STACK and l < LANES - 1:
            all_steps(
                p_gates + o_d, p_h, p_first, p_d, p_last, p_w, p_d, p_dhx, p_sums, p_error, p_offsets, p_lengths, p_keep,
                backwards, strides, l, i_b, T, B, H, ROW_H, U, N, num_warps, False, True, TIMEOUT,
            )  # fmt: skip
        else:
            all_steps(
                p_gates + o_d, p_h, p_first, p_y, p_last, p_w, p_d, p_dhx, p_sums, p_error, p_offsets, p_lengths, p_keep,
                backwards, strides, l, i_b, T, B, H, ROW_H, U, N, num_warps, p_dy is not None, False, TIMEOUT,
            )  # fmt: skip


def resident_backward_constants(
    plan: ResidentPlan, *, lanes: int, hidden: int, reverse: bool, timeout_ns: int, pair: int | None = None
) -> dict[str, Any]:
    """What selects the code of ``resident_backward_kernel``: its constants and options."""
    return dict(
        LANES=lanes, H=hidden, U=plan.units, N=plan.rows,
        REVERSE=reverse, PAIRED=pair, TIMEOUT=timeout_ns,
        num_warps=plan.num_warps, maxnreg=most_registers(plan.num_warps),
        launch_cooperative_grid=lanes > 1 and not reverse and pair is None,
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
    pair: int | None = None,
    offsets: Tensor | None = None,
    keep: Tensor | None = None,
    timeout_ns: int = 10_000_000_000,
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and arguments of ``resident_backward_kernel``; the tensors are those of ``wavefront_backward_launch``, but only a
    stack's d_gates has to be filled.  A stack of L lanes takes as many programs as 2L-1 lanes."""
    lanes, batch, hidden = h0.shape
    reverse = check_backward(dy, dhn, h0, out, below, gates, w_ih, w_hh, masks, d_gates, dhx, sums, pair, offsets, keep)
    assert offsets is None or reverse or lanes == 1
    assert sums.shape[1] == -(-batch // plan.rows)
    arguments = backward_arguments(dy, dhn, h0, out, below, gates, w_ih, w_hh, masks, d_gates, dhx, sums, error, offsets, keep)
    arguments |= resident_backward_constants(
        plan, lanes=lanes, hidden=hidden, reverse=reverse, timeout_ns=timeout_ns, pair=pair
    )
    stack = not reverse and pair is None
    return (plan.programs(2 * lanes - 1 if stack else lanes, batch),), arguments
