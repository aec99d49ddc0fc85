"""Test what is counted of the causal model's calls, on real models: tokens, FLOPs, caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import causal_roofline
import networks
import pytest
import roofline
import torch
from causal import bench_causal
from causal_roofline import ChunkCall
from sizes import CAUSAL, TINY_CAUSAL, CausalSize
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

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


def test_the_expected_time_adds_attention_and_tokens() -> None:
    size, calls = CAUSAL["1.3B"], [ChunkCall(100, 10, 1000, 50, encodes=False)] * 2
    found = causal_roofline.expected_s(size, calls, attention=1e9, others=1e-3)
    assert found == pytest.approx(4 * 1536 * 30 * 2000 / 1e9 + 220 * 1e-3)
