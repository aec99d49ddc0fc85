"""Time training steps, to the gradients, against the peers' formulation.

On the CPU all weights train in fp32. On a GPU it is the published recipe: adapters on a frozen
network, gradient checkpointing, bf16 autocast. The optimizer's update is the same for everyone and
left out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import networks
import peers
import roofline
import torch
from sizes import PUBLISHED, SHORT_BATCH, SMALL_BATCH, NetworkSize
from timing import OURS, Step
from torch import Tensor
from workloads import Contest, Line, Place, Workload

from anyflow.methods import (
    AnyFlowOnPolicyMethod,
    AnyFlowPretrainMethod,
    OnPolicyConfig,
    PretrainConfig,
    TimePairs,
)

FORMULATION, COMPILED = "peers' formulation", "peers' formulation + compile"
GUIDANCE, EPSILON = 3.0, 5.0


@dataclass(frozen=True)
class TrainingPlan:
    """Describe the steps of the methods on a network.

    Attributes:
        size: of the network; its batch is that of the draws.
        t, r: of the samples of a pretrain step.
        rollout: number of steps, and the one that carries the gradient: a shortcut of three
            evaluations.
        score_times: of the samples of an on-policy step.
        adapters: train adapters with checkpointing under autocast, as the published recipe does;
            else all weights.
    """

    size: NetworkSize
    t: tuple[float, ...]
    r: tuple[float, ...]
    rollout: tuple[int, int]
    score_times: tuple[float, ...]
    adapters: bool

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return what a loss is computed under."""
        enabled = self.adapters and self.size.dtype == torch.bfloat16
        return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)

    @property
    def evaluations(self) -> dict[str, roofline.Evaluations]:
        """Return what ours evaluates in a step of each method."""
        picked = sum(t != r for t, r in zip(self.t, self.r, strict=True))
        pretrain = roofline.pretrain_evaluations(len(self.t), picked)["ours"]
        return {"pretrain": pretrain, **roofline.on_policy_evaluations(len(self.score_times))}

    def flops(self, *methods: str) -> float:
        """Return the FLOPs of steps: a backward is two forwards, checkpointing is another one."""
        per_graded = 4 if self.adapters else 3
        passes = sum(self.evaluations[name].passes(per_graded) for name in methods)
        return roofline.work(self.size, passes).flops


# The kinds of samples in the published proportions: half r = t, a quarter r = 0, a quarter between.
_FOUR = ((0.7, 0.4, 0.8, 0.6), (0.7, 0.4, 0.0, 0.3), (4, 1), (0.3, 0.5, 0.7, 0.9), False)
# One sample with r = t, one without.
_TWO = ((0.7, 0.6), (0.7, 0.2), (8, 3), (0.5,), True)


def on_cpu(size: NetworkSize) -> TrainingPlan:
    """Return the plan of a CPU."""
    return TrainingPlan(size, *_FOUR)


def on_gpu(size: NetworkSize) -> TrainingPlan:
    """Return the plan of a GPU."""
    return TrainingPlan(size, *_TWO)


class PlanParts:
    """Build the networks and the draws of a plan on a device."""

    def __init__(self, plan: TrainingPlan, batch: int, device: torch.device) -> None:
        self.plan, self.device = plan, device
        # under autocast, latents and prompts come in fp32
        self.dtype = torch.float32 if plan.adapters else plan.size.dtype
        self.data = networks.videos(replace(plan.size, batch=batch, dtype=self.dtype), device)

    def network(self, theirs: bool, seed: int = 0, trained: bool = True) -> Any:
        """Build one of ours or of diffusers'."""
        model = networks.ours(self.plan.size, self.device, seed)
        model = networks.peer(self.plan.size, model) if theirs else model
        if not self.plan.adapters:
            return model.train()
        return networks.add_adapters(model, self.plan.size) if trained else model

    def draws(self) -> peers.FixedDraws:
        """Return what an on-policy step draws."""
        steps, grad_step = self.plan.rollout
        sigmas = peers.scheduler().schedule(steps).tolist()
        kept = tuple(sigmas[i] for i in (0, grad_step, grad_step + 1, steps))
        t = torch.tensor(self.plan.score_times, device=self.device)
        # the latents are noise too, independent of the other
        return peers.FixedDraws(kept, t, self.data.latents, GUIDANCE)

    def pretrain_step(self, data: networks.Videos, config: PretrainConfig, **loss: Any) -> Step:
        """Return our step of the pretrain loss on a network of its own.

        Args:
            data: whole videos.
            config: of the method.
            loss: arguments of the loss.
        """
        plan, model = self.plan, self.network(theirs=False)
        method = AnyFlowPretrainMethod(model, peers.scheduler(), config)
        t, r = self.times()
        pairs, latents = TimePairs(t, r, t == r), data.latents.to(self.dtype)

        def step() -> Tensor:
            model.zero_grad(set_to_none=True)
            with plan.autocast(self.device):
                found = method.loss(
                    *(latents, data.prompt, data.negative),
                    noise=data.noise,
                    time_pairs=pairs,
                    **loss,
                ).loss
            found.backward()
            return found.detach()

        return step

    def times(self) -> tuple[Tensor, Tensor]:
        """Return t and r of the samples of a pretrain step."""
        return tuple(torch.tensor(u, device=self.device) for u in (self.plan.t, self.plan.r))

    def under_autocast(self, step: Step) -> Step:
        """Return the step under the plan's autocast."""

        def wrapped() -> object:
            with self.plan.autocast(self.device):
                return step()

        return wrapped


def pretrain(plan: TrainingPlan, place: Place) -> Contest:
    """Build the pretrain step: ours evaluates without gradient what has a factor other than 0."""
    device = place.device
    parts = PlanParts(plan, len(plan.t), device)
    data, (t, r) = parts.data, parts.times()

    def ours() -> Step:
        config = PretrainConfig(
            epsilon=EPSILON, fuse_guidance_scale=GUIDANCE, boundary="extrapolate"
        )
        return parts.pretrain_step(data, config)

    def theirs(compiler: str | None = None) -> Step:
        model = parts.network(theirs=True)
        model = model if compiler is None else networks.variant(model, compiler)
        return parts.under_autocast(
            peers.pretrain_step(
                model, peers.network(model, parts.dtype), data, t, r, GUIDANCE, EPSILON
            )
        )

    makers = {OURS: ours, FORMULATION: theirs, COMPILED: partial(theirs, place.compiler)}
    return Contest(makers, flops=plan.flops("pretrain"))


def on_policy(methods: tuple[str, ...], plan: TrainingPlan, place: Place) -> Contest:
    """Build the generator's step, the critic's, or one after the other."""
    device = place.device
    parts = PlanParts(plan, len(plan.score_times), device)
    data, draws = parts.data, parts.draws()

    def networks_of(theirs: bool) -> tuple[Any, Any, Any]:
        student, critic = (parts.network(theirs, seed) for seed in (0, 2))
        # a critic's step needs no teacher
        with_teacher = "generator" in methods
        teacher = parts.network(theirs, 1, trained=False) if with_teacher else student
        return student, teacher, critic

    def ours() -> Step:
        student, teacher, critic = networks_of(theirs=False)
        steps, grad_step = plan.rollout
        config = OnPolicyConfig(real_guidance_scale=GUIDANCE, num_steps=(steps,))
        method = AnyFlowOnPolicyMethod(student, teacher, critic, peers.scheduler(), config)
        noise = data.noise.to(parts.dtype)
        rollout = partial(method.rollout, noise, data.prompt, num_steps=steps, grad_step=grad_step)

        def generator() -> Tensor:
            student.zero_grad(set_to_none=True)
            with plan.autocast(device):
                loss = method.generator_loss(
                    rollout(), data.prompt, data.negative, t=draws.t, noise=draws.noise
                ).loss
            loss.backward()
            return loss.detach()

        def train_critic() -> Tensor:
            critic.zero_grad(set_to_none=True)
            with plan.autocast(device):
                with torch.no_grad():
                    samples = rollout()
                loss = method.critic_loss(samples, data.prompt, t=draws.t, noise=draws.noise).loss
            loss.backward()
            return loss.detach()

        return _one_after_the_other(methods, generator, train_critic)

    def theirs() -> Step:
        student, teacher, critic = networks_of(theirs=True)
        generator = peers.generator_step(student, teacher, critic, parts.dtype, data, draws)
        train_critic = peers.critic_step(student, critic, parts.dtype, data, draws)
        return parts.under_autocast(_one_after_the_other(methods, generator, train_critic))

    return Contest({OURS: ours, FORMULATION: theirs}, flops=plan.flops(*methods))


def _one_after_the_other(
    methods: tuple[str, ...], generator: Callable[[], Tensor], critic: Callable[[], Tensor]
) -> Step:
    chosen = [
        step for name, step in (("generator", generator), ("critic", critic)) if name in methods
    ]
    return lambda: [step() for step in chosen]


def _workload(
    what: str, build: Any, plan: TrainingPlan, count: int, device: str, quick: bool = False
) -> Workload:
    return Workload(
        f"methods/{what}/{plan.size.name}/{count}x{plan.size.tokens} tokens",
        (FORMULATION, COMPILED) if what == "pretrain" and device == "cpu" else (FORMULATION,),
        partial(build, plan),
        device,
        plan.size.dtype,
        quick,
        memory=True,
        min_rounds=3,
    )


def _all() -> list[Workload]:
    found = []
    for size in (SHORT_BATCH, SMALL_BATCH):
        builders = {"pretrain": pretrain}
        builders |= {name: partial(on_policy, (name,)) for name in ("generator", "critic")}
        for what, build in builders.items():
            quick = size is SHORT_BATCH
            found.append(_workload(what, build, on_cpu(size), size.batch, "cpu", quick))
    plan = on_gpu(PUBLISHED["1.3B"])
    both = partial(on_policy, ("generator", "critic"))
    found.append(_workload("pretrain", pretrain, plan, len(plan.t), "cuda"))
    return [*found, _workload("on-policy", both, plan, len(plan.score_times), "cuda")]


WORKLOADS = _all()


def bench_method(workload: Workload, measured: Line) -> None:
    """Time one step of a method."""
