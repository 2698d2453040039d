"""The sequence op: `gru` made of `gru_forward`, its backward, autocast and vmap rules."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_gru_fuse import torch_hooks
from torch_gru_fuse.ops import dispatch, registration
from torch_gru_fuse.ops.checks import check_gru
from torch_gru_fuse.ops.schemas import library, ops


def _dropout_masks(input: Tensor, hx: Tensor, dropout: float, num_layers: int, bidirectional: bool) -> Tensor:
    """Masks [L-1, T, B, D*H], 0 or 1 / (1 - p), for what each layer hands to the next.

    Drawn layer by layer as `torch.dropout` draws them, so that on the CPU the same seed gives
    the masks that `torch.gru` would use.
    """
    T, B, _ = input.shape
    size = (T, B, hx.shape[2] * (2 if bidirectional else 1))
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
) -> tuple[Tensor, Tensor]:
    check_gru(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
    if batch_first:
        input = input.transpose(0, 1)
    masks = None
    if train and dropout > 0.0 and num_layers > 1:
        masks = _dropout_masks(input, hx, dropout, num_layers, bidirectional)
    forward = dispatch.direct("gru_forward", (input, hx, *params))
    output, h_n, _ = forward(input, hx, params, has_biases, num_layers, bidirectional, masks, False)
    return (output.transpose(0, 1) if batch_first else output), h_n


registration.composite("gru", gru_composite)


# ---- autograd -------------------------------------------------------------------------


class _GRUFunction(torch_hooks.SingleLevelFunction):
    """Differentiates `gru_forward` by `gru_backward`."""

    @staticmethod
    def forward(input, hx, masks, has_biases, num_layers, bidirectional, *params):
        with torch_hooks.below_autograd():
            return ops.gru_forward.default(
                input, hx, list(params), has_biases, num_layers, bidirectional, masks, True
            )

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, hx, masks, *ctx.flags = inputs[:6]
        ctx.save_for_backward(input, hx, masks, output[0], output[2], *inputs[6:])
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_output, grad_h_n, _reserve):
        input, hx, masks, output, reserve, *params = ctx.saved_tensors
        if grad_output is None and grad_h_n is None:
            return (None,) * (6 + len(params))
        need_input, need_hx, _, _, _, _, *need_params = ctx.needs_input_grad
        needs = [need_input, need_hx, *need_params]
        grads = iter(ops.gru_backward.default(
            grad_output, grad_h_n, input, hx, params, *ctx.flags, masks, output, reserve, needs
        ))
        grad_input, grad_hx, *grad_params = (next(grads) if need else None for need in needs)
        return grad_input, grad_hx, None, None, None, None, *grad_params


def _forward_autograd(input, hx, params, has_biases, num_layers, bidirectional, dropout_masks, save):
    tensors = (input, hx, *params)
    registration.refuse_forward_mode("gru", (*tensors, dropout_masks))
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return torch_hooks.apply_single_level(
            _GRUFunction, input, hx, dropout_masks, has_biases, num_layers, bidirectional, *params
        )
    with torch_hooks.below_autograd():
        return ops.gru_forward.default(
            input, hx, params, has_biases, num_layers, bidirectional, dropout_masks, save
        )


library.impl("gru_forward", _forward_autograd, "Autograd")
registration.refuse_double_backward("gru_backward")


# ---- autocast -------------------------------------------------------------------------


def _gru_autocast_cuda(input, hx, params, *rest):
    # torch.gru casts to float16 for cuDNN, whatever dtype autocast was given (aten/src/ATen/cudnn/AutocastRNN.cpp).
    dtype = torch.float16 if torch_hooks.cudnn_runs(input) else torch.get_autocast_dtype("cuda")
    cast = registration.cast_to(dtype, "cuda")
    with torch_hooks.below_autocast("cuda"):
        return ops.gru.default(cast(input), cast(hx), [cast(p) for p in params], *rest)


def _gru_autocast_cpu(input, hx, params, *rest):
    # torch.gru keeps the dtype of the hidden state under CPU autocast.
    cast = registration.cast_to(hx.dtype, "cpu")
    with torch_hooks.below_autocast("cpu"):
        return ops.gru.default(cast(input), hx, [cast(p) for p in params], *rest)


library.impl("gru", _gru_autocast_cuda, "AutocastCUDA")
library.impl("gru", _gru_autocast_cpu, "AutocastCPU")


# ---- vmap -----------------------------------------------------------------------------


def _fold(tensor: Tensor, dim: int | None, size: int, batch_dim: int) -> Tensor:
    """Merge the mapped dimension into the batch dimension (expanding an unmapped tensor)."""
    tensor = tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.movedim(0, batch_dim).flatten(batch_dim, batch_dim + 1)


@torch.library.register_vmap("torch_gru_fuse::gru_forward", lib=library)
def _gru_forward_vmap(
    info, in_dims, input, hx, params, has_biases, num_layers, bidirectional, dropout_masks, save
):
    input_dim, hx_dim, param_dims, *_, mask_dim, _ = in_dims
    n = info.batch_size
    if save or any(d is not None for d in param_dims):  # each sample has its own weights, or its own reserve
        return registration.loop_vmap(
            ops.gru_forward.default, n, in_dims,
            (input, hx, params, has_biases, num_layers, bidirectional, dropout_masks, save),
        )  # fmt: skip
    # One launch for all samples: they are more rows of the batch.
    masks = None if dropout_masks is None else _fold(dropout_masks, mask_dim, n, 2)
    output, h_n, reserve = ops.gru_forward.default(
        _fold(input, input_dim, n, 1), _fold(hx, hx_dim, n, 1), params, has_biases, num_layers, bidirectional, masks, save
    )
    return (output.unflatten(1, (n, -1)), h_n.unflatten(1, (n, -1)), reserve), (1, 1, None)


@torch.library.register_vmap("torch_gru_fuse::gru_backward", lib=library)
def _gru_backward_vmap(info, in_dims, *args):
    return registration.loop_vmap(ops.gru_backward.default, info.batch_size, in_dims, args)
