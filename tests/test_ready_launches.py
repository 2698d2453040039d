"""What a ready call does, with emulated and interpreted kernels: results of the ordinary way.  CPU tensors play CUDA's."""

import ctypes
from dataclasses import replace
from types import SimpleNamespace

import interpreted
import pytest
import torch
from problems import assert_same, gru_args, ops
from test_kernel_path import emulated_launcher, reference

from torch_gru_fuse import torch_hooks
from torch_gru_fuse.kernels import launch, stream
from torch_gru_fuse.ops import (
    kernel_backward,
    kernel_path,
    ready_calls,
    ready_launches,
    timeouts,
    whole_backward,
    whole_path,
)  # fmt: skip
from torch_gru_fuse.ops.call import GRUCall
from torch_gru_fuse.ops.schemas import reserve_size
from torch_gru_fuse.planner.plan import Plan
from torch_gru_fuse.planner.stream import StreamPlan
from torch_gru_fuse.planner.whole_sequence import ResidentPlan, WavefrontPlan, WholeSequencePlan


def interpreted_launcher(kernel, device, constants, types):
    """Runs ``stream_kernel`` at the addresses that it is given."""

    def run(grid, stream, values, aligned):
        assert aligned and len(values) == len(types)
        B, I, H = constants["B"], constants["I"], constants["H"]
        sizes = (B * I, B * H, 3 * H * I, 3 * H * H, 3 * H, 3 * H, B * H, B * H)
        tensors = [
            address and torch.frombuffer((ctypes.c_uint8 * (size * dtype.itemsize)).from_address(address), dtype=dtype)
            for address, dtype, size in zip(values, types, sizes, strict=True)
        ]
        arguments = dict(zip(kernel.arg_names, tensors, strict=False)) | constants
        interpreted.load("kernels.stream").stream_kernel[grid](**arguments)

    return run


@pytest.fixture
def launches_on_cpu(monkeypatch):
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 0))
    for module in (whole_path, whole_backward, kernel_backward, stream):
        monkeypatch.setattr(module, "driver", driver)
    monkeypatch.setattr(launch, "launcher", emulated_launcher)
    monkeypatch.setattr(launch, "load_ahead", lambda launchers, device: None)  # nothing is compiled
    monkeypatch.setattr(stream, "launcher", interpreted_launcher)
    monkeypatch.setattr(torch_hooks, "empty_strided_cuda", torch._C._dynamo.guards._empty_strided_cpu)
    monkeypatch.setattr(whole_path, "_recipes", {})
    monkeypatch.setattr(whole_backward, "_recipes", {})
    monkeypatch.setattr(stream, "_stacks", {})
    word = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setitem(timeouts._words, -1, timeouts._Word(word, ctypes.c_int32.from_address(word.data_ptr())))


def ready(monkeypatch, plan, args):
    """What is made of a call of `gru`."""
    x, hx, params, bias, L, _, _, bidirectional, batch_first = args
    monkeypatch.setattr(kernel_path, "plan_of", lambda call, *, training: plan)
    call = GRUCall(x.transpose(0, 1) if batch_first else x, hx, params, bias, L, bidirectional, None)
    return ready_launches.of(call, batch_first=batch_first)


STREAM = Plan("stream", None, False, "test", stream=StreamPlan(units=8, block_k=32, num_warps=4, depth=2, overlap=True))
SPREAD, RESIDENT = WavefrontPlan(16, 8, 2), ResidentPlan(32, 8, 2)


def whole(lanes, kernel):
    return Plan("whole", None, False, "test", WholeSequencePlan(lanes, kernel))


CASES = [
    pytest.param(STREAM, {"T": 1, "I": 8, "H": 16, "L": 3}, id="one step"),
    pytest.param(STREAM, {"T": 1, "I": 8, "H": 16, "L": 1, "bias": False, "batch_first": True}, id="one step, batch first"),
    pytest.param(whole(1, SPREAD), {"L": 1, "H": 32, "batch_first": True}, id="one layer, batch first"),
    pytest.param(whole(3, SPREAD), {"L": 3, "H": 32}, id="stack"),
    pytest.param(whole(1, SPREAD), {"L": 3, "H": 32, "bias": False}, id="layer by layer"),
    pytest.param(whole(2, SPREAD), {"L": 2, "H": 32, "bidirectional": True}, id="two directions, layer by layer"),
    pytest.param(whole(1, RESIDENT), {"L": 1, "H": 32}, id="nothing to prepare"),
    pytest.param(whole(2, RESIDENT), {"L": 2, "H": 32, "batch_first": True}, id="resident stack"),
]


@pytest.mark.parametrize("plan, variant", CASES[2:7])
def test_launches_after_a_product_by_pytorch(launches_on_cpu, monkeypatch, plan, variant):
    monkeypatch.setattr(whole_path, "projection_tile", lambda *sizes: None)
    test_launches(launches_on_cpu, monkeypatch, plan, variant)


@pytest.mark.parametrize("plan, variant", CASES)
def test_launches(launches_on_cpu, monkeypatch, plan, variant):
    args = gru_args(**variant, requires_grad=False)
    run = ready(monkeypatch, plan, args)
    others = gru_args(**variant, requires_grad=False)
    for given in (args, others, args):
        output, h_n = results = run(*given[:3])
        assert_same(results, torch.gru(*given), 2e-3)
    expected = torch.gru(*args)[0]  # batch_first: a view of a time-major one, and so is that of the ordinary way
    transposed = torch.empty_like(expected.transpose(0, 1).contiguous()).transpose(0, 1)
    assert output.stride() == (transposed if variant.get("batch_first") else expected).stride()
    assert h_n.is_contiguous()


TRAINING_CASES = [case for case in CASES if case.values[0].whole is not None]


@pytest.mark.parametrize("plan, variant", TRAINING_CASES)
def test_launches_of_training(launches_on_cpu, monkeypatch, plan, variant):
    """Results, what is saved and gradients are those of the ordinary way."""
    args = gru_args(**variant | {"batch_first": False}, requires_grad=False)
    plan = replace(plan, backward=plan.whole)
    monkeypatch.setattr(kernel_path, "plan_of", lambda call, *, training: plan)
    x, hx, params, bias, L, _, _, bidirectional, _ = args
    call = GRUCall(x, hx, params, bias, L, bidirectional, None)
    training = ready_launches.training_of(call)
    for _ in range(2):
        output, h_n, reserve = training.forward(x, hx, params)
        expected, expected_h_n, _ = whole_path.gru_forward(call, True, plan)
        assert_same([output, h_n], [expected, expected_h_n], 0)
        grads, needs = (torch.randn_like(output), torch.randn_like(h_n)), [True] * (2 + len(params))
        if plan.whole.kernel == RESIDENT:  # whose backward of a stack is not planned
            continue
        found = training.backward(call, *grads, output, reserve, needs)
        _, wanted = reference(*call[:7], grads)
        assert_same(found, wanted, 4e-3)
    assert training.forward(x, misaligned(hx), params) is None
    output, h_n, reserve = ready_launches.of(call, batch_first=False, save=True)(x, hx, params)  # as `gru_forward` makes it
    assert_same([output, h_n], [expected, expected_h_n], 0)
    sizes = call.T, call.B, call.H, call.L, call.D
    assert reserve.shape == (reserve_size(*sizes, cuda=True, bytes_each=4),)
    of_training = training.forward(x, hx, params)[2]
    for found, wanted in zip(call.saved_gates(reserve), call.saved_gates(of_training), strict=True):
        assert torch.equal(found, wanted)


def misaligned(tensor):
    room = tensor.new_empty(tensor.numel() + 1)
    return room[1:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("plan, variant", [CASES[0], CASES[3]])
def test_addresses_that_are_not_aligned(launches_on_cpu, monkeypatch, plan, variant):
    """Other code is compiled for these, or they are copied: not by a ready call."""
    x, hx, params, *_ = args = gru_args(**variant, requires_grad=False)
    run = ready(monkeypatch, plan, args)
    assert run(x, misaligned(hx), params) is None
    assert run(x, hx, [*params[:-1], misaligned(params[-1])]) is None
    assert run(misaligned(x), hx, params) is None
    if plan is not STREAM:  # PyTorch's product takes any address
        monkeypatch.setattr(whole_path, "projection_tile", lambda *sizes: None)
        monkeypatch.setattr(whole_path, "_recipes", {})
        expected = torch.gru(*args)
        assert_same(ready(monkeypatch, plan, args)(misaligned(x), hx, params), expected, 2e-3)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("product", ["ours", "PyTorch's"])
def test_input_with_strides(launches_on_cpu, monkeypatch, batch_first, product):
    """Neither [T, B, I] nor [B, T, I] in memory."""
    if product != "ours":
        monkeypatch.setattr(whole_path, "projection_tile", lambda *sizes: None)
    x, *others = gru_args(L=1, H=32, batch_first=batch_first, requires_grad=False)
    args = x[..., ::2], others[0], [others[1][0][:, ::2].contiguous(), *others[1][1:]], *others[2:]
    run = ready(monkeypatch, whole(1, SPREAD), args)
    assert_same(run(*args[:3]), torch.gru(*args), 2e-3)


def test_what_has_no_ready_call(monkeypatch):
    for plan, variant in (
        (Plan("step", None, False, "test"), {}), (STREAM, {"T": 1, "B": 0}),
        (whole(2, SPREAD), {"H": 20}),
    ):  # fmt: skip
        assert ready(monkeypatch, plan, gru_args(**variant, requires_grad=False)) is None


@pytest.mark.parametrize("variant", [{}, {"batch_first": True, "bidirectional": True}, {"bias": False}])
def test_what_pytorch_runs_is_ready_and_prepares_for_a_graph_once(monkeypatch, variant):
    ordinary = []
    monkeypatch.setattr(kernel_path, "gru_forward", lambda call, save: ordinary.append(save))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    args = gru_args(**variant, requires_grad=False)
    run = ready(monkeypatch, Plan("torch", None, False, "test"), args)
    for given in (args, gru_args(**variant, requires_grad=False)):
        results = run(*given[:3])
        assert_same(results, torch.gru(*given), 0)
        assert [t.stride() for t in results] == [t.stride() for t in dispatch_results(given)]
    assert ordinary == [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    ready(monkeypatch, Plan("torch", None, False, "test"), args)
    assert ordinary == [False]


def dispatch_results(args):
    with torch.no_grad():
        return ops.gru(*args)


def test_a_launch_that_does_not_fit(launches_on_cpu, monkeypatch):
    def refusing(*args):
        def run(*values):
            raise launch.DoesNotFit("too many blocks in cooperative launch")

        return run

    monkeypatch.setattr(launch, "launcher", refusing)
    args = gru_args(L=2, H=32, requires_grad=False)
    plan = whole(2, SPREAD)
    assert ready(monkeypatch, plan, args)(*args[:3]) is None
    # the ordinary way then plans anew, for good
    ready_calls._ready["a key"] = ()
    call = GRUCall(*args[:5], False, None)
    monkeypatch.setattr(kernel_path, "_refused", {})
    kernel_path._refuse(call, plan, launch.DoesNotFit("too many blocks in cooperative launch"))
    assert not ready_calls._ready


def test_programs_that_tests_leave_out(launches_on_cpu, monkeypatch):
    args = gru_args(L=2, H=32, requires_grad=False)
    run = ready(monkeypatch, whole(2, SPREAD), args)
    monkeypatch.setattr(whole_path, "missing_programs", 1)
    assert run(*args[:3]) is None
