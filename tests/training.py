"""Training loops: what people do around forward and backward.  Each is run eagerly and compiled, and has to end alike.

A loop is a function `(model, batches, way) -> losses`.  It changes the model's parameters; what it is run on, in which
precision, and whether `way.compiled` compiles or not, is none of its business.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from torch_gru_fuse.ops import ready_calls, torch_path

STEPS = 4
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Way:
    """How a loop is run.

    autocast: the dtype of torch.autocast, if any.
    compile_options: of torch.compile; None: eagerly.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float64
    autocast: torch.dtype | None = None
    compile_options: dict[str, Any] | None = None

    def compiled(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        if self.compile_options is None:
            return function
        return torch.compile(function, **{"fullgraph": True, **self.compile_options, **options})

    def amp(self) -> contextlib.AbstractContextManager[None]:
        return torch.autocast(self.device, dtype=self.autocast, enabled=self.autocast is not None)


@dataclass(frozen=True)
class Sizes:
    T: int = 5
    B: int = 6
    I: int = 4
    H: int = 6
    O: int = 3


class Tagger(nn.Module):
    """x [T, B, I] -> scores [T, B, O]: Linear, GRU of two layers, Linear."""

    def __init__(self, sizes: Sizes, **options: Any):
        super().__init__()
        self.embed = nn.Linear(sizes.I, sizes.H)
        self.rnn = nn.GRU(sizes.H, sizes.H, 2, **options)
        self.out = nn.Linear(sizes.H * (2 if self.rnn.bidirectional else 1), sizes.O)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(torch.relu(self.embed(x)))[0])


def error(scores: Tensor, target: Tensor) -> Tensor:
    return (scores.to(target.dtype) - target).square().sum(-1).mean()


Loop = Callable[[nn.Module, list[Batch], Way], list[Tensor]]


class Entry(NamedTuple):
    """forwards, backwards: calls of the sequence op for each loss that the loop returns.

    exact: the loop makes much of small differences, and is of no use in less than float64.
    """

    loop: Loop
    forwards: int = 1
    backwards: int = 1
    exact: bool = False

    def check_calls(self, trained: Trained) -> None:
        """That every forward and backward was one of this package's ops, neither more nor fewer."""
        steps = len(trained.losses)
        assert trained.calls == {"gru_forward": self.forwards * steps, "gru_backward": self.backwards * steps}, trained.calls


LOOPS: dict[str, Entry] = {}


def loop(**options: Any) -> Callable[[Loop], Loop]:
    def register(function: Loop) -> Loop:
        LOOPS[function.__name__.replace("_", " ")] = Entry(function, **options)
        return function

    return register


# ---- optimizers ---------------------------------------------------------------------------------------------------------

# eps as large as a gradient: with the usual one Adam's first steps have the size lr wherever a gradient is, so that rounding
# decides the direction of those that are nearly zero.
ADAM = {"lr": 0.02, "eps": 1e-2}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=False),
    "Adam foreach": functools.partial(torch.optim.Adam, **ADAM, foreach=True),
    "AdamW fused": functools.partial(torch.optim.AdamW, **ADAM, weight_decay=0.1, fused=True),
}


def step(forward, optimizer, batch, way):
    x, y = batch
    optimizer.zero_grad()
    with way.amp():
        loss = error(forward(x), y)
    loss.backward()
    optimizer.step()
    return loss.detach()


def plain(model, batches, way, make=OPTIMIZERS["SGD"]):
    forward, optimizer = way.compiled(model), make(model.parameters())
    return [step(forward, optimizer, batch, way) for batch in batches]


LOOPS |= {name: Entry(functools.partial(plain, make=make)) for name, make in OPTIMIZERS.items()}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


@loop(forwards=3, backwards=3, exact=True)
def lbfgs(model, batches, way):
    """The optimizer calls the model, several times a step."""
    forward, losses = way.compiled(model), []
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3, tolerance_grad=0, tolerance_change=0)
    for x, y in batches:

        def closure(x=x, y=y):
            optimizer.zero_grad()
            with way.amp():
                loss = error(forward(x), y)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).detach())
    return losses


@loop()
def optimizer_inside_the_backward(model, batches, way):
    """A parameter is stepped as soon as its gradient is there, and the gradient dropped."""
    forward, losses = way.compiled(model), []
    optimizers = {p: torch.optim.SGD([p], lr=0.1, momentum=0.9, foreach=False) for p in model.parameters()}

    def step(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    handles = [p.register_post_accumulate_grad_hook(step) for p in model.parameters()]
    for x, y in batches:
        with way.amp():
            loss = error(forward(x), y)
        loss.backward()
        losses.append(loss.detach())
    for handle in handles:
        handle.remove()
    return losses


# ---- gradients ----------------------------------------------------------------------------------------------------------


@loop(forwards=3, backwards=3)
def gradient_accumulation(model, batches, way):
    forward, optimizer, losses = way.compiled(model), sgd(model), []
    for i in range(len(batches)):
        optimizer.zero_grad(set_to_none=i % 2 == 0)  # into new tensors, and into those of the step before
        total = 0
        for j in range(3):
            x, y = batches[(i + j) % len(batches)]
            with way.amp():
                loss = error(forward(x), y) / 3
            loss.backward()
            total += loss.detach()
        optimizer.step()
        losses.append(total)
    return losses


@loop()
def gradient_clipping(model, batches, way):
    forward, optimizer, losses = way.compiled(model), sgd(model), []
    for i, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        with way.amp():
            loss = error(forward(x), y)
        loss.backward()
        if i % 2:
            nn.utils.clip_grad_value_(model.parameters(), 0.02)
        else:
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1, error_if_nonfinite=True)
            assert norm > 0.1  # or nothing would be clipped
        optimizer.step()
        losses.append(loss.detach())
    return losses


@loop(backwards=2)
def two_losses_of_one_forward(model, batches, way):
    """The second backward finds what the forward saved as the first did."""
    forward, optimizer, losses = way.compiled(model), sgd(model), []
    # torch.compile asks for the first where a graph is retained.  The second because the key of a cached graph does not know of
    # the first: one of another loop would write over what the second backward needs (torch 2.11 to 2.13).
    with torch._functorch.config.patch(donated_buffer=False), torch._inductor.config.patch(fx_graph_cache=False):
        for x, y in batches:
            optimizer.zero_grad()
            with way.amp():
                scores = forward(x)
            first, second = error(scores[::2], y[::2]), error(scores[1::2], y[1::2])
            first.backward(retain_graph=True)
            second.backward()
            optimizer.step()
            losses.append((first + second).detach())
    return losses


@loop()
def grad_scaler(model, batches, way):
    """With one batch whose gradients are infinite: its step is skipped, and the scale halved."""
    forward, optimizer, losses = way.compiled(model), sgd(model), []
    scaler = torch.amp.GradScaler(way.device, init_scale=256.0, growth_interval=2)
    scales = []
    for i, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        with way.amp():
            loss = error(forward(x), y)
        scaler.scale(loss * float("inf") if i == 1 else loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        losses.append(loss.detach())
    assert scales == [256.0, 128.0, 128.0, 256.0], scales
    return losses


@loop()
def state_carried_from_batch_to_batch(model, batches, way):
    """Truncated backpropagation through time."""

    class Stateful(nn.Module):
        def forward(self, x, h):
            states, h = model.rnn(torch.relu(model.embed(x)), h)
            return model.out(states), h

    forward, optimizer, losses, h = way.compiled(Stateful()), sgd(model), [], None
    for x, y in batches:
        optimizer.zero_grad()
        with way.amp():
            if h is None:
                h = model.embed(x).new_zeros(2, x.shape[1], model.rnn.hidden_size)
            scores, h = forward(x, h.detach())
            loss = error(scores, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


# ---- the whole step in torch.compile ------------------------------------------------------------------------------------


def _whole_step(model, batches, way):
    # The learning rate is a tensor, as PyTorch's recipe has it: as a number it would be part of the compiled code.
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1, dtype=way.dtype), foreach=True)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=STEPS)

    def step(x, y):
        with way.amp():
            loss = error(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    step, losses = way.compiled(step, fullgraph=False), []
    for x, y in batches:
        losses.append(step(x, y))
        scheduler.step()
    return losses


@loop()
def whole_step(model, batches, way):
    """Forward and optimizer compiled, a graph break at `backward` between them."""
    return _whole_step(model, batches, way)


@loop()
def whole_step_with_compiled_autograd(model, batches, way):
    with torch._dynamo.config.patch(compiled_autograd=way.compile_options is not None):
        return _whole_step(model, batches, way)


@loop()
def whole_step_in_one_graph(model, batches, way):
    """Parameters in, loss and parameters out, by torch.func.

    The sequence is `torch.gru`: `nn.GRU` keeps the weights of its last call, and inside of `torch.func.grad` these are none
    that may leave the graph.
    """
    names = [f"rnn.{name}" for name in model.rnn._flat_weights_names]

    def loss_of(p, x, y):
        with way.amp():
            hidden = torch.relu(nn.functional.linear(x, p["embed.weight"], p["embed.bias"]))
            h0 = hidden.new_zeros(2, hidden.shape[1], hidden.shape[2])
            states, _ = torch.gru(hidden, h0, [p[name] for name in names], True, 2, 0.0, True, False, False)
            return error(nn.functional.linear(states, p["out.weight"], p["out.bias"]), y)

    def step(parameters, x, y):
        gradients, loss = torch.func.grad_and_value(loss_of)(parameters, x, y)
        return loss, {name: p - 0.1 * gradients[name] for name, p in parameters.items()}

    step, losses = way.compiled(step), []
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    for x, y in batches:
        loss, parameters = step(parameters, x, y)
        losses.append(loss)
    model.load_state_dict(parameters)
    return losses


# ---- activation checkpointing -------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """The middle of the model is computed again in the backward."""

    def __init__(self, model: nn.Module, **options: Any):
        super().__init__()
        self.model, self.options = model, options

    def forward(self, x: Tensor) -> Tensor:
        model = self.model
        hidden = torch.relu(model.embed(x))
        return model.out(checkpoint(lambda h: torch.tanh(model.rnn(h)[0]), hidden, use_reentrant=False, **self.options))


@loop(forwards=2)
def checkpoint_inside(model, batches, way):
    return plain(Checkpointed(model), batches, way)


@loop(forwards=2)
def checkpoint_around(model, batches, way):
    """The model is compiled, what calls it is not."""
    forward, optimizer = way.compiled(model), sgd(model)
    return [step(lambda x: checkpoint(forward, x, use_reentrant=False), optimizer, batch, way) for batch in batches]


@loop()
def checkpoint_that_saves_the_sequence(model, batches, way):
    """All but the GRU is computed again: a policy names the op that is to be kept."""
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    kept = [torch.ops.torch_gru_fuse.gru_forward.default]
    contexts = functools.partial(create_selective_checkpoint_contexts, kept)
    return plain(Checkpointed(model, context_fn=contexts), batches, way)


# ---- weights that change between the steps ------------------------------------------------------------------------------


def _swapping(model, batches, way, swap: Callable[[int, nn.Module], None]):
    """`swap(i, model)` after step i; a model that goes on with the weights of before shows in the next loss."""
    forward, optimizer, losses = way.compiled(model), sgd(model), []
    for i, batch in enumerate(batches):
        losses.append(step(forward, optimizer, batch, way))
        swap(i, model)
    return losses


@loop()
def weights_get_new_storage(model, batches, way):
    def swap(i, model):
        for p in model.parameters():
            p.data = p.data.flip(0)

    return _swapping(model, batches, way, swap)


@loop()
def weights_are_written_in_place(model, batches, way):
    @torch.no_grad()
    def swap(i, model):
        for p in model.parameters():
            p.copy_(p.flip(0))
            p.data.mul_(-1)  # unseen by autograd's version counter

    return _swapping(model, batches, way, swap)


@loop()
def state_is_loaded(model, batches, way):
    states = [copy.deepcopy(model.state_dict())]

    def swap(i, model):
        states.append(copy.deepcopy(model.state_dict()))
        model.load_state_dict(states[i])  # back by a step

    return _swapping(model, batches, way, swap)


@loop()
def parameters_are_other_objects(model, batches, way):
    """`load_state_dict(assign=True)`, which needs a new optimizer, too."""
    forward, losses = way.compiled(model), []
    for batch in batches:
        losses.append(step(forward, sgd(model), batch, way))
        model.load_state_dict({name: p.flip(0) for name, p in model.state_dict().items()}, assign=True)
    return losses


@loop(forwards=2)
def average_swapped_in_for_evaluation(model, batches, way):
    """The averaged weights trade places with the trained ones, the model is evaluated, and they trade back."""
    forward, optimizer, losses = way.compiled(model), sgd(model), []
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))

    def trade():
        for p, q in zip(model.parameters(), average.parameters(), strict=True):
            p.data, q.data = q.data, p.data

    for x, y in batches:
        step(forward, optimizer, (x, y), way)
        average.update_parameters(model)
        trade()
        model.eval()
        with torch.no_grad(), way.amp():
            losses.append(error(forward(x), y))
        model.train()
        trade()
    return losses


def _freezing(model, batches, way, frozen: list[tuple[str, ...]]):
    """Weights whose names begin like one of frozen[i] are not trained in step i."""
    forward, optimizer, losses = way.compiled(model), sgd(model), []
    for prefixes, batch in zip(frozen, batches, strict=True):
        for name, p in model.named_parameters():
            p.requires_grad_(not name.startswith(prefixes))
        before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
        losses.append(step(forward, optimizer, batch, way))
        for name, value in before.items():
            assert torch.equal(model.get_parameter(name), value), f"{name} was frozen and has changed"
    return losses


@loop()
def weights_are_frozen(model, batches, way):
    return _freezing(model, batches, way, [(), ("rnn.weight_hh_l0", "rnn.bias_ih_l1"), ("rnn.",), ()])


@loop()
def frozen_weights_are_freed(model, batches, way):
    if torch.__version__ < "2.13":
        pytest.skip("torch.compile does not notice it, whatever the model")
    return _freezing(model, batches, way, [("rnn.weight_hh_l0", "embed."), ("rnn.weight_ih_l0", "rnn.bias_ih"), ("rnn.",), ()])


@loop()
def weight_norm_of_recurrent_weights(model, batches, way):
    parametrizations.weight_norm(model.rnn, "weight_hh_l0")
    parametrizations.weight_norm(model.rnn, "weight_ih_l1")
    return plain(model, batches, way)


@loop()
def layers_that_share_weights(model, batches, way):
    model.rnn.weight_hh_l1 = model.rnn.weight_hh_l0
    return plain(model, batches, way)


# ---- running and comparing ----------------------------------------------------------------------------------------------


@dataclass
class Trained:
    losses: Tensor  # [steps]
    changes: Tensor  # what training did to all parameters, one after the other
    calls: dict[str, int] = field(default_factory=dict)  # of this package's ops


def problem(sizes: Sizes, **options: Any) -> tuple[nn.Module, list[Batch]]:
    """A model and batches in float32, the same for every precision."""
    torch.manual_seed(0)
    model = Tagger(sizes, **options)
    batches = [(torch.randn(sizes.T, sizes.B, sizes.I), torch.randn(sizes.T, sizes.B, sizes.O)) for _ in range(STEPS)]
    return model, batches


def train(loop: Loop, model: nn.Module, batches: list[Batch], way: Way) -> Trained:
    """Run a loop on a copy of the model."""
    model = copy.deepcopy(model).to(way.device, way.dtype)
    batches = [(x.to(way.device, way.dtype), y.to(way.device, way.dtype)) for x, y in batches]
    before = _flat(model)
    with calls_of_ops(way.device) as calls:
        losses = loop(model, batches, way)
    return Trained(torch.stack(losses).double().cpu(), _flat(model) - before, calls)


def _flat(model: Tagger) -> Tensor:
    """All weights one after the other; of a parametrised one its value, of one that is shared every use of it."""
    weights = [model.embed.weight, model.embed.bias, model.out.weight, model.out.bias]
    weights += [getattr(model.rnn, name) for name in model.rnn._flat_weights_names]
    return torch.cat([w.detach().double().cpu().flatten() for w in weights])


def distance(trained: Trained, reference: Trained) -> float:
    """How far two trainings are apart, as a fraction of how far they went: the greater one of weights and of losses."""
    weights = (trained.changes - reference.changes).norm() / reference.changes.norm()
    losses = (trained.losses - reference.losses).norm() / reference.losses.norm()
    return torch.maximum(weights, losses).item()  # nan if one of them is


def check_precision(compiled: Trained, eager: Trained, exact: Trained, roundoff: float) -> None:
    """Compiled is as near to float64 as eager is.

    Both round in several hundred places, not the same ones, and each is a sample of what that may come to: hence the factor,
    and one rounding as the least that is asked for.
    """
    limit = max(3 * distance(eager, exact), roundoff)
    actual = distance(compiled, exact)
    assert actual <= limit, f"{actual:.1e} from float64; eagerly {distance(eager, exact):.1e}, expected at most {limit:.1e}"


@contextlib.contextmanager
def calls_of_ops(device: str) -> Iterator[dict[str, int]]:
    """Counts the calls of the ops that reach their implementation for a device, on CUDA also those that are ready."""
    if device == "cpu":
        module = torch_path
    else:
        from torch_gru_fuse.ops import kernel_path as module
    counts: dict[str, int] = {}
    in_ready_call = False

    def counting(name: str) -> Callable[..., Any]:
        run = getattr(module, name)

        def call(*args):
            if not in_ready_call:
                counts[name] = counts.get(name, 0) + 1
            return run(*args)

        return call

    def ready(*args):
        nonlocal in_ready_call
        in_ready_call = True  # the first of its kind may take the ordinary way, too
        try:
            results = ready_results(*args)
        finally:
            in_ready_call = False
        if results is not None:
            counts["gru_forward"] = counts.get("gru_forward", 0) + 1
        return results

    ready_results = ready_calls.results
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ready_calls, "results", ready)
        for name in ("gru_forward", "gru_backward"):
            patch.setattr(module, name, counting(name))
        yield counts


def check_recomputed_dropout(way: Way, sizes: Sizes) -> None:
    """With dropout inside of a checkpoint: the gradient is that of the loss, which it is only with the same masks.

    In float64, along one direction d: loss(w + e d) - loss(w - e d) = 2 e (gradient, d) + O(e^3), all with one seed.
    """
    model, (batch, *_) = problem(sizes, dropout=0.5)
    model = model.to(way.device, torch.float64)
    x, y = (t.to(way.device, torch.float64) for t in batch)
    forward = way.compiled(Checkpointed(model))

    def loss():
        torch.manual_seed(1)
        return error(forward(x), y)

    gradients = torch.autograd.grad(loss(), [*model.parameters()])
    directions = [torch.randn_like(p) / sum(map(torch.numel, gradients)) ** 0.5 for p in model.parameters()]  # of length 1
    expected = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    e, ends = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            torch._foreach_add_([*model.parameters()], directions, alpha=sign * e)
        ends.append(loss().detach())
        with torch.no_grad():
            torch._foreach_add_([*model.parameters()], directions, alpha=-sign * e)
    torch.testing.assert_close((ends[0] - ends[1]) / (2 * e), expected, rtol=1e-6, atol=1e-8)
    torch.manual_seed(2)
    assert abs(error(forward(x), y) - ends[0]) > 1e-3  # another seed, other masks
