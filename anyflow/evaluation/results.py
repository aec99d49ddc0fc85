"""Hold the results of an any-step evaluation, as ``metrics.json`` stores them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyflow.evaluation.metrics import Metrics
from anyflow.utils.documents import read_json
from anyflow.utils.writing import write_text

METRIC_NAMES = ("fd", "template_mse", "coverage_tv", "motion")
_OPTIONAL = ("motion",)  # files of older versions lack these


@dataclass(frozen=True)
class EvaluationResults:
    """Hold the scores of every method at every step count.

    ``curves[method][steps]`` has the scores, ``floor`` that of real data, ``seconds`` the time of
    each stage of the run.

    Raises ``ValueError`` without a curve, for curves over different step counts, step counts below
    1, metrics that are not finite or are negative, and motion that was measured for some sets of
    videos only.
    """

    floor: Metrics
    curves: Mapping[str, Mapping[int, Metrics]]
    seconds: Mapping[str, float]
    seed: int
    budget: str

    def __post_init__(self) -> None:
        if not self.curves or not all(self.curves.values()):
            raise ValueError("curves must hold at least one method with at least one step count")
        for method, curve in self.curves.items():
            if tuple(sorted(curve)) != self.step_counts:
                raise ValueError(
                    f"every method needs the same step counts: {method!r} has {sorted(curve)}, "
                    f"expected {list(self.step_counts)}"
                )
        if self.step_counts[0] < 1:
            raise ValueError(f"step counts must be >= 1, got {self.step_counts[0]}")
        scores = [("floor", self.floor)] + [
            (f"{m} at {n} steps", s) for m, c in self.curves.items() for n, s in c.items()
        ]
        for name, score in scores:
            for metric, value in score.as_dict().items():
                if not math.isfinite(value) or value < 0:
                    raise ValueError(f"{metric} of {name} must be finite and >= 0, got {value}")
        without = [name for name, score in scores if score.motion is None]
        if without and len(without) < len(scores):
            raise ValueError(
                f"motion must be measured for every set of videos or for none; {without[0]} has "
                "none"
            )

    @property
    def step_counts(self) -> tuple[int, ...]:
        """Return the step counts, ascending."""
        return tuple(sorted(next(iter(self.curves.values()))))

    @property
    def has_motion(self) -> bool:
        """Tell whether motion was measured; files of older versions have none."""
        return self.floor.motion is not None

    def values(self, metric: str) -> dict[str, dict[int, float]]:
        """Return one metric as ``{method: {steps: value}}``, step counts ascending.

        Raises:
            ValueError: the metric is unknown, or is motion and was not measured.
        """
        if metric not in METRIC_NAMES:
            raise ValueError(f"metric must be one of {', '.join(METRIC_NAMES)}, got {metric!r}")
        if metric == "motion" and not self.has_motion:
            raise ValueError(
                f"the run of seed {self.seed} has no motion: the version that made it did not "
                "measure it"
            )
        return {
            m: {n: getattr(c[n], metric) for n in self.step_counts} for m, c in self.curves.items()
        }

    def as_dict(self) -> dict[str, Any]:
        """Return the content of ``metrics.json``, where step counts are strings."""
        return {
            "floor": self.floor.as_dict(),
            "curves": {
                m: {str(n): c[n].as_dict() for n in self.step_counts}
                for m, c in self.curves.items()
            },
            "seconds": dict(self.seconds),
            "seed": self.seed,
            "budget": self.budget,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EvaluationResults:
        """Return the inverse of :meth:`as_dict`.

        Raises:
            ValueError: a key is missing or unknown, or a value is not of its type; the message
                names it.
        """
        names = ("floor", "curves", "seconds", "seed", "budget")
        _require_keys("metrics", data, names)
        floor = _metrics("floor", data["floor"])
        curves = {}
        for method, curve in _object("curves", data["curves"]).items():
            where = f"curves of {method!r}"
            curves[method] = {
                _step_count(where, n): _metrics(f"{where} at {n}", score)
                for n, score in _object(where, curve).items()
            }
        seconds = {
            stage: _number(f"seconds of {stage!r}", v)
            for stage, v in _object("seconds", data["seconds"]).items()
        }
        seed, budget = data["seed"], data["budget"]
        if type(seed) is not int or not isinstance(budget, str):
            raise ValueError(
                f"metrics are malformed: seed must be an integer and budget a text, got {seed!r}, "
                f"{budget!r}"
            )
        return cls(floor, curves, seconds, seed, budget)

    def save(self, path: str | Path) -> None:
        """Write ``metrics.json``, completely or not at all; OSError that names it."""
        write_text(Path(path), json.dumps(self.as_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> EvaluationResults:
        """Read ``metrics.json``.

        Raises:
            ValueError: it cannot be read, or see :meth:`from_dict`; the message names the file.
        """
        data = read_json(path, finite=True)
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _object(where: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"metrics are malformed: {where} must be an object, got {value!r}")
    return value


def _require_keys(
    where: str, value: Any, names: Sequence[str], optional: Sequence[str] = ()
) -> None:
    value = _object(where, value)
    for name in names:
        if name not in value and name not in optional:
            raise ValueError(f"{where} lack the key {name!r}")
    unknown = sorted(set(value) - set(names))
    if unknown:
        raise ValueError(f"{where} have the unknown keys {unknown}")


def _number(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"metrics are malformed: {where} must be a number, got {value!r}")
    return value


def _metrics(where: str, value: Any) -> Metrics:
    _require_keys(where, value, METRIC_NAMES, _OPTIONAL)
    return Metrics(
        **{
            name: _number(f"{name} of {where}", value[name])
            for name in METRIC_NAMES
            if name in value
        }
    )


def _step_count(where: str, text: str) -> int:
    if not text.isdecimal() or str(int(text)) != text:
        raise ValueError(
            f"metrics are malformed: {where} must have step counts such as '4', got {text!r}"
        )
    return int(text)
