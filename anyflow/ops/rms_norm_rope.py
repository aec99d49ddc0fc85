"""RMS norm over the full width, head split, and rotary embedding of interleaved pairs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anyflow.ops._common import accumulation_dtype, check_device, check_tokens, check_vector, describe
from anyflow.ops.backend import register, resolve

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
    """RMS norm over all of D, then rotation of interleaved pairs in each head (SPEC A).

    ``y = x / sqrt(mean(x^2) + eps) * weight``; then for pair ``(2i, 2i + 1)`` of every head at token ``l``:
    ``(a cos - b sin, a sin + b cos)`` with ``cos[l, i]``, ``sin[l, i]``. Without ``cos`` and ``sin``, no rotation.

    Args:
        x: ``[B, L, D]`` projected queries or keys.
        weight: ``[D]`` norm weight.
        cos: ``[L, Dh / 2]`` cosines, Dh = D / num_heads.
        sin: ``[L, Dh / 2]`` sines.
        num_heads: H; divides D.
        eps: added to the mean square.

    Returns:
        ``[B, L, H, Dh]`` in x's dtype; accumulated in fp32.

    Raises:
        ValueError: shapes or devices do not fit together.
    """
    _, length, d = check_tokens(_OP, x)
    check_vector(_OP, "weight", weight, x)
    if num_heads < 1 or d % num_heads:
        raise ValueError(f"{_OP}: num_heads={num_heads} must divide D={d}")
    if (cos is None) != (sin is None):
        raise ValueError(f"{_OP}: cos and sin are given together or not at all")
    for name, table in (("cos", cos), ("sin", sin)):
        if table is None:
            continue
        head_dim = d // num_heads
        if head_dim % 2 or table.shape != (length, head_dim // 2):
            raise ValueError(f"{_OP}: {name} must be [L={length}, Dh/2={head_dim / 2:g}], got {describe(table)}")
        check_device(_OP, name, table, x)
    return resolve(_OP)(x, weight, cos, sin, num_heads, eps)


@register(_OP, "eager")
def rms_norm_rope_reference(
    x: Tensor, weight: Tensor, cos: Tensor | None, sin: Tensor | None, num_heads: int, eps: float
) -> Tensor:
    """Eager reference; see :func:`rms_norm_rope`."""
    acc = accumulation_dtype(x, weight)
    n = F.rms_norm(x.to(acc), x.shape[-1:], weight.to(acc), eps)
    heads = n.unflatten(-1, (num_heads, x.shape[-1] // num_heads))
    if cos is not None and sin is not None:
        # One complex product rotates every pair; the tables broadcast over batch and heads.
        phase = torch.complex(cos.to(acc), sin.to(acc)).unsqueeze(1)
        pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)))
        heads = torch.view_as_real(pairs * phase).flatten(-2)
    return heads.to(x.dtype)
