"""Which implementation runs a call, and in which launch shape: pure functions of sizes and dtype.

No Triton, no GPU and no torch is needed to call them.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Literal

from torch_gru_fuse.planner.tiles import POINTWISE_TILE, Tile, default_cell_tile, default_step_tile

#: "auto" takes what was measured to be faster; "triton" and "torch" force one side.
CHOICES = ("auto", "triton", "torch")
_BYTES = {"torch.float32": 4, "torch.float16": 2, "torch.bfloat16": 2}


# Of a GRU with at most so many units cuDNN computes float32 without tensor cores although TF32 is allowed: its error against
# float64 stays at 1e-6 where TF32 gives 3e-4 (H200, H = 3, 64, 128; from H = 256 on it is that of TF32).  Nor do we there.
_NO_TF32_UP_TO_HIDDEN = 128
# Forward and backward of T=128, B=1024, H=256: 4.6 ms and cuDNN in a CUDA graph 9.1 ms (tf32), 2.5 and 5.4 ms (fp16).  At
# B=256, H=512 the two are equal, below that cuDNN is faster (H200, docs/results/step-h200.txt).  What lies between was not
# measured and stays with cuDNN.
_STEP_TRAINS_FROM_BATCH, _STEP_TRAINS_UP_TO_HIDDEN = 1024, 256
# float32 products without TF32 run on FMA units, where our tiles reach a fifth of cuBLAS (H200, cell, B = H = 1024: 1.70 ms and
# 0.37 ms): there PyTorch makes the products and a pointwise kernel the gates.


@dataclass(frozen=True)
class Plan:
    """How a call runs.

    Attributes:
        kernel: "step" (one launch a time step and layer), "cell" (one launch), "gates" (matrix products by PyTorch, then one
            launch for the gates) or "torch" (PyTorch's own path).
        tile: launch shape of the kernel; None for "torch".
        tf32: whether float32 products use TF32.
        reason: why this and not another.
    """

    kernel: Literal["step", "cell", "gates", "torch"]
    tile: Tile | None
    tf32: bool
    reason: str


def _choice() -> str:
    choice = os.environ.get("TORCH_GRU_FUSE_KERNELS", "auto")
    if choice not in CHOICES:
        raise ValueError(
            f"TORCH_GRU_FUSE_KERNELS is {choice!r}, expected one of {', '.join(map(repr, CHOICES))}"
        )
    return choice


def plan_gru(
    T: int, B: int, I: int, H: int, L: int, D: int, dtype: str, *, tf32_allowed: bool, training: bool, cudnn: bool,
    unsupported: str | None = None,
) -> Plan:  # fmt: skip
    """Plan of a sequence: T steps, batch B, I inputs, H units, L layers, D directions.

    `cudnn`: cuDNN could run it; `unsupported`: why the kernels could not, if so.
    """
    if unsupported is not None:
        return Plan("torch", None, False, unsupported)
    return _plan_gru(T, B, I, H, L, D, dtype, tf32_allowed, training, cudnn, _choice())


@functools.lru_cache(maxsize=1024)
def _plan_gru(
    T: int, B: int, I: int, H: int, L: int, D: int, dtype: str, tf32_allowed: bool, training: bool, cudnn: bool,
    choice: str,
) -> Plan:  # fmt: skip
    tf32 = dtype == "torch.float32" and tf32_allowed and H > _NO_TF32_UP_TO_HIDDEN
    step = functools.partial(Plan, "step", default_step_tile(B, H, _BYTES[dtype], directions=D, tf32=tf32), tf32)
    own = functools.partial(Plan, "torch", None, tf32)
    if choice != "auto" or not cudnn:
        reason = "asked for" if choice != "auto" else "cuDNN is switched off"
        return own(reason) if choice == "torch" and cudnn else step(reason)
    if training and B >= _STEP_TRAINS_FROM_BATCH and H <= _STEP_TRAINS_UP_TO_HIDDEN and (tf32 or _BYTES[dtype] == 2):
        return step("training with a large batch: faster than cuDNN")
    return own("cuDNN's sequence kernels are faster than one launch a step")


def plan_gru_cell(
    B: int, I: int, H: int, dtype: str, *, tf32_allowed: bool, training: bool, unsupported: str | None = None
) -> Plan:
    """Plan of one cell: batch B, I inputs, H units; `unsupported`: why the kernels could not run it, if so."""
    if unsupported is not None:
        return Plan("torch", None, False, unsupported)
    return _plan_gru_cell(B, I, H, dtype, tf32_allowed, training, _choice())


@functools.lru_cache(maxsize=1024)
def _plan_gru_cell(B: int, I: int, H: int, dtype: str, tf32_allowed: bool, training: bool, choice: str) -> Plan:
    tf32 = dtype == "torch.float32" and tf32_allowed
    if choice == "torch" and not training:
        return Plan("torch", None, tf32, "asked for")
    if choice == "auto" and dtype == "torch.float32" and not tf32:
        return Plan("gates", POINTWISE_TILE, tf32, "float32 without TF32: cuBLAS is faster than our FMA products")
    tile = default_cell_tile(B, H, _BYTES[dtype], inputs=I, tf32=tf32)
    return Plan("cell", tile, tf32, "one launch for both projections and the gates")
