"""Resets of the state between steps: the path of CUDA with interpreted kernels, its plans, and the kernels compiled."""

import pytest
import torch
from problems import assert_same, gru_args
from test_kernel_path import kernels_on_cpu, plan  # noqa: F401  (a fixture)
from test_kernels_compile import ALIGNED, PRECISIONS, assert_fits, default_tiles
from test_resets import KINDS, resets_of

from torch_gru_fuse import equations, torch_hooks
from torch_gru_fuse.kernels import aot
from torch_gru_fuse.ops import kernel_path
from torch_gru_fuse.ops.call import GRUCall
from torch_gru_fuse.planner import tiles
from torch_gru_fuse.planner.gpus import gpu_named
from torch_gru_fuse.planner.plan import plan_gru


@pytest.mark.parametrize("kernel", ["step", "torch"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", [{"L": 1}, {"L": 2, "bidirectional": True, "T": 7}, {"L": 2, "bias": False}], ids=str)
def test_kernel_path(kernels_on_cpu, monkeypatch, variant, kind, kernel):  # noqa: F811
    plan(monkeypatch, kernel)
    monkeypatch.setattr(torch_hooks, "cudnn_runs", lambda tensor: True)  # it must not be asked
    x, hx, params, bias, L, _, _, bidirectional, _ = gru_args(**variant, requires_grad=False)
    keep = 1 - resets_of(kind, size=x.shape[:2]).float().t().contiguous().t()  # as of resets that are batch first
    masks = torch.bernoulli(torch.full((L - 1, *x.shape[:2], 12), 0.5)) * 2 if bidirectional else None
    given = keep.bool() if kind == "bool" else keep
    call = GRUCall(x, hx, params, bias, L, bidirectional, masks, given)

    double = [t.double().requires_grad_() for t in (x, hx, *params)]
    exact = equations.gru(double[0], double[1], double[2:], bias, L, bidirectional,
                          None if masks is None else masks.double(), keep.double())  # fmt: skip
    inference = kernel_path.gru_forward(call, False)
    output, h_n, reserve = kernel_path.gru_forward(call, True)
    assert_same([output, h_n, *inference[:2]], [e.float() for e in exact] * 2, 2e-6)
    grads = torch.randn_like(output), torch.randn_like(h_n)
    expected = torch.autograd.grad(exact, double, [g.double() for g in grads])
    needs = [True] * len(double)
    actual = kernel_path.gru_backward(call, *grads, output, reserve, needs)
    assert_same(actual, [e.float() for e in expected], 5e-6)
    actual = kernel_path.gru_backward(call, *grads, output, reserve.clone(), needs)  # its plan is made anew
    assert_same(actual, [e.float() for e in expected], 5e-6)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("sizes", [(512, 10, 128, 256, 6, 1), (1, 1, 512, 512, 2, 1), (1000, 32, 64, 256, 2, 2)], ids=str)
def test_plan(sizes, training):
    gpu = gpu_named("h100")
    flags = dict(tf32_allowed=True, training=training, cudnn=True, gpu=gpu, captured=True)
    planned = plan_gru(*sizes, "torch.float16", resets=True, **flags)
    assert planned.kernel == "step" and planned.whole is planned.backward is planned.stream is None
    assert (planned.backward_tile is not None) == training and "resets" in planned.reason
    assert plan_gru(*sizes, "torch.float16", **flags).kernel == ("whole" if sizes[0] > 1 else "torch" if training else "stream")
    refused = plan_gru(*sizes, "torch.float64", resets=True, **flags | {"unsupported": "float64", "gpu": None})
    assert refused.kernel == "torch"


@pytest.mark.parametrize("choice", ["torch", "triton", "step"])
def test_plan_that_is_asked_for(monkeypatch, choice):
    monkeypatch.setenv("TORCH_GRU_FUSE_KERNELS", choice)
    flags = dict(tf32_allowed=True, training=True, gpu=gpu_named("h100"), resets=True)
    for cudnn in (False, True):
        planned = plan_gru(50, 8, 64, 64, 1, 1, "torch.float16", cudnn=cudnn, **flags)
        assert planned.kernel == ("torch" if choice == "torch" else "step")



# ---- kernels -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision, keep", [("fp32", None), ("tf32", torch.bool), ("fp16", torch.bool), ("bf16", None)])
def test_step_kernels_compile_without_spills(precision, keep):
    dtype, tf32 = PRECISIONS[precision]
    for tile, width in default_tiles(tiles.default_step_tile, precision):
        if width % 16:
            continue
        for capability in (89, 90) if tile.block_b >= 64 else (89,):
            options = dict(hidden=width, directions=2, keep=keep or dtype, tf32=tf32, capability=capability)
            assert_fits(aot.compile_sequence_forward(dtype, tile, **options))
            assert_fits(aot.compile_sequence_backward(dtype, tile, **options))


def test_without_resets_the_code_reads_none():
    tile = tiles.default_step_tile(16, ALIGNED, 2)
    for compiled in (aot.compile_sequence_forward, aot.compile_sequence_backward):
        assert "ld.global.b8" not in compiled(torch.float16, tile, hidden=ALIGNED).ptx
        assert "ld.global.b8" in compiled(torch.float16, tile, hidden=ALIGNED, keep=torch.bool).ptx
