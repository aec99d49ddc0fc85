"""Per-sample weighted squared error against the central-difference flow-map target."""

from __future__ import annotations

import torch
from torch import Tensor

from anyflow.ops._common import (
    accumulation_dtype,
    check_device,
    check_indices,
    check_same_shape,
    check_times,
    describe,
    lead,
)
from anyflow.ops.backend import register, resolve

_OP = "flow_map_loss"


def flow_map_loss(
    pred: Tensor,
    uncond: Tensor | None,
    u_plus: Tensor | None,
    u_minus: Tensor | None,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    r: Tensor,
    weight: Tensor,
    guidance: float,
    step: float | Tensor,
    *,
    rows: Tensor | None = None,
) -> Tensor:
    """Flow-map regression loss (DESIGN section 5, SPEC B3-B6), differentiable with respect to ``pred`` only::

        p      = (pred - (1 - g) uncond) / g                 (p = pred when g is 1)
        dF/dt  = (u_plus - u_minus) / (step g)
        target = (eps - x0) - (t - r) dF/dt
        loss_i = mean over frames of weight * mean over C, H, W of (p - target)^2

    Args:
        pred: ``[B, F, C, H, W]`` conditional prediction u(x_t, t, r, c).
        uncond: u(x_t, t, r, negative) of the same shape, or None when ``guidance`` is 1.
        u_plus: u at t + e, ``[n, F, C, H, W]`` for the samples in ``rows``, or None when no sample needs it.
        u_minus: u at t - e, as u_plus.
        latents: x0, the shape of pred.
        noise: eps, the shape of pred.
        t: ``[B]`` or ``[B, F]`` times in [0, 1].
        r: as t.
        weight: ``[B]`` or ``[B, F]``.
        guidance: g > 0.
        step: full width of the difference, (t + e) - (t - e): a number, ``[n]`` or ``[n, F]``.
        rows: ``[n]`` integer indices of the samples that u_plus and u_minus hold; None means all B.

    Returns:
        ``[B]`` losses in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: shapes do not fit together, guidance <= 0, or uncond is missing while guidance is not 1.
    """
    _check(pred, uncond, u_plus, u_minus, latents, noise, t, r, weight, guidance, step, rows)
    return resolve(_OP)(pred, uncond, u_plus, u_minus, latents, noise, t, r, weight, guidance, step, rows)


@register(_OP, "eager")
def flow_map_loss_reference(
    pred: Tensor,
    uncond: Tensor | None,
    u_plus: Tensor | None,
    u_minus: Tensor | None,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    r: Tensor,
    weight: Tensor,
    guidance: float,
    step: float | Tensor,
    rows: Tensor | None,
) -> Tensor:
    """Eager reference; see :func:`flow_map_loss`."""
    acc = accumulation_dtype(pred, latents)
    with torch.no_grad():
        target = noise.to(acc) - latents.to(acc)
        if u_plus is not None and u_minus is not None:
            slope = u_plus.to(acc) - u_minus.to(acc)
            interval = (t - r).to(acc)
            interval = interval if rows is None else interval[rows]
            width = step.to(acc) if isinstance(step, Tensor) else step
            width = lead(width, slope) if isinstance(width, Tensor) else width
            slope = slope * (lead(interval, slope) / (width * guidance))
            target = target - slope if rows is None else target.index_add(0, rows, -slope)
    guided = pred.to(acc)
    if uncond is not None:
        guided = (guided - (1 - guidance) * uncond.detach().to(acc)) / guidance
    per_frame = (guided - target).square().flatten(2).mean(2)
    return (per_frame * lead(weight.to(acc), per_frame)).mean(1)


def _check(
    pred: Tensor,
    uncond: Tensor | None,
    u_plus: Tensor | None,
    u_minus: Tensor | None,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    r: Tensor,
    weight: Tensor,
    guidance: float,
    step: float | Tensor,
    rows: Tensor | None,
) -> None:
    if pred.ndim < 3:
        raise ValueError(f"{_OP}: pred must be [B, F, ...], got {describe(pred)}")
    for name, tensor in (("uncond", uncond), ("latents", latents), ("noise", noise)):
        if tensor is not None:
            check_same_shape(_OP, name, tensor, pred, "pred")
    for name, times in (("t", t), ("r", r), ("weight", weight)):
        check_times(_OP, name, times, pred)
    if t.shape != r.shape:
        raise ValueError(f"{_OP}: t {tuple(t.shape)} and r {tuple(r.shape)} must have one shape")
    if not guidance > 0:
        raise ValueError(f"{_OP}: guidance must be > 0, got {guidance}")
    if uncond is None and guidance != 1:
        raise ValueError(f"{_OP}: guidance {guidance} needs the unconditional prediction, but uncond is None")
    if (u_plus is None) != (u_minus is None):
        raise ValueError(f"{_OP}: u_plus and u_minus are given together or not at all")
    if u_plus is None or u_minus is None:
        return
    if rows is not None:
        check_indices(_OP, "rows", rows, pred)
    n = pred.shape[0] if rows is None else rows.shape[0]
    for name, tensor in (("u_plus", u_plus), ("u_minus", u_minus)):
        if tensor.shape != (n, *pred.shape[1:]):
            raise ValueError(f"{_OP}: {name} must be {(n, *pred.shape[1:])}, got {describe(tensor)}")
        check_device(_OP, name, tensor, pred)
    if isinstance(step, Tensor) and step.ndim:
        check_times(_OP, "step", step, u_plus)
