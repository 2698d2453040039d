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

Functions take any floating dtype.  They are the float64 reference of the tests and the backward of the ops on a CPU, so the
backward of a layer does only the unavoidable inside its loop over time: one matrix product and three pointwise operations.

Sizes: T steps, B batch, I inputs, H units, L layers, D directions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["gru", "gru_cell", "gru_cell_backward", "gru_layer", "gru_layer_backward", "gru_layer_saving"]


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
) -> tuple[Tensor, Tensor]:
    """One direction of one layer over x [T, B, I] from h0 [B, H]: (out [T, B, H], h_n [B, H]).

    ``reverse`` runs from the last step to the first; ``out[t]`` stays the state made at step t.
    """
    steps = x.shape[0]
    gi = linear(x, w_ih, b_ih)
    out = [h0] * steps
    h = h0
    for t in reversed(range(steps)) if reverse else range(steps):
        _, z, n, _ = _gates(gi[t], linear(h, w_hh, b_hh))
        out[t] = h = n + z * (h - n)
    return torch.stack(out), h


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
) -> None:
    """:func:`gru_layer` for training: fills out [T, B, H] and gates [T, B, 4, H] = (r, z, n, hn), what the backward needs.

    Seven operations a step, all into memory that exists.  Not differentiable.
    """
    hidden = h0.shape[1]
    gi = linear(x, w_ih, b_ih)
    w_hh = w_hh.t()
    steps = range(x.shape[0])
    h = h0
    for t in reversed(steps) if reverse else steps:
        gh = h @ w_hh if b_hh is None else torch.addmm(b_hh, h, w_hh)
        r, z, n, hn = gates[t].unbind(1)
        torch.add(gi[t, :, : 2 * hidden], gh[:, : 2 * hidden], out=gates[t, :, :2].flatten(1)).sigmoid_()
        hn.copy_(gh[:, 2 * hidden :])
        torch.addcmul(gi[t, :, 2 * hidden :], r, hn, out=n).tanh_()
        h = torch.lerp(n, h, z, out=out[t])


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
    h_before = torch.cat((out[1:], h0[None])) if reverse else torch.cat((h0[None], out[:-1]))
    if gates is None:
        r, z, n, hn = _gates(linear(x, w_ih, b_ih), linear(h_before, w_hh, b_hh))
    else:
        r, z, n, hn = gates.unbind(2)
    d_gates = _gate_derivatives(r, z, n, hn, h_before)  # [T, B, 4, H], made gate gradients step by step
    w_rotated = _rotate(w_hh)

    g = torch.zeros_like(h0) if grad_hn is None else grad_hn.clone()
    for t in range(steps) if reverse else reversed(range(steps)):
        if grad_out is not None:
            g += grad_out[t]
        d_gates[t] *= g.unsqueeze(1)
        g *= z[t]
        g.addmm_(d_gates[t].view(batch, 4 * hidden)[:, : 3 * hidden], w_rotated)

    wanted = (needs[0], needs[2], needs[3], needs[4] and b_ih is not None, needs[5] and b_hh is not None)
    dx, *weights = _parameter_gradients(
        d_gates.view(steps * batch, 4 * hidden), x.flatten(0, 1), h_before.flatten(0, 1), w_ih, wanted
    )
    return dx.view_as(x) if dx is not None else None, g if needs[1] else None, *weights


def gru(
    x: Tensor,
    hx: Tensor,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    dropout_masks: Tensor | None = None,
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
            out, final = gru_layer(x, hx[i], *_quartet(params[i * count : (i + 1) * count]), reverse=direction == 1)
            outs.append(out)
            finals.append(final)
        x = torch.cat(outs, -1)
        if dropout_masks is not None and layer < num_layers - 1:
            x = x * dropout_masks[layer]
    return x, torch.stack(finals)


def _quartet(params: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """w_ih, w_hh, b_ih, b_hh with None for absent biases."""
    return tuple(params) if len(params) == 4 else (*params, None, None)
