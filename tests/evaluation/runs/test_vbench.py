"""Run VBench as a process; a package of its name stands in for an installation.

It has the calls of VBench's README (``VBench(device, full_info_dir, output_path).evaluate(...)``)
and writes the file that VBench writes; its scores are no measurement. What is tested is the
process: interpreter, arguments, environment, log, results and failures.
"""

import json
import os
import sys
from pathlib import Path

import pytest

from anyflow.evaluation.runs.vbench import VBench, VBenchError


@pytest.fixture
def videos(tmp_path: Path) -> tuple[Path, Path]:
    """Make a folder of videos and the file of their prompts."""
    folder = tmp_path / "samples"
    folder.mkdir()
    (folder / "a cat-0.mp4").write_bytes(b"video")
    (tmp_path / "prompts.json").write_text(json.dumps({"a cat-0.mp4": "a cat"}))
    return folder, tmp_path / "prompts.json"


def test_a_process_of_the_other_interpreter_scores_a_folder(
    vbench_python: Path, videos: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.chdir(tmp_path)
    vbench = VBench(
        vbench_python.relative_to(tmp_path)
        if vbench_python.is_relative_to(tmp_path)
        else vbench_python
    )
    vbench.check()
    scores = vbench.score(*videos, tmp_path / "out", ["motion_smoothness", "imaging_quality"])
    assert scores == {"motion_smoothness": 0.17, "imaging_quality": 0.15}
    seen = json.loads((tmp_path / "out" / "seen.json").read_text())
    assert seen == {
        "ranks": False,
        "python": str(vbench_python.parents[1]),
        "prompts": {"a cat-0.mp4": "a cat"},
    }
    assert "evaluating" in (tmp_path / "out" / "log.txt").read_text()
    assert sorted(file.name for file in videos[0].iterdir()) == ["a cat-0.mp4"]


def test_a_failure_is_one_line_with_what_vbench_said_last(
    vbench_python: Path, videos: tuple[Path, Path], tmp_path: Path
) -> None:
    vbench, out = VBench(vbench_python), tmp_path / "out"
    with pytest.raises(
        VBenchError, match="VBench has failed with status 1: RuntimeError: no weights of UMT"
    ) as failure:
        vbench.score(*videos, out, ["human_action"])
    assert str(out / "log.txt") in str(failure.value) and "\n" not in str(failure.value)
    vbench.score(*videos, out, ["motion_smoothness"])
    # not those of the call before
    with pytest.raises(VBenchError, match="VBench has left no scores"):
        vbench.score(*videos, out, ["temporal_style"])


def test_an_environment_without_vbench(tmp_path: Path, videos: tuple[Path, Path]) -> None:
    with pytest.raises(VBenchError, match="No module named 'vbench'"):
        VBench(Path(sys.executable)).score(*videos, tmp_path / "out", ["motion_smoothness"])


@pytest.mark.parametrize(
    ("python", "dimensions", "message"),
    [
        (
            "missing/python",
            ["motion_smoothness"],
            "--vbench-python missing/python is not a program",
        ),
        (sys.executable, ["color"], "VBench computes color of its own prompts only"),
        (
            sys.executable,
            ["smoothness"],
            "--vbench-dimensions must be of subject_consistency, .*, got 'smoothness'",
        ),
        (sys.executable, [], "names no dimension"),
    ],
)
def test_what_cannot_be_asked_of_vbench(python: str, dimensions: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VBench(Path(python), dimensions).check()
