"""Plan the chunks of a causal model's videos before a weight is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from anyflow.formats.architecture import (
    ANYFLOW_FAR,
    CAUSAL_KEYS,
    FAR_WAN,
    CausalSettings,
    parse_config,
)
from anyflow.formats.readers import read_header
from anyflow.models.chunks import ChunkPartition
from anyflow.pipelines.layout import ModelLayout
from anyflow.pipelines.step_budgets import StepBudget, steps_of_chunks
from anyflow.utils.documents import read_json, shortened


def causal_settings(folder: Path) -> CausalSettings | None:
    """Return the settings of a causal transformer by its configuration and headers.

    Args:
        folder: with ``config.json`` and files of weights; a broken one is left to the loader.

    Returns:
        None for a bidirectional transformer.

    Raises:
        ValueError: the configuration, or a file of weights, is damaged.
    """
    file = folder / "config.json"
    raw = read_json(file) if os.path.lexists(file) else None
    if not isinstance(raw, Mapping) or raw.get("_class_name") not in (ANYFLOW_FAR, FAR_WAN):
        return None
    config = parse_config(raw, shortened(file))
    causal = _has_causal_tensors(folder) if config.causal is None else config.causal
    return CausalSettings(**config.causal_settings) if causal else None


def _has_causal_tensors(folder: Path) -> bool:
    files = sorted(folder.glob("*.safetensors"))
    return any(name.startswith(CAUSAL_KEYS) for file in files for name in read_header(file))


@dataclass(frozen=True)
class ChunkPlan:
    """Hold the chunks of a video, those of its first frames among them.

    Args:
        partition: latent frames of each chunk.
        temporal_factor: frames for each latent frame after the first.
    """

    partition: ChunkPartition
    temporal_factor: int

    @classmethod
    def of(
        cls,
        causal: CausalSettings,
        layout: ModelLayout,
        *,
        height: int,
        width: int,
        num_frames: int,
        chunks: Sequence[int] | None,
    ) -> ChunkPlan:
        """Plan the chunks of a video.

        Args:
            causal: settings of the transformer.
            layout: layout of the model.
            height, width: in pixels.
            num_frames: frames of the video, 4k + 1.
            chunks: latent frames of each chunk; None takes the model's.

        Raises:
            ValueError: the chunks do not make up the video, or chunks that are compressed need
                another size.
        """
        own = chunks is None
        partition = ChunkPartition(causal.chunk_partition if chunks is None else tuple(chunks))
        frames, factor = layout.latent_frames(num_frames), layout.temporal_factor
        if partition.num_frames != frames:
            whose = "the model's chunks" if own else "--chunks"
            raise ValueError(
                f"num_frames={num_frames} are {frames} latent frames, and {whose} "
                f"{_listed(partition.sizes)} have {partition.num_frames}: give chunks that fit, as "
                f"--chunks {_listed(_fitting(partition.sizes, frames))}, or "
                f"--num-frames {factor * (partition.num_frames - 1) + 1}"
            )
        if len(partition) > causal.full_chunk_limit:
            patches = causal.compressed_patch_size[1:]
            for name, size, patch in zip(
                ("height", "width"), (height, width), patches, strict=True
            ):
                if size % (multiple := patch * layout.spatial_factor):
                    lower = size // multiple * multiple
                    nearest = [str(n) for n in (lower, lower + multiple) if n]
                    raise ValueError(
                        f"{name} must be a multiple of {multiple} where chunks are compressed, "
                        f"which {len(partition)} chunks need, got {size}; the nearest are "
                        f"{' and '.join(nearest)}"
                    )
        return cls(partition, factor)

    @property
    def first_frame_counts(self) -> tuple[int, ...]:
        """Return the numbers of first frames that end with a chunk, ascending."""
        return tuple(self.temporal_factor * (end - 1) + 1 for end in self.partition.ends[1:-1])

    def first_chunk(self, first_frames: int) -> int:
        """Return the chunk that is sampled first, after first frames that are given.

        Raises:
            ValueError: they end inside of a chunk.
        """
        if first_frames == 0:
            return 0
        if first_frames not in self.first_frame_counts:
            raise ValueError(
                f"first frames must end with a chunk before the last one, got {first_frames}; "
                f"{self._allowed()}"
            )
        return self.first_frame_counts.index(first_frames) + 1

    def most_first_frames(self, available: int) -> int:
        """Return the most first frames, out of those available, that end with a chunk.

        Raises:
            ValueError: there are none.
        """
        fitting = [count for count in self.first_frame_counts if count <= available]
        if not fitting:
            raise ValueError(
                f"first frames must end with a chunk before the last one, and {available} can be "
                f"taken; {self._allowed()}"
            )
        return fitting[-1]

    def steps(self, budget: StepBudget, first_frames: int) -> list[int]:
        """Return the number of evaluations of each chunk that is sampled.

        Raises:
            ValueError: the budget is of more chunks.
        """
        return steps_of_chunks(budget, len(self.partition) - self.first_chunk(first_frames))

    def _allowed(self) -> str:
        sizes = _listed(self.partition.sizes)
        if not (counts := self.first_frame_counts):
            return f"chunks {sizes} allow none, there is one chunk only"
        return f"chunks {sizes} allow {', '.join(map(str, counts))}"


def _listed(sizes: Sequence[int]) -> str:
    return ",".join(map(str, sizes))


def _fitting(sizes: Sequence[int], frames: int) -> list[int]:
    """Return chunks for a number of latent frames that resemble others."""
    fitting = [min(sizes[0], frames)]
    while (left := frames - sum(fitting)) > 0:
        fitting.append(min(max(sizes), left))
    return fitting
