"""Read files of prompts: a text on each line, or a table with negative prompts of their own."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from anyflow.utils.documents import parse_json, read_text, shortened, text_problem
from anyflow.utils.validation import brief

MAX_PROMPT = 2**17  # characters; a text encoder takes 512 tokens
COLUMNS = ("prompt", "negative_prompt")


@dataclass(frozen=True)
class VideoPrompt:
    """Hold a text that a video is made of.

    Args:
        text: what the video shows.
        negative: what it should not show, in place of the run's own negative prompt; None without
            one.
    """

    text: str
    negative: str | None = None

    def check(self, where: str) -> None:
        """Raise a ValueError, which begins with ``where``, for a text that can be no prompt."""
        for name, text in (("the prompt", self.text), ("the negative prompt", self.negative)):
            problem = None if text is None else text_problem(text, max_characters=MAX_PROMPT)
            if problem is not None:
                raise ValueError(f"{where}{name} {problem}")


def read_prompts(path: Path) -> list[VideoPrompt]:
    """Read prompts from a file, by its suffix.

    ``.csv`` has a first line of columns, ``.jsonl`` an object on each line; both have ``prompt``
    and may have ``negative_prompt`` (an empty cell, or null, is none). Any other file has a prompt
    on each line. Empty lines are skipped.

    Raises:
        ValueError: it is not a regular file in UTF-8, has none, or has a line that can be no
            prompt, which is named.
    """
    readers: dict[str, Callable[[str, str], Iterator[tuple[int, VideoPrompt]]]] = {
        ".csv": _of_csv,
        ".jsonl": _of_jsonl,
    }
    where = f"prompts: {shortened(path)}"
    try:
        text = read_text(path)
    except ValueError as error:
        raise ValueError(f"{where} cannot be read: {error}") from None
    prompts = []
    for line, prompt in readers.get(path.suffix.lower(), _of_lines)(text, where):
        prompt.check(f"{where}, line {line}: ")
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{where} has no prompts")
    return prompts


def _of_lines(text: str, where: str) -> Iterator[tuple[int, VideoPrompt]]:
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if line.strip():
            yield number, VideoPrompt(line.strip())


def _of_csv(text: str, where: str) -> Iterator[tuple[int, VideoPrompt]]:
    csv.field_size_limit(2 * MAX_PROMPT)
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[str] | None = None
    try:
        for line in lines:
            cells = [cell.strip() for cell in line]
            if not any(cells):
                continue
            if columns is None:
                columns = cells
                _check_columns(columns, f"{where}, line {lines.line_num}")
                continue
            if len(cells) != len(columns):
                raise ValueError(
                    f"{where}, line {lines.line_num}: {len(cells)} cells in place of "
                    f"{len(columns)} ({', '.join(columns)}); a text with commas stands in double "
                    "quotes"
                )
            values: dict[str, Any] = dict(zip(columns, cells, strict=True))
            if values.get("negative_prompt") == "":
                values["negative_prompt"] = None
            yield lines.line_num, _of_values(values, f"{where}, line {lines.line_num}")
    except csv.Error as error:
        raise ValueError(f"{where}, line {lines.line_num}: {error}") from None


def _of_jsonl(text: str, where: str) -> Iterator[tuple[int, VideoPrompt]]:
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if not line.strip():
            continue
        place = f"{where}, line {number}"
        values = parse_json(line, place)
        if not isinstance(values, dict):
            raise ValueError(f"{place} must be an object with 'prompt', got {brief(values)}")
        _check_columns(list(values), place)
        yield number, _of_values(values, place)


def _check_columns(columns: list[str], where: str) -> None:
    for name in columns:
        if name not in COLUMNS:
            nearest = get_close_matches(name, COLUMNS, n=1, cutoff=0.5)
            hint = f", did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(
                f"{where}: {brief(name)} is none of the columns {', '.join(COLUMNS)}{hint}"
            )
    if "prompt" not in columns or len(set(columns)) < len(columns):
        raise ValueError(
            f"{where} must name the column 'prompt', and each column once, got {brief(columns)}"
        )


def _of_values(values: Mapping[str, Any], where: str) -> VideoPrompt:
    text, negative = values["prompt"], values.get("negative_prompt")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: 'prompt' must be a text that is not empty, got {brief(text)}")
    if negative is not None and not isinstance(negative, str):
        raise ValueError(f"{where}: 'negative_prompt' must be a text, got {brief(negative)}")
    return VideoPrompt(text.strip(), None if negative is None else negative.strip())
