"""Define the transformer block: self-attention, attention to the text, and feed-forward."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from anyflow.models.attention import attention
from anyflow.models.linear import apply_linear, fuses_gelu, linear_gelu
from anyflow.models.sequence_parallel import TokenSplit
from anyflow.ops import (
    ResidualLayerNorm,
    RMSNormRope,
    gated_residual,
    gelu,
    layer_norm_modulate,
    residual_layer_norm,
)

Rotary = tuple[Tensor, Tensor]


class Attention(nn.Module):
    """Attend to the tokens themselves or to the text, with normalized queries and keys."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])
        self.norm_q = RMSNormRope(dim, num_heads, eps)
        self.norm_k = RMSNormRope(dim, num_heads, eps)
        self.attention_backend: str | None = None

    def forward(
        self,
        x: Tensor,
        source: Tensor,
        rotary: Rotary | None = None,
        split: TokenSplit | None = None,
    ) -> Tensor:
        """Return ``[B, L, D]``: tokens ``x[B, L, D]`` attend to ``source[B, S, D]``.

        With a split, x and source are this rank's tokens, and attention is among those of all
        ranks.
        """
        query, (key, value) = self.queries(x, rotary), self.keys_values(source, rotary)
        if split is None:
            out = attention(query, key, value, attention_backend=self.attention_backend)
        else:
            out = split.attention(query, key, value, self.attention_backend)
        return self.output(out)

    def queries(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        """Return the normalized and rotated queries ``[B, L, H, Dh]`` of ``x[B, L, D]``."""
        return cast(Tensor, self.norm_q(apply_linear(self.to_q, x), rotary))

    def keys_values(self, source: Tensor, rotary: Rotary | None) -> tuple[Tensor, Tensor]:
        """Return the keys, normalized and rotated, and values, ``[B, S, H, Dh]`` both."""
        key = self.norm_k(apply_linear(self.to_k, source), rotary)
        return key, apply_linear(self.to_v, source).unflatten(-1, (self.num_heads, -1))

    def output(self, out: Tensor) -> Tensor:
        """Project what attention gave, ``[B, L, H Dh]``, to ``[B, L, D]``."""
        for module in self.to_out:
            out = apply_linear(module, out)
        return out


class GELUProjection(nn.Module):
    """Apply a linear layer and tanh-GELU, in one kernel where :func:`fuses_gelu` allows it."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        if fuses_gelu(self.proj, x):
            return linear_gelu(x, self.proj.weight, self.proj.bias)
        return gelu(apply_linear(self.proj, x))


class FeedForward(nn.Module):
    """Apply Linear, tanh-GELU, Linear: ``[B, L, D] -> [B, L, D]``."""

    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList(
            [GELUProjection(dim, ffn_dim), nn.Dropout(0.0), nn.Linear(ffn_dim, dim)]
        )

    def forward(self, x: Tensor) -> Tensor:
        for module in self.net:
            x = apply_linear(module, x)
        return x


class AnyFlowTransformerBlock(nn.Module):
    """Run one block; modulation stays at one row per sample or frame.

    The rows are the block's table ``[1, 6, D]`` plus the embedded times ``[B, R, 6, D]``.
    """

    def __init__(
        self, dim: int, ffn_dim: int, num_heads: int, cross_attn_norm: bool, eps: float
    ) -> None:
        super().__init__()
        self.eps = eps
        self.attn1 = Attention(dim, num_heads, eps)
        self.attn2 = Attention(dim, num_heads, eps)
        self.norm2 = ResidualLayerNorm(dim, eps) if cross_attn_norm else None
        self.ffn = FeedForward(dim, ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        modulation: Tensor,
        rotary: Rotary,
        split: TokenSplit | None = None,
    ) -> Tensor:
        """Return the tokens after the block, ``[B, L, D]``.

        Args:
            x: ``[B, L, D]`` tokens.
            text: ``[B, S, D]`` text tokens.
            modulation: ``[B, R, 6, D]`` projection of the time embedding, R = 1 or one row per
                frame.
            rotary: ``(cos, sin)``, each ``[L, Dh / 2]``.
            split: with sequence parallelism, where the tokens of x are among those of all ranks.
        """
        rows = self.modulation_rows(modulation)
        n = layer_norm_modulate(x, rows[0], rows[1], self.eps)
        x, n = self.add_self_attention(x, self.attn1(n, n, rotary, split), rows[2])
        # one name for each branch: a second one would keep its memory
        a = self.attn2(n, text)
        x, n = residual_layer_norm(x, a, shift=rows[3], scale=rows[4], eps=self.eps)
        return gated_residual(x, self.ffn(n), rows[5])

    def modulation_rows(self, modulation: Tensor) -> tuple[Tensor, ...]:
        """Return shift, scale and gate of self-attention, then of the feed-forward, [B, R, D]."""
        wide = torch.promote_types(modulation.dtype, torch.float32)
        return (self.scale_shift_table + modulation.to(wide)).unbind(2)

    def add_self_attention(self, x: Tensor, a: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``x + a * gate`` and its norm for the attention to the text, ``[B, L, D]``."""
        if self.norm2 is None:
            x = gated_residual(x, a, gate)
            return x, x
        return cast("tuple[Tensor, Tensor]", self.norm2(x, a, gate))
