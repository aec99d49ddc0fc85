"""Compute ``h = x + y * gate`` and ``n = LN(h)``: ``anyflow.ops.residual_layer_norm``.

The norm has an affine, a modulation or neither. To the kernels an affine is a modulation whose one
row all samples share (strides of 0) and that does not count from 1: ``n = LN(h) * scale + shift``
with ``scale = weight`` or ``1 + scale``. The kernels never read or write an absent operand: its
flag is off, and another tensor stands in for its pointer.
"""

from __future__ import annotations

import math

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
    MANY_TENSORS,
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
def residual_layer_norm_forward_kernel(
    x_ptr, y_ptr, gate_ptr, scale_ptr, shift_ptr, h_ptr, n_ptr,
    runs, rows, tokens,  # per modulation row; per sample; per modulation row
    x_batch_stride, x_token_stride, y_batch_stride, y_token_stride,
    gate_batch_stride, gate_row_stride, scale_batch_stride, scale_row_stride,
    shift_batch_stride, shift_row_stride,
    eps,
    HAS_GATE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0) % runs
    row = (tl.program_id(0) // runs).to(tl.int64)  # over samples and their modulation rows
    batch, index, first = row // rows, row % rows, run * TOKENS
    columns = tl.arange(0, BLOCK_D)
    mask = columns < D
    if HAS_GATE:
        gate = load_modulation(
            gate_ptr, batch, index, gate_batch_stride, gate_row_stride, columns, mask
        )
    if HAS_SCALE:
        scale = load_modulation(
            scale_ptr, batch, index, scale_batch_stride, scale_row_stride, columns, mask
        )
        if ONE_PLUS:
            scale += 1.0
    if HAS_SHIFT:
        shift = load_modulation(
            shift_ptr, batch, index, shift_batch_stride, shift_row_stride, columns, mask
        )
    x_ptr += batch * x_batch_stride + (index * tokens + first) * x_token_stride
    y_ptr += batch * y_batch_stride + (index * tokens + first) * y_token_stride
    h_ptr += (row * tokens + first) * D
    n_ptr += (row * tokens + first) * D
    for _ in tl.range(0, min(TOKENS, tokens - first), num_stages=STAGES):
        x = load_vector(x_ptr, columns, mask)
        y = load_vector(y_ptr, columns, mask)
        if HAS_GATE:
            y *= gate
        h = cast(x + y, h_ptr.dtype.element_ty)
        tl.store(h_ptr + columns, h, mask=mask)
        n = standardize(h.to(tl.float32), mask, eps, D)  # the norm of what was returned
        if HAS_SCALE:
            n *= scale
        if HAS_SHIFT:
            n += shift
        tl.store(n_ptr + columns, cast(n, n_ptr.dtype.element_ty), mask=mask)
        x_ptr += x_token_stride
        y_ptr += y_token_stride
        h_ptr += D
        n_ptr += D


@triton.jit
def residual_layer_norm_backward_kernel(
    dh_ptr, dn_ptr, y_ptr, h_ptr, gate_ptr, scale_ptr,
    dx_ptr, dy_ptr, dgate_ptr, dscale_ptr, dshift_ptr,
    runs, rows, tokens,
    dh_batch_stride, dh_token_stride, dn_batch_stride, dn_token_stride,
    y_batch_stride, y_token_stride, h_batch_stride, h_token_stride,
    gate_batch_stride, gate_row_stride, scale_batch_stride, scale_row_stride,
    eps,
    HAS_DH: tl.constexpr, HAS_DY: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, ONE_PLUS: tl.constexpr,
    TOKENS: tl.constexpr, STAGES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    run = tl.program_id(0) % runs
    row = (tl.program_id(0) // runs).to(tl.int64)
    batch, index, first = row // rows, row % rows, run * TOKENS
    columns = tl.arange(0, BLOCK_D)
    mask = columns < D
    if HAS_GATE:
        gate = load_modulation(
            gate_ptr, batch, index, gate_batch_stride, gate_row_stride, columns, mask
        )
    if HAS_SCALE:
        scale = load_modulation(
            scale_ptr, batch, index, scale_batch_stride, scale_row_stride, columns, mask
        )
        if ONE_PLUS:
            scale += 1.0
    dgate = tl.zeros([BLOCK_D], tl.float32)
    dscale = tl.zeros([BLOCK_D], tl.float32)
    dshift = tl.zeros([BLOCK_D], tl.float32)
    dh_ptr += batch * dh_batch_stride + (index * tokens + first) * dh_token_stride
    dn_ptr += batch * dn_batch_stride + (index * tokens + first) * dn_token_stride
    y_ptr += batch * y_batch_stride + (index * tokens + first) * y_token_stride
    h_ptr += batch * h_batch_stride + (index * tokens + first) * h_token_stride
    dx_ptr += (row * tokens + first) * D
    dy_ptr += (row * tokens + first) * D
    for _ in tl.range(0, min(TOKENS, tokens - first), num_stages=STAGES):
        dn = load_vector(dn_ptr, columns, mask)
        h = load_vector(h_ptr, columns, mask)
        if HAS_DH:  # all loads come before the reductions, which would hold them back
            dh = load_vector(dh_ptr, columns, mask)
        if HAS_GATE:
            y = load_vector(y_ptr, columns, mask)
        g = dn
        if HAS_SCALE:
            g *= scale
        normal, dx = standardize_with_gradient(h, g, mask, eps, D)
        if HAS_SHIFT:
            dshift += dn
        if HAS_SCALE:
            dscale += dn * normal
        if HAS_DH:
            dx += dh
        tl.store(dx_ptr + columns, cast(dx, dx_ptr.dtype.element_ty), mask=mask)
        if HAS_GATE:
            dgate += dx * y
            dx *= gate
        if HAS_DY:
            tl.store(dy_ptr + columns, cast(dx, dy_ptr.dtype.element_ty), mask=mask)
        dh_ptr += dh_token_stride
        dn_ptr += dn_token_stride
        y_ptr += y_token_stride
        h_ptr += h_token_stride
        dx_ptr += D
        dy_ptr += D
    partial = tl.program_id(0).to(tl.int64) * D + columns
    if HAS_GATE:
        tl.store(dgate_ptr + partial, dgate, mask=mask)
    if HAS_SCALE:
        tl.store(dscale_ptr + partial, dscale, mask=mask)
    if HAS_SHIFT:
        tl.store(dshift_ptr + partial, dshift, mask=mask)


def forward(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel; arguments and results as the operator."""
    x, y = contiguous_rows(x), contiguous_rows(y)
    (b, length, d), rows = x.shape, _common_rows(gate, scale)
    g = _rows(gate, b, rows)
    a = _rows(weight if scale is None else scale, b, rows)
    c = _rows(bias if shift is None else shift, b, rows)
    h, n = empty(x), empty(x)
    measured = "residual_layer_norm forward" if gate is None and x.dtype == torch.bfloat16 else None
    elements = FEW_TENSORS if gate is None else MANY_TENSORS
    options = token_options(d, tokens=FORWARD_TOKENS, elements=elements, measured=measured)
    runs = triton.cdiv(length // rows, options["TOKENS"])
    launch(
        residual_layer_norm_forward_kernel, (b * rows * runs,),
        x, y, _or(g, x), _or(a, x), _or(c, x), h, n,
        runs, rows, length // rows,
        *x.stride()[:2], *y.stride()[:2], *_strides(g), *_strides(a), *_strides(c),
        eps,
        HAS_GATE=g is not None, HAS_SCALE=a is not None, HAS_SHIFT=c is not None,
        ONE_PLUS=scale is not None,
        **options,
    )  # fmt: skip
    return h, n


def backward(
    dh: Tensor | None,
    dn: Tensor,
    y: Tensor | None,
    h: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """Launch the backward kernel; return the gradients of all seven tensors of the forward.

    The gradient of an absent tensor is empty. y is absent where its gradient is that of x.
    """
    h, dn = contiguous_rows(h), contiguous_rows(dn)
    dh, z = (None if t is None else contiguous_rows(t) for t in (dh, y))
    (b, length, d), rows = h.shape, _common_rows(gate, scale)
    g, a = _rows(gate, b, rows), _rows(weight if scale is None else scale, b, rows)
    # more tensors, or wider ones, would spill
    stages = 3 if gate is None and h.element_size() == 2 else 1
    measured = None
    if h.dtype == torch.bfloat16 and (gate is None or scale is None):
        measured = (
            "residual_layer_norm backward" if gate is None else "residual_layer_norm backward, gate"
        )
    options = token_options(
        d, tokens=BACKWARD_TOKENS, elements=MANY_TENSORS, stages=stages, measured=measured
    )
    runs = triton.cdiv(length // rows, options["TOKENS"])
    dx, dy = empty(h), None if y is None else empty(y)
    parameters = (gate, weight, bias, shift, scale)
    summed = [t for t in parameters if t is not None]
    partial = partial_sums(h, len(summed), b * rows * runs, d)
    unfinished = iter(partial)
    dgate, dweight, dbias, dshift, dscale = (
        None if t is None else next(unfinished) for t in parameters
    )
    launch(
        residual_layer_norm_backward_kernel, (b * rows * runs,),
        _or(dh, h), dn, _or(z, h), h, _or(g, h), _or(a, h),
        dx, _or(dy, dx), _or(dgate, dx), _or(dweight, _or(dscale, dx)), _or(dbias, _or(dshift, dx)),
        runs, rows, length // rows,
        *_strides(dh), *dn.stride()[:2], *_strides(z), *h.stride()[:2], *_strides(g), *_strides(a),
        eps,
        HAS_DH=dh is not None, HAS_DY=dy is not None, HAS_GATE=g is not None,
        HAS_SCALE=a is not None, HAS_SHIFT=bias is not None or shift is not None,
        ONE_PLUS=scale is not None,
        **options,
    )  # fmt: skip
    finished = iter(finish_sums(partial, summed) if summed else ())
    return (
        dx,
        empty(h, 0) if dy is None else dy,
        *(empty(h, 0) if t is None else next(finished) for t in parameters),
    )


def _common_rows(gate: Tensor | None, scale: Tensor | None) -> int:
    """Return the rows per sample that serve gate and modulation alike; 1 without either."""
    return math.lcm(*(t.shape[1] for t in (gate, scale) if t is not None))


def _rows(t: Tensor | None, b: int, rows: int) -> Tensor | None:
    """Expand ``[B, R, D]``, or an affine ``[D]``, to ``[B, rows, D]``: a view or a small copy."""
    if t is None:
        return None
    t = contiguous_rows(t)
    if t.ndim == 1:
        return t.expand(b, rows, -1)
    repeats = rows // t.shape[1]
    # R = 1: a view
    return t if repeats == 1 else t.unsqueeze(2).expand(-1, -1, repeats, -1).flatten(1, 2)


def _or(t: Tensor | None, stand_in: Tensor) -> Tensor:
    """Return the tensor, or another one that stands in for an absent tensor."""
    return stand_in if t is None else t


def _strides(t: Tensor | None) -> tuple[int, int]:
    """Return the strides of samples and rows; zeros for an absent tensor."""
    return (0, 0) if t is None else t.stride()[:2]
