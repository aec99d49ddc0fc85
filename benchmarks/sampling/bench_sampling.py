"""Sampling latents: the whole loop at 1 to 50 network evaluations, its caches, and a diffusers
pipeline accelerated.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import peers
import pytest
from interleave import OURS, Step
from peers import SMALL, WAN_1B, Batch, Size
from torch import Tensor, nn
from workloads import COMPILED, Contest, Line, Setting, Workload

import anyflow
from anyflow.sampling import sample
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

DIFFUSERS, UNCACHED, OWN_LOOP = "diffusers", "without caches", "diffusers' own"
SHIFT = 5.0
QUICK_STEPS = 4
STEPS = (1, 4, 8, 50)
ACCELERATE_GOAL = 1.3


class WithoutCaches(nn.Module):
    """A model that only takes timesteps and text: what samples with it embeds and projects both in
    every step.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's."""
        return self.model(*args, **kwargs)


def _pipeline(
    transformer: nn.Module, size: Size, data: Batch, steps: int, accelerated: bool
) -> Step:
    """The call of diffusers' pipeline, from prompt embeddings to latents ``[B, F, C, H, W]``."""
    import diffusers

    scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=SHIFT)
    pipe = diffusers.AnyFlowPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    if accelerated:
        anyflow.accelerate(pipe)
    _, frames, _, height, width = size.latents
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


def _loop(size: Size, steps: int, setting: Setting) -> Contest:
    peer, ours = peers.models(size, setting.device)
    data = peers.batch(size, setting.device)
    noise, scheduler = data.noise.to(size.dtype), FlowMapEulerDiscreteScheduler(shift=SHIFT)

    def with_model(model: Any) -> Step:
        return lambda: sample(model, scheduler, noise, data.prompt, num_inference_steps=steps)

    contest = {
        OURS: with_model(ours.eval()),
        UNCACHED: with_model(WithoutCaches(ours)),
        DIFFUSERS: _pipeline(peer.eval(), size, data, steps, accelerated=False),
    }
    if setting.compile:
        contest[COMPILED] = _pipeline(peers.compiled(peer), size, data, steps, accelerated=False)
    return Contest(contest, steps * size.forward_bytes(), steps * size.forward_flops())


def _accelerated(size: Size, steps: int, setting: Setting) -> Contest:
    """Two pipelines over one transformer, of which one is accelerated."""
    peer, _ = peers.models(size, setting.device)
    data = peers.batch(size, setting.device)
    contest = {
        OURS: _pipeline(peer.eval(), size, data, steps, accelerated=True),
        OWN_LOOP: _pipeline(peer, size, data, steps, accelerated=False),
    }
    return Contest(contest, steps * size.forward_bytes(), steps * size.forward_flops())


def _workloads(size: Size, device: str) -> list[Workload]:
    def workload(
        what: str, steps: int, against: tuple[str, ...], build: Any, goals: dict[str, float]
    ) -> Workload:
        return Workload(
            f"sampling/{what}/{size.label}/{steps} steps",
            against,
            partial(build, size, steps),
            device,
            size.dtype,
            quick=device == "cpu" and steps == QUICK_STEPS,
            goals=goals if device == "cpu" else {},
            min_rounds=3,
        )

    found = [workload("loop", n, (DIFFUSERS, COMPILED, UNCACHED), _loop, {}) for n in STEPS]
    return [
        *found,
        workload("accelerate", QUICK_STEPS, (OWN_LOOP,), _accelerated, {OWN_LOOP: ACCELERATE_GOAL}),
    ]


WORKLOADS = [*_workloads(SMALL, "cpu"), *_workloads(WAN_1B, "cuda")]


@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def bench_sampling(workload: Workload, measured: Line) -> None:
    """From noise to latents."""
