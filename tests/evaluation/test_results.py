"""Test the file of results: its schema, files of older versions, and what is refused."""

import json
import math
from pathlib import Path

import pytest

from anyflow.evaluation import EvaluationResults, Metrics


def _results(**changes: object) -> EvaluationResults:
    score = Metrics(0.5, 0.02, 0.1, 0.06)
    fields = {
        "floor": Metrics(0.2, 0.0, 0.1, 0.07),
        "curves": {"on_policy": {1: score, 4: score}},
        "seconds": {"all": 1.5},
        "seed": 3,
        "budget": "fast",
    }
    return EvaluationResults(**(fields | changes))


def test_results_schema_and_round_trip(tmp_path: Path) -> None:
    results = _results()
    assert results.as_dict() == {
        "floor": {"fd": 0.2, "template_mse": 0.0, "coverage_tv": 0.1, "motion": 0.07},
        "curves": {
            "on_policy": {
                str(n): {"fd": 0.5, "template_mse": 0.02, "coverage_tv": 0.1, "motion": 0.06}
                for n in (1, 4)
            }
        },
        "seconds": {"all": 1.5},
        "seed": 3,
        "budget": "fast",
    }
    results.save(tmp_path / "metrics.json")
    assert EvaluationResults.load(tmp_path / "metrics.json") == results
    assert results.values("fd") == {"on_policy": {1: 0.5, 4: 0.5}}


def test_results_of_an_earlier_version_have_no_motion(tmp_path: Path) -> None:
    content = _results().as_dict()
    del content["floor"]["motion"], content["curves"]["on_policy"]["1"]["motion"]
    with pytest.raises(
        ValueError,
        match="motion must be measured for every set of videos or for none; floor has none",
    ):
        EvaluationResults.from_dict(content)
    del content["curves"]["on_policy"]["4"]["motion"]
    (tmp_path / "metrics.json").write_text(json.dumps(content))
    old = EvaluationResults.load(tmp_path / "metrics.json")
    assert not old.has_motion and _results().has_motion and old.as_dict() == content
    with pytest.raises(ValueError, match="seed 3 has no motion"):
        old.values("motion")


def test_results_errors() -> None:
    score = Metrics(0.5, 0.02, 0.1)
    with pytest.raises(ValueError, match="same step counts"):
        _results(curves={"a": {1: score}, "b": {1: score, 2: score}})
    with pytest.raises(ValueError, match="at least one method"):
        _results(curves={})
    with pytest.raises(ValueError, match="fd of a at 1 steps"):
        _results(curves={"a": {1: Metrics(math.nan, 0, 0)}})
    with pytest.raises(ValueError, match="'seed'"):
        EvaluationResults.from_dict({k: v for k, v in _results().as_dict().items() if k != "seed"})
    with pytest.raises(ValueError, match="metric must be"):
        _results().values("psnr")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": 1}, r"unknown keys \['extra'\]"),
        ({"seed": "0"}, "seed must be an integer"),
        ({"seed": True}, "seed must be an integer"),
        ({"budget": None}, "budget a text"),
        ({"seconds": {"a": "1"}}, "seconds of 'a' must be a number"),
        ({"seconds": [1]}, "seconds must be an object"),
        ({"floor": {"fd": 1, "template_mse": 0}}, "floor lack the key 'coverage_tv'"),
        (
            {"floor": {"fd": "1", "template_mse": 0, "coverage_tv": 0}},
            "fd of floor must be a number",
        ),
        ({"curves": {"a": {"01": {}}}}, "step counts such as '4', got '01'"),
        ({"curves": {"a": {"1_0": {}}}}, "step counts such as '4', got '1_0'"),
        ({"curves": {"a": [1]}}, "curves of 'a' must be an object"),
        (
            {"curves": {"a": {"1": {"fd": 1, "template_mse": 0, "coverage_tv": 0, "psnr": 1}}}},
            "unknown keys",
        ),
    ],
)
def test_results_that_are_not_exactly_results_are_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    file = tmp_path / "metrics.json"
    file.write_text(json.dumps(_results().as_dict() | change))
    with pytest.raises(ValueError, match=rf"metrics\.json: .*{message}"):
        EvaluationResults.load(file)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"seed": NaN}', b'{"seed": 1, "seed": 2}', b"\xff\xfe{\x00"]
)
def test_results_that_cannot_be_read_name_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metrics.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"metrics\.json"):
        EvaluationResults.load(tmp_path / "metrics.json")
