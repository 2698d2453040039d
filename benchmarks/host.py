"""What a call costs the host on a GPU: wall time of calls that nothing waits for.

    python benchmarks/host.py            # gru beside cuDNN and an op that only allocates: docs/results/host-h200.txt
    python benchmarks/host.py --cells    # compiled gru_cell beside Inductor alone: docs/results/cell-compiled-h200.txt
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

import torch_gru_fuse

DEVICE = torch.device("cuda")
#: T, B, H, layers, directions, dtype
GRUS = (
    (1, 1, 512, 2, 1, torch.float16), (1, 1, 512, 2, 1, torch.float32), (4, 8, 64, 1, 1, torch.float16),
    (4, 8, 256, 1, 1, torch.float16), (4, 8, 256, 1, 1, torch.float32), (4, 8, 256, 6, 1, torch.float16),
    (4, 8, 256, 1, 2, torch.float16),
)  # fmt: skip
#: B, H
CELLS = ((1, 512), (10, 256), (64, 1024), (256, 256))

library = torch.library.Library("torch_gru_fuse_host", "DEF")
library.define(
    "empty(Tensor input, Tensor hx, Tensor[] params, bool has_biases, int num_layers, float dropout, bool train, "
    "bool bidirectional, bool batch_first) -> (Tensor, Tensor)"
)
library.impl(
    "empty", lambda x, hx, *_: (x.new_empty(*x.shape[:2], hx.shape[2]), hx.new_empty(hx.shape)), "CUDA"
)


def microseconds(*ways: Callable[[], object], calls: int = 100, rounds: int = 15) -> list[float]:
    """Of a call of each; they take turns, for a host's speed changes from second to second."""
    for run in ways:
        for _ in range(20):
            run()
    torch.cuda.synchronize()
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for run, of_way in zip(ways, times, strict=True):
            begin = time.perf_counter()
            for _ in range(calls):
                run()
            of_way.append((time.perf_counter() - begin) / calls * 1e6)
            torch.cuda.synchronize()
    return [median(of_way) for of_way in times]


def gru(T: int, B: int, H: int, L: int, D: int, dtype: torch.dtype) -> None:
    module = nn.GRU(H, H, L, bidirectional=D == 2).to(DEVICE, dtype)
    x, hx = torch.randn(T, B, H, device=DEVICE, dtype=dtype), torch.zeros(L * D, B, H, device=DEVICE, dtype=dtype)
    arguments = (x, hx, module._flat_weights, True, L, 0.0, False, D == 2, False)
    ops = torch.ops.torch_gru_fuse_host.empty, torch.ops.torch_gru_fuse.gru, torch.gru
    empty, ours, own = microseconds(*(lambda op=op: op(*arguments) for op in ops))
    print(f"T{T} B{B} H{H} L{L} D{D} {str(dtype)[6:]}: empty {empty:.1f} ours {ours:.1f} cuDNN {own:.1f} us; "
          f"above empty {ours - empty:.1f}", flush=True)  # fmt: skip


def cell(B: int, H: int, dtype: torch.dtype) -> None:
    times = []
    for options in ({}, {"mode": "reduce-overhead"}):
        for rewrite in (False, True):
            torch._dynamo.reset()
            module = nn.GRUCell(H, H).to(DEVICE, dtype)
            x, h = torch.randn(B, H, device=DEVICE, dtype=dtype), torch.zeros(B, H, device=DEVICE, dtype=dtype)
            model = torch.compile(module, **options)
            if rewrite:
                torch_gru_fuse.enable()
            try:
                times += microseconds(lambda model=model, x=x, h=h: model(x, h), calls=200, rounds=7)
            finally:
                torch_gru_fuse.disable()
    print(f"cell B{B} H{H} {str(dtype)[6:]}: inductor {times[0]:.1f} ours {times[1]:.1f} ({times[0] / times[1]:.2f}x)  "
          f"reduce-overhead {times[2]:.1f} {times[3]:.1f} ({times[2] / times[3]:.2f}x)", flush=True)  # fmt: skip


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", action="store_true")
    if parser.parse_args().cells:
        for B, H in CELLS:
            for dtype in (torch.float16, torch.float32):
                cell(B, H, dtype)
    else:
        for sizes in GRUS:
            gru(*sizes)


if __name__ == "__main__":
    main()
