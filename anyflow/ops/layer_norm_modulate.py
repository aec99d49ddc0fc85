"""LayerNorm without affine, followed by per-row shift and scale (adaLN)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anyflow.ops._common import accumulation_dtype, check_rows, check_tokens, split_rows
from anyflow.ops.backend import register, resolve

_OP = "layer_norm_modulate"


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Modulated LayerNorm: ``LN(x) * (1 + scale) + shift``, LN over D without affine (DESIGN section 3).

    Token ``l`` reads modulation row ``l // (L // R)``: R = 1 modulates a sample, R = F modulates each frame, and the
    rows are never expanded to tokens in memory.

    Args:
        x: ``[B, L, D]`` tokens.
        shift: ``[B, R, D]``, any floating dtype; R divides L.
        scale: ``[B, R, D]``, as shift.
        eps: added to the variance.

    Returns:
        ``[B, L, D]`` in x's dtype; statistics and products are accumulated in fp32.

    Raises:
        ValueError: shapes or devices do not fit together.
    """
    check_tokens(_OP, x)
    check_rows(_OP, "shift", shift, x)
    check_rows(_OP, "scale", scale, x)
    if shift.shape != scale.shape:
        raise ValueError(f"{_OP}: shift {tuple(shift.shape)} and scale {tuple(scale.shape)} must have one shape")
    return resolve(_OP)(x, shift, scale, eps)


@register(_OP, "eager")
def layer_norm_modulate_reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Eager reference; see :func:`layer_norm_modulate`."""
    acc = accumulation_dtype(x, shift, scale)
    n = F.layer_norm(x.to(acc), x.shape[-1:], eps=eps)
    return modulate(n, shift.to(acc), scale.to(acc)).to(x.dtype)


def modulate(n: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``n * (1 + scale) + shift`` for ``n[B, L, D]`` and rows ``[B, R, D]`` of one dtype."""
    if shift.shape[1] == 1:
        return torch.addcmul(shift, n, 1 + scale)
    rows = split_rows(n, shift.shape[1])
    return torch.addcmul(shift.unsqueeze(2), rows, (1 + scale).unsqueeze(2)).flatten(1, 2)
