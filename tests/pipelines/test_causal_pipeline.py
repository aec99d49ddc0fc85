"""Test that calls of diffusers' ``AnyFlowFARPipeline`` give the same here, its defects apart.

Frames are 128 pixels wide and high and chunks have two latent frames: chunks of 128 tokens, of
which diffusers' cached evaluations pad none.
"""

import inspect
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from anyflow.models import AnyFlowFARTransformer3DModel
from anyflow.pipelines import AnyFlowFARPipeline
from anyflow.sampling import sample_causal

PROMPT = "a red disc moves slowly"
PROMPTS = [PROMPT, "a blue cross stops"]
SIZE: dict[str, Any] = {
    "height": 128,
    "width": 128,
    "num_frames": 21,
    "chunk_partition": [2, 2, 2],
    "num_inference_steps": 2,
    "max_sequence_length": 12,
    "output_type": "latent",
}
DRAW = torch.Generator().manual_seed(0)
NOISE = torch.randn(2, 16, 6, 16, 16, generator=DRAW)
EMBEDS, NEGATIVE = (torch.randn(2, 12, 16, generator=DRAW) for _ in range(2))
PIXELS = torch.rand(1, 5, 3, 128, 128, generator=DRAW)
GUIDED: dict[str, Any] = {"guidance_scale": 3.0, "negative_prompt": "bad quality"}


def replaced(pipe: Any, index: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
    assert index in (0, 1)  # of a chunk
    return {"latents": 0.5 * tensors["latents"]}


CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "text": ((PROMPT,), {"num_frames": 29, "chunk_partition": None}),
    "texts": ((PROMPTS,), {"latents": NOISE}),
    "positional": (
        (
            PROMPT,
            None,
            None,
            None,
            128,
            128,
            21,
            1,
            None,
            None,
            1.0,
            1,
            torch.Generator(),
            NOISE[:1],
            None,
            None,
            "latent",
            True,
            None,
            None,
            ["latents"],
            12,
            True,
            True,
            [2, 4],
        ),
        {},
    ),
    "guided": ((PROMPT,), GUIDED),
    "guided, several": ((PROMPTS,), {**GUIDED, "num_videos_per_prompt": 2}),
    "embeds, guided": (
        (),
        {
            "prompt_embeds": EMBEDS,
            "negative_prompt_embeds": NEGATIVE,
            "guidance_scale": 2.0,
        },
    ),
    "euler": ((PROMPT,), {"use_mean_velocity": False}),
    "video": ((PROMPT,), {"video": PIXELS}),
    "video, positional": ((PROMPT, PIXELS), {}),
    "video latents": ((PROMPTS,), {"video_latents": NOISE.transpose(1, 2)[:, :4]}),
    "callback": ((PROMPT,), {"callback_on_step_end": replaced}),
    "tuple": ((PROMPT,), {"return_dict": False}),
}


def frames(pipe: Any, *arguments: Any, **call: Any) -> Tensor:
    taken = list(inspect.signature(type(pipe).__call__).parameters)[1 : 1 + len(arguments)]
    settings = {k: v for k, v in {**SIZE, **call}.items() if k not in taken}
    if "generator" not in taken:
        settings["generator"] = torch.Generator().manual_seed(1)
    output = pipe(*arguments, **settings)
    found = output[0] if call.get("return_dict") is False else output.frames
    return torch.as_tensor(found)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_a_call_gives_what_diffusers_gives(
    name: str, causal_pipe: AnyFlowFARPipeline, causal_peer: diffusers.AnyFlowFARPipeline
) -> None:
    arguments, call = CALLS[name]
    ours = frames(causal_pipe, *arguments, **call)
    theirs = frames(causal_peer, *arguments, **call)
    assert ours.shape == theirs.shape and theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_decoded_frames_are_those_of_diffusers(
    causal_pipe: AnyFlowFARPipeline, causal_peer: diffusers.AnyFlowFARPipeline
) -> None:
    """Decode diffusers' latents: the VAE of random weights enlarges fp32's rounding 30 times."""
    latents = frames(causal_peer, PROMPT)
    theirs = frames(causal_peer, PROMPT, output_type="pt")
    torch.testing.assert_close(causal_pipe.decode(latents), theirs, rtol=0, atol=1e-5)
    ours = frames(causal_pipe, PROMPT, output_type="pt")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_the_parameters_are_diffusers_with_the_same_defaults() -> None:
    ours, theirs = (
        inspect.signature(kind.__call__).parameters
        for kind in (AnyFlowFARPipeline, diffusers.AnyFlowFARPipeline)
    )
    assert list(ours)[: len(theirs)] == list(theirs)
    different = {name for name in theirs if ours[name].default != theirs[name].default}
    # a tuple; None for euler=True
    assert different == {"callback_on_step_end_tensor_inputs", "use_mean_velocity"}
    assert all(
        ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in list(ours)[len(theirs) :]
    )


# What diffusers' pipeline gets wrong -------------------------------------------------------------


def test_custom_timesteps_are_used_verbatim(causal_pipe: AnyFlowFARPipeline) -> None:
    timesteps, seen = [999.0, 937.0, 833.0, 624.0], []
    frames(
        causal_pipe,
        PROMPT,
        timesteps=timesteps,
        callback=lambda index, timestep, latents: seen.append((index, timestep)),
    )
    assert [index for index, _ in seen] == list(range(12))
    assert [t for _, t in seen] == pytest.approx(timesteps * 3)


@pytest.mark.parametrize("name", ["use_cache", "use_kv_cache"])
def test_without_a_cache_the_video_is_the_same(name: str, causal_pipe: AnyFlowFARPipeline) -> None:
    call = {"num_frames": 29, "chunk_partition": (2, 2, 2, 2)}
    cached = frames(causal_pipe, PROMPT, **call)
    calls: list[int] = []
    hook = causal_pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        recomputed = frames(causal_pipe, PROMPT, **call, **{name: False})
    finally:
        hook.remove()
    assert len(calls) == 8  # evaluations, and nothing is encoded
    torch.testing.assert_close(cached, recomputed, rtol=0, atol=1e-5)


def test_negative_embeddings_have_no_effect_without_guidance(
    causal_pipe: AnyFlowFARPipeline,
) -> None:
    call = {"prompt_embeds": EMBEDS, "latents": NOISE}
    plain = frames(causal_pipe, **call)
    assert frames(causal_pipe, **call, negative_prompt_embeds=NEGATIVE).equal(plain)


def test_chunks_whose_tokens_diffusers_pads_are_those_of_the_sampler(
    causal_pipe: AnyFlowFARPipeline,
) -> None:
    """Compare with full recomputation by the model, at sizes where diffusers attends to zeros."""
    noise = torch.randn(1, 16, 4, 4, 8, generator=torch.Generator().manual_seed(3))
    actual = frames(
        causal_pipe,
        prompt_embeds=EMBEDS[:1],
        latents=noise,
        height=32,
        width=64,
        num_frames=13,
        chunk_partition=(1, 2, 1),
    )
    expected = sample_causal(
        causal_pipe.transformer,
        causal_pipe.scheduler,
        noise.transpose(1, 2),
        EMBEDS[:1],
        chunk_partition=(1, 2, 1),
        num_inference_steps=2,
        use_cache=False,
    )
    torch.testing.assert_close(actual, expected.transpose(1, 2), rtol=0, atol=1e-5)


# Folders -----------------------------------------------------------------------------------------


def test_a_folder_that_is_saved_loads_here_and_in_diffusers(
    causal_pipe: AnyFlowFARPipeline, tmp_path: Path
) -> None:
    causal_pipe.save_pretrained(tmp_path / "copy")
    theirs = diffusers.AnyFlowFARPipeline.from_pretrained(tmp_path / "copy")
    assert type(theirs.transformer) is diffusers.AnyFlowFARTransformer3DModel
    config = theirs.transformer.config
    assert (config.full_chunk_limit, tuple(config.chunk_partition)) == (2, (2, 2, 2, 2))
    for name, parameter in causal_pipe.transformer.named_parameters():
        assert theirs.transformer.get_parameter(name).equal(parameter), name
    ours = AnyFlowFARPipeline.from_pretrained(
        tmp_path / "copy", dtype=torch.float32, device="cpu", memory="low"
    )
    ours.set_progress_bar_config(disable=True)
    assert frames(ours, PROMPT).equal(frames(causal_pipe, PROMPT))


def test_a_pipeline_of_modules_is_that_of_the_folder(causal_pipe: AnyFlowFARPipeline) -> None:
    parts = causal_pipe.components
    assert type(parts["transformer"]) is AnyFlowFARTransformer3DModel
    again = AnyFlowFARPipeline(**parts)
    again.set_progress_bar_config(disable=True)
    assert again.layout == causal_pipe.layout
    assert frames(again, PROMPT).equal(frames(causal_pipe, PROMPT))


@pytest.mark.parametrize("merged", [True, False])
def test_a_lora_without_the_compressed_embedding_is_that_of_diffusers(
    merged: bool, causal_model: Path, causal_peer: diffusers.AnyFlowFARPipeline, tmp_path: Path
) -> None:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    theirs = diffusers.AnyFlowFARTransformer3DModel.from_pretrained(
        causal_model, subfolder="transformer"
    )
    theirs.add_adapter(
        LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    )
    layers = get_peft_model_state_dict(theirs)
    diffusers.AnyFlowPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    ours = AnyFlowFARPipeline.from_pretrained(causal_model, dtype=torch.float32, device="cpu")
    ours.set_progress_bar_config(disable=True)
    before = frames(ours, PROMPT)
    if merged:
        ours.load_lora(tmp_path / "pytorch_lora_weights.safetensors")
    else:
        ours.load_lora_weights(tmp_path)
    adapted = diffusers.AnyFlowFARPipeline(**{**causal_peer.components, "transformer": theirs})
    adapted.set_progress_bar_config(disable=True)
    after = frames(ours, PROMPT)
    torch.testing.assert_close(after, frames(adapted, PROMPT), rtol=0, atol=1e-5)
    assert (after - before).abs().max() > 1e-2
    if not merged:
        scaled = frames(ours, PROMPT, attention_kwargs={"scale": 0.0})
        torch.testing.assert_close(scaled, before, rtol=0, atol=1e-5)


def test_results_of_every_type_are_of_one_video(causal_pipe: AnyFlowFARPipeline) -> None:
    call = {"height": 32, "width": 32, "num_frames": 9, "chunk_partition": (1, 2)}
    arrays = frames(causal_pipe, PROMPT, **call, output_type="np")
    assert arrays.shape == (1, 9, 32, 32, 3)
    tensor = frames(causal_pipe, PROMPT, **call, output_type="pt")
    assert tensor.movedim(2, -1).equal(arrays)
    (images,) = causal_pipe(
        PROMPT, **{**SIZE, **call, "output_type": "pil"}, generator=torch.Generator().manual_seed(1)
    ).frames
    shown = np.stack([np.asarray(image) for image in images])
    assert np.abs(shown / 255 - arrays[0].numpy()).max() <= 0.51 / 255
