"""GRU cells in a graph: calls of `torch.gru_cell`, and the equations of one, however they are written.

    r = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
    z = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
    n = tanh(W_in x + b_in + r * (W_hn h + b_hn))
    h' = (1 - z) * n + z * h

A formula is compared as a polynomial: products and sums are multiplied out down to what is neither (`Algebra`), so that neither
the order of terms nor the form of the update (`n + z * (h - n)`, `lerp`) matters.  Slicing is pushed inwards, to rows of the
weights: one `Linear` to 3H that is cut in three is the same as three.

A cell is described by `Cell`; nothing in the graph changes before it is known what becomes of it.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Graph, Node

from torch_gru_fuse.ops.checks import DTYPES
from torch_gru_fuse.passes import guards
from torch_gru_fuse.passes.nodes import (
    EVERYTHING,
    Emitter,
    Extent,
    Region,
    Regions,
    argument,
    aten,
    name,
    same_sizes,
    shape,
    storages,
    value,
    write_positions,
)


@dataclass(frozen=True)
class Piece:
    """Rows of a weight, or elements of a bias: a region of a tensor, transposed or not, with its sign."""

    region: Region
    transposed: bool = False
    negative: bool = False

    @property
    def sizes(self) -> tuple[object, ...]:
        return self.region.sizes[::-1] if self.transposed else self.region.sizes


@dataclass(frozen=True)
class Weights:
    """The weights of a cell.

    Attributes:
        w_ih, w_hh: pieces that follow one another along the rows of [3H, I] and [3H, H].
        b_ih, b_hh: the same for biases [3H], each a sum of pieces (of none: zero); None for a cell without that bias.
        hidden: H.
    """

    w_ih: tuple[Piece, ...]
    w_hh: tuple[Piece, ...]
    b_ih: tuple[tuple[Piece, ...], ...] | None
    b_hh: tuple[tuple[Piece, ...], ...] | None
    hidden: int

    def nodes(self) -> set[Node]:
        biases = [p for b in (self.b_ih, self.b_hh) if b is not None for terms in b for p in terms]
        return {p.region.base for p in (*self.w_ih, *self.w_hh, *biases)}

    @property
    def has_biases(self) -> bool:
        return self.b_ih is not None or self.b_hh is not None


@dataclass(eq=False)
class Cell:
    """One step of a GRU.

    Attributes:
        node: makes the new hidden state h'.
        x: the input, as the part of a tensor that it is: [B, I], or [.., I] of a hand-written cell, where dimensions of size
            one that the state begins with may be missing.
        x_node: a node that holds the input, None where there is none (the projection was made for all time steps at once).
        h: the hidden state, as the part of a tensor that it is: [B, H], or [.., H] of a hand-written cell.
        weights: what the cell multiplies with.
        call: whether it is a call of `torch.gru_cell`.
        inner: of a hand-written cell, the nodes that its formula is made of.
    """

    node: Node
    x: Region
    x_node: Node | None
    h: Region
    weights: Weights
    call: bool
    inner: tuple[Node, ...] = ()

    @property
    def kind(self) -> str:
        return "torch.gru_cell" if self.call else "hand-written cell"


@dataclass
class Found:
    """What `find_cells` found: the cells by the node of h', and gated updates that are none, with the reason."""

    cells: dict[Node, Cell] = field(default_factory=dict)
    others: dict[Node, str] = field(default_factory=dict)


class NoMatch(Exception):
    """The formula is no GRU; `reason` is empty where it is not even similar to one."""

    def __init__(self, reason: str = ""):
        super().__init__(reason)
        self.reason = reason


# ---- formulas as polynomials -------------------------------------------------------------------------------------------------

#: A product of factors, sorted; the sum of products is a Counter of them with their coefficients.
Monomial = tuple[Region, ...]
Polynomial = Counter[Monomial]

_MOST_TERMS = 12
_SUMS = ("add", "sub", "subtract", "rsub", "iadd", "isub")
_PRODUCTS = ("mul", "multiply", "imul")
ARITHMETIC = frozenset((*_SUMS, *_PRODUCTS, "neg", "negative", "pos", "lerp", "addcmul", "ones_like"))


def _sorted(factors: Iterable[Region]) -> Monomial:
    return tuple(sorted(factors, key=lambda r: (r.base.name, str(r.extents))))


class Algebra:
    """Multiplies out the formulas of one graph.

    Args:
        atoms: nodes that stand for themselves whatever they are made of.
    """

    def __init__(self, regions: Regions, atoms: set[Node]):
        self._regions = regions
        self._atoms = atoms
        self.visited: list[Node] = []

    def expand(self, region: Region, sizes: Sequence[object], *, top: bool = False) -> Polynomial:
        """`region` as a polynomial; everything in it has the size `sizes`, or its last dimension alone (a bias)."""
        region = self._before_view(region)
        base = region.base
        kind = name(base)
        if kind not in ARITHMETIC or (base in self._atoms and not top):
            own = region.sizes
            if not same_sizes(own, sizes) and not same_sizes(own, sizes[-1:]):
                raise NoMatch
            return Counter({(region,): 1})
        self.visited.append(base)
        result = self._arithmetic(kind, base, region, sizes)
        result = Counter({m: c for m, c in result.items() if c})
        if len(result) > _MOST_TERMS:
            raise NoMatch
        return result

    def _before_view(self, region: Region) -> Region:
        """``g.view(B, 3, H)[:, i]`` as columns of g."""
        node, sizes = region.base, shape(region.base)
        source = node.args[0] if name(node) in ("view", "reshape", "unflatten") and node.args else None
        if not isinstance(source, Node) or len(sizes) < 2 or not isinstance(region.extents[-2], int):
            return region
        *leading, columns = shape(source) or (None,)
        *before, index, last = region.extents
        width = sizes[-1]
        if not isinstance(columns, int) or not isinstance(width, int) or not same_sizes(leading, sizes[:-2]):
            return region
        low, high = last if isinstance(last, tuple) else (0, width)
        self.visited.append(node)
        part = self._regions.of(source).part((*before, (index * width + low, index * width + high)))
        return region if part is None else self._before_view(part)

    def _arithmetic(self, kind: str, node: Node, region: Region, sizes: Sequence[object]) -> Polynomial:
        def term(arg: object) -> Polynomial:
            return self._operand(arg, region, sizes)

        if kind == "ones_like":
            return Counter({(): 1})
        if kind in ("neg", "negative", "pos"):
            return _scaled(term(argument(node, 0, "input")), 1 if kind == "pos" else -1)
        if kind == "lerp":
            start, end, weight = (term(argument(node, i, k)) for i, k in enumerate(("input", "end", "weight")))
            return _sum(start, _product(weight, _sum(end, _scaled(start, -1))))
        if kind == "addcmul":
            first, second = term(argument(node, 1, "tensor1")), term(argument(node, 2, "tensor2"))
            return _sum(term(argument(node, 0, "input")), _scaled(_product(first, second), node.kwargs.get("value", 1)))
        left, right = term(argument(node, 0, "input")), term(argument(node, 1, "other"))
        if kind in _PRODUCTS:
            return _product(left, right)
        alpha = argument(node, 2, "alpha", 1)
        if kind == "rsub":
            return _sum(right, _scaled(left, -alpha))
        return _sum(left, _scaled(right, alpha if kind in ("add", "iadd") else -alpha))

    def _operand(self, arg: object, region: Region, sizes: Sequence[object]) -> Polynomial:
        if isinstance(arg, (int, float)) and not isinstance(arg, bool):
            return Counter({(): arg})
        if not isinstance(arg, Node) or not isinstance(value(arg), Tensor):
            raise NoMatch
        full, own = shape(region.base), shape(arg)
        if value(arg).dtype != value(region.base).dtype or len(own) == 0:
            raise NoMatch
        if same_sizes(full, own):
            extents = region.extents
        elif same_sizes(full[-1:], own):
            extents = region.extents[-1:]
        elif _lacks_ones(own, full) and all(e in (None, 0) for e in region.extents[: -len(own)]):
            extents = region.extents[-len(own) :]
            sizes = sizes[-sum(not isinstance(e, int) for e in extents) :]
        else:
            raise NoMatch
        part = self._regions.of(arg).part(extents)
        if part is None:
            raise NoMatch
        return self.expand(part, sizes)


def _lacks_ones(own: Sequence[object], full: Sequence[object]) -> bool:
    """Whether sizes are `full` without some of the ones that it begins with."""
    missing = len(full) - len(own)
    return len(own) > 1 and missing >= 0 and same_sizes((*[1] * missing, *own), full)


def _sum(left: Polynomial, right: Polynomial) -> Polynomial:
    result = Counter(left)
    for monomial, factor in right.items():
        result[monomial] += factor
    return result


def _scaled(polynomial: Polynomial, factor: float) -> Polynomial:
    if not isinstance(factor, (int, float)):
        raise NoMatch
    return Counter({m: c * factor for m, c in polynomial.items()})


def _product(left: Polynomial, right: Polynomial) -> Polynomial:
    result: Polynomial = Counter()
    for a, factor in left.items():
        for b, other in right.items():
            if len(a) + len(b) > 2:
                raise NoMatch
            result[_sorted((*a, *b))] += factor * other
    return result


# ---- matching ----------------------------------------------------------------------------------------------------------------

_MATRIX_PRODUCTS = ("linear", "matmul", "mm", "addmm")
_ROOTS = ("add", "sub", "rsub", "lerp", "addcmul", "subtract")


@dataclass(frozen=True)
class _Projection:
    """Some columns of ``operand @ weight^T``."""

    operand: Region
    weight: Piece


def _operands(node: Node) -> list[object]:
    """The tensor that a matrix product projects, or those that `cat` made it of."""
    operand = argument(node, 1, "mat1") if name(node) == "addmm" else argument(node, 0, "input")
    if isinstance(operand, Node) and name(operand) in ("cat", "concat", "concatenate"):
        parts = argument(operand, 0, "tensors")
        return [operand, *(parts if isinstance(parts, (list, tuple)) else [])]
    return [operand]


class _Matcher:
    """Finds the hand-written cells of a graph."""

    def __init__(self, graph: Graph, regions: Regions, calls: dict[Node, Cell]):
        self._regions = regions
        self._position = {n: i for i, n in enumerate(graph.nodes)}
        self._writes = write_positions(graph.nodes)
        projected = {o for n in graph.nodes if name(n) in _MATRIX_PRODUCTS for o in _operands(n) if isinstance(o, Node)}
        # h is what a matrix product projects, and nothing that itself is projected belongs to a formula.
        self._projected = {regions.of(o).base for o in projected if shape(o)} | projected | set(calls)
        self._algebra = Algebra(regions, self._projected)

    def match(self, root: Node) -> Cell:
        tensor = value(root)
        if not isinstance(tensor, Tensor) or tensor.dim() < 2 or tensor.dtype not in DTYPES:
            raise NoMatch
        self._algebra.visited = []
        z, n, h, swapped = self._update(root)
        return self._cell(root, z, n, h, swapped)

    def _update(self, root: Node) -> tuple[Region, Region, Region, bool]:
        """The roles in h' = (1 - z) n + z h: the arguments z, n and h, and whether z and 1 - z have changed places."""
        whole = Region(root, (None,) * len(shape(root)))
        polynomial = self._algebra.expand(whole, shape(root), top=True)
        single = [m[0] for m, c in polynomial.items() if len(m) == 1 and c == 1]
        pairs = {m: c for m, c in polynomial.items() if len(m) == 2}
        if len(polynomial) != 3 or len(single) != 1 or sorted(pairs.values()) != [-1, 1]:
            raise NoMatch
        [first] = single
        minus, plus = sorted(pairs, key=lambda m: pairs[m])
        common = [f for f in minus if f in plus and name(f.base) in ("sigmoid",)]
        if len(common) != 1 or first not in minus:
            raise NoMatch
        [z] = common
        second = plus[0] if plus[1] == z else plus[1]
        if {first, z} != set(minus) or second in (first, z):
            raise NoMatch
        # Of the two that are mixed one is the hidden state.
        for n, h, swapped in ((first, second, False), (second, first, True)):
            if name(n.base) == "tanh" and h.base in self._projected:
                return z, n, h, swapped
        for n, h in ((first, second), (second, first)):
            if h.base in self._projected and n.base not in self._projected:
                self._activation_of(n, z, h)
        raise NoMatch

    def _activation_of(self, n: Region, z: Region, h: Region) -> None:
        """Raises with a reason where z is a gate of x and h, and n is no candidate."""
        operands = {p.operand for p, _ in self._projections(self._preactivation(z))}
        if h in operands and len(operands) > 1:
            kind = name(n.base) or "another function"
            raise NoMatch(f"the candidate is made by {kind}, a GRU's by tanh")

    def _preactivation(self, gate: Region) -> Polynomial:
        argument_node = gate.base.args[0] if gate.base.args else gate.base.kwargs.get("input")
        if not isinstance(argument_node, Node):
            raise NoMatch
        self._algebra.visited.append(gate.base)
        part = self._regions.of(argument_node).part(gate.extents)
        if part is None:
            raise NoMatch
        return self._algebra.expand(part, gate.sizes)

    def _projections(self, polynomial: Polynomial) -> list[tuple[_Projection, Piece | None]]:
        """The projections that a sum is made of, each with the bias of its Linear."""
        found = []
        for monomial in polynomial:
            for factor in monomial:
                if name(factor.base) in _MATRIX_PRODUCTS:
                    found += self._linear(factor)
        return found

    def _linear(self, region: Region) -> list[tuple[_Projection, Piece | None]]:
        """A matrix product, restricted to `region`, as rows of its weight, for each part of what it projects."""
        node, kind = region.base, name(region.base)
        bias: object = None
        if kind == "linear":
            operand, weight, bias = (argument(node, i, k) for i, k in enumerate(("input", "weight", "bias")))
        elif kind == "addmm":
            bias, operand, weight = (argument(node, i, k) for i, k in enumerate(("input", "mat1", "mat2")))
            if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1 or len(node.args) > 3:
                raise NoMatch
        else:
            operand, weight = argument(node, 0, "input"), argument(node, 1, "mat2", node.kwargs.get("other"))
        if not isinstance(operand, Node) or not isinstance(weight, Node) or len(shape(weight)) != 2:
            raise NoMatch
        *rows, columns = region.extents
        if len(shape(operand)) != len(region.extents) or isinstance(columns, int):
            raise NoMatch
        self._algebra.visited.append(node)
        piece = self._weight(weight, columns, is_transposed=kind != "linear")
        own_bias = None
        if bias is not None:
            if not isinstance(bias, Node) or len(shape(bias)) != 1:
                raise NoMatch
            own_bias = self._bias(self._regions.of(bias), columns)
        result = []
        for part, at in self._parts(operand):
            source = self._regions.of(part).part((*rows, None))
            if source is None:
                raise NoMatch
            region_of_weight = piece.region.part((at, None) if piece.transposed else (None, at))
            if region_of_weight is None:
                raise NoMatch
            result.append((_Projection(source, Piece(region_of_weight, piece.transposed)), own_bias))
            own_bias = None  # once
        return result

    def _parts(self, operand: Node) -> list[tuple[Node, Extent]]:
        """What `cat` made an operand of, each with its columns; otherwise the operand with all."""
        parts = _operands(operand) if name(operand) in ("cat", "concat", "concatenate") else []
        if name(operand) in ("cat", "concat", "concatenate"):
            parts = argument(operand, 0, "tensors")
            dim = argument(operand, 1, "dim", 0)
            rank = len(shape(operand))
            widths = [shape(p)[-1] if isinstance(p, Node) and len(shape(p)) == rank else None for p in parts]
            if type(dim) is int and dim % rank == rank - 1 and all(type(w) is int for w in widths):
                self._algebra.visited.append(operand)
                ends = [sum(widths[: i + 1]) for i in range(len(widths))]
                return [(p, (end - w, end)) for p, w, end in zip(parts, widths, ends, strict=True)]
        return [(operand, None)]

    def _weight(self, weight: Node, columns: Extent, *, is_transposed: bool) -> Piece:
        """Rows of the weight W in x W^T, where `weight` is W or, as in `x @ weight`, its transpose."""
        while (source := _transpose_of(weight)) is not None:
            self._algebra.visited.append(weight)
            weight, is_transposed = source, not is_transposed
        region = self._regions.of(weight).part((None, columns) if is_transposed else (columns, None))
        if region is None:
            raise NoMatch
        return Piece(region, is_transposed)

    def _bias(self, bias: Region, columns: Extent) -> Piece:
        region = bias.part((columns,))
        if region is None:
            raise NoMatch
        return Piece(region)

    def _terms(self, polynomial: Polynomial, which: str) -> tuple[list[_Projection], list[list[Piece]], list[Piece]]:
        """A sum as projections, the biases of each, and other biases."""
        projections: list[_Projection] = []
        biases: list[list[Piece]] = []
        loose: list[Piece] = []
        for (factor,), sign in polynomial.items():
            if sign not in (1, -1):
                raise NoMatch(f"the {which} gate scales its terms by {sign}")
            kind = name(factor.base)
            if kind in _MATRIX_PRODUCTS:
                for projection, bias in self._linear(factor):
                    weight = Piece(projection.weight.region, projection.weight.transposed, sign < 0)
                    projections.append(_Projection(projection.operand, weight))
                    biases.append([] if bias is None else [Piece(bias.region, negative=sign < 0)])
            elif len(factor.sizes) == 1:
                loose.append(Piece(factor, negative=sign < 0))
            else:
                raise NoMatch(f"the {which} gate is a function of {_described(factor)}, not of two matrix products alone")
        return projections, biases, loose

    def _cell(self, root: Node, z: Region, n: Region, h: Region, swapped: bool) -> Cell:
        hidden = shape(root)[-1]
        if not isinstance(hidden, int):
            raise NoMatch("its hidden size is not a constant of the graph")

        candidate = self._preactivation(n)
        resets = {f for m in candidate if len(m) == 2 for f in m if name(f.base) == "sigmoid"}
        plain = Counter({m: c for m, c in candidate.items() if len(m) == 1})
        if not resets:
            self._why_no_reset(plain, h)
        if len(resets) != 1 or () in candidate:
            raise NoMatch("its candidate is not tanh(W x + b + r * (W h + b))")
        [r] = resets
        within: Polynomial = Counter()
        for monomial, factor in candidate.items():
            if len(monomial) == 2:
                if r not in monomial:
                    raise NoMatch("its candidate has a product without the reset gate")
                other = monomial[0] if monomial[1] == r else monomial[1]
                within[(other,)] += factor

        sums = {"reset": self._preactivation(r), "update": self._preactivation(z)}
        w_ih, w_hh, b_ih, b_hh = [], [], [], []
        inputs: set[Region] = set()
        for which, polynomial in sums.items():
            if any(len(m) != 1 for m in polynomial):
                raise NoMatch(f"the {which} gate is not sigmoid(W x + W h + b)")
            negative = swapped and which == "update"
            projections, biases, loose = self._terms(_scaled(polynomial, -1) if negative else polynomial, which)
            of_h = [i for i, p in enumerate(projections) if p.operand == h]
            of_x = [i for i, p in enumerate(projections) if p.operand != h]
            if len(of_h) != 1 or len(of_x) != 1:
                raise NoMatch(f"the {which} gate has {len(of_x)} projections of the input and {len(of_h)} of the hidden state, "
                              "a GRU's one of each")  # fmt: skip
            inputs.add(projections[of_x[0]].operand)
            w_ih.append(projections[of_x[0]].weight)
            w_hh.append(projections[of_h[0]].weight)
            b_ih.append((*biases[of_x[0]], *loose))
            b_hh.append(tuple(biases[of_h[0]]))

        outer, outer_biases, loose = self._terms(plain, "candidate")
        inner, inner_biases, inner_loose = self._terms(within, "candidate")
        if any(p.operand == h for p in outer):
            raise NoMatch("the reset gate does not multiply all of the candidate's projection of the hidden state")
        if len(inner) != 1 or inner[0].operand != h or len(outer) != 1:
            raise NoMatch("its candidate is not tanh(W x + b + r * (W h + b))")
        inputs.add(outer[0].operand)
        w_ih.append(outer[0].weight)
        w_hh.append(inner[0].weight)
        b_ih.append((*outer_biases[0], *loose))
        b_hh.append((*inner_biases[0], *inner_loose))

        if len(inputs) != 1:
            raise NoMatch("its gates have different inputs")
        [x] = inputs
        # The order of torch's gates is reset, update, candidate.
        has_biases = any(b_ih) or any(b_hh)
        weights = Weights(
            _merged(w_ih), _merged(w_hh), tuple(b_ih) if has_biases else None, tuple(b_hh) if has_biases else None, hidden
        )
        self._check_sizes(root, x, h, w_ih, w_hh, [*b_ih, *b_hh], hidden)
        inner_nodes = tuple(dict.fromkeys(self._algebra.visited))
        self._check_unchanged(root, inner_nodes, x, h, weights)
        return Cell(root, x, None, h, weights, call=False, inner=inner_nodes)

    def _why_no_reset(self, plain: Polynomial, h: Region) -> None:
        for (factor,) in plain:
            if name(factor.base) not in _MATRIX_PRODUCTS:
                raise NoMatch(f"its candidate is a function of {_described(factor)}, not of two matrix products alone")
            for projection, _ in self._linear(factor):
                operand = projection.operand
                if name(operand.base) in _PRODUCTS and any(a is h.base for a in operand.base.args):
                    raise NoMatch("the reset gate is applied before the product (Cho 2014, Keras reset_after=False): "
                                  "W (r * h), where nn.GRU has r * (W h)")  # fmt: skip
        raise NoMatch("its candidate has no reset gate")

    def _check_sizes(
        self, root: Node, x: Region, h: Region, w_ih: list[Piece], w_hh: list[Piece], biases: list[tuple[Piece, ...]],
        hidden: int,
    ) -> None:  # fmt: skip
        *batch, _ = shape(root)
        if not same_sizes(h.sizes, shape(root)):
            raise NoMatch(f"its hidden state of size {tuple(h.sizes)} is broadcast to {tuple(shape(root))}")
        if not _lacks_ones(x.sizes, (*batch, x.sizes[-1])):
            raise NoMatch(f"its input of size {tuple(x.sizes)} is broadcast, or not of size [B, I]")
        features = x.sizes[-1]
        if not (
            all(same_sizes(p.sizes, (hidden, features)) for p in w_ih)
            and all(same_sizes(p.sizes, (hidden, hidden)) for p in w_hh)
            and all(same_sizes(p.sizes, (hidden,)) for terms in biases for p in terms)
        ):
            raise NoMatch("its weights do not have the sizes [H, I] and [H, H] for each gate")
        everything = [x, h, *(p.region for p in (*w_ih, *w_hh)), *(p.region for terms in biases for p in terms)]
        tensors = [value(root), *(value(r.base) for r in everything)]
        for reason in (why(t) for t in tensors for why in (guards.why_not_plain, guards.why_not_device)):
            if reason is not None:
                raise NoMatch(reason)
        kinds = {(t.dtype, t.device) for t in tensors}
        if len(kinds) != 1:
            raise NoMatch(f"its tensors differ in dtype or device: {', '.join(sorted(str(d) for d, _ in kinds))}")

    def _check_unchanged(self, root: Node, inner: Sequence[Node], x: Region, h: Region, weights: Weights) -> None:
        """A fused op in the place of `root` reads what the formula has read before it."""
        first = min((self._position[n] for n in inner), default=0)
        last = self._position[root]
        for storage in (*storages(root, *inner, x.base, h.base, *weights.nodes()), EVERYTHING):
            positions = self._writes.get(storage, ())
            at = bisect.bisect_left(positions, first)
            if at < len(positions) and positions[at] <= last:
                raise NoMatch("an operation between its parts may change one of its tensors in place")


def _described(region: Region) -> str:
    return name(region.base) or (str(region.base) if region.base.op == "placeholder" else "another function")


def _transpose_of(node: Node) -> Node | None:
    kind = name(node)
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or len(shape(node)) != 2 or len(shape(source)) != 2:
        return None
    if kind in ("t", "numpy_T") or (kind == "getattr" and node.args[1] in ("T", "mT")):
        return source
    if kind in ("transpose", "permute", "swapaxes", "swapdims"):
        dims = [d for a in node.args[1:] for d in (a if isinstance(a, (list, tuple)) else [a])] + [*node.kwargs.values()]
        if all(type(d) is int for d in dims):
            dims = [d % 2 for d in dims]
            if (kind == "permute" and dims == [1, 0]) or (kind != "permute" and sorted(dims) == [0, 1]):
                return source
    return None


def _merged(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Pieces that are rows of one tensor in their order become one."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        joined = None if last is None else _joined(last, piece)
        if joined is None:
            merged.append(piece)
        else:
            merged[-1] = joined
    return tuple(merged)


def _joined(left: Piece, right: Piece) -> Piece | None:
    dim = 1 if left.transposed else 0
    a, b = left.region, right.region
    if a.base is not b.base or (left.transposed, left.negative) != (right.transposed, right.negative):
        return None
    if len(a.extents) <= dim or a.extents[:dim] != b.extents[:dim] or a.extents[dim + 1 :] != b.extents[dim + 1 :]:
        return None
    before, after = a.extents[dim], b.extents[dim]
    if not isinstance(before, tuple) or not isinstance(after, tuple) or before[1] != after[0]:
        return None
    extent = (before[0], after[1])
    full = shape(a.base)[dim]
    return Piece(
        Region(a.base, (*a.extents[:dim], None if extent == (0, full) else extent, *a.extents[dim + 1 :])),
        left.transposed, left.negative,
    )  # fmt: skip


# ---- calls of torch.gru_cell -------------------------------------------------------------------------------------------------


def is_cell_call(node: Node) -> bool:
    return node.op == "call_function" and node.target in (torch.gru_cell, aten.gru_cell.default)


def _of_call(node: Node, regions: Regions) -> Cell | None:
    """A call of `torch.gru_cell` that an op of this package can take the place of, but for what is profitable."""
    if any(g("gru_cell", node) is not None for g in guards.POSSIBLE):
        return None
    bound = guards.bind("gru_cell", node)
    assert bound is not None
    x, h = bound["input"], bound["hx"]
    if not all(isinstance(a, Node) for a in (x, h, bound["w_ih"], bound["w_hh"])):
        return None
    if len(shape(x)) != 2 or len(shape(h)) != 2:
        return None

    def piece(weight: object) -> Piece:
        return Piece(Region(weight, (None,) * len(shape(weight))))

    def bias(arg: object) -> tuple[tuple[Piece, ...], ...] | None:
        return ((piece(arg),),) if isinstance(arg, Node) else None

    hidden = shape(h)[1]
    if not isinstance(hidden, int):
        return None
    weights = Weights((piece(bound["w_ih"]),), (piece(bound["w_hh"]),), bias(bound["b_ih"]), bias(bound["b_hh"]), hidden)
    return Cell(node, regions.of(x), x, regions.of(h), weights, call=True)


def find_cells(graph: Graph, regions: Regions) -> Found:
    """All cells of a graph, in its order."""
    found = Found()
    for node in graph.nodes:
        if is_cell_call(node) and (cell := _of_call(node, regions)) is not None:
            found.cells[node] = cell
    if not any(name(n) in ("tanh", "sigmoid") for n in graph.nodes):
        return found
    matcher = _Matcher(graph, regions, found.cells)
    for node in graph.nodes:
        if name(node) not in _ROOTS:
            continue
        try:
            found.cells[node] = matcher.match(node)
        except NoMatch as no:
            if no.reason:
                found.others[node] = no.reason
    position = {n: i for i, n in enumerate(graph.nodes)}
    found.cells = dict(sorted(found.cells.items(), key=lambda item: position[item[0]]))
    return found


# ---- weights as nodes --------------------------------------------------------------------------------------------------------


def emit_piece(emit: Emitter, piece: Piece) -> Node:
    node = emit.region(piece.region)
    if piece.transposed:
        node = emit(aten.t.default, node)
    return emit(aten.neg.default, node) if piece.negative else node


def emit_weights(emit: Emitter, weights: Weights, like: Node) -> list[Node | None]:
    """w_ih, w_hh, b_ih and b_hh as nodes; the biases are both there or both None."""

    def rows(pieces: Sequence[Node]) -> Node:
        return pieces[0] if len(pieces) == 1 else emit(aten.cat.default, list(pieces), 0)

    def bias(gates: tuple[tuple[Piece, ...], ...] | None) -> Node:
        def zeros(size: int) -> Node:
            return emit(aten.new_zeros.default, like, [size])

        if gates is None or not any(gates):
            return zeros(3 * weights.hidden)
        if all(len(terms) == 1 for terms in gates):
            return rows([emit_piece(emit, p) for p in _merged([terms[0] for terms in gates])])
        sums = []
        for terms in gates:
            total = None
            for piece in terms:
                node = emit_piece(emit, piece)
                total = node if total is None else emit(aten.add.Tensor, total, node)
            sums.append(zeros(weights.hidden) if total is None else total)
        return rows(sums)

    w_ih, w_hh = (rows([emit_piece(emit, p) for p in pieces]) for pieces in (weights.w_ih, weights.w_hh))
    if not weights.has_biases:
        return [w_ih, w_hh, None, None]
    return [w_ih, w_hh, bias(weights.b_ih), bias(weights.b_hh)]
