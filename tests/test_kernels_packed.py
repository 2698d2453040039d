"""The kernels of whole sequences over packed sequences: their mathematics and their hand-over on a CPU."""

from __future__ import annotations

import functools
import itertools

import interpreted
import pytest
import torch
from emulated import EMULATED, one_thread, run

from torch_gru_fuse import equations_packed
from torch_gru_fuse.kernels import aot
from torch_gru_fuse.planner.gpus import gpu_named
from torch_gru_fuse.planner.whole_sequence import (
    ResidentPlan,
    StagedPlan,
    WavefrontPlan,
    WholeSequencePlan,
    packed_plan,
    plan_whole_sequence,
    plan_whole_sequence_backward,
)

prepare = interpreted.load("kernels.prepare")
NAN, INF = float("nan"), float("inf")


def sizes_of(lengths):
    """batch_sizes of these lengths, longest first."""
    return [sum(length > t for length in lengths) for t in range(lengths[0])]


def offsets_of(lengths):
    """What the kernels are told of them."""
    return torch.tensor([0, *itertools.accumulate(sizes_of(lengths)), *lengths], dtype=torch.int32)


class Case:
    """Layers of a GRU or both directions of one over packed sequences, and what float64 says of them.

    Parameters and inputs are of values that tf32 and the kernel's dtype hold.
    """

    LAUNCH_ID = 17

    def __init__(self, lengths, hidden, lanes, dtype, *, reverse=False, masked=False, bias=True, dy=True, dhn=True, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.lengths, self.sizes, self.offsets = lengths, sizes_of(lengths), offsets_of(lengths)
        self.rows, self.batch, self.hidden = sum(lengths), len(lengths), hidden
        self.lanes, self.dtype, self.reverse = lanes, dtype, reverse
        self.directions = 2 if reverse else 1
        grid = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16

        def random(*size, scale=1.0):
            return (torch.randn(size, generator=generator) * scale).to(grid).double()

        weight = (3 * hidden, hidden)
        self.parameters = [
            [random(*weight, scale=hidden**-0.5), random(*weight, scale=hidden**-0.5),
             *((random(weight[0], scale=0.3), random(weight[0], scale=0.3)) if bias else (None, None))]
            for _ in range(lanes)
        ]  # fmt: skip
        self.x, self.hx = random(self.rows, hidden), random(lanes, self.batch, hidden)
        self.masks = None
        if masked:
            self.masks = (torch.rand((lanes - 1, self.rows, hidden), generator=generator) < 0.5).double() * 2
        self.dy = random(self.rows, self.directions * hidden) if dy else None
        self.dhn = random(lanes, self.batch, hidden) if dhn else None

    def solve(self):
        """In float64: ``sequences`` [N, D*H] of the layers, ``gates`` [lanes, N, 4, H] and ``final``."""
        self.sequences, x = [], self.x
        self.gates = x.new_empty(self.lanes, self.rows, 4, self.hidden)
        self.final = torch.empty_like(self.hx)
        for layer in range(self.lanes // self.directions):
            out = x.new_empty(self.rows, self.directions * self.hidden)
            for d in range(self.directions):
                l = layer * self.directions + d
                columns = out[:, d * self.hidden : (d + 1) * self.hidden]
                equations_packed.gru_layer_saving(
                    x, self.hx[l], *self.parameters[l], columns, self.gates[l], self.final[l], d == 1, sizes=self.sizes
                )
            self.sequences.append(out)
            x = out
            if self.masks is not None and layer + 1 < self.lanes:
                x = out * self.masks[layer]
        return self

    def to(self, *tensors):
        return [None if t is None else t.detach().to(self.dtype).contiguous() for t in tensors]

    def forward(self, plan, *, missing=0):
        """Runs the kernel; what it fills is in ``out``, ``below``, ``h_n``, ``saved``, ``error``."""
        lanes, rows, hidden, dtype = self.lanes, self.rows, self.hidden, self.dtype
        module = getattr(EMULATED, plan.name)
        stack = lanes > 1 and not self.reverse
        w_ih, w_hh, b_ih, b_hh = (self.to(*kind) for kind in zip(*self.parameters, strict=True))
        x, hx, masks = self.to(self.x, self.hx, self.masks)
        gi = [(x.float() @ w.float().T).to(dtype) for w in w_ih[: self.directions]]
        nan = lambda *size: torch.full(size, NAN, dtype=dtype)  # noqa: E731
        self.out, self.below = nan(rows, self.directions * hidden), nan(lanes - 1, rows, hidden) if stack else None
        self.h_n, self.saved = nan(lanes, self.batch, hidden), nan(lanes, rows, 4, hidden)
        self.error, self.host = torch.full((4,), -1), torch.zeros(1, dtype=torch.int32)
        polls_own = plan.name != "resident"
        h0 = None
        if polls_own:
            h0 = nan(self.batch, 2 * hidden) if self.reverse else nan(lanes, self.batch, hidden)
        grid, arguments = prepare.prepare_launch(
            hx, self.host, self.LAUNCH_ID, self.out, self.below, h0, self.h_n, self.error, reverse=self.reverse,
            fill_out=polls_own,
        )  # fmt: skip
        prepare.prepare_kernel[grid](**arguments)
        options = {}
        if masks is not None:
            integer = torch.int16 if dtype.itemsize == 2 else torch.int32
            options = {"masks": masks, "handed": torch.full(self.below.shape, -1, dtype=integer).view(dtype)}
        no_bias = b_ih[0] is None
        grid, arguments = getattr(module, f"{plan.name}_launch")(
            torch.stack(gi) if self.reverse else gi[0], hx if h0 is None else h0, self.below, w_ih[self.directions :], w_hh,
            None if no_bias else b_ih, None if no_bias else b_hh, self.out, self.h_n, self.saved, self.error, plan=plan,
            offsets=self.offsets, **options,
        )  # fmt: skip
        with one_thread():
            run(getattr(module, f"{plan.name}_kernel"), (grid[0] - missing,), arguments)
        return self

    def backward(self, plan, *, missing=0, **changed):
        """Runs the kernel of the backward; what it fills is in ``d_gates``, ``dhx``, ``sums``, ``error``."""
        self.solve()
        lanes, hidden = self.lanes, self.hidden
        module = getattr(EMULATED, f"{plan.name}_backward")
        stack = lanes > 1 and not self.reverse
        w_ih, w_hh, *_ = (self.to(*kind) for kind in zip(*self.parameters, strict=True))
        names = ("dy", "dhn", "h0", "out", "below", "gates", "masks")
        below = torch.stack(self.sequences[:-1]) if stack else None
        values = self.to(self.dy, self.dhn, self.hx, self.sequences[-1], below, self.gates, self.masks)
        inputs = dict(zip(names, values, strict=True)) | changed
        integer = torch.int32 if self.dtype == torch.float32 else torch.int16
        self.d_gates = torch.full(inputs["gates"].shape, -1, dtype=integer).view(self.dtype)
        self.dhx = torch.full_like(inputs["h0"], NAN)
        programs = -(-self.batch // (plan.rows * getattr(plan, "tiles", 1)))
        self.sums = torch.full((lanes, programs, 4, hidden), NAN)
        self.error, self.host = torch.zeros(4, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
        self.error[1], self.error[2] = self.host.data_ptr(), self.LAUNCH_ID
        grid, arguments = getattr(module, f"{plan.name}_backward_launch")(
            **inputs, w_ih=w_ih[1:] if stack else [], w_hh=w_hh, d_gates=self.d_gates, dhx=self.dhx, sums=self.sums,
            error=self.error, plan=plan, offsets=self.offsets,
        )  # fmt: skip
        with one_thread():
            run(getattr(module, f"{plan.name}_backward_kernel"), (grid[0] - missing,), arguments)
        return self

    def expected_gradients(self):
        """dhx, d_gates [lanes, N, 4, H] as (hn, r, z, n), and their sums, in float64."""
        grad, dhx, d_gates = self.dy, torch.empty_like(self.hx), torch.empty_like(self.gates)
        for layer in reversed(range(self.lanes // self.directions)):
            dx = None
            for d in range(self.directions):
                l = layer * self.directions + d
                columns = slice(d * self.hidden, (d + 1) * self.hidden)
                # as an input projection without weights the gradient of x is that of (r, z, n)
                w_ih, w_hh, b_ih, b_hh = self.parameters[l]
                gi = self.gates.new_zeros(self.rows, 3 * self.hidden)
                d_gi, d_h0, *_, d_b_ih, d_b_hh = equations_packed.gru_layer_backward(
                    None if grad is None else grad[:, columns], None if self.dhn is None else self.dhn[l], gi, self.hx[l],
                    self.sequences[layer][:, columns], torch.eye(3 * self.hidden).double(), w_hh, b_ih, b_hh, d == 1,
                    sizes=self.sizes, gates=self.gates[l],
                )  # fmt: skip
                dhx[l] = d_h0
                d_r, d_z, d_n = d_gi.chunk(3, 1)
                d_gates[l] = torch.stack((d_n * self.gates[l, :, 0], d_r, d_z, d_n), 1)
                dx = d_gi @ w_ih if dx is None else dx + d_gi @ w_ih
            grad = dx
            if self.masks is not None and layer > 0:
                grad = dx * self.masks[layer - 1]
        return dhx, d_gates, d_gates.sum(1)


# A step rounds h once and its operands not at all, except tf32's h and 16-bit gi; the gates contract what came before.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}
RAGGED = (6, 6, 5, 4, 4, 4, 3, 3, 2, 1)  # of two tiles of 8 rows the second ends after two steps

WAVEFRONT_CASES = [
    # lengths, hidden, lanes, dtype, plan, options
    pytest.param((5, 3, 1), 32, 3, torch.float16, WavefrontPlan(16, 8, 2), {}, id="stack, after"),
    pytest.param(RAGGED, 32, 2, torch.float16, WavefrontPlan(16, 8, 2), {"masked": True}, id="stack, after, dropout, tiles"),
    pytest.param(RAGGED, 32, 3, torch.float32, WavefrontPlan(16, 16, 2, 2), {"masked": True}, id="stack, beside, dropout"),
    pytest.param(RAGGED, 32, 2, torch.bfloat16, WavefrontPlan(16, 8, 2, 2, store_first=True), {}, id="stack, beside, tiles"),
    pytest.param(RAGGED, 32, 2, torch.float16, WavefrontPlan(16, 8, 2), {"reverse": True}, id="two directions"),
    pytest.param((5, 5, 2, 2, 1), 48, 2, torch.float32, WavefrontPlan(16, 8, 2), {"reverse": True}, id="directions, 48 units"),
    pytest.param((4, 4, 4), 48, 2, torch.float16, WavefrontPlan(16, 8, 4), {}, id="equal lengths"),
    pytest.param((3,) * 17, 32, 2, torch.float32, WavefrontPlan(16, 8, 2), {"reverse": True}, id="equal lengths, directions"),
    pytest.param((5, *[4] * 30, *[1] * 10), 64, 1, torch.float16, WavefrontPlan(64, 32, 2, unit_warps=2), {}, id="wide tile"),
    pytest.param((7, *[1] * 9), 64, 1, torch.float32, WavefrontPlan(16, 8, 2), {}, id="one layer, one is long"),
    pytest.param((9,), 32, 2, torch.float32, WavefrontPlan(16, 8, 2), {"reverse": True}, id="one sequence"),
    pytest.param((1, 1, 1), 32, 2, torch.float16, WavefrontPlan(16, 8, 2), {}, id="one step"),
    pytest.param((1, 1), 32, 2, torch.float16, WavefrontPlan(16, 8, 2, 2), {}, id="one step, beside"),
    pytest.param((1,), 32, 2, torch.float16, WavefrontPlan(16, 8, 2), {"reverse": True}, id="one step, directions"),
]  # fmt: skip
RESIDENT_CASES = [
    pytest.param(RAGGED, 32, 1, torch.float32, ResidentPlan(32, 8, 2), {}, id="one layer"),
    pytest.param(RAGGED, 32, 3, torch.float16, ResidentPlan(32, 8, 2, early=True), {"masked": True}, id="stack, dropout"),
    pytest.param((5, 3, 3, 1), 48, 2, torch.bfloat16, ResidentPlan(64, 8, 4), {}, id="stack, 48 units"),
    pytest.param(RAGGED, 16, 2, torch.float32, ResidentPlan(16, 8, 1), {"reverse": True}, id="two directions"),
    pytest.param((7, 4), 16, 2, torch.float16, ResidentPlan(16, 8, 1), {"reverse": True, "bias": False}, id="no biases"),
    pytest.param((3,) * 9, 16, 2, torch.float32, ResidentPlan(16, 8, 1), {"reverse": True}, id="equal lengths"),
    pytest.param((1, 1), 16, 2, torch.float32, ResidentPlan(16, 8, 1), {}, id="one step"),
    pytest.param((2,), 16, 1, torch.float32, ResidentPlan(16, 8, 1), {}, id="two steps"),
]  # fmt: skip


# In three tiles and more a pair of them begins late and ends early.
MANY = (7, 7, *[6] * 9, *[5] * 7, *[4] * 8, *[2] * 5, 1, 1)
STAGED_CASES = [
    pytest.param(RAGGED, 64, 1, torch.float16, StagedPlan(16, 8, 1, 1, 1), {}, id="one tile"),
    pytest.param(RAGGED, 64, 2, torch.float32, StagedPlan(16, 8, 2, 2, 1), {"reverse": True}, id="two tiles, directions"),
    pytest.param(MANY, 64, 1, torch.float32, StagedPlan(16, 8, 4, 1, 2), {}, id="four tiles"),
    pytest.param(MANY, 64, 2, torch.float16, StagedPlan(32, 8, 4, 1, 2), {"reverse": True}, id="four tiles, directions"),
    pytest.param(MANY, 128, 1, torch.bfloat16, StagedPlan(16, 8, 6, 1, 1, pieces=2, share=1), {}, id="in pieces"),
    pytest.param((3,) * 20, 64, 2, torch.float16, StagedPlan(16, 16, 1, 1, 1), {"reverse": True}, id="equal lengths"),
    pytest.param((1,) * 5, 64, 2, torch.float16, StagedPlan(16, 8, 2, 1, 1), {"reverse": True}, id="one step"),
    pytest.param((9, *[2] * 30), 64, 2, torch.float32, StagedPlan(32, 8, 4, 1, 2), {"reverse": True}, id="one is long"),
]  # fmt: skip


@pytest.mark.parametrize(
    "lengths, hidden, lanes, dtype, plan, options",
    [*WAVEFRONT_CASES, *RESIDENT_CASES, *(pytest.param(*c.values, id=f"staged, {c.id}") for c in STAGED_CASES)],
)
def test_forward(lengths, hidden, lanes, dtype, plan, options):
    case = Case(lengths, hidden, lanes, dtype, **options).forward(plan).solve()
    assert case.error[0] == 0 and case.host == 0
    results = [case.out, case.h_n, case.saved, *([] if case.below is None else case.below)]
    for ours, theirs in zip(results, [case.sequences[-1], case.final, case.gates, *case.sequences[:-1]], strict=True):
        assert (ours.double() - theirs).abs().max() < TOLERANCE[dtype] * max(1, theirs.abs().max())


BACKWARD_CASES = [
    # lengths, hidden, lanes, dtype, plan, options
    pytest.param((5, 3, 1), 32, 3, torch.float16, WavefrontPlan(16, 8, 2), {}, id="stack, after"),
    pytest.param(RAGGED, 32, 2, torch.float32, WavefrontPlan(16, 8, 2), {"masked": True}, id="stack, after, dropout, tiles"),
    pytest.param(RAGGED, 32, 3, torch.float32, WavefrontPlan(16, 16, 2, 2), {}, id="stack, beside"),
    pytest.param(RAGGED, 32, 2, torch.bfloat16, WavefrontPlan(16, 8, 2, 2), {"masked": True}, id="stack, beside, dropout"),
    pytest.param(RAGGED, 32, 2, torch.float16, WavefrontPlan(16, 8, 2), {"reverse": True}, id="two directions"),
    pytest.param((5, 5, 2, 2, 1), 48, 2, torch.float32, WavefrontPlan(16, 8, 2), {"reverse": True}, id="directions, 48 units"),
    pytest.param((4, 4, 4), 48, 2, torch.float16, WavefrontPlan(16, 8, 4), {}, id="equal lengths"),
    pytest.param((3,) * 17, 32, 2, torch.float32, WavefrontPlan(16, 8, 2), {"reverse": True}, id="equal lengths, directions"),
    pytest.param((5, *[4] * 30, *[1] * 10), 64, 1, torch.float16, WavefrontPlan(64, 32, 2, unit_warps=2), {}, id="wide tile"),
    pytest.param((7, *[1] * 9), 64, 1, torch.float32, WavefrontPlan(16, 8, 2), {"dhn": False}, id="one is long, no dhn"),
    pytest.param((4, 2, 1), 32, 2, torch.float32, WavefrontPlan(16, 8, 2), {"dy": False}, id="no dy"),
    pytest.param((9,), 32, 2, torch.float32, WavefrontPlan(16, 8, 2), {"reverse": True}, id="one sequence"),
    pytest.param((1, 1, 1), 32, 2, torch.float16, WavefrontPlan(16, 8, 2), {}, id="one step"),
    pytest.param((1, 1), 32, 2, torch.float16, WavefrontPlan(16, 8, 2, 2), {}, id="one step, beside"),
    pytest.param((1,), 32, 2, torch.float16, WavefrontPlan(16, 8, 2), {"reverse": True}, id="one step, directions"),
    pytest.param(RAGGED, 32, 1, torch.float16, ResidentPlan(32, 8, 2), {}, id="resident"),
    pytest.param(RAGGED, 64, 1, torch.float32, ResidentPlan(64, 8, 4), {"dhn": False}, id="resident, 64 units, no dhn"),
    pytest.param(RAGGED, 48, 2, torch.bfloat16, ResidentPlan(64, 8, 4), {"reverse": True}, id="resident, two directions"),
    pytest.param((9, 9, 4), 32, 2, torch.float32, ResidentPlan(32, 8, 2), {"reverse": True, "dy": False}, id="resident, no dy"),
    pytest.param((3,) * 9, 16, 2, torch.float32, ResidentPlan(16, 8, 1), {"reverse": True}, id="resident, equal lengths"),
    pytest.param((1, 1), 16, 1, torch.float16, ResidentPlan(16, 8, 1), {}, id="resident, one step"),
    pytest.param((7, *[1] * 9), 16, 2, torch.float32, ResidentPlan(16, 8, 1), {"reverse": True}, id="resident, one is long"),
]  # fmt: skip


@pytest.mark.parametrize(
    "lengths, hidden, lanes, dtype, plan, options",
    [*BACKWARD_CASES, *(pytest.param(*c.values, id=f"staged, {c.id}") for c in STAGED_CASES)],
)
def test_backward(lengths, hidden, lanes, dtype, plan, options):
    case = Case(lengths, hidden, lanes, dtype, **options).backward(plan)
    assert case.error[0] == 0 and case.host == 0
    dhx, d_gates, sums = case.expected_gradients()
    for ours, theirs in ((case.dhx, dhx), (case.d_gates, d_gates), (case.sums.sum(1), sums)):
        assert ours.shape == theirs.shape
        assert (ours.double() - theirs).abs().max() <= 2 * TOLERANCE[dtype] * theirs.abs().max()


# ---- one row and the others ---------------------------------------------------------------------------------------------

ONE_LAUNCH = [
    pytest.param(2, {}, WavefrontPlan(16, 8, 2), id="stack"),
    pytest.param(2, {}, WavefrontPlan(16, 8, 2, 2), id="stack, beside"),
    pytest.param(2, {"reverse": True}, WavefrontPlan(16, 8, 2), id="two directions"),
    pytest.param(2, {"reverse": True}, ResidentPlan(64, 8, 4), id="resident"),
    pytest.param(2, {"reverse": True}, StagedPlan(16, 8, 2, 1, 1), id="staged"),
]


def rows_of_sequence(sizes, b):
    """Where its rows are in packed data."""
    starts = [0, *itertools.accumulate(sizes)]
    return [starts[t] + b for t, size in enumerate(sizes) if b < size]


LENGTHS = (4, 3, 2, 2, 1)
NOT_FINITE = [  # each value, dtype and place of a sequence with each of the others
    (NAN, torch.float32, 0), (INF, torch.float16, 0), (INF, torch.float32, 2), (NAN, torch.float16, 2), (NAN, torch.float32, 4),
    (INF, torch.float16, 4),
]  # fmt: skip


@functools.cache
def finite_results(lanes, reverse, plan, dtype):
    """Forward and backward, of which the tests change one sequence."""
    forward, backward = (Case(LENGTHS, 64, lanes, dtype, reverse=reverse) for _ in range(2))
    return forward.forward(plan), backward.backward(plan)


@pytest.mark.parametrize("lanes, options, plan", ONE_LAUNCH)
@pytest.mark.parametrize("value, dtype, sequence", NOT_FINITE)
def test_not_finite_in_one_sequence_stays_there(lanes, options, plan, value, dtype, sequence):
    """In its initial state and, backward, in the gradient of its last: of the longest, of one between, of the shortest."""
    finite, finite_backward = finite_results(lanes, options.get("reverse", False), plan, dtype)
    case = Case(LENGTHS, 64, lanes, dtype, **options)
    case.hx[:, sequence, 5] = value
    case.forward(plan)
    assert case.error[0] == 0
    own = rows_of_sequence(case.sizes, sequence)
    others = [row for row in range(case.rows) if row not in own]
    assert not case.out[own].isfinite().all() and torch.equal(case.out[others], finite.out[others])
    rest = [b for b in range(case.batch) if b != sequence]
    assert torch.equal(case.h_n[:, rest], finite.h_n[:, rest]) and torch.equal(case.saved[:, others], finite.saved[:, others])
    finite, case = finite_backward, Case(LENGTHS, 64, lanes, dtype, **options)
    case.dhn[:, sequence, 5] = value
    case.backward(plan)
    assert case.error[0] == 0
    assert not case.dhx[:, sequence].isfinite().all() and torch.equal(case.dhx[:, rest], finite.dhx[:, rest])
    assert torch.equal(case.d_gates[:, others], finite.d_gates[:, others])


@pytest.mark.parametrize("lanes, options, plan", ONE_LAUNCH)
def test_the_same_bits_again_and_beside_others(lanes, options, plan):
    """A sequence gives what it gives alone, whatever lies beside it in a tile."""
    first, second = (Case(RAGGED, 64, lanes, torch.float32, **options) for _ in range(2))
    first.forward(plan)
    second.forward(plan)
    for name in ("out", "h_n", "saved"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    alone = Case(RAGGED[3:4], 64, lanes, torch.float32, **options)
    own = rows_of_sequence(first.sizes, 3)
    alone.parameters, alone.x, alone.hx = first.parameters, first.x[own], first.hx[:, 3:4]
    alone.forward(plan)
    torch.testing.assert_close(alone.out, first.out[own], rtol=0, atol=1e-6)  # gi by another product
    gradients = [Case(RAGGED, 64, lanes, torch.float32, **options).backward(plan) for _ in range(2)]
    for name in ("d_gates", "dhx", "sums"):
        assert torch.equal(*(getattr(case, name) for case in gradients))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_wait_ends(reverse):
    for run_case in (Case.forward, Case.backward):
        case = run_case(Case((4, 4, 2, 1), 32, 2, torch.float16, reverse=reverse), WavefrontPlan(16, 8, 2), missing=1)
        assert case.error[0] != 0 and case.host == case.LAUNCH_ID
        result = case.out if run_case is Case.forward else case.dhx
        assert result.isnan().any()


# ---- compiled -----------------------------------------------------------------------------------------------------------

SHAPES = {
    # batch, hidden, layers, two directions
    "deep": (10, 256, 6, False),
    "speech": (32, 256, 2, False),
    "two directions": (10, 256, 2, True),
    "h64": (64, 64, 1, False),
    "h128": (64, 128, 2, True),
    "h512": (16, 512, 2, False),
    "h1024": (8, 1024, 1, False),
    "rl": (256, 256, 1, False),
    "wide": (1024, 256, 1, False),
}


@pytest.mark.parametrize(
    "dtype, capability", [(torch.float16, 89), (torch.bfloat16, 89), (torch.float32, 89), (torch.float16, 90)]
)
@pytest.mark.parametrize("name", SHAPES)
def test_planned_launches_compile(name, dtype, capability):
    """No spills, 99 KB of shared memory, all programs resident, with dropout where there may be some."""
    batch, hidden, layers, reverse = SHAPES[name]
    gpu = gpu_named("rtx4090" if capability == 89 else "h100")
    options = {"reverse": reverse, "multiprocessors": gpu.multiprocessors}
    lanes = 2 if reverse else layers
    for planned, backward, compiled in (
        (plan_whole_sequence, False, functools.partial(aot.compile_whole_sequence, save_gates=True)),
        (plan_whole_sequence_backward, True, aot.compile_whole_sequence_backward),
    ):
        plan = planned(batch, hidden, lanes, dtype.itemsize, **options)
        for_packed = {"backward": backward, "multiprocessors": gpu.multiprocessors}
        plan = plan and packed_plan(plan, batch, hidden, dtype.itemsize, **for_packed)
        if not isinstance(plan, WholeSequencePlan):
            assert name in ("h1024", "h512")  # no plan for padded ones, either
            continue
        stack = plan.lanes > 1 and not reverse
        taken = compiled(
            dtype, plan, batch=batch, hidden=hidden, reverse=reverse, masked=stack, packed=True, capability=capability
        )
        spare = 4 if name == "h512" and dtype == torch.float32 and not backward else 0  # Triton 3.7, with dropout; 3.6: none
        assert taken.spill_bytes <= spare and taken.shared_bytes <= 99 * 1024
        if plan.waits(reverse=reverse):
            resident = gpu.resident_programs(taken.registers, plan.kernel.num_warps, taken.shared_bytes)
            assert plan.programs(batch, hidden) <= gpu.multiprocessors * resident
