"""Bad input raises RuntimeError, as in torch, and names the argument and both sizes; compiled and eager alike."""

import pytest
import torch
from problems import cell_args, gru_args

import torch_gru_fuse
import torch_gru_fuse.functional as fused

pytestmark = pytest.mark.versions


def change(args, index, function):
    return [function(a) if i == index else a for i, a in enumerate(args)]


def change_param(args, index, function):
    return change(args, 2, lambda params: change(params, index, function))


# what is wrong: (arguments made bad, what the message says)
GRU = {
    "input is 2-D": (lambda a: change(a, 0, lambda x: x[0]), r"input must be 3-D \[T, B, I\], got 2-D of size \(3, 4\)"),
    "input is 4-D": (lambda a: change(a, 0, lambda x: x[None]), "input must be 3-D"),
    "hx is 2-D": (lambda a: change(a, 1, lambda h: h[0]), r"hx must be 3-D .* got 2-D of size \(3, 6\)"),
    "input size": (lambda a: change(a, 0, lambda x: x[..., :3]),
                   r"params\[0\] \(w_ih of layer 0\) has size \(18, 4\), expected \(18, 3\)"),
    "T is 0": (lambda a: change(a, 0, lambda x: x[:0]), "input has a sequence length of 0"),
    "hx layers": (lambda a: change(a, 1, lambda h: h[:1]), r"hx has 1 states, expected num_layers \* num_directions = 2 \* 1 = 2"),
    "hx batch": (lambda a: change(a, 1, lambda h: h[:, :2]), "hx has batch size 2, but input has 3"),
    "hx hidden": (lambda a: change(a, 1, lambda h: h[..., :5]), r"has size \(18, 4\), expected \(15, 4\) for hidden size 5"),
    "input dtype": (lambda a: change(a, 0, lambda x: x.double()), "hx has dtype torch.float32, but input has torch.float64"),
    "input is long": (lambda a: change(a, 0, lambda x: x.detach().long()), "input has dtype torch.int64, expected one of"),
    "hx dtype": (lambda a: change(a, 1, lambda h: h.half()), "hx has dtype torch.float16, but input has torch.float32"),
    "weight dtype": (lambda a: change_param(a, 5, lambda w: w.bfloat16()), r"params\[5\] \(w_hh of layer 1\) has dtype torch.bfloat16"),
    "weight size": (lambda a: change_param(a, 5, lambda w: w[:17]), r"params\[5\] \(w_hh of layer 1\) has size \(17, 6\), expected \(18, 6\)"),
    "bias size": (lambda a: change_param(a, 2, lambda b: b[:6]), r"params\[2\] \(b_ih of layer 0\) has size \(6,\), expected \(18,\)"),
    "too few params": (lambda a: change(a, 2, lambda p: p[:7]), "params has 7 tensors, expected 8"),
    "biases missing": (lambda a: change(a, 2, lambda p: p[:4]), "params has 4 tensors, expected 8: w_ih, w_hh, b_ih, b_hh"),
    "biases too many": (lambda a: change(a, 3, lambda _: False), "params has 8 tensors, expected 4: w_ih, w_hh for each"),
    "wrong number of layers": (lambda a: change(a, 4, lambda _: 3), "params has 8 tensors, expected 12"),
    "bidirectional": (lambda a: change(a, 7, lambda _: True), "params has 8 tensors, expected 16"),
    "input device": (lambda a: change(a, 0, lambda x: x.to("meta")), "hx is on cpu, but input is on meta"),
    "dropout": (lambda a: change(change(a, 5, lambda _: 1.5), 6, lambda _: True), "dropout must be .* between 0 and 1, got 1.5"),
    "layers": (lambda a: change(a, 4, lambda _: 0), "num_layers must be at least 1, got 0"),
}  # fmt: skip
CELL = {
    "input is 1-D": (lambda a: change(a, 0, lambda x: x[0]), r"input must be 2-D \[B, I\], got 1-D of size \(4,\)"),
    "hx is 3-D": (lambda a: change(a, 1, lambda h: h[None]), r"hx must be 2-D"),
    "input size": (lambda a: change(a, 0, lambda x: x[:, :3]), r"w_ih has size \(18, 4\), expected \(18, 3\)"),
    "batch": (lambda a: change(a, 1, lambda h: h[:2]), "hx has batch size 2, but input has 3"),
    "hidden": (lambda a: change(a, 1, lambda h: h[:, :5]), r"w_ih has size \(18, 4\), expected \(15, 4\)"),
    "dtype": (lambda a: change(a, 1, lambda h: h.double()), "hx has dtype torch.float64, but input has torch.float32"),
    "bias": (lambda a: change(a, 5, lambda b: b[:5]), r"b_hh has size \(5,\), expected \(18,\)"),
    "weight": (lambda a: change(a, 3, lambda w: w.t()), r"w_hh has size \(6, 18\), expected \(18, 6\)"),
    "device": (lambda a: change(a, 2, lambda w: w.to("meta")), "w_ih is on meta, but input is on cpu"),
}  # fmt: skip


@pytest.mark.parametrize("case", GRU)
def test_gru(case):
    spoil, message = GRU[case]
    bad = spoil(list(gru_args()))
    with pytest.raises((RuntimeError, IndexError)):
        torch.gru(*bad)  # torch refuses it, too
    with pytest.raises(RuntimeError, match=f"torch_gru_fuse.gru: .*{message}"):
        fused.gru(*bad)


@pytest.mark.parametrize("case", CELL)
def test_gru_cell(case):
    spoil, message = CELL[case]
    bad = spoil(list(cell_args()))
    if case != "device":  # torch computes a meta result from mixed devices
        with pytest.raises((RuntimeError, IndexError)):
            torch.gru_cell(*bad)
    with pytest.raises(RuntimeError, match=f"torch_gru_fuse.gru_cell: .*{message}"):
        fused.gru_cell(*bad)


@pytest.mark.parametrize("case", ["T is 0", "hx batch", "hx dtype", "weight size", "too few params", "dropout"])
def test_compiled_call_raises_the_same_error(case):
    spoil, message = GRU[case]
    bad = spoil(list(gru_args(requires_grad=False)))
    torch_gru_fuse.enable()
    with pytest.raises(RuntimeError, match=f"torch_gru_fuse.gru: .*{message}"):
        torch.compile(torch.gru)(*bad)
    with pytest.raises(RuntimeError, match=f"torch_gru_fuse.gru: .*{message}"):
        torch.compile(lambda *a: fused.gru(*a), fullgraph=True)(*bad)


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda x, h: (x[..., :3], h), RuntimeError),
        (lambda x, h: (x, h[:, :2]), RuntimeError),
        (lambda x, h: (x.double(), h), ValueError),
        (lambda x, h: (x[0, 0], h), ValueError),
    ],
    ids=["input size", "batch", "dtype", "1-D"],
)
def test_compiled_module_raises_the_error_of_the_eager_module(spoil, error):
    module = torch.nn.GRU(4, 6)
    bad = spoil(torch.randn(5, 3, 4), torch.zeros(1, 3, 6))
    with pytest.raises(error) as eager:
        module(*bad)
    torch_gru_fuse.enable()
    with pytest.raises(error) as compiled:
        torch.compile(module)(*bad)
    assert str(compiled.value) == str(eager.value)
