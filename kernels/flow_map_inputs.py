"""Form ``x_t = (1 - t) x0 + t noise`` and its neighbors: ``anyflow.ops.flow_map_inputs``.

The neighbors along the path are ``x_t +- epsilon (noise - x0)``.
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
from anyflow.kernels.tokens import load_vector


@triton.jit
def flow_map_inputs_forward_kernel(
    latents_ptr, noise_ptr, t_ptr, plus_ptr, minus_ptr, picked_ptr, x_t_ptr, batch_ptr,
    samples, frames, size, chunks, slots,
    latents_sample_stride, latents_frame_stride, noise_sample_stride, noise_frame_stride,
    t_sample_stride, t_frame_stride, plus_sample_stride, plus_frame_stride,
    minus_sample_stride, minus_frame_stride,
    PICKED: tl.constexpr, WITH_X_T: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    sample, frame, first, mask = chunk_of_frame(frames, size, chunks, CHUNK)
    columns = tl.arange(0, CHUNK)
    x0 = load_chunk(
        latents_ptr, sample, frame, latents_sample_stride, latents_frame_stride,
        first, columns, mask,
    )  # fmt: skip
    noise = load_chunk(
        noise_ptr, sample, frame, noise_sample_stride, noise_frame_stride,
        first, columns, mask,
    )  # fmt: skip
    t = load_time(t_ptr, sample, frame, t_sample_stride, t_frame_stride).to(tl.float32)
    plus = load_time(plus_ptr, sample, frame, plus_sample_stride, plus_frame_stride)
    plus = plus.to(tl.float32)
    minus = load_time(minus_ptr, sample, frame, minus_sample_stride, minus_frame_stride)
    minus = minus.to(tl.float32)
    x_t = (1 - t) * x0 + t * noise
    x_plus, x_minus = x_t + plus * (noise - x0), x_t - minus * (noise - x0)
    x_t_ptr += (sample * frames + frame) * size + first
    tl.store(x_t_ptr + columns, cast(x_t, x_t_ptr.dtype.element_ty), mask=mask)
    batch_ptr += frame * size + first
    if WITH_X_T:
        tl.store(batch_ptr + (2 * slots + sample) * frames * size + columns, x_t, mask=mask)
    if PICKED:
        for slot in range(slots):
            index, valid = load_index(picked_ptr, slot, samples)
            if index == sample:
                at = batch_ptr + tl.cast(slot, tl.int64) * frames * size
                tl.store(at + columns, tl.where(valid, x_plus, float("nan")), mask=mask)
                at += tl.cast(slots, tl.int64) * frames * size
                tl.store(at + columns, tl.where(valid, x_minus, float("nan")), mask=mask)
    else:
        tl.store(batch_ptr + sample * frames * size + columns, x_plus, mask=mask)
        tl.store(batch_ptr + (slots + sample) * frames * size + columns, x_minus, mask=mask)


@triton.jit
def flow_map_inputs_backward_kernel(
    grad_ptr, batch_ptr, t_ptr, plus_ptr, minus_ptr, picked_ptr, dlatents_ptr, dnoise_ptr,
    samples, frames, size, chunks, slots,
    grad_sample_stride, grad_frame_stride, batch_sample_stride, batch_frame_stride,
    t_sample_stride, t_frame_stride, plus_sample_stride, plus_frame_stride,
    minus_sample_stride, minus_frame_stride,
    PICKED: tl.constexpr, WITH_X_T: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    sample, frame, first, mask = chunk_of_frame(frames, size, chunks, CHUNK)
    columns = tl.arange(0, CHUNK)
    t = load_time(t_ptr, sample, frame, t_sample_stride, t_frame_stride).to(tl.float32)
    plus = load_time(plus_ptr, sample, frame, plus_sample_stride, plus_frame_stride)
    plus = plus.to(tl.float32)
    minus = load_time(minus_ptr, sample, frame, minus_sample_stride, minus_frame_stride)
    minus = minus.to(tl.float32)
    dx = load_chunk(
        grad_ptr, sample, frame, grad_sample_stride, grad_frame_stride, first, columns, mask
    )
    dv = tl.zeros([CHUNK], tl.float32)  # the gradient of the velocity, noise - x0
    batch_ptr += frame * batch_frame_stride + first
    if WITH_X_T:
        dx += load_vector(batch_ptr + (2 * slots + sample) * batch_sample_stride, columns, mask)
    begin, end = sample, sample + 1
    if PICKED:
        begin, end = sample * 0, sample * 0 + slots  # in the type of the other branch
    for slot in range(begin, end):
        index, valid = sample, True
        if PICKED:
            index, valid = load_index(picked_ptr, slot, samples)
        if (index == sample) & valid:
            at = batch_ptr + tl.cast(slot, tl.int64) * batch_sample_stride
            dplus = load_vector(at, columns, mask)
            at += tl.cast(slots, tl.int64) * batch_sample_stride
            dminus = load_vector(at, columns, mask)
            dx += dplus + dminus
            dv += plus * dplus - minus * dminus
    offsets = (sample * frames + frame) * size + first + columns
    tl.store(
        dlatents_ptr + offsets, cast((1 - t) * dx - dv, dlatents_ptr.dtype.element_ty), mask=mask
    )
    tl.store(dnoise_ptr + offsets, cast(t * dx + dv, dnoise_ptr.dtype.element_ty), mask=mask)


def forward(
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    epsilon_plus: Tensor,
    epsilon_minus: Tensor,
    picked: Tensor | None,
    dtype: torch.dtype,
    with_x_t: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel; arguments and results as the operator."""
    latents, noise = contiguous_frames(latents), contiguous_frames(noise)
    samples, slots = latents.shape[0], (latents if picked is None else picked).shape[0]
    x_t = empty(latents, dtype=dtype)
    total = 2 * slots + (samples if with_x_t else 0)
    batch = empty(latents, total, *latents.shape[1:], dtype=torch.float32)
    frames, size, chunks = frame_count(latents)
    launch(
        flow_map_inputs_forward_kernel, (samples * frames * chunks,),
        latents, noise, t, epsilon_plus, epsilon_minus,
        t if picked is None else picked.contiguous(), x_t, batch,
        samples, frames, size, chunks, slots,
        *latents.stride()[:2], *noise.stride()[:2],
        *time_strides(t), *time_strides(epsilon_plus), *time_strides(epsilon_minus),
        PICKED=picked is not None, WITH_X_T=with_x_t, **CHUNK_OPTIONS,
    )  # fmt: skip
    return x_t, batch


def backward(
    grad: Tensor,
    grad_batch: Tensor,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    epsilon_plus: Tensor,
    epsilon_minus: Tensor,
    picked: Tensor | None,
    with_x_t: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel; return the gradients of latents and noise."""
    grad, grad_batch = contiguous_frames(grad), contiguous_frames(grad_batch)
    samples, slots = grad.shape[0], (grad if picked is None else picked).shape[0]
    dlatents, dnoise = empty(latents), empty(noise)
    frames, size, chunks = frame_count(grad)
    launch(
        flow_map_inputs_backward_kernel, (samples * frames * chunks,),
        grad, grad_batch, t, epsilon_plus, epsilon_minus,
        t if picked is None else picked.contiguous(), dlatents, dnoise,
        samples, frames, size, chunks, slots,
        *grad.stride()[:2], *grad_batch.stride()[:2],
        *time_strides(t), *time_strides(epsilon_plus), *time_strides(epsilon_minus),
        PICKED=picked is not None, WITH_X_T=with_x_t, **CHUNK_OPTIONS,
    )  # fmt: skip
    return dlatents, dnoise
