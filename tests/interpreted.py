"""The kernels once more, run by Triton's interpreter, beside the compiled ones of the normal import.

A kernel is interpreted or compiled as the knob stands when ``triton.jit`` decorates it.  The package's directory is
therefore given a second name, and the kernels are imported under it with the knob on.  The package's own ``__init__`` does
not run.

Two things that the interpreter does in vain, and that took half of its time, are left out.
"""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import triton
from triton.runtime.interpreter import InterpretedFunction, interpreter_semantic

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


def _call(function, *args, **kwargs):
    """A function that a kernel calls: ``triton.language`` is not patched again, the launch has done it."""
    return function.rewrite()(*args, **kwargs)


def _ignore_overflow(a, b, operation):
    """The interpreter calculates each operation of integers twice, in 64 bits to compare, and then does not look at it."""


InterpretedFunction.__call__ = _call
interpreter_semantic.binary_op_sanitize_overflow_impl = _ignore_overflow
