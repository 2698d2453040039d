"""Hand-written GRU cells in the spellings that people use become the ops; cells that only look like one do not."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import assert_same, tensors
from rollup import check, compiled_graph, value_and_grads, x_of
from torch import nn

import torch_gru_fuse

T, B, I, H = 3, 2, 5, 6

pytestmark = pytest.mark.usefixtures("cells_on_cpu")


class Model(nn.Module):
    """Weights in all the forms that the cells of this file use, and a cell."""

    def __init__(self, cell, loop=True):
        super().__init__()
        self.x3, self.h3 = nn.Linear(I, 3 * H), nn.Linear(H, 3 * H)
        self.x3_plain, self.h3_plain = nn.Linear(I, 3 * H, bias=False), nn.Linear(H, 3 * H, bias=False)
        self.x2, self.h2 = nn.Linear(I, 2 * H), nn.Linear(H, 2 * H, bias=False)
        self.xs = nn.ModuleList(nn.Linear(I, H) for _ in range(3))
        self.hs = nn.ModuleList(nn.Linear(H, H, bias=False) for _ in range(3))
        self.both2, self.both = nn.Linear(I + H, 2 * H), nn.ModuleList(nn.Linear(I + H, H) for _ in range(3))
        self.W, self.U = nn.Parameter(torch.randn(I, 3 * H) / 3), nn.Parameter(torch.randn(H, 3 * H) / 3)
        self.b = nn.Parameter(torch.randn(3 * H))
        self.b2 = nn.Parameter(torch.randn(3 * H))
        self.sigmoid, self.tanh, self.norm = nn.Sigmoid(), nn.Tanh(), nn.LayerNorm(H)
        self.cell, self.loop = cell, loop

    def forward(self, x):
        if not self.loop:
            return self.cell(self, x[0], x.new_ones(x.shape[1], H))
        h, outputs = x.new_zeros(x.shape[1], H), []
        for step in x:
            h = self.cell(self, step, h)
            outputs.append(h)
        return torch.stack(outputs), h


# ---- spellings ---------------------------------------------------------------------------------------------------------------


def two_linears(m, x, h):
    x_r, x_z, x_n = m.x3(x).chunk(3, dim=1)
    h_r, h_z, h_n = m.h3(h).chunk(3, 1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    n = torch.tanh(x_n + r * h_n)
    return (1 - z) * n + z * h


def slices_and_other_order(m, x, h):
    gx, gh = m.x3(x), m.h3_plain(h)
    z = (gx[:, :H] + gh[:, :H]).sigmoid()
    r = (gh[:, H : 2 * H] + gx[:, H : 2 * H]).sigmoid()
    n = (r * gh[:, 2 * H :] + gx[:, 2 * H :]).tanh()
    return z * h + (1.0 - z) * n


def six_linears(m, x, h):
    r = F.sigmoid(m.xs[0](x) + m.hs[0](h))
    z = F.sigmoid(m.xs[1](x) + m.hs[1](h))
    n = F.tanh(m.xs[2](x) + r * m.hs[2](h))
    return n + z * (h - n)


def functional(m, x, h):
    gx, gh = F.linear(x, m.x3_plain.weight), F.linear(h, m.h3_plain.weight)
    r, z, n = torch.split(gx, H, dim=-1)
    a, b, c = torch.split(gh, H, -1)
    r, z = m.sigmoid(r + a), m.sigmoid(z + b)
    return torch.lerp(m.tanh(n + c * r), h, z)


def gates_together(m, x, h):
    gates = m.x2(x) + m.h2(h)
    r, z = torch.sigmoid(gates).chunk(2, 1)
    n = torch.tanh(m.xs[2](x) + r * m.hs[2](h))
    return torch.add(torch.mul(1 - z, n), torch.mul(z, h))


def concatenated(m, x, h):
    r, z = torch.sigmoid(m.both2(torch.cat([x, h], dim=1))).split(H, dim=1)
    n = torch.tanh(m.xs[2](x) + r * m.hs[2](h))
    return z * h + n - z * n


def concatenated_separately(m, x, h):
    xh = torch.cat((h, x), -1)
    z = torch.sigmoid(F.linear(xh, m.both[0].weight, m.both[0].bias))
    r = torch.sigmoid(F.linear(xh, m.both[1].weight, m.both[1].bias))
    n = torch.tanh(m.xs[2](x) + m.hs[2](h) * r)
    return (torch.ones_like(z) - z) * n + h * z


def matmuls(m, x, h):
    gx, gh = x @ m.W + m.b, torch.mm(h, m.U)
    r = torch.sigmoid(gx[:, :H] + gh[:, :H])
    z = torch.sigmoid(gx[:, H : 2 * H] + gh[:, H : 2 * H])
    n = torch.tanh(gx[:, 2 * H :] + r * (gh[:, 2 * H :] + m.b2[:H]))
    return (-z + 1) * n + z * h


def transposed_weights(m, x, h):
    gx, gh = torch.addmm(m.b, x, m.x3.weight.t()), torch.matmul(h, m.h3.weight.T) + m.b2
    r, z, n = (gx.narrow(1, i * H, H) for i in range(3))
    a, b, c = gh.unbind(1) if gh.dim() == 3 else gh.split([H, H, H], 1)
    r, z = torch.sigmoid(r + a), torch.sigmoid(z + b)
    n = torch.tanh(n + r * c)
    return n.mul(1 - z).add(h.mul(z))


def separate_matmuls(m, x, h):
    def project(i):
        return x @ m.xs[i].weight.t() + m.b[i * H : (i + 1) * H], h @ m.hs[i].weight.t()

    (x_z, h_z), (x_r, h_r), (x_n, h_n) = (project(i) for i in range(3))
    z, r = torch.sigmoid(x_z + h_z), torch.sigmoid(h_r + x_r)
    return torch.sub(1, z) * torch.tanh(x_n + r * h_n) + z * h


def views(m, x, h):
    gx, gh = m.x3(x).view(-1, 3, H), m.h3(h).unflatten(1, (3, H)).unbind(1)
    r, z = torch.sigmoid(gx[:, 0] + gh[0]), torch.sigmoid(gx[:, 1] + gh[1])
    return torch.lerp(torch.tanh(gx[:, 2] + r * gh[2]), h, z)


def roles_of_z_changed(m, x, h):
    """Cho 2014 and others: z says how much is new."""
    x_r, x_z, x_n = m.x3(x).chunk(3, 1)
    h_r, h_z, h_n = m.h3(h).chunk(3, 1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    return (1 - z) * h + z * torch.tanh(x_n + r * h_n)


def roles_changed_by_difference(m, x, h):
    z = torch.sigmoid(m.xs[0](x) + m.hs[0](h))
    r = torch.sigmoid(m.xs[1](x) + m.hs[1](h))
    return h + z * (torch.tanh(m.xs[2](x) + r * m.hs[2](h)) - h)


SPELLINGS = {
    f.__name__: f
    for f in (two_linears, slices_and_other_order, six_linears, functional, gates_together, concatenated,
              concatenated_separately, matmuls, transposed_weights, separate_matmuls, views, roles_of_z_changed,
              roles_changed_by_difference)
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_loop_over_a_hand_written_cell(spelling):
    graph = check(Model(SPELLINGS[spelling]), x_of(T, B, I), gru=1)
    assert not any(k in graph.calls for k in ("torch.sigmoid", "sigmoid", "torch.tanh", "tanh"))
    [record] = graph.records
    assert record.rewritten and record.found == f"loop of {T} steps over a hand-written cell"
    assert "test_rollup_cells.py" in record.source and f"in {spelling}" in record.source


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_one_hand_written_cell(spelling):
    graph = check(Model(SPELLINGS[spelling], loop=False), x_of(T, B, I), gru_cell=1)
    assert str(graph.records[0]).endswith("-> torch_gru_fuse.gru_cell")


def test_weights_are_put_together_once():
    sizes = {len(check(Model(roles_of_z_changed), x_of(n, B, I), gru=1).gm.graph.nodes) for n in (2, 5, 11)}
    assert len(sizes) == 1

    def twice(m, x, h):
        return six_linears(m, x, six_linears(m, x, h).sin())

    graph = check(Model(twice, loop=False), x_of(T, B, I), gru_cell=2)
    assert sum(v for k, v in graph.calls.items() if k == "aten.cat.default") == 3  # w_ih, w_hh, b_ih


def test_whole_weights_are_used_as_they_are():
    graph = check(Model(two_linears), x_of(T, B, I), gru=1)
    assert graph.calls["aten.cat.default"] == 0 and graph.calls["aten.slice.Tensor"] == 0


def test_input_projection_before_the_loop():
    class Hoisted(Model):
        def forward(self, x):
            h, outputs = x.new_zeros(x.shape[0], H), []
            projected = self.x3(x)
            for t in range(x.shape[1]):
                x_r, x_z, x_n = projected[:, t].chunk(3, 1)
                h_r, h_z, h_n = self.h3(h).chunk(3, 1)
                r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
                h = (1 - z) * torch.tanh(x_n + r * h_n) + z * h
                outputs.append(h)
            return torch.stack(outputs, 1)

    graph = check(Hoisted(None), x_of(B, T, I), gru=1)
    assert not any("linear" in k for k in graph.calls)


def test_layers_of_hand_written_cells():
    class Layers(Model):
        def forward(self, x):
            a = b = x.new_zeros(x.shape[1], H)
            cell = nn.ModuleList([self.h3])[0]
            outputs = []
            for step in x:
                a = six_linears(self, step, a)
                gates_a, gates_b = cell(a).chunk(3, 1), F.linear(b, self.h3_plain.weight, self.b).chunk(3, 1)
                r, z = (torch.sigmoid(p + q) for p, q in zip(gates_a[:2], gates_b[:2], strict=True))
                n = torch.tanh(gates_a[2] + r * gates_b[2])
                b = n + z * (b - n)
                outputs.append(b)
            return torch.stack(outputs), a

    check(Layers(None), x_of(T, B, I), gru=1)  # two layers


def test_gates_that_are_used_elsewhere_stay():
    class Gates(Model):
        def forward(self, x):
            h, gates = x.new_zeros(x.shape[1], H), []
            for step in x:
                x_r, x_z, x_n = self.x3(step).chunk(3, 1)
                h_r, h_z, h_n = self.h3(h).chunk(3, 1)
                r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
                h = (1 - z) * torch.tanh(x_n + r * h_n) + z * h
                gates.append(z)
            return h, torch.stack(gates)

    check(Gates(None), x_of(T, B, I), gru=1)


def test_left_to_inductor_on_a_cpu(monkeypatch):
    from torch_gru_fuse.passes import guards

    monkeypatch.setattr(guards, "GUARDS", (*guards.POSSIBLE, guards.profitable))
    graph = check(Model(two_linears, loop=False), x_of(T, B, I))
    assert graph.reasons == [guards.CELL_ON_CPU]
    check(Model(two_linears), x_of(T, B, I), gru=1)


# ---- what is no GRU ----------------------------------------------------------------------------------------------------------


def cho(m, x, h):
    z = torch.sigmoid(m.xs[0](x) + m.hs[0](h))
    r = torch.sigmoid(m.xs[1](x) + m.hs[1](h))
    return (1 - z) * torch.tanh(m.xs[2](x) + m.hs[2](r * h)) + z * h


def cho_concatenated(m, x, h):
    xh = torch.cat([x, h], 1)
    z, r = torch.sigmoid(m.both[0](xh)), torch.sigmoid(m.both[1](xh))
    return (1 - z) * torch.tanh(m.both[2](torch.cat([x, r * h], 1))) + z * h


def layer_norm(m, x, h):
    z = torch.sigmoid(m.norm(m.xs[0](x) + m.hs[0](h)))
    r = torch.sigmoid(m.norm(m.xs[1](x) + m.hs[1](h)))
    return (1 - z) * torch.tanh(m.xs[2](x) + r * m.hs[2](h)) + z * h


def dreamer(m, x, h):
    r, n, z = F.layer_norm(m.x3(x) + m.h3(h), (3 * H,)).chunk(3, 1)
    r = torch.sigmoid(r)
    n = torch.tanh(r * n)
    z = torch.sigmoid(z - 1)
    return z * n + (1 - z) * h


def ligru(m, x, h):
    z = torch.sigmoid(m.xs[0](x) + m.hs[0](h))
    return (1 - z) * torch.relu(m.xs[1](x) + m.hs[1](h)) + z * h


def minimal(m, x, h):
    f = torch.sigmoid(m.xs[0](x) + m.hs[0](h))
    return (1 - f) * torch.tanh(m.xs[1](x) + m.hs[1](f * h)) + f * h


def no_reset(m, x, h):
    z = torch.sigmoid(m.xs[0](x) + m.hs[0](h))
    return (1 - z) * torch.tanh(m.xs[1](x) + m.hs[1](h)) + z * h


def reset_of_everything(m, x, h):
    z = torch.sigmoid(m.xs[0](x) + m.hs[0](h))
    r = torch.sigmoid(m.xs[1](x) + m.hs[1](h))
    return (1 - z) * torch.tanh(r * (m.xs[2](x) + m.hs[2](h))) + z * h


def reset_of_a_part(m, x, h):
    z = torch.sigmoid(m.xs[0](x) + m.hs[0](h))
    r = torch.sigmoid(m.xs[1](x) + m.hs[1](h))
    projected = m.hs[2](h)
    return (1 - z) * torch.tanh(m.xs[2](x) + r * projected + projected) + z * h


def other_input(m, x, h):
    z = torch.sigmoid(m.xs[0](x.sin()) + m.hs[0](h))
    r = torch.sigmoid(m.xs[1](x) + m.hs[1](h))
    return (1 - z) * torch.tanh(m.xs[2](x) + r * m.hs[2](h)) + z * h


def input_twice(m, x, h):
    z = torch.sigmoid(m.xs[0](x) + m.hs[0](h) + m.xs[1](x))
    r = torch.sigmoid(m.xs[1](x) + m.hs[1](h))
    return (1 - z) * torch.tanh(m.xs[2](x) + r * m.hs[2](h)) + z * h


def scaled(m, x, h):
    z = torch.sigmoid(m.xs[0](x) + 2 * m.hs[0](h))
    r = torch.sigmoid(m.xs[1](x) + m.hs[1](h))
    return (1 - z) * torch.tanh(m.xs[2](x) + r * m.hs[2](h)) + z * h


def shifted(m, x, h):
    """A bias of one beside the Linear (as in TensorFlow's forget bias)."""
    z = torch.sigmoid(m.xs[0](x) + m.hs[0](h) + 1.0)
    r = torch.sigmoid(m.xs[1](x) + m.hs[1](h))
    return (1 - z) * torch.tanh(m.xs[2](x) + r * m.hs[2](h)) + z * h


def wrong_gate_in_the_update(m, x, h):
    z = torch.sigmoid(m.xs[0](x) + m.hs[0](h))
    r = torch.sigmoid(m.xs[1](x) + m.hs[1](h))
    return (1 - z) * torch.tanh(m.xs[2](x) + r * m.hs[2](h)) + r * h


def other_activation(m, x, h):
    z = torch.sigmoid(m.xs[0](x) + m.hs[0](h))
    r = torch.sigmoid(m.xs[1](x) + m.hs[1](h))
    return (1 - z) * F.softsign(m.xs[2](x) + r * m.hs[2](h)) + z * h


def hard_gates(m, x, h):
    z = F.hardsigmoid(m.xs[0](x) + m.hs[0](h))
    r = torch.sigmoid(m.xs[1](x) + m.hs[1](h))
    return (1 - z) * torch.tanh(m.xs[2](x) + r * m.hs[2](h)) + z * h


def one_hidden_state_for_all(m, x, h):
    z = torch.sigmoid(m.xs[0](x) + m.hs[0](h[:1]))
    r = torch.sigmoid(m.xs[1](x) + m.hs[1](h[:1]))
    return (1 - z) * torch.tanh(m.xs[2](x) + r * m.hs[2](h[:1])) + z * h[:1]


def other_state_in_the_update(m, x, h):
    z = torch.sigmoid(m.xs[0](x) + m.hs[0](h))
    r = torch.sigmoid(m.xs[1](x) + m.hs[1](h))
    return (1 - z) * torch.tanh(m.xs[2](x) + r * m.hs[2](h)) + z * h.sin()


def mixed_dtypes(m, x, h):
    z = torch.sigmoid(m.xs[0](x) + m.hs[0](h))
    r = torch.sigmoid(m.xs[1](x) + m.hs[1](h)).float()
    return (1 - z) * torch.tanh(m.xs[2](x) + r * m.hs[2](h)) + z * h


def changed_in_place(m, x, h):
    projected = m.xs[2](x)
    z = torch.sigmoid(m.xs[0](x) + m.hs[0](h))
    r = torch.sigmoid(m.xs[1](x) + m.hs[1](h))
    gated = r * m.hs[2](h)
    projected.mul_(2)
    return (1 - z) * torch.tanh(projected + gated) + z * h


def highway(m, x, h):
    """No recurrence: two layers of a feed-forward network mixed by a gate."""
    gate = torch.sigmoid(m.hs[0](h))
    return gate * torch.tanh(m.hs[1](h)) + (1 - gate) * h


NO_GRU = {
    cho: "the reset gate is applied before the product (Cho 2014, Keras reset_after=False)",
    cho_concatenated: "the reset gate is applied before the product (Cho 2014, Keras reset_after=False)",
    layer_norm: "gate is a function of layer_norm",
    dreamer: "",
    ligru: "the candidate is made by relu, a GRU's by tanh",
    minimal: "before the product",
    no_reset: "its candidate has no reset gate",
    reset_of_everything: "",
    reset_of_a_part: "the reset gate does not multiply all of the candidate's projection",
    other_input: "its gates have different inputs",
    input_twice: "the update gate has 2 projections of the input and 1 of the hidden state",
    scaled: "the update gate scales its terms by 2",
    shifted: "",
    wrong_gate_in_the_update: None,
    other_activation: "the candidate is made by softsign, a GRU's by tanh",
    hard_gates: None,
    one_hidden_state_for_all: None,
    other_state_in_the_update: None,
    mixed_dtypes: None,
    changed_in_place: "an operation between its parts may change one of its tensors in place",
    highway: "its candidate has no reset gate",
}


@pytest.mark.parametrize("cell", NO_GRU, ids=lambda f: f.__name__)
def test_not_a_gru(cell):
    reason = NO_GRU[cell]
    graph = check(Model(cell), x_of(T, B, I))
    assert not any(r.rewritten for r in graph.records)
    if reason is None:  # not even similar
        assert graph.records == []
    else:
        assert graph.records and all(reason in r.reason for r in graph.records), graph.reasons
        assert graph.records[0].found == "hand-written cell" and f"in {cell.__name__}" in graph.records[0].source
        assert graph.records[0].count == T


def test_weights_of_another_kind_are_no_match():
    class Wrapped(torch.Tensor):
        pass

    from torch_gru_fuse.passes import guards

    assert guards.why_not_plain(torch.zeros(2).as_subclass(Wrapped)) == "one of its tensors is a Wrapped"
    model = Model(two_linears).to("meta")
    compiled, graph = compiled_graph(model, torch.randn(T, B, I, device="meta"))
    assert graph.gru == 0 and all("it runs on meta" in reason for reason in graph.reasons) and graph.reasons


def test_arithmetic_without_a_gate_is_no_candidate():
    class Plain(Model):
        def forward(self, x):
            y = self.xs[0](x[0])
            return torch.tanh(y) + torch.sigmoid(y) * (y - 1)

    assert check(Plain(None), x_of(T, B, I)).records == []


# ---- through the compiler ----------------------------------------------------------------------------------------------------


@pytest.mark.versions
@pytest.mark.parametrize("spelling", ["two_linears", "roles_of_z_changed", "concatenated"])
def test_compiled_by_inductor(spelling):
    model, x = Model(SPELLINGS[spelling]), torch.randn(T, B, I, requires_grad=True)
    inputs = [*model.parameters(), x]
    with torch_gru_fuse.enable():
        actual = value_and_grads(torch.compile(model, fullgraph=True), (x,), inputs)
    assert_same(actual, value_and_grads(model, (x,), inputs), 2e-5)
    assert [r.target for r in torch_gru_fuse.rewrites()] == ["gru"]


def test_exported():
    from torch_gru_fuse.passes.rewrite import rewrite

    for cell in (two_linears, concatenated, roles_of_z_changed):
        model, x = Model(cell).double(), x_of(T, B, I)
        program = torch.export.export(model, (x,))
        assert rewrite(program.graph_module) == 1
        assert_same(tensors(program.module()(x)), tensors(model(x)), 1e-12)


def test_autocast_is_left_alone():
    class Autocast(Model):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x)

    model, x = Autocast(two_linears), torch.randn(T, B, I)
    compiled, graph = compiled_graph(model, x)
    assert graph.gru == graph.gru_cell == 0
    assert_same(tensors(compiled(x)), tensors(model(x)), 0)


# ---- random spellings --------------------------------------------------------------------------------------------------------

SUMS = [lambda a, b: a + b, lambda a, b: b + a, torch.add, lambda a, b: a.add(b), lambda a, b: a - (-b)]
PRODUCTS = [lambda a, b: a * b, lambda a, b: b * a, torch.mul, lambda a, b: b.mul(a)]
SIGMOIDS = [torch.sigmoid, F.sigmoid, lambda a: a.sigmoid(), nn.Sigmoid()]
TANHS = [torch.tanh, F.tanh, lambda a: a.tanh(), nn.Tanh()]
COMPLEMENTS = [
    lambda z: 1 - z, lambda z: 1.0 - z, lambda z: torch.ones_like(z) - z, lambda z: -z + 1, lambda z: torch.rsub(z, 1),
]  # fmt: skip
PIECES = [
    lambda g: g.chunk(3, 1), lambda g: torch.chunk(g, 3, dim=-1), lambda g: g.split(H, 1),
    lambda g: torch.split(g, [H] * 3, -1), lambda g: (g[:, :H], g[:, H : 2 * H], g[:, 2 * H :]),
    lambda g: [g[..., i * H : (i + 1) * H] for i in range(3)], lambda g: [g.narrow(1, i * H, H) for i in range(3)],
]  # fmt: skip


@settings(max_examples=20, deadline=None, database=None, derandomize=True)
@given(st.data())
def test_any_spelling(data):
    def one_of(options):
        return options[data.draw(st.integers(0, len(options) - 1))]

    add, mul, sigmoid, tanh, complement, pieces_x, pieces_h = map(
        one_of, (SUMS, PRODUCTS, SIGMOIDS, TANHS, COMPLEMENTS, PIECES, PIECES)
    )
    order = data.draw(st.permutations(range(3)))
    separate_x, separate_h = data.draw(st.booleans()), data.draw(st.booleans())
    update = data.draw(st.sampled_from(["sum", "difference", "lerp"]))
    swapped, reset_before = data.draw(st.booleans()), data.draw(st.booleans())

    def cell(m, x, h):
        gx = [linear(x) for linear in m.xs] if separate_x else pieces_x(m.x3(x))
        gh = [linear(h) for linear in m.hs] if separate_h else pieces_h(m.h3(h))
        (x_r, x_z, x_n), (h_r, h_z, h_n) = ([g[i] for i in order] for g in (gx, gh))
        r, z = sigmoid(add(x_r, h_r)), sigmoid(add(x_z, h_z))
        n = tanh(add(x_n, m.hs[0](mul(r, h)) if reset_before else mul(r, h_n)))
        new, old = (h, n) if swapped else (n, h)
        if update == "sum":
            return add(mul(complement(z), new), mul(z, old))
        return new + mul(z, old - new) if update == "difference" else torch.lerp(new, old, z)

    torch.manual_seed(0)
    loop = data.draw(st.booleans())
    check(Model(cell, loop), x_of(2, B, I), gru=int(loop and not reset_before), gru_cell=int(not loop and not reset_before))
