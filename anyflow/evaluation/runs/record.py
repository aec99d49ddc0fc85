"""Keep every metric of every model at every step count, as ``evaluation.json`` has it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from anyflow.utils.documents import read_json, shortened
from anyflow.utils.validation import brief, finite_number, require_text, whole_number
from anyflow.utils.writing import write_text

RECORD_FILE = "evaluation.json"
FORMAT = "anyflow-evaluation-1"
MAX_SAMPLES = 10_000  # videos of a prompt
MAX_SEED = 2**63 - 1

Better = Literal["higher", "lower"]
PerSample = Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]]
PerSet = Mapping[str, Mapping[str, Mapping[int, float]]]

_KEYS = (
    "models",
    "prompts",
    "steps",
    "num_samples",
    "seed",
    "metrics",
    "values",
    "sets",
    "references",
)


@dataclass(frozen=True)
class ModelRecord:
    """Hold where a model lies and how it was sampled.

    Args:
        path: folder, or the name of a model on the Hugging Face Hub.
        sampler: settings of every video of the model.
    """

    path: str
    sampler: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MetricRecord:
    """Describe a metric.

    Args:
        title: names it in a report.
        unit: unit of the values; empty for a number without one.
        better: ``higher`` or ``lower``; None where that depends on the videos.
        needs: one sentence on what is missing where it could not be computed; None where it was.
    """

    title: str
    unit: str = ""
    better: Better | None = None
    needs: str | None = None


@dataclass(frozen=True)
class EvaluationRecord:
    """Hold an evaluation, whole or as far as it has come.

    Args:
        models: models by name, in the order of the report.
        prompts: each once.
        step_counts: numbers of network evaluations, ascending.
        num_samples: videos of each prompt.
        seed: seed of the noise.
        metrics: metrics by name.
        values: ``[model][metric][steps]``, a number for each video: samples of the first prompt,
            then of the second.
        sets: ``[model][metric][steps]``, a number for all the videos together.
        references: ``[metric]``, a number for each real video.

    Raises:
        ValueError: a name, number or length is not possible; the message says which.
    """

    models: Mapping[str, ModelRecord]
    prompts: tuple[str, ...]
    step_counts: tuple[int, ...]
    num_samples: int
    seed: int
    metrics: Mapping[str, MetricRecord] = field(default_factory=dict)
    values: PerSample = field(default_factory=dict)
    sets: PerSet = field(default_factory=dict)
    references: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_names("models", self.models)
        _check_names("prompts", self.prompts)
        if not self.models or not self.prompts or not self.step_counts:
            raise ValueError("models, prompts and steps must not be empty")
        for num_inference_steps in self.step_counts:
            whole_number("steps", num_inference_steps)
        if list(self.step_counts) != sorted(set(self.step_counts)):
            raise ValueError(
                f"steps must be ascending, each once, got {brief(list(self.step_counts))}"
            )
        whole_number("num_samples", self.num_samples, 1, MAX_SAMPLES)
        whole_number("seed", self.seed, 0, MAX_SEED)
        _check_names("metrics", self.metrics)
        for name, metric in self.metrics.items():
            if metric.better not in (*get_args(Better), None):
                raise ValueError(
                    f"'better' of {name!r} must be higher, lower or null, got "
                    f"{brief(metric.better)}"
                )
        for where, values in self._cells("values", self.values):
            self._check_values(where, values, self.num_videos)
        for where, value in self._cells("sets", self.sets):
            finite_number(where, value)
        for name, values in self.references.items():
            self._require_known("references", "metric", name, self.metrics)
            self._check_values(f"references of {name!r}", values, None)

    @property
    def num_videos(self) -> int:
        """Number of videos of a model at a number of steps."""
        return len(self.prompts) * self.num_samples

    def with_results(
        self,
        model: str,
        num_inference_steps: int,
        values: Mapping[str, Sequence[float]],
        sets: Mapping[str, float],
    ) -> EvaluationRecord:
        """Return a record that has these metrics of a model at a number of steps, too.

        Args:
            model: its name.
            num_inference_steps: network evaluations.
            values: ``[metric]``, a number for each video.
            sets: ``[metric]``, a number for all the videos.

        Raises:
            ValueError: the result is no valid record.
        """
        return replace(
            self,
            values=_added(self.values, model, num_inference_steps, values),
            sets=_added(self.sets, model, num_inference_steps, sets),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the content of ``evaluation.json``, where numbers of steps are texts."""
        return {
            "format": FORMAT,
            "models": {
                n: {"path": m.path, "sampler": dict(m.sampler)} for n, m in self.models.items()
            },
            "prompts": list(self.prompts),
            "steps": list(self.step_counts),
            "num_samples": self.num_samples,
            "seed": self.seed,
            "metrics": {
                n: {"title": m.title, "unit": m.unit, "better": m.better, "needs": m.needs}
                for n, m in self.metrics.items()
            },
            "values": self._texts_of_steps(self.values, list),
            "sets": self._texts_of_steps(self.sets, float),
            "references": {
                name: list(self.references[name])
                for name in self.metrics
                if name in self.references
            },
        }

    @classmethod
    def from_dict(cls, data: Any) -> EvaluationRecord:
        """Return the inverse of :meth:`as_dict`.

        Raises:
            ValueError: a key is missing or unknown, or a value is not of its type; the message
                names it.
        """
        content = _object("the record", data, ("format", *_KEYS))
        if content["format"] != FORMAT:
            raise ValueError(f"'format' must be {FORMAT!r}, got {brief(content['format'])}")
        models = {
            name: ModelRecord(**_object(f"model {name!r}", model, ("path", "sampler")))
            for name, model in _object("'models'", content["models"]).items()
        }
        metrics = {
            name: MetricRecord(
                **_object(f"metric {name!r}", metric, ("title", "unit", "better", "needs"))
            )
            for name, metric in _object("'metrics'", content["metrics"]).items()
        }
        for name, model in models.items():
            _require_texts(f"model {name!r}", {"path": model.path})
            _object(f"'sampler' of model {name!r}", model.sampler)
        for name, metric in metrics.items():
            optional = {} if metric.needs is None else {"needs": metric.needs}
            _require_texts(
                f"metric {name!r}", {"title": metric.title, "unit": metric.unit, **optional}
            )
        return cls(
            models,
            tuple(_list("'prompts'", content["prompts"])),
            tuple(_list("'steps'", content["steps"])),
            content["num_samples"],
            content["seed"],
            metrics,
            _numbers_of_steps("values", content["values"]),
            _numbers_of_steps("sets", content["sets"]),
            _object("'references'", content["references"]),
        )

    def save(self, path: Path) -> None:
        """Write the file completely or not at all; OSError that names it."""
        write_text(
            path, json.dumps(self.as_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        )

    @classmethod
    def load(cls, path: Path) -> EvaluationRecord:
        """Read ``evaluation.json``.

        Raises:
            ValueError: it cannot be read, or see :meth:`from_dict`; the message names the file.
        """
        data = read_json(path, finite=True)
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{shortened(path)} is no record of an evaluation: {error}") from None

    def _texts_of_steps(
        self, table: Mapping[str, Mapping[str, Mapping[int, Any]]], kind: Any
    ) -> dict[str, Any]:
        """Return a table for JSON, in the order of models, metrics and steps.

        The order of the work leaves no trace.
        """
        return {
            model: {
                name: {
                    str(num_inference_steps): kind(cell)
                    for num_inference_steps, cell in sorted(table[model][name].items())
                }
                for name in self.metrics
                if name in table[model]
            }
            for model in self.models
            if model in table
        }

    # Checks ---------------------------------------------------------------------------------------

    def _cells(
        self, where: str, table: Mapping[str, Mapping[str, Mapping[int, Any]]]
    ) -> Iterable[tuple[str, Any]]:
        for model, metrics in table.items():
            self._require_known(where, "model", model, self.models)
            for metric, by_steps in metrics.items():
                self._require_known(where, "metric", metric, self.metrics)
                for num_inference_steps, cell in by_steps.items():
                    self._require_known(
                        where, "number of steps", num_inference_steps, self.step_counts
                    )
                    yield f"{where} of {metric!r} of {model!r} at {num_inference_steps} steps", cell

    @staticmethod
    def _require_known(where: str, kind: str, name: Any, known: Iterable[Any]) -> None:
        if name not in known:
            raise ValueError(f"{where} has the unknown {kind} {brief(name)}")

    @staticmethod
    def _check_values(where: str, values: Any, count: int | None) -> None:
        if not isinstance(values, (list, tuple)) or (count is not None and len(values) != count):
            wanted = "numbers" if count is None else f"{count} numbers, one for each video"
            raise ValueError(f"{where} must be {wanted}, got {brief(values)}")
        for value in values:
            finite_number(where, value)


def _added(
    table: Mapping[str, Mapping[str, Mapping[int, Any]]],
    model: str,
    num_inference_steps: int,
    fresh: Mapping[str, Any],
) -> dict[str, dict[str, dict[int, Any]]]:
    """Return a table with more cells."""
    result = {
        m: {name: dict(cells) for name, cells in metrics.items()} for m, metrics in table.items()
    }
    for name, cell in fresh.items():
        result.setdefault(model, {}).setdefault(name, {})[num_inference_steps] = cell
    return result


def _numbers_of_steps(where: str, table: Any) -> dict[str, dict[str, dict[int, Any]]]:
    result: dict[str, dict[str, dict[int, Any]]] = {}
    for model, metrics in _object(f"{where!r}", table).items():
        result[model] = {}
        for name, cells in _object(f"{where!r} of {model!r}", metrics).items():
            place = f"{where!r} of {name!r} of {model!r}"
            for text in _object(place, cells):
                if (
                    not text.isdecimal()
                    or not text.isascii()
                    or len(text) > 9
                    or str(int(text)) != text
                ):
                    raise ValueError(
                        f"{place} must have numbers of steps such as '4', got {brief(text)}"
                    )
            result[model][name] = {int(text): cell for text, cell in cells.items()}
    return result


def _object(where: str, value: Any, names: Sequence[str] | None = None) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be an object, got {brief(value)}")
    if names is not None and set(value) != set(names):
        missing, unknown = sorted(set(names) - set(value)), sorted(set(value) - set(names))
        found = [f"lacks {missing}"] if missing else []
        raise ValueError(
            f"{where} {' and '.join(found + ([f'has the unknown {unknown}'] if unknown else []))}"
        )
    return dict(value)


def _list(where: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{where} must be a list, got {brief(value)}")
    return value


def _require_texts(where: str, texts: Mapping[str, Any]) -> None:
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{name!r} of {where} must be a text, got {brief(text)}")


def _check_names(where: str, names: Iterable[Any]) -> None:
    seen = set()
    for name in names:
        require_text(f"a name of {where}" if where != "prompts" else "a prompt", name)
        if name in seen:
            raise ValueError(f"{where} names {brief(name)} twice")
        seen.add(name)
