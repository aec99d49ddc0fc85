"""Normalize without affine, then shift and scale per row (adaLN)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anyflow.ops._common import (
    accumulation_dtype,
    check_eps,
    check_rows,
    check_same_shape,
    check_tokens,
    split_rows,
    sum_rows,
)
from anyflow.ops.library import WHOLE_TOKENS, Operator

_OP = "layer_norm_modulate"


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Compute ``LN(x) * (1 + scale) + shift``, LN over D without affine.

    Token ``l`` reads modulation row ``l // (L // R)``: R = 1 modulates a sample, R = F modulates
    each frame, and the rows are never expanded to tokens in memory.

    Args:
        x: ``[B, L, D]`` tokens; the kernel takes any strides but copies where D is not the
            contiguous dimension.
        shift: ``[B, R, D]``, any floating dtype; R divides L.
        scale: ``[B, R, D]``, as shift.
        eps: added to the variance.

    Returns:
        ``[B, L, D]`` in x's dtype; statistics and products are accumulated in fp32.

    Raises:
        ValueError: shapes or devices do not fit together, or a forced backend does not support
            dtypes or D.
    """
    _check(x, shift, scale, eps)
    return _operator(x, shift, scale, eps)


def layer_norm_modulate_reference(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> Tensor:
    """Compute :func:`layer_norm_modulate` eagerly."""
    acc = accumulation_dtype(x, shift, scale)
    n = F.layer_norm(x.to(acc), x.shape[-1:], eps=eps)
    return modulate(n, shift.to(acc), scale.to(acc)).to(x.dtype)


def layer_norm_modulate_backward_reference(
    grad: Tensor, x: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, shift and scale.

    ``dx = J_LN(x)^T (grad (1 + scale))``; the others are summed over a row's tokens.
    """
    acc = accumulation_dtype(x, shift, scale)
    grad, n = grad.to(acc), F.layer_norm(x.to(acc), x.shape[-1:], eps=eps)
    dn = (split_rows(grad, scale.shape[1]) * (1 + scale.to(acc)).unsqueeze(2)).flatten(1, 2)
    dx = layer_norm_backward(dn, x.to(acc), eps)
    rows = shift.shape[1]
    return (
        dx.to(x.dtype),
        sum_rows(grad, rows).to(shift.dtype),
        sum_rows(grad * n, rows).to(scale.dtype),
    )


def modulate(n: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return ``n * (1 + scale) + shift`` of ``n[B, L, D]`` and rows ``[B, R, D]`` of one dtype."""
    if shift.shape[1] == 1:
        return torch.addcmul(shift, n, 1 + scale)
    rows = split_rows(n, shift.shape[1])
    return torch.addcmul(shift.unsqueeze(2), rows, (1 + scale).unsqueeze(2)).flatten(1, 2)


def layer_norm_backward(grad: Tensor, x: Tensor, eps: float) -> Tensor:
    """Return the gradient of x through LayerNorm over the last dimension without affine."""
    centered = x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    n = centered * rstd
    return rstd * (grad - grad.mean(-1, keepdim=True) - n * (grad * n).mean(-1, keepdim=True))


def _check(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> None:
    check_tokens(_OP, x)
    check_rows(_OP, "shift", shift, x)
    check_rows(_OP, "scale", scale, x)
    if shift.shape != scale.shape:
        raise ValueError(
            f"{_OP}: shift {tuple(shift.shape)} and scale {tuple(scale.shape)} must have one shape"
        )
    check_eps(_OP, eps)


def _check_backward(grad: Tensor, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> None:
    _check(x, shift, scale, eps)
    check_same_shape(_OP, "grad", grad, x, "x")


_operator = Operator(
    layer_norm_modulate_reference,
    layer_norm_modulate_backward_reference,
    check=_check,
    check_backward=_check_backward,
    limit=WHOLE_TOKENS,
)
