"""Read the tables of captions of `anyflow preprocess`, by the column names that people use."""

from __future__ import annotations

import csv
import io
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from anyflow.utils.documents import parse_json, read_text, shortened, text_problem

MAX_FILE_BYTES = 4 * 2**30
MAX_CAPTION = 2**17  # characters; a text encoder takes 512 tokens
MAX_NAME = 4096  # characters, the longest path of Linux
_FIELD_LIMIT = threading.Lock()  # the limit of the csv module is one for the whole process


# The names that people give these columns: ours, Hugging Face's (file_name, text), those of the
# common trainers.
FILE_COLUMNS = (
    "file",
    "file_name",
    "filename",
    "file_path",
    "video",
    "video_path",
    "media_path",
    "path",
)
CAPTION_COLUMNS = ("caption", "text", "prompt")


class EmptyDatasetError(ValueError):
    """Report that no video and no caption, or none that can be used, was found."""


@dataclass(frozen=True)
class Caption:
    """Hold one captioned video.

    Args:
        line: its place in the table, from 1: the last line of an entry that takes several lines,
            the number of an entry in a ``.json`` file, of a video in a folder without a table.
        file: the video, relative to the folder of videos.
        caption: the prompt.
    """

    line: int
    file: str
    caption: str


@dataclass(frozen=True)
class Broken:
    """Hold a line of the captions that cannot be used.

    Args:
        line: see :class:`Caption`.
        file: the video it names; empty where that cannot be told.
        reason: why it is of no use.
    """

    line: int
    file: str
    reason: str


@dataclass(frozen=True)
class Columns:
    """Name the two columns that are read.

    Args:
        file: of the videos; None takes the one column that has a name of ``FILE_COLUMNS``.
        caption: of the prompts; None takes the one column that has a name of ``CAPTION_COLUMNS``.
    """

    file: str | None = None
    caption: str | None = None

    def choose(self, found: Sequence[str], where: str) -> tuple[str, str]:
        """Return the names of the two columns among ``found``.

        Raises:
            ValueError: a name that was given is not among them, or no column or several could be
                meant.
        """
        file = _chosen(found, self.file, FILE_COLUMNS, "the videos", "--file-column", where)
        return file, _chosen(
            found, self.caption, CAPTION_COLUMNS, "the captions", "--caption-column", where
        )


def _chosen(
    found: Sequence[str],
    wanted: str | None,
    known: Sequence[str],
    role: str,
    option: str,
    where: str,
) -> str:
    shown = ", ".join(repr(shortened(name, 80)) for name in found[:20])
    shown = shown if found else "none"
    if wanted is not None:
        if wanted in found:
            return wanted
        raise ValueError(
            f"{where}: {option} names {wanted!r}, which is none of the columns: {shown}"
        )
    fitting = [name for name in found if name.strip().lower() in known]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ValueError(
            f"{where}: {fitting} could each be the column of {role}; say which with {option}"
        )
    raise ValueError(
        f"{where}: no column of {role}: the columns are {shown}, and one of "
        f"{', '.join(map(repr, known))} is expected; "
        f"say another with {option}"
    )


def read_captions(path: Path, columns: Columns = Columns()) -> list[Caption]:
    """Read a table of videos and captions.

    Other columns and keys are left alone, and so are empty lines.

    Args:
        path: a ``.csv`` or ``.tsv`` file with a header, a ``.jsonl`` file with an object on each
            line, or a ``.json`` file with a list of such objects or one object of
            ``"file": "caption"``.
        columns: names of the columns or keys.

    Raises:
        ValueError: see :func:`scan_captions`; or a line is not exactly what the format says; the
            message names it.
    """
    captions = []
    for entry in scan_captions(path, columns):
        if isinstance(entry, Broken):
            raise ValueError(f"{shortened(path)}, {unit(path)} {entry.line}: {entry.reason}")
        captions.append(entry)
    return captions


def scan_captions(path: Path, columns: Columns = Columns()) -> list[Caption | Broken]:
    """Read a table as :func:`read_captions` does, with a :class:`Broken` for each faulty line.

    A line is faulty when it has more or fewer fields than the header, text after a closing quote, a
    value that is not a text, a caption that is empty or has over ``MAX_CAPTION`` characters, a null
    character or a lone surrogate; a line of JSON also when it is no object, names a key twice, is
    nested too deeply or holds NaN.

    Raises:
        ValueError: the fault is of the whole file: it is not a regular file in UTF-8, its header
            lacks a column, names one twice or has several that could be meant, a quote that is
            never closed swallows the lines after it, or a ``.json`` file is not JSON.
        EmptyDatasetError: the table has no lines, or none that can be read.
    """
    if path.suffix.lower() not in READERS:
        raise ValueError(
            f"captions must be a {', '.join(list(READERS)[:-1])} or {list(READERS)[-1]} file, or a "
            "folder with a .txt "
            f"file for each video, got {shortened(path)}"
        )
    try:
        text = read_text(path, max_bytes=MAX_FILE_BYTES)
    except ValueError as error:
        raise ValueError(f"captions: {error}") from None
    lines = list(READERS[path.suffix.lower()](text, shortened(path), columns))
    if not lines:
        raise EmptyDatasetError(f"{shortened(path)} has no captions")
    if all(isinstance(line, Broken) and not line.file for line in lines):
        first = lines[0]
        assert isinstance(first, Broken)
        raise EmptyDatasetError(
            f"{shortened(path)}, {unit(path)} {first.line}: {first.reason} (and no other "
            f"{unit(path)} can be read)"
        )
    return lines


def unit(path: Path) -> str:
    """Return what :attr:`Caption.line` counts in a table."""
    return "entry" if path.suffix.lower() == ".json" else "line"


def _from_csv(
    text: str, path: str, columns: Columns, delimiter: str = ","
) -> Iterator[Caption | Broken]:
    """Parse a table with the strict reader of Python: RFC 4180, and quotes inside unquoted text."""
    ended = False

    def lines() -> Iterator[str]:
        nonlocal ended
        yield from io.StringIO(text, newline="")
        ended = True

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    header: _Header | None = None
    while True:
        start = reader.line_num + 1
        try:
            fields = _next_fields(reader)
        except csv.Error as error:
            if header is None or (ended and reader.line_num > start):
                what = "a quote that is opened here is never closed" if ended else str(error)
                raise ValueError(f"{path}, line {start}: {what}") from None
            yield Broken(
                reader.line_num, "", f"the text that begins in line {start} cannot be read: {error}"
            )
            continue
        if fields is None:
            return
        if not fields:
            continue
        if header is None:
            header = _Header.of(fields, columns, f"{path}, line {start}", delimiter)
            continue
        yield header.read(reader.line_num, fields)


def _next_fields(reader: Any) -> list[str] | None:
    """Read the next fields without the csv module's limit, which would cut one in the middle."""
    with _FIELD_LIMIT:
        limit = csv.field_size_limit(sys.maxsize)
        try:
            return next(reader, None)
        finally:
            csv.field_size_limit(limit)


@dataclass(frozen=True)
class _Header:
    """Hold the header of a ``.csv`` or ``.tsv`` table.

    Args:
        names: names of all columns.
        file: the column of the videos.
        caption: the column of the captions.
        delimiter: between fields.
    """

    names: list[str]
    file: str
    caption: str
    delimiter: str

    @classmethod
    def of(cls, names: list[str], columns: Columns, where: str, delimiter: str) -> _Header:
        twice = sorted({name for name in names if name and names.count(name) > 1})
        if twice:
            raise ValueError(f"{where}: the header names {twice} more than once")
        if len(names) == 1 and (
            other := next((c for c in ",;\t|" if c != delimiter and c in names[0]), None)
        ):
            raise ValueError(
                f"{where}: the header must have {_DELIMITERS[delimiter]} between its columns, got "
                f"{names} with "
                f"{_DELIMITERS.get(other, repr(other))} (a table with tabs is a .tsv file)"
            )
        return cls(names, *columns.choose(names, where), delimiter)

    def read(self, line: int, fields: list[str]) -> Caption | Broken:
        """Read the fields of a line."""
        if len(fields) != len(self.names):
            first = fields[0] if self.names[0] == self.file else ""
            return Broken(
                line,
                first if text_problem(first, max_characters=MAX_NAME) is None else "",
                f"the line has {len(fields)} fields and the header {len(self.names)} (a text with "
                f"{_DELIMITERS[self.delimiter]} in it needs quotes): {shortened(repr(fields))}",
            )
        named = dict(zip(self.names, fields, strict=True))
        file, caption = named[self.file], named[self.caption]
        # A quote after a space does not quote: the text would be read with its quotes.
        if any(text[:1].isspace() and text.lstrip().startswith('"') for text in (file, caption)):
            what = _DELIMITERS[self.delimiter].removeprefix("a ")
            return Broken(
                line,
                "",
                f"a quote must stand right after the {what}, got {shortened(repr(fields))}",
            )
        return checked_caption(line, file, caption)


_DELIMITERS = {",": "a comma", "\t": "a tab", ";": "a semicolon"}


def _from_jsonl(text: str, path: str, columns: Columns) -> Iterator[Caption | Broken]:
    documents: dict[int, Any] = {}
    for line, document in enumerate(io.StringIO(text, newline=None), start=1):
        if not document.strip():
            continue
        try:
            documents[line] = parse_json(document, "the line", finite=True)
        except ValueError as error:
            documents[line] = Broken(line, "", shortened(str(error), 400))
    return _from_objects(documents, path, columns, "line")


def _from_json(text: str, path: str, columns: Columns) -> Iterator[Caption | Broken]:
    document = parse_json(text, path, finite=True)
    if isinstance(document, dict):
        return iter(
            [
                checked_caption(number, *pair)
                for number, pair in enumerate(document.items(), start=1)
            ]
        )
    if not isinstance(document, list):
        raise ValueError(
            f"{path} must hold a list of objects, or one object of files and their captions"
        )
    return _from_objects(dict(enumerate(document, start=1)), path, columns, "entry")


def _from_objects(
    documents: dict[int, Any], path: str, columns: Columns, unit: str
) -> Iterator[Caption | Broken]:
    """Read objects by their line or number; the keys of all objects together decide the columns."""
    objects = [document for document in documents.values() if isinstance(document, dict)]
    names = list(dict.fromkeys(name for named in objects for name in named))
    file, caption = columns.choose(names, path) if objects else ("", "")
    for line, document in documents.items():
        if isinstance(document, Broken):
            yield document
        elif isinstance(document, dict):
            yield checked_caption(line, document.get(file), document.get(caption), (file, caption))
        else:
            yield Broken(
                line,
                "",
                f"the {unit} is no object with a file and a caption: {shortened(repr(document))}",
            )


READERS: dict[str, Callable[[str, str, Columns], Iterator[Caption | Broken]]] = {
    ".csv": _from_csv,
    ".tsv": partial(_from_csv, delimiter="\t"),
    ".jsonl": _from_jsonl,
    ".json": _from_json,
}


def checked_caption(
    line: int, file: object, caption: object, names: tuple[str, str] = ("file", "caption")
) -> Caption | Broken:
    if not isinstance(file, str) or not isinstance(caption, str):
        given = f"{shortened(repr(file))} and {shortened(repr(caption))}"
        name = (
            file
            if isinstance(file, str) and text_problem(file, max_characters=MAX_NAME) is None
            else ""
        )
        return Broken(
            line, name, f"needs a text for {names[0]!r} and one for {names[1]!r}, got {given}"
        )
    problem = "is empty" if not file.strip() else text_problem(file, max_characters=MAX_NAME)
    if problem is not None:
        return Broken(line, shortened(file), f"the name of the file {problem}")
    problem = (
        "is empty" if not caption.strip() else text_problem(caption, max_characters=MAX_CAPTION)
    )
    if problem is not None:
        return Broken(line, file, f"the caption {problem}")
    return Caption(line, file, caption)
