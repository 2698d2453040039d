"""The kernels of whole sequences with resets of the state between steps: their mathematics and their hand-over on a CPU."""

from __future__ import annotations

import functools

import interpreted
import pytest
import torch
from emulated import EMULATED, one_thread, run

from torch_gru_fuse import equations
from torch_gru_fuse.kernels import aot
from torch_gru_fuse.planner.gpus import gpu_named
from torch_gru_fuse.planner.whole_sequence import (
    ResidentPlan,
    StagedPlan,
    WavefrontPlan,
    plan_whole_sequence,
    plan_whole_sequence_backward,
    resets_plan,
)

prepare = interpreted.load("kernels.prepare")
NAN = float("nan")


def keep_of(kind, steps, batch, generator):
    """keep [T, B] in float64, or bool: of some rows at once, of one several times in a row, in the first and the last step."""
    drawn = torch.rand(steps, batch, generator=generator)
    # eighths of 1: values that every dtype holds
    keep = (drawn * 8).floor() / 8 if kind == "any factor" else (drawn >= 0.4).double()
    keep[:, 0] = 1 if kind == "none" else 0 if kind == "all" else keep[:, 0]
    if kind in ("none", "all"):
        keep[:] = 1.0 if kind == "none" else 0.0
    else:
        keep[0, 0] = keep[-1, -1] = 0
        keep[steps // 2 : steps // 2 + 3, batch // 2] = 0
        keep[0, -1] = 1
    return keep.bool() if kind == "bool" else keep.double()


class Case:
    """Layers of a GRU, or both directions of one, with resets, and what float64 says of them.

    Parameters, inputs and factors are of values that tf32 and the kernel's dtype hold.
    """

    LAUNCH_ID = 19

    def __init__(
        self, steps, batch, hidden, lanes, dtype, *, keep="bool", reverse=False, masked=False, bias=True, dy=True, dhn=True,
        units=None, seed=0,
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        self.steps, self.batch, self.hidden, self.lanes, self.dtype = steps, batch, hidden, lanes, dtype
        self.reverse, self.directions, self.units = reverse, 2 if reverse else 1, units or hidden
        grid = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16

        def random(*size, scale=1.0):
            return (torch.randn(size, generator=generator) * scale).to(grid).double()

        weight = (3 * hidden, hidden)
        self.parameters = [
            [random(*weight, scale=hidden**-0.5), random(*weight, scale=hidden**-0.5),
             *((random(weight[0], scale=0.3), random(weight[0], scale=0.3)) if bias else (None, None))]
            for _ in range(lanes)
        ]  # fmt: skip
        self.x, self.hx = random(steps, batch, hidden), random(lanes, batch, hidden)
        self.masks = None
        if masked:
            self.masks = (torch.rand((lanes - 1, steps, batch, hidden), generator=generator) < 0.5).double() * 2
        self.dy = random(steps, batch, self.directions * hidden) if dy else None
        self.dhn = random(lanes, batch, hidden) if dhn else None
        self.keep = keep_of(keep, steps, batch, generator)
        if self.units != hidden:  # padding: parameters and states of it are 0
            padded = torch.arange(hidden) >= self.units
            for parameters in self.parameters:
                for p in parameters:
                    if p is not None:
                        p.view(3, hidden, -1)[:, padded] = 0
                        if p.dim() == 2:
                            p[:, padded] = 0
            self.hx[..., padded] = 0

    def solve(self):
        """In float64: ``sequences`` [T, B, D*H] of the layers, ``gates`` [lanes, T, B, 4, H] and ``final``."""
        self.sequences, x = [], self.x
        self.gates = x.new_empty(self.lanes, self.steps, self.batch, 4, self.hidden)
        self.final = torch.empty_like(self.hx)
        for layer in range(self.lanes // self.directions):
            out = x.new_empty(self.steps, self.batch, self.directions * self.hidden)
            for d in range(self.directions):
                l = layer * self.directions + d
                columns = out[..., d * self.hidden : (d + 1) * self.hidden]
                equations.gru_layer_saving(
                    x, self.hx[l], *self.parameters[l], columns, self.gates[l], reverse=d == 1, keep=self.keep
                )
                self.final[l] = columns[0 if d else -1]
            self.sequences.append(out)
            x = out
            if self.masks is not None and layer + 1 < self.lanes:
                x = out * self.masks[layer]
        return self

    def to(self, *tensors):
        return [None if t is None else t.detach().to(self.dtype).contiguous() for t in tensors]

    def given_keep(self):
        return self.keep if self.keep.dtype == torch.bool else self.keep.to(self.dtype)

    def forward(self, plan, *, missing=0):
        """Runs the kernel; what it fills is in ``out``, ``below``, ``h_n``, ``saved``, ``error``."""
        lanes, steps, batch, hidden, dtype = self.lanes, self.steps, self.batch, self.hidden, self.dtype
        module = getattr(EMULATED, plan.name)
        stack = lanes > 1 and not self.reverse
        w_ih, w_hh, b_ih, b_hh = (self.to(*kind) for kind in zip(*self.parameters, strict=True))
        x, hx, masks = self.to(self.x, self.hx, self.masks)
        gi = [(x.float() @ w.float().T).to(dtype) for w in w_ih[: self.directions]]
        nan = lambda *size: torch.full(size, NAN, dtype=dtype)  # noqa: E731
        self.out = nan(steps, batch, self.directions * hidden)
        self.below = nan(lanes - 1, steps, batch, hidden) if stack else None
        self.h_n, self.saved = nan(lanes, batch, hidden), nan(lanes, steps, batch, 4, hidden)
        self.error, self.host = torch.full((4,), -1), torch.zeros(1, dtype=torch.int32)
        polls_own, ring = plan.name != "resident", getattr(plan, "ring", False)
        h0 = None
        if polls_own:
            h0 = nan(batch, 2 * hidden) if self.reverse else nan(lanes, batch, hidden)
        between = nan(2, plan.ring_rows(batch), lanes * hidden) if ring else self.below
        grid, arguments = prepare.prepare_launch(
            hx, self.host, self.LAUNCH_ID, self.out, between, h0, self.h_n, self.error, reverse=self.reverse,
            fill_out=polls_own and not ring, ring=ring,
        )  # fmt: skip
        prepare.prepare_kernel[grid](**arguments)
        options = {}
        if masks is not None:
            integer = torch.int16 if dtype.itemsize == 2 else torch.int32
            options = {"masks": masks, "handed": torch.full(self.below.shape, -1, dtype=integer).view(dtype)}
        no_bias = b_ih[0] is None
        grid, arguments = getattr(module, f"{plan.name}_launch")(
            torch.stack(gi) if self.reverse else gi[0], hx if h0 is None else h0, between, w_ih[self.directions :], w_hh,
            None if no_bias else b_ih, None if no_bias else b_hh, self.out, self.h_n, self.saved, self.error, plan=plan,
            units=self.units, keep=self.given_keep(), **options,
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
            error=self.error, plan=plan, keep=self.given_keep(),
        )  # fmt: skip
        with one_thread():
            run(getattr(module, f"{plan.name}_backward_kernel"), (grid[0] - missing,), arguments)
        return self

    def expected_gradients(self):
        """dhx, d_gates [lanes, T, B, 4, H] as (hn, r, z, n), and their sums, in float64."""
        grad, dhx, d_gates = self.dy, torch.empty_like(self.hx), torch.empty_like(self.gates)
        for layer in reversed(range(self.lanes // self.directions)):
            dx = None
            for d in range(self.directions):
                l = layer * self.directions + d
                columns = slice(d * self.hidden, (d + 1) * self.hidden)
                # as an input projection without weights the gradient of x is that of (r, z, n)
                w_ih, w_hh, b_ih, b_hh = self.parameters[l]
                gi = self.gates.new_zeros(self.steps, self.batch, 3 * self.hidden)
                d_gi, d_h0, *_ = equations.gru_layer_backward(
                    None if grad is None else grad[..., columns], None if self.dhn is None else self.dhn[l], gi, self.hx[l],
                    self.sequences[layer][..., columns], torch.eye(3 * self.hidden).double(), w_hh, b_ih, b_hh, d == 1,
                    gates=self.gates[l], keep=self.keep,
                )  # fmt: skip
                dhx[l] = d_h0
                d_r, d_z, d_n = d_gi.chunk(3, 2)
                d_gates[l] = torch.stack((d_n * self.gates[l, :, :, 0], d_r, d_z, d_n), 2)
                dx = d_gi @ w_ih if dx is None else dx + d_gi @ w_ih
            grad = dx
            if self.masks is not None and layer > 0:
                grad = dx * self.masks[layer - 1]
        return dhx, d_gates, d_gates.sum((1, 2))


# A step rounds h once and its operands not at all, except tf32's h and 16-bit gi; the gates contract what came before.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}
KINDS = ["bool", "0 or 1", "any factor", "none", "all"]
SPREAD, BESIDE = WavefrontPlan(16, 8, 2), WavefrontPlan(16, 8, 2, 2)

CASES = [
    # steps, batch, hidden, lanes, dtype, plan, options
    pytest.param(6, 5, 32, 1, torch.float32, SPREAD, {"keep": "bool"}, id="one layer"),
    pytest.param(6, 9, 32, 3, torch.float16, SPREAD, {"keep": "any factor"}, id="stack, after, tiles"),
    pytest.param(6, 5, 32, 2, torch.float32, SPREAD, {"keep": "any factor", "masked": True}, id="stack, after, dropout"),
    pytest.param(6, 11, 32, 3, torch.float32, WavefrontPlan(16, 16, 2, 2), {"keep": "0 or 1", "masked": True},
                 id="stack, beside, dropout"),
    pytest.param(6, 9, 32, 2, torch.bfloat16, BESIDE, {"keep": "bool"}, id="stack, beside, tiles"),
    pytest.param(6, 9, 32, 2, torch.float16, SPREAD, {"keep": "bool", "reverse": True}, id="directions, tiles"),
    pytest.param(7, 3, 48, 2, torch.float32, SPREAD, {"keep": "any factor", "reverse": True}, id="directions, 48 units"),
    pytest.param(5, 33, 64, 1, torch.float16, WavefrontPlan(64, 32, 2, unit_warps=2), {"keep": "0 or 1"}, id="wide tile"),
    pytest.param(1, 3, 32, 2, torch.float16, SPREAD, {"keep": "all"}, id="one step"),
    pytest.param(2, 1, 32, 2, torch.float32, BESIDE, {"keep": "any factor", "bias": False}, id="one row, no biases"),
    pytest.param(5, 9, 32, 1, torch.float32, ResidentPlan(32, 8, 2), {"keep": "bool"}, id="resident"),
    pytest.param(6, 9, 32, 3, torch.float16, ResidentPlan(32, 8, 2, early=True), {"keep": "any factor", "masked": True},
                 id="resident, stack, dropout"),
    pytest.param(4, 3, 48, 2, torch.bfloat16, ResidentPlan(64, 8, 4), {"keep": "0 or 1"}, id="resident, stack, 48 units"),
    pytest.param(7, 9, 64, 2, torch.float32, ResidentPlan(64, 8, 4), {"keep": "any factor", "reverse": True},
                 id="resident, directions"),
    pytest.param(9, 3, 128, 1, torch.float32, ResidentPlan(128, 8, 8), {"keep": "any factor"}, id="resident, biases shared"),
    pytest.param(1, 2, 16, 2, torch.float32, ResidentPlan(16, 8, 1), {"keep": "all"}, id="resident, one step"),
    pytest.param(6, 11, 64, 1, torch.float16, StagedPlan(16, 8, 1, 1, 1), {"keep": "bool"}, id="staged, one tile"),
    pytest.param(6, 13, 64, 2, torch.float32, StagedPlan(16, 8, 2, 2, 1), {"keep": "any factor", "reverse": True},
                 id="staged, two tiles, directions"),
    pytest.param(4, 41, 64, 1, torch.float32, StagedPlan(16, 8, 4, 1, 2), {"keep": "0 or 1"}, id="staged, four tiles"),
    pytest.param(5, 43, 64, 2, torch.float16, StagedPlan(32, 8, 4, 1, 2), {"keep": "bool", "reverse": True},
                 id="staged, four tiles, directions"),
    pytest.param(4, 41, 128, 1, torch.bfloat16, StagedPlan(16, 8, 6, 1, 1, pieces=2, share=1), {"keep": "any factor"},
                 id="staged, in pieces"),
    pytest.param(1, 5, 64, 2, torch.float16, StagedPlan(16, 8, 2, 1, 1), {"keep": "all", "reverse": True},
                 id="staged, one step"),
]  # fmt: skip
FORWARD_ONLY = [
    pytest.param(6, 13, 64, 1, torch.float32, StagedPlan(16, 8, 2, 2, 1, ring=True), {"keep": "bool"}, id="staged, ring"),
    pytest.param(5, 13, 64, 2, torch.float32, StagedPlan(16, 8, 2, 2, 1, ring=True), {"keep": "any factor", "reverse": True},
                 id="staged, ring, directions"),
    pytest.param(5, 5, 32, 2, torch.float32, SPREAD, {"keep": "any factor", "units": 20}, id="stack, padded"),
    pytest.param(5, 5, 32, 2, torch.float16, ResidentPlan(32, 8, 2), {"keep": "bool", "units": 20}, id="resident, padded"),
    pytest.param(5, 5, 64, 1, torch.float16, StagedPlan(16, 8, 1, 1, 1), {"keep": "0 or 1", "units": 57}, id="staged, padded"),
]  # fmt: skip
BACKWARD_ONLY = [
    pytest.param(6, 9, 32, 3, torch.float32, SPREAD, {"keep": "any factor", "dhn": False}, id="no dhn"),
    pytest.param(6, 9, 32, 2, torch.float32, BESIDE, {"keep": "bool", "dy": False}, id="no dy"),
    pytest.param(6, 9, 32, 2, torch.float32, ResidentPlan(32, 8, 2), {"keep": "any factor", "dy": False}, id="resident, no dy"),
    pytest.param(6, 9, 64, 1, torch.float32, StagedPlan(16, 8, 2, 1, 1), {"keep": "bool", "dhn": False}, id="staged, no dhn"),
]  # fmt: skip


@pytest.mark.parametrize("steps, batch, hidden, lanes, dtype, plan, options", [*CASES, *FORWARD_ONLY])
def test_forward(steps, batch, hidden, lanes, dtype, plan, options):
    case = Case(steps, batch, hidden, lanes, dtype, **options).forward(plan).solve()
    assert case.error[0] == 0 and case.host == 0
    used = slice(0, case.units)
    results = [case.out, case.h_n, case.saved, *([] if case.below is None else case.below)]
    for ours, theirs in zip(results, [case.sequences[-1], case.final, case.gates, *case.sequences[:-1]], strict=True):
        ours, theirs = ours.double().unflatten(-1, (-1, hidden))[..., used], theirs.unflatten(-1, (-1, hidden))[..., used]
        assert (ours - theirs).abs().max() < TOLERANCE[dtype] * max(1, theirs.abs().max())


@pytest.mark.parametrize("steps, batch, hidden, lanes, dtype, plan, options", [*CASES, *BACKWARD_ONLY])
def test_backward(steps, batch, hidden, lanes, dtype, plan, options):
    case = Case(steps, batch, hidden, lanes, dtype, **options).backward(plan)
    assert case.error[0] == 0 and case.host == 0
    dhx, d_gates, sums = case.expected_gradients()
    for ours, theirs in ((case.dhx, dhx), (case.d_gates, d_gates), (case.sums.sum(1), sums)):
        assert ours.shape == theirs.shape
        assert (ours.double() - theirs).abs().max() <= 2 * TOLERANCE[dtype] * theirs.abs().max()


# ---- each kind of resets, in each kernel ---------------------------------------------------------------------------------

ONE_LAUNCH = [
    pytest.param(2, {}, SPREAD, id="stack"),
    pytest.param(2, {}, BESIDE, id="stack, beside"),
    pytest.param(2, {"reverse": True}, SPREAD, id="two directions"),
    pytest.param(2, {}, ResidentPlan(64, 8, 4), id="resident, stack"),
    pytest.param(2, {"reverse": True}, ResidentPlan(64, 8, 4), id="resident"),
    pytest.param(2, {"reverse": True}, StagedPlan(16, 8, 2, 1, 1), id="staged"),
]


@pytest.mark.parametrize("lanes, options, plan", ONE_LAUNCH)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(lanes, options, plan, kind):
    case = Case(5, 3, 64, lanes, torch.float32, keep=kind, **options).forward(plan).backward(plan)
    for ours, theirs in ((case.out, case.sequences[-1]), (case.h_n, case.final)):
        assert (ours.double() - theirs).abs().max() < TOLERANCE[torch.float32]
    for ours, theirs in zip((case.dhx, case.d_gates, case.sums.sum(1)), case.expected_gradients(), strict=True):
        assert (ours.double() - theirs).abs().max() <= 2 * TOLERANCE[torch.float32] * max(1, theirs.abs().max())
    if kind == "all":
        assert not case.dhx.any()


@pytest.mark.parametrize("lanes, options, plan", ONE_LAUNCH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bool_and_factor_give_the_same_bits(lanes, options, plan, dtype):
    first, second = (Case(5, 3, 64, lanes, dtype, keep=kind, **options) for kind in ("bool", "0 or 1"))
    for case in (first, second):
        case.forward(plan).backward(plan)
    for name in ("out", "h_n", "saved", "d_gates", "dhx", "sums"):
        assert torch.equal(getattr(first, name), getattr(second, name))


@pytest.mark.parametrize("lanes, options, plan", ONE_LAUNCH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_bool_reset_ends_what_is_not_finite(lanes, options, plan, dtype):
    """NaN in an initial state, backward in a gradient of the last: gone behind a reset, in its own row as in all others."""
    steps, batch = 5, 3
    case, finite = (Case(steps, batch, 64, lanes, dtype, keep="none", **options) for _ in range(2))
    for c in (case, finite):
        c.keep = torch.ones(steps, batch, dtype=torch.bool)
        c.keep[2, 1] = False
    case.hx[:, 1, 5] = NAN
    case.forward(plan)
    finite.forward(plan)
    outs = [c.out.view(steps, batch, -1, 64) for c in (case, finite)]
    for d in range(case.directions):
        after = slice(0, 3) if d else slice(2, steps)
        before = slice(3, steps) if d else slice(0, 2)
        assert torch.equal(outs[0][after, :, d], outs[1][after, :, d])
        assert outs[0][before, 1, d].isnan().any() and torch.equal(outs[0][:, ::2, d], outs[1][:, ::2, d])
    assert torch.equal(case.h_n, finite.h_n)
    case, finite = (Case(steps, batch, 64, lanes, dtype, keep="none", **options) for _ in range(2))
    for c in (case, finite):
        c.keep = torch.ones(steps, batch, dtype=torch.bool)
        c.keep[2, 1] = False
    case.dhn[:, 1, 5] = NAN
    case.backward(plan)
    finite.backward(plan)
    assert torch.equal(case.d_gates[:, :, ::2], finite.d_gates[:, :, ::2])
    if lanes == case.directions:  # a lower layer has it from the one above, too, but no earlier step
        for d in range(case.directions):
            before, after = (slice(3, steps), slice(0, 3)) if d else (slice(0, 2), slice(2, steps))
            assert torch.equal(case.d_gates[d, before], finite.d_gates[d, before])
            assert case.d_gates[d, after, 1].isnan().any()
    assert torch.equal(case.dhx, finite.dhx)


@pytest.mark.parametrize("lanes, options, plan", ONE_LAUNCH)
def test_a_factor_multiplies_what_is_not_finite(lanes, options, plan):
    """NaN * 0 is NaN: a factor is no selection."""
    case = Case(4, 3, 64, lanes, torch.float32, keep="all", **options)
    case.hx[:, 1, 5] = NAN
    case.forward(plan)
    assert case.h_n[:, 1].isnan().any() and case.h_n[:, ::2].isfinite().all()


@pytest.mark.parametrize("lanes, options, plan", ONE_LAUNCH)
def test_the_same_bits_again_and_without_resets(lanes, options, plan):
    """A second run; and keep = 1 says what no keep says, up to roundings that turn where sums are made in another order."""
    first, second = (Case(5, 9, 64, lanes, torch.float32, keep="any factor", **options) for _ in range(2))
    for case in (first, second):
        case.forward(plan).backward(plan)
    for name in ("out", "h_n", "saved", "d_gates", "dhx", "sums"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    all_left, no_resets = (Case(5, 9, 64, lanes, torch.float32, keep="none", **options) for _ in range(2))
    no_resets.given_keep = lambda: None
    for case in (all_left, no_resets):
        case.forward(plan).backward(plan)
    for name in ("out", "h_n", "saved", "d_gates", "dhx", "sums"):
        ours, theirs = getattr(all_left, name), getattr(no_resets, name)
        assert (ours - theirs).abs().max() <= TOLERANCE[torch.float32] * max(1, theirs.abs().max())


@pytest.mark.parametrize("reverse", [False, True])
def test_a_wait_ends(reverse):
    for run_case in (Case.forward, Case.backward):
        case = run_case(Case(4, 4, 32, 2, torch.float16, keep="none", reverse=reverse), SPREAD, missing=1)
        assert case.error[0] != 0 and case.host == case.LAUNCH_ID
        result = case.out if run_case is Case.forward else case.dhx
        assert result.isnan().any()


def test_wrong_keep_is_refused():
    case = Case(4, 3, 32, 1, torch.float16)
    case.keep = torch.ones(4, 3)
    case.given_keep = lambda: case.keep  # float32 is not the dtype of the states
    with pytest.raises(AssertionError):
        case.forward(SPREAD)
    case.keep = torch.ones(3, 4, dtype=torch.float16).t()  # not contiguous
    with pytest.raises(AssertionError):
        case.forward(SPREAD)


# ---- compiled -----------------------------------------------------------------------------------------------------------

SHAPES = {
    # batch, hidden, layers, two directions
    "deep": (10, 256, 6, False),
    "policy": (64, 256, 1, False),
    "two directions": (64, 256, 1, True),
    "h64": (64, 64, 1, False),
    "h128": (64, 128, 1, False),
    "h128, directions": (64, 128, 1, True),
    "h512": (32, 512, 1, False),
    "h512, stack": (16, 512, 2, False),
    "h1024": (8, 1024, 1, False),
    "rl": (256, 256, 1, False),
    "wide": (1024, 256, 1, False),
    "many": (512, 512, 1, False),
    "odd": (33, 200, 1, False),
}
# Bytes that spill after all, in the forward of a stack with dropout, and in the backward of two directions of half precision.
SPARE = {("h512, stack", 4, 89, False): 24, ("h128, directions", 2, 90, True): 40}


# Capability 9.0 has the code of 8.9, assembled anew: with every second shape.
@pytest.mark.parametrize(
    "name, dtype, keep, capability",
    [
        pytest.param(name, dtype, keep, capability, id=f"{name}, {str(dtype)[6:]}, sm{capability}")
        for i, name in enumerate(SHAPES)
        for dtype, keep, capability in (
            (torch.float16, torch.bool, 89),
            (torch.bfloat16, torch.bfloat16, 89),
            (torch.float32, torch.float32, 89),
            (torch.float16, torch.bool, 90),
        )
        if capability == 89 or i % 2
    ],
)
def test_planned_launches_compile(name, dtype, keep, capability):
    """Hardly any spills, 99 KB of shared memory, all programs resident, with dropout where there may be some."""
    batch, hidden, layers, reverse = SHAPES[name]
    gpu = gpu_named("rtx4090" if capability == 89 else "h100")
    options = {"reverse": reverse, "multiprocessors": gpu.multiprocessors}
    lanes = 2 if reverse else layers
    for planned, backward, compiled in (
        (plan_whole_sequence, False, functools.partial(aot.compile_whole_sequence, save_gates=True)),
        (plan_whole_sequence_backward, True, aot.compile_whole_sequence_backward),
    ):
        plan = planned(batch, hidden, lanes, dtype.itemsize, **options)
        if plan is None:
            continue
        plan = resets_plan(plan, hidden, dtype.itemsize, backward=backward)
        stack = plan.lanes > 1 and not reverse
        taken = compiled(
            dtype, plan, batch=batch, hidden=hidden, reverse=reverse, masked=stack, keep=keep, capability=capability
        )
        spare = SPARE.get((name, dtype.itemsize, capability, backward), 0)
        assert taken.spill_bytes <= spare and taken.shared_bytes <= 99 * 1024
        if plan.waits(reverse=reverse):
            resident = gpu.resident_programs(taken.registers, plan.kernel.num_warps, taken.shared_bytes)
            assert plan.programs(batch, hidden) <= gpu.multiprocessors * resident
