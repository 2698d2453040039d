"""Derivatives of derivatives and along tangents, against torch.gru and torch.gru_cell in float64 on the CPU."""

import pytest
import torch
from problems import assert_same, cell_args, count_calls, gru_args, ops, tensors
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import torch_gru_fuse.functional as fused

pytestmark = pytest.mark.versions

SMALL = {"T": 3, "B": 2, "I": 2, "H": 2, "L": 1, "dtype": torch.float64}
VARIANTS = {
    "one layer": {},
    "one step": {"T": 1},
    "two layers": {"L": 2},
    "both directions, batch first": {"L": 2, "bidirectional": True, "batch_first": True},
    "no biases": {"L": 2, "bias": False},
    "dropout": {"L": 2, "bidirectional": True, "dropout": 0.4, "train": True},
    "one unit": {"T": 2, "B": 1, "I": 1, "H": 1},
}
# float64, results of order 1, some of order 100: sums of at most some thousand terms
TOLERANCE = 1e-12


def problem(name, **options):
    """A function (ours or torch, tensors) -> outputs, and its tensors; `name` is a variant of gru, or "cell"."""
    if name == "cell":
        args = cell_args(**{"B": 2, "I": 2, "H": 3, "dtype": torch.float64, **options})
        return (lambda module, *tensors: [module.gru_cell(*tensors)]), args
    x, hx, params, *flags = gru_args(**{**SMALL, **VARIANTS[name], **options})

    def call(module, x, hx, *params):
        torch.manual_seed(7)  # the same dropout masks
        return list(module.gru(x, hx, list(params), *flags))

    return call, [x, hx, *params]


def scalar(outputs):
    """A loss that no symmetry makes zero, with derivatives of every order."""
    return sum((o * torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype).view(o.shape)).sin().sum() for o in outputs)


def both(function):
    """What `function` makes of our ops and of torch's own."""
    return tensors(function(fused)), tensors(function(torch))


CASES = [*VARIANTS, "cell"]


# ---- derivatives by finite differences ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    call, args = problem(name)
    batched = name != "dropout"  # a vmap of torch.autograd that has no random numbers
    gradcheck(
        lambda *a: tuple(call(fused, *a)), args, check_forward_ad=True, check_batched_grad=True,
        check_batched_forward_grad=batched, fast_mode=True,
    )  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize("name", CASES)
def test_gradgradcheck(name):
    call, args = problem(name, **({} if name == "cell" else {"T": 2}))
    gradgradcheck(
        lambda *a: tuple(call(fused, *a)), args, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=True
    )


@pytest.mark.once
def test_gradgradcheck_of_every_element():
    call, args = problem("one layer", T=2, B=1, I=1, bidirectional=True)
    gradgradcheck(lambda *a: tuple(call(fused, *a)), args, check_fwd_over_rev=True)


# ---- double backward ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_gradient_penalty(name):
    call, args = problem(name)

    def penalty(module):
        score = scalar(call(module, *args))
        (grad,) = torch.autograd.grad(score, args[0], create_graph=True)
        return torch.autograd.grad(score + (grad.norm() - 1).square(), args)

    assert_same(*both(penalty), TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_hessian_vector_product(name):
    call, args = problem(name)
    vector = [torch.randn_like(a) for a in args]
    duals = [a.detach() for a in args]

    def twice_backward(module):
        grads = torch.autograd.grad(scalar(call(module, *args)), args, create_graph=True)
        return torch.autograd.grad(grads, args, vector)

    def forward_over_reverse(module):
        gradient = torch.func.grad(lambda *a: scalar(call(module, *a)), argnums=tuple(range(len(args))))
        return torch.func.jvp(gradient, tuple(duals), tuple(vector))[1]

    def reverse_over_forward(module):
        along = lambda *a: torch.func.jvp(lambda *b: scalar(call(module, *b)), a, tuple(vector))[1]  # noqa: E731
        return torch.func.grad(along, argnums=tuple(range(len(args))))(*duals)

    def dual_tensors(module):
        with forward_ad.dual_level():
            inputs = [forward_ad.make_dual(a, v) for a, v in zip(args, vector, strict=True)]
            grads = torch.autograd.grad(scalar(call(module, *inputs)), inputs)
            return [forward_ad.unpack_dual(g).tangent for g in grads]

    expected = tensors(twice_backward(torch))
    for way in (twice_backward, forward_over_reverse, reverse_over_forward, dual_tensors):
        assert_same(tensors(way(fused)), expected, TOLERANCE)


WANTED = {
    "input": lambda i: i == 0,
    "state": lambda i: i == 1,
    "weights": lambda i: i > 1,
    "input and one weight": lambda i: i in (0, 3),
    "last bias": lambda i: i == 9,
}


@pytest.mark.parametrize("wanted", WANTED)
def test_only_some_tensors_require_grad(wanted):
    call, args = problem("two layers")
    for i, a in enumerate(args):
        a.requires_grad_(WANTED[wanted](i))
    inputs = [a for a in args if a.requires_grad]

    def second(module):
        grads = torch.autograd.grad(scalar(call(module, *args)), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), inputs)

    assert_same(*both(second), TOLERANCE)


@pytest.mark.parametrize("which", [0, 1], ids=["output", "h_n"])
def test_through_one_output_alone(which):
    call, args = problem("both directions, batch first")

    def second(module):
        out = call(module, *args)[which]
        grads = torch.autograd.grad(out.sin().sum(), args, create_graph=True, allow_unused=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads if g is not None), args, allow_unused=True)

    assert_same(*both(second), TOLERANCE)


def test_derivative_of_an_independent_gradient_is_zero():
    """The gradient of one direction's weights does not depend on those of the other."""
    call, args = problem("one layer", bidirectional=True)
    forward_weight, backward_weight = args[2], args[6]

    def second(module):
        (grad,) = torch.autograd.grad(call(module, *args)[1].sum(), backward_weight, create_graph=True)
        return torch.autograd.grad(grad.sum(), [forward_weight, backward_weight], allow_unused=True)

    ours, theirs = second(fused), second(torch)
    assert ours[0] is None or not ours[0].any()
    assert_same(ours[1:], theirs[1:], TOLERANCE)


@pytest.mark.parametrize("name", ["two layers", "cell"])
def test_third_order(name):
    call, args = problem(name)

    def third(module):
        value = scalar(call(module, *args))
        for _ in range(2):
            grads = torch.autograd.grad(value, args, create_graph=True)
            value = sum(g.square().sum() for g in grads)
        return torch.autograd.grad(value, args)

    assert_same(*both(third), TOLERANCE)


def test_tensors_made_from_each_other():
    """Derivatives are taken along each argument alone, whatever the graph between the arguments."""
    call, (x, hx, *params) = problem("one layer")

    def second(module):
        h = hx + x[0].sum(0)[None, None, :]
        args = (x * h.mean(), h, params[0], params[0] @ params[1].mean(0)[:, None] * params[1], *params[2:])
        (grad,) = torch.autograd.grad(scalar(call(module, *args)), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), [x, hx, *params])

    assert_same(*both(second), TOLERANCE)


@pytest.mark.parametrize("name", ["two layers", "cell"])
def test_first_backward_runs_the_op(name):
    call, args = problem(name)
    plain = torch.autograd.grad(scalar(call(fused, *args)), args)
    grads, counts = count_calls(lambda: torch.autograd.grad(scalar(call(fused, *args)), args, create_graph=True))
    op = "gru_cell" if name == "cell" else "gru"
    assert counts == {f"{op}_forward": 1, f"{op}_backward": 1}
    assert all(torch.equal(a, b) for a, b in zip(grads, plain, strict=True))


@pytest.mark.once
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["two layers", "cell"])
def test_half_precision_is_no_worse_than_torch(name, dtype):
    call, args = problem(name, B=8, I=16, H=32, dtype=dtype, **({} if name == "cell" else {"T": 8}))
    vector = [torch.randn_like(a) for a in args]

    def products(module, args, vector):
        grads = torch.autograd.grad(scalar(call(module, *args)), args, create_graph=True)
        return [g.double() for g in torch.autograd.grad(grads, args, vector)]

    exact = products(torch, [a.detach().double().requires_grad_() for a in args], [v.double() for v in vector])

    def error(module):
        pairs = zip(products(module, args, vector), exact, strict=True)
        return torch.stack([(a - e).square().mean() / e.square().mean() for a, e in pairs]).mean().sqrt()

    assert error(fused) <= 1.1 * error(torch)


def test_autocast_leaves_the_second_derivative_alone():
    call, args = problem("two layers", dtype=torch.float32)

    def second(enabled):
        out, _ = call(fused, *args)
        grads = torch.autograd.grad(out.sum(), args, create_graph=True)  # a gradient arrives that depends on nothing
        total = sum(g.square().sum() for g in grads)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            return torch.autograd.grad(total, args)

    assert all(torch.equal(a, b) for a, b in zip(second(True), second(False), strict=True))


def test_double_backward_through_a_checkpoint():
    call, args = problem("two layers")

    def second(module):
        out = checkpoint(call, module, *args, use_reentrant=False)
        grads = torch.autograd.grad(scalar(out), args, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), args)

    assert_same(*both(second), TOLERANCE)


# ---- forward mode -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_jvp(name):
    call, args = problem(name, requires_grad=False)
    vector = tuple(torch.randn_like(a) for a in args)
    assert_same(*both(lambda module: torch.func.jvp(lambda *a: call(module, *a), tuple(args), vector)), TOLERANCE)


@pytest.mark.parametrize("which", range(6))
def test_tangent_of_one_tensor(which):
    call, args = problem("both directions, batch first", requires_grad=False)
    tangent = torch.randn_like(args[which])

    def along(module):
        return torch.func.jvp(lambda t: call(module, *args[:which], t, *args[which + 1 :]), (args[which],), (tangent,))

    assert_same(*both(along), TOLERANCE)


@pytest.mark.parametrize("grad_mode", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", ["two layers", "cell"])
def test_dual_tensors(name, grad_mode):
    call, args = problem(name)
    tangent = torch.randn_like(args[0])

    def along(module):
        with torch.set_grad_enabled(grad_mode), forward_ad.dual_level():
            x = forward_ad.make_dual(args[0], tangent)
            return [forward_ad.unpack_dual(o) for o in call(module, x, *args[1:])]

    ours, theirs = both(along)
    assert all(o.requires_grad == grad_mode for o in ours)
    assert_same(ours, theirs, TOLERANCE)


def test_no_tangent_makes_no_dual_result():
    call, args = problem("two layers")
    with forward_ad.dual_level():
        assert all(forward_ad.unpack_dual(o).tangent is None for o in call(fused, *args))


def test_second_derivative_along_two_tangents():
    call, args = problem("two layers", requires_grad=False)
    first, second = (tuple(torch.randn_like(a) for a in args) for _ in range(2))

    def along(module):
        inner = lambda *a: torch.func.jvp(lambda *b: call(module, *b), a, first)[1]  # noqa: E731
        return torch.func.jvp(inner, tuple(args), second)

    assert_same(*both(along), TOLERANCE)


# ---- levels of torch.func, and autograd around them ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["two layers", "cell"])
def test_levels_of_grad(name):
    call, args = problem(name)
    everything = tuple(range(len(args)))

    def levels(module):
        norm = lambda f: lambda *a: sum(g.square().sum() for g in torch.func.grad(f, argnums=everything)(*a))  # noqa: E731
        once = norm(lambda *a: scalar(call(module, *a)))
        twice = torch.func.grad(once, argnums=everything)(*(a.detach() for a in args))
        around = torch.autograd.grad(once(*args), args)  # torch.autograd sees through torch.func
        return twice, around

    ours, theirs = both(levels)
    assert_same(ours, theirs, TOLERANCE)
    assert_same(ours[: len(args)], ours[len(args) :], TOLERANCE)


def test_vjp_outlives_its_transform():
    call, args = problem("two layers", requires_grad=False)

    def differentiate_the_vjp(module):
        out, vjp = torch.func.vjp(lambda x: call(module, x, *args[1:])[0], args[0])
        cotangent = out.cos()
        return vjp(cotangent), torch.func.grad(lambda g: vjp(g)[0].square().sum())(cotangent)

    assert_same(*both(differentiate_the_vjp), TOLERANCE)


# ---- registrations, compiled models, errors -----------------------------------------------------------------------------


def test_opcheck_of_differentiated_backwards():
    x, hx, params, bias, L, _, _, bidirectional, _ = gru_args(T=2, B=2, I=2, H=2, L=2)
    masks = torch.tensor([0.0, 2.0]).repeat(1, 2, 2, 1)
    output, h_n, reserve = (t.detach() for t in ops.gru_forward(x, hx, params, bias, L, bidirectional, masks, True))
    grad_output = torch.randn_like(output, requires_grad=True)
    needs = [True] * (2 + len(params))
    opcheck(ops.gru_backward.default,
            (grad_output, None, x, hx, params, bias, L, bidirectional, masks, output, reserve, needs))  # fmt: skip
    args = cell_args()
    h, gates = (t.detach() for t in ops.gru_cell_forward(*args, True))
    opcheck(ops.gru_cell_backward.default, (torch.randn_like(h, requires_grad=True), *args, gates, [True] * 6))


def test_compiled_code_gives_the_error_of_pytorch():
    """AOTAutograd has no double backward, whatever is in the graph."""
    args = gru_args(T=2)
    out, _ = torch.compile(fused.gru, backend="aot_eager", fullgraph=True)(*args)
    (grad,) = torch.autograd.grad(out.sin().sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        torch.autograd.grad(grad.sum(), args[0])


@pytest.mark.parametrize("transform", ["jvp", "dual tensors", "grad(grad)"])
def test_transforms_inside_compiled_code(transform):
    x, hx, params, *flags = gru_args(T=2, requires_grad=False)
    vector = torch.randn_like(x)

    def loss(x):
        return scalar(fused.gru(x, hx, params, *flags))

    def function(x):
        if transform == "jvp":
            return torch.func.jvp(loss, (x,), (vector,))[1]
        if transform == "grad(grad)":
            return torch.func.grad(lambda x: torch.func.grad(loss)(x).square().sum())(x)
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(loss(forward_ad.make_dual(x, vector))).tangent

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_same([compiled(x)], [function(x)], 1e-5)  # float32


@pytest.mark.parametrize("how", ["grad", "tangent"])
def test_masks_are_constants(how):
    x, hx, params, bias, L, *_ = gru_args(**{**SMALL, "L": 2})
    masks = torch.ones(1, 3, 2, 2, dtype=torch.float64, requires_grad=how == "grad")
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="gru_forward: dropout_masks are constants"):
        if how == "tangent":
            masks = forward_ad.make_dual(masks, masks)
        ops.gru_forward(x, hx, params, bias, L, False, masks, False)
