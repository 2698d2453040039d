"""Training through compiled models on the CPU: every loop of training.py takes the same course as eagerly."""

import pytest
import torch
from training import (
    LOOPS,
    OPTIMIZERS,
    Sizes,
    Way,
    check_precision,
    check_recomputed_dropout,
    distance,
    plain,
    problem,
    sgd,
    step,
    train,
)

import torch_gru_fuse

SIZES = Sizes()
# Of what training changed: sums of at most 100 products of order 1, in another order, in four steps.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5}
ROUNDOFF = {torch.bfloat16: 2**-9, torch.float16: 2**-12}
AUTOCAST = ["SGD", "grad scaler", "weights get new storage"]


@pytest.fixture
def enabled():
    with torch_gru_fuse.enable():
        yield


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float64) for name in LOOPS), *((name, torch.float32) for name in OPTIMIZERS)], ids=str
)
def test_compiled_trains_as_eager(enabled, name, dtype):
    entry = LOOPS[name]
    model, batches = problem(SIZES)
    eager = train(entry.loop, model, batches, Way(dtype=dtype))
    assert eager.calls == {}
    compiled = train(entry.loop, model, batches, Way(dtype=dtype, compile_options={}))
    assert distance(compiled, eager) < TOLERANCE[dtype]
    entry.check_calls(compiled)
    assert torch_gru_fuse.rewrites() and all(r.rewritten for r in torch_gru_fuse.rewrites())


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.bfloat16) for name in AUTOCAST), ("grad scaler", torch.float16)], ids=str
)
def test_autocast(enabled, name, dtype):
    entry = LOOPS[name]
    model, batches = problem(SIZES)
    way = {"dtype": torch.float32, "autocast": dtype}
    exact = train(entry.loop, model, batches, Way())
    eager = train(entry.loop, model, batches, Way(**way))
    compiled = train(entry.loop, model, batches, Way(**way, compile_options={}))
    check_precision(compiled, eager, exact, ROUNDOFF[dtype])
    assert distance(compiled, exact) > 1e-6  # it did run in less than float32
    entry.check_calls(compiled)


def test_recomputed_dropout(enabled):
    check_recomputed_dropout(Way(compile_options={}), SIZES)


def test_deterministic_algorithms(enabled):
    """They are accepted, and two trainings are the same bit by bit."""
    model, batches = problem(SIZES)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (train(plain, model, batches, Way(dtype=torch.float32, compile_options={})) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first.changes, second.changes) and torch.equal(first.losses, second.losses)
    assert first.calls["gru_backward"] == len(first.losses)


@pytest.mark.parametrize("fault", ["weights of before", "a gradient too few"])
def test_a_fault_shows(fault):
    """What the comparisons above are for is at least 10 times as far off as any of them allows."""

    def wrong(model, batches, way):
        forward, optimizer, losses = model, sgd(model), []
        if fault == "weights of before":  # of those that are swapped, one is as it was when the model was compiled
            held = model.rnn.weight_hh_l0.detach().clone()

            def forward(x):
                return torch.func.functional_call(model, {"rnn.weight_hh_l0": held}, (x,))
        else:
            model.rnn.bias_hh_l1.register_hook(torch.zeros_like)
        for batch in batches:
            losses.append(step(forward, optimizer, batch, way))
            for p in model.parameters():
                p.data = p.data.flip(0)
        return losses

    model, batches = problem(SIZES)
    right = train(LOOPS["weights get new storage"].loop, model, batches, Way())
    assert distance(train(wrong, model, batches, Way()), right) > 10 * ROUNDOFF[torch.bfloat16]
