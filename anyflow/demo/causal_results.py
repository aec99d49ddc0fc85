"""Write what a finished causal run leaves: scores over time, a moving picture and a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from anyflow.demo.config import CausalDemoConfig
from anyflow.demo.long_clips import LongClipScores, frames_of_a_chunk, real_long
from anyflow.demo.results import environment, stage_row
from anyflow.demo.world import World
from anyflow.evaluation import RecipeStage
from anyflow.evaluation.animations import animation_still
from anyflow.evaluation.long_clips import long_clip_animation, over_time_figure
from anyflow.evaluation.plots import method_style
from anyflow.evaluation.rendering import chart, data_uri, render
from anyflow.evaluation.wording import number, percent, steps_text
from anyflow.utils.writing import write_bytes, write_text

CAUSAL_METRICS_FILE, CAUSAL_REPORT_FILE = "causal_metrics.json", "causal.html"
CAUSAL_ANIMATION_FILE = "causal.gif"

_TITLES = {
    "fd": "Fréchet distance from real clips (lower is better)",
    "template_mse": "Difference to the nearest real clip (lower is better)",
    "of_class": "Share of the clips that are of the kind asked for",
    "off_course": "Pixels off course (lower is better)",
}


@dataclass(frozen=True)
class LongClipResults:
    """Hold the results of a causal run.

    Args:
        frames: frames made when each window of the scores is complete; the first number is the
            length of a training clip.
        floor: Fréchet distance of real clips from other real clips.
        scores: scores by steps of a chunk.
        seconds: time of each stage.
        seed, budget: of the run.
    """

    frames: tuple[int, ...]
    floor: float
    scores: Mapping[int, LongClipScores]
    seconds: Mapping[str, float]
    seed: int
    budget: str

    @property
    def times_training(self) -> str:
        """Return how many times a training clip the clips are, such as ``6``."""
        return f"{self.frames[-1] / self.frames[0]:g}"

    def curves(self, metric: str) -> dict[str, dict[int, float]]:
        """Return ``{steps of a chunk: {frames made so far: value}}`` of one metric."""
        return {
            str(n): dict(zip(self.frames, getattr(score, metric), strict=True))
            for n, score in self.scores.items()
        }

    def as_dict(self) -> dict[str, Any]:
        """Return the content of ``causal_metrics.json``."""
        return {
            "training_frames": self.frames[0],
            "frames": list(self.frames),
            "real": {"fd": self.floor, "template_mse": 0.0, "of_class": 1.0, "off_course": 0.0},
            "steps_per_chunk": {str(n): asdict(score) for n, score in self.scores.items()},
            "seconds": dict(self.seconds),
            "seed": self.seed,
            "budget": self.budget,
        }


def causal_takeaway(results: LongClipResults) -> str:
    """Say in sentences what the clips are at their end."""
    parts = [
        f"{number(score.fd[0])} and {number(score.fd[-1])} at {steps_text(n)} a chunk"
        for n, score in results.scores.items()
    ]
    kept = min(score.of_class[-1] for score in results.scores.values())
    share = "all clips" if kept == 1 else f"at least {percent(kept)} of the clips"
    off = max(score.off_course[-1] for score in results.scores.values())
    return (
        f"Trained on clips of {results.frames[0]} frames, the causal model makes clips of "
        f"{results.frames[-1]}, {results.times_training} times as long, chunk by chunk. At their "
        f"end {share} are of the kind asked for, and within {number(off)} pixels of their course "
        f"on average. The Fréchet distance of the first and of the last {results.frames[0]} frames "
        f"from real clips is {', '.join(parts)}; that of real clips is {number(results.floor)}."
    )


def write_causal_results(
    config: CausalDemoConfig,
    world: World,
    results: LongClipResults,
    videos: Mapping[int, Tensor],
    out: Path,
) -> None:
    """Write ``causal_metrics.json``, ``causal.gif`` and ``causal.html`` into ``out``.

    Args:
        config: settings of the run.
        world: its data.
        results: its scores.
        videos: one clip per class ``[4, F, 12, 12]`` uint8, by steps of a chunk.
        out: folder of the run.
    """
    labels = world.labels(world.shapes.num_classes).cpu()
    frames = config.chunks * frames_of_a_chunk(world)
    real = world.shapes.to_uint8(real_long(world, frames, labels, world.generator(960)))
    columns = {f"{steps_text(n)} a chunk": v for n, v in videos.items()} | {"real": real}
    animation = long_clip_animation(
        columns,
        chunk_frames=frames_of_a_chunk(world),
        training_frames=world.shapes.config.num_frames,
    )
    write_text(out / CAUSAL_METRICS_FILE, json.dumps(results.as_dict(), indent=2) + "\n")
    write_bytes(out / CAUSAL_ANIMATION_FILE, animation)
    values = _values(config, world, results, animation)
    write_text(out / CAUSAL_REPORT_FILE, render("causal.html.j2", values, colors=_colors(results)))


def _values(
    config: CausalDemoConfig, world: World, results: LongClipResults, animation: bytes
) -> dict[str, Any]:
    """Return the variables of the page."""
    seconds = dict(results.seconds)
    return {
        "title": "Clips longer than any in training, chunk by chunk",
        "takeaway": causal_takeaway(results),
        "results": results,
        "animation": {
            "moving": data_uri(animation, "image/gif"),
            "still": data_uri(animation_still(animation), "image/png"),
        },
        "charts": {metric: _charts(results, metric) for metric in _TITLES},
        "tables": [
            {"title": title, "metric": metric, "floor": results.as_dict()["real"][metric]}
            for metric, title in _TITLES.items()
        ],
        "shown": [f for f in results.frames if f % results.frames[0] == 0],
        "lines": [
            {"name": steps_text(int(name)), "key": f"n-{name}"} for name in results.curves("fd")
        ],
        "class_names": list(world.shapes.class_names),
        "config": config,
        "chunk_frames": frames_of_a_chunk(world),
        "recipe": _recipe(config, seconds),
        "seconds": seconds,
        "total_seconds": sum(seconds.values()),
        "environment": environment(config.demo),
    }


def _colors(results: LongClipResults) -> dict[str, str]:
    """Return the color of each number of steps as a CSS variable."""
    return {f"n-{n}": method_style(str(n), rank)[1] for rank, n in enumerate(results.scores)}


def _charts(results: LongClipResults, metric: str) -> list[str]:
    """Draw a chart for each width that the page may have."""
    wide = {"wide": ((8.4, 4.3), True), "narrow": ((4.2, 3.6), False)}
    kinds = wide if metric == "fd" else {"any": ((4.4, 3.1), False)}
    charts = []
    for kind, (size, label_lines) in kinds.items():
        figure = over_time_figure(
            results.curves(metric),
            training_frames=results.frames[0],
            labels={str(n): f"{steps_text(n)} a chunk" for n in results.scores},
            floor=results.floor if metric == "fd" else None,
            title=_TITLES[metric],
            size=size,
            label_lines=label_lines,
            top=_top(results, metric),
        )
        label = f"Chart: {_TITLES[metric]}, against the frames made so far"
        salt = f"anyflow-causal-{metric}-{kind}"
        charts.append(chart(figure, label=label, kind=kind, salt=salt, colors=_colors(results)))
    return charts


def _top(results: LongClipResults, metric: str) -> float | None:
    """Return the end of a linear value axis, or None for a logarithmic one."""
    if metric == "of_class":
        return 1.15  # with room for a line of text above 1
    if metric == "off_course":
        values = [v for curve in results.curves(metric).values() for v in curve.values()]
        return max(1.0, 1.1 * max(values))
    return None


def _recipe(config: CausalDemoConfig, seconds: Mapping[str, float]) -> list[RecipeStage]:
    return [
        stage_row(
            "Flow matching",
            config.demo.flow_matching,
            f"{seconds['flow_matching']:.0f} s; bidirectional, the start of the causal model",
        ),
        stage_row(
            "Causal stage 1: pretraining",
            config.pretrain,
            f"{seconds['causal_pretrain']:.0f} s more; each noisy chunk after clean ones, on "
            f"velocities of data and noise; epsilon {config.demo.epsilon} timesteps",
        ),
    ]
