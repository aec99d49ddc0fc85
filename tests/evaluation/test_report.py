"""The HTML report: well formed, self-contained, and honest about its numbers."""

import base64
import html
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from anyflow.evaluation import EvaluationResults, Metrics, RecipeStage, ReportData, findings, takeaway, write_report
from anyflow.evaluation.report import duration, figures

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

STEPS = (1, 2, 4)
_VOID = {"meta", "img", "br", "link", "input", "hr"}


def _results(
    flow_matching: tuple[float, ...] = (54.0, 8.0, 0.17),
    pretrain: tuple[float, ...] = (1.95, 0.4, 0.36),
    on_policy: tuple[float, ...] = (0.82, 0.36, 0.32),
    consistency: tuple[float, ...] = (0.14, 0.2, 0.25),
) -> EvaluationResults:
    def curve(fd: tuple[float, ...], tv: tuple[float, ...] = (0.1, 0.1, 0.1)) -> dict[int, Metrics]:
        return {n: Metrics(f, f / 50, t) for n, f, t in zip(STEPS, fd, tv, strict=True)}

    curves = {
        "flow_matching": curve(flow_matching),
        "pretrain": curve(pretrain),
        "on_policy": curve(on_policy),
        "consistency_sampler": curve(on_policy, consistency),
    }
    return EvaluationResults(Metrics(0.16, 0.0, 0.09), curves, {"flow_matching": 61.0, "evaluation": 4.5}, 7, "fast")


def _videos(n: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def _data(results: EvaluationResults, **changes: object) -> ReportData:
    samples = {m: {n: _videos(4, 10 * i + n) for n in STEPS} for i, m in enumerate(results.curves)}
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


@pytest.fixture(scope="module")
def page_text(tmp_path_factory) -> str:
    path = write_report(tmp_path_factory.mktemp("report") / "report.html", _data(_results()))
    return Path(path).read_text(encoding="utf-8")


def test_report_parses_and_shows_the_numbers(page_text: str) -> None:
    text = re.sub(r"\s+", " ", "".join(_Page(page_text).text))
    for wanted in (
        "54",
        "0.820",
        "flow map, stage 2",
        "consistency sampler",
        "real vs real: 0.16",
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
    assert takeaway(_results()) in text
    for finding in findings(_results()):
        assert finding in text


def test_report_needs_nothing_from_outside(page_text: str) -> None:
    page = _Page(page_text)
    loaded = [v for k, v in page.attributes if k in {"src", "href", "xlink:href", "data", "poster", "srcset", "action"}]
    assert len(loaded) > len(STEPS)
    assert all(v.startswith(("data:", "#")) for v in loaded)
    assert "://" not in page_text and "@import" not in page_text and "<script" not in page_text
    assert not [u for u in re.findall(r"url\(([^)]*)\)", page_text) if not u.startswith("#")]


def test_report_local_references_resolve(page_text: str) -> None:
    page = _Page(page_text)
    ids = [v for k, v in page.attributes if k == "id"]
    used = {v[1:] for k, v in page.attributes if k == "href"} | set(re.findall(r"url\(#([^)]*)\)", page_text))
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
    assert "says nothing about any-step sampling" in "".join(_Page(text).text)


def test_takeaway_follows_the_numbers() -> None:
    good = takeaway(_results())
    assert "0.82 against 54" in good and "66 times lower" in good and "improve it further (0.32 at 4)" in good
    flat = takeaway(_results(on_policy=(0.34, 0.33, 0.33)))
    assert "keep it there" in flat
    rising = takeaway(_results(on_policy=(3.4, 0.3, 0.4)))
    assert "improve it to 0.30 at 2, and then it rises to 0.40 at 4" in rising
    worse = takeaway(_results(on_policy=(0.8, 1.0, 1.6)))
    assert "more steps make it worse: 1.6 at 4" in worse and "half of the claim" in worse
    for bad in (takeaway(_results(flow_matching=(0.8, 0.5, 0.3))), takeaway(_results(on_policy=(90.0, 5.0, 1.0)))):
        assert bad.startswith("This run does not show the any-step property")


def test_findings_follow_the_numbers() -> None:
    good = " ".join(findings(_results()))
    assert "falls from 54 at 1 step to 0.17 at 4" in good
    assert "plain flow matching is the better sampler here" in good
    assert "1.9 after stage 1, 0.82 after stage 2" in good or "2.0 after stage 1, 0.82 after stage 2" in good
    assert "get worse with steps" in good
    assert "cannot be told from real videos" in good
    bad = " ".join(
        findings(_results(flow_matching=(54, 54, 54), on_policy=(3.0, 3.0, 3.0), consistency=(0.1, 0.1, 0.1)))
    )
    assert "gains nothing from steps" in bad
    assert "stays behind" in bad
    assert "made 1 step worse" in bad
    assert "do not lose coverage" in bad
    assert "Nothing here is perfect" in bad


def test_report_data_errors() -> None:
    results = _results()
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
    assert [figures(v) for v in (0.0, 2.0, 0.0123, 173.6, 12.34)] == ["0", "2.00", "0.0123", "174", "12.3"]
