"""What a ready call does, made of the first call of its kind: see `ready_calls`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_gru_fuse import torch_hooks
from torch_gru_fuse.kernels.launch import DoesNotFit
from torch_gru_fuse.kernels.stream import stack_of
from torch_gru_fuse.ops import cudnn_path, kernel_path, torch_path, whole_path
from torch_gru_fuse.ops.call import GRUCall, PairCall
from torch_gru_fuse.ops.ready_calls import Run, RunPair
from torch_gru_fuse.ops.schemas import reserve_size
from torch_gru_fuse.planner.plan import Plan
from torch_gru_fuse.planner.stream import StreamPlan


def of(call: GRUCall, *, batch_first: bool, save: bool = False) -> Run | None:
    """What runs calls like this one, which has passed all checks; None: what is planned takes the ordinary way.

    The call is time-major and without dropout; its parameters, hx and the input of a single step are contiguous.  Those like it
    have the input, and want the output, as `batch_first` says.  save: they want a reserve, too, as `gru_forward` makes it.
    """
    if call.B == 0:
        return None
    plan = kernel_path.plan_of(call, training=save)
    if plan.stream is not None:
        return _one_step(call, plan.stream, batch_first)
    if plan.whole is not None and call.H % 16 == 0:
        size = reserve_size(call.T, call.B, call.H, call.L, call.D, cuda=True, bytes_each=call.hx.dtype.itemsize)
        return _whole_sequences(call, plan, batch_first, reserve=size if save else 0)
    if plan.kernel == "torch" and not save:
        _run_once(call, save)
        return functools.partial(_own, _flags(call), batch_first)
    return None


def of_pair(call: PairCall, *, batch_first: bool, save: bool) -> RunPair | None:
    """The same of a pair that one launch runs; output is [2, T, B, H] whatever the layout of the inputs."""
    plan = kernel_path.plan_of_pair(call, training=save)
    if call.B == 0 or isinstance(plan, str):
        return None
    recipe, each, dtype = whole_path.recipe_of(call, plan.whole, save), 4 if call.has_biases else 2, call.hx.dtype
    room = recipe.room(None, below=False)
    sizes = [(tuple(t.shape), t.stride(), dtype) for t in call.empty_results(save)[: 3 if save else 2]]
    sizes.append(((room.size // dtype.itemsize,), (1,), dtype))

    def run(inputs: list[Tensor], hx: Tensor, params: list[Tensor]) -> tuple[Tensor, ...] | None:
        p_hx, p_params = hx.data_ptr(), [p.data_ptr() for p in params]
        if reduce(or_, p_params, p_hx) % 16 or whole_path.missing_programs:
            return None
        new = torch_hooks.empty_strided_cuda
        if batch_first:
            inputs = [x.transpose(0, 1) for x in inputs]
        gi = whole_path.input_projection(inputs, params[::each], plan.tf32)
        *results, workspace = [new(*size) for size in sizes]
        try:
            recipe.launch(
                room, workspace.data_ptr(), 0, gi.data_ptr(), p_hx, p_params, results[0].data_ptr(), results[1].data_ptr(),
                results[2].data_ptr() if save else None, aligned=True,
            )  # fmt: skip
        except DoesNotFit:  # the ordinary way says so, and plans anew
            return None
        return kernel_path.remember_pair(tuple(results), save, plan)

    return run


def _run_once(call: GRUCall, save: bool) -> None:
    """In the ordinary way, which prepares what a CUDA graph would take."""
    if not torch.cuda.is_current_stream_capturing():
        with torch.no_grad():
            kernel_path.gru_forward(call, save)


def _flags(call: GRUCall) -> GRUCall:
    """The call without its tensors, which are not to be kept."""
    return call._replace(input=None, hx=None, params=[])


def _own(flags: GRUCall, batch_first: bool, x: Tensor, hx: Tensor, params: list[Tensor]) -> tuple[Tensor, Tensor]:
    """PyTorch's own GRU."""
    x = x.transpose(0, 1) if batch_first else x
    output, h_n, _ = torch_path.gru_forward(flags._replace(input=x, hx=hx, params=params), False)
    return output.transpose(0, 1) if batch_first else output, h_n


class Training(NamedTuple):
    """Forward and backward of calls that are alike.

    forward: takes input, hx and params; returns output, h_n and reserve, or None: the ordinary way has to be taken.
    backward: takes the call, gradients of output and h_n, output, reserve and needs, as `gru_backward` does; the reserve is
    not used again.
    """

    forward: Callable[[Tensor, Tensor, list[Tensor]], tuple[Tensor, Tensor, Tensor] | None]
    backward: Callable[[GRUCall, Tensor | None, Tensor | None, Tensor, Tensor, list[bool]], list[Tensor]]


def training_of(call: GRUCall) -> Training | None:
    """The same for calls that save what the backward needs; their input may have any strides."""
    if call.B == 0:
        return None
    plan = kernel_path.plan_of(call, training=True)
    if plan.whole is not None and call.H % 16 == 0:
        size = reserve_size(call.T, call.B, call.H, call.L, call.D, cuda=False, bytes_each=call.hx.dtype.itemsize)
        forward = _whole_sequences(call, plan, False, reserve=size)
        return Training(forward, functools.partial(_backward_of_kernels, plan))
    if plan.kernel == "torch" and torch_hooks.cudnn_runs(call.input):
        _run_once(call, True)
        return Training(functools.partial(_cudnn_forward, _flags(call), plan), _cudnn_backward)
    return None


def _backward_of_kernels(plan: Plan, call: GRUCall, *args: Any) -> list[Tensor]:
    return kernel_path.kernel_backward().gru_backward(call, plan, *args)


def _cudnn_forward(
    flags: GRUCall, plan: Plan, x: Tensor, hx: Tensor, params: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    results = cudnn_path.gru_forward_own_reserve(flags._replace(input=x, hx=hx, params=params))
    return kernel_path.remember(results, True, plan, cudnn_path)


def _cudnn_backward(*args: Any) -> list[Tensor]:
    return cudnn_path.gru_backward(*args, last_use=torch_hooks.graph_is_freed())


class _Results:
    """Makes output [T, B, D*H] or [B, T, D*H], in memory both are time-major, h_n [L*D, B, H] and perhaps a reserve."""

    def __init__(self, call: GRUCall, batch_first: bool, *, reserve: int = 0):
        T, B, H, states, width, dtype = call.T, call.B, call.H, call.L * call.D, call.D * call.H, call.hx.dtype
        output = ((B, T, width), (width, B * width, 1)) if batch_first else ((T, B, width), (B * width, width, 1))
        self._sizes = [(*output, dtype), ((states, B, H), (B * H, H, 1), dtype)]
        if reserve:
            self._sizes.append(((reserve,), (1,), dtype))

    def __call__(self) -> tuple[Tensor, ...]:
        new = torch_hooks.empty_strided_cuda
        return tuple([new(*sizes) for sizes in self._sizes])


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


def _whole_sequences(call: GRUCall, plan: Plan, batch_first: bool, *, reserve: int = 0) -> Run:
    """reserve: elements of it, 0: nothing is saved."""
    save = reserve > 0
    recipe = whole_path.recipe_of(call, plan.whole, save)
    T, B, H, D, states, dtype = call.T, call.B, call.H, call.D, call.L * call.D, call.hx.dtype
    lanes, each, itemsize = recipe.lanes, recipe.each, dtype.itemsize
    dense, batch_major = whole_path.dense(call.input)
    copies = dense is not call.input
    # of each launch: its first state, in elements of a tensor [L*D, B, H]; places of its parameters, and of those that multiply
    # its input; what makes gi; its workspace
    launches = []
    for first in range(0, states, lanes):
        projection = recipe.projection(call.input.shape[2] if first == 0 else D * H, batch_major and first == 0)
        room = recipe.room(projection, below=not save)
        places = call.places(first, lanes), slice(first * each, (first + D) * each, each)
        launches.append((first * B * H, *places, room, ((room.size // itemsize,), (1,), dtype)))
    top = launches[-1][0]
    x_is_taken = launches[0][3].projection is not None and not copies
    new_results = _Results(call, batch_first, reserve=reserve)
    between = (T, B, D * H), (B * D * H, D * H, 1)
    gates_from = (states - D) * T * B * H  # in a reserve, after the outputs of inner layers

    def run(x: Tensor, hx: Tensor, params: list[Tensor]) -> tuple[Tensor, ...] | None:
        p_hx, p_params = hx.data_ptr(), [p.data_ptr() for p in params]
        addresses = p_hx | x.data_ptr() if x_is_taken else p_hx
        if reduce(or_, p_params, addresses) % 16 or whole_path.missing_programs:
            return None
        new = torch_hooks.empty_strided_cuda
        results = new_results()
        output, h_n = results[:2]
        p_h_n, p_gi = h_n.data_ptr(), 0
        gates = below = None
        if save:
            reserve = results[2]
            below = reserve.data_ptr()
        try:
            for state, of_launch, of_input, room, workspace in launches:
                if state == 0 and batch_first and not x_is_taken:
                    x = x.transpose(0, 1)
                if room.projection is None:
                    gi = whole_path.input_projection(x, params[of_input], plan.tf32)
                    p_gi = gi.data_ptr()
                elif state == 0 and copies:
                    x = x.contiguous()
                if state == top:
                    y = output
                elif save:
                    y = reserve.as_strided(*between, state * T)
                else:
                    y = new(*between, dtype)
                if save:
                    gates = below + (gates_from + 4 * T * state) * itemsize
                space = new(*workspace)
                recipe.launch(
                    room, space.data_ptr(), x.data_ptr(), p_gi, p_hx + state * itemsize, p_params[of_launch], y.data_ptr(),
                    p_h_n + state * itemsize, gates, below, aligned=True,
                )  # fmt: skip
                x = y
        except DoesNotFit:  # the ordinary way says so, and plans anew
            return None
        return kernel_path.remember(results, save, plan, None)

    return run
