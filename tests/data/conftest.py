"""Build the parts of a tiny Wan model, and video files."""

import sys
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).parent / "scripts"))  # helpers of several files of tests
from captioned import WriteVideo
from latent_files import Row, write


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


@pytest.fixture
def samples(generator: torch.Generator) -> list[Row]:
    """Make seven samples whose prompts have one to six tokens."""
    return [
        (
            f"{i}.mp4",
            f"caption {i}, “ü”",
            torch.randn(3, 4, 2, 2, generator=generator),
            torch.randn(1 + i % 6, 5, generator=generator),
        )
        for i in range(7)
    ]


@pytest.fixture
def folder(samples: list[Row], tmp_path: Path) -> Path:
    return write(tmp_path / "data", samples)


@pytest.fixture(scope="module")
def videos(write_video: WriteVideo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write twelve videos of noise, ``0.mp4`` to ``11.mp4``."""
    folder = tmp_path_factory.mktemp("videos")
    random = np.random.default_rng(0)
    for i in range(12):
        blocks = random.integers(0, 256, (9, 8, 8, 3), np.uint8)
        write_video(folder / f"{i}.mp4", list(blocks.repeat(8, axis=1).repeat(8, axis=2)))
    return folder
