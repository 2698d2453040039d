"""The Triton kernels behind the ops: allocation, layers, and the matrix products around the kernels.

Every product over all time steps (input projection, gradients of inputs and weights) is PyTorch's
own; the kernels do what depends on the step before.

The backward has to know what made the reserve: cuDNN's is its own, all others hold the same gates.  The plan is a function of
the call, of the GPU and of settings (TORCH_GRU_FUSE_KERNELS, torch.backends.cudnn.enabled, TF32); so that settings may
change between the two, the forward keeps its plan beside the storage of the reserve.  Only where that storage was
copied in between (offloaded, or replayed from a CUDA graph that torch.compile recorded) the plan is made anew.
"""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_gru_fuse import torch_hooks
from torch_gru_fuse.kernels.cell import cell_backward, cell_forward, cell_gates
from torch_gru_fuse.kernels.launch import DoesNotFit
from torch_gru_fuse.kernels.step import sequence_backward, sequence_forward
from torch_gru_fuse.kernels.stream import stream_forward
from torch_gru_fuse.ops import cudnn_path, ready_calls, torch_path, whole_backward, whole_path
from torch_gru_fuse.ops.call import GRUCall
from torch_gru_fuse.ops.schemas import empty_cell_results
from torch_gru_fuse.ops.support import gpu_of, why_not_kernels
from torch_gru_fuse.planner.plan import Plan, choice, plan_gru, plan_gru_cell
from torch_gru_fuse.planner.tiles import POINTWISE_TILE

if TYPE_CHECKING:
    from types import ModuleType

    from torch_gru_fuse.planner.whole_sequence import WholeSequencePlan

log = logging.getLogger("torch_gru_fuse")

#: Whole-sequence plans that a GPU could not run, although by its description it can: parts of it were taken (MPS, others).
_refused: dict[tuple[int, WholeSequencePlan], str] = {}
#: The same of backwards.
_refused_backward: dict[tuple[int, WholeSequencePlan], str] = {}
#: Plan and path of the forward that made a reserve.
_made_by = torch_hooks.StorageTable()


_plans: dict[tuple, Plan] = {}
#: What has been asked for, but for whether it was captured, where only a CUDA graph takes whole sequences, and where these have
#: run once by themselves: code is compiled and loaded then, which a capture does not allow.
_warmed: set[tuple] = set()


def plan_of(call: GRUCall, *, training: bool) -> Plan:
    x = call.input
    captured = x.is_cuda and torch.cuda.is_current_stream_capturing()
    key = _key(call, training)
    plan = _planned(call, key, training, captured)
    if captured and plan.kernel == "whole" and key not in _warmed:
        by_itself = _planned(call, key, training, False)
        if by_itself.kernel != "whole":
            plan = by_itself
    if _refused and plan.kernel == "whole":
        plan = _instead(call, plan, training)
    if log.isEnabledFor(logging.DEBUG):
        log.debug("gru T=%d B=%d I=%d H=%d: %s, %s", *x.shape, call.H, plan.kernel, plan.reason)
    return plan


def plan_uncaptured(call: GRUCall, *, training: bool) -> Plan:
    """The plan of a call that no CUDA graph captures, from sizes alone: the tensors may be fake."""
    return _planned(call, _key(call, training), training, False)


def _first_of_its_kind(call: GRUCall, training: bool) -> Plan | None:
    """The plan for a CUDA graph, once, where a call that comes before a capture would take another."""
    if not call.input.is_cuda or torch.cuda.is_current_stream_capturing():
        return None
    key = _key(call, training)
    if key in _warmed:
        return None
    plan = _planned(call, key, training, True)
    if plan.kernel != "whole" or (call.input.get_device(), plan.whole) in _refused:
        return None
    if len(_warmed) >= 4096:
        _warmed.clear()
    _warmed.add(key)
    return plan


def _key(call: GRUCall, training: bool) -> tuple:
    """All that a plan depends on, but for whether the call is captured."""
    x = call.input
    tf32_allowed = x.dtype == torch.float32 and torch_hooks.rnn_allows_tf32()
    return (
        x.shape, call.hx.shape, x.dtype, x.get_device(), call.bidirectional, training, tf32_allowed, torch_hooks.cudnn_runs(x),
        call.dropout_masks is not None, choice(), os.environ.get("TORCH_GRU_FUSE_GPU"),
    )  # fmt: skip


def _planned(call: GRUCall, key: tuple, training: bool, captured: bool) -> Plan:
    plan = _plans.get((key, captured))
    if plan is None:
        x = call.input
        _, _, dtype, device, _, _, tf32_allowed, cudnn, dropout, *_ = key
        unsupported = why_not_kernels(x)
        plan = plan_gru(
            *x.shape, call.H, call.L, call.D, str(dtype), tf32_allowed=tf32_allowed, training=training, cudnn=cudnn,
            unsupported=unsupported, gpu=gpu_of(device) if unsupported is None else None, dropout=dropout, captured=captured,
        )  # fmt: skip
        if len(_plans) >= 4096:
            _plans.clear()
        _plans[key, captured] = plan
    return plan


def _instead(call: GRUCall, plan: Plan, training: bool) -> Plan:
    """What runs where the GPU could not run a plan for whole sequences; the plan itself where it can."""
    reason = _refused.get((call.input.get_device(), plan.whole))
    if reason is None:
        return plan
    if training or not torch_hooks.cudnn_runs(call.input):  # the step kernels leave the same reserve
        return replace(plan, kernel="step", whole=None, reason=reason)
    return replace(plan, kernel="torch", tile=None, whole=None, reason=reason)


def _refuse(call: GRUCall, plan: Plan, error: DoesNotFit) -> None:
    """Remembers and says, once, that a GPU could not run a plan."""
    device = call.input.get_device()
    reason = f"{error} (cuda:{device}, {plan.whole})"
    if (device, plan.whole) not in _refused:
        log.warning("torch_gru_fuse.gru: whole sequences in one launch do not fit, another kernel runs: %s", reason)
    _refused[device, plan.whole] = reason
    ready_calls.forget()


def _parameters(call: GRUCall, layer: int) -> tuple[list[Tensor] | None, ...]:
    """w_ih, w_hh, b_ih, b_hh of a layer, each a list with one tensor a direction, or None for absent biases."""
    states = [call.parameters(layer * call.D + d) for d in range(call.D)]
    return tuple(None if kind[0] is None else list(kind) for kind in zip(*states, strict=True))


def _products(plan: Plan, dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """PyTorch's matrix products in the precision of the plan; only float32 has a choice."""
    return torch_hooks.matmul_tf32(plan.tf32) if dtype == torch.float32 else contextlib.nullcontext()


def _input_projection(rows: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = rows @ weight^T, float32 whatever the dtype: rounding it would be one rounding more than cuDNN makes."""
    torch.mm(rows, weight.t(), out_dtype=torch.float32, out=out)


def gru_forward(call: GRUCall, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    if call.B == 0:
        return call.empty_results(save)
    plan = plan_of(call, training=save)
    if plan.kernel == "torch":
        plan = _first_of_its_kind(call, save) or plan
    if plan.kernel == "stream":
        return _stream_forward(call, plan)
    if plan.kernel == "whole":
        try:
            return _remember(whole_path.gru_forward(call, save, plan), save, plan, None)
        except DoesNotFit as error:
            _refuse(call, plan, error)
            plan = _instead(call, plan, save)
    if plan.kernel == "torch":
        path = cudnn_path if save and torch_hooks.cudnn_runs(call.input) else torch_path
        return _remember(path.gru_forward(call, save), save, plan, path)
    return _remember(_step_forward(call, save, plan), save, plan, None)


def _remember(
    results: tuple[Tensor, Tensor, Tensor], save: bool, plan: Plan, path: ModuleType | None
) -> tuple[Tensor, Tensor, Tensor]:
    if save:
        _made_by.put(results[2], (plan, path))
    return results


def _stream_forward(call: GRUCall, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """One time step, one launch a layer."""
    output, h_n, reserve = call.empty_results(False)
    each = 4 if call.has_biases else 2
    params = [p.contiguous() for p in call.params]
    b_ih, b_hh = (params[2::4], params[3::4]) if call.has_biases else (None, None)
    stream_forward(
        call.input[0].contiguous(), call.hx.contiguous(), params[::each], params[1::each], b_ih, b_hh, output, h_n,
        plan=plan.stream,
    )  # fmt: skip
    return output, h_n, reserve


def _step_forward(call: GRUCall, save: bool, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """One launch a time step and layer."""
    T, B, H, D = call.T, call.B, call.H, call.D
    output, h_n, reserve = call.empty_results(save)
    if save:
        layer_outputs, gates = call.saved_gates(reserve)

    x = call.input
    for layer in range(call.L):
        w_ih, w_hh, b_ih, b_hh = _parameters(call, layer)
        last = layer == call.L - 1
        if last:
            out = output
        else:
            out = layer_outputs[layer] if save else torch.empty_like(output)
        gi = x.new_empty(D, T, B, 3 * H, dtype=torch.float32)
        rows = x.reshape(T * B, x.shape[2])
        with _products(plan, x.dtype):
            for d in range(D):
                _input_projection(rows, w_ih[d], gi[d].view(T * B, 3 * H))
        sequence_forward(
            gi, call.hx[call.states(layer)], w_hh, b_ih, b_hh, out, gates[layer] if save else None,
            tile=plan.tile, tf32=plan.tf32,
        )  # fmt: skip
        h_n[layer * D] = out[-1, :, :H]
        if D == 2:
            h_n[layer * D + 1] = out[0, :, H:]
        if not last:
            x = call.mask(out, layer)
    return output, h_n, reserve


def gru_backward(
    call: GRUCall,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    output: Tensor,
    reserve: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    T, B, H, D = call.T, call.B, call.H, call.D
    if B == 0:
        return [t.new_zeros(t.shape) for t, need in zip(call.tensors, needs, strict=True) if need]
    made_by = _made_by.get(reserve)
    if made_by is not None:
        plan, path = made_by
    else:
        plan = plan_of(call, training=True)
        path = None
        if plan.kernel == "torch":
            path = cudnn_path if torch_hooks.cudnn_runs(call.input) else torch_path
    if path is not None:
        return path.gru_backward(call, grad_output, grad_h_n, output, reserve, needs)
    layer_outputs, gates = call.saved_gates(reserve)
    need_input, _, *need_params = needs
    d_gates = torch.empty_like(gates)
    grad_hx = call.hx.new_empty(call.hx.shape)
    grad_params: list[Tensor | None] = [None] * len(call.params)

    grad, top = grad_output, call.L - 1
    while top >= 0:
        layers, sums = _gate_gradients(call, plan, top, grad, grad_h_n, output, layer_outputs, gates, d_gates, grad_hx)
        for layer in range(top, top - layers, -1):
            out = output if layer == call.L - 1 else layer_outputs[layer]
            x = call.layer_input(layer, layer_outputs)
            rows = x.reshape(T * B, x.shape[2])
            with _products(plan, x.dtype):
                for d in range(D):
                    state = layer * D + d
                    places = call.places(state)
                    d_rows = d_gates[layer, d].view(T * B, 4 * H)
                    sums_d = None if sums is None else sums[layer - top + layers - 1, d]
                    grad_params[places] = _parameter_grads(
                        d_rows, rows, call.hx[state], out, d, sums_d, need_params[places]
                    )
        top -= layers
        grad = None
        if top >= 0 or need_input:
            with _products(plan, output.dtype):
                for d in range(D):
                    w_ih = call.parameters((top + 1) * D + d)[0]
                    d_input = d_gates[top + 1, d].view(T * B, 4 * H)[:, H:]  # reset, update, candidate
                    grad = torch.mm(d_input, w_ih) if grad is None else grad.addmm_(d_input, w_ih)
            grad = grad.view(T, B, -1)
            if top >= 0:
                grad = call.mask(grad, top)
    return [g for g, need in zip([grad, grad_hx, *grad_params], needs, strict=True) if need]


def _gate_gradients(
    call: GRUCall, plan: Plan, top: int, grad: Tensor | None, grad_h_n: Tensor | None, output: Tensor, layer_outputs: Tensor,
    gates: Tensor, d_gates: Tensor, grad_hx: Tensor,
) -> tuple[int, Tensor | None]:  # fmt: skip
    """Of the layers from ``top`` down that one launch takes: how many they are, and the sums [layers, D, 4, H] of d_gates."""
    out = output if top == call.L - 1 else layer_outputs[top]
    whole, device = plan.backward, call.input.get_device()
    if whole is not None and (device, whole) not in _refused_backward:
        layers = whole.lanes // call.D
        try:
            sums = whole_backward.gate_gradients(
                call, whole, top - layers + 1, grad, grad_h_n, out, layer_outputs, gates, d_gates, grad_hx
            )
            return layers, sums.unflatten(0, (layers, call.D))
        except DoesNotFit as error:
            reason = _refused_backward[device, whole] = f"{error} (cuda:{device}, {whole})"
            log.warning(
                "torch_gru_fuse.gru: the backward of whole sequences in one launch does not fit, one launch a step runs: %s",
                reason,
            )
    states = call.states(top)
    w_hh = _parameters(call, top)[1]
    sequence_backward(
        grad, None if grad_h_n is None else grad_h_n[states], out, call.hx[states], w_hh,
        gates[top], d_gates[top], grad_hx[states], tile=plan.backward_tile, tf32=plan.tf32,
    )  # fmt: skip
    return 1, None


def _parameter_grads(
    d_rows: Tensor, rows: Tensor, h0: Tensor, out: Tensor, direction: int, sums: Tensor | None, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of w_ih, w_hh (, b_ih, b_hh) from d_rows [T*B, 4H], of (hn, r, z, n), and its sums [4, H] if known."""
    T, B = out.shape[:2]
    H = h0.shape[1]
    d_input, d_hidden = d_rows[:, H:], d_rows[:, : 3 * H]
    grads: list[Tensor | None] = [d_input.t() @ rows if needs[0] else None, None]
    if needs[1]:
        columns = out[:, :, direction * H : (direction + 1) * H]
        grads[1] = _hidden_weight_grad(d_hidden, h0, columns, backwards=direction == 1)
    if len(needs) == 4:
        if sums is None and any(needs[2:]):
            sums = d_rows.sum(0).view(4, H)  # accumulated in float32 by torch.sum
        grads.append(sums[1:].flatten().to(out.dtype, copy=True) if needs[2] else None)
        grads.append(_unrotate(sums[:3].flatten()).to(out.dtype) if needs[3] else None)
    return grads


def _hidden_weight_grad(d_hidden: Tensor, h0: Tensor, states: Tensor, *, backwards: bool) -> Tensor:
    """Gradient of w_hh [3H, H] from d_hidden [T*B, 3H], of (hn, r, z), h0 [B, H] and the states after the steps [T, B, H]."""
    T, B, H = states.shape
    before = states[1:] if backwards else states[:-1]  # but for the first step, before which there is h0
    if T * B <= 3 * H:  # copying the states is cheaper than going over the result twice more
        before = torch.cat((before, h0[None]) if backwards else (h0[None], before)).view(T * B, H)
        grad = h0.new_empty(3 * H, H)
        torch.mm(d_hidden[:, H:].t(), before, out=grad[: 2 * H])
        torch.mm(d_hidden[:, :H].t(), before, out=grad[2 * H :])
        return grad
    first, others = (d_hidden[-B:], d_hidden[:-B]) if backwards else (d_hidden[:B], d_hidden[B:])
    grad = first.t() @ h0
    return _unrotate(grad.addmm_(others.t(), before.flatten(0, 1)))


def _unrotate(d_hidden: Tensor) -> Tensor:
    """Rows of gates (hn, r, z) in the order of the weights (r, z, hn); always a copy."""
    return d_hidden.roll(-(d_hidden.shape[0] // 3), 0)


def gru_cell_forward(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, save: bool
) -> tuple[Tensor, Tensor]:
    plan = plan_gru_cell(
        input.shape[0], input.shape[1], hx.shape[1], str(input.dtype),
        tf32_allowed=torch_hooks.matmul_allows_tf32(), training=save, unsupported=why_not_kernels(input),
    )  # fmt: skip
    if plan.kernel == "torch" or (plan.kernel == "gates" and not save):
        return torch_path.gru_cell_forward(input, hx, w_ih, w_hh, b_ih, b_hh, save)
    h, gates = empty_cell_results(hx, save)
    saved = gates if save else None
    if h.numel() == 0:
        return h, gates
    if plan.kernel == "gates":
        cell_gates(input @ w_ih.t(), hx @ w_hh.t(), hx, b_ih, b_hh, h, saved, tile=plan.tile)
    else:
        cell_forward(input, hx, w_ih, w_hh, b_ih, b_hh, h, saved, tile=plan.tile, tf32=plan.tf32)
    return h, gates


def gru_cell_backward(
    grad_h: Tensor,
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    gates: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    B, H = hx.shape
    if why_not_kernels(input):
        return torch_path.gru_cell_backward(grad_h, input, hx, w_ih, w_hh, b_ih, b_hh, gates, needs)
    if B == 0:
        tensors = (input, hx, w_ih, w_hh, b_ih, b_hh)
        return [t.new_zeros(t.shape) for t, need in zip(tensors, needs, strict=True) if need]
    d_gates, grad_hx = torch.empty_like(gates), hx.new_empty(hx.shape)
    cell_backward(grad_h, hx, gates, d_gates, grad_hx, tile=POINTWISE_TILE)
    d_rows = d_gates.view(B, 4 * H)
    d_input, d_hidden = d_rows[:, H:], d_rows[:, : 3 * H]
    sums = d_rows.sum(0) if needs[4] or needs[5] else None
    grads = [
        (lambda: d_input @ w_ih),
        (lambda: grad_hx.addmm_(d_hidden, w_hh.roll(H, 0))),
        (lambda: d_input.t() @ input),
        (lambda: _unrotate(d_hidden.t() @ hx)),
        (lambda: sums[H:].clone()),
        (lambda: _unrotate(sums[: 3 * H])),
    ]
    return [grad() for grad, need in zip(grads, needs, strict=True) if need]
