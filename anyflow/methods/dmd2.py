"""Compute the losses of DMD2, distribution matching with a student that re-noises.

Equation numbers are those of docs/algorithm.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from anyflow.methods.causal import CausalConfig, check_causal
from anyflow.methods.collectives import broadcast_from_rank_zero
from anyflow.methods.output import LossOutput
from anyflow.models.network import has_flow_map, require_bidirectional, velocity
from anyflow.schedulers import FlowMapEulerDiscreteScheduler
from anyflow.utils.rng import rand, randn_like, resolve_generator
from anyflow.utils.validation import (
    SettingError,
    batched_embeds,
    require_finite,
    require_latents,
    require_number,
    require_same_shape,
    require_whole,
)

_TINY = 1e-6  # keeps the gradient finite where the teacher already agrees with the sample


@dataclass(frozen=True)
class DMD2Config:
    """Hold the settings that the distribution-matching methods share.

    Args:
        real_guidance_scale: s >= 0 of the teacher score, ``cond + s (cond - uncond)``; 0 runs no
            unconditional forward.
        min_timestep: lower clamp of the score's timestep, after the shift.
        max_timestep: upper clamp, at most num_train_timesteps.
        num_steps: numbers of steps, one of which is drawn for each rollout.
        timesteps: a pinned rollout schedule in timesteps, in place of ``num_steps``.
        dmd_score_r: the second timestep of both scores: ``"t"`` or ``"zero"``.

    Raises:
        SettingError: a value is out of range.
    """

    real_guidance_scale: float = 3.0
    min_timestep: float = 20.0
    max_timestep: float = 980.0
    num_steps: tuple[int, ...] = (2, 4, 8, 16, 50)
    timesteps: tuple[float, ...] | None = None
    dmd_score_r: str = "t"

    def __post_init__(self) -> None:
        require_number("real_guidance_scale", self.real_guidance_scale, least=0)
        require_number("min_timestep", self.min_timestep)
        require_number("max_timestep", self.max_timestep)
        for timestep in () if self.timesteps is None else self.timesteps:
            require_number("timesteps", timestep)
        if not 0 <= self.min_timestep < self.max_timestep:
            raise SettingError(
                "",
                f"need 0 <= min_timestep < max_timestep, got {self.min_timestep} and "
                f"{self.max_timestep}",
            )
        if not self.num_steps or min(self.num_steps) < 1:
            raise SettingError("num_steps", f"must hold positive counts, got {self.num_steps}")
        for count in self.num_steps:
            require_whole("num_steps", count, most=10**6)
        if self.dmd_score_r not in ("t", "zero"):
            raise SettingError("dmd_score_r", f"must be 't' or 'zero', got {self.dmd_score_r!r}")

    def check_timesteps(self, num_train_timesteps: int) -> None:
        """Raise a SettingError unless ``max_timestep`` is in a scheduler's range of timesteps."""
        if self.max_timestep > num_train_timesteps:
            raise SettingError(
                "max_timestep",
                f"must be at most num_train_timesteps={num_train_timesteps}, "
                f"got {self.max_timestep}",
            )


class RolloutDraw(NamedTuple):
    """Hold what all ranks draw alike for a rollout.

    Attributes:
        num_steps: n, length of its schedule.
        grad_step: g in [0, n - 1], the step that carries gradient.
    """

    num_steps: int
    grad_step: int


class DMD2Method:
    """Compute the losses of distribution matching for a student that re-noises between steps.

    Args:
        student: the network that is trained on its own samples.
        teacher: the real score; evaluated without gradient.
        critic: the fake score; trained by :meth:`critic_loss`.
        scheduler: gives the shift and the timestep range; its sampling state is not used.
        config: settings.
        process_group: the ranks with samples of their own; None for all processes.

    Raises:
        ValueError: the settings do not fit the scheduler or the networks.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        critic: Any,
        scheduler: FlowMapEulerDiscreteScheduler,
        config: DMD2Config,
        *,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.student, self.teacher, self.critic = student, teacher, critic
        self.scheduler, self.config, self.process_group = scheduler, config, process_group
        config.check_timesteps(scheduler.config.num_train_timesteps)
        check_causal(student, self._causal)
        require_bidirectional(teacher=teacher, critic=critic)
        if not has_flow_map(student):
            raise ValueError(
                "the student has no second timestep branch (r_embedder=False): call "
                "enable_flow_map()"
            )
        for name, network in (("teacher", teacher), ("critic", critic)):
            if config.dmd_score_r == "zero" and not has_flow_map(network):
                raise ValueError(f"dmd_score_r='zero' needs a {name} with a second timestep branch")
        self.schedule()  # a pinned schedule that cannot work fails here, not in the first rollout

    @property
    def _causal(self) -> CausalConfig | None:
        """Return the settings of a causal student; this method has none."""
        return None

    # Rollout --------------------------------------------------------------------------------------

    def schedule(self, num_steps: int | None = None) -> Tensor:
        """Return a rollout's sigmas ``[n + 1]``: pinned ones, or ``S(linspace(1, 0, n + 1))``."""
        if self.config.timesteps is None:
            return self.scheduler.schedule(
                self.config.num_steps[0] if num_steps is None else num_steps
            )
        sigmas = self.scheduler.schedule(timesteps=self.config.timesteps)
        if num_steps is not None and num_steps != len(sigmas) - 1:
            raise ValueError(
                f"num_steps={num_steps}, but the pinned timesteps have {len(sigmas) - 1} steps"
            )
        return sigmas

    def draw_rollout(
        self, generator: torch.Generator | None = None, device: torch.device | None = None
    ) -> RolloutDraw:
        """Draw length and gradient step of a rollout uniformly on rank 0, for every rank."""
        generator = resolve_generator(generator, device)
        u, v = rand((2,), generator).tolist()
        choices = (
            self.config.num_steps if self.config.timesteps is None else (len(self.schedule()) - 1,)
        )
        num_steps = choices[min(int(u * len(choices)), len(choices) - 1)]
        grad_step = min(int(v * num_steps), num_steps - 1)
        shared = broadcast_from_rank_zero([num_steps, grad_step], device or torch.device("cpu"))
        return RolloutDraw(int(shared[0]), int(shared[1]))

    def rollout(
        self,
        noise: Tensor,
        prompt_embeds: Tensor,
        *,
        num_steps: int,
        grad_step: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Jump to t = 0 and re-noise ``grad_step`` times, then jump once with gradient.

        Args:
            noise: ``[B, F, C, H, W]``.
            prompt_embeds: ``[B or 1, S, text_dim]``.
            num_steps: length of the schedule.
            grad_step: index of the evaluation that carries gradient and whose result is returned;
                drawn when None.
            generator: source of the draws.

        Returns:
            ``[B, F, C, H, W]`` clean samples in fp32.
        """
        generator = resolve_generator(generator, noise.device)
        x, text, sigmas, grad_step = self._start(
            noise, prompt_embeds, num_steps, grad_step, generator
        )
        for i in range(grad_step):
            with torch.no_grad():
                clean = x - float(sigmas[i]) * self._student(x, sigmas[i], sigmas[-1], text)
                following = float(sigmas[i + 1])
                x = (1 - following) * clean + following * randn_like(clean, generator)
        return x - float(sigmas[grad_step]) * self._student(x, sigmas[grad_step], sigmas[-1], text)

    def _start(
        self,
        noise: Tensor,
        prompt_embeds: Tensor,
        num_steps: int,
        grad_step: int | None,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        require_latents("noise", noise)
        require_finite("noise", noise)
        sigmas = self.schedule(num_steps)
        if grad_step is None:
            drawn = int(rand((1,), generator).item() * num_steps)
            grad_step = int(broadcast_from_rank_zero([min(drawn, num_steps - 1)], noise.device)[0])
        if not 0 <= grad_step < num_steps:
            raise ValueError(f"grad_step must be in [0, {num_steps - 1}], got {grad_step}")
        x = noise.to(torch.promote_types(noise.dtype, torch.float32))
        return x, batched_embeds("prompt_embeds", prompt_embeds, noise.shape[0]), sigmas, grad_step

    def _student(
        self, x: Tensor, sigma: Tensor, sigma_r: Tensor, text: Tensor, **conditions: Any
    ) -> Tensor:
        n, b = self.scheduler.config.num_train_timesteps, x.shape[0]
        times = [
            torch.full((b,), float(s) * n, dtype=torch.float32, device=x.device)
            for s in (sigma, sigma_r)
        ]
        return velocity(self.student, x, times[0], times[1], text, **conditions)

    # Losses ---------------------------------------------------------------------------------------

    def generator_loss(
        self,
        samples: Tensor,
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor | None = None,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> LossOutput:
        """Compute ``mse(samples, stopgrad(samples - gradient))``, (17), of :func:`dmd_gradient`.

        Args:
            samples: ``[B, F, C, H, W]`` from :meth:`rollout`, with gradient.
            prompt_embeds: ``[B or 1, S, text_dim]``.
            negative_prompt_embeds: ``[B or 1, S, text_dim]``; required unless
                ``real_guidance_scale`` is 0.
            t: ``[B]`` uniform in [0, 1], before the shift and the clamp; drawn when None.
            noise: the shape of samples; drawn when None.
            generator: source of the draws.

        Returns:
            ``loss`` and the metrics ``dmd_gradient`` and ``dmd_distance`` (mean magnitudes).
        """
        x0 = _clean(samples)
        generator = resolve_generator(generator, samples.device)
        t = rand((samples.shape[0],), generator, samples.device) if t is None else t
        x_t, timestep, noise = self._noised(x0, t, noise, generator)
        text = batched_embeds("prompt_embeds", prompt_embeds, samples.shape[0])
        with torch.no_grad():
            fake = self._score(self.critic, x_t, timestep, text)
            real = self._guided_score(x_t, timestep, text, negative_prompt_embeds)
            sigma = timestep.to(x0.dtype) / self.scheduler.config.num_train_timesteps
            gradient = dmd_gradient(x0, noise, sigma, real, fake)
        loss = (samples.to(x0.dtype) - (x0 - gradient)).square().mean()
        norms = {
            "rollout of the student": x0,
            "score of the teacher": real,
            "score of the critic": fake,
        }
        return LossOutput(
            loss,
            {"dmd_gradient": gradient.abs().mean(), "dmd_distance": (real - fake).abs().mean()},
            {name: torch.linalg.vector_norm(x) for name, x in norms.items()},
        )

    def critic_loss(
        self,
        samples: Tensor,
        prompt_embeds: Tensor,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> LossOutput:
        """Compute the critic's flow-matching loss (18) on detached samples, unweighted.

        Args:
            samples: ``[B, F, C, H, W]``; no gradient flows into them.
            prompt_embeds: ``[B or 1, S, text_dim]``.
            t: ``[B]`` in [0, 1], before the shift and the clamp; logit-normal(0, 1) when None.
            noise: the shape of samples; drawn when None.
            generator: source of the draws.
        """
        x0 = _clean(samples)
        generator = resolve_generator(generator, samples.device)
        t = randn_like(x0[:, 0, 0, 0, 0], generator).sigmoid() if t is None else t
        x_t, timestep, noise = self._noised(x0, t, noise, generator)
        text = batched_embeds("prompt_embeds", prompt_embeds, samples.shape[0])
        score = self._score(self.critic, x_t, timestep, text)
        norms = {"rollout of the student": x0, "score of the critic": score.detach()}
        return LossOutput(
            (score - (noise - x0)).square().mean(),
            norms={name: torch.linalg.vector_norm(x) for name, x in norms.items()},
        )

    def _noised(
        self, x0: Tensor, t: Tensor, noise: Tensor | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, Tensor]:
        if t.shape != x0.shape[:1]:
            raise ValueError(f"t must be [B={x0.shape[0]}], got {tuple(t.shape)}")
        if t.device.type == "cpu" and not bool(((t >= 0) & (t <= 1)).all()):
            raise ValueError(f"t must be in [0, 1] (before the shift), got {t.tolist()}")
        noise = randn_like(x0, generator) if noise is None else noise.to(x0.dtype)
        require_same_shape("noise", noise, "samples", x0)
        timestep = self.scheduler.apply_shift(t.float()) * self.scheduler.config.num_train_timesteps
        timestep = timestep.clamp(self.config.min_timestep, self.config.max_timestep)
        return self.scheduler.scale_noise(x0, timestep, noise), timestep, noise

    def _score(self, network: Any, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        if not has_flow_map(network):  # the plain path is the score at r = t
            return velocity(network, x, timestep, None, text)
        r = timestep if self.config.dmd_score_r == "t" else torch.zeros_like(timestep)
        return velocity(network, x, timestep, r, text)

    def _guided_score(
        self, x: Tensor, timestep: Tensor, text: Tensor, negative: Tensor | None
    ) -> Tensor:
        """Return ``v_c + s (v_c - v_u)`` of (15), both velocities from one network call.

        Guidance in x0 space is the same linear map of velocities.
        """
        scale = self.config.real_guidance_scale
        if scale == 0:
            return self._score(self.teacher, x, timestep, text)
        if negative is None:
            raise ValueError(f"real_guidance_scale={scale} needs negative_prompt_embeds")
        negative = batched_embeds("negative_prompt_embeds", negative, x.shape[0]).to(text.dtype)
        both = torch.cat([text, negative])
        cond, uncond = self._score(self.teacher, torch.cat([x, x]), timestep.repeat(2), both).chunk(
            2
        )
        return cond + scale * (cond - uncond)


def _clean(samples: Tensor) -> Tensor:
    # whether they are finite is not read here: LossOutput.norms blames the network that made them
    require_latents("samples", samples)
    return samples.detach().to(torch.promote_types(samples.dtype, torch.float32))


def dmd_gradient(
    samples: Tensor, noise: Tensor, sigma: Tensor, real: Tensor, fake: Tensor
) -> Tensor:
    """Return the gradient (16), ``(x0_fake - x0_real) / (mean |x - x0_real| + tiny)`` per sample.

    The differences are formed from velocities, ``x0_fake - x0_real = sigma (v_real - v_fake)`` and
    ``x - x0_real = sigma (v_real - (noise - x))``, so that no two large numbers cancel.

    Args:
        samples: x, ``[B, ...]``.
        noise: the shape of samples.
        sigma: ``[B]`` in [0, 1].
        real: teacher velocity at the noised samples.
        fake: critic velocity there.
    """
    real, fake = real.to(samples.dtype), fake.to(samples.dtype)
    scale = sigma.reshape(-1, *[1] * (samples.ndim - 1))
    distance = (scale * (real - (noise - samples))).abs().flatten(1).mean(1)
    return scale * (real - fake) / (distance.reshape(scale.shape) + _TINY)
