"""Loops over a GRU cell, which Dynamo has unrolled, become one call of the sequence op.

A loop is a chain of cells with the same weights, each with the hidden state of the one before.  One call takes the place of its
last cell.  That is right where the inputs of all steps are known there without any of its hidden states; the scan of
`_Segment` finds out, over values and over memory that is written, and notes what has to wait for the call.

Between two cells the state may be reset (`resets.py`): the op does that itself.

Every use of a hidden state in between gets that time step of the output; where all of them are stacked, the output itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import getitem
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node

from torch_gru_fuse.ops.schemas import ops
from torch_gru_fuse.passes.cells import Cell, Found, Weights, emit_weights
from torch_gru_fuse.passes.layout import SHORTEST, Part, Rows, Stacked, as_sequence, write_at_once
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
    value,
    write_positions,
)
from torch_gru_fuse.passes.resets import Factor, Reset, find_reset


@dataclass(frozen=True)
class Loop:
    """What became of a chain of cells: `steps` of them at the node `last`, rolled up to `made` where `reason` is None.

    unit: what they are, "steps", or "chunks" where one has several time steps.
    """

    last: Node
    kind: str
    steps: int
    reason: str | None = None
    made: Node | None = None
    unit: str = "steps"


# ---- which cells follow one another ------------------------------------------------------------------------------------------


def _before(cell: Cell, cells: dict[Node, Cell], regions: Regions, resets: dict[Cell, Reset]) -> Cell | None:
    """The cell whose new hidden state is this one's hidden state, but for a reset in between."""
    h = cell.h
    if cell in resets and resets[cell].state.whole:
        return cells.get(resets[cell].state.base)
    if h.whole and h.base in cells:
        return cells[h.base]
    if name(h.base) == "unsqueeze" and h.whole and argument(h.base, 1, "dim") == 0:  # an unbatched call of nn.GRUCell
        inside = regions.of(h.base.args[0])
        if inside.base in cells and inside.extents == (0, None):
            return cells[inside.base]
    return None


def _chains(cells: dict[Node, Cell], regions: Regions, resets: dict[Cell, Reset]) -> list[list[Cell]]:
    """Chains of cells with the same weights, in the order of the graph; each cell is in one."""
    following: dict[Cell, Cell] = {}
    chained: set[Cell] = set()
    for cell in cells.values():
        before = _before(cell, cells, regions, resets)
        if before is not None and before.weights == cell.weights and before.call == cell.call and before not in following:
            following[before] = cell
            chained.add(cell)
    chains = []
    for cell in cells.values():
        if cell in chained:
            continue
        chain = [cell]
        while chain[-1] in following:
            chain.append(following[chain[-1]])
        chains.append(chain)
    return chains


_NEAR = 24  # nodes that are looked at between two steps, to say why they are no loop


def why_changed(h: Node, weights: object, states: Mapping[Node, object]) -> str | None:
    """Why a step whose state `h` is made of that of a step before it, with the same weights, is no step of a loop with it; None
    where it is not.  `states` has the weights of all states."""
    changed_by: list[str] = []
    pending, seen = [h], set()
    while pending and len(seen) < _NEAR:
        node = pending.pop(0)
        if node in seen:
            continue
        seen.add(node)
        if node in states:
            if states[node] != weights:
                continue
            by = ", ".join(dict.fromkeys(changed_by)) or "an operation"
            return f"the hidden state is changed between two steps (by {by})"
        changed_by.append(name(node) or str(node.target))
        pending += node.all_input_nodes
    return None


# ---- which of them can be one call -------------------------------------------------------------------------------------------


class _Reads(NamedTuple):
    needed: set[Node]
    reset: set[Node]
    hidden: set[Node]


@dataclass
class _Segment:
    """Cells from the start of a chain on that can be one call; `take` adds one, or says why not.

    Attributes:
        reads: what a call in the place of a cell reads: its input and weights; its reset; its hidden state.
        resets: of the cells that have one.
        waiting: nodes between the cells that need a hidden state, or memory that such a node writes, and so have to come after
            the call.
    """

    cells: list[Cell]
    reads: Callable[[Cell], _Reads]
    resets: dict[Cell, Reset]
    waiting: list[Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._order = Waiting()  # behind a hidden state of the segment
        self._pending: list[Node] = []
        self._at = self.cells[0].node
        self.keep_dtype: torch.dtype | None = None  # of resets between the cells
        self._seed(self.cells[0])

    def _seed(self, cell: Cell) -> None:
        reads = self.reads(cell)
        self._order.start(cell.node, storages(*reads.needed, *reads.reset, *reads.hidden))

    def take(self, cell: Cell) -> str | None:
        node = self._at.next
        while node is not cell.node:
            if self._order.visit(node):
                self._pending.append(node)
            if EVERYTHING in effects(node).writes:
                return f"between the steps is an operation of unknown effect, {name(node) or node.target}"
            node = node.next
        reads, order = self.reads(cell), self._order
        if reads.reset & order.data:
            return "a reset of its state depends on the hidden state of the step before"
        if reads.needed & order.data:
            return "its input at a step depends on the hidden state of the step before"
        needed = reads.needed | reads.reset
        if needed & order.any or storages(*needed, self.cells[-1].node) & order.written:
            if RANDOM in order.written:
                return "random numbers are drawn both for its inputs and from its hidden states; their order would change"
            return "memory that it reads is changed in place between the steps"
        if cell in self.resets:
            dtype = self.resets[cell].dtype
            if self.keep_dtype not in (None, dtype):
                return "its state is reset in different ways, by factors and by selection"
            self.keep_dtype = dtype
        self._seed(cell)
        self.cells.append(cell)
        self.waiting += self._pending
        self._pending.clear()
        self._at = cell.node
        return None


def _why_not(cells: Sequence[Cell]) -> str | None:
    """Why cells that follow one another are no call of the sequence op."""
    first = cells[0]
    if not all(same_sizes(c.x.sizes, first.x.sizes) for c in cells):
        return "its inputs differ in size from step to step"
    tensors = [value(n) for n in (first.x.base, first.h.base, *first.weights.nodes())]
    out = value(first.node)
    if {t.dtype for t in tensors} == {out.dtype}:  # type: ignore[union-attr]
        return None
    if out.device.type == "cpu" and out.dtype == value(first.h.base).dtype:  # type: ignore[union-attr]
        return None  # under CPU autocast both ops keep the dtype of the hidden state
    if out.device.type == "cuda" and out.dtype == torch.float16:  # type: ignore[union-attr]
        return None  # under CUDA autocast torch.gru and torch.gru_cell compute in float16
    return f"autocast gives cells {out.dtype}, but sequences another dtype"  # type: ignore[union-attr]


# ---- the call ----------------------------------------------------------------------------------------------------------------


class Roller:
    """Rolls up the loops of one graph."""

    def __init__(self, graph: Graph, found: Found, regions: Regions, options: dict[str, object]):
        self._graph, self._regions, self._options = graph, regions, options
        self._cells = found.cells
        self._written = set(write_positions(graph.nodes))
        self._resets = {
            cell: reset for cell in found.cells.values()
            if (reset := find_reset(cell.h, found.cells, regions, self._stays)) is not None
        }  # fmt: skip
        self._keeps: dict[tuple[Factor | None, ...], Node] = {}
        self._replaced: dict[Node, Region] = {}  # by what was a hidden state, where it is now
        self._weights: dict[Weights, list[Node | None]] = {}
        self._outputs: list[Node] = []

    def run(self) -> list[Loop]:
        """Rewrites the graph; the cells that are left are those in `found.cells`."""
        loops: list[Loop] = []
        chains = _chains(self._cells, self._regions, self._resets)
        refused = self._unchained(chains)
        for chain in chains:
            start = 0
            while start < len(chain):
                segment = _Segment([chain[start]], self._reads, self._resets)
                for cell in chain[start + 1 :]:
                    reason = segment.take(cell)
                    if reason is not None:
                        refused[cell] = reason
                        break
                cells = segment.cells
                start += len(cells)
                if len(cells) < SHORTEST:
                    continue
                if (reason := _why_not(cells)) is not None:
                    refused.update(dict.fromkeys(cells[1:], reason))
                    continue
                made = self._roll(segment)
                loops.append(Loop(cells[-1].node, cells[0].kind, len(cells), made=made))
                for cell in cells:
                    del self._cells[cell.node]
        outputs = [*self._outputs, *(u for loop in loops for u in loop.made.users)]  # type: ignore[union-attr]
        to_be_fused = [cell for cell in self._cells.values() if not cell.call]
        read = {self.now(region).base for cell in to_be_fused for region in (cell.x, cell.h)}
        erase_unused(self._graph, outputs, read | self._cells.keys())
        merged = merge_layers(self._graph, [loop.made for loop in loops], read)  # type: ignore[misc]
        loops = [replace(loop, made=merged[loop.made]) for loop in loops]  # type: ignore[index]
        return loops + _grouped(refused)

    def _unchained(self, chains: list[list[Cell]]) -> dict[Cell, str]:
        alone = {chain[0].node for chain in chains if len(chain) == 1}
        weights = {node: cell.weights for node, cell in self._cells.items()}
        reasons = {}
        for chain in chains:
            cell = chain[0]
            if (before := _before(cell, self._cells, self._regions, self._resets)) is not None:
                if len(chain) == 1 and before.node in alone and before.weights != cell.weights:
                    reasons[cell] = "the weights differ from those of the step before"
            elif (reason := why_changed(cell.h.base, cell.weights, weights)) is not None:
                reasons[cell] = reason
        return reasons

    def _reads(self, cell: Cell) -> _Reads:
        nodes = [cell.x.base, *cell.weights.nodes(), *([] if cell.x_node is None else [cell.x_node])]
        needed = {self.now(Region(n, (None,) * len(shape(n)))).base for n in nodes}
        reset = self._resets.get(cell)
        states = [cell.h] if reset is None else [cell.h, reset.state]
        return _Reads(
            needed, set() if reset is None else {self.now(reset.factor.region).base}, {self.now(h).base for h in states}
        )

    def _stays(self, *nodes: Node) -> bool:
        """Whether nothing in the graph writes to the memory of nodes."""
        return EVERYTHING not in self._written and not storages(*nodes) & self._written

    def now(self, region: Region) -> Region:
        """A region in the graph as it has become."""
        while region.base in self._replaced:
            part = self._replaced[region.base].part(region.extents)
            assert part is not None
            region = part
        return region

    def weights(self, emit_before: Node, cell: Cell) -> list[Node | None]:
        """The weights of a cell as nodes before `emit_before`; made once where they do not change."""
        known = self._weights.get(cell.weights)
        if known is not None and all(n is None or n < emit_before for n in known):
            return known
        nodes = emit_weights(Emitter(self._graph, emit_before, cell.node), cell.weights, self.now(cell.h).base)
        if self._stays(*cell.weights.nodes()):
            self._weights[cell.weights] = nodes
        return nodes

    def _roll(self, segment: _Segment) -> Node:
        cells, graph = segment.cells, self._graph
        first, last = cells[0].node, cells[-1].node
        emit = Emitter(graph, last, last)
        params = [p for p in self.weights(first, cells[0]) if p is not None]
        rows = Rows.of(last, cells[0].x)
        inputs = [rows.region(self.now(c.x), self._regions) for c in cells]
        x = rows.flat(emit, self._sequence(emit, inputs, [c.x_node for c in cells]))
        resets = self._resets_of(segment)
        h0 = cells[0].h if resets[0] is None else resets[0].state
        first_state = emit(aten.unsqueeze.default, emit.region(rows.region(self.now(h0), self._regions)), 0)
        hx = rows.flat(emit, first_state)
        options = self._options if segment.keep_dtype is None else self._options | {"keep": self._keep(emit, last, resets)}
        state = value(last)
        assert isinstance(state, Tensor)
        results = state.new_empty(len(cells), *shape(hx)[1:]), state.new_empty(shape(hx))
        call = emit.known(
            results, ops.gru.default, x, hx, params, len(params) > 2, 1, 0.0, False, False, False, **options
        )
        flat, flat_h_n = (emit.known(results[i], getitem, call, i) for i in (0, 1))
        output, h_n = (rows.states(emit, result, first_state) for result in (flat, flat_h_n))

        anchor = last
        for node in segment.waiting:
            anchor.append(node)
            anchor = node
        parts = []
        for t, cell in enumerate(cells):
            node, steps, own = cell.node, range(t, t + 1), cell.node is last
            parts.append(Part(node, output, steps, None, own))
            if rows.dims == 3 and rows.ones:
                parts.append(Part(node, flat, steps, rows.ones[0], own))
                picks = (user for user in node.users if self._regions.of(user) == rows.picked(node))
                parts += [Part(user, flat, steps, None, own) for user in picks]
        stacked = Stacked(graph, parts, self._written)
        dead = stacked.replace()
        for node, new in dead.items():
            self._replaced[node] = Region(new, (None,) * len(shape(new)))
        write_at_once(graph, parts, self._regions)
        self._outputs.append(output)
        keep = {*self._cells, *self._outputs}  # others may be parts of the output
        erase_unused(graph, dead, keep)
        for t in reversed(range(len(cells))):
            node = cells[t].node
            here = Region(output, (t, *[None] * rows.dims))
            if node.users:
                if t == len(cells) - 1:  # memory of its own: what is made of it may leave the graph beside the output
                    select = emit(aten.select.int, h_n, 0, 0)
                    if storages(node) & self._written:
                        here = self._regions.of(select)
                else:
                    select = emit(aten.select.int, output, 0, t)
                node.replace_all_uses_with(select)
            self._replaced[node] = here
            inputs = node.all_input_nodes
            if node is last:  # new nodes still go before it
                node.args, node.kwargs = (), {}
            else:
                graph.erase_node(node)
            erase_unused(graph, inputs, keep)
        graph.erase_node(last)
        erase_unused(graph, [h_n], ())
        self._regions.forget()
        return call

    def fuse(self, cell: Cell) -> Node:
        """Replaces a hand-written cell by a call of the op for one cell."""
        graph, node = self._graph, cell.node
        weights = self.weights(node, cell)
        emit = Emitter(graph, node, node)
        x, h = (emit.region(self.now(r)) for r in (cell.x, cell.h))
        if (dims := len(shape(node))) == 2:
            made = fused = emit.known(value(node), ops.gru_cell.default, x, h, *weights)
        else:
            rows = [emit(aten.flatten.using_ints, t, 0, -2) for t in (x, h)]
            made = emit.known(value(rows[1]), ops.gru_cell.default, *rows, *weights)
            fused = emit.known(value(node), aten.view_as.default, made, h)
        node.replace_all_uses_with(fused)
        self._replaced[node] = Region(fused, (None,) * dims)
        del self._cells[node]
        inputs = node.all_input_nodes
        graph.erase_node(node)
        erase_unused(graph, inputs, self._cells.keys())
        self._regions.forget()
        return made

    def _resets_of(self, segment: _Segment) -> list[Reset | None]:
        """The resets that the call does.  What was done to the first state may also be done before the call: where there is no
        other reset, where it is another kind, or where something may be changed in between."""
        first = self._resets.get(segment.cells[0])
        if first is not None and (
            first.dtype != segment.keep_dtype or not self._stays(first.state.base, first.factor.region.base)
        ):
            first = None
        return [first, *(self._resets.get(cell) for cell in segment.cells[1:])]

    def _keep(self, emit: Emitter, before: Node, resets: list[Reset | None]) -> Node:
        """`keep` [T, B] of the op as a node before `before`; layers with the same resets share it."""
        factors = tuple(None if reset is None else reset.factor for reset in resets)
        known = self._keeps.get(factors)
        if known is not None and known < before:
            return known
        batch = shape(before)[0]
        pieces: list[Node | int] = []  # of some steps [n, B], or the number of steps without a reset
        for _, group in itertools.groupby(factors, key=lambda f: None if f is None else f.form):
            run = list(group)
            pieces.append(len(run) if run[0] is None else self._factors(emit, run, batch))  # type: ignore[arg-type]
        some = next(p for p in pieces if isinstance(p, Node))
        if len(pieces) == 1:
            keep = some
        else:
            ones = emit(aten.ones_like.default, emit(aten.slice.Tensor, some, 0, 0, 1))
            keep = emit(
                aten.cat.default, [emit(aten.expand.default, ones, [p, -1]) if isinstance(p, int) else p for p in pieces], 0
            )
            erase_unused(self._graph, [ones], ())
        if self._stays(*(factor.region.base for factor in factors if factor is not None)):
            self._keeps[factors] = keep
        return keep

    def _factors(self, emit: Emitter, factors: list[Factor], batch: object) -> Node:
        """Factors of one form, [n, B]."""
        node = self._sequence(emit, [self.now(f.region) for f in factors], [None] * len(factors))
        for _ in range(len(shape(node)) - 2):
            node = emit(aten.squeeze.dim, node, -1)
        if len(shape(node)) == 1:
            node = emit(aten.unsqueeze.default, node, -1)
        if not same_sizes(shape(node)[1:], (batch,)):
            node = emit(aten.expand.default, node, [-1, batch])
        for function in factors[0].functions:
            node = function.emit(emit, node)
        return node

    def _sequence(self, emit: Emitter, parts: list[Region], nodes: list[Node | None]) -> Node:
        """What there is of each step as one tensor, time first."""
        return as_sequence(emit, parts, [None if node in self._replaced else node for node in nodes])


def _grouped(refused: dict[Cell, str]) -> list[Loop]:
    """One record for all steps of a loop that were refused for one reason."""
    groups: dict[tuple[str, Weights], list[Cell]] = {}
    for cell, reason in refused.items():
        groups.setdefault((reason, cell.weights), []).append(cell)
    return [Loop(cells[-1].node, cells[0].kind, len(cells) + 1, reason) for (reason, _), cells in groups.items()]


# ---- layers of a stack -------------------------------------------------------------------------------------------------------


def merge_layers(graph: Graph, calls: list[Node], read: set[Node]) -> dict[Node, Node]:
    """Calls whose input is the output of another, and which nothing else needs, become one call with several layers: kernels
    run layers of a stack side by side.  Returns the call that each is part of now.  Nodes in `read` stay."""
    now = {call: call for call in calls}
    for upper in sorted(calls):
        lower = now.get(upper.args[0].args[0]) if name(upper.args[0]) == "getitem" else None  # type: ignore[union-attr,index]
        if lower is None or not read.isdisjoint((*lower.users, *upper.users)) or not _are_layers(lower, upper):
            continue
        emit = Emitter(graph, upper, upper)
        hx = emit(aten.cat.default, [lower.args[1], upper.args[1]], 0)
        params = [*lower.args[2], *upper.args[2]]  # type: ignore[misc]
        has_biases, below = lower.args[3], lower.args[4]
        layers = below + upper.args[4]  # type: ignore[operator]
        results = value(upper)[0], value(hx).new_empty(shape(hx))  # type: ignore[index,union-attr]
        made = emit.known(
            results, ops.gru.default, lower.args[0], hx, params, has_biases, layers, *upper.args[5:], **upper.kwargs
        )
        h_n = emit.known(results[1], getitem, made, 1)
        waiting = _dependents(lower, upper)
        anchor = upper
        for node in waiting:
            anchor.append(node)
            anchor = node
        for part, first, last in ((lower, 0, below), (upper, below, layers)):
            for user in list(part.users):
                if user.args[1] == 1:
                    user.replace_all_uses_with(emit(aten.slice.Tensor, h_n, 0, first, last))
                elif part is upper:
                    user.replace_all_uses_with(emit.known(results[0], getitem, made, 0))
        for call in (upper, lower):
            for user in [u for u in call.users if not u.users]:
                graph.erase_node(user)
            graph.erase_node(call)
        erase_unused(graph, [h_n], ())
        now = {call: made if at in (lower, upper) else at for call, at in now.items()} | {made: made}
    return now


def _are_layers(lower: Node, upper: Node) -> bool:
    """Whether one call can take the place of both, where the upper one is."""
    output, hx, params = upper.args[:3]
    same = lower.args[3] == upper.args[3] and lower.kwargs == upper.kwargs  # resets, too
    sizes = same_sizes(shape(lower.args[1])[1:], shape(hx)[1:])  # type: ignore[arg-type]
    if not same or not sizes or set(output.users) != {upper}:  # type: ignore[union-attr]
        return False
    if not {hx, *params}.isdisjoint(_dependents(lower, upper)):  # type: ignore[misc]
        return False
    node = lower.next
    while node is not upper:
        if effects(node).writes:
            return False
        node = node.next
    return True


def _dependents(lower: Node, upper: Node) -> list[Node]:
    """The nodes between two calls that need the lower one."""
    needs = {lower}
    found = []
    node = lower.next
    while node is not upper:
        if any(i in needs for i in node.all_input_nodes):
            needs.add(node)
            found.append(node)
        node = node.next
    return found
