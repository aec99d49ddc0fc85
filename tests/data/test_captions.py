"""The table of captions, as CSV and as JSON lines."""

from pathlib import Path

import pytest

from anyflow.data.captions import Caption, read_captions

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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.csv", "file,text\na.mp4,x\n", r"c\.csv, line 2: .*'caption'"),
        ("c.csv", "file,caption\na.mp4,x\nb.mp4\n", "line 3"),
        ("c.csv", "file,caption\n", "no captions"),
        ("c.jsonl", '{"file": "a.mp4", "caption": "x"}\n{"file": "b.mp4"}\n', "line 2: .*'caption'"),
        ("c.jsonl", '{"file": "a.mp4", "caption": 3}\n', "line 1"),
        ("c.jsonl", '["a.mp4", "x"]\n', "line 1"),
        ("c.jsonl", '{"file": "a.mp4", "caption": "x"}\n{"file\n', "line 2: no JSON"),
        ("c.txt", "", r"\.csv or \.jsonl file, got .*c\.txt"),
    ],
)
def test_a_table_that_cannot_be_read_names_the_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path / name)


def test_a_table_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no captions file .*c\.csv"):
        read_captions(tmp_path / "c.csv")
