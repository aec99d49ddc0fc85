"""Measure pixels alone: the peak signal-to-noise ratio and temporal flicker."""

from __future__ import annotations

import torch
from torch import Tensor

from anyflow.evaluation.video_metrics.values import require_equal_shapes, unit_videos

MAX_PSNR = 100.0  # dB, in place of the infinity of equal videos, which JSON does not have


def psnr(videos: Tensor, references: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio of each video to its reference, in dB.

    PSNR is ``10 log10(1 / MSE)``, with values in [0, 1] and the mean squared error over all frames,
    channels and pixels of the video: the "average" of FFmpeg's ``psnr`` filter. The mean of the
    ratios of single frames is larger, and infinite as soon as one frame is reproduced exactly.

    Args:
        videos: ``[N, F, C, H, W]``, floating-point in [0, 1] or uint8; C is 1 or 3.
        references: videos of the same shape, in the same range or as uint8.

    Returns:
        ``[N]`` float64, higher is closer; infinity where a video equals its reference.

    Raises:
        ValueError: shapes that differ, or what :func:`flicker` refuses.
    """
    first, second = unit_videos(videos), unit_videos(references, "references")
    require_equal_shapes(first, second)
    error = (first - second.to(first.device)).square().mean(dim=(1, 2, 3, 4), dtype=torch.float64)
    return -10 * torch.log10(error)


def flicker(videos: Tensor) -> Tensor:
    """Compute the flicker of each video, the mean absolute difference of successive frames.

    VBench's ``temporal_flickering`` is ``1 - flicker``, computed on levels 0..255 and divided by
    255. The metric is meant for scenes that should stand still: motion changes pixels, too.

    Args:
        videos: ``[N, F, C, H, W]`` with F >= 2, floating-point in [0, 1] or uint8; C is 1 or 3.

    Returns:
        ``[N]`` float64 in [0, 1]; 0 for a frozen video.

    Raises:
        ValueError: another shape or dtype, fewer than two frames, NaN or infinity, or
            floating-point values outside [0, 1].
    """
    frames = unit_videos(videos, least_frames=2)
    return (frames[:, 1:] - frames[:, :-1]).abs().mean(dim=(1, 2, 3, 4), dtype=torch.float64)
