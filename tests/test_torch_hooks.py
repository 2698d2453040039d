"""What each hook into torch is expected to do; where a torch release breaks one, this says which."""

import contextlib
import gc
import weakref

import pytest
import torch
import torch._decomp.decompositions  # registers the kernels that the shape rule stands before
from torch import nn

from torch_gru_fuse import torch_hooks

pytestmark = pytest.mark.versions


def no_hook_of_ours():
    from torch._dynamo.variables.builder import VariableBuilder
    from torch._dynamo.variables.functions import SkipFunctionVariable, UserFunctionVariable, UserMethodVariable
    from torch._inductor import compile_fx

    keys = (torch._C.DispatchKey.Autograd, torch._C.DispatchKey.CompositeImplicitAutograd)
    kernels = [op.py_kernels for op in (torch.ops.aten.gru.input, torch.ops.aten.gru.data)]
    callables = (SkipFunctionVariable, UserFunctionVariable, UserMethodVariable)
    return (
        VariableBuilder.wrap_module, compile_fx.compile_fx, *(kind.call_function for kind in callables),
        *(of_op[key] for of_op in kernels for key in keys),
    )  # fmt: skip


def test_install_and_remove_leave_no_trace():
    before = no_hook_of_ours()
    rules = [lambda *args: None] * 2
    dynamo = torch_hooks.DynamoHook(lambda backend: True, *rules, {nn.GRU.forward: lambda *args: None})
    inductor = torch_hooks.InductorHook(lambda gm: 0, lambda: "tag")
    for hook in (dynamo, inductor):
        hook.install()
        hook.install()
        assert hook.installed
    assert all(a is not b for a, b in zip(no_hook_of_ours(), before, strict=True))
    for hook in (dynamo, inductor):
        hook.remove()
        hook.remove()
        assert not hook.installed
    assert no_hook_of_ours() == before


def test_dynamo_is_asked_about_every_backend_and_only_for_gru():
    asked = []

    def wants(backend):
        asked.append(backend)
        return False

    def backend(gm, inputs):
        return gm.forward

    hook = torch_hooks.DynamoHook(wants, lambda *args: None)
    hook.install()
    try:
        for module in (nn.LSTM(3, 4), nn.RNN(3, 4), nn.Linear(3, 4)):
            torch.compile(module, backend=backend)(torch.randn(2, 5, 3))
        assert asked == []
        torch._dynamo.reset()  # a frame that could not be traced is not tried again
        torch.compile(nn.GRU(3, 4), backend=backend)(torch.randn(2, 5, 3))
        assert asked and all(getattr(b, "compiler_fn", b) is backend for b in asked)
        assert not torch._dynamo.config.allow_rnn
    finally:
        hook.remove()


def test_shape_rule_is_used_by_dynamo_and_never_while_a_graph_is_recorded():
    calls = []

    def rule(input, hx, *rest):
        calls.append(type(input).__name__)
        return input.new_empty(*input.shape[:2], hx.shape[2]), torch.empty_like(hx)

    graphs = []

    def backend(gm, inputs):
        graphs.append(gm)
        return gm.forward

    rnn, x = nn.GRU(3, 4), torch.randn(5, 2, 3)
    hook = torch_hooks.DynamoHook(lambda backend: backend is not None, rule)
    hook.install()
    try:
        result = torch.compile(rnn, backend=backend, fullgraph=True)(x)
        assert calls and set(calls) == {"FakeTensor"}
        torch.testing.assert_close(result, rnn(x))
        del calls[:]
        make_fx = torch.fx.experimental.proxy_tensor.make_fx
        recorded = make_fx(lambda x: rnn(x)[0], tracing_mode="fake", _allow_non_fake_inputs=True)(x)
        rnn(x)
        assert calls == []
        torch.testing.assert_close(recorded(x), rnn(x)[0])  # unrolled, and right
    finally:
        hook.remove()


def test_parameters_are_not_flattened_in_a_graph(monkeypatch):
    """nn.GRU's forward wants to where they are other objects than they were; on CUDA Dynamo cannot trace that."""

    def untraceable(self):
        torch._dynamo.graph_break()

    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", untraceable)
    x, h = torch.randn(5, 2, 3), torch.zeros(1, 2, 4)
    wanted = [True]
    hook = torch_hooks.DynamoHook(
        lambda backend: wanted[0], lambda x, h, *rest: (x.new_empty(*x.shape[:2], h.shape[2]), torch.empty_like(h))
    )
    hook.install()
    try:
        rnn = nn.GRU(3, 4)
        for name, parameter in list(rnn.named_parameters()):
            setattr(rnn, name, nn.Parameter(parameter.detach() * 2))  # not the ones whose addresses it keeps
        compiled = torch.compile(rnn.forward, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, h), torch.gru(x, h, list(rnn.parameters()), True, 1, 0.0, True, False, False))
        wanted[0] = False
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(rnn.forward, backend="eager", fullgraph=True)(x, h)
    finally:
        hook.remove()


def shapes(x, h, *rest):
    return x.new_empty(*x.shape[:2], h.shape[2]), torch.empty_like(h)


def test_parameters_that_were_replaced_may_go_before_the_guards_are_made():
    """nn.GRU keeps weak references to them; a guard on one that has gone is an error of Dynamo's."""
    rnn, x, h = nn.GRU(3, 4), torch.randn(5, 2, 3), torch.zeros(1, 2, 4)
    replaced = dict(rnn.named_parameters())
    references = [weakref.ref(p) for p in replaced.values()]
    for name in replaced:
        setattr(rnn, name, nn.Parameter(replaced[name].detach() * 2))

    def backend(gm, inputs):
        replaced.clear()
        gc.collect()
        return gm.forward

    hook = torch_hooks.DynamoHook(lambda backend: True, shapes)
    hook.install()
    try:
        actual = torch.compile(rnn.forward, backend=backend, fullgraph=True)(x, h)
        assert all(reference() is None for reference in references)
        torch.testing.assert_close(actual, torch.gru(x, h, list(rnn.parameters()), True, 1, 0.0, True, False, False))
    finally:
        hook.remove()


def test_parameters_that_are_replaced_behind_the_modules_back_are_used():
    rnn, x, h = nn.GRU(3, 4), torch.randn(5, 2, 3), torch.zeros(1, 2, 4)
    hook = torch_hooks.DynamoHook(lambda backend: True, shapes)
    hook.install()
    try:
        compiled = torch.compile(rnn.forward, backend="eager", fullgraph=True)
        for factor in (1, 2, 3):
            for name, parameter in list(rnn.named_parameters()):
                rnn._parameters[name] = nn.Parameter(parameter.detach() * factor)  # the list is not told
            expected = torch.gru(x, h, list(rnn.parameters()), True, 1, 0.0, True, False, False)
            torch.testing.assert_close(compiled(x, h), expected)
            torch.testing.assert_close(rnn(x, h), expected)  # nor is eager code misled by what was compiled
        before = list(rnn.parameters())
        others = {name: p.detach() + 1 for name, p in rnn.named_parameters()}
        called = torch.compile(lambda: torch.func.functional_call(rnn, others, (x, h)), backend="eager", fullgraph=True)()
        torch.testing.assert_close(called, torch.gru(x, h, list(others.values()), True, 1, 0.0, True, False, False))
        expected = torch.gru(x, h, before, True, 1, 0.0, True, False, False)
        torch.testing.assert_close(rnn(x, h), expected)
        torch.testing.assert_close(compiled(x, h), expected)
    finally:
        hook.remove()


def wraps(x, k, *, batch=None):
    """Stands in for `torch.nn.utils.rnn.pack_padded_sequence`."""
    return nn.utils.rnn.PackedSequence(x * k, torch.tensor([2])), x.size(0)


def adds(packed, *, batch=None):
    """Stands in for `torch.nn.utils.rnn.pad_packed_sequence`."""
    return packed.data + batch, batch


def test_functions_of_packed_sequences_are_traced_as_others_that_know_the_batch():
    asked = []
    rnn = nn.utils.rnn
    hook = torch_hooks.DynamoHook(
        lambda backend: asked.append(backend) or len(asked) < 3, lambda *args: None, None,
        {rnn.pack_padded_sequence: wraps, rnn.pad_packed_sequence: adds},
    )  # fmt: skip

    def function(x, lengths):
        return rnn.pad_packed_sequence(rnn.pack_padded_sequence(x, lengths))

    hook.install()
    try:
        x, k = torch.ones(3, 2), torch.tensor([3, 1])
        torch.testing.assert_close(torch.compile(function, backend="eager", fullgraph=True)(x, 2), 2 * x + 3)
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported):  # not wanted
            torch.compile(function, backend="eager", fullgraph=True)(x, k)
    finally:
        hook.remove()


def test_cell_shape_rule_is_used_by_dynamo_for_wanted_backends_alone():
    calls = []
    before = dict(torch.ops.aten.gru_cell.default.py_kernels)

    def rule(input, hx, *weights):
        calls.append(type(input).__name__)
        return torch.empty_like(hx)

    def backend(gm, inputs):
        return gm.forward

    cell, x, h = nn.GRUCell(3, 4), torch.randn(2, 3), torch.randn(2, 4)
    for wanted in (True, False):
        torch._dynamo.reset()
        hook = torch_hooks.DynamoHook(lambda backend, wanted=wanted: wanted, lambda *args: None, cell_shape_rule=rule)
        hook.install()
        try:
            torch.testing.assert_close(torch.compile(cell, backend=backend, fullgraph=True)(x, h), cell(x, h))
            assert set(calls) == ({"FakeTensor"} if wanted else set())
            del calls[:]
            make_fx = torch.fx.experimental.proxy_tensor.make_fx
            recorded = make_fx(cell, tracing_mode="fake", _allow_non_fake_inputs=True)(x, h)
            torch.testing.assert_close(recorded(x, h), cell(x, h))
            assert calls == []
        finally:
            hook.remove()
    assert torch.ops.aten.gru_cell.default.py_kernels == before


def test_backends_are_recognised():
    seen = []
    hook = torch_hooks.DynamoHook(lambda backend: seen.append(backend) or False, lambda *args: None)
    hook.install()
    try:
        named = [{"backend": name} for name in ("eager", "aot_eager")]
        for options in ({}, {"backend": "inductor"}, {"mode": "reduce-overhead"}, *named):
            torch._dynamo.reset()
            with contextlib.suppress(torch._dynamo.exc.Unsupported):
                torch.compile(nn.GRU(3, 4), fullgraph=True, **options)(torch.randn(2, 5, 3))
    finally:
        hook.remove()
    assert [torch_hooks.is_inductor(b) for b in seen] == [True, True, True, False, False]


def test_no_backend_is_in_progress_outside_of_a_trace():
    assert torch_hooks.dynamo_backend_in_progress() is None


@pytest.mark.parametrize("how", ["legacy", "new"])
def test_precision_flags_are_read(how):
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert not torch_hooks.rnn_allows_tf32()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        assert torch_hooks.rnn_allows_tf32()
    try:
        for allowed in (True, False):
            if how == "legacy":
                torch.set_float32_matmul_precision("high" if allowed else "highest")
            else:
                torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
            assert torch_hooks.matmul_allows_tf32() == allowed
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("state", ["untouched", "legacy high", "legacy medium", "new tf32", "new ieee"])
def test_matmul_precision_is_restored(state):
    def flags():
        try:
            legacy = torch.get_float32_matmul_precision()
        except RuntimeError:  # the new flag alone was set: torch refuses to name the old one
            legacy = "mixed"
        return torch.backends.cuda.matmul.fp32_precision, legacy

    try:
        if state.startswith("legacy"):
            torch.set_float32_matmul_precision(state.split()[1])
        elif state.startswith("new"):
            torch.backends.cuda.matmul.fp32_precision = state.split()[1]
        before = flags()
        for allow in (True, False):
            with pytest.raises(ZeroDivisionError), torch_hooks.matmul_tf32(allow):
                assert torch_hooks.matmul_allows_tf32() == allow
                raise ZeroDivisionError
            assert flags() == before
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")


def test_source_hash_changes_with_the_sources(tmp_path):
    def package(name, content):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "module.py").write_text(content)
        return torch_hooks.source_hash(folder)

    assert package("a", "x = 1") == package("b", "x = 1") != package("c", "x = 2")


def test_what_stands_between_a_call_and_its_device():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    seen = []

    def look(x):
        seen.append(torch_hooks.nothing_intercepts())
        return x + 1

    x = torch.ones(3)
    look(x)
    with FakeTensorMode():
        look(torch.ones(3))
    torch.vmap(look)(x)
    torch.func.grad(lambda t: look(t).sum())(x)
    torch.func.jvp(look, (x,), (x,))
    make_fx(look)(x)
    torch.jit.trace(look, x, check_trace=False)
    look(x)
    assert seen == [True, *[False] * 6, True]


def test_storage_table():
    table = torch_hooks.StorageTable()
    tensor = torch.ones(4)
    table.put(tensor, "a")
    assert table.get(tensor) == table.get(tensor.view(2, 2)) == table.get(tensor.detach()) == "a"
    assert table.get(tensor.clone()) is None
    table.put(tensor, "b")
    assert table.get(tensor) == "b"


@pytest.mark.parametrize("allow", [True, False])
@pytest.mark.parametrize("legacy", ["highest", "high", None], ids=str)
def test_precision_of_products_is_restored(allow, legacy):
    def state():
        try:
            old = torch.get_float32_matmul_precision()
        except RuntimeError:
            old = None
        return torch.backends.cuda.matmul.fp32_precision, old

    before = state()
    try:
        if legacy is None:
            torch.backends.cuda.matmul.fp32_precision = "tf32"  # alone: the two interfaces disagree
        else:
            torch.set_float32_matmul_precision(legacy)
        set_ = state()
        with contextlib.suppress(KeyError), torch_hooks.matmul_tf32(allow):
            assert torch_hooks.matmul_allows_tf32() == allow
            with torch_hooks.matmul_tf32(allow):
                assert torch_hooks.matmul_allows_tf32() == allow
            raise KeyError
        assert state() == set_
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = before[0]


def test_the_backend_is_found_behind_ddps_splitting_of_graphs():
    from torch._dynamo.backends.distributed import DDPOptimizer

    inductor = torch._TorchCompileInductorWrapper("default", None, None)
    splitting = DDPOptimizer(bucket_bytes_cap=25 * 2**20, backend_compile_fn=inductor).compile_fn
    assert torch_hooks.innermost_backend(splitting) is inductor


def test_tensors_that_share_memory():
    x, y = torch.ones(3), torch.ones(3)
    key = torch_hooks.storage_key
    assert key(x) == key(x[1:]) != key(y)
    assert key(torch.eye(2).to_sparse()) == key(torch.ones(2, 2).to_sparse()) != key(x)  # none is told from another
    seen = []

    def function(x):
        seen.extend((key(x), key(x[1:]), key(x * 2)))
        return x.sum()

    torch.func.grad(function)(x)
    assert seen[0] == seen[1] == key(x) != seen[2]
    torch.vmap(lambda x: seen.append(key(x)) or x)(y)
    assert seen[-1] == key(y)
