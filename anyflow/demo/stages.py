"""Describe the quickstart's stages as recipes of the training engine, and run their updates."""

from __future__ import annotations

import time
from pathlib import Path

from anyflow.data import TrainingData
from anyflow.demo.config import DemoConfig, Stage
from anyflow.demo.progress import Advance
from anyflow.demo.world import World
from anyflow.methods import OnPolicyConfig, PretrainConfig
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.training.checkpoint import Checkpointer
from anyflow.training.config import (
    CheckpointConfig,
    DataConfig,
    EMAConfig,
    FlowMap,
    NetworkConfig,
    OnPolicyStageConfig,
    OptimizerConfig,
    Recipe,
    SchedulerConfig,
)
from anyflow.training.distributed import Mesh
from anyflow.training.networks import build_critic, build_student, build_teacher
from anyflow.training.updates import OnPolicyUpdates, PretrainUpdates, StageUpdates

_WARMUP_STEPS = 20


def stage_recipe(config: DemoConfig, name: str, student: Path, teacher: Path, out: Path) -> Recipe:
    """Make the recipe of a stage: ``"flow_matching"``, ``"pretrain"`` or ``"on_policy"``.

    Args:
        config: settings of the run.
        name: the stage.
        student: folder of the network that the stage starts from.
        teacher: folder of the network whose velocities stage 1 learns, and of the real score of
            stage 2.
        out: folder for the checkpoints that the stage continues from.
    """
    stage: Stage = getattr(config, name)
    on_policy = None
    if name == "on_policy":
        n = config.num_train_timesteps
        method = OnPolicyConfig(
            real_guidance_scale=0.0,
            min_timestep=0.02 * n,
            max_timestep=0.98 * n,
            num_steps=config.rollout_steps,
            cotrain_pretrain=True,
            cotrain_weight=config.cotrain_weight,
        )
        critic = _optimizer(stage, stage.critic_lr)
        on_policy = OnPolicyStageConfig(
            NetworkConfig(str(teacher)), method, critic_optimizer=critic
        )
    return Recipe(
        stage="on_policy"
        if name == "on_policy"
        else "pretrain"
        if name == "pretrain"
        else "teacher",
        out=str(out),
        student=NetworkConfig(str(student)),
        data=DataConfig("synthetic", batch_size=stage.batch_size, num_workers=0, seed=config.seed),
        steps=stage.steps,
        flow_map=FlowMap(config.gate_value),
        scheduler=SchedulerConfig(config.num_train_timesteps, config.shift),
        pretrain=PretrainConfig(
            epsilon=config.epsilon, fuse_guidance_scale=1.0, velocity_target=config.velocity_target
        ),
        teacher=NetworkConfig(str(teacher))
        if name == "pretrain" and config.velocity_target == "teacher"
        else None,
        on_policy=on_policy,
        optimizer=_optimizer(stage, stage.lr),
        # The average of a short stage spans about a ninth of it, and forgets the start.
        ema=EMAConfig(min(stage.ema_decay, (1 + stage.steps) / (10 + stage.steps)), start_step=0),
        checkpoint=CheckpointConfig(every=config.checkpoint_every, keep=1),
        precision="fp32",
        activation_checkpointing=False,
        device=config.device,
        num_threads=config.num_threads,
        seed=config.seed,
    )


def train_stage(
    world: World, recipe: Recipe, advance: Advance
) -> tuple[AnyFlowTransformer3DModel, float]:
    """Train by a recipe, from its newest checkpoint if one is there.

    Returns the averaged student and the seconds that training took.

    Raises:
        TrainingError: a loss, a gradient or a network's output is not finite.
    """
    updates = _build(world, recipe)
    checkpointer = Checkpointer(Path(recipe.out), keep=recipe.checkpoint.keep)
    done, begin = 0, time.perf_counter()
    if (latest := checkpointer.latest()) is not None:
        info = checkpointer.load(latest, updates.tensors())
        done, begin = info["step"], begin - info["seconds"]
        updates.resume_at(done)
        for _ in range(done):
            advance(None)
    size = recipe.data.batch_size
    data = TrainingData(world.dataset, batch_size=size, seed=recipe.data.seed, consumed=done * size)
    for index in range(done, recipe.steps):
        scalars = updates.update([next(data)], index)
        advance(float(scalars["loss"]))
        if (index + 1) % recipe.checkpoint.every == 0:
            info = {"step": index + 1, "seconds": time.perf_counter() - begin}
            checkpointer.save(index + 1, updates.tensors(), info)
    updates.ema.copy_to(updates.student)
    return updates.student, time.perf_counter() - begin


def _build(world: World, recipe: Recipe) -> StageUpdates:
    mesh, negative = Mesh(world.device), world.dataset.negative_prompt_embeds
    student = build_student(recipe).to(world.device)
    taught = recipe.on_policy is not None or recipe.teacher is not None
    teacher = build_teacher(recipe).to(world.device) if taught else None
    if recipe.on_policy is None:
        return PretrainUpdates(recipe, mesh, student, negative, teacher)
    assert teacher is not None
    critic = build_critic(recipe, teacher)
    return OnPolicyUpdates(recipe, mesh, student, teacher, critic, negative)


def _optimizer(stage: Stage, lr: float) -> OptimizerConfig:
    if not stage.cosine:
        return OptimizerConfig(lr, stage.betas)
    return OptimizerConfig(
        lr, stage.betas, schedule="cosine", warmup_steps=_WARMUP_STEPS, min_lr_ratio=0.05
    )
