"""Plans of the kernel for single steps of tiny batches: pure functions of sizes, without Triton and without a GPU.

``kernels.stream`` says what the kernel does.  Here is decided how many units a program makes, how it walks k, and whether
launches overlap.  All times are of an H200 (132 multiprocessors), in us of a step in a CUDA graph, whose weights then stay in
L2; B I H L are the sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["StreamPlan", "plan_stream"]

_MOST_BATCH = 8  # every weight is multiplied with every row on FMA units
# B 1, I = H = 1024, 2 layers: 7.5 to 8.0 in fp16, 14.1 in fp32; cuDNN 18.6 and 28.2.  Twice that was compiled, and not timed.
_MOST_HIDDEN = 2048
# Of several rows times weights, a gate and layer.  B 8, I = H = 512, 2 layers: 10.9 in fp16, 13.0 in fp32; cuDNN 14.3 and 20.2.
# That is 2 us for the launches and the rest for products, which grow with these; cuDNN's hardly do.
_MOST_PRODUCTS = 8 * 512 * (512 + 512)
_LANES = 32
_VECTOR_BYTES = 16  # of one load of a thread


@dataclass(frozen=True)
class StreamPlan:
    """How ``stream_kernel`` is launched, once a layer.  units, block_k and num_warps are powers of two.

    units: of a program, for all batch rows.  block_k: length of a step along k.
    depth: such steps whose weights are on their way at once; 0: a loop that is not unrolled.
    num_warps: of a program; along k as many as block_k has room for at 16 bytes a thread, the others along units.
    overlap: a layer's launch begins before the one below has ended (programmatic dependent launch, compute capability 9.0).
    predicted_us: of all layers in a CUDA graph.
    """

    units: int
    block_k: int
    num_warps: int
    depth: int
    overlap: bool = False
    predicted_us: float = field(default=0.0, compare=False)

    def programs(self, hidden: int) -> int:
        """Programs of a launch."""
        return -(-hidden // self.units)


def plan_stream(
    batch: int,
    inputs: int,
    hidden: int,
    layers: int,
    element_bytes: int,
    *,
    multiprocessors: int = 128,
    capability: tuple[int, int] = (8, 9),
) -> StreamPlan | str:
    """The plan for one step of a stack in one direction, or why there is none."""
    sizes = {"batch": batch, "inputs": inputs, "hidden": hidden, "layers": layers, "multiprocessors": multiprocessors}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    if element_bytes not in (2, 4):
        raise ValueError(f"element_bytes is {element_bytes}, expected 2 (float16, bfloat16) or 4 (float32)")

    rows = 1 << (batch - 1).bit_length()
    longest = max(hidden, inputs)
    warp_k = _LANES * _VECTOR_BYTES // element_bytes  # of one load by a warp
    if batch > _MOST_BATCH:
        return f"a batch of {batch} is more than {_MOST_BATCH}"
    if longest > _MOST_HIDDEN:
        return f"H = {hidden}, I = {inputs}: more than {_MOST_HIDDEN}"
    if rows > 1 and rows * hidden * (longest + hidden) > _MOST_PRODUCTS:
        return f"B = {batch}, H = {hidden}, I = {inputs}: so many products are faster on tensor cores"
    if hidden * element_bytes % _VECTOR_BYTES:
        return f"H = {hidden}: rows of weights do not begin at multiples of {_VECTOR_BYTES} bytes"
    if inputs * element_bytes % _VECTOR_BYTES and inputs > warp_k:
        # Every element is a load of its own, with its own address.
        return f"I = {inputs} > {warp_k}: rows of weights do not begin at multiples of {_VECTOR_BYTES} bytes"

    steps = -(-hidden // warp_k) + -(-longest // warp_k)
    if rows * longest > 2048 or steps > 16:
        # Unrolled, operands and weights of so many steps spill.  B 8, 512 512 2: 10.9 in fp16 and 13.0 in fp32, unrolled 12.2
        # and 16.2.
        units, block_k, num_warps, depth = 4, 2 * warp_k, 8, 0
    elif element_bytes == 4 and rows == 1 and 2 * warp_k < hidden <= 4 * multiprocessors:
        # B 1, 512 512 2, fp32: 4.5, and 5.1 with four units; without overlap 5.3 and 5.8.
        units, block_k, num_warps, depth = 2, 2 * warp_k, 4, 4
    else:
        # Four units, a warp each.  B 1, 512 512 2, fp16: 3.9; two units 4.1, eight 4.8 to 5.1, sixteen 6.8.  1024 1024 2: 8.0,
        # eight units 10.4; 512 512 4: 7.2 and 9.3; B 4, 512 512 2: 6.0 and 8.2.  Without overlap the same order.
        units, block_k, num_warps, depth = 4, warp_k, 4, 8 if rows == 1 else 4
        while block_k > 32 and block_k // 2 >= longest:
            block_k //= 2
    # Overlapped and not: 512 512 2 fp16 3.9 and 5.0, 512 512 4 fp32 9.0 and 11.3, 1024 1024 2 8.0 and 7.5 in fp16, 14.1 and
    # 14.3 in fp32.
    overlap = capability >= (9, 0) and layers > 1
    predicted_us = _predicted_us(rows, inputs, hidden, layers, element_bytes, multiprocessors, overlap)
    return StreamPlan(units, block_k, num_warps, depth, overlap, predicted_us)


def _predicted_us(
    rows: int, inputs: int, hidden: int, layers: int, element_bytes: int, multiprocessors: int, overlap: bool
) -> float:
    """Launches, weights over the bandwidth of L2, products of all rows but the first.

    Fitted by hand to what plans of 18 problems took on an H200, 3.3 to 14.3 us: 14% less to 19% more than that.  Other GPUs are
    assumed to have their share by multiprocessors, which is a guess, and weights that do not fit L2 take longer.
    """
    weights = 3 * hidden * (inputs + hidden + (layers - 1) * 2 * hidden)
    share = multiprocessors / 132
    loads_us = weights * element_bytes / (5.5e6 * share)
    products_us = (rows - 1) * weights / (3.5e6 * share)
    return layers * (1.5 if overlap else 2.0) + loads_us + products_us
