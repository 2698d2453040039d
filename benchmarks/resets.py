"""Resets of the state between steps: whole sequences in one launch against one launch a step.

    python benchmarks/resets.py [--shapes policy,small] [--dtypes tf32,fp16] [--seconds 100]

Resets are drawn, one of twenty rows a step.  Outputs, final states and gradients are compared with the equations in float64
first, and a second run has to give the same bits; where the error is more than three times that of a launch a step, no time is
shown.  "graph" is a replay of a CUDA graph, "eager" a call from one synchronisation to the next, host included, both medians in
ms; training is forward and backward.  "whole" and "step" are what TORCH_GRU_FUSE_KERNELS=triton and =step run; "none" is whole
sequences of the same sizes without resets, called eagerly and in a graph, and "chunks" what cuDNN can do: a loop over the
stretches between steps in which any row is reset, called eagerly.  "auto" is what the op runs by itself.  The table comes line
by line; what does not fit into --seconds is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import time
from collections.abc import Callable, Iterator

import torch
from against_float64 import DTYPES, Shape, error, kernels, medians, timed
from torch import Tensor

import torch_gru_fuse
import torch_gru_fuse.functional as fused
from torch_gru_fuse import equations
from torch_gru_fuse.ops import kernel_path
from torch_gru_fuse.ops.call import GRUCall
from torch_gru_fuse.tools.timing import graph_of, milliseconds

SHAPES = {
    "policy": Shape(128, 64, 64, 256, 1, 1),
    "small": Shape(128, 16, 64, 128, 2, 1),
    "large": Shape(128, 512, 64, 256, 1, 1),
    "long": Shape(512, 32, 64, 512, 1, 1),
    "short": Shape(16, 256, 64, 128, 1, 1),
    "both": Shape(128, 64, 64, 256, 1, 2),
    "h64": Shape(128, 64, 64, 64, 1, 1),
}


class Problem:
    """Arguments of the op, and what float64 makes of them."""

    def __init__(self, shape: Shape, dtype: torch.dtype):
        torch.manual_seed(0)
        module = torch.nn.GRU(shape.I, shape.H, shape.L, bidirectional=shape.D == 2)
        # of values that fp16, bf16 and tf32 hold: operands are then the same everywhere
        grid = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16

        def make(tensor: Tensor) -> Tensor:
            return tensor.detach().to(grid).to("cuda", dtype).requires_grad_()

        self.x, self.hx = make(torch.randn(shape.T, shape.B, shape.I)), make(torch.randn(shape.L * shape.D, shape.B, shape.H))
        self.params = [make(p) for p in module._flat_weights]
        self.resets = torch.rand(shape.T, shape.B, device="cuda") < 0.05
        self.shape, self.flags = shape, (True, shape.L, 0.0, True, shape.D == 2, False)
        self.grads = [torch.randn(shape.T, shape.B, shape.D * shape.H).to(grid).to("cuda", dtype),
                      torch.randn(self.hx.shape).to(grid).to("cuda", dtype)]  # fmt: skip
        # where a stretch without resets of any row begins; read once, which the real loop would do in every call
        begins = self.resets.any(1).nonzero().flatten().tolist()
        self.bounds = sorted({0, *begins, shape.T})

    def forward(self, resets: Tensor | None) -> list[Tensor]:
        with torch.no_grad():
            return list(fused.gru(self.x, self.hx, self.params, *self.flags, resets=resets))

    def train(self, resets: Tensor | None) -> list[Tensor]:
        results = fused.gru(self.x, self.hx, self.params, *self.flags, resets=resets)
        return [*(r.detach() for r in results), *torch.autograd.grad(results, [self.x, self.hx, *self.params], self.grads)]

    def chunks(self, training: bool) -> list[Tensor]:
        """cuDNN over each stretch, the state multiplied between; of one direction."""
        outputs, h = [], self.hx
        with contextlib.nullcontext() if training else torch.no_grad():
            for begin, end in zip(self.bounds, self.bounds[1:], strict=False):
                h = torch.where(self.resets[begin][:, None], 0, h)
                y, h = torch.gru(self.x[begin:end], h, self.params, *self.flags)
                outputs.append(y)
            results = [torch.cat(outputs), h]
        if not training:
            return results
        return [*(r.detach() for r in results), *torch.autograd.grad(results, [self.x, self.hx, *self.params], self.grads)]

    def exact(self) -> list[Tensor]:
        tensors = [t.detach().double().requires_grad_() for t in (self.x, self.hx, *self.params)]
        keep = (~self.resets).double()
        results = equations.gru(
            tensors[0], tensors[1], tensors[2:], True, self.shape.L, self.shape.D == 2, None, keep
        )
        return [*(r.detach() for r in results), *torch.autograd.grad(results, tensors, [g.double() for g in self.grads])]

    def plan(self, training: bool) -> kernel_path.Plan:
        params = [p.detach() for p in self.params]
        call = GRUCall(self.x.detach(), self.hx.detach(), params, True, self.shape.L, self.shape.D == 2, None, ~self.resets)
        return kernel_path.plan_of(call, training=training)


def eager(run: Callable[[], object], seconds: float) -> float:
    """Median of a call in ms, from one synchronisation to the next."""
    timed(run)
    return medians(functools.partial(timed, run), seconds, 3)


def graphed(run: Callable[[], object], _: float) -> float:
    """Median of a replay in ms."""
    return milliseconds(graph_of(run), torch.device("cuda"), 5)


def lines(name: str, shape: Shape, dtype_name: str, seconds: float) -> Iterator[str]:
    problem = Problem(shape, DTYPES[dtype_name])
    exact = problem.exact()
    for training in (False, True):
        start = f"{name:7} {dtype_name:5} {'train' if training else 'infer':6}"
        with kernels("triton"):
            plan = problem.plan(training)
        if plan.whole is None:
            yield f"{start} no kernel: {plan.reason}"
            continue
        run = problem.train if training else problem.forward
        with kernels("step"):
            steps = run(problem.resets)
        with kernels("triton"):
            results, again = run(problem.resets), run(problem.resets)
        torch_gru_fuse.check_errors()
        wanted = exact[: len(results)]
        own, theirs = error(results, wanted), error(steps, wanted)
        if own > 3 * theirs + 1e-6:
            yield f"{start} WRONG: error {own:.1e}, of a launch a step {theirs:.1e}  {plan.whole}"
            continue
        if not all(torch.equal(a, b) for a, b in zip(results, again, strict=True)):
            yield f"{start} WRONG: another run gives other bits  {plan.whole}"
            continue
        columns, each = [], seconds / 7
        for measure in (graphed, eager):
            times = []
            for value, resets in (("triton", problem.resets), ("step", problem.resets), ("triton", None)):
                with kernels(value):
                    times.append(measure(functools.partial(run, resets), each))
            whole, step, none = times
            columns.append(f"{step:9.3f}{whole:9.3f}{step / whole:7.2f}x{none:9.3f}")
        chunks = f"{'':9}"
        if shape.D == 1:
            chunks = f"{eager(functools.partial(problem.chunks, training), each):9.3f}"
        torch_gru_fuse.check_errors()
        auto = problem.plan(training).kernel
        launches = f"{plan.whole}{f' {plan.backward}' if training else ''}"
        yield f"{start}{''.join(columns)}{chunks} {own:8.1e} {theirs:8.1e} {auto:6} {launches}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--dtypes", default="tf32,fp16")
    parser.add_argument("--seconds", type=float, default=100.0)
    arguments = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = True
    names, dtypes = arguments.shapes.split(","), arguments.dtypes.split(",")
    until = time.perf_counter() + arguments.seconds
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}; ms")
    of_each = "".join(f"{f'{kind} step':>9.9}{'whole':>9}{'':8}{'none':>9}" for kind in ("gr.", "ea."))
    print(f"{'shape':7} {'dtype':5} {'':6}{of_each}{'chunks':>9} rms error, of step, auto, plan")
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
