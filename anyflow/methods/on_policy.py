"""Correct a flow map's own rollouts by distribution matching (stage 2).

Equation numbers are those of docs/algorithm.md.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anyflow.methods.balance import DiffusionBalance
from anyflow.methods.causal import CausalConfig, training_partition
from anyflow.methods.dmd2 import DMD2Config, DMD2Method
from anyflow.methods.output import LossOutput
from anyflow.methods.pretrain import AnyFlowPretrainMethod
from anyflow.methods.pretrain_config import PretrainConfig
from anyflow.methods.time_pairs import TimePairs
from anyflow.models.causal_cache import ChunkCache, encode_chunks
from anyflow.models.chunks import ChunkPartition
from anyflow.models.network import unwrapped
from anyflow.schedulers import FlowMapEulerDiscreteScheduler
from anyflow.utils.rng import resolve_generator
from anyflow.utils.validation import SettingError, require_positive


@dataclass(frozen=True)
class OnPolicyConfig(DMD2Config):
    """Hold the settings of on-policy distillation, beside those of :class:`DMD2Config`.

    Args:
        rollout: ``"shortcut"`` simulates any schedule in at most three evaluations; ``"euler"``
            runs every step.
        grad_through: ``"all"`` evaluations of a shortcut rollout, or only the middle ``"step"``.
        cotrain_pretrain: add the pretrain loss on the data batch in
            :meth:`AnyFlowOnPolicyMethod.student_loss`.
        cotrain_weight: factor of that loss beside distribution matching. The loss on a teacher's
            velocities is far smaller than that on pairs, and needs more than the published 1.
        causal: settings of a causal student, whose rollout is chunk by chunk; None is for a
            bidirectional one. Of its settings the rollout reads ``chunk_partition``.

    Raises:
        SettingError: a value is out of range.
    """

    rollout: str = "shortcut"
    grad_through: str = "all"
    cotrain_pretrain: bool = False
    cotrain_weight: float = 1.0
    causal: CausalConfig | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (
            ("rollout", ("shortcut", "euler")),
            ("grad_through", ("all", "step")),
        ):
            if getattr(self, name) not in allowed:
                raise SettingError(name, f"must be one of {allowed}, got {getattr(self, name)!r}")
        require_positive("cotrain_weight", self.cotrain_weight)


class AnyFlowOnPolicyMethod(DMD2Method):
    """Compute the losses of on-policy flow-map distillation.

    Args:
        student, teacher, critic, scheduler, process_group: as for :class:`DMD2Method`.
        config: settings.
        pretrain: settings of the loss that co-training adds, whose ``velocity_target="teacher"`` is
            the real score; with ``cotrain_pretrain`` only, None means the defaults, with
            ``config.causal``.

    Raises:
        ValueError: as :class:`DMD2Method`, ``pretrain`` is given without co-training, or the
            student is causal and the settings are not, or the other way round.
    """

    config: OnPolicyConfig

    def __init__(
        self,
        student: Any,
        teacher: Any,
        critic: Any,
        scheduler: FlowMapEulerDiscreteScheduler,
        config: OnPolicyConfig,
        *,
        pretrain: PretrainConfig | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(student, teacher, critic, scheduler, config, process_group=process_group)
        self.pretrain: AnyFlowPretrainMethod | None = None
        if config.cotrain_pretrain:
            settings = PretrainConfig(causal=config.causal) if pretrain is None else pretrain
            self.pretrain = AnyFlowPretrainMethod(
                student,
                scheduler,
                settings,
                teacher=teacher if settings.velocity_target == "teacher" else None,
                process_group=process_group,
            )
        elif pretrain is not None:
            raise ValueError("pretrain is given, but cotrain_pretrain is False")

    @property
    def chunks(self) -> ChunkPartition | None:
        """Return the chunks of a causal student's rollout; None for another student."""
        causal = self.config.causal
        return None if causal is None else training_partition(self.student, causal)

    def rollout(
        self,
        noise: Tensor,
        prompt_embeds: Tensor,
        *,
        num_steps: int,
        grad_step: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Simulate the flow map backwards from noise to clean data.

        ``shortcut`` (14) takes t_0 -> t_g, t_g -> t_{g+1} and t_{g+1} -> 0, without empty segments.
        ``euler`` takes every step of the schedule, with the network's gradient at step g only; the
        later steps carry that gradient to t = 0, so that the result is clean data and not the
        noisy sample at t_{g+1}.

        With ``config.causal`` that is done for each chunk in turn, with the same n and g. What a
        chunk attends to, the chunks before it, is encoded without gradient.

        Args:
            noise: ``[B, F, C, H, W]`` at t_0; with ``config.causal`` F is that of all chunks.
            prompt_embeds: ``[B or 1, S, text_dim]``.
            num_steps: n, length of the schedule.
            grad_step: g in [0, n - 1]; drawn on rank 0 and broadcast when None.
            generator: source of that draw.

        Returns:
            ``[B, F, C, H, W]`` in fp32.
        """
        generator = resolve_generator(generator, noise.device)
        x, text, sigmas, g = self._start(noise, prompt_embeds, num_steps, grad_step, generator)
        if self.config.rollout == "shortcut":
            ends = [0, g, g + 1, num_steps]
            segments = [(a, b) for a, b in pairwise(ends) if a < b]
        else:
            segments = [(i, i + 1) for i in range(num_steps)]
        everywhere = self.config.rollout == "shortcut" and self.config.grad_through == "all"

        def simulate(x: Tensor, **conditions: Any) -> Tensor:
            for a, b in segments:
                with nullcontext() if everywhere or a == g else torch.no_grad():
                    u = self._student(x, sigmas[a], sigmas[b], text, **conditions)
                x = x - float(sigmas[a] - sigmas[b]) * u
            return x

        if self.config.causal is None:
            return simulate(x)
        return self._chunk_by_chunk(x, text, simulate)

    def _chunk_by_chunk(
        self, noise: Tensor, text: Tensor, simulate: Callable[..., Tensor]
    ) -> Tensor:
        """Simulate each chunk after the ones before it, which a cache holds without gradient."""
        assert self.chunks is not None
        partition = ChunkPartition.of(self.chunks.sizes, noise.shape[1])
        cache: ChunkCache = unwrapped(self.student).new_cache(partition.sizes)
        chunks: list[Tensor] = []
        for chunk in range(len(partition)):
            chunks.append(simulate(noise[:, partition.frames(chunk)], cache=cache))
            if chunk + 1 < len(partition):
                finished = {index: latents.detach() for index, latents in enumerate(chunks)}
                with torch.no_grad():
                    encode_chunks(self.student, cache, chunk + 1, finished, text)
        return torch.cat(chunks, dim=1)

    @property
    def _causal(self) -> CausalConfig | None:
        return self.config.causal

    def student_loss(
        self,
        noise: Tensor,
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor | None = None,
        *,
        latents: Tensor | None = None,
        data_prompt_embeds: Tensor | None = None,
        rollout_draw: tuple[int, int] | None = None,
        t: Tensor | None = None,
        score_noise: Tensor | None = None,
        data_noise: Tensor | None = None,
        time_pairs: TimePairs | None = None,
        dropped_prompts: Tensor | None = None,
        image_to_video: bool | None = None,
        num_chunks: int | None = None,
        bidirectional: bool | None = None,
        bidirectional_t: Tensor | None = None,
        bidirectional_noise: Tensor | None = None,
        balance: DiffusionBalance | None = None,
        generator: torch.Generator | None = None,
        offset: int = 0,
    ) -> LossOutput:
        """Compute the student's loss: rollout, (17) and, with co-training, (10) on data.

        Args:
            noise: ``[B, F, C, H, W]`` start of the rollout.
            prompt_embeds: ``[B or 1, S, text_dim]`` of the rollout.
            negative_prompt_embeds: ``[B or 1, S, text_dim]``.
            latents: ``[B', F, C, H, W]`` data batch; required with ``cotrain_pretrain``.
            data_prompt_embeds: prompts of ``latents``; required with ``cotrain_pretrain``.
            rollout_draw: ``num_steps`` and ``grad_step`` of :meth:`rollout`; drawn when None.
            t, score_noise: times and noise of :meth:`generator_loss`.
            data_noise: noise of the pretrain loss.
            time_pairs, dropped_prompts, image_to_video, num_chunks, bidirectional,
                bidirectional_t, bidirectional_noise, balance, offset: as for the pretrain loss,
                :meth:`AnyFlowPretrainMethod.loss`.
            generator: source of every draw.

        Raises:
            ValueError: an input that the configuration needs is missing.
        """
        generator = resolve_generator(generator, noise.device)
        if rollout_draw is None:
            rollout_draw = self.draw_rollout(generator, noise.device)
        num_steps, grad_step = rollout_draw
        samples = self.rollout(
            noise, prompt_embeds, num_steps=num_steps, grad_step=grad_step, generator=generator
        )
        output = self.generator_loss(
            samples,
            prompt_embeds,
            negative_prompt_embeds,
            t=t,
            noise=score_noise,
            generator=generator,
        )
        if self.pretrain is None:
            return output
        if latents is None or data_prompt_embeds is None:
            raise ValueError("cotrain_pretrain=True needs latents and data_prompt_embeds")
        data = self.pretrain.loss(
            latents,
            data_prompt_embeds,
            negative_prompt_embeds,
            noise=data_noise,
            time_pairs=time_pairs,
            dropped_prompts=dropped_prompts,
            image_to_video=image_to_video,
            num_chunks=num_chunks,
            bidirectional=bidirectional,
            bidirectional_t=bidirectional_t,
            bidirectional_noise=bidirectional_noise,
            balance=balance,
            generator=generator,
            offset=offset,
        )
        metrics = {
            **output.metrics,
            **data.metrics,
            "loss_dmd": output.loss.detach(),
            "loss_data": data.loss.detach(),
        }
        loss = output.loss + self.config.cotrain_weight * data.loss
        return LossOutput(loss, metrics, {**output.norms, **data.norms})
