"""Where the Triton kernels run, decided by what is known while a graph is traced."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

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
