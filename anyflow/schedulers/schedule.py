"""Read and check the schedules that users give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from anyflow.utils.validation import brief

MAX_STEPS = 10_000  # of a schedule: more are a mistake, and would only fill the memory


def read_numbers(name: str, values: Any) -> Tensor:
    """Convert a sequence, array or tensor of real numbers to fp64 ``[n]`` on the CPU.

    Raises:
        ValueError: ``values`` is anything else, or has more than ``MAX_STEPS`` numbers.
    """
    problem = f"{name} must be a sequence of at most {MAX_STEPS} numbers, got {brief(values)}"
    if isinstance(values, Tensor):
        real = not values.is_complex() and values.dtype != torch.bool
        if values.ndim != 1 or not real or len(values) > MAX_STEPS:
            raise ValueError(f"{problem}, of shape {tuple(values.shape)}")
        return values.detach().to("cpu", torch.float64)
    unordered = isinstance(values, (str, bytes, Mapping, set, frozenset))
    if unordered or not isinstance(values, Iterable):
        raise ValueError(problem)
    listed = list(islice(iter(values), MAX_STEPS + 1))
    if len(listed) > MAX_STEPS or any(isinstance(v, (str, bytes, bool, complex)) for v in listed):
        raise ValueError(problem)
    try:
        return torch.tensor([float(value) for value in listed], dtype=torch.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise ValueError(problem) from error


def checked_schedule(name: str, values: Tensor, top: float) -> Tensor:
    """Return a schedule that ends with 0, which is appended unless it is there.

    Raises:
        ValueError: the values are not in [0, top], or do not descend strictly.
    """
    if values.ndim != 1 or values.numel() == 0:
        raise ValueError(
            f"{name} must be a non-empty 1-D sequence, got shape {tuple(values.shape)}"
        )
    if not bool(((values >= 0) & (values <= top)).all()):  # NaN fails both comparisons
        raise ValueError(f"{name} must be finite and in [0, {top:g}], got {values.tolist()}")
    if values[-1] != 0:
        values = torch.cat([values, values.new_zeros(1)])
    if len(values) < 2 or not bool((values[1:] < values[:-1]).all()):
        raise ValueError(f"{name} must be strictly descending, got {values.tolist()}")
    return values
