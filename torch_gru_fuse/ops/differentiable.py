"""Gradients and tangents of the ops, made of PyTorch operations, for what a kernel's numbers are not enough.

    double backward     the backward op runs its kernel; when its result is differentiated, that is `gru_gradients`' derivative
    forward-mode AD     the forward op runs its kernel; the tangents of its results are `gru_tangents`
    torch.vmap          gradients of shared weights, one a sample: `gru_gradients` with its operations mapped

Here, too, the states of all steps come from `gru_forward`, which `gru_backward` differentiates: both are kernels.  The
derivatives of the gates follow for all steps at once, as do all products with inputs and weights, and a loop of four operations
a time step is left for the recurrence of the gradient or of the tangent.  Since all of this is differentiable, in both modes,
derivatives of any order are.

Half precision is computed in float32 and rounded at the end.  float32 products obey PyTorch's flag for matrix products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_gru_fuse import equations, equations_packed, torch_hooks
from torch_gru_fuse.ops import two_calls
from torch_gru_fuse.ops.call import GRUCall, PackedCall, PairCall
from torch_gru_fuse.ops.schemas import ops


def _wide(tensor: Tensor | None) -> Tensor | None:
    return tensor.float() if tensor is not None and tensor.dtype.itemsize < 4 else tensor


def _layers(
    call: GRUCall | PackedCall, forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
) -> tuple[GRUCall | PackedCall, list[tuple[Tensor, Tensor]]]:
    """The call with wide states and parameters, and input and output of every layer as functions of its tensors."""
    layers = []
    x = call.input
    for layer in range(call.L):
        states, places = call.states(layer), call.places(layer * call.D, call.D)
        out, _, _ = forward(x, call.hx[states], call.params[places], call.has_biases, 1, call.bidirectional, None, False)
        layers.append((_wide(x), _wide(out)))
        if layer < call.L - 1:
            x = call.mask(out, layer)
    return call._replace(hx=_wide(call.hx), params=[_wide(p) for p in call.params]), layers


def gru_gradients(call: GRUCall, grad_output: Tensor | None, grad_h_n: Tensor | None, needs: Sequence[bool]) -> list[Tensor]:
    """`gru_backward` as a function of the gradients that arrive and of the call: those of `call.tensors` that are needed."""
    gradients = functools.partial(equations.gru_layer_gradients, keep=call.keep)
    return _gradients(call, _forward_of(call), gradients, grad_output, grad_h_n, needs)


def _forward_of(call: GRUCall) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`gru_forward` with the resets of a call."""
    return ops.gru_forward.default if call.keep is None else lambda *args: ops.gru_forward.default(*args, call.keep)


def _gradients(
    call: GRUCall | PackedCall,
    forward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    layer_gradients: Callable[..., tuple[Tensor | None, ...]],
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    need_input, need_hx, *need_params = needs
    each = 4 if call.has_biases else 2
    with torch_hooks.below_any_autocast():
        wide, layers = _layers(call, forward)
        grad, grad_h_n = _wide(grad_output), _wide(grad_h_n)
        grad_hx: list[Tensor | None] = [None] * (call.L * call.D)
        grad_params: list[Tensor | None] = [None] * len(call.params)
        for layer in reversed(range(call.L)):
            x, out = layers[layer]
            grads_x = []
            for d in range(call.D):
                state = layer * call.D + d
                places = call.places(state)
                dx, grad_hx[state], *d_params = layer_gradients(
                    None if grad is None else grad.narrow(-1, d * call.H, call.H),
                    None if grad_h_n is None else grad_h_n[state],
                    x, wide.hx[state], out.narrow(-1, d * call.H, call.H), *wide.parameters(state), reverse=d == 1,
                    needs=(layer > 0 or need_input, need_hx, *need_params[places], *[False] * (4 - each)),
                )  # fmt: skip
                grads_x.append(dx)
                grad_params[places] = d_params[:each]
            grad = None if grads_x[0] is None else sum(grads_x[1:], grads_x[0])
            if layer > 0:
                grad = call.mask(grad, layer - 1)
        grads = [grad, torch.stack(grad_hx) if need_hx else None, *grad_params]
        return [g.to(call.input.dtype) for g, need in zip(grads, needs, strict=True) if need]


def gru_tangents(call: GRUCall, tangents: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Tangents of output and h_n for those of `call.tensors`; None is zero."""
    with torch_hooks.below_any_autocast():
        wide, layers = _layers(call, _forward_of(call))
        dx, dhx, *d_params = map(_wide, tangents)
        finals = []
        for layer, (x, out) in enumerate(layers):
            d_outs = []
            for d in range(call.D):
                state = layer * call.D + d
                arriving = (dx, None if dhx is None else dhx[state], *d_params[call.places(state)], None, None)[:6]
                d_out, d_final = equations.gru_layer_tangents(
                    arriving, x, wide.hx[state], out.narrow(-1, d * call.H, call.H), *wide.parameters(state), reverse=d == 1,
                    keep=call.keep,
                )  # fmt: skip
                d_outs.append(d_out)
                finals.append(d_final)
            dx = torch.cat(d_outs, -1)
            if layer < call.L - 1:
                dx = call.mask(dx, layer)
        return dx.to(call.input.dtype), torch.stack(finals).to(call.input.dtype)


# A pair: the same of each layer.


def gru_pair_gradients(
    call: PairCall, grad_output: Tensor | None, grad_h_n: Tensor | None, needs: Sequence[bool]
) -> list[Tensor]:
    """`gru_pair_backward` as a function of the gradients that arrive and of the call."""

    def gradients(single, dy, dhn, output, reserve, of_single):
        return gru_gradients(single, dy, dhn, of_single)

    return two_calls.backward(call, grad_output, grad_h_n, None, None, needs, gradients)


def gru_pair_tangents(call: PairCall, tangents: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    """Tangents of output and h_n for those of `call.tensors`; None is zero."""
    d_inputs, d_hx, d_params = tangents[:2], tangents[2], tangents[3:]
    outputs, finals = [], []
    for i in range(2):
        dx = None if d_inputs[i] is None else call.in_time(i, d_inputs[i])
        dhx = None if d_hx is None else d_hx[i : i + 1]
        output, final = gru_tangents(call.single(i), (dx, dhx, *d_params[call.places(i)]))
        outputs.append(call.in_time(i, output))
        finals.append(final)
    return torch.stack(outputs), torch.cat(finals)


# Packed sequences: the same over the rows of each step.  Tangents are those of the equations.


def gru_packed(call: PackedCall) -> tuple[Tensor, Tensor]:
    """output and h_n of `gru_packed_forward`, made of PyTorch operations."""
    with torch_hooks.below_any_autocast():
        wide = call._replace(hx=_wide(call.hx), params=[_wide(p) for p in call.params])
        sizes = call.step_sizes()
        x, finals = _wide(call.input), []
        for layer in range(call.L):
            outs = []
            for d in range(call.D):
                state = layer * call.D + d
                out, final = equations_packed.gru_layer(
                    x, wide.hx[state], *wide.parameters(state), reverse=d == 1, sizes=sizes
                )
                outs.append(out)
                finals.append(final)
            x = torch.cat(outs, -1)
            if layer < call.L - 1:
                x = call.mask(x, layer)
        return x.to(call.input.dtype), torch.stack(finals).to(call.input.dtype)


def gru_packed_gradients(
    call: PackedCall, grad_output: Tensor | None, grad_h_n: Tensor | None, needs: Sequence[bool]
) -> list[Tensor]:
    """`gru_packed_backward` as a function of the gradients that arrive and of the call."""

    def forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        return ops.gru_packed_forward.default(x, call.batch_sizes, *rest)

    return _gradients(
        call, forward, functools.partial(equations_packed.gru_layer_gradients, sizes=call.step_sizes()), grad_output, grad_h_n,
        needs,
    )  # fmt: skip


# A cell is a layer of one step: the state before is hx, and the one after does not enter.


def gru_cell(tensors: Sequence[Tensor | None]) -> Tensor:
    """h' from input, hx, w_ih, w_hh, b_ih, b_hh."""
    with torch_hooks.below_any_autocast():
        return equations.gru_cell(*map(_wide, tensors)).to(tensors[1].dtype)


def gru_cell_gradients(grad_h: Tensor, tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """`gru_cell_backward` as a function of the gradient that arrives and of input, hx, w_ih, w_hh, b_ih, b_hh."""
    with torch_hooks.below_any_autocast():
        input, hx, *weights = map(_wide, tensors)
        dx, *grads = equations.gru_layer_gradients(None, _wide(grad_h), input[None], hx, hx[None], *weights, needs=needs)
        grads = [None if dx is None else dx[0], *grads]
        return [g.to(grad_h.dtype) for g, need in zip(grads, needs, strict=True) if need]


def gru_cell_tangent(tensors: Sequence[Tensor | None], tangents: Sequence[Tensor | None]) -> Tensor:
    """Tangent of h' for those of input, hx, w_ih, w_hh, b_ih, b_hh; None is zero."""
    with torch_hooks.below_any_autocast():
        input, hx, *weights = map(_wide, tensors)
        dx, *others = map(_wide, tangents)
        arriving = (None if dx is None else dx[None], *others)
        return equations.gru_layer_tangents(arriving, input[None], hx, hx[None], *weights)[1].to(tensors[1].dtype)
