"""What a user gets by installing: dependencies, entry points, the README's commands, and nothing that is ours alone."""

import importlib
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMMANDS = (
    "pip install -e . && python -m torch_gru_fuse demo",
    "pip install -e '.[test]' && pytest",
)


def _python(code: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k != "TORCH_GRU_FUSE"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean | environment, capture_output=True, text=True)


# ---- commands -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("file", ["README.md", ".ci/run"])
def test_ci_runs_the_commands_of_the_readme(file, command):
    assert command in (ROOT / file).read_text(), f"{file} does not hold: {command}"


def test_ci_tests_the_oldest_torch_that_is_allowed():
    [requirement] = [d for d in PROJECT["dependencies"] if d.startswith("torch>=")]
    oldest = requirement.removeprefix("torch>=")
    constraints = (ROOT / ".ci" / f"constraints-torch-{oldest}.txt").read_text()
    assert f"torch=={oldest}.0" in constraints.splitlines()
    assert oldest in (ROOT / ".ci" / "run").read_text()


# ---- dependencies and entry points --------------------------------------------------------------------------------------


def test_only_torch_and_triton_are_needed_at_run_time():
    assert [re.match(r"[\w.-]+", d)[0] for d in PROJECT["dependencies"]] == ["torch", "triton"]


# Every module of the package, in a process in which no distribution but torch, triton and what they need can be imported.
_IMPORT_ALL = """
import importlib, pkgutil, re, sys
from importlib import metadata

normal = lambda name: re.sub(r"[-_.]+", "-", name).lower()
allowed, todo = set(), ["torch_gru_fuse", "torch", "triton"]
while todo:
    name = normal(todo.pop())
    if name in allowed:
        continue
    allowed.add(name)
    try:
        required = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        continue
    todo += [re.match(r"[\\w.-]+", r)[0] for r in required if "extra ==" not in r]

modules = metadata.packages_distributions()
blocked = {m for m, owners in modules.items() if not allowed & {normal(o) for o in owners}}
assert {"numpy", "pytest"} <= blocked, blocked

sys.modules.update(dict.fromkeys(blocked))  # None: importing it is a ModuleNotFoundError
import torch_gru_fuse
for module in pkgutil.walk_packages(torch_gru_fuse.__path__, "torch_gru_fuse."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
with torch_gru_fuse.enable():
    assert torch_gru_fuse.is_enabled()
"""


@pytest.mark.versions
def test_the_package_imports_with_torch_and_triton_alone():
    done = _python(_IMPORT_ALL)
    assert done.returncode == 0, done.stderr


def test_entry_points_name_what_exists():
    groups = PROJECT["entry-points"]
    assert groups["torch_dynamo_backends"] == {"gru_fuse": "torch_gru_fuse.backend:gru_fuse"}
    assert groups["torch.backends"] == {"torch_gru_fuse": "torch_gru_fuse_autoload:autoload"}
    for group in groups.values():
        for place in group.values():
            module, _, name = place.partition(":")
            assert callable(getattr(importlib.import_module(module), name))


def test_the_version_is_stated_once_more_in_the_changelog():
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()


# ---- TORCH_GRU_FUSE -----------------------------------------------------------------------------------------------------

_AUTOLOAD = "import sys, torch, torch_gru_fuse_autoload as a; a.autoload(); "


@pytest.mark.parametrize("setting", [None, "", "0", "false"])
def test_autoload_imports_nothing_unless_asked(setting):
    environment = {} if setting is None else {"TORCH_GRU_FUSE": setting}
    code = _AUTOLOAD + "print([m for m in sys.modules if m.startswith('torch_gru_fuse')])"
    done = _python(code, **environment)
    assert (done.stdout, done.stderr) == ("['torch_gru_fuse_autoload']\n", "")


@pytest.mark.parametrize("setting", ["1", "True"])
def test_autoload_enables_when_asked(setting):
    done = _python(_AUTOLOAD + "print(sys.modules['torch_gru_fuse'].is_enabled())", TORCH_GRU_FUSE=setting)
    assert done.stdout == "True\n", done.stderr


def test_autoload_warns_of_a_setting_it_does_not_know():
    done = _python(_AUTOLOAD + "print('torch_gru_fuse' in sys.modules)", TORCH_GRU_FUSE="yes")
    assert done.stdout == "False\n", done.stderr
    assert "TORCH_GRU_FUSE='yes' is not known and is ignored: set it to 1 or true" in done.stderr


@pytest.mark.versions
def test_import_torch_obeys_the_variable_where_the_package_is_installed():
    try:
        metadata.distribution("torch_gru_fuse")
    except metadata.PackageNotFoundError:
        pytest.skip("torch_gru_fuse is not installed, its entry points are not there")
    state = "g = sys.modules.get('torch_gru_fuse'); print(g and g.is_enabled())"
    assert _python(f"import sys, torch; {state}").stdout == "None\n"
    # The second imports torch from within the package, before it has its contents.
    for first in ("torch", "torch_gru_fuse"):
        done = _python(f"import sys, {first}; {state}", TORCH_GRU_FUSE="1")
        assert (done.returncode, done.stdout) == (0, "True\n"), f"import {first}\n{done.stderr}"


# ---- text ---------------------------------------------------------------------------------------------------------------

# Folders of one machine, in text that goes to every other.
_PRIVATE = re.compile(r"(?<![\w.*$])/(?:work|root|home|Users|mnt|opt/(?:venvs|wheels|pypi))/")
_TEXT = {".py", ".md", ".toml", ".txt", ".cpp", ".json", ".sh", ".yml", ".yaml", ".csv", ""}


def _project_files() -> list[Path]:
    hidden = [ROOT / ".ci", ROOT / ".github"]
    shown = [
        p for p in ROOT.iterdir() if not p.name.startswith(".") and p.suffix != ".egg-info" and p.name not in ("build", "dist")
    ]
    roots = shown + [p for p in hidden if p.exists()]
    files = [f for p in roots for f in ([p] if p.is_file() else p.rglob("*"))]
    return [f for f in files if f.is_file() and f.suffix in _TEXT and "__pycache__" not in f.parts]


def test_no_file_names_a_folder_of_one_machine():
    files = _project_files()
    assert ROOT / ".ci" / "run" in files
    assert Path(__file__) in files
    found = [
        f"{f.relative_to(ROOT)}:{number}: {line.strip()}"
        for f in files
        for number, line in enumerate(f.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if _PRIVATE.search(line)
    ]
    assert not found, "\n".join(found)
