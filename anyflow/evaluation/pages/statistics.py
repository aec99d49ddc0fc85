"""Estimate means and paired differences with 95 % intervals, by bootstrap over prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from anyflow.evaluation.runs.record import EvaluationRecord

RESAMPLES = 2000
_SEED = 0
_TAIL = 2.5  # percent on each side


@dataclass(frozen=True)
class Estimate:
    """Hold a mean with its 95 % interval.

    ``low`` and ``high`` are None where no interval is known.
    """

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def range(self) -> tuple[float, float]:
        """Return the interval; its width is 0 where no interval is known."""
        return (
            self.value if self.low is None else self.low,
            self.value if self.high is None else self.high,
        )

    @property
    def sign(self) -> int:
        """Return 1 or -1 where the whole interval is above or below 0, else 0."""
        if self.low is None or self.high is None:
            return 0
        return 1 if self.low > 0 else -1 if self.high < 0 else 0


Curve = Mapping[int, Estimate]


class Statistics:
    """Estimate means and differences of a record, whose numbers always give the same estimates.

    Prompts are drawn with replacement, with all samples of each: samples of one prompt are not
    independent. Every interval uses the same draws, and differences are taken prompt by prompt, as
    checkpoints share their noise. An interval needs at least two prompts and a number for each
    video.

    Args:
        record: record of the evaluation.
    """

    def __init__(self, record: EvaluationRecord) -> None:
        self.record = record
        count = len(record.prompts)
        self._draws = np.random.default_rng(_SEED).integers(count, size=(RESAMPLES, count))

    def curves(self, metric: str) -> dict[str, Curve]:
        """Return ``{model: {steps: estimate}}`` of a metric, without models that have none."""
        curves: dict[str, Curve] = {}
        for model in self.record.models:
            values, sets = self._cells(model, metric)
            curve = {
                n: self._mean(values[n]) if n in values else Estimate(sets[n])
                for n in sorted({*values, *sets})
            }
            if curve:
                curves[model] = curve
        return curves

    def differences(self, metric: str, first: str) -> dict[str, Curve]:
        """Return every other model's mean minus that of ``first``.

        The result is ``{model: {steps: estimate}}``.
        """
        values, sets = self._cells(first, metric)
        result: dict[str, Curve] = {}
        for model in self.record.models:
            if model == first:
                continue
            others, other_sets = self._cells(model, metric)
            curve = {
                n: self._mean(np.subtract(others[n], values[n]))
                for n in sorted(others)
                if n in values
            }
            curve |= {
                n: Estimate(other_sets[n] - sets[n])
                for n in sorted(other_sets)
                if n in sets and n not in curve
            }
            if curve:
                result[model] = dict(sorted(curve.items()))
        return result

    def reference(self, metric: str) -> float | None:
        """Return the mean of a metric over the real videos, if it was measured."""
        values = self.record.references.get(metric)
        return float(np.mean(values)) if values else None

    def _cells(
        self, model: str, metric: str
    ) -> tuple[Mapping[int, Sequence[float]], Mapping[int, float]]:
        record = self.record
        return record.values.get(model, {}).get(metric, {}), record.sets.get(model, {}).get(
            metric, {}
        )

    def _mean(self, values: Sequence[float] | np.ndarray) -> Estimate:
        by_prompt = (
            np.asarray(values, dtype=np.float64).reshape(len(self.record.prompts), -1).mean(axis=1)
        )
        mean = float(by_prompt.mean())
        if len(by_prompt) < 2:
            return Estimate(mean)
        low, high = np.percentile(by_prompt[self._draws].mean(axis=1), [_TAIL, 100 - _TAIL])
        return Estimate(mean, min(float(low), mean), max(float(high), mean))
