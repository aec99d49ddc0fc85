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
from anyflow.models import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel
from anyflow.models.blocks import AnyFlowTransformerBlock
from anyflow.models.chunks import (
    ChunkPartition,
    FrameTokens,
    QueryGroup,
    TokenLayout,
    chunk_layout,
    encoding_layout,
    step_layout,
)

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


@dataclass(frozen=True)
class TokenWork:
    """Hold what an evaluation does with tokens, by counts.

    Args:
        full: tokens that go through the patch embedding.
        compressed: tokens of the causal model's compressed frames.
        outputs: tokens that the last block and the last projection compute.
        pairs: queries times keys of a block's self-attention, and of the last block's.
        times: times that are embedded.
    """

    full: int
    compressed: int
    outputs: int
    pairs: tuple[int, int]
    times: int = 1

    @property
    def tokens(self) -> int:
        """Return L, all tokens."""
        return self.full + self.compressed

    @classmethod
    def of_video(cls, tokens: int) -> TokenWork:
        """Return the work of a bidirectional evaluation, where all tokens see all."""
        return cls(tokens, 0, tokens, (tokens * tokens,) * 2)

    @classmethod
    def of_layout(cls, layout: TokenLayout, frame: FrameTokens, past: int = 0) -> TokenWork:
        """Return the work of one evaluation of the causal model.

        Args:
            layout: its tokens.
            frame: tokens of a frame.
            past: cached keys, which all tokens see.
        """
        full, compressed = (
            sum(frame.count(s.num_frames, kind) for s in layout.segments if s.compressed == kind)
            for kind in (False, True)
        )
        tokens = full + compressed
        outputs = layout.outputs[1] - layout.outputs[0]

        def pairs(groups: Sequence[QueryGroup], queries: int) -> int:
            if not layout.groups:
                return queries * (tokens + past)
            return sum(_length(g.queries) * sum(map(_length, g.keys)) for g in groups)

        both = pairs(layout.groups, tokens), pairs(layout.last_groups(), outputs)
        agree = len(layout.segments) == 1 or outputs == 0  # one time for all frames
        times = 1 if agree else sum(s.num_frames for s in layout.segments)
        return cls(full, compressed, outputs, both, times)


def network_flops(
    network: AnyFlowTransformer3DModel, tokens: int | TokenWork, text_tokens: int
) -> NetworkFlops:
    """Count by the shapes of a network's weights, sharded ones and adapters too.

    Args:
        network: what of it trains decides what backward costs.
        tokens: L, of a video that is evaluated as a whole, or the work of another evaluation.
        text_tokens: S, of a prompt.
    """
    work = TokenWork.of_video(tokens) if isinstance(tokens, int) else tokens
    text_trains = _trains(network.condition_embedder.text_embedder)
    time_trains = any(
        _trains(part)
        for name, part in network.condition_embedder.named_children()
        if "text" not in name
    )
    blocks = cast("list[AnyFlowTransformerBlock]", list(network.blocks))
    last = f"blocks.{len(blocks) - 1}."
    forward = backward = 0
    for name, module in network.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv3d) or "image_embedder" in name:
            continue
        count = _tokens_through(name, work, text_tokens, last)
        product = 2 * count * module.weight.numel()
        forward += product
        if _input_has_gradient(name, network, text_trains, time_trains):
            backward += product
        if module.weight.requires_grad:
            backward += product
    attention = 0
    for index, block in enumerate(blocks):
        ends = index == len(blocks) - 1
        queries, pairs = work.outputs if ends else work.tokens, work.pairs[ends]
        width = 4 * network.proj_out.in_features
        attention += width * (pairs + queries * text_tokens)
        keys_train = text_trains or _trains(block.attn2.to_k) or _trains(block.attn2.to_v)
        backward += 2 * width * pairs + (2 if keys_train else 1) * width * queries * text_tokens
    # Both factors of attention's products move, of a linear layer's only the input.
    return NetworkFlops(
        forward + attention, backward if _trains(network) else 0, forward + 2 * attention
    )


def _tokens_through(name: str, work: TokenWork, text_tokens: int, last: str) -> int:
    """Return the tokens that a layer computes; ``last`` begins the names of the last block."""
    if ".attn2.to_k" in name or ".attn2.to_v" in name:
        return 0 if name.startswith(last) and work.outputs == 0 else text_tokens
    if ".text_embedder." in name:
        return text_tokens
    if name.startswith("condition_embedder."):
        return work.times
    if name.startswith("far_patch_embedding"):
        return work.compressed
    if name.startswith("patch_embedding"):
        return work.full
    if name.startswith("proj_out"):
        return work.outputs
    if name.startswith(last) and ".attn1.to_k" not in name and ".attn1.to_v" not in name:
        return work.outputs
    return work.tokens


def _length(bounds: tuple[int, int]) -> int:
    return bounds[1] - bounds[0]


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
    return not name.startswith(("patch_embedding", "far_patch_embedding"))


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


@dataclass(frozen=True)
class ChunkFlops:
    """Hold the FLOPs of a causal student on one sample.

    Args:
        training: an evaluation of the pretrain loss, on the chunks that were drawn.
        step: one step of all chunks of a rollout.
        encoding: all encodings of a rollout, which have no gradient.
        bidirectional: an evaluation of the bidirectional loss, or None where none is added.
        context: the part of ``training``'s forward that is of clean frames.
    """

    training: NetworkFlops
    step: NetworkFlops
    encoding: int
    bidirectional: NetworkFlops | None
    context: int


def chunk_flops(
    network: AnyFlowFARTransformer3DModel,
    partition: ChunkPartition,
    latent_shape: Sequence[int],
    text_tokens: int,
    *,
    num_chunks: int,
    bidirectional: bool,
) -> ChunkFlops:
    """Count the evaluations of a causal student on one sample.

    Args:
        network: what of it trains decides what backward costs.
        partition: the chunks of the video.
        latent_shape: ``(F, C, H, W)``.
        text_tokens: S, of a prompt.
        num_chunks: n, the first chunks that the pretrain loss is on.
        bidirectional: whether the bidirectional loss is added.
    """
    limit, (_, height, width) = network.config.full_chunk_limit, network.config.patch_size
    _, far_height, far_width = network.config.compressed_patch_size
    frame = FrameTokens(
        latent_shape[2] // height,
        latent_shape[3] // width,
        (far_height // height, far_width // width),
    )

    def flops(layout: TokenLayout, past: int = 0) -> NetworkFlops:
        return network_flops(network, TokenWork.of_layout(layout, frame, past), text_tokens)

    cache = network.new_cache(partition.sizes)
    steps, encoding, compressed, full = [], 0, 0, 0  # keys that are cached
    for chunk in range(len(partition)):
        plan = cache.plan(chunk)
        if plan.chunks:
            layout = encoding_layout(partition, plan.compressed, plan.full, frame, compressed)
            encoding += flops(layout, compressed).forward
            compressed += sum(frame.count(partition.sizes[c], True) for c in plan.compressed)
            full = sum(frame.count(partition.sizes[c], False) for c in plan.full)
            cache.end(plan, chunk)
        steps.append(flops(step_layout(partition, chunk, frame), compressed + full))
    step = NetworkFlops(
        sum(s.forward for s in steps), sum(s.backward for s in steps), sum(s.tangent for s in steps)
    )
    whole = network_flops(network, token_count(network, latent_shape), text_tokens)
    layout = chunk_layout(partition.first(num_chunks), limit, frame, clean=True)
    training = flops(layout)
    context = training.forward - flops(layout.apart()[1]).forward
    return ChunkFlops(training, step, encoding, whole if bidirectional else None, context)


def pretrain_flops(
    student: NetworkFlops,
    teacher: NetworkFlops | None = None,
    *,
    config: PretrainConfig,
    samples: int,
    bidirectional: NetworkFlops | None = None,
    context: int = 0,
) -> int:
    """Count the pretrain loss of the samples of all ranks, with its gradients.

    Args:
        student: an evaluation of a sample; of a causal student on the chunks of the loss.
        teacher: gives the target.
        config: settings.
        samples: samples of all ranks.
        bidirectional: an evaluation of a causal student as a bidirectional model, where that loss
            is added.
        context: forward FLOPs of the clean frames that both ends of a central difference share.
    """
    guided = config.fuse_guidance_scale != 1
    total = samples * (
        student.forward + student.backward + (0 if teacher is None else teacher.forward)
    )
    if bidirectional is not None:
        total += samples * ((2 if guided else 1) * bidirectional.forward + bidirectional.backward)
    if config.is_flow_matching:
        return total
    if guided:
        total += samples * student.forward
    flow_map = samples - round(config.diffusion_ratio * samples)
    if config.derivative == "jvp":
        return total + flow_map * (student.forward + student.tangent)
    return total + flow_map * (2 * student.forward - context)


@dataclass(frozen=True)
class OnPolicyFlops:
    """Count the two losses of an update of stage 2.

    Args:
        student, teacher, critic: the networks.
        config: the method.
        pretrain: the loss that co-training adds.
        samples: samples of all ranks.
        chunks: evaluations of a causal student beside ``student``, which is then one step of all
            chunks; None for a bidirectional student.
    """

    student: NetworkFlops
    teacher: NetworkFlops
    critic: NetworkFlops
    config: OnPolicyConfig
    pretrain: PretrainConfig
    samples: int
    chunks: ChunkFlops | None = None

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
        total += self._encoding
        if not config.cotrain_pretrain:
            return self.samples * total
        target = self.teacher if self.pretrain.velocity_target == "teacher" else None
        return self.samples * total + pretrain_flops(
            self.student if self.chunks is None else self.chunks.training,
            target,
            config=self.pretrain,
            samples=self.samples,
            bidirectional=None if self.chunks is None else self.chunks.bidirectional,
            context=0 if self.chunks is None else self.chunks.context,
        )

    def critic_loss(self, rollout: RolloutDraw) -> int:
        """Count the critic's rollout and its loss, with its gradients."""
        samples = self._evaluations(rollout) * self.student.forward + self._encoding
        return self.samples * (samples + self.critic.forward + self.critic.backward)

    @property
    def _encoding(self) -> int:
        return 0 if self.chunks is None else self.chunks.encoding

    def _evaluations(self, rollout: RolloutDraw) -> int:
        num_steps, grad_step = rollout
        if self.config.rollout == "euler":
            return num_steps
        return len({0, grad_step, grad_step + 1, num_steps}) - 1
