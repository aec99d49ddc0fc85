"""Test decoding with videos whose every frame is known."""

import os
import random
import struct
from collections.abc import Callable
from math import floor
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from anyflow.data.video import VideoError, read_video

WriteVideo = Callable[..., Path]
GRAYS = [20 + 6 * i for i in range(36)]


def read(path: Path, num_frames: int, fps: float = 16, height: int = 32, width: int = 32) -> Tensor:
    return read_video(path, num_frames=num_frames, height=height, width=width, fps=fps)


def seen(video: Tensor) -> list[int]:
    """Return which of ``GRAYS`` each frame shows."""
    return [round((level - 20) / 6) for level in video.float().mean((1, 2, 3)).tolist()]


@pytest.mark.parametrize("container", ["mp4", "mkv"])  # mkv rounds times to milliseconds
@pytest.mark.parametrize("fps", [8, 16, 24, 25, 30, 32])
def test_frames_are_those_on_the_screen_at_the_times_asked_for(
    write_video: WriteVideo, tmp_path: Path, fps: int, container: str
) -> None:
    path = write_video(tmp_path / f"video.{container}", GRAYS, fps=fps)
    assert seen(read(path, 17)) == [floor(k * fps / 16) for k in range(17)]


@pytest.mark.parametrize("container", ["mp4", "mkv"])
@pytest.mark.parametrize(
    ("fps", "frames", "enough"), [(16, 9, 9), (24, 13, 9), (24, 12, 8), (8, 4, 8)]
)
def test_a_video_is_as_long_as_its_last_frame_is_shown(
    write_video: WriteVideo, tmp_path: Path, fps: int, frames: int, enough: int, container: str
) -> None:
    path = write_video(tmp_path / f"video.{container}", GRAYS[:frames], fps=fps)
    assert len(read(path, enough)) == enough
    with pytest.raises(
        VideoError, match=f"too short: {enough} frames at 16 fps, and {enough + 1} are needed"
    ):
        read(path, enough + 1)


def test_frames_are_resized_to_cover_and_their_middle_is_cut_out(
    write_video: WriteVideo, tmp_path: Path
) -> None:
    image = np.full((64, 192, 3), 30, np.uint8)
    image[:, 64:128] = 200
    wide = write_video(tmp_path / "wide.mp4", [image] * 2, size=(64, 192))
    tall = write_video(tmp_path / "tall.mp4", [image.swapaxes(0, 1)] * 2, size=(192, 64))
    for path in (wide, tall):
        for size in (16, 64, 96):
            video = read(path, 1, height=size, width=size)
            assert video.shape == (1, 3, size, size) and video.dtype == torch.uint8
            edge = size // 8  # resizing blurs over the borders
            torch.testing.assert_close(
                video[..., edge:-edge, edge:-edge],
                torch.full_like(video, 200)[..., edge:-edge, edge:-edge],
                atol=6,
                rtol=0,
            )
    everything = read(wide, 1, height=64, width=192)[0, 0]
    assert abs(int(everything[32, 10]) - 30) < 6 and abs(int(everything[32, 180]) - 30) < 6


def test_a_phones_rotation_is_applied(write_video: WriteVideo, tmp_path: Path) -> None:
    image = np.full((64, 96, 3), 20, np.uint8)
    image[:32, :48] = 220  # a bright top left corner
    path = write_video(tmp_path / "video.mp4", [image], size=(64, 96))
    content = bytearray(path.read_bytes())
    # ISO 14496-12: (x, y) -> (-y, x), a quarter turn clockwise
    matrix = content.index(b"tkhd") + 4 + 40
    content[matrix : matrix + 36] = struct.pack(
        ">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30
    )
    path.write_bytes(content)
    video = read(path, 1, height=96, width=64)[0, 0]
    corners = [int(video[y, x]) // 100 for y in (10, 86) for x in (10, 54)]
    assert corners == [0, 2, 0, 0]


def test_files_that_are_no_video_say_what_is_wrong(write_video: WriteVideo, tmp_path: Path) -> None:
    whole = write_video(tmp_path / "whole.mp4", GRAYS).read_bytes()
    contents = {
        "cut.mp4": whole[: len(whole) // 2],
        "text.mp4": b"not a video\n" * 50,
        "empty.mp4": b"",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VideoError, match="^cannot be decoded: Invalid data"):
            read(tmp_path / name, 5)
    with pytest.raises(VideoError, match="^does not exist"):
        read(tmp_path / "absent.mp4", 5)


def test_a_file_with_sound_only_has_no_video_stream(tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(VideoError, match="no video stream"):
        read(path, 1)


def test_frames_that_would_be_resized_to_gigabytes_are_refused(
    write_video: WriteVideo, tmp_path: Path
) -> None:
    path = write_video(tmp_path / "narrow.mp4", [100], size=(4, 1024))
    with pytest.raises(VideoError, match="frames of 1024 x 4 are too narrow for 832 x 1200"):
        read(path, 1, height=1200, width=832)


def test_metadata_that_is_not_utf8_does_not_matter(write_video: WriteVideo, tmp_path: Path) -> None:
    file = write_video(tmp_path / "tagged.mp4", GRAYS)
    with av.open(str(file)) as source, av.open(str(tmp_path / "title.mkv"), "w") as tagged:
        stream = tagged.add_stream_from_template(source.streams.video[0])
        tagged.metadata["title"] = "TITLE"
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                tagged.mux(packet)
    content = (tmp_path / "title.mkv").read_bytes()
    assert content.count(b"TITLE") >= 1
    (tmp_path / "title.mkv").write_bytes(content.replace(b"TITLE", b"\xe9t\xe9\xff\xfe"))
    with pytest.raises(UnicodeDecodeError), av.open(str(tmp_path / "title.mkv")) as container:
        dict(container.metadata)
    assert torch.equal(read(tmp_path / "title.mkv", 5), read(file, 5))


def test_what_is_not_a_video_file_is_not_waited_for(
    write_video: WriteVideo, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    write_video(tmp_path / "whole.mp4", GRAYS)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile 'whole.mp4'\n")
    reasons = {
        "fifo": "a FIFO",
        "folder": "a folder",
        "zero": "a device",
        "list": "a list of other files",
    }
    for name, reason in reasons.items():
        with pytest.raises(VideoError, match=reason):
            read(tmp_path / f"{name}.mp4", 5)


def test_frames_that_the_decoder_only_guesses_are_refused(
    write_video: WriteVideo, tmp_path: Path
) -> None:
    blocks = (
        np.random.default_rng(0)
        .integers(0, 256, (5, 8, 8, 3), np.uint8)
        .repeat(8, axis=1)
        .repeat(8, axis=2)
    )
    content = write_video(tmp_path / "whole.mp4", list(blocks)).read_bytes()
    start, draw, guessed = content.index(b"mdat"), random.Random(0), 0
    for _ in range(20):
        damaged, at = bytearray(content), draw.randrange(start + 1000, len(content) - 1000)
        damaged[at : at + 32] = draw.randbytes(32)
        (tmp_path / "damaged.mp4").write_bytes(damaged)
        try:
            with av.open(str(tmp_path / "damaged.mp4")) as container:
                frames = list(container.decode(video=0))
        except av.FFmpegError:
            continue
        if len(frames) == 5 and any(frame.is_corrupt for frame in frames):
            guessed += 1
            with pytest.raises(
                VideoError, match="is damaged: the decoder marks the frame at .* as corrupt"
            ):
                read(tmp_path / "damaged.mp4", 5)
    assert guessed > 0


def test_damage_anywhere_in_a_file_is_a_video_error(
    write_video: WriteVideo, tmp_path: Path
) -> None:
    """Damage half of the places in the first and last kilobyte, where a file has its tables."""
    content = write_video(tmp_path / "whole.mp4", GRAYS).read_bytes()
    draw, refused = random.Random(0), 0
    for _ in range(100):
        damaged = bytearray(content)
        at = draw.randrange(len(content))
        if draw.random() < 0.5:
            at = draw.choice([at % 1000, len(content) - 1 - at % 1000])
        damaged[at : at + 8] = draw.randbytes(draw.randrange(9))
        (tmp_path / "damaged.mp4").write_bytes(damaged)
        try:
            assert read(tmp_path / "damaged.mp4", 5).shape[0] == 5
        except VideoError as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 400
    assert 10 < refused < 100
