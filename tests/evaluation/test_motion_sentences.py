"""Read the sentences about motion: a sampler that freezes is called frozen wherever it is told."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from anyflow.data import MovingShapes
from anyflow.evaluation import (
    EvaluationResults,
    Evaluator,
    ReportData,
    SeedResults,
    figure_sentences,
    findings,
    takeaway,
    write_report,
)

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


def with_motion(
    results: EvaluationResults, *motion: float, method: str = "on_policy"
) -> EvaluationResults:
    """Return results with another motion of one method."""
    curve = {
        n: replace(results.curves[method][n], motion=m)
        for n, m in zip(results.step_counts, motion, strict=True)
    }
    return replace(results, curves={**results.curves, method: curve})


def sentence(results: EvaluationResults | SeedResults) -> str:
    """Return the part of the chart's sentence that is about the flow map."""
    return figure_sentences(results)["motion"].partition("; the videos of the flow map ")[2]


def test_frozen_videos_are_called_frozen_in_the_report(
    make_results, read_page, tmp_path: Path
) -> None:
    """Measure and write real videos whose first frame is repeated, as a run does."""
    shapes, labels, g = (
        MovingShapes(),
        torch.arange(4).repeat_interleave(8),
        torch.Generator().manual_seed(0),
    )
    real, _ = shapes.sample(32, g, labels)
    black = -shapes.mean / shapes.std
    black_white = (black, black + 1 / shapes.std)
    evaluator = Evaluator.from_videos(
        real, labels, shapes.templates(), (12, 12), black_white=black_white
    )
    frozen, moving = real[:, :1].expand_as(real), shapes.sample(32, g, labels)[0]
    scores = {n: evaluator.evaluate(frozen if n < 4 else moving, labels) for n in (1, 2, 4)}
    results = make_results()
    floor = evaluator.floor([(real, labels)])
    results = replace(results, floor=floor, curves={**results.curves, "on_policy": scores})
    examples = {
        "on_policy": {n: shapes.to_uint8(frozen[::8] if n < 4 else moving[::8]) for n in (1, 2, 4)}
    }
    page = write_report(
        tmp_path / "r.html", ReportData(results, examples, shapes.to_uint8(real[::8]))
    )
    page = read_page(page.read_text(encoding="utf-8"))
    assert "the flow map gives frozen pictures" in takeaway(results)
    assert page.source.count("<figcaption>frozen pictures</figcaption>") == 2
    assert "But its videos are frozen at 1 and 2 steps." in page.seen
    share = round(100 * scores[4].motion / floor.motion)
    assert (
        f"the videos of the flow map move 0 % as much as real ones at 1 step and {share} % at 4, "
        "and are frozen at 1 and 2 steps."
    ) in page.seen
    assert "the flow map is frozen at 1 and 2 steps (below 5 %)." in page.seen


@pytest.mark.parametrize(
    ("motion", "words"),
    [
        ((0.04, 0.06, 0.082), "move 50 % as much as real ones at 1 step and 102 % at 4."),
        (
            (0.08, 0.03, 0.08),
            "move 100 % as much as real ones at 1 step and 100 % at 4, least at 2 (38 %).",
        ),
        (
            (0.06, 0.12, 0.08),
            "move 75 % as much as real ones at 1 step and 100 % at 4, most at 2 (150 %).",
        ),
        (
            (0.0, 0.0, 0.0),
            "are frozen at every number of steps: they move 0 % as much as real ones.",
        ),
        (
            (0.001, 0.003, 0.08),
            "move 1 % as much as real ones at 1 step and 100 % at 4, and are frozen at 1 and 2 "
            "steps.",
        ),
        (
            (0.08, 0.08, 0.0001),
            "move 100 % as much as real ones at 1 step and 0.1 % at 4, and are frozen at 4 steps.",
        ),
    ],
)
def test_sentence_follows_the_numbers(make_results, motion: tuple[float, ...], words: str) -> None:
    assert sentence(with_motion(make_results(), *motion)) == words


def test_lead_warns_only_of_what_moves_less_than_half_as_much(make_results) -> None:
    lead = takeaway(make_results())
    assert "frozen" not in lead and "move" not in lead
    assert takeaway(with_motion(make_results(), 0.041, 0.08, 0.08)) == lead
    slow = takeaway(with_motion(make_results(), 0.02, 0.03, 0.08))
    assert slow == f"{lead} But at 1 and 2 steps its videos move at most 38 % as much as real ones."
    assert takeaway(with_motion(make_results(), 0.02, 0.08, 0.08)).endswith(
        "But at 1 step its videos move 25 % as much as real ones."
    )
    frozen = lead.replace("clear shapes", "frozen pictures")
    assert (
        takeaway(with_motion(make_results(), 0.0, 0.03, 0.08))
        == f"{frozen} But its videos are frozen at 1 step."
    )


def test_findings_name_where_videos_move_least_and_most(make_results) -> None:
    results = with_motion(make_results(), 0.02, 0.1, 0.08)
    (found,) = (text for text in findings(results) if "move" in text)
    assert found == (
        "Videos move between 25 % (the flow map, 1 step) and 125 % (the flow map, 2 steps) as much "
        "as real ones, "
        "noise left out."
    )
    frozen = with_motion(with_motion(results, 0.0, 0.0, 0.08), 0.0, 0.0, 0.0, method="pretrain")
    (found,) = (text for text in findings(frozen) if "move" in text)
    assert found.endswith(
        "; the flow map, stage 1 only is frozen at every number of steps and "
        "the flow map is frozen at 1 and 2 steps (below 5 %)."
    )


def test_a_seed_that_is_frozen_is_not_lost_in_the_mean(make_results) -> None:
    seeds = SeedResults((make_results(seed=0), with_motion(make_results(seed=1), 0.0, 0.08, 0.08)))
    assert sentence(seeds) == (
        "move 50 % as much as real ones at 1 step and 100 % at 4, and are frozen at 1 step in 1 of "
        "2 seeds."
    )
    assert takeaway(seeds).endswith("But its videos are frozen at 1 step in 1 of 2 seeds.")


def test_nothing_is_said_without_something_to_compare_with(make_results) -> None:
    old = make_results(motion=None)
    assert figure_sentences(old)["motion"] == "The motion of these videos was not measured."
    assert "move" not in " ".join([takeaway(old), *findings(old)])
    noise = make_results(*[(54.0, 54.0, 54.0)] * 4)
    assert figure_sentences(noise)["motion"] == (
        "The videos of plain flow matching are noise at every number of steps; "
        "the videos of the flow map are noise at every number of steps."
    )
    assert "move" not in " ".join(findings(noise))
    still = replace(make_results(), floor=replace(make_results().floor, motion=0.0))
    assert figure_sentences(still)["motion"] == "Real videos do not move here."
    assert "frozen" not in " ".join([takeaway(still), *findings(still)])
