"""The Triton kernels behind the ops: allocation, layers, and the matrix products around the kernels.

Every product over all time steps (input projection, gradients of inputs and weights) is PyTorch's
own; the kernels do what depends on the step before.
"""

from __future__ import annotations

import contextlib
import logging

import torch
from torch import Tensor

from torch_gru_fuse import torch_hooks
from torch_gru_fuse.kernels.cell import cell_backward, cell_forward, cell_gates
from torch_gru_fuse.kernels.step import sequence_backward, sequence_forward
from torch_gru_fuse.ops import cudnn_path, torch_path
from torch_gru_fuse.ops.call import GRUCall
from torch_gru_fuse.ops.schemas import empty_cell_results
from torch_gru_fuse.ops.support import why_not_kernels
from torch_gru_fuse.planner.plan import Plan, plan_gru, plan_gru_cell
from torch_gru_fuse.planner.tiles import POINTWISE_TILE

log = logging.getLogger("torch_gru_fuse")


def _plan(call: GRUCall, *, training: bool) -> Plan:
    sizes = (call.T, call.B, call.input.shape[2], call.H)
    plan = plan_gru(
        *sizes, call.L, call.D, str(call.input.dtype),
        tf32_allowed=torch_hooks.rnn_allows_tf32(), training=training, cudnn=torch_hooks.cudnn_runs(call.input),
        unsupported=why_not_kernels(call.input),
    )  # fmt: skip
    if log.isEnabledFor(logging.DEBUG):
        log.debug("gru T=%d B=%d I=%d H=%d: %s, %s", *sizes, plan.kernel, plan.reason)
    return plan


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
    T, B, H, D = call.T, call.B, call.H, call.D
    if B == 0:
        return call.empty_results(save)
    plan = _plan(call, training=save)
    if plan.kernel == "torch":
        path = cudnn_path if save and torch_hooks.cudnn_runs(call.input) else torch_path
        return path.gru_forward(call, save)
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
    plan = _plan(call, training=True)
    if plan.kernel == "torch":
        path = cudnn_path if torch_hooks.cudnn_runs(call.input) else torch_path
        return path.gru_backward(call, grad_output, grad_h_n, output, reserve, needs)
    layer_outputs, gates = call.saved_gates(reserve)
    need_input, _, *need_params = needs
    grad_hx = call.hx.new_empty(call.hx.shape)
    grad_params: list[Tensor | None] = [None] * len(call.params)

    grad = grad_output
    for layer in reversed(range(call.L)):
        w_ih, w_hh, _, _ = _parameters(call, layer)
        states = call.states(layer)
        out = output if layer == call.L - 1 else layer_outputs[layer]
        d_gates = torch.empty_like(gates[layer])
        sequence_backward(
            grad, None if grad_h_n is None else grad_h_n[states], out, call.hx[states], w_hh,
            gates[layer], d_gates, grad_hx[states], tile=plan.tile, tf32=plan.tf32,
        )  # fmt: skip
        x = call.layer_input(layer, layer_outputs)
        rows = x.reshape(T * B, x.shape[2])
        grad = None
        with _products(plan, x.dtype):
            for d in range(D):
                places = call.places(layer * D + d)
                d_rows = d_gates[d].view(T * B, 4 * H)
                grad_params[places] = _parameter_grads(d_rows, rows, call.hx[layer * D + d], out, d, need_params[places])
                if layer > 0 or need_input:
                    d_input = d_rows[:, H:]  # reset, update, candidate
                    grad = torch.mm(d_input, w_ih[d]) if grad is None else grad.addmm_(d_input, w_ih[d])
        if grad is not None:
            grad = grad.view(x.shape)
            if layer > 0:
                grad = call.mask(grad, layer - 1)
    return [g for g, need in zip([grad, grad_hx, *grad_params], needs, strict=True) if need]


def _parameter_grads(
    d_rows: Tensor, rows: Tensor, h0: Tensor, out: Tensor, direction: int, needs: list[bool]
) -> list[Tensor | None]:
    """Gradients of w_ih, w_hh (, b_ih, b_hh) from d_rows [T*B, 4H] = gradients of (hn, r, z, n)."""
    T, B = out.shape[:2]
    H = h0.shape[1]
    d_input, d_hidden = d_rows[:, H:], d_rows[:, : 3 * H]
    grads: list[Tensor | None] = [d_input.t() @ rows if needs[0] else None, None]
    if needs[1]:
        columns = out[:, :, direction * H : (direction + 1) * H]
        before = [h0[None], columns[:-1]] if direction == 0 else [columns[1:], h0[None]]
        grads[1] = _unrotate(d_hidden.t() @ torch.cat(before).view(T * B, H))
    if len(needs) == 4:
        sums = d_rows.sum(0) if any(needs[2:]) else None  # accumulated in float32 by torch.sum
        grads.append(sums[H:].clone() if needs[2] else None)
        grads.append(_unrotate(sums[: 3 * H]) if needs[3] else None)
    return grads


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
