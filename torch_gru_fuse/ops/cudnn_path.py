"""cuDNN behind the training ops, where it is faster than the kernels.

Inference calls `torch.gru`; training needs what `torch.gru` keeps from the op: cuDNN's reserve.  Its size is not known to a
fake implementation, so it is copied into our own, whose size is a formula; the copies cost about 1% of the time.

With dropout the layers are separate calls, because the masks are given.

Packed sequences take the same way: cuDNN then gets the number of rows of each step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_gru_fuse import torch_hooks
from torch_gru_fuse.ops.call import GRUCall, PackedCall


class _Stack(NamedTuple):
    """The layers of one call of cuDNN."""

    first: int
    layers: int
    reserve: Tensor  # the bytes that it may fill


def _stacks(call: GRUCall | PackedCall, reserve: Tensor) -> tuple[Tensor, list[_Stack]]:
    """The outputs of the inner layers [L-1, ..., D*H], kept where layers are separate, and the calls of cuDNN."""
    layer_outputs, rest = call.split_reserve(reserve)
    if call.dropout_masks is None:  # one call, which keeps the outputs of inner layers itself
        return layer_outputs, [_Stack(0, call.L, reserve.view(torch.uint8))]
    data = rest.view(torch.uint8)
    size = data.numel() // call.L // 16 * 16
    return layer_outputs, [_Stack(i, 1, data[i * size : (i + 1) * size]) for i in range(call.L)]


def gru_forward(call: GRUCall | PackedCall, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    assert save
    output, h_n, reserve = call.empty_results(save)
    layer_outputs, stacks = _stacks(call, reserve)
    whole = len(stacks) == 1
    x, step_sizes = call.input, call.step_sizes()
    for first, layers, chunk in stacks:
        states = call.states(first, layers)
        params = call.params[call.places(states.start, layers * call.D)]
        result = torch_hooks.cudnn_gru_forward(
            x, call.hx[states], params, call.has_biases, layers, call.bidirectional, step_sizes
        )
        output = result.output
        if whole:
            h_n = result.h_n
        else:
            h_n[states] = result.h_n
        size = result.reserve.numel()
        if size > chunk.numel():
            raise RuntimeError(
                f"torch_gru_fuse.gru: cuDNN {torch.backends.cudnn.version()} asks for {size} bytes of reserve, more than the "
                f"{chunk.numel()} that are provided; set TORCH_GRU_FUSE_KERNELS=triton and report this"
            )
        chunk[:size].copy_(result.reserve)
        if first + layers < call.L:
            layer_outputs[first] = output
            x = call.mask(output, first)
    return output, h_n, reserve


def gru_backward(
    call: GRUCall | PackedCall,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    output: Tensor,
    reserve: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    layer_outputs, stacks = _stacks(call, reserve)
    grad, grad_hx = grad_output, call.hx.new_empty(call.hx.shape)
    step_sizes = call.step_sizes()
    grad_params: list[Tensor | None] = [None] * len(call.params)
    for first, layers, chunk in reversed(stacks):
        states = call.states(first, layers)
        places = call.places(states.start, layers * call.D)
        out = output if first + layers == call.L else layer_outputs[first]
        grad, d_hx, grad_params[places] = torch_hooks.cudnn_gru_backward(
            grad, None if grad_h_n is None else grad_h_n[states], call.layer_input(first, layer_outputs), call.hx[states],
            call.params[places], call.has_biases, layers, call.bidirectional, step_sizes, out,
            chunk.clone(), need_weights=any(needs[2:][places]),  # cuDNN writes into it
        )  # fmt: skip
        if len(stacks) == 1:
            grad_hx = d_hx
        else:
            grad_hx[states] = d_hx
        if first > 0:
            grad = call.mask(grad, first - 1)
    return [g.contiguous() for g, need in zip([grad, grad_hx, *grad_params], needs, strict=True) if need]
