"""The network inputs of a flow-map training step: the noisy sample and its two neighbors along the path."""

from __future__ import annotations

import torch
from torch import Tensor

from anyflow.ops._common import accumulation_dtype, check_indices, check_same_shape, check_times, describe, lead
from anyflow.ops.backend import register, resolve

_OP = "flow_map_inputs"
Epsilon = float | Tensor | tuple[Tensor, Tensor]


def flow_map_inputs(
    latents: Tensor, noise: Tensor, t: Tensor, epsilon: Epsilon, rows: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Interpolate and step along the path: ``x_t = (1 - t) x0 + t eps``, ``x_pm = x_t +- epsilon (eps - x0)``.

    Args:
        latents: ``[B, F, ...]`` clean data x0.
        noise: eps, the shape of latents.
        t: ``[B]`` or ``[B, F]`` times in [0, 1].
        epsilon: half-width of the central difference in [0, 1] units: a number, ``[B]`` or ``[B, F]``, or a pair
            ``(plus, minus)`` of such tensors when the two sides differ (one-sided ends).
        rows: ``[n]`` integer indices, or a boolean ``[B]`` mask, of the samples that need ``x_pm``; None means all.

    Returns:
        ``(x_t, x_plus, x_minus)``: ``[B, F, ...]`` and twice ``[n, F, ...]``, in latents' dtype, but at least fp32 for
        the last two when latents are half precision: rounding them would drown their difference (SPEC D1).

    Raises:
        ValueError: shapes or devices do not fit together.
    """
    check_same_shape(_OP, "noise", noise, latents, "latents")
    if latents.ndim < 2:
        raise ValueError(f"{_OP}: latents must be [B, F, ...], got {describe(latents)}")
    check_times(_OP, "t", t, latents)
    plus, minus = epsilon if isinstance(epsilon, tuple) else (epsilon, epsilon)
    for name, side in (("epsilon plus", plus), ("epsilon minus", minus)):
        if isinstance(side, Tensor) and side.ndim:
            check_times(_OP, name, side, latents)
    if rows is not None:
        if rows.dtype == torch.bool and rows.shape != t.shape[:1]:
            raise ValueError(f"{_OP}: a rows mask must be [B={t.shape[0]}], got {describe(rows)}")
        rows = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        check_indices(_OP, "rows", rows, latents)
    return resolve(_OP)(latents, noise, t, plus, minus, rows)


@register(_OP, "eager")
def flow_map_inputs_reference(
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    epsilon_plus: float | Tensor,
    epsilon_minus: float | Tensor,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Eager reference; see :func:`flow_map_inputs`."""
    acc = accumulation_dtype(latents, noise)
    x0, eps = latents.to(acc), noise.to(acc)
    sigma = lead(t.to(acc), x0)
    x_t = (1 - sigma) * x0 + sigma * eps
    velocity, center = eps - x0, x_t
    if rows is not None:
        velocity, center = velocity[rows], center[rows]
    plus = center + _side(epsilon_plus, rows, velocity) * velocity
    minus = center - _side(epsilon_minus, rows, velocity) * velocity
    return x_t.to(latents.dtype), plus, minus


def _side(epsilon: float | Tensor, rows: Tensor | None, like: Tensor) -> float | Tensor:
    if not isinstance(epsilon, Tensor):
        return epsilon
    if epsilon.ndim and rows is not None:
        epsilon = epsilon[rows]
    return lead(epsilon.to(like.dtype), like)
