"""Provide the operators as modules, with the parameter names of the layers they stand for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyflow.ops.attention import attention
from anyflow.ops.gated_residual import gated_residual
from anyflow.ops.gelu import gelu
from anyflow.ops.layer_norm_modulate import layer_norm_modulate
from anyflow.ops.linear import linear
from anyflow.ops.residual_layer_norm import residual_layer_norm
from anyflow.ops.rms_norm_rope import rms_norm_rope


class LayerNormModulate(nn.Module):
    """Normalize and modulate tokens: :func:`anyflow.ops.layer_norm_modulate`.

    The module has no parameters. It stands for ``LayerNorm(D, elementwise_affine=False)`` and the
    two passes ``* (1 + scale) + shift`` after it.

    Args:
        eps: added to the variance.
    """

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Map ``x[B, L, D]`` with rows ``shift``, ``scale`` ``[B, R, D]`` to ``[B, L, D]``."""
        return layer_norm_modulate(x, shift, scale, self.eps)


class ResidualLayerNorm(nn.Module):
    """Add a gated branch and normalize the sum: :func:`anyflow.ops.residual_layer_norm`.

    ``weight`` and ``bias`` are those of the ``LayerNorm`` that the module stands for.

    Args:
        dim: D.
        eps: added to the variance.
        elementwise_affine: False for a norm without parameters, which can be modulated instead.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, dim: int, eps: float = 1e-6, elementwise_affine: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.register_parameter(
            "weight", nn.Parameter(torch.ones(dim)) if elementwise_affine else None
        )
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(dim)) if elementwise_affine else None
        )

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        gate: Tensor | None = None,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return ``h = x + y * gate`` and its norm, ``[B, L, D]``, for modulation ``[B, R, D]``."""
        return residual_layer_norm(
            x, y, gate, weight=self.weight, bias=self.bias, shift=shift, scale=scale, eps=self.eps
        )


class GatedResidual(nn.Module):
    """Add a branch through a gate, without parameters: :func:`anyflow.ops.gated_residual`."""

    def forward(self, x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
        """Map ``x[B, L, D]``, ``y[B, L, D]`` and rows ``gate[B, R, D]`` to ``x + y * gate``."""
        return gated_residual(x, y, gate)


class RMSNormRope(nn.Module):
    """Normalize queries or keys, split heads, rotate pairs: :func:`anyflow.ops.rms_norm_rope`.

    ``weight`` is that of the ``RMSNorm(D)`` that the module stands for.

    Args:
        dim: D, all heads together.
        num_heads: H; divides D.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, num_heads: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.num_heads, self.eps = num_heads, eps

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Map ``x[B, L, D]`` to ``[B, L, H, Dh]``; rotary: cos and sin ``[L, Dh / 2]``, or None."""
        cos, sin = (None, None) if rotary is None else rotary
        return rms_norm_rope(x, self.weight, cos, sin, num_heads=self.num_heads, eps=self.eps)


class GELUTanh(nn.Module):
    """Apply :func:`anyflow.ops.gelu`, in place of ``nn.GELU(approximate="tanh")``."""

    def forward(self, x: Tensor) -> Tensor:
        """Map a tensor of any shape to one like it."""
        return gelu(x)


class DotProductAttention(nn.Module):
    """Apply softmax attention without mask or parameters: :func:`anyflow.ops.attention`."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Map ``q[B, L, H, Dh]`` and k, v ``[B, S, H, Dh]`` to ``[B, L, H, Dh]``."""
        return attention(q, k, v)


class Linear(nn.Linear):
    """Apply :func:`anyflow.ops.linear`, with the arguments and parameters of ``nn.Linear``."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., K]`` to ``[..., N]``."""
        if type(self.weight) is not nn.Parameter:  # quantized or sharded: no kernel takes it
            return F.linear(input, self.weight, self.bias)
        return linear(input, self.weight, self.bias)
