"""Whole sequences of one layer in one launch, for batches that keep every multiprocessor busy.

As in ``wavefront``, the units of a lane (a layer, or one direction of it) are spread over programs that keep their weights for
the whole sequence and hand states over through L2, the data being its own flag.  There a warp polls its own operands; that is
the shortest way, but a program reads the state once for every warp along its units.  Here the program reads each state once,
in whole lines, all warps together, and stages it in shared memory.  So a program can have many units, the state is read by
few programs, and L2 is no longer what bounds a step.

Names as in ``lanes``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from .handover import clear_beyond, issue, settle, settle_epoch, with_epoch
from .lanes import (
    add_slices,
    async_load,
    barrier,
    check_launch,
    dot,
    gate_layout,
    groups_of,
    keep_of,
    kept,
    launch_arguments,
    load_biases,
    most_registers,
    round_parameter,
    rows_after,
    rows_of,
    select,
    share_rows,
    shared_bases,
    shared_row,
    sigmoid,
    tanh,
    walks_back,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from torch import Tensor

    from ..planner.whole_sequence import StagedPlan


@gluon.constexpr_function
def _operand_order(element_bytes):
    """Bits of k as they follow each other in memory -> bits of k of the product, in which a sum has no order.

    A thread's 16 bytes then are whole registers of one product and the next: the product takes one or two elements at k and as
    many 16 (fp32) or 32 (half precision) further on.  In memory's own order each product would begin with moves.
    """
    return [16, 1, 4, 8, 2] if element_bytes == 4 else [1, 32, 2, 8, 16, 4]


@gluon.jit
def operand_order(b_x, BYTES: gl.constexpr):
    """[slices, rows, k], its k in the order of the product; moves nothing."""
    S: gl.constexpr = b_x.shape[0]
    R: gl.constexpr = b_x.shape[1]
    K: gl.constexpr = b_x.shape[2]
    if BYTES == 4:
        b_x = b_x.reshape([S, R, K // 32, 2, 2, 2, 2, 2]).permute([0, 1, 2, 7, 4, 5, 3, 6])
    else:
        b_x = b_x.reshape([S, R, K // 64, 2, 2, 2, 2, 2, 2]).permute([0, 1, 2, 7, 4, 5, 3, 6, 8])
    return b_x.reshape([S, R, K])


@gluon.constexpr_function
def _row_bases(slices, rows, length, element_bytes):
    """Offset bit -> (slice, row, k) of rows [slices, rows, length] in memory's order.

    A thread reads 16 bytes of row lane / 4 at lane % 4 of them: eight lanes meet two rows, which the flipped bit puts into
    different halves of the 128 bytes that one access takes.
    """
    order = _operand_order(element_bytes)
    group = 1 << len(order)
    bases = [[0, 0, k] for k in order] + [[0, 0, group << i] for i in range((length // group).bit_length() - 1)]
    bases += [[0, 1 << i, order[-1] if i == 0 else 0] for i in range(rows.bit_length() - 1)]
    return bases + [[1 << i, 0, 0] for i in range(slices.bit_length() - 1)]


@gluon.constexpr_function
def _weight_bases(slices, units, length, element_bytes):
    """Offset bit -> (slice, unit, k) of weights: the 16 bytes of a thread are its four registers of one product, units u and
    u + 8 at k and further on, and a warp's are one after the other."""
    order = _operand_order(element_bytes)
    pair, far = (order[:0], order[0]) if element_bytes == 4 else (order[:1], order[1])
    near, lanes, last = (order[1], order[2:4], order[4]) if element_bytes == 4 else (order[2], order[3:5], order[5])
    bases = [[0, 0, k] for k in pair] + [[0, 8, 0], [0, 0, far]]
    bases += [[0, 0, k] for k in lanes] + [[0, 1, 0], [0, 2, 0], [0, 4, 0], [0, 0, near], [0, 0, last]]
    group = 1 << len(order)
    bases += [[0, 0, group << i] for i in range((length // group).bit_length() - 1)]
    bases += [[0, 16 << i, 0] for i in range(units.bit_length() - 5)]
    return bases + [[1 << i, 0, 0] for i in range(slices.bit_length() - 1)]


@gluon.constexpr_function
def _copy_layout(slices, rows, length, vector, warps):
    """Lanes along k in vectors, then along rows; warps along rows, then along slices."""
    lanes = min(32, length // vector)
    along_rows = max(1, min(warps, rows * lanes // 32))
    return gl.BlockedLayout([1, 1, vector], [1, 32 // lanes, lanes], [warps // along_rows, along_rows, 1], [2, 1, 0])


@gluon.constexpr_function
def _gi_bases(rows, units, element_bytes, sliced):
    """Offset bit -> (row, unit) of gi, written in vectors and read as gates.

    Eight lanes write 128 bytes of a row.  A warp reads 16 units of two neighbouring rows, or, in the layout of the product, 8
    units of rows 0, 2, 4, 6: the bits of k that are flipped with the row put these into different banks.
    """
    bases = [[0, 1 << i] for i in range(units.bit_length() - 1)]
    span = 16 if sliced else 8  # units of a row that are read together
    free = [span << i for i in range(3) if span << i < min(units, 128 // element_bytes)]
    for i in range(rows.bit_length() - 1):
        turn = i if sliced else i - 1
        bases.append([1 << i, free[turn] if 0 <= turn < len(free) else 0])
    return bases


@gluon.constexpr_function
def _gi_layout(units, vector, warps):
    lanes = min(32, units // vector)
    return gl.BlockedLayout([1, vector], [32 // lanes, lanes], [warps, 1], [1, 0])


@gluon.jit
def fetch(s_gi, slot, p, m, H: gl.constexpr):
    """Starts to copy gi of one tile, three gates, to shared memory."""
    async_load(s_gi[0].index(slot), p, mask=m)
    async_load(s_gi[1].index(slot), p + H, mask=m)
    async_load(s_gi[2].index(slot), p + 2 * H, mask=m)
    async_copy.commit_group()


@gluon.jit
def read_gi(s_gi, slot, layout: gl.constexpr):
    """gi of one gate, [units, batch]."""
    return s_gi.index(slot).permute([1, 0]).load(layout).to(gl.float32)


@gluon.jit
def load_weights(p, m, layout: gl.constexpr):
    """Weights [slices, units, k] as an operand of the product."""
    b_w = round_parameter(gl.load(p, mask=m, other=0.0))
    return gl.convert_layout(operand_order(b_w, p.dtype.element_ty.primitive_bitwidth // 8), layout)


@gluon.jit
def states_at(p_offsets, p, p_first, o_b, o_k, rows, B, ROW_H: gl.constexpr, RING: gl.constexpr):
    """Addresses of states, of which there are B rows or, in a ring, enough for all tiles.  Of packed sequences so many ``rows``
    took part in the step before; others have the initial state."""
    if RING:
        return p + (o_b * ROW_H + o_k)
    elif p_offsets is None:
        return p + (gl.minimum(o_b, B - 1) * ROW_H + o_k)
    else:
        return gl.where(o_b < rows, p, p_first) + (gl.minimum(o_b, B - 1) * ROW_H + o_k)


@gluon.jit(do_not_specialize=["T", "B"])
def staged_kernel(
    p_gi, p_h0, p_below, p_w_ih, p_w_hh, p_b_ih, p_b_hh, p_masks, p_masked,
    p_out, p_h_n, p_gates, p_error, p_offsets, p_keep,
    T, B,
    LANES: gl.constexpr, H: gl.constexpr, HX: gl.constexpr,
    U: gl.constexpr, N: gl.constexpr, TILES: gl.constexpr,
    KS: gl.constexpr, MS: gl.constexpr, PIECES: gl.constexpr, SHARE: gl.constexpr, RING: gl.constexpr,
    PAIRED: gl.constexpr, SAVE_GATES: gl.constexpr, TIMEOUT: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """All T steps of U units of one lane, for TILES tiles of N batch rows.

        r, z = sigmoid(gi_t + b_i + h W_h^T + b_h)         each
        hn   = h W_hn^T + b_hn
        n    = tanh(gi_t + b_in + r * hn)
        h_t  = n + z * (h - n)

    gi = x W_i^T of each lane, [lanes, T, B, 3H], comes without bias.  Lane 1, if there are two, walks time backwards.  p_h0 and
    p_out hold rows of all lanes side by side, [B, lanes * H] and [T, B, lanes * H].  A pair is as in ``wavefront_kernel``.
    p_h_n is [lanes, B, H].  p_w_ih and the
    masks, which only a stack has, are not used.  H is a multiple of 16; units from HX on are padding and stay 0.
    States cross in p_out, which comes filled with the pattern, and p_below is not used.  Or, if RING, in p_below, [2, rows,
    lanes * H] with the rows of all tiles: fp32, the state before step t at t % 2, as tf32, with the epoch (t / 2 + 1) % 2.
    Whoever reads a row has to be waited for before it is written again, so no tile reads one of another.
    The warps: KS slices of k times MS along the units.  A tile of the state comes in PIECES along k: while one is multiplied
    the next is on its way.  With TILES > 1, then an even number, so is the next tile, and no one waits for the others.
    The fp32 states of more than two tiles are kept in shared memory.
    SHARE blocks of W_hn live in shared memory, all other weights in registers.
    Saved for the backward, if SAVE_GATES: r, z, n, hn, [lanes, T, B, 4, H].

    Packed sequences: p_offsets, see ``lanes``; rows [N] of all steps take the place of [T, B], and there is no RING.  A row
    takes part in a step that has more rows than come before it.  A program ends with its first sequence, and a pair of tiles is
    passed over in steps in which none of its rows take part.

    Resets: p_keep [T, B], see ``lanes``: k_t h_{t-1} takes the place of h_{t-1} in all terms.  A step reads keep of a program's
    rows, one value a row, before it waits.

    Bytes a step and lane: each program reads the B*H states of its rows once and writes its own, gi 3BH once, gates 4BH
    written; weights none.  Bound by tensor cores (mma.sync) and shared memory where TILES > 1, else by one crossing, one
    product and one barrier after the other.
    """
    dtype: gl.constexpr = p_out.dtype.element_ty
    BYTES: gl.constexpr = dtype.primitive_bitwidth // 8
    VECTOR: gl.constexpr = 16 // BYTES
    ROW_H: gl.constexpr = LANES * H if PAIRED is None else H
    ROW_G: gl.constexpr = 3 * H
    HP: gl.constexpr = 1 << (H - 1).bit_length()
    KC: gl.constexpr = HP // KS
    KP: gl.constexpr = KC // PIECES
    KF: gl.constexpr = min(KP, 128 // BYTES)
    BLOCKS: gl.constexpr = KP // KF
    PACK: gl.constexpr = KS * N * KP // (32 * num_warps)
    VECTORS: gl.constexpr = PACK // VECTOR
    BUFFERS: gl.constexpr = min(2, TILES * PIECES)
    PAIR: gl.constexpr = min(2, TILES)
    PAIRS: gl.constexpr = TILES // PAIR
    CARRY: gl.constexpr = PAIRS > 1
    PAIRS_ALLOCATED: gl.constexpr = 1 << (PAIRS - 1).bit_length()
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[KS, MS, 1], instr_shape=[1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, VECTOR)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, VECTOR)
    over_k: gl.constexpr = gate_layout(KS, N, num_warps) if KS > 1 else mma
    gate: gl.constexpr = gl.SliceLayout(0, over_k)
    copy: gl.constexpr = _copy_layout(KS, N, KP, VECTOR, num_warps)
    copy_w: gl.constexpr = _copy_layout(KS, U, KF, VECTOR, num_warps)
    copy_gi: gl.constexpr = _gi_layout(U, VECTOR, num_warps)
    in_rows: gl.constexpr = gl.SharedLinearLayout(_row_bases(KS, N, KP, BYTES))
    in_order: gl.constexpr = gl.SharedLinearLayout(_weight_bases(KS, U, KF, BYTES))
    gi_rows: gl.constexpr = gl.SharedLinearLayout(_gi_bases(N, U, BYTES, KS > 1))

    PROGRAMS_U: gl.constexpr = (H + U - 1) // U
    PROGRAMS_B = (B + N * TILES - 1) // (N * TILES)
    pid = gl.program_id(0)
    i_u = pid % PROGRAMS_U
    i_b = pid // PROGRAMS_U % PROGRAMS_B
    l = pid // (PROGRAMS_U * PROGRAMS_B)

    # Where the lane's first step reads and writes, and how far it is to the next.
    rows = gl.cast(B, gl.int64)
    steps = T * rows
    last = steps - B
    sign = 1 - 2 * l
    if p_offsets is None:
        first = l * (2 * steps - B)  # as a sum with last 8 bytes spill on sm_89
    else:
        p_lengths = p_offsets + (T + 1)
        steps = gl.cast(gl.load(p_offsets + T), gl.int64)
        T = gl.load(p_lengths + i_b * (TILES * N))
        last = gl.cast(gl.load(p_offsets + (T - 1)), gl.int64)
        first = l * (steps + last)
    if PAIRED is not None:
        back = walks_back(l, PAIRED)
        sign = 1 - 2 * back
        first = l * steps + back * (steps - B)
    stride_ot = sign * B * ROW_H
    stride_gt = sign * B * ROW_G
    stride_st = sign * B * (4 * H)
    if PAIRED is None:
        p_first = p_h0 + l * H
        p_to = p_out + l * (H + last * ROW_H)
    else:
        p_first = p_h0 + l * (rows * H)
        p_to = p_out + first * ROW_H
    if RING:
        p_old = p_below + l * H  # where the states before a step cross
        p_new = p_old + gl.cast(PROGRAMS_B, gl.int64) * (TILES * N * ROW_H)  # and those after it
    else:
        p_old = p_first
        p_new = p_to
    p_g = p_gi + first * ROW_G
    p_save = p_gates
    if SAVE_GATES:
        p_save += first * (4 * H)

    # Weights [slices, units, k], in blocks of k.
    o_wu = gl.arange(0, U, gl.SliceLayout(0, gl.SliceLayout(2, copy_w)))
    o_wu = i_u * U + gl.expand_dims(gl.expand_dims(o_wu, 0), 2)
    o_wk = gl.expand_dims(gl.expand_dims(gl.arange(0, KF, gl.SliceLayout(0, gl.SliceLayout(1, copy_w))), 0), 1)
    o_ws = gl.expand_dims(gl.expand_dims(gl.arange(0, KS, gl.SliceLayout(1, gl.SliceLayout(2, copy_w))), 1), 2)
    p_w = select(p_w_hh, l)
    b_wrs = ()
    b_wzs = ()
    b_wns = ()
    s_wns = ()
    for c in gl.static_range(PIECES * BLOCKS):
        o_k = o_ws * KC + c * KF + o_wk
        m_w = (o_wu < H) & (o_k < H)
        p_wc = p_w + (o_wu * H + o_k)
        b_wrs = b_wrs + (load_weights(p_wc, m_w, left),)
        b_wzs = b_wzs + (load_weights(p_wc + H * H, m_w, left),)
        b_wn = load_weights(p_wc + 2 * H * H, m_w, left)
        if c < SHARE:
            s_wn = gl.allocate_shared_memory(dtype, [KS, U, KF], in_order)
            s_wn.store(b_wn)
            s_wns = s_wns + (s_wn,)
        else:
            b_wns = b_wns + (b_wn,)

    # Gates [units, batch].
    o_u1 = i_u * U + gl.arange(0, U, gl.SliceLayout(1, gate))
    o_u = gl.expand_dims(o_u1, 1)
    m_u = o_u < H
    o_b = i_b * (TILES * N) + gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, gate)), 0)
    s_bias = share_rows(load_biases(p_b_ih, p_b_hh, l, o_u1, o_u1 < H, H), U)
    b_hs = ()
    if CARRY:
        s_carry = gl.allocate_shared_memory(gl.float32, [PAIRS_ALLOCATED * 2, U, N], gl.SwizzledSharedLayout(1, 1, 1, [0, 1]))
        for i_n in range(TILES):
            o_r = o_b + i_n * N
            b_h0 = gl.load(p_first + (o_r * ROW_H + o_u), mask=m_u & (o_r < B), other=0.0)
            s_carry.index(i_n).store(b_h0.to(gl.float32))
    else:
        for j in gl.static_range(PAIR):
            b_h0 = gl.load(p_first + ((o_b + j * N) * ROW_H + o_u), mask=m_u & (o_b + j * N < B), other=0.0)
            b_hs = b_hs + (b_h0.to(gl.float32),)

    # The tile of the state [slices, batch, k].  Rows beyond the batch read its last row, but for a ring, vectors beyond H the
    # first ones.
    o_ck = gl.expand_dims(gl.expand_dims(gl.arange(0, KP, gl.SliceLayout(0, gl.SliceLayout(1, copy))), 0), 1)
    o_cs = gl.expand_dims(gl.expand_dims(gl.arange(0, KS, gl.SliceLayout(1, gl.SliceLayout(2, copy))), 1), 2)
    o_cn = gl.expand_dims(gl.expand_dims(gl.arange(0, N, gl.SliceLayout(0, gl.SliceLayout(2, copy))), 0), 2)
    o_cn = i_b * (TILES * N) + o_cn
    o_ck += o_cs * KC
    o_first = gl.where(o_ck < H, o_ck, o_ck % VECTOR)
    s_h0 = gl.allocate_shared_memory(dtype, [KS, N, KP], in_rows)
    s_hs = (s_h0,)
    if BUFFERS > 1:
        s_h1 = gl.allocate_shared_memory(dtype, [KS, N, KP], in_rows)
        s_hs = (s_h0, s_h1)
    zero = gl.zeros([KS, U, N], gl.float32, mma)
    if KS > 1:
        banked: gl.constexpr = gl.SharedLinearLayout(shared_bases(KS, U, N))
        s_r = gl.allocate_shared_memory(gl.float32, [KS, U, N], banked)
        s_z = gl.allocate_shared_memory(gl.float32, [KS, U, N], banked)
        s_n = gl.allocate_shared_memory(gl.float32, [KS, U, N], banked)

    # gi [batch, units] of this tile and the next.
    o_gu = i_u * U + gl.expand_dims(gl.arange(0, U, gl.SliceLayout(0, copy_gi)), 0)
    o_gn = i_b * (TILES * N) + gl.expand_dims(gl.arange(0, N, gl.SliceLayout(1, copy_gi)), 1)
    s_gi_r = gl.allocate_shared_memory(dtype, [2, N, U], gi_rows)
    s_gi_z = gl.allocate_shared_memory(dtype, [2, N, U], gi_rows)
    s_gi_n = gl.allocate_shared_memory(dtype, [2, N, U], gi_rows)
    s_gi = (s_gi_r, s_gi_z, s_gi_n)
    rows_t = rows_of(p_offsets, 0, T, l, B)  # that take part in a step, and in the one before
    rows_old = B
    fetch(s_gi, 0, p_g + (o_gn * ROW_G + o_gu), (o_gu < H) & (o_gn < rows_t), H)

    p_t = states_at(p_offsets, p_old, p_first, o_cn, o_first, rows_old, B, ROW_H, RING)
    b_t = issue(p_t, VECTORS, 1, 16, PACK)
    for t in range(T):
        epoch = (t // 2 + 1) % 2
        pairs = PAIRS
        rows_next = B
        if p_offsets is not None:
            rows_t = rows_of(p_offsets, t, T, l, B)
            rows_next = rows_of(p_offsets, t + 1, T, l, B)
            stride = rows_after(p_offsets, t, T, l)
            stride_ot = stride * ROW_H
            stride_gt = stride * ROW_G
            stride_st = stride * (4 * H)
            if CARRY:
                pairs = groups_of(rows_t, i_b * (TILES * N), PAIR * N, PAIRS)
        for i in range(pairs):
            b_new_hs = ()
            for j in gl.static_range(PAIR):
                tile = i * PAIR + j
                slot = t % 2 if PAIR == 1 else j
                # the tile after this one, maybe of the next step
                after = tile + 1
                ends = after == pairs * PAIR
                after = gl.where(ends, 0, after)
                b_ar = zero
                b_az = zero
                b_an = zero
                b_keep = keep_of(p_keep, t, T, l, o_b + tile * N, B)
                for p in gl.static_range(PIECES):
                    if PAIR == 1 and p == 0:
                        p_t = states_at(p_offsets, p_old, p_first, o_cn, o_first, rows_old, B, ROW_H, RING)
                        b_t = issue(p_t, VECTORS, 1, 16, PACK)
                    if RING:
                        b_t = settle_epoch(b_t, p_t, p_error, epoch, VECTORS, 1, PACK, TIMEOUT)
                    else:
                        b_t = settle(b_t, p_t, p_error, VECTORS, 1, 16, PACK, TIMEOUT)
                    b_t = clear_beyond(b_t, o_ck + p * KP < H, HP == H)
                    s_h = s_hs[(j * PIECES + p) % BUFFERS]
                    s_h.store(operand_order(b_t, BYTES))
                    if p == 0:
                        async_copy.wait_group(0)
                    barrier()
                    if p == 0:  # all have read gi of the tile before this one
                        o_next = o_gn + after * N
                        rows_gi = B
                        if p_offsets is not None:
                            rows_gi = gl.where(ends, rows_next, rows_t)
                        m_gi = (o_gu < H) & (o_next < rows_gi) & (t + ends.to(gl.int32) < T)
                        p_next = p_g + gl.where(ends, stride_gt, 0)
                        fetch(s_gi, 1 - slot, p_next + (o_next * ROW_G + o_gu), m_gi, H)
                    if p + 1 < PIECES:
                        o_piece = o_ck + (p + 1) * KP
                        o_piece = gl.where(o_piece < H, o_piece, o_piece % VECTOR)
                        p_t = states_at(p_offsets, p_old, p_first, o_cn + tile * N, o_piece, rows_old, B, ROW_H, RING)
                        b_t = issue(p_t, VECTORS, 1, 16, PACK)
                    elif PAIR > 1:
                        p_then = gl.where(ends, p_new, p_old)
                        rows_then = B
                        if p_offsets is not None:
                            rows_then = gl.where(ends, rows_t, rows_old)
                        p_t = states_at(p_offsets, p_then, p_first, o_cn + after * N, o_first, rows_then, B, ROW_H, RING)
                        b_t = issue(p_t, VECTORS, 1, 16, PACK)
                    for f in gl.static_range(BLOCKS):
                        b_x = s_h.permute([0, 2, 1]).slice(f * KF, KF, 1).load(right)
                        b_ar = dot(b_wrs[p * BLOCKS + f], b_x, b_ar)
                        b_az = dot(b_wzs[p * BLOCKS + f], b_x, b_az)
                        if p * BLOCKS + f < SHARE:
                            b_an = dot(s_wns[p * BLOCKS + f].load(left), b_x, b_an)
                        else:
                            b_an = dot(b_wns[p * BLOCKS + f - SHARE], b_x, b_an)
                if KS > 1:
                    s_r.store(b_ar)
                    s_z.store(b_az)
                    s_n.store(b_an)
                    b_ar = add_slices(s_r, 0, KS, over_k, gate)
                    b_az = add_slices(s_z, 0, KS, over_k, gate)
                    b_an = add_slices(s_n, 0, KS, over_k, gate)
                else:
                    b_ar = gl.sum(b_ar, axis=0)
                    b_az = gl.sum(b_az, axis=0)
                    b_an = gl.sum(b_an, axis=0)
                b_ar = kept(p_keep, b_ar, b_keep)
                b_az = kept(p_keep, b_az, b_keep)
                b_an = kept(p_keep, b_an, b_keep)
                b_an += shared_row(s_bias, 3, gate)
                b_r = sigmoid(b_ar + read_gi(s_gi_r, slot, gate) + shared_row(s_bias, 0, gate))
                b_z = sigmoid(b_az + read_gi(s_gi_z, slot, gate) + shared_row(s_bias, 1, gate))
                b_n = tanh(read_gi(s_gi_n, slot, gate) + shared_row(s_bias, 2, gate) + b_r * b_an)
                if CARRY:
                    b_h = s_carry.index(tile).load(gate)
                else:
                    b_h = b_hs[j]
                b_before = b_h
                b_h = kept(p_keep, b_h, b_keep)
                b_h = b_n + b_z * (b_h - b_n)
                b_h = gl.where(b_h == b_h, b_h, float("nan"))
                if HX < H:
                    b_h = gl.where(o_u < HX, b_h, 0.0)
                o_r = o_b + tile * N
                if p_offsets is not None:
                    b_h = gl.where(o_r < rows_t, b_h, b_before)
                m = m_u & (o_r < rows_t)
                if RING:
                    gl.store(p_new + (o_r * ROW_H + o_u), with_epoch(b_h, ((t + 1) // 2 + 1) % 2), mask=m_u)
                    gl.store(p_to + (o_r * ROW_H + o_u), b_h.to(dtype), mask=m)
                else:
                    gl.store(p_new + (o_r * ROW_H + o_u), b_h.to(dtype), mask=m)
                if CARRY:
                    s_carry.index(tile).store(b_h)
                else:
                    b_new_hs = b_new_hs + (b_h,)
                if SAVE_GATES:
                    p_st = p_save + (o_r * (4 * H) + o_u)
                    gl.store(p_st, b_r.to(dtype), mask=m)
                    gl.store(p_st + H, b_z.to(dtype), mask=m)
                    gl.store(p_st + 2 * H, b_n.to(dtype), mask=m)
                    gl.store(p_st + 3 * H, b_an.to(dtype), mask=m)
            b_hs = b_new_hs
        if RING:
            p_then = p_old
            p_old = p_new
            p_new = p_then
            p_to += stride_ot
        else:
            p_old = p_new
            p_new += stride_ot
        p_g += stride_gt
        if SAVE_GATES:
            p_save += stride_st
        if p_offsets is not None:
            rows_old = rows_t
    async_copy.wait_group(0)
    p_h_n += l * rows * H
    if CARRY:
        for i_n in range(TILES):
            o_r = o_b + i_n * N
            gl.store(p_h_n + (o_r * H + o_u), s_carry.index(i_n).load(gate).to(dtype), mask=m_u & (o_r < B))
    else:
        for j in gl.static_range(PAIR):
            gl.store(p_h_n + ((o_b + j * N) * H + o_u), b_hs[j].to(dtype), mask=m_u & (o_b + j * N < B))


def staged_constants(
    plan: StagedPlan, *, lanes: int, hidden: int, units: int, reverse: bool, save_gates: bool, timeout_ns: int,
    pair: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Constants and options of ``staged_kernel``, which select its code; of several lanes it knows two directions and a pair,
    whose states do not cross in a ring."""
    assert lanes == (1 if pair is None and not reverse else 2) and not (plan.ring and pair is not None)
    return dict(
        LANES=lanes, H=hidden, HX=units, U=plan.units, N=plan.rows, TILES=plan.tiles,
        KS=plan.slices, MS=plan.unit_warps, PIECES=plan.pieces, SHARE=plan.share, RING=plan.ring,
        PAIRED=pair, SAVE_GATES=save_gates, TIMEOUT=timeout_ns,
        num_warps=plan.num_warps, maxnreg=most_registers(plan.num_warps), launch_cooperative_grid=True,
    )  # fmt: skip


def staged_launch(
    gi: Tensor,
    h0: Tensor,
    below: Tensor | None,
    w_ih: Sequence[Tensor],
    w_hh: Sequence[Tensor],
    b_ih: Sequence[Tensor] | None,
    b_hh: Sequence[Tensor] | None,
    out: Tensor,
    h_n: Tensor,
    gates: Tensor | None,
    error: Tensor,
    *,
    plan: StagedPlan,
    units: int | None = None,
    pair: int | None = None,
    offsets: Tensor | None = None,
    keep: Tensor | None = None,
    timeout_ns: int = 10_000_000_000,
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and arguments of ``staged_kernel``: those of ``wavefront_launch``, but for stacks; below is a ring or None."""
    reverse = check_launch(gi, h0, below, w_ih, w_hh, out, h_n, gates, pair=pair, offsets=offsets, keep=keep)
    lanes, batch, hidden = h_n.shape
    if plan.ring:
        assert offsets is None
        assert out.itemsize == 4 and below is not None and below.shape == (2, plan.ring_rows(batch), lanes * hidden)
    constants = staged_constants(
        plan, lanes=lanes, hidden=hidden, units=units or hidden, reverse=reverse, save_gates=gates is not None,
        timeout_ns=timeout_ns, pair=pair,
    )  # fmt: skip
    arguments = launch_arguments(gi, h0, below, w_ih, w_hh, b_ih, b_hh, out, h_n, gates, error, offsets=offsets, keep=keep)
    return (plan.programs(lanes, batch, hidden),), arguments | constants
