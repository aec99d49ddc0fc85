"""Sample by the any-step flow map, or by the consistency sampler beside it, which adds noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from anyflow.models.network import evaluate, has_flow_map
from anyflow.schedulers import FlowMapEulerDiscreteScheduler
from anyflow.utils.rng import randn_like
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


@torch.no_grad()
def sample(
    model: Any,
    scheduler: FlowMapEulerDiscreteScheduler,
    noise: Tensor,
    prompt_embeds: Tensor,
    *,
    num_inference_steps: int | None = 4,
    sigmas: Schedule | None = None,
    timesteps: Schedule | None = None,
    guidance_scale: float = 1.0,
    negative_prompt_embeds: Tensor | None = None,
    context_latents: Tensor | None = None,
    use_mean_velocity: bool = True,
    callback: Callback | None = None,
) -> Tensor:
    """Sample by the any-step flow map: ``x <- x - (t - r) u(x, t, r)`` along the schedule.

    No noise is added between the steps.

    Args:
        model: ``u(x_t, t, r)``, an :class:`~anyflow.models.AnyFlowTransformer3DModel` or a module
            with its call. A plain Wan model (``r_embedder=False``) needs
            ``use_mean_velocity=False``.
        scheduler: gives the schedule; its state is not changed.
        noise: ``[B, F, C, H, W]`` standard normal; its dtype is the one the model sees. Never
            written.
        prompt_embeds: ``[B, S, text_dim]``.
        num_inference_steps: network evaluations; ignored when ``sigmas`` or ``timesteps`` are
            given.
        sigmas: custom schedule in [0, 1], used verbatim.
        timesteps: custom schedule in [0, num_train_timesteps], used verbatim.
        guidance_scale: s of ``u_neg + s (u - u_neg)``; 1 (no guidance) for checkpoints with
            guidance distilled in.
        negative_prompt_embeds: ``[B or 1, S, text_dim]``; required, and used, only when
            guidance_scale is not 1.
        context_latents: ``[B or 1, F', C, H, W]`` clean first frames, held fixed at t = 0. Never
            written.
        use_mean_velocity: False evaluates the instantaneous velocity (r = t), which is plain Euler.
        callback: called as ``callback(index, timestep, latents)`` after each step; a tensor
            returned replaces latents.

    Returns:
        ``[B, F, C, H, W]`` clean latents in noise's dtype.

    Raises:
        ValueError: shapes do not fit, values are out of range, or a tensor given holds NaN or
            infinity.
        FloatingPointError: the latents hold NaN or infinity after a step, which is named with the
            videos; found at the end, where the host waits for the device once.
    """
    sigmas = _schedule(scheduler, num_inference_steps, sigmas, timesteps)
    network = _Network(model, noise, prompt_embeds, guidance_scale, negative_prompt_embeds)
    first_frames = _first_frames(context_latents, noise)
    kept = 0 if first_frames is None else first_frames.shape[1]
    times = (sigmas * scheduler.config.num_train_timesteps).tolist()
    network.set_times(times[:-1], times[1:] if use_mean_velocity else None, kept)
    if first_frames is not None:
        network.finite.note("context_latents", first_frames)

    latents = noise.to(torch.promote_types(noise.dtype, torch.float32))
    for i, (sigma, following) in enumerate(pairwise(sigmas.tolist())):
        latents = _with_first_frames(latents, first_frames)
        velocity = network(latents.to(noise.dtype), i)
        latents = latents - (sigma - following) * velocity.to(latents.dtype)
        if callback is not None:
            replaced = callback(
                i, times[i], _with_first_frames(latents, first_frames).to(noise.dtype)
            )
            latents = latents if replaced is None else _replacement(replaced, latents)
        network.note(latents[:, kept:])
    return network.checked(_with_first_frames(latents, first_frames).to(noise.dtype))


@torch.no_grad()
def sample_consistency(
    model: Any,
    scheduler: FlowMapEulerDiscreteScheduler,
    noise: Tensor,
    prompt_embeds: Tensor,
    *,
    num_inference_steps: int | None = 4,
    sigmas: Schedule | None = None,
    timesteps: Schedule | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample as consistency models do: jump to t = 0, add noise up to the next time, jump again.

    DMD students are sampled in this way too. More steps mean more added noise, so that quality need
    not improve with them; the function is here for comparison. Arguments, result and errors are
    those of :func:`sample`; ``generator`` draws the noise that is added.
    """
    sigmas = _schedule(scheduler, num_inference_steps, sigmas, timesteps)
    network = _Network(model, noise, prompt_embeds, 1.0, None)
    times = (sigmas * scheduler.config.num_train_timesteps).tolist()
    network.set_times(times[:-1], [0.0] * (len(times) - 1), 0)

    latents = noise.to(torch.promote_types(noise.dtype, torch.float32))
    for i, (sigma, following) in enumerate(pairwise(sigmas.tolist())):
        clean = latents - sigma * network(latents.to(noise.dtype), i).to(latents.dtype)
        latents = clean
        if following > 0:
            fresh = randn_like(clean, generator)
            latents = (1 - following) * clean + following * fresh
        network.note(latents)
    return network.checked(latents.to(noise.dtype))


class _Network:
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
        if not 0 < guidance_scale < math.inf:
            raise ValueError(
                f"guidance_scale must be > 0 and finite (1 means no guidance), got {guidance_scale}"
            )
        self.finite = FiniteCheck()
        self.finite.note("noise", noise)
        text = self._embeds("prompt_embeds", prompt_embeds, noise)
        self.guidance_scale = guidance_scale
        self.guided = guidance_scale != 1
        if self.guided:
            if negative is None:
                raise ValueError(f"guidance_scale={guidance_scale} needs negative_prompt_embeds")
            text = torch.cat([self._embeds("negative_prompt_embeds", negative, noise), text])
        self.model, self.text, self.batch_size = model, text, len(text)
        self.frames, self.device = noise.shape[1], noise.device
        self.steps_done = 0

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

    def __call__(self, latents: Tensor, step: int) -> Tensor:
        x = torch.cat([latents, latents]) if self.guided else latents
        shape = (self.batch_size, *self.t.shape[1:])
        velocity = evaluate(
            self.model,
            x,
            timestep=self.t[step].expand(shape),
            r_timestep=None if self.r is None else self.r[step].expand(shape),
            encoder_hidden_states=self.text,
        )
        if not self.guided:
            return velocity
        wide = torch.promote_types(velocity.dtype, torch.float32)
        negative, positive = velocity.to(wide).chunk(2)
        return negative + self.guidance_scale * (positive - negative)


def _schedule(
    scheduler: FlowMapEulerDiscreteScheduler,
    num_inference_steps: int | None,
    sigmas: Schedule | None,
    timesteps: Schedule | None,
) -> Tensor:
    custom = sigmas is not None or timesteps is not None
    return scheduler.schedule(
        None if custom else num_inference_steps, sigmas=sigmas, timesteps=timesteps
    )


def _replacement(latents: Any, like: Tensor) -> Tensor:
    """Return latents that a callback returned, for the next step; ValueError for others."""
    if not isinstance(latents, Tensor) or latents.shape != like.shape or latents.is_complex():
        got = (
            f"{tuple(latents.shape)} {latents.dtype}"
            if isinstance(latents, Tensor)
            else type(latents).__name__
        )
        raise ValueError(f"callback must return None or latents {tuple(like.shape)}, got {got}")
    return to_device(latents, like.device, like.dtype)


def _first_frames(context_latents: Tensor | None, noise: Tensor) -> Tensor | None:
    if context_latents is None:
        return None
    require_latents("context_latents", context_latents)
    require_finite("context_latents", context_latents)
    (b, f), given = noise.shape[:2], context_latents.shape
    if given[0] not in (1, b) or given[2:] != noise.shape[2:] or given[1] >= f:
        raise ValueError(
            f"context_latents must be [B={b} or 1, fewer than F={f}, "
            f"{', '.join(map(str, noise.shape[2:]))}], got {tuple(given)}"
        )
    # in the dtype of the latents: each step would wait for a copy otherwise
    dtype = torch.promote_types(noise.dtype, torch.float32)
    return to_device(context_latents, noise.device, dtype).expand(b, -1, -1, -1, -1)


def _with_first_frames(latents: Tensor, first_frames: Tensor | None) -> Tensor:
    if first_frames is None:
        return latents
    return torch.cat([first_frames, latents[:, first_frames.shape[1] :]], dim=1)
