"""The backward of whole sequences in one launch: what leads from the gradients of outputs to those of the gates.

Products over all time steps (gradients of weights and inputs) are the caller's.  As in `whole_path`, what follows from sizes
alone is made once.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from operator import or_
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from torch_gru_fuse.kernels import launch, prepare
from torch_gru_fuse.ops import timeouts
from torch_gru_fuse.ops.call import GRUCall, PackedCall, PairCall
from torch_gru_fuse.ops.whole_path import aligned, kernel_named, op_of, sizes_of, type_of_keep
from torch_gru_fuse.planner.whole_sequence import WholeSequencePlan


@dataclass(frozen=True, slots=True)
class _Recipe:
    """What all launches with the same sizes have in common.

    fill_grid: None where nobody waits for what another makes.
    """

    fill_grid: tuple[int, int, int] | None
    kernel_grid: tuple[int, int, int]
    run_fill: launch.Launcher
    run_kernel: launch.Launcher
    word: int
    launch_id: int


_recipes: dict[tuple, _Recipe] = {}


def _recipe(
    call: GRUCall | PackedCall | PairCall, whole: WholeSequencePlan, has_dy: bool, has_dhn: bool, masked: bool
) -> _Recipe:
    x, packed = call.input, isinstance(call, PackedCall)
    key = (
        "packed" if packed else call.T, call.hx.shape, x.dtype, x.get_device(), id(whole), call.bidirectional, has_dy,
        has_dhn, masked, call.pair, type_of_keep(call), timeouts.timeout_ns(),
    )  # fmt: skip
    found = _recipes.get(key)
    if found is None:
        if len(_recipes) >= 4096:
            _recipes.clear()
        found = _recipes[key] = _make_recipe(call, whole, has_dy, has_dhn, masked)
        launch.load_ahead([found.run_kernel], call.hx.get_device())  # while the launch before it is seen to
    if packed and found.fill_grid is not None:  # of which there are others in every call
        found = replace(found, fill_grid=_fill_grid(call, whole))
    return found


def _fill_steps(call: GRUCall | PackedCall, whole: WholeSequencePlan) -> dict[str, int]:
    """d_gates of the lanes of a launch as one sequence."""
    if isinstance(call, PackedCall):
        return {"steps": whole.lanes * call.N, "batch": 1}
    return {"steps": whole.lanes * call.T, "batch": call.B}


def _fill_grid(call: GRUCall | PackedCall, whole: WholeSequencePlan) -> tuple[int, int, int]:
    return *prepare.fill_grid(**_fill_steps(call, whole), hidden=4 * call.H), 1, 1


def _programs_b(batch: int, whole: WholeSequencePlan) -> int:
    """Programs along the batch."""
    return -(-batch // (whole.kernel.rows * getattr(whole.kernel, "tiles", 1)))


def _make_recipe(
    call: GRUCall | PackedCall | PairCall, whole: WholeSequencePlan, has_dy: bool, has_dhn: bool, masked: bool
) -> _Recipe:
    B, H, packed = call.B, call.H, isinstance(call, PackedCall)
    dtype, device = call.input.dtype, call.input.get_device()
    lanes, reverse, pair = whole.lanes, call.bidirectional, call.pair
    stack = lanes > 1 and not reverse and pair is None
    kernel, constants_of = kernel_named(f"{whole.kernel.name}_backward")
    timeout = timeouts.timeout_ns()
    types: list[Any] = [
        dtype if has_dy else None, dtype if has_dhn else None, dtype, dtype, dtype, dtype,
        (dtype, lanes - 1 if stack else 1), (dtype, lanes), dtype if masked else None,
        dtype, dtype, torch.float32, torch.int64, torch.int32 if packed else None, type_of_keep(call), None, None,
    ]  # fmt: skip
    described = timeouts.Call(f"{op_of(call)}_backward", sizes_of(call), whole.kernel.name, str(whole), timeout)
    return _Recipe(
        fill_grid=_fill_grid(call, whole) if whole.waits(reverse=not stack) else None,
        kernel_grid=(whole.programs(B, H), 1, 1),
        run_fill=launch.launcher(
            prepare.prepare_kernel, device, prepare.fill_constants(hidden=4 * H),
            [dtype, torch.int32, dtype, dtype, dtype, dtype, torch.int64, None, None, None, None],
        ),
        run_kernel=launch.launcher(
            kernel, device,
            constants_of(whole.kernel, lanes=lanes, hidden=H, reverse=reverse, timeout_ns=timeout, pair=pair), types,
        ),  # fmt: skip
        word=timeouts.word_of(device),
        launch_id=timeouts.id_of(described),
    )  # fmt: skip


def empty_sums(call: GRUCall | PackedCall | PairCall, whole: WholeSequencePlan) -> Tensor:
    """Where the launches of a plan leave the sums of gate gradients: float32 [L*D, programs along the batch, 4, H]."""
    return call.hx.new_empty((call.L * call.D, _programs_b(call.B, whole), 4, call.H), dtype=torch.float32)


def gate_gradients(
    call: GRUCall | PackedCall | PairCall,
    whole: WholeSequencePlan,
    layer: int,
    dy: Tensor | None,
    dhn: Tensor | None,
    out: Tensor,
    layer_outputs: Tensor,
    gates: Tensor,
    d_gates: Tensor,
    grad_hx: Tensor,
    sums: Tensor,
    offsets: Tensor | None = None,
) -> None:
    """Layers from ``layer`` on, as many as a launch of the plan has: fills their part of d_gates, grad_hx and sums.

    Args:
        dy: gradient of what the highest of them puts out, [T, B, D*H], or of a pair [2, T, B, H].
        dhn: gradient of h_n [L*D, B, H], or None.
        out: what the highest of them has put out.
        layer_outputs: of all inner layers, [L-1, T, B, D*H].
        gates: saved, [L, D, T, B, 4, H] = (r, z, n, hn).
        d_gates: [L, D, T, B, 4, H]; becomes the gradients of (hn, r, z, n), before the nonlinearities.
        grad_hx: [L*D, B, H]; becomes the gradient of hx.
        sums: as `empty_sums` makes it; becomes sums of d_gates over steps and the batch rows of a program.
        offsets: of a packed call, in whose tensors [N] takes the place of [T, B].

    Raises:
        launch.DoesNotFit: nothing has been changed then.
    """
    T, B, N, H, lanes = call.T, call.B, call.N, call.H, whole.lanes
    stack = lanes > call.D
    first = layer * call.D
    each = 4 if call.has_biases else 2
    params = call.params[call.places(first, lanes)]
    masks = aligned(call.dropout_masks) if stack and call.dropout_masks is not None else None
    dy = None if dy is None else aligned(dy)
    dhn = None if dhn is None else aligned(dhn)
    recipe = _recipe(call, whole, dy is not None, dhn is not None, masks is not None)
    hx, out, w_hhs = aligned(call.hx), aligned(out), [aligned(w) for w in params[1::each]]
    w_ihs = [aligned(w) for w in params[each::each]] if stack else w_hhs[:1]
    keep = None if call.keep is None else aligned(call.keep)
    error = hx.new_empty(4, dtype=torch.int64)

    itemsize = hx.element_size()
    state = first * B * H * itemsize  # from the beginning of a tensor [L*D, B, H] to these layers
    sequence = first * N * H * itemsize  # and of one [L*D, N, H]
    p_d = d_gates.data_ptr() + 4 * sequence
    p_gates = gates.data_ptr() + 4 * sequence
    p_out, p_hx, p_dhx = out.data_ptr(), hx.data_ptr() + state, grad_hx.data_ptr() + state
    p_below = layer_outputs.data_ptr() + sequence if stack else p_out
    p_dy = None if dy is None else dy.data_ptr()
    p_dhn = None if dhn is None else dhn.data_ptr() + state
    p_masks = None if masks is None else masks.data_ptr() + sequence
    p_sums = sums.data_ptr() + first * sums.stride(0) * 4
    p_w_hh, p_w_ih = tuple(w.data_ptr() for w in w_hhs), tuple(w.data_ptr() for w in w_ihs)
    given = (p_d, p_gates, p_out, p_hx, p_dhx, p_below, p_dy or 0, p_dhn or 0, p_masks or 0, *p_w_hh, *p_w_ih)
    is_aligned = not functools.reduce(or_, given) % 16
    stream = driver.active.get_current_stream(hx.get_device())
    if recipe.fill_grid is not None:  # d_gates as one sequence of 4H units
        values = prepare.fill_arguments(p_d, recipe.word, recipe.launch_id, error.data_ptr(), **_fill_steps(call, whole))
        recipe.run_fill(recipe.fill_grid, stream, values, is_aligned)
    values = (
        p_dy, p_dhn, p_hx, p_out, p_below, p_gates, p_w_ih, p_w_hh, p_masks, p_d, p_dhx, p_sums, error.data_ptr(),
        None if offsets is None else offsets.data_ptr(), None if keep is None else keep.data_ptr(), T, B,
    )  # fmt: skip
    recipe.run_kernel(recipe.kernel_grid, stream, values, is_aligned)
