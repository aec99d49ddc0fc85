"""Time whole samples: the loop at 1 to 50 evaluations, and an accelerated pipeline."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import networks
import peers
import roofline
from networks import Videos, without_gradient
from sizes import PUBLISHED, SMALL, CausalSize, NetworkSize
from timing import OURS, Step
from torch import Tensor, nn
from workloads import Contest, Line, Place, Workload

import anyflow
from anyflow.sampling import sample
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

DIFFUSERS, COMPILED = "diffusers", "diffusers + compile"
OWN_LOOP = "diffusers' own"
SHIFT = 5.0
QUICK_STEPS = 4
STEPS = (1, 4, 8, 50)


def pipeline(
    transformer: nn.Module, size: NetworkSize, data: Videos, steps: int, accelerated: bool
) -> Step:
    """Return the call of diffusers' pipeline, from prompt embeddings to ``[B, F, C, H, W]``.

    The causal one has the chunks that its transformer's config names.
    """
    import diffusers

    scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=SHIFT)
    causal = isinstance(size, CausalSize)
    pipe = (diffusers.AnyFlowFARPipeline if causal else diffusers.AnyFlowPipeline)(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    if accelerated:
        anyflow.accelerate(pipe)
    frames, _, height, width = size.latents
    # the pipeline's latents are [B, C, F, H, W]
    noise = data.noise.to(size.dtype).transpose(1, 2).contiguous()

    def step() -> Tensor:
        latents = pipe(
            prompt_embeds=data.prompt,
            latents=noise,
            height=8 * height,
            width=8 * width,
            num_frames=4 * (frames - 1) + 1,
            num_inference_steps=steps,
            output_type="latent",
        ).frames
        return latents.transpose(1, 2)

    return step


def transformer_alone(model: Any, size: NetworkSize, data: Videos, steps: int) -> Step:
    """Return the evaluations of diffusers' pipeline, without what it does around them."""
    sigmas = tuple(FlowMapEulerDiscreteScheduler(shift=SHIFT).schedule(steps).tolist())
    evaluate = peers.network(model, size.dtype)
    return without_gradient(lambda: peers.rollout(evaluate, data.noise, sigmas, data.prompt))


def loops(size: NetworkSize, place: Place) -> Callable[[int], Contest]:
    """Build the networks, and return what builds the loop of a number of steps."""
    ours, data = networks.ours(size, place.device), networks.videos(size, place.device)
    made: list[Any] = []  # diffusers' model, made when the first peer is
    noise, scheduler = data.noise.to(size.dtype), FlowMapEulerDiscreteScheduler(shift=SHIFT)

    def contest(steps: int) -> Contest:
        def with_model(model: Any) -> Step:
            return lambda: sample(model, scheduler, noise, data.prompt, num_inference_steps=steps)

        def theirs(compiler: str | None = None) -> Step:
            made[:] = made or [networks.peer(size, ours)]
            model = networks.variant(made[0], compiler)
            if place.device.type == "cuda":
                return transformer_alone(model, size, data, steps)
            return pipeline(model, size, data, steps, accelerated=False)

        makers = {
            OURS: lambda: with_model(ours),
            DIFFUSERS: theirs,
            COMPILED: partial(theirs, place.compiler),
        }
        work = roofline.work(size, steps * size.batch)
        return Contest(makers, work.bytes, work.flops)

    return contest


def _loop(size: NetworkSize, steps: int, place: Place) -> Contest:
    return loops(size, place)(steps)


def _accelerated(size: NetworkSize, steps: int, place: Place) -> Contest:
    """Build two pipelines over one transformer, of which one is accelerated."""
    peer = networks.peer(size, networks.ours(size, place.device))
    call = partial(pipeline, peer, size, networks.videos(size, place.device), steps)
    work = roofline.work(size, steps * size.batch)
    makers = {OURS: partial(call, True), OWN_LOOP: partial(call, False)}
    return Contest(makers, work.bytes, work.flops)


def _workloads(size: NetworkSize, device: str) -> list[Workload]:
    def workload(what: str, steps: int, against: tuple[str, ...], build: Any) -> Workload:
        return Workload(
            f"sampling/{what}/{size.name}/{steps} steps",
            against,
            partial(build, size, steps),
            device,
            size.dtype,
            quick=device == "cpu" and steps == QUICK_STEPS,
            min_rounds=3,
        )

    found = [workload("loop", n, (DIFFUSERS, COMPILED), _loop) for n in STEPS]
    return [*found, workload("accelerate", QUICK_STEPS, (OWN_LOOP,), _accelerated)]


WORKLOADS = [*_workloads(SMALL, "cpu"), *_workloads(PUBLISHED["1.3B"], "cuda")]


def bench_sampling(workload: Workload, measured: Line) -> None:
    """Time the way from noise to latents."""
