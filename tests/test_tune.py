"""python -m torch_gru_fuse tune: which plans are measured, which is kept, and the file that keeps it.  Nothing is measured."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import torch_gru_fuse
from torch_gru_fuse.__main__ import main
from torch_gru_fuse.planner import tuned
from torch_gru_fuse.planner.gpus import GPUS
from torch_gru_fuse.planner.tuned import Entry, candidates, key_of, lookup, store
from torch_gru_fuse.planner.whole_sequence import (
    ResidentPlan,
    StagedPlan,
    WavefrontPlan,
    WholeSequencePlan,
    plan_whole_sequence,
)
from torch_gru_fuse.tools import tune
from torch_gru_fuse.tools.bench import Shape

ROOT = Path(__file__).parents[1]
GPU = GPUS["rtx4090"]
KB39 = Shape(512, 10, 128, 256, 6)
PLANS = [
    WholeSequencePlan(6, WavefrontPlan(16, 8, 4, store_first=True)),
    WholeSequencePlan(1, StagedPlan(64, 8, 4, 2, 4, pieces=2)),
    WholeSequencePlan(2, ResidentPlan(64, 8, 4)),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache, which nothing has been read from."""
    monkeypatch.setenv("TORCH_GRU_FUSE_CACHE", str(tmp_path / "cache"))
    tuned._load.cache_clear()
    yield tmp_path / "cache"
    tuned._load.cache_clear()


def key(**changes):
    return replace(key_of(GPU.name, 10, 256, 6, reverse=False, dtype="float16"), **changes)


def entry(plan=PLANS[0]):
    return Entry(plan, 530.5, 7400.0, 512, 128, 6)


# ---- the file -----------------------------------------------------------------------------------------------------------


def test_what_is_stored_is_found(folder):
    assert lookup(key()) is None and not folder.exists()
    for dtype, plan in zip(("float16", "bfloat16", "float32"), PLANS, strict=True):
        assert store(key(dtype=dtype), entry(plan)) == folder / "plans.json"
    for dtype, plan in zip(("float16", "bfloat16", "float32"), PLANS, strict=True):
        assert lookup(key(dtype=dtype)) == entry(plan)
    store(key(), entry(PLANS[2]))
    assert lookup(key()).plan == PLANS[2] and len(tuned.load()) == 3
    assert [file.name for file in folder.iterdir()] == ["plans.json"]


@pytest.mark.parametrize(
    "change",
    [
        {"gpu": "NVIDIA L4"}, {"package": "0.0"}, {"triton": "3.0"}, {"batch": 11}, {"hidden": 255}, {"lanes": 1},
        {"reverse": True}, {"dtype": "float32"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_key_is_all_of_it(folder, change):
    store(key(), entry())
    assert lookup(key(**change)) is None


def test_versions_of_the_key():
    import triton

    assert (key().package, key().triton) == (torch_gru_fuse.__version__, triton.__version__)


def test_the_file_is_read_once(folder):
    store(key(), entry())
    assert lookup(key()) is not None
    (folder / "plans.json").write_text("something else")
    assert lookup(key()) is not None


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"format": 99, "plans": []}', b'{"format": 1, "plans": 3}', b"[" * 100_000],
    ids=["empty", "cut off", "list", "null", "no text", "other format", "no list", "deep"],
)
def test_a_file_that_is_not_ours_is_ignored_and_kept(folder, caplog, text):
    folder.mkdir()
    (folder / "plans.json").write_bytes(text)
    with caplog.at_level(logging.WARNING, "torch_gru_fuse"):
        assert lookup(key()) is None
    assert "plans.json is not a file of them" in caplog.text
    store(key(), entry())
    assert lookup(key()) == entry()
    assert (folder / "plans.unreadable").read_bytes() == text


def spoilt(**changes):
    """A record, some of whose plan is something else."""
    record = {"key": vars(key(dtype="bfloat16")), "entry": {**vars(entry()), "plan": {"lanes": 6}}}
    kernel = {"name": "wavefront", **vars(PLANS[0].kernel)}
    record["entry"]["plan"]["kernel"] = {k: v for k, v in {**kernel, **changes}.items() if v is not None}
    return record


@pytest.mark.parametrize(
    "record",
    [
        3, {}, {"key": {}, "entry": {}}, spoilt(name="warp"), spoilt(units="16"), spoilt(units=True), spoilt(units=1.5),
        spoilt(store_first=1), spoilt(rows=None), spoilt(colour=3), {**spoilt(), "entry": None},
    ],
)  # fmt: skip
def test_a_record_that_is_not_understood_is_skipped_and_stays(folder, caplog, record):
    store(key(), entry())
    file = folder / "plans.json"
    document = json.loads(file.read_text())
    document["plans"].insert(0, record)
    file.write_text(json.dumps(document))
    tuned._load.cache_clear()
    with caplog.at_level(logging.WARNING, "torch_gru_fuse"):
        assert lookup(key()) == entry() and lookup(key(dtype="bfloat16")) is None
    assert "a tuned plan is not used" in caplog.text
    store(key(dtype="float32"), entry())
    assert record in json.loads(file.read_text())["plans"] and len(tuned.load()) == 2


def test_a_whole_record_is_understood(folder):
    folder.mkdir()
    (folder / "plans.json").write_text(json.dumps({"format": 1, "plans": [spoilt()]}))
    assert lookup(key(dtype="bfloat16")) == entry()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_that_may_not_be_read(folder):
    store(key(), entry())
    (folder / "plans.json").chmod(0)
    tuned._load.cache_clear()
    assert lookup(key()) is None


def test_a_folder_in_place_of_the_file(folder):
    (folder / "plans.json").mkdir(parents=True)
    assert lookup(key()) is None
    store(key(), entry())
    assert lookup(key()) == entry()


def test_a_failed_write_leaves_the_old_file(folder, monkeypatch):
    store(key(), entry())
    monkeypatch.setattr(tuned.os, "replace", lambda *args: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        store(key(), entry(PLANS[1]))
    assert [file.name for file in folder.iterdir()] == ["plans.json"]
    assert lookup(key()) == entry()


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_GRU_FUSE_CACHE", "/somewhere")
    assert tuned.cache_file() == Path("/somewhere/plans.json")
    monkeypatch.delenv("TORCH_GRU_FUSE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert tuned.cache_file() == Path("/caches/torch_gru_fuse/plans.json")
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert tuned.cache_file() == tmp_path / ".cache/torch_gru_fuse/plans.json"


def test_neither_torch_nor_triton_is_imported():
    code = """
import importlib, sys, types
package = types.ModuleType("torch_gru_fuse")
package.__path__ = [sys.argv[1]]
sys.modules["torch_gru_fuse"] = package
tuned = importlib.import_module("torch_gru_fuse.planner.tuned")
assert tuned.candidates(10, 256, 6, 2, False, 128, 101376) and tuned.load() is not None
print(sorted({"torch", "triton"} & set(sys.modules)))
"""
    arguments = [sys.executable, "-c", code, str(ROOT / "torch_gru_fuse")]
    assert subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.strip() == "[]"


# ---- candidates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("hidden", [16, 17, 60, 64, 100, 128, 200, 256, 512, 777, 1024, 2048, 4096])
@pytest.mark.parametrize("batch", [1, 16, 33, 256, 4096])
def test_candidates_are_plans_that_may_fit(batch, hidden, reverse, element_bytes):
    for lanes in (2,) if reverse else (1, 6):
        limits = (GPU.multiprocessors, GPU.shared_bytes_per_program)
        plans = candidates(batch, hidden, lanes, element_bytes, reverse, *limits)
        planned = plan_whole_sequence(
            batch, hidden, lanes, element_bytes, reverse=reverse, multiprocessors=limits[0], shared_bytes=limits[1]
        )
        assert len(set(plans)) == len(plans) <= 64
        if planned is not None:
            assert plans[0] == planned
        for plan in plans:
            kernel = plan.kernel
            assert plan.lanes in (lanes, 2 if reverse else 1)
            if plan.waits(reverse=reverse):
                assert plan.programs(batch, hidden) <= limits[0] * plan.programs_per_sm
            if isinstance(kernel, StagedPlan):
                assert kernel.tiles == 1 or kernel.tiles % 2 == 0
                assert kernel.shared_bytes(hidden, element_bytes) <= limits[1]
                assert kernel.num_warps == 8


def test_candidates_of_all_kinds_and_tilings():
    plans = candidates(10, 256, 6, 2, False, 128, GPU.shared_bytes_per_program)
    kinds = {(plan.kernel.name, plan.lanes, plan.kernel.rows) for plan in plans}
    assert kinds == {
        (name, lanes, rows) for name, lanes in (("wavefront", 6), ("wavefront", 1), ("staged", 1)) for rows in (8, 16)
    }
    assert any(plan.kernel.name == "resident" for plan in candidates(64, 64, 2, 2, False, 128, GPU.shared_bytes_per_program))
    assert candidates(1, 4096, 2, 4, True, 128, GPU.shared_bytes_per_program) == []


# ---- the command --------------------------------------------------------------------------------------------------------

OWN = tune.Measured(7400.0, (3e-3, 4e-4))


def measuring(times, default=900.0):
    """Microseconds by plan; an exception is raised."""

    def measure(plan):
        value = times.get(plan, default)
        if isinstance(value, Exception):
            raise value
        return tune.Measured(value, (3e-3, 4e-4))

    return measure


def report(times, **options):
    plans = tune.plans_of(GPU, KB39, "float16")
    assert len(plans) > 10
    numbered = {plans[i]: value for i, value in times.items()}
    return plans, tune.report(GPU, KB39, "float16", plans, OWN, measuring(numbered), **options)


def test_the_fastest_is_kept(folder, capsys):
    plans, status = report({0: 600.0, 3: 500.0, 4: RuntimeError("too many blocks\nand more")})
    assert status == 0
    assert lookup(key()) == Entry(plans[3], 500.0, 7400.0, 512, 128, 6)
    out = capsys.readouterr().out
    assert f"Kept in {folder / 'plans.json'}." in out
    lines = out.splitlines()
    assert lines[0] == "# NVIDIA GeForce RTX 4090: T=512, B=10, I=128, H=256, layers 6, float16"
    assert "7400.0" in lines[2] and "PyTorch's own GRU" in lines[2]
    assert lines[3].split()[:3] == ["*", "500.0", "14.80x"] and lines[4].split()[:2] == ["p", "600.0"]
    assert "RuntimeError: too many blocks" in out and "and more" not in out


@pytest.mark.parametrize("planned, kept", [(509.0, 0), (511.0, 3)])
def test_the_planned_one_stays_unless_another_is_faster_by_more_than_noise(folder, planned, kept):
    plans, _ = report({0: planned, 3: 500.0})
    assert lookup(key()).plan == plans[kept]


def test_a_wrong_result_is_never_kept(folder, capsys):
    plans, status = report({0: tune.WrongResult("error 2.0e-01, PyTorch's own 4.0e-04"), 3: 500.0})
    assert status == 1 and lookup(key()).plan == plans[3]
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize("error, status", [(RuntimeError("no"), 2), (tune.WrongResult("no"), 1)])
def test_nothing_ran(folder, capsys, error, status):
    plans = tune.plans_of(GPU, KB39, "float16")
    assert tune.report(GPU, KB39, "float16", plans, OWN, measuring({}, error)) == status
    assert "no plan ran; nothing is kept" in capsys.readouterr().err and not folder.exists()


def test_no_store(folder):
    assert report({}, store=False)[1] == 0 and not folder.exists()


def test_a_place_that_cannot_be_written(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_GRU_FUSE_CACHE", str(tmp_path / "file"))
    tuned._load.cache_clear()
    assert report({})[1] == 2
    assert "the plan cannot be kept" in capsys.readouterr().err


@pytest.fixture
def measuring_on_a_cpu(monkeypatch):
    """What the kernels give is PyTorch's own result, or what `spoil` makes of it; there are no CUDA graphs."""
    whole_path = pytest.importorskip("torch_gru_fuse.ops.whole_path")
    calls = []

    def gru_forward(call, save, plan, spoil=lambda results, number: results):
        calls.append(plan)
        results = torch.gru(call.input, call.hx, call.params, True, call.L, 0.0, False, call.bidirectional, False)
        return *spoil(results, len(calls)), None

    monkeypatch.setattr(whole_path, "gru_forward", gru_forward)
    monkeypatch.setattr(tune.timing, "graph_of", lambda run: run)

    def start(spoil=None, dtype="float32"):
        if spoil is not None:
            monkeypatch.setattr(whole_path, "gru_forward", lambda *args: gru_forward(*args, spoil))
        return (*tune._measuring(Shape(3, 2, 5, 256, 2), dtype, 1, "cpu"), calls)

    return start


def test_a_plan_is_checked_and_timed(measuring_on_a_cpu):
    own, measure, calls = measuring_on_a_cpu()
    measured = measure(PLANS[0])
    assert measured.us > 0 and own.us > 0 and measured.error == own.error and measured.note == ""
    assert all(plan.whole == PLANS[0] and plan.tf32 for plan in calls) and len(calls) > 3


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda results, number: [t * 1.01 for t in results], "error 1.0e-02, PyTorch's own"),
        (lambda results, number: [t * float("nan") for t in results], "error inf, PyTorch's own"),
        (lambda results, number: [t * (1 + (number > 1) * 1e-6) for t in results], "another run gave other bits"),
    ],
    ids=["wrong", "NaN", "other bits"],
)
def test_a_wrong_plan_is_found(measuring_on_a_cpu, spoil, message):
    _, measure, _ = measuring_on_a_cpu(spoil)
    with pytest.raises(tune.WrongResult, match=message):
        measure(PLANS[0])


def test_float32_without_tf32_is_not_for_whole_sequences(measuring_on_a_cpu, monkeypatch):
    from torch_gru_fuse import torch_hooks

    monkeypatch.setattr(torch_hooks, "rnn_allows_tf32", lambda: False)
    with pytest.raises(tune.TuneError, match="need TF32 for float32"):
        measuring_on_a_cpu()
    measuring_on_a_cpu(dtype="bfloat16")


def test_sizes_without_a_plan():
    with pytest.raises(tune.TuneError, match="there is no plan: .*H = 4096"):
        tune.plans_of(GPU, Shape(64, 16, 1024, 4096, 1), "float32")
    with pytest.raises(tune.TuneError, match="compute capability 7.5"):
        tune.plans_of(replace(GPU, capability=(7, 5)), KB39, "float32")


def test_directions_share_a_key_whatever_the_layers(folder):
    for layers in (1, 6):
        shape = Shape(512, 10, 128, 256, layers, 2)
        plans = tune.plans_of(GPU, shape, "float32")
        assert tune.report(GPU, shape, "float32", plans, OWN, measuring({})) == 0
    assert [found.lanes for found in tuned.load()] == [2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert main(["tune", "--T", "5", "--B", "2", "--I", "3", "--H", "64"]) == 2
    assert capsys.readouterr().err == (
        "torch_gru_fuse tune: plans are measured on a GPU, and torch sees no CUDA device.\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        (("--H", "0"), "argument --H: '0', expected an integer of at least 1"),
        (("--layers", "x"), "argument --layers: 'x', expected an integer of at least 1"),
        (("--dtype", "float64"), "argument --dtype: invalid choice: 'float64'"),
    ],
)
def test_errors_name_the_argument(capsys, change, message):
    with pytest.raises(SystemExit) as exit_:
        main(["tune", "--T", "5", "--B", "2", "--I", "3", "--H", "64", *change])
    assert exit_.value.code == 2 and message in capsys.readouterr().err
