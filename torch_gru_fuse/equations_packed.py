"""A GRU layer over packed sequences of different lengths, in plain PyTorch: `equations` without the padding.

The rows of a step are those sequences that are not over, longest first, and all rows of a PackedSequence lie step by step in
one matrix: x [N, I] with N = sum(sizes), where sizes[t] rows belong to step t and sizes never grows.  A sequence is the same
row of every step that has it.  Forward in time sequences end, the last row first; backward in time they begin, with their rows
of h0.

Products over all steps are one matrix product over N rows, and a step takes its own rows alone, so no time goes into padding.

Sizes: T steps, B batch (= sizes[0]), I inputs, H units, N rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from torch_gru_fuse.equations import _gate_derivatives, _gates, _parameter_gradients, _rotate, _step_saving

__all__ = ["gru_layer", "gru_layer_backward", "gru_layer_gradients", "gru_layer_saving"]


def _steps(sizes: Sequence[int], reverse: bool) -> list[tuple[int, int]]:
    """First row and number of rows of every step, in the order in which the layer takes them."""
    steps, start = [], 0
    for size in sizes:
        steps.append((start, size))
        start += size
    return steps[::-1] if reverse else steps


def _states_before(out: Tensor, h0: Tensor, sizes: Sequence[int], reverse: bool) -> Tensor:
    """The state [N, H] that each row started from, of the states [N, H] after the steps."""
    pieces = []
    before, active = 0, 0
    for start, size in _steps(sizes, reverse):
        stay = min(active, size)
        pieces.append((out[before : before + stay], h0[stay:size]))
        before, active = start, size
    return torch.cat([piece for pair in (pieces[::-1] if reverse else pieces) for piece in pair])


def gru_layer(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    reverse: bool = False,
    *,
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """One direction of one layer over x [N, I] from h0 [B, H]: (out [N, H], h_n [B, H]), differentiable in every mode.

    h_n holds the last state of every sequence, with ``reverse`` that of its first step.
    """
    gi = linear(x, w_ih, b_ih).split(list(sizes))
    outs: list[Tensor] = []
    ended: list[Tensor] = []  # the shortest sequence first
    h = h0[:0]
    for gi_t in reversed(gi) if reverse else gi:
        active, size = h.shape[0], gi_t.shape[0]
        if size > active:
            h = torch.cat((h, h0[active:size]))
        elif size < active:
            ended.append(h[size:])
            h = h[:size]
        _, z, n, _ = _gates(gi_t, linear(h, w_hh, b_hh))
        h = n + z * (h - n)
        outs.append(h)
    return torch.cat(outs[::-1] if reverse else outs), torch.cat((h, *ended[::-1]))


def gru_layer_saving(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    out: Tensor,
    gates: Tensor,
    h_n: Tensor,
    reverse: bool = False,
    *,
    sizes: Sequence[int],
) -> None:
    """:func:`gru_layer` for training: fills out [N, H], gates [N, 4, H] = (r, z, n, hn) and h_n [B, H].  Not differentiable."""
    gi = linear(x, w_ih, b_ih)
    w_hh = w_hh.t()
    h = h0[:0]
    for start, size in _steps(sizes, reverse):
        active = h.shape[0]
        if size > active:
            h = torch.cat((h, h0[active:size]))
        elif size < active:
            h_n[size:active] = h[size:]
            h = h[:size]
        rows = slice(start, start + size)
        h = _step_saving(gi[rows], h, w_hh, b_hh, out[rows], gates[rows])
    h_n[: h.shape[0]] = h


def gru_layer_backward(
    grad_out: Tensor | None,
    grad_hn: Tensor | None,
    x: Tensor,
    h0: Tensor,
    out: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    reverse: bool = False,
    *,
    sizes: Sequence[int],
    gates: Tensor,
    needs: Sequence[bool] = (True,) * 6,
) -> tuple[Tensor | None, ...]:
    """(dx, dh0, dw_ih, dw_hh, db_ih, db_hh) of :func:`gru_layer`, for the gates [N, 4, H] of :func:`gru_layer_saving`.

    As :func:`equations.gru_layer_backward`.  The gradient of a sequence's last state waits in its row of g until the
    steps of the sequence come, and that of h0 stays there after them.
    """
    hidden = h0.shape[1]
    h_before = _states_before(out, h0, sizes, reverse)
    r, z, n, hn = gates.unbind(1)
    d_gates = _gate_derivatives(r, z, n, hn, h_before)  # [N, 4, H], made gate gradients step by step
    w_rotated = _rotate(w_hh)

    g = torch.zeros_like(h0) if grad_hn is None else grad_hn.clone()
    for start, size in reversed(_steps(sizes, reverse)):
        rows = slice(start, start + size)
        g_t = g[:size]
        if grad_out is not None:
            g_t += grad_out[rows]
        d_gates[rows] *= g_t.unsqueeze(1)
        g_t *= z[rows]
        g_t.addmm_(d_gates[rows].view(size, 4 * hidden)[:, : 3 * hidden], w_rotated)

    wanted = (needs[0], needs[2], needs[3], needs[4] and b_ih is not None, needs[5] and b_hh is not None)
    dx, *weights = _parameter_gradients(d_gates.flatten(1), x, h_before, w_ih, wanted)
    return dx, g if needs[1] else None, *weights


def gru_layer_gradients(
    grad_out: Tensor | None,
    grad_hn: Tensor | None,
    x: Tensor,
    h0: Tensor,
    out: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    reverse: bool = False,
    *,
    sizes: Sequence[int],
    needs: Sequence[bool] = (True,) * 6,
) -> tuple[Tensor | None, ...]:
    """:func:`gru_layer_backward` for derivatives of any order: nothing is written in place, gates are made from ``out``.

    ``out`` has to come as a function of the other arguments, with its own derivatives: it is no variable of its own.
    """
    hidden = h0.shape[1]
    h_before = _states_before(out, h0, sizes, reverse)
    r, z, n, hn = _gates(linear(x, w_ih, b_ih), linear(h_before, w_hh, b_hh))
    derivatives = _gate_derivatives(r, z, n, hn, h_before).split(list(sizes))
    w_rotated = _rotate(w_hh)

    arriving = None if grad_out is None else grad_out.split(list(sizes))
    z = z.split(list(sizes))
    last = torch.zeros_like(h0) if grad_hn is None else grad_hn
    d_gates = list(derivatives)
    begun: list[Tensor] = []  # gradients of the rows of h0 whose sequences are done, the shortest sequence first
    g = last[:0]
    for t in range(len(sizes)) if reverse else reversed(range(len(sizes))):
        active, size = g.shape[0], sizes[t]
        if size > active:
            g = torch.cat((g, last[active:size]))
        elif size < active:
            begun.append(g[size:])
            g = g[:size]
        if arriving is not None:
            g = g + arriving[t]
        d_gates[t] = (derivatives[t] * g.unsqueeze(1)).reshape(size, 4 * hidden)
        g = torch.addmm(g * z[t], d_gates[t][:, : 3 * hidden], w_rotated)

    wanted = (needs[0], needs[2], needs[3], needs[4] and b_ih is not None, needs[5] and b_hh is not None)
    dx, *weights = _parameter_gradients(torch.cat(d_gates), x, h_before, w_ih, wanted)
    return dx, torch.cat((g, *begun[::-1])) if needs[1] else None, *weights
