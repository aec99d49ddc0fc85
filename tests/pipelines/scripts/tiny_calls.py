"""Hold the calls that the tests of the pipeline make."""

from typing import Any

import diffusers
import torch

from anyflow.pipelines import AnyFlowPipeline

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


def steps_of_peer(
    peer: diffusers.AnyFlowPipeline, noise: torch.Tensor, **call: Any
) -> list[torch.Tensor]:
    """Return diffusers' latents after each step, frames first."""
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


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]
