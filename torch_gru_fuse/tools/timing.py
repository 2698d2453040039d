"""How long calls take: medians, on CUDA by events, also of calls replayed from a CUDA graph."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

_ENOUGH_MS = 20.0  # a way is timed until this is over ..
_MOST_CALLS = 500  # .. or it was called so often, but always as often as --repeat says
_SHORT_MS, _BLOCK_MS = 0.1, 1.0  # calls shorter than the one are captured many in a graph, which takes about the other


def milliseconds(run: Callable[[], object], device: torch.device, repeat: int) -> float:
    """Median time of a call; of a `Replay`, of one of the calls in it."""
    for _ in range(2):
        run()
    times: list[float] = []
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    while len(times) < repeat or (sum(times) < _ENOUGH_MS and len(times) < _MOST_CALLS):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            run()
            times.append((time.perf_counter() - begin) * 1e3)
    return median(times) / getattr(run, "calls", 1)


@dataclass(frozen=True)
class Replay:
    """A CUDA graph with so many calls, one after the other; each replay puts its last results where the first put them."""

    graph: torch.cuda.CUDAGraph
    calls: int
    results: Any = None

    def __call__(self) -> None:
        self.graph.replay()


def calls_a_graph(milliseconds: float) -> int:
    """How many calls of that length to capture: starting a graph, and the clock of the events, would count in a short one."""
    if milliseconds >= _SHORT_MS:
        return 1
    return min(100, max(1, round(_BLOCK_MS / max(milliseconds, 1e-3))))


def graph_of(run: Callable[[], object]) -> Replay:
    """A CUDA graph of a call, which runs before; of many if it is short."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    replay = _capture(run, 1)
    calls = calls_a_graph(milliseconds(replay, torch.device("cuda"), 3))
    return replay if calls == 1 else _capture(run, calls)


def _capture(run: Callable[[], object], calls: int) -> Replay:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            results = run()
    return Replay(graph, calls, results)
