"""Sample by the any-step flow map, or by the consistency sampler beside it, which adds noise."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from anyflow.models.network import require_bidirectional
from anyflow.sampling.network import Callback, GuidedNetwork, Schedule, replacement, sigmas_of
from anyflow.schedulers import FlowMapEulerDiscreteScheduler
from anyflow.utils.rng import randn_like
from anyflow.utils.transfer import to_device
from anyflow.utils.validation import require_finite, require_latents


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
            ``use_mean_velocity=False``. The causal model is sampled by
            :func:`~anyflow.sampling.sample_causal`.
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
        ValueError: the model is causal, shapes do not fit, values are out of range, or a tensor
            given holds NaN or infinity.
        FloatingPointError: the latents hold NaN or infinity after a step, which is named with the
            videos; found at the end, where the host waits for the device once.
    """
    _require_bidirectional(model)
    sigmas = sigmas_of(scheduler, num_inference_steps, sigmas, timesteps)
    network = GuidedNetwork(model, noise, prompt_embeds, guidance_scale, negative_prompt_embeds)
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
            latents = latents if replaced is None else replacement(replaced, latents)
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
    _require_bidirectional(model)
    sigmas = sigmas_of(scheduler, num_inference_steps, sigmas, timesteps)
    network = GuidedNetwork(model, noise, prompt_embeds, 1.0, None)
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


def _require_bidirectional(model: Any) -> None:
    try:
        require_bidirectional(model=model)
    except ValueError as error:
        raise ValueError(f"{error}: sample_causal samples it") from None


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
