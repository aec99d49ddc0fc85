"""Measure the motion in videos of any size, by optical flow in PyTorch alone.

The mean absolute difference of frames is not a measure of motion: it halves with the contrast,
grows less than the speed, and reads noise that does not move as motion.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from anyflow.evaluation.video_metrics.values import gray_frames, unit_videos

_WINDOW = (1.0, 6.0, 15.0, 20.0, 15.0, 6.0, 1.0)  # pixels that are taken to move together
_BLUR = (1.0, 2.0, 1.0)
_COARSEST = 12  # pixels of the shorter side that halving stops above
_ITERATIONS = 5  # steps of the solver at each size
_DAMPING = 1e-2  # share of the mean gradient energy; keeps flow at 0 where nothing can be seen
_PIXELS = 2**18  # pixels in one piece of work, which bounds memory


def motion(videos: Tensor) -> Tensor:
    """Compute the mean speed of what can be seen to move in each video, in pixels per frame.

    The flow is that of Lucas and Kanade (1981) with a 7-tap binomial window, refined by warping
    from coarse to fine. The mean of its lengths is weighted by the squared gradient of the gray
    levels, so that flat areas, where motion cannot be seen, do not count; then the speed is
    averaged over time. The function needs no weights and no package beside PyTorch, runs on the
    device of the videos, and does not depend on their contrast. Noise in a video that stands still
    is read as some motion, and only up to about a quarter of the shorter side per frame is
    followed.

    Args:
        videos: ``[N, F, C, H, W]`` with F >= 2 and H, W >= 4, floating-point in [0, 1] or uint8; C
            is 1 or 3.

    Returns:
        ``[N]`` float64; 0 for a frozen video.

    Raises:
        ValueError: another shape or dtype, too few frames or pixels, NaN or infinity, or
            floating-point values outside [0, 1].
    """
    gray = gray_frames(unit_videos(videos, least_frames=2, least_side=4)).float()
    count, frames, height, width = gray.shape
    first, second = gray[:, :-1].reshape(-1, height, width), gray[:, 1:].reshape(-1, height, width)
    piece = max(1, _PIXELS // (height * width))
    speeds = [
        _mean_speeds(a, b) for a, b in zip(first.split(piece), second.split(piece), strict=True)
    ]
    return torch.cat(speeds).view(count, frames - 1).mean(dim=1)


def relative_motion(videos: Tensor) -> Tensor:
    """Compute :func:`motion` in shorter sides per frame, by which videos of any sizes compare.

    Args:
        videos: see :func:`motion`.

    Returns:
        ``[N]`` float64; 0 for a frozen video.

    Raises:
        ValueError: see :func:`motion`.
    """
    return motion(videos) / min(videos.shape[-2:])


def _mean_speeds(first: Tensor, second: Tensor) -> Tensor:
    """Return the mean speed ``[B]`` float64 of each frame pair, weighted by the gradient energy."""
    flow, energy = _lucas_kanade(first, second)
    moved = (flow.norm(dim=1) * energy).sum(dim=(1, 2), dtype=torch.float64)
    seen = energy.sum(dim=(1, 2), dtype=torch.float64)
    return moved / seen.clamp(min=torch.finfo(seen.dtype).tiny)  # 0 where nothing can be seen


def _lucas_kanade(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Return flow ``[B, 2, H, W]`` (right, down) between frames, and the gradient energy.

    The frames are ``[B, H, W]``.
    """
    pyramid = [(_smooth(first, _BLUR), _smooth(second, _BLUR))]
    while min(pyramid[-1][0].shape[1:]) >= 2 * _COARSEST:
        pyramid.append((_halve(pyramid[-1][0]), _halve(pyramid[-1][1])))
    flow = first.new_zeros(first.shape[0], 2, *pyramid[-1][0].shape[1:])
    energy = flow[:, 0]
    for a, b in reversed(pyramid):
        if flow.shape[2:] != a.shape[1:]:
            flow = 2 * F.interpolate(flow, size=a.shape[1:], mode="bilinear", align_corners=False)
        a, _ = _warp(a, torch.zeros_like(flow))  # rounded as b will be: equal frames give exactly 0
        for _ in range(_ITERATIONS):
            step, energy = _flow_step(a, b, flow)
            flow = _smooth(flow + step.clamp(-1, 1), _WINDOW)
    return flow, energy


def _flow_step(first: Tensor, second: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Solve the normal equations of one linearization around ``flow``.

    Returns the step of the flow, and the energy.
    """
    warped, inside = _warp(second, flow)
    down, right = torch.gradient((first + warped) / 2, dim=(1, 2))
    change = warped - first

    def window(product: Tensor) -> Tensor:
        return _smooth(product * inside, _WINDOW)

    xx, xy, yy = window(right * right), window(right * down), window(down * down)
    tx, ty = window(right * change), window(down * change)
    energy = xx + yy
    damping = _DAMPING * energy.mean(dim=(1, 2), keepdim=True) + 1e-12
    xx, yy = xx + damping, yy + damping
    determinant = xx * yy - xy * xy
    step = torch.stack([xy * ty - yy * tx, xy * tx - xx * ty], dim=1) / determinant[:, None]
    return step, energy


def _warp(frames: Tensor, flow: Tensor) -> tuple[Tensor, Tensor]:
    """Look up ``frames[B, H, W]`` where ``flow`` points, and mark what lies inside of the frame."""
    height, width = frames.shape[1:]
    x = torch.arange(width, device=flow.device) + flow[:, 0]
    y = torch.arange(height, device=flow.device)[:, None] + flow[:, 1]
    grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=-1)
    found = F.grid_sample(frames[:, None], grid, padding_mode="border", align_corners=True)
    return found[:, 0], (grid.abs() <= 1).all(dim=-1).to(frames.dtype)


def _smooth(values: Tensor, taps: tuple[float, ...]) -> Tensor:
    """Convolve the last two dimensions with a separable kernel; the border is repeated."""
    kernel = torch.tensor(taps, dtype=values.dtype, device=values.device)
    kernel = kernel / kernel.sum()
    half = len(taps) // 2
    images = F.pad(values.reshape(-1, 1, *values.shape[-2:]), (half,) * 4, mode="replicate")
    smooth_down = F.conv2d(images, kernel.view(1, 1, -1, 1))
    return F.conv2d(smooth_down, kernel.view(1, 1, 1, -1)).view(values.shape)


def _halve(frames: Tensor) -> Tensor:
    return F.avg_pool2d(_smooth(frames, _BLUR)[:, None], 2, ceil_mode=True)[:, 0]
