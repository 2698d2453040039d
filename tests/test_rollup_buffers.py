"""Loops whose state is one tensor that each step overwrites become one call; the tensor holds what it holds eagerly.

Without gradients, for PyTorch has none there: the backward of a cell needs the state that was overwritten.
"""

import copy

import pytest
import torch
from problems import assert_same, tensors
from rollup import compiled_graph
from torch import nn

import torch_gru_fuse

T, B, I, H = 4, 3, 5, 6

pytestmark = pytest.mark.usefixtures("cells_on_cpu")


class Model(nn.Module):
    def __init__(self, loop):
        super().__init__()
        self.cell = nn.GRUCell(I, H)
        self.out = nn.Linear(H, I)
        self.register_buffer("h", torch.randn(B, H))
        self.register_buffer("single", torch.zeros(B, H, dtype=torch.float32))
        self.loop = loop

    def forward(self, x):
        return self.loop(self, x)


def local(m, x):
    h, outputs = x.new_zeros(B, H), []
    for step in x:
        h.copy_(m.cell(step, h))
        outputs.append(m.out(h))
    return torch.stack(outputs), h


def result_of_the_write(m, x):
    h, outputs = x.new_zeros(B, H), []
    for step in x:
        h = h.copy_(m.cell(step, h))
        outputs.append(h * 2)
    return torch.stack(outputs), h


def all_elements(m, x):
    h = x.new_zeros(B, H)
    for step in x:
        h[:] = m.cell(step, h)
    return h


def both_names(m, x):
    h, outputs = x.new_zeros(B, H), []
    for step in x:
        new = m.cell(step, h)
        h[...] = new
        outputs += [new, h + 1]
    return torch.stack(outputs)


def buffer(m, x):
    outputs = []
    for step in x:
        m.h.copy_(m.cell(step, m.h))
        outputs.append(m.out(m.h))
    return torch.stack(outputs)


def buffer_by_index(m, x):
    for step in x:
        m.h[:] = m.cell(step, m.h)
    return m.h + 1


def returned(m, x):
    for step in x:
        m.h.copy_(m.cell(step, m.h))
    return m.h


def compare(loop, gru, calls=2):
    """A model and its copy, compiled, called in turn: results and buffers."""
    model = Model(loop).double()
    model.single = model.single.float()
    with torch.no_grad():
        eager = copy.deepcopy(model)
        x = torch.randn(T, B, I, dtype=torch.float64)
        compiled, graph = compiled_graph(model, x)
        expected = [t.clone() for t in tensors(eager(x))]
        assert_same([*model.buffers()], [*eager.buffers()], 1e-12)
        for _ in range(calls):
            expected, actual = tensors(eager(x)), tensors(compiled(x))
            assert_same([*actual, *model.buffers()], [*expected, *eager.buffers()], 1e-12)
            same = [e is eager.h for e in expected]
            assert [a is model.h for a in actual] == same
    assert graph.gru == gru, graph.reasons
    return graph


LOOPS = (local, result_of_the_write, all_elements, both_names, buffer, buffer_by_index, returned)


@pytest.mark.parametrize("loop", LOOPS, ids=lambda f: f.__name__)
def test_loops(loop):
    graph = compare(loop, gru=1)
    assert [r.name for r in graph.records] == [f"loop of {T} steps over torch.gru_cell"]


# ---- what must stay as it is -------------------------------------------------------------------------------------------------


def partly_written(m, x):
    for step in x:
        m.h[1:] = m.cell(step, m.h)[1:]
    return m.h + 1


def of_another_dtype(m, x):
    for step in x:
        m.single.copy_(m.cell(step, m.single.double()))
    return m.single + 1


def seen_by_a_view(m, x):
    view, seen = m.h[0], []
    for step in x:
        m.h.copy_(m.cell(step, m.h))
        seen.append(view + 1)
    return torch.stack(seen)


def written_in_between(m, x):
    for step in x:
        m.h.copy_(m.cell(step, m.h))
        m.h.mul_(0.5)
    return m.h + 1


def what_was_written_is_written(m, x):
    for step in x:
        new = m.cell(step, m.h)
        m.h.copy_(new)
        new.mul_(0.5)
    return m.h + 1


@pytest.mark.parametrize(
    "loop", [partly_written, of_another_dtype, seen_by_a_view, written_in_between, what_was_written_is_written],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_stays(loop):
    compare(loop, gru=0)


def test_where_the_state_is_written_without_gradients_they_end():
    def loop(m, x):
        h, outputs = x.new_zeros(B, H), []
        for step in x:
            new = m.cell(step, h)
            outputs.append(new)
            with torch.no_grad():
                h.copy_(new)
        return torch.stack(outputs)

    _, graph = compiled_graph(Model(loop), torch.randn(T, B, I))
    assert (graph.gru, graph.gru_cell) == (0, T)


@pytest.mark.versions
def test_compiled_by_inductor():
    model, x = Model(buffer), torch.randn(T, B, I)
    eager = copy.deepcopy(model)
    with torch.no_grad(), torch_gru_fuse.enable():
        compiled = torch.compile(model, fullgraph=True)
        for _ in range(2):
            assert_same([compiled(x), model.h], [eager(x), eager.h], 2e-5)
    assert [r.target for r in torch_gru_fuse.rewrites()] == ["gru"]
