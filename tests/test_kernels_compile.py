"""Every kernel compiled for the GPUs aimed at, without one: no spills, and the shared memory of an RTX 4090 suffices."""

import itertools

import pytest
import torch

from torch_gru_fuse.kernels import aot
from torch_gru_fuse.planner import tiles
from torch_gru_fuse.planner.projection import projection_tile
from torch_gru_fuse.planner.tiles import POINTWISE_TILE, Tile

SHARED_LIMIT = 99 * 1024  # a program's share on sm_89; sm_90 has more
PRECISIONS = {
    "fp32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "fp16": (torch.float16, True),
    "bf16": (torch.bfloat16, True),
}
BATCHES = (1, 17, 64, 4096)
ALIGNED, ODD = 256, 33
WIDTHS = (ALIGNED, ODD, 2048)


def default_tiles(choose, precision):
    """Each tile that a default function returns, with one width that leads to it."""
    dtype, tf32 = PRECISIONS[precision]
    found = {}
    for batch, width in itertools.product(BATCHES, WIDTHS):
        found.setdefault((choose(batch, width, dtype.itemsize, tf32=tf32), width % 16 == 0), width)
    return [(tile, ALIGNED if aligned else width) for (tile, aligned), width in found.items()]


def cases(choose):
    """Every tile and precision on sm_89; on sm_90 the same kernels differ only where the tile allows wgmma."""
    for precision in PRECISIONS:
        for tile, width in default_tiles(choose, precision):
            for capability in (89, 90) if tile.block_b >= 64 or width == ODD else (89,):
                name = f"{precision}-{tile.block_b}x{tile.block_u}x{tile.block_k}-{width}-sm{capability}"
                yield pytest.param(precision, tile, width, capability, id=name)


def assert_fits(resources, spare=0):
    assert resources.spill_bytes <= spare and resources.stack_bytes <= spare, f"{resources.spill_bytes} bytes spilled"
    assert resources.registers <= 255
    assert resources.shared_bytes <= SHARED_LIMIT


@pytest.mark.parametrize("precision, tile, width, capability", cases(tiles.default_cell_tile))
def test_cell_forward(precision, tile, width, capability):
    dtype, tf32 = PRECISIONS[precision]
    resources = aot.compile_cell_forward(dtype, tile, inputs=width, hidden=width, tf32=tf32, capability=capability)
    assert_fits(resources)
    on_tensor_cores = "mma" in resources.ptx
    assert on_tensor_cores == (precision != "fp32")


@pytest.mark.parametrize("precision, tile, width, capability", cases(tiles.default_step_tile))
def test_sequence(precision, tile, width, capability):
    dtype, tf32 = PRECISIONS[precision]
    arguments = dict(hidden=width, directions=2, tf32=tf32, capability=capability)
    assert_fits(aot.compile_sequence_forward(dtype, tile, **arguments))
    # Far below 255 registers ptxas may give up two of them for one more program on an SM: seen with odd widths in bf16.
    backward = aot.compile_sequence_backward(dtype, tile, **arguments)
    assert_fits(backward, spare=8 if width == ODD and backward.registers <= 128 else 0)


@pytest.mark.parametrize("capability", [89, 90])
def test_flags(capability):
    """What the other tests leave at its default, each once."""
    tile = tiles.default_step_tile(16, ALIGNED, 2)
    half = torch.float16
    assert_fits(aot.compile_cell_backward(half, POINTWISE_TILE, hidden=ODD, capability=capability))
    assert_fits(aot.compile_cell_gates(half, POINTWISE_TILE, hidden=ODD, capability=capability))
    bare = dict(bias=False, save_gates=False, capability=capability)
    assert_fits(aot.compile_cell_forward(half, tile, inputs=ALIGNED, hidden=ALIGNED, **bare))
    assert_fits(aot.compile_sequence_forward(half, tile, hidden=ALIGNED, gi_dtype=torch.float32, **bare))
    assert_fits(aot.compile_sequence_backward(half, tile, hidden=ALIGNED, grad_out=False, capability=capability))
    weight = torch.empty(3 * ALIGNED, ALIGNED, device="meta")
    arguments = dict(p_x=weight, p_y=weight, N=weight.numel(), BLOCK=1024, num_warps=4, num_stages=1)
    assert_fits(aot.compile_launch(aot.step.round_tf32_kernel, arguments, capability=capability))


def test_loads_of_aligned_rows_are_16_bytes():
    """The tile of each operand arrives asynchronously, 16 bytes at a time."""
    tile = tiles.default_step_tile(16, ALIGNED, 2)
    for resources in (
        aot.compile_cell_forward(torch.float16, tile, inputs=ALIGNED, hidden=ALIGNED),
        aot.compile_sequence_forward(torch.float16, tile, hidden=ALIGNED, directions=2),
        aot.compile_sequence_backward(torch.float16, tile, hidden=ALIGNED, directions=2),
    ):
        assert "cp.async.cg.shared.global" in resources.ptx


def test_spills_are_seen():
    """The measure itself: a tile known to be too large for its warps."""
    resources = aot.compile_cell_forward(torch.float16, Tile(64, 64, 64, 4, 2), inputs=ODD, hidden=ODD)
    assert resources.registers == 255 and resources.spill_bytes > 0


def test_steps_and_batch_take_no_part_in_the_choice_of_code():
    for kernel in (aot.step.sequence_forward_kernel, aot.step.sequence_backward_kernel):
        free = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
        assert free == {"s", "T", "B"}
    for kernel in (aot.cell.cell_forward_kernel, aot.cell.cell_backward_kernel):
        assert {parameter.name for parameter in kernel.params if parameter.do_not_specialize} == {"B"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lanes, hidden, reverse, states", [(6, 256, False, True), (2, 100, True, True), (2, 64, False, False)])
def test_prepare(dtype, lanes, hidden, reverse, states):
    resources = aot.compile_prepare(dtype, lanes=lanes, hidden=hidden, reverse=reverse, states=states)
    assert_fits(resources)
    assert "st.global.v4.b32" in resources.ptx  # fills 16 bytes at a time: bound by memory bandwidth


@pytest.mark.parametrize("capability", [89, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "rows, inputs, hidden, options",
    [
        (8, 256, 256, {"lanes": 6}), (32, 64, 64, {"prepares": False}), (200, 128, 512, {"reverse": True, "lanes": 2}),
        (2048, 128, 256, {"lanes": 2}), (32, 1024, 1024, {"batch_first": True}), (64, 33, 128, {}), (1024, 33, 256, {}),
    ],
)  # fmt: skip
def test_project(rows, inputs, hidden, options, dtype, capability):
    tile = projection_tile(rows, inputs, dtype.itemsize)
    resources = aot.compile_project(dtype, tile, inputs=inputs, hidden=hidden, capability=capability, **options)
    assert_fits(resources)
