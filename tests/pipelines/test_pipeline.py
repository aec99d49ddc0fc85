"""Test our pipeline against diffusers' on the same folder of tiny parts."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_calls import CALL, GUIDED, PROMPTS, TOLERANCE, generators, steps_of_ours, steps_of_peer

from anyflow.pipelines import AnyFlowPipeline


@pytest.mark.parametrize("guidance", [{}, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_every_step_has_diffusers_latents(steps, guidance, pipe, peer, noise) -> None:
    call = {"prompt": PROMPTS, "num_inference_steps": steps, **guidance}
    if guidance:
        # diffusers wants one for each prompt
        call["negative_prompt"] = [guidance["negative_prompt"]] * 2
    expected, actual = steps_of_peer(peer, noise, **call), steps_of_ours(pipe, noise, **call)
    assert len(actual) == len(expected) == steps
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
    assert (actual[-1] - noise.transpose(1, 2)).abs().max() > 0.1


@pytest.mark.parametrize("guidance", [{}, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize(("frames", "steps"), [(1, 1), (1, 2), (1, 4), (1, 8), (5, 4)])
def test_a_context_gives_diffusers_latents(frames, steps, guidance, pipe, peer, generator) -> None:
    video = torch.rand(1, frames, 3, 16, 32, generator=generator)
    noise = torch.randn(1, 16, 3, 2, 4, generator=generator)
    call = {
        "prompt": PROMPTS[0],
        "num_frames": 9,
        "num_inference_steps": steps,
        **guidance,
        "video": video,
    }
    expected, actual = steps_of_peer(peer, noise, **call), steps_of_ours(pipe, noise, **call)
    assert len(actual) == len(expected) == steps
    kept = (frames - 1) // 4 + 1
    for ours, theirs in zip(actual, expected, strict=True):
        # Between its steps diffusers lets the first frames go astray, and restores them before each
        # call; our latents keep them.
        torch.testing.assert_close(ours[:, kept:], theirs[:, kept:], rtol=0, atol=TOLERANCE)
        assert torch.equal(ours[:, :kept], actual[0][:, :kept])
    last = peer(**{**CALL, **call}, latents=noise.clone(), output_type="latent").frames
    torch.testing.assert_close(actual[-1].transpose(1, 2), last, rtol=0, atol=TOLERANCE)


def test_image_is_the_first_frame_of_a_context(pipe, noise) -> None:
    """Give a PIL image, an array and a tensor; a PIL image of another size is cut to fit."""
    pixels = np.random.default_rng(0).integers(0, 256, (16, 32, 3), np.uint8)
    images = [Image.fromarray(pixels), pixels, torch.from_numpy(pixels).permute(2, 0, 1)]
    call = {**CALL, "prompt": PROMPTS, "latents": noise, "output_type": "pt"}
    results = [pipe(**call, image=image).frames for image in images]
    results.append(pipe(**call, video=[Image.fromarray(pixels)]).frames)
    results.append(pipe(**call, video=pixels[None].astype(np.float32) / 255).frames)
    assert all(torch.equal(result, results[0]) for result in results[:4])
    torch.testing.assert_close(results[4], results[0], rtol=0, atol=TOLERANCE)
    assert not torch.equal(results[0], pipe(**call).frames)
    wide = Image.fromarray(np.concatenate([pixels[:, :4] * 0, pixels, pixels[:, :4] * 0], axis=1))
    assert torch.equal(pipe(**call, image=wide).frames, results[0])


@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
def test_frames_are_diffusers(output_type, pipe, peer) -> None:
    seeded = [{"generator": torch.Generator().manual_seed(3)} for _ in range(2)]
    expected = peer(PROMPTS, **CALL, **seeded[0], output_type=output_type).frames
    output = pipe(PROMPTS, **CALL, **seeded[1], output_type=output_type)
    assert len(output.frames) == 2 and len(output.frames[0]) == 5
    if output_type == "pil":
        ours, theirs = (
            np.array([[np.asarray(f) for f in video] for video in v], int)
            for v in (output.frames, expected)
        )
        assert ours.shape == (2, 5, 16, 32, 3) and np.abs(ours - theirs).max() <= 1
    else:
        np.testing.assert_allclose(output.frames, expected, rtol=0, atol=TOLERANCE)
        assert output.frames.std() > 0.01
    assert (
        set(output.seconds) == {"encode", "sample", "decode"} and min(output.seconds.values()) > 0
    )


def test_a_generator_for_each_video_gives_diffusers_latents_and_those_of_videos_alone(
    pipe, peer
) -> None:
    call = {**CALL, "num_inference_steps": 2, "output_type": "latent"}
    together = pipe(PROMPTS, **call, generator=generators(11, 12)).frames
    theirs = peer(PROMPTS, **call, generator=generators(11, 12)).frames
    torch.testing.assert_close(together, theirs, rtol=0, atol=TOLERANCE)
    for video, prompt, generator in zip(together, PROMPTS, generators(11, 12), strict=True):
        torch.testing.assert_close(
            video, pipe(prompt, **call, generator=[generator]).frames[0], rtol=0, atol=TOLERANCE
        )


def test_several_videos_of_a_prompt_are_diffusers(pipe, peer) -> None:
    call = {
        **CALL,
        "num_inference_steps": 2,
        "output_type": "latent",
        "num_videos_per_prompt": 2,
        "guidance_scale": 3.0,
    }
    negative = ["bad quality", "a disc"]
    for draws in (generators(1)[0], generators(1, 2, 3, 4)):
        drawn_again = (
            generators(1)[0] if isinstance(draws, torch.Generator) else generators(1, 2, 3, 4)
        )
        ours = pipe(PROMPTS, **call, negative_prompt=negative, generator=draws).frames
        theirs = peer(PROMPTS, **call, negative_prompt=negative, generator=drawn_again).frames
        assert ours.shape == (4, 16, 2, 2, 4)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
    one = pipe(tuple(PROMPTS), **call, negative_prompt="bad quality", seed=1).frames
    assert torch.equal(
        one, pipe(PROMPTS, **call, negative_prompt=["bad quality"] * 2, seed=1).frames
    )
    embeds = {
        "prompt_embeds": torch.cat(pipe.encode_prompts(PROMPTS, 12)),
        "negative_prompt": "bad quality",
    }
    assert torch.equal(one, pipe(**embeds, **call, seed=1).frames)
    assert (
        len(pipe(PROMPTS, **{**call, "output_type": "pil"}, negative_prompt="", seed=1).frames) == 4
    )


def test_numbers_of_numpy_and_torch_are_numbers(pipe) -> None:
    plain = {
        **CALL,
        "prompt": PROMPTS[0],
        "seed": 3,
        "num_inference_steps": 2,
        "guidance_scale": 2.0,
    }
    plain |= {"output_type": "latent", "negative_prompt": ""}
    expected = pipe(**plain).frames
    for kind in (np.int64, torch.tensor):
        sizes = {name: kind(plain[name]) for name in (*CALL, "seed", "num_inference_steps")}
        assert torch.equal(
            pipe(**plain | sizes | {"guidance_scale": np.float32(2)}).frames, expected
        )


def test_calls_of_diffusers_are_served_with_all_their_values(pipe, peer, noise) -> None:
    """Give latents of first frames, sigmas, callbacks and what they may replace."""
    seen: list[tuple[int, float, set[str]]] = []

    def halve(
        pipeline: Any, index: int, timestep: torch.Tensor, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        seen.append((index, float(timestep), set(tensors)))
        return {"latents": 0.5 * tensors["latents"], "prompt_embeds": tensors["prompt_embeds"]}

    call = {
        **CALL,
        "num_frames": 9,
        "num_inference_steps": 3,
        "output_type": "latent",
        "return_dict": False,
    }
    call |= {
        "video_latents": noise.transpose(1, 2)[:, :1],
        "attention_kwargs": None,
        "callback_on_step_end": halve,
    }
    call |= {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    (ours,) = pipe(PROMPTS, **call, generator=generators(5)[0])
    (theirs,) = peer(PROMPTS, **call, generator=generators(5)[0])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
    assert seen[:3] == seen[3:] and torch.equal(ours[:, :, :1], noise[:, :, :1])

    plain = {**CALL, "prompt": PROMPTS, "latents": noise, "output_type": "latent"}
    by_times = pipe(**plain, timesteps=(1000, 750, 250)).frames
    assert torch.equal(pipe(**plain, sigmas=np.array([1, 0.75, 0.25])).frames, by_times)
    assert torch.equal(pipe(**plain, timesteps=torch.tensor([1000, 750, 250])).frames, by_times)


def test_a_seed_is_a_generator(pipe) -> None:
    call = {**CALL, "prompt": PROMPTS[0], "output_type": "latent"}
    seeded = pipe(**call, seed=5).frames
    assert torch.equal(seeded, pipe(**call, generator=torch.Generator().manual_seed(5)).frames)
    assert not torch.equal(seeded, pipe(**call, seed=6).frames)
    assert not torch.equal(pipe(**call).frames, pipe(**call).frames)


def test_custom_timesteps_are_verbatim(pipe, noise) -> None:
    """Compare with diffusers, which shifts them a second time."""
    seen: list[float] = []
    pipe(**CALL | {"num_inference_steps": None}, prompt=PROMPTS, latents=noise,
         timesteps=[999, 937, 833, 624, 0],
         output_type="latent", callback=lambda i, t, x: seen.append(t))  # fmt: skip
    assert seen == pytest.approx([999, 937, 833, 624])


def test_embeddings_stand_for_prompts(pipe, noise) -> None:
    call = {**CALL, "latents": noise, "output_type": "latent", "guidance_scale": 2.0}
    expected = pipe(PROMPTS, negative_prompt="bad quality", **call).frames
    *prompts, negative = pipe.encode_prompts([*PROMPTS, "bad quality"], 12)
    assert prompts[0].shape == (1, 12, 16) and prompts[0][0, -1].abs().max() == 0
    assert torch.equal(
        expected,
        pipe(prompt_embeds=torch.cat(prompts), negative_prompt_embeds=negative, **call).frames,
    )


def test_a_negative_prompt_without_guidance_changes_nothing(pipe, noise) -> None:
    call = {**CALL, "latents": noise, "output_type": "latent"}
    assert torch.equal(
        pipe(PROMPTS, **call).frames, pipe(PROMPTS, negative_prompt="bad", **call).frames
    )


def test_arguments_are_not_written_and_the_global_generator_is_not_drawn_from(model, noise) -> None:
    state = torch.get_rng_state()
    pipe = AnyFlowPipeline.from_pretrained(model, dtype=torch.float32, device="cpu")
    before, context = noise.clone(), np.zeros((1, 16, 32, 3), np.float32)
    with torch.inference_mode():
        inference = pipe(PROMPTS, **CALL, latents=noise, video=context, output_type="latent").frames
    assert torch.equal(noise, before) and not context.any()
    assert torch.equal(
        inference, pipe(PROMPTS, **CALL, latents=noise, video=context, output_type="latent").frames
    )
    assert torch.equal(torch.get_rng_state(), state)
    loss = pipe.transformer(
        noise.transpose(1, 2), torch.ones(2), torch.zeros(2), torch.randn(2, 12, 16)
    ).sample.sum()
    loss.backward()  # nothing that inference mode made is kept
