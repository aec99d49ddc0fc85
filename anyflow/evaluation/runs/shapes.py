"""Measure models of moving shapes by the metrics of the quickstart, against known real videos."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from anyflow.evaluation.runs.models import SHAPES_UPSCALE
from anyflow.evaluation.runs.plan import EvaluationPlan
from anyflow.evaluation.runs.record import MetricRecord

SHAPES_METRICS = {
    "fd": MetricRecord("Fréchet distance to held-out videos", "", "lower"),
    "template_mse": MetricRecord("Error to the nearest real video", "data variance", "lower"),
    "coverage_tv": MetricRecord("Unevenness of positions", "total variation, 0 to 1", "lower"),
}
_FLOOR_SETS = 8
_FLOOR_STREAM = (
    950  # stream of the run's randomness; the quickstart's own streams have lower numbers
)


class ShapesMetrics:
    """Measure sets of videos of moving shapes against held-out ones.

    Args:
        seed: seed of the run that trained the model, which decides the held-out videos.
        plan: plan of the evaluation, with the classes as its prompts.
    """

    def __init__(self, seed: int, plan: EvaluationPlan) -> None:
        from anyflow.demo import DemoConfig, World
        from anyflow.demo.evaluate import build_evaluator

        self._world = World(DemoConfig(seed=seed))
        self._evaluator = build_evaluator(self._world)
        names = self._world.shapes.class_names
        labels = [names.index(text) for text in plan.texts if text in names]
        self._labels = torch.tensor(labels).repeat_interleave(plan.num_samples)
        self.needs: str | None = None
        if set(labels) != set(range(len(names))) or plan.num_samples < 2:
            self.needs = "it compares every class, of at least 2 videos each (--num-samples)"

    def measure(self, videos: Iterable[Tensor]) -> dict[str, float]:
        """Measure a set of enlarged videos ``[8, 3, 96, 96]`` uint8, in the order of the plan."""
        return self._score(torch.stack([self._reduced(video) for video in videos]))

    def floor(self) -> dict[str, list[float]]:
        """Measure sets of real videos of the plan's size, which a perfect model would match."""
        scores = [self._score(videos) for videos in self._real_sets()]
        return {name: [score[name] for score in scores] for name in SHAPES_METRICS}

    def real_videos(self) -> Iterator[Tensor]:
        """Yield a real video for each of the plan's at a number of steps, enlarged as they are."""
        for gray in self._world.shapes.to_uint8(next(self._real_sets())):
            enlarged = gray.repeat_interleave(SHAPES_UPSCALE, 1).repeat_interleave(
                SHAPES_UPSCALE, 2
            )
            yield enlarged[:, None].expand(-1, 3, -1, -1)

    def _score(self, videos: Tensor) -> dict[str, float]:
        scores = self._evaluator.evaluate(videos, self._labels).as_dict()
        return {name: scores[name] for name in SHAPES_METRICS}

    def _real_sets(self) -> Iterator[Tensor]:
        for stream in range(_FLOOR_STREAM, _FLOOR_STREAM + _FLOOR_SETS):
            generator = self._world.generator(stream)
            yield self._world.shapes.sample(len(self._labels), generator, self._labels)[0]

    def _reduced(self, video: Tensor) -> Tensor:
        """Return an enlarged video ``[8, 1, 12, 12]``, normalized as the models' data are."""
        gray = torch.nn.functional.avg_pool2d(
            video.float().mean(1, keepdim=True) / 255, SHAPES_UPSCALE
        )
        return (gray - self._world.shapes.mean) / self._world.shapes.std
