"""Scores and example videos of every method at every step count."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from anyflow.demo.world import World
from anyflow.evaluation import Evaluator, Metrics
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.sampling import sample, sample_consistency

Sampler = Callable[[AnyFlowTransformer3DModel, Tensor, Tensor, int], Tensor]
_FLOOR_SETS = 8


def build_evaluator(world: World) -> Evaluator:
    """Held-out real videos in the form the metrics need."""
    labels = world.labels(world.config.heldout).cpu()
    videos, _ = world.shapes.sample(len(labels), world.generator(900), labels)
    size = world.shapes.config.size
    return Evaluator.from_videos(videos, labels, world.shapes.templates(), (size, size))


def real_floor(world: World, evaluator: Evaluator) -> Metrics:
    """What real videos score against the held-out ones, averaged over several sets of the size of a sample set."""
    labels = world.labels(world.config.samples).cpu()
    sets = (world.shapes.sample(len(labels), world.generator(910 + i), labels) for i in range(_FLOOR_SETS))
    return evaluator.floor(sets)


def samplers(world: World) -> dict[str, Sampler]:
    """How each method draws ``n`` steps from noise; all see the same noise and prompts."""
    scheduler = world.scheduler()

    def flow_map(model: AnyFlowTransformer3DModel, noise: Tensor, prompts: Tensor, n: int, *, mean: bool) -> Tensor:
        return sample(model, scheduler, noise, prompts, num_inference_steps=n, use_mean_velocity=mean)

    def consistency(model: AnyFlowTransformer3DModel, noise: Tensor, prompts: Tensor, n: int) -> Tensor:
        generator = world.generator(930)
        return sample_consistency(model, scheduler, noise, prompts, num_inference_steps=n, generator=generator)

    return {
        "flow_matching": partial(flow_map, mean=False),
        "pretrain": partial(flow_map, mean=True),
        "on_policy": partial(flow_map, mean=True),
        "consistency_sampler": consistency,
    }


def evaluate_method(
    world: World, evaluator: Evaluator, sampler: Sampler, model: AnyFlowTransformer3DModel, advance: Callable[[], None]
) -> tuple[dict[int, Metrics], dict[int, Tensor]]:
    """Metrics, and one uint8 video per class ``[4, 8, 12, 12]``, by step count."""
    labels = world.labels(world.config.samples)
    noise = world.noise(len(labels), world.generator(920))
    metrics: dict[int, Metrics] = {}
    examples: dict[int, Tensor] = {}
    with torch.inference_mode():
        for steps in world.config.step_counts:
            videos = world.decode(sampler(model, noise, world.prompts(labels), steps))
            metrics[steps] = evaluator.evaluate(videos, labels.cpu())
            examples[steps] = world.shapes.to_uint8(videos[: world.shapes.num_classes])
            advance()
    return metrics, examples
