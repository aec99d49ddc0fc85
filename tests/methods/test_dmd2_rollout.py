"""Test the rollout of distribution matching, its draws, and its settings."""

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from loss_cases import N, dmd2_method, normal
from torch import Tensor

from anyflow.methods import DMD2Config, DMD2Method, OnPolicyConfig
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

Factory = Callable[..., Any]
SHAPE = (4, 2, 3, 4, 4)


def test_draw_rollout(networks: list[Any]) -> None:
    steps = (1, 2, 4, 8)
    method = dmd2_method(*networks, num_steps=steps)
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
    method = dmd2_method(*networks, timesteps=pinned)
    assert torch.equal(method.schedule(), torch.tensor([*pinned, 0.0], dtype=torch.float64) / N)
    assert all(method.draw_rollout(generator)[0] == 4 for _ in range(5))
    method.rollout(normal(generator, *SHAPE), prompt, num_steps=4, grad_step=3, generator=generator)
    assert [call.timestep.tolist() for call in calls] == [[t] * 4 for t in pinned]
    with pytest.raises(ValueError, match="num_steps=8, but the pinned timesteps have 4 steps"):
        method.rollout(normal(generator, *SHAPE), prompt, num_steps=8)
    with pytest.raises(ValueError, match="descending"):
        dmd2_method(*networks, timesteps=(500.0, 900.0))
    with pytest.raises(ValueError, match=r"in \[0, 1000\]"):
        dmd2_method(*networks, timesteps=(1500.0, 900.0))


@pytest.mark.parametrize("grad_step", [0, 2])
def test_rollout_renoises_between_jumps(
    grad_step: int, networks: list[Any], prompt: Tensor, record: Factory, generator: torch.Generator
) -> None:
    student = networks[0]
    calls = record(student)
    method = dmd2_method(*networks)
    noise = normal(generator, *SHAPE)
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
        want = (1 - sigma[1]) * clean + sigma[1] * normal(same, *SHAPE)
        torch.testing.assert_close(following.x, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.detach(), calls[-1].x - sigmas[grad_step] * calls[-1].output)
    if grad_step == 0:
        torch.testing.assert_close(
            x.detach(), student.clean(noise, prompt), rtol=1e-6, atol=1e-6
        )  # the network is exact
    x.sum().backward()
    assert student.mean.grad is not None


def test_bad_rollout_inputs_are_named(
    networks: list[Any], prompt: Tensor, generator: torch.Generator
) -> None:
    method, noise = dmd2_method(*networks), normal(generator, *SHAPE)
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
    method, noise = dmd2_method(*networks), normal(generator, *SHAPE)

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
