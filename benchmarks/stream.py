"""Checks and times the kernel for single steps, the planner's choice (*) beside others, against cuDNN in a CUDA graph.

    python benchmarks/stream.py [--seconds 60] [--check-only]        # docs/results/stream-h200.txt
"""

from __future__ import annotations

import argparse
import functools
import time
from dataclasses import replace

import torch
import triton

from torch_gru_fuse import equations
from torch_gru_fuse.kernels import stream
from torch_gru_fuse.planner.stream import plan_stream
from torch_gru_fuse.tools.timing import graph_of, milliseconds

DEVICE = torch.device("cuda")
SMS = torch.cuda.get_device_properties(0).multi_processor_count
CAPABILITY = torch.cuda.get_device_capability()
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
START = time.perf_counter()


class Problem:
    def __init__(self, B, I, H, L, dtype):
        torch.manual_seed(1)
        self.sizes, self.dtype = (B, I, H, L), dtype
        self.module = torch.nn.GRU(I, H, L).to(DEVICE, dtype).requires_grad_(False)
        self.module.flatten_parameters()
        self.x = torch.randn(B, I, device=DEVICE, dtype=dtype)
        self.h0 = torch.randn(L, B, H, device=DEVICE).mul_(0.5).to(dtype)
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        self.params = [[getattr(self.module, f"{kind}_l{l}").detach() for l in range(L)] for kind in kinds]
        flat = [t.double() for layer in zip(*self.params, strict=True) for t in layer]
        self.exact = equations.gru(self.x.double()[None], self.h0.double(), flat, True, L, False)

    def own(self):
        return self.module(self.x[None], self.h0)

    def ours(self, plan):
        output, h_n = torch.empty_like(self.h0[-1:]), torch.empty_like(self.h0)
        stream.stream_forward(self.x, self.h0, *self.params, output, h_n, plan=plan)
        return output, h_n

    def errors(self, found):
        """Relative in the 2-norm (what the accuracy bar is about), and the greatest absolute one."""
        pairs = list(zip(found, self.exact, strict=True))
        if any(a.isnan().any() for a, _ in pairs):
            return float("nan"), float("nan")
        return (
            max(((a.double() - b).norm() / b.norm()).item() for a, b in pairs),
            max((a.double() - b).abs().max().item() for a, b in pairs),
        )


def graph_us(function):
    """Of one call in a CUDA graph."""
    return 1e3 * milliseconds(graph_of(function), torch.device("cuda"), 9)


def describe(plan):
    return f"{'pdl' if plan.overlap else 'each':4} u{plan.units} k{plan.block_k} w{plan.num_warps} d{plan.depth}"


def planned(B, I, H, L, element_bytes):
    return plan_stream(B, I, H, L, element_bytes, multiprocessors=SMS, capability=CAPABILITY)


def variants(B, I, H, L, element_bytes):
    """Plans to try: the planner's own, the same without overlap, and what else might be faster at such sizes."""
    plan = planned(B, I, H, L, element_bytes)
    if isinstance(plan, str):
        print(f"{(B, I, H, L)!s:>16}: {plan}")
        return []
    warp_k = 512 // element_bytes
    others = [replace(plan, overlap=False)]
    if B == 1:
        others.append(replace(plan, units=2, block_k=2 * warp_k, num_warps=4, depth=4))
        others.append(replace(plan, units=4, block_k=warp_k, num_warps=4, depth=8))
        if H > 512:
            others.append(replace(plan, units=4, block_k=2 * warp_k, num_warps=8, depth=4))
    else:
        others.append(replace(plan, units=4, block_k=warp_k, num_warps=4, depth=4))
        others.append(replace(plan, units=4, block_k=2 * warp_k, num_warps=8, depth=0))
    return list(dict.fromkeys([plan, *others]))


def limits(dtype):
    return {torch.float32: (3e-7, 3e-6), torch.float16: (1e-3, 4e-3), torch.bfloat16: (8e-3, 3e-2)}[dtype]


def check(sizes, dtype):
    problem = Problem(*sizes, dtype)
    first = planned(*sizes, dtype.itemsize)
    if isinstance(first, str):
        print(f"check {sizes} {NAMES[dtype]}: {first}")
        return
    own = problem.errors(problem.own())
    for plan in dict.fromkeys([first, replace(first, overlap=False)]):
        try:
            found = problem.ours(plan)
            torch.cuda.synchronize()
        except Exception as reason:
            what = f"{type(reason).__name__} {str(reason).splitlines()[0]}"
            print(f"check {sizes} {NAMES[dtype]} {describe(plan)}: FAILED {what}", flush=True)
            continue
        ours = problem.errors(found)
        again = [problem.ours(plan) for _ in range(3)]
        same = all(torch.equal(a, b) for other in again for a, b in zip(other, found, strict=True))
        good = ours[0] <= max(limits(dtype)[0], 1.1 * own[0]) and same
        numbers = f"{ours[0]:.2e} max {ours[1]:.1e}, cuDNN {own[0]:.2e}"
        verdict = "ok" if good else f"WRONG, same bits {same}"
        print(f"check {sizes} {NAMES[dtype]} {describe(plan)}: {numbers}: {verdict}", flush=True)


def check_order():
    """Each step's results are the next one's input and state, and weights change in between: what reads too early is wrong.

    In a graph, where nothing else keeps launches apart, against the same without overlap, which gives the same bits.
    """
    problem = Problem(1, 512, 512, 4, torch.float16)
    plan = planned(1, 512, 512, 4, 2)
    found = []
    for way in (plan, replace(plan, overlap=False)):
        params = [[p.clone() for p in kind] for kind in problem.params]

        def steps(count, way=way, params=params):
            x, h = problem.x, problem.h0
            for _ in range(count):
                output, h_n = torch.empty_like(h[-1:]), torch.empty_like(h)
                stream.stream_forward(x, h, *params, output, h_n, plan=way)
                for kind in params:
                    torch._foreach_mul_(kind, -1)
                x, h = output[0], h_n
            return h

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            steps(2)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            last = steps(200)
        for _ in range(5):
            graph.replay()
            found.append(last.clone())
    print(f"200 steps, weights changed between them: {'ok' if all(torch.equal(found[0], h) for h in found) else 'WRONG'}")


def host_us(function, calls=500):
    """Of the host, for one call."""
    function()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls * 1e6


def shapes():
    """In order of importance: the time box may end before the last."""
    sizes = [
        (1, 512, 512, 2), (1, 1024, 1024, 2), (8, 512, 512, 2), (4, 512, 512, 2), (1, 2048, 2048, 1), (2, 1024, 1024, 1),
        (1, 512, 512, 1), (1, 256, 256, 2), (1, 80, 512, 4), (2, 512, 512, 2), (8, 256, 256, 2), (1, 128, 128, 2),
    ]  # fmt: skip
    for one in sizes:
        for dtype in (torch.float16, torch.float32):
            yield one, dtype


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--check-only", action="store_true")
    arguments = parser.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    print(torch.cuda.get_device_name(), f"{SMS} SMs, torch {torch.__version__}, Triton {triton.__version__}")

    half, single, bf16 = torch.float16, torch.float32, torch.bfloat16
    for sizes, dtype in (
        ((1, 512, 512, 2), half), ((1, 512, 512, 2), single), ((8, 512, 512, 2), bf16), ((3, 33, 104, 2), half),
        ((1, 1024, 1024, 2), single), ((2, 13, 40, 3), single),
    ):  # fmt: skip
        check(sizes, dtype)
    check_order()
    print(f"checks took {time.perf_counter() - START:.0f} s")
    if arguments.check_only:
        return

    problem = Problem(1, 512, 512, 2, half)
    plan = planned(1, 512, 512, 2, 2)
    ours_us, own_us = host_us(lambda: problem.ours(plan)), host_us(problem.own)
    print(f"host, two layers: {ours_us:.1f} us with its two allocations; cuDNN {own_us:.1f}")
    print(f"{'B I H L':>20} {'':5}{'variant':20} {'us':>7} {'said':>6} {'cuDNN':>7} {'ratio':>6} {'err':>8} {'cuDNN':>8}")
    for sizes, dtype in shapes():
        plans = variants(*sizes, dtype.itemsize)
        if not plans:
            continue
        if time.perf_counter() - START > arguments.seconds:
            print("time is over")
            break
        problem = Problem(*sizes, dtype)
        own_us, own = graph_us(problem.own), problem.errors(problem.own())
        rows = []
        for plan in plans:
            try:
                ours = problem.errors(problem.ours(plan))
                us = graph_us(functools.partial(problem.ours, plan))
            except Exception as reason:  # the next variant may still run
                print(f"{sizes!s:>20} {NAMES[dtype]} {describe(plan):20} {str(reason).splitlines()[0][:70]}")
                continue
            bad = "" if ours[0] <= max(limits(dtype)[0], 1.1 * own[0]) else " WRONG"
            mark, said = ("*", f"{plan.predicted_us:6.2f}") if plan == plans[0] else (" ", "")
            numbers = f"{us:7.2f} {said:>6} {own_us:7.2f} {own_us / us:6.2f} {ours[0]:8.1e} {own[0]:8.1e}{bad}"
            rows.append((us, f"{sizes!s:>20} {NAMES[dtype]}{mark}{describe(plan):20} {numbers}"))
        for _, line in sorted(rows):
            print(line, flush=True)
    print(f"took {time.perf_counter() - START:.0f} s")


if __name__ == "__main__":
    main()
