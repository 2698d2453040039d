"""Gradients of parameters from what the recurrence and its products leave: by Triton's interpreter, and compiled."""

import interpreted
import pytest
import torch

from torch_gru_fuse.kernels import aot, parameter_gradients


def in_order(sums, rotated, w, b_ih, b_hh, hidden):
    """Runs the interpreted kernel; each argument but the last is a list by lane, or None."""
    lanes = len(w or b_ih)
    programs = 0 if sums is None else sums[0].shape[0]
    kernel = interpreted.load("kernels.parameter_gradients").parameter_gradients_kernel
    grid = parameter_gradients.parameter_gradients_grid(
        lanes=lanes, hidden=hidden, rotated=w is not None, biases=b_ih is not None
    )
    pointers = (None if given is None else tuple(given) for given in (sums, rotated, w, b_ih, b_hh))
    constants = parameter_gradients.parameter_gradients_constants(lanes=lanes, hidden=hidden)
    kernel[grid](*pointers, programs, **constants)


@pytest.mark.parametrize("hidden", [1, 33])
@pytest.mark.parametrize("programs", [1, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rotated, biases", [(True, True), (True, False), (False, True)])
def test_parameter_gradients(hidden, programs, dtype, rotated, biases):
    lanes = 2
    generator = torch.Generator().manual_seed(hidden + programs)
    sums = [torch.randn(programs, 4, hidden, generator=generator) for _ in range(lanes)]
    products = [torch.randn(3, hidden, hidden, generator=generator).to(dtype) for _ in range(lanes)]
    w = [torch.full((3 * hidden, hidden), float("nan"), dtype=dtype) for _ in range(lanes)]
    b_ih, b_hh = ([torch.full((3 * hidden,), float("nan"), dtype=dtype) for _ in range(lanes)] for _ in range(2))
    in_order(
        sums if biases else None, products if rotated else None, w if rotated else None, b_ih if biases else None,
        b_hh if biases else None, hidden,
    )  # fmt: skip
    for l in range(lanes):
        hn, r, z = products[l]
        if rotated:
            assert torch.equal(w[l], torch.cat((r, z, hn)))
        else:
            assert w[l].isnan().all()
        if not biases:
            continue
        hn, r, z, n = sums[l].double().sum(0)
        for found, expected in ((b_ih[l], (r, z, n)), (b_hh[l], (r, z, hn))):
            wanted = torch.cat(expected)
            rounding = torch.finfo(dtype).eps
            torch.testing.assert_close(found.double(), wanted, rtol=rounding, atol=programs * 1e-7 * 4)


@pytest.mark.parametrize("capability", [89, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "lanes, hidden, rotated, biases", [(16, 256, True, True), (1, 1024, True, False), (2, 20, False, True)]
)
def test_it_compiles(lanes, hidden, rotated, biases, dtype, capability):
    taken = aot.compile_parameter_gradients(
        dtype, lanes=lanes, hidden=hidden, rotated=rotated, biases=biases, capability=capability
    )
    assert taken.spill_bytes == taken.stack_bytes == 0 and taken.registers <= 128
