"""Launch Triton kernels, or record what would be launched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """Describe one kernel launch: ``kernel[grid](*args, **options)``."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]  # constexpr arguments and num_warps, by name


_recording: ContextVar[list[Launch] | None] = ContextVar("recording", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launch on the device of the first argument, which need not be the current one.

    An empty grid launches nothing. Pointers, sizes and strides come first, in the order of the
    kernel; constexpr arguments and ``num_warps`` are given by name.
    """
    recording = _recording.get()
    if recording is not None:
        recording.append(Launch(kernel, grid, args, options))
    elif 0 not in grid:
        with torch.cuda.device_of(args[0]):
            kernel[grid](*args, **options)


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Record launches in place of running them.

    On meta tensors the record is exactly what would run, and needs no GPU.
    """
    launches: list[Launch] = []
    token = _recording.set(launches)
    try:
        yield launches
    finally:
        _recording.reset(token)


def contiguous_vectors(x: Tensor) -> Tensor:
    """Return x if its last dimension is contiguous in memory, else a contiguous copy.

    The kernels take any strides of the other dimensions.
    """
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialized contiguous tensor on like's device.

    Without a shape or a dtype, those of ``like`` are taken.
    """
    return torch.empty(
        shape if shape else like.shape,
        dtype=like.dtype if dtype is None else dtype,
        device=like.device,
    )
