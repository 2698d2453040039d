"""Whole sequences of a GRU in one launch: the weights of all lanes stay in registers, layers run one behind the other.

A lane is a layer of a stack, or a direction of a single layer.  Its units are spread over programs; each keeps the rows of W
that make its units, for the whole sequence.  A step needs the whole state before it, which other programs made: it crosses
through L2.  In a stack, layer l does step t while layer l-1 does step t+1, so L layers take T+L-1 steps, not L*T.

The hand-over.  The sequence of states is filled with a bit pattern that the kernel never stores (all ones, a NaN; its own NaNs
are made canonical), and a consumer reads what it needs again and again until none of it is the pattern.  The data is its own
flag: one crossing, no fence.  Only values that the kernel wrote, and the prepared initial state, are waited for.  Every wait
ends: a program that has waited for TIMEOUT ns of the GPU's clock, or sees that another has, sets the error word and goes on
with what it has, and so do all others.  Programs wait for each other, hence the cooperative launch: all at once or none.

Written in Gluon, because the layout is the point: a warp takes a slice of k, and the vectors that a thread polls are its own
operands of the product.  Nothing is shared before the product, and one barrier adds the slices up.

Names as in ``gates``; besides: ``l`` is a lane, ``s_`` is shared memory, U units and N batch rows make a program's tile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

if TYPE_CHECKING:
    from torch import Tensor

    from ..planner.whole_sequence import WavefrontPlan

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # named thread_barrier in Triton 3.6


@gluon.constexpr_function
def _tile_asm(vectors, k_vectors, vector_bytes, pack, element_bytes, timeout, settle):
    """PTX for one thread's part of a polled tile, and its operand constraints.

    vectors of vector_bytes each, pack elements in all; k_vectors of them in a row follow each other at a fixed distance and
    share an address.  ``settle`` false: the loads.  True: loads again until no element is all ones, then, for fp32, rounds to
    tf32 (half of the last kept bit is added; the product drops the rest).  The loads are relaxed: weak ones may be hoisted
    out of the loop.  Reading the clock costs, so it is read at every 256th failure.
    """
    words = vector_bytes // 4
    outputs = vectors * words
    per_vector = pack // vectors
    suffix = {4: "v4.b32", 2: "v2.b32", 1: "b32"}[words]
    address = 2 * outputs if settle else outputs
    loads = ""
    for i in range(vectors):
        registers = ", ".join(f"${i * words + j}" for j in range(words))
        if words > 1:
            registers = "{" + registers + "}"
        first = address + i // k_vectors * k_vectors * per_vector
        loads += f"ld.relaxed.gpu.global.{suffix} {registers}, [${first} + {i % k_vectors * 4 * vector_bytes}];\n"
    if not settle:
        return loads, ",".join(["=&r"] * outputs + ["l"] * pack)

    chains = min(4, outputs)
    test = ""
    for i in range(outputs):
        m = f"m{i % chains}"
        if element_bytes == 2:  # a half-word of ones is a zero half-word of the complement y: (y - 1) & ~y has its top bit
            test += f"not.b32 m, ${i};\nsub.u32 m, m, 0x00010001;\nand.b32 m, m, ${i};\n"
            test += f"mov.b32 {m}, m;\n" if i < chains else f"or.b32 {m}, {m}, m;\n"
        else:
            test += f"mov.b32 {m}, ${i};\n" if i < chains else f"max.u32 {m}, {m}, ${i};\n"
    for i in range(1, chains):
        test += f"{'or.b32' if element_bytes == 2 else 'max.u32'} m0, m0, m{i};\n"
    if element_bytes == 2:
        test += "and.b32 m0, m0, 0x80008000;\nsetp.ne.u32 p, m0, 0;\n"
    else:
        test += "setp.eq.u32 p, m0, 0xffffffff;\n"
    rounding = "".join(f"add.u32 ${i}, ${i}, 0x1000;\n" for i in range(outputs)) if element_bytes == 4 else ""
    error = f"${address + pack}"
    text = f"""{{
.reg .pred p, q;
.reg .b32 m, m0, m1, m2, m3, c;
.reg .b64 t, t0;
mov.u32 c, 0;
mov.u64 t0, 0;
POLL:
{test}vote.sync.any.pred p, p, 0xffffffff;
@!p bra END;
{loads}add.u32 c, c, 1;
and.b32 m, c, 255;
setp.ne.u32 p, m, 0;
@p bra POLL;
ld.relaxed.gpu.global.b32 m, [{error}];
setp.ne.u32 p, m, 0;
mov.u64 t, %globaltimer;
setp.eq.u64 q, t0, 0;
@q mov.u64 t0, t;
sub.u64 t, t, t0;
setp.gt.or.u64 p, t, {timeout}, p;
vote.sync.any.pred p, p, 0xffffffff;
@!p bra POLL;
st.relaxed.gpu.global.b32 [{error}], 1;
END:
{rounding}}}
"""
    return text, ",".join(["=&r"] * outputs + [str(i) for i in range(outputs)] + ["l"] * (2 * pack))


@gluon.jit
def issue(p, vectors: gl.constexpr, k_vectors: gl.constexpr, vector_bytes: gl.constexpr, pack: gl.constexpr):
    """Starts to read the tile at p; ``settle`` must follow."""
    element_bytes: gl.constexpr = p.dtype.element_ty.primitive_bitwidth // 8
    asm: gl.constexpr = _tile_asm(vectors, k_vectors, vector_bytes, pack, element_bytes, 0, False)
    return gl.inline_asm_elementwise(asm[0], asm[1], [p], dtype=p.dtype.element_ty, is_pure=False, pack=pack)


@gluon.jit
def settle(
    b, p, p_error,
    vectors: gl.constexpr, k_vectors: gl.constexpr, vector_bytes: gl.constexpr, pack: gl.constexpr, TIMEOUT: gl.constexpr,
):  # fmt: skip
    """The tile at p, as soon as all of it is there; b is what ``issue`` saw."""
    element_bytes: gl.constexpr = p.dtype.element_ty.primitive_bitwidth // 8
    asm: gl.constexpr = _tile_asm(vectors, k_vectors, vector_bytes, pack, element_bytes, TIMEOUT, True)
    return gl.inline_asm_elementwise(
        asm[0], asm[1], [b, p.to(gl.int64), p_error.to(gl.int64)], dtype=p.dtype.element_ty, is_pure=False, pack=pack
    )


@gluon.jit
def prefetch(address):
    """Brings the lines at these addresses to L2."""
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [address], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def sigmoid(b_x):
    """1 / (1 + 2^(-x log2 e)) by the two instructions of the special function unit: this is on the path that every step
    waits for.  Off by 2e-7 at most, relative; NaN stays NaN."""
    return gl.inline_asm_elementwise(
        """{ .reg .f32 a;
mul.ftz.f32 a, $1, 0fBFB8AA3B;
ex2.approx.ftz.f32 a, a;
add.ftz.f32 a, a, 0f3F800000;
rcp.approx.ftz.f32 $0, a; }""",
        "=f,f", [b_x], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def tanh(b_x):
    """2 / (1 + 2^(-2x log2 e)) - 1, likewise.  Off by 2e-7 at most, absolute: half a rounding of a gate near 1."""
    return gl.inline_asm_elementwise(
        """{ .reg .f32 a;
mul.ftz.f32 a, $1, 0fC038AA3B;
ex2.approx.ftz.f32 a, a;
add.ftz.f32 a, a, 0f3F800000;
rcp.approx.ftz.f32 a, a;
fma.rn.ftz.f32 $0, a, 0f40000000, 0fBF800000; }""",
        "=f,f", [b_x], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def round_operand(b_x):
    """fp32 to the nearest tf32, as ``settle`` does; other types as they are."""
    if b_x.dtype == gl.float32:
        b_x = (b_x.to(gl.int32, bitcast=True) + 0x1000).to(gl.float32, bitcast=True)
    return b_x


@gluon.jit
def dot(b_w, b_h, b_acc):
    """acc + w @ h on tensor cores: [.., units, k] @ [.., k, batch]."""
    if b_w.dtype == gl.float32:
        return gl.nvidia.ampere.mma_v2(b_w, b_h, b_acc, input_precision="tf32")
    else:
        return gl.nvidia.ampere.mma_v2(b_w, b_h, b_acc)


@gluon.constexpr_function
def _slice_length(hidden, slices):
    return (1 << (hidden - 1).bit_length()) // slices


@gluon.constexpr_function
def _shared_bases(slices, units, batch):
    """Offset bit -> (slice, unit, batch) of the partial sums, such that both sides use all banks.

    A thread of the product stores pairs along the batch (bit 0); its half-warp spans batch bits 1, 2 and unit bits 0, 1.  A
    warp that adds up spans unit bits 0 to 3 and batch bit 0.  Bits 1 to 4 tell elements apart in both.
    """
    log_units, log_batch = units.bit_length() - 1, batch.bit_length() - 1
    bases = [[0, 0, 1], [0, 1, 0], [0, 2, 0], [0, 4, 0], [0, 8, 0], [0, 4, 2], [0, 8, 4]]
    bases += [[0, 0, 1 << i] for i in range(3, log_batch)] + [[0, 1 << i, 0] for i in range(4, log_units)]
    return bases + [[1 << i, 0, 0] for i in range(slices.bit_length() - 1)]


@gluon.constexpr_function
def _gate_layout(slices, batch, warps):
    """Layout of gates: 16 units of two batch rows a warp, warps along the batch first; a thread holds all slices."""
    along_batch = min(warps, batch // 2)
    return gl.BlockedLayout([slices, 1, 1], [1, 16, 2], [1, warps // along_batch, along_batch], [1, 2, 0])


@gluon.jit
def add_slices(s_partial, first: gl.constexpr, count: gl.constexpr, layout: gl.constexpr, result: gl.constexpr):
    """Sum of ``count`` slices of k from the ``first`` on: [units, batch]."""
    return gl.convert_layout(gl.sum(s_partial.slice(first, count, 0).load(layout), axis=0), result)


@gluon.jit
def load_rows(p, m_u, layout: gl.constexpr, N: gl.constexpr):
    """A vector [units] as [units, N]."""
    return gl.expand_dims(gl.load(p, mask=m_u, other=0.0), 1) + gl.zeros([m_u.shape[0], N], gl.float32, layout)


@gluon.jit(do_not_specialize=["T", "B", "PROGRAMS_B"])
def wavefront_kernel(
    p_gi, p_h, p_w_ih, p_w_hh, p_bias,
    p_gates, p_error,
    T, B, PROGRAMS_B,
    stride_gl, stride_gt, stride_hl, stride_ht, stride_sl,
    H: gl.constexpr, ROW_G: gl.constexpr, ROW_H: gl.constexpr,
    U: gl.constexpr, N: gl.constexpr, TILES: gl.constexpr,
    KX: gl.constexpr, KH: gl.constexpr, MS: gl.constexpr,
    STACK: gl.constexpr, REVERSE: gl.constexpr, SAVE_GATES: gl.constexpr,
    EARLY: gl.constexpr, STORE_FIRST: gl.constexpr, SHARE_N: gl.constexpr, AHEAD: gl.constexpr, TIMEOUT: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """All T steps of U units of one lane, for TILES tiles of N batch rows.

        r, z = sigmoid(x_t W_i^T + b_i + h W_h^T + b_h)         each
        hn   = h W_hn^T + b_hn
        n    = tanh(x_t W_in^T + b_in + r * hn)
        h_t  = n + z * (h - n)

    x_t W_i^T + (b_ir + b_hr, b_iz + b_hz, b_in) of lane 0, or of both directions, comes as gi; x of a higher layer is h_t of
    the lane below, and its bias [b_ir + b_hr, b_iz + b_hz, b_in, b_hn] is added here.  p_h holds for each lane T+1 states,
    h0 first.  A reversed lane (1, if REVERSE) walks memory backwards: its stride of time is negated here, its offsets
    stride_gl, stride_hl, stride_sl point at what its first step needs.

    The warps: KH slices of k for h, beside them KX for the x of the next step (0: after h_t is on its way, the same warps take
    x of the next step, from a second set of weights), times MS along the units.
    Saved for the backward, if SAVE_GATES: r, z, n, hn.

    With TILES > 1 the tiles are recurrences of their own; EARLY starts to read the next tile before the gates of this one.
    AHEAD steps before they are due, lines of gi and of states are brought to L2: the fill had pushed them out.

    Bytes a step and lane: each program reads the B*H states of its rows and writes its own, gi 3BH once, gates 4BH written;
    weights none.  Bound by latency: one crossing through L2, a chain of K/KH of products, one exchange of partial sums through
    shared memory, four special functions.  With many tiles by shared memory and issue, not by tensor cores.
    """
    dtype: gl.constexpr = p_h.dtype.element_ty
    BYTES: gl.constexpr = dtype.primitive_bitwidth // 8
    KS: gl.constexpr = KX + KH
    AFTER: gl.constexpr = STACK and KX == 0
    KC: gl.constexpr = _slice_length(H, KH)
    KW: gl.constexpr = min(16 // BYTES, KC // 8)
    PACK: gl.constexpr = KC * N // 32
    VECTORS: gl.constexpr = PACK // KW
    VECTOR_BYTES: gl.constexpr = KW * BYTES
    K_VECTORS: gl.constexpr = KC // (4 * KW) if KC * KH == H else 1
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[KS, MS, 1], instr_shape=[1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, KW)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, KW)
    over_h: gl.constexpr = _gate_layout(KH, N, KS * MS)
    over_x: gl.constexpr = _gate_layout(max(KX, 1), N, KS * MS)
    gate: gl.constexpr = gl.SliceLayout(0, over_h)
    banked: gl.constexpr = gl.SharedLinearLayout(_shared_bases(KS, U, N))

    PROGRAMS_U: gl.constexpr = (H + U - 1) // U
    pid = gl.program_id(0)
    i_u = pid % PROGRAMS_U
    i_b = pid // PROGRAMS_U % PROGRAMS_B
    l = pid // (PROGRAMS_U * PROGRAMS_B)
    sign = 1
    if REVERSE:
        sign = 1 - 2 * l
    p_h += l * stride_hl
    stride_ht *= sign
    if not STACK:
        p_gi += l * stride_gl
    stride_gt *= sign

    # Partial sums, two sets where tiles follow each other: one barrier a tile.
    s_r0 = gl.allocate_shared_memory(gl.float32, [KS, U, N], banked)
    s_z0 = gl.allocate_shared_memory(gl.float32, [KS, U, N], banked)
    s_n0 = gl.allocate_shared_memory(gl.float32, [KS, U, N], banked)
    sets = ((s_r0, s_z0, s_n0),)
    if TILES > 1:
        s_r1 = gl.allocate_shared_memory(gl.float32, [KS, U, N], banked)
        s_z1 = gl.allocate_shared_memory(gl.float32, [KS, U, N], banked)
        s_n1 = gl.allocate_shared_memory(gl.float32, [KS, U, N], banked)
        sets = ((s_r0, s_z0, s_n0), (s_r1, s_z1, s_n1))

    # Weights [slices, units, k]: slices of W_ih (if KX), then of W_hh.
    o_wu = gl.arange(0, U, gl.SliceLayout(0, gl.SliceLayout(2, left)))
    o_wu = i_u * U + gl.expand_dims(gl.expand_dims(o_wu, 0), 2)
    o_wk = gl.expand_dims(gl.expand_dims(gl.arange(0, KC, gl.SliceLayout(0, gl.SliceLayout(1, left))), 0), 1)
    o_ws = gl.expand_dims(gl.expand_dims(gl.arange(0, KS, gl.SliceLayout(1, gl.SliceLayout(2, left))), 1), 2)
    p_w = p_w_hh + l * (3 * H * H)
    if KX > 0:
        p_w = gl.where(o_ws < KX, p_w_ih + (l - 1) * (3 * H * H), p_w)
        o_wk += gl.where(o_ws < KX, o_ws, o_ws - KX) * KC
    else:
        o_wk += o_ws * KC
    m_w = (o_wu < H) & (o_wk < H)
    if KX > 0:
        m_w = m_w & ((o_ws >= KX) | (l > 0))
    o_w = o_wu * H + o_wk
    b_wr = round_operand(gl.load(p_w + o_w, mask=m_w, other=0.0))
    b_wz = round_operand(gl.load(p_w + o_w + H * H, mask=m_w, other=0.0))
    b_wn = round_operand(gl.load(p_w + o_w + 2 * H * H, mask=m_w, other=0.0))

    # Gates [units, batch].
    o_u1 = i_u * U + gl.arange(0, U, gl.SliceLayout(1, gate))
    m_u1 = o_u1 < H
    o_u = gl.expand_dims(o_u1, 1)
    m_u = o_u < H
    o_b = i_b * (TILES * N) + gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, gate)), 0)
    p_bias += l * (4 * H) + o_u1
    b_bias_hn = load_rows(p_bias + 3 * H, m_u1, gate, N)
    b_hs = ()
    for j in gl.static_range(TILES):
        b_h0 = gl.load(p_h + (o_b + j * N) * ROW_H + o_u, mask=m_u & (o_b + j * N < B), other=0.0)
        b_hs = b_hs + (b_h0.to(gl.float32),)
    p_out = p_h + stride_ht
    p_g = p_gi
    m_g = m_u
    if STACK:
        m_g = m_u & (l == 0)
    p_save = p_gates
    stride_st = B * (4 * H) * sign
    if SAVE_GATES:
        p_save = p_gates + l * stride_sl

    # The polled tile [slices, k, batch].  Rows beyond the batch read its last row, vectors beyond H the first ones.
    o_k = gl.expand_dims(gl.expand_dims(gl.arange(0, KC, gl.SliceLayout(0, gl.SliceLayout(2, right))), 0), 2)
    o_s = gl.expand_dims(gl.expand_dims(gl.arange(0, KS, gl.SliceLayout(1, gl.SliceLayout(2, right))), 1), 2)
    o_n = gl.expand_dims(gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(1, right))), 0), 1)
    o_n = i_b * (TILES * N) + o_n
    if KX > 0:
        o_k += gl.where(o_s < KX, o_s, o_s - KX) * KC
    else:
        o_k += o_s * KC
    o_k = gl.where(o_k < H, o_k, o_k % KW)
    is_x = (o_s < KX) & (l > 0)
    p_k = p_h + o_k
    step_k = gl.where(o_s < KX, 0, stride_ht)  # idle x slices of lane 0 stay on h0, and their weights are 0
    if KX > 0:
        p_k = gl.where(is_x, p_h - stride_hl + stride_ht, p_h) + o_k
    zero = gl.zeros([KS, U, N], gl.float32, mma)

    # Lines to prefetch: one address a thread, of states that this program will write and of gi that it will read.
    LINES: gl.constexpr = max(1, U * BYTES // 128)
    o_f = gl.arange(0, 4 * TILES * N * LINES, gl.BlockedLayout([1], [32], [num_warps], [0]))
    o_fb = gl.minimum(i_b * (TILES * N) + o_f % (TILES * N), B - 1)
    o_fu = gl.minimum(i_u * U + o_f // (4 * TILES * N) * (128 // BYTES), H - 1)
    o_fg = o_f // (TILES * N) % 4
    if STACK:
        o_fg = gl.where(l > 0, 0, o_fg)
    a_f = (p_gi + o_fb * ROW_G + o_fu + (o_fg - 1) * H).to(gl.int64)
    a_f = gl.where(o_fg == 0, (p_h + stride_ht + o_fb * ROW_H + o_fu).to(gl.int64), a_f)
    step_f = gl.where(o_fg == 0, stride_ht, stride_gt) * BYTES
    a_f += gl.minimum(AHEAD, T - 1) * step_f

    if AFTER and l > 0:
        s_x = gl.allocate_shared_memory(gl.float32, [KS, U, N], banked)
        p_v = p_w_ih + (l - 1) * (3 * H * H) + o_w
        b_vr = round_operand(gl.load(p_v, mask=m_w, other=0.0))
        b_vz = round_operand(gl.load(p_v + H * H, mask=m_w, other=0.0))
        b_vn = round_operand(gl.load(p_v + 2 * H * H, mask=m_w, other=0.0))
        b_bias_r = load_rows(p_bias, m_u1, gate, N)
        b_bias_z = load_rows(p_bias + H, m_u1, gate, N)
        b_bias_n = load_rows(p_bias + 2 * H, m_u1, gate, N)
        p_t = p_k + gl.minimum(o_n, B - 1) * ROW_H
        p_x = p_t - stride_hl + stride_ht
        b_x = issue(p_x, VECTORS, K_VECTORS, VECTOR_BYTES, PACK)
        b_x = settle(b_x, p_x, p_error, VECTORS, K_VECTORS, VECTOR_BYTES, PACK, TIMEOUT)
        b_xr = dot(b_vr, b_x, zero)
        b_xz = dot(b_vz, b_x, zero)
        s_x.store(dot(b_vn, b_x, zero))
        b_xn = add_slices(s_x, 0, KH, over_h, gate) + b_bias_n
        b_h = b_hs[0]
        m = m_u & (o_b < B)
        for t in range(T):
            p_x += gl.where(t + 1 < T, stride_ht, 0)
            if EARLY:
                b_x = issue(p_x, VECTORS, K_VECTORS, VECTOR_BYTES, PACK)
            b_t = issue(p_t, VECTORS, K_VECTORS, VECTOR_BYTES, PACK)
            b_t = settle(b_t, p_t, p_error, VECTORS, K_VECTORS, VECTOR_BYTES, PACK, TIMEOUT)
            s_r0.store(dot(b_wr, b_t, b_xr))
            s_n0.store(dot(b_wn, b_t, zero))
            s_z0.store(dot(b_wz, b_t, b_xz))
            b_r = sigmoid(add_slices(s_r0, 0, KH, over_h, gate) + b_bias_r)
            b_hn = add_slices(s_n0, 0, KH, over_h, gate) + b_bias_hn
            b_z = sigmoid(add_slices(s_z0, 0, KH, over_h, gate) + b_bias_z)
            b_n = tanh(b_xn + b_r * b_hn)
            b_h = b_n + b_z * (b_h - b_n)
            b_h = gl.where(b_h == b_h, b_h, float("nan"))
            gl.store(p_out + (o_b * ROW_H + o_u), b_h.to(dtype), mask=m)
            if SAVE_GATES:
                p_sj = p_save + (o_b * (4 * H) + o_u)
                gl.store(p_sj, b_r.to(dtype), mask=m)
                gl.store(p_sj + H, b_z.to(dtype), mask=m)
                gl.store(p_sj + 2 * H, b_n.to(dtype), mask=m)
                gl.store(p_sj + 3 * H, b_hn.to(dtype), mask=m)
                p_save += stride_st
            if not EARLY:
                b_x = issue(p_x, VECTORS, K_VECTORS, VECTOR_BYTES, PACK)
            b_x = settle(b_x, p_x, p_error, VECTORS, K_VECTORS, VECTOR_BYTES, PACK, TIMEOUT)
            b_xr = dot(b_vr, b_x, zero)
            b_xz = dot(b_vz, b_x, zero)
            s_x.store(dot(b_vn, b_x, zero))
            b_xn = add_slices(s_x, 0, KH, over_h, gate) + b_bias_n
            p_out += stride_ht
            p_t += stride_ht
            if AHEAD > 0:
                prefetch(a_f)
                a_f += gl.where(t + 1 + AHEAD < T, step_f, 0)
    else:
        if SHARE_N:
            s_w = gl.allocate_shared_memory(dtype, [KS, U, KC], gl.SwizzledSharedLayout(16 // BYTES, 1, 8, [2, 1, 0]))
            s_w.store(b_wn)
        b_xs = ()
        if KX > 0:
            for j in gl.static_range(TILES):
                p_t = p_k + gl.minimum(o_n + j * N, B - 1) * ROW_H
                b_t = issue(p_t, VECTORS, K_VECTORS, VECTOR_BYTES, PACK)
                b_t = settle(b_t, p_t, p_error, VECTORS, K_VECTORS, VECTOR_BYTES, PACK, TIMEOUT)
                s_r0.store(dot(b_wr, b_t, zero))
                s_z0.store(dot(b_wz, b_t, zero))
                if SHARE_N:
                    s_n0.store(dot(s_w.load(left), b_t, zero))
                else:
                    s_n0.store(dot(b_wn, b_t, zero))
                b_xr = add_slices(s_r0, 0, KX, over_x, gate) + load_rows(p_bias, m_u1, gate, N)
                b_xz = add_slices(s_z0, 0, KX, over_x, gate) + load_rows(p_bias + H, m_u1, gate, N)
                b_xn = add_slices(s_n0, 0, KX, over_x, gate) + load_rows(p_bias + 2 * H, m_u1, gate, N)
                b_xs = b_xs + ((b_xr, b_xz, b_xn),)
            p_k += gl.where(is_x, stride_ht, 0)
        p_t = p_k + gl.minimum(o_n, B - 1) * ROW_H
        if EARLY:
            b_t = issue(p_t, VECTORS, K_VECTORS, VECTOR_BYTES, PACK)
        for t in range(T):
            b_new_hs = ()
            b_new_xs = ()
            for j in gl.static_range(TILES):
                m_b = o_b + j * N < B
                p_gj = p_g + ((o_b + j * N) * ROW_G + o_u)
                b_ar = gl.load(p_gj, mask=m_g & m_b, other=0.0).to(gl.float32)
                b_az = gl.load(p_gj + H, mask=m_g & m_b, other=0.0).to(gl.float32)
                b_an = gl.load(p_gj + 2 * H, mask=m_g & m_b, other=0.0).to(gl.float32)
                if KX > 0:
                    b_ar += gl.where(l > 0, b_xs[j][0], 0.0)
                    b_az += gl.where(l > 0, b_xs[j][1], 0.0)
                    b_an += gl.where(l > 0, b_xs[j][2], 0.0)
                s_r = sets[j % len(sets)][0]
                s_z = sets[j % len(sets)][1]
                s_n = sets[j % len(sets)][2]
                if not EARLY:
                    p_t = p_k + gl.minimum(o_n + j * N, B - 1) * ROW_H
                    b_t = issue(p_t, VECTORS, K_VECTORS, VECTOR_BYTES, PACK)
                b_t = settle(b_t, p_t, p_error, VECTORS, K_VECTORS, VECTOR_BYTES, PACK, TIMEOUT)
                s_r.store(dot(b_wr, b_t, zero))
                s_z.store(dot(b_wz, b_t, zero))
                if SHARE_N:
                    s_n.store(dot(s_w.load(left), b_t, zero))
                else:
                    s_n.store(dot(b_wn, b_t, zero))
                if EARLY:
                    barrier()
                    if j + 1 < TILES:
                        p_t = p_k + gl.minimum(o_n + (j + 1) * N, B - 1) * ROW_H
                    else:
                        # no further than the state before the last step, which is all that the next issue may ask for
                        p_k += gl.where(t + 1 < T, gl.where(is_x & (t + 2 < T), stride_ht, step_k), 0)
                        p_t = p_k + gl.minimum(o_n, B - 1) * ROW_H
                    b_t = issue(p_t, VECTORS, K_VECTORS, VECTOR_BYTES, PACK)
                b_r = sigmoid(add_slices(s_r, KX, KH, over_h, gate) + b_ar)
                b_hn = add_slices(s_n, KX, KH, over_h, gate) + b_bias_hn
                b_z = sigmoid(add_slices(s_z, KX, KH, over_h, gate) + b_az)
                b_n = tanh(b_an + b_r * b_hn)
                b_h = b_n + b_z * (b_hs[j] - b_n)
                b_h = gl.where(b_h == b_h, b_h, float("nan"))
                gl.store(p_out + ((o_b + j * N) * ROW_H + o_u), b_h.to(dtype), mask=m_u & m_b)
                b_new_hs = b_new_hs + (b_h,)
                if SAVE_GATES:
                    p_sj = p_save + ((o_b + j * N) * (4 * H) + o_u)
                    gl.store(p_sj, b_r.to(dtype), mask=m_u & m_b)
                    gl.store(p_sj + H, b_z.to(dtype), mask=m_u & m_b)
                    gl.store(p_sj + 2 * H, b_n.to(dtype), mask=m_u & m_b)
                    gl.store(p_sj + 3 * H, b_hn.to(dtype), mask=m_u & m_b)
                if STORE_FIRST:
                    barrier()  # else the loads of the x slices are scheduled before the store that all others wait for
                if KX > 0:
                    b_xr = add_slices(s_r, 0, KX, over_x, gate) + load_rows(p_bias, m_u1, gate, N)
                    b_xz = add_slices(s_z, 0, KX, over_x, gate) + load_rows(p_bias + H, m_u1, gate, N)
                    b_xn = add_slices(s_n, 0, KX, over_x, gate) + load_rows(p_bias + 2 * H, m_u1, gate, N)
                    b_new_xs = b_new_xs + ((b_xr, b_xz, b_xn),)
                if TILES == 1:
                    barrier()  # the partial sums have been read; here no one waits for it
            b_hs = b_new_hs
            b_xs = b_new_xs
            p_out += stride_ht
            p_g += stride_gt
            if SAVE_GATES:
                p_save += stride_st
            if not EARLY:
                p_k += gl.where(is_x & (t + 2 < T), stride_ht, step_k)
            if AHEAD > 0:
                prefetch(a_f)
                a_f += gl.where(t + 1 + AHEAD < T, step_f, 0)


def pack_bias(b_ih: Tensor | None, b_hh: Tensor | None, *, lanes: int, hidden: int, like: Tensor) -> Tensor:
    """[lanes, 4H] fp32: b_ir + b_hr, b_iz + b_hz, b_in, b_hn of each lane, from [lanes, 3H] or None."""
    zero = like.new_zeros(lanes, 3 * hidden, dtype=torch.float32) if b_ih is None or b_hh is None else None
    b_ih = zero if b_ih is None else b_ih.float()
    b_hh = zero if b_hh is None else b_hh.float()
    both = 2 * hidden
    return torch.cat([b_ih[:, :both] + b_hh[:, :both], b_ih[:, both:], b_hh[:, both:]], 1)


def prepare_states(h0: Tensor, steps: int, *, interleaved: bool) -> Tensor:
    """Room for the states of all lanes, filled with the pattern that says "not yet", around the initial state [lanes, B, H].

    [lanes, T+1, B, H], the initial state first; or, for two directions, [T+2, B, 2H]: forward from row 0, backward from T+1.
    Each call fills anew: 2 bytes or 4 an element, written once, bound by memory bandwidth.
    """
    lanes, batch, hidden = h0.shape
    integer = torch.int32 if h0.dtype == torch.float32 else torch.int16
    states = h0.new_empty((steps + 2, batch, lanes * hidden) if interleaved else (lanes, steps + 1, batch, hidden))
    bits = states.view(integer)
    bits.fill_(-1)
    # The pattern itself, should it be in h0, becomes the NaN next to it.
    h0 = h0.contiguous().view(integer)
    h0 = torch.where(h0 == -1, -2, h0)
    if interleaved:
        bits[0, :, :hidden] = h0[0]
        bits[-1, :, hidden:] = h0[1]
    else:
        bits[:, 0] = h0
    return states


def most_registers(num_warps: int) -> int:
    """Registers of a thread when a program has the multiprocessor to itself.

    Left alone, the assembler aims at several programs each and spills for it: 1.7 KB at 48 registers, seen with Triton 3.6.
    """
    return min(255, 65536 // (32 * num_warps))


def wavefront_launch(
    gi: Tensor,
    states: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    bias: Tensor,
    gates: Tensor | None,
    error: Tensor,
    *,
    plan: WavefrontPlan,
    timeout_ns: int = 10_000_000_000,
) -> tuple[tuple[int], dict]:
    """Grid and arguments of ``wavefront_kernel``.

    gi: [T, B, 3H] of the lowest layer, or [T, B, 6H] of both directions, in the dtype of the states.
    states: of ``prepare_states``.  w_ih: [lanes-1, 3H, H] of a stack.  w_hh: [lanes, 3H, H].  bias: of ``pack_bias``.
    gates: [lanes, T, B, 4, H] or None.  error: int32, 0; not 0 afterwards if a wait ran out.
    H is a multiple of 16.
    """
    lanes, hidden = w_hh.shape[0], w_hh.shape[2]
    steps, batch = gi.shape[:2]
    reverse = states.dim() == 3
    stack = lanes > 1 and not reverse
    assert hidden % 16 == 0  # rows are read in vectors, also those of the second lane
    assert gi.is_contiguous() and states.is_contiguous() and w_hh.is_contiguous()
    row_h = states.shape[-1]
    arguments = dict(
        p_gi=gi, p_h=states, p_w_ih=w_hh if w_ih is None else w_ih, p_w_hh=w_hh, p_bias=bias,
        p_gates=states if gates is None else gates, p_error=error,
        T=steps, B=batch, PROGRAMS_B=-(-batch // (plan.rows * plan.tiles)),
        # where the second lane starts
        stride_gl=3 * hidden + (steps - 1) * batch * gi.shape[2],
        stride_gt=batch * gi.shape[2],
        stride_hl=hidden + (steps + 1) * batch * row_h if reverse else (steps + 1) * batch * row_h,
        stride_ht=batch * row_h,
        stride_sl=((2 * steps - 1) if reverse else steps) * batch * 4 * hidden,
        H=hidden, ROW_G=gi.shape[2], ROW_H=row_h,
        U=plan.units, N=plan.rows, TILES=plan.tiles,
        KX=plan.input_slices if stack else 0, KH=plan.slices, MS=plan.unit_warps,
        STACK=stack, REVERSE=reverse, SAVE_GATES=gates is not None,
        EARLY=plan.early, STORE_FIRST=plan.store_first, SHARE_N=plan.share_n, AHEAD=plan.ahead, TIMEOUT=timeout_ns,
        num_warps=plan.num_warps, maxnreg=most_registers(plan.num_warps), launch_cooperative_grid=True,
    )  # fmt: skip
    return (plan.programs(lanes, batch, hidden),), arguments
