"""Time that a loop over a cell takes to compile: with the rewrite, which rolls it up, and without.

    python benchmarks/rollup.py > docs/results/rollup-compile-time.txt  # on a CPU
    python benchmarks/rollup.py --device cuda --steps 512 --at-once --limit 300  # docs/results/rollup-512-h200.txt
    python benchmarks/rollup.py --device cuda --case cell 512 on inference  # docs/results/rollup-cell-h200.txt

Each number is the first call, and for training the first backward, of a new process with empty caches; the results are then
compared with float64.  The compiler of the CPU code is part of it, but for --processor-time, which counts what the process
itself does and suits a busy host.  --at-once: all cases side by side, one thread each, on a host with a core for each.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

CASES = (
    ("cell", 64, "off"), ("cell", 64, "on"), ("cell", 128, "off"), ("cell", 128, "on"), ("cell", 512, "on"),
    ("hand-written", 64, "off"), ("hand-written", 64, "on"), ("hand-written", 512, "on"),
)  # fmt: skip


def measure(kind: str, steps: int, rewrite: bool, training: bool, device: str, clock: Callable[[], float]) -> None:
    import torch
    from torch import nn

    import torch_gru_fuse

    class Cell(nn.Module):
        def __init__(self, inputs: int, hidden: int):
            super().__init__()
            self.x, self.h = nn.Linear(inputs, 3 * hidden), nn.Linear(hidden, 3 * hidden)

        def forward(self, x, h):
            x_r, x_z, x_n = self.x(x).chunk(3, 1)
            h_r, h_z, h_n = self.h(h).chunk(3, 1)
            r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
            return (1 - z) * torch.tanh(x_n + r * h_n) + z * h

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRUCell(32, 64) if kind == "cell" else Cell(32, 64)

        def forward(self, x):
            h, outputs = x.new_zeros(x.shape[1], 64), []
            for t in range(steps):
                h = self.cell(x[t], h)
                outputs.append(h)
            return torch.stack(outputs)

    torch.set_num_threads(1)
    torch.compile(lambda x: x + 1)(torch.ones(3, device=device))  # what is imported once
    if rewrite:
        torch_gru_fuse.enable()
    model, x = Loop().to(device), torch.randn(steps, 8, 32, device=device)
    function = torch.compile(model, fullgraph=True)
    start = clock()
    with torch.set_grad_enabled(training):
        output = function(x)
        if training:
            output.sum().backward()
    taken = clock() - start

    weights = [*model.parameters()] if training else []
    results = [output, *(p.grad for p in weights)]
    model.zero_grad()
    right_output = model.double()(x.double())
    expected = [right_output, *(torch.autograd.grad(right_output.sum(), weights) if training else ())]
    for result, right in zip(results, expected, strict=True):
        error = (result.double() - right).norm() / right.norm()
        if not error < 2e-3:  # products may be rounded to TF32, whose unit roundoff is 4.9e-4
            raise RuntimeError(f"a result is wrong: relative RMS error {error:.1e}")
    print(f"{taken:.1f}")


def seconds(limit: float, device: str, processor_time: bool, *case: str) -> str:
    with tempfile.TemporaryDirectory() as cache:
        caches = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
        environment = {**os.environ, **caches, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        clock = ["--processor-time"] if processor_time else []
        command = [sys.executable, __file__, "--in-this-process", "--device", device, *clock, "--case", *case]
        try:
            result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit, check=True)
        except subprocess.TimeoutExpired:
            return f"> {limit:.0f}"
        except subprocess.CalledProcessError as error:
            raise SystemExit(error.stderr) from None
    return result.stdout.split()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs=4, help="one case alone: kind, steps, on or off, training or inference")
    parser.add_argument("--in-this-process", action="store_true", help="the case, without caches of its own")
    parser.add_argument("--limit", type=float, default=600, help="seconds after which a compilation is given up")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, help="all cases with so many, instead of those chosen for a CPU")
    parser.add_argument("--processor-time", action="store_true", help="of the process that compiles, instead of elapsed time")
    parser.add_argument("--at-once", action="store_true", help="all cases side by side")
    arguments = parser.parse_args()
    if arguments.case and not arguments.in_this_process:
        print(seconds(arguments.limit, arguments.device, arguments.processor_time, *arguments.case))
        return
    if arguments.case:
        kind, steps, rewrite, mode = arguments.case
        clock = time.process_time if arguments.processor_time else time.perf_counter
        measure(kind, int(steps), rewrite == "on", mode == "training", arguments.device, clock)
        return
    import torch

    cases = CASES
    if arguments.steps:
        cases = tuple((kind, arguments.steps, on) for kind in ("cell", "hand-written") for on in ("off", "on"))
    print(f"Seconds until the first call has returned; torch {torch.__version__}, {platform.machine()}, {arguments.device},")
    print("one thread; B=8, I=32, H=64; python benchmarks/rollup.py\n")
    print(f"{'loop over':14} {'steps':>5}  {'rewrite':7}  {'inference':>10}  {'training':>10}", flush=True)
    with ThreadPoolExecutor(2 * len(cases) if arguments.at_once else 1) as pool:
        times = [
            [
                pool.submit(
                    seconds, arguments.limit, arguments.device, arguments.processor_time, kind, str(steps), rewrite, mode
                )
                for mode in ("inference", "training")
            ]
            for kind, steps, rewrite in cases
        ]
        for (kind, steps, rewrite), (inference, training) in zip(cases, times, strict=True):
            line = f"{kind:14} {steps:5}  {rewrite:7}  {inference.result():>10}  {training.result():>10}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
