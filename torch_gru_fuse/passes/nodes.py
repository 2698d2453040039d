"""What the nodes of a graph mean: their function by name, the tensors behind them, which part of another tensor they are, what
they read and write.

The graphs are Dynamo's (functions, methods and operators of Python) or those of `torch.export` (aten overloads); the names
given here are the same for both.  Nodes that are added call aten overloads, which both accept.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from torch_gru_fuse import torch_hooks

aten = torch.ops.aten


def value(arg: object) -> object:
    """The fake tensor behind a node, as Dynamo (`example_value`) or export (`val`) recorded it; what is no node stands for
    itself."""
    if not isinstance(arg, Node):
        return arg
    return arg.meta.get("example_value", arg.meta.get("val"))


def shape(node: Node) -> tuple[object, ...]:
    """The sizes of the tensor behind a node, () where it is not known."""
    tensor = value(node)
    return tuple(tensor.shape) if isinstance(tensor, Tensor) else ()


def same_sizes(left: Iterable[object], right: Iterable[object]) -> bool:
    """Whether two lists of sizes are known to be equal; asks symbolic sizes without a guard."""
    left, right = tuple(left), tuple(right)
    return len(left) == len(right) and all(torch_hooks.known_equal(a, b) for a, b in zip(left, right, strict=True))


@functools.cache
def _name_of_function(target: Callable[..., object]) -> str:
    if torch_hooks.is_overload(target):
        return target.name().removeprefix("aten::").split(".")[0] if target.namespace == "aten" else ""
    name = getattr(target, "__name__", "")
    if target is getattr:
        return "getattr"
    return name if any(getattr(home, name, None) is target for home in (torch, operator, F, aten)) else ""


def name(node: object) -> str:
    """ "add" for operator.add, torch.add, Tensor.add, Tensor.__add__ and aten.add.Tensor; "" for what is none of torch's
    functions."""
    if not isinstance(node, Node):
        return ""
    if node.op == "call_method":
        method = str(node.target)
        return method[2:-2] if method.startswith("__") and method.endswith("__") else method
    return _name_of_function(node.target) if node.op == "call_function" else ""


def argument(node: Node, position: int, keyword: str, default: object = None) -> object:
    return node.args[position] if len(node.args) > position else node.kwargs.get(keyword, default)


# ---- which part of a tensor a node is ----------------------------------------------------------------------------------------

#: One dimension of a region: all of it, a range of it, or one index, which takes the dimension away.
Extent = None | tuple[int, int] | int


@dataclass(frozen=True)
class Region:
    """The part of a tensor that a chain of indexing, `select`, `narrow`, `unbind`, `split`, `squeeze` and the like picks, and
    `detach` where there is no derivative."""

    base: Node
    extents: tuple[Extent, ...]

    @property
    def whole(self) -> bool:
        return all(e is None for e in self.extents)

    @property
    def visible(self) -> list[int]:
        """The dimensions of the base that the region has."""
        return [d for d, e in enumerate(self.extents) if not isinstance(e, int)]

    @property
    def sizes(self) -> tuple[object, ...]:
        full = shape(self.base)
        return tuple(full[d] if e is None else e[1] - e[0] for d in self.visible for e in [self.extents[d]])

    def replace(self, dim: int, extent: Extent) -> Region:
        return Region(self.base, (*self.extents[:dim], extent, *self.extents[dim + 1 :]))

    def select(self, dim: int, index: int) -> Region | None:
        d = self.visible[dim]
        start = self.extents[d][0] if self.extents[d] is not None else 0
        size = self.sizes[dim]
        if index < 0:
            if not isinstance(size, int):
                return None
            index += size
        return self.replace(d, start + index)

    def unbind(self, dim: int) -> list[Region]:
        """The part at each index of a dimension whose size is a constant."""
        d = self.visible[dim]
        start = self.extents[d][0] if self.extents[d] is not None else 0
        return [self.replace(d, start + i) for i in range(self.sizes[dim])]

    def narrow(self, dim: int, start: int, stop: int) -> Region:
        d = self.visible[dim]
        size = self.sizes[dim]
        if start == 0 and isinstance(size, int) and stop == size:
            return self
        offset = self.extents[d][0] if self.extents[d] is not None else 0
        return self.replace(d, (offset + start, offset + stop))

    def part(self, extents: Iterable[Extent]) -> Region | None:
        """The part `extents` of this region's own dimensions."""
        region: Region | None = self
        dim = 0
        for extent in extents:
            if region is None:
                return None
            if isinstance(extent, int):
                region = region.select(dim, extent)
                continue
            if extent is not None:
                region = region.narrow(dim, *extent)
            dim += 1
        return region


_SIZE_ONE = ("split", "chunk", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split")


class Regions:
    """Regions of the nodes of one graph, each found once; `forget` after the graph has changed."""

    def __init__(self) -> None:
        self._known: dict[Node, Region] = {}

    def forget(self) -> None:
        self._known.clear()

    def of(self, node: Node) -> Region:
        chain = []
        while node not in self._known:
            chain.append(node)
            source = _source(node)
            if source is None:
                break
            node = source
        for link in reversed(chain):
            source = _source(link)
            region = None if source is None else _step(self._known[source], link)
            self._known[link] = self._behind_new_dimensions(region or Region(link, (None,) * len(shape(link))))
        return self._known[chain[0] if chain else node]

    def without(self, region: Region, dim: int) -> Region:
        """A region without one of its dimensions, which has size one."""
        part = region.select(dim, 0)
        assert part is not None
        return self._behind_new_dimensions(part)

    def _behind_new_dimensions(self, region: Region) -> Region:
        """The same region of x where it is ``x.unsqueeze(d)`` without that dimension: what keeps [1, B, H] and uses [B, H]."""
        rank = len(region.extents)
        for d, extent in enumerate(region.extents):
            source = unsqueezed(region.base, d, rank) if extent == 0 and type(extent) is int else None
            part = None if source is None else self.of(source).part((*region.extents[:d], *region.extents[d + 1 :]))
            if part is not None:
                return part
        return region


def unsqueezed(element: object, dim: int, rank: int) -> Node | None:
    """The tensor that `element` is with a new dimension `dim`, if it is one: by unsqueeze, or by None as an index."""
    if not isinstance(element, Node) or not element.args or not isinstance(element.args[0], Node):
        return None
    if name(element) == "unsqueeze":
        at = argument(element, 1, "dim")
        return element.args[0] if type(at) is int and at % rank == dim else None
    if name(element) == "getitem":
        index = element.args[1] if isinstance(element.args[1], tuple) else (element.args[1],)
        if dim < len(index) and all(i is None if d == dim else i in (slice(None), ...) for d, i in enumerate(index)):
            return element.args[0] if ... not in index[:dim] else None
    return None


def swapped(node: Node) -> Node | None:
    """The tensor that a node is with its first two dimensions in each other's place, if it is one."""
    if name(node) not in ("transpose", "swapaxes", "swapdims") or len(shape(node)) < 2 or not isinstance(node.args[0], Node):
        return None
    dims = [d % len(shape(node)) for a in ((1, "dim0"), (2, "dim1")) if type(d := argument(node, *a)) is int]
    return node.args[0] if sorted(dims) == [0, 1] else None


_PICKS = ("getitem", "select", "narrow", "squeeze", "slice", "detach")


def _source(node: Node) -> Node | None:
    """The tensor that `node` picks a part of, if that is what it does."""
    kind = name(node)
    if kind not in _PICKS or not node.args or not isinstance(node.args[0], Node):
        return None
    source = node.args[0]
    if kind == "detach":
        # Export does not say which tensors have gradients, and none says which have tangents: those of torch.func may.
        known = source.meta.get("example_value")
        plain = isinstance(known, Tensor) and not known.requires_grad and not torch_hooks.is_transformed(known)
        return source if plain else None
    if isinstance(value(source), (tuple, list)):
        if kind == "getitem" and name(source) in (*_SIZE_ONE, "unbind") and isinstance(source.args[0], Node):
            return source.args[0]
        return None
    return source if isinstance(value(source), Tensor) else None


def _step(region: Region, node: Node) -> Region | None:
    kind = name(node)
    rank = len(region.visible)
    ints = [a for a in (*node.args[1:], *node.kwargs.values()) if type(a) is int]
    if isinstance(node.args[0], Node) and isinstance(value(node.args[0]), (tuple, list)):
        return _piece(region, node.args[0], node.args[1])
    if kind == "getitem":
        return indexed(region, node.args[1])
    if kind == "detach":
        return region
    if kind == "select" and len(ints) == 2:
        dim, index = argument(node, 1, "dim"), argument(node, 2, "index")
        return region.select(dim % rank, index)
    if kind == "narrow" and len(ints) == 3:
        dim, start, length = argument(node, 1, "dim"), argument(node, 2, "start"), argument(node, 3, "length")
        return region.narrow(dim % rank, start, start + length) if start >= 0 else None
    if kind == "slice":
        dim, start, stop = (argument(node, *a) for a in ((1, "dim", 0), (2, "start"), (3, "end")))
        return _range(region, dim % rank, slice(start, stop, argument(node, 4, "step", 1)))
    if kind == "squeeze":
        dim = argument(node, 1, "dim")
        dims = range(rank) if dim is None else [dim % rank] if type(dim) is int else []
        result: Region | None = region
        for d in sorted((d for d in dims if type(region.sizes[d]) is int and region.sizes[d] == 1), reverse=True):
            result = result.select(d, 0) if result is not None else None
        return result if result is not None and len(result.visible) == len(shape(node)) else None
    return None


def _piece(region: Region, pieces: Node, index: object) -> Region | None:
    """Element `index` of what unbind, split or chunk made of `region`."""
    if type(index) is not int:
        return None
    rank = len(region.visible)
    dim = argument(pieces, 1 if name(pieces) == "unbind" else 2, "dim", 0)
    if type(dim) is not int:
        return None
    dim %= rank
    parts = value(pieces)
    index %= len(parts)
    if name(pieces) == "unbind":
        return region.select(dim, index)
    sizes = [p.shape[dim] for p in parts]
    if not all(type(s) is int for s in sizes):
        return None
    return region.narrow(dim, sum(sizes[:index]), sum(sizes[: index + 1]))


def indexed(region: Region, index: object) -> Region | None:
    """``region[index]``, where that is a region."""
    items = list(index) if isinstance(index, tuple) else [index]
    if not all(type(i) is int or i is Ellipsis or isinstance(i, slice) for i in items):
        return None
    rank = len(region.visible)
    if Ellipsis in items:
        at = items.index(Ellipsis)
        items[at : at + 1] = [slice(None)] * (rank - len(items) + 1)
    if len(items) > rank or Ellipsis in items:
        return None
    result: Region | None = region
    dim = 0
    for item in items:
        if result is None:
            return None
        if isinstance(item, slice):
            result = _range(result, dim, item)
            dim += 1
        else:
            result = result.select(dim, item)
    return result


def _range(region: Region, dim: int, item: slice) -> Region | None:
    if item == slice(None) or (item.start in (None, 0) and item.step in (None, 1) and item.stop == 2**63 - 1):
        return region
    size = region.sizes[dim]
    if type(size) is not int or not all(type(v) in (int, type(None)) for v in (item.start, item.stop, item.step)):
        return None
    start, stop, step = item.indices(size)
    return region.narrow(dim, start, stop) if step == 1 and stop > start else None


# ---- what a node reads and writes --------------------------------------------------------------------------------------------

#: Beside the storages of tensors: the state of the random number generators, and everything there is.
RANDOM, EVERYTHING = "random", "everything"
_MODES = ("manual_seed", "seed", "set_rng_state", "backward", "set_", "resize_", "requires_grad_")
_RUNNING_STATISTICS = ("batch_norm", "instance_norm")
_IN_PLACE_OPERATORS = ("iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor",
                       "ilshift", "irshift", "setitem", "delitem")  # fmt: skip


@dataclass(frozen=True)
class Effects:
    reads: frozenset[object]
    writes: frozenset[object]


def _storages(args: Iterable[object]) -> Iterator[object]:
    for arg in args:
        tensor = value(arg) if isinstance(arg, Node) else None
        if isinstance(tensor, (tuple, list)):
            tensor = next((t for t in tensor if isinstance(t, Tensor)), None)
        if isinstance(tensor, Tensor):
            yield torch_hooks.storage_key(tensor)


def storages(*nodes: Node) -> set[object]:
    """The memory of nodes, as `effects` names it."""
    return set(_storages(nodes))


@functools.cache
def _is_random(kind: str) -> bool:
    packet = getattr(aten, kind, None) if kind else None
    if packet is None:
        return False
    return any(torch.Tag.nondeterministic_seeded in getattr(packet, o).tags for o in packet.overloads())


@functools.cache
def _position_of_inplace(target: Callable[..., object]) -> int | None:
    try:
        return list(inspect.signature(target).parameters).index("inplace")
    except (ValueError, TypeError):
        return None


def _written(node: Node, kind: str) -> list[object]:
    """The arguments that a function of torch changes."""
    if torch_hooks.is_overload(node.target):
        return [argument(node, i, keyword) for i, keyword in torch_hooks.written_arguments(node.target)]
    if kind in _IN_PLACE_OPERATORS or (kind.endswith("_") and not kind.endswith("__")):
        return [node.args[0]] if node.args else [*node.kwargs.values()][:1]
    inplace = node.kwargs.get("inplace", False)
    if node.op == "call_function" and getattr(F, kind, None) is node.target and len(node.args) > 1:
        position = _position_of_inplace(node.target)
        if position is not None and position < len(node.args):
            inplace = node.args[position]
    written = [node.args[0]] if inplace and node.args else []
    if kind in _RUNNING_STATISTICS:
        written += [*node.args[1:3], *(node.kwargs.get(k) for k in ("running_mean", "running_var"))]
    return written + ([node.kwargs["out"]] if isinstance(node.kwargs.get("out"), Node) else [])


def effects(node: Node) -> Effects:
    """What a node reads and writes beside the tensor that it makes; a function that is not torch's may change everything."""
    if node.op in ("placeholder", "get_attr", "output"):
        return Effects(frozenset(), frozenset())
    reads = frozenset(_storages(node.all_input_nodes))
    if node.op == "call_function" and torch_hooks.changes_nothing(node.target):
        return Effects(reads, frozenset())
    kind = name(node)
    own = torch_hooks.is_overload(node.target) and node.target.namespace == "torch_gru_fuse"
    if (not kind and not own) or kind in _MODES:
        return Effects(reads, frozenset((EVERYTHING,)))
    writes = set(_storages(_written(node, kind)))
    if _is_random(kind):
        training = argument(node, 2, "train" if torch_hooks.is_overload(node.target) else "training", True)
        if "dropout" not in kind or training is not False:
            writes.add(RANDOM)
    return Effects(reads, frozenset(writes))


def write_positions(nodes: Iterable[Node]) -> dict[object, list[int]]:
    """For every storage that a graph writes, the positions of the nodes that do, ascending."""
    positions: dict[object, list[int]] = {}
    for i, node in enumerate(nodes):
        for storage in effects(node).writes:
            positions.setdefault(storage, []).append(i)
    return positions


class Waiting:
    """Which nodes have to come after calls that move to a later place in their graph: those that need what the calls make, by
    value, or by memory that they, or others that wait, write.

    Attributes:
        data: nodes that need it by value; any: by value or by memory.
        read, written: memory of the calls and of the nodes that wait.
    """

    def __init__(self) -> None:
        self.data: set[Node] = set()
        self.any: set[Node] = set()
        self.read: set[object] = set()
        self.written: set[object] = set()

    def start(self, call: Node, reads: Iterable[object]) -> None:
        """Another call that moves, and the memory that it reads."""
        self.data.add(call)
        self.any.add(call)
        self.read.update(reads)

    def visit(self, node: Node) -> bool:
        """Whether the next node in the order of the graph has to wait."""
        effect = effects(node)
        inputs = node.all_input_nodes
        data = any(i in self.data for i in inputs)
        memory = effect.reads & self.written or effect.writes & (self.read | self.written)
        if not (data or memory or any(i in self.any for i in inputs)):
            return False
        self.any.add(node)
        if data:
            self.data.add(node)
        self.read |= effect.reads
        self.written |= effect.writes
        return True


# ---- adding and removing nodes -----------------------------------------------------------------------------------------------


class Emitter:
    """Adds calls before a node of a graph, each with the fake tensor that it makes and the place in the source of `like`."""

    def __init__(self, graph: Graph, before: Node, like: Node):
        self._graph, self._before = graph, before
        self._key = "example_value" if "example_value" in like.meta else "val"
        self._meta = {k: like.meta[k] for k in ("stack_trace", "nn_module_stack", "source_fn_stack") if k in like.meta}

    def __call__(self, target: Callable[..., object], *args: object, **kwargs: object) -> Node:
        return self.known(target(*map_arg(args, value), **map_arg(kwargs, value)), target, *args, **kwargs)

    def known(self, result: object, target: Callable[..., object], *args: object, **kwargs: object) -> Node:
        """The same for a call whose fake result is known."""
        with self._graph.inserting_before(self._before):
            node = self._graph.call_function(target, args, kwargs)
        node.meta.update(self._meta)
        node.meta[self._key] = result
        return node

    def region(self, region: Region) -> Node:
        """The nodes that pick a region."""
        node, dim = region.base, 0
        for extent in region.extents:
            if isinstance(extent, int):
                node = self(aten.select.int, node, dim, extent)
                continue
            if extent is not None:
                node = self(aten.slice.Tensor, node, dim, *extent)
            dim += 1
        return node


def erase_unused(graph: Graph, nodes: Iterable[Node], keep: Container[Node]) -> None:
    """Erase those of `nodes` that nobody uses and that change nothing, and so on with what they used; none of `keep`."""
    pending = list(nodes)
    gone: set[Node] = set()
    while pending:
        node = pending.pop()
        if node in gone or node in keep or node.users or node.op in ("placeholder", "output"):
            continue
        if node.op != "get_attr" and effects(node).writes:
            continue
        pending += node.all_input_nodes
        gone.add(node)
        graph.erase_node(node)
