"""The cell op: `gru_cell` made of `gru_cell_forward`, its backward, autocast and vmap rules."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_gru_fuse import torch_hooks
from torch_gru_fuse.ops import differentiable, dispatch, registration
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
        return torch_hooks.call_below(ops.gru_cell_forward.default, input, hx, w_ih, w_hh, b_ih, b_hh, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output[1])
        ctx.save_for_forward(*inputs)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, grad_h, _gates):
        if grad_h is None:
            return (None,) * 6
        needs = list(ctx.needs_input_grad)
        grads = iter(ops.gru_cell_backward.default(grad_h, *ctx.saved_tensors, needs))
        return tuple(next(grads) if need else None for need in needs)

    @staticmethod
    def jvp(ctx, *tangents):
        with torch_hooks.tangents_of_outer_levels(ctx.saved_tensors) as tensors:
            return differentiable.gru_cell_tangent(tensors, tangents), None


def _forward_autograd(input, hx, w_ih, w_hh, b_ih, b_hh, save):
    tensors = (input, hx, w_ih, w_hh, b_ih, b_hh)
    if registration.is_differentiated(tensors):
        return torch_hooks.apply_single_level(_GRUCellFunction, *tensors)
    with torch_hooks.below_autograd():
        return ops.gru_cell_forward.default(*tensors, save)


def _gradients(grad_h, *args):
    *tensors, needs = args
    return differentiable.gru_cell_gradients(grad_h, tensors, needs)


library.impl("gru_cell_forward", _forward_autograd, "Autograd")
registration.differentiable_backward("gru_cell_backward", _gradients, of_forward=1)


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


# Under vmap samples that share their weights are more rows of the batch: one launch.  Where weights, or gradients of weights,
# are each sample's own, the few operations of the differentiable formulation are mapped one by one: batched products.


def _fold(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """Merge the mapped dimension into the batch dimension (expanding an unmapped tensor)."""
    return (tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)).flatten(0, 1)


def _gru_cell_forward_vmap(info, in_dims, input, hx, w_ih, w_hh, b_ih, b_hh, save):
    n = info.batch_size
    rows = [_fold(t, dim, n) for t, dim in zip((input, hx), in_dims, strict=False)]
    h, gates = ops.gru_cell_forward.default(*rows, w_ih, w_hh, b_ih, b_hh, save)
    if gates.dim() == 1:  # nothing saved
        return (h.unflatten(0, (n, -1)), gates), (0, None)
    return (h.unflatten(0, (n, -1)), gates.unflatten(0, (n, -1))), (0, 0)


def _gru_cell_forward_composite(*args):
    *tensors, _save = args
    return differentiable.gru_cell(tensors), tensors[1].new_empty(0)


def _gru_cell_backward_vmap(info, in_dims, grad_h, input, hx, w_ih, w_hh, b_ih, b_hh, gates, needs):
    n = info.batch_size
    rows = [_fold(t, dim, n) for t, dim in zip((grad_h, input, hx), in_dims, strict=False)]
    gates_dim = in_dims[7]
    if gates_dim is not None or gates.dim() > 1:
        gates = _fold(gates, gates_dim, n)
    grads = ops.gru_cell_backward.default(*rows, w_ih, w_hh, b_ih, b_hh, gates, needs)
    return [grad.unflatten(0, (n, -1)) for grad in grads], [0] * len(grads)


def _gru_cell_backward_composite(*args):
    *variables, _gates, needs = args
    return _gradients(*variables, needs)


def _own_weights(in_dims, *args) -> bool:
    return any(d is not None for d in in_dims[2:6])


def _own_weights_or_their_gradients(in_dims, *args) -> bool:
    return any(d is not None for d in in_dims[3:7]) or any(args[-1][2:])


torch_hooks.register_vmap(library, "gru_cell_forward", _gru_cell_forward_vmap, _gru_cell_forward_composite, _own_weights)
torch_hooks.register_vmap(
    library, "gru_cell_backward", _gru_cell_backward_vmap, _gru_cell_backward_composite, _own_weights_or_their_gradients
)
