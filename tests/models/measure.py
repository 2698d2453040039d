"""A model of the catalogue, eager against compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from catalogue import Model
from problems import tensors
from rollup import value_and_grads
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_map_only

import torch_gru_fuse
from torch_gru_fuse import torch_hooks
from torch_gru_fuse.passes import guards
from torch_gru_fuse.passes.rewrite import rewrite
from torch_gru_fuse.switch import keep_dynamo_hook

OPS = {getattr(torch.ops.torch_gru_fuse, name).default: name for name in ("gru", "gru_packed", "gru_cell")}


class RewriteAndRun:
    """A backend that runs the pass, then PyTorch operation by operation; counts graphs, and calls of the ops as they run."""

    rewrites_gru = True

    def __init__(self) -> None:
        self.graphs = 0
        self.calls: dict[str, int] = {}

    def __call__(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        rewrite(gm)
        self.graphs += 1
        nodes = [n for m in (gm, *torch_hooks.child_graphs(gm)) for n in m.graph.nodes]
        found = [OPS[n.target] for n in nodes if n.op == "call_function" and n.target in OPS]

        def run(*args: Any) -> Any:
            for op in found:
                self.calls[op] = self.calls.get(op, 0) + 1
            return gm(*args)

        return run


class Graphs:
    """A backend that counts graphs, and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        return gm.forward


@dataclass(frozen=True)
class Problem:
    """A model and a call of it that can be repeated: with the same random numbers, and inputs that nobody has changed."""

    module: nn.Module
    args: tuple[Any, ...]
    seed: int = 1

    @property
    def inputs(self) -> list[Tensor]:
        return [*self.module.parameters(), *(t for t in tensors(self.args) if t.requires_grad)]

    def outputs_and_gradients(self, function: Callable[..., Any]) -> list[Tensor]:
        """Outputs, then the gradients of all parameters and inputs."""
        torch.manual_seed(self.seed)
        return value_and_grads(function, self.args, self.inputs)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def problem(model: Model) -> Problem:
    """The model with random weights, in training mode, and inputs that need gradients; under its default dtype."""
    torch.manual_seed(0)
    module, args = model.build()
    args = tree_map_only(Tensor, lambda t: t.requires_grad_() if t.is_floating_point() else t, args)
    return Problem(module.train(), args)


@contextlib.contextmanager
def cells_as_on_a_gpu() -> Iterator[None]:
    """Cells are rewritten on a CPU, too, where Inductor's code for them is as fast."""
    before = guards.GUARDS
    guards.GUARDS = tuple(g for g in before if g is not guards.profitable)
    try:
        yield
    finally:
        guards.GUARDS = before


@dataclass(frozen=True)
class Result:
    """What a compiled model computed and called, beside what it computes eagerly."""

    actual: list[Tensor]
    expected: list[Tensor]
    calls: dict[str, int]
    graphs: int
    graphs_without: int
    records: tuple[torch_gru_fuse.Rewrite, ...]

    @property
    def left(self) -> tuple[str, ...]:
        """Why loops and cells were left as they were."""
        return tuple(r.reason for r in self.records if r.reason is not None)

    @property
    def found(self) -> int:
        return sum(r.count for r in self.records)

    @property
    def error(self) -> float:
        """Greatest error of an output or gradient, in units of its greatest value (at least 1)."""
        return max(
            (a - e).abs().max().item() / max(1.0, e.abs().max().item())
            for a, e in zip(self.actual, self.expected, strict=True) if e.numel()
        )  # fmt: skip


def run(model: Model) -> Result:
    """The model with the pass, and without it."""
    keep_dynamo_hook()
    with default_dtype(model.dtype), cells_as_on_a_gpu():
        case = problem(model)
        expected = case.outputs_and_gradients(case.module)

        torch._dynamo.reset()
        without = Graphs()
        case.outputs_and_gradients(torch.compile(case.module, backend=without, dynamic=False))

        torch._dynamo.reset()
        torch_gru_fuse.clear_rewrites()
        backend = RewriteAndRun()
        actual = case.outputs_and_gradients(torch.compile(case.module, backend=backend, dynamic=False))
        torch._dynamo.reset()
    return Result(actual, expected, backend.calls, backend.graphs, without.graphs, tuple(torch_gru_fuse.rewrites()))
