"""Score a folder of videos by VBench, in a process of VBench's own interpreter."""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyflow.utils.documents import read_json, shortened
from anyflow.utils.validation import brief

# The dimensions that VBench computes of any videos (its mode custom_input), and those that need its
# own prompts.
CUSTOM_DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
    "temporal_style",
    "overall_consistency",
    "human_action",
)
STANDARD_DIMENSIONS = (
    "object_class",
    "multiple_objects",
    "color",
    "spatial_relationship",
    "scene",
    "appearance_style",
)
# VBench documents these for a user's own videos
DEFAULT_DIMENSIONS = CUSTOM_DIMENSIONS[:2] + CUSTOM_DIMENSIONS[3:7]

_NAME = "anyflow"  # VBench writes {name}_eval_results.json
_LOG = "log.txt"
_TAIL = 2**14  # bytes at the end of the output that are read
_TORCHRUN = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)

# The Python calls that the README of VBench documents; its command line names results by the time
# of day.
_PROGRAM = """
import json, os, sys
import vbench
import torch
arguments = json.loads(sys.argv[1])
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
info = os.path.join(os.path.dirname(vbench.__file__), "VBench_full_info.json")
prompts = json.load(open(arguments["prompt_file"], encoding="utf-8"))
benchmark = vbench.VBench(device, info, arguments["output_path"])
benchmark.evaluate(
    videos_path=arguments["videos_path"],
    name=arguments["name"],
    prompt_list=prompts,
    dimension_list=arguments["dimension_list"],
    mode="custom_input",
)
"""


class VBenchError(ValueError):
    """Say why VBench could not score a folder."""


@dataclass(frozen=True)
class VBench:
    """Describe an installation of VBench, and score videos by it.

    Args:
        python: its interpreter.
        dimensions: names of the dimensions to compute.
    """

    python: Path
    dimensions: Sequence[str] = DEFAULT_DIMENSIONS

    def check(self) -> None:
        """Raise a ValueError unless the interpreter is there and VBench takes own videos."""
        if not os.access(self.python, os.X_OK) or not self.python.is_file():
            raise ValueError(
                f"--vbench-python {shortened(self.python)} is not a program that can be run"
            )
        if not self.dimensions:
            raise ValueError("--vbench-dimensions names no dimension")
        for dimension in self.dimensions:
            if dimension in STANDARD_DIMENSIONS:
                raise ValueError(
                    f"--vbench-dimensions: VBench computes {dimension} of its own prompts only; "
                    "run it by hand on the "
                    "folders of samples, whose files are named as it wants them"
                )
            if dimension not in CUSTOM_DIMENSIONS:
                raise ValueError(
                    f"--vbench-dimensions must be of {', '.join(CUSTOM_DIMENSIONS)}, got "
                    f"{brief(dimension)}"
                )

    def score(
        self, videos: Path, prompts: Path, out: Path, dimensions: Sequence[str]
    ) -> dict[str, float]:
        """Score a folder of videos in a process of its own.

        Args:
            videos: folder with videos and nothing else.
            prompts: JSON file with the prompt of each name of a file.
            out: folder for what VBench writes, and for ``log.txt`` with what it prints.
            dimensions: some of this object's dimensions.

        Returns:
            The score of each dimension.

        Raises:
            VBenchError: VBench is not installed, ends with an error, or leaves no scores.
            OSError: the system refuses to write.
        """
        out.mkdir(parents=True, exist_ok=True)
        results = out / f"{_NAME}_eval_results.json"
        results.unlink(missing_ok=True)
        arguments = {
            "videos_path": str(videos.resolve()),
            "prompt_file": str(prompts.resolve()),
            "output_path": str(out.resolve()),
            "name": _NAME,
            "dimension_list": list(dimensions),
        }
        # Neither the modules of this environment nor the ranks of this run are VBench's.
        environment = {
            k: v for k, v in os.environ.items() if k not in (*_TORCHRUN, "PYTHONPATH", "PYTHONHOME")
        }
        command = [str(self.python.absolute()), "-c", _PROGRAM, json.dumps(arguments)]
        with (out / _LOG).open("wb") as log:
            try:
                process = subprocess.run(
                    command,
                    cwd=out,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            except OSError as error:
                raise VBenchError(
                    f"VBench cannot be started: {shortened(self.python)}: {error.strerror}"
                ) from None
        if process.returncode != 0:
            raise VBenchError(
                f"VBench has failed with status {process.returncode}: {_last_line(out / _LOG)}"
            )
        try:
            return _scores(read_json(results, finite=True), dimensions)
        except ValueError as error:
            raise VBenchError(
                f"VBench has left no scores: {error}; see {shortened(out / _LOG)}"
            ) from None


def _scores(content: Any, dimensions: Sequence[str]) -> dict[str, float]:
    """Return the scores of a results file, ``{dimension: [score, [one for each video]]}``.

    Raises ValueError for another file.
    """
    scores = {}
    for dimension in dimensions:
        found = content.get(dimension) if isinstance(content, Mapping) else None
        score = found[0] if isinstance(found, list) and found else found
        if (
            isinstance(score, bool)
            or not isinstance(score, (int, float))
            or not math.isfinite(score)
        ):
            raise ValueError(f"{dimension} must begin with a number, got {brief(found)}")
        scores[dimension] = float(score)
    return scores


def _last_line(log: Path) -> str:
    """Return the last line that a process has printed, where a Python program names its error."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL))
        text = file.read().decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (
        f"{lines[-1][:300] if lines else 'it printed nothing'} (all it printed is in "
        f"{shortened(log)})"
    )
