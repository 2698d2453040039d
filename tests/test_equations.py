"""The equations against torch's own GRU and against numerical derivatives, in float64."""

import pytest
import torch

from torch_gru_fuse import equations

DOUBLE = torch.float64
# float64 against float64: both sum the same few hundred terms of size one, in another order.
CLOSE = dict(rtol=1e-12, atol=1e-12)


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, dtype=DOUBLE, generator=generator)


def cell_arguments(bias=True, batch=3, inputs=4, hidden=5):
    biases = (draw(3 * hidden, seed=1), draw(3 * hidden, seed=2)) if bias else (None, None)
    return draw(batch, inputs), draw(batch, hidden), draw(3 * hidden, inputs), draw(3 * hidden, hidden), *biases


def with_gradients(arguments):
    return tuple(a.clone().requires_grad_() if a is not None else None for a in arguments)


def gradients(outputs, grads, arguments):
    """Gradients by autograd, None where an argument is None."""
    present = [a for a in arguments if a is not None]
    found = iter(torch.autograd.grad(outputs, present, grads))
    return tuple(next(found) if a is not None else None for a in arguments)


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert (a is None) == (e is None)
        if a is not None:
            torch.testing.assert_close(a, e, **CLOSE)


@pytest.mark.parametrize("bias", [True, False])
def test_cell_is_torchs(bias):
    arguments = cell_arguments(bias)
    torch.testing.assert_close(equations.gru_cell(*arguments), torch.gru_cell(*arguments), **CLOSE)


@pytest.mark.parametrize("bias", [True, False])
def test_cell_backward_is_autograds(bias):
    arguments = with_gradients(cell_arguments(bias))
    grad = draw(3, 5, seed=9)
    expected = gradients(torch.gru_cell(*arguments), grad, arguments)
    with torch.no_grad():
        assert_same(equations.gru_cell_backward(grad, *arguments), expected)


class Cell(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        ctx.save_for_backward(*arguments)
        return equations.gru_cell(*arguments)

    @staticmethod
    def backward(ctx, grad):
        return equations.gru_cell_backward(grad, *ctx.saved_tensors)


class Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, reverse, *arguments):
        out, final = equations.gru_layer(*arguments, reverse=reverse)
        x, h0, *weights = arguments
        ctx.save_for_backward(x, h0, out, *weights)
        ctx.reverse = reverse
        return out, final

    @staticmethod
    def backward(ctx, grad_out, grad_hn):
        return None, *equations.gru_layer_backward(grad_out, grad_hn, *ctx.saved_tensors, reverse=ctx.reverse)


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_cell(bias):
    assert torch.autograd.gradcheck(Cell.apply, with_gradients(cell_arguments(bias)))


def layer_arguments(bias=True, steps=4, batch=2, inputs=3, hidden=5):
    _, *rest = cell_arguments(bias, batch, inputs, hidden)
    return draw(steps, batch, inputs), *rest


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck_layer(reverse, bias):
    assert torch.autograd.gradcheck(Layer.apply, (reverse, *with_gradients(layer_arguments(bias))))


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("given", ["out", "final", "both"])
@pytest.mark.parametrize("reverse", [False, True])
def test_layer_backward_of_either_gradient(steps, given, reverse):
    arguments = with_gradients(layer_arguments(steps=steps))
    out, final = equations.gru_layer(*arguments, reverse=reverse)
    grad_out = draw(*out.shape, seed=5) if given != "final" else None
    grad_hn = draw(*final.shape, seed=6) if given != "out" else None
    kept = [(o, g) for o, g in ((out, grad_out), (final, grad_hn)) if g is not None]
    expected = gradients([o for o, _ in kept], [g for _, g in kept], arguments)
    before = [g.clone() if g is not None else None for g in (grad_out, grad_hn)]
    with torch.no_grad():
        x, h0, *weights = arguments
        actual = equations.gru_layer_backward(grad_out, grad_hn, x, h0, out, *weights, reverse=reverse)
    assert_same(actual, expected)
    assert_same([grad_out, grad_hn], before)  # arguments are left alone


def test_layer_backward_makes_only_what_is_needed():
    x, h0, *weights = layer_arguments()
    out, _ = equations.gru_layer(x, h0, *weights)
    everything = equations.gru_layer_backward(out, None, x, h0, out, *weights)
    for i in range(6):
        needs = tuple(j == i for j in range(6))
        only = equations.gru_layer_backward(out, None, x, h0, out, *weights, needs=needs)
        assert_same(only, tuple(g if j == i else None for j, g in enumerate(everything)))


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_stack_is_torchs(num_layers, bidirectional, bias):
    steps, batch, inputs, hidden, directions = 6, 3, 4, 5, 1 + bidirectional
    module = torch.nn.GRU(inputs, hidden, num_layers, bias=bias, bidirectional=bidirectional, dtype=DOUBLE)
    x, hx = draw(steps, batch, inputs), draw(num_layers * directions, batch, hidden)
    with torch.no_grad():
        expected = torch.gru(
            x, hx, module._flat_weights, bias, num_layers, 0.0, False, bidirectional, batch_first=False
        )
        assert_same(equations.gru(x, hx, module._flat_weights, bias, num_layers, bidirectional), expected)


def test_dropout_masks_act_between_layers():
    steps, batch, hidden = 4, 2, 3
    first, second = (torch.nn.GRU(hidden, hidden, dtype=DOUBLE) for _ in range(2))
    x, hx = draw(steps, batch, hidden), draw(2, batch, hidden)
    masks = torch.randint(0, 2, (1, steps, batch, hidden)).to(DOUBLE) * 2
    with torch.no_grad():
        between, h_first = first(x, hx[:1])
        expected, h_second = second(between * masks[0], hx[1:])
        params = [*first._flat_weights, *second._flat_weights]
        assert_same(
            equations.gru(x, hx, params, True, 2, False, dropout_masks=masks),
            (expected, torch.cat((h_first, h_second))),
        )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reverse", [False, True])
def test_layer_that_saves_its_gates(reverse, bias):
    steps, batch, inputs, hidden = 4, 3, 2, 5
    new = dict(dtype=torch.float64)
    x, h0 = torch.randn(steps, batch, inputs, **new), torch.randn(batch, hidden, **new)
    w_ih, w_hh = torch.randn(3 * hidden, inputs, **new), torch.randn(3 * hidden, hidden, **new)
    biases = (torch.randn(3 * hidden, **new), torch.randn(3 * hidden, **new)) if bias else (None, None)
    parameters = (w_ih, w_hh, *biases)
    out = torch.full((steps, batch, 2 * hidden), float("nan"), **new)[..., hidden:]  # a strided part of a larger output
    gates = torch.full((steps, batch, 4, hidden), float("nan"), **new)
    equations.gru_layer_saving(x, h0, *parameters, out, gates, reverse)
    expected, _ = equations.gru_layer(x, h0, *parameters, reverse)
    torch.testing.assert_close(out, expected)
    grads = torch.randn(steps, batch, hidden, **new), torch.randn(batch, hidden, **new)
    saved = equations.gru_layer_backward(*grads, x, h0, out, *parameters, reverse, gates=gates)
    recomputed = equations.gru_layer_backward(*grads, x, h0, out, *parameters, reverse)
    for a, b in zip(saved, recomputed, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b)
