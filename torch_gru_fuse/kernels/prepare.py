"""What kernels of whole sequences find in memory: sequences that say "not yet", the initial state, an error block, and gi.

The product that makes gi comes before this launch: what it writes would push the fresh lines out of L2, where they are polled.
Where it is small it is a part of it (``project_kernel``): then L2 holds both, and the host launches once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from .gates import dot

if TYPE_CHECKING:
    from torch import Tensor

    from ..planner.tiles import Tile


@triton.jit
def _prepare(
    pid,
    p_hx, p_host,
    p_out, p_below, p_h0, p_h_n, p_error,
    launch_id, T, B, R,
    LANES: tl.constexpr, H: tl.constexpr, HX: tl.constexpr,
    REVERSE: tl.constexpr, FILL_OUT: tl.constexpr, STATES: tl.constexpr, RING: tl.constexpr, PACKED: tl.constexpr,
    BLOCK: tl.constexpr, STATE_BLOCK: tl.constexpr,
):  # fmt: skip
    """One of three things, by program.

    Fills a block of out [T, B, (2)H] (if FILL_OUT) or of below [LANES-1, T, B, H] with the pattern that says "not yet": all
    ones, which is a NaN.  Or, if STATES, fills a block of h_n [LANES, B, H] likewise and copies hx [LANES, B, HX] to h0, zeros
    beyond HX and every NaN made the canonical one: [LANES, B, H], or, if REVERSE, [B, 2H].  If RING, also to the first place
    of a ring, below [2, R, LANES * H], as tf32 of epoch 1; the second place is of epoch 0, where 1 comes first.  The first
    program also writes the error block: no error yet, where the host's word is, and what to write there.

    PACKED: sequences are packed, their rows [T] take the place of [T, B].

    Bytes: the sequences once.  Bound by memory bandwidth, or by the launch.
    """
    dtype: tl.constexpr = p_out.dtype.element_ty
    integer: tl.constexpr = tl.int32 if dtype.primitive_bitwidth == 32 else tl.int16
    if pid == 0:
        tl.store(p_error, 0)
        tl.store(p_error + 1, p_host.to(tl.int64))
        tl.store(p_error + 2, launch_id.to(tl.int64))

    rows = tl.full((), 1, tl.int64) if PACKED else B.to(tl.int64)
    out_size = T * rows * (2 * H if REVERSE else H)
    below_size = T * rows * ((LANES - 1) * H)
    out_blocks = 0
    if FILL_OUT:
        out_blocks = ((out_size + BLOCK - 1) // BLOCK).to(tl.int32)
    below_blocks = 0
    if LANES > 1 and not REVERSE:
        below_blocks = ((below_size + BLOCK - 1) // BLOCK).to(tl.int32)
    if pid < out_blocks:
        o = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(p_out + o, tl.full((BLOCK,), -1, integer).to(dtype, bitcast=True), o < out_size)
    elif pid < out_blocks + below_blocks:
        o = (pid - out_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(p_below + o, tl.full((BLOCK,), -1, integer).to(dtype, bitcast=True), o < below_size)
    elif STATES:
        o_s = (pid - out_blocks - below_blocks) * STATE_BLOCK + tl.arange(0, STATE_BLOCK)
        l = o_s // (R * H)
        o_b = o_s // H % R
        o_u = o_s % H
        m_ring = l < LANES
        m = m_ring & (o_b < B)
        o_h = (l * B + o_b) * H + o_u
        b_h = tl.load(p_hx + (l * B + o_b) * HX + o_u, m & (o_u < HX), 0.0).to(tl.float32)
        b_h = tl.where(b_h != b_h, float("nan"), b_h)
        tl.store(p_h_n + o_h, tl.full((STATE_BLOCK,), -1, integer).to(dtype, bitcast=True), m)
        o_row = o_b * (LANES * H) + l * H + o_u
        tl.store(p_h0 + (o_row if REVERSE else o_h), b_h, m)
        if RING:
            b_h = ((b_h.to(tl.int32, bitcast=True) + 0x1000) & -0x2000) | 1
            tl.store(p_below + o_row, b_h.to(tl.float32, bitcast=True), m_ring)
            tl.store(p_below + (R * (LANES * H) + o_row), 0.0, m_ring)


@triton.jit(do_not_specialize=["launch_id", "T", "B", "R"])
def prepare_kernel(
    p_hx, p_host,
    p_out, p_below, p_h0, p_h_n, p_error,
    launch_id, T, B, R,
    LANES: tl.constexpr, H: tl.constexpr, HX: tl.constexpr,
    REVERSE: tl.constexpr, FILL_OUT: tl.constexpr, STATES: tl.constexpr, RING: tl.constexpr, PACKED: tl.constexpr,
    BLOCK: tl.constexpr, STATE_BLOCK: tl.constexpr,
):  # fmt: skip
    """A program prepares one part, as ``_prepare`` says."""
    _prepare(
        tl.program_id(0), p_hx, p_host, p_out, p_below, p_h0, p_h_n, p_error, launch_id, T, B, R,
        LANES, H, HX, REVERSE, FILL_OUT, STATES, RING, PACKED, BLOCK, STATE_BLOCK,
    )  # fmt: skip


@triton.jit(do_not_specialize=["launch_id", "T", "B", "R"])
def project_kernel(
    p_x, p_w, p_gi,
    p_hx, p_host,
    p_out, p_below, p_h0, p_h_n, p_error,
    launch_id, T, B, R,
    LANES: tl.constexpr, H: tl.constexpr, HX: tl.constexpr,
    REVERSE: tl.constexpr, FILL_OUT: tl.constexpr, STATES: tl.constexpr, RING: tl.constexpr, PACKED: tl.constexpr,
    BLOCK: tl.constexpr, STATE_BLOCK: tl.constexpr,
    I: tl.constexpr, BATCH_FIRST: tl.constexpr, TF32: tl.constexpr, PREPARE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """gi = x W^T of each of the weights p_w, a tile of it a program; if PREPARE, further programs are those of ``_prepare``.

    x [T, B, I] or, if BATCH_FIRST, [B, T, I]; each W [3H, I]; gi [weights, T, B, 3H].  Sums are fp32, fp32 operands are
    rounded to tf32 if TF32.

    Bytes: x once for each tile of columns and W for each of rows, gi once.  Bound by the latency of one pass over k: it is for
    few rows.
    """
    G: tl.constexpr = 3 * H
    TILES_N: tl.constexpr = (G + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    rows = T * B
    tiles = (rows + BLOCK_M - 1) // BLOCK_M * TILES_N
    if pid < tiles * len(p_w):
        i_d = pid // tiles
        o_m = pid % tiles // TILES_N * BLOCK_M + tl.arange(0, BLOCK_M)
        o_n = pid % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
        m_m, m_n = o_m < rows, (o_n < G) | (G % BLOCK_N == 0)
        o_x = o_m
        if BATCH_FIRST:
            o_x = o_m % B * T + o_m // B
        p_wd = p_w[0]
        if len(p_w) == 2:
            p_wd = tl.where(i_d == 0, p_w[0], p_w[1])
        b_gi = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
        for k in range(0, I, BLOCK_K):
            o_k = k + tl.arange(0, BLOCK_K)
            m_k = (o_k < I) | (I % BLOCK_K == 0)  # folds to true where no block is partial
            b_x = tl.load(p_x + o_x.to(tl.int64)[:, None] * I + o_k[None, :], m_m[:, None] & m_k[None, :], 0.0)
            b_w = tl.load(p_wd + o_n[None, :] * I + o_k[:, None], m_k[:, None] & m_n[None, :], 0.0)
            b_gi = dot(b_x, b_w, b_gi, TF32, False)
        o_gi = (i_d.to(tl.int64) * rows + o_m)[:, None] * G + o_n[None, :]
        tl.store(p_gi + o_gi, b_gi, m_m[:, None] & m_n[None, :])
    elif PREPARE:
        _prepare(
            pid - tiles * len(p_w), p_hx, p_host, p_out, p_below, p_h0, p_h_n, p_error, launch_id, T, B, R,
            LANES, H, HX, REVERSE, FILL_OUT, STATES, RING, PACKED, BLOCK, STATE_BLOCK,
        )  # fmt: skip


_BLOCK, _STATE_BLOCK = 8192, 1024


def prepare_constants(
    *, lanes: int, hidden: int, inputs_hidden: int, reverse: bool, fill_out: bool, states: bool, ring: bool = False,
    packed: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """What selects the code of ``prepare_kernel``: its constants and options."""
    return dict(
        LANES=lanes, H=hidden, HX=inputs_hidden, REVERSE=reverse, FILL_OUT=fill_out, STATES=states, RING=ring, PACKED=packed,
        BLOCK=_BLOCK, STATE_BLOCK=_STATE_BLOCK, num_warps=4,
    )  # fmt: skip


def prepare_grid(
    *, steps: int, batch: int, rows: int, lanes: int, hidden: int, reverse: bool, fill_out: bool, states: bool,
    ring: bool = False, packed: bool = False,
) -> tuple[int]:  # fmt: skip
    """Programs of ``prepare_kernel``; steps: of packed sequences their rows; rows: of the ring, without one the batch."""
    length = steps if packed else steps * batch
    blocks = -(-length * hidden * (2 if reverse else 1) // _BLOCK) if fill_out else 0
    if not reverse:
        blocks += -(-(lanes - 1) * length * hidden // _BLOCK)
    return (max(1, blocks + (-(-lanes * rows * hidden // _STATE_BLOCK) if states else 0)),)


def project_constants(
    tile: Tile, *, inputs: int, batch_first: bool, tf32: bool, prepare: bool, **sizes: Any
) -> dict[str, Any]:  # fmt: skip
    """Constants and options of ``project_kernel``; sizes: of ``prepare_constants``."""
    constants = prepare_constants(**sizes)
    return constants | dict(
        I=inputs, BATCH_FIRST=batch_first, TF32=tf32, PREPARE=prepare, BLOCK_M=tile.block_b, BLOCK_N=tile.block_u,
        BLOCK_K=tile.block_k, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def project_grid(tile: Tile, *, weights: int, rows: int, hidden: int, preparing: int) -> tuple[int]:
    """Programs of ``project_kernel``: rows are T*B, and ``preparing`` are those of ``prepare_grid``, or 0."""
    return (weights * -(-rows // tile.block_b) * -(-3 * hidden // tile.block_u) + preparing,)


def prepare_launch(
    hx: Tensor,
    host: Tensor,
    launch_id: int,
    out: Tensor,
    below: Tensor | None,
    h0: Tensor | None,
    h_n: Tensor,
    error: Tensor,
    *,
    reverse: bool,
    fill_out: bool = True,
    ring: bool = False,
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and arguments of ``prepare_kernel``; all tensors are contiguous.

    hx: [lanes, B, any H].  host: a word of the host, int32, that the GPU can write to, and launch_id, not 0, what it writes
    there when a wait runs out.  out, below, h0, h_n, error: as ``wavefront_launch`` takes them; h0 None: the kernel takes hx
    itself.  fill_out: whether out is polled.  ring: below is the ring of ``staged``, [2, rows, lanes * H].  Sequences of two
    dimensions, and below of three, are packed.
    """
    lanes, batch, hidden = h_n.shape
    rows = below.shape[1] if ring else batch
    sizes = dict(
        lanes=lanes, hidden=hidden, reverse=reverse, fill_out=fill_out, states=h0 is not None, ring=ring, packed=out.dim() == 2
    )
    assert hx.shape[:2] == (lanes, batch) and hx.shape[2] <= hidden and hidden % 16 == 0
    assert all(t is None or t.is_contiguous() for t in (hx, out, below, h0, h_n, error))
    arguments = dict(
        p_hx=hx, p_host=host, p_out=out, p_below=out if below is None else below, p_h0=hx if h0 is None else h0,
        p_h_n=h_n, p_error=error, launch_id=launch_id, T=out.shape[0], B=batch, R=rows,
        **prepare_constants(inputs_hidden=hx.shape[2], **sizes),
    )  # fmt: skip
    return prepare_grid(steps=out.shape[0], batch=batch, rows=rows, **sizes), arguments


def fill_constants(*, hidden: int) -> dict[str, Any]:
    """Constants and options of ``prepare_kernel`` where it only fills one sequence of ``hidden`` elements a row."""
    return prepare_constants(lanes=1, hidden=hidden, inputs_hidden=hidden, reverse=False, fill_out=True, states=False)


def fill_grid(*, steps: int, batch: int, hidden: int) -> tuple[int]:
    """Its programs."""
    sizes = dict(lanes=1, hidden=hidden, reverse=False, fill_out=True, states=False)
    return prepare_grid(steps=steps, batch=batch, rows=batch, **sizes)


def fill_arguments(sequence: Any, host: Any, launch_id: int, error: Any, *, steps: int, batch: int) -> tuple[Any, ...]:
    """Its other arguments, tensors or addresses: sequence [steps, batch, hidden]; host, launch_id and error as above."""
    return sequence, host, sequence, sequence, sequence, sequence, error, launch_id, steps, batch, batch
