"""python -m torch_gru_fuse demo: its text, its verdict and its errors."""

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from torch_gru_fuse.__main__ import main
from torch_gru_fuse.tools import demo
from torch_gru_fuse.tools.corpus import load_corpus

# ---- text ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path):
    """Nine files in each of two languages; every byte of a file is the same, and tells the file and so the language."""
    for i, suffix in enumerate([".py"] * 9 + [".h"] * 9):
        folder = tmp_path / f"folder{i % 3}"
        folder.mkdir(exist_ok=True)
        (folder / f"file{i}{suffix}").write_bytes(bytes([i]) * (1024 + i))
    return tmp_path


def test_windows_come_from_files_of_their_language_and_held_out_files_are_never_trained_on(sources):
    corpus = load_corpus(train=500, held_out=200, length=16, seed=1, root=sources)
    assert corpus.languages == ("Python", "C++")
    assert (corpus.train_files, corpus.held_out_files) == (12, 6)
    seen = []
    for windows, count in ((corpus.train, 500), (corpus.held_out, 200)):
        assert windows.text.shape == (count, 16)
        assert windows.text.dtype == windows.language.dtype == torch.int64
        file = windows.text[:, 0]
        assert torch.equal(windows.text, file[:, None].expand(-1, 16)), "a window goes beyond its file"
        assert torch.equal(file // 9, windows.language)
        seen.append(set(file.tolist()))
    assert len(seen[0]) == 12
    assert len(seen[1]) == 6
    assert not seen[0] & seen[1]


def test_windows_depend_on_the_seed_alone(sources):
    first, again, other = (load_corpus(50, 20, 16, seed, sources) for seed in (1, 1, 2))
    assert torch.equal(first.train.text, again.train.text)
    assert torch.equal(first.held_out.text, again.held_out.text)
    assert not torch.equal(first.train.text, other.train.text)


def test_a_window_may_be_a_whole_file(sources):
    length = 1024 + 6  # that of the seventh Python file: three of them are long enough, and every C++ file
    corpus = load_corpus(200, 100, length, 0, sources)
    assert corpus.languages == ("Python", "C++")
    assert corpus.train_files + corpus.held_out_files == 3 + 9


def test_text_in_fewer_than_two_languages_is_an_error(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.py").write_bytes(bytes(2000))
    with pytest.raises(FileNotFoundError, match=r"in 1 of the languages Python \(\*\.py\), .*expected two or more"):
        load_corpus(10, 10, 16, 0, tmp_path)


def test_torch_itself_holds_text_in_four_languages():
    corpus = load_corpus(10, 10, demo.WINDOW, 0)
    assert corpus.languages == ("Python", "C++", "CUDA", "CMake")
    assert corpus.held_out_files >= 4 * 5


# ---- the command --------------------------------------------------------------------------------------------------------


def test_demo_trains_through_the_fused_ops_and_agrees():
    command = [sys.executable, "-m", "torch_gru_fuse", "demo", "--device", "cpu", "--steps", "3", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["problems"] == []
    assert report["steps"] == 3
    assert [r["name"] for r in report["runs"]] == ["eager", "compiled"]
    assert report["fused_calls"]["torch_gru_fuse::gru_forward"] == 1
    assert report["fused_calls"]["torch_gru_fuse::gru_backward"] == 1
    assert report["rewrites"], "nothing recorded"
    names = {c["name"] for c in report["comparisons"]}
    assert names == {"scores"} | {f"d {n}" for n, _ in demo.LanguageClassifier(4).named_parameters()}


class _Wrong(nn.Module):
    def __init__(self, model, **_):
        super().__init__()
        self.model = model

    def forward(self, text):
        return self.model(text) * 1.001


def test_demo_fails_when_compiled_is_wrong(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", _Wrong)
    assert main(["demo", "--device", "cpu", "--steps", "2"]) == 1
    out, err = capsys.readouterr()
    assert "Eager and compiled disagree." in out
    assert "agree." not in out.replace("disagree.", "")
    assert "eager and compiled disagree: scores is 1.0e-03 from float64 when compiled" in err
    assert "eager and compiled disagree: d head.bias" in err
    assert "called no op of torch_gru_fuse" in err


@pytest.mark.parametrize("compiled", [1e-3, float("nan"), float("inf")])
def test_an_error_above_the_limit_or_not_a_number_disagrees(compiled):
    assert not demo.Comparison("scores", eager=1e-7, compiled=compiled).agrees
    assert demo.Comparison("scores", eager=1e-7, compiled=3e-7).agrees


def test_without_a_cpp_compiler_the_error_says_what_to_install(capsys):
    with torch._inductor.config.patch({"cpp.cxx": ("a-compiler-that-is-not-there",)}):
        assert main(["demo", "--device", "cpu"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "needs a C++ compiler" in err
    assert "apt install g++" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "nowhere"], "--device nowhere: "),
        (["--backend", "nothing"], "--backend nothing: expected one of "),
    ],
)
def test_an_option_that_cannot_be_had_is_named(options, message, capsys):
    assert main(["demo", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["no-such-command"], ["demo", "--steps", "0"]])
def test_usage_errors(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    assert "usage: python -m torch_gru_fuse" in capsys.readouterr().err


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    assert demo.SUMMARY in " ".join(capsys.readouterr().out.split())
