"""Check the videos that metrics are given, and convert their pixels to one range."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in ITU-R BT.601, OpenCV and JPEG


def unit_videos(
    videos: Any, name: str = "videos", *, least_frames: int = 1, least_side: int = 1
) -> Tensor:
    """Return videos ``[N, F, C, H, W]`` as floating-point numbers in [0, 1], on their device.

    Args:
        videos: floating-point in [0, 1], or uint8 in 0..255; C is 1 or 3. float64 stays float64,
            and everything else becomes float32.
        name: name of the videos in errors.
        least_frames: frames that a metric needs.
        least_side: height and width that a metric needs, in pixels.

    Raises:
        ValueError: another type, shape or dtype, too few frames or pixels, NaN or infinity, or
            floating-point values outside [0, 1].
    """
    if not isinstance(videos, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(videos).__name__}")
    if videos.ndim != 5 or videos.shape[2] not in (1, 3) or videos.numel() == 0:
        raise ValueError(
            f"{name} must be a non-empty [N, F, C, H, W] tensor with 1 or 3 channels C, got shape "
            f"{tuple(videos.shape)}"
        )
    if videos.shape[1] < least_frames:
        raise ValueError(f"{name} must have at least {least_frames} frames, got {videos.shape[1]}")
    if min(videos.shape[3:]) < least_side:
        raise ValueError(
            f"{name} must be at least {least_side} pixels high and wide, got "
            f"{tuple(videos.shape[3:])}"
        )
    if videos.dtype == torch.uint8:
        return videos.float() / 255
    if not videos.is_floating_point():
        raise ValueError(
            f"{name} must be floating-point in [0, 1] or uint8 in 0..255, got {videos.dtype}"
        )
    low, high = (value.item() for value in torch.aminmax(videos.detach()))
    if not 0 <= low <= high <= 1:  # false for NaN, too
        if not torch.isfinite(videos).all():
            raise ValueError(f"{name} must be finite, and hold NaN or infinity")
        raise ValueError(
            f"{name} must lie in [0, 1] where they are floating-point, got {low:g}..{high:g}"
        )
    return videos.detach() if videos.dtype == torch.float64 else videos.detach().float()


def require_equal_shapes(videos: Tensor, references: Tensor) -> None:
    """Raise a ValueError unless videos and references have one shape."""
    if videos.shape != references.shape:
        raise ValueError(
            f"references must have the shape of videos, {tuple(videos.shape)}, got "
            f"{tuple(references.shape)}"
        )


def gray_frames(videos: Tensor) -> Tensor:
    """Return the gray levels ``[N, F, H, W]`` of videos: luma of BT.601 where C = 3.

    The videos are ``[N, F, C, H, W]``.
    """
    if videos.shape[2] == 1:
        return videos[:, :, 0]
    weights = torch.tensor(_LUMA, dtype=videos.dtype, device=videos.device)
    return torch.einsum("nfchw,c->nfhw", videos, weights)


def levels(values: Tensor) -> Tensor:
    """Return values in [0, 1] as uint8 levels 0..255, rounded to the nearest."""
    return (values * 255).round().to(torch.uint8)
