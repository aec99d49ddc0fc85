"""Write MP4 files, and several videos side by side in one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from anyflow.pipelines.frames import uint8_frames
from anyflow.utils.packages import missing
from anyflow.utils.writing import whole_file

_BT709 = 1
_LIMITED_RANGE = 1
_GAP = 8  # pixels; even, as H.264's subsampled colors need it
_MIN_WIDTH = 160  # of a cell: small videos are enlarged until a label fits


def write_video(frames: Any, path: str | Path, fps: float = 16) -> Path:
    """Write an MP4 file, whole or not at all: H.264 where PyAV has it, else MPEG-4 part 2.

    Args:
        frames: PIL images, an ``[F, H, W, 3]`` array or an ``[F, 3, H, W]`` tensor; uint8, or float
            in [0, 1].
        path: path to write, ``.mp4``; its folder is made.
        fps: frames per second.

    Returns:
        ``path``.

    Raises:
        ValueError: no frames, an odd height or width (colors are subsampled), or a path or rate
            that cannot be.
        ImportError: PyAV is missing.
    """
    return _encode(uint8_frames(frames), Path(path), frame_rate(fps))


def write_comparison(videos: Mapping[str, Path], path: str | Path) -> Path:
    """Write several MP4 files of one size side by side, each under its label, as one.

    Videos are read and written frame by frame, so that long ones fit in memory; a shorter video
    stays at its last frame.

    Args:
        videos: file of each label, left to right and top to bottom.
        path: path to write, ``.mp4``.

    Returns:
        ``path``.

    Raises:
        ValueError: no videos, different sizes or rates, or a file that is none.
        ImportError: PyAV is missing.
    """
    if not videos:
        raise ValueError("a comparison needs at least one video")
    av = import_av()
    with ExitStack() as stack:
        try:
            containers = [stack.enter_context(av.open(str(file))) for file in videos.values()]
        except (av.FFmpegError, OSError) as error:
            raise ValueError(
                f"not all of {', '.join(map(str, videos.values()))} are videos: {error}"
            ) from None
        streams = [container.streams.video[0] for container in containers]
        kinds = {(s.height, s.width, s.average_rate) for s in streams}
        if len(kinds) > 1:
            raise ValueError(
                f"a comparison needs videos of one size and rate, got {sorted(map(str, kinds))}"
            )
        ((height, width, rate),) = kinds
        drawn = _Canvas(list(videos), height, width)
        decoded = [(f.to_ndarray(format="rgb24") for f in c.decode(video=0)) for c in containers]
        return _encode(drawn.frames(decoded), Path(path), Fraction(rate))


class _Canvas:
    """Draw videos on a canvas with labels."""

    def __init__(self, labels: list[str], height: int, width: int) -> None:
        from PIL import Image, ImageDraw, ImageFont

        self.scale = math.ceil(_MIN_WIDTH / width)
        height, width = height * self.scale, width * self.scale
        # three side by side, not two and a hole
        columns = math.ceil(len(labels) / math.isqrt(len(labels)))
        lines = math.ceil(len(labels) / columns)
        bar = max(24, height // 20 * 2)
        image = Image.new(
            "RGB",
            (columns * (width + _GAP) + _GAP, lines * (height + bar + _GAP) + _GAP),
            color=(255, 255, 255),
        )
        draw, font = ImageDraw.Draw(image), ImageFont.load_default(round(bar * 0.6))
        self.corners = []
        for i, label in enumerate(labels):
            left = _GAP + i % columns * (width + _GAP)
            top = _GAP + i // columns * (height + bar + _GAP)
            draw.text(
                (left + width / 2, top + bar / 2), label, fill=(0, 0, 0), font=font, anchor="mm"
            )
            self.corners.append((top + bar, left))
        self.canvas = np.asarray(image)

    def frames(self, videos: Sequence[Iterator[np.ndarray]]) -> Iterator[np.ndarray]:
        """Yield the canvas with the next frame of every video, until all have ended."""
        canvas = self.canvas.copy()
        while True:
            fresh = [next(video, None) for video in videos]
            if all(frame is None for frame in fresh):
                return
            for frame, (top, left) in zip(fresh, self.corners, strict=True):
                if frame is not None:
                    cell = frame.repeat(self.scale, 0).repeat(self.scale, 1)
                    canvas[top : top + cell.shape[0], left : left + cell.shape[1]] = cell
            yield canvas


def _encode(frames: Iterable[np.ndarray], path: Path, rate: Fraction) -> Path:
    """Encode ``[H, W, 3]`` uint8 frames of one size to a file, whole or not at all."""
    av = import_av()
    require_mp4(path)
    frames = iter(frames)
    first = next(frames, None)
    if first is None:
        raise ValueError(f"{path}: no frames to write")
    height, width = first.shape[:2]
    require_even(path, height, width)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"movflags": "+faststart"}
    with (
        whole_file(path) as partial,
        av.open(str(partial), "w", format="mp4", options=options) as container,
    ):
        stream = add_stream(container, rate, height, width)
        for pixels in chain([first], frames):
            require_size(path, pixels, first.shape)
            container.mux(stream.encode(video_frame(pixels)))
        container.mux(stream.encode(None))
    return path


def require_mp4(path: Path) -> None:
    """Raise a ValueError for a path that does not end with ``.mp4``."""
    if path.suffix != ".mp4":
        raise ValueError(f"videos are written as .mp4, got {path}")


def require_even(path: Path, height: int, width: int) -> None:
    """Raise a ValueError for sizes of which H.264 cannot subsample the colors."""
    if height % 2 or width % 2:
        raise ValueError(f"{path}: height and width must be even, got {height} x {width}")


def require_size(path: Path, pixels: np.ndarray, shape: tuple[int, ...]) -> None:
    """Raise a ValueError for a frame of another shape than the first of its video."""
    if pixels.shape != shape:
        raise ValueError(f"{path}: frames of different sizes, {shape} and {pixels.shape}")


def video_frame(pixels: np.ndarray) -> Any:
    """Convert ``[H, W, 3]`` uint8 to the frame of PyAV that is encoded."""
    frame = import_av().VideoFrame.from_ndarray(pixels, format="rgb24")
    return frame.reformat(format="yuv420p", dst_colorspace="ITU709")


def add_stream(container: Any, rate: Fraction, height: int, width: int) -> Any:
    """Add the stream of a video, which encodes its frames, to a container of PyAV."""
    av = import_av()
    if "libx264" in av.codecs_available:
        stream = container.add_stream(
            "libx264", rate=rate, options={"crf": "16", "preset": "medium"}
        )
    else:
        stream = container.add_stream(
            "mpeg4", rate=rate, options={"qscale": "2", "flags": "+qscale"}
        )
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    # players guess other colors from the size when the file does not say
    context = stream.codec_context
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    context.color_range = _LIMITED_RANGE
    return stream


def frame_rate(fps: float) -> Fraction:
    """Return frames per second as a fraction, or raise a ValueError unless they are > 0."""
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps must be a finite number > 0, got {fps}")
    return Fraction(fps).limit_denominator(1000)


def import_av() -> Any:
    """Import PyAV, or raise ``ImportError`` with the command that installs it."""
    try:
        import av
    except ImportError as error:
        raise ImportError(missing("a video file", "av"), name="av") from error
    return av
