"""The ops for packed sequences as a user calls them: torch's results, gradients, flags and errors, on the CPU."""

import pytest
import torch
from problems import assert_same, ops, packed_args, value_and_grads
from torch import nn
from torch.library import opcheck
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import torch_gru_fuse.functional as fused
from torch_gru_fuse import equations_packed, torch_hooks
from torch_gru_fuse.ops import cudnn_path, packed_path
from torch_gru_fuse.ops.call import PackedCall

pytestmark = pytest.mark.versions

VARIANTS = [
    {},
    {"L": 1},
    {"bidirectional": True, "L": 3},
    {"bias": False, "bidirectional": True},
    {"lengths": (4, 4, 4)},
    {"lengths": (6, 1)},
    {"lengths": (1,), "I": 1, "H": 1},
    {"lengths": (9, 9, 8, 5, 5, 5, 1), "bidirectional": True},
]


def identify(variant):
    return ", ".join(f"{k}={v}" for k, v in variant.items()) or "default"


def differentiated(args):
    return [args[0], args[2], *args[3]]


@pytest.mark.parametrize("variant", VARIANTS, ids=identify)
def test_gives_what_torch_gru_gives(variant, nan_filled_empty):
    args = packed_args(dtype=torch.float64, **variant)
    inputs = differentiated(args)
    actual, expected = value_and_grads(fused.gru_packed, args, inputs), value_and_grads(torch.gru, args, inputs)
    assert_same(actual, expected, 1e-13)  # float64: rounding of sums of at most 50 terms
    with torch.no_grad():
        assert_same(fused.gru_packed(*args), torch.gru(*args), 1e-14)


@pytest.mark.parametrize("enforce_sorted", [True, False], ids=["sorted", "unsorted"])
def test_gives_what_the_module_gives(enforce_sorted):
    rnn = nn.GRU(4, 6, 2, bidirectional=True, dtype=torch.float64)
    lengths = [5, 3, 3, 1] if enforce_sorted else [3, 1, 5, 3]
    x, h = torch.randn(5, 4, 4, dtype=torch.float64), torch.randn(4, 4, 6, dtype=torch.float64)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=enforce_sorted)

    def ours():
        state = rnn.permute_hidden(h, packed.sorted_indices)
        data, h_n = fused.gru_packed(packed.data, packed.batch_sizes, state, rnn._flat_weights, True, 2, 0.0, False, True)
        return pad_packed_sequence(packed._replace(data=data))[0], rnn.permute_hidden(h_n, packed.unsorted_indices)

    def theirs():
        out, h_n = rnn(packed, h)
        return pad_packed_sequence(out)[0], h_n

    inputs = [*rnn.parameters()]
    assert_same(value_and_grads(ours, (), inputs), value_and_grads(theirs, (), inputs), 1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    args = packed_args(dtype=dtype)
    inputs = differentiated(args)
    # a dozen roundings of values below 4
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 12 * 2**-8, torch.float16: 12 * 2**-11}[dtype]
    assert_same(value_and_grads(fused.gru_packed, args, inputs), value_and_grads(torch.gru, args, inputs), tolerance)


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_through_one_output_alone(which):
    args = packed_args(dtype=torch.float64, bidirectional=True)
    inputs = differentiated(args)
    expected = value_and_grads(lambda *a: torch.gru(*a)[which], args, inputs)
    assert_same(value_and_grads(lambda *a: fused.gru_packed(*a)[which], args, inputs), expected, 1e-13)


@pytest.mark.parametrize("frozen", ["data", "weights", "all but the initial state"])
def test_only_wanted_gradients_are_computed(frozen):
    data, sizes, hx, params, *flags = packed_args(dtype=torch.float64, bidirectional=True)
    data.requires_grad_(frozen == "weights")
    hx.requires_grad_(frozen == "all but the initial state")
    for p in params[:: 3 if frozen == "data" else 1]:
        p.requires_grad_(False)
    args = (data, sizes, hx, params, *flags)
    inputs = [t for t in differentiated(args) if t.requires_grad]
    assert_same(value_and_grads(fused.gru_packed, args, inputs), value_and_grads(torch.gru, args, inputs), 1e-13)


@pytest.mark.parametrize("dropout", [0.4, 1.0])
def test_dropout_draws_the_masks_of_torch_gru(dropout):
    args = packed_args(L=3, bidirectional=True, dropout=dropout, train=True, dtype=torch.float64)
    inputs = differentiated(args)
    torch.manual_seed(7)
    actual = value_and_grads(fused.gru_packed, args, inputs)
    torch.manual_seed(7)
    assert_same(actual, value_and_grads(torch.gru, args, inputs), 1e-13)
    args = (*args[:7], False, args[8])
    assert_same(fused.gru_packed(*args), torch.gru(*args), 1e-13)


def test_recompute_gives_the_same():
    args = packed_args(bidirectional=True, dtype=torch.float64)
    inputs = differentiated(args)
    actual = value_and_grads(lambda *a: fused.gru_packed(*a, recompute=True), args, inputs)
    assert_same(actual, value_and_grads(torch.gru, args, inputs), 1e-13)


def test_non_contiguous_arguments():
    data, sizes, hx, params, *flags = packed_args(L=1, dtype=torch.float64, requires_grad=False)
    params = [params[0].t().contiguous().t(), *params[1:]]
    args = [data.t().contiguous().t(), sizes.repeat_interleave(2)[::2], hx.transpose(0, 1).contiguous().transpose(0, 1), params]
    inputs = [t.requires_grad_() for t in (args[0], args[2], *params)]
    args = (*args, *flags)
    theirs = (args[0], sizes, *args[2:])  # torch takes the sizes for contiguous
    assert_same(value_and_grads(fused.gru_packed, args, inputs), value_and_grads(torch.gru, theirs, inputs), 1e-13)
    with torch.no_grad():
        assert_same(fused.gru_packed(*args), torch.gru(*theirs), 1e-14)


# ---- cuDNN's calls ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [False, True], ids=["no dropout", "dropout"])
def test_cudnn_path(monkeypatch, dropout):
    """With torch's GRU in the place of cuDNN: what it is given, where its reserve is kept, what its gradients become."""

    def cudnn_forward(x, hx, params, has_biases, layers, bidirectional, step_sizes):
        output, h_n = torch.gru(x, torch.tensor(step_sizes), hx, params, has_biases, layers, 0.0, False, bidirectional)
        size = 6 * layers * len(step_sizes) * step_sizes[0] * output.shape[1] * 4 + 256  # bytes that cuDNN asks for
        return torch_hooks.CudnnGRU(output, h_n, torch.full((size,), 42, dtype=torch.uint8))

    def cudnn_backward(
        grad_output, grad_h_n, x, hx, params, has_biases, layers, bidirectional, step_sizes, output, reserve, *, need_weights
    ):  # fmt: skip
        assert (reserve[:256] == 42).all()
        tensors = [t.detach().requires_grad_() for t in (x, hx, *params)]
        with torch.enable_grad():
            outputs = torch.gru(tensors[0], torch.tensor(step_sizes), tensors[1], tensors[2:], has_biases, layers, 0.0, False,
                                bidirectional)  # fmt: skip
        grads = [torch.zeros_like(o) if g is None else g for o, g in zip(outputs, (grad_output, grad_h_n), strict=True)]
        dx, dhx, *weights = torch.autograd.grad(outputs, tensors, grads)
        return dx, dhx, weights

    monkeypatch.setattr(torch_hooks, "cudnn_gru_forward", cudnn_forward)
    monkeypatch.setattr(torch_hooks, "cudnn_gru_backward", cudnn_backward)
    monkeypatch.setattr(PackedCall, "empty_results", lambda call, save: _as_on_cuda(call))
    data, sizes, hx, params, bias, L, *_ = packed_args(L=3, bidirectional=True, requires_grad=False)
    masks = torch.rand(2, data.shape[0], 12) if dropout else None
    call = PackedCall(data, sizes, hx, params, bias, L, True, masks)
    output, h_n, reserve = cudnn_path.gru_forward(call, True)
    grads = torch.randn_like(output), torch.randn_like(h_n)
    needs = [True] * (2 + len(params))
    actual = cudnn_path.gru_backward(call, *grads, output, reserve, needs)
    monkeypatch.undo()
    expected_output, expected_h_n, expected_reserve = packed_path.gru_forward(call, True)
    expected = packed_path.gru_backward(call, *grads, expected_output, expected_reserve, needs)
    assert_same([output, h_n, *actual], [expected_output, expected_h_n, *expected], 1e-5)


def _as_on_cuda(call):
    from torch_gru_fuse.ops.schemas import packed_reserve_size

    T, B = call.batch_sizes.shape[0], call.hx.shape[1]
    size = packed_reserve_size(call.N, T, B, call.H, call.L, call.D, cuda=True, bytes_each=4)
    return call.input.new_empty(call.N, call.D * call.H), torch.empty_like(call.hx), call.input.new_empty(size)


# ---- registrations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [VARIANTS[1], VARIANTS[3]], ids=identify)
def test_opcheck_gru_packed(variant):
    opcheck(ops.gru_packed.default, packed_args(**variant))


def test_opcheck_forward_and_backward():
    data, sizes, hx, params, bias, L, *_, bidirectional = packed_args(bidirectional=True)
    masks = torch.ones(1, data.shape[0], 12)
    for save, m in ((False, None), (True, masks)):
        opcheck(ops.gru_packed_forward.default, (data, sizes, hx, params, bias, L, bidirectional, m, save))
    data, hx, *params = [t.detach() for t in (data, hx, *params)]
    output, h_n, reserve = ops.gru_packed_forward(data, sizes, hx, params, bias, L, bidirectional, masks, True)
    for grads in ((torch.ones_like(output), None), (None, torch.ones_like(h_n))):
        for needs in ([True] * (2 + len(params)), [False, True] + [True, False] * (len(params) // 2)):
            opcheck(ops.gru_packed_backward.default,
                    (*grads, data, sizes, hx, params, bias, L, bidirectional, masks, output, reserve, needs))  # fmt: skip


@pytest.mark.parametrize("batch_first", [False, True])
def test_opcheck_of_packing_and_padding(batch_first):
    x = torch.randn(*((3, 5) if batch_first else (5, 3)), 2, requires_grad=True)
    lengths = torch.tensor([4, 4, 2])
    opcheck(ops.pack_padded.default, (x, lengths, batch_first))
    data, sizes = pack_padded_sequence(x, lengths, batch_first)[:2]
    data = data.detach().requires_grad_()
    for total_length, batch in ((None, None), (6, 3)):
        opcheck(ops.pad_packed.default, (data, sizes, batch_first, -1.0, total_length, batch))
    opcheck(ops.unpad.default, (x, sizes, batch_first, data.shape[0]))
    opcheck(ops.packed_zeros.default, (data.detach(), sizes, 2, 4))
    opcheck(ops.lengths_tensor.default, ([4, 4, 2],))


def test_gradgradcheck():
    data, sizes, hx, params, *flags = packed_args((3, 2, 1), I=2, H=2, bidirectional=True, dtype=torch.float64)

    def run(data, hx, *params):
        return fused.gru_packed(data, sizes, hx, list(params), *flags)

    inputs = (data, hx, *params)
    assert torch.autograd.gradcheck(run, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_gradgradcheck_with_masks():
    data, sizes, hx, params, bias, L, *_ = packed_args((3, 1), I=2, H=2, dtype=torch.float64)
    masks = torch.rand(1, 4, 2, dtype=torch.float64)

    def run(data, hx, *params):
        return ops.gru_packed_forward(data, sizes, hx, list(params), bias, L, False, masks, True)[:2]

    assert torch.autograd.gradcheck(run, (data, hx, *params), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (data, hx, *params), fast_mode=True)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_gradients_of_a_layer_are_those_of_its_equations(reverse):
    data, sizes, hx, params, *_ = packed_args((5, 3, 3, 1), L=1, dtype=torch.float64)
    sizes = sizes.tolist()
    inputs = [data, hx.detach()[0].requires_grad_(), *params]
    out, final = equations_packed.gru_layer(*inputs, reverse=reverse, sizes=sizes)
    grads = torch.randn_like(out), torch.randn_like(final)
    expected = torch.autograd.grad((out, final), inputs, grads, retain_graph=True)
    actual = equations_packed.gru_layer_gradients(*grads, data, inputs[1], out, *params, reverse=reverse, sizes=sizes)
    assert_same(actual, expected, 1e-13)


def test_vmap_runs_every_sample():
    data, sizes, hx, params, *flags = packed_args(requires_grad=False, bidirectional=True, dtype=torch.float64)
    several = torch.randn(3, *data.shape, dtype=torch.float64)
    expected = torch.stack([torch.gru(d, sizes, hx, params, *flags)[0] for d in several])
    actual = torch.vmap(lambda d: fused.gru_packed(d, sizes, hx, params, *flags)[0])(several)
    torch.testing.assert_close(actual, expected)

    def theirs(params, d):  # torch's own does not run under torch.func
        params = [p.clone().requires_grad_() for p in params]
        return torch.autograd.grad(torch.gru(d, sizes, hx, params, *flags)[0].sin().sum(), params)

    ours = torch.func.grad(lambda params, d: fused.gru_packed(d, sizes, hx, params, *flags)[0].sin().sum())
    assert_same(ours(params, data), theirs(params, data), 1e-13)
    actual = torch.vmap(ours, in_dims=(None, 0))(params, several)
    expected = [torch.stack(parts) for parts in zip(*(theirs(params, d) for d in several), strict=True)]
    assert_same(actual, expected, 1e-13)
    with pytest.raises(RuntimeError, match="batch_sizes is mapped"):
        torch.vmap(lambda s: fused.gru_packed(data, s, hx, params, *flags)[0])(sizes.expand(2, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpu_autocast_gives_the_dtype_of_torch(dtype):
    data, sizes, hx, *rest = packed_args(requires_grad=False)
    args = (data, sizes, hx.to(dtype), *rest)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(fused.gru_packed(*args), torch.gru(*args), 4 * 2**-8)  # as test_ops.py


# ---- packing and padding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
def test_packing_and_padding_are_those_of_torch(batch_first):
    x = torch.randn(*((3, 5) if batch_first else (5, 3)), 2, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([4, 4, 2])
    packed = pack_padded_sequence(x, lengths, batch_first)
    data, sizes = ops.pack_padded(x, lengths, batch_first)
    assert torch.equal(data, packed.data) and torch.equal(sizes, packed.batch_sizes)
    for total_length in (None, 6):
        expected = pad_packed_sequence(packed, batch_first, -1.0, total_length)
        actual = ops.pad_packed(data, sizes, batch_first, -1.0, total_length, None)
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
        grad = torch.randn_like(actual[0])
        gradients = [torch.autograd.grad(out[0], x, grad, retain_graph=True)[0] for out in (actual, expected)]
        assert torch.equal(*gradients)
    padded = torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: ops.unpad(p, sizes, False, 10), padded)
    for function in (lambda x: ops.pack_padded(x, lengths, batch_first)[0],
                     lambda x: ops.pad_packed(ops.pack_padded(x, lengths, batch_first)[0], sizes, batch_first, 0, 7, None)[0]):
        assert torch.autograd.gradgradcheck(function, x)


def test_values_of_any_dtype_are_packed():
    x, lengths = torch.arange(8).view(4, 2), torch.tensor([4, 2])
    data, sizes = ops.pack_padded(x, lengths, False)
    assert torch.equal(data, pack_padded_sequence(x, lengths).data)
    assert torch.equal(ops.pad_packed(data, sizes, False, 7, None, 2)[0], x.where(torch.arange(4)[:, None] < lengths, 7))


# ---- errors -------------------------------------------------------------------------------------------------------------


def change(args, index, value):
    return [value(a) if i == index else a for i, a in enumerate(args)]


ERRORS = {
    "data is 3-D": (0, lambda d: d[None], r"data must be 2-D \[N, I\], .* got 3-D of size \(1, 12, 4\)"),
    "data dtype": (0, lambda d: d.double(), "hx has dtype torch.float32, but data has torch.float64"),
    "input size": (0, lambda d: d[:, :3], r"params\[0\] \(w_ih of layer 0\) has size \(18, 4\), expected \(18, 3\)"),
    "rows": (0, lambda d: d[:-1], "batch_sizes has a sum of 12, but data has 11 rows"),
    "device": (0, lambda d: d.to("meta"), "hx is on cpu, but data is on meta"),
    "sizes are 2-D": (1, lambda s: s[None], r"batch_sizes must be 1-D \[T\].*, got 2-D of size \(1, 5\)"),
    "sizes dtype": (1, lambda s: s.int(), r"dtype torch.int32, expected int64; use batch_sizes.to\(torch.int64\)"),
    "sizes device": (1, lambda s: s.to("meta"), "batch_sizes is on meta, expected it on the CPU"),
    "no sizes": (1, lambda s: s[:0], "batch_sizes is empty, expected at least one time step"),
    "sizes increase": (1, lambda s: s.flip(0), r"batch_sizes must not increase, but batch_sizes\[2\] is 3 after 1"),
    "a size of zero": (1, lambda s: torch.cat((s, s.new_zeros(1))), r"must be positive, but batch_sizes\[5\] is 0"),
    "a negative size": (1, lambda s: torch.cat((s, s.new_tensor([-2]))), r"must be positive, but batch_sizes\[5\] is -2"),
    "hx is 2-D": (2, lambda h: h[0], "hx must be 3-D"),
    "hx batch": (2, lambda h: h[:, :3], "hx has batch size 3, but batch_sizes begins with 4 sequences"),
    "hx layers": (2, lambda h: h[:1], r"hx has 1 states, expected num_layers \* num_directions = 2 \* 1 = 2"),
    "params": (3, lambda p: p[:7], "params has 7 tensors, expected 8"),
    "layers": (5, lambda _: 0, "num_layers must be at least 1, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case):
    index, wrong, message = ERRORS[case]
    args = change(packed_args(), index, wrong)
    with pytest.raises(RuntimeError, match=message):
        fused.gru_packed(*args)


def test_errors_of_packing_and_padding():
    x = torch.randn(5, 3, 2)
    with pytest.raises(RuntimeError, match="lengths has dtype torch.int32"):
        ops.pack_padded(x, torch.tensor([3, 2, 1], dtype=torch.int32), False)
    with pytest.raises(RuntimeError, match="lengths.*is on meta, expected it on the CPU"):
        ops.pack_padded(x, torch.tensor([3, 2, 1], device="meta"), False)
    with pytest.raises(RuntimeError, match="lengths has a maximum of 9, but input has 5 time steps"):
        ops.pack_padded(x, torch.tensor([9, 2, 1]), False)
    for lengths in ([1, 2, 3], [3, 2, 0], [3, 2]):  # torch's own words
        with pytest.raises(RuntimeError):
            ops.pack_padded(x, torch.tensor(lengths), False)
    with pytest.raises(ValueError, match="total_length=2 and max sequence length being 3"):
        ops.pad_packed(x.flatten(0, 1)[:6], torch.tensor([3, 2, 1]), False, 0, 2, None)
    with pytest.raises(RuntimeError, match="expected 4 sequences, but batch_sizes begins with 3"):
        ops.pad_packed(x.flatten(0, 1)[:6], torch.tensor([3, 2, 1]), False, 0, None, 4)
    assert isinstance(pack_padded_sequence(x, [3, 2, 1]), PackedSequence)
