"""The ops' schemas, each with its fake implementation directly below it.

Three ops are for users and take the arguments of torch's own: `gru` (as `torch.gru`), `gru_packed` (as the overload of
`torch.gru` for the data of a PackedSequence) and `gru_cell` (as `torch.gru_cell`); a fourth, `gru_pair`, is two calls of `gru`
at once.  They check their arguments and are made of others, which are what a compiled graph holds:

    gru         = checks, layout, dropout masks  ->  gru_forward         (backward: gru_backward)
    gru_pair    = checks, layout                 ->  gru_pair_forward    (backward: gru_pair_backward)
    gru_packed  = checks, dropout masks          ->  gru_packed_forward  (backward: gru_packed_backward)
    gru_cell    = checks                         ->  gru_cell_forward    (backward: gru_cell_backward)

Around a GRU `pack_padded`, `pad_packed` and `unpad` do what torch.nn.utils.rnn's functions do; `packed_zeros` is the first
state of a GRU to which none is given.

`csrc_stub/torch_gru_fuse.cpp` states the same schemas in C++; a test keeps the two equal.

Sizes in this package: T time steps, B batch, I input features, H hidden units, L layers,
D directions (1 or 2), N rows of packed data.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torch_gru_fuse import torch_hooks
from torch_gru_fuse.ops import support
from torch_gru_fuse.ops.checks import check_pack_padded

NAMESPACE = "torch_gru_fuse"
library = torch.library.Library(NAMESPACE, "DEF")

#: Beside six values a unit and step and the outputs of inner layers cuDNN keeps 256 to 284 bytes a call (cuDNN 9.19, H = 1 to
#: 4096, docs/results/cell-h200.txt).
CUDNN_EXTRA_BYTES = 1024

# ---- gru ------------------------------------------------------------------------------

library.define(
    "gru(Tensor input, Tensor hx, Tensor[] params, bool has_biases, int num_layers, "
    "float dropout, bool train, bool bidirectional, bool batch_first, *, bool recompute=False, Tensor? resets=None, "
    "Tensor? keep=None) -> (Tensor, Tensor)"
)  # composite: its fake implementation is that of gru_forward

# `save`: keep in the reserve what `gru_backward` needs.  Autograd asks for that, but with `recompute` it does not: then
# `gru_backward` gets an empty reserve and runs the forward again.
# `keep`: [T, B], bool or of the dtype of hx: what is left of the state before each step, `equations.kept`.
library.define(
    "gru_forward(Tensor input, Tensor hx, Tensor[] params, bool has_biases, int num_layers, "
    "bool bidirectional, Tensor? dropout_masks, bool save, Tensor? keep=None, *, bool recompute=False) "
    "-> (Tensor, Tensor, Tensor)"
)


def reserve_size(T: int, B: int, H: int, L: int, D: int, *, cuda: bool, bytes_each: int) -> int:
    """Elements that `gru_forward` saves for `gru_backward`.

    The outputs of all layers but the last and four gate values a unit and step.  On CUDA cuDNN, which may run in the kernels'
    place, keeps six and a few bytes more: a graph is traced without knowing which it will be.
    """
    layer = T * B * H * D
    gates = L * (6 * layer + CUDNN_EXTRA_BYTES // bytes_each) if cuda else L * 4 * layer
    return (L - 1) * layer + gates


def split_reserve(reserve: Tensor, rows: tuple[int, ...], H: int, L: int, D: int) -> tuple[Tensor, Tensor]:
    """Views of a reserve: layer_outputs [L-1, *rows, D*H], before dropout, and all that follows it.  rows: (T, B) or (N,)."""
    count = (L - 1) * math.prod(rows) * H * D
    return reserve[:count].view(L - 1, *rows, D * H), reserve[count:]


def saved_gates(reserve: Tensor, rows: tuple[int, ...], H: int, L: int, D: int) -> tuple[Tensor, Tensor]:
    """Views of a reserve: layer_outputs [L-1, *rows, D*H], before dropout, and gates [L, D, *rows, 4, H] = (r, z, n, hn)."""
    layer_outputs, rest = split_reserve(reserve, rows, H, L, D)
    return layer_outputs, rest[: L * D * math.prod(rows) * 4 * H].view(L, D, *rows, 4, H)


def empty_gru_results(
    input: Tensor, hx: Tensor, num_layers: int, bidirectional: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate what `gru_forward` returns; all implementations and the fake share this function.

    Returns:
        output [T, B, D*H], h_n [L*D, B, H] and reserve, what the backward needs besides, empty without `save`.
    """
    T, B, _ = input.shape
    H = hx.shape[2]
    D = 2 if bidirectional else 1
    size = 0
    if save:
        size = reserve_size(T, B, H, num_layers, D, cuda=input.device.type == "cuda", bytes_each=input.dtype.itemsize)
    return input.new_empty(T, B, D * H), hx.new_empty(num_layers * D, B, H), input.new_empty(size)


@torch.library.register_fake(f"{NAMESPACE}::gru_forward", lib=library)
def _(input, hx, params, has_biases, num_layers, bidirectional, dropout_masks, save, keep=None, *, recompute=False):
    return empty_gru_results(input, hx, num_layers, bidirectional, save)


# `needs` has one flag for each of input, hx, *params; the result holds the gradients that are
# needed, in that order.
library.define(
    "gru_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor input, Tensor hx, Tensor[] params, "
    "bool has_biases, int num_layers, bool bidirectional, Tensor? dropout_masks, Tensor output, "
    "Tensor reserve, bool[] needs, Tensor? keep=None) -> Tensor[]"
)


def empty_grads(tensors: list[Tensor], needs: list[bool]) -> list[Tensor]:
    """Contiguous gradients for those of `tensors` that are needed."""
    return [t.new_empty(t.shape) for t, need in zip(tensors, needs, strict=True) if need]


@torch.library.register_fake(f"{NAMESPACE}::gru_backward", lib=library)
def _(grad_output, grad_h_n, input, hx, params, has_biases, num_layers, bidirectional,
      dropout_masks, output, reserve, needs, keep=None):
    return empty_grads([input, hx, *params], needs)


# ---- gru_pair -------------------------------------------------------------------------
#
# Two single layers of one direction, none of which is the other's input, with the same T, B and H; `reverse`: which of them go
# through time backwards.  hx, h_n and params are those of one bidirectional layer, but that each has an input, and an I, of its
# own.
library.define(
    "gru_pair(Tensor[] inputs, Tensor hx, Tensor[] params, bool has_biases, bool[] reverse, bool batch_first, *, "
    "bool recompute=False) -> (Tensor, Tensor, Tensor)"
)  # composite, as gru

library.define(
    "gru_pair_forward(Tensor[] inputs, Tensor hx, Tensor[] params, bool has_biases, bool[] reverse, bool save, *, "
    "bool recompute=False) -> (Tensor, Tensor, Tensor)"
)


def empty_pair_results(input: Tensor, hx: Tensor, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate what `gru_pair_forward` returns: output [2, T, B, H], h_n [2, B, H] and reserve, empty without `save`.

    The reserve has two halves, each enough for what `gru_forward` saves of one of the two.
    """
    T, B, _ = input.shape
    H = hx.shape[2]
    size = 0
    if save:
        size = reserve_size(T, B, H, 1, 1, cuda=input.device.type == "cuda", bytes_each=input.dtype.itemsize)
    return input.new_empty(2, T, B, H), hx.new_empty(2, B, H), input.new_empty(2 * ((size + 7) // 8 * 8))


@torch.library.register_fake(f"{NAMESPACE}::gru_pair_forward", lib=library)
def _(inputs, hx, params, has_biases, reverse, save, *, recompute=False):
    return empty_pair_results(inputs[0], hx, save)


# `needs` has one flag for each of *inputs, hx, *params.
library.define(
    "gru_pair_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor[] inputs, Tensor hx, Tensor[] params, bool has_biases, "
    "bool[] reverse, Tensor output, Tensor reserve, bool[] needs) -> Tensor[]"
)


@torch.library.register_fake(f"{NAMESPACE}::gru_pair_backward", lib=library)
def _(grad_output, grad_h_n, inputs, hx, params, has_biases, reverse, output, reserve, needs):
    return empty_grads([*inputs, hx, *params], needs)


# ---- gru_packed -----------------------------------------------------------------------
#
# data [N, I] holds, step by step, the sequences that are not over, longest first; batch_sizes [T] (on the CPU) says how many
# each step has.  hx, h_n and params are those of `gru`.
#
# These ops and those below read sizes on the host.  A CUDA graph would keep what it was recorded with: none must hold them.
_UNSAFE = torch.Tag.cudagraph_unsafe

library.define(
    "gru_packed(Tensor data, Tensor batch_sizes, Tensor hx, Tensor[] params, bool has_biases, int num_layers, "
    "float dropout, bool train, bool bidirectional, *, bool recompute=False) -> (Tensor, Tensor)"
)  # composite, as gru

library.define(
    "gru_packed_forward(Tensor data, Tensor batch_sizes, Tensor hx, Tensor[] params, bool has_biases, int num_layers, "
    "bool bidirectional, Tensor? dropout_masks, bool save, *, bool recompute=False) -> (Tensor, Tensor, Tensor)",
    tags=(_UNSAFE,),
)


def packed_reserve_size(N: int, T: int, B: int, H: int, L: int, D: int, *, cuda: bool, bytes_each: int) -> int:
    """Elements that `gru_packed_forward` saves: as `reserve_size`, for N rows.

    What cuDNN takes depends on T and B and not on lengths (cudnnGetRNNTempSpaceSizes), so on CUDA there is room for T*B rows.
    """
    outputs = (L - 1) * N * D * H
    if cuda:
        return outputs + reserve_size(T, B, H, L, D, cuda=True, bytes_each=bytes_each) - (L - 1) * T * B * D * H
    return outputs + L * D * N * 4 * H


def empty_packed_results(
    data: Tensor, batch_sizes: Tensor, hx: Tensor, num_layers: int, bidirectional: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate what `gru_packed_forward` returns: output [N, D*H], h_n [L*D, B, H] and reserve, empty without `save`."""
    N, B, H = data.shape[0], hx.shape[1], hx.shape[2]
    D = 2 if bidirectional else 1
    size = 0
    if save:
        cuda = data.device.type == "cuda"
        size = packed_reserve_size(N, batch_sizes.shape[0], B, H, num_layers, D, cuda=cuda, bytes_each=data.dtype.itemsize)
    return data.new_empty(N, D * H), hx.new_empty(num_layers * D, B, H), data.new_empty(size)


@torch.library.register_fake(f"{NAMESPACE}::gru_packed_forward", lib=library)
def _(data, batch_sizes, hx, params, has_biases, num_layers, bidirectional, dropout_masks, save, *, recompute=False):
    return empty_packed_results(data, batch_sizes, hx, num_layers, bidirectional, save)


library.define(
    "gru_packed_backward(Tensor? grad_output, Tensor? grad_h_n, Tensor data, Tensor batch_sizes, Tensor hx, "
    "Tensor[] params, bool has_biases, int num_layers, bool bidirectional, Tensor? dropout_masks, Tensor output, "
    "Tensor reserve, bool[] needs) -> Tensor[]",
    tags=(_UNSAFE,),
)


@torch.library.register_fake(f"{NAMESPACE}::gru_packed_backward", lib=library)
def _(grad_output, grad_h_n, data, batch_sizes, hx, params, has_biases, num_layers, bidirectional,
      dropout_masks, output, reserve, needs):
    return empty_grads([data, hx, *params], needs)


# ---- around gru_packed ----------------------------------------------------------------
#
# Sizes that depend on lengths are new symbols of a graph.  `batch` is the number of sequences where the caller knows it;
# without it, it is read from batch_sizes and one more such symbol.

# A tensor of lengths that a model got as a list, whose elements may be symbols; `torch.as_tensor` makes them constants.
library.define("lengths_tensor(SymInt[] lengths) -> Tensor")


@torch.library.register_fake(f"{NAMESPACE}::lengths_tensor", lib=library)
def _(lengths):
    return torch.empty(len(lengths), dtype=torch.int64, device="cpu")


_DYNAMIC = (torch.Tag.dynamic_output_shape, _UNSAFE)

library.define("pack_padded(Tensor input, Tensor lengths, bool batch_first) -> (Tensor, Tensor)", tags=_DYNAMIC)


@torch.library.register_fake(f"{NAMESPACE}::pack_padded", lib=library)
def _(input, lengths, batch_first):
    check_pack_padded(input, lengths, batch_first)
    longest = input.shape[1 if batch_first else 0]
    rows = torch_hooks.new_unbacked_size(1)
    steps = torch_hooks.new_unbacked_size(1, longest if isinstance(longest, int) else None)
    return input.new_empty(rows, *input.shape[2:]), lengths.new_empty(steps)


library.define(
    "pad_packed(Tensor data, Tensor batch_sizes, bool batch_first, Scalar padding_value, SymInt? total_length, "
    "SymInt? batch) -> (Tensor, Tensor)",
    tags=_DYNAMIC,
)


@torch.library.register_fake(f"{NAMESPACE}::pad_packed", lib=library)
def _(data, batch_sizes, batch_first, padding_value, total_length, batch):
    steps = batch_sizes.shape[0] if total_length is None else total_length
    batch = torch_hooks.new_unbacked_size(1) if batch is None else batch
    padded = data.new_empty(steps, batch, *data.shape[1:])
    return padded.transpose(0, 1) if batch_first else padded, batch_sizes.new_empty(batch)


# The rows of pad_packed's result that are not padding: `rows` of them, what pad_packed was given.
library.define("unpad(Tensor padded, Tensor batch_sizes, bool batch_first, SymInt rows) -> Tensor", tags=(_UNSAFE,))


@torch.library.register_fake(f"{NAMESPACE}::unpad", lib=library)
def _(padded, batch_sizes, batch_first, rows):
    return padded.new_empty(rows, *padded.shape[2:])


library.define("packed_zeros(Tensor data, Tensor batch_sizes, int states, int hidden) -> Tensor", tags=_DYNAMIC)


@torch.library.register_fake(f"{NAMESPACE}::packed_zeros", lib=library)
def _(data, batch_sizes, states, hidden):
    return data.new_empty(states, torch_hooks.new_unbacked_size(1), hidden)


# ---- gru_cell -------------------------------------------------------------------------

library.define(
    "gru_cell(Tensor input, Tensor hx, Tensor w_ih, Tensor w_hh, Tensor? b_ih=None, "
    "Tensor? b_hh=None) -> Tensor"
)  # composite, as gru

library.define(
    "gru_cell_forward(Tensor input, Tensor hx, Tensor w_ih, Tensor w_hh, Tensor? b_ih, "
    "Tensor? b_hh, bool save) -> (Tensor, Tensor)"
)


def empty_cell_results(hx: Tensor, save: bool) -> tuple[Tensor, Tensor]:
    """Allocate h [B, H] and gates [B, 4, H] (r, z, n, hn; empty where nothing is saved)."""
    B, H = hx.shape
    gates_saved = save and support.kernels_run(hx)
    return hx.new_empty(B, H), hx.new_empty((B, 4, H) if gates_saved else (0,))


@torch.library.register_fake(f"{NAMESPACE}::gru_cell_forward", lib=library)
def _(input, hx, w_ih, w_hh, b_ih, b_hh, save):
    return empty_cell_results(hx, save)


# `needs` has one flag for each of input, hx, w_ih, w_hh, b_ih, b_hh.
library.define(
    "gru_cell_backward(Tensor grad_h, Tensor input, Tensor hx, Tensor w_ih, Tensor w_hh, "
    "Tensor? b_ih, Tensor? b_hh, Tensor gates, bool[] needs) -> Tensor[]"
)


@torch.library.register_fake(f"{NAMESPACE}::gru_cell_backward", lib=library)
def _(grad_h, input, hx, w_ih, w_hh, b_ih, b_hh, gates, needs):
    return empty_grads([input, hx, w_ih, w_hh, b_ih, b_hh], needs)


ops = torch.ops.torch_gru_fuse
