"""The Triton kernels behind the ops: allocation, layers, and the matrix products around the kernels.

Every product over all time steps (input projection, gradients of inputs and weights) is PyTorch's
own; the kernels do what depends on the step before.

The backward has to know what made the reserve: cuDNN's is its own, all others hold the same gates.  The plan is a function of
the call, of the GPU and of settings (TORCH_GRU_FUSE_KERNELS, torch.backends.cudnn.enabled, TF32); so that settings may
change between the two, the forward keeps its plan beside the storage of the reserve.  Only where that storage was
copied in between (offloaded, or replayed from a CUDA graph that torch.compile recorded) the plan is made anew.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_gru_fuse import torch_hooks
from torch_gru_fuse.kernels.cell import cell_backward, cell_forward, cell_gates
from torch_gru_fuse.kernels.launch import DoesNotFit
from torch_gru_fuse.kernels.step import sequence_forward
from torch_gru_fuse.kernels.stream import stream_forward
from torch_gru_fuse.ops import cudnn_path, ready_calls, torch_path, two_calls, whole_path
from torch_gru_fuse.ops.call import GRUCall, PairCall
from torch_gru_fuse.ops.schemas import empty_cell_results
from torch_gru_fuse.ops.support import gpu_of, why_not_kernels
from torch_gru_fuse.planner.plan import Plan, choice, plan_gru, plan_gru_cell, plan_gru_pair
from torch_gru_fuse.planner.tiles import POINTWISE_TILE

if TYPE_CHECKING:
    from types import ModuleType

    from torch_gru_fuse.planner.whole_sequence import WholeSequencePlan

log = logging.getLogger("torch_gru_fuse")

#: Whole-sequence plans that a GPU could not run, although by its description it can: parts of it were taken (MPS, others).
_refused: dict[tuple[int, WholeSequencePlan], str] = {}
#: Plan and path of the forward that made a reserve; of a pair its plan, or why there was none.
_made_by = torch_hooks.StorageTable()
_made_pair_by = torch_hooks.StorageTable()


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
        call.dropout_masks is not None, call.keep is not None, choice(), os.environ.get("TORCH_GRU_FUSE_GPU"),
    )  # fmt: skip


def _planned(call: GRUCall, key: tuple, training: bool, captured: bool) -> Plan:
    plan = _plans.get((key, captured))
    if plan is None:
        x = call.input
        _, _, dtype, device, _, _, tf32_allowed, cudnn, dropout, resets, *_ = key
        unsupported = why_not_kernels(x)
        plan = plan_gru(
            *x.shape, call.H, call.L, call.D, str(dtype), tf32_allowed=tf32_allowed, training=training, cudnn=cudnn,
            unsupported=unsupported, gpu=gpu_of(device) if unsupported is None else None, dropout=dropout, captured=captured,
            resets=resets,
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
    # the step kernels leave the same reserve, and know resets
    if training or call.keep is not None or not torch_hooks.cudnn_runs(call.input):
        return replace(plan, kernel="step", whole=None, reason=reason)
    return replace(plan, kernel="torch", tile=None, whole=None, reason=reason)


def _refuse(call: GRUCall | PairCall, plan: Plan, error: DoesNotFit) -> None:
    """Remembers and says, once, that a GPU could not run a plan."""
    device = call.input.get_device()
    reason = f"{error} (cuda:{device}, {plan.whole})"
    if (device, plan.whole) not in _refused:
        log.warning("torch_gru_fuse.gru: whole sequences in one launch do not fit, another kernel runs: %s", reason)
    _refused[device, plan.whole] = reason
    ready_calls.forget()


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
            return remember(whole_path.gru_forward(call, save, plan), save, plan, None)
        except DoesNotFit as error:
            _refuse(call, plan, error)
            plan = _instead(call, plan, save)
    if plan.kernel == "torch":
        path = _path_of_torch(call) if save else torch_path
        return remember(path.gru_forward(call, save), save, plan, path)
    return remember(_step_forward(call, save, plan), save, plan, None)


def load_ahead(call: GRUCall, save: bool) -> None:
    """Starts to compile what `gru_forward` will launch, while its caller does something else; the tensors may be fake."""
    plan = plan_uncaptured(call, training=save)
    if plan.kernel == "whole" and (call.input.get_device(), plan.whole) not in _refused:
        whole_path.load_ahead(call, save, plan)


def remember(
    results: tuple[Tensor, Tensor, Tensor], save: bool, plan: Plan, path: ModuleType | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps what made the reserve of these results, which are returned."""
    if save:
        _made_by.put(results[2], (plan, path))
    return results


def _path_of_torch(call: GRUCall) -> ModuleType:
    """PyTorch's own for training: cuDNN, which knows no resets, or its operations."""
    return cudnn_path if call.keep is None and torch_hooks.cudnn_runs(call.input) else torch_path


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
        w_ih, w_hh, b_ih, b_hh = call.layer_parameters(layer)
        last = layer == call.L - 1
        if last:
            out = output
        else:
            out = layer_outputs[layer] if save else torch.empty_like(output)
        gi = x.new_empty(D, T, B, 3 * H, dtype=torch.float32)
        rows = x.reshape(T * B, x.shape[2])
        with torch_hooks.products(x.dtype, tf32=plan.tf32):
            for d in range(D):
                _input_projection(rows, w_ih[d], gi[d].view(T * B, 3 * H))
        sequence_forward(
            gi, call.hx[call.states(layer)], w_hh, b_ih, b_hh, out, gates[layer] if save else None,
            tile=plan.tile, tf32=plan.tf32, keep=call.keep,
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
    if call.B == 0:
        return [t.new_zeros(t.shape) for t, need in zip(call.tensors, needs, strict=True) if need]
    made_by = _made_by.get(reserve)
    if made_by is not None:
        plan, path = made_by
    else:
        plan = plan_of(call, training=True)
        path = None
        if plan.kernel == "torch":
            path = _path_of_torch(call)
    if path is not None:
        return path.gru_backward(call, grad_output, grad_h_n, output, reserve, needs)
    return kernel_backward().gru_backward(call, plan, grad_output, grad_h_n, output, reserve, needs)


def kernel_backward() -> ModuleType:
    """The backward of the kernels, which inference does not import."""
    from torch_gru_fuse.ops import kernel_backward

    return kernel_backward


def plan_of_pair(call: PairCall, *, training: bool) -> Plan | str:
    """The plan of a pair in one launch, or why it is two calls; from sizes alone: the tensors may be fake."""
    x = call.input
    unsupported = why_not_kernels(x)
    if unsupported is not None:
        return unsupported
    tf32_allowed = x.dtype == torch.float32 and torch_hooks.rnn_allows_tf32()
    plan = plan_gru_pair(
        call.T, call.B, call.H, str(x.dtype), tf32_allowed=tf32_allowed, training=training, cudnn=torch_hooks.cudnn_runs(x),
        gpu=gpu_of(x.get_device()),
    )  # fmt: skip
    return plan if isinstance(plan, str) else _refused.get((x.get_device(), plan.whole), plan)


def gru_pair_forward(call: PairCall, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    if call.B == 0:
        return call.empty_results(save)
    plan = plan_of_pair(call, training=save)
    results = None
    if isinstance(plan, Plan):
        try:
            results = whole_path.gru_forward(call, save, plan)
        except DoesNotFit as error:
            _refuse(call, plan, error)
            plan = str(error)
    if results is None:
        results = two_calls.forward(call, save, gru_forward)
    return remember_pair(results, save, plan)


def remember_pair(results: tuple[Tensor, ...], save: bool, plan: Plan | str) -> tuple[Tensor, ...]:
    """As `remember`, of a pair; plan: why there was none."""
    if save:
        _made_pair_by.put(results[2], plan)
    return results


def gru_pair_backward(
    call: PairCall,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    output: Tensor,
    reserve: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    if call.B == 0:
        return [t.new_zeros(t.shape) for t, need in zip(call.tensors, needs, strict=True) if need]
    plan = _made_pair_by.get(reserve) or plan_of_pair(call, training=True)
    if isinstance(plan, Plan):
        return kernel_backward().gru_pair_backward(call, plan, grad_output, grad_h_n, output, reserve, needs)
    return two_calls.backward(call, grad_output, grad_h_n, output, reserve, needs, gru_backward)


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
        (lambda: (d_hidden.t() @ hx).roll(-H, 0)),
        (lambda: sums[H:].clone()),
        (lambda: sums[: 3 * H].roll(-H, 0)),
    ]
    return [grad() for grad, need in zip(grads, needs, strict=True) if need]
