"""One optimizer step of each stage: forward, backward, accumulation, clipping, guard, update, average."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from anyflow.data import Batch
from anyflow.methods import (
    AnyFlowOnPolicyMethod,
    AnyFlowPretrainMethod,
    LossOutput,
    PretrainConfig,
    TimePairs,
    sample_time_pairs,
)
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.rng import randn_like
from anyflow.schedulers import FlowMapEulerDiscreteScheduler
from anyflow.training.config import Recipe
from anyflow.training.distributed import Mesh
from anyflow.training.draws import draw_generator
from anyflow.training.ema import EMA
from anyflow.training.optimization import NetworkOptimizer
from anyflow.transfer import to_device


class Step(Protocol):
    """What the loop knows of a stage."""

    student: AnyFlowTransformer3DModel
    ema: EMA

    def update(self, batches: Sequence[Batch], step: int) -> dict[str, Tensor | float]:
        """Update number ``step`` (from 0) on one batch per micro-step; returns this rank's scalars, on the device.

        Raises:
            TrainingError: a loss or a gradient is not finite; the update it would have gone into did not happen.
        """

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds: the parameters that train, their optimizer state, the average; not copies."""

    def resume_at(self, step: int) -> None:
        """Go on with update ``step`` (from 0), :meth:`tensors` having been filled in place."""


class PretrainStep:
    """The teacher stage (plain flow matching) and the pretrain stage.

    Args:
        recipe: the run.
        mesh: this process's place in it.
        student: on the device, sharded.
        negative: ``[1, S, text_dim]`` negative prompt of the dataset.
    """

    def __init__(self, recipe: Recipe, mesh: Mesh, student: AnyFlowTransformer3DModel, negative: Tensor) -> None:
        self.student = student
        self._micro = _MicroSteps(recipe, mesh, negative)
        self.method = AnyFlowPretrainMethod(
            student, build_scheduler(recipe), pretrain_config(recipe), process_group=mesh.data_group
        )
        self.optimizer = NetworkOptimizer("student", student, recipe.optimizer, recipe.steps)
        self.ema = _ema(recipe, student)

    def update(self, batches: Sequence[Batch], step: int, **draws: Any) -> dict[str, Tensor | float]:
        """See :class:`Step`; ``draws`` are arguments of the method's loss, in place of random ones."""

        def loss(micro: int, batch: Batch) -> LossOutput:
            generator = self._micro.generator("student", step, micro)
            given = {"time_pairs": self._micro.time_pairs(batch, step, micro, self.method.config), **draws}
            return self.method.loss(
                batch.latents, batch.prompt_embeds, self._micro.negative, generator=generator, **given
            )

        losses = self._micro.backward(batches, loss)
        norm = self.optimizer.update(step, losses)
        self.ema.update(self.student)
        return {**losses, "grad_norm": norm, "lr": self.optimizer.lr(step)}

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`Step`."""
        return {**self.optimizer.tensors(), **_ema_tensors(self.ema)}

    def resume_at(self, step: int) -> None:
        """See :class:`Step`."""
        self.ema.updates = step


class OnPolicyStep:
    """Stage 2: the student on its own rollouts every ``generator_update_interval`` updates, then always the critic.

    Args:
        recipe: the run.
        mesh: this process's place in it.
        student: on the device, sharded.
        teacher: the real score; not trained.
        critic: the fake score.
        negative: ``[1, S, text_dim]`` negative prompt of the dataset.

    Raises:
        ValueError: the method's own ``pretrain`` is set, or its settings do not fit the networks.
    """

    def __init__(
        self,
        recipe: Recipe,
        mesh: Mesh,
        student: AnyFlowTransformer3DModel,
        teacher: AnyFlowTransformer3DModel,
        critic: AnyFlowTransformer3DModel,
        negative: Tensor,
    ) -> None:
        assert recipe.on_policy is not None
        if recipe.on_policy.method.pretrain != PretrainConfig():
            raise ValueError("on_policy.method.pretrain must be left alone: co-training takes the recipe's pretrain")
        self.student, self.critic = student, critic
        self._micro = _MicroSteps(recipe, mesh, negative)
        self._interval = recipe.on_policy.generator_update_interval
        config = dataclasses.replace(recipe.on_policy.method, pretrain=pretrain_config(recipe))
        self.method = AnyFlowOnPolicyMethod(
            student, teacher, critic, build_scheduler(recipe), config, process_group=mesh.data_group
        )
        self.optimizer = NetworkOptimizer("student", student, recipe.optimizer, recipe.steps)
        self.critic_optimizer = NetworkOptimizer("critic", critic, recipe.on_policy.critic_optimizer, recipe.steps)
        self.ema = _ema(recipe, student, self._interval)

    def update(
        self,
        batches: Sequence[Batch],
        step: int,
        *,
        student_draws: Mapping[str, Any] | None = None,
        critic_draws: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor | float]:
        """See :class:`Step`; the draws are arguments of the two losses below, in place of random ones."""
        scalars: dict[str, Tensor | float] = {}
        if step % self._interval == 0:
            losses = self._micro.backward(batches, lambda m, b: self._student_loss(step, m, b, student_draws))
            norm = self.optimizer.update(step, losses)
            scalars = {**losses, "grad_norm": norm, "lr": self.optimizer.lr(step)}
            self.ema.update(self.student)
        losses = self._micro.backward(batches, lambda m, b: self._critic_loss(step, m, b, critic_draws))
        norm = self.critic_optimizer.update(step, losses)
        scalars |= {f"critic_{name}": value for name, value in {**losses, "grad_norm": norm}.items()}
        return {**scalars, "critic_lr": self.critic_optimizer.lr(step)}

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`Step`."""
        return {**self.optimizer.tensors(), **self.critic_optimizer.tensors(), **_ema_tensors(self.ema)}

    def resume_at(self, step: int) -> None:
        """See :class:`Step`."""
        self.ema.updates = _ceil_div(step, self._interval)

    def _student_loss(self, step: int, micro: int, batch: Batch, draws: Mapping[str, Any] | None) -> LossOutput:
        """The arguments of ``student_loss`` but for the batch; rollout and data have the same prompts."""
        generator = self._micro.generator("student", step, micro)
        given: dict[str, Any] = {}
        if self.method.pretrain is not None:
            pairs = self._micro.time_pairs(batch, step, micro, self.method.pretrain.config)
            given = {"latents": batch.latents, "data_prompt_embeds": batch.prompt_embeds, "time_pairs": pairs}
        given = {"noise": randn_like(batch.latents, generator), **given, **({} if draws is None else draws)}
        return self.method.student_loss(
            prompt_embeds=batch.prompt_embeds,
            negative_prompt_embeds=self._micro.negative,
            generator=generator,
            **given,
        )

    def _critic_loss(self, step: int, micro: int, batch: Batch, draws: Mapping[str, Any] | None) -> LossOutput:
        """``rollout_noise``, ``steps`` of a fresh rollout of the student as it is now; ``t``, ``noise`` of the loss."""
        generator = self._micro.generator("critic", step, micro)
        given = {} if draws is None else dict(draws)
        noise = given.pop("rollout_noise", None)
        steps = given.pop("steps", None)
        noise = randn_like(batch.latents, generator) if noise is None else noise
        num_steps, grad_step = self.method.draw_steps(generator, noise.device) if steps is None else steps
        with torch.no_grad():
            samples = self.method.rollout(
                noise, batch.prompt_embeds, num_steps=num_steps, grad_step=grad_step, generator=generator
            )
        return self.method.critic_loss(samples, batch.prompt_embeds, generator=generator, **given)


class _MicroSteps:
    """What the loss evaluations of one update share: seeds, precision, accumulation."""

    def __init__(self, recipe: Recipe, mesh: Mesh, negative: Tensor) -> None:
        self._recipe, self._mesh = recipe, mesh
        self.negative = negative.to(mesh.device)

    def generator(self, purpose: str, step: int, micro: int) -> torch.Generator:
        """Of this data rank; the ranks that share a sample draw alike."""
        return draw_generator(self._recipe.seed, purpose, step, micro, self._mesh.data_rank)

    def time_pairs(self, batch: Batch, step: int, micro: int, config: PretrainConfig) -> TimePairs:
        """The kinds of samples are shared out over ranks *and* micro-steps, whatever is how large."""
        micros = self._recipe.gradient_accumulation
        return sample_time_pairs(
            len(batch.latents),
            diffusion_ratio=config.diffusion_ratio,
            consistency_ratio=config.consistency_ratio,
            rank=self._mesh.data_rank * micros + micro,
            world_size=self._mesh.data_world * micros,
            generator=self.generator("times", step, micro),
            device=batch.latents.device,
            offset=step,
        )

    def backward(self, batches: Sequence[Batch], loss: Callable[[int, Batch], LossOutput]) -> dict[str, Tensor]:
        """Gradients of the mean loss of the batches; returns the means of the loss and of its metrics."""
        device, count = self._mesh.device, len(batches)
        means: dict[str, Tensor] = {}
        for micro, batch in enumerate(batches):
            on_device = dataclasses.replace(
                batch,
                latents=to_device(batch.latents, device),
                prompt_embeds=to_device(batch.prompt_embeds, device),
            )
            # Without its cache, which would hold a second copy of all weights, sharded ones too.
            with torch.autocast(
                device.type, torch.bfloat16, enabled=self._recipe.precision == "bf16", cache_enabled=False
            ):
                output = loss(micro, on_device)
            (output.loss / count).backward()
            for name, value in {"loss": output.loss.detach(), **output.metrics}.items():
                share = value.float() / count
                means[name] = means[name] + share if name in means else share
        return means


def build_scheduler(recipe: Recipe) -> FlowMapEulerDiscreteScheduler:
    """The scheduler of training, previews and the exported model."""
    config = recipe.scheduler
    return FlowMapEulerDiscreteScheduler(config.num_train_timesteps, shift=config.shift, weight_type=config.weight_type)


def pretrain_config(recipe: Recipe) -> PretrainConfig:
    """The recipe's pretrain loss; in the teacher stage, that of plain flow matching."""
    if recipe.stage != "teacher":
        return recipe.pretrain
    return dataclasses.replace(
        recipe.pretrain, diffusion_ratio=1.0, consistency_ratio=0.0, fuse_guidance_scale=1.0, derivative="central"
    )


def _ema(recipe: Recipe, student: AnyFlowTransformer3DModel, interval: int = 1) -> EMA:
    """The average; it moves with the student, which is updated every ``interval`` steps."""
    start = _ceil_div(recipe.ema.start_step, interval)
    return EMA(student, recipe.ema.decay, warmup=False, start_step=start)


def _ema_tensors(ema: EMA) -> dict[str, Tensor]:
    return {f"ema/{name}": average for name, average in ema.state_dict().items()}


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
