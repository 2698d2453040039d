"""What the registrations of the ops have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_gru_fuse import torch_hooks
from torch_gru_fuse.ops.schemas import library, ops


def composite(name: str, function: Callable[..., Any]) -> None:
    """Register an op that is made of other ops: for every backend, for autograd and for vmap."""
    library.impl(name, function, "CompositeImplicitAutograd")
    library.impl(name, function, "FuncTorchBatchedDecomposition")


def refuse_forward_mode(name: str, tensors: Iterable[Tensor | None]) -> None:
    if torch_hooks.has_forward_tangent(tensors):
        raise NotImplementedError(
            f"torch_gru_fuse.{name}: forward-mode AD (torch.func.jvp, dual tensors) is not supported "
            f"yet; call torch.{name} or an uncompiled nn module for that"
        )


class _NoDoubleBackward(torch_hooks.SingleLevelFunction):
    """Runs a backward op and refuses to be differentiated again."""

    @staticmethod
    def forward(op, arg_spec, *leaves):
        with torch_hooks.below_autograd():
            return tuple(op(*torch.utils._pytree.tree_unflatten(list(leaves), arg_spec)))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = inputs[0]._schema.name.split("::")[1].removesuffix("_backward")

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(
            f"torch_gru_fuse.{ctx.name}: double backward (create_graph=True followed by another "
            f"derivative) is not supported yet; call torch.{ctx.name} or an uncompiled nn module for that"
        )


def refuse_double_backward(name: str) -> None:
    """Register an autograd kernel for a backward op that raises when it is differentiated."""
    op = getattr(ops, name).default

    def autograd(*args: Any) -> list[Tensor]:
        leaves, spec = torch.utils._pytree.tree_flatten(args)
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in leaves):
            return list(torch_hooks.apply_single_level(_NoDoubleBackward, op, spec, *leaves))
        with torch_hooks.below_autograd():
            return op(*args)

    library.impl(name, autograd, "Autograd")


def cast_to(dtype: torch.dtype, device_type: str) -> Callable[[Tensor | None], Tensor | None]:
    """What autocast does to an argument: convert floating-point tensors, but not float64."""

    def cast(tensor: Tensor | None) -> Tensor | None:
        if (
            tensor is None
            or tensor.dtype == dtype
            or not tensor.is_floating_point()
            or tensor.dtype == torch.float64
            or tensor.device.type != device_type
        ):
            return tensor
        return tensor.to(dtype)

    return cast


def loop_vmap(
    op: Callable[..., Any], batch_size: int, in_dims: Sequence[Any], args: Sequence[Any]
) -> tuple[Any, Any]:
    """A vmap rule that calls `op` once for every sample and stacks the results."""

    def pick(arg: Any, dim: Any, i: int) -> Any:
        if isinstance(arg, (list, tuple)) and isinstance(dim, (list, tuple)):
            return [pick(a, d, i) for a, d in zip(arg, dim, strict=True)]
        return arg if dim is None or not isinstance(arg, Tensor) else arg.select(dim, i)

    results = [
        op(*(pick(arg, dim, i) for arg, dim in zip(args, in_dims, strict=True)))
        for i in range(batch_size)
    ]
    stacked = [torch.stack(parts) for parts in zip(*results, strict=True)]
    dims = [0] * len(stacked)
    return (stacked, dims) if isinstance(results[0], list) else (tuple(stacked), tuple(dims))
