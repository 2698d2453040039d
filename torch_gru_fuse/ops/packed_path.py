"""What runs packed sequences on a device: kernels of whole sequences, cuDNN or PyTorch's own operations, as the planner says.

PyTorch's way is cuDNN's own packed sequences on CUDA and its operations on the rows of each step elsewhere, see `torch_path`.
The backward has to know what made the reserve, as in `kernel_path`.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from torch_gru_fuse import torch_hooks
from torch_gru_fuse.ops import cudnn_path, support, torch_path
from torch_gru_fuse.ops.call import PackedCall
from torch_gru_fuse.planner.plan import Plan, plan_gru_packed

log = logging.getLogger("torch_gru_fuse")


class _MadeBy(NamedTuple):
    """Of a reserve: the plan of its forward, whether cuDNN filled it, and, of our kernels, what they were told of lengths."""

    plan: Plan
    cudnn: bool
    offsets: Tensor | None = None


_made_by = torch_hooks.StorageTable()


def plan_of(call: PackedCall, *, training: bool) -> Plan:
    """The plan of a call, from sizes and settings alone: the tensors may be fake."""
    x = call.input
    unsupported = support.why_not_kernels(x)
    if unsupported is None and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        unsupported = "a CUDA graph would keep the memory from which lengths are copied"
    plan = plan_gru_packed(
        call.T, call.B, x.shape[1], call.H, call.L, call.D, str(x.dtype),
        tf32_allowed=x.dtype == torch.float32 and torch_hooks.rnn_allows_tf32(), training=training,
        unsupported=unsupported, gpu=support.gpu_of(x.get_device()) if unsupported is None else None,
    )  # fmt: skip
    if plan.kernel == "whole":
        from torch_gru_fuse.ops import packed_kernel_path  # imports Triton

        refused = packed_kernel_path.why_refused(call, plan)
        if refused is not None:
            plan = _instead(plan, refused)
    if log.isEnabledFor(logging.DEBUG):
        log.debug("gru_packed T=%d B=%d I=%d H=%d: %s, %s", call.T, call.B, x.shape[1], call.H, plan.kernel, plan.reason)
    return plan


def _instead(plan: Plan, reason: str) -> Plan:
    """What runs where the GPU could not run a plan."""
    return replace(plan, kernel="torch", whole=None, backward=None, reason=reason)


def gru_forward(call: PackedCall, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    plan = plan_of(call, training=save)
    if plan.kernel == "whole":
        from torch_gru_fuse.ops import packed_kernel_path

        made = packed_kernel_path.gru_forward(call, save, plan)
        if made is not None:
            results, offsets = made
            return _remember(results, save, _MadeBy(plan, False, offsets))
        plan = _instead(plan, "the launch did not fit")
    cudnn = save and torch_hooks.cudnn_runs(call.input)
    results = (cudnn_path if cudnn else torch_path).gru_forward(call, save)
    return _remember(results, save and call.input.is_cuda, _MadeBy(plan, cudnn))


def _remember(results: tuple[Tensor, Tensor, Tensor], save: bool, made_by: _MadeBy) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps what made the reserve of these results, which are returned."""
    if save:
        _made_by.put(results[2], made_by)
    return results


def gru_backward(
    call: PackedCall,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    output: Tensor,
    reserve: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    made_by = _made_by.get(reserve)
    if made_by is None:
        plan = plan_of(call, training=True)
        made_by = _MadeBy(plan, plan.kernel == "torch" and torch_hooks.cudnn_runs(call.input))
    if made_by.plan.kernel == "whole":
        from torch_gru_fuse.ops import packed_kernel_path

        args = grad_output, grad_h_n, output, reserve, needs, made_by.offsets
        return packed_kernel_path.gru_backward(call, made_by.plan, *args)
    path = cudnn_path if made_by.cudnn else torch_path
    return path.gru_backward(call, grad_output, grad_h_n, output, reserve, needs)
