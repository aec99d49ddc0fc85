"""Test that a sampler of chunks takes another text and another guidance, and stops, midway."""

from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow.sampling import ChunkSampler, sample_causal
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

SCHEDULER = FlowMapEulerDiscreteScheduler(shift=5.0)


def sampler(reference: Any, **options: Any) -> ChunkSampler:
    """Return a sampler of two videos in fp64, two evaluations a chunk."""
    noise = reference["roll.noise_bfchw"].double()
    text = reference["prompt_embeds"][:2].double()
    model = reference.model(torch.float64)
    return ChunkSampler(model, SCHEDULER, noise, text, num_inference_steps=2, **options)


def other(reference: Any) -> Tensor:
    text: Tensor = reference["prompt_embeds"][:2].double().flip(0)
    return text


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def test_a_text_that_is_set_between_chunks_is_a_switched_prompt(causal_reference: Any) -> None:
    chunks = sampler(causal_reference, text_may_change=True)
    found = []
    for chunk, latents in chunks:
        found.append(latents)
        if chunk == 3:
            chunks.set_text(other(causal_reference))
    switched = sample_causal(
        causal_reference.model(torch.float64),
        SCHEDULER,
        causal_reference["roll.noise_bfchw"].double(),
        causal_reference["prompt_embeds"][:2].double(),
        num_inference_steps=2,
        prompt_switches={4: other(causal_reference)},
    )
    assert torch.cat(found, dim=1).equal(switched)


@pytest.mark.parametrize("index", [0, 4, 7])
def test_a_text_and_a_guidance_that_are_set_in_a_callback_are_those_of_recomputation(
    index: int, causal_reference: Any
) -> None:
    def video(use_cache: bool) -> Tensor:
        def change(at: int, timestep: float, latents: Tensor) -> None:
            if at == index:
                negative = causal_reference["negative_prompt_embeds"].double()
                chunks.set_text(other(causal_reference), negative, 2.0)

        chunks = sampler(
            causal_reference, text_may_change=True, use_cache=use_cache, callback=change
        )
        return torch.cat([latents for _, latents in chunks], dim=1)

    assert relative(video(True), video(False)) <= 1e-14


def test_latents_are_kept_for_a_change_only_where_it_may_come(causal_reference: Any) -> None:
    chunks = sampler(causal_reference)
    next(iter(chunks))
    with pytest.raises(ValueError, match="text_may_change=True"):
        chunks.set_text(other(causal_reference))


def test_a_text_of_another_shape_is_refused(causal_reference: Any) -> None:
    chunks = sampler(causal_reference, text_may_change=True)
    text = other(causal_reference)
    with pytest.raises(ValueError, match=r"prompt_embeds must be floating-point \[B=2 or 1"):
        chunks.set_text(text.repeat(2, 1, 1))
    with pytest.raises(ValueError, match="negative_prompt_embeds must have the shape of prompt"):
        chunks.set_text(text, text[:, 1:], 2.0)


def test_a_sampler_that_is_stopped_gives_the_chunk_in_work_as_it_is(causal_reference: Any) -> None:
    seen: list[Tensor] = []

    def stop(index: int, timestep: float, latents: Tensor) -> None:
        seen.append(latents)
        if index == 2:
            assert (chunks.chunk, chunks.step) == (1, 0)
            chunks.stop()

    chunks = sampler(causal_reference, callback=stop)
    found = list(chunks)
    assert [chunk for chunk, _ in found] == [0, 1] and len(seen) == 3
    assert found[1][1].equal(seen[2])
