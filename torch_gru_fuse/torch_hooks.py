"""Every place where this package touches an interface of torch that is not public.

Nothing outside this module imports a name with a leading underscore from torch or
changes an attribute of one of its modules.  When a torch release moves something,
this is the file to mend; `tests/test_torch_hooks.py` says what each hook is expected to do.

Importing this module imports torch and nothing of Dynamo or Inductor; the functions that
need those import them when they are called.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# ---------------------------------------------------------------------------------------
# Dispatcher
# ---------------------------------------------------------------------------------------

#: Context in which a call of an op skips its autograd kernel.
below_autograd = torch._C._AutoDispatchBelowAutograd

#: `torch.autograd.Function` for use inside the autograd kernel of an op.  The public class
#: refuses to run there while a `torch.func` transform is active, although the transform has
#: already been taken apart by the dispatcher at that point.
SingleLevelFunction = torch.autograd.function._SingleLevelFunction


def apply_single_level(function: type, *args: Any) -> Any:
    """``function.apply(*args)`` for a `SingleLevelFunction`, inside or outside `torch.func`."""
    if not torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    from torch._functorch.autograd_function import enable_single_level_autograd_function

    with enable_single_level_autograd_function():
        return function.apply(*args)


def nothing_intercepts() -> bool:
    """Whether a call of an op on plain tensors goes straight to their device, or to autograd: no mode (fake tensors, tracing,
    counting), no `torch.func` transform, no forward-mode AD, no TorchScript tracer."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
    )


# Of a tensor: it is not what its memory says, or not one tensor.
_SPECIAL_KEYS = 0
for _key in ("Negative", "Conjugate", "Batched", "FuncTorchBatched", "Functionalize", "Python", "ZeroTensor"):
    _SPECIAL_KEYS |= torch._C.DispatchKeySet(torch._C._parse_dispatch_key(_key)).raw_repr()
_dispatch_keys = torch._C._dispatch_keys


def is_special(tensor: Tensor) -> bool:
    """Whether the dispatcher would do something before it calls what is registered for the device, gradients apart: a view of
    a complex tensor whose sign is to be changed, samples of a vmap, a wrapper."""
    return _dispatch_keys(tensor).raw_repr() & _SPECIAL_KEYS != 0


def autocast_is_passed(device_type: str) -> bool:
    """Whether autocast does nothing to the ops called here: it is off, or an op's autocast kernel has had its turn."""
    return torch._C._dispatch_tls_is_dispatch_key_excluded(_AUTOCAST_DISPATCH_KEYS[device_type])


_AUTOCAST_DISPATCH_KEYS = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}


def call_below(op: Callable[..., Any], *args: Any) -> Any:
    """``op(*args)`` without its autograd kernel, for the `forward` of a `SingleLevelFunction`.

    There derivatives are switched off for good.  A `torch.func` transform further out takes its own from this very call, after
    the innermost one has been taken off by the dispatcher, so they are switched on again for it.
    """
    if not torch._C._are_functorch_transforms_active():
        with below_autograd():
            return op(*args)
    with torch.enable_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(True), below_autograd():
        return op(*args)


def is_below_autograd() -> bool:
    """Whether the dispatcher has taken off autograd, or somebody has switched it off: kernels, and bodies of `scan`."""
    return torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.AutogradFunctionality)


def has_forward_tangent(tensors: Iterable[Tensor | None]) -> bool:
    """Whether forward-mode AD is active and one of `tensors` carries a tangent."""
    # While a graph of Dynamo is traced, a transform or a mode is active, and the level is known to C++ alone.
    if nothing_intercepts():
        return False
    from torch._subclasses.fake_tensor import FakeTensor

    def has_tangent(tensor: Tensor) -> bool:
        return torch._VF._unpack_dual(tensor, level=0)[1] is not None

    present = [t for t in tensors if t is not None]
    if all(type(t) is FakeTensor for t in present):  # Dynamo asks at every step of a loop; in Python it takes 1 ms a tensor
        with torch._C._DisableTorchDispatch():
            return any(map(has_tangent, present))
    return any(map(has_tangent, present))


@contextlib.contextmanager
def tangents_of_outer_levels(tensors: Sequence[Tensor | None]) -> Iterator[list[Tensor | None]]:
    """For the `jvp` of a `SingleLevelFunction`: `tensors` without the tangents that it is about.

    There forward-mode AD is switched off, but as in :func:`call_below` transforms further out want it.
    """
    with torch.autograd.forward_ad._set_fwd_grad_enabled(True):
        yield [None if t is None else torch._VF._unpack_dual(t, level=0)[0] for t in tensors]


def register_vmap(
    library: torch.library.Library,
    name: str,
    rule: Callable[..., tuple[Any, Any]],
    composite: Callable[..., Any],
    prefers_composite: Callable[..., bool],
) -> None:
    """What `torch.vmap` makes of the op `name`: `rule`, as for `torch.library.register_vmap`, or `composite`.

    `composite` takes the arguments of the op and is made of ops that have rules of their own; each of them is mapped.  It
    runs where ``prefers_composite(in_dims, *args)`` says so.
    """
    from torch._functorch.autograd_function import custom_function_call_vmap_helper
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
    from torch._functorch.vmap import unwrap_batched

    op = getattr(getattr(torch.ops, library.ns), name).default

    def mapped(*args: Any) -> Any:
        interpreter = retrieve_current_functorch_interpreter()
        _, in_dims = unwrap_batched(args, interpreter.level())
        if prefers_composite(in_dims, *args):
            return composite(*args)
        return custom_function_call_vmap_helper(interpreter, rule, op, *args)

    library.impl(name, mapped, "FuncTorchBatched")
    library.impl(name, composite, "Batched")


def new_unbacked_size(minimum: int, maximum: int | None = None) -> Any:
    """In a fake implementation: a size that depends on data, between two known bounds.

    As `torch.library.get_ctx().new_dynamic_size()`, which takes `torch._dynamo.config.capture_dynamic_output_shape_ops` to be
    for every op of a graph, and refuses by its default.
    """
    context = torch.library.get_ctx()
    shape_env = context._shape_env
    if shape_env is None:
        return context.new_dynamic_size(min=minimum, max=maximum)  # raises what is to be raised
    from torch.fx.experimental.symbolic_shapes import _constrain_range_for_size

    size = shape_env.create_unbacked_symint()
    _constrain_range_for_size(size, min=minimum, max=maximum)
    return size


#: What torch.nn.utils.rnn's functions call: ``pack_padded(input, lengths, batch_first)`` and
#: ``pad_packed(data, batch_sizes, batch_first, padding_value, total_length)``.
pack_padded = torch._VF._pack_padded_sequence
pad_packed = torch._VF._pad_packed_sequence


_AUTOCAST_KEYS = {device_type: torch._C.DispatchKeySet(key) for device_type, key in _AUTOCAST_DISPATCH_KEYS.items()}


def below_autocast(device_type: str) -> contextlib.AbstractContextManager[None]:
    """Context in which a call of an op skips its autocast kernel for `device_type`."""
    return torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS[device_type])


def below_any_autocast() -> contextlib.AbstractContextManager[None]:
    """Context in which autocast changes nothing, whatever the device."""
    return torch._C._ExcludeDispatchKeyGuard(_AUTOCAST_KEYS["cpu"] | _AUTOCAST_KEYS["cuda"])


# ---------------------------------------------------------------------------------------
# Numerical precision of float32
# ---------------------------------------------------------------------------------------


# What the attributes `fp32_precision` of torch.backends read and set; asking them takes ten times as long.
_fp32_precision = torch._C._get_fp32_precision_getter
_set_fp32_precision = torch._C._set_fp32_precision_setter


def rnn_allows_tf32() -> bool:
    """Whether cuDNN's RNNs may use TF32 for float32.

    Both ways to say so end in this flag: `torch.backends.cudnn.allow_tf32` and
    `torch.backends.cudnn.rnn.fp32_precision` (with the more general `fp32_precision` flags).
    """
    return _fp32_precision("cuda", "rnn") == "tf32"


def matmul_allows_tf32() -> bool:
    """Whether cuBLAS may use TF32 for float32; this is the flag that `torch.gru_cell` obeys."""
    return _fp32_precision("cuda", "matmul") == "tf32"


_precision_lock = threading.Lock()


class matmul_tf32:  # a context manager by hand: contextlib's takes twice the time, and every float32 call may need one
    """Run float32 matrix products with TF32 allowed or not, whatever the global flag says.

    `torch.gru` obeys cuDNN's RNN flag for all its products, torch's own matrix products obey
    cuBLAS's.  The flag is global to the process: where the two already agree, as they do for
    half precision callers and for most float32 ones, nothing is touched; otherwise it is
    set and restored under a lock.
    """
    __slots__ = ("_allow", "_before")

    def __init__(self, allow: bool):
        self._allow = allow
        self._before: tuple[str, str | None] | None = None

    def __enter__(self) -> None:
        precision = _fp32_precision("cuda", "matmul")
        if (precision == "tf32") == self._allow:
            return
        _precision_lock.acquire()
        try:
            legacy = torch.get_float32_matmul_precision()
        except RuntimeError:  # the two flags disagree: the user set the new one alone
            legacy = None
        self._before = precision, legacy
        if legacy is None:
            _set_fp32_precision("cuda", "matmul", "tf32" if self._allow else "ieee")
        else:  # sets both flags, so that they still agree
            torch.set_float32_matmul_precision("high" if self._allow else "highest")

    def __exit__(self, *exception: object) -> None:
        if self._before is None:
            return
        precision, legacy = self._before
        self._before = None
        try:
            if legacy is not None:
                torch.set_float32_matmul_precision(legacy)
            _set_fp32_precision("cuda", "matmul", precision)
        finally:
            _precision_lock.release()


def products(dtype: torch.dtype, *, tf32: bool) -> contextlib.AbstractContextManager[None]:
    """PyTorch's matrix products in the precision of a plan; only float32 has a choice."""
    return matmul_tf32(tf32) if dtype == torch.float32 else _as_they_are


_as_they_are = contextlib.nullcontext()


# ---------------------------------------------------------------------------------------
# cuDNN
# ---------------------------------------------------------------------------------------

_CUDNN_GRU = 3  # cuDNN's mode number


class CudnnGRU(NamedTuple):
    output: Tensor
    h_n: Tensor
    reserve: Tensor


def cudnn_runs(tensor: Tensor) -> bool:
    """Whether `torch.gru` uses cuDNN for tensors like this one (torch's own `is_acceptable` does not know bfloat16)."""
    return (
        tensor.is_cuda
        and tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        and cudnn_enabled()
        and _built_with_cudnn()
    )


#: What `torch.backends.cudnn.enabled` reads; asking that takes eight times as long.
cudnn_enabled = torch._C._get_cudnn_enabled

_built_with_cudnn = functools.cache(torch.backends.cudnn.is_available)


@functools.lru_cache(maxsize=256)
def _cudnn_weight_layout(
    input_size: int, hidden: int, layers: int, bidirectional: bool, has_biases: bool, dtype: torch.dtype, device: torch.device
) -> tuple[tuple[int, ...], int]:
    """Order of the parameters in cuDNN's one buffer of weights, and its elements; asked of cuDNN itself.

    The parameters come first, without gaps.  Without biases the buffer still has places for them, which are zero.
    """
    directions = 2 if bidirectional else 1
    features = [input_size] + [directions * hidden] * (layers - 1)
    shapes = [
        shape
        for f in features
        for _ in range(directions)
        for shape in ((3 * hidden, f), (3 * hidden, hidden), *(((3 * hidden,),) * 2 if has_biases else ()))
    ]
    params = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
    torch._cudnn_rnn_flatten_weight(
        params, 4 if has_biases else 2, input_size, _CUDNN_GRU, hidden, 0, layers, False, bidirectional
    )
    order = tuple(sorted(range(len(params)), key=lambda i: params[i].data_ptr()))
    end = params[order[0]].untyped_storage().data_ptr()
    for i in order:
        assert params[i].data_ptr() == end, "cuDNN's weight buffer has gaps"
        end += params[i].numel() * params[i].element_size()
    return order, params[0].untyped_storage().nbytes() // params[0].element_size()


def _cudnn_weight_buffer(
    x: Tensor, hx: Tensor, params: list[Tensor], has_biases: bool, layers: int, bidirectional: bool
) -> Tensor:
    """All weights in cuDNN's buffer: the module's own where `flatten_parameters` made them one, otherwise a copy."""
    order, total = _cudnn_weight_layout(x.shape[-1], hx.shape[2], layers, bidirectional, has_biases, x.dtype, x.device)
    first = params[order[0]]
    storage = first.untyped_storage()
    end = first.data_ptr()
    flat = storage.data_ptr() == end and storage.nbytes() == total * first.element_size()
    for i in order:
        flat = flat and params[i].data_ptr() == end and params[i].is_contiguous()
        end += params[i].numel() * params[i].element_size()
    if flat:
        return first.as_strided((total,), (1,))
    pieces = [params[i].reshape(-1) for i in order]
    missing = total - sum(p.numel() for p in pieces)
    return torch.cat([*pieces, first.new_zeros(missing)])


def cudnn_gru_forward(
    x: Tensor, hx: Tensor, params: list[Tensor], has_biases: bool, layers: int, bidirectional: bool, step_sizes: list[int]
) -> CudnnGRU:
    """cuDNN's training forward: x [T, B, I], hx [L*D, B, H]; with `step_sizes`, the rows of each step, x is packed [N, I]."""
    buffer = _cudnn_weight_buffer(x, hx, params, has_biases, layers, bidirectional)
    output, h_n, _, reserve, _ = torch._cudnn_rnn(
        x.contiguous(), params, 4 if has_biases else 2, buffer, hx.contiguous(), None, _CUDNN_GRU, hx.shape[2], 0, layers,
        False, 0.0, True, bidirectional, step_sizes, None,
    )  # fmt: skip
    return CudnnGRU(output, h_n, reserve)


def cudnn_gru_backward(
    grad_output: Tensor | None, grad_h_n: Tensor | None, x: Tensor, hx: Tensor, params: list[Tensor], has_biases: bool,
    layers: int, bidirectional: bool, step_sizes: list[int], output: Tensor, reserve: Tensor, *, need_weights: bool,
) -> tuple[Tensor, Tensor, list[Tensor] | None]:  # fmt: skip
    """Gradients of x, hx and params; writes into `reserve`.  Those of params are views of one buffer."""
    buffer = _cudnn_weight_buffer(x, hx, params, has_biases, layers, bidirectional)
    d_x, d_hx, _, d_params = torch.ops.aten._cudnn_rnn_backward(
        x.contiguous(), params, 4 if has_biases else 2, buffer, hx.contiguous(), None, output.contiguous(),
        torch.zeros_like(output) if grad_output is None else grad_output.contiguous(),
        None if grad_h_n is None else grad_h_n.contiguous(), None, _CUDNN_GRU, hx.shape[2], 0, layers, False, 0.0, True,
        bidirectional, step_sizes, None, reserve, [True, True, False, need_weights],
    )  # fmt: skip
    return d_x, d_hx, d_params if need_weights else None


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies, made by one launch: outputs of an op must not share memory."""
    own = [torch.empty_like(t) for t in tensors]
    torch._foreach_copy_(own, list(tensors))
    return own


def graph_is_freed() -> bool:
    """Whether the backward that runs in this thread frees what was saved for it."""
    return torch._C._current_graph_task_id() != -1 and not torch._C._autograd._get_current_graph_task_keep_graph()


# ---------------------------------------------------------------------------------------
# CUDA
# ---------------------------------------------------------------------------------------


def like(tensors: Sequence[Tensor]) -> Callable[..., bool]:
    """A function of as many tensors: whether each is like the one of `tensors` in its place.

    That is: type, dtype, device, shape, strides, `requires_grad`, and the dispatch keys of the tensor together with those of
    the thread: autocast and inference mode show there, dispatch modes do not (`nothing_intercepts`).

    These are Dynamo's guards: 0.1 us a tensor, a fifth of what asking in Python takes.  No tensor is kept.
    """
    guards = torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
    return guards.check


#: ``empty_strided_cuda(size, stride, dtype)`` on the current device, for which compiled code calls it: `torch.empty_strided`
#: without the dispatcher takes half the time.
empty_strided_cuda = torch._C._dynamo.guards._empty_strided_cuda


def after_synchronize(callback: Callable[[], None]) -> None:
    """From now on `torch.cuda.synchronize` ends by calling `callback`, which may raise; other callbacks stay."""
    _after_synchronize.append(callback)
    if len(_after_synchronize) > 1:
        return
    original = torch.cuda.synchronize

    @functools.wraps(original)
    def synchronize(device: Any = None) -> None:
        original(device)
        if not torch.compiler.is_compiling():
            for function in _after_synchronize:
                function()

    torch.cuda.synchronize = synchronize


_after_synchronize: list[Callable[[], None]] = []


class StorageTable:
    """Values attached to the storages of tensors, for as long as these live."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[Any, Any]] = {}  # by address of the storage: weak reference, value
        self._purge_at = 64

    def put(self, tensor: Tensor, value: Any) -> None:
        # The weak reference keeps the address from being used again.
        storage = tensor.untyped_storage()
        if len(self._entries) >= self._purge_at:
            self._entries = {key: entry for key, entry in self._entries.items() if not entry[0].expired()}
            self._purge_at = max(64, 2 * len(self._entries))
        self._entries[storage._cdata] = StorageWeakRef(storage), value

    def get(self, tensor: Tensor) -> Any | None:
        entry = self._entries.get(tensor.untyped_storage()._cdata)
        return None if entry is None or entry[0].expired() else entry[1]


# ---------------------------------------------------------------------------------------
# Dynamo: let nn.GRU through, and find the shapes of torch.gru without running it
# ---------------------------------------------------------------------------------------


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
        # A loop calls its module once a step, and Dynamo follows nn.Module.__call__ and forward each time, which takes more
        # than half of its time.  What they look at makes the same guards every time, so one time is enough.
        try:
            from torch._dynamo.utils import unpatched_nn_module_call, unpatched_nn_module_call_impl
            from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable, record_nn_module_stack
        except ImportError:  # a torch that calls them something else: every call is followed
            return
        unpatched = unpatched_nn_module_call, unpatched_nn_module_call_impl
        original = UnspecializedNNModuleVariable.call_function

        @functools.wraps(original)
        def call_function(variable: Any, tx: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
            module, source = variable.value, variable.source
            if type(module) not in _FORWARD or source is None or not self._wanted(tx):
                return original(variable, tx, args, kwargs)
            # By the graph that has seen a call, and the module.
            calls: dict[tuple[Any, int], _Call] = vars(tx.output).setdefault("torch_gru_fuse_calls", {})
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
        self._undo.append(lambda: setattr(UnspecializedNNModuleVariable, "call_function", original))

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


# ---------------------------------------------------------------------------------------
# Inductor: rewrite a graph where compile_fx receives it
# ---------------------------------------------------------------------------------------


class InductorHook:
    """Runs `rewrite` on every graph that Inductor's `compile_fx` receives, before AOTAutograd.

    Standing before `compile_fx` and not in `config.pre_grad_custom_pass`, it neither takes the
    place of a user's own pass nor loses its own to ``torch.compile(options=...)``, and
    Inductor's and AOTAutograd's caches look up the rewritten graph.

    Args:
        rewrite: changes a GraphModule in place, subgraphs included; returns the number of
            replaced nodes.
        cache_tag: becomes part of the cache keys of rewritten graphs, so that an entry made by
            another version of this package is never used.
        options: called with a graph after that; what Inductor's configuration has to be for it.
    """

    def __init__(
        self,
        rewrite: Callable[[torch.fx.GraphModule], int],
        cache_tag: Callable[[], str],
        options: Callable[[torch.fx.GraphModule], dict[str, Any]] = lambda gm: {},
    ):
        self._rewrite = rewrite
        self._cache_tag = cache_tag
        self._options = options
        self._original: Callable[..., Any] | None = None

    @property
    def installed(self) -> bool:
        return self._original is not None

    def install(self) -> None:
        if self.installed:
            return
        from torch._inductor import compile_fx as module

        original = module.compile_fx

        @functools.wraps(original)
        def compile_fx(model_: Any, example_inputs_: Any, *args: Any, **kwargs: Any) -> Any:
            return self._compile(original, model_, example_inputs_, args, kwargs)

        module.compile_fx = compile_fx
        self._original = original

    def remove(self) -> None:
        if not self.installed:
            return
        from torch._inductor import compile_fx as module

        module.compile_fx = self._original
        self._original = None

    def compile(self, gm: torch.fx.GraphModule, inputs: Sequence[Any], config_patches: dict[str, Any]) -> Any:
        """Rewrite and compile one graph, installed or not."""
        from torch._inductor import compile_fx as module

        original = self._original or module.compile_fx
        return self._compile(original, gm, inputs, (), {"config_patches": config_patches or None})

    def _compile(
        self, original: Callable[..., Any], gm: Any, inputs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not isinstance(gm, torch.fx.GraphModule):
            return original(gm, inputs, *args, **kwargs)
        count, options = self._rewrite(gm), self._options(gm)
        if not count and not options:
            return original(gm, inputs, *args, **kwargs)
        from torch._inductor import config as inductor_config
        from torch._inductor.compile_fx import compile_fx_inner

        config = torch.compiler.config
        tag = f"{config.cache_key_tag}{self._cache_tag()}"
        inner = args[0] if args else kwargs.pop("inner_compile", compile_fx_inner)

        # The backward graph is compiled after this function has returned, hence the second patch.
        @functools.wraps(inner)
        def inner_compile(*inner_args: Any, **inner_kwargs: Any) -> Any:
            with config.patch(cache_key_tag=tag), inductor_config.patch(options):
                return inner(*inner_args, **inner_kwargs)

        with config.patch(cache_key_tag=tag), inductor_config.patch(options):
            return original(gm, inputs, inner_compile, *args[1:], **kwargs)


def inductor_mode_options(mode: str | None, dynamic: bool | None = None) -> dict[str, Any]:
    """What ``torch.compile(mode=...)`` means for Inductor."""
    if mode is None or mode == "default":
        return {}
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode, dynamic))


def child_graphs(gm: torch.fx.GraphModule) -> list[torch.fx.GraphModule]:
    """The graph modules below `gm`: bodies of checkpoint, cond, scan and the like."""
    return [m for name, m in gm.named_modules() if name and isinstance(m, torch.fx.GraphModule)]


# ---------------------------------------------------------------------------------------
# Graphs: symbolic sizes, the memory behind fake tensors
# ---------------------------------------------------------------------------------------


def known_equal(left: Any, right: Any) -> bool:
    """Whether two sizes of a graph are known to be equal; a symbolic one gets no guard by being asked."""
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(left == right))


def depends_on_data(size: Any) -> bool:
    """Whether a size of a graph is known only when the graph runs."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    return not isinstance(size, int) and bool(free_unbacked_symbols(size))


def storage_key(tensor: Tensor) -> int:
    """A number that two tensors share exactly while they share memory; fake tensors too, and those of `torch.func`.

    All tensors without one memory, as sparse ones, share 0.
    """
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    try:
        return tensor.untyped_storage()._cdata
    except NotImplementedError:
        return 0


def is_overload(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload)


def written_arguments(overload: Any) -> list[tuple[int, str]]:
    """Position and name of the arguments that an op changes in place."""
    arguments = enumerate(overload._schema.arguments)
    return [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def changes_nothing(target: Any) -> bool:
    """Whether a function in a graph of Dynamo is there only for PyTorch's own statistics."""
    return target is torch._C._log_api_usage_once


# ---------------------------------------------------------------------------------------
# Pattern matcher
# ---------------------------------------------------------------------------------------


def call_pattern_pass(
    name: str,
    targets: Sequence[Callable[..., Any]],
    check: Callable[[torch.fx.Node], bool],
    handler: Callable[[torch.fx.Graph, torch.fx.Node], None],
) -> Callable[[torch.fx.Graph], int]:
    """A pattern-matcher pass that hands every call of one of `targets` to `handler`.

    `check` sees the node first and may refuse it.  `handler` replaces the uses of the node; the
    matcher then erases it.  Returns a function from a graph to the number of matches.
    """
    from torch._inductor.pattern_matcher import (
        CallFunctionVarArgs,
        Match,
        PatternMatcherPass,
        register_graph_pattern,
    )

    pass_ = PatternMatcherPass(pass_name=name)

    @register_graph_pattern(
        CallFunctionVarArgs(list(targets)),
        extra_check=lambda match: check(match.output_node()),
        pass_dict=pass_,
    )
    def replace(match: Match, *args: Any, **kwargs: Any) -> None:
        node = match.output_node()
        handler(match.graph, node)
        match.erase_nodes()

    return pass_.apply


# ---------------------------------------------------------------------------------------
# Cache keys
# ---------------------------------------------------------------------------------------


@functools.cache
def source_hash(folder: Path) -> str:
    """A hash of every Python source below `folder`: what this version of the package does."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
