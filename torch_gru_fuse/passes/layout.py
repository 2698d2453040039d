"""Time steps as one tensor: what each step of a loop reads becomes the input of one call, and what is made of all steps, by
`stack`, by `cat` or by writing to a tensor, becomes the output of that call.  States with more dimensions are rows of it."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass

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
    erase_unused,
    indexed,
    name,
    same_sizes,
    shape,
    storages,
    swapped,
    unsqueezed,
    value,
    write_positions,
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
    if dim == 1 and (source := swapped(base)) is not None:
        base = source
    elif dim != 0:
        base = emit(aten.movedim.int, base, dim, 0)
    low, high = sorted((start, start + step * (count - 1)))
    if (low, high + 1, abs(step)) != (0, shape(base)[0], 1):
        base = emit(aten.slice.Tensor, base, 0, low, high + 1, abs(step))
    return base if step > 0 else emit(aten.flip.default, base, [0])


# ---- states with more dimensions than [B, H] ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """How inputs [.., I] and states [.., H] of a step are [B, I] and [B, H], which the op takes: without dimensions of size
    one, and what is left before the last one flattened.

    Attributes:
        dims: how many a state has.
        ones: those that are left out, descending.
    """

    dims: int
    ones: tuple[int, ...]

    @classmethod
    def of(cls, state: Node, x: Region) -> Rows:
        """Of the dimensions of size one those are left out in which the input has one step of a range, or which it has not."""
        rank = len(shape(state))
        missing = rank - len(x.sizes)
        ones = [d for d in range(rank - 1) if type(size := shape(state)[d]) is int and size == 1]
        ones.sort(key=lambda d: d >= missing and x.extents[x.visible[d - missing]] is None)
        return cls(rank, tuple(sorted(ones[: rank - 2], reverse=True)))

    def region(self, region: Region, regions: Regions) -> Region:
        """An input or a state without dimensions of size one."""
        missing = self.dims - len(region.sizes)
        for d in self.ones:
            region = regions.without(region, d - missing) if d >= missing else region
        return region

    @property
    def flattens(self) -> bool:
        """Whether more than one dimension is left before the last one."""
        return self.dims - len(self.ones) > 2

    def picked(self, state: Node) -> Region:
        """A state without dimensions of size one."""
        return Region(state, tuple(0 if d in self.ones else None for d in range(self.dims)))

    def flat(self, emit: Emitter, steps: Node) -> Node:
        """[T, B, .] of inputs or states of which dimensions of size one are left out, time first."""
        return emit(aten.flatten.using_ints, steps, 1, -2) if self.flattens else steps

    def states(self, emit: Emitter, steps: Node, like: Node) -> Node:
        """[T, .., H] of [T, B, H]; like: one step of the former before it was flat, time first."""
        if self.flattens:
            sizes = [shape(steps)[0], *[-1] * (len(shape(like)) - 1)]
            steps = emit(aten.view_as.default, steps, emit(aten.expand.default, like, sizes))
        for d in reversed(self.ones):
            steps = emit(aten.unsqueeze.default, steps, d + 1)
        return steps


# ---- hidden states that are stacked ------------------------------------------------------------------------------------------

_CATS = ("cat", "concat", "concatenate")


@dataclass(frozen=True)
class Part:
    """Time steps of the output of a call, as the graph has them.

    Attributes:
        node: holds them.
        output: all time steps, time first.
        steps: which they are.
        time: the dimension along which they lie; None where it is one step without a dimension of time.
        own_memory: whether the node is going to be no view of the output.

    A node of a loop over states [1, B, H] has one step along the first dimension, and no dimension of time where the output is
    [T, 1, B, H].
    """

    node: Node
    output: Node
    steps: range
    time: int | None = None
    own_memory: bool = False


class Stacked:
    """Replaces `stack` and `cat` of the hidden states of a loop by its output, whose memory one of them may have."""

    def __init__(self, graph: Graph, parts: Sequence[Part], written: set[object]):
        self._graph, self._written = graph, written
        self._parts: dict[Node, list[Part]] = {}
        for part in parts:
            self._parts.setdefault(part.node, []).append(part)
        self._given = False

    def replace(self) -> dict[Node, Node]:
        """Returns the nodes that are not used any more, with those in their place."""
        found: dict[Node, None] = {}
        for state in self._parts:
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

    def _pieces(self, node: Node) -> tuple[Node, int, bool, list[range | Node]] | None:
        """An output, the dimension, whether it is that of time alone, and what lies along it: time steps of the output, or
        other nodes."""
        elements, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
        if not isinstance(elements, (list, tuple)) or type(dim) is not int or "out" in node.kwargs:
            return None
        rank = len(shape(node))
        dim %= rank
        time, parts = True, [self._along(e, None) for e in elements]
        if name(node) != "stack":
            along_time = [self._along(e, dim) or self._along(unsqueezed(e, dim, rank), None) for e in elements]
            time = any(along_time) or not all(parts)
            parts = along_time if time else parts
        output = next((part.output for part in parts if part is not None), None)
        if output is None:
            return None
        steps = [part.steps if part is not None and part.output is output else None for part in parts]
        pieces: list[range | Node] = []
        at = 0
        while at < len(steps):
            run, end = _run(steps, at)
            pieces += elements[at:end] if run is None or end - at < SHORTEST else [run]
            at = end
        if len(pieces) >= len(elements) or (not time and len(pieces) > 1):
            return None
        return output, dim, time, pieces

    def _along(self, node: Node | None, time: int | None) -> Part | None:
        """The time steps that a node holds along dimension `time`."""
        return next((part for part in self._parts.get(node, ()) if part.time == time), None)  # type: ignore[arg-type]

    def _build(self, node: Node, output: Node, dim: int, time: bool, pieces: list[range | Node]) -> Node:
        emit = Emitter(self._graph, node, node)
        if len(pieces) > 1:
            single = name(node) == "stack"
            parts = [
                _steps(emit, output, p, dim) if isinstance(p, range) else emit(aten.unsqueeze.default, p, dim) if single else p
                for p in pieces
            ]
            return emit(aten.cat.default, parts, dim)
        [steps] = pieces
        assert isinstance(steps, range)
        result = _steps(emit, output, steps, dim)
        if not time:  # cat along a dimension of the states: [.., T, D, ..] -> [.., T * D, ..]
            result = emit(aten.flatten.using_ints, result, dim, dim + 1)
        if not same_sizes(value(result).stride(), value(node).stride()):  # type: ignore[union-attr]
            return emit(aten.clone.default, result, memory_format=torch.contiguous_format)
        if not storages(result) & storages(output):  # a flip
            return result
        if len(steps) == shape(output)[0] and not self._given and self._may_be_output(node):
            self._given = True
            return result
        return emit(aten.clone.default, result)

    def _may_be_output(self, stack: Node) -> bool:
        """Whether the stacked states can share the memory of the output: nothing writes to them, and no state that is a view of
        the output leaves the graph beside them."""
        if storages(stack) & self._written:
            return False
        for node, parts in self._parts.items():
            for user in node.users if not parts[0].own_memory else ():
                if user in self._parts or name(user) in ("stack", *_CATS):
                    continue
                if name(user) in ("unsqueeze", "getitem") and set(user.users) == {stack}:
                    continue
                if user.op == "output" or storages(user) & storages(node):
                    return False
        return True


def _steps(emit: Emitter, output: Node, steps: range, dim: int) -> Node:
    """Time steps of an output, time as dimension `dim`."""
    low, high = min(steps), max(steps)
    if (low, high + 1) != (0, shape(output)[0]):
        output = emit(aten.slice.Tensor, output, 0, low, high + 1)
    if steps.step < 0:
        output = emit(aten.flip.default, output, [0])
    return output if dim == 0 else emit(aten.movedim.int, output, 0, dim)


def _run(steps: Sequence[range | None], start: int) -> tuple[range | None, int]:
    """The time steps from `start` on that go up or down by one, and where they end."""
    run, end = steps[start], start + 1
    while run is not None and end < len(steps) and (following := steps[end]) is not None:
        joined = _joined(run, following)
        if joined is None:
            break
        run, end = joined, end + 1
    return run, end


def _joined(left: range, right: range) -> range | None:
    """Two ranges as one, where the second goes on in the direction of the first."""
    step = right[0] - left[-1]
    if abs(step) != 1 or any(len(r) > 1 and r.step != step for r in (left, right)):
        return None
    return range(left[0], right[-1] + step, step)


# ---- hidden states that are joined with others in each step ------------------------------------------------------------------


def stack_before_cat(graph: Graph, states: Container[Node], regions: Regions) -> None:
    """``stack([cat([f, b], -1) for f, b in ...])`` becomes ``cat([stack([f, ...]), stack([b, ...])], -1)``, and so does `cat`
    along time, where f or b is made by a node in `states`, as the two directions of a layer are: then it is the output of one
    call."""
    joined = [(node, found) for node in graph.nodes if (found := _joins(node)) is not None]
    written = set(write_positions(graph.nodes)) if joined else set()
    for node, (stack, dim, cats, inner) in joined:
        columns = list(zip(*(argument(cat, 0, "tensors") for cat in cats), strict=True))  # type: ignore[arg-type]
        if not any(all(regions.of(part).base in states for part in column) for column in columns):
            continue
        if EVERYTHING in written or storages(*cats, *(part for column in columns for part in column)) & written:
            continue
        emit = Emitter(graph, node, node)
        join = aten.stack.default if stack else aten.cat.default
        made = emit(aten.cat.default, [emit(join, list(column), dim) for column in columns], inner + (stack and inner >= dim))
        node.replace_all_uses_with(made)
        erase_unused(graph, [node], ())
    regions.forget()


def _joins(node: Node) -> tuple[bool, int, list[Node], int] | None:
    """Where a node joins what `cat` has made in each step, and which nothing else uses: whether along a new dimension, which
    one, the calls of `cat`, and the dimension of these."""
    elements, dim, rank = argument(node, 0, "tensors"), argument(node, 1, "dim", 0), len(shape(node))
    if name(node) not in ("stack", *_CATS) or not isinstance(elements, (list, tuple)) or type(dim) is not int:
        return None
    dim, cats, stack = dim % rank, list(elements), name(node) == "stack"
    if not stack and all(unsqueezed(e, dim, rank) is not None and set(e.users) == {node} for e in elements):
        cats, stack = [e.args[0] for e in elements], True
    ways = {_way(cat) for cat in cats}
    if len(cats) < SHORTEST or len(ways) != 1 or None in ways or any(len(cat.users) > 1 for cat in cats):
        return None
    [(inner, *_)] = ways  # type: ignore[misc]
    return (stack, dim, cats, inner) if stack or inner != dim else None


def _way(cat: object) -> tuple[object, ...] | None:
    """The dimension of a call of `cat`, and what has to be the same in each step."""
    if name(cat) not in _CATS or "out" in cat.kwargs:  # type: ignore[union-attr]
        return None
    parts, dim = argument(cat, 0, "tensors"), argument(cat, 1, "dim", 0)  # type: ignore[arg-type]
    rank = len(shape(cat))  # type: ignore[arg-type]
    if not isinstance(parts, (list, tuple)) or type(dim) is not int or any(len(shape(part)) != rank for part in parts):
        return None
    sizes = [shape(part)[dim] for part in parts]
    if not all(type(size) is int for size in sizes):
        return None
    return dim % rank, *sizes, *(value(part).dtype for part in parts)  # type: ignore[union-attr]


# ---- hidden states that are written to a tensor ------------------------------------------------------------------------------


def write_at_once(graph: Graph, parts: Sequence[Part], regions: Regions) -> None:
    """``y[t] = h`` in every step becomes one copy of the output, where nothing looks at y in between."""
    targets: dict[tuple[Node, Node], list[tuple[range, Node, list[Region]]]] = {}
    for part in parts:
        made = [(part.node, part.time)]
        if part.time is None:  # y[t : t + 1] = h.unsqueeze(0)
            made += [(u, argument(u, 1, "dim")) for u in part.node.users if name(u) == "unsqueeze"]  # type: ignore[misc]
        for written, dim, user in [(node, dim, u) for node, dim in made for u in node.users]:
            if name(user) == "setitem" and user.args[2] is written and isinstance(user.args[0], Node) and not user.users:
                into = user.args[0]
                place = indexed(Region(into, (None,) * len(shape(into))), user.args[1])
                if place is None or not same_sizes(place.sizes, shape(written)):
                    continue
                places = [place] if dim is None else place.unbind(dim % len(place.sizes))  # type: ignore[operator]
                targets.setdefault((into, part.output), []).append((part.steps, user, places))
    gone: set[Node] = set()
    for (into, output), writes in targets.items():
        nodes = [node for _, node, _ in writes]
        if not gone.isdisjoint(nodes):  # as part of another output
            continue
        steps = [t for ts, _, _ in writes for t in ts]
        places = [place for _, _, of_steps in writes for place in of_steps]
        end, dim, step = _slices(places, 0)
        in_order = steps == list(range(steps[0], steps[0] + len(steps)))
        if len(writes) < SHORTEST or end != len(places) or step == 0 or not in_order or not _alone(nodes, into):
            continue
        emit = Emitter(graph, nodes[-1], nodes[-1])
        source = _steps(emit, output, range(steps[0], steps[-1] + 1), 0)
        place, reverse = _written_range(emit, places[0], dim, step, len(places))
        if reverse:
            source = emit(aten.flip.default, source, [0])
        emit.known(value(place), aten.copy_.default, place, source)
        for node in nodes:
            graph.erase_node(node)
        gone.update(nodes)
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
