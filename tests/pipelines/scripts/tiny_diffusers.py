"""Build tiny pipelines of diffusers, and compare what they sample."""

from typing import Any

import diffusers
import torch
from diffusers import (
    AnyFlowFARPipeline,
    AnyFlowPipeline,
    AutoencoderKLWan,
    DiffusionPipeline,
    WanPipeline,
)
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

import anyflow

TOLERANCE = 1e-5
TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}

# With two frames a chunk at 128 x 128 pixels, 128 tokens, diffusers' caches need no padding.
CAUSAL: dict[str, Any] = {"full_chunk_limit": 2, "chunk_partition": (2, 2, 2)}
CAUSAL_CALL: dict[str, Any] = {
    "height": 128,
    "width": 128,
    "num_frames": 21,
    "num_inference_steps": 2,
}


def randomized(network: nn.Module) -> nn.Module:
    """Draw norms and biases: those of 1 and 0 would hide a missing one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def accelerated(theirs: nn.Module) -> nn.Module:
    """Return our transformer in the place of diffusers', which a causal one has in a pipeline."""
    if not isinstance(theirs, diffusers.AnyFlowFARTransformer3DModel):
        return anyflow.accelerate(theirs)
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=5.0)
    pipe = AnyFlowFARPipeline(None, None, theirs, None, scheduler)
    return anyflow.accelerate(pipe).transformer


def build(kind: str, **settings: Any) -> DiffusionPipeline:
    """Build a pipeline of diffusers without a tokenizer: prompts are given as embeddings."""
    text = UMT5Config(vocab_size=9, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    sizes = {"z_dim": 16, "dim_mult": [1, 1, 1, 1], "temperal_downsample": [False, True, True]}
    parts: dict[str, Any] = {
        "tokenizer": None,
        "text_encoder": UMT5EncoderModel(text).eval(),
        "vae": AutoencoderKLWan(base_dim=4, num_res_blocks=1, **sizes).eval(),
    }
    if kind == "causal":
        settings = TINY | CAUSAL | settings
        parts["transformer"] = randomized(diffusers.AnyFlowFARTransformer3DModel(**settings))
        pipe = AnyFlowFARPipeline(
            **parts, scheduler=diffusers.FlowMapEulerDiscreteScheduler(shift=5.0)
        )
    elif kind == "anyflow":
        parts["transformer"] = randomized(diffusers.AnyFlowTransformer3DModel(**(TINY | settings)))
        pipe = AnyFlowPipeline(
            **parts, scheduler=diffusers.FlowMapEulerDiscreteScheduler(shift=5.0)
        )
    else:
        parts["transformer"] = randomized(diffusers.WanTransformer3DModel(**(TINY | settings)))
        if kind == "wan-2.2":
            parts["transformer_2"] = randomized(diffusers.WanTransformer3DModel(**TINY))
            parts["boundary_ratio"] = 0.875
        scheduler = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        )
        pipe = WanPipeline(**parts, scheduler=scheduler, expand_timesteps=kind == "wan-5b")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: DiffusionPipeline, **arguments: Any) -> Tensor:
    """Return the latents after guided steps, from fixed noise and prompts.

    They are ``[2, 16, 3, 4, 6]`` after four, of a causal model ``[2, 16, 6, 16, 16]`` after two.
    """
    generator = torch.Generator().manual_seed(7)
    prompt, negative = torch.randn(2, 2, 5, 16, generator=generator)
    settings: dict[str, Any] = {
        "prompt_embeds": prompt,
        "negative_prompt_embeds": negative,
        "guidance_scale": 3.0,
        "num_inference_steps": 4,
        "height": 32,
        "width": 48,
        "num_frames": 9,
        "generator": generator,
        "output_type": "latent",
    }
    if isinstance(pipe, AnyFlowFARPipeline):
        settings |= CAUSAL_CALL
    settings |= arguments
    return pipe(**{name: value for name, value in settings.items() if value is not None}).frames


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def transformers(pipe: DiffusionPipeline) -> list[nn.Module]:
    return [
        pipe.transformer,
        *([pipe.transformer_2] if hasattr(pipe, "transformer_2") and pipe.transformer_2 else []),
    ]
