"""Decode video files as frames of one size at one rate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anyflow.utils.documents import require_regular_file, shortened
from anyflow.utils.packages import missing

try:
    import av
except ImportError as error:
    raise ImportError(missing("decoding a video", "av"), name="av") from error

MAX_PIXELS = 2**26  # of a frame: twice 8K
_OPTIONS = {"pattern_type": "none"}
_PLAYLISTS = {"hls", "concat", "dash", "sdp", "rtsp", "imf"}


class VideoError(ValueError):
    """Report why a file gives no usable video."""


def color_conversion() -> dict[str, str]:
    """Return the version of the library that turns colors into RGB, by its name ``libswscale``."""
    return {"libswscale": ".".join(map(str, av.library_versions["libswscale"]))}


def read_video(
    path: Path, *, num_frames: int, height: int, width: int, fps: float, at_least: int | None = None
) -> Tensor:
    """Decode the first frames at a rate, as ``[num_frames, 3, height, width]`` uint8 RGB.

    Frame k is what is on the screen k / fps seconds after the first frame. It is turned as the file
    says, resized (bicubic, antialiased) until it just covers the size, and its middle is cut out.
    A shorter video gives all its frames where it has at least ``at_least``.

    Raises:
        VideoError: not a regular file, not a video, damaged in what is read of it, or too short.
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
    except VideoError:
        raise
    except Exception as error:  # a damaged file can make any part of the decoder fail
        texts = (getattr(error, "strerror", None), str(error), type(error).__name__)
        reason = next(" ".join(text.split()) for text in texts if text and text.strip())
        raise VideoError(f"cannot be decoded: {reason[:300]}") from None
    needed = num_frames if at_least is None else at_least
    if len(frames) >= needed:
        return torch.stack(frames)
    raise VideoError(f"too short: {len(frames)} frames at {fps:g} fps, and {needed} are needed")


def _decoded(path: Path) -> Iterator[tuple[av.VideoFrame, Fraction]]:
    """Yield every frame, with the end of its time on the screen in seconds after the first frame.

    Ends are half a tick of the file's clock early: a container rounds times to its ticks.
    """
    try:
        require_regular_file(path)
    except ValueError as error:
        raise VideoError(str(error).removeprefix(f"{shortened(path)} ")) from None
    # An absolute path: FFmpeg takes "data:..." for a protocol. Its image reader takes "%d" for a
    # sequence of files.
    with av.open(
        os.path.abspath(path), metadata_errors="replace", container_options=_OPTIONS
    ) as container:
        if _PLAYLISTS & set(container.format.name.split(",")):
            raise VideoError(f"is a list of other files ({container.format.name}), not a video")
        if not container.streams.video:
            raise VideoError("has no video stream")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise VideoError("has a video stream of a codec that is unknown here")
        _check_size(stream.width, stream.height)
        stream.thread_type = "SLICE"  # threads by frame lose the errors of some frames
        tick = Fraction(stream.time_base)
        frame, start = None, Fraction(0)
        for following in container.decode(stream):
            if following.pts is None:
                raise VideoError("has a frame without a time stamp")
            if following.is_corrupt:
                raise VideoError(
                    f"is damaged: the decoder marks the frame at {following.time:.3f} s as corrupt"
                )
            _check_size(following.width, following.height)
            if frame is None:
                start = following.pts * tick + tick / 2
            else:
                yield frame, following.pts * tick - start
            frame = following
        if frame is not None:
            duration = 1 / Fraction(stream.average_rate) if stream.average_rate else tick
            yield frame, frame.pts * tick + duration - start


def _check_size(width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise VideoError(f"has frames of {width} x {height}; 1 to {MAX_PIXELS} pixels are allowed")


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """Return ``[height, width, 3]`` uint8 RGB, turned by the rotation that the file names."""
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


def _covering(image: np.ndarray, height: int, width: int) -> Tensor:
    """Resize ``[h, w, 3]`` to cover the size, and cut out the middle ``[3, height, width]``."""
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    h, w = pixels.shape[1:]
    scale = max(Fraction(height, h), Fraction(width, w))
    size = [max(height, round(h * scale)), max(width, round(w * scale))]
    if size[0] * size[1] > MAX_PIXELS:
        raise VideoError(f"its frames of {w} x {h} are too narrow for {width} x {height}")
    if size != [h, w]:
        pixels = F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return pixels[:, top : top + height, left : left + width].contiguous()
