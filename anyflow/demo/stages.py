"""The training stages of the quickstart, each a plain loop over one of the library's methods."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from anyflow.demo.config import Stage
from anyflow.demo.world import World
from anyflow.methods import AnyFlowOnPolicyMethod, AnyFlowPretrainMethod, LossOutput, OnPolicyConfig, PretrainConfig
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.training import EMA

Advance = Callable[[float], None]  # called with the loss after each step

_WARMUP_STEPS = 20


def train_flow_matching(
    world: World, model: AnyFlowTransformer3DModel, stage: Stage, stream: int, advance: Advance
) -> AnyFlowTransformer3DModel:
    """Plain flow matching of a single-timestep model (r = t for every sample); returns the averaged model."""
    config = PretrainConfig(
        diffusion_ratio=1.0, consistency_ratio=0.0, epsilon=world.config.epsilon, fuse_guidance_scale=1
    )
    method = AnyFlowPretrainMethod(model, world.scheduler(), config)
    return _train_on_data(world, model, method, stage, stream, advance)


def train_pretrain(
    world: World, model: AnyFlowTransformer3DModel, stage: Stage, stream: int, advance: Advance
) -> AnyFlowTransformer3DModel:
    """Stage 1: flow-map pretraining with the central-difference target; returns the averaged model."""
    method = AnyFlowPretrainMethod(model, world.scheduler(), pretrain_config(world))
    return _train_on_data(world, model, method, stage, stream, advance)


def pretrain_config(world: World) -> PretrainConfig:
    """The pretrain loss of stage 1, which stage 2 trains along with its own."""
    return PretrainConfig(epsilon=world.config.epsilon, fuse_guidance_scale=1.0)


def train_on_policy(
    world: World,
    model: AnyFlowTransformer3DModel,
    teacher: AnyFlowTransformer3DModel,
    stage: Stage,
    stream: int,
    advance: Advance,
) -> AnyFlowTransformer3DModel:
    """Stage 2: distribution matching on the flow map's own rollouts, co-trained on data; returns the averaged model."""
    n = world.config.num_train_timesteps
    config = OnPolicyConfig(
        real_guidance_scale=0.0,
        min_timestep=0.02 * n,
        max_timestep=0.98 * n,
        num_steps=world.config.rollout_steps,
        cotrain_pretrain=True,
        pretrain=pretrain_config(world),
    )
    critic = copy.deepcopy(teacher)
    method = AnyFlowOnPolicyMethod(model, teacher.requires_grad_(False), critic, world.scheduler(), config)
    student_optimizer, critic_optimizer = _adamw(model, stage, stage.lr), _adamw(critic, stage, stage.critic_lr)
    ema, generator = EMA(model, stage.ema_decay), world.generator(stream)
    for step in range(stage.steps):
        latents, data_prompts = world.batch(stage.batch_size, generator)
        prompts = world.prompts(torch.randint(world.shapes.num_classes, (stage.batch_size,), generator=generator))
        output = method.student_loss(
            world.noise(stage.batch_size, generator),
            prompts,
            latents=latents,
            data_prompt_embeds=data_prompts,
            generator=generator,
            offset=step,
        )
        _step(model, student_optimizer, output)
        ema.update(model)
        with torch.no_grad():  # a fresh rollout of the updated student
            num_steps, grad_step = method.draw_steps(generator)
            fresh = world.noise(stage.batch_size, generator)
            samples = method.rollout(fresh, prompts, num_steps=num_steps, grad_step=grad_step, generator=generator)
        _step(critic, critic_optimizer, method.critic_loss(samples, prompts, generator=generator))
        advance(output.loss.item())
    ema.copy_to(model)
    return model


def _train_on_data(
    world: World,
    model: AnyFlowTransformer3DModel,
    method: AnyFlowPretrainMethod,
    stage: Stage,
    stream: int,
    advance: Advance,
) -> AnyFlowTransformer3DModel:
    optimizer = _adamw(model, stage, stage.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(stage, step))
    ema, generator = EMA(model, stage.ema_decay), world.generator(stream)
    for step in range(stage.steps):
        latents, prompts = world.batch(stage.batch_size, generator)
        output = method.loss(latents, prompts, generator=generator, offset=step)
        _step(model, optimizer, output)
        schedule.step()
        ema.update(model)
        advance(output.loss.item())
    ema.copy_to(model)
    return model


def _adamw(model: nn.Module, stage: Stage, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=stage.betas, weight_decay=0.0, fused=True)


def _lr_factor(stage: Stage, step: int) -> float:
    factor = min(1.0, (step + 1) / _WARMUP_STEPS)
    if stage.cosine:
        factor *= 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / stage.steps))
    return factor


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, output: LossOutput) -> Tensor:
    optimizer.zero_grad(set_to_none=True)
    output.loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return norm
