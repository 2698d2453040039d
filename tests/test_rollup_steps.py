"""Models that call nn.GRU once a time step, or once for some of them, become one call of the sequence op, in the ways in which
they are written, or are left alone."""


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


# ---- chunks of several time steps --------------------------------------------------------------------------------------------


def chunks(m, x, h=None):
    outputs = []
    for chunk in x.split(2, 1):
        output, h = m.gru(chunk, h)
        outputs.append(output)
    return torch.cat(outputs, 1), h


def chunks_by_index(m, x, h=None):
    outputs = []
    for start, stop in ((0, 1), (1, 3), (3, x.shape[1])):
        output, h = m.gru(x[:, start:stop], h)
        outputs.append(output)
    return torch.cat(outputs, 1), h


def computed_chunks(m, x, h=None):
    outputs = []
    for chunk in x.chunk(3, 1):
        output, h = m.gru(torch.relu(chunk), h)
        outputs.append(output.sum(1))
    return torch.stack(outputs), h


def heads_of_chunks(m, x, h=None):
    outputs = []
    for chunk in x.tensor_split(2, 1):
        output, h = m.gru(chunk, h)
        outputs.append(m.out(output))
    return torch.cat(outputs, 1), outputs[0]


def last_chunk_alone(m, x, h=None):
    for chunk in x.split(2, 1):
        output, h = m.gru(chunk, h)
    return output, h


def ends_of_chunks(m, x, h=None):
    ends, tops = [], []
    for chunk in x.split(2, 1):
        output, h = m.gru(chunk, h)
        ends.append(output[:, -1])
        tops += [m.out(h[-1:]), h[-1:]]
    return torch.stack(ends, 1), torch.cat(tops[::2]), torch.cat(tops[1::2]), ends[0] * 2


def chunks_backwards(m, x, h=None):
    outputs = []
    for chunk in reversed(x.split(2, 1)):
        output, h = m.gru(chunk, h)
        outputs.insert(0, output)
    return torch.cat(outputs, 1), h


def chunks_and_single_steps(m, x, h=None):
    output, h = m.gru(x[:, :3], h)
    outputs = [output]
    for t in range(3, x.shape[1]):
        output, h = m.gru(x[:, t].unsqueeze(1), h)
        outputs.append(output)
    return torch.cat(outputs, 1), h


def preallocated_chunks(m, x, h=None):
    outputs = x.new_empty(x.shape[0], x.shape[1], H)
    for t in range(0, x.shape[1], 2):
        outputs[:, t : t + 2], h = m.gru(x[:, t : t + 2], h)
    return outputs, h


def chunks_of_a_new_dimension(m, x, h=None):
    x, outputs = x[:, :4].reshape(x.shape[0], 2, 2, I), []
    for i in range(2):
        output, h = m.gru(x[:, i], h)
        outputs.append(output)
    return torch.stack(outputs, 1), h


CHUNKS = (chunks, chunks_by_index, computed_chunks, heads_of_chunks, last_chunk_alone, ends_of_chunks, chunks_backwards,
          chunks_and_single_steps, preallocated_chunks, chunks_of_a_new_dimension)  # fmt: skip


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("given", [False, True], ids=["no h0", "h0"])
@pytest.mark.parametrize("way", CHUNKS, ids=lambda f: f.__name__)
def test_chunks(way, given, layers):
    h = [x_of(layers, B, H)] if given else []
    graph = check(Model(way, layers), x_of(B, 5, I), *h, gru=1)
    [record] = graph.records
    number = 2 if way in (heads_of_chunks, chunks_of_a_new_dimension) else 3
    assert record.name == f"loop of {number} chunks over torch.gru" and record.rewritten


def time_major_chunks(m, x, h=None):
    outputs = []
    for chunk in x.split(2):
        output, h = m.gru(chunk, h)
        outputs.append(output)
    return torch.cat(outputs), h


def time_major_ends(m, x, h=None):
    outputs = x.new_zeros(len(x), x.shape[1], H)
    ends = []
    for t in range(0, len(x), 2):
        output, h = m.gru(x[t : t + 2], h)
        outputs[t : t + 2] = output
        ends.append(output[-1])
    return outputs, torch.stack(ends), h


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("way", [time_major_chunks, time_major_ends], ids=lambda f: f.__name__)
def test_time_major_chunks(way, layers):
    check(Model(way, layers, batch_first=False), x_of(5, B, I), gru=1)


def chunk_state_from_the_output(m, x):
    h, outputs = None, []
    for chunk in x.split(2, 1):
        output, _ = m.gru(chunk, h)
        h = output[:, -1:].transpose(0, 1)
        outputs.append(output)
    return torch.cat(outputs, 1), h


def chunk_state_of_two_dimensions(m, x):
    h, outputs = x.new_zeros(x.shape[0], H), []
    for chunk in x.split(2, 1):
        output, _ = m.gru(chunk, h[None])
        h = output[:, -1, :]
        outputs.append(output)
    return torch.cat(outputs, 1), h


def time_major_state_from_the_output(m, x):
    h, outputs = None, []
    for chunk in x.split(2):
        output, _ = m.gru(chunk, h)
        h = output[-1:]
        outputs.append(output)
    return torch.cat(outputs), h


def first_step_of_the_output_as_state(m, x):
    h, outputs = None, []
    for chunk in x.split(2, 1):
        output, _ = m.gru(chunk, h)
        h = output[:, :1].transpose(0, 1)
        outputs.append(output)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize(
    ("way", "calls"),
    [(chunk_state_from_the_output, 1), (chunk_state_of_two_dimensions, 1), (time_major_state_from_the_output, 1),
     (first_step_of_the_output_as_state, 3)],
    ids=lambda p: getattr(p, "__name__", ""),
)  # fmt: skip
def test_states_of_chunks_from_their_outputs(way, calls):
    batch_first = way is not time_major_state_from_the_output
    check(Model(way, batch_first=batch_first), x_of(*((B, 5) if batch_first else (5, B)), I), gru=calls)


@pytest.mark.parametrize("way", [chunks, preallocated_chunks, last_chunk_alone], ids=lambda f: f.__name__)
def test_no_node_of_a_chunk_is_left(way):
    sizes = {len(check(Model(way), x_of(B, n, I), gru=1).gm.graph.nodes) for n in (3, 6, 11)}
    assert len(sizes) == 1


def test_chunks_and_a_dynamic_batch():
    x = x_of(B, 5, I)
    torch._dynamo.mark_dynamic(x, 0)
    check(Model(chunks), x, gru=1)


def detached_chunks(m, x, h=None):
    outputs = []
    for chunk in x.split(2, 1):
        output, h = m.gru(chunk, h)
        h = h.detach()
        outputs.append(output)
    return torch.cat(outputs, 1), h


def without_gradients(m, x, h=None):
    with torch.no_grad():
        return detached_chunks(m, x, h)


def test_detach_is_looked_through_where_there_are_no_gradients():
    model, x = Model(detached_chunks, layers=2).double(), torch.randn(B, 5, I, dtype=torch.float64)
    with torch.no_grad():
        compiled, graph = compiled_graph(model, x)
        assert_same(tensors(compiled(x)), tensors(model(x)), 1e-12)
    assert graph.gru == 1
    inside = Model(without_gradients, layers=2).double()
    compiled, graph = compiled_graph(inside, x)
    assert graph.gru == 1 and not any(r.requires_grad for r in tensors(compiled(x)))
    assert_same(tensors(compiled(x)), tensors(inside(x)), 1e-12)
    model.requires_grad_(False)
    x.requires_grad_()
    compiled, graph = compiled_graph(model, x)
    assert_same(value_and_grads(compiled, (x,), [x]), value_and_grads(model, (x,), [x]), 1e-12)
    assert graph.gru == 3 and any("(by detach)" in r for r in graph.reasons)


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


def two_stacked_in_chunks(m, x):
    lower, upper, outputs = None, None, []
    for chunk in x.split(3, 1):
        output, lower = m.gru(chunk, lower)
        output, upper = m.upper(output, upper)
        outputs.append(output)
    return torch.cat(outputs, 1), upper


def all_uses_of_chunks(m, x):
    h, outputs, states = None, [], []
    for chunk in x.split(2, 1):
        output, h = m.gru(chunk, h)
        outputs.append(output)
        states.append(h)
    return torch.cat(outputs, 1), torch.cat(states), outputs[1] * 2, states[0].sum(0), torch.cat(outputs[:1] * 2, 1), h, outputs


def two_side_by_side(m, x):
    a, b, outputs = None, None, []
    for t in range(x.shape[1]):
        first, a = m.gru(x[:, t : t + 1], a)
        second, b = m.other(x[:, t : t + 1], b)
        outputs.append(torch.cat((first, second), -1))
    return torch.cat(outputs, 1)


def two_directions(m, x):
    a, b, forwards, backwards = None, None, [], []
    for t in range(x.shape[1]):
        first, a = m.gru(x[:, t : t + 1], a)
        forwards.append(first)
    for t in reversed(range(x.shape[1])):
        second, b = m.other(x[:, t : t + 1], b)
        backwards.append(second)
    return torch.stack([torch.cat((f[:, 0], b[:, 0]), -1) for f, b in zip(forwards, backwards[::-1], strict=True)], 1)


def encoder_and_decoder(m, x):
    _, h = m.other(x)
    return batch_first(m, x.flip(1), h)


def after_a_loop_over_a_loop(m, x):
    _, h = batch_first(m, x)
    return batch_first(m, x * 2, h.relu())


@pytest.mark.parametrize(
    ("way", "calls"),
    [(all_uses, 1), (all_uses_of_chunks, 1), (two_stacked, 1), (two_stacked_in_chunks, 1),
     (two_side_by_side, 2), (encoder_and_decoder, 2), (after_a_loop_over_a_loop, 2)],
    ids=lambda p: getattr(p, "__name__", ""),
)
def test_every_use_of_a_result_sees_it(way, calls):
    check(Model(way), x_of(B, T, I), gru=calls)


@pytest.mark.parametrize("way", [two_side_by_side, two_directions], ids=lambda f: f.__name__)
def test_no_node_of_a_step_is_left_of_two_side_by_side(way):
    assert len({len(check(Model(way), x_of(B, n, I), gru=2).gm.graph.nodes) for n in (2, 4, 7)}) == 1


@pytest.mark.parametrize("way", [two_stacked, two_stacked_in_chunks], ids=lambda f: f.__name__)
def test_layers_of_two_modules_are_one_call(way):
    graph = check(Model(way, layers=2), x_of(B, T, I), gru=1)
    [call] = [n for n in graph.gm.graph.nodes if n.target is torch.ops.torch_gru_fuse.gru.default]
    assert call.args[4] == 3


def whole_and_a_step(m, x):
    outputs, h = [], None
    for step in x.split(1):
        output, h = m.gru(step, h)
        outputs.append(output)
    return torch.cat(outputs), outputs[-1], h


def a_chunk_and_its_state(m, x):
    outputs, states, h = [], [], None
    for chunk in x.split(2):
        output, h = m.gru(chunk, h)
        outputs.append(output)
        states.append(h)
    return torch.cat(outputs), outputs[0], states[0], h


@pytest.mark.parametrize("way", [time_major, whole_and_a_step, a_chunk_and_its_state], ids=lambda f: f.__name__)
def test_results_do_not_share_memory_that_they_did_not_share(way):
    model = Model(way, batch_first=False).double()
    with torch.no_grad():
        compiled, graph = compiled_graph(model, x_of(T, B, I))
        results = compiled(x_of(T, B, I))
    assert graph.gru == 1
    assert len({r.untyped_storage().data_ptr() for r in results}) == len(results)


# ---- through the compiler ----------------------------------------------------------------------------------------------------


@pytest.mark.versions
@pytest.mark.parametrize("way", [batch_first, heads, all_uses, heads_of_chunks, all_uses_of_chunks], ids=lambda f: f.__name__)
def test_compiled_by_inductor(way):
    model, x = Model(way, layers=1 if way in (all_uses, all_uses_of_chunks) else 2), torch.randn(B, T, I, requires_grad=True)
    inputs = [*model.gru.parameters(), x]
    with torch_gru_fuse.enable():
        actual = value_and_grads(torch.compile(model, fullgraph=True), (x,), inputs)
    assert_same(actual, value_and_grads(model, (x,), inputs), 2e-5)
    unit = "2 chunks" if way in (heads_of_chunks, all_uses_of_chunks) else f"{T} steps"
    assert [r.name for r in torch_gru_fuse.rewrites()] == [f"loop of {unit} over torch.gru"]


@pytest.mark.parametrize("way", [batch_first, chunks], ids=lambda f: f.__name__)
def test_exported(way):
    from torch_gru_fuse.passes.rewrite import rewrite

    model, x = Model(way, layers=2).double(), x_of(B, T, I)
    program = torch.export.export(model, (x,))
    assert rewrite(program.graph_module) == 1
    assert_same(tensors(program.module()(x)), tensors(model(x)), 1e-12)
