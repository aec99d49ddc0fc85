"""Score every method at every step count, and keep example videos."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anyflow.demo.world import World
from anyflow.evaluation import Evaluator, Metrics
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.sampling import sample, sample_consistency
from anyflow.utils.threads import usable_cores, user_chose_threads

# Its first argument is an AnyFlowTransformer3DModel, whole or evaluated in parts (_InParts).
Sampler = Callable[[Any, Tensor, Tensor, int], Tensor]
_FLOOR_SETS = 8
_PART_SIZE = 128  # videos that a core evaluates in one call


def build_evaluator(world: World) -> Evaluator:
    """Return held-out real videos in the form the metrics need."""
    labels = world.labels(world.config.heldout).cpu()
    videos, _ = world.shapes.sample(len(labels), world.generator(900), labels)
    size, black = world.shapes.config.size, -world.shapes.mean / world.shapes.std
    return Evaluator.from_videos(
        videos,
        labels,
        world.shapes.templates(),
        (size, size),
        black_white=(black, black + 1 / world.shapes.std),
    )


def real_floor(world: World, evaluator: Evaluator, samples: int | None = None) -> Metrics:
    """Measure real videos against the held-out ones.

    The score is the mean over several sets of the size of a sample set, which is that of the
    configuration unless ``samples`` is given.
    """
    labels = world.labels(world.config.samples if samples is None else samples).cpu()
    sets = (
        world.shapes.sample(len(labels), world.generator(910 + i), labels)
        for i in range(_FLOOR_SETS)
    )
    return evaluator.floor(sets)


def samplers(world: World) -> dict[str, Sampler]:
    """Return how each method draws ``n`` steps from noise; all see the same noise and prompts."""
    scheduler = world.scheduler()

    def flow_map(model: Any, noise: Tensor, prompts: Tensor, n: int, *, mean: bool) -> Tensor:
        return sample(
            model, scheduler, noise, prompts, num_inference_steps=n, use_mean_velocity=mean
        )

    def consistency(model: Any, noise: Tensor, prompts: Tensor, n: int) -> Tensor:
        generator = world.generator(930)
        return sample_consistency(
            model, scheduler, noise, prompts, num_inference_steps=n, generator=generator
        )

    return {
        "flow_matching": partial(flow_map, mean=False),
        "pretrain": partial(flow_map, mean=True),
        "on_policy": partial(flow_map, mean=True),
        "consistency_sampler": consistency,
    }


def evaluate_method(
    world: World,
    evaluator: Evaluator,
    sampler: Sampler,
    model: AnyFlowTransformer3DModel,
    advance: Callable[[], None],
) -> tuple[dict[int, Metrics], dict[int, Tensor]]:
    """Return metrics, and one uint8 video per class ``[4, 8, 12, 12]``, by step count."""
    labels = world.labels(world.config.samples)
    noise, prompts = world.noise(len(labels), world.generator(920)), world.prompts(labels)
    metrics: dict[int, Metrics] = {}
    examples: dict[int, Tensor] = {}
    cores = 1 if user_chose_threads() else usable_cores()
    threads = torch.get_num_threads()
    with (
        ThreadPoolExecutor(cores, initializer=lambda: torch.set_num_threads(threads)) as pool,
        torch.inference_mode(),
    ):
        network = _InParts(model, pool) if noise.device.type == "cpu" else model
        for steps in world.config.step_counts:
            videos = world.decode(sampler(network, noise, prompts, steps))
            metrics[steps] = evaluator.evaluate(videos, labels.cpu())
            examples[steps] = world.shapes.to_uint8(videos[: world.shapes.num_classes])
            advance()
    return metrics, examples


class _InParts:
    """Evaluate a network on parts of a batch, each on a core of its own.

    The numbers are those of one call; only the time differs.
    """

    def __init__(self, model: AnyFlowTransformer3DModel, pool: ThreadPoolExecutor) -> None:
        self._model, self._pool, self.config = model, pool, model.config

    def __call__(
        self,
        hidden_states: Tensor,
        *,
        timestep: Tensor,
        r_timestep: Tensor | None,
        encoder_hidden_states: Tensor,
        return_dict: bool,
    ) -> tuple[Tensor]:
        assert not return_dict

        def evaluate(start: int) -> Tensor:
            part = slice(start, start + _PART_SIZE)
            with torch.inference_mode():  # each thread has a mode of its own
                return self._model(
                    hidden_states[part],
                    timestep[part],
                    None if r_timestep is None else r_timestep[part],
                    encoder_hidden_states[part],
                    return_dict=False,
                )[0]

        return (
            torch.cat(list(self._pool.map(evaluate, range(0, len(hidden_states), _PART_SIZE)))),
        )
