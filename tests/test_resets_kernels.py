"""Resets of the state between steps: the path of CUDA with interpreted kernels, its plans, and the step kernels compiled.

The kernels of whole sequences by themselves are in `test_kernels_resets`.
"""

import logging

import pytest
import torch
from problems import assert_same, gru_args, value_and_grads
from test_kernel_path import emulated_launcher, kernels_on_cpu, plan, whole_call, whole_on_cpu  # noqa: F401  (fixtures)
from test_kernels_compile import ALIGNED, PRECISIONS, assert_fits, default_tiles
from test_resets import KINDS, loop, resets_of

import torch_gru_fuse.functional as fused
from torch_gru_fuse import equations, torch_hooks
from torch_gru_fuse.kernels import aot, launch
from torch_gru_fuse.ops import dispatch, kernel_path, torch_path
from torch_gru_fuse.ops.call import GRUCall
from torch_gru_fuse.planner import plan as plan_module
from torch_gru_fuse.planner import tiles
from torch_gru_fuse.planner.gpus import gpu_named
from torch_gru_fuse.planner.plan import plan_gru
from torch_gru_fuse.planner.whole_sequence import ResidentPlan, StagedPlan, WavefrontPlan, WholeSequencePlan, resets_plan


@pytest.mark.parametrize("kernel", ["step", "torch"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", [{"L": 1}, {"L": 2, "bidirectional": True, "T": 7}, {"L": 2, "bias": False}], ids=str)
def test_kernel_path(kernels_on_cpu, monkeypatch, variant, kind, kernel):  # noqa: F811
    plan(monkeypatch, kernel)
    monkeypatch.setattr(torch_hooks, "cudnn_runs", lambda tensor: True)  # it must not be asked
    x, hx, params, bias, L, _, _, bidirectional, _ = gru_args(**variant, requires_grad=False)
    keep = 1 - resets_of(kind, size=x.shape[:2]).float().t().contiguous().t()  # as of resets that are batch first
    masks = torch.bernoulli(torch.full((L - 1, *x.shape[:2], 12), 0.5)) * 2 if bidirectional else None
    given = keep.bool() if kind == "bool" else keep
    call = GRUCall(x, hx, params, bias, L, bidirectional, masks, given)

    double = [t.double().requires_grad_() for t in (x, hx, *params)]
    exact = equations.gru(double[0], double[1], double[2:], bias, L, bidirectional,
                          None if masks is None else masks.double(), keep.double())  # fmt: skip
    inference = kernel_path.gru_forward(call, False)
    output, h_n, reserve = kernel_path.gru_forward(call, True)
    assert_same([output, h_n, *inference[:2]], [e.float() for e in exact] * 2, 2e-6)
    grads = torch.randn_like(output), torch.randn_like(h_n)
    expected = torch.autograd.grad(exact, double, [g.double() for g in grads])
    needs = [True] * len(double)
    actual = kernel_path.gru_backward(call, *grads, output, reserve, needs)
    assert_same(actual, [e.float() for e in expected], 5e-6)
    actual = kernel_path.gru_backward(call, *grads, output, reserve.clone(), needs)  # its plan is made anew
    assert_same(actual, [e.float() for e in expected], 5e-6)


# ---- whole sequences in one launch ------------------------------------------------------------------------------------------

SPREAD, RESIDENT, STAGED = WavefrontPlan(16, 8, 2), ResidentPlan(32, 8, 2), StagedPlan(16, 8, 1, 1, 1)
WHOLE_CASES = [
    # variant, plan, plan of the backward, dropout
    pytest.param({"L": 1, "H": 32}, (1, SPREAD), (1, SPREAD), False, id="one layer"),
    pytest.param({"L": 3, "H": 32, "T": 7, "B": 9}, (3, SPREAD), (3, SPREAD), False, id="stack"),
    pytest.param({"L": 3, "H": 32}, (3, SPREAD), (3, SPREAD), True, id="stack, dropout"),
    pytest.param({"L": 3, "H": 32, "bias": False}, (1, SPREAD), (1, SPREAD), True, id="layer by layer, dropout"),
    pytest.param({"L": 2, "H": 32, "bidirectional": True}, (2, SPREAD), (2, SPREAD), True, id="directions, dropout"),
    pytest.param({"L": 2, "H": 32}, (2, RESIDENT), (1, RESIDENT), True, id="resident stack, dropout"),
    pytest.param({"L": 1, "H": 32, "bidirectional": True}, (2, RESIDENT), (2, RESIDENT), False, id="resident, directions"),
    pytest.param({"L": 2, "H": 64, "B": 17}, (1, STAGED), (1, STAGED), False, id="staged, layer by layer"),
    pytest.param({"L": 1, "H": 64, "bidirectional": True}, (2, STAGED), (2, STAGED), False, id="staged, directions"),
    pytest.param({"L": 3, "H": 20}, (3, SPREAD), None, True, id="stack, padded, dropout"),
    pytest.param({"L": 2, "H": 20, "bidirectional": True}, (2, RESIDENT), None, False, id="resident, padded"),
    pytest.param({"L": 2, "H": 32, "T": 1, "B": 1}, (2, SPREAD), (2, SPREAD), False, id="one step"),
]  # fmt: skip


def problem(variant, dropout, kind):
    """A call, its resets, and the arguments of its float64 twin."""
    call = whole_call(variant, dropout)
    resets = resets_of(kind, size=call.input.shape[:2])
    keep = ~resets if kind == "bool" else 1 - resets
    call = call._replace(keep=keep.t().contiguous().t())  # as of resets that are batch first
    double = [t.double().requires_grad_() for t in call.tensors]
    masks = None if call.dropout_masks is None else call.dropout_masks.double()
    exact = equations.gru(
        double[0], double[1], double[2:], call.has_biases, call.L, call.bidirectional, masks, keep.double()
    )
    return call, double, exact


@pytest.mark.parametrize(
    "variant, whole, backward, dropout, kind, way",
    [
        pytest.param(*case.values, kind, (i + k) % 3, id=f"{case.id}, {kind}")
        for i, case in enumerate(WHOLE_CASES)
        for k, kind in enumerate(KINDS)
    ],
)
def test_whole_sequences(whole_on_cpu, monkeypatch, nan_filled_empty, variant, whole, backward, dropout, kind, way):  # noqa: F811
    """Without a plan of the backward that runs step by step.

    Which gradients are given and which are asked for: of three ways one for each kind, in turns, so that each case has all.
    """
    backward = backward and WholeSequencePlan(*backward)
    plan(monkeypatch, "whole", whole=WholeSequencePlan(*whole), backward=backward)
    call, double, exact = problem(variant, dropout, kind)
    inference = kernel_path.gru_forward(call, False)
    output, h_n, reserve = kernel_path.gru_forward(call, True)
    assert_same([output, h_n, *inference[:2]], [e.float() for e in exact] * 2, 2e-3)  # operands are rounded to tf32
    grads = torch.randn_like(output).transpose(0, 1).contiguous().transpose(0, 1), torch.randn_like(h_n)
    needs = [[True] * len(double), [i % 3 != 1 for i in range(len(double))], [False, True] + [False] * (len(double) - 2)]
    given, need = list(zip((grads, (grads[0], None), (None, grads[1])), needs, strict=True))[way]
    used = [(e, g.double()) for e, g in zip(exact, given, strict=True) if g is not None]
    expected = torch.autograd.grad([e for e, _ in used], double, [g for _, g in used])
    actual = kernel_path.gru_backward(call, *given, output, reserve, need)
    assert_same(actual, [e.float() for e, n in zip(expected, need, strict=True) if n], 4e-3)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("option", ["resets", "keep"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_op(whole_on_cpu, monkeypatch, batch_first, option, recompute):  # noqa: F811
    """From the public op to the kernels and back."""
    monkeypatch.setattr(dispatch, "torch_path", kernel_path)
    plan(monkeypatch, "whole", whole=WholeSequencePlan(2, SPREAD), backward=WholeSequencePlan(2, SPREAD))
    args = gru_args(H=32, batch_first=batch_first)
    inputs = [args[0], args[1], *args[2]]
    resets = resets_of("bool", size=args[0].shape[:2])
    double = [t.detach().double().requires_grad_() for t in inputs]
    exact = value_and_grads(
        lambda *a: loop(*a, resets=resets.double()), (double[0], double[1], double[2:], *args[3:]), double
    )
    given = {option: resets if option == "resets" else ~resets}
    actual = value_and_grads(lambda *a: fused.gru(*a, recompute=recompute, **given), args, inputs)
    assert_same(actual, [e.float() for e in exact], 4e-3)


def test_calls_with_and_without_resets_share_no_launch(whole_on_cpu, monkeypatch):  # noqa: F811
    """What is kept of a call with resets of one type, for its like, is not for others."""
    plan(monkeypatch, "whole", whole=WholeSequencePlan(2, SPREAD), backward=WholeSequencePlan(2, SPREAD))
    call, double, _ = problem({"L": 2, "H": 32}, False, "bool")
    masks = torch.rand(call.input.shape[:2]) < 0.5
    for keep in (masks, None, masks.float(), torch.rand(masks.shape), ~masks, None):
        factor = None if keep is None else keep.double()
        exact = equations.gru(double[0], double[1], double[2:], True, 2, False, None, factor)
        results = kernel_path.gru_forward(call._replace(keep=keep), True)
        assert_same(results[:2], [e.float() for e in exact], 2e-3)
        grads = [torch.ones_like(r) for r in results[:2]]
        expected = torch.autograd.grad(exact, double, [g.double() for g in grads])
        actual = kernel_path.gru_backward(call._replace(keep=keep), *grads, results[0], results[2], [True] * len(double))
        assert_same(actual, [e.float() for e in expected], 4e-3)


def test_a_bool_clears_what_is_not_a_number(whole_on_cpu, monkeypatch):  # noqa: F811
    plan(monkeypatch, "whole", whole=WholeSequencePlan(2, SPREAD), backward=WholeSequencePlan(2, SPREAD))
    call = whole_call({"L": 2, "H": 32})
    call.input[1, 0] = float("nan")
    keep = torch.ones(call.input.shape[:2], dtype=torch.bool)
    keep[2] = False
    output, h_n, reserve = kernel_path.gru_forward(call._replace(keep=keep), True)
    assert output[1, 0].isnan().all() and not output[2:].isnan().any() and not h_n.isnan().any()
    grads = kernel_path.gru_backward(
        call._replace(keep=keep), None, torch.ones_like(h_n), output, reserve, [True, True] + [False] * len(call.params)
    )
    assert not grads[0][2:].isnan().any()
    assert not grads[0][:2, 1:].any() and not grads[1][:, 1:].any()  # of row 0 they are 0 times gates that are NaN


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("of", ["forward", "backward"])
def test_launch_that_does_not_fit(whole_on_cpu, monkeypatch, caplog, of, save):  # noqa: F811
    """Fewer programs on the GPU than planned: a launch a step runs, also without gradients, and that is said once."""

    def refusing(kernel, *args):
        def run(*_):
            raise launch.DoesNotFit("too many blocks in cooperative launch")

        refused = kernel.fn.__name__ == f"wavefront_{'' if of == 'forward' else 'backward_'}kernel"
        return run if refused else emulated_launcher(kernel, *args)

    def no_operations(*_):
        raise AssertionError("PyTorch's operations, step by step")

    monkeypatch.setattr(launch, "launcher", refusing)
    monkeypatch.setattr(torch_hooks, "cudnn_runs", lambda tensor: True)
    monkeypatch.setattr(torch_path, "gru_forward", no_operations)
    plan(monkeypatch, "whole", whole=WholeSequencePlan(2, SPREAD), backward=WholeSequencePlan(2, SPREAD))
    call, double, exact = problem({"L": 2, "H": 32}, False, "any factor")
    with caplog.at_level(logging.WARNING, logger="torch_gru_fuse"):
        for _ in range(2):
            output, h_n, reserve = kernel_path.gru_forward(call, save)
            assert_same([output, h_n], [e.float() for e in exact], 2e-3)
            if save:
                grads = torch.randn_like(output), torch.randn_like(h_n)
                expected = torch.autograd.grad(exact, double, [g.double() for g in grads], retain_graph=True)
                actual = kernel_path.gru_backward(call, *grads, output, reserve, [True] * len(double))
                assert_same(actual, [e.float() for e in expected], 4e-3)
    assert len(caplog.records) == (of == "forward" or save)


# ---- plans ------------------------------------------------------------------------------------------------------------------

PLANNED = dict(tf32_allowed=True, cudnn=True, gpu=gpu_named("h100"), captured=True, resets=True)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", ["torch.float16", "torch.bfloat16", "torch.float32"])
@pytest.mark.parametrize("sizes", [(512, 10, 128, 256, 6, 1), (128, 64, 64, 256, 1, 1), (16, 256, 64, 128, 1, 1),
                                   (128, 512, 64, 256, 1, 1), (1000, 32, 64, 256, 2, 2)], ids=str)  # fmt: skip
def test_plan(sizes, dtype, training, captured):
    """What beats cuDNN in a CUDA graph beats one launch a step, captured or not, and more than that does."""
    flags = PLANNED | dict(training=training, captured=captured)
    element_bytes = 4 if dtype == "torch.float32" else 2
    planned = plan_gru(*sizes, dtype, **flags)
    assert planned == plan_gru(*sizes, dtype, **flags | {"captured": True})
    without = plan_gru(*sizes, dtype, **flags | {"captured": True, "resets": False})
    if (sizes[0], dtype, training) == (16, "torch.float32", True):  # training of small layers over few steps
        assert (planned.kernel, without.kernel) == ("whole", "torch")  # measured: 1.8 times as fast as steps
        return
    assert planned.kernel == without.kernel == "whole"
    assert planned.whole == without.whole
    assert planned.backward == (without.backward and resets_plan(without.backward, sizes[3], element_bytes, backward=True))
    assert (planned.backward is not None) == (planned.backward_tile is not None) == training
    assert planned.tile is not None and "resets" in planned.reason


@pytest.mark.parametrize(
    "sizes, kernel",
    [
        ((16, 16, 64, 128, 1, 1), "whole"),  # measured, from here
        ((16, 8, 64, 128, 1, 1), "step"),
        ((12, 16, 64, 128, 1, 1), "step"),
        ((100, 512, 64, 512, 1, 1), "step"),
    ],
)
def test_no_more_than_was_measured_is_taken(monkeypatch, sizes, kernel):
    """Beside what beats cuDNN in a CUDA graph."""
    plan_module._plan_gru.cache_clear()
    monkeypatch.setattr(plan_module, "whole_sequence_is_faster", lambda *sizes, **options: False)
    for training in (False, True):
        assert plan_gru(*sizes, "torch.float32", training=training, **PLANNED).kernel == kernel
    plan_module._plan_gru.cache_clear()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "sizes, reason",
    [
        ((1, 1, 512, 512, 2, 1), "not expected to be faster"),  # no kernel for one step knows resets
        ((3, 64, 64, 256, 1, 1), "not expected to be faster"),
        ((128, 64, 64, 100, 1, 1), "not expected to be faster"),
        ((128, 64, 64, 8192, 1, 1), "H = 8192"),
    ],
)
def test_plan_of_steps(sizes, reason, training):
    planned = plan_gru(*sizes, "torch.float16", training=training, **PLANNED)
    assert planned.kernel == "step" and planned.whole is planned.backward is planned.stream is None
    assert (planned.backward_tile is not None) == training and "cuDNN knows no resets" in planned.reason
    assert reason in planned.reason


def test_plan_without_kernels():
    refused = plan_gru(
        50, 8, 64, 64, 1, 1, "torch.float64", training=False, **PLANNED | {"unsupported": "float64", "gpu": None}
    )
    assert refused.kernel == "torch" and refused.reason == "float64"
    exact = plan_gru(50, 8, 64, 256, 1, 1, "torch.float32", training=False, **PLANNED | {"tf32_allowed": False})
    assert exact.kernel == "step" and "need TF32" in exact.reason


def test_one_place_decides(monkeypatch):
    asked = []

    def beats(whole, *sizes, **options):
        asked.append((sizes, options["training"]))
        return False

    plan_module._plan_gru.cache_clear()
    monkeypatch.setattr(plan_module, "whole_sequence_beats_steps", beats)
    for training in (False, True):
        assert plan_gru(512, 10, 128, 256, 6, 1, "torch.float16", training=training, **PLANNED).kernel == "step"
    plan_module._plan_gru.cache_clear()
    assert asked == [((512, 10, 256, 6, 1, 2), training) for training in (False, True)]


@pytest.mark.parametrize("choice, kernel", [("torch", "torch"), ("triton", "whole"), ("step", "step"), ("auto", "whole")])
def test_plan_that_is_asked_for(monkeypatch, choice, kernel):
    monkeypatch.setenv("TORCH_GRU_FUSE_KERNELS", choice)
    for cudnn in (False, True):
        planned = plan_gru(100, 8, 64, 64, 1, 1, "torch.float16", training=True, **PLANNED | {"cudnn": cudnn})
        assert planned.kernel == kernel and (planned.backward is not None) == (kernel == "whole")
    planned = plan_gru(2, 8, 64, 64, 1, 1, "torch.float16", training=False, **PLANNED)
    assert planned.kernel == ("step" if choice == "auto" else kernel)  # few steps


# ---- kernels -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision, keep", [("fp32", None), ("tf32", torch.bool), ("fp16", torch.bool), ("bf16", None)])
def test_step_kernels_compile_without_spills(precision, keep):
    dtype, tf32 = PRECISIONS[precision]
    for tile, width in default_tiles(tiles.default_step_tile, precision):
        if width % 16:
            continue
        for capability in (89, 90) if tile.block_b >= 64 else (89,):
            options = dict(hidden=width, directions=2, keep=keep or dtype, tf32=tf32, capability=capability)
            assert_fits(aot.compile_sequence_forward(dtype, tile, **options))
            assert_fits(aot.compile_sequence_backward(dtype, tile, **options))


def test_without_resets_the_code_reads_none():
    tile = tiles.default_step_tile(16, ALIGNED, 2)
    for compiled in (aot.compile_sequence_forward, aot.compile_sequence_backward):
        assert "ld.global.b8" not in compiled(torch.float16, tile, hidden=ALIGNED).ptx
        assert "ld.global.b8" in compiled(torch.float16, tile, hidden=ALIGNED, keep=torch.bool).ptx
