"""The HTML report of an any-step evaluation: one self-contained file that works offline, in light and dark mode."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyflow.evaluation.findings import findings, number, takeaway
from anyflow.evaluation.plots import (
    BAND,
    FAINT,
    INK,
    METHOD_STYLES,
    any_step_figure,
    encode_animation,
    figure_svg,
    method_style,
    tile_videos,
)
from anyflow.evaluation.results import EvaluationResults
from anyflow.writing import write_text

_METRIC_TITLES = {
    "fd": "Fréchet distance",
    "template_mse": "Template error",
    "coverage_tv": "Coverage error",
}
_METHOD_NOTES = {
    "flow_matching": "the velocity model, Euler steps",
    "pretrain": "flow map after data training",
    "on_policy": "flow map after on-policy training",
    "consistency_sampler": "stage-2 weights, re-noised each step",
}


@dataclass(frozen=True)
class RecipeStage:
    """One row of the recipe table; everything but ``steps`` and ``batch_size`` is shown as it stands."""

    name: str
    steps: int
    batch_size: int
    learning_rate: str
    ema: str
    notes: str


@dataclass(frozen=True, eq=False)
class ReportData:
    """Everything the report shows.

    ``samples[method][steps]`` and ``real_samples`` are ``[N, F, H, W]`` uint8 gray videos (few: they are all shown;
    four per cell, one per class, look best). ``environment`` is shown as name and value (versions, CPU, threads).
    Raises ``ValueError`` for videos of another shape or dtype and for samples of methods or steps without a score.
    """

    results: EvaluationResults
    samples: Mapping[str, Mapping[int, Tensor]]
    real_samples: Tensor
    recipe: Sequence[RecipeStage] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    class_names: Sequence[str] = ()
    title: str = "One small video model, any number of steps"

    def __post_init__(self) -> None:
        videos = [("real_samples", self.real_samples)]
        for method, by_steps in self.samples.items():
            for steps, video in by_steps.items():
                if steps not in self.results.curves.get(method, {}):
                    raise ValueError(f"samples of {method!r} at {steps} steps have no score in results")
                videos.append((f"samples of {method!r} at {steps} steps", video))
        for name, video in videos:
            if video.ndim != 4 or video.dtype != torch.uint8 or video.shape[0] == 0:
                raise ValueError(f"{name} must be [N >= 1, F, H, W] uint8, got {video.dtype} of {tuple(video.shape)}")


def write_report(path: str | Path, data: ReportData) -> Path:
    """Render ``data`` to the HTML file ``path`` (its folder must exist) and return the path."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, figures=figures, duration=duration)
    html = environment.get_template("report.html.j2").render(_context(data))
    path = Path(path)
    write_text(path, html)
    return path


def figures(value: float) -> str:
    """A metric for a table: three significant digits, trailing zeros kept."""
    return "0" if value == 0 else f"{value:#.3g}".rstrip(".")


def duration(seconds: float) -> str:
    """Seconds for a reader: ``0.4 s``, ``12 s``, ``5 min 03 s``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


def inline_svg(svg: str) -> str:
    """Prepare SVG text for inlining in the report: no XML namespaces, and CSS variables for colors (dark mode)."""
    start, end = svg.index("<svg"), svg.index(">", svg.index("<svg"))
    head = svg[start:end]
    view_box = head[head.index("viewBox") :].split('"')[1]
    colors = {INK: "ink", FAINT: "muted", BAND: "band"} | {style[1]: f"m-{m}" for m, style in METHOD_STYLES.items()}
    body = svg[end:].replace("xlink:href", "href")
    for color, name in colors.items():
        body = body.replace(color, f"var(--{name})")
    body = body.replace("#ffffff", "var(--card)")
    return f'<svg viewBox="{view_box}" role="img"{body}'


def _context(data: ReportData) -> dict[str, Any]:
    results = data.results
    methods = [{"key": m, "label": method_style(m)[0], "note": _METHOD_NOTES.get(m, "")} for m in results.curves]
    floor = results.floor.as_dict()
    return {
        "title": data.title,
        "takeaway": takeaway(results),
        "findings": findings(results),
        "results": results,
        "methods": methods,
        "steps": results.steps,
        "charts": {name: _chart(results, name) for name in _METRIC_TITLES},
        "cells": {m: {n: _data_uri(v) for n, v in by_steps.items()} for m, by_steps in data.samples.items()},
        "real_cells": _real_cells(data),
        "recipe": data.recipe,
        "environment": data.environment,
        "class_names": list(data.class_names),
        "colors": {m: style[1] for m, style in METHOD_STYLES.items()},
        "tables": [
            {"title": title, "floor": floor[name], "values": results.values(name)}
            for name, title in _METRIC_TITLES.items()
        ],
        "seconds": {name: s for name, s in results.seconds.items() if name != "total"},
        "total_seconds": results.seconds.get("total", sum(results.seconds.values())),
    }


def _chart(results: EvaluationResults, metric: str) -> str:
    large = metric == "fd"
    figure = any_step_figure(
        results.values(metric),
        floor=results.floor.as_dict()[metric],
        label_lines=large,
        ylabel=f"{_METRIC_TITLES[metric]} (lower is better)",
        size=(8.4, 4.5) if large else (4.6, 3.3),
    )
    return inline_svg(figure_svg(figure, salt=f"anyflow-{metric}"))


def _data_uri(videos: Tensor) -> str:
    cols = math.ceil(math.sqrt(videos.shape[0]))
    rows = math.ceil(videos.shape[0] / cols)
    upscale = max(1, round(48 / videos.shape[-1]))
    frames = tile_videos(videos, rows, cols, upscale=upscale, padding=2, background=110)
    return "data:image/webp;base64," + base64.b64encode(encode_animation(frames, format="webp")).decode()


def _real_cells(data: ReportData) -> list[str]:
    """Real videos cut into cells of the size the samples have, at most one cell per column."""
    sizes = [v.shape[0] for by_steps in data.samples.values() for v in by_steps.values()]
    per_cell = min(sizes) if sizes else data.real_samples.shape[0]
    chunks = data.real_samples.split(per_cell)[: len(data.results.steps)]
    return [_data_uri(c) for c in chunks if c.shape[0] == per_cell or len(chunks) == 1]
