"""Test what the record of an evaluation keeps, and what it refuses."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from anyflow.evaluation.runs import EvaluationRecord, MetricRecord, ModelRecord


def record() -> EvaluationRecord:
    """Build the record of two prompts with two samples each, measured at 1 of 2 step counts."""
    return EvaluationRecord(
        models={"student": ModelRecord("runs/student", {"height": 32, "euler": False})},
        prompts=("a red panda", "ein Fuß"),
        step_counts=(1, 4),
        num_samples=2,
        seed=3,
        metrics={
            "flicker": MetricRecord("Flicker", "of 255", "lower"),
            "fvd": MetricRecord("FVD", "", "lower"),
            "clip": MetricRecord("CLIP", "", "higher", needs="there is no model in clip/"),
        },
        references={"flicker": [0.5]},
    ).with_results("student", 4, {"flicker": [0.1, 0.2, 0.3, 1 / 3]}, {"fvd": 12.0})


def test_a_record_is_the_same_after_a_file(tmp_path: Path) -> None:
    before = record()
    before.save(tmp_path / "evaluation.json")
    after = EvaluationRecord.load(tmp_path / "evaluation.json")
    assert after == before
    assert after.num_videos == 4
    assert after.values["student"]["flicker"][4][3] == 1 / 3
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert content["format"] == "anyflow-evaluation-1"
    assert content["values"] == {"student": {"flicker": {"4": [0.1, 0.2, 0.3, 1 / 3]}}}
    assert content["sets"] == {"student": {"fvd": {"4": 12.0}}}
    assert content["metrics"]["clip"]["needs"] == "there is no model in clip/"


def test_the_order_of_the_work_leaves_no_trace_in_the_file(tmp_path: Path) -> None:
    more = {"flicker": [1.0, 2.0, 3.0, 4.0]}
    empty = replace(record(), values={}, sets={})
    empty.with_results("student", 1, more, {}).with_results("student", 4, more, {}).save(
        tmp_path / "a.json"
    )
    empty.with_results("student", 4, more, {}).with_results("student", 1, more, {}).save(
        tmp_path / "b.json"
    )
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def _set(*keys: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("seed"), r"lacks \['seed'\]"),
        (_set("more", to=1), r"has the unknown \['more'\]"),
        (_set("format", to="anyflow-evaluation-9"), "'format' must be 'anyflow-evaluation-1'"),
        (_set("prompts", to="a red panda"), "'prompts' must be a list"),
        (_set("prompts", to=["cat", "cat"]), "prompts names 'cat' twice"),
        (_set("prompts", to=[]), "must not be empty"),
        (_set("steps", to=[4, 1]), "steps must be ascending"),
        (_set("steps", to=[0, 4]), "steps must be a whole number >= 1, got 0"),
        (_set("num_samples", to=True), "num_samples must be a whole number"),
        (_set("seed", to=-1), "seed must be a whole number"),
        (_set("models", to=[]), "'models' must be an object"),
        (_set("models", "student", "path", to=7), "'path' of model 'student' must be a text"),
        (
            _set("models", "student", "sampler", to=[]),
            "'sampler' of model 'student' must be an object",
        ),
        (
            _set("metrics", "flicker", "better", to="up"),
            "'better' of 'flicker' must be higher, lower or null",
        ),
        (_set("metrics", "flicker", "title", to=1), "'title' of metric 'flicker' must be a text"),
        (_set("values", "other", to={"flicker": {}}), "values has the unknown model 'other'"),
        (_set("values", "student", "ssim", to={}), "values has the unknown metric 'ssim'"),
        (
            _set("values", "student", "flicker", to={"8": []}),
            "values has the unknown number of steps 8",
        ),
        (
            _set("values", "student", "flicker", to={"04": []}),
            "must have numbers of steps such as '4', got '04'",
        ),
        (
            _set("values", "student", "flicker", "4", to=[1.0]),
            "must be 4 numbers, one for each video",
        ),
        (
            _set("values", "student", "flicker", "4", to=[1, 2, 3, "4"]),
            "must be a finite number, got '4'",
        ),
        (
            _set("sets", "student", "fvd", "4", to=[1.0]),
            "sets of 'fvd' of 'student' at 4 steps must be a finite",
        ),
        (_set("references", "ssim", to=[]), "references has the unknown metric 'ssim'"),
        (
            _set("references", "flicker", to=[None]),
            "references of 'flicker' must be a finite number",
        ),
    ],
)
def test_a_damaged_record_is_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    content = record().as_dict()
    change(content)
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as failure:
        EvaluationRecord.load(file)
    assert str(file) in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_record_never_holds_what_is_not_finite() -> None:
    with pytest.raises(ValueError, match="must be a finite number, got nan"):
        record().with_results("student", 1, {"flicker": [0.0, 0.0, 0.0, float("nan")]}, {})
    with pytest.raises(ValueError, match="must be a finite number, got inf"):
        record().with_results("student", 1, {}, {"fvd": float("inf")})
