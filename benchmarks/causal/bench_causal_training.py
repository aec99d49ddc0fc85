"""Time a pretrain step of the causal model, to the gradients, against the peers' formulation.

The peers' is diffusers' model on the same weights as NVlabs' trainer calls it: four evaluations of
the whole batch, a clean copy of every noisy chunk, and attention under a mask. On a CPU that is
torch's attention under a dense mask, since flex attention has no backward pass there.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import causal_roofline
import peers
import roofline
from methods.bench_methods import (
    COMPILED,
    EPSILON,
    FORMULATION,
    GUIDANCE,
    PlanParts,
    TrainingPlan,
    on_cpu,
    on_gpu,
)
from networks import variant
from sizes import CAUSAL, NARROW_CAUSAL, CausalSize
from timing import OURS, Step
from workloads import Contest, Line, Place, Workload

from anyflow.methods import CausalConfig, PretrainConfig


def pretrain(plan: TrainingPlan, place: Place) -> Contest:
    """Build a pretrain step on all chunks of a plan's videos, which has a causal size.

    The compiled peer runs flex attention, whose kernel skips blocks that the mask hides.
    """
    size = plan.size
    assert isinstance(size, CausalSize)
    parts = PlanParts(plan, len(plan.t), place.device)
    data = parts.data
    first = size.frames - sum(size.chunk_partition[-size.full_chunk_limit :])
    noisy = replace(data, latents=data.latents[:, first:], noise=data.noise[:, first:])

    def ours() -> Step:
        config = PretrainConfig(
            epsilon=EPSILON,
            fuse_guidance_scale=GUIDANCE,
            boundary="extrapolate",
            causal=CausalConfig(),
        )
        chunks = len(size.chunk_partition)
        return parts.pretrain_step(data, config, num_chunks=chunks, bidirectional=False)

    def theirs(compiler: str | None = None) -> Step:
        model = parts.network(theirs=True)
        if compiler is None:
            mask = peers.set_dense_attention(model, size, size.dtype)
        else:
            mask, model = peers.block_mask(model, size), variant(model, compiler)
        u = peers.causal_network(model, parts.dtype, data.latents, mask)
        return parts.under_autocast(
            peers.pretrain_step(model, u, noisy, *parts.times(), GUIDANCE, EPSILON)
        )

    makers = {OURS: ours, FORMULATION: theirs, COMPILED: partial(theirs, place.compiler)}
    return Contest(makers, flops=flops(plan))


def flops(plan: TrainingPlan, theirs: bool = False) -> float:
    """Return the FLOPs of a step, ours or those of the peers' formulation on a dense mask."""
    size, picked = plan.size, sum(t != r for t, r in zip(plan.t, plan.r, strict=True))
    assert isinstance(size, CausalSize)
    layout = causal_roofline.peer_training_layout if theirs else causal_roofline.training_layout
    evaluations = roofline.pretrain_evaluations(len(plan.t), picked)
    passes = evaluations[FORMULATION if theirs else "ours"].passes(4 if plan.adapters else 3)
    return passes * roofline.total(causal_roofline.evaluation(size, layout(size))).flops


def _workload(plan: TrainingPlan, device: str) -> Workload:
    size = plan.size
    return Workload(
        f"causal/pretrain/{size.name}/{len(plan.t)}x{size.tokens} tokens",
        (FORMULATION,) if device == "cpu" else (FORMULATION, COMPILED),
        partial(pretrain, plan),
        device,
        size.dtype,
        memory=True,
        min_rounds=3,
    )


WORKLOADS = [_workload(on_cpu(NARROW_CAUSAL), "cpu"), _workload(on_gpu(CAUSAL["1.3B"]), "cuda")]


def bench_causal_training(workload: Workload, measured: Line) -> None:
    """Time a training step of the causal model."""
