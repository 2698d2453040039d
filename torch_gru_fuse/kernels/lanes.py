"""What the kernels that run whole sequences in one launch share: a lane's gates, products and partial sums, and its launch.

A lane is a layer of a stack, a direction of a single layer, or a layer of a pair: two layers, none of which is the input of the
other.  Parameters are those of the module, never packed: one pointer a lane, of which a program selects its own.

Names as in ``gates``; besides: ``l`` is a lane, ``s_`` is shared memory, U units and N batch rows make a program's tile.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

# Called thread_barrier in Triton 3.6.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
# Called async_copy_global_to_shared up to Triton 3.7.
async_load = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared


# ---- parameters -------------------------------------------------------------------------------------------------------------


@gluon.jit
def select(pointers, i):
    """The i-th of a tuple of pointers; the first where there is no such."""
    p = pointers[0]
    for k in gl.static_range(1, len(pointers)):
        p = gl.where(i == k, pointers[k], p)
    return p


@gluon.jit
def walks_back(l, PAIRED: gl.constexpr):
    """1 if lane l of a pair goes through time backwards, else 0."""
    return (PAIRED >> l) & 1


@gluon.jit
def load_biases(p_b_ih, p_b_hh, l, o_u, m_u, H: gl.constexpr):
    """fp32, shaped like o_u: b_ir + b_hr, b_iz + b_hz, b_in, b_hn of lane l; 0 without biases."""
    if p_b_ih is None:
        b_r = (o_u * 0).to(gl.float32)
        b_z = b_r
        b_n = b_r
        b_hn = b_r
    else:
        p_i = select(p_b_ih, l) + o_u
        p_h = select(p_b_hh, l) + o_u
        b_r = gl.load(p_i, mask=m_u, other=0.0).to(gl.float32) + gl.load(p_h, mask=m_u, other=0.0).to(gl.float32)
        b_z = gl.load(p_i + H, mask=m_u, other=0.0).to(gl.float32) + gl.load(p_h + H, mask=m_u, other=0.0).to(gl.float32)
        b_n = gl.load(p_i + 2 * H, mask=m_u, other=0.0).to(gl.float32)
        b_hn = gl.load(p_h + 2 * H, mask=m_u, other=0.0).to(gl.float32)
    return b_r, b_z, b_n, b_hn


@gluon.jit
def share_rows(values, U: gl.constexpr):
    """Vectors [U] in shared memory, where they take no registers."""
    s_rows = gl.allocate_shared_memory(gl.float32, [len(values), U], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for i in gl.static_range(len(values)):
        s_rows.index(i).store(values[i])
    return s_rows


@gluon.jit
def shared_row(s_rows, i: gl.constexpr, layout: gl.constexpr):
    """The i-th of these vectors as [U, 1]."""
    return gl.expand_dims(s_rows.index(i).load(gl.SliceLayout(1, layout)), 1)


# ---- packed sequences ---------------------------------------------------------------------------------------------------
#
# Rows of packed sequences lie step by step, those of a step in the order of the batch, and no step has more than the one
# before.  ``p_offsets``, int32 [T + 1 + B], says in which row each step begins and how many rows there are, then how many
# steps each sequence has.  None: T steps of B rows; the functions below then do nothing, and cost nothing.
#
# A program takes as many steps as its first row, which has the most.  ``i`` counts them in the order in which a lane takes
# them, ``backwards`` is 1 where that is from the last to the first, else 0.


@gluon.jit
def in_memory(i, steps, backwards):
    """Which step in memory the i-th of a program is that takes so many."""
    return i + backwards * (steps - 1 - 2 * i)


@gluon.jit
def first_row(p_offsets, i, steps, backwards):
    """The row in which the i-th step of a program begins, or the last step where it has fewer."""
    return gl.load(p_offsets + in_memory(gl.minimum(i, steps - 1), steps, backwards))


@gluon.jit
def rows_after(p_offsets, i, steps, backwards):
    """How many rows later, or earlier, than the i-th step of a program the next one begins; 0 where there is none."""
    return first_row(p_offsets, i + 1, steps, backwards) - first_row(p_offsets, i, steps, backwards)


@gluon.jit
def rows_of(p_offsets, i, steps, backwards, B):
    """Rows of the i-th step of a program, or of the last one: more than come before its own first one."""
    if p_offsets is None:
        return B
    else:
        p = p_offsets + in_memory(gl.minimum(i, steps - 1), steps, backwards)
        return gl.load(p + 1) - gl.load(p)


@gluon.jit
def groups_of(rows, first, SIZE: gl.constexpr, MOST: gl.constexpr):
    """Groups of SIZE rows, from the ``first`` on, that have some of so many rows; not more than MOST."""
    return gl.minimum((rows - first + (SIZE - 1)) // SIZE, MOST)


@gluon.jit
def row_steps(p_lengths, o_b, steps, backwards):
    """In which steps of a program each row takes part, for the functions below."""
    if p_lengths is None:
        return steps, steps, backwards
    else:
        return gl.load(p_lengths + o_b), steps, backwards


@gluon.jit
def takes_part(i, rows):
    """By rows; the i-th step is one that the program has."""
    return in_memory(i, rows[1], rows[2]) < rows[0]


@gluon.jit
def in_step(p_offsets, m, i, rows):
    """m, of rows that take part in the i-th step."""
    if p_offsets is None:
        return m
    else:
        return m & takes_part(i, rows)


@gluon.jit
def if_in_step(p_offsets, yes, no, i, rows):
    """By rows: ``yes``, of those that do not take part in the i-th step ``no``."""
    if p_offsets is None:
        return yes
    else:
        return gl.where(takes_part(i, rows), yes, no)


@gluon.jit
def is_step(p_offsets, i, rows):
    """By rows: whether there is an i-th step, i > 0, and they take part in it."""
    if p_offsets is None:
        return i < rows[1]
    else:
        return (i < rows[1]) & takes_part(i, rows)


# ---- resets -----------------------------------------------------------------------------------------------------------------
#
# ``p_keep`` [T, B] says what is left of the state before each step, in all lanes: a factor of the states' dtype, or a bool, as
# uint8, that selects, so that a state that is NaN is gone after a reset.  A product with the state is changed and not the
# state, row by row: diag(k) h W^T = diag(k) (h W^T), and what a thread has of the product is less than what it has of its
# operands.  None: all is left; the functions below then do nothing, and cost nothing.


@gluon.jit
def keep_of(p_keep, i, steps, backwards, o_b, B):
    """Of rows, before the i-th step of a lane; of rows beyond B nothing is left.  To be read before a wait, used after it."""
    if p_keep is None:
        return o_b
    else:
        return gl.load(p_keep + in_memory(i, steps, backwards) * B + o_b, mask=o_b < B, other=0)


@gluon.jit
def kept(p_keep, b_x, b_keep):
    """What a reset leaves of a state, of a product with it or of its gradient."""
    if p_keep is None:
        return b_x
    else:
        if p_keep.dtype.element_ty == gl.uint8:
            return gl.where(b_keep != 0, b_x, 0.0)
        else:
            return b_x * b_keep.to(gl.float32)


# ---- gates ------------------------------------------------------------------------------------------------------------------


@gluon.jit
def sigmoid(b_x):
    """1 / (1 + 2^(-x log2 e)) by the two instructions of the special function unit: this is on the path that every step
    waits for.  Off by 2e-7 at most, relative; NaN stays NaN."""
    return gl.inline_asm_elementwise(
        """{ .reg .f32 a;
mul.ftz.f32 a, $1, 0fBFB8AA3B;
ex2.approx.ftz.f32 a, a;
add.ftz.f32 a, a, 0f3F800000;
rcp.approx.ftz.f32 $0, a; }""",
        "=f,f", [b_x], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def tanh(b_x):
    """2 / (1 + 2^(-2x log2 e)) - 1, likewise.  Off by 2e-7 at most, absolute: half a rounding of a gate near 1."""
    return gl.inline_asm_elementwise(
        """{ .reg .f32 a;
mul.ftz.f32 a, $1, 0fC038AA3B;
ex2.approx.ftz.f32 a, a;
add.ftz.f32 a, a, 0f3F800000;
rcp.approx.ftz.f32 a, a;
fma.rn.ftz.f32 $0, a, 0f40000000, 0fBF800000; }""",
        "=f,f", [b_x], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def masked(b_h, b_mask):
    """A state as it is stored, with dropout, as PyTorch multiplies the two; no NaN is the pattern."""
    b_x = b_h.to(gl.float32) * b_mask.to(gl.float32)
    return gl.where(b_x == b_x, b_x, float("nan")).to(b_h.dtype)


@gluon.jit
def gate_factors(b_r, b_z, b_n, b_hn, b_h):
    """What the gradient of h_t is multiplied with to make those of hn, r, z, n; b_h is the state before the step."""
    b_fn = (1.0 - b_z) * (1.0 - b_n * b_n)
    b_fr = b_fn * b_hn * (b_r * (1.0 - b_r))
    b_fz = (b_h - b_n) * (b_z * (1.0 - b_z))
    return b_fn * b_r, b_fr, b_fz, b_fn


@gluon.jit
def without_pattern(b_x):
    """b_x, its NaN canonical: it is none that says "not yet", and rounding it to tf32 leaves it a NaN."""
    return gl.where(b_x == b_x, b_x, float("nan"))


# ---- products and partial sums ----------------------------------------------------------------------------------------------


@gluon.jit
def round_operand(b_x):
    """fp32 to the nearest tf32, as ``settle`` does; other types as they are.  NaN must be canonical: others could become 0."""
    if b_x.dtype == gl.float32:
        b_x = (b_x.to(gl.int32, bitcast=True) + 0x1000).to(gl.float32, bitcast=True)
    return b_x


@gluon.jit
def round_parameter(b_w):
    """The same for values that may be any NaN; the instruction makes it canonical, for more time than an addition."""
    if b_w.dtype == gl.float32:
        b_w = gl.inline_asm_elementwise(
            "cvt.rna.tf32.f32 $0, $1;", "=r,r", [b_w], dtype=gl.float32, is_pure=True, pack=1
        )
    return b_w


@gluon.jit
def dot(b_w, b_h, b_acc):
    """acc + w @ h on tensor cores: [.., units, k] @ [.., k, batch]."""
    if b_w.dtype == gl.float32:
        return gl.nvidia.ampere.mma_v2(b_w, b_h, b_acc, input_precision="tf32")
    else:
        return gl.nvidia.ampere.mma_v2(b_w, b_h, b_acc)


@gluon.jit
def dot_kept(p_keep, b_w, b_h, b_acc, b_keep, zero):
    """acc + w @ h, of which a reset leaves what b_keep says: the product begins with zero then."""
    if p_keep is None:
        return dot(b_w, b_h, b_acc)
    else:
        return b_acc + kept(p_keep, dot(b_w, b_h, zero), b_keep)


@gluon.constexpr_function
def shared_bases(slices, units, batch):
    """Offset bit -> (slice, unit, batch) of the partial sums, such that both sides use all banks.

    A thread of the product stores pairs along the batch (bit 0); its half-warp spans batch bits 1, 2 and unit bits 0, 1.  A
    warp that adds up spans unit bits 0 to 3 and batch bit 0.  Bits 1 to 4 tell elements apart in both.
    """
    log_units, log_batch = units.bit_length() - 1, batch.bit_length() - 1
    bases = [[0, 0, 1], [0, 1, 0], [0, 2, 0], [0, 4, 0], [0, 8, 0], [0, 4, 2], [0, 8, 4]]
    bases += [[0, 0, 1 << i] for i in range(3, log_batch)] + [[0, 1 << i, 0] for i in range(4, log_units)]
    return bases + [[1 << i, 0, 0] for i in range(slices.bit_length() - 1)]


@gluon.constexpr_function
def gate_layout(slices, batch, warps):
    """Layout of gates: 16 units of two batch rows a warp, warps along the batch first; a thread holds all slices."""
    along_batch = min(warps, batch // 2)
    return gl.BlockedLayout([slices, 1, 1], [1, 16, 2], [1, warps // along_batch, along_batch], [1, 2, 0])


@gluon.jit
def add_slices(s_partial, first: gl.constexpr, count: gl.constexpr, layout: gl.constexpr, result: gl.constexpr):
    """Sum of ``count`` slices of k from the ``first`` on: [units, batch]."""
    return gl.convert_layout(gl.sum(s_partial.slice(first, count, 0).load(layout), axis=0), result)


# ---- launch -----------------------------------------------------------------------------------------------------------------


def most_registers(num_warps: int) -> int:
    """Registers of a thread when a program has the multiprocessor to itself.

    Left alone, the assembler aims at several programs each and spills for it: 1.7 KB at 48 registers, seen with Triton 3.6.
    """
    return min(255, 65536 // (32 * num_warps))


def check_launch(
    gi, h0, below, w_ih, w_hh, out, h_n, gates, masks=None, handed=None, pair=None, offsets=None, keep=None
) -> bool:
    """Sizes; whether the lanes are two directions.  offsets: of packed sequences, in whose tensors rows [N] are no [T, B]."""
    rows = out.shape[0 if pair is None else 1 : -1]
    lanes, batch, hidden = h_n.shape
    reverse = pair is None and gi.dim() == len(rows) + 2
    check_offsets(offsets, rows, batch)
    check_keep(keep, out.dtype, rows, batch, pair, offsets)
    assert hidden % 16 == 0  # rows are read in vectors
    assert len(w_hh) == lanes and all(w.shape == (3 * hidden, hidden) for w in (*w_ih, *w_hh))
    if reverse:
        assert lanes == 2 and gi.shape == (2, *rows, 3 * hidden)
        assert h0.shape == (batch, 2 * hidden) and out.shape == (*rows, 2 * hidden)
    elif pair is not None:
        assert lanes == 2 and pair in range(4) and gi.shape == (2, *rows, 3 * hidden) and not w_ih and masks is None
        assert h0.shape == (2, batch, hidden) and out.shape == (2, *rows, hidden)
    else:
        assert gi.shape == (*rows, 3 * hidden) and len(w_ih) == lanes - 1
        assert h0.shape == (lanes, batch, hidden) and out.shape == (*rows, hidden)
        assert lanes == 1 or below is not None and below.shape == (lanes - 1, *rows, hidden)
    assert gates is None or gates.shape == (lanes, *rows, 4, hidden)
    assert (masks is None) == (handed is None)
    assert masks is None or lanes > 1 and not reverse and masks.shape == handed.shape == below.shape
    assert all(t is None or t.is_contiguous() for t in (gi, h0, below, *w_ih, *w_hh, out, h_n, gates, masks, handed))
    return reverse


def check_offsets(offsets, rows, batch) -> None:
    """Of packed sequences [T + 1 + B], or None; rows: (T, B), or (N,) of packed ones."""
    assert len(rows) == (2 if offsets is None else 1)
    assert offsets is None or offsets.dim() == 1 and offsets.shape[0] > batch + 1 and offsets.is_contiguous()
    assert offsets is not None or rows[1] == batch


def check_keep(keep, dtype, rows, batch, pair, offsets) -> None:
    """Of resets, [T, B], or None; packed sequences and pairs have none."""
    if keep is not None:
        assert pair is None and offsets is None
        assert keep.shape == (rows[0], batch) and keep.is_contiguous() and keep.dtype in (dtype, torch.bool)


def keep_bytes(keep):
    """As the kernels take it: bool by bytes."""
    return keep.view(torch.uint8) if keep is not None and keep.dtype == torch.bool else keep


def number_of_steps(out, batch, offsets) -> int:
    """T."""
    return out.shape[-3] if offsets is None else offsets.shape[0] - 1 - batch


def launch_arguments(
    gi, h0, below, w_ih, w_hh, b_ih, b_hh, out, h_n, gates, error, masks=None, handed=None, offsets=None, keep=None
) -> dict[str, Any]:
    """What is not constant; places that are not used hold pointers of the right kind."""
    return dict(
        p_gi=gi, p_h0=h0, p_below=out if below is None else below,
        p_w_ih=tuple(w_ih or w_hh[:1]), p_w_hh=tuple(w_hh),
        p_b_ih=None if b_ih is None else tuple(b_ih), p_b_hh=None if b_hh is None else tuple(b_hh),
        p_masks=masks, p_masked=handed,
        p_out=out, p_h_n=h_n, p_gates=out if gates is None else gates, p_error=error,
        p_offsets=offsets, p_keep=keep_bytes(keep), T=number_of_steps(out, h_n.shape[1], offsets), B=h_n.shape[1],
    )  # fmt: skip


def check_backward(
    dy, dhn, h0, out, below, gates, w_ih, w_hh, masks, d_gates, dhx, sums, pair=None, offsets=None, keep=None
) -> bool:
    """Sizes of a backward launch; whether the lanes are two directions.  offsets: as in ``check_launch``."""
    rows = out.shape[0 if pair is None else 1 : -1]
    lanes, batch, hidden = h0.shape
    reverse = lanes == 2 and out.shape[-1] == 2 * hidden
    check_offsets(offsets, rows, batch)
    check_keep(keep, out.dtype, rows, batch, pair, offsets)
    assert hidden % 16 == 0 and len(w_hh) == lanes
    assert pair is None or lanes == 2 and pair in range(4)
    assert out.shape == (*([] if pair is None else [2]), *rows, hidden * (2 if reverse else 1))
    assert dy is None or dy.shape == out.shape
    assert h0.shape == dhx.shape == (lanes, batch, hidden) and (dhn is None or dhn.shape == h0.shape)
    assert gates.shape == d_gates.shape == (lanes, *rows, 4, hidden)
    assert sums.shape[::2] == (lanes, 4) and sums.shape[3] == hidden
    assert all(w.shape == (3 * hidden, hidden) for w in (*w_ih, *w_hh))
    if reverse or lanes == 1 or pair is not None:
        assert not w_ih and masks is None
    else:
        assert len(w_ih) == lanes - 1 and below is not None and below.shape == (lanes - 1, *rows, hidden)
        assert masks is None or masks.shape == below.shape
    tensors = (dy, dhn, h0, out, below, gates, *w_ih, *w_hh, masks, d_gates, dhx, sums)
    assert all(t is None or t.is_contiguous() for t in tensors)
    return reverse


def backward_arguments(
    dy, dhn, h0, out, below, gates, w_ih, w_hh, masks, d_gates, dhx, sums, error, offsets=None, keep=None
) -> dict[str, Any]:
    """What is not constant of a backward launch; places that are not used hold pointers of the right kind."""
    return dict(
        p_dy=dy, p_dhn=dhn, p_h0=h0, p_out=out, p_below=out if below is None else below, p_gates=gates,
        p_w_ih=tuple(w_ih or w_hh[:1]), p_w_hh=tuple(w_hh), p_masks=masks,
        p_d_gates=d_gates, p_dhx=dhx, p_sums=sums, p_error=error,
        p_offsets=offsets, p_keep=keep_bytes(keep), T=number_of_steps(out, h0.shape[1], offsets), B=h0.shape[1],
    )  # fmt: skip
