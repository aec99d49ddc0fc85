"""Convert frames between users' types (PIL images, arrays, tensors) and the library's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor


def first_frame_pixels(image: Any, video: Any, height: int, width: int) -> Tensor | None:
    """Return first frames as ``[B or 1, F, 3, height, width]`` fp32 in [-1, 1]; None without any.

    Args:
        image: its first frame: a PIL image, ``[H, W, 3]`` array or ``[3, H, W]`` tensor.
        video: its first frames: a list of PIL images, ``[F, H, W, 3]`` array or ``[F, 3, H, W]``
            tensor; arrays and tensors may have a dimension for the batch in front.
        height, width: of the result. PIL images are resized until they cover it, and cut around the
            middle; arrays and tensors must have it.

    Raises:
        ValueError: both are given, or something else than that, or values outside [0, 255] (uint8)
            or [0, 1] (float).
    """
    from PIL import Image, ImageOps

    if image is not None and video is not None:
        raise ValueError("give either image (one frame) or video (several), not both")
    if image is None and video is None:
        return None
    name, frames = ("video", video) if image is None else ("image", image)
    if name == "image":
        frames = image[None] if isinstance(image, (np.ndarray, Tensor)) else [image]
    if isinstance(frames, (list, tuple)):
        if not frames or not all(isinstance(frame, Image.Image) for frame in frames):
            raise ValueError(
                f"{name} must be PIL images, an array or a tensor, got {_describe(frames)}"
            )
        fitted = (
            ImageOps.fit(f.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
            for f in frames
        )
        frames = np.stack([np.asarray(frame) for frame in fitted])
    if isinstance(frames, np.ndarray):
        frames = torch.from_numpy(frames.copy()).movedim(-1, -3) if frames.ndim > 3 else frames
    if (
        not isinstance(frames, Tensor)
        or frames.ndim not in (4, 5)
        or frames.shape[-3:] != (3, height, width)
    ):
        raise ValueError(
            f"{name} must be PIL images, or an array [.., {height}, {width}, 3] or a tensor "
            f"[.., 3, {height}, {width}], got {_describe(frames)}"
        )
    frames = _unit_range(name, frames)
    return (frames if frames.ndim == 5 else frames[None]) * 2 - 1


def frames_of_type(video: Tensor, output_type: str) -> Any:
    """Convert ``video[B, F, 3, H, W]`` in [0, 1] to an output type, on the CPU.

    The types are PIL images, an array ``[B, F, H, W, 3]`` and a tensor, fp32 both.

    Args:
        output_type: ``"pil"``, ``"np"`` or ``"pt"``.
    """
    from PIL import Image

    if output_type == "pil":
        return [
            [Image.fromarray(frame) for frame in frames]
            for frames in uint8_pixels(video).cpu().numpy()
        ]
    video = video.float().cpu()
    return video if output_type == "pt" else video.movedim(2, -1).numpy()


def uint8_pixels(video: Tensor) -> Tensor:
    """Convert ``video[B, F, 3, H, W]`` in [0, 1] to ``[B, F, H, W, 3]`` uint8, on its device."""
    return (video.float() * 255).round().to(torch.uint8).movedim(2, -1)


def uint8_frames(frames: Any) -> Iterator[np.ndarray]:
    """Yield each frame as ``[H, W, 3]`` uint8.

    Frames are PIL images, an ``[F, H, W, 3]`` array or an ``[F, 3, H, W]`` tensor.

    Raises:
        ValueError: something else, or values outside [0, 255] (uint8) or [0, 1] (float).
    """
    from PIL import Image

    for frame in frames:
        if isinstance(frame, Image.Image):
            yield np.asarray(frame.convert("RGB"))
            continue
        pixels = (
            torch.from_numpy(frame.copy())
            if isinstance(frame, np.ndarray)
            else frame.detach().cpu().movedim(0, -1)
        )
        if pixels.ndim != 3 or pixels.shape[-1] != 3:
            raise ValueError(
                "frames must be PIL images, or an array [F, H, W, 3] or a tensor [F, 3, H, W], "
                f"got {_describe(frames)}"
            )
        if pixels.dtype != torch.uint8:
            pixels = (_unit_range("frames", pixels) * 255).round().to(torch.uint8)
        yield np.ascontiguousarray(pixels.numpy())


def _unit_range(name: str, pixels: Tensor) -> Tensor:
    if pixels.dtype == torch.uint8:
        return pixels.float() / 255
    if not pixels.is_floating_point():
        raise ValueError(f"{name} must be uint8 in [0, 255] or float in [0, 1], got {pixels.dtype}")
    low, high = (float(v) for v in pixels.aminmax())
    if not (0 <= low and high <= 1):
        raise ValueError(f"{name}: float values must be in [0, 1], got {low:g} to {high:g}")
    return pixels.float()


def _describe(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{type(value).__name__} {tuple(shape)}"
