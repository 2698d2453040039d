"""The ops as functions, with PyTorch's arguments.

All are differentiable (both modes, any order), run under `torch.autocast`, `torch.vmap` and
`torch.compile`, and choose their implementation by device and dtype: Triton kernels on NVIDIA
GPUs of compute capability 8.0 or more in float16, bfloat16 and float32, PyTorch's own GRU otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

import torch_gru_fuse.ops  # noqa: F401  (registers the ops)
from torch_gru_fuse.ops.schemas import ops

__all__ = ["gru", "gru_cell", "gru_packed", "gru_pair"]


def gru(
    input: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    *,
    recompute: bool = False,
    resets: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""A multi-layer GRU over a sequence; drop-in for `torch.gru`.

    For every layer, direction and time step, with :math:`\sigma` the logistic function and
    :math:`\odot` the elementwise product,

    .. math::
        r_t &= \sigma(W_{ir} x_t + b_{ir} + W_{hr} h_{t-1} + b_{hr}) \\
        z_t &= \sigma(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz}) \\
        n_t &= \tanh(W_{in} x_t + b_{in} + r_t \odot (W_{hn} h_{t-1} + b_{hn})) \\
        h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    T time steps, B batch, I input features, H hidden units, L layers, D directions.

    With `resets` :math:`h_{t-1}` is :math:`(1 - \text{resets}_t) \odot h_{t-1}` throughout, in all layers and directions
    (of the direction backward in time, too, :math:`h_{t-1}` is the state that step t starts from): a 1 starts a new episode.

    Args:
        input: [T, B, I], or [B, T, I] with `batch_first`; T at least 1.
        hx: initial hidden state [L*D, B, H].
        params: for each layer and direction w_ih [3H, I or D*H], w_hh [3H, H] and, with
            `has_biases`, b_ih [3H], b_hh [3H]; gates in the order r, z, n.
        has_biases: whether `params` holds biases.
        num_layers: L.
        dropout: probability with which an element of a layer's output, except the last layer's,
            is zero; only with `train`.
        train: whether dropout is applied.
        bidirectional: D = 2 instead of 1.
        batch_first: layout of `input` and output.
        recompute: with gradients, keep nothing but the results; the backward then runs the forward again.
        resets: [T, B] (or [B, T] with `batch_first`), bool or of the dtype of `input`.  A constant: it has no gradient.  With
            bool a reset state is zero whatever it was, NaN included; other dtypes multiply.
        keep: 1 - resets, in the place of `resets` where that is what is at hand, as masks that are 0 where an episode ends.

    Returns:
        output [T, B, D*H] (or [B, T, D*H]), the last layer's hidden state at every step, and
        h_n [L*D, B, H], the last hidden state of every layer and direction.

    Dtypes: float16, bfloat16, float32, float64; one for all tensors.  float32 products use TF32
    where PyTorch's flag for cuDNN's RNNs allows it (`torch.backends.cudnn.rnn.fp32_precision`,
    `torch.backends.cudnn.allow_tf32`).

    Raises:
        RuntimeError: sizes, dtypes or devices do not fit; the message names the argument.

    Source: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder" (2014), in the
    variant of `torch.nn.GRU`, where the reset gate acts after the product with W_hn.
    """
    return ops.gru.default(
        input, hx, list(params), has_biases, num_layers, dropout, train, bidirectional, batch_first, recompute=recompute,
        resets=resets, keep=keep,
    )  # fmt: skip


def gru_pair(
    inputs: Sequence[Tensor],
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    reverse: Sequence[bool],
    batch_first: bool,
    *,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Two GRUs of one layer at once, neither of which is the other's input.

    Each is ``gru(input, state, weights, has_biases, 1, 0.0, False, False, batch_first)``; one that is reversed goes through
    time backwards, as ``gru(input.flip(0), ...)[0].flip(0)`` does, without a copy.  On CUDA both run in one launch where that
    is expected to be faster than one after the other, and everywhere else they are two calls.

    T time steps, B batch, H hidden units, which both have in common; I input features, each its own.

    Args:
        inputs: two of [T, B, I], or [B, T, I] with `batch_first`; T at least 1.
        hx: initial hidden states [2, B, H], one for each.
        params: of the first, then of the second, w_ih [3H, I], w_hh [3H, H] and, with `has_biases`, b_ih [3H], b_hh [3H]; gates
            in the order r, z, n.
        has_biases: whether `params` holds biases.
        reverse: of each, whether it goes through time backwards.
        batch_first: layout of `inputs` and outputs.
        recompute: with gradients, keep nothing but the results; the backward then runs the forward again.

    Returns:
        the outputs of both, [T, B, H] (or [B, T, H]), of the step at the place of its input, and h_n [2, B, H], the hidden
        states after the last steps, which of a reversed one are the first in memory.  The outputs are parts of one tensor.

    Dtypes: float16, bfloat16, float32, float64; one for all tensors.  TF32 as in :func:`gru`.

    Raises:
        RuntimeError: sizes, dtypes or devices do not fit; the message names the argument.
    """
    return ops.gru_pair.default(
        list(inputs), hx, list(params), has_biases, list(reverse), batch_first, recompute=recompute
    )


def gru_packed(
    data: Tensor,
    batch_sizes: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    *,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""A multi-layer GRU over sequences of different lengths; drop-in for the overload of `torch.gru` for packed data.

    The equations are those of :func:`gru`.  N rows of all time steps, T time steps, B sequences.

    Args:
        data: [N, I], `PackedSequence.data`: of each step the rows of those sequences that are not over, longest first.
        batch_sizes: [T] int64 on the CPU, `PackedSequence.batch_sizes`: how many rows each step has.  They are positive, do not
            increase, and have the sum N.
        hx: initial hidden state [L*D, B, H], B = batch_sizes[0], in the order of the rows
            (``hx.index_select(1, packed.sorted_indices)``).
        params, has_biases, num_layers, dropout, train, bidirectional, recompute: as for :func:`gru`.

    Returns:
        output [N, D*H], the last layer's hidden state at every step, packed as `data`, and h_n [L*D, B, H], the hidden state
        of every layer and direction after the last step of each sequence.

    Dtypes: as :func:`gru`.

    Raises:
        RuntimeError: sizes, dtypes, devices or the values of `batch_sizes` do not fit; the message names the argument.

    Source: as :func:`gru`; reference `torch.nn.GRU` on a `torch.nn.utils.rnn.PackedSequence`.
    """
    return ops.gru_packed.default(
        data, batch_sizes, hx, list(params), has_biases, num_layers, dropout, train, bidirectional, recompute=recompute
    )


def gru_cell(
    input: Tensor,
    hx: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    r"""One step of a GRU; drop-in for `torch.gru_cell`.

    .. math::
        r &= \sigma(W_{ir} x + b_{ir} + W_{hr} h + b_{hr}) \\
        z &= \sigma(W_{iz} x + b_{iz} + W_{hz} h + b_{hz}) \\
        n &= \tanh(W_{in} x + b_{in} + r \odot (W_{hn} h + b_{hn})) \\
        h' &= (1 - z) \odot n + z \odot h

    Args:
        input: x [B, I].
        hx: h [B, H].
        w_ih: [3H, I], gates in the order r, z, n.
        w_hh: [3H, H].
        b_ih: [3H] or None.
        b_hh: [3H] or None.

    Returns:
        h' [B, H].

    Dtypes: float16, bfloat16, float32, float64; one for all tensors.  float32 products use TF32
    where PyTorch's flag for matrix products allows it (`torch.backends.cuda.matmul.fp32_precision`,
    `torch.set_float32_matmul_precision`), which is the flag that `torch.gru_cell` obeys.

    Raises:
        RuntimeError: sizes, dtypes or devices do not fit; the message names the argument.

    Source: as :func:`gru`; reference `torch.nn.GRUCell`.
    """
    return ops.gru_cell.default(input, hx, w_ih, w_hh, b_ih, b_hh)
