"""Kernels of whole sequences behind the op for packed sequences.

The same launches, products and reserves as those of `kernel_path`, over the rows of a packed matrix.  Lengths are on the CPU,
so the kernels are told of them by a copy that nobody waits for.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_gru_fuse.kernels.launch import DoesNotFit
from torch_gru_fuse.ops import kernel_path, torch_path, whole_path
from torch_gru_fuse.ops.call import PackedCall
from torch_gru_fuse.planner.plan import Plan
from torch_gru_fuse.planner.whole_sequence import WholeSequencePlan

log = logging.getLogger("torch_gru_fuse")

#: Plans that a GPU could not run, although by its description it can: parts of it were taken (MPS, others).
_refused: dict[tuple[int, WholeSequencePlan], str] = {}


def why_refused(call: PackedCall, plan: Plan) -> str | None:
    """What the driver said when the launches of a plan did not fit the GPU."""
    return _refused.get((call.input.get_device(), plan.whole))


def offsets_of(batch_sizes: Tensor, device: torch.device) -> Tensor:
    """int32 [T + 1 + B] on a device: the row in which each step begins, how many there are, the length of each sequence."""
    T, B = batch_sizes.shape[0], int(batch_sizes[0])
    # A copy from pinned memory waits for nothing, and that memory is not used again before it is done.
    host = torch.empty(T + 1 + B, dtype=torch.int32, pin_memory=device.type == "cuda")
    host[0] = 0
    torch.cumsum(batch_sizes, 0, dtype=torch.int32, out=host[1 : T + 1])
    # sequence b takes part in the steps of more than b rows
    torch.sub(T, torch.searchsorted(batch_sizes.flip(0), torch.arange(B), right=True), out=host[T + 1 :])
    return host.to(device, non_blocking=True)


def gru_forward(call: PackedCall, save: bool, plan: Plan) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor] | None:
    """Results as `empty_results` allocates them, and offsets, which the backward takes; None: the GPU refuses the launch."""
    offsets = offsets_of(call.batch_sizes, call.input.device)
    try:
        return whole_path.gru_forward(call, save, plan, offsets), offsets
    except DoesNotFit as error:
        device = call.input.get_device()
        reason = _refused[device, plan.whole] = f"{error} (cuda:{device}, {plan.whole})"
        log.warning("torch_gru_fuse.gru_packed: whole sequences in one launch do not fit, PyTorch's own GRU runs: %s", reason)
        return None


def gru_backward(
    call: PackedCall, plan: Plan, grad_output: Tensor | None, grad_h_n: Tensor | None, output: Tensor, reserve: Tensor,
    needs: Sequence[bool], offsets: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Gradients of those that are needed.  offsets: those of the forward; None: they are made again."""
    if offsets is None:
        offsets = offsets_of(call.batch_sizes, call.input.device)
    try:
        return kernel_path.kernel_backward().gru_backward(call, plan, grad_output, grad_h_n, output, reserve, needs, offsets)
    except DoesNotFit:  # what was saved are the same gates
        return torch_path.gru_backward(call, grad_output, grad_h_n, output, reserve, list(needs))
