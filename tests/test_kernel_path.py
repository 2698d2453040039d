"""What lies between the ops and the kernels, without a GPU: layers, directions, reserves, products, dropout.

The kernels run in Triton's interpreter on CPU tensors; cuDNN is played by `torch.gru`.
"""

import interpreted
import pytest
import torch
from problems import assert_same, cell_args, gru_args

from torch_gru_fuse import equations, torch_hooks
from torch_gru_fuse.ops import cudnn_path, kernel_path, schemas, support
from torch_gru_fuse.ops.call import GRUCall
from torch_gru_fuse.ops.schemas import reserve_size
from torch_gru_fuse.planner.plan import Plan
from torch_gru_fuse.planner.tiles import POINTWISE_TILE, Tile

TILE = Tile(16, 16, 16, 1, 1)
kernels = interpreted.load()


@pytest.fixture
def kernels_on_cpu(monkeypatch):
    """CPU tensors take the path of CUDA tensors, with interpreted kernels."""
    for name in ("sequence_forward", "sequence_backward", "cell_forward", "cell_gates", "cell_backward"):
        monkeypatch.setattr(kernel_path, name, getattr(kernels, name))
    cuda_size = reserve_size
    monkeypatch.setattr(schemas, "reserve_size", lambda *a, cuda, bytes_each: cuda_size(*a, cuda=True, bytes_each=bytes_each))
    monkeypatch.setattr(support, "why_not_kernels", lambda tensor: None)
    monkeypatch.setattr(kernel_path, "why_not_kernels", lambda tensor: None)
    monkeypatch.setattr(kernel_path, "_input_projection", lambda rows, weight, out: torch.mm(rows, weight.t(), out=out))


def plan(monkeypatch, kernel, tile=TILE):
    chosen = Plan(kernel, tile, False, "test")
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


def cudnn_forward(x, hx, params, has_biases, layers, bidirectional):
    output, h_n = torch.gru(x, hx, params, has_biases, layers, 0.0, False, bidirectional, False)
    # A reserve of the size that cuDNN asks for, with a mark that shows whether it comes back.
    T, B, H, D = *x.shape[:2], hx.shape[2], 2 if bidirectional else 1
    size = (6 * layers + layers - 1) * T * B * H * D * 4 + 256
    mark = int(abs(float(output.sum())) * 1e4) % 251
    return torch_hooks.CudnnGRU(output, h_n, torch.full((size,), mark, dtype=torch.uint8))


def cudnn_backward(
    grad_output, grad_h_n, x, hx, params, has_biases, layers, bidirectional, output, reserve, *, need_weights
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
    for grad_output, grad_h_n in (grads, (grads[0], None), (None, grads[1])):
        expected, expected_grads = reference(x, hx, params, bias, L, bidirectional, masks, (grad_output, grad_h_n))
        assert_same([output, h_n], expected, 2e-6)  # float32 sums of at most 40 terms of size one
        assert_same(inference[:2], expected, 2e-6)
        needs = [True] * (2 + len(params))
        gradients = kernel_path.gru_backward(call, grad_output, grad_h_n, output, reserve, needs)
        assert_same(gradients, expected_grads, 5e-6)
        assert torch.equal(reserve.view(torch.uint8), kept.view(torch.uint8))  # still good for another backward
        for skipped in range(0, len(needs), 3):
            needs = [i % 3 != skipped % 3 for i in range(2 + len(params))]
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
