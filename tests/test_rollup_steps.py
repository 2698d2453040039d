"""Models that call nn.GRU once a time step become one call of the sequence op, in the ways in which they are written, or are
left alone."""

import pytest
import torch
from problems import assert_same, tensors
from rollup import check, compiled_graph, value_and_grads, x_of
from torch import nn

import torch_gru_fuse

T, B, I, H = 4, 3, 5, 6


class Model(nn.Module):
    """A GRU, a second one with an input of the size of its output, a head and a loop."""

    def __init__(self, loop, layers=1, batch_first=True, **options):
        super().__init__()
        self.gru = nn.GRU(I, H, layers, batch_first=batch_first, **options)
        self.upper = nn.GRU(H, H, batch_first=batch_first)
        self.other = nn.GRU(I, H, layers, batch_first=batch_first)
        self.out = nn.Linear(H, I)
        self.loop = loop

    def forward(self, *args):
        return self.loop(self, *args)


# ---- ways to write it --------------------------------------------------------------------------------------------------------


def batch_first(m, x, h=None):
    outputs = []
    for t in range(x.shape[1]):
        output, h = m.gru(x[:, t : t + 1], h)
        outputs.append(output)
    return torch.cat(outputs, 1), h


def unsqueezed(m, x, h=None):
    outputs = []
    for t in range(x.shape[1]):
        output, h = m.gru(x[:, t].unsqueeze(1), h)
        outputs.append(output.squeeze(1))
    return torch.stack(outputs, dim=1), h


def time_first_input(m, x, h=None):
    outputs = []
    for step in x.unbind(1):
        output, h = m.gru(step[:, None], h)
        outputs.append(output[:, 0])
    return torch.stack(outputs), h


def split(m, x, h=None):
    outputs = []
    for step in x.split(1, dim=1):
        output, h = m.gru(step, h)
        outputs.append(output)
    return torch.cat(outputs, dim=1), h


def last_alone(m, x, h=None):
    for t in range(x.shape[1]):
        output, h = m.gru(x[:, [t]], h)
    return output, h


def last_state_of_the_top(m, x, h=None):
    tops = []
    for t in range(x.shape[1]):
        _, h = m.gru(x[:, t : t + 1], h)
        tops.append(m.out(h[-1]))
    return torch.stack(tops, 1)


def heads(m, x, h=None):
    outputs = []
    for t in range(x.shape[1]):
        output, h = m.gru(x[:, t : t + 1], h)
        outputs.append(m.out(output))
    return torch.cat(outputs, 1)


def computed(m, x, h=None):
    outputs = []
    for t in range(x.shape[1]):
        output, h = m.gru(torch.relu(x[:, t : t + 1]), h)
        outputs.append(output.sum(1))
    return torch.stack(outputs), h


def backwards(m, x, h=None):
    outputs = []
    for t in reversed(range(x.shape[1])):
        output, h = m.gru(x[:, t : t + 1], h)
        outputs.insert(0, output)
    return torch.cat(outputs, 1), h


def preallocated(m, x, h=None):
    outputs = x.new_zeros(x.shape[0], x.shape[1], H)
    for t in range(x.shape[1]):
        output, h = m.gru(x[:, t : t + 1], h)
        outputs[:, t] = output.squeeze(1)
    return outputs, h


def preallocated_slices(m, x, h=None):
    outputs = x.new_empty(x.shape[0], x.shape[1], H)
    for t in range(x.shape[1]):
        outputs[:, t : t + 1], h = m.gru(x[:, t : t + 1], h)
    return outputs


WAYS = (batch_first, unsqueezed, time_first_input, split, last_alone, last_state_of_the_top, heads, computed, backwards,
        preallocated, preallocated_slices)  # fmt: skip


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("given", [False, True], ids=["no h0", "h0"])
@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_ways(way, given, layers):
    h = [x_of(layers, B, H)] if given else []
    graph = check(Model(way, layers), x_of(B, T, I), *h, gru=1)
    [record] = graph.records
    assert record.name == f"loop of {T} steps over torch.gru" and record.target == "gru" and record.rewritten
    assert "test_rollup_steps.py" in record.source and record.module == "gru (GRU)"


def time_major(m, x, h=None):
    outputs = []
    for step in x:
        output, h = m.gru(step.unsqueeze(0), h)
        outputs.append(output)
    return torch.cat(outputs), h


def time_major_slices(m, x, h=None):
    outputs = []
    for t in range(len(x)):
        output, h = m.gru(x[t : t + 1], h)
        outputs.append(output[0])
    return torch.stack(outputs), h


def from_batch_first(m, x, h=None):
    outputs = []
    for t in range(x.shape[1]):
        output, h = m.gru(x[:, t][None], h)
        outputs.append(output.squeeze(0))
    return torch.stack(outputs, 1), h


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("way", [time_major, time_major_slices, from_batch_first], ids=lambda f: f.__name__)
def test_time_major(way, layers):
    size = (B, T, I) if way is from_batch_first else (T, B, I)
    check(Model(way, layers, batch_first=False), x_of(*size), gru=1)


def keeps_two_dimensions(m, x):
    h, states = x.new_zeros(x.shape[0], H), []
    for t in range(x.shape[1]):
        _, h = m.gru(x[:, t : t + 1], h.unsqueeze(0))
        h = h.squeeze(0)
        states.append(h)
    return torch.stack(states), h


def state_from_the_output(m, x):
    h, states = x.new_zeros(x.shape[0], H), []
    for t in range(x.shape[1]):
        output, _ = m.gru(x[:, t : t + 1], h[None])
        h = output[:, -1]
        states.append(h)
    return torch.stack(states, 1)


def state_is_the_output_transposed(m, x):
    h, outputs = None, []
    for t in range(x.shape[1]):
        output, _ = m.gru(x[:, t : t + 1], h)
        h = output.transpose(0, 1)
        outputs.append(output)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize(
    "way", [keeps_two_dimensions, state_from_the_output, state_is_the_output_transposed], ids=lambda f: f.__name__
)
def test_states_of_other_forms(way):
    check(Model(way), x_of(B, T, I), gru=1)


@pytest.mark.parametrize("layers", [1, 2])
def test_unbatched(layers):
    check(Model(time_major, layers, batch_first=False), x_of(T, I).unsqueeze(1)[:, 0].detach().requires_grad_(), gru=1)


@pytest.mark.parametrize("bias", [True, False])
def test_biases_and_evaluation(bias):
    model = Model(batch_first, layers=2, bias=bias, dropout=0.5).eval()
    graph = check(model, x_of(B, T, I), gru=1)
    [call] = [n for n in graph.gm.graph.nodes if n.target is torch.ops.torch_gru_fuse.gru.default]
    assert call.args[5] == 0


def test_dynamic_batch():
    x, h = x_of(B, T, I), x_of(1, B, H)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(h, 1)
    check(Model(batch_first), x, h, gru=1)
    check(Model(batch_first), x, gru=1)


@pytest.mark.parametrize("way", [batch_first, unsqueezed, preallocated, preallocated_slices], ids=lambda f: f.__name__)
def test_no_node_of_a_step_is_left(way):
    sizes = {len(check(Model(way), x_of(B, n, I), gru=1).gm.graph.nodes) for n in (2, 7, 12)}
    assert len(sizes) == 1


def test_one_step_is_a_call():
    graph = check(Model(batch_first), x_of(B, 1, I), gru=1)
    assert [r.name for r in graph.records] == ["torch.gru"]


# ---- several of them ---------------------------------------------------------------------------------------------------------


def all_uses(m, x):
    h, outputs, states = None, [], []
    for t in range(x.shape[1]):
        output, h = m.gru(x[:, t : t + 1], h)
        outputs.append(output)
        states.append(h)
    return torch.cat(outputs, 1), torch.cat(states), outputs[1] * 2, states[2].sum(0), torch.stack(states[1:3]), h, outputs[-1]


def two_stacked(m, x):
    lower, upper, outputs = None, None, []
    for t in range(x.shape[1]):
        output, lower = m.gru(x[:, t : t + 1], lower)
        output, upper = m.upper(output, upper)
        outputs.append(output)
    return torch.cat(outputs, 1), upper


def two_side_by_side(m, x):
    a, b, outputs = None, None, []
    for t in range(x.shape[1]):
        first, a = m.gru(x[:, t : t + 1], a)
        second, b = m.other(x[:, t : t + 1], b)
        outputs.append(torch.cat((first, second), -1))
    return torch.cat(outputs, 1)


def encoder_and_decoder(m, x):
    _, h = m.other(x)
    return batch_first(m, x.flip(1), h)


def after_a_loop_over_a_loop(m, x):
    _, h = batch_first(m, x)
    return batch_first(m, x * 2, h.relu())


@pytest.mark.parametrize(
    ("way", "calls"),
    [(all_uses, 1), (two_stacked, 1), (two_side_by_side, 2), (encoder_and_decoder, 2), (after_a_loop_over_a_loop, 2)],
    ids=lambda p: getattr(p, "__name__", ""),
)
def test_every_use_of_a_result_sees_it(way, calls):
    check(Model(way), x_of(B, T, I), gru=calls)


def test_layers_of_two_modules_are_one_call():
    graph = check(Model(two_stacked, layers=2), x_of(B, T, I), gru=1)
    [call] = [n for n in graph.gm.graph.nodes if n.target is torch.ops.torch_gru_fuse.gru.default]
    assert call.args[4] == 3


def test_results_do_not_share_memory_that_they_did_not_share():
    def loop(m, x):
        result, h = batch_first(m, x)
        return result, h

    model = Model(loop).double()
    with torch.no_grad():
        compiled, graph = compiled_graph(model, x_of(B, T, I))
        results = compiled(x_of(B, T, I))
    assert graph.gru == 1
    assert len({r.untyped_storage().data_ptr() for r in results}) == len(results)


# ---- what must stay as it is -------------------------------------------------------------------------------------------------


def feeds_itself(m, x):
    step, h, outputs = x[:, :1], None, []
    for _ in range(x.shape[1]):
        output, h = m.gru(step, h)
        step = m.out(output)
        outputs.append(step)
    return torch.cat(outputs, 1)


def changes_the_state(m, x):
    h, outputs = None, []
    for t in range(x.shape[1]):
        output, h = m.gru(x[:, t : t + 1], h)
        h = h * 0.5
        outputs.append(output)
    return torch.cat(outputs, 1)


def detaches(m, x):
    h, outputs = None, []
    for t in range(x.shape[1]):
        output, h = m.gru(x[:, t : t + 1], h)
        h = h.detach()
        outputs.append(output)
    return torch.cat(outputs, 1)


def changes_the_state_in_place(m, x):
    h, outputs = None, []
    for t in range(x.shape[1]):
        output, h = m.gru(x[:, t : t + 1], h)
        h.mul_(0.5)
        outputs.append(output)
    return torch.cat(outputs, 1)


def changes_the_output_in_place(m, x):
    h, outputs = None, []
    for t in range(x.shape[1]):
        output, h = m.gru(x[:, t : t + 1], h)
        outputs.append(output.mul_(2))
    return torch.cat(outputs, 1)


def writes_its_input(m, x):
    x, h = x.clone(), None
    for t in range(x.shape[1] - 1):
        output, h = m.gru(x[:, t : t + 1], h)
        x[:, t + 1 : t + 2] = m.out(output)
    return h


def writes_a_weight(m, x):
    h = None
    for t in range(x.shape[1]):
        _, h = m.gru(x[:, t : t + 1], h)
        m.gru.weight_hh_l0.mul_(0.5)
    return h


def other_weights(m, x):
    h = None
    for t, gru in enumerate((m.gru, m.other) * 2):
        _, h = gru(x[:, t : t + 1], h)
    return h


def several_steps_a_call(m, x):
    h, outputs = None, []
    for t in range(0, x.shape[1], 2):
        output, h = m.gru(x[:, t : t + 2], h)
        outputs.append(output)
    return torch.cat(outputs, 1)


def other_modes(m, x):
    h = None
    for t in range(x.shape[1]):
        with torch.set_grad_enabled(t % 2 == 1):
            _, h = m.gru(x[:, t : t + 1], h)
    return h


def random_inputs_and_outputs(m, x):
    h, outputs = None, []
    for t in range(x.shape[1]):
        output, h = m.gru(torch.dropout(x[:, t : t + 1], 0.5, True), h)
        outputs.append(torch.dropout(output, 0.5, True))
    return torch.cat(outputs, 1)


def keeps_all_states(m, x):
    h, states = None, []
    for t in range(x.shape[1]):
        _, h = m.gru(x[:, t : t + 1], h)
        states.append(h)
    return torch.stack(states)


STAY = {
    "autoregressive": (feeds_itself, {}, "its input at a step depends on the hidden state of the step before"),
    "bidirectional": (last_alone, {"bidirectional": True}, "it is bidirectional"),
    "dropout": (batch_first, {"layers": 2, "dropout": 0.5}, "it draws a dropout mask for each step"),
    "several steps": (several_steps_a_call, {}, "its calls have more than one time step"),
    "other weights": (other_weights, {}, "the weights differ from those of the step before"),
    "h is changed": (changes_the_state, {}, None),
    "h is detached": (detaches, {}, None),
    "h is changed in place": (changes_the_state_in_place, {}, "what it returns is changed in place"),
    "output is changed in place": (changes_the_output_in_place, {}, "what it returns is changed in place"),
    "x is written in between": (writes_its_input, {}, "memory that it reads is changed in place between the steps"),
    "a weight is written in between": (writes_a_weight, {}, "memory that it reads is changed in place between the steps"),
    "gradients switched in between": (other_modes, {}, "an operation of unknown effect"),
    "random numbers in another order": (random_inputs_and_outputs, {}, "random numbers are drawn"),
    "states of lower layers": (keeps_all_states, {"layers": 2}, "the hidden states of its lower layers are used"),
}


@pytest.mark.parametrize("guard", STAY)
def test_stays(guard):
    loop, options, reason = STAY[guard]
    model, x = Model(loop, **options).double(), x_of(B, T, I)
    calls = 2 if guard == "several steps" else 3 if guard == "x is written in between" else T
    if guard in ("dropout", "random numbers in another order"):
        compiled, graph = compiled_graph(model, x)
        if guard != "dropout":  # the masks between layers are drawn by other numbers than eager code's
            torch.manual_seed(1)
            actual = tensors(compiled(x))
            torch.manual_seed(1)
            assert_same(actual, tensors(model(x)), 1e-12)
    elif "written" in guard or "in place" in guard:
        with torch.no_grad():  # torch itself has no gradient for some of them
            before = {name: p.clone() for name, p in model.named_parameters()}
            expected = [t.clone() for t in tensors(model(x))]
            model.load_state_dict(before)
            compiled, graph = compiled_graph(model, x)
            model.load_state_dict(before)
            assert_same(tensors(compiled(x)), expected, 1e-12)
    else:
        graph = check(model, x, gru=calls)
    assert graph.gru == calls
    loops = [r for r in graph.records if r.found.startswith("loop of")]
    assert not any(r.rewritten for r in loops) and bool(loops) == (reason is not None)
    assert reason is None or any(reason in r.reason for r in loops), graph.reasons


def test_part_of_a_loop_is_rolled_up():
    def loop(m, x):
        _, h = batch_first(m, x)  # the known beginning of a sequence
        step = x[:, -1:]
        for _ in range(2):  # then what the model says
            output, h = m.gru(step, h)
            step = m.out(output)
        return step

    graph = check(Model(loop), x_of(B, T, I), gru=2)
    assert any("depends on the hidden state" in r for r in graph.reasons)


# ---- through the compiler ----------------------------------------------------------------------------------------------------


@pytest.mark.versions
@pytest.mark.parametrize("way", [batch_first, heads, all_uses], ids=lambda f: f.__name__)
def test_compiled_by_inductor(way):
    model, x = Model(way, layers=1 if way is all_uses else 2), torch.randn(B, T, I, requires_grad=True)
    inputs = [*model.gru.parameters(), x]
    with torch_gru_fuse.enable():
        actual = value_and_grads(torch.compile(model, fullgraph=True), (x,), inputs)
    assert_same(actual, value_and_grads(model, (x,), inputs), 2e-5)
    assert [r.name for r in torch_gru_fuse.rewrites()] == [f"loop of {T} steps over torch.gru"]


def test_exported():
    from torch_gru_fuse.passes.rewrite import rewrite

    model, x = Model(batch_first, layers=2).double(), x_of(B, T, I)
    program = torch.export.export(model, (x,))
    assert rewrite(program.graph_module) == 1
    assert_same(tensors(program.module()(x)), tensors(model(x)), 1e-12)
