"""Guards of the passes over cells and loops that no other test reaches: models that are almost a GRU, and loops that are almost
one call, which would compute something else if they were rewritten."""

import pytest
import torch
import torch.nn.functional as F
from problems import assert_same, tensors
from rollup import check, compiled_graph, value_and_grads, x_of
from torch import nn

import torch_gru_fuse
from torch_gru_fuse.passes.rewrite import rewrite

T, B, I, H = 3, 2, 5, 6

pytestmark = pytest.mark.usefixtures("cells_on_cpu")


class Cell(nn.Module):
    """A cell written by hand, `formula(model, x, h)`, once."""

    def __init__(self, formula):
        super().__init__()
        self.xs = nn.ModuleList(nn.Linear(I, H) for _ in range(3))
        self.hs = nn.ModuleList(nn.Linear(H, H) for _ in range(3))
        self.W, self.U, self.b = (nn.Parameter(torch.randn(*size) / 3) for size in ((3 * H, I), (3 * H, H), (3 * H,)))
        self.gate, self.norm = nn.Linear(H, 1), nn.LayerNorm(H)
        self.formula = formula

    def forward(self, x, h):
        return self.formula(self, x, h)


def gates(m, x, h):
    return torch.sigmoid(m.xs[0](x) + m.hs[0](h)), torch.sigmoid(m.xs[1](x) + m.hs[1](h))


# ---- cells -------------------------------------------------------------------------------------------------------------------


def update_by_addcmul(m, x, h):
    z, r = gates(m, x, h)
    n = torch.tanh(torch.addcmul(m.xs[2](x), r, m.hs[2](h)))
    return torch.addcmul(n, z, h - n)


def transposed_weights(m, x, h):
    gx, gh = torch.addmm(m.b, x, m.W.transpose(0, 1)).chunk(3, 1), (h @ m.U.permute(1, 0)).chunk(3, 1)
    r, z = torch.sigmoid(gx[0] + gh[0]), torch.sigmoid(gx[1] + gh[1])
    return (1 - z) * torch.tanh(gx[2] + r * gh[2]) + z * h


@pytest.mark.parametrize("formula", [update_by_addcmul, transposed_weights], ids=lambda f: f.__name__)
def test_other_spellings(formula):
    check(Cell(formula), x_of(B, I), x_of(B, H), gru_cell=1)


def addcmul_with_a_factor(m, x, h):
    z, r = gates(m, x, h)
    n = torch.tanh(m.xs[2](x) + r * m.hs[2](h))
    return torch.addcmul(n, z, h - n, value=0.5)


def addmm_with_a_factor(m, x, h):
    gx, gh = torch.addmm(m.b, x, m.W.t(), alpha=2).chunk(3, 1), (h @ m.U.t()).chunk(3, 1)
    r, z = torch.sigmoid(gx[0] + gh[0]), torch.sigmoid(gx[1] + gh[1])
    return (1 - z) * torch.tanh(gx[2] + r * gh[2]) + z * h


def one_gate_for_all_units(m, x, h):
    _, r = gates(m, x, h)
    z = torch.sigmoid(m.gate(h))
    return (1 - z) * torch.tanh(m.xs[2](x) + r * m.hs[2](h)) + z * h


def product_of_three(m, x, h):
    z, r = gates(m, x, h)
    return (1 - z) * torch.tanh(m.xs[2](x) + r * z * m.hs[2](h)) + z * h


def constant_in_the_candidate(m, x, h):
    z, r = gates(m, x, h)
    return (1 - z) * torch.tanh(m.xs[2](x) + r * m.hs[2](h) + 1) + z * h


def product_without_the_reset_gate(m, x, h):
    z, r = gates(m, x, h)
    return (1 - z) * torch.tanh(m.xs[2](x) * m.hs[0](h) + r * m.hs[2](h)) + z * h


def normalized_candidate(m, x, h):
    z, r = gates(m, x, h)
    return (1 - z) * torch.tanh(m.norm(m.xs[2](x) + r * m.hs[2](h))) + z * h


def gate_with_a_product(m, x, h):
    _, r = gates(m, x, h)
    z = torch.sigmoid(m.xs[0](x) * m.hs[0](h))
    return (1 - z) * torch.tanh(m.xs[2](x) + r * m.hs[2](h)) + z * h


def negative_update(m, x, h):
    z, r = gates(m, x, h)
    return (1 - z) * torch.tanh(m.xs[2](x) + r * m.hs[2](h)) - z * h


def scaled_product(m, x, h):
    z, r = gates(m, x, h)
    return (1 - z) * torch.tanh(m.xs[2](x) + 2 * r * m.hs[2](h)) + z * h


def biases_of_every_sample(m, x, h):
    z, r = gates(m, x, h)
    return (1 - z) * torch.tanh(m.xs[2](x) + r * m.hs[2](h) + x.sum(1, keepdim=True).expand(-1, H)) + z * h


def rows_rolled(m, x, h):
    """The candidate of another sample."""
    z, r = gates(m, x, h)
    n = torch.tanh(m.xs[2](x) + r * m.hs[2](h))
    return (1 - z) * n.roll(1, 0) + z * h


ALMOST = [
    addcmul_with_a_factor, addmm_with_a_factor, one_gate_for_all_units, product_of_three, constant_in_the_candidate,
    product_without_the_reset_gate, normalized_candidate, gate_with_a_product, negative_update, scaled_product,
    biases_of_every_sample, rows_rolled,
]  # fmt: skip
REASONS = {
    constant_in_the_candidate: "its candidate is not tanh(W x + b + r * (W h + b))",
    product_without_the_reset_gate: "its candidate has a product without the reset gate",
    normalized_candidate: "its candidate is a function of layer_norm",
    gate_with_a_product: "the update gate is not sigmoid(W x + W h + b)",
    scaled_product: "the candidate gate scales its terms by 2",
}


@pytest.mark.parametrize("formula", ALMOST, ids=lambda f: f.__name__)
def test_almost_a_cell(formula):
    graph = check(Cell(formula), x_of(B, I), x_of(B, H))
    assert not any(r.rewritten for r in graph.records)
    if formula in REASONS:
        assert graph.reasons and REASONS[formula] in graph.reasons[0]


def test_hidden_size_that_is_no_constant():
    def cell(x, h, W, U):
        (x_r, x_z, x_n), (h_r, h_z, h_n) = F.linear(x, W).chunk(3, 1), F.linear(h, U).chunk(3, 1)
        r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
        return (1 - z) * torch.tanh(x_n + r * h_n) + z * h

    def args(hidden):
        return x_of(B, I), x_of(B, hidden), x_of(3 * hidden, I), x_of(3 * hidden, hidden)

    compiled, graph = compiled_graph(cell, *args(H), dynamic=True)
    assert graph.gru_cell == 0
    for hidden in (H, 9):
        inputs = args(hidden)
        assert_same(value_and_grads(compiled, inputs, inputs), value_and_grads(cell, inputs, inputs), 1e-12)


# ---- loops -------------------------------------------------------------------------------------------------------------------


class Loop(nn.Module):
    """`function(model, x)` with two cells."""

    def __init__(self, function):
        super().__init__()
        self.cell, self.upper, self.function = nn.GRUCell(I, H), nn.GRUCell(H, H), function

    def forward(self, x):
        return self.function(self, x)


def inputs_along_different_dimensions(m, x):
    h = x.new_zeros(4, H)
    for step in (x[0], x[:, 1], x[2], x[:, 3]):
        h = m.cell(step, h)
    return h


def inputs_are_ranges(m, x):
    rows, h = x.flatten(0, 1), x.new_zeros(4, H)
    for t in range(4):
        h = m.cell(rows[4 * t : 4 * t + 4], h)
    return h


def inputs_out_of_order(m, x):
    h = x.new_zeros(4, H)
    for t in (0, 2, 3, 1):
        h = m.cell(x[t], h)
    return h


def part_of_the_states_is_written(m, x):
    h, y = x.new_zeros(4, H), x.new_zeros(4, 4, H)
    for t in range(4):
        h = m.cell(x[t], h)
        if t > 1:
            y[t] = h
    return y


def states_are_written_and_read(m, x):
    h, y, total = x.new_zeros(4, H), x.new_zeros(4, 4, H), 0
    for t in range(4):
        h = m.cell(x[t], h)
        y[t] = h
        total = total + y.sum()
    return y, total


def last_state_is_changed_in_place(m, x):
    h, states = x.new_zeros(4, H), []
    for t in range(4):
        h = m.cell(x[t], h)
        states.append(h)
    y = torch.stack(states)
    h.mul_(2)
    return y, h


def states_leave_beside_the_stack(m, x):
    h, states = x.new_zeros(4, H), []
    for t in range(4):
        h = m.cell(x[t], h)
        states.append(h)
    return torch.stack(states), states[1], states[3]


def mixed_with_others_in_a_cat(m, x):
    h, states = x.new_zeros(4, H), [x.new_ones(4, H)]
    for t in range(4):
        h = m.cell(x[t], h)
        states.append(h)
    return torch.cat(states, 1)


ONE_CALL = [
    inputs_along_different_dimensions, inputs_are_ranges, inputs_out_of_order, part_of_the_states_is_written,
    states_are_written_and_read, last_state_is_changed_in_place, states_leave_beside_the_stack, mixed_with_others_in_a_cat,
]  # fmt: skip


@pytest.mark.parametrize("loop", ONE_CALL, ids=lambda f: f.__name__)
def test_one_call(loop):
    check(Loop(loop), x_of(4, 4, I), gru=1)


def upper_state_is_the_lower_one(m, x):
    h, states = x.new_zeros(4, H), []
    for t in range(4):
        h = m.cell(x[t], h)
        states.append(h)
    for state in torch.stack(states):
        h = m.upper(state, h)
    return h


def output_between_is_used(m, x):
    h, states = x.new_zeros(4, H), []
    for t in range(4):
        h = m.cell(x[t], h)
        states.append(h)
    y, h = torch.stack(states), x.new_zeros(4, H)
    for state in y:
        h = m.upper(state, h)
    return y, h


def layers_by_the_stack(m, x):
    zeros = x.new_zeros(4, H)
    for cell in (m.cell, m.upper):
        h, states = zeros, []
        for step in x:
            h = cell(step, h)
            states.append(h)
        x = torch.stack(states)
    return h


def layers_by_indices_of_the_stack(m, x):
    h, states = x.new_zeros(4, H), []
    for t in range(4):
        h = m.cell(x[t], h)
        states.append(h)
    y, h = torch.stack(states, 1), x.new_zeros(4, H)
    for t in range(4):
        h = m.upper(y[:, t], h)
    return h


@pytest.mark.parametrize("loop", [layers_by_the_stack, layers_by_indices_of_the_stack], ids=lambda f: f.__name__)
def test_layers_over_stacked_states(loop):
    graph = check(Loop(loop), x_of(4, 4, I), gru=1 if loop is layers_by_the_stack else 2)
    assert graph.reasons == []


def test_cell_after_layers_reads_a_state_of_the_lower_one():
    """The lower call's results are read by a cell that is still to be fused, so the two layers stay apart."""
    def function(m, x):
        (x_ih, x_hh), (y_ih, y_hh), (z_ih, z_hh) = m.weights

        def cell(x, h, ih, hh):
            (x_r, x_z, x_n), (h_r, h_z, h_n) = ih(x).chunk(3, 1), hh(h).chunk(3, 1)
            r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
            return (1 - z) * torch.tanh(x_n + r * h_n) + z * h

        lower = upper = x.new_zeros(B, H)
        for step in x:
            lower = cell(step, lower, x_ih, x_hh)
            upper = cell(lower, upper, y_ih, y_hh)
        return cell(lower, upper, z_ih, z_hh), cell(upper, lower, z_ih, z_hh)

    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.weights = nn.ModuleList(
                nn.ModuleList((nn.Linear(i, 3 * H), nn.Linear(H, 3 * H))) for i in (I, H, H)
            )

        def forward(self, x):
            return function(self, x)

    graph = check(Layers(), x_of(T, B, I), gru=2, gru_cell=2)
    assert graph.reasons == []


@pytest.mark.parametrize("loop", [upper_state_is_the_lower_one, output_between_is_used], ids=lambda f: f.__name__)
def test_two_loops_that_are_no_layers_of_one_call(loop):
    check(Loop(loop), x_of(4, 4, I), gru=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_loop_under_autocast(dtype):
    def loop(m, x):
        h = x.new_zeros(4, H)
        with torch.autocast("cpu", dtype=dtype):
            for step in x:
                h = m.cell(step, h)
        return h

    model, x = Loop(loop), torch.randn(4, 4, I)
    compiled, graph = compiled_graph(model, x)
    assert graph.gru + graph.gru_cell >= 1
    for actual, expected in zip(tensors(compiled(x)), tensors(model(x)), strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, atol=0.03, rtol=0)  # sums of 6 products of 8 bits


def test_call_with_weights_that_are_no_nodes():
    """A graph made by hand: the cell's arguments are not all in it."""
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.zeros(B, I)
    graph.output(graph.call_function(torch.gru_cell, (x, x), {"w_ih": x}))
    gm = torch.fx.GraphModule({}, graph)
    assert rewrite(gm) == 0
    assert "not those of torch.gru_cell" in torch_gru_fuse.rewrites()[0].reason
