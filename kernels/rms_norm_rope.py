"""Apply RMS norm over all heads, then turn the pairs of each: ``anyflow.ops.rms_norm_rope``.

A token stays in one register layout from load to store: each thread holds whole 16-byte vectors,
hence whole pairs, so splitting them into even and odd numbers and joining them again moves nothing
between threads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from anyflow.kernels.launch import contiguous_rows, empty, launch
from anyflow.kernels.numerics import cast
from anyflow.kernels.token_options import (
    BACKWARD_TOKENS,
    FEW_TENSORS,
    FORWARD_TOKENS,
    FP32_BACKWARD,
    token_options,
)
from anyflow.kernels.token_sums import finish_sums, partial_sums
from anyflow.kernels.tokens import load_vector, sum_pair


@triton.jit
def table_columns(x_ptr, HALF: tl.constexpr, BLOCK_D: tl.constexpr):
    """Return the columns of cos and sin for each pair of a row; every head reads the same ones."""
    columns = tl.arange(0, BLOCK_D // 2) % HALF
    if x_ptr.dtype.element_ty.primitive_bitwidth == 32 and HALF % 2 == 0:
        # A thread holds 16 bytes of x, two pairs: it would have to exchange longer vectors of cos.
        columns = tl.max_contiguous(columns, 2)
    return columns


@triton.jit
def rotate(x, cos, sin, BLOCK_D: tl.constexpr):
    """Turn pair i, ``(x[2i], x[2i + 1])``, by the angle of ``cos[i]``, ``sin[i]``."""
    even, odd = tl.split(tl.reshape(x, [BLOCK_D // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [BLOCK_D])


@triton.jit
def inverse_rms(x, eps, D: tl.constexpr):
    """Return ``1 / sqrt(mean(x^2) + eps)`` of a row that is zero beyond D."""
    return tl.rsqrt(tl.sum(x * x, 0) / D + eps)


@triton.jit
def rms_norm_rope_forward_kernel(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr,
    runs, tokens,  # per sample
    x_batch_stride, x_token_stride, cos_token_stride, sin_token_stride,
    eps,
    HAS_ROPE: tl.constexpr, HALF: tl.constexpr,  # pairs per head
    TOKENS: tl.constexpr, STAGES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // runs).to(tl.int64)
    run = tl.program_id(0) % runs
    first = run.to(tl.int64) * TOKENS
    columns = tl.arange(0, BLOCK_D)
    mask = columns < D
    pairs = table_columns(x_ptr, HALF, BLOCK_D)
    weight = load_vector(weight_ptr, columns, mask)
    x_ptr += batch * x_batch_stride
    out_ptr += batch * tokens * D
    for index in tl.range(0, min(TOKENS, tokens - run * TOKENS), num_stages=STAGES):
        token = first + index
        x = load_vector(x_ptr + token * x_token_stride, columns, mask)
        if HAS_ROPE:  # before the reduction, whose barriers would hold these loads back
            cos = tl.load(cos_ptr + token * cos_token_stride + pairs).to(tl.float32)
            sin = tl.load(sin_ptr + token * sin_token_stride + pairs).to(tl.float32)
        y = x * (inverse_rms(x, eps, D) * weight)  # in this order ptxas does not spill
        if HAS_ROPE:
            y = rotate(y, cos, sin, BLOCK_D)
        tl.store(out_ptr + token * D + columns, cast(y, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rms_norm_rope_backward_kernel(
    grad_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, dx_ptr, dweight_ptr,
    runs, tokens,
    grad_batch_stride, grad_token_stride, x_batch_stride, x_token_stride,
    cos_token_stride, sin_token_stride,
    eps,
    HAS_ROPE: tl.constexpr, HALF: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    batch = (tl.program_id(0) // runs).to(tl.int64)
    run = tl.program_id(0) % runs
    first = run.to(tl.int64) * TOKENS
    columns = tl.arange(0, BLOCK_D)
    mask = columns < D
    pairs = table_columns(x_ptr, HALF, BLOCK_D)
    weight = load_vector(weight_ptr, columns, mask)
    dweight = tl.zeros([BLOCK_D], tl.float32)
    grad_ptr += batch * grad_batch_stride
    x_ptr += batch * x_batch_stride
    dx_ptr += batch * tokens * D
    for index in tl.range(0, min(TOKENS, tokens - run * TOKENS), num_stages=STAGES):
        token = first + index
        grad = load_vector(grad_ptr + token * grad_token_stride, columns, mask)
        x = load_vector(x_ptr + token * x_token_stride, columns, mask)
        if HAS_ROPE:  # before the reduction, whose barriers would hold these loads back
            cos = tl.load(cos_ptr + token * cos_token_stride + pairs).to(tl.float32)
            sin = tl.load(sin_ptr + token * sin_token_stride + pairs).to(tl.float32)
        if HAS_ROPE:  # the transpose of a rotation turns back
            grad = rotate(grad, cos, -sin, BLOCK_D)
        g = grad * weight
        square, product = sum_pair(x * x, g * x)
        rstd = tl.rsqrt(square / D + eps)
        normal = x * rstd
        dweight += grad * normal
        dx = g * rstd - normal * (product * rstd * (rstd / D))
        tl.store(dx_ptr + token * D + columns, cast(dx, dx_ptr.dtype.element_ty), mask=mask)
    tl.store(dweight_ptr + tl.program_id(0).to(tl.int64) * D + columns, dweight, mask=mask)


def forward(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    eps: float = 1e-6,
) -> Tensor:
    """Launch the forward kernel; arguments and result as the operator."""
    x, weight = contiguous_rows(x), contiguous_rows(weight)
    b, length, d = x.shape
    out = empty(x, b, length, num_heads, d // num_heads)
    cos, sin, tables = _tables(cos, sin, weight, d // num_heads)
    options = token_options(d, tokens=FORWARD_TOKENS, elements=FEW_TENSORS, one_warp=True)
    runs = triton.cdiv(length, options["TOKENS"])
    launch(
        rms_norm_rope_forward_kernel, (b * runs,),
        x, weight, cos, sin, out,
        runs, length,
        *x.stride()[:2], cos.stride(0), sin.stride(0),
        eps,
        **tables, **options,
    )  # fmt: skip
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel; return the gradients of x and weight."""
    grad = contiguous_rows(grad.flatten(2))  # a view, unless the heads are not adjacent
    x, weight = contiguous_rows(x), contiguous_rows(weight)
    b, length, d = x.shape
    dx = empty(x)
    cos, sin, tables = _tables(cos, sin, weight, d // num_heads)
    half = x.element_size() == 2
    elements = FEW_TENSORS if half else FP32_BACKWARD
    measured = "rms_norm_rope backward" if x.dtype == torch.bfloat16 else None
    options = token_options(
        d, tokens=BACKWARD_TOKENS, elements=elements, one_warp=half, measured=measured
    )
    runs = triton.cdiv(length, options["TOKENS"])
    partial = partial_sums(x, 1, b * runs, d)
    launch(
        rms_norm_rope_backward_kernel, (b * runs,),
        grad, x, weight, cos, sin, dx, partial,
        runs, length,
        *grad.stride()[:2], *x.stride()[:2], cos.stride(0), sin.stride(0),
        eps,
        **tables, **options,
    )  # fmt: skip
    return dx, *finish_sums(partial, (weight,))


def _tables(
    cos: Tensor | None, sin: Tensor | None, unread: Tensor, head_dim: int
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Return the tables and their constexpr arguments; without tables, an unread tensor twice."""
    if cos is None or sin is None:
        return unread, unread, {"HAS_ROPE": False, "HALF": 1}
    return contiguous_rows(cos), contiguous_rows(sin), {"HAS_ROPE": True, "HALF": head_dim // 2}
