"""Count the model FLOPs of training: the matrix products that an update needs.

A multiplication and an addition are two. Counted are linear layers, the patches' projection and
attention, forward and backward; norms, rotary embeddings and activations are left out, and so is
what activation checkpointing computes again (model FLOP utilization as PaLM has it, arXiv
2204.02311, appendix B).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn

from anyflow.methods import OnPolicyConfig, PretrainConfig, RolloutDraw
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.models.blocks import AnyFlowTransformerBlock

# Dense bf16 products by the vendors' data sheets, in FLOP/s; the first name that the device's own
# name contains counts.
_PEAKS = (
    ("B200", 2250e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("MI300X", 1307e12),
)


def peak_flops(device: str) -> float | None:
    """Return the peak FLOP/s of dense bf16 products of a device by its name, or None."""
    return next((peak for name, peak in _PEAKS if name in device), None)


def token_count(network: AnyFlowTransformer3DModel, latent_shape: Sequence[int]) -> int:
    """Return the tokens of a video, of latents ``(F, C, H, W)``."""
    frames, _, height, width = latent_shape
    pt, ph, pw = network.config.patch_size
    return (frames // pt) * (height // ph) * (width // pw)


@dataclass(frozen=True)
class NetworkFlops:
    """Hold the FLOPs of one evaluation of one sample.

    Args:
        forward: FLOPs of the evaluation.
        backward: FLOPs of its gradients, for the parameters that train; the latents' own gradient
            is left out.
        tangent: FLOPs that forward-mode differentiation adds to the evaluation.
    """

    forward: int
    backward: int
    tangent: int


def network_flops(
    network: AnyFlowTransformer3DModel, tokens: int, text_tokens: int
) -> NetworkFlops:
    """Count by the shapes of a network's weights, sharded ones and adapters too.

    Args:
        network: what of it trains decides what backward costs.
        tokens: L, of a video.
        text_tokens: S, of a prompt.
    """
    text_trains = _trains(network.condition_embedder.text_embedder)
    time_trains = any(
        _trains(part)
        for name, part in network.condition_embedder.named_children()
        if "text" not in name
    )
    forward = backward = 0
    for name, module in network.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv3d) or "image_embedder" in name:
            continue
        count = _tokens_through(name, tokens, text_tokens)
        product = 2 * count * module.weight.numel()
        forward += product
        if _input_has_gradient(name, network, text_trains, time_trains):
            backward += product
        if module.weight.requires_grad:
            backward += product
    attention = 0
    for block in cast("list[AnyFlowTransformerBlock]", list(network.blocks)):
        width = 4 * tokens * network.proj_out.in_features
        attention += width * (tokens + text_tokens)
        keys_train = text_trains or _trains(block.attn2.to_k) or _trains(block.attn2.to_v)
        backward += 2 * width * tokens + (2 if keys_train else 1) * width * text_tokens
    # Both factors of attention's products move, of a linear layer's only the input.
    return NetworkFlops(
        forward + attention, backward if _trains(network) else 0, forward + 2 * attention
    )


def _tokens_through(name: str, tokens: int, text_tokens: int) -> int:
    if ".text_embedder." in name or ".attn2.to_k" in name or ".attn2.to_v" in name:
        return text_tokens
    return 1 if name.startswith("condition_embedder.") else tokens


def _input_has_gradient(
    name: str, network: nn.Module, text_trains: bool, time_trains: bool
) -> bool:
    """Tell whether backward goes through a layer to what is before it."""
    if ".lora_B." in name:
        return True
    if ".attn2.to_k" in name or ".attn2.to_v" in name:
        return text_trains
    if name.startswith("condition_embedder."):
        if ".linear_2" in name:
            return _trains(
                network.get_submodule(name.partition(".linear_2")[0]).get_submodule("linear_1")
            )
        return "time_proj" in name and time_trains
    return not name.startswith("patch_embedding")


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def pretrain_flops(
    student: NetworkFlops,
    teacher: NetworkFlops | None = None,
    *,
    config: PretrainConfig,
    samples: int,
) -> int:
    """Count the pretrain loss of the samples of all ranks, with its gradients.

    ``teacher`` gives the target.
    """
    total = samples * (
        student.forward + student.backward + (0 if teacher is None else teacher.forward)
    )
    if config.is_flow_matching:
        return total
    if config.fuse_guidance_scale != 1:
        total += samples * student.forward
    flow_map = samples - round(config.diffusion_ratio * samples)
    if config.derivative == "jvp":
        return total + flow_map * (student.forward + student.tangent)
    return total + 2 * flow_map * student.forward


@dataclass(frozen=True)
class OnPolicyFlops:
    """Count the two losses of an update of stage 2.

    Args:
        student, teacher, critic: the networks.
        config: the method.
        pretrain: the loss that co-training adds.
        samples: samples of all ranks.
    """

    student: NetworkFlops
    teacher: NetworkFlops
    critic: NetworkFlops
    config: OnPolicyConfig
    pretrain: PretrainConfig
    samples: int

    def student_loss(self, rollout: RolloutDraw) -> int:
        """Count the rollout, the scores and the co-training loss, with their gradients."""
        evaluations, config = self._evaluations(rollout), self.config
        everywhere = config.rollout == "shortcut" and config.grad_through == "all"
        total = (
            evaluations * self.student.forward
            + (evaluations if everywhere else 1) * self.student.backward
        )
        total += (
            self.critic.forward
            + (1 if config.real_guidance_scale == 0 else 2) * self.teacher.forward
        )
        if not config.cotrain_pretrain:
            return self.samples * total
        target = self.teacher if self.pretrain.velocity_target == "teacher" else None
        return self.samples * total + pretrain_flops(
            self.student, target, config=self.pretrain, samples=self.samples
        )

    def critic_loss(self, rollout: RolloutDraw) -> int:
        """Count the critic's rollout and its loss, with its gradients."""
        samples = self._evaluations(rollout) * self.student.forward
        return self.samples * (samples + self.critic.forward + self.critic.backward)

    def _evaluations(self, rollout: RolloutDraw) -> int:
        num_steps, grad_step = rollout
        if self.config.rollout == "euler":
            return num_steps
        return len({0, grad_step, grad_step + 1, num_steps}) - 1
