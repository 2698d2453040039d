"""Two GRUs of a graph become one call, exactly, and only where that is right: tests of each guard, of order and of memory."""

import inspect
from operator import getitem

import pytest
import torch
from problems import assert_same, value_and_grads
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule

import torch_gru_fuse
from torch_gru_fuse import torch_hooks
from torch_gru_fuse.passes import pairs
from torch_gru_fuse.passes.nodes import shape
from torch_gru_fuse.passes.rewrite import rewrite
from torch_gru_fuse.switch import keep_dynamo_hook

ops = torch.ops.torch_gru_fuse
T, B, I, H = 5, 3, 4, 6


@pytest.fixture(autouse=True)
def pairs_on_cpu(monkeypatch):
    """Pairs are made on a CPU, too: nothing is gained there, and it shows without a GPU what happens on one."""
    monkeypatch.setattr(pairs, "GUARDS", tuple(g for g in pairs.GUARDS if g is not pairs.profitable))


def compiled(function, **options):
    """The function, compiled with the pass and without Inductor, and the graphs that it makes."""
    graphs = []

    def backend(gm, inputs):
        rewrite(gm)
        graphs.append(gm.graph)
        return gm.forward

    backend.rewrites_gru = True
    keep_dynamo_hook()
    return torch.compile(function, backend=backend, fullgraph=True, **options), graphs


def calls(graph, name):
    return [n for n in graph.nodes if n.target is getattr(ops, name).default]


def paired(function, args, inputs, count=1, **options):
    """Compiles, compares results and gradients with eager ones; the calls of `gru_pair`, of which there are so many."""
    expected = value_and_grads(function, clones(args), inputs)
    model, graphs = compiled(function, **options)
    assert_same(value_and_grads(model, clones(args), inputs), expected, 1e-5)
    [graph] = graphs
    graph.lint()
    found = calls(graph, "gru_pair")
    assert len(found) == count
    return found


def clones(args):
    return [a.clone() if isinstance(a, torch.Tensor) else a for a in args]


class Two(nn.Module):
    """Two encoders."""

    def __init__(self, I_b=7, H_b=H, **options):
        super().__init__()
        self.a, self.b = nn.GRU(I, H, **options), nn.GRU(I_b, H_b, **options)

    def forward(self, x, y):
        first, h_a = self.a(x)  # line 1
        second, h_b = self.b(y)  # line 2
        return first.sin(), second.cos(), h_a, h_b


def inputs(**options):
    return torch.randn(T, B, I, **options), torch.randn(T, B, 7, **options)


# ---- pairs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"batch_first": True}], ids=str)
def test_two_encoders(options):
    model = Two(**options)
    [call] = paired(model, inputs(), list(model.parameters()))
    assert call.args[4] == [False, False]
    records = {record.module: record for record in torch_gru_fuse.rewrites()}
    assert {module: r.shared_with for module, r in records.items()} == {"a (GRU)": "b (GRU)", "b (GRU)": "a (GRU)"}
    assert all(r.target == "gru_pair" and r.node == call.name for r in records.values())
    assert str(records["a (GRU)"]) == "torch.gru in a (GRU) -> torch_gru_fuse.gru_pair, with b (GRU)"


class Directions(nn.Module):
    """A bidirectional layer written as two modules and a flip."""

    def __init__(self, *, batch_first=False, spelling=lambda x, dim: x.flip(dim)):
        super().__init__()
        self.f, self.b = (nn.GRU(I, H, batch_first=batch_first) for _ in range(2))
        self.spelling, self.dim = spelling, int(batch_first)

    def forward(self, x):
        ahead, h_f = self.f(x)
        back, h_b = self.b(self.spelling(x, self.dim))
        return torch.cat((ahead, self.spelling(back, self.dim)), -1), h_f, h_b


SPELLINGS = [
    lambda x, dim: x.flip(dim), lambda x, dim: x.flip([dim - 3]), lambda x, dim: torch.flip(x, (dim,)),
    lambda x, dim: torch.flip(x, dims=[dim - 3]),
]  # fmt: skip


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS, ids=range(len(SPELLINGS)))
def test_the_flips_of_a_direction_are_gone(spelling, batch_first):
    model = Directions(batch_first=batch_first, spelling=spelling)
    [call] = paired(model, [torch.randn(T, B, I)], list(model.parameters()))
    assert call.args[4] == [False, True] and call.args[0][0] is call.args[0][1]
    assert not [n for n in call.graph.nodes if "flip" in str(n.target)]


def test_it_is_what_a_bidirectional_layer_gives():
    both = nn.GRU(I, H, bidirectional=True)
    model = Directions()
    with torch.no_grad():
        for mine, theirs in zip((*model.f.parameters(), *model.b.parameters()), both.parameters(), strict=True):
            mine.copy_(theirs)
        x = torch.randn(T, B, I)
        assert_same(compiled(model)[0](x)[:1], both(x)[:1], 1e-6)


@pytest.mark.parametrize("first", ["ahead", "back"])
def test_a_flip_of_the_first_of_the_two(first):
    f, b = nn.GRU(I, H), nn.GRU(I, H)

    def model(x):
        if first == "back":
            return b(x.flip(0))[0].flip(0) + f(x)[0]
        return f(x)[0] + b(x.flip(0))[0].flip(0)

    [call] = paired(model, [torch.randn(T, B, I)], [*f.parameters(), *b.parameters()])
    assert call.args[4] == ([True, False] if first == "back" else [False, True])


def test_only_the_last_state_of_a_flipped_layer_is_used():
    f, b = nn.GRU(I, H), nn.GRU(I, H)
    [call] = paired(lambda x: f(x)[1] + b(x.flip(0))[1], [torch.randn(T, B, I)], [*f.parameters(), *b.parameters()])
    assert call.args[4] == [False, True]


KEPT_FLIPS = {
    "the output is used as it is, too": lambda f, b, x: f(x)[0] + (y := b(x.flip(0))[0]) + y.flip(0),
    "another dimension": lambda f, b, x: f(x)[0] + b(x.flip(1))[0].flip(1),
    "two dimensions": lambda f, b, x: f(x)[0] + b(x.flip(0, 1))[0].flip(0, 1),
    "the output is not flipped": lambda f, b, x: f(x)[0] + b(x.flip(0))[0],
    "the flipped tensor changes": lambda f, b, x: (z := x * 1, w := z.flip(0), z.add_(1), f(z)[0] + b(w)[0].flip(0))[-1],
}


@pytest.mark.parametrize("kind", KEPT_FLIPS)
def test_a_flip_that_stays(kind):
    f, b = nn.GRU(I, H), nn.GRU(I, H)
    weights = [*f.parameters(), *b.parameters()]
    [call] = paired(lambda x: KEPT_FLIPS[kind](f, b, x), [torch.randn(T, B, I)], weights)
    assert call.args[4] == [False, False] and [n for n in call.graph.nodes if "flip" in str(n.target)]


def test_what_needs_the_first_moves_behind_the_call():
    model = Two()

    def function(x, y):
        first, h_a = model.a(x)
        attention = first.softmax(-1) @ first.transpose(1, 2)
        y = y * 2
        second, _ = model.b(y)
        return attention, second.sum(), h_a

    [call] = paired(function, inputs(), list(model.parameters()))
    order = [n.name for n in call.graph.nodes]
    assert order.index("softmax") > order.index(call.name)


def test_results_that_nobody_uses():
    model = Two()
    paired(lambda x, y: model.a(x)[1] + model.b(y)[0][-1:], inputs(), list(model.parameters()))
    paired(lambda x, y: model.a(x)[0] + model.b(y)[0], inputs(), list(model.parameters()))


def test_initial_states_that_are_given():
    model = Two()
    state = torch.randn(1, B, H, requires_grad=True)
    paired(
        lambda x, y: model.a(x, state)[0] + model.b(y, state * 2)[0], inputs(), [state, *model.parameters()]
    )


@pytest.mark.parametrize("number", [3, 4, 5])
def test_more_than_two_pair_in_order(number):
    rnns = nn.ModuleDict({f"r{i}": nn.GRU(I, H) for i in range(number)})

    def function(x):
        return sum(rnns[f"r{i}"](x)[0] for i in range(number))

    model, graphs = compiled(function)
    model(torch.randn(T, B, I))
    [graph] = graphs
    assert len(calls(graph, "gru_pair")) == number // 2 and len(calls(graph, "gru")) == number % 2
    partners = {record.module: record.shared_with for record in torch_gru_fuse.rewrites()}
    for i in range(number // 2):
        [first] = [module for module in partners if f"r{2 * i}" in module]
        assert f"r{2 * i + 1}" in partners[first]
    paired(function, [torch.randn(T, B, I)], list(rnns.parameters()), number // 2)


def test_pairs_of_what_pairs_give():
    rnns = nn.ModuleList(nn.GRU(i, H) for i in (I, 7, H, H))

    def function(x, y):
        first, h_a = rnns[0](x)
        second, h_b = rnns[1](y)
        third, _ = rnns[2](first.relu(), h_b)
        fourth, _ = rnns[3](second, h_a)
        return third, fourth

    paired(function, inputs(), list(rnns.parameters()), 2)


def test_calls_that_moved_past_each_other():
    a, c, e, b = rnns = nn.ModuleList([nn.GRU(I, H), nn.GRU(H, 9), nn.GRU(I, 9), nn.GRU(7, H)])

    def function(x, y):
        first = a(x)[0]
        behind = c(first)[0]  # has to come after the first pair
        return first.sum() + behind, e(x)[0], b(y)[0]

    paired(function, inputs(), list(rnns.parameters()), 2)


def test_outputs_that_the_graph_changes_in_place():
    model = Two()

    def function(x, y):
        first, h_a = model.a(x)
        second, h_b = model.b(y)
        first[:, 0].add_(1)
        second.mul_(2)
        h_b.add_(h_a)
        return first, second, h_a, h_b

    paired(function, inputs(), list(model.parameters()))


def test_dynamic_sizes():
    model = Two()
    compiled_model, graphs = compiled(lambda x: model.a(x)[0] + model.b(torch.cat((x, x), -1)[..., 1:])[0], dynamic=True)
    for steps in (5, 9):
        x = torch.randn(steps, B, I)
        expected = model.a(x)[0] + model.b(torch.cat((x, x), -1)[..., 1:])[0]
        assert_same([compiled_model(x)], [expected], 1e-6)
    assert len(graphs) == 1 and len(calls(graphs[0], "gru_pair")) == 1


def test_autocast():
    model, linear = Two(), nn.Linear(I, I)

    def function(x, y):
        with torch.autocast("cpu", torch.bfloat16):
            return model.a(linear(x))[0], model.b(torch.cat((linear(x), linear(y[..., :I])), -1)[..., :7])[0]

    args = inputs()
    expected = function(*args)
    compiled_function, graphs = compiled(function)
    results = compiled_function(*args)
    assert [r.dtype for r in results] == [e.dtype for e in expected]
    assert_same(results, expected, 2e-2)
    assert len(calls(graphs[0], "gru_pair")) == 1


def test_recompute():
    with torch_gru_fuse.enable(recompute=True):
        model = Two()
        [call] = paired(model, inputs(), list(model.parameters()))
    assert call.kwargs == {"recompute": True}


def test_rolled_loops():
    cells = nn.ModuleList(nn.GRUCell(I, H) for _ in range(2))

    def function(x, y):
        outputs = []
        for cell, sequence in zip(cells, (x, y), strict=True):
            h = sequence.new_zeros(B, H)
            for t in range(T):
                h = cell(sequence[t], h)
                outputs.append(h)
        return torch.stack(outputs)

    paired(function, [torch.randn(T, B, I)] * 2, list(cells.parameters()))


def test_through_inductor():
    model = Two()
    args = inputs()
    with torch_gru_fuse.enable():
        ours = value_and_grads(torch.compile(model, fullgraph=True), args, list(model.parameters()))
    assert_same(ours, value_and_grads(model, args, list(model.parameters())), 1e-5)
    assert {record.target for record in torch_gru_fuse.rewrites()} == {"gru_pair"}


@pytest.mark.parametrize("training", [False, True])
def test_results_may_be_changed_by_who_gets_them(training):
    model, args = Two(), inputs()
    plain = lambda x, y: (*model.a(x), *model.b(y))  # noqa: E731
    with torch_gru_fuse.enable(), torch.set_grad_enabled(training):
        expected = plain(*args)
        results = torch.compile(plain, fullgraph=True)(*args)
        results[0].mul_(2)
        results[1].detach_().add_(1)
        assert_same(results, (expected[0] * 2, expected[1] + 1, *expected[2:]), 1e-6)
        assert all(r.is_contiguous() and not r._is_view() for r in results)
    assert {record.target for record in torch_gru_fuse.rewrites()} == {"gru_pair"}


@pytest.mark.filterwarnings("ignore:The tensor attributes")
def test_exported_program():
    model, args = Directions(), (torch.randn(T, B, I),)
    program = torch.export.export(model, args)
    assert rewrite(program.graph_module) == 2
    [call] = calls(program.graph, "gru_pair")
    assert call.args[4] == [False, True]
    assert_same(program.module()(*args), model(*args), 1e-6)


# ---- no pairs ---------------------------------------------------------------------------------------------------------------


def refused(function, args, reason):
    model, graphs = compiled(function)
    expected = function(*clones(args))
    assert_same([model(*clones(args))], [expected], 1e-5)
    assert not calls(graphs[0], "gru_pair") and len(calls(graphs[0], "gru")) == 2
    said = {record.alone for record in torch_gru_fuse.rewrites() if record.target == "gru"}
    assert said == {reason}


def both(a, b):
    return lambda x, y: a(x)[0].sum() + b(y)[0].sum()


REFUSED = {
    "single": (lambda: both(nn.GRU(I, H, 2), nn.GRU(I, H)), "2 layers are one launch by themselves"),
    "single, directions": (
        lambda: both(nn.GRU(I, H), nn.GRU(I, H, bidirectional=True)), "two directions are one launch by themselves"
    ),
    "same_flags": (lambda: both(nn.GRU(I, H), nn.GRU(I, H, bias=False)), "they differ in has_biases"),
    "same_flags, layout": (lambda: both(nn.GRU(I, H), nn.GRU(I, H, batch_first=True)), "they differ in batch_first"),
    "same_kind": (
        lambda: (lambda b: lambda x, y: nn_gru(x) + b(y.double())[0].sum())(nn.GRU(I, H).double()),
        "they differ in dtype or device",
    ),
    "same_shape, H": (lambda: both(nn.GRU(I, H), nn.GRU(I, H + 1)), "their T, B and H are not known to be the same"),
    "same_shape, T": (
        lambda: (lambda b: lambda x, y: nn_gru(x) + b(y[1:])[0].sum())(nn.GRU(I, H)),
        "their T, B and H are not known to be the same",
    ),
    "same_shape, B": (
        lambda: (lambda b: lambda x, y: nn_gru(x) + b(y[:, 1:])[0].sum())(nn.GRU(I, H)),
        "their T, B and H are not known to be the same",
    ),
    "same_gradients": (
        lambda: both(nn.GRU(I, H), nn.GRU(I, H).requires_grad_(False)), "only one of them has gradients"
    ),
    "no_resets": (lambda: with_resets, "states are reset between steps"),
}  # fmt: skip

_nn_gru = nn.GRU(I, H)


def nn_gru(x):
    return _nn_gru(x)[0].sum()


_cell, _other = nn.GRUCell(I, H), nn.GRU(I, H)


def with_resets(x, y):
    h = x.new_zeros(B, H)
    for t in range(T):
        h = _cell(x[t], h * y[t, :, :1])
    return h.sum() + _other(x)[0].sum()


@pytest.mark.parametrize("guard", REFUSED)
def test_guard_refuses(guard):
    make, reason = REFUSED[guard]
    refused(make(), [torch.randn(T, B, I), torch.randn(T, B, I)], reason)


def test_every_guard_has_a_test():
    named = {name.split(",")[0] for name in REFUSED} | {"profitable"}
    assert {g.__name__ for g in (*pairs.GUARDS, pairs.profitable)} == named


DEPENDENT = {
    "a stack": lambda a, b, x: b(a(x)[0])[0],
    "by the last state": lambda a, b, x: b(x, a(x)[1])[0],
    "by something in between": lambda a, b, x: b(torch.cat((x[..., :1], a(x)[0][..., 1:]), -1).relu())[0],
}


@pytest.mark.parametrize("kind", DEPENDENT)
def test_one_depends_on_the_other(kind):
    a, b = nn.GRU(H, H), nn.GRU(H, H)
    refused(lambda x: DEPENDENT[kind](a, b, x), [torch.randn(T, B, H)], "")


CHANGED = "memory that one of them reads is changed in place between the two"


def test_memory_that_the_second_reads_is_changed_by_what_needs_the_first():
    a, b = nn.GRU(I, H), nn.GRU(H, H)

    def function(x, buffer):
        y = buffer * 1
        y.add_(a(x)[0])
        return b(y)[0]

    refused(function, [torch.randn(T, B, I), torch.randn(T, B, H)], CHANGED)


def test_memory_that_the_first_reads_is_changed_before_the_second_reads_it():
    a, b = nn.GRU(I, H), nn.GRU(I, H)

    def function(x):
        x = x * 1
        first = a(x)[0]
        x.add_(1)
        return first + b(x)[0]

    refused(function, [torch.randn(T, B, I)], CHANGED)


def test_memory_that_only_the_first_reads_is_changed_behind_the_call():
    model = Two()

    def function(x, y):
        x = x * 1
        first = model.a(x)[0]
        x.add_(1)
        return first + model.b(y)[0], x

    args = inputs()
    compiled_function, graphs = compiled(function)
    with torch.no_grad():  # autograd would not allow it
        assert_same(compiled_function(*args), function(*args), 1e-6)
    [call] = calls(graphs[0], "gru_pair")
    order = [n.name for n in call.graph.nodes]
    assert order.index("add_") > order.index(call.name)


def test_a_view_that_is_changed_in_between():
    a, b = nn.GRU(I, H), nn.GRU(I, H)

    def function(x):
        x = x * 1
        first = a(x)[0]
        x[0].zero_()
        return first + b(x.view(T, B, I))[0]

    refused(function, [torch.randn(T, B, I)], CHANGED)


def test_an_operation_of_unknown_effect_in_between():
    a, b = nn.GRU(I, H), nn.GRU(I, H)

    def function(x):
        first = a(x)[0]
        with torch.no_grad():
            second = b(x)[0]
        return first + second

    model, graphs = compiled(function)
    assert_same([model(x := torch.randn(T, B, I))], [function(x)], 1e-5)
    assert not calls(graphs[0], "gru_pair")
    assert "between the two is an operation of unknown effect" in torch_gru_fuse.rewrites()[0].alone


def test_random_numbers_keep_their_order():
    """Dropout of what the first gives moves behind the call, and with it that of the second's output."""
    model = Two().train()

    def function(x, y):
        first = nn.functional.dropout(model.a(x)[0], 0.5)
        second = nn.functional.dropout(model.b(y)[0], 0.5)
        return first, second

    args = inputs()
    torch.manual_seed(3)
    expected = function(*args)
    ours, graphs = compiled(function)
    torch.manual_seed(3)
    assert_same(ours(*args), expected, 1e-6)
    assert len(calls(graphs[0], "gru_pair")) == 1


def test_random_numbers_for_the_second_do_not_overtake():
    model = Two()

    def function(x, y):
        first = nn.functional.dropout(model.a(x)[0], 0.5)
        return first, model.b(nn.functional.dropout(y, 0.5))[0]

    args = inputs()
    torch.manual_seed(3)
    expected = function(*args)
    ours, graphs = compiled(function)
    torch.manual_seed(3)
    assert_same(ours(*args), expected, 1e-6)
    assert not calls(graphs[0], "gru_pair")


# ---- on a GPU ----------------------------------------------------------------------------------------------------------------


def on_cuda(batch, hidden, dtype=torch.float16, steps=512):
    """A graph of two calls of torch.gru on fake tensors."""
    graph = Graph()

    def given(name, *size):
        node = graph.placeholder(name)
        node.meta["example_value"] = torch.empty(*size, dtype=dtype, device="cuda")
        return node

    results = []
    for i in range(2):
        x, h = given(f"x{i}", steps, batch, I), given(f"h{i}", 1, batch, hidden)
        sizes = ((3 * hidden, I), (3 * hidden, hidden), (3 * hidden,), (3 * hidden,))
        weights = [given(f"w{i}{k}", *size) for k, size in enumerate(sizes)]
        call = graph.call_function(torch.gru, (x, h, weights, True, 1, 0.0, False, False, False))
        fakes = [x.meta["example_value"].new_empty(*size) for size in ((steps, batch, hidden), (1, batch, hidden))]
        call.meta["example_value"] = tuple(fakes)
        output = graph.call_function(getitem, (call, 0))
        output.meta["example_value"] = fakes[0]
        results.append(output)
    graph.output(tuple(results))
    return GraphModule({}, graph)


@pytest.mark.parametrize("batch, hidden, count", [(10, 256, 1), (4096, 256, 0)])
def test_the_planner_has_the_last_word(monkeypatch, batch, hidden, count):
    monkeypatch.setattr(pairs, "GUARDS", (*pairs.GUARDS, pairs.profitable))
    monkeypatch.setenv("TORCH_GRU_FUSE_GPU", "h200")
    monkeypatch.setattr(torch_hooks, "cudnn_runs", lambda tensor: True)
    with FakeTensorMode():
        gm = on_cuda(batch, hidden)
        assert rewrite(gm) == 2
        assert len(calls(gm.graph, "gru_pair")) == count
    if count:
        [pair] = calls(gm.graph, "gru_pair")
        assert [shape(u) for u in pair.users] == [(512, batch, hidden)] * 2
    else:
        assert {r.alone for r in torch_gru_fuse.rewrites()} == {
            "one launch for both is not expected to be faster than one for each"
        }


def test_on_a_cpu_nothing_is_done(monkeypatch):
    monkeypatch.setattr(pairs, "GUARDS", (*pairs.GUARDS, pairs.profitable))
    model, graphs = compiled(Two())
    model(*inputs())
    assert not calls(graphs[0], "gru_pair") and {r.alone for r in torch_gru_fuse.rewrites()} == {""}


# ---- explain -----------------------------------------------------------------------------------------------------------------


def test_explain_names_both():
    _, start = inspect.getsourcelines(Two.forward)
    entries = {entry.module: entry for entry in torch_gru_fuse.explain(Two(), *inputs()).entries}
    for name, line, other in (("a (GRU)", 1, "b (GRU)"), ("b (GRU)", 2, "a (GRU)")):
        entry = entries[name]
        assert entry.op == "torch_gru_fuse.gru_pair" and entry.shared_with == other
        assert entry.line == start + line and entry.file == __file__
        assert f"-> torch_gru_fuse.gru_pair, 1 call shared with {other}: " in str(entry)


def test_explain_says_why_not():
    text = str(torch_gru_fuse.explain(both(nn.GRU(I, H, 2), nn.GRU(I, H)), torch.randn(T, B, I), torch.randn(T, B, I)))
    assert text.count("shares no launch with another GRU: 2 layers are one launch by themselves") == 2
