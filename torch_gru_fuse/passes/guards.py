"""Which calls in a graph can be rewritten.  Each guard returns None or the reason against it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from torch_gru_fuse.ops.checks import DTYPES
from torch_gru_fuse.passes.nodes import value

#: The arguments of the functions, in order, with their defaults; `gru_packed` is the overload of torch.gru for packed data.
_REQUIRED = object()
SIGNATURES: dict[str, dict[str, object]] = {
    "gru": dict.fromkeys(
        ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional", "batch_first"),
        _REQUIRED,
    ),
    "gru_packed": dict.fromkeys(
        ("data", "batch_sizes", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional"), _REQUIRED
    ),
    "gru_cell": {**dict.fromkeys(("input", "hx", "w_ih", "w_hh"), _REQUIRED), "b_ih": None, "b_hh": None},
}
DEVICES = ("cpu", "cuda")


def overload_of_gru(node: Node) -> str:
    """"gru" or "gru_packed": which overload a call of torch.gru is.  The third argument is a list in the one, a tensor in the
    other."""
    third = node.args[2] if len(node.args) > 2 else node.kwargs.get("params")
    packed = isinstance(third, Node) or "data" in node.kwargs or "batch_sizes" in node.kwargs
    return "gru_packed" if packed else "gru"


def bind(target: str, node: Node) -> dict[str, object] | None:
    """The call's arguments by name, or None where it is another overload."""
    signature = SIGNATURES[target]
    bound = dict(zip(signature, node.args, strict=False))
    if len(node.args) > len(signature) or not (node.kwargs.keys() <= signature.keys() - bound.keys()):
        return None
    bound |= node.kwargs
    for name, default in signature.items():
        if name not in bound:
            if default is _REQUIRED:
                return None
            bound[name] = default
    return {name: bound[name] for name in signature}


def overload(target: str, node: Node) -> str | None:
    bound = bind(target, node)
    if bound is None:
        return f"its arguments are not those of torch.{'gru_cell' if target == 'gru_cell' else 'gru'}"
    if "params" in bound and not isinstance(bound["params"], Sequence):
        return "its parameters are not a list"
    return None


def _tensors(target: str, node: Node) -> list[object]:
    bound = bind(target, node)
    assert bound is not None
    args = [*bound.values()]
    if target == "gru":
        args = [bound["input"], bound["hx"], *bound["params"]]  # type: ignore[misc]
    elif target == "gru_packed":
        args = [bound["data"], bound["hx"], *bound["params"]]  # type: ignore[misc]
    return [value(a) for a in args if a is not None]


def known_tensors(target: str, node: Node) -> str | None:
    for tensor in _tensors(target, node):
        if not isinstance(tensor, Tensor):
            return "the graph does not say what one of its tensors is"
    return None


def why_not_plain(tensor: Tensor) -> str | None:
    """Why the ops do not take a tensor like this one, apart from its dtype."""
    from torch._subclasses.fake_tensor import FakeTensor  # noqa: PLC2701

    if type(tensor) not in (Tensor, torch.nn.Parameter, FakeTensor, torch.nn.Buffer):
        return f"one of its tensors is a {type(tensor).__name__}"
    if tensor.is_sparse or tensor.is_quantized:
        return "one of its tensors is sparse or quantized"
    return None


def why_not_device(tensor: Tensor) -> str | None:
    if tensor.device.type not in DEVICES:
        return f"it runs on {tensor.device.type}; supported are {' and '.join(DEVICES)}"
    return None


def _first_reason(reasons: Iterable[str | None]) -> str | None:
    return next((reason for reason in reasons if reason is not None), None)


def plain_tensors(target: str, node: Node) -> str | None:
    return _first_reason(map(why_not_plain, _tensors(target, node)))  # type: ignore[arg-type]


def device(target: str, node: Node) -> str | None:
    return _first_reason(map(why_not_device, _tensors(target, node)))  # type: ignore[arg-type]


def dtype(target: str, node: Node) -> str | None:
    for tensor in _tensors(target, node):
        if tensor.dtype not in DTYPES:
            return f"it computes in {tensor.dtype}"
    return None


CELL_ON_CPU = "on a CPU Inductor's own code for a cell is faster"


def profitable(target: str, node: Node) -> str | None:
    # Inductor fuses the pointwise half of a cell; PyTorch's own cell, which the op runs on a CPU, does not.  One thread, B=32,
    # H=128: forward 120 and 150 us, with backward 398 and 823 us (docs/results/cpu.txt).
    if target == "gru_cell" and _tensors(target, node)[0].device.type == "cpu":
        return CELL_ON_CPU
    return None


#: In the order in which they are asked; a later guard may rely on an earlier one.
POSSIBLE: tuple[Callable[[str, Node], str | None], ...] = (overload, known_tensors, plain_tensors, device, dtype)
GUARDS = (*POSSIBLE, profitable)


def why_not(target: str, node: Node) -> str | None:
    """The first reason why `node` is not rewritten, or None."""
    for guard in GUARDS:
        if (reason := guard(target, node)) is not None:
            return reason
    return None
