"""python -m torch_gru_fuse plan, and what it rests on: descriptions of GPUs, the prediction, a planner without torch."""

import json
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from torch_gru_fuse.__main__ import main
from torch_gru_fuse.planner import plan as planner_plan
from torch_gru_fuse.planner.gpus import GPU, GPUS, gpu_named
from torch_gru_fuse.planner.plan import plan_gru, whole_sequence_is_faster
from torch_gru_fuse.planner.whole_sequence import plan_whole_sequence, predict, why_no_plan, why_not_gpu

ROOT = Path(__file__).parents[1]
KEYS = (
    "kernel", "grid", "num_programs", "num_warps", "registers", "spills", "shared_bytes", "resident_per_sm", "predicted_us",
    "reason",
)  # fmt: skip
COMPILED = ("registers", "spills", "shared_bytes", "resident_per_sm")
KB39 = ("--gpu", "rtx4090", "--T", "512", "--B", "10", "--I", "128", "--H", "256", "--layers", "6")


@pytest.fixture
def plan(capsys):
    """Runs the command: (exit status, stdout, stderr)."""

    def call(*arguments):
        try:
            status = main(["plan", *arguments])
        except SystemExit as exit_:
            status = exit_.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def plan_json(plan):
    def call(*arguments):
        status, out, err = plan(*arguments, "--json")
        assert (status, err) == (0, "")
        return json.loads(out)

    return call


# ---- the command --------------------------------------------------------------------------------------------------------


def test_text_in_a_process_of_its_own():
    done = subprocess.run(
        [sys.executable, "-m", "torch_gru_fuse", "plan", *KB39, "--dtype", "float16"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[:3] == [
        "GRU: T=512, B=10, I=128, H=256, 6 layers, float16",
        "GPU: NVIDIA GeForce RTX 4090, sm_89, 128 multiprocessors",
        "",
    ]
    assert lines[3:5] == ["kernel        wavefront", "grid          192 programs of 4 warps"]
    assert re.fullmatch(r"predicted     \d+ us \(a model, not a measurement\)", lines[5]) and lines[6] == ""


def test_json(plan_json):
    report = plan_json(*KB39, "--dtype", "float16")
    assert tuple(report) == KEYS
    assert (report["kernel"], report["grid"], report["num_programs"], report["num_warps"]) == ("wavefront", [192], 192, 4)
    assert [report[key] for key in COMPILED] == [None] * 4
    assert 100 < report["predicted_us"] < 2000


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_reason_says_what_the_ops_run_and_that_nothing_was_measured(plan_json, dtype):
    reason = plan_json(*KB39, "--dtype", dtype)["reason"]
    assert "Predicted, not measured" in reason and "on an H200" in reason and "not corrected for another GPU" in reason
    assert reason.endswith("The ops run this plan (whole sequences in one launch: faster than cuDNN).")
    assert ("TF32" in reason) == (dtype == "float32")


def test_no_correction_is_missing_on_the_gpu_that_was_measured(plan_json):
    for sizes in (("--H", "256", "--B", "10"), ("--H", "512", "--B", "256")):
        reason = plan_json("--gpu", "h200", "--T", "9", "--I", "7", *sizes)["reason"]
        assert "on an H200" in reason and "not corrected" not in reason


def test_tf32_where_the_ops_do_without_is_said(plan_json, monkeypatch):
    monkeypatch.setattr(planner_plan, "uses_tf32", lambda *args, **kwargs: False)
    planner_plan._plan_gru.cache_clear()
    reason = plan_json("--gpu", "rtx4090", "--T", "200", "--B", "64", "--I", "64", "--H", "64")["reason"]
    planner_plan._plan_gru.cache_clear()
    assert "Its float32 products use TF32; the ops, as cuDNN, do not for these sizes." in reason
    assert "The ops run PyTorch's own GRU" in reason


@pytest.mark.parametrize(
    "choice, runs",
    [
        ("triton", "The ops run this plan (asked for)."),
        ("step", "The ops run the step kernel, one launch a time step and layer, a tile of"),
        ("torch", "The ops run PyTorch's own GRU, cuDNN on this GPU (asked for)."),
    ],
)
def test_choice_of_the_user_is_what_the_ops_run(plan_json, monkeypatch, choice, runs):
    monkeypatch.setenv("TORCH_GRU_FUSE_KERNELS", choice)
    report = plan_json(*KB39)
    assert runs in report["reason"] and report["reason"].endswith("(asked for).")
    assert report["kernel"] == "wavefront"


def test_a_choice_that_is_none(plan, monkeypatch):
    monkeypatch.setenv("TORCH_GRU_FUSE_KERNELS", "fast")
    status, out, err = plan(*KB39)
    assert (status, out) == (2, "")
    assert err.startswith("torch_gru_fuse plan: TORCH_GRU_FUSE_KERNELS is 'fast', expected one of 'auto', 'triton', ")


def test_prediction_grows_with_steps_and_layers(plan_json):
    def us(*changes):
        return plan_json(*KB39, "--dtype", "float16", *changes)["predicted_us"]

    assert us("--T", "1024") == pytest.approx(2 * us(), rel=0.02)
    for sizes in (("--H", "1024", "--B", "64"), ("--H", "256", "--B", "10", "--bidirectional")):
        assert us(*sizes, "--layers", "3") == pytest.approx(3 * us(*sizes, "--layers", "1"), abs=0.3)


@pytest.mark.parametrize(
    "arguments, launches",
    [
        (("--H", "256", "--B", "10", "--layers", "6"), "all 6 layers at once, one step behind each other, 1 launch."),
        (("--H", "256", "--B", "10", "--layers", "6", "--bidirectional"), "both directions of a layer at once, 6 launches."),
        (("--H", "512", "--B", "256", "--layers", "3"), "one layer at a time, 3 launches."),
        (("--H", "64", "--B", "4096"), "one layer at a time, 1 launch."),
    ],
)
def test_launches(plan_json, arguments, launches):
    reason = plan_json("--gpu", "rtx4090", "--T", "9", "--I", "7", "--dtype", "float16", *arguments)["reason"]
    assert launches in reason


@pytest.mark.parametrize(
    "gpu, hidden, batch", [("rtx4090", 4096, 1), ("rtx4090", 1024, 4096), ("l4", 2048, 64)], ids=["H", "B", "GPU"]
)
def test_no_plan_says_why_and_what_runs_instead(plan_json, plan, gpu, hidden, batch):
    limits = dict(multiprocessors=GPUS[gpu].multiprocessors, shared_bytes=GPUS[gpu].shared_bytes_per_program)
    why = why_no_plan(batch, hidden, 1, 2, reverse=False, **limits)
    assert f"H = {hidden}" in why
    arguments = ("--gpu", gpu, "--T", "9", "--B", str(batch), "--I", "7", "--H", str(hidden), "--dtype", "float16")
    for extra in ((), ("--compile",)):
        report = plan_json(*arguments, *extra)
        assert tuple(report) == KEYS
        assert [report[key] for key in KEYS[:-1]] == [None] * 9
        assert report["reason"].startswith(f"No whole-sequence kernel is planned: {why}. The ops run PyTorch's own GRU")
    status, out, _ = plan(*arguments)
    assert status == 0 and f"No whole-sequence kernel is planned: {why}.\nThe ops run" in out


@pytest.mark.parametrize("hidden, batch", [(1024, 64), (512, 256)])
def test_shared_memory_and_multiprocessors_of_the_gpu_are_planned_for(plan_json, hidden, batch):
    """The plan of each GPU is that for its own limits."""
    for name, gpu in GPUS.items():
        report = plan_json("--gpu", name, "--T", "9", "--B", str(batch), "--I", "7", "--H", str(hidden))
        limits = dict(multiprocessors=gpu.multiprocessors, shared_bytes=gpu.shared_bytes_per_program)
        planned = plan_whole_sequence(batch, hidden, 1, 4, reverse=False, **limits)
        programs = None if planned is None else planned.programs(batch, hidden)
        assert report["num_programs"] == programs
        assert programs is None or programs <= gpu.multiprocessors * planned.programs_per_sm


@pytest.mark.parametrize(
    "gpu, arguments, kernel",
    [
        ("rtx4090", ("--H", "256", "--B", "10", "--layers", "6", "--dtype", "float16"), "wavefront"),
        ("rtx4090", ("--H", "60", "--B", "20", "--bidirectional"), "resident"),
        ("h200", ("--H", "256", "--B", "10", "--layers", "6"), "wavefront"),
        ("rtx5090", ("--H", "256", "--B", "10", "--dtype", "bfloat16"), "wavefront"),
        ("rtx4090", ("--H", "256", "--B", "1024", "--dtype", "float16"), "staged"),
    ],
)
def test_compile(plan_json, gpu, arguments, kernel):
    report = plan_json("--gpu", gpu, "--T", "20", "--I", "7", "--compile", *arguments)
    assert tuple(report) == KEYS and report["kernel"] == kernel
    assert 32 <= report["registers"] <= 255
    assert report["spills"] == 0
    assert 0 < report["shared_bytes"] <= gpu_named(gpu).shared_bytes_per_program
    assert report["resident_per_sm"] >= 1
    assert "As compiled" not in report["reason"]


def test_compile_in_text(plan):
    status, out, _ = plan(*KB39, "--dtype", "float16", "--compile")
    assert status == 0
    assert re.search(r"^registers     \d+ a thread, 0 bytes spilled$", out, re.MULTILINE)
    assert re.search(r"^shared memory \d+ bytes a program$", out, re.MULTILINE)
    assert re.search(r"^resident      \d+ programs a multiprocessor$", out, re.MULTILINE)


def test_spills_and_a_grid_that_does_not_fit_are_said(plan_json, monkeypatch):
    from torch_gru_fuse.kernels import aot

    what = {"registers": 255, "stack_bytes": 8, "spill_bytes": 8, "shared_bytes": 1024, "ptx": "", "cubin": b""}
    monkeypatch.setattr(aot, "compile_whole_sequence", lambda *args, **kwargs: aot.Resources(**what))
    assert "As compiled here it spills 8 bytes a thread" in plan_json(*KB39, "--compile")["reason"]
    what.update(stack_bytes=0, spill_bytes=0, shared_bytes=200 * 1024)
    for sizes in (KB39, (*KB39, "--H", "64", "--bidirectional")):  # one that waits, one that does not
        report = plan_json(*sizes, "--dtype", "float16", "--compile")
        assert report["resident_per_sm"] == 0
        assert "As compiled here not even one program fits a multiprocessor: it cannot be launched." in report["reason"]
    what.update(shared_bytes=60 * 1024)  # one program a multiprocessor
    report = plan_json(*KB39, "--dtype", "float16", "--compile")
    assert report["resident_per_sm"] == 1
    assert "As compiled here its 192 programs are not all on the GPU at once: it cannot be launched." in report["reason"]


@pytest.mark.parametrize(
    "change, message",
    [
        (("--gpu", "voodoo2"), f"--gpu: GPU 'voodoo2' is not known, expected one of {', '.join(GPUS)}, or cuda, cuda:1"),
        (("--H", "0"), "argument --H: '0', expected an integer of at least 1"),
        (("--B", "-1"), "argument --B: '-1', expected an integer of at least 1"),
        (("--T", "many"), "argument --T: 'many', expected an integer of at least 1"),
        (("--dtype", "float64"), "argument --dtype: invalid choice: 'float64'"),
    ],
)
def test_errors_name_the_argument(plan, change, message):
    status, out, err = plan(*KB39, *change)
    assert (status, out) == (2, "")
    assert message in err


# ---- the GPU at hand ----------------------------------------------------------------------------------------------------


@pytest.fixture
def two_gpus(monkeypatch):
    """As far as the command can see."""
    import torch

    from torch_gru_fuse.ops import support

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(support, "gpu_of", lambda index: (GPUS["rtx4090"], GPUS["l4"])[index])


@pytest.mark.parametrize(
    "gpu, name",
    [((), "RTX 4090"), (("--gpu", "cuda"), "RTX 4090"), (("--gpu", "cuda:1"), "NVIDIA L4"), (("--gpu", "h200"), "NVIDIA H200")],
)
def test_gpu_at_hand(plan, two_gpus, gpu, name):
    status, out, _ = plan(*KB39[2:], *gpu)
    assert status == 0 and name in out.splitlines()[1]


@pytest.mark.parametrize("gpu", ["cuda:2", "cuda:x"])
def test_gpu_that_is_not_there(plan, two_gpus, gpu):
    assert plan(*KB39, "--gpu", gpu) == (2, "", f"torch_gru_fuse plan: --gpu is {gpu}, expected cuda:0 to cuda:1.\n")


@pytest.mark.parametrize("gpu, asked", [((), "--gpu was not given"), (("--gpu", "cuda"), "--gpu is cuda")])
def test_no_gpu_at_hand(plan, monkeypatch, gpu, asked):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = plan(*KB39[2:], *gpu)
    assert (status, out) == (2, "")
    assert err == f"torch_gru_fuse plan: {asked}, but torch sees no CUDA device; expected one of {', '.join(GPUS)}.\n"


# ---- GPUs ---------------------------------------------------------------------------------------------------------------


def test_gpus_by_name():
    assert gpu_named("RTX 4090") == gpu_named("rtx-4090") == GPUS["rtx4090"]
    gpu = GPUS["rtx4090"]
    assert (gpu.capability, gpu.multiprocessors, gpu.registers_per_sm) == ((8, 9), 128, 65536)
    assert (gpu.shared_bytes_per_sm, gpu.shared_bytes_per_program) == (102400, 101376)
    assert (gpu.l2_bytes, gpu.memory_bytes_per_s) == (72 * 2**20, 1008e9)
    with pytest.raises(FrozenInstanceError):
        gpu.multiprocessors = 1
    with pytest.raises(ValueError, match="GPU 'gtx1080' is not known, expected one of rtx4090, rtx3090, l4, a100"):
        gpu_named("gtx1080")


PROPERTIES = dict(
    name="NVIDIA GeForce RTX 4090", major=8, minor=9, multi_processor_count=128, regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=1536, shared_memory_per_multiprocessor=102400, shared_memory_per_block_optin=101376,
    L2_cache_size=75497472,
)  # fmt: skip


def test_gpu_from_the_properties_of_a_device():
    clock = dict(memory_clock_rate=10_501_000, memory_bus_width=384)
    gpu = GPU.from_properties(**PROPERTIES, **clock)
    assert gpu.memory_bytes_per_s == pytest.approx(1008e9, rel=1e-3)
    assert replace(gpu, memory_bytes_per_s=1008e9) == GPUS["rtx4090"]
    assert GPU.from_properties(**PROPERTIES).memory_bytes_per_s is None
    with pytest.raises(ValueError, match="multiprocessors of a GPU is 0, expected a positive number"):
        GPU.from_properties(**{**PROPERTIES, "multi_processor_count": 0})


def test_properties_are_those_that_torch_has():
    import torch

    has = getattr(torch._C, "_CudaDeviceProperties", None)
    if has is None:
        pytest.skip("torch was built without CUDA")
    for name in (*PROPERTIES, "memory_clock_rate", "memory_bus_width"):
        assert hasattr(has, name), name


@pytest.mark.parametrize(
    "registers, warps, shared, programs",
    [
        (255, 8, 0, 1),  # 256 registers of 256 threads: all of them
        (200, 4, 16384, 2),  # registers
        (32, 16, 0, 3),  # 48 warps
        (32, 4, 49 * 1024, 2),  # 100 KB of shared memory, 1 KB of each program the system's
        (32, 4, 50 * 1024, 1),
        (32, 4, 99 * 1024, 1),
        (32, 4, 99 * 1024 + 1, 0),
        (32, 1, 0, 16),
    ],
)
def test_programs_of_a_multiprocessor(registers, warps, shared, programs):
    assert GPUS["rtx4090"].resident_programs(registers, warps, shared) == programs


def test_gpus_that_plans_do_not_fit():
    assert all(why_not_gpu(gpu) is None for gpu in GPUS.values())
    gpu = replace(GPUS["rtx4090"], name="some GPU")
    assert "compute capability 7.5" in why_not_gpu(replace(gpu, capability=(7, 5)))
    assert "32768 registers" in why_not_gpu(replace(gpu, registers_per_sm=32768))
    assert "65536 bytes of shared memory" in why_not_gpu(replace(gpu, shared_bytes_per_program=65536))


# ---- prediction ---------------------------------------------------------------------------------------------------------


SWEEP = json.loads((ROOT / "docs" / "results" / "sweep-h200.json").read_text())
H200 = GPUS["h200"]


def sweep_rows(**wanted):
    """Rows of the recorded sweep, each with the plan of today for its sizes on an H200."""
    for values in SWEEP["rows"]:
        row = dict(zip(SWEEP["columns"], values, strict=True))
        if any(row[name] != value for name, value in wanted.items()):
            continue
        reverse = row["directions"] == 2
        element_bytes = 4 if row["dtype"] == "float32" else 2
        plan = plan_whole_sequence(
            row["B"], row["H"], 2 if reverse else row["layers"], element_bytes, reverse=reverse,
            multiprocessors=H200.multiprocessors, shared_bytes=H200.shared_bytes_per_program,
        )  # fmt: skip
        yield row, plan, element_bytes, reverse


def test_predictions_are_near_what_was_measured():
    ratios = []
    for row, plan, element_bytes, reverse in sweep_rows(T=100):
        made = predict(
            plan, steps=100, batch=row["B"], hidden=row["H"], layers=row["layers"], element_bytes=element_bytes,
            reverse=reverse, multiprocessors=H200.multiprocessors,
        )  # fmt: skip
        ratios.append(made.us / (1e3 * row["ms"]))
    assert len(ratios) > 200
    assert min(ratios) > 0.2 and max(ratios) < 2  # the product, which a prediction leaves out, is much of a small GRU
    assert 0.7 < sorted(ratios)[len(ratios) // 2] < 1.1


def test_nothing_is_planned_that_was_measured_to_be_slower_than_cudnn():
    """Each shape of the sweep, as the ops would decide; 3% is the spread of two runs."""
    chosen = [
        row["ratio"]
        for row, plan, element_bytes, _ in sweep_rows()
        if whole_sequence_is_faster(
            plan, row["T"], row["B"], row["H"], row["layers"], row["directions"], element_bytes, training=False
        )
    ]
    assert len(chosen) > 700 and min(chosen) > 0.97


def test_nothing_trains_in_one_launch_that_was_measured_to_be_slower_than_cudnn():
    recorded = json.loads((ROOT / "docs" / "results" / "sweep-train-h100.json").read_text())
    chosen = []
    for values in recorded["rows"]:
        row = dict(zip(recorded["columns"], values, strict=True))
        plan = plan_gru(
            row["T"], row["B"], row["H"], row["H"], row["layers"], row["directions"], f"torch.{row['dtype']}",
            tf32_allowed=True, training=True, cudnn=True, gpu=GPUS["h100"],
        )  # fmt: skip
        assert row["rms_error"] < 3 * row["cudnn_rms_error"]
        if plan.kernel == "whole":
            assert plan.backward is not None
            chosen.append(row["ratio"])
    assert len(chosen) > 500 and min(chosen) > 1.0


def test_prediction_is_linear():
    sizes = dict(batch=64, hidden=16, layers=1, element_bytes=2, reverse=False)
    plan = plan_whole_sequence(64, 16, 1, 2, reverse=False)
    one = predict(plan, steps=100, **sizes)
    assert predict(plan, steps=200, **sizes).us == pytest.approx(2 * one.us)
    # 8 rows a program that waits for nobody: as many again on each multiprocessor
    more = predict(plan, steps=100, **{**sizes, "batch": 8 * 128 + 1})
    assert (one.steps, more.steps) == (100, 200)


# ---- the planner alone --------------------------------------------------------------------------------------------------


def test_planner_imports_neither_torch_nor_triton():
    # Loaded by path: importing the package imports torch.
    code = """
import importlib, sys, types
package = types.ModuleType("torch_gru_fuse")
package.__path__ = [sys.argv[1]]
sys.modules["torch_gru_fuse"] = package
plans = importlib.import_module("torch_gru_fuse.planner.whole_sequence")
gpus = importlib.import_module("torch_gru_fuse.planner.gpus")
assert plans.plan_whole_sequence(10, 256, 6, 2, reverse=False, multiprocessors=gpus.gpu_named("l4").multiprocessors)
importlib.import_module("torch_gru_fuse.tools.plan")
print(sorted({"torch", "triton"} & set(sys.modules)))
"""
    folder = ROOT / "torch_gru_fuse"
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
