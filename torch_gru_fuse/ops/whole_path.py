"""Whole sequences in one launch behind the sequence op.

A launch is three things: the product that makes the input projection, ``prepare``, and the kernel of the plan.  A small product
is a part of ``prepare`` (`planner.projection`).  All that follows from sizes alone is made once (`_Recipe`), so a call only
allocates and gathers addresses.  Where H is no multiple
of 16 the parameters are padded with zeros in each call, and results are cut out.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from triton.runtime import driver

from torch_gru_fuse import torch_hooks
from torch_gru_fuse.kernels import launch, prepare
from torch_gru_fuse.ops import timeouts
from torch_gru_fuse.ops.call import GRUCall, PackedCall, PairCall
from torch_gru_fuse.planner.plan import Plan
from torch_gru_fuse.planner.projection import projection_tile
from torch_gru_fuse.planner.whole_sequence import ResidentPlan, StagedPlan, WholeSequencePlan

#: For tests: so many programs of each launch are never started, and others wait for them.
missing_programs = 0


@dataclass(frozen=True, slots=True)
class _Projection:
    """The launch that prepares and makes gi, for one width and layout of x; ``gi_bytes`` of it."""

    grid: tuple[int, int, int]
    run: launch.Launcher
    gi_bytes: int


class _Room(NamedTuple):
    """Bytes of a launch's workspace, and where in it things are, None for what is not; the error block is its beginning."""

    size: int
    h0: int | None
    below: int | None  # or the ring
    handed: int | None
    gi: int | None
    projection: _Projection | None


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
        first_bytes: of a pair, those of the first of its sequences, which the other follows; else 0.
        run_prepare, run_kernel: to be called with addresses.
        projection: of x [T, B, I] by I and whether its memory is [B, T, I]; None where PyTorch makes the product.
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
    first_bytes: int
    prepare_grid: tuple[int, int, int] | None  # None: nothing to prepare
    prepare_grid_of: Callable[..., tuple[int]]
    kernel_grid: tuple[int, int, int]
    run_prepare: launch.Launcher
    run_kernel: launch.Launcher
    projection: Callable[[int, bool], _Projection | None]
    word: int
    launch_id: int

    def room(self, projection: _Projection | None, *, below: bool) -> _Room:
        """The workspace of a launch; projection: what makes gi there, if anything does.

        below: the sequences of all lanes but the highest have no other place.
        """
        end, places = 0, []
        waits = self.prepare_grid is not None
        sizes = (
            _ERROR_BYTES if waits else 0, self.state_bytes, self.ring_bytes or (self.below_bytes if below else 0),
            self.handed_bytes, 0 if projection is None else projection.gi_bytes,
        )  # fmt: skip
        for size in sizes:
            places.append(end if size else None)
            end += size
        return _Room(end, *places[1:], projection)

    def of_lengths(self, steps: int, rows: int) -> _Recipe:
        """The same for packed sequences of so many steps and rows."""
        if (steps, rows) == (self.steps, self.rows):
            return self
        below_bytes = self.below_bytes // self.rows * rows
        grid = self.prepare_grid and (*self.prepare_grid_of(steps=rows), 1, 1)
        handed_bytes = below_bytes if self.handed_bytes else 0
        return replace(
            self, steps=steps, rows=rows, below_bytes=below_bytes, handed_bytes=handed_bytes, prepare_grid=grid
        )

    def launch(
        self, room: _Room, workspace: int, x: int, gi: int, hx: int, params: Sequence[int], out: int, h_n: int,
        gates: int | None = None, below: int | None = None, masks: int | None = None, offsets: int | None = None,
        keep: int | None = None, *, aligned: bool,
    ) -> None:  # fmt: skip
        """Prepares and runs, at these addresses; ``aligned``: all are multiples of 16.

        gi: where x W^T is, if the room has none.  params: of each lane w_ih, w_hh and, with biases, b_ih, b_hh.  gates: None:
        are not saved.  below: None: in the room, or nobody needs it.  masks: of a stack with dropout, else None.  offsets: of
        packed sequences, else None.  keep: with resets, else None.
        """
        each = self.each
        _, h0, in_room, handed, gi_in_room, projection = room
        h0 = hx if h0 is None else workspace + h0
        if in_room is not None:
            below = workspace + in_room
        elif below is None or not self.below_bytes:
            below = out
        params = tuple(params)
        w_hh = params[1::each]
        b_ih, b_hh = (params[2::4], params[3::4]) if each == 4 else (None, None)
        stream = driver.active.get_current_stream(self.device)
        steps = self.steps if offsets is None else self.rows  # of packed sequences all rows are of one step to it
        tail = (h0, h_n, workspace, self.launch_id, steps, self.batch, self.ring_rows)
        if projection is not None:
            gi = workspace + gi_in_room
            values = (x, params[:1] if self.stack else params[::each], gi, hx, self.word, out, below, *tail)
            projection.run(projection.grid, stream, values, aligned)
        elif self.prepare_grid is not None:
            self.run_prepare(self.prepare_grid, stream, (hx, self.word, out + self.first_bytes, below, *tail), aligned)
        if handed is not None:
            handed += workspace
            self.run_prepare(self.prepare_grid, stream, (hx, self.word, out, handed, *tail), aligned)
        values = (
            gi, h0, below, params[each::each] if self.stack else w_hh[:1], w_hh, b_ih, b_hh, masks, handed, out, h_n,
            out if gates is None else gates, workspace, offsets, keep, self.steps, self.batch,
        )  # fmt: skip
        self.run_kernel(self.kernel_grid, stream, values, aligned)


_ERROR_BYTES = 64  # of the error block, rounded up so that what follows is aligned
_recipes: dict[tuple, _Recipe] = {}


def recipe_of(call: GRUCall | PackedCall | PairCall, whole: WholeSequencePlan, save: bool) -> _Recipe:
    x, packed = call.input, isinstance(call, PackedCall)
    # The plan stands for itself: it is kept below, so no other has its id, and hashing it takes longer than all the rest.
    key = (
        "packed" if packed else call.T, x.shape[-1], call.hx.shape, x.dtype, x.get_device(), id(whole), call.bidirectional,
        call.has_biases, save, call.dropout_masks is None, call.pair, type_of_keep(call), timeouts.timeout_ns(),
        missing_programs,
    )  # fmt: skip
    found = _recipes.get(key)
    if found is None:
        if len(_recipes) >= 4096:
            _recipes.clear()
        found = _recipes[key] = _make_recipe(call, whole, save)
        launch.load_ahead([found.run_kernel], found.device)  # while the launch before it is seen to
    return found.of_lengths(call.T, call.N) if packed else found  # which are others in every call


def _make_recipe(call: GRUCall | PackedCall | PairCall, whole: WholeSequencePlan, save: bool) -> _Recipe:
    T, B, N, H, packed = call.T, call.B, call.N, call.H, isinstance(call, PackedCall)
    dtype, device = call.input.dtype, call.input.get_device()
    lanes, padded, reverse, pair = whole.lanes, -(-H // 16) * 16, call.bidirectional, call.pair
    stack = lanes > 1 and not reverse and pair is None
    kernel, constants_of = kernel_named(whole.kernel.name)
    timeout = timeouts.timeout_ns()
    # resident takes hx itself, and nobody but the lane above polls its sequences
    polls_own = not isinstance(whole.kernel, ResidentPlan)
    ring = isinstance(whole.kernel, StagedPlan) and whole.kernel.ring
    # what is prepared of a pair is that of a stack of two layers
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
        dtype, dtype, dtype, torch.int64, torch.int32 if packed else None, type_of_keep(call), None, None,
    ]  # fmt: skip
    prepare_types = [dtype, torch.int32, dtype, dtype, dtype, dtype, torch.int64, None, None, None, None]
    described = timeouts.Call(op_of(call), sizes_of(call), whole.kernel.name, str(whole), timeout)
    grid = whole.programs(B, H) - missing_programs
    prepares = polls_own or stack
    prepare_grid_of = functools.partial(prepare.prepare_grid, batch=B, rows=rows, **sizes)
    preparing = prepare_grid_of(steps=N if packed else T)[0] if prepares else 0
    weights = 2 if reverse else 1

    @functools.cache
    def projection(inputs: int, batch_first: bool) -> _Projection | None:
        tile = None if packed else projection_tile(N, inputs, dtype.itemsize)
        if tile is None:
            return None
        constants = prepare.project_constants(
            tile, inputs=inputs, batch_first=batch_first, tf32=dtype == torch.float32, prepare=prepares,
            inputs_hidden=padded, **sizes,
        )  # fmt: skip
        programs, = prepare.project_grid(tile, weights=weights, rows=N, hidden=padded, preparing=preparing)
        types = [dtype, (dtype, weights), dtype, *prepare_types]
        run = launch.launcher(prepare.project_kernel, device, constants, types)
        return _Projection((programs, 1, 1), run, weights * N * 3 * padded * dtype.itemsize)

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
        first_bytes=0 if pair is None else N * padded * dtype.itemsize,
        prepare_grid=(preparing, 1, 1) if prepares else None,
        prepare_grid_of=prepare_grid_of,
        kernel_grid=(grid, 1, 1),
        run_prepare=launch.launcher(
            prepare.prepare_kernel, device, prepare.prepare_constants(inputs_hidden=padded, **sizes), prepare_types
        ),
        run_kernel=launch.launcher(
            kernel, device,
            constants_of(
                whole.kernel, lanes=lanes, hidden=padded, units=H, reverse=reverse, save_gates=save, timeout_ns=timeout,
                pair=pair,
            ),  # fmt: skip
            types,
        ),
        projection=projection,
        word=timeouts.word_of(device),
        launch_id=timeouts.id_of(described),
    )  # fmt: skip


def kernel_named(name: str) -> tuple[Any, Callable[..., dict[str, Any]]]:
    """A kernel of ``kernels/<name>.py``, and the function that makes its constants.  Triton takes its time to import one."""
    module = importlib.import_module(f"torch_gru_fuse.kernels.{name}")
    return getattr(module, f"{name}_kernel"), getattr(module, f"{name}_constants")


def type_of_keep(call: GRUCall | PackedCall | PairCall) -> torch.dtype | None:
    """Of what the kernels are given, which take a bool as a byte; None without resets."""
    if call.keep is None:
        return None
    return torch.uint8 if call.keep.dtype == torch.bool else call.keep.dtype


def op_of(call: GRUCall | PackedCall | PairCall) -> str:
    """The op that a call is one of."""
    return {PackedCall: "gru_packed", PairCall: "gru_pair"}.get(type(call), "gru")


def sizes_of(call: GRUCall | PackedCall | PairCall) -> str:
    """What an error message says of a call."""
    dtype = str(call.input.dtype).removeprefix("torch.")
    if call.pair is not None:
        return f"T={call.T}, B={call.B}, H={call.H}, reverse={list(call.reverse)}, {dtype}"
    inputs = call.input.shape[-1]
    steps = "" if isinstance(call, PackedCall) else f"T={call.T}, "  # calls of all lengths have one launch id
    return f"{steps}B={call.B}, I={inputs}, H={call.H}, num_layers={call.L}, bidirectional={call.bidirectional}, {dtype}"


def gru_forward(
    call: GRUCall | PackedCall | PairCall, save: bool, plan: Plan, offsets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Results as `empty_results` allocates them.  Raises `launch.DoesNotFit`; nothing has been changed then.

    offsets: of a packed call, on its device; its H is a multiple of 16.
    """
    assert plan.whole is not None
    recipe = recipe_of(call, plan.whole, save)
    if recipe.hidden != call.H:
        assert call.pair is None
        return _padded_forward(call, save, plan, recipe)
    output, h_n, reserve = call.empty_results(save)
    hx = aligned(call.hx)
    masks = None if call.dropout_masks is None else aligned(call.dropout_masks)
    keep = None if call.keep is None else aligned(call.keep)
    places = _Places(hx.data_ptr(), h_n.data_ptr(), reserve.data_ptr() if save else 0, masks, offsets, keep)
    if recipe.lanes == hx.shape[0]:
        x = call.input if call.pair is None else call.inputs
        _launch(call, plan, recipe, 0, x, call.params, output, places)
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


def load_ahead(call: GRUCall, save: bool, plan: Plan) -> None:
    """Starts to compile what `gru_forward` launches; the tensors of the call may be fake."""
    assert plan.whole is not None
    recipe = recipe_of(call, plan.whole, save)
    _, batch_first = dense(call.input)
    projection = recipe.projection(call.input.shape[-1], batch_first)
    before = recipe.run_prepare if projection is None else projection.run
    if projection is not None or recipe.prepare_grid is not None:
        launch.load_ahead([before], recipe.device)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor as kernels take it: contiguous, and from a multiple of 16 bytes on, which a piece of a buffer need not be."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


class _Places:
    """Addresses of the whole call's hx and h_n [L*D, B, H], of its dropout masks, offsets and keep, and of its reserve, 0 if
    nothing is saved."""

    __slots__ = ("h_n", "hx", "keep", "masks", "offsets", "reserve")

    def __init__(
        self, hx: int, h_n: int, reserve: int, masks: Tensor | None, offsets: Tensor | None = None, keep: Tensor | None = None
    ):
        self.hx, self.h_n, self.reserve = hx, h_n, reserve
        self.masks = None if masks is None else masks.data_ptr()
        self.offsets = None if offsets is None else offsets.data_ptr()
        self.keep = None if keep is None else keep.data_ptr()


def _launch(
    call: GRUCall | PackedCall | PairCall, plan: Plan, recipe: _Recipe, first: int, x: Tensor | Sequence[Tensor],
    params: Sequence[Tensor], out: Tensor, places: _Places,
) -> None:  # fmt: skip
    """States ``first`` and following: ``recipe.lanes`` of them, whose parameters are ``params``, from input x, or the inputs
    of a pair, to ``out``."""
    each = recipe.each
    params = [aligned(p) for p in params]  # copies must outlive the launch
    projection = None
    p_x = p_gi = 0
    if isinstance(x, Tensor):
        x, batch_first = dense(x)
        p_x, projection = x.data_ptr(), recipe.projection(x.shape[-1], batch_first)
    if projection is None:  # before the others: what it writes would push the freshly filled sequences out of L2
        gi = input_projection(x, params[: call.D * each : each], plan.tf32)
        p_gi = gi.data_ptr()
    room = recipe.room(projection, below=not places.reserve)
    workspace = out.new_empty(room.size // recipe.size_each)
    state_bytes = recipe.batch * recipe.hidden * recipe.size_each  # of one lane
    gates = below = None
    if places.reserve:
        # layer_outputs [L-1, N, D*H], then gates [L, D, N, 4, H]
        below = places.reserve
        gates = below + recipe.rows * recipe.hidden * recipe.size_each * ((call.L - 1) * call.D + 4 * first)
    masks = places.masks if recipe.handed_bytes else None
    addresses = p_x, p_gi, places.hx + first * state_bytes, [p.data_ptr() for p in params], out.data_ptr()
    recipe.launch(
        room, workspace.data_ptr(), *addresses, places.h_n + first * state_bytes, gates, below, masks, places.offsets,
        places.keep, aligned=not (p_x | out.data_ptr() | (gates or 0)) % 16,
    )  # fmt: skip


def dense(x: Tensor) -> tuple[Tensor, bool]:
    """x [T, B, I] or [N, I] with its elements side by side, and whether they are so as [B, T, I]."""
    if x.is_contiguous():
        return x, False
    if x.dim() == 3 and x.transpose(0, 1).is_contiguous():
        return x, True
    return x.contiguous(), False


def input_projection(x: Tensor | Sequence[Tensor], weights: Sequence[Tensor], tf32: bool) -> Tensor:
    """x W^T without bias: [N, 3H], or [2, N, 3H] of two directions, or of a pair, whose inputs are two."""
    rows = [t.flatten(0, -2) for t in ((x,) if isinstance(x, Tensor) else x)]
    with torch_hooks.products(rows[0].dtype, tf32=tf32):
        if len(weights) == 1:
            return torch.mm(rows[0], weights[0].t())
        gi = rows[0].new_empty(2, rows[0].shape[0], weights[0].shape[0])
        for i, weight in enumerate(weights):
            torch.mm(rows[i % len(rows)], weight.t(), out=gi[i])
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
    keep = None if call.keep is None else aligned(call.keep)
    places = _Places(hx.data_ptr(), last.data_ptr(), room.data_ptr() if save else 0, masks, None, keep)

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
