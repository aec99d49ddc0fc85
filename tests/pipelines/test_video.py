"""Test MP4 files that are really written, and read back with PyAV."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from anyflow.pipelines import write_comparison, write_video

COLORS = np.array(
    [[200, 30, 30], [30, 180, 40], [30, 40, 200], [240, 240, 240], [10, 10, 10]], np.uint8
)


def plain(height: int = 48, width: int = 64) -> np.ndarray:
    """Make one frame of each color, ``[5, height, width, 3]``."""
    return np.broadcast_to(COLORS[:, None, None], (5, height, width, 3)).copy()


def read(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("fps", [16, 24000 / 1001, 7.5])
def test_a_file_has_the_frames_size_and_rate(fps: float, tmp_path: Path) -> None:
    path = write_video(plain(), tmp_path / "new" / "a.mp4", fps)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.frames, stream.height, stream.width) == (5, 48, 64)
        assert stream.average_rate == Fraction(fps).limit_denominator(1000)
        expected = "h264" if "libx264" in av.codecs_available else "mpeg4"
        assert stream.codec_context.name == expected and stream.codec_context.pix_fmt == "yuv420p"
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]


def test_colors_come_back(tmp_path: Path) -> None:
    """Decode as any player does: the file says which matrix its colors were made with."""
    pixels = read(write_video(plain(), tmp_path / "a.mp4")).astype(int)
    assert np.abs(pixels - plain()).max() <= 4
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert next(container.decode(video=0)).colorspace == 1  # BT.709


def test_every_kind_of_frames_gives_one_file(tmp_path: Path) -> None:
    pixels = plain()
    kinds = {
        "uint8": pixels,
        "float": pixels / 255,
        "pil": [Image.fromarray(frame) for frame in pixels],
        "tensor": torch.from_numpy(pixels).permute(0, 3, 1, 2),
        "half": torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255),
    }
    contents = {
        write_video(frames, tmp_path / f"{name}.mp4").read_bytes() for name, frames in kinds.items()
    }
    assert len(contents) == 1


@pytest.mark.parametrize(
    ("frames", "name", "fps", "message"),
    [
        (plain()[:0], "a.mp4", 16, "no frames"),
        (plain(47), "a.mp4", 16, "must be even, got 47 x 64"),
        (plain(), "a.gif", 16, "as .mp4"),
        (plain(), "a.mp4", 0, "fps must be"),
        (plain() * 2.0, "a.mp4", 16, r"must be in \[0, 1\]"),
        (plain().transpose(0, 3, 1, 2), "a.mp4", 16, r"\[F, H, W, 3\]"),
        ([*plain(), plain(32)[0]], "a.mp4", 16, "different sizes"),
    ],
)
def test_what_cannot_be_written_leaves_no_file(frames, name, fps, message, tmp_path: Path) -> None:
    if isinstance(frames, list):
        frames = [Image.fromarray(frame) for frame in frames]
    with pytest.raises(ValueError, match=message):
        write_video(frames, tmp_path / name, fps)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_earlier_file(tmp_path: Path) -> None:
    path = write_video(plain(), tmp_path / "a.mp4")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="different sizes"):
        write_video([Image.fromarray(plain()[0]), Image.fromarray(plain(32)[0])], path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("count", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (3, 3, 1), (5, 3, 2), (8, 4, 2)]
)
def test_a_comparison_has_each_video_under_its_label(
    count: int, columns: int, rows: int, tmp_path: Path
) -> None:
    height, width = 96, 160  # wide enough not to be enlarged
    videos = {}
    for i in range(count):
        frames = np.broadcast_to(np.uint8(30 * i), (3, height, width, 3))
        videos[f"{2**i} steps"] = write_video(frames, tmp_path / f"{i}.mp4", 8)
    grid = read(write_comparison(videos, tmp_path / "grid.mp4"))
    assert grid.shape == (3, rows * (height + 32) + 8, columns * (width + 8) + 8, 3)
    for i in range(count):
        top, left = 8 + i // columns * (height + 32), 8 + i % columns * (width + 8)
        label, cell = (
            grid[0, top : top + 24, left : left + width],
            grid[0, top + 24 :, left:][:height, :width],
        )
        assert abs(float(cell.mean()) - 30 * i) < 3
        assert label.max() > 250 and label.min() < 100
    with av.open(str(tmp_path / "grid.mp4")) as container:
        assert container.streams.video[0].average_rate == 8


def test_small_videos_are_enlarged_and_short_ones_wait(tmp_path: Path) -> None:
    short = write_video(plain(16, 32)[:2], tmp_path / "short.mp4")
    long = write_video(plain(16, 32), tmp_path / "long.mp4")
    grid = read(write_comparison({"1 step": short, "2 steps": long}, tmp_path / "grid.mp4"))
    assert grid.shape == (5, 16 * 5 + 24 + 16, 2 * 32 * 5 + 24, 3)
    cells = [grid[-1, 60:80, left : left + 100].reshape(-1, 3).mean(0) for left in (40, 210)]
    assert np.abs(cells[0] - COLORS[1]).max() < 6 and np.abs(cells[1] - COLORS[4]).max() < 6


def test_a_comparison_refuses_what_does_not_fit(tmp_path: Path) -> None:
    a, b = write_video(plain(), tmp_path / "a.mp4"), write_video(plain(32), tmp_path / "b.mp4")
    (tmp_path / "c.mp4").write_text("no video")
    with pytest.raises(ValueError, match="one size and rate"):
        write_comparison({"a": a, "b": b}, tmp_path / "grid.mp4")
    with pytest.raises(ValueError, match=r"c\.mp4 are videos"):
        write_comparison({"a": a, "c": tmp_path / "c.mp4"}, tmp_path / "grid.mp4")
    with pytest.raises(ValueError, match="at least one"):
        write_comparison({}, tmp_path / "grid.mp4")
    assert not (tmp_path / "grid.mp4").exists()
