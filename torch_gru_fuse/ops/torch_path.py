"""PyTorch's own GRU behind the ops: on CPUs, in float64, and on GPUs without kernels.

Inference is `torch.gru` (on CUDA: cuDNN).  For training `torch.gru` would keep its gates to itself, so the same operations run
here and save them; the backward then runs the recurrence of dh alone, and each weight gradient is one product over all time
steps and not one a step.

Packed sequences take the same way, over the rows that each step has.  With resets, which `torch.gru` does not know, inference
runs step by step, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from torch_gru_fuse import equations, equations_packed
from torch_gru_fuse.ops import two_calls
from torch_gru_fuse.ops.call import GRUCall, PackedCall, PairCall


def gru_forward(call: GRUCall | PackedCall, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    if save:
        return _forward_saving(call)
    forward = _forward if call.keep is None else _forward_by_steps
    return *forward(call), call.input.new_empty(0)


def _forward(call: GRUCall | PackedCall) -> tuple[Tensor, Tensor]:
    hx, params, has_biases = call.hx, call.params, call.has_biases
    if call.input.is_cuda:
        hx, params = hx.contiguous(), [p.contiguous() for p in params]  # cuDNN's conditions
        if call.dropout_masks is not None and not has_biases:
            # One layer of a flattened stack without biases: torch takes what follows its weights, the next layer, for cuDNN's
            # (zero) biases, and the result is wrong (torch 2.11, cuDNN 9.19).
            zero = params[0].new_zeros(params[0].shape[0])
            params = [t for w_ih, w_hh in zip(params[::2], params[1::2], strict=True) for t in (w_ih, w_hh, zero, zero)]
            has_biases = True

    if call.dropout_masks is None:
        output, h_n = call.torch_gru(call.input, hx, params, has_biases, call.L)
        return output.contiguous(), h_n.contiguous()

    per_layer = len(params) // call.L
    x, finals = call.input, []
    for layer in range(call.L):
        of_layer = params[layer * per_layer : (layer + 1) * per_layer]
        x, final = call.torch_gru(x, hx[call.states(layer)], of_layer, has_biases, 1)
        finals.append(final)
        if layer < call.L - 1:
            x = call.mask(x, layer)
    return x.contiguous(), torch.cat(finals)


def _layer_functions(call: GRUCall | PackedCall) -> tuple[Callable[..., None], Callable[..., tuple[Tensor | None, ...]]]:
    """Forward and backward of one layer and direction; the former fills outputs, gates and the last state."""
    if isinstance(call, PackedCall):
        sizes = call.step_sizes()
        return (
            functools.partial(equations_packed.gru_layer_saving, sizes=sizes),
            functools.partial(equations_packed.gru_layer_backward, sizes=sizes),
        )
    keep = call.keep
    return functools.partial(_layer_saving, keep=keep), functools.partial(equations.gru_layer_backward, keep=keep)


def _layer_saving(*args: Tensor | None, reverse: bool, keep: Tensor | None) -> None:
    *arguments, out, gates, final = args
    equations.gru_layer_saving(*arguments, out, gates, reverse=reverse, keep=keep)
    final.copy_(out[0 if reverse else -1])


def _forward_saving(call: GRUCall | PackedCall) -> tuple[Tensor, Tensor, Tensor]:
    output, h_n, reserve = call.empty_results(True)
    layer_outputs, gates = call.saved_gates(reserve)
    _fill(call, output, h_n, layer_outputs, gates)
    return output, h_n, reserve


def _forward_by_steps(call: GRUCall) -> tuple[Tensor, Tensor]:
    """The same without a reserve: every step has the gates of the one before for its own."""
    output, h_n, _ = call.empty_results(False)
    layer_outputs = output.new_empty(call.L - 1, *output.shape)
    gates = output.new_empty(1, 1, 1, call.B, 4, call.H).expand(call.L, call.D, call.T, -1, -1, -1)
    _fill(call, output, h_n, layer_outputs, gates)
    return output, h_n


def _fill(call: GRUCall | PackedCall, output: Tensor, h_n: Tensor, layer_outputs: Tensor, gates: Tensor) -> None:
    saving, _ = _layer_functions(call)
    for layer in range(call.L):
        x = call.layer_input(layer, layer_outputs)
        out = output if layer == call.L - 1 else layer_outputs[layer]
        for d in range(call.D):
            state = layer * call.D + d
            columns = out[..., d * call.H : (d + 1) * call.H]
            saving(x, call.hx[state], *call.parameters(state), columns, gates[layer, d], h_n[state], reverse=d == 1)


def gru_backward(
    call: GRUCall | PackedCall,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    output: Tensor,
    reserve: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    layer_outputs, gates = call.saved_gates(reserve)
    need_input, need_hx, *need_params = needs
    grad_hx = call.hx.new_empty(call.hx.shape) if need_hx else None
    grad_params: list[Tensor | None] = [None] * len(call.params)
    tensors_each = 4 if call.has_biases else 2

    _, layer_backward = _layer_functions(call)
    grad = grad_output
    for layer in reversed(range(call.L)):
        out = output if layer == call.L - 1 else layer_outputs[layer]
        x = call.layer_input(layer, layer_outputs)
        grad_x = None
        for d in range(call.D):
            state = layer * call.D + d
            columns = slice(d * call.H, (d + 1) * call.H)
            wanted = need_params[call.places(state)]
            dx, dh0, *d_params = layer_backward(
                None if grad is None else grad[..., columns],
                None if grad_h_n is None else grad_h_n[state],
                x, call.hx[state], out[..., columns], *call.parameters(state),
                reverse=d == 1, gates=gates[layer, d],
                needs=(layer > 0 or need_input, need_hx, *wanted, *([False] * (4 - tensors_each))),
            )  # fmt: skip
            grad_x = dx if grad_x is None else grad_x + dx
            if grad_hx is not None:
                grad_hx[state] = dh0
            grad_params[call.places(state)] = d_params[:tensors_each]
        grad = call.mask(grad_x, layer - 1) if layer > 0 else grad_x
    return [g.contiguous() for g, need in zip([grad, grad_hx, *grad_params], needs, strict=True) if need]


def gru_pair_forward(call: PairCall, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    return two_calls.forward(call, save, gru_forward)


def gru_pair_backward(call: PairCall, *args) -> list[Tensor]:
    return two_calls.backward(call, *args, gru_backward)


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
