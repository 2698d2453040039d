"""Pairs on a GPU: the op against float64 and two calls, by each kernel, in training, in CUDA graphs, in compiled models."""

import pytest
import torch
from problems import assert_same, value_and_grads
from test_pair_op import REVERSE, pair_args, tensors_of, two_calls
from torch import nn

import torch_gru_fuse
import torch_gru_fuse.functional as fused
from torch_gru_fuse.ops import kernel_path
from torch_gru_fuse.ops.call import PairCall

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk"),
]

#: As in test_gpu.py.
TOLERANCE = {"tf32": 2e-2, "float16": 2e-2, "bfloat16": 1.5e-1}


def profiled(run):
    """Calls of this package's ops, by name; a dispatch mode, as on a CPU, would have a compiled model run uncompiled."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    calls = {event.key: event.count for event in profile.key_averages()}
    return {name.split("::")[1]: count for name, count in calls.items() if name.startswith("torch_gru_fuse::")}


@pytest.fixture(params=TOLERANCE)
def precision(request):
    """(dtype, tolerance) with torch's flags set."""
    name = request.param
    torch.set_float32_matmul_precision("high")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        yield torch.float32 if name == "tf32" else getattr(torch, name), TOLERANCE[name]
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def planned(monkeypatch):
    """What is planned for each pair: a plan, or why there is none."""
    plans = []
    plan_of_pair = kernel_path.plan_of_pair
    monkeypatch.setattr(kernel_path, "plan_of_pair", lambda *a, **k: plans.append(plan_of_pair(*a, **k)) or plans[-1])
    return plans


@pytest.fixture
def always(monkeypatch, planned):
    """Whole sequences in one launch wherever there is a plan."""
    monkeypatch.setenv("TORCH_GRU_FUSE_KERNELS", "triton")
    return planned


def exactly(function, args):
    """Results and gradients in float64, on the CPU."""
    inputs, hx, params, *flags = args
    double = [t.detach().double().cpu().requires_grad_() for t in tensors_of(args)]
    return value_and_grads(function, (double[:2], double[2], double[3:], *flags), double)


SIZES = {
    "wavefront": {"T": 40, "B": 10, "I": (48, 100), "H": 256},
    "resident": {"T": 40, "B": 20, "I": (33, 64), "H": 64},
    "staged": {"T": 12, "B": 300, "I": (64, 48), "H": 256},
}


@pytest.mark.parametrize("reverse", REVERSE, ids=str)
@pytest.mark.parametrize("kernel", SIZES)
def test_one_launch(precision, always, kernel, reverse, nan_filled_empty):
    dtype, tolerance = precision
    args = pair_args(**SIZES[kernel], reverse=reverse, dtype=dtype, device="cuda")
    exact = exactly(two_calls, args)
    actual = value_and_grads(fused.gru_pair, args, tensors_of(args))
    assert_same([a.double().cpu() for a in actual], exact, tolerance)
    with torch.no_grad():
        assert_same([a.double().cpu() for a in fused.gru_pair(*args)], exact[:3], tolerance)
    torch_gru_fuse.check_errors()
    assert {plan.whole.kernel.name for plan in always} == {kernel}


@pytest.mark.parametrize("variant", [{"bias": False}, {"batch_first": True}, {"T": 1}, {"B": 1}], ids=str)
def test_other_arguments(precision, always, variant):
    dtype, tolerance = precision
    args = pair_args(**SIZES["wavefront"] | variant, dtype=dtype, device="cuda")
    actual = value_and_grads(fused.gru_pair, args, tensors_of(args))
    assert_same([a.double().cpu() for a in actual], exactly(two_calls, args), tolerance)


@pytest.mark.parametrize("kernels", ["auto", "step", "torch"])
def test_two_calls(precision, monkeypatch, kernels):
    """Sizes for which one launch is not planned."""
    monkeypatch.setenv("TORCH_GRU_FUSE_KERNELS", kernels)
    dtype, tolerance = precision
    args = pair_args(T=5, B=3, I=(7, 9), H=20, reverse=[True, False], dtype=dtype, device="cuda")
    actual = value_and_grads(fused.gru_pair, args, tensors_of(args))
    assert_same([a.double().cpu() for a in actual], exactly(two_calls, args), tolerance)


@pytest.mark.parametrize("reverse", REVERSE, ids=str)
def test_the_lanes_are_those_of_single_calls(always, reverse):
    inputs, hx, params, bias, _, _ = pair_args(**SIZES["wavefront"], dtype=torch.float16, device="cuda")
    call = PairCall(inputs, hx, params, bias, reverse)
    with torch.no_grad():
        outputs = fused.gru_pair(inputs, hx, params, bias, reverse, False)
        for i in range(2):
            single = call.single(i)
            output, h_n = fused.gru(single.input, single.hx, single.params, bias, 1, 0.0, False, False, False)
            assert_same([outputs[i], outputs[2][i : i + 1]], [call.in_time(i, output), h_n], 1e-2)


def test_gradients_of_one_layer_alone(always):
    args = pair_args(**SIZES["resident"], dtype=torch.float16, device="cuda")
    inputs, hx, params, *flags = args
    for tensor in (inputs[1], hx, *params[4:]):
        tensor.requires_grad_(False)
    wanted = [inputs[0], *params[:4]]
    both = value_and_grads(fused.gru_pair, args, wanted)
    double = [t.detach().double().cpu() for t in tensors_of(args)]
    chosen = [double[i].requires_grad_() for i in (0, 3, 4, 5, 6)]
    exact = value_and_grads(two_calls, (double[:2], double[2], double[3:], *flags), chosen)
    assert_same([b.double().cpu() for b in both], exact, TOLERANCE["float16"])


def test_recompute(always):
    args = pair_args(**SIZES["wavefront"], dtype=torch.float16, device="cuda")
    inputs = tensors_of(args)
    expected = value_and_grads(fused.gru_pair, args, inputs)
    assert_same(value_and_grads(lambda *a: fused.gru_pair(*a, recompute=True), args, inputs), expected, 1e-3)


@pytest.mark.parametrize("kernel", SIZES)
def test_cuda_graph(always, kernel):
    """Weights and inputs that change in place show in the next replay."""
    inputs, hx, params, *flags = pair_args(**SIZES[kernel], dtype=torch.float16, device="cuda")
    args = ([x.detach() for x in inputs], hx.detach(), [p.detach() for p in params], *flags)
    with torch.no_grad():
        fused.gru_pair(*args)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = fused.gru_pair(*args)
        for _ in range(3):
            for tensor in (*args[0], *args[2]):
                tensor.mul_(0.9).add_(0.01)
            graph.replay()
            assert_same(captured, fused.gru_pair(*args), 2e-3)


def test_cuda_graph_of_a_training_step(always):
    args = pair_args(**SIZES["wavefront"], dtype=torch.float16, device="cuda")
    inputs = tensors_of(args)

    def step():
        first, second, h_n = fused.gru_pair(*args)
        return torch.autograd.grad((first.float() * 0.1).sum() + second.float().sum() + h_n.float().sum(), inputs)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        graph.replay()
        assert_same(captured, expected, 1e-3)


def test_autocast(always):
    inputs, hx, params, *flags = pair_args(**SIZES["resident"], dtype=torch.float32, device="cuda")
    with torch.autocast("cuda", torch.float16):
        results = fused.gru_pair(inputs, hx, params, *flags)
    assert {r.dtype for r in results} == {torch.float16}
    exact = exactly(two_calls, (inputs, hx, params, *flags))[:3]
    assert_same([r.double().cpu() for r in results], exact, TOLERANCE["float16"])


# ---- compiled -----------------------------------------------------------------------------------------------------------


class Encoders(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.GRU(32, 256), nn.GRU(48, 256), nn.Linear(512, 16)

    def forward(self, x, y):
        first, h_a = self.a(x)
        second, h_b = self.b(y)
        return self.out(torch.cat((first, second), -1)), h_a + h_b


class Directions(nn.Module):
    def __init__(self, batch_first=False):
        super().__init__()
        self.f, self.b = (nn.GRU(32, 256, batch_first=batch_first) for _ in range(2))
        self.time, self.out = int(batch_first), nn.Linear(512, 16)

    def forward(self, x, _):
        ahead, h_f = self.f(x)
        back, h_b = self.b(x.flip(self.time))
        return self.out(torch.cat((ahead, back.flip(self.time)), -1)), h_f + h_b


MODELS = {"encoders": Encoders, "directions": Directions, "directions, batch first": lambda: Directions(batch_first=True)}


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
@pytest.mark.parametrize("kind", MODELS)
def test_compiled_model_has_one_call(kind, mode):
    model = MODELS[kind]().cuda().half()
    args = [torch.randn(*((12, 40) if "batch" in kind else (40, 12)), i, device="cuda", dtype=torch.float16) for i in (32, 48)]
    parameters = list(model.parameters())
    expected = value_and_grads(model, args, parameters)
    with torch_gru_fuse.enable():
        compiled = torch.compile(model, fullgraph=True, mode=mode)
        assert_same(value_and_grads(compiled, args, parameters), expected, TOLERANCE["float16"])
        if mode is None:
            counts = profiled(lambda: value_and_grads(compiled, args, parameters))
            assert counts == {"gru_pair_forward": 1, "gru_pair_backward": 1}
            with torch.no_grad():
                compiled(*args)  # compiles: without gradients it is another graph
                counts = profiled(lambda: compiled(*args))
            assert counts == {"gru_pair_forward": 1}
    assert {record.target for record in torch_gru_fuse.rewrites()} == {"gru_pair"}


def test_a_batch_for_which_one_launch_does_not_pay_has_two_calls():
    model = Encoders().cuda().half()
    args = [torch.randn(20, 4096, i, device="cuda", dtype=torch.float16) for i in (32, 48)]
    with torch_gru_fuse.enable(), torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        compiled(*args)
        counts = profiled(lambda: compiled(*args))
    assert counts == {"gru_forward": 2}
    assert {r.alone for r in torch_gru_fuse.rewrites()} == {
        "one launch for both is not expected to be faster than one for each"
    }


def test_sizes_that_change_without_compiling_anew():
    model = Encoders().cuda().half()
    with torch_gru_fuse.enable(), torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        for steps, batch in ((30, 8), (45, 10), (20, 4096)):
            args = [torch.randn(steps, batch, i, device="cuda", dtype=torch.float16) for i in (32, 48)]
            assert_same(compiled(*args), model(*args), TOLERANCE["float16"])
    assert {record.target for record in torch_gru_fuse.rewrites()} == {"gru_pair"}
