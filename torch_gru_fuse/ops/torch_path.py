"""PyTorch's own GRU behind the ops: on CPUs, in float64, and on GPUs without kernels.

Inference is `torch.gru` (on CUDA: cuDNN).  For training `torch.gru` would keep its gates to itself, so the same operations run
here and save them; the backward then runs the recurrence of dh alone, and each weight gradient is one product over all time
steps and not one a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torch_gru_fuse import equations
from torch_gru_fuse.ops.schemas import empty_gru_results, saved_gates


def gru_forward(
    input: Tensor,
    hx: Tensor,
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    dropout_masks: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    if save:
        return _forward_saving(input, hx, params, has_biases, num_layers, bidirectional, dropout_masks)
    biased = has_biases
    if input.is_cuda:
        hx, params = hx.contiguous(), [p.contiguous() for p in params]  # cuDNN's conditions
        if dropout_masks is not None and not has_biases:
            # One layer of a flattened stack without biases: torch takes what follows its weights, the next layer, for cuDNN's
            # (zero) biases, and the result is wrong (torch 2.11, cuDNN 9.19).
            zero = params[0].new_zeros(params[0].shape[0])
            params = [t for w_ih, w_hh in zip(params[::2], params[1::2], strict=True) for t in (w_ih, w_hh, zero, zero)]
            biased = True

    def run(x: Tensor, h: Tensor, p: list[Tensor], layers: int) -> tuple[Tensor, Tensor]:
        return torch.gru(x, h, p, biased, layers, 0.0, False, bidirectional, False)

    nothing = input.new_empty(0)
    if dropout_masks is None:
        output, h_n = run(input, hx, params, num_layers)
        return output.contiguous(), h_n.contiguous(), nothing

    directions = 2 if bidirectional else 1
    per_layer = len(params) // num_layers
    x, finals = input, []
    for layer in range(num_layers):
        states = slice(layer * directions, (layer + 1) * directions)
        x, final = run(x, hx[states], params[layer * per_layer : (layer + 1) * per_layer], 1)
        finals.append(final)
        if layer < num_layers - 1:
            x = x * dropout_masks[layer]
    return x.contiguous(), torch.cat(finals), nothing


def _forward_saving(
    input: Tensor,
    hx: Tensor,
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    dropout_masks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    directions = 2 if bidirectional else 1
    H = hx.shape[2]
    output, h_n, reserve = empty_gru_results(input, hx, num_layers, bidirectional, True)
    layer_outputs, gates = saved_gates(reserve, *output.shape[:2], H, num_layers, directions)
    tensors_each = 4 if has_biases else 2
    x = input
    for layer in range(num_layers):
        out = output if layer == num_layers - 1 else layer_outputs[layer]
        for d in range(directions):
            state = layer * directions + d
            w_ih, w_hh, *biases = params[state * tensors_each : (state + 1) * tensors_each]
            columns = out[..., d * H : (d + 1) * H]
            equations.gru_layer_saving(
                x, hx[state], w_ih, w_hh, *(biases or (None, None)), columns, gates[layer, d], reverse=d == 1
            )
            h_n[state] = columns[0 if d else -1]
        x = out if dropout_masks is None or out is output else out * dropout_masks[layer]
    return output, h_n, reserve


def gru_backward(
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    input: Tensor,
    hx: Tensor,
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    dropout_masks: Tensor | None,
    output: Tensor,
    reserve: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    directions = 2 if bidirectional else 1
    H = hx.shape[2]
    tensors_each = 4 if has_biases else 2
    layer_outputs, gates = saved_gates(reserve, *output.shape[:2], H, num_layers, directions)
    need_input, need_hx, *need_params = needs
    grad_hx = torch.empty_like(hx, memory_format=torch.contiguous_format) if need_hx else None
    grad_params: list[Tensor | None] = [None] * len(params)

    grad = grad_output
    for layer in reversed(range(num_layers)):
        out = output if layer == num_layers - 1 else layer_outputs[layer]
        x = input if layer == 0 else layer_outputs[layer - 1]
        if layer > 0 and dropout_masks is not None:
            x = x * dropout_masks[layer - 1]
        grad_x = None
        for d in range(directions):
            state = layer * directions + d
            first = state * tensors_each
            w_ih, w_hh, *biases = params[first : first + tensors_each]
            columns = slice(d * H, (d + 1) * H)
            wanted = need_params[first : first + tensors_each]
            dx, dh0, *d_params = equations.gru_layer_backward(
                None if grad is None else grad[..., columns],
                None if grad_h_n is None else grad_h_n[state],
                x, hx[state], out[..., columns], w_ih, w_hh, *(biases or (None, None)),
                reverse=d == 1, gates=gates[layer, d],
                needs=(layer > 0 or need_input, need_hx, *wanted, *([False] * (4 - tensors_each))),
            )
            grad_x = dx if grad_x is None else grad_x + dx
            if grad_hx is not None:
                grad_hx[state] = dh0
            grad_params[first : first + tensors_each] = d_params[:tensors_each]
        if layer > 0 and dropout_masks is not None:
            grad_x = grad_x * dropout_masks[layer - 1]
        grad = grad_x
    return [g.contiguous() for g, need in zip([grad, grad_hx, *grad_params], needs, strict=True) if need]


def gru_cell_forward(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, save: bool
) -> tuple[Tensor, Tensor]:
    return torch.gru_cell(input, hx, w_ih, w_hh, b_ih, b_hh).contiguous(), hx.new_empty(0)


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
    grads = equations.gru_cell_backward(grad_h, input, hx, w_ih, w_hh, b_ih, b_hh)
    return [g.contiguous() for g, need in zip(grads, needs, strict=True) if need]
