"""The bench command: it checks before it times, says which result was wrong, and writes what it measured."""

import json

import pytest
import torch

from torch_gru_fuse.__main__ import main
from torch_gru_fuse.tools import bench

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


def test_named_shapes_are_those_of_the_documents():
    assert bench.SHAPES["kb39"] == bench.Shape(512, 10, 128, 256, 6)
    assert bench.SHAPES["kb41"].D == 2 and all(s.D == 1 for name, s in bench.SHAPES.items() if name != "kb41")


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
    ],
    ids=["shape", "dtype", "sizes", "zero", "repeat"],
)
def test_errors(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_no_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["bench", "--device", "cuda", "--shapes", "step"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err
