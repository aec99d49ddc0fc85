"""Evaluate the guided velocity along a schedule, and find NaN at the end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from anyflow.models.network import evaluate, has_flow_map
from anyflow.schedulers import FlowMapEulerDiscreteScheduler
from anyflow.utils.transfer import device_tensor, to_device
from anyflow.utils.validation import (
    FiniteCheck,
    batched_embeds,
    numbered,
    overflow_advice,
    require_finite,
    require_latents,
)

Callback = Callable[[int, float, Tensor], Tensor | None]
Schedule = Sequence[float] | Tensor


class GuidedNetwork:
    """Evaluate the guided velocity at each step of a schedule, and check it for NaN at the end."""

    def __init__(
        self,
        model: Any,
        noise: Tensor,
        prompt_embeds: Tensor,
        guidance_scale: float,
        negative: Tensor | None,
    ) -> None:
        require_latents("noise", noise)
        require_finite("noise", noise)
        self.finite = FiniteCheck()
        self.finite.note("noise", noise)
        self.model, self.frames, self.device = model, noise.shape[1], noise.device
        self.steps_done = 0
        self.condition(noise, prompt_embeds, guidance_scale, negative)

    def condition(
        self, noise: Tensor, prompt_embeds: Tensor, guidance_scale: float, negative: Tensor | None
    ) -> None:
        """Take texts ``[B or 1, S, text_dim]`` and a guidance for the evaluations that follow.

        Raises:
            ValueError: they do not fit the videos of ``noise``.
        """
        if not 0 < guidance_scale < math.inf:
            raise ValueError(
                f"guidance_scale must be > 0 and finite (1 means no guidance), got {guidance_scale}"
            )
        text = self._embeds("prompt_embeds", prompt_embeds, noise)
        if guidance_scale != 1:
            if negative is None:
                raise ValueError(f"guidance_scale={guidance_scale} needs negative_prompt_embeds")
            negative = self._embeds("negative_prompt_embeds", negative, noise)
            if negative.shape != text.shape:
                raise ValueError(
                    "negative_prompt_embeds must have the shape of prompt_embeds, "
                    f"{tuple(text.shape)} for the videos, got {tuple(negative.shape)}"
                )
            text = torch.cat([negative, text])
        self.guidance_scale, self.guided = guidance_scale, guidance_scale != 1
        self.text, self.batch_size = text, len(text)

    def _embeds(self, name: str, embeds: Tensor, noise: Tensor) -> Tensor:
        embeds = batched_embeds(name, embeds, noise.shape[0])
        require_finite(name, embeds)
        self.finite.note(name, embeds)
        return embeds

    def note(self, latents: Tensor) -> None:
        """Note the latents after the next step."""
        self.steps_done += 1
        self.finite.note(str(self.steps_done), latents)

    def checked(self, result: Tensor) -> Tensor:
        """Return the result if neither it nor anything noted holds NaN or infinity.

        Raises:
            ValueError: a tensor given to the sampler does.
            FloatingPointError: the latents do after a step, or overflow when they are rounded to
                the result's dtype.
        """
        self.finite.note(str(self.steps_done), result)
        found = self.finite.first()
        if found is None:
            return result
        name, picked, count = found
        if not name.isdecimal():
            raise ValueError(f"{name} holds NaN or infinite values ({numbered(picked, count)})")
        raise FloatingPointError(
            f"the latents of {numbered(picked, count)} are not finite (NaN or infinity) after step "
            f"{name} of {self.steps_done}: {overflow_advice(self.model, result)}"
        )

    def set_times(self, times: list[float], targets: list[float] | None, kept: int) -> None:
        """Put the times of all steps on the device: one per step, or one per step and frame.

        Args:
            times: t of each step.
            targets: r of each step; None asks for the instantaneous velocity: r = t, or the plain
                path of a model without a flow map.
            kept: the number of clean first frames, whose times are 0.
        """
        flow_map = has_flow_map(self.model)
        if targets is not None and not flow_map:
            raise ValueError(
                "this model has no second timestep branch: pass use_mean_velocity=False for plain "
                "Euler steps"
            )
        t = device_tensor(times, torch.float32, self.device)
        r = t if targets is None else device_tensor(targets, torch.float32, self.device)
        if kept:
            frame = torch.arange(self.frames, device=self.device)
            t = torch.where(frame < kept, 0.0, t[:, None])
            r = t if targets is None else r[:, None].expand_as(t)
        self.t, self.r = t, r if flow_map else None

    def both(self, x: Tensor) -> Tensor:
        """Return ``x[B, ..]`` for the texts, repeated for the negative ones with guidance."""
        return torch.cat([x, x]) if self.guided else x

    def __call__(self, latents: Tensor, step: int, context: int = 0, **conditions: Any) -> Tensor:
        """Return the guided velocity at a step.

        Args:
            latents: ``[B, F, C, H, W]``.
            step: counted from 0 in the times of :meth:`set_times`.
            context: the number of clean first frames, at t = r = 0.
            conditions: further arguments of the model.
        """
        shape = (self.batch_size, *self.t.shape[1:])
        times = [None if time is None else time[step].expand(shape) for time in (self.t, self.r)]
        if context:
            times = [None if t is None else _after_clean(t, context, latents) for t in times]
        velocity = evaluate(
            self.model,
            self.both(latents),
            timestep=times[0],
            r_timestep=times[1],
            encoder_hidden_states=self.text,
            **conditions,
        )
        if not self.guided:
            return velocity
        wide = torch.promote_types(velocity.dtype, torch.float32)
        negative, positive = velocity.to(wide).chunk(2)
        return negative + self.guidance_scale * (positive - negative)


def _after_clean(time: Tensor, context: int, latents: Tensor) -> Tensor:
    """Return times of frames ``[B, F]``: 0 for the first ``context``, ``time[B]`` for the rest."""
    frames = time[:, None].expand(-1, latents.shape[1] - context)
    return torch.cat([time.new_zeros(len(time), context), frames], dim=1)


def sigmas_of(
    scheduler: FlowMapEulerDiscreteScheduler,
    num_inference_steps: int | None,
    sigmas: Schedule | None,
    timesteps: Schedule | None,
) -> Tensor:
    """Return the sigmas of a schedule, fp64 ``[n + 1]`` with the terminal 0."""
    custom = sigmas is not None or timesteps is not None
    return scheduler.schedule(
        None if custom else num_inference_steps, sigmas=sigmas, timesteps=timesteps
    )


def replacement(latents: Any, like: Tensor) -> Tensor:
    """Return latents that a callback returned, for the next step; ValueError for others."""
    if not isinstance(latents, Tensor) or latents.shape != like.shape or latents.is_complex():
        got = (
            f"{tuple(latents.shape)} {latents.dtype}"
            if isinstance(latents, Tensor)
            else type(latents).__name__
        )
        raise ValueError(f"callback must return None or latents {tuple(like.shape)}, got {got}")
    return to_device(latents, like.device, like.dtype)
