"""Test what anyflow.utils.documents reads, and how it names what cannot be read."""

import os

import pytest

from anyflow.utils.documents import (
    MAX_DEPTH,
    is_no_folder,
    parse_json,
    read_json,
    read_text,
    require_regular_file,
    text_problem,
)


def test_text_is_utf8_with_or_without_a_mark(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfsch\xc3\xb6n")
    assert read_text(file) == "schön"


def test_another_encoding_names_file_and_line(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes("one\nschön".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt, line 2: byte 0xf6 is not UTF-8"):
        read_text(file)


def test_a_large_file_is_not_read(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(b"x" * 11)
    assert read_text(file, max_bytes=11) == "x" * 11
    with pytest.raises(ValueError, match="larger than the 10 bytes"):
        read_text(file, max_bytes=10)


def test_what_is_not_a_regular_file_is_named_and_not_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "file").touch()
    wrong = {
        tmp_path: "is a folder",
        tmp_path / "fifo": "is a FIFO",
        tmp_path / "device": "is a device",
        tmp_path / "loop": "[Ss]ymbolic links",
        tmp_path / "absent": "does not exist",
        tmp_path / "file" / "x": "Not a directory",
        tmp_path / ("x" * 300): "name too long",
        "a\0b": "null",
    }
    for path, reason in wrong.items():
        with pytest.raises(ValueError, match=reason) as caught:
            require_regular_file(path)
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "nested"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested"),
        ('{"a": 1, "a": 2}', r"\['a'\] occur more than once"),
        (r'{"a": "\ud800"}', "lone surrogate"),
        ("9" * 10_000, "cannot be read as JSON"),
    ],
)
def test_json_that_is_refused_names_the_document(text, reason):
    with pytest.raises(ValueError, match=f"^here .*{reason}"):
        parse_json(text, "here")


def test_json_is_read(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"a": [1, {"b": null}]}')
    assert read_json(file) == {"a": [1, {"b": None}]}
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "here")


def test_numbers_that_json_does_not_have_are_refused_on_request():
    for text in ('{"a": NaN}', "[-Infinity]", "1e999"):
        parse_json(text, "it")
        with pytest.raises(ValueError, match="it cannot be read as JSON"):
            parse_json(text, "it", finite=True)


def test_texts_that_can_be_no_prompt_say_why():
    assert text_problem("熊猫 \U0001f43c", max_characters=4) is None
    assert text_problem("abc", max_characters=2) == "has 3 characters, at most 2 are allowed"
    assert "null character" in text_problem("a\0", max_characters=9)
    assert "lone surrogate" in text_problem("\udcff", max_characters=9)


def test_what_is_no_folder_is_told_from_nothing_and_from_folders(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere").symlink_to("missing")
    os.mkfifo(tmp_path / "fifo")
    found = {
        name: is_no_folder(tmp_path / name)
        for name in ("", "missing", "file", "file/below", "loop", "nowhere", "fifo")
    }
    assert [name for name, yes in found.items() if yes] == ["file", "fifo"]
    with pytest.raises(OSError, match="name too long"):
        is_no_folder(tmp_path / ("x" * 300))
