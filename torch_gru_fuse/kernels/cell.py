"""One GRU cell: linear + bias + gates of ``torch.gru_cell`` in one launch, and the pointwise half of its backward.

Sizes: B batch, I inputs, H units.  Every tensor may have any strides.  float32, float16 and bfloat16; sums are fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .gates import gru_gates, gru_gates_backward, project
from .launch import launch

if TYPE_CHECKING:
    from torch import Tensor

    from ..planner.tiles import Tile


@triton.jit(do_not_specialize=["B"])
def cell_forward_kernel(
    p_x, p_h, p_w_ih, p_w_hh, p_b_ih, p_b_hh,
    p_out, p_gates,
    B,
    stride_xb, stride_xi, stride_hb, stride_hu,
    stride_wiu, stride_wii, stride_whu, stride_whk, stride_bi, stride_bh,
    stride_ob, stride_ou, stride_gb, stride_gg, stride_gu,
    I: tl.constexpr, H: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_B_IH: tl.constexpr, HAS_B_HH: tl.constexpr, SAVE_GATES: tl.constexpr, TF32: tl.constexpr,
):  # fmt: skip
    """h' = gru_cell(x, h) for a tile [batch, units].

        r, z  = sigmoid(x W_i^T + b_i + h W_h^T + b_h)      each
        hn    = h W_hn^T + b_hn
        n     = tanh(x W_in^T + b_in + r * hn)
        h'    = n + z * (h - n)

    The four sums of a unit (r, z, n from x, n from h) grow in registers, starting from the biases, so neither projection
    is ever in memory.  Saved for the backward, if SAVE_GATES: r, z, n, hn.

    Bytes: the weights 3H(I+H) once, if the batch fits one tile, x and h once for each tile of units, h' once (and the four
    gates).  Small batches are bound by the bandwidth at which the weights come, large ones by the tensor cores.
    """
    i_b, i_u = tl.program_id(0), tl.program_id(1)
    o_b = (i_b * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    o_u = (i_u * BLOCK_U + tl.arange(0, BLOCK_U)).to(tl.int64)
    m_b = o_b < B
    m_u = (o_u < H) | (H % BLOCK_U == 0)
    m = m_b[:, None] & m_u[None, :]

    b_ar = tl.full((BLOCK_B, BLOCK_U), 0.0, tl.float32)
    b_az = tl.full((BLOCK_B, BLOCK_U), 0.0, tl.float32)
    b_anx = tl.full((BLOCK_B, BLOCK_U), 0.0, tl.float32)
    b_hn = tl.full((BLOCK_B, BLOCK_U), 0.0, tl.float32)
    if HAS_B_IH:
        b_ar += tl.load(p_b_ih + o_u * stride_bi, m_u, 0.0).to(tl.float32)[None, :]
        b_az += tl.load(p_b_ih + (o_u + H) * stride_bi, m_u, 0.0).to(tl.float32)[None, :]
        b_anx += tl.load(p_b_ih + (o_u + 2 * H) * stride_bi, m_u, 0.0).to(tl.float32)[None, :]
    if HAS_B_HH:
        b_ar += tl.load(p_b_hh + o_u * stride_bh, m_u, 0.0).to(tl.float32)[None, :]
        b_az += tl.load(p_b_hh + (o_u + H) * stride_bh, m_u, 0.0).to(tl.float32)[None, :]
        b_hn += tl.load(p_b_hh + (o_u + 2 * H) * stride_bh, m_u, 0.0).to(tl.float32)[None, :]
    b_h = tl.load(p_h + o_b[:, None] * stride_hb + o_u[None, :] * stride_hu, m, 0.0).to(tl.float32)

    b_ar, b_az, b_anx = project(
        b_ar, b_az, b_anx, p_x, p_w_ih, o_b, o_u, m_b, m_u,
        stride_xb, stride_xi, stride_wiu, stride_wii, I, H, BLOCK_K, TF32, False,
    )  # fmt: skip
    b_ar, b_az, b_hn = project(
        b_ar, b_az, b_hn, p_h, p_w_hh, o_b, o_u, m_b, m_u,
        stride_hb, stride_hu, stride_whu, stride_whk, H, H, BLOCK_K, TF32, False,
    )  # fmt: skip
    b_out, b_r, b_z, b_n = gru_gates(b_ar, b_az, b_anx, b_hn, b_h)

    tl.store(p_out + o_b[:, None] * stride_ob + o_u[None, :] * stride_ou, b_out, m)
    if SAVE_GATES:
        p_g = p_gates + o_b[:, None] * stride_gb + o_u[None, :] * stride_gu
        tl.store(p_g, b_r, m)
        tl.store(p_g + stride_gg, b_z, m)
        tl.store(p_g + 2 * stride_gg, b_n, m)
        tl.store(p_g + 3 * stride_gg, b_hn, m)


@triton.jit(do_not_specialize=["B"])
def cell_backward_kernel(
    p_grad_h, p_h, p_gates,
    p_d_gates, p_d_h,
    B,
    stride_yb, stride_yu, stride_hb, stride_hu, stride_gb, stride_gg, stride_gu,
    stride_db, stride_dg, stride_du, stride_eb, stride_eu,
    H: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Gate gradients and the direct path, for a tile [batch, units] and g = dL/dh'.

        d_n  = g * (1 - z) * (1 - n^2)
        d_hn = d_n * r
        d_r  = d_n * hn * r * (1 - r)
        d_z  = g * (h - n) * z * (1 - z)
        d_h  = g * z

    Pointwise: reads g, h and the four saved gates, writes four gradients (hn, r, z, n) and d_h.  Eleven values an element,
    bound by memory bandwidth.
    """
    i_b, i_u = tl.program_id(0), tl.program_id(1)
    o_b = (i_b * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    o_u = (i_u * BLOCK_U + tl.arange(0, BLOCK_U)).to(tl.int64)
    m = (o_b < B)[:, None] & (o_u < H)[None, :]

    b_g = tl.load(p_grad_h + o_b[:, None] * stride_yb + o_u[None, :] * stride_yu, m, 0.0).to(tl.float32)
    b_h = tl.load(p_h + o_b[:, None] * stride_hb + o_u[None, :] * stride_hu, m, 0.0).to(tl.float32)
    p_g = p_gates + o_b[:, None] * stride_gb + o_u[None, :] * stride_gu
    b_r = tl.load(p_g, m, 0.0).to(tl.float32)
    b_z = tl.load(p_g + stride_gg, m, 0.0).to(tl.float32)
    b_n = tl.load(p_g + 2 * stride_gg, m, 0.0).to(tl.float32)
    b_hn = tl.load(p_g + 3 * stride_gg, m, 0.0).to(tl.float32)

    b_dhn, b_dr, b_dz, b_dn, b_dh = gru_gates_backward(b_g, b_h, b_r, b_z, b_n, b_hn)

    p_d = p_d_gates + o_b[:, None] * stride_db + o_u[None, :] * stride_du
    tl.store(p_d, b_dhn, m)
    tl.store(p_d + stride_dg, b_dr, m)
    tl.store(p_d + 2 * stride_dg, b_dz, m)
    tl.store(p_d + 3 * stride_dg, b_dn, m)
    tl.store(p_d_h + o_b[:, None] * stride_eb + o_u[None, :] * stride_eu, b_dh, m)


@triton.jit(do_not_specialize=["B"])
def cell_gates_kernel(
    p_gi, p_gh, p_h, p_b_ih, p_b_hh,
    p_out, p_gates,
    B,
    stride_hb, stride_hu, stride_bi, stride_bh,
    H: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_U: tl.constexpr,
    HAS_B_IH: tl.constexpr, HAS_B_HH: tl.constexpr, SAVE_GATES: tl.constexpr,
):  # fmt: skip
    """The gates of a cell whose projections gi = x W_i^T and gh = h W_h^T exist, for a tile [batch, units].

        r, z  = sigmoid(gi + b_i + gh + b_h)                each
        hn    = gh_n + b_hn
        n     = tanh(gi_n + b_in + r * hn)
        h'    = n + z * (h - n)

    Saved for the backward, if SAVE_GATES: r, z, n, hn.  gi, gh [B, 3H], out [B, H] and gates [B, 4, H] are contiguous.

    Pointwise: reads seven values an element, writes one (and four gates); bound by memory bandwidth.
    """
    i_b, i_u = tl.program_id(0), tl.program_id(1)
    o_b = (i_b * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    o_u = (i_u * BLOCK_U + tl.arange(0, BLOCK_U)).to(tl.int64)
    m_u = o_u < H
    m = (o_b < B)[:, None] & m_u[None, :]

    o_g = o_b[:, None] * (3 * H) + o_u[None, :]
    b_ar = tl.load(p_gi + o_g, m, 0.0).to(tl.float32) + tl.load(p_gh + o_g, m, 0.0).to(tl.float32)
    b_az = tl.load(p_gi + o_g + H, m, 0.0).to(tl.float32) + tl.load(p_gh + o_g + H, m, 0.0).to(tl.float32)
    b_anx = tl.load(p_gi + o_g + 2 * H, m, 0.0).to(tl.float32)
    b_hn = tl.load(p_gh + o_g + 2 * H, m, 0.0).to(tl.float32)
    if HAS_B_IH:
        b_ar += tl.load(p_b_ih + o_u * stride_bi, m_u, 0.0).to(tl.float32)[None, :]
        b_az += tl.load(p_b_ih + (o_u + H) * stride_bi, m_u, 0.0).to(tl.float32)[None, :]
        b_anx += tl.load(p_b_ih + (o_u + 2 * H) * stride_bi, m_u, 0.0).to(tl.float32)[None, :]
    if HAS_B_HH:
        b_ar += tl.load(p_b_hh + o_u * stride_bh, m_u, 0.0).to(tl.float32)[None, :]
        b_az += tl.load(p_b_hh + (o_u + H) * stride_bh, m_u, 0.0).to(tl.float32)[None, :]
        b_hn += tl.load(p_b_hh + (o_u + 2 * H) * stride_bh, m_u, 0.0).to(tl.float32)[None, :]
    b_h = tl.load(p_h + o_b[:, None] * stride_hb + o_u[None, :] * stride_hu, m, 0.0).to(tl.float32)
    b_out, b_r, b_z, b_n = gru_gates(b_ar, b_az, b_anx, b_hn, b_h)

    tl.store(p_out + o_b[:, None] * H + o_u[None, :], b_out, m)
    if SAVE_GATES:
        p_g = p_gates + o_b[:, None] * (4 * H) + o_u[None, :]
        tl.store(p_g, b_r, m)
        tl.store(p_g + H, b_z, m)
        tl.store(p_g + 2 * H, b_n, m)
        tl.store(p_g + 3 * H, b_hn, m)


def cell_forward_launch(x, h, w_ih, w_hh, b_ih, b_hh, out, gates, *, tile: Tile, tf32: bool):
    """Grid and keyword arguments of `cell_forward_kernel`."""
    (B, I), H = x.shape, h.shape[1]  # noqa: E741
    assert w_ih.shape == (3 * H, I) and w_hh.shape == (3 * H, H) and out.shape == h.shape == (B, H)
    assert gates is None or gates.shape == (B, 4, H)
    stride_gb, stride_gg, stride_gu = (0, 0, 0) if gates is None else gates.stride()
    arguments = dict(
        p_x=x, p_h=h, p_w_ih=w_ih, p_w_hh=w_hh, p_b_ih=b_ih, p_b_hh=b_hh,
        p_out=out, p_gates=gates,
        B=B,
        stride_xb=x.stride(0), stride_xi=x.stride(1), stride_hb=h.stride(0), stride_hu=h.stride(1),
        stride_wiu=w_ih.stride(0), stride_wii=w_ih.stride(1), stride_whu=w_hh.stride(0), stride_whk=w_hh.stride(1),
        stride_bi=0 if b_ih is None else b_ih.stride(0), stride_bh=0 if b_hh is None else b_hh.stride(0),
        stride_ob=out.stride(0), stride_ou=out.stride(1),
        stride_gb=stride_gb, stride_gg=stride_gg, stride_gu=stride_gu,
        I=I, H=H,
        BLOCK_B=tile.block_b, BLOCK_U=tile.block_u, BLOCK_K=tile.block_k,
        HAS_B_IH=b_ih is not None, HAS_B_HH=b_hh is not None, SAVE_GATES=gates is not None,
        TF32=tf32 and x.dtype == torch.float32,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return (triton.cdiv(B, tile.block_b), triton.cdiv(H, tile.block_u)), arguments


def cell_backward_launch(grad_h, h, gates, d_gates, d_h_direct, *, tile: Tile):
    """Grid and keyword arguments of `cell_backward_kernel`."""
    B, H = h.shape
    assert grad_h.shape == d_h_direct.shape == (B, H) and gates.shape == d_gates.shape == (B, 4, H)
    arguments = dict(
        p_grad_h=grad_h, p_h=h, p_gates=gates,
        p_d_gates=d_gates, p_d_h=d_h_direct,
        B=B,
        stride_yb=grad_h.stride(0), stride_yu=grad_h.stride(1), stride_hb=h.stride(0), stride_hu=h.stride(1),
        stride_gb=gates.stride(0), stride_gg=gates.stride(1), stride_gu=gates.stride(2),
        stride_db=d_gates.stride(0), stride_dg=d_gates.stride(1), stride_du=d_gates.stride(2),
        stride_eb=d_h_direct.stride(0), stride_eu=d_h_direct.stride(1),
        H=H,
        BLOCK_B=tile.block_b, BLOCK_U=tile.block_u,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return (triton.cdiv(B, tile.block_b), triton.cdiv(H, tile.block_u)), arguments


def cell_gates_launch(gi, gh, h, b_ih, b_hh, out, gates, *, tile: Tile):
    """Grid and keyword arguments of `cell_gates_kernel`."""
    B, H = h.shape
    assert gi.shape == gh.shape == (B, 3 * H) and gi.is_contiguous() and gh.is_contiguous()
    assert out.shape == (B, H) and out.is_contiguous()
    assert gates is None or gates.shape == (B, 4, H) and gates.is_contiguous()
    arguments = dict(
        p_gi=gi, p_gh=gh, p_h=h, p_b_ih=b_ih, p_b_hh=b_hh,
        p_out=out, p_gates=gates,
        B=B,
        stride_hb=h.stride(0), stride_hu=h.stride(1),
        stride_bi=0 if b_ih is None else b_ih.stride(0), stride_bh=0 if b_hh is None else b_hh.stride(0),
        H=H,
        BLOCK_B=tile.block_b, BLOCK_U=tile.block_u,
        HAS_B_IH=b_ih is not None, HAS_B_HH=b_hh is not None, SAVE_GATES=gates is not None,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return (triton.cdiv(B, tile.block_b), triton.cdiv(H, tile.block_u)), arguments


def cell_gates(
    gi: Tensor, gh: Tensor, h: Tensor, b_ih: Tensor | None, b_hh: Tensor | None, out: Tensor, gates: Tensor | None,
    *, tile: Tile,
) -> None:  # fmt: skip
    """Fills out [B, H] and, if given, gates [B, 4, H] = (r, z, n, hn) from the projections gi, gh [B, 3H] without biases."""
    grid, arguments = cell_gates_launch(gi, gh, h, b_ih, b_hh, out, gates, tile=tile)
    launch(cell_gates_kernel, grid, arguments)


def cell_forward(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    out: Tensor,
    gates: Tensor | None,
    *,
    tile: Tile,
    tf32: bool,
) -> None:
    """Fills out [B, H] and, if given, gates [B, 4, H] = (r, z, n, hn) from x [B, I], h [B, H] and the cell's parameters.

    ``tf32`` sends the products of float32 inputs to the tensor cores, rounded to nearest; it means nothing to others.
    """
    grid, arguments = cell_forward_launch(x, h, w_ih, w_hh, b_ih, b_hh, out, gates, tile=tile, tf32=tf32)
    launch(cell_forward_kernel, grid, arguments)


def cell_backward(
    grad_h: Tensor, h: Tensor, gates: Tensor, d_gates: Tensor, d_h_direct: Tensor, *, tile: Tile
) -> None:
    """Fills d_gates [B, 4, H] = gradients of (hn, r, z, n) and d_h_direct [B, H] = grad_h * z.

    The products are left to the caller.  With d = d_gates.view(B, 4*H) and the rows of w_hh rotated to (n, r, z)::

        dx = d[:, H:] @ w_ih            dh = d_h_direct + d[:, :3*H] @ rotated(w_hh)
        dw_ih = d[:, H:].T @ x          rotated(dw_hh) = d[:, :3*H].T @ h
        db_ih = d[:, H:].sum(0)         rotated(db_hh) = d[:, :3*H].sum(0)
    """
    grid, arguments = cell_backward_launch(grad_h, h, gates, d_gates, d_h_direct, tile=tile)
    launch(cell_backward_kernel, grid, arguments)
