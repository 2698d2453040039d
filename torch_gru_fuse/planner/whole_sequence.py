"""Plans of the kernels that run whole sequences in one launch: pure functions of sizes, without Triton and without a GPU.

A launch runs ``lanes`` recurrences at once: all layers of a stack, one layer, or the two directions of a layer.
``kernels.resident`` gives a program all units of a lane; ``kernels.wavefront`` and ``kernels.staged`` spread them over
programs, the first for the shortest step, the second for the largest batch.  Programs that wait for each other must be on the
GPU at once.

Plans are made for multiprocessors of 64 K registers, which all GPUs of compute capability 8.0 and more have, and for the number
of multiprocessors and the shared memory of a program that are given.  That the planned code spills nothing is what the tests
check with the compiler.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from .gpus import GPU

__all__ = [
    "Prediction",
    "ResidentPlan",
    "StagedPlan",
    "WavefrontPlan",
    "WholeSequencePlan",
    "packed_plan",
    "plan_resident",
    "plan_resident_backward",
    "plan_staged",
    "plan_wavefront",
    "plan_whole_sequence",
    "plan_whole_sequence_backward",
    "predict",
    "resets_plan",
    "why_no_plan",
    "why_not_gpu",
]

_REGISTERS_PER_SM = 65536
_SHARED_BYTES = 99 * 1024  # of a program
_MOST_HIDDEN = 1024


@dataclass(frozen=True)
class WavefrontPlan:
    """How ``wavefront_kernel`` spreads a layer.  All sizes but ``ahead`` are powers of two.

    units, rows: the tile of one program, units at least 16, rows at least 8.
    slices: warps along k for h; input_slices: as many for the input of a higher layer, or 0.
    unit_warps: warps along the units.
    store_first: a barrier between storing h and adding up the input of the next step.
    ahead: steps that prefetches run ahead.
    """

    name: ClassVar[str] = "wavefront"
    units: int
    rows: int
    slices: int
    input_slices: int = 0
    unit_warps: int = 1
    store_first: bool = False
    ahead: int = 4

    @property
    def num_warps(self) -> int:
        return (self.slices + self.input_slices) * self.unit_warps

    def programs(self, lanes: int, batch: int, hidden: int) -> int:
        return lanes * -(-hidden // self.units) * -(-batch // self.rows)


@dataclass(frozen=True)
class ResidentPlan:
    """How ``resident_kernel`` is launched.

    units: hidden units, padded to a power of two and to 16 a warp.  rows: batch rows of a program.
    early: read the next input of a higher layer before the recurrence of this step.
    """

    name: ClassVar[str] = "resident"
    units: int
    rows: int
    num_warps: int
    early: bool = False

    def programs(self, lanes: int, batch: int) -> int:
        return lanes * -(-batch // self.rows)


@dataclass(frozen=True)
class StagedPlan:
    """How ``staged_kernel`` spreads a layer.  All sizes but ``tiles`` and ``share`` are powers of two.

    units, rows: the tile of one program, units at least 16, rows at least 8; ``tiles`` of them, 1 or an even number, follow
    each other in the batch.
    slices: warps along k.  unit_warps: warps along the units.
    pieces: parts of the state, along k, that are waited for and multiplied one after the other.
    share: blocks of W_hn, 128 bytes of k a slice and unit each, in shared memory, where registers do not hold all.
    ring: float32 states cross in a ring of two places, which nobody fills, and not in the output.
    """

    name: ClassVar[str] = "staged"
    units: int
    rows: int
    tiles: int
    slices: int
    unit_warps: int
    pieces: int = 1
    share: int = 0
    ring: bool = False

    @property
    def num_warps(self) -> int:
        return self.slices * self.unit_warps

    def programs(self, lanes: int, batch: int, hidden: int) -> int:
        return lanes * -(-hidden // self.units) * -(-batch // (self.rows * self.tiles))

    def ring_rows(self, batch: int) -> int:
        """Batch rows of all tiles: those of the ring in which float32 states cross."""
        return -(-batch // (self.rows * self.tiles)) * self.rows * self.tiles

    def shared_bytes(self, hidden: int, element_bytes: int) -> int:
        """Shared memory of a program: states, gi of two tiles, partial sums, what tiles carry on, weights, biases."""
        states = min(2, self.tiles * self.pieces) * self.rows * _padded(hidden) * element_bytes // self.pieces
        gi = 2 * 3 * self.rows * self.units * element_bytes
        sums = 3 * self.slices * self.units * self.rows * 4 if self.slices > 1 else 0
        carried = (1 << (self.tiles - 1).bit_length()) * self.units * self.rows * 4 if self.tiles > 2 else 0
        return states + gi + sums + carried + self.share * self.slices * self.units * 128 + 16 * self.units

    def shared_bytes_backward(self, hidden: int, element_bytes: int) -> int:
        """The same of the backward: gate gradients, what the gates need of one or two tiles, sums, what is carried, weights."""
        staged = min(2, self.tiles * self.pieces) * 3 * self.rows * _padded(hidden) * element_bytes // self.pieces
        slots = 1 if self.tiles > 1 and self.pieces > 1 else 2
        sums = self.slices * self.units * self.rows * 4
        carried = (1 << (self.tiles - 1).bit_length()) * self.units * self.rows * 4 if self.tiles > 2 else 0
        inputs = slots * 6 * self.rows * self.units * element_bytes
        return staged + inputs + sums + carried + self.share * self.slices * self.units * 128


@dataclass(frozen=True)
class WholeSequencePlan:
    """``kernel`` for ``lanes`` at once: all layers of a stack, one of them, or both directions of a layer."""

    lanes: int
    kernel: WavefrontPlan | ResidentPlan | StagedPlan

    def programs(self, batch: int, hidden: int) -> int:
        """Programs of one launch."""
        if isinstance(self.kernel, ResidentPlan):
            return self.kernel.programs(self.lanes, batch)
        return self.kernel.programs(self.lanes, batch, hidden)

    def launches(self, layers: int, *, reverse: bool) -> int:
        """Launches of a whole GRU of so many layers, one after the other."""
        return layers * (2 if reverse else 1) // self.lanes

    @property
    def programs_per_sm(self) -> int:
        """Programs that share a multiprocessor, as far as registers go: two of up to four warps, else one."""
        return 2 if self.kernel.num_warps <= 4 else 1

    def waits(self, *, reverse: bool) -> bool:
        """Whether programs wait for each other: then all of them must be on the GPU at once.

        Of ``resident`` only the layers of a stack do; other programs of it may come one after the other.
        """
        return not isinstance(self.kernel, ResidentPlan) or (self.lanes > 1 and not reverse)


# ---- plans --------------------------------------------------------------------------------------------------------------


def _padded(hidden: int) -> int:
    return 1 << (hidden - 1).bit_length()


def plan_wavefront(
    batch: int, hidden: int, lanes: int, element_bytes: int, *, stack: bool, multiprocessors: int = 128
) -> WavefrontPlan | None:
    """Plan for ``lanes`` in one launch, one tile a program, or None if they do not fit: all at once, no spills."""
    _check(batch, hidden, lanes, element_bytes, multiprocessors, reverse=False)
    plan = _wavefront(batch, hidden, lanes, element_bytes, stack, multiprocessors)
    return plan if isinstance(plan, WavefrontPlan) else None


def plan_resident(hidden: int, element_bytes: int, *, stack: bool) -> ResidentPlan | None:
    """Plan for one launch of any number of lanes and any batch, or None: the weights must fit the registers of 8 warps."""
    _check(1, hidden, 1, element_bytes, 1, reverse=False)
    units = max(16, _padded(hidden))
    registers = 3 * units * element_bytes // 8 * (2 if stack else 1)  # of a thread, for weights
    # 192 leaves enough for one layer; a stack, which holds x as well, spilled there (H=64 fp32: 40 bytes, H=128 fp16: 48).
    if units > 128 or registers > (96 if stack else 192):
        return None
    return ResidentPlan(units, rows=8, num_warps=units // 16, early=stack and element_bytes == 2)


def crosses_in_ring(padded: int, tiles: int, element_bytes: int) -> bool:
    """Whether states cross in a ring; padded: H, a power of two.

    It saves filling the output and costs a second store a step.  H100, tf32, in a CUDA graph: T=128, B=1024, H=256 0.663 ms
    without, 0.629 with; T=64, B=256, H=512 0.286 and 0.310; T=256, B=64, H=1024 1.42 and 1.52.
    """
    return element_bytes == 4 and padded <= 256 and tiles > 1


def plan_staged(
    batch: int, hidden: int, lanes: int, element_bytes: int, *, multiprocessors: int = 128, shared_bytes: int = _SHARED_BYTES
) -> StagedPlan | None:
    """Plan for one layer, ``lanes`` directions of it, with the least predicted time of a step; None if none fits."""
    _check(batch, hidden, lanes, element_bytes, multiprocessors, reverse=False)
    plan = _staged(batch, hidden, lanes, element_bytes, multiprocessors, shared_bytes)
    return plan if isinstance(plan, StagedPlan) else None


def plan_whole_sequence(
    batch: int, hidden: int, lanes: int, element_bytes: int, *, reverse: bool, multiprocessors: int = 128,
    shared_bytes: int = _SHARED_BYTES,
) -> WholeSequencePlan | None:  # fmt: skip
    """The plan for a stack of ``lanes`` layers, or, if ``reverse``, for the two directions of a layer; None: no such launch.

    ``why_no_plan`` of the same arguments says why.  ``element_bytes`` is 2 or, for float32 whose products use TF32, 4.
    ``shared_bytes``: shared memory that a program may have.
    """
    plan = _whole_sequence(batch, hidden, lanes, element_bytes, reverse, multiprocessors, shared_bytes)
    return plan if isinstance(plan, WholeSequencePlan) else None


def plan_whole_sequence_backward(
    batch: int, hidden: int, lanes: int, element_bytes: int, *, reverse: bool, multiprocessors: int = 128,
    shared_bytes: int = _SHARED_BYTES,
) -> WholeSequencePlan | None:  # fmt: skip
    """As ``plan_whole_sequence``, for the backward; None also where ``hidden`` is no multiple of 16."""
    _check(batch, hidden, lanes, element_bytes, multiprocessors, reverse=reverse)
    if hidden % 16:
        return None
    if lanes > 1 and not reverse and not (lanes == 2 and hidden <= 64):
        # (T=200, B=64, H=64, 2 layers, forward and backward: fp16 0.41 ms, one resident layer after the other 0.30; tf32 0.49
        # and 0.43.)
        wavefront = _wavefront_backward(batch, hidden, lanes, element_bytes, True, multiprocessors)
        if wavefront is not None:
            return WholeSequencePlan(lanes, wavefront)
    number = lanes if reverse else 1
    kernel: WavefrontPlan | ResidentPlan | StagedPlan | None = plan_resident_backward(hidden, element_bytes)
    if kernel is None:
        kernel = _wavefront_backward(batch, hidden, number, element_bytes, False, multiprocessors)
    if kernel is None:
        kernel = _staged_backward(batch, hidden, number, element_bytes, multiprocessors, shared_bytes)
    return None if kernel is None else WholeSequencePlan(number, kernel)


def plan_resident_backward(hidden: int, element_bytes: int) -> ResidentPlan | None:
    """Plan for one launch of one layer or its directions and any batch, or None."""
    units = max(16, _padded(hidden))
    if units > 128 or (units, element_bytes) == (128, 4):  # spills, and T=200, B=128 takes 0.88 ms, by the wavefront 0.67
        return None
    return ResidentPlan(units, rows=8, num_warps=units // 16)


# Bytes of a row of units of ``resident``, forward and backward, up to which packed sequences spill nothing: with 128 fp32 units
# the forward spills 8 to 24 bytes, with 64, or 128 of half precision, the backward 32 to 256.
_PACKED_RESIDENT_BYTES = {False: 256, True: 128}


def _packed_staged_backward(kernel: StagedPlan, hidden: int, element_bytes: int) -> StagedPlan:
    """The same rows a program without spills: as planned, these would spill 4 to 88 bytes."""
    padded = _padded(hidden)
    if (padded, element_bytes) == (256, 2) and kernel.rows == 16:
        return replace(kernel, rows=8, tiles=2 * kernel.tiles)
    if (padded, element_bytes) == (256, 4) and kernel.tiles == 2:
        return replace(kernel, pieces=3, share=2)
    if (padded, element_bytes) == (512, 2) and kernel.tiles == 2:
        return replace(kernel, pieces=3)
    return kernel


def packed_plan(
    plan: WholeSequencePlan, batch: int, hidden: int, element_bytes: int, *, backward: bool = False, multiprocessors: int = 128
) -> WholeSequencePlan | str:
    """What runs packed sequences in the place of a plan, or why there is nothing.

    A program runs the same rows, if not as long.
    """
    kernel = plan.kernel
    if hidden % 16:
        return f"H = {hidden}: packed sequences need a multiple of 16"
    if isinstance(kernel, StagedPlan):
        if backward:
            return replace(plan, kernel=_packed_staged_backward(kernel, hidden, element_bytes))
        return replace(plan, kernel=replace(kernel, ring=False))  # rows of a ring all have the same number of steps
    if isinstance(kernel, ResidentPlan) and kernel.units * element_bytes > _PACKED_RESIDENT_BYTES[backward]:
        if backward:
            wavefront = _wavefront_backward(batch, hidden, plan.lanes, element_bytes, False, multiprocessors)
        else:
            wavefront = _wavefront(batch, hidden, plan.lanes, element_bytes, False, multiprocessors)
        if isinstance(wavefront, WavefrontPlan):
            return WholeSequencePlan(plan.lanes, wavefront)
        return wavefront or f"batch {batch}: more programs of the backward than {multiprocessors} multiprocessors hold"
    return plan


def resets_plan(plan: WholeSequencePlan, hidden: int, element_bytes: int, *, backward: bool = False) -> WholeSequencePlan:
    """What runs a plan with resets: the same rows a program.  As planned, one backward would spill 8 to 20 bytes."""
    kernel = plan.kernel
    if backward and isinstance(kernel, StagedPlan) and (_padded(hidden), element_bytes, kernel.tiles) == (256, 4, 2):
        return replace(plan, kernel=replace(kernel, pieces=3, share=2))
    return plan


def why_no_plan(
    batch: int, hidden: int, lanes: int, element_bytes: int, *, reverse: bool, multiprocessors: int = 128,
    shared_bytes: int = _SHARED_BYTES,
) -> str | None:  # fmt: skip
    """Why ``plan_whole_sequence`` has no plan; None where it has one."""
    plan = _whole_sequence(batch, hidden, lanes, element_bytes, reverse, multiprocessors, shared_bytes)
    return plan if isinstance(plan, str) else None


def why_not_gpu(gpu: GPU) -> str | None:
    """Why the plans do not hold on this GPU; None where they do."""
    if gpu.capability < (8, 0):
        major, minor = gpu.capability
        return f"{gpu.name} has compute capability {major}.{minor}, tensor cores take tf32 and bfloat16 from 8.0 on"
    if gpu.registers_per_sm < _REGISTERS_PER_SM:
        return f"{gpu.name} has {gpu.registers_per_sm} registers an SM, the plans need {_REGISTERS_PER_SM}"
    if gpu.shared_bytes_per_program < _SHARED_BYTES:
        return f"{gpu.name} has {gpu.shared_bytes_per_program} bytes of shared memory a program, the plans need {_SHARED_BYTES}"
    return None


def _check(batch: int, hidden: int, lanes: int, element_bytes: int, multiprocessors: int, *, reverse: bool) -> None:
    sizes = {"batch": batch, "hidden": hidden, "lanes": lanes, "multiprocessors": multiprocessors}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if element_bytes not in (2, 4):
        raise ValueError(f"element_bytes is {element_bytes}, expected 2 (float16, bfloat16) or 4 (float32)")
    if reverse and lanes != 2:
        raise ValueError(f"lanes is {lanes}, expected 2: with reverse they are the two directions of one layer")


def _whole_sequence(
    batch: int, hidden: int, lanes: int, element_bytes: int, reverse: bool, multiprocessors: int, shared_bytes: int
) -> WholeSequencePlan | str:
    """The plan, or why there is none: all layers at once where they fit, else one after the other."""
    _check(batch, hidden, lanes, element_bytes, multiprocessors, reverse=reverse)
    stack = lanes > 1 and not reverse
    if stack:
        resident = plan_resident(hidden, element_bytes, stack=True)
        if resident is not None and resident.programs(lanes, batch) <= multiprocessors:
            return WholeSequencePlan(lanes, resident)
        wavefront = _wavefront(batch, hidden, lanes, element_bytes, True, multiprocessors)
        if isinstance(wavefront, WavefrontPlan):
            return WholeSequencePlan(lanes, wavefront)
    number = lanes if reverse else 1
    resident = plan_resident(hidden, element_bytes, stack=False)
    if resident is not None:
        return WholeSequencePlan(number, resident)
    wavefront = _wavefront(batch, hidden, number, element_bytes, False, multiprocessors)
    if isinstance(wavefront, WavefrontPlan):
        return WholeSequencePlan(number, wavefront)
    staged = _staged(batch, hidden, number, element_bytes, multiprocessors, shared_bytes)
    return WholeSequencePlan(number, staged) if isinstance(staged, StagedPlan) else staged


def _wavefront(
    batch: int, hidden: int, lanes: int, element_bytes: int, stack: bool, multiprocessors: int
) -> WavefrontPlan | str:
    """The plan, or why there is none.

    16 units, the least that an mma instruction takes, and as few batch rows as the number of programs allows.  Slices of 64 of
    k: with 8 slices of 32 at H=256 the exchange costs more than it saves (1.11 and 0.79 us a step).
    """
    padded = _padded(hidden)
    if not 64 <= padded <= _MOST_HIDDEN:
        return f"H = {hidden}: a wavefront is for 33 to {_MOST_HIDDEN} units"
    slices = {64: 2, 128: 4, 256: 4, 512: 8, 1024: 8}[padded]
    programs = lanes * -(-hidden // 16)  # for one tile of the batch
    too_many = f"{_lanes(lanes)} of H = {hidden}, batch {batch}: more programs than {multiprocessors} multiprocessors hold"
    if not stack:
        # Two programs a multiprocessor, or tiles of 16 rows: there staged is faster (H=256, B=128, 3 layers, fp16: 0.56 and
        # 0.42 ms; H=512, B=64, fp16: 0.25 and 0.20 ms), and so it is where weights take 192 registers (H=1024, B=8, tf32: 0.36
        # and 0.28 ms).
        if (padded, element_bytes) == (1024, 4) or programs * -(-batch // 8) > multiprocessors:
            return too_many
        return WavefrontPlan(16, 8, slices)
    if padded > 512 or (padded == 512 and element_bytes == 4 and hidden != padded):
        return f"H = {hidden}: the weights of both projections of a stacked layer do not fit the registers of its programs"
    for tile in (8, 16):
        tiles = -(-batch // tile)
        crowded = programs * tiles > multiprocessors  # then two programs a multiprocessor, of four warps each
        if padded == 512 or element_bytes == 4:
            if crowded or (padded == 512 and tile == 16 and element_bytes == 4):
                continue
        elif programs * tiles > 2 * multiprocessors:
            continue
        if padded == 512:
            return WavefrontPlan(16, tile, slices)
        # x beside h with twice the warps, or after it?  Where the batch is one tile, beside (T=1000, B=1, H=256, 2 layers:
        # fp16 0.70 and 0.82 ms, tf32 0.78 and 0.83); where there are more, after (B=32: fp16 1.01 and 1.22 ms, tf32 1.24 and
        # 1.35), and so where programs share multiprocessors (512 steps, B=10, 6 layers, fp16: 0.53 and 0.59 ms).  Small layers:
        # always beside (H=64, B=64, 2 layers, tf32: 0.16 and 0.17 ms).
        if tile == 8 and (tiles == 1 or padded == 64) and not crowded:
            return WavefrontPlan(16, tile, slices, input_slices=slices, store_first=True)
        if element_bytes == 2:
            return WavefrontPlan(16, tile, slices)
        return WavefrontPlan(16, tile, 2 * slices)  # two sets of weights in fp32: half as long slices
    return too_many


# Slices of the backward of ``wavefront``, by padded H, bytes of an element and rows of a tile: the fewest that spill nothing
# (code for sm_89).  A second set of weights for the lane above, of a stack, takes registers, too.  Warps beside them for that
# lane are slower (T=1000, B=1, H=256, 2 layers, forward and backward: fp16 2.28 and 1.98 ms, tf32 2.39 and 2.02; B=32: fp16
# 3.76 and 2.82, tf32 4.63 and 3.86), and so are tiles of 16 rows where the programs of tiles of 8 fit (B=32: 3.57 and 2.82).
_BACKWARD_SLICES = {
    (64, 2, 8): 2, (128, 2, 8): 2, (256, 2, 8): 4, (512, 2, 8): 8, (1024, 2, 8): 8,
    (64, 2, 16): 2, (128, 2, 16): 4, (256, 2, 16): 4, (512, 2, 16): 8,
    (64, 4, 8): 2, (128, 4, 8): 4, (256, 4, 8): 4, (512, 4, 8): 8,
    (64, 4, 16): 4, (128, 4, 16): 4, (256, 4, 16): 8,
}  # fmt: skip
_BACKWARD_SLICES_OF_STACK = {
    (64, 2, 8): 2, (128, 2, 8): 4, (256, 2, 8): 4, (512, 2, 8): 8,
    (64, 2, 16): 4, (128, 2, 16): 4, (256, 2, 16): 8,
    (64, 4, 8): 2, (128, 4, 8): 4, (256, 4, 8): 8,
    (64, 4, 16): 4, (128, 4, 16): 8, (256, 4, 16): 8,
}  # fmt: skip


def _wavefront_backward(
    batch: int, hidden: int, lanes: int, element_bytes: int, stack: bool, multiprocessors: int
) -> WavefrontPlan | None:
    padded = _padded(hidden)
    for rows in (8, 16):
        slices = (_BACKWARD_SLICES_OF_STACK if stack else _BACKWARD_SLICES).get((padded, element_bytes, rows))
        if slices is not None:
            plan = WavefrontPlan(16, rows, slices)
            if plan.programs(lanes, batch, hidden) <= multiprocessors:
                return plan
    return None


@dataclass(frozen=True)
class _Tile:
    """A ``StagedPlan`` but for its number of tiles; of how many tiles and lanes it spills nothing (code for sm_89)."""

    units: int
    rows: int
    slices: int
    unit_warps: int
    pieces: int
    share: int
    tiles: tuple[int, int] = (1, 32)
    lanes: int = 2


# Of the backward of ``staged``, by padded H and bytes of an element, the fastest first.  T=128, B=1024, H=256, forward and
# backward: fp16 1.14 ms, with 4 slices 1.16, tf32 2.43 to 2.57; T=64, B=256, H=512: fp16 0.49, in 3 pieces 0.55, tf32 1.06, in
# tiles of 8 1.11; T=256, B=64, H=1024: fp16 2.12, tf32 5.30, in 4 pieces 5.53, in 6 5.87, in 12 7.63.
_STAGED_BACKWARD = {
    (256, 2): (_Tile(64, 16, 2, 4, 1, 0, tiles=(1, 4)), _Tile(64, 8, 2, 4, 1, 0)),
    (512, 2): (_Tile(64, 8, 2, 4, 1, 2, tiles=(1, 2), lanes=1), _Tile(64, 8, 2, 4, 3, 2)),
    (1024, 2): (_Tile(32, 8, 8, 1, 3, 1),),
    (256, 4): (_Tile(64, 8, 2, 4, 2, 2, tiles=(1, 2)), _Tile(64, 8, 2, 4, 3, 1, tiles=(4, 32))),
    (512, 4): (_Tile(32, 16, 4, 2, 6, 2, tiles=(1, 4)), _Tile(32, 8, 8, 1, 3, 1)),
    (1024, 4): (
        _Tile(16, 8, 8, 1, 3, 1, tiles=(1, 1)), _Tile(16, 8, 8, 1, 3, 1, tiles=(4, 4)), _Tile(16, 8, 8, 1, 6, 2),
    ),
}  # fmt: skip


def _staged_backward(
    batch: int, hidden: int, lanes: int, element_bytes: int, multiprocessors: int, shared_bytes: int
) -> StagedPlan | None:
    for tile in _STAGED_BACKWARD.get((_padded(hidden), element_bytes), ()):
        groups = multiprocessors // (lanes * -(-hidden // tile.units))
        if not groups or lanes > tile.lanes:
            continue
        rows = -(-batch // groups)
        tiles = -(-rows // tile.rows)
        tiles += tiles > 1 and tiles % 2  # they come in pairs
        if (tile.rows > 8 and rows <= 8) or not tile.tiles[0] <= tiles <= tile.tiles[1]:
            continue
        plan = StagedPlan(tile.units, tile.rows, tiles, tile.slices, tile.unit_warps, tile.pieces, tile.share)
        if plan.shared_bytes_backward(hidden, element_bytes) <= shared_bytes:
            return plan
    return None


def _staged(
    batch: int, hidden: int, lanes: int, element_bytes: int, multiprocessors: int, shared_bytes: int
) -> StagedPlan | str:
    """The plan with the least predicted time of a step, or why there is none."""
    padded = _padded(hidden)
    best = None
    for unit_warps in (8, 4, 2, 1):  # of 8 warps: the others take slices of k
        units, slices = 16 * unit_warps, 8 // unit_warps
        registers = _weight_registers(units, padded, element_bytes)
        if registers > 192 or padded // slices * element_bytes < 128:
            continue
        groups = multiprocessors // (lanes * -(-hidden // units))
        if not groups:
            continue
        rows = -(-batch // groups)
        plan = _staged_tiles(rows, hidden, element_bytes, units, slices, unit_warps, registers, shared_bytes)
        if plan is None:
            continue
        step = _staged_us(plan, registers, plan.programs(lanes, batch, hidden), hidden, element_bytes)
        if best is None or step < best[0]:
            best = step, plan
    if best is not None:
        return best[1]
    return (
        f"{_lanes(lanes)} of H = {hidden} and a batch of {batch}: the weights do not fit the registers and shared memory of "
        f"{multiprocessors} multiprocessors, or more than {_MOST_TILES} tiles follow each other"
    )


_MOST_TILES = 32  # not more than were tested


def _weight_registers(units: int, padded: int, element_bytes: int) -> int:
    """Registers of a thread that weights take in ``staged``."""
    return 3 * units * padded * element_bytes // 1024


def _staged_tiles(
    rows: int, hidden: int, element_bytes: int, units: int, slices: int, unit_warps: int, registers: int, shared_bytes: int
) -> StagedPlan | None:
    """Tiles of the batch for ``rows`` a program.

    fp32: 16 rows, if there are so many (H=256, B=1024: 0.64 and 0.73 ms; H=1024, B=64: 1.40 and 1.52).  Half precision: 8, up
    to six of them, for two tiles hide each other's waits (H=256, B=1024: 0.40 and 0.49 ms; H=1024, B=64: 0.67 and 0.86 ms);
    then 16 (H=256, B=4096: 0.75 and 0.68 ms).
    Of 192 registers for weights some go to shared memory: with 32 up to 64 bytes spill where the gates are saved (code for
    sm_89), with 48 none.  Where a program may have more than 99 KB, 32 are faster (H200, H=1024, B=64: 1.40 ms, with 64 1.52).
    """
    share = 0 if registers < 192 else 3 if shared_bytes <= _SHARED_BYTES else 2
    slice_bytes = _padded(hidden) // slices * element_bytes
    for tile in (16, 8) if rows >= (16 if element_bytes == 4 else 49) else (8,):
        tiles = -(-rows // tile)
        tiles += tiles > 1 and tiles % 2  # they come in pairs
        for pieces in (1, 2, 4):
            in_flight = tile * _padded(hidden) * element_bytes // 1024 // pieces  # registers
            if in_flight not in range(4, 33) or slice_bytes // pieces < 128:
                continue
            if share == 3 and element_bytes == 2 and (pieces == 4 or (slices == 2 and tiles >= 8)):
                continue  # 8 to 24 bytes spill where gates are saved
            ring = crosses_in_ring(_padded(hidden), tiles, element_bytes)
            plan = StagedPlan(units, tile, tiles, slices, unit_warps, pieces, share, ring)
            if tiles <= _MOST_TILES and plan.shared_bytes(hidden, element_bytes) <= shared_bytes:
                return plan
            if tile == 16:
                break  # 8 rows in one piece are faster than 16 in several that need not be (H=512, B=256: 0.31 and 0.40 ms)
    return None


def _staged_us(plan: StagedPlan, registers: int, programs: int, hidden: int, element_bytes: int) -> float:
    """Microseconds of a step on an H200, fitted to 14 plans (docs/results/sweep-h200.json; off by up to a quarter).

    A crossing and two barriers, then for each tile a wait and products in proportion to its weights and rows, and the states
    that all programs read from L2.
    """
    megabytes = 1e-6 * programs * plan.rows * plan.tiles * hidden * element_bytes
    return 0.7 + plan.tiles * (0.15 + 0.55 * registers / 192 * plan.rows / 8) + 0.065 * megabytes


def _lanes(lanes: int) -> str:
    return "one layer" if lanes == 1 else f"{lanes} lanes"


# ---- prediction ---------------------------------------------------------------------------------------------------------

# Microseconds of a step on an H200, medians of docs/results/sweep-h200.json, (100 steps - 16 steps) / 84, by units, padded to a
# power of two, and bytes of an element.  Single values were up to 1.6 times as much.
_RESIDENT_US = {
    (16, 2): 0.26, (16, 4): 0.26, (32, 2): 0.28, (32, 4): 0.33, (64, 2): 0.31, (64, 4): 0.50, (128, 2): 0.59, (128, 4): 0.88,
}  # fmt: skip
_WAVEFRONT_US = {
    (64, 2): 0.5, (64, 4): 0.58, (128, 2): 0.82, (128, 4): 0.93, (256, 2): 0.79, (256, 4): 1.04, (512, 2): 1.15, (512, 4): 1.3,
    (1024, 2): 1.52, (1024, 4): 2.8,
}  # fmt: skip
_STACK = 1.35  # resident: what a step of a stack takes more
_SIXTEEN_ROWS = 1.6  # wavefront: what a tile of 16 rows takes more than one of 8


@dataclass(frozen=True)
class Prediction:
    """What a linear model says of a forward pass; nobody has measured it.

    steps: of the longest chain, over all launches.  us_a_step: microseconds.
    """

    steps: int
    us_a_step: float

    @property
    def us(self) -> float:
        return self.steps * self.us_a_step


def predict(
    plan: WholeSequencePlan,
    *,
    steps: int,
    batch: int,
    hidden: int,
    layers: int,
    element_bytes: int,
    reverse: bool,
    multiprocessors: int = 128,
) -> Prediction:
    """Time of a forward pass by a linear model: number of steps times the time of a step on an H200.

    A launch takes T + lanes - 1 steps where layers run one behind the other, T steps otherwise; that many more times where its
    programs wait for nobody and are more than the GPU has multiprocessors.

    Left out: how a GPU differs from an H200 (clock, tensor cores, L2), the product that makes the input projection, the launch.
    """
    kernel, sizes = plan.kernel, (max(16, _padded(hidden)), element_bytes)
    programs = plan.programs(batch, hidden)
    stack = plan.lanes > 1 and not reverse
    if isinstance(kernel, StagedPlan):
        us = _staged_us(kernel, _weight_registers(kernel.units, *sizes), programs, hidden, element_bytes)
    elif isinstance(kernel, ResidentPlan):
        us = _RESIDENT_US[sizes] * (_STACK if stack else 1)
    else:
        us = _WAVEFRONT_US[sizes] * (_SIXTEEN_ROWS if kernel.rows == 16 else 1)
    waves = 1 if plan.waits(reverse=reverse) else -(-programs // multiprocessors)
    length = (steps + plan.lanes - 1 if stack else steps) * plan.launches(layers, reverse=reverse) * waves
    return Prediction(length, us)
