"""KernelBench level 3, problems 39 to 42, eager and compiled through torch_gru_fuse, side by side.

A stack of GRU layers runs over a sequence [T, B, I] from a given state h0. The four problems differ in what they return:

    39  the output of the last layer         40  the last state of every layer
    41  as 39, in both directions            42  as 40, in both directions

On a GPU the sizes are KernelBench's and the times are medians of CUDA-event timings; the third way to run is cuDNN replayed
from a CUDA graph, that is eager without the cost of launching its kernels one by one. On a CPU the sizes are smaller, and the
ops run PyTorch's own GRU. Every result is compared with eager in float64 on the CPU; no time of a problem is printed when one
of its results is wrong.

    python examples/kernelbench_gru.py
    python examples/kernelbench_gru.py --problem 39 --dtype float16
    python examples/kernelbench_gru.py --device cpu --T 128 --hidden 128

Exit status: 0 when eager and compiled agree in all problems, else 1.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

import torch_gru_fuse


class Problem(NamedTuple):
    name: str
    bidirectional: bool
    returns_state: bool


PROBLEMS = {
    39: Problem("GRU, output", bidirectional=False, returns_state=False),
    40: Problem("GRU, state", bidirectional=False, returns_state=True),
    41: Problem("both directions, output", bidirectional=True, returns_state=False),
    42: Problem("both directions, state", bidirectional=True, returns_state=True),
}


class Sizes(NamedTuple):
    T: int  # time steps
    B: int  # sequences
    I: int  # inputs  # noqa: E741
    H: int  # units of a layer and direction
    L: int  # layers


KERNELBENCH = Sizes(T=512, B=10, I=128, H=256, L=6)
SMALL = Sizes(T=64, B=10, I=32, H=64, L=3)  # seconds on a CPU

# A result may be this many times as far from float64 as eager's: the fused kernels add up in another order, and round to
# TF32 or to the dtype in other places than cuDNN does.
ERROR_RATIO = 4.0
# ... and this far at least, in units of the dtype's eps: states are below 1, and a step rounds its state once.
ERROR_EPS = 8.0


class GRUStack(nn.Module):
    """(x [T, B, I], h0 [L*D, B, H]) -> output [T, B, D*H], or state [L*D, B, H]; D = 1 or 2 directions."""

    def __init__(self, problem: Problem, sizes: Sizes):
        super().__init__()
        self.gru = nn.GRU(sizes.I, sizes.H, sizes.L, bidirectional=problem.bidirectional)
        self.returns_state = problem.returns_state

    def forward(self, x: Tensor, h0: Tensor) -> Tensor:
        output, state = self.gru(x, h0)
        return state if self.returns_state else output


class Column(NamedTuple):
    """One way to run a problem."""

    name: str
    call: Callable[[], Tensor]
    result: Tensor
    error: float  # largest distance from float64


def main(argv: list[str] | None = None) -> int:
    a = _arguments(argv)
    device = torch.device(a.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.index is not None:
        torch.cuda.set_device(device)  # of streams and events
    default = KERNELBENCH if device.type == "cuda" else SMALL
    chosen = Sizes(a.T, a.B, a.input, a.hidden, a.layers)
    sizes = Sizes(*(default[i] if value is None else value for i, value in enumerate(chosen)))
    dtype = getattr(torch, a.dtype)

    print(f"{_device_name(device)}, torch {torch.__version__}, {a.dtype}, forward only")
    print(", ".join(f"{name}={value}" for name, value in sizes._asdict().items()), end="\n\n")
    print(f"{'problem':<29}{'':<16}{'max error':>10}{'ms':>10}{'eager /':>9}", flush=True)
    agree = [_run(number, sizes, device, dtype, a.repeat) for number in a.problem or PROBLEMS]
    print()
    for record in torch_gru_fuse.rewrites():
        print(record)
    print("Eager and compiled agree." if all(agree) else "Eager and compiled DISAGREE.")
    return 0 if all(agree) else 1


@torch.no_grad()
def _run(number: int, sizes: Sizes, device: torch.device, dtype: torch.dtype, repeat: int) -> bool:
    """Run one problem in all columns and print them; whether compiled agrees with eager."""
    torch._dynamo.reset()
    torch.manual_seed(number)
    problem = PROBLEMS[number]
    directions = 2 if problem.bidirectional else 1
    # Made in float32 and rounded to the dtype, so that float64 starts from the very same numbers.
    model = GRUStack(problem, sizes).to(dtype).eval()
    x = torch.randn(sizes.T, sizes.B, sizes.I).to(dtype)
    h0 = torch.randn(sizes.L * directions, sizes.B, sizes.H).to(dtype)
    exact = copy.deepcopy(model).double()(x.double(), h0.double())
    model, x, h0 = model.to(device), x.to(device), h0.to(device)

    def column(name: str, call: Callable[[], Tensor]) -> Column:
        result = call()
        return Column(name, call, result, (result.cpu().double() - exact).abs().max().item())

    columns = [column("eager", lambda: model(x, h0))]
    with torch_gru_fuse.enable():
        compiled = torch.compile(model, fullgraph=True)
        columns.append(column("compiled", lambda: compiled(x, h0)))
        if device.type == "cuda":
            columns.append(column("cuDNN, graph", _cuda_graph(lambda: model(x, h0))))

        limit = max(ERROR_RATIO * columns[0].error, ERROR_EPS * torch.finfo(dtype).eps)
        agrees = all(c.error <= limit for c in columns)  # False for nan
        times = [_milliseconds(c.call, device, repeat) if agrees else None for c in columns]

    for i, (c, ms) in enumerate(zip(columns, times, strict=True)):
        title = f"{number} {problem.name}" if i == 0 else ""
        timing = f"{ms:>10.3f}{times[0] / ms:>8.2f}x" if agrees else f"{'':>10}"
        wrong = "" if c.error <= limit else f"  WRONG, expected at most {limit:.1e}"
        print(f"{title:<29}{c.name:<16}{c.error:>10.1e}{timing}{wrong}", flush=True)
    return agrees


def _cuda_graph(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``call``, captured; the replay writes to the same tensors every time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # cuDNN and cuBLAS take their workspaces before the capture
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def _milliseconds(call: Callable[[], Tensor], device: torch.device, repeat: int) -> float:
    """Median of ``repeat`` calls, after a tenth as many to warm up."""
    for _ in range(max(1, repeat // 10)):
        call()
    if device.type != "cuda":
        ticks = [time.perf_counter()]
        for _ in range(repeat):
            call()
            ticks.append(time.perf_counter())
        return 1e3 * median(b - a for a, b in zip(ticks, ticks[1:], strict=False))

    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeat)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return median(start.elapsed_time(end) for start, end in events)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on = "(default: {} on a GPU, {} on a CPU)"
    parser.add_argument("--T", type=_positive, help=f"time steps {on.format(KERNELBENCH.T, SMALL.T)}")
    parser.add_argument("--B", type=_positive, help=f"sequences {on.format(KERNELBENCH.B, SMALL.B)}")
    parser.add_argument("--input", type=_positive, help=f"inputs {on.format(KERNELBENCH.I, SMALL.I)}")
    parser.add_argument("--hidden", type=_positive, help=f"units {on.format(KERNELBENCH.H, SMALL.H)}")
    parser.add_argument("--layers", type=_positive, help=f"layers {on.format(KERNELBENCH.L, SMALL.L)}")
    parser.add_argument("--device", help="cuda or cpu; the GPU if there is one")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--problem", type=int, choices=PROBLEMS, action="append", help="one of them; may be repeated")
    parser.add_argument("--repeat", type=_positive, default=50, help="timed calls (default: %(default)s)")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


if __name__ == "__main__":
    sys.exit(main())
