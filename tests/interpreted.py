"""The kernels once more, run by Triton's interpreter, beside the compiled ones of the normal import.

A kernel is interpreted or compiled as the knob stands when ``triton.jit`` decorates it.  The package's directory is
therefore given a second name, and the kernels are imported under it with the knob on.  The package's own ``__init__`` does
not run.
"""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import triton

_ALIAS = "torch_gru_fuse_interpreted"
_DIRECTORY = Path(__file__).resolve().parents[1] / "torch_gru_fuse"


@contextlib.contextmanager
def mode() -> Iterator[None]:
    """Kernels decorated inside are interpreted."""
    before = triton.knobs.runtime.interpret
    triton.knobs.runtime.interpret = True
    try:
        yield
    finally:
        triton.knobs.runtime.interpret = before


def load(name: str = "kernels") -> ModuleType:
    """``torch_gru_fuse.<name>``, interpreted."""
    if _ALIAS not in sys.modules:
        package = ModuleType(_ALIAS)
        package.__path__ = [str(_DIRECTORY)]
        sys.modules[_ALIAS] = package
    with mode():
        return importlib.import_module(f"{_ALIAS}.{name}")
