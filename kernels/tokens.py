"""Load a token or a modulation row, and take the statistics of a token, inside a kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from anyflow.kernels.numerics import INTERPRETED


@triton.jit
def load_vector(pointer, columns, mask):
    """Load the D elements of a token or of a modulation row in fp32, zero beyond D."""
    return tl.load(pointer + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_modulation(pointer, batch, index, batch_stride, row_stride, columns, mask):
    """Load one modulation row of a sample in fp32, zero beyond D."""
    return load_vector(pointer + batch * batch_stride + index * row_stride, columns, mask)


@triton.jit
def standardize(x, mask, eps, D: tl.constexpr):
    """Return ``(x - mean) / std`` of a token.

    The variance is that of the centered token: a difference of squares could cancel.
    """
    centered = tl.where(mask, x - tl.sum(x, 0) / D, 0.0)
    return centered * tl.rsqrt(tl.sum(centered * centered, 0) / D + eps)


@triton.jit
def add_pairs(a0, a1, b0, b1):
    """Add two pairs: the reduction of a pair has as many barriers as that of one number."""
    return a0 + b0, a1 + b1


@triton.jit
def sum_pair(a, b):
    """Return the sums of two tokens, in one reduction.

    Interpreted, the reductions are two: the interpreter calls ``add_pairs`` for every element.
    """
    if INTERPRETED:
        return tl.sum(a, 0), tl.sum(b, 0)
    return tl.reduce((a, b), 0, add_pairs)


@triton.jit
def standardize_with_gradient(x, g, mask, eps, D: tl.constexpr):
    """Return ``standardize(x)`` and the gradient of x, given the gradient g of the former.

    g is zero beyond D. The sums of g and of g * normal share the reductions of the statistics,
    because sum(g * normal) is sum(g * centered) / std: two reductions in place of four.
    """
    sum_x, sum_g = sum_pair(x, g)
    centered = tl.where(mask, x - sum_x / D, 0.0)
    square, product = sum_pair(centered * centered, g * centered)
    rstd = tl.rsqrt(square / D + eps)
    normal = centered * rstd
    return normal, rstd * (g - sum_g / D - normal * (product * rstd / D))
