"""Test the target of the pretrain loss: exact flow maps, ends of time, precision, forward mode."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    KINDS,
    SHAPE,
    N,
    gradients_of,
    make_scheduler,
    no_prompt,
    normal,
    plain,
)
from torch import Tensor, nn

from anyflow.methods import AnyFlowPretrainMethod, PretrainConfig, TimePairs

Factory = Callable[..., Any]


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def _on_the_path(network: Any, t: list[float], seed: int) -> tuple[Tensor, ...]:
    """Draw (latents, noise, t, prompt) whose line has the flow's velocity at a random x."""
    times = torch.tensor(t, dtype=torch.float64)
    prompt = no_prompt(len(t))
    x = normal(torch.Generator().manual_seed(seed), len(t), *SHAPE[1:])
    latents, noise = network.data_on_path(x, times, prompt)
    return latents, noise, times, prompt


def _exact(
    network: Any, latents: Tensor, noise: Tensor, t: Tensor, r: Tensor, prompt: Tensor
) -> Tensor:
    lead = (-1, 1, 1, 1, 1)
    sigma = t.reshape(lead)
    return network.average(
        (1 - sigma) * latents + sigma * noise, sigma, r.reshape(lead), prompt
    ).detach()


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10_000),
    times=st.lists(st.tuples(st.integers(0, 64), st.integers(0, 64)), min_size=1, max_size=4),
)
def test_target_of_the_exact_flow_map_is_the_average_velocity(
    seed: int, times: list[tuple[int, int]], gaussian: Factory, regression_target: Factory
) -> None:
    """Hold the identity ``u = v - (t - r) du/dt`` for any pair of times, ends included."""
    network = gaussian(N)
    latents, noise, t, prompt = _on_the_path(network, [max(p) / 64 for p in times], seed)
    r = torch.tensor([min(p) / 64 for p in times], dtype=torch.float64)
    target, output = regression_target(
        network, make_scheduler(), plain(epsilon=0.01), latents, noise, t, r, prompt
    )
    exact = _exact(network, latents, noise, t, r, prompt)
    assert _rms(target - exact) <= 1e-4 * (1 + _rms(exact))
    assert output.loss.item() <= 1e-8


def test_central_difference_is_second_order(gaussian: Factory, regression_target: Factory) -> None:
    network = gaussian(N)
    latents, noise, t, prompt = _on_the_path(network, [0.75, 0.5], 0)
    r = torch.tensor([0.125, 0.0], dtype=torch.float64)
    exact = _exact(network, latents, noise, t, r, prompt)
    errors = []
    for epsilon in (40.0, 20.0, 10.0):
        target, _ = regression_target(
            network, make_scheduler(), plain(epsilon=epsilon), latents, noise, t, r, prompt
        )
        errors.append(_rms(target - exact))
    assert 1e-6 < errors[2] < 1e-2
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


def test_forward_mode_target_is_exact(gaussian: Factory, regression_target: Factory) -> None:
    network = gaussian(N)
    latents, noise, t, prompt = _on_the_path(network, [0.75, 0.5, 1.0], 1)
    r = torch.tensor([0.125, 0.0, 0.25], dtype=torch.float64)
    config = plain(derivative="jvp")
    target, output = regression_target(
        network, make_scheduler(), config, latents, noise, t, r, prompt
    )
    torch.testing.assert_close(
        target, _exact(network, latents, noise, t, r, prompt), rtol=1e-9, atol=1e-9
    )
    assert output.loss.item() < 1e-18


def test_r_equal_t_regresses_the_velocity(
    gaussian: Factory, regression_target: Factory, generator: torch.Generator
) -> None:
    """Regress the velocity exactly, whatever the network says at other times."""
    t = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    latents, noise = normal(generator, 4, *SHAPE[1:]), normal(generator, 4, *SHAPE[1:])
    target, _ = regression_target(
        gaussian(N), make_scheduler(), plain(), latents, noise, t, t, no_prompt(4)
    )
    torch.testing.assert_close(target, noise - latents, rtol=1e-12, atol=1e-12)


def test_zero_loss_on_a_single_data_point() -> None:
    """Have no loss on one data point, where ``u = (x - x0) / t`` for every r and kind of sample."""

    class ToPoint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.point = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def forward(self, hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
            return ((hidden_states - self.point) / (timestep.double() / N).reshape(-1, 1, 1, 1, 1),)

    network = ToPoint()
    noise = normal(torch.Generator().manual_seed(0), *SHAPE)
    output = AnyFlowPretrainMethod(network, make_scheduler("beta08", shift=5.0), plain()).loss(
        torch.full(SHAPE, 0.7, dtype=torch.float64),
        no_prompt(SHAPE[0]),
        noise=noise,
        time_pairs=KINDS,
    )
    assert output.loss.item() < 1e-20
    assert max(value.item() for value in output.metrics.values()) < 1e-12


@pytest.mark.parametrize("boundary", ["one_sided", "extrapolate"])
def test_evaluation_times_at_the_ends(
    boundary: str, gaussian: Factory, record: Factory, generator: torch.Generator
) -> None:
    network = gaussian(N)
    calls = record(network)
    t, r = torch.tensor([1.0, 0.999, 0.5, 0.002, 0.0]), torch.tensor([0.5, 0.0, 0.2, 0.001, 0.0])
    pairs = TimePairs(t, r, torch.zeros(5, dtype=torch.bool))
    config = plain(epsilon=5.0, boundary=boundary)
    output = AnyFlowPretrainMethod(network, make_scheduler(), config).loss(
        normal(generator, *SHAPE),
        no_prompt(5),
        noise=normal(generator, *SHAPE),
        time_pairs=pairs,
    )
    assert output.loss.isfinite()
    above, below = calls[0].timestep.double().chunk(2)
    want_above, want_below = t.double() * N + 5, t.double() * N - 5
    if boundary == "one_sided":
        want_above, want_below = want_above.clamp(max=N), want_below.clamp(min=0)
    torch.testing.assert_close(above, want_above, rtol=0, atol=1e-4)
    torch.testing.assert_close(below, want_below, rtol=0, atol=1e-4)
    outside = bool((above > N).any()) or bool((below < 0).any())
    assert outside == (boundary == "extrapolate")


def test_one_sided_difference_divides_by_the_width_used(
    gaussian: Factory, regression_target: Factory
) -> None:
    """Reach first order at t = 1; dividing by 2 epsilon would halve the derivative there."""
    network = gaussian(N)
    latents, noise, t, prompt = _on_the_path(network, [1.0, 1.0], 3)
    r = torch.tensor([0.5, 0.0], dtype=torch.float64)
    exact = _exact(network, latents, noise, t, r, prompt)
    velocity = noise - latents
    errors = []
    for epsilon in (8.0, 4.0):
        target, _ = regression_target(
            network, make_scheduler(), plain(epsilon=epsilon), latents, noise, t, r, prompt
        )
        errors.append(_rms(target - exact))
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] < 0.02 * _rms(exact - velocity)


def test_boundaries_agree_away_from_the_ends(gaussian: Factory, data: dict[str, Tensor]) -> None:
    network = gaussian(N)
    losses = [
        AnyFlowPretrainMethod(network, make_scheduler("beta08", 5.0), plain(boundary=boundary))
        .loss(data["latents"], data["prompt"], noise=data["noise"], time_pairs=KINDS)
        .loss
        for boundary in ("one_sided", "extrapolate")
    ]
    assert torch.equal(losses[0], losses[1])


def _naive_bf16_slope(
    network: Any, x0: Tensor, noise: Tensor, t: Tensor, r: Tensor, prompt: Tensor
) -> Tensor:
    """Form dF/dt as the peers do: bf16 latents, times and outputs, divided by the nominal width."""
    x0, noise, t, r = x0.bfloat16(), noise.bfloat16(), (t * N).bfloat16(), (r * N).bfloat16()
    sigma, velocity = (t / N).reshape(-1, 1, 1, 1, 1), noise - x0
    x = (1 - sigma) * x0 + sigma * noise

    def u(sign: int) -> Tensor:
        return network(
            hidden_states=x + sign * 5 / N * velocity,
            timestep=t + sign * 5,
            r_timestep=r,
            encoder_hidden_states=prompt,
            return_dict=False,
        )[0]

    return (u(1) - u(-1)).float() / (2 * 5 / N)


@pytest.mark.parametrize("kind", ["gaussian", "transformer"])
def test_bf16_central_difference(
    kind: str,
    gaussian: Factory,
    tiny_transformer: Factory,
    regression_target: Factory,
    record: Factory,
    generator: torch.Generator,
) -> None:
    """Keep t +- 5 and x+- in fp32: in bf16 t moves by 4, and x+- lose 20 % of their difference."""
    b = 8
    t, r = torch.linspace(0.55, 0.97, b), torch.linspace(0.05, 0.4, b)
    x0, noise = (normal(generator, b, *SHAPE[1:], dtype=torch.bfloat16) for _ in range(2))
    if kind == "gaussian":
        network, exact_network, prompt = gaussian(N), gaussian(N), no_prompt(b)
    else:
        network = tiny_transformer(freq_dim=16).bfloat16()
        exact_network = tiny_transformer(freq_dim=16).double()
        exact_network.load_state_dict(network.state_dict())
        prompt = normal(generator, b, 5, 8, dtype=torch.bfloat16)
    arguments = (x0.double(), noise.double(), t, r, prompt.double())
    exact, _ = regression_target(exact_network, make_scheduler(), plain(), *arguments)
    velocity = noise.double() - x0.double()
    interval = (t - r).double().reshape(-1, 1, 1, 1, 1)

    calls = record(network)
    target, _ = regression_target(network, make_scheduler(), plain(), x0, noise, t, r, prompt)
    for call in calls:
        assert call.x.dtype == call.timestep.dtype == call.output.dtype == torch.float32
    above, below = calls[0].timestep.double().chunk(2)
    torch.testing.assert_close(above - below, torch.full((b,), 10.0).double(), rtol=0, atol=2e-4)

    with torch.no_grad():
        naive = velocity - interval * _naive_bf16_slope(network, x0, noise, t, r, prompt)
    scale = _rms(exact - velocity)
    ours, theirs = _rms(target - exact) / scale, _rms(naive - exact) / scale
    # only the method rounds: what it feeds and divides by is the whole error
    if kind == "gaussian":
        assert ours < 1e-4 < 0.05 < theirs
    else:  # the blocks themselves compute in bf16
        assert ours < 0.5 * theirs


def test_realized_width_of_the_times_is_used(gaussian: Factory, regression_target: Factory) -> None:
    """Divide by the realized width: the nominal one is 6 % off at a few units in the last place."""
    network = gaussian(N)
    latents, noise, t, prompt = _on_the_path(network, [0.75, 0.9375], 5)
    r = torch.tensor([0.125, 0.25], dtype=torch.float64)
    exact = _exact(network, latents, noise, t, r, prompt)
    epsilon = 7.5 * 2.0**-14  # timesteps in [512, 1024) are spaced by 2^-14
    target, _ = regression_target(
        network, make_scheduler(), plain(epsilon=epsilon), latents, noise, t, r, prompt
    )
    assert _rms(target - exact) < 1e-4 * _rms(exact - (noise - latents))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_forward_mode_agrees_with_the_central_difference(
    guidance: float, tiny_transformer: Factory, data: dict[str, Tensor]
) -> None:
    """Let errors fall as epsilon squared, in gradients too; ten timesteps smooth the sinusoid."""
    n = 10
    student = tiny_transformer(num_layers=2).double()
    scheduler = make_scheduler("beta08", shift=3.0, n=n)

    def gradients(**overrides: Any) -> Tensor:
        config = PretrainConfig(fuse_guidance_scale=guidance, **overrides)
        output = AnyFlowPretrainMethod(student, scheduler, config).loss(
            data["latents"], data["prompt"], data["negative"], noise=data["noise"], time_pairs=KINDS
        )
        return torch.cat([g.flatten() for g in gradients_of(student, output.loss)])

    exact = gradients(derivative="jvp", epsilon=1.0)
    errors = [
        ((gradients(epsilon=e) - exact).norm() / exact.norm()).item() for e in (0.2, 0.1, 0.05)
    ]
    assert errors[2] < 2e-3
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.2)
