"""The arguments of one call of the sequence op, and what follows from them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from torch_gru_fuse.ops.schemas import empty_gru_results, saved_gates


class GRUCall(NamedTuple):
    """What `gru_forward` and `gru_backward` have in common: time-major input, parameters and masks.

    T time steps, B batch, I inputs, H units, L layers, D directions; a state is one layer and direction, state = layer*D + d.
    """

    input: Tensor  # [T, B, I]
    hx: Tensor  # [L*D, B, H]
    params: list[Tensor]  # of each state w_ih, w_hh and, with biases, b_ih, b_hh
    has_biases: bool
    num_layers: int
    bidirectional: bool
    dropout_masks: Tensor | None  # [L-1, T, B, D*H]

    @property
    def T(self) -> int:
        return self.input.shape[0]

    @property
    def B(self) -> int:
        return self.input.shape[1]

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
        """What `layer` was given, from the outputs [L-1, T, B, D*H] of the inner layers."""
        return self.input if layer == 0 else self.mask(layer_outputs[layer - 1], layer - 1)

    def empty_results(self, save: bool) -> tuple[Tensor, Tensor, Tensor]:
        """output, h_n and reserve, allocated as the fake implementation says."""
        return empty_gru_results(self.input, self.hx, self.num_layers, self.bidirectional, save)

    def saved_gates(self, reserve: Tensor) -> tuple[Tensor, Tensor]:
        """layer_outputs [L-1, T, B, D*H] and gates [L, D, T, B, 4, H] = (r, z, n, hn) in a reserve."""
        return saved_gates(reserve, self.T, self.B, self.H, self.L, self.D)
