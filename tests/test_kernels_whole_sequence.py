"""The kernels that run whole sequences: their mathematics and their hand-over on a CPU, and what they take when compiled.

Triton's interpreter does not know Gluon, and a kernel whose programs wait for each other cannot be run one program after the
other.  So the kernels' own source is executed with a stand-in for Gluon: blocks are torch tensors, pointers are addresses,
every program is a thread, and ``settle`` polls the memory that the other threads write.  Layouts, PTX and asynchronous copies
are beyond it; the compiled kernels answer for those.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import re
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from torch_gru_fuse.kernels import aot, wavefront
from torch_gru_fuse.planner.gpus import gpu_named
from torch_gru_fuse.planner.whole_sequence import ResidentPlan, WavefrontPlan, WholeSequencePlan, plan_whole_sequence

# ---- the stand-in -------------------------------------------------------------------------------------------------------


class DType:
    """A Triton element type."""

    def __init__(self, dtype: torch.dtype):
        self.torch = dtype
        self.primitive_bitwidth = dtype.itemsize * 8


class Block(torch.Tensor):
    """A block value."""

    def to(self, dtype, bitcast=False):
        dtype = dtype.torch if isinstance(dtype, DType) else dtype
        return self.view(dtype) if bitcast else super().to(dtype)

    def __iadd__(self, other):  # a block is a value: += makes a new one
        return self + other


def block(value) -> Block:
    return torch.as_tensor(value).as_subclass(Block)


class Pointer:
    """Addresses of elements of one type."""

    def __init__(self, address, dtype: torch.dtype):
        self.address = address
        self.element = dtype
        self.dtype = SimpleNamespace(element_ty=DType(dtype))

    def __add__(self, offset):
        return Pointer(self.address + offset * self.element.itemsize, self.element)

    def __sub__(self, offset):
        return self + -offset

    def to(self, dtype):
        return block(self.address)


def read(p: Pointer, mask=None, other=0.0) -> Block:
    address = torch.as_tensor(p.address)
    mask = torch.ones_like(address, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    address, mask = torch.broadcast_tensors(address, mask)
    values = torch.full(address.shape, other, dtype=p.element)
    for begin, end, flat in MEMORY:
        here = mask & (address >= begin) & (address < end)
        if here.any():
            assert flat.dtype == p.element
            values[here] = flat[(address[here] - begin) // p.element.itemsize]
            mask = mask & ~here
    assert not mask.any(), "a load outside of every tensor"
    return values.as_subclass(Block)


def write(p: Pointer, value, mask=None):
    address = torch.as_tensor(p.address)
    mask = torch.ones_like(address, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
    address, mask, value = torch.broadcast_tensors(address, mask, torch.as_tensor(value))
    for begin, end, flat in MEMORY:
        here = mask & (address >= begin) & (address < end)
        if here.any():
            flat[(address[here] - begin) // p.element.itemsize] = value[here].as_subclass(torch.Tensor)
            mask = mask & ~here
    assert not mask.any(), "a store outside of every tensor"


class Shared:
    """Shared memory, or a view of it."""

    def __init__(self, data):
        self.data = data

    def store(self, value):
        self.data.copy_(value)

    def load(self, layout):
        return self.data.clone().as_subclass(Block)

    def slice(self, start, length, dim=0):
        return Shared(self.data.narrow(dim, start, length))

    def permute(self, order):
        return Shared(self.data.permute(order))


MEMORY: list = []
PROGRAM = threading.local()


def where(condition, a, b):
    if isinstance(condition, bool):
        if not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor):
            return a if condition else b
        condition = torch.tensor(condition)
    if isinstance(a, Pointer):
        return Pointer(where(condition, a.address, b.address), a.element)
    return torch.where(condition, a, b).as_subclass(Block)


def minimum(a, b):
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else torch.as_tensor(a).clamp(max=b).as_subclass(Block)


def full(shape, value, dtype, layout=None):
    return torch.full(shape, value, dtype=dtype.torch).as_subclass(Block)


def stand_in() -> ModuleType:
    gl = ModuleType("gluon_language")
    for name in ("float32", "float16", "bfloat16", "int32", "int64"):
        setattr(gl, name, DType(getattr(torch, name)))
    for name in (
        "NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout", "SharedLinearLayout",
        "SwizzledSharedLayout",
    ):  # fmt: skip
        setattr(gl, name, lambda *args, **kwargs: None)
    gl.constexpr = None
    gl.barrier = lambda: None
    gl.static_range = range
    gl.program_id = lambda axis: PROGRAM.id
    gl.arange = lambda start, end, layout: block(torch.arange(start, end))
    gl.expand_dims = lambda x, axis: x.unsqueeze(axis)
    gl.zeros = lambda shape, dtype, layout: full(shape, 0, dtype)
    gl.full, gl.where, gl.minimum, gl.load, gl.store = full, where, minimum, read, write
    gl.sum = lambda x, axis: x.sum(axis)
    gl.convert_layout = lambda x, layout: x
    gl.allocate_shared_memory = lambda dtype, shape, layout: Shared(torch.full(shape, float("nan"), dtype=dtype.torch))
    return gl


def stand_in_jit(function=None, **options):
    return function if function is not None else stand_in_jit


def round_tf32(x: torch.Tensor) -> torch.Tensor:
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def round_operand(x):
    return round_tf32(x) if x.dtype == torch.float32 else x


def settle(b, p, p_error, *rest):
    deadline = time.monotonic() + SETTLE_SECONDS
    integer = torch.int32 if p.element == torch.float32 else torch.int16
    while True:
        value = read(p)
        if not (value.as_subclass(torch.Tensor).view(integer) == -1).any():
            break
        if time.monotonic() > deadline or read(p_error).item() != 0:
            write(p_error, block(torch.tensor(1, dtype=torch.int32)))
            break
        time.sleep(1e-4)
    return round_operand(value)


SETTLE_SECONDS = 60.0


def load_emulated() -> SimpleNamespace:
    """``wavefront`` and ``resident`` from their sources, over the stand-in."""
    gl = stand_in()
    gluon = ModuleType("gluon")
    gluon.jit, gluon.constexpr_function, gluon.language = stand_in_jit, stand_in_jit, gl
    experimental = ModuleType("experimental")
    experimental.gluon = gluon
    ampere = ModuleType("ampere")
    ampere.async_copy = SimpleNamespace(
        async_copy_global_to_shared=lambda s, p, mask: s.store(read(p, mask)),
        commit_group=lambda: None,
        wait_group=lambda n: None,
    )
    name = "triton.experimental"
    replaced = {
        name: experimental,
        f"{name}.gluon": gluon,
        f"{name}.gluon.language": gl,
        f"{name}.gluon.language.nvidia": ModuleType("nvidia"),
        f"{name}.gluon.language.nvidia.ampere": ampere,
    }
    alias = "torch_gru_fuse_kernels_emulated"
    package = ModuleType(alias)
    package.__path__ = [str(Path(wavefront.__file__).parent)]
    before = {key: sys.modules.get(key) for key in replaced}
    sys.modules.update(replaced)
    sys.modules[alias] = package
    try:
        first = importlib.import_module(f"{alias}.wavefront")
        first.issue = lambda *args: None
        first.prefetch = lambda address: None
        first.settle, first.round_operand = settle, round_operand
        first.sigmoid, first.tanh = torch.sigmoid, torch.tanh
        first.dot = lambda w, h, acc: acc + w.float() @ h.float()
        return SimpleNamespace(wavefront=first, resident=importlib.import_module(f"{alias}.resident"))
    finally:
        for key, module in before.items():
            if module is None:
                del sys.modules[key]
            else:
                sys.modules[key] = module


EMULATED = load_emulated()


def run(kernel, grid: tuple[int], arguments: dict) -> None:
    """All programs at once, each a thread."""
    arguments = {k: v for k, v in arguments.items() if k not in ("launch_cooperative_grid", "maxnreg")}
    MEMORY.clear()
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            begin = value.data_ptr()
            region = (begin, begin + value.numel() * value.itemsize, value.view(-1))
            if all(begin != other for other, _, _ in MEMORY):
                MEMORY.append(region)
            arguments[name] = Pointer(begin, value.dtype)
    failures = []

    def program(i):
        PROGRAM.id = i
        try:
            with torch.no_grad():
                kernel(**arguments)
        except BaseException as failure:  # handed to the test below
            failures.append(failure)
            ctypes.c_int.from_address(arguments["p_error"].address).value = 1

    threads = [threading.Thread(target=program, args=(i,)) for i in range(grid[0])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@contextmanager
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- mathematics and hand-over ------------------------------------------------------------------------------------------


class Case:
    """A GRU, its inputs, what the kernels are given, and what float64 says."""

    def __init__(self, steps, batch, hidden, lanes, dtype, reverse=False, seed=0):
        generator = torch.Generator().manual_seed(seed)
        inputs = hidden
        self.gru = torch.nn.GRU(inputs, hidden, 1 if reverse else lanes, bidirectional=reverse)
        with torch.no_grad():
            for parameter in self.gru.parameters():
                # of the values that the kernel's dtype (or tf32) can hold: operands are then exact
                value = torch.rand(parameter.shape, generator=generator) - 0.5
                parameter.copy_(value.to(torch.float16).float() * 2 * hidden**-0.5)
                parameter.copy_(parameter.to(torch.bfloat16 if dtype == torch.bfloat16 else torch.float16).float())
        self.x = torch.randn(steps, batch, inputs, generator=generator).to(dtype)
        self.h0 = torch.randn(lanes, batch, hidden, generator=generator).to(dtype)
        self.steps, self.batch, self.hidden, self.lanes, self.dtype, self.reverse = steps, batch, hidden, lanes, dtype, reverse
        names = [f"l0{s}" for s in ("", "_reverse")] if reverse else [f"l{i}" for i in range(lanes)]
        parameters = dict(self.gru.named_parameters())
        w_ih = [parameters[f"weight_ih_{n}"].detach().to(dtype) for n in names]
        self.w_hh = torch.stack([parameters[f"weight_hh_{n}"].detach() for n in names]).to(dtype)
        b_ih = torch.stack([parameters[f"bias_ih_{n}"].detach() for n in names])
        b_hh = torch.stack([parameters[f"bias_hh_{n}"].detach() for n in names])
        self.bias = wavefront.pack_bias(b_ih, b_hh, lanes=lanes, hidden=hidden, like=self.w_hh)
        first = slice(None) if reverse else slice(1)
        w = torch.cat(w_ih[first])
        b = self.bias[first, : 3 * hidden].reshape(-1)
        self.gi = (self.x.float() @ w.float().T + b).to(dtype)
        self.w_ih = torch.stack(w_ih[1:]) if lanes > 1 and not reverse else None

    def expected(self):
        out, h_n = self.gru.double()(self.x.double(), self.h0.double())
        return out.detach(), h_n.detach()

    def launch(self, module, plan, save_gates=False, **options):
        states = wavefront.prepare_states(self.h0, self.steps, interleaved=self.reverse)
        gates = None
        if save_gates:
            gates = torch.full((self.lanes, self.steps, self.batch, 4, self.hidden), float("nan"), dtype=self.dtype)
        error = torch.zeros(1, dtype=torch.int32)
        make = getattr(module, f"{module.__name__.rsplit('.', 1)[1]}_launch")
        grid, arguments = make(self.gi, states, self.w_ih, self.w_hh, self.bias, gates, error, plan=plan, **options)
        return grid, arguments, states, gates, error

    def outputs(self, states):
        if self.reverse:
            h = self.hidden
            return states[1:-1], torch.stack([states[-2, :, :h], states[1, :, h:]])
        return states[-1, 1:], states[:, -1]


# A step rounds h once and its operands not at all, except tf32's h and 16-bit gi; the gates contract what came before.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 4e-3, torch.bfloat16: 3e-2}

WAVEFRONT_CASES = [
    # steps, batch, hidden, lanes, dtype, reverse, plan
    pytest.param(5, 3, 32, 3, torch.float16, False, WavefrontPlan(16, 8, 1, 2), id="stack, input after h"),
    pytest.param(5, 3, 32, 3, torch.float16, False, WavefrontPlan(16, 8, 1, 2, early=True), id="stack, input read early"),
    pytest.param(5, 10, 32, 3, torch.float32, False, WavefrontPlan(16, 16, 1, 2, 2), id="stack, input beside h"),
    pytest.param(5, 10, 32, 3, torch.bfloat16, False, WavefrontPlan(16, 8, 1, 2, 2, store_first=True), id="stack, store first"),
    pytest.param(4, 20, 32, 2, torch.float16, False, WavefrontPlan(16, 8, 2, 2, 2, early=True), id="stack, two tiles early"),
    pytest.param(4, 20, 32, 2, torch.float32, False, WavefrontPlan(16, 8, 2, 2, 2), id="stack, two tiles"),
    pytest.param(5, 9, 32, 2, torch.float16, True, WavefrontPlan(16, 8, 1, 2), id="two directions"),
    pytest.param(5, 9, 48, 2, torch.float32, True, WavefrontPlan(16, 8, 1, 2), id="two directions, padded units"),
    pytest.param(5, 3, 48, 2, torch.float16, False, WavefrontPlan(16, 8, 1, 4), id="stack, padded units"),
    pytest.param(4, 70, 32, 1, torch.float32, False, WavefrontPlan(16, 16, 4, 2, early=True), id="four tiles"),
    pytest.param(4, 70, 64, 1, torch.float16, False, WavefrontPlan(64, 32, 2, 2, unit_warps=2), id="wide tiles"),
    pytest.param(4, 9, 64, 1, torch.float32, False, WavefrontPlan(16, 8, 2, 2, share_n=True), id="W_n shared"),
    pytest.param(1, 2, 32, 2, torch.float16, False, WavefrontPlan(16, 8, 1, 2), id="one step"),
    pytest.param(1, 2, 32, 2, torch.float16, False, WavefrontPlan(16, 8, 1, 2, 2), id="one step, input beside h"),
]
RESIDENT_CASES = [
    pytest.param(6, 9, 32, 1, torch.float32, False, ResidentPlan(32, 8, 2), id="one layer"),
    pytest.param(7, 9, 32, 3, torch.float16, False, ResidentPlan(32, 8, 2, early=True), id="stack, early"),
    pytest.param(2, 9, 48, 2, torch.bfloat16, False, ResidentPlan(64, 8, 4), id="stack, padded units"),
    pytest.param(5, 3, 16, 2, torch.float32, True, ResidentPlan(16, 8, 1), id="two directions"),
    pytest.param(1, 3, 16, 2, torch.float32, False, ResidentPlan(16, 8, 1), id="one step"),
]


def check(module, steps, batch, hidden, lanes, dtype, reverse, plan):
    case = Case(steps, batch, hidden, lanes, dtype, reverse)
    grid, arguments, states, gates, error = case.launch(module, plan, save_gates=True)
    name = module.__name__.rsplit(".", 1)[1]
    with one_thread():
        run(getattr(module, f"{name}_kernel"), grid, arguments)
    assert error.item() == 0
    for ours, theirs in zip(case.outputs(states), case.expected(), strict=True):
        assert ours.shape == theirs.shape
        assert (ours.double() - theirs).abs().max() < TOLERANCE[dtype]
    # the saved gates make the next state from the one before
    r, z, n, hn = gates.double().unbind(3)
    hs = states.double()
    for l in range(lanes):
        if not reverse:
            before, after = hs[l, :-1], hs[l, 1:]
        elif l == 0:
            before, after = hs[:-2, :, :hidden], hs[1:-1, :, :hidden]
        else:
            before, after = hs[2:, :, hidden:], hs[1:-1, :, hidden:]
        assert (n[l] + z[l] * (before - n[l]) - after).abs().max() < TOLERANCE[dtype]
        # h W_hn^T + b_hn, and r's sigmoid between 0 and 1
        hidden_part = before @ case.w_hh[l, 2 * hidden :].double().T + case.bias[l, 3 * hidden :].double()
        assert (hn[l] - hidden_part).abs().max() < 4 * TOLERANCE[dtype]
        assert (r[l] > 0).all() and (r[l] < 1).all()


@pytest.mark.parametrize(("steps", "batch", "hidden", "lanes", "dtype", "reverse", "plan"), WAVEFRONT_CASES)
def test_wavefront_is_a_gru(steps, batch, hidden, lanes, dtype, reverse, plan):
    check(EMULATED.wavefront, steps, batch, hidden, lanes, dtype, reverse, plan)


@pytest.mark.parametrize(("steps", "batch", "hidden", "lanes", "dtype", "reverse", "plan"), RESIDENT_CASES)
def test_resident_is_a_gru(steps, batch, hidden, lanes, dtype, reverse, plan):
    check(EMULATED.resident, steps, batch, hidden, lanes, dtype, reverse, plan)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_initial_state_may_hold_any_bits(dtype):
    """The flag pattern itself in h0 is a NaN like any other: it spoils its row, and nobody waits for it."""
    case = Case(3, 4, 32, 2, dtype)
    case.h0.view(torch.int16 if dtype == torch.float16 else torch.int32)[0, 1] = -1
    grid, arguments, states, _, error = case.launch(EMULATED.wavefront, WavefrontPlan(16, 8, 1, 2))
    with one_thread():
        run(EMULATED.wavefront.wavefront_kernel, grid, arguments)
    assert error.item() == 0
    spoiled = states[1, 1:].isnan().all(-1)
    assert spoiled[:, 1].all() and spoiled.sum() == 3
    integer = states.view(torch.int16 if dtype == torch.float16 else torch.int32)
    assert not (integer == -1).any()


def test_wait_ends(monkeypatch):
    """A program that never runs: all others end, and the error word says so."""
    monkeypatch.setattr(sys.modules[__name__], "SETTLE_SECONDS", 0.2)
    case = Case(4, 4, 32, 2, torch.float16)
    grid, arguments, _, _, error = case.launch(EMULATED.wavefront, WavefrontPlan(16, 8, 1, 2))
    with one_thread():
        run(EMULATED.wavefront.wavefront_kernel, (grid[0] - 3,), arguments)
    assert error.item() == 1


@pytest.mark.parametrize(
    ("layers", "hidden", "bidirectional", "bias", "plan"),
    [
        pytest.param(3, 20, False, True, WholeSequencePlan(3, WavefrontPlan(16, 8, 1, 2)), id="stack, padded units"),
        pytest.param(2, 32, False, False, WholeSequencePlan(1, WavefrontPlan(16, 8, 1, 2)), id="layer by layer, no bias"),
        pytest.param(2, 20, True, True, WholeSequencePlan(2, ResidentPlan(32, 8, 2)), id="two directions, padded units"),
    ],
)
def test_whole_sequence_is_torch_gru(monkeypatch, layers, hidden, bidirectional, bias, plan):
    gru = torch.nn.GRU(7, hidden, layers, bias=bias, bidirectional=bidirectional)
    x, h0 = torch.randn(5, 3, 7), torch.randn(layers * (1 + bidirectional), 3, hidden)

    class Launcher:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda **arguments: run(self.kernel, grid, arguments)

    module = EMULATED.resident
    monkeypatch.setattr(module, "wavefront_kernel", Launcher(EMULATED.wavefront.wavefront_kernel))
    monkeypatch.setattr(module, "resident_kernel", Launcher(EMULATED.resident.resident_kernel))
    names = [f"l{i}{s}" for i in range(layers) for s in (("", "_reverse") if bidirectional else ("",))]
    parameters = {k: v.detach() for k, v in gru.named_parameters()}
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if bias else ("weight_ih", "weight_hh")
    lists = [[parameters[f"{kind}_{name}"] for name in names] for kind in kinds] + ([] if bias else [None, None])
    with one_thread():
        packed = module.pack_parameters(*lists, bidirectional=bidirectional, plan=plan)
        out, h_n, gates, error = module.whole_sequence_forward(
            x, h0, packed, bidirectional=bidirectional, plan=plan, save_gates=True
        )
    expected, last = gru.double()(x.double(), h0.double())
    assert error.item() == 0 and len(gates) == layers // (1 if bidirectional else plan.lanes)
    torch.testing.assert_close(out.double(), expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(h_n.double(), last, atol=2e-3, rtol=0)


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
    plan = WholeSequencePlan(2, WavefrontPlan(16, 8, 1, 4))
    ptx = aot.compile_whole_sequence(torch.float16, plan, batch=8, hidden=256, capability=89).ptx
    loops = re.findall(r"POLL:\n(.*?)END:", ptx, re.DOTALL)
    assert len(loops) == 4  # lowest layer: h; higher ones: x of the first step, then h and x
    for loop in loops:
        assert "ld.relaxed.gpu.global.v4.b32" in loop
        assert all("relaxed" in line for line in loop.splitlines() if line.lstrip().startswith(("ld.", "st.")))
        assert "%globaltimer" in loop


def test_partial_sums_use_all_banks():
    """Both sides of the exchange: 8-byte stores of a half-warp and loads of a warp touch every bank once."""
    bases = wavefront._shared_bases.fn(4, 16, 16) if hasattr(wavefront._shared_bases, "fn") else None
    bases = bases or wavefront._shared_bases(4, 16, 16)
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
    """One program a multiprocessor for whatever waits for others; None where nothing fits, not an overfull grid."""
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
            elif isinstance(plan.kernel, WavefrontPlan):
                assert plan.kernel.programs(plan.lanes, batch, hidden) <= multiprocessors
            elif plan.lanes > 1 and not reverse:
                assert plan.kernel.programs(plan.lanes, batch) <= multiprocessors
