"""Argument checks of the public ops.

The errors are of the kind that `torch.gru` and `torch.gru_cell` raise (RuntimeError), and name
the argument, what came, what was expected, and where it helps what to do.  They run on real and
on fake tensors alike, so a compiled model fails as an eager one does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import NoReturn

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


# The checks run at every call: what can be is left to C.
_dtype_of, _device_of, _shape_of = attrgetter("dtype"), attrgetter("device"), attrgetter("shape")


def _fail(op: str, message: str) -> NoReturn:
    raise RuntimeError(f"torch_gru_fuse.{op}: {message}")


def _check_same_kind(
    op: str, first_name: str, first: Tensor, others: Sequence[Tensor | None], name_of: Callable[[int], str]
) -> None:
    """All tensors have one floating-point dtype and lie on one device; `name_of(i)` names others[i]."""
    dtype, device = first.dtype, first.device
    present = [tensor for tensor in others if tensor is not None]
    if dtype in DTYPES and {dtype}.issuperset(map(_dtype_of, present)) and {device}.issuperset(map(_device_of, present)):
        return
    if dtype not in DTYPES:
        _fail(op, f"{first_name} has dtype {dtype}, expected one of {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}")
    for i, tensor in enumerate(others):
        if tensor is None or (tensor.dtype == dtype and tensor.device == device):
            continue
        if tensor.dtype != dtype:
            _fail(op, f"{name_of(i)} has dtype {tensor.dtype}, but {first_name} has {dtype}; convert one of them, for instance "
                      f"{first_name}.to({tensor.dtype})")  # fmt: skip
        _fail(op, f"{name_of(i)} is on {tensor.device}, but {first_name} is on {device}; move them to one device")


def _check_layers(
    op: str,
    input_name: str,
    input: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> None:
    """What sequence ops have in common: states, parameters, dropout; features are the last dimension of the input."""
    if hx.dim() != 3:
        _fail(op, f"hx must be 3-D [num_layers * num_directions, B, H], got {hx.dim()}-D of size {tuple(hx.shape)}")
    if num_layers < 1:
        _fail(op, f"num_layers must be at least 1, got {num_layers}")
    directions = 2 if bidirectional else 1
    kinds = ("w_ih", "w_hh", "b_ih", "b_hh") if has_biases else ("w_ih", "w_hh")
    per_layer = directions * len(kinds)
    if len(params) != num_layers * per_layer:
        _fail(op, f"params has {len(params)} tensors, expected {num_layers * per_layer}: {', '.join(kinds)} for each of "
                  f"{num_layers} layers and {directions} directions (has_biases={has_biases}, bidirectional={bidirectional})")

    def name_of_param(i: int) -> str:
        reverse = ", reverse" if bidirectional and i // len(kinds) % 2 else ""
        return f"params[{i}] ({kinds[i % len(kinds)]} of layer {i // per_layer}{reverse})"

    _check_same_kind(op, input_name, input, (hx, *params), lambda i: name_of_param(i - 1) if i else "hx")

    features = input.shape[-1]
    states, _, hidden = hx.shape
    if states != num_layers * directions:
        _fail(op, f"hx has {states} states, expected num_layers * num_directions = "
                  f"{num_layers} * {directions} = {num_layers * directions}")
    if hidden == 0:
        _fail(op, "hx has a hidden size of 0, expected at least 1")
    lowest = [(3 * hidden, features), (3 * hidden, hidden), (3 * hidden,), (3 * hidden,)]
    others = [(3 * hidden, directions * hidden), *lowest[1:]]
    sizes = lowest[: len(kinds)] * directions + others[: len(kinds)] * (directions * (num_layers - 1))
    for i, (shape, size) in enumerate(zip(map(_shape_of, params), sizes, strict=True)):
        if shape != size:
            p = params[i]
            _fail(op, f"{name_of_param(i)} has size {tuple(p.shape)}, expected {size} for hidden size {hidden}"
                      + (f" and input size {size[1]}" if i % len(kinds) == 0 else ""))
    if train and not 0.0 <= dropout <= 1.0:
        _fail(op, f"dropout must be a probability between 0 and 1, got {dropout}")


def check_gru(
    input: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> None:
    op = "gru"
    layout = "[B, T, I]" if batch_first else "[T, B, I]"
    if input.dim() != 3:
        _fail(op, f"input must be 3-D {layout}, got {input.dim()}-D of size {tuple(input.shape)}")
    _check_layers(op, "input", input, hx, params, has_biases, num_layers, dropout, train, bidirectional)
    x_size = input.shape
    seq_len, batch = (x_size[1], x_size[0]) if batch_first else (x_size[0], x_size[1])
    h_batch = hx.shape[1]
    if seq_len == 0:
        _fail(op, f"input has a sequence length of 0 (size {tuple(x_size)}, {layout}), expected at least 1")
    if h_batch != batch:
        _fail(op, f"hx has batch size {h_batch}, but input has {batch} (size {tuple(x_size)}, {layout})")


def check_gru_pair(
    inputs: Sequence[Tensor],
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    reverse: Sequence[bool],
    batch_first: bool,
) -> None:
    op = "gru_pair"
    for name, values in (("inputs", inputs), ("reverse", reverse)):
        if len(values) != 2:
            _fail(op, f"{name} has {len(values)} elements, expected 2, one for each layer")
    if hx.dim() != 3 or hx.shape[0] != 2:
        _fail(op, f"hx must be [2, B, H], one state for each layer, got size {tuple(hx.shape)}")
    each = 4 if has_biases else 2
    if len(params) != 2 * each:
        kinds = ", ".join(("w_ih", "w_hh", "b_ih", "b_hh")[:each])
        _fail(op, f"params has {len(params)} tensors, expected {2 * each}: {kinds} for each of 2 layers "
                  f"(has_biases={has_biases})")  # fmt: skip
    for i, input in enumerate(inputs):
        try:
            check_gru(
                input, hx[i : i + 1], params[i * each : (i + 1) * each], has_biases, 1, 0.0, False, False, batch_first
            )
        except RuntimeError as error:
            message = str(error).removeprefix("torch_gru_fuse.gru: ")
            raise RuntimeError(f"torch_gru_fuse.{op}: of layer {i}, {message}") from None
    first, second = inputs
    if first.shape[:2] != second.shape[:2]:
        layout = "[B, T]" if batch_first else "[T, B]"
        _fail(op, f"inputs[1] has {layout} = {tuple(second.shape[:2])}, but inputs[0] has {tuple(first.shape[:2])}; expected "
                  "the same")  # fmt: skip
    _check_same_kind(op, "inputs[0]", first, (second,), lambda i: "inputs[1]")


def check_resets(name: str, tensor: Tensor, input: Tensor, batch_first: bool) -> None:
    """`resets` or `keep` of a call whose input has been checked."""
    op = "gru"
    layout = "[B, T]" if batch_first else "[T, B]"
    expected = tuple(input.shape[:2])
    if tensor.dim() != 2 or tuple(tensor.shape) != expected:
        _fail(op, f"{name} has size {tuple(tensor.shape)}, expected {layout} = {expected}, one element for each step of each "
                  "sequence")  # fmt: skip
    if tensor.dtype not in (torch.bool, input.dtype):
        _fail(op, f"{name} has dtype {tensor.dtype}, expected bool or {input.dtype}, that of input; use {name}.bool() or "
                  f"{name}.to(input.dtype)")  # fmt: skip
    if tensor.device != input.device:
        _fail(op, f"{name} is on {tensor.device}, but input is on {input.device}; move them to one device")


def _check_lengths(op: str, name: str, tensor: Tensor, what: str) -> None:
    """A vector of int64 on the CPU: of lengths, or of batch sizes."""
    if tensor.dim() != 1:
        _fail(op, f"{name} must be 1-D {what}, got {tensor.dim()}-D of size {tuple(tensor.shape)}")
    if tensor.device.type != "cpu":
        _fail(op, f"{name} is on {tensor.device}, expected it on the CPU, where its values can be read; use {name}.cpu()")
    if tensor.dtype != torch.int64:
        _fail(op, f"{name} has dtype {tensor.dtype}, expected int64; use {name}.to(torch.int64)")


def check_gru_packed(
    data: Tensor,
    batch_sizes: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> None:
    """All that is known without the values of batch_sizes; those are for :func:`check_batch_sizes`."""
    op = "gru_packed"
    if data.dim() != 2:
        _fail(op, f"data must be 2-D [N, I], the rows of all time steps, got {data.dim()}-D of size {tuple(data.shape)}")
    _check_lengths(op, "batch_sizes", batch_sizes, "[T], the number of rows of each time step")
    _check_layers(op, "data", data, hx, params, has_biases, num_layers, dropout, train, bidirectional)


def check_batch_sizes(op: str, batch_sizes: Tensor, rows: int, batch: int | None = None) -> list[int]:
    """The values of batch_sizes for a packed matrix of `rows` rows and, where it is known, a batch of a certain size."""
    _check_lengths(op, "batch_sizes", batch_sizes, "[T], the number of rows of each time step")
    sizes = batch_sizes.tolist()
    if not sizes:
        _fail(op, "batch_sizes is empty, expected at least one time step")
    if sizes != sorted(sizes, reverse=True):
        t = next(t for t in range(1, len(sizes)) if sizes[t] > sizes[t - 1])
        _fail(op, f"batch_sizes must not increase, but batch_sizes[{t}] is {sizes[t]} after {sizes[t - 1]}; sequences are "
                  "packed longest first, as torch.nn.utils.rnn.pack_padded_sequence(..., enforce_sorted=False) does")
    if sizes[-1] < 1:
        t = next(t for t, size in enumerate(sizes) if size < 1)
        _fail(op, f"batch_sizes must be positive, but batch_sizes[{t}] is {sizes[t]}; leave out steps without sequences")
    if sum(sizes) != rows:
        _fail(op, f"batch_sizes has a sum of {sum(sizes)}, but data has {rows} rows, expected one row for each")
    if batch is not None and sizes[0] != batch:
        _fail(op, f"hx has batch size {batch}, but batch_sizes begins with {sizes[0]} sequences")
    return sizes


def check_pack_padded(input: Tensor, lengths: Tensor, batch_first: bool) -> None:
    """Of :func:`pack_padded`, all that is known without the values of lengths."""
    op = "pack_padded"
    layout = "[B, T, ...]" if batch_first else "[T, B, ...]"
    if input.dim() < 2:
        _fail(op, f"input must have at least two dimensions {layout}, got {input.dim()}-D of size {tuple(input.shape)}")
    _check_lengths(op, "lengths", lengths, "[B], one length a sequence")


def check_gru_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> None:
    op = "gru_cell"
    if input.dim() != 2:
        _fail(op, f"input must be 2-D [B, I], got {input.dim()}-D of size {tuple(input.shape)}")
    if hx.dim() != 2:
        _fail(op, f"hx must be 2-D [B, H], got {hx.dim()}-D of size {tuple(hx.shape)}")
    others = (hx, w_ih, w_hh, b_ih, b_hh)
    _check_same_kind(op, "input", input, others, lambda i: ("hx", "w_ih", "w_hh", "b_ih", "b_hh")[i])
    (batch, features), (h_batch, hidden) = input.shape, hx.shape
    if h_batch != batch:
        _fail(op, f"hx has batch size {h_batch}, but input has {batch}")
    if hidden == 0:
        _fail(op, "hx has a hidden size of 0, expected at least 1")
    bias_size = (3 * hidden,)
    for name, p, size in (
        ("w_ih", w_ih, (3 * hidden, features)),
        ("w_hh", w_hh, (3 * hidden, hidden)),
        ("b_ih", b_ih, bias_size),
        ("b_hh", b_hh, bias_size),
    ):
        if p is not None and p.shape != size:
            _fail(op, f"{name} has size {tuple(p.shape)}, expected {size} for input size {features} and hidden size {hidden}")
