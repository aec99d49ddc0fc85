"""Our pipeline against diffusers' on the same folder of tiny real parts, and what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from anyflow.pipelines import AnyFlowPipeline, ModelLayout, VideoRequest

TOLERANCE = 1e-5
PROMPTS = ["a red disc moves slowly", "a blue cross stops"]
CALL: dict[str, Any] = {
    "height": 16,
    "width": 32,
    "num_frames": 5,
    "max_sequence_length": 12,
    "num_inference_steps": 2,
}
GUIDED = {"guidance_scale": 3.0, "negative_prompt": "bad quality"}
LATENT_SHAPE = (2, 16, 2, 2, 4)


@pytest.fixture(scope="module")
def pipe(model: Path) -> AnyFlowPipeline:
    return AnyFlowPipeline.from_pretrained(model, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def peer(model: Path) -> diffusers.AnyFlowPipeline:
    pipe = diffusers.AnyFlowPipeline.from_pretrained(model)
    pipe.transformer = diffusers.AnyFlowTransformer3DModel.from_pretrained(
        model, subfolder="transformer"
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def noise(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(LATENT_SHAPE, generator=generator)


def steps_of_peer(
    peer: diffusers.AnyFlowPipeline, noise: torch.Tensor, **call: Any
) -> list[torch.Tensor]:
    """diffusers' latents after each step, frames first."""
    seen: list[torch.Tensor] = []

    def watch(
        pipe: Any, index: int, timestep: torch.Tensor, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        seen.append(tensors["latents"].clone())
        return {}

    peer(
        **{**CALL, **call}, latents=noise.clone(), output_type="latent", callback_on_step_end=watch
    )
    return seen


def steps_of_ours(pipe: AnyFlowPipeline, noise: torch.Tensor, **call: Any) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    pipe(
        **{**CALL, **call},
        latents=noise,
        output_type="latent",
        callback=lambda i, t, x: seen.append(x.clone()),
    )
    return seen


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
        # Between the steps theirs has context frames that went astray (they are put back before
        # each call); ours not.
        torch.testing.assert_close(ours[:, kept:], theirs[:, kept:], rtol=0, atol=TOLERANCE)
        assert torch.equal(ours[:, :kept], actual[0][:, :kept])
    last = peer(**{**CALL, **call}, latents=noise.clone(), output_type="latent").frames
    torch.testing.assert_close(actual[-1].transpose(1, 2), last, rtol=0, atol=TOLERANCE)


def test_image_is_the_first_frame_of_a_context(pipe, noise) -> None:
    """The same as a PIL image, an array and a tensor; a PIL image of another size is cut to fit."""
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


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


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
    """Context latents, sigmas (verbatim here), tuples for results, callbacks and what they may
    replace.
    """
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


@pytest.mark.parametrize(
    ("returned", "message"),
    [({"prompt_embeds": torch.ones(3, 12, 16)}, "prompt_embeds of callback_on_step_end must have 2 "
                                                "rows, got 3"),
     (torch.ones(2), "must return a dict or None, got Tensor"),
     ({"latents": torch.ones(3)}, "callback must return None or latents")],
)  # fmt: skip
def test_what_a_callback_of_diffusers_cannot_do_is_said(returned, message, pipe, noise) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(
            PROMPTS,
            **CALL,
            latents=noise,
            output_type="latent",
            callback_on_step_end=lambda *_: returned,
        )


def spoiled(model: Path, folder: Path, part: str, name: str) -> Path:
    """A copy of a model with NaN in a tensor of a part."""
    shutil.copytree(model, folder)
    (file,) = (folder / part).glob("*.safetensors")
    tensors = load_file(file)
    tensors[name].view(-1)[-1] = float("nan")
    save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("part", "name", "message"),
    [
        (
            "transformer",
            "blocks.1.ffn.net.2.bias",
            "video 1 of 1 are not finite .* after step 1 of 2",
        ),
        (
            "text_encoder",
            "encoder.final_layer_norm.weight",
            "text encoder gives NaN .* 'a red disc moves slowly'.*bf16",
        ),
        ("vae", "decoder.conv_out.bias", "decoded frames are not finite .* in video 1 of 1.*bf16"),
    ],
)
def test_nan_of_any_part_is_named(part, name, message, model, tmp_path: Path) -> None:
    folder = spoiled(model, tmp_path / "model", part, name)
    pipe = AnyFlowPipeline.from_pretrained(folder, dtype=torch.float32, device="cpu")
    with pytest.raises(FloatingPointError, match=message):
        pipe(PROMPTS[0], **CALL, seed=1)


def test_infinite_pixels_are_not_clamped_away(pipe) -> None:
    with pytest.raises(
        FloatingPointError, match="latents to be decoded are not finite .* in video 2 of 2"
    ):
        pipe.decode(torch.tensor([0.0, float("inf")]).view(2, 1, 1, 1, 1).expand(2, 16, 1, 2, 4))


def test_a_seed_is_a_generator(pipe) -> None:
    call = {**CALL, "prompt": PROMPTS[0], "output_type": "latent"}
    seeded = pipe(**call, seed=5).frames
    assert torch.equal(seeded, pipe(**call, generator=torch.Generator().manual_seed(5)).frames)
    assert not torch.equal(seeded, pipe(**call, seed=6).frames)
    assert not torch.equal(pipe(**call).frames, pipe(**call).frames)


def test_custom_timesteps_are_verbatim(pipe, noise) -> None:
    """diffusers shifts them a second time."""
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


def test_low_memory_is_bit_for_bit_the_same_and_keeps_no_text_encoder(model, pipe) -> None:
    low = AnyFlowPipeline.from_pretrained(model, dtype=torch.float32, device="cpu", memory="low")
    assert (
        not isinstance(low._transformer, torch.nn.Module)
        and low.vae.use_tiling
        and low.vae.use_slicing
    )
    for call in ({}, {**GUIDED, "image": Image.new("RGB", (32, 16), "red")}):
        fast = pipe(PROMPTS, **CALL, **call, seed=1, output_type="pt").frames
        assert torch.equal(low(PROMPTS, **CALL, **call, seed=1, output_type="pt").frames, fast)
        assert low.text_encoder is None and pipe.text_encoder is not None
        assert isinstance(low._transformer, torch.nn.Module)


def test_low_memory_encodes_all_prompts_before_the_transformer_is_loaded(model) -> None:
    low = AnyFlowPipeline.from_pretrained(model, dtype=torch.float32, device="cpu", memory="low")
    assert len(low.encode_prompts(PROMPTS, 12)) == 2
    assert not isinstance(low._transformer, torch.nn.Module)


def test_bf16_stays_near_fp32_and_has_fp32_latents(model, pipe, noise) -> None:
    half = AnyFlowPipeline.from_pretrained(model, device="cpu")
    assert (
        half.transformer.patch_embedding.weight.dtype == torch.bfloat16
        and half.vae.dtype == torch.float32
    )
    call = {**CALL, "prompt": PROMPTS, "latents": noise, "output_type": "latent"}
    actual, expected = half(**call).frames, pipe(**call).frames
    assert actual.dtype == torch.float32
    assert (actual - expected).norm() < 0.05 * (expected - noise).norm()


@pytest.mark.slow
def test_compiled_blocks_give_the_same(model, pipe, noise) -> None:
    compiled = AnyFlowPipeline.from_pretrained(
        model, dtype=torch.float32, device="cpu", compile=True
    )
    call = {
        **CALL,
        "prompt": PROMPTS,
        "latents": noise,
        "output_type": "latent",
        "num_inference_steps": 2,
    }
    torch.testing.assert_close(compiled(**call).frames, pipe(**call).frames, rtol=0, atol=TOLERANCE)


def test_transformer_in_place_of_the_folders_own(model, pipe, noise, tmp_path: Path) -> None:
    """A model, or a folder with its own scheduler, as training leaves it."""
    call = {**CALL, "prompt": PROMPTS, "latents": noise, "output_type": "latent"}
    other = diffusers.AnyFlowTransformer3DModel.from_pretrained(model, subfolder="transformer")
    with torch.no_grad():
        other.proj_out.weight.mul_(2)
    other.save_pretrained(tmp_path / "transformer")
    pipe.scheduler.from_config(pipe.scheduler.config, shift=2.0).save_pretrained(
        tmp_path / "scheduler"
    )
    by_folder = AnyFlowPipeline.from_pretrained(
        model, dtype=torch.float32, device="cpu", transformer=tmp_path
    )
    assert by_folder.scheduler.config.shift == 2.0
    by_model = AnyFlowPipeline.from_pretrained(
        model, dtype=torch.float32, device="cpu", transformer=by_folder.transformer, memory="low"
    )
    assert by_model.scheduler.config.shift == 5.0
    by_model.scheduler = by_folder.scheduler
    assert torch.equal(by_folder(**call).frames, by_model(**call).frames)
    assert not torch.equal(by_folder(**call).frames, pipe(**call).frames)


def adapters(model: Path) -> tuple[torch.nn.Module, LoraConfig]:
    """diffusers' transformer with an adapter that changes it."""
    torch.manual_seed(1)
    transformer = diffusers.AnyFlowTransformer3DModel.from_pretrained(
        model, subfolder="transformer"
    )
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["to_q", "to_out.0", "net.2"], init_lora_weights=False
    )
    transformer.add_adapter(config)
    return transformer, config


@pytest.mark.parametrize("kind", ["diffusers", "diffusers-file", "peft"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_lora_is_that_of_diffusers(scale, kind, model, peer, noise, tmp_path: Path) -> None:
    transformer, config = adapters(model)
    layers = get_peft_model_state_dict(transformer)
    if kind == "peft":
        plain = diffusers.AnyFlowTransformer3DModel.from_pretrained(model, subfolder="transformer")
        wrapped = get_peft_model(plain, config)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                saved = name.removeprefix("base_model.model.").replace(".default.", ".")
                parameter.data.copy_(layers[saved])
        wrapped.save_pretrained(tmp_path)
    else:
        diffusers.loaders.WanLoraLoaderMixin.save_lora_weights(
            tmp_path,
            transformer_lora_layers=layers,
            transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
        )
    call = {**CALL, "prompt": PROMPTS, "num_inference_steps": 2}
    merged = AnyFlowPipeline.from_pretrained(model, dtype=torch.float32, device="cpu")
    names = list(merged.transformer.state_dict())
    merged.load_lora(
        tmp_path / "pytorch_lora_weights.safetensors" if kind == "diffusers-file" else tmp_path,
        scale,
    )
    assert list(merged.transformer.state_dict()) == names
    transformer.fuse_lora(lora_scale=scale)
    transformer.unload_lora()
    theirs = diffusers.AnyFlowPipeline(**{**peer.components, "transformer": transformer})
    theirs.set_progress_bar_config(disable=True)
    expected = steps_of_peer(theirs, noise, **call)
    torch.testing.assert_close(
        steps_of_ours(merged, noise, **call)[-1], expected[-1], rtol=0, atol=TOLERANCE
    )
    assert (expected[-1] - steps_of_peer(peer, noise, **call)[-1]).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"transformer.blocks.0.attn1.to_q.lora_A.weight": (4, 24)}, "missing: "
                                                                     "blocks.0.attn1.to_q.lora_B.weight"),
        ({"transformer.blocks.9.attn1.to_q.lora_A.weight": (4, 24),
          "transformer.blocks.9.attn1.to_q.lora_B.weight": (24, 4)}, "no linear "
                                                                     "layer.*blocks.9.attn1.to_q"),
        ({"transformer.blocks.0.attn1.to_q.lora_A.weight": (4, 7),
          "transformer.blocks.0.attn1.to_q.lora_B.weight": (24, 4)},
          r"A \(4, 7\) and B \(24, 4\) do not make"),
        ({"transformer.blocks.0.attn1.to_q.weight": (24, 24)}, "not understood"),
    ],
)  # fmt: skip
def test_a_lora_that_does_not_fit_changes_nothing(tensors, message, model, tmp_path: Path) -> None:
    pipe = AnyFlowPipeline.from_pretrained(model, dtype=torch.float32, device="cpu")
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    file = tmp_path / "lora.safetensors"
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, file)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        pipe.load_lora(file)
    after = pipe.transformer.state_dict()
    assert list(after) == list(before) and all(
        torch.equal(after[name], before[name]) for name in before
    )


def test_a_missing_lora_is_named(pipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}/none"):
        pipe.load_lora(tmp_path / "none")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"height": 24}, "height must be a multiple of 16, got 24; the nearest are 16 and 32"),
        ({"width": 0}, "width must be a whole number >= 1, got 0"),
        ({"width": 32.0}, "width must be a whole number"),
        ({"num_frames": 6}, r"num_frames must be 4k \+ 1, got 6; the nearest are 5 and 9"),
        ({"num_frames": 4 * 40 + 1}, "num_frames must be <= 125 for this model, got 161"),
        ({"width": 16 * 33}, "width must be <= 512 pixels for this model, got 528"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number from 1 to 10000, "
                                     "got 0"),
        ({"num_inference_steps": None}, "num_inference_steps"),
        ({"timesteps": [500, 600]}, "descending"),
        ({"guidance_scale": -1.0}, "guidance_scale must be >= 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number, got nan"),
        ({"guidance_scale": 3.0, "negative_prompt": ["a"] * 3}, "one or as many as the 2 prompts, "
                                                                "got 3"),
        ({"output_type": "gif"}, "output_type must be one of pil, np, pt, latent, got 'gif'"),
        ({"max_sequence_length": 0}, "max_sequence_length"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt must be a whole number >= 1, got 0"),
        ({"num_inference_steps": 10**9}, "from 1 to 10000"),
        ({"max_sequence_length": 10**9},
         "max_sequence_length must be a whole number from 1 to 4096"),
        ({"height": True}, "height must be a whole number"),
        ({"height": "16"}, "height must be a whole number >= 1, got '16'"),
        ({"timesteps": "999, 500"}, "timesteps must be a sequence"),
        ({"sigmas": [0.5, 0.7]}, "descending"),
        ({"sigmas": [0.5], "timesteps": [500]}, "not both"),
        ({"guidance_scale": "3"}, "guidance_scale must be a finite number, got '3'"),
        ({"generator": generators(1)}, "list of 1, but there are 2 videos"),
        ({"generator": []}, "list of 0, but there are 2 videos"),
        ({"generator": 5}, "generator must be a torch.Generator or a list of them, got 5"),
        ({"generator": [1, 2]}, "generator must be a torch.Generator or a list of them"),
        ({"generator": generators(1, 2), "num_videos_per_prompt": 2}, "list of 2, but there are 4 "
                                                                      "videos"),
        ({"generator": generators(1, 2), "seed": 1}, "one of seed, generator and latents"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": 2**64}, "seed must be a whole number from 0"),
        ({"seed": 1.5}, "seed must be a whole number from 0"),
        ({"latents": np.zeros(LATENT_SHAPE)}, "latents must be .* floating point"),
        ({"latents": torch.zeros(LATENT_SHAPE, dtype=torch.int64)}, "latents must be .* floating "
                                                                    "point, got .*int64"),
        ({"attention_kwargs": {"scales": 0.5}},
         r"attention_kwargs must be None or {'scale': s} of LoRAs"),
        ({"callback": 3}, "callback must be a function, got 3"),
        ({"callback_on_step_end": 3}, "callback_on_step_end must be a function, got 3"),
        ({"callback": print, "callback_on_step_end": print}, "either callback or "
                                                             "callback_on_step_end"),
        ({"callback_on_step_end": print, "callback_on_step_end_tensor_inputs": ["x"]}, "inputs "
                                                                                       "must be of "
                                                                                       "latents"),
        ({"video_latents": torch.zeros(2, 2, 16, 2, 4)}, "fewer than the 2 latent frames, got 2"),
        ({"video_latents": torch.zeros(2, 1, 16, 2, 3)}, r"video_latents must be \[B=2 or 1"),
        ({"video_latents": torch.full((1, 1, 16, 2, 4), float("nan"))}, "video_latents holds NaN"),
        ({"video_latents": torch.zeros(1, 1, 16, 2, 4), "image": 3}, "not both"),
        ({"prompt": 5}, "prompt must be a text or a list of texts, got 5"),
        ({"prompt": {"a": 1}}, "prompt must be a text or a list of texts"),
        ({"prompt": "a \ud800"}, "lone surrogate"),
        ({"prompt": None, "prompt_embeds": np.zeros((2, 12, 16))}, "prompt_embeds must be a "
                                                                   "floating-point tensor"),
        ({"prompt": None, "prompt_embeds": torch.zeros(2, 12, 16).long()}, "prompt_embeds must be "
                                                                           "a floating-point"),
        ({"prompt": None, "prompt_embeds": torch.full((2, 12, 16), float("inf"))}, "row 1 of 2"),
        ({"output_type": 3}, "output_type must be one of pil"),
        ({"prompt": []}, "prompt must be a text or a list of texts"),
        ({"prompt": [1]}, "prompt must be a text or a list of texts"),
        ({"prompt": None}, "give prompt or prompt_embeds"),
        ({"prompt_embeds": torch.zeros(1, 12, 16)}, "either prompt or prompt_embeds"),
        ({"prompt": None, "prompt_embeds": torch.zeros(2, 12, 8)},
         r"prompt_embeds must be .* \[B, S, 16\]"),
        ({"guidance_scale": 2.0, "negative_prompt_embeds": torch.zeros(1, 9, 16)}, "12 tokens "
                                                                                   "long.* 9"),
        ({"seed": 1, "latents": torch.zeros(LATENT_SHAPE)}, "one of seed, generator and latents"),
        ({"latents": torch.zeros(2, 2, 16, 2, 4)}, r"channels first"),
        ({"video": np.zeros((5, 16, 32, 3), np.uint8)}, "context has 5 frames, and must be shorter "
                                                        "than num_frames=5"),
        ({"video": np.zeros((3, 16, 32, 3), np.uint8)}, r"context frames must be 4k \+ 1, got 3"),
        ({"video": np.zeros((3, 1, 16, 32, 3), np.uint8)}, "video must be one or as many as the 2 "
                                                           "prompts, got 3"),
        ({"video": np.zeros((1, 16, 16, 3), np.uint8)}, r"an array \[.., 16, 32, 3\]"),
        ({"video": torch.zeros(1, 16, 32, 3)},
         r"tensor \[.., 3, 16, 32\], got Tensor \(1, 16, 32, 3\)"),
        ({"video": torch.full((1, 3, 16, 32), 255.0)},
         r"float values must be in \[0, 1\], got 255 to 255"),
        ({"video": torch.zeros(1, 3, 16, 32, dtype=torch.int64)}, "uint8 in"),
        ({"video": []}, "video must be PIL images"),
        ({"video": "a.mp4"}, "got str"),
        ({"image": 3}, "image must be PIL images"),
        ({"image": np.zeros((16, 32, 3)), "video": np.zeros((1, 16, 32, 3))}, "not both"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_any_network_runs(wrong, message, model) -> None:
    """In low memory no network but the VAE is even loaded."""
    low = AnyFlowPipeline.from_pretrained(model, dtype=torch.float32, device="cpu", memory="low")
    with pytest.raises(ValueError, match=message):
        low(**{**CALL, "prompt": PROMPTS, **wrong})
    assert not isinstance(low._transformer, torch.nn.Module)


def test_a_request_is_checked_without_a_model_in_memory(model) -> None:
    layout = ModelLayout.read(model)
    assert layout == ModelLayout(16, 4, 8, (1, 2, 2), 32, 16)
    VideoRequest(height=16, width=32, num_frames=5, context_frames=1).check(layout)
    with pytest.raises(ValueError, match="width must be <= 512 pixels for this model, got 832"):
        VideoRequest().check(layout)


def edited(model: Path, out: Path, file: str, **settings: Any) -> Path:
    """A copy of a model with another configuration."""
    shutil.copytree(model, out)
    config = json.loads((out / file).read_text())
    (out / file).write_text(json.dumps(config | settings))
    return out


def test_parts_that_do_not_fit_together_are_refused(model, tmp_path: Path) -> None:
    for name, file, settings, message in (
        (
            "a",
            "text_encoder/config.json",
            {"d_model": 8},
            "text_encoder has 8 text dimensions, .* takes 16",
        ),
        (
            "b",
            "vae/config.json",
            {"z_dim": 48},
            "vae has 48 channels, but the transformer takes 16",
        ),
        (
            "c",
            "scheduler/scheduler_config.json",
            {"solver_order": 2},
            "unknown scheduler settings solver_order",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            AnyFlowPipeline.from_pretrained(
                edited(model, tmp_path / name, file, **settings), device="cpu"
            )


@pytest.mark.parametrize(
    "content", ["[1, 2]", "3", "null", '"text"', "{", '{"in_channels": "16", "d_model": "16"}']
)
@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "scheduler"])
def test_configurations_that_cannot_be_are_refused(part, content, model, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    file = copy / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file.write_text(content if part != "vae" else content.replace("in_channels", "z_dim"))
    with pytest.raises(ValueError, match=str(copy)) as error:
        AnyFlowPipeline.from_pretrained(copy, device="cpu")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "content"),
    [("vae/config.json", '{"z_dim": 16, "base_dim": "4"}'), ("vae/config.json", '{"z_dim": 16, '
                                                                                '"dim_mult": null}'),
     ("text_encoder/config.json", '{"d_model": 16, "num_layers": []}'),
     ("tokenizer/tokenizer.json", "[]"), ("tokenizer/tokenizer.json", "{")],
)  # fmt: skip
def test_what_a_library_cannot_read_is_one_line(file, content, model, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    (copy / file).write_text(content)
    with pytest.raises(ValueError, match=str(copy / Path(file).parent)) as error:
        AnyFlowPipeline.from_pretrained(copy, device="cpu")
    assert "\n" not in str(error.value)


def test_missing_parts_and_weights_are_named(model, tmp_path: Path) -> None:
    for part in ("transformer", "vae", "text_encoder", "tokenizer", "scheduler"):
        copy = tmp_path / part
        shutil.copytree(model, copy, ignore=shutil.ignore_patterns(part))
        with pytest.raises(ValueError, match=f"{part}"):
            AnyFlowPipeline.from_pretrained(copy, device="cpu")
    copy = tmp_path / "tokenizer-first"  # 40 GB are not loaded to find out
    shutil.copytree(model, copy, ignore=shutil.ignore_patterns("tokenizer*", "*.safetensors"))
    with pytest.raises(ValueError, match="no tokenizer"):
        AnyFlowPipeline.from_pretrained(copy, device="cpu")
    copy = tmp_path / "weights"
    shutil.copytree(model, copy)
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["stray"] = tensors.pop("proj_out.bias")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="(?s)cannot be loaded.*proj_out.bias.*stray"):
        AnyFlowPipeline.from_pretrained(copy, device="cpu")


def test_a_name_of_the_hub_is_found_in_its_cache(
    model, pipe, noise, tmp_path: Path, monkeypatch
) -> None:
    """As the hub's own client lays it out: links to content by its hash."""
    repository = tmp_path / "models--someone--anyflow"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for number, file in enumerate(f for f in model.rglob("*") if f.is_file()):
        blob = repository / "blobs" / f"{number:040x}"
        shutil.copy(file, blob)
        link = snapshot / file.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cached = AnyFlowPipeline.from_pretrained("someone/anyflow", dtype=torch.float32, device="cpu")
    call = {**CALL, "prompt": PROMPTS, "latents": noise, "output_type": "latent"}
    assert torch.equal(cached(**call).frames, pipe(**call).frames)


@pytest.mark.parametrize(
    ("name", "advice"),
    [("runs/none", " here.*`hf download runs/none --local-dir none`"), ("/no/such/folder", "$")],
)
def test_a_model_that_is_nowhere_is_one_clear_error(name: str, advice: str) -> None:
    with pytest.raises(ValueError, match=f"no folder {name}{advice}"):
        AnyFlowPipeline.from_pretrained(name)


@pytest.mark.parametrize(
    ("argument", "value"), [("memory", "tiny"), ("device", "cuda:99"), ("device", "toaster")]
)
def test_an_argument_that_cannot_be_is_refused(argument: str, value: str, model) -> None:
    with pytest.raises(ValueError, match=value.split(":")[0]):
        AnyFlowPipeline.from_pretrained(model, **{argument: value})
