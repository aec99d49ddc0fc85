"""Merge the results of runs that differ in their seed: means, and the ranges over seeds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from anyflow.evaluation.metrics import Metrics
from anyflow.evaluation.results import EvaluationResults
from anyflow.utils.writing import write_text


@dataclass(frozen=True)
class SeedResults:
    """Hold the results of one or more runs of the same budget, each with a seed of its own.

    Args:
        runs: at least one, over the same methods and step counts.

    Raises:
        ValueError: no run is given, two have the same seed, or they differ in budget, methods or
            step counts.
    """

    runs: tuple[EvaluationResults, ...]

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("runs must hold the results of at least one run")
        if twice := sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1}):
            raise ValueError(
                f"two runs have the seed {twice[0]}; each needs another one (`anyflow demo --seed`)"
            )
        first = self.runs[0]
        for run in self.runs[1:]:
            for what, value, other in (
                ("budget", first.budget, run.budget),
                ("methods", sorted(first.curves), sorted(run.curves)),
                ("step counts", list(first.step_counts), list(run.step_counts)),
            ):
                if value != other:
                    raise ValueError(
                        f"runs of different {what} cannot be merged: {value} of seed {first.seed}, "
                        f"{other} of seed {run.seed}"
                    )

    @classmethod
    def of(cls, results: EvaluationResults | SeedResults) -> SeedResults:
        """Return ``results`` in this form, those of one run too."""
        return results if isinstance(results, SeedResults) else cls((results,))

    @property
    def step_counts(self) -> tuple[int, ...]:
        """Return the step counts, ascending."""
        return self.runs[0].step_counts

    @property
    def methods(self) -> tuple[str, ...]:
        """Return the names of the methods, in the order of the first run."""
        return tuple(self.runs[0].curves)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Return the seeds in the order of the runs."""
        return tuple(run.seed for run in self.runs)

    @property
    def floor(self) -> Metrics:
        """Return the mean score of real data."""
        return Metrics.mean([run.floor for run in self.runs])

    @property
    def has_motion(self) -> bool:
        """Tell whether every run measured the motion of its videos."""
        return all(run.has_motion for run in self.runs)

    def score(self, method: str, num_inference_steps: int) -> Metrics:
        """Return the mean score of a method at a step count."""
        return Metrics.mean([run.curves[method][num_inference_steps] for run in self.runs])

    def values(self, metric: str) -> dict[str, dict[int, float]]:
        """Return the means of one metric over the seeds as ``{method: {steps: mean}}``.

        Step counts are ascending.
        """
        runs = [run.values(metric) for run in self.runs]
        return {
            m: {n: _mean([run[m][n] for run in runs]) for n in self.step_counts}
            for m in self.methods
        }

    def ranges(self, metric: str) -> dict[str, dict[int, tuple[float, float]]] | None:
        """Return ``{method: {steps: (lowest, highest)}}`` over the seeds, None for one run."""
        if len(self.runs) == 1:
            return None
        runs = [run.values(metric) for run in self.runs]
        return {
            m: {
                n: (min(run[m][n] for run in runs), max(run[m][n] for run in runs))
                for n in self.step_counts
            }
            for m in self.methods
        }

    @property
    def seconds(self) -> dict[str, float]:
        """Return the seconds that each stage took in all runs together."""
        total: dict[str, float] = {}
        for run in self.runs:
            for stage, seconds in run.seconds.items():
                total[stage] = total.get(stage, 0.0) + seconds
        return total

    def save(self, path: str | Path) -> None:
        """Write ``{"runs": [...]}``, whole or not at all.

        Each run is as :meth:`EvaluationResults.as_dict` gives it.
        """
        content: Mapping[str, object] = {"runs": [run.as_dict() for run in self.runs]}
        write_text(Path(path), json.dumps(content, indent=2) + "\n")


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
