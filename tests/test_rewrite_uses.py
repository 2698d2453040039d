"""All the ways to use nn.GRU in a model: each is rewritten, or stays correct where PyTorch cuts the graph.

Dynamo's graphs are rewritten and run by PyTorch, in float64; `check` compares results, strides and gradients with eager PyTorch
and counts the calls.  What is here is in no other test_rewrite*.py.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from problems import assert_same, tensors
from rollup import check, compiled_graph, value_and_grads, x_of
from torch import nn
from torch.func import functional_call, stack_module_state
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import torch_gru_fuse
from torch_gru_fuse.passes.rewrite import rewrite
from torch_gru_fuse.switch import keep_dynamo_hook

pytestmark = pytest.mark.usefixtures("cells_on_cpu")

T, B, I, H = 4, 3, 5, 6


class Wrapped(nn.Module):
    """A GRU, and what `forward` does with it."""

    def __init__(self, forward, rnn=None, **options):
        super().__init__()
        self.rnn = rnn or nn.GRU(I, H, **options)
        self._forward = forward

    def forward(self, *args):
        return self._forward(self.rnn, *args)


def plain(rnn, x):
    return rnn(x)


class Graphs:
    """A backend for functions of several graphs: rewrites each and counts the calls of the ops in it."""

    rewrites_gru = True

    def __init__(self):
        self.graphs, self.calls = 0, 0

    def __call__(self, gm, inputs):
        self.graphs += 1
        self.calls += rewrite(gm)
        return gm.forward


def check_parts(model, *args, graphs, calls):
    """As `check`, for models of several graphs."""
    model = model.double()
    inputs = [*model.parameters(), *(a for a in args if isinstance(a, torch.Tensor) and a.requires_grad)]
    expected = value_and_grads(model, args, inputs)
    keep_dynamo_hook()
    backend = Graphs()
    assert_same(value_and_grads(torch.compile(model, backend=backend), args, inputs), expected, 1e-12)
    assert (backend.graphs, backend.calls) == (graphs, calls)


# ---- inputs ------------------------------------------------------------------------------------------------------------------

VIEWS = {
    "transposed": lambda rnn, x: rnn(x.transpose(0, 1)),
    "permuted": lambda rnn, x: rnn(x.permute(1, 0, 2)),
    "every second": lambda rnn, x: rnn(x[::2]),
    "columns of the batch": lambda rnn, x: rnn(x[:, 1:]),
    "features first": lambda rnn, x: rnn(x.permute(2, 0, 1).contiguous().permute(1, 2, 0)),
    "expanded": lambda rnn, x: rnn(x[:1].expand(T, -1, -1)),
    "reversed": lambda rnn, x: rnn(x.flip(0)),
    "state of another layout": lambda rnn, x: rnn(x, x.new_ones(x.shape[1], H).cumsum(0).t().contiguous().t()[None]),
    "unbatched view": lambda rnn, x: rnn(x[:, 1]),
    "state expanded": lambda rnn, x: rnn(x, x.new_ones(1, 1, H).expand(1, x.shape[1], H)),
}


@pytest.mark.parametrize("view", VIEWS)
def test_input_is_a_view(view):
    check(Wrapped(VIEWS[view]), x_of(T, B, I), gru=1)


@pytest.mark.parametrize("options", [{"num_layers": 2, "bidirectional": True}, {"bias": False}, {"batch_first": True}], ids=str)
def test_unbatched_input_with_and_without_a_state(options):
    check(Wrapped(plain, **options), x_of(T, I), gru=1)
    states = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    check(Wrapped(lambda rnn, x, h: rnn(x, h), **options), x_of(T, I), x_of(states, H), gru=1)


def first_step(y, h):
    y[0] = 0


def whole_output(y, h):
    y.relu_()


def view_of_the_output(y, h):
    y.transpose(0, 1)[1].mul_(2)


def inplace_argument(y, h):
    F.leaky_relu(y, 0.1, inplace=True)


def state(y, h):
    h.mul_(2)


CHANGES = [first_step, whole_output, view_of_the_output, inplace_argument, state]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_results_are_changed_in_place(change):
    """The op's backward reads its output, that of PyTorch's own GRU on a CPU does not: the pass copies it first."""
    def forward(rnn, x):
        y, h = rnn(x)
        change(y, h)
        return y, h

    graph = check(Wrapped(forward), x_of(T, B, I), gru=1)
    assert graph.calls["aten.clone.default"] == (change is not state)


def test_results_of_a_packed_sequence_are_changed_in_place():
    def forward(rnn, x):
        packed, h = rnn(pack_padded_sequence(x, torch.tensor([4, 2, 1])))
        packed.data.relu_()
        return pad_packed_sequence(packed)[0], h

    check(Wrapped(forward), x_of(T, B, I))
    assert [r.target for r in torch_gru_fuse.rewrites()] == ["gru_packed"]


def test_input_is_changed_after_the_call():
    def forward(rnn, x):
        x = x.clone()
        y, _ = rnn(x)
        return y, x.mul_(2)

    model, x = Wrapped(forward).double(), x_of(T, B, I)
    compiled, graph = compiled_graph(model, x)
    assert graph.gru == 1
    with torch.no_grad():
        assert_same(tensors(compiled(x)), tensors(model(x)), 1e-12)


# ---- weights -----------------------------------------------------------------------------------------------------------------


class Halved(nn.Module):
    def forward(self, weight):
        return weight / 2


def spectral(rnn):
    # Power iteration moves a buffer in training mode, once in the eager call and once in the compiled one.
    return parametrizations.spectral_norm(rnn, "weight_hh_l0").eval()


def parametrized(rnn):
    for name in ("weight_ih_l0", "bias_hh_l0"):
        parametrize.register_parametrization(rnn, name, Halved())
    return rnn


def orthogonal(rnn):
    return parametrizations.orthogonal(rnn, "weight_hh_l0")


def frozen(rnn):
    rnn.weight_ih_l0.requires_grad_(False)
    return rnn


REPARAMETRIZED = [spectral, parametrized, orthogonal]


@pytest.mark.parametrize("change", REPARAMETRIZED, ids=lambda f: f.__name__)
def test_reparametrized_weights(change):
    check(Wrapped(plain, change(nn.GRU(I, H).double())), x_of(T, B, I), gru=1)


def test_weight_norm_of_the_old_kind():
    """`torch.nn.utils.weight_norm` makes the weight anew in a hook before the forward; PyTorch deprecates it."""
    with pytest.warns(FutureWarning, match="weight_norm"):
        rnn = nn.utils.weight_norm(nn.GRU(I, H).double(), "weight_hh_l0")
    check(Wrapped(plain, rnn), x_of(T, B, I), gru=1)


def test_pruned_weights():
    rnn = prune.random_unstructured(nn.GRU(I, H).double(), "weight_hh_l0", 0.5)
    check(Wrapped(plain, rnn), x_of(T, B, I), gru=1)


def test_frozen_weights():
    model, x = Wrapped(plain, frozen(nn.GRU(I, H))).double(), x_of(T, B, I)
    inputs = [p for p in model.parameters() if p.requires_grad] + [x]
    compiled, graph = compiled_graph(model, x)
    assert graph.gru == 1
    assert_same(value_and_grads(compiled, (x,), inputs), value_and_grads(model, (x,), inputs), 1e-12)


def test_functional_call_with_other_weights():
    rnn, x = nn.GRU(I, H, 2).double(), x_of(T, B, I)
    params = {name: torch.randn_like(p).requires_grad_() for name, p in rnn.named_parameters()}

    def call(x):
        return functional_call(rnn, params, (x,))

    compiled, graph = compiled_graph(call, x)
    assert graph.gru == 1
    inputs = [x, *params.values()]
    assert_same(value_and_grads(compiled, (x,), inputs), value_and_grads(call, (x,), inputs), 1e-12)


class Pair(nn.Module):
    def __init__(self, tie):
        super().__init__()
        self.first, self.second = nn.GRU(I, H), nn.GRU(I, H)
        tie(self)

    def forward(self, x):
        y, h = self.first(x)
        return self.second(x, h)[0] + y


def tie_modules(pair):
    pair.second = pair.first


def tie_parameters(pair):
    for name, parameter in pair.first.named_parameters():
        setattr(pair.second, name, parameter)


@pytest.mark.parametrize("tie", [tie_modules, tie_parameters], ids=lambda f: f.__name__)
def test_tied_weights(tie):
    check(Pair(tie), x_of(T, B, I), gru=1)  # the second goes on with the state of the first: one sequence, two chunks


def test_many_in_one_graph():
    class Parallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnns = nn.ModuleList(nn.GRU(I, H, bidirectional=i % 2 == 1) for i in range(5))
            self.top = nn.GRU(7 * H, 3)

        def forward(self, x):
            return self.top(torch.cat([rnn(x)[0] for rnn in self.rnns], -1))

    check(Parallel(), x_of(T, B, I), gru=6)


# ---- an ensemble -------------------------------------------------------------------------------------------------------------


class Ensemble:
    """Three GRUs with their weights stacked, mapped over by `torch.vmap`."""

    def __init__(self, forward):
        self.models = [nn.GRU(I, H, 2).double() for _ in range(3)]
        self.params, self.buffers = stack_module_state(self.models)
        self._base, self._forward = copy.deepcopy(self.models[0]), forward

    def __call__(self, x):
        def one(params, buffers):
            return self._forward(self._base, (params, buffers), x)

        return torch.vmap(one)(self.params, self.buffers)


def by_module(base, state, x):
    return functional_call(base, state, (x,))[0]


def by_name(base, state, x):
    params = [state[0][name] for name, _ in base.named_parameters()]
    h = x.new_zeros(2, x.shape[1], H)
    return torch.ops.torch_gru_fuse.gru(x, h, params, True, 2, 0.0, False, False, False)[0]


def test_ensemble_by_vmap():
    """torch.gru has no batching rule (before torch 2.15), so vmap over nn.GRU is PyTorch's own error, eager and compiled; the
    op called by name has one."""
    x = x_of(T, B, I)
    ensemble = Ensemble(by_module)
    keep_dynamo_hook()
    for function in (ensemble, torch.compile(ensemble.__call__, backend=Graphs(), fullgraph=True)):
        with pytest.raises(Exception, match="Batching rule not implemented for aten::gru"):
            function(x)
    named = Ensemble(by_name)
    compiled = torch.compile(named.__call__, backend=Graphs(), fullgraph=True)
    expected = torch.stack([m(x)[0] for m in named.models])
    assert_same([named(x), compiled(x)], [expected, expected], 1e-12)


# ---- modules -----------------------------------------------------------------------------------------------------------------


class Named(nn.GRU):
    """A subclass with nothing of its own."""


class Scaled(nn.GRU):
    def forward(self, input, hx=None):
        y, h = super().forward(2 * input, hx)
        return y + 1, h


class Functional(nn.GRU):
    """Calls the function itself."""

    def forward(self, input, hx=None):
        hx = input.new_zeros(self.num_layers, input.shape[1], self.hidden_size)
        return torch._VF.gru(input, hx, self._flat_weights, self.bias, self.num_layers, 0.0, False, False, False)


@pytest.mark.parametrize("kind", [Named, Scaled, Functional])
def test_subclass(kind):
    check(Wrapped(plain, kind(I, H)), x_of(T, B, I), gru=1)


class OwnCell(nn.GRUCell):
    def forward(self, input, hx):
        return super().forward(input, hx)


@pytest.mark.parametrize("kind", [nn.GRUCell, OwnCell])
def test_subclass_of_the_cell(kind):
    def forward(cell, x):
        h = x.new_zeros(B, H)
        for step in x:
            h = cell(step, h)
        return h

    check(Wrapped(forward, kind(I, H)), x_of(T, B, I), gru=1)


def forward_hook(rnn):
    rnn.register_forward_hook(lambda _, args, result: (result[0] * 2, result[1]))


def pre_hook(rnn):
    rnn.register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))


def keyword_pre_hook(rnn):
    rnn.register_forward_pre_hook(lambda _, args, kwargs: (args, {"hx": args[0].new_ones(1, B, H)}), with_kwargs=True)


@pytest.mark.parametrize("hook", [forward_hook, pre_hook, keyword_pre_hook], ids=lambda f: f.__name__)
def test_hooks(hook):
    rnn = nn.GRU(I, H)
    hook(rnn)
    check(Wrapped(plain, rnn), x_of(T, B, I), gru=1)


def test_flatten_parameters_in_the_forward():
    def forward(rnn, x):
        rnn.flatten_parameters()
        return rnn(x)

    check(Wrapped(forward), x_of(T, B, I), gru=1)


def test_deep_copy_and_sequential():
    class First(nn.Module):
        def forward(self, pair):
            return pair[0]

    check(nn.Sequential(copy.deepcopy(nn.GRU(I, H)), First(), nn.GRU(H, 4), First(), nn.Linear(4, 2)), x_of(T, B, I), gru=2)


# ---- higher-order operators --------------------------------------------------------------------------------------------------


def test_checkpoint_of_the_module():
    check(Wrapped(lambda rnn, x: checkpoint(rnn, x, use_reentrant=False)), x_of(T, B, I), gru=0)  # in the graph below
    [record] = torch_gru_fuse.rewrites()
    assert record.rewritten and record.target == "gru"


def test_checkpoint_of_the_older_kind():
    """`use_reentrant=True` works with `backward` alone, and Dynamo traces it as the other kind."""
    model, x = Wrapped(lambda rnn, x: checkpoint(rnn, x, use_reentrant=True)).double(), x_of(T, B, I)
    compiled, _ = compiled_graph(model, x)
    assert [r.rewritten for r in torch_gru_fuse.rewrites()] == [True]
    leaves, results = [x, *model.parameters()], []
    for function in (compiled, model):
        for leaf in leaves:
            leaf.grad = None
        y, h = function(x)
        (y.cumsum(0).sum() + h.sum()).backward()
        results.append([y.detach(), h.detach(), *(leaf.grad for leaf in leaves)])
    assert_same(*results, 1e-12)


def test_cell_in_a_scan():
    """A cell in `scan` stays a cell, in the body; its gradients are those of a loop."""
    from torch._higher_order_ops.scan import scan

    cell, x, h = nn.GRUCell(I, H).double(), x_of(T, B, I), x_of(B, H)

    def step(h, x):
        h = cell(x, h)
        return h, h.clone()

    def scanned(x, h):
        return scan(step, h, x)

    def loop(x, h):
        states = []
        for t in x:
            h = cell(t, h)
            states.append(h)
        return h, torch.stack(states)

    compiled, _ = compiled_graph(scanned, x, h)
    [record] = torch_gru_fuse.rewrites()
    assert record.rewritten and record.target == "gru_cell"
    with torch.no_grad():
        assert_same(tensors(compiled(x, h)), tensors(loop(x, h)), 1e-12)


def test_whole_gru_in_a_while_loop_stays_correct():
    from torch._higher_order_ops.while_loop import while_loop

    rnn, x = nn.GRU(I, I).double(), x_of(T, B, I)

    def thrice(x):
        def body(i, x):
            return i + 1, rnn(x)[0].clone()

        return while_loop(lambda i, x: i < 3, body, (torch.tensor(0), x))[1]

    compiled, _ = compiled_graph(thrice, x)
    assert [r.rewritten for r in torch_gru_fuse.rewrites()] == [True]
    with torch.no_grad():
        assert_same([compiled(x)], [rnn(rnn(rnn(x)[0])[0])[0]], 1e-12)


# ---- dtypes ------------------------------------------------------------------------------------------------------------------


def test_autocast_regions_inside_the_model():
    class Mixed(nn.Module):
        """Full precision, then bfloat16, then full precision within bfloat16."""

        def __init__(self):
            super().__init__()
            self.embed, self.out = nn.Linear(I, I), nn.Linear(H, 2)
            self.first, self.second, self.third = nn.GRU(I, I), nn.GRU(I, I), nn.GRU(I, H)

        def forward(self, x):
            y, _ = self.first(self.embed(x))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y, _ = self.second(self.embed(y))
                with torch.autocast("cpu", enabled=False):
                    y, _ = self.third(y.float())
            return self.out(y)

    model, x = Mixed(), torch.randn(T, B, I, requires_grad=True)
    compiled, graph = compiled_graph(model, x)
    assert graph.gru == 3
    inputs = [x, *model.parameters()]
    # one product and one GRU in bfloat16, 8 bits
    assert_same(value_and_grads(compiled, (x,), inputs), value_and_grads(model, (x,), inputs), 0.05)


def test_quantized_neighbours():
    """A dynamically quantized Linear beside a GRU: Dynamo breaks the graph at the Linear, the GRU is rewritten."""
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("this build of torch has no quantized Linear")
    with pytest.warns(DeprecationWarning, match="torch.ao.quantization"):
        linear = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(H, H)), {nn.Linear})
    rnn, x = nn.GRU(I, H), torch.randn(T, B, I)

    def forward(x):
        return linear(rnn(x)[0])

    keep_dynamo_hook()
    backend = Graphs()
    with torch.no_grad():
        compiled = torch.compile(forward, backend=backend)
        assert_same([compiled(x)], [forward(x)], 0.05)  # 8 bits
    assert backend.calls == 1


# ---- sizes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}], ids=str)
def test_dynamic_from_the_first_call(options):
    model = Wrapped(plain, **options).double()
    keep_dynamo_hook()
    backend = Graphs()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for sizes in ((4, 3), (7, 2), (2, 9)):
        x = x_of(*sizes, I)
        inputs = [x, *model.parameters()]
        assert_same(value_and_grads(compiled, (x,), inputs), value_and_grads(model, (x,), inputs), 1e-12)
    assert (backend.graphs, backend.calls) == (1, 1)


def test_one_dimension_is_marked_dynamic():
    model = Wrapped(plain).double()
    keep_dynamo_hook()
    for dim in (0, 1):
        torch._dynamo.reset()
        backend = Graphs()
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        for size in (4, 6, 9):
            x = x_of(*((size, 3) if dim == 0 else (4, size)), I)
            torch._dynamo.mark_dynamic(x, dim, min=2, max=100)
            assert_same(tensors(compiled(x)), tensors(model(x)), 1e-12)
        assert (backend.graphs, backend.calls) == (1, 1)


# ---- parts of a model --------------------------------------------------------------------------------------------------------


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.lower, self.middle, self.upper = nn.GRU(I, H), nn.Linear(H, H), nn.GRU(H, H)

    def forward(self, x):
        return self.upper(torch.tanh(self.middle(self.lower(x)[0])))


def test_one_submodule_is_compiled():
    """`torch.compile(rnn)`; `rnn.compile()` compiles nothing, as of any module of torch.nn: Dynamo skips their frames."""
    model, x = Deep().double(), x_of(T, B, I)
    inputs = [x, *model.parameters()]
    expected = value_and_grads(model, (x,), inputs)
    keep_dynamo_hook()
    backend = Graphs()
    model.lower = torch.compile(model.lower, backend=backend, fullgraph=True)
    assert_same(value_and_grads(model, (x,), inputs), expected, 1e-12)
    assert (backend.graphs, backend.calls) == (1, 1)


def test_submodules_compile_themselves():
    """Regional compilation: blocks of one class share what was compiled for the first."""
    model, x = nn.ModuleList(Wrapped(plain, nn.GRU(I, I)) for _ in range(3)).double(), x_of(T, B, I)
    keep_dynamo_hook()
    backend = Graphs()

    def run(x):
        for block in model:
            x = block(x)[0]
        return x

    inputs = [x, *model.parameters()]
    expected = value_and_grads(run, (x,), inputs)
    for block in model:
        block.compile(backend=backend, fullgraph=True)
    assert_same(value_and_grads(run, (x,), inputs), expected, 1e-12)
    assert backend.calls == backend.graphs <= 2  # the second time its input is no leaf


def test_compiled_within_compiled():
    model, x = Deep().double(), x_of(T, B, I)
    inputs = [x, *model.parameters()]
    expected = value_and_grads(model, (x,), inputs)
    keep_dynamo_hook()
    inner, outer = Graphs(), Graphs()
    model.upper.compile(backend=inner)
    compiled = torch.compile(model, backend=outer, fullgraph=True)
    assert_same(value_and_grads(compiled, (x,), inputs), expected, 1e-12)
    assert (outer.graphs, outer.calls, inner.graphs) == (1, 2, 0)  # the outer compilation takes it all


class Apart(Deep):
    """Runs the middle eagerly."""

    @torch.compiler.disable
    def between(self, y):
        return torch.tanh(self.middle(y))

    def forward(self, x):
        return self.upper(self.between(self.lower(x)[0]))


class EagerGRU(Deep):
    """Runs one of its GRUs eagerly."""

    @torch.compiler.disable
    def eagerly(self, x):
        return self.lower(x)[0]

    def forward(self, x):
        return self.upper(torch.tanh(self.middle(self.eagerly(x))))


def test_part_that_is_never_compiled():
    check_parts(Apart(), x_of(T, B, I), graphs=2, calls=2)
    torch._dynamo.reset()
    check_parts(EagerGRU(), x_of(T, B, I), graphs=1, calls=1)


# ---- export ------------------------------------------------------------------------------------------------------------------


def test_exported_with_dynamic_sizes():
    model, x = Deep().double(), x_of(T, B, I)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {1: torch.export.Dim("batch")}})
    assert rewrite(program.graph_module) == 2
    exported = program.module()
    for batch in (B, 8):
        x = x_of(T, batch, I)
        assert_same(tensors(exported(x)), tensors(model(x)), 1e-12)
    loaded = copy.deepcopy(program).module()
    assert_same(tensors(loaded(x)), tensors(model(x)), 1e-12)
