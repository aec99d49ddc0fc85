"""Count the memory, floating-point operations and disk of a recipe, without weights or a GPU.

Parameters are counted on the meta device, and what a block needs beside them is counted as it runs,
forward and backward, on fake tensors of the real size.
``python -m anyflow.training.budget RECIPE [KEY=VALUE]...`` prints the count of one recipe; without
a recipe, the table of docs/training.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from anyflow import recipes
from anyflow.methods import RolloutDraw
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.training.config import ArchitectureConfig, Recipe, WeightsConfig
from anyflow.training.flops import (
    OnPolicyFlops,
    network_flops,
    peak_flops,
    pretrain_flops,
    token_count,
)
from anyflow.training.memory import FP32, Memory, count_memory, trained_parameters
from anyflow.training.networks import prepare_critic, prepare_student
from anyflow.training.recipe import load_recipe
from anyflow.training.updates import pretrain_config
from anyflow.utils.documents import read_json

LATENTS = (21, 16, 60, 104)  # F, C, H, W of 81 frames of 480 x 832
TEXT_TOKENS = 512
UTILIZATION = 0.4  # of the card's peak, by model FLOPs; a run's own log has the measured one
CARD = "H100"
_KNOWN = {
    "Wan2.1-T2V-1.3B-Diffusers": ArchitectureConfig(),
    "Wan2.1-T2V-14B-Diffusers": ArchitectureConfig(
        num_attention_heads=40, ffn_dim=13824, num_layers=40
    ),
}


@dataclass(frozen=True)
class Budget:
    """Hold what a recipe takes.

    Args:
        parameters: parameters of all networks.
        trained: those of them that train.
        global_batch: samples of an update.
        updates: updates of the run.
        update_flops: model FLOPs of an update on all processes together, the mean over the rollouts
            that are drawn.
        memory: memory of each process.
        checkpoint: bytes of a checkpoint on disk.
        row: bytes of a video in the dataset, with a caption of ``TEXT_TOKENS`` tokens.
    """

    parameters: int
    trained: int
    global_batch: int
    updates: int
    update_flops: float
    memory: Memory
    checkpoint: int
    row: int

    def gpu_hours(self, card: str = CARD, utilization: float = UTILIZATION) -> float:
        """Return the hours of one such card, times the number of cards, for the whole run.

        Raises:
            ValueError: the card's peak is not known.
        """
        peak = peak_flops(card)
        if peak is None:
            raise ValueError(f"the peak of {card!r} is not known to anyflow.training.flops")
        return self.update_flops * self.updates / (peak * utilization) / 3600


def count(
    recipe: Recipe,
    processes: int = 8,
    latent_shape: Sequence[int] = LATENTS,
    text_tokens: int = TEXT_TOKENS,
) -> Budget:
    """Count what a recipe takes on ``processes`` GPUs.

    Args:
        recipe: its networks have an architecture, come from a folder that is there or that one of
            anyflow's recipes leaves, or are Wan2.1's.
        processes: processes of torchrun, on as many GPUs.
        latent_shape: ``(F, C, H, W)`` of the videos.
        text_tokens: tokens of a prompt, padding included.

    Raises:
        ValueError: the size of a network cannot be known, the processes do not fit ``parallel``, or
            the student is causal.
    """
    if recipe.pretrain.causal is not None:
        raise ValueError(
            "pretrain.causal: training of the causal model is not counted, whose tokens depend on "
            "what is drawn and whose rollouts keep caches"
        )
    parallel = recipe.parallel
    if processes % (parallel.replicate * parallel.sequence):
        raise ValueError(
            f"parallel.replicate {parallel.replicate} x parallel.sequence {parallel.sequence} must "
            "divide the "
            f"{processes} processes"
        )
    networks = _networks(recipe)
    tokens = token_count(networks["student"], latent_shape)
    trained = {
        name: sum(p.numel() for p in trained_parameters(network))
        for name, network in networks.items()
    }
    samples = (
        recipe.data.batch_size * recipe.gradient_accumulation * (processes // parallel.sequence)
    )
    return Budget(
        parameters=sum(p.numel() for network in networks.values() for p in network.parameters()),
        trained=sum(trained.values()),
        global_batch=samples,
        updates=recipe.steps,
        update_flops=_update_flops(recipe, networks, tokens, text_tokens, samples),
        memory=count_memory(recipe, networks, processes // parallel.replicate, tokens, text_tokens),
        checkpoint=FP32 * (3 * sum(trained.values()) + trained["student"]),
        row=FP32 * (math.prod(latent_shape) + text_tokens * networks["student"].config.text_dim),
    )


def architecture(network: WeightsConfig) -> ArchitectureConfig:
    """Return the sizes of a recipe's network.

    They are its own, its folder's, or those of the recipe that leaves the folder.

    Raises:
        ValueError: there is no such folder, and its name does not say.
    """
    if network.architecture is not None:
        return network.architecture
    path = Path(str(network.path))
    for folder in (path, path / "transformer"):
        if (folder / "config.json").is_file():
            found = read_json(folder / "config.json")
            names = {field.name for field in dataclasses.fields(ArchitectureConfig)} & set(found)
            sizes: dict[str, Any] = {
                n: tuple(v) if isinstance(v := found[n], list) else v for n in names
            }
            return ArchitectureConfig(**sizes)
    known = next(
        (
            sizes
            for name, sizes in _KNOWN.items()
            if path.name.endswith(name.removeprefix("Wan2.1-"))
        ),
        None,
    )
    if known is not None:
        return known
    if path.name == "model" and path.parent.name in recipes.names():
        return architecture(load_recipe(Path(path.parent.name)).student)
    raise ValueError(
        f"{path}: there is no such folder, and its name does not say how large the network is"
    )


def _networks(recipe: Recipe) -> dict[str, AnyFlowTransformer3DModel]:
    """Build the recipe's networks without memory.

    A teacher from a folder is taken for a plain Wan model.
    """

    def build(config: WeightsConfig) -> AnyFlowTransformer3DModel:
        return AnyFlowTransformer3DModel(
            **dataclasses.asdict(architecture(config)), r_embedder=False
        )

    with torch.device("meta"):
        networks = {"student": prepare_student(build(recipe.student), recipe)}
        if recipe.teacher is not None:
            networks["teacher"] = build(recipe.teacher).requires_grad_(False)
        if recipe.on_policy is not None:
            critic = (
                recipe.on_policy.teacher
                if recipe.on_policy.critic is None
                else recipe.on_policy.critic
            )
            networks["teacher"] = build(recipe.on_policy.teacher).requires_grad_(False)
            networks["critic"] = prepare_critic(build(critic), recipe)
    return networks


def _update_flops(
    recipe: Recipe,
    networks: dict[str, AnyFlowTransformer3DModel],
    tokens: int,
    text_tokens: int,
    samples: int,
) -> float:
    counted = {
        name: network_flops(network, tokens, text_tokens) for name, network in networks.items()
    }
    if recipe.on_policy is None:
        return pretrain_flops(*counted.values(), config=pretrain_config(recipe), samples=samples)
    method = recipe.on_policy.method
    update = OnPolicyFlops(
        counted["student"],
        counted["teacher"],
        counted["critic"],
        config=method,
        pretrain=pretrain_config(recipe),
        samples=samples,
    )
    lengths = method.num_steps if method.timesteps is None else (len(method.timesteps) - 1,)
    drawn = [[RolloutDraw(n, g) for g in range(n)] for n in lengths]

    def mean(loss: Callable[[RolloutDraw], int]) -> float:
        return sum(sum(map(loss, each)) / len(each) for each in drawn) / len(drawn)

    return mean(update.student_loss) / recipe.on_policy.generator_update_interval + mean(
        update.critic_loss
    )


# The rows of the table: recipe, settings that make it fit, processes.
_ROWS: tuple[tuple[str, tuple[str, ...], int], ...] = (
    ("teacher_t2v", (), 8),
    ("anyflow_pretrain_t2v", (), 8),
    ("anyflow_onpolicy_t2v", (), 8),
    ("anyflow_onpolicy_t2v_teacher14b", (), 8),
    ("fastvideo_pretrain_t2v", (), 8),
    ("fastvideo_onpolicy_t2v", (), 8),
    ("teacher_t2v_14b", (), 8),
    ("anyflow_pretrain_t2v_14b", (), 8),
    ("anyflow_onpolicy_t2v_14b", (), 8),
    ("anyflow_onpolicy_t2v_14b", ("parallel.sequence=4", "gradient_accumulation=8"), 8),
    ("anyflow_onpolicy_t2v_14b", ("parallel.sequence=4", "gradient_accumulation=2"), 32),
)


_HEAD = (
    f"| recipe | GPUs | parameters, trained | updates × batch | PFLOP an update | {CARD} hours | "
    "GB a GPU: weights + "
    "training state + gathered + kept + working | GB a checkpoint "
    "|\n|---|---|---|---|---|---|---|---|\n"
)


def table() -> str:
    """Return what the recipes for Wan2.1 take, as a table in Markdown."""
    rows = []
    for name, settings, processes in _ROWS:
        label = " ".join((f"`{name}`", *(f"`{setting}`" for setting in settings)))
        rows.append(_row(label, load_recipe(Path(name), settings), processes))
    return _HEAD + "".join(rows)


def _row(name: str, recipe: Recipe, processes: int, latents: Sequence[int] = LATENTS) -> str:
    found = count(recipe, processes, latents)
    memory = found.memory
    state = memory.gradients + memory.optimizer + memory.average
    parts = [memory.weights, state, memory.gathered, memory.kept, memory.working]
    cells = [
        name,
        str(processes),
        f"{found.parameters / 1e9:.2f} B, {found.trained / 1e9:.2f} B",
        f"{found.updates} × {found.global_batch}",
        f"{found.update_flops / 1e15:.0f}",
        f"{found.gpu_hours():.0f}",
        f"{' + '.join(f'{part / 1e9:.1f}' for part in parts)} = **{memory.total / 1e9:.0f}**",
        f"{found.checkpoint / 1e9:.1f}",
    ]
    return f"| {' | '.join(cells)} |\n"


def main(arguments: Sequence[str]) -> None:
    """Print the table, or the row of one recipe.

    Arguments: ``RECIPE [KEY=VALUE]... [--processes N] [--latents F C H W]``.
    """
    if not arguments:
        print(table(), end="")
        return
    parser = argparse.ArgumentParser(
        prog="python -m anyflow.training.budget", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    shape = ("F", "C", "H", "W")
    parser.add_argument(
        "--latents",
        default=LATENTS,
        help="of a video; 21 16 60 104",
        nargs=4,
        type=int,
        metavar=shape,
    )
    parser.add_argument("--processes", type=int, default=8, help="of torchrun, one for each GPU")
    given = parser.parse_args(arguments)
    try:
        row = _row(
            f"`{given.recipe}`",
            load_recipe(given.recipe, given.settings),
            given.processes,
            given.latents,
        )
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    print(_HEAD + row, end="")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
