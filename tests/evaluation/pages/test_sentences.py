"""Test that sentences of an evaluation follow the numbers and claim nothing else."""

import pytest

from anyflow.evaluation.pages.sentences import (
    curve_sentences,
    difference_sentences,
    lead,
    motion_sentences,
    worse_steps,
)
from anyflow.evaluation.pages.statistics import Curve, Estimate
from anyflow.evaluation.runs.record import EvaluationRecord, MetricRecord, ModelRecord

STEPS = (1, 2, 4, 8)
CLIP, FVD, FLICKER = (
    MetricRecord("CLIP", "", "higher"),
    MetricRecord("FVD", "", "lower"),
    MetricRecord("Flicker"),
)


def curve(*values: float, steps: tuple[int, ...] = STEPS) -> Curve:
    return {n: Estimate(v) for n, v in zip(steps, values, strict=True)}


@pytest.mark.parametrize(
    ("values", "better", "worse"),
    [
        ((1.0, 2.0, 3.0, 4.0), "higher", []),
        # each within 5 % of the one before, the last not of the best
        ((4.0, 3.9, 3.81, 3.79), "higher", [8]),
        ((4.0, 3.0, 2.0, 2.0), "lower", []),
        ((4.0, 2.0, 2.09, 2.11), "lower", [8]),
        ((0.5, 0.5, 0.6, 0.4), "lower", [4]),
        ((-4.0, -2.0, -2.2, -1.0), "higher", [4]),
        ((0.0, 0.0, 0.1, 0.0), "lower", [4]),
    ],
)
def test_worse_is_more_than_five_percent_below_the_best_so_far(
    values, better: str, worse: list[int]
) -> None:
    assert worse_steps(curve(*values), better) == worse


def test_curve_sentences() -> None:
    assert curve_sentences(CLIP, {"a": curve(0.2, 0.25, 0.3, 0.31)}) == [
        "More steps never hurt, by more than 5 % of the best with fewer: 0.2 at 1 step, 0.31 at 8."
    ]
    assert curve_sentences(FVD, {"a": curve(900, 120, 100, 140.4), "b": curve(4, 3, 2, 1)}) == [
        "a: Best at 4 steps (100); worse at 8 (140).",
        "b: More steps never hurt, by more than 5 % of the best with fewer: 4 at 1 step, 1 at 8.",
    ]
    assert curve_sentences(FLICKER, {"a": curve(0.01, 0.02, 0.03, 0.04)}) == [
        "0.01 at 1 step, 0.04 at 8."
    ]
    assert curve_sentences(FVD, {"a": curve(12.0, steps=(4,))}) == ["12 at 4 steps."]
    many = {name: curve(4, 3, 2, 1) for name in "abcd"}
    assert curve_sentences(FVD, many) == [
        "With none of 4 checkpoints is it worse with more steps, by more than 5 % of the best with "
        "fewer."
    ]
    assert curve_sentences(FVD, {**many, "e": curve(1, 2, 3, 4)})[0].startswith(
        "With 1 of 5 checkpoints it is worse"
    )
    assert curve_sentences(FLICKER, many) == []


def test_motion_sentences() -> None:
    assert motion_sentences({"a": curve(0.02, 0.04, 0.05, 0.05)}, 0.05) == [
        "The videos move 40 % as much as real ones at 1 step and 100 % at 8."
    ]
    assert motion_sentences({"a": curve(0.0, 0.001, 0.05, 0.05)}, 0.05) == [
        "The videos move 0 % as much as real ones at 1 step and 100 % at 8, and are frozen at 1 "
        "and 2 steps."
    ]
    assert motion_sentences(
        {"a": curve(0.0, 0.001, 0.0, 0.0), "b": curve(0.1, 0.1, 0.1, 0.1)}, 0.05
    ) == [
        "a: Frozen at every number of steps: the videos move at most 2 % as much as real ones.",
        "b: The videos move 200 % as much as real ones at 1 step and 200 % at 8.",
    ]
    without = motion_sentences({"a": curve(0.001, 0.02, 0.04, 0.05)}, None)
    assert without == [
        "The videos move 2 % as much as those here that move most at 1 step and 100 % at 8, and "
        "are frozen at 1 step."
    ]
    assert motion_sentences({"a": curve(0.0, 0.0, 0.0, 0.0)}, None) == [
        "All videos are frozen: nothing moves at any number of steps."
    ]
    assert (
        "nothing is compared with them"
        in motion_sentences({"a": curve(0.1, 0.1, 0.1, 0.1)}, 0.0)[0]
    )
    many = {name: curve(0.1, 0.1, 0.1, 0.1) for name in "abcd"}
    assert motion_sentences(many, 0.1) == [
        "No checkpoint is frozen: each moves at least 5 % as much as real ones."
    ]
    assert motion_sentences({**many, "e": curve(0.0, 0.1, 0.1, 0.1)}, 0.1) == [
        "e: The videos move 0 % as much as real ones at 1 step and 100 % at 8, and are frozen at 1 "
        "step."
    ]


def test_difference_sentences_follow_the_intervals() -> None:
    differences = {
        "b": {
            1: Estimate(0.1, 0.05, 0.2),
            2: Estimate(0.1, -0.1, 0.3),
            4: Estimate(-1.0, -2.0, -0.1),
        }
    }
    assert difference_sentences(CLIP, differences, "a") == [
        "b against a: better at 1 step, worse at 4 steps, not told apart at 2 steps."
    ]
    assert difference_sentences(FVD, differences, "a") == [
        "b against a: better at 4 steps, worse at 1 step, not told apart at 2 steps."
    ]
    assert difference_sentences(FLICKER, differences, "a") == []  # neither is better
    assert difference_sentences(FVD, {"b": {1: Estimate(-50.0)}}, "a") == []  # without an interval


def test_lead_says_that_more_steps_never_hurt_only_where_they_do_in_no_metric() -> None:
    metrics = {"clip": CLIP, "fvd": FVD, "flicker": FLICKER}
    record = EvaluationRecord(
        {"a": ModelRecord("/a"), "b": ModelRecord("/b")}, ("x",), STEPS, 1, 0, metrics
    )
    good = {
        "clip": {"a": curve(1, 2, 3, 4), "b": curve(1, 1, 1, 1)},
        "fvd": {"a": curve(4, 3, 2, 1)},
        "flicker": {},
    }
    assert lead(record, good) == [
        "More steps never hurt here: no value is more than 5 % worse than the best with fewer "
        "steps, in CLIP and FVD."
    ]
    assert lead(record, {**good, "fvd": {"a": curve(4, 3, 2, 3), "b": curve(4, 3, 2, 1)}}) == [
        "More steps hurt, by more than 5 % of the best with fewer, in FVD (a). They do not in CLIP."
    ]
    assert lead(record, {"clip": {}, "fvd": {}, "flicker": {"a": curve(1, 2, 3, 4)}}) == []
