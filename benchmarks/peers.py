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

import torch
from networks import TIMESTEPS, Videos
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


def rollout(evaluate: Network, x: Tensor, sigmas: tuple[float, ...], text: Tensor) -> Tensor:
    """Follow the flow map along a few times, with one evaluation from each to the next."""
    for start, end in pairwise(sigmas):
        t, r = (torch.full((len(x),), u, device=x.device) for u in (start, end))
        x = x - (start - end) * evaluate(x, t, r, text)
    return x


def pretrain_step(
    model: Any,
    dtype: torch.dtype,
    data: Videos,
    t: Tensor,
    r: Tensor,
    guidance: float,
    epsilon: float,
) -> Callable[[], Tensor]:
    """Return a step of the pretrain loss: four evaluations of the batch, also where t - r = 0."""
    u, is_diffusion = network(model, dtype), t == r
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
