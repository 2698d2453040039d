"""What feeds a GRU, and what it feeds, stays Inductor's to fuse: the generated code has as many kernels as without the GRU."""

import re

import pytest
import torch
from problems import assert_same
from torch import nn
from torch._inductor.utils import run_and_get_code

import torch_gru_fuse
from torch_gru_fuse.passes import pairs
from torch_gru_fuse.passes.rewrite import rewrite
from torch_gru_fuse.switch import keep_dynamo_hook

I, H = 16, 8


class Before(nn.Module):
    """Embedding, LayerNorm, Linear and what is done element by element."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm, self.linear = nn.Embedding(10, I), nn.LayerNorm(I), nn.Linear(I, I)

    def forward(self, tokens):
        return nn.functional.gelu(self.linear(self.norm(self.embedding(tokens)))) * 2


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.before, self.rnn = Before(), nn.GRU(I, H)

    def forward(self, tokens, state):
        return self.rnn(self.before(tokens), state)[0]


def kernels(function, *args):
    """Names of the kernels that Inductor generated for a call, by graph: the forward, and the backward if there is one."""
    torch._dynamo.reset()
    with torch_gru_fuse.enable():
        result, codes = run_and_get_code(torch.compile(function, fullgraph=True), *args)
    return result, [re.findall(r"^(cpp_fused\w*) = async_compile", code, re.MULTILINE) for code in codes]


@pytest.fixture
def problem():
    return Model(), torch.randint(10, (5, 3)), torch.zeros(1, 3, H)


def test_as_many_kernels_as_without_the_gru(problem):
    model, tokens, state = problem
    with torch.no_grad():
        result, [ours] = kernels(model, tokens, state)
        _, [alone] = kernels(model.before, tokens)
        assert_same([result], [model(tokens, state)], 1e-5)
    assert len(ours) == len(alone) == 2  # what lies before the product of the Linear, and what follows it
    assert "embedding" in ours[0] and "layer_norm" in ours[0] and "gelu" in ours[1]


def test_so_it_is_in_training(problem):
    model, tokens, state = problem

    def codes(module, *args):
        loss = lambda *a: module(*a).square().sum()  # noqa: E731
        compiled = torch.compile(loss, fullgraph=True)
        with torch_gru_fuse.enable():
            _, found = run_and_get_code(lambda: compiled(*args).backward())
        return [len(re.findall(r"^cpp_fused\w* = async_compile", code, re.MULTILINE)) for code in found]

    torch._dynamo.reset()
    forward, backward = codes(model, tokens, state)
    torch._dynamo.reset()
    forward_alone, backward_alone = codes(model.before, tokens)
    # the loss is a kernel behind the GRU; without the GRU it is part of the one that makes what it is of
    assert forward <= forward_alone + 1 and backward <= backward_alone + 1


def test_the_pass_leaves_the_nodes_around_the_gru_alone(problem):
    model, tokens, state = problem
    seen = []

    def backend(gm, inputs):
        before = [(n.name, n.target) for n in gm.graph.nodes if n.target is not torch.gru and n.op == "call_function"]
        rewrite(gm)
        gru = torch.ops.torch_gru_fuse.gru.default
        after = [(n.name, n.target) for n in gm.graph.nodes if n.target is not gru and n.op == "call_function"]
        seen.append((before, after))
        return gm.forward

    backend.rewrites_gru = True
    keep_dynamo_hook()
    torch.compile(model, backend=backend, fullgraph=True)(tokens, state)
    [(before, after)] = seen
    assert before == after and len(before) > 4


def test_flips_of_a_pair_are_in_no_kernel(monkeypatch):
    monkeypatch.setattr(pairs, "GUARDS", tuple(g for g in pairs.GUARDS if g is not pairs.profitable))
    before, ahead, back = Before(), nn.GRU(I, H), nn.GRU(I, H)

    def model(tokens, state):
        x = before(tokens)
        return torch.cat((ahead(x, state)[0], back(x.flip(0), state)[0].flip(0)), -1)

    args = torch.randint(10, (5, 3)), torch.zeros(1, 3, H)
    with torch.no_grad():
        result, [found] = kernels(model, *args)
        assert_same([result], [model(*args)], 1e-5)
    assert not [name for name in found if "flip" in name]
    assert sum("layer_norm" in name for name in found) == sum("gelu" in name for name in found) == 1
