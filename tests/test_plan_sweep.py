"""Plans of whole sequences over the range of sizes: pure arithmetic for all of it, the compiler for a sample.

The range: H from 16 to 4096, batches from 1 to 4096, 1 to 8 layers, one and two directions, 2 and 4 bytes an element (float32
products use TF32), for an RTX 4090: 128 multiprocessors, 99 KB of shared memory a program.
"""

import itertools
import random

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torch_gru_fuse.kernels import aot
from torch_gru_fuse.planner.gpus import GPUS, gpu_named
from torch_gru_fuse.planner.whole_sequence import (
    ResidentPlan,
    StagedPlan,
    plan_whole_sequence,
    plan_whole_sequence_backward,
    why_no_plan,
)
from torch_gru_fuse.tools import plan as command

GPU = GPUS["rtx4090"]
SHARED_BYTES = 99 * 1024
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HIDDEN = (16, 24, 32, 48, 64, 100, 128, 136, 200, 250, 256, 300, 384, 500, 512, 640, 768, 1000, 1024, 1536, 2048, 4096)
BATCHES = (1, 3, 8, 10, 16, 32, 33, 64, 100, 128, 256, 512, 1000, 1024, 2048, 4096)

NAMES = ("batch", "hidden", "layers", "bidirectional", "element_bytes")
shapes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 4096) | st.sampled_from(BATCHES),
        "hidden": st.integers(16, 4096) | st.integers(16, 1024) | st.sampled_from(HIDDEN),
        "layers": st.integers(1, 8),
        "bidirectional": st.booleans(),
        "element_bytes": st.sampled_from((2, 4)),
    }
)


def planned(
    batch, hidden, layers, bidirectional, element_bytes, multiprocessors=GPU.multiprocessors, shared_bytes=SHARED_BYTES
):
    """(plan, reason) of a GRU."""
    sizes = (batch, hidden, 2 if bidirectional else layers, element_bytes)
    options = dict(reverse=bidirectional, multiprocessors=multiprocessors, shared_bytes=shared_bytes)
    return plan_whole_sequence(*sizes, **options), why_no_plan(*sizes, **options)


def test_the_gpu_is_the_one_aimed_at():
    assert (GPU.multiprocessors, GPU.shared_bytes_per_program, GPU.capability) == (128, SHARED_BYTES, (8, 9))


def assert_fits(plan, batch, hidden, bidirectional, element_bytes, multiprocessors, shared_bytes):
    """Programs that wait for each other are on the GPU at once; others may come one after the other."""
    kernel = plan.kernel
    assert plan.programs_per_sm in (1, 2)
    assert plan.programs_per_sm * kernel.num_warps <= 8  # else a thread has less than the 255 registers that plans count on
    if plan.waits(reverse=bidirectional):
        assert plan.programs(batch, hidden) <= multiprocessors * plan.programs_per_sm
    if isinstance(kernel, StagedPlan):
        assert kernel.tiles == 1 or kernel.tiles % 2 == 0
        assert kernel.shared_bytes(hidden, element_bytes) <= shared_bytes


def assert_covers(plan, batch, hidden, layers, bidirectional):
    """Launches make up the GRU, the grid all its units and rows, and no more programs than these take."""
    kernel, states = plan.kernel, layers * (2 if bidirectional else 1)
    assert plan.lanes * plan.launches(layers, reverse=bidirectional) == states
    assert plan.lanes in ((2,) if bidirectional else (1, layers))
    if isinstance(kernel, ResidentPlan):
        assert hidden <= kernel.units <= 128
        assert plan.programs(batch, hidden) == plan.lanes * -(-batch // kernel.rows)
        return
    rows = kernel.rows * (kernel.tiles if isinstance(kernel, StagedPlan) else 1)
    assert plan.programs(batch, hidden) == plan.lanes * -(-hidden // kernel.units) * -(-batch // rows)
    if isinstance(kernel, StagedPlan):  # its state must not be a stack's
        assert plan.lanes == (2 if bidirectional else 1)
        # one tile less, or two where they come in pairs, would not do for the programs that there are
        groups = -(-batch // rows)
        fewer = kernel.tiles - (1 if kernel.tiles == 1 or kernel.tiles == 2 else 2)
        assert groups * kernel.rows * fewer < batch


@settings(max_examples=1000, deadline=None)
@given(shape=shapes, gpu=st.sampled_from(sorted(GPUS)))
@example(shape=dict(batch=4096, hidden=4096, layers=8, bidirectional=True, element_bytes=4), gpu="l4")
@example(shape=dict(batch=4096, hidden=16, layers=8, bidirectional=False, element_bytes=2), gpu="rtx4090")
def test_every_size_has_a_plan_that_fits_or_a_reason(shape, gpu):
    multiprocessors, shared_bytes = GPUS[gpu].multiprocessors, GPUS[gpu].shared_bytes_per_program
    plan, reason = planned(**shape, multiprocessors=multiprocessors, shared_bytes=shared_bytes)
    assert (plan is None) == isinstance(reason, str) and reason != ""
    batch, hidden, layers, reverse, element_bytes = (shape[name] for name in NAMES)
    if plan is None:
        assert hidden > 128 and f"H = {hidden}" in reason
        return
    assert_fits(plan, batch, hidden, reverse, element_bytes, multiprocessors, shared_bytes)
    assert_covers(plan, batch, hidden, layers, reverse)
    assert plan.kernel.num_warps in (1, 2, 4, 8, 16)


@settings(max_examples=300, deadline=None)
@given(shape=shapes, gpu=st.sampled_from(sorted(GPUS)), steps=st.integers(1, 5000))
def test_the_command_has_an_answer_for_every_size(shape, gpu, steps):
    batch, hidden, layers, reverse, element_bytes = (shape[name] for name in NAMES)
    dtype = {2: "float16", 4: "float32"}[element_bytes]
    report = command.plan(GPUS[gpu], command.Shape(steps, batch, 7, hidden, layers, reverse, dtype))
    limits = (GPUS[gpu].multiprocessors, GPUS[gpu].shared_bytes_per_program)
    plan, reason = planned(batch, hidden, layers, reverse, element_bytes, *limits)
    assert "The ops run " in report.reason
    if plan is None:
        assert report.kernel is None and reason in report.reason
    else:
        assert (report.kernel, report.num_programs) == (plan.kernel.name, plan.programs(batch, hidden))
        assert report.predicted_us is None or 0 < report.predicted_us < 1e9


# (H, two directions, bytes an element) -> the largest batch of BATCHES with a plan on an RTX 4090; sizes up to 128, whose
# programs wait for nobody, have one for every batch, and larger ones than these none.
REACH = [
    ((256, False, 2), 4096), ((256, False, 4), 4096), ((256, True, 2), 4096),
    ((512, False, 2), 2048), ((512, False, 4), 1024), ((512, True, 2), 1024), ((512, True, 4), 512),
    ((1024, False, 2), 512), ((1024, False, 4), 512), ((1024, True, 2), 256), ((1024, True, 4), 256),
    ((2048, False, 2), 64),
]  # fmt: skip


@pytest.mark.parametrize("sizes, most", REACH, ids=lambda value: str(value))
def test_sizes_that_have_a_plan(sizes, most):
    hidden, reverse, element_bytes = sizes
    for layers in (1, 6):
        for batch in (b for b in BATCHES if b <= most):
            plan, reason = planned(batch, hidden, layers, reverse, element_bytes)
            assert plan is not None, f"batch {batch}: {reason}"


@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("hidden", [h for h in HIDDEN if h <= 128])
def test_small_sizes_always_have_a_plan(hidden, reverse, element_bytes):
    for layers, batch in itertools.product(range(1, 9), BATCHES):
        plan, reason = planned(batch, hidden, layers, reverse, element_bytes)
        assert plan is not None, reason


@pytest.mark.parametrize(
    "hidden, batch, reverse, element_bytes",
    [
        (4096, 1, False, 2), (4096, 16, False, 4), (4096, 1, True, 2), (2048, 1, False, 4), (2048, 1, True, 2),
        (1024, 4096, False, 2), (512, 4096, False, 2), (512, 4096, True, 4),
    ],
)  # fmt: skip
def test_sizes_that_have_none_say_why(hidden, batch, reverse, element_bytes):
    """Weights of all programs that are on the GPU at once, and states of all rows, are what limits."""
    plan, reason = planned(batch, hidden, 1, reverse, element_bytes)
    assert plan is None
    assert reason == (
        f"{'2 lanes' if reverse else 'one layer'} of H = {hidden} and a batch of {batch}: the weights do not fit the registers "
        "and shared memory of 128 multiprocessors, or more than 32 tiles follow each other"
    )


def test_more_multiprocessors_and_shared_memory_never_take_a_plan_away():
    for hidden, batch, reverse, element_bytes in itertools.product(HIDDEN, BATCHES, (False, True), (2, 4)):
        plan, _ = planned(batch, hidden, 1, reverse, element_bytes)
        more, reason = planned(batch, hidden, 1, reverse, element_bytes, 132, 227 * 1024)
        assert plan is None or more is not None, f"H = {hidden}, batch {batch}: {reason}"


@settings(max_examples=300, deadline=None)
@given(shape=shapes, multiprocessors=st.integers(1, 200), shared_bytes=st.sampled_from((99, 163, 227)))
def test_any_number_of_multiprocessors(shape, multiprocessors, shared_bytes):
    plan, reason = planned(**shape, multiprocessors=multiprocessors, shared_bytes=shared_bytes * 1024)
    assert (plan is None) == isinstance(reason, str)
    if plan is not None:
        batch, hidden, layers, reverse, element_bytes = (shape[name] for name in NAMES)
        assert_fits(plan, batch, hidden, reverse, element_bytes, multiprocessors, shared_bytes * 1024)
        assert_covers(plan, batch, hidden, layers, reverse)


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


KINDS = {
    f"{kernel}, {lanes}": number
    for (kernel, lanes), number in {
        ("resident", "one layer"): 2,
        ("resident", "stack"): 2,
        ("resident", "two directions"): 2,
        ("wavefront", "one layer"): 2,
        ("wavefront", "stack"): 3,
        ("wavefront", "two directions"): 2,
        ("staged", "one layer"): 3,
        ("staged", "two directions"): 2,
    }.items()
}


def sample():
    """Launches of each kernel and kind of lanes, every other one saves gates; the same in every run."""
    kinds = {}
    for launch in different_launches():
        plan, batch, hidden, bidirectional, dtype = launch
        kinds.setdefault(f"{plan.kernel.name}, {lanes_of(plan, bidirectional)}", []).append(launch)
    assert kinds.keys() == KINDS.keys()
    for kind, number in KINDS.items():
        for i, launch in enumerate(random.Random(kind).sample(kinds[kind], number)):
            plan, batch, hidden, bidirectional, dtype = launch
            name = f"{kind}, H={hidden}, B={batch}, {dtype}{', saves gates' if i % 2 else ''}"
            yield pytest.param(*launch, bool(i % 2), id=name)


# What is at the limit of registers or shared memory, beside the sample: (batch, H, layers, two directions, dtype).
TIGHT = [
    (10, 256, 6, False, torch.float32),  # wavefront, both projections in one program
    (10, 256, 6, False, torch.float16),  # two programs a multiprocessor
    (8, 1024, 1, False, torch.float32),
    (128, 128, 1, False, torch.float32),  # resident, 192 registers of weights
    (64, 1024, 1, False, torch.float32),  # staged, weights in shared memory
    (256, 512, 1, False, torch.float16),
    (2048, 256, 1, False, torch.bfloat16),  # 16 rows of half precision
    (4096, 256, 1, False, torch.float16),  # the most tiles
]


@pytest.mark.parametrize("batch, hidden, layers, bidirectional, dtype", TIGHT, ids=str)
def test_tight_plans_compile_for_a_4090(batch, hidden, layers, bidirectional, dtype):
    plan, reason = planned(batch, hidden, layers, bidirectional, dtype.itemsize)
    assert reason is None
    assert_compiles(plan, batch, hidden, bidirectional, dtype, save_gates=True)


@pytest.mark.parametrize("plan, batch, hidden, bidirectional, dtype, save_gates", list(sample()))
def test_sample_compiles_for_a_4090(plan, batch, hidden, bidirectional, dtype, save_gates):
    assert_compiles(plan, batch, hidden, bidirectional, dtype, save_gates)


def assert_compiles(plan, batch, hidden, bidirectional, dtype, save_gates):
    """Without spills, and all programs that wait for each other are on the GPU at once."""
    compiled = aot.compile_whole_sequence(
        dtype, plan, batch=batch, hidden=hidden, reverse=bidirectional, save_gates=save_gates, capability=89
    )
    assert (compiled.spill_bytes, compiled.stack_bytes) == (0, 0)
    assert compiled.shared_bytes <= SHARED_BYTES
    if isinstance(plan.kernel, StagedPlan):  # the planner's own account
        assert compiled.shared_bytes <= plan.kernel.shared_bytes(hidden, dtype.itemsize)
    resident = GPU.resident_programs(compiled.registers, plan.kernel.num_warps, compiled.shared_bytes)
    if plan.waits(reverse=bidirectional):
        assert resident >= plan.programs_per_sm
        assert plan.programs(batch, hidden) <= GPU.multiprocessors * resident
    assert resident >= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "batch, hidden, lanes",
    [(1024, 256, 1), (3000, 256, 1), (600, 256, 2), (256, 512, 1), (1000, 512, 1), (250, 480, 2), (60, 1024, 1), (200, 1024, 1),
     (1000, 64, 1), (1000, 128, 1)],
)  # fmt: skip
def test_backward_plans_fit_a_4090(batch, hidden, lanes, dtype):
    """Plans for large batches and small layers: no spills, 99 KB of shared memory, all that wait for each other resident."""
    gpu, reverse = gpu_named("rtx4090"), lanes == 2
    planned = plan_whole_sequence_backward(batch, hidden, lanes, dtype.itemsize, reverse=reverse)
    if (hidden, dtype) == (128, torch.float32):
        assert planned is None  # resident would spill
        return
    taken = aot.compile_whole_sequence_backward(dtype, planned, batch=batch, hidden=hidden, reverse=reverse)
    assert taken.spill_bytes == 0 and taken.stack_bytes == 0 and taken.shared_bytes <= 99 * 1024
    if isinstance(planned.kernel, StagedPlan):
        assert taken.shared_bytes == planned.kernel.shared_bytes_backward(hidden, dtype.itemsize)
    if planned.waits(reverse=reverse):
        resident = gpu.resident_programs(taken.registers, planned.kernel.num_warps, taken.shared_bytes)
        assert planned.programs(batch, hidden) <= gpu.multiprocessors * resident
