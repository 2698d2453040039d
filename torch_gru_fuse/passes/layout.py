"""Time steps as one tensor: what each step of a loop reads becomes the input of one call, and what is made of all steps, by
`stack`, by `cat` or by writing to a tensor, becomes the output of that call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import Graph, Node

from torch_gru_fuse.passes.nodes import (
    EVERYTHING,
    Emitter,
    Region,
    Regions,
    argument,
    aten,
    effects,
    indexed,
    name,
    same_sizes,
    shape,
    storages,
    unsqueezed,
    value,
)

#: The fewest steps that are rolled up.
SHORTEST = 2

# ---- what the steps read -----------------------------------------------------------------------------------------------------


def as_sequence(emit: Emitter, parts: Sequence[Region], nodes: Sequence[Node | None]) -> Node:
    """What there is of each step as one tensor, time first: slices of one tensor as a range of it, others stacked.

    nodes: where a node holds a part, that node.
    """
    pieces: list[Node] = []
    single: list[Node] = []

    def stack() -> None:
        if single:
            pieces.append(emit(aten.stack.default, list(single), 0))
            single.clear()

    at = 0
    while at < len(parts):
        end, dim, step = _slices(parts, at)
        if end - at >= SHORTEST:
            stack()
            pieces.append(_range(emit, parts[at], dim, step, end - at))
        else:
            node = nodes[at]
            single.append(emit.region(parts[at]) if node is None else node)
        at = end
    stack()
    return pieces[0] if len(pieces) == 1 else emit(aten.cat.default, pieces, 0)


def _slices(parts: Sequence[Region], start: int) -> tuple[int, int, int]:
    """The regions from `start` on that lie one after the other along a dimension: where they end, the dimension, and the step
    from one to the next, 0 where all are the same."""
    first = parts[start]
    if start + 1 == len(parts) or len(first.extents) != len(parts[start + 1].extents):
        return start + 1, 0, 0
    differing = [d for d, (a, b) in enumerate(zip(first.extents, parts[start + 1].extents, strict=True)) if a != b]
    if len(differing) > 1:
        return start + 1, 0, 0
    dim, step = 0, 0
    if differing:
        [dim] = differing
        index, following = first.extents[dim], parts[start + 1].extents[dim]
        if not isinstance(index, int) or not isinstance(following, int):
            return start + 1, 0, 0
        step = following - index
    end = start + 1
    while end < len(parts):
        expected = first if not step else first.replace(dim, first.extents[dim] + step * (end - start))  # type: ignore[operator]
        if parts[end] != expected:
            break
        end += 1
    return end, dim, step


def _range(emit: Emitter, first: Region, dim: int, step: int, count: int) -> Node:
    """`count` regions, from `first` on with `step` between, along a new first dimension."""
    if step == 0:
        return emit(aten.expand.default, emit(aten.unsqueeze.default, emit.region(first), 0), [count, *[-1] * len(first.sizes)])
    start = first.extents[dim]
    assert isinstance(start, int)
    base = emit.region(first.replace(dim, None))
    dim -= sum(isinstance(e, int) for e in first.extents[:dim])
    if dim != 0:
        base = emit(aten.movedim.int, base, dim, 0)
    low, high = sorted((start, start + step * (count - 1)))
    if (low, high + 1, abs(step)) != (0, shape(base)[0], 1):
        base = emit(aten.slice.Tensor, base, 0, low, high + 1, abs(step))
    return base if step > 0 else emit(aten.flip.default, base, [0])


# ---- hidden states that are stacked ------------------------------------------------------------------------------------------

_CATS = ("cat", "concat", "concatenate")


class Stacked:
    """Replaces `stack` and `cat` of the hidden states of a loop by its output."""

    def __init__(self, graph: Graph, output: Node, states: Sequence[Node], written: set[object]):
        self._graph, self._output, self._states, self._written = graph, output, states, written
        self._step = {node: t for t, node in enumerate(states)}
        self._given = False

    def replace(self) -> dict[Node, Node]:
        """Returns the nodes that are not used any more, with those in their place."""
        found: dict[Node, None] = {}
        for state in self._states:
            for user in state.users:
                kinds = [user] if name(user) not in ("unsqueeze", "getitem") else list(user.users)
                found.update(dict.fromkeys(u for u in kinds if name(u) in ("stack", *_CATS)))
        replaced = {}
        for node in found:
            pieces = self._pieces(node)
            if pieces is None:
                continue
            new = self._build(node, *pieces)
            node.replace_all_uses_with(new)
            replaced[node] = new
        return replaced

    def _pieces(self, node: Node) -> tuple[int, bool, list[range | Node]] | None:
        """The dimension, whether it is a new one, and what lies along it: time steps of the output, or other nodes."""
        elements, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
        if not isinstance(elements, (list, tuple)) or type(dim) is not int or "out" in node.kwargs:
            return None
        rank = len(shape(node))
        dim %= rank
        steps: list[int | None] = []
        new = name(node) == "stack"
        if not new and all(e in self._step for e in elements):
            steps = [self._step[e] for e in elements]
        else:
            new = True
            for e in elements:
                state = e if name(node) == "stack" else unsqueezed(e, dim, rank)
                steps.append(None if state is None else self._step.get(state))
        pieces: list[range | Node] = []
        at = 0
        while at < len(steps):
            end = _run(steps, at)
            if end - at < SHORTEST:
                pieces += elements[at:end]
            else:
                step = steps[at + 1] - steps[at]  # type: ignore[operator]
                pieces.append(range(steps[at], steps[end - 1] + step, step))  # type: ignore[operator,arg-type]
            at = end
        if len(pieces) >= len(elements) or (not new and len(pieces) > 1):
            return None
        return dim, new, pieces

    def _build(self, node: Node, dim: int, new: bool, pieces: list[range | Node]) -> Node:
        emit = Emitter(self._graph, node, node)
        if len(pieces) > 1:
            single = name(node) == "stack"
            parts = [
                self._part(emit, p, dim) if isinstance(p, range) else emit(aten.unsqueeze.default, p, dim) if single else p
                for p in pieces
            ]
            return emit(aten.cat.default, parts, dim)
        [steps] = pieces
        assert isinstance(steps, range)
        result = self._part(emit, steps, dim)
        if not new:  # cat along a dimension of the states: [.., T, D, ..] -> [.., T * D, ..]
            result = emit(aten.flatten.using_ints, result, dim, dim + 1)
        if value(result).is_contiguous():  # type: ignore[union-attr]
            if name(result) == "flip":
                return result
            if result is self._output and not self._given and self._may_be_output(node):
                self._given = True
                return result
            return emit(aten.clone.default, result)
        return emit(aten.clone.default, result, memory_format=torch.contiguous_format)

    def _part(self, emit: Emitter, steps: range, dim: int) -> Node:
        """Time steps of the output, time as dimension `dim`."""
        part = self._output
        low, high = min(steps), max(steps)
        if (low, high) != (0, len(self._states) - 1):
            part = emit(aten.slice.Tensor, part, 0, low, high + 1)
        if steps.step < 0:
            part = emit(aten.flip.default, part, [0])
        return part if dim == 0 else emit(aten.movedim.int, part, 0, dim)

    def _may_be_output(self, stack: Node) -> bool:
        """Whether the stacked states can share the memory of the output: nothing writes to them, and no state that is a view of
        the output leaves the graph beside them."""
        if storages(stack) & self._written:
            return False
        for state in self._states[:-1]:
            for user in state.users:
                if name(user) in ("stack", *_CATS) or (name(user) in ("unsqueeze", "getitem") and set(user.users) == {stack}):
                    continue
                if user.op == "output" or storages(user) & storages(state):
                    return False
        return True


def _run(steps: Sequence[int | None], start: int) -> int:
    """Where the run of time steps that go up or down by one from `start` on ends."""
    if steps[start] is None:
        return start + 1
    end = start + 1
    while end < len(steps) and steps[end] is not None:
        difference = steps[end] - steps[end - 1]  # type: ignore[operator]
        if abs(difference) != 1 or (end - start > 1 and difference != steps[end - 1] - steps[end - 2]):  # type: ignore[operator]
            break
        end += 1
    return end


# ---- hidden states that are written to a tensor ------------------------------------------------------------------------------


def write_at_once(graph: Graph, output: Node, states: Sequence[Node], regions: Regions) -> None:
    """``y[t] = h`` in every step becomes one copy of the output, where nothing looks at y in between."""
    targets: dict[Node, list[tuple[int, Node, Region]]] = {}
    for t, state in enumerate(states):
        made = [(state, None), *((u, argument(u, 1, "dim")) for u in state.users if name(u) == "unsqueeze")]
        for written, dim, user in [(node, dim, u) for node, dim in made for u in node.users]:
            if name(user) == "setitem" and user.args[2] is written and isinstance(user.args[0], Node) and not user.users:
                into = user.args[0]
                part = indexed(Region(into, (None,) * len(shape(into))), user.args[1])
                if part is None or not same_sizes(part.sizes, shape(written)):
                    continue
                if dim is not None:  # y[t : t + 1] = h.unsqueeze(0)
                    part = part.select(dim % len(part.sizes), 0)  # type: ignore[operator]
                    if part is None:
                        continue
                targets.setdefault(into, []).append((t, user, part))
    for into, writes in targets.items():
        steps, nodes, parts = zip(*writes, strict=True)
        end, dim, step = _slices(parts, 0)
        in_order = list(steps) == list(range(steps[0], steps[0] + len(steps)))
        if len(writes) < SHORTEST or end != len(parts) or step == 0 or not in_order or not _alone(nodes, into):
            continue
        emit = Emitter(graph, nodes[-1], nodes[-1])
        source: Node = output
        if len(steps) != len(states):
            source = emit(aten.slice.Tensor, source, 0, steps[0], steps[-1] + 1)
        place, reverse = _written_range(emit, parts[0], dim, step, len(parts))
        if reverse:
            source = emit(aten.flip.default, source, [0])
        emit.known(value(place), aten.copy_.default, place, source)
        for node in nodes:
            graph.erase_node(node)
    if targets:
        regions.forget()


def _written_range(emit: Emitter, first: Region, dim: int, step: int, count: int) -> tuple[Node, bool]:
    """As :func:`_range`, as a view; and whether time runs backwards in it."""
    start = first.extents[dim]
    assert isinstance(start, int)
    if step < 0:
        first = first.replace(dim, start + step * (count - 1))
    return _range(emit, first, dim, abs(step), count), step < 0


def _alone(nodes: Sequence[Node], into: Node) -> bool:
    """Whether nothing between the first and the last of `nodes` reads or writes the memory of `into`."""
    memory = {*storages(into), EVERYTHING}
    node, others = nodes[0], set(nodes)
    while node is not nodes[-1]:
        if node not in others:
            effect = effects(node)
            if memory & (effect.reads | effect.writes):
                return False
        node = node.next
    return True
