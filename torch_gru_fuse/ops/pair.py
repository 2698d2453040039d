"""The op for two layers at once: `gru_pair` made of `gru_pair_forward`, its backward, autocast and vmap rules."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_gru_fuse import torch_hooks
from torch_gru_fuse.ops import differentiable, dispatch, ready_calls, registration
from torch_gru_fuse.ops.call import PairCall
from torch_gru_fuse.ops.checks import check_gru_pair
from torch_gru_fuse.ops.schemas import library, ops


def gru_pair_composite(
    inputs: list[Tensor],
    hx: Tensor,
    params: list[Tensor],
    has_biases: bool,
    reverse: list[bool],
    batch_first: bool,
    *,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    results = None
    if not torch.is_grad_enabled():
        results = ready_calls.pair_results(inputs, hx, params, has_biases, reverse, batch_first)
    if results is None:
        check_gru_pair(inputs, hx, params, has_biases, reverse, batch_first)
        if batch_first:
            inputs = [input.transpose(0, 1) for input in inputs]
        forward = dispatch.direct("gru_pair_forward", (*inputs, hx, *params))
        results = forward(inputs, hx, params, has_biases, reverse, False, recompute=recompute)
    output, h_n = results[:2]
    first, second = output.unbind(0)
    return (first.transpose(0, 1), second.transpose(0, 1), h_n) if batch_first else (first, second, h_n)


registration.composite("gru_pair", gru_pair_composite)


# ---- autograd -------------------------------------------------------------------------


class _PairFunction(torch_hooks.SingleLevelFunction):
    """Differentiates `gru_pair_forward` by `gru_pair_backward`."""

    @staticmethod
    def forward(recompute, has_biases, reverse, first, second, hx, *params):
        save = not recompute
        return torch_hooks.call_below(
            ops.gru_pair_forward.default, [first, second], hx, list(params), has_biases, reverse, save
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, *ctx.flags = inputs[:3]
        ctx.save_for_backward(output[0], output[2], *inputs[3:])
        ctx.save_for_forward(*inputs[3:])
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, _reserve):
        output, reserve, *tensors = ctx.saved_tensors
        if grad_output is None and grad_h_n is None:
            return (None,) * (3 + len(tensors))
        first, second, hx, *params = tensors
        needs = list(ctx.needs_input_grad[3:])
        gru_pair_backward = dispatch.direct("gru_pair_backward", (hx, first, second, grad_output, grad_h_n))
        grads = iter(
            gru_pair_backward(grad_output, grad_h_n, [first, second], hx, params, *ctx.flags, output, reserve, needs)
        )
        return None, None, None, *(next(grads) if need else None for need in needs)

    @staticmethod
    def jvp(ctx, _recompute, _has_biases, _reverse, *tangents):
        with torch_hooks.tangents_of_outer_levels(ctx.saved_tensors) as (first, second, hx, *params):
            call = PairCall([first, second], hx, params, *ctx.flags)
            return *differentiable.gru_pair_tangents(call, tangents), None


def _forward_autograd(inputs, hx, params, has_biases, reverse, save, *, recompute=False):
    if not torch.is_grad_enabled():
        results = ready_calls.pair_results(inputs, hx, params, has_biases, reverse, False, save)
        if results is not None:
            return results if save else (*results, hx.new_empty(0))
    tensors = (*inputs, hx, *params)
    if registration.is_differentiated(tensors):
        return torch_hooks.apply_single_level(_PairFunction, recompute, has_biases, reverse, *tensors)
    with torch_hooks.below_autograd():
        return dispatch.direct("gru_pair_forward", tensors)(inputs, hx, params, has_biases, reverse, save)


def _gradients(grad_output, grad_h_n, *args):
    *call, needs = args
    return differentiable.gru_pair_gradients(PairCall(*call), grad_output, grad_h_n, needs)


library.impl("gru_pair_forward", _forward_autograd, "Autograd")
registration.differentiable_backward("gru_pair_backward", _gradients, of_forward=2)


# ---- autocast: as `gru` ---------------------------------------------------------------


def _cast_and_call(device_type, cast, cast_state, inputs, hx, params, *rest, **options):
    with torch_hooks.below_autocast(device_type):
        return ops.gru_pair.default(
            [cast(x) for x in inputs], cast_state(hx), [cast(p) for p in params], *rest, **options
        )


def _autocast_cuda(inputs, hx, *rest, **options):
    dtype = torch.float16 if torch_hooks.cudnn_runs(inputs[0]) else torch.get_autocast_dtype("cuda")
    cast = registration.cast_to(dtype, "cuda")
    return _cast_and_call("cuda", cast, cast, inputs, hx, *rest, **options)


def _autocast_cpu(inputs, hx, *rest, **options):
    cast = registration.cast_to(hx.dtype, "cpu")
    return _cast_and_call("cpu", cast, lambda state: state, inputs, hx, *rest, **options)


library.impl("gru_pair", _autocast_cuda, "AutocastCUDA")
library.impl("gru_pair", _autocast_cpu, "AutocastCPU")


# ---- vmap: one call a sample ----------------------------------------------------------


@torch.library.register_vmap("torch_gru_fuse::gru_pair_forward", lib=library)
def _forward_vmap(info, in_dims, *args, recompute=False):
    return registration.loop_vmap(ops.gru_pair_forward.default, info.batch_size, in_dims, args)


@torch.library.register_vmap("torch_gru_fuse::gru_pair_backward", lib=library)
def _backward_vmap(info, in_dims, *args):
    return registration.loop_vmap(ops.gru_pair_backward.default, info.batch_size, in_dims, args)
