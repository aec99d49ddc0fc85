"""Test that the calls of diffusers' ``AnyFlowPipeline`` give the same with this library's."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from anyflow.pipelines import AnyFlowPipeline

PROMPT = "a red disc moves slowly"
PROMPTS = [PROMPT, "a blue cross stops"]
SIZE: dict[str, Any] = {
    "height": 16,
    "width": 32,
    "num_frames": 5,
    "num_inference_steps": 2,
    "max_sequence_length": 12,
}
DRAW = torch.Generator().manual_seed(0)
LATENTS = torch.randn(2, 16, 2, 2, 4, generator=DRAW)
EMBEDS, NEGATIVE = (torch.randn(2, 12, 16, generator=DRAW) for _ in range(2))
PIXELS = torch.rand(1, 1, 3, 16, 32, generator=DRAW)
IMAGE = Image.fromarray((PIXELS[0, 0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
GUIDED: dict[str, Any] = {"guidance_scale": 3.0, "negative_prompt": "bad quality"}


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def replaced(pipe: Any, index: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"latents": 0.5 * tensors["latents"]}


def other_text(pipe: Any, index: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"prompt_embeds": 0.5 * tensors["prompt_embeds"]} if index == 1 else {}


def without_guidance(
    pipe: Any, index: int, timestep: Tensor, tensors: dict[str, Any]
) -> dict[str, Any]:
    """Guide the first steps only, as diffusers' guide to callbacks does."""
    if index != 0:
        return {}
    pipe._guidance_scale = 0.0
    return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}


def interrupting(
    pipe: Any, index: int, timestep: Tensor, tensors: dict[str, Any]
) -> dict[str, Any]:
    pipe._interrupt = index == 1
    return tensors


def step_end(function: Callable[..., Any], *names: str) -> dict[str, Any]:
    return {
        "callback_on_step_end": function,
        "callback_on_step_end_tensor_inputs": list(names),
        "num_inference_steps": 4,
        "generator": 2,
    }


# Numbers under "generator" become generators with these seeds, anew for each pipeline.
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "text": ((PROMPT,), {"generator": 1, "output_type": ...}),
    "texts": ((PROMPTS,), {"generator": 1}),
    "all-positional": (
        (PROMPT, None, None, None, 16, 32, 9, 3, None, None, 1.0, 1),
        {"generator": 1},
    ),
    "generators": ((PROMPTS,), {"generator": (1, 2)}),
    "latents": ((PROMPTS,), {"latents": LATENTS}),
    "latents-and-generator": ((PROMPTS,), {"latents": LATENTS, "generator": 1}),
    "pt": ((PROMPT,), {"generator": 1, "output_type": "pt"}),
    "pil": ((PROMPT,), {"generator": 1, "output_type": "pil"}),
    "tuple": ((PROMPT,), {"generator": 1, "return_dict": False, "output_type": ...}),
    "many-steps": ((PROMPT,), {"generator": 1, "num_inference_steps": 8}),
    "default-steps": ((PROMPT,), {"generator": 1, "num_inference_steps": ...}),
    "embeds": ((), {"prompt_embeds": EMBEDS, "generator": 1}),
    "embeds-guided": (
        (),
        {
            "prompt_embeds": EMBEDS,
            "negative_prompt_embeds": NEGATIVE,
            "guidance_scale": 2.0,
            "generator": 1,
        },
    ),
    "guided": ((PROMPT,), {**GUIDED, "generator": 1}),
    "guided-without-negative": ((PROMPT,), {"guidance_scale": 3.0, "generator": 1}),
    "no-guidance-below-1": (
        (PROMPT,),
        {"guidance_scale": 0.5, "negative_prompt": "bad quality", "generator": 1},
    ),
    "no-guidance-at-0": ((PROMPT,), {"guidance_scale": 0.0, "generator": 1}),
    "several": ((PROMPT,), {**GUIDED, "num_videos_per_prompt": 2, "generator": (1, 2)}),
    "euler": ((PROMPT,), {"use_mean_velocity": False, "generator": 1}),
    "video": ((PROMPT,), {"video": PIXELS, "generator": 1}),
    "video-positional": ((PROMPT, PIXELS), {"generator": 1}),
    "video-images": ((PROMPT,), {"video": [IMAGE], "generator": 1}),
    "video-latents": (
        (PROMPTS,),
        {"video_latents": LATENTS.transpose(1, 2)[:, :1], "generator": 1},
    ),
    "attention-kwargs": ((PROMPT,), {"attention_kwargs": {"scale": 0.5}, "generator": 1}),
    "callback-latents": ((PROMPT,), step_end(replaced, "latents")),
    "callback-text": ((PROMPT,), step_end(other_text, "prompt_embeds")),
    "callback-text-guided": (
        (PROMPT,),
        {**GUIDED, **step_end(other_text, "latents", "prompt_embeds")},
    ),
    "callback-guidance": (
        (PROMPTS,),
        {"guidance_scale": 3.0, **step_end(without_guidance, "prompt_embeds")},
    ),
    "callback-interrupts": ((PROMPT,), step_end(interrupting, "latents")),
}


@pytest.fixture(scope="module")
def pipe(model: Path) -> AnyFlowPipeline:
    return AnyFlowPipeline.from_pretrained(model, torch_dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def peer(model: Path) -> diffusers.AnyFlowPipeline:
    return diffusers.AnyFlowPipeline.from_pretrained(model, torch_dtype=torch.float32)


def numbers(pipe: Any, name: str) -> np.ndarray:
    """Return the frames or latents of a call."""
    arguments, call = CALLS[name]
    # A VAE of random weights makes much of fp32's rounding: most calls are compared before it.
    settings = {k: v for k, v in {"output_type": "latent", **SIZE, **call}.items() if v is not ...}
    for parameter in list(inspect.signature(type(pipe).__call__).parameters)[
        1 : 1 + len(arguments)
    ]:
        settings.pop(parameter, None)
    draws = settings.get("generator")
    if draws is not None:
        settings["generator"] = seeds(*draws) if isinstance(draws, tuple) else seeds(draws)[0]
    output = pipe(*arguments, **settings)
    frames = output[0] if call.get("return_dict") is False else output.frames
    assert len(output[0]) == len(frames)  # an output is indexed like a tuple, too
    if call.get("output_type") == "pil":
        return np.stack([[np.asarray(frame, float) / 255 for frame in video] for video in frames])
    return np.asarray(frames)


@pytest.mark.parametrize("name", CALLS)
def test_a_call_gives_what_diffusers_gives(
    name: str, pipe: AnyFlowPipeline, peer: diffusers.AnyFlowPipeline
) -> None:
    for both in (pipe, peer):
        both.set_progress_bar_config(disable=True)
    ours, theirs = numbers(pipe, name), numbers(peer, name)
    assert ours.shape == theirs.shape and theirs.std() > 0.01
    tolerance = 1.01 / 255 if name == "pil" else 1e-5
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


def test_the_calls_are_different_ones(pipe: AnyFlowPipeline) -> None:
    """Check that the arguments change the video, so that the comparison is of what they do."""
    plain = numbers(pipe, "no-guidance-at-0")
    for name in ("guided", "video", "euler", "many-steps", "callback-latents"):
        assert np.abs(numbers(pipe, name) - plain).max() > 1e-3, name
    both = {name: numbers(pipe, name) for name in CALLS if name.startswith("callback-")}
    assert not np.allclose(both["callback-text"], both["callback-interrupts"], atol=1e-3)


def test_the_parameters_are_diffusers_with_the_same_defaults() -> None:
    ours, theirs = (
        inspect.signature(kind.__call__).parameters
        for kind in (AnyFlowPipeline, diffusers.AnyFlowPipeline)
    )
    assert list(ours)[: len(theirs)] == list(theirs)
    different = {name for name in theirs if ours[name].default != theirs[name].default}
    # a tuple; None for euler=True
    assert different == {"callback_on_step_end_tensor_inputs", "use_mean_velocity"}
    assert all(
        ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in list(ours)[len(theirs) :]
    )
