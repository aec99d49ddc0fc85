"""Estimate optical flow by OpenCV, and how dynamic a video is by it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anyflow.evaluation.video_metrics.values import gray_frames, levels, unit_videos
from anyflow.utils.packages import missing
from anyflow.utils.validation import require_positive

# OpenCV's dense inverse search refuses frames that are smaller.
LEAST_SIDE = 12
# VBench's choices: the share of pixels that count, the rate at which it compares frames, and the
# length of a flow that is motion, as a share of the shorter side (6 pixels of 256).
TOP_SHARE = 0.05
FRAMES_PER_SECOND = 8.0
MOVING = 6.0 / 256.0


def optical_flow(videos: Tensor) -> Tensor:
    """Compute the optical flow between successive frames, in pixels per frame.

    The method is OpenCV's dense inverse search (Kroeger et al. 2016, arXiv 1603.03590, preset
    ``MEDIUM``) on 8-bit gray levels. The method has no weights. What moves farther than about a
    fifth of the shorter side in one frame is not followed.

    Args:
        videos: ``[N, F, C, H, W]`` with F >= 2 and H, W >= 12, floating-point in [0, 1] or uint8; C
            is 1 or 3.

    Returns:
        ``[N, F - 1, 2, H, W]`` float32 on the CPU: how far right (0) and how far down (1) the pixel
        of a frame lies in the next one.

    Raises:
        ImportError: OpenCV is missing.
        ValueError: another shape or dtype, too few frames or pixels, NaN or infinity, or
            floating-point values outside [0, 1].
    """
    gray = _gray_levels(videos)
    count, frames, height, width = gray.shape
    flows = torch.empty(count, frames - 1, 2, height, width)
    for video, flow in zip(gray, flows, strict=True):
        for index, pair in enumerate(_pair_flows(video)):
            flow[index] = torch.from_numpy(pair).permute(2, 0, 1)
    return flows


def flow_peaks(videos: Tensor) -> Tensor:
    """Compute the mean length of the longest 5 % of the flow vectors between successive frames.

    VBench reads this number from RAFT's flow, in pixels; here it comes from :func:`optical_flow`
    and is divided by the shorter side, so that videos of different sizes compare.

    Args:
        videos: see :func:`optical_flow`.

    Returns:
        ``[N, F - 1]`` float64, in shorter sides per frame.

    Raises:
        ImportError, ValueError: see :func:`optical_flow`.
    """
    gray = _gray_levels(videos)
    height, width = gray.shape[2:]
    top = max(1, int(TOP_SHARE * height * width))
    peaks = [[_mean_of_largest(flow, top) for flow in _pair_flows(video)] for video in gray]
    return torch.tensor(peaks, dtype=torch.float64) / min(height, width)


def dynamic_degree(videos: Tensor) -> Tensor:
    """Compute how much the fastest parts of each video move: :func:`flow_peaks`, averaged.

    Args:
        videos: see :func:`optical_flow`.

    Returns:
        ``[N]`` float64, in shorter sides per frame; 0 for a frozen video.

    Raises:
        ImportError, ValueError: see :func:`optical_flow`.
    """
    return flow_peaks(videos).mean(dim=1)


def is_dynamic(videos: Tensor, fps: float) -> Tensor:
    """Decide for each video whether it moves, by the rule of VBench's ``dynamic_degree``.

    Every ``round(fps / 8)``-th frame is looked at. A video moves if at least a quarter of the
    frames, but one pair in any case, have a peak above ``6 / 256`` of the shorter side (and
    ``8 / fps`` times as much where fps < 8). VBench's score of a set is the share of videos that
    move. VBench's flow is RAFT's: near the threshold the two may decide differently.

    Args:
        videos: see :func:`optical_flow`.
        fps: frames per second of the videos.

    Returns:
        ``[N]`` bool.

    Raises:
        ValueError: see :func:`optical_flow`; or fps is not a positive number, or so high that fewer
            than two frames remain.
    """
    require_positive("fps", fps)
    frames = unit_videos(videos, least_frames=2)
    seen = frames[:, :: max(1, round(fps / FRAMES_PER_SECOND))]
    if seen.shape[1] < 2:
        raise ValueError(
            f"videos of {frames.shape[1]} frames at fps={fps:g} are too short: "
            f"frames are compared at {FRAMES_PER_SECOND:g} per second"
        )
    moving = flow_peaks(seen) > MOVING * max(1.0, FRAMES_PER_SECOND / fps)
    return moving.sum(dim=1) >= max(1, round(seen.shape[1] / 4))


def _gray_levels(videos: Tensor) -> np.ndarray:
    frames = unit_videos(videos, least_frames=2, least_side=LEAST_SIDE)
    return np.ascontiguousarray(levels(gray_frames(frames)).cpu().numpy())


def _pair_flows(frames: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the flow ``[H, W, 2]`` (right, down) from each of the frames to the next.

    The frames are ``[F, H, W]`` uint8.
    """
    cv2 = _import_cv2()
    method = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    for first, second in itertools.pairwise(frames):
        yield method.calc(first, second, None)


def _mean_of_largest(flow: np.ndarray, count: int) -> float:
    lengths = np.linalg.norm(flow, axis=-1).ravel()
    return float(np.partition(lengths, -count)[-count:].mean(dtype=np.float64))


def _import_cv2() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise ImportError(missing("optical flow", "opencv-python-headless")) from error
    return cv2
