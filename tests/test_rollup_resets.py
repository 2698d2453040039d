"""Loops over a GRU cell whose state is reset between steps become one call of the sequence op with its resets, or stay."""

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

    def __init__(self, loop, layers=2):
        super().__init__()
        self.cell = nn.GRUCell(I, H)
        self.cells = nn.ModuleList(nn.GRUCell(I if layer == 0 else H, H) for layer in range(layers))
        self.x3, self.h3, self.out = nn.Linear(I, 3 * H), nn.Linear(H, 3 * H), nn.Linear(H, 1)
        self.loop = loop

    def forward(self, *args):
        return self.loop(self, *args)


def done_of(dtype=torch.float64, *size):
    return (torch.rand(size or (T, B), generator=torch.Generator().manual_seed(2)) < 0.4).to(dtype)


def first_state(x):
    return x[0, :, :1] * torch.ones(B, H, dtype=x.dtype)


# ---- spellings ---------------------------------------------------------------------------------------------------------------

FLOAT = {
    "(1 - done[t]).unsqueeze(-1)": lambda h, d, t: h * (1 - d[t]).unsqueeze(-1),
    "1.0 - done[t][:, None]": lambda h, d, t: h * (1.0 - d[t][:, None]),
    "(1 - done[t]).view(-1, 1)": lambda h, d, t: h * (1 - d[t]).view(-1, 1),
    "1 - done[t].reshape(-1, 1)": lambda h, d, t: h * (1 - d[t].reshape(-1, 1)),
    "1 - done[t, :, None]": lambda h, d, t: h * (1 - d[t, :, None]),
    "factor first": lambda h, d, t: (1 - d[t]).unsqueeze(1) * h,
    "torch.mul": lambda h, d, t: torch.mul(h, torch.rsub(d[t], 1)[..., None]),
    "(1 - done)[t]": lambda h, d, t: h * (1 - d)[t].unsqueeze(-1),
    "mask[t]": lambda h, d, t: h * d[t].unsqueeze(-1),
    "expanded": lambda h, d, t: h * (1 - d[t]).unsqueeze(-1).expand_as(h),
    "compared": lambda h, d, t: h * (d[t] == 0).to(h.dtype)[:, None],
    "compared, bool": lambda h, d, t: h * (d[t] < 0.5)[:, None],
}
BOOL = {
    "(~done[t]).double()": lambda h, d, t: h * (~d[t]).double().unsqueeze(-1),
    "1 - done[t].to(h.dtype)": lambda h, d, t: h * (1 - d[t].to(h.dtype)).unsqueeze(-1),
    "logical_not, bool": lambda h, d, t: h * torch.logical_not(d[t]).unsqueeze(-1),
    "1 - done[t].long()": lambda h, d, t: h * (1 - d[t].long()).unsqueeze(-1),
    "where, zeros_like": lambda h, d, t: torch.where(d[t].unsqueeze(-1), torch.zeros_like(h), h),
    "where, 0.0": lambda h, d, t: torch.where(d[t][:, None], 0.0, h),
    "where, zeros": lambda h, d, t: torch.where(d[t][:, None], torch.zeros(1, H, dtype=h.dtype), h),
    "where, not done": lambda h, d, t: torch.where(~d[t][:, None], h, h.new_zeros(B, H)),
    "masked_fill": lambda h, d, t: h.masked_fill(d[t][:, None], 0),
    "torch.masked_fill": lambda h, d, t: torch.masked_fill(h, d[t].view(-1, 1), 0.0),
}
SPELLINGS = {**{k: (f, torch.float64) for k, f in FLOAT.items()}, **{k: (f, torch.bool) for k, f in BOOL.items()}}


def before_the_cell(reset):
    def loop(m, x, done):
        h, outputs = first_state(x), []
        for t in range(len(x)):
            h = m.cell(x[t], reset(h, done, t))
            outputs.append(h)
        return torch.stack(outputs), h

    return loop


def after_the_cell(reset):
    def loop(m, x, done):
        h, outputs = first_state(x), []
        for t in range(len(x)):
            h = m.cell(x[t], h)
            outputs.append(h)
            h = reset(h, done, t)
        return torch.stack(outputs), h

    return loop


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_reset_before_the_cell(spelling):
    reset, dtype = SPELLINGS[spelling]
    loop, x, done = before_the_cell(reset), x_of(T, B, I), done_of(dtype)
    graph = check(Model(loop), x, done, gru=1)
    assert graph.calls["torch.gru_cell"] == 0 and [r.rewritten for r in graph.records] == [True]
    if spelling != "(1 - done)[t]":  # made anew in every step: no part of one tensor
        assert len(graph.gm.graph.nodes) < 24


@pytest.mark.parametrize("spelling", ["(1 - done[t]).unsqueeze(-1)", "where, zeros_like"])
def test_no_node_of_a_step_is_left(spelling):
    reset, dtype = SPELLINGS[spelling]
    model = Model(before_the_cell(reset))
    assert len({len(check(model, x_of(n, B, I), done_of(dtype, n, B), gru=1).gm.graph.nodes) for n in (2, 7, 12)}) == 1


@pytest.mark.parametrize("spelling", ["mask[t]", "where, 0.0"])
def test_reset_after_the_cell(spelling):
    reset, dtype = SPELLINGS[spelling]
    check(Model(after_the_cell(reset)), x_of(T, B, I), done_of(dtype), gru=1)


def outputs_after_the_reset(m, x, done):
    h, outputs = first_state(x), []
    for t in range(len(x)):
        h = m.cell(x[t], h) * (1 - done[t])[:, None]
        outputs.append(h)
    return torch.stack(outputs), h


def some_steps(m, x, done):
    h = first_state(x)
    for t in range(len(x)):
        h = m.cell(x[t], h if t in (1, 2) else h * done[t][:, None])
    return h


def reversed_time(m, x, done):
    h, outputs = first_state(x), []
    for t in reversed(range(len(x))):
        h = m.cell(x[t], h * (1 - done[t])[:, None])
        outputs.append(h)
    return torch.stack(outputs[::-1])


def batch_first(m, x, done):
    h, outputs = first_state(x), []
    for t in range(x.shape[0]):
        h = m.cell(x[t], h * (1 - done.t()[:, t])[:, None])
        outputs.append(h)
    return torch.stack(outputs, 1)


def columns(m, x, done):
    h, done = first_state(x), done.unsqueeze(-1)
    for t in range(len(x)):
        h = m.cell(x[t], h * (1 - done[t]))
    return h


def iterated(m, x, done):
    h = first_state(x)
    for step, d in zip(x, done.unbind(0), strict=True):
        h = m.cell(step, h * (1 - d)[:, None])
    return h


def the_same_in_every_step(m, x, done):
    h = first_state(x)
    for step in x:
        h = m.cell(step, h * (1 - done[1])[:, None])
    return h


def one_factor_and_many(m, x, done):
    h = first_state(x)
    for t in range(len(x)):
        h = m.cell(x[t], h * (done[t].unsqueeze(-1) if t % 2 else done[t, :1].unsqueeze(-1)))
    return h


def made_in_the_loop(m, x, done):
    h = first_state(x)
    for t in range(len(x)):
        h = m.cell(x[t], h * (x[t, :, 0].detach() > done[t]).double()[:, None])
    return h


def masked_state_is_used(m, x, done):
    h, outputs = first_state(x), []
    for t in range(len(x)):
        before = h * (1 - done[t])[:, None]
        h = m.cell(x[t], before)
        outputs.append(m.out(torch.cat((before, h), 0)))
    return torch.stack(outputs), h


def hand_written(m, x, done):
    h, outputs = first_state(x), []
    for t in range(len(x)):
        h = h * (1 - done[t])[:, None]
        x_r, x_z, x_n = m.x3(x[t]).chunk(3, 1)
        h_r, h_z, h_n = m.h3(h).chunk(3, 1)
        z = torch.sigmoid(x_z + h_z)
        n = torch.tanh(x_n + torch.sigmoid(x_r + h_r) * h_n)
        h = (1 - z) * n + z * h
        outputs.append(h)
    return torch.stack(outputs), h


@pytest.mark.parametrize(
    "loop",
    [outputs_after_the_reset, some_steps, reversed_time, batch_first, columns, iterated, the_same_in_every_step,
     one_factor_and_many, made_in_the_loop, masked_state_is_used, hand_written],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_loop(loop):
    graph = check(Model(loop), x_of(T, B, I), done_of(), gru=1)
    assert graph.calls["torch.gru_cell"] == 0


@pytest.mark.parametrize("loop", [before_the_cell(FLOAT["mask[t]"]), outputs_after_the_reset])
def test_any_factor_is_exact(loop):
    """1 - (1 - m) is not m: what is given to the op is the factor itself."""
    mask = torch.rand(T, B, dtype=torch.float64) * 3 - 1
    check(Model(loop), x_of(T, B, I), mask, gru=1)


def test_one_flag_for_a_batch_of_one():
    def loop(m, x, done):
        h = x.new_zeros(1, H)
        for t in range(len(x)):
            h = m.cell(x[t], h * (1 - done[t]))
        return h

    check(Model(loop), x_of(T, 1, I), done_of(torch.float64, T), gru=1)


def test_dynamic_batch():
    x, done = x_of(T, B, I), done_of()
    torch._dynamo.mark_dynamic(x, 1)
    torch._dynamo.mark_dynamic(done, 1)

    def loop(m, x, done):
        h, outputs = x.new_zeros(x.shape[1], H), []
        for t in range(len(x)):
            h = m.cell(x[t], h * (1 - done[t]).unsqueeze(-1) if t else h)
            outputs.append(h)
        return torch.stack(outputs)

    check(Model(loop), x, done, gru=1)


def test_a_state_that_is_not_a_number_is_cleared_by_selection_alone():
    x, done = x_of(T, B, I), torch.zeros(T, B, dtype=torch.bool)
    with torch.no_grad():
        x[0] = float("nan")
        done[2] = True
        for spelling in ("where, 0.0", "(~done[t]).double()"):
            model = Model(before_the_cell(BOOL[spelling])).double()
            compiled, graph = compiled_graph(model, x, done)
            assert graph.gru == 1
            torch.testing.assert_close(compiled(x, done), model(x, done), equal_nan=True)


# ---- layers ------------------------------------------------------------------------------------------------------------------


def layers_of(resets):
    def loop(m, x, done):
        states, outputs = [first_state(x) for _ in m.cells], []
        for t in range(len(x)):
            step = x[t]
            for layer, cell in enumerate(m.cells):
                step = states[layer] = cell(step, resets[layer](states[layer], done, t))
            outputs.append(step)
        return torch.stack(outputs), torch.stack(states)

    return loop


ONE_MINUS, MASK, NONE = FLOAT["(1 - done[t]).unsqueeze(-1)"], FLOAT["mask[t]"], lambda h, d, t: h


@pytest.mark.parametrize(
    ("resets", "calls"),
    [((ONE_MINUS, ONE_MINUS, ONE_MINUS), 1), ((ONE_MINUS, FLOAT["(1 - done[t]).view(-1, 1)"]), 1), ((ONE_MINUS, MASK), 2),
     ((ONE_MINUS, NONE), 2), ((NONE, ONE_MINUS), 2), ((NONE, NONE), 1)],
)  # fmt: skip
def test_layers_with_the_same_resets_are_one_call(resets, calls):
    check(Model(layers_of(resets), layers=len(resets)), x_of(T, B, I), done_of(), gru=calls)


# ---- what stays --------------------------------------------------------------------------------------------------------------


def depends_on_the_state(m, x, done):
    h = first_state(x)
    for t in range(len(x)):
        stop = (m.out(h).squeeze(-1) > 0).double().detach()
        h = m.cell(x[t], h * (1 - stop)[:, None])
    return h


def per_unit(m, x, done):
    h = first_state(x)
    for t in range(len(x)):
        h = m.cell(x[t], h * done[t].repeat(H // B))
    return h


def per_element(m, x, done):
    h = first_state(x)
    for t in range(len(x)):
        h = m.cell(x[t], h * torch.cos(x[t, :, :1].detach() * torch.arange(H)))
    return h


def learned_factor(m, x, done):
    h = first_state(x)
    for t in range(len(x)):
        h = m.cell(x[t], h * torch.sigmoid(x[t, :, :1]))
    return h


def not_to_zero(m, x, done):
    h = first_state(x)
    for t in range(len(x)):
        h = m.cell(x[t], torch.where(done[t][:, None] > 0, torch.ones_like(h), h))
    return h


def a_constant(m, x, done):
    h = first_state(x)
    for step in x:
        h = m.cell(step, h * 0.5)
    return h


def in_place(m, x, done):
    h = first_state(x)
    for t in range(len(x)):
        h = m.cell(x[t], h)
        h *= (1 - done[t])[:, None]
    return h


def flags_are_overwritten(m, x, done):
    h, done = first_state(x), done.clone()
    flag = done[0]
    for t in range(len(x)):
        h = m.cell(x[t], h * (1 - flag)[:, None])
        flag.copy_(done[t])
    return h


STAY = {
    depends_on_the_state: "a reset of its state depends on the hidden state of the step before",
    per_unit: "the hidden state is changed between two steps (by mul",
    per_element: "the hidden state is changed between two steps (by mul",
    learned_factor: "the hidden state is changed between two steps (by mul",
    not_to_zero: "the hidden state is changed between two steps (by where",
    a_constant: "the hidden state is changed between two steps (by mul",
    in_place: "the hidden state is changed between two steps (by imul",
}


@pytest.mark.parametrize("loop", STAY, ids=lambda f: f.__name__)
def test_stays(loop):
    model, x, done = Model(loop).double(), x_of(T, B, I), done_of()
    with torch.set_grad_enabled(loop is not in_place):
        compiled, graph = compiled_graph(model, x, done)
        assert_same(tensors(compiled(x, done)), tensors(model(x, done)), 1e-12)
    if loop is not in_place:
        inputs = [*model.parameters(), x]
        expected = value_and_grads(model, (x, done), inputs)
        assert_same(value_and_grads(compiled, (x, done), inputs), expected, 1e-12)
    assert graph.gru == 0 and any(STAY[loop] in r for r in graph.reasons), graph.reasons


def state_is_changed_after_its_reset(m, x, done):
    h = first_state(x)
    for t in range(len(x)):
        h = h * (1 - done[t])[:, None]
        h.add_(0.5)
        h = m.cell(x[t], h)
    return h


def factor_is_changed(m, x, done):
    h = first_state(x)
    for t in range(len(x)):
        factor = 1 - done[t]
        factor.clamp_(min=0.5)
        h = m.cell(x[t], h * factor[:, None])
    return h


def flags_are_changed_afterwards(m, x, done):
    h, done = first_state(x), done.clone()
    for t in range(len(x)):
        h = m.cell(x[t], h * (1 - done[t])[:, None])
    done.zero_()
    return h, done


def zeros_are_changed(m, x, done):
    h, zero = first_state(x), torch.zeros(B, H, dtype=x.dtype)
    zero += 1
    for t in range(len(x)):
        h = m.cell(x[t], torch.where(done[t][:, None] > 0, zero, h))
    return h


@pytest.mark.parametrize(
    "loop",
    [flags_are_overwritten, state_is_changed_after_its_reset, factor_is_changed, flags_are_changed_afterwards,
     zeros_are_changed],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_what_is_written_in_between(loop):
    with torch.no_grad():
        model, x, done = Model(loop).double(), x_of(T, B, I), done_of()
        compiled, _ = compiled_graph(model, x, done)
        for _ in range(2):
            assert_same(tensors(compiled(x, done)), tensors(model(x, done)), 1e-12)


@settings(max_examples=15, deadline=None, database=None, derandomize=True)
@given(
    st.lists(st.sampled_from(["none", "(1 - done[t]).unsqueeze(-1)", "mask[t]", "compared", "(1 - done)[t]"]), min_size=5,
             max_size=5),
    st.integers(1, 2), st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
def test_any_loop(spellings, layers, after, keep_states, backwards):
    """Whatever resets there are, before the cells or after them: the results and gradients are those of eager PyTorch."""

    def loop(m, x, done):
        states, outputs = [first_state(x) for _ in m.cells], []
        for t in reversed(range(T)) if backwards else range(T):
            step, spelling = x[t], spellings[t]
            for layer, cell in enumerate(m.cells):
                h = states[layer]
                if not after and spelling != "none":
                    h = FLOAT[spelling](h, done, t)
                step = h = cell(step, h)
                if after and spelling != "none":
                    h = FLOAT[spelling](h, done, t)
                states[layer] = h
            outputs.append(states[-1] if keep_states else step)
        return torch.stack(outputs), states[0]

    torch.manual_seed(0)
    model, x, done = Model(loop, layers).double(), x_of(T, B, I), done_of()
    inputs = [*model.parameters(), x]
    expected = value_and_grads(model, (x, done), inputs)
    compiled, graph = compiled_graph(model, x, done)
    assert_same(value_and_grads(compiled, (x, done), inputs), expected, 1e-12)
    assert graph.gru_cell == 0 or after


def test_factors_and_selection_in_one_loop():
    def loop(m, x, done):
        h = first_state(x)
        for t in range(6):
            h = m.cell(x[t % T], h * done[t % T][:, None] if t < 3 else torch.where(done[t % T][:, None] > 0, 0.0, h))
        return h

    check(Model(loop), x_of(T, B, I), done_of(), gru=2)


# ---- through the compiler ----------------------------------------------------------------------------------------------------


def test_compiled_by_inductor():
    model, x = Model(layers_of((ONE_MINUS, ONE_MINUS))), torch.randn(T, B, I, requires_grad=True)
    inputs, done = [*model.parameters(), x], done_of(torch.float32)
    with torch_gru_fuse.enable():
        actual = value_and_grads(torch.compile(model, fullgraph=True), (x, done), inputs)
    assert_same(actual, value_and_grads(model, (x, done), inputs), 2e-5)
    records = torch_gru_fuse.rewrites()
    assert [r.target for r in records] == ["gru", "gru"] and len({r.node for r in records}) == 1


def test_exported():
    from torch_gru_fuse.passes.rewrite import rewrite

    for spelling in ("(1 - done[t]).unsqueeze(-1)", "masked_fill"):
        reset, dtype = SPELLINGS[spelling]
        model, x, done = Model(before_the_cell(reset)).double(), x_of(T, B, I), done_of(dtype)
        program = torch.export.export(model, (x, done))
        assert rewrite(program.graph_module) == 1
        assert_same(tensors(program.module()(x, done)), tensors(model(x, done)), 1e-12)
