"""The backward of the sequence op by kernels: recurrences, the matrix products around them, gradients of parameters.

From the last layer to the first:

1. the recurrence makes gate gradients d_gates of all steps, for as many layers as a launch takes, and adds up what biases need;
2. PyTorch's matrix products over all steps make the gradients of weights, accumulated in float32, and the gradient that the
   layer below gets.

One last launch puts gradients of hidden weights and biases of all layers into the order of the parameters.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import replace
from operator import or_

import torch
from torch import Tensor
from triton.runtime import driver

from torch_gru_fuse import equations, torch_hooks
from torch_gru_fuse.kernels import launch, packed_states
from torch_gru_fuse.kernels import parameter_gradients as parameters
from torch_gru_fuse.kernels.step import sequence_backward
from torch_gru_fuse.ops import two_calls, whole_backward
from torch_gru_fuse.ops.call import GRUCall, PackedCall, PairCall
from torch_gru_fuse.planner.plan import Plan
from torch_gru_fuse.planner.whole_sequence import WholeSequencePlan

log = logging.getLogger("torch_gru_fuse")

#: Backwards of whole sequences that a GPU could not run, although by its description it can.
_refused: dict[tuple[int, WholeSequencePlan], str] = {}


def gru_backward(
    call: GRUCall | PackedCall,
    plan: Plan,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    output: Tensor,
    reserve: Tensor,
    needs: Sequence[bool],
    offsets: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of those of input, hx and parameters that are needed.

    Args:
        reserve: as our kernels leave it.
        offsets: of a packed call, on its device.

    Raises:
        launch.DoesNotFit: of a packed call, for which there are no launches of single steps.
    """
    need_input, _, *need_params = needs
    layer_outputs, gates = call.saved_gates(reserve)
    d_gates, grad_hx = torch.empty_like(gates), call.hx.new_empty(call.hx.shape)
    grad_params: list[Tensor | None] = [None] * len(call.params)
    in_order = _InOrder(call)
    refused = _refused.get((call.input.get_device(), plan.backward))
    if refused is not None and offsets is not None:
        raise launch.DoesNotFit(refused)
    whole = plan.backward if refused is None else None
    sums = None if whole is None else whole_backward.empty_sums(call, whole)

    grad, top = grad_output, call.L - 1
    with torch_hooks.products(output.dtype, tf32=plan.tf32):
        while top >= 0:
            out = output if top == call.L - 1 else layer_outputs[top]
            layers = 1 if whole is None else whole.lanes // call.D
            if whole is not None:
                try:
                    whole_backward.gate_gradients(
                        call, whole, top - layers + 1, grad, grad_h_n, out, layer_outputs, gates, d_gates, grad_hx, sums,
                        offsets,
                    )  # fmt: skip
                except launch.DoesNotFit as error:
                    _refuse(call, whole, error)
                    if offsets is not None:
                        raise
                    whole = sums = None
                    continue
            else:
                _step_gate_gradients(call, plan, top, grad, grad_h_n, out, gates, d_gates, grad_hx)
            for layer in range(top, top - layers, -1):
                out = output if layer == call.L - 1 else layer_outputs[layer]
                _weight_gradients(call, layer, d_gates, layer_outputs, out, need_params, grad_params, in_order, offsets)
            top -= layers
            grad = _input_gradient(call, call.states(top + 1), d_gates) if top >= 0 or need_input else None
            if top >= 0:
                grad = call.mask(grad, top)
        if call.has_biases and any(need_params):
            if sums is None:  # accumulated in float32 by torch.sum
                sums = d_gates.view(call.L * call.D, 1, call.N, 4 * call.H).sum(2)
            in_order.biases(sums, need_params, grad_params)
    in_order.launch()
    return [g for g, need in zip([grad, grad_hx, *grad_params], needs, strict=True) if need]


def gru_pair_backward(
    call: PairCall,
    plan: Plan,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    output: Tensor,
    reserve: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The same of a pair whose forward was one launch."""
    need_inputs, need_hx, need_params = needs[:2], needs[2], needs[3:]
    layer_outputs, gates = call.saved_gates(reserve)
    whole = plan.backward
    if whole is None or (call.input.get_device(), whole) in _refused:
        return _two_backwards(call, plan, grad_output, grad_h_n, output, gates, needs)
    d_gates, grad_hx = torch.empty_like(gates), call.hx.new_empty(call.hx.shape)
    grad_params: list[Tensor | None] = [None] * len(call.params)
    in_order = _InOrder(call)
    sums = whole_backward.empty_sums(call, whole)
    with torch_hooks.products(output.dtype, tf32=plan.tf32):
        try:
            whole_backward.gate_gradients(
                call, whole, 0, grad_output, grad_h_n, output, layer_outputs, gates, d_gates, grad_hx, sums
            )
        except launch.DoesNotFit as error:
            _refuse(call, whole, error)
            return _two_backwards(call, plan, grad_output, grad_h_n, output, gates, needs)
        _weight_gradients(call, 0, d_gates, layer_outputs, output, need_params, grad_params, in_order, None)
        grad_inputs = [_input_gradient(call, slice(i, i + 1), d_gates) for i in range(2) if need_inputs[i]]
        if call.has_biases and any(need_params):
            in_order.biases(sums, need_params, grad_params)
    in_order.launch()
    needed = [g for g, need in zip([grad_hx, *grad_params], [need_hx, *need_params], strict=True) if need]
    return [*grad_inputs, *needed]


def _two_backwards(
    call: PairCall, plan: Plan, grad_output: Tensor | None, grad_h_n: Tensor | None, output: Tensor, gates: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """A launch a step, one layer after the other, from the gates [1, 2, T, B, 4, H] of one launch."""
    plan = replace(plan, backward=None)
    reserve = torch.stack([call.in_time(i, gates[0, i]) for i in range(2)]).flatten()
    return two_calls.backward(
        call, grad_output, grad_h_n, output, reserve, needs, lambda single, *args: gru_backward(single, plan, *args)
    )


def _refuse(call: GRUCall | PackedCall | PairCall, whole: WholeSequencePlan, error: launch.DoesNotFit) -> None:
    device = call.input.get_device()
    reason = _refused[device, whole] = f"{error} (cuda:{device}, {whole})"
    op, instead = "gru", "one launch a step runs"
    if isinstance(call, PackedCall):
        op, instead = "gru_packed", "PyTorch's operations run"
    log.warning(
        "torch_gru_fuse.%s: the backward of whole sequences in one launch does not fit, %s: %s", op, instead, reason
    )


def _step_gate_gradients(
    call: GRUCall, plan: Plan, layer: int, grad: Tensor | None, grad_h_n: Tensor | None, out: Tensor, gates: Tensor,
    d_gates: Tensor, grad_hx: Tensor,
) -> None:  # fmt: skip
    """As `whole_backward.gate_gradients` for one layer, one launch a step, and without sums."""
    states = call.states(layer)
    sequence_backward(
        grad, None if grad_h_n is None else grad_h_n[states], out, call.hx[states], call.layer_parameters(layer)[1],
        gates[layer], d_gates[layer], grad_hx[states], tile=plan.backward_tile, tf32=plan.tf32, keep=call.keep,
    )  # fmt: skip


def _input_gradient(call: GRUCall | PackedCall | PairCall, states: slice, d_gates: Tensor) -> Tensor:
    """Gradient of what a layer was given, [T, B, I or D*H], from all states that were given it."""
    N, H = call.N, call.H
    grad: Tensor | None = None
    for state in range(states.start, states.stop):
        d_input = d_gates.as_strided((N, 3 * H), (4 * H, 1), (state * N * 4 + 1) * H)  # of r, z, n
        w_ih = call.parameters(state)[0]
        grad = torch.mm(d_input, w_ih) if grad is None else grad.addmm_(d_input, w_ih)
    return grad.view(*call.input.shape[:-1], -1)


def _weight_gradients(
    call: GRUCall | PackedCall | PairCall, layer: int, d_gates: Tensor, layer_outputs: Tensor, out: Tensor,
    need_params: Sequence[bool], grad_params: list[Tensor | None], in_order: _InOrder, offsets: Tensor | None,
) -> None:  # fmt: skip
    """Puts gradients of a layer's weights into grad_params, or leaves it to in_order to do so."""
    N, B, H = call.N, call.B, call.H
    each = 4 if call.has_biases else 2
    rows: Tensor | None = None
    if offsets is not None and any(need_params[call.places(layer * call.D, call.D)][1::each]):
        packed_before = _packed_before(call, layer, out, offsets)
    for d in range(call.D):
        state = layer * call.D + d
        place = state * each
        start = state * N * 4 * H
        if need_params[place]:
            if rows is None or call.pair is not None:  # two directions have one input
                rows = call.input_of(layer, d, layer_outputs).flatten(0, -2)
            d_input = d_gates.as_strided((3 * H, N), (1, 4 * H), start + H)  # of r, z, n
            grad_params[place] = torch.mm(d_input, rows)
        if not need_params[place + 1]:
            continue
        d_hidden = d_gates.as_strided((3 * H, N), (1, 4 * H), start)  # of hn, r, z
        h0 = call.hx[state]
        grad = h0.new_empty(3 * H, H)
        grad_params[place + 1] = grad
        if offsets is not None:
            in_order.weight(state, torch.mm(d_hidden, packed_before[d]), grad)
            continue
        states, back = call.sequence_of(out, d), call.walks_back(d)
        before = states[1:] if back else states[:-1]  # but for the first step, before which there is h0
        # Copying the states is cheaper than going over the result twice more; with resets they are changed anyway.
        if N <= 3 * H or call.keep is not None:
            before = torch.cat((before, h0[None]) if back else (h0[None], before))
            before = equations.kept(before, call.keep).reshape(N, H)
            torch.mm(d_hidden[H:], before, out=grad[: 2 * H])
            torch.mm(d_hidden[:H], before, out=grad[2 * H :])
            continue
        first, others = (d_hidden[:, -B:], d_hidden[:, :-B]) if back else (d_hidden[:, :B], d_hidden[:, B:])
        in_order.weight(state, torch.mm(first, h0).addmm_(others, before.flatten(0, 1)), grad)


def _packed_before(call: PackedCall, layer: int, out: Tensor, offsets: Tensor) -> Tensor:
    """The states [D, N, H] that the rows of a layer started from; out: the states after the steps."""
    device, dtype = call.input.get_device(), out.dtype
    before = out.new_empty(call.D, call.N, call.H)
    hx, out = call.hx[call.states(layer)].contiguous(), out.contiguous()
    run = launch.launcher(
        packed_states.states_before_kernel, device,
        packed_states.states_before_constants(hidden=call.H, directions=call.D), [dtype, dtype, torch.int32, dtype, None, None],
    )  # fmt: skip
    addresses = [t.data_ptr() for t in (out, hx, offsets, before)]
    grid = packed_states.states_before_grid(steps=call.T, batch=call.B, hidden=call.H, directions=call.D)
    stream = driver.active.get_current_stream(device)
    run(grid, stream, (*addresses, call.T, call.B), not functools.reduce(or_, addresses) % 16)
    return before


class _InOrder:
    """What is left to `parameter_gradients_kernel`: by state (layer and direction), and where it puts it."""

    def __init__(self, call: GRUCall | PackedCall | PairCall):
        self._call = call
        self._weights: dict[int, tuple[Tensor, Tensor]] = {}
        self._biases: dict[int, tuple[Tensor, Tensor]] = {}
        self._sums: Tensor | None = None

    def weight(self, state: int, rotated: Tensor, grad: Tensor) -> None:
        """The gradient of a hidden weight, its rows still those of (hn, r, z)."""
        self._weights[state] = rotated, grad

    def biases(self, sums: Tensor, need_params: Sequence[bool], grad_params: list[Tensor | None]) -> None:
        """Gradients of biases from sums [L*D, programs, 4, H], where they are needed."""
        self._sums = sums
        size, new = 3 * self._call.H, self._call.hx.new_empty
        for state in range(self._call.L * self._call.D):
            b_ih, b_hh = 4 * state + 2, 4 * state + 3
            if need_params[b_ih] or need_params[b_hh]:
                self._biases[state] = grad_params[b_ih], grad_params[b_hh] = new(size), new(size)

    def launch(self) -> None:
        """All states in one launch, or in as many as they differ in what they need."""
        groups: dict[tuple[bool, bool], list[int]] = {}
        for state in range(self._call.L * self._call.D):
            kind = state in self._weights, state in self._biases
            if any(kind):
                groups.setdefault(kind, []).append(state)
        most = parameters.MOST_LANES
        for (rotated, biases), states in groups.items():
            for i in range(0, len(states), most):
                self._launch(states[i : i + most], rotated, biases)

    def _launch(self, states: list[int], rotated: bool, biases: bool) -> None:
        call, lanes = self._call, len(states)
        sums = self._sums if biases else None
        device = call.hx.get_device()
        run = launch.launcher(
            parameters.parameter_gradients_kernel, device, parameters.parameter_gradients_constants(lanes=lanes, hidden=call.H),
            parameters.parameter_gradients_types(
                call.hx.dtype, None if sums is None else sums.dtype, lanes, rotated=rotated
            ),
        )  # fmt: skip
        each = 0 if sums is None else sums.stride(0) * sums.element_size()
        values = (
            tuple(sums.data_ptr() + s * each for s in states) if biases else None,
            *(tuple(self._weights[s][i].data_ptr() for s in states) if rotated else None for i in range(2)),
            *(tuple(self._biases[s][i].data_ptr() for s in states) if biases else None for i in range(2)),
        )
        aligned = not functools.reduce(or_, (pointer for pointers in values if pointers for pointer in pointers)) % 16
        grid = parameters.parameter_gradients_grid(lanes=lanes, hidden=call.H, rotated=rotated, biases=biases)
        programs = 0 if sums is None else sums.shape[1]
        run(grid, driver.active.get_current_stream(device), (*values, programs), aligned)
