"""Split an update's samples into micro-steps, draw what they need, and take their gradients.

An update is a function of its global batch: neither the split into micro-steps nor the ranks change
more than rounding. Sample j of a rank, counted over its micro-steps, has place
``j * data_world + data_rank`` in the global batch, whatever the layout, and every draw is a
function of the place. Samples of plain diffusion go through the networks first, because the losses
of the others are scaled by the mean of theirs (:class:`~anyflow.methods.DiffusionBalance`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from anyflow.data import Batch
from anyflow.methods import (
    AnyFlowPretrainMethod,
    DiffusionBalance,
    LossOutput,
    PretrainConfig,
    TimePairs,
    sample_time_pairs,
)
from anyflow.training.distributed import Mesh
from anyflow.training.draws import SampleDraws, draw_generator
from anyflow.utils.transfer import device_tensor, to_device
from anyflow.utils.validation import require_finite

if TYPE_CHECKING:
    from anyflow.training.config import Recipe


@dataclass(frozen=True)
class MicroBatch:
    """Hold the samples of one micro-step, on the device.

    Args:
        latents: ``[B, F, C, H, W]``.
        prompt_embeds: ``[B, S, text_dim]``.
        draws: draws of these samples.
        given: draws that the caller of the update has made, of these samples.
    """

    latents: Tensor
    prompt_embeds: Tensor
    draws: SampleDraws
    given: Mapping[str, Any]

    def noise(self, purpose: str) -> Tensor:
        """Draw standard normal noise of the latents' shape, in fp32 at least."""
        return self.draws.normal(
            purpose, self.latents.shape[1:], torch.promote_types(self.latents.dtype, torch.float32)
        )


@dataclass(frozen=True)
class Losses:
    """Hold an update's scalars on this rank.

    Args:
        means: the loss and its metrics.
        norms: the largest of each of :attr:`LossOutput.norms`.
    """

    means: dict[str, Tensor]
    norms: dict[str, Tensor]


class Accumulation:
    """Evaluate the losses of an update.

    Args:
        recipe: the run.
        mesh: this process's place in it.
        negative: ``[1, S, text_dim]`` negative prompt of the dataset.
    """

    def __init__(self, recipe: Recipe, mesh: Mesh, negative: Tensor) -> None:
        self._recipe, self._mesh = recipe, mesh
        self.negative = to_device(negative, mesh.device)

    def generator(self, purpose: str, step: int) -> torch.Generator:
        """Make the generator of what is drawn once for an update, the same on every rank."""
        return draw_generator(self._recipe.seed, purpose, step)

    def pretrain(self, method: AnyFlowPretrainMethod, step: int) -> dict[str, Any]:
        """Return the arguments of the pretrain loss that all ranks and micro-steps share."""
        config, device = method.config, self._mesh.device
        coin = torch.rand((), generator=self.generator("image to video", step)).item()
        shared: dict[str, Any] = {
            "image_to_video": coin < config.i2v_prob,
            "balance": DiffusionBalance(self._mesh.data_group),
        }
        if config.causal is not None:
            shared["num_chunks"] = method.draw_num_chunks(self.generator("chunks", step), device)
            generator = self.generator("bidirectional loss", step)
            shared["bidirectional"] = method.draw_bidirectional(generator, device)
        return shared

    def pretrain_draws(
        self, micro: MicroBatch, config: PretrainConfig, *, bidirectional: bool
    ) -> dict[str, Any]:
        """Return the arguments of the pretrain loss that are drawn for each sample."""
        drawn: dict[str, Any] = {"noise": micro.noise("data noise")}
        if config.prompt_dropout > 0:
            drawn["dropped_prompts"] = micro.draws.uniform("prompt dropout") < config.prompt_dropout
        if bidirectional:
            drawn["bidirectional_t"] = micro.draws.normal("bidirectional time").sigmoid()
            drawn["bidirectional_noise"] = micro.noise("bidirectional noise")
        return drawn

    def time_pairs(
        self,
        batches: Sequence[Batch],
        step: int,
        config: PretrainConfig,
        given: TimePairs | Sequence[TimePairs] | None,
    ) -> TimePairs:
        """Draw the times of all samples of this rank, in the order of the batches.

        Kinds are shared out over the global batch.

        Args:
            batches: one for each micro-step.
            step: number of the update.
            config: settings of the pretrain loss.
            given: times of the caller, for every micro-step or a list with those of each; None
                draws them.

        Raises:
            ValueError: kinds that are given leave a flow-map sample of one rank before a diffusion
                sample of another.
        """
        if given is not None:
            pairs = _joined_pairs(given, len(batches))
            self._require_diffusion_first(batches, pairs)
            return pairs
        count = sum(len(batch.latents) for batch in batches)
        cpu = torch.device("cpu")
        return sample_time_pairs(
            count,
            diffusion_ratio=config.diffusion_ratio,
            consistency_ratio=config.consistency_ratio,
            rank=self._mesh.data_rank,
            world_size=self._mesh.data_world,
            device=cpu,
            offset=step,
            uniforms=self._draws(step, range(count), cpu).uniform("times", (2,)).T,
        )

    def backward(
        self,
        batches: Sequence[Batch],
        step: int,
        loss: Callable[[MicroBatch], LossOutput],
        *,
        pairs: TimePairs | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> Losses:
        """Take the gradients of the mean loss of all samples, in one micro-step per batch.

        Args:
            batches: one for each micro-step.
            step: number of the update.
            loss: computes the loss of a micro-step.
            pairs: times of all samples; each micro-step is given its own as ``time_pairs``.
            given: draws of the caller: a tensor ``[B, ...]`` is that of every micro-step, and a
                list has one for each.

        Raises:
            ValueError: a sample of the data is not finite.
        """
        samples = [(batch, b) for batch in batches for b in range(len(batch.latents))]
        order = list(range(len(samples))) if pairs is None else pairs.diffusion_first()
        draws = {
            name: _joined(value, len(batches))
            for name, value in ({} if given is None else given).items()
        }
        means: dict[str, Tensor] = {}
        norms: dict[str, Tensor] = {}
        start = 0
        for size in (len(batch.latents) for batch in batches):
            chosen, start = order[start : start + size], start + size
            output = self._loss(loss, self._micro_batch(samples, chosen, step, pairs, draws))
            share = size / len(samples)
            (output.loss * share).backward()
            for name, value in {"loss": output.loss.detach(), **output.metrics}.items():
                part = value.to(torch.promote_types(value.dtype, torch.float32)) * share
                means[name] = means[name] + part if name in means else part
            for name, value in output.norms.items():
                norms[name] = torch.maximum(norms[name], value) if name in norms else value
        return Losses(means, norms)

    def _loss(self, loss: Callable[[MicroBatch], LossOutput], micro: MicroBatch) -> LossOutput:
        # Without its cache, which would hold a second copy of all weights, sharded ones too.
        enabled = self._recipe.precision == "bf16"
        with torch.autocast(
            self._mesh.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False
        ):
            return loss(micro)

    def _micro_batch(
        self,
        samples: Sequence[tuple[Batch, int]],
        chosen: Sequence[int],
        step: int,
        pairs: TimePairs | None,
        draws: Mapping[str, Any],
    ) -> MicroBatch:
        device = self._mesh.device
        latents = torch.stack([batch.latents[b] for batch, b in (samples[j] for j in chosen)])
        prompts = torch.stack([batch.prompt_embeds[b] for batch, b in (samples[j] for j in chosen)])
        # In host memory: a device would have to be waited for, and later the student would be to
        # blame.
        indices = [batch.index[b] for batch, b in (samples[j] for j in chosen)]
        for name, values in (("latents", latents), ("prompts", prompts)):
            require_finite(f"the data's samples {indices}: {name}", values)
        own = {
            name: value[device_tensor(chosen, torch.long, value.device)]
            if isinstance(value, Tensor)
            else value
            for name, value in draws.items()
        }
        if pairs is not None:
            own["time_pairs"] = pairs.select(chosen, device)
        return MicroBatch(
            to_device(latents, device),
            to_device(prompts, device),
            self._draws(step, chosen, device),
            own,
        )

    def _draws(self, step: int, samples: Sequence[int], device: torch.device) -> SampleDraws:
        mesh = self._mesh
        places = [j * mesh.data_world + mesh.data_rank for j in samples]
        return SampleDraws(self._recipe.seed, step, places, device)

    def _require_diffusion_first(self, batches: Sequence[Batch], pairs: TimePairs) -> None:
        """Raise a ValueError on every rank if some rank cannot put diffusion samples first."""
        kinds = [pairs.is_diffusion[j].item() for j in pairs.diffusion_first()]
        steps = [micro for micro, batch in enumerate(batches) for _ in range(len(batch.latents))]
        last = max((micro for micro, kind in zip(steps, kinds, strict=True) if kind), default=-1)
        first = min(
            (micro for micro, kind in zip(steps, kinds, strict=True) if not kind),
            default=len(batches),
        )
        ends = torch.tensor([last, -first], device=self._mesh.device)
        if self._mesh.data_world > 1:
            dist.all_reduce(ends, dist.ReduceOp.MAX, group=self._mesh.data_group)
        last, first = int(ends[0]), -int(ends[1])
        if last > first:
            raise ValueError(
                f"time_pairs: a rank has diffusion samples up to micro-step {last} while another "
                "has none from "
                f"micro-step {first} on; share the kinds out evenly over the ranks"
            )


def _joined(value: Any, micro_steps: int) -> Any:
    """Join a draw of all micro-steps into one tensor; other arguments stay as they are."""
    if isinstance(value, Tensor):
        value = [value] * micro_steps
    return torch.cat(value) if isinstance(value, list) else value


def _joined_pairs(given: TimePairs | Sequence[TimePairs], micro_steps: int) -> TimePairs:
    each = [given] * micro_steps if isinstance(given, TimePairs) else list(given)
    return TimePairs(
        *(
            torch.cat([getattr(pairs, name) for pairs in each])
            for name in ("t", "r", "is_diffusion")
        )
    )
