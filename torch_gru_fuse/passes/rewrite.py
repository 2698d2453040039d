"""The pass: calls of `torch.gru` and `torch.gru_cell` become calls of the ops of this package.

It runs on the graph as Dynamo (or `torch.export`) made it, before AOTAutograd; below that a GRU is
already unrolled over time.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.fx import Graph, GraphModule, Node

import torch_gru_fuse.ops  # noqa: F401  (registers the ops)
from torch_gru_fuse import torch_hooks
from torch_gru_fuse.ops.schemas import ops
from torch_gru_fuse.passes import guards

log = logging.getLogger("torch_gru_fuse")


@dataclass(frozen=True)
class Rewrite:
    """One call of `torch.gru` or `torch.gru_cell` that a compilation found.

    Attributes:
        target: "gru", "gru_packed" (the overload of torch.gru for a PackedSequence) or "gru_cell".
        module: path of the nn.Module that made the call, as "encoder.rnn (GRU)", or "".
        source: the user's line that made the call, as 'File "model.py", line 12, in forward', or "".
        reason: why it was left as it was; None where it was rewritten.
    """

    target: str
    module: str
    source: str
    reason: str | None = None

    @property
    def rewritten(self) -> bool:
        return self.reason is None

    def __str__(self) -> str:
        where = self.module or self.source or "a function"
        function = f"torch.{'gru' if self.target == 'gru_packed' else self.target}"
        if self.rewritten:
            return f"{function} in {where} -> torch_gru_fuse.{self.target}"
        return f"{function} in {where} not rewritten: {self.reason}"


@dataclass
class Settings:
    """How calls are rewritten.

    Attributes:
        recompute: GRUs keep nothing for their backward, which runs the forward again.
    """

    recompute: bool = False


settings = Settings()
_found: list[Rewrite] = []


def rewrites() -> list[Rewrite]:
    """The calls that compilations of this process found so far, oldest first."""
    return list(_found)


def clear_rewrites() -> None:
    """Forget what :func:`rewrites` returns."""
    _found.clear()


def _describe(target: str, node: Node, reason: str | None) -> Rewrite:
    module = ""
    stack = node.meta.get("nn_module_stack")
    if stack:
        path, kind = list(stack.values())[-1]
        path = re.sub(r"^[LG]\['\w+'\]\.?", "", path).replace("_modules.", "")
        name = kind.__name__ if isinstance(kind, type) else str(kind).rsplit(".", 1)[-1]
        module = f"{path} ({name})" if path else name
    frames = [
        line.strip()
        for line in (node.meta.get("stack_trace") or "").splitlines()
        if line.strip().startswith("File ") and "/torch/nn/modules/" not in line
    ]
    return Rewrite(target, module, frames[-1] if frames else "", reason)


def _replace(function: str, graph: Graph, node: Node) -> None:
    target = _target(function, node)
    bound = guards.bind(target, node)
    assert bound is not None
    options = {"recompute": True} if settings.recompute and target != "gru_cell" else {}
    with graph.inserting_before(node):
        fused = graph.call_function(getattr(ops, target).default, tuple(bound.values()), options)
    fused.meta.update(node.meta)
    node.replace_all_uses_with(fused)
    _found.append(record := _describe(target, node, None))
    log.debug("%s", record)


def _target(function: str, node: Node) -> str:
    """The op for a call of `torch.gru` or `torch.gru_cell`."""
    return guards.overload_of_gru(node) if function == "gru" else function


def _check(function: str, node: Node) -> bool:
    target = _target(function, node)
    reason = guards.why_not(target, node)
    if reason is not None:
        _found.append(record := _describe(target, node, reason))
        log.info("%s", record)
    return reason is None


@functools.cache
def _passes() -> dict[str, Callable[[Graph], int]]:
    """The patterns, named by meaning; built at the first compilation because they import Inductor."""
    aten = torch.ops.aten
    return {
        "gru": torch_hooks.call_pattern_pass(
            "torch_gru_fuse.gru", (torch.gru, aten.gru.input, aten.gru.data),
            functools.partial(_check, "gru"), functools.partial(_replace, "gru"),
        ),
        "gru_cell": torch_hooks.call_pattern_pass(
            "torch_gru_fuse.gru_cell", (torch.gru_cell, aten.gru_cell.default),
            functools.partial(_check, "gru_cell"), functools.partial(_replace, "gru_cell"),
        ),
    }


def rewrite_graph(graph: Graph) -> int:
    """Rewrite one graph in place; returns the number of replaced calls."""
    return sum(run(graph) for run in _passes().values())


def rewrite(gm: GraphModule) -> int:
    """Rewrite a graph module and the graph modules below it in place; returns the number of
    replaced calls."""
    total = 0
    for module in (gm, *torch_hooks.child_graphs(gm)):
        count = rewrite_graph(module.graph)
        if count:
            module.graph.lint()
            module.recompile()
        total += count
    return total


def cache_tag() -> str:
    """Distinguishes this version of the package, and what it makes of a graph, in the keys of compile caches."""
    return f"torch_gru_fuse-{torch_hooks.source_hash(Path(__file__).parents[1])}-{settings}"
