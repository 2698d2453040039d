"""Between padded and packed sequences: what `torch.nn.utils.rnn` does around a GRU, as ops that a graph can hold.

Results are those of PyTorch's own functions, which run behind these ops.  The three are linear in the values, and the gradient
of each is one of the others:

    pack_padded   rows of sequences that are not over     gradient: pad_packed with zeros
    pad_packed    its inverse, with a value for padding   gradient: unpad
    unpad         pack_padded with sizes that are known   gradient: pad_packed with zeros

`packed_zeros` is the first state of a GRU to which none is given, `lengths_tensor` makes lengths in a list a tensor.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from torch_gru_fuse import torch_hooks
from torch_gru_fuse.ops.checks import check_batch_sizes, check_pack_padded
from torch_gru_fuse.ops.schemas import NAMESPACE, library, ops


def _pack_padded(input: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    check_pack_padded(input, lengths, batch_first)
    longest, steps = max(lengths.tolist(), default=0), input.shape[1 if batch_first else 0]
    if longest > steps:  # torch would give a batch_sizes that does not fit its data
        raise RuntimeError(f"torch_gru_fuse.pack_padded: lengths has a maximum of {longest}, but input has {steps} time steps "
                           f"(size {tuple(input.shape)}, batch_first={batch_first})")  # fmt: skip
    return torch_hooks.pack_padded(input, lengths.contiguous(), batch_first)  # torch reads them by address


def _pad_packed(
    data: Tensor, batch_sizes: Tensor, batch_first: bool, padding_value: float, total_length: int | None, batch: int | None
) -> tuple[Tensor, Tensor]:
    sizes = check_batch_sizes("pad_packed", batch_sizes, data.shape[0])
    steps = len(sizes) if total_length is None else total_length
    if steps < len(sizes):
        raise ValueError(
            "Expected total_length to be at least the length of the longest sequence in input, "
            f"but got total_length={total_length} and max sequence length being {len(sizes)}"
        )
    if batch is not None and batch != sizes[0]:
        raise RuntimeError(f"torch_gru_fuse.pad_packed: expected {batch} sequences, but batch_sizes begins with {sizes[0]}")
    return torch_hooks.pad_packed(data, batch_sizes.contiguous(), batch_first, padding_value, steps)


def _unpad(padded: Tensor, batch_sizes: Tensor, batch_first: bool, rows: int) -> Tensor:
    sizes = check_batch_sizes("unpad", batch_sizes, rows)
    if batch_first:
        padded = padded.transpose(0, 1)
    pieces, t = [], 0
    for size, steps in itertools.groupby(sizes):
        count = len(list(steps))
        pieces.append(padded[t : t + count, :size].flatten(0, 1))
        t += count
    return torch.cat(pieces)


def _packed_zeros(data: Tensor, batch_sizes: Tensor, states: int, hidden: int) -> Tensor:
    sizes = check_batch_sizes("packed_zeros", batch_sizes, data.shape[0])
    return data.new_zeros(states, sizes[0], hidden)


def _lengths_tensor(lengths: list[int]) -> Tensor:
    return torch.tensor(lengths, dtype=torch.int64, device="cpu")


library.impl("lengths_tensor", _lengths_tensor, "CompositeExplicitAutograd")
for _name, _function in (
    ("pack_padded", _pack_padded), ("pad_packed", _pad_packed), ("unpad", _unpad), ("packed_zeros", _packed_zeros),
):  # fmt: skip
    library.impl(_name, _function, "CPU")
    library.impl(_name, _function, "CUDA")


# ---- autograd -------------------------------------------------------------------------


def _zero_padded(rows: Tensor, batch_sizes: Tensor, batch_first: bool, padded_shape: torch.Size) -> Tensor:
    batch, steps = padded_shape[:2] if batch_first else padded_shape[1::-1]
    return ops.pad_packed.default(rows, batch_sizes, batch_first, 0.0, steps, batch)[0]


def _save_pack_padded(ctx, inputs, output):
    input, _, ctx.batch_first = inputs
    ctx.save_for_backward(output[1])
    ctx.padded_shape = input.shape
    ctx.mark_non_differentiable(output[1])


def _pack_padded_backward(ctx, grad, _):
    return _zero_padded(grad, *ctx.saved_tensors, ctx.batch_first, ctx.padded_shape), None, None


def _save_pad_packed(ctx, inputs, output):
    data, batch_sizes, ctx.batch_first, *_ = inputs
    ctx.save_for_backward(batch_sizes)
    ctx.rows = data.shape[0]
    ctx.mark_non_differentiable(output[1])


def _pad_packed_backward(ctx, grad, _):
    return ops.unpad.default(grad, *ctx.saved_tensors, ctx.batch_first, ctx.rows), None, None, None, None, None


def _save_unpad(ctx, inputs, output):
    padded, batch_sizes, ctx.batch_first, _ = inputs
    ctx.save_for_backward(batch_sizes)
    ctx.padded_shape = padded.shape


def _unpad_backward(ctx, grad):
    return _zero_padded(grad, *ctx.saved_tensors, ctx.batch_first, ctx.padded_shape), None, None, None


for _name, _backward, _save in (
    ("pack_padded", _pack_padded_backward, _save_pack_padded),
    ("pad_packed", _pad_packed_backward, _save_pad_packed),
    ("unpad", _unpad_backward, _save_unpad),
):
    torch.library.register_autograd(f"{NAMESPACE}::{_name}", _backward, setup_context=_save, lib=library)
