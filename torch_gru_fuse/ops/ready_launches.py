"""What a ready call does, made of the first call of its kind: see `ready_calls`."""

from __future__ import annotations

from functools import reduce
from operator import or_

from torch import Tensor

from torch_gru_fuse import torch_hooks
from torch_gru_fuse.kernels.launch import DoesNotFit
from torch_gru_fuse.kernels.stream import stack_of
from torch_gru_fuse.ops import kernel_path, whole_path
from torch_gru_fuse.ops.call import GRUCall
from torch_gru_fuse.ops.ready_calls import Run
from torch_gru_fuse.planner.plan import Plan
from torch_gru_fuse.planner.stream import StreamPlan


def of(call: GRUCall, *, batch_first: bool) -> Run | None:
    """What runs calls like this one, which has passed all checks; None: what is planned takes the ordinary way.

    The call is time-major and without dropout; its parameters, hx and the input of a single step are contiguous.  Those like it
    have the input, and want the output, as `batch_first` says.
    """
    if call.B == 0:
        return None
    plan = kernel_path.plan_of(call, training=False)
    if plan.stream is not None:
        return _one_step(call, plan.stream, batch_first)
    if plan.whole is not None and call.H % 16 == 0:
        return _whole_sequences(call, plan, batch_first)
    return None


class _Results:
    """Makes output [T, B, D*H] or [B, T, D*H], in memory both are time-major, and h_n [L*D, B, H]."""

    def __init__(self, call: GRUCall, batch_first: bool):
        T, B, H, states, width, dtype = call.T, call.B, call.H, call.L * call.D, call.D * call.H, call.hx.dtype
        output = ((B, T, width), (width, B * width, 1)) if batch_first else ((T, B, width), (B * width, width, 1))
        self._output, self._h_n = (*output, dtype), ((states, B, H), (B * H, H, 1), dtype)

    def __call__(self) -> tuple[Tensor, Tensor]:
        new = torch_hooks.empty_strided_cuda
        return new(*self._output), new(*self._h_n)


def _one_step(call: GRUCall, plan: StreamPlan, batch_first: bool) -> Run:
    launch = stack_of(call.input[0], call.hx, call.has_biases, plan).launch
    new_results = _Results(call, batch_first)

    def run(x: Tensor, hx: Tensor, params: list[Tensor]) -> tuple[Tensor, Tensor] | None:
        addresses = [t.data_ptr() for t in (x, hx, *params)]
        if reduce(or_, addresses) % 16:
            return None
        output, h_n = results = new_results()
        launch(addresses[0], addresses[1], addresses[2:], output.data_ptr(), h_n.data_ptr())
        return results

    return run


def _whole_sequences(call: GRUCall, plan: Plan, batch_first: bool) -> Run:
    recipe = whole_path.recipe_of(call, plan.whole, False)
    T, B, H, D, states, dtype = call.T, call.B, call.H, call.D, call.L * call.D, call.hx.dtype
    lanes, each = recipe.lanes, recipe.each
    # of each launch: its first state, in bytes; places of its parameters, and of those that multiply its input
    launches = [
        (first * B * H * dtype.itemsize, call.places(first, lanes), slice(first * each, (first + D) * each, each))
        for first in range(0, states, lanes)
    ]
    top = launches[-1][0]
    new_results = _Results(call, batch_first)
    between = (T, B, D * H), (B * D * H, D * H, 1), dtype
    workspace_size = recipe.workspace_bytes(below=True) // dtype.itemsize
    workspace_arguments = (workspace_size,), (1,), dtype

    def run(x: Tensor, hx: Tensor, params: list[Tensor]) -> tuple[Tensor, Tensor] | None:
        p_hx, p_params = hx.data_ptr(), [p.data_ptr() for p in params]
        if reduce(or_, p_params, p_hx) % 16 or whole_path.missing_programs:
            return None
        new = torch_hooks.empty_strided_cuda
        output, h_n = results = new_results()
        p_h_n = h_n.data_ptr()
        if batch_first:
            x = x.transpose(0, 1)
        try:
            for state, of_launch, of_input in launches:
                gi = whole_path.input_projection(x, params[of_input], plan.tf32)
                x = output if state == top else new(*between)
                workspace = new(*workspace_arguments) if workspace_size else gi
                recipe.launch(
                    gi.data_ptr(), p_hx + state, p_params[of_launch], x.data_ptr(), p_h_n + state, workspace.data_ptr()
                )
        except DoesNotFit:  # the ordinary way says so, and plans anew
            return None
        return results

    return run
