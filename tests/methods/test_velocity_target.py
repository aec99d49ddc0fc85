"""Test a teacher's velocity in place of a pair's: exact flow maps then have no loss at all."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_cases import (
    KINDS,
    SHAPE,
    N,
    make_scheduler,
)
from torch import Tensor

from anyflow.methods import (
    AnyFlowOnPolicyMethod,
    AnyFlowPretrainMethod,
    OnPolicyConfig,
    PretrainConfig,
)

Factory = Callable[..., Any]


def _config(**overrides: Any) -> PretrainConfig:
    return PretrainConfig(
        **{"fuse_guidance_scale": 1.0, "epsilon": 0.01, "velocity_target": "teacher", **overrides}
    )


@pytest.fixture
def pair(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw data and noise that have nothing to do with each other, and prompts."""
    latents, noise = (
        torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    return latents, noise, torch.randn(SHAPE[0], 2, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("derivative", ["central", "jvp"])
def test_the_exact_flow_map_has_no_loss_on_any_pair(
    derivative: str, gaussian: Factory, pair: tuple[Tensor, Tensor, Tensor]
) -> None:
    latents, noise, prompt = pair
    network, data = gaussian(N), {"noise": noise, "time_pairs": KINDS}
    taught = AnyFlowPretrainMethod(
        network, make_scheduler(), _config(derivative=derivative), teacher=gaussian(N)
    )
    assert taught.sample_losses(latents, prompt, **data)[0].max().item() < 1e-9
    of_data = _config(derivative=derivative, velocity_target="data")
    scattered = AnyFlowPretrainMethod(network, make_scheduler(), of_data).sample_losses(
        latents, prompt, **data
    )[0]
    # the same network, the same pairs: the target of a pair scatters
    assert scattered.min().item() > 1e-2


def test_both_targets_are_one_where_the_pair_has_the_flows_velocity(
    gaussian: Factory, pair: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, _, prompt = pair
    student, teacher = gaussian(N), gaussian(N)
    with torch.no_grad():
        student.mean += 0.1  # not the teacher: the losses are not zero
    latents, noise = teacher.data_on_path(x, KINDS.t.double(), prompt)
    losses = [
        AnyFlowPretrainMethod(
            student, make_scheduler(), _config(velocity_target=name), teacher=network
        ).sample_losses(latents, prompt, noise=noise, time_pairs=KINDS)[0]
        for name, network in (("data", None), ("teacher", teacher))
    ]
    assert losses[0].min().item() > 1e-3
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-9)


def test_the_frame_held_clean_stays_clean(
    gaussian: Factory, record: Factory, pair: tuple[Tensor, Tensor, Tensor]
) -> None:
    latents, noise, prompt = pair
    student, teacher = gaussian(N), gaussian(N)
    calls = record(student)
    method = AnyFlowPretrainMethod(
        student, make_scheduler(), _config(i2v_prob=0.5), teacher=teacher
    )
    losses = method.sample_losses(
        latents, prompt, noise=noise, time_pairs=KINDS, image_to_video=True
    )[0]
    assert losses.max().item() < 1e-9
    torch.testing.assert_close(calls[-1].x[:, 0], latents[:, 0])


def test_the_teacher_is_called_once_without_gradient_at_r_equal_t(
    gaussian: Factory, record: Factory, pair: tuple[Tensor, Tensor, Tensor]
) -> None:
    latents, noise, prompt = pair
    teacher = gaussian(N)
    calls = record(teacher)
    method = AnyFlowPretrainMethod(gaussian(N), make_scheduler(), _config(), teacher=teacher)
    method.loss(latents, prompt, noise=noise, time_pairs=KINDS).loss.backward()
    assert len(calls) == 1 and not calls[0].grad
    assert calls[0].r_timestep is not None and torch.equal(calls[0].r_timestep, calls[0].timestep)
    assert all(p.grad is None for p in teacher.parameters())


def test_cotraining_takes_the_real_score(
    gaussian: Factory, record: Factory, pair: tuple[Tensor, Tensor, Tensor]
) -> None:
    latents, noise, prompt = pair
    teacher = gaussian(N)
    config = OnPolicyConfig(cotrain_pretrain=True, num_steps=(2,), real_guidance_scale=0.0)
    pretrain = _config(epsilon=1.0)
    method = AnyFlowOnPolicyMethod(
        gaussian(N), teacher, gaussian(N), make_scheduler(), config, pretrain=pretrain
    )
    calls = record(teacher)
    output = method.student_loss(
        noise,
        prompt,
        latents=latents,
        data_prompt_embeds=prompt,
        data_noise=noise,
        time_pairs=KINDS,
        rollout_draw=(2, 0),
    )
    assert len(calls) == 2  # the score of the rollout, the target of the data
    assert output.metrics["loss_diffusion"].item() < 1e-9


def test_a_target_and_a_teacher_go_together(gaussian: Factory) -> None:
    with pytest.raises(ValueError, match="velocity_target='teacher' and teacher=None"):
        AnyFlowPretrainMethod(gaussian(N), make_scheduler(), _config())
    with pytest.raises(ValueError, match="velocity_target='data' and teacher=a network"):
        AnyFlowPretrainMethod(
            gaussian(N), make_scheduler(), _config(velocity_target="data"), teacher=gaussian(N)
        )
    with pytest.raises(
        ValueError, match=r"velocity_target must be one of \('data', 'teacher'\), got 'student'"
    ):
        _config(velocity_target="student")


def test_the_weight_of_cotraining_scales_its_gradient_alone(
    gaussian: Factory, pair: tuple[Tensor, Tensor, Tensor]
) -> None:
    latents, noise, prompt = pair
    gradients = {}
    for weight in (1.0, 2.0, 5.0):
        student = gaussian(N)
        config = OnPolicyConfig(
            cotrain_pretrain=True,
            cotrain_weight=weight,
            num_steps=(2,),
            real_guidance_scale=0.0,
        )
        pretrain = _config(epsilon=1.0, velocity_target="data")
        method = AnyFlowOnPolicyMethod(
            student, gaussian(N), gaussian(N), make_scheduler(), config, pretrain=pretrain
        )
        draws = {
            "data_noise": noise,
            "time_pairs": KINDS,
            "rollout_draw": (2, 0),
            "t": torch.full((SHAPE[0],), 0.5),
        }
        output = method.student_loss(
            noise, prompt, latents=latents, data_prompt_embeds=prompt, score_noise=latents, **draws
        )
        output.loss.backward()
        gradients[weight] = student.mean.grad.clone()
    once = gradients[2.0] - gradients[1.0]
    assert once.abs().max().item() > 1e-3
    torch.testing.assert_close(gradients[5.0] - gradients[1.0], 4 * once)
    with pytest.raises(ValueError, match="cotrain_weight"):
        OnPolicyConfig(cotrain_weight=0.0)
