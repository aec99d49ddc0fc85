"""Configure the training of the causal model, and say what its noisy frames attend to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyflow.models.chunks import ChunkPartition
from anyflow.models.network import is_causal, unwrapped, velocity
from anyflow.utils.validation import SettingError, require_number


@dataclass(frozen=True)
class CausalConfig:
    """Hold the settings of training the causal model; the defaults are those of stage 1.

    Args:
        chunk_partition: latent frames of each chunk of a video; None takes the student's.
        long_context_ratio: chance that the pretrain loss is on the first n chunks with n uniform
            from L to all, where L is the student's ``full_chunk_limit``; else n = L. The n - L
            chunks before the last L are compressed.
        bidirectional_prob: chance that an update of the pretrain loss adds flow matching of the
            same weights without causality, on all frames (0.1 in the published stage 1, 0 in
            stage 2).

    Raises:
        SettingError: a value is out of range.
    """

    chunk_partition: tuple[int, ...] | None = None
    long_context_ratio: float = 0.5
    bidirectional_prob: float = 0.1

    def __post_init__(self) -> None:
        if self.chunk_partition is not None:
            object.__setattr__(self, "chunk_partition", ChunkPartition(self.chunk_partition).sizes)
        for name in ("long_context_ratio", "bidirectional_prob"):
            require_number(name, getattr(self, name))
            if not 0 <= getattr(self, name) <= 1:
                raise SettingError(name, f"must be in [0, 1], got {getattr(self, name)}")


def check_causal(student: Any, causal: CausalConfig | None) -> None:
    """Raise a ValueError unless a student is causal where the settings are, and only there."""
    if is_causal(student) == (causal is not None):
        return
    name = type(unwrapped(student)).__name__
    if causal is None:
        raise ValueError(
            f"the student is the causal model, {name}: its training needs causal=CausalConfig() in "
            "the settings of the method"
        )
    raise ValueError(
        "causal settings need the causal model as the student, an "
        f"anyflow.models.AnyFlowFARTransformer3DModel, got {name}"
    )


def training_partition(student: Any, causal: CausalConfig) -> ChunkPartition:
    """Return the chunks of a training video: those of the settings, or the student's own."""
    sizes = causal.chunk_partition
    return ChunkPartition(
        tuple(unwrapped(student).config.chunk_partition) if sizes is None else sizes
    )


@dataclass(frozen=True)
class ChunkContext:
    """Hold what the noisy frames of a batch attend to beside the frames of their own chunk.

    The last chunks are noisy; nothing here depends on their noise or time.

    Args:
        compressed: ``[B, F_c, C, H, W]`` clean latents of the chunks before them.
        clean: ``[B, F_f, C, H, W]`` clean latents of the noisy chunks.
        sizes: latent frames of each chunk, compressed ones first.
    """

    compressed: Tensor
    clean: Tensor
    sizes: tuple[int, ...]

    def velocity(
        self,
        network: Any,
        x: Tensor,
        timestep: Tensor,
        r_timestep: Tensor | None,
        text: Tensor,
        samples: Tensor | None = None,
        context_rows: Sequence[int] | None = None,
    ) -> Tensor:
        """Return ``u(x, t, r, c)`` of noisy frames, ``[b, F_f, C, H, W]`` in fp32 at least.

        Args:
            network: the causal model.
            x: ``[b, F_f, C, H, W]`` noisy frames.
            timestep, r_timestep: t and r, ``[b]``.
            text: ``[b, S, text_dim]``.
            samples: ``[b]`` indices of the samples that x is made of; None means all B.
            context_rows: for each row the one of the same sample and text whose context it shares.
        """
        compressed, clean = self.compressed, self.clean
        if samples is not None:
            compressed, clean = compressed[samples], clean[samples]
        return velocity(
            network,
            torch.cat([compressed.to(x.dtype), x], dim=1),
            timestep,
            r_timestep,
            text,
            chunk_partition=self.sizes,
            clean_hidden_states=clean,
            context_rows=context_rows,
        )
