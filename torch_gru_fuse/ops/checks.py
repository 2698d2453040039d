"""Argument checks of the two public ops.

The errors are of the kind that `torch.gru` and `torch.gru_cell` raise (RuntimeError), and name
the argument, what came, what was expected, and where it helps what to do.  They run on real and
on fake tensors alike, so a compiled model fails as an eager one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _fail(op: str, message: str) -> NoReturn:
    raise RuntimeError(f"torch_gru_fuse.{op}: {message}")


def _check_same_kind(op: str, tensors: Sequence[tuple[str, Tensor | None]]) -> None:
    """All tensors have one floating-point dtype and lie on one device."""
    first_name, first = tensors[0]
    assert first is not None
    if first.dtype not in DTYPES:
        _fail(op, f"{first_name} has dtype {first.dtype}, expected one of "
                  f"{', '.join(str(d).removeprefix('torch.') for d in DTYPES)}")
    for name, tensor in tensors[1:]:
        if tensor is None:
            continue
        if tensor.dtype != first.dtype:
            _fail(op, f"{name} has dtype {tensor.dtype}, but {first_name} has {first.dtype}; "
                      f"convert one of them, for instance {first_name}.to({tensor.dtype})")
        if tensor.device != first.device:
            _fail(op, f"{name} is on {tensor.device}, but {first_name} is on {first.device}; "
                      "move them to one device")


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
    if hx.dim() != 3:
        _fail(op, f"hx must be 3-D [num_layers * num_directions, B, H], got {hx.dim()}-D of size "
                  f"{tuple(hx.shape)}")
    if num_layers < 1:
        _fail(op, f"num_layers must be at least 1, got {num_layers}")
    directions = 2 if bidirectional else 1
    kinds = ("w_ih", "w_hh", "b_ih", "b_hh") if has_biases else ("w_ih", "w_hh")
    expected = num_layers * directions * len(kinds)
    if len(params) != expected:
        _fail(op, f"params has {len(params)} tensors, expected {expected}: {', '.join(kinds)} for "
                  f"each of {num_layers} layers and {directions} directions "
                  f"(has_biases={has_biases}, bidirectional={bidirectional})")
    names = [
        f"params[{i}] ({kinds[i % len(kinds)]} of layer {i // (len(kinds) * directions)}"
        + (", reverse)" if bidirectional and i // len(kinds) % 2 else ")")
        for i in range(expected)
    ]
    _check_same_kind(op, [("input", input), ("hx", hx), *zip(names, params, strict=True)])

    seq_len, batch = (input.shape[1], input.shape[0]) if batch_first else input.shape[:2]
    if seq_len == 0:
        _fail(op, f"input has a sequence length of 0 (size {tuple(input.shape)}, {layout}), "
                  "expected at least 1")
    if hx.shape[0] != num_layers * directions:
        _fail(op, f"hx has {hx.shape[0]} states, expected num_layers * num_directions = "
                  f"{num_layers} * {directions} = {num_layers * directions}")
    if hx.shape[1] != batch:
        _fail(op, f"hx has batch size {hx.shape[1]}, but input has {batch} (size "
                  f"{tuple(input.shape)}, {layout})")
    hidden = hx.shape[2]
    if hidden == 0:
        _fail(op, "hx has a hidden size of 0, expected at least 1")
    for i, (name, p) in enumerate(zip(names, params, strict=True)):
        layer, kind = i // (len(kinds) * directions), kinds[i % len(kinds)]
        features = {"w_ih": input.shape[2] if layer == 0 else directions * hidden, "w_hh": hidden}
        size = (3 * hidden, features[kind]) if kind in features else (3 * hidden,)
        if p.dim() != len(size) or any(a != b for a, b in zip(p.shape, size, strict=True)):
            _fail(op, f"{name} has size {tuple(p.shape)}, expected {size} for hidden size {hidden}"
                      + (f" and input size {size[1]}" if kind == "w_ih" else ""))
    if train and not 0.0 <= dropout <= 1.0:
        _fail(op, f"dropout must be a probability between 0 and 1, got {dropout}")


def check_gru_cell(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None
) -> None:
    op = "gru_cell"
    if input.dim() != 2:
        _fail(op, f"input must be 2-D [B, I], got {input.dim()}-D of size {tuple(input.shape)}")
    if hx.dim() != 2:
        _fail(op, f"hx must be 2-D [B, H], got {hx.dim()}-D of size {tuple(hx.shape)}")
    _check_same_kind(op, [("input", input), ("hx", hx), ("w_ih", w_ih), ("w_hh", w_hh),
                          ("b_ih", b_ih), ("b_hh", b_hh)])
    if hx.shape[0] != input.shape[0]:
        _fail(op, f"hx has batch size {hx.shape[0]}, but input has {input.shape[0]}")
    features, hidden = input.shape[1], hx.shape[1]
    if hidden == 0:
        _fail(op, "hx has a hidden size of 0, expected at least 1")
    for name, p, size in (
        ("w_ih", w_ih, (3 * hidden, features)),
        ("w_hh", w_hh, (3 * hidden, hidden)),
        ("b_ih", b_ih, (3 * hidden,)),
        ("b_hh", b_hh, (3 * hidden,)),
    ):
        if p is not None and (p.dim() != len(size) or any(a != b for a, b in zip(p.shape, size, strict=True))):
            _fail(op, f"{name} has size {tuple(p.shape)}, expected {size} for input size {features} "
                      f"and hidden size {hidden}")
