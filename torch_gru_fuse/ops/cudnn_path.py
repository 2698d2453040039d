"""cuDNN behind the training ops, where it is faster than the kernels.

Inference calls `torch.gru`; training needs what `torch.gru` keeps from the op: cuDNN's reserve.  Its size is not known to a
fake implementation, so it is copied into our own, whose size is a formula; the copies cost about 1% of the time.

With dropout the layers are separate calls, because the masks are given.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from torch_gru_fuse import torch_hooks
from torch_gru_fuse.ops.schemas import empty_gru_results, split_reserve


def _stacks(num_layers: int, separate: bool) -> list[tuple[int, int]]:
    """(first layer, number of layers) of each call of cuDNN."""
    return [(layer, 1) for layer in range(num_layers)] if separate else [(0, num_layers)]


def _chunks(rest: Tensor, stacks: list[tuple[int, int]]) -> Iterator[Tensor]:
    """The part of the reserve, as bytes, that each call of cuDNN may fill."""
    data = rest.view(torch.uint8)
    size = data.numel() // len(stacks) // 16 * 16
    for i in range(len(stacks)):
        yield data[i * size : (i + 1) * size]


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
    assert save
    D = 2 if bidirectional else 1
    output, h_n, reserve = empty_gru_results(input, hx, num_layers, bidirectional, save)
    layer_outputs, rest = split_reserve(reserve, *output.shape[:2], hx.shape[2], num_layers, D)
    per_layer = len(params) // num_layers
    stacks = _stacks(num_layers, dropout_masks is not None)
    if len(stacks) == 1:
        rest = reserve  # cuDNN keeps the outputs of the layers itself
    x = input
    for (first, count), chunk in zip(stacks, _chunks(rest, stacks), strict=True):
        states = slice(first * D, (first + count) * D)
        result = torch_hooks.cudnn_gru_forward(
            x, hx[states], params[first * per_layer : (first + count) * per_layer], has_biases, count, bidirectional
        )
        output, h_n[states] = result.output, result.h_n
        size = result.reserve.numel()
        if size > chunk.numel():
            raise RuntimeError(
                f"torch_gru_fuse.gru: cuDNN {torch.backends.cudnn.version()} asks for {size} bytes of reserve, more than the "
                f"{chunk.numel()} that are provided; set TORCH_GRU_FUSE_KERNELS=triton and report this"
            )
        chunk[:size].copy_(result.reserve)
        if first + count < num_layers:
            layer_outputs[first] = output
            x = output * dropout_masks[first]
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
    D = 2 if bidirectional else 1
    layer_outputs, rest = split_reserve(reserve, *output.shape[:2], hx.shape[2], num_layers, D)
    per_layer = len(params) // num_layers
    stacks = _stacks(num_layers, dropout_masks is not None)
    if len(stacks) == 1:
        rest = reserve
    grad, grad_hx = grad_output, torch.empty_like(hx, memory_format=torch.contiguous_format)
    grad_params: list[Tensor | None] = [None] * len(params)
    for (first, count), chunk in reversed(list(zip(stacks, _chunks(rest, stacks), strict=True))):
        states = slice(first * D, (first + count) * D)
        weights = slice(first * per_layer, (first + count) * per_layer)
        x = input if first == 0 else layer_outputs[first - 1] * dropout_masks[first - 1]
        out = output if first + count == num_layers else layer_outputs[first]
        grad, grad_hx[states], grad_params[weights] = torch_hooks.cudnn_gru_backward(
            grad, None if grad_h_n is None else grad_h_n[states], x, hx[states], params[weights], has_biases, count,
            bidirectional, out, chunk.clone(), need_weights=any(needs[2:][weights]),
        )  # fmt: skip
        if first > 0:
            grad = grad * dropout_masks[first - 1]
    return [g.contiguous() for g, need in zip([grad, grad_hx, *grad_params], needs, strict=True) if need]
