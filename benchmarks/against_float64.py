"""What the benchmarks of packed sequences and of resets have in common; nothing to run."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DTYPES = {"tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Shape(NamedTuple):
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    L: int
    D: int

    def __str__(self):
        return "x".join(map(str, self))


@contextlib.contextmanager
def kernels(value: str) -> Iterator[None]:
    """With TORCH_GRU_FUSE_KERNELS set."""
    before = os.environ.get("TORCH_GRU_FUSE_KERNELS")
    os.environ["TORCH_GRU_FUSE_KERNELS"] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCH_GRU_FUSE_KERNELS"]
        else:
            os.environ["TORCH_GRU_FUSE_KERNELS"] = before


def error(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The greatest RMS error of a result, relative to its RMS value."""
    worst = 0.0
    for a, e in zip(actual, exact, strict=True):
        worst = max(worst, ((a.double() - e).square().mean().sqrt() / e.square().mean().sqrt().clamp(min=1e-30)).item())
    return worst if worst == worst else float("inf")


def medians(measure: Callable[[], float], seconds: float, least: int) -> float:
    """Of so many measurements at least, and of more while there is time."""
    until, values = time.perf_counter() + seconds, []
    while len(values) < least or (time.perf_counter() < until and len(values) < 50):
        values.append(measure())
    return statistics.median(values)


def timed(run: Callable[[], object]) -> float:
    """Milliseconds of a call, from one synchronisation to the next."""
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - begin)
