"""What the registrations of the ops have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from torch_gru_fuse import torch_hooks
from torch_gru_fuse.ops import dispatch
from torch_gru_fuse.ops.schemas import library, ops


def composite(name: str, function: Callable[..., Any]) -> None:
    """Register an op that is made of other ops: for every backend, for autograd and for vmap."""
    library.impl(name, function, "CompositeImplicitAutograd")
    library.impl(name, function, "FuncTorchBatchedDecomposition")


def is_differentiated(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call with these tensors has derivatives, of one mode or the other."""
    return (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)) or (
        torch_hooks.has_forward_tangent(tensors)
    )


class _BackwardFunction(torch_hooks.SingleLevelFunction):
    """Runs a backward op; its derivatives are those of `gradients`, the same function made of differentiable ops."""

    @staticmethod
    def forward(op, gradients, of_forward, needs, constants, spec, *leaves):
        return tuple(torch_hooks.call_below(op, *tree_unflatten(leaves, spec), *of_forward, needs, *constants))

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.gradients, _, ctx.needs, ctx.constants, ctx.spec, *leaves = inputs
        ctx.save_for_backward(*(leaf if isinstance(leaf, Tensor) else None for leaf in leaves))
        ctx.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *cotangents):
        create_graph = torch.is_grad_enabled()
        arrived = iter(cotangents)
        needs = [need and next(arrived) is not None for need in ctx.needs]
        leaves = [other if saved is None else saved for saved, other in zip(ctx.saved_tensors, ctx.others, strict=True)]
        first = len(ctx.needs_input_grad) - len(leaves)
        varied = [i for i, need in enumerate(ctx.needs_input_grad[first:]) if need]
        results: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        with torch.enable_grad(), torch_hooks.below_any_autocast():
            for i in varied:  # a view: it is varied alone, and not what it was made from
                leaves[i] = leaves[i].view_as(leaves[i])
            grads = ctx.gradients(*tree_unflatten(leaves, ctx.spec), needs, *ctx.constants)
            pairs = zip(grads, (c for c in cotangents if c is not None), strict=True)
            if pairs := [(grad, cotangent) for grad, cotangent in pairs if grad.requires_grad]:
                grads, cotangents = zip(*pairs, strict=True)
                inputs = [leaves[i] for i in varied]
                found = torch.autograd.grad(grads, inputs, cotangents, create_graph=create_graph, allow_unused=True)
                for i, grad in zip(varied, found, strict=True):
                    results[first + i] = grad
        return tuple(results)


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    """Those among arguments and in their lists."""
    found = []
    for arg in args:
        if isinstance(arg, Tensor):
            found.append(arg)
        elif isinstance(arg, list):
            found += [a for a in arg if isinstance(a, Tensor)]
    return found


def differentiable_backward(name: str, gradients: Callable[..., list[Tensor]], of_forward: int) -> None:
    """Register an autograd kernel for a backward op, so that gradients can be differentiated.

    The last arguments of the op are what the forward saved (`of_forward` of them), `needs` and, if it has any, constants.  What
    was saved is a function of the others and has no gradients of its own; `gradients` takes the rest.
    """
    op = getattr(ops, name).default
    i_needs = [argument.name for argument in op._schema.arguments].index("needs")

    def autograd(*args: Any) -> list[Tensor]:
        if not torch.is_grad_enabled() and torch_hooks.nothing_intercepts():  # nearly always
            with torch_hooks.below_autograd():
                return dispatch.direct(name, _tensors(args))(*args)
        variables, saved = args[: i_needs - of_forward], args[i_needs - of_forward : i_needs]
        needs, *constants = args[i_needs:]
        leaves, spec = tree_flatten(variables)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if torch_hooks.has_forward_tangent(tensors):
            return gradients(*variables, needs, *constants)
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            options = (op, gradients, saved, needs, constants, spec)
            return list(torch_hooks.apply_single_level(_BackwardFunction, *options, *leaves))
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
