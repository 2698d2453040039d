"""Every place where this package touches an interface of torch that is not public.

Nothing outside this package imports a name with a leading underscore from torch or
changes an attribute of one of its modules.  When a torch release moves something,
this is the place to mend; `tests/test_torch_hooks.py` says what each hook is expected to do.

`dynamo` and `inductor` have what these two compilers take, this module all else.
Importing it imports torch and nothing of Dynamo or Inductor; the functions that
need those import them when they are called.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from torch_gru_fuse.torch_hooks.dynamo import (  # noqa: F401  (callers know this package alone)
    DynamoHook,
    dynamo_backend_in_progress,
    inductor_runs_pre_grad_passes,
    innermost_backend,
    is_inductor,
    without_recompile_limit,
)
from torch_gru_fuse.torch_hooks.inductor import InductorHook, child_graphs, inductor_mode_options  # noqa: F401

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


#: Whether a tensor is one of `torch.func`, at the level of a transform: gradients, tangents or samples of others.
is_transformed = torch._C._functorch.is_functorch_wrapped_tensor


def storage_key(tensor: Tensor) -> int:
    """A number that two tensors share exactly while they share memory; fake tensors too, and those of `torch.func`.

    All tensors without one memory, as sparse ones, share 0.
    """
    while is_transformed(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
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
