"""Scaled dot-product attention in the model's ``[B, L, H, Dh]`` layout."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention without mask.

    Args:
        query: ``[B, L, H, Dh]``.
        key: ``[B, S, H, Dh]``.
        value: ``[B, S, H, Dh]``.

    Returns:
        ``[B, L, H * Dh]`` in query's dtype.
    """
    out = F.scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return out.transpose(1, 2).flatten(2)
