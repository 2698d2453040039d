"""Plans are values: pure, hashable, with a reason, made without Triton and without a GPU."""

import json
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from torch_gru_fuse.planner import plan as plan_module
from torch_gru_fuse.planner.gpus import GPUS, gpu_named
from torch_gru_fuse.planner.plan import plan_gru, plan_gru_cell, plan_gru_packed, uses_tf32, whole_sequence_is_faster
from torch_gru_fuse.planner.projection import projection_tile
from torch_gru_fuse.planner.tiles import Tile
from torch_gru_fuse.planner.whole_sequence import WholeSequencePlan

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
    for value in ("triton", "step"):
        choose(value)
        assert gru().kernel == "step" and gru(training=True).kernel == "step"
        assert cell(tf32_allowed=False).kernel == "cell"
    choose("torch")
    assert gru(T=128, B=1024, I=256, L=1, training=True).kernel == "torch"
    assert gru(gpu=H200).kernel == "torch"
    assert cell(dtype="torch.float16").kernel == "torch"
    choose("fast")
    with pytest.raises(ValueError, match="TORCH_GRU_FUSE_KERNELS is 'fast', expected one of 'auto', 'triton', 'step', 'torch'"):
        gru()


def cell(B=10, I=128, H=256, dtype="torch.float32", tf32_allowed=True, training=False):
    return plan_gru_cell(B, I, H, dtype, tf32_allowed=tf32_allowed, training=training)


def test_cell():
    assert cell(dtype="torch.float16").kernel == "cell"
    assert cell().kernel == "cell" and cell().tf32
    plan = cell(tf32_allowed=False)
    assert plan.kernel == "gates" and not plan.tf32 and "cuBLAS" in plan.reason


# ---- whole sequences ----------------------------------------------------------------------------------------------------

H200 = GPUS["h200"]


def test_whole_sequences_where_they_were_measured_to_be_faster():
    for dtype in ("torch.float32", "torch.float16", "torch.bfloat16"):
        plan = gru(dtype=dtype, gpu=H200)
        assert plan.kernel == "whole" and isinstance(plan.whole, WholeSequencePlan) and "faster" in plan.reason
        assert plan.whole.lanes == 6 and plan.tf32 == (dtype == "torch.float32")
        assert gru(D=2, dtype=dtype, gpu=H200).whole.lanes == 2
        for few in (1, 2, 3):
            assert gru(T=few, dtype=dtype, gpu=H200).kernel == "torch"
    # padded copies of the parameters
    assert gru(H=250, dtype="torch.float16", gpu=H200).kernel == "whole"
    assert gru(H=100, dtype="torch.float16", gpu=H200).kernel == "torch"
    assert gru(T=32, H=250, dtype="torch.float16", gpu=H200).kernel == "whole"
    assert gru(T=32, H=250, dtype="torch.float16", gpu=H200, captured=False).kernel == "torch"


def test_training_takes_a_plan_for_the_backward(choose):
    for options in ({}, {"D": 2}, {"T": 128, "B": 1024, "I": 256, "L": 1}, {"T": 200, "B": 128, "I": 128, "H": 128, "L": 1}):
        plan = gru(gpu=H200, training=True, **options)
        assert plan.kernel == "whole" and plan.backward is not None and plan.backward_tile is not None
        assert gru(gpu=H200, **options).backward is None
    assert gru(T=4, gpu=H200, training=True).kernel == "whole"
    assert gru(T=3, gpu=H200, training=True).kernel == "torch"  # not measured
    assert gru(H=250, gpu=H200, training=True).kernel == "torch"  # no plan for padded units
    assert gru(T=64, B=16, I=1024, H=4096, L=1, gpu=H200, training=True).kernel == "step"
    choose("step")
    assert gru(gpu=H200, training=True).backward is None


def test_masks_come_between_the_layers(choose):
    choose("triton")
    with_masks, without = (gru(dtype="torch.float16", gpu=H200, dropout=dropout).whole for dropout in (True, False))
    assert with_masks == without and without.lanes > 1
    assert gru(dtype="torch.float16", gpu=H200, dropout=True, D=2).whole.lanes == 2


@pytest.mark.parametrize("value, kernel", [("triton", "whole"), ("step", "step"), ("torch", "torch"), ("auto", "whole")])
def test_choice_of_the_user_with_whole_sequences(choose, value, kernel):
    choose(value)
    assert gru(dtype="torch.float16", gpu=H200).kernel == kernel
    assert gru(dtype="torch.float16", gpu=H200, cudnn=False).kernel == ("step" if value in ("step", "torch") else "whole")


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"gpu": None}, "no GPU"),
        ({"tf32_allowed": False}, "need TF32"),
        ({"dtype": "torch.float32", "H": 8}, "need TF32"),
        ({"gpu": replace(H200, capability=(7, 5))}, "compute capability 7.5"),
        ({"B": 10**6, "H": 2048, "dtype": "torch.float16"}, "32-bit offsets"),
        ({"H": 8192, "B": 64, "dtype": "torch.float16"}, "H = 8192"),
        ({"T": 2}, "as far as was measured"),
    ],
)
def test_why_no_whole_sequences(choose, options, reason):
    plan = gru(**{"gpu": H200, **options})
    assert plan.kernel == "torch" and reason in plan.reason
    choose("triton")
    assert gru(**{"gpu": H200, **options}).kernel == ("whole" if "T" in options else "step")


def test_one_time_step_streams(choose):
    """One launch a layer, in exact float32 also where TF32 is allowed."""
    for dtype in ("torch.float32", "torch.float16"):
        plan = gru(T=1, B=1, I=512, H=512, L=2, dtype=dtype, gpu=H200)
        assert plan.kernel == "stream" and plan.stream is not None and not plan.tf32
        assert gru(T=1, B=1, I=512, H=512, L=2, dtype=dtype, gpu=H200, training=True).kernel != "stream"
        assert gru(T=1, B=1, I=512, H=512, L=2, D=2, dtype=dtype, gpu=H200).kernel != "stream"
    choose("step")
    assert gru(T=1, B=1, I=512, H=512, L=2, dtype="torch.float16", gpu=H200).kernel == "step"


def test_one_small_layer_called_by_itself():
    """cuDNN has one kernel for it, and fewer calls to make than three; a CUDA graph makes them for nothing."""
    two, three, long = (
        dict(T=T, B=B, I=I, H=64, L=1, dtype="torch.float16", gpu=H200) for T, B, I in ((4, 8, 64), (64, 64, 1), (200, 64, 1))
    )
    assert gru(**two).kernel == gru(**two, captured=False).kernel == "whole"
    assert gru(**three).kernel == "whole" and gru(**three, captured=False).kernel == "torch"
    assert gru(**long, captured=False).kernel == "whole"
    assert gru(**{**three, "L": 2}, captured=False).kernel == "whole"


def test_who_makes_the_input_projection():
    """Few rows: the launch that prepares; many: PyTorch, whose product is the faster one."""
    for element_bytes in (2, 4):
        for inputs, most in ((64, 32768), (256, 2048), (1024, 32), (33, 2048), (250, 256)):
            assert projection_tile(most, inputs, element_bytes) is not None
        for inputs, more in ((64, 32769), (128, 2049), (1024, 129), (33, 2049), (250, 257), (1025, 1), (257, 1)):
            assert projection_tile(more, inputs, element_bytes) is None
    assert projection_tile(128, 1024, 2) is not None and projection_tile(128, 1024, 4) is None


@pytest.mark.parametrize(("dtype", "block_k"), [("torch.float32", 64), ("torch.float16", 128)])
def test_weights_larger_than_l2_take_a_launch_a_step(dtype, block_k):
    plan = gru(T=64, B=16, I=1024, H=4096, L=1, dtype=dtype, gpu=H200)
    assert plan.kernel == "step" and plan.tile.block_k == block_k and plan.tile.num_stages == 5
    small = gru(T=64, B=16, I=1024, H=4096, L=1, dtype=dtype, gpu=GPUS["rtx4090"]).tile
    assert small.block_k == block_k and small.num_stages == 4
    assert gru(T=64, B=16, I=1024, H=4096, L=1, dtype=dtype, gpu=H200, training=True).backward_tile.num_stages == 8


def test_thresholds_are_in_one_place(choose, monkeypatch):
    """The planner asks these two functions and no one else."""
    plan_module._plan_gru.cache_clear()
    monkeypatch.setattr(plan_module, "whole_sequence_is_faster", lambda *sizes, training, **_: training)
    monkeypatch.setattr(plan_module, "uses_tf32", lambda T, B, H, *, training: True)
    assert gru(gpu=H200).kernel == "torch" and gru(gpu=H200, training=True).kernel == "whole"
    assert gru(H=64, gpu=H200, training=True).tf32
    plan_module._plan_gru.cache_clear()
    assert not uses_tf32(200, 64, 64, training=False) or uses_tf32(200, 64, 256, training=False)
    plan = gru(gpu=H200, training=True).whole
    assert whole_sequence_is_faster(plan, 512, 10, 256, 6, 1, 2, training=False)


@pytest.mark.parametrize("hidden, tf32", [(3, False), (8, False), (16, True), (18, True), (64, True), (256, True)])
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


# ---- packed sequences ---------------------------------------------------------------------------------------------------


def packed(T=512, B=32, H=256, L=2, D=1, dtype="torch.float16", **options):
    options = {"tf32_allowed": True, "training": False, "gpu": gpu_named("h100")} | options
    return plan_gru_packed(T, B, 64, H, L, D, dtype, **options)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", ["torch.float16", "torch.bfloat16", "torch.float32"])
@pytest.mark.parametrize(
    "sizes", [{}, {"B": 64, "H": 128, "D": 2}, {"B": 10, "L": 6}, {"B": 64, "H": 64}, {"B": 1}, {"B": 256}], ids=str
)
def test_packed_sequences_run_in_one_launch(sizes, dtype, training, choose):
    chosen = packed(**sizes, dtype=dtype, training=training)
    assert chosen.kernel == "whole" and "faster than cuDNN" in chosen.reason and (chosen.backward is not None) == training
    # all lengths have one plan, by whose identity launches are found
    longer = packed(**sizes, dtype=dtype, training=training, T=700)
    assert longer.whole is chosen.whole and longer.backward is chosen.backward
    short = packed(**sizes, dtype=dtype, training=training, T=16)
    assert short.kernel == "torch" and "cuDNN is faster" in short.reason
    choose("triton")
    chosen = packed(**sizes, dtype=dtype, training=training, T=16)
    assert chosen.kernel == "whole" and chosen.reason == "asked for" and chosen.whole is longer.whole


def test_no_packed_sequences_that_were_measured_to_be_slower_are_taken():
    """What the op takes by itself is faster than cuDNN, on the GPU and from call to call."""
    measured = json.loads((Path(__file__).parents[1] / "docs/results/packed-sweep-h200.json").read_text())
    rows = [dict(zip(measured["columns"], row, strict=True)) for row in measured["rows"]]
    ratios = []
    for row in rows:
        sizes = {name: row[name] for name in "TBH"} | {"L": row["layers"], "D": row["directions"]}
        options = {"dtype": f"torch.{row['dtype']}", "training": row["training"], "gpu": gpu_named("h200")}
        if packed(**sizes, **options).kernel == "whole":
            ratios.append((row["cudnn_gpu_ms"] / row["gpu_ms"], row["cudnn_wall_ms"] / row["wall_ms"]))
    assert len(ratios) > len(rows) / 3
    gpu, wall = zip(*ratios, strict=True)
    assert min(gpu) > 1 and min(wall) > 1


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"unsupported": "the kernels need a CUDA device"}, "need a CUDA device"),
        ({"H": 100}, "H = 100: packed sequences need a multiple of 16"),
        ({"dtype": "torch.float32", "tf32_allowed": False}, "need TF32"),
        ({"gpu": None}, "no GPU"),
        ({"B": 4096, "H": 2048}, "weights do not fit"),
    ],
)
def test_why_packed_sequences_stay_with_cudnn(options, reason, choose):
    choose("triton")
    chosen = packed(**options)
    assert chosen.kernel == "torch" and re.search(reason, chosen.reason)


def test_settings_decide_for_packed_sequences(choose):
    for value, kernel in (("triton", "whole"), ("torch", "torch"), ("step", "torch"), ("auto", "torch")):
        choose(value)
        assert packed(T=4).kernel == kernel
