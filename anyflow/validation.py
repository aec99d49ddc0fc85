"""Checks of user-supplied tensors, shared by the samplers and the training methods."""

from __future__ import annotations

import torch
from torch import Tensor


def require_latents(name: str, latents: Tensor) -> None:
    """ValueError unless ``latents`` is a non-empty floating-point ``[B, F, C, H, W]``."""
    if latents.ndim != 5 or not latents.is_floating_point() or latents.numel() == 0:
        raise ValueError(
            f"{name} must be a non-empty floating-point [B, F, C, H, W] tensor (frames first), "
            f"got {tuple(latents.shape)} {latents.dtype}"
        )


def require_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """ValueError unless two tensors have one shape."""
    if tensor.shape != other.shape:
        raise ValueError(f"{name} {tuple(tensor.shape)} must have the shape of {other_name} {tuple(other.shape)}")


def require_finite(name: str, tensor: Tensor) -> None:
    """ValueError if a CPU tensor holds NaN or infinity. Device tensors are not read: that would stall the GPU."""
    if tensor.device.type == "cpu" and not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} holds NaN or infinite values; check the data that produced it")


def batched_embeds(name: str, embeds: Tensor, batch_size: int) -> Tensor:
    """Prompt embeddings ``[B or 1, S, D]`` as ``[B, S, D]``; a single one is repeated, never broadcast in attention."""
    if embeds.ndim != 3 or embeds.shape[0] not in (1, batch_size):
        raise ValueError(f"{name} must be [B={batch_size} or 1, S, text_dim], got {tuple(embeds.shape)}")
    return embeds if embeds.shape[0] == batch_size else embeds.repeat(batch_size, 1, 1)
