"""Resets of the state between steps: the op on a CPU."""

import pytest
import torch
from problems import assert_same, gru_args, ops, value_and_grads
from torch.library import opcheck

import torch_gru_fuse.functional as fused
from torch_gru_fuse import equations

T, B = 5, 3
KINDS = ["bool", "0 or 1", "any factor"]


def resets_of(kind, dtype=torch.float32, size=(T, B)):
    """Resets [T, B]; in the first step, too."""
    drawn = torch.rand(size, generator=torch.Generator().manual_seed(3))
    if kind == "any factor":
        return drawn.to(dtype)
    return drawn < 0.4 if kind == "bool" else (drawn < 0.4).to(dtype)


def loop(x, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first, *, resets):
    """The same by cells, step by step."""
    if batch_first:
        x, resets = x.transpose(0, 1), resets.transpose(0, 1)
    factor = 1 - resets.to(x.dtype)
    each, directions = (4 if has_biases else 2), (2 if bidirectional else 1)
    finals = []
    for layer in range(num_layers):
        outs = []
        for d in range(directions):
            state = layer * directions + d
            h, weights = hx[state], params[state * each : (state + 1) * each]
            steps = [None] * len(x)
            for t in reversed(range(len(x))) if d else range(len(x)):
                steps[t] = h = equations.gru_cell(x[t], h * factor[t][:, None], *weights)
            outs.append(torch.stack(steps))
            finals.append(h)
        x = torch.cat(outs, -1)
    return (x.transpose(0, 1) if batch_first else x), torch.stack(finals)


VARIANTS = [
    {},
    {"L": 1, "bidirectional": True},
    {"L": 3, "bidirectional": True, "batch_first": True},
    {"bias": False},
    {"T": 1, "B": 1, "I": 1, "H": 1, "L": 1},
]


def sized(variant):
    size = variant.get("T", T), variant.get("B", B)
    return size[::-1] if variant.get("batch_first") else size


@pytest.mark.parametrize("recompute", [False, True], ids=["saved", "recomputed"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gru_is_the_loop(variant, kind, recompute, nan_filled_empty):
    args = gru_args(dtype=torch.float64, **variant)
    inputs = [args[0], args[1], *args[2]]
    resets = resets_of(kind, torch.float64, sized(variant))
    expected = value_and_grads(lambda *a: loop(*a, resets=resets), args, inputs)
    assert_same(value_and_grads(lambda *a: fused.gru(*a, recompute=recompute, resets=resets), args, inputs), expected, 1e-13)
    keep = ~resets if kind == "bool" else 1 - resets
    assert_same(value_and_grads(lambda *a: fused.gru(*a, recompute=recompute, keep=keep), args, inputs), expected, 1e-13)
    with torch.no_grad():
        assert_same(fused.gru(*args, resets=resets), expected[:2], 1e-13)
        output = fused.gru(*args, resets=resets)[0]
    assert output.stride() == torch.gru(*args)[0].stride()


def test_no_reset_is_torch_gru():
    args = gru_args(dtype=torch.float64, bidirectional=True)
    inputs = [args[0], args[1], *args[2]]
    resets = torch.zeros(T, B, dtype=torch.bool)
    actual = value_and_grads(lambda *a: fused.gru(*a, resets=resets), args, inputs)
    assert_same(actual, value_and_grads(torch.gru, args, inputs), 1e-13)


def test_a_reset_begins_a_new_sequence():
    x, hx, params, *flags = gru_args(dtype=torch.float64, requires_grad=False)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[2] = True
    output, h_n = fused.gru(x, hx, params, *flags, resets=resets)
    first, second = fused.gru(x[:2], hx, params, *flags), fused.gru(x[2:], torch.zeros_like(hx), params, *flags)
    assert_same([output, h_n], [torch.cat((first[0], second[0])), second[1]], 1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(dtype, kind):
    args = gru_args(dtype=dtype, bidirectional=True)
    inputs = [args[0], args[1], *args[2]]
    resets = resets_of(kind, dtype)
    double = [t.detach().double().requires_grad_() for t in inputs]
    exact = value_and_grads(
        lambda *a: loop(*a, resets=resets.double()), (double[0], double[1], double[2:], *args[3:]), double
    )
    actual = value_and_grads(lambda *a: fused.gru(*a, resets=resets), args, inputs)
    # a few roundings of values of size one a step, and sums of 15 such in the gradients
    assert_same([a.double() for a in actual], exact, 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("save", [False, True])
def test_bool_clears_what_is_not_a_number(save):
    x, hx, params, *flags = gru_args(dtype=torch.float64, requires_grad=save)
    with torch.no_grad():
        x[1, 0] = float("nan")
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[2] = True
    output, h_n = fused.gru(x, hx, params, *flags, resets=resets)
    assert output[1, 0].isnan().all() and not output[2:].isnan().any() and not h_n.isnan().any()
    assert fused.gru(x, hx, params, *flags, resets=resets.double())[0][2, 0].isnan().all()  # NaN * 0


def test_dropout():
    args = gru_args(L=3, bidirectional=True, dropout=0.4, train=True, dtype=torch.float64)
    inputs = [args[0], args[1], *args[2]]
    resets = torch.zeros(T, B, dtype=torch.float64)
    torch.manual_seed(7)
    actual = value_and_grads(lambda *a: fused.gru(*a, resets=resets), args, inputs)
    torch.manual_seed(7)
    assert_same(actual, value_and_grads(torch.gru, args, inputs), 1e-13)
    resets = resets_of("bool")
    masks = torch.bernoulli(torch.full((2, T, B, 12), 0.5, dtype=torch.float64)) * 2
    x, hx, params, bias, L, *_ = args
    actual = value_and_grads(lambda: ops.gru_forward(x, hx, params, bias, L, True, masks, False, ~resets)[:2], (), inputs)
    expected = value_and_grads(lambda: equations.gru(x, hx, params, bias, L, True, masks, ~resets), (), inputs)
    assert_same(actual, expected, 1e-13)


def test_resets_that_are_not_contiguous():
    args = gru_args(dtype=torch.float64)
    inputs = [args[0], args[1], *args[2]]
    resets = resets_of("0 or 1", torch.float64, (B, T)).t()
    expected = value_and_grads(lambda *a: loop(*a, resets=resets), args, inputs)
    assert_same(value_and_grads(lambda *a: fused.gru(*a, resets=resets), args, inputs), expected, 1e-13)


# ---- errors ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resets", "message"),
    [
        (torch.zeros(B, T), r"resets has size \(3, 5\), expected \[T, B\] = \(5, 3\)"),
        (torch.zeros(T, B, 1), r"resets has size \(5, 3, 1\), expected \[T, B\] = \(5, 3\)"),
        (torch.zeros(T, B, dtype=torch.int64), "resets has dtype torch.int64, expected bool or torch.float32"),
        (torch.zeros(T, B, dtype=torch.float64), "resets has dtype torch.float64, expected bool or torch.float32"),
        (torch.zeros(T, B, device="meta"), "resets is on meta, but input is on cpu"),
        (torch.zeros(T, B, requires_grad=True), r"resets has no gradient, but it requires grad .* pass resets.detach\(\)"),
    ],
)
def test_errors_name_the_argument(resets, message):
    args = gru_args()
    with pytest.raises(RuntimeError, match=f"torch_gru_fuse.gru: {message}"):
        fused.gru(*args, resets=resets)
    with pytest.raises(RuntimeError, match=message.replace("resets", "keep")):
        fused.gru(*args, keep=resets)


def test_resets_and_keep_are_one():
    with pytest.raises(RuntimeError, match="resets and keep are both given, expected one of them"):
        fused.gru(*gru_args(), resets=torch.zeros(T, B), keep=torch.ones(T, B))


def test_layout_in_errors():
    with pytest.raises(RuntimeError, match=r"expected \[B, T\] = \(3, 5\)"):
        fused.gru(*gru_args(batch_first=True), resets=torch.zeros(T, B))


# ---- registrations, transforms -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS[:2])
def test_opcheck(kind):
    resets = resets_of(kind)
    if kind == "bool":
        opcheck(ops.gru.default, gru_args(bidirectional=True), {"resets": resets})
    x, hx, params, bias, L, *_ = gru_args(bidirectional=True)
    keep = ~resets if kind == "bool" else 1 - resets
    for save in (False, True):
        opcheck(ops.gru_forward.default, (x, hx, params, bias, L, True, None, save, keep))
    x, hx, *params = (t.detach() for t in (x, hx, *params))
    output, h_n, reserve = ops.gru_forward(x, hx, params, bias, L, True, None, True, keep)
    grads, needs = (torch.ones_like(output), torch.ones_like(h_n)), [True] * (2 + len(params))
    opcheck(ops.gru_backward.default, (*grads, x, hx, params, bias, L, True, None, output, reserve, needs, keep))


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_both_modes_and_orders(kind):
    x, hx, params, *flags = gru_args(T=3, B=2, I=2, H=2, L=2, bidirectional=True, dtype=torch.float64)
    resets = resets_of(kind, torch.float64, (3, 2))

    def call(x, hx, *params):
        return fused.gru(x, hx, list(params), *flags, resets=resets)

    inputs = (x, hx, *params)
    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_vmap(kind):
    x, hx, params, *flags = gru_args(requires_grad=False, bidirectional=True, dtype=torch.float64)
    xs = torch.randn(4, *x.shape, dtype=torch.float64)
    resets = resets_of(kind, torch.float64, (4, T, B))

    def call(x, r, *p):
        return fused.gru(x, hx, list(p or params), *flags, resets=r)[0]

    def each(function, *batched):
        return torch.stack([function(*sample) for sample in zip(*batched, strict=True)])

    torch.testing.assert_close(torch.vmap(call)(xs, resets), each(call, xs, resets))
    torch.testing.assert_close(torch.vmap(call, (0, None))(xs, resets[0]), each(lambda x: call(x, resets[0]), xs))
    torch.testing.assert_close(torch.vmap(call, (None, 0))(x, resets), each(lambda r: call(x, r), resets))
    stacks = [torch.stack([p + i / 10 for i in range(4)]) for p in params]
    torch.testing.assert_close(torch.vmap(call)(xs, resets, *stacks), each(call, xs, resets, *stacks))
    for argnums in (0, 2):  # inputs, in one launch; weights, a gradient a sample
        grad = torch.func.grad(lambda x, r, *p: call(x, r, *p).sin().sum(), argnums)
        dims = (0, 0, *[None] * len(params))
        expected = torch.stack([grad(x, r, *params) for x, r in zip(xs, resets, strict=True)])
        torch.testing.assert_close(torch.vmap(grad, dims)(xs, resets, *params), expected)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_cpu_autocast(kind):
    x, hx, params, *flags = gru_args(requires_grad=False)
    x, hx = x.bfloat16(), hx.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, h_n = fused.gru(x, hx, params, *flags, resets=resets_of(kind))
    expected = loop(x.float(), hx.float(), params, *flags, resets=resets_of(kind))
    assert output.dtype == h_n.dtype == torch.bfloat16
    assert_same([output.float(), h_n.float()], expected, 4 * 2**-8)


def test_in_a_compiled_function():
    args = gru_args(bidirectional=True, batch_first=True)
    inputs = [args[0], args[1], *args[2]]
    done = resets_of("bool", size=(B, T))

    def call(done, *args):
        return fused.gru(*args, resets=done)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    expected = value_and_grads(call, (done, *args), inputs)
    assert_same(value_and_grads(compiled, (done, *args), inputs), expected, 1e-5)
