"""Measure finished sets of videos by every metric that can run, and say what others need."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from anyflow.evaluation.runs.layout import Layout
from anyflow.evaluation.runs.models import ShapesModel, VideoFormat
from anyflow.evaluation.runs.plan import EvaluationPlan
from anyflow.evaluation.runs.record import Better, EvaluationRecord, MetricRecord
from anyflow.evaluation.runs.shapes import SHAPES_METRICS, ShapesMetrics
from anyflow.evaluation.video_metrics import (
    MAX_PSNR,
    VIDEO_METRICS,
    available_metrics,
    dynamic_degree,
    flicker,
    frechet_video_distance,
    load_network,
    psnr,
    relative_motion,
)
from anyflow.utils.devices import resolve_device
from anyflow.utils.documents import shortened
from anyflow.utils.progress import counted

METRICS = {
    name: MetricRecord(metric.title, metric.unit, cast(Better, metric.better))
    for name, metric in VIDEO_METRICS.items()
}
METRICS["psnr"] = replace(METRICS["psnr"], unit=f"dB, at most {MAX_PSNR:g}")
# videos of different sizes compare
METRICS["motion"] = replace(METRICS["motion"], unit="shorter sides per frame")
_OF_REFERENCE = ("psnr", "lpips")
_OF_REAL_VIDEOS = ("motion", "dynamic_degree", "flicker")
_SETS = ("fvd", *SHAPES_METRICS)
_VIDEO_SUFFIXES = (".mp4", ".gif", ".webm", ".mkv", ".mov", ".avi")


class Measurer:
    """Measure videos of a plan from their files.

    Args:
        plan: plan of the evaluation.
        layout: layout of the evaluation's folder.
        metric_models: folder of the weights that metrics need; None for the usual one.
        references: folder of real videos, or None.

    Attributes:
        needs: a sentence on what is missing, by metric that cannot run.

    Raises:
        ValueError: the folder of real videos has none that can be used, or is not for such models.
    """

    def __init__(
        self,
        plan: EvaluationPlan,
        layout: Layout,
        *,
        metric_models: Path | None = None,
        references: Path | None = None,
    ) -> None:
        self._plan, self._layout = plan, layout
        self._models = metric_models
        shapes = [model for model in plan.models.values() if isinstance(model, ShapesModel)]
        if shapes and references is not None:
            raise ValueError(
                "--references is not for models of moving shapes, which bring their real videos"
            )
        self._shapes = ShapesMetrics(shapes[0].seed, plan) if shapes else None
        self._real = None if references is None else RealVideos(references, self._format())
        self.needs = self._missing()
        self._loaded: dict[str, Callable[..., Tensor]] = {}

    def prepare(self, record: EvaluationRecord) -> EvaluationRecord:
        """Return the record with the metrics of this run.

        What an earlier run has measured stays measured.
        """
        table = dict(METRICS) if self._shapes is None else {**METRICS, **SHAPES_METRICS}
        if self._plan.reference_steps:
            reference = f"the same model at {counted(self._plan.reference_steps, 'step')}"
            for name in _OF_REFERENCE:
                table[name] = replace(
                    table[name], title=table[name].title.replace("the reference", reference)
                )
        if self._real is not None:
            table["fvd"] = replace(
                table["fvd"], title=f"{METRICS['fvd'].title} from {self._real.title}"
            )
            if "fvd" in record.metrics and record.metrics["fvd"].title not in (
                table["fvd"].title,
                METRICS["fvd"].title,
            ):
                record = _without(record, "fvd")  # its distances are from other real videos
        measured = {
            name for values in (record.values, record.sets) for m in values.values() for name in m
        }
        metrics = {
            name: record.metrics[name] if name in measured and name in self.needs else
            replace(metric, needs=self.needs.get(name))
            for name, metric in table.items()
        }  # fmt: skip
        return replace(record, metrics={**record.metrics, **metrics})

    def lacking(
        self, record: EvaluationRecord, model: str, num_inference_steps: int, *, compared: bool
    ) -> list[str]:
        """List the metrics that can run and of which a record has no number of a set of videos.

        Args:
            record: record of the folder.
            model: its name.
            num_inference_steps: network evaluations.
            compared: the videos of the reference are all there.
        """
        done = {**record.values.get(model, {}), **record.sets.get(model, {})}
        names = [name for name in record.metrics if name in METRICS or name in SHAPES_METRICS]
        return [
            name
            for name in names
            if name not in self.needs
            and num_inference_steps not in done.get(name, {})
            and not (
                name in _OF_REFERENCE
                and (not compared or num_inference_steps == self._plan.reference_steps)
            )
        ]

    def measure(
        self, model: str, num_inference_steps: int, metrics: Sequence[str]
    ) -> tuple[dict[str, list[float]], dict[str, float]]:
        """Measure a set of videos, all of which are there.

        A metric that fails is left out, and ``needs`` says why from then on.

        Args:
            model: its name.
            num_inference_steps: network evaluations.
            metrics: their names.

        Returns:
            ``[metric]``, a number for each video; and ``[metric]``, a number for the set.
        """
        files, form = (
            self._layout.videos(model, num_inference_steps),
            self._plan.models[model].video,
        )
        texts = [text for text in self._plan.texts for _ in range(self._plan.num_samples)]
        compared: Sequence[Path | None] = [None] * len(files)
        if set(metrics) & set(_OF_REFERENCE):
            compared = self._layout.videos(model, self._plan.reference_steps)
        triples = (
            (read_whole(file, form), None if other is None else read_whole(other, form), text)
            for file, other, text in zip(files, compared, texts, strict=True)
        )
        values = self._measure_videos([name for name in metrics if name not in _SETS], triples)
        sets: dict[str, float] = {}
        if "fvd" in metrics:
            distance = self._attempt(
                "fvd", self._distance, (read_whole(file, form) for file in files)
            )
            sets |= {} if distance is None else {"fvd": distance}
        if self._shapes is not None and set(metrics) & set(SHAPES_METRICS):
            sets |= self._shapes.measure(read_whole(file, form) for file in files)
        return values, sets

    def lacking_references(self, record: EvaluationRecord) -> list[str]:
        """List the metrics of which a record has no numbers of real videos, and could have."""
        if self._real is None and self._shapes is None:
            return []
        names = [*_OF_REAL_VIDEOS, *(() if self._shapes is None else SHAPES_METRICS)]
        return [name for name in names if name not in self.needs and name not in record.references]

    def measure_references(self, metrics: Sequence[str]) -> dict[str, list[float]]:
        """Measure real videos; of a metric of sets, several sets of the size of the models' own."""
        videos: Iterable[Tensor] = () if self._real is None else self._real
        if self._shapes is not None:
            videos = self._shapes.real_videos()
        names = [name for name in metrics if name in _OF_REAL_VIDEOS]
        values = (
            self._measure_videos(names, ((video, None, "") for video in videos)) if names else {}
        )
        if self._shapes is not None and set(metrics) & set(SHAPES_METRICS):
            values |= self._shapes.floor()
        return values

    # One metric -----------------------------------------------------------------------------------

    def _measure_videos(
        self, names: Iterable[str], videos: Iterable[tuple[Tensor, Tensor | None, str]]
    ) -> dict[str, list[float]]:
        """Compute metrics of videos, each with its reference and prompt.

        Metrics that fail are left out.
        """
        values: dict[str, list[float]] = {name: [] for name in names}
        for video, reference, text in videos:
            for name in list(values):
                number = self._attempt(name, self._of_video, name, video, reference, text)
                if number is None:
                    del values[name]
                else:
                    values[name].append(number)
        return values

    def _of_video(self, name: str, video: Tensor, reference: Tensor | None, text: str) -> float:
        """Compute a metric of ``video[F, 3, H, W]`` uint8."""
        one = video[None]
        if name == "motion":
            number = float(relative_motion(one))
        elif name == "dynamic_degree":
            number = float(dynamic_degree(one))
        elif name == "flicker":
            number = float(flicker(one))
        elif name == "clip":
            number = float(self._network(name)(one, [text]))
        else:
            assert reference is not None
            compare = psnr if name == "psnr" else self._network(name)
            number = min(float(compare(one, reference[None])), MAX_PSNR)
        if not math.isfinite(number):
            raise ValueError(f"it gives {number}")
        return number

    def _distance(self, videos: Iterable[Tensor]) -> float:
        """Compute the Fréchet distance of videos from the real ones."""
        assert self._real is not None
        network = self._network("fvd")
        if self._real.features is None:
            self._real.features = torch.cat(
                [network(video[None]).double().cpu() for video in self._real]
            )
        features = torch.cat([network(video[None]).double().cpu() for video in videos])
        return float(frechet_video_distance(features, self._real.features))

    def _network(self, name: str) -> Callable[..., Tensor]:
        """Load the network of a metric, once."""
        if name not in self._loaded:
            device = resolve_device(next(iter(self._plan.models.values())).device)
            self._loaded[name] = load_network(name, self._models, device=device)
        return self._loaded[name]

    def _attempt(
        self, name: str, compute: Callable[..., float], *arguments: object
    ) -> float | None:
        """Return what a metric gives, or None where it cannot be computed, which is noted."""
        try:
            return compute(*arguments)
        except (ValueError, RuntimeError, ImportError, OSError) as error:
            self.needs[name] = " ".join(str(error).split())[:300]
            return None

    def _missing(self) -> dict[str, str]:
        """Return what metrics that cannot run need, a sentence each."""
        available = available_metrics(self._models)
        needs = {name: reason for name in METRICS if (reason := available.get(name)) is not None}
        if not self._plan.reference_steps:
            reason = "it compares with videos of many steps, and --reference-steps is 0"
            needs |= dict.fromkeys(_OF_REFERENCE, reason)
        if "fvd" not in needs:
            if self._real is None:
                needs["fvd"] = "it compares with real videos, whose folder --references names"
            elif self._plan.num_samples * len(self._plan.texts) < 2 or len(self._real) < 2:
                needs["fvd"] = "it compares two sets of at least 2 videos"
        if self._shapes is not None and (reason := self._shapes.needs) is not None:
            needs |= dict.fromkeys(SHAPES_METRICS, reason)
        return needs

    def _format(self) -> VideoFormat:
        return next(iter(self._plan.models.values())).video


class RealVideos:
    """Read the videos of a folder, cut to the size and rate of those that are made.

    All of them are looked at before a model is.

    Args:
        folder: holds files of videos; other files, and folders in it, are left out.
        form: size, length and rate that the videos are cut to.

    Raises:
        ValueError: the folder has no video, or one cannot be read or is too short.
    """

    def __init__(self, folder: Path, form: VideoFormat) -> None:
        if not folder.is_dir():
            raise ValueError(f"--references {shortened(folder)} is not a folder")
        self._form = form
        self._files = sorted(
            p for p in folder.iterdir() if p.suffix.lower() in _VIDEO_SUFFIXES and p.name[0] != "."
        )
        if not self._files:
            raise ValueError(
                f"--references {shortened(folder)} has no videos ({', '.join(_VIDEO_SUFFIXES)})"
            )
        for _ in self:
            pass
        self.title = f"{counted(len(self._files), 'video')} of {folder.resolve().name}"
        self.features: Tensor | None = None

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[Tensor]:
        return (read_whole(file, self._form) for file in self._files)


def read_whole(file: Path, form: VideoFormat) -> Tensor:
    """Read a video, ``[F, 3, H, W]`` uint8; ValueError that names it where that cannot be."""
    from anyflow.data.video import VideoError, read_video

    try:
        return read_video(
            file, num_frames=form.num_frames, height=form.height, width=form.width, fps=form.fps
        )
    except VideoError as error:
        raise ValueError(f"{shortened(file)} {error}") from None


def _without(record: EvaluationRecord, metric: str) -> EvaluationRecord:
    """Return a record without the numbers of a metric."""

    def kept(
        table: Mapping[str, Mapping[str, Mapping[int, object]]],
    ) -> dict[str, dict[str, Mapping[int, object]]]:
        return {
            m: {name: cells for name, cells in of_model.items() if name != metric}
            for m, of_model in table.items()
        }

    return replace(record, values=kept(record.values), sets=kept(record.sets))  # type: ignore[arg-type]
