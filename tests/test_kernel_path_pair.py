"""What lies between `gru_pair` and the kernels, without a GPU: one launch, or two calls, and what one leaves to the other.

The kernels run as in `test_kernel_path`.
"""

import itertools
import logging

import pytest
import torch
from problems import assert_same, ops
from test_kernel_path import TILE, emulated_launcher, kernels_on_cpu, whole_on_cpu  # noqa: F401  (fixtures)
from test_pair_op import pair_args, two_calls

import torch_gru_fuse.functional as fused
from torch_gru_fuse import torch_hooks
from torch_gru_fuse.kernels import launch
from torch_gru_fuse.ops import (
    dispatch,
    kernel_backward,
    kernel_path,
    ready_calls,
    schemas,
    timeouts,
    torch_path,
    whole_path,
)  # fmt: skip
from torch_gru_fuse.ops.call import PairCall
from torch_gru_fuse.planner.plan import Plan
from torch_gru_fuse.planner.whole_sequence import ResidentPlan, StagedPlan, WavefrontPlan, WholeSequencePlan

PLANS = {
    "wavefront": WavefrontPlan(16, 8, 2),
    "resident": ResidentPlan(32, 8, 2),
    "staged": StagedPlan(16, 8, 2, 1, 1),
}
HIDDEN = {"wavefront": 32, "resident": 32, "staged": 64}


@pytest.fixture
def planned(whole_on_cpu, monkeypatch):  # noqa: F811
    """Sets the plan of pairs: one launch by that kernel, or two calls, each a launch a step; yields what is launched."""
    launched = []

    def watching(kernel, *args):
        run = emulated_launcher(kernel, *args)

        def watch(*values):
            launched.append(kernel.fn.__name__)
            return run(*values)

        return watch

    def set_plan(kernel=None, backward=True):
        whole = None if kernel is None else WholeSequencePlan(2, PLANS[kernel])
        pair = Plan("whole", TILE, False, "test", whole, backward=whole if backward else None, backward_tile=TILE)
        single = Plan("step", TILE, False, "test", backward_tile=TILE)
        kernel_path._plans.clear()
        launched.clear()
        monkeypatch.setattr(kernel_path, "plan_gru_pair", lambda *_, **__: "test" if kernel is None else pair)
        monkeypatch.setattr(kernel_path, "plan_gru", lambda *_, **__: single)
        return launched

    monkeypatch.setattr(launch, "launcher", watching)
    return set_plan


def float_call(**variant):
    args = [*pair_args(**variant)]
    inputs, hx, params, bias, reverse, _ = args
    float32 = lambda t: t.detach().float()  # noqa: E731
    return PairCall([float32(x) for x in inputs], float32(hx), [float32(p) for p in params], bias, reverse)


def reference(call, grads):
    inputs, hx, params = ([t.double().requires_grad_() for t in ts] for ts in (call.inputs, [call.hx], call.params))
    tensors = [*inputs, *hx, *params]
    with torch.enable_grad():
        first, second, h_n = two_calls(inputs, hx[0], params, call.has_biases, call.reverse, False)
        results = torch.stack((first, second)), h_n
    used = [(r, g.double()) for r, g in zip(results, grads, strict=True) if g is not None]
    gradients = torch.autograd.grad([r for r, _ in used], tensors, [g for _, g in used], allow_unused=True)
    return [r.detach().float() for r in results], [g.float() for g in gradients]


def check(call, tolerance):
    inference = kernel_path.gru_pair_forward(call, False)
    output, h_n, reserve = kernel_path.gru_pair_forward(call, True)
    assert inference[2].numel() == 0
    assert reserve.shape == schemas.empty_pair_results(call.input, call.hx, True)[2].shape
    both = torch.randn_like(output), torch.randn_like(h_n)
    count = len(call.tensors)
    for grads, needs in zip(
        (both, (both[0], None), (None, both[1])),
        ([True] * count, [i % 3 != 1 for i in range(count)], [i in (1, 2) for i in range(count)]),
        strict=True,
    ):
        expected, expected_grads = reference(call, grads)
        assert_same([output, h_n], expected, tolerance)
        assert_same(inference[:2], expected, tolerance)
        gradients = kernel_path.gru_pair_backward(call, *grads, output, reserve, needs)
        assert_same(gradients, [g for g, need in zip(expected_grads, needs, strict=True) if need], 2 * tolerance)


REVERSE = [list(flags) for flags in itertools.product([False, True], repeat=2)]


@pytest.mark.parametrize("reverse", REVERSE, ids=str)
@pytest.mark.parametrize("kernel", PLANS)
def test_one_launch(planned, kernel, reverse):
    launched = planned(kernel)
    check(float_call(H=HIDDEN[kernel], reverse=reverse), 2e-3)  # operands are rounded to tf32
    assert launched.count(f"{kernel}_kernel") == 2 and launched.count(f"{kernel}_backward_kernel") == 3


@pytest.mark.parametrize("variant", [{"bias": False}, {"T": 1}, {"B": 17, "I": (3, 64)}], ids=str)
def test_one_launch_of_other_sizes(planned, variant):
    planned("wavefront")
    check(float_call(H=32, **variant), 2e-3)


@pytest.mark.parametrize("reverse", REVERSE, ids=str)
def test_two_calls(planned, reverse):
    launched = planned(None)
    check(float_call(reverse=reverse), 3e-6)
    assert "wavefront_kernel" not in launched


def test_two_calls_leave_their_results_in_those_of_the_pair(planned, monkeypatch):
    """Going forwards in time nothing is copied."""
    planned(None)
    call = float_call(reverse=[False, False])
    copies = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: copies.append(self))
    kernel_path.gru_pair_forward(call, True)
    assert copies == []


@pytest.mark.parametrize("reverse", REVERSE, ids=str)
def test_a_step_a_launch_backward_of_one_launch(planned, reverse):
    """Where the backward of one launch does not fit the GPU."""
    planned("wavefront", backward=False)
    check(float_call(H=32, reverse=reverse), 2e-3)


def test_a_launch_that_does_not_fit_is_two_calls_from_then_on(planned, monkeypatch, caplog):
    planned("wavefront")
    call = float_call(H=32)

    def refusing(*_, **__):
        raise launch.DoesNotFit("too many blocks in cooperative launch")

    monkeypatch.setattr(whole_path, "gru_forward", refusing)
    with caplog.at_level(logging.WARNING, logger="torch_gru_fuse"):
        for _ in range(2):
            check(call, 5e-6)
    [record] = caplog.records
    assert "whole sequences in one launch do not fit, another kernel runs: too many blocks" in record.message


def test_a_backward_that_does_not_fit_is_two(planned, monkeypatch, caplog):
    planned("wavefront")
    call = float_call(H=32, reverse=[True, False])

    def refusing(*_, **__):
        raise launch.DoesNotFit("too many blocks in cooperative launch")

    monkeypatch.setattr(kernel_backward.whole_backward, "gate_gradients", refusing)
    with caplog.at_level(logging.WARNING, logger="torch_gru_fuse"):
        check(call, 2e-3)
    assert len(caplog.records) == 1


def test_the_reserve_may_be_copied_between_forward_and_backward(planned):
    """Offloaded, or replayed from a CUDA graph: the plan is made anew."""
    planned("wavefront")
    call = float_call(H=32)
    output, h_n, reserve = kernel_path.gru_pair_forward(call, True)
    grads = torch.randn_like(output), torch.randn_like(h_n)
    gradients = kernel_path.gru_pair_backward(call, *grads, output, reserve.clone(), [True] * len(call.tensors))
    assert_same(gradients, reference(call, grads)[1], 4e-3)


def test_a_wait_that_ran_out_is_an_error(planned, monkeypatch):
    planned("wavefront")
    monkeypatch.setattr(whole_path, "missing_programs", 1)
    output, h_n, _ = kernel_path.gru_pair_forward(float_call(H=32), False)
    assert output[1].isnan().any() and h_n[1].isnan().all() and not output[0].isnan().any()
    with pytest.raises(RuntimeError, match="torch_gru_fuse.gru_pair: the wavefront kernel gave up") as error:
        timeouts.check(-1)
    assert "T=5, B=3, H=32, reverse=[False, True], float32" in str(error.value)


def test_empty_batch(planned):
    planned("wavefront")
    call = float_call(B=0, H=32)
    output, h_n, reserve = kernel_path.gru_pair_forward(call, True)
    assert output.shape == (2, 5, 0, 32) and h_n.shape == (2, 0, 32)
    gradients = kernel_path.gru_pair_backward(call, output, h_n, output, reserve, [True] * len(call.tensors))
    assert_same(gradients, [torch.zeros_like(t) for t in call.tensors], 0)


# ---- calls like an earlier one ------------------------------------------------------------------------------------------


@pytest.fixture
def cuda(planned, monkeypatch):
    """CPU tensors play CUDA's up to the op; yields `planned` and what was asked for: a plan, the ordinary way."""
    asked = []
    plan_of_pair, ordinary = kernel_path.plan_of_pair, kernel_path.gru_pair_forward
    monkeypatch.setattr(torch_hooks, "empty_strided_cuda", torch._C._dynamo.guards._empty_strided_cpu)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(kernel_path, "plan_of_pair", lambda *a, **k: asked.append("plan") or plan_of_pair(*a, **k))
    monkeypatch.setattr(kernel_path, "gru_pair_forward", lambda *a: asked.append("ordinary") or ordinary(*a))
    on_cuda = lambda *a, recompute=False: kernel_path.gru_pair_forward(PairCall(*a[:5]), a[5])  # noqa: E731
    monkeypatch.setitem(dispatch._on_cuda, "gru_pair_forward", on_cuda)
    ready_calls.forget()
    with torch.no_grad():
        yield planned, asked
    ready_calls.forget()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kernel", PLANS)
def test_a_second_call_is_ready(cuda, kernel, batch_first):
    planned, asked = cuda
    launched = planned(kernel)
    for number in range(3):
        inputs, hx, params, *flags = (t for t in pair_args(H=HIDDEN[kernel], batch_first=batch_first, dtype=torch.float32))
        args = [x.detach() for x in inputs], hx.detach(), [p.detach() for p in params], *flags
        assert_same(fused.gru_pair(*args), two_calls(*args), 2e-3)
        assert asked == ["plan"] and launched.count(f"{kernel}_kernel") == number + 1


def test_the_op_of_a_compiled_model_is_ready_and_its_reserve_is_known(cuda):
    planned, asked = cuda
    planned("wavefront")
    call = float_call(H=32)
    for _ in range(2):
        output, h_n, reserve = ops.gru_pair_forward(*call, True)
        assert reserve.shape == schemas.empty_pair_results(call.input, call.hx, True)[2].shape
        grads = torch.randn_like(output), torch.randn_like(h_n)
        gradients = kernel_path.gru_pair_backward(call, *grads, output, reserve, [True] * len(call.tensors))
        assert_same(gradients, reference(call, grads)[1], 4e-3)
    assert asked == ["plan"]
    assert ops.gru_pair_forward(*call, False)[2].numel() == 0 and asked == ["plan", "plan"]


def test_what_is_not_ready_takes_the_ordinary_way(cuda, monkeypatch):
    planned, asked = cuda
    planned("wavefront")
    call = float_call(H=32)

    def way(changed):
        asked.clear()
        with torch.no_grad():
            results = fused.gru_pair(*changed, False)
        expected = two_calls(changed.inputs, changed.hx, changed.params, changed.has_biases, changed.reverse, False)
        assert_same(results, expected, 2e-3)
        return asked[-1:]

    assert way(call) == ["plan"] and way(call) == []
    odd = torch.cat((call.hx.new_zeros(1), call.hx.flatten()))[1:].view(call.hx.shape)
    for changed in (
        call._replace(hx=odd),  # not aligned
        call._replace(params=[p.t().contiguous().t() if p.dim() == 2 else p for p in call.params]),
    ):
        assert way(changed)[-1:] == ["plan"] and "ordinary" in asked
    planned(None)  # two calls
    ready_calls.forget()
    assert "ordinary" in (way(call) and asked) and "ordinary" in (way(call) and asked)


def test_the_path_of_cpus_is_two_calls():
    call = float_call(reverse=[True, False])
    output, h_n, _ = torch_path.gru_pair_forward(call, False)
    assert_same([output, h_n], reference(call, (torch.ones_like(output), None))[0], 3e-6)
