"""Models that call `nn.GRU` once a time step become one call of the sequence op.

    for t in range(T):
        output, h = self.gru(x[:, t : t + 1], h)
        outputs.append(output)
    return torch.cat(outputs, 1)

What makes that right is the same as for loops over cells (`loops.py`): the inputs of all steps are known where the last call
is, without any of the results before.  A call has several layers here, and of those below the last one the sequence op returns
no state but the last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from operator import getitem

import torch
from torch import Tensor
from torch.fx import Graph, Node

from torch_gru_fuse.ops.schemas import ops
from torch_gru_fuse.passes import guards
from torch_gru_fuse.passes.layout import SHORTEST, Stacked, as_sequence, write_at_once
from torch_gru_fuse.passes.loops import Loop, merge_layers
from torch_gru_fuse.passes.nodes import (
    EVERYTHING,
    RANDOM,
    Emitter,
    Region,
    Regions,
    Waiting,
    argument,
    aten,
    effects,
    erase_unused,
    name,
    same_sizes,
    shape,
    storages,
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
        outputs, states: nodes that take its output, [1, B, H] or [B, 1, H], and its last states, [L, B, H].
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
        self._by_output = {node: step for step in self.steps for node in step.outputs}

    def before(self, step: Step) -> Step | None:
        """The call whose last states are the first of this one."""
        whole = self._regions.of(step.hx)
        if whole.whole and whole.base in self._by_state:
            return self._by_state[whole.base]
        for dim in range(2):  # a model that keeps [B, H], or an unbatched call of nn.GRU
            inside = unsqueezed(step.hx, dim, 3)
            if inside is None:
                continue
            part = self._regions.of(inside)
            if part.base in self._by_state and part.extents == _without(dim) and _is_one(shape(part.base)[dim]):
                return self._by_state[part.base]
            by_output = self._by_output.get(part.base)
            if by_output is not None and dim == 0 and by_output.layers == 1 and part.extents == _without(by_output.time):
                return by_output
        if name(step.hx) in ("transpose", "swapaxes") and {argument(step.hx, i, "") for i in (1, 2)} == {0, 1}:
            by_output = self._by_output.get(step.hx.args[0])  # type: ignore[arg-type]
            if by_output is not None and by_output.layers == by_output.time == 1:
                return by_output
        return None

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


def _why_no_step(step: Step) -> str | None:
    """Why a call is no step of a sequence."""
    if not _is_one(shape(step.x)[step.time]):
        return "its calls have more than one time step"
    if step.options["bidirectional"]:
        return "it is bidirectional"
    if step.options["dropout"] and step.options["train"] and step.layers > 1:
        return "it draws a dropout mask for each step"
    return None


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
        if (reason := _why_no_step(last) or _why_no_step(step)) is not None:
            return reason
        if (step.params, step.layers, step.time) != (last.params, last.layers, last.time):
            return "the weights differ from those of the step before"
        if not same_sizes(shape(step.x), shape(first.x)):
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
        return not all(self._regions.of(u) == _of_last_layer(state, step.layers) for state, u in users)


def _of_last_layer(state: Node, layers: int) -> Region:
    return Region(state, (layers - 1, None, None))


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
        self._outputs: list[Node] = []  # of single steps, in the graph as it has become

    def run(self) -> list[Loop]:
        """Rewrites the graph; calls that are in no loop stay."""
        loops, refused = [], []
        chains = [c for c in _Chains(self._graph, self._regions).all() if len(c) >= SHORTEST]
        if chains:
            self._written = set(write_positions(self._graph.nodes))
        for chain in chains:
            start = 0
            while start < len(chain):
                segment = _Segment(chain[start], self._regions, self._is_written)
                reasons = (segment.take(step) for step in chain[start + 1 :])
                reason = next((r for r in reasons if r is not None), None)
                start += len(segment.steps)
                last = segment.steps[-1].node
                if len(segment.steps) >= SHORTEST:
                    loops.append(Loop(last, "torch.gru", len(segment.steps), made=self._roll(segment)))
                if reason is not None:
                    refused.append(Loop(chain[start].node, "torch.gru", 2, reason))
        if loops:
            self._give_strides()
            made = merge_layers(self._graph, [loop.made for loop in loops], set())  # type: ignore[misc]
            loops = [replace(loop, made=made[loop.made]) for loop in loops]  # type: ignore[index]
        return loops + _grouped(refused)

    def _give_strides(self) -> None:
        """Outputs of single steps get the strides that those of torch.gru have: with the batch first they are transposed."""
        for node in self._outputs:
            if node.users and node.args[1] == 1:
                emit = Emitter(self._graph, node, node)
                node.replace_all_uses_with(emit(aten.transpose.int, emit(aten.unsqueeze.default, node.args[0], 0), 0, 1))
        erase_unused(self._graph, [node for node in self._outputs if not node.users], ())

    def _is_written(self, *nodes: Node) -> bool:
        return bool(storages(*nodes) & self._written)

    def _roll(self, segment: _Segment) -> Node:
        graph, steps = self._graph, segment.steps
        first, last = steps[0], steps[-1]
        emit = Emitter(graph, last.node, last.node)
        x = as_sequence(emit, [self._input(step) for step in steps], [None] * len(steps))
        output, state = value(last.node)  # type: ignore[misc]
        assert isinstance(output, Tensor) and isinstance(state, Tensor)
        results = output.new_empty(len(steps), *state.shape[1:]), state.new_empty(state.shape)
        call = emit.known(
            results, ops.gru.default, x, first.hx, list(first.params), first.options["has_biases"], first.layers, 0.0,
            False, False, False, **self._options,
        )  # fmt: skip
        whole, h_n = (emit.known(results[i], getitem, call, i) for i in (0, 1))
        tops = [emit(aten.select.int, whole, 0, t) for t in range(len(steps))]

        anchor = last.node
        for node in segment.waiting:
            anchor.append(node)
            anchor = node
        results_of_steps = [n for step in steps for n in (*step.outputs, *step.states)]
        unused = [n for step in steps for n in (step.x, step.hx)]
        for step in steps:
            step.node.args, step.node.kwargs = (), {}
        erase_unused(graph, unused, {*results_of_steps, *(step.node for step in steps)})
        whole_outputs = []
        for step, top in zip(steps, tops, strict=True):
            for node in step.outputs:
                made = self._replace(emit, node, Region(node, _without(step.time)), top, step.time)
                whole_outputs += [] if made is None else [made]
            for node in step.states:
                if step is last:
                    node.replace_all_uses_with(h_n)
                else:
                    self._replace(emit, node, _of_last_layer(node, step.layers), top, 0)
        for node in (*results_of_steps, *(step.node for step in steps[:-1])):
            graph.erase_node(node)
        stacked = Stacked(graph, whole, tops, self._written).replace()
        write_at_once(graph, whole, tops, self._regions)
        erase_unused(graph, [*stacked, *tops, h_n], whole_outputs)
        graph.erase_node(last.node)
        self._outputs += whole_outputs
        self._regions.forget()
        return call

    def _input(self, step: Step) -> Region:
        """The input of a step, [B, I]."""
        inside = unsqueezed(step.x, step.time, 3)
        region = self._regions.of(step.x).select(step.time, 0) if inside is None else self._regions.of(inside)
        assert region is not None
        return region

    def _replace(self, emit: Emitter, node: Node, part: Region, top: Node, dim: int) -> Node | None:
        """Uses of a result of a step: `top` where they pick a part, else `top` with another dimension, which is returned."""
        for user in list(node.users):
            if self._regions.of(user) == part:
                user.replace_all_uses_with(top)
                self._graph.erase_node(user)
        if not node.users:
            return None
        made = emit(aten.unsqueeze.default, top, dim)
        node.replace_all_uses_with(made)
        return made


def _grouped(refused: list[Loop]) -> list[Loop]:
    """One record for all steps of a loop that were refused for one reason."""
    groups: dict[tuple[str | None, object], list[Loop]] = {}
    for loop in refused:
        groups.setdefault((loop.reason, loop.last.meta.get("stack_trace")), []).append(loop)
    return [replace(loops[-1], steps=len(loops) + 1) for loops in groups.values()]
