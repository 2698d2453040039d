"""torch.compile with the rewrite against eager PyTorch: outputs, gradients, what was called, how often it compiled."""

import itertools
import logging

import pytest
import torch
from problems import assert_same, count_calls, tensors, value_and_grads
from torch import nn
from torch._dynamo.utils import counters

import torch_gru_fuse
from torch_gru_fuse.backend import gru_fuse
from torch_gru_fuse.ops import torch_path

pytestmark = [pytest.mark.versions, pytest.mark.usefixtures("cells_on_cpu")]

# float32 sums of at most 50 terms of order 1, in another order
TOLERANCE = 2e-5


class Tagger(nn.Module):
    """Linear -> GRU -> Linear, the shape of most models with a GRU."""

    def __init__(self, **options):
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.rnn = nn.GRU(8, 6, **options)
        self.out = nn.Linear(6 * (2 if self.rnn.bidirectional else 1), 3)

    def forward(self, x, h=None):
        y, h = self.rnn(torch.relu(self.embed(x)), h)
        return self.out(y), h


class Stepper(nn.Module):
    """A GRUCell in a loop."""

    def __init__(self, bias=True):
        super().__init__()
        self.cell = nn.GRUCell(5, 6, bias=bias)

    def forward(self, x):
        h = x.new_zeros(x.shape[1], 6)
        outputs = []
        for step in x.unbind(0):
            h = self.cell(step, h)
            outputs.append(h)
        return torch.stack(outputs)


def parity(model, *args, calls, tolerance=TOLERANCE, **compile_options):
    """Eager and compiled agree, in inference and in training, and the compiled model calls the ops that it should."""
    compiled = torch.compile(model, **{"fullgraph": True, **compile_options})
    with torch.no_grad():
        result, count = count_calls_of_compiled(lambda: compiled(*args))
        assert_same(tensors(result), tensors(model(*args)), tolerance)
    assert count == calls, count
    inputs = [*model.parameters()]
    expected = value_and_grads(model, args, inputs)
    actual = value_and_grads(compiled, args, inputs)
    assert_same(actual, expected, tolerance)
    return compiled


def count_calls_of_compiled(function):
    """The results of `function()`, and how often each op ran on the CPU."""
    counts = {}

    def counting(name):
        run = getattr(torch_path, name)

        def call(*args):
            counts[name] = counts.get(name, 0) + 1
            return run(*args)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("gru_forward", "gru_cell_forward", "gru_backward", "gru_cell_backward"):
            patch.setattr(torch_path, name, counting(name))
        return function(), counts


@pytest.fixture
def enabled():
    with torch_gru_fuse.enable():
        yield


VARIANTS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"bias": False, "batch_first": True},
    {"num_layers": 3, "batch_first": True},
]


@pytest.mark.parametrize(
    "options, given_state",
    [
        pytest.param(options, given, id=f"{options}, {'h0' if given else 'no h0'}", marks=pytest.mark.once if only_once else ())
        for i, options in enumerate(VARIANTS)
        for given, only_once in ((False, i % 2 == 1), (True, i % 2 == 0))
    ],
)
def test_module_in_a_model(enabled, options, given_state):
    model = Tagger(**options)
    args = [torch.randn(3, 4, 5)]
    if given_state:
        states = model.rnn.num_layers * (2 if model.rnn.bidirectional else 1)
        args.append(torch.randn(states, 3 if model.rnn.batch_first else 4, 6))
    parity(model, *args, calls={"gru_forward": 1})


def test_cells_in_a_loop(enabled):
    parity(Stepper(), torch.randn(4, 3, 5), calls={"gru_forward": 1})
    torch._dynamo.reset()
    parity(Stepper(bias=False), torch.randn(1, 3, 5), calls={"gru_cell_forward": 1})


def test_unbatched_input(enabled):
    parity(nn.GRU(5, 6, 2), torch.randn(7, 5), calls={"gru_forward": 1})
    torch._dynamo.reset()
    parity(nn.GRUCell(5, 6), torch.randn(5), torch.randn(6), calls={"gru_cell_forward": 1})


def test_functional_calls_with_keywords(enabled):
    rnn, cell = nn.GRU(5, 6), nn.GRUCell(5, 6)
    x, h = torch.randn(4, 3, 5), torch.zeros(1, 3, 6)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.p = nn.ParameterList(p.detach().clone() for p in rnn.parameters())
            self.c = nn.ParameterList(p.detach().clone() for p in cell.parameters())

        def forward(self, x, h):
            out, h_n = torch.gru(
                x, h, list(self.p), has_biases=True, num_layers=1, dropout=0.0, train=False,
                bidirectional=False, batch_first=False,
            )  # fmt: skip
            w_ih, w_hh, b_ih, b_hh = self.c
            return out, torch.gru_cell(x[0], h_n[0], w_ih, w_hh, b_hh=b_hh, b_ih=b_ih)

    parity(Model(), x, h, calls={"gru_forward": 1, "gru_cell_forward": 1})


def test_weights_that_are_no_parameters(enabled):
    rnn = nn.GRU(5, 6)
    nn.utils.parametrizations.weight_norm(rnn, "weight_hh_l0")
    parity(rnn, torch.randn(4, 3, 5), calls={"gru_forward": 1})


@pytest.mark.once
def test_two_calls_and_shared_weights(enabled):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(6, 6)
            self.other = nn.GRU(6, 6)
            self.other.weight_hh_l0 = self.rnn.weight_hh_l0

        def forward(self, x):
            y, h = self.rnn(x)
            return self.other(self.rnn(y, h)[0])[0]

    parity(Twice(), torch.randn(4, 3, 6), calls={"gru_forward": 3})


def test_activation_checkpointing(enabled):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(5, 6)

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(lambda x: self.rnn(torch.sin(x))[0].relu(), x, use_reentrant=False)

    parity(Checkpointed(), torch.randn(4, 3, 5), calls={"gru_forward": 1})


def test_cond_branches_are_rewritten(enabled):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(5, 6)

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: self.rnn(x)[0].clone(), lambda x: self.rnn(-x)[0].clone(), (x,))

    model, x = Branches(), torch.randn(4, 3, 5).abs()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for value in (x, -x):
            result, calls = count_calls_of_compiled(lambda value=value: compiled(value))
            assert_same([result], [model.rnn(x)[0]], TOLERANCE)  # either branch sees the positive input
            assert calls == {"gru_forward": 1}


@pytest.mark.once
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(enabled, dtype):
    tolerance = {torch.float64: 1e-13, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]  # gradients are sums of 12 products
    parity(Tagger().to(dtype), torch.randn(3, 4, 5, dtype=dtype), calls={"gru_forward": 1}, tolerance=tolerance)


def test_autocast_around_and_inside_the_model(enabled):
    class Autocast(Tagger):
        def forward(self, x, h=None):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x, h)

    parity(Autocast(), torch.randn(3, 4, 5), calls={"gru_forward": 1}, tolerance=0.05)
    torch._dynamo.reset()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parity(Tagger(), torch.randn(3, 4, 5), calls={"gru_forward": 1}, tolerance=0.05)


@pytest.mark.parametrize("mode", ["reduce-overhead", pytest.param("max-autotune-no-cudagraphs", marks=pytest.mark.once)])
def test_modes(enabled, mode):
    parity(Tagger(), torch.randn(3, 4, 5), calls={"gru_forward": 1}, mode=mode)


def test_dropout_follows_the_seed(enabled):
    model = nn.GRU(5, 6, 3, dropout=0.5)
    x = torch.randn(8, 3, 5)
    with torch._inductor.config.patch(fallback_random=True):  # eager's random numbers
        compiled = torch.compile(model, fullgraph=True)
        torch.manual_seed(3)
        expected = value_and_grads(model, (x,), [*model.parameters()])
        for _ in range(2):
            torch.manual_seed(3)
            assert_same(value_and_grads(compiled, (x,), [*model.parameters()]), expected, TOLERANCE)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)  # the dropout probability is first an input of the graph
    torch.manual_seed(3)
    first = compiled(x)[0]
    assert not torch.equal(first, compiled(x)[0])
    torch.manual_seed(3)
    assert torch.equal(first, compiled(x)[0])
    assert_same([torch.compile(model.eval(), fullgraph=True)(x)[0]], [model(x)[0]], TOLERANCE)


# ---- dynamic shapes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.once), True], ids=["inference", "training"])
def test_sequence_length_and_batch_change_without_recompiling(enabled, training):
    model = Tagger(num_layers=2, bidirectional=True)
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(7, 4, 5)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 1)
    with torch.set_grad_enabled(training):
        compiled(x)
        graphs = counters["stats"]["unique_graphs"]
        for T, B in ((5, 3), (64, 2), (300, 9)):
            x = torch.randn(T, B, 5)
            if training:
                actual, expected = (value_and_grads(f, (x,), [*model.parameters()]) for f in (compiled, model))
                # a weight gradient sums T*B*2 float32 products of order 1: rounding grows with the root of their number
                assert_same(actual, expected, TOLERANCE * max(1, T * B / 100) ** 0.5)
            else:
                assert_same(tensors(compiled(x)), tensors(model(x)), TOLERANCE)
    assert counters["stats"]["unique_graphs"] == graphs


def test_second_length_makes_the_length_dynamic(enabled):
    model = nn.GRU(5, 6)
    compiled = torch.compile(model, fullgraph=True)
    compiled(torch.randn(7, 3, 5))
    compiled(torch.randn(8, 3, 5))
    graphs = counters["stats"]["unique_graphs"]
    for T in (9, 50, 333):
        compiled(torch.randn(T, 3, 5))
    assert counters["stats"]["unique_graphs"] == graphs


# ---- switches -----------------------------------------------------------------------------------------------------------


def breaks(module, *args, **options):
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(module, fullgraph=True, **options)(*args)
    torch._dynamo.reset()
    return True


def test_enable_disable_and_context():
    rnn, x = nn.GRU(5, 6), torch.randn(4, 3, 5)
    assert not torch_gru_fuse.is_enabled() and breaks(rnn, x)
    torch_gru_fuse.enable()
    torch_gru_fuse.enable()
    assert torch_gru_fuse.is_enabled()
    parity(rnn, x, calls={"gru_forward": 1})
    torch_gru_fuse.disable()
    assert not torch_gru_fuse.is_enabled() and breaks(rnn, x)
    with torch_gru_fuse.enable():
        assert torch_gru_fuse.is_enabled()
        with torch_gru_fuse.enable():
            pass
        assert torch_gru_fuse.is_enabled()
        parity(rnn, x, calls={"gru_forward": 1})
    assert not torch_gru_fuse.is_enabled() and breaks(rnn, x)


def test_backend_needs_no_enable():
    x = torch.randn(4, 3, 5)
    parity(Tagger(), x, calls={"gru_forward": 1}, backend=gru_fuse)
    torch._dynamo.reset()
    parity(Tagger(), x, calls={"gru_forward": 1}, backend=gru_fuse, mode="reduce-overhead")
    torch._dynamo.reset()
    parity(Tagger(), x, calls={"gru_forward": 1}, backend=gru_fuse, options={"epilogue-fusion": False})
    assert breaks(nn.GRU(5, 6), x)  # the default backend stays as it was


def test_backend_rejects_unknown_mode_and_option():
    x = torch.randn(4, 3, 5)
    with pytest.raises(Exception, match="no_such_mode"):
        torch.compile(nn.GRU(5, 6), backend=gru_fuse, mode="no_such_mode")(x)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="no_such_option"):
        torch.compile(nn.GRU(5, 6), backend=gru_fuse, options={"no_such_option": 1})(x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_other_backends_behave_as_without_the_package(enabled, backend):
    rnn, x = nn.GRU(5, 6), torch.randn(4, 3, 5)
    assert breaks(rnn, x, backend=backend)
    assert_same(torch.compile(rnn, backend=backend)(x), rnn(x), 0)
    assert torch_gru_fuse.rewrites() == []


@pytest.mark.parametrize("kind", [nn.LSTM, nn.RNN])
def test_lstm_and_rnn_behave_as_without_the_package(enabled, kind):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.other, self.rnn = kind(5, 5), nn.GRU(5, 6)

        def forward(self, x):
            return self.rnn(self.other(x)[0])[0]

    model, x = Mixed(), torch.randn(4, 3, 5)
    assert breaks(model, x) and breaks(model.other, x)
    with torch.no_grad():
        assert_same([torch.compile(model)(x)], [model(x)], TOLERANCE)


def test_eager_is_untouched(enabled):
    rnn, x = nn.GRU(5, 6), torch.randn(4, 3, 5)
    _, calls = count_calls(lambda: rnn(x))
    assert calls == {}


# ---- a user's own passes ------------------------------------------------------------------------------------------------


class CountingPass(torch._inductor.custom_graph_pass.CustomGraphPass):
    def __init__(self, log):
        self.log = log

    def __call__(self, graph):
        self.log.append([str(n.target) for n in graph.nodes if n.op == "call_function"])

    def uuid(self):
        return b"counting"


@pytest.mark.parametrize("how", ["config before", "config after", "options", "plain function"])
def test_own_pre_grad_pass_still_runs(how):
    log = []
    own = CountingPass(log)
    if how == "plain function":
        def own(graph):
            CountingPass(log)(graph)

    config = torch._inductor.config
    model, x = Tagger(), torch.randn(4, 3, 5)
    options = {"options": {"pre_grad_custom_pass": own}} if how == "options" else {}
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        if how == "config before":
            with config.patch(pre_grad_custom_pass=own), torch_gru_fuse.enable():
                parity(model, x, calls={"gru_forward": 1})
        else:
            with torch_gru_fuse.enable(), config.patch(pre_grad_custom_pass=None if options else own):
                parity(model, x, calls={"gru_forward": 1}, **options)
    assert len(log) == 2  # inference and training
    assert all(any("torch_gru_fuse.gru" in target for target in graph) for graph in log)


# ---- what was found -----------------------------------------------------------------------------------------------------


def test_records_say_what_was_rewritten_and_where(enabled, caplog):
    caplog.set_level(logging.DEBUG, logger="torch_gru_fuse")
    torch.compile(Tagger(), fullgraph=True)(torch.randn(4, 3, 5))
    torch.compile(Stepper(), fullgraph=True)(torch.randn(2, 3, 5))
    records = torch_gru_fuse.rewrites()
    assert [r.target for r in records] == ["gru", "gru"]
    assert all(r.rewritten and r.reason is None for r in records)
    assert records[0].module == "rnn (GRU)" and records[1].module == "cell (GRUCell)"
    assert str(records[1]) == "loop of 2 steps over torch.gru_cell in cell (GRUCell) -> torch_gru_fuse.gru"
    assert "test_rewrite.py" in records[0].source and "in forward" in records[0].source
    assert str(records[0]) == "torch.gru in rnn (GRU) -> torch_gru_fuse.gru"
    assert str(records[0]) in caplog.messages
    torch_gru_fuse.clear_rewrites()
    assert torch_gru_fuse.rewrites() == []


# ---- PyTorch's own samples ----------------------------------------------------------------------------------------------


def samples():
    from torch.testing._internal.common_modules import module_db

    for info in module_db:
        if info.module_cls in (nn.GRU, nn.GRUCell):
            options = {"device": "cpu", "dtype": torch.float32, "requires_grad": True, "training": False}
            torch.manual_seed(0)  # the same in every run, and in every process of one
            for i, sample in enumerate(info.module_inputs_func(info, **options)):
                yield pytest.param(info.module_cls, sample, id=f"{info.name}-{i}")


@pytest.mark.parametrize(("kind", "sample"), list(samples()))
def test_module_samples_of_pytorch(enabled, kind, sample):
    module = kind(*sample.constructor_input.args, **sample.constructor_input.kwargs)
    args, kwargs = sample.forward_input.args, sample.forward_input.kwargs
    compiled = torch.compile(module, fullgraph=True)
    inputs = [t for t in tensors((args, kwargs)) if t.requires_grad] + list(module.parameters())
    actual, expected = (value_and_grads(lambda *a, f=f: f(*a, **kwargs), args, inputs) for f in (compiled, module))
    assert_same(actual, expected, TOLERANCE)
    assert [r.rewritten for r in torch_gru_fuse.rewrites()] == [True]


def test_there_are_samples():
    kinds = {k: len(list(g)) for k, g in itertools.groupby(samples(), key=lambda p: p.values[0])}
    assert kinds[nn.GRU] >= 8 and kinds[nn.GRUCell] >= 1
