"""Test what is counted of the causal model's calls, on real models: tokens, FLOPs, caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import causal_roofline
import networks
import peers
import pytest
import roofline
import torch
from causal import bench_causal, bench_causal_training
from causal_roofline import ChunkCall
from methods.bench_methods import FORMULATION, on_cpu
from sizes import CAUSAL, TINY_CAUSAL, CausalSize
from timing import OURS
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from workloads import Place

from anyflow.models import AnyFlowFARTransformer3DModel, use_attention_backend
from anyflow.ops import use_backend

CPU, STEPS = torch.device("cpu"), 2
TINY = TINY_CAUSAL["1.3B"]
LONG = replace(TINY, latents=(9, 16, 8, 12), chunk_partition=(1, 2, 1, 2, 1, 2))


def tokens_through(model: nn.Module, sampling: Callable[[], Any]) -> int:
    """Count the tokens that go into the first block."""
    seen: list[int] = []
    handle = model.blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args or (kwargs["hidden_states"],))[0].shape[1]),
        with_kwargs=True,
    )
    sampling()
    handle.remove()
    return sum(seen)


@pytest.mark.parametrize("size", [TINY, LONG, replace(LONG, full_chunk_limit=2)])
def test_tokens_are_those_that_go_through_the_blocks(size: CausalSize) -> None:
    ours, data = networks.ours(size, CPU), networks.videos(size, CPU)
    peer, steps = networks.peer(size, ours), STEPS * causal_roofline.steps(size)
    for model, sampling, encodings in (
        (ours, bench_causal.sampled(ours, size, data, STEPS), causal_roofline.encodings(size)),
        (
            peer,
            bench_causal.pipeline(peer, size, data, STEPS, accelerated=False),
            causal_roofline.peer_encodings(size),
        ),
    ):
        expected = causal_roofline.tokens_of([*steps, *encodings])
        assert tokens_through(model, sampling) == expected
    assert causal_roofline.encodings(size) != causal_roofline.peer_encodings(size)


def test_the_published_partition() -> None:
    size = CAUSAL["1.3B"]
    step, encodings = causal_roofline.steps(size), causal_roofline.encodings(size)
    assert causal_roofline.tokens_of(step) == size.tokens == 32760
    assert causal_roofline.tokens_of(encodings) == 59670
    assert causal_roofline.tokens_of(causal_roofline.peer_encodings(size)) == 68250
    # chunk 7: chunks 0..5 compressed, and two full ones before it
    assert step[-1] == ChunkCall(3120, 0, 3120 * (14430 + 3120), 5070 + 9360, encodes=False)
    # before it chunk 4 is compressed, after 10 compressed frames; chunks 5 and 6 are full
    pairs = 1170 * 5070 + 4680 * (5070 + 4680) + 4680 * (5070 + 9360)
    assert encodings[-1] == ChunkCall(9360, 1170, pairs, 10 * 390, encodes=True)
    for size in CAUSAL.values():
        with torch.device("meta"):
            model = AnyFlowFARTransformer3DModel(**size.config()).to(size.dtype)
        assert sum(p.numel() for p in model.parameters()) == size.parameters
        assert model.cache_bytes(60, 104) == causal_roofline.cache_bytes(size)


def test_flops_of_a_video_are_those_of_torchs_counter() -> None:
    ours, data = networks.ours(LONG, CPU), networks.videos(LONG, CPU)
    counter, math = FlopCounterMode(display=False), sdpa_kernel(SDPBackend.MATH)
    with counter, math, use_backend("eager"), use_attention_backend("math"):
        bench_causal.sampled(ours, LONG, data, STEPS)()
    expected = roofline.total(causal_roofline.video(LONG, STEPS)).flops
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("size", [TINY, replace(LONG, full_chunk_limit=2)])
def test_flops_of_training_are_those_of_torchs_counter(size: CausalSize) -> None:
    ours, data = networks.ours(size, CPU), networks.videos(size, CPU)
    peer = networks.peer(size, ours)
    dense = peers.set_dense_attention(peer, size, torch.float32)
    first = sum(size.chunk_partition[: -size.full_chunk_limit])
    latents, noise, t = data.latents, data.noise[:, first:], torch.full((1,), 0.5)
    sees = causal_roofline.training_layout(size)
    masked = causal_roofline.peer_training_layout(size)
    evaluate = peers.causal_network(peer, torch.float32, latents, dense)
    for layout, step in (
        (
            sees,
            lambda: ours(
                torch.cat([latents[:, :first], noise], dim=1),
                *(1000 * t, 1000 * t, data.prompt),
                clean_hidden_states=latents[:, first:],
            ),
        ),
        (masked, lambda: evaluate(noise, t, t, data.prompt)),
    ):
        counter, math = FlopCounterMode(display=False), sdpa_kernel(SDPBackend.MATH)
        with counter, math, use_backend("eager"), use_attention_backend("math"), torch.no_grad():
            step()
        expected = roofline.total(causal_roofline.evaluation(size, layout)).flops
        assert counter.get_total_flops() == expected
    # what the mask shows and ours leaves out: queries of the copy of the last chunk
    copy = size.chunk_partition[-1] * size.frame_tokens * (sees.compressed + sees.noisy)
    assert int((dense == 0).sum()) == sees.pairs + copy


def test_the_peers_formulation_of_causal_training_is_the_same_loss(tmp_path: Path) -> None:
    plan = on_cpu(replace(TINY, batch=4))
    contest = bench_causal_training.pretrain(plan, Place(CPU, tmp_path))
    losses = [contest.makers[who]()() for who in (OURS, FORMULATION)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    # half the samples have r = t, and need no derivative: 8 + 3 x 4 passes against 12 + 3 x 4
    layouts = causal_roofline.peer_training_layout, causal_roofline.training_layout
    theirs, ours = (
        roofline.total(causal_roofline.evaluation(plan.size, layout(plan.size))).flops
        for layout in layouts
    )
    assert bench_causal_training.flops(plan, theirs=True) == 24 * theirs
    assert bench_causal_training.flops(plan) == contest.flops == 20 * ours


def test_the_published_layout_of_training() -> None:
    size = CAUSAL["1.3B"]
    ours, peer = (
        count(size)
        for count in (causal_roofline.training_layout, causal_roofline.peer_training_layout)
    )
    assert (ours.compressed, ours.clean, ours.noisy) == (13 * 390, 6 * 1560, 8 * 1560)
    assert (ours.tokens, peer.tokens) == (26910, 30030)
    assert ours.pairs / peer.pairs == pytest.approx(0.329, abs=5e-4)


def test_the_expected_time_adds_attention_and_tokens() -> None:
    size, calls = CAUSAL["1.3B"], [ChunkCall(100, 10, 1000, 50, encodes=False)] * 2
    found = causal_roofline.expected_s(size, calls, attention=1e9, others=1e-3)
    assert found == pytest.approx(4 * 1536 * 30 * 2000 / 1e9 + 220 * 1e-3)
