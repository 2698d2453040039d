"""Inputs and comparisons that several test files use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

ops = torch.ops.torch_gru_fuse


def gru_args(
    T=5, B=3, I=4, H=6, L=2, *, bidirectional=False, bias=True, batch_first=False, dropout=0.0, train=False,
    dtype=torch.float32, device="cpu", requires_grad=True,
):  # fmt: skip
    """The nine arguments of torch.gru, random."""
    module = torch.nn.GRU(I, H, L, bias=bias, bidirectional=bidirectional, dtype=dtype, device=device)
    params = [p.detach().requires_grad_(requires_grad) for p in module._flat_weights]
    options = {"dtype": dtype, "device": device, "requires_grad": requires_grad}
    x = torch.randn(*((B, T) if batch_first else (T, B)), I, **options)
    hx = torch.randn(L * (1 + bidirectional), B, H, **options)
    return x, hx, params, bias, L, dropout, train, bidirectional, batch_first


def packed_args(
    lengths=(5, 3, 3, 1), I=4, H=6, L=2, *, bidirectional=False, bias=True, dropout=0.0, train=False, dtype=torch.float32,
    device="cpu", requires_grad=True,
):  # fmt: skip
    """The nine arguments of torch.gru's overload for packed data, random; lengths do not increase."""
    _, _, params, *flags = gru_args(
        1, 1, I, H, L, bidirectional=bidirectional, bias=bias, dropout=dropout, train=train, dtype=dtype, device=device,
        requires_grad=requires_grad,
    )  # fmt: skip
    options = {"dtype": dtype, "device": device, "requires_grad": requires_grad}
    batch_sizes = torch.tensor([sum(length > t for length in lengths) for t in range(lengths[0])])
    data, hx = torch.randn(sum(lengths), I, **options), torch.randn(L * (1 + bidirectional), len(lengths), H, **options)
    return data, batch_sizes, hx, params, *flags[:-1]


def cell_args(B=3, I=4, H=6, *, bias=True, dtype=torch.float32, device="cpu", requires_grad=True):
    """The six arguments of torch.gru_cell, random."""
    module = torch.nn.GRUCell(I, H, bias=bias, dtype=dtype, device=device)
    params = [p.detach().requires_grad_(requires_grad) for p in module.parameters()]
    options = {"dtype": dtype, "device": device, "requires_grad": requires_grad}
    return torch.randn(B, I, **options), torch.randn(B, H, **options), *params, *([] if bias else [None, None])


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def value_and_grads(function: Callable[..., Any], args: Sequence[Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs of function(*args), then the gradients of a loss that no symmetry makes zero."""
    outputs = tensors(function(*args))
    loss = sum((o.double() * torch.linspace(0.5, 1.5, o.numel(), dtype=torch.float64).view(o.shape).to(o.device)).sum()
               for o in outputs)
    return [o.detach() for o in outputs] + list(torch.autograd.grad(loss, inputs))


def assert_same(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Greatest and RMS error below `tolerance` times the scale of the expected values (at least 1); dtypes and sizes equal."""
    assert len(actual) == len(expected)
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape and a.dtype == e.dtype, f"result {i}: {a.dtype} {a.shape}, expected {e.dtype} {e.shape}"
        if not e.numel():
            continue
        error = (a.double() - e.double()).abs()
        scale = max(1.0, e.double().abs().max().item())
        greatest, rms = error.max().item() / scale, error.square().mean().sqrt().item() / scale
        assert greatest <= tolerance and rms <= tolerance / 2, f"result {i}: error {greatest:.2e} max, {rms:.2e} rms"


def count_calls(function: Callable[[], Any]) -> tuple[Any, dict[str, int]]:
    """Run `function` and count the calls of this package's ops that reach a device, by name."""
    from torch.utils._python_dispatch import TorchDispatchMode

    counts: dict[str, int] = {}

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.namespace == "torch_gru_fuse":
                name = op._schema.name.split("::")[1]
                counts[name] = counts.get(name, 0) + 1
            return op(*args, **(kwargs or {}))

    with Counter():
        result = function()
    return result, counts
