"""The parts that all kernels share: nonlinearities, gate equations, tf32 rounding and the product that makes the gates.

Every helper works on block values in fp32 registers; each forward has its backward beside it.  Names, in all kernels:
``i_`` program ids, ``o_`` offsets, ``p_`` pointers, ``b_`` block values, ``m_`` masks; r, z, n are the gates, hn the hidden
projection of gate n with its bias, and a pre-activation is written a.
"""

import triton
import triton.language as tl

# Whether these kernels run in Triton's interpreter.  It reads bf16 operands of `tl.dot` as integers, silently: `dot` widens
# them there.  Products of two bf16 are exact in fp32, so the result is what the tensor cores give.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def add_up(b_x, axis: tl.constexpr):
    """The sum along an axis."""
    if INTERPRETED:  # by numpy; `tl.sum` stays compiled code there
        return tl.reduce(b_x, axis, tl.standard._sum_combine)
    else:
        return tl.sum(b_x, axis)


@triton.jit
def sigmoid(b_x):
    """1 / (1 + e^-x).  e^-x overflows to inf for very negative x, which gives the right 0; NaN stays NaN."""
    return 1.0 / (1.0 + tl.exp(-b_x))


@triton.jit
def sigmoid_backward(b_y):
    """Derivative of the sigmoid from its value y."""
    return b_y * (1.0 - b_y)


@triton.jit
def tanh(b_x):
    """tanh to 2e-7 relative, everywhere.

    Above 0.6, 1 - 2e/(1 + e) with e = exp(-2|x|): no overflow, and at most a half is subtracted from the 1.  Below, that
    would cancel: there x + x^3 P(x^2), where P is the polynomial of degree 4 that minimises the greatest relative error
    (2.8e-9 before rounding).  NaN fails the comparison and passes through the exponential.
    """
    b_abs = tl.abs(b_x)
    b_e = tl.exp(-2.0 * b_abs)
    b_far = 1.0 - 2.0 * b_e / (1.0 + b_e)
    b_far = tl.where(b_x < 0.0, -b_far, b_far)
    b_x2 = b_x * b_x
    b_p = 2.0795975e-2 - 5.8951606e-3 * b_x2
    b_p = -5.3783830e-2 + b_p * b_x2
    b_p = 1.3331924e-1 + b_p * b_x2
    b_p = -3.3333299e-1 + b_p * b_x2
    return tl.where(b_abs < 0.6, b_x + b_x * (b_x2 * b_p), b_far)


@triton.jit
def tanh_backward(b_y):
    """Derivative of tanh from its value y."""
    return 1.0 - b_y * b_y


@triton.jit
def gru_gates(b_ar, b_az, b_anx, b_hn, b_h):
    """One step from the pre-activations of r and z, both halves of n's, and h: (h', r, z, n)."""
    b_r = sigmoid(b_ar)
    b_z = sigmoid(b_az)
    b_n = tanh(b_anx + b_r * b_hn)
    return b_n + b_z * (b_h - b_n), b_r, b_z, b_n


@triton.jit
def gru_gates_backward(b_g, b_h, b_r, b_z, b_n, b_hn):
    """From g = dL/dh': the gradients of hn and of the pre-activations of r, z, n, and the direct path g*z to dL/dh."""
    b_dn = b_g * (1.0 - b_z) * tanh_backward(b_n)
    b_dhn = b_dn * b_r
    b_dr = b_dn * b_hn * sigmoid_backward(b_r)
    b_dz = b_g * (b_h - b_n) * sigmoid_backward(b_z)
    return b_dhn, b_dr, b_dz, b_dn, b_g * b_z


@triton.jit
def keep_rows(b_x, b_keep):
    """What a reset leaves of a state, of a product with it or of its gradient [batch, units]: x * keep, keep [batch].

    uint8 is a bool, which selects: where it is 0 the result is zero whatever x holds.
    """
    if b_keep.dtype == tl.uint8:
        return tl.where((b_keep != 0)[:, None], b_x, 0.0)
    else:
        return b_x * b_keep.to(tl.float32)[:, None]


@triton.jit
def round_tf32(b_x):
    """fp32 to the nearest tf32 (10 bits of mantissa), ties away from zero, as ``cvt.rna.tf32.f32`` does.

    Tensor cores drop the low 13 bits, which biases every product towards zero.  Adding half of the last kept bit to the
    magnitude first makes that a rounding; a carry runs into the exponent as it should, up to Inf.  Inf has no low bits and
    stays.  A NaN could carry into the sign and become 0, or lose its whole payload and become Inf: it is replaced.
    """
    b_bits = b_x.to(tl.uint32, bitcast=True)
    b_rounded = ((b_bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return tl.where(b_x != b_x, float("nan"), b_rounded)


@triton.jit
def dot(b_a, b_w, b_acc, TF32: tl.constexpr, W_ROUNDED: tl.constexpr):
    """acc + a @ w in fp32; fp32 operands are rounded to tf32 if TF32, else multiplied exactly (on FMA units).

    Exact products of fp32 are summed within a block of k first, and the blocks then: a sum over all of k in one chain rounds
    up to nine times worse (gradients of h, H=512).  It is written as a subtraction of the negative because the compiler
    makes one chain of an addition.

    W_ROUNDED: w was rounded where it was made.  Every warp rounds all the weights it multiplies, so this saves up to 40% of
    the time of a large tile.
    """
    if TF32:
        if not W_ROUNDED:
            b_w = round_tf32(b_w)
        return tl.dot(round_tf32(b_a), b_w, b_acc, input_precision="tf32")
    elif INTERPRETED or b_a.dtype == tl.float32:
        return b_acc - tl.dot(-b_a.to(tl.float32), b_w.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(b_a, b_w, b_acc, input_precision="ieee")


@triton.jit
def project(
    b_r, b_z, b_n,
    p_x, p_w,
    o_b, o_u, m_b, m_u,
    stride_xb, stride_xk, stride_wu, stride_wk,
    K: tl.constexpr, H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TF32: tl.constexpr, W_ROUNDED: tl.constexpr,
    backwards=0,
):  # fmt: skip
    """(r, z, n) + x @ W^T for a tile [batch, units] of each gate: x [B, K], W [3H, K], rows of gate g at g*H.

    One pass over k, from its end if ``backwards`` is 1: each tile of x is loaded once and meets the weights of all three gates.
    """
    LAST: tl.constexpr = (K - 1) // BLOCK_K * BLOCK_K
    for k in range(0, K, BLOCK_K):
        o_k = k + (LAST - 2 * k) * backwards + tl.arange(0, BLOCK_K)
        m_k = (o_k < K) | (K % BLOCK_K == 0)  # folds to true where no block is partial
        m_w = m_k[:, None] & m_u[None, :]
        o_w = o_k[:, None] * stride_wk
        b_x = tl.load(p_x + o_b[:, None] * stride_xb + o_k[None, :] * stride_xk, m_b[:, None] & m_k[None, :], 0.0)
        b_wr = tl.load(p_w + o_u[None, :] * stride_wu + o_w, m_w, 0.0)  # [BLOCK_K, BLOCK_U]
        b_wz = tl.load(p_w + (o_u + H)[None, :] * stride_wu + o_w, m_w, 0.0)
        b_wn = tl.load(p_w + (o_u + 2 * H)[None, :] * stride_wu + o_w, m_w, 0.0)
        b_r = dot(b_x, b_wr, b_r, TF32, W_ROUNDED)
        b_z = dot(b_x, b_wz, b_z, TF32, W_ROUNDED)
        b_n = dot(b_x, b_wn, b_n, TF32, W_ROUNDED)
    return b_r, b_z, b_n
