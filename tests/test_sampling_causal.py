"""Sample by the causal model: against the reference, recomputation, and the count of tokens."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow.models import AnyFlowTransformer3DModel
from anyflow.sampling import ChunkSampler, sample, sample_causal
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

SCHEDULER = FlowMapEulerDiscreteScheduler(shift=5.0)


def _relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def _sample(reference: Any, model: Any, **options: Any) -> Tensor:
    """Sample two videos from the reference's noise, in the dtype of the weights."""
    noise = reference["roll.noise_bfchw"].to(model.dtype)
    text = reference["prompt_embeds"][:2]
    return sample_causal(model, SCHEDULER, noise, text, **options)


# Against the reference trainers -------------------------------------------------------------------


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("context", ["", ".ctx"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_videos_are_those_of_the_reference(steps, context, use_cache, causal_reference) -> None:
    given = causal_reference["sample.context_bfchw"] if context else None
    video = _sample(
        causal_reference,
        causal_reference.model(),
        num_inference_steps=steps,
        context_latents=given,
        use_cache=use_cache,
    )
    assert _relative(video, causal_reference[f"sample{context}.nfe{steps}"]) <= 2e-5
    if given is not None:
        assert torch.equal(video[:, : given.shape[1]], given)


@pytest.mark.parametrize("use_cache", [True, False])
def test_guided_videos_are_those_of_the_reference(use_cache, causal_reference) -> None:
    video = _sample(
        causal_reference,
        causal_reference.model(),
        num_inference_steps=2,
        guidance_scale=causal_reference.variant["guidance"],
        negative_prompt_embeds=causal_reference["negative_prompt_embeds"],
        use_cache=use_cache,
    )
    assert _relative(video, causal_reference["sample.cfg.nfe2"]) <= 2e-5


@pytest.mark.parametrize("limit", [1, 2])
def test_videos_with_fewer_full_chunks_are_those_of_the_reference(limit, causal_reference) -> None:
    """Sample with all earlier chunks compressed (L = 1), where diffusers raises an error."""
    model = causal_reference.model(full_chunk_limit=limit)
    video = _sample(causal_reference, model, num_inference_steps=2)
    assert _relative(video, causal_reference[f"sample.limit{limit}.nfe2"]) <= 2e-5


# Caches against recomputation ---------------------------------------------------------------------

PARTITIONS = ((1, 2, 2, 1, 2, 1), (3, 3, 3), (9,), (2, 1, 1, 1, 1, 1, 1, 1), (1, 8))


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
@pytest.mark.parametrize("partition", PARTITIONS)
def test_cached_videos_are_recomputed_ones_in_fp64(partition, limit, causal_reference) -> None:
    """Compare every context length that the partition allows."""
    model = causal_reference.model(torch.float64, full_chunk_limit=limit)
    given = causal_reference["latents_bcfhw"][:2].transpose(1, 2).double()
    ends = list(itertools.accumulate(partition))
    for context in (0, *ends[:-1]):
        options = {
            "chunk_partition": partition,
            "num_inference_steps": [1 + chunk % 2 for chunk in range(len(partition))],
            "context_latents": given[:, :context] if context else None,
        }
        cached = _sample(causal_reference, model, **options)
        recomputed = _sample(causal_reference, model, **options, use_cache=False)
        assert _relative(cached, recomputed) <= 1e-14


def test_one_chunk_is_the_bidirectional_video(causal_reference) -> None:
    model = causal_reference.model(torch.float64)
    noise = causal_reference["roll.noise_bfchw"].double()
    text = causal_reference["prompt_embeds"][:2]
    causal = _sample(causal_reference, model, chunk_partition=(9,), num_inference_steps=2)

    class Bidirectional:
        config = model.config

        def __call__(self, **arguments: Any) -> Any:
            return model(**arguments, is_causal=False)

    whole = sample(Bidirectional(), SCHEDULER, noise, text, num_inference_steps=2)
    assert _relative(causal, whole) <= 1e-14


def test_cached_keys_are_never_written(causal_reference) -> None:
    """Keep what each chunk reads, and compare it after the video."""
    model, seen = causal_reference.model(), []

    def keep(*_: Any) -> None:
        for layer in range(len(model.blocks)):
            for pair in sampler.cache.past(layer, torch.device("cpu")):
                seen.extend((tensor, tensor.clone()) for tensor in pair)

    sampler = ChunkSampler(
        model,
        SCHEDULER,
        causal_reference["roll.noise_bfchw"],
        causal_reference["prompt_embeds"][:2],
        callback=keep,
        num_inference_steps=1,
    )
    assert [chunk for chunk, _ in sampler] == list(range(6))
    assert len(seen) > 30
    assert all(torch.equal(tensor, before) for tensor, before in seen)


# Tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [0, 5])
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_no_token_goes_through_the_network_without_need(limit, context, causal_reference) -> None:
    """Count tokens of the first layer, and outputs of the last, by evaluation and encoding.

    An encoding is one call, and its last layer computes keys and values only.
    """
    model, steps = causal_reference.model(full_chunk_limit=limit), 2
    inputs, outputs = [], []
    model.blocks[0].register_forward_hook(lambda _, args, out: inputs.append(args[0].shape[1]))
    model.blocks[1].register_forward_hook(
        lambda _, args, out: outputs.append((out[0] if isinstance(out, tuple) else out).shape[1])
    )
    given = causal_reference["latents_bcfhw"][:2].transpose(1, 2)[:, :context]
    _sample(
        causal_reference,
        model,
        num_inference_steps=steps,
        context_latents=given if context else None,
    )
    sizes, full, compressed, first = (1, 2, 2, 1, 2, 1), 8, 2, (3 if context else 0)
    expected: list[int] = []
    computed: list[int] = []
    for chunk in range(first, 6):
        if chunk:
            leave = max(0, chunk - limit + 1)
            new = sizes[:leave] if chunk == first else sizes[max(0, leave - 1) : leave]
            expected.append(compressed * sum(new) + full * sum(sizes[leave:chunk]))
            computed.append(0)
        expected += [full * sizes[chunk]] * steps
        computed += [full * sizes[chunk]] * steps
    assert inputs == expected
    assert outputs == computed


# Chunks as they are made --------------------------------------------------------------------------


def test_chunks_arrive_before_later_ones_are_computed(causal_reference) -> None:
    """Record evaluations and chunks in order; a chunk is encoded only for one that follows it."""
    model, events, arrived = causal_reference.model(), [], []
    model.register_forward_hook(
        lambda _, args, kwargs, out: events.append("encode" if "encode" in kwargs else "step"),
        with_kwargs=True,
    )

    def on_chunk(chunk: int, latents: Tensor) -> None:
        events.append(f"chunk {chunk}")
        arrived.append(latents)

    video = _sample(causal_reference, model, num_inference_steps=1, on_chunk=on_chunk)
    assert events == [
        event
        for chunk in range(6)
        for event in (*(["encode"] if chunk else []), "step", f"chunk {chunk}")
    ]
    assert torch.equal(torch.cat(arrived, 1), video)


def test_each_chunk_has_its_own_number_of_steps(causal_reference) -> None:
    model, calls = causal_reference.model(), []
    steps = [4, 1, 2, 1, 3, 1]
    video = _sample(
        causal_reference,
        model,
        num_inference_steps=steps,
        callback=lambda index, t, x: calls.append((index, t, x.shape[1])),
    )
    assert [index for index, _, _ in calls] == list(range(12))
    sizes = [n for n, count in zip((1, 2, 2, 1, 2, 1), steps, strict=True) for _ in range(count)]
    assert [frames for _, _, frames in calls] == sizes
    assert [i for i, (_, t, _) in enumerate(calls) if t == 1000] == [0, 4, 5, 7, 8, 11]
    # the first chunk, with its four steps, is that of a video of four steps
    every = _sample(causal_reference, model, num_inference_steps=4)
    assert torch.equal(video[:, :1], every[:, :1]) and not torch.equal(video, every)


def test_a_callback_replaces_the_latents_of_its_chunk(causal_reference) -> None:
    """Replace the first chunk's result, and see it in the video and in what follows."""
    model = causal_reference.model()
    given = causal_reference["sample.context_bfchw"]

    def replace(index: int, timestep: float, latents: Tensor) -> Tensor | None:
        return given if index == 0 else None

    video = _sample(causal_reference, model, num_inference_steps=1, callback=replace)
    expected = causal_reference["sample.ctx.nfe1"]
    assert _relative(video, expected) <= 2e-5
    with pytest.raises(ValueError, match="callback must return None or latents"):
        _sample(causal_reference, model, callback=lambda *_: torch.zeros(1))


def test_a_custom_schedule_is_used_verbatim_for_each_chunk(causal_reference) -> None:
    """Give the shifted times of two steps, which a second shift would change."""
    model, times = causal_reference.model(), []
    schedule = SCHEDULER.schedule(2).tolist()
    expected = causal_reference["sample.nfe2"]
    for custom in (
        {"sigmas": schedule[:-1]},
        {"timesteps": [1000 * sigma for sigma in schedule[:-1]]},
    ):
        video = _sample(causal_reference, model, **custom, callback=lambda i, t, x: times.append(t))
        assert _relative(video, expected) <= 2e-5
    assert times == pytest.approx([1000 * sigma for sigma in schedule[:-1]] * 12)


def test_inputs_and_the_global_generator_stay_as_they_are(causal_reference) -> None:
    model, noise = causal_reference.model(), causal_reference["roll.noise_bfchw"].clone()
    text, state = causal_reference["prompt_embeds"][:2].clone(), torch.get_rng_state()
    context = causal_reference["sample.context_bfchw"].clone()
    sample_causal(model, SCHEDULER, noise, text, context_latents=context)
    assert torch.equal(noise, causal_reference["roll.noise_bfchw"])
    assert torch.equal(text, causal_reference["prompt_embeds"][:2])
    assert torch.equal(context, causal_reference["sample.context_bfchw"])
    assert torch.equal(torch.get_rng_state(), state)


def test_plain_euler_steps_evaluate_r_equal_to_t(causal_reference) -> None:
    model, seen = causal_reference.model(), []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((kwargs.get("timestep"), kwargs.get("r_timestep"))),
        with_kwargs=True,
    )
    _sample(causal_reference, model, num_inference_steps=2, use_mean_velocity=False)
    steps = [(t, r) for t, r in seen if t is not None]
    assert len(steps) == 12 and all(torch.equal(t, r) for t, r in steps)


# Options ------------------------------------------------------------------------------------------


def test_a_new_prompt_counts_for_all_that_later_chunks_see(causal_reference) -> None:
    """Switch the text at chunk 3; keeping caches of the old text would be another video."""
    model = causal_reference.model(torch.float64)
    old, new = causal_reference["prompt_embeds"].double().split(2)
    options = {"num_inference_steps": 2, "prompt_switches": {3: new}}
    cached = _sample(causal_reference, model, **options)
    recomputed = _sample(causal_reference, model, **options, use_cache=False)
    assert _relative(cached, recomputed) <= 1e-14
    plain = _sample(causal_reference, model, num_inference_steps=2)
    assert torch.equal(cached[:, :5], plain[:, :5])
    assert _relative(cached, plain) > 1e-3
    from_the_start = _sample(causal_reference, model, **options | {"prompt_switches": {0: new}})
    noise = causal_reference["roll.noise_bfchw"].double()
    assert torch.equal(
        from_the_start, sample_causal(model, SCHEDULER, noise, new, num_inference_steps=2)
    )


def test_a_window_bounds_the_cache_and_is_exact_while_nothing_has_left(causal_reference) -> None:
    """Compare the bytes of caches over 8 and 24 chunks, and videos with windows of any size."""
    model = causal_reference.model()
    most = []
    for chunks in (8, 24):
        sampler = ChunkSampler(
            model,
            SCHEDULER,
            torch.randn(1, chunks, 16, 4, 8),
            causal_reference["prompt_embeds"][:1],
            chunk_partition=(1,) * chunks,
            num_inference_steps=1,
            cache_window=3,
        )
        sizes = [sampler.cache.num_bytes for _ in sampler]
        assert sampler.cache.compressed == (0, chunks - 5, chunks - 4)
        most.append(max(sizes))
    assert most[0] == most[1] == model.cache_bytes(4, 8, (1,) * 24, window=3)
    exact = _sample(causal_reference, model, num_inference_steps=1)
    distances = [
        _relative(_sample(causal_reference, model, num_inference_steps=1, cache_window=n), exact)
        for n in (3, 2, 1)
    ]
    assert distances[0] == 0 and 0 < distances[1] < distances[2] < 0.5


def test_a_cache_may_wait_on_the_device_of_the_model(causal_reference) -> None:
    """Name the model's own device; the GPU runner compares the bits of copies from the host."""
    model = causal_reference.model()
    exact = _sample(causal_reference, model, num_inference_steps=2)
    away = _sample(causal_reference, model, num_inference_steps=2, cache_device="cpu")
    assert torch.equal(away, exact)


def test_the_examples_of_the_page_run(capsys) -> None:
    page = (Path(__file__).parents[1] / "docs" / "causal.md").read_text()
    names: dict[str, Any] = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(code, names)
    assert names["model"].proj_out.weight.grad.isfinite().all()
    assert names["video"].shape == (1, 6, 16, 8, 8)
    assert capsys.readouterr().out.splitlines() == [
        f"{chunk} (1, {frames}, 16, 8, 8)" for chunk, frames in enumerate((1, 3, 2))
    ]


# What cannot be -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"chunk_partition": (1, 2, 2)}, "has 5 latent frames, and the video has 9"),
        ({"chunk_partition": (1, -1, 9)}, "chunk 1"),
        ({"context_latents": torch.zeros(2, 2, 16, 4, 8)}, "allowed are 1, 3, 5, 6, 8"),
        ({"context_latents": torch.zeros(2, 9, 16, 4, 8)}, "allowed are 1, 3, 5, 6, 8"),
        ({"context_latents": torch.zeros(3, 1, 16, 4, 8)}, r"B=2 or 1"),
        ({"context_latents": torch.zeros(2, 1, 16, 8, 8)}, r"context_latents must be"),
        ({"num_inference_steps": (4, 2)}, "one for each of the 6 chunks"),
        ({"num_inference_steps": (4, 2, 2, 2, 2, 0)}, "num_inference_steps"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"use_cache": False, "cache_window": 2}, "use_cache is False"),
        ({"cache_window": 0}, "cache_window"),
        ({"guidance_scale": 2.0}, "negative_prompt_embeds"),
        ({"prompt_switches": {6: torch.zeros(1, 7, 16)}}, "are 0 to 5"),
        ({"prompt_switches": {1: torch.zeros(1, 5, 16)}}, r"prompt_switches\[1\]"),
    ],
)
def test_bad_input_is_refused_before_a_weight_runs(options, match, causal_reference) -> None:
    model, ran = causal_reference.model(), []
    model.register_forward_pre_hook(lambda *_: ran.append(True))
    with pytest.raises(ValueError, match=match):
        _sample(causal_reference, model, **options)
    assert not ran


def test_sizes_and_models_that_cannot_be_are_refused(causal_reference) -> None:
    model, text = causal_reference.model(), causal_reference["prompt_embeds"][:1]
    for shape, match in (
        ((1, 9, 16, 6, 8), "height 6 must be a positive multiple of 4"),
        ((1, 9, 16, 4, 10), "width 10"),
        ((1, 9, 4, 4, 8), "C=16"),
    ):
        with pytest.raises(ValueError, match=match):
            sample_causal(model, SCHEDULER, torch.zeros(shape), text)
    with pytest.raises(ValueError, match="64 positions for frames"):
        sample_causal(
            model, SCHEDULER, torch.zeros(1, 65, 16, 4, 8), text, chunk_partition=(5,) * 13
        )
    plain = AnyFlowTransformer3DModel(
        **{
            name: value
            for name, value in causal_reference.variant["config"].items()
            if name not in ("compressed_patch_size", "full_chunk_limit", "chunk_partition")
        }
    )
    with pytest.raises(ValueError, match="needs the causal model"):
        sample_causal(plain, SCHEDULER, torch.zeros(1, 9, 16, 4, 8), text)


def test_nan_is_reported_with_its_step(causal_reference) -> None:
    model = causal_reference.model()
    bad = causal_reference["roll.noise_bfchw"].clone()
    bad[1, 3] = float("nan")
    with pytest.raises(ValueError, match="noise holds NaN"):
        sample_causal(model, SCHEDULER, bad, causal_reference["prompt_embeds"][:2])

    def poison(index: int, timestep: float, latents: Tensor) -> Tensor | None:
        return latents * float("inf") if index == 5 else None

    with pytest.raises(FloatingPointError, match="after step 6 of 12"):
        _sample(causal_reference, model, num_inference_steps=2, callback=poison)
