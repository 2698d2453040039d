"""Compile kernels for a GPU that is not there, and see what they take.

The compiler needs no device: ``compile_launch`` derives from the very arguments of a launch (tensors may be on the meta
device) what the launcher would ask for, ``compile_kernel`` takes it apart.  The numbers decide which tiles may be used.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from . import (
    cell,
    parameter_gradients,
    prepare,
    resident,
    resident_backward,
    staged,
    staged_backward,
    step,
    wavefront,
    wavefront_backward,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from ..planner.tiles import Tile
    from ..planner.whole_sequence import WholeSequencePlan

_TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8", torch.int32: "*i32",
    torch.int64: "*i64",
}  # fmt: skip
_TOOLS = Path(nvidia.__file__).parent / "bin"


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: registers of a thread, bytes of a thread's stack and of a program's shared memory."""

    registers: int
    stack_bytes: int
    spill_bytes: int  # stored; spilled registers are the usual reason for a stack
    shared_bytes: int
    ptx: str
    cubin: bytes


def compile_kernel(
    kernel: triton.JITFunction,
    signature: Mapping[str, str | tuple[str, ...]],
    constexprs: Mapping[str, Any],
    *,
    capability: int,
    num_warps: int,
    num_stages: int | None = None,
    maxnreg: int | None = None,
    divisible_by_16: Collection[str | tuple[str, int]] = (),
) -> Resources:
    """Compiles a kernel of Triton or Gluon for compute capability 80, 89, 90, ...; nothing is loaded or run.

    signature: Triton's type of each argument that is not in ``constexprs`` ("*fp16", "i32"), a tuple of types for a tuple.
    num_stages, maxnreg: pipelining and the bound on registers of a thread; None: Triton's default, or no bound.
    divisible_by_16: arguments with this property, or (argument, place in the tuple).  Pointers of PyTorch tensors have it;
    without it loads come out scalar.
    """
    types = {name: "constexpr" if name in constexprs else signature[name] for name in kernel.arg_names}
    paths = [(name,) if isinstance(name, str) else name for name in divisible_by_16]
    attributes = {(kernel.arg_names.index(name), *place): [["tt.divisibility", 16]] for name, *place in paths}
    source = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
    compiled = triton.compile(
        source(kernel, types, dict(constexprs), attributes),
        target=GPUTarget("cuda", capability, 32),
        options={name: value for name, value in options.items() if value is not None},
    )
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    registers, stack_bytes = _usage(cubin)
    spill_bytes = _spills(ptx, capability) if stack_bytes else 0
    return Resources(registers, stack_bytes, spill_bytes, compiled.metadata.shared, ptx, cubin)


def compile_launch(kernel: triton.JITFunction, arguments: Mapping[str, Any], *, capability: int) -> Resources:
    """Compiles what ``kernel[grid](**arguments)`` would run on that GPU, by the launcher's own rules of specialisation.

    None and constexprs are constants, and so is an integer 1; integers and pointers divisible by 16 are known to be.
    """
    signature, constexprs, divisible = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, arguments[parameter.name]
        specialize = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialize and isinstance(value, int) and value == 1):
            constexprs[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            if specialize and _aligned(value):
                divisible.append(name)
        elif isinstance(value, tuple):
            signature[name] = tuple(_TYPES[v.dtype] for v in value)
            divisible += [(name, i) for i, v in enumerate(value) if specialize and _aligned(v)]
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialize and not parameter.do_not_specialize_on_alignment and value % 16 == 0:
                divisible.append(name)
    return compile_kernel(
        kernel,
        signature,
        constexprs,
        capability=capability,
        num_warps=arguments["num_warps"],
        num_stages=arguments.get("num_stages"),
        maxnreg=arguments.get("maxnreg"),
        divisible_by_16=divisible,
    )


def _aligned(tensor: torch.Tensor) -> bool:
    return tensor.storage_offset() * tensor.element_size() % 16 == 0


def compile_cell_forward(
    dtype: torch.dtype,
    tile: Tile,
    *,
    inputs: int,
    hidden: int,
    bias: bool = True,
    save_gates: bool = True,
    tf32: bool = True,
    capability: int = 89,
) -> Resources:
    """`cell_forward` of contiguous tensors."""
    new = functools.partial(torch.empty, dtype=dtype, device="meta")
    batch = tile.block_b
    b = new(3 * hidden) if bias else None
    _, arguments = cell.cell_forward_launch(
        new(batch, inputs), new(batch, hidden), new(3 * hidden, inputs), new(3 * hidden, hidden), b, b,
        new(batch, hidden), new(batch, 4, hidden) if save_gates else None,
        tile=tile, tf32=tf32,
    )  # fmt: skip
    return compile_launch(cell.cell_forward_kernel, arguments, capability=capability)


def compile_cell_gates(
    dtype: torch.dtype, tile: Tile, *, hidden: int, bias: bool = True, save_gates: bool = True, capability: int = 89
) -> Resources:
    """`cell_gates` of contiguous tensors."""
    new = functools.partial(torch.empty, dtype=dtype, device="meta")
    batch = tile.block_b
    projection, state, b = new(batch, 3 * hidden), new(batch, hidden), new(3 * hidden) if bias else None
    _, arguments = cell.cell_gates_launch(
        projection, projection, state, b, b, state, new(batch, 4, hidden) if save_gates else None, tile=tile
    )
    return compile_launch(cell.cell_gates_kernel, arguments, capability=capability)


def compile_cell_backward(dtype: torch.dtype, tile: Tile, *, hidden: int, capability: int = 89) -> Resources:
    """`cell_backward` of contiguous tensors."""
    new = functools.partial(torch.empty, dtype=dtype, device="meta")
    state, gates = new(tile.block_b, hidden), new(tile.block_b, 4, hidden)
    _, arguments = cell.cell_backward_launch(state, state, gates, gates, state, tile=tile)
    return compile_launch(cell.cell_backward_kernel, arguments, capability=capability)


def compile_sequence_forward(
    dtype: torch.dtype,
    tile: Tile,
    *,
    hidden: int,
    directions: int = 1,
    bias: bool = True,
    save_gates: bool = True,
    gi_dtype: torch.dtype | None = None,
    keep: torch.dtype | None = None,
    tf32: bool = True,
    capability: int = 89,
) -> Resources:
    """`sequence_forward`; gi in the same dtype unless told otherwise; with resets if ``keep`` is their dtype."""
    new = functools.partial(torch.empty, dtype=dtype, device="meta")
    steps, batch = 2, tile.block_b
    b = [new(3 * hidden)] * directions if bias else None
    _, arguments = step.sequence_forward_launch(
        new(directions, steps, batch, 3 * hidden, dtype=gi_dtype or dtype), new(directions, batch, hidden),
        [new(3 * hidden, hidden)] * directions, b, b,
        new(steps, batch, directions * hidden), new(directions, steps, batch, 4, hidden) if save_gates else None,
        tile=tile, tf32=tf32, keep=None if keep is None else new(steps, batch, dtype=keep),
    )  # fmt: skip
    return compile_launch(step.sequence_forward_kernel, arguments, capability=capability)


def compile_sequence_backward(
    dtype: torch.dtype,
    tile: Tile,
    *,
    hidden: int,
    directions: int = 1,
    grad_out: bool = True,
    keep: torch.dtype | None = None,
    tf32: bool = True,
    capability: int = 89,
) -> Resources:
    """`sequence_backward`; with resets if ``keep`` is their dtype."""
    new = functools.partial(torch.empty, dtype=dtype, device="meta")
    steps, batch = 2, tile.block_b
    state, out = new(directions, batch, hidden), new(steps, batch, directions * hidden)
    gates = new(directions, steps, batch, 4, hidden)
    _, arguments = step.sequence_backward_launch(
        out if grad_out else None, state, out, state, [new(3 * hidden, hidden)] * directions, gates, gates, state,
        tile=tile, tf32=tf32, keep=None if keep is None else new(steps, batch, dtype=keep),
    )  # fmt: skip
    return compile_launch(step.sequence_backward_kernel, arguments, capability=capability)


def compile_whole_sequence(
    dtype: torch.dtype,
    plan: WholeSequencePlan,
    *,
    batch: int,
    hidden: int,
    reverse: bool = False,
    pair: int | None = None,
    steps: int = 16,
    bias: bool = True,
    save_gates: bool = False,
    masked: bool = False,
    packed: bool = False,
    keep: torch.dtype | None = None,
    capability: int = 89,
) -> Resources:
    """One launch of a plan: a stack, a layer, if ``reverse`` both directions of one, or a ``pair``.

    hidden: any; it is padded as there.  masked: with dropout.  packed: of packed sequences.  keep: with resets of that dtype.
    steps, batch: not part of the code.
    """
    new = functools.partial(torch.empty, dtype=dtype, device="meta")
    rows = (steps * batch,) if packed else (steps, batch)
    lanes, padded = plan.lanes, -(-hidden // 16) * 16
    stack = lanes > 1 and not reverse and pair is None
    two = () if pair is None else (2,)
    resident_plan = plan.kernel.name == "resident"
    launch, kernel = {
        "resident": (resident.resident_launch, resident.resident_kernel),
        "wavefront": (wavefront.wavefront_launch, wavefront.wavefront_kernel),
        "staged": (staged.staged_launch, staged.staged_kernel),
    }[plan.kernel.name]
    w, b = new(3 * padded, padded), new(3 * padded)
    below = new(lanes - 1, *rows, padded) if stack else None
    if plan.kernel.name == "staged" and plan.kernel.ring:
        below = new(2, plan.kernel.ring_rows(batch), lanes * padded)
    _, arguments = launch(
        new(*((2,) if reverse else two), *rows, 3 * padded),
        new(batch, 2 * padded) if reverse and not resident_plan else new(lanes, batch, padded),
        below,
        [w] * (lanes - 1 if stack else 0), [w] * lanes, [b] * lanes if bias else None, [b] * lanes if bias else None,
        new(*two, *rows, (2 if reverse else 1) * padded), new(lanes, batch, padded),
        new(lanes, *rows, 4, padded) if save_gates else None,
        new(4, dtype=torch.int64), plan=plan.kernel, units=hidden, pair=pair,
        **(dict.fromkeys(("masks", "handed"), below) if masked else {}),
        **({"offsets": new(steps + 1 + batch, dtype=torch.int32)} if packed else {}),
        **({} if keep is None else {"keep": new(steps, batch, dtype=keep)}),
    )  # fmt: skip
    return compile_launch(kernel, arguments, capability=capability)


def compile_whole_sequence_backward(
    dtype: torch.dtype,
    plan: WholeSequencePlan,
    *,
    batch: int,
    hidden: int,
    reverse: bool = False,
    pair: int | None = None,
    steps: int = 16,
    masked: bool = False,
    packed: bool = False,
    keep: torch.dtype | None = None,
    capability: int = 89,
) -> Resources:
    """One launch of a plan's backward; hidden is a multiple of 16.  The rest as in `compile_whole_sequence`."""
    new = functools.partial(torch.empty, dtype=dtype, device="meta")
    rows = (steps * batch,) if packed else (steps, batch)
    lanes = plan.lanes
    stack = lanes > 1 and not reverse and pair is None
    two = () if pair is None else (2,)
    launch, kernel = {
        "resident": (resident_backward.resident_backward_launch, resident_backward.resident_backward_kernel),
        "staged": (staged_backward.staged_backward_launch, staged_backward.staged_backward_kernel),
        "wavefront": (wavefront_backward.wavefront_backward_launch, wavefront_backward.wavefront_backward_kernel),
    }[plan.kernel.name]
    w, out, state = new(3 * hidden, hidden), new(*two, *rows, (2 if reverse else 1) * hidden), new(lanes, batch, hidden)
    gates, below = new(lanes, *rows, 4, hidden), new(lanes - 1, *rows, hidden) if stack else None
    programs = -(-batch // (plan.kernel.rows * getattr(plan.kernel, "tiles", 1)))
    _, arguments = launch(
        out, state, state, out, below, gates, [w] * (lanes - 1 if stack else 0), [w] * lanes, gates, state,
        new(lanes, programs, 4, hidden, dtype=torch.float32), new(4, dtype=torch.int64),
        plan=plan.kernel, pair=pair, **({"masks": below} if masked else {}),
        **({"offsets": new(steps + 1 + batch, dtype=torch.int32)} if packed else {}),
        **({} if keep is None else {"keep": new(steps, batch, dtype=keep)}),
    )  # fmt: skip
    return compile_launch(kernel, arguments, capability=capability)


def compile_prepare(
    dtype: torch.dtype, *, lanes: int, hidden: int, reverse: bool = False, states: bool = True, ring: bool = False,
    capability: int = 89,
) -> Resources:  # fmt: skip
    """`prepare_kernel`; hidden: any."""
    new = functools.partial(torch.empty, dtype=dtype, device="meta")
    steps, batch, padded = 3, 5, -(-hidden // 16) * 16
    _, arguments = prepare.prepare_launch(
        new(lanes, batch, hidden), new(1, dtype=torch.int32), 7, new(steps, batch, (2 if reverse else 1) * padded),
        new(2, batch + 3, lanes * padded) if ring else new(lanes - 1, steps, batch, padded),
        new(lanes, batch, padded) if states else None, new(lanes, batch, padded), new(4, dtype=torch.int64), reverse=reverse,
        fill_out=not ring, ring=ring,
    )  # fmt: skip
    return compile_launch(prepare.prepare_kernel, arguments, capability=capability)


def compile_project(
    dtype: torch.dtype, tile: Tile, *, inputs: int, hidden: int, lanes: int = 1, reverse: bool = False,
    batch_first: bool = False, prepares: bool = True, capability: int = 89,
) -> Resources:  # fmt: skip
    """`project_kernel`; hidden: a multiple of 16."""
    new = functools.partial(torch.empty, 16, dtype=dtype, device="meta")
    sizes = dict(lanes=lanes, hidden=hidden, reverse=reverse, fill_out=prepares, states=prepares, ring=False)
    arguments: dict[str, Any] = dict.fromkeys(("p_x", "p_gi", "p_hx", "p_out", "p_below", "p_h0", "p_h_n"), new())
    arguments |= dict(p_w=(new(),) * (2 if reverse else 1), p_host=new(dtype=torch.int32), p_error=new(dtype=torch.int64))
    arguments |= dict(launch_id=7, T=3, B=5, R=5)
    arguments |= prepare.project_constants(
        tile, inputs=inputs, batch_first=batch_first, tf32=dtype == torch.float32, prepare=prepares, inputs_hidden=hidden,
        **sizes,
    )  # fmt: skip
    return compile_launch(prepare.project_kernel, arguments, capability=capability)


def compile_parameter_gradients(
    dtype: torch.dtype, *, lanes: int, hidden: int, rotated: bool = True, biases: bool = True, capability: int = 89
) -> Resources:
    """`parameter_gradients_kernel`; rotated, biases: what it has to do."""
    new = functools.partial(torch.empty, device="meta", dtype=dtype)
    weights = (new(3 * hidden, hidden),) * lanes if rotated else None
    sums, vectors = (new(5, 4, hidden, dtype=torch.float32), new(3 * hidden)) if biases else (None, None)
    each = {"p_sums": sums, "p_b_ih": vectors, "p_b_hh": vectors}
    arguments = {name: tensor if tensor is None else (tensor,) * lanes for name, tensor in each.items()}
    arguments |= {"p_rotated": weights, "p_w": weights, "PROGRAMS": 5}
    arguments |= parameter_gradients.parameter_gradients_constants(lanes=lanes, hidden=hidden)
    return compile_launch(parameter_gradients.parameter_gradients_kernel, arguments, capability=capability)


def _usage(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) of the one kernel in it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.check_output([_TOOLS / "cuobjdump", "-res-usage", file.name], text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def _spills(ptx: str, capability: int) -> int:
    """Bytes of spill stores by the assembler's own account."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        done = subprocess.run(
            [get_ptxas(capability).path, "-v", f"-arch={target[1]}", file.name, "-o", "/dev/null"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    return sum(int(found) for found in re.findall(r"(\d+) bytes spill stores", done.stderr))
