"""Compare the methods with numbers of the reference trainers: losses, rollouts, gradients."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from anyflow.methods import (
    AnyFlowOnPolicyMethod,
    AnyFlowPretrainMethod,
    OnPolicyConfig,
    PretrainConfig,
    TimePairs,
)
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

FILE = Path(__file__).parents[1] / "data" / "anyflow_reference_c.safetensors"
TOLERANCE = 1e-4

with safe_open(FILE, "pt") as _file:
    KEYS = list(_file.keys())
ROLLOUTS = sorted(key for key in KEYS if key.startswith("roll.n") and "noise" not in key)
PRETRAIN_GRADIENTS = sorted(key for key in KEYS if key.startswith("pre.grad."))
DMD_GRADIENTS = sorted(key for key in KEYS if key.startswith("dmd.grad."))


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double().reshape(b.shape), b.double()
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    with safe_open(FILE, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def variant() -> dict[str, Any]:
    with safe_open(FILE, "pt") as file:
        return json.loads(file.metadata()["variant"])


@pytest.fixture
def networks(
    reference: dict[str, Tensor], variant: dict[str, Any]
) -> dict[str, AnyFlowTransformer3DModel]:
    """Load student, real (teacher) and fake (critic) with the reference's weights."""
    loaded = {}
    for name in ("student", "real", "fake"):
        model = AnyFlowTransformer3DModel(
            **variant["config"], gate_value=variant["gate"], deltatime_type=variant["dt"]
        )
        prefix = f"{name}."
        model.load_state_dict(
            {k.removeprefix(prefix): v for k, v in reference.items() if k.startswith(prefix)}
        )
        loaded[name] = model
    return loaded


@pytest.fixture
def scheduler(variant: dict[str, Any]) -> FlowMapEulerDiscreteScheduler:
    return FlowMapEulerDiscreteScheduler(shift=variant["shift"])


@pytest.fixture
def on_policy(
    networks: dict[str, AnyFlowTransformer3DModel], scheduler: FlowMapEulerDiscreteScheduler
) -> AnyFlowOnPolicyMethod:
    return AnyFlowOnPolicyMethod(
        networks["student"], networks["real"], networks["fake"], scheduler, OnPolicyConfig()
    )


def _frames_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def test_the_file_holds_what_the_tests_below_iterate_over() -> None:
    assert len(ROLLOUTS) == 4 and len(PRETRAIN_GRADIENTS) == 10 and len(DMD_GRADIENTS) == 1


def test_forward(
    reference: dict[str, Tensor], networks: dict[str, AnyFlowTransformer3DModel]
) -> None:
    with torch.no_grad():
        y = networks["student"](
            reference["fwd.x"], reference["fwd.t"], reference["fwd.r"], reference["prompt_embeds"]
        ).sample
    assert _relative(y, reference["fwd.y"]) <= TOLERANCE


def test_train_weight(
    reference: dict[str, Tensor], scheduler: FlowMapEulerDiscreteScheduler
) -> None:
    assert (
        _relative(scheduler.get_train_weight(reference["weight.t"]), reference["weight.w"])
        <= TOLERANCE
    )


@pytest.mark.parametrize("boundary", ["one_sided", "extrapolate"])
def test_pretrain_loss_and_gradients(
    boundary: str,
    reference: dict[str, Tensor],
    variant: dict[str, Any],
    networks: dict[str, AnyFlowTransformer3DModel],
    scheduler: FlowMapEulerDiscreteScheduler,
) -> None:
    """Cover both kinds of ends: the reference's times are further than epsilon from them."""
    student = networks["student"]
    config = PretrainConfig(
        epsilon=variant["eps"], fuse_guidance_scale=variant["g"], boundary=boundary
    )
    output = AnyFlowPretrainMethod(student, scheduler, config).loss(
        _frames_first(reference["latents_bcfhw"]),
        reference["prompt_embeds"],
        reference["negative_prompt_embeds"],
        noise=reference["pre.noise_bfchw"],
        time_pairs=TimePairs(
            reference["pre.t_unit"], reference["pre.r_unit"], reference["pre.is_diffusion"]
        ),
    )
    assert _relative(output.loss, reference["pre.loss"]) <= TOLERANCE
    output.loss.backward()
    parameters = dict(student.named_parameters())
    errors = {
        key: _relative(parameters[key.removeprefix("pre.grad.")].grad, reference[key])
        for key in PRETRAIN_GRADIENTS
    }
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("key", ROLLOUTS)
def test_rollout(key: str, reference: dict[str, Tensor], on_policy: AnyFlowOnPolicyMethod) -> None:
    n, g = (int(part[1:]) for part in key.split(".")[1:])
    x = on_policy.rollout(
        reference["roll.noise_bfchw"], reference["prompt_embeds"], num_steps=n, grad_step=g
    )
    assert _relative(x, reference[key]) <= TOLERANCE


def test_dmd_loss_and_gradient_of_the_samples(
    reference: dict[str, Tensor], on_policy: AnyFlowOnPolicyMethod
) -> None:
    samples = reference["dmd.pred"].clone().requires_grad_()
    output = on_policy.generator_loss(
        samples,
        reference["prompt_embeds"],
        reference["negative_prompt_embeds"],
        t=reference["dmd.t_unit"],
        noise=reference["dmd.noise_bfchw"],
    )
    output.loss.backward()
    assert _relative(output.loss, reference["dmd.loss"]) <= TOLERANCE
    assert samples.grad is not None
    assert _relative(samples.grad * samples.numel() / 2, reference["dmd.kl_grad"]) <= TOLERANCE


def test_dmd_gradient_through_the_rollout(
    reference: dict[str, Tensor],
    networks: dict[str, AnyFlowTransformer3DModel],
    on_policy: AnyFlowOnPolicyMethod,
) -> None:
    samples = on_policy.rollout(
        reference["roll.noise_bfchw"], reference["prompt_embeds"], num_steps=4, grad_step=1
    )
    assert _relative(samples, reference["dmd.pred"]) <= TOLERANCE
    output = on_policy.generator_loss(
        samples,
        reference["prompt_embeds"],
        reference["negative_prompt_embeds"],
        t=reference["dmd.t_unit"],
        noise=reference["dmd.noise_bfchw"],
    )
    output.loss.backward()
    parameters = dict(networks["student"].named_parameters())
    for key in DMD_GRADIENTS:
        assert (
            _relative(parameters[key.removeprefix("dmd.grad.")].grad, reference[key]) <= TOLERANCE
        ), key


def test_critic_loss(reference: dict[str, Tensor], on_policy: AnyFlowOnPolicyMethod) -> None:
    output = on_policy.critic_loss(
        reference["dmd.pred"],
        reference["prompt_embeds"],
        t=reference["critic.t_unit"],
        noise=reference["critic.noise_bfchw"],
    )
    assert _relative(output.loss, reference["critic.loss"]) <= TOLERANCE
