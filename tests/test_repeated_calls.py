"""Dynamo follows one call of an nn.GRUCell or nn.GRU in a graph, and the others become nodes at once: guards, changes and
errors are as where all calls are followed."""

import contextlib
import operator

import pytest
import torch
from torch import nn

from torch_gru_fuse import torch_hooks

pytestmark = pytest.mark.versions

B, I, H = 2, 3, 4
KINDS = pytest.mark.parametrize("kind", [nn.GRUCell, nn.GRU], ids=lambda kind: kind.__name__)


@pytest.fixture(autouse=True)
def followed(monkeypatch):
    """The cells that Dynamo follows."""
    from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable

    cells = []
    original = UnspecializedNNModuleVariable.call_function

    def call_function(variable, tx, *args):
        if isinstance(variable.value, (nn.GRUCell, nn.GRU)):
            cells.append(variable.value)
        return original(variable, tx, *args)

    monkeypatch.setattr(UnspecializedNNModuleVariable, "call_function", call_function)
    return cells


@pytest.fixture(autouse=True)
def hook(followed):
    hook = torch_hooks.DynamoHook(
        lambda backend: True, lambda x, h, *rest: (x.new_empty(*x.shape[:2], h.shape[2]), torch.empty_like(h))
    )
    hook.install()
    yield hook
    hook.remove()


class Loop(nn.Module):
    """`step` gets the module, the input and the state of each step, and its number."""

    def __init__(self, kind=nn.GRUCell, step=lambda m, x, h, t: m.call(x, h), **options):
        super().__init__()
        self.cell, self.step = kind(I, H, **options), step
        self.other = nn.Parameter(torch.randn(3 * H, I))

    @property
    def weights(self):
        """The names of the weights of the input and of the state."""
        return list(self.cell._parameters)[:2]

    def call(self, *args, **kwargs):
        result = self.cell(*args, **kwargs)
        return result[1] if isinstance(self.cell, nn.GRU) else result

    def forward(self, x, h):
        for t, step in enumerate(x):
            h = self.step(self, step, h, t)
        return h


def problem(kind=nn.GRUCell):
    torch.manual_seed(0)
    time = () if issubclass(kind, nn.GRUCell) else (1,)
    return torch.randn(4, *time, B, I), torch.randn(*time, B, H)


def compiled(model):
    """A compiled model, and its graphs."""
    graphs = []

    def backend(gm, inputs):
        graphs.append(gm)
        return gm.forward

    return torch.compile(model, backend=backend, fullgraph=True), graphs


def with_and_without(hook, run):
    """What `run` returns as it is, and where all calls are followed."""
    results = []
    for repeats in (True, False):
        torch.manual_seed(0)
        torch._dynamo.reset()
        if not repeats:
            hook.remove()
            hook._install_repeated_calls = lambda: None
            hook.install()
        results.append(run())
    return results


@pytest.mark.parametrize("bias", [True, False])
@KINDS
def test_one_call_is_followed(kind, bias, followed):
    model, args = Loop(kind, bias=bias), problem(kind)
    function, graphs = compiled(model)
    torch.testing.assert_close(function(*args), model(*args))
    [gm] = graphs
    assert followed == [model.cell]
    calls = [n for n in gm.graph.nodes if n.target in (torch.gru_cell, torch.gru)]
    assert len(calls) == 4 and len({str(n.args[2:]) for n in calls}) == 1
    assert len({str([*n.meta["nn_module_stack"].values()][-1]) for n in calls}) == 1
    assert all("test_repeated_calls.py" in n.stack_trace for n in calls)


@pytest.mark.parametrize("options", [{"num_layers": 2, "dropout": 0.5}, {"batch_first": True, "bias": False}], ids=str)
def test_options_of_a_gru(options, hook):
    def run():
        model, (x, _) = Loop(nn.GRU, **options), problem(nn.GRU)
        function, graphs = compiled(model)
        batch = x.shape[1] if options.get("batch_first") else B
        function(x, torch.randn(options.get("num_layers", 1), batch, H))
        return [str(n.args[2:]) for n in graphs[0].graph.nodes if n.target is torch.gru]

    with_hook, without = with_and_without(hook, run)
    assert with_hook == without and len(with_hook) == 4


def test_every_call_is_followed_where_torch_has_no_such_variables(hook, followed, monkeypatch):
    from torch._dynamo.variables import nn_module

    hook.remove()
    monkeypatch.delattr(nn_module, "record_nn_module_stack")
    before = nn_module.UnspecializedNNModuleVariable.call_function
    hook.install()
    assert nn_module.UnspecializedNNModuleVariable.call_function is before


# ---- what is changed after the compilation -----------------------------------------------------------------------------------


def replace_weight(m):
    name = m.weights[1]
    setattr(m.cell, name, nn.Parameter(getattr(m.cell, name).detach() * 2))


def replace_behind_its_back(m):
    name = m.weights[0]
    m.cell._parameters[name] = nn.Parameter(getattr(m.cell, name).detach() * 2)


def write_weight(m):
    with torch.no_grad():
        getattr(m.cell, m.weights[0]).mul_(2)


def no_bias(m):
    if isinstance(m.cell, nn.GRU):
        m.cell = nn.GRU(I, H, bias=False)
    else:
        m.cell.bias_ih = m.cell.bias_hh = None


def frozen(m):
    m.cell.requires_grad_(False)


def another_cell(m):
    m.cell = type(m.cell)(I, H)


def twice(result):
    return tuple(r * 2 for r in result) if isinstance(result, tuple) else result * 2


def forward_hook(m):
    m.cell.register_forward_hook(lambda module, args, output: twice(output))


def forward_pre_hook(m):
    m.cell.register_forward_pre_hook(lambda module, args: (args[0] * 2, args[1]))


def other_forward(m):
    m.cell.forward = (lambda x, h: (x, h + 1)) if isinstance(m.cell, nn.GRU) else lambda x, h: h + 1


def parametrized(m):
    nn.utils.parametrize.register_parametrization(m.cell, m.weights[0], nn.Tanh())


CHANGES = (replace_weight, replace_behind_its_back, write_weight, no_bias, frozen, another_cell, forward_hook, forward_pre_hook,
           other_forward, parametrized)  # fmt: skip


@pytest.mark.parametrize("hooks_are_guarded", [True, False])
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
@KINDS
def test_changes_of_the_module_are_seen(kind, change, hooks_are_guarded, hook):
    def run():
        model, args = Loop(kind), problem(kind)
        function, graphs = compiled(model)
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=not hooks_are_guarded):
            before = function(*args)
            change(model)
            after = function(*args)
        expected = model(*args)
        assert change is frozen or not torch.allclose(expected, before)
        if hooks_are_guarded or "hook" not in change.__name__:  # PyTorch's default has no guards on hooks
            torch.testing.assert_close(after, expected)
        return after.detach(), after.requires_grad, len(graphs)

    with_hook, without = with_and_without(hook, run)
    torch.testing.assert_close(with_hook, without)


@KINDS
def test_dtype(kind):
    model, args = Loop(kind), problem(kind)
    function, graphs = compiled(model)
    function(*args)
    double = [a.double() for a in args]
    model.double()
    torch.testing.assert_close(function(*double), model(*double))
    assert len(graphs) == 2


# ---- what is changed while the graph is made ---------------------------------------------------------------------------------


def other_weight_at_a_step(m, x, h, t):
    if t == 2:
        setattr(m.cell, m.weights[0], m.other)
    return m.call(x, h)


def scaled_weight_at_a_step(m, x, h, t):
    if t == 2:
        with torch.no_grad():
            getattr(m.cell, m.weights[0]).mul_(2)
    return m.call(x, h)


def forward_at_a_step(m, x, h, t):
    if t == 2:
        other_forward(m)
    return m.call(x, h)


def no_bias_at_a_step(m, x, h, t):
    if t == 2:
        for name in list(m.cell._parameters)[2:]:
            m.cell._parameters[name] = None
    return m.call(x, h)


def evaluated_at_a_step(m, x, h, t):
    if t == 2:
        m.cell.training = False
    return m.call(x, h)


def mode_at_a_step(m, x, h, t):
    with torch.set_grad_enabled(t != 1):
        return m.call(x, h)


def autocast_at_a_step(m, x, h, t):
    with torch.autocast("cpu", torch.bfloat16, enabled=t == 2):
        return m.call(x, h)


def by_keyword(m, x, h, t):
    return m.call(input=x, hx=h) if t % 2 else m.call(x, hx=h)


def unbatched(m, x, h, t):
    if t % 2 == 0:
        return m.call(x, h)
    return torch.stack([m.call(x.select(-2, b), h.select(-2, b)) for b in range(B)], -2)


def no_state(m, x, h, t):
    return m.call(x) + h if t % 2 else m.call(x, h)


def half_of_the_batch(m, x, h, t):
    return torch.cat([m.call(x[..., :1, :], h[..., :1, :]), h[..., 1:, :]], -2) if t % 2 else m.call(x, h)


def checkpointed(m, x, h, t):
    return torch.utils.checkpoint.checkpoint(m.call, x, h, use_reentrant=False) if t % 2 else m.call(x, h)


STEPS = (other_weight_at_a_step, scaled_weight_at_a_step, no_bias_at_a_step, forward_at_a_step, evaluated_at_a_step,
         mode_at_a_step, autocast_at_a_step, by_keyword, unbatched, no_state, half_of_the_batch, checkpointed)  # fmt: skip


@pytest.mark.parametrize("step", STEPS, ids=lambda f: f.__name__)
@KINDS
def test_steps_that_are_not_all_alike(kind, step, hook):
    def run():
        model, args = Loop(kind, step), problem(kind)
        with torch.set_grad_enabled(step in (mode_at_a_step, checkpointed)):  # a weight that is written has no gradient
            try:
                result = compiled(model)[0](*args)
            except torch._dynamo.exc.TorchDynamoException as error:
                return type(error)
        return result.detach(), result.requires_grad, [p.detach() for p in model.cell.parameters()]

    with_hook, without = with_and_without(hook, run)
    if isinstance(without, type):  # Dynamo knows no such step
        assert with_hook is without
    else:
        torch.testing.assert_close(with_hook, without)


class Twice(nn.GRUCell):
    def forward(self, x, h):
        return super().forward(x, h) * 2


def test_a_subclass_is_followed(followed):
    model, args = Loop(Twice), problem()
    torch.testing.assert_close(compiled(model)[0](*args), model(*args))
    assert followed == [model.cell] * 4


def test_hooks_of_all_modules(followed):
    model, args = Loop(), problem()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output + 1 if isinstance(module, nn.GRUCell) else None
    )
    try:
        torch.testing.assert_close(compiled(model)[0](*args), model(*args))
    finally:
        handle.remove()
    assert followed == [model.cell] * 4


def test_torch_function_modes_see_every_cell(hook):
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            return result * 2 if function is torch.gru_cell else result

    def run():
        model, args = Loop(), problem()
        with Mode():
            result = compiled(model)[0](*args)
        assert not torch.allclose(result, model(*args))
        return result

    with_hook, without = with_and_without(hook, run)
    torch.testing.assert_close(with_hook, without)


# ---- what the graph knows of its tensors -----------------------------------------------------------------------------------


def known(graph):
    """What a graph says of each of its tensors, and which of them share memory."""
    storages, result = {}, []
    for node in graph.nodes:
        x = node.meta.get("example_value")
        if isinstance(x, torch.Tensor):
            storage = storages.setdefault(x.untyped_storage()._cdata, len(storages))
            result.append((node.target, x.shape, x.stride(), x.storage_offset(), x.dtype, x.device, x.requires_grad,
                           x.is_inference(), type(x), storage))  # fmt: skip
    return result


@contextlib.contextmanager
def run_on_fake_tensors():
    """The nodes whose shapes are found by running them."""
    from torch._dynamo import utils

    nodes, original = [], utils.run_node

    def run_node(tracer, node, *args):
        nodes.append(node)
        return original(tracer, node, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "run_node", run_node)
        yield nodes


INPUTS = {
    "in order": lambda x, t: x[t],
    "from the end": lambda x, t: x[-1 - t],
    "transposed": lambda x, t: x.transpose(0, 1)[t % B],
    "a part": lambda x, t: x[..., : I + 1][t],
    "broadcast": lambda x, t: x[:1].expand(4, B, I)[t],
    "written": lambda x, t: x[t].add_(1),
    "written to": lambda x, t: (x[t].mul_(0), x[t])[1],
    "a row of a row": lambda x, t: torch.stack([x[t][b] for b in range(B)]),
}
MODES = {"no_grad": torch.no_grad, "enable_grad": torch.enable_grad, "inference_mode": torch.inference_mode}


@pytest.mark.parametrize(
    ("part", "mode"), [(part, "no_grad") for part in INPUTS] + [("in order", mode) for mode in MODES if mode != "no_grad"]
)
def test_shapes_are_those_that_running_every_node_finds(part, mode, hook):
    def run():
        model, (x, h) = Loop(nn.GRUCell), problem()
        if "transposed" in part:
            x = torch.randn(B, B, I)

        def forward(x, h):
            for t in range(4):
                h = model.cell(INPUTS[part](x, t), h)
            return h

        graphs = []

        def backend(gm, inputs):
            graphs.append(known(gm.graph))
            return gm.forward

        with MODES[mode]():
            given = x.clone(), h.clone()
            result = torch.compile(forward, backend=backend, fullgraph=True)(*given)
            expected_given = x.clone(), h.clone()
            torch.testing.assert_close(result, forward(*expected_given))
            torch.testing.assert_close(given, expected_given)
        [graph] = graphs
        return graph

    with_hook, without = with_and_without(hook, run)
    assert with_hook == without and len(with_hook) >= 8


def test_two_of_many_steps_are_run_on_fake_tensors():
    cell, (x, h) = nn.GRUCell(I, H), problem()

    def forward(x, h):
        for t in range(4):
            h = cell(x[t], h)
        return h

    function, _ = compiled(forward)
    with run_on_fake_tensors() as nodes, torch.no_grad():
        function(x, h)
    kinds = [node.target for node in nodes]  # the second one, before which no call is known to be repeated, is kept
    assert kinds.count(torch.gru_cell) == kinds.count(operator.getitem) == 2


@pytest.mark.parametrize("index", [4, -5])
def test_a_step_that_is_not_there(index, hook):
    def run():
        model, args = Loop(step=lambda m, x, h, t: m.call(m.x[t if t < 3 else index], h)), problem()
        model.x = args[0]
        with torch.no_grad(), pytest.raises(Exception) as raised:
            compiled(model)[0](*args)
        return type(raised.value), str(raised.value).split("from user code")[0]

    with_hook, without = with_and_without(hook, run)
    assert with_hook == without and "index" in with_hook[1]


def test_shapes_where_torch_has_no_such_function(hook, monkeypatch):
    from torch._dynamo.variables import builder

    hook.remove()
    before = builder.get_fake_value
    monkeypatch.delattr(builder, "get_fake_value")
    hook.install()
    assert not hasattr(builder, "get_fake_value")
    hook.remove()
    monkeypatch.setattr(builder, "get_fake_value", before, raising=False)


def test_removal(hook):
    from torch._dynamo.variables import builder
    from torch._dynamo.variables.nn_module import UnspecializedNNModuleVariable as Module

    def functions():
        return builder.get_fake_value, Module.call_function

    installed = functions()
    hook.remove()
    before = functions()
    assert before[0] is not installed[0] and before[1] is not installed[1]
    hook.install()
    hook.remove()
    assert functions() == before


# ---- errors ------------------------------------------------------------------------------------------------------------------

WRONG = {
    "input size": lambda m, x, h, t: m.call(x[..., 1:] if t else x, h),
    "hidden size": lambda m, x, h, t: m.call(x, h[..., 1:] if t else h),
    "batch": lambda m, x, h, t: m.call(x, h[..., 1:, :].expand(*h.shape[:-2], 3, H) if t else h),
    "dtype": lambda m, x, h, t: m.call(x, h.double() if t else h),
    "dtype of the input": lambda m, x, h, t: m.call(x.double() if t else x, h),
    "4 dimensions": lambda m, x, h, t: m.call(x, h[(None,) * (4 - h.dim())] if t else h),
    "arguments": lambda m, x, h, t: m.call(x, h, h) if t else m.call(x, h),
}


@KINDS
@pytest.mark.parametrize("wrong", WRONG)
def test_errors_are_those_of_calls_that_are_followed(kind, wrong, hook):
    def run():
        model, args = Loop(kind, WRONG[wrong]), problem(kind)
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            model(*args)
        with pytest.raises(Exception) as raised:
            compiled(model)[0](*args)
        # all but the places in the source
        return type(raised.value), str(raised.value).split("from user code")[0]

    with_hook, without = with_and_without(hook, run)
    assert with_hook == without
