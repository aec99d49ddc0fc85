"""Test MP4 files that grow, by reading them with PyAV while and after they are written."""

import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from grow_video import moving_frames
from PIL import Image

from anyflow.pipelines import write_video
from anyflow.pipelines.video_writer import VideoWriter

SCRIPT = Path(__file__).parent / "scripts" / "grow_video.py"


def read(path: Path) -> tuple[np.ndarray, list[Fraction]]:
    """Return all frames that can be decoded, ``[F, H, W, 3]`` uint8, and their times in seconds."""
    frames, times = [], []
    with av.open(str(path)) as container:
        try:
            for frame in container.decode(video=0):
                frames.append(frame.to_ndarray(format="rgb24"))
                times.append(frame.pts * frame.time_base)
        except av.FFmpegError:  # the rest of a file that was cut
            pass
    return np.stack(frames), times


def assert_frames(path: Path, count: int, fps: int = 8) -> None:
    """Check the first frames of a file, and their times."""
    frames, times = read(path)
    assert len(frames) >= count
    assert times[:count] == [Fraction(i, fps) for i in range(count)]
    error = frames[:count].astype(float) - moving_frames(0, count)
    assert (error**2).mean(axis=(1, 2, 3)).max() < 60  # the next frame has above 200


def boxes(path: Path) -> list[str]:
    content, found = path.read_bytes(), []
    while content:
        found.append(content[4:8].decode())
        content = content[int.from_bytes(content[:4], "big") :]
    return found


@contextmanager
def growing(path: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def grow(process: subprocess.Popen[str], count: int) -> int:
    """Let the process write a part, and return how many frames it has written."""
    process.stdin.write(f"{count}\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def test_frames_differ_more_than_the_tolerance() -> None:
    error = moving_frames(1, 8).astype(float) - moving_frames(0, 8)
    assert (error**2).mean(axis=(1, 2, 3)).min() > 200


@pytest.mark.parametrize("parts", [[9, 12, 12], [1, 1, 1, 1], [1, 12, 3, 2], [5], [2, 25, 1]])
def test_a_file_has_all_frames_after_every_part_and_at_the_end(parts, tmp_path: Path) -> None:
    path, written = tmp_path / "new" / "a.mp4", 0
    with VideoWriter(path, 8) as writer:
        for count in parts:
            writer.write(moving_frames(written, count))
            written += count
            assert_frames(path, written)
            assert len(read(path)[0]) == written
            assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]
        fragmented = read(path)
        assert boxes(path) == ["ftyp", "moov", *["moof", "mdat"] * len(parts)]
    plain = read(path)
    assert np.array_equal(plain[0], fragmented[0]) and plain[1] == fragmented[1]
    assert "moof" not in boxes(path) and boxes(path)[:2] == ["ftyp", "moov"]
    assert [p.name for p in path.parent.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("fps", [16, 24000 / 1001, 7.5, 1, 60])
def test_the_stream_is_that_of_write_video(fps: float, tmp_path: Path) -> None:
    """Compare what the file says of its stream with PyAV, while it grows too."""
    frames, described = moving_frames(0, 12), []
    path = tmp_path / "a.mp4"

    def describe(file: Path) -> None:
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            context = stream.codec_context
            packets = [p.duration * p.time_base for p in container.demux(video=0) if p.size]
            described.append(
                (
                    *(context.name, context.pix_fmt, context.height, context.width),
                    *(context.colorspace, context.color_primaries, context.color_trc),
                    *(context.color_range, stream.average_rate, stream.start_time, packets),
                )
            )

    describe(write_video(frames, tmp_path / "expected.mp4", fps))
    with VideoWriter(path, fps) as writer:
        writer.write(frames[:5])
        writer.write(frames[5:])
        describe(path)
    describe(path)
    assert described[0] == described[1] == described[2]
    assert described[0][8] == Fraction(fps).limit_denominator(1000)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 12


def test_the_quality_is_that_of_write_video(tmp_path: Path) -> None:
    frames = moving_frames(0, 36, 96, 128)
    noise = np.random.default_rng(0).integers(-12, 13, frames.shape)
    frames = (frames + noise).clip(0, 255).astype(np.uint8)
    with VideoWriter(tmp_path / "a.mp4") as writer:
        for part in np.split(frames, 3):
            writer.write(part)
    write_video(frames, tmp_path / "b.mp4")
    own, other = (
        ((read(tmp_path / name)[0].astype(float) - frames) ** 2).mean()
        for name in ("a.mp4", "b.mp4")
    )
    assert own < 1.1 * other  # 0.4 dB
    assert (tmp_path / "a.mp4").stat().st_size < 1.3 * (tmp_path / "b.mp4").stat().st_size


def test_every_kind_of_frames_gives_one_file(tmp_path: Path) -> None:
    pixels = moving_frames(0, 5)
    kinds = {
        "uint8": pixels,
        "float": pixels / 255,
        "pil": [Image.fromarray(frame) for frame in pixels],
        "tensor": torch.from_numpy(pixels).permute(0, 3, 1, 2),
        "half": torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255),
    }
    contents = set()
    for name, frames in kinds.items():
        with VideoWriter(tmp_path / f"{name}.mp4") as writer:
            writer.write(frames)
        contents.add((tmp_path / f"{name}.mp4").read_bytes())
    assert len(contents) == 1


def test_another_process_reads_the_file_while_it_grows(tmp_path: Path) -> None:
    path, written = tmp_path / "a.mp4", 0
    with growing(path) as process:
        for count in (9, 12, 1, 12):
            written += count
            assert grow(process, count) == written
            assert_frames(path, written)
        earlier = path.open("rb")  # a player that has the file open
        process.stdin.close()
        assert process.wait() == 0
    assert_frames(path, written)
    with earlier:
        assert earlier.read().count(b"moof") == 4


@pytest.mark.parametrize("waits", [False, True])
def test_a_killed_process_leaves_all_frames_of_the_parts_before(waits, tmp_path: Path) -> None:
    """Kill with SIGKILL between two parts, or in the middle of one."""
    path = tmp_path / "a.mp4"
    with growing(path) as process:
        assert grow(process, 9) == 9 and grow(process, 12) == 21
        if not waits:
            process.stdin.write("400\n")
            process.stdin.flush()
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL and process.stdout.readline() == ""
    assert_frames(path, 21)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.slow
def test_a_process_that_dies_within_a_write_leaves_the_parts_before(tmp_path: Path) -> None:
    """Let the system kill processes at many lengths of the second part, whose file is checked."""
    lengths = [*range(20), *range(20, 260, 20), *range(260, 1000, 200)]
    command = [sys.executable, str(SCRIPT.with_name("cut_videos.py")), str(tmp_path)]
    subprocess.run([*command, *map(str, lengths)], check=True)
    files = [tmp_path / f"{length}.mp4" for length in lengths]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    sizes = [file.stat().st_size for file in files]
    assert [size - sizes[0] for size in sizes] == lengths
    for file in files:
        assert_frames(file, 9)
        assert len(read(file)[0]) == 9


def test_an_exception_in_the_block_leaves_the_parts_before(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    writer = VideoWriter(path, 8)
    with pytest.raises(KeyError, match="stop"), writer:
        writer.write(moving_frames(0, 9))
        raise KeyError("stop")
    assert_frames(path, 9)
    with pytest.raises(ValueError, match=r"a\.mp4: the writer is closed"):
        writer.write(moving_frames(9, 3))
    writer.close()
    assert "moof" in boxes(path)
    with pytest.raises(KeyError, match="stop"), VideoWriter(tmp_path / "b.mp4"):
        raise KeyError("stop")
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_an_earlier_file_stays_until_the_first_part_is_written(tmp_path: Path) -> None:
    path = write_video(moving_frames(0, 3), tmp_path / "a.mp4")
    before = path.read_bytes()
    with VideoWriter(path, 8) as writer:
        with pytest.raises(ValueError, match="must be even"):
            writer.write(moving_frames(0, 3, 47))
        assert path.read_bytes() == before
        writer.write(moving_frames(0, 5))
        assert_frames(path, 5)
    assert len(read(path)[0]) == 5


@pytest.mark.parametrize(
    ("frames", "name", "fps", "message"),
    [
        (moving_frames(0, 0), "a.mp4", 16, "no frames"),
        (moving_frames(0, 5, 47), "a.mp4", 16, "must be even, got 47 x 64"),
        (moving_frames(0, 5), "a.gif", 16, "as .mp4"),
        (moving_frames(0, 5), "a.mp4", 0, "fps must be"),
        (moving_frames(0, 5) * 2.0, "a.mp4", 16, r"must be in \[0, 1\]"),
        (moving_frames(0, 5).transpose(0, 3, 1, 2), "a.mp4", 16, r"\[F, H, W, 3\]"),
        ([*moving_frames(0, 2), moving_frames(0, 1, 32)[0]], "a.mp4", 16, "different sizes"),
        (None, "a.mp4", 16, "no frames"),
    ],
)
def test_what_cannot_be_written_leaves_no_file(frames, name, fps, message, tmp_path: Path) -> None:
    """Try what ``write_video`` refuses, and a block that writes nothing."""
    if isinstance(frames, list):
        frames = [Image.fromarray(frame) for frame in frames]
    with pytest.raises(ValueError, match=message), VideoWriter(tmp_path / name, fps) as writer:
        if frames is not None:
            writer.write(frames)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (moving_frames(0, 3, 32), "different sizes, "),
        (moving_frames(0, 0), "no frames"),
        (moving_frames(0, 3) * 2.0, r"must be in \[0, 1\]"),
    ],
)
def test_a_refused_part_leaves_the_file_to_the_next(frames, message, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 8) as writer:
        writer.write(moving_frames(0, 9))
        before = path.read_bytes()
        with pytest.raises(ValueError, match=message):
            writer.write(frames)
        assert path.read_bytes() == before
        writer.write(moving_frames(9, 3))
    assert_frames(path, 12)


def test_a_full_disk_leaves_the_file_to_the_next_part(tmp_path: Path) -> None:
    """Limit the size of files: a part is refused in its middle, then the first part of a file."""
    path = tmp_path / "a.mp4"

    @contextmanager
    def small_files(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    with VideoWriter(path, 8) as writer:
        writer.write(moving_frames(0, 9))
        before = path.read_bytes()
        with (
            small_files(len(before) + 100),
            pytest.raises(OSError, match="File too large") as caught,
        ):
            writer.write(moving_frames(9, 12))
        assert caught.value.filename == str(path) and path.read_bytes() == before
        writer.write(moving_frames(9, 3))
        with small_files(1000), pytest.raises(OSError, match="File too large"):
            writer.close()
    assert_frames(path, 12)
    with VideoWriter(tmp_path / "b.mp4", 8) as writer:
        with small_files(1000), pytest.raises(OSError, match=r"File too large: .*b\.mp4"):
            writer.write(moving_frames(0, 9))
        assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
        writer.write(moving_frames(0, 9))
    assert_frames(tmp_path / "b.mp4", 9)
