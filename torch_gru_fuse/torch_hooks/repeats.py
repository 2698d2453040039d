"""Dynamo: what a loop does in every step is looked at once.

A loop over a cell calls its module and takes a part of its input once a time step.  Dynamo follows ``nn.Module.__call__`` and
``forward`` each time, and finds the shapes of each result by running the operation on fake tensors, which is most of its work
on such a loop.  Calls and operands that are like earlier ones have results like theirs.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

Undo = Callable[[], None]


def install(wanted: Callable[[Any], bool]) -> list[Undo]:
    """Returns what undoes it.

    wanted: called with Dynamo's translator; whether it is for a graph in which repetitions are left out.
    """
    return [*_install_calls(wanted), *_install_fake_values(wanted)]


def _install_calls(wanted: Callable[[Any], bool]) -> list[Undo]:
    # What Dynamo looks at in `__call__` and `forward` makes the same guards every time, so one time is enough.
    try:
        from torch._dynamo.utils import unpatched_nn_module_call, unpatched_nn_module_call_impl
        from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable, record_nn_module_stack
    except ImportError:  # a torch that calls them something else: every call is followed
        return []
    unpatched = unpatched_nn_module_call, unpatched_nn_module_call_impl
    original = UnspecializedNNModuleVariable.call_function

    @functools.wraps(original)
    def call_function(variable: Any, tx: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        module, source = variable.value, variable.source
        if type(module) not in _FORWARD or source is None or not wanted(tx):
            return original(variable, tx, args, kwargs)
        calls = _Seen.by(tx).calls
        key = tx.output.current_tracer, id(module)
        skips_guards = getattr(tx.output.tracing_context.guards_context, "skip_install", False)
        plain = not skips_guards and _calls_forward_alone(module, unpatched) and _is_as_it_was(tx, module)
        if plain and key in calls and calls[key].is_like(args, kwargs):
            with record_nn_module_stack(str(id(module)), variable.get_nn_module_stack_source(), tx, module):
                return calls[key].repeat(tx, args)
        result = original(variable, tx, args, kwargs)
        if plain and key not in calls and (call := _Call.of(tx, variable, args, result)) is not None:
            calls[key] = call
        return result

    UnspecializedNNModuleVariable.call_function = call_function
    return [lambda: setattr(UnspecializedNNModuleVariable, "call_function", original)]


def _install_fake_values(wanted: Callable[[Any], bool]) -> list[Undo]:
    from torch._dynamo.variables import builder

    original = getattr(builder, "get_fake_value", None)
    if original is None:  # a torch that calls it something else: every node is run on fake tensors
        return []

    @functools.wraps(original)
    def get_fake_value(node: torch.fx.Node, tx: Any, *args: Any, **kwargs: Any) -> Any:
        # Only in a graph that calls a cell again is there something to be won.
        if node.target not in _KINDS or not wanted(tx) or not _Seen.by(tx).calls:
            return original(node, tx, *args, **kwargs)
        kind = _KINDS[node.target](node, tx)
        if kind is None:
            return original(node, tx, *args, **kwargs)
        found = _Seen.by(tx).results
        if kind.key in found:
            return kind.like(found[kind.key])
        result = original(node, tx, *args, **kwargs)
        if _is_plain(result, tx):
            found[kind.key] = result
        return result

    builder.get_fake_value = get_fake_value
    return [lambda: setattr(builder, "get_fake_value", original)]


class _Seen(NamedTuple):
    """What has been seen while a graph is in the making.

    Attributes:
        calls: of modules, by the graph that has seen one (the body of a checkpoint is another), and the module.
        results: fake tensors, by what they were made of; see `_Kind`.
    """

    calls: dict[tuple[Any, int], _Call]
    results: dict[tuple[Any, ...], Tensor]

    @classmethod
    def by(cls, tx: Any) -> _Seen:
        return vars(tx.output).setdefault("torch_gru_fuse_seen", cls({}, {}))


# ---- calls of modules --------------------------------------------------------------------------------------------------------

#: `forward` as PyTorch has it.
_FORWARD = {kind: kind.forward for kind in (torch.nn.GRU, torch.nn.GRUCell)}
_HOOKS = ("_backward_hooks", "_backward_pre_hooks", "_forward_hooks", "_forward_pre_hooks")
_GLOBAL_HOOKS = [getattr(torch.nn.modules.module, f"_global{name}") for name in _HOOKS]


class _Call(NamedTuple):
    """What `forward` of a module does with an input and a state, as Dynamo has found it.

    Attributes:
        function: `torch.gru` or `torch.gru_cell`.
        rest: its arguments after the two.
        like: what the two have to be for `forward` to do the same; see `_likeness`.
    """

    function: Any
    rest: tuple[Any, ...]
    like: object

    @classmethod
    def of(cls, tx: Any, variable: Any, args: Sequence[Any], result: Any) -> _Call | None:
        from torch._dynamo.variables.base import VariableTracker
        from torch._dynamo.variables.constant import ConstantVariable
        from torch._dynamo.variables.lists import TupleVariable

        is_cell = type(variable.value) is torch.nn.GRUCell
        if is_cell:
            names: tuple[str, ...] = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            like: object = 2
        else:
            names = ("_flat_weights", "bias", "num_layers", "dropout", "training", "bidirectional", "batch_first")
            if not args or type(result) is not TupleVariable or len(result.items) != 2:
                return None
            like = _likeness([args[0], result.items[1]])  # a state that is made of zeros is like the one that is returned
        if like is None:
            return None
        get = VariableTracker.build(tx, getattr)
        rest = [get.call_function(tx, [variable, ConstantVariable.create(name)], {}).realize() for name in names]
        return cls(VariableTracker.build(tx, torch.gru_cell if is_cell else torch.gru), tuple(rest), like)

    def is_like(self, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
        if kwargs or len(args) != 2:
            return False
        if self.like == 2:  # a cell asks for the dimensions alone
            return _are_tensors(args) and all(a.realize().ndim == 2 for a in args)
        return _likeness(args) == self.like

    def repeat(self, tx: Any, args: Sequence[Any]) -> Any:
        return self.function.call_function(tx, [*(a.realize() for a in args), *self.rest], {})


def _are_tensors(variables: Sequence[Any]) -> bool:
    from torch._dynamo.variables.tensor import TensorVariable

    return all(type(v.realize()) is TensorVariable for v in variables)


def _likeness(variables: Sequence[Any]) -> object:
    """All that `nn.GRU.forward` asks about an input and a state; None where these are no batches of known sizes."""
    if not _are_tensors(variables):
        return None
    x, h = (v.realize().as_proxy().node.meta["example_value"] for v in variables)
    sizes = (*x.shape, *h.shape)
    if x.dim() != 3 or h.dim() != 3 or not all(type(size) is int for size in sizes):
        return None
    return sizes, x.dtype, torch._C._is_any_autocast_enabled()


def _calls_forward_alone(module: torch.nn.Module, unpatched: tuple[Any, Any]) -> bool:
    """Whether a call of a module runs `forward` as PyTorch has it, and nothing else."""
    kind = type(module)
    return (
        (kind.__call__, kind._call_impl) == unpatched
        and kind.forward is _FORWARD[kind]
        and "forward" not in module.__dict__
        and not any(_GLOBAL_HOOKS)
        and not any(module.__dict__[name] for name in _HOOKS)
    )


def _is_as_it_was(tx: Any, module: torch.nn.Module) -> bool:
    """Whether nothing that Dynamo has traced changes a module, its type, what it holds or the hooks of all modules."""
    side_effects = tx.output.side_effects
    held = [value for value in module.__dict__.values() if isinstance(value, (dict, list))]
    for changed in (module, type(module), torch.nn.Module, module.__dict__, *held, *_GLOBAL_HOOKS):
        variable = side_effects.id_to_variable.get(id(changed))
        if variable is not None and side_effects.is_modified(variable):
            return False
    return True


# ---- results of operations ---------------------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """An operation on fake tensors whose result depends on `key` alone, but for where a view lies.

    Attributes:
        key: the operation, and all of its operands that there is to know.
        like: makes the result from that of another one of the same key.
    """

    key: tuple[Any, ...]
    like: Callable[[Tensor], Tensor]


def _cell(node: torch.fx.Node, tx: Any) -> _Kind | None:
    """``torch.gru_cell(x, h, ...)``."""
    operands = [a.meta.get("example_value") if isinstance(a, torch.fx.Node) else a for a in node.args]
    if node.kwargs or torch._C._is_any_autocast_enabled() or not all(t is None or _is_plain(t, tx) for t in operands):
        return None

    def like(other: Tensor) -> Tensor:
        return _fake(tx, torch.empty_strided(other.shape, other.stride(), dtype=other.dtype, device="meta"), other.device)

    return _Kind((node.target, *(t if t is None else _properties(t) for t in operands)), like)


def _item(node: torch.fx.Node, tx: Any) -> _Kind | None:
    """``x[t]``."""
    base, index = node.args
    x = base.meta.get("example_value") if isinstance(base, torch.fx.Node) else None
    if type(index) is not int or not _is_plain(x, tx) or not x.dim() or not -x.shape[0] <= index < x.shape[0]:
        return None

    def like(other: Tensor) -> Tensor:
        offset = x.storage_offset() + index % x.shape[0] * x.stride(0)
        part = torch.empty(0, dtype=x.dtype, device="meta")
        return _fake(tx, part.set_(x.untyped_storage(), offset, other.shape, other.stride()), x.device)

    return _Kind((node.target, _properties(x)), like)


_KINDS = {torch.gru_cell: _cell, operator.getitem: _item}


def _is_plain(x: Any, tx: Any) -> bool:
    """Whether a value is a fake tensor of known sizes of the graph itself, and neither differentiated nor anything else than
    its sizes and its memory."""
    return (
        type(x) is FakeTensor
        and x.fake_mode is tx.fake_mode
        and type(x.fake_mode) is FakeTensorMode
        and x.constant is None
        and x.real_tensor is None
        and x.layout is torch.strided
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.is_inference_mode_enabled()
        and not x.is_conj()
        and not x.is_neg()
        and all(type(size) is int for size in (*x.shape, *x.stride(), x.storage_offset()))
        and tx.output.current_tracer.parent is None  # bodies of checkpoint and the like ask versions of what they are given
    )


def _properties(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype, x.device


def _fake(tx: Any, meta: Tensor, device: torch.device) -> Tensor:
    return FakeTensor(tx.fake_mode, meta, device)
