"""Plans of the kernels that run whole sequences in one launch: pure functions of sizes, without Triton and without a GPU.

A launch runs ``lanes`` recurrences at once: all layers of a stack, one layer, or the two directions of a layer.
``kernels.wavefront`` spreads the units of a lane over programs, ``kernels.resident`` gives a program all units of a lane; their
docstrings say how.  A program has a multiprocessor to itself; programs that wait for each other must be on the GPU at once.

Plans are made for multiprocessors of 64 K registers and programs of 99 KB of shared memory (compute capability 8.6, 8.9, 12.0;
8.0 and 9.0 have more).  That the planned code spills nothing there is what the tests check with the compiler.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from .gpus import GPU

__all__ = [
    "Measured",
    "Prediction",
    "ResidentPlan",
    "WavefrontPlan",
    "WholeSequencePlan",
    "plan_resident",
    "plan_wavefront",
    "plan_whole_sequence",
    "predict",
    "why_no_plan",
    "why_not_gpu",
]

_REGISTERS_PER_SM = 65536
_SHARED_BYTES = 99 * 1024  # of a program
_MOST_HIDDEN = 1024


@dataclass(frozen=True)
class WavefrontPlan:
    """How ``wavefront_kernel`` spreads a layer.  All sizes but ``ahead`` are powers of two.

    units, rows: the tile of one program, units at least 16, rows at least 8; ``tiles`` of them follow each other in the batch.
    slices: warps along k for h; input_slices: as many for the input of a higher layer, or 0.
    unit_warps: warps along the units.
    early: read the next tile before the gates of this one; or, if the input comes after h, before h.
    store_first: a barrier between storing h and adding up the input of the next step.
    share_n: keep W_hn (and W_in) in shared memory, where registers do not hold all.
    ahead: steps that prefetches run ahead.
    """

    name: ClassVar[str] = "wavefront"
    units: int
    rows: int
    tiles: int
    slices: int
    input_slices: int = 0
    unit_warps: int = 1
    early: bool = False
    store_first: bool = False
    share_n: bool = False
    ahead: int = 4

    @property
    def num_warps(self) -> int:
        return (self.slices + self.input_slices) * self.unit_warps

    def programs(self, lanes: int, batch: int, hidden: int) -> int:
        return lanes * -(-hidden // self.units) * -(-batch // (self.rows * self.tiles))


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
class WholeSequencePlan:
    """``kernel`` for ``lanes`` at once: all layers of a stack, one of them, or both directions of a layer."""

    lanes: int
    kernel: WavefrontPlan | ResidentPlan

    def programs(self, batch: int, hidden: int) -> int:
        """Programs of one launch."""
        if isinstance(self.kernel, ResidentPlan):
            return self.kernel.programs(self.lanes, batch)
        return self.kernel.programs(self.lanes, batch, hidden)

    def launches(self, layers: int, *, reverse: bool) -> int:
        """Launches of a whole GRU of so many layers, one after the other."""
        return layers * (2 if reverse else 1) // self.lanes

    def waits(self, *, reverse: bool) -> bool:
        """Whether programs wait for each other: then all of them must be on the GPU at once.

        Of ``resident`` only the layers of a stack do; other programs of it may come one after the other.
        """
        return isinstance(self.kernel, WavefrontPlan) or (self.lanes > 1 and not reverse)


# ---- plans --------------------------------------------------------------------------------------------------------------

# Plans for batches that give every program more than one tile, and the most tiles without spills: by hidden units (padded to
# a power of two) and bytes of an element.  Weights take 96 registers of a thread of 8 warps, in the last entry 192, of which a
# third goes to shared memory.
_TILES = {
    (256, 2): (WavefrontPlan(64, 16, 1, slices=2, unit_warps=4, early=True), 2),
    (512, 2): (WavefrontPlan(32, 16, 1, slices=8, early=True), 2),
    (1024, 2): (WavefrontPlan(16, 16, 1, slices=8, early=True), 4),
    (256, 4): (WavefrontPlan(32, 16, 1, slices=4, unit_warps=2), 4),
    (512, 4): (WavefrontPlan(16, 16, 1, slices=8, early=True), 4),
    (1024, 4): (WavefrontPlan(16, 8, 1, slices=8, share_n=True), 4),
}
# The same where H is not a power of two: vectors beyond H need addresses of their own, up to 20 registers.  At H=200 the plans
# above spill, fp16 8 to 16 bytes and fp32 8, two directions with saved gates.
_TILES_PADDED = {
    (256, 2): (WavefrontPlan(32, 16, 1, slices=4, unit_warps=2, early=True), 4),
    (512, 2): (_TILES[512, 2][0], 2),
    (1024, 2): (_TILES[1024, 2][0], 2),
    (256, 4): (WavefrontPlan(32, 16, 1, slices=4, unit_warps=2, share_n=True), 2),
    (512, 4): (_TILES[512, 4][0], 2),
    (1024, 4): (_TILES[1024, 4][0], 1),
}


def plan_wavefront(
    batch: int, hidden: int, lanes: int, element_bytes: int, *, stack: bool, multiprocessors: int = 128
) -> WavefrontPlan | None:
    """Plan for ``lanes`` in one launch, or None if they do not fit: one program a multiprocessor, all at once, no spills."""
    _check(batch, hidden, lanes, element_bytes, multiprocessors, reverse=False)
    plan = _wavefront(batch, hidden, lanes, element_bytes, stack, multiprocessors)
    return plan if isinstance(plan, WavefrontPlan) else None


def plan_resident(hidden: int, element_bytes: int, *, stack: bool) -> ResidentPlan | None:
    """Plan for one launch of any number of lanes and any batch, or None: the weights must fit the registers of 8 warps."""
    _check(1, hidden, 1, element_bytes, 1, reverse=False)
    units = max(16, 1 << (hidden - 1).bit_length())
    registers = 3 * units * element_bytes // 8 * (2 if stack else 1)  # of a thread, for weights
    # 192 leaves enough for one layer; a stack, which holds x as well, spilled there (H=64 fp32: 40 bytes, H=128 fp16: 48).
    if units > 128 or registers > (96 if stack else 192):
        return None
    return ResidentPlan(units, rows=8, num_warps=units // 16, early=stack and element_bytes == 2)


def plan_whole_sequence(
    batch: int, hidden: int, lanes: int, element_bytes: int, *, reverse: bool, multiprocessors: int = 128
) -> WholeSequencePlan | None:
    """The plan for a stack of ``lanes`` layers, or, if ``reverse``, for the two directions of a layer; None: no such launch.

    ``why_no_plan`` of the same arguments says why.  ``element_bytes`` is 2 or, for float32 whose products use TF32, 4.
    """
    plan = _whole_sequence(batch, hidden, lanes, element_bytes, reverse, multiprocessors)
    return plan if isinstance(plan, WholeSequencePlan) else None


def why_no_plan(
    batch: int, hidden: int, lanes: int, element_bytes: int, *, reverse: bool, multiprocessors: int = 128
) -> str | None:
    """Why ``plan_whole_sequence`` has no plan; None where it has one."""
    plan = _whole_sequence(batch, hidden, lanes, element_bytes, reverse, multiprocessors)
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
    batch: int, hidden: int, lanes: int, element_bytes: int, reverse: bool, multiprocessors: int
) -> WholeSequencePlan | str:
    """The plan, or why there is none."""
    _check(batch, hidden, lanes, element_bytes, multiprocessors, reverse=reverse)
    stack = lanes > 1 and not reverse
    reason = ""
    for together in (True, False) if stack else (True,):  # all layers at once, or one after the other
        number = lanes if together else 1
        kernel = plan_resident(hidden, element_bytes, stack=stack and together)
        if kernel is None or kernel.programs(number, batch) > multiprocessors:
            other = _wavefront(batch, hidden, number, element_bytes, stack and together, multiprocessors)
            if isinstance(other, WavefrontPlan):
                kernel = other
            elif stack and together:
                kernel = None  # its programs would wait for others that are not on the GPU
            reason = other if isinstance(other, str) else ""
        if kernel is not None:
            return WholeSequencePlan(number, kernel)
    return reason


def _wavefront(
    batch: int, hidden: int, lanes: int, element_bytes: int, stack: bool, multiprocessors: int
) -> WavefrontPlan | str:
    """The plan, or why there is none."""
    if hidden > _MOST_HIDDEN:
        return f"H = {hidden}: the weights of a layer of more than {_MOST_HIDDEN} units do not fit the registers of the GPU"
    padded = 1 << (hidden - 1).bit_length()
    if padded < 64:
        return f"H = {hidden}: a layer of up to 32 units is not worth spreading"
    # Latency: 16 units, the least that an mma instruction takes, and as few batch rows as the number of programs allows.
    # Slices of 64, 4 warps at H=256: with 8 slices of 32 the exchange costs more than it saves (1.11 and 0.79 us a step).
    groups = multiprocessors // (lanes * -(-hidden // 16))
    rows = -(-batch // groups) if groups else 1 << 30
    slices = {64: 2, 128: 4, 256: 4, 512: 8, 1024: 8}[padded]
    exact = hidden == padded
    if rows <= 8 or (rows <= 16 and (padded, element_bytes) != (1024, 4)):
        tile = 8 if rows <= 8 else 16
        if not stack:
            return WavefrontPlan(16, tile, 1, slices, share_n=(padded, element_bytes) == (1024, 4))
        if padded <= 256:
            if element_bytes == 2:
                return WavefrontPlan(16, tile, 1, slices, early=True)
            # The second set of weights would need 8 slices, twice the exchange: twice the warps instead.
            return WavefrontPlan(16, tile, 1, slices, input_slices=slices, store_first=True)
        if padded == 512 and (element_bytes == 2 or (tile == 8 and exact)):
            return WavefrontPlan(16, tile, 1, slices, early=element_bytes == 2)  # early would spill fp32: 32 bytes
        return f"H = {hidden}: the weights of both projections of a stacked layer do not fit the registers of its programs"
    if stack:
        return f"{lanes} layers of H = {hidden} and a batch of {batch} need more than {multiprocessors} programs at once"
    if (padded, element_bytes) not in _TILES:
        return f"H = {hidden}: no tile for a batch of {batch}"
    plan, most = (_TILES if exact else _TILES_PADDED)[padded, element_bytes]
    groups = multiprocessors // (lanes * -(-hidden // plan.units))
    if not groups:
        needed = lanes * -(-hidden // plan.units)
        return f"H = {hidden} in {_lanes(lanes)} needs {needed} programs at once, the GPU holds {multiprocessors}"
    tiles = 1 << (-(-batch // (plan.rows * groups)) - 1).bit_length()
    if tiles > most:
        largest = most * plan.rows * groups
        return f"a batch of {batch} is more than {largest}, the most for H = {hidden} in {_lanes(lanes)} without spills"
    return replace(plan, tiles=tiles, early=plan.early and tiles == 2)  # early with 4 tiles would spill: 72 to 288 bytes


def _lanes(lanes: int) -> str:
    return "one layer" if lanes == 1 else f"{lanes} lanes"


# ---- prediction ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A row of the table in docs/design/whole-sequence.md: one shape, measured on one H200 with a prototype of the kernels."""

    shape: str
    element_bytes: int
    milliseconds: float
    steps: int
    batch: int
    hidden: int
    lanes: int = 1
    reverse: bool = False
    launches: int = 1
    tiles: int = 1

    @property
    def us_a_step(self) -> float:
        return 1e3 * self.milliseconds / (self.launches * _wavefront_steps(self.steps, self.lanes, self.reverse))


# Where the table has several versions of a shape, the one whose plan is the nearest to the present.
_MEASURED = (
    Measured("kb39", 2, 0.594, steps=512, batch=10, hidden=256, lanes=6),
    Measured("kb39", 4, 0.783, steps=512, batch=10, hidden=256, lanes=6),
    Measured("stream", 2, 0.823, steps=1000, batch=1, hidden=256, lanes=2),
    Measured("stream", 4, 0.912, steps=1000, batch=1, hidden=256, lanes=2),
    Measured("speech", 2, 1.106, steps=1000, batch=32, hidden=256, lanes=2),
    Measured("speech", 4, 1.260, steps=1000, batch=32, hidden=256, lanes=2),
    Measured("h512", 2, 0.453, steps=256, batch=16, hidden=512, lanes=2),
    Measured("h512", 4, 0.620, steps=256, batch=16, hidden=512, lanes=2),
    Measured("kb41", 2, 2.674, steps=512, batch=10, hidden=256, lanes=2, reverse=True, launches=6),
    Measured("kb41", 4, 3.143, steps=512, batch=10, hidden=256, lanes=2, reverse=True, launches=6),
    Measured("big", 2, 0.940, steps=256, batch=64, hidden=1024, tiles=2),
    Measured("big", 4, 2.013, steps=256, batch=64, hidden=1024, tiles=2),
    Measured("rl", 2, 0.294, steps=64, batch=256, hidden=512, tiles=2),
    Measured("rl", 4, 0.412, steps=64, batch=256, hidden=512, tiles=4),
    Measured("wide", 2, 0.748, steps=128, batch=1024, hidden=256, tiles=2),
    Measured("wide", 4, 0.995, steps=128, batch=1024, hidden=256, tiles=4),
    Measured("h128", 2, 0.166, steps=200, batch=128, hidden=128),
    Measured("h128", 4, 0.197, steps=200, batch=128, hidden=128),
    Measured("h64", 2, 0.141, steps=200, batch=64, hidden=64, lanes=2),
    Measured("h64", 4, 0.173, steps=200, batch=64, hidden=64, lanes=2),
)


@dataclass(frozen=True)
class Prediction:
    """What a linear model says of a forward pass; nobody has measured it.

    steps: of the longest chain, over all launches.  us_a_step: microseconds.  source: the measured shape that it comes from.
    """

    steps: int
    us_a_step: float
    source: Measured

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
    """Time of a forward pass by a linear model: number of steps times the time of a step of the nearest measured shape.

    A launch takes T + lanes - 1 steps where layers run one behind the other, T steps otherwise; that many more times where its
    programs wait for nobody and are more than the GPU has multiprocessors.  The nearest shape is one of the same padded H (64
    for less) and element size, if possible also with one tile or several as here and stacked or not as here, and then of the
    nearest batch; with another number of tiles the time of a step is taken to be proportional to it.

    Left out: how a GPU differs from an H200 (clock, tensor cores, L2), the number of inputs, what changed in the kernels since.
    """
    stack = plan.lanes > 1 and not reverse
    tiles = plan.kernel.tiles if isinstance(plan.kernel, WavefrontPlan) else 1
    padded = max(64, 1 << (hidden - 1).bit_length())
    source = min(
        (m for m in _MEASURED if (m.element_bytes, m.hidden) == (element_bytes, padded)),
        key=lambda m: (
            (m.tiles > 1) != (tiles > 1),
            (m.lanes > 1 and not m.reverse) != stack,
            abs(math.log2(m.batch / batch)),
        ),
    )
    waves = -(-plan.programs(batch, hidden) // multiprocessors)
    length = _wavefront_steps(steps, plan.lanes, reverse) * plan.launches(layers, reverse=reverse) * waves
    return Prediction(length, source.us_a_step * tiles / source.tiles, source)


def _wavefront_steps(steps: int, lanes: int, reverse: bool) -> int:
    return steps if reverse else steps + lanes - 1
