"""Define the networks that are measured, each with the video that it is run on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

PATCH = (1, 2, 2)  # frames, height, width
COMPRESSED_PATCH = (1, 4, 4)  # of the causal model's early frames


@dataclass(frozen=True)
class NetworkSize:
    """Describe a transformer and the batch of videos that it is given.

    Attributes:
        name: as published, or a word.
        heads, head_dim: H and Dh; the width is D = H Dh.
        layers: number of blocks.
        ffn_dim: hidden width of the feed-forward layers.
        text_dim, text_tokens: shape of a prompt's embeddings.
        freq_dim: width of the sinusoidal embedding of a time.
        latents: (frames, channels, height, width) of a sample.
        batch: number of samples.
        dtype: of weights and activations.
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
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16

    @property
    def dim(self) -> int:
        """Return D."""
        return self.heads * self.head_dim

    @property
    def frames(self) -> int:
        """Return the number of latent frames."""
        return self.latents[0]

    @property
    def grid(self) -> tuple[int, ...]:
        """Return the numbers of patches along frames, height and width."""
        frames, _, height, width = self.latents
        return tuple(n // p for n, p in zip((frames, height, width), PATCH, strict=True))

    @property
    def tokens(self) -> int:
        """Return L, the patches of a sample."""
        return math.prod(self.grid)

    @property
    def patch_values(self) -> int:
        """Return how many numbers a patch has."""
        return self.latents[1] * math.prod(PATCH)

    @property
    def parameters(self) -> int:
        """Count the parameters of all linear layers with their biases, norms and tables."""
        d, f = self.dim, self.ffn_dim
        block = 8 * d * d + 8 * d + 2 * d * f + f + d + 4 * d + 2 * d + 6 * d
        times = 2 * (self.freq_dim * d + d + d * d + d) + 6 * d * d + 6 * d
        text = self.text_dim * d + d + d * d + d
        ends = 2 * self.patch_values * d + d + self.patch_values + 2 * d
        return self.layers * block + times + text + ends

    def config(self) -> dict[str, Any]:
        """Return the arguments of the model's class, which are the same for ours and diffusers'."""
        return {
            "patch_size": PATCH,
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_dim,
            "in_channels": self.latents[1],
            "out_channels": self.latents[1],
            "text_dim": self.text_dim,
            "freq_dim": self.freq_dim,
            "ffn_dim": self.ffn_dim,
            "num_layers": self.layers,
        }


@dataclass(frozen=True)
class CausalSize(NetworkSize):
    """Describe a causal transformer, whose videos are cut into chunks.

    Attributes:
        chunk_partition: latent frames of each chunk.
        full_chunk_limit: L, the chunks that are full.
    """

    chunk_partition: tuple[int, ...] = (1, 3, 3, 3, 3, 3, 3, 2)
    full_chunk_limit: int = 3

    @property
    def frame_tokens(self) -> int:
        """Return P, the tokens of a full frame."""
        return self.tokens // self.frames

    @property
    def compressed_frame_tokens(self) -> int:
        """Return P', the tokens of a compressed frame."""
        _, _, height, width = self.latents
        return (height // COMPRESSED_PATCH[1]) * (width // COMPRESSED_PATCH[2])

    @property
    def compressed_patch_values(self) -> int:
        """Return how many numbers a compressed patch has."""
        return self.latents[1] * math.prod(COMPRESSED_PATCH)

    @property
    def parameters(self) -> int:
        """Count the parameters, with those of the compressed patch embedding."""
        return super().parameters + self.compressed_patch_values * self.dim + self.dim

    def config(self) -> dict[str, Any]:
        """Return the arguments of the causal model's class, ours or diffusers'."""
        chunks = {
            "compressed_patch_size": COMPRESSED_PATCH,
            "full_chunk_limit": self.full_chunk_limit,
            "chunk_partition": self.chunk_partition,
        }
        return super().config() | chunks


_CPU_SHAPES = {"head_dim": 64, "text_dim": 128, "text_tokens": 32, "dtype": torch.float32}
_TINY_SHAPES = {"head_dim": 32, "text_dim": 64, "text_tokens": 16, "freq_dim": 32}


def _on_cpu(name: str, heads: int, layers: int, ffn_dim: int, **changed: Any) -> NetworkSize:
    return NetworkSize(name, heads, layers, ffn_dim, **{**_CPU_SHAPES, **changed})


def _tiny(name: str, heads: int, layers: int, ffn_dim: int) -> NetworkSize:
    return _on_cpu(name, heads, layers, ffn_dim, latents=(3, 16, 8, 12), **_TINY_SHAPES)


def _causal_on_cpu(partition: tuple[int, ...], height: int, width: int) -> CausalSize:
    shapes = {"latents": (sum(partition), 16, height, width), **_CPU_SHAPES}
    return CausalSize("small", 6, 4, 1536, chunk_partition=partition, **shapes)


SMALL = _on_cpu("small", 6, 4, 1536, latents=(5, 16, 32, 32))  # 1280 tokens
SMALL_BATCH = _on_cpu("small", 6, 4, 1536, latents=(3, 16, 32, 32), batch=4)  # 768 a sample
SHORT_BATCH = _on_cpu("small", 6, 4, 1536, latents=(3, 16, 16, 16), batch=4)  # 192
MEDIUM = _on_cpu("110M", 12, 12, 3072, text_dim=1024, latents=(5, 16, 32, 32))
# 32760 tokens
PUBLISHED = {"1.3B": NetworkSize("1.3B", 12, 30, 8960), "14B": NetworkSize("14B", 40, 40, 13824)}
# The published networks in small, for runs that prove the code; their times mean nothing.
TINY = {"1.3B": _tiny("1.3B", 2, 2, 192), "14B": _tiny("14B", 3, 3, 256)}

# Chunks of a multiple of 128 tokens: diffusers' cached step attends to padding where they are not.
SMALL_CAUSAL = _causal_on_cpu((1, 3, 3, 3, 2), 16, 32)  # 128 tokens a frame, 32 compressed
SHORT_CAUSAL = _causal_on_cpu((2, 2, 2, 2), 16, 16)  # 64 and 16
# All chunks of the published partition, so narrow that attention has the share of FLOPs that it has
# at 1.3B; 128 tokens a frame, 32 compressed.
NARROW_CAUSAL = CausalSize("narrow", 2, 4, 768, latents=(21, 16, 16, 32), batch=4, **_CPU_SHAPES)
CAUSAL = {name: CausalSize(s.name, s.heads, s.layers, s.ffn_dim) for name, s in PUBLISHED.items()}
TINY_CAUSAL = {
    name: CausalSize(
        *(s.name, s.heads, s.layers, s.ffn_dim),
        latents=(7, 16, 8, 12),
        chunk_partition=(1, 2, 2, 1, 1),
        **{**_CPU_SHAPES, **_TINY_SHAPES},
    )
    for name, s in TINY.items()
}
