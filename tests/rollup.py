"""Compiling with the pass alone: Dynamo's graph is rewritten and run by PyTorch, without Inductor."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from problems import assert_same, tensors
from torch import nn
from torch.fx import GraphModule

import torch_gru_fuse
from torch_gru_fuse.passes.rewrite import rewrite
from torch_gru_fuse.switch import keep_dynamo_hook


@dataclass
class Compiled:
    """The graph after the pass, what it calls, and the records."""

    gm: GraphModule
    calls: Counter
    records: list[torch_gru_fuse.Rewrite]

    @property
    def gru(self) -> int:
        return self.calls["torch_gru_fuse.gru.default"]

    @property
    def gru_cell(self) -> int:
        return self.calls["torch_gru_fuse.gru_cell.default"]

    @property
    def reasons(self) -> list[str]:
        return [r.reason for r in self.records if r.reason is not None]


def value_and_grads(function, args, inputs):
    """As in `problems`, for functions that do not use all of `inputs`."""
    outputs = tensors(function(*args))
    loss = sum((o * torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype, device=o.device).view(o.shape)).sum() for o in outputs)
    return [o.detach() for o in outputs] + list(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))


def compiled_graph(function, *args, **options):
    """The results of the rewritten function, and its one graph."""
    seen = []

    def backend(gm, inputs):
        rewrite(gm)
        gm.graph.lint()
        assert list(reversed(gm.graph.nodes)) == list(gm.graph.nodes)[::-1]  # linked in both directions
        seen.append(gm)
        return gm.forward

    backend.rewrites_gru = True
    keep_dynamo_hook()
    torch._dynamo.reset()
    torch_gru_fuse.clear_rewrites()
    compiled = torch.compile(function, backend=backend, fullgraph=True, **options)
    compiled(*args)
    [gm] = seen
    calls = Counter(str(n.target) if n.op == "call_function" else n.target for n in gm.graph.nodes)
    return compiled, Compiled(gm, calls, torch_gru_fuse.rewrites())


def check(model: nn.Module, *args, gru: int = 0, gru_cell: int = 0, tolerance: float = 1e-12, **options) -> Compiled:
    """Results, strides and gradients are those of eager PyTorch in float64, and the graph has so many calls of the ops."""
    model = model.double()
    inputs = [*model.parameters(), *(a for a in args if isinstance(a, torch.Tensor) and a.requires_grad)]
    expected = value_and_grads(model, args, inputs)
    compiled, graph = compiled_graph(model, *args, **options)
    assert_same(value_and_grads(compiled, args, inputs), expected, tolerance)
    for a, e in zip(tensors(compiled(*args)), tensors(model(*args)), strict=True):
        assert a.stride() == e.stride()
    assert (graph.gru, graph.gru_cell) == (gru, gru_cell), (graph.calls, graph.reasons)
    return graph


def x_of(*size: int) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.float64, requires_grad=True)
