"""Dynamo: let nn.GRU through, follow one call of a module, and find the shapes of torch.gru without running it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torch_gru_fuse.torch_hooks import repeats


def innermost_backend(compiler_fn: Any) -> Any:
    """The backend that the user named, without the wrappers that Dynamo puts around it."""
    while True:
        if hasattr(compiler_fn, "_torchdynamo_orig_backend"):
            compiler_fn = compiler_fn._torchdynamo_orig_backend
        elif hasattr(getattr(compiler_fn, "__self__", None), "backend_compile_fn"):  # DDPOptimizer, which splits the graph
            compiler_fn = compiler_fn.__self__.backend_compile_fn
        else:
            return compiler_fn


def is_inductor(backend: Any) -> bool:
    """Whether a Dynamo backend is Inductor, as ``torch.compile`` or ``optimize("inductor")`` give it."""
    if isinstance(backend, torch._TorchCompileInductorWrapper):
        return True
    from torch._dynamo.backends.inductor import inductor

    return backend is inductor


def inductor_runs_pre_grad_passes() -> bool:
    from torch._inductor import config

    return bool(config.use_pre_grad_passes)


def dynamo_backend_in_progress() -> Any | None:
    """The backend of the `torch.compile` call that Dynamo traces for in this thread, if any."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        tx = InstructionTranslator.current_tx()
    except AttributeError:  # the thread-local has no value outside of a trace
        return None
    if tx is None:
        return None
    return innermost_backend(tx.output.compiler_fn)


def without_recompile_limit() -> contextlib.AbstractContextManager[None]:
    """Context in which Dynamo compiles a function for one more backend, however many it was compiled for before."""
    from torch._dynamo import config

    return config.patch(recompile_limit=2**20, accumulated_recompile_limit=2**20)


class DynamoHook:
    """Lets `torch.nn.GRU` into the graph and makes the shapes of `torch.gru` and `torch.gru_cell` by rules.

    Of the calls of one nn.GRU or nn.GRUCell in a graph Dynamo follows the first.

    Args:
        wants: called with a Dynamo backend; says whether graphs for it will be rewritten.
            For every other backend Dynamo behaves as without this package.
        shape_rule: called with the arguments of `torch.gru` on fake tensors; returns
            ``(output, h_n)``.
        packed_shape_rule: the same for its overload for packed data.
        packed_functions: what is traced in the place of PyTorch's functions of packed sequences, by those; see
            `passes/packed_sequences.py`.
        cell_shape_rule: the same for `torch.gru_cell`; returns the new hidden state.

    nn.RNN and nn.LSTM are not touched.
    """

    def __init__(
        self,
        wants: Callable[[Any], bool],
        shape_rule: Callable[..., tuple[Tensor, Tensor]],
        packed_shape_rule: Callable[..., tuple[Tensor, Tensor]] | None = None,
        packed_functions: Mapping[Callable[..., Any], Callable[..., tuple[Any, Any]]] | None = None,
        cell_shape_rule: Callable[..., Tensor] | None = None,
    ):
        aten = torch.ops.aten.gru
        self._wants = wants
        self._shape_rules = {aten.input: shape_rule}
        if packed_shape_rule is not None:
            self._shape_rules[aten.data] = packed_shape_rule
        self._packed_functions = dict(packed_functions or {})
        self._cell_shape_rule = cell_shape_rule
        self._undo: list[Callable[[], None]] = []

    @property
    def installed(self) -> bool:
        return bool(self._undo)

    def install(self) -> None:
        if self.installed:
            return
        self._install_module_hook()
        self._install_repeated_calls()
        self._install_functions()
        for op, rule in self._shape_rules.items():
            self._install_shape_rule(op, rule)
        if self._cell_shape_rule is not None:
            self._install_cell_shape_rule(self._cell_shape_rule)

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()

    def _wanted(self, tx: Any) -> bool:
        return self._wants(innermost_backend(tx.output.compiler_fn))

    def _install_module_hook(self) -> None:
        from torch._dynamo import config
        from torch._dynamo.variables.builder import VariableBuilder

        original = VariableBuilder.wrap_module

        @functools.wraps(original)
        def wrap_module(builder: Any, value: Any) -> Any:
            if not isinstance(value, torch.nn.GRU) or not self._wanted(builder.tx):
                return original(builder, value)
            with config.patch(allow_rnn=True):
                return original(builder, value)

        VariableBuilder.wrap_module = wrap_module
        self._undo.append(lambda: setattr(VariableBuilder, "wrap_module", original))

    def _install_repeated_calls(self) -> None:
        self._undo += repeats.install(self._wanted)

    def _install_functions(self) -> None:
        # torch.nn.utils.rnn's are functions that Dynamo skips, methods of nn.GRU functions that it traces.
        from torch._dynamo.variables.base import VariableTracker
        from torch._dynamo.variables.constant import ConstantVariable
        from torch._dynamo.variables.functions import SkipFunctionVariable, UserFunctionVariable, UserMethodVariable

        weights_have_changed = getattr(torch.nn.GRU, "_weights_have_changed", _weights_are_others)

        def traced_function(variable: Any) -> Callable[..., Any] | None:
            variable = getattr(variable, "im_func", variable)  # of a method, from torch 2.15 on
            return variable.fn if isinstance(variable, UserFunctionVariable) else None

        def put(kind: type, function_of: Callable[[Any], Any], self_args: Callable[[Any], list[Any]]) -> None:
            original = kind.call_function

            @functools.wraps(original)
            def call_function(variable: Any, tx: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
                called = function_of(variable)
                # nn.GRU's forward calls it where parameters are other objects than they were.  Dynamo cannot trace what it does
                # on CUDA, and in a graph there is no need of it.
                if called is torch.nn.GRU.flatten_parameters and _is_a(torch.nn.GRU, self_args(variable)) and self._wanted(tx):
                    return ConstantVariable.create(None)
                if called is weights_have_changed and _is_a(torch.nn.GRU, self_args(variable)) and self._wanted(tx):
                    return VariableTracker.build(tx, _weights_are_others).call_function(tx, self_args(variable), {})
                for function, replacement in self._packed_functions.items():
                    if called is function:
                        arguments = [*self_args(variable), *args]
                        packed = [a for a in (*arguments, *kwargs.values()) if _is_packed_sequence(a)]
                        # nn.GRU.forward has other arguments, too
                        if (packed or kind is SkipFunctionVariable) and self._wanted(tx):
                            return self._trace_replacement(replacement, tx, packed, arguments, kwargs)
                return original(variable, tx, args, kwargs)

            kind.call_function = call_function
            self._undo.append(lambda: setattr(kind, "call_function", original))

        put(SkipFunctionVariable, lambda variable: variable.value, lambda variable: [])
        for kind in (UserFunctionVariable, UserMethodVariable):
            put(kind, traced_function, lambda variable: variable.self_args())

    def _trace_replacement(
        self, replacement: Callable[..., Any], tx: Any, packed: list[Any], args: Sequence[Any], kwargs: dict[str, Any]
    ) -> Any:
        from torch._dynamo.variables.base import VariableTracker

        def node_of(sequence: Any) -> torch.fx.Node:
            _, batch_sizes, *_ = sequence.realize().unpack_var_sequence(tx)
            return batch_sizes.as_proxy().node

        # For as long as the graph is in the making: how many sequences there are, by the graph that says so and by the node of
        # batch_sizes.  Bodies of checkpoint and the like know what is known around them, but not the other way round.
        batches: dict[tuple[Any, torch.fx.Node], Any] = vars(tx.output).setdefault("torch_gru_fuse_batches", {})
        tracers = [tracer := tx.output.current_tracer]
        while tracers[-1].parent is not None:
            tracers.append(tracers[-1].parent)
        known = [batches[key] for p in packed for key in ((t, node_of(p)) for t in tracers) if key in batches]
        if known:
            kwargs = {**kwargs, "batch": known[0]}
        pair = VariableTracker.build(tx, replacement).call_function(tx, list(args), kwargs)
        result, batch = pair.unpack_var_sequence(tx)
        if not batch.is_python_constant() or batch.as_python_constant() is not None:
            for sequence in (*packed, *([result] if _is_packed_sequence(result) else [])):
                batches[tracer, node_of(sequence)] = batch
        return result

    def _install_shape_rule(self, op: Any, shape_rule: Callable[..., tuple[Tensor, Tensor]]) -> None:
        # Dynamo finds the shapes of a node by running it on fake tensors.  For torch.gru that is
        # a Python loop over time (torch/_decomp/decompositions.py), which takes O(T) and makes
        # T a constant of the graph.
        import torch._decomp.decompositions  # registers the entries replaced below

        keys = (torch._C.DispatchKey.Autograd, torch._C.DispatchKey.CompositeImplicitAutograd)
        originals = {key: op.py_kernels[key] for key in keys}
        wants = self._wants

        def with_fallback(original: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(original)
            def rule(*args: Any, **kwargs: Any) -> Any:
                if _only_shapes_are_asked(args) and wants(dynamo_backend_in_progress()):
                    return shape_rule(*args, **kwargs)
                return original(*args, **kwargs)

            return rule

        def put(kernels: dict[Any, Callable[..., Any]]) -> None:
            op.py_kernels.update(kernels)
            op._dispatch_cache.clear()

        put({key: with_fallback(original) for key, original in originals.items()})
        self._undo.append(lambda: put(originals))

    def _install_cell_shape_rule(self, shape_rule: Callable[..., Tensor]) -> None:
        # A cell in a loop is run on fake tensors once a step.  By itself it has no rule in Python: PyTorch makes it of a dozen
        # operations, which takes more than half of the time that Dynamo spends on a step.
        op = torch.ops.aten.gru_cell.default
        key = torch._C.DispatchKey.CompositeImplicitAutograd
        before = op.py_kernels.get(key)
        wants = self._wants

        def rule(*args: Any, **kwargs: Any) -> Any:
            if _only_shapes_are_asked(args) and wants(dynamo_backend_in_progress()):
                return shape_rule(*args, **kwargs)
            if before is not None:
                return before(*args, **kwargs)
            return op._op_dk(key, *args, **kwargs)  # the kernel in C++; `decompose` would come back here

        op.py_kernels[key] = rule
        op._dispatch_cache.clear()

        def undo() -> None:
            if before is None:
                del op.py_kernels[key]
            else:
                op.py_kernels[key] = before
            op._dispatch_cache.clear()

        self._undo.append(undo)


def _weights_are_others(module: torch.nn.GRU) -> bool:
    """Traced in the place of `nn.GRU._weights_have_changed`, which asks weak references to the parameters of the last call.

    Dynamo would guard on what they refer to.  Where these parameters have been replaced, nothing else may hold them, and then
    they are gone when the guards are made.  The list that `forward` uses holds its parameters.
    """
    for name, held in zip(module._flat_weights_names, module._flat_weights, strict=True):
        weight = getattr(module, name) if hasattr(module, name) else None
        if weight is not None and held is not None and weight is not held:
            return True
    return False


def _is_packed_sequence(variable: Any) -> bool:
    """Whether a value that Dynamo traces is a PackedSequence."""
    return _is_a(torch.nn.utils.rnn.PackedSequence, [variable])


def _is_a(kind: type, variables: Sequence[Any]) -> bool:
    """Whether the first of values that Dynamo traces is of that type."""
    try:
        return bool(variables) and issubclass(variables[0].realize().python_type(), kind)
    except NotImplementedError:  # a variable that has no Python type
        return False


def _only_shapes_are_asked(args: Sequence[Any]) -> bool:
    """True under Dynamo's fake propagation, False while AOTAutograd or make_fx record a graph."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.fx.experimental.proxy_tensor import get_proxy_mode
    from torch.utils import _pytree as pytree

    tensors = [a for a in pytree.tree_leaves(args) if isinstance(a, Tensor)]
    functional_mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL)
    return (
        functional_mode is None
        and get_proxy_mode() is None
        and bool(tensors)
        and all(isinstance(t, FakeTensor) for t in tensors)
    )
