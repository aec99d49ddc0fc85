"""Serve the kernels over tokens, which hold all of D in registers: options, statistics, sums.

A program reads a run of consecutive tokens of one modulation row, so that the row is read once per
run instead of once per token: in bf16, a token would otherwise read four times as many bytes of
fp32 shift and scale as of x. Sums over tokens (gradients of shift, scale, gate, weight) stay in
registers over the run, go to a line of a partial-sum buffer each, and are added up by one more
kernel: no atomics, the same bits every time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from anyflow.kernels.launch import empty, launch
from anyflow.kernels.numerics import INTERPRETED, cast

# Tokens per program. A backward program also writes partial sums, which a longer run amortizes.
FORWARD_TOKENS = 16
BACKWARD_TOKENS = 32
# Elements of a token per thread, at most. Few warps leave room for many programs on a
# multiprocessor, whose loads overlap, and no lane idle: two at D = 1536 and four at D = 5120 read
# whole 16-byte vectors in every lane. Kernels that keep many tensors and sums would spill with 40.
FEW_TENSORS, MANY_TENSORS = 40, 24
FP32_BACKWARD = 16  # loaded tokens take twice the registers, and ptxas spills sooner for sm_100
# One warp, which needs no barriers, can hold a token of at most this D: 48 elements per thread.
ONE_WARP = 1536

# Warps, stages and tokens per program that were measured at least 3 % faster on an H200 than the
# rules above, for bf16 at the D of the 1.3B model (docs/performance-log.md, experiment 2).
MEASURED_D = 1536
MEASURED = {
    "layer_norm_modulate backward": (2, 4, 64),
    "residual_layer_norm forward": (1, 4, 8),
    "residual_layer_norm backward": (2, 3, 64),
    "residual_layer_norm backward, gate": (4, 4, 128),
    "gated_residual forward": (2, 4, 8),
    "gated_residual backward": (1, 3, 64),
    "rms_norm_rope backward": (2, 3, 64),
}

# the default is never written to
_overridden: ContextVar[dict[str, int]] = ContextVar("overridden", default={})  # noqa: B039


def row_options(
    d: int,
    *,
    tokens: int,
    elements: int,
    stages: int = 1,
    one_warp: bool = False,
    measured: str | None = None,
) -> dict[str, int]:
    """Return the constexpr arguments and the number of warps of a kernel over tokens.

    Args:
        d: D, elements of a token.
        tokens: tokens per program.
        elements: elements of a token per thread, at most; up to 16 warps share a token.
        stages: stages of the loop over tokens; from 3 on the loop copies ``stages - 2`` later
            tokens to shared memory meanwhile.
        one_warp: whether one warp holds a token where it can.
        measured: key of :data:`MEASURED`, whose options come first at the D that they are for;
            None for a kernel or a dtype without measured options.

    Returns:
        ``TOKENS``, ``STAGES``, ``D``, ``BLOCK_D`` (the next power of two) and ``num_warps``.
    """
    warps = min(triton.next_power_of_2(triton.cdiv(d, 32 * elements)), 16)
    if one_warp and d <= ONE_WARP:
        warps = 1
    if measured is not None and d == MEASURED_D:
        warps, stages, tokens = MEASURED[measured]
    options = {
        "TOKENS": tokens,
        "STAGES": stages,
        "D": d,
        "BLOCK_D": triton.next_power_of_2(d),
        "num_warps": warps,
    }
    return options | _overridden.get()


@contextmanager
def override_options(**options: int) -> Iterator[None]:
    """Launch the kernels over tokens with other ``TOKENS``, ``STAGES`` or ``num_warps``.

    Benchmarks time the alternatives with it.

    Raises:
        ValueError: another option is named.
    """
    unknown = sorted(set(options) - {"TOKENS", "STAGES", "num_warps"})
    if unknown:
        raise ValueError(
            f"override_options takes TOKENS, STAGES and num_warps, got {', '.join(unknown)}"
        )
    token = _overridden.set(options)
    try:
        yield
    finally:
        _overridden.reset(token)


@triton.jit
def load_row(pointer, columns, mask):
    """Load a token, or a modulation row, in fp32; zero beyond D."""
    return tl.load(pointer + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_modulation(pointer, batch, index, batch_stride, row_stride, columns, mask):
    """Load one modulation row of a sample in fp32, zero beyond D."""
    return load_row(pointer + batch * batch_stride + index * row_stride, columns, mask)


@triton.jit
def standardize(x, mask, eps, D: tl.constexpr):
    """Return ``(x - mean) / std`` of a token.

    The variance is that of the centered token: a difference of squares could cancel.
    """
    centered = tl.where(mask, x - tl.sum(x, 0) / D, 0.0)
    return centered * tl.rsqrt(tl.sum(centered * centered, 0) / D + eps)


@triton.jit
def add_pairs(a0, a1, b0, b1):
    """Add two pairs: the reduction of a pair has as many barriers as that of one number."""
    return a0 + b0, a1 + b1


@triton.jit
def sum_pair(a, b):
    """Return the sums of two tokens, in one reduction.

    Interpreted, the reductions are two: the interpreter calls ``add_pairs`` for every element.
    """
    if INTERPRETED:
        return tl.sum(a, 0), tl.sum(b, 0)
    return tl.reduce((a, b), 0, add_pairs)


@triton.jit
def standardize_with_gradient(x, g, mask, eps, D: tl.constexpr):
    """Return ``standardize(x)`` and the gradient of x, given the gradient g of the former.

    g is zero beyond D. The sums of g and of g * normal share the reductions of the statistics,
    because sum(g * normal) is sum(g * centered) / std: two reductions in place of four.
    """
    sum_x, sum_g = sum_pair(x, g)
    centered = tl.where(mask, x - sum_x / D, 0.0)
    square, product = sum_pair(centered * centered, g * centered)
    rstd = tl.rsqrt(square / D + eps)
    normal = centered * rstd
    return normal, rstd * (g - sum_g / D - normal * (product * rstd / D))


# Sums over tokens ---------------------------------------------------------------------------------

# A tile of partial sums per iteration. 32 columns let a few gradients of D = 1536 occupy the GPU.
_SUM_OPTIONS = {"PROGRAMS": 128, "COLUMNS": 32, "num_warps": 4}


def partial_sums(like: Tensor, count: int, programs: int, d: int) -> Tensor:
    """Return ``[count, programs, D]`` in fp32, uninitialized: each program's sum per gradient."""
    return empty(like, count, programs, d, dtype=torch.float32)


def finish_sums(partial: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Add up the programs' sums of up to three gradients in one launch.

    Args:
        partial: ``[count, programs, D]``, as :func:`partial_sums`; programs of one row of a
            gradient are adjacent.
        like: tensors ``[..., D]`` that the sums are the gradients of; the rows of each share the
            programs equally.

    Returns:
        The gradients, in the shapes and dtypes of ``like``.
    """
    count, programs, d = partial.shape
    assert count == len(like) <= 3, f"{count} sums for {len(like)} gradients"
    sums = [empty(t) for t in like]
    groups = [t.numel() // max(d, 1) for t in like]
    padded = [*sums, *[partial] * (3 - count)]
    launch(
        finish_sums_kernel, (sum(groups) * triton.cdiv(d, _SUM_OPTIONS["COLUMNS"]),),
        partial, *padded,
        programs, *groups, *[0] * (3 - count),
        d,
        **_SUM_OPTIONS,
    )  # fmt: skip
    return tuple(sums)


@triton.jit
def finish_sums_kernel(
    partial_ptr, first_ptr, second_ptr, third_ptr,
    programs, first_groups, second_groups, third_groups,
    d,
    PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(d, COLUMNS)
    group = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * COLUMNS
    if group < first_groups:
        sum_programs(
            partial_ptr, first_ptr, 0, group, first_groups, column, programs, d, PROGRAMS, COLUMNS
        )
    else:
        group -= first_groups
        if group < second_groups:
            sum_programs(
                partial_ptr, second_ptr, 1, group, second_groups, column, programs, d,
                PROGRAMS, COLUMNS,
            )  # fmt: skip
        else:
            group -= second_groups
            sum_programs(
                partial_ptr, third_ptr, 2, group, third_groups, column, programs, d,
                PROGRAMS, COLUMNS,
            )  # fmt: skip


@triton.jit
def sum_programs(
    partial_ptr, sum_ptr,
    index, group, groups, column, programs, d,
    PROGRAMS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add up the programs of one group of gradient ``index``, in ``COLUMNS`` columns."""
    of_group = programs // groups
    program = tl.arange(0, PROGRAMS)
    columns = column + tl.arange(0, COLUMNS)
    start = (tl.cast(index, tl.int64) * programs + tl.cast(group, tl.int64) * of_group) * d
    offsets = program[:, None].to(tl.int64) * d + columns[None, :]
    total = tl.zeros([PROGRAMS, COLUMNS], tl.float32)
    for first in range(0, of_group, PROGRAMS):
        mask = (program[:, None] < of_group - first) & (columns[None, :] < d)
        total += tl.load(
            partial_ptr + start + tl.cast(first, tl.int64) * d + offsets, mask=mask, other=0.0
        )
    result = cast(tl.sum(total, 0), sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + tl.cast(group, tl.int64) * d + columns, result, mask=columns < d)
