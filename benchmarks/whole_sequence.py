"""The whole-sequence kernels against cuDNN replayed from a CUDA graph, each planned launch and none of the ops.

    python benchmarks/whole_sequence.py [--shapes kb39,big] [--dtypes float32,float16] [--as sm89]

Every result is compared with float64 first, and every replay has to give the bits of the first run. "packed" leaves out packing
the parameters, which cuDNN's do not need either; "saving" also stores the gates for a backward. At last a launch that lacks
a program shows that a wait which runs out ends the kernel and sets its error word.
"""

from __future__ import annotations

import argparse
import functools
import time

import torch

from torch_gru_fuse.kernels import resident, wavefront
from torch_gru_fuse.planner.whole_sequence import WavefrontPlan, plan_whole_sequence
from torch_gru_fuse.tools.bench import DTYPES, SHAPES, Problem, Shape, _architecture, _error, _graph, _is_wrong, _milliseconds

DEVICE = torch.device("cuda")
REPEAT = 11


def parameter_lists(module: torch.nn.GRU) -> list[list[torch.Tensor]]:
    """w_ih, w_hh, b_ih, b_hh, each with one tensor a layer and direction."""
    suffixes = ["", "_reverse"] if module.bidirectional else [""]
    return [
        [getattr(module, f"{kind}_l{layer}{suffix}").detach() for layer in range(module.num_layers) for suffix in suffixes]
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    ]


def plan_of(shape: Shape, dtype: torch.dtype):
    lanes, reverse = (2, True) if shape.D == 2 else (shape.L, False)
    return plan_whole_sequence(shape.B, shape.H, lanes, dtype.itemsize, reverse=reverse)


@torch.no_grad()
def measure(name: str, shape: Shape, dtype: torch.dtype) -> str:
    start = f"{name:9} {str(dtype).removeprefix('torch.'):9}"
    plan = plan_of(shape, dtype)
    if plan is None:
        return f"{start} no plan"
    problem = Problem(shape, dtype, DEVICE, train=False)
    bidirectional = shape.D == 2

    def pack():
        return resident.pack_parameters(*parameter_lists(problem.module), bidirectional=bidirectional, plan=plan)

    def run(packed=None, save_gates=False):
        return resident.whole_sequence_forward(
            problem.x, problem.hx, packed or pack(), bidirectional=bidirectional, plan=plan, save_gates=save_gates
        )

    exact, own = problem.exact(), _error(problem.own(), problem.exact())
    out, h_n, _, error = run()
    if error.item():
        return f"{start} error word {error.item()}"
    ours = _error([out, h_n], exact)
    if _is_wrong(ours, own, dtype):
        return f"{start} WRONG: error {ours[1]:.1e}, cuDNN's {own[1]:.1e}"
    packed = pack()
    for _ in range(3):
        again = run(packed)
        if not (torch.equal(again[0], out) and torch.equal(again[1], h_n)):
            return f"{start} WRONG: another run gives other bits"
    times = {
        "cuDNN": _milliseconds(_graph(problem.own), DEVICE, REPEAT),
        "packed": _milliseconds(_graph(lambda: run(packed)), DEVICE, REPEAT),
        "all": _milliseconds(_graph(run), DEVICE, REPEAT),
        "saving": _milliseconds(_graph(lambda: run(packed, True)), DEVICE, REPEAT),
    }
    ratios = "".join(f"{times['cuDNN'] / times[way]:7.2f}x" for way in ("packed", "all"))
    return start + "".join(f"{ms:9.3f}" for ms in times.values()) + f"{ratios}  {ours[1]:.1e} {own[1]:.1e}  {plan.kernel}"


def clock_bound() -> str:
    """One program too few: the others wait for it until their time, 50 ms here, is over."""
    T, B, H = 64, 8, 256
    zeros = functools.partial(torch.zeros, dtype=torch.float16, device=DEVICE)
    error = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    grid, arguments = wavefront.wavefront_launch(
        zeros(T, B, 3 * H), wavefront.prepare_states(zeros(1, B, H), T, interleaved=False), None, zeros(1, 3 * H, H),
        torch.zeros(1, 4 * H, device=DEVICE), None, error, plan=WavefrontPlan(16, 8, 1, 4), timeout_ns=50_000_000,
    )  # fmt: skip
    begin = time.perf_counter()
    wavefront.wavefront_kernel[(grid[0] - 1,)](**arguments)
    torch.cuda.synchronize()
    return f"a program missing: error word {error.item()} after {time.perf_counter() - begin:.2f} s, compiling included"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--dtypes", default="float32,float16")
    parser.add_argument("--as", dest="architecture", choices=["sm89"], default=None)
    arguments = parser.parse_args()
    print(f"{'shape':9} {'dtype':9}{'cuDNN':>9}{'packed':>9}{'all':>9}{'saving':>9}{'packed':>8}{'all':>8}  rms error, cuDNN's")
    with _architecture(arguments.architecture):
        for name in arguments.shapes.split(","):
            for dtype in arguments.dtypes.split(","):
                try:
                    print(measure(name, SHAPES[name], DTYPES[dtype]), flush=True)
                except RuntimeError as reason:  # the next shape may still run
                    print(f"{name:9} {dtype:9} {str(reason).splitlines()[0]}", flush=True)
        print(clock_bound())


if __name__ == "__main__":
    main()
