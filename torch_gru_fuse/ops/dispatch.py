"""Which implementation runs on which device.

An op that is made of another one may call the implementation itself where nothing stands between the two (`direct`): each
pass through the dispatcher and back into Python takes longer than a small kernel runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from torch_gru_fuse import torch_hooks
from torch_gru_fuse.ops import packed_path, timeouts, torch_path
from torch_gru_fuse.ops.call import GRUCall, PackedCall, PairCall
from torch_gru_fuse.ops.checks import check_batch_sizes
from torch_gru_fuse.ops.schemas import library, ops


def _cpu() -> ModuleType:
    return torch_path


def _cuda() -> ModuleType:
    from torch_gru_fuse.ops import kernel_path  # imports Triton

    return kernel_path


def _implement(device_type: str, path) -> None:
    """Register the functions of the module `path()` for one device type."""

    def gru_forward(
        input, hx, params, has_biases, num_layers, bidirectional, dropout_masks, save, keep=None, *, recompute=False
    ):  # fmt: skip
        call = GRUCall(input, hx, params, has_biases, num_layers, bidirectional, dropout_masks, keep)
        return path().gru_forward(call, save)

    def gru_backward(
        grad_output, grad_h_n, input, hx, params, has_biases, num_layers, bidirectional, dropout_masks, output, reserve, needs,
        keep=None,
    ):  # fmt: skip
        call = GRUCall(input, hx, params, has_biases, num_layers, bidirectional, dropout_masks, keep)
        if not reserve.numel():  # nothing was saved
            _, _, reserve = path().gru_forward(call, True)
        return path().gru_backward(call, grad_output, grad_h_n, output, reserve, needs)

    def gru_pair_forward(*args, recompute=False):
        *call, save = args
        return path().gru_pair_forward(PairCall(*call), save)

    def gru_pair_backward(grad_output, grad_h_n, *args):
        *call, output, reserve, needs = args
        call = PairCall(*call)
        if not reserve.numel():  # nothing was saved
            _, _, reserve = path().gru_pair_forward(call, True)
        return path().gru_pair_backward(call, grad_output, grad_h_n, output, reserve, needs)

    def gru_cell_forward(*args):
        return path().gru_cell_forward(*args)

    def gru_cell_backward(*args):
        return path().gru_cell_backward(*args)

    def gru_packed_forward(*args, recompute=False):
        *call, save = args
        return packed_path.gru_forward(_checked(PackedCall(*call)), save)

    def gru_packed_backward(grad_output, grad_h_n, *args):
        *call, output, reserve, needs = args
        call = _checked(PackedCall(*call))
        if not reserve.numel():  # nothing was saved
            _, _, reserve = packed_path.gru_forward(call, True)
        return packed_path.gru_backward(call, grad_output, grad_h_n, output, reserve, needs)

    for function in (
        gru_forward, gru_backward, gru_cell_forward, gru_cell_backward, gru_packed_forward, gru_packed_backward,
        gru_pair_forward, gru_pair_backward,
    ):  # fmt: skip
        on_device = on_its_device(function) if device_type == "CUDA" else function
        library.impl(function.__name__, on_device, device_type)
        if device_type == "CUDA":
            _on_cuda[function.__name__] = on_device


def _checked(call: PackedCall) -> PackedCall:
    """The call, if the values of its batch sizes, which only real tensors have, fit its sizes."""
    check_batch_sizes("gru_packed", call.batch_sizes, call.N, call.hx.shape[1])
    return call


def load_ahead(call: GRUCall, save: bool) -> None:
    """Starts to compile what a call on CUDA will run, while its caller does something else; the tensors may be fake."""
    # a GPU that is not there, or not asked for anything yet, has fake tensors too
    if call.input.is_cuda and call.B and torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
        _cuda().load_ahead(call, save)


_on_cuda: dict[str, Callable[..., Any]] = {}
PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def goes_straight(tensors: Sequence[Tensor | None], *, gradients: bool = False) -> bool:
    """Whether the dispatcher would do nothing but call the implementation for CUDA: the tensors are plain ones on CUDA, and
    neither gradients nor a transform, a mode or a tracer ask for more.

    gradients: whoever asks sees to them.
    """
    return (
        tensors[0].is_cuda
        and (gradients or not torch.is_grad_enabled())
        and PLAIN.issuperset(map(type, tensors))
        and torch_hooks.nothing_intercepts()
        and not any(t is not None and torch_hooks.is_special(t) for t in tensors)
    )


def on_cuda(name: str) -> Callable[..., Any]:
    """The implementation for CUDA of an op, without the dispatcher."""
    return _on_cuda[name]


def direct(name: str, tensors: Sequence[Tensor | None]) -> Callable[..., Any]:
    """What to call for an op: its implementation where the call goes straight there, otherwise the op."""
    return _on_cuda[name] if goes_straight(tensors) else getattr(ops, name).default


def on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Kernels are launched on the current device: make it that of the tensors.  An earlier kernel's error is raised first.

    Autocast has had its turn when an op gets here; products inside are not for it.
    """

    def run(*args, **options):
        if torch.is_autocast_enabled("cuda"):
            with torch_hooks.below_autocast("cuda"):
                return on_device(*args, **options)
        return on_device(*args, **options)

    def on_device(*args, **options):
        first = args[0].input if isinstance(args[0], GRUCall) else next(a for a in args if isinstance(a, Tensor))
        device = first.get_device()
        timeouts.check(device)
        if device == torch.cuda.current_device():
            return function(*args, **options)
        with torch.cuda.device(device):
            return function(*args, **options)

    return run


_implement("CPU", _cpu)
_implement("CUDA", _cuda)
