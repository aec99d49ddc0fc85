"""Draw clips that are longer than any training clip: a picture that moves, and a score over time.

matplotlib and pillow are imported on first use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from anyflow.evaluation.animations import encode_images, gray_indices, in_palette, tile_videos
from anyflow.evaluation.plot_parts import (
    INK,
    draw_floor,
    draw_lines,
    label_ends,
    set_ticks,
    value_limits,
)
from anyflow.evaluation.plots import FIGURE_SETTINGS, Room, method_style

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

_INSIDE, _BEYOND = "#8b93a1", "#0b66c3"


def long_clip_animation(
    videos: Mapping[str, Tensor],
    *,
    chunk_frames: int,
    training_frames: int,
    width: int = 600,
) -> bytes:
    """Draw a GIF of clips side by side above a bar of their chunks, which fills as they are made.

    The bar has one color where the clips are no longer than training clips, and another beyond. The
    videos are drawn in 29 grays, which makes the file a fifth smaller.

    Args:
        videos: ``{label: [N, F, H, W]}`` uint8 gray of one shape; a column shows all N of them.
        chunk_frames: frames of a chunk.
        training_frames: frames of a training clip.
        width: the most pixels of the picture; videos are enlarged by a whole number.

    Returns:
        An endlessly looping GIF at 8 frames per second.

    Raises:
        ValueError: nothing is to be shown, shapes differ, a number of frames is not a positive
            multiple of ``chunk_frames``, or ``width`` leaves no pixel for each of the videos'.
    """
    shapes = {tuple(video.shape) for video in videos.values()}
    if len(shapes) != 1:
        raise ValueError(f"videos must be of one shape, got {sorted(shapes)}")
    shape = next(iter(shapes))
    if chunk_frames < 1 or shape[1] % chunk_frames or not 0 < training_frames <= shape[1]:
        raise ValueError(
            f"{shape[1]} frames must be whole chunks of {chunk_frames} frames, and training clips "
            f"no longer, got {training_frames}"
        )
    strip = _Strip.fit(shape, len(videos), width, chunk_frames, training_frames)
    tiles = [
        gray_indices(
            tile_videos(
                _in_few_grays(video),
                strip.rows,
                strip.cols,
                upscale=strip.upscale,
                padding=2,
                background=110,
            )
        )
        for video in videos.values()
    ]
    images = []
    for frame in range(shape[1]):
        if frame % chunk_frames == 0:
            drawn = strip.draw(list(videos), frame // chunk_frames + 1)
            background = in_palette(drawn, [INK, _INSIDE, _BEYOND])
        picture = background.copy()
        for column, tile in enumerate(tiles):
            picture.paste(tile[frame], strip.corner(column))
        images.append(picture)
    return encode_images(images, format="gif", fps=8.0)


def _in_few_grays(videos: Tensor) -> Tensor:
    """Round grays to multiples of 9."""
    return ((videos.float() / 9).round() * 9).clamp(max=252).byte()


@dataclass(frozen=True)
class _Strip:
    """Place the columns and the bar of chunks; all lengths are in pixels."""

    frames: int
    rows: int
    cols: int
    upscale: int
    cell: tuple[int, int]
    columns: int
    chunk_frames: int
    training_frames: int

    margin, gap, label, bar = 12, 14, 40, 18

    @classmethod
    def fit(
        cls, shape: tuple[int, ...], columns: int, width: int, chunk_frames: int, training: int
    ) -> _Strip:
        count, frames, height, across = shape
        cols = math.ceil(math.sqrt(count))
        rows = math.ceil(count / cols)
        room = (width - 2 * cls.margin - (columns - 1) * cls.gap) // columns
        upscale = (room - 2 * (cols - 1)) // (cols * across)
        if upscale < 1:
            raise ValueError(
                f"width {width} has no room for {columns} columns of {cols} videos {across} pixels "
                "wide"
            )
        cell = (cols * across * upscale + 2 * (cols - 1), rows * height * upscale + 2 * (rows - 1))
        return cls(frames, rows, cols, upscale, cell, columns, chunk_frames, training)

    def corner(self, column: int) -> tuple[int, int]:
        """Return left and top of a column."""
        return self.margin + column * (self.cell[0] + self.gap), self.margin + self.label

    def draw(self, labels: Sequence[str], made: int) -> Image:
        """Draw the picture without its videos, with a number of chunks made."""
        from PIL import Image, ImageDraw, ImageFont

        right = self.corner(self.columns - 1)[0] + self.cell[0]
        top = self.corner(0)[1] + self.cell[1] + self.gap
        below = top + self.bar + self.label
        picture = Image.new("RGB", (right + self.margin, below + self.margin // 2), "white")
        draw = ImageDraw.Draw(picture)
        font = ImageFont.load_default(size=max(self.cell[0] / 8, 8))
        for column, label in enumerate(labels):
            x = self.corner(column)[0] + self.cell[0] / 2
            draw.text((x, self.margin + 14), label, fill=INK, font=font, anchor="mm")
        chunks = self.frames // self.chunk_frames
        edges = [round(self.margin + (right - self.margin) * c / chunks) for c in range(chunks + 1)]
        trained = self.training_frames // self.chunk_frames
        for chunk in range(chunks):
            color = _INSIDE if chunk < trained else _BEYOND
            box = (edges[chunk], top, edges[chunk + 1] - 3, top + self.bar)
            draw.rectangle(box, outline=color, fill=color if chunk < made else "white")
        beyond = made > trained
        text = f"{made * self.chunk_frames} frames in {made} chunk{'' if made == 1 else 's'}"
        y = top + self.bar + self.label / 2
        draw.text((right, y), text, fill=INK, font=font, anchor="rm")
        note = (
            f"{made * self.chunk_frames / self.training_frames:.1f} times a training clip"
            if beyond
            else "no longer than training clips"
        )
        draw.text((self.margin, y), note, fill=_BEYOND if beyond else INK, font=font, anchor="lm")
        return picture


def over_time_figure(
    curves: Mapping[str, Mapping[int, float]],
    *,
    training_frames: int,
    labels: Mapping[str, str],
    floor: float | None = None,
    title: str = "",
    size: tuple[float, float] = (7.6, 4.3),
    label_lines: bool = True,
    top: float | None = None,
) -> Figure:
    """Draw a score of clips as they get longer, one line per way of sampling.

    Args:
        curves: ``{name: {frames made so far: value}}``.
        training_frames: frames of a training clip, where a line is drawn.
        labels: ``{name: text}`` beside the lines.
        floor: score of real clips, a shaded band from the axis up to it.
        title: stands above the value axis.
        size: width and height in inches.
        label_lines: write each name at the right end of its line.
        top: end of a linear value axis, which begins at 0; None draws a logarithmic one.

    Returns:
        The figure.

    Raises:
        ValueError: no curve is given.
    """
    if not curves:
        raise ValueError("curves must hold at least one line")
    import matplotlib
    from matplotlib.figure import Figure

    styles = {
        name: (labels[name], *method_style(name, rank)[1:]) for rank, name in enumerate(curves)
    }
    room = Room.of(size, label_lines)
    with matplotlib.rc_context(FIGURE_SETTINGS):
        figure = Figure(figsize=size)
        axes = figure.add_axes((room.left, room.bottom, room.width, room.height))
        log = top is None
        axes.set_yscale("log" if log else "linear")
        ends = draw_lines(axes, curves, None, styles, False)
        real = [] if floor is None else [floor]
        low, high = value_limits(curves, None, real, True, False) if top is None else (0.0, top)
        axes.set_ylim(low, high)
        frames = sorted({frame for curve in curves.values() for frame in curve})
        marks = [frame for frame in frames if frame % training_frames == 0]
        set_ticks(axes, marks or frames, high / low if log else None)
        axes.set_xlim(frames[0] - 1.5, frames[-1] + 1)
        axes.axvline(training_frames, color=INK, linewidth=1.2, linestyle=(0, (5, 3)), zorder=2)
        axes.annotate(
            "training clips end here",
            (training_frames, 1),
            xycoords=("data", "axes fraction"),
            xytext=(6, -3),
            textcoords="offset points",
            va="top",
            fontsize=9,
            color=INK,
            zorder=5,
        )
        axes.set_xlabel("frames made so far")
        axes.set_title(title, loc="left", fontsize=10.5, color=INK, x=room.title, pad=10)
        draw_floor(axes, floor, low)
        if label_lines:
            label_ends(axes, ends, size[1] * room.height)
    return figure
