"""`anyflow sample`: prompts at several step counts from one noise, as MP4 files and comparisons of them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import resource
import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anyflow.checkpoints.lora_file import open_lora
from anyflow.documents import read_json, read_text, shortened, text_problem
from anyflow.locking import locks_folder
from anyflow.pipelines.frames import frames_of_type
from anyflow.pipelines.loading import ModelPaths, resolve_device
from anyflow.pipelines.memory import Memory, check_options
from anyflow.pipelines.pipeline import AnyFlowPipeline
from anyflow.pipelines.request import MAX_SEED, VideoRequest
from anyflow.pipelines.video import import_av, write_comparison, write_video
from anyflow.validation import brief, finite_number, whole_number
from anyflow.versions import differences, installed_versions
from anyflow.writing import write_text

if TYPE_CHECKING:
    from rich.console import Console

RESULTS_FILE = "results.json"
COMPARISON_FILE = "comparison.mp4"
MAX_PROMPT = 2**17  # characters; a text encoder takes 512 tokens
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class SampleSettings:
    """What decides the videos beside prompts and step counts.

    Args:
        model: diffusers folder, or the name of a model on the Hugging Face Hub.
        transformer: folder with another ``transformer`` and its ``scheduler``, or None.
        lora: file or folder of a LoRA, or None.
        height, width: in pixels.
        num_frames: 4k + 1.
        seed: of the noise, the same for each prompt and step count.
        guidance_scale: 1 for none.
        negative_prompt: needed for guidance.
        fps: frames per second.
        dtype: of the transformer and the text encoder.
    """

    model: str
    transformer: str | None = None
    lora: str | None = None
    height: int = 480
    width: int = 832
    num_frames: int = 81
    seed: int = 0
    guidance_scale: float = 1.0
    negative_prompt: str | None = None
    fps: float = 16
    dtype: str = "bf16"

    def check(self) -> None:
        """ValueError if the model is missing or cannot make such videos; no weight is loaded."""
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if not 0.01 <= finite_number("fps", self.fps) < 1000:
            raise ValueError(f"fps must be >= 0.01 and < 1000, got {self.fps}")
        whole_number("seed", self.seed, 0, MAX_SEED)
        if self.lora is not None:
            open_lora(self.lora)
        _check_prompt(self.negative_prompt or "", "negative_prompt")
        VideoRequest(
            height=self.height,
            width=self.width,
            num_frames=self.num_frames,
            guidance_scale=self.guidance_scale,
            negatives=None if self.negative_prompt is None else 1,
        ).check(ModelPaths.find(self.model, self.transformer).layout())


@dataclass(frozen=True)
class Failure:
    """A video that was not made; ``steps`` is None for a comparison."""

    prompt: str
    steps: int | None
    reason: str


@dataclass(frozen=True)
class SampleReport:
    """What a run did.

    Args:
        done: videos made.
        skipped: videos that were there.
        failed: videos that could not be made.
    """

    done: int
    skipped: int
    failed: tuple[Failure, ...]


def read_prompts(path: Path) -> list[str]:
    """Read the lines of a text file that are not empty.

    Raises:
        ValueError: it is not a regular file in UTF-8, has none, or has a line that can be no prompt, which is named.
    """
    try:
        text = read_text(path)
    except ValueError as error:
        raise ValueError(f"prompts: {shortened(path)} cannot be read: {error}") from None
    prompts = []
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if line.strip():
            _check_prompt(line.strip(), f"prompts: {shortened(path)}, line {number}: the prompt")
            prompts.append(line.strip())
    if not prompts:
        raise ValueError(f"prompts: {shortened(path)} has no prompts, one on each line")
    return prompts


def _check_prompt(prompt: str, what: str) -> None:
    problem = text_problem(prompt, max_characters=MAX_PROMPT)
    if problem is not None:
        raise ValueError(f"{what} {problem}")


def parse_steps(text: str) -> tuple[int, ...]:
    """``"1,2,4"`` in ascending order; ValueError for anything else."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and len(word) < 10 and int(word) >= 1 for word in words):
        raise ValueError(f"steps must be whole numbers >= 1 with commas between them, as 1,2,4, got {brief(text)}")
    return tuple(sorted({int(word) for word in words}))


@locks_folder("out")
def sample_command(
    settings: SampleSettings,
    prompts: Sequence[str],
    steps: Sequence[int],
    out: Path,
    *,
    memory: Memory = "auto",
    device: str | None = None,
    compile: bool = False,
    cuda_graph: bool = False,
    console: Console | None = None,
) -> SampleReport:
    """Make every prompt at every step count from the same noise, and a comparison of them for each prompt.

    Writes ``<prompt>/steps-04.mp4``, ``<prompt>/comparison.mp4`` (of all the step counts that are there) and
    ``results.json`` with seconds by stage and peak memory. Videos that are there are left alone, so that the same
    command goes on where it was stopped; one that fails does not stop the others.

    Args:
        settings: what to make.
        prompts: each is made once, however often it is given.
        steps: network evaluations of each video.
        out: folder; one that was made with other settings is refused.
        memory, device, compile, cuda_graph: of :meth:`AnyFlowPipeline.from_pretrained`.
        console: gets a line for each video and a progress bar.

    Raises:
        ValueError: before any weight is loaded, for what cannot work or a folder in use; then for weights that do not
            fit.
        OSError: the system refuses to write into the folder, such as on a full disk.
        ImportError: PyAV is missing.
    """
    import_av()  # missing, it would cost a video to find out

    settings.check()
    check_options(memory, resolve_device(device), compile=compile, cuda_graph=cuda_graph)
    for count in steps:
        VideoRequest(num_inference_steps=count)
    for prompt in prompts:
        _check_prompt(prompt, f"the prompt {shortened(prompt)!r}")
    folders = {prompt: out / _folder_name(prompt) for prompt in prompts}
    if not folders or not steps:
        raise ValueError("there are no prompts or no step counts")
    results = _Results.open(out, settings)
    todo = {
        prompt: [count for count in steps if not (folder / _file_name(count)).is_file()]
        for prompt, folder in folders.items()
    }
    missing = [prompt for prompt, counts in todo.items() if counts]
    failed: list[Failure] = []
    if missing:
        with _status(console, f"loading {settings.model}, encoding {len(missing)} prompts"):
            pipe = AnyFlowPipeline.from_pretrained(
                settings.model,
                dtype=DTYPES[settings.dtype],
                device=device,
                memory=memory,
                transformer=settings.transformer,
                compile=compile,
                cuda_graph=cuda_graph,
            )
            renderer = _Renderer(pipe, settings, missing, results, console)
        for prompt in missing:
            failed += [
                f for count in todo[prompt] if (f := renderer.render(prompt, count, folders[prompt])) is not None
            ]
    failed += [f for prompt, folder in folders.items() if (f := _compare(prompt, folder)) is not None]
    total = len(folders) * len(steps)
    made = sum(map(len, todo.values())) - sum(f.steps is not None for f in failed)
    return SampleReport(made, total - sum(map(len, todo.values())), tuple(failed))


class _Renderer:
    """A pipeline with its prompts encoded ahead, so that the text encoder is gone when sampling starts."""

    def __init__(
        self,
        pipe: AnyFlowPipeline,
        settings: SampleSettings,
        prompts: list[str],
        results: _Results,
        console: Console | None,
    ) -> None:
        self.pipe, self.settings, self.results, self.console = pipe, settings, results, console
        self.seconds: dict[str, float] = {}
        with pipe.timed("encode", self.seconds):
            negative = settings.negative_prompt
            negatives = [] if settings.guidance_scale == 1 or negative is None else [negative]
            encoded = pipe.encode_prompts([*prompts, *negatives])
        self.negative = encoded.pop() if negatives else None
        self.embeds: dict[str, Tensor] = dict(zip(prompts, encoded, strict=True))
        if settings.lora is not None:
            pipe.load_lora(settings.lora)

    def render(self, prompt: str, steps: int, folder: Path) -> Failure | None:
        """Make and write one video and its line of the results."""
        try:
            with _status(self.console, f"{prompt[:60]}: {steps} steps"):
                entry = self._render(prompt, steps, folder)
        except (
            RuntimeError,
            ValueError,
            OSError,
            FloatingPointError,
        ) as error:  # of memory, disk, NaN: the next may work
            if self.pipe.device.type == "cuda":
                torch.cuda.empty_cache()
            return Failure(prompt, steps, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
        self.results.add(entry)
        if self.console is not None:
            self.console.print(
                f"{entry['file']}: {entry['seconds']['sample']:.1f} s to sample, {entry['seconds']['decode']:.1f} s to "
                f"decode, {entry['peak_memory_bytes'] / 2**30:.1f} GiB",
                markup=False,
            )
        return None

    def _render(self, prompt: str, steps: int, folder: Path) -> dict[str, Any]:
        pipe, settings = self.pipe, self.settings
        folder.mkdir(parents=True, exist_ok=True)
        (folder / COMPARISON_FILE).unlink(missing_ok=True)  # it will lack this video
        if pipe.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pipe.device)
        output = pipe(
            prompt_embeds=self.embeds[prompt],
            negative_prompt_embeds=self.negative,
            height=settings.height,
            width=settings.width,
            num_frames=settings.num_frames,
            num_inference_steps=steps,
            guidance_scale=settings.guidance_scale,
            seed=settings.seed,
            output_type="latent",
            progress=False,
        )
        seconds = {"encode": self.seconds["encode"] / len(self.embeds), "sample": output.seconds["sample"]}
        assert isinstance(output.frames, Tensor)
        with pipe.timed("decode", seconds):
            (images,) = frames_of_type(pipe.decode(output.frames), "pil")
        file = write_video(images, folder / _file_name(steps), settings.fps)
        return {
            "prompt": prompt,
            "steps": steps,
            "file": f"{folder.name}/{file.name}",
            "seconds": seconds,
            "peak_memory_bytes": _peak_memory(pipe.device),
            "device": torch.cuda.get_device_name(pipe.device) if pipe.device.type == "cuda" else pipe.device.type,
            "memory": pipe.memory,
            "packages": installed_versions(),
        }


@dataclass
class _Results:
    """``results.json``: the settings of a folder and an entry for each video."""

    file: Path
    settings: dict[str, Any]
    videos: list[dict[str, Any]]

    @classmethod
    def open(cls, out: Path, settings: SampleSettings) -> _Results:
        file = out / RESULTS_FILE
        results = cls(file, asdict(settings), [])
        if os.path.lexists(file):
            before, results.videos = _read_results(file)
            names = {**results.settings, **before}
            changed = [
                f"{name} {before.get(name)!r} is now {results.settings.get(name)!r}"
                for name in names
                if before.get(name) != results.settings.get(name)
            ]
            if changed:
                raise ValueError(f"{out} holds videos of other settings ({'; '.join(changed)}); name another folder")
            _warn_of_versions(out, results.videos)
        elif out.exists() and not out.is_dir():
            raise ValueError(f"{out} is not a folder")
        results._write()
        return results

    def add(self, entry: dict[str, Any]) -> None:
        self.videos = [v for v in self.videos if v["file"] != entry["file"]] + [entry]
        self._write()

    def _write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        content = {"settings": self.settings, "videos": self.videos}
        write_text(self.file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _read_results(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read the settings and the videos of a results file.

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
        for number, video in enumerate(videos):
            if not isinstance(video, dict) or not isinstance(video.get("file"), str):
                raise ValueError(f"video {number} must be an object with the text 'file'")
            if not isinstance(video.get("packages", {}), dict):
                raise ValueError(f"the 'packages' of video {number} must be an object")
    except ValueError as error:
        raise ValueError(f"{file} is no results file of this command: {error}") from None
    return settings, videos


def _warn_of_versions(out: Path, videos: Sequence[dict[str, Any]]) -> None:
    """Warn, in one line, that videos in a folder were made by other versions than new ones would be."""
    here = installed_versions()
    made = [video["packages"] for video in videos if "packages" in video]
    changed = sorted({line for packages in made for line in differences(packages, here)})
    if len(made) < len(videos):
        changed.append("unknown versions")
    if changed:
        warnings.warn(
            f"{out} holds videos made with other versions ({'; '.join(changed)}): new ones may differ from them; "
            "name another folder to compare like with like",
            stacklevel=4,
        )


def _status(console: Console | None, text: str) -> AbstractContextManager[Any]:
    """Shown while something runs."""
    from rich.markup import escape

    return nullcontext() if console is None else console.status(escape(text))


def _compare(prompt: str, folder: Path) -> Failure | None:
    """Write the comparison of all step counts in a folder, unless it is there or there is nothing to compare."""
    named = {path: re.fullmatch(r"steps-(\d+)\.mp4", path.name) for path in sorted(folder.glob("steps-*.mp4"))}
    videos = {int(match[1]): path for path, match in named.items() if match is not None and path.is_file()}
    if len(videos) < 2 or (folder / COMPARISON_FILE).is_file():
        return None
    labeled = {f"{steps} step{'s' if steps > 1 else ''}": videos[steps] for steps in sorted(videos)}
    try:
        write_comparison(labeled, folder / COMPARISON_FILE)
    except (ValueError, OSError) as error:
        return Failure(prompt, None, f"comparison: {error}")
    return None


def _folder_name(prompt: str) -> str:
    """Readable, and different for different prompts."""
    slug = re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    return f"{slug}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}".lstrip("-")


def _file_name(steps: int) -> str:
    return f"steps-{steps:02d}.mp4"


def _peak_memory(device: torch.device) -> int:
    """Bytes: of this video on a GPU; of the process so far on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
