"""The kernel that stages states in shared memory: its mathematics and its hand-over on a CPU, its layouts, and what it takes
when compiled."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import interpreted
import pytest
import torch
from emulated import EMULATED, one_thread, round_tf32, run

from torch_gru_fuse import equations
from torch_gru_fuse.kernels import aot
from torch_gru_fuse.planner.gpus import gpu_named
from torch_gru_fuse.planner.whole_sequence import StagedPlan, WholeSequencePlan, plan_staged

prepare = interpreted.load("kernels.prepare")
staged = EMULATED.staged
NAN = float("nan")

# ---- mathematics and hand-over ------------------------------------------------------------------------------------------


class Case:
    """One layer, or both directions of one: what the kernel is given, and what it makes of it.

    units: those that are no padding.  Parameters are of the kernel's dtype, not rounded to tf32.
    """

    LAUNCH_ID = 23

    def __init__(self, steps, batch, hidden, dtype, reverse=False, bias=True, units=None):
        generator = torch.Generator().manual_seed(steps + batch + hidden)
        self.steps, self.batch, self.hidden, self.dtype, self.units = steps, batch, hidden, dtype, units or hidden
        self.reverse, self.lanes = reverse, 2 if reverse else 1

        def random(*size, scale):
            real = torch.zeros(size)
            part = real[..., : self.units] if size[-1] == hidden else real
            part.copy_(torch.randn(part.shape, generator=generator) * scale)
            return real.to(dtype)

        def padded(x):  # [.., 3, H] of the gates
            x[..., self.units :] = 0
            return x.flatten(-2)

        self.gi = padded(random(self.lanes, steps, batch, 3, hidden, scale=1))
        self.hx = random(self.lanes, batch, hidden, scale=1)[..., : self.units].contiguous()
        self.w_hh = []
        for _ in range(self.lanes):
            w = random(3, hidden, hidden, scale=hidden**-0.5)
            w[:, self.units :] = 0
            self.w_hh.append(w.flatten(0, 1))
        biases = [[padded(random(3, hidden, scale=0.5)) for _ in range(self.lanes)] for _ in range(2)]
        self.b_ih, self.b_hh = biases if bias else (None, None)

    def run(self, plan, *, save_gates=True, missing=0):
        """Fills ``out`` [T, B, lanes * H], ``h_n`` [lanes, B, H], ``gates`` [lanes, T, B, 4, H], ``error``, ``host``."""
        steps, batch, hidden, lanes = self.steps, self.batch, self.hidden, self.lanes

        def new(*size):
            return torch.full(size, NAN, dtype=self.dtype)

        self.out, self.h_n = new(steps, batch, lanes * hidden), new(lanes, batch, hidden)
        self.gates = new(lanes, steps, batch, 4, hidden) if save_gates else None
        self.error, self.host = torch.full((4,), -1), torch.zeros(1, dtype=torch.int32)
        h0 = new(batch, 2 * hidden) if self.reverse else new(1, batch, hidden)
        ring = new(2, plan.ring_rows(batch), lanes * hidden) if plan.ring else None
        grid, arguments = prepare.prepare_launch(
            self.hx, self.host, self.LAUNCH_ID, self.out, ring, h0, self.h_n, self.error, reverse=self.reverse,
            fill_out=ring is None, ring=ring is not None,
        )  # fmt: skip
        prepare.prepare_kernel[grid](**arguments)
        grid, arguments = staged.staged_launch(
            self.gi if self.reverse else self.gi[0], h0, ring, [], self.w_hh, self.b_ih, self.b_hh,
            self.out, self.h_n, self.gates, self.error, plan=plan, units=self.units,
        )  # fmt: skip
        assert grid == (plan.programs(lanes, batch, hidden),)
        with one_thread():
            run(staged.staged_kernel, (grid[0] - missing,), arguments)
        return self

    def results(self):
        """(out, h_n, gates) with lanes in front."""
        out = self.out.view(self.steps, self.batch, self.lanes, self.hidden).permute(2, 0, 1, 3)
        return out, self.h_n, self.gates

    def bits(self):
        return torch.cat([x.reshape(-1) for x in self.results()]).view(torch.int16)

    def expected(self):
        """The same by the equations, in float64; of fp32 weights what tf32 holds."""
        h0 = torch.nn.functional.pad(self.hx.double(), (0, self.hidden - self.units))
        one = torch.eye(3 * self.hidden, dtype=torch.float64)  # gi is the input
        results = []
        for l in range(self.lanes):
            w = round_tf32(self.w_hh[l]) if self.dtype == torch.float32 else self.w_hh[l]
            b_ih, b_hh = (None if b is None else b[l].double() for b in (self.b_ih, self.b_hh))
            arguments = self.gi[l].double(), h0[l], one, w.double(), b_ih, b_hh
            gates = torch.empty(self.steps, self.batch, 4, self.hidden, dtype=torch.float64)
            out, h_n = equations.gru_layer(*arguments, reverse=l == 1)
            equations.gru_layer_saving(*arguments, torch.empty_like(out), gates, reverse=l == 1)
            results.append((out, h_n, gates))
        return [torch.stack(x) for x in zip(*results, strict=True)]


# What rounding h costs, twice the worst that was seen; saved gates are rounded once more.
TOLERANCE = {torch.float32: 1.2e-3, torch.float16: 1.2e-3, torch.bfloat16: 7.5e-3}


def check(case):
    assert case.error[0] == 0 and case.host == 0
    for ours, theirs in zip(case.results(), case.expected(), strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours.double(), theirs, rtol=TOLERANCE[case.dtype], atol=TOLERANCE[case.dtype])
    for l in range(case.lanes):
        assert torch.equal(case.h_n[l], case.results()[0][l, 0 if l else -1])


fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
CASES = [
    # steps, batch, hidden, dtype, reverse, plan; of that units, rows, tiles, slices, warps along units, pieces, share
    pytest.param(5, 5, 48, fp32, False, StagedPlan(16, 8, 1, 2, 1), id="one tile"),
    pytest.param(5, 9, 48, fp16, True, StagedPlan(32, 8, 1, 1, 2), id="one tile, units no multiple of a program's"),
    pytest.param(4, 19, 64, bf16, False, StagedPlan(32, 16, 1, 1, 2), id="one tile of 16 rows"),
    pytest.param(4, 7, 96, fp32, False, StagedPlan(32, 8, 1, 2, 2, 2), id="one tile, two pieces"),
    pytest.param(4, 3, 112, fp16, True, StagedPlan(32, 8, 1, 1, 2, 2, 2), id="one tile, two pieces, W_n shared"),
    pytest.param(5, 21, 80, bf16, False, StagedPlan(32, 8, 2, 2, 2), id="two tiles"),
    pytest.param(4, 19, 80, fp32, True, StagedPlan(32, 8, 2, 2, 2, 2, 1), id="two tiles, two pieces, part of W_n shared"),
    pytest.param(4, 40, 64, fp16, False, StagedPlan(64, 16, 2, 1, 4), id="two tiles of 16 rows"),
    pytest.param(3, 17, 128, fp32, False, StagedPlan(32, 8, 2, 1, 2, 4, 3), id="two tiles, four pieces"),
    pytest.param(4, 37, 48, fp32, True, StagedPlan(16, 8, 4, 2, 1), id="four tiles"),
    pytest.param(3, 45, 112, bf16, False, StagedPlan(32, 8, 6, 1, 2, 2), id="six tiles, two pieces"),
    pytest.param(3, 50, 256, fp16, False, StagedPlan(32, 8, 4, 4, 2, 1, 1), id="four tiles, four slices"),
    pytest.param(1, 2, 48, fp32, False, StagedPlan(16, 8, 1, 2, 1), id="one step"),
    pytest.param(1, 20, 64, fp16, True, StagedPlan(32, 8, 2, 1, 2), id="one step, two tiles"),
    pytest.param(1, 33, 64, fp16, False, StagedPlan(32, 8, 4, 1, 2), id="one step, four tiles"),
]

CASES += [
    pytest.param(*case.values[:5], replace(case.values[5], ring=True), id=f"{case.id}, ring")
    for case in CASES
    if case.values[3] == fp32
]


@pytest.mark.parametrize(("steps", "batch", "hidden", "dtype", "reverse", "plan"), CASES)
def test_is_a_gru(steps, batch, hidden, dtype, reverse, plan):
    check(Case(steps, batch, hidden, dtype, reverse).run(plan))


@pytest.mark.parametrize("dtype", [fp32, bf16])
@pytest.mark.parametrize("tiles", [1, 4])
def test_no_biases(dtype, tiles):
    check(Case(3, 11, 64, dtype, bias=False).run(StagedPlan(32, 8, tiles, 1, 2)))


@pytest.mark.parametrize(
    "dtype, plan", [(fp32, StagedPlan(16, 8, 1, 2, 1)), (fp16, StagedPlan(32, 8, 4, 1, 2))], ids=["one tile", "four tiles"]
)
def test_saving_gates_changes_nothing(dtype, plan):
    """Nor does a second run, whoever comes first."""
    case = Case(4, 20, 48, dtype, reverse=True)
    first = case.run(plan).bits()
    assert torch.equal(case.run(plan).bits(), first)
    out, h_n = case.out, case.h_n
    case.run(plan, save_gates=False)
    assert torch.equal(case.out, out) and torch.equal(case.h_n, h_n)


@pytest.mark.parametrize("dtype", [fp32, bf16])
def test_tiles_and_pieces_change_no_bit(dtype):
    """How rows are spread, how the state comes and where weights and states are kept: k is added up in the same order."""
    case = Case(3, 21, 112, dtype)
    first = case.run(StagedPlan(32, 8, 1, 1, 2)).bits()
    for tiles, pieces, share in [(1, 2, 2), (2, 1, 1), (2, 2, 0), (4, 1, 0), (6, 2, 1)]:
        assert torch.equal(case.run(StagedPlan(32, 8, tiles, 1, 2, pieces, share)).bits(), first)


PADDED = [
    pytest.param(48, fp32, True, StagedPlan(32, 8, 2, 2, 1), id="fp32, two slices"),
    pytest.param(48, fp16, False, StagedPlan(16, 8, 1, 1, 1), id="fp16"),
    pytest.param(48, bf16, True, StagedPlan(32, 8, 4, 1, 2), id="bf16, four tiles"),
    pytest.param(112, fp32, False, StagedPlan(64, 8, 2, 1, 4, 2), id="fp32, two pieces"),
]


@pytest.mark.parametrize("inf", [False, True], ids=["", "beside inf"])
@pytest.mark.parametrize(("hidden", "dtype", "reverse", "plan"), PADDED)
def test_padding_stays_zero(hidden, dtype, reverse, plan, inf):
    """Units that only the padded parameters have, and those that only a power of two has."""
    units = hidden - 11
    case = Case(3, 11, hidden, dtype, reverse, units=units)
    if inf:
        case.hx[0, 1, 3], case.hx[-1, 9, units - 1] = float("inf"), -float("inf")
    case.run(plan)
    assert case.error[0] == 0
    spoiled = [1, 9] if inf else []
    rows = [b for b in range(11) if b not in spoiled]
    tolerance = TOLERANCE[dtype]
    for i, (ours, theirs) in enumerate(zip(case.results(), case.expected(), strict=True)):
        assert i == 2 or (ours[..., units:] == 0).all()
        ours, theirs = ours[..., :units].double(), theirs[..., :units]
        if i == 2:  # gates
            ours, theirs = ours[:, :, rows], theirs[:, :, rows]
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)
    out = case.results()[0]
    assert out[:, :, rows].isfinite().all()
    assert not inf or not out[0, 0, 1].isfinite().all() and not out[-1, -1 if reverse else 0, 9].isfinite().all()


@pytest.mark.parametrize("plan", [StagedPlan(16, 8, 1, 1, 1), StagedPlan(32, 8, 4, 1, 2, 1, 1)], ids=["one tile", "four tiles"])
@pytest.mark.parametrize("dtype", [fp16, fp32])
@pytest.mark.parametrize("bits", [-1, 0x7FFFFFFF, -2], ids=["pattern", "made by a GPU", "its neighbour"])
def test_initial_state_may_hold_any_bits(plan, dtype, bits):
    """NaNs of any kind, the pattern itself: they spoil their row as one does, and nobody waits for them."""
    integer = torch.int16 if dtype == fp16 else torch.int32
    case = Case(3, 4, 48, dtype)
    case.hx.view(integer)[0, 1, 3] = bits if dtype == fp32 or bits < 0 else 0x7FFF
    case.run(plan)
    assert case.error[0] == 0 and case.host == 0
    assert case.out[:, 1].isnan().all() and not case.out[:, [0, 2, 3]].isnan().any()
    assert not any((x.view(integer) == -1).any() for x in (case.out, case.h_n))


@pytest.mark.parametrize("dtype", [fp16, fp32])
@pytest.mark.parametrize("tiles, pieces", [(1, 1), (2, 2), (4, 1)])
def test_wait_ends(dtype, tiles, pieces):
    """A program that never runs: all others of its rows end, say so, and nothing looks valid that had to wait for it."""
    case = Case(4, 8 * tiles, 112, dtype).run(StagedPlan(32, 8, tiles, 1, 2, pieces), missing=1)
    assert case.error[0] == 1 and case.host == case.LAUNCH_ID
    assert case.out[1:].isnan().all() and case.h_n.isnan().all()
    assert not case.out[0, :, :96].isnan().any()  # what waited for nobody


# ---- layouts ------------------------------------------------------------------------------------------------------------

PLANS = [
    # batch, hidden, lanes, bytes of an element
    (1024, 256, 1, 4), (1024, 256, 2, 2), (64, 1024, 1, 4), (256, 512, 1, 2), (4096, 256, 1, 2), (300, 300, 1, 4),
    (200, 320, 1, 2),
]  # fmt: skip


def planned():
    for batch, hidden, lanes, size in PLANS:
        plan = plan_staged(batch, hidden, lanes, size)
        assert plan is not None
        yield plan, hidden, size


def places(bases, extents):
    """Coordinates -> offset of an element; the layout is a bijection of the offsets and the coordinates."""
    place = {}
    for offset in range(1 << len(bases)):
        coordinates = (0,) * len(extents)
        for i, basis in enumerate(bases):
            if offset >> i & 1:
                coordinates = tuple(a ^ b for a, b in zip(coordinates, basis, strict=True))
        place[coordinates] = offset
    assert place.keys() == set(itertools.product(*map(range, extents)))
    return place


def conflict_free(addresses, width):
    """Whether no bank has to give two words at once, for ``width`` bytes at the addresses of a warp's lanes: it takes 128 bytes
    of lanes at a time."""
    lanes = min(32, 128 // width)
    for first in range(0, 32, lanes):
        words = {a // 4 + i for a in addresses[first : first + lanes] for i in range(max(1, width // 4))}
        if len({word % 32 for word in words}) < len(words):
            return False
    return True


def vectors(registers, size):
    """Offsets of registers, [register][lane] -> addresses of the vectors of 16 bytes that they are, [vector][lane]."""
    of_lane_0 = {}
    for lanes in registers:
        of_lane_0.setdefault(lanes[0] * size // 16, []).append(lanes)
    for members in of_lane_0.values():
        for offsets in zip(*members, strict=True):
            begin = min(offsets) * size
            assert begin % 16 == 0 and sorted(o * size for o in offsets) == list(range(begin, begin + 16, size))
        yield [min(offsets) * size for offsets in zip(*members, strict=True)]


def operand(size, lane, i, e):
    """k of the product: element e of the i-th vector that a lane holds of an operand (DotOperandLayout, k_width = 16 bytes)."""
    vector = 16 // size
    return (4 * i + lane % 4) * vector + e


def blocked(layout, shape):
    """Coordinates of the first element of each vector, [warp and vector][lane]; where threads are too many they repeat."""
    size, threads, warps, order = layout.arguments
    tile = [a * b * c for a, b, c in zip(size, threads, warps, strict=True)]
    assert [n for i, n in enumerate(size) if i != order[0]] == [1] * (len(size) - 1)

    def split(index, extents):
        place = [0] * len(extents)
        for d in order:
            index, place[d] = divmod(index, extents[d])
        return place

    for warp in range(math.prod(warps)):
        for repeat in itertools.product(*(range(0, n, t) for n, t in zip(shape, tile, strict=True))):
            yield [
                tuple(
                    ((w * t + p) * s + r) % n
                    for w, t, p, s, r, n in zip(
                        split(warp, warps), threads, split(lane, threads), size, repeat, shape, strict=True
                    )
                )
                for lane in range(32)
            ]


@pytest.mark.parametrize("size", [2, 4])
def test_operand_order(size):
    order = staged._operand_order(size)
    group = 1 << len(order)
    assert sorted(order) == [1 << i for i in range(len(order))]
    k = torch.arange(2 * 3 * 2 * group).reshape(2, 3, 2 * group)
    ordered = staged.operand_order(k, size)
    assert ordered.shape == k.shape
    for memory in range(2 * group):
        product = memory // group * group + sum(order[i] for i in range(len(order)) if memory >> i & 1)
        assert torch.equal(ordered[..., product], k[..., memory])


@pytest.mark.parametrize("size", [2, 4])
def test_sixteen_bytes_are_whole_operands(size):
    """16 bytes of memory are what one lane holds: elements of one product and the next, each whole registers."""
    order = staged._operand_order(size)
    vector = 16 // size
    for memory in range(0, 1 << len(order), vector):
        ks = [sum(order[i] for i in range(len(order)) if m >> i & 1) for m in range(memory, memory + vector)]
        lane = memory // vector % 4
        assert set(ks) <= {operand(size, lane, i, e) for i in range(2) for e in range(vector)}
        pair = vector // 4  # elements of a register
        registers = [ks[i : i + pair] for i in range(0, vector, pair)]
        assert all(r == list(range(r[0], r[0] + pair)) and r[0] % pair == 0 for r in registers)
        # a register and the next: near and far half of a product's k
        assert all(b[0] - a[0] == 4 * vector for a, b in zip(registers[::2], registers[1::2], strict=True))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("slices, rows, lines", [(1, 8, 1), (1, 16, 4), (2, 8, 2), (4, 16, 1), (8, 8, 1)])
def test_states_meet_no_bank_twice(slices, rows, lines, size):
    """Written in vectors from the layout of the copies, read as operands: 16 bytes of row lane / 4 at lane % 4."""
    length, vector, group = lines * 128 // size, 16 // size, 128 // size
    place = places(staged._row_bases(slices, rows, length, size), (slices, rows, length))
    for s, row, k in itertools.product(range(slices), range(0, rows, 8), range(0, length, group)):
        read = [
            [place[s, row + lane // 4, k + operand(size, lane, i, e)] for lane in range(32)]
            for i in range(2) for e in range(vector)
        ]  # fmt: skip
        found = list(vectors(read, size))
        assert len(found) == 2 and all(conflict_free(addresses, 16) for addresses in found)
    warps = min(8, slices * rows * length * size // 512)
    order = staged._operand_order(size)
    for starts in blocked(staged._copy_layout(slices, rows, length, vector, warps), (slices, rows, length)):

        def product(k):
            return k // group * group + sum(bit for i, bit in enumerate(order) if k >> i & 1)  # noqa: B023

        written = [[place[s, row, product(k + e)] for s, row, k in starts] for e in range(vector)]
        (addresses,) = vectors(written, size)
        assert conflict_free(addresses, 16)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("slices, units", [(1, 16), (2, 64), (8, 16), (1, 128)])
def test_weights_of_a_warp_are_contiguous(slices, units, size):
    length, vector = 128 // size, 16 // size
    place = places(staged._weight_bases(slices, units, length, size), (slices, units, length))
    for s, unit in itertools.product(range(slices), range(0, units, 16)):
        read = [
            [place[s, unit + 8 * half + lane // 4, operand(size, lane, i, e)] for lane in range(32)]
            for half in range(2) for i in range(2) for e in range(vector)
        ]  # fmt: skip
        found = list(vectors(read, size))
        assert len(found) == 4
        for addresses in found:
            assert addresses == [addresses[0] + 16 * lane for lane in range(32)] and addresses[0] % 512 == 0
    # the four registers of a product, in its order: units u and u + 8, then both further on
    first = {offset: coordinates for coordinates, offset in place.items() if offset < vector}
    registers = [first[i] for i in range(0, vector, vector // 4)]
    assert registers == [(0, 0, 0), (0, 8, 0), (0, 0, 4 * vector), (0, 8, 4 * vector)]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(
    "rows, units, sliced",
    [(8, 16, True), (8, 32, True), (16, 32, True), (16, 64, True), (16, 32, False), (8, 128, False), (16, 128, False)],
)
def test_gi_meets_no_bank_twice(rows, units, sliced, size):
    place = places(staged._gi_bases(rows, units, size, sliced), (rows, units))
    vector = 16 // size
    if sliced:  # 16 units of two rows
        for row, unit in itertools.product(range(0, rows, 2), range(0, units, 16)):
            read = [place[row + lane // 16, unit + lane % 16] * size for lane in range(32)]
            assert conflict_free(read, size)
    else:  # the product's result
        for row, unit, half, odd in itertools.product(range(0, rows, 8), range(0, units, 16), range(2), range(2)):
            read = [place[row + lane % 4 * 2 + odd, unit + 8 * half + lane // 4] * size for lane in range(32)]
            assert conflict_free(read, size)
    # copies of 16 bytes
    for starts in blocked(staged._gi_layout(units, vector, max(1, min(8, rows * units * size // 512))), (rows, units)):
        (addresses,) = vectors([[place[row, unit + e] for row, unit in starts] for e in range(vector)], size)
        assert conflict_free(addresses, 16)


def test_planned_tiles_are_whole_vectors():
    """What polls counts on it: no element twice, whole vectors a thread."""
    for plan, hidden, size in planned():
        length = (1 << (hidden - 1).bit_length()) // plan.slices // plan.pieces
        shape = (plan.slices, plan.rows, length)
        warps = list(blocked(staged._copy_layout(*shape, 16 // size, plan.num_warps), shape))
        pack = math.prod(shape) // (32 * plan.num_warps)
        assert len(warps) * 16 // size == plan.num_warps * pack and pack * size % 16 == 0
        assert len({start for starts in warps for start in starts}) == 32 * len(warps)


# ---- compiled -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "batch, hidden, dtype, reverse",
    [(1024, 256, fp32, False), (1024, 256, fp16, True), (64, 1024, fp32, False), (200, 320, bf16, False)],
)
def test_planned_launch_fits_a_4090(batch, hidden, dtype, reverse):
    """sm_89 code that saves gates: no spills, as much shared memory as the plan says, all programs at once."""
    gpu = gpu_named("rtx4090")
    lanes = 2 if reverse else 1
    plan = plan_staged(
        batch, hidden, lanes, dtype.itemsize, multiprocessors=gpu.multiprocessors, shared_bytes=gpu.shared_bytes_per_program
    )
    assert plan is not None
    compiled = aot.compile_whole_sequence(
        dtype, WholeSequencePlan(lanes, plan), batch=batch, hidden=hidden, reverse=reverse, save_gates=True, capability=89
    )
    assert compiled.stack_bytes == 0 and compiled.spill_bytes == 0
    assert compiled.shared_bytes == plan.shared_bytes(hidden, dtype.itemsize) <= gpu.shared_bytes_per_program == 99 * 1024
    a_multiprocessor = gpu.resident_programs(compiled.registers, plan.num_warps, compiled.shared_bytes)
    assert plan.programs(lanes, batch, hidden) <= gpu.multiprocessors * a_multiprocessor
    assert "wgmma" not in compiled.ptx and "mma.sync" in compiled.ptx and "cp.async" in compiled.ptx
