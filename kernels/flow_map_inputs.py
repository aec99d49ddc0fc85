"""``x_t = (1 - t) x0 + t eps`` and ``x_t +- epsilon (eps - x0)``:
``anyflow.ops.flow_map_inputs``.
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
def flow_map_inputs_forward_kernel(
    latents_ptr, noise_ptr, t_ptr, plus_ptr, minus_ptr, rows_ptr, x_t_ptr, batch_ptr,
    samples, frames, size, chunks, slots,
    latents_sample, latents_frame, noise_sample, noise_frame,  # strides
    t_sample, t_frame, plus_sample, plus_frame, minus_sample, minus_frame,
    ROWS: tl.constexpr, WITH_X_T: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    sample, frame, first, mask = chunk_of_frame(frames, size, chunks, CHUNK)
    columns = tl.arange(0, CHUNK)
    x0 = load_row(
        latents_ptr + sample * latents_sample + frame * latents_frame + first, columns, mask
    )
    noise = load_row(noise_ptr + sample * noise_sample + frame * noise_frame + first, columns, mask)
    t = load_time(t_ptr, sample, frame, t_sample, t_frame).to(tl.float32)
    plus = load_time(plus_ptr, sample, frame, plus_sample, plus_frame).to(tl.float32)
    minus = load_time(minus_ptr, sample, frame, minus_sample, minus_frame).to(tl.float32)
    x_t = (1 - t) * x0 + t * noise
    x_plus, x_minus = x_t + plus * (noise - x0), x_t - minus * (noise - x0)
    x_t_ptr += (sample * frames + frame) * size + first
    tl.store(x_t_ptr + columns, cast(x_t, x_t_ptr.dtype.element_ty), mask=mask)
    batch_ptr += frame * size + first
    if WITH_X_T:
        tl.store(batch_ptr + (2 * slots + sample) * frames * size + columns, x_t, mask=mask)
    if ROWS:
        for slot in range(slots):
            index, valid = load_index(rows_ptr, slot, samples)
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
    grad_ptr, batch_ptr, t_ptr, plus_ptr, minus_ptr, rows_ptr, dlatents_ptr, dnoise_ptr,
    samples, frames, size, chunks, slots,
    grad_sample, grad_frame, batch_sample, batch_frame,
    t_sample, t_frame, plus_sample, plus_frame, minus_sample, minus_frame,
    ROWS: tl.constexpr, WITH_X_T: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    sample, frame, first, mask = chunk_of_frame(frames, size, chunks, CHUNK)
    columns = tl.arange(0, CHUNK)
    t = load_time(t_ptr, sample, frame, t_sample, t_frame).to(tl.float32)
    plus = load_time(plus_ptr, sample, frame, plus_sample, plus_frame).to(tl.float32)
    minus = load_time(minus_ptr, sample, frame, minus_sample, minus_frame).to(tl.float32)
    dx = load_row(grad_ptr + sample * grad_sample + frame * grad_frame + first, columns, mask)
    dv = tl.zeros([CHUNK], tl.float32)
    batch_ptr += frame * batch_frame + first
    if WITH_X_T:
        dx += load_row(batch_ptr + (2 * slots + sample) * batch_sample, columns, mask)
    begin, end = sample, sample + 1
    if ROWS:
        begin, end = sample * 0, sample * 0 + slots
    for slot in range(begin, end):
        index, valid = sample, True
        if ROWS:
            index, valid = load_index(rows_ptr, slot, samples)
        if (index == sample) & valid:
            at = batch_ptr + tl.cast(slot, tl.int64) * batch_sample
            dplus = load_row(at, columns, mask)
            dminus = load_row(at + tl.cast(slots, tl.int64) * batch_sample, columns, mask)
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
    rows: Tensor | None,
    dtype: torch.dtype,
    with_x_t: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel; arguments and results as the operator."""
    latents, noise = contiguous_frames(latents), contiguous_frames(noise)
    samples, slots = latents.shape[0], (latents if rows is None else rows).shape[0]
    x_t = empty(latents, dtype=dtype)
    total = 2 * slots + (samples if with_x_t else 0)
    batch = empty(latents, total, *latents.shape[1:], dtype=torch.float32)
    frames, size, chunks = frame_count(latents)
    launch(
        flow_map_inputs_forward_kernel, (samples * frames * chunks,),
        latents, noise, t, epsilon_plus, epsilon_minus, t if rows is None else rows.contiguous(),
        x_t, batch,
        samples, frames, size, chunks, slots,
        *latents.stride()[:2], *noise.stride()[:2],
        *time_strides(t), *time_strides(epsilon_plus), *time_strides(epsilon_minus),
        ROWS=rows is not None, WITH_X_T=with_x_t, **CHUNK_OPTIONS,
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
    rows: Tensor | None,
    with_x_t: bool,
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel; returns the gradients of latents and noise."""
    grad, grad_batch = contiguous_frames(grad), contiguous_frames(grad_batch)
    samples, slots = grad.shape[0], (grad if rows is None else rows).shape[0]
    dlatents, dnoise = empty(latents), empty(noise)
    frames, size, chunks = frame_count(grad)
    launch(
        flow_map_inputs_backward_kernel, (samples * frames * chunks,),
        grad, grad_batch, t, epsilon_plus, epsilon_minus, t if rows is None else rows.contiguous(),
        dlatents, dnoise,
        samples, frames, size, chunks, slots,
        *grad.stride()[:2], *grad_batch.stride()[:2],
        *time_strides(t), *time_strides(epsilon_plus), *time_strides(epsilon_minus),
        ROWS=rows is not None, WITH_X_T=with_x_t, **CHUNK_OPTIONS,
    )  # fmt: skip
    return dlatents, dnoise
