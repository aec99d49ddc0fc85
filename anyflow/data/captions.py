"""The table of captions that `anyflow preprocess` reads."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Caption:
    """One row to be.

    Args:
        line: where it stands in the table, from 1.
        file: the video, relative to the folder of videos.
        caption: the prompt.
    """

    line: int
    file: str
    caption: str


def read_captions(path: Path) -> list[Caption]:
    """The lines of a ``.csv`` (with a header) or ``.jsonl`` file, by its columns or keys ``file`` and ``caption``.

    Raises:
        ValueError: not such a file; the message names the line.
    """
    readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows}
    if path.suffix not in readers:
        raise ValueError(f"captions must be a {' or '.join(readers)} file, got {path}")
    if not path.is_file():
        raise ValueError(f"there is no captions file {path}")
    captions = []
    for line, row in readers[path.suffix](path):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("file", "caption")):
            raise ValueError(f"{path}, line {line}: needs a text for 'file' and one for 'caption', got {row}")
        captions.append(Caption(line, row["file"], row["caption"]))
    if not captions:
        raise ValueError(f"{path} has no captions")
    return captions


def _csv_rows(path: Path) -> list[tuple[int, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:  # spreadsheets put a mark at the start
        reader = csv.DictReader(file)
        return [(reader.line_num, row) for row in reader]


def _jsonl_rows(path: Path) -> list[tuple[int, Any]]:
    rows = []
    for line, text in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if text.strip():
            try:
                rows.append((line, json.loads(text)))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {line}: no JSON ({error})") from None
    return rows
