"""Time GRUs: cuDNN as it is called, cuDNN replayed from a CUDA graph, torch.compile without this package, and this package
called eagerly, compiled, compiled with reduce-overhead and replayed from a CUDA graph, all in one run.

A shape's results are compared with float64 first; where one is wrong no time of the shape is printed. Errors are relative
to the RMS of the float64 result, the greatest and the RMS, beside those of PyTorch's own GRU; a mark says where ours is the
larger one. Times are medians. The ratio to quote is that of the two CUDA graphs.

    python -m torch_gru_fuse bench
    python -m torch_gru_fuse bench --as sm89 --shapes kb39,speech --dtypes float16
    python -m torch_gru_fuse bench --shapes kb39,h512 --dtypes float16 --train --json times.json --plot times.png
    python -m torch_gru_fuse bench --T 100 --B 8 --I 64 --H 256 --layers 2

--as sm89 plans for an RTX 4090 (128 multiprocessors, 99 KB of shared memory a program) and compiles for it; only the last
step, from PTX to machine code, is for the GPU at hand, which needs compute capability 8.9 or more. Its times are its own, not
a 4090's. The planning alone is what TORCH_GRU_FUSE_GPU=rtx4090 does.

On a CPU there are no CUDA graphs, and the default shapes would take minutes: give --shapes or sizes.

Exit status: 0; 1 when a result was wrong; 2 when the arguments or the environment are.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.hub import tqdm  # the real one where it is installed, else a plain counter

import torch_gru_fuse
from torch_gru_fuse import torch_hooks
from torch_gru_fuse.tools import emulate
from torch_gru_fuse.tools.timing import Replay, graph_of, milliseconds

SUMMARY = "time GRUs of many shapes against cuDNN"


@dataclass(frozen=True)
class Shape:
    """T time steps, B sequences, I inputs, H units, L layers, D directions."""

    T: int
    B: int
    I: int
    H: int
    L: int
    D: int = 1


SHAPES = {
    "kb39": Shape(512, 10, 128, 256, 6),  # KernelBench level 3, problem 39
    "kb41": Shape(512, 10, 128, 256, 6, 2),  # and 41
    "stream1": Shape(1000, 1, 256, 256, 2),
    "speech": Shape(1000, 32, 256, 256, 2),
    "h512": Shape(256, 16, 512, 512, 2),
    "rl": Shape(64, 256, 256, 512, 1),
    "big": Shape(256, 64, 1024, 1024, 1),
    "wide": Shape(128, 1024, 256, 256, 1),
    "h128": Shape(200, 128, 128, 128, 1),
    "h64": Shape(200, 64, 64, 64, 2),
    "step": Shape(1, 1, 512, 512, 2),
    "dreamer": Shape(64, 16, 1024, 4096, 1),
}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# A result this many times as far from float64 as PyTorch's own is wrong, not inexact: summing in another order or rounding in
# another place changes an error by less than 2, a missing term by hundreds.
WRONG = 4.0
# ... if it is that far at least, (greatest, RMS) in units of the dtype's eps: PyTorch's own result can happen to be nearly
# exact.  Rounding a result to its dtype alone costs up to 1/2 eps of the value, and values of 8 times the RMS are rare.
WRONG_EPS = (8.0, 1.0)
# From here on a result that is not wrong is marked as less exact: the aim is 1.1 times PyTorch's own error.
LESS_EXACT = 1.1
TF32_EPS = 2.0**-11  # what rounding an operand costs at most


@dataclass
class Row:
    """One shape and dtype.

    Attributes:
        errors: (greatest, RMS) by "own" (PyTorch) and "fused" (this package).
        milliseconds: median time by way of running, empty where a result was wrong.
        failed: why a way could not run, by way.
        wrong: which results are wrong.
        less_exact: what to know of "fused" beside its error, if anything.
        ran: the kernel that the op chose for "fused", and why.
        held: MiB between forward and backward, results included, by "own", "fused" and "recompute"; of training on CUDA.
    """

    name: str
    dtype: str
    train: bool
    shape: Shape
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    milliseconds: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    less_exact: str = ""
    ran: str = ""
    held: dict[str, float] = field(default_factory=dict)

    def ratio(self, ours: str, theirs: str) -> float | None:
        times = self.milliseconds
        return times[theirs] / times[ours] if ours in times and theirs in times else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", default=None, metavar="NAMES", help=f"comma-separated, of {', '.join(SHAPES)} (all)")
    for name, meaning in (("T", "time steps"), ("B", "sequences"), ("I", "inputs"), ("H", "units"), ("layers", "layers")):
        parser.add_argument(f"--{name}", type=int, default=None, help=f"{meaning} of a shape of your own")
    parser.add_argument("--bidirectional", action="store_true", help="of a shape of your own")
    parser.add_argument("--dtypes", default="float32,float16", metavar="NAMES", help=f"of {', '.join(DTYPES)} (%(default)s)")
    parser.add_argument("--train", action="store_true", help="forward and backward instead of forward")
    parser.add_argument("--device", default=None, help="default: the GPU if there is one")
    parser.add_argument(
        "--repeat", type=int, default=11, help="timed calls of each way at least, after two that are not (%(default)s)"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out the ways that call torch.compile")
    parser.add_argument(
        "--as",
        dest="architecture",
        choices=list(emulate.ARCHITECTURES),
        default=None,
        help="plan and compile the Triton kernels as for a GPU of this architecture",
    )
    parser.add_argument("--json", metavar="FILE", help="write the rows to FILE, - for standard output")
    parser.add_argument("--plot", metavar="FILE", help="draw the ratios (needs matplotlib)")


class BenchError(Exception):
    """The arguments do not fit; the message says what to change."""


def _chosen_shapes(arguments: argparse.Namespace) -> dict[str, Shape]:
    own = {name: getattr(arguments, name) for name in ("T", "B", "I", "H", "layers")}
    given = {name: value for name, value in own.items() if value is not None}
    if given and len(given) < len(own):
        raise BenchError(f"a shape of your own needs --{', --'.join(own)}; missing: --{', --'.join(own.keys() - given.keys())}")
    for name, value in given.items():
        if value < 1:
            raise BenchError(f"--{name} is {value}, expected at least 1")
    names = [] if arguments.shapes is None else arguments.shapes.split(",")
    unknown = [name for name in names if name not in SHAPES]
    if unknown:
        raise BenchError(f"--shapes: {', '.join(map(repr, unknown))} not known; there are {', '.join(SHAPES)}")
    shapes = {name: SHAPES[name] for name in names}
    if given:
        shapes["own"] = Shape(own["T"], own["B"], own["I"], own["H"], own["layers"], 1 + arguments.bidirectional)
    return shapes or SHAPES


def _chosen_dtypes(arguments: argparse.Namespace) -> list[str]:
    names = arguments.dtypes.split(",")
    unknown = [name for name in names if name not in DTYPES]
    if unknown:
        raise BenchError(f"--dtypes: {', '.join(map(repr, unknown))} not known; there are {', '.join(DTYPES)}")
    return names


class Problem:
    """A GRU, its inputs, and the ways to run it; each way returns outputs, and with `train` gradients."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, train: bool):
        torch.manual_seed(0)
        options = {"device": device, "dtype": dtype}
        self.train = train
        self.module = nn.GRU(shape.I, shape.H, shape.L, bidirectional=shape.D == 2).to(**options)
        if device.type == "cuda":
            self.module.flatten_parameters()
        self.x = torch.randn(shape.T, shape.B, shape.I, **options, requires_grad=train)
        self.hx = torch.randn(shape.L * shape.D, shape.B, shape.H, **options, requires_grad=train)
        self.flags = (True, shape.L, 0.0, train, shape.D == 2, False)
        self.grad_output = torch.randn(shape.T, shape.B, shape.D * shape.H, **options)

    def _finish(self, outputs: tuple[Tensor, Tensor]) -> list[Tensor]:
        if not self.train:
            return list(outputs)
        inputs = [self.x, self.hx, *self.module.parameters()]
        return [*outputs, *torch.autograd.grad(outputs[0], inputs, self.grad_output)]

    def forward(self, way: str) -> tuple[Tensor, Tensor]:
        """output and h_n by "own", "fused" or "recompute"."""
        arguments = self.x, self.hx, self.module._flat_weights, *self.flags
        if way == "own":
            return torch.gru(*arguments)
        return torch.ops.torch_gru_fuse.gru.default(*arguments, recompute=way == "recompute")

    def own(self) -> list[Tensor]:
        return self._finish(self.forward("own"))

    def fused(self) -> list[Tensor]:
        return self._finish(self.forward("fused"))

    def compiled(self, rewrite: bool, **options: Any) -> Callable[[], list[Tensor]]:
        """Compiled at its first call, as a user's model is."""
        torch._dynamo.reset()
        model = torch.compile(self.module, **options)

        def run() -> list[Tensor]:
            with torch_gru_fuse.enable() if rewrite else contextlib.nullcontext():
                return self._finish(model(self.x, self.hx))

        return run

    def exact(self) -> list[Tensor]:
        """The results in float64, on the same device."""
        double = Problem.__new__(Problem)
        double.train, double.flags = self.train, self.flags
        double.module = nn.GRU(
            self.module.input_size, self.module.hidden_size, self.module.num_layers, bidirectional=self.module.bidirectional
        ).to(self.x.device, torch.float64)
        double.module.load_state_dict(self.module.state_dict())
        double.x, double.hx = (t.detach().double().requires_grad_(self.train) for t in (self.x, self.hx))
        double.grad_output = self.grad_output.double()
        return double.own()


def _error(results: list[Tensor], exact: list[Tensor]) -> tuple[float, float]:
    """Greatest and RMS error over all results, each relative to the RMS of the exact one."""
    greatest, squares, count = 0.0, 0.0, 0
    for actual, expected in zip(results, exact, strict=True):
        error = (actual.double() - expected) / expected.square().mean().sqrt().clamp(min=1e-300)
        if not torch.isfinite(error).all():
            return math.inf, math.inf
        greatest = max(greatest, error.abs().max().item())
        squares += error.square().sum().item()
        count += error.numel()
    return greatest, math.sqrt(squares / count)


def _is_wrong(error: tuple[float, float], own: tuple[float, float], dtype: torch.dtype) -> bool:
    return _judge(error, own, dtype)[0]


def _judge(error: tuple[float, float], own: tuple[float, float], dtype: torch.dtype) -> tuple[bool, str]:
    """Whether a result is wrong, and if not, how it is less exact than PyTorch's own; each error is (greatest, RMS).

    Where float32 products may use TF32, PyTorch may still do without, as cuDNN does for few units: a result with the error of
    TF32 is then not wrong, but never passes without a word.
    """

    def within(factor: float, eps: float) -> bool:
        return all(
            math.isfinite(e) and e <= max(factor * o, units * eps) for e, o, units in zip(error, own, WRONG_EPS, strict=True)
        )

    eps = torch.finfo(dtype).eps
    if within(WRONG, eps):
        return False, f"{error[1] / own[1]:.2f} times the error" if own[1] > 0 and error[1] > LESS_EXACT * own[1] else ""
    if dtype == torch.float32 and torch.cuda.is_available() and torch_hooks.rnn_allows_tf32() and within(WRONG, TF32_EPS):
        return False, "TF32, which is allowed; PyTorch's own is more exact"
    return True, ""


def _held(problem: Problem) -> dict[str, float]:
    """MiB that a forward leaves allocated until its backward, by way."""
    held = {}
    for way in ("own", "fused", "recompute"):
        problem._finish(problem.forward(way))  # workspaces and code
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        outputs = problem.forward(way)
        held[way] = (torch.cuda.memory_allocated() - before) / 2**20
        del outputs
    return held


def _ways(problem: Problem, device: torch.device, compile_: bool) -> Iterator[tuple[str, Callable[[], Callable[[], object]]]]:
    """(name, maker of a function to time); "own" is PyTorch's GRU, on CUDA cuDNN's."""
    yield "own", lambda: problem.own
    yield "fused", lambda: problem.fused
    if device.type == "cuda":
        yield "own, graph", lambda: graph_of(problem.own)
        yield "fused, graph", lambda: graph_of(problem.fused)
    if compile_:
        yield "compiled without", lambda: problem.compiled(False)
        yield "compiled", lambda: problem.compiled(True, fullgraph=True)
        yield "reduce-overhead", lambda: problem.compiled(True, fullgraph=True, mode="reduce-overhead")


def measure(name: str, shape: Shape, dtype_name: str, device: torch.device, *, train: bool, repeat: int, compile_: bool) -> Row:
    """Check one shape and dtype, and time it if it is right."""
    dtype = DTYPES[dtype_name]
    row = Row(name, dtype_name, train, shape)
    problem = Problem(shape, dtype, device, train)
    with torch.set_grad_enabled(train):
        exact = problem.exact()
        row.errors["own"] = _error(problem.own(), exact)
        try:
            row.errors["fused"] = _error(problem.fused(), exact)
            torch_gru_fuse.check_errors()
        except Exception as reason:  # of the compiler, the launch, the driver: the next shape may still run
            row.errors["fused"], row.failed["fused"] = (math.inf, math.inf), _first_line(reason)
        wrong, row.less_exact = _judge(row.errors["fused"], row.errors["own"], dtype)
        row.ran = _what_ran(problem, shape, dtype, device)
        if wrong:
            row.wrong.append("fused")
            return row
        if train and device.type == "cuda":
            row.held = _held(problem)
        times = {}
        for way, make in _ways(problem, device, compile_):
            try:
                run = make()
                if "compiled" in way or way == "reduce-overhead":
                    row.errors[way] = _error([t.clone() for t in run()], exact)
                times[way] = milliseconds(run, device, repeat)
                if isinstance(run, Replay):
                    row.errors[way] = _error(run.results, exact)
                torch_gru_fuse.check_errors()
                if way in row.errors and _is_wrong(row.errors[way], row.errors["own"], dtype):
                    row.wrong.append(way)
            except Exception as reason:
                times.pop(way, None)
                row.failed[way] = _first_line(reason)
        if not row.wrong:
            row.milliseconds = times
    return row


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _what_ran(problem: Problem, shape: Shape, dtype: torch.dtype, device: torch.device) -> str:
    """The plan of the op for a call that it has just run."""
    if device.type != "cuda":
        return "torch"
    from torch_gru_fuse.ops.support import gpu_of, why_not_kernels
    from torch_gru_fuse.planner.plan import plan_gru

    plan = plan_gru(
        shape.T, shape.B, shape.I, shape.H, shape.L, shape.D, str(dtype), tf32_allowed=torch_hooks.rnn_allows_tf32(),
        training=problem.train, cudnn=torch_hooks.cudnn_runs(problem.x), unsupported=why_not_kernels(problem.x),
        gpu=gpu_of(problem.x.get_device()),
    )  # fmt: skip
    return f"{plan.kernel if plan.whole is None else plan.whole} ({plan.reason})"


COLUMNS = ("own", "own, graph", "compiled without", "fused", "compiled", "reduce-overhead", "fused, graph")


# What is printed of the ratios, by name: theirs / ours.
RATIOS_CUDA = {"graph ratio": ("own, graph", "fused, graph"), "eager ratio": ("own", "fused")}
RATIOS_CPU = {"ratio": ("own", "fused")}


def _ratios(row: Row, device: torch.device) -> dict[str, float | None]:
    pairs = RATIOS_CUDA if device.type == "cuda" else RATIOS_CPU
    return {name: row.ratio(ours, theirs) for name, (theirs, ours) in pairs.items()}


def _format(rows: list[Row], device: torch.device) -> str:
    columns = [c for c in COLUMNS if any(c in r.milliseconds for r in rows)]
    pairs = RATIOS_CUDA if device.type == "cuda" else RATIOS_CPU
    head = f"{'shape':9} {'dtype':9}" + "".join(f"{c:>18}" for c in columns) + "".join(f"{name:>13}" for name in pairs)
    held = any(row.held for row in rows)
    memory = f"{'held: own':>12}{'fused':>9}{'recompute':>10}" if held else ""
    lines = [f"{head}  {'error: rms':>10} {'own':>8} {'greatest':>9} {'own':>8}{memory}"]
    for row in rows:
        start = f"{row.name:9} {row.dtype:9}"
        (greatest, rms), (own_greatest, own_rms) = row.errors["fused"], row.errors["own"]
        errors = f"  {rms:10.1e} {own_rms:8.1e} {greatest:9.1e} {own_greatest:8.1e}"
        if row.wrong:
            also = "".join(f"; {way} {row.errors[way][1]:.1e}" for way in row.wrong if way != "fused")
            lines.append(f"{start}  WRONG: {', '.join(row.wrong)}; no times; errors{errors}{also}")
            continue
        times = "".join(f"{row.milliseconds[c]:18.4f}" if c in row.milliseconds else f"{'-':>18}" for c in columns)
        ratios = "".join(f"{'-' if ratio is None else f'{ratio:.2f}x':>13}" for ratio in _ratios(row, device).values())
        memory = "".join(f"{row.held[w]:{n}.1f}" for w, n in (("own", 12), ("fused", 9), ("recompute", 10))) if row.held else ""
        lines.append(f"{start}{times}{ratios}{errors}{memory}{f'  ! {row.less_exact}' if row.less_exact else ''}")
    lines += [f"{row.name} {row.dtype}, {way}: {why}" for row in rows for way, why in row.failed.items()]
    quotients = ", ".join(f"{name}: {theirs} / {ours}" for name, (theirs, ours) in pairs.items())
    lines.append(
        f"Milliseconds, medians. own: PyTorch's GRU{' (cuDNN)' if device.type == 'cuda' else ''}. {quotients}. "
        "error: of fused, against float64, relative to its RMS, beside PyTorch's own."
        + (" held: MiB between forward and backward." if held else "")
    )
    return "\n".join(lines)


def _plot(rows: list[Row], device: torch.device, file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    base = "own, graph" if device.type == "cuda" else "own"
    rows = [row for row in rows if base in row.milliseconds]
    ways = [c for c in COLUMNS if c != base and any(c in r.milliseconds for r in rows)]
    figure, axes = pyplot.subplots(figsize=(max(6.0, 0.9 * len(rows) + 3), 4.5), layout="constrained")
    width = 0.8 / max(1, len(ways))
    for i, way in enumerate(ways):
        places = [p + i * width for p in range(len(rows))]
        axes.bar(places, [row.ratio(way, base) or math.nan for row in rows], width, label=way)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xticks([p + 0.4 - width / 2 for p in range(len(rows))], [f"{r.name}\n{r.dtype}" for r in rows])
    axes.set_ylabel(f"times as fast as {base}")
    axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _architecture(name: str | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if name is None else emulate.emulating(name)


def _context(device: torch.device) -> dict[str, str]:
    context = {"torch": torch.__version__, "device": str(device)}
    if device.type == "cuda":
        import triton

        context |= {
            "device": torch.cuda.get_device_name(device),
            "triton": triton.__version__,
            "cudnn": str(torch.backends.cudnn.version()),
        }
    return context


def run(arguments: argparse.Namespace) -> int:
    try:
        shapes, dtypes = _chosen_shapes(arguments), _chosen_dtypes(arguments)
        if arguments.repeat < 1:
            raise BenchError(f"--repeat is {arguments.repeat}, expected at least 1")
        device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and not torch.cuda.is_available():
            raise BenchError(f"--device is {device}, but torch sees no CUDA device")
        if arguments.architecture and device.type != "cuda":
            raise BenchError(f"--as {arguments.architecture} is for a GPU, the device is {device}")
        if arguments.plot:
            import matplotlib  # noqa: F401  (before the measurements, not after them)
    except (BenchError, ImportError, RuntimeError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    rows: list[Row] = []
    try:
        with _architecture(arguments.architecture) as gpu:
            if gpu is not None:
                emulate.check_planner(gpu, torch.cuda.current_device() if device.index is None else device.index)
            with tqdm(total=len(shapes) * len(dtypes), disable=not sys.stderr.isatty()) as bar:
                for name, shape in shapes.items():
                    for dtype in dtypes:
                        rows.append(measure(
                            name, shape, dtype, device,
                            train=arguments.train, repeat=arguments.repeat, compile_=not arguments.no_compile,
                        ))  # fmt: skip
                        bar.update(1)
    except emulate.EmulationError as error:
        print(f"bench: --as {arguments.architecture}: {error}", file=sys.stderr)
        return 2
    context = _context(device)
    if gpu is not None:
        context["planned and compiled for"] = f"{gpu.name} ({arguments.architecture}, {gpu.multiprocessors} multiprocessors)"
    document = {"context": context, "rows": [{**asdict(row), "ratios": _ratios(row, device)} for row in rows]}
    if arguments.json == "-":
        print(json.dumps(document, indent=1))
    else:
        what = "forward + backward" if arguments.train else "forward"
        print("#", ", ".join(f"{key} {value}" for key, value in context.items()) + ",", what)
        print(_format(rows, device))
        if arguments.json:
            with open(arguments.json, "w") as file:
                json.dump(document, file, indent=1)
    if arguments.plot:
        _plot(rows, device, arguments.plot)
    return int(any(row.wrong for row in rows))
