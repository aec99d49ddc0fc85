"""Test the names of videos, which are VBench's wherever a file can have them."""

import json
import re
from pathlib import Path

import pytest

from anyflow.evaluation.runs.layout import Layout, check_model_name, video_stems
from anyflow.evaluation.runs.models import split_model_name


def vbench_prompt(name: str) -> str:
    """Read the prompt off a file's name as VBench documents: without ``-<number>`` and suffix."""
    return re.sub(r"-\d+$", "", Path(name).stem)


PROMPTS = [
    "a red panda",
    "A person is riding a bike.",
    "3-2-1",
    "eine schöne Füchsin",
    "a dog's [first] walk: 50 % off!",
]


def test_vbench_reads_the_prompt_off_the_names(tmp_path: Path) -> None:
    layout = Layout.of(tmp_path, PROMPTS, 5)
    names = [file.name for file in layout.videos("student", 4)]
    assert names[:2] == ["a red panda-0.mp4", "a red panda-1.mp4"]
    assert [vbench_prompt(name) for name in names] == [
        prompt for prompt in PROMPTS for _ in range(5)
    ]
    assert layout.samples("student", 4) == tmp_path / "samples" / "student" / "4"


@pytest.mark.parametrize(
    "prompt",
    ["on/off", "back\\slash", "line\nbreak", ".hidden", "x" * 201, "雪" * 70],
    ids=["slash", "backslash", "line", "dot", "long", "bytes"],
)
def test_a_prompt_that_no_file_can_be_named_after_has_a_name_in_prompts_json(
    prompt: str, tmp_path: Path
) -> None:
    layout = Layout.of(tmp_path, [prompt, "a cat"], 2)
    files = layout.videos("student", 1)
    for file in files:
        assert (
            len(file.name.encode()) < 220 and file.parent == tmp_path / "samples" / "student" / "1"
        )
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")
    layout.write_prompts()
    content = json.loads((tmp_path / "prompts.json").read_text())
    assert list(content) == [file.name for file in files]
    assert list(content.values()) == [prompt, prompt, "a cat", "a cat"]


def test_prompts_that_some_file_systems_confuse_have_different_names() -> None:
    stems = video_stems(["A cat", "a cat", "caf\u00e9", "cafe\u0301"])
    assert stems["A cat"] == "A cat" and re.fullmatch(r"a-cat-[0-9a-f]{8}", stems["a cat"])
    assert len({stem.casefold() for stem in stems.values()}) == 4


@pytest.mark.parametrize("name", ["", ".", "..", ".x", "a/b", "a\nb", "x" * 101, " x", "-x"])
def test_a_name_that_no_folder_should_have_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name of a model") as failure:
        check_model_name(name)
    assert "\n" not in str(failure.value)


def test_names_of_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student").mkdir()
    (tmp_path / "odd=name").mkdir()
    assert split_model_name("student") == ("student", "student")
    assert split_model_name("student/") == ("student", "student/")
    assert split_model_name("teacher=runs/x=1/model") == ("teacher", "runs/x=1/model")
    assert split_model_name("runs/x=1/model") == ("model", "runs/x=1/model")
    assert split_model_name("nvidia/AnyFlow-Wan2.1@main") == (
        "AnyFlow-Wan2.1",
        "nvidia/AnyFlow-Wan2.1@main",
    )
    assert split_model_name(".") == (tmp_path.name, ".")
    with pytest.raises(ValueError, match="cannot be the name of a model"):
        split_model_name("odd=name")
    with pytest.raises(ValueError, match="must name a folder"):
        split_model_name("name=")
