"""Test that a stream of chunks is the video of the call, early, checked, and freed when closed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from live_tensors import Peak
from torch import Tensor, nn

from anyflow.pipelines import AnyFlowFARPipeline, VideoChunk

PROMPT = "a red disc moves slowly"
PROMPTS = [PROMPT, "a blue cross stops"]
CALL: dict[str, Any] = {
    "height": 32,
    "width": 32,
    "num_frames": 21,
    "chunk_partition": (1, 2, 2, 1),
    "num_inference_steps": 2,
    "max_sequence_length": 12,
    "seed": 1,
}
PIXELS = torch.rand(1, 9, 3, 32, 32, generator=torch.Generator().manual_seed(0))
CALLS: dict[str, dict[str, Any]] = {
    "text": {},
    "texts": {"prompt": PROMPTS, "num_videos_per_prompt": 2},
    "budgets": {"num_inference_steps": [3, 1, 2, 1]},
    "one chunk": {"chunk_partition": (6,)},
    "image": {"image": PIXELS[0, 0]},
    "video": {"video": PIXELS},
    "video latents": {"video_latents": torch.ones(1, 5, 16, 4, 4)},
    "guided": {"guidance_scale": 2.0, "negative_prompt": "bad quality"},
    "window": {"cache_window": 1, "cache_device": "cpu"},
    "switch": {"prompt_switches": {2: "a blue cross"}},
}


def joined(chunks: Iterator[VideoChunk] | list[VideoChunk], dim: int = 1) -> Tensor:
    return torch.cat([torch.as_tensor(part.frames) for part in chunks], dim)


@pytest.mark.parametrize("name", CALLS)
def test_the_frames_of_a_stream_are_those_of_the_call(
    name: str, causal_pipe: AnyFlowFARPipeline
) -> None:
    call = {"prompt": PROMPT, **CALL, **CALLS[name]}
    chunks = list(causal_pipe.stream(**call))
    partition = call["chunk_partition"]
    assert [part.chunk for part in chunks] == list(range(len(partition)))
    frames = [4 * size for size in partition]
    frames[0] -= 3
    assert [part.frames.shape[1] for part in chunks] == frames
    assert all({"decode"} <= set(part.seconds) for part in chunks)
    whole = torch.as_tensor(causal_pipe(**call).frames)
    torch.testing.assert_close(joined(chunks), whole, rtol=0, atol=1e-6)
    latents = joined(causal_pipe.stream(**call, output_type="latent"), dim=2)
    assert latents.equal(causal_pipe(**call, output_type="latent").frames)


@pytest.mark.parametrize("output_type", ["pil", "pt"])
def test_chunks_have_every_type_of_a_call(
    output_type: str, causal_pipe: AnyFlowFARPipeline
) -> None:
    call = {"prompt": PROMPT, **CALL, "output_type": output_type}
    chunks = list(causal_pipe.stream(**call))
    whole = causal_pipe(**call).frames
    if output_type == "pt":
        torch.testing.assert_close(joined(chunks), whole, rtol=0, atol=1e-6)
    else:
        images = [image for part in chunks for image in part.frames[0]]
        assert len(images) == len(whole[0]) and images[-1].size == whole[0][-1].size == (32, 32)


def calls_of(module: nn.Module, seen: list[str], name: str) -> Any:
    return module.register_forward_pre_hook(lambda *_: seen.append(name))


def test_a_chunk_is_given_before_the_next_one_is_sampled(causal_pipe: AnyFlowFARPipeline) -> None:
    seen: list[str] = []
    hooks = [
        calls_of(causal_pipe.transformer, seen, "transformer"),
        calls_of(causal_pipe.vae.decoder, seen, "decoder"),
        calls_of(causal_pipe.text_encoder, seen, "text"),
    ]
    try:
        stream = causal_pipe.stream(PROMPT, **CALL)
        assert seen == []
        next(stream)
        assert seen == ["text", "transformer", "transformer", "decoder"]
        next(stream)  # the first chunk is encoded, too
        assert seen[4:] == ["transformer"] * 3 + ["decoder"] * 2
        stream.close()
        assert len(seen) == 9
    finally:
        for hook in hooks:
            hook.remove()


def test_arguments_are_checked_at_the_call(causal_pipe: AnyFlowFARPipeline) -> None:
    with pytest.raises(ValueError, match="num_frames=25"):
        causal_pipe.stream(PROMPT, **{**CALL, "num_frames": 25})
    with pytest.raises(TypeError, match="return_dict"):
        causal_pipe.stream(PROMPT, **CALL, return_dict=False)
    with pytest.raises(TypeError, match="num_steps"):
        causal_pipe.stream(PROMPT, **CALL, num_steps=3)


def test_a_generator_of_noise_is_read_at_the_call(causal_pipe: AnyFlowFARPipeline) -> None:
    call = {k: v for k, v in CALL.items() if k != "seed"} | {"output_type": "latent"}
    generator = torch.Generator().manual_seed(1)
    first = causal_pipe.stream(PROMPT, **call, generator=generator)
    second = causal_pipe.stream(PROMPT, **call, generator=generator)
    late, early = joined(second, dim=2), joined(first, dim=2)
    generator = torch.Generator().manual_seed(1)
    for expected in (early, late):
        assert causal_pipe(PROMPT, **call, generator=generator).frames.equal(expected)


def test_streams_and_calls_may_alternate_on_one_pipeline(causal_model: Path) -> None:
    pipe = AnyFlowFARPipeline.from_pretrained(
        causal_model, dtype=torch.float32, device="cpu", memory="low"
    )
    pipe.set_progress_bar_config(disable=True)
    others = {**CALL, "num_inference_steps": 1, "seed": 2}
    expected = [pipe(PROMPT, **call).frames for call in (CALL, others)]
    streams = [pipe.stream(PROMPT, **call) for call in (CALL, others)]
    chunks: list[list[VideoChunk]] = [[], []]
    for _ in range(4):
        for stream, found in zip(streams, chunks, strict=True):
            found.append(next(stream))
        assert pipe(PROMPT, **others).frames.shape == (1, 21, 32, 32, 3)
    for found, whole in zip(chunks, expected, strict=True):
        torch.testing.assert_close(joined(found), torch.as_tensor(whole), rtol=0, atol=1e-6)


def test_closing_a_stream_takes_the_transformer_off_the_device(causal_model: Path) -> None:
    pipe = AnyFlowFARPipeline.from_pretrained(
        causal_model, dtype=torch.float32, device="cpu", memory="low"
    )
    stream = pipe.stream(PROMPT, **CALL, progress=False)
    next(stream)
    assert pipe._turns._homes  # the weights' places on the host: it is the transformer's turn
    pipe(PROMPT, **CALL, progress=False)
    assert not pipe._turns._homes
    next(stream)
    assert pipe._turns._homes
    stream.close()
    assert not pipe._turns._homes
    assert list(stream) == []


def test_gradients_are_off_in_a_stream_and_on_outside(causal_pipe: AnyFlowFARPipeline) -> None:
    for part in causal_pipe.stream(PROMPT, **CALL, output_type="latent"):
        assert not part.frames.requires_grad and torch.is_grad_enabled()


def test_nan_is_said_with_the_chunk_that_has_it(causal_pipe: AnyFlowFARPipeline) -> None:
    def spoil(index: int, timestep: float, latents: Tensor) -> Tensor:
        return latents * (float("nan") if index == 3 else 1.0)

    stream = causal_pipe.stream(PROMPT, **CALL, callback=spoil)
    next(stream)
    with pytest.raises(FloatingPointError, match="after step 4 of 4"):
        next(stream)
    with pytest.raises(FloatingPointError, match="after step 4 of 8"):
        causal_pipe(PROMPT, **CALL, callback=spoil)


@pytest.mark.slow
@pytest.mark.parametrize("output_type", ["latent", "pt"])
def test_the_memory_of_a_stream_does_not_grow_with_the_number_of_chunks(
    output_type: str, causal_pipe: AnyFlowFARPipeline
) -> None:
    """Count the tensors that live at once beside the noise, over 8 and over 32 chunks."""

    def peak(chunks: int) -> int:
        noise = torch.randn(1, 16, chunks, 4, 4, generator=torch.Generator().manual_seed(1))
        call = {
            **CALL,
            "num_frames": 4 * chunks - 3,
            "chunk_partition": (1,) * chunks,
            "num_inference_steps": 1,
            "output_type": output_type,
            "prompt_embeds": torch.ones(1, 12, 16),
            "seed": None,
            "latents": noise,
        }
        stream = causal_pipe.stream(**call, cache_window=2)
        with Peak([noise]) as found:
            assert sum(1 for _ in stream) == chunks
        return found.bytes

    few, many = peak(8), peak(32)
    assert many <= 1.01 * few, (few, many)
