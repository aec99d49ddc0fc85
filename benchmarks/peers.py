"""Write sampling and training steps as the peers do.

The trainers of NVlabs and FastVideo call the network once for each evaluation, on the whole batch,
with one time per frame, which diffusers' model (equal to NVlabs' to the bit) expands to one
modulation row per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import causal_roofline
import torch
from networks import TIMESTEPS, Videos
from sizes import CausalSize
from torch import Tensor

from anyflow.schedulers import FlowMapEulerDiscreteScheduler

Network = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def scheduler() -> FlowMapEulerDiscreteScheduler:
    """Return the published recipe's scheduler without its shift: times are meant as written."""
    return FlowMapEulerDiscreteScheduler(TIMESTEPS, shift=1.0)


def per_sample(u: Tensor) -> Tensor:
    """Shape ``[B]`` numbers as factors of latents."""
    return u.reshape(-1, 1, 1, 1, 1)


def network(model: Any, dtype: torch.dtype) -> Network:
    """Return ``u(x, t, r, text)`` for times in [0, 1], one of each per frame; results are fp32."""

    def evaluate(x: Tensor, t: Tensor, r: Tensor, text: Tensor) -> Tensor:
        frames = x.shape[1]
        times = [(TIMESTEPS * u.float())[:, None].expand(-1, frames) for u in (t, r)]
        return model(x.to(dtype), *times, text, return_dict=False)[0].float()

    return evaluate


def causal_network(model: Any, dtype: torch.dtype, latents: Tensor, attention_mask: Any) -> Network:
    """Return ``u(x, t, r, text)`` of the noisy last frames of videos, all of which are copied.

    Args:
        model: diffusers' causal model.
        dtype: of its inputs.
        latents: clean, of all frames.
        attention_mask: of the layout of training.
    """
    limit, sizes = model.config.full_chunk_limit, list(model.config.chunk_partition)
    first = sum(sizes[:-limit])
    compressed, clean = (part.to(dtype) for part in (latents[:, :first], latents[:, first:]))
    still = torch.zeros(latents.shape[:2], device=latents.device)

    def evaluate(x: Tensor, t: Tensor, r: Tensor, text: Tensor) -> Tensor:
        frames = x.shape[1]
        noisy = [(TIMESTEPS * u.float())[:, None].expand(-1, frames) for u in (t, r)]
        times = [torch.cat([still[:, :first], u], dim=1) for u in noisy]
        return model(
            torch.cat([compressed, x.to(dtype)], dim=1),
            *times,
            text,
            sizes,
            clean_hidden_states=clean,
            clean_timestep=still[:, first:],
            attention_mask=attention_mask,
            return_dict=False,
        )[0].float()

    return evaluate


def set_dense_attention(model: Any, size: CausalSize, dtype: torch.dtype) -> Tensor:
    """Let diffusers' causal model attend by torch's own attention, and return its mask.

    As published it runs flex attention, which has no backward pass on a CPU and which nothing skips
    a score of until it is compiled. The mask is the published one without its padding, additive so
    that no call converts it.
    """
    from diffusers.models.transformers.transformer_anyflow_far import AnyFlowAttnProcessor
    from torch.nn.attention.flex_attention import create_mask

    for block in model.blocks:
        block.attn1.set_processor(AnyFlowAttnProcessor())
    device = next(model.parameters()).device
    tokens = causal_roofline.peer_training_layout(size).tokens
    visible = create_mask(
        block_mask(model, size).mask_mod, 1, 1, tokens, tokens, device=str(device)
    )
    return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, -torch.inf)


def block_mask(model: Any, size: CausalSize) -> Any:
    """Build the mask of the layout of training as diffusers does."""
    return model.build_attention_mask(
        chunk_partition=list(size.chunk_partition),
        height=size.latents[2],
        width=size.latents[3],
        has_clean_context=True,
        device=next(model.parameters()).device,
    )


def rollout(evaluate: Network, x: Tensor, sigmas: tuple[float, ...], text: Tensor) -> Tensor:
    """Follow the flow map along a few times, with one evaluation from each to the next."""
    for start, end in pairwise(sigmas):
        t, r = (torch.full((len(x),), u, device=x.device) for u in (start, end))
        x = x - (start - end) * evaluate(x, t, r, text)
    return x


def pretrain_step(
    model: Any,
    u: Network,
    data: Videos,
    t: Tensor,
    r: Tensor,
    guidance: float,
    epsilon: float,
) -> Callable[[], Tensor]:
    """Return a step of the pretrain loss: four evaluations of the batch, also where t - r = 0.

    Args:
        model: whose gradients are computed.
        u: its evaluation.
        data: latents and noise are of the frames that are noisy.
        t, r: ``[B]`` in [0, 1].
        guidance: g.
        epsilon: of the central difference, in timesteps.
    """
    is_diffusion = t == r
    weights = scheduler().get_train_weight(t * TIMESTEPS).to(t)

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        x0, noise, e = data.latents, data.noise, epsilon / TIMESTEPS
        v = noise - x0
        x_t = per_sample(1 - t) * x0 + per_sample(t) * noise
        cond = u(x_t, t, r, data.prompt)
        with torch.no_grad():
            uncond = u(x_t, t, r, data.negative)
            after, before = (u(x_t + s * v, t + s, r, data.prompt) for s in (e, -e))
            target = v - per_sample(t - r) * (after - before) / (2 * e * guidance)
        pred = (cond - (1 - guidance) * uncond) / guidance
        loss = weights * (pred - target).square().flatten(1).mean(1)
        mean = loss.detach()[is_diffusion].mean()
        balance = torch.where(is_diffusion, torch.ones_like(loss), mean / (loss.detach() + 1e-5))
        loss = (loss * balance).mean()
        loss.backward()
        return loss.detach()

    return step


@dataclass(frozen=True)
class FixedDraws:
    """Hold what an on-policy step draws: times of the rollout, times and noise of the scores."""

    sigmas: tuple[float, ...]
    t: Tensor
    noise: Tensor
    guidance: float


def generator_step(
    student: Any, teacher: Any, critic: Any, dtype: torch.dtype, data: Videos, draws: FixedDraws
) -> Callable[[], Tensor]:
    """Return a step of the DMD2 loss, with two evaluations for the teacher's scores."""
    u, real_u, fake_u = (network(m, dtype) for m in (student, teacher, critic))
    t, guidance = draws.t, draws.guidance

    def step() -> Tensor:
        student.zero_grad(set_to_none=True)
        samples = rollout(u, data.noise, draws.sigmas, data.prompt)
        with torch.no_grad():
            x = samples.detach()
            x_t = per_sample(1 - t) * x + per_sample(t) * draws.noise
            fake = x_t - per_sample(t) * fake_u(x_t, t, t, data.prompt)
            cond = x_t - per_sample(t) * real_u(x_t, t, t, data.prompt)
            uncond = x_t - per_sample(t) * real_u(x_t, t, t, data.negative)
            real = cond + guidance * (cond - uncond)
            gradient = (fake - real) / per_sample((x - real).abs().flatten(1).mean(1))
        loss = (samples - (x - gradient)).square().mean()
        loss.backward()
        return loss.detach()

    return step


def critic_step(
    student: Any, critic: Any, dtype: torch.dtype, data: Videos, draws: FixedDraws
) -> Callable[[], Tensor]:
    """Return a step of the critic's flow matching loss on a fresh rollout."""
    u, score, t = network(student, dtype), network(critic, dtype), draws.t

    def step() -> Tensor:
        critic.zero_grad(set_to_none=True)
        with torch.no_grad():
            x = rollout(u, data.noise, draws.sigmas, data.prompt)
        x_t = per_sample(1 - t) * x + per_sample(t) * draws.noise
        loss = (score(x_t, t, t, data.prompt) - (draws.noise - x)).square().mean()
        loss.backward()
        return loss.detach()

    return step
