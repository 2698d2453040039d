"""What lies between the ops and the kernels, without a GPU: layers, directions, reserves, products, dropout.

The kernels run in Triton's interpreter on CPU tensors, those for whole sequences as `emulated`; cuDNN is played by `torch.gru`.
"""

import ctypes
import logging
from types import SimpleNamespace

import emulated
import interpreted
import pytest
import torch
from problems import assert_same, cell_args, gru_args

from torch_gru_fuse import check_errors, equations, torch_hooks
from torch_gru_fuse.kernels import launch
from torch_gru_fuse.ops import cudnn_path, kernel_backward, kernel_path, schemas, support, timeouts, whole_backward, whole_path
from torch_gru_fuse.ops.call import GRUCall
from torch_gru_fuse.ops.schemas import reserve_size
from torch_gru_fuse.planner.gpus import gpu_named
from torch_gru_fuse.planner.plan import Plan
from torch_gru_fuse.planner.tiles import POINTWISE_TILE, Tile
from torch_gru_fuse.planner.whole_sequence import ResidentPlan, StagedPlan, WavefrontPlan, WholeSequencePlan

TILE = Tile(16, 16, 16, 1, 1)
kernels = interpreted.load()
prepare = interpreted.load("kernels.prepare")
parameter_gradients = interpreted.load("kernels.parameter_gradients")


@pytest.fixture
def kernels_on_cpu(monkeypatch):
    """CPU tensors take the path of CUDA tensors, with interpreted kernels."""
    monkeypatch.setattr(kernel_backward, "sequence_backward", kernels.sequence_backward)
    for name in ("sequence_forward", "cell_forward", "cell_gates", "cell_backward"):
        monkeypatch.setattr(kernel_path, name, getattr(kernels, name))
    cuda_size = reserve_size
    monkeypatch.setattr(schemas, "reserve_size", lambda *a, cuda, bytes_each: cuda_size(*a, cuda=True, bytes_each=bytes_each))
    monkeypatch.setattr(support, "why_not_kernels", lambda tensor: None)
    monkeypatch.setattr(kernel_path, "why_not_kernels", lambda tensor: None)
    monkeypatch.setattr(kernel_path, "gpu_of", lambda index: gpu_named("rtx4090"))
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 0))
    for module in (whole_path, whole_backward, kernel_backward):
        monkeypatch.setattr(module, "driver", driver)
    monkeypatch.setattr(launch, "launcher", emulated_launcher)
    monkeypatch.setattr(launch, "load_ahead", lambda launchers, device: None)  # nothing is compiled
    monkeypatch.setattr(kernel_path, "_plans", {})
    monkeypatch.setattr(kernel_path, "_warmed", set())
    monkeypatch.setattr(kernel_path, "_input_projection", lambda rows, weight, out: torch.mm(rows, weight.t(), out=out))


def plan(monkeypatch, kernel, tile=TILE, whole=None, backward=None):
    chosen = Plan(kernel, tile, False, "test", whole, backward=backward, backward_tile=tile)
    kernel_path._plans.clear()
    monkeypatch.setattr(kernel_path, "plan_gru", lambda *_, **__: chosen)
    monkeypatch.setattr(kernel_path, "plan_gru_cell", lambda *_, **__: chosen)


def reference(x, hx, params, bias, L, bidirectional, masks, grads):
    """Outputs and gradients in float64 from the equations, differentiated by autograd."""
    tensors = [t.double().requires_grad_() for t in (x, hx, *params)]
    outputs = equations.gru(
        tensors[0], tensors[1], tensors[2:], bias, L, bidirectional, None if masks is None else masks.double()
    )
    used = [(o, g.double()) for o, g in zip(outputs, grads, strict=True) if g is not None]
    gradients = torch.autograd.grad([o for o, _ in used], tensors, [g for _, g in used])
    return [o.float() for o in outputs], [g.float() for g in gradients]


def cudnn_forward(x, hx, params, has_biases, layers, bidirectional, step_sizes):
    assert not step_sizes
    output, h_n = torch.gru(x, hx, params, has_biases, layers, 0.0, False, bidirectional, False)
    # A reserve of the size that cuDNN asks for, with a mark that shows whether it comes back.
    T, B, H, D = *x.shape[:2], hx.shape[2], 2 if bidirectional else 1
    size = (6 * layers + layers - 1) * T * B * H * D * 4 + 256
    mark = int(abs(float(output.sum())) * 1e4) % 251
    return torch_hooks.CudnnGRU(output, h_n, torch.full((size,), mark, dtype=torch.uint8))


def cudnn_backward(
    grad_output, grad_h_n, x, hx, params, has_biases, layers, bidirectional, step_sizes, output, reserve, *, need_weights
):  # fmt: skip
    mark = int(abs(float(output.sum())) * 1e4) % 251
    assert (reserve[:256] == mark).all()
    reserve.fill_(255)  # cuDNN writes into it
    tensors = [t.detach().requires_grad_() for t in (x, hx, *params)]
    with torch.enable_grad():
        outputs = torch.gru(tensors[0], tensors[1], tensors[2:], has_biases, layers, 0.0, False, bidirectional, False)
    grads = [torch.zeros_like(o) if g is None else g for o, g in zip(outputs, (grad_output, grad_h_n), strict=True)]
    dx, dhx, *weights = torch.autograd.grad(outputs, tensors, grads)
    return dx, dhx, weights if need_weights else [None] * len(weights)


VARIANTS = [
    {"L": 1},
    {"L": 3, "bidirectional": True},
    {"L": 2, "bias": False},
    {"T": 1, "B": 1, "I": 1, "H": 1, "L": 2},
]


@pytest.mark.parametrize("kernel", ["step", "torch"])
@pytest.mark.parametrize("dropout", [False, True], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gru(kernels_on_cpu, monkeypatch, variant, dropout, kernel):
    plan(monkeypatch, kernel)
    monkeypatch.setattr(torch_hooks, "cudnn_gru_forward", cudnn_forward)
    monkeypatch.setattr(torch_hooks, "cudnn_gru_backward", cudnn_backward)
    monkeypatch.setattr(torch_hooks, "cudnn_runs", lambda tensor: True)
    x, hx, params, bias, L, _, _, bidirectional, _ = gru_args(**variant, requires_grad=False)
    D = 2 if bidirectional else 1
    size = (x.shape[0], x.shape[1], D * hx.shape[2])
    masks = torch.bernoulli(torch.full((L - 1, *size), 0.5)) * 2 if dropout and L > 1 else None
    call = GRUCall(x, hx, params, bias, L, bidirectional, masks)

    inference = kernel_path.gru_forward(call, False)
    output, h_n, reserve = kernel_path.gru_forward(call, True)
    assert inference[2].numel() == 0
    assert reserve.shape == schemas.empty_gru_results(x, hx, L, bidirectional, True)[2].shape
    grads = torch.randn_like(output), torch.randn_like(h_n)
    kept = reserve.clone()
    for way, (grad_output, grad_h_n) in enumerate((grads, (grads[0], None), (None, grads[1]))):
        expected, expected_grads = reference(x, hx, params, bias, L, bidirectional, masks, (grad_output, grad_h_n))
        assert_same([output, h_n], expected, 2e-6)  # float32 sums of at most 40 terms of size one
        assert_same(inference[:2], expected, 2e-6)
        needs = [True] * (2 + len(params))
        gradients = kernel_path.gru_backward(call, grad_output, grad_h_n, output, reserve, needs)
        assert_same(gradients, expected_grads, 5e-6)
        assert torch.equal(reserve.view(torch.uint8), kept.view(torch.uint8))  # still good for another backward
        skipped = (way + VARIANTS.index(variant)) % 3  # all three with all three ways, over the variants
        needs = [i % 3 != skipped for i in range(2 + len(params))]
        some = kernel_path.gru_backward(call, grad_output, grad_h_n, output, reserve, needs)
        assert_same(some, [g for g, need in zip(expected_grads, needs, strict=True) if need], 5e-6)
    pointers = [g.untyped_storage().data_ptr() for g in gradients]
    assert len(set(pointers)) == len(pointers)  # an op's outputs share no memory


@pytest.mark.parametrize("kernel, tile", [("cell", TILE), ("gates", POINTWISE_TILE)])
@pytest.mark.parametrize("bias", [True, False])
def test_gru_cell(kernels_on_cpu, monkeypatch, kernel, tile, bias):
    plan(monkeypatch, kernel, tile)
    args = cell_args(5, 3, 7, bias=bias, requires_grad=False)
    h, gates = kernel_path.gru_cell_forward(*args, True)
    alone, nothing = kernel_path.gru_cell_forward(*args, False)
    assert_same([h, alone], [torch.gru_cell(*args)] * 2, 1e-6)
    assert gates.shape == (5, 4, 7) and nothing.numel() == 0
    grad = torch.randn_like(h)
    expected = equations.gru_cell_backward(*(None if a is None else a.double() for a in (grad, *args)))
    needs = [a is not None for a in args]
    actual = kernel_path.gru_cell_backward(grad, *args, gates, needs)
    assert_same(actual, [e.float() for e in expected if e is not None], 2e-6)
    needs = [i in (1, 3) for i in range(6)]
    some = kernel_path.gru_cell_backward(grad, *args, gates, needs)
    assert_same(some, [expected[1].float(), expected[3].float()], 2e-6)


def test_empty_batch(kernels_on_cpu):
    x, hx, params, bias, L, *_ = gru_args(B=0, requires_grad=False)
    call = GRUCall(x, hx, params, bias, L, False, None)
    output, h_n, reserve = kernel_path.gru_forward(call, True)
    assert output.shape == (5, 0, 6) and h_n.shape == (2, 0, 6)
    needs = [True] * (2 + len(params))
    grads = kernel_path.gru_backward(call, output, h_n, output, reserve, needs)
    assert_same(grads, [torch.zeros_like(t) for t in (x, hx, *params)], 0)


def test_reserve_that_is_too_small_is_an_error(kernels_on_cpu, monkeypatch):
    def greedy(*args):
        result = cudnn_forward(*args)
        return result._replace(reserve=result.reserve.new_zeros(2 * result.reserve.numel() + 10_000))

    monkeypatch.setattr(torch_hooks, "cudnn_gru_forward", greedy)
    x, hx, params, bias, L, *_ = gru_args(requires_grad=False)
    with pytest.raises(RuntimeError, match="cuDNN .* asks for .* bytes of reserve, .* set TORCH_GRU_FUSE_KERNELS=triton"):
        cudnn_path.gru_forward(GRUCall(x, hx, params, bias, L, False, None), True)


# ---- whole sequences ----------------------------------------------------------------------------------------------------


def emulated_launcher(kernel, device, constants, types):
    """Runs a kernel for whole sequences, or what prepares it, at the addresses that it is given."""

    def at(pointer, count):
        memory = (ctypes.c_uint8 * (count * pointer.dtype.itemsize)).from_address(pointer.data_ptr())
        return torch.frombuffer(memory, dtype=pointer.dtype)

    def run_prepare(kernel, grid, a):
        H, L, B = a["H"], a["LANES"], a["B"]
        N = a["T"] * (1 if a["PACKED"] else B)
        if "p_x" in a:
            a |= {"p_w": tuple(at(w, 3 * H * a["I"]) for w in a["p_w"]), "p_x": at(a["p_x"], N * a["I"])}
            a |= {"p_gi": at(a["p_gi"], len(a["p_w"]) * N * 3 * H)}
        if not a.get("PREPARE", True):
            unused = ("p_hx", "p_host", "p_out", "p_below", "p_h0", "p_h_n", "p_error")
            kernel[grid](**(a | {name: torch.empty(0, dtype=a[name].dtype) for name in unused}))
            return
        a |= {"p_hx": at(a["p_hx"], L * B * a["HX"]), "p_out": at(a["p_out"], N * H * (1 + a["REVERSE"]))}
        stack = L > 1 and not a["REVERSE"]
        a |= {"p_below": at(a["p_below"], (L - 1) * N * H) if stack else a["p_out"], "p_h_n": at(a["p_h_n"], L * B * H)}
        a |= {"p_h0": at(a["p_h0"], L * B * H)} if a["STATES"] else dict.fromkeys(("p_hx", "p_h0", "p_h_n"), a["p_out"])
        a |= {"p_error": at(a["p_error"], 4), "p_host": at(a["p_host"], 1)}
        kernel[grid](**a)

    def run_parameter_gradients(grid, a):
        H, programs = a["H"], a["PROGRAMS"]
        sizes = {"p_sums": programs * 4 * H, "p_rotated": 3 * H * H, "p_w": 3 * H * H, "p_b_ih": 3 * H, "p_b_hh": 3 * H}
        a |= {name: a[name] and tuple(at(p, size) for p in a[name]) for name, size in sizes.items()}
        parameter_gradients.parameter_gradients_kernel[grid](**a)

    def run(grid, stream, values, aligned):
        assert len(values) == len(types)
        pointers = (launch.Launcher._pointer(v, t) for v, t in zip(values, types, strict=True))
        arguments = dict(zip(kernel.arg_names, pointers, strict=False)) | constants
        name = kernel.fn.__name__
        if name in ("prepare_kernel", "project_kernel"):
            run_prepare(getattr(prepare, name), grid, arguments)
        elif name == "parameter_gradients_kernel":
            run_parameter_gradients(grid, arguments)
        else:
            module = getattr(emulated.EMULATED, name.removesuffix("_kernel"))
            with emulated.one_thread():
                emulated.run(getattr(module, name), grid, arguments)

    return run


@pytest.fixture
def whole_on_cpu(kernels_on_cpu, monkeypatch):
    """Kernels for whole sequences, too; yields what stands for the word that the GPU writes to."""
    for module in (whole_path, whole_backward):
        module._recipes.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(kernel_path, "_refused", {})
    monkeypatch.setattr(kernel_backward, "_refused", {})
    word = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setitem(timeouts._words, -1, timeouts._Word(word, ctypes.c_int32.from_address(word.data_ptr())))
    yield word
    whole_path._recipes.clear()
    whole_backward._recipes.clear()


SPREAD, RESIDENT = WavefrontPlan(16, 8, 2), ResidentPlan(32, 8, 2)
WHOLE_CASES = [
    pytest.param({"L": 1, "H": 32, "I": 5}, WholeSequencePlan(1, SPREAD), False, id="one layer"),
    pytest.param({"L": 3, "H": 32}, WholeSequencePlan(3, SPREAD), False, id="stack"),
    pytest.param({"L": 3, "H": 20}, WholeSequencePlan(3, SPREAD), False, id="stack, padded"),
    pytest.param({"L": 3, "H": 32}, WholeSequencePlan(1, SPREAD), False, id="layer by layer"),
    pytest.param({"L": 3, "H": 32}, WholeSequencePlan(3, SPREAD), True, id="stack, dropout"),
    pytest.param({"L": 3, "H": 20}, WholeSequencePlan(3, SPREAD), True, id="stack, dropout, padded"),
    pytest.param({"L": 2, "H": 32}, WholeSequencePlan(2, RESIDENT), True, id="resident stack, dropout"),
    pytest.param({"L": 3, "H": 32}, WholeSequencePlan(1, SPREAD), True, id="dropout"),
    pytest.param({"L": 2, "H": 20}, WholeSequencePlan(1, SPREAD), True, id="dropout, padded"),
    pytest.param({"L": 2, "H": 32, "bidirectional": True}, WholeSequencePlan(2, SPREAD), True, id="two directions, dropout"),
    pytest.param({"L": 2, "H": 20, "bidirectional": True}, WholeSequencePlan(2, SPREAD), True, id="two directions, padded"),
    pytest.param({"L": 2, "H": 32, "bias": False}, WholeSequencePlan(2, SPREAD), False, id="no biases"),
    pytest.param({"L": 1, "H": 32}, WholeSequencePlan(1, RESIDENT), False, id="resident"),
    pytest.param({"L": 2, "H": 32}, WholeSequencePlan(2, RESIDENT), False, id="resident stack"),
    pytest.param({"L": 2, "H": 20, "bias": False}, WholeSequencePlan(2, RESIDENT), False, id="resident stack, padded"),
    pytest.param(
        {"L": 2, "H": 20, "bidirectional": True}, WholeSequencePlan(2, RESIDENT), True, id="resident, two directions, padded"
    ),
]


def whole_call(variant, dropout=False):
    x, hx, params, bias, L, _, _, bidirectional, _ = gru_args(**variant, requires_grad=False)
    size = (*x.shape[:2], hx.shape[2] * (1 + bidirectional))
    masks = torch.bernoulli(torch.full((L - 1, *size), 0.5)) * 2 if dropout else None
    return GRUCall(x, hx, params, bias, L, bidirectional, masks)


@pytest.mark.parametrize("variant, whole, dropout", WHOLE_CASES)
def test_whole_sequences(whole_on_cpu, monkeypatch, variant, whole, dropout):
    plan(monkeypatch, "whole", whole=whole)
    call = whole_call(variant, dropout)
    call = call._replace(input=call.input.transpose(0, 1).contiguous().transpose(0, 1))  # as batch_first gives it
    inference = kernel_path.gru_forward(call, False)
    output, h_n, reserve = kernel_path.gru_forward(call, True)
    assert inference[2].numel() == 0
    assert reserve.shape == schemas.empty_gru_results(*call[:2], call.L, call.bidirectional, True)[2].shape
    grads = torch.randn_like(output), torch.randn_like(h_n)
    masks = call.dropout_masks
    expected, expected_grads = reference(*call[:6], masks, grads)
    assert_same([output, h_n], expected, 2e-3)  # operands are rounded to tf32
    assert_same(inference[:2], expected, 2e-3)
    gradients = kernel_path.gru_backward(call, *grads, output, reserve, [True] * (2 + len(call.params)))
    assert_same(gradients, expected_grads, 4e-3)


BACKWARD_CASES = [
    # variant, plan of the backward, dropout
    pytest.param({"L": 1, "H": 32, "I": 5}, WholeSequencePlan(1, SPREAD), False, id="one layer"),
    pytest.param({"L": 3, "H": 32}, WholeSequencePlan(3, SPREAD), False, id="stack"),
    pytest.param({"L": 3, "H": 32}, WholeSequencePlan(1, SPREAD), True, id="layer by layer, dropout"),
    pytest.param({"L": 3, "H": 32}, WholeSequencePlan(3, SPREAD), True, id="stack, dropout"),
    pytest.param({"L": 2, "H": 32, "bidirectional": True}, WholeSequencePlan(2, SPREAD), True, id="two directions, dropout"),
    pytest.param({"L": 2, "H": 32, "bias": False}, WholeSequencePlan(2, SPREAD), False, id="no biases"),
    pytest.param({"L": 2, "H": 32, "T": 1}, WholeSequencePlan(2, SPREAD), False, id="one step"),
    pytest.param({"L": 2, "H": 32}, WholeSequencePlan(1, RESIDENT), True, id="resident, dropout"),
    pytest.param({"L": 1, "H": 32, "bidirectional": True}, WholeSequencePlan(2, RESIDENT), False, id="resident, directions"),
    pytest.param({"L": 1, "H": 64}, WholeSequencePlan(1, StagedPlan(16, 8, 1, 1, 1)), False, id="staged"),
]


@pytest.mark.parametrize("forward", ["step", "whole"])
@pytest.mark.parametrize("variant, backward, dropout", BACKWARD_CASES)
def test_backward_of_whole_sequences(whole_on_cpu, monkeypatch, variant, backward, dropout, forward):
    """Whatever made the gates; gradients of the output, of h_n or of both; all that are needed and no others."""
    plan(monkeypatch, forward, whole=backward, backward=backward)
    call = whole_call(variant, dropout)
    output, h_n, reserve = kernel_path.gru_forward(call, True)
    both = torch.randn_like(output).transpose(0, 1).contiguous().transpose(0, 1), torch.randn_like(h_n)
    needs = [[True] * (2 + len(call.params)), [i % 3 != 1 for i in range(2 + len(call.params))], [False, True]]
    needs[2] += [False] * len(call.params)
    for grads, need in zip((both, (both[0], None), (None, both[1])), needs, strict=True):
        _, expected = reference(*call[:6], call.dropout_masks, grads)
        gradients = kernel_path.gru_backward(call, *grads, output, reserve, need)
        assert_same(gradients, [g for g, n in zip(expected, need, strict=True) if n], 4e-3)


def test_backward_that_does_not_fit_takes_a_launch_a_step(whole_on_cpu, monkeypatch, caplog):
    def refusing(kernel, *args):
        def run(*_):
            raise launch.DoesNotFit("too many blocks in cooperative launch")

        return emulated_launcher(kernel, *args) if "parameter" in kernel.fn.__name__ else run

    monkeypatch.setattr(launch, "launcher", refusing)
    plan(monkeypatch, "step", backward=WholeSequencePlan(2, SPREAD))
    call = whole_call({"L": 2, "H": 32})
    grads = torch.randn(5, 3, 32), None
    _, expected = reference(*call[:6], None, grads)
    output, _, reserve = kernel_path.gru_forward(call, True)
    with caplog.at_level(logging.WARNING, logger="torch_gru_fuse"):
        for _ in range(2):
            gradients = kernel_path.gru_backward(call, *grads, output, reserve, [True] * (2 + len(call.params)))
            assert_same(gradients, expected, 5e-6)
    assert [r.message for r in caplog.records] == [
        "torch_gru_fuse.gru: the backward of whole sequences in one launch does not fit, one launch a step runs: "
        f"too many blocks in cooperative launch (cuda:-1, {WholeSequencePlan(2, SPREAD)})"
    ]


def test_parameters_need_not_be_contiguous(whole_on_cpu, monkeypatch):
    plan(monkeypatch, "whole", whole=WholeSequencePlan(2, SPREAD))
    call = whole_call({"L": 2, "H": 32})
    expected = kernel_path.gru_forward(call, False)[:2]
    strange = [p.t().contiguous().t() if p.dim() == 2 else p.repeat_interleave(2)[::2] for p in call.params]
    strange = call._replace(params=strange, hx=call.hx.transpose(0, 1).contiguous().transpose(0, 1))
    assert_same(kernel_path.gru_forward(strange, False)[:2], expected, 0)


def test_tensors_need_not_be_aligned(whole_on_cpu, monkeypatch):
    """Pieces of a buffer: kernels read 16 bytes at once and get copies."""
    launched = []
    original = whole_path.launch.launcher

    def watching(*args):
        run = original(*args)

        def watch(grid, stream, values, aligned):
            launched.append(aligned)
            return run(grid, stream, values, aligned)

        return watch

    monkeypatch.setattr(whole_path.launch, "launcher", watching)
    plan(monkeypatch, "whole", whole=WholeSequencePlan(2, SPREAD), backward=WholeSequencePlan(2, SPREAD))
    call = whole_call({"L": 2, "H": 32})
    odd = lambda t: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape)  # noqa: E731
    strange = call._replace(params=[odd(p) for p in call.params], hx=odd(call.hx))
    assert all(t.data_ptr() % 16 for t in (strange.hx, *strange.params))
    output, h_n, reserve = kernel_path.gru_forward(strange, True)
    grads = odd(torch.randn_like(output)), odd(torch.randn_like(h_n))
    gradients = kernel_path.gru_backward(strange, *grads, output, reserve, [True] * (2 + len(call.params)))
    expected, expected_grads = reference(*call[:6], None, grads)
    assert_same([output, h_n], expected, 2e-3)
    assert_same(gradients, expected_grads, 4e-3)
    assert launched == [True] * 5  # two each, and gradients of parameters


def test_inf_does_not_spread_through_padding(whole_on_cpu, monkeypatch):
    """Inf in h0: what the equations give, though there are units whose weights are 0."""
    for kernel in (SPREAD, RESIDENT):
        plan(monkeypatch, "whole", whole=WholeSequencePlan(2, kernel))
        call = whole_call({"L": 2, "H": 20})
        call.hx[0, 1, 3] = float("inf")
        expected = torch.gru(*call[:5], 0.0, False, False, False)
        for ours, theirs in zip(kernel_path.gru_forward(call, False)[:2], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3, equal_nan=True)


def test_a_wait_that_ran_out_is_an_error(whole_on_cpu, monkeypatch):
    monkeypatch.setattr(whole_path, "missing_programs", 1)
    monkeypatch.setenv("TORCH_GRU_FUSE_TIMEOUT_S", "2.5")
    plan(monkeypatch, "whole", whole=WholeSequencePlan(2, SPREAD))
    call = whole_call({"L": 2, "H": 32})
    output, h_n, _ = kernel_path.gru_forward(call, False)
    assert output[1:].isnan().all() and h_n[1].isnan().all()
    with pytest.raises(RuntimeError) as error:
        timeouts.check(-1)
    for part in (
        "torch_gru_fuse.gru: the wavefront kernel gave up", "2.5 s", "T=5, B=3, I=4, H=32, num_layers=2", "float32",
        "WavefrontPlan(units=16", "TORCH_GRU_FUSE_KERNELS=torch", "TORCH_GRU_FUSE_TIMEOUT_S", "NaN",
    ):  # fmt: skip
        assert part in str(error.value)
    timeouts.check(-1)  # once
    monkeypatch.setattr(whole_path, "missing_programs", 0)
    expected = torch.gru(*call[:5], 0.0, False, False, False)
    assert_same(kernel_path.gru_forward(call, False)[:2], list(expected), 2e-3)
    timeouts.check(-1)


def test_errors_are_raised_by_synchronizing(whole_on_cpu, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: calls.append(device))
    monkeypatch.setattr(torch_hooks, "_after_synchronize", [])
    torch_hooks.after_synchronize(timeouts._check_all)
    torch_hooks.after_synchronize(lambda: None)
    launch_id = timeouts.id_of(timeouts.Call("gru", "T=1", "wavefront", "a plan", 10**9))
    assert launch_id == timeouts.id_of(timeouts.Call("gru", "T=1", "wavefront", "a plan", 10**9))
    torch.cuda.synchronize(3)
    assert calls == [3]
    for check in (torch.cuda.synchronize, check_errors):
        whole_on_cpu.fill_(launch_id)
        with pytest.raises(RuntimeError, match="the wavefront kernel gave up on cuda:-1.*waited 1 s.*Sizes: T=1. Plan: a plan"):
            check()
        assert whole_on_cpu == 0
    check_errors()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    whole_on_cpu.fill_(launch_id)
    timeouts.check(-1)  # an exception would spoil the graph
    assert whole_on_cpu == launch_id


@pytest.mark.parametrize("text", ["0", "-1", "soon", "inf", "nan", ""])
def test_time_limits_that_make_no_sense(monkeypatch, text):
    monkeypatch.setenv("TORCH_GRU_FUSE_TIMEOUT_S", text)
    with pytest.raises(ValueError, match=f"TORCH_GRU_FUSE_TIMEOUT_S is '{text}', expected a number of seconds"):
        timeouts.timeout_ns()


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("cudnn", [False, True])
def test_launch_that_does_not_fit(whole_on_cpu, monkeypatch, caplog, save, cudnn):
    """Fewer programs on the GPU than planned: another kernel runs, now and from then on, and that is said once."""
    tried = []

    def refusing(kernel, *args):
        def run(grid, *rest):
            tried.append(grid)
            raise launch.DoesNotFit("too many blocks in cooperative launch")

        return emulated_launcher(kernel, *args) if "parameter" in kernel.fn.__name__ else run

    monkeypatch.setattr(launch, "launcher", refusing)
    monkeypatch.setattr(torch_hooks, "cudnn_runs", lambda tensor: cudnn)
    whole = WholeSequencePlan(2, SPREAD)
    plan(monkeypatch, "whole", whole=whole)
    call = whole_call({"L": 2, "H": 32})
    grads = torch.randn(5, 3, 32), None
    expected, expected_grads = reference(*call[:6], None, grads)
    with caplog.at_level(logging.WARNING, logger="torch_gru_fuse"):
        for _ in range(2):
            output, h_n, reserve = kernel_path.gru_forward(call, save)
            assert_same([output, h_n], expected, 2e-6)
            if save:
                gradients = kernel_path.gru_backward(call, *grads, output, reserve, [True] * (2 + len(call.params)))
                assert_same(gradients, expected_grads, 5e-6)
    assert len(tried) == 1
    assert [r.message for r in caplog.records] == [
        "torch_gru_fuse.gru: whole sequences in one launch do not fit, another kernel runs: "
        f"too many blocks in cooperative launch (cuda:-1, {whole})"
    ]


def test_backward_knows_what_made_the_reserve(whole_on_cpu, monkeypatch):
    """Settings changed between forward and backward; cuDNN's reserve is not ours."""
    monkeypatch.setattr(torch_hooks, "cudnn_gru_forward", cudnn_forward)
    monkeypatch.setattr(torch_hooks, "cudnn_gru_backward", cudnn_backward)
    monkeypatch.setattr(torch_hooks, "cudnn_runs", lambda tensor: True)
    call = whole_call({"L": 2, "H": 32})
    grads = torch.randn(5, 3, 32), None
    _, expected = reference(*call[:6], None, grads)
    needs = [True] * (2 + len(call.params))
    for forward, backward in (("step", "torch"), ("torch", "step"), ("torch", "whole"), ("whole", "torch")):
        plan(monkeypatch, forward, whole=WholeSequencePlan(2, SPREAD))
        output, _, reserve = kernel_path.gru_forward(call, True)
        plan(monkeypatch, backward, whole=WholeSequencePlan(2, SPREAD))
        for _ in range(2):
            assert_same(kernel_path.gru_backward(call, *grads, output, reserve, needs), expected, 4e-3)
    # a copy is not known: the plan of now decides
    copy = reserve.clone()
    assert kernel_path._made_by.get(reserve) is not None and kernel_path._made_by.get(copy) is None
    plan(monkeypatch, "step")
    assert_same(kernel_path.gru_backward(call, *grads, output, copy, needs), expected, 4e-3)


def test_storage_table_forgets():
    table = torch_hooks.StorageTable()
    kept = torch.empty(3)
    table.put(kept, "kept")
    for i in range(1000):
        table.put(torch.empty(3), i)
    assert table.get(kept) == table.get(kept[1:]) == "kept" and table.get(torch.empty(3)) is None
    assert len(table._entries) <= 64


@pytest.mark.parametrize("training", [False, True])
def test_capture_takes_only_what_has_run(kernels_on_cpu, monkeypatch, training):
    """Where only a CUDA graph takes whole sequences, the first call that is not captured runs them, the others do not."""
    whole = WholeSequencePlan(1, SPREAD)

    def plans(*_, captured, **__):
        return Plan("whole" if captured else "torch", TILE, False, "test", whole)

    monkeypatch.setattr(kernel_path, "plan_gru", plans)
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    call = whole_call({"L": 1, "H": 32})

    class OnCuda(SimpleNamespace):
        is_cuda = True

        def get_device(self):
            return 0

    call = call._replace(input=OnCuda(shape=call.input.shape, dtype=call.input.dtype))
    monkeypatch.setattr(torch_hooks, "cudnn_runs", lambda tensor: True)
    capturing = True
    assert kernel_path.plan_of(call, training=training).kernel == "torch"
    assert kernel_path._first_of_its_kind(call, training) is None
    capturing = False
    assert kernel_path.plan_of(call, training=training).kernel == "torch"
    assert kernel_path._first_of_its_kind(call, training).kernel == "whole"
    assert kernel_path._first_of_its_kind(call, training) is None
    capturing = True
    assert kernel_path.plan_of(call, training=training).kernel == "whole"
