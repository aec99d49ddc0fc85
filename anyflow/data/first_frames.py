"""Read the frames that videos begin with: of a picture, or of the start of a video file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from anyflow.data.video import VideoError, read_video
from anyflow.utils.documents import require_content, shortened
from anyflow.utils.validation import brief, whole_number


def read_image(path: str | Path, height: int, width: int) -> Any:
    """Read a picture upright, resize it (Lanczos) to cover the size, and cut out its middle.

    Returns:
        A PIL image, RGB.

    Raises:
        ValueError: the file does not exist, or is no picture.
    """
    from PIL import Image, ImageOps

    path = require_content(path)
    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture).convert("RGB")
    except Exception as error:  # a damaged file can make any part of a decoder fail
        raise ValueError(
            f"{shortened(path)} cannot be read as a picture: {brief(str(error), 300)}"
        ) from None
    return ImageOps.fit(upright, (width, height), Image.Resampling.LANCZOS)


def read_first_frames(
    path: str | Path, frames: int | None, *, num_frames: int, height: int, width: int, fps: float
) -> Any:
    """Read the first frames of a video file at ``fps``, cut to the size as :func:`read_video` does.

    Args:
        path: path of the file.
        frames: how many, 4k + 1 and fewer than ``num_frames``. None takes all of a shorter video,
            4k + 1 of them and at most half of ``num_frames``.
        num_frames: frames of the video that is to be made.
        height, width: in pixels.
        fps: frames per second of the video that is to be made.

    Returns:
        A tensor ``[F, 3, height, width]`` uint8.

    Raises:
        ValueError: the file does not exist, is no video or is too short, or ``frames`` is not
            possible.
    """
    if frames is not None:
        whole_number("the number of first frames", frames)
        if frames % 4 != 1 or frames >= num_frames:
            raise ValueError(
                f"the number of first frames must be 4k + 1 and fewer than the {num_frames} frames "
                "of a video, "
                f"got {frames}"
            )
    most = 4 * ((num_frames - 1) // 8) + 1 if frames is None else frames
    try:
        video = read_video(
            Path(path),
            num_frames=most,
            height=height,
            width=width,
            fps=fps,
            at_least=1 if frames is None else frames,
        )
    except VideoError as error:
        raise ValueError(f"{shortened(path)} {error}") from None
    return video[: (len(video) - 1) // 4 * 4 + 1]
