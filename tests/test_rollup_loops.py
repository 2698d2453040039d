"""Loops over a GRU cell become one call of the sequence op, in the layouts in which they are written, or are left alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_same, tensors
from rollup import check, compiled_graph, value_and_grads, x_of
from torch import nn

import torch_gru_fuse

T, B, I, H = 5, 3, 4, 6

pytestmark = pytest.mark.usefixtures("cells_on_cpu")


class Model(nn.Module):
    """Cells of all sizes that the loops of this file need, and a loop."""

    def __init__(self, loop, layers=1, bias=True):
        super().__init__()
        self.cell = nn.GRUCell(I, H, bias=bias)
        self.cells = nn.ModuleList(nn.GRUCell(I if layer == 0 else H, H) for layer in range(layers))
        self.feed = nn.GRUCell(H, H)
        self.out = nn.Linear(H, I)
        self.norm = nn.BatchNorm1d(I)
        self.loop = loop

    def forward(self, *args):
        return self.loop(self, *args)


def zeros(x, batch_dim=1):
    return x.new_zeros(x.shape[batch_dim], H)


# ---- layouts -----------------------------------------------------------------------------------------------------------------


def stacked(m, steps, h, **options):
    outputs = []
    for x in steps:
        h = m.cell(x, h)
        outputs.append(h)
    return torch.stack(outputs, **options)


def time_in_the_middle(m, x):
    h, outputs = zeros(x, 0), []
    for t in range(x.shape[1]):
        h = m.cell(x[:, t, :], h)
        outputs.append(h.unsqueeze(1))
    return torch.cat(outputs, dim=1)


def last_alone(m, x):
    h = zeros(x)
    for t in range(x.size(0)):
        h = m.cell(x[t], h)
    return h


def reversed_time(m, x):
    h, outputs = zeros(x), []
    for t in reversed(range(len(x))):
        h = m.cell(x[t], h)
        outputs.insert(0, h)
    return torch.stack(outputs), h


def reversed_output(m, x):
    h, outputs = zeros(x), []
    for t in range(len(x)):
        h = m.cell(x[t], h)
        outputs.append(h)
    return torch.stack(outputs[::-1], 1)


def flipped(m, x):
    return stacked(m, x.flip(0), zeros(x)).flip(0)


def with_first_state(m, x):
    h = zeros(x) + 1
    outputs = [h]
    for step in x:
        h = m.cell(step, h)
        outputs.append(h)
    return torch.stack(outputs, dim=1)


LAYOUTS = {
    "x[t]": (lambda m, x: stacked(m, [x[t] for t in range(len(x))], zeros(x)), (T, B, I)),
    "x[:, t], stack dim 1": (lambda m, x: stacked(m, [x[:, t] for t in range(x.shape[1])], zeros(x, 0), dim=1), (B, T, I)),
    "x[..., t]": (lambda m, x: stacked(m, [x[..., t] for t in range(x.shape[2])], zeros(x, 0), dim=-1), (B, I, T)),
    "x[:, t, :], cat of unsqueezed": (time_in_the_middle, (B, T, I)),
    "iteration": (lambda m, x: stacked(m, x, zeros(x)), (T, B, I)),
    "unbind": (lambda m, x: stacked(m, x.unbind(1), zeros(x, 0), dim=1), (B, T, I)),
    "torch.unbind": (lambda m, x: stacked(m, torch.unbind(x, dim=0), zeros(x)), (T, B, I)),
    "split": (lambda m, x: stacked(m, [s.squeeze(1) for s in x.split(1, dim=1)], zeros(x, 0)), (B, T, I)),
    "torch.split": (lambda m, x: stacked(m, [s.squeeze(0) for s in torch.split(x, 1)], zeros(x)), (T, B, I)),
    "chunk": (lambda m, x: stacked(m, [s.squeeze(0) for s in x.chunk(len(x))], zeros(x)), (T, B, I)),
    "x[t : t + 1]": (lambda m, x: stacked(m, [x[t : t + 1].squeeze(0) for t in range(len(x))], zeros(x)), (T, B, I)),
    "select": (lambda m, x: stacked(m, [x.select(0, t) for t in range(len(x))], zeros(x)), (T, B, I)),
    "narrow": (lambda m, x: stacked(m, [x.narrow(0, t, 1)[0] for t in range(len(x))], zeros(x)), (T, B, I)),
    "transposed": (lambda m, x: stacked(m, [x.transpose(0, 1)[t] for t in range(x.shape[1])], zeros(x, 0)), (B, T, I)),
    "some of the features": (lambda m, x: stacked(m, [x[t, :, 1:] for t in range(len(x))], zeros(x)), (T, B, I + 1)),
    "some of the steps": (lambda m, x: stacked(m, [x[t] for t in range(1, 4)], zeros(x)), (T, B, I)),
    "every second step": (lambda m, x: stacked(m, [x[t] for t in range(0, T, 2)], zeros(x)), (T, B, I)),
    "the same input in every step": (lambda m, x: stacked(m, [x] * 4, zeros(x, 0)), (B, I)),
    "the same slice in every step": (lambda m, x: stacked(m, [x[1]] * 4, zeros(x)), (T, B, I)),
    "negative indices": (lambda m, x: stacked(m, [x[-t] for t in range(1, T)], zeros(x)), (T, B, I)),
    "last state alone": (last_alone, (T, B, I)),
    "reversed time": (reversed_time, (T, B, I)),
    "reversed output": (reversed_output, (T, B, I)),
    "flipped": (flipped, (T, B, I)),
    "first state in the output": (with_first_state, (T, B, I)),
    "cat along the batch": (
        lambda m, x: torch.cat([*stacked(m, x, zeros(x)), zeros(x)]), (T, B, I),
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(layout):
    loop, size = LAYOUTS[layout]
    graph = check(Model(loop), x_of(*size), gru=1)
    assert graph.calls["torch.gru_cell"] == 0 and len(graph.gm.graph.nodes) < 24
    assert [r.rewritten for r in graph.records] == [True]


def cat_of(dim):
    def loop(m, x):
        h, outputs = zeros(x), []
        for step in x:
            h = m.cell(step, h)
            outputs.append(h)
        return torch.cat(outputs, dim)

    return loop


@pytest.mark.parametrize("index", [None, (None,), (None, ...), (slice(None), None)], ids=str)
def test_cat_of_states_with_a_new_dimension(index):
    def loop(m, x):
        h, outputs = zeros(x), []
        for step in x:
            h = m.cell(step, h)
            outputs.append(h[index])
        return torch.cat(outputs, outputs[0].shape.index(1))

    graph = check(Model(loop), x_of(T, B, I), gru=1)
    assert not any(str(n.target).endswith("select.int") for n in graph.gm.graph.nodes)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_cat_along_a_dimension_of_the_states(dim):
    graph = check(Model(cat_of(dim)), x_of(T, B, I), gru=1)
    assert not any(str(n.target).endswith("select.int") for n in graph.gm.graph.nodes)


@pytest.mark.parametrize("loop", ["stacked", "preallocated"])
def test_no_node_of_a_step_is_left(loop):
    model = Model(LAYOUTS["x[t]"][0] if loop == "stacked" else preallocated)
    sizes = {len(check(model, x_of(n, B, I), gru=1).gm.graph.nodes) for n in (2, 7, 20)}
    assert len(sizes) == 1


@pytest.mark.parametrize("bias", [True, False])
def test_biases_and_dtype(bias):
    check(Model(LAYOUTS["x[t]"][0], bias=bias), x_of(T, B, I), gru=1)


def test_unbatched_input():
    def loop(m, x):
        h, outputs = x.new_zeros(H), []
        for step in x:
            h = m.cell(step, h)
            outputs.append(h)
        return torch.stack(outputs), h

    check(Model(loop), x_of(T, I), gru=1)


def three_dimensions(m, x):
    h, outputs = x.new_zeros(1, x.shape[1], H), []
    for step in x:
        h = m.cell(step, h[0]).unsqueeze(0)
        outputs.append(h)
    return torch.cat(outputs), h


def three_dimensions_squeezed(m, x):
    h, outputs = x.new_zeros(1, x.shape[1], H), []
    for step in x.unsqueeze(2).unbind(0):
        h = m.cell(step.squeeze(1), h.squeeze(0))[None]
        outputs.append(h[0])
    return torch.stack(outputs), h


def three_dimensions_in_the_middle(m, x):
    h, outputs = x.new_zeros(x.shape[1], 1, H), []
    for step in x:
        h = m.cell(step, h[:, 0])[:, None, :]
        outputs.append(h)
    return torch.cat(outputs, 1), h


def three_dimensions_reset(m, x):
    h = x.new_zeros(1, x.shape[1], H)
    for t, step in enumerate(x):
        h = m.cell(step, (h[0] * (x[t, :, :1] > 0))).unsqueeze(0)
    return h


@pytest.mark.parametrize(
    "loop", [three_dimensions, three_dimensions_squeezed, three_dimensions_in_the_middle, three_dimensions_reset],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_states_are_kept_with_another_dimension(loop):
    check(Model(loop), x_of(T, B, I), gru=1)


def test_one_step_is_a_cell():
    check(Model(LAYOUTS["x[t]"][0]), x_of(1, B, I), gru_cell=1)


def test_dynamic_batch():
    x = x_of(T, B, I)
    torch._dynamo.mark_dynamic(x, 1)
    check(Model(LAYOUTS["x[t]"][0]), x, gru=1)


def test_h0_is_given_as_part_of_a_tensor():
    def loop(m, x, h0):
        return stacked(m, x, h0[0])

    check(Model(loop), x_of(T, B, I), x_of(2, B, H), gru=1)


# ---- uses of the states in between -------------------------------------------------------------------------------------------


def heads(m, x):
    h, outputs = zeros(x), []
    for step in x:
        h = m.cell(step, h)
        outputs.append(m.out(h))
    return torch.stack(outputs), h


def all_uses(m, x):
    h, outputs = zeros(x), []
    for step in x:
        h = m.cell(step, h)
        outputs.append(h)
    return torch.stack(outputs), torch.stack(outputs, 1), outputs[1], outputs[2][:, 1:], outputs[-1], torch.stack(outputs[1:4])


def embedded_in_the_loop(m, x):
    h, outputs = zeros(x), []
    for step in x:
        h = m.cell(torch.sin(step) + 1, h)
        outputs.append(h)
    return torch.stack(outputs)


def preallocated(m, x):
    h = zeros(x)
    outputs = x.new_zeros(len(x), x.shape[1], H)
    for t in range(len(x)):
        h = m.cell(x[t], h)
        outputs[t] = h
    return outputs


def preallocated_slices(m, x):
    h = zeros(x)
    outputs = x.new_empty(x.shape[1], len(x), H)
    for t in range(len(x)):
        h = m.cell(x[t], h)
        outputs[:, t : t + 1] = h.unsqueeze(1)
    return outputs


def preallocated_in_the_middle(m, x):
    h = zeros(x)
    outputs = x.new_zeros(x.shape[1], len(x) + 2, H)
    for t in reversed(range(len(x))):
        h = m.cell(x[t], h)
        outputs[:, t + 1] = h
    return outputs


def preallocated_and_read(m, x):
    h = zeros(x)
    outputs, seen = x.new_zeros(len(x), x.shape[1], H), []
    for t in range(len(x)):
        h = m.cell(x[t], h)
        outputs[t] = h
        seen.append(outputs.sum(0))
    return outputs, torch.stack(seen)


def two_chains_of_one_cell(m, x):
    a, b = zeros(x), zeros(x) + 1
    for step in x:
        a, b = m.cell(step, a), m.cell(step.flip(0), b)
    return a, b


def one_after_the_other(m, x):
    return last_alone(m, x), stacked(m, x.flip(0), last_alone(m, x))


def branches(m, x):
    trunk = m.cell(x[1], m.cell(x[0], zeros(x)))
    return m.cell(x[3], m.cell(x[2], trunk)), m.cell(x[4], m.cell(x[3], trunk))


@pytest.mark.parametrize(
    ("loop", "calls"),
    [(heads, 1), (all_uses, 1), (embedded_in_the_loop, 1), (preallocated, 1), (preallocated_slices, 1),
     (preallocated_in_the_middle, 1), (preallocated_and_read, 1), (two_chains_of_one_cell, 2),
     (one_after_the_other, 2), (branches, 2)],
    ids=lambda p: getattr(p, "__name__", ""),
)  # fmt: skip
def test_every_use_of_a_state_sees_it(loop, calls):
    check(Model(loop), x_of(T, B, I), gru=calls)


def test_results_do_not_share_memory_that_they_did_not_share():
    def loop(m, x):
        h, outputs = zeros(x), []
        for step in x:
            h = m.cell(step, h)
            outputs.append(h)
        return torch.stack(outputs), torch.stack(outputs), outputs[0], outputs[-1]

    model = Model(loop).double()
    with torch.no_grad():
        compiled, graph = compiled_graph(model, x_of(T, B, I))
        results = compiled(x_of(T, B, I))
    assert graph.gru == 1
    memory = [r.untyped_storage().data_ptr() for r in results]
    assert len(set(memory)) == len(memory)


# ---- several layers ----------------------------------------------------------------------------------------------------------


def layers_in_one_loop(m, x):
    states = [zeros(x) for _ in m.cells]
    outputs = []
    for step in x:
        for layer, cell in enumerate(m.cells):
            step = states[layer] = cell(step, states[layer])
        outputs.append(step)
    return torch.stack(outputs), torch.stack(states)


def layer_after_layer(m, x):
    steps = x.unbind(0)
    for cell in m.cells:
        h, outputs = zeros(x), []
        for step in steps:
            h = cell(step, h)
            outputs.append(h)
        steps = outputs
    return torch.stack(steps)


def with_dropout_between(m, x):
    first, second = zeros(x), zeros(x)
    for step in x:
        first = m.cells[0](step, first)
        second = m.cells[1](torch.dropout(first, 0.0, True), second)
    return second


def first_layer_is_needed(m, x):
    a, b = zeros(x), zeros(x)
    for step in x:
        a = m.cells[0](step, a)
        b = m.cells[1](a, b)
        step = a
    return a, b


def first_output_is_needed(m, x):
    a, b, outputs = zeros(x), zeros(x), []
    for step in x:
        a = m.cells[0](step, a)
        b = m.cells[1](a, b)
        outputs.append(a)
    return torch.stack(outputs), b


def second_layer_starts_with_the_first(m, x):
    outputs, a = [], zeros(x)
    for step in x:
        a = m.cells[0](step, a)
        outputs.append(a)
    b = a
    for step in outputs:
        b = m.cells[1](step, b)
    return b


@pytest.mark.parametrize(
    ("loop", "layers", "calls"),
    [(layers_in_one_loop, 3, 1), (layer_after_layer, 3, 1), (first_layer_is_needed, 2, 1), (first_output_is_needed, 2, 2),
     (second_layer_starts_with_the_first, 2, 2), (with_dropout_between, 2, 2)],
    ids=lambda p: getattr(p, "__name__", ""),
)  # fmt: skip
def test_layers(loop, layers, calls):
    graph = check(Model(loop, layers=layers), x_of(T, B, I), gru=calls)
    assert [r.rewritten for r in graph.records] == [True] * layers
    names = {n.name for n in graph.gm.graph.nodes}
    assert {r.node for r in graph.records} <= names


def test_layers_with_and_without_biases_are_two_calls():
    model = Model(layers_in_one_loop, layers=2)
    model.cells[1] = nn.GRUCell(H, H, bias=False)
    check(model, x_of(T, B, I), gru=2)


# ---- what must stay as it is -------------------------------------------------------------------------------------------------


def feeds_itself(m, x):
    h = zeros(x)
    step = x[0]
    for _ in range(4):
        h = m.cell(step, h)
        step = m.out(h)
    return h


def feeds_itself_in_layers(m, x):
    a, b = zeros(x), zeros(x)
    for _ in range(3):
        a = m.feed(b, a)
        b = m.feed(a, b)
    return a, b


def attends(m, x):
    h = zeros(x)
    for _ in range(3):
        weights = torch.softmax((m.out(h) * x).sum(-1), 0)
        h = m.cell((weights[..., None] * x).sum(0), h)
    return h


def changes_the_state(m, x):
    h = zeros(x)
    for step in x:
        h = m.cell(step, h) * 0.5
    return h


def detaches(m, x):
    h = zeros(x)
    for step in x:
        h = m.cell(step, h).detach()
    return m.cell(x[0], h)


def changes_the_state_in_place(m, x):
    h = zeros(x)
    for step in x:
        h = m.cell(step, h)
        h.mul_(0.5)
    return h


def other_weights_each_step(m, x):
    h = zeros(x)
    for t, cell in enumerate(m.cells):
        h = cell(x[t], h)
    return h


def reads_what_it_writes(m, x):
    x = x.clone()
    h = zeros(x)
    for t in range(3):
        h = m.cell(x[t], h)
        x[t + 1] = m.out(h)
    return h


def random_inputs_and_outputs(m, x):
    h, outputs = zeros(x), []
    for step in x:
        h = m.cell(torch.dropout(step, 0.5, True), h)
        outputs.append(torch.dropout(h, 0.5, True))
    return torch.stack(outputs)


def other_modes(m, x):
    h = zeros(x)
    for t in range(3):
        with torch.set_grad_enabled(t != 1):
            h = m.cell(x[t], h)
    return h


STAY = {
    "x depends on h": (feeds_itself, "its input at a step depends on the hidden state of the step before"),
    "two cells feed each other": (feeds_itself_in_layers, ""),
    "attention": (attends, "its input at a step depends on the hidden state of the step before"),
    "h is changed": (changes_the_state, "the hidden state is changed between two steps (by mul)"),
    "h is detached": (detaches, "the hidden state is changed between two steps (by detach)"),
    "h is changed in place": (changes_the_state_in_place, "changed in place between the steps"),
    "other weights each step": (other_weights_each_step, "the weights differ from those of the step before"),
    "x is written in between": (reads_what_it_writes, ""),
    "random numbers in another order": (random_inputs_and_outputs, "random numbers are drawn"),
    "gradients switched in between": (other_modes, "an operation of unknown effect"),
}


@pytest.mark.parametrize("guard", STAY)
def test_stays(guard):
    loop, reason = STAY[guard]
    model, x = Model(loop, layers=3), x_of(T, B, H if loop is feeds_itself_in_layers else I)
    if guard == "other weights each step":
        model.cells = nn.ModuleList(nn.GRUCell(I, H) for _ in range(3))
    if guard == "random numbers in another order":
        compiled, graph = compiled_graph(model.double(), x)
        torch.manual_seed(1)
        actual = tensors(compiled(x))
        torch.manual_seed(1)  # the same numbers, in the same order
        assert_same(actual, tensors(model(x)), 1e-12)
    elif guard in ("h is changed in place", "x is written in between"):
        with torch.no_grad():  # torch itself has no gradient for them
            compiled, graph = compiled_graph(model.double(), x)
            assert_same(tensors(compiled(x)), tensors(model(x)), 1e-12)
    else:
        graph = check(model, x, gru_cell=sum(1 for _ in calls_of_cells(model, x)))
    assert graph.gru == 0
    assert any(reason in r for r in graph.reasons), graph.reasons
    [loop_record] = [r for r in graph.records if r.found.startswith("loop of")][:1]
    assert "test_rollup_loops.py" in loop_record.source and not loop_record.rewritten


def calls_of_cells(model, x):
    """One element for each call of a cell in eager PyTorch."""
    calls = []
    handles = [m.register_forward_hook(lambda *_: calls.append(1)) for m in model.modules() if isinstance(m, nn.GRUCell)]
    model.double()(x)
    for handle in handles:
        handle.remove()
    return calls


def test_a_state_without_its_tangent_stays():
    """The weights and the input have no gradients, but the input has a tangent, which `detach` takes off."""
    model = Model(detaches).double().requires_grad_(False)
    x, tangent = torch.randn(2, T, B, I, dtype=torch.float64)

    def directional(x, tangent):
        return torch.func.jvp(model, (x,), (tangent,))

    compiled, graph = compiled_graph(directional, x, tangent)
    assert graph.gru == 0 and any("(by detach)" in r for r in graph.reasons)
    assert_same(compiled(x, tangent), directional(x, tangent), 1e-12)


def test_part_of_a_loop_is_rolled_up():
    def loop(m, x):
        h = zeros(x)
        for t in range(3):  # the known beginning of a sequence
            h = m.cell(x[t], h)
        for _ in range(2):  # then what the model says
            h = m.cell(m.out(h), h)
        return h

    graph = check(Model(loop), x_of(T, B, I), gru=1, gru_cell=2)
    assert any("depends on the hidden state" in r for r in graph.reasons)


def test_left_to_inductor_on_a_cpu_where_it_stays(monkeypatch):
    from torch_gru_fuse.passes import guards

    monkeypatch.setattr(guards, "GUARDS", (*guards.POSSIBLE, guards.profitable))
    check(Model(LAYOUTS["x[t]"][0]), x_of(T, B, I), gru=1)
    graph = check(Model(feeds_itself), x_of(T, B, I))
    assert any(r == guards.CELL_ON_CPU for r in graph.reasons)


# ---- through the compiler ----------------------------------------------------------------------------------------------------


@pytest.mark.versions
@pytest.mark.parametrize("loop", [all_uses, preallocated], ids=lambda f: f.__name__)
def test_compiled_by_inductor(loop):
    model, x = Model(loop), torch.randn(T, B, I, requires_grad=True)
    inputs = [*model.parameters(), x]
    with torch_gru_fuse.enable():
        actual = value_and_grads(torch.compile(model, fullgraph=True), (x,), inputs)
    assert_same(actual, value_and_grads(model, (x,), inputs), 2e-5)
    assert [r.target for r in torch_gru_fuse.rewrites()] == ["gru"]


def test_exported():
    from torch_gru_fuse.passes.rewrite import rewrite

    model, x = Model(layers_in_one_loop, layers=2).double(), x_of(T, B, I)
    program = torch.export.export(model, (x,))
    assert rewrite(program.graph_module) == 2  # two loops, one call
    assert_same(tensors(program.module()(x)), tensors(model(x)), 1e-12)


# ---- random loops ------------------------------------------------------------------------------------------------------------

READ = {
    "x[t]": lambda x: [x[t] for t in range(len(x))],
    "unbind": lambda x: list(x.unbind(0)),
    "split": lambda x: [s.squeeze(0) for s in x.split(1)],
    "batch first": lambda x: [x.transpose(0, 1).contiguous()[:, t] for t in range(len(x))],
    "computed": lambda x: [x[t] * 2 for t in range(len(x))],
}
KEEP = {
    "stack": lambda hs: torch.stack(hs),
    "stack 1": lambda hs: torch.stack(hs, dim=1),
    "cat": lambda hs: torch.cat([h.unsqueeze(0) for h in hs]),
    "last": lambda hs: hs[-1],
    "sum": lambda hs: sum(hs),
    "list": lambda hs: list(hs),
    "some": lambda hs: [torch.stack(hs[1:]), hs[0] * 2],
}


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(
    st.sampled_from(sorted(READ)), st.sampled_from(sorted(KEEP)), st.sampled_from(sorted(KEEP)), st.integers(2, 6),
    st.integers(1, 3), st.booleans(), st.lists(st.sampled_from(["none", "feed", "scale"]), min_size=6, max_size=6),
)  # fmt: skip
def test_any_loop(read, keep, also_keep, steps, layers, backwards, disturbances):
    """Whatever is read, kept and done in between: the results and gradients are those of eager PyTorch."""

    def loop(m, x):
        states = [zeros(x) for _ in m.cells]
        kept, first = [], []
        inputs = READ[read](x)
        for t, step in enumerate(reversed(inputs) if backwards else inputs):
            if disturbances[t] == "feed":
                step = step + m.out(states[-1])
            if disturbances[t] == "scale":
                states[0] = states[0] * 0.5
            for layer, cell in enumerate(m.cells):
                step = states[layer] = cell(step, states[layer])
            kept.append(step)
            first.append(states[0])
        results = [KEEP[keep](kept), KEEP[also_keep](first)]
        return tensors(results)

    torch.manual_seed(0)
    model, x = Model(loop, layers).double(), x_of(steps, B, I)
    inputs = [*model.parameters(), x]
    expected = value_and_grads(model, (x,), inputs)
    compiled, graph = compiled_graph(model, x)
    assert_same(value_and_grads(compiled, (x,), inputs), expected, 1e-12)
    if disturbances[1:steps] == ["none"] * (steps - 1):
        assert 1 <= graph.gru <= layers and graph.gru_cell == 0
