"""Compute the flow-map regression loss per sample: ``anyflow.ops.flow_map_loss``.

The loss is the weighted squared error of a prediction against the central-difference target.
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
    load_chunk,
    load_index,
    load_time,
    time_strides,
)
from anyflow.kernels.launch import empty, launch
from anyflow.kernels.numerics import cast


@triton.jit
def flow_map_loss_forward_kernel(
    pred_ptr, uncond_ptr, plus_ptr, minus_ptr, latents_ptr, noise_ptr,
    t_ptr, r_ptr, weight_ptr, width_ptr, picked_ptr, partial_ptr, residual_ptr,
    samples, frames, size, chunks, slots,
    pred_sample_stride, pred_frame_stride, uncond_sample_stride, uncond_frame_stride,
    plus_slot_stride, plus_frame_stride, minus_slot_stride, minus_frame_stride,
    latents_sample_stride, latents_frame_stride, noise_sample_stride, noise_frame_stride,
    t_sample_stride, t_frame_stride, r_sample_stride, r_frame_stride,
    weight_sample_stride, weight_frame_stride, width_slot_stride, width_frame_stride,
    guidance, rest, inverse,  # g, 1 - g, 1 / g
    GUIDED: tl.constexpr, SIDES: tl.constexpr, PICKED: tl.constexpr, NEED_GRAD: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    sample, frame, first, mask = chunk_of_frame(frames, size, chunks, CHUNK)
    columns = tl.arange(0, CHUNK)
    residual = load_chunk(
        pred_ptr, sample, frame, pred_sample_stride, pred_frame_stride, first, columns, mask
    )
    if GUIDED:
        uncond = load_chunk(
            uncond_ptr, sample, frame, uncond_sample_stride, uncond_frame_stride,
            first, columns, mask,
        )  # fmt: skip
        residual = (residual - rest * uncond) * inverse
    noise = load_chunk(
        noise_ptr, sample, frame, noise_sample_stride, noise_frame_stride, first, columns, mask
    )
    residual -= noise - load_chunk(
        latents_ptr, sample, frame, latents_sample_stride, latents_frame_stride,
        first, columns, mask,
    )  # fmt: skip
    if SIDES:
        t = load_time(t_ptr, sample, frame, t_sample_stride, t_frame_stride)
        r = load_time(r_ptr, sample, frame, r_sample_stride, r_frame_stride)
        interval = (t - r).to(tl.float32)  # t - r in their own dtype: in fp32 it could cancel
        begin, end = sample, sample + 1
        if PICKED:
            begin, end = sample * 0, sample * 0 + slots  # in the type of the other branch
        for slot in range(begin, end):
            at, index, valid = tl.cast(slot, tl.int64), sample, True
            if PICKED:
                index, valid = load_index(picked_ptr, slot, samples)
            if index == sample:
                width = load_time(width_ptr, at, frame, width_slot_stride, width_frame_stride)
                divisor = width.to(tl.float32) * guidance
                plus = load_chunk(
                    plus_ptr, at, frame, plus_slot_stride, plus_frame_stride, first, columns, mask
                )
                minus = load_chunk(
                    minus_ptr, at, frame, minus_slot_stride, minus_frame_stride,
                    first, columns, mask,
                )  # fmt: skip
                residual += (plus - minus) * tl.where(valid, interval / divisor, float("nan"))
    residual = tl.where(mask, residual, 0.0)
    weight = load_time(weight_ptr, sample, frame, weight_sample_stride, weight_frame_stride)
    weight = weight.to(tl.float32)
    tl.store(partial_ptr + tl.program_id(0), tl.sum(residual * residual, 0) * weight)
    if NEED_GRAD:
        residual_ptr += (sample * frames + frame) * size + first
        tl.store(residual_ptr + columns, cast(residual, residual_ptr.dtype.element_ty), mask=mask)


@triton.jit
def flow_map_loss_backward_kernel(
    grad_ptr, residual_ptr, weight_ptr, out_ptr,
    frames, size, chunks,
    grad_sample_stride, weight_sample_stride, weight_frame_stride,
    factor,
    CHUNK: tl.constexpr,
):  # fmt: skip
    sample, frame, first, mask = chunk_of_frame(frames, size, chunks, CHUNK)
    offsets = (sample * frames + frame) * size + first + tl.arange(0, CHUNK)
    grad = tl.load(grad_ptr + sample * grad_sample_stride).to(tl.float32)
    weight = load_time(weight_ptr, sample, frame, weight_sample_stride, weight_frame_stride)
    weight = weight.to(tl.float32)
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
    width: Tensor,
    picked: Tensor | None,
    guidance: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel; arguments and results as the operator."""
    # pred stands in for an absent tensor, which the kernel does not read
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
        *tensors, t, r, weight, width, t if picked is None else picked.contiguous(),
        partial, residual,
        samples, frames, size, chunks, slots,
        *(stride for x in tensors for stride in x.stride()[:2]),
        *time_strides(t), *time_strides(r), *time_strides(weight), *time_strides(width),
        guidance, 1 - guidance, 1 / guidance,
        GUIDED=uncond is not None, SIDES=u_plus is not None and slots > 0,
        PICKED=picked is not None, NEED_GRAD=need_grad, **CHUNK_OPTIONS,
    )  # fmt: skip
    return partial.sum(1) / (frames * size), residual


def backward(grad: Tensor, residual: Tensor, weight: Tensor, guidance: float) -> Tensor:
    """Launch the backward kernel; return the gradient of pred.

    The kernel makes one pass over the residual, in its own dtype. As torch operations the same is
    several launches for the factors, and in half precision a second pass that rounds the fp32
    product.
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
