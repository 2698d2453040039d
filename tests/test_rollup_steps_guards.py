"""Calls of nn.GRU, for a step or a chunk each, that are left as they are, and the reason that is given."""

import copy

import pytest
import torch
from problems import assert_same, tensors
from rollup import check, compiled_graph, x_of
from test_rollup_steps import B, I, Model, T, batch_first, chunks, detached_chunks, last_alone, last_chunk_alone
from torch import nn


def feeds_itself(m, x):
    step, h, outputs = x[:, :1], None, []
    for _ in range(x.shape[1]):
        output, h = m.gru(step, h)
        step = m.out(output)
        outputs.append(step)
    return torch.cat(outputs, 1)


def changes_the_state(m, x):
    h, outputs = None, []
    for t in range(x.shape[1]):
        output, h = m.gru(x[:, t : t + 1], h)
        h = h * 0.5
        outputs.append(output)
    return torch.cat(outputs, 1)


def detaches(m, x):
    h, outputs = None, []
    for t in range(x.shape[1]):
        output, h = m.gru(x[:, t : t + 1], h)
        h = h.detach()
        outputs.append(output)
    return torch.cat(outputs, 1)


def changes_the_state_in_place(m, x):
    h, outputs = None, []
    for t in range(x.shape[1]):
        output, h = m.gru(x[:, t : t + 1], h)
        h.mul_(0.5)
        outputs.append(output)
    return torch.cat(outputs, 1)


def changes_the_output_in_place(m, x):
    h, outputs = None, []
    for t in range(x.shape[1]):
        output, h = m.gru(x[:, t : t + 1], h)
        outputs.append(output.mul_(2))
    return torch.cat(outputs, 1)


def writes_its_input(m, x):
    x, h = x.clone(), None
    for t in range(x.shape[1] - 1):
        output, h = m.gru(x[:, t : t + 1], h)
        x[:, t + 1 : t + 2] = m.out(output)
    return h


def writes_a_weight(m, x):
    h = None
    for t in range(x.shape[1]):
        _, h = m.gru(x[:, t : t + 1], h)
        m.gru.weight_hh_l0.mul_(0.5)
    return h


def other_weights(m, x):
    h = None
    for t, gru in enumerate((m.gru, m.other) * 2):
        _, h = gru(x[:, t : t + 1], h)
    return h


def a_chunk_feeds_the_next(m, x):
    chunk, h, outputs = x[:, :2], None, []
    for _ in range(3):
        output, h = m.gru(chunk, h)
        chunk = m.out(output)
        outputs.append(chunk)
    return torch.cat(outputs, 1)


def changes_a_chunk_in_place(m, x):
    h, outputs = None, []
    for chunk in x.split(2, 1):
        output, h = m.gru(chunk, h)
        outputs.append(output.mul_(2))
    return torch.cat(outputs, 1)


def begins_without_gradients(m, x):
    with torch.no_grad():
        _, h = m.gru(x[:, :2])
    return m.gru(x[:, 2:], h)


def keeps_all_states_of_chunks(m, x):
    h, states = None, []
    for chunk in x.split(2, 1):
        _, h = m.gru(chunk, h)
        states.append(h)
    return torch.stack(states)


def other_weights_for_each_chunk(m, x):
    h = None
    for chunk, gru in zip(x.split(2, 1), (m.gru, m.other), strict=True):
        _, h = gru(chunk, h)
    return h


def other_modes(m, x):
    h = None
    for t in range(x.shape[1]):
        with torch.set_grad_enabled(t % 2 == 1):
            _, h = m.gru(x[:, t : t + 1], h)
    return h


def random_inputs_and_outputs(m, x):
    h, outputs = None, []
    for t in range(x.shape[1]):
        output, h = m.gru(torch.dropout(x[:, t : t + 1], 0.5, True), h)
        outputs.append(torch.dropout(output, 0.5, True))
    return torch.cat(outputs, 1)


def keeps_all_states(m, x):
    h, states = None, []
    for t in range(x.shape[1]):
        _, h = m.gru(x[:, t : t + 1], h)
        states.append(h)
    return torch.stack(states)


STAY = {
    "autoregressive": (feeds_itself, {}, "its input at a step depends on the hidden state of the step before"),
    "bidirectional": (last_alone, {"bidirectional": True}, "it is bidirectional"),
    "dropout": (batch_first, {"layers": 2, "dropout": 0.5}, "it draws a dropout mask for each call"),
    "other weights": (other_weights, {}, "the weights differ from those of the step before"),
    "h is changed": (changes_the_state, {}, "the hidden state is changed between two steps (by mul)"),
    "h is detached": (detaches, {}, "the hidden state is changed between two steps (by detach)"),
    "h is changed in place": (changes_the_state_in_place, {}, "what it returns is changed in place"),
    "output is changed in place": (changes_the_output_in_place, {}, "what it returns is changed in place"),
    "x is written in between": (writes_its_input, {}, "memory that it reads is changed in place between the steps"),
    "a weight is written in between": (writes_a_weight, {}, "memory that it reads is changed in place between the steps"),
    "gradients switched in between": (other_modes, {}, "an operation of unknown effect"),
    "random numbers in another order": (random_inputs_and_outputs, {}, "random numbers are drawn"),
    "states of lower layers": (keeps_all_states, {"layers": 2}, "the hidden states of its lower layers are used"),
    "chunks, autoregressive": (a_chunk_feeds_the_next, {}, "its input at a step depends on the hidden state"),
    "chunks, bidirectional": (last_chunk_alone, {"bidirectional": True}, "it is bidirectional"),
    "chunks, dropout": (chunks, {"layers": 2, "dropout": 0.5}, "it draws a dropout mask for each call"),
    "chunks, other weights": (other_weights_for_each_chunk, {}, "the weights differ from those of the step before"),
    "chunks, h is detached": (detached_chunks, {}, "the hidden state is changed between two steps (by detach)"),
    "chunks, the first without gradients": (begins_without_gradients, {}, "an operation of unknown effect"),
    "chunks, output is changed in place": (changes_a_chunk_in_place, {}, "what it returns is changed in place"),
    "chunks, states of lower layers": (keeps_all_states_of_chunks, {"layers": 2}, "the hidden states of its lower layers"),
}


def calls_of(model, x):
    """How often eager PyTorch calls an nn.GRU."""
    model, calls = copy.deepcopy(model), []
    for module in model.modules():
        if isinstance(module, nn.GRU):
            module.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(x)
    return len(calls)


@pytest.mark.parametrize("guard", STAY)
def test_stays(guard):
    loop, options, reason = STAY[guard]
    model, x = Model(loop, **options).double(), x_of(B, T, I)
    calls = calls_of(model, x)
    if "dropout" in guard or "random" in guard:
        compiled, graph = compiled_graph(model, x)
        if "dropout" not in guard:  # the masks between layers are drawn by other numbers than eager code's
            torch.manual_seed(1)
            actual = tensors(compiled(x))
            torch.manual_seed(1)
            assert_same(actual, tensors(model(x)), 1e-12)
    elif "written" in guard or "in place" in guard:
        with torch.no_grad():  # torch itself has no gradient for some of them
            before = {name: p.clone() for name, p in model.named_parameters()}
            expected = [t.clone() for t in tensors(model(x))]
            model.load_state_dict(before)
            compiled, graph = compiled_graph(model, x)
            model.load_state_dict(before)
            assert_same(tensors(compiled(x)), expected, 1e-12)
    else:
        graph = check(model, x, gru=calls)
    assert graph.gru == calls
    loops = [r for r in graph.records if r.found.startswith("loop of")]
    assert loops and not any(r.rewritten for r in loops)
    assert any(reason in r.reason for r in loops), graph.reasons
    assert all((" chunks over" in r.found) == guard.startswith("chunks") for r in loops)


def test_a_number_of_time_steps_that_is_no_constant():
    def two(m, x):
        first, h = m.gru(x[:, :2])
        second, h = m.gru(x[:, 2:], h)
        return torch.cat((first, second), 1), h

    x = x_of(B, T, I)
    torch._dynamo.mark_dynamic(x, 1)
    graph = check(Model(two), x, gru=2)
    assert any("the number of time steps of a call is no constant of the graph" in r for r in graph.reasons)


def test_part_of_a_loop_is_rolled_up():
    def loop(m, x):
        _, h = batch_first(m, x)  # the known beginning of a sequence
        step = x[:, -1:]
        for _ in range(2):  # then what the model says
            output, h = m.gru(step, h)
            step = m.out(output)
        return step

    graph = check(Model(loop), x_of(B, T, I), gru=2)
    assert any("depends on the hidden state" in r for r in graph.reasons)
