"""Which implementation runs on which device."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from torch_gru_fuse.ops import torch_path
from torch_gru_fuse.ops.call import GRUCall
from torch_gru_fuse.ops.schemas import library


def _cpu() -> ModuleType:
    return torch_path


def _cuda() -> ModuleType:
    from torch_gru_fuse.ops import kernel_path  # imports Triton

    return kernel_path


def _implement(device_type: str, path) -> None:
    """Register the functions of the module `path()` for one device type."""

    def gru_forward(*args):
        *call, save = args
        return path().gru_forward(GRUCall(*call), save)

    def gru_backward(grad_output, grad_h_n, *args):
        *call, output, reserve, needs = args
        return path().gru_backward(GRUCall(*call), grad_output, grad_h_n, output, reserve, needs)

    def gru_cell_forward(*args):
        return path().gru_cell_forward(*args)

    def gru_cell_backward(*args):
        return path().gru_cell_backward(*args)

    for function in (gru_forward, gru_backward, gru_cell_forward, gru_cell_backward):
        library.impl(function.__name__, _on_device(function) if device_type == "CUDA" else function, device_type)


def _on_device(function):
    """Kernels are launched on the current device: make it that of the tensors."""

    def run(*args):
        first = next(a for a in args if isinstance(a, Tensor))
        with torch.cuda.device(first.device):
            return function(*args)

    return run


_implement("CPU", _cpu)
_implement("CUDA", _cuda)
