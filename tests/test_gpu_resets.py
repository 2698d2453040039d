"""Resets of the state between steps on a GPU: the kernels behind the op, CUDA graphs, a compiled loop."""

import pytest
import torch
from problems import assert_same, gru_args, value_and_grads
from rollup import value_and_grads as some_value_and_grads
from test_gpu import PRECISIONS, TOLERANCE
from test_resets import loop
from test_rollup_resets import Model

import torch_gru_fuse
import torch_gru_fuse.functional as fused
from torch_gru_fuse.ops import kernel_backward, kernel_path, whole_path
from torch_gru_fuse.planner.whole_sequence import WholeSequencePlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

VARIANTS = [
    {},
    {"T": 1, "B": 1, "I": 1, "H": 1, "L": 1},
    {"T": 9, "B": 17, "I": 33, "H": 65, "bidirectional": True, "batch_first": True},
    {"T": 12, "B": 70, "I": 48, "H": 256, "L": 2, "bias": False},
]


@pytest.fixture(params=PRECISIONS)
def precision(request):
    """(dtype, tolerance) with torch's flags set."""
    name = request.param
    dtype = torch.float32 if name in ("ieee", "tf32") else getattr(torch, name)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=name == "tf32"):
        yield dtype, TOLERANCE[name]


def resets_of(kind, dtype, x):
    drawn = torch.rand(x.shape[:2], device="cuda")
    return drawn < 0.3 if kind == "bool" else ((drawn < 0.3).to(dtype) if kind == "0 or 1" else drawn.to(dtype))


@pytest.mark.parametrize("kind", ["bool", "0 or 1", "any factor"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gru(precision, variant, kind, nan_filled_empty):
    dtype, tolerance = precision
    args = gru_args(dtype=dtype, device="cuda", **variant)
    inputs = [args[0], args[1], *args[2]]
    resets = resets_of(kind, dtype, args[0])
    double = [t.detach().double().requires_grad_() for t in inputs]
    exact = value_and_grads(
        lambda *a: loop(*a, resets=resets.double()), (double[0], double[1], double[2:], *args[3:]), double
    )
    for recompute in (False, True):
        actual = value_and_grads(lambda *a, r=recompute: fused.gru(*a, recompute=r, resets=resets), args, inputs)
        assert_same([a.double() for a in actual], exact, tolerance)
    with torch.no_grad():
        assert_same([a.double() for a in fused.gru(*args, resets=resets)], exact[:2], tolerance)


@pytest.fixture
def planned(monkeypatch):
    """Plans of the calls that a test makes."""
    plans = []
    plan_of = kernel_path.plan_of
    monkeypatch.setattr(kernel_path, "plan_of", lambda *a, **k: plans.append(plan_of(*a, **k)) or plans[-1])
    return plans


def test_few_steps_are_launches_of_their_own(planned):
    args = gru_args(T=3, H=256, dtype=torch.float16, device="cuda")
    resets = torch.zeros(3, 3, dtype=torch.bool, device="cuda")
    fused.gru(*args, resets=resets)[0].sum().backward()
    assert [p.kernel for p in planned] == ["step"] and planned[0].backward is None


# ---- whole sequences in one launch ------------------------------------------------------------------------------------------

WHOLE = [
    # sizes, the kernels of forward and backward in half precision
    ({"T": 40, "B": 16, "I": 24, "H": 256, "L": 1}, "wavefront", "wavefront"),
    ({"T": 33, "B": 9, "I": 24, "H": 256, "L": 3}, "wavefront", "wavefront"),
    ({"T": 40, "B": 31, "I": 16, "H": 256, "L": 2, "bidirectional": True}, "wavefront", "wavefront"),
    ({"T": 50, "B": 64, "I": 16, "H": 64, "L": 1}, "resident", "resident"),
    ({"T": 30, "B": 17, "I": 16, "H": 64, "L": 3, "bias": False}, "resident", "wavefront"),
    ({"T": 21, "B": 64, "I": 16, "H": 128, "L": 1, "bidirectional": True}, "resident", "resident"),
    ({"T": 20, "B": 700, "I": 16, "H": 256, "L": 1}, "staged", "staged"),
    ({"T": 20, "B": 500, "I": 16, "H": 256, "L": 1, "bidirectional": True, "batch_first": True}, "staged", "staged"),
    ({"T": 4, "B": 1, "I": 16, "H": 512, "L": 2}, "wavefront", "wavefront"),
]
HALF_BITS = {"tf32": 2**-11, "float16": 2**-11, "bfloat16": 2**-8}


@pytest.fixture(params=HALF_BITS)
def whole(request, monkeypatch):
    """(dtype, rounding) with torch's flags set, and our kernels forced."""
    monkeypatch.setenv("TORCH_GRU_FUSE_KERNELS", "triton")
    dtype = torch.float32 if request.param == "tf32" else getattr(torch, request.param)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        yield dtype, HALF_BITS[request.param]
    torch_gru_fuse.check_errors()
    assert not kernel_path._refused and not kernel_backward._refused  # else a launch a step has run


def rms(actual, expected):
    return [(a.double() - e).square().mean().sqrt().item() / max(1.0, e.abs().max().item())
            for a, e in zip(actual, expected, strict=True)]  # fmt: skip


@pytest.mark.parametrize("kind", ["bool", "0 or 1", "any factor", "none", "all"])
@pytest.mark.parametrize("variant, forward, backward", WHOLE, ids=str)
def test_whole_sequences_are_as_exact_as_steps(whole, monkeypatch, planned, variant, forward, backward, kind, nan_filled_empty):
    """Outputs and all gradients; the same bits again, recomputed, and without gradients."""
    dtype, rounding = whole
    args = gru_args(dtype=dtype, device="cuda", **variant)
    inputs = [args[0], args[1], *args[2]]
    resets = resets_of("bool" if kind in ("none", "all") else kind, dtype, args[0])
    if kind in ("none", "all"):
        resets.fill_(kind == "all")
    double = [t.detach().double().requires_grad_() for t in inputs]
    exact = value_and_grads(
        lambda *a: loop(*a, resets=resets.double()), (double[0], double[1], double[2:], *args[3:]), double
    )

    def run(*tensors, recompute=False):
        return fused.gru(*tensors, recompute=recompute, resets=resets)

    ours = value_and_grads(run, args, inputs)
    assert [p.kernel for p in planned] == ["whole"] and isinstance(planned[0].backward, WholeSequencePlan)
    if dtype != torch.float32:
        assert (planned[0].whole.kernel.name, planned[0].backward.kernel.name) == (forward, backward)
    assert all(torch.equal(a, b) for a, b in zip(ours, value_and_grads(run, args, inputs), strict=True))
    again = value_and_grads(lambda *a: run(*a, recompute=True), args, inputs)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(run(*args), ours[:2], strict=True))
    monkeypatch.setenv("TORCH_GRU_FUSE_KERNELS", "step")
    steps = value_and_grads(run, args, inputs)
    assert planned[-1].kernel == "step"
    for i, (own, by_steps) in enumerate(zip(rms(ours, exact), rms(steps, exact), strict=True)):
        assert own <= 2 * by_steps + 2 * rounding, f"result {i}: {own:.1e}, a launch a step {by_steps:.1e}"


@pytest.mark.parametrize("hidden", [200, 250])
def test_padded_units(whole, planned, hidden):
    dtype, rounding = whole
    args = gru_args(T=20, B=9, I=16, H=hidden, L=2, dtype=dtype, device="cuda", requires_grad=False)
    resets = resets_of("any factor", dtype, args[0])
    double = [t.double() if isinstance(t, torch.Tensor) else t for t in (args[0], args[1], [p.double() for p in args[2]])]
    exact = loop(*double, *args[3:], resets=resets.double())
    assert max(rms(fused.gru(*args, resets=resets), exact)) <= 8 * rounding
    assert [p.kernel for p in planned] == ["whole"]


@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_between_layers(whole, bidirectional):
    dtype, rounding = whole
    x, hx, params, bias, L, *_ = gru_args(
        T=30, B=7, I=16, H=256, L=3, bidirectional=bidirectional, dtype=dtype, device="cuda"
    )
    masks = torch.bernoulli(torch.full((2, 30, 7, 256 * (1 + bidirectional)), 0.5, device="cuda")) * 2
    keep = ~resets_of("bool", dtype, x)

    def run(tensors):
        placed = masks.to(tensors[0])
        return value_and_grads(
            lambda x, hx, params: torch.ops.torch_gru_fuse.gru_forward(
                x, hx, params, bias, L, bidirectional, placed, True, keep
            )[:2],
            (*tensors[:2], tensors[2:]), tensors,
        )  # fmt: skip

    tensors = (x, hx, *params)
    exact = run([t.detach().double().requires_grad_() for t in tensors])
    assert max(rms(run(tensors), exact)) <= 16 * rounding


def test_a_bool_reset_ends_what_is_not_finite(whole):
    """Row by row, in each kernel."""
    dtype, _ = whole
    for variant, *_ in WHOLE:
        if variant.get("bidirectional"):
            continue
        x, hx, params, *flags = gru_args(dtype=dtype, device="cuda", requires_grad=False, **variant)
        resets = torch.zeros(x.shape[:2], dtype=torch.bool, device="cuda")
        resets[2] = True
        finite = fused.gru(x, hx, params, *flags, resets=resets)
        hx[:, 0, 3] = float("nan")
        output, h_n = fused.gru(x, hx, params, *flags, resets=resets)
        assert output[1, 0].isnan().any() and torch.equal(output[2:], finite[0][2:]) and torch.equal(h_n, finite[1])
        assert torch.equal(output[:, 1:], finite[0][:, 1:])


def test_a_wait_that_runs_out_is_an_error(whole, monkeypatch):
    dtype, _ = whole
    args = gru_args(T=30, B=9, I=16, H=256, dtype=dtype, device="cuda", requires_grad=False)
    resets = resets_of("bool", dtype, args[0])
    expected = fused.gru(*args, resets=resets)
    monkeypatch.setenv("TORCH_GRU_FUSE_TIMEOUT_S", "0.05")
    monkeypatch.setattr(whole_path, "missing_programs", 1)
    fused.gru(*args, resets=resets)
    with pytest.raises(RuntimeError, match="torch_gru_fuse.gru: the wavefront kernel gave up"):
        torch_gru_fuse.check_errors()
    monkeypatch.setattr(whole_path, "missing_programs", 0)
    assert all(torch.equal(a, b) for a, b in zip(fused.gru(*args, resets=resets), expected, strict=True))


def test_settings_choose_the_kernel(monkeypatch, planned):
    args = gru_args(T=128, B=16, I=16, H=256, L=1, dtype=torch.float16, device="cuda")
    resets = torch.zeros(128, 16, dtype=torch.bool, device="cuda")
    for value, kernel in (("auto", "whole"), ("triton", "whole"), ("step", "step"), ("torch", "torch")):
        monkeypatch.setenv("TORCH_GRU_FUSE_KERNELS", value)
        planned.clear()
        fused.gru(*args, resets=resets)[0].sum().backward()
        assert [p.kernel for p in planned] == [kernel]


# ---- graphs and compiled code -----------------------------------------------------------------------------------------------


def test_bool_clears_what_is_not_a_number():
    x, hx, params, *flags = gru_args(H=64, dtype=torch.float16, device="cuda", requires_grad=False)
    x[1, 0] = float("nan")
    resets = torch.zeros(5, 3, dtype=torch.bool, device="cuda")
    resets[2] = True
    output, h_n = fused.gru(x, hx, params, *flags, resets=resets)
    assert output[1, 0].isnan().all() and not output[2:].isnan().any() and not h_n.isnan().any()


def test_cuda_graph_reads_other_resets():
    x, hx, params, *flags = gru_args(T=16, B=8, H=64, dtype=torch.float16, device="cuda", requires_grad=False)
    resets = torch.zeros(16, 8, dtype=torch.bool, device="cuda")
    with torch.no_grad():
        fused.gru(x, hx, params, *flags, resets=resets)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = fused.gru(x, hx, params, *flags, resets=resets)
        resets[5] = True
        graph.replay()
        assert_same(captured, fused.gru(x, hx, params, *flags, resets=resets), 1e-6)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_compiled_loop(mode):
    model = Model(resetting_loop).cuda()
    x = torch.randn(5, 3, 4, device="cuda", requires_grad=True)
    done = (torch.rand(5, 3, device="cuda") < 0.4).float()
    inputs = [*model.parameters(), x]
    with torch_gru_fuse.enable():
        actual = some_value_and_grads(torch.compile(model, fullgraph=True, mode=mode), (x, done), inputs)
    assert_same(actual, some_value_and_grads(model, (x, done), inputs), TOLERANCE["tf32"])
    assert [r.target for r in torch_gru_fuse.rewrites()] == ["gru"]


def resetting_loop(m, x, done):
    h, outputs = x.new_zeros(x.shape[1], 6), []
    for t in range(len(x)):
        h = m.cell(x[t], h * (1 - done[t]).unsqueeze(-1))
        outputs.append(h)
    return torch.stack(outputs), h
