"""Compute ``x + y * gate``, one gate row per sample or frame: ``anyflow.ops.gated_residual``.

The operator is element-wise, and still a kernel over tokens like the others: a program reads the
gate once per run of tokens instead of once per token, needs no index arithmetic per element, and
keeps the gradient of the gate, a sum over tokens, in registers.
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
    FORWARD_TOKENS,
    MANY_TENSORS,
    token_options,
)
from anyflow.kernels.token_sums import finish_sums, partial_sums
from anyflow.kernels.tokens import load_modulation, load_vector


@triton.jit
def gated_residual_forward_kernel(
    x_ptr, y_ptr, gate_ptr, out_ptr,
    runs, rows, tokens,  # per gate row; per sample; per gate row
    x_batch_stride, x_token_stride, y_batch_stride, y_token_stride,
    gate_batch_stride, gate_row_stride,
    TOKENS: tl.constexpr, STAGES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0) % runs
    row = (tl.program_id(0) // runs).to(tl.int64)  # over samples and their gate rows
    batch, index, first = row // rows, row % rows, run * TOKENS
    columns = tl.arange(0, BLOCK_D)
    mask = columns < D
    gate = load_modulation(
        gate_ptr, batch, index, gate_batch_stride, gate_row_stride, columns, mask
    )
    x_ptr += batch * x_batch_stride + (index * tokens + first) * x_token_stride
    y_ptr += batch * y_batch_stride + (index * tokens + first) * y_token_stride
    out_ptr += (row * tokens + first) * D
    for _ in tl.range(0, min(TOKENS, tokens - first), num_stages=STAGES):
        out = load_vector(x_ptr, columns, mask) + load_vector(y_ptr, columns, mask) * gate
        tl.store(out_ptr + columns, cast(out, out_ptr.dtype.element_ty), mask=mask)
        x_ptr += x_token_stride
        y_ptr += y_token_stride
        out_ptr += D


@triton.jit
def gated_residual_backward_kernel(
    grad_ptr, y_ptr, gate_ptr, dy_ptr, dgate_ptr,
    runs, rows, tokens,
    grad_batch_stride, grad_token_stride, y_batch_stride, y_token_stride,
    gate_batch_stride, gate_row_stride,
    TOKENS: tl.constexpr, STAGES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0) % runs
    row = (tl.program_id(0) // runs).to(tl.int64)
    batch, index, first = row // rows, row % rows, run * TOKENS
    columns = tl.arange(0, BLOCK_D)
    mask = columns < D
    gate = load_modulation(
        gate_ptr, batch, index, gate_batch_stride, gate_row_stride, columns, mask
    )
    dgate = tl.zeros([BLOCK_D], tl.float32)
    grad_ptr += batch * grad_batch_stride + (index * tokens + first) * grad_token_stride
    y_ptr += batch * y_batch_stride + (index * tokens + first) * y_token_stride
    dy_ptr += (row * tokens + first) * D
    for _ in tl.range(0, min(TOKENS, tokens - first), num_stages=STAGES):
        grad = load_vector(grad_ptr, columns, mask)
        y = load_vector(y_ptr, columns, mask)
        tl.store(dy_ptr + columns, cast(grad * gate, dy_ptr.dtype.element_ty), mask=mask)
        dgate += grad * y
        grad_ptr += grad_token_stride
        y_ptr += y_token_stride
        dy_ptr += D
    tl.store(dgate_ptr + tl.program_id(0).to(tl.int64) * D + columns, dgate, mask=mask)


def forward(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Launch the forward kernel; arguments and result as the operator."""
    x, y, gate = contiguous_rows(x), contiguous_rows(y), contiguous_rows(gate)
    (b, length, d), rows = x.shape, gate.shape[1]
    out = empty(x)
    measured = "gated_residual forward" if x.dtype == torch.bfloat16 else None
    options = token_options(d, tokens=FORWARD_TOKENS, elements=MANY_TENSORS, measured=measured)
    runs = triton.cdiv(length // rows, options["TOKENS"])
    launch(
        gated_residual_forward_kernel, (b * rows * runs,),
        x, y, gate, out,
        runs, rows, length // rows,
        *x.stride()[:2], *y.stride()[:2], *gate.stride()[:2],
        **options,
    )  # fmt: skip
    return out


def backward(grad: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel; return the gradients of y and gate."""
    grad, y, gate = contiguous_rows(grad), contiguous_rows(y), contiguous_rows(gate)
    (b, length, d), rows = y.shape, gate.shape[1]
    dy = empty(y)
    measured = "gated_residual backward" if y.dtype == torch.bfloat16 else None
    options = token_options(d, tokens=BACKWARD_TOKENS, elements=MANY_TENSORS, measured=measured)
    runs = triton.cdiv(length // rows, options["TOKENS"])
    partial = partial_sums(y, 1, b * rows * runs, d)
    launch(
        gated_residual_backward_kernel, (b * rows * runs,),
        grad, y, gate, dy, partial,
        runs, rows, length // rows,
        *grad.stride()[:2], *y.stride()[:2], *gate.stride()[:2],
        **options,
    )  # fmt: skip
    return dy, *finish_sums(partial, (gate,))
