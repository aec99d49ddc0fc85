"""Name the files of an evaluation: VBench's layout of videos, and what stands beside it."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from anyflow.evaluation.runs.record import RECORD_FILE
from anyflow.pipelines.prompts import VideoPrompt
from anyflow.pipelines.results import folder_name
from anyflow.utils.documents import shortened
from anyflow.utils.writing import write_text

REPORT_FILE = "report.html"
PROMPTS_FILE = "prompts.json"
_SAMPLES, _VBENCH, _WORK = "samples", "vbench", ".work"
_MAX_STEM = 200  # bytes: file systems take 255, and programs write "{name}.tmp" beside a file
_MODEL_NAME = re.compile(r"[\w][\w .+@-]{0,99}")


@dataclass(frozen=True)
class Layout:
    """Name the paths of an evaluation in its folder.

    Args:
        folder: folder of the evaluation.
        stems: beginning of the names of videos, by prompt.
        num_samples: videos of a prompt.
    """

    folder: Path
    stems: Mapping[str, str]
    num_samples: int

    @classmethod
    def of(cls, folder: Path, prompts: Sequence[str], num_samples: int) -> Layout:
        """Name the videos of prompts; see :func:`video_stems`."""
        return cls(folder, video_stems(prompts), num_samples)

    @property
    def record(self) -> Path:
        """Return the path of ``evaluation.json``."""
        return self.folder / RECORD_FILE

    @property
    def report(self) -> Path:
        """Return the path of ``report.html``."""
        return self.folder / REPORT_FILE

    @property
    def prompts(self) -> Path:
        """Return the path of ``prompts.json``, the prompt of each name of a video."""
        return self.folder / PROMPTS_FILE

    def videos(self, model: str, num_inference_steps: int) -> list[Path]:
        """List the files of a model's videos at a number of steps, prompt by prompt."""
        folder = self.samples(model, num_inference_steps)
        return [folder / name for name in self.names()]

    def names(self) -> list[str]:
        """List the names of the videos of any model, prompt by prompt."""
        return [
            f"{stem}-{index}.mp4"
            for stem in self.stems.values()
            for index in range(self.num_samples)
        ]

    def samples(self, model: str, num_inference_steps: int) -> Path:
        """Return the folder of a model's videos at a number of steps, and of nothing else."""
        return self.folder / _SAMPLES / model / str(num_inference_steps)

    def vbench(self, model: str, num_inference_steps: int) -> Path:
        """Return the folder of what VBench leaves."""
        return self.folder / _VBENCH / model / str(num_inference_steps)

    def work(self, name: str) -> Path:
        """Return a path below the hidden folder of what is not finished."""
        return self.folder / _WORK / name

    def write_prompts(self) -> None:
        """Write ``prompts.json``, which gives the prompt of each file name.

        VBench takes the file as ``--prompt_file``.
        """
        texts = [text for text in self.stems for _ in range(self.num_samples)]
        content = dict(zip(self.names(), texts, strict=True))
        write_text(self.prompts, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def video_stems(prompts: Sequence[str]) -> dict[str, str]:
    """Return what the name of a video begins with, by prompt.

    The beginning is the prompt itself wherever a file can have it as its name. Another prompt (with
    a slash or a control character, too long, or told from another by its case or by the form of its
    accents alone) begins with words of it and a hash; ``prompts.json`` says which prompt that is.

    Args:
        prompts: each once.
    """
    stems: dict[str, str] = {}
    taken: set[str] = set()
    for prompt in prompts:
        stem = (
            prompt
            if _is_file_name(prompt) and _folded(prompt) not in taken
            else folder_name(VideoPrompt(prompt))
        )
        taken.add(_folded(stem))
        stems[prompt] = stem
    if len(taken) < len(stems):
        raise ValueError("two prompts give their videos the same names; leave one of them out")
    return stems


def check_model_name(name: str) -> str:
    """Return the name of a model, which is the name of a folder.

    Raises:
        ValueError: a folder cannot have it, or should not.
    """
    if not _MODEL_NAME.fullmatch(name) or name != name.strip() or len(name.encode()) > _MAX_STEM:
        raise ValueError(
            f"{shortened(name)!r} cannot be the name of a model; give another one before its path, "
            "as "
            "--model student=path: letters, digits, spaces and . + @ - _, at most 100, a letter or "
            "digit first"
        )
    return name


def _is_file_name(prompt: str) -> bool:
    try:
        size = len(os.fsencode(prompt))
    except UnicodeEncodeError:
        return False
    return (
        size <= _MAX_STEM
        and prompt.isprintable()
        and not set(prompt) & set("/\\")
        and not prompt.startswith(".")
    )


def _folded(stem: str) -> str:
    """Fold what some file systems take for the same name."""
    return unicodedata.normalize("NFC", stem.casefold())
