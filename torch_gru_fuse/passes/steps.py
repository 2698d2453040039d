"""Models that call `nn.GRU` once a time step, or once for some of them, become one call of the sequence op.

    for t in range(T):                                      for chunk in x.split(20, 1):
        output, h = self.gru(x[:, t : t + 1], h)                output, h = self.gru(chunk, h)
        outputs.append(output)                                  outputs.append(output)
    return torch.cat(outputs, 1)                            return torch.cat(outputs, 1)

What makes that right is the same as for loops over cells (`loops.py`): the inputs of all steps are known where the last call
is, without any of the results before.  A call has several layers here, and of those below the last one the sequence op returns
no state but the last.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from operator import getitem

import torch
from torch import Tensor
from torch.fx import Graph, Node

from torch_gru_fuse.ops.schemas import ops
from torch_gru_fuse.passes import guards
from torch_gru_fuse.passes.layout import SHORTEST, Part, Stacked, as_sequence, stack_before_cat, write_at_once
from torch_gru_fuse.passes.loops import Loop, merge_layers, why_changed
from torch_gru_fuse.passes.nodes import (
    EVERYTHING,
    RANDOM,
    Emitter,
    Extent,
    Region,
    Regions,
    Waiting,
    aten,
    effects,
    erase_unused,
    name,
    same_sizes,
    shape,
    storages,
    swapped,
    unsqueezed,
    value,
    write_positions,
)


@dataclass(eq=False)
class Step:
    """A call of `torch.gru`.

    Attributes:
        node: the call.
        params: its weights.
        options: has_biases, num_layers, dropout, train, bidirectional, batch_first.
        outputs, states: nodes that take its output, [n, B, H] or [B, n, H], and its last states, [L, B, H].
    """

    node: Node
    params: tuple[Node, ...]
    options: dict[str, object]
    outputs: list[Node] = field(default_factory=list)
    states: list[Node] = field(default_factory=list)

    # These two change when another loop is rolled up.

    @property
    def x(self) -> Node:
        return guards.bind("gru", self.node)["input"]  # type: ignore[index,return-value]

    @property
    def hx(self) -> Node:
        return guards.bind("gru", self.node)["hx"]  # type: ignore[index,return-value]

    @property
    def layers(self) -> int:
        return self.options["num_layers"]  # type: ignore[return-value]

    @property
    def time(self) -> int:
        """The dimension of time."""
        return 1 if self.options["batch_first"] else 0

    @property
    def length(self) -> int | None:
        """Its number of time steps, n, where that is a constant of the graph."""
        length = shape(self.x)[self.time]
        return length if type(length) is int and length > 0 else None

    def last(self, *, keeps_time: bool) -> tuple[Extent, ...]:
        """The last time step as a part of the output, with a dimension of time or without."""
        assert self.length is not None
        at = self.length - 1
        with_time = None if at == 0 else (at, at + 1)
        return tuple((with_time if keeps_time else at) if d == self.time else None for d in range(3))


def _step(node: Node) -> Step | None:
    """A node as a step, where it is a call of `torch.gru` that an op of this package can take the place of."""
    if node.op != "call_function" or node.target not in (torch.gru, aten.gru.input):
        return None
    if guards.overload_of_gru(node) != "gru" or guards.why_not("gru", node) is not None:
        return None
    bound = guards.bind("gru", node)
    assert bound is not None
    x, hx, params = bound.pop("input"), bound.pop("hx"), bound.pop("params")
    if not all(isinstance(n, Node) for n in (x, hx, *params)) or len(shape(x)) != 3 or len(shape(hx)) != 3:  # type: ignore
        return None
    if any(isinstance(option, Node) for option in bound.values()):
        return None
    if not all(user.target is getitem and user.args[1] in (0, 1) for user in node.users):
        return None
    step = Step(node, tuple(params), bound)  # type: ignore[arg-type]
    for user in node.users:
        (step.states if user.args[1] else step.outputs).append(user)
    return step


# ---- which of them follow one another ----------------------------------------------------------------------------------------


class _Chains:
    """The calls of a graph by what they make."""

    def __init__(self, graph: Graph, regions: Regions):
        self._regions = regions
        self.steps = [step for node in graph.nodes if (step := _step(node)) is not None]
        self._by_state = {node: step for step in self.steps for node in step.states}
        self._by_output = {  # where the last time step of the output is the last state
            node: step for step in self.steps if step.layers == 1 and step.length is not None for node in step.outputs
        }
        self.results = {node: step.params for step in self.steps for node in (*step.outputs, *step.states)}

    def before(self, step: Step) -> Step | None:
        """The call whose last states are the first of this one."""
        hx = self._regions.of(step.hx)
        if hx.whole and hx.base in self._by_state:
            return self._by_state[hx.base]
        if (before := self._by_output.get(hx.base)) is not None and before.time == 0:
            return before if hx.extents == before.last(keeps_time=True) else None
        for dim in range(2):  # a model that keeps [B, H], or an unbatched call of nn.GRU
            inside = unsqueezed(step.hx, dim, 3)
            if inside is None:
                continue
            part = self._regions.of(inside)
            if part.base in self._by_state and part.extents == _without(dim) and _is_one(shape(part.base)[dim]):
                return self._by_state[part.base]
            if dim == 0 and (before := self._by_output.get(part.base)) is not None:
                return before if part.extents == before.last(keeps_time=False) else None
        if (inside := swapped(step.hx)) is not None:
            part = self._regions.of(inside)
            if (before := self._by_output.get(part.base)) is not None and before.time == 1:
                return before if part.extents == before.last(keeps_time=True) else None
        return None

    def why_none_before(self, step: Step) -> str | None:
        """Why a call whose first states are made of those of a call before it does not follow that one."""
        return why_changed(self._regions.of(step.hx).base, step.params, self.results)

    def all(self) -> list[list[Step]]:
        """Calls that follow one another, in the order of the graph; each is in one list."""
        following: dict[Step, Step] = {}
        for step in self.steps:
            before = self.before(step)
            if before is not None and before not in following:
                following[before] = step
        behind = set(following.values())
        chains = []
        for step in self.steps:
            if step in behind:
                continue
            chain = [step]
            while chain[-1] in following:
                chain.append(following[chain[-1]])
            chains.append(chain)
        return chains


def _without(dim: int) -> tuple[int | None, ...]:
    """The extents of [.., 1, ..] without its dimension of that size."""
    return tuple(0 if d == dim else None for d in range(3))


def _is_one(size: object) -> bool:
    return type(size) is int and size == 1


# ---- which of them can be one call -------------------------------------------------------------------------------------------


def _why_no_part(step: Step) -> str | None:
    """Why a call is no part of a longer sequence."""
    if step.length is None:
        return "the number of time steps of a call is no constant of the graph"
    if step.options["bidirectional"]:
        return "it is bidirectional"
    if step.options["dropout"] and step.options["train"] and step.layers > 1:
        return "it draws a dropout mask for each call"
    return None


def _sizes(step: Step) -> list[object]:
    """B and the size of the input."""
    return [size for d, size in enumerate(shape(step.x)) if d != step.time]


class _Segment:
    """Calls from the start of a chain on that can be one; `take` adds one, or says why not."""

    def __init__(self, first: Step, regions: Regions, is_written: Callable[..., bool]):
        self.steps = [first]
        self.waiting: list[Node] = []  # nodes in between that have to come after the call
        self._regions, self._is_written = regions, is_written
        self._order = Waiting()
        self._seed(first)

    def _seed(self, step: Step) -> None:
        self._order.start(step.node, storages(step.x, step.hx, *step.params))

    def take(self, step: Step) -> str | None:
        last, first, order = self.steps[-1], self.steps[0], self._order
        if (reason := _why_no_part(last) or _why_no_part(step)) is not None:
            return reason
        if (step.params, step.layers, step.time) != (last.params, last.layers, last.time):
            return "the weights differ from those of the step before"
        if not same_sizes(_sizes(step), _sizes(first)):
            return "its inputs differ in size from step to step"
        if not _same_dtypes(first, step):
            return "autocast changes its dtype from step to step"
        if last.layers > 1 and self._shows_lower_layers(last, step):
            return "the hidden states of its lower layers are used between the steps"
        pending = []
        node = last.node.next
        while node is not step.node:
            if order.visit(node):
                pending.append(node)
            if EVERYTHING in effects(node).writes:
                return f"between the steps is an operation of unknown effect, {name(node) or node.target}"
            node = node.next
        needed = {step.x, *step.params}
        if needed & order.data:
            return "its input at a step depends on the hidden state of the step before"
        if needed & order.any or storages(*needed) & order.written:
            if RANDOM in order.written:
                return "random numbers are drawn both for its inputs and from its hidden states; their order would change"
            return "memory that it reads is changed in place between the steps"
        if self._is_written(*last.outputs, *last.states):
            return "what it returns is changed in place"
        self._seed(step)
        self.steps.append(step)
        self.waiting += pending
        return None

    def _shows_lower_layers(self, step: Step, following: Step) -> bool:
        """Whether something else than the next call needs more of the states of a call than those of its last layer."""
        way = {following.node}
        node = following.hx
        while node not in step.states:
            if set(node.users) - way or not isinstance(node.args[0], Node):
                return True
            way.add(node)
            node = node.args[0]
        users = [(state, user) for state in step.states for user in state.users if user not in way]
        return not all(self._regions.of(u) in _of_last_layer(state, step.layers) for state, u in users)


def _of_last_layer(state: Node, layers: int) -> tuple[Region, Region]:
    """The states of the last layer, [B, H] and [1, B, H]."""
    return Region(state, (layers - 1, None, None)), Region(state, ((layers - 1, layers) if layers > 1 else None, None, None))


def _same_dtypes(first: Step, step: Step) -> bool:
    """Whether all tensors have the same dtype, or autocast does the same to each step as to all at once."""
    output, state = value(step.node)  # type: ignore[misc]
    tensors = [value(n) for n in (first.x, first.hx, step.x, step.hx, *step.params)]
    dtypes = {t.dtype for t in tensors}  # type: ignore[union-attr]
    if value(step.x).dtype != value(first.x).dtype or output.dtype != state.dtype:  # type: ignore[union-attr]
        return False
    if value(first.node)[0].dtype != output.dtype:  # type: ignore[index]
        return False
    return dtypes == {output.dtype} or output.device.type == "cuda" or value(first.hx).dtype == output.dtype  # type: ignore


# ---- the call ----------------------------------------------------------------------------------------------------------------


class Roller:
    """Rolls up the calls of one graph."""

    def __init__(self, graph: Graph, options: dict[str, object]):
        self._graph, self._options = graph, options
        self._regions = Regions()
        self._written: set[object] = set()

    def run(self) -> list[Loop]:
        """Rewrites the graph; calls that are in no loop stay."""
        loops, refused = [], []
        calls = _Chains(self._graph, self._regions)
        chains = calls.all()
        for chain in chains:
            if calls.before(chain[0]) is None and (reason := calls.why_none_before(chain[0])) is not None:
                refused.append(_loop([chain[0]], reason))
        chains = [c for c in chains if len(c) >= SHORTEST]
        if chains:
            stack_before_cat(self._graph, calls.results, self._regions)
            self._written = set(write_positions(self._graph.nodes))
        for chain in chains:
            start = 0
            while start < len(chain):
                segment = _Segment(chain[start], self._regions, self._is_written)
                reasons = (segment.take(step) for step in chain[start + 1 :])
                reason = next((r for r in reasons if r is not None), None)
                start += len(segment.steps)
                if len(segment.steps) >= SHORTEST:
                    loops.append(replace(_loop(segment.steps), made=self._roll(segment)))
                if reason is not None:
                    refused.append(_loop([chain[start]], reason))
        if loops:
            made = merge_layers(self._graph, [loop.made for loop in loops], set())  # type: ignore[misc]
            loops = [replace(loop, made=made[loop.made]) for loop in loops]  # type: ignore[index]
        return loops + _grouped(refused)

    def _is_written(self, *nodes: Node) -> bool:
        return bool(storages(*nodes) & self._written)

    def _roll(self, segment: _Segment) -> Node:
        graph, steps = self._graph, segment.steps
        first, last = steps[0], steps[-1]
        emit = Emitter(graph, last.node, last.node)
        inputs = [part for step in steps for part in self._inputs(step)]
        x = as_sequence(emit, inputs, [None] * len(inputs))
        output, state = value(last.node)  # type: ignore[misc]
        assert isinstance(output, Tensor) and isinstance(state, Tensor)
        results = output.new_empty(len(inputs), *state.shape[1:]), state.new_empty(state.shape)
        call = emit.known(
            results, ops.gru.default, x, first.hx, list(first.params), first.options["has_biases"], first.layers, 0.0,
            False, False, False, **self._options,
        )  # fmt: skip
        whole, h_n = (emit.known(results[i], getitem, call, i) for i in (0, 1))
        ends = list(itertools.accumulate(step.length for step in steps))  # type: ignore[arg-type]
        tops = [emit(aten.select.int, whole, 0, end - 1) for end in ends]
        # With the batch first outputs have the strides that those of torch.gru have: they are transposed.
        outputs = whole if last.time == 0 else emit(aten.transpose.int, whole, 0, 1)
        spans = list(zip((0, *ends), ends, strict=False))
        slices = [emit(aten.slice.Tensor, outputs, last.time, *span) for span in spans]
        last_of_outputs = [step.last(keeps_time=False) for step in steps]

        anchor = last.node
        for node in segment.waiting:
            anchor.append(node)
            anchor = node
        results_of_steps = [n for step in steps for n in (*step.outputs, *step.states)]
        unused = [n for step in steps for n in (step.x, step.hx)]
        for step in steps:
            step.node.args, step.node.kwargs = (), {}
        erase_unused(graph, unused, {*results_of_steps, *(step.node for step in steps)})
        for step, top, part, extents in zip(steps, tops, slices, last_of_outputs, strict=True):
            both_leave = all(any(_leaves(node) for node in nodes) for nodes in (step.outputs, step.states))
            for node in step.outputs:
                self._replace(node, Region(node, extents), top)
                node.replace_all_uses_with(part)
            for node in step.states:
                if step is last:
                    node.replace_all_uses_with(h_n)
                    continue
                state = emit(aten.clone.default, top) if both_leave else top
                layer = emit(aten.unsqueeze.default, state, 0)
                for region, by in zip(_of_last_layer(node, step.layers), (state, layer), strict=True):
                    self._replace(node, region, by)
                node.replace_all_uses_with(layer)
                erase_unused(graph, [layer], (state,))
        for node in (*results_of_steps, *(step.node for step in steps[:-1])):
            graph.erase_node(node)
        parts = [Part(top, whole, range(end - 1, end)) for top, end in zip(tops, ends, strict=True)]
        parts += [Part(part, whole, range(*span), last.time) for part, span in zip(slices, spans, strict=True)]
        stacked = Stacked(graph, parts, self._written).replace()
        write_at_once(graph, parts, self._regions)
        erase_unused(graph, [*stacked, *tops, *slices, outputs, h_n], ())
        graph.erase_node(last.node)
        self._regions.forget()
        return call

    def _inputs(self, step: Step) -> list[Region]:
        """The inputs of its time steps, each [B, I]."""
        if (inside := unsqueezed(step.x, step.time, 3)) is not None:
            return [self._regions.of(inside)]
        return self._regions.of(step.x).unbind(step.time)

    def _replace(self, node: Node, part: Region, by: Node) -> None:
        """Replaces what picks a part of a result of a step."""
        for user in list(node.users):
            if self._regions.of(user) == part:
                user.replace_all_uses_with(by)
                self._graph.erase_node(user)


def _leaves(node: Node) -> bool:
    """Whether a tensor, or a view of it, is a result of the graph."""
    return any(user.op == "output" or (storages(user) & storages(node) and _leaves(user)) for user in node.users)


def _loop(steps: list[Step], reason: str | None = None) -> Loop:
    unit = "steps" if all(step.length == 1 for step in steps) else "chunks"
    return Loop(steps[-1].node, "torch.gru", len(steps), reason, unit=unit)


def _grouped(refused: list[Loop]) -> list[Loop]:
    """One record for all steps of a loop that were refused for one reason."""
    groups: dict[tuple[object, ...], list[Loop]] = {}
    for loop in refused:
        groups.setdefault((loop.reason, loop.unit, loop.last.meta.get("stack_trace")), []).append(loop)
    return [replace(loops[-1], steps=len(loops) + 1) for loops in groups.values()]
