"""Count the model FLOPs of an update by its networks, its data and what was drawn for it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from anyflow.data import Batch
from anyflow.methods import AnyFlowOnPolicyMethod, AnyFlowPretrainMethod, PretrainConfig
from anyflow.models import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel
from anyflow.models.chunks import ChunkPartition
from anyflow.training.flops import (
    ChunkFlops,
    NetworkFlops,
    OnPolicyFlops,
    chunk_flops,
    network_flops,
    pretrain_flops,
    token_count,
)


class UpdateFlops:
    """Count the FLOPs of updates on all ranks together.

    The cost of a sample is kept: counting walks all modules of a network.

    Args:
        networks: the student first; the teacher and the critic where there are any.
        data_world: number of ranks with samples of their own.
    """

    def __init__(self, *networks: AnyFlowTransformer3DModel, data_world: int) -> None:
        self._networks, self._data_world = networks, data_world
        self._counted = functools.cache(self._count)
        self._counted_chunks = functools.cache(self._count_chunks)

    def pretrain(
        self, batches: Sequence[Batch], method: AnyFlowPretrainMethod, shared: Mapping[str, Any]
    ) -> int:
        """Count an update of the pretrain loss.

        Args:
            batches: one for each micro-step.
            method: the loss.
            shared: what was drawn for all micro-steps: ``num_chunks`` and ``bidirectional`` of a
                causal student.
        """
        student, *teacher = self._counted(*_sizes(batches))
        added, context = None, 0
        if method.chunks is not None:
            drawn = shared["num_chunks"], shared["bidirectional"]
            counted = self._counted_chunks(method.chunks, *_sizes(batches), *drawn)
            student, added = counted.training, counted.bidirectional
            context = counted.context
        return pretrain_flops(
            student,
            *teacher,
            config=method.config,
            samples=self._samples(batches),
            bidirectional=added,
            context=context,
        )

    def on_policy(
        self,
        batches: Sequence[Batch],
        method: AnyFlowOnPolicyMethod,
        pretrain: PretrainConfig,
        shared: Mapping[str, Any],
    ) -> OnPolicyFlops:
        """Return the count of the losses of an update of stage 2.

        Args:
            batches, shared: as for :meth:`pretrain`; ``shared`` is empty without that loss.
            method: the losses.
            pretrain: the loss that co-training adds.
        """
        student, teacher, critic = self._counted(*_sizes(batches))
        chunks = None
        if method.chunks is not None:
            drawn = shared.get("num_chunks", 1), shared.get("bidirectional", False)
            chunks = self._counted_chunks(method.chunks, *_sizes(batches), *drawn)
            student = chunks.step
        samples = self._samples(batches)
        return OnPolicyFlops(student, teacher, critic, method.config, pretrain, samples, chunks)

    def _samples(self, batches: Sequence[Batch]) -> int:
        return sum(len(batch.latents) for batch in batches) * self._data_world

    def _count(self, latent_shape: tuple[int, ...], text_tokens: int) -> list[NetworkFlops]:
        return [
            network_flops(network, token_count(network, latent_shape), text_tokens)
            for network in self._networks
        ]

    def _count_chunks(
        self,
        partition: ChunkPartition,
        latent_shape: tuple[int, ...],
        text_tokens: int,
        num_chunks: int,
        bidirectional: bool,
    ) -> ChunkFlops:
        student = self._networks[0]
        assert isinstance(student, AnyFlowFARTransformer3DModel)
        return chunk_flops(
            student,
            partition,
            latent_shape,
            text_tokens,
            num_chunks=num_chunks,
            bidirectional=bidirectional,
        )


def _sizes(batches: Sequence[Batch]) -> tuple[tuple[int, ...], int]:
    """Return the shape of a video's latents, and the tokens of its prompt."""
    return tuple(batches[0].latents.shape[1:]), batches[0].prompt_embeds.shape[1]
