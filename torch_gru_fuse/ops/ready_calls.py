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
from typing import NamedTuple

import torch
from torch import Tensor

from torch_gru_fuse import torch_hooks
from torch_gru_fuse.ops import dispatch, timeouts
from torch_gru_fuse.ops.call import GRUCall
from torch_gru_fuse.ops.checks import check_gru

log = logging.getLogger("torch_gru_fuse")

#: Takes input, hx and params; returns output and h_n of `gru` (and a reserve), or None where only the ordinary way will do.
Run = Callable[[Tensor, Tensor, list[Tensor]], tuple[Tensor, ...] | None]


class _Ready(NamedTuple):
    alike: Callable[..., bool]
    run: Run


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
    variable = os.environ._data.get  # `os.environ.get` takes 1 us
    key = (
        input.shape, hx.shape, dtype, device, len(params), has_biases, num_layers, bidirectional, batch_first, save,
        variable(b"TORCH_GRU_FUSE_KERNELS"), variable(b"TORCH_GRU_FUSE_GPU"), variable(b"TORCH_GRU_FUSE_TIMEOUT_S"),
        dtype == torch.float32 and torch_hooks.rnn_allows_tf32(), torch_hooks.cudnn_enabled(),
        torch.is_grad_enabled(), torch.cuda.is_current_stream_capturing(),
    )  # fmt: skip
    kinds = _ready.get(key, ())
    if kinds is None or device != torch.cuda.current_device() or log.isEnabledFor(logging.DEBUG):  # which says the plan
        return None
    for ready in kinds:
        if ready.alike(input, hx, *params):
            timeouts.check(device)
            return ready.run(input, hx, params)
    run = _make(GRUCall(input, hx, params, has_biases, num_layers, bidirectional, None), batch_first, save, key)
    if run is None:
        return None
    timeouts.check(device)
    return run(input, hx, params)


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
    if len(_ready) >= _MOST_KEYS:
        _ready.clear()
    kinds = _ready.get(key) or ()
    _ready[key] = None if run is None else (_Ready(torch_hooks.like(tensors), run), *kinds[: _MOST_KINDS - 1])
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
