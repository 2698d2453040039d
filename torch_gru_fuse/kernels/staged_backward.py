"""The gradients of one layer, or of both directions of one, in one launch: the backward of ``staged``.

As there, the units of a lane are spread over programs that keep their weights for the whole sequence; what a step makes crosses
through L2, the data being its own flag, is read once a program, in whole lines, all warps together, and is staged in shared
memory.  Here gradients of gates cross, three numbers a unit and row, and there is one product over 3H instead of three over H.

Names as in ``lanes``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .handover import clear_beyond, issue_gates, prefetch, settle_gates
from .lanes import (
    add_slices,
    async_load,
    backward_arguments,
    barrier,
    check_backward,
    dot,
    first_row,
    groups_of,
    keep_of,
    kept,
    most_registers,
    rows_after,
    rows_of,
    select,
    shared_bases,
    walks_back,
    without_pattern,
)
from .staged import _copy_layout, _gi_layout, _row_bases, _weight_bases, load_weights, operand_order, read_gi

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from torch import Tensor

    from ..planner.whole_sequence import StagedPlan


# ---- gate gradients that others made ----------------------------------------------------------------------------------------


@gluon.jit
def gates_at(
    p, o_row, o_k, q: gl.constexpr, GATES: gl.constexpr, H: gl.constexpr, KP: gl.constexpr, VECTOR: gl.constexpr,
    WHOLE: gl.constexpr,
):  # fmt: skip
    """Where the q-th piece of gate gradients begins.  Vectors beyond H read the first ones."""
    o_k += q * GATES // 3 * KP
    if not WHOLE:
        o_k = gl.where(o_k < H, o_k, o_k % VECTOR)
    return p + (o_row + o_k + q * GATES % 3 * H)


# ---- operands and gates -----------------------------------------------------------------------------------------------------


@gluon.constexpr_function
def _weight_layout(slices, units, length, vector, warps):
    """Lanes along the units, which are neighbours in memory, then along k; warps along k, then along slices."""
    lanes = min(32, units // vector)
    along_k = max(1, min(warps, length * lanes // 32))
    return gl.BlockedLayout([1, vector, 1], [1, lanes, 32 // lanes], [warps // along_k, 1, along_k], [1, 2, 0])


@gluon.constexpr_function
def _gate_layout(slices, units, warps, neighbours):
    """Layout of gates: a thread holds so many neighbouring units, a warp 16 units, warps along the units first."""
    along_units = min(warps, units // 16)
    lanes = [1, 16 // neighbours, 2 * neighbours]
    return gl.BlockedLayout([slices, neighbours, 1], lanes, [1, along_units, warps // along_units], [1, 2, 0])


@gluon.constexpr_function
def _sum_bases(slices, units, batch, neighbours):
    """Offset bit -> (slice, unit, batch) of the partial sums, such that both sides use all banks.

    A thread of the product stores pairs along the batch (bit 0), as ``shared_bases`` says.  A warp that adds up spans unit bits
    1 to 3 and batch bits 0, 1 if a thread has two neighbouring units.
    """
    bases = shared_bases(slices, units, batch)
    if neighbours == 2:
        bases[3:6] = [[0, 0, 2], [0, 0, 4], [0, 5, 0]]
    return bases


@gluon.constexpr_function
def _input_bases(rows, units, element_bytes):
    """Offset bit -> (row, unit) of what is written in vectors and read as gates, 16 units of two or four rows a warp.

    Rows that would begin in the same bank flip bits of the unit.
    """
    bases = [[0, 1 << i] for i in range(units.bit_length() - 1)]
    free = [16 << i for i in range(3) if 16 << i < min(units, 128 // element_bytes)]
    for i in range(rows.bit_length() - 1):
        flip = free.pop(0) if (units * element_bytes << i) >= 128 and free else 0
        bases.append([1 << i, flip])
    return bases


@gluon.jit
def share_tiles(dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr, count: gl.constexpr):
    """So many tiles in shared memory."""
    s_tiles = ()
    for _ in gl.static_range(count):
        s_tiles = s_tiles + (gl.allocate_shared_memory(dtype, shape, layout),)
    return s_tiles


@gluon.jit
def weight(b_ws, s_ws, c: gl.constexpr, layout: gl.constexpr):
    """The c-th block of weights; the first are in shared memory."""
    if c < len(s_ws):
        return s_ws[c].load(layout)
    else:
        return b_ws[c - len(s_ws)]


@gluon.jit
def fetch(
    s_in, slot, p_offsets, p_g, p_h, p_h0, p_dy, o_t, o_o, s, T, backwards, B, o_n, o_u, H: gl.constexpr, ROW_O: gl.constexpr
):  # fmt: skip
    """Starts to copy to shared memory what a tile's gates need at step s: r, z, n, hn, the states before, dy.

    o_t, o_o: how far that step is from the pointers, for gates and for the others; of packed sequences these are those of the
    first step.  The states before the last step are at p_h0, rows of H.  Zeros where there is no row, or no step.
    """
    o_h = o_o
    rows = B
    if p_offsets is not None:
        row_0 = first_row(p_offsets, 0, T, backwards)
        row = gl.cast(first_row(p_offsets, s, T, backwards) - row_0, gl.int64)
        o_t = row * (4 * H)
        o_o = row * ROW_O
        o_h = gl.cast(first_row(p_offsets, s + 1, T, backwards) - row_0, gl.int64) * ROW_O
        rows = rows_of(p_offsets, s, T, backwards, B)
    m = (o_u < H) & (o_n < rows) & (s < T)
    last = s == T - 1
    if p_offsets is not None:
        last = (s + 1 >= T) | (o_n >= rows_of(p_offsets, s + 1, T, backwards, B))
    p = p_g + o_t + (o_n * (4 * H) + o_u)
    for g in gl.static_range(4):
        async_load(s_in[g].index(slot), p + g * H, mask=m)
    async_load(s_in[4].index(slot), gl.where(last, p_h0, p_h + o_h) + (o_n * gl.where(last, H, ROW_O) + o_u), mask=m)
    if p_dy is not None:
        async_load(s_in[5].index(slot), p_dy + o_o + (o_n * ROW_O + o_u), mask=m)
    async_copy.commit_group()


@gluon.jit
def read_inputs(s_in, slot, layout: gl.constexpr):
    """What ``fetch`` brought, [units, batch]: r, z, n, hn, h and, if there is one, dy."""
    b_in = ()
    for i in gl.static_range(len(s_in)):
        b_in = b_in + (read_gi(s_in[i], slot, layout),)
    return b_in


@gluon.jit
def gate_gradients(b_dh, b_r, b_z, b_n, b_hn, b_h):
    """From dL/dh': the gradients of hn and of the pre-activations of r, z, n, and dh * z, the direct path to dL/dh.

    With the fewest multiplications; those in brackets need not wait for dh.
    """
    b_dn = b_dh * ((1.0 - b_z) * (1.0 - b_n * b_n))
    b_dhn = b_dn * b_r
    b_dr = b_dhn * (b_hn * (1.0 - b_r))
    b_direct = b_dh * b_z
    b_dz = b_direct * ((b_h - b_n) * (1.0 - b_z))
    return b_dhn, b_dr, b_dz, b_dn, b_direct


@gluon.jit
def sum_rows(b_x, rows: gl.constexpr):
    """Sum over the batch rows that a thread holds."""
    return gl.sum(b_x.reshape([b_x.shape[0], rows, b_x.shape[1] // rows]), axis=1)


@gluon.jit
def handed(b_x, dtype: gl.constexpr):
    """b_x as it is stored where it is polled.  Conversion to half precision makes every NaN canonical."""
    if dtype.primitive_bitwidth == 32:
        return without_pattern(b_x)
    else:
        return b_x.to(dtype)


@gluon.jit(do_not_specialize=["T", "B"])
def staged_backward_kernel(
    p_dy, p_dhn, p_h0, p_out, p_below, p_gates, p_w_ih, p_w_hh, p_masks,
    p_d_gates, p_dhx, p_sums, p_error, p_offsets, p_keep,
    T, B,
    LANES: gl.constexpr, H: gl.constexpr,
    U: gl.constexpr, N: gl.constexpr, TILES: gl.constexpr,
    KS: gl.constexpr, MS: gl.constexpr, PIECES: gl.constexpr, SHARE: gl.constexpr,
    PAIRED: gl.constexpr, AHEAD: gl.constexpr, TIMEOUT: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """All T steps of U units of one lane, for TILES tiles of N batch rows, from the last step to the first.

        dh_t = dy_t + z_{t+1} dh_{t+1} + (dhn, dr, dz)_{t+1} (W_hn, W_hr, W_hz)         dh_{T-1} = dy_{T-1} + gradient of h_n
        dn   = dh_t (1 - z) (1 - n^2),   dhn = dn r                                     gates of step t
        dr   = dn hn r (1 - r),          dz  = dh_t (h_{t-1} - n) z (1 - z)
        gradient of h_0 = z_0 dh_0 + (dhn, dr, dz)_0 (W_hn, W_hr, W_hz)

    Given: dy, p_dy [T, B, lanes * H], and the gradient of h_n, p_dhn [lanes, B, H], each None for 0; p_h0 [lanes, B, H], any
    values; of the forward p_out [T, B, lanes * H] and p_gates [lanes, T, B, 4, H] = r, z, n, hn.  Lane 1, if there are two,
    went backwards in time and goes forwards here.  A pair is as in ``wavefront_backward_kernel``.
    p_below, p_w_ih and p_masks, which only a stack has, are not used.
    Made: p_d_gates [lanes, T, B, 4, H] = dhn, dr, dz, dn, which comes filled with the pattern; the gradient of h_0, p_dhx
    [lanes, B, H]; p_sums [lanes, programs along the batch, 4, H], float32 sums over steps and a program's rows of what was
    rounded to d_gates.

    H is a multiple of 16.  The warps: KS slices of k times MS along the units.  A tile of gate gradients comes in PIECES: along
    k, of all three gates, or, if 3 divides PIECES, gate after gate of each part of k.  While one piece is multiplied the next
    is on its way; with TILES > 1, then an even number, so is the next tile, and no one waits for the others.
    What the gates need of their own (r, z, n, hn, h, dy) is copied two tiles ahead where a tile is one piece, two steps ahead
    where there is one tile, else while the tile is multiplied, which takes half the shared memory.  dh z of more than two tiles
    is kept in shared memory, and so are the first SHARE blocks of weights; the others are in registers.
    AHEAD steps before they are due, lines of d_gates are brought to L2: the fill had pushed them out.

    Packed sequences: p_offsets, see ``lanes``; rows [N] of all steps take the place of [T, B].  A row takes part in a step that
    has more rows than come before it; before and after its steps its dh stays as it is, but for the product that follows the
    last.  A pair of tiles is passed over in steps in which none of its rows take part, nor have in the one before.

    Resets: p_keep [T, B], see ``lanes``: k_t h_{t-1} takes the place of h_{t-1}, and dh_{t-1} - dy_{t-1}, or the gradient of
    h_0, is k_t times what it is above.  A step reads keep of a program's rows, of two steps.

    Bytes a step and lane: each program reads 3BH gate gradients of its rows and writes 4BH of its own; gates, state and dy of
    its own 6BH read; weights none.  Bound by instructions and shared memory where TILES > 1, for large H by what all programs
    read from L2, else by one crossing, one product and two barriers after each other.
    """
    dtype: gl.constexpr = p_d_gates.dtype.element_ty
    BYTES: gl.constexpr = dtype.primitive_bitwidth // 8
    VECTOR: gl.constexpr = 16 // BYTES
    ROW_O: gl.constexpr = LANES * H if PAIRED is None else H
    ROW_G: gl.constexpr = 4 * H
    HP: gl.constexpr = 1 << (H - 1).bit_length()
    WHOLE: gl.constexpr = HP == H
    GATES: gl.constexpr = 1 if PIECES % 3 == 0 else 3  # of a piece
    KC: gl.constexpr = HP // KS
    KP: gl.constexpr = KC * 3 // (PIECES * GATES)
    KF: gl.constexpr = min(KP, 128 // BYTES)
    BLOCKS: gl.constexpr = KP // KF
    PACK: gl.constexpr = KS * N * KP // (32 * num_warps)
    VECTORS: gl.constexpr = PACK // VECTOR
    BUFFERS: gl.constexpr = min(2, TILES * PIECES)
    SLOTS: gl.constexpr = 1 if TILES > 1 and PIECES > 1 else 2
    CHAINS: gl.constexpr = 3 if GATES == 3 and U * N <= 256 * MS else 1  # of dependent products
    NEIGHBOURS: gl.constexpr = 2 if 64 * num_warps <= U * N else 1  # units of a thread
    PAIR: gl.constexpr = min(2, TILES)
    PAIRS: gl.constexpr = TILES // PAIR
    CARRY: gl.constexpr = PAIRS > 1
    PAIRS_ALLOCATED: gl.constexpr = 1 << (PAIRS - 1).bit_length()
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[KS, MS, 1], instr_shape=[1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, VECTOR)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, VECTOR)
    over_k: gl.constexpr = _gate_layout(KS, U, num_warps, NEIGHBOURS)
    ROWS: gl.constexpr = max(1, N * min(num_warps, U // 16) // (2 * NEIGHBOURS * num_warps))  # of a tile, in a thread
    gate: gl.constexpr = gl.SliceLayout(0, over_k)
    copy: gl.constexpr = _copy_layout(KS, N, KP, VECTOR, num_warps)
    copy_w: gl.constexpr = _weight_layout(KS, U, KF, VECTOR, num_warps)
    copy_in: gl.constexpr = _gi_layout(U, VECTOR, num_warps)
    in_rows: gl.constexpr = gl.SharedLinearLayout(_row_bases(KS, N, KP, BYTES))
    in_order: gl.constexpr = gl.SharedLinearLayout(_weight_bases(KS, U, KF, BYTES))
    gate_rows: gl.constexpr = gl.SharedLinearLayout(_input_bases(N, U, BYTES))

    PROGRAMS_U: gl.constexpr = (H + U - 1) // U
    PROGRAMS_B = (B + N * TILES - 1) // (N * TILES)
    pid = gl.program_id(0)
    i_u = pid % PROGRAMS_U
    i_b = pid // PROGRAMS_U % PROGRAMS_B
    l = pid // (PROGRAMS_U * PROGRAMS_B)

    # Where the lane's first step reads and writes, and how far it is to the next.
    rows = gl.cast(B, gl.int64)
    steps = T * rows
    backwards = 1 - l
    sign = 2 * l - 1
    stride_ot = sign * B * ROW_O
    stride_gt = sign * B * ROW_G
    if p_offsets is not None:
        p_lengths = p_offsets + (T + 1)
        steps = gl.cast(gl.load(p_offsets + T), gl.int64)
        T = gl.load(p_lengths + i_b * (TILES * N))
        row_0 = gl.cast(first_row(p_offsets, 0, T, backwards), gl.int64)
        first_o = l * H + row_0 * ROW_O
        first_g = (l * steps + row_0) * ROW_G
        stride_ot = 0  # `fetch` knows the way
    elif PAIRED is None:
        first_o = l * H + (1 - l) * ((steps - B) * ROW_O)
        first_g = (steps - B + l * rows) * ROW_G
    else:
        back = walks_back(l, PAIRED)
        sign = 2 * back - 1
        first = l * steps + (1 - back) * (steps - B)
        first_o = first * ROW_O
        first_g = first * ROW_G
        stride_ot = sign * B * ROW_O
        stride_gt = sign * B * ROW_G
    p_g = p_gates + first_g
    p_new = p_d_gates + first_g
    p_old = p_g  # of the step that was done before; before the first: what is there, and the product is not used
    p_before = p_out + (first_o + stride_ot)  # the states before
    p_first = p_h0 + l * rows * H
    p_y = p_dy
    if p_dy is not None:
        p_y += first_o

    # Weights [slices, units, k], in blocks of k, each of three gates.
    o_wu = gl.arange(0, U, gl.SliceLayout(0, gl.SliceLayout(2, copy_w)))
    o_wu = i_u * U + gl.expand_dims(gl.expand_dims(o_wu, 0), 2)
    o_wk = gl.expand_dims(gl.expand_dims(gl.arange(0, KF, gl.SliceLayout(0, gl.SliceLayout(1, copy_w))), 0), 1)
    o_ws = gl.expand_dims(gl.expand_dims(gl.arange(0, KS, gl.SliceLayout(1, gl.SliceLayout(2, copy_w))), 1), 2)
    p_w = select(p_w_hh, l)
    b_ws = ()
    s_ws = ()
    for c in gl.static_range(3 * (KC // KF)):
        o_k = o_ws * KC + c // 3 * KF + o_wk
        b_w = load_weights(p_w + ((c + 2) % 3 * H * H + o_k * H + o_wu), (o_wu < H) & (o_k < H), left)
        if c < SHARE:
            s_w = gl.allocate_shared_memory(dtype, [KS, U, KF], in_order)
            s_w.store(b_w)
            s_ws = s_ws + (s_w,)
        else:
            b_ws = b_ws + (b_w,)

    # Gates [units, batch].
    o_u1 = i_u * U + gl.arange(0, U, gl.SliceLayout(1, gate))
    o_u = gl.expand_dims(o_u1, 1)
    m_u = o_u < H
    o_b = i_b * (TILES * N) + gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, gate)), 0)
    none = gl.zeros([U, N], gl.float32, gate)
    b_sum = sum_rows(none, ROWS)
    b_sums = (b_sum, b_sum, b_sum, b_sum)
    b_carries = ()
    p_last = p_dhn
    if p_dhn is not None:
        p_last += l * rows * H
    if CARRY:
        s_carry = gl.allocate_shared_memory(gl.float32, [PAIRS_ALLOCATED * 2, U, N], gl.SwizzledSharedLayout(1, 1, 1, [0, 1]))
        for i_n in range(TILES):
            b_carry = none
            if p_dhn is not None:
                o_r = o_b + i_n * N
                b_carry = gl.load(p_last + (o_r * H + o_u), mask=m_u & (o_r < B), other=0.0).to(gl.float32)
            s_carry.index(i_n).store(b_carry)
    else:
        for j in gl.static_range(PAIR):
            b_carry = none
            if p_dhn is not None:
                o_r = o_b + j * N
                b_carry = gl.load(p_last + (o_r * H + o_u), mask=m_u & (o_r < B), other=0.0).to(gl.float32)
            b_carries = b_carries + (b_carry,)

    # The tile of gate gradients [slices, batch, k] of each gate.  Rows beyond the batch read its last row.
    o_ck = gl.expand_dims(gl.expand_dims(gl.arange(0, KP, gl.SliceLayout(0, gl.SliceLayout(1, copy))), 0), 1)
    o_cs = gl.expand_dims(gl.expand_dims(gl.arange(0, KS, gl.SliceLayout(1, gl.SliceLayout(2, copy))), 1), 2)
    o_cn = gl.expand_dims(gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(2, copy))), 0), 2)
    o_cn = i_b * (TILES * N) + o_cn
    o_ck += o_cs * KC
    s_pieces = (share_tiles(dtype, [KS, N, KP], in_rows, GATES),)
    if BUFFERS > 1:
        s_pieces = (s_pieces[0], share_tiles(dtype, [KS, N, KP], in_rows, GATES))
    zero = gl.zeros([KS, U, N], gl.float32, mma)
    s_sum = gl.allocate_shared_memory(gl.float32, [KS, U, N], gl.SharedLinearLayout(_sum_bases(KS, U, N, NEIGHBOURS)))

    # What gates need of their own [batch, units].
    o_gu = i_u * U + gl.expand_dims(gl.arange(0, U, gl.SliceLayout(0, copy_in)), 0)
    o_gn = i_b * (TILES * N) + gl.expand_dims(gl.arange(0, N, gl.SliceLayout(1, copy_in)), 1)
    s_in = share_tiles(dtype, [SLOTS, N, U], gate_rows, 5 if p_dy is None else 6)
    if TILES == 1:
        fetch(s_in, 0, p_offsets, p_g, p_before, p_first, p_y, 0, 0, 0, T, backwards, B, o_gn, o_gu, H, ROW_O)
        fetch(s_in, 1, p_offsets, p_g, p_before, p_first, p_y, stride_gt, stride_ot, 1, T, backwards, B, o_gn, o_gu, H, ROW_O)
    elif SLOTS > 1:
        fetch(s_in, 0, p_offsets, p_g, p_before, p_first, p_y, 0, 0, 0, T, backwards, B, o_gn, o_gu, H, ROW_O)
        fetch(s_in, 1, p_offsets, p_g, p_before, p_first, p_y, 0, 0, 0, T, backwards, B, o_gn + N, o_gu, H, ROW_O)

    # Lines of d_gates to prefetch, one address a thread.
    LINES: gl.constexpr = max(1, U * BYTES // 128)
    o_f = gl.arange(0, 4 * N * LINES, gl.BlockedLayout([1], [32], [num_warps], [0]))
    o_fn = i_b * (TILES * N) + o_f % N
    o_f = o_f // N % 4 * H + gl.minimum(i_u * U + o_f // (4 * N) * (128 // BYTES), H - 1)

    rows_t = rows_of(p_offsets, 0, T, backwards, B)  # that take part in a step, and in the one before
    rows_old = rows_t
    p_t = gates_at(p_old, gl.minimum(o_cn, rows_old - 1) * ROW_G, o_ck, 0, GATES, H, KP, VECTOR, WHOLE)
    b_ts = issue_gates(p_t, GATES, H, VECTORS, PACK)
    barrier()  # else the loop begins with one, for what was shared before
    for s in range(T + 1):
        pairs = PAIRS
        if p_offsets is not None:
            rows_t = rows_of(p_offsets, s, T, backwards, B)
            stride_gt = rows_after(p_offsets, s, T, backwards) * ROW_G
            if CARRY:
                here = gl.where(s < T, gl.maximum(rows_t, rows_old), B)
                pairs = groups_of(here, i_b * (TILES * N), PAIR * N, PAIRS)
        for i in range(pairs):
            b_new_carries = ()
            for j in gl.static_range(PAIR):
                tile = i * PAIR + j
                slot = 0 if SLOTS == 1 else s % 2 if PAIR == 1 else j
                # the tile after this one, maybe of the next step
                after = tile + 1
                ends = after == pairs * PAIR
                after = gl.where(ends, 0, after)
                b_accs = (zero, zero, zero)
                b_keep = keep_of(p_keep, gl.minimum(s, T - 1), T, backwards, o_b + tile * N, B)
                b_keep_old = keep_of(p_keep, gl.maximum(s - 1, 0), T, backwards, o_b + tile * N, B)
                for p in gl.static_range(PIECES):
                    if PAIR == 1 and p == 0:
                        p_t = gates_at(p_old, gl.minimum(o_cn, rows_old - 1) * ROW_G, o_ck, 0, GATES, H, KP, VECTOR, WHOLE)
                        b_ts = issue_gates(p_t, GATES, H, VECTORS, PACK)
                    b_ts = settle_gates(b_ts, p_t, p_error, H, VECTORS, PACK, NEIGHBOURS == 2, TIMEOUT)
                    s_ds = s_pieces[(j * PIECES + p) % BUFFERS]
                    for g in gl.static_range(GATES):
                        b_t = clear_beyond(b_ts[g], o_ck + p * GATES // 3 * KP < H, WHOLE)
                        s_ds[g].store(operand_order(b_t, BYTES))
                    if p == (PIECES - 1 if SLOTS == 1 else 0):
                        async_copy.wait_group(SLOTS - 1)
                    barrier()
                    if SLOTS == 1 and p == 0:  # all have read what the tile before this one needed
                        fetch(
                            s_in, 0, p_offsets, p_g, p_before, p_first, p_y, 0, 0, s, T, backwards, B,
                            o_gn + tile * N, o_gu, H, ROW_O,
                        )  # fmt: skip
                    if p + 1 < PIECES:
                        o_row = gl.minimum(o_cn + tile * N, rows_old - 1) * ROW_G
                        p_t = gates_at(p_old, o_row, o_ck, p + 1, GATES, H, KP, VECTOR, WHOLE)
                        b_ts = issue_gates(p_t, GATES, H, VECTORS, PACK)
                    elif PAIR > 1:
                        rows_then = B
                        if p_offsets is not None:
                            rows_then = gl.where(ends, rows_t, rows_old)
                        o_row = gl.minimum(o_cn + after * N, rows_then - 1) * ROW_G
                        p_t = gates_at(gl.where(ends, p_new, p_old), o_row, o_ck, 0, GATES, H, KP, VECTOR, WHOLE)
                        b_ts = issue_gates(p_t, GATES, H, VECTORS, PACK)
                    for f in gl.static_range(BLOCKS):
                        for g in gl.static_range(GATES):
                            b_x = s_ds[g].permute([0, 2, 1]).slice(f * KF, KF, 1).load(right)
                            b_w = weight(b_ws, s_ws, (p * GATES // 3 * BLOCKS + f) * 3 + p * GATES % 3 + g, left)
                            b_acc = dot(b_w, b_x, b_accs[0])
                            if CHAINS == 3:
                                b_accs = (b_accs[1], b_accs[2], b_acc)
                            else:
                                b_accs = (b_acc,)
                if CARRY:
                    b_carry = s_carry.index(tile).load(gate)  # here, since a barrier must come before it is stored
                else:
                    b_carry = b_carries[j]
                if SLOTS > 1:
                    b_in = read_inputs(s_in, slot, gate)
                b_acc = b_accs[0]
                if CHAINS == 3:
                    b_acc = b_acc + b_accs[1] + b_accs[2]
                s_sum.store(b_acc)
                barrier()
                b_acc = add_slices(s_sum, 0, KS, over_k, gate)
                o_r = o_b + tile * N
                m = m_u & (o_r < B)
                m_old = m & (s > 0)
                if p_offsets is not None:
                    m_old = m_old & (o_r < rows_old)
                b_dh = b_carry + gl.where(m_old, b_acc, 0.0)  # 0 where there is no row
                if p_keep is not None:
                    b_dh = gl.where(s > 0, kept(p_keep, b_dh, b_keep_old), b_dh)
                if s < T:
                    b_whole = b_dh
                    m_t = m
                    if p_offsets is not None:
                        m_t = m & (o_r < rows_t)
                        b_dh = gl.where(m_t, b_dh, 0.0)
                    if SLOTS == 1:
                        b_in = read_inputs(s_in, slot, gate)
                    if p_dy is not None:
                        b_dh += b_in[5]
                    b_h = kept(p_keep, b_in[4], b_keep)
                    b_dhn, b_dr, b_dz, b_dn, b_carry = gate_gradients(b_dh, b_in[0], b_in[1], b_in[2], b_in[3], b_h)
                    if p_offsets is not None:
                        b_carry = gl.where(m_t, b_carry, b_whole)
                    p_d = p_new + (o_r * ROW_G + o_u)
                    gl.store(p_d, handed(b_dhn, dtype), mask=m_t)
                    gl.store(p_d + H, handed(b_dr, dtype), mask=m_t)
                    gl.store(p_d + 2 * H, handed(b_dz, dtype), mask=m_t)
                    gl.store(p_d + 3 * H, b_dn.to(dtype), mask=m_t)
                    if AHEAD > 0:
                        o_line = gl.minimum(o_fn + tile * N, B - 1) * ROW_G + o_f
                        if p_offsets is None:
                            prefetch((p_new + gl.minimum(AHEAD, T - 1 - s) * stride_gt + o_line).to(gl.int64))
                        else:
                            rows_f = first_row(p_offsets, s + AHEAD, T, backwards) - first_row(p_offsets, s, T, backwards)
                            prefetch((p_new + rows_f * ROW_G + o_line).to(gl.int64))
                    b_sums = (
                        b_sums[0] + sum_rows(b_dhn, ROWS), b_sums[1] + sum_rows(b_dr, ROWS),
                        b_sums[2] + sum_rows(b_dz, ROWS), b_sums[3] + sum_rows(b_dn, ROWS),
                    )  # fmt: skip
                else:
                    gl.store(p_dhx + (l * rows * H + o_r * H + o_u), b_dh.to(dtype), mask=m)
                if CARRY:
                    s_carry.index(tile).store(b_carry)
                else:
                    b_new_carries = b_new_carries + (b_carry,)
                if TILES == 1:
                    fetch(
                        s_in, slot, p_offsets, p_g, p_before, p_first, p_y,
                        2 * stride_gt, 2 * stride_ot, s + 2, T, backwards, B, o_gn, o_gu, H, ROW_O,
                    )  # fmt: skip
                elif SLOTS > 1:
                    ends = tile + 2 >= pairs * PAIR
                    fetch(
                        s_in, slot, p_offsets, p_g, p_before, p_first, p_y,
                        gl.where(ends, stride_gt, 0), gl.where(ends, stride_ot, 0), s + ends.to(gl.int32), T, backwards, B,
                        o_gn + gl.where(ends, j, tile + 2) * N, o_gu, H, ROW_O,
                    )  # fmt: skip
            b_carries = b_new_carries
        p_old = p_new
        p_new += gl.where(s + 1 < T, stride_gt, 0)
        if p_offsets is None:
            p_g += stride_gt
            p_before += stride_ot
            if p_dy is not None:
                p_y += stride_ot
        else:
            rows_old = rows_t
    async_copy.wait_group(0)
    p_s = p_sums + ((l * PROGRAMS_B + i_b) * ROW_G + o_u1)
    for g in gl.static_range(4):
        b_sum = gl.convert_layout(gl.sum(b_sums[g], axis=1), gl.SliceLayout(1, gate))
        gl.store(p_s + g * H, b_sum, mask=o_u1 < H)


def staged_backward_constants(
    plan: StagedPlan, *, lanes: int, hidden: int, reverse: bool, timeout_ns: int, pair: int | None = None
) -> dict[str, Any]:
    """Constants and options of ``staged_backward_kernel``, which select its code; of several lanes it knows two directions and
    a pair."""
    assert lanes == (1 if pair is None and not reverse else 2)
    return dict(
        LANES=lanes, H=hidden, U=plan.units, N=plan.rows, TILES=plan.tiles,
        KS=plan.slices, MS=plan.unit_warps, PIECES=plan.pieces, SHARE=plan.share,
        PAIRED=pair, AHEAD=4 if plan.tiles == 1 else 0, TIMEOUT=timeout_ns,
        num_warps=plan.num_warps, maxnreg=most_registers(plan.num_warps), launch_cooperative_grid=True,
    )  # fmt: skip


def staged_backward_launch(
    dy: Tensor | None,
    dhn: Tensor | None,
    h0: Tensor,
    out: Tensor,
    below: Tensor | None,
    gates: Tensor,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    d_gates: Tensor,
    dhx: Tensor,
    sums: Tensor,
    error: Tensor,
    *,
    plan: StagedPlan,
    masks: Tensor | None = None,
    pair: int | None = None,
    offsets: Tensor | None = None,
    keep: Tensor | None = None,
    timeout_ns: int = 10_000_000_000,
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and arguments of ``staged_backward_kernel``: those of ``wavefront_backward_launch`` for one layer or a pair.

    All tensors begin at multiples of 16 bytes: vectors are copied to shared memory, and two halves are handed over as a word.
    sums: float32 [lanes, -(-B // (rows * tiles)), 4, H].
    """
    lanes, batch, hidden = h0.shape
    reverse = check_backward(dy, dhn, h0, out, below, gates, w_ih, w_hh, masks, d_gates, dhx, sums, pair, offsets, keep)
    assert sums.shape[1] == -(-batch // (plan.rows * plan.tiles))
    arguments = backward_arguments(dy, dhn, h0, out, below, gates, w_ih, w_hh, masks, d_gates, dhx, sums, error, offsets, keep)
    arguments |= staged_backward_constants(
        plan, lanes=lanes, hidden=hidden, reverse=reverse, timeout_ns=timeout_ns, pair=pair
    )
    return (plan.programs(lanes, batch, hidden),), arguments
