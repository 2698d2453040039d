"""The cell op: `gru_cell` made of `gru_cell_forward`, its backward, autocast and vmap rules."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_gru_fuse import torch_hooks
from torch_gru_fuse.ops import dispatch, registration
from torch_gru_fuse.ops.checks import check_gru_cell
from torch_gru_fuse.ops.schemas import library, ops


def gru_cell_composite(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    check_gru_cell(input, hx, w_ih, w_hh, b_ih, b_hh)
    forward = dispatch.direct("gru_cell_forward", (input, hx, w_ih, w_hh, b_ih, b_hh))
    return forward(input, hx, w_ih, w_hh, b_ih, b_hh, False)[0]


registration.composite("gru_cell", gru_cell_composite)


class _GRUCellFunction(torch_hooks.SingleLevelFunction):
    """Differentiates `gru_cell_forward` by `gru_cell_backward`."""

    @staticmethod
    def forward(input, hx, w_ih, w_hh, b_ih, b_hh):
        with torch_hooks.below_autograd():
            return ops.gru_cell_forward.default(input, hx, w_ih, w_hh, b_ih, b_hh, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_h, _gates):
        if grad_h is None:
            return (None,) * 6
        needs = list(ctx.needs_input_grad)
        grads = iter(ops.gru_cell_backward.default(grad_h, *ctx.saved_tensors, needs))
        return tuple(next(grads) if need else None for need in needs)


def _forward_autograd(input, hx, w_ih, w_hh, b_ih, b_hh, save):
    tensors = (input, hx, w_ih, w_hh, b_ih, b_hh)
    registration.refuse_forward_mode("gru_cell", tensors)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return torch_hooks.apply_single_level(_GRUCellFunction, *tensors)
    with torch_hooks.below_autograd():
        return ops.gru_cell_forward.default(*tensors, save)


library.impl("gru_cell_forward", _forward_autograd, "Autograd")
registration.refuse_double_backward("gru_cell_backward")


def _gru_cell_autocast_cuda(*tensors):
    cast = registration.cast_to(torch.get_autocast_dtype("cuda"), "cuda")
    with torch_hooks.below_autocast("cuda"):
        return ops.gru_cell.default(*(cast(t) for t in tensors))


def _gru_cell_autocast_cpu(input, hx, *weights):
    # torch.gru_cell keeps the dtype of the hidden state under CPU autocast.
    cast = registration.cast_to(hx.dtype, "cpu")
    with torch_hooks.below_autocast("cpu"):
        return ops.gru_cell.default(cast(input), hx, *(cast(t) for t in weights))


library.impl("gru_cell", _gru_cell_autocast_cuda, "AutocastCUDA")
library.impl("gru_cell", _gru_cell_autocast_cpu, "AutocastCPU")


@torch.library.register_vmap("torch_gru_fuse::gru_cell_forward", lib=library)
def _gru_cell_forward_vmap(info, in_dims, input, hx, w_ih, w_hh, b_ih, b_hh, save):
    n = info.batch_size
    args = (input, hx, w_ih, w_hh, b_ih, b_hh, save)
    if any(d is not None for d in in_dims[2:6]):  # each sample has its own weights
        return registration.loop_vmap(ops.gru_cell_forward.default, n, in_dims, args)
    # One launch for all samples: they are more rows of the batch.
    rows = [
        (t.unsqueeze(0).expand(n, *t.shape) if d is None else t.movedim(d, 0)).flatten(0, 1)
        for t, d in zip((input, hx), in_dims, strict=False)
    ]
    h, gates = ops.gru_cell_forward.default(*rows, w_ih, w_hh, b_ih, b_hh, save)
    if gates.dim() == 1:
        return (h.unflatten(0, (n, -1)), gates), (0, None)
    return (h.unflatten(0, (n, -1)), gates.unflatten(0, (n, -1))), (0, 0)


@torch.library.register_vmap("torch_gru_fuse::gru_cell_backward", lib=library)
def _gru_cell_backward_vmap(info, in_dims, *args):
    return registration.loop_vmap(ops.gru_cell_backward.default, info.batch_size, in_dims, args)
