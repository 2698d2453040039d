"""Plans of whole sequences over the range of sizes: pure arithmetic for all of it, the compiler for a sample.

The range: H from 16 to 4096, batches from 1 to 4096, 1 to 8 layers, one and two directions, 2 and 4 bytes an element (float32
products use TF32), for the 128 multiprocessors of an RTX 4090.
"""

import itertools
import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torch_gru_fuse.kernels import aot
from torch_gru_fuse.planner.gpus import GPUS
from torch_gru_fuse.planner.whole_sequence import (
    ResidentPlan,
    plan_whole_sequence,
    predict,
    why_no_plan,
)

GPU = GPUS["rtx4090"]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HIDDEN = (16, 24, 32, 48, 64, 100, 128, 136, 200, 250, 256, 300, 384, 500, 512, 640, 768, 1000, 1024, 1536, 2048, 4096)
BATCHES = (1, 3, 8, 10, 16, 32, 33, 64, 100, 128, 256, 512, 1000, 1024, 2048, 4096)

shapes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 4096) | st.sampled_from(BATCHES),
        "hidden": st.integers(16, 4096) | st.integers(16, 1024) | st.sampled_from(HIDDEN),
        "layers": st.integers(1, 8),
        "bidirectional": st.booleans(),
        "element_bytes": st.sampled_from((2, 4)),
    }
)


def planned(batch, hidden, layers, bidirectional, element_bytes, multiprocessors=GPU.multiprocessors):
    """(plan, reason) of a GRU."""
    sizes = (batch, hidden, 2 if bidirectional else layers, element_bytes)
    options = dict(reverse=bidirectional, multiprocessors=multiprocessors)
    return plan_whole_sequence(*sizes, **options), why_no_plan(*sizes, **options)


def fits(plan, batch, hidden, bidirectional, multiprocessors):
    """Programs that wait for each other have a multiprocessor each; others may come one after the other."""
    return not plan.waits(reverse=bidirectional) or plan.programs(batch, hidden) <= multiprocessors


@settings(max_examples=1000, deadline=None)
@given(shape=shapes, gpu=st.sampled_from(sorted(GPUS)))
@example(shape=dict(batch=4096, hidden=4096, layers=8, bidirectional=True, element_bytes=4), gpu="l4")
@example(shape=dict(batch=4096, hidden=16, layers=8, bidirectional=False, element_bytes=2), gpu="rtx4090")
def test_every_size_has_a_plan_that_fits_or_a_reason(shape, gpu):
    multiprocessors = GPUS[gpu].multiprocessors
    plan, reason = planned(**shape, multiprocessors=multiprocessors)
    assert (plan is None) == isinstance(reason, str) and reason != ""
    if plan is None:
        assert shape["hidden"] > 128 and (f"H = {shape['hidden']}" in reason)
        return
    batch, hidden, layers, reverse = (shape[k] for k in ("batch", "hidden", "layers", "bidirectional"))
    assert fits(plan, batch, hidden, reverse, multiprocessors)
    # lanes are whole launches of the GRU, the grid covers its units and rows, a program is one that a GPU can have
    assert plan.lanes * plan.launches(layers, reverse=reverse) == layers * (2 if reverse else 1)
    kernel = plan.kernel
    tiles, units = (1, kernel.units) if isinstance(kernel, ResidentPlan) else (kernel.tiles, -(-hidden // kernel.units))
    if isinstance(kernel, ResidentPlan):
        assert hidden <= kernel.units <= 128 and plan.programs(batch, hidden) * kernel.rows >= plan.lanes * batch
    else:
        assert plan.programs(batch, hidden) * kernel.rows * tiles >= plan.lanes * batch * units
    assert kernel.num_warps in (1, 2, 4, 8)
    prediction = predict(
        plan, steps=100, batch=batch, hidden=hidden, layers=layers, element_bytes=shape["element_bytes"], reverse=reverse,
        multiprocessors=multiprocessors,
    )  # fmt: skip
    assert prediction.steps >= 100 * layers if plan.lanes == 1 else prediction.steps >= 100
    assert 0 < prediction.us < float("inf")


@settings(max_examples=300, deadline=None)
@given(shape=shapes, multiprocessors=st.integers(1, 200))
def test_any_number_of_multiprocessors(shape, multiprocessors):
    plan, reason = planned(**shape, multiprocessors=multiprocessors)
    assert (plan is None) == isinstance(reason, str)
    if plan is not None:
        assert fits(plan, shape["batch"], shape["hidden"], shape["bidirectional"], multiprocessors)


@pytest.mark.parametrize(
    "sizes, options, message",
    [
        ((0, 64, 1, 2), {}, "batch is 0, expected at least 1"),
        ((1, -3, 1, 2), {}, "hidden is -3, expected at least 1"),
        ((1, 64, 0, 2), {}, "lanes is 0, expected at least 1"),
        ((1, 64, 1, 2), {"multiprocessors": 0}, "multiprocessors is 0, expected at least 1"),
        ((1, 64, 1, 8), {}, r"element_bytes is 8, expected 2 \(float16, bfloat16\) or 4 \(float32\)"),
        ((1, 64, 3, 2), {"reverse": True}, "lanes is 3, expected 2: with reverse they are the two directions"),
    ],
)
def test_sizes_that_make_no_sense(sizes, options, message):
    for function in (plan_whole_sequence, why_no_plan):
        with pytest.raises(ValueError, match=message):
            function(*sizes, **{"reverse": False, **options})


# ---- compiled -----------------------------------------------------------------------------------------------------------


def different_launches():
    """(plan, batch, H, two directions, dtype): one shape for each piece of code that the plans of the range ask for."""
    found = {}
    for hidden, batch, layers, bidirectional, dtype in itertools.product(HIDDEN, BATCHES, range(1, 9), (False, True), DTYPES):
        plan, _ = planned(batch, hidden, layers, bidirectional, dtype.itemsize)
        if plan is not None:
            code = (plan.kernel, hidden, lanes_of(plan, bidirectional), dtype)
            found.setdefault(code, (plan, batch, hidden, bidirectional, dtype))
    return list(found.values())


def lanes_of(plan, bidirectional):
    return "two directions" if bidirectional else "stack" if plan.lanes > 1 else "one layer"


def sample():
    """Two launches of each kernel and kind of lanes, one that saves gates and one that does not; the same in every run."""
    kinds = {}
    for launch in different_launches():
        plan, batch, hidden, bidirectional, dtype = launch
        kinds.setdefault(f"{plan.kernel.name}, {lanes_of(plan, bidirectional)}", []).append(launch)
    assert len(kinds) == 6
    for kind, launches in kinds.items():
        for save_gates, launch in enumerate(random.Random(kind).sample(launches, 2)):
            plan, batch, hidden, bidirectional, dtype = launch
            name = f"{kind}, H={hidden}, B={batch}, {dtype}{', saves gates' if save_gates else ''}"
            yield pytest.param(*launch, bool(save_gates), id=name)


@pytest.mark.parametrize("plan, batch, hidden, bidirectional, dtype, save_gates", list(sample()))
def test_sample_compiles_for_a_4090(plan, batch, hidden, bidirectional, dtype, save_gates):
    compiled = aot.compile_whole_sequence(
        dtype, plan, batch=batch, hidden=hidden, reverse=bidirectional, save_gates=save_gates, capability=89
    )
    assert compiled.spill_bytes == 0 and compiled.stack_bytes == 0
    assert compiled.shared_bytes <= 99 * 1024
    resident = GPU.resident_programs(compiled.registers, plan.kernel.num_warps, compiled.shared_bytes)
    assert resident >= 1
    if plan.waits(reverse=bidirectional):
        assert plan.programs(batch, hidden) <= GPU.multiprocessors * resident
