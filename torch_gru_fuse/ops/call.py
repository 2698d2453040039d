"""The arguments of one call of a sequence op, and what follows from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_gru_fuse.ops.schemas import (
    empty_gru_results,
    empty_packed_results,
    empty_pair_results,
    saved_gates,
    split_reserve,
)


class _Layers:
    """What calls of `gru_forward`, `gru_packed_forward` and `gru_pair_forward` have in common.

    T time steps, B batch, N rows of all steps, I inputs, H units, L layers, D directions; a state is one layer and direction,
    state = layer*D + d.
    """

    __slots__ = ()

    #: Of a pair, which of its layers go through time backwards, a bit each.
    pair: int | None = None
    #: What is left of the state before each step; calls of `gru_forward` alone have resets.
    keep: Tensor | None = None

    @property
    def H(self) -> int:
        return self.hx.shape[2]

    @property
    def L(self) -> int:
        return self.num_layers

    @property
    def D(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def tensors(self) -> list[Tensor]:
        """What gradients are asked for, in the order of `needs`."""
        return [self.input, self.hx, *self.params]

    def states(self, layer: int, layers: int = 1) -> slice:
        """Where the states of some layers are in hx."""
        return slice(layer * self.D, (layer + layers) * self.D)

    def places(self, state: int, states: int = 1) -> slice:
        """Where the parameters of some states are in params."""
        each = 4 if self.has_biases else 2
        return slice(state * each, (state + states) * each)

    def parameters(self, state: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """w_ih, w_hh, b_ih, b_hh of one state."""
        w_ih, w_hh, *biases = self.params[self.places(state)]
        return w_ih, w_hh, *(biases or (None, None))

    def layer_parameters(self, layer: int) -> tuple[list[Tensor] | None, ...]:
        """w_ih, w_hh, b_ih, b_hh of a layer, each a list with one tensor a direction, or None for absent biases."""
        states = [self.parameters(layer * self.D + d) for d in range(self.D)]
        return tuple(None if kind[0] is None else list(kind) for kind in zip(*states, strict=True))

    def mask(self, x: Tensor, layer: int) -> Tensor:
        """What `layer` hands to the next, or the gradient of that: x with dropout."""
        return x if self.dropout_masks is None else x * self.dropout_masks[layer]

    def layer_input(self, layer: int, layer_outputs: Tensor) -> Tensor:
        """What `layer` was given, from the outputs [L-1, ..., D*H] of the inner layers."""
        return self.input if layer == 0 else self.mask(layer_outputs[layer - 1], layer - 1)


class _TimeMajor(_Layers):
    """Those whose input is [T, B, I]."""

    __slots__ = ()

    @property
    def T(self) -> int:
        return self.input.shape[0]

    @property
    def B(self) -> int:
        return self.input.shape[1]

    @property
    def N(self) -> int:
        """Rows of all steps."""
        return self.T * self.B


class _GRUFields(NamedTuple):
    input: Tensor  # [T, B, I]
    hx: Tensor  # [L*D, B, H]
    params: list[Tensor]  # of each state w_ih, w_hh and, with biases, b_ih, b_hh
    has_biases: bool
    num_layers: int
    bidirectional: bool
    dropout_masks: Tensor | None  # [L-1, T, B, D*H]
    keep: Tensor | None = None  # [T, B]


class GRUCall(_GRUFields, _TimeMajor):
    """What `gru_forward` and `gru_backward` have in common: time-major input, parameters, masks and resets."""

    __slots__ = ()

    def empty_results(self, save: bool) -> tuple[Tensor, Tensor, Tensor]:
        """output, h_n and reserve, allocated as the fake implementation says."""
        return empty_gru_results(self.input, self.hx, self.num_layers, self.bidirectional, save)

    def split_reserve(self, reserve: Tensor) -> tuple[Tensor, Tensor]:
        """layer_outputs [L-1, T, B, D*H] and what follows them in a reserve."""
        return split_reserve(reserve, (self.T, self.B), self.H, self.L, self.D)

    def saved_gates(self, reserve: Tensor) -> tuple[Tensor, Tensor]:
        """layer_outputs [L-1, T, B, D*H] and gates [L, D, T, B, 4, H] = (r, z, n, hn) in a reserve."""
        return saved_gates(reserve, (self.T, self.B), self.H, self.L, self.D)

    def torch_gru(self, x: Tensor, hx: Tensor, params: list[Tensor], has_biases: bool, layers: int) -> tuple[Tensor, Tensor]:
        """PyTorch's own GRU for some layers, without dropout and gradients."""
        return torch.gru(x, hx, params, has_biases, layers, 0.0, False, self.bidirectional, False)

    def step_sizes(self) -> list[int]:
        """Rows of each step where they differ; of a call that is not packed none."""
        return []

    def walks_back(self, d: int) -> bool:
        """Whether a direction goes through time backwards."""
        return d == 1

    def input_of(self, layer: int, d: int, layer_outputs: Tensor) -> Tensor:
        """What a direction of a layer was given."""
        return self.layer_input(layer, layer_outputs)

    def sequence_of(self, output: Tensor, d: int) -> Tensor:
        """The states [T, B, H] of a direction in the output of its layer."""
        return output[:, :, d * self.H : (d + 1) * self.H]


class _PairFields(NamedTuple):
    inputs: list[Tensor]  # two of [T, B, I], each with an I of its own
    hx: Tensor  # [2, B, H]
    params: list[Tensor]  # of each layer w_ih, w_hh and, with biases, b_ih, b_hh
    has_biases: bool
    reverse: list[bool]  # which of the two go through time backwards


class PairCall(_PairFields, _TimeMajor):
    """The same of `gru_pair_forward` and `gru_pair_backward`; the two layers take the place of two directions of one."""

    __slots__ = ()
    num_layers, bidirectional, dropout_masks = 1, False, None

    @property
    def input(self) -> Tensor:
        """One of the two, which have T, B, dtype and device in common."""
        return self.inputs[0]

    @property
    def D(self) -> int:
        return 2

    @property
    def pair(self) -> int:
        return self.reverse[0] | self.reverse[1] << 1

    @property
    def tensors(self) -> list[Tensor]:
        """What gradients are asked for, in the order of `needs`."""
        return [*self.inputs, self.hx, *self.params]

    def empty_results(self, save: bool) -> tuple[Tensor, Tensor, Tensor]:
        """output, h_n and reserve, allocated as the fake implementation says."""
        return empty_pair_results(self.input, self.hx, save)

    def saved_gates(self, reserve: Tensor) -> tuple[Tensor, Tensor]:
        """layer_outputs, of which a single layer has none, and gates [1, 2, T, B, 4, H] = (r, z, n, hn) in a reserve."""
        return saved_gates(reserve, (self.T, self.B), self.H, 1, 2)

    def walks_back(self, d: int) -> bool:
        """Whether a layer goes through time backwards."""
        return self.reverse[d]

    def input_of(self, layer: int, d: int, layer_outputs: Tensor) -> Tensor:
        """What one of the two was given."""
        return self.inputs[d]

    def sequence_of(self, output: Tensor, d: int) -> Tensor:
        """The states [T, B, H] of one of the two."""
        return output[d]

    def in_time(self, i: int, sequence: Tensor) -> Tensor:
        """A sequence [T, ...] of the i-th layer in the order of its steps, or one that is in that order as it is in memory."""
        return sequence.flip(0) if self.reverse[i] else sequence

    def single(self, i: int) -> GRUCall:
        """The call of `gru_forward` that is the i-th of the two, but for the order in time of its input and output."""
        params = self.params[self.places(i)]
        return GRUCall(self.in_time(i, self.inputs[i]), self.hx[i : i + 1], params, self.has_biases, 1, False, None)


class _PackedFields(NamedTuple):
    input: Tensor  # data [N, I], N the sum of batch_sizes
    batch_sizes: Tensor  # [T] int64, on the CPU
    hx: Tensor  # [L*D, B, H], in the order of the rows
    params: list[Tensor]
    has_biases: bool
    num_layers: int
    bidirectional: bool
    dropout_masks: Tensor | None  # [L-1, N, D*H]


class PackedCall(_PackedFields, _Layers):
    """The same of `gru_packed_forward` and `gru_packed_backward`; [N] takes the place of [T, B]."""

    __slots__ = ()

    @property
    def T(self) -> int:
        return self.batch_sizes.shape[0]

    @property
    def B(self) -> int:
        return self.hx.shape[1]

    @property
    def N(self) -> int:
        """Rows of all steps."""
        return self.input.shape[0]

    def input_of(self, layer: int, d: int, layer_outputs: Tensor) -> Tensor:
        """What a direction of a layer was given."""
        return self.layer_input(layer, layer_outputs)

    def empty_results(self, save: bool) -> tuple[Tensor, Tensor, Tensor]:
        """output, h_n and reserve, allocated as the fake implementation says."""
        return empty_packed_results(self.input, self.batch_sizes, self.hx, self.num_layers, self.bidirectional, save)

    def split_reserve(self, reserve: Tensor) -> tuple[Tensor, Tensor]:
        """layer_outputs [L-1, N, D*H] and what follows them in a reserve."""
        return split_reserve(reserve, (self.N,), self.H, self.L, self.D)

    def saved_gates(self, reserve: Tensor) -> tuple[Tensor, Tensor]:
        """layer_outputs [L-1, N, D*H] and gates [L, D, N, 4, H] = (r, z, n, hn) in a reserve."""
        return saved_gates(reserve, (self.N,), self.H, self.L, self.D)

    def torch_gru(self, x: Tensor, hx: Tensor, params: list[Tensor], has_biases: bool, layers: int) -> tuple[Tensor, Tensor]:
        """PyTorch's own GRU for some layers, without dropout and gradients."""
        sizes = self.batch_sizes.contiguous()  # torch reads them by address
        return torch.gru(x, sizes, hx, params, has_biases, layers, 0.0, False, self.bidirectional)

    def step_sizes(self) -> list[int]:
        """Rows of each step."""
        return self.batch_sizes.tolist()
