"""Test distribution matching: the gradient and its precision, and both losses."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import N, dmd2_method, normal
from torch import Tensor

from anyflow.methods import DMD2Config, DMD2Method, OnPolicyConfig, dmd_gradient
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

Factory = Callable[..., Any]
SHAPE = (4, 2, 3, 4, 4)


def _x0_space_gradient(
    samples: Tensor, noise: Tensor, sigma: Tensor, real: Tensor, fake: Tensor
) -> Tensor:
    """Return ``(x0_fake - x0_real) / mean |x - x0_real|``, both x0 predicted from noisy samples."""
    sigma = sigma.reshape(-1, 1, 1, 1, 1)
    x_t = (1 - sigma) * samples + sigma * noise
    x0_real, x0_fake = x_t - sigma * real, x_t - sigma * fake
    return (x0_fake - x0_real) / (samples - x0_real).abs().mean((1, 2, 3, 4), keepdim=True)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), sigma=st.floats(0.02, 0.98))
def test_gradient_is_the_difference_of_predicted_data(seed: int, sigma: float) -> None:
    g = torch.Generator().manual_seed(seed)
    samples, noise, real, fake = (normal(g, *SHAPE) for _ in range(4))
    sigmas = torch.full(SHAPE[:1], sigma, dtype=torch.float64)
    got = dmd_gradient(samples, noise, sigmas, real, fake)
    torch.testing.assert_close(
        got, _x0_space_gradient(samples, noise, sigmas, real, fake), rtol=1e-3, atol=0
    )
    distance = (sigma * (real - (noise - samples))).abs().mean((1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(got, sigma * (real - fake) / (distance + 1e-6), rtol=1e-9, atol=0)


def test_gradient_of_bf16_velocities_does_not_cancel(generator: torch.Generator) -> None:
    """Compare with differences of bf16 predictions, which lose 10 % where scores nearly agree."""
    samples, noise = (normal(generator, *SHAPE, dtype=torch.bfloat16) for _ in range(2))
    sigma = torch.full(SHAPE[:1], 0.3, dtype=torch.bfloat16)
    real = (noise.double() - samples.double() + 0.3 * normal(generator, *SHAPE)).bfloat16()
    fake = (real.double() + 0.05 * normal(generator, *SHAPE)).bfloat16()
    exact = _x0_space_gradient(*(x.double() for x in (samples, noise, sigma, real, fake)))

    ours = dmd_gradient(samples.float(), noise.float(), sigma.float(), real, fake).double()
    naive = _x0_space_gradient(samples, noise, sigma, real, fake).double()
    error = [((x - exact).norm() / exact.norm()).item() for x in (ours, naive)]
    assert error[0] < 1e-4 and error[1] > 0.1


def test_gradient_is_finite_where_the_teacher_agrees_with_the_sample(
    generator: torch.Generator,
) -> None:
    samples, noise = normal(generator, *SHAPE), normal(generator, *SHAPE)
    sigma = torch.tensor([0.02, 0.5, 0.9, 0.98], dtype=torch.float64)
    real = noise - samples
    assert not dmd_gradient(samples, noise, sigma, real, real).any()
    assert dmd_gradient(samples, noise, sigma, real, real + 0.1).isfinite().all()


def test_generator_loss_is_the_formula(
    networks: list[Any], prompt: Tensor, negative: Tensor
) -> None:
    student, teacher, critic = networks
    method = dmd2_method(*networks, real_guidance_scale=2.5)
    g = torch.Generator().manual_seed(3)
    samples, noise = normal(g, *SHAPE).requires_grad_(), normal(g, *SHAPE)
    t = torch.tensor([0.1, 0.4, 0.7, 0.9])
    output = method.generator_loss(samples, prompt, negative, t=t, noise=noise)

    x0 = samples.detach()
    sigma = method.scheduler.apply_shift(t.double())
    lead = sigma.reshape(-1, 1, 1, 1, 1)
    x = (1 - lead) * x0 + lead * noise
    cond, uncond = (
        teacher.average(x, lead, lead, text).detach() for text in (prompt, negative.repeat(4, 1, 1))
    )
    x0_cond, x0_uncond = x - lead * cond, x - lead * uncond
    x0_real = x0_cond + 2.5 * (x0_cond - x0_uncond)
    x0_fake = x - lead * critic.average(x, lead, lead, prompt).detach()
    gradient = (x0_fake - x0_real) / (x0 - x0_real).abs().mean((1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(output.loss.detach(), gradient.square().mean(), rtol=1e-5, atol=0)

    output.loss.backward()
    assert samples.grad is not None
    torch.testing.assert_close(samples.grad, 2 * gradient / samples.numel(), rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for network in networks for p in network.parameters())
    assert output.metrics and not any(value.requires_grad for value in output.metrics.values())


def test_generator_loss_moves_samples_to_the_teacher(
    networks: list[Any], prompt: Tensor, negative: Tensor
) -> None:
    """Descend on samples: their mean moves from the critic's distribution to the teacher's."""
    _, teacher, critic = networks
    with torch.no_grad():
        critic.scale.copy_(teacher.scale)
    method = dmd2_method(*networks, real_guidance_scale=0.0)
    samples = critic.clean(
        normal(torch.Generator().manual_seed(0), 64, *SHAPE[1:]), prompt[:1]
    ).requires_grad_()
    text = prompt[:1]
    output = method.generator_loss(samples, text, None, generator=torch.Generator().manual_seed(1))
    output.loss.backward()
    assert samples.grad is not None
    direction = -samples.grad.mean((0, 1, 3, 4))
    difference = (teacher.mean - critic.mean).detach()
    assert torch.equal(direction.sign(), difference.sign())


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_unconditional_score_runs_only_with_guidance(
    scale: float,
    networks: list[Any],
    prompt: Tensor,
    negative: Tensor,
    record: Factory,
    generator: torch.Generator,
) -> None:
    student, teacher, critic = (record(network) for network in networks)
    method = dmd2_method(*networks, real_guidance_scale=scale)
    samples = normal(generator, *SHAPE)
    method.generator_loss(samples, prompt, negative if scale else None, generator=generator)
    assert [len(calls) for calls in (student, teacher, critic)] == [0, 1, 1]
    assert len(critic[0].x) == 4 and not critic[0].grad and not teacher[0].grad
    if scale == 0:
        assert torch.equal(teacher[0].text, prompt)
        assert torch.equal(teacher[0].x, critic[0].x)
    else:
        assert torch.equal(teacher[0].text, torch.cat([prompt, negative.repeat(4, 1, 1)]))
        with pytest.raises(
            ValueError, match="real_guidance_scale=3.0 needs negative_prompt_embeds"
        ):
            method.generator_loss(samples, prompt, generator=generator)


@pytest.mark.parametrize("score_r", ["t", "zero"])
def test_second_timestep_of_the_scores(
    score_r: str,
    networks: list[Any],
    prompt: Tensor,
    negative: Tensor,
    record: Factory,
    generator: torch.Generator,
) -> None:
    """Honor the setting in teacher and critic, in both losses; a peer has it and never reads it."""
    calls = [record(network) for network in networks]
    method = dmd2_method(*networks, dmd_score_r=score_r)
    samples = normal(generator, *SHAPE)
    method.generator_loss(samples, prompt, negative, generator=generator)
    method.critic_loss(samples, prompt, generator=generator)
    scores = calls[1] + calls[2]
    assert len(scores) == 3
    for call in scores:
        assert torch.equal(
            call.r_timestep, call.timestep if score_r == "t" else torch.zeros_like(call.timestep)
        )
        assert bool((call.timestep > 0).all())


def test_default_score_is_at_r_equal_t() -> None:
    assert DMD2Config().dmd_score_r == "t" and OnPolicyConfig().dmd_score_r == "t"


def test_a_plain_model_as_score(
    tiny_transformer: Factory, record: Factory, generator: torch.Generator
) -> None:
    """Take a plain Wan model as the score at r = t; refuse it where another r is asked for."""
    student, critic, plain = (
        tiny_transformer(),
        tiny_transformer(),
        tiny_transformer(r_embedder=False),
    )
    calls = record(plain)
    samples = normal(generator, *SHAPE, dtype=torch.float32)
    text = normal(generator, SHAPE[0], 5, 8, dtype=torch.float32)
    output = dmd2_method(student, plain, critic).generator_loss(
        samples, text, text, generator=generator
    )
    assert output.loss.isfinite() and calls[0].r_timestep is None
    for networks, name in (
        ((student, plain, critic), "teacher"),
        ((student, critic, plain), "critic"),
    ):
        with pytest.raises(ValueError, match=f"needs a {name} with a second timestep branch"):
            dmd2_method(*networks, dmd_score_r="zero")


def test_timesteps_are_shifted_then_clamped(
    networks: list[Any], prompt: Tensor, record: Factory, generator: torch.Generator
) -> None:
    calls = record(networks[2])
    method = dmd2_method(*networks, real_guidance_scale=0.0, min_timestep=100.0, max_timestep=900.0)
    samples = normal(generator, *SHAPE)
    t = torch.tensor([0.0, 0.1, 0.5, 1.0])
    want = torch.tensor([100.0, 500 / 1.4, 2500 / 3, 900.0])
    method.generator_loss(samples, prompt, t=t, generator=generator)
    method.critic_loss(samples, prompt, t=t, generator=generator)
    assert len(calls) == 2
    for call in calls:
        torch.testing.assert_close(call.timestep, want)


def test_critic_loss_is_flow_matching_on_detached_samples(
    networks: list[Any], prompt: Tensor
) -> None:
    student, teacher, critic = networks
    method = dmd2_method(*networks)
    g = torch.Generator().manual_seed(0)
    x, noise, t = (
        normal(g, *SHAPE).requires_grad_(),
        normal(g, *SHAPE),
        torch.tensor([0.1, 0.4, 0.7, 0.9]),
    )
    samples = x + 0 * student.mean.sum()
    output = method.critic_loss(samples, prompt, t=t, noise=noise)
    lead = method.scheduler.apply_shift(t.double()).reshape(-1, 1, 1, 1, 1)
    x0 = samples.detach()
    v = critic.average((1 - lead) * x0 + lead * noise, lead, lead, prompt)
    torch.testing.assert_close(output.loss, (v - (noise - x0)).square().mean(), rtol=1e-5, atol=0)
    output.loss.backward()
    assert x.grad is None and student.mean.grad is None and teacher.mean.grad is None
    assert bool(critic.mean.grad.any()) and bool(critic.scale.grad.any())


def test_distribution_of_drawn_times(
    gaussian: Factory, record: Factory, generator: torch.Generator
) -> None:
    """Draw uniform times for the generator, logit-normal(0, 1) for the critic, before the shift."""
    network = gaussian(N)
    calls = record(network)
    method = dmd2_method(
        network, network, network, real_guidance_scale=0.0, min_timestep=0.0, max_timestep=1000.0
    )
    samples = torch.zeros(20_000, 1, 3, 1, 1)
    text = torch.zeros(1, 1, 1)
    method.generator_loss(samples, text, generator=generator)
    method.critic_loss(samples, text, generator=generator)
    uniform, logit_normal = (
        method.scheduler.invert_shift(calls[i].timestep.double() / N) for i in (0, -1)
    )
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    assert uniform.std().item() == pytest.approx(math.sqrt(1 / 12), abs=0.01)
    z = logit_normal.logit()
    assert z.mean().item() == pytest.approx(0.0, abs=0.03) and z.std().item() == pytest.approx(
        1.0, abs=0.03
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": lambda x: x[0]}, "samples must be"),
        ({"samples": lambda x: x.long()}, "samples must be"),
        ({"noise": lambda x: x[:1]}, "noise .* samples"),
        ({"t": lambda t: t[:2]}, r"t must be \[B=4\]"),
        ({"t": lambda t: t + 1}, r"t must be in \[0, 1\]"),
        ({"t": lambda t: t * float("nan")}, r"t must be in \[0, 1\]"),
        ({"prompt": lambda x: x[:2]}, "prompt_embeds must be"),
    ],
)
@pytest.mark.parametrize("loss", ["generator_loss", "critic_loss"])
def test_bad_inputs_are_named(
    loss: str,
    change: dict[str, Callable[[Tensor], Tensor]],
    message: str,
    networks: list[Any],
    prompt: Tensor,
    negative: Tensor,
    generator: torch.Generator,
) -> None:
    inputs = {
        "samples": normal(generator, *SHAPE),
        "noise": normal(generator, *SHAPE),
        "t": torch.tensor([0.1, 0.4, 0.7, 0.9]),
        "prompt": prompt,
    }
    inputs.update({name: edit(inputs[name]) for name, edit in change.items()})
    text = (inputs["prompt"], negative) if loss == "generator_loss" else (inputs["prompt"],)
    t = None if "samples" in change else inputs["t"]
    with pytest.raises(ValueError, match=message):
        getattr(dmd2_method(*networks), loss)(inputs["samples"], *text, t=t, noise=inputs["noise"])


@pytest.mark.parametrize("loss", ["generator_loss", "critic_loss"])
def test_samples_that_are_not_finite_are_the_students(
    loss: str, networks: list[Any], prompt: Tensor, negative: Tensor, generator: torch.Generator
) -> None:
    """Blame the network that made the samples, by the first norm; no device is asked."""
    method = DMD2Method(*networks, FlowMapEulerDiscreteScheduler(), DMD2Config())
    samples = normal(generator, *SHAPE) * float("nan")
    text = (prompt, negative) if loss == "generator_loss" else (prompt,)
    output = getattr(method, loss)(samples, *text, generator=generator)
    assert (
        next(name for name, norm in output.norms.items() if not norm.isfinite())
        == "rollout of the student"
    )
