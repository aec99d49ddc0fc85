"""Give the samplers wrong arguments, and networks that return NaN or infinity."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anyflow.sampling import sample, sample_consistency
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

B, F, C, H, W = 2, 3, 4, 4, 6
TEXT = torch.zeros(B, 5, 8)
SCHEDULER = FlowMapEulerDiscreteScheduler(shift=5.0)
SAMPLERS = pytest.mark.parametrize("sampler", [sample, sample_consistency])


class Field(nn.Module):
    """Return the latents times a factor in fp32, with one value replaced in one evaluation."""

    def __init__(
        self, factor: float = 1.0, call: int = 0, value: float = 0.0, video: int = 0, frame: int = 2
    ) -> None:
        super().__init__()
        self.factor, self.call, self.value = factor, call, value
        self.place, self.calls = (video, frame, 1, 2, 3), 0

    def forward(self, hidden_states: Tensor, **arguments: Any) -> tuple[Tensor]:
        self.calls += 1
        out = self.factor * hidden_states.float()
        if self.calls == self.call:
            out[self.place] = self.value
        return (out,)


@pytest.fixture
def noise(generator: torch.Generator) -> Tensor:
    return torch.randn(B, F, C, H, W, generator=generator)


# NaN and infinity ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("call", "video"), [(1, 0), (2, 1), (4, 0), (4, 1)])
@SAMPLERS
def test_the_step_and_video_where_nan_began_are_named(sampler, call, video, value, noise) -> None:
    network = Field(call=call, value=value, video=video)
    message = f"video {video + 1} of 2 .* after step {call} of 4: .*bf16"
    with pytest.raises(FloatingPointError, match=message):
        sampler(network, SCHEDULER, noise, TEXT)
    assert network.calls == 4  # nothing is read before the end


def test_nan_in_a_clean_first_frame_is_no_nan(noise) -> None:
    """Use none of the network's values for frames that are kept."""
    network, first_frames = Field(call=2, value=math.nan, frame=0), torch.zeros(1, 1, C, H, W)
    assert sample(network, SCHEDULER, noise, TEXT, context_latents=first_frames).isfinite().all()


def test_nan_of_a_callback_is_named_too(noise) -> None:
    def spoil(index: int, timestep: float, latents: Tensor) -> Tensor | None:
        return torch.full_like(latents, math.nan) if index == 2 else None

    with pytest.raises(FloatingPointError, match="videos 1, 2 of 2 .* after step 3 of 4"):
        sample(Field(), SCHEDULER, noise, TEXT, callback=spoil)
    for wrong in ({}, torch.zeros(B, F, C, H), 3.0):
        with pytest.raises(ValueError, match="callback must return None or latents"):
            sample(Field(), SCHEDULER, noise, TEXT, callback=lambda i, t, x, wrong=wrong: wrong)


def test_latents_that_overflow_when_rounded_to_fp16_are_named() -> None:
    """Carry the latents in fp32, where they are finite."""
    noise = torch.full((B, F, C, H, W), 1e3, dtype=torch.float16)
    message = "after step 1 of 1: float16 overflows above 65504"
    with pytest.raises(FloatingPointError, match=message):
        sample(Field(-1e3), SCHEDULER, noise, TEXT, num_inference_steps=1)


def test_huge_but_finite_latents_are_no_error() -> None:
    """Test latents whose sum would overflow."""
    noise = torch.full((B, F, C, H, W), 3e38)
    assert sample(Field(), SCHEDULER, noise, TEXT, timesteps=[1e-3]).isfinite().all()


# Wrong arguments ----------------------------------------------------------------------------------


@SAMPLERS
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": torch.full((B, F, C, H, W), math.nan)}, "noise holds NaN"),
        ({"noise": torch.full((B, F, C, H, W), math.inf)}, "noise holds NaN"),
        ({"noise": torch.zeros(F, C, H, W)}, "noise must be"),
        ({"noise": torch.zeros(0, F, C, H, W)}, "noise must be"),
        ({"noise": torch.zeros(B, F, C, H, W, dtype=torch.long)}, "noise must be"),
        ({"prompt_embeds": torch.zeros(B + 1, 5, 8)}, "prompt_embeds must be"),
        ({"prompt_embeds": torch.zeros(B, 8)}, "prompt_embeds must be"),
        ({"prompt_embeds": torch.zeros(B, 5, 8, dtype=torch.long)}, "prompt_embeds must be"),
        ({"prompt_embeds": torch.full((1, 5, 8), math.nan)}, "prompt_embeds holds NaN"),
        ({"num_inference_steps": 0}, "num_inference_steps must be"),
        ({"num_inference_steps": None}, "num_inference_steps is required"),
        ({"timesteps": [500, 1000]}, "timesteps must be"),
        ({"timesteps": [1000, math.nan]}, "timesteps must be"),
        ({"sigmas": [1, 2]}, "sigmas must be"),
        ({"sigmas": [1], "timesteps": [1000]}, "not both"),
    ],
)
def test_bad_input(sampler, changes, message) -> None:
    good, network = {"noise": torch.zeros(B, F, C, H, W), "prompt_embeds": TEXT}, Field()
    with pytest.raises(ValueError, match=message):
        sampler(network, SCHEDULER, **(good | changes))
    assert not network.calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 3.0}, "needs negative_prompt_embeds"),
        ({"guidance_scale": 0.99}, "needs negative_prompt_embeds"),
        *(
            (
                {"guidance_scale": scale, "negative_prompt_embeds": TEXT},
                "guidance_scale must be > 0",
            )
            for scale in (0.0, -1.0, math.nan, math.inf)
        ),
        (
            {"guidance_scale": 2.0, "negative_prompt_embeds": torch.zeros(3, 5, 8)},
            "negative_prompt_embeds must be",
        ),
        *(
            ({"context_latents": torch.zeros(shape)}, "context_latents")
            for shape in (
                *((B, F, C, H, W), (B + 1, 1, C, H, W), (B, 1, C, H, W + 2)),
                *((B, 1, C + 1, H, W), (B, C, H, W), (B, 0, C, H, W)),
            )
        ),
    ],
)
def test_bad_options(options, message, noise) -> None:
    with pytest.raises(ValueError, match=message):
        sample(Field(), SCHEDULER, noise, TEXT, **options)
