"""Count the memory of each process of a run, on networks without memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from anyflow.models import AnyFlowTransformer3DModel
from anyflow.models.blocks import AnyFlowTransformerBlock
from anyflow.training.activations import block_bytes
from anyflow.training.config import Recipe
from anyflow.training.updates import pretrain_config

FP32 = 4  # bytes


@dataclass(frozen=True)
class Memory:
    """Hold the bytes on each GPU, beside those of CUDA, NCCL and the allocator's fragments.

    Args:
        weights: this process's share of every network, in fp32.
        gradients: its share of the gradients of what trains.
        optimizer: its share of AdamW's two moments.
        average: its share of the student's average.
        gathered: whole parameters of two blocks and of what is outside of the blocks, and a block's
            whole gradients.
        kept: the inputs of all blocks that backward starts again from, or without activation
            checkpointing all that backward needs.
        working: what one block makes and keeps while it runs.
    """

    weights: int
    gradients: int
    optimizer: int
    average: int
    gathered: int
    kept: int
    working: int

    @property
    def total(self) -> int:
        """Return the sum."""
        return sum(dataclasses.astuple(self))


def trained_parameters(network: nn.Module) -> Iterator[nn.Parameter]:
    """Return the parameters that train."""
    return (p for p in network.parameters() if p.requires_grad)


def count_memory(
    recipe: Recipe,
    networks: dict[str, AnyFlowTransformer3DModel],
    shards: int,
    tokens: int,
    text_tokens: int,
) -> Memory:
    """Count the memory of each process.

    Args:
        recipe: the run.
        networks: ``student``, ``teacher`` and ``critic``, on the meta device.
        shards: processes that parameters are sharded over.
        tokens: tokens of a video.
        text_tokens: tokens of a prompt.
    """
    sharded = {
        name: sum(shard_elements(p, shards) for p in trained_parameters(network))
        for name, network in networks.items()
    }
    gathered = 0
    if shards > 1:
        for network in networks.values():
            blocks = [sum(p.numel() for p in block.parameters()) for block in network.blocks]
            trained = max(
                sum(p.numel() for p in trained_parameters(block)) for block in network.blocks
            )
            rest = sum(p.numel() for p in network.parameters()) - sum(blocks)
            gathered = max(gathered, 2 * max(blocks) + rest + trained)
    kept, working = _activations(
        recipe, networks, -(-tokens // recipe.parallel.sequence), text_tokens
    )
    return Memory(
        weights=FP32
        * sum(
            shard_elements(p, shards) for network in networks.values() for p in network.parameters()
        ),
        gradients=FP32 * sum(sharded.values()),
        optimizer=2 * FP32 * sum(sharded.values()),
        average=FP32 * sharded["student"],
        gathered=FP32 * gathered,
        kept=kept,
        working=working,
    )


def shard_elements(parameter: Tensor, shards: int) -> int:
    """Return the elements of the largest shard, as FSDP cuts along the first dimension."""
    rows = parameter.shape[0] if parameter.ndim else 1
    return -(-rows // shards) * (parameter.numel() // rows)


def _activations(
    recipe: Recipe, networks: dict[str, AnyFlowTransformer3DModel], tokens: int, text_tokens: int
) -> tuple[int, int]:
    """Return the bytes that graphs keep and those that a block takes, where the sum is largest."""
    batch = recipe.data.batch_size
    student = networks["student"]

    def graph(network: AnyFlowTransformer3DModel, evaluations: int) -> tuple[int, int]:
        kept, working = block_bytes(
            cast(AnyFlowTransformerBlock, network.blocks[0]),
            batch,
            tokens,
            text_tokens,
            recipe.precision,
        )
        layers = len(network.blocks)
        if recipe.activation_checkpointing:
            return evaluations * layers * kept, working
        return (evaluations * layers - 1) * working, working

    if recipe.on_policy is None:
        moments = [graph(student, 1)]
        kept_rollout, has_data = 0, True
    else:
        method = recipe.on_policy.method
        has_data = method.cotrain_pretrain
        rollout = 3 if (method.rollout, method.grad_through) == ("shortcut", "all") else 1
        guided = batch if method.real_guidance_scale == 0 else 2 * batch
        kept_rollout = graph(student, rollout)[0]
        moments = [
            graph(student, rollout + has_data),
            graph(networks["critic"], 1),
            (
                kept_rollout,
                _without_gradient(networks["teacher"], recipe, guided, tokens, text_tokens),
            ),
        ]
    config = pretrain_config(recipe)
    # x+ and x- where r != t, and the unconditional x_t, in one call
    if has_data and not config.is_flow_matching:
        together = 2 * batch + (batch if config.fuse_guidance_scale != 1 else 0)
        moments.append(
            (kept_rollout, _without_gradient(student, recipe, together, tokens, text_tokens))
        )
    return max(moments, key=sum)


def _without_gradient(
    network: AnyFlowTransformer3DModel, recipe: Recipe, batch: int, tokens: int, text_tokens: int
) -> int:
    block = cast(AnyFlowTransformerBlock, network.blocks[0])
    return block_bytes(block, batch, tokens, text_tokens, recipe.precision, gradient=False)[1]
