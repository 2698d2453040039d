"""What becomes of the GRUs of a model: `torch_gru_fuse.explain(model, *args)`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from torch_gru_fuse import switch, torch_hooks
from torch_gru_fuse.ops import packed_path
from torch_gru_fuse.ops.call import GRUCall, PackedCall, PairCall
from torch_gru_fuse.ops.schemas import ops
from torch_gru_fuse.ops.support import why_not_kernels
from torch_gru_fuse.passes.nodes import value
from torch_gru_fuse.passes.rewrite import Rewrite, rewrite, rewrites
from torch_gru_fuse.planner.plan import plan_gru_cell


@dataclass(frozen=True)
class Entry:
    """A GRU, a cell or a loop over a cell that was found in a model.

    Attributes:
        found: what it is, as "torch.gru", "hand-written cell" or "loop of 12 steps over torch.gru_cell".
        module: path and class of the module that it belongs to, or "".
        file, line, function: its place in the user's source; "", 0 and "" where that is not known.
        op: the op that took its place, as "torch_gru_fuse.gru"; None where nothing did.
        plan: what runs the op, for the sizes of this call.
        calls: how often it ran in this call of the model.
        reason: why it was left as it was, None where it was not.
        shared_with: the module, or the place in the source, of another GRU with which it shares one call, or "".
        alone: why it shares none, where the graph holds another GRU; "" where it does, or there is none.
    """

    found: str
    module: str
    file: str
    line: int
    function: str
    op: str | None
    plan: str | None
    calls: int
    reason: str | None
    shared_with: str = ""
    alone: str = ""

    @property
    def rewritten(self) -> bool:
        return self.op is not None

    def __str__(self) -> str:
        times = "1 call" if self.calls == 1 else f"{self.calls} calls"
        place = f"{self.file}:{self.line} in {self.function}" if self.file else "place unknown"
        shared = f" shared with {self.shared_with}" if self.shared_with else ""
        became = f"-> {self.op}, {times}{shared}: {self.plan}" if self.rewritten else (
            f"not rewritten{f' ({times})' if self.calls else ''}: {self.reason}")
        if self.alone:
            became += f"\n    shares no launch with another GRU: {self.alone}"
        return f"{self.found}{f', {self.module}' if self.module else ''}\n    {place}\n    {became}"


@dataclass(frozen=True)
class Explanation:
    """What `explain` found.

    Attributes:
        entries: in the order in which they were compiled.
        graphs: into how many graphs the call was compiled; more than one means that graphs were broken or compiled anew.
    """

    entries: tuple[Entry, ...]
    graphs: int

    @property
    def rewritten(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.rewritten)

    @property
    def not_rewritten(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if not e.rewritten)

    def __str__(self) -> str:
        graphs = "1 graph" if self.graphs == 1 else f"{self.graphs} graphs"
        if not self.entries:
            return f"No GRU, GRU cell or loop over one was found in {graphs}."
        head = f"Found {len(self.entries)} in {graphs}: {len(self.rewritten)} rewritten, {len(self.not_rewritten)} not."
        return "\n".join([head, *(f"{'+' if e.rewritten else '-'} {e}" for e in self.entries)])


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Compile and run ``model(*args, **kwargs)`` once with the rewrite, and say what became of each GRU in it.

    Whether :func:`enable` was called makes no difference, and nothing that is compiled already is used or replaced.  The graphs
    that Dynamo makes are rewritten as for ``torch.compile``; then PyTorch runs them operation by operation, without Inductor,
    which takes seconds instead of minutes.  The call is a real one: it moves running statistics and random numbers as any
    call does.

    Calls are those of this run: how often each graph ran, which is how often an op in it did.  An op in a branch of
    `torch.cond` counts whether its branch was taken or not.  Gradients are recorded, and plans are those for training, where
    gradients are enabled and something needs them; call it under `torch.no_grad()` for inference.

    Args:
        model: a module or function; of a compiled module, the module.
        args, kwargs: what to call it with.

    Example:
        >>> print(torch_gru_fuse.explain(model, x))
        Found 1 in 1 graph: 1 rewritten, 0 not.
        + loop of 12 steps over torch.gru_cell, cell (GRUCell)
            model.py:12 in forward
            -> torch_gru_fuse.gru, 1 call: PyTorch's own GRU (the kernels need a CUDA device, the tensors are on cpu)
    """
    model = getattr(model, "_orig_mod", model)
    graphs: list[_Graph] = []
    before = len(rewrites())

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        start = len(rewrites())
        rewrite(gm)
        graph = _Graph(gm, rewrites()[start:])
        graphs.append(graph)
        return graph

    backend.rewrites_gru = True  # type: ignore[attr-defined]
    installed = switch.dynamo_hook.installed
    switch.dynamo_hook.install()
    try:
        with torch_hooks.without_recompile_limit():
            torch.compile(lambda: model(*args, **kwargs), backend=backend, dynamic=False)()
    finally:
        if not installed:
            switch.dynamo_hook.remove()

    in_graphs = [entry for graph in graphs for entry in graph.entries()]
    records = rewrites()[before:]
    of_graphs = [id(r) for graph in graphs for r in graph.records]
    breaks = [_entry(r, None, 0) for r in records if id(r) not in of_graphs]
    return Explanation(tuple(_merged([*in_graphs, *breaks])), len(graphs))


class _Graph:
    """A graph that was compiled: counts how often it runs."""

    def __init__(self, gm: GraphModule, records: list[Rewrite]):
        self._gm, self.records, self._runs = gm, records, 0

    def __call__(self, *args: Any) -> Any:
        self._runs += 1
        return self._gm(*args)

    def entries(self) -> Iterator[Entry]:
        nodes = {
            n.name: n for m in (self._gm, *torch_hooks.child_graphs(self._gm)) for n in m.graph.nodes if n.op == "call_function"
        }
        for record in self.records:
            node = nodes.get(record.node) if record.rewritten else None
            yield _entry(record, node, self._runs * record.count)


def _entry(record: Rewrite, node: Node | None, calls: int) -> Entry:
    match = re.match(r'File "(.*)", line (\d+), in (?:torch_dynamo_resume_in_)?(.*?)(?:_at_\d+)?$', record.source)
    file, line, function = match.groups() if match else ("", "0", "")
    return Entry(
        record.name, record.module, file, int(line), function,
        f"torch_gru_fuse.{record.target}" if record.rewritten else None,
        None if node is None else _plan(node), calls, record.reason, record.shared_with, record.alone,
    )  # fmt: skip


def _merged(entries: list[Entry]) -> Iterator[Entry]:
    """Entries that differ in nothing but the number of calls are one."""
    calls: dict[Entry, int] = {}
    for entry in entries:
        key = replace(entry, calls=0)
        calls[key] = calls.get(key, 0) + entry.calls
    return (replace(entry, calls=count) for entry, count in calls.items())


def _plan(node: Node) -> str:
    """What runs a call of an op, for the sizes that it was compiled with."""
    tensors = torch.fx.node.map_arg(node.args, value)
    first: Tensor = tensors[0][0] if node.target is ops.gru_pair.default else tensors[0]  # type: ignore[index,assignment]
    reason = why_not_kernels(first)
    if first.device.type != "cuda":
        return f"PyTorch's own GRU ({reason})"
    if node.target is ops.gru_cell.default:
        x, h, *weights = tensors  # type: ignore[misc]
        plan = plan_gru_cell(
            x.shape[0], x.shape[1], h.shape[1], str(x.dtype), tf32_allowed=torch_hooks.matmul_allows_tf32(),
            training=_is_differentiated([x, h, *weights]), unsupported=reason,
        )  # fmt: skip
    elif node.target is ops.gru_pair.default:
        from torch_gru_fuse.ops.kernel_path import plan_of_pair  # imports Triton

        inputs, h, params, has_biases, reverse, batch_first = tensors  # type: ignore[misc]
        training = _is_differentiated([*inputs, h, *params])
        inputs = [x.transpose(0, 1) if batch_first else x for x in inputs]
        both = plan_of_pair(PairCall(inputs, h, params, has_biases, reverse), training=training)
        if isinstance(both, str):
            return f"two calls ({both})"
        plan = both
    elif node.target is ops.gru_packed.default:
        data, sizes, h, params, has_biases, layers, _, _, bidirectional = tensors  # type: ignore[misc]
        call = PackedCall(data, sizes, h, params, has_biases, layers, bidirectional, None)
        if torch_hooks.depends_on_data(call.T) or torch_hooks.depends_on_data(call.B):
            return "by the lengths of each call, a kernel of whole sequences or PyTorch's own GRU (cuDNN)"
        plan = packed_path.plan_of(call, training=_is_differentiated([data, h, *params]))
    else:
        from torch_gru_fuse.ops.kernel_path import plan_uncaptured  # imports Triton

        x, h, params, has_biases, layers, _, _, bidirectional, batch_first = tensors  # type: ignore[misc]
        keep = next((k for k in (node.kwargs.get("resets"), node.kwargs.get("keep")) if k is not None), None)
        call = GRUCall(x.transpose(0, 1) if batch_first else x, h, params, has_biases, layers, bidirectional, None, keep)
        plan = plan_uncaptured(call, training=_is_differentiated([x, h, *params]))
    own = "PyTorch's own GRU (cuDNN)" if plan.kernel == "torch" else f"kernel '{plan.kernel}'"
    return f"{own} ({plan.reason})"


def _is_differentiated(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
