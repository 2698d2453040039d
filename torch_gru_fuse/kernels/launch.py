"""Launches of compiled kernels at the cost of a lookup.

Triton's launcher inspects every argument of every call, which takes longer than many of these kernels run.  Here the first call
of a kind goes through it, and what it compiled is kept by all that selects code: the kernel, the GPU, types of tensors,
constants, options, and integers that Triton specialises.  It also specialises pointers by their alignment: only launches whose
pointers are all multiples of 16, as nearly all are, take the short way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_ALIGNMENT = 16
#: What the driver says when programs that have to be on the GPU at once do not fit, or one alone does not.
_DOES_NOT_FIT = ("too many blocks in cooperative launch", "too many resources requested for launch")


class DoesNotFit(RuntimeError):
    """The GPU cannot run a launch: not all programs at once, or not even one."""


class Pointer:
    """An address of elements of one type, where a tensor would be made for its address only."""

    __slots__ = ("address", "dtype")

    def __init__(self, address: int, dtype: torch.dtype):
        self.address, self.dtype = address, dtype

    def data_ptr(self) -> int:
        return self.address


class Started(NamedTuple):
    """A launch that was made, to be repeated by ``start`` with other values."""

    compiled: Any
    grid: tuple[int, int, int]
    stream: int
    values: list[Any]


def start(compiled: Any, grid: tuple[int, int, int], stream: int, values: Sequence[Any]) -> None:
    """Launches compiled code; values: of all parameters, pointers as integers."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    metadata = None
    if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # a profiler's
        metadata = compiled.launch_metadata(grid, stream, *values)
    else:
        enter = leave = None
    try:
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, metadata, enter, leave, *values)
    except RuntimeError as error:
        _raise_if_it_does_not_fit(error)
        raise


def _raise_if_it_does_not_fit(error: Exception) -> None:
    text = str(error)
    if isinstance(error, OutOfResources) or any(reason in text for reason in _DOES_NOT_FIT):
        raise DoesNotFit(text) from error


def _through_triton(kernel: triton.JITFunction, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> Any:
    """Compiles and launches; the compiled kernel, or None of an interpreted one."""
    try:
        return kernel[grid](**arguments)
    except (RuntimeError, OutOfResources) as error:
        _raise_if_it_does_not_fit(error)
        raise


_compiled: dict[tuple, Any] = {}


def launch(kernel: triton.JITFunction, grid: tuple[int, ...], arguments: Mapping[str, Any]) -> Started | None:
    """``kernel[grid](**arguments)``; arguments in the order of the parameters, then options.  None of an interpreted kernel."""
    if not isinstance(kernel, triton.JITFunction):
        _through_triton(kernel, grid, arguments)
        return None
    varying = kernel.do_not_specialize
    values: list[Any] = []
    key: list[Any] = [kernel]
    bits = 0
    device = -1
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            if device < 0:
                device = value.get_device()
            address = value.data_ptr()
            bits |= address
            values.append(address)
            key.append(value.dtype)
        else:
            values.append(value)
            if name not in varying:
                key.append(value)
    key.append(device)
    stream = driver.active.get_current_stream(device)
    grid = (*grid, 1, 1)[:3]
    place = tuple(key)
    compiled = None if bits % _ALIGNMENT else _compiled.get(place)
    del values[len(kernel.arg_names) :]
    if compiled is not None:
        start(compiled, grid, stream, values)
    else:
        assert list(arguments)[: len(values)] == kernel.arg_names
        compiled = _through_triton(kernel, grid, arguments)
        if not bits % _ALIGNMENT:
            if len(_compiled) >= 4096:  # strides of every kind
                _compiled.clear()
            _compiled[place] = compiled
    return Started(compiled, grid, stream, values)


class Launcher:
    """A kernel with all constants and options given, for calls that have addresses at hand.

    types: of each other parameter, which come first: a dtype for a pointer, (dtype, length) for a tuple of pointers, None for
    an integer that is not specialised, or for no pointer.
    """

    def __init__(self, kernel: triton.JITFunction, constants: Mapping[str, Any], types: Sequence[Any]):
        self._kernel, self._constants, self._types = kernel, dict(constants), tuple(types)
        self._names = kernel.arg_names[: len(types)]
        self._tail = tuple(constants[name] for name in kernel.arg_names[len(types) :])
        self._compiled: Any = None

    def __call__(self, grid: tuple[int, int, int], stream: int, values: tuple, aligned: bool) -> None:
        """values: addresses, tuples of them, integers.  aligned: whether all addresses are multiples of 16."""
        if aligned and self._compiled is not None:
            start(self._compiled, grid, stream, values + self._tail)
            return
        pointers = (self._pointer(v, t) for v, t in zip(values, self._types, strict=True))
        compiled = _through_triton(self._kernel, grid, dict(zip(self._names, pointers, strict=True)) | self._constants)
        if aligned:
            self._compiled = compiled

    @staticmethod
    def _pointer(value: Any, kind: Any) -> Any:
        if kind is None:
            return value
        if isinstance(kind, tuple):
            return tuple(Pointer(v, kind[0]) for v in value)
        return Pointer(value, kind)


_launchers: dict[tuple, Launcher] = {}


def launcher(
    kernel: triton.JITFunction, device: int, constants: Mapping[str, Any], types: Sequence[Any]
) -> Launcher:
    """The one launcher of that kind on a GPU."""
    place = (kernel, device, tuple(constants.items()), tuple(types))
    found = _launchers.get(place)
    if found is None:
        found = _launchers[place] = Launcher(kernel, constants, types)
    return found
