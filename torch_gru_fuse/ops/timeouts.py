"""Waits between programs that ran out: who finds out, when, and what the error says.

A kernel whose wait runs out writes the id of its launch to a word of the host, one for each GPU, and ends with NaN in its
results.  Nobody synchronises for that.  The word is read where the host looks anyway: at the start of each call of an op, at
the end of `torch.cuda.synchronize`, and by `check_errors`.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import NamedTuple

import torch
from torch import Tensor

from torch_gru_fuse import torch_hooks

_DEFAULT_SECONDS = "10"


class Call(NamedTuple):
    """What an error says about a launch."""

    op: str
    sizes: str
    kernel: str
    plan: str
    timeout_ns: int


class _Word(NamedTuple):
    """Memory of the host that a GPU writes to."""

    tensor: Tensor  # kept for ever: captured graphs hold its address
    value: ctypes.c_int32


_words: dict[int, _Word] = {}  # by GPU
_ids: dict[Call, int] = {}
_calls: list[Call] = []  # by id, from 1 on; kept for ever, as captured graphs hold ids


def timeout_ns() -> int:
    """TORCH_GRU_FUSE_TIMEOUT_S in nanoseconds."""
    return _nanoseconds(os.environ.get("TORCH_GRU_FUSE_TIMEOUT_S", _DEFAULT_SECONDS))


@functools.lru_cache(maxsize=64)
def _nanoseconds(text: str) -> int:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds <= 1e6:
        raise ValueError(f"TORCH_GRU_FUSE_TIMEOUT_S is {text!r}, expected a number of seconds greater than 0, up to 1e6")
    return max(1, int(seconds * 1e9))


def word_of(device: int) -> int:
    """Address of the word that a GPU writes to."""
    if device not in _words:
        if not _words:
            torch_hooks.after_synchronize(_check_all)
        tensor = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        _words[device] = _Word(tensor, ctypes.c_int32.from_address(tensor.data_ptr()))
    return _words[device].tensor.data_ptr()


def id_of(call: Call) -> int:
    """What the kernels of such a call write."""
    if call not in _ids:
        _calls.append(call)
        _ids[call] = len(_calls)
    return _ids[call]


def check(device: int) -> None:
    """Raises the error of a launch on that GPU, if it has said so by now; once."""
    word = _words.get(device)
    if word is not None and word.value.value:
        _raise(device, word)


def _raise(device: int, word: _Word) -> None:
    if torch.cuda.is_current_stream_capturing():  # the next call says it: an exception would spoil the graph
        return
    op, sizes, kernel, plan, nanoseconds = _calls[word.value.value - 1]
    word.value.value = 0
    raise RuntimeError(
        f"torch_gru_fuse.{op}: the {kernel} kernel gave up on cuda:{device}, one of its programs has waited "
        f"{nanoseconds / 1e9:g} s for another. Its results hold NaN. Sizes: {sizes}. Plan: {plan}. "
        f"Set TORCH_GRU_FUSE_KERNELS=torch to run another kernel, TORCH_GRU_FUSE_TIMEOUT_S to change the time limit (seconds)."
    )


def _check_all() -> None:
    for device in list(_words):
        check(device)


def check_errors() -> None:
    """Wait for all GPUs on which whole sequences have run, and raise the error of a kernel that gave up waiting.

    `torch.cuda.synchronize` and later calls of the ops on the same GPU raise it, too.

    Raises:
        RuntimeError: a wait between programs took longer than TORCH_GRU_FUSE_TIMEOUT_S (10 seconds if not set); the
            results of that call hold NaN.
    """
    for device in list(_words):
        torch.cuda.synchronize(device)
    _check_all()
