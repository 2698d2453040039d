"""Launching what Triton has compiled: when it is the same code, and what the driver's refusals become.  No GPU is needed."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

from torch_gru_fuse.kernels import launch as module
from torch_gru_fuse.kernels.launch import DoesNotFit, Launcher, Pointer, launch


@triton.jit(do_not_specialize=["B"])
def kernel(p_x, p_w, p_none, B, stride, H: tl.constexpr, FLAG: tl.constexpr):
    tl.store(p_x + B * stride, tl.load(p_w) + H)


class Compiled:
    """What Triton returns."""

    function = packed_metadata = None

    def __init__(self):
        self.launches = []

    def run(self, x, y, z, stream, function, packed, metadata, enter, leave, *values):
        self.launches.append((values, metadata, enter))

    def launch_metadata(self, grid, stream, *values):
        return "metadata"


@pytest.fixture
def through_triton(monkeypatch):
    """Calls that went through Triton: (arguments, compiled)."""
    calls = []

    def call(kernel, grid, arguments):
        calls.append((dict(arguments), Compiled()))
        return calls[-1][1]

    monkeypatch.setattr(module, "_through_triton", call)
    monkeypatch.setattr(module, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 7)))
    monkeypatch.setattr(module, "_compiled", {})
    return calls


X, W = torch.zeros(64), torch.zeros(64)


def arguments(**changes):
    given = dict(p_x=X, p_w=W, p_none=None, B=3, stride=5, H=16, FLAG=True, num_warps=4)
    return given | changes


def test_second_launch_does_not_ask_triton(through_triton):
    started = launch(kernel, (2, 3), arguments())
    (_, compiled), = through_triton
    assert started.code.compiled is compiled and started.grid == (2, 3, 1) and started.stream == 7 and not compiled.launches
    other = torch.zeros(64)
    launch(kernel, (9,), arguments(p_x=other, B=100))
    assert len(through_triton) == 1
    values, metadata, enter = compiled.launches[0]
    assert values == (other.data_ptr(), W.data_ptr(), None, 100, 5, 16, True)
    assert metadata is None and enter is None


@pytest.mark.parametrize(
    "change",
    [{"p_x": X.half()}, {"p_none": W}, {"stride": 16}, {"H": 32}, {"FLAG": False}, {"num_warps": 8}, {"p_x": X[1:]}],
    ids=str,
)
def test_what_selects_code_asks_triton(through_triton, change):
    launch(kernel, (1,), arguments())
    launch(kernel, (1,), arguments(**change))
    assert len(through_triton) == 2
    launch(kernel, (1,), arguments(**change))
    aligned = all(not v.data_ptr() % 16 for v in change.values() if isinstance(v, torch.Tensor))
    assert len(through_triton) == (2 if aligned else 3)  # not kept where a pointer is not aligned


def test_hooks_of_a_profiler_are_called(through_triton, monkeypatch):
    launch(kernel, (1,), arguments())
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [lambda metadata: None])
    launch(kernel, (1,), arguments())
    _, metadata, enter = through_triton[0][1].launches[0]
    assert metadata == "metadata" and enter is triton.knobs.runtime.launch_enter_hook


def test_launcher(through_triton):
    types = [torch.float32, (torch.float32, 2), None, None, None]
    run = Launcher(kernel, {"H": 16, "FLAG": True, "num_warps": 4}, types)
    values = (64, (128, 256), None, 3, 5)
    run((1, 1, 1), 7, values, True)
    (given, compiled), = through_triton
    assert [p.data_ptr() for p in given["p_w"]] == [128, 256] and given["p_x"].dtype == torch.float32
    assert given["B"] == 3 and given["num_warps"] == 4 and not compiled.launches
    run((1, 1, 1), 7, (64, (128, 512), None, 4, 5), True)
    assert compiled.launches[0][0] == (64, (128, 512), None, 4, 5, 16, True)
    run((1, 1, 1), 7, (68, (128, 512), None, 4, 5), False)
    assert len(through_triton) == 2 and len(compiled.launches) == 1


class TritonLauncher:
    """What Triton's launcher does: scratch memory if there is to be any, then one call of the driver."""

    def __init__(self, nested, scratch=0):
        self.global_scratch_size, self.profile_scratch_size, self.nested = scratch, 0, nested
        self.launch, self.calls, self.driven = self.drive, 0, []

    def drive(self, *args):
        self.driven.append(args)

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *values):
        self.calls += 1
        beginning = (x, y, z, stream, function, False, None, packed, metadata, enter, leave)
        self.launch(*beginning, *(((), values) if self.nested else values))


@pytest.mark.parametrize("nested", [False, True])
def test_later_launches_go_to_the_driver(nested, monkeypatch):
    run = TritonLauncher(nested)
    code = module.Code(SimpleNamespace(run=run, function=11, packed_metadata=(4, 1), launch_metadata=lambda *_: "metadata"))
    for i in range(3):
        code.start((2, 3, 4 + i), 7 + i, (64, (128, 256), None, i, False))
    assert run.calls == 1 and len(run.driven) == 3 and run.launch == run.drive
    for i, args in enumerate(run.driven):
        values = (64, (128, 256), None, i, False)
        beginning = (2, 3, 4 + i, 7 + i, 11, False, None, (4, 1), None, None, None)
        assert args == (*beginning, *(((), values) if nested else values))
    monkeypatch.setattr(triton.knobs.runtime.launch_exit_hook, "calls", [lambda metadata: None])
    code.start((1, 1, 1), 7, (0, (1, 2), None, 5, True))
    assert run.calls == 2 and run.driven[-1][8] == "metadata"


def test_threads_that_launch_at_once():
    """Each first launch sees Triton's own function, not what another thread has put in its place."""
    run, threads = TritonLauncher(True), 8
    barrier = threading.Barrier(threads)
    codes = [module.Code(SimpleNamespace(run=run, function=11, packed_metadata=None)) for _ in range(threads)]

    def launches(code):
        barrier.wait()
        for i in range(20):
            code.start((1, 1, 1), 7, (i, 64))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(launches, codes))
    assert run.launch == run.drive and len(run.driven) == 20 * threads and run.calls == threads


class AddsValues(TritonLauncher):
    def __call__(self, *args):
        super().__call__(*args, "more")


@pytest.mark.parametrize("run", [TritonLauncher(False, scratch=128), AddsValues(False)], ids=["scratch", "values"])
def test_launchers_that_do_more_are_always_asked(run):
    code = module.Code(SimpleNamespace(run=run, function=11, packed_metadata=None))
    for i in range(3):
        code.start((1, 1, 1), 7, (i, 64))
    assert run.calls == len(run.driven) == 3


def test_launchers_are_shared():
    types = (torch.float32, None, None, None, None)
    constants = {"H": 16, "FLAG": True}
    one = module.launcher(kernel, 0, constants, types)
    assert one is module.launcher(kernel, 0, dict(constants), list(types))
    others = [
        module.launcher(kernel, 1, constants, types),
        module.launcher(kernel, 0, constants | {"H": 32}, types),
        module.launcher(kernel, 0, constants, (torch.float16, *types[1:])),
    ]
    assert len({id(o) for o in (one, *others)}) == 4


@pytest.mark.parametrize("address, alignment", [(64, "D"), (68, "")])
def test_triton_takes_addresses_for_tensors(address, alignment):
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    backend = make_backend(GPUTarget("cuda", 89, 32))
    pointer = Pointer(address, torch.bfloat16)
    assert native_specialize_impl(backend, pointer, False, True, True) == ("*bf16", alignment)
    tuples = native_specialize_impl(backend, (pointer, pointer), False, True, True)
    assert tuples == (("*bf16", "*bf16"), (alignment, alignment))


@pytest.mark.parametrize(
    "error, fits",
    [
        (RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch"), False),
        (RuntimeError("Triton Error [CUDA]: too many resources requested for launch"), False),
        (OutOfResources(200, 100, "shared memory"), False),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True),
    ],
    ids=str,
)
@pytest.mark.parametrize("compiled", [False, True])
def test_refusals_of_the_driver(error, fits, compiled):
    def refuse(*args, **kwargs):
        raise error

    class Kernel:
        def __getitem__(self, grid):
            return refuse

    if compiled and isinstance(error, OutOfResources):
        pytest.skip("is found when the code is loaded, at the first launch")
    handle = SimpleNamespace(run=refuse, function=None, packed_metadata=None)
    with pytest.raises(RuntimeError if fits else DoesNotFit) as raised:
        if compiled:
            module.Code(handle).start((1, 1, 1), 0, ())
        else:
            module._through_triton(Kernel(), (1,), {})
    assert isinstance(raised.value, DoesNotFit) != fits and str(error) in str(raised.value)
