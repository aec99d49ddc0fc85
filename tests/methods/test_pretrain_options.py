"""Test the options of the pretrain loss: guidance, prompts, image to video; what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_cases import (
    KINDS,
    N,
    make_scheduler,
    plain,
)
from torch import Tensor

from anyflow.methods import AnyFlowPretrainMethod, PretrainConfig, TimePairs

Factory = Callable[..., Any]


def test_guidance_needs_the_negative_prompt(gaussian: Factory, data: dict[str, Tensor]) -> None:
    for config in (PretrainConfig(), plain(prompt_dropout=0.1)):
        with pytest.raises(ValueError, match="negative_prompt_embeds is required"):
            AnyFlowPretrainMethod(gaussian(N), make_scheduler(), config).loss(
                data["latents"], data["prompt"]
            )


def test_one_negative_prompt_is_repeated_not_broadcast(
    gaussian: Factory, record: Factory, data: dict[str, Tensor]
) -> None:
    network = gaussian(N)
    calls = record(network)
    method = AnyFlowPretrainMethod(network, make_scheduler(), PretrainConfig())
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
        method = AnyFlowPretrainMethod(network, make_scheduler(), plain(prompt_dropout=dropout))
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
            [torch.equal(text, data["negative"][0]) * torch.ones(()) for text in last]
        ).bool()
        assert torch.equal(last[~dropped], data["prompt"][~dropped])
        picked = KINDS.flow_map_indices()
        # the derivative is that of the prompt trained
        assert torch.equal(first, last[picked].repeat(2, 1, 1))
        replaced += int(dropped.sum())
    assert 45 <= replaced <= 105  # of 300, expected 75: five standard deviations are 38
    for name, before in zip(("latents", "prompt", "negative", "noise"), inputs, strict=True):
        assert torch.equal(data[name], before), f"{name} was written to"


def test_image_to_video_keeps_frame_zero_clean_and_out_of_the_loss(
    gaussian: Factory, record: Factory, data: dict[str, Tensor]
) -> None:
    network = gaussian(N)
    calls = record(network)
    config = plain(i2v_prob=1.0)
    scheduler = make_scheduler("beta08", shift=5.0)
    latents, noise = data["latents"].requires_grad_(), data["noise"].requires_grad_()
    output = AnyFlowPretrainMethod(network, scheduler, config).loss(
        latents, data["prompt"], noise=noise, time_pairs=KINDS
    )
    small, last = calls
    picked = KINDS.flow_map_indices()
    for call, index in ((small, torch.cat([picked, picked])), (last, torch.arange(5))):
        assert call.timestep.shape == (len(index), 2)
        assert not call.timestep[:, 0].any() and bool((call.timestep[:, 1] > 0).all())
        assert torch.equal(call.x[:, 0], latents.detach()[index, 0])
    assert last.r_timestep is not None
    assert torch.equal(last.r_timestep[:, 0], last.r_timestep[:, 1])

    # Frame 1 alone, by the same method without image-to-video: the network is pointwise, so nothing
    # else changes.
    alone = AnyFlowPretrainMethod(network, scheduler, plain()).loss(
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
    method = AnyFlowPretrainMethod(network, make_scheduler(), plain(i2v_prob=0.5))
    g = torch.Generator().manual_seed(0)
    for _ in range(40):
        method.loss(data["latents"], data["prompt"], time_pairs=KINDS, generator=g)
    chosen = sum(call.timestep.ndim == 2 for call in calls if call.grad)
    assert 8 <= chosen <= 32


def test_image_to_video_needs_two_frames(gaussian: Factory, data: dict[str, Tensor]) -> None:
    method = AnyFlowPretrainMethod(gaussian(N), make_scheduler(), plain(i2v_prob=0.5))
    with pytest.raises(ValueError, match="at least two latent frames"):
        method.loss(data["latents"][:, :1], data["prompt"])


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
        AnyFlowPretrainMethod(gaussian(10), make_scheduler(n=10), PretrainConfig(epsilon=5.0))


def test_a_plain_model_is_trained_by_flow_matching_only(
    tiny_transformer: Factory, record: Factory, data: dict[str, Tensor]
) -> None:
    wan = tiny_transformer(r_embedder=False)
    for overrides in (
        {},
        {"diffusion_ratio": 1.0, "consistency_ratio": 0.0, "fuse_guidance_scale": 3.0},
    ):
        with pytest.raises(ValueError, match="enable_flow_map"):
            AnyFlowPretrainMethod(wan, make_scheduler(), PretrainConfig(**overrides))
    config = plain(diffusion_ratio=1.0, consistency_ratio=0.0)
    calls = record(wan)
    method = AnyFlowPretrainMethod(wan, make_scheduler(), config)
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
        AnyFlowPretrainMethod(gaussian(N), make_scheduler(), PretrainConfig()).loss(
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
    method = AnyFlowPretrainMethod(tiny_transformer().double(), make_scheduler(shift=5.0), config)

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
    method = AnyFlowPretrainMethod(network, make_scheduler(), plain())
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
