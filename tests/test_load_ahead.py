"""Kernels are compiled while something else is at work: Inductor, or the compiler of another kernel.  No GPU is needed."""

import threading
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from test_kernel_path import (
    RESIDENT,
    SPREAD,
    emulated_launcher,
    kernels_on_cpu,  # noqa: F401
    plan,
    whole_call,
    whole_on_cpu,  # noqa: F401
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

import torch_gru_fuse
from torch_gru_fuse import torch_hooks
from torch_gru_fuse.kernels import launch as module
from torch_gru_fuse.kernels.launch import Launcher
from torch_gru_fuse.ops import dispatch, kernel_path, whole_path
from torch_gru_fuse.ops.schemas import ops
from torch_gru_fuse.passes import ahead
from torch_gru_fuse.planner.whole_sequence import StagedPlan, WholeSequencePlan


@triton.jit(do_not_specialize=["B"])
def kernel(p_x, p_w, p_none, B, H: tl.constexpr):
    tl.store(p_x + B, tl.load(p_w) + H)


TYPES, VALUES = [torch.float32, (torch.float32, 2), None, None], (64, (128, 256), None, 3)


class Compiled:
    """What Triton returns; counts how often it was loaded."""

    function = packed_metadata = None

    def __init__(self):
        self.loads, self.launches = 0, []

    @property
    def run(self):
        self.loads += 1
        return lambda x, y, z, stream, function, packed, metadata, enter, leave, *values: self.launches.append(values)


@pytest.fixture
def triton_is_asked(monkeypatch):
    """What Triton was asked for: "load" or "launch", the thread, and the arguments."""
    asked = []

    def warmup(grid, **arguments):
        asked.append(("load", threading.current_thread(), arguments))
        return Compiled()

    def through_triton(kernel, grid, arguments):
        asked.append(("launch", threading.current_thread(), arguments))
        return Compiled()

    monkeypatch.setattr(kernel, "warmup", warmup)
    monkeypatch.setattr(module, "_through_triton", through_triton)
    monkeypatch.setattr(module, "driver", SimpleNamespace(active=None))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.device("cpu"))  # a context, too
    return asked


def wait_for_threads():
    for thread in threading.enumerate():
        if thread.name == "torch_gru_fuse-load":
            thread.join(10)


def test_a_launch_finds_what_was_loaded(triton_is_asked):
    run = Launcher(kernel, {"H": 16, "num_warps": 4}, TYPES)
    module.load_ahead([run], 0)
    wait_for_threads()
    [(what, thread, arguments)] = triton_is_asked
    assert what == "load" and thread is not threading.main_thread()
    assert arguments["p_x"].dtype == torch.float32 and len(arguments["p_w"]) == 2 and arguments["p_none"] is None
    assert arguments["B"] == 0 and arguments["H"] == 16 and arguments["num_warps"] == 4
    compiled = run._code.compiled
    assert compiled.loads == 1
    run((1, 1, 1), 7, VALUES, True)
    assert compiled.launches == [(*VALUES, 16)] and len(triton_is_asked) == 1
    module.load_ahead([run], 0)
    wait_for_threads()
    assert len(triton_is_asked) == 1


def test_a_launch_waits_for_the_thread(triton_is_asked, monkeypatch):
    started, may_go_on = threading.Event(), threading.Event()
    compiled = Compiled()

    def warmup(grid, **arguments):
        started.set()
        may_go_on.wait(10)
        return compiled

    monkeypatch.setattr(kernel, "warmup", warmup)
    run = Launcher(kernel, {"H": 16}, TYPES)
    module.load_ahead([run], 0)
    assert started.wait(10)
    threading.Timer(0.1, may_go_on.set).start()
    run((1, 1, 1), 7, VALUES, True)
    assert may_go_on.is_set() and compiled.launches == [(*VALUES, 16)] and not triton_is_asked


def test_a_launch_does_not_wait_for_a_turn(triton_is_asked, monkeypatch):
    turns = threading.Semaphore(0)
    monkeypatch.setattr(module, "_loaders", turns)
    run = Launcher(kernel, {"H": 16}, TYPES)
    module.load_ahead([run], 0)
    run((1, 1, 1), 7, VALUES, True)
    turns.release()
    wait_for_threads()
    assert [what for what, *_ in triton_is_asked] == ["launch"]


def test_a_launch_goes_first_where_it_is(triton_is_asked):
    run = Launcher(kernel, {"H": 16}, TYPES)
    run((1, 1, 1), 7, VALUES, True)
    run.load()
    assert [what for what, *_ in triton_is_asked] == ["launch"]


def test_what_goes_wrong_is_left_for_the_launch(triton_is_asked, monkeypatch, recwarn):
    def warmup(grid, **arguments):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(kernel, "warmup", warmup)
    unraised = []
    monkeypatch.setattr(threading, "excepthook", unraised.append)
    run = Launcher(kernel, {"H": 16}, TYPES)
    module.load_ahead([run], 0)
    wait_for_threads()
    run((1, 1, 1), 7, VALUES, True)
    assert [what for what, *_ in triton_is_asked] == ["launch"] and not unraised


def test_nothing_is_loaded_into_a_capture(triton_is_asked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    module.load_ahead([Launcher(kernel, {"H": 16}, TYPES)], 0)
    wait_for_threads()
    assert not triton_is_asked


# ---- the code that is loaded is the code that is launched --------------------------------------------------------------------


def selects_code(kernel, arguments):
    """All by which Triton tells one code of a kernel from another."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    _, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(**arguments)
    return specialization, options


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize(
    "variant, whole, dropout",
    [
        ({"L": 1, "H": 32, "I": 5}, WholeSequencePlan(1, SPREAD), False),
        ({"L": 3, "H": 32}, WholeSequencePlan(3, SPREAD), True),
        ({"L": 1, "H": 32, "bias": False}, WholeSequencePlan(1, RESIDENT), False),
        ({"L": 1, "H": 32, "bidirectional": True}, WholeSequencePlan(2, SPREAD), False),
        ({"L": 1, "H": 64}, WholeSequencePlan(1, StagedPlan(16, 8, 1, 1, 1)), False),
    ],
    ids=["one layer", "stack", "no biases", "two directions", "staged"],
)
def test_examples_stand_for_all_values(whole_on_cpu, monkeypatch, variant, whole, dropout, save):  # noqa: F811
    compared = set()

    def comparing(kernel, device, constants, types):
        emulated = emulated_launcher(kernel, device, constants, types)
        launcher = Launcher(kernel, constants, types)

        def run(grid, stream, values, aligned):
            if aligned:
                of_launch, of_load = (selects_code(kernel, launcher._arguments(v)) for v in (values, launcher._examples()))
                assert of_launch == of_load
                compared.add(kernel.fn.__name__)
            emulated(grid, stream, values, aligned)

        return run

    monkeypatch.setattr(module, "launcher", comparing)
    plan(monkeypatch, "whole", whole=whole, backward=whole)
    call = whole_call(variant, dropout)
    output, h_n, reserve = kernel_path.gru_forward(call, save)
    if save:
        kernel_path.gru_backward(call, output, h_n, output, reserve, [True] * (2 + len(call.params)))
    assert len(compared) >= (2 if save else 1), compared


@pytest.mark.parametrize("save", [False, True])
def test_a_fake_call_loads_what_the_real_one_launches(whole_on_cpu, monkeypatch, save):  # noqa: F811
    loaded, launched = [], []

    def counting(kernel, device, constants, types):
        emulated = emulated_launcher(kernel, device, constants, types)

        def run(*args):
            launched.append(run)
            emulated(*args)

        return run

    monkeypatch.setattr(module, "launcher", counting)
    monkeypatch.setattr(module, "load_ahead", lambda launchers, device: loaded.extend(launchers))
    plan(monkeypatch, "whole", whole=WholeSequencePlan(2, SPREAD))
    call = whole_call({"L": 2, "H": 32})
    mode = FakeTensorMode()
    fake = call._replace(input=mode.from_tensor(call.input), hx=mode.from_tensor(call.hx))
    fake = fake._replace(params=[mode.from_tensor(p) for p in call.params])
    kernel_path.load_ahead(fake, save)
    before = set(map(id, loaded))
    assert before and not launched
    kernel_path.gru_forward(call, save)
    assert set(map(id, launched)) == before and set(map(id, loaded)) == before


@pytest.mark.parametrize("kernel", ["torch", "step", "stream"])
def test_other_plans_load_nothing(whole_on_cpu, monkeypatch, kernel):  # noqa: F811
    monkeypatch.setattr(whole_path, "load_ahead", lambda *args: pytest.fail("has loaded"))
    plan(monkeypatch, kernel)
    kernel_path.load_ahead(whole_call({"L": 1, "H": 32}), False)


# ---- what a graph says of its calls ------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """The calls that were to be loaded ahead, and whether they save."""
    calls = []
    monkeypatch.setattr(ahead.dispatch, "load_ahead", lambda call, save: calls.append((call, save)))
    return calls


def graph_of(*, layers=1, dropout=0.0, train=False, batch_first=False, device="cuda", requires_grad=False, steps=7, **options):
    """A graph of one call of the op on fake tensors."""
    graph = Graph()
    T, B, I, H = steps, 2, 3, 4

    def given(name, *size, requires_grad=requires_grad):
        node = graph.placeholder(name)
        node.meta["example_value"] = torch.empty(*size, device=device, requires_grad=requires_grad)
        return node

    x = given("x", *((B, T, I) if batch_first else (T, B, I)), requires_grad=False)
    h = given("h", layers, B, H, requires_grad=False)
    sizes = [size for l in range(layers) for size in ((3 * H, H if l else I), (3 * H, H), (3 * H,), (3 * H,))]
    weights = [given(f"w{i}", *size) for i, size in enumerate(sizes)]
    call = graph.call_function(
        ops.gru.default, (x, h, weights, True, layers, dropout, train, False, batch_first), options
    )
    value = x.meta["example_value"]
    call.meta["example_value"] = value.new_empty(*value.shape[:2], H), h.meta["example_value"].new_empty(layers, B, H)
    graph.output(call)
    return GraphModule({}, graph)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("grad, options, saves", [(False, {}, False), (True, {}, True), (True, {"recompute": True}, False)])
def test_calls_of_a_graph(asked, batch_first, grad, options, saves):
    with FakeTensorMode():
        ahead.load_ahead(graph_of(batch_first=batch_first, requires_grad=grad, layers=2, **options))
    [(call, save)] = asked
    assert call.input.shape == (7, 2, 3) and call.hx.shape == (2, 2, 4) and len(call.params) == 8 and save is saves
    assert call.L == 2 and call.D == 1 and call.has_biases and call.dropout_masks is None
    assert call.input.transpose(0, 1).is_contiguous() == batch_first


def test_calls_of_a_graph_below(asked):
    with FakeTensorMode():
        gm = GraphModule({}, Graph())
        gm.add_module("body", graph_of())
        ahead.load_ahead(gm)
    assert len(asked) == 1


def test_nothing_is_saved_without_autograd(asked):
    with FakeTensorMode(), torch.no_grad():
        ahead.load_ahead(graph_of(requires_grad=True))
    assert [save for _, save in asked] == [False]


@pytest.mark.parametrize(
    "options",
    [{"layers": 2, "dropout": 0.5, "train": True}, {"resets": None}, {"device": "cpu"}],
    ids=["dropout", "resets", "cpu"],
)
def test_calls_that_are_left(asked, options):
    with FakeTensorMode():
        ahead.load_ahead(graph_of(**options))
    assert not asked


def test_unknown_sizes_are_left(asked):
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        gm = graph_of()
        [x, *_] = gm.graph.nodes
        size = mode.shape_env.create_unbacked_symint()
        x.meta["example_value"] = torch.empty(size, 2, 3, device="cuda")
        ahead.load_ahead(gm)
    assert not asked


def test_autocast_is_left(asked, monkeypatch):
    with FakeTensorMode(), monkeypatch.context() as patch:
        patch.setattr(torch, "is_autocast_enabled", lambda device_type: device_type == "cuda")  # which needs a GPU
        ahead.load_ahead(graph_of())
    with FakeTensorMode():  # on in the graph alone
        gm = graph_of()
        [call] = gm.graph.find_nodes(op="call_function", target=ops.gru.default)
        call.meta["example_value"] = tuple(x.half() for x in call.meta["example_value"])
        ahead.load_ahead(gm)
    assert not asked


def test_a_plan_that_fails_does_not_stop_the_compilation(monkeypatch):
    def fail(call, save):
        raise ValueError("no such GPU")

    monkeypatch.setattr(ahead.dispatch, "load_ahead", fail)
    with FakeTensorMode():
        ahead.load_ahead(graph_of())


def test_a_gpu_that_is_not_there_is_not_asked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(dispatch, "_cuda", lambda: pytest.fail("has asked"))
    with FakeTensorMode():
        ahead.load_ahead(graph_of())


@pytest.mark.parametrize("count", [0, 1])
def test_inductor_hook_hands_over_what_was_rewritten(monkeypatch, count):
    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", lambda gm, *args, **kwargs: gm.forward)
    graphs, gm = [], GraphModule({}, Graph())
    hook = torch_hooks.InductorHook(lambda gm: count, lambda: "tag", ahead=graphs.append)
    hook.compile(gm, [], {})
    assert graphs == [gm] * count


def test_enable_loads_ahead():
    assert torch_gru_fuse.switch.inductor_hook._ahead is ahead.load_ahead
