"""Packed sequences: the kernels of whole sequences against cuDNN, both called eagerly.

    python benchmarks/packed.py [--shapes speech,deep] [--dtypes tf32,fp16] [--seconds 50]

Lengths are uniform between a quarter of T and T.  Outputs, final states and gradients are compared with PyTorch's operations
in float64 first, and a second run has to give the same bits; where the error is more than three times cuDNN's, no time is
shown.  "gpu" is what the GPU takes of a call, by events around calls that are queued behind a long kernel, "wall" what a call
takes from one synchronisation to the next, host included.  Training is forward and backward through the op, of cuDNN through
`torch.gru`; "auto" is what the op runs by itself.  The table comes line by line; what does not fit into --seconds is left out.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import torch_gru_fuse
import torch_gru_fuse.functional as fused
from torch_gru_fuse.ops import packed_path, torch_path
from torch_gru_fuse.ops.call import PackedCall

DTYPES = {"tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Shape(NamedTuple):
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    L: int
    D: int


SHAPES = {
    "speech": Shape(512, 32, 80, 256, 2, 1),
    "tagger": Shape(512, 64, 128, 128, 1, 2),
    "deep": Shape(512, 10, 128, 256, 6, 1),
    "small": Shape(200, 64, 64, 64, 2, 1),
    "one": Shape(1000, 1, 64, 256, 2, 1),
    "short": Shape(32, 32, 128, 256, 1, 2),
    "h512": Shape(256, 16, 256, 512, 2, 1),
    "wide": Shape(128, 512, 128, 256, 1, 1),
}


class Problem:
    """Arguments of the op, and what float64 makes of them."""

    def __init__(self, shape: Shape, dtype: torch.dtype):
        torch.manual_seed(0)
        lengths, _ = torch.randint(max(1, shape.T // 4), shape.T + 1, (shape.B,)).sort(descending=True)
        lengths[0] = shape.T
        self.lengths = lengths.tolist()
        sizes = torch.tensor([int((lengths > t).sum()) for t in range(shape.T)])
        module = torch.nn.GRU(shape.I, shape.H, shape.L, bidirectional=shape.D == 2)
        # of values that fp16, bf16 and tf32 hold: operands are then the same everywhere
        grid = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16

        def make(tensor: Tensor) -> Tensor:
            return tensor.detach().to(grid).to("cuda", dtype).requires_grad_()

        self.data = make(torch.randn(sum(self.lengths), shape.I))
        self.hx = make(torch.randn(shape.L * shape.D, shape.B, shape.H))
        self.params = [make(p) for p in module._flat_weights]
        self.sizes, self.flags = sizes, (True, shape.L, 0.0, True, shape.D == 2)
        self.grads = [torch.randn(self.data.shape[0], shape.D * shape.H).to(grid).to("cuda", dtype),
                      torch.randn(self.hx.shape).to(grid).to("cuda", dtype)]  # fmt: skip

    def forward(self, function: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        with torch.no_grad():
            return list(function(self.data, self.sizes, self.hx, self.params, *self.flags))

    def train(self, function: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        results = function(self.data, self.sizes, self.hx, self.params, *self.flags)
        return [*results, *torch.autograd.grad(results, [self.data, self.hx, *self.params], self.grads)]

    def exact(self) -> list[Tensor]:
        call = self.call()
        call = call._replace(input=call.input.double(), hx=call.hx.double(), params=[p.double() for p in call.params])
        output, h_n, reserve = torch_path.gru_forward(call, True)
        grads = [g.double() for g in self.grads]
        return [output, h_n, *torch_path.gru_backward(call, *grads, output, reserve, [True] * (2 + len(call.params)))]

    def call(self) -> PackedCall:
        bias, layers, _, _, bidirectional = self.flags
        params = [p.detach() for p in self.params]
        return PackedCall(self.data.detach(), self.sizes, self.hx.detach(), params, bias, layers, bidirectional, None)


def error(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The greatest RMS error of a result, relative to its RMS value."""
    worst = 0.0
    for a, e in zip(actual, exact, strict=True):
        worst = max(worst, ((a.double() - e).square().mean().sqrt() / e.square().mean().sqrt().clamp(min=1e-30)).item())
    return worst if worst == worst else float("inf")


def milliseconds(run: Callable[[], object], seconds: float) -> tuple[float, float]:
    """Medians of what the GPU takes of a call, and of a call with its host."""
    run()
    torch.cuda.synchronize()
    wall, calls = [], 0
    until = time.perf_counter() + seconds / 2
    while calls < 3 or (time.perf_counter() < until and calls < 50):
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize()
        wall.append(time.perf_counter() - begin)
        calls += 1
    # behind a kernel that keeps the GPU busy while the host queues: events then enclose nothing but the GPU's work
    host = max(wall)
    gpu = []
    until = time.perf_counter() + seconds / 2
    while len(gpu) < 3 or (time.perf_counter() < until and len(gpu) < 30):
        torch.cuda._sleep(int(min(0.2, 1.5 * host) * 1.5e9))
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        torch.cuda.synchronize()
        gpu.append(first.elapsed_time(last))
    return statistics.median(gpu), statistics.median(wall) * 1e3


def ours(*args: object) -> tuple[Tensor, Tensor]:
    """The kernels, also where the planner prefers cuDNN."""
    before = os.environ.get("TORCH_GRU_FUSE_KERNELS")
    os.environ["TORCH_GRU_FUSE_KERNELS"] = "triton"
    try:
        return fused.gru_packed(*args)
    finally:
        if before is None:
            del os.environ["TORCH_GRU_FUSE_KERNELS"]
        else:
            os.environ["TORCH_GRU_FUSE_KERNELS"] = before


def lines(name: str, shape: Shape, dtype_name: str, seconds: float) -> Iterator[str]:
    problem = Problem(shape, DTYPES[dtype_name])
    os.environ["TORCH_GRU_FUSE_KERNELS"] = "triton"
    plans = {training: packed_path.plan_of(problem.call(), training=training) for training in (False, True)}
    del os.environ["TORCH_GRU_FUSE_KERNELS"]
    exact = problem.exact()
    for training, plan in plans.items():
        start = f"{name:7} {dtype_name:5} {'train' if training else 'infer':6}"
        if plan.whole is None:
            yield f"{start} no kernel: {plan.reason}"
            continue
        run = problem.train if training else problem.forward
        results = run(ours)
        torch_gru_fuse.check_errors()
        wanted = exact[: len(results)]
        own, theirs = error(results, wanted), error(run(torch.gru), wanted)
        if own > 3 * theirs + 1e-6:
            yield f"{start} WRONG: error {own:.1e}, cuDNN's {theirs:.1e}  {plan.whole}"
            continue
        if not all(torch.equal(a, b) for a, b in zip(results, run(ours), strict=True)):
            yield f"{start} WRONG: another run gives other bits  {plan.whole}"
            continue
        gpu, wall = milliseconds(functools.partial(run, ours), seconds / 4)
        cudnn_gpu, cudnn_wall = milliseconds(functools.partial(run, torch.gru), seconds / 4)
        torch_gru_fuse.check_errors()
        auto = packed_path.plan_of(problem.call(), training=training).kernel
        yield (
            f"{start}{cudnn_gpu:9.3f}{gpu:9.3f}{cudnn_gpu / gpu:7.2f}x{cudnn_wall:9.3f}{wall:9.3f}{cudnn_wall / wall:7.2f}x"
            f" {own:8.1e} {theirs:8.1e} {auto:6} {plan.whole}{f' {plan.backward}' if training else ''}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--dtypes", default="tf32,fp16")
    parser.add_argument("--seconds", type=float, default=50.0)
    arguments = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = True
    names, dtypes = arguments.shapes.split(","), arguments.dtypes.split(",")
    until = time.perf_counter() + arguments.seconds
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}; ms")
    columns = f"{'cuDNN gpu':>9}{'ours':>9}{'':8}{'wall':>9}{'ours':>9}{'':8}"
    print(f"{'shape':7} {'dtype':5} {'':6}{columns} rms error, cuDNN's, auto, plan")
    left = len(names) * len(dtypes)
    for name in names:
        for dtype_name in dtypes:
            rest = until - time.perf_counter()
            if rest < 1:
                print(f"{name:7} {dtype_name:5} left out: --seconds are over")
                continue
            try:
                for line in lines(name, SHAPES[name], dtype_name, min(2.0, 0.3 * rest / left)):
                    print(line, flush=True)
            except RuntimeError as reason:  # the next shape may still run
                print(f"{name:7} {dtype_name:5} {str(reason).splitlines()[0]}", flush=True)
            left -= 1


if __name__ == "__main__":
    main()
