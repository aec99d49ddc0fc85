"""Read the HTML report: well formed, alone in its file, with the numbers of the results."""

import base64
import html
import io

import pytest
import torch

from anyflow.evaluation import (
    EvaluationResults,
    Metrics,
    RecipeStage,
    ReportData,
    SeedResults,
    figure_sentences,
    findings,
    takeaway,
    write_report,
)
from anyflow.evaluation.rendering import duration, figures

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

STEPS = (1, 2, 4)


def _videos(n: int, seed: int) -> torch.Tensor:
    return torch.randint(
        0, 256, (n, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def _data(results: EvaluationResults | SeedResults, **changes: object) -> ReportData:
    samples = {
        m: {n: _videos(4, 10 * i + n) for n in STEPS}
        for i, m in enumerate(SeedResults.of(results).methods)
    }
    fields = {
        "results": results,
        "samples": samples,
        "real_samples": _videos(12, 99),
        "recipe": [RecipeStage("flow matching", 700, 32, "3e-3", "0.995", "AdamW & <clip>")],
        "environment": {"torch": "2.13.0", "cpu": "<unknown>"},
        "class_names": ("disc right", "cross down"),
    }
    return ReportData(**(fields | changes))


@pytest.fixture(scope="module")
def results(make_results) -> EvaluationResults:
    return make_results()


@pytest.fixture(scope="module")
def page(tmp_path_factory, results: EvaluationResults, read_page):
    path = write_report(tmp_path_factory.mktemp("report") / "report.html", _data(results))
    return read_page(path.read_text(encoding="utf-8"))


def _written(path, results, read_page):
    return read_page(write_report(path, _data(results)).read_text(encoding="utf-8"))


def test_report_shows_the_numbers_and_stands_alone(page, results: EvaluationResults) -> None:
    page.require_alone(least_loaded=4 * len(STEPS))
    text = page.seen
    for wanted in (
        "54",
        "0.820",
        "flow map, stage 1 only",
        "consistency sampler",
        "real videos against each other: 0.16",
        "700",
        "AdamW & <clip>",
        "<unknown>",
        "1 min 01 s",
        "4.5 s",
        "1 min 06 s",
        "seed 7",
        "disc right, cross down",
        "Caveats",
    ):
        assert wanted in text, wanted
    for sentence in (takeaway(results), *figure_sentences(results).values(), *findings(results)):
        assert sentence in text
    assert "anyflow demo --seed 8" in text and "means of" not in text


def test_videos_come_first_and_jargon_last(page) -> None:
    """Look for the field's terms of measurement before the part with definitions."""
    text = page.seen
    order = [
        text.index(title)
        for title in (
            "The videos",
            "How far from real videos?",
            "Method and definitions",
            "Findings",
        )
    ]
    assert order == sorted(order)
    plain = text[text.index("anyflow demo") : order[2]]
    for term in ("Fréchet", "template", "total variation", "on-policy", "real vs real"):
        assert term not in plain, term


def test_report_of_several_seeds_has_means_ranges_and_error_bars(
    page, make_results, read_page, tmp_path
) -> None:
    runs = tuple(make_results(on_policy=(0.8 + i / 10, 0.36, 0.32), seed=i) for i in range(3))
    of_seeds = _written(tmp_path / "report.html", SeedResults(runs), read_page)
    text = of_seeds.seen
    assert (
        "mean of 3 seeds (0, 1, 2)" in text and "bars reach from the lowest to the highest" in text
    )
    assert "0.9000.800 – 1.00" in text  # mean and range of the flow map in one step
    assert "the videos are those of seed 0" in text and "ahead in 3 of 3 seeds" in text
    assert "3 min 03 s" in text  # three times 61 s
    # A bar is a line and two caps; the first two charts are drawn for wide and for narrow pages.
    paths = of_seeds.source.count("<path") - page.source.count("<path")
    assert paths >= 6 * 4 * len(STEPS)


def test_motion_is_a_chart_with_the_real_videos_as_a_line(page) -> None:
    text = page.seen
    assert "Do they move as much as real videos?" in text and "real videos (dashed): 0.08" in text
    assert (
        text.index("How far from real videos?")
        < text.index("Do they move")
        < text.index("Two closer looks")
    )
    assert "Motion: the speed of what can be seen to move" in text and "earlier version" not in text
    assert "Motion in pixels per frame" in text and "Motion, in pixels per frame" in text


def test_a_run_of_an_earlier_version_has_a_report_without_motion(
    make_results, read_page, tmp_path
) -> None:
    old = make_results(motion=None)
    text = _written(tmp_path / "old.html", old, read_page).seen
    assert "this run was made by an earlier version of anyflow, which did not measure it" in text
    assert (
        "Do they move" not in text and "Lower is better everywhere" in text and "frozen" not in text
    )
    both = SeedResults((old, make_results(seed=8)))
    assert not both.has_motion and both.floor.motion is None
    text = _written(tmp_path / "both.html", both, read_page).seen
    assert "a run here was made by an earlier version" in text and "Do they move" not in text


def test_pictures_are_the_samples_with_texts_and_still_ones(page) -> None:
    images, texts = page.values("src"), page.values("alt")
    # four methods, and 12 real videos in cells of four
    assert len(images) == len(texts) == 4 * len(STEPS) + 3
    assert "Videos by plain flow matching in 1 step: noise" in texts
    assert "Videos by flow map in 4 steps: clear shapes" in texts
    first = _image(images[0])
    assert first.n_frames == 3
    video = _videos(4, 1)[0, 0]
    pixels = torch.tensor(list(first.convert("L").tobytes())).view(first.size[1], first.size[0])
    assert torch.equal(pixels[:48:8, :48:8].byte(), video)
    stills = page.values("srcset")
    assert len(stills) == len(images) and _image(stills[0]).n_frames == 1
    # the first two charts are drawn for wide and for narrow pages
    assert page.source.count("<svg") == 6 == page.source.count('role="img" aria-label="Chart: ')
    assert page.source.count("var(--m-on_policy)") >= 3


def _image(uri: str):
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def test_report_escapes_and_handles_unknown_methods_and_no_samples(tmp_path, read_page) -> None:
    curve = {1: Metrics(1.0, 0.1, 0.1)}
    results = EvaluationResults(Metrics(0.1, 0.1, 0.1), {"<b>_mine": curve}, {}, 0, "x")
    data = ReportData(results, {}, _videos(2, 0), title="A <title> & more")
    text = write_report(tmp_path / "r.html", data).read_text(encoding="utf-8")
    assert html.escape("A <title> & more") in text and "<b>" not in text
    assert "nothing is said here about few steps" in read_page(text).seen


def test_report_data_errors(results: EvaluationResults) -> None:
    with pytest.raises(ValueError, match="'on_policy' at 3 steps"):
        _data(results, samples={"on_policy": {3: _videos(4, 0)}})
    with pytest.raises(ValueError, match="'other' at 1 steps"):
        _data(results, samples={"other": {1: _videos(4, 0)}})
    with pytest.raises(ValueError, match="real_samples must be"):
        _data(results, real_samples=_videos(4, 0).float())


def test_formats() -> None:
    assert [duration(s) for s in (0.04, 9.94, 12.4, 59.6, 303.0)] == [
        "0.0 s",
        "9.9 s",
        "12 s",
        "1 min 00 s",
        "5 min 03 s",
    ]
    assert [figures(v) for v in (0.0, 2.0, 0.0123, 173.6, 12.34)] == [
        "0",
        "2.00",
        "0.0123",
        "174",
        "12.3",
    ]
