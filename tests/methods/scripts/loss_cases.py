"""Share what the tests of several losses need: sizes, settings, schedulers, random tensors."""

from typing import Any

import torch
from torch import Tensor, nn

from anyflow.methods import DMD2Config, DMD2Method, PretrainConfig, TimePairs
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

N = 1000
SHAPE = (5, 2, 3, 4, 4)  # B, F, C, H, W
KINDS = TimePairs(  # two diffusion, one consistency, two free samples; away from both ends
    torch.tensor([0.6, 0.9, 0.7, 0.5, 0.95]),
    torch.tensor([0.6, 0.2, 0.7, 0.0, 0.4]),
    torch.tensor([True, False, True, False, False]),
)


def plain(**overrides: Any) -> PretrainConfig:
    """Return the published settings without guidance."""
    return PretrainConfig(**{"fuse_guidance_scale": 1.0, **overrides})


def make_scheduler(
    weight_type: str = "uniform", shift: float = 1.0, n: int = N
) -> FlowMapEulerDiscreteScheduler:
    return FlowMapEulerDiscreteScheduler(
        num_train_timesteps=n, shift=shift, weight_type=weight_type
    )


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=dtype)


def no_prompt(batch: int) -> Tensor:
    return torch.zeros(batch, 1, 1)


def gradients_of(module: nn.Module, loss: Tensor) -> list[Tensor]:
    """Return the gradients of the loss alone."""
    module.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def dmd2_method(
    student: Any, teacher: Any, critic: Any, shift: float = 5.0, **config: Any
) -> DMD2Method:
    scheduler = FlowMapEulerDiscreteScheduler(num_train_timesteps=N, shift=shift)
    return DMD2Method(student, teacher, critic, scheduler, DMD2Config(**config))
