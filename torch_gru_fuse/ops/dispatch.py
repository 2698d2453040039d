"""Which implementation runs on which device."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_gru_fuse.ops import torch_path
from torch_gru_fuse.ops.schemas import library

OPS = ("gru_forward", "gru_backward", "gru_cell_forward", "gru_cell_backward")


def _on_cpu(name: str):
    def run(*args):
        return getattr(torch_path, name)(*args)

    return run


def _on_cuda(name: str):
    def run(*args):
        from torch_gru_fuse.ops import kernel_path  # imports Triton

        first = next(a for a in args if isinstance(a, Tensor))
        with torch.cuda.device(first.device):
            return getattr(kernel_path, name)(*args)

    return run


for _name in OPS:
    library.impl(_name, _on_cpu(_name), "CPU")
    library.impl(_name, _on_cuda(_name), "CUDA")
