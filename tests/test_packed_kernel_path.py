"""What lies between the op for packed sequences and the kernels, without a GPU; see `test_kernel_path`."""

import ctypes
import logging

import interpreted
import pytest
import torch
from problems import assert_same, packed_args
from test_kernel_path import emulated_launcher, kernels_on_cpu, whole_on_cpu  # noqa: F401

from torch_gru_fuse import equations_packed
from torch_gru_fuse.kernels import launch, packed_states
from torch_gru_fuse.ops import (
    packed_kernel_path,
    packed_path,
    schemas,
    support,
    timeouts,
    torch_path,
    whole_path,
)
from torch_gru_fuse.ops.call import PackedCall
from torch_gru_fuse.planner.gpus import gpu_named
from torch_gru_fuse.planner.plan import Plan
from torch_gru_fuse.planner.whole_sequence import ResidentPlan, StagedPlan, WavefrontPlan, WholeSequencePlan

states_before = interpreted.load("kernels.packed_states").states_before_kernel
SPREAD = WavefrontPlan(16, 8, 2)
LENGTHS = (6, 6, 5, 4, 4, 4, 3, 3, 2, 1)


def packed_launcher(kernel, device, constants, types):
    if kernel.fn.__name__ != "states_before_kernel":
        return emulated_launcher(kernel, device, constants, types)

    def run(grid, stream, values, aligned):
        p_out, p_h0, p_offsets, p_before, T, B = values
        H, D, itemsize = constants["H"], constants["D"], types[0].itemsize

        def at(address, count, dtype):
            memory = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address)
            return torch.frombuffer(memory, dtype=dtype)

        offsets = at(p_offsets, T + 1 + B, torch.int32)
        N = int(offsets[T])
        out, before = at(p_out, N * D * H, types[0]), at(p_before, N * D * H, types[0])
        assert itemsize == out.itemsize
        states_before[grid](out, at(p_h0, D * B * H, types[0]), offsets, before, T, B, **constants)

    return run


@pytest.fixture
def packed_on_cpu(whole_on_cpu, monkeypatch):  # noqa: F811
    """CPU tensors take the path of CUDA tensors; yields a function that sets the plan."""
    monkeypatch.setattr(launch, "launcher", packed_launcher)
    monkeypatch.setattr(packed_kernel_path, "_refused", {})
    monkeypatch.setattr(support, "gpu_of", lambda index: gpu_named("rtx4090"))
    cuda_size = schemas.packed_reserve_size
    monkeypatch.setattr(
        schemas, "packed_reserve_size", lambda *a, cuda, bytes_each: cuda_size(*a, cuda=True, bytes_each=bytes_each)
    )

    def choose(whole, backward=None):
        chosen = Plan("whole", None, False, "test", whole, backward=backward or whole)
        monkeypatch.setattr(packed_path, "plan_gru_packed", lambda *_, **__: chosen)

    return choose


def call_of(lengths=LENGTHS, *, I=5, H=32, L=2, bidirectional=False, bias=True, dropout=False):  # noqa: E741
    data, sizes, hx, params, *_ = packed_args(lengths, I, H, L, bidirectional=bidirectional, bias=bias, requires_grad=False)
    masks = None
    if dropout:
        masks = (torch.rand(L - 1, data.shape[0], H * (1 + bidirectional)) < 0.5).float() * 2
    return PackedCall(data, sizes, hx, params, bias, L, bidirectional, masks)


def reference(call, grads, needs):
    """Results and gradients in float64, by PyTorch's operations."""
    double = [None if t is None else t.double() for t in (call.input, call.hx, call.dropout_masks, *grads)]
    call = call._replace(
        input=double[0], hx=double[1], dropout_masks=double[2], params=[p.double() for p in call.params]
    )
    output, h_n, reserve = torch_path.gru_forward(call, True)
    gradients = torch_path.gru_backward(call, *double[3:], output, reserve, needs)
    return [t.float() for t in (output, h_n)], [t.float() for t in gradients]


CASES = [
    pytest.param({"L": 1}, WholeSequencePlan(1, SPREAD), id="one layer"),
    pytest.param({"L": 3}, WholeSequencePlan(3, SPREAD), id="stack"),
    pytest.param({"L": 3, "bias": False}, WholeSequencePlan(1, SPREAD), id="layer by layer, no biases"),
    pytest.param({"L": 3, "dropout": True}, WholeSequencePlan(3, SPREAD), id="stack, dropout"),
    pytest.param({"L": 2, "dropout": True}, WholeSequencePlan(1, SPREAD), id="layer by layer, dropout"),
    pytest.param({"L": 2, "bidirectional": True}, WholeSequencePlan(2, SPREAD), id="two directions"),
    pytest.param({"L": 2, "bidirectional": True, "dropout": True}, WholeSequencePlan(2, SPREAD), id="directions, dropout"),
    pytest.param({"L": 2, "lengths": (1,)}, WholeSequencePlan(2, SPREAD), id="one row"),
    pytest.param({"L": 2}, WholeSequencePlan(1, ResidentPlan(32, 8, 2)), id="resident"),
    pytest.param({"H": 64, "bidirectional": True}, WholeSequencePlan(2, StagedPlan(32, 8, 2, 1, 2)), id="staged"),
    pytest.param({"L": 2, "lengths": (3, 3, 3)}, WholeSequencePlan(2, SPREAD), id="equal lengths"),
]  # fmt: skip


@pytest.mark.parametrize("variant, whole", CASES)
def test_forward_and_backward(packed_on_cpu, nan_filled_empty, variant, whole):
    packed_on_cpu(whole)
    call = call_of(**variant)
    output, h_n, reserve = packed_path.gru_forward(call, True)
    assert_same(packed_path.gru_forward(call, False)[:2], [output, h_n], 0.0)
    both = torch.randn_like(output).t().contiguous().t(), torch.randn_like(h_n)
    needs = [[True] * (2 + len(call.params)), [i % 3 != 1 for i in range(2 + len(call.params))], [False, True]]
    needs[2] += [False] * len(call.params)
    for grads, need in zip((both, (both[0], None), (None, both[1])), needs, strict=True):
        expected, gradients = reference(call, grads, need)
        assert_same([output, h_n], expected, 2e-3)
        assert_same(packed_path.gru_backward(call, *grads, output, reserve, need), gradients, 4e-3)


@pytest.mark.parametrize("remembered", [True, False])
def test_the_backward_of_a_reserve_that_was_copied(packed_on_cpu, remembered):
    packed_on_cpu(WholeSequencePlan(2, SPREAD))
    call = call_of()
    output, _, reserve = packed_path.gru_forward(call, True)
    grads, needs = (torch.randn_like(output), None), [True] * (2 + len(call.params))
    if not remembered:
        reserve = reserve.clone()
    gradients = packed_path.gru_backward(call, *grads, output, reserve, needs)
    assert_same(gradients, reference(call, grads, needs)[1], 4e-3)


@pytest.mark.parametrize("of", ["forward", "backward"])
@pytest.mark.parametrize("save", [False, True])
def test_launch_that_does_not_fit(packed_on_cpu, monkeypatch, caplog, of, save):
    """Fewer programs on the GPU than planned: PyTorch's own operations run, and that is said once."""

    def refusing(kernel, *args):
        def run(*_):
            raise launch.DoesNotFit("too many blocks in cooperative launch")

        refused = kernel.fn.__name__ == f"wavefront_{'' if of == 'forward' else 'backward_'}kernel"
        return run if refused else packed_launcher(kernel, *args)

    monkeypatch.setattr(launch, "launcher", refusing)
    packed_on_cpu(WholeSequencePlan(2, SPREAD))
    call = call_of()
    needs = [True] * (2 + len(call.params))
    with caplog.at_level(logging.WARNING, logger="torch_gru_fuse"):
        for _ in range(2):
            output, h_n, reserve = packed_path.gru_forward(call, save)
            grads = torch.randn_like(output), torch.randn_like(h_n)
            expected, gradients = reference(call, grads, needs)
            assert_same([output, h_n], expected, 2e-3)
            if save:
                assert_same(packed_path.gru_backward(call, *grads, output, reserve, needs), gradients, 4e-3)
    assert len(caplog.records) == (of == "forward" or save)
    assert all("does not fit" in r.getMessage() or "do not fit" in r.getMessage() for r in caplog.records)


def test_a_wait_that_ran_out_is_an_error(packed_on_cpu, monkeypatch):
    monkeypatch.setattr(whole_path, "missing_programs", 1)
    packed_on_cpu(WholeSequencePlan(2, SPREAD))
    packed_path.gru_forward(call_of(), False)
    with pytest.raises(RuntimeError, match="torch_gru_fuse.gru_packed: the wavefront kernel gave up.*B=10, I=5, H=32"):
        timeouts.check(-1)


@pytest.mark.parametrize("lengths", [(1,), (3, 3), LENGTHS])
def test_offsets(lengths):
    sizes = torch.tensor([sum(length > t for length in lengths) for t in range(lengths[0])])
    offsets = packed_kernel_path.offsets_of(sizes.repeat_interleave(2)[::2], torch.device("cpu"))
    assert offsets.dtype == torch.int32
    assert offsets.tolist() == [0, *sizes.cumsum(0).tolist(), *lengths]


@pytest.mark.parametrize("lengths", [(1,), (4, 4, 4), LENGTHS, (9, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_states_before(lengths, dtype):
    hidden, batch, rows = 20, len(lengths), sum(lengths)
    sizes = [sum(length > t for length in lengths) for t in range(lengths[0])]
    offsets = packed_kernel_path.offsets_of(torch.tensor(sizes), torch.device("cpu"))
    out, h0 = torch.randn(rows, 2 * hidden).to(dtype), torch.randn(2, batch, hidden).to(dtype)
    before = torch.full((2, rows, hidden), float("nan"), dtype=dtype)
    grid = packed_states.states_before_grid(steps=len(sizes), batch=batch, hidden=hidden, directions=2)
    constants = packed_states.states_before_constants(hidden=hidden, directions=2)
    states_before[grid](out, h0, offsets, before, len(sizes), batch, **constants)
    for d in range(2):
        expected = equations_packed._states_before(out[:, d * hidden : (d + 1) * hidden], h0[d], sizes, d == 1)
        assert torch.equal(before[d], expected)
