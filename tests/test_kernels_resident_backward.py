"""The backward of small layers in one launch: its mathematics and its hand-over on a CPU, and what it takes when compiled."""

from __future__ import annotations

import functools

import pytest
import torch
from emulated import EMULATED, one_thread, run

from torch_gru_fuse.kernels import aot, resident_backward
from torch_gru_fuse.planner.whole_sequence import ResidentPlan

module = EMULATED.resident_backward
NAN = float("nan")


def plan_of(hidden, rows=8):
    units = max(16, 1 << (hidden - 1).bit_length())
    return ResidentPlan(units, rows, units // 16)


# ---- mathematics and hand-over ------------------------------------------------------------------------------------------


class Case:
    """A layer, both directions of one, or a stack: what the kernel is given, and the gradients by autograd in float64.

    Weights are of values that tf32 and the kernel's dtype hold.
    """

    LAUNCH_ID = 31

    def __init__(self, steps, batch, hidden, lanes, dtype, *, reverse=False, masked=False, dy=True, dhn=True):
        generator = torch.Generator().manual_seed(steps + 7 * batch + hidden)
        self.dtype, self.lanes, self.stack = dtype, lanes, lanes > 1 and not reverse
        self.integer = torch.int32 if dtype == torch.float32 else torch.int16

        def random(*size, scale=1.0):
            x = torch.randn(size, generator=generator) * scale
            return x.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float16).double()

        self.h0 = random(lanes, batch, hidden).requires_grad_()
        self.w_hh = [random(3 * hidden, hidden, scale=hidden**-0.5) for _ in range(lanes)]
        self.w_ih = [random(3 * hidden, hidden, scale=hidden**-0.5) for _ in range(lanes - 1 if self.stack else 0)]
        self.dy = random(steps, batch, (2 if reverse else 1) * hidden) if dy else None
        self.dhn = random(lanes, batch, hidden) if dhn else None
        self.masks = None
        if masked:
            self.masks = (torch.rand((lanes - 1, steps, batch, hidden), generator=generator) < 0.5).double() * 2

        # what is added to hn and to the pre-activations of r, z, n: its gradients are those that the kernel makes
        added = random(lanes, steps, batch, 4, hidden).requires_grad_()
        outs, finals, self.gates = [], [], torch.empty_like(added, requires_grad=False)
        for l in range(lanes):
            out, h = [None] * steps, self.h0[l]
            for t in range(steps)[:: -1 if reverse and l else 1]:
                a = added[l, t].unbind(1)
                x_r, x_z, x_n = 0.0, 0.0, 0.0
                if self.stack and l > 0:
                    below = outs[l - 1][t] if self.masks is None else outs[l - 1][t] * self.masks[l - 1, t]
                    x_r, x_z, x_n = (below @ self.w_ih[l - 1].T).chunk(3, 1)
                h_r, h_z, h_n = (h @ self.w_hh[l].T).chunk(3, 1)
                r, z, hn = torch.sigmoid(a[1] + x_r + h_r), torch.sigmoid(a[2] + x_z + h_z), a[0] + h_n
                n = torch.tanh(a[3] + x_n + r * hn)
                out[t] = h = n + z * (h - n)
                self.gates[l, t] = torch.stack((r, z, n, hn), 1).detach()
            outs.append(torch.stack(out))
            finals.append(h)
        self.out = torch.cat(outs, 2) if reverse else outs[-1]
        self.below = torch.stack(outs[:-1]) if self.stack else None
        loss = self.out.sum() * 0
        if dy:
            loss = loss + (self.out * self.dy).sum()
        if dhn:
            loss = loss + (torch.stack(finals) * self.dhn).sum()
        d_gates, dhx = torch.autograd.grad(loss, (added, self.h0))
        self.expected = d_gates, dhx, d_gates.sum((1, 2))

    def run(self, plan, *, missing=0, **changed):
        """Fills ``d_gates``, ``dhx``, ``sums``, ``error`` and ``host``."""

        def to(x):
            return None if x is None else x.detach().to(self.dtype).contiguous()

        names = ("dy", "dhn", "h0", "out", "below", "gates", "masks")
        given = {name: to(getattr(self, name)) for name in names}
        given |= {name: [to(w) for w in getattr(self, name)] for name in ("w_ih", "w_hh")} | changed
        lanes, steps, batch, _, hidden = given["gates"].shape
        self.d_gates = torch.full_like(given["gates"], NAN)
        if self.stack:
            self.d_gates.view(self.integer).fill_(-1)
        self.dhx = torch.full_like(given["h0"], NAN)
        self.sums = torch.full((lanes, -(-batch // plan.rows), 4, hidden), NAN)
        self.error, self.host = torch.zeros(4, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
        self.error[1], self.error[2] = self.host.data_ptr(), self.LAUNCH_ID
        grid, arguments = module.resident_backward_launch(
            **given, d_gates=self.d_gates, dhx=self.dhx, sums=self.sums, error=self.error, plan=plan
        )
        with one_thread():
            run(module.resident_backward_kernel, (grid[0] - missing,), arguments)
        return self

    def results(self):
        return self.d_gates, self.dhx, self.sums.sum(1)

    def bits(self):
        return [x.view(torch.int16) for x in self.results()]


# Of the greatest value: what rounding gates, states and gradients once costs, twice the worst that was seen.
TOLERANCE = {torch.float32: 7e-4, torch.float16: 1.5e-3, torch.bfloat16: 1.3e-2}

ONE = [
    # steps, batch, hidden, dtype, options
    pytest.param(1, 3, 16, torch.float32, {}, id="one step"),
    pytest.param(2, 9, 16, torch.float16, {}, id="two steps"),
    pytest.param(3, 8, 32, torch.bfloat16, {}, id="three steps"),
    pytest.param(5, 17, 64, torch.float16, {}, id="64 units"),
    pytest.param(7, 9, 64, torch.float32, {}, id="64 units, tf32"),
    pytest.param(4, 3, 48, torch.float32, {}, id="48 units, tf32"),
    pytest.param(6, 3, 96, torch.float16, {}, id="96 units"),
    pytest.param(9, 2, 128, torch.bfloat16, {}, id="128 units"),
    pytest.param(5, 3, 32, torch.float16, {"dy": False}, id="no dy"),
    pytest.param(5, 3, 32, torch.float32, {"dhn": False}, id="no dhn"),
    pytest.param(1, 3, 32, torch.float32, {"dhn": False, "dy": False}, id="neither"),
]
DIRECTIONS = [
    pytest.param(5, 9, 32, torch.float16, {}, id="32 units"),
    pytest.param(1, 3, 64, torch.float32, {}, id="one step, tf32"),
    pytest.param(6, 3, 48, torch.bfloat16, {"dhn": False}, id="48 units, no dhn"),
    pytest.param(3, 3, 16, torch.float32, {"dy": False}, id="no dy"),
]
STACKS = [
    pytest.param(5, 9, 16, 2, torch.float32, {}, id="two"),
    pytest.param(1, 3, 16, 2, torch.float16, {}, id="two, one step"),
    pytest.param(2, 3, 32, 2, torch.bfloat16, {"masked": True}, id="two, two steps, dropout"),
    pytest.param(3, 9, 64, 2, torch.float16, {"masked": True, "dhn": False}, id="two, dropout, no dhn"),
    pytest.param(6, 3, 48, 3, torch.float16, {"masked": True}, id="three, dropout, 48 units"),
    pytest.param(7, 9, 32, 3, torch.float32, {"dy": False}, id="three, no dy"),
    pytest.param(4, 3, 48, 3, torch.float32, {"masked": True}, id="three, dropout, tf32"),
    pytest.param(5, 2, 128, 2, torch.bfloat16, {}, id="two, 128 units"),
]


def check(case):
    assert case.error[0] == 0 and case.host == 0
    for ours, theirs in zip(case.results(), case.expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours.double() - theirs).abs().max() <= TOLERANCE[case.dtype] * theirs.abs().max()


@pytest.mark.parametrize(("steps", "batch", "hidden", "dtype", "options"), ONE)
def test_gradients_of_a_layer(steps, batch, hidden, dtype, options):
    check(Case(steps, batch, hidden, 1, dtype, **options).run(plan_of(hidden)))


@pytest.mark.parametrize(("steps", "batch", "hidden", "dtype", "options"), DIRECTIONS)
def test_gradients_of_two_directions(steps, batch, hidden, dtype, options):
    check(Case(steps, batch, hidden, 2, dtype, reverse=True, **options).run(plan_of(hidden)))


@pytest.mark.parametrize(("steps", "batch", "hidden", "lanes", "dtype", "options"), STACKS)
def test_gradients_of_a_stack(steps, batch, hidden, lanes, dtype, options):
    check(Case(steps, batch, hidden, lanes, dtype, **options).run(plan_of(hidden)))


@pytest.mark.parametrize("lanes", [1, 2])
def test_tiles_of_16_rows(lanes):
    check(Case(5, 18, 32, lanes, torch.float16).run(plan_of(32, rows=16)))


@pytest.mark.parametrize("lanes", [1, 3])
def test_the_same_bits_again(lanes):
    first, second = (Case(5, 9, 32, lanes, torch.float32).run(plan_of(32)).bits() for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("lanes", "hidden"), [(1, 48), (2, 16)])
@pytest.mark.parametrize("row", [1, 2], ids=["a row", "the last row, which others stand in for"])
def test_not_finite_in_one_row_stays_there(lanes, hidden, dtype, value, row):
    finite = Case(4, 3, hidden, lanes, dtype).run(plan_of(hidden))
    case = Case(4, 3, hidden, lanes, dtype)
    dy = case.dy.to(dtype)
    dy[2, row, 5] = value
    case.run(plan_of(hidden), dy=dy)
    assert case.error[0] == 0
    assert not case.dhx[:, row].isfinite().any()
    others = [b for b in range(3) if b != row]
    assert torch.equal(case.d_gates[:, :, others], finite.d_gates[:, :, others])
    assert torch.equal(case.dhx[:, others], finite.dhx[:, others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["dy", "dhn", "h0", "masks"])
def test_inputs_may_hold_any_bits(dtype, name):
    """The flag pattern itself: it spoils its row as a NaN does, nobody waits for it, and none is stored."""
    case = Case(3, 3, 16, 2, dtype, masked=True)
    given = getattr(case, name).detach().to(dtype)
    given.view(case.integer)[(0, 0, 1) if name == "masks" else (0, 1)] = -1
    case.run(plan_of(16), **{name: given})
    assert case.error[0] == 0 and case.host == 0
    assert case.d_gates[:, :, 1].isnan().any() and not case.d_gates[:, :, [0, 2]].isnan().any()
    assert not (case.d_gates.view(case.integer) == -1).any() and not (case.dhx.view(case.integer) == -1).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("missing", [1, 2], ids=["between the lanes", "and the higher lane"])
def test_a_wait_ends(dtype, missing):
    """Programs that never run: the others end, say so, and what had to wait for them does not look valid."""
    case = Case(4, 3, 16, 2, dtype).run(plan_of(16), missing=missing)
    assert case.error[0] == 1 and case.host == case.LAUNCH_ID
    assert case.d_gates[0].isnan().all() and case.dhx[0].isnan().all()


# ---- compiled -----------------------------------------------------------------------------------------------------------


@functools.cache
def compiled(dtype, hidden, lanes, capability, reverse=False, masked=False, dy=True):
    new = functools.partial(torch.empty, dtype=dtype, device="meta")
    steps, batch, stack = 16, 40, lanes > 1 and not reverse
    plan = plan_of(hidden)
    out, state, w = new(steps, batch, (2 if reverse else 1) * hidden), new(lanes, batch, hidden), new(3 * hidden, hidden)
    gates, below = new(lanes, steps, batch, 4, hidden), new(lanes - 1, steps, batch, hidden) if stack else None
    grid, arguments = resident_backward.resident_backward_launch(
        out if dy else None, state, state, out, below, gates, [w] * (lanes - 1 if stack else 0), [w] * lanes, gates, state,
        new(lanes, 5, 4, hidden, dtype=torch.float32), new(4, dtype=torch.int64), plan=plan, masks=below if masked else None,
    )  # fmt: skip
    assert grid == (5 * (2 * lanes - 1 if stack else lanes),)
    return aot.compile_launch(resident_backward.resident_backward_kernel, arguments, capability=capability)


COMPILED = [
    # dtype, hidden, lanes, options
    pytest.param(torch.float16, 64, 1, {}, id="64 units"),
    pytest.param(torch.bfloat16, 128, 1, {}, id="128 units"),
    pytest.param(torch.float32, 64, 1, {}, id="64 units, tf32"),
    pytest.param(torch.float16, 96, 2, {"reverse": True}, id="two directions, 96 units"),
    pytest.param(torch.float32, 48, 2, {"reverse": True}, id="two directions, 48 units, tf32"),
    pytest.param(torch.float16, 32, 1, {"dy": False}, id="32 units, no dy"),
    pytest.param(torch.bfloat16, 64, 2, {"masked": True}, id="stack, 64 units, dropout"),
    pytest.param(torch.float16, 16, 2, {}, id="stack, 16 units"),
    pytest.param(torch.float32, 32, 3, {"masked": True}, id="stack, 32 units, dropout, tf32"),
]


# Compute capability 9.0 in one dtype.
@pytest.mark.parametrize(
    ("dtype", "hidden", "lanes", "options", "capability"),
    [
        pytest.param(*case.values, capability, id=f"{case.id}, sm{capability}")
        for case in COMPILED
        for capability in (89, 90)
        if capability == 89 or case.values[0] == torch.float16
    ],
)
def test_compiled_without_spills(dtype, hidden, lanes, options, capability):
    taken = compiled(dtype, hidden, lanes, capability, **options)
    assert taken.stack_bytes == 0 and taken.spill_bytes == 0
    assert taken.shared_bytes <= 99 * 1024
    assert "wgmma" not in taken.ptx


def test_one_barrier_a_step():
    """Seven copies of a step, one barrier before and one after; and no access to shared memory of less than four bytes."""
    ptx = compiled(torch.float16, 64, 1, 89).ptx
    assert ptx.count("bar.sync") == 9
    accesses = [line.split()[0] for line in ptx.splitlines() if line.strip().startswith(("ld.shared", "st.shared"))]
    assert accesses and all(a.split(".")[2].startswith("v") or a.endswith("b32") for a in accesses)


@pytest.mark.parametrize("units", [16, 32, 64, 128])
@pytest.mark.parametrize("item_bytes", [2, 4])
def test_operands_are_in_all_banks(units, item_bytes):
    """16 bytes of 8 rows, as ldmatrix reads them."""
    vector, per_phase, max_phase, _ = module.shared_layout(units, 16 // item_bytes).arguments
    for piece in range(units // vector):
        starts = [row * units * item_bytes + 16 * (piece ^ row // per_phase % max_phase) for row in range(8)]
        assert sorted(start % 128 for start in starts) == list(range(0, 128, 16))
