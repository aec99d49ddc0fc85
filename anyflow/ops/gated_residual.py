"""A residual branch, added through a per-row gate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyflow.ops._common import (
    accumulation_dtype,
    check_rows,
    check_same_shape,
    check_tokens,
    split_rows,
    sum_rows,
    unsupported_row,
)
from anyflow.ops.library import Operator, empty_like

_OP = "gated_residual"


def gated_residual(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """Gated residual: ``x + y * gate``, rounded once, to x's dtype.

    Token ``l`` reads gate row ``l // (L // R)``, as in :func:`anyflow.ops.layer_norm_modulate`.
    This is the first result of :func:`anyflow.ops.residual_layer_norm`, for a residual that no norm
    follows.

    Args:
        x: ``[B, L, D]`` residual stream; the kernel takes any strides but copies where D is not the
            contiguous dimension.
        y: ``[B, L, D]`` branch output, any floating dtype.
        gate: ``[B, R, D]``, any floating dtype, or None for a plain addition; R divides L.

    Returns:
        ``[B, L, D]`` in x's dtype; the sum is formed in fp32.

    Raises:
        ValueError: shapes or devices do not fit together, or a forced backend does not support
            dtypes or D.
    """
    _check_branch(x, y)
    if gate is None:
        # on every backend: torch's addition is as good as a kernel of ours
        return gated_residual_reference(x, y)
    check_rows(_OP, "gate", gate, x)
    return _operator(x, y, gate)


def gated_residual_reference(x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
    """Eager reference; see :func:`gated_residual`."""
    if gate is None:
        return (x + y).to(x.dtype)  # type promotion: a wider y is not rounded before the sum
    acc = accumulation_dtype(x, y, gate)
    x_acc, y_acc, gate_acc, rows = x.to(acc), y.to(acc), gate.to(acc), gate.shape[1]
    if rows == 1:
        return torch.addcmul(x_acc, y_acc, gate_acc).to(x.dtype)
    h = torch.addcmul(split_rows(x_acc, rows), split_rows(y_acc, rows), gate_acc.unsqueeze(2))
    return h.flatten(1, 2).to(x.dtype)


def gated_residual_backward_reference(
    grad: Tensor, y: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of y and gate, ``grad * gate`` and ``grad * y`` summed over a row's tokens; that of
    x is ``grad``.
    """
    acc = accumulation_dtype(grad, y, gate)
    wide, rows = grad.to(acc), gate.shape[1]
    dy = (split_rows(wide, rows) * gate.to(acc).unsqueeze(2)).flatten(1, 2)
    return dy.to(y.dtype), sum_rows(wide * y.to(acc), rows).to(gate.dtype)


def _check_branch(x: Tensor, y: Tensor) -> None:
    check_tokens(_OP, x)
    check_same_shape(_OP, "y", y, x, "x")


def _check(x: Tensor, y: Tensor, gate: Tensor) -> None:
    _check_branch(x, y)
    check_rows(_OP, "gate", gate, x)


_operator = Operator(
    _OP,
    "(Tensor x, Tensor y, Tensor gate) -> Tensor",
    reference=gated_residual_reference,
    fake=lambda x, y, gate: empty_like(x),
    check=_check,
    unsupported=lambda x, y, gate: unsupported_row(x, y, gate),
)
_operator.register_backward(
    "(Tensor grad, Tensor y, Tensor gate) -> (Tensor, Tensor)",
    reference=gated_residual_backward_reference,
    fake=lambda grad, y, gate: (empty_like(y), empty_like(gate)),
    check=_check,
    unsupported=lambda grad, y, gate: unsupported_row(grad, y, gate),
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return grad, *_operator.backward(grad, *ctx.saved_tensors)


_operator.register_autograd(_setup_context, _backward)
