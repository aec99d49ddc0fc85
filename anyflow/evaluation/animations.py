"""Draw videos as animations: tiles, GIF, WebP and the any-step picture.

pillow is imported on first use.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anyflow.evaluation.plot_parts import FAINT, INK
from anyflow.evaluation.plots import method_style
from anyflow.utils.writing import write_bytes

if TYPE_CHECKING:
    from PIL.Image import Image


def tile_videos(
    videos: Tensor,
    rows: int,
    cols: int,
    *,
    upscale: int = 1,
    padding: int = 1,
    background: int = 255,
) -> Tensor:
    """Lay ``videos[N, F, H, W]`` uint8 out on a grid, line by line.

    The result is ``[F, rows*H' + ..., cols*W' + ...]`` uint8. Each pixel becomes
    ``upscale x upscale``; ``padding`` pixels of gray level ``background`` lie between the tiles and
    fill the cells left over. Raises ``ValueError`` for another dtype or shape, or more videos than
    cells.
    """
    if videos.ndim != 4 or videos.dtype != torch.uint8:
        raise ValueError(
            f"videos must be [N, F, H, W] uint8, got {videos.dtype} of shape {tuple(videos.shape)}"
        )
    if rows < 1 or cols < 1 or upscale < 1 or padding < 0 or not 0 <= background <= 255:
        raise ValueError(
            f"rows, cols and upscale must be >= 1, padding >= 0 and background in 0..255, got "
            f"{rows}, {cols}, {upscale}, {padding}, {background}"
        )
    if videos.shape[0] > rows * cols:
        raise ValueError(f"{videos.shape[0]} videos do not fit on {rows} x {cols} cells")
    tiles = videos.repeat_interleave(upscale, dim=2).repeat_interleave(upscale, dim=3)
    height, width = tiles.shape[2] + padding, tiles.shape[3] + padding
    canvas = torch.full(
        (videos.shape[1], rows * height - padding, cols * width - padding),
        background,
        dtype=torch.uint8,
        device=videos.device,
    )
    for i, tile in enumerate(tiles):
        top, left = i // cols * height, i % cols * width
        canvas[:, top : top + tile.shape[1], left : left + tile.shape[2]] = tile
    return canvas


def encode_animation(frames: Tensor, *, format: str = "webp", fps: float = 8.0) -> bytes:
    """Encode ``frames[F, H, W]`` uint8 gray as a lossless, looping ``"webp"`` or ``"gif"``."""
    if frames.ndim != 3 or frames.dtype != torch.uint8 or frames.shape[0] < 1:
        raise ValueError(
            f"frames must be [F >= 1, H, W] uint8, got {frames.dtype} of shape "
            f"{tuple(frames.shape)}"
        )
    if format not in ("webp", "gif"):
        raise ValueError(f"format must be 'webp' or 'gif', got {format!r}")
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps must be a finite number > 0, got {fps}")
    from PIL import Image

    images = [Image.fromarray(frame.numpy()) for frame in frames.cpu()]
    if format == "webp":
        images = [image.convert("RGB") for image in images]
    return encode_images(images, format=format, fps=fps)


def save_animation(path: str | Path, frames: Tensor, *, fps: float = 8.0) -> None:
    """Write ``frames[F, H, W]`` uint8 gray to a ``.webp`` or ``.gif`` file, whole or not at all.

    :func:`tile_videos` makes such frames.
    """
    path = Path(path)
    write_bytes(path, encode_animation(frames, format=path.suffix.lower().lstrip("."), fps=fps))


def animation_still(animation: bytes) -> bytes:
    """Return the last frame of an animation as a PNG."""
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(io.BytesIO(animation)) as picture:
        picture.seek(getattr(picture, "n_frames", 1) - 1)
        picture.convert("RGB").save(buffer, format="png")
    return buffer.getvalue()


def any_step_animation(
    samples: Mapping[str, Mapping[int, Tensor]],
    *,
    methods: Sequence[str] | None = None,
    width: int = 800,
) -> bytes:
    """Draw a GIF with a line of videos per method and a column per number of steps, labeled.

    Args:
        samples: ``[method][steps]``, videos ``[N, F, H, W]`` uint8 gray of one shape; a cell shows
            all N of them.
        methods: rows from top to bottom; None takes every method of ``samples``.
        width: the most pixels of the picture; videos are enlarged by a whole number.

    Returns:
        An endlessly looping GIF at 8 frames per second.

    Raises:
        ValueError: nothing is to be shown, a method or a number of steps is missing, shapes
            differ, or ``width`` leaves no pixel for each of the videos'.
    """
    methods = list(samples) if methods is None else list(methods)
    if not methods or not all(samples.get(method) for method in methods):
        raise ValueError(
            f"samples must have videos of each of {methods}, but are of {sorted(samples)}"
        )
    steps = sorted(samples[methods[0]])
    shapes = {tuple(video.shape) for method in methods for video in samples[method].values()}
    if any(sorted(samples[method]) != steps for method in methods) or len(shapes) != 1:
        raise ValueError(
            "every method needs videos of one shape at the same step counts, got shapes "
            f"{sorted(shapes)}"
        )
    layout = _Layout.fit(shapes.pop(), len(steps), width)
    colors = [INK, FAINT, *(method_style(method, i)[1] for i, method in enumerate(methods))]
    background = in_palette(layout.draw_labels(methods, steps), colors)
    frames = [background.copy() for _ in range(layout.frames)]
    for row, method in enumerate(methods):
        for column, n in enumerate(steps):
            for frame, tile in zip(frames, layout.tile(samples[method][n]), strict=True):
                frame.paste(tile, layout.corner(row, column))
    return encode_images(frames, format="gif", fps=8.0)


# the any-step picture's palette has 86 grays, which leave room for the colors of its letters
_GRAY_STEP = 3


@dataclass(frozen=True)
class _Layout:
    """Place the cells and labels of the any-step picture; all lengths are in pixels."""

    frames: int
    rows: int
    cols: int
    upscale: int
    cell: tuple[int, int]
    columns: int

    margin, gap, label = 12, 6, 44

    @classmethod
    def fit(cls, shape: tuple[int, ...], columns: int, width: int) -> _Layout:
        count, frames, height, across = shape
        cols = math.ceil(math.sqrt(count))
        rows = math.ceil(count / cols)
        room = min(170, (width - 2 * cls.margin - (columns - 1) * cls.gap) // columns)
        upscale = (room - 2 * (cols - 1)) // (cols * across)
        if upscale < 1:
            raise ValueError(
                f"width {width} has no room for {columns} columns of {cols} videos {across} pixels "
                "wide"
            )
        cell = (cols * across * upscale + 2 * (cols - 1), rows * height * upscale + 2 * (rows - 1))
        return cls(frames, rows, cols, upscale, cell, columns)

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """Return left and top of a cell."""
        top = self.margin + self.label + row * (self.label + self.cell[1] + self.gap) + self.label
        return self.margin + column * (self.cell[0] + self.gap), top

    def draw_labels(self, methods: Sequence[str], steps: Sequence[int]) -> Image:
        """Draw the picture without its videos."""
        from PIL import Image, ImageDraw, ImageFont

        left, top = self.corner(len(methods) - 1, self.columns - 1)
        picture = Image.new(
            "RGB", (left + self.cell[0] + self.margin, top + self.cell[1] + self.margin), "white"
        )
        draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=26)
        for column, n in enumerate(steps):
            x = self.corner(0, column)[0] + self.cell[0] / 2
            draw.text(
                (x, self.margin + 14),
                f"{n} step{'' if n == 1 else 's'}",
                fill=INK,
                font=font,
                anchor="mm",
            )
        for row, method in enumerate(methods):
            label, color, _ = method_style(method, row)
            x, y = self.corner(row, 0)
            draw.text((x, y - self.label / 2 + 2), label, fill=color, font=font, anchor="lm")
            after = x + draw.textlength(label, font=font) + 12
            draw.line(
                (
                    after,
                    y - self.label / 2 + 4,
                    picture.width - self.margin,
                    y - self.label / 2 + 4,
                ),
                fill=FAINT,
            )
        return picture

    def tile(self, videos: Tensor) -> list[Image]:
        """Draw each frame of a cell, its grays as colors of the palette (:func:`in_palette`)."""
        tiled = tile_videos(
            videos, self.rows, self.cols, upscale=self.upscale, padding=2, background=110
        )
        return gray_indices(tiled)


def gray_indices(frames: Tensor) -> list[Image]:
    """Draw frames ``[F, H, W]`` uint8, their grays as colors of :func:`in_palette`'s palette."""
    from PIL import Image

    indices = (frames.cpu().float() / _GRAY_STEP).round().byte()
    return [Image.fromarray(frame.numpy()) for frame in indices]


def in_palette(picture: Image, colors: Sequence[str]) -> Image:
    """Return a picture with a palette of grays and of each color's way to white.

    The grays are ``_GRAY_STEP`` apart, from black.
    """
    from PIL import Image, ImageColor

    shades = [3 * (gray,) for gray in range(0, 256, _GRAY_STEP)]
    for color in colors[:10]:
        rgb = ImageColor.getrgb(color)[:3]
        shades += [tuple(round(255 + (part - 255) * i / 15) for part in rgb) for i in range(16)]  # type: ignore[misc]
    pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
    # one number per color, which is found far sooner than a row of three
    packed = pixels.view(-1, 3).int() @ torch.tensor([1 << 16, 1 << 8, 1], dtype=torch.int32)
    packed, where = packed.unique(return_inverse=True)
    found = torch.stack([packed >> 16, packed >> 8 & 255, packed & 255], dim=1)
    nearest = torch.cdist(found.float(), torch.tensor(shades, dtype=torch.float32)).argmin(dim=1)
    result = Image.frombytes("P", picture.size, nearest[where].to(torch.uint8).numpy().tobytes())
    result.putpalette([part for shade in shades for part in shade])
    return result


def encode_images(images: Sequence[Image], *, format: str, fps: float) -> bytes:
    """Encode frames, endlessly looping."""
    options = {"lossless": True, "method": 6} if format == "webp" else {"optimize": False}
    buffer = io.BytesIO()
    images[0].save(
        buffer,
        format=format,
        save_all=True,
        append_images=images[1:],
        duration=round(1000 / fps),
        loop=0,
        **options,
    )
    return buffer.getvalue()
