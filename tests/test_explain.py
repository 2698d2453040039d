"""`explain` says what became of each GRU of a model, where it is in the source, and why not where it is not."""

import dataclasses
import inspect

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import torch_gru_fuse
from torch_gru_fuse import torch_hooks
from torch_gru_fuse.backend import gru_fuse
from torch_gru_fuse.tools import explain as module

T, B, I, H = 5, 3, 4, 4


class Everything(nn.Module):
    """A GRU, a loop over a cell, one that feeds itself, and a cell that is none."""

    def __init__(self):
        super().__init__()
        self.rnn, self.cell, self.linear = nn.GRU(I, H, 2), nn.GRUCell(H, H), nn.Linear(H, H)

    def forward(self, x):
        y, _ = self.rnn(x)  # line 1
        h = y[0]
        for t in range(T):
            h = self.cell(y[t], h)  # line 4
        for _ in range(3):
            h = self.cell(self.linear(h), h)  # line 6
        z = torch.sigmoid(self.linear(h) + self.linear(y[0]))
        return (1 - z) * torch.tanh(self.linear(z * h) + self.linear(y[0])) + z * h  # line 8


def line_of(function, number):
    return inspect.getsourcelines(function)[1] + number


def test_every_kind():
    explanation = torch_gru_fuse.explain(Everything(), torch.randn(T, B, I))
    assert explanation.graphs == 1
    entries = {(e.found, e.rewritten): e for e in explanation.entries}
    assert [e.found for e in explanation.rewritten] == ["loop of 5 steps over torch.gru_cell", "torch.gru"]
    rnn = entries["torch.gru", True]
    assert (rnn.module, rnn.op, rnn.calls, rnn.reason) == ("rnn (GRU)", "torch_gru_fuse.gru", 1, None)
    assert rnn.file == __file__ and rnn.line == line_of(Everything.forward, 1) and rnn.function == "forward"
    assert rnn.plan.startswith("PyTorch's own GRU (the kernels need a CUDA device")
    loop = entries["loop of 5 steps over torch.gru_cell", True]
    assert loop.line == line_of(Everything.forward, 4) and loop.calls == 1 and loop.module == "cell (GRUCell)"
    feeding = entries["loop of 4 steps over torch.gru_cell", False]
    assert feeding.line == line_of(Everything.forward, 6) and feeding.op is None and feeding.plan is None
    assert feeding.reason == "its input at a step depends on the hidden state of the step before"
    cells = entries["torch.gru_cell", False]
    assert cells.calls == 3 and "on a CPU" in cells.reason
    cho = entries["hand-written cell", False]
    assert cho.line == line_of(Everything.forward, 8) and "Cho 2014" in cho.reason


def test_it_reads_well():
    text = str(torch_gru_fuse.explain(Everything(), torch.randn(T, B, I)))
    assert text.splitlines()[0] == "Found 5 in 1 graph: 2 rewritten, 3 not."
    assert "+ torch.gru, rnn (GRU)\n" in text and f"    {__file__}:{line_of(Everything.forward, 1)} in forward\n" in text
    assert "    -> torch_gru_fuse.gru, 1 call: PyTorch's own GRU (" in text
    assert "    not rewritten (3 calls): on a CPU Inductor's own code for a cell is faster" in text
    nothing = torch_gru_fuse.explain(nn.Linear(2, 2), torch.randn(2, 2))
    assert nothing.entries == () and str(nothing) == "No GRU, GRU cell or loop over one was found in 1 graph."


def test_it_is_frozen():
    explanation = torch_gru_fuse.explain(nn.GRU(I, H), torch.randn(T, B, I))
    for part, name in ((explanation, "graphs"), (explanation.entries[0], "calls")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, name, 7)


def test_calls_of_a_graph_that_runs_several_times():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(I, I)

        def layer(self, x):
            torch._dynamo.graph_break()
            return self.rnn(x)[0]

        def forward(self, x):
            for _ in range(3):
                x = self.layer(x)
                torch._dynamo.graph_break()
            return x

    [entry] = torch_gru_fuse.explain(Several(), torch.randn(T, B, I)).entries
    assert entry.calls == 3 and entry.function == "layer"


def test_packed_sequence():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(I, H)

        def forward(self, x, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
            return self.rnn(packed)[1]

    explanation = torch_gru_fuse.explain(Packed(), torch.randn(T, B, I), torch.tensor([2, 5, 3]))
    [entry] = explanation.entries
    assert entry.op == "torch_gru_fuse.gru_packed" and entry.calls == 1 and entry.found == "torch.gru"
    assert entry.file == __file__ and entry.function == "forward" and entry.line == line_of(Packed.forward, 2)


def test_the_state_of_the_process_stays():
    model, x = nn.GRU(I, H), torch.randn(T, B, I)
    assert not torch_gru_fuse.is_enabled()
    was_installed = module.switch.dynamo_hook.installed
    torch_gru_fuse.explain(model, x)
    assert not torch_gru_fuse.is_enabled() and module.switch.dynamo_hook.installed == was_installed
    with torch_gru_fuse.enable():
        compiled = torch.compile(model, backend=gru_fuse)
        assert len(torch_gru_fuse.explain(compiled, x).entries) == 1  # a compiled module is one, too
        assert torch_gru_fuse.is_enabled()


def test_as_often_as_one_likes():
    model, x = nn.GRU(I, H), torch.randn(T, B, I)
    assert {len(torch_gru_fuse.explain(model, x).entries) for _ in range(torch._dynamo.config.recompile_limit + 3)} == {1}


def test_keywords_and_functions():
    rnn = nn.GRU(I, H)
    [entry] = torch_gru_fuse.explain(lambda *, x: rnn(x)[0].sum(), x=torch.randn(T, B, I)).entries
    assert entry.rewritten


@pytest.mark.parametrize("training", [True, False])
def test_plan_on_a_gpu(monkeypatch, training):
    """The plan is the planner's, for the sizes of the call; no GPU is needed to ask for it."""
    monkeypatch.setenv("TORCH_GRU_FUSE_GPU", "h200")
    monkeypatch.setattr(torch_hooks, "cudnn_runs", lambda tensor: True)
    graph = torch.fx.Graph()

    def fake(*size):
        node = graph.placeholder(f"p{len(graph.nodes)}")
        node.meta["example_value"] = torch.empty(*size, device="cuda", dtype=torch.float16, requires_grad=training)
        return node

    with FakeTensorMode():
        weights = [fake(768, 256), fake(768, 256), fake(768), fake(768)]
        args = (fake(512, 10, 256), fake(1, 10, 256), weights, True, 1, 0.0, False, False, False)
        call = graph.call_function(torch.ops.torch_gru_fuse.gru.default, args)
        cell = graph.call_function(torch.ops.torch_gru_fuse.gru_cell.default, (fake(10, 256), fake(10, 256), *weights))
    assert module._plan(call) == "kernel 'whole' (whole sequences in one launch: faster than cuDNN)"
    assert module._plan(cell) == "kernel 'cell' (one launch for both projections and the gates)"
