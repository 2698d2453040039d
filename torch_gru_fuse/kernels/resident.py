"""Whole sequences of small GRU layers in one launch: a program holds all weights of a lane and does all T steps of its rows.

No state crosses between programs of a layer: a step hands h over in shared memory, behind one barrier.  Layers of a stack run
one behind the other as in ``wavefront``, whose hand-over brings h_t of the layer below as x; nobody waits for it on the way
back, so it costs no latency but that of the first step.

Names as in ``wavefront``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .wavefront import (
    barrier,
    dot,
    issue,
    most_registers,
    pack_bias,
    prepare_states,
    round_operand,
    settle,
    sigmoid,
    tanh,
    wavefront_kernel,
    wavefront_launch,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..planner.whole_sequence import ResidentPlan, WavefrontPlan, WholeSequencePlan


# Called async_copy_global_to_shared up to Triton 3.7.
async_load = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared


@gluon.jit
def load_weights(p_w, H: gl.constexpr, U: gl.constexpr, layout: gl.constexpr):
    """A gate's W [H, H], padded to [U, U] with zeros."""
    o_u = gl.expand_dims(gl.arange(0, U, gl.SliceLayout(1, layout)), 1)
    o_k = gl.expand_dims(gl.arange(0, U, gl.SliceLayout(0, layout)), 0)
    return round_operand(gl.load(p_w + o_u * H + o_k, mask=(o_u < H) & (o_k < H), other=0.0))


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


@gluon.jit(do_not_specialize=["T", "B", "PROGRAMS_B"])
def resident_kernel(
    p_gi, p_h, p_w_ih, p_w_hh, p_bias,
    p_gates, p_error,
    T, B, PROGRAMS_B,
    stride_gl, stride_gt, stride_hl, stride_ht, stride_sl,
    H: gl.constexpr, ROW_G: gl.constexpr, ROW_H: gl.constexpr,
    U: gl.constexpr, N: gl.constexpr,
    STACK: gl.constexpr, REVERSE: gl.constexpr, SAVE_GATES: gl.constexpr,
    EARLY: gl.constexpr, TIMEOUT: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """All T steps of one lane for N batch rows; equations, arguments and what is saved are those of ``wavefront_kernel``.

    Each warp makes r, z and n of 16 (or more) units from all of h, so the gates of a unit meet in one thread.  gi comes by
    asynchronous copies three steps ahead; h_t leaves, in vectors, during the step after it.  EARLY: reads x of the next step
    before this step's recurrence.

    Bytes a step: gi 3NH read, h NH written, gates 4NH written if SAVE_GATES, and x NH for each warp of a higher layer.
    Bound by latency: shared memory, a chain of H products, four special functions, a barrier.
    """
    dtype: gl.constexpr = p_h.dtype.element_ty
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
    i_b = pid % PROGRAMS_B
    l = pid // PROGRAMS_B
    sign = 1
    if REVERSE:
        sign = 1 - 2 * l
    p_h += l * stride_hl
    stride_ht *= sign
    if not STACK:
        p_gi += l * stride_gl
    stride_gt *= sign

    p_w = p_w_hh + l * (3 * H * H)
    b_wr = load_weights(p_w, H, U, left_h)
    b_wz = load_weights(p_w + H * H, H, U, left_h)
    b_wn = load_weights(p_w + 2 * H * H, H, U, left_h)

    # Gates [units, batch].
    o_u = gl.expand_dims(gl.arange(0, U, gl.SliceLayout(1, mma)), 1)
    o_b = i_b * N + gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, mma)), 0)
    m_u = o_u < H
    m = m_u & (o_b < B)
    zero = gl.zeros([U, N], gl.float32, mma)
    p_bias += l * (4 * H) + o_u
    b_bias_hn = gl.load(p_bias + 3 * H, mask=m_u, other=0.0) + zero
    b_h0 = gl.load(p_h + o_b * ROW_H + o_u, mask=m, other=0.0)
    b_h = b_h0.to(gl.float32)
    s_h0 = gl.allocate_shared_memory(dtype, [N, U], swizzled)
    s_h1 = gl.allocate_shared_memory(dtype, [N, U], swizzled)
    s_hs = (s_h0, s_h1)
    s_h0.permute([1, 0]).store(b_h.to(dtype))
    p_save = p_gates
    stride_st = B * (4 * H) * sign
    if SAVE_GATES:
        p_save = p_gates + l * stride_sl + o_b * (4 * H) + o_u

    # Vectors [batch, units] to and from global memory.
    o_cu = gl.expand_dims(gl.arange(0, U, gl.SliceLayout(0, copy)), 0)
    o_cb = i_b * N + gl.expand_dims(gl.arange(0, N, gl.SliceLayout(1, copy)), 1)
    m_c = (o_cu < H) & (o_cb < B)
    p_out = p_h + o_cb * ROW_H + o_cu

    if STACK and l > 0:
        p_v = p_w_ih + (l - 1) * (3 * H * H)
        b_vr = load_weights(p_v, H, U, left_x)
        b_vz = load_weights(p_v + H * H, H, U, left_x)
        b_vn = load_weights(p_v + 2 * H * H, H, U, left_x)
        b_bias_r = gl.load(p_bias, mask=m_u, other=0.0) + zero
        b_bias_z = gl.load(p_bias + H, mask=m_u, other=0.0) + zero
        b_bias_n = gl.load(p_bias + 2 * H, mask=m_u, other=0.0) + zero
        o_k = gl.expand_dims(gl.arange(0, U, gl.SliceLayout(1, right_x)), 1)
        o_k = gl.where(o_k < H, o_k, o_k % KW)
        o_n = i_b * N + gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, right_x)), 0)
        p_x = p_h - stride_hl + stride_ht + o_k + gl.minimum(o_n, B - 1) * ROW_H
        b_x = issue(p_x, PACK // KW, 1, KW * BYTES, PACK)
        for t in range(0, T, 2):
            for i in gl.static_range(2):
                if t + i < T:
                    b_x = settle(b_x, p_x, p_error, PACK // KW, 1, KW * BYTES, PACK, TIMEOUT)
                    b_ar = dot(b_vr, b_x, b_bias_r)
                    b_az = dot(b_vz, b_x, b_bias_z)
                    b_an = dot(b_vn, b_x, b_bias_n)
                    p_x += gl.where(t + i + 1 < T, stride_ht, 0)
                    if EARLY:
                        b_x = issue(p_x, PACK // KW, 1, KW * BYTES, PACK)
                    b_t = round_operand(s_hs[i].permute([1, 0]).load(right_h))
                    b_r = sigmoid(dot(b_wr, b_t, b_ar))
                    b_hn = dot(b_wn, b_t, b_bias_hn)
                    b_z = sigmoid(dot(b_wz, b_t, b_az))
                    b_n = tanh(b_an + b_r * b_hn)
                    b_h = b_n + b_z * (b_h - b_n)
                    b_h = gl.where(b_h == b_h, b_h, float("nan"))
                    s_hs[1 - i].permute([1, 0]).store(b_h.to(dtype))
                    gl.store(p_out, s_hs[i].load(copy), mask=m_c)  # the state before this step
                    p_out += stride_ht
                    if SAVE_GATES:
                        save_step(p_save, b_r, b_z, b_n, b_hn, m, dtype, H)
                        p_save += stride_st
                    if not EARLY:
                        b_x = issue(p_x, PACK // KW, 1, KW * BYTES, PACK)
    else:
        s_gi0 = allocate_gi(dtype, U, N, swizzled)
        s_gi1 = allocate_gi(dtype, U, N, swizzled)
        s_gi2 = allocate_gi(dtype, U, N, swizzled)
        s_gi3 = allocate_gi(dtype, U, N, swizzled)
        s_gis = (s_gi0, s_gi1, s_gi2, s_gi3)
        p_g = p_gi + o_cb * ROW_G + o_cu
        for i in gl.static_range(3):
            fetch(s_gis[i], p_g, m_c & (i < T), H)
            p_g += stride_gt
        for t in range(0, T, 4):
            for i in gl.static_range(4):
                if t + i < T:
                    async_copy.wait_group(2)
                    barrier()  # gi of this step and h before it are there, gi of the step before has been read
                    fetch(s_gis[(i + 3) % 4], p_g, m_c & (t + i + 3 < T), H)
                    p_g += stride_gt
                    b_t = round_operand(s_hs[i % 2].permute([1, 0]).load(right_h))
                    b_ar = dot(b_wr, b_t, zero)
                    b_hn = dot(b_wn, b_t, b_bias_hn)
                    b_az = dot(b_wz, b_t, zero)
                    b_r = sigmoid(b_ar + s_gis[i][0].permute([1, 0]).load(mma).to(gl.float32))
                    b_z = sigmoid(b_az + s_gis[i][1].permute([1, 0]).load(mma).to(gl.float32))
                    b_n = tanh(s_gis[i][2].permute([1, 0]).load(mma).to(gl.float32) + b_r * b_hn)
                    b_h = b_n + b_z * (b_h - b_n)
                    b_h = gl.where(b_h == b_h, b_h, float("nan"))
                    s_hs[1 - i % 2].permute([1, 0]).store(b_h.to(dtype))
                    gl.store(p_out, s_hs[i % 2].load(copy), mask=m_c)  # the state before this step
                    p_out += stride_ht
                    if SAVE_GATES:
                        save_step(p_save, b_r, b_z, b_n, b_hn, m, dtype, H)
                        p_save += stride_st
        async_copy.wait_group(0)
    barrier()
    if T % 2 == 0:
        gl.store(p_out, s_h0.load(copy), mask=m_c)
    else:
        gl.store(p_out, s_h1.load(copy), mask=m_c)


def resident_launch(
    gi: Tensor,
    states: Tensor,
    w_ih: Tensor | None,
    w_hh: Tensor,
    bias: Tensor,
    gates: Tensor | None,
    error: Tensor,
    *,
    plan: ResidentPlan,
    timeout_ns: int = 10_000_000_000,
) -> tuple[tuple[int], dict]:
    """Grid and arguments of ``resident_kernel``; the tensors are those of ``wavefront_launch``.

    The states are filled with the pattern only for a stack: nothing else is waited for.
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
        T=steps, B=batch, PROGRAMS_B=-(-batch // plan.rows),
        stride_gl=3 * hidden + (steps - 1) * batch * gi.shape[2],
        stride_gt=batch * gi.shape[2],
        stride_hl=hidden + (steps + 1) * batch * row_h if reverse else (steps + 1) * batch * row_h,
        stride_ht=batch * row_h,
        stride_sl=((2 * steps - 1) if reverse else steps) * batch * 4 * hidden,
        H=hidden, ROW_G=gi.shape[2], ROW_H=row_h,
        U=plan.units, N=plan.rows,
        STACK=stack, REVERSE=reverse, SAVE_GATES=gates is not None,
        EARLY=plan.early, TIMEOUT=timeout_ns,
        num_warps=plan.num_warps, maxnreg=most_registers(plan.num_warps), launch_cooperative_grid=stack,
    )  # fmt: skip
    return (plan.programs(lanes, batch),), arguments


def launch(gi, states, w_ih, w_hh, bias, gates, error, *, plan: WavefrontPlan | ResidentPlan) -> None:
    """Runs the kernel of the plan; arguments as for ``wavefront_launch``."""
    if plan.name == "resident":
        grid, arguments = resident_launch(gi, states, w_ih, w_hh, bias, gates, error, plan=plan)
        resident_kernel[grid](**arguments)
    else:
        grid, arguments = wavefront_launch(gi, states, w_ih, w_hh, bias, gates, error, plan=plan)
        wavefront_kernel[grid](**arguments)


def _pad_gates(weight: Tensor, hidden: int, padded: int, *, columns: bool) -> Tensor:
    """Rows of each gate, and, if they are hidden units, columns, from ``hidden`` to ``padded`` with zeros."""
    if hidden == padded:
        return weight
    extra = padded - hidden
    weight = weight.unflatten(0, (-1, hidden))
    weight = pad(weight, (0, extra if columns else 0, 0, extra)) if weight.dim() == 3 else pad(weight, (0, extra))
    return weight.flatten(0, 1)


@dataclass(frozen=True)
class PackedLaunch:
    """Parameters of the lanes of one launch, padded to ``hidden`` units, as the kernels want them.

    It depends on nothing else, so it can be kept from call to call where parameters do not change.
    """

    hidden: int
    w_x: Tensor  # [3H or 6H, inputs]: input projection made by a matrix product
    b_x: Tensor  # [3H or 6H]
    w_ih: Tensor | None  # [lanes - 1, 3H, H]: those made by the kernel
    w_hh: Tensor  # [lanes, 3H, H]
    bias: Tensor  # [lanes, 4H]


def pack_parameters(
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    b_ih: Sequence[Tensor] | None,
    b_hh: Sequence[Tensor] | None,
    *,
    bidirectional: bool,
    plan: WholeSequencePlan,
) -> list[PackedLaunch]:
    """One entry a launch, from parameters in ``torch.nn.GRU``'s order."""
    hidden = w_hh[0].shape[1]
    padded = -(-hidden // 16) * 16
    own = 2 if bidirectional else 1  # lanes of a launch whose input projection is not the kernel's
    packed = []
    for first in range(0, len(w_hh), plan.lanes):
        lanes = slice(first, first + plan.lanes)
        biases = [
            None if b is None else torch.stack([_pad_gates(row, hidden, padded, columns=False) for row in b[lanes]])
            for b in (b_ih, b_hh)
        ]
        bias = pack_bias(*biases, lanes=plan.lanes, hidden=padded, like=w_hh[0])
        above = [_pad_gates(w, hidden, padded, columns=True) for w in w_ih[lanes][own:]]
        packed.append(
            PackedLaunch(
                hidden=padded,
                w_x=torch.cat([_pad_gates(w, hidden, padded, columns=False) for w in w_ih[lanes][:own]]),
                b_x=bias[:own, : 3 * padded].reshape(-1).to(w_hh[0].dtype),
                w_ih=torch.stack(above) if above else None,
                w_hh=torch.stack([_pad_gates(w, hidden, padded, columns=True) for w in w_hh[lanes]]),
                bias=bias,
            )
        )
    return packed


def whole_sequence_forward(
    x: Tensor,
    h0: Tensor,
    packed: Sequence[PackedLaunch],
    *,
    bidirectional: bool,
    plan: WholeSequencePlan,
    save_gates: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """A GRU over x [T, B, inputs] from h0 [layers * directions, B, H], all of one dtype.

    Returns out [T, B, directions * H], h_n like h0, the saved gates [lanes, T, B, 4, H'] of each launch (r, z, n, hn; H' is H
    rounded up to a multiple of 16; none if not save_gates), and the error word [1], not 0 if a wait ran out: whoever reads the
    results must look at it.  out may be a view into a larger tensor.
    """
    steps, batch = x.shape[:2]
    hidden, padded = h0.shape[2], packed[0].hidden
    error = torch.zeros(1, dtype=torch.int32, device=x.device)
    h0 = pad(h0, (0, padded - hidden)) if padded != hidden else h0
    out, last, saved = x, [], []
    for i, part in enumerate(packed):
        gi = torch.addmm(part.b_x, out.reshape(steps * batch, -1), part.w_x.t()).view(steps, batch, -1)
        # after the product: what it writes would push the fresh states out of L2
        states = prepare_states(h0[i * plan.lanes : (i + 1) * plan.lanes], steps, interleaved=bidirectional)
        gates = x.new_empty(plan.lanes, steps, batch, 4, padded) if save_gates else None
        launch(gi, states, part.w_ih, part.w_hh, part.bias, gates, error, plan=plan.kernel)
        if bidirectional:
            out = states[1:-1]
            if padded != hidden:
                out = out.unflatten(2, (2, padded))[..., :hidden].flatten(2)
            last.append(torch.stack([states[-2, :, :hidden], states[1, :, padded : padded + hidden]]))
        else:
            out = states[-1, 1:, :, :hidden]
            last.append(states[:, -1, :, :hidden])
        if gates is not None:
            saved.append(gates)
    return out, torch.cat(last), saved, error
