"""Training through compiled models on a GPU: every loop of training.py, in TF32 and under autocast to float16 and bfloat16.

What is compared is how far from float64 eager and compiled training end up: on a GPU they do not round alike.
"""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from training import LOOPS, Sizes, Way, check_precision, check_recomputed_dropout, problem, train

import torch_gru_fuse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk"),
]

ROOT = Path(__file__).parents[1]
#: Of which there are kernels, and few enough to compile them quickly.
SIZES = Sizes(T=24, B=16, I=32, H=64, O=32)
#: dtype of the weights, of autocast, rounding of a product's operands
PRECISIONS = {
    "ieee": (torch.float32, None, 2**-24),
    "tf32": (torch.float32, None, 2**-12),
    "float16": (torch.float32, torch.float16, 2**-12),
    "bfloat16": (torch.float32, torch.bfloat16, 2**-9),
}
#: torch.gru inside of torch.func.grad: PyTorch's own, which is what is compared with, raises "Cannot access storage" for CUDA.
NOT_ON_CUDA = "whole step in one graph"
#: Each precision and each set of kernels (TORCH_GRU_FUSE_KERNELS) with all loops, but not all pairs.
CASES = [
    pytest.param(name, precision, kernels, id=f"{name}-{precision}-{kernels}")
    for precision, kernels in (("tf32", "auto"), ("tf32", "triton"), ("float16", "auto"), ("bfloat16", "triton"))
    for name, entry in LOOPS.items()
    if not entry.exact and name != NOT_ON_CUDA
] + [pytest.param(name, "ieee", "auto", id=f"{name}-ieee-auto") for name in ("SGD", "lbfgs", "weights get new storage")]
#: What a CUDA graph that torch.compile recorded could miss: weights elsewhere, or others.  (Gradients that are added up in the
#: memory of a graph are an error of PyTorch's, with the package and without it.)
RECORDED = [
    "SGD", "AdamW fused", "grad scaler", "weights get new storage", "weights are written in place",
    "average swapped in for evaluation",
]  # fmt: skip


@pytest.fixture
def enabled():
    with torch_gru_fuse.enable():
        yield


def compare(name, precision, **compile_options):
    """Train in float64, eagerly and compiled; check the last against the others."""
    dtype, autocast, roundoff = PRECISIONS[precision]
    tf32 = precision != "ieee"
    loop = LOOPS[name].loop
    model, batches = problem(SIZES)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32):
            exact = train(loop, model, batches, Way("cuda"))
            eager = train(loop, model, batches, Way("cuda", dtype, autocast))
            assert exact.calls == eager.calls == {}
            compiled = train(loop, model, batches, Way("cuda", dtype, autocast, compile_options))
    finally:
        torch.set_float32_matmul_precision("highest")
    torch_gru_fuse.check_errors()
    check_precision(compiled, eager, exact, roundoff)
    assert torch_gru_fuse.rewrites() and all(r.rewritten for r in torch_gru_fuse.rewrites())
    return compiled


@pytest.mark.parametrize(("name", "precision", "kernels"), CASES)
def test_compiled_trains_as_eager(enabled, monkeypatch, name, precision, kernels):
    monkeypatch.setenv("TORCH_GRU_FUSE_KERNELS", kernels)
    LOOPS[name].check_calls(compare(name, precision))


@pytest.mark.parametrize("kernels", ["auto", "triton"])
@pytest.mark.parametrize("name", RECORDED)
def test_cuda_graphs(enabled, monkeypatch, name, kernels):
    """Some of the four steps replay what another recorded, in which no op is called."""
    monkeypatch.setenv("TORCH_GRU_FUSE_KERNELS", kernels)
    compiled = compare(name, "float16", mode="reduce-overhead")
    assert compiled.calls["gru_forward"] >= 1 and compiled.calls["gru_backward"] >= 1


def test_recomputed_dropout(enabled):
    check_recomputed_dropout(Way("cuda", compile_options={}), SIZES)


# ---- deterministic algorithms -------------------------------------------------------------------------------------------

_DETERMINISTIC = """
import sys
import torch
import torch_gru_fuse
from test_gpu_training import SIZES
from training import Way, plain, problem, train

torch.use_deterministic_algorithms(True)
torch_gru_fuse.enable()
model, batches = problem(SIZES)
way = Way("cuda", torch.float32, getattr(torch, sys.argv[1], None), {})
first, second = (train(plain, model, batches, way) for _ in range(2))
assert torch.equal(first.changes, second.changes) and torch.equal(first.losses, second.losses)
assert first.calls == {"gru_forward": 4, "gru_backward": 4}, first.calls
"""


@pytest.mark.parametrize("kernels", ["auto", "triton"])
@pytest.mark.parametrize("autocast", ["no", "float16"])
def test_deterministic_algorithms(autocast, kernels):
    """They are accepted, and two trainings are the same bit by bit.  cuBLAS wants to know of it before its first call."""
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "TORCH_GRU_FUSE_KERNELS": kernels,
    }
    done = subprocess.run([sys.executable, "-c", _DETERMINISTIC, autocast], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- memory -------------------------------------------------------------------------------------------------------------


def held(function, *args):
    """Bytes that a forward leaves allocated for its backward, results included."""
    for _ in range(2):  # workspaces, code, gradients
        torch.autograd.backward([t.sum() for t in function(*args)])
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    results = function(*args)
    torch.cuda.synchronize()
    bytes_ = torch.cuda.memory_allocated() - before
    del results
    return bytes_


@pytest.mark.parametrize("kernels", ["auto", "triton"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one direction", "two directions"])
@pytest.mark.parametrize("kind", ["float32", "float16", "autocast"])
def test_memory_between_forward_and_backward(enabled, monkeypatch, kind, bidirectional, kernels):
    """At most what eager cuDNN holds: its reserve, outputs, and under autocast copies of input and weights."""
    monkeypatch.setenv("TORCH_GRU_FUSE_KERNELS", kernels)
    T, B, H, L = 64, 64, 256, 3
    dtype = torch.float16 if kind == "float16" else torch.float32
    model = nn.GRU(H, H, L, bidirectional=bidirectional).to("cuda", dtype)
    x = torch.randn(T, B, H, device="cuda", dtype=dtype, requires_grad=True)

    def under_autocast(model, x):  # entered anew: it keeps copies of weights until it ends
        with torch.autocast("cuda", dtype=torch.float16, enabled=kind == "autocast"):
            return model(x)

    eager = held(under_autocast, model, x)
    compiled = held(under_autocast, torch.compile(model, fullgraph=True), x)
    states = L * (2 if bidirectional else 1)
    rounding = 1024 * states + 512 * 8  # of the reserve (ops/schemas.py), and of each allocation to 512 bytes
    assert compiled <= eager + rounding, f"{compiled / 2**20:.2f} MiB; eagerly {eager / 2**20:.2f} MiB"
    assert eager > T * B * H * dtype.itemsize  # or it was not measured
    torch._dynamo.reset()
    with torch_gru_fuse.enable(recompute=True):
        recomputed = held(under_autocast, torch.compile(model, fullgraph=True), x)
    assert recomputed <= eager / 2
