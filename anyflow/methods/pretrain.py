"""Stage 1: regress the average velocity on the flow-map target, with its time derivative by central
difference.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from anyflow.methods.balance import DiffusionBalance
from anyflow.methods.collectives import broadcast_from_rank_zero, rank_and_world
from anyflow.methods.output import LossOutput
from anyflow.methods.pretrain_config import PretrainConfig
from anyflow.methods.time_pairs import TimePairs, sample_time_pairs
from anyflow.models.network import has_flow_map, velocity
from anyflow.ops import flow_map_batch, flow_map_loss, use_backend
from anyflow.schedulers import FlowMapEulerDiscreteScheduler
from anyflow.utils.devices import widest_float
from anyflow.utils.rng import rand, randn_like, resolve_generator
from anyflow.utils.validation import (
    batched_embeds,
    require_finite,
    require_latents,
    require_same_shape,
)


@dataclass(frozen=True)
class _Batch:
    """One step's tensors: x0 and noise in fp32 at least, shifted times in [0, 1], timesteps in [0,
    N].
    """

    x0: Tensor
    noise: Tensor
    text: Tensor
    negative: Tensor | None
    t: Tensor
    r: Tensor
    timestep: Tensor
    r_timestep: Tensor
    rows: Tensor
    is_diffusion: Tensor
    context: Tensor | None  # boolean [F]: frames held clean (image-to-video)


class AnyFlowPretrainMethod:
    """Flow-map pretraining.

    Two network calls per step, whatever the samples: one without gradient on the batch
    ``[x+ ; x- ; x_t uncond]`` (only samples with r != t have ``x+-``), one with gradient on
    ``x_t``. Flow matching proper (``diffusion_ratio=1`` and no guidance) needs only the second.

    Args:
        student: u(x_t, t, r), e.g. :class:`~anyflow.models.AnyFlowTransformer3DModel`. A plain Wan
            model can only be trained by flow matching.
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
        config.check_timesteps(scheduler.config.num_train_timesteps)
        self._plain = not has_flow_map(student)
        if self._plain and not config.is_flow_matching:
            raise ValueError(
                "the student has no second timestep branch (r_embedder=False): call "
                "student.enable_flow_map(), or "
                "train plain flow matching with diffusion_ratio=1 and fuse_guidance_scale=1"
            )

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
        balance: DiffusionBalance | None = None,
        generator: torch.Generator | None = None,
        offset: int = 0,
    ) -> LossOutput:
        """Compute the pretrain loss of one batch, or of one micro-step of an update.

        Args:
            latents: ``[B, F, C, H, W]`` clean data.
            prompt_embeds: ``[B, S, text_dim]``.
            negative_prompt_embeds: ``[B or 1, S, text_dim]``; required unless
                ``fuse_guidance_scale`` is 1 and ``prompt_dropout`` is 0.
            noise: the shape of latents; drawn when None.
            time_pairs: unshifted times; drawn for this rank when None.
            dropped_prompts: ``[B]`` booleans, whose prompts the negative one replaces; drawn when
                None.
            image_to_video: whether frame 0 is kept clean, the same on all ranks; drawn when None.
            balance: of the update that the batch is a part of; None makes the batch a whole update.
            generator: source of every draw; None seeds a fresh one from the operating system.
            offset: rotates the kinds of samples over the ranks; pass the step number.

        Returns:
            ``loss`` and the metrics ``loss_diffusion`` and ``loss_flow_map``: means of the weighted
            losses before balancing, over the samples of that kind of all ranks and of the update so
            far.

        Raises:
            ValueError: shapes do not fit, a needed input is missing, or a CPU input holds NaN.
        """
        losses, is_diffusion = self.sample_losses(
            latents,
            prompt_embeds,
            negative_prompt_embeds,
            noise=noise,
            time_pairs=time_pairs,
            dropped_prompts=dropped_prompts,
            image_to_video=image_to_video,
            generator=generator,
            offset=offset,
        )
        balance = DiffusionBalance(self.process_group) if balance is None else balance
        scales = balance.scales(losses, is_diffusion)
        return LossOutput((losses * scales).mean(), balance.metrics())

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
        generator: torch.Generator | None = None,
        offset: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Compute the weighted loss of each sample before balancing, and which samples are plain
        diffusion.

        Arguments and errors are those of :meth:`loss`.

        Returns:
            Two tensors ``[B]``, the second one boolean.
        """
        generator = resolve_generator(generator, latents.device)
        batch = self._prepare(
            latents,
            prompt_embeds,
            negative_prompt_embeds,
            noise,
            time_pairs,
            dropped_prompts,
            image_to_video,
            generator,
            offset,
        )
        if self.teacher is not None:
            batch = self._along_teacher(batch)
        plus, minus = self._half_widths(batch)
        central = self.config.derivative == "central" and not self.config.is_flow_matching
        x_t, x_no_grad = flow_map_batch(
            batch.x0,
            batch.noise,
            batch.t,
            (plus, minus),
            batch.rows if central else batch.rows[:0],
            with_x_t=central and self.config.fuse_guidance_scale != 1,
        )
        width: float | Tensor = 1.0
        if self.config.is_flow_matching:
            u_plus = u_minus = uncond = None
        elif self.config.derivative == "jvp":
            u_plus, u_minus, uncond = self._jvp(batch, x_t)
        else:
            u_plus, u_minus, uncond = self._central(batch, x_t, x_no_grad, plus, minus)
            width = (plus + minus)[batch.rows]
            width = width.amax(1) if width.ndim == 2 else width  # context frames do not move
        r_timestep = None if self._plain else batch.r_timestep
        pred = velocity(self.student, x_t, batch.timestep, r_timestep, batch.text)
        per_sample = flow_map_loss(
            pred,
            uncond,
            u_plus,
            u_minus,
            batch.x0,
            batch.noise,
            batch.t,
            batch.r,
            self._weight(batch),
            self.config.fuse_guidance_scale,
            width,
            rows=batch.rows,
        )
        return per_sample, batch.is_diffusion

    def _prepare(
        self,
        latents: Tensor,
        prompt_embeds: Tensor,
        negative: Tensor | None,
        noise: Tensor | None,
        pairs: TimePairs | None,
        dropped: Tensor | None,
        image_to_video: bool | None,
        generator: torch.Generator,
        offset: int,
    ) -> _Batch:
        require_latents("latents", latents)
        require_finite("latents", latents)
        config, b, device = self.config, latents.shape[0], latents.device
        text = batched_embeds("prompt_embeds", prompt_embeds, b)
        x0 = latents.to(torch.promote_types(latents.dtype, torch.float32))
        noise = randn_like(x0, generator) if noise is None else noise.to(x0.dtype)
        require_same_shape("noise", noise, "latents", latents)
        require_finite("noise", noise)
        if pairs is None:
            rank, world = rank_and_world(self.process_group)
            pairs = sample_time_pairs(
                b,
                diffusion_ratio=config.diffusion_ratio,
                consistency_ratio=config.consistency_ratio,
                rank=rank,
                world_size=world,
                generator=generator,
                device=device,
                offset=offset,
            )
        elif pairs.t.shape != (b,):
            raise ValueError(f"time_pairs hold {pairs.t.shape[0]} samples, latents hold {b}")
        elif config.is_flow_matching and len(pairs.flow_map_rows()):
            raise ValueError(
                "time_pairs hold samples with r != t, but the settings are those of flow matching"
            )
        if dropped is None and config.prompt_dropout > 0:
            dropped = rand((b,), generator, device) < config.prompt_dropout
        if config.fuse_guidance_scale != 1 or dropped is not None:
            if negative is None:
                raise ValueError(
                    "negative_prompt_embeds is required with "
                    f"fuse_guidance_scale={config.fuse_guidance_scale} and "
                    f"prompt_dropout={config.prompt_dropout}"
                )
            negative = batched_embeds("negative_prompt_embeds", negative, b)
            if dropped is not None:
                # a copy, never in place
                text = torch.where(dropped[:, None, None], negative.to(text.dtype), text)
        context = self._context_frames(latents, image_to_video, generator)
        return self._times(x0, noise, text, negative, pairs, context)

    def _context_frames(
        self, latents: Tensor, image_to_video: bool | None, generator: torch.Generator
    ) -> Tensor | None:
        frames = latents.shape[1]
        if self.config.i2v_prob == 0 and not image_to_video:
            return None
        if frames < 2:
            raise ValueError("i2v_prob > 0 needs at least two latent frames")
        if image_to_video is None:
            coin = broadcast_from_rank_zero(rand((1,), generator).tolist(), latents.device)[0]
            image_to_video = coin < self.config.i2v_prob
        return torch.arange(frames, device=latents.device) == 0 if image_to_video else None

    def _times(
        self,
        x0: Tensor,
        noise: Tensor,
        text: Tensor,
        negative: Tensor | None,
        pairs: TimePairs,
        context: Tensor | None,
    ) -> _Batch:
        """Shift the times, round them to the fp32 timesteps the network will see, and keep what it
        really sees.
        """
        n, wide = self.scheduler.config.num_train_timesteps, widest_float(x0.device)
        timestep = (self.scheduler.apply_shift(pairs.t.to(wide)) * n).float()
        r_timestep = (self.scheduler.apply_shift(pairs.r.to(wide)) * n).float()
        if context is not None:
            timestep = timestep[:, None].where(~context, torch.zeros_like(timestep[:, None]))
            r_timestep = r_timestep[:, None].expand_as(timestep)
        return _Batch(
            x0=x0,
            noise=noise,
            text=text,
            negative=negative,
            t=timestep.to(wide) / n,
            r=r_timestep.to(wide) / n,
            timestep=timestep,
            r_timestep=r_timestep,
            rows=pairs.flow_map_rows(),
            is_diffusion=pairs.is_diffusion,
            context=context,
        )

    @torch.no_grad()
    def _along_teacher(self, batch: _Batch) -> _Batch:
        """Replace data and noise by the ends of the line through x_t whose slope is the teacher's
        velocity there.
        """
        t = batch.t.to(batch.x0.dtype).reshape(
            *batch.t.shape, *[1] * (batch.x0.ndim - batch.t.ndim)
        )
        x_t = torch.lerp(batch.x0, batch.noise, t)
        r_timestep = batch.timestep if has_flow_map(self.teacher) else None
        v = velocity(self.teacher, x_t, batch.timestep, r_timestep, batch.text).to(x_t.dtype)
        return replace(batch, x0=x_t - t * v, noise=x_t + (1 - t) * v)

    def _half_widths(self, batch: _Batch) -> tuple[Tensor, Tensor]:
        """The realized widths t+ - t and t - t-, after rounding t+- to the fp32 timesteps of the
        network.
        """
        n = self.scheduler.config.num_train_timesteps
        epsilon = self.config.epsilon / n
        above, below = batch.t + epsilon, batch.t - epsilon
        if self.config.boundary == "one_sided":
            above, below = above.clamp(max=1.0), below.clamp(min=0.0)
        plus = (above * n).float().to(batch.t.dtype) / n - batch.t
        minus = batch.t - (below * n).float().to(batch.t.dtype) / n
        if batch.context is not None:
            plus, minus = (
                plus.where(~batch.context, 0 * plus),
                minus.where(~batch.context, 0 * minus),
            )
        return plus, minus

    @torch.no_grad()
    def _central(
        self, batch: _Batch, x_t: Tensor, x_no_grad: Tensor, plus: Tensor, minus: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The batched triple forward: ``u(+)``, ``u(-)`` of the flow-map rows and unconditional
        ``u``, in one call.
        """
        guided, rows, n = self.config.fuse_guidance_scale != 1, batch.rows, len(batch.rows)
        steps = self.scheduler.config.num_train_timesteps
        r_rows, text_rows = batch.r_timestep[rows], batch.text[rows]
        r, text = [r_rows, r_rows], [text_rows, text_rows]
        t = [((batch.t + plus)[rows] * steps).float(), ((batch.t - minus)[rows] * steps).float()]
        if guided:
            assert batch.negative is not None
            t.append(batch.timestep)
            r.append(batch.r_timestep)
            text.append(batch.negative.to(batch.text.dtype))
        elif n == 0:  # under FSDP every rank must call the network as often as the others
            velocity(
                self.student, x_t[:1], batch.timestep[:1], batch.r_timestep[:1], batch.text[:1]
            )
            return None, None, None
        out = velocity(self.student, x_no_grad, torch.cat(t), torch.cat(r), torch.cat(text))
        uncond = out[2 * n :] if guided else None
        return (out[:n], out[n : 2 * n], uncond) if n else (None, None, uncond)

    @torch.no_grad()
    def _jvp(
        self, batch: _Batch, x_t: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dF/dt by forward-mode differentiation along (eps - x0, 1), returned as a difference of
        width 1.
        """
        rows, text = batch.rows, batch.text[batch.rows]
        uncond = None
        if self.config.fuse_guidance_scale != 1:
            assert batch.negative is not None
            uncond = velocity(
                self.student,
                x_t,
                batch.timestep,
                batch.r_timestep,
                batch.negative.to(batch.text.dtype),
            )
        if len(rows) == 0:  # as many calls as the other ranks make, as in _central
            velocity(
                self.student, x_t[:1], batch.timestep[:1], batch.r_timestep[:1], batch.text[:1]
            )
            return None, None, uncond
        speed = torch.full_like(
            batch.timestep[rows], float(self.scheduler.config.num_train_timesteps)
        )
        direction = (batch.noise - batch.x0)[rows]
        if batch.context is not None:
            moving = ~batch.context
            speed, direction = speed * moving, direction * moving.reshape(-1, 1, 1, 1)

        def at(x: Tensor, timestep: Tensor) -> Tensor:
            return velocity(self.student, x, timestep, batch.r_timestep[rows], text)

        from anyflow.models.attention import use_attention_backend  # loads diffusers

        with sdpa_kernel(SDPBackend.MATH), use_attention_backend("math"), use_backend("eager"):
            slope = torch.func.jvp(at, (x_t[rows], batch.timestep[rows]), (direction, speed))[1]
        return slope, torch.zeros_like(slope), uncond

    def _weight(self, batch: _Batch) -> Tensor:
        weight = self.scheduler.get_train_weight(batch.timestep)
        if batch.context is None:
            return weight
        frames = batch.context.shape[0]
        # the mean runs over the frames that are denoised
        return weight * ~batch.context * (frames / (frames - 1))
