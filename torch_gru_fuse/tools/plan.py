"""Print which whole-sequence kernel is planned for the forward (or the backward) pass of a GRU on a GPU, and what the ops run.

No GPU is needed, also not with --compile: the compiler then makes the code for that GPU and says what it takes. The time is
predicted by a linear model from measurements on an H200; it is no measurement.

    python -m torch_gru_fuse plan --T 512 --B 10 --I 128 --H 256 --layers 6 --dtype float16
    python -m torch_gru_fuse plan --gpu rtx4090 --T 512 --B 10 --I 128 --H 256 --layers 6 --bidirectional --compile --json
    python -m torch_gru_fuse plan --gpu rtx4090 --T 512 --B 10 --I 128 --H 256 --layers 6 --backward

--gpu is a name, or cuda, cuda:1, ... for a GPU at hand; without it the current one is taken.

Exit status: 0 with an answer, also where no kernel is planned; 2 when the arguments or the environment are wrong.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass

from torch_gru_fuse.planner.gpus import GPU, GPUS, gpu_named
from torch_gru_fuse.planner.plan import Plan, plan_gru
from torch_gru_fuse.planner.whole_sequence import (
    StagedPlan,
    WholeSequencePlan,
    plan_whole_sequence,
    plan_whole_sequence_backward,
    predict,
    why_no_plan,
    why_not_gpu,
)

SUMMARY = "print the kernel that is planned for a GRU on a GPU, which need not be there"

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
        kernel: "resident", "wavefront" or "staged", the planned kernel.
        grid: of one launch.
        num_programs: programs of one launch.
        num_warps: of a program.
        registers: of a thread.
        spills: bytes of a thread's registers that are spilled.
        shared_bytes: of a program.
        resident_per_sm: programs that a multiprocessor holds at once.
        predicted_us: microseconds of a forward pass by a model; nobody has measured it.  None of a backward pass.
        reason: why this kernel or none, where the prediction comes from, and what the ops run.
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
    parser.add_argument(
        "--gpu", metavar="GPU", help=f"one of {', '.join(GPUS)}, or cuda, cuda:1, ... for one at hand (default: cuda)"
    )
    parser.add_argument("--T", type=_positive, required=True, metavar="N", help="time steps")
    parser.add_argument("--B", type=_positive, required=True, metavar="N", help="batch")
    parser.add_argument("--I", type=_positive, required=True, metavar="N", help="inputs of the lowest layer")
    parser.add_argument("--H", type=_positive, required=True, metavar="N", help="hidden units")
    parser.add_argument("--layers", type=_positive, default=1, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--bidirectional", action="store_true", help="two directions in each layer")
    parser.add_argument("--dtype", choices=list(ELEMENT_BYTES), default="float32", help="(default: %(default)s)")
    parser.add_argument("--backward", action="store_true", help="of training, the kernel of the backward pass")
    parser.add_argument("--compile", action="store_true", help="compile the kernel for that GPU and print what it takes")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def run(arguments: argparse.Namespace) -> int:
    shape = Shape(
        arguments.T, arguments.B, arguments.I, arguments.H, arguments.layers, arguments.bidirectional, arguments.dtype
    )
    try:
        gpu = _gpu(arguments.gpu)
        report = plan(gpu, shape, backward=arguments.backward, compile=arguments.compile)
    except PlanError as error:
        print(f"torch_gru_fuse plan: {error}", file=sys.stderr)
        return 2
    print(json.dumps(asdict(report), indent=2) if arguments.json else _format(report, gpu, shape))
    return 0


def plan(gpu: GPU, shape: Shape, *, backward: bool = False, compile: bool = False) -> Report:
    """The planned kernel for a forward or backward pass, and, if ``compile``, what the compiler makes of it."""
    refused = why_not_gpu(gpu)
    try:
        ops = plan_gru(
            shape.T, shape.B, shape.I, shape.H, shape.layers, shape.directions, f"torch.{shape.dtype}",
            tf32_allowed=True, training=backward, cudnn=True, unsupported=refused if gpu.capability < (8, 0) else None, gpu=gpu,
        )  # fmt: skip
    except ValueError as error:  # TORCH_GRU_FUSE_KERNELS
        raise PlanError(f"{error}.") from error
    lanes = 2 if shape.bidirectional else shape.layers
    sizes = (shape.B, shape.H, lanes, ELEMENT_BYTES[shape.dtype])
    options = dict(reverse=shape.bidirectional, multiprocessors=gpu.multiprocessors, shared_bytes=gpu.shared_bytes_per_program)
    refused = refused or why_no_plan(*sizes, **options)
    if backward and refused is None:
        planned = plan_whole_sequence_backward(*sizes, **options)
        if planned is None:
            refused = "there is none for the backward of these sizes"
    elif refused is None:
        planned = ops.whole or plan_whole_sequence(*sizes, **options)
    if refused is not None:
        return Report(reason=f"No whole-sequence kernel is planned: {refused}. {_what_the_ops_run(ops, None, backward)}")
    us, source = (None, "") if backward else _predicted(gpu, planned, shape)
    programs = planned.programs(shape.B, shape.H)
    registers, spills, shared_bytes, resident = _compile(gpu, shape, planned, backward) if compile else [None] * 4
    sentences = [
        f"Planned: {planned.kernel.name}, {_launches(planned, shape)}.",
        _precision(shape, ops),
        _verdict(gpu, planned, shape, spills, resident) if compile else "",
        source,
        _what_the_ops_run(ops, planned, backward),
    ]
    return Report(
        kernel=planned.kernel.name, grid=[programs], num_programs=programs, num_warps=planned.kernel.num_warps,
        registers=registers, spills=spills, shared_bytes=shared_bytes, resident_per_sm=resident,
        predicted_us=None if us is None else round(us, 1), reason=" ".join(s for s in sentences if s),
    )  # fmt: skip


def _predicted(gpu: GPU, planned: WholeSequencePlan, shape: Shape) -> tuple[float, str]:
    """Microseconds, by the planner's model, and a sentence on where they come from."""
    made = predict(
        planned, steps=shape.T, batch=shape.B, hidden=shape.H, layers=shape.layers, element_bytes=ELEMENT_BYTES[shape.dtype],
        reverse=shape.bidirectional, multiprocessors=gpu.multiprocessors,
    )  # fmt: skip
    elsewhere = "" if "H200" in gpu.name else ", not corrected for another GPU"
    text = f"{made.steps} steps of {made.us_a_step:.2f} us, a model of measurements on an H200{elsewhere}"
    return made.us, f"Predicted, not measured: {text}."


def _compile(gpu: GPU, shape: Shape, planned: WholeSequencePlan, backward: bool) -> list[int]:
    """[registers, spilled bytes, bytes of shared memory, programs on a multiprocessor]"""
    try:
        import torch

        from torch_gru_fuse.kernels import aot
    except ImportError as error:
        raise PlanError(f"--compile needs Triton with Gluon, 3.6 or newer: {error}.") from error
    compile_launch = aot.compile_whole_sequence_backward if backward else aot.compile_whole_sequence
    compiled = compile_launch(
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


def _precision(shape: Shape, ops: Plan) -> str:
    if shape.dtype != "float32":
        return ""
    text = "Its float32 products use TF32"
    return f"{text}." if ops.tf32 else f"{text}; the ops, as cuDNN, do not for these sizes."


def _verdict(gpu: GPU, planned: WholeSequencePlan, shape: Shape, spills: int, resident: int) -> str:
    if spills:
        return f"As compiled here it spills {spills} bytes a thread, which the plan did not expect."
    programs = planned.programs(shape.B, shape.H)
    if not resident:
        return "As compiled here not even one program fits a multiprocessor: it cannot be launched."
    if planned.waits(reverse=shape.bidirectional) and programs > gpu.multiprocessors * resident:
        return f"As compiled here its {programs} programs are not all on the GPU at once: it cannot be launched."
    return ""


def _what_the_ops_run(ops: Plan, planned: WholeSequencePlan | None, backward: bool) -> str:
    """``ops``: their plan for the same call, with TORCH_GRU_FUSE_KERNELS as it is set."""
    if backward and ops.backward is not None and ops.kernel in ("whole", "step"):
        what = "this plan" if ops.backward == planned else f"whole sequences by {ops.backward}"
        return f"The ops run {what} ({ops.reason})."
    if ops.kernel == "torch":
        what = "PyTorch's own GRU, cuDNN on this GPU"
    elif ops.kernel == "step" and ops.tile is not None:
        tile = f"a tile of {ops.tile.block_b} rows and {ops.tile.block_u} units"
        what = f"the step kernel, one launch a time step and layer, {tile}"
    elif ops.kernel == "whole":
        what = "this plan" if ops.whole == planned else f"whole sequences by {ops.whole}"
    else:
        what = f"the {ops.kernel} kernel"
    return f"The ops run {what} ({ops.reason})."


def _tile(planned: WholeSequencePlan) -> str:
    kernel = planned.kernel
    tiles = kernel.tiles if isinstance(kernel, StagedPlan) else 1
    return f"{kernel.units} units and {kernel.rows} rows a program" + (f", {tiles} such tiles in turn" if tiles > 1 else "")


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
        if report.predicted_us is not None:
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


def _gpu(name: str | None) -> GPU:
    """A known GPU by name, or one at hand."""
    device, _, index = (name or "cuda").lower().partition(":")
    if device != "cuda":
        try:
            return gpu_named(name)
        except ValueError as error:
            raise PlanError(f"--gpu: {error}, or cuda, cuda:1, ... for one at hand.") from error
    import torch

    from torch_gru_fuse.ops.support import gpu_of

    if not torch.cuda.is_available():
        asked = "--gpu was not given" if name is None else f"--gpu is {name}"
        raise PlanError(f"{asked}, but torch sees no CUDA device; expected one of {', '.join(GPUS)}.")
    number = torch.cuda.device_count()
    if index and not (index.isdecimal() and int(index) < number):
        raise PlanError(f"--gpu is {name}, expected cuda:0 to cuda:{number - 1}.")
    gpu = gpu_of(int(index) if index else torch.cuda.current_device())
    if gpu is None:
        raise PlanError(f"--gpu is {name or 'cuda'}, but the GPU at hand is not an NVIDIA GPU.")
    return gpu
