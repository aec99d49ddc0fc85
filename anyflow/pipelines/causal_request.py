"""Check what is asked of a causal model before a weight is loaded or a network run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from anyflow.models.chunks import ChunkPartition
from anyflow.models.configuration import CausalSettings
from anyflow.pipelines.layout import ModelLayout
from anyflow.pipelines.request import VideoRequest, nearest_sizes
from anyflow.schedulers import MAX_STEPS, FlowMapEulerDiscreteScheduler
from anyflow.utils.devices import resolve_device
from anyflow.utils.validation import brief, whole_number


@dataclass(frozen=True)
class CausalVideoRequest(VideoRequest):
    """Hold one call of the causal pipeline without its prompts, by the names of its arguments.

    ``num_inference_steps`` may be one number for each chunk, those of the context among them.

    Args:
        chunk_partition: latent frames of each chunk; None takes the model's.
        use_cache: False computes everything before a chunk anew in each evaluation.
        cache_window: most compressed chunks that are kept; None keeps all.
        cache_device: device that keys and values wait on; None is the model's.
        context_latents: number of latent frames that are given, where no pixels are.

    Raises:
        ValueError: a field is no such value, or they exclude each other.
    """

    chunk_partition: Sequence[int] | None = None
    use_cache: bool = True
    cache_window: int | None = None
    cache_device: torch.device | str | None = None
    context_latents: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.use_cache, bool):
            raise ValueError(f"use_cache must be True or False, got {brief(self.use_cache)}")
        if self.cache_window is not None:
            window = whole_number("cache_window", self.cache_window)
            object.__setattr__(self, "cache_window", window)
        if self.cache_device is not None:
            object.__setattr__(
                self,
                "cache_device",
                resolve_device(self.cache_device, "cache_device", computes=True),
            )
        for name in ("cache_window", "cache_device"):
            if not self.use_cache and getattr(self, name) is not None:
                raise ValueError(f"{name} is of the cache, and use_cache is False")

    def _checked_steps(self) -> int | list[int]:
        steps = self.num_inference_steps
        if not isinstance(steps, (list, tuple)):
            return super()._checked_steps()
        return [
            whole_number(f"num_inference_steps: chunk {chunk}", number, high=MAX_STEPS)
            for chunk, number in enumerate(steps)
        ]

    def check(self, layout: ModelLayout, *, batch_size: int = 1) -> None:
        """Check that a causal model can do it, as :meth:`VideoRequest.check`."""
        super().check(layout, batch_size=batch_size)
        partition = self.partition(layout)
        self._check_compressed(layout, partition)
        self.first_chunk(layout)
        steps = self.num_inference_steps
        if isinstance(steps, list) and not self._custom and len(steps) != len(partition):
            raise ValueError(
                f"num_inference_steps must be one number, or one for each of the {len(partition)} "
                f"chunks {partition.sizes}, got {brief(steps)}"
            )

    def partition(self, layout: ModelLayout) -> ChunkPartition:
        """Return the chunks, or raise a ValueError if they do not make up the video."""
        given = self.chunk_partition
        sizes = _settings(layout).chunk_partition if given is None else given
        partition = ChunkPartition(tuple(sizes) if isinstance(sizes, list) else cast(Any, sizes))
        frames, factor = layout.latent_frames(self.num_frames), layout.temporal_factor
        if partition.num_frames != frames:
            whose = "the model's chunk_partition" if given is None else "chunk_partition"
            raise ValueError(
                f"{whose} {partition.sizes} has {partition.num_frames} latent frames, and "
                f"num_frames={self.num_frames} makes {frames}: give a chunk_partition whose sum is "
                f"{frames}, or num_frames={factor * (partition.num_frames - 1) + 1}; "
                f"{_fitting(partition, frames)}"
            )
        return partition

    def first_chunk(self, layout: ModelLayout) -> int:
        """Return the number of chunks that are given, of whose frames the last ends a chunk.

        Raises:
            ValueError: the frames given end inside a chunk, or are the whole video.
        """
        latents = self.context_latents
        if self.context_frames:
            latents = layout.latent_frames(self.context_frames)
        if not latents:
            return 0
        partition = self.partition(layout)
        allowed = partition.ends[1:-1]
        if latents in allowed:
            return allowed.index(latents) + 1
        factor = layout.temporal_factor
        if self.context_frames:
            got = f"{self.context_frames} frames"
            numbers = ", ".join(str(factor * (end - 1) + 1) for end in allowed)
        else:
            got, numbers = f"{latents} latent frames", ", ".join(map(str, allowed))
        raise ValueError(
            f"first frames must end with a chunk before the last one: got {got}, and "
            f"chunk_partition {partition.sizes} allows {numbers or 'none, as it is one chunk'}"
        )

    def require_schedule(self, scheduler: FlowMapEulerDiscreteScheduler) -> None:
        """Raise a ValueError for a schedule that is none."""
        self.schedules(scheduler, 1)

    def schedules(self, scheduler: FlowMapEulerDiscreteScheduler, chunks: int) -> list[Tensor]:
        """Return the sigmas of each chunk, fp64 with the terminal 0, or raise a ValueError."""
        steps = None if self._custom else self.num_inference_steps
        numbers = steps if isinstance(steps, list) else [steps] * chunks
        return [
            scheduler.schedule(number, sigmas=self.sigmas, timesteps=self.timesteps)  # type: ignore[arg-type]
            for number in numbers
        ]

    @property
    def _custom(self) -> bool:
        return self.sigmas is not None or self.timesteps is not None

    def _check_compressed(self, layout: ModelLayout, partition: ChunkPartition) -> None:
        causal = _settings(layout)
        if len(partition) <= causal.full_chunk_limit:
            return
        for name, patch in zip(("height", "width"), causal.compressed_patch_size[1:], strict=True):
            multiple, size = patch * layout.spatial_factor, getattr(self, name)
            if size % multiple:
                raise ValueError(
                    f"{name} must be a multiple of {multiple} where frames are compressed, which "
                    f"{len(partition)} chunks need (up to {causal.full_chunk_limit} do not), got "
                    f"{size}{nearest_sizes(size, multiple, 0)}"
                )


def _fitting(partition: ChunkPartition, frames: int) -> str:
    """Say which chunks, that resemble others, make up a number of latent frames."""
    sizes = [min(partition.sizes[0], frames)]
    while (left := frames - sum(sizes)) > 0:
        sizes.append(min(max(partition.sizes), left))
    return f"{tuple(sizes)} fits (--chunks {','.join(map(str, sizes))})"


def _settings(layout: ModelLayout) -> CausalSettings:
    if layout.causal is None:
        raise ValueError("chunks are of causal models, and this model is bidirectional")
    return layout.causal
