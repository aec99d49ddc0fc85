"""The table of captions, as CSV and as JSON lines."""

import csv
import json
import os
from pathlib import Path

import pytest

from anyflow.data.captions import MAX_CAPTION, Broken, Caption, read_captions, scan_captions

EXPECTED = [("a.mp4", 'A "red" disc,\nmoving'), ("sub/b.mp4", "Ein Kreuz – groß")]


def test_csv_and_jsonl_say_the_same(tmp_path: Path) -> None:
    table = tmp_path / "captions.csv"
    table.write_text(
        'caption,file,extra\n"A ""red"" disc,\nmoving",a.mp4,1\nEin Kreuz – groß,sub/b.mp4,\n', encoding="utf-8-sig"
    )
    lines = tmp_path / "captions.jsonl"
    lines.write_text(
        '{"file": "a.mp4", "caption": "A \\"red\\" disc,\\nmoving"}\n\n'
        '{"caption": "Ein Kreuz – groß", "file": "sub/b.mp4", "extra": 1}\n',
        encoding="utf-8",
    )
    for path, numbers in ((table, (3, 4)), (lines, (1, 3))):
        assert read_captions(path) == [Caption(line, *row) for line, row in zip(numbers, EXPECTED, strict=True)]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_what_writers_of_csv_make_is_read_back(tmp_path: Path, ending: str, quoting: int) -> None:
    rows = [("a.mp4", 'a 5" screen, dark'), ("b, c.mp4", "two\nlines"), ("d.mp4", " spaces ")]
    with (tmp_path / "c.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator=ending, quoting=quoting).writerows([("file", "caption"), *rows])
    assert [(row.file, row.caption) for row in read_captions(tmp_path / "c.csv")] == rows


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
    ("suffix", "row", "reason"),
    [(".csv", *case) for case in BROKEN_CSV.items()] + [(".jsonl", *case) for case in BROKEN_JSONL.items()],
    ids=lambda value: value[:30],
)
def test_one_odd_row_is_an_error_with_its_line_and_does_not_hide_the_others(
    tmp_path: Path, suffix: str, row: str, reason: str
) -> None:
    path = tmp_path / f"c{suffix}"
    sound = [f"{i}.mp4,b" if suffix == ".csv" else json.dumps({"file": f"{i}.mp4", "caption": "b"}) for i in (1, 2)]
    start = [HEADER.strip()] if suffix == ".csv" else [""]
    path.write_text("\n".join([*start, sound[0], row, sound[1]]) + "\n", encoding="utf-8")
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
        ("c.csv", b"file,text\na.mp4,x\n", r"c\.csv, line 1: .*'caption'"),
        ("c.csv", b"file;caption\na.mp4;x\n", r"c\.csv, line 1: .*'caption'"),
        ("c.csv", b"file,caption,caption\na.mp4,x,y\n", r"line 1: the header names \['caption'\] more than once"),
        ("c.csv", b"file,caption\n", "no captions"),
        ("c.csv", b"", "no captions"),
        ("c.csv", b'file,caption\na.mp4,x\nb.mp4,"a disc\nc.mp4,y\nd.mp4,z\n', "line 3: .*never closed"),
        ("c.csv", "file,caption\na.mp4,schön\n".encode("latin-1"), r"c\.csv, line 2: byte 0xf6 is not UTF-8"),
        ("c.csv", "file,caption\na.mp4,x\n".encode("utf-16"), r"c\.csv, line 1: byte 0xff is not UTF-8"),
        ("c.csv", "file,caption\na.mp4,x\n".encode("utf-16-le"), r"c\.csv, line 1"),
        ("c.jsonl", '{"file": "a.mp4", "caption": "x"}\n'.encode("utf-16-le"), r"c\.jsonl, line 1"),
        ("c.jsonl", b'[\n{"file": "a.mp4",\n"caption": "x"}\n]\n', r"c\.jsonl, line 1: .*no other line"),
        ("c.jsonl", b"\n\n", "no captions"),
        ("c.txt", b"", r"\.csv or \.jsonl file, got .*c\.txt"),
    ],
)
def test_a_fault_of_the_whole_table_is_an_error(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    for read in (read_captions, scan_captions):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / name)


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
        with pytest.raises(ValueError, match=rf"no captions file .*{name}.*{reason}"):
            read_captions(tmp_path / name)
