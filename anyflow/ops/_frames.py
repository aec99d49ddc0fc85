"""Help the operators over frames ``[B, F, ...]``: constant times, and indices of samples."""

from __future__ import annotations

import torch
from torch import Tensor

from anyflow.ops._common import check_device, check_indices, check_times, describe
from anyflow.ops.library import Limit
from anyflow.utils.transfer import to_device

# the times and indices of kernels over frames may have dtypes of their own
FRAMES = Limit(free=("t", "r", "weight", "width", "epsilon_plus", "epsilon_minus", "picked"))


def constant_times(
    op: str, name: str, times: float | Tensor, like: Tensor, *, scalar: bool = False
) -> Tensor:
    """Check times ``[B]`` or ``[B, F]`` of ``like[B, F, ...]`` and return them as a constant.

    The result is detached, in fp32 or fp64. With ``scalar`` the time may also be a number or a 0-d
    tensor. A number becomes a 0-d tensor filled on the device: a copy would wait for the device.
    """
    if not isinstance(times, Tensor):
        return torch.full(
            (), times, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device
        )
    if not times.is_floating_point():
        raise ValueError(f"{op}: {name} must be floating-point, got {describe(times)}")
    if scalar and times.ndim == 0:
        times = to_device(times, like.device) if times.device.type == "cpu" else times
        check_device(op, name, times, like)
    else:
        check_times(op, name, times, like)
    return times.detach().to(torch.promote_types(times.dtype, torch.float32))


def check_index_operand(op: str, picked: Tensor, like: Tensor) -> None:
    """Check the indices that :func:`sample_indices` makes; the kernels read int64."""
    check_indices(op, "picked", picked, like)
    if picked.dtype != torch.int64:
        raise ValueError(f"{op}: picked must be int64, got {describe(picked)}")


def sample_indices(op: str, picked: Tensor, like: Tensor) -> Tensor:
    """Check indices of the samples of ``like[B, ...]`` and return them as int64.

    The range is checked on the CPU, outside of compiled code, where reading waits for no device.

    Raises:
        ValueError: picked is not an integer ``[n]`` on like's device, there are no samples to pick,
            or, on the CPU, an index names none of them.
    """
    check_indices(op, "picked", picked, like)
    picked, samples = picked.long(), like.shape[0]
    if picked.shape[0] and not samples:
        raise ValueError(f"{op}: picked {describe(picked)} cannot pick among 0 samples")
    if (
        on_host(picked)
        and not torch.compiler.is_compiling()
        and ((picked < -samples) | (picked >= samples)).any()
    ):
        raise ValueError(f"{op}: picked must be in [-{samples}, {samples}), got {picked.tolist()}")
    return picked


def clamp_indices(picked: Tensor, samples: int) -> tuple[Tensor, Tensor | None]:
    """Return indices that are safe to gather with, and which of them name a sample.

    The second is None on the CPU, where :func:`sample_indices` has checked the range.
    """
    index = torch.where(picked < 0, picked + samples, picked)
    if on_host(picked):
        return index, None
    return index.clamp(0, max(samples - 1, 0)), (index >= 0) & (index < samples)


def on_host(picked: Tensor) -> bool:
    """Return whether reading the indices waits for no device."""
    return picked.device.type == "cpu"
