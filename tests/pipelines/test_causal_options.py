"""Test callbacks of the causal pipeline, and prompts that change while a video is made."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow.models import AnyFlowFARTransformer3DModel
from anyflow.pipelines import AnyFlowFARPipeline
from anyflow.pipelines.loading import ModelPaths
from anyflow.pipelines.memory import Sizes, choose_plan

PROMPT, OTHER = "a red disc moves slowly", "a blue cross stops"
CALL: dict[str, Any] = {
    "height": 32,
    "width": 32,
    "num_frames": 21,
    "chunk_partition": (1, 2, 2, 1),
    "num_inference_steps": 2,
    "max_sequence_length": 12,
    "output_type": "latent",
    "seed": 1,
}
TOLERANCE = 1e-5


def video(pipe: AnyFlowFARPipeline, prompt: Any = PROMPT, **call: Any) -> Tensor:
    frames: Tensor = pipe(prompt, **{**CALL, **call}).frames
    return frames


# Prompts that change -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"guidance_scale": 2.0, "negative_prompt": "bad quality"},
        {"prompt": [PROMPT, OTHER], "num_videos_per_prompt": 2},
        {"video_latents": torch.ones(1, 1, 16, 4, 4)},
    ],
    ids=["plain", "guided", "several", "first frames"],
)
def test_a_switched_prompt_is_that_of_a_full_recomputation(
    call: dict[str, Any], causal_pipe: AnyFlowFARPipeline
) -> None:
    plain = video(causal_pipe, **call)
    switched = video(causal_pipe, **call, prompt_switches={2: OTHER})
    recomputed = video(causal_pipe, **call, prompt_switches={2: OTHER}, use_cache=False)
    torch.testing.assert_close(switched, recomputed, rtol=0, atol=TOLERANCE)
    assert switched[:, :, :3].equal(plain[:, :, :3])  # latent frames before chunk 2
    assert (switched - plain)[:1, :, 3:].abs().amax((1, 3, 4)).min() > 1e-3


def test_a_switch_is_of_texts_or_of_embeddings(causal_pipe: AnyFlowFARPipeline) -> None:
    (embeds,) = causal_pipe.encode_prompts([OTHER], 12)
    by_text = video(causal_pipe, prompt_switches={1: OTHER, 3: PROMPT})
    by_embeds = video(causal_pipe, prompt_switches={1: embeds, 3: [PROMPT]})
    assert by_text.equal(by_embeds)


def change_after(step: int, **returned: Any) -> Any:
    """Return diffusers' callback that returns tensors after an evaluation, counted over chunks."""
    count = iter(range(1000))

    def callback(pipe: Any, index: int, timestep: Tensor, tensors: dict[str, Any]) -> Any:
        return returned if next(count) == step else {}

    return callback


@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_prompt_that_a_callback_changes_is_that_of_a_full_recomputation(
    step: int, causal_pipe: AnyFlowFARPipeline
) -> None:
    """Change it after the last evaluation of a chunk, and after the first one."""
    (embeds,) = causal_pipe.encode_prompts([OTHER], 12)

    def changed(**call: Any) -> Tensor:
        callback = change_after(step, prompt_embeds=embeds)
        return video(causal_pipe, **call, callback_on_step_end=callback)

    cached, plain = changed(), video(causal_pipe)
    torch.testing.assert_close(cached, changed(use_cache=False), rtol=0, atol=TOLERANCE)
    assert (cached - plain).abs().max() > 1e-2
    if step == 1:  # the last one of chunk 0
        switched = video(causal_pipe, prompt_switches={1: OTHER})
        assert cached.equal(switched)


def test_a_prompt_that_a_callback_writes_in_place_is_that_of_a_full_recomputation(
    causal_pipe: AnyFlowFARPipeline,
) -> None:
    def changed(**call: Any) -> Tensor:
        count = iter(range(1000))

        def halve(pipe: Any, index: int, timestep: Tensor, tensors: dict[str, Any]) -> Any:
            if next(count) == 3:
                tensors["prompt_embeds"].mul_(0.5)
            return tensors

        names = ["prompt_embeds"]
        return video(
            causal_pipe,
            **call,
            callback_on_step_end=halve,
            callback_on_step_end_tensor_inputs=names,
        )

    cached = changed()
    torch.testing.assert_close(cached, changed(use_cache=False), rtol=0, atol=TOLERANCE)
    assert (cached - video(causal_pipe)).abs().max() > 1e-3


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_a_callback_may_change_the_guidance(scale: float, causal_pipe: AnyFlowFARPipeline) -> None:
    def changed(**call: Any) -> Tensor:
        count = iter(range(1000))

        def set_scale(pipe: Any, index: int, timestep: Tensor, tensors: dict[str, Any]) -> Any:
            if next(count) == 3:
                pipe._guidance_scale = scale

        return video(causal_pipe, guidance_scale=3.0, callback_on_step_end=set_scale, **call)

    cached = changed()
    torch.testing.assert_close(cached, changed(use_cache=False), rtol=0, atol=TOLERANCE)
    guided = video(causal_pipe, guidance_scale=3.0)
    assert cached[:, :, :3].equal(guided[:, :, :3])  # the first two chunks: four evaluations
    assert (cached - guided).abs().max() > 1e-3


def test_a_callback_cannot_turn_guidance_on_without_a_negative_prompt(
    causal_pipe: AnyFlowFARPipeline,
) -> None:
    def set_scale(pipe: Any, *_: Any) -> None:
        pipe._guidance_scale = 3.0

    with pytest.raises(ValueError, match="guidance to 3, and this call has no negative prompt"):
        video(causal_pipe, callback_on_step_end=set_scale)


# Callbacks ---------------------------------------------------------------------------------------


def test_callbacks_see_the_latents_of_their_chunk(causal_pipe: AnyFlowFARPipeline) -> None:
    seen: list[tuple[int, Tensor]] = []
    result = video(
        causal_pipe,
        num_inference_steps=[1, 3, 1, 2],
        callback=lambda index, timestep, latents: seen.append((index, latents)),
    )
    assert [index for index, _ in seen] == list(range(7))
    assert [latents.shape[1] for _, latents in seen] == [1, 2, 2, 2, 2, 1, 1]
    last = torch.cat([seen[i][1] for i in (0, 3, 4, 6)], dim=1)
    assert last.transpose(1, 2).equal(result)


def test_diffusers_callbacks_count_the_steps_of_a_chunk(causal_pipe: AnyFlowFARPipeline) -> None:
    seen: list[Any] = []

    def watch(pipe: Any, index: int, timestep: Tensor, tensors: dict[str, Any]) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        seen.append((index, pipe.num_timesteps, float(pipe.scheduler.timesteps[index]), shapes))
        assert float(timestep) == pytest.approx(seen[-1][2])

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    video(
        causal_pipe,
        num_inference_steps=[1, 3, 1, 2],
        guidance_scale=2.0,
        callback_on_step_end=watch,
        callback_on_step_end_tensor_inputs=names,
    )
    assert [index for index, *_ in seen] == [0, 0, 1, 2, 0, 0, 1]
    assert {total for _, total, *_ in seen} == {7}
    assert seen[1][3] == dict(zip(names, [(1, 2, 16, 4, 4), (1, 12, 16), (1, 12, 16)], strict=True))


@pytest.mark.parametrize(("step", "frames"), [(0, 1), (1, 1), (2, 3), (7, 6)])
def test_an_interrupted_video_ends_with_the_chunk_in_work(
    step: int, frames: int, causal_pipe: AnyFlowFARPipeline
) -> None:
    seen: list[Tensor] = []

    def interrupt(index: int, timestep: float, latents: Tensor) -> None:
        seen.append(latents)
        causal_pipe._interrupt = index == step

    result = video(causal_pipe, callback=interrupt)
    assert len(seen) == step + 1 and result.shape[2] == frames
    assert result[:, :, -seen[-1].shape[1] :].equal(seen[-1].transpose(1, 2))
    done = frames - seen[-1].shape[1]
    assert result[:, :, :done].equal(video(causal_pipe)[:, :, :done])
    parts = list(causal_pipe.stream(PROMPT, **CALL, callback=interrupt))
    assert torch.cat([part.frames for part in parts], dim=2).equal(result)


def test_the_bar_counts_the_evaluations_of_all_chunks(
    causal_pipe: AnyFlowFARPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    video(causal_pipe, num_inference_steps=[1, 3, 1, 2], progress=True)
    assert "7/7" in capsys.readouterr().err
    video(causal_pipe)
    assert capsys.readouterr().err == ""


def test_context_of_one_frame_is_that_of_the_image(causal_pipe: AnyFlowFARPipeline) -> None:
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(1))
    by_image = video(causal_pipe, image=image)
    assert by_image.equal(video(causal_pipe, video=image[None]))
    assert (by_image - video(causal_pipe))[:, :, 1:].abs().max() > 1e-3
    given = by_image.transpose(1, 2)[:, :1]
    torch.testing.assert_close(
        by_image, video(causal_pipe, video_latents=given), rtol=0, atol=TOLERANCE
    )


def test_the_memory_plans_count_the_cache(causal_model: Path) -> None:
    """Read the sizes of a folder, and plan for a 14B model with 11 GiB of keys and values."""
    paths = ModelPaths.find(causal_model)
    settings = paths.layout().causal
    sizes = Sizes.read(paths, {}, torch.bfloat16, torch.float32, settings)
    model = AnyFlowFARTransformer3DModel.from_pretrained(causal_model, subfolder="transformer")
    assert sizes.cache == model.cache_bytes(60, 104, dtype=torch.bfloat16) > 0
    given = {"transformer": model}
    assert Sizes.read(paths, given, torch.bfloat16, torch.float32, settings).cache == sizes.cache
    assert Sizes.read(paths, {}, torch.bfloat16, torch.float32).cache == 0
    plain = Sizes(28_800_000_000, 11_400_000_000, 508_000_000)
    causal = replace(plain, cache=11 * 2**30)
    free = int(0.97 * 48 * 2**30)
    assert choose_plan("auto", plain, free) == "low"
    assert choose_plan("auto", causal, free) == "stream"
