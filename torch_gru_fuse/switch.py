"""Switching the rewrite on and off for `torch.compile`'s default backend."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Any

from torch import Tensor

from torch_gru_fuse import torch_hooks
from torch_gru_fuse.ops.checks import check_gru_cell
from torch_gru_fuse.ops.registration import is_differentiated
from torch_gru_fuse.ops.schemas import ops
from torch_gru_fuse.passes import packed_sequences
from torch_gru_fuse.passes.ahead import load_ahead
from torch_gru_fuse.passes.rewrite import cache_tag, inductor_options, rewrite, settings

log = logging.getLogger("torch_gru_fuse")

_enabled = False


def _is_own_backend(backend: Any) -> bool:
    return getattr(backend, "rewrites_gru", False) or getattr(
        getattr(backend, "compiler_fn", None), "rewrites_gru", False
    )


def _will_be_rewritten(backend: Any) -> bool:
    """Whether a graph that Dynamo traces for `backend` reaches the pass."""
    if backend is None:
        return False
    if _is_own_backend(backend):
        return True
    if not _enabled:
        return False
    if not torch_hooks.is_inductor(backend):
        log.info(
            "backend %s does not run the rewrite; nn.GRU is treated as without torch_gru_fuse",
            getattr(backend, "__name__", backend),
        )
        return False
    return True


def _shapes(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """output and h_n of `torch.gru` on fake tensors; also where its argument errors are raised."""
    return ops.gru.default(*args, **kwargs)


def _packed_shapes(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """The same of its overload for packed data."""
    return ops.gru_packed.default(*args, **kwargs)


def _cell_shape(
    input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
) -> Tensor:
    """The same for `torch.gru_cell`.  A loop asks once a step; most of the time goes where something is differentiated."""
    tensors = input, hx, w_ih, w_hh, b_ih, b_hh
    if not torch_hooks.is_below_autograd() and is_differentiated(tensors):
        return ops.gru_cell.default(*tensors)
    check_gru_cell(*tensors)
    return hx.new_empty(hx.shape)


dynamo_hook = torch_hooks.DynamoHook(
    _will_be_rewritten, _shapes, _packed_shapes, packed_sequences.REPLACEMENTS, cell_shape_rule=_cell_shape
)
inductor_hook = torch_hooks.InductorHook(rewrite, cache_tag, inductor_options, load_ahead)


class enable:  # noqa: N801  (called as a function, as torch.no_grad is)
    """Rewrite the GRUs of every model that `torch.compile` compiles from now on.

    ``enable()`` stays in force until :func:`disable`; ``with enable():`` until the end of the block,
    where the former state comes back.  Compilation happens at a model's first call, so that is
    the call that has to be inside.  Models that are already compiled stay as they are.

    Affects `torch.nn.GRU`, `torch.nn.GRUCell`, `torch.gru` and `torch.gru_cell` under
    ``torch.compile`` with its default backend (Inductor) and with AOTInductor.  Eager code, other
    backends, nn.LSTM and nn.RNN behave as without it.

    Args:
        recompute: in training, GRUs keep only their results between forward and backward; the backward runs the forward again.
            Of a stack that is one of some seven times as many values, for the time of one more forward.
    """

    def __init__(self, *, recompute: bool = False) -> None:
        self._before = _enabled, settings.recompute
        _set_enabled(True)
        settings.recompute = recompute

    def __enter__(self) -> enable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        was_enabled, settings.recompute = self._before
        _set_enabled(was_enabled)

    def __repr__(self) -> str:
        return f"torch_gru_fuse.enable() [now {'enabled' if _enabled else 'disabled'}]"


def disable() -> None:
    """Undo :func:`enable`.  Models that are already compiled stay as they are."""
    _set_enabled(False)


def is_enabled() -> bool:
    """Whether `torch.compile`'s default backend rewrites GRUs."""
    return _enabled


def _set_enabled(value: bool) -> None:
    global _enabled
    _enabled = value
    if value:
        dynamo_hook.install()
        inductor_hook.install()
    else:
        inductor_hook.remove()
        if not _backend_loaded:
            dynamo_hook.remove()


_backend_loaded = False


def keep_dynamo_hook() -> None:
    """Called by the backend "gru_fuse", which needs Dynamo's part without :func:`enable`."""
    global _backend_loaded
    _backend_loaded = True
    dynamo_hook.install()
