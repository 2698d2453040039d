"""The backward of stacks in one launch: its mathematics and its hand-over on a CPU, and what it takes when compiled."""

from __future__ import annotations

import pytest
import torch
from emulated import EMULATED, one_thread, run

from torch_gru_fuse.kernels import aot
from torch_gru_fuse.planner import whole_sequence
from torch_gru_fuse.planner.gpus import gpu_named
from torch_gru_fuse.planner.whole_sequence import WavefrontPlan, WholeSequencePlan

module = EMULATED.wavefront_backward


class Case:
    """A GRU, what its forward saved, and the gradients by autograd in float64.

    Parameters and inputs are of values that tf32 and the kernel's dtype hold.
    """

    def __init__(self, steps, batch, hidden, lanes, dtype, *, reverse=False, masked=False, dy=True, dhn=True, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.dtype, self.lanes, self.reverse, self.hidden = dtype, lanes, reverse, hidden
        layers, directions = (1, 2) if reverse else (lanes, 1)
        grid = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16

        def random(*size, scale=1.0):
            return (torch.randn(size, generator=generator) * scale).to(grid).double()

        self.w_ih = [random(3 * hidden, hidden, scale=hidden**-0.5).requires_grad_() for _ in range(lanes)]
        self.w_hh = [random(3 * hidden, hidden, scale=hidden**-0.5).requires_grad_() for _ in range(lanes)]
        self.b_ih = [random(3 * hidden, scale=0.3).requires_grad_() for _ in range(lanes)]
        self.b_hh = [random(3 * hidden, scale=0.3).requires_grad_() for _ in range(lanes)]
        self.x = random(steps, batch, hidden).requires_grad_()
        self.hx = random(lanes, batch, hidden).requires_grad_()
        self.masks = None
        if masked:
            self.masks = (torch.rand((layers - 1, steps, batch, hidden), generator=generator) < 0.5).double() * 2
        self.dy = random(steps, batch, directions * hidden) if dy else None
        self.dhn = random(lanes, batch, hidden) if dhn else None

        saved, sequences, finals = [], [], []
        x = self.x
        for layer in range(layers):
            both = []
            for d in range(directions):
                l = layer * directions + d
                order = range(steps) if d == 0 else range(steps - 1, -1, -1)
                h, states, gates = self.hx[l], [None] * steps, [None] * steps
                for t in order:
                    i_r, i_z, i_n = (x[t] @ self.w_ih[l].T + self.b_ih[l]).chunk(3, 1)
                    h_r, h_z, hn = (h @ self.w_hh[l].T + self.b_hh[l]).chunk(3, 1)
                    r, z = torch.sigmoid(i_r + h_r), torch.sigmoid(i_z + h_z)
                    n = torch.tanh(i_n + r * hn)
                    h = n + z * (h - n)
                    states[t], gates[t] = h, torch.stack((r, z, n, hn), 1)
                both.append(torch.stack(states))
                saved.append(torch.stack(gates))
                finals.append(h)
            x = torch.cat(both, 2)
            sequences.append(x)
            if masked and layer + 1 < layers:
                x = x * self.masks[layer]
        self.sequences, self.gates = sequences, torch.stack(saved)
        loss = (x * self.dy).sum() if dy else 0.0
        if dhn:
            loss = loss + (torch.stack(finals) * self.dhn).sum()
        self.leaves = [self.x, self.hx, *self.w_ih, *self.w_hh, *self.b_ih, *self.b_hh]
        self.expected = torch.autograd.grad(loss, self.leaves)

    def kernel_inputs(self):
        def to(x):
            return None if x is None else x.detach().to(self.dtype).contiguous()

        stack = self.lanes > 1 and not self.reverse
        below = torch.stack(self.sequences[:-1]) if stack else None
        return dict(
            dy=to(self.dy), dhn=to(self.dhn), h0=to(self.hx), out=to(self.sequences[-1]), below=to(below), gates=to(self.gates),
            w_ih=[to(w) for w in self.w_ih[1:]] if stack else [], w_hh=[to(w) for w in self.w_hh],
        )  # fmt: skip

    def run(self, plan, *, missing=0, **changed):
        inputs = self.kernel_inputs() | changed
        lanes, batch, hidden = inputs["h0"].shape
        gates = inputs["gates"]
        integer = torch.int32 if self.dtype == torch.float32 else torch.int16
        self.d_gates = torch.full(gates.shape, -1, dtype=integer).view(self.dtype)
        self.dhx = torch.full_like(inputs["h0"], float("nan"))
        self.sums = torch.full((lanes, -(-batch // plan.rows), 4, hidden), float("nan"))
        self.error, self.host = torch.zeros(4, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
        self.error[1], self.error[2] = self.host.data_ptr(), 29
        masks = None if self.masks is None else self.masks.to(self.dtype)
        grid, arguments = module.wavefront_backward_launch(
            **inputs, d_gates=self.d_gates, dhx=self.dhx, sums=self.sums, error=self.error, plan=plan, masks=masks
        )
        with one_thread():
            run(module.wavefront_backward_kernel, (grid[0] - missing,), arguments)
        return self

    def gradients(self):
        """Of the leaves, by the products that follow the kernel."""
        d = self.d_gates.double()
        lanes, steps, batch, _, hidden = d.shape
        dx, d_ih, d_hh, b_ih, b_hh = 0.0, [], [], [], []
        for l in range(lanes):
            layer, back = (0, l == 1) if self.reverse else (l, False)
            inputs = self.x if layer == 0 else self.sequences[layer - 1]
            if self.masks is not None and layer > 0:
                inputs = inputs * self.masks[layer - 1]
            states = self.sequences[layer][:, :, l * hidden :][:, :, :hidden] if self.reverse else self.sequences[layer]
            before = torch.cat([states[1:], self.hx[l : l + 1]] if back else [self.hx[l : l + 1], states[:-1]])
            of_x = d[l][:, :, 1:].reshape(steps, batch, 3 * hidden)
            of_h = torch.cat((d[l][:, :, 1], d[l][:, :, 2], d[l][:, :, 0]), 2)
            d_ih.append(torch.einsum("tbg,tbi->gi", of_x, inputs.detach()))
            d_hh.append(torch.einsum("tbg,tbi->gi", of_h, before.detach()))
            hn, r, z, n = self.sums[l].double().sum(0)
            b_ih.append(torch.cat((r, z, n)))
            b_hh.append(torch.cat((r, z, hn)))
            if layer == 0:
                dx = dx + of_x @ self.w_ih[l].detach()
        return [dx, self.dhx.double(), *d_ih, *d_hh, *b_ih, *b_hh]


# Relative to the greatest of a kind.  What rounding gates, states and gradients once costs, twice the worst that was seen.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}

CASES = [
    # steps, batch, hidden, lanes, dtype, plan, options
    pytest.param(5, 3, 32, 3, torch.float16, WavefrontPlan(16, 8, 2), {}, id="stack, lane above after"),
    pytest.param(5, 10, 32, 3, torch.float32, WavefrontPlan(16, 16, 2, 2), {}, id="stack, lane above beside"),
    pytest.param(5, 10, 32, 3, torch.bfloat16, WavefrontPlan(16, 8, 2, 2), {"masked": True}, id="stack, beside, dropout"),
    pytest.param(4, 3, 32, 2, torch.float32, WavefrontPlan(16, 8, 2), {"masked": True}, id="stack, after, dropout"),
    pytest.param(5, 9, 32, 2, torch.float16, WavefrontPlan(16, 8, 2), {"reverse": True}, id="two directions"),
    pytest.param(5, 9, 48, 2, torch.float32, WavefrontPlan(16, 8, 2), {"reverse": True}, id="two directions, 48 units"),
    pytest.param(5, 3, 48, 2, torch.float16, WavefrontPlan(16, 8, 4), {}, id="stack, 48 units"),
    pytest.param(4, 70, 64, 1, torch.float16, WavefrontPlan(64, 32, 2, unit_warps=2), {}, id="wide tile"),
    pytest.param(4, 9, 64, 1, torch.float32, WavefrontPlan(16, 8, 2), {}, id="one layer"),
    pytest.param(1, 2, 32, 2, torch.float16, WavefrontPlan(16, 8, 2), {}, id="one step"),
    pytest.param(1, 2, 32, 2, torch.float16, WavefrontPlan(16, 8, 2, 2), {"dhn": False}, id="one step, beside, no dhn"),
    pytest.param(1, 2, 32, 1, torch.float32, WavefrontPlan(16, 8, 2), {}, id="one step, one layer"),
    pytest.param(2, 2, 32, 1, torch.float32, WavefrontPlan(16, 8, 2), {"dy": False}, id="two steps, no dy"),
    pytest.param(3, 2, 32, 2, torch.float32, WavefrontPlan(16, 8, 2), {"dhn": False}, id="no dhn"),
]


@pytest.mark.parametrize(("steps", "batch", "hidden", "lanes", "dtype", "plan", "options"), CASES)
def test_gradients_of_a_gru(steps, batch, hidden, lanes, dtype, plan, options):
    case = Case(steps, batch, hidden, lanes, dtype, **options).run(plan)
    assert case.error[0] == 0 and case.host == 0
    for ours, theirs in zip(case.gradients(), case.expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= TOLERANCE[dtype] * theirs.abs().max()


def test_the_same_bits_again():
    runs = [Case(4, 10, 32, 2, torch.float32).run(WavefrontPlan(16, 8, 2, 2)) for _ in range(2)]
    for name in ("d_gates", "dhx", "sums"):
        first, second = (getattr(case, name).view(torch.int32) for case in runs)
        assert torch.equal(first, second)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_not_finite_in_one_row_stays_there(dtype, value):
    case = Case(3, 3, 32, 2, dtype)
    dy = case.dy.to(dtype)
    dy[1, 1, 5] = value
    finite = Case(3, 3, 32, 2, dtype).run(WavefrontPlan(16, 8, 2))
    case.run(WavefrontPlan(16, 8, 2), dy=dy)
    assert case.error[0] == 0
    assert not case.dhx[:, 1].isfinite().any()
    for row in (0, 2):
        assert torch.equal(case.dhx[:, row], finite.dhx[:, row])
        assert torch.equal(case.d_gates[:, :, row], finite.d_gates[:, :, row])


def test_a_wait_ends():
    case = Case(3, 2, 32, 2, torch.float16).run(WavefrontPlan(16, 8, 2), missing=1)
    assert case.error[0] != 0 and case.host == 29


@pytest.mark.parametrize("stack", [False, True], ids=["one layer", "stack"])
@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("hidden", [64, 128, 256, 512, 1024])
def test_planned_launches_fit_a_4090(hidden, element_bytes, stack):
    """sm_89 code of all tiles that are planned: no spills, 99 KB of shared memory, all programs resident on 128 SMs."""
    gpu, found = gpu_named("rtx4090"), set()
    dtype = torch.float16 if element_bytes == 2 else torch.float32
    lanes = 2 if stack else 1
    for batch in (1, 16, 40, 70):
        kernel = whole_sequence._wavefront_backward(batch, hidden, lanes, element_bytes, stack, gpu.multiprocessors)
        if kernel is None or kernel in found:
            continue
        found.add(kernel)
        planned = WholeSequencePlan(lanes, kernel)
        taken = aot.compile_whole_sequence_backward(dtype, planned, batch=batch, hidden=hidden, masked=stack)
        assert taken.spill_bytes == 0 and taken.stack_bytes == 0
        resident = gpu.resident_programs(taken.registers, planned.kernel.num_warps, taken.shared_bytes)
        assert planned.programs(batch, hidden) <= gpu.multiprocessors * resident
    assert found or (hidden, element_bytes) == (1024, 4) or (stack and (hidden, element_bytes) in ((512, 4), (1024, 2)))
