"""The pass: calls of `torch.gru` and `torch.gru_cell`, loops over cells and hand-written cells become calls of the ops of this
package.

Loops come first (`loops.py`, `steps.py`), then the cells that are left, then calls of `torch.gru`; of what these have become,
two that can run at once become one (`pairs.py`).  It runs on the graph as Dynamo (or `torch.export`) made it, before
AOTAutograd; below that a GRU is already unrolled over time.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import getitem
from pathlib import Path

import torch
from torch.fx import Graph, GraphModule, Node

import torch_gru_fuse.ops  # noqa: F401  (registers the ops)
from torch_gru_fuse import torch_hooks
from torch_gru_fuse.ops.schemas import ops
from torch_gru_fuse.passes import buffers, cells, guards, layout, loops, pairs, steps
from torch_gru_fuse.passes.nodes import Emitter, Regions, aten, storages, value, write_positions

log = logging.getLogger("torch_gru_fuse")


@dataclass(frozen=True)
class Rewrite:
    """One GRU that a compilation found.

    Attributes:
        target: the op for it, "gru", "gru_packed" (the overload of torch.gru for a PackedSequence), "gru_pair" (two at once) or
            "gru_cell".
        module: path of the nn.Module that made the call, as "encoder.rnn (GRU)", or "".
        source: the user's line that made the call, as 'File "model.py", line 12, in forward', or "".
        reason: why it was left as it was; None where it was rewritten.
        found: what it was in the model, as "torch.gru_cell", "hand-written cell" or "loop of 12 steps over torch.gru_cell"; ""
            for the function of the same name as `target`.
        count: how many of the same place and reason were found.
        node: name of the call in the graph that took its place, "" where there is none.
        shared_with: of "gru_pair", the module or the line of the other of the two.
        alone: where the graph holds another sequence op, why the two are not one call; else "".
    """

    target: str
    module: str
    source: str
    reason: str | None = None
    found: str = ""
    count: int = 1
    node: str = ""
    shared_with: str = ""
    alone: str = ""

    @property
    def rewritten(self) -> bool:
        return self.reason is None

    @property
    def name(self) -> str:
        """What it was in the model."""
        return self.found or f"torch.{'gru_cell' if self.target == 'gru_cell' else 'gru'}"

    @property
    def place(self) -> str:
        """Where it was in the model."""
        return self.module or self.source or "a function"

    def __str__(self) -> str:
        where = self.place
        found = self.name + (f" ({self.count} times)" if self.count > 1 else "")
        if self.rewritten:
            shared = f", with {self.shared_with}" if self.shared_with else ""
            return f"{found} in {where} -> torch_gru_fuse.{self.target}{shared}"
        return f"{found} in {where} not rewritten: {self.reason}"


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


#: Files that a call passes on its way from the user's line: PyTorch's modules, and what is traced in their place.
_NOT_THE_USERS = ("/torch/nn/modules/", str(Path(__file__).parent))


def _record(target: str, node: Node, reason: str | None, *, found: str = "", count: int = 1, made: Node | None = None) -> None:
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
        if line.strip().startswith("File ") and not any(path in line for path in _NOT_THE_USERS)
    ]
    record = Rewrite(
        target, module, frames[-1] if frames else "", reason, found, count, "" if made is None else made.name
    )
    _found.append(record)
    log.log(logging.DEBUG if reason is None else logging.INFO, "%s", record)


def _replace(function: str, graph: Graph, node: Node) -> None:
    target = _target(function, node)
    bound = guards.bind(target, node)
    assert bound is not None
    with graph.inserting_before(node):
        fused = graph.call_function(getattr(ops, target).default, tuple(bound.values()), _options(target))
    fused.meta.update(node.meta)
    node.replace_all_uses_with(fused)
    _record(target, node, None, made=fused)


def _options(target: str) -> dict[str, object]:
    return {"recompute": True} if settings.recompute and target != "gru_cell" else {}


def _target(function: str, node: Node) -> str:
    """The op for a call of `torch.gru` or `torch.gru_cell`."""
    return guards.overload_of_gru(node) if function == "gru" else function


def _check(function: str, node: Node) -> bool:
    target = _target(function, node)
    reason = guards.why_not(target, node)
    if reason is not None:
        _record(target, node, reason)
    return reason is None


@functools.cache
def _passes() -> dict[str, Callable[[Graph], int]]:
    """The patterns, named by meaning; built at the first compilation because they import Inductor."""
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


def _rewrite_cells(graph: Graph) -> int:
    """Loops over cells, and hand-written cells, become calls of the ops; calls of `torch.gru_cell` that are in no loop stay."""
    regions = Regions()
    found = cells.find_cells(graph, regions)
    if buffers.forward_writes(graph, found.cells):
        regions.forget()
        found = cells.find_cells(graph, regions)
    if not found.cells and not found.others:
        return 0
    layout.stack_before_cat(graph, found.cells, regions)
    roller = loops.Roller(graph, found, regions, _options("gru"))
    count = 0
    for loop in roller.run():
        count += loop.reason is None
        _record_loop(loop)
    for (reason, _), nodes in _by_place(found.others).items():
        _record("gru_cell", nodes[-1], reason, found="hand-written cell", count=len(nodes))
    for cell in list(found.cells.values()):
        if cell.call:
            continue
        reason = guards.CELL_ON_CPU if guards.profitable in guards.GUARDS and _is_on_cpu(cell.node) else None
        made = None if reason else roller.fuse(cell)
        count += made is not None
        _record("gru_cell", cell.node, reason, found=cell.kind, made=made)
    return count


def _record_loop(loop: loops.Loop) -> None:
    text = f"loop of {loop.steps} {loop.unit} over {'' if loop.kind.startswith('torch') else 'a '}{loop.kind}"
    _record("gru", loop.last, loop.reason, found=text, made=loop.made)


def _roll_up_steps(graph: Graph) -> int:
    """Calls of `torch.gru` over some time steps each become one call of the op; those that are in no loop stay."""
    found = steps.Roller(graph, _options("gru")).run()
    for loop in found:
        _record_loop(loop)
    return sum(loop.reason is None for loop in found)


def _is_on_cpu(node: Node) -> bool:
    return value(node).device.type == "cpu"  # type: ignore[attr-defined]


def _by_place(reasons: dict[Node, str]) -> dict[tuple[str, str], list[Node]]:
    places: dict[tuple[str, str], list[Node]] = {}
    for node, reason in reasons.items():
        places.setdefault((reason, node.meta.get("stack_trace") or ""), []).append(node)
    return places


def _pair_up(graph: Graph, recorded: int) -> None:
    """Two calls of `gru` that can run at once become one, and what was recorded of them, after so many others, says so."""
    made, alone = pairs.pair_up(graph)
    places = {record.node: i for i, record in enumerate(_found) if i >= recorded and record.node}
    for node, reason in alone.items():
        if node in places:
            _found[places[node]] = replace(_found[places[node]], alone=reason)
    for pair in made:
        both = [places[node] for node in (pair.first, pair.second) if node in places]
        records = [_found[i] for i in both]
        for i, record, other in zip(both, records, reversed(records), strict=True):
            _found[i] = replace(record, target="gru_pair", node=pair.made.name, shared_with=other.place)
            log.debug("%s", _found[i])


def _copy_changed_outputs(graph: Graph) -> None:
    """Outputs of sequences that the graph changes in place are copied first: the backward of the op reads its output, that of
    PyTorch's own GRU on a CPU does not; and those of a pair are views of which autograd lets nobody change one."""
    written = set(write_positions(graph.nodes))
    for node in list(graph.nodes):
        outputs = []
        if node.target in (ops.gru.default, ops.gru_packed.default):
            outputs = [u for u in node.users if u.target is getitem and u.args[1] == 0]
        elif node.target is ops.gru_pair.default:  # all results, which are views
            outputs = [part for u in node.users for part in ([u] if u.args[1] < 2 else [p for s in u.users for p in s.users])]
        for output in outputs:
            if storages(output) & written:
                copy = Emitter(graph, output.next, output)(aten.clone.default, output)
                output.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)


def rewrite_graph(graph: Graph) -> int:
    """Rewrite one graph in place; returns the number of replaced calls."""
    recorded = len(_found)
    count = _rewrite_cells(graph) + _roll_up_steps(graph) + sum(run(graph) for run in _passes().values())
    if count:
        _pair_up(graph, recorded)
        _copy_changed_outputs(graph)
    return count


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


def inductor_options(gm: GraphModule) -> dict[str, object]:
    """What Inductor's configuration has to be for a graph.

    Ops that a CUDA graph may not hold keep their whole graph out of it.  Inductor would cut the graph around them, but hands
    the results of an op that has several to the next piece as one input, which that does not take (torch 2.11).
    """
    targets = {node.target for module in (gm, *torch_hooks.child_graphs(gm)) for node in module.graph.nodes}
    packed = {ops.gru_packed.default, ops.pack_padded.default, ops.pad_packed.default}
    return {} if targets.isdisjoint(packed) else {"graph_partition": False}


def cache_tag() -> str:
    """Distinguishes this version of the package, and what it makes of a graph, in the keys of compile caches."""
    return f"torch_gru_fuse-{torch_hooks.source_hash(Path(__file__).parents[1])}-{settings}"
