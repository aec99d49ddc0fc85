"""The table of captions that `anyflow preprocess` reads."""

from __future__ import annotations

import csv
import io
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyflow.documents import parse_json, read_text, shortened, text_problem

MAX_FILE_BYTES = 4 * 2**30
MAX_CAPTION = 2**17  # characters; a text encoder takes 512 tokens
MAX_NAME = 4096  # characters, the longest path of Linux
_FIELD_LIMIT = threading.Lock()  # the limit of the csv module is one for the whole process


@dataclass(frozen=True)
class Caption:
    """One row to be.

    Args:
        line: where it stands in the table, from 1; the last line of a row that takes several.
        file: the video, relative to the folder of videos.
        caption: the prompt.
    """

    line: int
    file: str
    caption: str


@dataclass(frozen=True)
class Broken:
    """A line of the captions that gives no row.

    Args:
        line: see :class:`Caption`.
        file: the video it names; empty where that cannot be told.
        reason: why it is of no use.
    """

    line: int
    file: str
    reason: str


def read_captions(path: Path) -> list[Caption]:
    """Read a ``.csv`` (with a header) or ``.jsonl`` file by its columns or keys ``file`` and ``caption``.

    Other columns and keys are left alone, and so are empty lines.

    Raises:
        ValueError: see :func:`scan_captions`; or a row is not exactly what the format says, which names its line.
    """
    captions = []
    for row in scan_captions(path):
        if isinstance(row, Broken):
            raise ValueError(f"{shortened(path)}, line {row.line}: {row.reason}")
        captions.append(row)
    return captions


def scan_captions(path: Path) -> list[Caption | Broken]:
    """Read a table as :func:`read_captions` does, with what is wrong in a row in place of the row.

    A row is broken when it has more or fewer fields than the header, text after a closing quote, a value that is not a
    text, a caption that is empty or has over ``MAX_CAPTION`` characters, a null character or a lone surrogate; a line
    of JSON also when it is no object, names a key twice, is nested too deeply or holds NaN.

    Raises:
        ValueError: the fault is of the whole file: it is not a regular file in UTF-8, its header lacks a column or
            names one twice, a quote that is never closed swallows the lines after it, or no line of it can be read.
    """
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows}
    if path.suffix not in readers:
        raise ValueError(f"captions must be a {' or '.join(readers)} file, got {shortened(path)}")
    try:
        text = read_text(path, max_bytes=MAX_FILE_BYTES)
    except ValueError as error:
        raise ValueError(f"there is no captions file {shortened(path)} that can be read: {error}") from None
    rows = list(readers[path.suffix](text, shortened(path)))
    if not rows:
        raise ValueError(f"{shortened(path)} has no captions")
    if all(isinstance(row, Broken) and not row.file for row in rows):
        first = rows[0]
        assert isinstance(first, Broken)
        raise ValueError(f"{shortened(path)}, line {first.line}: {first.reason} (and no other line can be read)")
    return rows


def _csv_rows(text: str, path: str) -> Iterator[Caption | Broken]:
    """Parse a table with the strict reader of Python: RFC 4180, and quotes inside unquoted text."""
    ended = False

    def lines() -> Iterator[str]:
        nonlocal ended
        yield from io.StringIO(text, newline="")
        ended = True

    reader = csv.reader(lines(), strict=True)
    header: list[str] | None = None
    while True:
        start = reader.line_num + 1
        try:
            fields = _next_row(reader)
        except csv.Error as error:
            if header is None or (ended and reader.line_num > start):
                what = "a quote that is opened here is never closed" if ended else str(error)
                raise ValueError(f"{path}, line {start}: {what}") from None
            yield Broken(reader.line_num, "", f"the row that begins in line {start} cannot be read: {error}")
            continue
        if fields is None:
            return
        if not fields:
            continue
        if header is None:
            header = _checked_header(fields, f"{path}, line {start}")
            continue
        yield _csv_row(reader.line_num, header, fields)


def _next_row(reader: Any) -> list[str] | None:
    """Read a row without the limit of the csv module, past which it would go on in the middle of a field."""
    with _FIELD_LIMIT:
        limit = csv.field_size_limit(sys.maxsize)
        try:
            return next(reader, None)
        finally:
            csv.field_size_limit(limit)


def _checked_header(header: list[str], where: str) -> list[str]:
    shown = [shortened(name) for name in header[:10]]
    if not {"file", "caption"} <= set(header):
        raise ValueError(
            f"{where}: the header needs the columns 'file' and 'caption' with commas between them, got {shown}"
        )
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise ValueError(f"{where}: the header names {twice} more than once")
    return header


def _csv_row(line: int, header: list[str], fields: list[str]) -> Caption | Broken:
    if len(fields) != len(header):
        file = fields[0] if header[0] == "file" and text_problem(fields[0], max_characters=MAX_NAME) is None else ""
        return Broken(
            line,
            file,
            f"the row has {len(fields)} fields and the header {len(header)} (a text with a comma in it needs quotes): "
            f"{shortened(repr(fields))}",
        )
    row = dict(zip(header, fields, strict=True))
    # A quote after a space does not quote: the text would be read with its quotes.
    if any(text[:1].isspace() and text.lstrip().startswith('"') for text in (row["file"], row["caption"])):
        return Broken(line, "", f"a quote must stand right after the comma, got {shortened(repr(fields))}")
    return _row(line, row["file"], row["caption"])


def _jsonl_rows(text: str, path: str) -> Iterator[Caption | Broken]:
    for line, document in enumerate(io.StringIO(text, newline=None), start=1):
        if not document.strip():
            continue
        try:
            row = parse_json(document, "the line", finite=True)
        except ValueError as error:
            yield Broken(line, "", shortened(str(error), 400))
            continue
        if isinstance(row, dict):
            yield _row(line, row.get("file"), row.get("caption"))
        else:
            yield Broken(line, "", f"the line is no object with 'file' and 'caption': {shortened(repr(row))}")


def _row(line: int, file: object, caption: object) -> Caption | Broken:
    if not isinstance(file, str) or not isinstance(caption, str):
        given = f"{shortened(repr(file))} and {shortened(repr(caption))}"
        name = file if isinstance(file, str) and text_problem(file, max_characters=MAX_NAME) is None else ""
        return Broken(line, name, f"needs a text for 'file' and one for 'caption', got {given}")
    problem = "is empty" if not file.strip() else text_problem(file, max_characters=MAX_NAME)
    if problem is not None:
        return Broken(line, shortened(file), f"the name of the file {problem}")
    problem = "is empty" if not caption.strip() else text_problem(caption, max_characters=MAX_CAPTION)
    if problem is not None:
        return Broken(line, file, f"the caption {problem}")
    return Caption(line, file, caption)
