"""What the pass makes of a graph, written out, and what it leaves alone, one test for each guard."""

import expecttest
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule

import torch_gru_fuse
from torch_gru_fuse.passes.guards import GUARDS, SIGNATURES, why_not
from torch_gru_fuse.passes.rewrite import rewrite


def rewritten_by_compile(module, *args):
    """The code of Dynamo's graph after the pass."""
    seen = []

    def backend(gm, inputs):
        rewrite(gm)
        seen.append(gm.code.strip())
        return gm.forward

    backend.rewrites_gru = True
    from torch_gru_fuse.switch import keep_dynamo_hook

    keep_dynamo_hook()
    torch.compile(module, backend=backend, fullgraph=True)(*args)
    [code] = seen
    # Names of weights in order of appearance, and no comments or type annotations, which differ between torch versions.
    lines = []
    for line in code.splitlines():
        body = line.split(";  ")[0].split("  #")[0]
        if body.strip() and not body.strip().startswith(("def ", "_")):
            lines.append(body.strip())
    return "\n".join(lines)


@pytest.mark.usefixtures("cells_on_cpu")
class TestGraphs(expecttest.TestCase):
    def test_sequence(self):
        rnn = nn.GRU(4, 6, batch_first=True, bias=False)
        self.assertExpectedInline(
            rewritten_by_compile(lambda x, h: rnn(x, h)[0].relu(), torch.randn(3, 5, 4), torch.zeros(1, 3, 6)),
            """\
l_x_ = L_x_
l_h_ = L_h_
l_rnn_parameters_weight_ih_l0_ = L_rnn_parameters_weight_ih_l0_
l_rnn_parameters_weight_hh_l0_ = L_rnn_parameters_weight_hh_l0_
gru_default = torch.ops.torch_gru_fuse.gru.default(l_x_, l_h_, [l_rnn_parameters_weight_ih_l0_, l_rnn_parameters_weight_hh_l0_], False, 1, 0.0, True, False, True)
output = gru_default[0]
relu = output.relu()
return (relu,)""",
        )

    def test_cell(self):
        cell = nn.GRUCell(4, 6, bias=False)
        self.assertExpectedInline(rewritten_by_compile(lambda x, h: cell(x, h).relu(), torch.randn(3, 4), torch.zeros(3, 6)), """\
l_x_ = L_x_
l_h_ = L_h_
l_cell_parameters_weight_ih_ = L_cell_parameters_weight_ih_
l_cell_parameters_weight_hh_ = L_cell_parameters_weight_hh_
gru_cell_default = torch.ops.torch_gru_fuse.gru_cell.default(l_x_, l_h_, l_cell_parameters_weight_ih_, l_cell_parameters_weight_hh_, None, None)
relu = gru_cell_default.relu()
return (relu,)""")

    def test_loop(self):
        cell = nn.GRUCell(4, 6, bias=False)

        def loop(x, h):
            outputs = []
            for t in reversed(range(x.shape[1])):
                h = cell(x[:, t], h)
                outputs.append(h)
            return torch.stack(outputs), h

        self.assertExpectedInline(rewritten_by_compile(loop, torch.randn(3, 5, 4), torch.zeros(3, 6)), """\
l_x_ = L_x_
l_h_ = L_h_
l_cell_parameters_weight_ih_ = L_cell_parameters_weight_ih_
l_cell_parameters_weight_hh_ = L_cell_parameters_weight_hh_
movedim_int = torch.ops.aten.movedim.int(l_x_, 1, 0)
flip_default = torch.ops.aten.flip.default(movedim_int, [0])
unsqueeze_default = torch.ops.aten.unsqueeze.default(l_h_, 0)
gru_default = torch.ops.torch_gru_fuse.gru.default(flip_default, unsqueeze_default, [l_cell_parameters_weight_ih_, l_cell_parameters_weight_hh_], False, 1, 0.0, False, False, False)
getitem_5 = gru_default[0]
getitem_6 = gru_default[1]
select_int = torch.ops.aten.select.int(getitem_6, 0, 0)
return (getitem_5, select_int)""")

    def test_hand_written_cell(self):
        w_x, w_h = nn.Linear(4, 18, bias=False), nn.Linear(6, 18)

        def cell(x, h):
            z, r, n = w_x(x).chunk(3, 1)
            h_z, h_r, h_n = w_h(h).chunk(3, 1)
            z = torch.sigmoid(z + h_z)
            return (1 - z) * torch.tanh(n + torch.sigmoid(r + h_r) * h_n) + z * h

        self.assertExpectedInline(rewritten_by_compile(cell, torch.randn(3, 4), torch.zeros(3, 6)), """\
l_w_x_parameters_weight_ = L_w_x_parameters_weight_
l_x_ = L_x_
l_w_h_parameters_weight_ = L_w_h_parameters_weight_
l_w_h_parameters_bias_ = L_w_h_parameters_bias_
l_h_ = L_h_
slice_tensor = torch.ops.aten.slice.Tensor(l_w_x_parameters_weight_, 0, 6, 12)
slice_tensor_1 = torch.ops.aten.slice.Tensor(l_w_x_parameters_weight_, 0, 0, 6)
slice_tensor_2 = torch.ops.aten.slice.Tensor(l_w_x_parameters_weight_, 0, 12, 18)
cat_default = torch.ops.aten.cat.default([slice_tensor, slice_tensor_1, slice_tensor_2], 0)
slice_tensor_3 = torch.ops.aten.slice.Tensor(l_w_h_parameters_weight_, 0, 6, 12)
slice_tensor_4 = torch.ops.aten.slice.Tensor(l_w_h_parameters_weight_, 0, 0, 6)
slice_tensor_5 = torch.ops.aten.slice.Tensor(l_w_h_parameters_weight_, 0, 12, 18)
cat_default_1 = torch.ops.aten.cat.default([slice_tensor_3, slice_tensor_4, slice_tensor_5], 0)
new_zeros_default = torch.ops.aten.new_zeros.default(l_h_, [18])
slice_tensor_6 = torch.ops.aten.slice.Tensor(l_w_h_parameters_bias_, 0, 6, 12)
slice_tensor_7 = torch.ops.aten.slice.Tensor(l_w_h_parameters_bias_, 0, 0, 6)
slice_tensor_8 = torch.ops.aten.slice.Tensor(l_w_h_parameters_bias_, 0, 12, 18)
cat_default_2 = torch.ops.aten.cat.default([slice_tensor_6, slice_tensor_7, slice_tensor_8], 0)
gru_cell_default = torch.ops.torch_gru_fuse.gru_cell.default(l_x_, l_h_, cat_default, cat_default_1, new_zeros_default, cat_default_2)
return (gru_cell_default,)""")


def test_cells_are_left_to_inductor_on_a_cpu():
    gm = graph_with_gru(target=torch.gru_cell)
    assert rewrite(gm) == 0
    assert "on a CPU Inductor's own code for a cell is faster" in torch_gru_fuse.rewrites()[0].reason


# ---- exported graphs ----------------------------------------------------------------------------------------------------


def test_exported_program():
    module, x = nn.GRU(4, 6, 2), torch.randn(5, 3, 4)
    program = torch.export.export(module, (x,))
    expected = module(x)
    assert rewrite(program.graph_module) == 1
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert torch.ops.torch_gru_fuse.gru.default in targets and torch.ops.aten.gru.input not in targets
    torch.testing.assert_close(program.module()(x), expected)


# ---- guards -------------------------------------------------------------------------------------------------------------


def graph_with_gru(change=lambda name, value: value, target=torch.gru):
    """A graph of one call of torch.gru on placeholders whose fake tensors `change` may replace."""
    with FakeTensorMode():
        fakes = {
            "x": torch.empty(5, 3, 4), "h": torch.empty(1, 3, 6),
            "w_ih": torch.empty(18, 4), "w_hh": torch.empty(18, 6), "b_ih": torch.empty(18), "b_hh": torch.empty(18),
        }  # fmt: skip
        fakes = {name: change(name, value) for name, value in fakes.items()}
    graph = Graph()
    nodes = {}
    for name, value in fakes.items():
        nodes[name] = graph.placeholder(name)
        if value is not None:
            nodes[name].meta["example_value"] = value
    weights = [nodes[n] for n in ("w_ih", "w_hh", "b_ih", "b_hh")]
    if target is torch.gru:
        call = graph.call_function(target, (nodes["x"], nodes["h"], weights, True, 1, 0.0, False, False, False))
    else:
        call = graph.call_function(target, (nodes["x"], nodes["h"], *weights))
    graph.output(call)
    return GraphModule({}, graph)


def the_call(gm):
    [node] = [n for n in gm.graph.nodes if n.op == "call_function"]
    return node


@pytest.mark.usefixtures("cells_on_cpu")
@pytest.mark.parametrize("target", [torch.gru, torch.gru_cell])
def test_the_graph_of_the_guard_tests_is_rewritten_as_it_is(target):
    gm = graph_with_gru(target=target)
    assert why_not(target.__name__, the_call(gm)) is None
    assert rewrite(gm) == 1
    assert the_call(gm).target is getattr(torch.ops.torch_gru_fuse, target.__name__).default


def on(which, function):
    return lambda name, value: function(value) if name == which else value


REFUSED = {
    "known_tensors": (on("w_hh", lambda v: None), "does not say what one of its tensors is"),
    "plain_tensors": (on("w_ih", lambda v: v.to_sparse()), "sparse or quantized"),
    "device": (lambda name, value: value.to("meta"), "it runs on meta; supported are cpu and cuda"),
    "dtype": (lambda name, value: value.to(torch.complex64), "it computes in torch.complex64"),
}


@pytest.mark.parametrize("target", [torch.gru, torch.gru_cell])
@pytest.mark.parametrize("guard", REFUSED)
def test_guard_refuses(guard, target, caplog):
    change, reason = REFUSED[guard]
    with FakeTensorMode():
        gm = graph_with_gru(change, target)
    before = gm.code
    caplog.set_level("INFO", logger="torch_gru_fuse")
    assert rewrite(gm) == 0
    assert gm.code == before
    [record] = torch_gru_fuse.rewrites()
    assert not record.rewritten and reason in record.reason
    assert f"torch.{target.__name__} in a function not rewritten: " in caplog.text and reason in caplog.text


def test_guard_refuses_tensor_subclasses():
    class Wrapped(torch.Tensor):
        pass

    wrapped = torch.zeros(5, 3, 4).as_subclass(Wrapped)
    gm = graph_with_gru(on("x", lambda v: wrapped))
    assert rewrite(gm) == 0
    assert "one of its tensors is a Wrapped" in torch_gru_fuse.rewrites()[0].reason


@pytest.mark.parametrize("target", [torch.gru, torch.ops.aten.gru.data])
@pytest.mark.parametrize("keywords", [False, True])
def test_the_overload_for_packed_sequences_has_an_op_of_its_own(target, keywords):
    gm = graph_with_gru()
    call = the_call(gm)
    x, h, weights, *flags = call.args
    call.target = target
    call.args = (x, x, h, weights, *flags[:-1])  # data, batch_sizes, hx, params, ...
    expected = call.args
    if keywords:
        call.kwargs = dict(zip(SIGNATURES["gru_packed"], call.args, strict=True))
        call.args = ()
    assert rewrite(gm) == 1
    [fused] = [node for node in gm.graph.nodes if node.target is torch.ops.torch_gru_fuse.gru_packed.default]
    assert fused.args == expected
    assert str(torch_gru_fuse.rewrites()[0]) == "torch.gru in a function -> torch_gru_fuse.gru_packed"


def test_guard_refuses_parameters_that_are_no_list():
    gm = graph_with_gru()
    call = the_call(gm)
    x, h, _, *flags = call.args
    call.args = (x, h, x, *flags)
    assert rewrite(gm) == 0
    assert "its parameters are not a list" in torch_gru_fuse.rewrites()[0].reason


def test_guard_refuses_calls_it_does_not_know():
    gm = graph_with_gru(target=torch.gru_cell)
    call = the_call(gm)
    call.args, call.kwargs = call.args[:3], {"other": 1}
    assert rewrite(gm) == 0
    assert "not those of torch.gru_cell" in torch_gru_fuse.rewrites()[0].reason


def test_every_guard_has_a_test():
    assert {g.__name__ for g in GUARDS} == {*REFUSED, "overload", "profitable"}


def test_other_functions_are_no_candidates():
    graph = Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.lstm, (x, (x, x), [x], True, 1, 0.0, False, False, False)))
    gm = GraphModule({}, graph)
    assert rewrite(gm) == 0 and torch_gru_fuse.rewrites() == []
