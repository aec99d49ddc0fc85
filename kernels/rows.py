"""What the kernels that hold whole rows of D in registers share: configuration, statistics, two-stage sums.

A program reads a run of consecutive tokens of one modulation row, so that the row is read once per run instead of once
per token: in bf16, a token would otherwise read four times as many bytes of fp32 shift and scale as of x. Sums over
tokens (gradients of shift, scale, gate, weight) stay in registers over the run, go to a row of a partial-sum buffer
each, and are added up by one more reduction: no atomics, the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from anyflow.kernels.launch import empty

# Tokens per program. A backward program also writes a row of partial sums, which a longer run amortizes.
FORWARD_TOKENS = 16
BACKWARD_TOKENS = 32


def row_options(d: int) -> dict[str, int]:
    """``BLOCK_D`` and ``num_warps`` for a row of D elements.

    Sixteen elements per thread: two 16-byte vectors of bf16 each way, and with the fp32 intermediates of the backward
    kernels about half of the 255 registers, so that several programs share a multiprocessor. From 8192 on the
    16 warps of a program are as many as pay for their synchronization.
    """
    block = triton.next_power_of_2(d)
    return {"D": d, "BLOCK_D": block, "num_warps": min(max(block // (32 * 16), 1), 16)}


@triton.jit
def load_row(pointer, columns, mask):
    """A row in fp32, zero beyond D."""
    return tl.load(pointer + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def standardize(x, mask, eps, D: tl.constexpr):
    """``((x - mean) / std, 1 / std)`` of a row; the variance is that of the centered row, so that it cannot cancel."""
    centered = tl.where(mask, x - tl.sum(x, 0) / D, 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, 0) / D + eps)
    return centered * rstd, rstd


@triton.jit
def standardize_backward(g, normal, rstd, D: tl.constexpr):
    """Gradient of x, given that of ``standardize(x)[0]``; all zero beyond D but the result."""
    return rstd * (g - tl.sum(g, 0) / D - normal * (tl.sum(g * normal, 0) / D))


def partial_sums(like: Tensor, groups: int, programs: int, d: int) -> Tensor:
    """``[groups, programs, D]`` in fp32: one row for each program to write."""
    return empty(like, groups, programs, d, dtype=torch.float32)


def finish_sum(partial: Tensor, like: Tensor) -> Tensor:
    """Second stage: the sum over programs, in like's shape and dtype."""
    return partial.sum(1).to(like.dtype).reshape(like.shape)
