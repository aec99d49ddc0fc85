"""Copy from the host to a device without making the host wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """Copy a tensor to a device, and to a dtype, without waiting for the device's earlier work.

    A copy from pageable memory to a CUDA device waits until its stream has nothing left to do. One
    from pinned memory is queued behind the rest. The pinned memory is torch's to reuse, which it
    does when the copy is done.
    """
    device, dtype = torch.device(device), x.dtype if dtype is None else dtype
    if x.device.type != "cpu" or device.type != "cuda":
        return x.to(device, dtype)
    there = x.pin_memory().to(device, non_blocking=True)
    return there.to(dtype)  # a conversion within the copy would run on the host, in pageable memory


def device_tensor(
    values: Sequence[float], dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Make a tensor ``[n]`` of numbers on a device, copied as by :func:`to_device`."""
    return to_device(torch.tensor(values, dtype=dtype), device)
