"""Trace that the host never waits for the device in a step of sampling or training."""

from contextlib import suppress
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException

from anyflow.data import Batch, SyntheticVideos
from anyflow.methods import (
    AnyFlowPretrainMethod,
    CausalConfig,
    OnPolicyConfig,
    PretrainConfig,
    TimePairs,
)
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.sampling import sample, sample_consistency
from anyflow.schedulers import FlowMapEulerDiscreteScheduler
from anyflow.training.config import (
    ArchitectureConfig,
    CausalSettings,
    DataConfig,
    NetworkConfig,
    OnPolicyStageConfig,
    Recipe,
)
from anyflow.training.distributed import Mesh
from anyflow.training.networks import build_critic, build_student, build_teacher
from anyflow.training.updates import OnPolicyUpdates, PretrainUpdates
from anyflow.training.window import Window

CUDA = torch.device("cuda", 0)
ARCHITECTURE = ArchitectureConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=8,
    out_channels=8,
    text_dim=32,
    freq_dim=16,
    ffn_dim=32,
    num_layers=1,
    rope_max_seq_len=8,
)
# The guard of an update: its only wait, so that no update is made of gradients that are not finite.
GUARD = {"training/guard.py:_anywhere"}
# of a sampling: whether all was finite is read once, after the last step
END = ["utils/validation.py:first"]


def recipe(stage: str, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "stage": stage,
        "out": "unused",
        "student": NetworkConfig(architecture=ARCHITECTURE),
        "data": DataConfig(kind="synthetic", batch_size=4),
        "steps": 4,
        "precision": "bf16",
        "gradient_accumulation": 1,
    }
    if stage == "on_policy":
        settings["on_policy"] = OnPolicyStageConfig(
            teacher=NetworkConfig(architecture=ARCHITECTURE),
            method=OnPolicyConfig(cotrain_pretrain=True, num_steps=(2, 4)),
        )
    return Recipe(**settings | changes)


def batch() -> Batch:
    data = SyntheticVideos()
    rows = tuple(range(4))
    return Batch(
        torch.stack([data[i].latents for i in rows]),
        torch.stack([data[i].prompt_embeds for i in rows]),
        rows,
    )


def make_step(device: Any, recipe: Recipe) -> PretrainUpdates | OnPolicyUpdates:
    student, negative = (
        device.parameters(build_student(recipe)),
        SyntheticVideos().negative_prompt_embeds,
    )
    if recipe.on_policy is None:
        return PretrainUpdates(recipe, Mesh(CUDA), student, negative)
    teacher = build_teacher(recipe)
    critic = device.parameters(build_critic(recipe, teacher))
    teacher = device.parameters(teacher.requires_grad_(False))
    return OnPolicyUpdates(recipe, Mesh(CUDA), student, teacher, critic, negative)


@pytest.mark.parametrize("stage", ["pretrain", "on_policy"])
def test_a_causal_update_waits_for_nothing_but_its_guard(stage: str, device: Any) -> None:
    """Trace chunks of which some are compressed, the bidirectional loss, and rollouts."""
    pretrain = PretrainConfig(causal=CausalConfig(bidirectional_prob=1.0, long_context_ratio=1.0))
    causal: dict[str, Any] = {
        "student": NetworkConfig(
            architecture=ARCHITECTURE, causal=CausalSettings((1, 6, 6), 1, (1, 1, 2))
        ),
        "pretrain": pretrain,
    }
    if stage == "on_policy":
        causal["on_policy"] = OnPolicyStageConfig(
            teacher=NetworkConfig(architecture=ARCHITECTURE),
            method=OnPolicyConfig(cotrain_pretrain=True, num_steps=(2, 4), causal=CausalConfig()),
        )
    step = make_step(device, recipe(stage, **causal))
    device.clear()
    Window(CUDA).add(step.update([batch()], 0))
    assert device.counts()["flow_map_loss_backward"] == 2
    assert {wait.where for wait in device.waits} == GUARD


@pytest.mark.parametrize("stage", ["pretrain", "on_policy"])
def test_an_update_waits_for_nothing_but_its_guard(stage: str, device: Any) -> None:
    """Trace both stages, whose loss is pretraining's too; the draws are made in host memory."""
    step = make_step(device, recipe(stage))
    device.clear()
    Window(CUDA).add(step.update([batch()], 0))
    assert device.counts()["flow_map_loss_backward"] == 1
    assert {wait.where for wait in device.waits} == GUARD


@pytest.fixture
def student(device: Any) -> AnyFlowTransformer3DModel:
    return device.parameters(build_student(recipe("pretrain")))


@pytest.mark.parametrize(
    "options", [{}, {"guidance_scale": 2.0}, {"context": True}, {"callback": True}], ids=str
)
def test_the_sampler_waits_once_at_its_end(
    options: dict[str, Any], student: Any, device: Any
) -> None:
    """Give first frames, and latents that a callback returns, in host memory or on the device."""
    noise, text = torch.empty(2, 3, 8, 4, 4, device=CUDA), torch.empty(1, 4, 32, device=CUDA)
    options = dict(options)
    if options.pop("context", False):
        options["context_latents"] = torch.zeros(1, 1, 8, 4, 4)
    if options.pop("callback", False):
        options["callback"] = lambda index, timestep, latents: torch.zeros(2, 3, 8, 4, 4)
    if "guidance_scale" in options:
        options["negative_prompt_embeds"] = text
    device.clear()
    sample(student, FlowMapEulerDiscreteScheduler(), noise, text, num_inference_steps=3, **options)
    assert device.counts()["gated_residual"] == 3 and [wait.where for wait in device.waits] == END


def test_the_consistency_sampler_waits_once_at_its_end(student: Any, device: Any) -> None:
    noise, text = torch.empty(2, 3, 8, 4, 4, device=CUDA), torch.empty(1, 4, 32, device=CUDA)
    generator = torch.Generator().manual_seed(1)  # in host memory
    device.clear()
    sample_consistency(
        student,
        FlowMapEulerDiscreteScheduler(),
        noise,
        text,
        num_inference_steps=3,
        generator=generator,
    )
    assert device.counts()["gated_residual"] == 3 and [wait.where for wait in device.waits] == END


@pytest.mark.parametrize(
    "t", [500.0, torch.tensor(500.0), torch.tensor([500.0, 400.0])], ids=["float", "0-d", "[B]"]
)
def test_a_step_of_the_scheduler_waits_for_nothing(t: float | torch.Tensor, device: Any) -> None:
    x = torch.empty(2, 3, 8, 4, 4, device=CUDA)
    scheduler = FlowMapEulerDiscreteScheduler()
    device.clear()
    scheduler.step(x, t, x, 300.0)
    scheduler.scale_noise(x, t, x)
    assert device.calls and device.waits == []


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prompt_dropout": 0.5, "i2v_prob": 1.0},
        {"boundary": "extrapolate", "fuse_guidance_scale": 1.0},
        {"diffusion_ratio": 1.0, "consistency_ratio": 0.0, "fuse_guidance_scale": 1.0},
    ],
    ids=["default", "dropout, i2v", "extrapolate, no guidance", "flow matching"],
)
def test_the_pretrain_loss_draws_and_computes_without_a_wait(
    settings: dict[str, Any], student, device: Any
) -> None:
    method = AnyFlowPretrainMethod(
        student, FlowMapEulerDiscreteScheduler(), PretrainConfig(**settings)
    )
    latents, text = torch.empty(4, 3, 8, 4, 4, device=CUDA), torch.empty(4, 4, 32, device=CUDA)
    device.clear()
    output = method.loss(latents, text, text[:1], generator=torch.Generator().manual_seed(1))
    output.loss.backward()
    assert device.counts()["flow_map_loss_backward"] == 1 and device.waits == []


def test_what_waits_is_noticed(device: Any) -> None:
    """Make a wait of each kind, so that the tests above can fail."""
    x = torch.empty(3, device=CUDA)
    mask = x > 0
    for operation in (
        x.sum().item,
        x.cpu,
        x.tolist,
        mask.nonzero,
        lambda: x[mask],
        lambda: bool(mask.any()),
        lambda: torch.zeros(3).to(CUDA),
        lambda: torch.zeros(3).to(CUDA, non_blocking=True),
        lambda: torch.tensor([1.0, 2.0], device=CUDA),
        lambda: x.copy_(torch.zeros(3)),
        lambda: torch.zeros(3).copy_(x),
        lambda: TimePairs(x, x, mask).flow_map_indices(),
    ):
        device.clear()
        with suppress(DynamicOutputShapeException):  # a fake has no size to give
            operation()
        assert device.waits, operation
    device.clear()
    torch.zeros(3).pin_memory().to(CUDA, non_blocking=True)
    x.copy_(torch.zeros(3).pin_memory(), non_blocking=True)
    assert device.waits == []
