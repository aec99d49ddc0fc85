"""Make the videos of `anyflow sample`: prompts at several step counts from one noise."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anyflow.pipelines.memory import Memory, check_options
from anyflow.pipelines.prompts import VideoPrompt
from anyflow.pipelines.renderer import Renderer
from anyflow.pipelines.request import MAX_SEED
from anyflow.pipelines.results import (
    SampleResults,
    comparison_name,
    file_name,
    folder_name,
    partial_name,
)
from anyflow.pipelines.sample_settings import SampleSettings
from anyflow.pipelines.step_budgets import (
    StepBudget,
    budget_label,
    budget_numbers,
    checked_budget,
)
from anyflow.pipelines.video import import_av, write_comparison, write_video
from anyflow.pipelines.video_writer import VideoWriter
from anyflow.utils.devices import resolve_device
from anyflow.utils.documents import shortened
from anyflow.utils.locking import locks_folder
from anyflow.utils.progress import LoggedProgress, counted, status
from anyflow.utils.validation import brief, whole_number
from anyflow.utils.versions import installed_versions

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Failure:
    """Describe a video that was not made; a comparison has no ``num_inference_steps``."""

    prompt: str
    num_inference_steps: StepBudget | None
    seed: int
    reason: str


@dataclass(frozen=True)
class SampleReport:
    """Report what a run did.

    Args:
        done: videos made.
        skipped: videos that were in the folder.
        failed: videos that could not be made.
    """

    done: int
    skipped: int
    failed: tuple[Failure, ...]


def parse_numbers(name: str, text: str, low: int = 1) -> tuple[int, ...]:
    """Parse whole numbers such as ``"1,2,4"``, in ascending order, or raise a ValueError."""
    words = [word.strip() for word in text.split(",")]
    if not all(
        word.isascii() and word.isdecimal() and len(word) < 20 and int(word) >= low
        for word in words
    ):
        raise ValueError(
            f"{name} must be whole numbers >= {low} with commas between them, as 1,2,4, got "
            f"{brief(text)}"
        )
    return tuple(sorted({int(word) for word in words}))


@locks_folder("out")
def sample_command(
    settings: SampleSettings,
    prompts: Sequence[VideoPrompt | str],
    step_counts: Sequence[StepBudget],
    out: Path,
    *,
    seeds: Sequence[int] = (0,),
    first_frames: Any = None,
    memory: Memory = "auto",
    device: str | None = None,
    compile: bool = False,
    cuda_graph: bool = False,
    stream: bool = False,
    cache_device: str | None = None,
    console: Console | None = None,
) -> SampleReport:
    """Make every prompt at every step count from the same noise, and compare the step counts.

    A run writes ``<prompt>/steps-04-seed-0.mp4``, ``<prompt>/comparison-seed-0.mp4`` of all step
    counts in the folder, and ``results.json`` with seconds by stage and peak memory. Videos in the
    folder are not made again, so that the same command continues a run that was stopped; one that
    fails does not stop the others.

    Args:
        settings: what the videos have in common.
        prompts: each is made once, however often it is given.
        step_counts: network evaluations of each video; those of each chunk of a causal model, as
            one number or one for each chunk that is sampled, the last one for all later chunks.
        out: folder; one that was made with other settings is refused.
        seeds: seeds of the noise, which is the same for each prompt and step count.
        first_frames: first frames of every video, as ``video`` of :meth:`AnyFlowPipeline.__call__`;
            the settings name their file and number.
        memory, device, compile, cuda_graph: of :meth:`AnyFlowPipeline.from_pretrained`.
        stream: write a causal model's video while it is made: ``steps-04-seed-0.partial.mp4`` can
            be played after each chunk, and is renamed when it is whole.
        cache_device: device that a causal model's keys and values of earlier chunks wait on.
        console: gets a bar of the steps, the path of each file that was written, and a line for
            each chunk of a stream.

    Raises:
        ValueError: before any weight is loaded, for what cannot work or a folder in use; then for
            weights that do not fit.
        OSError: the system refuses to write into the folder, such as on a full disk.
        ImportError: PyAV is missing.
    """
    import_av()  # missing, it would cost a video to find out

    settings.check(stream=stream, cache_device=cache_device, cuda_graph=cuda_graph)
    check_options(memory, resolve_device(device), compile=compile, cuda_graph=cuda_graph)
    if settings.first_frames != (0 if first_frames is None else len(first_frames)):
        raise ValueError(
            f"the settings name {settings.first_frames} first frames, and first_frames has others"
        )
    texts, budgets = _checked(prompts, step_counts, seeds)
    settings.check_steps(budgets)
    folders = {text: out / folder_name(text) for text in texts}
    defaults = SampleSettings(settings.model).as_dict()
    results = SampleResults.open(out, settings.as_dict(), defaults)
    results.write()
    if console is not None:
        for hint in settings.hints(texts):
            console.print(f"note: {hint}", markup=False)
    wanted = [(text, seed, budget) for text in folders for seed in seeds for budget in budgets]
    there = {text: results.there(folder) for text, folder in folders.items()}
    todo = [wish for wish in wanted if (wish[2], wish[1]) not in there[wish[0]]]
    failed: list[Failure] = []
    if todo:
        missing = list(dict.fromkeys(text for text, _, _ in todo))
        doing = f"loading {settings.model}, encoding {counted(len(missing), 'prompt')}"
        with status(console, doing):
            renderer = Renderer(
                settings,
                missing,
                first_frames,
                memory=memory,
                device=device,
                compile=compile,
                cuda_graph=cuda_graph,
                cache_device=cache_device,
            )
        failed += _Videos(renderer, results, console, stream=stream).make(todo, folders)
    made = len(todo) - len(failed)
    for text, folder in folders.items():
        for seed in seeds:
            if (failure := _compare(text, seed, folder, results, console)) is not None:
                failed.append(failure)
    return SampleReport(made, len(wanted) - len(todo), tuple(failed))


def _checked(
    prompts: Sequence[VideoPrompt | str], step_counts: Sequence[StepBudget], seeds: Sequence[int]
) -> tuple[list[VideoPrompt], list[StepBudget]]:
    """Return the prompts and the steps, or raise a ValueError for what a run cannot make."""
    budgets = list(dict.fromkeys(checked_budget(steps) for steps in step_counts))
    for seed in seeds:
        whole_number("seed", seed, 0, MAX_SEED)
    texts = [VideoPrompt(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    for text in texts:
        text.check(f"{shortened(text.text)!r}: ")
    for name, given in (("prompts", texts), ("step counts", step_counts), ("seeds", seeds)):
        if not given:
            raise ValueError(f"no {name} are given")
    return texts, budgets


class _Videos:
    """Make videos, write them and note them in the results."""

    def __init__(
        self, renderer: Renderer, results: SampleResults, console: Console | None, *, stream: bool
    ) -> None:
        self.renderer, self.results, self.console = renderer, results, console
        self.stream, self.place = stream, ""

    def make(
        self,
        todo: Sequence[tuple[VideoPrompt, int, StepBudget]],
        folders: Mapping[VideoPrompt, Path],
    ) -> list[Failure]:
        """Make the videos of prompts, seeds and numbers of steps; return those that failed."""
        failed = []
        for number, (text, seed, budget) in enumerate(todo, start=1):
            self.place = f"video {number} of {len(todo)}" if len(todo) > 1 else "sampling"
            if (failure := self.render(text, budget, seed, folders[text])) is not None:
                failed.append(failure)
        return failed

    def render(
        self, prompt: VideoPrompt, budget: StepBudget, seed: int, folder: Path
    ) -> Failure | None:
        """Make and write one video and its line of the results."""
        label = f"{self.place}: {prompt.text[:40]}, {budget_label(budget)}, seed {seed}"
        try:
            with _steps_bar(self.console, label, self.renderer.num_evaluations(budget)) as bar:
                entry = self._render(prompt, budget, seed, folder, bar)
        # memory, disk, NaN: the next video may work
        except (RuntimeError, ValueError, OSError, FloatingPointError) as error:
            return Failure(prompt.text, budget, seed, self.renderer.reason(error))
        self.results.add(entry)
        if self.console is not None:
            seconds = entry["seconds"]
            self.console.print(
                f"{folder.parent / entry['file']}: {seconds['sample']:.1f} s to sample, "
                f"{seconds['decode']:.1f} s to decode, "
                f"{entry['peak_memory_bytes'] / 2**30:.1f} GiB",
                markup=False,
            )
        return None

    def _render(
        self,
        prompt: VideoPrompt,
        budget: StepBudget,
        seed: int,
        folder: Path,
        bar: _StepsBar | None,
    ) -> dict[str, Any]:
        """Make and write one video, and return its entry of the results."""
        pipe = self.renderer.pipe
        folder.mkdir(parents=True, exist_ok=True)
        (folder / comparison_name(seed)).unlink(missing_ok=True)  # it will lack this video
        file = folder / file_name(budget, seed)
        make = self._stream if self.stream else self._whole
        return {
            "prompt": prompt.text,
            "negative_prompt": self.renderer.negative(prompt),
            "steps": budget if isinstance(budget, int) else list(budget),
            "seed": seed,
            "file": f"{folder.name}/{file.name}",
            **make(prompt, budget, seed, file, bar),
            "peak_memory_bytes": _peak_memory(pipe.device),
            "device": torch.cuda.get_device_name(pipe.device)
            if pipe.device.type == "cuda"
            else pipe.device.type,
            "memory": pipe.memory,
            "packages": installed_versions(),
        }

    def _whole(
        self, prompt: VideoPrompt, budget: StepBudget, seed: int, file: Path, bar: _StepsBar | None
    ) -> dict[str, Any]:
        """Write a video when all of it is made, and return the seconds of each stage."""
        if bar is None:
            images, seconds = self.renderer.frames(prompt, budget, seed)
        else:
            images, seconds = self.renderer.frames(
                prompt, budget, seed, bar.advance, lambda: bar.say("decoding")
            )
        write_video(images, file, self.renderer.settings.fps)
        return {"seconds": seconds}

    def _stream(
        self, prompt: VideoPrompt, budget: StepBudget, seed: int, file: Path, bar: _StepsBar | None
    ) -> dict[str, Any]:
        """Write a video chunk by chunk, and return the seconds until each chunk could be played."""
        partial = file.with_name(partial_name(budget, seed))
        advance = None if bar is None else bar.advance
        spent = {"encode": self.renderer.encode_seconds, "sample": 0.0, "decode": 0.0}
        chunks, start = [], time.perf_counter()
        try:
            with VideoWriter(partial, self.renderer.settings.fps) as writer:
                for part in self.renderer.stream(prompt, budget, seed, advance):
                    (images,) = part.frames
                    writer.write(images)
                    seconds = time.perf_counter() - start
                    chunks.append({"frames": len(images), "seconds": seconds})
                    for stage in ("sample", "decode"):
                        spent[stage] += part.seconds.get(stage, 0.0)
                    self._say(partial, part.chunk, chunks)
        except Exception:
            partial.unlink(missing_ok=True)
            raise
        os.replace(partial, file)
        return {"seconds": spent, "chunks": chunks}

    def _say(self, partial: Path, chunk: int, chunks: Sequence[Mapping[str, Any]]) -> None:
        """Print the number of frames that can be played, and after how many seconds."""
        if self.console is not None:
            self.console.print(
                f"{partial}: chunk {chunk}, {sum(c['frames'] for c in chunks)} of "
                f"{self.renderer.settings.num_frames} frames after {chunks[-1]['seconds']:.1f} s",
                markup=False,
            )


class _StepsBar:
    """Show a bar of the steps of a video; without a terminal a line every half minute."""

    def __init__(self, bars: LoggedProgress, label: str, num_inference_steps: int) -> None:
        from rich.markup import escape

        self._bars, self._label = bars, escape(label)
        self._task = bars.add_task(self._label, total=num_inference_steps)

    def advance(self, index: int, timestep: float, latents: Tensor) -> None:
        """Move the bar; a callback of the sampler."""
        self._bars.update(self._task, advance=1)

    def say(self, stage: str) -> None:
        """Name what is done after the last step."""
        self._bars.update(self._task, description=f"{self._label}, {stage}")


@contextmanager
def _steps_bar(
    console: Console | None, label: str, num_inference_steps: int
) -> Iterator[_StepsBar | None]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    if console is None:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
               TimeElapsedColumn(), TimeRemainingColumn())  # fmt: skip
    with LoggedProgress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bars:
        yield _StepsBar(bars, label, num_inference_steps)


def _compare(
    prompt: VideoPrompt, seed: int, folder: Path, results: SampleResults, console: Console | None
) -> Failure | None:
    """Write the comparison of a seed's step counts, unless it exists or has a single video."""
    videos = {
        steps: file for (steps, of_seed), file in results.there(folder).items() if of_seed == seed
    }
    comparison = folder / comparison_name(seed)
    if len(videos) < 2 or comparison.is_file():
        return None
    try:
        write_comparison(
            {budget_label(steps): videos[steps] for steps in sorted(videos, key=budget_numbers)},
            comparison,
        )
    except (ValueError, OSError) as error:
        return Failure(prompt.text, None, seed, f"comparison: {error}")
    if console is not None:
        console.print(f"{comparison}: {len(videos)} step counts side by side", markup=False)
    return None


def _peak_memory(device: torch.device) -> int:
    """Return bytes: of this video on a GPU; of the process so far on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
