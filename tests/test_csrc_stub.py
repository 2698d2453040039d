"""csrc_stub/torch_gru_fuse.cpp states the same schemas as the Python package, and compiles."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

import torch_gru_fuse  # noqa: F401  (registers the ops)

STUB = Path(__file__).parents[1] / "csrc_stub" / "torch_gru_fuse.cpp"


def _stated_in_cpp() -> dict[str, str]:
    """Op -> schema, as the dispatcher prints it."""
    definitions = re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)', STUB.read_text())
    texts = ["".join(re.findall(r'"([^"]*)"', pieces)) for pieces in definitions]
    schemas = [torch._C.parse_schema(f"torch_gru_fuse::{text}") for text in texts]
    assert len(schemas) == STUB.read_text().count("m.def("), "a definition that this test cannot read"
    return {s.name.removeprefix("torch_gru_fuse::"): str(s) for s in schemas}


def _registered_from_python() -> dict[str, str]:
    names = {n.split("::")[1].split(".")[0] for n in torch._C._dispatch_get_all_op_names() if n.startswith("torch_gru_fuse::")}
    return {n: str(getattr(torch.ops.torch_gru_fuse, n).default._schema) for n in names}


def test_cpp_states_the_schemas_that_python_registers():
    assert _stated_in_cpp() == _registered_from_python()


def test_the_ops_for_users_take_the_arguments_of_torch():
    """Types in order; of torch.gru and torch.gru_cell.  What they do not know can only be given by name."""
    stated = _stated_in_cpp()
    gru, gru_cell = torch.ops.aten.gru, torch.ops.aten.gru_cell
    for name, aten in (("gru", gru.input), ("gru_packed", gru.data), ("gru_cell", gru_cell.default)):
        ours = torch._C.parse_schema(stated[name])
        assert [str(a.type) for a in ours.arguments if not a.kwarg_only] == [str(a.type) for a in aten._schema.arguments]
        assert [str(r.type) for r in ours.returns] == [str(r.type) for r in aten._schema.returns]


def test_cpp_compiles_against_the_headers_of_torch():
    compiler = shutil.which(os.environ.get("CXX") or "g++") or shutil.which("c++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    includes = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    command = [compiler, "-std=c++20", "-fsyntax-only", *includes, str(STUB)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
