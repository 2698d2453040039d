"""The bench command: it checks before it times, says which result was wrong, and writes what it measured."""

import json
import os
import re
from types import SimpleNamespace

import pytest
import torch

from torch_gru_fuse.__main__ import main
from torch_gru_fuse.planner.gpus import GPUS
from torch_gru_fuse.tools import bench, emulate, timing

SMALL = [
    *("--device", "cpu", "--T", "4", "--B", "2", "--I", "3", "--H", "5", "--layers", "2"),
    *("--dtypes", "float32", "--repeat", "1"),
]


def test_every_way_is_right_and_timed(tmp_path, capsys):
    file = tmp_path / "times.json"
    assert main(["bench", *SMALL, "--bidirectional", "--json", str(file)]) == 0
    document = json.loads(file.read_text())
    [row] = document["rows"]
    assert row["shape"] == {"T": 4, "B": 2, "I": 3, "H": 5, "L": 2, "D": 2}
    assert row["wrong"] == [] and row["failed"] == {}
    assert set(row["milliseconds"]) == {"own", "fused", "compiled without", "compiled", "reduce-overhead"}
    assert all(ms > 0 for ms in row["milliseconds"].values())
    assert 0 < row["errors"]["fused"][1] <= row["errors"]["fused"][0] < 1e-5
    assert row["ratios"] == {"ratio": pytest.approx(row["milliseconds"]["own"] / row["milliseconds"]["fused"])}
    assert row["ran"] == "torch"
    text = capsys.readouterr().out
    assert "own" in text and "ratio: own / fused" in text and torch.__version__ in text


def test_training(capsys):
    assert main(["bench", *SMALL, "--train", "--no-compile", "--json", "-"]) == 0
    [row] = json.loads(capsys.readouterr().out)["rows"]
    assert row["train"] and set(row["milliseconds"]) == {"own", "fused"}


@pytest.mark.parametrize("spoil", [lambda t: t * 1.001, lambda t: t * float("nan")], ids=["off by 0.1%", "NaN"])
def test_a_wrong_result_gets_no_times(monkeypatch, capsys, spoil):
    right = bench.Problem.fused
    monkeypatch.setattr(bench.Problem, "fused", lambda self: [spoil(t) for t in right(self)])
    assert main(["bench", *SMALL, "--no-compile"]) == 1
    assert "WRONG: fused; no times" in capsys.readouterr().out


def test_a_failure_is_told_and_gets_no_times(monkeypatch, capsys):
    def fail(self):
        raise RuntimeError("no room\nat all")

    monkeypatch.setattr(bench.Problem, "fused", fail)
    assert main(["bench", *SMALL, "--no-compile"]) == 1
    out = capsys.readouterr().out
    assert "WRONG: fused; no times" in out and "own float32, fused: no room\n" in out


@pytest.mark.parametrize("factor, wrong", [(1.0, []), (1.01, ["fused, graph"])])
def test_what_a_graph_left_behind_is_checked(monkeypatch, factor, wrong):
    right = bench._ways

    def ways(problem, device, compile_):
        yield from right(problem, device, False)
        graph = SimpleNamespace(replay=lambda: None)
        yield "fused, graph", lambda: timing.Replay(graph, 1, [t * factor for t in problem.fused()])

    monkeypatch.setattr(bench, "_ways", ways)
    cpu = torch.device("cpu")
    row = bench.measure("own", bench.Shape(4, 2, 3, 5, 2), "float32", cpu, train=False, repeat=1, compile_=False)
    assert row.wrong == wrong and ("fused, graph" in row.milliseconds) == (not wrong)


def test_named_shapes_are_those_of_the_documents():
    assert bench.SHAPES["kb39"] == bench.Shape(512, 10, 128, 256, 6)
    assert bench.SHAPES["step"] == bench.Shape(1, 1, 512, 512, 2)
    assert bench.SHAPES["dreamer"] == bench.Shape(64, 16, 1024, 4096, 1)
    assert len(bench.SHAPES) == 12
    assert bench.SHAPES["kb41"].D == 2 and all(s.D == 1 for name, s in bench.SHAPES.items() if name != "kb41")


HALF, SINGLE = torch.float16, torch.float32


@pytest.mark.parametrize(
    "error, own, dtype, wrong, says",
    [
        ((3e-3, 4e-4), (3e-3, 4e-4), HALF, False, ""),
        ((3e-3, 4.5e-4), (3e-3, 4e-4), HALF, False, "1.12 times the error"),
        ((3e-3, 2e-4), (3e-3, 4e-4), HALF, False, ""),
        ((3e-3, 1.7e-3), (3e-3, 4e-4), HALF, True, ""),  # 4 times
        ((13e-3, 4e-4), (3e-3, 4e-4), HALF, True, ""),
        ((3e-3, 9e-4), (1e-6, 1e-7), HALF, False, "9000.00 times the error"),  # 1 eps, own is exact by chance
        ((3e-3, 2e-3), (1e-6, 1e-7), HALF, True, ""),
        ((2e-3, 3e-4), (1e-6, 1e-7), SINGLE, True, ""),
        ((9e-7, 1e-7), (0.0, 0.0), SINGLE, False, ""),
        ((float("inf"), float("inf")), (1e-6, 1e-7), SINGLE, True, ""),
        ((float("nan"), float("nan")), (float("nan"), float("nan")), SINGLE, True, ""),
        ((float("inf"), float("inf")), (float("inf"), float("inf")), HALF, True, ""),
    ],
)
def test_what_is_wrong(monkeypatch, error, own, dtype, wrong, says):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench._judge(error, own, dtype) == (wrong, says)
    assert bench._is_wrong(error, own, dtype) is wrong


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_where_pytorch_does_without_is_said_not_wrong(monkeypatch, allowed):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench.torch_hooks, "rnn_allows_tf32", lambda: allowed)
    wrong, says = bench._judge((2e-3, 3e-4), (1e-6, 1e-7), SINGLE)
    assert (wrong, "TF32, which is allowed" in says) == (not allowed, allowed)
    assert bench._judge((2e-3, 3e-3), (1e-6, 1e-7), SINGLE) == (True, "")  # more than TF32 explains
    assert bench._judge((2e-2, 3e-3), (1e-6, 1e-7), HALF) == (True, "")


def test_the_table_has_both_errors_and_the_mark():
    row = bench.Row("own", "float32", False, bench.Shape(1, 1, 1, 1, 1), milliseconds={"own": 2.0, "fused": 1.0})
    row.errors = {"own": (1.5e-6, 1.25e-7), "fused": (2.5e-3, 3.25e-4)}
    row.less_exact = "TF32, which is allowed"
    cpu = torch.device("cpu")
    lines = bench._format([row], cpu).splitlines()
    assert lines[1].split()[-9:] == ["3.2e-04", "1.2e-07", "2.5e-03", "1.5e-06", "!", "TF32,", "which", "is", "allowed"]
    assert "2.00x" in lines[1]
    row.milliseconds = {"own, graph": 3.0, "fused, graph": 1.0, "own": 8.0, "fused": 2.0}
    assert bench._ratios(row, torch.device("cuda")) == {"graph ratio": 3.0, "eager ratio": 4.0}
    row.wrong, row.errors["compiled"] = ["fused", "compiled"], (1.0, 0.5)
    text = bench._format([row], cpu)
    assert "WRONG: fused, compiled; no times" in text and "3.2e-04  1.2e-07" in text and "compiled 5.0e-01" in text


def test_the_table_has_what_is_held():
    row = bench.Row("own", "float32", True, bench.Shape(1, 1, 1, 1, 1), milliseconds={"own": 2.0, "fused": 1.0})
    row.errors = {"own": (1.5e-6, 1.25e-7), "fused": (2.5e-3, 3.25e-4)}
    assert "held" not in bench._format([row], torch.device("cpu"))
    row.held = {"own": 44.0, "fused": 33.25, "recompute": 2.0}
    head, line, *_, legend = bench._format([row], torch.device("cpu")).splitlines()
    assert head.split()[-4:] == ["held:", "own", "fused", "recompute"] and line.split()[-3:] == ["44.0", "33.2", "2.0"]
    assert "held: MiB between forward and backward" in legend


@pytest.mark.parametrize("milliseconds, calls", [(8.0, 1), (0.1, 1), (0.05, 20), (0.01, 100), (0.0, 100)])
def test_short_calls_are_captured_many_in_a_graph(milliseconds, calls):
    assert timing.calls_a_graph(milliseconds) == calls


def test_time_of_a_graph_is_that_of_one_call(monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(now) * 3e-3)
    graph = SimpleNamespace(replay=lambda: None)
    assert timing.milliseconds(timing.Replay(graph, 10), torch.device("cpu"), 3) == pytest.approx(0.3)
    assert next(now) == 2 * 7  # until 20 ms were over


# ---- --as sm89 ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_compiled(monkeypatch):
    """Other tests launch kernels in this process."""
    monkeypatch.setattr(emulate, "_has_compiled", lambda: False)


def test_ptx_is_that_of_a_4090_and_the_cubin_that_of_the_gpu_at_hand(nothing_compiled):
    triton = pytest.importorskip("triton")
    from torch_gru_fuse.kernels import aot
    from torch_gru_fuse.planner.whole_sequence import plan_whole_sequence

    plan = plan_whole_sequence(8, 64, 1, 2, reverse=False)

    def compile_(capability):
        return aot.compile_whole_sequence(torch.float16, plan, batch=8, hidden=64, capability=capability)

    def code(resources):  # without the version of PTX and line numbers
        return re.sub(r"(?m)^\s*(\.version|\.loc|\.file|\.section|\.b\d+|//).*$", "", resources.ptx)

    native, of_4090 = compile_(90), compile_(89)
    with emulate.emulating("sm89") as gpu:
        assert gpu == GPUS["rtx4090"] and os.environ["TORCH_GRU_FUSE_GPU"] == "rtx4090"
        emulated = compile_(90)
    assert ".target sm_89" in emulated.ptx and ".target sm_90" in native.ptx
    assert code(emulated) == code(of_4090)
    # e_flags of the ELF header: the architecture is in the first byte or, from CUDA 13 on, in the second
    machine = [90 in resources.cubin[48:50] for resources in (emulated, native, of_4090)]
    assert machine == [True, True, False]
    assert triton.knobs.runtime.override_arch is None and triton.knobs.runtime.add_stages_inspection_hook is None
    assert "TORCH_GRU_FUSE_GPU" not in os.environ
    assert compile_(90).ptx == native.ptx


def test_settings_come_back_after_an_error(nothing_compiled, monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setenv("TORCH_GRU_FUSE_GPU", "l4")
    with pytest.raises(KeyError), emulate.emulating("sm89"):
        assert os.environ["TORCH_GRU_FUSE_GPU"] == "rtx4090"
        raise KeyError
    assert os.environ["TORCH_GRU_FUSE_GPU"] == "l4"
    assert triton.knobs.runtime.override_arch is None and triton.knobs.runtime.add_stages_inspection_hook is None


def test_emulation_comes_before_the_first_kernel(monkeypatch):
    pytest.importorskip("triton")
    from torch_gru_fuse.kernels import step

    caches = {0: "compiled"}
    monkeypatch.setattr(step.sequence_forward_kernel, "device_caches", caches, raising=False)
    with pytest.raises(emulate.EmulationError, match="kernels have been compiled in this process"), emulate.emulating("sm89"):
        pass
    caches.clear()
    monkeypatch.setattr(emulate.sys, "modules", {"torch_gru_fuse.kernels.step": step, "triton": emulate.sys.modules["triton"]})
    assert not emulate._has_compiled()


def test_architectures_and_gpus_that_are_refused(nothing_compiled, monkeypatch):
    pytest.importorskip("triton")
    with (
        pytest.raises(emulate.EmulationError, match="architecture is 'sm70', expected one of 'sm89'"),
        emulate.emulating("sm70"),
    ):
        pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    with (
        pytest.raises(emulate.EmulationError, match="does not run on a GPU of compute capability 8.6"),
        emulate.emulating("sm89"),
    ):
        pass


def test_planner_is_asked_whether_it_obeys(monkeypatch):
    from torch_gru_fuse.ops import support

    monkeypatch.setattr(support, "gpu_of", lambda index: GPUS["rtx4090"])
    emulate.check_planner(GPUS["rtx4090"], 0)
    monkeypatch.setattr(support, "gpu_of", lambda index: GPUS["h200"])
    with pytest.raises(emulate.EmulationError, match="on cuda:0 the ops plan for NVIDIA H200, not for NVIDIA GeForce RTX 4090"):
        emulate.check_planner(GPUS["rtx4090"], 0)


# ---- the rest -----------------------------------------------------------------------------------------------------------


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    row = bench.Row("own", "float32", False, bench.Shape(1, 1, 1, 1, 1), milliseconds={"own": 2.0, "fused": 1.0})
    file = tmp_path / "times.png"
    bench._plot([row], torch.device("cpu"), str(file))
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "kb39,nothing"], "--shapes: 'nothing' not known; there are kb39"),
        (["--dtypes", "float8"], "--dtypes: 'float8' not known; there are float32, float16, bfloat16"),
        (["--T", "5"], "a shape of your own needs --T, --B, --I, --H, --layers; missing"),
        ([*SMALL, "--H", "0"], "--H is 0, expected at least 1"),
        ([*SMALL, "--repeat", "0"], "--repeat is 0, expected at least 1"),
        ([*SMALL, "--as", "sm89"], "--as sm89 is for a GPU, the device is cpu"),
    ],
    ids=["shape", "dtype", "sizes", "zero", "repeat", "as"],
)
def test_errors(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_no_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["bench", "--device", "cuda", "--shapes", "step"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err
