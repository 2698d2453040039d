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


def _stacks(call: GRUCall | PackedCall, reserve: Tensor) -> tuple[Tensor | None, list[_Stack]]:
    """The outputs of the inner layers [L-1, ..., D*H], where layers are separate, and the calls of cuDNN."""
    if call.dropout_masks is None:  # one call, which keeps the outputs of inner layers itself
        return None, [_Stack(0, call.L, reserve.view(torch.uint8))]
    layer_outputs, rest = call.split_reserve(reserve)
    data = rest.view(torch.uint8)
    size = data.numel() // call.L // 16 * 16
    return layer_outputs, [_Stack(i, 1, data[i * size : (i + 1) * size]) for i in range(call.L)]


def gru_forward(call: GRUCall | PackedCall, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    assert save
    output, h_n, reserve = call.empty_results(save)
    layer_outputs, stacks = _stacks(call, reserve)
    if layer_outputs is None:
        output, h_n, own = gru_forward_own_reserve(call)
        _keep(own, stacks[0].reserve)
        return output, h_n, reserve
    x, step_sizes = call.input, call.step_sizes()
    for layer, _, chunk in stacks:
        states = call.states(layer)
        params = call.params[call.places(states.start, call.D)]
        result = torch_hooks.cudnn_gru_forward(
            x, call.hx[states], params, call.has_biases, 1, call.bidirectional, step_sizes
        )
        output, h_n[states] = result.output, result.h_n
        _keep(result.reserve, chunk)
        if layer + 1 < call.L:
            layer_outputs[layer] = output
            x = call.mask(output, layer)
    return output, h_n, reserve


def gru_forward_own_reserve(call: GRUCall | PackedCall) -> tuple[Tensor, Tensor, Tensor]:
    """Without dropout, and with cuDNN's reserve itself, whatever its size is; `gru_backward` takes that, too."""
    return torch_hooks.cudnn_gru_forward(
        call.input, call.hx, call.params, call.has_biases, call.L, call.bidirectional, call.step_sizes()
    )


def _keep(reserve: Tensor, room: Tensor) -> None:
    """Puts cuDNN's reserve into ours."""
    size = reserve.numel()
    if size > room.numel():
        raise RuntimeError(
            f"torch_gru_fuse.gru: cuDNN {torch.backends.cudnn.version()} asks for {size} bytes of reserve, more than the "
            f"{room.numel()} that are provided; set TORCH_GRU_FUSE_KERNELS=triton and report this"
        )
    room[:size].copy_(reserve)


def gru_backward(
    call: GRUCall | PackedCall,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    output: Tensor,
    reserve: Tensor,
    needs: list[bool],
    *,
    last_use: bool = False,
) -> list[Tensor]:
    """last_use: nobody will want the reserve again, and gradients may share memory as cuDNN makes them: nothing is copied."""
    layer_outputs, stacks = _stacks(call, reserve)
    grad, grad_hx, step_sizes = grad_output, None, call.step_sizes()
    grad_params: list[Tensor | None] = [None] * len(call.params)
    for first, layers, chunk in reversed(stacks):
        states = call.states(first, layers)
        places = call.places(states.start, layers * call.D)
        out = output if first + layers == call.L else layer_outputs[first]
        x = call.input if layer_outputs is None else call.layer_input(first, layer_outputs)
        grad, d_hx, d_params = torch_hooks.cudnn_gru_backward(
            grad, None if grad_h_n is None else grad_h_n[states], x, call.hx[states], call.params[places], call.has_biases,
            layers, call.bidirectional, step_sizes, out, chunk if last_use else chunk.clone(),  # cuDNN writes into it
            need_weights=any(needs[2:][places]),
        )  # fmt: skip
        if d_params is not None:
            grad_params[places] = d_params if last_use else torch_hooks.copies(d_params)
        if layers == call.L:
            grad_hx = d_hx
        else:
            grad_hx = call.hx.new_empty(call.hx.shape) if grad_hx is None else grad_hx
            grad_hx[states] = d_hx
        if first > 0:
            grad = call.mask(grad, first - 1)
    grads = zip([grad, grad_hx, *grad_params], needs, strict=True)
    return [g.contiguous() for g, need in grads if need]
