"""Plans are values: pure, hashable, with a reason, made without Triton and without a GPU."""

import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from torch_gru_fuse.planner.plan import plan_gru, plan_gru_cell
from torch_gru_fuse.planner.tiles import Tile

FLAGS = {"tf32_allowed": True, "training": False, "cudnn": True}


def gru(T=512, B=10, I=128, H=256, L=6, D=1, dtype="torch.float32", **flags):
    return plan_gru(T, B, I, H, L, D, dtype, **{**FLAGS, **flags})


@pytest.fixture
def choose(monkeypatch):
    return lambda value: monkeypatch.setenv("TORCH_GRU_FUSE_KERNELS", value)


def test_cudnn_runs_where_it_was_measured_to_be_faster():
    for plan in (gru(), gru(training=True), gru(T=1, B=1, H=512, L=2)):
        assert plan.kernel == "torch" and "faster" in plan.reason


def test_kernels_train_large_batches():
    assert gru(T=128, B=1024, I=256, L=1, training=True).kernel == "step"
    assert gru(T=128, B=1024, I=256, L=1, training=True, tf32_allowed=False).kernel == "torch"  # FMA products are slow
    assert gru(T=128, B=1024, H=1024, L=1, training=True).kernel == "torch"
    assert gru(T=128, B=512, I=256, L=1, training=True).kernel == "torch"  # not measured


def test_kernels_run_where_cudnn_does_not():
    plan = gru(cudnn=False)
    assert plan.kernel == "step" and plan.reason == "cuDNN is switched off"


def test_reason_of_an_unsupported_call_is_kept():
    assert gru(unsupported="no kernels for it") == gru(unsupported="no kernels for it", training=True)
    assert gru(unsupported="no kernels for it").reason == "no kernels for it"
    plan = plan_gru_cell(1, 2, 3, "torch.float64", tf32_allowed=True, training=True, unsupported="no kernels for it")
    assert (plan.kernel, plan.reason) == ("torch", "no kernels for it")


def test_choice_of_the_user(choose):
    choose("triton")
    assert gru().kernel == "step" and gru(training=True).kernel == "step"
    assert cell(tf32_allowed=False).kernel == "cell"
    choose("torch")
    assert gru(T=128, B=1024, I=256, L=1, training=True).kernel == "torch"
    assert cell(dtype="torch.float16").kernel == "torch"
    choose("fast")
    with pytest.raises(ValueError, match="TORCH_GRU_FUSE_KERNELS is 'fast', expected one of 'auto', 'triton', 'torch'"):
        gru()


def cell(B=10, I=128, H=256, dtype="torch.float32", tf32_allowed=True, training=False):
    return plan_gru_cell(B, I, H, dtype, tf32_allowed=tf32_allowed, training=training)


def test_cell():
    assert cell(dtype="torch.float16").kernel == "cell"
    assert cell().kernel == "cell" and cell().tf32
    plan = cell(tf32_allowed=False)
    assert plan.kernel == "gates" and not plan.tf32 and "cuBLAS" in plan.reason


@pytest.mark.parametrize("hidden, tf32", [(64, False), (128, False), (129, True), (256, True)])
def test_tf32_only_where_cudnn_uses_it(choose, hidden, tf32):
    choose("triton")
    assert gru(H=hidden).tf32 == tf32
    assert not gru(H=hidden, tf32_allowed=False).tf32
    assert not gru(H=hidden, dtype="torch.float16").tf32


def test_plans_are_values(choose):
    choose("triton")
    plan = gru()
    assert plan == gru() and hash(plan) == hash(gru()) and isinstance(plan.tile, Tile)
    with pytest.raises(FrozenInstanceError):
        plan.kernel = "torch"


def test_planner_imports_neither_torch_nor_triton():
    # Loaded by path: importing the package imports torch.
    code = """
import importlib, sys, types
package = types.ModuleType("torch_gru_fuse")
package.__path__ = [sys.argv[1]]
sys.modules["torch_gru_fuse"] = package
plan = importlib.import_module("torch_gru_fuse.planner.plan")
plan.plan_gru(5, 3, 4, 6, 2, 1, "torch.float32", tf32_allowed=True, training=True, cudnn=True)
print(sorted({"torch", "triton"} & set(sys.modules)))
"""
    folder = Path(__file__).parents[1] / "torch_gru_fuse"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
