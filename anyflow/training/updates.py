"""Make one update of each stage: losses, gradients, guard, optimizer, average."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from anyflow.data import Batch
from anyflow.methods import (
    AnyFlowOnPolicyMethod,
    AnyFlowPretrainMethod,
    LossOutput,
    PretrainConfig,
    RolloutDraw,
)
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.schedulers import FlowMapEulerDiscreteScheduler
from anyflow.training.accumulation import Accumulation, Losses, MicroBatch
from anyflow.training.distributed import Mesh
from anyflow.training.ema import EMA
from anyflow.training.flops import OnPolicyFlops
from anyflow.training.optimization import NetworkOptimizer
from anyflow.training.update_flops import UpdateFlops

if TYPE_CHECKING:
    from anyflow.training.config import Recipe


_ON_CHUNKS = ("num_chunks", "bidirectional")  # arguments that are the same in all micro-steps


class StageUpdates(Protocol):
    """Define what the loop needs of a stage: its networks, and one update after the other.

    Attributes:
        student: the network that is trained.
        teacher: the network whose velocity is the pretrain loss's target, or None.
        ema: the student's average.
        flops: model FLOPs of the last update's networks, on all ranks together.
    """

    student: AnyFlowTransformer3DModel
    teacher: AnyFlowTransformer3DModel | None
    ema: EMA
    flops: int

    def update(self, batches: Sequence[Batch], step: int) -> dict[str, Tensor | float]:
        """Make update number ``step`` (from 0) of one batch per micro-step.

        Returns:
            This rank's scalars, on the device.

        Raises:
            TrainingError: a loss or a gradient is not finite; nothing was updated.
        """

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds, without copies.

        These are the parameters that train, their optimizer state and the average.
        """

    def resume_at(self, step: int) -> None:
        """Resume at update ``step`` (from 0); :meth:`tensors` have been filled in place."""


class PretrainUpdates:
    """Make the updates of the teacher stage (plain flow matching) and of the pretrain stage.

    Args:
        recipe: the run.
        mesh: this process's place in it.
        student: the network that is trained, on the device, sharded.
        negative: ``[1, S, text_dim]`` negative prompt of the dataset.
        teacher: the network whose velocity is the target, with
            ``pretrain.velocity_target=teacher``; not trained.
    """

    def __init__(
        self,
        recipe: Recipe,
        mesh: Mesh,
        student: AnyFlowTransformer3DModel,
        negative: Tensor,
        teacher: AnyFlowTransformer3DModel | None = None,
    ) -> None:
        self.student, self.teacher, self.flops = student, teacher, 0
        networks = (student,) if teacher is None else (student, teacher)
        self._counter = UpdateFlops(*networks, data_world=mesh.data_world)
        self._accumulation = Accumulation(recipe, mesh, negative)
        self.method = AnyFlowPretrainMethod(
            student,
            build_scheduler(recipe),
            pretrain_config(recipe),
            teacher=teacher,
            process_group=mesh.data_group,
        )
        self.optimizer = NetworkOptimizer("student", student, recipe.optimizer, recipe.steps)
        self.ema = _ema(recipe, student)

    def update(
        self, batches: Sequence[Batch], step: int, **draws: Any
    ) -> dict[str, Tensor | float]:
        """Implement :meth:`StageUpdates.update`.

        Draws replace random arguments of the method's loss. A draw is that of every micro-step, or
        a list with one for each.
        """
        config = self.method.config
        shared = self._accumulation.pretrain(self.method, step)
        shared |= {name: draws.pop(name) for name in list(draws) if name in _ON_CHUNKS}
        adds = shared.get("bidirectional", False)
        shared["generator"] = self._accumulation.generator("student", step)
        pairs = self._accumulation.time_pairs(batches, step, config, draws.pop("time_pairs", None))

        def loss(micro: MicroBatch) -> LossOutput:
            arguments = {
                **shared,
                **self._accumulation.pretrain_draws(micro, config, bidirectional=adds),
                **micro.given,
            }
            return self.method.loss(
                micro.latents, micro.prompt_embeds, self._accumulation.negative, **arguments
            )

        losses = self._accumulation.backward(batches, step, loss, pairs=pairs, given=draws)
        # means over kinds of samples, not over micro-steps
        scalars = losses.means | shared["balance"].metrics()
        norm = self.optimizer.update(step, scalars, losses.norms)
        self.ema.update(self.student)
        self.flops = self._counter.pretrain(batches, self.method, shared)
        return {**scalars, "grad_norm": norm, "lr": self.optimizer.lr(step)}

    def tensors(self) -> dict[str, Tensor]:
        """Implement :meth:`StageUpdates.tensors`."""
        return {**self.optimizer.tensors(), **_ema_tensors(self.ema)}

    def resume_at(self, step: int) -> None:
        """Implement :meth:`StageUpdates.resume_at`."""
        self.ema.updates = step


class OnPolicyUpdates:
    """Make the updates of stage 2: of the student at an interval, of the critic always.

    The interval is ``generator_update_interval``; the student comes first.

    Args:
        recipe: the run.
        mesh: this process's place in it.
        student: the network that is trained, on the device, sharded.
        teacher: the real score; not trained.
        critic: the fake score.
        negative: ``[1, S, text_dim]`` negative prompt of the dataset.

    Raises:
        ValueError: the method's settings do not fit the networks.
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
        self.student, self.critic, self.flops = student, critic, 0
        self.teacher = teacher if recipe.pretrain.velocity_target == "teacher" else None
        self._counter = UpdateFlops(student, teacher, critic, data_world=mesh.data_world)
        self._accumulation, self._device = Accumulation(recipe, mesh, negative), mesh.device
        self._interval = recipe.on_policy.generator_update_interval
        config = recipe.on_policy.method
        self._pretrain = pretrain_config(recipe)
        self.method = AnyFlowOnPolicyMethod(
            student,
            teacher,
            critic,
            build_scheduler(recipe),
            config,
            pretrain=self._pretrain if config.cotrain_pretrain else None,
            process_group=mesh.data_group,
        )
        self.optimizer = NetworkOptimizer("student", student, recipe.optimizer, recipe.steps)
        self.critic_optimizer = NetworkOptimizer(
            "critic", critic, recipe.on_policy.critic_optimizer, recipe.steps
        )
        self.ema = _ema(recipe, student, self._interval)

    def update(
        self,
        batches: Sequence[Batch],
        step: int,
        *,
        student_draws: Mapping[str, Any] | None = None,
        critic_draws: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor | float]:
        """Implement :meth:`StageUpdates.update`; draws replace random arguments of a loss."""
        scalars: dict[str, Tensor | float] = {}
        self.flops = 0
        if step % self._interval == 0:
            means, norms = self._student_losses(
                batches, step, {} if student_draws is None else dict(student_draws)
            )
            norm = self.optimizer.update(step, means, norms)
            scalars = {**means, "grad_norm": norm, "lr": self.optimizer.lr(step)}
            self.ema.update(self.student)
        losses = self._critic_losses(
            batches, step, {} if critic_draws is None else dict(critic_draws)
        )
        norm = self.critic_optimizer.update(step, losses.means, losses.norms)
        scalars |= {
            f"critic_{name}": value for name, value in {**losses.means, "grad_norm": norm}.items()
        }
        return {**scalars, "critic_lr": self.critic_optimizer.lr(step)}

    def tensors(self) -> dict[str, Tensor]:
        """Implement :meth:`StageUpdates.tensors`."""
        return {
            **self.optimizer.tensors(),
            **self.critic_optimizer.tensors(),
            **_ema_tensors(self.ema),
        }

    def resume_at(self, step: int) -> None:
        """Implement :meth:`StageUpdates.resume_at`."""
        self.ema.updates = _ceil_div(step, self._interval)

    def _student_losses(
        self, batches: Sequence[Batch], step: int, draws: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Take the student's loss backward, on rollouts and data of the same prompts.

        Returns:
            Means and norms of the loss.
        """
        config = None if self.method.pretrain is None else self.method.pretrain.config
        given_pairs = draws.pop("time_pairs", None)
        pairs = (
            None
            if config is None
            else self._accumulation.time_pairs(batches, step, config, given_pairs)
        )
        shared: dict[str, Any] = {}
        if self.method.pretrain is not None:
            shared = self._accumulation.pretrain(self.method.pretrain, step)
            shared |= {name: draws.pop(name) for name in list(draws) if name in _ON_CHUNKS}
        adds = shared.get("bidirectional", False)
        drawn_rollout = self._rollout_draw("student", step, draws)
        shared["rollout_draw"] = drawn_rollout
        self.flops += self._flops(batches, shared).student_loss(drawn_rollout)
        shared["generator"] = self._accumulation.generator("student", step)

        def loss(micro: MicroBatch) -> LossOutput:
            drawn: dict[str, Any] = {
                "noise": micro.noise("rollout"),
                "t": micro.draws.uniform("score time"),
                "score_noise": micro.noise("score noise"),
            }
            if config is not None:
                of_data = self._accumulation.pretrain_draws(micro, config, bidirectional=adds)
                drawn |= {"data_noise": of_data.pop("noise"), **of_data}
                drawn |= {"latents": micro.latents, "data_prompt_embeds": micro.prompt_embeds}
            return self.method.student_loss(
                prompt_embeds=micro.prompt_embeds,
                negative_prompt_embeds=self._accumulation.negative,
                **{**shared, **drawn, **micro.given},
            )

        losses = self._accumulation.backward(batches, step, loss, pairs=pairs, given=draws)
        means = losses.means if config is None else losses.means | shared["balance"].metrics()
        return means, losses.norms

    def _critic_losses(self, batches: Sequence[Batch], step: int, draws: dict[str, Any]) -> Losses:
        """Take the critic's loss backward, on a fresh rollout of the updated student.

        Args:
            batches, step: as for :meth:`update`.
            draws: ``rollout_noise`` and ``rollout_draw`` of the rollout, ``t`` and ``noise`` of the
                loss.
        """
        drawn_rollout = self._rollout_draw("critic", step, draws)
        self.flops += self._flops(batches, {}).critic_loss(drawn_rollout)
        generator = self._accumulation.generator("critic", step)

        def loss(micro: MicroBatch) -> LossOutput:
            drawn = {
                "rollout_noise": micro.noise("critic rollout"),
                "t": micro.draws.normal("critic time").sigmoid(),
                "noise": micro.noise("critic noise"),
                **micro.given,
            }
            with torch.no_grad():
                samples = self.method.rollout(
                    drawn.pop("rollout_noise"),
                    micro.prompt_embeds,
                    num_steps=drawn_rollout.num_steps,
                    grad_step=drawn_rollout.grad_step,
                    generator=generator,
                )
            return self.method.critic_loss(
                samples, micro.prompt_embeds, generator=generator, **drawn
            )

        return self._accumulation.backward(batches, step, loss, given=draws)

    def _flops(self, batches: Sequence[Batch], shared: Mapping[str, Any]) -> OnPolicyFlops:
        return self._counter.on_policy(batches, self.method, self._pretrain, shared)

    def _rollout_draw(self, purpose: str, step: int, draws: dict[str, Any]) -> RolloutDraw:
        """Take ``rollout_draw`` out of the given draws, or draw one for all micro-steps."""
        given = draws.pop("rollout_draw", None)
        if given is not None:
            return RolloutDraw(*given)
        generator = self._accumulation.generator(f"{purpose} steps", step)
        return self.method.draw_rollout(generator, self._device)


def build_scheduler(recipe: Recipe) -> FlowMapEulerDiscreteScheduler:
    """Build the scheduler of training, previews and the exported model."""
    return FlowMapEulerDiscreteScheduler.from_config(recipe.scheduler)


def pretrain_config(recipe: Recipe) -> PretrainConfig:
    """Return the settings of the pretrain loss; in the teacher stage, those of flow matching."""
    if recipe.stage != "teacher":
        return recipe.pretrain
    return dataclasses.replace(
        recipe.pretrain,
        diffusion_ratio=1.0,
        consistency_ratio=0.0,
        fuse_guidance_scale=1.0,
        derivative="central",
        velocity_target="data",
    )


def _ema(recipe: Recipe, student: AnyFlowTransformer3DModel, interval: int = 1) -> EMA:
    """Build the average; it moves with the student, which is updated every ``interval`` steps."""
    start = _ceil_div(recipe.ema.start_step, interval)
    return EMA(student, recipe.ema.decay, warmup=False, start_step=start)


def _ema_tensors(ema: EMA) -> dict[str, Tensor]:
    return {f"ema/{name}": average for name, average in ema.state_dict().items()}


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
