"""The ops as a user calls them: torch's results, torch's gradients, torch's flags, on the CPU."""

import pytest
import torch
from problems import assert_same, cell_args, gru_args, ops, value_and_grads
from torch.library import opcheck

import torch_gru_fuse.functional as fused

pytestmark = pytest.mark.versions

VARIANTS = [
    {},
    {"bidirectional": True, "L": 1},
    {"bidirectional": True, "L": 3},
    {"bias": False},
    {"batch_first": True, "bidirectional": True},
    {"T": 1, "B": 1, "I": 1, "H": 1, "L": 1},
    {"B": 0},
]


def identify(variant):
    return ", ".join(f"{k}={v}" for k, v in variant.items()) or "default"


@pytest.mark.parametrize("variant", VARIANTS, ids=identify)
def test_gru_gives_what_torch_gru_gives(variant, nan_filled_empty):
    args = gru_args(dtype=torch.float64, **variant)
    inputs = [args[0], args[1], *args[2]]
    actual, expected = value_and_grads(fused.gru, args, inputs), value_and_grads(torch.gru, args, inputs)
    assert_same(actual, expected, 1e-13)  # float64: rounding of sums of at most 50 terms
    assert fused.gru(*args)[0].stride() == torch.gru(*args)[0].stride()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [3, 1, 0])
def test_gru_cell_gives_what_torch_gru_cell_gives(bias, batch, nan_filled_empty):
    args = cell_args(B=batch, bias=bias, dtype=torch.float64)
    inputs = [a for a in args if a is not None]
    assert_same(value_and_grads(fused.gru_cell, args, inputs), value_and_grads(torch.gru_cell, args, inputs), 1e-13)


def test_gru_cell_takes_one_bias_alone():
    x, h, w_ih, w_hh, b_ih, b_hh = cell_args(dtype=torch.float64)
    for biases in ((b_ih, None), (None, b_hh)):
        args = (x, h, w_ih, w_hh, *biases)
        inputs = [a for a in args if a is not None]
        expected = value_and_grads(torch.gru_cell, args, inputs)  # torch takes an absent bias for zero
        assert_same(value_and_grads(fused.gru_cell, args, inputs), expected, 1e-13)


@pytest.mark.once
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_error_against_float64_is_that_of_torch(dtype):
    args = gru_args(T=20, B=8, I=16, H=32, dtype=dtype)
    inputs = [args[0], args[1], *args[2]]
    double = [t.detach().double().requires_grad_() for t in inputs]
    exact = value_and_grads(torch.gru, (double[0], double[1], double[2:], *args[3:]), double)

    def errors(results):
        errors = [(a.double() - e) / e.square().mean().sqrt() for a, e in zip(results, exact, strict=True)]
        return torch.tensor([[e.abs().max(), e.square().mean().sqrt()] for e in errors])

    ours = errors(value_and_grads(fused.gru, args, inputs))
    theirs = errors(value_and_grads(torch.gru, args, inputs))
    # Mean over outputs and gradients of (max, RMS).  Not 1.1 in float32: a weight gradient here is one sum over all T*B rows,
    # torch's is a sum of T sums over B rows, which rounds a little less.
    assert (ours.mean(0) <= (1.5 if dtype == torch.float32 else 1.1) * theirs.mean(0)).all(), (ours, theirs)


@pytest.mark.parametrize("frozen", ["input", "weights", "all but the initial state"])
def test_only_wanted_gradients_are_computed(frozen):
    x, hx, params, *flags = gru_args(dtype=torch.float64)
    x.requires_grad_(frozen == "weights")
    hx.requires_grad_(frozen == "all but the initial state")
    for p in params[::1 if frozen != "input" else 3]:
        p.requires_grad_(False)
    inputs = [t for t in (x, hx, *params) if t.requires_grad]
    args = (x, hx, params, *flags)
    assert_same(value_and_grads(fused.gru, args, inputs), value_and_grads(torch.gru, args, inputs), 1e-13)


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_through_one_output_alone(which):
    args = gru_args(dtype=torch.float64, bidirectional=True)
    inputs = [args[0], args[1], *args[2]]
    assert_same(
        value_and_grads(lambda *a: fused.gru(*a)[which], args, inputs),
        value_and_grads(lambda *a: torch.gru(*a)[which], args, inputs),
        1e-13,
    )


def test_non_contiguous_arguments():
    args = gru_args(T=5, B=4, I=6, H=6, L=1, dtype=torch.float64)
    x, hx, params = args[0].detach().transpose(0, 1), args[1].detach().expand(1, 4, 6), [p.detach() for p in args[2]]
    params[0] = params[0].t().contiguous().t()
    hx = hx[:, :1].expand(1, 5, 6)
    call = (x, hx, params, *args[3:])
    assert_same(fused.gru(*call), torch.gru(*call), 1e-14)
    cell = (x[0], hx[0, :1].expand(5, 6), *params)
    assert_same([fused.gru_cell(*cell)], [torch.gru_cell(*cell)], 1e-14)


@pytest.mark.parametrize("dropout", [0.4, 1.0])
def test_dropout_draws_the_masks_of_torch_gru(dropout):
    args = gru_args(L=3, bidirectional=True, dropout=dropout, train=True, dtype=torch.float64)
    inputs = [args[0], args[1], *args[2]]
    torch.manual_seed(7)
    actual = value_and_grads(fused.gru, args, inputs)
    torch.manual_seed(7)
    assert_same(actual, value_and_grads(torch.gru, args, inputs), 1e-13)


def test_dropout_needs_train():
    args = list(gru_args(dropout=0.9, train=False))
    assert_same(fused.gru(*args), torch.gru(*args), 1e-6)


# ---- registrations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=identify)
def test_opcheck_gru(variant):
    opcheck(ops.gru.default, gru_args(**variant))


def test_opcheck_gru_forward_and_backward():
    x, hx, params, bias, L, _, _, bidirectional, _ = gru_args(L=2, bidirectional=True)
    masks = torch.ones(1, 5, 3, 12)
    for save in (False, True):
        for m in (None, masks):
            opcheck(ops.gru_forward.default, (x, hx, params, bias, L, bidirectional, m, save))
    detached = [t.detach() for t in (x, hx, *params)]
    x, hx, *params = detached
    output, h_n, reserve = ops.gru_forward(x, hx, params, bias, L, bidirectional, masks, True)
    for grads in ((torch.ones_like(output), None), (None, torch.ones_like(h_n))):
        for needs in ([True] * (2 + len(params)), [False, True] + [True, False] * (len(params) // 2)):
            opcheck(ops.gru_backward.default,
                    (*grads, x, hx, params, bias, L, bidirectional, masks, output, reserve, needs))  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck_gru_cell(bias):
    args = cell_args(bias=bias)
    opcheck(ops.gru_cell.default, args)
    opcheck(ops.gru_cell_forward.default, (*args, True))
    args = [a if a is None else a.detach() for a in args]
    _, gates = ops.gru_cell_forward(*args, True)
    needs = [a is not None for a in args]
    opcheck(ops.gru_cell_backward.default, (torch.ones(3, 6), *args, gates, needs))


def test_fake_results_have_symbolic_sizes():
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    x, hx, params, *flags = gru_args(T=7, B=5, bidirectional=True, requires_grad=False)
    env = ShapeEnv()
    with FakeTensorMode(shape_env=env) as mode:
        dynamic = torch.fx.experimental.symbolic_shapes.DimDynamic.DYNAMIC
        context = torch.fx.experimental.symbolic_shapes.StatelessSymbolicContext([dynamic, dynamic, None or dynamic])
        fake_x = mode.from_tensor(x, symbolic_context=context)
        T, B = fake_x.shape[:2]
        fake_hx = mode.from_tensor(hx).new_empty(hx.shape[0], B, hx.shape[2])
        output, h_n = ops.gru(fake_x, fake_hx, [mode.from_tensor(p) for p in params], *flags)
    assert output.shape[0] is T or output.shape[0].node.expr == T.node.expr
    assert output.shape[1].node.expr == B.node.expr and output.shape[2] == 12
    assert h_n.shape[1].node.expr == B.node.expr


# ---- transforms ---------------------------------------------------------------------------------------------------------


def loop(function, *batched):
    return torch.stack([function(*sample) for sample in zip(*batched, strict=True)])


def test_vmap_over_inputs_and_states():
    x, hx, params, *flags = gru_args(requires_grad=False, bidirectional=True, dtype=torch.float64)
    xs, hs = torch.randn(4, *x.shape, dtype=torch.float64), torch.randn(4, *hx.shape, dtype=torch.float64)
    torch.testing.assert_close(
        torch.vmap(lambda x, h: fused.gru(x, h, params, *flags)[0])(xs, hs),
        loop(lambda x, h: torch.gru(x, h, params, *flags)[0], xs, hs),
    )
    torch.testing.assert_close(
        torch.vmap(lambda x: fused.gru(x, hx, params, *flags)[1], in_dims=2)(xs.movedim(0, 2)),
        loop(lambda x: torch.gru(x, hx, params, *flags)[1], xs),
    )


def test_vmap_over_weights():
    x, hx, params, *flags = gru_args(requires_grad=False, dtype=torch.float64)
    stacks = [torch.stack([p, p + 0.1, p - 0.1]) for p in params]
    torch.testing.assert_close(
        torch.vmap(lambda *p: fused.gru(x, hx, list(p), *flags)[0])(*stacks),
        loop(lambda *p: torch.gru(x, hx, list(p), *flags)[0], *stacks),
    )


def test_vmap_of_the_cell():
    x, h, *params = cell_args(requires_grad=False, dtype=torch.float64)
    xs = torch.randn(4, *x.shape, dtype=torch.float64)
    torch.testing.assert_close(
        torch.vmap(lambda x: fused.gru_cell(x, h, *params))(xs), loop(lambda x: torch.gru_cell(x, h, *params), xs)
    )
    stacks = [torch.stack([p, p + 0.1]) for p in params]
    torch.testing.assert_close(
        torch.vmap(lambda *p: fused.gru_cell(x, h, *p))(*stacks), loop(lambda *p: torch.gru_cell(x, h, *p), *stacks)
    )


def test_vmap_randomness_makes_masks_of_each_sample():
    x, hx, params, *flags = gru_args(L=2, dropout=0.5, train=True, requires_grad=False)
    xs = x.expand(2, *x.shape)
    out = torch.vmap(lambda x: fused.gru(x, hx, params, *flags)[0], randomness="different")(xs)
    assert not torch.equal(out[0], out[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda x: fused.gru(x, hx, params, *flags)[0])(xs)


@pytest.mark.parametrize("batched", [False, True], ids=["grad", "vmap(grad)"])
def test_functional_gradient(batched):
    x, hx, params, *flags = gru_args(requires_grad=False, dtype=torch.float64)

    def loss(function):
        return lambda params, x: function(x, hx, params, *flags)[0].sin().sum()

    ours, theirs = (torch.func.grad(loss(f)) for f in (fused.gru, torch.gru))
    if not batched:
        assert_same(ours(params, x), theirs(params, x), 1e-13)
        return
    xs = torch.randn(3, *x.shape, dtype=torch.float64)
    actual = torch.vmap(ours, in_dims=(None, 0))(params, xs)
    expected = [torch.stack(parts) for parts in zip(*(theirs(params, x) for x in xs), strict=True)]
    assert_same(actual, expected, 1e-13)


def test_functional_gradient_of_the_cell():
    args = cell_args(requires_grad=False, dtype=torch.float64)
    ours, theirs = (torch.func.grad(lambda *a, f=f: f(*a).sin().sum(), argnums=tuple(range(6)))(*args)
                    for f in (fused.gru_cell, torch.gru_cell))  # fmt: skip
    assert_same(ours, theirs, 1e-13)


@pytest.mark.parametrize("hx_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpu_autocast_gives_the_dtype_of_torch(x_dtype, hx_dtype):
    x, hx, params, *flags = gru_args(requires_grad=False)
    args = (x.to(x_dtype), hx.to(hx_dtype), params, *flags)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = fused.gru(*args), torch.gru(*args)
        cell, their_cell = (f(args[0][0][:, :4], args[1][0], *params[:4]) for f in (fused.gru_cell, torch.gru_cell))
    # bf16 has 8 bits: products of it are 2^-8 apart, and a state is a convex mix of bounded values
    assert_same([*ours, cell], [*theirs, their_cell], 4 * 2**-8)


def test_autocast_leaves_float64_alone():
    args = gru_args(requires_grad=False, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fused.gru(*args)[0].dtype == torch.float64
