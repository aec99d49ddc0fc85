"""Test our transformer and our scheduler inside diffusers.AnyFlowPipeline, with tiny parts."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AnyFlowPipeline, AutoencoderKLWan
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from anyflow.models import AnyFlowTransformer3DModel
from anyflow.sampling import sample
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

TOLERANCE = 1e-5
SHIFT = 5.0
WORDS = [
    "a",
    "red",
    "blue",
    "disc",
    "cross",
    "moves",
    "slowly",
    "to",
    "the",
    "right",
    "stops",
    "bad",
    "quality",
]
TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
PROMPTS = ["a red disc moves slowly to the right", "a blue cross stops"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make one token per word, with UMT5's padding 0 and end of sequence 1."""
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=32,
    )


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    """Make all parts of a pipeline; ``transformer`` and ``scheduler`` are diffusers'."""
    torch.manual_seed(0)
    config = UMT5Config(
        vocab_size=3 + len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    )
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    return {
        "tokenizer": make_tokenizer(),
        "text_encoder": UMT5EncoderModel(config).eval(),
        "vae": vae.eval(),
        "transformer": diffusers.AnyFlowTransformer3DModel(**TRANSFORMER).eval(),
        "scheduler": diffusers.FlowMapEulerDiscreteScheduler(shift=SHIFT),
    }


@pytest.fixture(scope="module")
def ours(parts: dict[str, Any]) -> dict[str, Any]:
    """Make our transformer with the same weights, and our scheduler of the same configuration."""
    transformer = AnyFlowTransformer3DModel(**TRANSFORMER).eval()
    transformer.load_state_dict(parts["transformer"].state_dict(), strict=True)
    scheduler = FlowMapEulerDiscreteScheduler.from_config(parts["scheduler"].config)
    return {"transformer": transformer, "scheduler": scheduler}


def build(parts: dict[str, Any], **replaced: Any) -> AnyFlowPipeline:
    pipe = AnyFlowPipeline(**(parts | replaced))
    pipe.set_progress_bar_config(disable=True)
    return pipe


LATENT = {"output_type": "latent"}


def video(pipe: AnyFlowPipeline, **arguments: Any) -> np.ndarray:
    """Draw ``[B, frames, height, width, 3]`` in [0, 1], from a fixed seed."""
    settings = {
        "prompt": PROMPTS,
        "height": 16,
        "width": 32,
        "num_frames": 5,
        "num_inference_steps": 4,
        "max_sequence_length": 12,
        "generator": torch.Generator().manual_seed(7),
    }
    return np.asarray(pipe(**(settings | arguments)).frames)


CALLS: dict[str, dict[str, Any]] = {
    "four-steps": {},
    "one-step": {"num_inference_steps": 1},
    "single-prompt": {"prompt": PROMPTS[0]},
    "euler": {"use_mean_velocity": False},
    "guidance": {"guidance_scale": 3.0, "negative_prompt": "bad quality"},
    "guidance-many": {"guidance_scale": 2.0, "num_videos_per_prompt": 2, "num_inference_steps": 2},
    "context": {"video_latents": torch.linspace(-1, 1, 2 * 16 * 2 * 4).reshape(2, 1, 16, 2, 4)},
    "context-guidance": {
        # One context for both halves of a guided batch: the peer writes it into the doubled input.
        "video_latents": torch.linspace(-1, 1, 16 * 2 * 4).reshape(1, 1, 16, 2, 4),
        "guidance_scale": 2.0,
    },
}
REPLACED: dict[str, tuple[str, ...]] = {
    "transformer": ("transformer",),
    "scheduler": ("scheduler",),
    "both": ("transformer", "scheduler"),
}


@pytest.fixture(scope="module")
def expected(parts: dict[str, Any]) -> dict[str, np.ndarray]:
    """Make the video of every call by diffusers' own classes."""
    return {name: video(build(parts), **call) for name, call in CALLS.items()}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("names", REPLACED.values(), ids=REPLACED)
def test_same_video(names, call, parts, ours, expected) -> None:
    actual = video(build(parts, **{n: ours[n] for n in names}), **CALLS[call])
    assert actual.shape[1:] == (5, 16, 32, 3)
    np.testing.assert_allclose(actual, expected[call], rtol=0, atol=TOLERANCE)


def test_every_option_matters(expected) -> None:
    """Check that the comparison above is of different videos, not of one constant."""
    videos = {k: v for k, v in expected.items() if len(v) == len(PROMPTS)}
    assert len(videos) >= 6 and all(v.std() > 0.01 for v in videos.values())
    names = list(videos)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert np.abs(videos[a] - videos[b]).max() > 10 * TOLERANCE, (a, b)


def test_scheduler_assigned_to_a_finished_pipeline(parts, ours, expected) -> None:
    pipe = build(parts)
    pipe.scheduler = ours["scheduler"]
    pipe.transformer = ours["transformer"]
    np.testing.assert_allclose(video(pipe), expected["four-steps"], rtol=0, atol=TOLERANCE)
    assert pipe.scheduler.step_index == 4


@pytest.mark.parametrize("timesteps", [[999, 937, 833, 624], [999, 937, 833, 624, 0], [1000, 500]])
def test_custom_timesteps(timesteps, parts, ours) -> None:
    """Compare at shift 1: ours are verbatim, and diffusers shifts them once more."""
    unshifted = diffusers.FlowMapEulerDiscreteScheduler(shift=1.0)
    # diffusers' pipeline skips a last step from 0 to 0, which is what its terminal 0 makes.
    expected = video(build(parts, scheduler=unshifted), timesteps=timesteps, **LATENT)
    both = build(parts, **ours)
    np.testing.assert_allclose(
        video(both, timesteps=timesteps, **LATENT), expected, rtol=0, atol=TOLERANCE
    )
    assert (
        both.scheduler.timesteps.tolist() == [t for t in timesteps if t]
        and both.scheduler.config.shift == SHIFT
    )
    assert (
        np.abs(video(build(parts), timesteps=timesteps, **LATENT) - expected).max() > 10 * TOLERANCE
    )


def test_custom_sigmas(parts, ours) -> None:
    unshifted = diffusers.FlowMapEulerDiscreteScheduler(shift=1.0)
    expected = video(build(parts, scheduler=unshifted), sigmas=[1.0, 0.5], **LATENT)
    np.testing.assert_allclose(
        video(build(parts, **ours), sigmas=[1.0, 0.5], **LATENT), expected, rtol=0, atol=TOLERANCE
    )


def test_pixel_context(parts, ours) -> None:
    """Give video in pixels, which the VAE encodes and the pipeline keeps."""
    context = torch.rand(1, 1, 3, 16, 32, generator=torch.Generator().manual_seed(1))
    call = {"prompt": PROMPTS[0], "video": context, **LATENT}
    frames = [video(build(parts, **replaced), **call) for replaced in ({}, ours)]
    np.testing.assert_allclose(frames[1], frames[0], rtol=0, atol=TOLERANCE)


def test_callback_and_attention_kwargs(parts, ours) -> None:
    """Check that the callback gets the latents, and the transformer its attention_kwargs."""
    seen: list[float] = []

    def watch(
        pipe: AnyFlowPipeline, index: int, timestep: torch.Tensor, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        seen.append(float(timestep))
        return {"latents": 0.9 * tensors["latents"]}

    call = {"callback_on_step_end": watch, "attention_kwargs": {"scale": 1.0}, **LATENT}
    frames = [video(build(parts, **replaced), **call) for replaced in ({}, ours)]
    np.testing.assert_allclose(frames[1], frames[0], rtol=0, atol=TOLERANCE)
    assert seen[:4] == pytest.approx(seen[4:]) and len(seen) == 8


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_our_sampler_gives_the_pipelines_latents(guidance, parts, ours) -> None:
    pipe = build(parts)
    prompt, negative = pipe.encode_prompt(PROMPTS, "bad quality", True, max_sequence_length=12)
    noise = torch.randn(2, 16, 2, 2, 4, generator=torch.Generator().manual_seed(2))
    expected = video(
        pipe,
        prompt=None,
        prompt_embeds=prompt,
        negative_prompt_embeds=negative if guidance != 1 else None,
        guidance_scale=guidance,
        latents=noise,
        **LATENT,
    )
    actual = sample(
        ours["transformer"], ours["scheduler"], noise.transpose(1, 2), prompt,
        guidance_scale=guidance, negative_prompt_embeds=negative,
    )  # fmt: skip
    np.testing.assert_allclose(actual.transpose(1, 2).numpy(), expected, rtol=0, atol=TOLERANCE)


def test_saved_pipeline_loads_our_transformer(parts, ours, expected, tmp_path: Path) -> None:
    pipe = build(parts, transformer=ours["transformer"])
    pipe.save_pretrained(tmp_path)
    again = AnyFlowPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert isinstance(again.transformer, AnyFlowTransformer3DModel)
    np.testing.assert_allclose(video(again), expected["four-steps"], rtol=0, atol=TOLERANCE)


def test_scheduler_of_a_saved_pipeline(parts, expected, tmp_path: Path) -> None:
    """Assign after loading: from_pretrained(scheduler=...) takes diffusers' classes only."""
    build(parts).save_pretrained(tmp_path)
    loaded = AnyFlowPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    loaded.scheduler = FlowMapEulerDiscreteScheduler.from_pretrained(
        tmp_path, subfolder="scheduler"
    )
    assert loaded.scheduler.config.shift == SHIFT
    np.testing.assert_allclose(video(loaded), expected["four-steps"], rtol=0, atol=TOLERANCE)


def test_readme_snippet_loads_our_transformer_into_a_saved_pipeline(
    parts, expected, tmp_path: Path
) -> None:
    """Run README's "the call of diffusers' own" up to its call, whose video is too large here."""
    build(parts).save_pretrained(tmp_path)
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    snippet = next(s for s in readme.split("```python\n") if "anyflow.accelerate(pipe)" in s)
    scope: dict[str, Any] = {"path": tmp_path}
    exec(snippet[: snippet.index("video = ")], scope)
    pipe = scope["pipe"]
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.transformer, AnyFlowTransformer3DModel)
    np.testing.assert_allclose(video(pipe), expected["four-steps"], rtol=0, atol=TOLERANCE)
