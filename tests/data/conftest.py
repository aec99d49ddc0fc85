"""Build the parts of a tiny Wan model, and video files."""

from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np
import pytest

WriteVideo = Callable[..., Path]


@pytest.fixture(scope="session")
def write_video() -> WriteVideo:
    """Return ``write_video(path, grays, fps=16, size=(64, 64))``.

    A frame is plain for a gray level, or the array itself.
    """

    def write(
        path: Path,
        frames: Sequence[int | np.ndarray],
        fps: int = 16,
        size: tuple[int, int] = (64, 64),
    ) -> Path:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=fps, options={"crf": "1", "threads": "1"})
            stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
            for frame in frames:
                image = np.full((*size, 3), frame, np.uint8) if isinstance(frame, int) else frame
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode(None))
        return path

    return write
