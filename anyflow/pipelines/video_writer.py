"""Write an MP4 file that can be played while it grows."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from anyflow.pipelines.frames import uint8_frames
from anyflow.pipelines.video import (
    add_stream,
    frame_rate,
    import_av,
    require_even,
    require_mp4,
    require_size,
    video_frame,
)
from anyflow.utils.writing import hidden, whole_file, writing

# The head of the file describes the stream and holds no frame; each fragment says its own time.
_FRAGMENTS = "empty_moov+delay_moov+default_base_moof+frag_custom+frag_discont+skip_trailer"
_DELAY = 2  # frames by which H.264 decodes ahead of showing, at most


class VideoWriter:
    """Write an MP4 file part by part; every part can be played as soon as it is written.

    Codec, quality and colors are those of :func:`anyflow.pipelines.write_video`. The file is a
    fragmented MP4 while it grows. It appears with the first part, in place of an earlier file of
    its name, and holds all frames of the parts before, also when the process is killed. A ``with``
    block that ends, or :meth:`close`, turns it into a plain MP4, whole or not at all. A block that
    an exception ends leaves the fragmented file of the parts before, or no file without any.

    Every part is encoded by itself and begins with a frame that needs no other, so that many small
    parts take more bytes than a few large ones.

    Args:
        path: path to write, ``.mp4``; its folder is made.
        fps: frames per second.

    Raises:
        ValueError: a path or rate that cannot be.
        ImportError: PyAV is missing.
    """

    def __init__(self, path: str | Path, fps: float = 16) -> None:
        import_av()
        self.path, self._rate = Path(path), frame_rate(fps)
        require_mp4(self.path)
        self._shape: tuple[int, ...] | None = None
        self._file: io.FileIO | None = None
        self._parts = self._frames = 0
        self._closed = False

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._stop()

    def write(self, frames: Any) -> None:
        """Append a part to the file, which holds all its frames when this returns.

        Args:
            frames: PIL images, an ``[F, H, W, 3]`` array or an ``[F, 3, H, W]`` tensor; uint8, or
                float in [0, 1].

        Raises:
            ValueError: no frames, an odd height or width, a frame of another size than the first of
                the file, or a closed writer.
            OSError: the system refuses to write. After either error the file is as before, and may
                be written to.
        """
        if self._closed:
            raise ValueError(f"{self.path}: the writer is closed")
        part = list(uint8_frames(frames))
        if not part:
            raise ValueError(f"{self.path}: no frames to write")
        require_even(self.path, *part[0].shape[:2])
        shape = part[0].shape if self._shape is None else self._shape
        for pixels in part:
            require_size(self.path, pixels, shape)
        self._append(_encode_part(part, self._rate, self._parts, self._frames))
        self._shape = shape
        self._parts += 1
        self._frames += len(part)

    def close(self) -> None:
        """Turn the file into a plain MP4; a closed writer stays as it is.

        Raises:
            ValueError: nothing was written.
            OSError: the system refuses to write; the fragmented file stays.
        """
        if self._closed:
            return
        self._stop()
        if self._parts == 0:
            raise ValueError(f"{self.path}: no frames to write")
        _make_plain(self.path)

    def _stop(self) -> None:
        """Leave the file as it is."""
        self._closed = True
        if self._file is not None:
            self._file.close()

    def _append(self, content: bytes) -> None:
        """Append to the file, or leave it as it was; the file gets its name with its first part."""
        with writing(self.path):
            if self._file is not None:
                _write_whole(self._file, content)
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial = hidden(self.path)
            file = io.FileIO(partial, "w")
            try:
                _write_whole(file, content)
                os.replace(partial, self.path)
            except BaseException:
                file.close()
                with suppress(OSError):
                    partial.unlink()
                raise
            self._file = file


def _encode_part(frames: list[np.ndarray], rate: Fraction, index: int, start: int) -> bytes:
    """Encode a part of a video to a fragment of an MP4 file.

    A muxer of FFmpeg writes a fragment when it gets the first frame of the next, so that each part
    has its own.

    Args:
        frames: ``[H, W, 3]`` uint8 each.
        rate: frames per second.
        index: parts before; the first has the head of the file in front.
        start: frames before.
    """
    options = {
        "movflags": _FRAGMENTS,
        "fragment_index": str(index + 1),
        "avoid_negative_ts": "disabled",
    }
    content = io.BytesIO()
    with import_av().open(content, "w", format="mp4", options=options) as container:
        stream = add_stream(container, rate, *frames[0].shape[:2])
        packets = [p for pixels in frames for p in stream.encode(video_frame(pixels))]
        packets += stream.encode(None)
        for position, packet in enumerate(packets, start):
            packet.pts += start
            packet.dts, packet.duration = position - _DELAY, 1
            container.mux(packet)
    boxes = _boxes(content.getvalue())
    return b"".join(box for kind, box in boxes if index == 0 or kind in (b"moof", b"mdat"))


def _boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the kind and the bytes of each box of an MP4 file."""
    start = 0
    while start < len(content):
        end = start + int.from_bytes(content[start : start + 4], "big")
        yield content[start + 4 : start + 8], content[start:end]
        start = end


def _write_whole(file: io.FileIO, content: bytes) -> None:
    """Append boxes to a file without a buffer; after an error the file is as before.

    They begin as one box that readers skip, and the head of the first is written last: readers of a
    file that ends within a fragment may refuse all of it.
    """
    start = file.tell()
    try:
        left = memoryview(len(content).to_bytes(4, "big") + b"free" + content[8:])
        while left:
            left = left[file.write(left) :]
        file.seek(start)
        file.write(content[:8])
        file.seek(0, os.SEEK_END)
    except BaseException:
        with suppress(OSError):
            file.seek(start)
            file.truncate()
        raise


def _make_plain(path: Path) -> None:
    """Replace a fragmented MP4 by a plain one of the same packets, whole or not at all."""
    av = import_av()
    options = {"movflags": "+faststart"}
    with (
        whole_file(path) as partial,
        av.open(str(path)) as source,
        av.open(str(partial), "w", format="mp4", options=options) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:  # the last one is empty
                packet.stream = stream
                target.mux(packet)
