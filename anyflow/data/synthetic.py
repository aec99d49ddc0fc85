"""Serve the quickstart's moving shapes as a training dataset, without files or a text encoder."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from anyflow.data.moving_shapes import MovingShapes
from anyflow.data.sample import Sample
from anyflow.data.space_time import pixel_shuffle_3d, pixel_unshuffle_3d

_TOKENS = 4
_TEXT_DIM = 32
_SEED = 7


class SyntheticVideos:
    """Hold every video of :class:`MovingShapes`, folded into latents.

    Sample i is of class ``i // (size * size)``.

    The prompt of a class is fixed random tokens, the negative prompt is zeros: a prompt that no
    class has. The quickstart trains on this set (:class:`anyflow.demo.World`).

    Attributes:
        shapes: the set of videos.
        prompts: prompts of each class, ``[4, 4, 32]``.
    """

    def __init__(self) -> None:
        self.shapes = shapes = MovingShapes()
        bank = shapes.templates()
        self._latents = pixel_unshuffle_3d(bank.flatten(0, 1))
        self._per_class = bank.shape[1]
        generator = torch.Generator().manual_seed(_SEED)
        self.prompts = torch.randn(shapes.num_classes, _TOKENS, _TEXT_DIM, generator=generator)
        # Of what defines the values, not of the values: another machine may round one of them
        # differently.
        facts = f"moving shapes 1: {shapes.config}, {_TOKENS} x {_TEXT_DIM} tokens of seed {_SEED}"
        self._fingerprint = hashlib.blake2b(facts.encode(), digest_size=16).hexdigest()

    def __len__(self) -> int:
        return len(self._latents)

    def __getitem__(self, index: int, /) -> Sample:
        return Sample(self._latents[index], self.prompts[index // self._per_class])

    def caption(self, index: int, /) -> str:
        """Return the class of a sample, such as ``disc right``."""
        return self.class_names[index // self._per_class]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the class of each prompt: ``disc right`` and three more."""
        return self.shapes.class_names

    @staticmethod
    def decode(latents: Tensor) -> Tensor:
        """Unfold latents ``[B, 4, 8, 6, 6]`` to videos ``[B, 8, 1, 12, 12]``, fp32 on the CPU."""
        return pixel_shuffle_3d(latents).float().cpu()

    @property
    def negative_prompt_embeds(self) -> Tensor:
        """Return zeros, ``[1, 4, 32]``."""
        return torch.zeros(1, _TOKENS, _TEXT_DIM)

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """Return ``(4, 8, 6, 6)``."""
        frames, channels, height, width = self._latents.shape[1:]
        return frames, channels, height, width

    @property
    def text_shape(self) -> tuple[int, int]:
        """Return ``(4, 32)``."""
        return _TOKENS, _TEXT_DIM

    @property
    def fingerprint(self) -> str:
        """Identify what defines the videos and the prompts."""
        return self._fingerprint
