"""Regress the average velocity on the flow map's own identity (stage 1).

Equation numbers are those of docs/algorithm.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anyflow.methods.balance import DiffusionBalance
from anyflow.methods.bidirectional import bidirectional_losses
from anyflow.methods.causal import check_causal
from anyflow.methods.central_difference import central_difference
from anyflow.methods.collectives import broadcast_from_rank_zero, rank_and_world
from anyflow.methods.jvp import jvp
from anyflow.methods.output import LossOutput
from anyflow.methods.pretrain_config import PretrainConfig
from anyflow.methods.pretrain_inputs import (
    PretrainData,
    PretrainTimes,
    TargetTerms,
    clean_latents,
    noise_like,
    noised,
    required_negative,
)
from anyflow.methods.time_pairs import TimePairs, sample_time_pairs
from anyflow.methods.training_chunks import TrainingChunks
from anyflow.models.chunks import ChunkPartition
from anyflow.models.network import has_flow_map, require_bidirectional, velocity
from anyflow.ops import flow_map_loss
from anyflow.schedulers import FlowMapEulerDiscreteScheduler
from anyflow.utils.rng import rand, randn_like, resolve_generator
from anyflow.utils.validation import (
    batched_embeds,
)


@dataclass(frozen=True)
class _Draws:
    """Hold the draws that a caller has made, None for those to be made, and the generator."""

    noise: Tensor | None
    time_pairs: TimePairs | None
    dropped_prompts: Tensor | None
    image_to_video: bool | None
    num_chunks: int | None
    generator: torch.Generator
    offset: int


class AnyFlowPretrainMethod:
    """Compute the loss of flow-map pretraining.

    Each step calls the network twice, whatever the samples: once without gradient on the batch
    ``[x₊ ; x₋ ; x_t uncond]`` (only samples with r != t have ``x±``), and once with gradient on
    ``x_t``. Flow matching (``diffusion_ratio=1`` and no guidance) needs the second call only.

    With ``config.causal`` the loss is that of the causal model on the first n chunks of a video:
    the last L of them are noisy, with a clean copy, and those before them are compressed and clean.
    Some updates add :meth:`bidirectional_loss`, which calls the network twice more.

    Args:
        student: u(x_t, t, r), e.g. :class:`~anyflow.models.AnyFlowTransformer3DModel`. A plain Wan
            model can only be trained by flow matching. With ``config.causal`` the causal model.
        scheduler: gives the shift, the timestep range and the training weight.
        config: settings.
        teacher: plain Wan model or flow map whose velocity is the target; with
            ``velocity_target="teacher"``, and only then.
        process_group: the ranks with samples of their own, over which kinds are shared out and
            means are taken; None for all processes.

    Raises:
        ValueError: the settings do not fit the scheduler, the student or the teacher.
    """

    def __init__(
        self,
        student: Any,
        scheduler: FlowMapEulerDiscreteScheduler,
        config: PretrainConfig,
        *,
        teacher: Any = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if (config.velocity_target == "teacher") != (teacher is not None):
            raise ValueError(
                f"velocity_target={config.velocity_target!r} and "
                f"teacher={'None' if teacher is None else 'a network'} "
                "do not fit: the target 'teacher' needs one, 'data' takes none"
            )
        self.student = student
        self.teacher = teacher
        self.scheduler = scheduler
        self.config = config
        self.process_group = process_group
        check_causal(student, config.causal)
        require_bidirectional(teacher=teacher)
        self._chunks = None if config.causal is None else TrainingChunks(student, config.causal)
        config.check_timesteps(scheduler.config.num_train_timesteps)
        self._plain = not has_flow_map(student)
        if self._plain and not config.is_flow_matching:
            raise ValueError(
                "the student has no second timestep branch (r_embedder=False): call "
                "student.enable_flow_map(), or "
                "train plain flow matching with diffusion_ratio=1 and fuse_guidance_scale=1"
            )

    @property
    def chunks(self) -> ChunkPartition | None:
        """Return the chunks of a training video of a causal student; None for another student."""
        return None if self._chunks is None else self._chunks.partition

    def loss(
        self,
        latents: Tensor,
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor | None = None,
        *,
        noise: Tensor | None = None,
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
        """Compute the pretrain loss of one batch, or of one micro-step of an update.

        Args:
            latents: ``[B, F, C, H, W]`` clean data; with ``config.causal`` F is that of all chunks.
            prompt_embeds: ``[B, S, text_dim]``.
            negative_prompt_embeds: ``[B or 1, S, text_dim]``; required unless
                ``fuse_guidance_scale`` is 1 and ``prompt_dropout`` is 0.
            noise: the shape of latents; drawn when None. With ``config.causal`` only that of the
                noisy chunks is read.
            time_pairs: unshifted times; drawn for this rank when None.
            dropped_prompts: ``[B]`` booleans, whose prompts the negative one replaces; drawn when
                None.
            image_to_video: whether frame 0 is kept clean, the same on all ranks; drawn when None.
            num_chunks: n, the first chunks of the videos that a causal student sees, the same on
                all ranks; :meth:`draw_num_chunks` when None.
            bidirectional: whether :meth:`bidirectional_loss` is added, the same on all ranks;
                drawn when None.
            bidirectional_t, bidirectional_noise: ``t`` and ``noise`` of that loss.
            balance: balance of the update that the batch is a part of; None makes the batch a whole
                update.
            generator: source of every draw; None seeds a fresh one from the operating system.
            offset: rotates the kinds of samples over the ranks; pass the step number.

        Returns:
            The loss of (12), and the metrics ``loss_diffusion`` and ``loss_flow_map``: means of the
            weighted losses before balancing, over the samples of that kind of all ranks and of the
            update so far. ``loss_bidirectional`` is the loss that is added, where one is.

        Raises:
            ValueError: shapes do not fit, a needed input is missing, a CPU input holds NaN, or
                chunks are given to a bidirectional student.
        """
        if bidirectional:
            self._causal_chunks("bidirectional=True")
        generator = resolve_generator(generator, latents.device)
        draws = _Draws(
            noise, time_pairs, dropped_prompts, image_to_video, num_chunks, generator, offset
        )
        data, times = self._batch(latents, prompt_embeds, negative_prompt_embeds, draws)
        losses, norms = self._losses(data, times)
        balance = DiffusionBalance(self.process_group) if balance is None else balance
        scales = balance.scales(losses, times.is_diffusion)  # (12)
        output = LossOutput((losses * scales).mean(), balance.metrics(), norms)
        if bidirectional is None and self._chunks is not None:
            bidirectional = self._chunks.draw_bidirectional(generator, latents.device)
        if not bidirectional:
            return output
        added = self.bidirectional_loss(
            latents,
            data.text,
            data.negative,
            t=bidirectional_t,
            noise=bidirectional_noise,
            generator=generator,
        )
        metrics = {**output.metrics, "loss_bidirectional": added.loss.detach()}
        return LossOutput(output.loss + added.loss, metrics, norms)

    def bidirectional_loss(
        self,
        latents: Tensor,
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor | None = None,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> LossOutput:
        """Compute flow matching of a causal student's weights as a bidirectional model.

        All frames are noisy at one time t = r and see each other. The loss is (10) with guidance
        (9), and without a weight.

        Args:
            latents: ``[B, F, C, H, W]`` clean data.
            prompt_embeds: ``[B, S, text_dim]``; none is dropped here.
            negative_prompt_embeds: ``[B or 1, S, text_dim]``; required unless
                ``fuse_guidance_scale`` is 1.
            t: ``[B]`` in [0, 1], before the shift; logit-normal(0, 1) when None.
            noise: the shape of latents; drawn when None.
            generator: source of the draws; None seeds a fresh one from the operating system.

        Raises:
            ValueError: the student is not causal, or as :meth:`loss`.
        """
        self._causal_chunks("bidirectional_loss")
        generator = resolve_generator(generator, latents.device)
        x0 = clean_latents(latents)
        text = batched_embeds("prompt_embeds", prompt_embeds, len(x0))
        negative = None
        if self.config.fuse_guidance_scale != 1:
            negative = required_negative(negative_prompt_embeds, text, self.config)
        t = randn_like(x0[:, 0, 0, 0, 0], generator).sigmoid() if t is None else t
        data = PretrainData(x0, noise_like(x0, noise, generator), text, negative)
        guidance = self.config.fuse_guidance_scale
        losses = bidirectional_losses(self.student, data, t, self.scheduler, guidance)
        return LossOutput(losses.mean())

    def draw_num_chunks(
        self, generator: torch.Generator | None = None, device: torch.device | None = None
    ) -> int:
        """Draw n, the first chunks of the videos of a loss, on rank 0, for every rank.

        With probability ``long_context_ratio`` n is uniform from L to all chunks; else n = L.
        """
        return self._causal_chunks("draw_num_chunks").draw_num_chunks(generator, device)

    def draw_bidirectional(
        self, generator: torch.Generator | None = None, device: torch.device | None = None
    ) -> bool:
        """Draw on rank 0, for every rank, whether :meth:`bidirectional_loss` is added."""
        return self._causal_chunks("draw_bidirectional").draw_bidirectional(generator, device)

    def sample_losses(
        self,
        latents: Tensor,
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        time_pairs: TimePairs | None = None,
        dropped_prompts: Tensor | None = None,
        image_to_video: bool | None = None,
        num_chunks: int | None = None,
        generator: torch.Generator | None = None,
        offset: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Compute the weighted loss (10) of each sample before balancing.

        No bidirectional loss is added. Arguments and errors are those of :meth:`loss`.

        Returns:
            Losses ``[B]``, and booleans ``[B]`` that mark the samples of plain diffusion.
        """
        generator = resolve_generator(generator, latents.device)
        draws = _Draws(
            noise, time_pairs, dropped_prompts, image_to_video, num_chunks, generator, offset
        )
        data, times = self._batch(latents, prompt_embeds, negative_prompt_embeds, draws)
        return self._losses(data, times)[0], times.is_diffusion

    def _losses(self, data: PretrainData, times: PretrainTimes) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted losses ``[B]`` of (10), and the norm of the teacher's velocity."""
        norms: dict[str, Tensor] = {}
        if self.teacher is not None:
            data, norms["velocity of the teacher"] = self._along_teacher(data, times)  # (13)
        x_t, terms = self._target_terms(data, times)  # (1), (8)
        r_timestep = None if self._plain else times.r_timestep
        losses = flow_map_loss(  # (9), (10)
            pred=data.velocity(self.student, x_t, times.timestep, r_timestep, data.text),
            uncond=terms.uncond,
            u_plus=terms.u_plus,
            u_minus=terms.u_minus,
            latents=data.x0,
            noise=data.noise,
            t=times.t,
            r=times.r,
            weight=self._weight(times),  # (11)
            guidance=self.config.fuse_guidance_scale,
            width=terms.width,
            picked=times.picked,
        )
        return losses, norms

    def _target_terms(self, data: PretrainData, times: PretrainTimes) -> tuple[Tensor, TargetTerms]:
        """Return x_t, and all that the target takes from the student without a gradient."""
        if self.config.is_flow_matching:
            return noised(data, times), TargetTerms()
        if self.config.derivative == "jvp":
            return jvp(self.student, data, times, self.scheduler.config.num_train_timesteps)
        return central_difference(self.student, data, times)

    @torch.no_grad()
    def _along_teacher(
        self, data: PretrainData, times: PretrainTimes
    ) -> tuple[PretrainData, Tensor]:
        """Replace data and noise by the ends of the line through x_t with the teacher's slope.

        Returns the new data and the norm of the teacher's velocity.
        """
        t = times.t.to(data.x0.dtype)
        t = t.reshape(*t.shape, *[1] * (data.x0.ndim - t.ndim))
        x_t = torch.lerp(data.x0, data.noise, t)
        r_timestep = times.timestep if has_flow_map(self.teacher) else None
        v = velocity(self.teacher, x_t, times.timestep, r_timestep, data.text).to(x_t.dtype)
        ends = replace(data, x0=x_t - t * v, noise=x_t + (1 - t) * v)
        return ends, torch.linalg.vector_norm(v)

    def _weight(self, times: PretrainTimes) -> Tensor:
        """Return w(t) of (11), ``[B]`` or ``[B, F]``."""
        weight = self.scheduler.get_train_weight(times.timestep)
        if times.first_frames is None:
            return weight
        frames = times.first_frames.shape[0]
        # the mean of the loss is over all frames, of which one is held clean
        return weight * ~times.first_frames * (frames / (frames - 1))

    # Inputs ---------------------------------------------------------------------------------------

    def _batch(
        self, latents: Tensor, prompt_embeds: Tensor, negative: Tensor | None, draws: _Draws
    ) -> tuple[PretrainData, PretrainTimes]:
        """Check the inputs, shift the times, and make the missing draws in a fixed order."""
        x0 = clean_latents(latents)
        text = batched_embeds("prompt_embeds", prompt_embeds, latents.shape[0])
        noise = noise_like(x0, draws.noise, draws.generator)
        pairs = self._time_pairs(latents, draws)
        text, negative = self._prompts(text, negative, draws)
        times = PretrainTimes.from_pairs(
            pairs,
            self.scheduler,
            epsilon=self.config.epsilon,
            one_sided=self.config.boundary == "one_sided",
            first_frames=self._first_frames(latents, draws),
        )
        return self._on_chunks(PretrainData(x0, noise, text, negative), draws), times

    def _on_chunks(self, data: PretrainData, draws: _Draws) -> PretrainData:
        """Keep the noisy frames of a causal student's first chunks, and what they attend to."""
        if self._chunks is not None:
            return self._chunks.select(data, draws.num_chunks, draws.generator)
        if draws.num_chunks is not None:
            self._causal_chunks("num_chunks")
        return data

    def _causal_chunks(self, name: str) -> TrainingChunks:
        """Return the chunks of a causal student, or raise a ValueError that names the request."""
        if self._chunks is None:
            raise ValueError(f"{name} is of the causal model: it needs config.causal")
        return self._chunks

    def _time_pairs(self, latents: Tensor, draws: _Draws) -> TimePairs:
        """Return the given times, or draw those of this rank's samples (7)."""
        pairs, b = draws.time_pairs, latents.shape[0]
        if pairs is None:
            rank, world = rank_and_world(self.process_group)
            return sample_time_pairs(
                b,
                diffusion_ratio=self.config.diffusion_ratio,
                consistency_ratio=self.config.consistency_ratio,
                rank=rank,
                world_size=world,
                generator=draws.generator,
                device=latents.device,
                offset=draws.offset,
            )
        if pairs.t.shape != (b,):
            raise ValueError(f"time_pairs hold {pairs.t.shape[0]} samples, latents hold {b}")
        if self.config.is_flow_matching and len(pairs.flow_map_indices()):
            raise ValueError(
                "time_pairs hold samples with r != t, but the settings are those of flow matching"
            )
        return pairs

    def _prompts(
        self, text: Tensor, negative: Tensor | None, draws: _Draws
    ) -> tuple[Tensor, Tensor | None]:
        """Replace the dropped prompts, and return the negative ones where the loss is guided."""
        config, b, dropped = self.config, text.shape[0], draws.dropped_prompts
        if dropped is None and config.prompt_dropout > 0:
            dropped = rand((b,), draws.generator, text.device) < config.prompt_dropout
        guided = config.fuse_guidance_scale != 1
        if not guided and dropped is None:
            return text, None
        negative = required_negative(negative, text, config)
        if dropped is not None:
            text = torch.where(dropped[:, None, None], negative, text)  # the caller's is left alone
        return text, negative if guided else None

    def _first_frames(self, latents: Tensor, draws: _Draws) -> Tensor | None:
        """Mark the frames ``[F]`` that image to video holds clean; None in a step without it."""
        frames, image_to_video = latents.shape[1], draws.image_to_video
        if self.config.i2v_prob == 0 and not image_to_video:
            return None
        if frames < 2:
            raise ValueError("i2v_prob > 0 needs at least two latent frames")
        if image_to_video is None:
            coin = rand((1,), draws.generator).tolist()
            coin = broadcast_from_rank_zero(coin, latents.device)
            image_to_video = coin[0] < self.config.i2v_prob
        return torch.arange(frames, device=latents.device) == 0 if image_to_video else None
