"""Compute the weighted squared error of a sample against its central-difference target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyflow.ops._common import (
    accumulation_dtype,
    check_device,
    check_guidance,
    check_number_or_times,
    check_same_shape,
    check_sizes,
    describe,
    lead,
)
from anyflow.ops._frames import (
    FRAMES,
    check_index_operand,
    clamp_indices,
    constant_times,
    sample_indices,
)
from anyflow.ops.library import Operator

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
    width: float | Tensor,
    *,
    picked: Tensor | None = None,
) -> Tensor:
    """Compute the regression loss of a flow map, differentiable with respect to ``pred`` only::

        p      = (pred - (1 - g) uncond) / g                 (p = pred when g is 1)
        dF/dt  = (u_plus - u_minus) / (width g)
        target = (noise - latents) - (t - r) dF/dt
        loss_i = mean over frames of weight * mean over C, H, W of (p - target)^2

    Args:
        pred: ``[B, F, C, H, W]`` conditional prediction u(x_t, t, r, c); the kernel takes any
            strides of B and F of the tensors but copies where the rest is not contiguous.
        uncond: u(x_t, t, r, negative) of the same shape, or None when ``guidance`` is 1.
        u_plus: u at t + e of the picked samples, ``[n, F, C, H, W]``, or None when no sample needs
            it.
        u_minus: u at t - e, as u_plus.
        latents: the clean data x0, of pred's shape.
        noise: the noise of the path, of pred's shape.
        t: ``[B]`` or ``[B, F]`` times in [0, 1].
        r: as t.
        weight: ``[B]`` or ``[B, F]``.
        guidance: g > 0.
        width: full width of the difference, (t + e) - (t - e): a number, ``[n]`` or ``[n, F]``.
        picked: ``[n]`` integer indices of the samples that u_plus and u_minus hold, in any order;
            negative ones count from the end, and the differences of an index that comes twice are
            added. None means all B.

    Returns:
        ``[B]`` losses in fp32 (fp64 for fp64 inputs). On a GPU, where checking indices would stall
        it, an index that names no sample makes the loss of the first or of the last sample, which
        is nearer, NaN.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, guidance <= 0, uncond is missing
            while guidance is not 1, an index on the CPU names no sample, or a forced backend does
            not support the dtypes.
    """
    _check_tensors(pred, uncond, latents, noise, guidance)
    t, r = constant_times(_OP, "t", t, pred), constant_times(_OP, "r", r, pred)
    weight = constant_times(_OP, "weight", weight, pred)
    if t.shape != r.shape:
        raise ValueError(f"{_OP}: t {tuple(t.shape)} and r {tuple(r.shape)} must have one shape")
    if (u_plus is None) != (u_minus is None):
        raise ValueError(f"{_OP}: u_plus and u_minus are given together or not at all")
    if u_plus is None or u_minus is None:
        picked, width = None, 1.0
    else:
        picked = None if picked is None else sample_indices(_OP, picked, pred)
        shape = (pred.shape[0] if picked is None else picked.shape[0], *pred.shape[1:])
        for name, tensor in (("u_plus", u_plus), ("u_minus", u_minus)):
            if tensor.shape != shape or not tensor.is_floating_point():
                raise ValueError(
                    f"{_OP}: {name} must be a floating-point {shape}, got {describe(tensor)}"
                )
            check_device(_OP, name, tensor, pred)
    width = constant_times(_OP, "width", width, pred if u_plus is None else u_plus, scalar=True)
    need_grad = torch.is_grad_enabled() and pred.requires_grad
    constants = [
        None if x is None else x.detach() for x in (uncond, u_plus, u_minus, latents, noise)
    ]
    loss, _ = _operator(pred, *constants, t, r, weight, width, picked, float(guidance), need_grad)
    return loss


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
    width: Tensor,
    picked: Tensor | None,
    guidance: float,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the loss of :func:`flow_map_loss` eagerly, and ``p - target`` in pred's dtype.

    The second result is what the backward reads: the gradient of pred up to a factor per frame,
    which would leave fp16's range (1e-6 at the size of a video) if it were applied before the loss
    scale is. It is empty without ``need_grad``.
    """
    acc = accumulation_dtype(pred, latents)
    with torch.no_grad():
        target = noise.to(acc) - latents.to(acc)
        if u_plus is not None and u_minus is not None:
            slope = u_plus.to(acc) - u_minus.to(acc)
            interval, valid = (t.to(torch.promote_types(t.dtype, acc)) - r).to(acc), None
            if picked is not None:
                picked, valid = clamp_indices(picked, pred.shape[0])
                interval = interval[picked] if interval.ndim else interval.expand(picked.shape)
            if valid is not None:
                interval = interval.where(lead(valid, interval), torch.nan)
            slope = slope * (lead(interval, slope) / (lead(width.to(acc), slope) * guidance))
            target = target - slope if picked is None else target.index_add(0, picked, -slope)
    guided = pred.to(acc)
    if uncond is not None:
        guided = (guided - (1 - guidance) * uncond.detach().to(acc)) / guidance
    residual = guided - target
    per_frame = residual.square().flatten(2).mean(2)
    loss = (per_frame * lead(weight.to(acc), per_frame)).mean(1)
    return loss, residual.detach().to(pred.dtype) if need_grad else pred.new_empty(0)


def flow_map_loss_backward_reference(
    grad: Tensor, residual: Tensor, weight: Tensor, guidance: float
) -> Tensor:
    """Return the gradient of pred: ``2 grad_i weight / (F C H W g) (p - target)``."""
    acc = accumulation_dtype(residual)
    elements = max(residual[:1].numel(), 1)
    factor = lead(grad.to(acc), weight) * weight.to(acc) * (2 / (elements * guidance))
    return (residual.to(acc) * lead(factor, residual)).to(residual.dtype)


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
    width: Tensor,
    picked: Tensor | None,
    guidance: float,
    need_grad: bool,
) -> None:
    _check_tensors(pred, uncond, latents, noise, guidance)
    if (u_plus is None) != (u_minus is None) or (u_plus is None and picked is not None):
        raise ValueError(
            f"{_OP}: u_plus and u_minus are given together or not at all, and picked with them only"
        )
    if picked is not None:
        check_index_operand(_OP, picked, pred)
    n = pred.shape[0] if picked is None else picked.shape[0]
    for name, tensor in (("u_plus", u_plus), ("u_minus", u_minus)):
        if tensor is not None:
            check_sizes(_OP, name, tensor, (n, *pred.shape[1:]), pred)
    for name, times in (("t", t), ("r", r), ("weight", weight)):
        check_number_or_times(_OP, name, times, pred.shape[0], pred)
    check_number_or_times(_OP, "width", width, n, pred)
    if t.shape != r.shape:
        raise ValueError(f"{_OP}: t {tuple(t.shape)} and r {tuple(r.shape)} must have one shape")


def _check_backward(grad: Tensor, residual: Tensor, weight: Tensor, guidance: float) -> None:
    if residual.ndim < 3 or not residual.is_floating_point():
        raise ValueError(
            f"{_OP}: residual must be a floating-point [B, F, ...], got {describe(residual)}"
        )
    check_sizes(_OP, "grad", grad, residual.shape[:1], residual)
    check_number_or_times(_OP, "weight", weight, residual.shape[0], residual)
    check_guidance(_OP, guidance)


def _check_tensors(
    pred: Tensor, uncond: Tensor | None, latents: Tensor, noise: Tensor, guidance: float
) -> None:
    if pred.ndim < 3 or not pred.is_floating_point():
        raise ValueError(f"{_OP}: pred must be a floating-point [B, F, ...], got {describe(pred)}")
    for name, tensor in (("uncond", uncond), ("latents", latents), ("noise", noise)):
        if tensor is not None:
            check_same_shape(_OP, name, tensor, pred, "pred")
    check_guidance(_OP, guidance)
    if uncond is None and guidance != 1:
        raise ValueError(
            f"{_OP}: guidance {guidance} needs the unconditional prediction, but uncond is None"
        )


def _fake(
    pred: Tensor, uncond: Any, u_plus: Any, u_minus: Any, latents: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    # the reference on fake tensors makes 18 % of the Python calls of compiling the pair
    *_, need_grad = others
    loss = pred.new_empty(pred.shape[:1], dtype=accumulation_dtype(pred, latents))
    return loss, pred.new_empty(pred.shape) if need_grad else pred.new_empty(0)


_operator = Operator(
    flow_map_loss_reference,
    flow_map_loss_backward_reference,
    check=_check,
    check_backward=_check_backward,
    limit=FRAMES,
    fake=_fake,
    results=("loss", "residual"),
)
