"""Compare intervals and differences with the normal approximation and exact cases."""

import numpy as np
import pytest

from anyflow.evaluation.pages.statistics import Estimate, Statistics
from anyflow.evaluation.runs.record import EvaluationRecord, MetricRecord, ModelRecord


def make(values: dict[str, list[float]], prompts: int, num_samples: int = 1) -> Statistics:
    record = EvaluationRecord(
        models={name: ModelRecord(f"/{name}") for name in values},
        prompts=tuple(f"prompt {i}" for i in range(prompts)),
        step_counts=(4,),
        num_samples=num_samples,
        seed=0,
        metrics={
            "psnr": MetricRecord("PSNR", "dB", "higher"),
            "fvd": MetricRecord("FVD", "", "lower"),
        },
        values={name: {"psnr": {4: numbers}} for name, numbers in values.items()},
        sets={name: {"fvd": {4: 3.0 + i}} for i, name in enumerate(values)},
        references={"psnr": [1.0, 2.0]},
    )
    return Statistics(record)


def test_interval_of_many_prompts_is_that_of_the_normal_distribution() -> None:
    numbers = np.random.default_rng(1).normal(5, 2, size=400)
    estimate = make({"a": list(numbers)}, 400).curves("psnr")["a"][4]
    half = 1.96 * numbers.std() / 20
    assert estimate.value == pytest.approx(numbers.mean())
    assert estimate.low == pytest.approx(numbers.mean() - half, abs=0.12 * half)
    assert estimate.high == pytest.approx(numbers.mean() + half, abs=0.12 * half)
    # always the same draws
    assert make({"a": list(numbers)}, 400).curves("psnr")["a"][4] == estimate


def test_samples_of_one_prompt_are_drawn_together() -> None:
    """Learn no more from ten equal samples of each of four prompts than from one of each."""
    once = make({"a": [1.0, 2.0, 3.0, 5.0]}, 4).curves("psnr")["a"][4]
    often = make(
        {"a": [v for v in (1.0, 2.0, 3.0, 5.0) for _ in range(10)]}, 4, num_samples=10
    ).curves("psnr")["a"][4]
    assert (often.value, often.low, often.high) == pytest.approx((once.value, once.low, once.high))
    assert once.low < once.value < once.high


def test_differences_are_paired() -> None:
    """Require that a constant difference is certain, however much the prompts differ."""
    numbers = [1.0, 20.0, 300.0, 4000.0]
    statistics = make(
        {"a": numbers, "b": [v + 0.5 for v in numbers], "c": [v - 2 for v in numbers]}, 4
    )
    differences = statistics.differences("psnr", "a")
    assert set(differences) == {"b", "c"}
    assert differences["b"][4].range == pytest.approx((0.5, 0.5)) and differences["b"][4].sign == 1
    assert differences["c"][4].range == pytest.approx((-2, -2)) and differences["c"][4].sign == -1
    wide = make({"a": numbers, "b": numbers[::-1]}, 4).differences("psnr", "a")["b"][4]
    assert wide.value == 0 and wide.low < 0 < wide.high and wide.sign == 0


def test_what_has_no_interval() -> None:
    statistics = make({"a": [1.0], "b": [2.0]}, 1)
    assert statistics.curves("psnr")["a"] == {4: Estimate(1.0)}  # one prompt
    # a number of the set
    assert statistics.curves("fvd") == {"a": {4: Estimate(3.0)}, "b": {4: Estimate(4.0)}}
    assert statistics.differences("fvd", "a") == {"b": {4: Estimate(1.0)}}
    assert Estimate(1.0).range == (1.0, 1.0) and Estimate(1.0).sign == 0
    assert statistics.reference("psnr") == 1.5 and statistics.reference("fvd") is None
