"""Compute ``LN(x) * (1 + scale) + shift``: ``anyflow.ops.layer_norm_modulate``.

One modulation row, of shift and scale each, serves the tokens of a sample or of a frame.
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
from anyflow.kernels.tokens import (
    load_modulation,
    load_vector,
    standardize,
    standardize_with_gradient,
)


@triton.jit
def layer_norm_modulate_forward_kernel(
    x_ptr, shift_ptr, scale_ptr, out_ptr,
    runs, rows, tokens,  # per modulation row; per sample; per modulation row
    x_batch_stride, x_token_stride,
    shift_batch_stride, shift_row_stride, scale_batch_stride, scale_row_stride,
    eps,
    TOKENS: tl.constexpr, STAGES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0) % runs
    row = (tl.program_id(0) // runs).to(tl.int64)  # over samples and their modulation rows
    batch, index, first = row // rows, row % rows, run * TOKENS
    columns = tl.arange(0, BLOCK_D)
    mask = columns < D
    shift = load_modulation(
        shift_ptr, batch, index, shift_batch_stride, shift_row_stride, columns, mask
    )
    scale = 1.0 + load_modulation(
        scale_ptr, batch, index, scale_batch_stride, scale_row_stride, columns, mask
    )
    x_ptr += batch * x_batch_stride + (index * tokens + first) * x_token_stride
    out_ptr += (row * tokens + first) * D
    for _ in tl.range(0, min(TOKENS, tokens - first), num_stages=STAGES):
        normal = standardize(load_vector(x_ptr, columns, mask), mask, eps, D)
        tl.store(
            out_ptr + columns, cast(normal * scale + shift, out_ptr.dtype.element_ty), mask=mask
        )
        x_ptr += x_token_stride
        out_ptr += D


@triton.jit
def layer_norm_modulate_backward_kernel(
    grad_ptr, x_ptr, scale_ptr, dx_ptr, dshift_ptr, dscale_ptr,
    runs, rows, tokens,
    grad_batch_stride, grad_token_stride, x_batch_stride, x_token_stride,
    scale_batch_stride, scale_row_stride,
    eps,
    TOKENS: tl.constexpr, STAGES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0) % runs
    row = (tl.program_id(0) // runs).to(tl.int64)
    batch, index, first = row // rows, row % rows, run * TOKENS
    columns = tl.arange(0, BLOCK_D)
    mask = columns < D
    scale = 1.0 + load_modulation(
        scale_ptr, batch, index, scale_batch_stride, scale_row_stride, columns, mask
    )
    dshift = tl.zeros([BLOCK_D], tl.float32)
    dscale = tl.zeros([BLOCK_D], tl.float32)
    grad_ptr += batch * grad_batch_stride + (index * tokens + first) * grad_token_stride
    x_ptr += batch * x_batch_stride + (index * tokens + first) * x_token_stride
    dx_ptr += (row * tokens + first) * D
    for _ in tl.range(0, min(TOKENS, tokens - first), num_stages=STAGES):
        grad = load_vector(grad_ptr, columns, mask)
        x = load_vector(x_ptr, columns, mask)
        normal, dx = standardize_with_gradient(x, grad * scale, mask, eps, D)
        dshift += grad
        dscale += grad * normal
        tl.store(dx_ptr + columns, cast(dx, dx_ptr.dtype.element_ty), mask=mask)
        grad_ptr += grad_token_stride
        x_ptr += x_token_stride
        dx_ptr += D
    partial = tl.program_id(0).to(tl.int64) * D + columns
    tl.store(dshift_ptr + partial, dshift, mask=mask)
    tl.store(dscale_ptr + partial, dscale, mask=mask)


def forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Launch the forward kernel; arguments and result as the operator."""
    x, shift, scale = contiguous_rows(x), contiguous_rows(shift), contiguous_rows(scale)
    (b, length, d), rows = x.shape, shift.shape[1]
    out = empty(x)
    options = token_options(d, tokens=FORWARD_TOKENS, elements=FEW_TENSORS, stages=3)
    runs = triton.cdiv(length // rows, options["TOKENS"])
    launch(
        layer_norm_modulate_forward_kernel, (b * rows * runs,),
        x, shift, scale, out,
        runs, rows, length // rows,
        *x.stride()[:2], *shift.stride()[:2], *scale.stride()[:2],
        eps,
        **options,
    )  # fmt: skip
    return out


def backward(
    grad: Tensor, x: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernel; return the gradients of x, shift and scale."""
    grad, x, scale = contiguous_rows(grad), contiguous_rows(x), contiguous_rows(scale)
    (b, length, d), rows = x.shape, scale.shape[1]
    dx = empty(x)
    half = x.element_size() == 2
    elements = FEW_TENSORS if half else FP32_BACKWARD
    measured = "layer_norm_modulate backward" if x.dtype == torch.bfloat16 else None
    options = token_options(
        d, tokens=BACKWARD_TOKENS, elements=elements, one_warp=half, measured=measured
    )
    runs = triton.cdiv(length // rows, options["TOKENS"])
    partial = partial_sums(x, 2, b * rows * runs, d)
    launch(
        layer_norm_modulate_backward_kernel, (b * rows * runs,),
        grad, x, scale, dx, *partial,
        runs, rows, length // rows,
        *grad.stride()[:2], *x.stride()[:2], *scale.stride()[:2],
        eps,
        **options,
    )  # fmt: skip
    return dx, *finish_sums(partial, (shift, scale))
