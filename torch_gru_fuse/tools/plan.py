"""Print which kernel is planned for a whole sequence of a GRU on a GPU, and what the ops of this version run instead.

No GPU is needed, also not with --compile: the compiler then makes the code for that GPU and says what it takes. The time is
predicted by a linear model from measurements of a prototype on an H200 (docs/design/whole-sequence.md); it is no measurement.

Exit status: 0 with an answer, also where no kernel is planned; 2 when the arguments or the environment are wrong.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass

from torch_gru_fuse.planner.gpus import GPU, GPUS, gpu_named
from torch_gru_fuse.planner.plan import Plan, plan_gru
from torch_gru_fuse.planner.whole_sequence import (
    Prediction,
    WholeSequencePlan,
    plan_whole_sequence,
    predict,
    why_no_plan,
    why_not_gpu,
)

SUMMARY = "print the kernel that is planned for a GRU on a GPU, without one"

ELEMENT_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


class PlanError(Exception):
    """There is no answer; the message says what to do."""


@dataclass(frozen=True)
class Shape:
    """A forward pass: T steps, batch B, I inputs, H units."""

    T: int
    B: int
    I: int
    H: int
    layers: int = 1
    bidirectional: bool = False
    dtype: str = "float32"

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    def __str__(self) -> str:
        layers = "1 layer" if self.layers == 1 else f"{self.layers} layers"
        directions = ", two directions" if self.bidirectional else ""
        return f"T={self.T}, B={self.B}, I={self.I}, H={self.H}, {layers}{directions}, {self.dtype}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the command prints; --json prints exactly this.  None: no kernel is planned, or it was not compiled.

    Attributes:
        kernel: "wavefront" or "resident", the planned kernel.
        grid: of one launch.
        num_programs: programs of one launch.
        num_warps: of a program.
        registers: of a thread.
        spills: bytes of a thread's registers that are spilled.
        shared_bytes: of a program.
        resident_per_sm: programs that a multiprocessor holds at once.
        predicted_us: microseconds of a forward pass by ``planner.whole_sequence.predict``; nobody has measured it.
        reason: why this kernel or none, where the prediction comes from, and what the ops run today.
    """

    kernel: str | None = None
    grid: list[int] | None = None
    num_programs: int | None = None
    num_warps: int | None = None
    registers: int | None = None
    spills: int | None = None
    shared_bytes: int | None = None
    resident_per_sm: int | None = None
    predicted_us: float | None = None
    reason: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", type=_gpu, required=True, help=f"one of {', '.join(GPUS)}")
    parser.add_argument("--T", type=_positive, required=True, metavar="N", help="time steps")
    parser.add_argument("--B", type=_positive, required=True, metavar="N", help="batch")
    parser.add_argument("--I", type=_positive, required=True, metavar="N", help="inputs of the lowest layer")
    parser.add_argument("--H", type=_positive, required=True, metavar="N", help="hidden units")
    parser.add_argument("--layers", type=_positive, default=1, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--bidirectional", action="store_true", help="two directions in each layer")
    parser.add_argument("--dtype", choices=list(ELEMENT_BYTES), default="float32", help="(default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="compile the kernel for that GPU and print what it takes")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(arguments: argparse.Namespace) -> int:
    shape = Shape(
        arguments.T, arguments.B, arguments.I, arguments.H, arguments.layers, arguments.bidirectional, arguments.dtype
    )
    try:
        report = plan(arguments.gpu, shape, compile=arguments.compile)
    except PlanError as error:
        print(f"torch_gru_fuse plan: {error}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(report), indent=2) if arguments.json else _format(report, arguments.gpu, shape))
    return 0


def plan(gpu: GPU, shape: Shape, *, compile: bool = False) -> Report:
    """The planned kernel for a forward pass, and, if ``compile``, what the compiler makes of it."""
    refused = why_not_gpu(gpu)
    try:
        today = plan_gru(
            shape.T, shape.B, shape.I, shape.H, shape.layers, shape.directions, f"torch.{shape.dtype}",
            tf32_allowed=True, training=False, cudnn=True, unsupported=refused if gpu.capability < (8, 0) else None,
        )  # fmt: skip
    except ValueError as error:  # TORCH_GRU_FUSE_KERNELS
        raise PlanError(f"{error}.") from error
    lanes = 2 if shape.bidirectional else shape.layers
    sizes = (shape.B, shape.H, lanes, ELEMENT_BYTES[shape.dtype])
    options = dict(reverse=shape.bidirectional, multiprocessors=gpu.multiprocessors)
    refused = refused or why_no_plan(*sizes, **options)
    if refused is not None:
        return Report(reason=f"No whole-sequence kernel is planned: {refused}. {_today(today)}")
    planned = plan_whole_sequence(*sizes, **options)
    prediction = predict(
        planned, steps=shape.T, batch=shape.B, hidden=shape.H, layers=shape.layers,
        element_bytes=ELEMENT_BYTES[shape.dtype], **options,
    )  # fmt: skip
    programs = planned.programs(shape.B, shape.H)
    registers, spills, shared_bytes, resident = _compile(gpu, shape, planned) if compile else [None] * 4
    sentences = [
        f"Planned: {planned.kernel.name}, {_launches(planned, shape)}.",
        _precision(shape, today),
        _verdict(gpu, planned, shape, spills, resident) if compile else "",
        f"Predicted, not measured: {_source(prediction, gpu)}.",
        "The ops of this version do not call the whole-sequence kernels yet, which ran on a GPU only as a prototype.",
        _today(today),
    ]
    return Report(
        kernel=planned.kernel.name, grid=[programs], num_programs=programs, num_warps=planned.kernel.num_warps,
        registers=registers, spills=spills, shared_bytes=shared_bytes, resident_per_sm=resident,
        predicted_us=round(prediction.us, 1), reason=" ".join(s for s in sentences if s),
    )  # fmt: skip


def _compile(gpu: GPU, shape: Shape, planned: WholeSequencePlan) -> list[int]:
    """[registers, spilled bytes, bytes of shared memory, programs on a multiprocessor]"""
    try:
        import torch

        from torch_gru_fuse.kernels import aot
    except ImportError as error:
        raise PlanError(f"--compile needs Triton with Gluon, 3.6 or newer: {error}.") from error
    compiled = aot.compile_whole_sequence(
        getattr(torch, shape.dtype), planned, batch=shape.B, hidden=shape.H, reverse=shape.bidirectional, steps=shape.T,
        capability=10 * gpu.capability[0] + gpu.capability[1],
    )  # fmt: skip
    resident = gpu.resident_programs(compiled.registers, planned.kernel.num_warps, compiled.shared_bytes)
    return [compiled.registers, compiled.spill_bytes, compiled.shared_bytes, resident]


# ---- words --------------------------------------------------------------------------------------------------------------


def _launches(planned: WholeSequencePlan, shape: Shape) -> str:
    number = planned.launches(shape.layers, reverse=shape.bidirectional)
    if shape.bidirectional:
        what = "both directions of a layer at once"
    elif planned.lanes > 1:
        what = f"all {planned.lanes} layers at once, one step behind each other"
    else:
        what = "one layer at a time"
    return f"{what}, {number} launch{'es' if number > 1 else ''}"


def _precision(shape: Shape, today: Plan) -> str:
    if shape.dtype != "float32":
        return ""
    text = "Its float32 products use TF32"
    return f"{text}." if today.tf32 else f"{text}; the ops, as cuDNN, do not for so few units."


def _verdict(gpu: GPU, planned: WholeSequencePlan, shape: Shape, spills: int, resident: int) -> str:
    if spills:
        return f"As compiled here it spills {spills} bytes a thread, which the plan did not expect."
    programs = planned.programs(shape.B, shape.H)
    if planned.waits(reverse=shape.bidirectional) and programs > gpu.multiprocessors * resident:
        return f"As compiled here its {programs} programs are not all on the GPU at once: it cannot be launched."
    return ""


def _source(prediction: Prediction, gpu: GPU) -> str:
    source = prediction.source
    dtype = "float32" if source.element_bytes == 4 else "float16"
    text = (
        f"{prediction.steps} steps of {prediction.us_a_step:.2f} us, from {source.shape} in {dtype} "
        f"({source.milliseconds:.3f} ms with a prototype on an H200, docs/design/whole-sequence.md)"
    )
    return text if "H200" in gpu.name else f"{text}, not corrected for another GPU"


def _today(today: Plan) -> str:
    what = "PyTorch's own GRU, cuDNN on this GPU"
    if today.tile is not None:
        tile = f"a tile of {today.tile.block_b} rows and {today.tile.block_u} units"
        what = f"the {today.kernel} kernel, one launch a time step and layer, {tile}"
    return f"Today the ops run {what} ({today.reason})."


def _format(report: Report, gpu: GPU, shape: Shape) -> str:
    major, minor = gpu.capability
    lines = [f"GRU: {shape}", f"GPU: {gpu.name}, sm_{major}{minor}, {gpu.multiprocessors} multiprocessors", ""]
    if report.kernel is not None:
        rows = [("kernel", report.kernel), ("grid", f"{report.num_programs} programs of {report.num_warps} warps")]
        if report.registers is not None:
            rows += [
                ("registers", f"{report.registers} a thread, {report.spills} bytes spilled"),
                ("shared memory", f"{report.shared_bytes} bytes a program"),
                ("resident", f"{report.resident_per_sm} programs a multiprocessor"),
            ]
        rows.append(("predicted", f"{report.predicted_us:.0f} us (a model, not a measurement)"))
        lines += [f"{name:<14}{value}" for name, value in rows] + [""]
    return "\n".join(lines + report.reason.replace(". ", ".\n").splitlines())


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected an integer of at least 1")
    return value


def _gpu(name: str) -> GPU:
    try:
        return gpu_named(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
