"""The sequence op: `gru` made of `gru_forward`, its backward, autocast and vmap rules."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from torch_gru_fuse import torch_hooks
from torch_gru_fuse.ops import differentiable, dispatch, ready_calls, registration
from torch_gru_fuse.ops.call import GRUCall
from torch_gru_fuse.ops.checks import check_gru, check_resets
from torch_gru_fuse.ops.schemas import library, ops


def dropout_masks(input: Tensor, hx: Tensor, dropout: float, num_layers: int, bidirectional: bool) -> Tensor:
    """Masks [L-1, ..., D*H], 0 or 1 / (1 - p), for what each layer hands to the next, of input [..., I].

    Drawn layer by layer as `torch.dropout` draws them, so that on the CPU the same seed gives
    the masks that `torch.gru` would use.
    """
    size = (*input.shape[:-1], hx.shape[2] * (2 if bidirectional else 1))
    if dropout == 1.0:
        return input.new_zeros((num_layers - 1, *size))
    keep = 1.0 - dropout
    masks = [input.new_empty(size).bernoulli_(keep).div_(keep) for _ in range(num_layers - 1)]
    return torch.stack(masks)


def gru_composite(
    input: Tensor,
    hx: Tensor,
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    *,
    recompute: bool = False,
    resets: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if not (train and dropout) and not recompute and resets is None and keep is None:
        results = ready_calls.results(input, hx, params, has_biases, num_layers, bidirectional, batch_first)
        if results is not None:
            return results
    check_gru(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
    if resets is not None or keep is not None:
        keep = _checked_keep(input, resets, keep, batch_first)
    if batch_first:
        input = input.transpose(0, 1)
    masks = None
    if train and dropout > 0.0 and num_layers > 1:
        masks = dropout_masks(input, hx, dropout, num_layers, bidirectional)
    forward = dispatch.direct("gru_forward", (input, hx, *params, keep))
    options = () if keep is None else (keep,)
    output, h_n, _ = forward(
        input, hx, params, has_biases, num_layers, bidirectional, masks, False, *options, recompute=recompute
    )
    return (output.transpose(0, 1) if batch_first else output), h_n


def _checked_keep(input: Tensor, resets: Tensor | None, keep: Tensor | None, batch_first: bool) -> Tensor:
    """`keep` [T, B] of `gru_forward` from either argument of `gru`."""
    if resets is not None and keep is not None:
        raise RuntimeError("torch_gru_fuse.gru: resets and keep are both given, expected one of them: keep is 1 - resets")
    name, given = ("keep", keep) if resets is None else ("resets", resets)
    check_resets(name, given, input, batch_first)
    if torch.is_grad_enabled() and given.requires_grad:
        _raise_not_constant("gru", name)
    if resets is not None:
        keep = ~resets if resets.dtype == torch.bool else 1 - resets
    return keep.transpose(0, 1) if batch_first else keep


def _raise_not_constant(op: str, name: str) -> NoReturn:
    raise RuntimeError(f"torch_gru_fuse.{op}: {name} has no gradient, but it requires grad or carries a tangent; "
                       f"pass {name}.detach()")  # fmt: skip


registration.composite("gru", gru_composite)


# ---- autograd -------------------------------------------------------------------------


class _GRUFunction(torch_hooks.SingleLevelFunction):
    """Differentiates `gru_forward` by `gru_backward`."""

    @staticmethod
    def forward(input, hx, masks, keep, recompute, has_biases, num_layers, bidirectional, *params):
        save = not recompute
        return torch_hooks.call_below(
            ops.gru_forward.default, input, hx, list(params), has_biases, num_layers, bidirectional, masks, save, keep
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, hx, masks, keep, _, *ctx.flags = inputs[:8]
        ctx.save_for_backward(input, hx, masks, keep, output[0], output[2], *inputs[8:])
        ctx.save_for_forward(input, hx, masks, keep, *inputs[8:])
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, _reserve):
        input, hx, masks, keep, output, reserve, *params = ctx.saved_tensors
        if grad_output is None and grad_h_n is None:
            return (None,) * (8 + len(params))
        need_input, need_hx, _, _, _, _, _, _, *need_params = ctx.needs_input_grad
        needs = [need_input, need_hx, *need_params]
        gru_backward = dispatch.direct("gru_backward", (input, grad_output, grad_h_n))
        options = () if keep is None else (keep,)
        grads = iter(
            gru_backward(grad_output, grad_h_n, input, hx, params, *ctx.flags, masks, output, reserve, needs, *options)
        )
        grad_input, grad_hx, *grad_params = (next(grads) if need else None for need in needs)
        return grad_input, grad_hx, None, None, None, None, None, None, *grad_params

    @staticmethod
    def jvp(ctx, d_input, d_hx, _masks, _keep, _recompute, _has_biases, _num_layers, _bidirectional, *d_params):
        with torch_hooks.tangents_of_outer_levels(ctx.saved_tensors) as (input, hx, masks, keep, *params):
            call = GRUCall(input, hx, params, *ctx.flags, masks, keep)
            return *differentiable.gru_tangents(call, (d_input, d_hx, *d_params)), None


def _forward_autograd(
    input, hx, params, has_biases, num_layers, bidirectional, dropout_masks, save, keep=None, *, recompute=False
):  # fmt: skip
    if dropout_masks is None and keep is None and not torch.is_grad_enabled():
        results = ready_calls.results(input, hx, params, has_biases, num_layers, bidirectional, False, save)
        if results is not None:
            return results if save else (*results, input.new_empty(0))
    tensors = (input, hx, *params)
    if dropout_masks is not None and registration.is_differentiated((dropout_masks,)):
        raise RuntimeError("torch_gru_fuse.gru_forward: dropout_masks are constants, but they require grad or carry a tangent; "
                           "pass dropout_masks.detach()")  # fmt: skip
    if keep is not None and registration.is_differentiated((keep,)):
        _raise_not_constant("gru_forward", "keep")
    if registration.is_differentiated(tensors):
        return torch_hooks.apply_single_level(
            _GRUFunction, input, hx, dropout_masks, keep, recompute, has_biases, num_layers, bidirectional, *params
        )
    with torch_hooks.below_autograd():
        return ops.gru_forward.default(
            input, hx, params, has_biases, num_layers, bidirectional, dropout_masks, save, keep
        )


def _gradients(
    grad_output, grad_h_n, input, hx, params, has_biases, num_layers, bidirectional, dropout_masks, needs, keep=None
):  # fmt: skip
    call = GRUCall(input, hx, params, has_biases, num_layers, bidirectional, dropout_masks, keep)
    return differentiable.gru_gradients(call, grad_output, grad_h_n, needs)


library.impl("gru_forward", _forward_autograd, "Autograd")
registration.differentiable_backward("gru_backward", _gradients, of_forward=2)


# ---- autocast -------------------------------------------------------------------------


def _gru_autocast_cuda(input, hx, params, *rest, **options):
    # torch.gru casts to float16 for cuDNN, whatever dtype autocast was given (aten/src/ATen/cudnn/AutocastRNN.cpp).
    dtype = torch.float16 if torch_hooks.cudnn_runs(input) else torch.get_autocast_dtype("cuda")
    cast = registration.cast_to(dtype, "cuda")
    with torch_hooks.below_autocast("cuda"):
        return ops.gru.default(cast(input), cast(hx), [cast(p) for p in params], *rest, **_cast_resets(options, cast))


def _gru_autocast_cpu(input, hx, params, *rest, **options):
    # torch.gru keeps the dtype of the hidden state under CPU autocast.
    cast = registration.cast_to(hx.dtype, "cpu")
    with torch_hooks.below_autocast("cpu"):
        return ops.gru.default(cast(input), hx, [cast(p) for p in params], *rest, **_cast_resets(options, cast))


def _cast_resets(options, cast):
    """The options of `gru`, with resets or keep in the dtype of the states that they multiply; those of bool are left."""
    return options | {name: cast(options[name]) for name in ("resets", "keep") if name in options}


library.impl("gru", _gru_autocast_cuda, "AutocastCUDA")
library.impl("gru", _gru_autocast_cpu, "AutocastCPU")


# ---- vmap -----------------------------------------------------------------------------
#
# Samples that share their weights are more rows of the batch: one launch, and the gradients of inputs and states with it.
# Gradients of shared weights, one a sample, and many gradients of one forward (Jacobians) are none of what `gru_backward`
# returns: the differentiable formulation has them, its operations mapped one by one.  Samples with weights of their own
# (ensembles) are launched one after the other.


def _fold(tensor: Tensor, dim: int | None, size: int, batch_dim: int) -> Tensor:
    """Merge the mapped dimension into the batch dimension (expanding an unmapped tensor)."""
    tensor = tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.movedim(0, batch_dim).flatten(batch_dim, batch_dim + 1)


@torch.library.register_vmap("torch_gru_fuse::gru_forward", lib=library)
def _gru_forward_vmap(
    info, in_dims, input, hx, params, has_biases, num_layers, bidirectional, dropout_masks, save, keep=None, *, recompute=False
):
    if keep is None:
        in_dims = (*in_dims[:8], None)
    input_dim, hx_dim, param_dims, _, _, _, mask_dim, _, keep_dim = in_dims
    n = info.batch_size
    if any(d is not None for d in param_dims):
        return registration.loop_vmap(
            ops.gru_forward.default, n, in_dims,
            (input, hx, params, has_biases, num_layers, bidirectional, dropout_masks, save, keep),
        )  # fmt: skip
    masks = None if dropout_masks is None else _fold(dropout_masks, mask_dim, n, 2)
    keep = None if keep is None else _fold(keep, keep_dim, n, 1)
    output, h_n, reserve = ops.gru_forward.default(
        _fold(input, input_dim, n, 1), _fold(hx, hx_dim, n, 1), params, has_biases, num_layers, bidirectional, masks, save,
        keep,
    )  # fmt: skip
    # Every sample gets the reserve of all: mapped, without a copy, so that the backward knows which vmap made it.
    return (output.unflatten(1, (n, -1)), h_n.unflatten(1, (n, -1)), reserve.expand(n, *reserve.shape)), (1, 1, 0)


def _gru_backward_vmap(
    info, in_dims, grad_output, grad_h_n, input, hx, params, has_biases, num_layers, bidirectional, dropout_masks, output,
    reserve, needs, keep=None,
):  # fmt: skip
    n = info.batch_size
    if keep is None:
        in_dims = (*in_dims[:12], None)
    grad_output_dim, grad_h_n_dim, input_dim, hx_dim, param_dims, *_, mask_dim, output_dim, reserve_dim, _, keep_dim = in_dims
    if any(d is not None for d in param_dims):
        args = (grad_output, grad_h_n, input, hx, params, has_biases, num_layers, bidirectional, dropout_masks, output, reserve)
        return registration.loop_vmap(ops.gru_backward.default, n, in_dims, (*args, needs, keep))
    grads = ops.gru_backward.default(
        None if grad_output is None else _fold(grad_output, grad_output_dim, n, 1),
        None if grad_h_n is None else _fold(grad_h_n, grad_h_n_dim, n, 1),
        _fold(input, input_dim, n, 1), _fold(hx, hx_dim, n, 1), params, has_biases, num_layers, bidirectional,
        None if dropout_masks is None else _fold(dropout_masks, mask_dim, n, 2),
        _fold(output, output_dim, n, 1), reserve.select(reserve_dim, 0), needs,
        None if keep is None else _fold(keep, keep_dim, n, 1),
    )  # fmt: skip
    return [grad.unflatten(1, (n, -1)) for grad in grads], [1] * len(grads)


def _gru_backward_composite(*args):
    *call, _output, _reserve, needs = args[:12]
    return _gradients(*call, needs, *args[12:])


def _no_launch_has_them(in_dims, *args) -> bool:
    _, _, _, _, param_dims, *_, reserve_dim, _ = in_dims[:12]
    shared_weights = all(d is None for d in param_dims)
    _, _, *need_params = args[11]
    return shared_weights and (any(need_params) or reserve_dim is None)  # without the latter one forward was run for all


torch_hooks.register_vmap(library, "gru_backward", _gru_backward_vmap, _gru_backward_composite, _no_launch_has_them)
