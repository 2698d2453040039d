"""Autograd of ready calls: see `ready_calls`.

Nothing but autograd is between such a call and its launches: neither the forward nor, nearly always, the backward goes through
the dispatcher again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torch_gru_fuse.ops import dispatch
from torch_gru_fuse.ops.call import GRUCall
from torch_gru_fuse.ops.ready_launches import Training
from torch_gru_fuse.ops.schemas import ops


class _ReadyGRU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, training: Training, flags: tuple[bool, int, bool], input, hx, *params):
        results = training.forward(input, hx, [*params])
        if results is None:
            training = None
            results = dispatch.on_cuda("gru_forward")(input, hx, [*params], *flags, None, True)
        output, h_n, reserve = results
        ctx.training, ctx.flags = training, flags
        ctx.save_for_backward(input, hx, output, reserve, *params)
        ctx.set_materialize_grads(False)
        return output, h_n

    @staticmethod
    def backward(ctx, grad_output, grad_h_n):
        input, hx, output, reserve, *params = ctx.saved_tensors
        if grad_output is None and grad_h_n is None:
            return (None,) * (4 + len(params))
        _, _, *needs = ctx.needs_input_grad
        if not dispatch.goes_straight((input, grad_output, grad_h_n)):  # say, the gradients are to be differentiated
            grads = ops.gru_backward.default(
                grad_output, grad_h_n, input, hx, params, *ctx.flags, None, output, reserve, needs
            )
        elif ctx.training is None:
            grads = dispatch.on_cuda("gru_backward")(
                grad_output, grad_h_n, input, hx, params, *ctx.flags, None, output, reserve, needs
            )
        else:
            call = GRUCall(input, hx, params, *ctx.flags, None)
            grads = dispatch.on_its_device(ctx.training.backward)(call, grad_output, grad_h_n, output, reserve, needs)
        if all(needs):
            return None, None, *grads
        found = iter(grads)
        return None, None, *(next(found) if need else None for need in needs)


def run_of(call: GRUCall, training: Training, *, batch_first: bool) -> Any:
    """What runs calls like this one, differentiably: takes input, hx and params, and returns output and h_n."""
    flags = call.has_biases, call.num_layers, call.bidirectional

    def run(input: Tensor, hx: Tensor, params: list[Tensor]) -> tuple[Tensor, Tensor]:
        if not batch_first:
            return _ReadyGRU.apply(training, flags, input, hx, *params)
        output, h_n = _ReadyGRU.apply(training, flags, input.transpose(0, 1), hx, *params)
        return output.transpose(0, 1), h_n

    return run
