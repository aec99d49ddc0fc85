"""Choose videos that are not trained on, and evaluate the loss on them with fixed noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anyflow.data import VideoDataset, open_dataset
from anyflow.data.config import DataConfig
from anyflow.methods import AnyFlowPretrainMethod, PretrainConfig, TimePairs, sample_time_pairs
from anyflow.methods.collectives import all_reduce_sum
from anyflow.training.distributed import Mesh
from anyflow.training.draws import SampleDraws, draw_generator
from anyflow.training.limits import MAX_BATCH
from anyflow.training.updates import StageUpdates, build_scheduler, pretrain_config
from anyflow.utils.devices import widest_float
from anyflow.utils.transfer import to_device
from anyflow.utils.validation import require_text, require_whole

if TYPE_CHECKING:
    from anyflow.training.config import Recipe


@dataclass(frozen=True)
class ValidationConfig:
    """Say when the averaged weights' pretrain loss is taken on videos held out, and on which.

    Args:
        every: steps between evaluations; the last step has one, too. 0 turns them off.
        num_samples: videos of each evaluation, always the same ones. Without a ``path`` these
            samples of ``data`` are held out of training, so a run resumes only with the same
            number.
        path: folder of other latents, of the same shape; None takes samples of ``data``.
    """

    every: int = 0
    num_samples: int = 32
    path: str | None = None

    def __post_init__(self) -> None:
        require_whole("every", self.every, least=0)
        require_whole("num_samples", self.num_samples, most=MAX_BATCH)
        if self.path is not None:
            require_text("path", self.path)


@dataclass(frozen=True)
class Split:
    """Hold the indices of samples that are trained on, and of those that the loss is validated on.

    Args:
        picked: indices of samples of the training data.
        held_out: the dataset of the other samples.
        held_out_picked: indices of samples of ``held_out``; none without validation.
    """

    picked: Sequence[int]
    held_out: VideoDataset
    held_out_picked: Sequence[int]


def split_data(recipe: Recipe, dataset: VideoDataset) -> Split:
    """Choose the samples of a run.

    Which samples are held out depends on nothing but their number and ``num_samples``.

    Args:
        recipe: the run.
        dataset: its training data.

    Raises:
        ValueError: nothing would be left to train on, or the other dataset cannot be read or has
            videos of another shape.
    """
    validation, samples = recipe.validation, range(len(dataset))
    if not validation.every:
        return Split(samples, dataset, ())
    if validation.path is not None:
        other = open_dataset(DataConfig(path=validation.path))
        for name in ("latent_shape", "text_shape"):
            if getattr(other, name) != getattr(dataset, name):
                raise ValueError(
                    f"validation.path: {validation.path} has {name.replace('_', ' ')} "
                    f"{getattr(other, name)}, "
                    f"the training data {getattr(dataset, name)}"
                )
        return Split(samples, other, _chosen(len(other), min(validation.num_samples, len(other))))
    if validation.num_samples >= len(dataset):
        raise ValueError(
            f"validation.num_samples={validation.num_samples} leaves none of the {len(dataset)} "
            "videos to train on"
        )
    held_out = _chosen(len(dataset), validation.num_samples)
    return Split(sorted(set(samples) - set(held_out)), dataset, held_out)


def _chosen(length: int, count: int) -> list[int]:
    return sorted(
        torch.randperm(length, generator=draw_generator(0, "held-out rows"))[:count].tolist()
    )


@torch.no_grad()
def validation_losses(
    recipe: Recipe, mesh: Mesh, split: Split, negative: Tensor, updates: StageUpdates
) -> dict[str, float]:
    """Evaluate the pretrain loss of the averaged weights on the videos held out. Collective.

    Noise, times and kinds of samples are functions of a video's place among those held out, so that
    the numbers of two steps or two runs can be compared; prompts are kept and all frames are
    denoised. A causal student sees all chunks. Flow-map losses are not scaled to the diffusion
    losses, as training scales them. Training is left bit for bit as it was.

    Args:
        recipe: the run.
        mesh: this process's place in it.
        split: what is held out.
        negative: ``[1, S, text_dim]`` negative prompt of the training data.
        updates: hold the networks and the average that are evaluated.

    Returns:
        ``validation_loss``, the mean over all videos, and ``validation_loss_diffusion`` and
        ``validation_loss_flow_map``, those of their kinds where there are any.
    """
    config = dataclasses.replace(pretrain_config(recipe), prompt_dropout=0.0, i2v_prob=0.0)
    method = AnyFlowPretrainMethod(
        updates.student,
        build_scheduler(recipe),
        config,
        teacher=updates.teacher,
        process_group=mesh.data_group,
    )
    pairs = _time_pairs(len(split.held_out_picked), config)
    negative = to_device(negative, mesh.device)
    # loss and count, of both kinds
    sums = torch.zeros(4, dtype=widest_float(mesh.device), device=mesh.device)
    autocast = torch.autocast(
        mesh.device.type, torch.bfloat16, enabled=recipe.precision == "bf16", cache_enabled=False
    )
    with updates.ema.applied(updates.student), autocast:
        for chosen in _shares(len(split.held_out_picked), mesh, recipe.data.batch_size):
            shown = chosen if chosen else [0]  # a stand-in, whose loss is not added
            samples = [split.held_out[split.held_out_picked[place]] for place in shown]
            draws = SampleDraws(0, 0, shown, mesh.device)
            losses, is_diffusion = method.sample_losses(
                to_device(torch.stack([sample.latents for sample in samples]), mesh.device),
                to_device(torch.stack([sample.prompt_embeds for sample in samples]), mesh.device),
                negative,
                noise=draws.normal("validation noise", samples[0].latents.shape),
                time_pairs=pairs.select(shown, mesh.device),
                num_chunks=None if method.chunks is None else len(method.chunks),
            )
            if chosen:
                for kind, of_kind in enumerate((is_diffusion, ~is_diffusion)):
                    sums[2 * kind] += losses.where(of_kind, 0.0).sum()
                    sums[2 * kind + 1] += of_kind.sum()
    diffusion, diffusions, flow_map, flow_maps = all_reduce_sum(sums, mesh.data_group).tolist()
    values = {"validation_loss": (diffusion + flow_map) / (diffusions + flow_maps)}
    if diffusions:
        values["validation_loss_diffusion"] = diffusion / diffusions
    if flow_maps:
        values["validation_loss_flow_map"] = flow_map / flow_maps
    return values


def _time_pairs(count: int, config: PretrainConfig) -> TimePairs:
    """Draw the times of all videos held out, on the CPU."""
    cpu = torch.device("cpu")
    return sample_time_pairs(
        count,
        diffusion_ratio=config.diffusion_ratio,
        consistency_ratio=config.consistency_ratio,
        device=cpu,
        uniforms=SampleDraws(0, 0, range(count), cpu).uniform("validation times", (2,)).T,
    )


def _shares(count: int, mesh: Mesh, size: int) -> list[list[int]]:
    """Split this rank's places among those held out into batches.

    All ranks get as many batches, some of them empty: FSDP needs the network called equally often.
    """
    own = list(range(count))[mesh.data_rank :: mesh.data_world]
    return [own[start : start + size] for start in range(0, -(-count // mesh.data_world), size)]
