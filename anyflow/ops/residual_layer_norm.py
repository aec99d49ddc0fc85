"""Gated residual, then LayerNorm with affine or modulation, in one operator."""

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
    unsupported_row,
)
from anyflow.ops.gated_residual import gated_residual_backward_reference, gated_residual_reference
from anyflow.ops.layer_norm_modulate import layer_norm_backward, modulate
from anyflow.ops.library import Operator, empty_like

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
    """Residual and norm: ``h = x + y * gate``, rounded to x's dtype, and ``n = LN(h)``.

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
    """Eager reference; see :func:`residual_layer_norm`."""
    h = gated_residual_reference(x, y, gate)
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
    dh: Tensor | None,
    dn: Tensor,
    y: Tensor | None,
    h: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    eps: float,
) -> tuple[Tensor, ...]:
    """Gradients of x, y, gate, weight, bias, shift and scale, each empty where its tensor is
    absent.

    ``dx = dh + J_LN(h)^T (dn weight)``, or ``(dn (1 + scale))``, and those of y and gate follow
    from dx as in :func:`anyflow.ops.gated_residual`; the rounding of h counts as the identity.
    ``dh`` is absent where only n was used, y where its gradient is that of x.
    """
    acc = _accumulation_dtype(h, y, gate, weight, bias, shift, scale)
    wide, g = h.to(acc), dn.to(acc)
    gn = g * F.layer_norm(wide, wide.shape[-1:], eps=eps)
    affine = [
        _sum_like(total, like) for total, like in ((gn, weight), (g, bias), (g, shift), (gn, scale))
    ]
    if weight is not None:
        g = g * weight.to(acc)
    if scale is not None:
        g = (split_rows(g, scale.shape[1]) * (1 + scale.to(acc)).unsqueeze(2)).flatten(1, 2)
    dx = layer_norm_backward(g, wide, eps)
    dx = dx if dh is None else dx + dh.to(acc)
    dy, dgate = (None if y is None else dx.to(y.dtype, copy=True)), None  # results alias nothing
    if y is not None and gate is not None:
        dy, dgate = gated_residual_backward_reference(dx, y, gate)
    return tuple(h.new_empty(0) if t is None else t for t in (dx.to(h.dtype), dy, dgate, *affine))


def _accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    return accumulation_dtype(*(t for t in tensors if t is not None))


def _sum_like(tokens: Tensor, like: Tensor | None) -> Tensor | None:
    """Sum ``[B, L, D]`` over the tokens that share an element of ``[D]`` or ``[B, R, D]``."""
    if like is None:
        return None
    return (tokens.sum((0, 1)) if like.ndim == 1 else sum_rows(tokens, like.shape[1])).to(
        like.dtype
    )


def _check(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
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
    dh: Tensor | None,
    dn: Tensor,
    y: Tensor | None,
    h: Tensor,
    gate: Tensor | None,
    *operands_eps: Any,
) -> None:
    _check(h, h if y is None else y, gate, *operands_eps)
    for name, grad in (("dh", dh), ("dn", dn)):
        if grad is not None:
            check_same_shape(_OP, name, grad, h, "h")
    if gate is not None and y is None:
        raise ValueError(f"{_OP}: gate needs y")


_operator = Operator(
    _OP,
    "(Tensor x, Tensor y, Tensor? gate=None, Tensor? weight=None, Tensor? bias=None, Tensor? "
    "shift=None, "
    "Tensor? scale=None, float eps=1e-6) -> (Tensor, Tensor)",
    reference=residual_layer_norm_reference,
    fake=lambda x, *_: (empty_like(x), empty_like(x)),
    check=_check,
    unsupported=lambda *args: unsupported_row(*args[:7]),
)
_operator.register_backward(
    "(Tensor? dh, Tensor dn, Tensor? y, Tensor h, Tensor? gate, Tensor? weight, Tensor? bias, "
    "Tensor? shift, "
    "Tensor? scale, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=residual_layer_norm_backward_reference,
    fake=lambda dh, dn, y, h, *operands_eps: tuple(
        h.new_empty(0) if t is None else empty_like(t) for t in (h, y, *operands_eps[:5])
    ),
    check=_check_backward,
    unsupported=lambda *args: unsupported_row(*args[:9]),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, y, gate, *others, ctx.eps = inputs
    # Without a gate, y is not read: keep it only for its dtype, where dy is not simply dx.
    ctx.save_for_backward(
        None if gate is None and y.dtype == x.dtype else y, output[0], gate, *others
    )
    ctx.set_materialize_grads(False)  # an unused output costs no pass over zeros


def _backward(ctx: Any, dh: Tensor | None, dn: Tensor | None) -> tuple[Tensor | None, ...]:
    y, h, *operands = ctx.saved_tensors
    gate = operands[0]
    if dn is not None:
        dx, dy, *sums = _operator.backward(dh, dn, y, h, *operands, ctx.eps)
        present = (
            None if operand is None else s for operand, s in zip(operands, sums, strict=True)
        )
        return dx, dx if y is None else dy, *present, None
    if dh is None:
        return (None,) * 8
    dy, dgate = (dh if y is None else dh.to(y.dtype)), None  # n is unused: this is a gated_residual
    if gate is not None:
        dy, dgate = torch.ops.anyflow.gated_residual_backward(dh, y, gate)
    return dh, dy, dgate, *(None,) * 5


_operator.register_autograd(_setup_context, _backward)
