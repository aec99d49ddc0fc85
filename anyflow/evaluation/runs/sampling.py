"""Make the missing videos of an evaluation, alone or with other processes."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from anyflow.evaluation.runs.layout import Layout
from anyflow.evaluation.runs.models import VideoMaker
from anyflow.evaluation.runs.plan import EvaluationPlan
from anyflow.evaluation.runs.ranks import POLL_SECONDS, Rank
from anyflow.pipelines.prompts import VideoPrompt
from anyflow.pipelines.video import write_video
from anyflow.utils.progress import LoggedProgress, counted, status
from anyflow.utils.writing import publish, system_error


@dataclass(frozen=True)
class Job:
    """Describe a video that must be there.

    Args:
        model: its name.
        num_inference_steps: network evaluations.
        prompt: prompt of the video.
        sample: index among the videos of the prompt.
        file: file of the video.
    """

    model: str
    num_inference_steps: int
    prompt: VideoPrompt
    sample: int
    file: Path


@dataclass(frozen=True)
class Failed:
    """Describe a video that could not be made."""

    job: Job
    reason: str


def jobs_of(
    plan: EvaluationPlan, layout: Layout, model: str, num_inference_steps: int
) -> list[Job]:
    """List the videos of a model at a number of steps, prompt by prompt."""
    places = [(prompt, sample) for prompt in plan.prompts for sample in range(plan.num_samples)]
    files = layout.videos(model, num_inference_steps)
    return [
        Job(model, num_inference_steps, *place, file)
        for place, file in zip(places, files, strict=True)
    ]


class SampleProgress:
    """Show a bar of all steps of all missing videos, or a line every half minute in a log.

    Args:
        console: gets the bar; None for no bar.
        total: network evaluations of this process.
    """

    def __init__(self, console: Console | None, total: float) -> None:
        self._console, self._task = console, TaskID(0)
        self._bars: LoggedProgress | None = None
        self._total = total

    def __enter__(self) -> SampleProgress:
        if self._console is not None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}", markup=False),
            )
            hidden = not self._console.is_terminal
            self._bars = LoggedProgress(
                *columns, console=self._console, transient=True, disable=hidden
            )
            self._bars.start()
            self._task = self._bars.add_task("sampling", total=self._total, note="")
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def advance(self) -> None:
        """Move the bar by a network evaluation."""
        if self._bars is not None:
            self._bars.update(self._task, advance=1.0)

    def say(self, note: str) -> None:
        """Show what is being made."""
        if self._bars is not None:
            self._bars.update(self._task, note=note)


class SampleMaker:
    """Make videos of one model, whose weights are loaded for the first missing one.

    Args:
        plan: plan of the evaluation.
        layout: layout of the evaluation's folder.
        rank: rank of this process.
        model: its name.
        console: gets notes on the work; None for none.
        progress: bar of all the videos.
    """

    def __init__(
        self,
        plan: EvaluationPlan,
        layout: Layout,
        rank: Rank,
        model: str,
        console: Console | None,
        progress: SampleProgress,
    ) -> None:
        self._plan, self._layout, self._rank, self._model = plan, layout, rank, model
        self._console, self._progress = console, progress
        self._maker: VideoMaker | None = None
        self._failed: dict[Path, Failed] = {}

    @property
    def failed(self) -> list[Failed]:
        """Return the videos that this process could not make and that nobody else has made."""
        return [failed for file, failed in self._failed.items() if not file.is_file()]

    def make(self, num_inference_steps: int, *, wait: bool) -> bool:
        """Make what is missing of a number of steps and nobody else is making.

        Args:
            num_inference_steps: network evaluations.
            wait: wait for videos that other processes are making, and make those that they do not
                finish.

        Returns:
            True if all of it is there now.

        Raises:
            OSError: the system refuses to write.
        """
        jobs = jobs_of(self._plan, self._layout, self._model, num_inference_steps)
        rank, world = self._rank.rank, self._rank.world_size
        # this process's own share comes first
        order = [job for share in range(world) for job in jobs[(rank + share) % world :: world]]
        while missing := [
            job for job in order if not job.file.is_file() and job.file not in self._failed
        ]:
            attempts = [self._attempt(job) for job in missing]
            if not wait:
                break
            if not any(attempts):
                time.sleep(POLL_SECONDS)
        return all(job.file.is_file() for job in jobs)

    def _attempt(self, job: Job) -> bool:
        """Make a video unless another process does; tell whether anything came of it."""
        if job.file.is_file():
            return True
        claim = self._layout.work(f"claims/{job.model}/{job.num_inference_steps}/{job.file.name}")
        with self._rank.claim(claim) as mine:
            if not mine:
                return False
            if not job.file.is_file():
                self._make(job)
        return True

    def _make(self, job: Job) -> None:
        maker = self._loaded()
        samples = (
            f", sample {job.sample + 1} of {self._plan.num_samples}"
            if self._plan.num_samples > 1
            else ""
        )
        self._progress.say(
            f"{job.model}, {counted(job.num_inference_steps, 'step')}: "
            f"{job.prompt.text[:40]}{samples}"
        )
        seed = self._plan.noise_seed(job.prompt.text, job.sample)
        partial = self._layout.work(f"rank-{self._rank.rank}") / "video.mp4"
        try:
            frames = maker.frames(
                job.prompt,
                job.num_inference_steps,
                seed,
                lambda index, time, latents: self._progress.advance(),
            )
            write_video(frames, partial, self._plan.models[job.model].video.fps)
            job.file.parent.mkdir(parents=True, exist_ok=True)
            publish(partial, job.file)
        except (RuntimeError, ValueError, FloatingPointError, MemoryError) as error:
            found = system_error(error)
            reason = maker.reason(error)
            if found is not None and not isinstance(error, (RuntimeError, MemoryError)):
                raise
            self._failed[job.file] = Failed(job, reason)

    def _loaded(self) -> VideoMaker:
        if self._maker is None:
            model, prompts = self._plan.models[self._model], self._plan.prompts
            with status(
                self._console, f"loading {model.path}, encoding {counted(len(prompts), 'prompt')}"
            ):
                self._maker = model.load(prompts)
        return self._maker


def missing_jobs(plan: EvaluationPlan, layout: Layout) -> list[Job]:
    """List the videos of all models that are missing."""
    every = (
        jobs_of(plan, layout, model, num_inference_steps)
        for model in plan.models
        for num_inference_steps in plan.sets
    )
    return [job for jobs in every for job in jobs if not job.file.is_file()]


def remove_work(layout: Layout, rank: Rank) -> None:
    """Remove the unfinished files of this process.

    The main process, which makes the last video, removes those of all processes, killed ones too.
    """
    shutil.rmtree(
        layout.work("") if rank.is_main else layout.work(f"rank-{rank.rank}"), ignore_errors=True
    )
