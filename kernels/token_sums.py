"""Sum over tokens without atomics, for the gradients of shift, scale, gate and weight.

Each program keeps its sum over a run of tokens in registers and writes it to a line of a buffer;
one more kernel adds the lines up. The bits are the same every time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from anyflow.kernels.launch import empty, launch
from anyflow.kernels.numerics import cast

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
