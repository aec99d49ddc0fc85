"""Add a gated residual and normalize with affine or modulation, in one operator."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anyflow.ops._common import (
    accumulation_dtype,
    check_eps,
    check_rows,
    check_same_shape,
    check_tokens,
    check_vector,
    split_rows,
    sum_rows,
)
from anyflow.ops.gated_residual import (
    add,
    gated_residual_backward_reference,
    gated_residual_reference,
)
from anyflow.ops.layer_norm_modulate import layer_norm_backward, modulate
from anyflow.ops.library import WHOLE_TOKENS, Operator

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
    """Compute ``h = x + y * gate``, rounded to x's dtype, and ``n = LN(h)``.

    LN takes either an affine (``weight``, ``bias``) or a modulation (``shift``, ``scale``), or
    neither.

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
        ``(h, n)``, both ``[B, L, D]`` in x's dtype; statistics and products are accumulated in
        fp32.

    Raises:
        ValueError: shapes or devices do not fit together, or affine and modulation are both given.
    """
    _check(x, y, gate, weight, bias, shift, scale, eps)
    h, n = _operator(x, y, gate, weight, bias, shift, scale, eps)
    return h, n


def residual_layer_norm_reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Compute :func:`residual_layer_norm` eagerly."""
    h = add(x, y) if gate is None else gated_residual_reference(x, y, gate)
    acc = _accumulation_dtype(x, y, gate, weight, bias, shift, scale)
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


def residual_layer_norm_backward_reference(
    grad_h: Tensor | None,
    grad_n: Tensor,
    y: Tensor | None,
    h: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, y, gate, weight, bias, shift and scale.

    Each is empty where its tensor is absent. ``dx = grad_h + J_LN(h)^T (grad_n weight)``, or
    ``(grad_n (1 + scale))``, and those of y and gate follow from dx as in
    :func:`anyflow.ops.gated_residual`; the rounding of h counts as the identity. ``grad_h`` is
    absent where only n was used, y where its gradient is that of x.
    """
    acc = _accumulation_dtype(h, y, gate, weight, bias, shift, scale)
    wide, g = h.to(acc), grad_n.to(acc)
    gn = g * F.layer_norm(wide, wide.shape[-1:], eps=eps)
    dweight, dbias = _sum_like(gn, weight, h), _sum_like(g, bias, h)
    dshift, dscale = _sum_like(g, shift, h), _sum_like(gn, scale, h)
    if weight is not None:
        g = g * weight.to(acc)
    if scale is not None:
        g = (split_rows(g, scale.shape[1]) * (1 + scale.to(acc)).unsqueeze(2)).flatten(1, 2)
    dx = layer_norm_backward(g, wide, eps)
    dx = dx if grad_h is None else dx + grad_h.to(acc)
    # a copy: results alias nothing
    dy = h.new_empty(0) if y is None else dx.to(y.dtype, copy=True)
    dgate = h.new_empty(0)
    if y is not None and gate is not None:
        dy, dgate = gated_residual_backward_reference(dx, y, gate)
    return dx.to(h.dtype), dy, dgate, dweight, dbias, dshift, dscale


def _accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    return accumulation_dtype(*(t for t in tensors if t is not None))


def _sum_like(tokens: Tensor, like: Tensor | None, h: Tensor) -> Tensor:
    """Sum ``[B, L, D]`` over the tokens that share an element of ``[D]`` or ``[B, R, D]``."""
    if like is None:
        return h.new_empty(0)
    total = tokens.sum((0, 1)) if like.ndim == 1 else sum_rows(tokens, like.shape[1])
    return total.to(like.dtype)


def _check(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
) -> None:
    check_tokens(_OP, x)
    check_same_shape(_OP, "y", y, x, "x")
    check_eps(_OP, eps)
    for name, rows in (("gate", gate), ("shift", shift), ("scale", scale)):
        if rows is not None:
            check_rows(_OP, name, rows, x)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_vector(_OP, name, vector, x)
    if (shift is None) != (scale is None):
        raise ValueError(f"{_OP}: shift and scale are given together or not at all")
    if shift is not None and scale is not None and shift.shape != scale.shape:
        raise ValueError(
            f"{_OP}: shift {tuple(shift.shape)} and scale {tuple(scale.shape)} must have one shape"
        )
    if bias is not None and weight is None:
        raise ValueError(f"{_OP}: bias needs weight")
    if weight is not None and shift is not None:
        raise ValueError(
            f"{_OP}: give either an affine (weight, bias) or a modulation (shift, scale), not both"
        )


def _check_backward(
    grad_h: Tensor | None,
    grad_n: Tensor,
    y: Tensor | None,
    h: Tensor,
    gate: Tensor | None,
    *operands_eps: Any,
) -> None:
    _check(h, h if y is None else y, gate, *operands_eps)
    for name, grad in (("grad_h", grad_h), ("grad_n", grad_n)):
        if grad is not None:
            check_same_shape(_OP, name, grad, h, "h")
    if gate is not None and y is None:
        raise ValueError(f"{_OP}: gate needs y")


class _ResidualLayerNorm(Operator):
    """Keep less than every operand, and do less where the norm was not used."""

    def save(self, ctx: Any, inputs: tuple[Any, ...], results: tuple[Tensor, ...]) -> None:
        """Keep y only where the backward reads it: with a gate, or for its dtype."""
        x, y, gate, *others = inputs
        y = None if gate is None and y.dtype == x.dtype else y
        super().save(ctx, (x, y, gate, *others), results)
        ctx.set_materialize_grads(False)  # an unused result costs no pass over zeros

    def gradients(self, ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Return the gradient of every input; without that of n, those of a gated residual."""
        grad_h, grad_n = grads
        y, h, *operands = ctx.saved_tensors
        gate = operands[0]
        if grad_n is not None:
            dx, dy, *sums = self.backward(grad_h, grad_n, y, h, *operands, *ctx.constants)
            present = (
                None if operand is None else s for operand, s in zip(operands, sums, strict=True)
            )
            return dx, dx if y is None else dy, *present, None
        if grad_h is None:
            return (None,) * 8
        dy, dgate = (grad_h if y is None else grad_h.to(y.dtype)), None
        if gate is not None:
            dy, dgate = torch.ops.anyflow.gated_residual_backward(grad_h, y, gate)
        return grad_h, dy, dgate, *(None,) * 5


_operator = _ResidualLayerNorm(
    residual_layer_norm_reference,
    residual_layer_norm_backward_reference,
    check=_check,
    check_backward=_check_backward,
    limit=WHOLE_TOKENS,
    results=("h", "n"),
)
