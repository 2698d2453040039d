"""The backward of whole sequences in one launch: what leads from the gradients of outputs to those of the gates.

Products over all time steps (gradients of weights and inputs) are the caller's.  As in `whole_path`, what follows from sizes
alone is made once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from torch_gru_fuse.kernels import launch, prepare, resident_backward, staged_backward, wavefront_backward
from torch_gru_fuse.ops import timeouts
from torch_gru_fuse.ops.call import GRUCall
from torch_gru_fuse.ops.whole_path import aligned
from torch_gru_fuse.planner.whole_sequence import WholeSequencePlan

# By the name of a plan's kernel: kernel, its constants.
_KERNELS = {
    "resident": (resident_backward.resident_backward_kernel, resident_backward.resident_backward_constants),
    "staged": (staged_backward.staged_backward_kernel, staged_backward.staged_backward_constants),
    "wavefront": (wavefront_backward.wavefront_backward_kernel, wavefront_backward.wavefront_backward_constants),
}


@dataclass(frozen=True, slots=True)
class _Recipe:
    """What all launches with the same sizes have in common.

    programs_b: programs along the batch.  fill_grid: None where nobody waits for what another makes.
    """

    programs_b: int
    fill_grid: tuple[int, int, int] | None
    kernel_grid: tuple[int, int, int]
    run_fill: launch.Launcher
    run_kernel: launch.Launcher
    word: int
    launch_id: int


_recipes: dict[tuple, _Recipe] = {}


def _recipe(call: GRUCall, whole: WholeSequencePlan, has_dy: bool, has_dhn: bool, masked: bool) -> _Recipe:
    x = call.input
    key = (
        x.shape, call.hx.shape, x.dtype, x.get_device(), id(whole), call.bidirectional, has_dy, has_dhn, masked,
        timeouts.timeout_ns(),
    )  # fmt: skip
    found = _recipes.get(key)
    if found is None:
        if len(_recipes) >= 4096:
            _recipes.clear()
        found = _recipes[key] = _make_recipe(call, whole, has_dy, has_dhn, masked)
    return found


def _make_recipe(call: GRUCall, whole: WholeSequencePlan, has_dy: bool, has_dhn: bool, masked: bool) -> _Recipe:
    T, B, H = call.T, call.B, call.H
    dtype, device = call.input.dtype, call.input.get_device()
    lanes, reverse = whole.lanes, call.bidirectional
    stack = lanes > 1 and not reverse
    kernel, constants_of = _KERNELS[whole.kernel.name]
    timeout = timeouts.timeout_ns()
    types: list[Any] = [
        dtype if has_dy else None, dtype if has_dhn else None, dtype, dtype, dtype, dtype,
        (dtype, lanes - 1 if stack else 1), (dtype, lanes), dtype if masked else None,
        dtype, dtype, torch.float32, torch.int64, None, None,
    ]  # fmt: skip
    described = timeouts.Call(
        "gru_backward",
        f"T={T}, B={B}, H={H}, num_layers={call.L}, bidirectional={reverse}, {str(dtype).removeprefix('torch.')}",
        whole.kernel.name, str(whole), timeout,
    )  # fmt: skip
    return _Recipe(
        programs_b=-(-B // (whole.kernel.rows * getattr(whole.kernel, "tiles", 1))),
        fill_grid=(*prepare.fill_grid(steps=lanes * T, batch=B, hidden=4 * H), 1, 1) if whole.waits(reverse=reverse) else None,
        kernel_grid=(whole.programs(B, H), 1, 1),
        run_fill=launch.launcher(
            prepare.prepare_kernel, device, prepare.fill_constants(hidden=4 * H),
            [dtype, torch.int32, dtype, dtype, dtype, dtype, torch.int64, None, None, None],
        ),
        run_kernel=launch.launcher(
            kernel, device, constants_of(whole.kernel, lanes=lanes, hidden=H, reverse=reverse, timeout_ns=timeout), types
        ),
        word=timeouts.word_of(device),
        launch_id=timeouts.id_of(described),
    )  # fmt: skip


def gate_gradients(
    call: GRUCall,
    whole: WholeSequencePlan,
    layer: int,
    dy: Tensor | None,
    dhn: Tensor | None,
    out: Tensor,
    layer_outputs: Tensor,
    gates: Tensor,
    d_gates: Tensor,
    grad_hx: Tensor,
) -> Tensor:
    """Layers from ``layer`` on, as many as a launch of the plan has: fills their part of d_gates and grad_hx.

    Args:
        dy: gradient of what the highest of them puts out, [T, B, D*H].
        dhn: gradient of h_n [L*D, B, H], or None.
        out: what the highest of them has put out.
        layer_outputs: of all inner layers, [L-1, T, B, D*H].
        gates: saved, [L, D, T, B, 4, H] = (r, z, n, hn).
        d_gates: [L, D, T, B, 4, H]; becomes the gradients of (hn, r, z, n), before the nonlinearities.
        grad_hx: [L*D, B, H]; becomes the gradient of hx.

    Returns:
        Sums of d_gates over steps and batch, float32 [lanes, 4, H].

    Raises:
        launch.DoesNotFit: nothing has been changed then.
    """
    lanes, D = whole.lanes, call.D
    layers = lanes // D
    states = call.states(layer, layers)
    stack = layers > 1
    masks = aligned(call.dropout_masks) if stack and call.dropout_masks is not None else None
    dy = None if dy is None else aligned(dy)
    dhn = None if dhn is None else aligned(dhn[states])
    recipe = _recipe(call, whole, dy is not None, dhn is not None, masks is not None)
    hx, out = aligned(call.hx[states]), aligned(out)
    d = d_gates[layer : layer + layers]
    each = 4 if call.has_biases else 2
    params = [aligned(p) for p in call.params[call.places(states.start, lanes)]]
    w_hh = tuple(p.data_ptr() for p in params[1::each])
    w_ih = tuple(p.data_ptr() for p in params[::each][1:]) if stack else w_hh[:1]
    sums = hx.new_empty(lanes, recipe.programs_b, 4, call.H, dtype=torch.float32)
    error = hx.new_empty(4, dtype=torch.int64)
    address = d.data_ptr()
    out_address, hx_address, dhx_address = out.data_ptr(), hx.data_ptr(), grad_hx[states].data_ptr()
    below = layer_outputs[layer].data_ptr() if stack else out_address
    saved = gates[layer].data_ptr()
    pointers = [address, out_address, hx_address, dhx_address, below, saved, *w_hh, *w_ih]
    pointers += [t.data_ptr() for t in (dy, dhn, masks) if t is not None]
    bits = 0
    for pointer in pointers:
        bits |= pointer
    is_aligned = not bits % 16
    stream = driver.active.get_current_stream(hx.get_device())
    if recipe.fill_grid is not None:  # d_gates as one sequence of lanes * T steps of 4H units
        values = prepare.fill_arguments(
            address, recipe.word, recipe.launch_id, error.data_ptr(), steps=lanes * call.T, batch=call.B
        )
        recipe.run_fill(recipe.fill_grid, stream, values, is_aligned)
    values = (
        None if dy is None else dy.data_ptr(), None if dhn is None else dhn.data_ptr(), hx_address, out_address, below, saved,
        w_ih, w_hh, None if masks is None else masks[layer].data_ptr(),
        address, dhx_address, sums.data_ptr(), error.data_ptr(), call.T, call.B,
    )  # fmt: skip
    recipe.run_kernel(recipe.kernel_grid, stream, values, is_aligned)
    return sums.sum(1)
