"""Test captions in a folder: a table, two lists, or a text file beside each video."""

import os
from pathlib import Path

import pytest

from anyflow.data.caption_sources import find_captions, video_files
from anyflow.data.captions import Broken, Caption, Columns, EmptyDatasetError


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Make a folder of three files that end as videos do, and of others."""
    folder = tmp_path / "videos"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name in ("b.mp4", "A.MOV", "sub/c.webm", "notes.md", ".d.mp4", ".hidden/e.mp4", "mp4"):
        (folder / name).write_bytes(b"")
    return folder


def _pairs(lines: object) -> list[tuple[str, str]]:
    return [(line.file, line.caption) for line in lines]  # type: ignore[attr-defined]


def test_the_videos_of_a_folder(videos: Path) -> None:
    assert [str(path) for path in video_files(videos)] == ["A.MOV", "b.mp4", "sub/c.webm"]


def test_a_text_file_beside_each_video(videos: Path, tmp_path: Path) -> None:
    texts = {"A.txt": "a disc,\nred\n", "b.txt": "\ufeffschön ", "sub/c.txt": "a cross"}
    expected = [("A.MOV", "a disc,\nred"), ("b.mp4", "schön"), ("sub/c.webm", "a cross")]
    for folder, captions in ((videos, None), (tmp_path / "texts", tmp_path / "texts")):
        for name, text in texts.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
        found = find_captions(captions, videos)
        assert (found.source, found.unit) == (folder, None)
        assert _pairs(found.lines) == expected and [line.line for line in found.lines] == [1, 2, 3]
        for name in texts:
            (folder / name).unlink()


def test_a_text_file_that_cannot_be_used_breaks_its_video_alone(videos: Path) -> None:
    (videos / "A.txt").write_bytes("schön".encode("latin-1"))
    (videos / "b.txt").write_text(" \n")
    os.mkfifo(videos / "sub" / "c.txt")
    (videos / "d.mp4").write_bytes(b"")
    (videos / "e.mp4").write_bytes(b"")
    (videos / "e.txt").write_text("a disc")
    found = find_captions(None, videos)
    *broken, sound = found.lines[:3] + found.lines[4:] + found.lines[3:4]
    assert sound == Caption(4, "e.mp4", "a disc")
    reasons = [
        "byte 0xf6 is not UTF-8",
        "the caption is empty",
        "d.txt does not exist",
        "is a FIFO",
    ]
    for line, reason in zip(broken, reasons, strict=True):
        assert isinstance(line, Broken) and reason in line.reason
    assert found.place(broken[0]) == "A.MOV"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", "file_name,text\nb.mp4,a disc\n"),
        ("metadata.tsv", "video\tprompt\nb.mp4\ta disc\n"),
        ("metadata.jsonl", '{"file_name": "b.mp4", "text": "a disc"}\n'),
        ("metadata.json", '{"b.mp4": "a disc"}'),
    ],
)
def test_a_table_in_the_folder(videos: Path, tmp_path: Path, name: str, content: str) -> None:
    (videos / name).write_text(content)
    (videos / "b.txt").write_text("another caption")
    for captions in (None, videos, videos / name):
        found = find_captions(captions, videos)
        assert found.source == videos / name and _pairs(found.lines) == [("b.mp4", "a disc")]
    assert (
        find_captions(None, videos)
        .place(Broken(3, "b.mp4", ""))
        .startswith(("entry" if name.endswith("json") else "line") + " 3 of ")
    )


def test_the_columns_of_a_table_in_the_folder(videos: Path) -> None:
    (videos / "metadata.csv").write_text("id,text,prompt\nb.mp4,a,b\n")
    assert _pairs(find_captions(None, videos, Columns("id", "prompt")).lines) == [("b.mp4", "b")]


def test_several_tables_in_the_folder_are_an_error(videos: Path) -> None:
    for suffix in ("csv", "jsonl"):
        (videos / f"metadata.{suffix}").write_text("")
    with pytest.raises(
        ValueError,
        match=r"has metadata\.csv and metadata\.jsonl; give the one to read as --captions",
    ):
        find_captions(None, videos)


@pytest.mark.parametrize(
    ("files", "prompts"), [("videos.txt", "prompts.txt"), ("video.txt", "captions.txt")]
)
def test_two_lists_in_the_folder(videos: Path, files: str, prompts: str) -> None:
    (videos / files).write_text("b.mp4\r\nsub/c.webm\r\nA.MOV\n\n")
    (videos / prompts).write_text("a disc, red\na line\u2028break\n\n")
    with pytest.raises(ValueError, match=r"videos?\.txt has 3 lines and .*\.txt has 2"):
        find_captions(None, videos)
    (videos / prompts).write_text("a disc, red\na line\u2028break\n \nof nothing\n")
    (videos / files).write_text("b.mp4\nsub/c.webm\nA.MOV\n\t\n")
    *lines, no_caption, no_file = find_captions(None, videos).lines
    assert lines == [
        Caption(1, "b.mp4", "a disc, red"),
        Caption(2, "sub/c.webm", "a line\u2028break"),
    ]
    assert isinstance(no_caption, Broken) and (no_caption.line, no_caption.file) == (3, "A.MOV")
    assert isinstance(no_file, Broken) and no_file.line == 4


def test_a_folder_without_captions_or_videos_is_empty(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(
        EmptyDatasetError, match=r"no metadata\.csv.*no \.txt file for any of the 3 videos.*A\.txt"
    ):
        find_captions(None, videos)
    (tmp_path / "empty").mkdir()
    with pytest.raises(EmptyDatasetError, match=r"empty holds no videos: .*\.mp4"):
        find_captions(None, tmp_path / "empty")
    (videos / "videos.txt").write_text("\n")
    (videos / "prompts.txt").write_text("")
    with pytest.raises(EmptyDatasetError, match=r"videos\.txt names no videos"):
        find_captions(None, videos)
