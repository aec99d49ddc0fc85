"""Time the causal model: samples chunk by chunk, a cached step, the layout of training.

On a CPU diffusers' flex attention runs as it is written, uncompiled: it forms the matrix of all
scores, those that its mask hides too, and masks them afterwards. A compiled kernel would skip most
hidden blocks, so that ratios of samples and of training flatter ours; a cached step has no mask,
and there both compute the same scores.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import causal_roofline
import networks
import roofline
import torch
from networks import Videos, without_gradient
from roofline import Component
from sampling.bench_sampling import OWN_LOOP, SHIFT, pipeline
from sizes import CAUSAL, SHORT_CAUSAL, SMALL_CAUSAL, CausalSize
from timing import OURS, Step
from workloads import Contest, Line, Place, Workload

from anyflow.sampling import sample_causal
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

DIFFUSERS = "diffusers"
RECOMPUTED = "ours without a cache"
ALL_EIGHT = "8 steps for each chunk"
STEPS = (1, 2, 4)
QUICK_STEPS = 2


def sampled(model: Any, size: CausalSize, data: Videos, steps: Any, **options: Any) -> Step:
    """Return the call of our sampler, from noise to ``[B, F, C, H, W]``."""
    noise, scheduler = data.noise.to(size.dtype), FlowMapEulerDiscreteScheduler(shift=SHIFT)
    return partial(
        sample_causal,
        *(model, scheduler, noise, data.prompt),
        num_inference_steps=steps,
        **options,
    )


def sample(size: CausalSize, steps: int, place: Place) -> Contest:
    """Build whole samples: ours with a cache and without, and diffusers' pipeline."""
    ours, data = networks.ours(size, place.device), networks.videos(size, place.device)
    makers = {
        OURS: lambda: sampled(ours, size, data, steps),
        DIFFUSERS: lambda: pipeline(networks.peer(size, ours), size, data, steps, False),
        RECOMPUTED: lambda: sampled(ours, size, data, steps, use_cache=False),
    }
    return _contest(makers, size, causal_roofline.video(size, steps))


def accelerated(size: CausalSize, steps: int, place: Place) -> Contest:
    """Build two pipelines of diffusers over one transformer, of which one is accelerated."""
    peer = networks.peer(size, networks.ours(size, place.device))
    call = partial(pipeline, peer, size, networks.videos(size, place.device), steps)
    makers = {OURS: partial(call, True), OWN_LOOP: partial(call, False)}
    return _contest(makers, size, causal_roofline.video(size, steps))


def budgets(size: CausalSize, place: Place) -> Contest:
    """Build a video of 8 steps for the first chunk and 2 for the others, and one of 8 for each.

    The videos differ, and are not compared.
    """
    ours, data = networks.ours(size, place.device), networks.videos(size, place.device)
    chunks = len(size.chunk_partition)

    def shapes(steps: Any) -> Step:
        step = sampled(ours, size, data, steps)
        return lambda: step().shape  # type: ignore[attr-defined]

    makers = {
        OURS: lambda: shapes([8] + [2] * (chunks - 1)),
        ALL_EIGHT: lambda: shapes(8),
    }
    first, *others = causal_roofline.steps(size)
    calls = [first] * 8 + others * 2 + causal_roofline.encodings(size)
    parts = [part for call in calls for part in causal_roofline.forward(size, call)]
    return _contest(makers, size, parts)


def cached_step(size: CausalSize, place: Place) -> Contest:
    """Build the last step of the last chunk, which each side's own sampling has brought about.

    Neither call changes the caches that it reads.
    """
    ours, data = networks.ours(size, place.device), networks.videos(size, place.device)

    def theirs() -> Step:
        peer = networks.peer(size, ours)
        return last_call(peer, pipeline(peer, size, data, 1, accelerated=False))

    makers = {OURS: lambda: last_call(ours, sampled(ours, size, data, 1)), DIFFUSERS: theirs}
    return _contest(makers, size, causal_roofline.forward(size, causal_roofline.steps(size)[-1]))


def last_call(model: torch.nn.Module, sampling: Step) -> Step:
    """Sample once, and return the last call of the model, which returns the velocity."""
    calls: list[Callable[[], Any]] = []

    def keep(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        calls[:] = [partial(module, *args, **kwargs)]

    handle = model.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        sampling()
    finally:
        handle.remove()
    (call,) = calls
    return without_gradient(lambda: call()[0])


def training_layout(size: CausalSize, place: Place) -> Contest:
    """Build an evaluation of the training layout, without a gradient: flex has none on a CPU.

    Early chunks are compressed, and the full ones come noisy and clean. Diffusers' mask is made
    before, once. The clean copy of the last chunk, which nobody attends to, is among its tokens.
    """
    device = place.device
    ours, data = networks.ours(size, device), networks.videos(size, device)
    full = sum(size.chunk_partition[-size.full_chunk_limit :])
    noisy = torch.arange(size.frames, device=device) >= size.frames - full
    t, r = (torch.where(noisy, time, 0.0)[None] for time in (networks.T, networks.R))
    x, clean = data.noise.to(size.dtype), data.latents[:, -full:].to(size.dtype)
    clean_time = torch.zeros(1, full, device=device)
    arguments = (x, t, r, data.prompt, list(size.chunk_partition), None, clean, clean_time)

    def evaluation(model: Any, **options: Any) -> Step:
        return without_gradient(lambda: model(*arguments, return_dict=False, **options)[0])

    def theirs() -> Step:
        peer = networks.peer(size, ours)
        mask = peer.build_attention_mask(
            chunk_partition=list(size.chunk_partition),
            height=size.latents[2],
            width=size.latents[3],
            has_clean_context=True,
            device=device,
        )
        return evaluation(peer, attention_mask=mask)

    return Contest({OURS: lambda: evaluation(ours), DIFFUSERS: theirs})


def _contest(makers: Any, size: CausalSize, parts: list[Component]) -> Contest:
    work = roofline.total(parts)
    return Contest(makers, size.batch * work.bytes, size.batch * work.flops)


def _workloads(size: CausalSize, against: tuple[str, ...], quick: bool) -> list[Workload]:
    """List the samples of a size, which run on a GPU where the size is published."""
    device = "cuda" if size in CAUSAL.values() else "cpu"

    def workload(what: str, detail: str, peers: tuple[str, ...], build: Any) -> Workload:
        name = f"causal/{what}/{size.name}/{size.tokens} tokens, {detail}"
        short = quick and detail == f"{QUICK_STEPS} steps"
        return Workload(name, peers, build, device, size.dtype, short, min_rounds=3)

    found = [workload("sample", f"{n} steps", against, partial(sample, size, n)) for n in STEPS]
    return [*found, workload("budgets", "8 steps, then 2", (ALL_EIGHT,), partial(budgets, size))]


def _against_diffusers(size: CausalSize) -> list[Workload]:
    """List what is no sample of ours."""
    name = f"{size.name}/{size.tokens} tokens"
    steps = partial(accelerated, size, QUICK_STEPS)
    accelerate = f"causal/accelerate/{name}, {QUICK_STEPS} steps"
    layout, step = partial(training_layout, size), partial(cached_step, size)
    return [
        Workload(accelerate, (OWN_LOOP,), steps, min_rounds=3),
        Workload(f"causal/cached step/{name}", (DIFFUSERS,), step, quick=True),
        Workload(f"causal/training layout/{name}", (DIFFUSERS,), layout, quick=True, memory=True),
    ]


WORKLOADS = [
    *_workloads(SHORT_CAUSAL, (DIFFUSERS, RECOMPUTED), quick=True)[1:2],
    *_workloads(SMALL_CAUSAL, (DIFFUSERS, RECOMPUTED), quick=False),
    *_against_diffusers(SMALL_CAUSAL),
    *_workloads(CAUSAL["1.3B"], (RECOMPUTED,), quick=False),
]


def bench_causal(workload: Workload, measured: Line) -> None:
    """Time a part of the causal model."""
