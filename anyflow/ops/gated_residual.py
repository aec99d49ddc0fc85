"""Add a residual branch through a per-row gate."""

from __future__ import annotations

from torch import Tensor, addcmul

from anyflow.ops._common import (
    accumulation_dtype,
    check_rows,
    check_same_shape,
    check_tokens,
    split_rows,
    sum_rows,
)
from anyflow.ops.library import WHOLE_TOKENS, Operator

_OP = "gated_residual"


def gated_residual(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """Compute ``x + y * gate``, rounded once, to x's dtype.

    Token ``l`` reads gate row ``l // (L // R)``, as in :func:`anyflow.ops.layer_norm_modulate`. The
    result is the first one of :func:`anyflow.ops.residual_layer_norm`, for a residual that no norm
    follows.

    Args:
        x: ``[B, L, D]`` residual stream; the kernel takes any strides but copies where D is not the
            contiguous dimension.
        y: ``[B, L, D]`` branch output, any floating dtype.
        gate: ``[B, R, D]``, any floating dtype, or None for torch's plain addition on every
            backend; R divides L.

    Returns:
        ``[B, L, D]`` in x's dtype; the sum is formed in fp32.

    Raises:
        ValueError: shapes or devices do not fit together, or a forced backend does not support
            dtypes or D.
    """
    if gate is None:
        _check_branch(x, y)
        return add(x, y)
    _check(x, y, gate)
    return _operator(x, y, gate)


def gated_residual_reference(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """Compute :func:`gated_residual` eagerly."""
    acc = accumulation_dtype(x, y, gate)
    x_acc, y_acc, gate_acc, rows = x.to(acc), y.to(acc), gate.to(acc), gate.shape[1]
    if rows == 1:
        return addcmul(x_acc, y_acc, gate_acc).to(x.dtype)
    h = addcmul(split_rows(x_acc, rows), split_rows(y_acc, rows), gate_acc.unsqueeze(2))
    return h.flatten(1, 2).to(x.dtype)


def gated_residual_backward_reference(
    grad: Tensor, y: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of y and gate; that of x is ``grad``.

    They are ``grad * gate``, and ``grad * y`` summed over a row's tokens.
    """
    acc = accumulation_dtype(grad, y, gate)
    wide, rows = grad.to(acc), gate.shape[1]
    dy = (split_rows(wide, rows) * gate.to(acc).unsqueeze(2)).flatten(1, 2)
    return dy.to(y.dtype), sum_rows(wide * y.to(acc), rows).to(gate.dtype)


def add(x: Tensor, y: Tensor) -> Tensor:
    """Add a branch without a gate, in x's dtype."""
    return (x + y).to(x.dtype)  # type promotion: a wider y is not rounded before the sum


def _check_branch(x: Tensor, y: Tensor) -> None:
    check_tokens(_OP, x)
    check_same_shape(_OP, "y", y, x, "x")


def _check(x: Tensor, y: Tensor, gate: Tensor) -> None:
    _check_branch(x, y)
    check_rows(_OP, "gate", gate, x)


_operator = Operator(
    gated_residual_reference,
    gated_residual_backward_reference,
    check=_check,
    check_backward=_check,
    limit=WHOLE_TOKENS,
    passed="x",
)
