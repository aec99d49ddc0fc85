"""Weighted squared error against the central-difference target, per sample:
``anyflow.ops.flow_map_loss``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from anyflow.kernels.frames import (
    CHUNK_OPTIONS,
    chunk_of_frame,
    contiguous_frames,
    frame_count,
    load_index,
    load_time,
    time_strides,
)
from anyflow.kernels.launch import empty, launch
from anyflow.kernels.numerics import cast
from anyflow.kernels.rows import load_row


@triton.jit
def flow_map_loss_forward_kernel(
    pred_ptr, uncond_ptr, plus_ptr, minus_ptr, latents_ptr, noise_ptr,
    t_ptr, r_ptr, weight_ptr, step_ptr, rows_ptr, partial_ptr, residual_ptr,
    samples, frames, size, chunks, slots,
    # strides
    pred_sample, pred_frame, uncond_sample, uncond_frame, plus_sample, plus_frame, minus_sample,
    minus_frame,
    latents_sample, latents_frame, noise_sample, noise_frame,
    t_sample, t_frame, r_sample, r_frame, weight_sample, weight_frame, step_slot, step_frame,
    guidance, rest, inverse,  # g, 1 - g, 1 / g
    GUIDED: tl.constexpr, SIDES: tl.constexpr, ROWS: tl.constexpr, NEED_GRAD: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    sample, frame, first, mask = chunk_of_frame(frames, size, chunks, CHUNK)
    columns = tl.arange(0, CHUNK)
    residual = load_row(pred_ptr + sample * pred_sample + frame * pred_frame + first, columns, mask)
    if GUIDED:
        uncond = load_row(
            uncond_ptr + sample * uncond_sample + frame * uncond_frame + first, columns, mask
        )
        residual = (residual - rest * uncond) * inverse
    residual -= load_row(
        noise_ptr + sample * noise_sample + frame * noise_frame + first, columns, mask
    ) - load_row(
        latents_ptr + sample * latents_sample + frame * latents_frame + first, columns, mask
    )
    if SIDES:
        t = load_time(t_ptr, sample, frame, t_sample, t_frame)
        interval = (t - load_time(r_ptr, sample, frame, r_sample, r_frame)).to(tl.float32)
        begin, end = sample, sample + 1
        if ROWS:
            begin, end = sample * 0, sample * 0 + slots
        for slot in range(begin, end):
            at, index, valid = tl.cast(slot, tl.int64), sample, True
            if ROWS:
                index, valid = load_index(rows_ptr, slot, samples)
            if index == sample:
                width = (
                    load_time(step_ptr, at, frame, step_slot, step_frame).to(tl.float32) * guidance
                )
                plus = load_row(
                    plus_ptr + at * plus_sample + frame * plus_frame + first, columns, mask
                )
                minus = load_row(
                    minus_ptr + at * minus_sample + frame * minus_frame + first, columns, mask
                )
                residual += (plus - minus) * tl.where(valid, interval / width, float("nan"))
    residual = tl.where(mask, residual, 0.0)
    weight = load_time(weight_ptr, sample, frame, weight_sample, weight_frame).to(tl.float32)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(residual * residual, 0) * weight)
    if NEED_GRAD:
        residual_ptr += (sample * frames + frame) * size + first
        tl.store(residual_ptr + columns, cast(residual, residual_ptr.dtype.element_ty), mask=mask)


@triton.jit
def flow_map_loss_backward_kernel(
    grad_ptr, residual_ptr, weight_ptr, out_ptr,
    frames, size, chunks,
    grad_sample, weight_sample, weight_frame,
    factor,
    CHUNK: tl.constexpr,
):  # fmt: skip
    sample, frame, first, mask = chunk_of_frame(frames, size, chunks, CHUNK)
    offsets = (sample * frames + frame) * size + first + tl.arange(0, CHUNK)
    grad = tl.load(grad_ptr + sample * grad_sample).to(tl.float32)
    weight = load_time(weight_ptr, sample, frame, weight_sample, weight_frame).to(tl.float32)
    residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + offsets,
        cast(residual * (grad * weight * factor), out_ptr.dtype.element_ty),
        mask=mask,
    )


def forward(
    pred: Tensor,
    uncond: Tensor | None,
    u_plus: Tensor | None,
    u_minus: Tensor | None,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    r: Tensor,
    weight: Tensor,
    step: Tensor,
    rows: Tensor | None,
    guidance: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel; arguments and results as the operator."""
    tensors = [
        contiguous_frames(pred if x is None else x)
        for x in (pred, uncond, u_plus, u_minus, latents, noise)
    ]
    samples, slots = pred.shape[0], tensors[2].shape[0]
    frames, size, chunks = frame_count(pred)
    partial = empty(pred, samples, frames * chunks, dtype=torch.float32)
    residual = empty(pred) if need_grad else empty(pred, 0)
    launch(
        flow_map_loss_forward_kernel, (samples * frames * chunks,),
        *tensors, t, r, weight, step, t if rows is None else rows.contiguous(), partial, residual,
        samples, frames, size, chunks, slots,
        *(stride for x in tensors for stride in x.stride()[:2]),
        *time_strides(t), *time_strides(r), *time_strides(weight), *time_strides(step),
        guidance, 1 - guidance, 1 / guidance,
        GUIDED=uncond is not None, SIDES=u_plus is not None and slots > 0, ROWS=rows is not None,
        NEED_GRAD=need_grad,
        **CHUNK_OPTIONS,
    )  # fmt: skip
    return partial.sum(1) / (frames * size), residual


def backward(grad: Tensor, residual: Tensor, weight: Tensor, guidance: float) -> Tensor:
    """Launch the backward kernel; returns the gradient of pred.

    A kernel, because that is one pass over the residual in its own dtype and nothing else: as torch
    operations it is a few launches for the factors, and for half precision a second pass that
    rounds the fp32 product.
    """
    residual = residual.contiguous()
    out = empty(residual)
    frames, size, chunks = frame_count(residual)
    launch(
        flow_map_loss_backward_kernel, (residual.shape[0] * frames * chunks,),
        grad, residual, weight, out,
        frames, size, chunks,
        grad.stride(0), *time_strides(weight),
        2 / (max(frames * size, 1) * guidance),
        **CHUNK_OPTIONS,
    )  # fmt: skip
    return out
