"""Draws the plots of ``docs/performance.md``; each carries the digest of what it was drawn from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gpu import roofline
from gpu.results import Results
from gpu.sizes import PUBLISHED

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


def floor(path: Path, key: str) -> None:
    """Draw each network's floor on each card, split by component: shares of one bar."""
    figure = _figure(8.4, 4.3)
    axes = figure.add_axes((0.12, 0.19, 0.86, 0.73))
    bars = [(size, limits) for size in PUBLISHED.values() for limits in roofline.CARDS.values()]
    for row, (size, limits) in enumerate(bars):
        parts = dict.fromkeys(COLORS, 0.0)
        for component in roofline.forward(size):
            name = component.name if component.name in parts else "everything else"
            parts[name] += component.floor_s(limits)
        whole, left = sum(parts.values()), 0.0
        for name, seconds in parts.items():
            share = seconds / whole
            axes.barh(
                row,
                share,
                left=left,
                height=0.7,
                color=COLORS[name],
                label=name if row == 0 else None,
            )
            if share > 0.05:
                color = INK if name == "linear: cross-attention q, out" else "white"
                text = f"{share:.0%}\n{seconds * 1e3:.0f} ms"
                axes.text(
                    left + share / 2, row, text, ha="center", va="center", color=color, fontsize=8
                )
            left += share
    labels = [
        f"{s.name}, {c.name.split()[0]}\n{roofline.forward_floor_s(s, c):.3f} s" for s, c in bars
    ]
    _bare(axes, labels)
    axes.set_xlim(0, 1)
    axes.set_xticks([])
    figure.legend(loc="lower center", ncols=3, frameon=False, fontsize=8.5)
    axes.set_title(
        "Least time of one forward, computed (480x832, 81 frames)", fontsize=10, loc="left"
    )
    _save(figure, path, key)


def device(results: Results) -> Callable[[Path, str], None]:
    """Return what draws one forward of each network on a device: floor, ours, diffusers compiled
    and eager.
    """

    def draw(path: Path, key: str) -> None:
        figure = _figure(8.4, 3.1)
        for column, (name, size) in enumerate(PUBLISHED.items()):
            axes = figure.add_axes((0.17 + 0.5 * column, 0.1, 0.31, 0.72))
            section = f"forward_{name.lower()}"
            times = {}
            if results.limits is not None:
                times["floor"] = roofline.forward_floor_s(size, results.limits)
            for variant in list(VARIANTS)[1:]:
                milliseconds = results.number(section, variant)
                if milliseconds is not None:
                    times[variant] = milliseconds / 1e3
            for row, variant in enumerate(VARIANTS):
                known = variant in times
                axes.barh(row, times.get(variant, 0.0), height=0.62, color=VARIANTS[variant])
                reason = (
                    results.why("limits", "")
                    if variant == "floor"
                    else results.why(section, variant)
                )
                text = f" {times[variant]:.3f} s" if known else f" {reason[:28]}"
                axes.text(
                    times.get(variant, 0.0),
                    row,
                    text,
                    va="center",
                    fontsize=8.5,
                    color=INK if known else FAINT,
                )
            _bare(axes, list(VARIANTS))
            axes.set_xlim(0, max(times.values(), default=1.0) * 1.35)
            axes.set_xticks([])
            axes.set_title(f"{name}, one forward", fontsize=10, loc="left")
        _save(figure, path, key)

    return draw


def key_of(path: Path) -> str | None:
    """Return the digest that a plot carries; None where there is no such file."""
    if not path.exists():
        return None
    from PIL import Image

    with Image.open(path) as image:
        found = image.info.get(_KEY)
        return None if found is None else str(found)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def _bare(axes: Axes, labels: list[str]) -> None:
    """Rows from the top, no frame."""
    axes.set_yticks(range(len(labels)), labels, fontsize=9, color=INK)
    axes.invert_yaxis()
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _save(figure: Figure, path: Path, key: str) -> None:
    figure.savefig(path, dpi=150, facecolor="white", metadata={_KEY: key, "Software": None})
