"""The op for packed sequences: `gru_packed` made of `gru_packed_forward`, its backward, autocast and vmap rules."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_gru_fuse import torch_hooks
from torch_gru_fuse.ops import differentiable, dispatch, registration
from torch_gru_fuse.ops.call import PackedCall
from torch_gru_fuse.ops.checks import check_gru_packed
from torch_gru_fuse.ops.gru import dropout_masks
from torch_gru_fuse.ops.schemas import library, ops


def gru_packed_composite(
    data: Tensor,
    batch_sizes: Tensor,
    hx: Tensor,
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    *,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    check_gru_packed(data, batch_sizes, hx, params, has_biases, num_layers, dropout, train, bidirectional)
    masks = None
    if train and dropout > 0.0 and num_layers > 1:
        masks = dropout_masks(data, hx, dropout, num_layers, bidirectional)
    forward = dispatch.direct("gru_packed_forward", (data, batch_sizes, hx, *params))
    output, h_n, _ = forward(
        data, batch_sizes, hx, params, has_biases, num_layers, bidirectional, masks, False, recompute=recompute
    )
    return output, h_n


registration.composite("gru_packed", gru_packed_composite)


# ---- autograd -------------------------------------------------------------------------


class _PackedFunction(torch_hooks.SingleLevelFunction):
    """Differentiates `gru_packed_forward` by `gru_packed_backward`."""

    @staticmethod
    def forward(data, batch_sizes, hx, masks, recompute, has_biases, num_layers, bidirectional, *params):
        return torch_hooks.call_below(
            ops.gru_packed_forward.default, data, batch_sizes, hx, list(params), has_biases, num_layers, bidirectional, masks,
            not recompute,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        data, batch_sizes, hx, masks, _, *ctx.flags = inputs[:8]
        ctx.save_for_backward(data, batch_sizes, hx, masks, output[0], output[2], *inputs[8:])
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, _reserve):
        data, batch_sizes, hx, masks, output, reserve, *params = ctx.saved_tensors
        if grad_output is None and grad_h_n is None:
            return (None,) * (8 + len(params))
        need_data, _, need_hx, _, _, _, _, _, *need_params = ctx.needs_input_grad
        needs = [need_data, need_hx, *need_params]
        grads = iter(ops.gru_packed_backward.default(
            grad_output, grad_h_n, data, batch_sizes, hx, params, *ctx.flags, masks, output, reserve, needs
        ))
        grad_data, grad_hx, *grad_params = (next(grads) if need else None for need in needs)
        return grad_data, None, grad_hx, None, None, None, None, None, *grad_params


def _forward_autograd(
    data, batch_sizes, hx, params, has_biases, num_layers, bidirectional, dropout_masks, save, *, recompute=False
):  # fmt: skip
    tensors = (data, hx, *params)
    if dropout_masks is not None and registration.is_differentiated((dropout_masks,)):
        raise RuntimeError("torch_gru_fuse.gru_packed_forward: dropout_masks are constants, but they require grad or carry a "
                           "tangent; pass dropout_masks.detach()")  # fmt: skip
    if torch_hooks.has_forward_tangent(tensors):
        call = PackedCall(data, batch_sizes, hx, params, has_biases, num_layers, bidirectional, dropout_masks)
        return *differentiable.gru_packed(call), data.new_empty(0)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return torch_hooks.apply_single_level(
            _PackedFunction, data, batch_sizes, hx, dropout_masks, recompute, has_biases, num_layers, bidirectional, *params
        )
    with torch_hooks.below_autograd():
        return ops.gru_packed_forward.default(
            data, batch_sizes, hx, params, has_biases, num_layers, bidirectional, dropout_masks, save
        )


def _gradients(grad_output, grad_h_n, *args):
    *call, needs = args
    return differentiable.gru_packed_gradients(PackedCall(*call), grad_output, grad_h_n, needs)


library.impl("gru_packed_forward", _forward_autograd, "Autograd")
registration.differentiable_backward("gru_packed_backward", _gradients, of_forward=2)


# ---- autocast: as `gru` ---------------------------------------------------------------


def _autocast_cuda(data, batch_sizes, hx, params, *rest, **options):
    dtype = torch.float16 if torch_hooks.cudnn_runs(data) else torch.get_autocast_dtype("cuda")
    cast = registration.cast_to(dtype, "cuda")
    with torch_hooks.below_autocast("cuda"):
        return ops.gru_packed.default(cast(data), batch_sizes, cast(hx), [cast(p) for p in params], *rest, **options)


def _autocast_cpu(data, batch_sizes, hx, params, *rest, **options):
    cast = registration.cast_to(hx.dtype, "cpu")
    with torch_hooks.below_autocast("cpu"):
        return ops.gru_packed.default(cast(data), batch_sizes, hx, [cast(p) for p in params], *rest, **options)


library.impl("gru_packed", _autocast_cuda, "AutocastCUDA")
library.impl("gru_packed", _autocast_cpu, "AutocastCPU")


# ---- vmap: one call a sample ----------------------------------------------------------


def _refuse_mapped_sizes(in_dim):
    if in_dim is not None:
        raise RuntimeError("torch_gru_fuse.gru_packed: batch_sizes is mapped by torch.vmap, but all samples must have the same "
                           "lengths; give batch_sizes the in_dim None")  # fmt: skip


@torch.library.register_vmap("torch_gru_fuse::gru_packed_forward", lib=library)
def _forward_vmap(info, in_dims, *args, recompute=False):
    _refuse_mapped_sizes(in_dims[1])
    return registration.loop_vmap(ops.gru_packed_forward.default, info.batch_size, in_dims, args)


@torch.library.register_vmap("torch_gru_fuse::gru_packed_backward", lib=library)
def _backward_vmap(info, in_dims, *args):
    _refuse_mapped_sizes(in_dims[3])
    return registration.loop_vmap(ops.gru_packed_backward.default, info.batch_size, in_dims, args)
