"""The examples run as printed, and show no time for a wrong result."""

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from training import calls_of_ops

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = ["--device", "cpu", "--T", "6", "--B", "2", "--input", "4", "--hidden", "8", "--layers", "2", "--repeat", "2"]


def _load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_kernelbench_agrees_in_all_problems():
    command = [sys.executable, str(EXAMPLES / "kernelbench_gru.py"), *TINY]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}  # also where the package is not installed
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for number in (39, 40, 41, 42):
        assert re.search(rf"^{number} .*  eager  +\d\.\de-\d\d +\d+\.\d{{3}} +1\.00x$", done.stdout, re.MULTILINE)
    assert len(re.findall(r"^ +compiled  +\d\.\de-\d\d +\d+\.\d{3} +\d+\.\d\dx$", done.stdout, re.MULTILINE)) == 4
    assert done.stdout.endswith("Eager and compiled agree.\n")


class _Wrong(nn.Module):
    def __init__(self, model, **_):
        super().__init__()
        self.model = model

    def forward(self, x, h0):
        return self.model(x, h0) + 1e-3


def test_kernelbench_prints_no_time_for_a_wrong_result(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", _Wrong)
    assert _load("kernelbench_gru").main([*TINY, "--problem", "41"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^ +compiled +1\.0e-03 +WRONG, expected at most \d\.\de-\d\d$", out, re.MULTILINE)
    assert not re.search(r"\d\.\d\dx", out)
    assert out.endswith("Eager and compiled DISAGREE.\n")


def test_kernelbench_models_return_what_the_problems_ask_for():
    module = _load("kernelbench_gru")
    sizes = module.Sizes(T=5, B=2, I=3, H=4, L=2)
    shapes = {39: (5, 2, 4), 40: (2, 2, 4), 41: (5, 2, 8), 42: (4, 2, 4)}
    for number, shape in shapes.items():
        problem = module.PROBLEMS[number]
        h0 = torch.zeros(4 if problem.bidirectional else 2, 2, 4)
        assert module.GRUStack(problem, sizes)(torch.zeros(5, 2, 3), h0).shape == shape


# ---- train_next_character -----------------------------------------------------------------------------------------------

SHORT = [
    "--device", "cpu", "--steps", "4", "--evaluate", "2", "--length", "8", "--batch", "4", "--hidden", "8", "--dropout", "0.5",
]  # fmt: skip


@pytest.fixture
def text(tmp_path):
    for i in range(11):
        (tmp_path / f"{i:02}.py").write_text(f"x = {i}  # β\n" * 20, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("options", [[], ["--amp", "bfloat16"]], ids=["float32", "autocast"])
def test_next_character_takes_the_same_course(text, tmp_path, capsys, options):
    curves = tmp_path / "curves.json"
    with calls_of_ops("cpu") as calls:
        assert _load("train_next_character").main([*SHORT, "--text", str(text), "--json", str(curves), *options]) == 0
    # A step and an evaluation before the four steps, and two evaluations of 16 batches.
    assert calls == {"gru_forward": 1 + 1 + 4 + 2 * 16, "gru_backward": 1 + 4}
    out = capsys.readouterr().out
    assert "torch.gru in gru (GRU) -> torch_gru_fuse.gru\n" in out
    assert re.search(r"^Eager and compiled agree: their accuracies differ by 0\.0\d+\.$", out, re.MULTILINE)
    eager, compiled = json.loads(curves.read_text())["runs"]
    assert eager["steps"] == compiled["steps"] == [2, 4]
    tolerance = 0.01 if options else 1e-5
    for key in ("losses", "accuracies"):
        assert compiled[key] == pytest.approx(eager[key], rel=0, abs=tolerance)
    assert eager["losses"][1] < eager["losses"][0] < math.log2(128) + 1


def test_next_character_fails_when_compiled_is_wrong(text, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", _Blind)
    assert _load("train_next_character").main([*SHORT, "--steps", "40", "--lr", "0.05", "--text", str(text)]) == 1
    assert "Eager and compiled DISAGREE: their accuracies differ by " in capsys.readouterr().out


class _Blind(nn.Module):
    """Without the gradients of its weights."""

    def __init__(self, model, **_):
        super().__init__()
        self.model = model

    def forward(self, text):
        return self.model(text).detach().requires_grad_()


def test_next_character_holds_out_whole_files(text):
    module = _load("train_next_character")
    train, held_out = module.load(text, torch.device("cpu"), 8)
    assert (train.files, held_out.files) == (9, 2)
    texts = [bytes(t.characters.tolist()).decode() for t in (train, held_out)]
    assert set(texts[1].splitlines()) == {"x = 0  # ?", "x = 10  # ?"}
    assert not set(texts[0].splitlines()) & set(texts[1].splitlines())
    window, following = train.windows(5, 8, torch.Generator())
    assert window.shape == following.shape == (5, 8) and torch.equal(window[:, 1:], following[:, :-1])
    (text / "00.py").write_text("")
    (text / "10.py").write_text("x")
    with pytest.raises(SystemExit, match="hold too little for windows of 8 characters; pass another folder"):
        module.load(text, torch.device("cpu"), 8)


def test_next_character_draws_its_curves(text, tmp_path):
    pytest.importorskip("matplotlib")
    module = _load("train_next_character")
    run = module.Run("eager", 0.1, [1, 2], [0.1, 0.2], [3.0, 2.0], [0.1, 0.2])
    module._plot(run, run, "title", str(tmp_path / "curves.png"))
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_next_character_asks_for_matplotlib_before_it_trains(text, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="2"):
        _load("train_next_character").main([*SHORT, "--text", str(text), "--plot", "curves.png"])
    assert "--plot needs matplotlib: pip install" in capsys.readouterr().err
