"""Launches of compiled kernels at the cost of a lookup.

Triton's launcher inspects every argument of every call, which takes longer than many of these kernels run.  Here the first call
of a kind goes through it, and what it compiled is kept by all that selects code: the kernel, the GPU, types of tensors,
constants, options, and integers that Triton specialises.  It also specialises pointers by their alignment: only launches whose
pointers are all multiples of 16, as nearly all are, take the short way.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

log = logging.getLogger("torch_gru_fuse")

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


_seeing = threading.Lock()  # one at a time changes what a launcher of Triton calls


class Code:
    """What Triton has compiled, to be launched with addresses.

    Triton's launcher is a function of Python around one of C, and takes as long again.  What it passes to that is seen at the
    first launch; if that is the values after a beginning that depends on the code alone, later launches pass it themselves.
    """

    __slots__ = ("_direct", "compiled")

    def __init__(self, compiled: Any):
        self.compiled = compiled
        self._direct: Callable[..., None] | None = None

    def start(self, grid: tuple[int, int, int], stream: int, values: tuple[Any, ...]) -> None:
        """values: of all parameters, pointers as integers."""
        enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
        try:
            if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):  # a profiler's
                metadata = self.compiled.launch_metadata(grid, stream, *values)
                self._run(grid, stream, values, metadata, enter, leave)
            elif self._direct is None:
                with _seeing:
                    self._direct = self._seen(grid, stream, values)
            else:
                self._direct(grid, stream, values)
        except RuntimeError as error:
            _raise_if_it_does_not_fit(error)
            raise

    def _run(self, grid: tuple[int, int, int], stream: int, values: tuple[Any, ...], *hooks: Any) -> None:
        compiled = self.compiled
        compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, *hooks, *values)

    def _seen(self, grid: tuple[int, int, int], stream: int, values: tuple[Any, ...]) -> Callable[..., None]:
        """Launches as Triton does; what repeats that."""
        launcher, function = self.compiled.run, self.compiled.function
        fields = getattr(launcher, "__dict__", {})
        through_triton = self._run_without_hooks
        if "launch" not in fields or fields.get("global_scratch_size") != 0 or fields.get("profile_scratch_size") != 0:
            self._run_without_hooks(grid, stream, values)
            return through_triton
        calls: list[tuple[Any, ...]] = []
        to_driver = launcher.launch

        def record(*args: Any) -> None:
            calls.append(args)
            to_driver(*args)

        launcher.launch = record
        try:
            self._run_without_hooks(grid, stream, values)
        finally:
            launcher.launch = to_driver
        if len(calls) != 1 or calls[0][:5] != (*grid, stream, function):
            return through_triton
        after, count = calls[0][5:], len(values)
        if len(after) > count and after[len(after) - count :] == values:
            beginning = (function, *after[: len(after) - count])
            return lambda grid, stream, values: to_driver(*grid, stream, *beginning, *values)
        if after and after[-1] == values:
            beginning = (function, *after[:-1])
            return lambda grid, stream, values: to_driver(*grid, stream, *beginning, values)
        return through_triton

    def _run_without_hooks(self, grid: tuple[int, int, int], stream: int, values: tuple[Any, ...]) -> None:
        self._run(grid, stream, values, None, None, None)


class Started(NamedTuple):
    """A launch that was made, to be repeated by ``code.start`` with other values."""

    code: Code
    grid: tuple[int, int, int]
    stream: int
    values: list[Any]


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


_compiled: dict[tuple, Code] = {}


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
    code = None if bits % _ALIGNMENT else _compiled.get(place)
    del values[len(kernel.arg_names) :]
    if code is not None:
        code.start(grid, stream, tuple(values))
    else:
        assert list(arguments)[: len(values)] == kernel.arg_names
        code = Code(_through_triton(kernel, grid, arguments))
        if not bits % _ALIGNMENT:
            if len(_compiled) >= 4096:  # strides of every kind
                _compiled.clear()
            _compiled[place] = code
    return Started(code, grid, stream, values)


class Launcher:
    """A kernel with all constants and options given, for calls that have addresses at hand.

    types: of each other parameter, which come first: a dtype for a pointer, (dtype, length) for a tuple of pointers, None for
    an integer that is not specialised, or for no pointer.
    """

    def __init__(self, kernel: triton.JITFunction, constants: Mapping[str, Any], types: Sequence[Any]):
        self._kernel, self._constants, self._types = kernel, dict(constants), tuple(types)
        self._names = kernel.arg_names[: len(types)]
        self._tail = tuple(constants[name] for name in kernel.arg_names[len(types) :])
        self._code: Code | None = None
        self._compiling = threading.Lock()

    def __call__(self, grid: tuple[int, int, int], stream: int, values: tuple, aligned: bool) -> None:
        """values: addresses, tuples of them, integers.  aligned: whether all addresses are multiples of 16."""
        if aligned and self._code is not None:
            self._code.start(grid, stream, values + self._tail)
            return
        with self._compiling:  # a thread may be at it
            if not aligned or self._code is None:
                compiled = _through_triton(self._kernel, grid, self._arguments(values))
                if aligned:
                    self._code = Code(compiled)
                return
        self._code.start(grid, stream, values + self._tail)

    @property
    def is_new(self) -> bool:
        """Whether there is code to be compiled, or to be waited for."""
        return self._code is None and isinstance(self._kernel, triton.JITFunction)

    def load(self) -> None:
        """Compiles and loads, on the current device, what launches with aligned addresses run, and launches nothing."""
        with self._compiling:
            if self.is_new:
                compiled = self._kernel.warmup(grid=(1,), **self._arguments(self._examples()))
                compiled.run  # noqa: B018  (asking for it loads)
                self._code = Code(compiled)

    def _examples(self) -> Iterator[Any]:
        """Values that stand for all."""
        for name, kind in zip(self._names, self._types, strict=True):
            if isinstance(kind, tuple):
                yield (0,) * kind[1]
            elif kind is None and name not in self._kernel.do_not_specialize:
                yield None
            else:
                yield 0

    def _arguments(self, values: Iterable[Any]) -> dict[str, Any]:
        pointers = (self._pointer(v, t) for v, t in zip(values, self._types, strict=True))
        return dict(zip(self._names, pointers, strict=True)) | self._constants

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


_loaders = threading.Semaphore(4)  # a model with many GRUs has more kernels than it has cores


def load_ahead(launchers: Iterable[Launcher], device: int) -> None:
    """Starts to load them on a GPU, each in a thread: most of the time compilers are at work that leave Python alone.

    A launch does not wait for a thread whose turn has not come, and what goes wrong in one is left for the launch, which goes
    the same way.
    """
    launchers = [run for run in launchers if run.is_new]
    if not launchers or torch.cuda.is_current_stream_capturing():  # loading would end that
        return
    driver.active  # noqa: B018  (is made here, once)

    def load(run: Launcher) -> None:
        try:
            with _loaders, torch.cuda.device(device):
                run.load()
        except Exception as error:
            log.debug("loading ahead failed: %s", error)

    for run in launchers:
        threading.Thread(target=load, args=(run,), name="torch_gru_fuse-load").start()
