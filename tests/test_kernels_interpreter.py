"""Every kernel, run by Triton's interpreter, against the equations in float64.

Tolerances are derived: `Errors` carries, beside the float64 values, a bound of how far a kernel that rounds where ours does
may be off, element by element, once for the worst case (every rounding at its limit, all of one sign) and once for the root
mean square (independent roundings).  Both are checked.
"""

from dataclasses import dataclass

import interpreted
import pytest
import torch
import triton
import triton.language as tl

from torch_gru_fuse import equations
from torch_gru_fuse.planner.tiles import POINTWISE_TILE, Tile

kernels = interpreted.load("kernels")
gates = interpreted.load("kernels.gates")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, for the overflow that sigmoid relies on

TILE = Tile(block_b=16, block_u=16, block_k=16, num_warps=1, num_stages=1)
# Half the distance of neighbours; for bfloat16 the whole, because the interpreter cuts fp32 to bf16 instead of rounding.
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}
TINIEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-132}  # the same below normal numbers
UNIT_TF32 = 2.0**-11
UNIT_TANH = 2.0**-22  # what sigmoid and tanh promise, relative
PRECISIONS = [
    pytest.param(torch.float32, False, id="fp32"),
    pytest.param(torch.float32, True, id="tf32"),
    pytest.param(torch.float16, True, id="fp16"),
    pytest.param(torch.bfloat16, True, id="bf16"),
]


@dataclass(frozen=True)
class Errors:
    """How errors add up: linearly in the worst case, squared for the root mean square."""

    worst: bool
    dtype: torch.dtype
    tf32: bool

    def add(self, *errors):
        return sum(errors) if self.worst else sum(e * e for e in errors).sqrt()

    def matmul(self, error, weights):
        """Error of sums ``values @ weights`` from that of the values."""
        return error @ weights.abs() if self.worst else (error.square() @ weights.square()).sqrt()

    def dot(self, a, b):
        """Of the sum itself: operands rounded to tf32 (two of them in a term), and K additions in fp32."""
        terms = a.shape[-1]
        total = a.abs() @ b.abs()
        added = UNIT[torch.float32] * total * (terms + 4 if self.worst else (terms + 4) ** 0.5)
        if self.tf32 and self.dtype == torch.float32:
            rounded = 2 * UNIT_TF32 * total if self.worst else 2**0.5 * UNIT_TF32 * (a.square() @ b.square()).sqrt()
            return self.add(rounded, added)
        return added

    def stored(self, value, error):
        return self.add(error, UNIT[self.dtype] * value.abs() + TINIEST[self.dtype])

    def fp32(self, value):
        """Of a few operations in fp32."""
        return 4 * UNIT[torch.float32] * value.abs()

    def gates(self, e_ar, e_az, e_anx, e_hn, e_h, r, z, n, hn, h):
        """Errors of (h', r, z, n) from those of the pre-activations; slopes: sigmoid r(1-r), tanh 1-n^2."""
        e_r = self.add(r * (1 - r) * e_ar, UNIT_TANH * r)
        e_z = self.add(z * (1 - z) * e_az, UNIT_TANH * z)
        e_a = self.add(e_anx, hn.abs() * e_r, r * e_hn, self.fp32(hn), self.fp32(torch.atanh(n.clamp(-0.999, 0.999))))
        e_n = self.add((1 - n * n) * e_a, UNIT_TANH * n.abs())
        e_new = self.add((1 - z) * e_n, (h - n).abs() * e_z, z * e_h, self.fp32(n), self.fp32(h))
        return e_new, e_r, e_z, e_n


def assert_within(actual, expected, errors, name):
    """errors: {True: worst case, False: root mean square}, elementwise."""
    assert not actual.isnan().any(), f"{name}: unwritten or NaN"
    difference = (actual.double() - expected).abs()
    over = difference / errors[True]
    assert over.max() <= 1, f"{name}: {over.max():.3g} of the worst case"
    rms, bound = difference.square().mean().sqrt(), errors[False].square().mean().sqrt()
    # A mean over few elements scatters about the expected one, as 1/sqrt(2 count): allow four such deviations.
    bound = bound * (1 + 4 / (2 * difference.numel()) ** 0.5)
    assert rms <= bound, f"{name}: {rms:.3g}, {rms / bound:.3g} of the root mean square"


def draw(dtype, *shape, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed + 7 * sum(shape))
    return (torch.randn(shape, dtype=torch.float64, generator=generator) * scale).to(dtype)


def weights(dtype, hidden, inputs, bias=True, seed=0):
    """w_ih, w_hh, b_ih, b_hh of the size that torch gives them."""
    scale = 0.6 * hidden**-0.5
    shapes = (3 * hidden, inputs), (3 * hidden, hidden), (3 * hidden,), (3 * hidden,)
    w_ih, w_hh, b_ih, b_hh = (draw(dtype, *shape, scale=scale, seed=seed + i) for i, shape in enumerate(shapes))
    return w_ih, w_hh, b_ih if bias else None, b_hh if bias else None


def unwritten(dtype, *shape):
    return torch.full(shape, float("nan"), dtype=dtype)


def spread(tensor):
    """The same values with gaps between them, in reversed order of dimensions."""
    order = tuple(reversed(range(tensor.dim())))
    shape = [tensor.shape[i] for i in order]
    place = torch.full([2 * size for size in shape], float("nan"), dtype=tensor.dtype)
    view = place[tuple(slice(0, 2 * size, 2) for size in shape)].permute(order)
    return view.copy_(tensor)


def double(*tensors):
    return tuple(t.double() if t is not None else None for t in tensors)


# --- helpers ---------------------------------------------------------------------------------------------------------


with interpreted.mode():

    @triton.jit
    def map_kernel(p_x, p_y, F: tl.constexpr, N: tl.constexpr):
        o = tl.arange(0, N)
        tl.store(p_y + o, F(tl.load(p_x + o)))


def apply(function, x):
    y = unwritten(torch.float32, x.numel())
    map_kernel[(1,)](x, y, function, x.numel())
    return y


def every_size():
    """Both signs of 2^13 magnitudes from 1e-30 to 200, denser near one."""
    size = torch.cat((torch.logspace(-30, -3, 2048), torch.linspace(1e-3, 20, 4096), torch.linspace(20, 200, 2048)))
    return torch.cat((size, -size)).float()


@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_nonlinearity_is_accurate_everywhere(name):
    x = every_size()
    y, expected = apply(getattr(gates, name), x).double(), getattr(torch, name)(x.double())
    allowed = UNIT_TANH * expected.abs() + 2.0**-149
    if name == "sigmoid":
        allowed += 2.0**-126  # below e^-87 the exponential overflows, and the result is 0
    assert ((y - expected).abs() <= allowed).all()


@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_nonlinearity_at_the_ends(name):
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 3e38, -3e38, 1e-45])
    torch.testing.assert_close(apply(getattr(gates, name), x), getattr(torch, name)(x), equal_nan=True, rtol=1e-6, atol=0)


def test_round_tf32_is_to_nearest_with_ties_away():
    specials = [0x7F800000, 0xFF800000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000, 0, 0x80000000]
    ties = [0x3F801000, 0xBF801000, 0x3F800FFF, 0x3F801001, 0x3FFFF000, 0x7F7FFFFF, 0x7F7FEFFF, 0x00001000, 0x00000FFF]
    generator = torch.Generator().manual_seed(0)
    bits = torch.cat((torch.tensor(specials + ties), torch.randint(0, 2**32, (2**12 - 17,), generator=generator)))
    x = (bits - ((bits >> 31) << 32)).to(torch.int32).view(torch.float32)
    y = apply(gates.round_tf32, x)

    magnitude = bits & 0x7FFFFFFF
    kept = (magnitude + 0x1000) // 0x2000 * 0x2000  # an independent way: count in units of the last kept bit
    expected = (kept | bits & 0x80000000) - ((bits >> 31) << 32)
    finite_or_inf = magnitude <= 0x7F800000
    assert torch.equal(y.view(torch.int32)[finite_or_inf].long(), expected[finite_or_inf])
    assert y[~finite_or_inf].isnan().all()
    # Still NaN for tensor cores, which drop the low bits.
    assert (y.view(torch.int32)[~finite_or_inf].long() & 0x7FE000 != 0).all()


# --- cell ------------------------------------------------------------------------------------------------------------


def cell_reference(x, h, w_ih, w_hh, b_ih, b_hh):
    """h' and the gates (r, z, n, hn) [B, 4, H]."""
    r, z, n, hn = equations._gates(
        torch.nn.functional.linear(x, w_ih, b_ih), torch.nn.functional.linear(h, w_hh, b_hh)
    )
    return n + z * (h - n), torch.stack((r, z, n, hn), 1)


def cell_errors(errors, x, h, w_ih, w_hh, b_ih, b_hh, reference):
    """Of (h', gates) as stored."""
    r, z, n, hn = reference.unbind(1)
    biases = sum(b.abs() for b in (b_ih, b_hh) if b is not None)
    e_x, e_h = errors.dot(x, w_ih.T) + errors.fp32(x @ w_ih.T), errors.dot(h, w_hh.T)
    if b_ih is not None:
        e_x = e_x + errors.fp32(biases)
    (x_r, x_z, x_n), (h_r, h_z, h_n) = e_x.chunk(3, 1), e_h.chunk(3, 1)
    e_ar, e_az = errors.add(x_r, h_r), errors.add(x_z, h_z)
    e_new, *e_gates = errors.gates(e_ar, e_az, x_n, h_n, torch.zeros_like(h), r, z, n, hn, h)
    new = n + z * (h - n)
    e_gates = [errors.stored(v, e) for v, e in zip((r, z, n, hn), (*e_gates, h_n), strict=True)]
    return errors.stored(new, e_new), torch.stack(e_gates, 1)


@pytest.mark.parametrize("dtype, tf32", PRECISIONS)
@pytest.mark.parametrize(
    "batch, inputs, hidden, bias", [(1, 1, 1, True), (3, 17, 5, False), (17, 5, 33, True), (16, 32, 16, True)]
)
def test_cell_forward(dtype, tf32, batch, inputs, hidden, bias):
    arguments = draw(dtype, batch, inputs), draw(dtype, batch, hidden, scale=0.5), *weights(dtype, hidden, inputs, bias)
    out, saved = unwritten(dtype, batch, hidden), unwritten(dtype, batch, 4, hidden)
    kernels.cell_forward(*arguments, out, saved, tile=TILE, tf32=tf32)
    expected, expected_gates = cell_reference(*double(*arguments))
    bounds = {
        worst: cell_errors(Errors(worst, dtype, tf32), *double(*arguments), expected_gates) for worst in (True, False)
    }
    assert_within(out, expected, {worst: b[0] for worst, b in bounds.items()}, "h'")
    assert_within(saved, expected_gates, {worst: b[1] for worst, b in bounds.items()}, "gates")

    alone = unwritten(dtype, batch, hidden)
    kernels.cell_forward(*arguments, alone, None, tile=TILE, tf32=tf32)
    assert torch.equal(alone, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch, hidden, bias", [(1, 1, True), (5, 33, True), (4, 128, False)])
def test_cell_gates(dtype, batch, hidden, bias):
    gi, gh, h = (draw(dtype, batch, n * hidden, seed=i) for i, n in enumerate((3, 3, 1)))
    b_ih, b_hh = (draw(dtype, 3 * hidden, seed=5), draw(dtype, 3 * hidden, seed=6)) if bias else (None, None)
    out, saved = unwritten(dtype, batch, hidden), unwritten(dtype, batch, 4, hidden)
    kernels.cell_gates(gi, gh, spread(h), b_ih, b_hh, out, saved, tile=POINTWISE_TILE)
    pre = [g.double() + (b.double() if bias else 0) for g, b in ((gi, b_ih), (gh, b_hh))]
    r, z, n, hn = equations._gates(*pre)
    # fp32 arithmetic on a few numbers of size one, then one rounding at the store
    tolerance = dict(rtol=UNIT[dtype], atol=4e-7)
    torch.testing.assert_close(out.double(), n + z * (h.double() - n), **tolerance)
    torch.testing.assert_close(saved.double(), torch.stack((r, z, n, hn), 1), **tolerance)
    alone = unwritten(dtype, batch, hidden)
    kernels.cell_gates(gi, gh, h, b_ih, b_hh, alone, None, tile=POINTWISE_TILE)
    assert torch.equal(alone, out)


@pytest.mark.parametrize("one_bias", ["b_ih", "b_hh"])
def test_cell_forward_with_one_bias(one_bias):
    x, h, (w_ih, w_hh, b_ih, b_hh) = draw(torch.float32, 3, 4), draw(torch.float32, 3, 5), weights(torch.float32, 5, 4)
    b_ih, b_hh = (b_ih, None) if one_bias == "b_ih" else (None, b_hh)
    out, zero = unwritten(torch.float32, 3, 5), torch.zeros(15)
    kernels.cell_forward(x, h, w_ih, w_hh, b_ih, b_hh, out, None, tile=TILE, tf32=False)
    again = unwritten(torch.float32, 3, 5)
    filled = tuple(zero if b is None else b for b in (b_ih, b_hh))
    kernels.cell_forward(x, h, w_ih, w_hh, *filled, again, None, tile=TILE, tf32=False)
    assert torch.equal(out, again)


@pytest.mark.parametrize("tile", [Tile(16, 32, 16, 1, 1), Tile(32, 16, 32, 1, 1)], ids=str)
def test_cell_forward_of_strided_tensors_and_other_tiles(tile):
    dtype, batch, inputs, hidden = torch.float32, 33, 5, 17
    arguments = draw(dtype, batch, inputs), draw(dtype, batch, hidden), *weights(dtype, hidden, inputs)
    out, saved = unwritten(dtype, batch, hidden), unwritten(dtype, batch, 4, hidden)
    kernels.cell_forward(*arguments, out, saved, tile=TILE, tf32=False)
    spread_out, spread_saved = spread(unwritten(dtype, batch, hidden)), spread(unwritten(dtype, batch, 4, hidden))
    kernels.cell_forward(*map(spread, arguments), spread_out, spread_saved, tile=tile, tf32=False)
    # The same sums in another order: two roundings of a sum of a few numbers of size one.
    torch.testing.assert_close(spread_out, out, rtol=0, atol=2e-6)
    torch.testing.assert_close(spread_saved, saved, rtol=0, atol=2e-6)
    assert spread_out._base.isnan().sum() == spread_out._base.numel() - out.numel()  # nothing beside it was written


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("where", ["x", "h"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_cell_forward_of_nan_and_inf(where, value, tf32):
    batch, inputs, hidden = 3, 4, 5
    x, h, parameters = draw(torch.float32, batch, inputs), draw(torch.float32, batch, hidden), weights(torch.float32, 5, 4)
    (x if where == "x" else h)[1, 2] = value
    out = torch.zeros(batch, hidden)
    kernels.cell_forward(x, h, *parameters, out, None, tile=TILE, tf32=tf32)
    expected = torch.gru_cell(x, h, *parameters)
    assert not expected[[0, 2]].isnan().any()  # a bad row does not reach its neighbours
    # Only where the bad values end up is asked; 1e-2 covers tf32.
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=1e-2, atol=1e-2)


def derivative_errors(errors, r, z, n, hn, h):
    """Of d(pre-activation)/dh' in the order (hn, r, z, n), from gates that were stored and so are off by a unit each.

    d_n = (1-z)(1-n^2) moves by at most a unit for z and two for n; each further factor adds its own; slopes of r(1-r)
    and z(1-z) are at most one; fp32 arithmetic is far below.
    """
    u = UNIT[errors.dtype]
    e_n = torch.full_like(r, 3 * u)
    e_hn = e_n + u
    e_r = 2 * u * hn.abs() + u * hn.abs()
    e_z = (h - n).abs() * u + u
    return torch.stack((e_hn, e_r, e_z, e_n), -2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch, hidden", [(1, 1), (5, 33), (4, 128)])
def test_cell_backward(dtype, batch, hidden):
    inputs = 3
    x, h, parameters = draw(dtype, batch, inputs), draw(dtype, batch, hidden, scale=0.5), weights(dtype, hidden, inputs)
    grad = draw(dtype, batch, hidden, seed=3)
    _, exact = cell_reference(*double(x, h, *parameters))
    saved = exact.to(dtype)
    d_gates, d_h = unwritten(dtype, batch, 4, hidden), unwritten(dtype, batch, hidden)
    kernels.cell_backward(grad, h, saved, d_gates, d_h, tile=POINTWISE_TILE)

    g, h64 = double(grad, h)
    r, z, n, hn = exact.unbind(1)
    expected = equations._gate_derivatives(r, z, n, hn, h64) * g[:, None]
    bounds, bounds_h = {}, {}
    for worst in (True, False):
        errors = Errors(worst, dtype, False)
        e = derivative_errors(errors, r, z, n, hn, h64) * g[:, None].abs() + errors.fp32(expected)
        bounds[worst] = errors.stored(expected, e)
        bounds_h[worst] = errors.stored(g * z, errors.stored(g * z, errors.fp32(g)))
    assert_within(d_gates, expected, bounds, "gate gradients")
    assert_within(d_h, g * z, bounds_h, "direct path")

    # With the caller's products the gradients are those of the equations.
    if dtype == torch.float32:
        d, rotated = d_gates.double().flatten(1), h64.new_tensor(parameters[1].double().roll(hidden, 0).tolist())
        dh = d_h.double() + d[:, : 3 * hidden] @ rotated
        dx, expected_dh, *_ = equations.gru_cell_backward(g, *double(x, h, *parameters))
        torch.testing.assert_close(dh, expected_dh, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(d[:, hidden:] @ parameters[0].double(), dx, rtol=1e-5, atol=1e-5)

    spread_d, spread_h = spread(unwritten(dtype, batch, 4, hidden)), spread(unwritten(dtype, batch, hidden))
    kernels.cell_backward(spread(grad), spread(h), spread(saved), spread_d, spread_h, tile=TILE)
    assert torch.equal(spread_d, d_gates) and torch.equal(spread_h, d_h)


# --- sequence --------------------------------------------------------------------------------------------------------


SIZES = [  # directions, steps, batch, hidden
    (1, 1, 1, 1),
    (2, 3, 5, 17),
    (1, 2, 17, 33),
    (2, 4, 3, 16),
]


def sequence_arguments(dtype, gi_dtype, directions, steps, batch, hidden, bias):
    """gi, h0, w_hh, b_ih, b_hh."""
    layers = [weights(dtype, hidden, 1, bias, seed=10 * d) for d in range(directions)]
    _, w_hh, b_ih, b_hh = (list(p) for p in zip(*layers, strict=True))
    gi = draw(gi_dtype, directions, steps, batch, 3 * hidden, scale=0.7)
    h0 = draw(dtype, directions, batch, hidden, scale=0.5)
    return gi, h0, w_hh, b_ih if bias else None, b_hh if bias else None


def times(steps, direction):
    return range(steps) if direction == 0 else range(steps - 1, -1, -1)


def sequence_reference(errors, gi, h0, w_hh, b_ih, b_hh):
    """out [T, B, D*H] and gates [D, T, B, 4, H] in float64, each with the error of a kernel that stores states in dtype."""
    directions, steps, batch, width = gi.shape
    hidden = width // 3
    out, e_out = (torch.empty(steps, batch, directions, hidden, dtype=torch.float64) for _ in range(2))
    saved, e_saved = (torch.empty(directions, steps, batch, 4, hidden, dtype=torch.float64) for _ in range(2))
    for d in range(directions):
        h, w = h0[d].double(), w_hh[d].double()
        e_h = torch.zeros_like(h)
        b = [p[d].double() if p is not None else torch.zeros(width, dtype=torch.float64) for p in (b_ih, b_hh)]
        for t in times(steps, d):
            given = gi[d, t].double() + b[0]
            r, z, n, hn = equations._gates(given, h @ w.T + b[1])
            e_given = (errors.fp32(given) + errors.fp32(b[0]) + errors.fp32(b[1])).chunk(3, 1)
            e_sum = errors.add(errors.dot(h, w.T), errors.matmul(e_h, w.T)).chunk(3, 1)
            e_ar, e_az = (errors.add(e_given[i], e_sum[i]) for i in (0, 1))
            e_hn = e_sum[2] + errors.fp32(b[1].chunk(3)[2])
            e_new, *e_gates = errors.gates(e_ar, e_az, e_given[2], e_hn, e_h, r, z, n, hn, h)
            h = n + z * (h - n)
            e_h = errors.stored(h, e_new)
            out[t, :, d], e_out[t, :, d] = h, e_h
            saved[d, t] = torch.stack((r, z, n, hn), 1)
            for i, (v, e) in enumerate(zip((r, z, n, hn), (*e_gates, e_hn), strict=True)):
                e_saved[d, t, :, i] = errors.stored(v, e)
    return out.flatten(2), saved, e_out.flatten(2), e_saved


@pytest.mark.parametrize("dtype, tf32", PRECISIONS)
@pytest.mark.parametrize("directions, steps, batch, hidden", SIZES)
def test_sequence_forward(dtype, tf32, directions, steps, batch, hidden):
    bias = steps != 3
    gi_dtype = torch.float32 if batch == 3 else dtype
    arguments = sequence_arguments(dtype, gi_dtype, directions, steps, batch, hidden, bias)
    out, saved = unwritten(dtype, steps, batch, directions * hidden), unwritten(dtype, directions, steps, batch, 4, hidden)
    kernels.sequence_forward(*arguments, out, saved, tile=TILE, tf32=tf32)
    by_case = {w: sequence_reference(Errors(w, dtype, tf32), *arguments) for w in (True, False)}
    expected, expected_gates, *_ = by_case[True]
    assert_within(out, expected, {w: case[2] for w, case in by_case.items()}, "out")
    assert_within(saved, expected_gates, {w: case[3] for w, case in by_case.items()}, "gates")

    gi, h0, *rest = arguments
    alone = unwritten(dtype, steps, batch, directions * hidden)
    kernels.sequence_forward(spread(gi), spread(h0), *rest, alone, None, tile=TILE, tf32=tf32)
    assert torch.equal(alone, out)


def test_sequence_forward_is_the_equations_layer():
    steps, batch, inputs, hidden = 3, 5, 4, 17
    x = draw(torch.float32, steps, batch, inputs)
    layers = [weights(torch.float32, hidden, inputs, seed=d) for d in (0, 1)]
    h0 = draw(torch.float32, 2, batch, hidden)
    gi = torch.stack([x @ layer[0].T for layer in layers])
    out = unwritten(torch.float32, steps, batch, 2 * hidden)
    _, w_hh, b_ih, b_hh = zip(*layers, strict=True)
    kernels.sequence_forward(gi, h0, w_hh, b_ih, b_hh, out, None, tile=Tile(32, 32, 16, 1, 1), tf32=False)
    expected = [
        equations.gru_layer(x.double(), h0[d].double(), *double(*layers[d]), reverse=d == 1)[0] for d in (0, 1)
    ]
    torch.testing.assert_close(out.double(), torch.cat(expected, -1), rtol=0, atol=3e-6)  # some 10 roundings a step


def sequence_backward_reference(errors, grad_out, grad_hn, out, h0, w_hh, saved):
    """(d_gates, d_h0) in float64 from exact gates and states, and the errors if these are stored in dtype."""
    directions, steps, batch, _, hidden = saved.shape
    d_gates, e_gates = torch.empty_like(saved), torch.empty_like(saved)
    d_h0, e_h0 = torch.empty_like(h0), torch.empty_like(h0)
    for d in range(directions):
        states = out[..., d * hidden : (d + 1) * hidden]
        w = equations._rotate(w_hh[d].double())
        g = grad_hn[d].double().clone() if grad_hn is not None else torch.zeros_like(h0[d])
        e_g = errors.fp32(g)
        order = list(times(steps, d))
        for i in reversed(range(steps)):
            t = order[i]
            h = states[order[i - 1]] if i else h0[d]
            if grad_out is not None:
                g = g + grad_out[t, :, d * hidden : (d + 1) * hidden].double()
            r, z, n, hn = saved[d, t].unbind(1)
            slope = equations._gate_derivatives(r, z, n, hn, h)
            made = slope * g[:, None]
            e_made = errors.add(
                slope.abs() * e_g[:, None],
                derivative_errors(errors, r, z, n, hn, h) * g[:, None].abs(),
                errors.fp32(made),
            )
            d_gates[d, t], e_gates[d, t] = made, errors.stored(made, e_made)
            flat, e_flat = made.flatten(1)[:, : 3 * hidden], e_gates[d, t].flatten(1)[:, : 3 * hidden]
            e_g = errors.add(
                z * e_g, UNIT[errors.dtype] * z * g.abs(), errors.fp32(g), errors.dot(flat, w), errors.matmul(e_flat, w)
            )
            g = g * z + flat @ w
        d_h0[d], e_h0[d] = g, errors.stored(g, e_g)
    return d_gates, d_h0, e_gates, e_h0


@pytest.mark.parametrize("dtype, tf32", PRECISIONS)
@pytest.mark.parametrize("directions, steps, batch, hidden", SIZES)
def test_sequence_backward(dtype, tf32, directions, steps, batch, hidden):
    given = {1: "both", 2: "out", 3: "final", 4: "both"}[steps]
    arguments = sequence_arguments(dtype, dtype, directions, steps, batch, hidden, True)
    out, saved, *_ = sequence_reference(Errors(True, dtype, tf32), *arguments)
    _, h0, w_hh, *_ = arguments
    grad_out = draw(dtype, steps, batch, directions * hidden, seed=1) if given != "final" else None
    grad_hn = draw(dtype, directions, batch, hidden, seed=2) if given != "out" else None
    d_gates, d_h0 = unwritten(dtype, *saved.shape), unwritten(dtype, *h0.shape)
    kernels.sequence_backward(
        grad_out, grad_hn, out.to(dtype), h0, w_hh, saved.to(dtype), d_gates, d_h0, tile=TILE, tf32=tf32
    )
    by_case = {
        w: sequence_backward_reference(Errors(w, dtype, tf32), grad_out, grad_hn, out, h0.double(), w_hh, saved)
        for w in (True, False)
    }
    expected, expected_h0, *_ = by_case[True]
    assert_within(d_gates, expected, {w: case[2] for w, case in by_case.items()}, "gate gradients")
    assert_within(d_h0, expected_h0, {w: case[3] for w, case in by_case.items()}, "d_h0")


@pytest.mark.parametrize("transposed", [False, True], ids=["small weights", "weights from memory"])
def test_sequence_backward_is_the_equations_layer(monkeypatch, transposed):
    """End to end in fp32: forward, backward and the caller's products; the gradient is expanded, as that of a sum is."""
    monkeypatch.setitem(kernels.sequence_backward.__globals__, "_FROM_MEMORY", 1 if transposed else 1000)
    steps, batch, inputs, hidden = 3, 5, 4, 17
    x, h0 = draw(torch.float32, steps, batch, inputs), draw(torch.float32, 2, batch, hidden)
    layers = [weights(torch.float32, hidden, inputs, seed=d) for d in (0, 1)]
    _, w_hh, b_ih, b_hh = zip(*layers, strict=True)
    gi = torch.stack([x @ layer[0].T for layer in layers])
    out, saved = unwritten(torch.float32, steps, batch, 2 * hidden), unwritten(torch.float32, 2, steps, batch, 4, hidden)
    kernels.sequence_forward(gi, h0, w_hh, b_ih, b_hh, out, saved, tile=TILE, tf32=False)
    grad_out = draw(torch.float32, steps, batch, 1).expand(-1, -1, 2 * hidden)
    grad_hn = spread(draw(torch.float32, 2, batch, hidden))
    d_gates, d_h0 = torch.full_like(saved, float("nan")), torch.full_like(h0, float("nan"))
    kernels.sequence_backward(grad_out, grad_hn, out, spread(h0), w_hh, saved, d_gates, d_h0, tile=TILE, tf32=False)

    for d in (0, 1):
        columns = slice(d * hidden, (d + 1) * hidden)
        states, _ = equations.gru_layer(x.double(), h0[d].double(), *double(*layers[d]), reverse=d == 1)
        w_ih, w_hh_d, *biases = double(*layers[d])
        dx, dh0, dw_ih, dw_hh, db_ih, db_hh = equations.gru_layer_backward(
            grad_out[..., columns].double(), grad_hn[d].double(), x.double(), h0[d].double(), states, w_ih, w_hh_d,
            *biases, reverse=d == 1,
        )  # fmt: skip
        flat = d_gates[d].double().flatten(2).flatten(0, 1)
        before = torch.cat((states[1:], h0[d, None].double())) if d else torch.cat((h0[d, None].double(), states[:-1]))
        actual = equations._parameter_gradients(
            flat, x.double().flatten(0, 1), before.flatten(0, 1), w_ih, (True,) * 5
        )
        # Relative to gradients of size up to 30 in fp32: 1e-5 is a hundred roundings.
        for a, e in zip(actual, (dx.flatten(0, 1), dw_ih, dw_hh, db_ih, db_hh), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(d_h0[d].double(), dh0, rtol=1e-5, atol=1e-5)


# --- tf32 ------------------------------------------------------------------------------------------------------------


def rounded(tensor):
    """To the nearest tf32; the helper itself is tested above."""
    size = triton.next_power_of_2(tensor.numel())
    flat = torch.nn.functional.pad(tensor.flatten(), (0, size - tensor.numel()))
    return apply(gates.round_tf32, flat)[: tensor.numel()].view_as(tensor)


def test_both_operands_of_every_product_are_rounded_to_tf32():
    """The interpreter multiplies exactly what it is given, so operands rounded beforehand must make no difference."""
    batch, inputs, hidden = 3, 5, 17
    x, h = draw(torch.float32, batch, inputs), draw(torch.float32, batch, hidden)
    w_ih, w_hh, b_ih, b_hh = weights(torch.float32, hidden, inputs)
    out = unwritten(torch.float32, batch, hidden)
    by_kernel, by_hand, exact = (unwritten(torch.float32, batch, 4, hidden) for _ in range(3))
    kernels.cell_forward(x, h, w_ih, w_hh, b_ih, b_hh, out, by_kernel, tile=TILE, tf32=True)
    operands = map(rounded, (x, h, w_ih, w_hh))
    kernels.cell_forward(*operands, b_ih, b_hh, out, by_hand, tile=TILE, tf32=False)
    kernels.cell_forward(x, h, w_ih, w_hh, b_ih, b_hh, out, exact, tile=TILE, tf32=False)
    assert torch.equal(by_kernel, by_hand) and not torch.equal(by_kernel, exact)

    gi, out = draw(torch.float32, 1, 1, batch, 3 * hidden), unwritten(torch.float32, 1, batch, hidden)
    by_kernel, by_hand = (unwritten(torch.float32, 1, 1, batch, 4, hidden) for _ in range(2))
    kernels.sequence_forward(gi, h[None], [w_hh], None, None, out, by_kernel, tile=TILE, tf32=True)
    kernels.sequence_forward(gi, rounded(h)[None], [rounded(w_hh)], None, None, out, by_hand, tile=TILE, tf32=False)
    assert torch.equal(by_kernel, by_hand)

    grad, d_gates, d_h0 = draw(torch.float32, 1, batch, hidden), torch.empty_like(by_kernel), torch.empty_like(h[None])
    kernels.sequence_backward(None, grad, out, h[None], [w_hh], by_kernel, d_gates, d_h0, tile=TILE, tf32=True)
    d_hh = rounded(d_gates).flatten(3)[0, 0, :, : 3 * hidden].double()
    by_hand = grad[0].double() * by_kernel[0, 0, :, 1].double() + d_hh @ rounded(w_hh).double().roll(hidden, 0)
    torch.testing.assert_close(d_h0[0].double(), by_hand, rtol=0, atol=1e-6)  # tf32 itself is 1e-3 away


# ---- the input projection of whole sequences ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tf32", PRECISIONS)
@pytest.mark.parametrize("steps, batch, inputs, directions", [(5, 7, 32, 1), (3, 8, 21, 2), (1, 1, 16, 1), (40, 2, 48, 2)])
@pytest.mark.parametrize("batch_first", [False, True])
def test_project(dtype, tf32, steps, batch, inputs, directions, batch_first):
    """The product with each direction's weights, and what is prepared beside it."""
    prepare, hidden, rows = interpreted.load("kernels.prepare"), 16, steps * batch
    x = draw(dtype, *((batch, steps) if batch_first else (steps, batch)), inputs)
    w = tuple(draw(dtype, 3 * hidden, inputs, seed=d) for d in range(directions))
    gi, out = unwritten(dtype, directions, rows, 3 * hidden), unwritten(dtype, steps, batch, directions * hidden)
    hx = draw(dtype, directions, batch, hidden)
    h_n, h0 = unwritten(dtype, *hx.shape), unwritten(dtype, batch, directions * hidden)
    error, host = torch.full((4,), -1), torch.zeros(1, dtype=torch.int32)
    sizes = dict(lanes=directions, hidden=hidden, reverse=directions == 2, fill_out=True, states=True, ring=False)
    preparing, = prepare.prepare_grid(steps=steps, batch=batch, rows=batch, **sizes)
    constants = prepare.project_constants(
        TILE, inputs=inputs, batch_first=batch_first, tf32=tf32 and dtype == torch.float32, prepare=True,
        inputs_hidden=hidden, **sizes,
    )
    grid = prepare.project_grid(TILE, weights=directions, rows=rows, hidden=hidden, preparing=preparing)
    prepare.project_kernel[grid](x, w, gi, hx, host, out, out, h0, h_n, error, 5, steps, batch, batch, **constants)
    a = (x.transpose(0, 1) if batch_first else x).reshape(rows, inputs).double()
    for found, weight in zip(gi, w, strict=True):
        b = weight.double().t()
        bounds = {}
        for worst in (True, False):
            errors = Errors(worst, dtype, tf32)
            bounds[worst] = errors.stored(a @ b, errors.dot(a, b))
        assert_within(found, a @ b, bounds, "gi")
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    assert (out.view(integer) == -1).all() and (h_n.view(integer) == -1).all()
    assert torch.equal(h0.view(batch, directions, hidden).transpose(0, 1), hx)
    assert error[:3].tolist() == [0, host.data_ptr(), 5]
