"""Calls like one that was made before.

Between the arguments of a call on CUDA and its launches lie checks, the dispatcher, the plan, sizes and grids.  They take
longer than a small GRU runs, and come out the same for all calls that are alike.  Here the first of these is looked at in full,
and a function is made of it (`ready_launches`) that only allocates, reads addresses and launches; the others go straight there.

Alike are calls with the same
- key: shapes of input and hx, dtype, device, flags, and settings, which may change from call to call: variables of the
  environment, whether TF32 and cuDNN are allowed, whether gradients are enabled, whether a CUDA graph is being captured;
- kind of tensors (`torch_hooks.like`): each one's type, dtype, device, shape, strides and keys of the dispatcher.

What is no part of that happens at each call: addresses are read, the current stream is asked for, and so are errors of earlier
launches.  Wherever something else might have to be done (modes, transforms, tracers, copies, another device) a call is not
ready and takes the ordinary way, which decides everything.  Calls with gradients are ready, too; between them and their
launches is autograd (`ready_training`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_gru_fuse import torch_hooks
from torch_gru_fuse.ops import dispatch, timeouts
from torch_gru_fuse.ops.call import GRUCall, PairCall
from torch_gru_fuse.ops.checks import check_gru, check_gru_pair

log = logging.getLogger("torch_gru_fuse")

#: Takes input, hx and params; returns output and h_n of `gru` (and a reserve), or None where only the ordinary way will do.
Run = Callable[[Tensor, Tensor, list[Tensor]], tuple[Tensor, ...] | None]
#: The same of a pair, from its inputs.
RunPair = Callable[[list[Tensor], Tensor, list[Tensor]], tuple[Tensor, ...] | None]


class _Ready(NamedTuple):
    alike: Callable[..., bool]
    run: Run | RunPair


#: By key; None: what is planned for this key takes the ordinary way.
_ready: dict[tuple, tuple[_Ready, ...] | None] = {}
_MOST_KEYS, _MOST_KINDS = 4096, 4  # that are kept, of calls and of each key


def results(
    input: Tensor,
    hx: Tensor,
    params: list[Tensor],
    has_biases: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    save: bool = False,
) -> tuple[Tensor, ...] | None:
    """output and h_n of `gru` without dropout, or None: the call is to take the ordinary way.

    save: also the reserve, as `gru_forward` makes it; gradients are not enabled then.

    Raises what the ordinary way would raise.
    """
    if not (
        input.is_cuda
        and dispatch.PLAIN.issuperset((type(input), type(hx)))
        and torch_hooks.nothing_intercepts()
    ):
        return None
    dtype, device = input.dtype, input.get_device()
    key = (
        input.shape, hx.shape, dtype, device, len(params), has_biases, num_layers, bidirectional, batch_first, save,
        *_settings(dtype),
    )  # fmt: skip
    run = _known(key, device, (input, hx, *params))
    if run is _UNKNOWN:
        run = _make(GRUCall(input, hx, params, has_biases, num_layers, bidirectional, None), batch_first, save, key)
    if run is None:
        return None
    timeouts.check(device)
    return run(input, hx, params)


def pair_results(
    inputs: list[Tensor],
    hx: Tensor,
    params: list[Tensor],
    has_biases: bool,
    reverse: list[bool],
    batch_first: bool,
    save: bool = False,
) -> tuple[Tensor, ...] | None:
    """output [2, T, B, H] and h_n [2, B, H] of `gru_pair`, or None: the call is to take the ordinary way.

    Gradients are not enabled.  save: also the reserve, as `gru_pair_forward` makes it.
    """
    if not (hx.is_cuda and dispatch.PLAIN.issuperset(map(type, (hx, *inputs))) and torch_hooks.nothing_intercepts()):
        return None
    dtype, device = hx.dtype, hx.get_device()
    key = (
        *(x.shape for x in inputs), hx.shape, dtype, device, len(params), has_biases, *reverse, batch_first, save,
        *_settings(dtype),
    )  # fmt: skip
    run = _known(key, device, (*inputs, hx, *params))
    if run is _UNKNOWN:
        run = _make_pair(PairCall(inputs, hx, params, has_biases, reverse), batch_first, save, key)
    if run is None:
        return None
    timeouts.check(device)
    return run(inputs, hx, params)


def _settings(dtype: torch.dtype) -> tuple:
    """What may change from call to call, beside arguments."""
    variable = os.environ._data.get  # `os.environ.get` takes 1 us
    return (
        variable(b"TORCH_GRU_FUSE_KERNELS"), variable(b"TORCH_GRU_FUSE_GPU"), variable(b"TORCH_GRU_FUSE_TIMEOUT_S"),
        dtype == torch.float32 and torch_hooks.rnn_allows_tf32(), torch_hooks.cudnn_enabled(),
        torch.is_grad_enabled(), torch.cuda.is_current_stream_capturing(),
    )  # fmt: skip


_UNKNOWN: Any = object()


def _known(key: tuple, device: int, tensors: tuple[Tensor, ...]) -> Any:
    """What runs a call with these tensors, None where that is the ordinary way, `_UNKNOWN` where nobody has looked yet."""
    kinds = _ready.get(key, ())
    if kinds is None or device != torch.cuda.current_device() or log.isEnabledFor(logging.DEBUG):  # which says the plan
        return None
    for ready in kinds:
        if ready.alike(*tensors):
            return ready.run
    return _UNKNOWN


def _keep(key: tuple, tensors: list[Tensor], run: Run | RunPair | None) -> None:
    """For other calls; run: None: all with this key take the ordinary way."""
    if len(_ready) >= _MOST_KEYS:
        _ready.clear()
    kinds = _ready.get(key) or ()
    _ready[key] = None if run is None else (_Ready(torch_hooks.like(tensors), run), *kinds[: _MOST_KINDS - 1])


def _make(call: GRUCall, batch_first: bool, save: bool, key: tuple) -> Run | None:
    """What runs calls like this one, kept for others, or None."""
    tensors = call.tensors
    if not dispatch.goes_straight(tensors, gradients=True) or not torch_hooks.autocast_is_passed("cuda"):
        return None
    input, hx, params, has_biases, num_layers, bidirectional, *_ = call
    check_gru(input, hx, params, has_biases, num_layers, 0.0, False, bidirectional, batch_first)
    if batch_first:
        call = call._replace(input=input.transpose(0, 1))
    needed_contiguous = (hx, *params) if call.T > 1 else (call.input[0], hx, *params)
    if not all(tensor.is_contiguous() for tensor in needed_contiguous):
        return None
    run = _run_of(call, batch_first, save)
    _keep(key, tensors, run)
    return run


def _make_pair(call: PairCall, batch_first: bool, save: bool, key: tuple) -> RunPair | None:
    """The same of a pair."""
    from torch_gru_fuse.ops import ready_launches  # imports Triton

    tensors = call.tensors
    if not dispatch.goes_straight(tensors) or not torch_hooks.autocast_is_passed("cuda"):
        return None
    check_gru_pair(*call, batch_first)
    if not all(tensor.is_contiguous() for tensor in (call.hx, *call.params)):
        return None
    if batch_first:
        call = call._replace(inputs=[x.transpose(0, 1) for x in call.inputs])
    run = ready_launches.of_pair(call, batch_first=batch_first, save=save)
    _keep(key, tensors, run)
    return run


def _run_of(call: GRUCall, batch_first: bool, save: bool) -> Run | None:
    from torch_gru_fuse.ops import ready_launches, ready_training  # import Triton

    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in call.tensors)):
        return ready_launches.of(call, batch_first=batch_first, save=save)
    training = ready_launches.training_of(call)
    return None if training is None else ready_training.run_of(call, training, batch_first=batch_first)


def forget() -> None:
    """All of them: from now on plans are others."""
    _ready.clear()
