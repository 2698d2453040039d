"""Measure which plan for whole sequences in one launch is the fastest on the GPU at hand, and keep it in a file.

The planner predicts and never measures. This command runs what it would choose and what comes near it, of all kinds of
kernels: each result is compared with float64, two runs have to give the same bits, and times are medians of a forward pass
replayed from a CUDA graph. The fastest goes to plans.json in the folder that TORCH_GRU_FUSE_CACHE names, or else in
torch_gru_fuse of the user's cache folder. It holds for GRUs of the same batch, H, layers, directions and dtype, whatever their
number of steps and inputs, on this model of GPU with these versions of the package and of Triton.

    python -m torch_gru_fuse tune --T 512 --B 10 --I 128 --H 256 --layers 6 --dtype float16

Nearly all of the time, a few seconds a plan, is the compiler's.

Exit status: 0; 1 when a result was wrong; 2 when nothing was measured, or nothing could be written.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.hub import tqdm  # the real one where it is installed, else a plain counter

from torch_gru_fuse.planner import tuned
from torch_gru_fuse.planner.gpus import GPU
from torch_gru_fuse.planner.whole_sequence import WholeSequencePlan, why_no_plan, why_not_gpu
from torch_gru_fuse.tools import bench, emulate, timing
from torch_gru_fuse.tools.plan import ELEMENT_BYTES, _positive

SUMMARY = "measure which whole-sequence plan is the fastest here, and keep it"

# The planned one is kept unless another is faster by more than this: two measurements of the same plan differ by as much.
NOISE = 0.02


class TuneError(Exception):
    """Nothing can be measured; the message says why."""


class WrongResult(Exception):
    """A plan gave a wrong result; the message says how wrong."""


@dataclass(frozen=True)
class Measured:
    """microseconds of a forward pass; errors are (greatest, RMS) against float64, relative to its RMS."""

    us: float
    error: tuple[float, float]
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A plan, and what was measured or why it was not."""

    plan: WholeSequencePlan
    measured: Measured | None = None
    failed: str = ""
    wrong: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, meaning in (("T", "time steps"), ("B", "batch"), ("I", "inputs of the lowest layer"), ("H", "hidden units")):
        parser.add_argument(f"--{name}", type=_positive, required=True, metavar="N", help=meaning)
    parser.add_argument("--layers", type=_positive, default=1, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--bidirectional", action="store_true", help="two directions in each layer")
    parser.add_argument("--dtype", choices=list(ELEMENT_BYTES), default="float32", help="(default: %(default)s)")
    parser.add_argument(
        "--repeat", type=_positive, default=21, metavar="N", help="timed calls of a plan (default: %(default)s)"
    )
    parser.add_argument("--no-store", action="store_true", help="print the table only")


def run(arguments: argparse.Namespace) -> int:
    shape = bench.Shape(arguments.T, arguments.B, arguments.I, arguments.H, arguments.layers, 1 + arguments.bidirectional)
    try:
        gpu = _gpu_at_hand()
        plans = plans_of(gpu, shape, arguments.dtype)
        own, measure = _measuring(shape, arguments.dtype, arguments.repeat, "cuda")
    except TuneError as error:
        print(f"torch_gru_fuse tune: {error}.", file=sys.stderr)
        return 2
    return report(gpu, shape, arguments.dtype, plans, own, measure, store=not arguments.no_store)


def plans_of(gpu: GPU, shape: bench.Shape, dtype: str) -> list[WholeSequencePlan]:
    """What to measure, the planned one first.  Raises TuneError if there is nothing."""
    sizes = (shape.B, shape.H, _lanes(shape), ELEMENT_BYTES[dtype])
    refused = why_not_gpu(gpu)
    if refused is not None:
        raise TuneError(refused)
    plans = tuned.candidates(*sizes, shape.D == 2, gpu.multiprocessors, gpu.shared_bytes_per_program)
    if not plans:
        options = dict(multiprocessors=gpu.multiprocessors, shared_bytes=gpu.shared_bytes_per_program)
        raise TuneError(f"there is no plan: {why_no_plan(*sizes, reverse=shape.D == 2, **options)}")
    return plans


def report(
    gpu: GPU,
    shape: bench.Shape,
    dtype: str,
    plans: Sequence[WholeSequencePlan],
    own: Measured,
    measure: Callable[[WholeSequencePlan], Measured],
    *,
    store: bool = True,
) -> int:
    """Measures, prints, stores; the exit status.  own: PyTorch's own GRU.  measure: raises WrongResult, or what went wrong."""
    rows = measure_all(plans, measure)
    fastest = choose(rows)
    print(_format(gpu, shape, dtype, rows, own, fastest))
    if fastest is None:
        print("torch_gru_fuse tune: no plan ran; nothing is kept.", file=sys.stderr)
        return 1 if any(row.wrong for row in rows) else 2
    if store:
        key = tuned.key_of(gpu.name, shape.B, shape.H, _lanes(shape), reverse=shape.D == 2, dtype=dtype)
        entry = tuned.Entry(fastest.plan, fastest.measured.us, own.us, shape.T, shape.I, shape.L)
        try:
            print(f"Kept in {tuned.store(key, entry)}.")
        except (OSError, RuntimeError) as error:  # RuntimeError: no home folder
            print(
                f"torch_gru_fuse tune: the plan cannot be kept, {error}; TORCH_GRU_FUSE_CACHE names a folder.", file=sys.stderr
            )
            return 2
    return int(any(row.wrong for row in rows))


def measure_all(plans: Sequence[WholeSequencePlan], measure: Callable[[WholeSequencePlan], Measured]) -> list[Row]:
    rows = []
    with tqdm(total=len(plans), disable=not sys.stderr.isatty()) as bar:
        for plan in plans:
            try:
                rows.append(Row(plan, measure(plan)))
            except WrongResult as error:
                rows.append(Row(plan, failed=str(error), wrong=True))
            except Exception as error:  # of the compiler, the launch, or the driver: the next plan may still run
                rows.append(Row(plan, failed=_first_line(error)))
            bar.update(1)
    return rows


def choose(rows: Sequence[Row]) -> Row | None:
    """The fastest; the first, which is the planned one, unless another is faster by more than the noise."""
    measured = [row for row in rows if row.measured is not None]
    if not measured:
        return None
    fastest = min(measured, key=lambda row: row.measured.us)
    planned = rows[0]
    if planned.measured is not None and planned.measured.us <= (1 + NOISE) * fastest.measured.us:
        return planned
    return fastest


def _lanes(shape: bench.Shape) -> int:
    return 2 if shape.D == 2 else shape.L


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:120]


# ---- on the GPU ---------------------------------------------------------------------------------------------------------


def _gpu_at_hand() -> GPU:
    import torch

    if not torch.cuda.is_available():
        raise TuneError("plans are measured on a GPU, and torch sees no CUDA device")
    if os.environ.get(emulate.GPU_VARIABLE):
        raise TuneError(f"{emulate.GPU_VARIABLE} is set, and times of this GPU are not those of another; unset it")
    from torch_gru_fuse.ops.support import gpu_of

    gpu = gpu_of(torch.cuda.current_device())
    if gpu is None:
        raise TuneError("the GPU at hand is not an NVIDIA GPU")
    return gpu


def _measuring(
    shape: bench.Shape, dtype_name: str, repeat: int, device_name: str
) -> tuple[Measured, Callable[[WholeSequencePlan], Measured]]:  # fmt: skip
    """PyTorch's own GRU as measured, and a function that measures a plan."""
    import torch

    import torch_gru_fuse
    from torch_gru_fuse import torch_hooks
    from torch_gru_fuse.ops import whole_path
    from torch_gru_fuse.ops.call import GRUCall
    from torch_gru_fuse.planner.plan import Plan, uses_tf32

    dtype, device = bench.DTYPES[dtype_name], torch.device(device_name)
    tf32 = dtype == torch.float32
    if tf32 and not torch_hooks.rnn_allows_tf32():
        raise TuneError("whole sequences in one launch need TF32 for float32, which torch.backends.cudnn forbids here")
    if tf32 and not uses_tf32(shape.T, shape.B, shape.H, training=False):
        raise TuneError(f"float32 GRUs of H = {shape.H} run without TF32, and not as whole sequences in one launch")
    with torch.no_grad():
        problem = bench.Problem(shape, dtype, device, train=False)
        exact = problem.exact()
        own_error = bench._error(problem.own(), exact)
        own = Measured(1e3 * timing.milliseconds(timing.graph_of(problem.own), device, repeat), own_error)
    weights = [weight.detach() for weight in problem.module._flat_weights]
    call = GRUCall(problem.x, problem.hx, weights, True, shape.L, shape.D == 2, None)

    @torch.no_grad()
    def measure(plan: WholeSequencePlan) -> Measured:
        chosen = Plan("whole", None, tf32, "tune", plan)

        def forward() -> list[torch.Tensor]:
            return list(whole_path.gru_forward(call, False, chosen)[:2])

        results = forward()
        torch_gru_fuse.check_errors()
        error = bench._error(results, exact)
        wrong, note = bench._judge(error, own_error, dtype)
        if wrong:
            raise WrongResult(f"error {error[1]:.1e}, PyTorch's own {own_error[1]:.1e}")
        us = 1e3 * timing.milliseconds(timing.graph_of(forward), device, repeat)
        torch_gru_fuse.check_errors()
        again = forward()
        torch_gru_fuse.check_errors()
        if not all(torch.equal(a, b) for a, b in zip(again, results, strict=True)):
            raise WrongResult("another run gave other bits")
        return Measured(us, error, note)

    return own, measure


# ---- words --------------------------------------------------------------------------------------------------------------


def _format(gpu: GPU, shape: bench.Shape, dtype: str, rows: Sequence[Row], own: Measured, fastest: Row | None) -> str:
    directions = ", two directions" if shape.D == 2 else ""
    lines = [
        f"# {gpu.name}: T={shape.T}, B={shape.B}, I={shape.I}, H={shape.H}, layers {shape.L}{directions}, {dtype}",
        f"  {'us':>9} {'ratio':>7} {'error: rms':>11}  plan",
        f"  {own.us:9.1f} {'':7} {own.error[1]:11.1e}  PyTorch's own GRU (cuDNN), which the ratio is to",
    ]
    for row in sorted(rows, key=lambda row: math.inf if row.measured is None else row.measured.us):
        mark = ("*" if row is fastest else " ") + ("p" if row is rows[0] else " ")
        if row.measured is None:
            lines.append(f"{mark}{'WRONG' if row.wrong else '-':>9} {'':7} {'':11}  {_plan(row.plan)}: {row.failed}")
            continue
        measured = row.measured
        note = f"  ! {measured.note}" if measured.note else ""
        lines.append(
            f"{mark}{measured.us:9.1f} {own.us / measured.us:6.2f}x {measured.error[1]:11.1e}  {_plan(row.plan)}{note}"
        )
    lines.append("Microseconds of a forward pass in a CUDA graph, medians.  *: kept, p: planned.")
    return "\n".join(lines)


def _plan(plan: WholeSequencePlan) -> str:
    """All that two plans can differ in."""
    kernel = plan.kernel
    values = ", ".join(f"{name}={value:d}" for name, value in vars(kernel).items() if value is not False)
    return f"{kernel.name}, {plan.lanes} at once, {values}"
