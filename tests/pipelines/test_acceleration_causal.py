"""Test accelerate() on diffusers' causal pipeline: what agrees with it, and what it gets wrong."""

import gc
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from tiny_diffusers import (
    CAUSAL,
    CAUSAL_CALL,
    TINY,
    accelerated,
    assert_same,
    build,
    latents,
    randomized,
)
from torch import Tensor, nn

import anyflow
from anyflow.models.diffusers_causal import DiffusersFARTransformer3DModel
from anyflow.sampling import sample_causal
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

TOLERANCE = 2e-5
# 8 tokens a frame: diffusers pads each chunk's keys to 128 with zeros, to which it attends.
SMALL: dict[str, Any] = {
    "height": 32, "width": 64, "num_frames": 29, "chunk_partition": [1, 2, 1, 2, 2],
}  # fmt: skip


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def recomputed(transformer: nn.Module, call: dict[str, Any], **options: Any) -> Tensor:
    """Sample the noise and prompts of ``latents()`` by our sampler without a cache."""
    generator = torch.Generator().manual_seed(7)
    prompt, negative = torch.randn(2, 2, 5, 16, generator=generator)
    frames = (call["num_frames"] - 1) // 4 + 1
    shape = (2, 16, frames, call["height"] // 8, call["width"] // 8)
    video = sample_causal(
        transformer,
        FlowMapEulerDiscreteScheduler(shift=5.0),
        torch.randn(shape, generator=generator).transpose(1, 2),
        prompt,
        negative_prompt_embeds=negative,
        guidance_scale=3.0,
        num_inference_steps=2,
        chunk_partition=call["chunk_partition"],
        use_cache=False,
        **options,
    )
    return video.transpose(1, 2)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_samples_are_those_of_the_model_where_the_peer_attends_to_padding(limit) -> None:
    pipe = build("causal", full_chunk_limit=limit)
    theirs = pipe.transformer
    anyflow.accelerate(pipe)
    actual = latents(pipe, **SMALL)
    assert relative(actual, recomputed(pipe.transformer, SMALL)) < TOLERANCE
    if limit > 1:  # diffusers has none for 1
        pipe.transformer = theirs
        assert relative(latents(pipe, **SMALL), actual) > 1e-3


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("context", [0, 2, 4])
def test_samples_are_the_peers_where_its_caches_need_no_padding(
    context, guidance, generator
) -> None:
    pipe = build("causal")
    options: dict[str, Any] = {"guidance_scale": guidance}
    if guidance == 1.0:
        options["negative_prompt_embeds"] = None
    if context:
        options["video_latents"] = torch.randn(2, context, 16, 16, 16, generator=generator)
    expected = latents(pipe, **options)
    actual = latents(anyflow.accelerate(pipe), **options)
    assert_same(actual, expected)
    if context:
        assert torch.equal(actual[:, :, :context].transpose(1, 2), options["video_latents"])


def test_a_prompt_that_a_callback_replaces_reaches_all_that_is_encoded_later() -> None:
    """Change it after the first chunk: diffusers encodes that chunk again with the other text."""

    def callback(pipe: Any, index: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"prompt_embeds": tensors["prompt_embeds"] + (0.5 if index == 1 else 0.0)}

    options: dict[str, Any] = {
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    pipe = build("causal")
    plain, expected = latents(pipe), latents(pipe, **options)
    assert (expected - plain)[:, :, 2:].abs().max() > 1e-3
    assert_same(latents(anyflow.accelerate(pipe), **options), expected)


def bare(**settings: Any) -> tuple[nn.Module, nn.Module]:
    """Return diffusers' transformer and ours on its weights."""
    theirs = randomized(diffusers.AnyFlowFARTransformer3DModel(**(TINY | CAUSAL | settings)))
    return theirs, accelerated(theirs)


@pytest.mark.parametrize("clean", [False, True], ids=["plain", "training"])
def test_a_bare_transformer_in_the_layouts_without_a_cache(clean, generator) -> None:
    theirs, ours = bare(deltatime_type="t-r", gate_value=0.6, cross_attn_norm=False)
    x, text = (
        torch.randn(2, 5, 16, 4, 8, generator=generator),
        torch.randn(2, 5, 16, generator=generator),
    )
    t = 1000 * torch.rand(2, 5, generator=generator)
    options: dict[str, Any] = {"chunk_partition": [2, 1, 2]}
    if clean:
        t[:, :2] = 0
        options |= {"clean_hidden_states": 0.5 * x[:, 2:], "clean_timestep": torch.zeros(2, 3)}
    with torch.no_grad():
        expected = theirs(x, t, t / 3, text, **options).sample
        assert expected.shape == (2, 3, 16, 4, 8)
        assert_same(ours(x, t, t / 3, text, **options).sample, expected)
        assert torch.equal(
            ours(x, t, t / 3, text, **options, return_dict=False)[0],
            ours(x, t, t / 3, text, **options).sample,
        )
        assert anyflow.restore(ours) is theirs
        assert torch.equal(theirs(x, t, t / 3, text, **options).sample, expected)


def test_settings_and_call_are_those_of_diffusers() -> None:
    for method in ("__init__", "forward", "build_attention_mask"):
        theirs = inspect.signature(getattr(diffusers.AnyFlowFARTransformer3DModel, method))
        ours = inspect.signature(getattr(DiffusersFARTransformer3DModel, method))
        if method == "build_attention_mask":
            ours.bind(None, **{n: None for n in theirs.parameters if n != "self"})
            continue
        assert list(ours.parameters)[: len(theirs.parameters)] == list(theirs.parameters)
        if method == "__init__":
            defaults = {n: p.default for n, p in theirs.parameters.items() if n != "self"}
            assert all(ours.parameters[n].default == d for n, d in defaults.items())


def call(transformer: nn.Module, frames: Tensor, sizes: list[int], cache: Any, **flag: Any) -> Any:
    """Call a transformer as diffusers' pipeline does."""
    times = torch.full(frames.shape[:2], 0.0 if flag.get("is_cache_step") else 500.0)
    with torch.no_grad():
        return transformer(
            hidden_states=frames,
            timestep=times,
            r_timestep=times / 2,
            encoder_hidden_states=torch.ones(1, 5, 16),
            chunk_partition=sizes,
            kv_cache=cache,
            kv_cache_flag=flag,
            return_dict=False,
        )


def zeros() -> dict[int, dict[str, Tensor]]:
    return {
        layer: {name: torch.zeros(2, 1, 2, 128, 12) for name in ("full_cache", "compressed_cache")}
        for layer in range(2)
    }


@pytest.mark.parametrize("container", [dict, list])
def test_the_peers_zeros_are_freed_at_the_first_call(container, generator) -> None:
    _, ours = bare()
    x = torch.randn(1, 4, 16, 4, 8, generator=generator)
    cache: Any = zeros() if container is dict else list(zeros().values())
    layers = cache.values() if container is dict else cache
    alive = [weakref.ref(t) for layer in layers for t in layer.values()]
    del layers
    velocity, same = call(ours, x[:, :2], [2], cache, num_cached_chunks=0)
    gc.collect()
    assert same is cache and not any(ref() is not None for ref in alive)
    assert velocity.shape == (1, 2, 16, 4, 8)
    sample, same = call(ours, x[:, :2], [2], cache, num_cached_chunks=0, is_cache_step=True)
    assert sample is None and same is cache
    second, _ = call(ours, x[:, 2:], [2, 2], cache, num_cached_chunks=1)
    with torch.no_grad():
        t = torch.tensor([[0.0, 0.0, 500.0, 500.0]])
        whole = ours(x, t, t / 2, torch.ones(1, 5, 16), [2, 2]).sample
    assert relative(second, whole[:, 2:]) < 1e-6
    # another video, with the same dict: the first chunk, and all chunks encoded anew
    again, _ = call(ours, x[:, :2], [2], cache, num_cached_chunks=0)
    assert torch.equal(again, velocity)
    call(ours, x[:, 2:], [2], cache, num_cached_chunks=0, is_cache_step=True)
    other, _ = call(ours, x[:, 2:], [2, 2], cache, num_cached_chunks=1)
    assert relative(other, second) > 1e-3


def test_calls_out_of_order_and_sizes_that_would_be_cut_off_are_refused(generator) -> None:
    theirs, ours = bare()
    x = torch.randn(1, 6, 16, 4, 8, generator=generator)
    mistakes: list[tuple[str, Callable[[], Any]]] = [
        ("holds what no cache step", lambda: call(ours, x[:, :2], [2, 2], {}, num_cached_chunks=1)),
        ("one chunk after num_cached_chunks=0", lambda: call(ours, x[:, :2], [2, 2], zeros())),
        (
            "has 4 latent frames, and the video has 6",
            lambda: call(ours, x, [2, 2], zeros(), is_cache_step=True),
        ),
        (
            "width 6 must be a positive multiple of 4 where a frame is compressed",
            lambda: call(ours, x[..., :6], [2, 2, 2], zeros(), is_cache_step=True),
        ),
        ("give chunk_partition, and neither", lambda: ours(x, kv_cache=zeros())),
    ]
    for message, mistake in mistakes:
        with pytest.raises(ValueError, match=message):
            mistake()
    assert anyflow.restore(ours) is theirs


def test_fewer_tokens_are_encoded_than_by_the_peer() -> None:
    """Count the tokens of all calls; 64 full and 16 compressed ones are in a frame."""

    def counted(pipe: Any) -> int:
        total = 0

        def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal total
            total += args[0].shape[0] * args[0].shape[1]

        hook = pipe.transformer.blocks[0].register_forward_pre_hook(count)
        latents(pipe, num_frames=29, chunk_partition=[2, 2, 2, 2])
        hook.remove()
        return total

    pipe = build("causal")
    theirs, ours = counted(pipe), counted(anyflow.accelerate(pipe))
    steps, batch = 2 * 4 * 2 * 64, 4  # two samples, guided
    # L = 2: after chunks 0, 1 and 2 one full chunk, and compressed ones: the new one, or all
    assert ours == batch * (steps + 3 * 2 * 64 + 2 * 2 * 16)
    assert theirs == batch * (steps + 3 * 2 * 64 + (1 + 2) * 2 * 16)


@pytest.mark.parametrize("only", ["gelu", "linear", ["gelu", "linear"]], ids=str)
def test_parts_that_the_causal_blocks_have_can_be_replaced_alone(only) -> None:
    pipe = build("causal")
    theirs, before = pipe.transformer, latents(pipe)
    anyflow.accelerate(pipe, only=only)
    assert pipe.transformer is theirs
    assert_same(latents(pipe), before)
    anyflow.restore(pipe)
    assert torch.equal(latents(pipe), before)


@pytest.mark.parametrize("only", ["norms", "rope", ["rope", "gelu"]], ids=str)
def test_other_parts_are_refused(only) -> None:
    pipe = build("causal")
    with pytest.raises(ValueError, match="is not for the causal model, which has 'gelu', 'linear'"):
        anyflow.accelerate(pipe, only=only)
    assert type(pipe.transformer) is diffusers.AnyFlowFARTransformer3DModel


def test_our_own_sampler_takes_the_accelerated_transformer() -> None:
    """Sample with our cache, which is another one than that of diffusers' call."""
    pipe = anyflow.accelerate(build("causal"))
    partition = [2, 2, 2]
    expected = recomputed(pipe.transformer, CAUSAL_CALL | {"chunk_partition": partition})
    assert relative(latents(pipe), expected) < TOLERANCE
    noise = torch.randn(1, 6, 16, 4, 8, generator=torch.Generator().manual_seed(0))
    videos = [
        sample_causal(
            pipe.transformer,
            FlowMapEulerDiscreteScheduler(shift=5.0),
            noise,
            torch.ones(1, 5, 16),
            chunk_partition=partition,
            use_cache=use_cache,
        )
        for use_cache in (True, False)
    ]
    assert relative(*videos) < TOLERANCE
