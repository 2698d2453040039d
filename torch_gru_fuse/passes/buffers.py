"""States that are kept in one tensor, which each step overwrites as a whole.

    for x_t in x:
        self.h.copy_(self.cell(x_t, self.h))        h[:] = cell(x_t, h)

What reads that tensor gets what was written to it last, and of the writes the last one is left; a loop over cells is then one
like any other (`loops.py`).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.fx import Graph, Node

from torch_gru_fuse.passes.nodes import EVERYTHING, effects, name, same_sizes, shape, storages, value


def _overwrites(node: Node) -> tuple[Node, Node] | None:
    """The tensor that a node overwrites as a whole, and what with: a tensor of the same size and type."""
    if name(node) == "copy_" and 2 <= len(node.args) <= 3 and not node.kwargs:
        into, source = node.args[:2]
    elif name(node) == "setitem" and node.args[1] in (slice(None), ...):
        into, _, source = node.args
    else:
        return None
    if not isinstance(into, Node) or not isinstance(source, Node) or not same_sizes(shape(into), shape(source)):
        return None
    left, right = value(into), value(source)
    if not isinstance(left, Tensor) or not isinstance(right, Tensor) or type(left) is not type(right):
        return None
    return (into, source) if (left.dtype, left.device) == (right.dtype, right.device) else None


def forward_writes(graph: Graph, states: Iterable[Node]) -> bool:
    """Rewrites the uses of tensors that results of cells, `states`, overwrite; returns whether there were such."""
    writes: dict[Node, list[Node]] = {}
    found: dict[Node, Node] = {}  # the tensor, by each node that overwrites it and is the tensor itself from then on
    for state in states:
        for user in state.users:
            pair = _overwrites(user)
            if pair is not None and pair[1] is state:
                into = found.get(pair[0], pair[0])
                found[user] = into
                writes.setdefault(into, []).append(user)
    alone = [(into, nodes) for into, nodes in writes.items() if len(nodes) > 1 and _is_alone(graph, into, nodes)]
    for into, nodes in alone:
        _forward(into, nodes)
    return bool(alone)


def _is_alone(graph: Graph, into: Node, writes: list[Node]) -> bool:
    """Whether nothing else writes to a tensor or to what is written to it, no other tensor shares its memory, and all is known
    of what is between the first write and the last use."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    same = {into, *writes}
    end = max(order[user] for node in same for user in node.users)
    sources = [_overwrites(node)[1] for node in writes]  # type: ignore[index]
    memory = storages(into)
    if memory & storages(*sources):
        return False
    if any(value(into).requires_grad != value(source).requires_grad for source in sources):  # type: ignore[union-attr]
        return False  # it is written under no_grad
    for node, i in order.items():
        if node not in same and node.op != "output" and storages(node) & memory:
            return False
        written = effects(node).writes
        if node not in same and written & (memory | storages(*sources)):
            return False
        if order[writes[0]] < i < end and EVERYTHING in written:
            return False
    return True


def _forward(into: Node, writes: list[Node]) -> None:
    same, current = {into, *writes}, None
    node, last = writes[0], writes[-1]
    while node.op != "root":
        following = node.next
        if node.op == "output":
            for write in writes:  # the tensor itself is returned
                node.replace_input_with(write, into)
        elif node in writes:
            current = node.args[-1] if name(node) == "setitem" else node.args[1]
            node.replace_input_with(node.args[0], into)  # type: ignore[arg-type]
        elif current is not None:
            for read in same & set(node.all_input_nodes):
                node.replace_input_with(read, current)  # type: ignore[arg-type]
        node = following
    for write in writes:
        if write is not last:
            write.graph.erase_node(write)
