"""Pairs of layers in one launch, forward and backward, each lane in either direction of time: their mathematics on a CPU, and
what they take when compiled."""

from __future__ import annotations

from dataclasses import replace

import interpreted
import pytest
import torch
from emulated import EMULATED, one_thread, run

from torch_gru_fuse.kernels import aot
from torch_gru_fuse.planner.gpus import gpu_named
from torch_gru_fuse.planner.whole_sequence import (
    ResidentPlan,
    StagedPlan,
    WavefrontPlan,
    WholeSequencePlan,
    plan_whole_sequence,
    plan_whole_sequence_backward,
)

prepare = interpreted.load("kernels.prepare")

# Forward and backward.
PLANS = {
    "wavefront": (WavefrontPlan(16, 8, 2), WavefrontPlan(16, 8, 2)),
    "resident": (ResidentPlan(32, 8, 2), ResidentPlan(32, 8, 2)),
    "staged": (StagedPlan(16, 8, 2, 1, 1), StagedPlan(16, 8, 2, 1, 1)),
    "staged, one tile": (StagedPlan(32, 8, 1, 1, 2), StagedPlan(32, 8, 1, 1, 2)),
}
HIDDEN = {"wavefront": 48, "resident": 32, "staged": 64, "staged, one tile": 64}


class Pair:
    """Two layers, their inputs, and by autograd in float64 what comes of them.  Bit l of `back`: lane l walks backwards."""

    def __init__(self, steps, batch, hidden, dtype, back, *, bias=True):
        generator = torch.Generator().manual_seed(0)
        self.back, self.dtype, self.sizes = back, dtype, (steps, batch, hidden)
        grid = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16  # operands are exact

        def random(*size, scale=1.0):
            return (torch.randn(size, generator=generator) * scale).to(grid).double().requires_grad_()

        self.x, self.hx = random(2, steps, batch, hidden), random(2, batch, hidden)
        self.w_ih, self.w_hh = (random(2, 3 * hidden, hidden, scale=hidden**-0.5) for _ in range(2))
        self.b_ih, self.b_hh = (random(2, 3 * hidden, scale=0.3) for _ in range(2)) if bias else (None, None)
        self.dy, self.dhn = random(2, steps, batch, hidden).detach(), random(2, batch, hidden).detach()
        biases = [] if self.b_ih is None else [self.b_ih, self.b_hh]
        outs, finals = [], []
        for l in range(2):
            x = self.in_time(l, self.x[l])
            params = [p[l] for p in (self.w_ih, self.w_hh, *biases)]
            out, final = torch.gru(x, self.hx[l : l + 1], params, bias, 1, 0.0, False, False, False)
            outs.append(self.in_time(l, out))
            finals.append(final[0])
        self.out, self.h_n = torch.stack(outs), torch.stack(finals)
        self.leaves = [self.x, self.hx, self.w_hh, *biases]

    def gradients_of(self, loss):
        return torch.autograd.grad(loss, self.leaves)

    def in_time(self, l, x):
        """Memory in the order of the lane's steps, or the reverse of that."""
        return x.flip(0) if self.back >> l & 1 else x

    def to(self, x):
        return None if x is None else x.detach().to(self.dtype).contiguous()

    def each(self, x):
        return None if x is None else [self.to(lane) for lane in x]

    def nan(self, *size, dtype=None):
        return torch.full(size, float("nan"), dtype=dtype or self.dtype)

    def forward(self, name, plan):
        steps, batch, hidden = self.sizes
        gi = self.to(torch.einsum("ltbi,lgi->ltbg", self.x, self.w_ih))
        hx, out, h_n = self.to(self.hx), self.nan(2, steps, batch, hidden), self.nan(2, batch, hidden)
        gates = self.nan(2, steps, batch, 4, hidden)
        error, host = torch.full((4,), -1), torch.zeros(1, dtype=torch.int32)
        h0 = None if name == "resident" else torch.empty_like(hx)
        if h0 is None:
            error.zero_()
        else:  # to what prepares them the lanes are a stack of two
            grid, arguments = prepare.prepare_launch(hx, host, 17, out[1], out[:1], h0, h_n, error, reverse=False)
            prepare.prepare_kernel[grid](**arguments)
        module = getattr(EMULATED, name)
        grid, arguments = getattr(module, f"{name}_launch")(
            gi, hx if h0 is None else h0, None, [], self.each(self.w_hh), self.each(self.b_ih), self.each(self.b_hh), out, h_n,
            gates, error, plan=plan, pair=self.back,
        )  # fmt: skip
        with one_thread():
            run(getattr(module, f"{name}_kernel"), grid, arguments)
        assert error[0] == 0 and host == 0
        return out, h_n, gates

    def backward(self, name, plan, out, gates, dy, dhn):
        steps, batch, hidden = self.sizes
        integer = torch.int32 if self.dtype == torch.float32 else torch.int16
        d_gates = torch.full(gates.shape, -1, dtype=integer).view(self.dtype)
        dhx = self.nan(2, batch, hidden)
        sums = self.nan(2, -(-batch // (plan.rows * getattr(plan, "tiles", 1))), 4, hidden, dtype=torch.float32)
        error, host = torch.zeros(4, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
        error[1], error[2] = host.data_ptr(), 29
        module = getattr(EMULATED, f"{name}_backward")
        grid, arguments = getattr(module, f"{name}_backward_launch")(
            self.to(dy), self.to(dhn), self.to(self.hx), out, None, gates, [], self.each(self.w_hh), d_gates, dhx, sums, error,
            plan=plan, pair=self.back,
        )  # fmt: skip
        with one_thread():
            run(getattr(module, f"{name}_backward_kernel"), grid, arguments)
        assert error[0] == 0 and host == 0
        hn, r, z, n = d_gates.double().unbind(3)
        of_x, of_h = torch.cat((r, z, n), -1), torch.cat((r, z, hn), -1)
        before = torch.stack([  # of each step, where it is in memory
            self.in_time(l, torch.cat((self.hx[l : l + 1], self.in_time(l, self.out[l])[:-1]))) for l in range(2)
        ])  # fmt: skip
        s_hn, s_r, s_z, s_n = sums.double().sum(1).unbind(1)
        products = [
            torch.einsum("ltbg,lgi->ltbi", of_x, self.w_ih), dhx.double(), torch.einsum("ltbg,ltbi->lgi", of_h, before),
            torch.cat((s_r, s_z, s_n), 1), torch.cat((s_r, s_z, s_hn), 1),
        ]  # fmt: skip
        return products[: len(self.leaves)]


TOLERANCE = {torch.float32: 4e-3, torch.float16: 8e-3, torch.bfloat16: 6e-2}


def assert_close(ours, theirs, dtype):
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        scale = max(1.0, b.abs().max().item())
        assert a.shape == b.shape and (a.double() - b).abs().max().item() < TOLERANCE[dtype] * scale, i


@pytest.mark.parametrize("back", [0b00, 0b01, 0b10, 0b11])
@pytest.mark.parametrize("kind", PLANS)
def test_two_layers_forward_and_backward(kind, back):
    name, dtype = kind.split(",")[0], [torch.float32, torch.float16, torch.bfloat16][back % 3]
    pair = Pair(5, 9, HIDDEN[kind], dtype, back)
    out, h_n, gates = pair.forward(name, PLANS[kind][0])
    assert_close((out, h_n), (pair.out, pair.h_n), dtype)
    gradients = pair.backward(name, PLANS[kind][1], out, gates, pair.dy, pair.dhn)
    assert_close(gradients, pair.gradients_of((pair.out * pair.dy).sum() + (pair.h_n * pair.dhn).sum()), dtype)


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("kind", PLANS)
def test_few_steps_no_biases_and_no_gradient_of_the_states(kind, steps):
    name = kind.split(",")[0]
    pair = Pair(steps, 3, HIDDEN[kind], torch.float32, 0b10, bias=False)
    out, h_n, gates = pair.forward(name, PLANS[kind][0])
    assert_close((out, h_n), (pair.out, pair.h_n), torch.float32)
    gradients = pair.backward(name, PLANS[kind][1], out, gates, pair.dy, None)
    assert_close(gradients, pair.gradients_of((pair.out * pair.dy).sum()), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_lanes_do_not_mix(dtype):
    """NaN in one layer's initial state is nowhere in the other's results."""
    for kind, (plan, _) in PLANS.items():
        pair = Pair(3, 4, HIDDEN[kind], dtype, 0b10)
        with torch.no_grad():
            pair.hx[0, 1] = float("nan")
        out, h_n, _ = pair.forward(kind.split(",")[0], plan)
        assert out[0, :, 1].isnan().all() and not out[1].isnan().any() and not h_n[1].isnan().any()


# ---- compiled -----------------------------------------------------------------------------------------------------------

SHAPES = [(10, 256), (64, 64), (16, 512), (256, 256), (10, 112)]


def without_ring(plan):
    """As a pair runs it."""
    return replace(plan, kernel=replace(plan.kernel, ring=False)) if getattr(plan.kernel, "ring", False) else plan


# Compute capability 9.0 with each shape and each dtype, but not with each of both.
@pytest.mark.parametrize(
    "batch, hidden, gpu, capability, dtype",
    [
        pytest.param(*shape, gpu, capability, dtype, id=f"{'-'.join(map(str, shape))}-{gpu}-{name}")
        for i, shape in enumerate(SHAPES)
        for gpu, capability in (("rtx4090", 89), ("h100", 90))
        for j, (name, dtype) in enumerate({"fp16": torch.float16, "tf32": torch.float32}.items())
        if capability == 89 or (i + j) % 2 == 0
    ],
)
def test_compiled_without_spills(batch, hidden, gpu, capability, dtype):
    where = gpu_named(gpu)
    options = dict(
        reverse=True, multiprocessors=where.multiprocessors, shared_bytes=where.shared_bytes_per_program
    )
    found = []
    plan = plan_whole_sequence(batch, hidden, 2, dtype.itemsize, **options)
    if plan is not None:
        found += [
            aot.compile_whole_sequence(
                dtype, without_ring(plan), batch=batch, hidden=hidden, pair=pair, save_gates=pair == 0b10, capability=capability
            )
            for pair in (0b00, 0b10)
        ]
    backward = plan_whole_sequence_backward(batch, hidden, 2, dtype.itemsize, **options)
    if backward is not None and not isinstance(backward.kernel, StagedPlan):  # those the planner does not take for a pair
        found.append(
            aot.compile_whole_sequence_backward(
                dtype, backward, batch=batch, hidden=hidden, pair=0b10, capability=capability
            )
        )
    assert found
    for resources in found:
        assert resources.spill_bytes == 0 and resources.stack_bytes == 0 and resources.registers <= 255


@pytest.mark.parametrize("kernel", [WavefrontPlan(16, 8, 4), ResidentPlan(64, 8, 4)])
def test_lanes_of_two_directions_are_not_those_of_a_pair(kernel):
    """The code differs: where the second lane begins, and which way it goes."""
    plan, hidden = WholeSequencePlan(2, kernel), 256 if isinstance(kernel, WavefrontPlan) else 64
    codes = {
        aot.compile_whole_sequence(torch.float16, plan, batch=8, hidden=hidden, **kind).ptx
        for kind in ({"reverse": True}, {"pair": 0b00}, {"pair": 0b10})
    }
    assert len(codes) == 3
