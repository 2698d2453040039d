"""DDP and FSDP2 with compiled models, two processes on the CPU: the weights of one process that saw the whole batches.

`benchmarks/distributed.py`, which does the same on GPUs, trains; in float64, so that only an error is more than a few ulp.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "distributed.py"
SECONDS = 240  # a tenth of which is enough where nothing else runs
SIZES = ["--T", "3", "--B", "4", "--input", "4", "--hidden", "160", "--layers", "2", "--steps", "4"]


def run(*options, seconds=SECONDS):
    return subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", "--dtype", "float64", *SIZES, "--seconds", str(seconds), *options],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=seconds + 60,
    )  # fmt: skip


@pytest.fixture(scope="module")
def report():
    done = run("--json")
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["DDP(compile)", "compile(DDP)", "FSDP2(compile)", "compile(FSDP2)"])
def test_weights_are_those_of_one_process(report, name):
    row = next(row for row in report["rows"] if row["name"] == name)
    assert row["distance"] < 1e-14 and row["losses"] < 1e-14
    assert row["ops"] == {"gru_forward": 1, "gru_backward": 1}
    assert row["rewrites"] and all("not rewritten" not in rewrite for rewrite in row["rewrites"])


def test_eager_runs_none_of_the_ops(report):
    assert [row["name"] for row in report["rows"] if not row["ops"]] == ["one process", "DDP", "FSDP2"]
    assert report["problems"] == []


def test_it_ends_when_its_time_is_over():
    done = run("--json", seconds=1)
    assert done.returncode == 1 and "TimeoutError: not done after 1.0 s; pass more --seconds" in done.stderr


def test_part_batches_must_be_equal():
    done = run("--B", "5")
    assert done.returncode == 2 and "--B 5 does not divide among --processes 2; expected a multiple" in done.stderr
