"""Loops over two cells, one forwards and one backwards through time, whose states are joined: each becomes a call of the op."""

import pytest
import torch
from rollup import check, x_of
from test_rollup_loops import B, I, Model, T, zeros

from torch_gru_fuse.passes.nodes import name

pytestmark = pytest.mark.usefixtures("cells_on_cpu")


def both_directions(m, x):
    """The states of two loops, one over reversed time, in the order of time, and the last ones."""
    f = b = zeros(x)
    forwards, backwards = [], []
    for t in range(len(x)):
        f = m.cell(x[t], f)
        forwards.append(f)
    for t in reversed(range(len(x))):
        b = m.cells[0](x[t], b)
        backwards.insert(0, b)
    return forwards, backwards, f, b


def joined_in_each_step(m, x):
    forwards, backwards, f, b = both_directions(m, x)
    return torch.stack([torch.cat([f, b], -1) for f, b in zip(forwards, backwards, strict=True)]), torch.cat([f, b], 1)


def joined_batch_first(m, x):
    forwards, backwards, *_ = both_directions(m, x)
    return torch.cat([torch.cat((f, b), dim=1).unsqueeze(1) for f, b in zip(forwards, backwards, strict=True)], 1)


def joined_at_last(m, x):
    forwards, backwards, *_ = both_directions(m, x)
    return torch.cat([torch.stack(forwards), torch.stack(backwards)], -1)


def joined_in_one_loop(m, x):
    f, b, forwards, backwards = zeros(x), zeros(x), [], []
    for t in range(len(x)):
        f, b = m.cell(x[t], f), m.cells[0](x[-1 - t], b)
        forwards.append(f)
        backwards.append(b)
    return torch.stack([torch.cat([f, b], 1) for f, b in zip(forwards, reversed(backwards), strict=True)])


def joined_with_an_input(m, x):
    h, outputs = zeros(x), []
    for step in x:
        h = m.cell(step, h)
        outputs.append(torch.cat([h, step * 2], -1))
    return torch.stack(outputs)


def joined_along_the_batch(m, x):
    forwards, backwards, *_ = both_directions(m, x)
    return torch.stack([torch.cat([f, b], 0) for f, b in zip(forwards, backwards, strict=True)], -1)


DIRECTIONS = (joined_in_each_step, joined_batch_first, joined_at_last, joined_in_one_loop, joined_along_the_batch)


def cats(graph):
    return sum(name(node) == "cat" for node in graph.gm.graph.nodes)


@pytest.mark.parametrize("loop", DIRECTIONS, ids=lambda f: f.__name__)
def test_two_directions(loop):
    graphs = [check(Model(loop), x_of(n, B, I), gru=2) for n in (2, T, 9)]
    assert len({len(graph.gm.graph.nodes) for graph in graphs}) == 1  # no node of a step is left
    assert {cats(graph) for graph in graphs} == {2 if loop is joined_in_each_step else 1}


@pytest.mark.parametrize("loop", DIRECTIONS[:-1], ids=lambda f: f.__name__)
def test_two_directions_are_a_pair(loop, monkeypatch):
    from torch_gru_fuse.passes import pairs

    monkeypatch.setattr(pairs, "GUARDS", [guard for guard in pairs.GUARDS if guard is not pairs.profitable])
    graph = check(Model(loop), x_of(T, B, I))
    assert graph.calls["torch_gru_fuse.gru_pair.default"] == 1
    assert not any("flip" in call for call in graph.calls)


def test_states_that_are_joined_with_an_input():
    check(Model(joined_with_an_input), x_of(T, B, I), gru=1)


def joined_and_used(m, x):
    forwards, backwards, *_ = both_directions(m, x)
    joined = [torch.cat([f, b], -1) for f, b in zip(forwards, backwards, strict=True)]
    return torch.stack(joined), joined[1] * 2


def joined_in_other_orders(m, x):
    forwards, backwards, *_ = both_directions(m, x)
    states = enumerate(zip(forwards, backwards, strict=True))
    return torch.stack([torch.cat([f, b] if t % 2 else [b, f[:, :2], f[:, 2:]], -1) for t, (f, b) in states])


def joined_along_time(m, x):
    forwards, backwards, *_ = both_directions(m, x)
    return torch.cat([torch.cat([f, b]) for f, b in zip(forwards, backwards, strict=True)])


@pytest.mark.parametrize("loop", [joined_and_used, joined_in_other_orders, joined_along_time], ids=lambda f: f.__name__)
def test_states_that_stay_joined(loop):
    graph = check(Model(loop), x_of(T, B, I), gru=2)
    assert cats(graph) == (T + 1 if loop is joined_along_time else T)


def test_states_that_are_written_stay_joined():
    def loop(m, x):
        forwards, backwards, *_ = both_directions(m, x)
        joined = [torch.cat([f, b], -1) for f, b in zip(forwards, backwards, strict=True)]
        for state in joined:
            state.mul_(2)
        return torch.stack(joined)

    assert cats(check(Model(loop), x_of(T, B, I), gru=2)) == T
