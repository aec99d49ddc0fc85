"""The HTML report: well formed, self-contained, and honest about its numbers."""

import base64
import html
import io
import re
from html.parser import HTMLParser
from pathlib import Path

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
_VOID = {"meta", "source", "img", "br", "link", "input", "hr"}


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


class _Page(HTMLParser):
    """Checks that tags balance and collects text, attributes and images."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.attributes += [(k, v or "") for k, v in attrs]
        if tag not in _VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.attributes += [(k, v or "") for k, v in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack[-1] == tag, f"</{tag}> closes {self.stack[-1:]}"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _text(page: str) -> str:
    """What a reader sees of a page, white space as one blank."""
    return re.sub(r"\s+", " ", "".join(_Page(page).text))


@pytest.fixture(scope="module")
def results(make_results) -> EvaluationResults:
    return make_results()


@pytest.fixture(scope="module")
def page_text(tmp_path_factory, results: EvaluationResults) -> str:
    path = write_report(tmp_path_factory.mktemp("report") / "report.html", _data(results))
    return Path(path).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page_of_seeds(tmp_path_factory, make_results) -> str:
    runs = tuple(
        make_results(on_policy=(0.8 + seed / 10, 0.36, 0.32), seed=seed) for seed in range(3)
    )
    path = write_report(tmp_path_factory.mktemp("seeds") / "report.html", _data(SeedResults(runs)))
    return Path(path).read_text(encoding="utf-8")


def test_report_parses_and_shows_the_numbers(page_text: str, results: EvaluationResults) -> None:
    text = _text(page_text)
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


def test_videos_come_first_and_jargon_last(page_text: str) -> None:
    """What a newcomer reads before the part with definitions has none of the field's terms of
    measurement.
    """
    text = _text(page_text)
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
    page_of_seeds: str, page_text: str
) -> None:
    text = _text(page_of_seeds)
    assert (
        "mean of 3 seeds (0, 1, 2)" in text and "bars reach from the lowest to the highest" in text
    )
    assert "0.9000.800 – 1.00" in text  # mean and range of the flow map in one step
    assert "the videos are those of seed 0" in text and "ahead in 3 of 3 seeds" in text
    assert "3 min 03 s" in text  # three times 61 s
    # A bar is a line and two caps; the first two charts are drawn for wide and for narrow pages.
    assert page_of_seeds.count("<path") >= page_text.count("<path") + 6 * 4 * len(STEPS)


def test_motion_is_a_chart_with_the_real_videos_as_a_line(page_text: str) -> None:
    text = _text(page_text)
    assert "Do they move as much as real videos?" in text and "real videos (dashed): 0.08" in text
    assert (
        text.index("How far from real videos?")
        < text.index("Do they move")
        < text.index("Two closer looks")
    )
    assert "Motion: the speed of what can be seen to move" in text and "earlier version" not in text


def test_a_run_of_an_earlier_version_has_a_report_without_motion(make_results, tmp_path) -> None:
    old = make_results(motion=None)
    text = _text(write_report(tmp_path / "old.html", _data(old)).read_text(encoding="utf-8"))
    assert "this run was made by an earlier version of anyflow, which did not measure it" in text
    assert (
        "Do they move" not in text and "Lower is better everywhere" in text and "frozen" not in text
    )
    both = SeedResults((old, make_results(seed=8)))
    assert not both.has_motion and both.floor.motion is None
    text = _text(write_report(tmp_path / "both.html", _data(both)).read_text(encoding="utf-8"))
    assert "a run here was made by an earlier version" in text and "Do they move" not in text


def test_every_picture_and_chart_has_a_text_and_still_pictures_where_motion_is_unwanted(
    page_text: str,
) -> None:
    images = re.findall(r"<img [^>]*>", page_text)
    texts = [html.unescape(re.search(r'alt="([^"]*)"', image)[1]) for image in images]
    assert len(texts) == 4 * len(STEPS) + 3 and all(texts)
    assert "Videos by plain flow matching in 1 step: noise" in texts
    assert "Videos by flow map in 4 steps: clear shapes" in texts
    stills = re.findall(
        r'<source media="\(prefers-reduced-motion: reduce\)" srcset="data:image/webp;base64,([^"]*)"',
        page_text,
    )
    assert len(stills) == len(images)
    with Image.open(io.BytesIO(base64.b64decode(stills[0]))) as image:
        assert image.n_frames == 1
    labels = re.findall(r'<svg [^>]*role="img" aria-label="([^"]+)"', page_text)
    # the first two charts are drawn for wide and for narrow pages
    assert len(labels) == page_text.count("<svg") == 6
    assert page_text.startswith("<!DOCTYPE html>") and '<html lang="en">' in page_text
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in page_text


def test_report_needs_nothing_from_outside(page_text: str) -> None:
    page = _Page(page_text)
    loaded = [
        v
        for k, v in page.attributes
        if k in {"src", "href", "xlink:href", "data", "poster", "srcset", "action"}
    ]
    assert len(loaded) > len(STEPS)
    assert all(v.startswith(("data:", "#")) for v in loaded)
    assert "://" not in page_text and "@import" not in page_text and "<script" not in page_text
    assert not [u for u in re.findall(r"url\(([^)]*)\)", page_text) if not u.startswith("#")]


def test_report_local_references_resolve(page_text: str) -> None:
    page = _Page(page_text)
    ids = [v for k, v in page.attributes if k == "id"]
    used = {v[1:] for k, v in page.attributes if k == "href"} | set(
        re.findall(r"url\(#([^)]*)\)", page_text)
    )
    assert used and used <= set(ids)
    assert len(ids) == len(set(ids))


def test_report_images_are_the_samples(page_text: str) -> None:
    images = [v for k, v in _Page(page_text).attributes if k == "src"]
    assert len(images) == 4 * len(STEPS) + 3  # four methods, and 12 real videos in cells of four
    first = Image.open(io.BytesIO(base64.b64decode(images[0].split(",", 1)[1])))
    assert first.n_frames == 3
    video = _videos(4, 1)[0, 0]
    pixels = torch.tensor(list(first.convert("L").tobytes())).view(first.size[1], first.size[0])
    assert torch.equal(pixels[:48:8, :48:8].byte(), video)


def test_report_has_a_dark_mode_and_takes_chart_colors_from_it(page_text: str) -> None:
    assert "prefers-color-scheme: dark" in page_text
    assert page_text.count("var(--m-on_policy)") >= 3
    body = page_text[page_text.index("<body>") :]
    assert not re.search(r"(fill|stroke): #", body)


def test_report_escapes_and_handles_unknown_methods_and_no_samples(tmp_path) -> None:
    curve = {1: Metrics(1.0, 0.1, 0.1)}
    results = EvaluationResults(Metrics(0.1, 0.1, 0.1), {"<b>_mine": curve}, {}, 0, "x")
    data = ReportData(results, {}, _videos(2, 0), title="A <title> & more")
    text = write_report(tmp_path / "r.html", data).read_text(encoding="utf-8")
    assert html.escape("A <title> & more") in text and "<b>" not in text
    assert "nothing is said here about few steps" in _text(text)


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
