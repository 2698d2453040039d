"""Where the Triton kernels run, decided by what is known while a graph is traced."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

from torch_gru_fuse.planner.gpus import GPU, gpu_named

KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
#: Tensor cores with bf16 and tf32 came with sm_80.
MIN_CAPABILITY = (8, 0)


@functools.cache
def _device_supported(index: int | None) -> bool:
    if torch.version.hip is not None:
        return False
    if not torch.cuda.is_available():  # fake CUDA tensors on a machine without a GPU
        return True
    return torch.cuda.get_device_capability(index) >= MIN_CAPABILITY


def why_not_kernels(tensor: Tensor) -> str | None:
    """None where the kernels run for tensors like this one, otherwise the reason why not."""
    if tensor.device.type != "cuda":
        return f"the kernels need a CUDA device, the tensors are on {tensor.device.type}"
    if tensor.dtype not in KERNEL_DTYPES:
        return f"no kernels for {tensor.dtype}"
    if not _device_supported(tensor.device.index):
        return "the kernels need an NVIDIA GPU of compute capability 8.0 or more"
    return None


def kernels_run(tensor: Tensor) -> bool:
    return why_not_kernels(tensor) is None


def gpu_of(index: int) -> GPU | None:
    """What the planner has to know of a GPU; TORCH_GRU_FUSE_GPU=rtx4090 plans as for that one (any name of planner/gpus.py)."""
    name = os.environ.get("TORCH_GRU_FUSE_GPU")
    if not name:
        return _gpu_of(index)
    try:
        return gpu_named(name)
    except ValueError as error:
        raise ValueError(f"TORCH_GRU_FUSE_GPU: {error}") from error


@functools.cache
def _gpu_of(index: int) -> GPU | None:
    """The GPU as its driver describes it; a part of one (MIG) counts as one with fewer multiprocessors."""
    if torch.version.hip is not None:
        return None
    properties = torch.cuda.get_device_properties(index)
    names = (
        "name", "major", "minor", "multi_processor_count", "regs_per_multiprocessor", "max_threads_per_multi_processor",
        "shared_memory_per_multiprocessor", "shared_memory_per_block_optin", "L2_cache_size",
    )  # fmt: skip
    return GPU.from_properties(**{name: getattr(properties, name) for name in names})
