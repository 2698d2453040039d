"""A pair of layers as two calls of the sequence op, one after the other: on CPUs, and where one launch for both does not pay.

Both are calls of `gru_forward` for one layer, and what these allocate is the pair's: where the layer goes forwards in time its
output, last state and reserve are parts of those of the pair, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torch_gru_fuse.ops.call import GRUCall, PairCall


class _Single(GRUCall):
    """A call with a place for its results."""

    results: tuple[Tensor, Tensor, Tensor]

    def empty_results(self, save: bool) -> tuple[Tensor, Tensor, Tensor]:
        return self.results


def _reserve_of(reserve: Tensor | None, i: int) -> Tensor | None:
    return reserve.chunk(2)[i] if reserve is not None and reserve.numel() else reserve


def forward(
    call: PairCall, save: bool, gru_forward: Callable[[GRUCall, bool], tuple[Tensor, Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor]:
    """output [2, T, B, H], h_n [2, B, H] and reserve by two calls of `gru_forward`."""
    output, h_n, reserve = call.empty_results(save)
    for i in range(2):
        own = output[i], h_n[i : i + 1], _reserve_of(reserve, i)
        single = _Single(*call.single(i))
        single.results = (torch.empty_like(own[0]) if call.reverse[i] else own[0], *own[1:])
        made, *others = gru_forward(single, save)
        for place, result in zip(own, (call.in_time(i, made), *others), strict=True):
            if result.numel() and result.data_ptr() != place.data_ptr():
                place.copy_(result)
    return output, h_n, reserve


def backward(
    call: PairCall,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    output: Tensor | None,
    reserve: Tensor | None,
    needs: Sequence[bool],
    gru_backward: Callable[..., list[Tensor]],
) -> list[Tensor]:
    """Gradients of those of `call.tensors` that are needed, by two calls of `gru_backward`.

    output, reserve: None where that needs none.
    """
    need_inputs, need_hx, need_params = needs[:2], needs[2], needs[3:]
    grad_inputs, grad_hx, grad_params = [], [], []
    for i in range(2):
        places = call.places(i)
        of_single = [need_inputs[i], need_hx, *need_params[places]]
        if not any(of_single):
            continue
        dy = None if grad_output is None else call.in_time(i, grad_output[i])
        dhn = None if grad_h_n is None else grad_h_n[i : i + 1]
        out = None if output is None else call.in_time(i, output[i])
        grads = iter(gru_backward(call.single(i), dy, dhn, out, _reserve_of(reserve, i), of_single))
        if need_inputs[i]:
            grad_inputs.append(call.in_time(i, next(grads)).contiguous())
        if need_hx:
            grad_hx.append(next(grads))
        grad_params += grads
    return [*grad_inputs, *([torch.cat(grad_hx)] if need_hx else []), *grad_params]
