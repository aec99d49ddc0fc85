"""Report by how much the results of two networks differ, and by how much they may."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SHIFT = 5.0  # Wan's
TEXT_LENGTH = 512
# Largest relative differences that rounding explains.
LIMITS = {
    torch.float32: {"forward": 1e-5, "loss": 1e-5, "sample": 1e-5},
    torch.bfloat16: {"forward": 2.55e-2, "loss": 1.33e-2, "sample": 2.55e-2},
}


@dataclass(frozen=True)
class Deviation:
    """Hold the differences of one result; diffusers' result is the ``b`` of the equations.

    Attributes:
        name: name of the result.
        mean: mean |a - b| / mean |b|.
        max: max |a - b| / max |b|.
        limit: the largest ``mean`` that passes.
    """

    name: str
    mean: float
    max: float
    limit: float

    @property
    def passed(self) -> bool:
        """Tell whether the mean is within the limit; NaN and infinity never are."""
        return math.isfinite(self.mean) and self.mean <= self.limit


@dataclass(frozen=True)
class VerifyReport:
    """Hold every comparison of a run, and what was not compared; ``str()`` is a table of them."""

    title: str
    comparisons: tuple[Deviation, ...]
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Tell whether every comparison is within its limit."""
        return all(comparison.passed for comparison in self.comparisons)

    def __str__(self) -> str:
        head = f"{'relative difference':28s} {'mean':>9s} {'max':>9s} {'allowed':>9s}"
        lines = [
            f"{c.name:28s} {c.mean:9.2e} {c.max:9.2e} {c.limit:9.2e}  "
            f"{'ok' if c.passed else 'OVER'}"
            for c in self.comparisons
        ]
        over = sum(not c.passed for c in self.comparisons)
        end = f"{over} of {len(self.comparisons)} over" if over else "all within"
        return "\n".join([self.title, head, *lines, *self.notes, end])


def limits_of(dtype: torch.dtype, given: dict[str, float]) -> dict[str, float]:
    """Return the limit of each kind of result, or raise a ValueError."""
    if dtype not in LIMITS:
        raise ValueError(f"dtype must be one of {', '.join(map(str, LIMITS))}, got {dtype}")
    limits = {**LIMITS[dtype], **given}
    if unknown := limits.keys() - LIMITS[dtype].keys():
        allowed = ", ".join(LIMITS[dtype])
        raise ValueError(f"limits must be of {allowed}, got {', '.join(sorted(unknown))}")
    for kind, limit in limits.items():
        if not limit >= 0:  # NaN is refused, too
            raise ValueError(f"the limit of {kind} must be >= 0, got {limit}")
    return limits


def deviation_of(name: str, ours: Tensor, theirs: Tensor, limit: float) -> Deviation:
    """Compare two results in fp64."""
    difference = (ours.double() - theirs.double()).abs()
    scale = theirs.double().abs()
    mean, largest = difference.mean() / scale.mean(), difference.max() / scale.max()
    return Deviation(name, mean.item(), largest.item(), limit)
