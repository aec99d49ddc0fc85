"""Test the first frames of pictures and of video files."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from anyflow.data.first_frames import read_first_frames, read_image
from anyflow.pipelines.video import write_video

SIZE = {"height": 32, "width": 48}


def test_a_picture_is_turned_upright_and_cut_to_the_size(tmp_path: Path) -> None:
    """Store a portrait of 40 x 100 as a phone does: lying, with a note to turn it."""
    pixels = np.zeros((100, 40, 3), np.uint8)
    pixels[:50, :, 0], pixels[50:, :, 2] = 255, 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    Image.fromarray(np.rot90(pixels).copy()).save(tmp_path / "a.png", exif=exif)
    image = np.asarray(read_image(tmp_path / "a.png", 32, 48))
    assert image.shape == (32, 48, 3)
    assert image[2].mean(0).tolist() == [255, 0, 0] and image[-3].mean(0).tolist() == [0, 0, 255]
    for content, message in ((b"", "empty file"), (b"no picture", "cannot be read as a picture")):
        (tmp_path / "b.png").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_image(tmp_path / "b.png", 32, 48)
    with pytest.raises(ValueError, match="does not exist"):
        read_image(tmp_path / "c.png", 32, 48)


def test_the_first_frames_of_a_video(tmp_path: Path) -> None:
    """Count the 14 frames by brightness; of half of 33, 17, the file has 13 (4k + 1)."""
    clip = np.broadcast_to(
        (np.arange(14) * 15).astype(np.uint8)[:, None, None, None], (14, 64, 96, 3)
    )
    write_video(clip, tmp_path / "clip.mp4", fps=8)

    def brightness(frames: int | None, num_frames: int, fps: float = 8) -> list[int]:
        video = read_first_frames(
            tmp_path / "clip.mp4", frames, num_frames=num_frames, fps=fps, **SIZE
        )
        assert video.shape[1:] == (3, 32, 48)
        return [round(float(v) / 15) for v in video.float().mean((1, 2, 3))]

    assert brightness(None, 33) == list(range(13)) and brightness(None, 17) == list(range(9))
    assert brightness(None, 5) == [0] and brightness(5, 9) == list(range(5))
    assert brightness(5, 9, fps=4) == [0, 2, 4, 6, 8]
    for frames, message in (
        (17, "too short: 14 frames"),
        (8, r"4k \+ 1"),
        (81, "fewer than the 81"),
        (0, "whole"),
    ):
        with pytest.raises(ValueError, match=message):
            brightness(frames, 81)
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"clip\.mp4 cannot be decoded"):
        brightness(None, 33)
