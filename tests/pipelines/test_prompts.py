"""Test files of prompts: lines, tables and objects, and what they cannot be."""

import json
from pathlib import Path

import pytest

from anyflow.pipelines.prompts import VideoPrompt, read_prompts


def test_prompts_are_lines(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffa red disc\r\n\n  熊猫  \n", encoding="utf-8")
    assert read_prompts(file) == [VideoPrompt("a red disc"), VideoPrompt("熊猫")]
    file.write_bytes(b"one\rtwo,\tthree")
    assert read_prompts(file) == [VideoPrompt("one"), VideoPrompt("two,\tthree")]


def test_tables_have_negative_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.csv"
    file.write_text(
        'prompt,negative_prompt\n"a disc, red",blurry\n\na cross,\n', encoding="utf-8-sig"
    )
    assert read_prompts(file) == [VideoPrompt("a disc, red", "blurry"), VideoPrompt("a cross")]
    file.write_text("prompt\na disc\n")
    assert read_prompts(file) == [VideoPrompt("a disc")]
    lines = [
        {"prompt": "a disc", "negative_prompt": ""},
        {"prompt": "a cross", "negative_prompt": None},
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n\n".join(map(json.dumps, lines)))
    assert read_prompts(file) == [VideoPrompt("a disc", ""), VideoPrompt("a cross")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n", "has no prompts"),
        ("a.txt", "sch\u00f6n\n".encode("latin-1"), "line 1: byte 0xf6 is not UTF-8"),
        ("a.txt", "a red disc\n".encode("utf-16"), "not UTF-8"),
        ("a.txt", "a\nb\n".encode("utf-16-le"), "line 1: the prompt has a null character"),
        ("a.txt", b"a\n" + b"x" * 200_000, "line 2: the prompt has 200000 characters"),
        ("a.csv", b"prompt\n", "has no prompts"),
        (
            "a.csv",
            b"a red disc\n",
            "line 1: 'a red disc' is none of the columns prompt, negative_prompt",
        ),
        ("a.csv", b"prompt,negative\na,b\n", "did you mean 'negative_prompt'"),
        ("a.csv", b"negative_prompt\nb\n", "must name the column 'prompt'"),
        (
            "a.csv",
            b"prompt,negative_prompt\na, b, c\n",
            "line 2: 3 cells in place of 2 .*double quotes",
        ),
        (
            "a.csv",
            b"prompt,negative_prompt\n,bad\n",
            "line 2: 'prompt' must be a text that is not empty",
        ),
        ("a.csv", b'prompt\n"a\n', "unexpected end"),
        ("a.jsonl", b"a red disc\n", "line 1 cannot be read as JSON"),
        ("a.jsonl", b'{"prompt": "a"}\n[]\n', "line 2 must be an object"),
        ("a.jsonl", b'{"prompt": 1}\n', "'prompt' must be a text"),
        (
            "a.jsonl",
            b'{"prompt": "a", "negative_prompt": ["b"]}\n',
            "'negative_prompt' must be a text",
        ),
    ],
)
def test_what_can_be_no_prompt_is_named_with_its_line(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"prompts: .*{name}.*{message}") as error:
        read_prompts(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts(tmp_path / "none.txt")
