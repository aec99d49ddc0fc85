"""Hold the data and the times of a pretrain loss, and what its target takes from the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyflow.methods.causal import ChunkContext
from anyflow.methods.pretrain_config import PretrainConfig
from anyflow.methods.time_pairs import TimePairs
from anyflow.models.network import velocity
from anyflow.ops import flow_map_batch
from anyflow.schedulers import FlowMapEulerDiscreteScheduler
from anyflow.utils.devices import widest_float
from anyflow.utils.rng import randn_like
from anyflow.utils.validation import (
    batched_embeds,
    require_finite,
    require_latents,
    require_same_shape,
)


@dataclass(frozen=True)
class PretrainData:
    """Hold the data, noise and text of a batch.

    Args:
        x0: ``[B, F, C, H, W]`` clean latents, in fp32 at least.
        noise: the shape and dtype of x0.
        text: ``[B, S, text_dim]``.
        negative: the shape and dtype of text; None without guidance.
        context: what a causal student's noisy frames, which x0 and noise are of, attend to; None
            for a bidirectional one.
    """

    x0: Tensor
    noise: Tensor
    text: Tensor
    negative: Tensor | None
    context: ChunkContext | None = None

    def velocity(
        self,
        network: Any,
        x: Tensor,
        timestep: Tensor,
        r_timestep: Tensor | None,
        text: Tensor,
        samples: Tensor | None = None,
        context_rows: Sequence[int] | None = None,
    ) -> Tensor:
        """Return ``u(x, t, r, c)``, the shape of x, in fp32 at least.

        Args:
            network: u.
            x: ``[b, F, C, H, W]``.
            timestep, r_timestep: t and r, ``[b]`` or ``[b, F]``; r is None for the plain velocity.
            text: ``[b, S, text_dim]``.
            samples: ``[b]`` indices of the samples that x is made of; None means all B.
            context_rows: for each row the one of the same sample and text, whose context a causal
                student computes for both; None means that each row has its own.
        """
        if self.context is None:
            return velocity(network, x, timestep, r_timestep, text)
        return self.context.velocity(network, x, timestep, r_timestep, text, samples, context_rows)


@dataclass(frozen=True)
class PretrainTimes:
    """Hold the times of a batch: t, r and the two times t± of the central difference.

    Times in [0, 1] are recomputed from the fp32 timesteps that the network is given, so that the
    loss divides by the widths that the network saw. All are ``[B]``, or ``[B, F]`` with first
    frames.

    Args:
        t, r: after the shift, in [0, 1], in fp64 where the device has it.
        timestep, r_timestep: N t and N r in fp32.
        plus_timestep, minus_timestep: N t± in fp32.
        plus, minus: the widths t₊ - t and t - t₋.
        picked: ``[n]`` indices of the samples with r != t, which alone need dF/dt.
        is_diffusion: ``[B]`` boolean, of the other samples.
        first_frames: ``[F]`` boolean, of the frames held clean (image to video), or None.
    """

    t: Tensor
    r: Tensor
    timestep: Tensor
    r_timestep: Tensor
    plus_timestep: Tensor
    minus_timestep: Tensor
    plus: Tensor
    minus: Tensor
    picked: Tensor
    is_diffusion: Tensor
    first_frames: Tensor | None

    @classmethod
    def from_pairs(
        cls,
        pairs: TimePairs,
        scheduler: FlowMapEulerDiscreteScheduler,
        *,
        epsilon: float,
        one_sided: bool,
        first_frames: Tensor | None = None,
    ) -> PretrainTimes:
        """Shift the times of (7), and round them and t ± epsilon to the network's fp32 timesteps.

        Args:
            pairs: before the shift.
            scheduler: gives the shift and N.
            epsilon: δ, in timesteps.
            one_sided: whether t± stay in [0, 1].
            first_frames: ``[F]`` boolean, of the frames that stay at t = t± = 0; None for none.
        """
        n, wide = scheduler.config.num_train_timesteps, widest_float(pairs.t.device)
        timestep = (scheduler.apply_shift(pairs.t.to(wide)) * n).float()
        r_timestep = (scheduler.apply_shift(pairs.r.to(wide)) * n).float()
        if first_frames is not None:
            timestep = timestep[:, None].where(~first_frames, 0.0)
            r_timestep = r_timestep[:, None].expand_as(timestep)
        t, r = timestep.to(wide) / n, r_timestep.to(wide) / n
        above, below = t + epsilon / n, t - epsilon / n
        if one_sided:
            above, below = above.clamp(max=1.0), below.clamp(min=0.0)
        plus_timestep, minus_timestep = (above * n).float(), (below * n).float()
        if first_frames is not None:
            plus_timestep = plus_timestep.where(~first_frames, 0.0)
            minus_timestep = minus_timestep.where(~first_frames, 0.0)
        return cls(
            t=t,
            r=r,
            timestep=timestep,
            r_timestep=r_timestep,
            plus_timestep=plus_timestep,
            minus_timestep=minus_timestep,
            plus=plus_timestep.to(wide) / n - t,
            minus=t - minus_timestep.to(wide) / n,
            picked=pairs.flow_map_indices(),
            is_diffusion=pairs.is_diffusion,
            first_frames=first_frames,
        )

    @property
    def width(self) -> Tensor:
        """Return t₊ - t₋ of the picked samples, ``[n]``."""
        width = (self.plus + self.minus)[self.picked]
        return width.amax(1) if width.ndim == 2 else width  # first frames do not move


@dataclass(frozen=True)
class TargetTerms:
    """Hold what the loss takes from the network without a gradient.

    Args:
        uncond: u(x_t, t, r | ∅), ``[B, F, C, H, W]``; None without guidance.
        u_plus, u_minus: u at t± of the picked samples, ``[n, F, C, H, W]``; None where none is.
        width: what their difference is divided by, a number or ``[n]``.
    """

    uncond: Tensor | None = None
    u_plus: Tensor | None = None
    u_minus: Tensor | None = None
    width: float | Tensor = 1.0


def clean_latents(latents: Tensor) -> Tensor:
    """Check clean latents ``[B, F, C, H, W]``, and return them in fp32 at least."""
    require_latents("latents", latents)
    require_finite("latents", latents)
    return latents.to(torch.promote_types(latents.dtype, torch.float32))


def noise_like(x0: Tensor, noise: Tensor | None, generator: torch.Generator) -> Tensor:
    """Check the noise given, or draw it; return it in x0's dtype."""
    noise = randn_like(x0, generator) if noise is None else noise.to(x0.dtype)
    require_same_shape("noise", noise, "latents", x0)
    require_finite("noise", noise)
    return noise


def required_negative(negative: Tensor | None, text: Tensor, config: PretrainConfig) -> Tensor:
    """Return the negative prompt of each sample, ``[B, S, text_dim]`` in text's dtype.

    Raises:
        ValueError: there is none.
    """
    if negative is None:
        raise ValueError(
            "negative_prompt_embeds is required with "
            f"fuse_guidance_scale={config.fuse_guidance_scale} and "
            f"prompt_dropout={config.prompt_dropout}"
        )
    return batched_embeds("negative_prompt_embeds", negative, len(text)).to(text.dtype)


def noised(data: PretrainData, times: PretrainTimes) -> Tensor:
    """Return x_t of (1), ``[B, F, C, H, W]``."""
    none = times.picked[:0]
    widths = (times.plus, times.minus)
    return flow_map_batch(data.x0, data.noise, times.t, widths, none, with_x_t=False)[0]


@torch.no_grad()
def call_in_vain(student: Any, data: PretrainData, times: PretrainTimes, x_t: Tensor) -> None:
    """Call the network on one sample: under FSDP every rank must call it as often as the others."""
    first = times.picked.new_zeros(1)
    r_timestep = times.r_timestep[:1]
    data.velocity(student, x_t[:1], times.timestep[:1], r_timestep, data.text[:1], first)
