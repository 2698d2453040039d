"""Kernels as for a GPU that is not at hand, run on the one that is.

Everything up to PTX is what that GPU would get: the planner plans for its multiprocessors and shared memory, Triton compiles
for its compute capability.  Only the last step, from PTX to machine code, is for the GPU at hand, whose clock, caches and
tensor cores remain its own: times taken this way are no times of the other GPU, but they show what its code costs.

This is the one place that touches the compiler stages of Triton, which are not a public interface.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch_gru_fuse.planner.gpus import GPU, GPUS

#: The GPU that is meant by an architecture.
ARCHITECTURES = {"sm89": "rtx4090"}
#: A name of ``planner.gpus.GPUS``; the ops then plan as for that GPU.  Read by ``ops.support.gpu_of``.
GPU_VARIABLE = "TORCH_GRU_FUSE_GPU"


class EmulationError(Exception):
    """Kernels would not be those of the other GPU; the message says why."""


@contextlib.contextmanager
def emulating(architecture: str) -> Iterator[GPU]:
    """The kernels of this package plan and compile for an architecture, "sm89" for an RTX 4090.

    To be entered before the first of them runs in a process, which should do nothing else: compiled code is kept, and outlasts
    the context.

    Raises:
        EmulationError: the architecture is not known, the GPU at hand cannot run its code, or kernels have been compiled
            in this process for the GPU at hand.
    """
    if architecture not in ARCHITECTURES:
        raise EmulationError(f"architecture is {architecture!r}, expected one of {', '.join(map(repr, ARCHITECTURES))}")
    import torch
    import triton

    gpu = GPUS[ARCHITECTURES[architecture]]
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < gpu.capability:
        major, minor = torch.cuda.get_device_capability()
        raise EmulationError(f"code for {architecture} does not run on a GPU of compute capability {major}.{minor}")
    if _has_compiled():
        raise EmulationError(
            f"kernels have been compiled in this process for the GPU at hand; start one of its own for {architecture}"
        )
    runtime = triton.knobs.runtime
    before = runtime.override_arch, runtime.add_stages_inspection_hook, os.environ.get(GPU_VARIABLE)
    runtime.override_arch = architecture
    runtime.add_stages_inspection_hook = _assemble_for_the_gpu_at_hand(architecture)
    os.environ[GPU_VARIABLE] = ARCHITECTURES[architecture]
    try:
        yield gpu
    finally:
        runtime.override_arch, runtime.add_stages_inspection_hook, name = before
        if name is None:
            os.environ.pop(GPU_VARIABLE, None)
        else:
            os.environ[GPU_VARIABLE] = name


def check_planner(gpu: GPU, device: int) -> None:
    """Raises EmulationError if the ops do not plan for ``gpu`` on a CUDA device."""
    from torch_gru_fuse.ops.support import gpu_of

    planned_for = gpu_of(device)
    if planned_for != gpu:
        name = "no GPU" if planned_for is None else planned_for.name
        raise EmulationError(f"on cuda:{device} the ops plan for {name}, not for {gpu.name}; {GPU_VARIABLE} came too late")


def _has_compiled() -> bool:
    """Whether a kernel of this package has been launched on a GPU in this process."""
    prefix = f"{__package__.partition('.')[0]}.kernels."
    modules = [module for name, module in list(sys.modules.items()) if name.startswith(prefix)]
    return any(getattr(value, "device_caches", None) for module in modules for value in vars(module).values())


def _assemble_for_the_gpu_at_hand(architecture: str) -> Callable[..., Any]:
    """For ``knobs.runtime.add_stages_inspection_hook``: called with the stages of a compilation, to change them, and without
    arguments for what tells caches that these are others.

    Triton makes PTX for the GPU at hand even where ``override_arch`` names another: here it is the other's.
    """
    key = f"torch_gru_fuse-{architecture}"

    def hook(backend=None, stages=None, options=None, language=None, capability=None):
        if stages is None:
            return key, key
        at_hand = backend.target.arch
        stages["ptx"] = lambda src, metadata: backend.make_ptx(src, metadata, options, capability)
        stages["cubin"] = lambda src, metadata: backend.make_cubin(src, metadata, options, at_hand)
        return None

    return hook
