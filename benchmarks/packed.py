"""Packed sequences: the kernels of whole sequences against cuDNN, both called eagerly.

    python benchmarks/packed.py [--shapes speech,deep] [--dtypes tf32,fp16] [--seconds 50]
    python benchmarks/packed.py --grid --seconds 300 --json docs/results/packed-sweep-h200.json

Lengths are uniform between a quarter of T and T.  Outputs, final states and gradients are compared with PyTorch's operations
in float64 first, and a second run has to give the same bits; where the error is more than three times cuDNN's, no time is
shown.  "gpu" is what the GPU takes of a call, by events: of cuDNN around the replay of a CUDA graph, of ours, which no graph
may hold, around a call that is queued behind a long kernel; "wall" is what a call takes from one synchronisation to the next,
host included.  Weights lie as cuDNN wants them.  Training is forward and backward through the op, of cuDNN through
`torch.gru`; "auto" is what the op runs by itself.  The table comes line by line; what does not fit into --seconds is left out.
--grid runs a grid of sizes in their place, whose kernels several processes compile first.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from against_float64 import DTYPES, Shape, error, kernels, medians, timed
from torch import Tensor

import torch_gru_fuse
import torch_gru_fuse.functional as fused
from torch_gru_fuse.ops import packed_path, torch_path
from torch_gru_fuse.ops.call import PackedCall
from torch_gru_fuse.tools.timing import graph_of, milliseconds

COLUMNS = (
    "T", "B", "I", "H", "layers", "directions", "dtype", "training", "cudnn_gpu_ms", "gpu_ms", "cudnn_wall_ms", "wall_ms",
    "cudnn_rms_error", "rms_error", "plan",
)  # fmt: skip

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

#: Batches by H, as far as there are plans.
GRID_BATCHES = {
    16: (1, 64, 512), 64: (1, 16, 128, 1024), 128: (1, 32, 128, 512), 256: (1, 8, 32, 128, 512), 512: (1, 8, 32, 128, 512),
    1024: (1, 16, 64),
}  # fmt: skip
GRID_STEPS, GRID_STACKS = (32, 100), ((1, 1), (2, 1), (1, 2))  # layers, directions


def grid() -> Iterator[list[Shape]]:
    """Lists of shapes that differ in T, so that they have their kernels in common."""
    for H, batches in GRID_BATCHES.items():
        for B, (L, D) in itertools.product(batches, GRID_STACKS):
            yield [Shape(T, B, max(64, H // 2), H, L, D) for T in GRID_STEPS]


class Problem:
    """Arguments of the op, and what float64 makes of them."""

    def __init__(self, shape: Shape, dtype: torch.dtype):
        torch.manual_seed(0)
        lengths, _ = torch.randint(max(1, shape.T // 4), shape.T + 1, (shape.B,)).sort(descending=True)
        lengths[0] = shape.T
        self.lengths = lengths.tolist()
        sizes = torch.tensor([int((lengths > t).sum()) for t in range(shape.T)])
        module = torch.nn.GRU(shape.I, shape.H, shape.L, bidirectional=shape.D == 2)
        self.shape, self.dtype = shape, dtype
        # of values that fp16, bf16 and tf32 hold: operands are then the same everywhere
        grid = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16

        def make(tensor: Tensor) -> Tensor:
            return tensor.detach().to(grid).to("cuda", dtype).requires_grad_()

        self.data = make(torch.randn(sum(self.lengths), shape.I))
        self.hx = make(torch.randn(shape.L * shape.D, shape.B, shape.H))
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(p.to(grid))
        module.to("cuda", dtype)  # and lets cuDNN have them as it wants them
        self.params = list(module._flat_weights)
        self.sizes, self.flags = sizes, (True, shape.L, 0.0, True, shape.D == 2)
        self.grads = [torch.randn(self.data.shape[0], shape.D * shape.H).to(grid).to("cuda", dtype),
                      torch.randn(self.hx.shape).to(grid).to("cuda", dtype)]  # fmt: skip

    def forward(self, function: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        with torch.no_grad():
            return list(function(self.data, self.sizes, self.hx, self.params, *self.flags))

    def train(self, function: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        results = function(self.data, self.sizes, self.hx, self.params, *self.flags)
        return [*(r.detach() for r in results), *torch.autograd.grad(results, [self.data, self.hx, *self.params], self.grads)]

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


def on_gpu(run: Callable[[], object], host_ms: float) -> float:
    """What the GPU takes of a call; host_ms: of a kernel behind which it is queued, so that the host is done before."""
    torch.cuda._sleep(int(2e6 * min(200.0, host_ms)))  # cycles
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last)


def ours(*args: object) -> tuple[Tensor, Tensor]:
    """The kernels, also where the planner prefers cuDNN."""
    with kernels("triton"):
        return fused.gru_packed(*args)


def rows(problem: Problem, seconds: float) -> Iterator[tuple[str, list | None]]:
    """Of inference and training: what to print, and what COLUMNS say, if there is something."""
    shape, dtype = problem.shape, problem.dtype
    with kernels("triton"):
        plans = {training: packed_path.plan_of(problem.call(), training=training) for training in (False, True)}
    exact = problem.exact()
    for training, plan in plans.items():
        start = "train " if training else "infer "
        if plan.whole is None:
            yield f"{start} no kernel: {plan.reason}", None
            continue
        run = problem.train if training else problem.forward
        results = run(ours)
        torch_gru_fuse.check_errors()
        wanted = exact[: len(results)]
        own, theirs = error(results, wanted), error(run(torch.gru), wanted)
        if own > 3 * theirs + 1e-6:
            yield f"{start} WRONG: error {own:.1e}, cuDNN's {theirs:.1e}  {plan.whole}", None
            continue
        if not all(torch.equal(a, b) for a, b in zip(results, run(ours), strict=True)):
            yield f"{start} WRONG: another run gives other bits  {plan.whole}", None
            continue
        own_call, cudnn_call = functools.partial(run, ours), functools.partial(run, torch.gru)
        wall, cudnn_wall = (medians(functools.partial(timed, call), seconds / 4, 9) for call in (own_call, cudnn_call))
        gpu = medians(functools.partial(on_gpu, own_call, 3 * wall + 1), seconds / 4, 5)
        cudnn_gpu = milliseconds(graph_of(cudnn_call), torch.device("cuda"), 5)
        torch_gru_fuse.check_errors()
        auto = packed_path.plan_of(problem.call(), training=training).kernel
        text = f"{plan.whole}{f' {plan.backward}' if training else ''}"
        yield (
            f"{start}{cudnn_gpu:9.3f}{gpu:9.3f}{cudnn_gpu / gpu:7.2f}x{cudnn_wall:9.3f}{wall:9.3f}{cudnn_wall / wall:7.2f}x"
            f" {own:8.1e} {theirs:8.1e} {auto:6} {text}",
            [*shape, str(dtype).removeprefix("torch."), training, *(round(ms, 4) for ms in (cudnn_gpu, gpu, cudnn_wall, wall)),
             float(f"{theirs:.2e}"), float(f"{own:.2e}"), text],
        )  # fmt: skip


def prepare_kernels(shapes: Sequence[Shape], dtype: torch.dtype) -> None:
    """Compiles the kernels of shapes; what fails here fails again, and is said, where it is measured."""
    torch.backends.cudnn.allow_tf32 = True
    try:
        problem = Problem(shapes[0], dtype)
        for run in (problem.forward, problem.train):
            run(ours)
        torch.cuda.synchronize()
    except RuntimeError:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--dtypes", default="tf32,fp16")
    parser.add_argument("--seconds", type=float, default=50.0)
    parser.add_argument("--grid", action="store_true", help="a grid of sizes in the place of --shapes")
    parser.add_argument("--json", help="file for what was measured, as columns and rows")
    arguments = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = True
    dtypes = arguments.dtypes.split(",")
    until = time.perf_counter() + arguments.seconds
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}; ms")
    columns = f"{'cuDNN gpu':>9}{'ours':>9}{'':8}{'wall':>9}{'ours':>9}{'':8}"
    print(f"{'shape':22} {'dtype':5} {'':6}{columns} rms error, cuDNN's, auto, plan")
    shapes = {name: SHAPES[name] for name in arguments.shapes.split(",")}
    if arguments.grid:
        shapes = {str(shape): shape for some in grid() for shape in some}
        with multiprocessing.get_context("spawn").Pool(max(1, (os.cpu_count() or 2) - 1)) as pool:
            pool.starmap(prepare_kernels, [(some, DTYPES[name]) for some in grid() for name in dtypes], chunksize=1)
        print(f"kernels compiled, {until - time.perf_counter():.0f} s left", flush=True)
    left, measured = len(shapes) * len(dtypes), []
    for name, shape in shapes.items():
        for dtype_name in dtypes:
            rest = until - time.perf_counter()
            start = f"{name:22} {dtype_name:5}"
            if rest < 1:
                print(f"{start} left out: --seconds are over")
                continue
            try:
                for line, row in rows(Problem(shape, DTYPES[dtype_name]), min(2.0, 0.3 * rest / left)):
                    print(start, line, flush=True)
                    measured += [] if row is None else [row]
            except RuntimeError as reason:  # the next shape may still run
                print(start, str(reason).splitlines()[0], flush=True)
                torch.cuda.synchronize()
            left -= 1
    if arguments.json:
        context = {
            "device": torch.cuda.get_device_name(), "torch": torch.__version__, "cudnn": torch.backends.cudnn.version(),
            "command": f"python benchmarks/packed.py {'--grid ' if arguments.grid else ''}--json FILE",
            "what": "medians; gpu: cuDNN replayed from a CUDA graph, ours queued behind a long kernel; wall: eager calls",
        }  # fmt: skip
        with open(arguments.json, "w") as file:
            lines = ",\n".join(json.dumps(row) for row in measured)
            file.write(f'{{"context": {json.dumps(context)},\n"columns": {json.dumps(COLUMNS)},\n"rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
