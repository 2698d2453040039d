"""Two GRUs of one graph that can run at once become one call of `gru_pair`: two encoders, or the two directions of one that are
written as two modules and a flip.

The call takes the place of the later of the two.  That is right where the later one needs nothing of the earlier, by value or
by memory that is written (`nodes.Waiting`); what does moves behind the call.

A flip of time before a GRU and one behind it are none: the layer goes through time backwards, and its output is in order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import getitem

import torch
from torch import Tensor
from torch.fx import Graph, Node

from torch_gru_fuse.ops.call import PairCall
from torch_gru_fuse.ops.schemas import ops
from torch_gru_fuse.passes import guards
from torch_gru_fuse.passes.nodes import (
    EVERYTHING,
    Emitter,
    Waiting,
    aten,
    effects,
    erase_unused,
    name,
    same_sizes,
    shape,
    storages,
    value,
)


@dataclass(frozen=True, eq=False)
class Layer:
    """A call of `gru`, what it is given by name, and those of its results that are used.

    flip: where the input is a flip of time, and the output, if it is used, by one such flip alone, the former; else None.
    """

    node: Node
    given: dict[str, object]
    output: Node | None
    final: Node | None
    flip: Node | None

    @property
    def input(self) -> Node:
        """What the layer is given, in the order of memory."""
        return self.given["input"] if self.flip is None else self.flip.args[0]  # type: ignore[return-value]

    @property
    def tensors(self) -> list[object]:
        """The tensors behind input, hx and params."""
        given = [self.given["input"], self.given["hx"], *self.given["params"]]  # type: ignore[misc]
        return [value(g) for g in given]


@dataclass(frozen=True)
class Pair:
    """Two calls of `gru`, by name, that have become the one call `made`."""

    first: str
    second: str
    made: Node


def _flipped(node: object, dim: int) -> bool:
    """Whether a node is another tensor with that dimension, and no other, reversed."""
    if name(node) != "flip" or not node.args:  # type: ignore[union-attr]
        return False
    dims = node.args[1:] or [node.kwargs.get("dims")]  # type: ignore[union-attr]
    if len(dims) == 1 and isinstance(dims[0], (tuple, list)):
        dims = dims[0]
    return len(dims) == 1 and dims[0] in (dim, dim - len(shape(node)))  # type: ignore[arg-type]


def _layer(node: Node) -> Layer | None:
    """The call as a layer; None where its arguments or results are not what the pass knows."""
    given = dict(zip(guards.SIGNATURES["gru"], node.args, strict=False)) | node.kwargs
    results: dict[object, Node] = {user.args[1]: user for user in node.users if user.target is getitem}
    if len(given) < len(guards.SIGNATURES["gru"]) or len(results) != len(node.users) or not results.keys() <= {0, 1}:
        return None
    output, flip, time = results.get(0), None, int(bool(given["batch_first"]))
    if _flipped(given["input"], time) and (
        output is None or (len(output.users) == 1 and _flipped(next(iter(output.users)), time))
    ):
        flip = given["input"]
    return Layer(node, given, output, results.get(1), flip)  # type: ignore[arg-type]


# ---- what may be a pair: each guard returns None or the reason against it ---------------------------------------------------


def single(first: Layer, second: Layer) -> str | None:
    for layer in (first, second):
        if layer.given["num_layers"] != 1:
            return f"{layer.given['num_layers']} layers are one launch by themselves"
        if layer.given["bidirectional"]:
            return "two directions are one launch by themselves"
    return None


def no_resets(first: Layer, second: Layer) -> str | None:
    if any(layer.given.get(option) is not None for layer in (first, second) for option in ("resets", "keep")):
        return "states are reset between steps"
    return None


def same_flags(first: Layer, second: Layer) -> str | None:
    for flag, default in (("has_biases", None), ("batch_first", None), ("recompute", False)):
        if first.given.get(flag, default) != second.given.get(flag, default):
            return f"they differ in {flag}"
    return None


def same_kind(first: Layer, second: Layer) -> str | None:
    if not all(isinstance(t, Tensor) for t in (*first.tensors, *second.tensors)):
        return "the graph does not say what one of their tensors is"
    kinds = [[(t.dtype, t.device) for t in layer.tensors] for layer in (first, second)]  # type: ignore[attr-defined]
    return None if kinds[0] == kinds[1] else "they differ in dtype or device"  # under autocast each has several dtypes


def same_shape(first: Layer, second: Layer) -> str | None:
    shapes = [(*shape(layer.given["input"])[:2], *shape(layer.given["hx"])) for layer in (first, second)]  # type: ignore[arg-type]
    return None if same_sizes(*shapes) else "their T, B and H are not known to be the same"


def same_gradients(first: Layer, second: Layer) -> str | None:
    needs = [any(t.requires_grad for t in layer.tensors) for layer in (first, second)]  # type: ignore[attr-defined]
    return None if needs[0] == needs[1] else "only one of them has gradients"


ON_CPU = "on a CPU nothing is gained"


def profitable(first: Layer, second: Layer) -> str | None:
    x, y = (value(layer.given["input"]) for layer in (first, second))
    assert isinstance(x, Tensor) and isinstance(y, Tensor)
    if x.device.type != "cuda":
        return ON_CPU
    results = value(first.node)
    known = torch.cuda.is_available() or os.environ.get("TORCH_GRU_FUSE_GPU")
    if not known or not all(type(n) is int for n in (*x.shape, *y.shape)) or results[0].dtype != x.dtype:  # type: ignore[index]
        return None  # sizes, dtype (autocast) or GPU are for the op to look at
    from torch_gru_fuse.ops.kernel_path import plan_of_pair  # imports Triton

    time_first = (lambda t: t.transpose(0, 1)) if first.given["batch_first"] else (lambda t: t)
    states = x.new_empty(2, *shape(first.given["hx"])[1:])  # type: ignore[arg-type]
    params = [p for layer in (first, second) for p in layer.tensors[2:]]
    call = PairCall([time_first(x), time_first(y)], states, params, first.given["has_biases"], [False, False])  # type: ignore[arg-type]
    training = torch.is_grad_enabled() and any(t.requires_grad for t in first.tensors)  # type: ignore[attr-defined]
    plan = plan_of_pair(call, training=training)
    return plan if isinstance(plan, str) else None


#: In the order in which they are asked; a later guard may rely on an earlier one.
GUARDS: tuple[Callable[[Layer, Layer], str | None], ...] = (
    single, no_resets, same_flags, same_kind, same_shape, same_gradients, profitable,
)  # fmt: skip


DEPENDS = "one needs the result of the other"


def _between(first: Layer, second: Layer) -> list[Node] | str:
    """The nodes between the two that have to come after both; or why the earlier call cannot move to the later."""
    order = Waiting()
    order.start(first.node, storages(*first.node.all_input_nodes, first.input))
    waiting = []
    node = first.node.next
    while node is not second.node:
        if EVERYTHING in effects(node).writes:
            return f"between the two is an operation of unknown effect, {name(node) or node.target}"
        if order.visit(node):
            waiting.append(node)
        node = node.next
    needed = {*second.node.all_input_nodes, second.input}
    if needed & order.data:
        return DEPENDS
    if needed & order.any or storages(*needed) & order.written:
        return "memory that one of them reads is changed in place between the two"
    return waiting


def _stays(layer: Layer, until: Node) -> bool:
    """Whether nothing changes what a layer's input was flipped from, until a later node."""
    if layer.flip is None:
        return True
    memory = {*storages(layer.input), EVERYTHING}
    node = layer.flip.next
    while node is not until:
        if memory & effects(node).writes:
            return False
        node = node.next
    return True


# ---- the call ---------------------------------------------------------------------------------------------------------------

_NEAR = 8  # calls behind one that are looked at: with all of them the time would grow with the square of their number


def pair_up(graph: Graph) -> tuple[list[Pair], dict[str, str]]:
    """Makes pairs of the calls of `gru` in a graph, in order.

    Returns:
        the pairs, and by name of each other call that has another one near why the two are none.
    """
    calls = [node for node in graph.nodes if node.target is ops.gru.default]
    pairs: list[Pair] = []
    reasons: dict[str, str] = {}
    while calls:
        first = _layer(calls.pop(0))
        for second in map(_layer, calls[:_NEAR]):
            if first is None or second is None:
                continue
            reason = next((r for guard in GUARDS if (r := guard(first, second)) is not None), None)
            waiting = _between(first, second) if reason is None else reason
            if isinstance(waiting, str):
                for layer in (first, second) if waiting not in (ON_CPU, DEPENDS) else ():  # which go without saying
                    reasons.setdefault(layer.node.name, waiting)
                continue
            calls.remove(second.node)
            pairs.append(_emit(graph, first, second, waiting))
            left = set(calls)  # which may follow each other in another order now
            calls = [node for node in graph.nodes if node in left]
            break
    for pair in pairs:
        reasons.pop(pair.first, None)
        reasons.pop(pair.second, None)
    return pairs, reasons


def _emit(graph: Graph, first: Layer, second: Layer, waiting: Sequence[Node]) -> Pair:
    anchor = second.node
    for node in waiting:
        anchor.append(node)
        anchor = node
    layers = [layer if _stays(layer, second.node) else replace(layer, flip=None) for layer in (first, second)]
    emit = Emitter(graph, second.node, second.node)
    states = emit(aten.cat.default, [layer.given["hx"] for layer in layers], 0)
    params = [p for layer in layers for p in layer.given["params"]]  # type: ignore[attr-defined]
    reverse = [layer.flip is not None for layer in layers]
    options = {"recompute": True} if first.given.get("recompute") else {}
    outputs = [value(layer.node)[0] for layer in layers]  # type: ignore[index]
    last = value(first.node)[1]  # type: ignore[index]
    call = emit.known(
        (*outputs, last.new_empty(2, *last.shape[1:])), ops.gru_pair.default, [layer.input for layer in layers], states, params,
        first.given["has_biases"], reverse, first.given["batch_first"], **options,
    )  # fmt: skip
    finals: Node | None = None
    unused: list[Node] = []
    for i, layer in enumerate(layers):
        if layer.output is not None:
            old = layer.output if layer.flip is None else next(iter(layer.output.users))
            old.replace_all_uses_with(emit.known(value(old), getitem, call, i))
            unused.append(old)
        if layer.final is not None:
            if finals is None:  # split, not slices: AOTAutograd hands on what has several results as no views of each other
                both = [value(other.node)[1] for other in layers]  # type: ignore[index]
                finals = emit.known(both, aten.split.Tensor, emit.known(value(call)[2], getitem, call, 2), 1)  # type: ignore[index]
            layer.final.replace_all_uses_with(emit.known(value(layer.final), getitem, finals, i))
            unused.append(layer.final)
        unused.append(layer.node)
    erase_unused(graph, unused, ())
    return Pair(first.node.name, second.node.name, call)

