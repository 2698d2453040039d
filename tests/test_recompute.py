"""`recompute=True`: the same results and gradients, and nothing but the results kept in between.

Not the same bits: without a backward to save for, a GRU runs another implementation.
"""

import pytest
import torch
from problems import count_calls, gru_args

import torch_gru_fuse
from torch_gru_fuse import functional
from torch_gru_fuse.passes.rewrite import cache_tag

ops = torch.ops.torch_gru_fuse


def gradients(function, tensors):
    """Results and gradients, and the bytes that were kept between them beside the arguments and the results."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = function()
    known = {t.untyped_storage().data_ptr() for t in (*tensors, *outputs)}
    torch.manual_seed(1)
    grads = torch.autograd.grad(outputs, tensors, [torch.randn_like(o) for o in outputs])
    return [*outputs, *grads], sum(size for address, size in kept.items() if address not in known)


@pytest.mark.parametrize(
    "variant", [{"L": 1}, {"L": 3, "bidirectional": True}, {"L": 2, "bias": False, "batch_first": True}], ids=str
)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_gradients_are_the_same(variant, dropout):
    x, hx, params, bias, L, _, train, bidirectional, batch_first = gru_args(**variant)

    def run(recompute):
        torch.manual_seed(0)
        return functional.gru(x, hx, params, bias, L, dropout, True, bidirectional, batch_first, recompute=recompute)

    masks = (L - 1) * x.shape[0] * x.shape[1] * hx.shape[2] * (1 + bidirectional) * x.itemsize if dropout else 0
    saving, kept = gradients(lambda: run(False), [x, hx, *params])
    again, nothing = gradients(lambda: run(True), [x, hx, *params])
    torch.testing.assert_close(again, saving, rtol=1e-5, atol=1e-6)
    assert nothing == masks < kept


def test_backward_runs_the_forward_again_and_not_twice():
    x, hx, params, bias, L, *_ = gru_args(L=2)
    _, counts = count_calls(
        lambda: torch.autograd.grad(ops.gru(x, hx, params, bias, L, 0.0, True, False, False, recompute=True)[0].sum(), x)
    )
    assert counts == {"gru_forward": 1, "gru_backward": 1}  # which does it below the dispatcher


def test_setting_of_enable():
    torch.manual_seed(0)
    model = torch.nn.GRU(4, 6, 2)
    x = torch.randn(5, 3, 4, requires_grad=True)
    tensors = [x, *model.parameters()]
    tags, kept, results = [], [], []
    for recompute in (False, True):
        torch._dynamo.reset()
        with torch_gru_fuse.enable(recompute=recompute):
            tags.append(cache_tag())
            compiled = torch.compile(model, fullgraph=True)
            found, size = gradients(lambda compiled=compiled: compiled(x), tensors)
        results.append(found)
        kept.append(size)
    assert tags[0] != tags[1] and cache_tag() == tags[0]
    expected, _ = gradients(lambda: model(x), tensors)
    for found in results:
        torch.testing.assert_close(found, expected)
    layer = 5 * 3 * 6 * 4  # bytes of a layer's output
    assert kept[0] - kept[1] == (4 * 2 + 1) * layer  # gates of both layers, output of the first


def test_vmap_and_transforms():
    x, hx, params, bias, L, *_ = gru_args(L=2)
    x = x.detach()

    def loss(x, recompute):
        return ops.gru(x, hx, params, bias, L, 0.0, False, False, False, recompute=recompute)[0].square().sum()

    grad = torch.func.grad(loss)
    torch.testing.assert_close(grad(x, True), grad(x, False))
    xs = torch.stack([x, 2 * x])
    mapped = torch.vmap(grad, in_dims=(0, None))
    torch.testing.assert_close(mapped(xs, True), mapped(xs, False))
