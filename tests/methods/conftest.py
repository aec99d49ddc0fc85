"""Make networks whose flow map is known in closed form, and record every network call."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anyflow.methods import AnyFlowPretrainMethod, LossOutput, PretrainConfig, TimePairs
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

sys.path.append(str(Path(__file__).parent / "scripts"))  # helpers of several files of tests


class GaussianFlowMap(nn.Module):
    """Give the exact flow map of Gaussian data ``N(mean_c + mean(prompt), scale_c^2)`` by channel.

    With ``s_t^2 = (1-t)^2 scale^2 + t^2`` the path is ``x_r = m_r + s_r / s_t (x_t - m_t)``, so
    that ``u = -mean + (x - m_t) / s_t * ((t + r) - scale^2 (2 - t - r)) / (s_t + s_r)``, which is
    the velocity at r = t. Computed in fp64 whatever goes in; the result has the dtype of
    ``hidden_states``, as a network's would.
    """

    def __init__(self, num_train_timesteps: int = 1000, channels: int = 3) -> None:
        super().__init__()
        self.n = num_train_timesteps
        c = torch.arange(channels, dtype=torch.float64)
        self.mean = nn.Parameter(0.5 - 0.4 * c)
        self.scale = nn.Parameter(0.3 + 0.5 * c)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        r_timestep: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        assert not return_dict and encoder_hidden_states is not None
        assert len(encoder_hidden_states) == len(hidden_states) == len(timestep)
        r_timestep = timestep if r_timestep is None else r_timestep
        t, r = (self._lead(tau.double() / self.n) for tau in (timestep, r_timestep))
        u = self.average(hidden_states.double(), t, r, encoder_hidden_states)
        return (u.to(hidden_states.dtype),)

    def average(self, x: Tensor, t: Tensor, r: Tensor, prompt: Tensor) -> Tensor:
        """Return u(x, t, r) for times ``[B or 1, F or 1, 1, 1, 1]`` in [0, 1]."""
        mean = self.mean[:, None, None] + self._lead(prompt.double().mean((1, 2)))
        squared = self.scale[:, None, None].square()
        deviation = [((1 - tau).square() * squared + tau.square()).sqrt() for tau in (t, r)]
        rate = ((t + r) - squared * (2 - t - r)) / (deviation[0] + deviation[1])
        return -mean + (x - (1 - t) * mean) / deviation[0] * rate

    def clean(self, noise: Tensor, prompt: Tensor) -> Tensor:
        """Return where the flow takes noise: ``mean + scale * noise``."""
        mean = self.mean[:, None, None] + self._lead(prompt.double().mean((1, 2)))
        return (mean + self.scale[:, None, None] * noise.double()).detach()

    def data_on_path(self, x: Tensor, t: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """Return data and noise of the line through x at time t with the flow's velocity there."""
        sigma = self._lead(t.double())
        v = self.average(x.double(), sigma, sigma, prompt).detach()
        return x - sigma * v, x + (1 - sigma) * v

    @staticmethod
    def _lead(values: Tensor) -> Tensor:
        return values.reshape(*values.shape, *[1] * (5 - values.ndim))


@dataclass(frozen=True)
class Call:
    """Hold what one network call was given and returned, and whether it recorded gradients."""

    x: Tensor
    timestep: Tensor
    r_timestep: Tensor | None
    text: Tensor
    grad: bool
    output: Tensor


def _record(module: nn.Module) -> list[Call]:
    calls: list[Call] = []

    def hook(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor]
    ) -> None:
        assert not args
        x, text = kwargs["hidden_states"].detach(), kwargs["encoder_hidden_states"]
        grad, result = torch.is_grad_enabled(), output[0].detach()
        calls.append(Call(x, kwargs["timestep"], kwargs["r_timestep"], text, grad, result))

    module.register_forward_hook(hook, with_kwargs=True)
    return calls


class Probe(nn.Module):
    """Add a zero parameter to the prediction: its gradient tells the target of a squared error."""

    def __init__(self, network: nn.Module, shape: torch.Size) -> None:
        super().__init__()
        self.network = network
        self.offset = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        self.pred = torch.empty(0)

    def forward(self, **inputs: Any) -> tuple[Tensor]:
        out = self.network(**inputs)[0]
        if not torch.is_grad_enabled():
            return (out,)
        self.pred = out.detach().double()
        return (out + self.offset.to(out.dtype),)


def _target(
    network: nn.Module,
    scheduler: FlowMapEulerDiscreteScheduler,
    config: PretrainConfig,
    latents: Tensor,
    noise: Tensor,
    t: Tensor,
    r: Tensor,
    prompt: Tensor,
) -> tuple[Tensor, LossOutput]:
    """Return the regression target of the pretrain loss, and the loss.

    The weight is uniform; neither guidance nor a diffusion sample takes part.
    """
    assert scheduler.config.weight_type == "uniform" and config.fuse_guidance_scale == 1
    probe = Probe(network, latents.shape)
    pairs = TimePairs(t, r, torch.zeros_like(t, dtype=torch.bool))
    output = AnyFlowPretrainMethod(probe, scheduler, config).loss(
        latents, prompt, noise=noise, time_pairs=pairs
    )
    output.loss.backward()
    assert probe.offset.grad is not None
    return probe.pred - probe.offset.grad * latents.numel() / 2, output


def _tiny_transformer(**overrides: Any) -> AnyFlowTransformer3DModel:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 3,
        "out_channels": 3,
        "text_dim": 8,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 1,
        "rope_max_seq_len": 8,
    }
    return AnyFlowTransformer3DModel(**{**config, **overrides})


@pytest.fixture(scope="session")
def gaussian() -> Callable[..., GaussianFlowMap]:
    """Return the constructor of the closed-form network."""
    return GaussianFlowMap


@pytest.fixture(scope="session")
def tiny_transformer() -> Callable[..., AnyFlowTransformer3DModel]:
    """Return the constructor of a transformer of three latent channels and text width 8."""
    return _tiny_transformer


@pytest.fixture(scope="session")
def record() -> Callable[[nn.Module], list[Call]]:
    """Return a function that records a module's calls in a growing list."""
    return _record


@pytest.fixture(scope="session")
def regression_target() -> Callable[..., tuple[Tensor, LossOutput]]:
    """Return a function for ``(target, LossOutput)`` of one pretrain step."""
    return _target


@pytest.fixture
def data(generator: torch.Generator) -> dict[str, Tensor]:
    """Draw a batch for the small transformer, in fp64."""
    shape = (5, 2, 3, 4, 4)
    return {
        "latents": torch.randn(shape, generator=generator, dtype=torch.float64),
        "noise": torch.randn(shape, generator=generator, dtype=torch.float64),
        "prompt": torch.randn(shape[0], 5, 8, generator=generator, dtype=torch.float64),
        "negative": torch.randn(1, 5, 8, generator=generator, dtype=torch.float64),
    }


@pytest.fixture
def networks() -> list[GaussianFlowMap]:
    """Make student, teacher and critic with three different data distributions."""
    made = [GaussianFlowMap() for _ in range(3)]
    with torch.no_grad():
        made[1].mean.add_(0.5)
        made[2].scale.mul_(1.5)
    return made


@pytest.fixture
def prompt(generator: torch.Generator) -> Tensor:
    """Draw the prompts of four samples."""
    return 0.3 * torch.randn(4, 2, 3, generator=generator, dtype=torch.float64)


@pytest.fixture
def negative(generator: torch.Generator) -> Tensor:
    return 0.3 * torch.randn(1, 2, 3, generator=generator, dtype=torch.float64)
