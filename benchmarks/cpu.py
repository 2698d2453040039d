"""What the ops cost on a CPU, where they run PyTorch's own operations, beside eager PyTorch and Inductor alone.

    python benchmarks/cpu.py

One thread; the least of several timings, because nothing but the program itself should be in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

import torch_gru_fuse

#: T, B, I, H, layers, bidirectional
GRUS = ((8, 16, 16, 32, 1, False), (50, 32, 64, 128, 2, False), (100, 8, 32, 64, 2, True), (30, 64, 256, 256, 1, False))
#: B, I, H
CELLS = ((1, 16, 32), (32, 64, 128), (128, 256, 512))


def milliseconds(run: Callable[[], object], calls: int, rounds: int = 5) -> float:
    run()
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        best = min(best, (time.perf_counter() - begin) / calls * 1e3)
    return best


def forward_and_training(model: Callable, module: nn.Module, inputs: tuple, calls: int) -> tuple[float, float]:
    def train() -> None:
        out = model(*inputs)
        torch.autograd.grad((out[0] if isinstance(out, tuple) else out).sum(), list(module.parameters()))

    with torch.no_grad():
        forward = milliseconds(lambda: model(*inputs), calls)
    return forward, milliseconds(train, calls)


def main() -> None:
    torch.set_num_threads(1)
    print(f"# torch {torch.__version__}, one thread, milliseconds: forward, forward + backward")
    for T, B, I, H, L, bidirectional in GRUS:
        module, x = nn.GRU(I, H, L, bidirectional=bidirectional), torch.randn(T, B, I)
        eager = forward_and_training(module, module, (x,), 5)
        torch._dynamo.reset()
        with torch_gru_fuse.enable():
            fused = forward_and_training(torch.compile(module, fullgraph=True), module, (x,), 5)
        print(f"gru {T=} {B=} {I=} {H=} {L=} {bidirectional=}: eager {eager[0]:.2f} {eager[1]:.2f}, "
              f"compiled with the op {fused[0]:.2f} {fused[1]:.2f}")  # fmt: skip
    for B, I, H in CELLS:
        module, inputs = nn.GRUCell(I, H), (torch.randn(B, I), torch.randn(B, H))
        torch._dynamo.reset()
        alone = forward_and_training(torch.compile(module, fullgraph=True), module, inputs, 50)

        def call(x, h, module=module):
            weights = (module.weight_ih, module.weight_hh, module.bias_ih, module.bias_hh)
            return torch.ops.torch_gru_fuse.gru_cell(x, h, *weights)

        torch._dynamo.reset()
        fused = forward_and_training(torch.compile(call, fullgraph=True), module, inputs, 50)
        print(f"gru_cell {B=} {I=} {H=}: Inductor alone {alone[0]:.3f} {alone[1]:.3f}, the op {fused[0]:.3f} {fused[1]:.3f}")


if __name__ == "__main__":
    main()
