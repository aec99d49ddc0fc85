"""Distribution matching: the gradient and its precision, both losses, the drawn choices and the
re-noising rollout.
"""

import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anyflow.methods import DMD2Config, DMD2Method, OnPolicyConfig, dmd_gradient
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

N = 1000
SHAPE = (4, 2, 3, 4, 4)
Factory = Callable[..., Any]


def _normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=dtype)


def _method(
    student: Any, teacher: Any, critic: Any, shift: float = 5.0, **config: Any
) -> DMD2Method:
    scheduler = FlowMapEulerDiscreteScheduler(num_train_timesteps=N, shift=shift)
    return DMD2Method(student, teacher, critic, scheduler, DMD2Config(**config))


@pytest.fixture
def networks(gaussian: Factory) -> list[Any]:
    """Student, teacher and critic with three different data distributions."""
    made = [gaussian(N) for _ in range(3)]
    with torch.no_grad():
        made[1].mean.add_(0.5)
        made[2].scale.mul_(1.5)
    return made


@pytest.fixture
def prompt(generator: torch.Generator) -> Tensor:
    return 0.3 * _normal(generator, SHAPE[0], 2, 3)


@pytest.fixture
def negative(generator: torch.Generator) -> Tensor:
    return 0.3 * _normal(generator, 1, 2, 3)


# The gradient -------------------------------------------------------------------------------------


def _x0_space_gradient(
    samples: Tensor, noise: Tensor, sigma: Tensor, real: Tensor, fake: Tensor
) -> Tensor:
    """``(x0_fake - x0_real) / mean |x - x0_real|`` with both x0 predicted from the noised
    samples.
    """
    sigma = sigma.reshape(-1, 1, 1, 1, 1)
    x_t = (1 - sigma) * samples + sigma * noise
    x0_real, x0_fake = x_t - sigma * real, x_t - sigma * fake
    return (x0_fake - x0_real) / (samples - x0_real).abs().mean((1, 2, 3, 4), keepdim=True)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), sigma=st.floats(0.02, 0.98))
def test_gradient_is_the_difference_of_predicted_data(seed: int, sigma: float) -> None:
    g = torch.Generator().manual_seed(seed)
    samples, noise, real, fake = (_normal(g, *SHAPE) for _ in range(4))
    sigmas = torch.full(SHAPE[:1], sigma, dtype=torch.float64)
    got = dmd_gradient(samples, noise, sigmas, real, fake)
    torch.testing.assert_close(
        got, _x0_space_gradient(samples, noise, sigmas, real, fake), rtol=1e-3, atol=0
    )
    distance = (sigma * (real - (noise - samples))).abs().mean((1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(got, sigma * (real - fake) / (distance + 1e-6), rtol=1e-9, atol=0)


def test_gradient_of_bf16_velocities_does_not_cancel(generator: torch.Generator) -> None:
    """Differencing bf16 data predictions loses 10 % and more where the two scores nearly agree."""
    samples, noise = (_normal(generator, *SHAPE, dtype=torch.bfloat16) for _ in range(2))
    sigma = torch.full(SHAPE[:1], 0.3, dtype=torch.bfloat16)
    real = (noise.double() - samples.double() + 0.3 * _normal(generator, *SHAPE)).bfloat16()
    fake = (real.double() + 0.05 * _normal(generator, *SHAPE)).bfloat16()
    exact = _x0_space_gradient(*(x.double() for x in (samples, noise, sigma, real, fake)))

    ours = dmd_gradient(samples.float(), noise.float(), sigma.float(), real, fake).double()
    naive = _x0_space_gradient(samples, noise, sigma, real, fake).double()
    error = [((x - exact).norm() / exact.norm()).item() for x in (ours, naive)]
    assert error[0] < 1e-4 and error[1] > 0.1


def test_gradient_is_finite_where_the_teacher_agrees_with_the_sample(
    generator: torch.Generator,
) -> None:
    samples, noise = _normal(generator, *SHAPE), _normal(generator, *SHAPE)
    sigma = torch.tensor([0.02, 0.5, 0.9, 0.98], dtype=torch.float64)
    real = noise - samples
    assert not dmd_gradient(samples, noise, sigma, real, real).any()
    assert dmd_gradient(samples, noise, sigma, real, real + 0.1).isfinite().all()


# Generator loss -----------------------------------------------------------------------------------


def test_generator_loss_is_the_formula(
    networks: list[Any], prompt: Tensor, negative: Tensor
) -> None:
    student, teacher, critic = networks
    method = _method(*networks, real_guidance_scale=2.5)
    g = torch.Generator().manual_seed(3)
    samples, noise = _normal(g, *SHAPE).requires_grad_(), _normal(g, *SHAPE)
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
    """Descent on the samples takes their mean from the critic's distribution towards the
    teacher's.
    """
    _, teacher, critic = networks
    with torch.no_grad():
        critic.scale.copy_(teacher.scale)
    method = _method(*networks, real_guidance_scale=0.0)
    samples = critic.clean(
        _normal(torch.Generator().manual_seed(0), 64, *SHAPE[1:]), prompt[:1]
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
    method = _method(*networks, real_guidance_scale=scale)
    samples = _normal(generator, *SHAPE)
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
    """The setting is honored by teacher and critic, in both losses; a peer has it and never reads
    it.
    """
    calls = [record(network) for network in networks]
    method = _method(*networks, dmd_score_r=score_r)
    samples = _normal(generator, *SHAPE)
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
    """A plain Wan model is the score at r = t; it cannot be asked for another r."""
    student, critic, plain = (
        tiny_transformer(),
        tiny_transformer(),
        tiny_transformer(r_embedder=False),
    )
    calls = record(plain)
    samples = _normal(generator, *SHAPE, dtype=torch.float32)
    text = _normal(generator, SHAPE[0], 5, 8, dtype=torch.float32)
    output = _method(student, plain, critic).generator_loss(
        samples, text, text, generator=generator
    )
    assert output.loss.isfinite() and calls[0].r_timestep is None
    for networks, name in (
        ((student, plain, critic), "teacher"),
        ((student, critic, plain), "critic"),
    ):
        with pytest.raises(ValueError, match=f"needs a {name} with a second timestep branch"):
            _method(*networks, dmd_score_r="zero")


def test_timesteps_are_shifted_then_clamped(
    networks: list[Any], prompt: Tensor, record: Factory, generator: torch.Generator
) -> None:
    calls = record(networks[2])
    method = _method(*networks, real_guidance_scale=0.0, min_timestep=100.0, max_timestep=900.0)
    samples = _normal(generator, *SHAPE)
    t = torch.tensor([0.0, 0.1, 0.5, 1.0])
    want = torch.tensor([100.0, 500 / 1.4, 2500 / 3, 900.0])
    method.generator_loss(samples, prompt, t=t, generator=generator)
    method.critic_loss(samples, prompt, t=t, generator=generator)
    assert len(calls) == 2
    for call in calls:
        torch.testing.assert_close(call.timestep, want)


# Critic loss --------------------------------------------------------------------------------------


def test_critic_loss_is_flow_matching_on_detached_samples(
    networks: list[Any], prompt: Tensor
) -> None:
    student, teacher, critic = networks
    method = _method(*networks)
    g = torch.Generator().manual_seed(0)
    x, noise, t = (
        _normal(g, *SHAPE).requires_grad_(),
        _normal(g, *SHAPE),
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
    """Uniform for the generator, logit-normal(0, 1) for the critic, both before the shift."""
    network = gaussian(N)
    calls = record(network)
    method = _method(
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


# Draws and rollout --------------------------------------------------------------------------------


def test_draw_steps(networks: list[Any]) -> None:
    steps = (1, 2, 4, 8)
    method = _method(*networks, num_steps=steps)
    before = torch.get_rng_state()
    g = torch.Generator().manual_seed(0)
    draws = [method.draw_rollout(g) for _ in range(2000)]
    again = torch.Generator().manual_seed(0)
    assert draws[:20] == [method.draw_rollout(again) for _ in range(20)]
    method.draw_rollout()
    assert torch.equal(torch.get_rng_state(), before)
    counts = Counter(n for n, _ in draws)
    assert set(counts) == set(steps)
    assert all(430 <= counts[n] <= 570 for n in steps)  # 500 expected, standard deviation 19
    for n in steps:
        chosen = Counter(g for m, g in draws if m == n)
        assert set(chosen) == set(range(n))
        assert min(chosen.values()) > 0.5 * counts[n] / n


def test_pinned_timesteps_are_used_verbatim(
    networks: list[Any], prompt: Tensor, record: Factory, generator: torch.Generator
) -> None:
    calls = record(networks[0])
    pinned = (999.0, 937.0, 833.0, 624.0)
    method = _method(*networks, timesteps=pinned)
    assert torch.equal(method.schedule(), torch.tensor([*pinned, 0.0], dtype=torch.float64) / N)
    assert all(method.draw_rollout(generator)[0] == 4 for _ in range(5))
    method.rollout(
        _normal(generator, *SHAPE), prompt, num_steps=4, grad_step=3, generator=generator
    )
    assert [call.timestep.tolist() for call in calls] == [[t] * 4 for t in pinned]
    with pytest.raises(ValueError, match="num_steps=8, but the pinned timesteps have 4 steps"):
        method.rollout(_normal(generator, *SHAPE), prompt, num_steps=8)
    with pytest.raises(ValueError, match="descending"):
        _method(*networks, timesteps=(500.0, 900.0))
    with pytest.raises(ValueError, match=r"in \[0, 1000\]"):
        _method(*networks, timesteps=(1500.0, 900.0))


@pytest.mark.parametrize("grad_step", [0, 2])
def test_rollout_renoises_between_jumps(
    grad_step: int, networks: list[Any], prompt: Tensor, record: Factory, generator: torch.Generator
) -> None:
    student = networks[0]
    calls = record(student)
    method = _method(*networks)
    noise = _normal(generator, *SHAPE)
    kept = noise.clone()
    g = torch.Generator().manual_seed(9)
    x = method.rollout(noise, prompt, num_steps=4, grad_step=grad_step, generator=g)
    assert torch.equal(noise, kept)

    sigmas = method.schedule(4).tolist()
    assert [call.grad for call in calls] == [False] * grad_step + [True]
    for call, sigma in zip(calls, sigmas, strict=False):
        torch.testing.assert_close(call.timestep, torch.full((4,), sigma * N))
        assert not call.r_timestep.any()
    same = torch.Generator().manual_seed(9)
    for (call, following), sigma in zip(pairwise(calls), pairwise(sigmas), strict=False):
        clean = call.x - sigma[0] * call.output
        want = (1 - sigma[1]) * clean + sigma[1] * _normal(same, *SHAPE)
        torch.testing.assert_close(following.x, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.detach(), calls[-1].x - sigmas[grad_step] * calls[-1].output)
    if grad_step == 0:
        torch.testing.assert_close(
            x.detach(), student.clean(noise, prompt), rtol=1e-6, atol=1e-6
        )  # the network is exact
    x.sum().backward()
    assert student.mean.grad is not None


# Configuration and inputs -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DMD2Config, OnPolicyConfig])
@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"real_guidance_scale": -1.0}, "real_guidance_scale"),
        ({"real_guidance_scale": float("nan")}, "real_guidance_scale"),
        ({"min_timestep": 500.0, "max_timestep": 100.0}, "min_timestep"),
        ({"min_timestep": -1.0}, "min_timestep"),
        ({"max_timestep": float("nan")}, "max_timestep"),
        ({"num_steps": ()}, "num_steps"),
        ({"num_steps": (4, 0)}, "num_steps"),
        ({"dmd_score_r": "none"}, "dmd_score_r"),
    ],
)
def test_impossible_settings(
    kind: type[DMD2Config], settings_: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings_)


def test_clamp_must_fit_the_scheduler(networks: list[Any]) -> None:
    scheduler = FlowMapEulerDiscreteScheduler(num_train_timesteps=100)
    with pytest.raises(
        ValueError, match=r"max_timestep must be at most num_train_timesteps=100, got 980"
    ):
        DMD2Method(*networks, scheduler, DMD2Config())


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
        "samples": _normal(generator, *SHAPE),
        "noise": _normal(generator, *SHAPE),
        "t": torch.tensor([0.1, 0.4, 0.7, 0.9]),
        "prompt": prompt,
    }
    inputs.update({name: edit(inputs[name]) for name, edit in change.items()})
    text = (inputs["prompt"], negative) if loss == "generator_loss" else (inputs["prompt"],)
    t = None if "samples" in change else inputs["t"]
    with pytest.raises(ValueError, match=message):
        getattr(_method(*networks), loss)(inputs["samples"], *text, t=t, noise=inputs["noise"])


def test_bad_rollout_inputs_are_named(
    networks: list[Any], prompt: Tensor, generator: torch.Generator
) -> None:
    method, noise = _method(*networks), _normal(generator, *SHAPE)
    for arguments, message in (
        ({"noise": noise[0]}, "noise must be"),
        ({"noise": noise * float("nan")}, "noise holds NaN"),
        ({"num_steps": 0}, "num_inference_steps must be a whole number from 1"),
        ({"grad_step": 4}, r"grad_step must be in \[0, 3\]"),
        ({"grad_step": -1}, r"grad_step must be in \[0, 3\]"),
        ({"prompt_embeds": prompt[:3]}, "prompt_embeds must be"),
    ):
        with pytest.raises(ValueError, match=message):
            method.rollout(**{"noise": noise, "prompt_embeds": prompt, "num_steps": 4, **arguments})


def test_the_generator_decides_and_the_global_one_is_left_alone(
    networks: list[Any], prompt: Tensor, negative: Tensor, generator: torch.Generator
) -> None:
    method, noise = _method(*networks), _normal(generator, *SHAPE)

    def results(seed: int | None) -> tuple[float, ...]:
        g = None if seed is None else torch.Generator().manual_seed(seed)
        samples = method.rollout(noise, prompt, num_steps=4, grad_step=3, generator=g)
        generator_loss = method.generator_loss(samples, prompt, negative, generator=g).loss
        return (
            samples.sum().item(),
            generator_loss.item(),
            method.critic_loss(samples, prompt, generator=g).loss.item(),
        )

    before = torch.get_rng_state()
    first, again, other, fresh = results(1), results(1), results(2), results(None)
    assert torch.equal(torch.get_rng_state(), before)
    assert first == again
    for i in range(3):
        assert len({first[i], other[i], fresh[i]}) == 3


def test_plain_student_is_refused_at_construction() -> None:
    plain = AnyFlowTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        r_embedder=False,
    )
    with pytest.raises(ValueError, match="student has no second timestep branch"):
        DMD2Method(plain, plain, plain, FlowMapEulerDiscreteScheduler(), DMD2Config())


@pytest.mark.parametrize("loss", ["generator_loss", "critic_loss"])
def test_samples_that_are_not_finite_are_the_students(
    loss: str, networks: list[Any], prompt: Tensor, negative: Tensor, generator: torch.Generator
) -> None:
    """They come from a network, not from data, and a device could not be asked: the first norm
    tells who failed.
    """
    method = DMD2Method(*networks, FlowMapEulerDiscreteScheduler(), DMD2Config())
    samples = _normal(generator, *SHAPE) * float("nan")
    text = (prompt, negative) if loss == "generator_loss" else (prompt,)
    output = getattr(method, loss)(samples, *text, generator=generator)
    assert (
        next(name for name, norm in output.norms.items() if not norm.isfinite())
        == "rollout of the student"
    )
