"""Draw how many chunks of a video a causal student sees, and take a batch apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from anyflow.methods.causal import CausalConfig, ChunkContext, training_partition
from anyflow.methods.collectives import broadcast_from_rank_zero
from anyflow.methods.pretrain_inputs import PretrainData
from anyflow.models.network import unwrapped
from anyflow.utils.rng import rand, resolve_generator


class TrainingChunks:
    """Hold the chunks of a training video, and draw which of them a loss is on.

    Args:
        student: the causal model.
        config: settings.
    """

    def __init__(self, student: Any, config: CausalConfig) -> None:
        self.partition = training_partition(student, config)
        self._limit = int(unwrapped(student).config.full_chunk_limit)
        self._config = config

    def draw_num_chunks(
        self, generator: torch.Generator | None = None, device: torch.device | None = None
    ) -> int:
        """Implement :meth:`AnyFlowPretrainMethod.draw_num_chunks`."""
        most = len(self.partition)
        least = min(self._limit, most)
        long, place = rand((2,), resolve_generator(generator, device)).tolist()
        drawn = least
        if long < self._config.long_context_ratio:
            drawn += min(int(place * (most - least + 1)), most - least)
        return int(broadcast_from_rank_zero([drawn], device or torch.device("cpu"))[0])

    def draw_bidirectional(
        self, generator: torch.Generator | None = None, device: torch.device | None = None
    ) -> bool:
        """Implement :meth:`AnyFlowPretrainMethod.draw_bidirectional`."""
        if self._config.bidirectional_prob == 0:
            return False
        coin = rand((1,), resolve_generator(generator, device)).tolist()
        shared = broadcast_from_rank_zero(coin, device or torch.device("cpu"))
        return shared[0] < self._config.bidirectional_prob

    def select(
        self, data: PretrainData, num_chunks: int | None, generator: torch.Generator
    ) -> PretrainData:
        """Return the noisy frames of the first chunks, and what they attend to.

        Args:
            data: all frames of the videos.
            num_chunks: n; drawn when None.
            generator: source of that draw.

        Raises:
            ValueError: the videos have other frames than the chunks, or fewer than n chunks.
        """
        partition, frames = self.partition, data.x0.shape[1]
        if partition.num_frames != frames:
            raise ValueError(
                f"latents must have the {partition.num_frames} frames of the chunks "
                f"{partition.sizes}, got {frames}"
            )
        if num_chunks is None:
            num_chunks = self.draw_num_chunks(generator, data.x0.device)
        if not 1 <= num_chunks <= len(partition):
            raise ValueError(f"num_chunks must be in [1, {len(partition)}], got {num_chunks}")
        chunks = partition.first(num_chunks)
        first = chunks.ends[chunks.num_compressed(self._limit)]
        noisy = slice(first, chunks.num_frames)
        context = ChunkContext(data.x0[:, :first], data.x0[:, noisy], chunks.sizes)
        return replace(data, x0=data.x0[:, noisy], noise=data.noise[:, noisy], context=context)
