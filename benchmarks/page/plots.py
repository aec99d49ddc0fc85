"""Draw the plots of ``docs/performance.md``; each carries the digest of what it was drawn from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import roofline
from sizes import PUBLISHED

from page.floors import CARDS
from page.results import RunResults

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, FAINT = "#1d2430", "#8b93a1"
# By what a component is, in the order of a forward; what is below a hundredth is drawn together.
COLORS = {
    "self-attention": "#0b66c3",
    "linear: feed-forward": "#c2540a",
    "linear: self-attention q, k, v, out": "#e08a4f",
    "linear: cross-attention q, out": "#f0bf9a",
    "norms, rotary, residuals": "#0a8f6c",
    "everything else": "#8b93a1",
}
VARIANTS = {
    "floor": "#c9ced6",
    "ours": "#0b66c3",
    "diffusers + compile": "#e08a4f",
    "diffusers": "#c2540a",
}
_KEY = "anyflow-digest"


def floor(path: Path, digest: str) -> None:
    """Draw each network's floor on each card, split by component: shares of one bar."""
    figure = _figure(8.4, 4.3)
    axes = figure.add_axes((0.12, 0.19, 0.86, 0.73))
    bars = [(size, limits) for size in PUBLISHED.values() for limits in CARDS]
    for y, (size, limits) in enumerate(bars):
        parts = dict.fromkeys(COLORS, 0.0)
        for component in roofline.forward(size):
            name = component.name if component.name in parts else "everything else"
            parts[name] += component.floor_s(limits)
        whole, left = sum(parts.values()), 0.0
        for name, seconds in parts.items():
            share, label = seconds / whole, name if y == 0 else None
            axes.barh(y, share, left=left, height=0.7, color=COLORS[name], label=label)
            if share > 0.05:
                color = INK if name == "linear: cross-attention q, out" else "white"
                text, x = f"{share:.0%}\n{seconds * 1e3:.0f} ms", left + share / 2
                axes.text(x, y, text, ha="center", va="center", color=color, fontsize=8)
            left += share
    _bare(
        axes,
        [f"{s.name}, {c.name.split()[0]}\n{roofline.forward_floor_s(s, c):.3f} s" for s, c in bars],
        1.0,
        "Least time of one forward, computed (480x832, 81 frames)",
    )
    figure.legend(loc="lower center", ncols=3, frameon=False, fontsize=8.5)
    _save(figure, path, digest)


def device(results: RunResults) -> Callable[[Path, str], None]:
    """Return what draws one forward of each network: floor, ours, diffusers compiled and eager."""

    def draw(path: Path, digest: str) -> None:
        figure, limits = _figure(8.4, 3.1), results.limits
        for column, (name, size) in enumerate(PUBLISHED.items()):
            axes = figure.add_axes((0.17 + 0.5 * column, 0.1, 0.31, 0.72))
            section = f"forward_{name.lower()}"
            milliseconds = {v: results.number(section, v) for v in list(VARIANTS)[1:]}
            times = {v: ms / 1e3 for v, ms in milliseconds.items() if ms is not None}
            if limits is not None:
                times["floor"] = roofline.forward_floor_s(size, limits)
            for y, variant in enumerate(VARIANTS):
                known, length = variant in times, times.get(variant, 0.0)
                axes.barh(y, length, height=0.62, color=VARIANTS[variant])
                reason = results.why("limits" if variant == "floor" else section, variant)
                text = f" {length:.3f} s" if known else f" {reason[:28]}"
                color = INK if known else FAINT
                axes.text(length, y, text, va="center", fontsize=8.5, color=color)
            longest = max(times.values(), default=1.0) * 1.35
            _bare(axes, list(VARIANTS), longest, f"{name}, one forward")
        _save(figure, path, digest)

    return draw


def digest_of(path: Path) -> str | None:
    """Return the digest that a plot carries; None without such a file."""
    if not path.exists():
        return None
    from PIL import Image

    with Image.open(path) as image:
        found = image.info.get(_KEY)
        return None if found is None else str(found)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def _bare(axes: Axes, labels: list[str], longest: float, title: str) -> None:
    """Set labels of bars from the top, without a frame."""
    axes.set_yticks(range(len(labels)), labels, fontsize=9, color=INK)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_xlim(0, longest)
    axes.set_xticks([])
    axes.set_title(title, fontsize=10, loc="left")


def _save(figure: Figure, path: Path, digest: str) -> None:
    figure.savefig(path, dpi=150, facecolor="white", metadata={_KEY: digest, "Software": None})
