"""Models that nobody here wrote, unchanged: eager against compiled, outputs and gradients, and how many calls were fused.

Their packages are the extra `models`; `pytest tests/models` runs this folder, which `pytest` alone leaves out.
"""

import pytest
import torch
from catalogue import MODELS
from measure import default_dtype, problem, run
from problems import assert_same

import torch_gru_fuse

# Sums of at most some hundred products of order 1 in another order.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_rewritten(model):
    result = run(model)
    assert_same(result.actual, result.expected, TOLERANCE[model.dtype])
    assert (result.calls, result.graphs) == (model.calls, model.graphs)
    assert result.left == model.left


def test_most_are_rewritten():
    assert sum(bool(m.calls) for m in MODELS) >= 15 and len({m.package for m in MODELS if m.calls}) >= 8


BY_INDUCTOR = [m for m in MODELS if m.name in ("WaveRNN", "GRU4Rec", "DIEN's InterestEvolvingLayer (AIGRU)")]


@pytest.mark.parametrize("model", BY_INDUCTOR, ids=str)
def test_compiled_by_inductor(model):
    """As a user compiles it, with cells left to Inductor as on any CPU."""
    with default_dtype(model.dtype), torch_gru_fuse.enable():
        case = problem(model)
        expected = case.outputs_and_gradients(case.module)
        actual = case.outputs_and_gradients(torch.compile(case.module, fullgraph=True))
    assert_same(actual, expected, TOLERANCE[model.dtype])
    fused = sum(r.rewritten for r in torch_gru_fuse.rewrites())
    assert fused == sum(n for op, n in model.calls.items() if op != "gru_cell")


def test_explain_says_why():
    """On a CPU a decoder's cells are left alone: once because a step needs the one before, once because of the CPU."""
    [decoder] = [m for m in MODELS if m.name.startswith("AttentionalRNNDecoder")]
    case = problem(decoder)
    text = str(torch_gru_fuse.explain(case.module, *case.args))
    assert "loop of 4 steps over torch.gru_cell, rnn.rnn_cells.0 (GRUCell)" in text
    assert "not rewritten (1 call): the hidden state is changed between two steps (by stack)" in text
    assert "on a CPU Inductor's own code for a cell is faster" in text
