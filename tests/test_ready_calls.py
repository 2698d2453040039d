"""Calls like an earlier one go straight to their launches: which do, which do not, and that both give the same.

CPU tensors play CUDA's, and there are stand-ins for both ways; `test_ready_launches.py` has what the launches do.
"""

import ctypes
import logging
import math

import pytest
import torch
from problems import assert_same, count_calls, gru_args, ops
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from torch_gru_fuse import torch_hooks
from torch_gru_fuse.ops import (
    dispatch,
    ready_calls,
    ready_launches,
    timeouts,
    torch_path,
)  # fmt: skip
from torch_gru_fuse.ops.call import GRUCall

pytestmark = pytest.mark.versions

# ---- which calls are ready ----------------------------------------------------------------------------------------------


class Ways:
    """What calls did: "looked at", when a ready call was made of one, then "ready" or "ordinary"."""

    def __init__(self):
        self.taken = []

    def of(self, function):
        """What the calls in `function` did, and what it returned."""
        del self.taken[:]
        return self.taken, function()


@pytest.fixture
def ways(monkeypatch):
    ways = Ways()

    def ready_of(call, *, batch_first, save):
        ways.taken.append("looked at")

        def run(x, hx, params):
            ways.taken.append("ready")
            results = torch.gru(x, hx, params, call.has_biases, call.L, 0.0, False, call.bidirectional, batch_first)
            return (*results, x.new_empty(7)) if save else results

        return run

    ways.forward = torch_path.gru_forward

    def ordinary(call, save):
        ways.taken.append("ordinary")
        return ways.forward(call, save)

    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(ready_launches, "of", ready_of)
    monkeypatch.setattr(torch_path, "gru_forward", ordinary)
    monkeypatch.setitem(dispatch._on_cuda, "gru_forward", lambda *args, **_: ordinary(GRUCall(*args[:7], *args[8:]), args[7]))
    ready_calls.forget()
    with torch.no_grad():
        yield ways
    ready_calls.forget()


FIRST, AGAIN, ORDINARY = ["looked at", "ready"], ["ready"], ["ordinary"]


def check(ways, args, expected_way):
    """A call takes the way, and gives what `torch.gru` does."""
    way, results = ways.of(lambda: ops.gru(*args))
    assert way == expected_way
    assert_same(results, torch.gru(*args), 1e-6)


def test_resets_take_the_ordinary_way(ways):
    args = gru_args(requires_grad=False)
    resets = torch.zeros(5, 3, dtype=torch.bool)
    for _ in range(2):
        way, results = ways.of(lambda: ops.gru(*args, resets=resets))
        assert way == ORDINARY
        assert_same(results, torch.gru(*args), 1e-6)


def test_a_second_call_is_ready(ways, monkeypatch):
    checks = []
    original = ready_calls.check_gru
    monkeypatch.setattr(ready_calls, "check_gru", lambda *args: checks.append(args) or original(*args))
    args = gru_args()
    check(ways, args, FIRST)
    others = gru_args()
    for _ in range(3):
        check(ways, others, AGAIN)
    assert len(checks) == 1


def test_results_are_new_tensors(ways):
    args = gru_args()
    results = [t for _ in range(3) for t in ops.gru(*args)]
    assert len({t.untyped_storage().data_ptr() for t in (*results, args[0], args[1])}) == 8


@pytest.mark.parametrize(
    "change",
    [
        {"T": 6}, {"B": 4}, {"I": 5}, {"H": 7}, {"L": 1}, {"bias": False}, {"bidirectional": True}, {"dtype": torch.float64},
        {"batch_first": True}, {"T": 1},
    ],
    ids=str,
)
def test_other_sizes_and_flags_are_looked_at(ways, change):
    args, others = gru_args(), gru_args(**change)
    check(ways, args, FIRST)
    check(ways, others, FIRST)
    for known in (args, others):
        check(ways, known, AGAIN)


def strided(tensor):
    """The same values, other strides."""
    return tensor.repeat_interleave(2, -1)[..., ::2]


def test_other_strides_are_looked_at(ways):
    x, hx, params, *flags = args = gru_args()
    check(ways, args, FIRST)
    others = (strided(x), hx, params, *flags)
    check(ways, others, FIRST)
    for known in (args, others):
        check(ways, known, AGAIN)
    # these would have to be copied
    check(ways, (x, strided(hx), params, *flags), ORDINARY)
    check(ways, (x, hx, [*params[:-1], strided(params[-1])], *flags), ORDINARY)
    check(ways, (x, hx, [params[0].t().contiguous().t(), *params[1:]], *flags), ORDINARY)
    step = gru_args(T=1)
    check(ways, (strided(step[0]), *step[1:]), ORDINARY)


def test_parameters_are_not_kept(ways):
    x, hx, params, *flags = args = gru_args(requires_grad=False)
    check(ways, args, FIRST)
    for p in params:
        p.mul_(0.5)
    check(ways, args, AGAIN)
    params[1].data = torch.randn_like(params[1])
    check(ways, args, AGAIN)
    params[2] = torch.randn_like(params[2])
    check(ways, args, AGAIN)
    check(ways, (x, hx, [p.clone() for p in params], *flags), AGAIN)
    check(ways, (x, hx, [torch.nn.Parameter(p) for p in params], *flags), FIRST)
    params[1].data = params[1].data.t().contiguous().t()
    check(ways, args, ORDINARY)
    with torch.inference_mode():
        params[1].data = params[1].data.contiguous()


@pytest.mark.parametrize("name", ["TORCH_GRU_FUSE_KERNELS", "TORCH_GRU_FUSE_GPU", "TORCH_GRU_FUSE_TIMEOUT_S"])
def test_variables_may_change(ways, monkeypatch, name):
    args = gru_args()
    for value in ("one", "other"):
        monkeypatch.setenv(name, value)
        check(ways, args, FIRST)
    monkeypatch.delenv(name)
    check(ways, args, FIRST)
    for value in ("one", "other"):
        monkeypatch.setenv(name, value)
        check(ways, args, AGAIN)


def test_flags_may_change(ways, monkeypatch):
    args = gru_args()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        check(ways, args, FIRST)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        check(ways, args, FIRST)
    with torch.backends.cudnn.flags(enabled=False, allow_tf32=True):
        check(ways, args, FIRST)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        check(ways, args, AGAIN)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        check(ways, args, FIRST)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        check(ways, args, AGAIN)


def test_plans_that_are_not_ready_are_looked_at_once(ways, monkeypatch):
    looked = []
    monkeypatch.setattr(ready_launches, "of", lambda call, **_: looked.append(call) and None)
    for _ in range(3):
        check(ways, gru_args(), ORDINARY)
    assert len(looked) == 1
    for other in ({"T": 6}, {"H": 7}, {"dtype": torch.float64}, {"dtype": torch.bfloat16}):  # may have another plan
        del looked[:]
        check(ways, gru_args(**other), ORDINARY)
        assert len(looked) == 1
    ready_calls.forget()
    check(ways, gru_args(), ORDINARY)
    assert len(looked) == 2


def test_a_ready_call_may_fail(ways, monkeypatch):
    """Then the ordinary way is taken, and finds out why."""
    monkeypatch.setattr(ready_launches, "of", lambda call, **_: lambda *tensors: None)
    for _ in range(2):
        check(ways, gru_args(), ORDINARY)


def test_no_more_than_a_few_are_kept(ways, monkeypatch):
    monkeypatch.setattr(ready_calls, "_MOST_KEYS", 3)
    for T in range(2, 12):
        check(ways, gru_args(T=T), FIRST)
        assert len(ready_calls._ready) <= 3
    x, hx, params, *flags = gru_args()
    for i in range(2, 12):
        check(ways, (x.repeat_interleave(i, -1)[..., ::i], hx, params, *flags), FIRST)
    assert all(len(kinds) <= ready_calls._MOST_KINDS for kinds in ready_calls._ready.values())


# ---- which are not ------------------------------------------------------------------------------------------------------


def test_cpu_tensors_take_the_ordinary_way(ways, monkeypatch):
    monkeypatch.delattr(torch.Tensor, "is_cuda")
    for _ in range(2):
        check(ways, gru_args(), ORDINARY)


@pytest.fixture
def training_ways(ways, monkeypatch):
    """Calls with gradients, too, whose backward says which way it took."""

    def forward(call):
        def run(x, hx, params):
            ways.taken.append("ready")
            return ways.forward(call._replace(input=x, hx=hx, params=params), True)

        return run

    def backward(way):
        def run(*args):
            ways.taken.append(way)
            return torch_path.gru_backward(*args)

        return run

    def training_of(call):
        ways.taken.append("looked at")
        return ready_launches.Training(forward(call), backward("ready backward"))

    def through_the_dispatcher(grad_output, grad_h_n, *args):
        *call, output, reserve, needs = args
        return backward("ordinary backward")(GRUCall(*call), grad_output, grad_h_n, output, reserve, needs)

    monkeypatch.setattr(ready_launches, "training_of", training_of)
    monkeypatch.setitem(dispatch._on_cuda, "gru_backward", through_the_dispatcher)
    with torch.enable_grad():
        yield ways


def leaves(args):
    return [t for t in (args[0], args[1], *args[2]) if t.requires_grad]


TRAINED = ["ready", "ready backward"]


def check_gradients(ways, args, expected_way, outputs=(0, 1)):
    """Forward and backward take the way, and give what `torch.gru` does."""

    def results_and_gradients(gru):
        results = gru(*args)
        return results, torch.autograd.grad([results[i].sin().sum() for i in outputs], leaves(args), allow_unused=True)

    way, (results, grads) = ways.of(lambda: results_and_gradients(ops.gru))
    assert way == expected_way
    expected, expected_grads = results_and_gradients(torch.gru)
    assert_same(results, expected, 1e-6)
    assert_same(grads, expected_grads, 2e-6)


@pytest.mark.parametrize("variant", [{"L": 1}, {"L": 2, "bidirectional": True, "batch_first": True}, {"bias": False}])
@pytest.mark.parametrize("outputs", [(0, 1), (0,), (1,)])
def test_training_is_ready(training_ways, variant, outputs):
    args = gru_args(**variant)
    check_gradients(training_ways, args, ["looked at", *TRAINED], outputs)
    check_gradients(training_ways, args, TRAINED, outputs)


def test_other_needs_are_looked_at(training_ways):
    args = gru_args()
    check_gradients(training_ways, args, ["looked at", *TRAINED])
    for i, frozen in enumerate((args[0], args[2][1], args[2][-1])):
        frozen.requires_grad_(False)
        check_gradients(training_ways, args, ["looked at", *TRAINED] if i < 3 else TRAINED)
        check_gradients(training_ways, args, TRAINED)
    with torch.no_grad():
        check(training_ways, args, FIRST)
    check_gradients(training_ways, args, TRAINED)


def test_a_graph_that_is_kept(training_ways):
    args = gru_args()
    output, _ = ops.gru(*args)
    first = torch.autograd.grad(output.sum(), leaves(args), retain_graph=True)
    assert_same(torch.autograd.grad(output.sum(), leaves(args)), first, 0)


def test_gradients_of_gradients_are_ordinary(training_ways):
    """They are looked for with gradients enabled, and the op differentiates its backward."""
    args = tuple(t.double().detach().requires_grad_() if isinstance(t, torch.Tensor) else t for t in gru_args(T=2, B=2, L=1))
    args = (*args[:2], [p.double().detach().requires_grad_() for p in args[2]], *args[3:])
    check_gradients(training_ways, args, ["looked at", *TRAINED])

    def penalty(gru):
        output, _ = gru(*args)
        grads = torch.autograd.grad(output.sin().sum(), leaves(args), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves(args))

    way, found = training_ways.of(lambda: penalty(ops.gru))
    assert way == ["ready", "ordinary", "ordinary backward", "ready backward"]  # the last for what the penalty is a function of
    assert_same(found, penalty(torch.gru), 1e-6)


def test_many_gradients_of_one_forward_are_ordinary(training_ways):
    """`is_grads_batched`: the gradients are samples of a vmap, which no launch knows."""
    args = gru_args(L=1, T=2, B=1)
    output, _ = ops.gru(*args)
    rows = torch.eye(output.numel()).view(-1, *output.shape)
    batched = {"is_grads_batched": True, "retain_graph": True}
    way, found = training_ways.of(lambda: torch.autograd.grad(output, leaves(args), rows, **batched))
    assert "ready backward" not in way
    each = [torch.autograd.grad(output, leaves(args), row, retain_graph=True) for row in rows]
    assert_same(found, [torch.stack(grads) for grads in zip(*each, strict=True)], 1e-6)


def test_saved_tensors_may_be_moved(training_ways):
    """Hooks on what is saved see all of it, and the backward gets what they return."""
    args, packed = gru_args(), []

    def pack(tensor):
        packed.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        check_gradients(training_ways, args, ["looked at", *TRAINED])
    assert len(packed) >= 4 + len(args[2])


def test_what_is_saved_must_not_change(training_ways):
    args = gru_args()
    output, _ = ops.gru(*args)
    with torch.no_grad():
        args[2][0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_training_that_may_fail(training_ways, monkeypatch):
    """Addresses or a GPU that do not do: the call and its backward take the ordinary way."""
    refusing = ready_launches.Training(lambda *_: None, None)
    monkeypatch.setattr(ready_launches, "training_of", lambda call: refusing)
    for _ in range(2):
        check_gradients(training_ways, gru_args(), ["ordinary", "ordinary backward"])


def test_recomputing_is_ordinary(training_ways):
    args = gru_args()
    check_gradients(training_ways, args, ["looked at", *TRAINED])
    way, (output, _) = training_ways.of(lambda: ops.gru(*args, recompute=True))
    assert "ready" not in way and output.requires_grad


def test_inference_mode(ways):
    args = gru_args(requires_grad=False)
    check(ways, args, FIRST)
    with torch.inference_mode():
        check(ways, args, FIRST)
        check(ways, args, AGAIN)
    check(ways, args, AGAIN)


def test_dropout(ways):
    x, hx, params, bias, L, _, _, *flags = gru_args()
    check(ways, (x, hx, params, bias, L, 0.5, False, *flags), FIRST)
    check(ways, (x, hx, params, bias, L, 0.0, True, *flags), AGAIN)
    check(ways, (x, hx, params, bias, L, 1.0, True, *flags), ORDINARY)
    way, _ = ways.of(lambda: ops.gru(x, hx, params, bias, L, 0.5, True, *flags))
    assert way == ORDINARY


def test_autocast(ways):
    """It casts first, and what it has cast is a call like others."""
    args = gru_args(requires_grad=False)
    check(ways, args, FIRST)
    x, hx, params, *flags = (args[0].bfloat16(), *args[1:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        way, results = ways.of(lambda: ops.gru(x, hx, params, *flags))
        assert way == AGAIN and all(t.dtype == torch.float32 for t in results)
        way, _ = ways.of(lambda: ready_calls.results(*args[:5], False, False))
        assert way == FIRST  # autocast has not had its turn


def test_cuda_autocast_that_has_not_had_its_turn(ways):
    """`gru_forward` called by itself: products inside are not for autocast, which the ordinary way sees to."""
    args = gru_args(requires_grad=False)
    torch.set_autocast_enabled("cuda", True)
    try:
        assert ready_calls.results(*args[:5], False, False) is None and not ways.taken
        with torch_hooks.below_autocast("cuda"):
            assert ready_calls.results(*args[:5], False, False) is not None and ways.taken == FIRST
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_vmap(ways):
    """Its samples become rows of the batch, and that is a call like others."""
    x, hx, params, *flags = args = gru_args(requires_grad=False)
    check(ways, args, FIRST)
    batch = torch.stack([x, 2 * x])
    way, mapped = ways.of(lambda: torch.vmap(lambda x: ops.gru(x, hx, params, *flags)[0])(batch))
    assert way == FIRST
    assert_same([*mapped], [torch.gru(x, hx, params, *flags)[0] for x in batch], 1e-6)
    way, mapped = ways.of(lambda: torch.vmap(lambda y: y + ops.gru(*args)[0])(batch.new_zeros(2, 1)))  # nothing of it is mapped
    assert way == AGAIN
    assert_same([*mapped], [torch.gru(*args)[0]] * 2, 1e-6)
    check(ways, args, AGAIN)


def test_forward_mode(ways):
    args = gru_args(requires_grad=False)
    check(ways, args, FIRST)
    with torch.autograd.forward_ad.dual_level():
        way, _ = ways.of(lambda: ops.gru(*args))
        assert way == ORDINARY
    check(ways, args, AGAIN)


def test_modes_see_the_call(ways):
    args = gru_args(requires_grad=False)
    check(ways, args, FIRST)
    way, (results, counts) = ways.of(lambda: count_calls(lambda: ops.gru(*args)))
    assert way == ORDINARY and counts == {"gru_forward": 1}
    assert_same(results, torch.gru(*args), 1e-6)
    check(ways, args, AGAIN)


def test_fake_tensors(ways):
    args = gru_args(requires_grad=False)
    check(ways, args, FIRST)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in (args[0], args[1], *args[2])]
        way, results = ways.of(lambda: ops.gru(fakes[0], fakes[1], fakes[2:], *args[3:]))
    assert not way and all(mode.is_our_fake(t) for t in results)
    way, (output, _) = ways.of(lambda: ops.gru(fakes[0], fakes[1], fakes[2:], *args[3:]))  # outside of the mode
    assert not way and mode.is_our_fake(output)
    check(ways, args, AGAIN)


def test_fake_tensors_of_unknown_sizes(ways):
    x, hx, params, *flags = gru_args(requires_grad=False)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    fakes = [mode.from_tensor(t, symbolic_context=StatelessSymbolicContext([DimDynamic.DYNAMIC] * t.dim())) for t in (x, hx)]
    way, (output, _) = ways.of(lambda: ops.gru(*fakes, [mode.from_tensor(p) for p in params], *flags))
    assert not way and isinstance(output.shape[0], torch.SymInt)


@pytest.mark.parametrize("tracing_mode", ["real", "symbolic"])
def test_tracing(ways, tracing_mode):
    x, hx, params, *flags = args = gru_args(requires_grad=False)
    check(ways, args, FIRST)
    way, graph = ways.of(
        lambda: make_fx(lambda x, hx, *params: ops.gru(x, hx, params, *flags), tracing_mode=tracing_mode)(x, hx, *params)
    )
    assert "ready" not in way
    assert [n.target for n in graph.graph.nodes].count(ops.gru_forward.default) == 1
    check(ways, args, AGAIN)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript_tracing(ways):
    x, hx, params, *flags = args = gru_args(requires_grad=False)
    check(ways, args, FIRST)
    traced = torch.jit.trace(lambda x, hx: ops.gru(x, hx, params, *flags), (x, hx), check_trace=False)
    assert "torch_gru_fuse" in str(traced.graph)
    assert_same(traced(2 * x, hx), torch.gru(2 * x, hx, params, *flags), 1e-6)


class Subclass(torch.Tensor):
    pass


def test_subclasses(ways):
    x, hx, params, *flags = args = gru_args(requires_grad=False)
    check(ways, args, FIRST)
    for others in (
        (x.as_subclass(Subclass), hx, params),
        (x, hx.as_subclass(Subclass), params),
        (x, hx, [params[0].as_subclass(Subclass), *params[1:]]),
    ):
        way, results = ways.of(lambda others=others: ops.gru(*others, *flags))
        assert way == ORDINARY
        assert_same([t.as_subclass(torch.Tensor) for t in results], torch.gru(*args), 1e-6)
    check(ways, args, AGAIN)


def test_signs_that_are_to_be_changed(ways):
    """The imaginary part of a conjugate is a view that says so; kernels would read the memory behind it."""
    x, hx, params, *flags = args = gru_args(requires_grad=False)
    check(ways, args, FIRST)

    def negative(tensor):
        view = torch.complex(tensor, tensor).conj().imag
        assert view.is_neg()
        return view

    for others in ((negative(x), hx, params), (x, negative(hx), params), (x, hx, [negative(p) for p in params])):
        check(ways, (*others, *flags), ORDINARY)


def test_another_device_is_current(ways, monkeypatch):
    args = gru_args()
    check(ways, args, FIRST)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    check(ways, args, ORDINARY)


def test_debugging_says_the_plan_of_each_call(ways, caplog):
    args = gru_args()
    check(ways, args, FIRST)
    with caplog.at_level(logging.DEBUG, logger="torch_gru_fuse"):
        check(ways, args, ORDINARY)
    check(ways, args, AGAIN)


def test_an_earlier_kernel_gave_up(ways, monkeypatch):
    args = gru_args()
    word = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setitem(timeouts._words, -1, timeouts._Word(word, ctypes.c_int32.from_address(word.data_ptr())))
    check(ways, args, FIRST)
    word.fill_(timeouts.id_of(timeouts.Call("gru", "T=1", "wavefront", "a plan", 10**9)))
    with pytest.raises(RuntimeError, match="the wavefront kernel gave up"):
        ops.gru(*args)
    check(ways, args, AGAIN)


def changed(args, place, value):
    return (*args[:place], value, *args[place + 1 :])


def with_param(args, i, value):
    return changed(args, 2, changed(args[2], i, value))


BAD = {
    "input of too few dimensions": lambda a: changed(a, 0, a[0][0]),
    "hx of another batch size": lambda a: changed(a, 1, a[1][:, :-1]),
    "hx of another dtype": lambda a: changed(a, 1, a[1].double()),
    "hx on another device": lambda a: changed(a, 1, a[1].to("meta")),
    "a parameter of another dtype": lambda a: with_param(a, 3, a[2][3].half()),
    "a parameter on another device": lambda a: with_param(a, 5, a[2][5].to("meta")),
    "a parameter of another size": lambda a: with_param(a, 7, a[2][7][:-1]),
    "a transposed parameter": lambda a: with_param(a, 1, a[2][1].t()),
    "a parameter is missing": lambda a: changed(a, 2, a[2][:-1]),
    "a parameter too many": lambda a: changed(a, 2, [*a[2], a[2][-1]]),
    "biases that are not said": lambda a: changed(a, 3, False),
    "too many layers": lambda a: changed(a, 4, 3),
    "no layer": lambda a: changed(a, 4, 0),
    "two directions": lambda a: changed(a, 7, True),
    "batch first": lambda a: changed(a, 8, True),
    "dropout that is no probability": lambda a: changed(changed(a, 5, 1.5), 6, True),
    "dropout that is no number": lambda a: changed(changed(a, 5, math.nan), 6, True),
    "steps of a sequence": lambda a: changed(a, 0, a[0][:0]),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_bad_input_after_good(ways, monkeypatch, bad):
    """The same error as without any ready call."""
    args = gru_args(requires_grad=False)
    wrong = bad(args)
    with monkeypatch.context() as without:
        without.setattr(ready_calls, "results", lambda *_: None)
        with pytest.raises(RuntimeError) as expected:
            ops.gru(*wrong)
    for _ in range(2):
        check(ways, args, FIRST if not ready_calls._ready else AGAIN)
        for _ in range(2):
            with pytest.raises(RuntimeError) as error:
                ops.gru(*wrong)
            assert str(error.value) == str(expected.value) and "torch_gru_fuse.gru: " in str(error.value)


def test_parameters_that_become_bad(ways):
    x, hx, params, *flags = args = gru_args(requires_grad=False)
    check(ways, args, FIRST)
    kept = params[3].data
    for bad in (kept[:-1], kept.double(), kept[None]):
        params[3].data = bad
        with pytest.raises(RuntimeError, match=r"params\[3\]"):
            ops.gru(*args)
    params[3].data = kept
    check(ways, args, AGAIN)


def test_the_op_of_compiled_models_is_ready(ways):
    x, hx, params, bias, L, *_ = gru_args()
    expected = torch.gru(x, hx, params, bias, L, 0.0, False, False, False)
    for way in (FIRST, AGAIN):
        taken, (*results, reserve) = ways.of(lambda: ops.gru_forward(x, hx, params, bias, L, False, None, False))
        assert taken == way and reserve.shape == (0,) and reserve.dtype == x.dtype
        assert_same(results, expected, 1e-6)
    for way in (FIRST, AGAIN):
        taken, (*results, reserve) = ways.of(lambda: ops.gru_forward(x, hx, params, bias, L, False, None, True))
        assert taken == way and reserve.shape == (7,)
        assert_same(results, expected, 1e-6)
    masks = torch.ones(1, 5, 3, 6)
    taken, (*results, _) = ways.of(lambda: ops.gru_forward(x, hx, params, bias, L, False, masks, False))
    assert taken == ORDINARY
    assert_same(results, expected, 1e-6)


# ---- the hooks ----------------------------------------------------------------------------------------------------------


def test_tensors_that_are_alike():
    a, b = torch.zeros(2, 3), torch.zeros(3)
    alike = torch_hooks.like([a, b])
    assert alike(a, b) and alike(torch.ones(2, 3), torch.ones(3))
    for other in (
        torch.zeros(3, 3), torch.zeros(3, 2), torch.zeros(2, 3, 1), torch.zeros(3, 2).t(), torch.zeros(2, 6)[:, ::2], a.half(),
        a.to("meta"), a.as_subclass(Subclass), torch.nn.Parameter(a), torch.zeros(2, 3, requires_grad=True),
        torch._neg_view(a), a.to_sparse(), FakeTensorMode().from_tensor(a),
    ):  # fmt: skip
        assert not alike(other, b)
    assert not alike(b, a)
    with torch.inference_mode():
        assert not alike(a, b) and not alike(torch.zeros(2, 3), b)
    with torch.autocast("cpu"):
        assert not alike(a, b)
    seen = []
    torch.vmap(lambda x: seen.append((alike(x, b), alike(a, b))) or x)(torch.zeros(4, 2, 3))
    torch.func.grad(lambda x: seen.append((alike(x, b), alike(a, b))) or x.sum())(a)
    assert not any(any(pair) for pair in seen) and len(seen) == 2
    assert alike(a, b)


def test_tensors_that_are_alike_are_not_kept():
    import weakref

    tensor = torch.zeros(2, 3)
    gone = weakref.ref(tensor)
    alike = torch_hooks.like([tensor])
    del tensor
    assert gone() is None and alike(torch.zeros(2, 3))


def test_allocating_for_cuda():
    """Its sister for the CPU does what we count on."""
    new = torch._C._dynamo.guards._empty_strided_cpu
    assert callable(torch_hooks.empty_strided_cuda)
    tensor = new((4, 2, 3), (3, 12, 1), torch.float16)
    assert tensor.shape == (4, 2, 3) and tensor.stride() == (3, 12, 1) and tensor.dtype == torch.float16
    assert not tensor.is_inference() and not tensor.requires_grad and not tensor._is_view()
    with torch.inference_mode():
        assert new((1,), (1,), torch.float16).is_inference()
