"""Video files as frames of one size at one rate."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import av
except ImportError as error:
    raise ImportError("decoding videos needs PyAV: pip install 'anyflow[train]'") from error


class VideoError(ValueError):
    """A file that gives no usable video; the message says why."""


def read_video(path: Path, *, num_frames: int, height: int, width: int, fps: float) -> Tensor:
    """The first ``num_frames`` frames at ``fps`` frames a second, as ``[num_frames, 3, height, width]`` uint8 RGB.

    Frame k is what is on the screen k / fps seconds after the first frame. It is turned as the file says, resized
    (bicubic, antialiased) until it just covers the size, and its middle is cut out.

    Raises:
        VideoError: not a video, damaged, or too short.
    """
    rate = Fraction(fps).limit_denominator(1_000_000)
    frames: list[Tensor] = []
    try:
        for frame, until in _decoded(path):
            count = 0
            while len(frames) + count < num_frames and (len(frames) + count) / rate < until:
                count += 1
            if count:
                frames += [_covering(_upright(frame), height, width)] * count
            if len(frames) == num_frames:
                return torch.stack(frames)
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"cannot be decoded: {error.strerror}") from None
    raise VideoError(f"too short: {len(frames)} frames at {fps:g} fps, and {num_frames} are needed")


def _decoded(path: Path) -> Iterator[tuple[av.VideoFrame, Fraction]]:
    """Every frame, with the end of its time on the screen in seconds after the first frame.

    Ends are half a tick of the file's clock early: a container rounds times to its ticks.
    """
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise VideoError("has no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        tick = Fraction(stream.time_base)
        frame, start = None, Fraction(0)
        for following in container.decode(stream):
            if following.pts is None:
                raise VideoError("has a frame without a time stamp")
            if frame is None:
                start = following.pts * tick + tick / 2
            else:
                yield frame, following.pts * tick - start
            frame = following
        if frame is not None:
            duration = 1 / Fraction(stream.average_rate) if stream.average_rate else tick
            yield frame, frame.pts * tick + duration - start


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """``[height, width, 3]`` uint8 RGB, turned by the rotation that a phone writes into the file."""
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


def _covering(image: np.ndarray, height: int, width: int) -> Tensor:
    """``[h, w, 3]`` to the middle ``[3, height, width]`` of its smallest resize that covers it."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    h, w = pixels.shape[1:]
    scale = max(Fraction(height, h), Fraction(width, w))
    size = [max(height, round(h * scale)), max(width, round(w * scale))]
    if size != [h, w]:
        pixels = F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return pixels[:, top : top + height, left : left + width].contiguous()
