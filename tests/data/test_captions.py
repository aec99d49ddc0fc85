"""Test tables of captions: CSV, TSV, JSON lines and JSON, with the column names that people use."""

import csv
import json
import os
from pathlib import Path

import pytest

from anyflow.data.captions import (
    MAX_CAPTION,
    Broken,
    Caption,
    Columns,
    EmptyDatasetError,
    read_captions,
    scan_captions,
)

EXPECTED = [("a.mp4", 'A "red" disc,\nmoving'), ("sub/b.mp4", "Ein Kreuz – groß")]


def test_csv_and_jsonl_say_the_same(tmp_path: Path) -> None:
    table = tmp_path / "captions.csv"
    table.write_text(
        'caption,file,extra\n"A ""red"" disc,\nmoving",a.mp4,1\nEin Kreuz – groß,sub/b.mp4,\n',
        encoding="utf-8-sig",
    )
    lines = tmp_path / "captions.jsonl"
    lines.write_text(
        '{"file": "a.mp4", "caption": "A \\"red\\" disc,\\nmoving"}\n\n'
        '{"caption": "Ein Kreuz – groß", "file": "sub/b.mp4", "extra": 1}\n',
        encoding="utf-8",
    )
    for path, numbers in ((table, (3, 4)), (lines, (1, 3))):
        assert read_captions(path) == [
            Caption(line, *entry) for line, entry in zip(numbers, EXPECTED, strict=True)
        ]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_what_writers_of_csv_make_is_read_back(tmp_path: Path, ending: str, quoting: int) -> None:
    lines = [("a.mp4", 'a 5" screen, dark'), ("b, c.mp4", "two\nlines"), ("d.mp4", " spaces ")]
    with (tmp_path / "c.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator=ending, quoting=quoting).writerows(
            [("file", "caption"), *lines]
        )
    assert [(entry.file, entry.caption) for entry in read_captions(tmp_path / "c.csv")] == lines


HEADER = "file,caption\n"
# Each is line 3 of a table whose lines 2 and 4 are sound.
BROKEN_CSV = {
    "0.mp4,a red panda, eating bamboo": "3 fields",
    "0.mp4": "1 fields",
    "0.mp4,": "caption is empty",
    "0.mp4,   ": "caption is empty",
    ",a red panda": "name of the file is empty",
    '0.mp4,"a" red panda': "cannot be read: ',' expected after '\"'",
    '0.mp4, "a red panda"': "a quote must stand right after the comma",
    "0.mp4,a\0b": "null",
    f"0.mp4,{'x' * 200_000}": f"has 200000 characters, at most {MAX_CAPTION}",
    f"{'x' * 5_000},a": "name of the file has 5000 characters",
}
BROKEN_JSONL = {
    '{"file": "0.mp4"}': "needs a text",
    '{"file": "0.mp4", "caption": 3}': "needs a text",
    '{"file": "0.mp4", "caption": null}': "needs a text",
    '{"file": "0.mp4", "caption": ["a"]}': "needs a text",
    '{"file": "0.mp4", "caption": NaN}': "JSON",
    '{"file": "0.mp4", "caption": "a", "score": 1e999}': "JSON",
    '{"file": "0.mp4", "caption": ""}': "caption is empty",
    '{"file": "0.mp4", "caption": "a", "caption": "b"}': "more than once",
    '{"file": "0.mp4", "caption": "\\ud800"}': "lone surrogate",
    '{"file": "\\udcff.mp4", "caption": "a"}': "lone surrogate",
    '{"file": "0.mp4", "caption": "a\\u0000b"}': "null character",
    '{"file": "0.mp4", "caption": "a"} {"file": "1.mp4", "caption": "b"}': "Extra data",
    '{"file": "0.mp4", "capt': "JSON",
    '["0.mp4", "a"]': "no object",
    "[" * 100_000: "nested",
    '{"file": "0.mp4", "caption": "a", "n": ' + "9" * 10_000 + "}": "JSON",
    json.dumps({"file": "0.mp4", "caption": "x" * 200_000}): "200000 characters",
}


@pytest.mark.parametrize(
    ("suffix", "entry", "reason"),
    [(".csv", *case) for case in BROKEN_CSV.items()]
    + [(".jsonl", *case) for case in BROKEN_JSONL.items()],
    ids=lambda value: value[:30],
)
def test_one_odd_row_is_an_error_with_its_line_and_does_not_hide_the_others(
    tmp_path: Path, suffix: str, entry: str, reason: str
) -> None:
    path = tmp_path / f"c{suffix}"
    sound = [
        f"{i}.mp4,b" if suffix == ".csv" else json.dumps({"file": f"{i}.mp4", "caption": "b"})
        for i in (1, 2)
    ]
    start = [HEADER.strip()] if suffix == ".csv" else [""]
    path.write_text("\n".join([*start, sound[0], entry, sound[1]]) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"c\{suffix}, line 3: .*({reason})") as caught:
        read_captions(path)
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)
    first, broken, last = scan_captions(path)
    assert isinstance(first, Caption) and isinstance(last, Caption)
    assert (first.file, last.file, last.line) == ("1.mp4", "2.mp4", 4)
    assert isinstance(broken, Broken) and broken.line == 3
    json.dumps(broken.__dict__, ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "c.csv",
            b"file,words\na.mp4,x\n",
            r"c\.csv, line 1: .*'file', 'words'.*'caption', 'text', 'prompt'",
        ),
        (
            "c.csv",
            b"name,text\na.mp4,x\n",
            r"c\.csv, line 1: .*'name', 'text'.*'file', 'file_name'.*--file-column",
        ),
        (
            "c.csv",
            b"file;caption\na.mp4;x\n",
            r"c\.csv, line 1: .*must have a comma.*with a semicolon",
        ),
        (
            "c.csv",
            b"file\tcaption\na.mp4\tx\n",
            r"c\.csv, line 1: .*must have a comma.*with a tab .*is a \.tsv",
        ),
        ("c.tsv", b"file,caption\na.mp4,x\n", r"c\.tsv, line 1: .*must have a tab.*with a comma"),
        (
            "c.csv",
            b"file,text,prompt\na.mp4,x,y\n",
            r"\['text', 'prompt'\] could each be .*--caption-column",
        ),
        (
            "c.csv",
            b"path,video,text\na.mp4,x,y\n",
            r"\['path', 'video'\] could each be .*--file-column",
        ),
        (
            "c.jsonl",
            b'{"file": "a", "text": "b"}\n{"file": "a", "prompt": "b"}\n',
            r"\['text', 'prompt'\] could each",
        ),
        (
            "c.jsonl",
            b'{"clip": "a", "text": "b"}\n',
            r"c\.jsonl: no column of the videos: .*'clip', 'text'",
        ),
        ("c.json", b'"a"', "must hold a list of objects, or one object"),
        ("c.json", b'[{"file": "a.mp4", "caption": "b"}', "cannot be read as JSON"),
        ("c.json", b'{"a.mp4": "b", "a.mp4": "c"}', "more than once"),
        (
            "c.csv",
            b"file,caption,caption\na.mp4,x,y\n",
            r"line 1: the header names \['caption'\] more than once",
        ),
        (
            "c.csv",
            b'file,caption\na.mp4,x\nb.mp4,"a disc\nc.mp4,y\nd.mp4,z\n',
            "line 3: .*never closed",
        ),
        (
            "c.csv",
            "file,caption\na.mp4,schön\n".encode("latin-1"),
            r"c\.csv, line 2: byte 0xf6 is not UTF-8",
        ),
        (
            "c.csv",
            "file,caption\na.mp4,x\n".encode("utf-16"),
            r"c\.csv, line 1: byte 0xff is not UTF-8",
        ),
        ("c.csv", "file,caption\na.mp4,x\n".encode("utf-16-le"), r"c\.csv, line 1"),
        ("c.jsonl", '{"file": "a.mp4", "caption": "x"}\n'.encode("utf-16-le"), r"c\.jsonl, line 1"),
        ("c.txt", b"", r"\.csv, \.tsv, \.jsonl or \.json file, or a folder .*, got .*c\.txt"),
    ],
)
def test_a_fault_of_the_whole_table_is_an_error(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    for read in (read_captions, scan_captions):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.csv", b"", "no captions"),
        ("c.csv", b"file,caption\n", "no captions"),
        ("c.tsv", b"file\tcaption\n\n", "no captions"),
        ("c.jsonl", b"\n\n", "no captions"),
        ("c.json", b"[]", "no captions"),
        ("c.json", b"{}", "no captions"),
        ("c.json", b'["a", 3]', r"c\.json, entry 1: .*no object .*no other entry"),
        (
            "c.jsonl",
            b'[\n{"file": "a.mp4",\n"caption": "x"}\n]\n',
            r"c\.jsonl, line 1: .*no other line",
        ),
    ],
)
def test_a_table_without_a_row_is_empty(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    for read in (read_captions, scan_captions):
        with pytest.raises(EmptyDatasetError, match=message):
            read(tmp_path / name)


# Tables of others: Hugging Face's VideoFolder, the trainers of diffusers, DiffSynth, musubi-tuner,
# LTX and Open-Sora.
NAMES = [
    ("file", "caption"),
    ("file_name", "text"),
    ("video", "prompt"),
    ("video_path", "caption"),
    ("media_path", "caption"),
    ("path", "text"),
    ("filename", "prompt"),
    (" File_Name", "Text "),
]


@pytest.mark.parametrize(("file", "caption"), NAMES)
def test_the_columns_have_the_names_that_people_give_them(
    tmp_path: Path, file: str, caption: str
) -> None:
    lines = [("a.mp4", "a disc, red"), ("sub/b.mp4", "007")]
    tables = {
        "csv": f'{caption},id,{file}\n"a disc, red",1,a.mp4\n007,2,sub/b.mp4\n',
        "tsv": f"{file}\t{caption}\tid\na.mp4\ta disc, red\t1\nsub/b.mp4\t007\t2\n",
        "jsonl": "".join(json.dumps({file: f, "id": 1, caption: c}) + "\n" for f, c in lines),
        "json": json.dumps([{caption: c, file: f} for f, c in lines]),
    }
    for suffix, content in tables.items():
        path = tmp_path / f"metadata.{suffix}"
        path.write_text(content, encoding="utf-8")
        assert [(entry.file, entry.caption) for entry in read_captions(path)] == lines, suffix


def test_a_json_object_gives_the_caption_of_each_file(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"a.mp4": "a disc", "b.mp4": 3, "c.mp4": "a cross"}')
    first, broken, last = scan_captions(tmp_path / "c.json")
    assert (first, last) == (Caption(1, "a.mp4", "a disc"), Caption(3, "c.mp4", "a cross"))
    assert isinstance(broken, Broken) and (broken.line, broken.file) == (2, "b.mp4")
    with pytest.raises(ValueError, match=r"c\.json, entry 2: needs a text"):
        read_captions(tmp_path / "c.json")


def test_columns_of_other_names_are_named_by_the_caller(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("clip,text,prompt,other\n0.mp4,a,b,c\n")
    (tmp_path / "c.jsonl").write_text(
        '{"clip": "0.mp4", "text": "a", "prompt": "b", "other": "c"}\n'
    )
    for name in ("c.csv", "c.jsonl"):
        for caption, expected in (("prompt", "b"), ("other", "c")):
            [entry] = read_captions(tmp_path / name, Columns("clip", caption))
            assert (entry.file, entry.caption) == ("0.mp4", expected)
        with pytest.raises(
            ValueError,
            match=r"--caption-column names 'words', which is none of the columns: 'clip'",
        ):
            read_captions(tmp_path / name, Columns("clip", "words"))


def test_a_quote_that_is_closed_too_late_costs_no_row_after_it(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text(f'{HEADER}0.mp4,"a disc\n1.mp4,"b, c"\n2.mp4,d\n')
    broken, after = scan_captions(path)
    assert isinstance(broken, Broken) and (broken.line, after) == (3, Caption(4, "2.mp4", "d"))


def test_the_limit_of_the_csv_module_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text(f"{HEADER}0.mp4,a\n")
    limit = csv.field_size_limit()
    read_captions(tmp_path / "c.csv")
    assert csv.field_size_limit() == limit


def test_a_table_that_is_not_there_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.csv")
    for name, reason in (("c.csv", "does not exist"), ("fifo.csv", "is a FIFO")):
        with pytest.raises(ValueError, match=rf"captions: .*{name} {reason}"):
            read_captions(tmp_path / name)
