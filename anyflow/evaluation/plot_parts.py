"""Draw the parts of an any-step figure: lines, ranges, scores of real videos, names, ticks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT, BAND = "#1d2430", "#8b93a1", "#7f8896"


def check_curves(
    curves: Mapping[str, Mapping[int, float]],
    ranges: Mapping[str, Mapping[int, tuple[float, float]]] | None,
    real: Mapping[str, float | None],
    *,
    signed: bool,
) -> None:
    """Raise a ValueError unless curves, their ranges and scores of real data can be drawn."""
    least = -math.inf if signed else 0.0
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
    if ranges is not None:
        _check_ranges(curves, ranges, least)


def _check_ranges(
    curves: Mapping[str, Mapping[int, float]],
    ranges: Mapping[str, Mapping[int, tuple[float, float]]],
    least: float,
) -> None:
    """Raise a ValueError unless ranges have the points of the curves and hold their values."""
    for method, curve in curves.items():
        if sorted(ranges.get(method, {})) != sorted(curve):
            raise ValueError(
                f"ranges must have the points of curves: {method!r} needs {sorted(curve)}"
            )
        for steps, (low, high) in ranges[method].items():
            room = 1e-9 * abs(
                curve[steps]
            )  # a mean is rounded and may pass the range of its values
            if not (
                least <= low <= curve[steps] + room
                and curve[steps] - room <= high < math.inf
                and low > -math.inf
            ):
                raise ValueError(
                    f"the range of {method!r} at {steps} steps must hold its value, got "
                    f"{low}..{high} of {curve[steps]}"
                )


def value_limits(
    curves: Mapping[str, Mapping[int, float]],
    ranges: Mapping[str, Mapping[int, tuple[float, float]]] | None,
    real: Sequence[float],
    log: bool,
    signed: bool,
) -> tuple[float, float]:
    """Return limits of the value axis; a logarithmic axis shows positive values only."""
    values = [v for curve in curves.values() for v in curve.values()] + list(real)
    if ranges is not None:
        values += [v for curve in ranges.values() for pair in curve.values() for v in pair]
    if signed:
        # Without room, ticks of almost equal values would have many digits.
        room = max(0.08 * (max(values) - min(values)), 0.05 * max(map(abs, values)))
        room = 1.0 if room == 0 else room
        return min(values) - room, max(values) + room
    positive = [v for v in values if v > 1e-8]
    if not positive:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = min(positive), max(positive)
    if not log:
        return 0.0, high * 1.08
    room = (high / low) ** 0.07 * 1.12
    return low / room, high * room


def with_room_above(low: float, high: float, log: bool) -> float:
    """Return an upper limit that leaves the top of the axes free for a line of text."""
    return high * (high / low) ** 0.12 if log else high + 0.12 * (high - low)


def draw_lines(
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


def set_ticks(axes: Axes, step_counts: Sequence[int], spread_of_values: float | None) -> None:
    """Mark the step counts on one axis and a few round values on the other, with a light grid.

    Args:
        axes: the axes.
        step_counts: ascending.
        spread_of_values: largest over smallest value of a logarithmic axis; None for a linear one.
    """
    from matplotlib.ticker import (
        FixedLocator,
        FuncFormatter,
        LogLocator,
        MaxNLocator,
        NullFormatter,
        NullLocator,
    )

    axes.set_xlim(step_counts[0] / 1.18, step_counts[-1] * 1.18)
    axes.xaxis.set_major_locator(FixedLocator(step_counts))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    if spread_of_values is not None:
        # With little range, powers of ten alone would leave an axis with one tick or none.
        wide = math.log10(spread_of_values) > 1.7
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", which="major", color=FAINT, alpha=0.25, linewidth=0.7)
    axes.tick_params(length=0, which="both")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def draw_floor(axes: Axes, floor: float | None, low: float) -> None:
    """Shade the axes from below up to the score of real data, and name the score."""
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


def draw_reference(axes: Axes, reference: float | None) -> None:
    """Draw a dashed line at the score of real videos, its value above everything drawn."""
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


def label_ends(
    axes: Axes, ends: Sequence[tuple[str, str, float, float]], height_inches: float
) -> None:
    """Write each line's name beside its end, pushed apart where names would overlap.

    A hairline leads from a name that was pushed to its line.
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
    """Move ascending ``positions`` as little as needed to lie ``gap`` apart.

    They stay within [low, high] if they fit there.
    """
    # [center, count] of runs of touching labels, each centered on its mean position
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
