"""What runs packed sequences on a device: cuDNN or PyTorch's own operations, as the planner says.

PyTorch's way is cuDNN's own packed sequences on CUDA and its operations on the rows of each step elsewhere, see `torch_path`.
The backward has to know what made the reserve, as in `kernel_path`.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from torch_gru_fuse import torch_hooks
from torch_gru_fuse.ops import cudnn_path, torch_path
from torch_gru_fuse.ops.call import PackedCall
from torch_gru_fuse.planner.plan import plan_gru_packed

#: Path of the forward that made a reserve.
_made_by = torch_hooks.StorageTable()


def _path_of(call: PackedCall, *, training: bool) -> ModuleType:
    plan = plan_gru_packed(call.N, call.input.shape[1], call.H, call.L, call.D, str(call.input.dtype), training=training)
    assert plan.kernel == "torch", plan
    return cudnn_path if training and torch_hooks.cudnn_runs(call.input) else torch_path


def gru_forward(call: PackedCall, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    path = _path_of(call, training=save)
    results = path.gru_forward(call, save)
    if save and call.input.is_cuda:
        _made_by.put(results[2], path)
    return results


def gru_backward(
    call: PackedCall,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    output: Tensor,
    reserve: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    path = (_made_by.get(reserve) if reserve.is_cuda else None) or _path_of(call, training=True)
    return path.gru_backward(call, grad_output, grad_h_n, output, reserve, needs)
