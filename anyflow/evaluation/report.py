"""Write the HTML report of an any-step evaluation, one file in light and dark, for a phone too."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyflow.evaluation.animations import encode_animation, tile_videos
from anyflow.evaluation.findings import findings
from anyflow.evaluation.plots import METHOD_STYLES, any_step_figure, method_style
from anyflow.evaluation.rendering import chart, data_uri, render
from anyflow.evaluation.results import EvaluationResults
from anyflow.evaluation.seeds import SeedResults
from anyflow.evaluation.summary import figure_sentences, main_methods, takeaway
from anyflow.evaluation.wording import FROZEN_PICTURES, QUALITY_LEVELS, look
from anyflow.utils.writing import write_text

_METRIC_TITLES = {
    "fd": "Fréchet distance",
    "template_mse": "Template error",
    "coverage_tv": "Coverage error",
    "motion": "Motion, in pixels per frame",
}
_CHART_TITLES = {
    "fd": "Distance from real videos (lower is better)",
    "template_mse": "Difference to the nearest real clip (lower is better)",
    "coverage_tv": "Unevenness of positions (lower is better)",
    "motion": "Motion in pixels per frame (0 is frozen)",
}
_COLORS = {f"m-{method}": color for method, (_, color, _) in METHOD_STYLES.items()}
_LARGE_CHARTS = ("fd", "motion")
_LINEAR_CHARTS = ("coverage_tv", "motion")
_METHOD_NOTES = {
    "flow_matching": "the usual way: many small steps",
    "pretrain": "before it learns from videos of its own",
    "on_policy": "steps of any length",
    "consistency_sampler": "the flow map's network, with fresh noise at each step",
}


@dataclass(frozen=True)
class RecipeStage:
    """Hold one line of the recipe table.

    All but ``steps`` (of the optimizer) and ``batch_size`` is shown as it stands.
    """

    name: str
    steps: int
    batch_size: int
    learning_rate: str
    ema: str
    notes: str


@dataclass(frozen=True, eq=False)
class ReportData:
    """Hold everything that the report shows.

    Args:
        results: results of one run, or of several seeds.
        samples: ``[method][steps]``, videos ``[N, F, H, W]`` uint8 gray of the first seed; few, as
            all are shown: four per cell, one per class, look best.
        real_samples: ``[N, F, H, W]`` uint8 gray.
        recipe: rows of its table.
        environment: names and values that are shown, such as versions and the processor.
        class_names: words for what the videos of a cell show, in their order.
        title: title of the page.

    Raises:
        ValueError: videos are of another shape or dtype, or of a method or number of steps without
            a score.
    """

    results: EvaluationResults | SeedResults
    samples: Mapping[str, Mapping[int, Tensor]]
    real_samples: Tensor
    recipe: Sequence[RecipeStage] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    class_names: Sequence[str] = ()
    title: str = "One small video model, any number of steps"

    def __post_init__(self) -> None:
        videos, results = [("real_samples", self.real_samples)], SeedResults.of(self.results)
        for method, by_steps in self.samples.items():
            for steps, video in by_steps.items():
                if method not in results.methods or steps not in results.step_counts:
                    raise ValueError(
                        f"samples of {method!r} at {steps} steps have no score in results"
                    )
                videos.append((f"samples of {method!r} at {steps} steps", video))
        for name, video in videos:
            if video.ndim != 4 or video.dtype != torch.uint8 or video.shape[0] == 0:
                raise ValueError(
                    f"{name} must be [N >= 1, F, H, W] uint8, got {video.dtype} of "
                    f"{tuple(video.shape)}"
                )


def write_report(path: str | Path, data: ReportData) -> Path:
    """Render ``data`` to the HTML file ``path`` (its folder must exist) and return the path."""
    path = Path(path)
    write_text(path, render("report.html.j2", _template_values(data), colors=_COLORS))
    return path


def _template_values(data: ReportData) -> dict[str, Any]:
    results = SeedResults.of(data.results)
    main = main_methods(results)
    methods = [
        {"key": m, "label": method_style(m)[0], "note": _METHOD_NOTES.get(m, ""), "main": m in main}
        for m in results.methods
    ]
    metrics = results.floor.as_dict()
    tables = [
        {
            "title": _METRIC_TITLES[name],
            "floor": floor,
            "values": results.values(name),
            "ranges": results.ranges(name),
            "lower_is_better": name != "motion",
        }
        for name, floor in metrics.items()
    ]
    seconds = results.seconds
    return {
        "title": data.title,
        "takeaway": takeaway(results),
        "sentences": figure_sentences(results),
        "findings": findings(results),
        "budget": results.runs[0].budget,
        "seeds": results.seeds,
        "seed_text": _seed_text(results.seeds),
        "floor": results.floor,
        "methods": methods,
        "shown": [m for m in methods if m["main"] and m["key"] in data.samples],
        "others": [m for m in methods if not m["main"] and m["key"] in data.samples],
        "step_counts": results.step_counts,
        "charts": {name: _charts(results, name) for name in metrics},
        "cells": _cells(data, results.runs[0]),
        "real_cells": _real_cells(data),
        "levels": QUALITY_LEVELS,
        "frozen": FROZEN_PICTURES,
        "recipe": data.recipe,
        "environment": data.environment,
        "class_names": list(data.class_names),
        "tables": tables,
        "seconds": {name: s for name, s in seconds.items() if name != "total"},
        "total_seconds": seconds.get("total", sum(seconds.values())),
    }


def _seed_text(seeds: Sequence[int]) -> str:
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    return f"mean of {len(seeds)} seeds ({', '.join(map(str, seeds))})"


def _charts(results: SeedResults, metric: str) -> list[str]:
    """Draw a chart for each width that the page may have, so that text keeps its size."""
    wide = {"wide": ((8.4, 4.3), True), "narrow": ((4.2, 3.6), False)}
    kinds = wide if metric in _LARGE_CHARTS else {"any": ((4.4, 3.1), False)}
    real = results.floor.as_dict()[metric]
    label = f"Chart: {_CHART_TITLES[metric]}, against the number of steps"
    charts = []
    for kind, (size, label_lines) in kinds.items():
        figure = any_step_figure(
            results.values(metric),
            ranges=results.ranges(metric),
            floor=None if metric == "motion" else real,
            reference=real if metric == "motion" else None,
            label_lines=label_lines,
            ylabel=_CHART_TITLES[metric],
            size=size,
            log=metric not in _LINEAR_CHARTS,
        )
        charts.append(
            chart(figure, label=label, kind=kind, salt=f"anyflow-{metric}-{kind}", colors=_COLORS)
        )
    return charts


def _cells(data: ReportData, run: EvaluationResults) -> dict[str, dict[int, dict[str, str]]]:
    """Return the moving and still picture of each cell of the grid of videos, and a word for it."""
    return {
        method: {
            n: _picture(videos) | {"word": look(run.curves[method][n], run.floor)}
            for n, videos in by_steps.items()
        }
        for method, by_steps in data.samples.items()
    }


def _picture(videos: Tensor) -> dict[str, str]:
    cols = math.ceil(math.sqrt(videos.shape[0]))
    rows = math.ceil(videos.shape[0] / cols)
    upscale = max(1, round(48 / videos.shape[-1]))
    frames = tile_videos(videos, rows, cols, upscale=upscale, padding=2, background=110)
    return {"moving": _data_uri(frames), "still": _data_uri(frames[len(frames) // 2 :][:1])}


def _data_uri(frames: Tensor) -> str:
    return data_uri(encode_animation(frames, format="webp"))


def _real_cells(data: ReportData) -> list[dict[str, str]]:
    """Cut real videos into cells of the size that the samples have, at most one cell per column."""
    sizes = [v.shape[0] for by_steps in data.samples.values() for v in by_steps.values()]
    per_cell = min(sizes) if sizes else data.real_samples.shape[0]
    chunks = data.real_samples.split(per_cell)[: len(SeedResults.of(data.results).step_counts)]
    return [_picture(c) for c in chunks if c.shape[0] == per_cell or len(chunks) == 1]
