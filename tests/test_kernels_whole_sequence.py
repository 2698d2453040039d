"""The kernels that run whole sequences: their mathematics and their hand-over on a CPU, and what they take when compiled."""

from __future__ import annotations

import itertools
import re

import interpreted
import pytest
import torch
from emulated import EMULATED, one_thread, run

from torch_gru_fuse.kernels import aot
from torch_gru_fuse.kernels.lanes import shared_bases
from torch_gru_fuse.planner.gpus import gpu_named
from torch_gru_fuse.planner.whole_sequence import ResidentPlan, WavefrontPlan, WholeSequencePlan, plan_whole_sequence

prepare = interpreted.load("kernels.prepare")

# ---- mathematics and hand-over ------------------------------------------------------------------------------------------


class Case:
    """A GRU, its inputs, what the kernels are given, and what float64 says."""

    LAUNCH_ID = 17

    def __init__(self, steps, batch, hidden, lanes, dtype, reverse=False, bias=True, seed=0, masked=False):
        generator = torch.Generator().manual_seed(seed)
        self.gru = torch.nn.GRU(hidden, hidden, 1 if reverse else lanes, bidirectional=reverse, bias=bias)
        with torch.no_grad():
            for parameter in self.gru.parameters():
                # of the values that the kernel's dtype (or tf32) can hold: operands are then exact
                value = torch.rand(parameter.shape, generator=generator) - 0.5
                parameter.copy_(value.to(torch.float16).float() * 2 * hidden**-0.5)
                parameter.copy_(parameter.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float16).float())
        self.x = torch.randn(steps, batch, hidden, generator=generator).to(dtype)
        self.hx = torch.randn(lanes, batch, hidden, generator=generator).to(dtype)
        self.steps, self.batch, self.hidden, self.lanes, self.dtype, self.reverse = steps, batch, hidden, lanes, dtype, reverse
        names = [f"l0{s}" for s in ("", "_reverse")] if reverse else [f"l{i}" for i in range(lanes)]
        parameters = dict(self.gru.named_parameters())
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if bias else ("weight_ih", "weight_hh")
        lists = [[parameters[f"{kind}_{n}"].detach().to(dtype) for n in names] for kind in kinds]
        self.w_ih, self.w_hh, self.b_ih, self.b_hh = lists if bias else (*lists, None, None)
        self.masks = None
        if masked:  # dropout
            self.masks = ((torch.rand((lanes - 1, steps, batch, hidden), generator=generator) < 0.5) * 2).to(dtype)

    def expected(self):
        self.gru.double()
        x, finals = self.x.double(), []
        if self.masks is None:
            out, h_n = self.gru(x, self.hx.double())
            return out.detach(), h_n.detach()
        for l, parameters in enumerate(self.gru.all_weights):
            x, h_n = torch.gru(x, self.hx[l : l + 1].double(), parameters, True, 1, 0.0, False, False, False)
            finals.append(h_n.detach())
            x = x.detach() if l == self.lanes - 1 else x.detach() * self.masks[l]
        return x, torch.cat(finals)

    def launch(self, module, plan, save_gates=False, **options):
        """Makes what the kernel of the module needs; what it fills is in ``out``, ``below``, ``h_n``, ``gates``, ``error``."""
        name = module.__name__.rsplit(".", 1)[1]
        steps, batch, hidden, lanes = self.steps, self.batch, self.hidden, self.lanes
        own = lanes if self.reverse else 1  # lanes whose input projection is not the kernel's
        gi = [(self.x.float() @ w.float().T).to(self.dtype) for w in self.w_ih[:own]]
        nan = lambda *size, dtype=self.dtype: torch.full(size, float("nan"), dtype=dtype)  # noqa: E731
        self.out = nan(steps, batch, own * hidden)
        self.below = None if self.reverse or lanes == 1 else nan(lanes - 1, steps, batch, hidden)
        self.h_n = nan(lanes, batch, hidden)
        self.gates = nan(lanes, steps, batch, 4, hidden) if save_gates else None
        self.error, self.host = torch.full((4,), -1), torch.zeros(1, dtype=torch.int32)
        h0 = None
        if name == "wavefront":
            h0 = nan(batch, 2 * hidden) if self.reverse else nan(lanes, batch, hidden)
        grid, arguments = prepare.prepare_launch(
            self.hx, self.host, self.LAUNCH_ID, self.out, self.below, h0, self.h_n, self.error, reverse=self.reverse,
            fill_out=name == "wavefront",
        )  # fmt: skip
        prepare.prepare_kernel[grid](**arguments)
        if self.masks is not None:
            integer = torch.int16 if self.dtype.itemsize == 2 else torch.int32
            handed = torch.full(self.below.shape, -1, dtype=integer).view(self.dtype)
            options |= {"masks": self.masks, "handed": handed}
        return getattr(module, f"{name}_launch")(
            torch.stack(gi) if self.reverse else gi[0], self.hx if h0 is None else h0, self.below, self.w_ih[own:], self.w_hh,
            self.b_ih, self.b_hh, self.out, self.h_n, self.gates, self.error, plan=plan, **options,
        )  # fmt: skip

    def run(self, module, plan, *, missing=0, **options):
        grid, arguments = self.launch(module, plan, **options)
        with one_thread():
            run(getattr(module, f"{module.__name__.rsplit('.', 1)[1]}_kernel"), (grid[0] - missing,), arguments)

    def sequence(self, lane):
        """The states of a lane, in the order of its steps."""
        h = self.hidden
        if self.reverse:
            return self.out[:, :, h:].flip(0) if lane else self.out[:, :, :h]
        return self.out if lane == self.lanes - 1 else self.below[lane]


# A step rounds h once and its operands not at all, except tf32's h and 16-bit gi; the gates contract what came before.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}

WAVEFRONT_CASES = [
    # steps, batch, hidden, lanes, dtype, reverse, plan
    pytest.param(5, 3, 32, 3, torch.float16, False, WavefrontPlan(16, 8, 2), id="stack, input after h"),
    pytest.param(5, 10, 32, 3, torch.float32, False, WavefrontPlan(16, 16, 2, 2), id="stack, input beside h"),
    pytest.param(5, 10, 32, 3, torch.bfloat16, False, WavefrontPlan(16, 8, 2, 2, store_first=True), id="stack, store first"),
    pytest.param(5, 9, 32, 2, torch.float16, True, WavefrontPlan(16, 8, 2), id="two directions"),
    pytest.param(5, 9, 48, 2, torch.float32, True, WavefrontPlan(16, 8, 2), id="two directions, padded units"),
    pytest.param(5, 3, 48, 2, torch.float16, False, WavefrontPlan(16, 8, 4), id="stack, padded units"),
    pytest.param(4, 70, 64, 1, torch.float16, False, WavefrontPlan(64, 32, 2, unit_warps=2), id="wide tile"),
    pytest.param(4, 9, 64, 1, torch.float32, False, WavefrontPlan(16, 8, 2), id="one layer"),
    pytest.param(1, 2, 32, 2, torch.float16, False, WavefrontPlan(16, 8, 2), id="one step"),
    pytest.param(1, 2, 32, 2, torch.float16, False, WavefrontPlan(16, 8, 2, 2), id="one step, input beside h"),
]
RESIDENT_CASES = [
    pytest.param(6, 9, 32, 1, torch.float32, False, ResidentPlan(32, 8, 2), id="one layer"),
    pytest.param(7, 9, 32, 3, torch.float16, False, ResidentPlan(32, 8, 2, early=True), id="stack, early"),
    pytest.param(2, 9, 48, 2, torch.bfloat16, False, ResidentPlan(64, 8, 4), id="stack, padded units"),
    pytest.param(5, 3, 16, 2, torch.float32, True, ResidentPlan(16, 8, 1), id="two directions"),
    pytest.param(1, 3, 16, 2, torch.float32, False, ResidentPlan(16, 8, 1), id="one step"),
]


def check(module, steps, batch, hidden, lanes, dtype, reverse, plan, bias=True, masked=False):
    case = Case(steps, batch, hidden, lanes, dtype, reverse, bias, masked=masked)
    case.run(module, plan, save_gates=True)
    assert case.error[0] == 0 and case.host == 0
    for ours, theirs in zip((case.out, case.h_n), case.expected(), strict=True):
        assert ours.shape == theirs.shape
        assert (ours.double() - theirs).abs().max() < TOLERANCE[dtype]
    # the saved gates make the next state from the one before
    for l in range(lanes):
        r, z, n, hn = case.gates[l].flip(0 if reverse and l else ()).double().unbind(2)
        after = case.sequence(l).double()
        before = torch.cat([case.hx[l : l + 1].double(), after[:-1]])
        assert (n + z * (before - n) - after).abs().max() < TOLERANCE[dtype]
        # h W_hn^T + b_hn, and r's sigmoid between 0 and 1
        hidden_part = before @ case.w_hh[l][2 * hidden :].double().T
        if bias:
            hidden_part += case.b_hh[l][2 * hidden :].double()
        assert (hn - hidden_part).abs().max() < 4 * TOLERANCE[dtype]
        assert (r > 0).all() and (r < 1).all()
        assert torch.equal(case.h_n[l], case.sequence(l)[-1])


@pytest.mark.parametrize(("steps", "batch", "hidden", "lanes", "dtype", "reverse", "plan"), WAVEFRONT_CASES)
def test_wavefront_is_a_gru(steps, batch, hidden, lanes, dtype, reverse, plan):
    check(EMULATED.wavefront, steps, batch, hidden, lanes, dtype, reverse, plan)


@pytest.mark.parametrize(("steps", "batch", "hidden", "lanes", "dtype", "reverse", "plan"), RESIDENT_CASES)
def test_resident_is_a_gru(steps, batch, hidden, lanes, dtype, reverse, plan):
    check(EMULATED.resident, steps, batch, hidden, lanes, dtype, reverse, plan)


@pytest.mark.parametrize(
    "name, plan", [("wavefront", WavefrontPlan(16, 8, 2)), ("resident", ResidentPlan(32, 8, 2))], ids=["spread", "resident"]
)
def test_no_biases(name, plan):
    check(getattr(EMULATED, name), 4, 3, 32, 2, torch.float32, False, plan, bias=False)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize(
    "name, plan",
    [
        pytest.param("wavefront", WavefrontPlan(16, 8, 2), id="spread, input after h"),
        pytest.param("wavefront", WavefrontPlan(16, 8, 2, 2), id="spread, input beside h"),
        pytest.param("resident", ResidentPlan(32, 8, 2), id="resident"),
    ],
)
def test_dropout_between_layers(name, plan, steps):
    check(getattr(EMULATED, name), steps, 3, 32, 3, torch.float16, False, plan, masked=True)


@pytest.mark.parametrize("name, plan", [("wavefront", WavefrontPlan(16, 8, 2)), ("resident", ResidentPlan(32, 8, 2))])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [-1, 0x7FFFFFFF, -2], ids=["pattern", "made by a GPU", "its neighbour"])
def test_initial_state_may_hold_any_bits(name, plan, dtype, bits):
    """NaNs of any kind in h0, the flag pattern itself: they spoil their row as one does, and nobody waits for them."""
    integer = torch.int16 if dtype == torch.float16 else torch.int32
    case = Case(3, 4, 32, 2, dtype)
    case.hx.view(integer)[0, 1, 3] = bits if dtype == torch.float32 or bits < 0 else 0x7FFF
    case.run(getattr(EMULATED, name), plan)
    assert case.error[0] == 0 and case.host == 0
    spoiled = case.out.isnan()
    assert spoiled[0, 1].all() and spoiled[:, 1].all() and not spoiled[:, [0, 2, 3]].any()  # all units, by the product
    assert not (case.out.view(integer) == -1).any() and not (case.h_n.view(integer) == -1).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("missing", [1, 3], ids=["of the highest layer", "of all but one"])
def test_wait_ends(dtype, missing):
    """Programs that never run: all others end, say so, and nothing looks valid that had to wait for them."""
    case = Case(4, 4, 32, 2, dtype)
    case.run(EMULATED.wavefront, WavefrontPlan(16, 8, 2), missing=missing)
    assert case.error[0] == 1 and case.host == case.LAUNCH_ID
    assert case.out[1:].isnan().all() and case.h_n[-1].isnan().all()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_prepare_pads(reverse, dtype):
    """A hidden size that is no multiple of 16: zeros beyond it."""
    integer = torch.int16 if dtype == torch.float16 else torch.int32
    hx = torch.randn(2, 3, 20, dtype=dtype)
    hx.view(integer)[1, 2, 5] = -1
    nan = float("nan")
    out, h_n = torch.zeros(700, 3, 64 if reverse else 32, dtype=dtype), torch.zeros(2, 3, 32, dtype=dtype)
    below = None if reverse else torch.zeros(1, 700, 3, 32, dtype=dtype)
    h0 = torch.full((3, 64) if reverse else (2, 3, 32), nan, dtype=dtype)
    error, host = torch.full((4,), -1), torch.zeros(1, dtype=torch.int32)
    grid, arguments = prepare.prepare_launch(hx, host, 5, out, below, h0, h_n, error, reverse=reverse)
    prepare.prepare_kernel[grid](**arguments)
    expected = torch.nn.functional.pad(hx, (0, 12))
    expected[1, 2, 5] = nan
    assert torch.equal(h0.view(3, 2, 32).transpose(0, 1).isnan() if reverse else h0.isnan(), expected.isnan())
    torch.testing.assert_close(h0.view(3, 2, 32).transpose(0, 1) if reverse else h0, expected, rtol=0, atol=0, equal_nan=True)
    assert all((t.view(integer) == -1).all() for t in (out, h_n, below) if t is not None)
    assert not (h0.view(integer) == -1).any()
    assert error[:3].tolist() == [0, host.data_ptr(), 5] and host == 0


# ---- compiled -----------------------------------------------------------------------------------------------------------

SHAPES = {
    # name: steps, batch, hidden, lanes, two directions
    "kernelbench 39": (512, 10, 256, 6, False),
    "kernelbench 41": (512, 10, 256, 2, True),
    "stream": (1000, 1, 256, 2, False),
    "speech": (1000, 32, 256, 2, False),
    "h512": (256, 16, 512, 2, False),
    "rl": (64, 256, 512, 1, False),
    "big": (256, 64, 1024, 1, False),
    "wide": (128, 1024, 256, 1, False),
    "h128": (200, 128, 128, 1, False),
    "h64": (200, 64, 64, 2, False),
}


@pytest.mark.parametrize("save_gates", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SHAPES)
def test_planned_launch_fits_a_4090(name, dtype, save_gates):
    """sm_89 code of every planned launch: no spills, 99 KB of shared memory, all programs resident on 128 SMs."""
    steps, batch, hidden, lanes, reverse = SHAPES[name]
    gpu = gpu_named("rtx4090")
    plan = plan_whole_sequence(batch, hidden, lanes, dtype.itemsize, reverse=reverse, multiprocessors=gpu.multiprocessors)
    assert plan is not None
    compiled = aot.compile_whole_sequence(
        dtype, plan, batch=batch, hidden=hidden, reverse=reverse, steps=steps, save_gates=save_gates, capability=89
    )
    assert compiled.stack_bytes == 0
    a_multiprocessor = gpu.resident_programs(compiled.registers, plan.kernel.num_warps, compiled.shared_bytes)
    assert plan.programs(batch, hidden) <= gpu.multiprocessors * a_multiprocessor
    assert "wgmma" not in compiled.ptx and "mma.sync" in compiled.ptx


def test_polling_loads_are_relaxed():
    """Weak loads in a loop without a barrier may be hoisted out of it."""
    plan = WholeSequencePlan(2, WavefrontPlan(16, 8, 4))
    ptx = aot.compile_whole_sequence(torch.float16, plan, batch=8, hidden=256, capability=89).ptx
    loops = re.findall(r"POLL:\n(.*?)END:", ptx, re.DOTALL)
    assert len(loops) == 4  # lowest layer: h; higher ones: x of the first step, then h and x
    for loop in loops:
        assert "ld.relaxed.gpu.global.v4.b32" in loop
        assert all("relaxed" in line for line in loop.splitlines() if line.lstrip().startswith(("ld.", "st.")))
        assert "%globaltimer" in loop


def test_partial_sums_use_all_banks():
    """Both sides of the exchange: 8-byte stores of a half-warp and loads of a warp touch every bank once."""
    bases = shared_bases.fn(4, 16, 16) if hasattr(shared_bases, "fn") else None
    bases = bases or shared_bases(4, 16, 16)
    bases = getattr(bases, "value", bases)
    place = {}
    for bits in itertools.product((0, 1), repeat=len(bases)):
        where_, offset = (0, 0, 0), 0
        for i, bit in enumerate(bits):
            if bit:
                where_ = tuple(a ^ b for a, b in zip(where_, bases[i], strict=True))
                offset |= 1 << i
        place[where_] = offset
    assert len(place) == 4 * 16 * 16
    for half in range(2):  # rows g, batch columns 2c and 2c + 1 of a half-warp
        words = [place[0, 4 * half + g, 2 * c + e] % 32 for g in range(4) for c in range(4) for e in range(2)]
        assert sorted(words) == list(range(32))
    assert sorted(place[0, u, b] % 32 for u in range(16) for b in range(2)) == list(range(32))


def test_plans_stay_within_the_gpu():
    """All at once for whatever waits for others; None where nothing fits, not an overfull grid."""
    sizes = itertools.product(
        (1, 7, 64, 300, 5000), (5, 16, 64, 100, 256, 300, 512, 1024, 1500), (1, 2, 6, 40), (2, 4), (False, True)
    )
    for batch, hidden, lanes, element_bytes, reverse in sizes:
        if reverse and lanes != 2:
            continue
        for multiprocessors in (48, 128, 132):
            plan = plan_whole_sequence(
                batch, hidden, lanes, element_bytes, reverse=reverse, multiprocessors=multiprocessors
            )
            if plan is None:
                assert hidden > 128
            elif plan.waits(reverse=reverse):
                assert plan.programs(batch, hidden) <= multiprocessors * plan.programs_per_sm
