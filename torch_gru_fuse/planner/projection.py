"""The input projection of whole sequences: whether the launch that prepares makes it, too.

The alternative is PyTorch's product, a launch of its own that takes the host 20 to 40 us more.
"""

from torch_gru_fuse.planner.tiles import Tile

__all__ = ["projection_tile"]

# Rows up to which a call in a CUDA graph is as fast as with PyTorch's product, by inputs and bytes of an element; H200, us of a
# call with PyTorch's product and with ours (docs/results/projection-h200.txt).  I=64, 32768 rows: fp16 1222 and 1222, tf32 1454
# and 1450.  I=256, fp16: 32 rows 8.9 and 7.2, 2048 rows 200 and 197; tf32: 512 rows 64.5 and 64.0, 2048 rows 234.5 and
# 235.8.  I=1024, fp16: 128 rows 24.1 and 23.3, 512 rows 74.2 and 75.1; tf32: 32 rows 16.5 and 14.8, 128 rows 29.4 and 34.8.
_MOST_ROWS = {2: ((64, 32768), (256, 2048), (1024, 128)), 4: ((64, 32768), (256, 2048), (1024, 32))}
# The same where rows do not start at multiples of 16 bytes, so that every element is its own load.  I=33, 1024 rows, tf32: 41.1
# and 38.3; I=250, 256 rows: 40.2 and 40.3; I=100, 2048 rows: 73.1 and 78.9.
_MOST_ROWS_UNALIGNED = ((64, 2048), (256, 256))


def projection_tile(rows: int, inputs: int, element_bytes: int) -> Tile | None:
    """Tile of ``project_kernel`` for x [rows, inputs]; None: PyTorch makes the product."""
    unaligned = inputs % 16 != 0
    limits = _MOST_ROWS_UNALIGNED if unaligned else _MOST_ROWS[element_bytes]
    if rows > next((most for width, most in limits if inputs <= width), 0):
        return None
    if unaligned:
        return Tile(16, 32, 16, num_warps=4, num_stages=1)
    if rows <= 64:
        return Tile(16, 32, 256 // element_bytes, num_warps=4, num_stages=3)
    if rows <= 256 and inputs <= 256:
        return Tile(32, 32, 256 // element_bytes, num_warps=4, num_stages=3)
    return Tile(64, 64, 128 // element_bytes, num_warps=4, num_stages=3)
