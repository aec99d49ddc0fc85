"""Split the frames of ``[B, F, ...]`` into chunks for the kernels over frames.

A tensor is B * F frames of ``size`` elements, each contiguous in memory. A program reads one chunk
of one frame from every tensor, so that what belongs to a frame (times, widths, weight) is a scalar
in it. The programs of a sample look through the few indices ``picked`` for the slots that name the
sample, so that no tensor is read twice. They also find an index that names no sample: reading the
indices on the host would stall the GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from anyflow.kernels.tokens import load_vector

# Eight elements per thread are one 16-byte vector of bf16 or two of fp32. Up to seven tensors then
# fit the registers and leave room for many programs per multiprocessor, whose loads overlap.
CHUNK_OPTIONS = {"CHUNK": 1024, "num_warps": 4}


def contiguous_frames(x: Tensor) -> Tensor:
    """Return x if each frame ``x[b, f]`` is contiguous in memory, else a contiguous copy.

    The kernels take any strides of samples and frames.
    """
    expected = 1
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size != 1 and stride != expected:
            return x.contiguous()
        expected *= size
    return x


def frame_count(x: Tensor) -> tuple[int, int, int]:
    """Return frames per sample, elements per frame and chunks per frame of ``[B, F, ...]``."""
    size = x.shape[2:].numel()
    return x.shape[1], size, triton.cdiv(size, CHUNK_OPTIONS["CHUNK"])


def time_strides(times: Tensor) -> tuple[int, int]:
    """Return the strides that read 0-d, ``[B]`` or ``[B, F]`` times as ``[B, F]``."""
    return (*times.stride(), 0, 0)[:2]


@triton.jit
def chunk_of_frame(frames, size, chunks, CHUNK: tl.constexpr):
    """Return ``(sample, frame, first, mask)`` of this program's chunk.

    ``first`` is the chunk's first element of the frame, and ``mask`` tells which of its elements
    the frame has.
    """
    index = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks).to(tl.int64) * CHUNK
    return index // frames, index % frames, first, tl.arange(0, CHUNK) < size - first


@triton.jit
def load_chunk(pointer, sample, frame, sample_stride, frame_stride, first, columns, mask):
    """Load a chunk of one frame in fp32, zero beyond the frame."""
    return load_vector(
        pointer + sample * sample_stride + frame * frame_stride + first, columns, mask
    )


@triton.jit
def load_time(pointer, sample, frame, sample_stride, frame_stride):
    """Load one of ``[B, F]`` times, in its own dtype."""
    return tl.load(pointer + sample * sample_stride + frame * frame_stride)


@triton.jit
def load_index(picked_ptr, slot, samples):
    """Return ``(sample, valid)`` of ``picked[slot]``.

    A negative index counts from the end. An index that names no sample gives the nearest sample
    and ``valid`` false.
    """
    index = tl.load(picked_ptr + slot).to(tl.int64)
    index = tl.where(index < 0, index + samples, index)
    return tl.minimum(tl.maximum(index, 0), samples - 1), (index >= 0) & (index < samples)
