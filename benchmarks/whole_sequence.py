"""The whole-sequence kernels against cuDNN replayed from a CUDA graph: each plan, also where the ops would choose otherwise.

    python benchmarks/whole_sequence.py [--shapes kb39,big] [--dtypes float32,float16] [--as sm89]

Every result is compared with float64 first, and every replay has to give the bits of the first run.  float32 uses TF32.  "ours"
is what the op runs, from its tensors to its results; "saving" also stores the gates for a backward; "host" is what one call
takes of the CPU (no graph).  At last a launch that lacks a program shows that a wait which runs out ends the kernel and is
an error.
"""

from __future__ import annotations

import argparse
import os
import time

import torch

import torch_gru_fuse
from torch_gru_fuse.ops import whole_path
from torch_gru_fuse.ops.call import GRUCall
from torch_gru_fuse.ops.support import gpu_of
from torch_gru_fuse.planner.plan import Plan
from torch_gru_fuse.planner.whole_sequence import WavefrontPlan, WholeSequencePlan, plan_whole_sequence
from torch_gru_fuse.tools.bench import DTYPES, SHAPES, Problem, Shape, _architecture, _error, _is_wrong
from torch_gru_fuse.tools.timing import graph_of, milliseconds

DEVICE = torch.device("cuda")
REPEAT = 11


def plan_of(shape: Shape, dtype: torch.dtype, sm89: bool) -> Plan | None:
    """As a 4090 would have it if ``sm89``."""
    gpu = gpu_of(torch.cuda.current_device())
    lanes, reverse = (2, True) if shape.D == 2 else (shape.L, False)
    limits = {} if sm89 else {"multiprocessors": gpu.multiprocessors, "shared_bytes": gpu.shared_bytes_per_program}
    whole = plan_whole_sequence(shape.B, shape.H, lanes, dtype.itemsize, reverse=reverse, **limits)
    return None if whole is None else Plan("whole", None, dtype == torch.float32, "benchmark", whole)


def call_of(problem: Problem) -> GRUCall:
    module = problem.module
    weights = [w.detach() for w in module._flat_weights]
    return GRUCall(problem.x, problem.hx, weights, True, module.num_layers, module.bidirectional, None)


def host_us(run) -> float:
    """Microseconds of the host for one call, while the GPU keeps up."""
    times = []
    for _ in range(30):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2] * 1e6


@torch.no_grad()
def measure(name: str, shape: Shape, dtype: torch.dtype, sm89: bool) -> str:
    start = f"{name:9} {str(dtype).removeprefix('torch.'):9}"
    plan = plan_of(shape, dtype, sm89)
    if plan is None:
        return f"{start} no plan"
    problem = Problem(shape, dtype, DEVICE, train=False)
    call = call_of(problem)

    def run(save=False):
        return whole_path.gru_forward(call, save, plan)

    exact, own = problem.exact(), _error(problem.own(), problem.exact())
    out, h_n, _ = run()
    torch_gru_fuse.check_errors()
    ours = _error([out, h_n], exact)
    if _is_wrong(ours, own, dtype):
        return f"{start} WRONG: error {ours[1]:.1e}, cuDNN's {own[1]:.1e}"
    for save in (False, True, False):
        again = run(save)
        if not (torch.equal(again[0], out) and torch.equal(again[1], h_n)):
            return f"{start} WRONG: another run{', which saves gates,' if save else ''} gives other bits"
    times = {
        "cuDNN": milliseconds(graph_of(problem.own), DEVICE, REPEAT),
        "ours": milliseconds(graph_of(run), DEVICE, REPEAT),
        "saving": milliseconds(graph_of(lambda: run(True)), DEVICE, REPEAT),
    }
    host = host_us(run)
    torch_gru_fuse.check_errors()
    columns = "".join(f"{ms:9.3f}" for ms in times.values())
    return f"{start}{columns}{times['cuDNN'] / times['ours']:7.2f}x{host:8.0f} {ours[1]:9.1e} {own[1]:8.1e}  {plan.whole}"


def clock_bound() -> str:
    """One program too few: the others wait for it until their time, 50 ms here, is over."""
    problem = Problem(Shape(64, 8, 256, 256, 1), torch.float16, DEVICE, train=False)
    plan = Plan("whole", None, False, "benchmark", WholeSequencePlan(1, WavefrontPlan(16, 8, 4)))
    before = os.environ.get("TORCH_GRU_FUSE_TIMEOUT_S")
    os.environ["TORCH_GRU_FUSE_TIMEOUT_S"] = "0.05"
    whole_path.missing_programs = 1
    begin = time.perf_counter()
    try:
        with torch.no_grad():
            whole_path.gru_forward(call_of(problem), False, plan)
        torch_gru_fuse.check_errors()
        said = "NO ERROR"
    except RuntimeError as error:
        said = str(error)
    finally:
        whole_path.missing_programs = 0
        if before is None:
            del os.environ["TORCH_GRU_FUSE_TIMEOUT_S"]
        else:
            os.environ["TORCH_GRU_FUSE_TIMEOUT_S"] = before
    return f"a program missing, after {time.perf_counter() - begin:.2f} s, compiling included: {said}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--dtypes", default="float32,float16")
    parser.add_argument("--as", dest="architecture", choices=["sm89"], default=None)
    arguments = parser.parse_args()
    print(f"{'shape':9} {'dtype':9}{'cuDNN':>9}{'ours':>9}{'saving':>9}{'ratio':>8}{'host us':>8}  rms error, cuDNN's  plan")
    with _architecture(arguments.architecture):
        for name in arguments.shapes.split(","):
            for dtype in arguments.dtypes.split(","):
                try:
                    print(measure(name, SHAPES[name], DTYPES[dtype], arguments.architecture is not None), flush=True)
                except RuntimeError as reason:  # the next shape may still run
                    print(f"{name:9} {dtype:9} {str(reason).splitlines()[0]}", flush=True)
        print(clock_bound())


if __name__ == "__main__":
    main()
