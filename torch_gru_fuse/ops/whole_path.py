"""Whole sequences in one launch behind the sequence op.

A launch is three things: the product that makes the input projection, ``prepare``, and the kernel of the plan.  All that
follows from sizes alone is made once (`_Recipe`), so a call only allocates and gathers addresses.  Where H is no multiple
of 16 the parameters are padded with zeros in each call, and results are cut out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import or_
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from triton.runtime import driver

from torch_gru_fuse import torch_hooks
from torch_gru_fuse.kernels import launch, prepare, resident, staged, wavefront
from torch_gru_fuse.ops import timeouts
from torch_gru_fuse.ops.call import GRUCall, PackedCall
from torch_gru_fuse.planner.plan import Plan
from torch_gru_fuse.planner.whole_sequence import ResidentPlan, StagedPlan, WholeSequencePlan

# By the name of a plan's kernel: kernel, its constants.
_KERNELS = {
    "resident": (resident.resident_kernel, resident.resident_constants),
    "staged": (staged.staged_kernel, staged.staged_constants),
    "wavefront": (wavefront.wavefront_kernel, wavefront.wavefront_constants),
}

#: For tests: so many programs of each launch are never started, and others wait for them.
missing_programs = 0


@dataclass(frozen=True, slots=True)
class _Recipe:
    """What all launches of calls with the same sizes have in common.

    Attributes:
        whole: the plan.
        steps, batch, rows: T, B and N.
        lanes: of a launch.
        each: parameters of a lane.
        stack: whether a lane is the input of the next.
        hidden: H rounded up to a multiple of 16.
        size_each: bytes of an element.
        state_bytes: of an initial state as the kernel wants it, 0 where it takes the caller's.
        below_bytes: of the sequences of all lanes but the highest.
        ring_rows: of the ring in which states cross, B where there is none.
        ring_bytes: of it, 0 where there is none.
        handed_bytes: of the same after dropout, if there is any.
        run_prepare, run_kernel: to be called with addresses.
        word, launch_id: for the error block.
    """

    whole: WholeSequencePlan
    device: int
    steps: int
    batch: int
    rows: int
    lanes: int
    each: int
    stack: bool
    hidden: int
    size_each: int
    state_bytes: int
    below_bytes: int
    ring_rows: int
    ring_bytes: int
    handed_bytes: int
    prepare_grid: tuple[int, int, int] | None  # None: nothing to prepare
    prepare_grid_of: Callable[..., tuple[int]]
    kernel_grid: tuple[int, int, int]
    run_prepare: launch.Launcher
    run_kernel: launch.Launcher
    word: int
    launch_id: int

    def workspace_bytes(self, *, below: bool) -> int:
        """Of an error block, prepared states and sequences that are handed on; 0 where nobody waits for anybody.

        below: the sequences of all lanes but the highest have no other place.
        """
        if self.prepare_grid is None:
            return 0
        return _ERROR_BYTES + self.state_bytes + self.ring_bytes + (self.below_bytes if below else 0) + self.handed_bytes

    def of_rows(self, rows: int) -> _Recipe:
        """The same for packed sequences of so many rows."""
        if rows == self.rows:
            return self
        below_bytes = self.below_bytes // self.rows * rows
        grid = self.prepare_grid and (*self.prepare_grid_of(steps=rows), 1, 1)
        return replace(
            self, rows=rows, below_bytes=below_bytes, handed_bytes=below_bytes if self.handed_bytes else 0, prepare_grid=grid
        )

    def launch(
        self, gi: int, hx: int, params: Sequence[int], out: int, h_n: int, workspace: int,
        gates: int | None = None, below: int | None = None, masks: int | None = None, offsets: int | None = None,
    ) -> None:  # fmt: skip
        """Prepares and runs, at these addresses.

        params: of each lane w_ih, w_hh and, with biases, b_ih, b_hh.  gates: None: are not saved.  below: None: in the
        workspace.  masks: of a stack with dropout, else None.  offsets: of packed sequences, else None.
        """
        each, T, B = self.each, self.steps, self.batch
        h0 = workspace + _ERROR_BYTES
        end = h0 + self.state_bytes
        if gates is None:
            gates = out
        if self.ring_bytes:
            below = end
            end += self.ring_bytes
        elif not self.below_bytes:
            below = out
        elif below is None:
            below = end
            end += self.below_bytes
        handed = end if self.handed_bytes else None
        aligned = not functools.reduce(or_, params, hx | h_n | gates | out | (masks or 0)) % 16
        params = tuple(params)
        w_hh = params[1::each]
        w_above = params[each::each] if self.stack else w_hh[:1]
        b_ih, b_hh = (params[2::4], params[3::4]) if each == 4 else (None, None)
        stream = driver.active.get_current_stream(self.device)
        if self.prepare_grid is not None:
            steps = T if offsets is None else self.rows
            for sequences in (below,) if handed is None else (below, handed):
                values = (hx, self.word, out, sequences, h0, h_n, workspace, self.launch_id, steps, B, self.ring_rows)
                self.run_prepare(self.prepare_grid, stream, values, aligned)
        values = (
            gi, h0 if self.state_bytes else hx, below, w_above, w_hh, b_ih, b_hh, masks, handed, out, h_n, gates, workspace,
            offsets, T, B,
        )  # fmt: skip
        self.run_kernel(self.kernel_grid, stream, values, aligned)


_ERROR_BYTES = 64  # of the error block, rounded up so that what follows is aligned
_recipes: dict[tuple, _Recipe] = {}


def recipe_of(call: GRUCall | PackedCall, whole: WholeSequencePlan, save: bool) -> _Recipe:
    x, packed = call.input, isinstance(call, PackedCall)
    # The plan stands for itself: it is kept below, so no other has its id, and hashing it takes longer than all the rest.
    key = (
        packed, call.T, x.shape[-1], call.hx.shape, x.dtype, x.get_device(), id(whole), call.bidirectional, call.has_biases,
        save, call.dropout_masks is None, timeouts.timeout_ns(), missing_programs,
    )  # fmt: skip
    found = _recipes.get(key)
    if found is None:
        if len(_recipes) >= 4096:
            _recipes.clear()
        found = _recipes[key] = _make_recipe(call, whole, save)
    return found.of_rows(call.N) if packed else found  # of which there are others in every call


def _make_recipe(call: GRUCall | PackedCall, whole: WholeSequencePlan, save: bool) -> _Recipe:
    T, B, N, I, H, packed = call.T, call.B, call.N, call.input.shape[-1], call.H, isinstance(call, PackedCall)
    dtype, device = call.input.dtype, call.input.get_device()
    lanes, padded, reverse = whole.lanes, -(-H // 16) * 16, call.bidirectional
    stack = lanes > 1 and not reverse
    kernel, constants_of = _KERNELS[whole.kernel.name]
    timeout = timeouts.timeout_ns()
    # resident takes hx itself, and nobody but the lane above polls its sequences
    polls_own = not isinstance(whole.kernel, ResidentPlan)
    ring = isinstance(whole.kernel, StagedPlan) and whole.kernel.ring
    sizes: dict[str, Any] = dict(
        lanes=lanes, hidden=padded, reverse=reverse, fill_out=polls_own and not ring, states=polls_own, ring=ring,
        packed=packed,
    )  # fmt: skip
    rows = whole.kernel.ring_rows(B) if ring else B
    n_biases = (dtype, lanes) if call.has_biases else None
    below_bytes = (lanes - 1) * N * padded * dtype.itemsize if stack else 0
    masked = stack and call.dropout_masks is not None
    masks = dtype if masked else None
    types = [
        dtype, dtype, dtype, (dtype, max(1, lanes - 1) if stack else 1), (dtype, lanes), n_biases, n_biases, masks, masks,
        dtype, dtype, dtype, torch.int64, torch.int32 if packed else None, None, None,
    ]  # fmt: skip
    prepare_types = [dtype, torch.int32, dtype, dtype, dtype, dtype, torch.int64, None, None, None, None]
    described = timeouts.Call(
        "gru_packed" if packed else "gru",
        f"T={T}, B={B}, I={I}, H={H}, num_layers={call.L}, bidirectional={reverse}, {str(dtype).removeprefix('torch.')}",
        whole.kernel.name, str(whole), timeout,
    )  # fmt: skip
    grid = whole.programs(B, H) - missing_programs
    prepare_grid_of = functools.partial(prepare.prepare_grid, batch=B, rows=rows, **sizes)
    return _Recipe(
        whole=whole,
        device=device,
        steps=T,
        batch=B,
        rows=N,
        lanes=lanes,
        each=4 if call.has_biases else 2,
        stack=stack,
        hidden=padded,
        size_each=dtype.itemsize,
        state_bytes=lanes * B * padded * dtype.itemsize if polls_own else 0,
        below_bytes=below_bytes,
        ring_rows=rows,
        ring_bytes=2 * lanes * rows * padded * 4 if ring else 0,
        handed_bytes=below_bytes if masked else 0,
        prepare_grid=(*prepare_grid_of(steps=N if packed else T), 1, 1) if polls_own or stack else None,
        prepare_grid_of=prepare_grid_of,
        kernel_grid=(grid, 1, 1),
        run_prepare=launch.launcher(
            prepare.prepare_kernel, device, prepare.prepare_constants(inputs_hidden=padded, **sizes), prepare_types
        ),
        run_kernel=launch.launcher(
            kernel, device,
            constants_of(
                whole.kernel, lanes=lanes, hidden=padded, units=H, reverse=reverse, save_gates=save, timeout_ns=timeout
            ),
            types,
        ),
        word=timeouts.word_of(device),
        launch_id=timeouts.id_of(described),
    )  # fmt: skip


def gru_forward(
    call: GRUCall | PackedCall, save: bool, plan: Plan, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Results as `empty_results` allocates them.  Raises `launch.DoesNotFit`; nothing has been changed then.

    offsets: of a packed call, on its device; its H is a multiple of 16.
    """
    assert plan.whole is not None
    recipe = recipe_of(call, plan.whole, save)
    if recipe.hidden != call.H:
        return _padded_forward(call, save, plan, recipe)
    output, h_n, reserve = call.empty_results(save)
    hx = aligned(call.hx)
    masks = None if call.dropout_masks is None else aligned(call.dropout_masks)
    places = _Places(hx.data_ptr(), h_n.data_ptr(), reserve.data_ptr() if save else 0, masks, offsets)
    if recipe.lanes == hx.shape[0]:
        _launch(call, plan, recipe, 0, call.input, call.params, output, places)
        return output, h_n, reserve
    layer_outputs = call.saved_gates(reserve)[0] if save else None
    x = call.input
    for layer in range(call.L):
        last = layer == call.L - 1
        out = output if last else torch.empty_like(output) if layer_outputs is None else layer_outputs[layer]
        states = call.states(layer)
        _launch(call, plan, recipe, states.start, x, call.params[call.places(states.start, call.D)], out, places)
        if not last:
            x = call.mask(out, layer)
    return output, h_n, reserve


def aligned(tensor: Tensor) -> Tensor:
    """The tensor as kernels take it: contiguous, and from a multiple of 16 bytes on, which a piece of a buffer need not be."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


class _Places:
    """Addresses of the whole call's hx and h_n [L*D, B, H], of its dropout masks and offsets, and of its reserve, 0 if nothing
    is saved."""

    __slots__ = ("h_n", "hx", "masks", "offsets", "reserve")

    def __init__(self, hx: int, h_n: int, reserve: int, masks: Tensor | None, offsets: Tensor | None = None):
        self.hx, self.h_n, self.reserve = hx, h_n, reserve
        self.masks = None if masks is None else masks.data_ptr()
        self.offsets = None if offsets is None else offsets.data_ptr()


def _launch(
    call: GRUCall | PackedCall, plan: Plan, recipe: _Recipe, first: int, x: Tensor, params: Sequence[Tensor], out: Tensor,
    places: _Places,
) -> None:  # fmt: skip
    """States ``first`` and following: ``recipe.lanes`` of them, whose parameters are ``params``, from input x to ``out``."""
    each = recipe.each
    gi = input_projection(x, params[: 2 * each : each] if call.bidirectional else params[:1], plan.tf32)

    # The product comes first: what it writes would push the freshly filled sequences out of L2.
    workspace_bytes = recipe.workspace_bytes(below=not places.reserve)
    workspace = gi.new_empty(workspace_bytes // recipe.size_each) if workspace_bytes else gi
    state_bytes = recipe.batch * recipe.hidden * recipe.size_each  # of one lane
    gates = below = None
    if places.reserve:
        # layer_outputs [L-1, N, D*H], then gates [L, D, N, 4, H]
        below = places.reserve
        gates = below + recipe.rows * recipe.hidden * recipe.size_each * ((call.L - 1) * call.D + 4 * first)
    params = [aligned(p) for p in params]  # copies must outlive the launch
    recipe.launch(
        gi.data_ptr(), places.hx + first * state_bytes, [p.data_ptr() for p in params], out.data_ptr(),
        places.h_n + first * state_bytes, workspace.data_ptr(), gates, below, places.masks if recipe.handed_bytes else None,
        places.offsets,
    )  # fmt: skip


def input_projection(x: Tensor, weights: Sequence[Tensor], tf32: bool) -> Tensor:
    """x W^T without bias: [N, 3H], or [2, N, 3H] of two directions."""
    rows = x.flatten(0, -2)
    with torch_hooks.products(x.dtype, tf32=tf32):
        if len(weights) == 1:
            return torch.mm(rows, weights[0].t())
        gi = x.new_empty(2, rows.shape[0], weights[0].shape[0])
        for out, weight in zip(gi.unbind(0), weights, strict=True):
            torch.mm(rows, weight.t(), out=out)
    return gi


# ---- H that is no multiple of 16 ----------------------------------------------------------------------------------------


def _pad_parameter(parameter: Tensor, hidden: int, padded: int, pad_columns: bool) -> Tensor:
    """Rows of each of the three gates, and columns that are hidden units of one or more states, with zeros."""
    gates = parameter.unflatten(0, (3, hidden))
    if parameter.dim() == 1:
        return pad(gates, (0, padded - hidden)).flatten()
    gates = pad(gates, (0, 0, 0, padded - hidden)).flatten(0, 1)
    if pad_columns:
        gates = pad(gates.unflatten(1, (-1, hidden)), (0, padded - hidden)).flatten(1)
    return gates


def _padded_forward(call: GRUCall, save: bool, plan: Plan, recipe: _Recipe) -> tuple[Tensor, Tensor, Tensor]:
    """Everything in buffers for ``recipe.hidden`` units; beyond the own ones all parameters and states are 0."""
    T, B, H, L, D = call.T, call.B, call.H, call.L, call.D
    padded, states_each = recipe.hidden, recipe.lanes
    output, h_n, reserve = call.empty_results(save)
    hx = pad(call.hx, (0, padded - H))
    each = 4 if call.has_biases else 2
    params = [
        _pad_parameter(p, H, padded, i % each == 1 or (i % each == 0 and i >= each * D)) for i, p in enumerate(call.params)
    ]
    last = torch.empty_like(hx)
    new = output.new_empty
    if save:
        # as in a reserve: layer_outputs, then gates
        room = new((L - 1) * T * B * D * padded + L * D * T * B * 4 * padded)
        layer_outputs = room[: (L - 1) * T * B * D * padded].view(L - 1, T, B, D, padded)
        gates = room[(L - 1) * T * B * D * padded :].view(L, D, T, B, 4, padded)
    masks = None if call.dropout_masks is None else pad(call.dropout_masks.unflatten(3, (D, H)), (0, padded - H)).flatten(3)
    places = _Places(hx.data_ptr(), last.data_ptr(), room.data_ptr() if save else 0, masks)

    x = call.input
    for first in range(0, L * D, states_each):
        layer = first // D
        top = first + states_each == L * D
        out = layer_outputs[layer].flatten(2) if save and not top else new(T, B, D * padded)
        _launch(call, plan, recipe, first, x, params[call.places(first, states_each)], out, places)
        if not top:
            x = out if masks is None else out * masks[layer]
    output.view(T, B, D, H).copy_(out.view(T, B, D, padded)[..., :H])
    h_n.copy_(last[..., :H])
    if save:
        saved_outputs, saved_gates = call.saved_gates(reserve)
        saved_outputs.view(L - 1, T, B, D, H).copy_(layer_outputs[..., :H])
        saved_gates.copy_(gates[..., :H])
    return output, h_n, reserve
