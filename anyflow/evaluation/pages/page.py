"""Render the page of an evaluation, one HTML file in light and dark, for a phone too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import anyflow
from anyflow.evaluation.pages.clips import Clips, clip_grid
from anyflow.evaluation.pages.sentences import (
    TOLERANCE,
    curve_sentences,
    difference_sentences,
    lead,
    motion_sentences,
)
from anyflow.evaluation.pages.statistics import RESAMPLES, Curve, Statistics
from anyflow.evaluation.plots import DARK_COLORS, any_step_figure
from anyflow.evaluation.rendering import chart, render
from anyflow.evaluation.runs.record import EvaluationRecord, MetricRecord
from anyflow.evaluation.wording import listed, percent, steps_listed
from anyflow.utils.writing import write_text

MOTION = "motion"
_MAX_BANDS = 5  # the intervals of more lines would hide each other
_MAX_LABELS = 5
_LABEL_LENGTH = 26  # characters beside a line
_MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖", "*": "★"}
_COLORS = {
    f"c{i}": color
    for i, color in enumerate(
        ("#0b66c3", "#c2540a", "#08805f", "#b0468c", "#8a6d00", "#2a93c9", "#5b5f97", "#444444")
    )
}
assert set(_COLORS.values()) <= set(DARK_COLORS)


def write_evaluation_report(path: str | Path, record: EvaluationRecord, clips: Clips) -> Path:
    """Write the page of an evaluation, whole or as far as it has come, and return its path.

    Args:
        path: the HTML file; its folder must exist.
        record: the numbers.
        clips: ``[model][steps]``, the files of the videos, prompt by prompt; as many as fit are
            shown.

    Raises:
        OSError: the system refuses to write.
    """
    path = Path(path)
    write_text(path, render("evaluation.html.j2", _template_values(record, clips), colors=_COLORS))
    return path


def _template_values(record: EvaluationRecord, clips: Clips) -> dict[str, Any]:
    statistics = Statistics(record)
    curves = {name: statistics.curves(name) for name in record.metrics}
    shown = [
        name for name in sorted(record.metrics, key=lambda name: name != MOTION) if curves[name]
    ]
    styles = _styles(list(record.models))
    models = [
        {
            "name": name,
            "color": f"c{i % len(_COLORS)}",
            "marker": _MARKERS[styles[name][2]],
            "path": model.path,
            "sampler": {key: _setting(value) for key, value in model.sampler.items()},
        }
        for i, (name, model) in enumerate(record.models.items())
    ]
    return {
        "title": _title(list(record.models)),
        "lead": lead(record, curves),
        "models": models,
        "step_counts": record.step_counts,
        "prompts": record.prompts,
        "num_samples": record.num_samples,
        "seed": record.seed,
        "grid": clip_grid(record, clips),
        "charts": [_chart(statistics, name, curves[name], styles) for name in shown],
        "bands": len(record.models) <= _MAX_BANDS,
        "intervals": any(
            e.low is not None
            for c in curves.values()
            for curve in c.values()
            for e in curve.values()
        ),
        "comparison": _comparison(statistics, shown) if len(record.models) > 1 else None,
        "tables": [_table(statistics, name, curves[name]) for name in shown],
        "missing": [
            metric
            for name, metric in record.metrics.items()
            if metric.needs is not None and not curves[name]
        ],
        "partly": _partly(record, curves),
        "tolerance": percent(TOLERANCE),
        "resamples": RESAMPLES,
        "versions": {"anyflow": anyflow.__version__, "PyTorch": torch.__version__},
    }


def _title(models: list[str]) -> str:
    if len(models) > 3:
        return f"{len(models)} checkpoints, by number of steps"
    return f"{listed(models)}, by number of steps"


def _styles(models: list[str]) -> dict[str, tuple[str, str, str]]:
    """Return (label, color, marker) of each model; colors come again with other markers."""
    colors, markers = list(_COLORS.values()), list(_MARKERS)
    return {
        name: (
            name if len(name) <= _LABEL_LENGTH else f"{name[: _LABEL_LENGTH - 1]}…",
            colors[i % len(colors)],
            markers[(i + i // len(colors)) % len(markers)],
        )
        for i, name in enumerate(models)
    }


def _chart(
    statistics: Statistics,
    name: str,
    curves: Mapping[str, Curve],
    styles: Mapping[str, tuple[str, str, str]],
) -> dict[str, Any]:
    """Draw a metric for wide and for narrow pages, with the sentences that stand above it."""
    metric, real = statistics.record.metrics[name], statistics.reference(name)
    values = {model: {n: e.value for n, e in curve.items()} for model, curve in curves.items()}
    ranges = {model: {n: e.range for n, e in curve.items()} for model, curve in curves.items()}
    numbers = [v for curve in values.values() for v in curve.values()] + (
        [] if real is None else [real]
    )
    with_ranges = len(curves) <= _MAX_BANDS and any(
        e.low is not None for curve in curves.values() for e in curve.values()
    )
    bounds = (
        [bound for curve in ranges.values() for pair in curve.values() for bound in pair]
        if with_ranges
        else []
    )
    log = min(numbers + bounds) > 0 and max(numbers) > 20 * min(numbers)
    large = name == MOTION
    signed = (
        not log and not large and (min(numbers + bounds) < 0 or min(numbers) > 0.4 * max(numbers))
    )
    labels = len(curves) <= _MAX_LABELS
    sizes = (
        {"wide": ((8.4, 4.0), labels), "narrow": ((4.2, 3.4), False)}
        if large
        else {"any": ((4.4, 3.2), False)}
    )
    title = _chart_title(metric)
    svgs = []
    for kind, (size, label_lines) in sizes.items():
        drawn = any_step_figure(
            values,
            ranges=ranges if with_ranges else None,
            styles=styles,
            reference=real,
            ylabel=metric.unit,
            size=size,
            label_lines=label_lines,
            log=log,
            bands=True,
            signed=signed,
        )
        label = f"Chart: {title}, against the number of steps"
        svgs.append(
            chart(drawn, label=label, kind=kind, salt=f"anyflow-{name}-{kind}", colors=_COLORS)
        )
    sentences = motion_sentences(curves, real) if large else curve_sentences(metric, curves)
    return {
        "title": title,
        "large": large,
        "svgs": svgs,
        "sentences": sentences,
        "real": real,
        "labels": labels,
    }


def _chart_title(metric: MetricRecord) -> str:
    return metric.title if metric.better is None else f"{metric.title} ({metric.better} is better)"


def _table(statistics: Statistics, name: str, curves: Mapping[str, Curve]) -> dict[str, Any]:
    metric = statistics.record.metrics[name]
    best: dict[int, float] = {}
    if metric.better is not None and len(curves) > 1:
        choose = max if metric.better == "higher" else min
        for n in statistics.record.step_counts:
            values = [curve[n].value for curve in curves.values() if n in curve]
            best |= {n: choose(values)} if values else {}
    return {
        "title": _chart_title(metric),
        "unit": metric.unit,
        "curves": curves,
        "best": best,
        "real": statistics.reference(name),
    }


def _comparison(statistics: Statistics, names: list[str]) -> dict[str, Any]:
    """Return every checkpoint's difference to the first one, metric by metric."""
    first = next(iter(statistics.record.models))
    tables, sentences = [], []
    for name in names:
        metric = statistics.record.metrics[name]
        differences = statistics.differences(name, first)
        if differences:
            tables.append(
                {
                    "title": _chart_title(metric),
                    "unit": metric.unit,
                    "curves": differences,
                    "decimals": {
                        n: _decimals(
                            [
                                v
                                for c in differences.values()
                                if n in c
                                for v in (c[n].value, *c[n].range)
                            ]
                        )
                        for n in statistics.record.step_counts
                    },
                }
            )
            sentences += [
                f"{metric.title}: {text}"
                for text in difference_sentences(metric, differences, first)
            ]
    return {"first": first, "tables": tables, "sentences": sentences}


def _decimals(values: list[float]) -> int:
    """Return how many decimals show two significant digits of the largest of ``values``."""
    largest = max(map(abs, values), default=0.0)
    return 0 if largest == 0 else min(max(1 - math.floor(math.log10(largest)), 0), 9)


def _partly(record: EvaluationRecord, curves: Mapping[str, Mapping[str, Curve]]) -> list[str]:
    """Say which points a page lacks of metrics that it shows: an evaluation may be unfinished."""
    texts = []
    for name, by_model in curves.items():
        if not by_model:
            continue
        lacking = {
            m: [n for n in record.step_counts if n not in by_model.get(m, {})]
            for m in record.models
        }
        places = {
            m: steps_listed(steps, record.step_counts) for m, steps in lacking.items() if steps
        }
        if not places:
            continue
        same = len(places) == len(record.models) and len(set(places.values())) == 1
        where = (
            f"at {next(iter(places.values()))}"
            if same
            else f"of {listed([f'{m} at {n}' for m, n in places.items()])}"
        )
        needs = f" ({record.metrics[name].needs})" if record.metrics[name].needs else ""
        texts.append(f"{record.metrics[name].title}: not measured {where}{needs}.")
    return texts


def _setting(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return (
        listed([_setting(v) for v in value])
        if isinstance(value, (list, tuple)) and value
        else str(value)
    )
