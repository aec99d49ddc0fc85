"""Sample clips that are longer than any training clip, and score them window by window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from anyflow.data.moving_shapes import MovingShapes
from anyflow.demo.world import World
from anyflow.evaluation import Evaluator, nearest_template
from anyflow.models import AnyFlowFARTransformer3DModel
from anyflow.sampling import sample_causal


@dataclass(frozen=True)
class LongClipScores:
    """Hold the scores of a set of clips, each number of one window of a training clip's length.

    Args:
        fd: Fréchet distance from held-out real clips, a mean over the classes.
        template_mse: mean squared difference to the nearest real clip of the class, where 1 is the
            variance of the data.
        of_class: share of the clips that are nearest to a real clip of the prompt's class.
        off_course: mean distance in pixels from where a real clip would be that began as the clip
            did; a real shape moves one pixel per frame.
    """

    fd: tuple[float, ...]
    template_mse: tuple[float, ...]
    of_class: tuple[float, ...]
    off_course: tuple[float, ...]


def sample_long(
    world: World,
    model: AnyFlowFARTransformer3DModel,
    chunks: int,
    samples: int,
    num_inference_steps: int,
    cache_window: int | None,
) -> Tensor:
    """Sample clips of many chunks of one latent frame; every number of steps sees the same noise.

    Args:
        world: the data.
        model: the causal model.
        chunks: their number.
        samples: clips, classes in turn.
        num_inference_steps: evaluations of a chunk.
        cache_window: compressed chunks that are kept; None keeps all.

    Returns:
        Videos ``[samples, 2 * chunks, 1, 12, 12]``.
    """
    shape = (samples, chunks, *world.latent_shape[1:])
    noise = torch.randn(shape, generator=world.generator(950)).to(world.device)
    latents = sample_causal(
        model,
        world.scheduler(),
        noise,
        world.prompts(world.labels(samples)),
        chunk_partition=(1,) * chunks,
        num_inference_steps=num_inference_steps,
        cache_window=cache_window,
    )
    return world.decode(latents)


def score_long(
    world: World, evaluator: Evaluator, videos: Tensor, labels: Tensor
) -> LongClipScores:
    """Score clips ``[N, F, 1, H, W]`` of classes ``[N]`` in windows that begin at every chunk."""
    length, step = world.shapes.config.num_frames, frames_of_a_chunk(world)
    starts = range(0, videos.shape[1] - length + 1, step)
    windows = [videos[:, start : start + length] for start in starts]
    metrics = [evaluator.evaluate(window, labels) for window in windows]
    return LongClipScores(
        tuple(score.fd for score in metrics),
        tuple(score.template_mse for score in metrics),
        tuple(_of_class(world, window, labels) for window in windows),
        tuple(_off_course(world, windows, labels, step)),
    )


def real_long(world: World, frames: int, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Draw real clips of classes ``[N]`` that are longer than those of the data set.

    Returns:
        ``[N, frames, 1, 12, 12]``.
    """
    shapes = MovingShapes(replace(world.shapes.config, num_frames=frames))
    return shapes.sample(len(labels), generator, labels)[0]


def frames_of_a_chunk(world: World) -> int:
    """Return the frames of video in one latent frame."""
    return world.shapes.config.num_frames // world.latent_shape[0]


def window_ends(world: World, chunks: int) -> tuple[int, ...]:
    """Return the frames made when each window of a clip is complete."""
    length, step = world.shapes.config.num_frames, frames_of_a_chunk(world)
    return tuple(range(length, chunks * step + 1, step))


def _of_class(world: World, window: Tensor, labels: Tensor) -> float:
    """Return the share of windows that are nearest to a real clip of their own class."""
    bank = world.shapes.templates()
    nearest = torch.cdist(window.flatten(1), bank.flatten(0, 1).flatten(1)).argmin(dim=1)
    return (nearest // bank.shape[1] == labels).float().mean().item()


def _off_course(world: World, windows: Sequence[Tensor], labels: Tensor, step: int) -> list[float]:
    """Return the mean distance in pixels of the shapes in each window from their course.

    The course is where the shape of the first window is, moved on like a real one.
    """
    bank, size = world.shapes.templates(), world.shapes.config.size
    down = torch.tensor([name.endswith("down") for name in world.shapes.class_names])[labels].long()
    directions = torch.stack([down, 1 - down], dim=1)
    first: Tensor | None = None
    distances = []
    for index, window in enumerate(windows):
        place = nearest_template(window, labels, bank)
        place = torch.stack([place // size, place % size], dim=1)
        first = place if first is None else first
        off = (place - first - index * step * directions + size // 2) % size - size // 2
        distances.append(off.float().norm(dim=1).mean().item())
    return distances
