"""Resets of the state between steps on a GPU: the step kernels behind the op, CUDA graphs, a compiled loop."""

import pytest
import torch
from problems import assert_same, gru_args, value_and_grads
from rollup import value_and_grads as some_value_and_grads
from test_gpu import PRECISIONS, TOLERANCE
from test_resets import loop
from test_rollup_resets import Model

import torch_gru_fuse
import torch_gru_fuse.functional as fused
from torch_gru_fuse.ops import kernel_path

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


def test_step_kernels_run(monkeypatch):
    planned = []
    plan_of = kernel_path.plan_of
    monkeypatch.setattr(kernel_path, "plan_of", lambda *a, **k: planned.append(plan_of(*a, **k)) or planned[-1])
    args = gru_args(T=20, H=256, dtype=torch.float16, device="cuda")
    resets = torch.zeros(20, 3, dtype=torch.bool, device="cuda")
    fused.gru(*args, resets=resets)[0].sum().backward()
    assert [p.kernel for p in planned] == ["step"] and planned[0].backward is None


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
