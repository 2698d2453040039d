"""Checks and times pairs: two layers in one launch, two calls of the op, and cuDNN twice, each replayed from a CUDA graph.

    python benchmarks/pair.py [--seconds 40] [--check-only]

Of each shape, forward and training (forward and backward), float32 with TF32 and float16.  Results are compared with float64
first; where the pair is further from it than cuDNN by more than rounding, it says WRONG and is not timed.  The planner's own
choice is in the last column: `planner/plan.py`, `pair_is_faster`, is what to edit.
"""

from __future__ import annotations

import argparse
import os
import time

import torch

import torch_gru_fuse.functional as fused
from torch_gru_fuse import check_errors, torch_hooks
from torch_gru_fuse.planner import plan as planner
from torch_gru_fuse.tools.timing import graph_of, milliseconds

SHAPES = [(512, 10, 128, 256), (200, 64, 64, 64), (256, 16, 512, 512), (128, 256, 256, 256)]
DTYPES = {"tf32": torch.float32, "fp16": torch.float16}
START = time.perf_counter()


class Problem:
    def __init__(self, T: int, B: int, I: int, H: int, dtype: torch.dtype, training: bool):
        torch.manual_seed(1)
        self.training = training
        options = {"device": "cuda", "dtype": dtype}
        self.modules = [torch.nn.GRU(I, H, **options).requires_grad_(training) for _ in range(2)]
        self.xs = [torch.randn(T, B, I, **options, requires_grad=training) for _ in range(2)]
        self.hx = torch.randn(2, B, H, **options).mul_(0.5).requires_grad_(training)
        self.params = [list(m._flat_weights) for m in self.modules]
        self.dy = [torch.randn(T, B, H, **options) for _ in range(2)]
        self.inputs = [*self.xs, self.hx, *(p for params in self.params for p in params)]

    def gradients(self, outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        if not self.training:
            return outputs
        return [*outputs, *torch.autograd.grad(outputs, self.inputs, self.dy)]

    def pair(self) -> list[torch.Tensor]:
        first, second, _ = fused.gru_pair(self.xs, self.hx, sum(self.params, []), True, [False, False], False)
        return self.gradients([first, second])

    def two_calls(self) -> list[torch.Tensor]:
        outputs = [
            fused.gru(x, self.hx[i : i + 1], self.params[i], True, 1, 0.0, False, False, False)[0]
            for i, x in enumerate(self.xs)
        ]
        return self.gradients(outputs)

    def cudnn(self) -> list[torch.Tensor]:
        return self.gradients([m(x, self.hx[i : i + 1])[0] for i, (m, x) in enumerate(zip(self.modules, self.xs, strict=True))])

    def exact(self) -> list[torch.Tensor]:
        """In float64."""
        double = [t.detach().double().requires_grad_(self.training) for t in self.inputs]
        outputs = [
            torch.gru(double[i], double[2][i : i + 1], double[3 + 4 * i : 7 + 4 * i], True, 1, 0.0, True, False, False)[0]
            for i in range(2)
        ]
        if not self.training:
            return outputs
        return [*outputs, *torch.autograd.grad(outputs, double, [d.double() for d in self.dy])]


def errors(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """The greatest relative error in the 2-norm."""
    return max(((a.detach().double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True))


def graph_us(function) -> float:
    """Of one call, replayed from a CUDA graph."""
    return 1e3 * milliseconds(graph_of(function), torch.device("cuda"), 15)


def planned(T: int, B: int, H: int, dtype: torch.dtype, training: bool) -> str:
    """What the planner takes by itself."""
    from torch_gru_fuse.ops.support import gpu_of

    plan = planner.plan_gru_pair(
        T, B, H, str(dtype), tf32_allowed=torch_hooks.rnn_allows_tf32(), training=training, cudnn=True, gpu=gpu_of(0)
    )
    return plan if isinstance(plan, str) else f"one launch, {plan.whole.kernel.name}"


def measure(T: int, B: int, I: int, H: int, name: str, training: bool, check_only: bool) -> str:
    dtype = DTYPES[name]
    problem = Problem(T, B, I, H, dtype, training)
    grad = torch.enable_grad if training else torch.no_grad
    with grad():
        exact, cudnn = problem.exact(), errors(problem.cudnn(), problem.exact())
        choice = planned(T, B, H, dtype, training)
        os.environ["TORCH_GRU_FUSE_KERNELS"] = "triton"  # one launch wherever there is a plan
        ours = errors(problem.pair(), exact)
        check_errors()
        verdict = "ok" if ours <= max(1.3 * cudnn, 2e-3) else "WRONG"
        head = f"{'training' if training else 'forward':8} {name} T={T} B={B} I={I} H={H}"
        print(f"check {head}: error {ours:.1e}, cuDNN {cudnn:.1e}: {verdict}", flush=True)
        if verdict == "WRONG" or check_only:
            return f"{head:44} {verdict}"
        pair = graph_us(problem.pair)
        os.environ["TORCH_GRU_FUSE_KERNELS"] = "auto"
        two, own = graph_us(problem.two_calls), graph_us(problem.cudnn)
    check_errors()
    return f"{head:44} {pair:8.0f} {two:8.0f} {own:8.0f}   {two / pair:5.2f}x {own / pair:6.2f}x   {choice}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40.0, help="begin no shape after so many (%(default)s)")
    parser.add_argument("--check-only", action="store_true")
    options = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    rows = []
    for shape in SHAPES:
        for training in (False, True):
            for name in DTYPES:
                if time.perf_counter() - START > options.seconds:
                    rows.append(f"(left out after {options.seconds:.0f} s: {shape} {name} training={training})")
                    continue
                try:
                    rows.append(measure(*shape, name, training, options.check_only))
                except Exception as reason:
                    rows.append(f"{shape} {name} training={training}: FAILED {type(reason).__name__} {reason}")
    print(f"\n{torch.cuda.get_device_name(0)}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}; microseconds")
    print(f"{'':44} {'pair':>8} {'2 calls':>8} {'2 cuDNN':>8}   {'by calls':>6} {'by cuDNN':>6}   planned")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
