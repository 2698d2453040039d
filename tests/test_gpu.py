"""The same as the CPU's tests where a GPU is needed: kernels behind the ops, compiled models, CUDA graphs.

How exact the kernels are is measured by `benchmarks/accuracy.py`; here results have to agree with cuDNN's within what both may
be off.
"""

import pytest
import torch
from problems import assert_same, cell_args, ops, tensors, value_and_grads
from problems import gru_args as any_gru_args
from test_rewrite import Stepper, Tagger, samples
from torch.library import opcheck

import torch_gru_fuse
import torch_gru_fuse.functional as fused

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk"),
]

def gru_args(**options):
    return any_gru_args(train=True, device="cuda", **options)  # cuDNN has no backward without train


#: Both sides round operands to 2^-11 (tf32, fp16) or 2^-8 (bf16); a few such errors add up over steps and gradients.
TOLERANCE = {"float64": 1e-12, "ieee": 5e-5, "tf32": 2e-2, "float16": 2e-2, "bfloat16": 1.5e-1}
PRECISIONS = list(TOLERANCE)


@pytest.fixture(params=PRECISIONS)
def precision(request):
    """(dtype, tolerance) with torch's flags set."""
    name = request.param
    dtype = torch.float32 if name in ("ieee", "tf32") else getattr(torch, name)
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=name == "tf32"):
        yield dtype, TOLERANCE[name]
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(params=["auto", "triton"])
def kernels(request, monkeypatch):
    monkeypatch.setenv("TORCH_GRU_FUSE_KERNELS", request.param)


VARIANTS = [
    {},
    {"T": 1, "B": 1, "I": 1, "H": 1, "L": 1},
    {"T": 9, "B": 17, "I": 33, "H": 65, "bidirectional": True, "batch_first": True},
    {"T": 6, "B": 70, "I": 16, "H": 160, "L": 1, "bias": False},
    {"T": 12, "B": 5, "I": 48, "H": 256, "L": 3, "bidirectional": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gru(precision, kernels, variant, nan_filled_empty):
    dtype, tolerance = precision
    args = gru_args(dtype=dtype, **variant)
    inputs = [args[0], args[1], *args[2]]
    assert_same(value_and_grads(fused.gru, args, inputs), value_and_grads(torch.gru, args, inputs), tolerance)
    with torch.no_grad():
        assert_same(fused.gru(*args), torch.gru(*args), tolerance)


def test_batch_of_none(kernels):
    """Results of size 0 and gradients that are zero, as on the CPU (cuDNN itself refuses)."""
    args = gru_args(B=0, dtype=torch.float16)
    output, h_n, *grads = value_and_grads(fused.gru, args, [args[0], args[1], *args[2]])
    assert output.shape == (5, 0, 6) and h_n.shape == (2, 0, 6)
    assert all(not g.any() and g.shape == t.shape for g, t in zip(grads, [args[0], args[1], *args[2]], strict=True))


@pytest.mark.parametrize(("B", "I", "H"), [(1, 1, 1), (17, 33, 65), (70, 16, 160), (0, 4, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_gru_cell(precision, kernels, B, I, H, bias, nan_filled_empty):
    dtype, tolerance = precision
    args = cell_args(B, I, H, bias=bias, dtype=dtype, device="cuda")
    inputs = [a for a in args if a is not None]
    assert_same(value_and_grads(fused.gru_cell, args, inputs), value_and_grads(torch.gru_cell, args, inputs), tolerance)
    with torch.no_grad():
        assert_same([fused.gru_cell(*args)], [torch.gru_cell(*args)], tolerance)


def test_non_contiguous(precision, kernels):
    dtype, tolerance = precision
    x, hx, params, *flags = gru_args(T=5, B=5, I=6, H=6, L=1, dtype=dtype, requires_grad=False)
    params = [params[0].t().contiguous().t(), *params[1:]]
    call = (x.transpose(0, 1), hx.transpose(0, 1).contiguous().transpose(0, 1), params, *flags)
    contiguous = (call[0], call[1].contiguous(), [p.contiguous() for p in call[2]], *flags)  # cuDNN wants it so
    assert_same(fused.gru(*call), torch.gru(*contiguous), tolerance)
    cell = (x[:, 0], hx[0, :1].expand(5, 6), *params)
    assert_same([fused.gru_cell(*cell)], [torch.gru_cell(*cell)], tolerance)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", [0, 1])
def test_nan_and_inf_spread_as_in_torch(kernels, where, value):
    args = gru_args(T=4, B=3, dtype=torch.float16, requires_grad=False)
    args[where][1, 1, 2] = value
    for ours, theirs in zip(fused.gru(*args), torch.gru(*args), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=0.02, atol=0.02)


def test_gradients_of_frozen_parts(kernels):
    x, hx, params, *flags = gru_args(dtype=torch.float32)
    x.requires_grad_(False)
    params[1].requires_grad_(False)
    inputs = [t for t in (hx, *params) if t.requires_grad]
    args = (x, hx, params, *flags)
    assert_same(value_and_grads(fused.gru, args, inputs), value_and_grads(torch.gru, args, inputs), TOLERANCE["tf32"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_opcheck(kernels, dtype):
    options = {"dtype": dtype, "device": "cuda"}
    close = {"rtol": 2e-2, "atol": 2e-2}  # cuDNN's training and inference kernels differ by as much as fp16 rounds
    x, hx, params, bias, L, *_ = args = gru_args(bidirectional=True, dtype=dtype)
    opcheck(ops.gru.default, args, **close)
    # A reserve has elements that the kernel of the day does not use, so its values are no result to compare.
    saving = (x, hx, params, bias, L, True, None, True)
    opcheck(ops.gru_forward.default, saving, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
    x, hx, *params = [t.detach() for t in (x, hx, *params)]
    opcheck(ops.gru_forward.default, (x, hx, params, bias, L, True, None, False), **close)
    saved = ops.gru_forward(x, hx, params, bias, L, True, None, True)
    backward = (torch.ones_like(saved[0]), None, x, hx, params, bias, L, True, None, saved[0], saved[2], [True] * 18)
    opcheck(ops.gru_backward.default, backward, **close)
    args = cell_args(**options)
    opcheck(ops.gru_cell.default, args, **close)
    opcheck(ops.gru_cell_forward.default, (*args, True), **close)
    args = [a.detach() for a in args]
    h, gates = ops.gru_cell_forward(*args, True)
    opcheck(ops.gru_cell_backward.default, (torch.ones_like(h), *args, gates, [True] * 6), **close)


@pytest.mark.parametrize("kind", ["gru", "gru_cell"])
def test_devices_must_agree(kind):
    args = list(gru_args() if kind == "gru" else cell_args(device="cuda"))
    args[0] = args[0].cpu()
    with pytest.raises(RuntimeError, match="hx is on cuda:0, but input is on cpu; move them to one device"):
        getattr(fused, kind)(*args)


# ---- compiled -----------------------------------------------------------------------------------------------------------


def on_gpu_compiled_equals_eager(model, args, tolerance, **options):
    with torch_gru_fuse.enable():
        compiled = torch.compile(model, fullgraph=True, **options)
        for _ in range(3):  # reduce-overhead: warm-up, recording, replay
            with torch.no_grad():
                actual = [t.clone() for t in tensors(compiled(*args))]
            trained = [t.clone() for t in value_and_grads(compiled, args, [*model.parameters()])]
    with torch.no_grad():
        assert_same(actual, tensors(model(*args)), tolerance)
    assert_same(trained, value_and_grads(model, args, [*model.parameters()]), tolerance)
    assert torch_gru_fuse.rewrites() and all(r.rewritten for r in torch_gru_fuse.rewrites())


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_model(precision, kernels, mode):
    dtype, tolerance = precision
    model = Tagger(num_layers=2, bidirectional=True).to("cuda", dtype)
    on_gpu_compiled_equals_eager(model, (torch.randn(7, 4, 5, device="cuda", dtype=dtype),), tolerance, mode=mode)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_cells(precision, mode):
    dtype, tolerance = precision
    model = Stepper().to("cuda", dtype)
    on_gpu_compiled_equals_eager(model, (torch.randn(3, 4, 5, device="cuda", dtype=dtype),), tolerance, mode=mode)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(kernels, dtype):
    model, x = Tagger(num_layers=2).cuda(), torch.randn(7, 4, 5, device="cuda")
    with torch.autocast("cuda", dtype=dtype):
        on_gpu_compiled_equals_eager(model, (x,), TOLERANCE[str(dtype).removeprefix("torch.")])


def test_lengths_change_without_recompiling(kernels):
    from torch._dynamo.utils import counters

    model = Tagger().cuda()
    with torch_gru_fuse.enable():
        compiled = torch.compile(model, fullgraph=True, dynamic=True)
        compiled(torch.randn(7, 4, 5, device="cuda"))
        graphs = counters["stats"]["unique_graphs"]
        for T, B in ((9, 3), (64, 2), (200, 33)):
            x = torch.randn(T, B, 5, device="cuda")
            with torch.no_grad():
                actual, expected = tensors(compiled(x)), tensors(model(x))
            assert_same(actual, expected, TOLERANCE["tf32"])
            assert_same(*(value_and_grads(f, (x,), [*model.parameters()])[:2] for f in (compiled, model)), TOLERANCE["tf32"])
    assert counters["stats"]["unique_graphs"] <= graphs + 1  # inference and training


def test_dropout_has_the_distribution_of_torch(kernels):
    rnn = torch.nn.GRU(64, 64, 3, dropout=0.5).cuda()
    x = torch.randn(100, 64, 64, device="cuda")
    with torch_gru_fuse.enable():
        compiled = torch.compile(rnn, fullgraph=True)
        torch.manual_seed(1)
        first = compiled(x)[0]
        assert not torch.equal(first, compiled(x)[0])
        torch.manual_seed(1)
        assert torch.equal(first, compiled(x)[0])
    # 400,000 outputs of one distribution: their standard deviations agree to a percent or so
    assert abs(first.std() / rnn(x)[0].std() - 1) < 0.03


@pytest.mark.parametrize(("kind", "sample"), list(samples()))
def test_module_samples_of_pytorch(precision, kernels, kind, sample):
    dtype, tolerance = precision

    def move(tree):
        return torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda t: t.detach().to("cuda", dtype).requires_grad_(t.requires_grad), tree
        )

    module = kind(*sample.constructor_input.args, **sample.constructor_input.kwargs).to("cuda", dtype)
    args, kwargs = move(sample.forward_input.args), move(sample.forward_input.kwargs)
    inputs = [t for t in tensors((args, kwargs)) if t.requires_grad] + list(module.parameters())
    with torch_gru_fuse.enable():
        compiled = torch.compile(module, fullgraph=True)
        actual, expected = (value_and_grads(lambda *a, f=f: f(*a, **kwargs), args, inputs) for f in (compiled, module))
    assert_same(actual, expected, tolerance)
