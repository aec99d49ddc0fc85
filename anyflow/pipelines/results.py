"""Name the videos of `anyflow sample` in a folder, and keep ``results.json``."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyflow.pipelines.prompts import VideoPrompt
from anyflow.pipelines.step_budgets import StepBudget, budget_numbers, checked_budget
from anyflow.utils.documents import is_no_folder, read_json, shortened
from anyflow.utils.validation import brief
from anyflow.utils.versions import differences, installed_versions
from anyflow.utils.writing import write_text

RESULTS_FILE = "results.json"
_VIDEO = re.compile(r"steps-(\d+(?:\+\d+)*)-seed-(\d+)\.mp4")
_WITHOUT_SEED = re.compile(r"steps-(\d+)\.mp4")  # anyflow 0.1 had one seed for a folder
_OLD_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def folder_name(prompt: VideoPrompt) -> str:
    """Name the folder of a prompt, readable and different for each pair of prompts."""
    slug = re.sub(r"[\W_]+", "-", prompt.text.lower()).strip("-")[:40].strip("-")
    key = prompt.text if prompt.negative is None else f"{prompt.text}\0{prompt.negative}"
    return f"{slug}-{hashlib.sha256(key.encode()).hexdigest()[:8]}".lstrip("-")


def file_name(budget: StepBudget, seed: int) -> str:
    """Name the video of a prompt at a number of steps, or at those of a causal model's chunks."""
    return f"steps-{'+'.join(f'{n:02d}' for n in budget_numbers(budget))}-seed-{seed}.mp4"


def partial_name(budget: StepBudget, seed: int) -> str:
    """Name the file of a video that is being made chunk by chunk."""
    return file_name(budget, seed).replace(".mp4", ".partial.mp4")


def comparison_name(seed: int) -> str:
    """Name the comparison of a prompt's videos of a seed."""
    return f"comparison-seed-{seed}.mp4"


@dataclass
class SampleResults:
    """Hold the settings of a folder and an entry for each video, as ``results.json`` has them.

    Args:
        file: ``results.json``.
        settings: what every video of the folder was made with.
        videos: entries with ``prompt``, ``steps`` (a number, or a list of those of a causal model's
            chunks), ``seed``, ``file`` and more.
    """

    file: Path
    settings: dict[str, Any]
    videos: list[dict[str, Any]]

    @classmethod
    def open(
        cls, out: Path, settings: Mapping[str, Any], defaults: Mapping[str, Any]
    ) -> SampleResults:
        """Begin a folder, or continue one; nothing is written yet.

        Args:
            out: the folder.
            settings: settings of the run.
            defaults: defaults of settings, which stand for those that an older folder does not
                have.

        Raises:
            ValueError: the folder holds videos of other settings, or no results of this command.
        """
        file = out / RESULTS_FILE
        results = cls(file, dict(settings), [])
        if os.path.lexists(file):
            before, results.videos = _read(file)
            before = {**defaults, **before}
            changed = [
                f"{name} {before.get(name)!r} is now {settings.get(name)!r}"
                for name in {**settings, **before}
                if before.get(name) != settings.get(name)
            ]
            if changed:
                raise ValueError(
                    f"{out} holds videos of other settings ({'; '.join(changed)}); name another "
                    "folder"
                )
            _warn_of_versions(out, results.videos)
        elif is_no_folder(out):
            raise ValueError(f"{out} is not a folder")
        return results

    def add(self, entry: dict[str, Any]) -> None:
        """Note a video, in place of an earlier one in the same file."""
        self.videos = [video for video in self.videos if video["file"] != entry["file"]] + [entry]
        self.write()

    def write(self) -> None:
        """Write the file; the folder is made."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        content = {"settings": self.settings, "videos": self.videos}
        write_text(self.file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def there(self, folder: Path) -> dict[tuple[StepBudget, int], Path]:
        """Return the videos in the folder of a prompt, by their numbers of steps and seeds."""
        found: dict[tuple[StepBudget, int], Path] = {}
        for video in self.videos:  # an older folder's, whose names lack the seed
            file = self.file.parent / video["file"]
            if file.parent == folder and _WITHOUT_SEED.fullmatch(file.name) and file.is_file():
                found[video["steps"], video["seed"]] = file
        for file in folder.glob("steps-*.mp4") if folder.is_dir() else ():
            match = _VIDEO.fullmatch(file.name)
            if match is not None and file.is_file():
                steps = [int(number) for number in match[1].split("+")]
                found[steps[0] if len(steps) == 1 else tuple(steps), int(match[2])] = file
        return found


def _read(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read the settings and the videos of a results file, an older one in the form of a new one.

    Raises:
        ValueError: it is none, or is damaged.
    """
    try:
        content = read_json(file, finite=True)
        if not isinstance(content, dict) or set(content) != {"settings", "videos"}:
            raise ValueError("it must be an object with 'settings' and 'videos'")
        settings, videos = content["settings"], content["videos"]
        if not isinstance(settings, dict) or not isinstance(videos, list):
            raise ValueError("'settings' must be an object and 'videos' a list")
        if "seed" in settings:
            seed, dtype = settings.pop("seed"), settings.get("dtype")
            settings["dtype"] = _OLD_DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
            videos = [
                video | {"seed": seed} if isinstance(video, dict) else video for video in videos
            ]
        for number, video in enumerate(videos):
            _check_video(video, number)
    except ValueError as error:
        raise ValueError(f"{shortened(file)} is no results file of this command: {error}") from None
    return settings, videos


def _check_video(video: Any, number: int) -> None:
    if not isinstance(video, dict) or not isinstance(video.get("file"), str):
        raise ValueError(f"video {number} must be an object with the text 'file'")
    for name in ("steps", "seed"):
        value = video.get(name)
        if isinstance(value, list) and name == "steps":
            checked_budget(value)
        elif type(value) is not int:
            raise ValueError(
                f"{name!r} of video {number} must be a whole number, got {brief(value)}"
            )
    if not isinstance(video.get("packages", {}), dict):
        raise ValueError(f"the 'packages' of video {number} must be an object")


def _warn_of_versions(out: Path, videos: Sequence[dict[str, Any]]) -> None:
    """Warn, in one line, that the videos of a folder were made by other versions."""
    here = installed_versions()
    made = [video["packages"] for video in videos if "packages" in video]
    changed = sorted({line for packages in made for line in differences(packages, here)})
    if len(made) < len(videos):
        changed.append("unknown versions")
    if changed:
        warnings.warn(
            f"{out} holds videos made with other versions ({'; '.join(changed)}): new ones may "
            "differ from them; name another folder to compare like with like",
            stacklevel=5,
        )
