"""Test plain sentences on falling curves, rising ones, and runs that show no gain."""

import pytest

from anyflow.evaluation import EvaluationResults, Metrics, SeedResults, figure_sentences, takeaway
from anyflow.evaluation.summary import trend
from anyflow.evaluation.wording import quality

STEPS = (1, 2, 4, 8, 16, 32)


@pytest.mark.parametrize(
    ("curve", "sentence"),
    [
        ((9, 5, 3, 2, 1.5, 1.0), "falls up to 32 steps"),
        ((9, 2, 1.0, 1.0, 1.05, 1.0), "falls until 4 steps and then stays"),
        ((9, 2, 1.0, 0.9, 1.1, 1.3), "falls until 8 steps and rises again to 1.3 at 32"),
        ((1.0, 1.0, 1.05, 1.2, 1.5, 2.0), "rises with more steps, from 1.0 at 1 step to 2.0"),
        ((1.0, 1.02, 1.05, 1.0, 1.01, 1.0), "stays about the same from 1 to 32 steps"),
        ((1.0, 1.5, 2.0, 1.5, 1.0, 1.0), "rises between 1 and 32 steps and comes back"),
        ((0.0, 0.0, 0.0, 0.0, 0.0, 0.0), "stays about the same from 1 to 32 steps"),
    ],
)
def test_trend_names_where_a_curve_turns(curve: tuple[float, ...], sentence: str) -> None:
    assert trend(dict(zip(STEPS, curve, strict=True))) == sentence


def test_trend_of_one_point() -> None:
    assert trend({4: 0.5}) == "is 0.50 at 4 steps"


def test_quality_words_by_the_template_error() -> None:
    words = [quality(error) for error in (2.0, 0.6, 0.59, 0.25, 0.24, 0.1, 0.09, 0.0)]
    assert words == [
        word for word in ("noise", "blurred shapes", "shapes", "clear shapes") for _ in range(2)
    ]


def test_takeaway_follows_the_numbers(make_results) -> None:
    good = takeaway(make_results())
    assert good == (
        "In 1 step plain flow matching gives noise; the flow map gives clear shapes, 66 times "
        "closer to real videos. "
        "More steps help further, up to 4."
    )
    assert takeaway(make_results(on_policy=(0.34, 0.33, 0.33))).endswith(
        "More steps keep that quality."
    )
    rising = takeaway(make_results(on_policy=(3.4, 0.3, 0.4)))
    assert rising.endswith("More steps help up to 2; at 4 it is slightly worse again.")
    assert takeaway(make_results(on_policy=(3.4, 0.3, 0.9))).endswith("at 4 it is worse again.")
    worse = takeaway(make_results(on_policy=(0.8, 1.0, 1.6)))
    assert worse.endswith("But at 4 steps it is worse than at 1, which a flow map should not be.")
    same = takeaway(make_results(on_policy=(40.0, 5.0, 1.0)))
    assert same.startswith(
        "In 1 step both give noise; the flow map's videos are 1.4 times closer to real videos."
    )


def test_takeaway_denies_what_a_run_does_not_show(make_results) -> None:
    alike = takeaway(make_results(flow_matching=(0.8, 0.5, 0.3)))
    assert (
        alike.startswith("This run does not show")
        and "as far from real videos as those of plain" in alike
    )
    behind = takeaway(make_results(on_policy=(90.0, 5.0, 1.0)))
    assert (
        behind.startswith("This run does not show")
        and "farther from real videos than those of plain" in behind
    )
    seeds = SeedResults(
        (make_results(on_policy=(90.0, 5.0, 1.0)), make_results(on_policy=(80.0, 5.0, 1.0), seed=1))
    )
    assert takeaway(seeds).startswith("These runs do not show")


def test_takeaway_of_several_seeds_counts_those_that_agree(make_results) -> None:
    seeds = SeedResults((make_results(seed=0), make_results(on_policy=(60.0, 5.0, 1.0), seed=1)))
    assert "1.8 times closer to real videos (on average; ahead in 1 of 2 seeds)." in takeaway(seeds)


def test_figure_sentences_of_falling_curves(make_results) -> None:
    sentences = figure_sentences(make_results())
    assert sentences == {
        "videos": "Plain flow matching gives noise at 1 step, shapes at 2 steps and clear shapes "
        "at 4 steps; "
        "the flow map gives clear shapes from 1 step.",
        "fd": "The flow map is closer to real videos at 1 and 2, plain flow matching is closer at "
        "4 steps; "
        "the flow map's distance falls up to 4 steps.",
        "template_mse": "With plain flow matching the difference to the nearest real clip falls up "
        "to 4 steps; "
        "with the flow map it falls up to 4 steps.",
        "coverage_tv": "With the flow map the unevenness of positions stays about the same from 1 "
        "to 4 steps; "
        "with the consistency sampler it rises with more steps, from 0.14 at 1 step to 0.25.",
        "motion": "The videos of plain flow matching are noise at 1 step; they move 100 % as much "
        "as real ones at 2 "
        "steps and 100 % at 4; "
        "the videos of the flow map move 100 % as much as real ones at 1 step and 100 % at 4.",
    }


def test_figure_sentences_of_a_curve_that_rises_again(make_results) -> None:
    results = make_results(
        flow_matching=(198.0, 39.0, 0.9, 0.4, 0.33, 0.32),
        pretrain=(11.0, 0.7, 0.25, 0.28, 0.47, 0.64),
        on_policy=(20.0, 7.5, 0.28, 0.4, 5.5, 13.0),
        consistency=(0.1, 0.1, 0.1, 0.1, 0.1, 0.1),
        steps=STEPS,
    )
    sentences = figure_sentences(results)
    assert sentences["fd"] == (
        "The flow map is closer to real videos at 1, 2 and 4, plain flow matching is closer at 16 "
        "and 32, "
        "both are alike at 8 steps; the flow map's distance falls until 4 steps and rises again to "
        "13 at 32."
    )
    assert sentences["videos"].endswith(
        "the flow map gives blurred shapes at 1 step, shapes at 2 steps, clear shapes from 4 "
        "steps, "
        "shapes at 16 steps and blurred shapes at 32 steps."
    )


def test_sentences_about_methods_of_ones_own() -> None:
    curves = {name: {4: Metrics(1.0, 0.3, 0.1)} for name in ("mine", "yours")}
    results = EvaluationResults(Metrics(0.1, 0.1, 0.1), curves, {}, 0, "x")
    assert "nothing is said here about few steps" in takeaway(results)
    sentences = figure_sentences(results)
    assert (
        sentences["videos"]
        == "The mine gives blurred shapes at 4 steps; the yours gives blurred shapes at 4 steps."
    )
    assert sentences["fd"].startswith(
        "With the mine the distance from real videos is 1.0 at 4 steps; with the yours"
    )
