"""Sample with reference weights, and with fields whose flow map is known in closed form."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from anyflow.models import AnyFlowTransformer3DModel
from anyflow.sampling import sample, sample_consistency
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

REFERENCE = Path(__file__).parent / "data" / "anyflow_reference_c.safetensors"
B, F, C, H, W = 2, 3, 4, 4, 6
TEXT = torch.zeros(B, 5, 8)
TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": C,
    "out_channels": C,
    "text_dim": 8,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 16,
}


class GaussianField(nn.Module):
    """Give the exact flow map of data N(m, s^2), and record the arguments of every call.

    The marginals are N((1 - t) m, (1 - t)^2 s^2 + t^2), so that x_r is affine in x_t. ``s = 0`` is
    one data point, whose flow is linear in t. The text shifts the mean by its first entry.
    """

    def __init__(self, mean: Tensor, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.calls: list[dict[str, Any]] = []

    def sigma(self, t: Tensor) -> Tensor:
        return ((1 - t) ** 2 * self.std**2 + t**2).sqrt()

    def at(self, x: Tensor, t: Tensor, r: Tensor, mean: Tensor) -> Tensor:
        """Return x_r of x_t."""
        return (1 - r) * mean + self.sigma(r) / self.sigma(t) * (x - (1 - t) * mean)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        r_timestep: Tensor | None,
        encoder_hidden_states: Tensor,
        return_dict: bool,
    ) -> tuple[Tensor]:
        x, text = hidden_states.clone(), encoder_hidden_states.clone()
        self.calls.append({"x": x, "t": timestep, "r": r_timestep, "text": text})
        assert r_timestep is not None and not return_dict
        t, r = (
            v.double().reshape(v.shape + (1,) * (5 - v.ndim)) / 1000 for v in (timestep, r_timestep)
        )
        x = hidden_states.double()
        mean = self.mean + encoder_hidden_states[:, 0, 0].double().view(-1, 1, 1, 1, 1)
        average = (x - self.at(x, t, r, mean)) / (t - r)
        growth = (t - (1 - t) * self.std**2) / self.sigma(t) ** 2
        instantaneous = growth * (x - (1 - t) * mean) - mean
        return (torch.where(t == r, instantaneous, average).to(hidden_states.dtype),)


@pytest.fixture
def scheduler() -> FlowMapEulerDiscreteScheduler:
    return FlowMapEulerDiscreteScheduler(shift=5.0)


@pytest.fixture
def noise(generator: torch.Generator) -> Tensor:
    return torch.randn(B, F, C, H, W, generator=generator, dtype=torch.float64)


@pytest.fixture
def field(generator: torch.Generator) -> GaussianField:
    return GaussianField(torch.randn(F, C, H, W, generator=generator, dtype=torch.float64), 0.5)


@pytest.fixture
def model() -> AnyFlowTransformer3DModel:
    return AnyFlowTransformer3DModel(**TINY)


@pytest.fixture
def embeds(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return prompt and negative embeddings."""
    return torch.randn(B, 5, 8, generator=generator), torch.randn(B, 5, 8, generator=generator)


# Exactness ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_reference_numbers(n) -> None:
    """Compare with latents that the NVlabs code has sampled from the same weights and noise."""
    with safe_open(REFERENCE, "pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        variant = json.loads(f.metadata()["variant"])
    model = AnyFlowTransformer3DModel(**variant["config"], gate_value=variant["gate"])
    student = {
        k.removeprefix("student."): v for k, v in tensors.items() if k.startswith("student.")
    }
    model.load_state_dict(student, strict=True)
    scheduler = FlowMapEulerDiscreteScheduler(shift=variant["shift"])
    out = sample(
        model,
        scheduler,
        tensors["roll.noise_bfchw"],
        tensors["prompt_embeds"],
        num_inference_steps=n,
    )
    expected = tensors[f"sample.nfe{n}"]
    assert (out - expected).norm() / expected.norm() < 5e-6


@pytest.mark.parametrize("n", [1, 2, 3, 8, 50])
@pytest.mark.parametrize("std", [0.0, 0.5, 2.0])
def test_exact_flow_map_is_sampled_exactly_at_any_step_count(
    n, std, field, noise, scheduler
) -> None:
    field.std = std
    out = sample(field, scheduler, noise, TEXT, num_inference_steps=n)
    torch.testing.assert_close(out, field.mean + std * noise, rtol=1e-6, atol=1e-6)
    assert len(field.calls) == n


@pytest.mark.parametrize("timesteps", [[1000, 400], [1000, 999, 1], [1000, 937, 833, 624, 0]])
def test_custom_timesteps_are_what_the_model_sees(timesteps, field, noise, scheduler) -> None:
    out = sample(field, scheduler, noise, TEXT, num_inference_steps=7, timesteps=timesteps)
    torch.testing.assert_close(out, field.mean + 0.5 * noise, rtol=1e-6, atol=1e-6)
    ends = [t for t in timesteps if t] + [0]
    assert [c["t"].tolist() for c in field.calls] == [[t] * B for t in ends[:-1]]
    assert [c["r"].tolist() for c in field.calls] == [[r] * B for r in ends[1:]]


def test_sigmas_are_timesteps_in_their_own_unit(field, noise, scheduler) -> None:
    expected = sample(field, scheduler, noise, TEXT, timesteps=[1000, 750, 250])
    assert torch.equal(
        sample(field, scheduler, noise, TEXT, sigmas=[1.0, 0.75, 0.25, 0.0]), expected
    )


def test_two_steps_compose(field, noise, scheduler) -> None:
    """Start a schedule at 600 with the latents of one that ended there."""
    ends = (torch.full((1, 1, 1, 1, 1), v, dtype=torch.float64) for v in (1.0, 0.6))
    middle = field.at(noise, *ends, field.mean)
    tail = sample(field, scheduler, middle, TEXT, timesteps=[600])
    both = sample(field, scheduler, noise, TEXT, timesteps=[1000, 600])
    torch.testing.assert_close(tail, both, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("n", [1, 4])
def test_without_mean_velocity_it_is_euler(n, field, noise, scheduler) -> None:
    out = sample(field, scheduler, noise, TEXT, num_inference_steps=n, use_mean_velocity=False)
    assert all(torch.equal(c["t"], c["r"]) for c in field.calls)
    u = torch.linspace(1, 0, n + 1, dtype=torch.float64)
    sigmas = 5 * u / (1 + 4 * u)
    x = noise
    for s, following in itertools.pairwise(sigmas.tolist()):
        growth = (s - (1 - s) * 0.25) / ((1 - s) ** 2 * 0.25 + s**2)
        x = x + (following - s) * (growth * (x - (1 - s) * field.mean) - field.mean)
    torch.testing.assert_close(out, x, rtol=1e-5, atol=1e-5)


def test_euler_converges_where_the_flow_map_is_exact(field, noise, scheduler) -> None:
    exact = field.mean + 0.5 * noise
    errors = []
    for n in (8, 16, 32, 64):
        options = {"num_inference_steps": n, "use_mean_velocity": False}
        errors.append((sample(field, scheduler, noise, TEXT, **options) - exact).norm().item())
    ratios = [a / b for a, b in itertools.pairwise(errors)]
    assert errors[-1] > 1e-3 and all(1.5 < r < 3 for r in ratios)


# Guidance -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [3.0, 0.5])
def test_guidance_equals_two_passes(guidance, model, scheduler, embeds, generator) -> None:
    prompt, negative = embeds
    x = noise = torch.randn(B, F, C, H, W, generator=generator)
    out = sample(
        model, scheduler, noise, prompt, guidance_scale=guidance, negative_prompt_embeds=negative
    )
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            t, r = (v.float().expand(B) for v in (t, scheduler.sigmas[i + 1] * 1000))
            u, u_neg = (model(x, t, r, e).sample for e in (prompt, negative))
            x = scheduler.step(u_neg + guidance * (u - u_neg), t, x, r).prev_sample
    torch.testing.assert_close(out, x, rtol=1e-4, atol=1e-5)
    plain = sample(model, scheduler, noise, prompt)
    assert (out - plain).abs().max() > 1e-2


def test_guidance_keeps_fp64(field, noise, scheduler) -> None:
    """Guide with equal embeddings: the precision of the latents stays."""
    out = sample(field, scheduler, noise, TEXT, guidance_scale=3.0, negative_prompt_embeds=TEXT)
    torch.testing.assert_close(out, sample(field, scheduler, noise, TEXT), rtol=1e-13, atol=1e-13)


def test_negative_embeds_without_guidance_change_nothing(
    field, noise, scheduler, model, embeds
) -> None:
    """Return a batch of 1 for a batch of 1, where diffusers returns 2."""
    out = sample(field, scheduler, noise[:1], TEXT[:1], negative_prompt_embeds=TEXT[:1] + 9)
    assert out.shape[0] == 1 and all(c["x"].shape[0] == 1 for c in field.calls)
    torch.testing.assert_close(out, sample(field, scheduler, noise[:1], TEXT[:1]))
    prompt, negative = embeds
    with_negative = sample(model, scheduler, noise.float(), prompt, negative_prompt_embeds=negative)
    assert torch.equal(with_negative, sample(model, scheduler, noise.float(), prompt))


def test_single_embeds_are_expanded(field, noise, scheduler) -> None:
    """Expand the embeddings of one prompt, which attention would broadcast."""
    arguments = {"guidance_scale": 2.0, "num_inference_steps": 2}
    one = sample(
        field, scheduler, noise, TEXT[:1], negative_prompt_embeds=TEXT[:1] + 1, **arguments
    )
    assert all(c["text"].shape == (2 * B, 5, 8) for c in field.calls)
    assert all(c["text"][:B].eq(1).all() and c["text"][B:].eq(0).all() for c in field.calls)
    assert torch.equal(
        one, sample(field, scheduler, noise, TEXT, negative_prompt_embeds=TEXT + 1, **arguments)
    )


# First frames -------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, B])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_first_frames_are_kept_and_seen_at_time_zero(
    guidance, n, batch, field, noise, scheduler, generator
) -> None:
    first_frames = torch.randn(batch, 2, C, H, W, generator=generator, dtype=torch.float64)
    copies = [t.clone() for t in (noise, first_frames, TEXT)]
    out = sample(
        field, scheduler, noise, TEXT,
        num_inference_steps=n, guidance_scale=guidance, negative_prompt_embeds=TEXT,
        context_latents=first_frames,
    )  # fmt: skip
    assert torch.equal(out[:, :2], first_frames.expand(B, -1, -1, -1, -1))
    torch.testing.assert_close(out[:, 2], (field.mean + 0.5 * noise)[:, 2], rtol=1e-6, atol=1e-6)
    for call in field.calls:
        assert call["t"].shape == (len(call["x"]), F)
        assert not call["t"][:, :2].any() and (call["t"][:, 2] > 0).all()
        assert torch.equal(call["x"][:B, :2], out[:, :2])
    assert all(torch.equal(a, b) for a, b in zip((noise, first_frames, TEXT), copies, strict=True))


def test_first_frames_through_the_real_model(model, scheduler, embeds, generator) -> None:
    x = noise = torch.randn(B, F, C, H, W, generator=generator)
    first_frames = torch.randn(B, 1, C, H, W, generator=generator)
    given = (model, scheduler, noise, embeds[0])
    out = sample(*given, num_inference_steps=2, context_latents=first_frames)
    with torch.no_grad():
        for t, r in ((1000.0, 5000 / 6), (5000 / 6, 0.0)):
            times, targets = torch.full((B, F), t), torch.full((B, F), r)
            times[:, 0] = 0
            x = torch.cat([first_frames, x[:, 1:]], 1)
            x = x - (t - r) / 1000 * model(x, times, targets, embeds[0]).sample
    assert torch.equal(out[:, :1], first_frames)
    torch.testing.assert_close(out[:, 1:], x[:, 1:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out[:, 1:], sample(*given, num_inference_steps=2)[:, 1:])


def test_first_frames_survive_a_callback(field, noise, scheduler) -> None:
    first_frames = torch.ones(1, 1, C, H, W, dtype=torch.float64)
    options = {"context_latents": first_frames, "callback": lambda i, t, x: torch.zeros_like(x)}
    out = sample(field, scheduler, noise, TEXT, **options)
    assert (out[:, 0] == 1).all() and (out[:, 1:] == 0).all()


# Callback -----------------------------------------------------------------------------------------


def test_callback_sees_every_step_and_may_replace(field, noise, scheduler) -> None:
    seen: list[tuple[int, float, Tensor]] = []

    def watch(index: int, timestep: float, latents: Tensor) -> None:
        seen.append((index, timestep, latents.clone()))

    out = sample(field, scheduler, noise, TEXT, num_inference_steps=4, callback=watch)
    assert [(i, t) for i, t, _ in seen] == [
        (i, pytest.approx(t)) for i, t in enumerate((1000.0, 937.5, 2500 / 3, 625.0))
    ]
    assert torch.equal(seen[-1][2], out) and torch.equal(out, sample(field, scheduler, noise, TEXT))

    def restart(index: int, timestep: float, latents: Tensor) -> Tensor | None:
        return torch.full_like(latents, 7.0) if index == 1 else None

    field.calls.clear()
    changed = sample(field, scheduler, noise, TEXT, num_inference_steps=4, callback=restart)
    assert (field.calls[2]["x"] == 7).all() and not (field.calls[1]["x"] == 7).any()
    assert not torch.allclose(changed, out)


# Purity -------------------------------------------------------------------------------------------


class Wrapped(nn.Module):
    """Have a model's call and nothing else: no config."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, **arguments: Any) -> Any:
        return self.inner(**arguments)


@pytest.mark.parametrize("mean", [True, False])
def test_a_module_with_the_models_call_gives_the_same(
    mean, model, scheduler, embeds, generator
) -> None:
    noise = torch.randn(B, F, C, H, W, generator=generator)
    arguments = (scheduler, noise, embeds[0])
    options = {"guidance_scale": 3.0, "negative_prompt_embeds": embeds[1]}
    expected = sample(model, *arguments, use_mean_velocity=mean, **options)
    out = sample(Wrapped(model), *arguments, use_mean_velocity=mean, **options)
    assert torch.equal(out, expected)


def test_plain_wan_model_is_sampled_with_euler(scheduler, embeds, generator) -> None:
    plain = AnyFlowTransformer3DModel(**TINY, r_embedder=False)
    x = noise = torch.randn(B, F, C, H, W, generator=generator)
    with pytest.raises(ValueError, match="use_mean_velocity=False"):
        sample(plain, scheduler, noise, embeds[0])
    out = sample(plain, scheduler, noise, embeds[0], timesteps=[1000, 500], use_mean_velocity=False)
    with torch.no_grad():
        for t in (1000.0, 500.0):
            x = x - 0.5 * plain(x, torch.full((B,), t), None, embeds[0]).sample
    torch.testing.assert_close(out, x, rtol=1e-4, atol=1e-5)


def test_nothing_global_is_touched(model, scheduler, embeds, generator) -> None:
    noise = torch.randn(B, F, C, H, W, generator=generator)
    before = torch.get_rng_state(), noise.clone(), embeds[0].clone(), scheduler.timesteps.clone()
    out = sample(model, scheduler, noise, embeds[0])
    sample_consistency(model, scheduler, noise, embeds[0], generator=generator)
    sample_consistency(model, scheduler, noise, embeds[0])
    after = torch.get_rng_state(), noise, embeds[0], scheduler.timesteps
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert scheduler.num_inference_steps == 1000 and scheduler.step_index is None
    assert not out.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_latents_keep_the_dtype_of_the_noise(dtype, field, noise, scheduler) -> None:
    """Step in fp32 at least: 50 rounded steps in bf16 would be off by several percent."""
    start = noise.to(dtype)
    out = sample(field, scheduler, start, TEXT, num_inference_steps=50)
    assert out.dtype == dtype and all(c["x"].dtype == dtype for c in field.calls)
    exact = field.mean + 0.5 * start.double()
    assert (out.double() - exact).norm() / exact.norm() < {torch.bfloat16: 0.01}.get(dtype, 1e-5)


# Consistency sampling -----------------------------------------------------------------------------


def test_consistency_in_one_step_is_the_flow_map(model, scheduler, embeds, generator) -> None:
    noise = torch.randn(B, F, C, H, W, generator=generator)
    one = sample(model, scheduler, noise, embeds[0], num_inference_steps=1)
    state = generator.get_state()
    consistency = sample_consistency(
        model, scheduler, noise, embeds[0], num_inference_steps=1, generator=generator
    )
    torch.testing.assert_close(consistency, one)
    assert torch.equal(generator.get_state(), state)  # nothing is added after the last jump


def test_consistency_jumps_to_zero_and_renoises(field, noise, scheduler) -> None:
    g = torch.Generator().manual_seed(3)
    out = sample_consistency(field, scheduler, noise, TEXT, timesteps=[1000, 600, 250], generator=g)
    assert [c["t"][0].item() for c in field.calls] == [1000, 600, 250] and all(
        not c["r"].any() for c in field.calls
    )
    g.manual_seed(3)
    x, zero = noise, torch.zeros(1, 1, 1, 1, 1, dtype=torch.float64)
    for t, following in ((1.0, 0.6), (0.6, 0.25), (0.25, 0.0)):
        x = field.at(x, zero + t, zero, field.mean)
        if following:
            x = (1 - following) * x + following * torch.randn(
                noise.shape, generator=g, dtype=torch.float64
            )
    torch.testing.assert_close(out, x, rtol=1e-6, atol=1e-6)
