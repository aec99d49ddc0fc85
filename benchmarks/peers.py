"""The models that are measured, diffusers' and ours on the same weights, and training steps as the
peers write them.

The trainers of NVlabs and FastVideo call the network once for each evaluation, on the whole batch,
with one time per frame, which diffusers' model (equal to NVlabs' to the bit) expands to one
modulation row per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from anyflow.models import AnyFlowTransformer3DModel
from anyflow.schedulers import FlowMapEulerDiscreteScheduler

TIMESTEPS = 1000


@dataclass(frozen=True)
class Size:
    """A transformer and the batch that it is given.

    Attributes:
        label: of the transformer, in names.
        heads, head_dim, layers, ffn_dim, text_dim: of the transformer.
        text_tokens: S.
        latents: ``(B, F, C, H, W)``.
        dtype: of weights and activations.
    """

    label: str
    heads: int
    head_dim: int
    layers: int
    ffn_dim: int
    text_dim: int
    text_tokens: int
    latents: tuple[int, int, int, int, int]
    dtype: torch.dtype = torch.float32

    @property
    def dim(self) -> int:
        """D."""
        return self.heads * self.head_dim

    @property
    def tokens(self) -> int:
        """L, of patches of 1 x 2 x 2."""
        _, frames, _, height, width = self.latents
        return frames * (height // 2) * (width // 2)

    def config(self) -> dict[str, Any]:
        """Arguments of both classes."""
        return {
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_dim,
            "num_layers": self.layers,
            "ffn_dim": self.ffn_dim,
            "text_dim": self.text_dim,
        }

    def block_flops(self) -> int:
        """Of one block on one sample: products of L x D x D and the like, twice as many FLOPs as
        multiplications.
        """
        length, text, dim = self.tokens, self.text_tokens, self.dim
        # q, k, v, out; scores and their product with v
        self_attention = 4 * length * dim**2 + 2 * length**2 * dim
        # q, out on video, k, v on text
        cross_attention = 2 * (length + text) * dim**2 + 2 * length * text * dim
        feed_forward = 2 * length * dim * self.ffn_dim
        return 2 * (self_attention + cross_attention + feed_forward)

    def forward_flops(self) -> int:
        """Of one evaluation of one sample; the embedding of its time is left out (12 D^2 for one
        row).
        """
        patch = 4 * self.latents[2]
        ends = 2 * self.tokens * patch * self.dim  # patches in and out
        text = self.text_tokens * (self.text_dim + self.dim) * self.dim
        return self.layers * self.block_flops() + 2 * (ends + text)

    def block_weights(self) -> int:
        """Numbers in the matrices of a block: eight of D x D, two of D x ffn_dim."""
        return 8 * self.dim**2 + 2 * self.dim * self.ffn_dim

    def forward_bytes(self) -> int:
        """That an evaluation must move: the matrices of the blocks and the latents, once in and
        once out.
        """
        latents = 2 * torch.Size(self.latents).numel()
        return self.dtype.itemsize * (self.layers * self.block_weights() + latents)


SMALL = Size("small", 6, 64, 4, 1536, 128, 32, (1, 5, 16, 32, 32))  # 1280 tokens
SMALL_BATCH = Size("small", 6, 64, 4, 1536, 128, 32, (4, 3, 16, 32, 32))  # 768 tokens a sample
SHORT_BATCH = Size("small", 6, 64, 4, 1536, 128, 32, (4, 3, 16, 16, 16))  # 192
# 480 x 832, 81 frames
WAN_1B = Size("1.3B", 12, 128, 30, 8960, 4096, 512, (1, 21, 16, 60, 104), torch.bfloat16)
# 17 frames
WAN_1B_BATCH = Size("1.3B", 12, 128, 30, 8960, 4096, 512, (4, 5, 16, 60, 104), torch.bfloat16)


@dataclass(frozen=True)
class Batch:
    """Inputs on a device, the same in every process: latents and noise in fp32, embeddings in the
    model's dtype.
    """

    latents: Tensor
    noise: Tensor
    prompt: Tensor
    negative: Tensor


def batch(size: Size, device: torch.device) -> Batch:
    """Random numbers of the shapes of a size."""
    generator = torch.Generator().manual_seed(0)
    b, text = size.latents[0], (size.text_tokens, size.text_dim)
    shapes = (size.latents, size.latents, (b, *text), (b, *text))
    latents, noise, prompt, negative = (
        torch.randn(s, generator=generator).to(device) for s in shapes
    )
    return Batch(
        latents, noise, prompt.to(size.dtype), negative[:1].to(size.dtype).expand(b, -1, -1)
    )


def models(size: Size, device: torch.device, seed: int = 0) -> tuple[Any, Any]:
    """Diffusers' model and ours, on the same random weights."""
    from diffusers import AnyFlowTransformer3DModel as Peer

    torch.manual_seed(seed)
    with device:
        peer, ours = Peer(**size.config()), AnyFlowTransformer3DModel(**size.config())
    ours.load_state_dict(peer.state_dict())
    return _cast(peer, size.dtype).to(device), _cast(ours, size.dtype).to(device)


def _cast(model: Any, dtype: torch.dtype) -> Any:
    """As ``from_pretrained`` would: what the class keeps in fp32 stays."""
    for name, parameter in model.named_parameters():
        if not set(model._keep_in_fp32_modules) & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model


def scheduler() -> FlowMapEulerDiscreteScheduler:
    """Of the published recipe, without the shift: times are meant as they are written here."""
    return FlowMapEulerDiscreteScheduler(TIMESTEPS, shift=1.0)


def _per_sample(u: Tensor) -> Tensor:
    return u.reshape(-1, 1, 1, 1, 1)


def _network(model: Any, dtype: torch.dtype) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """``u(x, t, r, text)`` for times in [0, 1], one of each per frame; the result is fp32."""

    def evaluate(x: Tensor, t: Tensor, r: Tensor, text: Tensor) -> Tensor:
        frames = x.shape[1]
        times = [(TIMESTEPS * u.float())[:, None].expand(-1, frames) for u in (t, r)]
        return model(x.to(dtype), *times, text, return_dict=False)[0].float()

    return evaluate


def pretrain_step(
    model: Any, size: Size, data: Batch, t: Tensor, r: Tensor, guidance: float, epsilon: float
) -> Any:
    """Compute the pretrain loss as the peers do: four evaluations of the batch, the difference
    times t - r = 0.
    """
    network, weights, is_diffusion = (
        _network(model, size.dtype),
        scheduler().get_train_weight(t * TIMESTEPS),
        t == r,
    )
    weights = weights.to(t)

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        x0, noise, e = data.latents, data.noise, epsilon / TIMESTEPS
        v = noise - x0
        x_t = _per_sample(1 - t) * x0 + _per_sample(t) * noise
        cond = network(x_t, t, r, data.prompt)
        with torch.no_grad():
            uncond = network(x_t, t, r, data.negative)
            slope = network(x_t + e * v, t + e, r, data.prompt) - network(
                x_t - e * v, t - e, r, data.prompt
            )
            target = v - _per_sample(t - r) * slope / (2 * e * guidance)
        pred = (cond - (1 - guidance) * uncond) / guidance
        loss = weights * (pred - target).square().flatten(1).mean(1)
        mean = loss.detach()[is_diffusion].mean()
        loss = (
            loss * torch.where(is_diffusion, torch.ones_like(loss), mean / (loss.detach() + 1e-5))
        ).mean()
        loss.backward()
        return loss.detach()

    return step


@dataclass(frozen=True)
class OnPolicy:
    """What the generator's and the critic's step draw, fixed: the rollout's times, the score's time
    and noise.
    """

    sigmas: tuple[float, ...]
    t: Tensor
    noise: Tensor
    guidance: float


def _rollout(network: Any, x: Tensor, sigmas: tuple[float, ...], text: Tensor) -> Tensor:
    """The flow map along a few times from noise to data, one evaluation from each to the next."""
    for start, end in pairwise(sigmas):
        t, r = (torch.full((len(x),), u, device=x.device) for u in (start, end))
        x = x - (start - end) * network(x, t, r, text)
    return x


def generator_step(
    student: Any, teacher: Any, critic: Any, size: Size, data: Batch, draws: OnPolicy
) -> Any:
    """Compute the DMD2 loss as the peers do: the teacher's scores in two evaluations, clean
    differences.
    """
    networks = [_network(m, size.dtype) for m in (student, teacher, critic)]
    t, guidance = draws.t, draws.guidance

    def step() -> Tensor:
        student.zero_grad(set_to_none=True)
        samples = _rollout(networks[0], data.noise, draws.sigmas, data.prompt)
        with torch.no_grad():
            x = samples.detach()
            x_t = _per_sample(1 - t) * x + _per_sample(t) * draws.noise
            fake = x_t - _per_sample(t) * networks[2](x_t, t, t, data.prompt)
            cond = x_t - _per_sample(t) * networks[1](x_t, t, t, data.prompt)
            uncond = x_t - _per_sample(t) * networks[1](x_t, t, t, data.negative)
            real = cond + guidance * (cond - uncond)
            gradient = (fake - real) / _per_sample((x - real).abs().flatten(1).mean(1))
        loss = (samples - (x - gradient)).square().mean()
        loss.backward()
        return loss.detach()

    return step


def critic_step(student: Any, critic: Any, size: Size, data: Batch, draws: OnPolicy) -> Any:
    """Compute the flow matching loss of the critic on a fresh rollout."""
    rollout, score, t = _network(student, size.dtype), _network(critic, size.dtype), draws.t

    def step() -> Tensor:
        critic.zero_grad(set_to_none=True)
        with torch.no_grad():
            x = _rollout(rollout, data.noise, draws.sigmas, data.prompt)
        x_t = _per_sample(1 - t) * x + _per_sample(t) * draws.noise
        loss = (score(x_t, t, t, data.prompt) - (draws.noise - x)).square().mean()
        loss.backward()
        return loss.detach()

    return step


def without_gradient(step: Callable[[], Any]) -> Callable[[], Any]:
    """A step of inference."""

    def quiet() -> Any:
        with torch.no_grad():
            return step()

    return quiet


def compiled(model: nn.Module) -> nn.Module:
    """torch.compile of a module that stays as it is itself; what was compiled before is
    forgotten.
    """
    torch._dynamo.reset()
    return torch.compile(model)
