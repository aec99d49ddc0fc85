"""Normalize over the full width (RMS), split heads, and rotate interleaved pairs (RoPE)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anyflow.ops._common import (
    accumulation_dtype,
    check_device,
    check_eps,
    check_sizes,
    check_tokens,
    check_vector,
    describe,
)
from anyflow.ops.library import WHOLE_TOKENS, Operator

_OP = "rms_norm_rope"


def rms_norm_rope(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    *,
    num_heads: int,
    eps: float = 1e-6,
) -> Tensor:
    """Normalize over all of D, then rotate interleaved pairs in each head.

    ``y = x / sqrt(mean(x^2) + eps) * weight``; then for pair ``(2i, 2i + 1)`` of every head at
    token ``l``: ``(a cos - b sin, a sin + b cos)`` with ``cos[l, i]``, ``sin[l, i]``. Without
    ``cos`` and ``sin``, no rotation.

    Args:
        x: ``[B, L, D]`` projected queries or keys; the kernel takes any strides but copies where D
            is not the contiguous dimension.
        weight: ``[D]`` norm weight, any floating dtype.
        cos: ``[L, Dh / 2]`` cosines, Dh = D / num_heads; any floating dtype, read in fp32. A
            constant: no gradient.
        sin: ``[L, Dh / 2]`` sines, as cos.
        num_heads: H; divides D.
        eps: added to the mean square.

    Returns:
        ``[B, L, H, Dh]`` in x's dtype, rounded once; norm, weight and rotation are computed in
        fp32.

    Raises:
        ValueError: shapes or devices do not fit together, or a forced backend does not support
            dtypes or D.
    """
    _check(x, weight, cos, sin, num_heads, eps)
    if cos is not None and sin is not None:
        cos, sin = cos.detach(), sin.detach()
    return _operator(x, weight, cos, sin, num_heads, eps)


def _check(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    eps: float,
) -> None:
    _, _, d = check_tokens(_OP, x)
    check_vector(_OP, "weight", weight, x)
    check_eps(_OP, eps)
    if num_heads < 1 or d % num_heads:
        raise ValueError(f"{_OP}: num_heads={num_heads} must divide D={d}")
    if (cos is None) != (sin is None):
        raise ValueError(f"{_OP}: cos and sin are given together or not at all")
    for name, table in (("cos", cos), ("sin", sin)):
        if table is not None:
            _check_table(name, table, x, d // num_heads)


def _check_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    eps: float,
) -> None:
    _check(x, weight, cos, sin, num_heads, eps)
    check_sizes(_OP, "grad", grad, (*x.shape[:2], num_heads, x.shape[2] // num_heads), x)


def _check_table(name: str, table: Tensor, x: Tensor, head_dim: int) -> None:
    length = x.shape[1]
    if head_dim % 2 or table.shape != (length, head_dim // 2) or not table.is_floating_point():
        hint = ""
        if table.numel() == length * head_dim and table.shape[-1] == head_dim:
            first = 0 if name == "cos" else 1
            hint = (
                f" (every entry twice, as in diffusers: {name}.reshape({length}, {head_dim})[:, "
                f"{first}::2]; tables of rotate_half, as in Llama, turn other pairs)"
            )
        elif table.ndim > 2 and table.numel() == length * (head_dim // 2):
            hint = f": {name}.reshape({length}, {head_dim // 2})"
        raise ValueError(
            f"{_OP}: {name} must be a floating-point [L={length}, Dh/2={head_dim / 2:g}], got "
            f"{describe(table)}{hint}"
        )
    check_device(_OP, name, table, x)


def rms_norm_rope_reference(
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    eps: float = 1e-6,
) -> Tensor:
    """Compute :func:`rms_norm_rope` eagerly."""
    acc = accumulation_dtype(x, weight)
    n = F.rms_norm(x.to(acc), x.shape[-1:], weight.to(acc), eps)
    heads = n.unflatten(-1, (num_heads, x.shape[-1] // num_heads))
    if cos is not None and sin is not None:
        heads = rotate_pairs(heads, cos.to(acc), sin.to(acc))
    return heads.to(x.dtype)


def rms_norm_rope_backward_reference(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight.

    The gradient is rotated back; then ``dx = J_RMS(x)^T (grad weight)`` and
    ``dweight = sum(grad x / rms)``.
    """
    acc = accumulation_dtype(x, weight)
    grad = grad.to(acc)
    if cos is not None and sin is not None:
        grad = rotate_pairs(grad, cos.to(acc), -sin.to(acc))
    grad, n = grad.flatten(2), x.to(acc)
    rstd = torch.rsqrt(n.square().mean(-1, keepdim=True) + eps)
    n = n * rstd
    dn = grad * weight.to(acc)
    dx = rstd * (dn - n * (dn * n).mean(-1, keepdim=True))
    return dx.to(x.dtype), (grad * n).sum((0, 1)).to(weight.dtype)


def rotate_pairs(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs of ``heads[B, L, H, Dh]`` by ``cos`` and ``sin`` ``[L, Dh / 2]``."""
    # compilers fuse real arithmetic, and do not generate code for complex numbers
    if torch.compiler.is_compiling():
        even, odd = heads.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)
    # One complex product rotates every pair; the tables broadcast over batch and heads.
    pairs = torch.view_as_complex(heads.contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos, sin).unsqueeze(1)).flatten(-2)


_operator = Operator(
    rms_norm_rope_reference,
    rms_norm_rope_backward_reference,
    check=_check,
    check_backward=_check_backward,
    limit=WHOLE_TOKENS,
    fake=lambda x, weight, cos, sin, num_heads, eps: x.new_empty(
        (*x.shape[:2], num_heads, x.shape[2] // num_heads)
    ),
)
