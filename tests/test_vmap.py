"""torch.vmap over inputs, over weights, and mixed with every kind of derivative, against loops over torch.gru in float64."""

import pytest
import torch
from problems import assert_same, cell_args, count_calls, gru_args, ops, tensors
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

import torch_gru_fuse.functional as fused

pytestmark = pytest.mark.versions

DOUBLE = {"dtype": torch.float64}
VARIANTS = {
    "one layer": {"L": 1},
    "two layers": {},
    "both directions": {"bidirectional": True},
    "no biases, batch first": {"bias": False, "batch_first": True},
    "one step": {"T": 1},
}
CASES = [*VARIANTS, "cell"]
TOLERANCE = 1e-12  # float64, results of order 1 to 100
N = 3  # samples; not one of the other sizes, 2


def problem(name, **options):
    """A function (ours or torch, x, h, params) -> a vector, and its arguments; `name` is a variant of gru, or "cell"."""
    if name == "cell":
        x, h, *params = cell_args(B=2, I=2, H=2, requires_grad=False, **DOUBLE)
        return (lambda module, x, h, params: module.gru_cell(x, h, *params).flatten()), x, h, params
    sizes = {"T": 4, "B": 2, "I": 2, "H": 2, **VARIANTS[name], **options}
    x, h, params, *flags = gru_args(requires_grad=False, **DOUBLE, **sizes)
    return (lambda module, x, h, params: torch.cat([o.flatten() for o in module.gru(x, h, list(params), *flags)])), x, h, params


def scalar(vector):
    return (vector * torch.linspace(0.5, 1.5, vector.numel(), dtype=vector.dtype)).sin().sum()


def samples(tensor, n=N, dim=0):
    """n variations of a tensor, stacked."""
    return torch.stack([tensor + 0.3 * torch.randn_like(tensor) for _ in range(n)], dim)


def loop(function, in_dims, *args):
    """What vmap(function, in_dims)(*args) is: a loop; arguments are tensors or lists of tensors."""
    def pick(arg, dim, i):
        if isinstance(arg, list):
            return [pick(a, dim, i) for a in arg]
        return arg if dim is None else arg.select(dim, i)

    size = next(tensors(a)[0].shape[d] for a, d in zip(args, in_dims, strict=True) if d is not None)
    results = [tensors(function(*(pick(a, d, i) for a, d in zip(args, in_dims, strict=True)))) for i in range(size)]
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


def gradient(function, argnums=(0, 1, 2)):
    """torch.func.grad by torch.autograd, for loops over torch.gru."""
    def compute(*args):
        args = [[t.detach().requires_grad_() for t in a] if isinstance(a, list) else a.detach().requires_grad_() for a in args]
        return torch.autograd.grad(function(*args), tensors([args[i] for i in argnums]))

    return compute


MAPPED = {
    "input": (0, None, None),
    "state": (None, 0, None),
    "input and state": (0, 0, None),
    "weights": (None, None, 0),
    "all": (0, 0, 0),
}


def mapped_args(x, h, params, in_dims):
    x, h = (t if d is None else samples(t) for t, d in zip((x, h), in_dims, strict=False))
    return x, h, [p if in_dims[2] is None else samples(p) for p in params]


# ---- values and gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", MAPPED)
@pytest.mark.parametrize("name", CASES)
def test_values(name, mapped):
    call, *args = problem(name)
    args, in_dims = mapped_args(*args, MAPPED[mapped]), MAPPED[mapped]
    actual = vmap(lambda *a: call(fused, *a), in_dims)(*args)
    assert_same([actual], loop(lambda *a: call(torch, *a), in_dims, *args), TOLERANCE)


@pytest.mark.parametrize("mapped", MAPPED)
@pytest.mark.parametrize("name", CASES)
def test_gradient_of_each_sample(name, mapped):
    call, *args = problem(name)
    args, in_dims = mapped_args(*args, MAPPED[mapped]), MAPPED[mapped]
    actual = vmap(grad(lambda *a: scalar(call(fused, *a)), (0, 1, 2)), in_dims)(*args)
    assert_same(tensors(actual), loop(gradient(lambda *a: scalar(call(torch, *a))), in_dims, *args), TOLERANCE)


@pytest.mark.parametrize("mapped", MAPPED)
@pytest.mark.parametrize("name", ["both directions", "cell"])
def test_gradient_of_a_mapped_loss(name, mapped):
    call, *args = problem(name)
    args, in_dims = mapped_args(*args, MAPPED[mapped]), MAPPED[mapped]
    actual = grad(lambda *a: vmap(lambda *b: scalar(call(fused, *b)), in_dims)(*a).square().sum(), (0, 1, 2))(*args)
    total = gradient(lambda *a: loop(lambda *b: scalar(call(torch, *b)), in_dims, *a)[0].square().sum())
    assert_same(tensors(actual), total(*args), TOLERANCE)


@pytest.mark.parametrize("argnums", [(0,), (1,), (0, 1)], ids=["input", "state", "both"])
@pytest.mark.parametrize("name", ["both directions", "cell"])
def test_gradients_that_one_launch_has(name, argnums):
    call, x, h, params = problem(name)
    x, h = samples(x), samples(h)
    compute = vmap(grad(lambda *a: scalar(call(fused, *a)), argnums), (0, 0, None))
    actual, counts = count_calls(lambda: compute(x, h, params))
    op = "gru_cell" if name == "cell" else "gru"
    assert counts == {f"{op}_forward": 1, f"{op}_backward": 1}
    expected = loop(gradient(lambda *a: scalar(call(torch, *a)), argnums), (0, 0, None), x, h, params)
    assert_same(tensors(actual), expected, TOLERANCE)


@pytest.mark.parametrize("number", [2, 7])
def test_launches_do_not_depend_on_the_number_of_samples(number):
    call, x, h, params = problem("two layers")
    xs = samples(x, number)
    values, counts = count_calls(lambda: vmap(lambda x: call(fused, x, h, params))(xs))
    assert counts == {"gru_forward": 1}
    weight_gradients = vmap(grad(lambda x, p: scalar(call(fused, x, h, p)), 1), (0, None))
    _, counts = count_calls(lambda: weight_gradients(xs, params))
    assert counts == {"gru_forward": 3}  # one forward, and both layers' states for gradients that are mapped operations


@pytest.mark.parametrize("dims", [(1, 2), (2, 0), (3, 1)], ids=str)
def test_any_dimension_is_mapped(dims):
    call, x, h, params = problem("both directions")
    x, h = samples(x, dim=dims[0]), samples(h, dim=dims[1])
    in_dims = (*dims, None)
    actual = vmap(lambda *a: call(fused, *a), in_dims, out_dims=1)(x, h, params)
    assert_same([actual.t()], loop(lambda *a: call(torch, *a), in_dims, x, h, params), TOLERANCE)
    compute = vmap(grad(lambda *a: scalar(call(fused, *a)), (0, 1)), in_dims)
    expected = loop(gradient(lambda *a: scalar(call(torch, *a)), (0, 1)), in_dims, x, h, params)
    assert_same(tensors(compute(x, h, params)), expected, TOLERANCE)


@pytest.mark.parametrize("grad_dims", [(0, 1), (2, None), (None, 3)], ids=str)
def test_backward_op_with_any_dimension_mapped(grad_dims):
    x, hx, params, bias, L, *_ = gru_args(4, 2, 2, 2, bidirectional=True, requires_grad=False, **DOUBLE)
    grad_output, grad_h_n = torch.randn(4, 2, 4, **DOUBLE), torch.randn(4, 2, 2, **DOUBLE)
    grads = [g if d is None else samples(g, dim=d) for g, d in zip((grad_output, grad_h_n), grad_dims, strict=True)]
    options = (params, bias, L, True, None)

    def run(x, grad_output, grad_h_n):
        output, _, reserve = ops.gru_forward(x, hx, *options, True)
        needs = [True, True, *[False] * len(params)]
        return ops.gru_backward(grad_output, grad_h_n, x, hx, *options, output, reserve, needs)

    in_dims = (1, *grad_dims)
    args = (samples(x, dim=1), *grads)
    assert_same(vmap(run, in_dims)(*args), loop(run, in_dims, *args), TOLERANCE)


def test_one_sample():
    call, x, h, params = problem("both directions")
    actual = vmap(grad(lambda *a: scalar(call(fused, *a)), (0, 1, 2)), (0, None, None))(x[None], h, params)
    assert_same([t[0] for t in tensors(actual)], gradient(lambda *a: scalar(call(torch, *a)))(x, h, params), TOLERANCE)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout(randomness):
    """Masks of each sample, or one for all, in values and gradients: these by finite differences with the same seed."""
    x, h, params, *flags = gru_args(4, 2, 2, 3, L=2, dropout=0.5, train=True, requires_grad=False, **DOUBLE)

    def loss(x, p):
        return scalar(fused.gru(x, h, p, *flags)[0].flatten())

    def run(function, in_dims, *args):
        torch.manual_seed(3)
        return vmap(function, in_dims, randomness=randomness)(*args)

    xs = x.expand(N, *x.shape).clone()
    values = run(loss, (0, None), xs, params)
    assert (values == values[0]).all() == (randomness == "same")
    step, direction = 1e-6, [torch.randn_like(p) for p in params]
    moved = [run(loss, (0, None), xs, [p + s * d for p, d in zip(params, direction, strict=True)]) for s in (step, -step)]
    grads = run(grad(loss, 1), (0, None), xs, params)
    along = sum((g * d).flatten(1).sum(1) for g, d in zip(grads, direction, strict=True))
    torch.testing.assert_close(along, (moved[0] - moved[1]) / (2 * step), rtol=1e-7, atol=1e-7)


# ---- levels of vmap -----------------------------------------------------------------------------------------------------


NESTED = {
    "inputs of inputs": ((0, None, None), (0, None, None)),
    "ensemble of inputs": ((None, None, 0), (0, None, None)),
    "inputs of an ensemble": ((0, None, None), (None, None, 0)),
    "state and weights": ((None, 0, None), (None, None, 0)),
}


@pytest.mark.parametrize("nesting", NESTED)
def test_vmap_of_vmap(nesting):
    call, *args = problem("both directions")
    outer, inner = NESTED[nesting]
    args = mapped_args(*mapped_args(*args, inner), outer)
    actual = vmap(vmap(grad(lambda *a: scalar(call(fused, *a)), (0, 1, 2)), inner), outer)(*args)
    one = gradient(lambda *a: scalar(call(torch, *a)))
    assert_same(tensors(actual), loop(lambda *a: loop(one, inner, *a), outer, *args), TOLERANCE)


class GRUModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = torch.nn.GRU(2, 3, 2, bidirectional=True, **DOUBLE)
        self.out = torch.nn.Linear(6, 1, **DOUBLE)

    def forward(self, x, module=fused):
        w = self.rnn
        names = [n for n, _ in w.named_parameters()]
        params = [getattr(w, n) for n in names]
        output, _ = module.gru(x, x.new_zeros(4, x.shape[1], 3), params, True, 2, 0.0, False, True, False)
        return self.out(output).sin().sum()


def test_ensemble_of_modules():
    models = [GRUModel() for _ in range(N)]
    x = torch.randn(4, 2, 2, **DOUBLE)
    params, buffers = stack_module_state(models)
    run = grad(lambda p, b: functional_call(models[0], (p, b), (x,)))
    actual = vmap(run)(params, buffers)
    for i, model in enumerate(models):
        expected = dict(zip(params, torch.autograd.grad(model(x, torch), model.parameters()), strict=True))
        assert_same([actual[name][i] for name in params], [expected[name] for name in params], TOLERANCE)


# ---- Jacobians, Hessians, and derivatives of mapped gradients -----------------------------------------------------------


@pytest.mark.parametrize("name", ["two layers", "both directions", "cell"])
@pytest.mark.parametrize("transform", [jacrev, jacfwd])
def test_jacobian(name, transform):
    call, *args = problem(name)
    flat = (args[0], args[1], *args[2])
    actual = transform(lambda x, h, *p: call(fused, x, h, p), argnums=tuple(range(len(flat))))(*flat)
    assert_same(tensors(actual), tensors(jacobian(lambda x, h, *p: call(torch, x, h, p), flat)), TOLERANCE)


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
@pytest.mark.parametrize("name", ["both directions", "cell"])
def test_vectorized_jacobian_of_autograd(name, strategy):
    call, *args = problem(name)
    flat = (args[0], args[1], *args[2])
    actual = jacobian(lambda x, h, *p: call(fused, x, h, p), flat, vectorize=True, strategy=strategy)
    assert_same(tensors(actual), tensors(jacobian(lambda x, h, *p: call(torch, x, h, p), flat)), TOLERANCE)


HESSIANS = {
    "forward over reverse": lambda f, argnums: jacfwd(jacrev(f, argnums), argnums),
    "reverse over reverse": lambda f, argnums: jacrev(jacrev(f, argnums), argnums),
    "reverse over forward": lambda f, argnums: jacrev(jacfwd(f, argnums), argnums),
}


@pytest.mark.parametrize("name", ["both directions", "cell"])
@pytest.mark.parametrize("order", HESSIANS)
def test_hessian(name, order):
    call, x, h, params = problem(name)
    argnums = (0, 2, 3)  # input and the weights of one direction: their pairs have all kinds of blocks
    flat = (x, h, *params)
    actual = HESSIANS[order](lambda *a: scalar(call(fused, a[0], a[1], a[2:])), argnums)(*flat)
    expected = hessian(
        lambda x, w_ih, w_hh: scalar(call(torch, x, h, [w_ih, w_hh, *params[2:]])), (x, params[0], params[1])
    )
    assert_same(tensors(actual), tensors(expected), TOLERANCE)


@pytest.mark.parametrize("mapped", ["input", "weights", "all"])
@pytest.mark.parametrize("transform", ["jacrev", "jacfwd", "hessian"])
def test_derivatives_of_each_sample(transform, mapped):
    call, *args = problem("both directions", T=2)
    args, in_dims = mapped_args(*args, MAPPED[mapped]), MAPPED[mapped]

    def compute(module, x, h, p):
        value = (lambda x: scalar(call(module, x, h, p))) if transform == "hessian" else (lambda x: call(module, x, h, p))
        if module is torch:
            return (hessian if transform == "hessian" else jacobian)(value, x)
        return jacfwd(jacrev(value))(x) if transform == "hessian" else getattr(torch.func, transform)(value)(x)

    actual = vmap(lambda *a: compute(fused, *a), in_dims)(*args)
    assert_same([actual], loop(lambda *a: compute(torch, *a), in_dims, *args), TOLERANCE)


@pytest.mark.parametrize("mapped", ["input and state", "weights", "all"])
@pytest.mark.parametrize("name", ["both directions", "cell"])
def test_derivatives_of_mapped_gradients(name, mapped):
    """By a level of torch.func, by torch.autograd around all levels, and along a tangent."""
    call, *args = problem(name)
    (x, h, params), in_dims = mapped_args(*args, MAPPED[mapped]), MAPPED[mapped]
    flat = [t.requires_grad_() for t in (x, h, *params)]
    vector = [torch.randn_like(t) for t in flat]
    everything = tuple(range(len(flat)))

    def grads(module, x, h, *params):
        one = lambda *a: scalar(call(module, *a))  # noqa: E731
        if module is fused:
            return tensors(vmap(grad(one, (0, 1, 2)), in_dims)(x, h, list(params)))
        per_sample = lambda *a: torch.autograd.grad(one(*a), tensors(a), create_graph=True)  # noqa: E731
        return loop(per_sample, in_dims, x, h, list(params))

    def norm(module, *a):
        return sum(g.square().sum() for g in grads(module, *a))

    expected = torch.autograd.grad(norm(torch, *flat), flat)
    assert_same(torch.autograd.grad(norm(fused, *flat), flat), expected, TOLERANCE)
    detached = [t.detach() for t in flat]
    assert_same(grad(lambda *a: norm(fused, *a), everything)(*detached), expected, TOLERANCE)
    _, along = jvp(lambda *a: grads(fused, *a), tuple(detached), tuple(vector))
    step = 1e-5
    ahead, behind = (grads(torch, *((t + s * v).requires_grad_() for t, v in zip(detached, vector, strict=True)))
                     for s in (step, -step))  # fmt: skip
    differences = [(a - b).detach() / (2 * step) for a, b in zip(ahead, behind, strict=True)]
    assert_same(along, differences, 1e-6)  # central differences: the square of the step, and rounding by 1e-16 / step


def test_many_cotangents_of_one_forward():
    call, x, h, params = problem("both directions")
    out, pullback = vjp(lambda *a: call(fused, *a), x, h, params)
    cotangents = torch.randn(N, *out.shape, **DOUBLE)
    actual = tensors(vmap(pullback)(cotangents))
    for i in range(N):
        assert_same([a[i] for a in actual], tensors(pullback(cotangents[i])), TOLERANCE)
    inputs = [t.requires_grad_() for t in (x, h, *params)]
    batched = torch.autograd.grad(call(fused, x, h, params), inputs, cotangents, is_grads_batched=True)
    assert_same(batched, actual, TOLERANCE)
