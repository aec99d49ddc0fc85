"""Compare the pretrain loss with its formula, and count network calls."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_cases import (
    KINDS,
    SHAPE,
    N,
    gradients_of,
    make_scheduler,
    plain,
)
from torch import Tensor

from anyflow.methods import AnyFlowPretrainMethod, PretrainConfig, TimePairs
from anyflow.ops import flow_map_inputs, flow_map_loss

Factory = Callable[..., Any]


def _written_out(
    network: Any, scheduler: Any, config: PretrainConfig, data: dict[str, Tensor]
) -> Tensor:
    """Write the loss out sample by sample, one network call at a time."""
    g, e = config.fuse_guidance_scale, config.epsilon / N
    losses = []
    for i in range(SHAPE[0]):
        x0, noise, c, neg = (
            data["latents"][i : i + 1],
            data["noise"][i : i + 1],
            data["prompt"][i : i + 1],
            data["negative"],
        )
        t, r = (scheduler.apply_shift(tau[i : i + 1].double()) for tau in (KINDS.t, KINDS.r))

        def u(x: Tensor, t: Tensor, text: Tensor, r: Tensor = r) -> Tensor:
            return network(
                hidden_states=x,
                timestep=(t * N).float(),
                r_timestep=(r * N).float(),
                encoder_hidden_states=text,
                return_dict=False,
            )[0]

        x, v = (1 - t) * x0 + t * noise, noise - x0
        with torch.no_grad():
            slope = (u(x + e * v, t + e, c) - u(x - e * v, t - e, c)) / (2 * e * g)
            uncond = u(x, t, neg)
        pred = (u(x, t, c) - (1 - g) * uncond) / g
        losses.append(
            scheduler.get_train_weight(t * N).double()
            * (pred - (v - (t - r) * slope)).square().mean()
        )
    loss = torch.cat(losses)
    mean = loss.detach()[KINDS.is_diffusion].mean()
    return torch.where(KINDS.is_diffusion, loss, loss * mean / (loss.detach() + 1e-5)).mean()


@pytest.mark.parametrize("guidance", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("weight_type", ["beta08", "gaussian"])
def test_loss_and_gradients_against_the_formula(
    guidance: float, weight_type: str, tiny_transformer: Factory, data: dict[str, Tensor]
) -> None:
    student, scheduler = tiny_transformer().double(), make_scheduler(weight_type, shift=5.0)
    config = PretrainConfig(fuse_guidance_scale=guidance)
    want = _written_out(student, scheduler, config, data)
    want_gradients = gradients_of(student, want)
    got = AnyFlowPretrainMethod(student, scheduler, config).loss(
        data["latents"], data["prompt"], data["negative"], noise=data["noise"], time_pairs=KINDS
    )
    # fp32 timesteps and sinusoids: e is 5 timesteps, of which 1e-4 are lost to the rounding of t
    torch.testing.assert_close(got.loss, want, rtol=1e-4, atol=0)
    for a, b in zip(gradients_of(student, got.loss), want_gradients, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-9


def test_weight_is_that_of_the_grid_not_of_the_batch(
    gaussian: Factory, data: dict[str, Tensor]
) -> None:
    """Weigh a sample by the mean over the grid, 1.44 at most, whatever the batch."""
    network = gaussian(N)
    t = torch.tensor([0.667])
    pairs = TimePairs(t, t, torch.tensor([True]))
    arguments = (data["latents"][:1], data["prompt"][:1])
    losses = [
        AnyFlowPretrainMethod(network, make_scheduler(weight), plain())
        .loss(*arguments, noise=data["noise"][:1], time_pairs=pairs)
        .loss.item()
        for weight in ("uniform", "beta08")
    ]
    tau = torch.linspace(0, 1, 1001, dtype=torch.float64)
    y = tau * (1 - tau).sqrt()
    weight = (1000 * y / y.sum())[667].item()
    assert weight == pytest.approx(1.4435, abs=1e-3)
    assert losses[1] / losses[0] == pytest.approx(weight, rel=1e-5)


def test_balance_gives_every_flow_map_sample_the_diffusion_loss(
    gaussian: Factory, data: dict[str, Tensor]
) -> None:
    network = gaussian(N)
    output = AnyFlowPretrainMethod(network, make_scheduler("uniform"), plain()).loss(
        data["latents"], data["prompt"], noise=data["noise"], time_pairs=KINDS
    )
    mean = output.metrics["loss_diffusion"]
    assert mean > 0.1
    torch.testing.assert_close(output.loss.detach(), mean, rtol=1e-4, atol=0)
    # which it would not have had by itself
    assert abs(output.metrics["loss_flow_map"] / mean - 1) > 0.05
    assert not output.metrics["loss_flow_map"].requires_grad


@pytest.mark.parametrize("batch", [1, 3])
def test_without_a_diffusion_sample_nothing_is_rescaled(
    batch: int, gaussian: Factory, data: dict[str, Tensor]
) -> None:
    """Stay finite where the reference divides by zero samples, always at a global batch of 1."""
    network = gaussian(N)
    pairs = TimePairs(KINDS.t[:batch], KINDS.r[:batch] * 0.5, torch.zeros(batch, dtype=torch.bool))
    output = AnyFlowPretrainMethod(network, make_scheduler("beta08", 5.0), plain()).loss(
        data["latents"][:batch],
        data["prompt"][:batch],
        noise=data["noise"][:batch],
        time_pairs=pairs,
    )
    assert output.loss.isfinite() and output.loss > 1e-3
    torch.testing.assert_close(output.loss.detach(), output.metrics["loss_flow_map"])
    assert output.metrics["loss_diffusion"] == 0


def _with_every_sample(
    network: Any, scheduler: Any, guidance: float, data: dict[str, Tensor]
) -> Tensor:
    """Take the loss from the public operators, with x+- for the r = t samples too (factor 0)."""
    dtype = data["latents"].dtype
    times = [(scheduler.apply_shift(tau.double()) * N).float() for tau in (KINDS.t, KINDS.r)]
    t, r = (timestep.double() / N for timestep in times)
    plus = ((t + 5 / N) * N).float().double() / N - t
    minus = t - ((t - 5 / N) * N).float().double() / N
    x_t, x_plus, x_minus = flow_map_inputs(data["latents"], data["noise"], t, (plus, minus))
    negative = data["negative"].to(dtype).repeat(SHAPE[0], 1, 1)

    def u(x: Tensor, t: Tensor, r: Tensor, text: Tensor) -> Tensor:
        return network(
            hidden_states=x, timestep=t, r_timestep=r, encoder_hidden_states=text, return_dict=False
        )[0]

    prompt = data["prompt"]
    with torch.no_grad():
        out = u(
            torch.cat([x_plus, x_minus, x_t]),
            torch.cat([((t + plus) * N).float(), ((t - minus) * N).float(), times[0]]),
            times[1].repeat(3),
            torch.cat([prompt, prompt, negative]),
        )
    u_plus, u_minus, uncond = out.chunk(3)
    per_sample = flow_map_loss(
        u(x_t, *times, prompt),
        None if guidance == 1 else uncond,
        u_plus,
        u_minus,
        data["latents"],
        data["noise"],
        t,
        r,
        scheduler.get_train_weight(times[0]),
        guidance,
        plus + minus,
    )
    detached, diffusion = per_sample.detach(), KINDS.is_diffusion
    mean = (detached * diffusion).sum() / diffusion.sum()
    return (
        per_sample * torch.where(diffusion, torch.ones_like(detached), mean / (detached + 1e-5))
    ).mean()


@pytest.mark.parametrize("kind", ["gaussian", "transformer"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_skipping_samples_changes_nothing(
    kind: str,
    guidance: float,
    gaussian: Factory,
    tiny_transformer: Factory,
    data: dict[str, Tensor],
) -> None:
    """Compare a pointwise network to the bit; matrix products round by the size of the batch."""
    network = gaussian(N) if kind == "gaussian" else tiny_transformer().double()
    scheduler = make_scheduler("beta08", shift=5.0)
    want = _with_every_sample(network, scheduler, guidance, data)
    want_gradients = gradients_of(network, want)
    got = AnyFlowPretrainMethod(
        network, scheduler, PretrainConfig(fuse_guidance_scale=guidance)
    ).loss(data["latents"], data["prompt"], data["negative"], noise=data["noise"], time_pairs=KINDS)
    gradients = gradients_of(network, got.loss)
    assert len(gradients) > 1
    tolerance = 0.0 if kind == "gaussian" else 1e-12
    torch.testing.assert_close(got.loss, want, rtol=tolerance, atol=0)
    torch.testing.assert_close(gradients, want_gradients, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("flow_map", [0, 2, 5])
@pytest.mark.parametrize("derivative", ["central", "jvp"])
def test_network_calls_do_not_depend_on_the_samples(
    derivative: str,
    flow_map: int,
    guidance: float,
    gaussian: Factory,
    record: Factory,
    data: dict[str, Tensor],
) -> None:
    """Make two calls per step with the central difference for any samples: FSDP would deadlock."""
    network = gaussian(N)
    calls = record(network)
    diffusion = torch.arange(5) >= flow_map
    pairs = TimePairs(KINDS.t, torch.where(diffusion, KINDS.t, KINDS.t / 2), diffusion)
    config = PretrainConfig(fuse_guidance_scale=guidance, derivative=derivative)
    output = AnyFlowPretrainMethod(network, make_scheduler(), config).loss(
        data["latents"], data["prompt"], data["negative"], noise=data["noise"], time_pairs=pairs
    )
    assert output.loss.isfinite()
    assert [len(call.x) for call in calls if call.grad] == [5]
    others = [len(call.x) for call in calls if not call.grad]
    uncond = 5 if guidance != 1 else 0
    if derivative == "central":
        assert others == [max(2 * flow_map + uncond, 1)]
    else:
        assert others == ([uncond] if uncond else []) + [max(flow_map, 1)]


def test_pure_flow_matching_is_one_call(
    gaussian: Factory, record: Factory, data: dict[str, Tensor]
) -> None:
    network = gaussian(N)
    calls = record(network)
    for derivative in ("central", "jvp"):
        calls.clear()
        config = plain(diffusion_ratio=1.0, consistency_ratio=0.0, derivative=derivative)
        method = AnyFlowPretrainMethod(network, make_scheduler(), config)
        method.loss(data["latents"], data["prompt"], generator=torch.Generator().manual_seed(0))
        assert [(len(call.x), call.grad) for call in calls] == [(5, True)]
        with pytest.raises(ValueError, match="time_pairs hold samples with r != t"):
            method.loss(data["latents"], data["prompt"], time_pairs=KINDS)
