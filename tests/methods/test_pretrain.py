"""The pretrain loss: the formula written out, rows and network calls, guidance, image to video,
input checks.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anyflow.methods import AnyFlowPretrainMethod, PretrainConfig, TimePairs
from anyflow.ops import flow_map_inputs, flow_map_loss
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

N = 1000
SHAPE = (5, 2, 3, 4, 4)  # B, F, C, H, W
KINDS = TimePairs(  # two diffusion, one consistency, two free samples; away from both ends
    torch.tensor([0.6, 0.9, 0.7, 0.5, 0.95]),
    torch.tensor([0.6, 0.2, 0.7, 0.0, 0.4]),
    torch.tensor([True, False, True, False, False]),
)
Factory = Callable[..., Any]


def _plain(**overrides: Any) -> PretrainConfig:
    """No guidance; everything else as published."""
    return PretrainConfig(**{"fuse_guidance_scale": 1.0, **overrides})


def _scheduler(
    weight_type: str = "uniform", shift: float = 1.0, n: int = N
) -> FlowMapEulerDiscreteScheduler:
    return FlowMapEulerDiscreteScheduler(
        num_train_timesteps=n, shift=shift, weight_type=weight_type
    )


def _normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=dtype)


def _no_prompt(batch: int) -> Tensor:
    return torch.zeros(batch, 1, 1)


def _gradients(module: nn.Module, loss: Tensor) -> list[Tensor]:
    module.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


# The formula, written out plainly -----------------------------------------------------------------


def _written_out(
    network: Any, scheduler: Any, config: PretrainConfig, data: dict[str, Tensor]
) -> Tensor:
    """The loss sample by sample, one network call at a time."""
    g, e = config.fuse_guidance_scale, config.epsilon / N
    losses = []
    for i in range(SHAPE[0]):
        x0, eps, c, neg = (
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

        x, v = (1 - t) * x0 + t * eps, eps - x0
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
    student, scheduler = tiny_transformer().double(), _scheduler(weight_type, shift=5.0)
    config = PretrainConfig(fuse_guidance_scale=guidance)
    want = _written_out(student, scheduler, config, data)
    want_gradients = _gradients(student, want)
    got = AnyFlowPretrainMethod(student, scheduler, config).loss(
        data["latents"], data["prompt"], data["negative"], noise=data["noise"], time_pairs=KINDS
    )
    # fp32 timesteps and sinusoids: e is 5 timesteps, of which 1e-4 are lost to the rounding of t
    torch.testing.assert_close(got.loss, want, rtol=1e-4, atol=0)
    for a, b in zip(_gradients(student, got.loss), want_gradients, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-9


def test_weight_is_that_of_the_grid_not_of_the_batch(
    gaussian: Factory, data: dict[str, Tensor]
) -> None:
    """Doubling the batch changes nothing, and one sample at the largest weight has 1.41, not
    1000.
    """
    network = gaussian(N)
    t = torch.tensor([0.667])
    pairs = TimePairs(t, t, torch.tensor([True]))
    arguments = (data["latents"][:1], data["prompt"][:1])
    losses = [
        AnyFlowPretrainMethod(network, _scheduler(weight), _plain())
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
    output = AnyFlowPretrainMethod(network, _scheduler("uniform"), _plain()).loss(
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
    """The reference divides by zero samples here: NaN, always at a global batch of one."""
    network = gaussian(N)
    pairs = TimePairs(KINDS.t[:batch], KINDS.r[:batch] * 0.5, torch.zeros(batch, dtype=torch.bool))
    output = AnyFlowPretrainMethod(network, _scheduler("beta08", 5.0), _plain()).loss(
        data["latents"][:batch],
        data["prompt"][:batch],
        noise=data["noise"][:batch],
        time_pairs=pairs,
    )
    assert output.loss.isfinite() and output.loss > 1e-3
    torch.testing.assert_close(output.loss.detach(), output.metrics["loss_flow_map"])
    assert output.metrics["loss_diffusion"] == 0


# Rows and network calls ---------------------------------------------------------------------------


def _with_every_row(
    network: Any, scheduler: Any, guidance: float, data: dict[str, Tensor]
) -> Tensor:
    """The loss from the public operators, with x+- evaluated for the r = t samples too (their
    factor is 0).
    """
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
def test_skipping_rows_changes_nothing(
    kind: str,
    guidance: float,
    gaussian: Factory,
    tiny_transformer: Factory,
    data: dict[str, Tensor],
) -> None:
    """A pointwise network shows it to the bit; matrix products round differently in batches of
    another size.
    """
    network = gaussian(N) if kind == "gaussian" else tiny_transformer().double()
    scheduler = _scheduler("beta08", shift=5.0)
    want = _with_every_row(network, scheduler, guidance, data)
    want_gradients = _gradients(network, want)
    got = AnyFlowPretrainMethod(
        network, scheduler, PretrainConfig(fuse_guidance_scale=guidance)
    ).loss(data["latents"], data["prompt"], data["negative"], noise=data["noise"], time_pairs=KINDS)
    gradients = _gradients(network, got.loss)
    assert len(gradients) > 1
    tolerance = 0.0 if kind == "gaussian" else 1e-12
    torch.testing.assert_close(got.loss, want, rtol=tolerance, atol=0)
    torch.testing.assert_close(gradients, want_gradients, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("flow_map", [0, 2, 5])
@pytest.mark.parametrize("derivative", ["central", "jvp"])
def test_network_calls_do_not_depend_on_the_rows(
    derivative: str,
    flow_map: int,
    guidance: float,
    gaussian: Factory,
    record: Factory,
    data: dict[str, Tensor],
) -> None:
    """Two calls per step with the central difference, whatever the samples: FSDP deadlocks
    otherwise.
    """
    network = gaussian(N)
    calls = record(network)
    diffusion = torch.arange(5) >= flow_map
    pairs = TimePairs(KINDS.t, torch.where(diffusion, KINDS.t, KINDS.t / 2), diffusion)
    config = PretrainConfig(fuse_guidance_scale=guidance, derivative=derivative)
    output = AnyFlowPretrainMethod(network, _scheduler(), config).loss(
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
        config = _plain(diffusion_ratio=1.0, consistency_ratio=0.0, derivative=derivative)
        method = AnyFlowPretrainMethod(network, _scheduler(), config)
        method.loss(data["latents"], data["prompt"], generator=torch.Generator().manual_seed(0))
        assert [(len(call.x), call.grad) for call in calls] == [(5, True)]
        with pytest.raises(ValueError, match="time_pairs hold samples with r != t"):
            method.loss(data["latents"], data["prompt"], time_pairs=KINDS)


# Guidance and prompts -----------------------------------------------------------------------------


def test_guidance_needs_the_negative_prompt(gaussian: Factory, data: dict[str, Tensor]) -> None:
    for config in (PretrainConfig(), _plain(prompt_dropout=0.1)):
        with pytest.raises(ValueError, match="negative_prompt_embeds is required"):
            AnyFlowPretrainMethod(gaussian(N), _scheduler(), config).loss(
                data["latents"], data["prompt"]
            )


def test_one_negative_prompt_is_repeated_not_broadcast(
    gaussian: Factory, record: Factory, data: dict[str, Tensor]
) -> None:
    network = gaussian(N)
    calls = record(network)
    method = AnyFlowPretrainMethod(network, _scheduler(), PretrainConfig())
    losses = []
    for negative in (data["negative"], data["negative"].repeat(5, 1, 1)):
        output = method.loss(
            data["latents"], data["prompt"], negative, noise=data["noise"], time_pairs=KINDS
        )
        losses.append(output.loss)
        text = calls[-2].text
        assert text.shape == (2 * 3 + 5, 5, 8) and text.is_contiguous()
        assert torch.equal(text[6:], data["negative"].expand(5, -1, -1))
    assert torch.equal(losses[0], losses[1])


def test_prompt_dropout(gaussian: Factory, record: Factory, data: dict[str, Tensor]) -> None:
    network = gaussian(N)
    calls = record(network)
    inputs = [data[key].clone() for key in ("latents", "prompt", "negative", "noise")]

    def loss(dropout: float, prompt: Tensor, seed: int = 0) -> Tensor:
        method = AnyFlowPretrainMethod(network, _scheduler(), _plain(prompt_dropout=dropout))
        g = torch.Generator().manual_seed(seed)
        arguments = (data["latents"], prompt, data["negative"])
        return method.loss(*arguments, noise=data["noise"], time_pairs=KINDS, generator=g).loss

    everything = loss(1.0, data["prompt"])
    assert torch.equal(everything, loss(0.0, data["negative"].repeat(5, 1, 1)))
    assert not torch.equal(everything, loss(0.0, data["prompt"]))

    replaced = 0
    for seed in range(60):
        calls.clear()
        loss(0.25, data["prompt"], seed)
        first, last = calls[0].text, calls[-1].text
        dropped = torch.stack(
            [torch.equal(row, data["negative"][0]) * torch.ones(()) for row in last]
        ).bool()
        assert torch.equal(last[~dropped], data["prompt"][~dropped])
        rows = KINDS.flow_map_indices()
        # the derivative is that of the prompt trained
        assert torch.equal(first, last[rows].repeat(2, 1, 1))
        replaced += int(dropped.sum())
    assert 45 <= replaced <= 105  # of 300, expected 75: five standard deviations are 38
    for name, before in zip(("latents", "prompt", "negative", "noise"), inputs, strict=True):
        assert torch.equal(data[name], before), f"{name} was written to"


# Image to video -----------------------------------------------------------------------------------


def test_image_to_video_keeps_frame_zero_clean_and_out_of_the_loss(
    gaussian: Factory, record: Factory, data: dict[str, Tensor]
) -> None:
    network = gaussian(N)
    calls = record(network)
    config = _plain(i2v_prob=1.0)
    scheduler = _scheduler("beta08", shift=5.0)
    latents, noise = data["latents"].requires_grad_(), data["noise"].requires_grad_()
    output = AnyFlowPretrainMethod(network, scheduler, config).loss(
        latents, data["prompt"], noise=noise, time_pairs=KINDS
    )
    small, last = calls
    rows = KINDS.flow_map_indices()
    for call, index in ((small, torch.cat([rows, rows])), (last, torch.arange(5))):
        assert call.timestep.shape == (len(index), 2)
        assert not call.timestep[:, 0].any() and bool((call.timestep[:, 1] > 0).all())
        assert torch.equal(call.x[:, 0], latents.detach()[index, 0])
    assert last.r_timestep is not None
    assert torch.equal(last.r_timestep[:, 0], last.r_timestep[:, 1])

    # Frame 1 alone, by the same method without image-to-video: the network is pointwise, so nothing
    # else changes.
    alone = AnyFlowPretrainMethod(network, scheduler, _plain()).loss(
        latents[:, 1:].detach(), data["prompt"], noise=noise[:, 1:].detach(), time_pairs=KINDS
    )
    torch.testing.assert_close(output.loss, alone.loss, rtol=1e-6, atol=0)
    for key, value in alone.metrics.items():
        torch.testing.assert_close(output.metrics[key], value, rtol=1e-6, atol=0)
    output.loss.backward()
    assert latents.grad is not None
    assert not latents.grad[:, 0].any() and bool(latents.grad[:, 1].any())


def test_image_to_video_is_drawn_per_step(
    gaussian: Factory, record: Factory, data: dict[str, Tensor]
) -> None:
    network = gaussian(N)
    calls = record(network)
    method = AnyFlowPretrainMethod(network, _scheduler(), _plain(i2v_prob=0.5))
    g = torch.Generator().manual_seed(0)
    for _ in range(40):
        method.loss(data["latents"], data["prompt"], time_pairs=KINDS, generator=g)
    chosen = sum(call.timestep.ndim == 2 for call in calls if call.grad)
    assert 8 <= chosen <= 32


def test_image_to_video_needs_two_frames(gaussian: Factory, data: dict[str, Tensor]) -> None:
    method = AnyFlowPretrainMethod(gaussian(N), _scheduler(), _plain(i2v_prob=0.5))
    with pytest.raises(ValueError, match="at least two latent frames"):
        method.loss(data["latents"][:, :1], data["prompt"])


# Configuration and inputs -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("epsilon", (0.0, -1.0, float("nan"), float("inf"))),
        ("fuse_guidance_scale", (0.0, -2.0, float("nan"))),
        ("diffusion_ratio", (1.5, -0.1, float("nan"))),
        ("consistency_ratio", (1.5, -0.1)),
        ("boundary", ("both", "")),
        ("derivative", ("autograd",)),
        ("prompt_dropout", (1.1, -0.1)),
        ("i2v_prob", (1.1, -0.1)),
    ],
)
def test_impossible_settings(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=name):
            PretrainConfig(**{name: value})


def test_ratios_must_fit_together() -> None:
    with pytest.raises(ValueError, match="must not exceed 1"):
        PretrainConfig(diffusion_ratio=0.9, consistency_ratio=0.25)
    assert PretrainConfig(diffusion_ratio=0.0, consistency_ratio=0.0).diffusion_ratio == 0.0


def test_epsilon_must_fit_the_scheduler(gaussian: Factory) -> None:
    with pytest.raises(ValueError, match="num_train_timesteps=10"):
        AnyFlowPretrainMethod(gaussian(10), _scheduler(n=10), PretrainConfig(epsilon=5.0))


def test_a_plain_model_is_trained_by_flow_matching_only(
    tiny_transformer: Factory, record: Factory, data: dict[str, Tensor]
) -> None:
    plain = tiny_transformer(r_embedder=False)
    for overrides in (
        {},
        {"diffusion_ratio": 1.0, "consistency_ratio": 0.0, "fuse_guidance_scale": 3.0},
    ):
        with pytest.raises(ValueError, match="enable_flow_map"):
            AnyFlowPretrainMethod(plain, _scheduler(), PretrainConfig(**overrides))
    config = _plain(diffusion_ratio=1.0, consistency_ratio=0.0)
    calls = record(plain)
    method = AnyFlowPretrainMethod(plain, _scheduler(), config)
    output = method.loss(
        data["latents"].float(), data["prompt"].float(), generator=torch.Generator().manual_seed(0)
    )
    output.loss.backward()
    assert len(calls) == 1 and calls[0].r_timestep is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": lambda x: x[0]}, "latents must be"),
        ({"latents": lambda x: x.sum()}, "latents must be"),
        ({"latents": lambda x: x[:0]}, "latents must be"),
        ({"latents": lambda x: x.long()}, "latents must be"),
        ({"latents": lambda x: x * float("nan")}, "latents holds NaN"),
        ({"latents": lambda x: x / 0}, "latents holds NaN or infinite"),
        ({"noise": lambda x: x[:, :1]}, "noise .* latents"),
        ({"noise": lambda x: x * float("nan")}, "noise holds NaN"),
        ({"prompt": lambda x: x[:2]}, "prompt_embeds must be"),
        ({"prompt": lambda x: x[:, 0]}, "prompt_embeds must be"),
        ({"negative": lambda x: x.repeat(2, 1, 1)}, "negative_prompt_embeds must be"),
        ({"pairs": lambda p: TimePairs(p.t[:2], p.r[:2], p.is_diffusion[:2])}, "time_pairs hold 2"),
    ],
)
def test_bad_inputs_are_named(
    change: dict[str, Callable[[Any], Any]], message: str, gaussian: Factory, data: dict[str, Any]
) -> None:
    inputs = {**data, "pairs": KINDS}
    inputs.update({name: edit(inputs[name]) for name, edit in change.items()})
    with pytest.raises(ValueError, match=message):
        AnyFlowPretrainMethod(gaussian(N), _scheduler(), PretrainConfig()).loss(
            inputs["latents"],
            inputs["prompt"],
            inputs["negative"],
            noise=inputs["noise"],
            time_pairs=inputs["pairs"],
        )


def test_the_generator_decides_and_the_global_one_is_left_alone(
    tiny_transformer: Factory, data: dict[str, Tensor]
) -> None:
    config = PretrainConfig(prompt_dropout=0.3, i2v_prob=0.5)
    method = AnyFlowPretrainMethod(tiny_transformer().double(), _scheduler(shift=5.0), config)

    def loss(seed: int | None) -> Tensor:
        g = None if seed is None else torch.Generator().manual_seed(seed)
        return method.loss(data["latents"], data["prompt"], data["negative"], generator=g).loss

    before = torch.get_rng_state()
    first, again, other, fresh = loss(1), loss(1), loss(2), loss(None)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert len({first.item(), other.item(), fresh.item()}) == 3


def test_offset_rotates_the_kinds(
    gaussian: Factory, record: Factory, data: dict[str, Tensor]
) -> None:
    network = gaussian(N)
    calls = record(network)
    method = AnyFlowPretrainMethod(network, _scheduler(), _plain())
    kinds = []
    for offset in range(4):
        method.loss(
            data["latents"][:4],
            data["prompt"][:4],
            generator=torch.Generator().manual_seed(0),
            offset=offset,
        )
        kinds.append((calls[-1].timestep == calls[-1].r_timestep).tolist())
    assert kinds == [[(i + offset) % 4 < 2 for i in range(4)] for offset in range(4)]
