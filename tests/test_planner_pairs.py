"""Which pairs run in one launch, by sizes and GPU."""

import pytest

from torch_gru_fuse.planner import plan as planner
from torch_gru_fuse.planner.gpus import GPUS, gpu_named
from torch_gru_fuse.planner.plan import Plan, plan_gru, plan_gru_pair
from torch_gru_fuse.planner.whole_sequence import StagedPlan


def plan(T, B, H, dtype="float16", *, gpu="h200", training=False, tf32=True):
    return plan_gru_pair(
        T, B, H, f"torch.{dtype}", tf32_allowed=tf32, training=training, cudnn=True, gpu=gpu and gpu_named(gpu)
    )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("gpu", ["rtx4090", "h200"])
@pytest.mark.parametrize(
    "T, B, H, kernel", [(512, 10, 256, "wavefront"), (200, 64, 64, "resident"), (256, 16, 512, "wavefront")]
)
def test_where_both_fit_beside_each_other(T, B, H, kernel, gpu, dtype, training):
    found = plan(T, B, H, dtype, gpu=gpu, training=training)
    assert isinstance(found, Plan) and found.kernel == "whole" and found.whole.lanes == 2
    assert found.whole.kernel.name == kernel and (found.backward is not None) == training
    assert found.tf32 == (dtype == "float32")


REFUSED = {
    "the GPU is full with one": (dict(T=128, B=1024, H=256), "not expected to be faster"),
    "in training, too": (dict(T=128, B=256, H=256, training=True), "not expected to be faster"),
    "cuDNN is faster than one": (dict(T=2, B=8, H=64), "each by itself does not run whole sequences in one launch: cuDNN"),
    "padding": (dict(T=100, B=8, H=200), "H = 200 is no multiple of 16"),
    "float32 without TF32": (dict(T=100, B=8, H=256, dtype="float32", tf32=False), "need TF32"),
    "float64": (dict(T=100, B=8, H=256, dtype="float64"), "no kernels for torch.float64"),
    "no GPU": (dict(T=100, B=8, H=256, gpu=None), "no GPU for whole sequences"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_why_not(why):
    sizes, reason = REFUSED[why]
    found = plan(**sizes)
    assert isinstance(found, str) and reason in found


@pytest.mark.parametrize("choice", ["step", "torch"])
def test_not_where_whole_sequences_are_switched_off(monkeypatch, choice):
    monkeypatch.setenv("TORCH_GRU_FUSE_KERNELS", choice)
    assert choice in plan(512, 10, 256)


def test_asked_for(monkeypatch):
    """Wherever both fit the GPU, faster or not."""
    monkeypatch.setenv("TORCH_GRU_FUSE_KERNELS", "triton")
    for training in (False, True):
        found = plan(128, 256, 256, training=training)
        assert isinstance(found.whole.kernel, StagedPlan)


@pytest.mark.parametrize("gpu", GPUS)
def test_of_any_size(gpu):
    """A pair is planned only where one of its layers is, for half of its programs, and never crosses in a ring."""
    for dtype in ("float32", "float16"):
        for B in (1, 8, 30, 200, 1000, 4096):
            for H in (16, 48, 64, 128, 256, 304, 512, 1024, 2048):
                found = plan(100, B, H, dtype, gpu=gpu)
                if isinstance(found, str):
                    continue
                single = plan_gru(
                    100, B, H, H, 1, 1, f"torch.{dtype}", tf32_allowed=True, training=False, cudnn=True, gpu=gpu_named(gpu)
                )
                assert single.kernel == "whole" and not getattr(found.whole.kernel, "ring", False)
                if found.whole.waits(reverse=True):
                    sms = gpu_named(gpu).multiprocessors
                    assert found.whole.programs(B, H) <= sms * found.whole.programs_per_sm


def test_the_threshold_is_one_number(monkeypatch):
    planner._plan_gru_pair.cache_clear()
    monkeypatch.setattr(planner, "_PAIR_PAYS_UP_TO", 0.1)
    assert isinstance(plan(512, 10, 256), str)
    planner._plan_gru_pair.cache_clear()
    monkeypatch.undo()
    assert isinstance(plan(512, 10, 256), Plan)
