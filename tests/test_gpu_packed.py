"""Packed sequences where a GPU is needed: cuDNN and kernels behind the op, compiled models, CUDA graphs; against torch."""

import copy
import warnings

import pytest
import torch
from problems import assert_same, ops, packed_args, value_and_grads
from test_packed_rewrite import Tagger, batch, counted
from torch import nn
from torch.library import opcheck
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import torch_gru_fuse
import torch_gru_fuse.functional as fused
from torch_gru_fuse.ops import cudnn_path, packed_path, torch_path, whole_path
from torch_gru_fuse.ops.call import PackedCall

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk"),
]

#: As test_gpu.py: both sides round operands to 2^-11 (tf32, fp16) or 2^-8 (bf16).
TOLERANCE = {"float64": 1e-12, "ieee": 5e-5, "tf32": 2e-2, "float16": 2e-2, "bfloat16": 1.5e-1}


@pytest.fixture(params=TOLERANCE)
def precision(request):
    """(dtype, tolerance) with torch's flags set."""
    name = request.param
    dtype = torch.float32 if name in ("ieee", "tf32") else getattr(torch, name)
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=name == "tf32"):
        yield dtype, TOLERANCE[name]
    torch.set_float32_matmul_precision("highest")


def args_of(**options):
    return packed_args(train=True, device="cuda", **options)  # cuDNN has no backward without train


def differentiated(args):
    return [args[0], args[2], *args[3]]


VARIANTS = [
    {},
    {"lengths": (1,), "I": 1, "H": 1, "L": 1},
    {"lengths": (9, 9, 8, 5, 5, 5, 1), "I": 33, "H": 65, "bidirectional": True},
    {"lengths": tuple(range(40, 0, -1)), "I": 16, "H": 160, "L": 1, "bias": False},
    {"lengths": (12, 12, 7, 1, 1), "I": 48, "H": 256, "L": 3, "bidirectional": True},
    {"lengths": (100, *[1] * 60), "I": 16, "H": 64},  # cuDNN's room is for 6100 rows, of which there are 160
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gives_what_cudnn_gives(precision, variant, nan_filled_empty):
    dtype, tolerance = precision
    args = args_of(dtype=dtype, **variant)
    inputs = differentiated(args)
    assert_same(value_and_grads(fused.gru_packed, args, inputs), value_and_grads(torch.gru, args, inputs), tolerance)
    with torch.no_grad():
        assert_same(fused.gru_packed(*args), torch.gru(*args), tolerance)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_masks(bias, bidirectional):
    """Layer by layer, against the CPU's in float64."""
    data, sizes, hx, params, _, L, *_ = packed_args((9, 7, 7, 2), I=8, H=32, L=3, bias=bias, bidirectional=bidirectional)
    width = 32 * (1 + bidirectional)
    masks = torch.bernoulli(torch.full((2, data.shape[0], width), 0.5)) * 2

    def run(masks):
        return lambda data, hx, params: ops.gru_packed_forward(data, sizes, hx, params, bias, L, bidirectional, masks, True)[:2]

    def moved(**kind):
        tensors = [t.detach().to(**kind).requires_grad_() for t in (data, hx, *params)]
        return value_and_grads(run(masks.to(**kind)), (*tensors[:2], tensors[2:]), tensors)

    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        actual = moved(device="cuda")
    assert_same([a.cpu().double() for a in actual], moved(dtype=torch.float64), 5e-5)


def test_without_cudnn():
    args = args_of(dtype=torch.float32, bidirectional=True)
    inputs = differentiated(args)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = value_and_grads(torch.gru, args, inputs)
    with torch.backends.cudnn.flags(enabled=False):
        assert_same(value_and_grads(fused.gru_packed, args, inputs), expected, 5e-5)
        with torch.no_grad():
            assert_same(fused.gru_packed(*args), expected[:2], 5e-5)


@pytest.mark.parametrize("first", [True, False])
def test_backward_knows_what_made_the_reserve(monkeypatch, first):
    args = args_of(dtype=torch.float32)
    inputs = differentiated(args)
    used = []
    for path in (cudnn_path, torch_path):
        backward = path.gru_backward
        monkeypatch.setattr(path, "gru_backward", lambda *a, p=path, b=backward: used.append(p) or b(*a))
    with torch.backends.cudnn.flags(enabled=first, allow_tf32=False):
        output, h_n = fused.gru_packed(*args)
    with torch.backends.cudnn.flags(enabled=not first, allow_tf32=False):
        grads = torch.autograd.grad(output.sum() + h_n.sum(), inputs)
    assert used == [cudnn_path if first else torch_path]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        output, h_n = torch.gru(*args)
        assert_same(grads, torch.autograd.grad(output.sum() + h_n.sum(), inputs), 5e-5)


def test_opcheck():
    data, sizes, hx, params, bias, L, *_ = args_of()
    masks = torch.ones(1, data.shape[0], 6, device="cuda")
    # A reserve has elements that are not used, so its values are no result to compare.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    for m in (None, masks):
        opcheck(ops.gru_packed_forward.default, (data, sizes, hx, params, bias, L, False, m, True), test_utils=utils)
    data, hx, *params = [t.detach() for t in (data, hx, *params)]
    opcheck(ops.gru_packed_forward.default, (data, sizes, hx, params, bias, L, False, None, False))
    output, h_n, reserve = ops.gru_packed_forward(data, sizes, hx, params, bias, L, False, masks, True)
    opcheck(ops.gru_packed_backward.default, (
        output, h_n, data, sizes, hx, params, bias, L, False, masks, output, reserve, [True] * (2 + len(params))
    ))  # fmt: skip


def test_wrong_sizes_are_errors():
    data, sizes, *rest = args_of()
    for wrong, message in ((sizes.flip(0), "must not increase"), (sizes + 1, "has a sum of"),
                           (sizes.cuda(), "expected it on the CPU")):  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            fused.gru_packed(data, wrong, *rest)
    torch.cuda.synchronize()


def synchronizations(function):
    """How often `function()` waits for the GPU, by torch's own account."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


def test_nothing_waits_for_the_gpu_but_what_cudnn_does():
    args = args_of(bidirectional=True)
    inputs = differentiated(args)

    def train(function):
        output, h_n = function(*args)
        torch.autograd.grad(output.sum() + h_n.sum(), inputs)

    for function in (fused.gru_packed, torch.gru):  # cuDNN's plans, workspaces
        train(function)
    assert synchronizations(lambda: train(fused.gru_packed)) <= synchronizations(lambda: train(torch.gru))


@pytest.mark.parametrize("batch_first", [False, True])
def test_packing_and_padding(batch_first):
    x = torch.randn(*((3, 5) if batch_first else (5, 3)), 2, device="cuda", requires_grad=True)
    lengths = torch.tensor([4, 4, 2])
    packed = pack_padded_sequence(x, lengths, batch_first)
    data, sizes = ops.pack_padded(x, lengths, batch_first)
    assert torch.equal(data, packed.data) and torch.equal(sizes, packed.batch_sizes) and not sizes.is_cuda
    for total_length in (None, 6):
        expected = pad_packed_sequence(packed, batch_first, -1.0, total_length)
        actual = ops.pad_packed(data, sizes, batch_first, -1.0, total_length, None)
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
        grad = torch.randn_like(actual[0])
        assert torch.equal(*(torch.autograd.grad(out[0], x, grad, retain_graph=True)[0] for out in (actual, expected)))


# ---- compiled models ----------------------------------------------------------------------------------------------------


def on_gpu(args):
    x, lengths, *rest = args
    return x.cuda(), lengths, *rest  # lengths stay on the CPU


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_compiled_models(mode, enforce_sorted):
    """Of the same size, other lengths: what a CUDA graph was recorded with must not stay."""
    model = Tagger(enforce_sorted, num_layers=2, bidirectional=True).cuda()
    calls = [on_gpu(batch(enforce_sorted, seed=seed)) for seed in (0, 0, 1, 2, 0)]
    calls += [on_gpu(batch(enforce_sorted, 5, 9, seed=seed)) for seed in (0, 1)]
    params = [*model.parameters()]
    with torch_gru_fuse.enable(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        compiled = torch.compile(model, fullgraph=True, mode=mode)
        for args in calls:
            expected = value_and_grads(model, args, params)
            actual, counts = counted(lambda args=args: [t.clone() for t in value_and_grads(compiled, args, params)])
            assert_same(actual, expected, 1e-4)
            assert counts == {"gru_forward": 1, "gru_backward": 1}
            with torch.no_grad():
                assert_same([t.clone() for t in compiled(*args)], model(*args), 1e-4)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_packed_outside_of_the_compiled_module(mode):
    """N and T are the same, batch_sizes are not: nothing but an input on the CPU says so."""
    rnn = nn.GRU(5, 64).cuda().requires_grad_(False)
    with torch_gru_fuse.enable(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        compiled = torch.compile(rnn, fullgraph=True, mode=mode)
        for lengths in ([5, 3, 3, 1], [5, 3, 3, 1], [5, 3, 3, 1], [5, 4, 2, 1], [5, 5, 1, 1], [5, 3, 3, 1]):
            packed = pack_padded_sequence(torch.randn(5, 4, 5, device="cuda"), lengths)
            (actual, h_n), (expected, expected_h_n) = compiled(packed), rnn(packed)
            assert_same([actual.data.clone(), h_n.clone()], [expected.data, expected_h_n], 1e-4)


def test_training_under_autocast():
    model = Tagger(num_layers=2, bidirectional=True).cuda()
    args, params = on_gpu(batch()), [*model.parameters()]

    def loss(model):
        def run(*args):
            with torch.autocast("cuda"):
                return model(*args)

        return run

    with torch_gru_fuse.enable():
        actual = value_and_grads(loss(torch.compile(model, fullgraph=True)), args, params)
    assert_same(actual, value_and_grads(loss(model), args, params), 4e-2)


def test_dropout_between_layers_in_training():
    """Different from one call to the next, the same for the same seed, zeros in no more than their share."""
    model = Tagger(num_layers=2, dropout=0.5).cuda().train()
    args = on_gpu(batch())
    with torch_gru_fuse.enable():
        compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
        results = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            results.append(compiled(*args)[0])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


# ---- kernels of whole sequences -----------------------------------------------------------------------------------------

WHOLE = [
    {"lengths": tuple(range(40, 0, -1)), "I": 24, "H": 256, "L": 2},
    {"lengths": (50, 50, 33, 20, 20, 7, 1), "I": 48, "H": 128, "L": 2, "bidirectional": True},
    {"lengths": (64,) * 9, "I": 16, "H": 64, "L": 3},
    {"lengths": (70, *[3] * 20, 1), "I": 33, "H": 256, "L": 3, "bidirectional": True},
    {"lengths": (33, 12), "I": 16, "H": 512, "L": 2, "bias": False},
    {"lengths": (20, 20, 9), "I": 8, "H": 32, "L": 1},
    {"lengths": (1, 1, 1), "I": 16, "H": 256, "L": 2},
    {"lengths": tuple(1 + n // 8 for n in range(300, 0, -1)), "I": 16, "H": 256, "L": 1},  # several tiles a program
    {"lengths": tuple(1 + n // 40 for n in range(700, 0, -1)), "I": 16, "H": 256, "L": 1, "bidirectional": True},
    {"lengths": tuple(range(60, 0, -1)), "I": 16, "H": 512, "L": 1},
]
HALF_BITS = {"tf32": 2**-11, "float16": 2**-11, "bfloat16": 2**-8}


@pytest.fixture(params=HALF_BITS)
def whole(request, monkeypatch):
    """(dtype, rounding) with torch's flags set, and our kernels forced."""
    monkeypatch.setenv("TORCH_GRU_FUSE_KERNELS", "triton")
    dtype = torch.float32 if request.param == "tf32" else getattr(torch, request.param)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        yield dtype, HALF_BITS[request.param]
    torch_gru_fuse.check_errors()


def kernel_of(args, training):
    data, sizes, hx, params, bias, L, _, _, bidirectional = args
    return packed_path.plan_of(PackedCall(data, sizes, hx, params, bias, L, bidirectional, None), training=training).kernel


def in_float64(args):
    data, sizes, hx, params, *flags = args
    tensors = [t.detach().double().cpu().requires_grad_() for t in (data, hx, *params)]
    return value_and_grads(fused.gru_packed, (tensors[0], sizes, tensors[1], tensors[2:], *flags), tensors)


def rms(actual, expected):
    return [(a.double().cpu() - e).square().mean().sqrt().item() / max(1.0, e.abs().max().item())
            for a, e in zip(actual, expected, strict=True)]  # fmt: skip


@pytest.mark.parametrize("variant", WHOLE, ids=str)
def test_kernels_are_as_exact_as_cudnn(whole, variant, nan_filled_empty):
    """Outputs and all gradients; the same bits again, and without gradients."""
    dtype, rounding = whole
    args = args_of(dtype=dtype, **variant)
    assert kernel_of(args, True) == kernel_of(args, False) == "whole"
    inputs = differentiated(args)
    exact = in_float64(args)
    ours, theirs = (value_and_grads(f, args, inputs) for f in (fused.gru_packed, torch.gru))
    for i, (own, cudnn) in enumerate(zip(rms(ours, exact), rms(theirs, exact), strict=True)):
        assert own <= 2 * cudnn + 2 * rounding, f"result {i}: {own:.1e}, cuDNN's {cudnn:.1e}"
    again = value_and_grads(fused.gru_packed, args, inputs)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(fused.gru_packed(*args), ours[:2], strict=True))


def test_kernels_recompute(whole):
    dtype, _ = whole
    args = args_of(dtype=dtype, **WHOLE[0])
    inputs = differentiated(args)
    kept, made_again = (
        value_and_grads(lambda *a, r=r: fused.gru_packed(*a, recompute=r), args, inputs) for r in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(kept, made_again, strict=True))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_between_layers_in_kernels(whole, bidirectional):
    dtype, rounding = whole
    data, sizes, hx, params, bias, L, *_ = args_of(
        dtype=dtype, lengths=(30, 30, 17, 9, 1), I=16, H=256, L=3, bidirectional=bidirectional
    )
    masks = torch.bernoulli(torch.full((2, data.shape[0], 256 * (1 + bidirectional)), 0.5)) * 2

    def run(tensors):
        placed = masks.to(tensors[0])
        return value_and_grads(
            lambda data, hx, params: ops.gru_packed_forward(data, sizes, hx, params, bias, L, bidirectional, placed, True)[:2],
            (*tensors[:2], tensors[2:]), tensors,
        )  # fmt: skip

    tensors = (data, hx, *params)
    exact = run([t.detach().double().cpu().requires_grad_() for t in tensors])
    assert max(rms(run(tensors), exact)) <= 16 * rounding


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_not_finite_in_one_sequence_stays_there(whole, value, bidirectional):
    dtype, _ = whole
    args = args_of(dtype=dtype, lengths=(20, 18, 18, 5, 1), I=16, H=256, bidirectional=bidirectional, requires_grad=False)
    data, sizes, hx, *rest = args
    finite = fused.gru_packed(*args)
    for b in (0, 2, 4):
        spoiled = hx.clone()
        spoiled[:, b, 3] = value
        output, h_n = fused.gru_packed(data, sizes, spoiled, *rest)
        own = torch.cat([torch.arange(n) == b for n in sizes.tolist()])
        others = [i for i in range(5) if i != b]
        assert torch.equal(output[~own], finite[0][~own]) and torch.equal(h_n[:, others], finite[1][:, others])
        assert not output[own].isfinite().all()


def test_nothing_waits_for_the_gpu_with_kernels(whole):
    dtype, _ = whole
    args = args_of(dtype=dtype, **WHOLE[1])
    inputs = differentiated(args)

    def train():
        output, h_n = fused.gru_packed(*args)
        torch.autograd.grad(output.sum() + h_n.sum(), inputs)

    train()
    assert synchronizations(train) == 0


def test_other_lengths_at_once(whole):
    """Lengths are copied without waiting: that of a call must not be those of the next."""
    dtype, rounding = whole
    calls = [args_of(dtype=dtype, lengths=(n, n // 2 + 1, 3), I=16, H=256, L=1, requires_grad=False) for n in range(20, 60)]
    results = [fused.gru_packed(*args) for args in calls]
    for args, ours in zip(calls, results, strict=True):
        assert_same(ours, torch.gru(*args), 16 * rounding)


def test_a_packed_wait_that_runs_out_is_an_error(whole, monkeypatch):
    dtype, _ = whole
    args = args_of(dtype=dtype, lengths=(30, 12), I=16, H=256, requires_grad=False)
    expected = fused.gru_packed(*args)
    monkeypatch.setenv("TORCH_GRU_FUSE_TIMEOUT_S", "0.05")
    monkeypatch.setattr(whole_path, "missing_programs", 1)
    fused.gru_packed(*args)
    with pytest.raises(RuntimeError, match="torch_gru_fuse.gru_packed: the wavefront kernel gave up"):
        torch_gru_fuse.check_errors()
    monkeypatch.setattr(whole_path, "missing_programs", 0)
    assert all(torch.equal(a, b) for a, b in zip(fused.gru_packed(*args), expected, strict=True))


def test_settings_choose_the_kernel(monkeypatch):
    args = args_of(dtype=torch.float16, lengths=(300, 200, 100), I=16, H=256)
    for value, kernel in (("auto", "whole"), ("triton", "whole"), ("torch", "torch")):
        monkeypatch.setenv("TORCH_GRU_FUSE_KERNELS", value)
        assert kernel_of(args, False) == kernel_of(args, True) == kernel
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        assert kernel_of(args_of(dtype=torch.float32, lengths=(300, 200), I=16, H=256), True) == "torch"
