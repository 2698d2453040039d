"""Launch shapes of the kernels that tile [batch, units]: pure functions of sizes, without Triton and without a GPU."""

from dataclasses import dataclass

__all__ = ["POINTWISE_TILE", "Tile", "default_cell_tile", "default_step_tile"]

# Fewest SMs of the GPUs aimed at (RTX 4090: 128, H200: 132): a launch with fewer programs leaves some of them idle.
_PROGRAMS = 128


@dataclass(frozen=True)
class Tile:
    """What one program computes, [block_b batch rows, block_u units], how it walks the reduction, and with what.

    block_k: length of a step of the reduction loop.
    num_stages: such steps in flight (loads of a later one run beside the product of the present one).
    """

    block_b: int
    block_u: int
    block_k: int
    num_warps: int
    num_stages: int


# Kernels without a reduction: 512 elements, four a thread, units contiguous.
POINTWISE_TILE = Tile(block_b=4, block_u=128, block_k=16, num_warps=4, num_stages=1)


def default_cell_tile(
    batch: int, hidden: int, dtype_bytes: int, *, inputs: int | None = None, tf32: bool = True
) -> Tile:
    """Tile of ``cell_forward``.  ``inputs`` if known; ``tf32`` is its flag, it matters for dtype_bytes 4."""
    aligned = hidden % 16 == 0 and (inputs is None or inputs % 16 == 0)
    # Rows of 128 bytes: longer ones make no difference in fp16 (H=256: 3.89 and 3.97 us) and cost tf32, whose weights are
    # rounded in registers, 15% (H=256: 7.5 and 9.0 us; H=1024, batch 64: 24 and 28 us).
    return _tile(batch, hidden, dtype_bytes, aligned, tf32, directions=1, row_bytes=128)


def default_step_tile(
    batch: int, hidden: int, dtype_bytes: int, *, directions: int = 1, tf32: bool = True, shared_bytes: int = 99 * 1024,
    backward: bool = False,
) -> Tile:  # fmt: skip
    """Tile of ``sequence_forward`` or ``sequence_backward``, which run ``directions`` times the programs of a cell.

    shared_bytes: shared memory that a program may have.
    """
    if batch <= 16 and hidden >= 2048 and hidden % 16 == 0 and (tf32 or dtype_bytes == 2):
        # Weights come from L2 or memory: as much as possible on its way; one buffer less than stages is used.  H=4096, batch
        # 16, 64 steps, forward: fp16 1.49 ms, with 4 stages 1.51, with 6 of 128 bytes 1.69; tf32 3.03, 3.10, 3.21.  Backward:
        # fp16 1.73 ms, with 5 stages 1.86; tf32 3.85 and 4.05.
        stages = 8 if backward else 5 if shared_bytes >= 112 * 1024 else 4
        return Tile(16, 32, 256 // dtype_bytes, num_warps=4, num_stages=stages)
    # Rows of 256 bytes: a step of a small layer waits for L2 once a round of the loop.  Half of that costs the backward a
    # quarter (H=1024, batch 64, fp16: 14.3 and 11.2 us; tf32: 23.6 and 17.8 us), the forward 5 to 7%.
    return _tile(batch, hidden, dtype_bytes, hidden % 16 == 0, tf32, directions=directions, row_bytes=256)


def _tile(
    batch: int, hidden: int, dtype_bytes: int, aligned: bool, tf32: bool, *, directions: int, row_bytes: int
) -> Tile:
    """Times: code for sm_89 run on an H200, launches in a CUDA graph."""
    if not aligned:
        # Rows do not start at multiples of 16 bytes: every element is its own load, with its own address in registers.
        # A reduction step longer than 16, or a tile of 64 rows, spills (up to 600 bytes at 255 registers).
        return Tile(16 if batch <= 16 else 32, 32, 16, num_warps=4, num_stages=1)
    programs = -(-batch // 64) * -(-hidden // 32) * directions  # of the large tile
    large = programs >= _PROGRAMS
    if dtype_bytes == 4 and not tf32:
        # FMA units: a thread holds its operands for a whole reduction step.  64 x 32 needs up to 255 registers with 4 warps
        # and 64 x 64 spills; below a full GPU the smallest tile is the fastest (H=1024, batch 64: 111 us, 64 x 32: 215 us).
        return Tile(64, 32, 32, num_warps=8, num_stages=3) if large else Tile(16, 16, 32, num_warps=4, num_stages=3)
    if large:
        # Fewer loads a product, once there is work for all SMs: batch 512, H=1024, fp16: 19 us, 32 x 32: 36 us.
        # 64 x 64 would need fewer still, but the cell's four sums of it spill on sm_89, and so do rows of 256 bytes in tf32.
        return Tile(64, 32, 128 // dtype_bytes, num_warps=4, num_stages=3)
    # 16 rows: the least that an mma instruction takes.  Four warps of 8 units each: no warp repeats another's weights.
    # Batch 64, H=1024, fp16: 7.7 us; 32 x 32: 12 us; 64 x 32: 14 us.  H=256: 3.3 us; 16 x 16 with one warp: 3.5 us.
    return Tile(16, 32, row_bytes // dtype_bytes, num_warps=4, num_stages=3)
