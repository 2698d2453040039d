"""The backward that stages gate gradients in shared memory: its mathematics and its hand-over on a CPU, its layouts, and what
it takes when compiled."""

from __future__ import annotations

import functools
import itertools
import math
import re

import pytest
import torch
from emulated import EMULATED, one_thread, round_tf32, run
from test_kernels_staged import blocked, conflict_free, places, vectors
from torch.nn.functional import linear

from torch_gru_fuse import equations
from torch_gru_fuse.kernels import aot, staged_backward
from torch_gru_fuse.planner.gpus import gpu_named
from torch_gru_fuse.planner.whole_sequence import StagedPlan

backward = EMULATED.staged_backward
NAN = float("nan")

# ---- mathematics and hand-over ------------------------------------------------------------------------------------------


class Case:
    """One layer, or both directions of one: what the kernel is given, and what it makes of it."""

    LAUNCH_ID = 29

    def __init__(self, steps, batch, hidden, dtype, reverse=False, dy=True, dhn=True):
        generator = torch.Generator().manual_seed(steps + batch + hidden)
        self.steps, self.batch, self.hidden, self.dtype = steps, batch, hidden, dtype
        self.integer = torch.int32 if dtype == torch.float32 else torch.int16
        self.lanes = lanes = 2 if reverse else 1

        def random(*size, scale=1.0):
            return (torch.randn(size, generator=generator) * scale).to(dtype)

        self.gi = random(lanes, steps, batch, 3 * hidden)
        self.h0 = random(lanes, batch, hidden)
        self.w_hh = [random(3 * hidden, hidden, scale=hidden**-0.5) for _ in range(lanes)]
        self.b_hn = random(lanes, hidden, scale=0.5)
        self.dy = random(steps, batch, lanes * hidden) if dy else None
        self.dhn = random(lanes, batch, hidden) if dhn else None
        self.differentiate()

    def differentiate(self):
        """In float64: out and gates, which the kernel is given, rounded, and the gradients it should find."""
        steps, batch, hidden, lanes = self.steps, self.batch, self.hidden, self.lanes
        outs, gates, d_gates, d_h0 = [], [], [], []
        for l in range(lanes):
            w = round_tf32(self.w_hh[l]) if self.dtype == torch.float32 else self.w_hh[l]
            b_hh = torch.zeros(3, hidden, dtype=torch.float64)
            b_hh[2] = self.b_hn[l]
            gi, h0 = self.gi[l].double().requires_grad_(), self.h0[l].double().requires_grad_()
            gh = torch.zeros(steps, batch, 3 * hidden, dtype=torch.float64, requires_grad=True)
            h, out, saved = h0, [None] * steps, [None] * steps
            for t in reversed(range(steps)) if l else range(steps):
                r, z, n, hn = equations._gates(gi[t], linear(h, w.double(), b_hh.flatten()) + gh[t])
                out[t] = h = n + z * (h - n)
                saved[t] = torch.stack((r, z, n, hn), 1)
            outs.append(torch.stack(out))
            gates.append(torch.stack(saved))
            loss = h.sum() * 0
            if self.dhn is not None:
                loss = loss + (h * self.dhn[l]).sum()
            if self.dy is not None:
                loss = loss + (outs[-1] * self.dy.unflatten(2, (lanes, hidden))[:, :, l]).sum()
            loss.backward()
            dr, dz, dn = gi.grad.chunk(3, 2)
            d_gates.append(torch.stack((gh.grad.chunk(3, 2)[2], dr, dz, dn), 2))
            d_h0.append(h0.grad)
        self.out = torch.stack(outs, 2).flatten(2).detach().to(self.dtype)
        self.gates = torch.stack(gates).detach().to(self.dtype)
        self.expected = torch.stack(d_gates), torch.stack(d_h0)

    def run(self, plan, *, missing=0):
        """Fills ``d_gates`` [lanes, T, B, 4, H], ``d_h0`` [lanes, B, H], ``sums``, ``error``, ``host``."""
        steps, batch, hidden, lanes = self.steps, self.batch, self.hidden, self.lanes
        self.d_gates = torch.full((lanes, steps, batch, 4, hidden), -1, dtype=self.integer).view(self.dtype)
        self.d_h0 = torch.full((lanes, batch, hidden), NAN, dtype=self.dtype)
        self.rows = plan.rows * plan.tiles
        self.sums = torch.full((lanes, -(-batch // self.rows), 4, hidden), NAN)
        self.host = torch.zeros(1, dtype=torch.int32)
        self.error = torch.tensor([0, self.host.data_ptr(), self.LAUNCH_ID, 0])
        grid, arguments = backward.staged_backward_launch(
            self.dy, self.dhn, self.h0, self.out, None, self.gates, [], self.w_hh,
            self.d_gates, self.d_h0, self.sums, self.error, plan=plan,
        )  # fmt: skip
        assert grid == (plan.programs(lanes, batch, hidden),)
        with one_thread():
            run(backward.staged_backward_kernel, (grid[0] - missing,), arguments)
        return self

    def bits(self):
        return torch.cat([self.d_gates.reshape(-1), self.d_h0.reshape(-1)]).view(self.integer)


# What rounding saved gates and the gradients that are handed on costs, two to three times the worst that was seen.
TOLERANCE = {torch.float32: 1.2e-3, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def check(case):
    assert case.error[0] == 0 and case.host == 0
    for ours, theirs in zip((case.d_gates, case.d_h0), case.expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=TOLERANCE[case.dtype], atol=TOLERANCE[case.dtype])
    # Sums of what was rounded to d_gates: off by half a unit in the last place of each at most, and by what fp32 loses.
    for i, d in enumerate(case.d_gates.double().split(case.rows, 2)):
        parts = case.steps * d.shape[2]
        limits = torch.finfo(case.dtype)
        bound = d.abs().sum((1, 2)) * parts * 2.0**-24
        if case.dtype != torch.float32:
            bound += d.abs().sum((1, 2)) * limits.eps / 2 * 1.01 + parts * limits.smallest_normal * limits.eps
        assert ((case.sums[:, i].double() - d.sum((1, 2))).abs() <= bound).all()


fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
CASES = [
    # steps, batch, hidden, dtype, reverse, plan; of that units, rows, tiles, slices, warps along units, pieces, share
    pytest.param(5, 5, 48, fp32, False, StagedPlan(16, 8, 1, 2, 1), id="one tile"),
    pytest.param(3, 9, 48, fp16, True, StagedPlan(32, 8, 1, 1, 2), id="one tile, units no multiple of a program's"),
    pytest.param(2, 19, 64, bf16, False, StagedPlan(32, 16, 1, 1, 2), id="one tile of 16 rows"),
    pytest.param(3, 7, 96, fp32, False, StagedPlan(32, 8, 1, 2, 2, 2), id="one tile, two pieces"),
    pytest.param(3, 7, 96, fp32, False, StagedPlan(32, 8, 1, 2, 2, 3, 1), id="one tile, gate by gate, weights shared"),
    pytest.param(2, 3, 112, fp16, True, StagedPlan(32, 8, 1, 1, 2, 2, 2), id="one tile, two pieces, weights shared"),
    pytest.param(3, 21, 80, bf16, False, StagedPlan(32, 8, 2, 2, 2), id="two tiles"),
    pytest.param(2, 19, 80, fp32, True, StagedPlan(32, 8, 2, 2, 2, 2, 4), id="two tiles, two pieces, weights shared"),
    pytest.param(3, 19, 80, fp32, False, StagedPlan(32, 8, 2, 2, 2, 6, 4), id="two tiles, gate by gate in halves"),
    pytest.param(3, 40, 64, fp16, False, StagedPlan(64, 16, 2, 1, 4, 3), id="two tiles of 16 rows, gate by gate"),
    pytest.param(2, 17, 128, fp32, False, StagedPlan(32, 8, 2, 1, 2, 4, 3), id="two tiles, four pieces"),
    pytest.param(3, 37, 48, fp32, True, StagedPlan(16, 8, 4, 2, 1), id="four tiles"),
    pytest.param(2, 45, 112, bf16, False, StagedPlan(32, 8, 6, 1, 2, 2), id="six tiles, two pieces"),
    pytest.param(2, 40, 128, fp16, False, StagedPlan(32, 8, 4, 2, 1, 1, 1), id="four tiles, weights shared"),
    pytest.param(1, 2, 48, fp32, False, StagedPlan(16, 8, 1, 2, 1), id="one step"),
    pytest.param(1, 20, 64, fp16, True, StagedPlan(32, 8, 2, 1, 2), id="one step, two tiles"),
    pytest.param(1, 33, 64, fp16, False, StagedPlan(32, 8, 4, 1, 2, 3), id="one step, four tiles, gate by gate"),
]


@pytest.mark.parametrize(("steps", "batch", "hidden", "dtype", "reverse", "plan"), CASES)
def test_is_the_gradient_of_a_gru(steps, batch, hidden, dtype, reverse, plan):
    check(Case(steps, batch, hidden, dtype, reverse).run(plan))


@pytest.mark.parametrize("dtype", [fp32, bf16])
@pytest.mark.parametrize("tiles", [1, 2, 4])
@pytest.mark.parametrize("dy, dhn", [(False, True), (True, False), (False, False)], ids=["h_n alone", "out alone", "neither"])
def test_gradients_may_be_absent(tiles, dtype, dy, dhn):
    check(Case(2, 9, 48, dtype, dy=dy, dhn=dhn).run(StagedPlan(32, 8, tiles, 2 if dtype == fp32 else 1, 1)))


@pytest.mark.parametrize("tiles", [1, 2, 4])
def test_sums_are_of_what_was_not_rounded(tiles):
    """Gradients too small for fp16 are 0 where they are handed on, and still add up."""
    case = Case(1, 16, 48, fp16, dhn=False)
    case.dy[:] = 2.0**-24
    case.run(StagedPlan(32, 8, tiles, 1, 1))
    r, z, n, hn = case.gates.double().unbind(3)
    dn = 2.0**-24 * (1 - z) * (1 - n * n)
    assert (case.d_gates[:, :, :, 1] == 0).all()  # of r
    expected = (dn * hn * r * (1 - r)).sum(1).split(case.rows, 1)
    expected = torch.stack([e.sum(1) for e in expected], 1)
    torch.testing.assert_close(case.sums[:, :, 1].double(), expected, rtol=1e-5, atol=1e-12)
    assert expected.abs().min() > 0


PLANS = [
    pytest.param(fp32, StagedPlan(16, 8, 1, 2, 1), id="fp32, one tile"),
    pytest.param(fp16, StagedPlan(32, 8, 2, 1, 2), id="fp16, two tiles"),
    pytest.param(bf16, StagedPlan(32, 8, 4, 1, 2, 3), id="bf16, four tiles, gate by gate"),
]


@pytest.mark.parametrize("dtype, plan", PLANS)
def test_is_deterministic(dtype, plan):
    """Whoever comes first."""
    case = Case(3, 20, 48, dtype, reverse=True)
    first, sums = case.run(plan).bits(), case.sums
    assert torch.equal(case.run(plan).bits(), first) and torch.equal(case.sums, sums)


@pytest.mark.parametrize("dtype", [fp32, bf16])
def test_tiles_and_pieces_change_no_bit(dtype):
    """How rows are spread, how gradients come and where weights and states are kept: k is added up in the same order."""
    case = Case(2, 21, 112, dtype)
    first = case.run(StagedPlan(64, 8, 1, 1, 2)).bits()
    for tiles, pieces, share in [(1, 2, 2), (2, 1, 1), (6, 2, 0)]:
        assert torch.equal(case.run(StagedPlan(64, 8, tiles, 1, 2, pieces, share)).bits(), first)


@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("dtype, plan", PLANS)
def test_rows_do_not_touch_each_other(dtype, plan, value):
    """A NaN or Inf in one row, first or last of a tile or the last of all: no bit of another row changes, and nobody waits."""
    spoiled = [0, 8, 15, 18]
    rows = [b for b in range(19) if b not in spoiled]
    case = Case(3, 19, 48, dtype, reverse=True)
    case.run(plan)
    d_gates, d_h0 = case.d_gates, case.d_h0
    case.dy[1, spoiled, 5] = value
    case.dhn[1, spoiled, 7] = value
    case.run(plan)
    assert case.error[0] == 0 and case.host == 0
    assert torch.equal(case.d_gates[:, :, rows], d_gates[:, :, rows]) and torch.equal(case.d_h0[:, rows], d_h0[:, rows])
    assert not case.d_h0[:, spoiled].isfinite().any()
    assert case.d_gates[0, 2].isfinite().all() and not case.d_gates[0, 0, spoiled, :, :].isfinite().all()
    assert not (case.d_gates[:, :, :, :3].view(case.integer) == -1).any()


@pytest.mark.parametrize("dtype, plan", PLANS)
def test_inf_is_no_nan(dtype, plan):
    """An Inf whose products all have one sign: what is read in place of units that there are not must not meet it."""
    case = Case(2, 3, 48, dtype)
    case.dy[1, 1, 0] = float("inf")
    case.gates[0, :, 1], case.out[0, 1] = 0.5, 0.75  # all gradients of gates are positive
    case.w_hh[0][[0, 48, 96]] = case.w_hh[0][[0, 48, 96]].abs()
    case.run(plan)
    assert (case.d_gates[0, 0, 1, 3] == float("inf")).all()


@pytest.mark.parametrize("dtype, plan", PLANS)
@pytest.mark.parametrize("bits", [-1, 0x7FFFFFFF, -2], ids=["pattern", "made by a GPU", "its neighbour"])
def test_what_is_given_may_hold_any_bits(dtype, plan, bits):
    """Of initial states and gradients: nobody waits for them."""
    case = Case(3, 4, 48, dtype)
    value = bits if dtype == fp32 or bits < 0 else 0x7FFF
    case.h0.view(case.integer)[0, 1, 3] = value
    case.dy.view(case.integer)[2, 2, 3] = value
    case.run(plan)
    assert case.error[0] == 0 and case.host == 0
    assert case.d_gates[0, 0, 1, 2, 3].isnan() and case.d_h0[0, [1, 2]].isnan().all()
    assert case.d_gates[:, :, [0, 3]].isfinite().all() and case.d_h0[:, [0, 3]].isfinite().all()
    assert not (case.d_gates[:, :, :, :3].view(case.integer) == -1).any()


@pytest.mark.parametrize("dtype", [fp16, fp32])
@pytest.mark.parametrize("tiles, pieces", [(1, 1), (2, 2), (4, 1), (2, 3)])
def test_wait_ends(dtype, tiles, pieces):
    """A program that never runs: all others of its rows end, say so, and nothing looks valid that had to wait for it."""
    case = Case(4, 8 * tiles, 112, dtype).run(StagedPlan(32, 8, tiles, 1, 2, pieces), missing=1)
    assert case.error[0] == 1 and case.host == case.LAUNCH_ID
    assert case.d_gates[:, :3].isnan().all() and case.d_h0.isnan().all()
    assert not case.d_gates[:, 3, :, :, :96].isnan().any()  # what waited for nobody


# ---- layouts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("neighbours", [1, 2])
@pytest.mark.parametrize("slices, units, rows", [(1, 64, 8), (2, 64, 16), (4, 32, 32), (8, 16, 8)])
def test_sums_meet_no_bank_twice(slices, units, rows, neighbours):
    """Written in pairs along the batch as the product has them, read as gates."""
    place = places(backward._sum_bases(slices, units, rows, neighbours), (slices, units, rows))
    for s, unit, row in itertools.product(range(slices), range(0, units, 8), range(0, rows, 8)):
        written = [[place[s, unit + lane // 4, row + lane % 4 * 2 + e] * 4 for lane in range(32)] for e in range(2)]
        assert all(b == a + 4 for a, b in zip(*written, strict=True)) and conflict_free(written[0], 8)
    for s, starts in itertools.product(range(slices), gates_of_warps(units, rows, neighbours)):
        for e in range(neighbours):
            assert conflict_free([place[s, unit + e, row] * 4 for unit, row in starts], 4)


def gates_of_warps(units, rows, neighbours):
    """(first unit, row) of each lane, of each warp and time."""
    layout = backward._gate_layout(1, units, 8, neighbours)
    size, threads, warps, order = layout.arguments
    assert math.prod(threads) == 32 and math.prod(warps) == 8 and size == [1, neighbours, 1] and order == [1, 2, 0]
    for unit, row in itertools.product(range(0, units, 16), range(0, rows, threads[2])):
        yield [(unit + lane % threads[1] * neighbours, row + lane // threads[1]) for lane in range(32)]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("rows, units", [(8, 16), (8, 32), (16, 32), (16, 64), (8, 128), (32, 64)])
def test_inputs_meet_no_bank_twice(rows, units, size):
    place = places(backward._input_bases(rows, units, size), (rows, units))
    for neighbours in (1, 2):
        for starts in gates_of_warps(units, rows, neighbours):
            addresses = [place[row, unit] * size for unit, row in starts]
            assert conflict_free(addresses, size * neighbours)
            assert all(place[row, unit + neighbours - 1] == place[row, unit] + neighbours - 1 for unit, row in starts)
    vector = 16 // size
    layout = EMULATED.staged._gi_layout(units, vector, max(1, min(8, rows * units * size // 512)))
    for starts in blocked(layout, (rows, units)):  # copies of 16 bytes
        (addresses,) = vectors([[place[row, unit + e] for row, unit in starts] for e in range(vector)], size)
        assert conflict_free(addresses, 16)


# ---- compiled -----------------------------------------------------------------------------------------------------------


def compile_backward(dtype, plan, batch, hidden, reverse, capability=89):
    new = functools.partial(torch.empty, dtype=dtype, device="meta")
    steps, lanes = 16, 2 if reverse else 1
    out, state, gates = new(steps, batch, lanes * hidden), new(lanes, batch, hidden), new(lanes, steps, batch, 4, hidden)
    sums = new(lanes, -(-batch // (plan.rows * plan.tiles)), 4, hidden, dtype=torch.float32)
    _, arguments = staged_backward.staged_backward_launch(
        out, state, state, out, None, gates, [], [new(3 * hidden, hidden)] * lanes, gates, state, sums,
        new(4, dtype=torch.int64), plan=plan,
    )  # fmt: skip
    return aot.compile_launch(staged_backward.staged_backward_kernel, arguments, capability=capability)


def shared_bytes(plan, hidden, element_bytes):
    """Shared memory of a program: staged gate gradients, what gates need, partial sums, what tiles carry on, weights."""
    padded = 1 << (hidden - 1).bit_length()
    staged = min(2, plan.tiles * plan.pieces) * 3 * plan.rows * padded * element_bytes // plan.pieces
    inputs = (1 if plan.tiles > 1 and plan.pieces > 1 else 2) * 6 * plan.rows * plan.units * element_bytes
    sums = plan.slices * plan.units * plan.rows * 4
    carried = (1 << (plan.tiles - 1).bit_length()) * plan.units * plan.rows * 4 if plan.tiles > 2 else 0
    return staged + inputs + sums + carried + plan.share * plan.slices * plan.units * 128


@pytest.mark.parametrize(
    "batch, hidden, dtype, reverse, plan",
    [
        pytest.param(1024, 256, fp16, False, StagedPlan(64, 16, 2, 4, 2), id="two tiles"),
        pytest.param(1024, 256, fp32, False, StagedPlan(64, 16, 2, 2, 4, 6, 3), id="gate by gate, weights shared"),
        pytest.param(256, 512, bf16, True, StagedPlan(64, 8, 4, 4, 2, 2, 1), id="four tiles, two directions"),
        pytest.param(64, 1024, fp32, False, StagedPlan(16, 8, 4, 8, 1, 3, 1), id="the longest product"),
        pytest.param(90, 320, fp16, False, StagedPlan(32, 8, 1, 8, 1), id="one tile, no power of two"),
    ],
)
def test_launch_fits_a_4090(batch, hidden, dtype, reverse, plan):
    """sm_89 code: no spills, as much shared memory as expected, all programs at once."""
    gpu = gpu_named("rtx4090")
    compiled = compile_backward(dtype, plan, batch, hidden, reverse)
    assert compiled.stack_bytes == 0 and compiled.spill_bytes == 0
    assert compiled.shared_bytes == shared_bytes(plan, hidden, dtype.itemsize) <= gpu.shared_bytes_per_program == 99 * 1024
    a_multiprocessor = gpu.resident_programs(compiled.registers, plan.num_warps, compiled.shared_bytes)
    assert plan.programs(2 if reverse else 1, batch, hidden) <= gpu.multiprocessors * a_multiprocessor
    assert "wgmma" not in compiled.ptx and "mma.sync" in compiled.ptx
    copies = re.findall(r"cp\.async\.c.*shared.*, (\w+), ", compiled.ptx)
    assert copies and set(copies) == {"0x10"}  # whole vectors


@pytest.mark.parametrize("hidden", [256, 288])
def test_halves_are_handed_over_as_words(hidden):
    """Who polls takes a word that is not the pattern as two halves that are there."""
    compiled = compile_backward(fp16, StagedPlan(64, 8, 2, 2, 4, 3, 1 if hidden > 256 else 0), 64, hidden, True)
    stores = [line for line in compiled.ptx.splitlines() if "st.global" in line]
    assert stores and all(".b32" in line for line in stores)
