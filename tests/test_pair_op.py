"""`gru_pair` as a user calls it: the results of two calls of torch.gru, gradients, flags and errors, on the CPU."""

import itertools

import pytest
import torch
from problems import assert_same, count_calls, gru_args, ops, value_and_grads
from torch import nn
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import torch_gru_fuse.functional as fused

pytestmark = pytest.mark.versions

REVERSE = [list(flags) for flags in itertools.product([False, True], repeat=2)]


def pair_args(
    T=5, B=3, I=(4, 7), H=6, *, bias=True, reverse=(False, True), batch_first=False, dtype=torch.float64, device="cpu"
):  # noqa: E741
    """The six arguments, random."""
    options = {"bias": bias, "batch_first": batch_first, "dtype": dtype, "device": device}
    two = [gru_args(T, B, width, H, 1, **options) for width in I]
    hx = torch.cat([args[1].detach() for args in two]).requires_grad_()
    return [args[0] for args in two], hx, [p for args in two for p in args[2]], bias, list(reverse), batch_first


def tensors_of(args):
    inputs, hx, params, *_ = args
    return [*inputs, hx, *params]


def two_calls(inputs, hx, params, bias, reverse, batch_first):
    """What the pair has to be, by torch's own."""
    time, half, outputs, finals = int(batch_first), len(params) // 2, [], []
    for i, x in enumerate(inputs):
        flip = (lambda y: y.flip(time)) if reverse[i] else (lambda y: y)
        weights = params[i * half : (i + 1) * half]
        output, final = torch.gru(flip(x), hx[i : i + 1], weights, bias, 1, 0.0, False, False, batch_first)
        outputs.append(flip(output))
        finals.append(final)
    return *outputs, torch.cat(finals)


VARIANTS = [
    *({"reverse": reverse} for reverse in REVERSE),
    {"bias": False},
    {"batch_first": True, "reverse": [True, False]},
    {"T": 1, "B": 1, "I": (1, 1), "H": 1},
    {"B": 0},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gives_what_two_calls_give(variant, nan_filled_empty):
    args = pair_args(**variant)
    inputs = tensors_of(args)
    assert_same(value_and_grads(fused.gru_pair, args, inputs), value_and_grads(two_calls, args, inputs), 1e-13)
    with torch.no_grad():
        results = fused.gru_pair(*args)
        assert_same(results, two_calls(*args), 1e-14)
    for y in results[:2]:
        assert (y.transpose(0, 1) if args[5] else y).is_contiguous()


def test_recompute_keeps_nothing_and_gives_the_same():
    args = pair_args()
    inputs = tensors_of(args)
    expected = value_and_grads(fused.gru_pair, args, inputs)
    assert_same(value_and_grads(lambda *a: fused.gru_pair(*a, recompute=True), args, inputs), expected, 1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    args = pair_args(dtype=dtype)
    inputs = tensors_of(args)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 12 * 2**-8, torch.float16: 12 * 2**-11}[dtype]
    assert_same(value_and_grads(fused.gru_pair, args, inputs), value_and_grads(two_calls, args, inputs), tolerance)


@pytest.mark.parametrize("which", range(3))
def test_gradient_through_one_result_alone(which):
    args = pair_args()
    inputs = tensors_of(args)
    expected = torch.autograd.grad(two_calls(*args)[which].sum(), inputs, allow_unused=True)
    actual = torch.autograd.grad(fused.gru_pair(*args)[which].sum(), inputs, allow_unused=True)
    assert_same(actual, [torch.zeros_like(t) if g is None else g for g, t in zip(expected, inputs, strict=True)], 1e-13)


@pytest.mark.parametrize("wanted", [[0], [1], [2], [3, 8], [0, 2, 10]], ids=str)
def test_only_wanted_gradients_are_computed(wanted):
    args = pair_args()
    inputs = tensors_of(args)
    for i, tensor in enumerate(inputs):
        tensor.requires_grad_(i in wanted)
    some = [inputs[i] for i in wanted]
    needed = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, arguments=(), kwargs=None):
            result = op(*arguments, **(kwargs or {}))
            if op is ops.gru_pair_backward.default:
                needed.append(len(result))
            return result

    with Watch():
        actual = value_and_grads(fused.gru_pair, args, some)
    assert_same(actual, value_and_grads(two_calls, args, some), 1e-13)
    assert needed == [len(wanted)]


def test_non_contiguous_arguments():
    args = pair_args()
    strange = [t.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for t in tensors_of(args)]
    args = strange[:2], strange[2], strange[3:], *args[3:]
    assert_same(value_and_grads(fused.gru_pair, args, strange), value_and_grads(two_calls, args, strange), 1e-13)


@pytest.mark.once
@pytest.mark.parametrize("reverse", REVERSE, ids=str)
def test_higher_derivatives(reverse):
    args = pair_args(T=3, B=2, I=(2, 3), H=2, reverse=reverse)
    inputs = tensors_of(args)

    def function(*tensors):
        return fused.gru_pair(list(tensors[:2]), tensors[2], list(tensors[3:]), *args[3:])

    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda *t: function(*t)[0] + function(*t)[1], inputs)


def test_transforms():
    args = pair_args(T=3)
    x, hx = torch.stack([args[0][0].detach()] * 4), args[1].detach()
    x = x + torch.randn_like(x)

    def loss(sample, state):
        a, b, h = fused.gru_pair([sample, args[0][1].detach()], state, [p.detach() for p in args[2]], *args[3:])
        return (a * 2).sum() + b.sin().sum() + h.cos().sum()

    each = torch.stack([torch.func.grad(loss)(sample, hx) for sample in x])
    assert_same([torch.vmap(torch.func.grad(loss), (0, None))(x, hx)], [each], 1e-13)
    values = torch.stack([loss(sample, hx) for sample in x])
    assert_same([torch.vmap(loss, (0, None))(x, hx)], [values], 1e-13)
    tangent = torch.func.jvp(loss, (x[0], hx), (x[1], hx))[1]
    expected = (torch.func.grad(loss)(x[0], hx) * x[1]).sum() + (torch.func.grad(loss, 1)(x[0], hx) * hx).sum()
    assert_same([tangent], [expected], 1e-12)


@pytest.mark.parametrize("variant", [{}, {"batch_first": True}, {"bias": False, "reverse": (False, False)}], ids=str)
def test_opcheck(variant):
    opcheck(ops.gru_pair.default, pair_args(**variant))


def test_opcheck_of_what_it_is_made_of():
    inputs, hx, params, bias, reverse, _ = pair_args(dtype=torch.float32)
    opcheck(ops.gru_pair_forward.default, (inputs, hx, params, bias, reverse, True))
    inputs, hx, params = [x.detach() for x in inputs], hx.detach(), [p.detach() for p in params]
    output, h_n, reserve = ops.gru_pair_forward(inputs, hx, params, bias, reverse, True)
    needs = [True, False, True, *[i % 2 == 0 for i in range(len(params))]]
    opcheck(
        ops.gru_pair_backward.default,
        (torch.randn_like(output), torch.randn_like(h_n), inputs, hx, params, bias, reverse, output, reserve, needs),
    )


def test_on_a_cpu_it_is_two_calls():
    args = pair_args(dtype=torch.float32)
    _, counts = count_calls(lambda: fused.gru_pair(*args))
    assert counts == {"gru_pair_forward": 1}


def test_compiled():
    rnn = nn.GRU(4, 6), nn.GRU(7, 6)
    params = [p for r in rnn for p in r._flat_weights]

    def model(a, b, hx):
        first, second, h_n = ops.gru_pair([a, b], hx, params, True, [False, True], False)
        return torch.cat((first, second), -1), h_n

    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for T in (5, 8):
        args = (torch.randn(T, 3, 4, requires_grad=True), torch.randn(T, 3, 7), torch.randn(2, 3, 6))
        inputs = [args[0], *params]
        assert_same(value_and_grads(compiled, args, inputs), value_and_grads(model, args, inputs), 1e-5)


def test_cpu_autocast_keeps_the_dtype_of_the_state():
    inputs, hx, params, *flags = pair_args(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for state in (hx, hx.bfloat16()):
            assert {t.dtype for t in ops.gru_pair([x.bfloat16() for x in inputs], state, params, *flags)} == {state.dtype}


ERRORS = [
    (lambda a: (a[0][:1], *a[1:]), r"inputs has 1 elements, expected 2, one for each layer"),
    (lambda a: (*a[:4], [True], a[5]), r"reverse has 1 elements, expected 2"),
    (lambda a: (a[0], a[1][:1], *a[2:]), r"hx must be \[2, B, H\], one state for each layer, got size \(1, 3, 6\)"),
    (lambda a: (*a[:2], a[2][:-1], *a[3:]), r"params has 7 tensors, expected 8: w_ih, w_hh, b_ih, b_hh for each of 2 layers"),
    (lambda a: ([a[0][0]] * 2, *a[1:]), r"of layer 1, params\[0\] \(w_ih of layer 0\) has size \(18, 7\), expected \(18, 4\)"),
    (lambda a: ([a[0][0], a[0][1][:-1]], *a[1:]), r"inputs\[1\] has \[T, B\] = \(4, 3\), but inputs\[0\] has \(5, 3\)"),
    (lambda a: ([a[0][0].half(), a[0][1]], *a[1:]), r"of layer 0, hx has dtype torch.float64, but input has torch.float16"),
]


@pytest.mark.parametrize("change, message", ERRORS, ids=range(len(ERRORS)))
def test_errors(change, message):
    with pytest.raises(RuntimeError, match=f"torch_gru_fuse.gru_pair: {message}"):
        fused.gru_pair(*change(pair_args()))
