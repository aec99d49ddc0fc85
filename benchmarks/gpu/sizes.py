"""Defines the networks that are measured: the published ones at 480x832, 81 frames, and tiny ones
like them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """Describes a transformer and the video it is run on.

    Attributes:
        name: as published.
        heads, head_dim: H and Dh; the width is D = H Dh.
        layers: number of blocks.
        ffn_dim: hidden width of the feed-forward layers.
        text_dim, text_tokens: of the prompt's embeddings.
        freq_dim: of the sinusoidal embedding of a time.
        latents: (frames, channels, height, width) of a sample.
        patch: (frames, height, width) of a patch.
    """

    name: str
    heads: int
    layers: int
    ffn_dim: int
    head_dim: int = 128
    text_dim: int = 4096
    text_tokens: int = 512
    freq_dim: int = 256
    latents: tuple[int, int, int, int] = (21, 16, 60, 104)  # 81 frames of 480x832 pixels
    patch: tuple[int, int, int] = (1, 2, 2)

    @property
    def dim(self) -> int:
        """Return D."""
        return self.heads * self.head_dim

    @property
    def frames(self) -> int:
        """Return the number of latent frames."""
        return self.latents[0]

    @property
    def tokens(self) -> int:
        """Return L, the patches of a sample."""
        frames, _, height, width = self.latents
        return frames * height * width // math.prod(self.patch)

    @property
    def patch_values(self) -> int:
        """Return how many numbers a patch has."""
        return self.latents[1] * math.prod(self.patch)

    @property
    def parameters(self) -> int:
        """Count the parameters of all linear layers with their biases, norms and tables."""
        d, f = self.dim, self.ffn_dim
        block = 8 * d * d + 8 * d + 2 * d * f + f + d + 4 * d + 2 * d + 6 * d
        times = 2 * (self.freq_dim * d + d + d * d + d) + 6 * d * d + 6 * d
        text = self.text_dim * d + d + d * d + d
        ends = 2 * self.patch_values * d + d + self.patch_values + 2 * d
        return self.layers * block + times + text + ends

    def config(self) -> dict[str, int | tuple[int, int, int]]:
        """Return the arguments of the model's class, ours and diffusers'."""
        return {
            "patch_size": self.patch,
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_dim,
            "in_channels": self.latents[1],
            "out_channels": self.latents[1],
            "text_dim": self.text_dim,
            "freq_dim": self.freq_dim,
            "ffn_dim": self.ffn_dim,
            "num_layers": self.layers,
        }


PUBLISHED = {"1.3B": Size("1.3B", 12, 30, 8960), "14B": Size("14B", 40, 40, 13824)}

_TINY_PROMPT_AND_VIDEO = {
    "text_dim": 64,
    "text_tokens": 16,
    "freq_dim": 32,
    "latents": (3, 16, 8, 12),
}
TINY = {
    "1.3B": Size("1.3B", 2, 2, 192, head_dim=32, **_TINY_PROMPT_AND_VIDEO),  # type: ignore[arg-type]
    "14B": Size("14B", 3, 3, 256, head_dim=32, **_TINY_PROMPT_AND_VIDEO),  # type: ignore[arg-type]
}


def sizes(tiny: bool) -> dict[str, Size]:
    """Return the networks by published name."""
    return TINY if tiny else PUBLISHED
