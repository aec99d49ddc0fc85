"""Gated residual, then LayerNorm with affine or modulation, in one operator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anyflow.ops._common import (
    accumulation_dtype,
    check_rows,
    check_same_shape,
    check_tokens,
    check_vector,
    split_rows,
)
from anyflow.ops.backend import register, resolve
from anyflow.ops.layer_norm_modulate import modulate

_OP = "residual_layer_norm"


def residual_layer_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Residual and norm: ``h = x + y * gate``, rounded to x's dtype, and ``n = LN(h)`` (DESIGN section 3).

    LN takes either an affine (``weight``, ``bias``) or a modulation (``shift``, ``scale``), or neither.

    Args:
        x: ``[B, L, D]`` residual stream.
        y: ``[B, L, D]`` branch output.
        gate: ``[B, R, D]`` or None for a plain residual; R divides L.
        weight: ``[D]`` LayerNorm weight.
        bias: ``[D]`` LayerNorm bias; needs ``weight``.
        shift: ``[B, R, D]`` modulation of the norm; given together with ``scale``.
        scale: ``[B, R, D]``, the norm is multiplied by ``1 + scale``.
        eps: added to the variance.

    Returns:
        ``(h, n)``, both ``[B, L, D]`` in x's dtype; statistics and products are accumulated in fp32.

    Raises:
        ValueError: shapes or devices do not fit together, or affine and modulation are both given.
    """
    _check(x, y, gate, weight, bias, shift, scale)
    return resolve(_OP)(x, y, gate, weight, bias, shift, scale, eps)


@register(_OP, "eager")
def residual_layer_norm_reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Eager reference; see :func:`residual_layer_norm`."""
    h = gated_residual(x, y, gate)
    acc = accumulation_dtype(*(t for t in (x, gate, weight, shift) if t is not None))
    n = F.layer_norm(
        h.to(acc),
        h.shape[-1:],
        None if weight is None else weight.to(acc),
        None if bias is None else bias.to(acc),
        eps,
    )
    if shift is not None and scale is not None:
        n = modulate(n, shift.to(acc), scale.to(acc))
    return h, n.to(x.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """``x + y * gate`` in fp32, rounded to x's dtype; ``x[B, L, D]``, ``y[B, L, D]``, ``gate[B, R, D]`` or None."""
    if gate is None:
        return (x + y).to(x.dtype)  # type promotion: a wider y is not rounded before the sum
    acc = accumulation_dtype(x, gate)
    if gate.shape[1] == 1:
        return torch.addcmul(x.to(acc), y.to(acc), gate.to(acc)).to(x.dtype)
    rows = gate.shape[1]
    h = torch.addcmul(split_rows(x.to(acc), rows), split_rows(y.to(acc), rows), gate.to(acc).unsqueeze(2))
    return h.flatten(1, 2).to(x.dtype)


def _check(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
) -> None:
    check_tokens(_OP, x)
    check_same_shape(_OP, "y", y, x, "x")
    for name, rows in (("gate", gate), ("shift", shift), ("scale", scale)):
        if rows is not None:
            check_rows(_OP, name, rows, x)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_vector(_OP, name, vector, x)
    if (shift is None) != (scale is None):
        raise ValueError(f"{_OP}: shift and scale are given together or not at all")
    if shift is not None and scale is not None and shift.shape != scale.shape:
        raise ValueError(f"{_OP}: shift {tuple(shift.shape)} and scale {tuple(scale.shape)} must have one shape")
    if bias is not None and weight is None:
        raise ValueError(f"{_OP}: bias needs weight")
    if weight is not None and shift is not None:
        raise ValueError(f"{_OP}: give either an affine (weight, bias) or a modulation (shift, scale), not both")
