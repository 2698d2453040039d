"""The examples run as printed, and show no time for a wrong result."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

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
