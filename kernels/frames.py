"""What the kernels over frames share: ``[B, F, ...]`` is B * F frames of ``size`` elements,
contiguous in memory.

A program reads one chunk of one frame from every tensor, so that what belongs to a frame (times,
widths, weight) is a scalar in it. The programs of a sample look through the few ``rows`` for the
slots that name it, so that no tensor is read twice; an index that names no sample is found there
too, for reading it on the host would stall the GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Eight elements per thread: a 16-byte vector of bf16, two of fp32, and up to seven tensors fit the
# registers with room for many programs per multiprocessor, which hide the latency of reading each
# element once.
CHUNK_OPTIONS = {"CHUNK": 1024, "num_warps": 4}


def contiguous_frames(x: Tensor) -> Tensor:
    """x itself if each frame ``x[b, f]`` is contiguous in memory (the kernels take any other
    strides), else a copy.
    """
    expected = 1
    for size, stride in zip(reversed(x.shape[2:]), reversed(x.stride()[2:]), strict=True):
        if size != 1 and stride != expected:
            return x.contiguous()
        expected *= size
    return x


def frame_count(x: Tensor) -> tuple[int, int, int]:
    """Frames per sample, elements per frame, and chunks per frame of ``[B, F, ...]``."""
    size = x.shape[2:].numel()
    return x.shape[1], size, triton.cdiv(size, CHUNK_OPTIONS["CHUNK"])


def time_strides(times: Tensor) -> tuple[int, int]:
    """Strides by which 0-d, ``[B]`` and ``[B, F]`` times are all read as ``[B, F]``."""
    return (*times.stride(), 0, 0)[:2]


@triton.jit
def chunk_of_frame(frames, size, chunks, CHUNK: tl.constexpr):
    """``(sample, frame, first, mask)``: which frame this program reads, from which element, and
    what lies in it.
    """
    index = (tl.program_id(0) // chunks).to(tl.int64)
    first = (tl.program_id(0) % chunks).to(tl.int64) * CHUNK
    return index // frames, index % frames, first, tl.arange(0, CHUNK) < size - first


@triton.jit
def load_time(pointer, sample, frame, sample_stride, frame_stride):
    """One of ``[B, F]`` times, in its own dtype."""
    return tl.load(pointer + sample * sample_stride + frame * frame_stride)


@triton.jit
def load_index(rows_ptr, slot, samples):
    """``(sample, valid)`` of ``rows[slot]``: counted from the end if negative, the nearest one if
    there is no such.
    """
    index = tl.load(rows_ptr + slot).to(tl.int64)
    index = tl.where(index < 0, index + samples, index)
    return tl.minimum(tl.maximum(index, 0), samples - 1), (index >= 0) & (index < samples)
