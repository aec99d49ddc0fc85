"""Fold space and time into channels: a lossless, orthogonal stand-in for a video VAE."""

from __future__ import annotations

from torch import Tensor


def pixel_unshuffle_3d(video: Tensor, factor: tuple[int, int, int] = (2, 2, 2)) -> Tensor:
    """Fold blocks of ``factor`` = (frames, rows, columns) pixels into channels.

    ``video[B, F, C, H, W] -> [B, F/f, C*f*h*w, H/h, W/w]``. Channels are ordered (C, frame, row,
    column), the last fastest. The values are permuted, so norms, means and variances are kept;
    :func:`pixel_shuffle_3d` undoes it.

    Raises ``ValueError`` when the input is not 5-D or a size is not divisible by its factor.
    """
    ff, fh, fw = _checked_factor(factor)
    if video.ndim != 5:
        raise ValueError(f"video must be [B, F, C, H, W], got shape {tuple(video.shape)}")
    batch, frames, channels, height, width = video.shape
    for name, size, by in (("frames", frames, ff), ("height", height, fh), ("width", width, fw)):
        if size % by:
            raise ValueError(f"{name} ({size}) must be divisible by its factor ({by})")
    blocks = video.reshape(batch, frames // ff, ff, channels, height // fh, fh, width // fw, fw)
    blocks = blocks.permute(0, 1, 3, 2, 5, 7, 4, 6)
    return blocks.reshape(batch, frames // ff, channels * ff * fh * fw, height // fh, width // fw)


def pixel_shuffle_3d(latents: Tensor, factor: tuple[int, int, int] = (2, 2, 2)) -> Tensor:
    """Invert :func:`pixel_unshuffle_3d` exactly.

    ``latents[B, F, C*f*h*w, H, W] -> [B, F*f, C, H*h, W*w]``.

    Raises ``ValueError`` when the input is not 5-D or its channels are not divisible by the product
    of ``factor``.
    """
    ff, fh, fw = _checked_factor(factor)
    if latents.ndim != 5:
        raise ValueError(f"latents must be [B, F, C, H, W], got shape {tuple(latents.shape)}")
    batch, frames, packed, height, width = latents.shape
    if packed % (ff * fh * fw):
        raise ValueError(
            f"channels ({packed}) must be divisible by the product of factor {factor} "
            f"({ff * fh * fw})"
        )
    channels = packed // (ff * fh * fw)
    blocks = latents.reshape(batch, frames, channels, ff, fh, fw, height, width)
    blocks = blocks.permute(0, 1, 3, 2, 6, 4, 7, 5)
    return blocks.reshape(batch, frames * ff, channels, height * fh, width * fw)


def _checked_factor(factor: tuple[int, int, int]) -> tuple[int, int, int]:
    if len(factor) != 3 or any(not isinstance(f, int) or f < 1 for f in factor):
        raise ValueError(
            f"factor must be three integers >= 1 (frames, rows, columns), got {factor!r}"
        )
    return factor
