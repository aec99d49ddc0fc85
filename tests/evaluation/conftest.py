"""Share results of runs with chosen curves, and a reader of pages."""

import html
import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest

from anyflow.evaluation import EvaluationResults, Metrics

_VOID = {"meta", "source", "img", "br", "link", "input", "hr"}
_LOADED = {"src", "href", "xlink:href", "data", "poster", "srcset", "action"}


class Page(HTMLParser):
    """Read a page: check that its tags balance, and collect its attributes.

    Attributes:
        source: the text of the file.
        attributes: names and values, in their order.
        seen: what a reader sees, white space as one blank.
    """

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source, self.attributes = source, list[tuple[str, str]]()
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == []
        body = re.sub(r"<style>.*?</style>", " ", source, flags=re.DOTALL)
        self.seen = html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", body)))

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.attributes += [(name, "" if value is None else value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open[-1] == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def values(self, *names: str) -> list[str]:
        """Return the values of attributes with these names, in their order."""
        return [value for name, value in self.attributes if name in names]

    def require_alone(self, *, least_loaded: int) -> None:
        """Assert that the page needs no other file, resolves its references, and can be dark."""
        loaded, ids = self.values(*_LOADED), self.values("id")
        links = re.findall(r"url\(([^)]*)\)", self.source)
        assert len(loaded) >= least_loaded
        assert all(value.startswith(("data:", "#")) for value in loaded)
        assert all(link.startswith("#") for link in links)
        for word in ("://", "@import", "<script"):
            assert word not in self.source
        used = {v[1:] for v in [*self.values("href"), *links] if v.startswith("#")}
        assert used and used <= set(ids) and len(ids) == len(set(ids))
        assert "prefers-color-scheme: dark" in self.source
        assert not re.search(r"(fill|stroke): #", self.source[self.source.index("<body>") :])
        assert all(self.values("alt", "aria-label"))
        assert self.source.startswith("<!DOCTYPE html>") and '<html lang="en">' in self.source
        assert 'name="viewport" content="width=device-width, initial-scale=1"' in self.source


@pytest.fixture(scope="session")
def read_page() -> type[Page]:
    """Return the class that reads pages."""
    return Page


@pytest.fixture(scope="session")
def make_results() -> Callable[..., EvaluationResults]:
    """Return a function that builds results, of 1, 2 and 4 steps by default.

    The template error is a fiftieth of the distance, and real videos move by 0.08.
    """

    def make(
        flow_matching: tuple[float, ...] = (54.0, 8.0, 0.17),
        pretrain: tuple[float, ...] = (1.95, 0.4, 0.36),
        on_policy: tuple[float, ...] = (0.82, 0.36, 0.32),
        consistency: tuple[float, ...] = (0.14, 0.2, 0.25),
        steps: tuple[int, ...] = (1, 2, 4),
        motion: tuple[float, ...] | None = (0.08,),
        seed: int = 7,
    ) -> EvaluationResults:
        def curve(fd: tuple[float, ...], tv: tuple[float, ...]) -> dict[int, Metrics]:
            moves = (None,) if motion is None else motion
            return {
                n: Metrics(f, f / 50, t, m)
                for n, f, t, m in zip(
                    steps, fd, tv, moves * (len(steps) // len(moves)), strict=True
                )
            }

        even = (0.1,) * len(steps)
        curves = {
            "flow_matching": curve(flow_matching, even),
            "pretrain": curve(pretrain, even),
            "on_policy": curve(on_policy, even),
            "consistency_sampler": curve(on_policy, consistency),
        }
        seconds = {"flow_matching": 61.0, "evaluation": 4.5}
        floor = Metrics(0.16, 0.0, 0.09, None if motion is None else 0.08)
        return EvaluationResults(floor, curves, seconds, seed, "fast")

    return make
