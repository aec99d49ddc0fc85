"""Training steps, to the gradients: pretraining, the generator's and the critic's, against the
peers' formulation.

fp32 on the CPU; on a GPU bf16 with gradient checkpointing. The optimizer's update is the same for
everyone and left out.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import peers
import pytest
import torch
from interleave import OURS, Step
from peers import SHORT_BATCH, SMALL_BATCH, WAN_1B_BATCH, Batch, OnPolicy, Size
from torch import Tensor
from workloads import COMPILED, Contest, Line, Setting, Workload

from anyflow.methods import (
    AnyFlowOnPolicyMethod,
    AnyFlowPretrainMethod,
    OnPolicyConfig,
    PretrainConfig,
    TimePairs,
)

FORMULATION = "peers' formulation"
GOALS = {"pretrain": 1.6}
GUIDANCE, EPSILON = 3.0, 5.0
# The kinds of samples in the published proportions: half r = t, a quarter r = 0, a quarter between.
T, R = (0.7, 0.4, 0.8, 0.6), (0.7, 0.4, 0.0, 0.3)
ROLLOUT_STEPS, GRADIENT_STEP = 4, 1  # the shortcut 1 -> 0.75 -> 0.5 -> 0: its three evaluations
SCORE_TIMES = (0.3, 0.5, 0.7, 0.9)


def _pretrain(size: Size, setting: Setting) -> Contest:
    """Ours: one call without gradient for what has a factor other than 0, one with gradient."""
    device, data = setting.device, peers.batch(size, setting.device)
    peer, ours = _models(size, device)
    t, r = torch.tensor(T, device=device), torch.tensor(R, device=device)
    config = PretrainConfig(epsilon=EPSILON, fuse_guidance_scale=GUIDANCE, boundary="extrapolate")
    method, pairs = AnyFlowPretrainMethod(ours, peers.scheduler(), config), TimePairs(t, r, t == r)

    def step() -> Tensor:
        ours.zero_grad(set_to_none=True)
        output = method.loss(
            data.latents.to(size.dtype),
            data.prompt,
            data.negative,
            noise=data.noise,
            time_pairs=pairs,
        )
        output.loss.backward()
        return output.loss.detach()

    steps = {
        OURS: step,
        FORMULATION: peers.pretrain_step(peer, size, data, t, r, GUIDANCE, EPSILON),
    }
    if setting.compile:
        steps[COMPILED] = peers.pretrain_step(
            peers.compiled(peer), size, data, t, r, GUIDANCE, EPSILON
        )
    b, flow_map = len(T), int((t != r).sum())
    # with gradient; at t + and t -; unconditional
    evaluations = _gradient_passes(size) * b + 2 * flow_map + b
    return Contest(steps, flops=evaluations * size.forward_flops())


def _generator(size: Size, setting: Setting) -> Contest:
    device, data = setting.device, peers.batch(size, setting.device)
    (peer, ours), (peer_teacher, teacher), (peer_critic, critic) = (
        _models(size, device, seed) for seed in range(3)
    )
    method, draws = _on_policy(ours, teacher, critic), _draws(data)

    def step() -> Tensor:
        ours.zero_grad(set_to_none=True)
        output = method.student_loss(
            data.noise.to(size.dtype),
            data.prompt,
            data.negative,
            steps=(ROLLOUT_STEPS, GRADIENT_STEP),
            t=draws.t,
            score_noise=draws.noise,
        )
        output.loss.backward()
        return output.loss.detach()

    theirs = peers.generator_step(peer, peer_teacher, peer_critic, size, data, draws)
    # the rollout; critic, teacher with and without the prompt
    evaluations = len(T) * (3 * _gradient_passes(size) + 3)
    return Contest({OURS: step, FORMULATION: theirs}, flops=evaluations * size.forward_flops())


def _critic(size: Size, setting: Setting) -> Contest:
    device, data = setting.device, peers.batch(size, setting.device)
    (peer, ours), (peer_critic, critic) = (_models(size, device, seed) for seed in (0, 2))
    method, draws = _on_policy(ours, ours, critic), _draws(data)

    def step() -> Tensor:
        critic.zero_grad(set_to_none=True)
        with torch.no_grad():
            samples = method.rollout(
                data.noise.to(size.dtype),
                data.prompt,
                num_steps=ROLLOUT_STEPS,
                grad_step=GRADIENT_STEP,
            )
        loss = method.critic_loss(samples, data.prompt, t=draws.t, noise=draws.noise).loss
        loss.backward()
        return loss.detach()

    theirs: Step = peers.critic_step(peer, peer_critic, size, data, draws)
    evaluations = len(T) * (3 + _gradient_passes(size))
    return Contest({OURS: step, FORMULATION: theirs}, flops=evaluations * size.forward_flops())


def _models(size: Size, device: torch.device, seed: int = 0) -> tuple[Any, Any]:
    peer, ours = peers.models(size, device, seed)
    if _checkpointed(size):
        peer.enable_gradient_checkpointing()
        ours.enable_gradient_checkpointing()
    return peer, ours


def _checkpointed(size: Size) -> bool:
    return size.dtype != torch.float32


def _gradient_passes(size: Size) -> int:
    """What an evaluation and its backward compute, in evaluations: a backward is two, and
    checkpointing another.
    """
    return 4 if _checkpointed(size) else 3


def _on_policy(student: Any, teacher: Any, critic: Any) -> AnyFlowOnPolicyMethod:
    config = OnPolicyConfig(real_guidance_scale=GUIDANCE, num_steps=(ROLLOUT_STEPS,))
    return AnyFlowOnPolicyMethod(student, teacher, critic, peers.scheduler(), config)


def _draws(data: Batch) -> OnPolicy:
    sigmas = peers.scheduler().schedule(ROLLOUT_STEPS).tolist()
    kept = (sigmas[0], sigmas[GRADIENT_STEP], sigmas[GRADIENT_STEP + 1], sigmas[-1])
    score_times = torch.tensor(SCORE_TIMES, device=data.noise.device)
    # the latents are noise too, independent of the other
    return OnPolicy(kept, score_times, data.latents, GUIDANCE)


def _workloads(size: Size, device: str) -> list[Workload]:
    builders = {"pretrain": _pretrain, "generator": _generator, "critic": _critic}
    return [
        Workload(
            f"methods/{what}/{size.label}/{size.latents[0]}x{size.tokens} tokens",
            (FORMULATION, COMPILED) if what == "pretrain" else (FORMULATION,),
            partial(build, size),
            device,
            size.dtype,
            quick=size is SHORT_BATCH,
            goals={FORMULATION: GOALS[what]} if what in GOALS else {},
            memory=True,
            min_rounds=3,
        )
        for what, build in builders.items()
    ]


WORKLOADS = [
    *_workloads(SHORT_BATCH, "cpu"),
    *_workloads(SMALL_BATCH, "cpu"),
    *_workloads(WAN_1B_BATCH, "cuda"),
]


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def bench_method(workload: Workload, measured: Line) -> None:
    """One step of a method."""
