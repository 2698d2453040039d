"""Resets: a hidden state that is multiplied by one factor a row, or set to zero in some rows, before a cell gets it.

    h * (1 - done[t]).unsqueeze(-1)         h * mask[t][:, None]         h * (~done[t]).float().view(-1, 1)
    torch.where(done[t][:, None], 0, h)     h.masked_fill(done[t].unsqueeze(-1), 0)

The sequence op does the same with `keep`: a factor of the dtype of the state multiplies, exactly as here, and a bool selects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from torch_gru_fuse.passes.nodes import Emitter, Region, Regions, argument, aten, indexed, name, same_sizes, shape, value


@dataclass(frozen=True)
class Pointwise:
    """A function of one tensor, element by element: its name, a constant, and the dtype of the result."""

    kind: str
    constant: object
    dtype: torch.dtype

    def emit(self, emit: Emitter, x: Node) -> Node:
        if self.kind == "to":
            return emit(aten.to.dtype, x, self.dtype)
        if self.kind == "rsub":
            return emit(aten.rsub.Scalar, x, self.constant)
        if self.kind in _COMPARISONS:
            return emit(getattr(aten, self.kind).Scalar, x, self.constant)
        return emit(getattr(aten, self.kind).default, x)


@dataclass(frozen=True)
class Factor:
    """What multiplies the rows of a state, or says which are kept: functions, in their order, of a part of a tensor.

    Attributes:
        region: the part, of size [B], [B, 1] or of one element.
        functions: what is applied to it.
    """

    region: Region
    functions: tuple[Pointwise, ...]

    @property
    def form(self) -> object:
        """Factors of the same form are made for all steps at once."""
        sizes = self.region.sizes
        return self.functions, len(sizes), _one_element(sizes), value(self.region.base).dtype  # type: ignore[union-attr]


@dataclass(frozen=True)
class Reset:
    """What is done to the state `state`.

    Attributes:
        state: before the reset.
        factor: `keep` of the op.
        dtype: of the factor: that of the state, which it multiplies, or bool, which selects.
    """

    state: Region
    factor: Factor
    dtype: torch.dtype


def _one_element(sizes: tuple[object, ...]) -> bool:
    return all(type(size) is int and size == 1 for size in sizes)


_TO_DTYPE = ("to", "type", "type_as", "float", "double", "half", "bfloat16", "bool", "int", "long", "_to_copy")
_NOT = {"invert": "bitwise_not", "bitwise_not": "bitwise_not", "logical_not": "logical_not"}
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_ZEROS = ("zeros", "zeros_like", "new_zeros")


def find_reset(h: Region, cells: Container[Node], regions: Regions, unchanged: Callable[[Node], bool]) -> Reset | None:
    """The reset that made the hidden state of a cell, if one did.

    unchanged: whether nothing in the graph writes to the memory of a node.
    """
    node = h.base
    if not h.whole or len(shape(node)) != 2 or not unchanged(node):
        return None
    for state, factor, functions in _candidates(node, cells, unchanged):
        if not isinstance(state, Node) or not isinstance(factor, Node):
            continue
        tensor, result, keep = value(state), value(node), value(factor)
        if not all(isinstance(t, Tensor) for t in (tensor, result, keep)):
            continue
        if tensor.dtype != result.dtype or not same_sizes(shape(state), shape(node)):  # type: ignore[union-attr]
            continue
        if keep.requires_grad or keep.device != tensor.device:  # type: ignore[union-attr]
            continue
        selects = name(node) not in _PRODUCTS
        dtype = torch.bool if selects else tensor.dtype  # type: ignore[union-attr]
        if selects and keep.dtype != torch.bool:  # type: ignore[union-attr]
            continue
        if not selects and keep.dtype != dtype:  # type: ignore[union-attr]
            if keep.dtype.is_floating_point or keep.dtype.is_complex:  # type: ignore[union-attr]
                continue
            functions = (Pointwise("to", None, dtype),)
        found = _factor(factor, shape(node)[0], regions, unchanged)
        if found is not None:
            return Reset(regions.of(state), Factor(found.region, (*found.functions, *functions)), dtype)
    return None


_PRODUCTS = ("mul", "multiply")
_Candidate = tuple[object, object, tuple[Pointwise, ...]]


def _candidates(node: Node, cells: Container[Node], unchanged: Callable[[Node], bool]) -> list[_Candidate]:
    """State, factor, and what is applied to the factor to have `keep`, in the ways in which a node may be read."""
    kind, invert = name(node), (Pointwise("logical_not", None, torch.bool),)
    if kind in _PRODUCTS and not set(node.kwargs) - {"input", "other"}:
        left, right = argument(node, 0, "input"), argument(node, 1, "other")
        ways: list[_Candidate] = [(left, right, ()), (right, left, ())]
        return ways[::-1] if right in cells else ways
    if kind == "where" and not node.kwargs and len(node.args) == 3:
        condition, yes, no = node.args
        if _is_zero(yes, unchanged):
            return [(no, condition, invert)]
        return [(yes, condition, ())] if _is_zero(no, unchanged) else []
    if kind == "masked_fill" and _is_zero(argument(node, 2, "value"), unchanged):
        return [(argument(node, 0, "input"), argument(node, 1, "mask"), invert)]
    return []


def _is_zero(arg: object, unchanged: Callable[[Node], bool]) -> bool:
    """Whether an argument is zero, as a number or as a tensor that is made of zeros and stays so."""
    if isinstance(arg, (int, float)):
        return arg == 0 and math.copysign(1, arg) > 0
    return isinstance(arg, Node) and name(arg) in _ZEROS and "out" not in arg.kwargs and unchanged(arg)


def _factor(node: Node, batch: object, regions: Regions, unchanged: Callable[[Node], bool]) -> Factor | None:
    """A factor of each row from what is broadcast against a state [B, H]."""
    if name(node) in ("expand", "expand_as") and isinstance(node.args[0], Node):
        node = node.args[0]
    sizes = shape(node)
    if not same_sizes(sizes, (batch, 1)) and not (isinstance(batch, int) and len(sizes) <= 2 and _one_element(sizes)):
        return None
    functions: list[Pointwise] = []
    region = regions.of(node)
    while region.base is node and region.whole:
        if (source := _without_last_dimension(node, regions)) is not None:
            region = source
        elif (applied := _pointwise(node)) is not None and unchanged(node) and unchanged(applied[0]):
            functions.insert(0, applied[1])
            region = regions.of(applied[0])
        else:
            break
        if not region.whole:
            break
        node = region.base
    return Factor(region, tuple(functions))


def _without_last_dimension(node: Node, regions: Regions) -> Region | None:
    """x of size [B] where the node is the same as [B, 1]."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or len(shape(node)) != 2:
        return None
    kind = name(node)
    if kind == "unsqueeze" and argument(node, 1, "dim") in (-1, 1):
        return regions.of(source)
    if kind == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        if len(index) > 1 and index[-1] is None and None not in index[:-1]:
            return indexed(regions.of(source), index[:-1])
    if kind in ("view", "reshape") and len(shape(source)) == 1 and same_sizes(shape(node), (*shape(source), 1)):
        return regions.of(source)
    return None


def _pointwise(node: Node) -> tuple[Node, Pointwise] | None:
    """The tensor that a node is a function of, and the function."""
    kind, dtype = name(node), getattr(value(node), "dtype", None)
    source = argument(node, 0, "input")
    if kind in _TO_DTYPE and isinstance(source, Node) and isinstance(value(source), Tensor):
        return (source, Pointwise("to", None, dtype)) if value(source).device == value(node).device else None  # type: ignore
    if kind in _NOT and isinstance(source, Node):
        return source, Pointwise(_NOT[kind], None, dtype)
    other = argument(node, 1, "other")
    if len(node.args) != 2 or node.kwargs:
        return None
    if kind == "sub" and isinstance(source, (int, float)) and isinstance(other, Node):
        return other, Pointwise("rsub", source, dtype)
    if kind in ("rsub", *_COMPARISONS) and isinstance(source, Node) and isinstance(other, (int, float)):
        return source, Pointwise(kind, other, dtype)
    return None
