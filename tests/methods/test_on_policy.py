"""Test flow-map rollouts at any step count, where their gradient flows, and the student step."""

from collections.abc import Callable
from itertools import pairwise
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import N, normal
from torch import Tensor, nn

from anyflow.methods import (
    AnyFlowOnPolicyMethod,
    AnyFlowPretrainMethod,
    DMD2Method,
    OnPolicyConfig,
    PretrainConfig,
)
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

SHAPE = (3, 2, 3, 4, 4)
Factory = Callable[..., Any]


def _method(
    student: Any,
    teacher: Any = None,
    critic: Any = None,
    pretrain: PretrainConfig | None = None,
    **config: Any,
) -> AnyFlowOnPolicyMethod:
    scheduler = FlowMapEulerDiscreteScheduler(num_train_timesteps=N, shift=5.0)
    networks = [student if network is None else network for network in (teacher, critic)]
    return AnyFlowOnPolicyMethod(
        student, *networks, scheduler, OnPolicyConfig(**config), pretrain=pretrain
    )


class PerCallNetwork(nn.Module):
    """Return ``u = p_i x`` with a parameter p_i of its own at the i-th call."""

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.p = nn.ParameterList(
            [nn.Parameter(torch.tensor(0.3 + 0.1 * i).double()) for i in range(calls)]
        )
        self.inputs: list[Tensor] = []

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        self.inputs.append(hidden_states.detach())
        return (self.p[len(self.inputs) - 1] * hidden_states,)


@pytest.fixture
def prompt(generator: torch.Generator) -> Tensor:
    return 0.3 * normal(generator, SHAPE[0], 2, 3)


@settings(max_examples=40)
@given(n=st.integers(1, 50), data=st.data(), seed=st.integers(0, 10_000))
def test_rollouts_of_the_exact_flow_map_end_at_the_same_data(
    n: int, data: st.DataObject, seed: int, gaussian: Factory
) -> None:
    """End where one step ends, with any number of steps, any step with gradient, either rollout."""
    g = data.draw(st.integers(0, n - 1))
    source = torch.Generator().manual_seed(seed)
    network, noise, prompt = gaussian(N), normal(source, *SHAPE), normal(source, SHAPE[0], 2, 3)
    want = network.clean(noise, prompt)
    for rollout in ("shortcut", "euler"):
        with torch.no_grad():
            x = _method(network, rollout=rollout).rollout(noise, prompt, num_steps=n, grad_step=g)
        torch.testing.assert_close(x, want, rtol=1e-5, atol=1e-5)  # timesteps are fp32


@pytest.mark.parametrize(("n", "g"), [(1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 3), (50, 20)])
def test_segments(n: int, g: int, gaussian: Factory, record: Factory, prompt: Tensor) -> None:
    """Take at most three evaluations for a shortcut and n for Euler, at times that descend to 0."""
    noise = normal(torch.Generator().manual_seed(0), *SHAPE)
    for rollout in ("shortcut", "euler"):
        network = gaussian(N)
        calls = record(network)
        method = _method(network, rollout=rollout)
        method.rollout(noise, prompt, num_steps=n, grad_step=g)
        schedule = (method.schedule(n) * N).float().tolist()
        ends = sorted({0, g, g + 1, n}) if rollout == "shortcut" else list(range(n + 1))
        assert len(calls) == len(ends) - 1 <= (3 if rollout == "shortcut" else n)
        for call, (a, b) in zip(calls, pairwise(ends), strict=True):
            assert call.timestep.tolist() == [schedule[a]] * 3
            assert call.r_timestep.tolist() == [schedule[b]] * 3
        assert schedule[ends[-1]] == 0


def test_gradient_through_every_evaluation_of_a_shortcut(prompt: Tensor) -> None:
    network = PerCallNetwork(3)
    method = _method(network)
    noise = normal(torch.Generator().manual_seed(0), *SHAPE)
    x = method.rollout(noise, prompt, num_steps=4, grad_step=1)
    x.sum().backward()
    sigma = method.schedule(4).tolist()
    widths = [sigma[0] - sigma[1], sigma[1] - sigma[2], sigma[2]]
    factors = [1 - w * p.item() for w, p in zip(widths, network.p, strict=True)]
    for i, p in enumerate(network.p):
        others = prod(f for j, f in enumerate(factors) if j != i)
        torch.testing.assert_close(p.grad, -widths[i] * others * noise.sum(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("config", "n", "g", "index"), [
    ({"grad_through": "step"}, 4, 1, 1),
    ({"grad_through": "step"}, 4, 0, 0),
    ({"grad_through": "step"}, 4, 3, 1),
    ({"rollout": "euler"}, 4, 2, 2),
    ({"rollout": "euler"}, 4, 0, 0),
    ({"rollout": "euler", "grad_through": "step"}, 4, 3, 3),
])  # fmt: skip
def test_gradient_through_one_evaluation(
    config: dict[str, str], n: int, g: int, index: int, prompt: Tensor
) -> None:
    """Record a graph in the chosen evaluation only; later ones carry its result by the identity."""
    network = PerCallNetwork(n)
    method = _method(network, **config)
    noise = normal(torch.Generator().manual_seed(0), *SHAPE)
    method.rollout(noise, prompt, num_steps=n, grad_step=g).sum().backward()
    assert [i for i, p in enumerate(network.p) if p.grad is not None] == [index]
    sigma = method.schedule(n).tolist()
    want = -(sigma[g] - sigma[g + 1]) * network.inputs[index].sum()
    torch.testing.assert_close(network.p[index].grad, want, rtol=1e-9, atol=1e-9)


def test_euler_returns_clean_data(gaussian: Factory, prompt: Tensor) -> None:
    """Return clean data; the peers return x after the step with gradient, which is still noisy."""
    network = gaussian(N)
    noise = normal(torch.Generator().manual_seed(0), *SHAPE)
    method = _method(network, rollout="euler")
    x = method.rollout(noise, prompt, num_steps=4, grad_step=0).detach()
    sigma = method.schedule(4)[:2].reshape(2, 1, 1, 1, 1, 1)
    with torch.no_grad():
        intermediate = noise - (sigma[0] - sigma[1]) * network.average(
            noise, sigma[0], sigma[1], prompt
        )
    clean = network.clean(noise, prompt)
    torch.testing.assert_close(x, clean, rtol=1e-5, atol=1e-5)
    assert (intermediate - clean).abs().mean() > 0.1


def test_rollout_in_half_precision_returns_fp32(
    tiny_transformer: Factory, generator: torch.Generator
) -> None:
    student = tiny_transformer().bfloat16()
    noise = normal(generator, *SHAPE, dtype=torch.bfloat16)
    text = normal(generator, SHAPE[0], 5, 8, dtype=torch.bfloat16)
    x = _method(student).rollout(noise, text, num_steps=4, grad_step=1)
    assert x.dtype == torch.float32 and x.isfinite().all()
    x.sum().backward()
    assert all(p.grad is not None for p in student.parameters())


def test_drawn_gradient_step(gaussian: Factory, record: Factory, prompt: Tensor) -> None:
    network = gaussian(N)
    calls = record(network)
    method = _method(network)
    noise = normal(torch.Generator().manual_seed(0), *SHAPE)
    seen = set()
    g = torch.Generator().manual_seed(0)
    for _ in range(40):
        calls.clear()
        method.rollout(noise, prompt, num_steps=4, generator=g)
        seen.add(tuple(call.timestep[0].item() for call in calls))
    assert len(seen) == 4


def test_pinned_timesteps_are_used_verbatim(
    gaussian: Factory, record: Factory, prompt: Tensor
) -> None:
    network = gaussian(N)
    calls = record(network)
    noise = normal(torch.Generator().manual_seed(0), *SHAPE)
    for timesteps in ((999.0, 937.0, 833.0, 624.0), (999.0, 937.0, 833.0, 624.0, 0.0)):
        calls.clear()
        method = _method(network, timesteps=timesteps)
        method.rollout(noise, prompt, num_steps=4, grad_step=2)
        assert [(c.timestep[0].item(), c.r_timestep[0].item()) for c in calls] == [
            (999, 833),
            (833, 624),
            (624, 0),
        ]
        with pytest.raises(ValueError, match="num_steps=2, but the pinned timesteps have 4 steps"):
            method.rollout(noise, prompt, num_steps=2)


def test_is_a_dmd2_method_with_its_settings() -> None:
    assert issubclass(AnyFlowOnPolicyMethod, DMD2Method)
    config = OnPolicyConfig(real_guidance_scale=0.0, min_timestep=0.0)
    # an explicit zero stays zero
    assert config.real_guidance_scale == 0.0 and config.min_timestep == 0.0


# The whole step -----------------------------------------------------------------------------------


def test_student_loss_reaches_the_student_alone(gaussian: Factory, prompt: Tensor) -> None:
    student, teacher, critic = gaussian(N), gaussian(N), gaussian(N)
    with torch.no_grad():
        teacher.mean.add_(0.5)
    method = _method(student, teacher, critic, num_steps=(1, 2, 4))
    noise = normal(torch.Generator().manual_seed(0), *SHAPE)
    output = method.student_loss(
        noise, prompt, prompt[:1], generator=torch.Generator().manual_seed(0)
    )
    output.loss.backward()
    assert bool(student.mean.grad.any())
    assert teacher.mean.grad is None and critic.mean.grad is None


def test_cotraining_adds_the_pretrain_loss(gaussian: Factory, prompt: Tensor) -> None:
    student, teacher, critic = gaussian(N), gaussian(N), gaussian(N)
    with torch.no_grad():
        teacher.mean.add_(0.5)
    pretrain = PretrainConfig(epsilon=2.0, fuse_guidance_scale=2.0)
    plain = _method(student, teacher, critic, num_steps=(1, 2, 4))
    cotrained = _method(
        student, teacher, critic, num_steps=(1, 2, 4), cotrain_pretrain=True, pretrain=pretrain
    )
    source = torch.Generator().manual_seed(0)
    noise, latents, data_prompt = (
        normal(source, *SHAPE),
        normal(source, 5, *SHAPE[1:]),
        prompt[:1] * 2,
    )
    negative = prompt[:1]

    g = torch.Generator().manual_seed(1)
    # leaves g where co-training continues to draw
    dmd = plain.student_loss(noise, prompt, negative, generator=g)
    data = AnyFlowPretrainMethod(student, plain.scheduler, pretrain).loss(
        latents, data_prompt, negative, generator=g, offset=3
    )
    both = cotrained.student_loss(
        noise,
        prompt,
        negative,
        latents=latents,
        data_prompt_embeds=data_prompt,
        generator=torch.Generator().manual_seed(1),
        offset=3,
    )
    torch.testing.assert_close(both.loss, dmd.loss + data.loss)
    torch.testing.assert_close(both.metrics["loss_dmd"], dmd.loss.detach())
    torch.testing.assert_close(both.metrics["loss_data"], data.loss.detach())
    assert {*dmd.metrics, *data.metrics} <= set(both.metrics)

    for missing in ({"latents": latents}, {"data_prompt_embeds": data_prompt}, {}):
        with pytest.raises(ValueError, match="needs latents and data_prompt_embeds"):
            cotrained.student_loss(noise, prompt, negative, **missing)


def test_student_loss_is_decided_by_the_generator(gaussian: Factory, prompt: Tensor) -> None:
    student, teacher = gaussian(N), gaussian(N)
    with torch.no_grad():
        teacher.mean.add_(0.5)
    method = _method(student, teacher, student)
    noise = normal(torch.Generator().manual_seed(0), *SHAPE)
    before = torch.get_rng_state()
    losses = [
        method.student_loss(
            noise, prompt, prompt, generator=torch.Generator().manual_seed(s)
        ).loss.item()
        for s in (1, 1, 2)
    ]
    losses.append(method.student_loss(noise, prompt, prompt).loss.item())
    assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] == losses[1] and len(set(losses)) == 3


@pytest.mark.parametrize(("name", "value"), [("rollout", "all"), ("grad_through", "none")])
def test_impossible_settings(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be one of"):
        OnPolicyConfig(**{name: value})


def test_impossible_cotraining_settings_fail_at_construction(gaussian: Factory) -> None:
    with pytest.raises(ValueError, match="epsilon must be below half of .*, got 600.0"):
        _method(gaussian(N), cotrain_pretrain=True, pretrain=PretrainConfig(epsilon=600.0))
    with pytest.raises(ValueError, match="pretrain is given, but cotrain_pretrain is False"):
        _method(gaussian(N), pretrain=PretrainConfig())
