"""Which implementation runs a call, and in which launch shape: pure functions of sizes and dtype.

No Triton, no GPU and no torch is needed to call them.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace
from typing import Literal

from torch_gru_fuse.planner import tuned
from torch_gru_fuse.planner.gpus import GPU
from torch_gru_fuse.planner.projection import projection_tile
from torch_gru_fuse.planner.stream import StreamPlan, plan_stream
from torch_gru_fuse.planner.tiles import POINTWISE_TILE, Tile, default_cell_tile, default_step_tile
from torch_gru_fuse.planner.whole_sequence import (
    ResidentPlan,
    StagedPlan,
    WholeSequencePlan,
    packed_plan,
    plan_whole_sequence,
    plan_whole_sequence_backward,
    predict,
    resets_plan,
    why_no_plan,
    why_not_gpu,
)

#: "auto" takes what was measured to be faster; "triton" and "torch" force one side; "step" forces one launch a time step.
CHOICES = ("auto", "triton", "step", "torch")
_BYTES = {"torch.float32": 4, "torch.float16": 2, "torch.bfloat16": 2}


def uses_tf32(T: int, B: int, H: int, *, training: bool) -> bool:
    """Whether float32 products use TF32 where it is allowed.

    cuDNN decides by shape; on an H200 (cuDNN 9.19) its error is that of TF32 in 379 of 391 shapes from H = 16 on, in the others
    (a batch of 1, or few steps of a small layer) that of float32.  Below, at H = 3, it is that of float32.
    """
    return H >= 16


# Ratio to cuDNN in a CUDA graph, forward, H200, 782 shapes: T 4 to 100, B 1 to 4096, H 16 to 2048, 1 and 3 layers, 1 and 2
# directions, float32 with TF32 and float16 (docs/results/sweep-h200.json).  What follows says no to all that took longer.
_WHOLE_FROM_STEPS = 4  # the fewest that were measured
# staged: rows of a program times the share of its registers that hold weights, up to which it is faster, by H and bytes of an
# element.  Above, its mma.sync lose to the wgmma of cuDNN's products (H=1024, B=512, fp16: 0.73; H=512, B=1024, tf32: 0.89).
_STAGED_MOST_WORK = {
    (256, 2): 1 << 30, (256, 4): 1 << 30, (512, 2): 64, (512, 4): 64, (1024, 2): 32, (1024, 4): 64, (2048, 2): 32,
}  # fmt: skip


# H that is no multiple of 16 takes copies of padded parameters, some 20 us in a graph and more called one by one.  H = 200, 300
# and 500, 16 and 100 steps: 1.3 to 5 times as fast as cuDNN in a graph; H = 20 to 100: 0.4 to 2.4
# (docs/results/padded-h200.txt).
_PADDED_FROM_HIDDEN = 129
_PADDED_FROM_STEPS = {True: 16, False: 64}  # in a CUDA graph; called by itself
# Called one by one, small layers wait for the host, and cuDNN has a kernel for one of them.  Two launches take less than that:
# T=4 to 64, B=8 to 64, H=16 to 128, 1.16 to 1.5 times as fast (docs/results/small-h200.txt).  Three, with PyTorch's input
# projection, take longer: T=64, B=64, I=1, H=64, tf32 94 us and cuDNN 80; T=200, B=128, H=128, tf32 257 and 264.  In a CUDA
# graph all are faster here.
_ONE_SMALL_LAYER_FROM_STEPS = 128


def whole_sequence_is_faster(
    plan: WholeSequencePlan, T: int, B: int, H: int, L: int, D: int, element_bytes: int, *, training: bool,
    backward: WholeSequencePlan | None = None, captured: bool = True, projected: bool = False,
) -> bool:  # fmt: skip
    """Whether a plan beats cuDNN, in a CUDA graph (``captured``) or called by itself.

    projected: the launch that prepares makes the input projection.

    One place for all thresholds; edit with a measurement beside it.
    """
    if training:
        return backward is not None and _training_is_faster(backward, T, B, H, element_bytes)
    if T < _WHOLE_FROM_STEPS:
        return False
    if H % 16 and (H < _PADDED_FROM_HIDDEN or _PADDED_FROM_STEPS[captured] > T):
        return False
    kernel = plan.kernel
    if isinstance(kernel, ResidentPlan):
        if not (captured or projected) and L * D == 1 and T < _ONE_SMALL_LAYER_FROM_STEPS:
            return False
        # Padded to 128 units, tf32: H=96, B=32, 100 steps 0.87.
        return not (element_bytes == 4 and kernel.units == 128 and H < 112)
    if isinstance(kernel, StagedPlan):
        padded = max(256, 1 << (H - 1).bit_length())
        registers = 3 * kernel.units * padded * element_bytes // 1024
        return kernel.rows * kernel.tiles * registers // 192 <= _STAGED_MOST_WORK[padded, element_bytes]
    return True


_BEATS_STEPS_FROM = 16  # the fewest that were measured


def whole_sequence_beats_steps(
    plan: WholeSequencePlan, T: int, B: int, H: int, L: int, D: int, element_bytes: int, *, training: bool,
    backward: WholeSequencePlan | None = None,
) -> bool:  # fmt: skip
    """Whether a plan with resets beats one launch a step, which is all that there is beside it: cuDNN knows no resets.

    Measured: T 16 to 512, H 128 and 256 with B 16 to 512, H 512 with B 32, float32 with TF32 and float16, inference and
    training: 1.5 to 6.7 times as fast in CUDA graphs, 1.2 to 8.4 called one by one (H100, docs/results/resets-h100.txt).
    Beyond, a plan that beats cuDNN in a CUDA graph is taken, captured or not: resets cost a step of either side a load and a
    few multiplications, and one launch a step takes longer than cuDNN for nearly all sizes.

    One place for all thresholds; edit with a measurement beside it.
    """
    measured = T >= _BEATS_STEPS_FROM and H % 16 == 0 and 128 <= H <= 512 and 16 <= B <= (512 if H <= 256 else 32)
    if measured and (backward is not None or not training):
        return True
    return whole_sequence_is_faster(plan, T, B, H, L, D, element_bytes, training=training, backward=backward)


# Training: forward and backward, H100, 602 shapes: T 4, 8, 16 and 100, B 1 to 2048, H 16 to 1024, otherwise the same
# (docs/results/sweep-train-h100.json).
_TRAINS_FROM_STEPS = 4  # the fewest that were measured; T=1, B=64, H=256 is slower in both types
# cuDNN has one kernel for small layers, and in float32 makes their recurrent products without TF32: T=16, B=8, H=32, tf32 0.81
# to 0.95, B=64, H=16, 3 layers, fp16 0.98.
_SMALL_LAYERS_TRAIN_FROM_STEPS, _SMALL_LAYERS_TRAIN_FROM_BATCH = 64, 256
# T=100, H=128, layer by layer, tf32: B=1 0.87, B=32 0.99, B=128 1.6.
_WAVEFRONT_128_TRAINS_FROM_BATCH = 64
# staged: rows of a program in the backward.  H=1024, B=256: tf32 (128 rows) 0.72 to 0.85, fp16 (64 rows) 0.90 to 1.1; H=512,
# B=1024, tf32 (128 rows) 0.86 to 1.4.
_STAGED_MOST_ROWS = {
    (256, 2): 128, (256, 4): 128, (512, 2): 128, (512, 4): 64, (1024, 2): 32, (1024, 4): 64,
}  # fmt: skip


def _training_is_faster(backward: WholeSequencePlan, T: int, B: int, H: int, element_bytes: int) -> bool:
    """Whether forward and backward of whole sequences beat cuDNN's in a CUDA graph; ``backward``: the plan of the latter.

    Called one by one, too, they take the host less time than cuDNN behind an op (T=200, H=64, 2 layers: 1.7 and 2.6 ms).
    """
    kernel = backward.kernel
    if T < _TRAINS_FROM_STEPS:
        return False
    few = T < _SMALL_LAYERS_TRAIN_FROM_STEPS
    if few and H <= 64 and B < _SMALL_LAYERS_TRAIN_FROM_BATCH and (element_bytes == 4 or H < 32):
        return False
    if isinstance(kernel, StagedPlan):
        padded = 1 << (H - 1).bit_length()
        return kernel.rows * kernel.tiles <= _STAGED_MOST_ROWS[padded, element_bytes]
    if H <= 128 and element_bytes == 4 and not isinstance(kernel, ResidentPlan) and backward.lanes == 1:
        return B >= _WAVEFRONT_128_TRAINS_FROM_BATCH and not few
    return True


# Packed sequences, H200, 144 shapes: T 32 and 100, B 1 to 1024, H 16 to 1024, 1 and 2 layers and directions, float32 with TF32
# and float16, inference and training (docs/results/packed-sweep-h200.json).  All take the GPU less time than cuDNN's graph.
# Called one by one both wait for the host: with 32 steps of one layer and direction 1.04 to 3.5 times as fast, in other runs
# 0.8 to 2.7 times; with 8 steps half of all take longer.
_PACKED_FROM_STEPS = {True: 64, False: 32}  # one layer and direction; more


# Row offsets of the whole-sequence kernels are bytes in 32 bits; a row holds at most gi of two directions in float32.
_MOST_BYTES = 2**31


# Forward and backward of T=128, B=1024, H=256: 4.6 ms and cuDNN in a CUDA graph 9.1 ms (tf32), 2.5 and 5.4 ms (fp16).  At
# B=256, H=512 the two are equal, below that cuDNN is faster (H200, docs/results/step-h200.txt).  What lies between was not
# measured and stays with cuDNN.
_STEP_TRAINS_FROM_BATCH, _STEP_TRAINS_UP_TO_HIDDEN = 1024, 256
# Forward of T=64, B=16, H=4096: 1.59 ms and cuDNN 2.06 (fp16), 3.21 and 3.73 (tf32); at H=2048 cuDNN is faster (0.61 and 0.84).
# Forward and backward: 4.59 and 5.88 (fp16), 9.82 and 11.41 (tf32; an H100).
_STEP_FROM_HIDDEN, _STEP_UP_TO_BATCH, _STEP_FROM_STEPS = 4096, 16, 16
# float32 products without TF32 run on FMA units, where our tiles reach a fifth of cuBLAS (H200, cell, B = H = 1024: 1.70 ms and
# 0.37 ms): there PyTorch makes the products and a pointwise kernel the gates.


@dataclass(frozen=True)
class Plan:
    """How a call runs.

    Attributes:
        kernel: "whole" (whole sequences in one launch), "stream" (one time step, one launch a layer), "step" (one launch a time
            step and layer), "cell" (one launch), "gates"
            (matrix products by PyTorch, then one launch for the gates) or "torch" (PyTorch's own path).
        tile: launch shape of the kernel, of "whole" that of the step kernel where its launch does not fit; None for "torch".
        tf32: whether float32 products use TF32.
        reason: why this and not another.
        whole: of "whole", its launches.
        stream: of "stream", its launches.
        backward: launches of the backward of "whole" and "step", if it takes whole sequences; None: a launch a step.
        backward_tile: launch shape of one step of their backward; None without one.
    """

    kernel: Literal["whole", "stream", "step", "cell", "gates", "torch"]
    tile: Tile | None
    tf32: bool
    reason: str
    whole: WholeSequencePlan | None = None
    stream: StreamPlan | None = None
    backward: WholeSequencePlan | None = None
    backward_tile: Tile | None = None


def choice() -> str:
    """TORCH_GRU_FUSE_KERNELS."""
    value = os.environ.get("TORCH_GRU_FUSE_KERNELS", "auto")
    if value not in CHOICES:
        raise ValueError(f"TORCH_GRU_FUSE_KERNELS is {value!r}, expected one of {', '.join(map(repr, CHOICES))}")
    return value


def plan_gru(
    T: int, B: int, I: int, H: int, L: int, D: int, dtype: str, *, tf32_allowed: bool, training: bool, cudnn: bool,
    unsupported: str | None = None, gpu: GPU | None = None, dropout: bool = False, captured: bool = True, resets: bool = False,
) -> Plan:  # fmt: skip
    """Plan of a sequence: T steps, batch B, I inputs, H units, L layers, D directions.

    `cudnn`: cuDNN could run it; `unsupported`: why the kernels could not, if so; `gpu`: None: no whole-sequence kernels;
    `dropout`: there are masks between the layers; `captured`: launches cost the host nothing, for a CUDA graph records them;
    `resets`: states are reset between steps.
    """
    if unsupported is not None:
        return Plan("torch", None, False, unsupported)
    return _plan_gru(T, B, I, H, L, D, dtype, tf32_allowed, training, cudnn, choice(), gpu, dropout, captured, resets)


#: A pair in one launch is predicted to take at most this part of what its two layers take one after the other; else two calls
#: run.  Of what it lets pass the forward was 1.2 to 2.0 times, training 1.4 to 1.9 times as fast as two calls, in CUDA graphs
#: (H200, docs/results/pair-h200.txt).
_PAIR_PAYS_UP_TO = 0.75


def pair_is_faster(
    both: WholeSequencePlan, single: WholeSequencePlan, T: int, B: int, H: int, element_bytes: int, multiprocessors: int, *,
    backward: WholeSequencePlan | None = None,
) -> bool:  # fmt: skip
    """Whether one launch for two layers beats two launches for one each; ``backward``: the plan of the pair's, for training.

    One place for all thresholds; edit with a measurement beside it.
    """
    if isinstance(single.kernel, StagedPlan) and single.kernel.ring:  # T=128, B=256, H=256: 619 us, two calls 579
        return False
    sizes = {"steps": T, "batch": B, "hidden": H, "layers": 1, "element_bytes": element_bytes}
    sizes["multiprocessors"] = multiprocessors
    if predict(both, reverse=True, **sizes).us > _PAIR_PAYS_UP_TO * 2 * predict(single, reverse=False, **sizes).us:
        return False
    if backward is None:
        return True
    # of the backward there is no prediction: it is as fast as one where all programs of both are on the GPU at once
    return not isinstance(backward.kernel, StagedPlan) and backward.programs(B, H) <= multiprocessors


def plan_gru_pair(
    T: int, B: int, H: int, dtype: str, *, tf32_allowed: bool, training: bool, cudnn: bool, gpu: GPU | None = None
) -> Plan | str:
    """Plan of one launch for two layers of which none is the other's input, or why a call of each runs."""
    return _plan_gru_pair(T, B, H, dtype, tf32_allowed, training, cudnn, choice(), gpu)


@functools.lru_cache(maxsize=4096)
def _plan_gru_pair(
    T: int, B: int, H: int, dtype: str, tf32_allowed: bool, training: bool, cudnn: bool, choice: str, gpu: GPU | None
) -> Plan | str:
    if choice in ("step", "torch"):
        return f"no whole sequences in one launch with TORCH_GRU_FUSE_KERNELS={choice}"
    if H % 16:
        return f"H = {H} is no multiple of 16"
    if dtype not in _BYTES:
        return f"no kernels for {dtype}"
    tf32 = dtype == "torch.float32" and tf32_allowed and uses_tf32(T, B, H, training=training)
    both = _whole(B, H, 1, 2, dtype, tf32, gpu)
    if isinstance(both, str):
        return both
    assert gpu is not None
    if isinstance(both.kernel, StagedPlan):  # in a ring the states of two directions lie side by side
        both = replace(both, kernel=replace(both.kernel, ring=False))
    single = _plan_gru(T, B, H, H, 1, 1, dtype, tf32_allowed, training, cudnn, choice, gpu, False, True, False)
    backward = _whole_backward(B, H, 1, 2, dtype, tf32, gpu) if training else None
    if training and backward is None:
        return "no backward of whole sequences in one launch for both"
    if choice == "auto":
        if single.whole is None:
            return f"each by itself does not run whole sequences in one launch: {single.reason}"
        sizes = T, B, H, _BYTES[dtype], gpu.multiprocessors
        if not pair_is_faster(both, single.whole, *sizes, backward=backward):
            return "one launch for both is not expected to be faster than one for each"
    return Plan(
        "whole", single.tile, tf32, "two layers in one launch: faster than one after the other", whole=both, backward=backward,
        backward_tile=single.backward_tile,
    )  # fmt: skip


def plan_gru_packed(
    T: int, B: int, I: int, H: int, L: int, D: int, dtype: str, *, tf32_allowed: bool, training: bool,
    unsupported: str | None = None, gpu: GPU | None = None,
) -> Plan:  # fmt: skip
    """Plan of packed sequences: T steps of the longest, B sequences; the rest as in `plan_gru`.

    "whole" or "torch": there are no launches of single steps.
    """
    if unsupported is not None:
        return Plan("torch", None, False, unsupported)
    return _plan_gru_packed(T, B, H, L, D, dtype, tf32_allowed, training, choice(), gpu)


@functools.lru_cache(maxsize=4096)
def _plan_gru_packed(
    T: int, B: int, H: int, L: int, D: int, dtype: str, tf32_allowed: bool, training: bool, choice: str, gpu: GPU | None
) -> Plan:
    tf32 = dtype == "torch.float32" and tf32_allowed and uses_tf32(T, B, H, training=training)
    own = functools.partial(Plan, "torch", None, tf32)
    if choice in ("torch", "step"):
        return own("asked for" if choice == "torch" else "no launches of single steps for packed sequences")
    launches = _packed_launches(B, H, L, D, dtype, tf32, training, gpu)
    if isinstance(launches, str):
        return own(launches)
    whole, backward = launches
    reason = "asked for"
    if choice == "auto":
        if _PACKED_FROM_STEPS[L * D == 1] > T:
            return own("cuDNN is faster than whole sequences in one launch, as far as was measured")
        reason = "whole sequences in one launch, without their padding: faster than cuDNN"
    return Plan("whole", None, tf32, reason, whole=whole, backward=backward)


@functools.lru_cache(maxsize=4096)
def _packed_launches(
    B: int, H: int, L: int, D: int, dtype: str, tf32: bool, training: bool, gpu: GPU | None
) -> tuple[WholeSequencePlan, WholeSequencePlan | None] | str:
    """Forward and backward, or why there are none; for all T, of which there is another in each batch."""
    whole = _whole(B, H, L, D, dtype, tf32, gpu)
    if isinstance(whole, str):
        return whole
    packed = functools.partial(packed_plan, multiprocessors=gpu.multiprocessors)
    whole = packed(whole, B, H, _BYTES[dtype])
    if isinstance(whole, str) or not training:
        return whole if isinstance(whole, str) else (whole, None)
    backward = _whole_backward(B, H, L, D, dtype, tf32, gpu)
    if backward is not None:
        backward = packed(backward, B, H, _BYTES[dtype], backward=True)
    if isinstance(backward, WholeSequencePlan):
        return whole, backward
    return backward or "there is no launch for the backward of whole sequences"


@functools.lru_cache(maxsize=4096)
def _plan_gru(
    T: int, B: int, I: int, H: int, L: int, D: int, dtype: str, tf32_allowed: bool, training: bool, cudnn: bool,
    choice: str, gpu: GPU | None, dropout: bool, captured: bool, resets: bool,
) -> Plan:  # fmt: skip
    tf32 = dtype == "torch.float32" and tf32_allowed and uses_tf32(T, B, H, training=training)
    shared = {} if gpu is None else {"shared_bytes": gpu.shared_bytes_per_program}
    tile = default_step_tile(B, H, _BYTES[dtype], directions=D, tf32=tf32, **shared)
    back = None
    if training:
        back = default_step_tile(B, H, _BYTES[dtype], directions=D, tf32=tf32, backward=True, **shared)
    step, in_one = (functools.partial(Plan, kernel, tile, tf32, backward_tile=back) for kernel in ("step", "whole"))
    own = functools.partial(Plan, "torch", None, tf32)
    if choice == "torch" and (cudnn or resets):
        return own("asked for")
    step_by_step = step
    whole = backward = None
    if choice in ("auto", "triton"):
        if T == 1 and D == 1 and not training and not dropout and not resets and gpu is not None:
            stream = plan_stream(
                B, I, H, L, _BYTES[dtype], multiprocessors=gpu.multiprocessors, capability=gpu.capability
            )
            if isinstance(stream, StreamPlan):
                return Plan("stream", None, False, "one time step, one launch a layer: faster than cuDNN", stream=stream)
        whole = _whole(B, H, L, D, dtype, tf32, gpu)
        if training:
            backward = _whole_backward(B, H, L, D, dtype, tf32, gpu)
            if resets and backward is not None:
                backward = resets_plan(backward, H, _BYTES[dtype], backward=True)
            step, in_one = (functools.partial(f, backward=backward) for f in (step, in_one))
    if choice != "auto" or not cudnn:
        reason = "asked for" if choice != "auto" else "cuDNN is switched off"
        return step(reason) if not isinstance(whole, WholeSequencePlan) else in_one(reason, whole)
    if resets:
        if not isinstance(whole, WholeSequencePlan):
            return step_by_step(f"one launch a step: cuDNN knows no resets; {whole}")
        if whole_sequence_beats_steps(whole, T, B, H, L, D, _BYTES[dtype], training=training, backward=backward):
            return in_one("whole sequences in one launch: with resets the alternative is one launch a step", whole)
        return step_by_step("one launch a step: cuDNN knows no resets, and whole sequences are not expected to be faster")
    if isinstance(whole, WholeSequencePlan):
        sizes = (T, B, H, L, D, _BYTES[dtype])
        projected = projection_tile(T * B, I, _BYTES[dtype]) is not None
        options = dict(backward=backward, training=training, captured=captured, projected=projected)
        if whole_sequence_is_faster(whole, *sizes, **options):
            return in_one("whole sequences in one launch: faster than cuDNN", whole)
        whole = "cuDNN is faster than whole sequences in one launch, as far as was measured"
    tensor_cores = tf32 or _BYTES[dtype] == 2
    if tensor_cores and T >= _STEP_FROM_STEPS and B <= _STEP_UP_TO_BATCH and H >= _STEP_FROM_HIDDEN:
        return step("weights that are larger than L2: faster than cuDNN")
    if training and B >= _STEP_TRAINS_FROM_BATCH and H <= _STEP_TRAINS_UP_TO_HIDDEN and tensor_cores:
        return step("training with a large batch: faster than cuDNN")
    return own(f"cuDNN's sequence kernels are faster than one launch a step; {whole}")


def _why_no_whole(B: int, H: int, dtype: str, tf32: bool, gpu: GPU | None) -> str | None:
    """Why there can be no launch for whole sequences, whatever its plan; None: there can."""
    if gpu is None:
        return "no GPU for whole sequences in one launch"
    if dtype == "torch.float32" and not tf32:
        return "whole sequences in one launch need TF32 for float32"
    refused = why_not_gpu(gpu)
    if refused is not None:
        return refused
    if B * -(-H // 16) * 16 * 6 * 4 >= _MOST_BYTES:
        return f"a batch of {B} with H = {H} is more than 32-bit offsets reach"
    return None


def _whole(B: int, H: int, L: int, D: int, dtype: str, tf32: bool, gpu: GPU | None) -> WholeSequencePlan | str:
    """The plan for whole sequences, measured by `tune` or predicted, or why there is none."""
    refused = _why_no_whole(B, H, dtype, tf32, gpu)
    if refused is not None:
        return refused
    lanes = 2 if D == 2 else L
    entry = tuned.lookup(tuned.key_of(gpu.name, B, H, lanes, reverse=D == 2, dtype=dtype.removeprefix("torch.")))
    if entry is not None:
        return entry.plan
    options = {
        "reverse": D == 2, "multiprocessors": gpu.multiprocessors, "shared_bytes": gpu.shared_bytes_per_program,
    }  # fmt: skip
    plan = plan_whole_sequence(B, H, lanes, _BYTES[dtype], **options)
    return plan or why_no_plan(B, H, lanes, _BYTES[dtype], **options)


def _whole_backward(
    B: int, H: int, L: int, D: int, dtype: str, tf32: bool, gpu: GPU | None
) -> WholeSequencePlan | None:
    """The plan of its backward, if there is one."""
    if _why_no_whole(B, H, dtype, tf32, gpu) is not None:
        return None
    return plan_whole_sequence_backward(
        B, H, 2 if D == 2 else L, _BYTES[dtype], reverse=D == 2, multiprocessors=gpu.multiprocessors,
        shared_bytes=gpu.shared_bytes_per_program,
    )  # fmt: skip


def plan_gru_cell(
    B: int, I: int, H: int, dtype: str, *, tf32_allowed: bool, training: bool, unsupported: str | None = None
) -> Plan:
    """Plan of one cell: batch B, I inputs, H units; `unsupported`: why the kernels could not run it, if so."""
    if unsupported is not None:
        return Plan("torch", None, False, unsupported)
    return _plan_gru_cell(B, I, H, dtype, tf32_allowed, training, choice())


@functools.lru_cache(maxsize=1024)
def _plan_gru_cell(B: int, I: int, H: int, dtype: str, tf32_allowed: bool, training: bool, choice: str) -> Plan:
    tf32 = dtype == "torch.float32" and tf32_allowed
    if choice == "torch" and not training:
        return Plan("torch", None, tf32, "asked for")
    if choice == "auto" and dtype == "torch.float32" and not tf32:
        return Plan("gates", POINTWISE_TILE, tf32, "float32 without TF32: cuBLAS is faster than our FMA products")
    tile = default_cell_tile(B, H, _BYTES[dtype], inputs=I, tf32=tf32)
    return Plan("cell", tile, tf32, "one launch for both projections and the gates")
