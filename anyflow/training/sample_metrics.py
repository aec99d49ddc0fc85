"""Measure videos of the averaged student during training, from fixed prompts and noise."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from torch import Tensor

from anyflow.data import VideoDataset
from anyflow.training.averaged_sampling import AveragedSampler, require_sampled
from anyflow.training.decoding import Decoder
from anyflow.training.distributed import Mesh, gather
from anyflow.training.draws import SampleDraws
from anyflow.training.limits import MAX_TIMESTEPS
from anyflow.training.measures import Measures, Video
from anyflow.training.prompts import Prompt, spread_samples
from anyflow.training.updates import StageUpdates
from anyflow.utils.validation import require_text, require_whole

if TYPE_CHECKING:
    from anyflow.training.config import Recipe

PREFIX = "metrics/"
REAL = "real"  # the data's own videos, in place of a number of steps


@dataclass(frozen=True)
class _Cell:
    """Hold what was measured of one video.

    Args:
        place: place of the prompt among all.
        steps: number of sampling steps, or ``REAL``.
        values: numbers by metric.
        features: vectors, by metric of a whole set.
    """

    place: int
    steps: str
    values: Mapping[str, float]
    features: Mapping[str, Tensor]


@dataclass(frozen=True)
class MetricsConfig:
    """Say when and on what videos sampled from the average are measured during training.

    Prompts and noise are always the same.

    Args:
        every: steps between evaluations; the last step has one, too. 0 turns them off.
        step_counts: numbers of sampling steps, one curve of each metric each.
        num_samples: prompts of the data, a video each; not used with ``prompts``.
        prompts: texts in place of the data's; they need ``preview.model``.
        reference_steps: sampling steps of the video of the same model that the others are compared
            with (PSNR, LPIPS); 0 leaves the comparison out.
        models: folder of the networks of CLIP similarity, LPIPS and the Fréchet video distance,
            laid out as for ``anyflow evaluate``; None leaves these metrics out.
    """

    every: int = 0
    step_counts: tuple[int, ...] = (1, 2, 4, 8)
    num_samples: int = 16
    prompts: tuple[str, ...] = ()
    reference_steps: int = 50
    models: str | None = None

    def __post_init__(self) -> None:
        require_sampled(self)
        require_whole("reference_steps", self.reference_steps, least=0, most=MAX_TIMESTEPS)
        if self.models is not None:
            require_text("models", self.models)


class SampleMetrics:
    """Sample the prompts at each number of steps, measure the videos, and average.

    The noise of a prompt is a function of its place among the prompts alone, so that the curves of
    two runs can be compared. Ranks share the prompts. The data's own videos are measured once, as a
    level to compare with.

    Args:
        recipe: the run.
        mesh: this process's place in it.
        dataset: dataset of real videos.
        prompts: a video each, at each number of steps.
        decoder: shows latents as videos; on every rank.
        console: gets a line for each metric that cannot be had.

    Attributes:
        prompts: as given.
        decoder: as given.

    Raises:
        ValueError: ``metrics.models`` is no folder.
    """

    def __init__(
        self,
        recipe: Recipe,
        mesh: Mesh,
        dataset: VideoDataset,
        prompts: Sequence[Prompt],
        decoder: Decoder,
        console: Console,
    ) -> None:
        self._recipe, self._mesh, self._dataset, self.decoder = recipe, mesh, dataset, decoder
        self.prompts = tuple(prompts)
        samples = spread_samples(dataset, len(prompts))
        self._real_samples = [
            sample if prompt.sample is None else prompt.sample
            for prompt, sample in zip(prompts, samples, strict=False)
        ]
        self._measures = Measures(
            recipe.metrics,
            mesh.device,
            dataset.latent_shape,
            decoder.pixel_shape,
            num_videos=len(prompts),
            num_real=len(self._real_samples),
        )
        for sentence in self._measures.left_out:
            console.print(f"Left out of the metrics: {sentence}", markup=False)
        self._counts = tuple(dict.fromkeys(recipe.metrics.step_counts))
        self._reference = recipe.metrics.reference_steps
        self._real: list[_Cell] | None = None

    def curves(self) -> dict[str, list[str]]:
        """Return the names of each metric's numbers, by number of steps and for the data."""
        counts = tuple(map(str, self._counts))
        return {
            metric: [_name(metric, steps) for steps in (*counts, *((REAL,) if of_one else ()))]
            for metric, of_one in self._measures.names.items()
        }

    def evaluate(self, updates: StageUpdates, done: int, console: Console) -> dict[str, float]:
        """Measure the averaged weights. Collective. Training is left bit for bit as it was.

        Args:
            updates: hold the average that is sampled.
            done: updates done.
            console: where messages go.

        Returns:
            On rank 0, means over the prompts by names such as ``metrics/psnr/4_steps``, those of
            the data's own videos as ``metrics/flicker/real``, and the time as ``metrics/seconds``.
            Empty on other ranks, and where values are not finite or there is too little memory: a
            line says so.
        """
        begin = time.monotonic()
        latents, problem = self._sample(updates)
        cells: list[_Cell] = []
        if problem is None:
            try:
                with self._measures.loaded():
                    cells = [
                        cell
                        for place, by_count in latents.items()
                        for cell in self._measured(place, by_count)
                    ]
                    if self._real is None:
                        cells += [cell for place in latents for cell in self._measured_real(place)]
            except (
                FloatingPointError,
                ValueError,
                ImportError,
                OSError,
                torch.OutOfMemoryError,
            ) as error:
                problem = str(error)
        parts = gather(self._mesh, (problem, cells))
        if problems := [found for found, _ in parts if found is not None]:
            console.print(
                f"The metrics of step {done} were not measured: {problems[0]}", markup=False
            )
            return {}
        cells = sorted((cell for _, part in parts for cell in part), key=lambda cell: cell.place)
        if self._real is None:
            self._real = [cell for cell in cells if cell.steps == REAL]
        if not self._mesh.is_main:
            return {}
        values = self._averaged([cell for cell in cells if cell.steps != REAL])
        values[f"{PREFIX}seconds"] = time.monotonic() - begin
        console.print(f"step {done}: {describe(values)}", markup=False)
        return values

    def _sample(self, updates: StageUpdates) -> tuple[dict[int, dict[int, Tensor]], str | None]:
        """Sample this rank's prompts.

        Returns latents by place and number of steps, and what is wrong with them.

        All ranks call the network equally often, as FSDP needs it; what a stand-in gives is not
        used.
        """
        places = range(self._mesh.data_rank, len(self.prompts), self._mesh.data_world)
        found: dict[int, dict[int, Tensor]] = {place: {} for place in places}
        counts = dict.fromkeys(
            (*self._counts, self._reference) if self._measures.compares else self._counts
        )
        problem = None
        with AveragedSampler(self._recipe, self._mesh, updates.student, updates.ema) as sampler:
            for turn in range(-(-len(self.prompts) // self._mesh.data_world)):
                place = places[turn] if turn < len(places) else 0
                draws = SampleDraws(0, 0, [place], torch.device("cpu"))
                noise = draws.normal("metrics noise", self._dataset.latent_shape)[0]
                for count in counts:
                    try:
                        latents = sampler.sample(noise, self.prompts[place].embeds, count)
                    except FloatingPointError as error:
                        problem = f"at {count} steps, {error}" if problem is None else problem
                        continue
                    found.get(place, {})[count] = latents
        return found, problem

    def _measured(self, place: int, by_count: Mapping[int, Tensor]) -> Iterator[_Cell]:
        """Measure a prompt's samples at each number of steps."""
        videos = dict(zip(by_count, self._videos(list(by_count.values()), place), strict=True))
        for count in self._counts:
            reference = None if count == self._reference else videos.get(self._reference)
            values = self._measures.of_video(videos[count], reference)
            yield _Cell(place, str(count), values, self._measures.features(videos[count]))

    def _measured_real(self, place: int) -> Iterator[_Cell]:
        """Measure a video of the data; none where there are fewer videos than prompts."""
        if place < len(self._real_samples):
            sample = self._real_samples[place]
            (video,) = self._videos(
                [self._dataset[sample].latents], place, self._dataset.caption(sample)
            )
            yield _Cell(
                place, REAL, self._measures.of_video(video, None), self._measures.features(video)
            )

    def _videos(
        self, latents: Sequence[Tensor], place: int, caption: str | None = None
    ) -> list[Video]:
        caption = self.prompts[place].caption if caption is None else caption
        if self.decoder.pixel_shape is None:
            return [Video(values, None, caption) for values in latents]
        pixels = self.decoder.pixels(torch.stack(list(latents))).movedim(-1, 2)
        return [
            Video(values, shown, caption)
            for values, shown in zip(latents, pixels.split(1), strict=True)
        ]

    def _averaged(self, cells: Sequence[_Cell]) -> dict[str, float]:
        """Average over the prompts, and compare sets of features with the data's own videos."""
        assert self._real is not None
        found: dict[str, float] = {}
        for metric in self._measures.names:
            for steps in (*map(str, self._counts), REAL):
                of_steps = [
                    cell for cell in (self._real if steps == REAL else cells) if cell.steps == steps
                ]
                values = [cell.values[metric] for cell in of_steps if metric in cell.values]
                if values:
                    found[_name(metric, steps)] = math.fsum(values) / len(values)
                elif steps != REAL and metric in of_steps[0].features:
                    sets = (
                        [cell.features[metric] for cell in part] for part in (of_steps, self._real)
                    )
                    found[_name(metric, steps)] = self._measures.of_set(
                        metric, *map(torch.stack, sets)
                    )
        return found


def describe(values: Mapping[str, float]) -> str:
    """Say the metrics of an evaluation in a line.

    Args:
        values: numbers by name, from :meth:`SampleMetrics.evaluate`.
    """
    table: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        metric, _, steps = name.removeprefix(PREFIX).partition("/")
        if steps:
            table.setdefault(metric, {})[steps.removesuffix("_steps")] = value
    parts = []
    for metric, row in table.items():
        shown = [f"{value:.4g} ({steps})" for steps, value in row.items()]
        parts.append(f"{metric.replace('_', ' ')} {', '.join(shown)}")
    return f"metrics by sampling steps: {'; '.join(parts)}; {values[f'{PREFIX}seconds']:.1f} s"


def _name(metric: str, steps: str) -> str:
    return f"{PREFIX}{metric}/{steps if steps == REAL else f'{steps}_steps'}"
