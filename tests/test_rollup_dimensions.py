"""Hand-written cells, and loops over them, whose states have more dimensions than [B, H]."""

import pytest
import torch
from problems import assert_same
from rollup import check, compiled_graph, value_and_grads, x_of
from test_rollup_cells import B, H, I, Model, T
from torch import nn

pytestmark = pytest.mark.usefixtures("cells_on_cpu")


def on_the_last_dimension(m, x, h):
    x_r, x_z, x_n = m.x3(x).chunk(3, -1)
    h_r, h_z, h_n = m.h3(h).chunk(3, -1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    return (1 - z) * torch.tanh(x_n + r * h_n) + z * h


class Leading(Model):
    """A cell on states [.., H] of `sizes`, whose input depends on the state before or does not, as world models have it."""

    def __init__(self, sizes, depends=True):
        super().__init__(on_the_last_dimension)
        self.sizes, self.depends = sizes, depends

    def forward(self, x):
        h, outputs = x.new_zeros(*self.sizes, H), []
        for step in x:
            step = step + self.norm(h)[..., :I] if self.depends else step
            h = self.cell(self, step, h)
            outputs.append(h)
        return torch.stack(outputs), h


SIZES = pytest.mark.parametrize("sizes", [(1, B), (B, 1), (1, 1), (4, B), (2, 1, B)], ids=str)


@SIZES
def test_dimensions_before_the_hidden_one(sizes):
    graph = check(Leading(sizes, depends=False), x_of(T, *sizes, I), gru=1)
    assert [r.name for r in graph.records] == [f"loop of {T} steps over a hand-written cell"]


@SIZES
def test_dimensions_before_the_hidden_one_where_the_input_depends_on_the_state(sizes):
    graph = check(Leading(sizes), x_of(T, *sizes, I), gru_cell=T)
    assert graph.reasons == ["its input at a step depends on the hidden state of the step before"]


class KeepsLayout(Model):
    """A cell on states in the layout of nn.GRU, a second one above it, a head, a cell by nn.GRU before it, and a loop."""

    def __init__(self, run):
        super().__init__(on_the_last_dimension)
        self.upper = nn.ModuleDict({"x3": nn.Linear(H, 3 * H), "h3": nn.Linear(H, 3 * H)})
        self.encoder, self.out, self.run = nn.GRU(I, H), nn.Linear(H, I), run

    def above(self, x, h):
        r_z, n = self.upper["x3"](x).split((2 * H, H), -1)
        h_r_z, h_n = self.upper["h3"](h).split((2 * H, H), -1)
        r, z = torch.sigmoid(r_z + h_r_z).chunk(2, -1)
        return (1 - z) * torch.tanh(n + r * h_n) + z * h

    def forward(self, x):
        return self.run(self, x)


def first(x):
    return x.new_zeros(1, x.shape[1], H)


def in_slices(m, x):
    h, outputs = first(x), []
    for t in range(len(x)):
        h = m.cell(m, x[t : t + 1], h)
        outputs.append(h)
    return torch.cat(outputs), h


def unsqueezed(m, x):
    h, outputs = first(x), []
    for step in x:
        h = m.cell(m, step.unsqueeze(0), h)
        outputs.append(h[0])
    return torch.stack(outputs), h


def broadcast(m, x):
    h, outputs = first(x), []
    for step in x:
        h = m.cell(m, step, h)
        outputs.append(h)
    return torch.cat(outputs, 0), h


def split(m, x):
    h, outputs = first(x), []
    for step in x.split(1):
        h = m.cell(m, step, h)
        outputs.append(h.squeeze(0))
    return torch.stack(outputs, 1), h.squeeze(0)


def batch_first(m, x):
    h, outputs = x.new_zeros(len(x), 1, H), []
    for t in range(x.shape[1]):
        h = m.cell(m, x[:, t : t + 1], h)
        outputs.append(h)
    return torch.cat(outputs, 1), h


def preallocated_layout(m, x):
    h, outputs = first(x), x.new_empty(len(x), x.shape[1], H)
    for t in range(len(x)):
        h = m.cell(m, x[t : t + 1], h)
        outputs[t : t + 1] = h
    return outputs


def reversed_layout(m, x):
    h, outputs = first(x), []
    for t in reversed(range(len(x))):
        h = m.cell(m, x[t : t + 1], h)
        outputs.insert(0, h)
    return torch.cat(outputs), h


def heads(m, x):
    h, outputs = first(x), []
    for step in x:
        h = m.cell(m, step[None], h)
        outputs.append(m.out(h))
    return torch.cat(outputs), h


def layers(m, x):
    lower, upper, outputs = first(x), first(x), []
    for t in range(len(x)):
        lower = m.cell(m, x[t : t + 1], lower)
        upper = m.above(lower, upper)
        outputs.append(upper)
    return torch.cat(outputs), lower, upper


def decoder(m, x):
    _, h = m.encoder(x)
    return broadcast(m, x.flip(0)), h


@pytest.mark.parametrize("run", [in_slices, unsqueezed, broadcast, split, batch_first, preallocated_layout, reversed_layout,
                                 heads, layers], ids=lambda f: f.__name__)  # fmt: skip
@pytest.mark.parametrize("batch", [1, B])
def test_states_in_the_layout_of_a_gru(run, batch):
    def sizes(T):
        return (batch, T, I) if run is batch_first else (T, batch, I)

    graphs = [check(KeepsLayout(run), x_of(*sizes(n)), gru=1) for n in (2, T, 5)]
    assert all(r.rewritten for r in graphs[0].records)
    if run is not heads and (run, batch) != (batch_first, 1):  # which of two dimensions of size one is time is not known
        assert len({len(graph.gm.graph.nodes) for graph in graphs}) == 1  # no node of a step is left


def test_a_state_in_the_layout_of_a_gru_from_one():
    check(KeepsLayout(decoder), x_of(T, B, I), gru=2)


def test_states_in_the_layout_of_a_gru_and_a_dynamic_batch():
    x = x_of(T, B, I)
    torch._dynamo.mark_dynamic(x, 1)
    check(KeepsLayout(in_slices), x, gru=1)
    check(KeepsLayout(broadcast), x, gru=1)


def test_results_in_the_layout_of_a_gru_do_not_share_memory_that_they_did_not_share():
    def run(m, x):
        result, h = in_slices(m, x)
        return result, result[0] * 2, h

    with torch.no_grad():
        compiled, graph = compiled_graph(KeepsLayout(run).double(), x_of(T, B, I))
        results = compiled(x_of(T, B, I))
    assert graph.gru == 1
    assert len({r.untyped_storage().data_ptr() for r in results}) == len(results)


def changes_the_state(m, x):
    h = first(x)
    for t in range(len(x)):
        h = m.cell(m, x[t : t + 1], h) * 0.5
    return h


def swaps_dimensions(m, x):
    h = x.new_zeros(1, 1, H)
    for t in range(len(x)):
        h = m.cell(m, x[t : t + 1], h).transpose(0, 1)
    return h


def projects_the_state_without_a_dimension(m, x):
    h = first(x)
    for t in range(len(x)):
        x_r, x_z, x_n = m.x3(x[t : t + 1]).chunk(3, -1)
        h_r, h_z, h_n = m.h3(h[0].flip(0)).chunk(3, -1)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        h = (1 - z) * torch.tanh(x_n + r * h_n) + z * h
    return h


@pytest.mark.parametrize(
    ("run", "batch", "cells"),
    [(changes_the_state, B, T), (swaps_dimensions, 1, T), (projects_the_state_without_a_dimension, B, 0)],
    ids=lambda p: getattr(p, "__name__", ""),
)
def test_states_in_the_layout_of_a_gru_that_are_no_loop(run, batch, cells):
    graph = check(KeepsLayout(run), x_of(T, batch, I), gru_cell=cells)
    assert not any(r.rewritten for r in graph.records if r.name.startswith("loop of"))
    if cells:
        by = "mul" if run is changes_the_state else "transpose"
        assert f"the hidden state is changed between two steps (by {by})" in graph.reasons


@pytest.mark.parametrize("depends", [True, False], ids=["input of the state", "input"])
def test_dimensions_before_the_hidden_one_may_change(depends):
    class Dynamic(Leading):
        def forward(self, x):
            self.sizes = x.shape[1:-1]
            return super().forward(x)

    model = Dynamic((), depends).double()
    x = x_of(T, 2, 3, I)
    compiled, graph = compiled_graph(model, x, dynamic=True)
    assert (graph.gru, graph.gru_cell) == ((0, T) if depends else (1, 0))
    for sizes in ((2, 3), (4, 7)):
        x = x_of(T, *sizes, I)
        inputs = [*model.parameters(), x]
        assert_same(value_and_grads(compiled, (x,), inputs), value_and_grads(model, (x,), inputs), 1e-12)


def test_input_that_is_broadcast_over_a_leading_dimension_is_no_match():
    class Broadcast(Leading):
        def forward(self, x):
            return self.cell(self, x[0], x.new_ones(*self.sizes, H))

    graph = check(Broadcast((4, B)), x_of(1, B, I))
    assert not any(r.rewritten for r in graph.records)
