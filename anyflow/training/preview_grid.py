"""Draw videos side by side under their prompts, a row for each number of sampling steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from anyflow.pipelines.video import write_video
from anyflow.utils.writing import write_bytes

_MIN_WIDTH = 128  # pixels of a cell, so that a caption fits
_MAX_WIDTH = 3840  # of the whole picture; H.264 ends at 4096
_GAP = 4
_MARGIN = 6  # around text
_LINES = 3  # of a caption


def write_grid(
    videos: Tensor, rows: Sequence[str], columns: Sequence[str], file: Path, fps: float
) -> None:
    """Write ``videos[rows, columns, F, H, W, 3]`` uint8 with labels beside and above them.

    Small videos are enlarged by a whole number, and large ones made smaller until the picture is
    3840 pixels wide.

    Args:
        videos: the videos, on the CPU.
        rows: label of each row.
        columns: label of each column, of which three lines are shown.
        file: file to write, ``.gif`` (which repeats) or ``.mp4``; its folder is made.
        fps: frames per second.

    Raises:
        OSError: the system refuses to write.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    frames = _Grid(videos, rows, columns).frames()
    if file.suffix == ".mp4":
        write_video(frames, file, fps)
        return
    first, *others = frames
    buffer = BytesIO()
    duration = round(1000 / fps)
    first.save(buffer, format="GIF", save_all=True, append_images=others, duration=duration, loop=0)
    write_bytes(file, buffer.getvalue())


class _Grid:
    """Draw the picture with all labels, and each frame of the videos into it."""

    def __init__(self, videos: Tensor, rows: Sequence[str], columns: Sequence[str]) -> None:
        self._videos = videos
        scale: float = math.ceil(_MIN_WIDTH / videos.shape[4])
        if scale == 1:
            scale = min(1.0, _MAX_WIDTH / (len(columns) * videos.shape[4]))
        self._size = (round(videos.shape[4] * scale), round(videos.shape[3] * scale))
        font = ImageFont.load_default(min(max(12, self._size[0] // 24), 28))
        line = sum(font.getmetrics()) if isinstance(font, ImageFont.FreeTypeFont) else 12
        wrapped = [_wrapped(caption, font, self._size[0]) for caption in columns]
        self._left = round(max(font.getlength(label) for label in rows)) + 2 * _MARGIN
        self._top = max(len(lines) for lines in wrapped) * line + 2 * _MARGIN
        right, bottom = self._corner(len(rows), len(columns))
        width, height = right - _GAP, bottom - _GAP
        self._canvas = Image.new(
            "RGB", (width + width % 2, height + height % 2), color=(255, 255, 255)
        )
        draw = ImageDraw.Draw(self._canvas)
        for column, lines in enumerate(wrapped):
            left = self._corner(0, column)[0]
            for index, text in enumerate(lines):
                draw.text((left, _MARGIN + index * line), text, fill=(0, 0, 0), font=font)
        for row, label in enumerate(rows):
            middle = self._corner(row, 0)[1] + self._size[1] // 2
            draw.text((self._left - _MARGIN, middle), label, fill=(0, 0, 0), font=font, anchor="rm")

    def frames(self) -> Iterator[Image.Image]:
        """Draw one frame of every video after another."""
        resampling = (
            Image.Resampling.NEAREST
            if self._size[0] >= self._videos.shape[4]
            else Image.Resampling.LANCZOS
        )
        for index in range(self._videos.shape[2]):
            frame = self._canvas.copy()
            for row in range(self._videos.shape[0]):
                for column in range(self._videos.shape[1]):
                    pixels = Image.fromarray(
                        np.ascontiguousarray(self._videos[row, column, index].numpy())
                    )
                    frame.paste(pixels.resize(self._size, resampling), self._corner(row, column))
            yield frame

    def _corner(self, row: int, column: int) -> tuple[int, int]:
        width, height = self._size
        return self._left + column * (width + _GAP), self._top + row * (height + _GAP)


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """Break a caption into at most three lines that fit, with an ellipsis where text is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    shown = lines[:_LINES]
    for index, line in enumerate(shown):
        last = index == _LINES - 1 and len(lines) > _LINES
        cut = line
        while cut and font.getlength(cut + ("…" if last or cut != line else "")) > width:
            cut = cut[:-1]
        shown[index] = cut + ("…" if last or cut != line else "")
    return shown
