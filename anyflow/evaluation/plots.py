"""Draws the any-step curves. matplotlib loads on first use."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from anyflow.utils.writing import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
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
INK, FAINT, BAND = "#1d2430", "#8b93a1", "#7f8896"


def method_style(method: str, rank: int = 0) -> tuple[str, str, str]:
    """(label, color, marker) of a method; unknown methods get their own name and the ``rank``-th
    spare style.
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
    """Draw one metric against the number of network evaluations on a logarithmic axis, one line per
    method.

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
        ValueError: there is no curve or an empty one, a step count is below 1, a value, range,
            floor or reference is not finite, or negative where they are not ``signed``, or
            ``ranges`` do not have the points of ``curves`` and hold their values.
    """
    least = -math.inf if signed else 0.0
    _check_curves(curves, {"floor": floor, "reference": reference}, least)
    if ranges is not None:
        _check_ranges(curves, ranges, least)
    log = log and not signed
    if styles is None:
        spare = [method for method in curves if method not in METHOD_STYLES]
        styles = {m: method_style(m, spare.index(m) if m in spare else 0) for m in curves}
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import (
        FixedLocator,
        FuncFormatter,
        LogLocator,
        MaxNLocator,
        NullFormatter,
        NullLocator,
    )

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
        right = 1 - 2.1 / size[0] if label_lines else 1 - 0.12 / size[0]
        axes = figure.add_axes(
            (0.55 / size[0], 0.52 / size[1], right - 0.55 / size[0], 1 - 0.88 / size[1])
        )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log" if log else "linear")
        ends = _draw_lines(axes, curves, ranges, styles, bands)
        low, high = _limits(
            curves, ranges, [v for v in (floor, reference) if v is not None], log, signed
        )
        axes.set_ylim(low, high if reference is None else _with_room_above(low, high, log))
        steps = sorted({n for curve in curves.values() for n in curve})
        axes.set_xlim(steps[0] / 1.18, steps[-1] * 1.18)
        axes.xaxis.set_major_locator(FixedLocator(steps))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if log:
            # With little range, powers of ten alone would leave an axis with one tick or none.
            wide = math.log10(high / low) > 1.7
            axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="y", which="major", color=FAINT, alpha=0.25, linewidth=0.7)
        axes.tick_params(length=0, which="both")
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.set_xlabel("number of steps")
        axes.set_title(
            ylabel, loc="left", fontsize=10.5, color=INK, x=-0.45 / (size[0] * right - 0.55), pad=10
        )
        _draw_floor(axes, floor, low)
        _draw_reference(axes, reference)
        if label_lines:
            _label_ends(axes, ends, size[1] * (1 - 0.88 / size[1]))
    return figure


def figure_svg(figure: Figure, *, salt: str = "anyflow") -> str:
    """The figure as SVG text without XML header or metadata, transparent, with real text in the
    system font.

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
    """Write the figure on white, completely or not at all; the ending of ``path`` (.png, .svg,
    .pdf) is the format.
    """
    path, buffer = Path(path), io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lstrip(".") or None, dpi=dpi, facecolor="white")
    write_bytes(path, buffer.getvalue())


def _check_curves(
    curves: Mapping[str, Mapping[int, float]], real: Mapping[str, float | None], least: float
) -> None:
    if not curves:
        raise ValueError("curves must hold at least one method")
    for method, curve in curves.items():
        if not curve or min(curve) < 1:
            raise ValueError(
                f"curve {method!r} needs at least one point, with step counts >= 1, got "
                f"{sorted(curve)}"
            )
        for steps, value in curve.items():
            if not math.isfinite(value) or value < least:
                raise ValueError(
                    f"{method!r} at {steps} steps must be finite and >= 0, got {value}"
                )
    for name, score in real.items():
        if score is not None and (not math.isfinite(score) or score < least):
            raise ValueError(f"{name} must be finite and >= 0, got {score}")


def _check_ranges(
    curves: Mapping[str, Mapping[int, float]],
    ranges: Mapping[str, Mapping[int, tuple[float, float]]],
    least: float,
) -> None:
    for method, curve in curves.items():
        if sorted(ranges.get(method, {})) != sorted(curve):
            raise ValueError(
                f"ranges must have the points of curves: {method!r} needs {sorted(curve)}"
            )
        for steps, (low, high) in ranges[method].items():
            room = 1e-9 * abs(curve[steps])  # means are rounded
            if not (
                least <= low <= curve[steps] + room
                and curve[steps] - room <= high < math.inf
                and low > -math.inf
            ):
                raise ValueError(
                    f"the range of {method!r} at {steps} steps must hold its value, got "
                    f"{low}..{high} of {curve[steps]}"
                )


def _limits(
    curves: Mapping[str, Mapping[int, float]],
    ranges: Mapping[str, Mapping[int, tuple[float, float]]] | None,
    real: Sequence[float],
    log: bool,
    signed: bool,
) -> tuple[float, float]:
    """Return limits of the value axis: a little room around everything, on a logarithmic axis what
    is positive.
    """
    values = [v for curve in curves.values() for v in curve.values()] + list(real)
    if ranges is not None:
        values += [v for curve in ranges.values() for pair in curve.values() for v in pair]
    if signed:
        # Of values that are almost equal, ticks would have many digits and differences would look
        # large.
        room = max(0.08 * (max(values) - min(values)), 0.05 * max(map(abs, values))) or 1.0
        return min(values) - room, max(values) + room
    positive = [v for v in values if v > 1e-8]
    if not positive:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = min(positive), max(positive)
    if not log:
        return 0.0, high * 1.08
    room = (high / low) ** 0.07 * 1.12
    return low / room, high * room


def _with_room_above(low: float, high: float, log: bool) -> float:
    """Return an upper limit that leaves the top of the axes free for a line of text."""
    return high * (high / low) ** 0.12 if log else high + 0.12 * (high - low)


def _draw_lines(
    axes: Axes,
    curves: Mapping[str, Mapping[int, float]],
    ranges: Mapping[str, Mapping[int, tuple[float, float]]] | None,
    styles: Mapping[str, tuple[str, str, str]],
    bands: bool,
) -> list[tuple[str, str, float, float]]:
    """Draw the curves; returns (label, color, x, y) of every right-hand end."""
    ends = []
    log = axes.get_yscale() == "log"
    for i, (method, curve) in enumerate(curves.items()):
        label, color, marker = styles[method]
        steps = sorted(curve)
        band = bands and len(steps) > 1
        aside = 1.0 if ranges is None or band else 1.035 ** (i - (len(curves) - 1) / 2)
        x = [n * aside for n in steps]
        y = [max(curve[n], 1e-12) if log else curve[n] for n in steps]
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
        if ranges is not None and band:
            lows, highs = zip(*(ranges[method][n] for n in steps), strict=True)
            axes.fill_between(x, lows, highs, color=color, alpha=0.16, linewidth=0, zorder=2)
        elif ranges is not None:
            pairs = [ranges[method][n] for n in steps]
            below = [max(value - low, 0.0) for value, (low, _) in zip(y, pairs, strict=True)]
            above = [max(high - value, 0.0) for value, (_, high) in zip(y, pairs, strict=True)]
            axes.errorbar(
                x,
                y,
                yerr=[below, above],
                fmt="none",
                ecolor=color,
                elinewidth=1.4,
                capsize=3,
                zorder=front,
            )
        ends.append((label, color, float(x[-1]), y[-1]))
    return ends


def _draw_floor(axes: Axes, floor: float | None, low: float) -> None:
    if floor is None:
        return
    if floor > 1e-8:
        axes.axhspan(low, floor, color=BAND, alpha=0.22, linewidth=0, zorder=1)
        note = f"real videos against each other: {floor:.2g}"
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


def _draw_reference(axes: Axes, reference: float | None) -> None:
    """Draw a dashed line at the score of real videos; its value stands above everything that is
    drawn.
    """
    if reference is None:
        return
    axes.axhline(reference, color=INK, linewidth=1.2, linestyle=(0, (5, 3)), zorder=2)
    axes.annotate(
        f"real videos (dashed): {reference:.2g}",
        (0, 1),
        xycoords="axes fraction",
        xytext=(5, -3),
        textcoords="offset points",
        va="top",
        fontsize=9,
        color=INK,
        zorder=5,
    )


def _label_ends(
    axes: Axes, ends: Sequence[tuple[str, str, float, float]], height_inches: float
) -> None:
    """Write each line's name beside its end, pushed apart where names would overlap, with a
    hairline to the line.
    """
    gap = 14.5 / 72 / height_inches
    to_height = axes.transData + axes.transAxes.inverted()
    heights = [float(to_height.transform((x, y))[1]) for _, _, x, y in ends]
    wanted = [
        (min(max(at, 0.0), 1.0), end[0], end[1]) for at, end in zip(heights, ends, strict=True)
    ]
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
            arrowprops={
                "arrowstyle": "-",
                "color": color,
                "linewidth": 0.8,
                "shrinkA": 1,
                "shrinkB": 5,
            },
        )


def spread(
    positions: Sequence[float], gap: float, low: float = 0.0, high: float = 1.0
) -> list[float]:
    """Move ascending ``positions`` as little as needed to lie ``gap`` apart, within [low, high] if
    they fit there.
    """
    # [center, count]: runs of touching labels, centered on their mean wish
    clusters: list[list[float]] = []
    for position in positions:
        clusters.append([position, 1])
        while (
            len(clusters) > 1
            and clusters[-1][0] - clusters[-2][0] < gap * (clusters[-1][1] + clusters[-2][1]) / 2
        ):
            center, count = clusters.pop()
            before, before_count = clusters[-1]
            clusters[-1] = [
                (center * count + before * before_count) / (count + before_count),
                count + before_count,
            ]
    placed = [
        center + (i - (count - 1) / 2) * gap
        for center, count in clusters
        for i in range(int(count))
    ]
    for i in range(len(placed)):
        placed[i] = max(placed[i], low + i * gap)
    for i in reversed(range(len(placed))):
        placed[i] = min(
            placed[i], max(high, low + (len(placed) - 1) * gap) - (len(placed) - 1 - i) * gap
        )
    return placed
