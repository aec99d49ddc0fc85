"""The results of an any-step evaluation: every method at every step count, as ``metrics.json`` stores them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyflow.evaluation.metrics import Metrics
from anyflow.writing import write_text

METRIC_NAMES = ("fd", "template_mse", "coverage_tv")


@dataclass(frozen=True)
class EvaluationResults:
    """``curves[method][steps]`` with the score of real data as ``floor``; ``seconds`` by stage of the run.

    Raises ``ValueError`` for no curve, curves over different step counts, step counts below 1, and metrics that are
    not finite or are negative.
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
            if tuple(sorted(curve)) != self.steps:
                raise ValueError(
                    f"every method needs the same step counts: {method!r} has {sorted(curve)}, "
                    f"expected {list(self.steps)}"
                )
        if self.steps[0] < 1:
            raise ValueError(f"step counts must be >= 1, got {self.steps[0]}")
        scores = [("floor", self.floor)] + [
            (f"{m} at {n} steps", s) for m, c in self.curves.items() for n, s in c.items()
        ]
        for name, score in scores:
            for metric, value in score.as_dict().items():
                if not math.isfinite(value) or value < 0:
                    raise ValueError(f"{metric} of {name} must be finite and >= 0, got {value}")

    @property
    def steps(self) -> tuple[int, ...]:
        """The step counts, ascending."""
        return tuple(sorted(next(iter(self.curves.values()))))

    def values(self, metric: str) -> dict[str, dict[int, float]]:
        """One metric as ``{method: {steps: value}}``, step counts ascending."""
        if metric not in METRIC_NAMES:
            raise ValueError(f"metric must be one of {', '.join(METRIC_NAMES)}, got {metric!r}")
        return {m: {n: getattr(c[n], metric) for n in self.steps} for m, c in self.curves.items()}

    def as_dict(self) -> dict[str, Any]:
        """The content of ``metrics.json`` (step counts become strings, as JSON requires)."""
        return {
            "floor": self.floor.as_dict(),
            "curves": {m: {str(n): c[n].as_dict() for n in self.steps} for m, c in self.curves.items()},
            "seconds": dict(self.seconds),
            "seed": self.seed,
            "budget": self.budget,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EvaluationResults:
        """Inverse of :meth:`as_dict`; ``ValueError`` naming what is missing or malformed."""
        try:
            curves = {m: {int(n): Metrics(**s) for n, s in c.items()} for m, c in data["curves"].items()}
            return cls(Metrics(**data["floor"]), curves, dict(data["seconds"]), data["seed"], data["budget"])
        except KeyError as error:
            raise ValueError(f"metrics lack the key {error}") from error
        except (TypeError, AttributeError) as error:
            raise ValueError(f"metrics are malformed: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write ``metrics.json``, completely or not at all; OSError that names it."""
        write_text(Path(path), json.dumps(self.as_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> EvaluationResults:
        """Read ``metrics.json``."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
