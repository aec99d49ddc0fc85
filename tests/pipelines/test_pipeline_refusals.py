"""Test what a pipeline refuses, before any network runs or by the part that gives NaN."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_calls import CALL, LATENT_SHAPE, PROMPTS, generators

from anyflow.pipelines import AnyFlowPipeline, ModelLayout, VideoRequest


@pytest.mark.parametrize(
    ("returned", "message"),
    [({"prompt_embeds": torch.ones(3, 12, 16)}, "callback_on_step_end must be of 2 prompts, got 3"),
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
    """Copy a model with NaN in a tensor of a part."""
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
        ({"generator": generators(1)}, "list of 1 for 2 videos"),
        ({"generator": []}, "list of 0 for 2 videos"),
        ({"generator": 5}, "generator must be a torch.Generator or a list of them, got 5"),
        ({"generator": [1, 2]}, "generator must be a torch.Generator or a list of them"),
        ({"generator": generators(1, 2), "num_videos_per_prompt": 2}, "list of 2 for 4 videos"),
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
        ({"prompt": None, "prompt_embeds": torch.full((2, 12, 16), float("inf"))}, "sample 1 of 2"),
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
        ({"video": np.zeros((5, 16, 32, 3), np.uint8)}, "5 first frames are given, and must be"),
        ({"video": np.zeros((3, 16, 32, 3), np.uint8)}, r"first frames must be 4k \+ 1, got 3"),
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
    """Run in low memory, where no network but the VAE is even loaded."""
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
    """Copy a model with another configuration."""
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
    [
        ("vae/config.json", '{"z_dim": 16, "base_dim": "4"}'),
        ("vae/config.json", '{"z_dim": 16, "dim_mult": null}'),
        ("text_encoder/config.json", '{"d_model": 16, "num_layers": []}'),
        ("tokenizer/tokenizer.json", "[]"),
        ("tokenizer/tokenizer.json", "{"),
    ],
)
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
