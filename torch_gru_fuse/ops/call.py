"""The arguments of one call of a sequence op, and what follows from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from torch_gru_fuse.ops.schemas import empty_gru_results, empty_packed_results, saved_gates, split_reserve


class _Layers:
    """What calls of `gru_forward` and of `gru_packed_forward` have in common.

    T time steps, B batch, N rows of all steps, I inputs, H units, L layers, D directions; a state is one layer and direction,
    state = layer*D + d.
    """

    __slots__ = ()

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


class _GRUFields(NamedTuple):
    input: Tensor  # [T, B, I]
    hx: Tensor  # [L*D, B, H]
    params: list[Tensor]  # of each state w_ih, w_hh and, with biases, b_ih, b_hh
    has_biases: bool
    num_layers: int
    bidirectional: bool
    dropout_masks: Tensor | None  # [L-1, T, B, D*H]
    keep: Tensor | None = None  # [T, B]


class GRUCall(_GRUFields, _Layers):
    """What `gru_forward` and `gru_backward` have in common: time-major input, parameters, masks and resets."""

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
