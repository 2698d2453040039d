"""Triton kernels and their launchers.  They know tensors and tiles, no dispatcher and no op.

Nothing here imports from the rest of the package at run time, so that the same files can be loaded once more under another
name with Triton's interpreter switched on.
"""

from .cell import cell_backward, cell_forward, cell_gates
from .step import sequence_backward, sequence_forward

__all__ = ["cell_backward", "cell_forward", "cell_gates", "sequence_backward", "sequence_forward"]
