"""What Dynamo traces in the place of PyTorch's functions for packed sequences, of which it can trace none.

PyTorch's own read lengths on the way (`int(batch_sizes[0])`, sizes that are sums of lengths).  These hold an op of this package
where that happens, whose result has a size of its own in the graph; otherwise they do what the originals do.

Each takes `batch`, the number of sequences if the graph knows it, and returns it beside its result: then results have the
batch size of the model's inputs, and not one more size of which nothing is known.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils import rnn
from torch.nn.utils.rnn import PackedSequence

import torch_gru_fuse.ops  # noqa: F401  (registers the ops)

Size = int | None  # or a symbol


def pack_padded_sequence(
    input: Tensor,
    lengths: Tensor | list[int],
    batch_first: bool = False,
    enforce_sorted: bool = True,
    *,
    batch: Size = None,
) -> tuple[PackedSequence, Size]:
    """`torch.nn.utils.rnn.pack_padded_sequence`."""
    if isinstance(lengths, Tensor):
        lengths = lengths.to(dtype=torch.int64)
    elif isinstance(lengths, (list, tuple)) and all(isinstance(length, int) for length in lengths):
        lengths = torch.ops.torch_gru_fuse.lengths_tensor(lengths)
    elif isinstance(lengths, (list, tuple)) and all(isinstance(length, Tensor) for length in lengths):
        lengths = torch.stack([length.reshape(()) for length in lengths]).to(dtype=torch.int64, device="cpu")
    else:
        lengths = torch.as_tensor(lengths, dtype=torch.int64, device="cpu")
    batch_dim = 0 if batch_first else 1
    sorted_indices = None
    if not enforce_sorted:
        lengths, sorted_indices = torch.sort(lengths, descending=True)
        sorted_indices = sorted_indices.to(input.device)
        input = input.index_select(batch_dim, sorted_indices)
    data, batch_sizes = torch.ops.torch_gru_fuse.pack_padded(input, lengths, batch_first)
    return PackedSequence(data, batch_sizes, sorted_indices, None), input.size(batch_dim)


def pack_sequence(
    sequences: list[Tensor], enforce_sorted: bool = True, *, batch: Size = None
) -> tuple[PackedSequence, Size]:
    """`torch.nn.utils.rnn.pack_sequence`, whose lengths are sizes that the graph knows."""
    lengths = [sequence.size(0) for sequence in sequences]
    return pack_padded_sequence(torch.ops.aten.pad_sequence(sequences), lengths, enforce_sorted=enforce_sorted)


def pad_packed_sequence(
    sequence: PackedSequence,
    batch_first: bool = False,
    padding_value: float = 0.0,
    total_length: int | None = None,
    *,
    batch: Size = None,
) -> tuple[tuple[Tensor, Tensor], Size]:
    """`torch.nn.utils.rnn.pad_packed_sequence`."""
    data, batch_sizes, _, unsorted_indices = sequence
    if batch is None and unsorted_indices is not None:
        batch = unsorted_indices.size(0)
    padded, lengths = torch.ops.torch_gru_fuse.pad_packed(
        data, batch_sizes, batch_first, padding_value, total_length, batch
    )
    if unsorted_indices is not None:
        padded = padded.index_select(0 if batch_first else 1, unsorted_indices)
        lengths = lengths[unsorted_indices.cpu()]
    return (padded, lengths), batch


def gru_forward(
    self: torch.nn.GRU, input: PackedSequence, hx: Tensor | None = None, *, batch: Size = None
) -> tuple[tuple[PackedSequence, Tensor], Size]:
    """`torch.nn.GRU.forward` of a PackedSequence."""
    self._update_flat_weights()
    data, batch_sizes, sorted_indices, unsorted_indices = input
    if batch is None and sorted_indices is not None:
        batch = sorted_indices.size(0)
    if hx is not None:
        hx = self.permute_hidden(hx, sorted_indices)
        batch = hx.size(1) if batch is None else batch
    else:
        states = self.num_layers * (2 if self.bidirectional else 1)
        if batch is None:
            hx = torch.ops.torch_gru_fuse.packed_zeros(data, batch_sizes, states, self.hidden_size)
        else:
            hx = torch.zeros(states, batch, self.hidden_size, dtype=data.dtype, device=data.device)
    self.check_input(data, batch_sizes)
    output, h_n = torch.gru(
        data, batch_sizes, hx, self._flat_weights, self.bias, self.num_layers, self.dropout, self.training, self.bidirectional
    )
    packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
    return (packed, self.permute_hidden(h_n, unsorted_indices)), batch


#: What is traced, by the function of PyTorch in whose place.
REPLACEMENTS = {
    rnn.pack_padded_sequence: pack_padded_sequence,
    rnn.pack_sequence: pack_sequence,
    rnn.pad_packed_sequence: pad_packed_sequence,
    torch.nn.GRU.forward: gru_forward,
}
