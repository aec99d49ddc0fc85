"""Figures and animations: the any-step curve, tiled videos, GIF and WebP. matplotlib and pillow load on first use."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anyflow.writing import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe-Ito hues (told apart in the common color-vision deficiencies) darkened for thin lines on white; each method
# also has its own marker.
METHOD_STYLES: dict[str, tuple[str, str, str]] = {
    "flow_matching": ("flow matching", "#c2540a", "s"),
    "pretrain": ("flow map, stage 1", "#0a8f6c", "^"),
    "on_policy": ("flow map, stage 2", "#0b66c3", "o"),
    "consistency_sampler": ("consistency sampler", "#b0468c", "D"),
}
_SPARE_STYLES = (("#8a6d00", "v"), ("#2a93c9", "P"), ("#5b5f97", "X"), ("#444444", "*"))
INK, FAINT, BAND = "#1d2430", "#8b93a1", "#7f8896"


def method_style(method: str, rank: int = 0) -> tuple[str, str, str]:
    """(label, color, marker) of a method; unknown methods get their own name and the ``rank``-th spare style."""
    if method in METHOD_STYLES:
        return METHOD_STYLES[method]
    color, marker = _SPARE_STYLES[rank % len(_SPARE_STYLES)]
    return method.replace("_", " "), color, marker


def any_step_figure(
    curves: Mapping[str, Mapping[int, float]],
    *,
    floor: float | None = None,
    ylabel: str = "",
    size: tuple[float, float] = (7.6, 4.3),
    label_lines: bool = True,
) -> Figure:
    """Draw one metric against the number of network evaluations, both axes logarithmic, one line per method.

    ``curves`` is ``{method: {steps: value}}``. ``floor`` (the score of real data) becomes a shaded band from the axis
    up to it; a floor of 0, which a logarithmic axis cannot show, is stated in words. ``size`` in inches.
    Returns the figure, for :func:`figure_svg` and :func:`save_figure`. Raises ``ValueError`` for an empty curve, step
    counts below 1, and values or a floor that are negative or not finite.
    """
    _check_curves(curves, floor)
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    with matplotlib.rc_context(
        {
            "font.size": 10.5,
            "axes.linewidth": 0.8,
            "text.color": INK,
            "axes.labelcolor": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "axes.edgecolor": FAINT,
        }
    ):
        figure = Figure(figsize=size)
        right = 1 - 1.95 / size[0] if label_lines else 0.97
        axes = figure.add_axes((0.62 / size[0], 0.52 / size[1], right - 0.62 / size[0], 1 - 0.85 / size[1]))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ends = _draw_lines(axes, curves)
        low, high = _limits(curves, floor)
        axes.set_ylim(low, high)
        steps = sorted({n for curve in curves.values() for n in curve})
        axes.set_xlim(steps[0] / 1.12, steps[-1] * 1.12)
        axes.xaxis.set_major_locator(FixedLocator(steps))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        # With little range, powers of ten alone would leave an axis with one tick or none.
        wide = math.log10(high / low) > 1.7
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="y", which="major", color=FAINT, alpha=0.25, linewidth=0.7)
        axes.tick_params(length=0, which="both")
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.set_xlabel("sampling steps (network evaluations)")
        axes.set_title(ylabel, loc="left", fontsize=10.5, color=INK, x=-0.5 / (size[0] * right - 0.62), pad=9)
        _draw_floor(axes, floor, low)
        if label_lines:
            _label_ends(axes, ends, size[1] * (1 - 0.85 / size[1]))
    return figure


def figure_svg(figure: Figure, *, salt: str = "anyflow") -> str:
    """The figure as SVG text without XML header or metadata, transparent, with real text in the system font.

    The same figure and ``salt`` give the same text; different salts keep the ids of two figures on a page apart.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    return re.sub(
        r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", text
    )


def save_figure(figure: Figure, path: str | Path, *, dpi: int = 200) -> None:
    """Write the figure on white, completely or not at all; the ending of ``path`` (.png, .svg, .pdf) is the format."""
    path, buffer = Path(path), io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lstrip(".") or None, dpi=dpi, facecolor="white")
    write_bytes(path, buffer.getvalue())


def tile_videos(
    videos: Tensor, rows: int, cols: int, *, upscale: int = 1, padding: int = 1, background: int = 255
) -> Tensor:
    """Lay ``videos[N, F, H, W]`` uint8 out on a grid, row by row: ``[F, rows*H' + ..., cols*W' + ...]`` uint8.

    Each pixel becomes ``upscale x upscale``; ``padding`` pixels of gray level ``background`` lie between the tiles and
    fill the cells left over. Raises ``ValueError`` for another dtype or shape, or more videos than cells.
    """
    if videos.ndim != 4 or videos.dtype != torch.uint8:
        raise ValueError(f"videos must be [N, F, H, W] uint8, got {videos.dtype} of shape {tuple(videos.shape)}")
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
    """Encode ``frames[F, H, W]`` uint8 gray as a lossless, endlessly looping ``"webp"`` or ``"gif"``."""
    if frames.ndim != 3 or frames.dtype != torch.uint8 or frames.shape[0] < 1:
        raise ValueError(f"frames must be [F >= 1, H, W] uint8, got {frames.dtype} of shape {tuple(frames.shape)}")
    if format not in ("webp", "gif"):
        raise ValueError(f"format must be 'webp' or 'gif', got {format!r}")
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"fps must be a finite number > 0, got {fps}")
    from PIL import Image

    images = [Image.fromarray(frame.numpy()) for frame in frames.cpu()]
    if format == "webp":
        images = [image.convert("RGB") for image in images]
    options = {"lossless": True, "method": 6} if format == "webp" else {"optimize": False}
    buffer = io.BytesIO()
    images[0].save(
        buffer, format=format, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0, **options
    )
    return buffer.getvalue()


def save_animation(path: str | Path, frames: Tensor, *, fps: float = 8.0) -> None:
    """Write ``frames[F, H, W]`` uint8 gray (see :func:`tile_videos`) to a whole ``.webp`` or ``.gif`` file."""
    path = Path(path)
    write_bytes(path, encode_animation(frames, format=path.suffix.lower().lstrip("."), fps=fps))


def _check_curves(curves: Mapping[str, Mapping[int, float]], floor: float | None) -> None:
    if not curves:
        raise ValueError("curves must hold at least one method")
    for method, curve in curves.items():
        if not curve or min(curve) < 1:
            raise ValueError(f"curve {method!r} needs at least one point, with step counts >= 1, got {sorted(curve)}")
        for steps, value in curve.items():
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{method!r} at {steps} steps must be finite and >= 0, got {value}")
    if floor is not None and (not math.isfinite(floor) or floor < 0):
        raise ValueError(f"floor must be finite and >= 0, got {floor}")


def _limits(curves: Mapping[str, Mapping[int, float]], floor: float | None) -> tuple[float, float]:
    """Limits of the logarithmic value axis: a little room around everything positive."""
    values = [v for curve in curves.values() for v in curve.values()] + ([] if floor is None else [floor])
    positive = [v for v in values if v > 1e-8]
    if not positive:
        return 0.1, 1.0
    low, high = min(positive), max(positive)
    room = (high / low) ** 0.07 * 1.12
    return low / room, high * room


def _draw_lines(axes: Axes, curves: Mapping[str, Mapping[int, float]]) -> list[tuple[str, str, float, float]]:
    """Draw the curves; returns (label, color, x, y) of every right-hand end."""
    ends = []
    spare = [method for method in curves if method not in METHOD_STYLES]
    for method, curve in curves.items():
        label, color, marker = method_style(method, spare.index(method) if method in spare else 0)
        x = sorted(curve)
        y = [max(curve[n], 1e-12) for n in x]
        front = 4 if method == "on_policy" else 3
        axes.plot(
            x,
            y,
            color=color,
            marker=marker,
            markersize=6,
            linewidth=2.2,
            markeredgecolor="white",
            markeredgewidth=0.9,
            zorder=front,
            clip_on=True,
            solid_capstyle="round",
        )
        ends.append((label, color, float(x[-1]), y[-1]))
    return ends


def _draw_floor(axes: Axes, floor: float | None, low: float) -> None:
    if floor is None:
        return
    if floor > 1e-8:
        axes.axhspan(low, floor, color=BAND, alpha=0.22, linewidth=0, zorder=1)
        note = f"real vs real: {floor:.2g}"
    else:
        note = "real videos: 0"
    axes.annotate(
        note,
        (0, 0),
        xycoords="axes fraction",
        xytext=(5, 4),
        textcoords="offset points",
        fontsize=9,
        color=INK,
        zorder=5,
    )


def _label_ends(axes: Axes, ends: Sequence[tuple[str, str, float, float]], height_inches: float) -> None:
    """Write each line's name beside its end, pushed apart where names would overlap, with a hairline to the line."""
    bottom, top = axes.get_ylim()
    gap = 14.5 / 72 / height_inches
    wanted = [(math.log(max(y, bottom) / bottom) / math.log(top / bottom), label, color) for label, color, _, y in ends]
    wanted.sort()
    placed = spread([w[0] for w in wanted], gap)
    edge = 1.0
    for (natural, label, color), at in zip(wanted, placed, strict=True):
        axes.annotate(
            label,
            xy=(edge - 0.016, natural),
            xycoords="axes fraction",
            xytext=(edge + 0.042, at),
            textcoords="axes fraction",
            color=color,
            va="center",
            fontsize=10.5,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 5},
        )


def spread(positions: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Move ascending ``positions`` as little as needed to lie ``gap`` apart, within [low, high] if they fit there."""
    clusters: list[list[float]] = []  # [center, count]: runs of touching labels, centered on their mean wish
    for position in positions:
        clusters.append([position, 1])
        while len(clusters) > 1 and clusters[-1][0] - clusters[-2][0] < gap * (clusters[-1][1] + clusters[-2][1]) / 2:
            center, count = clusters.pop()
            before, before_count = clusters[-1]
            clusters[-1] = [(center * count + before * before_count) / (count + before_count), count + before_count]
    placed = [center + (i - (count - 1) / 2) * gap for center, count in clusters for i in range(int(count))]
    for i in range(len(placed)):
        placed[i] = max(placed[i], low + i * gap)
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], max(high, low + (len(placed) - 1) * gap) - (len(placed) - 1 - i) * gap)
    return placed
