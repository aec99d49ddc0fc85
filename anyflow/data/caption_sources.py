"""Find captions in a table, in two lists of a folder, or in a text file beside each video."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anyflow.data.captions import (
    MAX_CAPTION,
    MAX_FILE_BYTES,
    READERS,
    Broken,
    Caption,
    Columns,
    EmptyDatasetError,
    checked_caption,
    scan_captions,
    unit,
)
from anyflow.utils.documents import read_text, shortened

VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".wmv", ".flv"),
    *(".mpg", ".mpeg", ".ts", ".3gp", ".ogv", ".gif"),
)
# Two lists with a line for each video, as CogVideoX's and finetrainers' scripts read them.
VIDEO_LISTS = ("videos.txt", "video.txt")
CAPTION_LISTS = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")


@dataclass(frozen=True)
class Captions:
    """Hold every line that was found.

    Args:
        source: the file or folder that was read.
        lines: in the order of the source, those of no use included.
        unit: what :attr:`Caption.line` counts; None where the file alone says which one is meant.
    """

    source: Path
    lines: Sequence[Caption | Broken]
    unit: str | None = "line"

    def place(self, entry: Caption | Broken) -> str:
        """Say in one line where an entry stands."""
        file = shortened(entry.file)
        if self.unit is None:
            return file
        place = f"{self.unit} {entry.line} of {shortened(self.source)}"
        return f"{place} ({file})" if file else place


def find_captions(captions: Path | None, videos: Path, columns: Columns = Columns()) -> Captions:  # noqa: B008 (it is frozen)
    """Read the captions of a folder of videos.

    A folder has them in the first of these that it holds: ``metadata.csv``, ``.tsv``, ``.jsonl`` or
    ``.json``, as Hugging Face's video folders do; ``videos.txt`` and ``prompts.txt``, a line for
    each video; or a ``.txt`` file for each video, with its name and at its place, whose whole text
    is the caption.

    Args:
        captions: a table, see :func:`anyflow.data.captions.read_captions`; a folder; or None for
            the folder of videos.
        videos: folder that the names of the files are relative to.
        columns: names of the columns of a table.

    Raises:
        ValueError: see :func:`anyflow.data.captions.scan_captions`; or the folder has several
            tables, or lists of different lengths.
        EmptyDatasetError: the source has no line, no video, or no caption for any video.
    """
    if captions is not None and not captions.is_dir():
        return Captions(captions, scan_captions(captions, columns), unit(captions))
    folder = videos if captions is None else captions
    tables = [path for suffix in READERS if os.path.lexists(path := folder / f"metadata{suffix}")]
    if len(tables) > 1:
        names = " and ".join(path.name for path in tables)
        raise ValueError(f"{shortened(folder)} has {names}; give the one to read as --captions")
    if tables:
        return Captions(tables[0], scan_captions(tables[0], columns), unit(tables[0]))
    listed, prompts = _first(folder, VIDEO_LISTS), _first(folder, CAPTION_LISTS)
    if listed is not None and prompts is not None:
        return Captions(listed, _listed(listed, prompts))
    return Captions(folder, _beside(folder, videos), None)


def _first(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if os.path.lexists(folder / name)), None)


def _listed(files: Path, prompts: Path) -> list[Caption | Broken]:
    """Read two lists side by side."""
    names, captions = (_lines(path) for path in (files, prompts))
    if len(names) != len(captions):
        raise ValueError(
            f"{shortened(files)} has {len(names)} lines and {shortened(prompts)} has "
            f"{len(captions)}; they must have a "
            "line for each video"
        )
    if not names:
        raise EmptyDatasetError(f"{shortened(files)} names no videos")
    return [
        checked_caption(line, *pair)
        for line, pair in enumerate(zip(names, captions, strict=True), start=1)
        if any(pair)
    ]


def _lines(path: Path) -> list[str]:
    text = read_text(path, max_bytes=MAX_FILE_BYTES).replace("\r\n", "\n").rstrip("\n")
    return [line.strip() for line in text.split("\n")] if text else []


def _beside(folder: Path, videos: Path) -> list[Caption | Broken]:
    """Read the text file of every video, in the order of the videos' names."""
    found = video_files(videos)
    if not found:
        raise EmptyDatasetError(
            f"{shortened(videos)} holds no videos: no file in it or its folders ends in "
            f"{', '.join(VIDEO_SUFFIXES)}"
        )
    lines = [
        _text_file(number, file, folder / file.with_suffix(".txt"))
        for number, file in enumerate(found, start=1)
    ]
    if not any(os.path.lexists(folder / file.with_suffix(".txt")) for file in found):
        raise EmptyDatasetError(
            f"no captions: {shortened(folder)} has no metadata.csv, .tsv, .jsonl or .json, and no "
            ".txt file for any of "
            f"the {len(found)} videos, such as {shortened(found[0].with_suffix('.txt'))}; "
            "--captions names a table"
        )
    return lines


def video_files(folder: Path) -> list[Path]:
    """Return the files that end as videos do, in order, relative to ``folder``; none is hidden."""
    found = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(root, name) for name in files if not name.startswith(".")]
        found += [
            path.relative_to(folder) for path in paths if path.suffix.lower() in VIDEO_SUFFIXES
        ]
    return sorted(found)


def _text_file(number: int, file: Path, text_file: Path) -> Caption | Broken:
    name = os.fsencode(file).decode("utf-8", "surrogateescape")
    try:
        caption = read_text(text_file, max_bytes=4 * MAX_CAPTION).strip()
    except ValueError as error:
        return Broken(number, shortened(name), f"it has no caption: {error}")
    return checked_caption(number, name, caption)
