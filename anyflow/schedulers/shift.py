"""Compute the timestep shift, and the training weights that are defined on its grid."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

Times = TypeVar("Times", float, Tensor)

WEIGHT_TYPES = ("uniform", "gaussian", "beta08")
_GRID_POINTS = 1001


def shift_times(times: Times, shift: float) -> Times:
    """Return ``S(u) = s u / (1 + (s - 1) u)``, which for s > 1 favors the noisy end of [0, 1]."""
    return shift * times / (1 + (shift - 1) * times)


def invert_shift(times: Times, shift: float) -> Times:
    """Undo :func:`shift_times`, by a shift of ``1 / s``."""
    return shift_times(times, 1 / shift)


def train_weight_grid(weight_type: str, shift: float) -> tuple[Tensor, Tensor]:
    """Return the shifted 1001-point grid and its normalized training weights, in fp64.

    ``beta08``: ``y = tau sqrt(1 - tau)``; ``gaussian``: ``y = exp(-2 (tau - 1/2)^2)`` less its
    minimum; both are scaled to ``1000 y / sum(y)`` over the grid. ``uniform``: 1.

    Returns:
        ``(tau, weight)``, both ``[1001]``, tau ascending in [0, 1].
    """
    tau = shift_times(torch.linspace(0, 1, _GRID_POINTS, dtype=torch.float64), shift)
    if weight_type == "uniform":
        return tau, torch.ones_like(tau)
    if weight_type == "beta08":
        y = tau * (1 - tau).sqrt()
    elif weight_type == "gaussian":
        y = torch.exp(-2 * (tau - 0.5).square())
        y = y - y.min()
    else:
        raise ValueError(
            f"weight_type must be one of {', '.join(WEIGHT_TYPES)}, got {weight_type!r}"
        )
    return tau, (_GRID_POINTS - 1) * y / y.sum()


def nearest_weight(tau: Tensor, grid: Tensor, weight: Tensor) -> Tensor:
    """Return the weight of the grid point nearest to each ``tau``; the grid ascends."""
    midpoints = (grid[1:] + grid[:-1]) / 2
    return weight[torch.bucketize(tau.contiguous(), midpoints)]
