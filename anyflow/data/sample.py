"""Define what a training dataset is and what it yields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """Hold one video, fp32 on the CPU.

    Args:
        latents: ``[F, C, H, W]``.
        prompt_embeds: ``[S, text_dim]``, zero-padded after encoding.
    """

    latents: Tensor
    prompt_embeds: Tensor


@dataclass(frozen=True)
class Batch:
    """Hold several videos, fp32 on the CPU.

    Args:
        latents: ``[B, F, C, H, W]``.
        prompt_embeds: ``[B, S, text_dim]``.
        index: index of the samples in the dataset.
    """

    latents: Tensor
    prompt_embeds: Tensor
    index: tuple[int, ...]


class VideoDataset(Protocol):
    """Describe a dataset of videos as latents, with their prompts encoded."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...

    def caption(self, index: int, /) -> str:
        """Return what a sample shows, in words."""
        ...

    @property
    def negative_prompt_embeds(self) -> Tensor:
        """Return ``[1, S, text_dim]`` of the prompt that stands for no prompt."""
        ...

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Return ``(F, C, H, W)`` of every video."""
        ...

    @property
    def text_shape(self) -> tuple[int, int]:
        """Return ``(S, text_dim)`` of every prompt."""
        ...

    @property
    def fingerprint(self) -> str:
        """Identify the samples and their order, so that a run resumes on no other dataset."""
        ...
