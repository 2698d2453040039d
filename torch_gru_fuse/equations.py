"""The GRU in plain PyTorch: what every kernel of this package must compute.

The cell is the variant of Cho et al. (2014, arXiv:1406.1078) that ``torch.nn.GRU`` and cuDNN use: the reset gate acts on
the hidden projection *with* its bias.  Weights stack the gates in the order r, z, n::

    r  = sigmoid(W_ir x + b_ir + W_hr h + b_hr)
    z  = sigmoid(W_iz x + b_iz + W_hz h + b_hz)
    hn = W_hn h + b_hn
    n  = tanh(W_in x + b_in + r * hn)
    h' = n + z * (h - n)                                    # = (1 - z) * n + z * h

Its derivatives, for g = dL/dh' (``d_a`` is the gradient of gate a's pre-activation)::

    d_n  = g * (1 - z) * (1 - n^2)                          # also the gradient of W_in x + b_in
    d_hn = d_n * r
    d_r  = d_n * hn * r * (1 - r)
    d_z  = g * (h - n) * z * (1 - z)
    dL/dh = g * z + W_hr^T d_r + W_hz^T d_z + W_hn^T d_hn
    dL/dx =         W_ir^T d_r + W_iz^T d_z + W_in^T d_n

The four gate gradients are kept side by side in the order (hn, r, z, n), here and in the kernels.  The last three are then
the gradient of the whole input projection and the first three that of the hidden projection, its gates rotated to
(n, r, z): each is one strided matrix, and no gate gradient is stored twice.

A state may be reset between steps: with ``keep`` [T, B] the state h before step t (before it in the order in which a direction
runs) is ``kept(h, keep[t])`` in all of the above, a sequence that goes on where keep is 1 and starts anew where it is 0.  The
gradient that leaves a step goes the same way.

Functions take any floating dtype.  They are the float64 reference of the tests and the backward of the ops on a CPU, so the
backward of a layer does only the unavoidable inside its loop over time: one matrix product and three pointwise operations.

Sizes: T steps, B batch, I inputs, H units, L layers, D directions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

__all__ = [
    "gru",
    "gru_cell",
    "gru_cell_backward",
    "gru_layer",
    "gru_layer_backward",
    "gru_layer_gradients",
    "gru_layer_saving",
    "gru_layer_tangents",
    "kept",
]


def _gates(gi: Tensor, gh: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """r, z, n and hn from both projections [..., 3H], biases included."""
    i_r, i_z, i_n = gi.chunk(3, -1)
    h_r, h_z, hn = gh.chunk(3, -1)
    r = torch.sigmoid(i_r + h_r)
    z = torch.sigmoid(i_z + h_z)
    return r, z, torch.tanh(i_n + r * hn), hn


def _gate_derivatives(r: Tensor, z: Tensor, n: Tensor, hn: Tensor, h: Tensor) -> Tensor:
    """d(pre-activation)/dh', elementwise, [..., 4, H] in the order (hn, r, z, n)."""
    d_n = (1 - z) * (1 - n * n)
    return torch.stack((d_n * r, d_n * hn * r * (1 - r), (h - n) * z * (1 - z), d_n), -2)


def kept(h: Tensor, keep: Tensor | None) -> Tensor:
    """A state, or its gradient or tangent, [..., H] after a reset: h * keep for each row, keep [...] of the dtype of h.

    A bool keep selects: where it is False the result is zero whatever h holds, NaN included.  None: there is no reset.
    """
    if keep is None:
        return h
    keep = keep.unsqueeze(-1)
    return torch.where(keep, h, 0) if keep.dtype == torch.bool else h * keep


def _keep_of_steps(keep: Tensor | None, steps: int) -> Sequence[Tensor | None]:
    return [None] * steps if keep is None else keep.unbind(0)


def _states_before(h0: Tensor, out: Tensor, keep: Tensor | None, reverse: bool) -> Tensor:
    """The state [T, B, H] that every step starts from."""
    return kept(torch.cat((out[1:], h0[None])) if reverse else torch.cat((h0[None], out[:-1])), keep)


def _rotate(w_hh: Tensor) -> Tensor:
    """Rows of the gates (r, z, n) in the order (n, r, z)."""
    return w_hh.roll(w_hh.shape[0] // 3, 0)


def _unrotate(d_hh: Tensor) -> Tensor:
    """Rows of the gates (n, r, z) in the order (r, z, n)."""
    return d_hh.roll(-(d_hh.shape[0] // 3), 0)


def _parameter_gradients(
    d_gates: Tensor, x: Tensor, h: Tensor, w_ih: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """(dx, dw_ih, dw_hh, db_ih, db_hh) where needed, one matrix product each: d_gates [N, 4H], x [N, I], h [N, H]."""
    hidden = h.shape[1]
    d_hh, d_ih = d_gates[:, : 3 * hidden], d_gates[:, hidden:]
    return (
        d_ih @ w_ih if needs[0] else None,
        d_ih.T @ x if needs[1] else None,
        _unrotate(d_hh.T @ h) if needs[2] else None,
        d_ih.sum(0) if needs[3] else None,
        _unrotate(d_hh.sum(0)) if needs[4] else None,
    )


def gru_cell(
    x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """h' [B, H] from x [B, I], h [B, H], w_ih [3H, I], w_hh [3H, H] and biases [3H]: ``torch.gru_cell``."""
    _, z, n, _ = _gates(linear(x, w_ih, b_ih), linear(h, w_hh, b_hh))
    return n + z * (h - n)


def gru_cell_backward(
    grad_h: Tensor,
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """(dx, dh, dw_ih, dw_hh, db_ih, db_hh) of :func:`gru_cell` for grad_h [B, H]; None for an absent bias."""
    r, z, n, hn = _gates(linear(x, w_ih, b_ih), linear(h, w_hh, b_hh))
    d_gates = (_gate_derivatives(r, z, n, hn, h) * grad_h.unsqueeze(-2)).flatten(-2)
    dh = torch.addmm(grad_h * z, d_gates[:, : w_hh.shape[0]], _rotate(w_hh))
    needs = (True, True, True, b_ih is not None, b_hh is not None)
    dx, *weights = _parameter_gradients(d_gates, x, h, w_ih, needs)
    return dx, dh, *weights


def gru_layer(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    reverse: bool = False,
    *,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One direction of one layer over x [T, B, I] from h0 [B, H]: (out [T, B, H], h_n [B, H]).

    ``reverse`` runs from the last step to the first; ``out[t]`` stays the state made at step t.
    """
    steps = x.shape[0]
    gi = linear(x, w_ih, b_ih)
    out = [h0] * steps
    keep = _keep_of_steps(keep, steps)
    h = h0
    for t in reversed(range(steps)) if reverse else range(steps):
        h = kept(h, keep[t])
        _, z, n, _ = _gates(gi[t], linear(h, w_hh, b_hh))
        out[t] = h = n + z * (h - n)
    return torch.stack(out), h


def _step_saving(
    gi: Tensor, h: Tensor, w_hh_t: Tensor, b_hh: Tensor | None, out: Tensor, gates: Tensor
) -> Tensor:
    """One step from gi [B, 3H] and h [B, H]: fills out [B, H], which is returned, and gates [B, 4, H] = (r, z, n, hn).

    w_hh_t: W_hh^T, [H, 3H].  Seven operations, all into memory that exists.
    """
    hidden = h.shape[1]
    gh = h @ w_hh_t if b_hh is None else torch.addmm(b_hh, h, w_hh_t)
    r, z, n, hn = gates.unbind(1)
    torch.add(gi[:, : 2 * hidden], gh[:, : 2 * hidden], out=gates[:, :2].flatten(1)).sigmoid_()
    hn.copy_(gh[:, 2 * hidden :])
    torch.addcmul(gi[:, 2 * hidden :], r, hn, out=n).tanh_()
    return torch.lerp(n, h, z, out=out)


def gru_layer_saving(
    x: Tensor,
    h0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    out: Tensor,
    gates: Tensor,
    reverse: bool = False,
    *,
    keep: Tensor | None = None,
) -> None:
    """:func:`gru_layer` for training: fills out [T, B, H] and gates [T, B, 4, H] = (r, z, n, hn), what the backward needs.

    Not differentiable.
    """
    gi = linear(x, w_ih, b_ih)
    w_hh = w_hh.t()
    steps = range(x.shape[0])
    keep = _keep_of_steps(keep, x.shape[0])
    h = h0
    for t in reversed(steps) if reverse else steps:
        h = _step_saving(gi[t], kept(h, keep[t]), w_hh, b_hh, out[t], gates[t])


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
    gates: Tensor | None = None,
    needs: Sequence[bool] = (True,) * 6,
    keep: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """(dx, dh0, dw_ih, dw_hh, db_ih, db_hh) of :func:`gru_layer`, for T >= 1.

    grad_out [T, B, H] and grad_hn [B, H] may be None (zero).  ``needs`` says, in the order of the result, which gradients
    are wanted; the others, and those of absent biases, are None.

    ``gates`` [T, B, 4, H] are those of :func:`gru_layer_saving`.  Without them, since ``out`` holds every state, the gates of
    all steps are recomputed at once.  Their derivatives do not depend on the gradient that arrives: what is left for the
    loop over time is g -> (d_gates = derivative * g, next g).  The gradients of input, weights and biases are then one
    matrix product, or one sum, over all steps.
    """
    steps, batch, hidden = out.shape
    h_before = _states_before(h0, out, keep, reverse)
    if gates is None:
        r, z, n, hn = _gates(linear(x, w_ih, b_ih), linear(h_before, w_hh, b_hh))
    else:
        r, z, n, hn = gates.unbind(2)
    d_gates = _gate_derivatives(r, z, n, hn, h_before)  # [T, B, 4, H], made gate gradients step by step
    w_rotated = _rotate(w_hh)
    keep = _keep_of_steps(keep, steps)

    g = torch.zeros_like(h0) if grad_hn is None else grad_hn.clone()
    for t in range(steps) if reverse else reversed(range(steps)):
        if grad_out is not None:
            g += grad_out[t]
        d_gates[t] *= g.unsqueeze(1)
        g *= z[t]
        g.addmm_(d_gates[t].view(batch, 4 * hidden)[:, : 3 * hidden], w_rotated)
        g = kept(g, keep[t])

    wanted = (needs[0], needs[2], needs[3], needs[4] and b_ih is not None, needs[5] and b_hh is not None)
    dx, *weights = _parameter_gradients(
        d_gates.view(steps * batch, 4 * hidden), x.flatten(0, 1), h_before.flatten(0, 1), w_ih, wanted
    )
    return dx.view_as(x) if dx is not None else None, g if needs[1] else None, *weights


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
    needs: Sequence[bool] = (True,) * 6,
    keep: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """:func:`gru_layer_backward` for derivatives of any order: nothing is written in place.

    ``out`` has to come as a function of the other arguments, with its own derivatives: it is no variable of its own.
    """
    steps, batch, hidden = out.shape
    h_before, z, derivatives = _derivatives(x, h0, out, w_ih, w_hh, b_ih, b_hh, reverse, keep)
    w_rotated = _rotate(w_hh)
    keep = _keep_of_steps(keep, steps)

    # unbind: the gradient of a step picked by an index would be as large as all steps
    arriving = None if grad_out is None else grad_out.unbind(0)
    z, derivatives = z.unbind(0), derivatives.unbind(0)
    g = torch.zeros_like(h0) if grad_hn is None else grad_hn
    d_gates = [g] * steps
    for t in range(steps) if reverse else reversed(range(steps)):
        if arriving is not None:
            g = g + arriving[t]
        d_gates[t] = (derivatives[t] * g.unsqueeze(1)).reshape(batch, 4 * hidden)
        g = kept(torch.addmm(g * z[t], d_gates[t][:, : 3 * hidden], w_rotated), keep[t])

    wanted = (needs[0], needs[2], needs[3], needs[4] and b_ih is not None, needs[5] and b_hh is not None)
    dx, *weights = _parameter_gradients(torch.cat(d_gates), x.flatten(0, 1), h_before.flatten(0, 1), w_ih, wanted)
    return dx.view_as(x) if dx is not None else None, g if needs[1] else None, *weights


def gru_layer_tangents(
    tangents: Sequence[Tensor | None],
    x: Tensor,
    h0: Tensor,
    out: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    reverse: bool = False,
    *,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """How (out, h_n) of :func:`gru_layer` move with its arguments: their tangents [T, B, H] and [B, H].

    ``tangents`` of x, h0, w_ih, w_hh, b_ih, b_hh; None is zero.  This is the transpose of :func:`gru_layer_gradients`, with
    the same derivatives of the gates D (order hn, r, z, n).  For the tangents i of the input projection and k of the hidden
    projection with its states held fixed, made for all steps at once,

        dh' = D_n i_n + D_r (i_r + k_r + W_hr dh) + D_z (i_z + k_z + W_hz dh) + D_hn (k_n + W_hn dh) + z dh

    so one matrix product and three pointwise operations are left for the loop over time.  Differentiable, as above.
    """
    dx, dh, dw_ih, dw_hh, db_ih, db_hh = tangents
    steps, batch, hidden = out.shape
    h_before, z, derivatives = _derivatives(x, h0, out, w_ih, w_hh, b_ih, b_hh, reverse, keep)
    by_input, by_hidden = derivatives[..., 1:, :], derivatives[..., :3, :]
    moved = torch.zeros_like(out)  # the part of dh' that does not come from dh
    for derivative, projection in (
        (by_input, None if dx is None else linear(dx, w_ih)),
        (by_input, None if dw_ih is None else linear(x, dw_ih)),
        (by_input, db_ih),
        (by_hidden, None if dw_hh is None else linear(h_before, _rotate(dw_hh))),
        (by_hidden, None if db_hh is None else _rotate(db_hh)),
    ):
        if projection is not None:
            moved = moved + (derivative * projection.reshape(*projection.shape[:-1], 3, hidden)).sum(-2)

    w_rotated = _rotate(w_hh)
    dh = torch.zeros_like(h0) if dh is None else dh
    moved, z, by_hidden = moved.unbind(0), z.unbind(0), by_hidden.unbind(0)
    keep = _keep_of_steps(keep, steps)
    d_out = [dh] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        dh = kept(dh, keep[t])
        from_state = (by_hidden[t] * linear(dh, w_rotated).reshape(batch, 3, hidden)).sum(-2)
        d_out[t] = dh = torch.addcmul(moved[t] + from_state, z[t], dh)
    return torch.stack(d_out), dh


def _derivatives(
    x: Tensor, h0: Tensor, out: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, reverse: bool,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of all steps at once: the state before [T, B, H], z [T, B, H] and the derivatives of the gates [T, B, 4, H]."""
    h_before = _states_before(h0, out, keep, reverse)
    r, z, n, hn = _gates(linear(x, w_ih, b_ih), linear(h_before, w_hh, b_hh))
    return h_before, z, _gate_derivatives(r, z, n, hn, h_before)


def gru(
    x: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    dropout_masks: Tensor | None = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The stack of ``torch.gru``, time-major: x [T, B, I], hx [L*D, B, H] -> (output [T, B, D*H], h_n [L*D, B, H]).

    ``params`` holds w_ih, w_hh and, if ``has_biases``, b_ih, b_hh of each layer and direction, in torch's order.
    ``dropout_masks`` [L-1, T, B, D*H], scale included, multiply what each layer hands to the next.
    """
    directions = 2 if bidirectional else 1
    count = 4 if has_biases else 2
    finals = []
    for layer in range(num_layers):
        outs = []
        for direction in range(directions):
            i = layer * directions + direction
            out, final = gru_layer(
                x, hx[i], *_quartet(params[i * count : (i + 1) * count]), reverse=direction == 1, keep=keep
            )
            outs.append(out)
            finals.append(final)
        x = torch.cat(outs, -1)
        if dropout_masks is not None and layer < num_layers - 1:
            x = x * dropout_masks[layer]
    return x, torch.stack(finals)


def _quartet(params: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """w_ih, w_hh, b_ih, b_hh with None for absent biases."""
    return tuple(params) if len(params) == 4 else (*params, None, None)
