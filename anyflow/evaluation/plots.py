"""Draw the any-step curves.

matplotlib is imported on first use.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anyflow.evaluation.plot_parts import (
    FAINT,
    INK,
    check_curves,
    draw_floor,
    draw_lines,
    draw_reference,
    label_ends,
    set_ticks,
    value_limits,
    with_room_above,
)
from anyflow.utils.writing import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe-Ito hues (told apart in the common color-vision deficiencies) darkened for thin lines on
# white; each method also has its own marker.
METHOD_STYLES: dict[str, tuple[str, str, str]] = {
    "flow_matching": ("plain flow matching", "#c2540a", "s"),
    "pretrain": ("flow map, stage 1 only", "#08805f", "^"),
    "on_policy": ("flow map", "#0b66c3", "o"),
    "consistency_sampler": ("consistency sampler", "#b0468c", "D"),
}
_SPARE_STYLES = (("#8a6d00", "v"), ("#2a93c9", "P"), ("#5b5f97", "X"), ("#444444", "*"))
DARK_COLORS = {
    "#c2540a": "#ff9a52",
    "#08805f": "#3fcfa5",
    "#0b66c3": "#6cb2ff",
    "#b0468c": "#ec8fcb",
    "#8a6d00": "#e0bf4a",
    "#2a93c9": "#8fd8fa",
    "#5b5f97": "#aeb2f5",
    "#444444": "#c9ced8",
}
FIGURE_SETTINGS: dict[Any, Any] = {
    "font.size": 10.5,
    "axes.linewidth": 0.8,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": FAINT,
}


def method_style(method: str, rank: int = 0) -> tuple[str, str, str]:
    """Return (label, color, marker) of a method.

    Unknown methods get their own name and the ``rank``-th spare style.
    """
    if method in METHOD_STYLES:
        return METHOD_STYLES[method]
    color, marker = _SPARE_STYLES[rank % len(_SPARE_STYLES)]
    return method.replace("_", " "), color, marker


def any_step_figure(
    curves: Mapping[str, Mapping[int, float]],
    *,
    ranges: Mapping[str, Mapping[int, tuple[float, float]]] | None = None,
    styles: Mapping[str, tuple[str, str, str]] | None = None,
    floor: float | None = None,
    reference: float | None = None,
    ylabel: str = "",
    size: tuple[float, float] = (7.6, 4.3),
    label_lines: bool = True,
    log: bool = True,
    bands: bool = False,
    signed: bool = False,
) -> Figure:
    """Draw one metric against the number of network evaluations, one line per method.

    Args:
        curves: ``{method: {steps: value}}``.
        ranges: ``{method: {steps: (lowest, highest)}}``, drawn as error bars; each method is then
            moved a little to the side, so that bars at one number of steps stand beside each other.
        styles: ``{method: (label, color, marker)}``; None takes those of :func:`method_style`.
        floor: score of real data, a shaded band from the axis up to it; a floor of 0 is stated in
            words.
        reference: score of real data where more is not worse, a dashed line with its value.
        ylabel: stands above the value axis.
        size: width and height in inches.
        label_lines: write each method's name at the right end of its line.
        log: the value axis is logarithmic; else it is linear and begins at 0.
        bands: draw ranges as shaded bands around the lines, where a line has more than one point.
        signed: values may be negative; the value axis is linear and spans what is drawn.

    Returns:
        The figure, for :func:`figure_svg` and :func:`save_figure`.

    Raises:
        ValueError: no curve is given or an empty one, a step count is below 1, a value, range,
            floor or reference is not finite, or negative where they are not ``signed``, or
            ``ranges`` do not have the points of ``curves`` and hold their values.
    """
    check_curves(curves, ranges, {"floor": floor, "reference": reference}, signed=signed)
    log = log and not signed
    styles = _styles(curves) if styles is None else styles
    import matplotlib
    from matplotlib.figure import Figure

    room = Room.of(size, label_lines)
    with matplotlib.rc_context(FIGURE_SETTINGS):
        figure = Figure(figsize=size)
        axes = figure.add_axes((room.left, room.bottom, room.width, room.height))
        axes.set_xscale("log", base=2)
        axes.set_yscale("log" if log else "linear")
        ends = draw_lines(axes, curves, ranges, styles, bands)
        real = [score for score in (floor, reference) if score is not None]
        low, high = value_limits(curves, ranges, real, log, signed)
        axes.set_ylim(low, high if reference is None else with_room_above(low, high, log))
        step_counts = sorted({n for curve in curves.values() for n in curve})
        set_ticks(axes, step_counts, high / low if log else None)
        axes.set_xlabel("number of steps")
        axes.set_title(ylabel, loc="left", fontsize=10.5, color=INK, x=room.title, pad=10)
        draw_floor(axes, floor, low)
        draw_reference(axes, reference)
        if label_lines:
            label_ends(axes, ends, size[1] * room.height)
    return figure


def _styles(methods: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """Return the style of each method, spare ones in the order of the methods."""
    methods = list(methods)
    spare = [method for method in methods if method not in METHOD_STYLES]
    return {m: method_style(m, spare.index(m) if m in spare else 0) for m in methods}


@dataclass(frozen=True)
class Room:
    """Place the axes in a figure; all numbers are shares of its width and height."""

    left: float
    bottom: float
    width: float
    height: float
    title: float  # a share of the width of the axes, left of them

    @classmethod
    def of(cls, size: tuple[float, float], label_lines: bool) -> Room:
        right = 1 - (2.1 if label_lines else 0.12) / size[0]
        left = 0.55 / size[0]
        title = -0.45 / (size[0] * right - 0.55)
        return cls(left, 0.52 / size[1], right - left, 1 - 0.88 / size[1], title)


def figure_svg(figure: Figure, *, salt: str = "anyflow") -> str:
    """Return the figure as transparent SVG text without XML header, with real text.

    The same figure and ``salt`` give the same text; different salts keep the ids of two figures on
    a page apart.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    return re.sub(
        r"font: ([\d.]+)px [^;\"]*",
        r"font: \1px system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif",
        text,
    )


def save_figure(figure: Figure, path: str | Path, *, dpi: int = 200) -> None:
    """Write the figure on white, whole or not at all, as the ending of ``path`` says.

    Allowed are .png, .svg and .pdf.
    """
    path, buffer = Path(path), io.BytesIO()
    ending = path.suffix.lstrip(".")
    figure.savefig(buffer, format=ending if ending else None, dpi=dpi, facecolor="white")
    write_bytes(path, buffer.getvalue())
