"""Decode the latents of a video chunk by chunk, as the VAE decodes them at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor

from anyflow.pipelines.wan import decode_with


class ChunkDecoder:
    """Decode consecutive chunks of one video, or of a batch, with ``AutoencoderKLWan``.

    The frames of all chunks together are those of ``vae.decode`` on all latents. The VAE's decoder
    is causal: its convolutions need features of the last two latent frames, and this object keeps
    them between chunks. The VAE itself keeps nothing, so that it may decode other videos meanwhile,
    with its own methods or other objects of this class.

    The memory for a chunk does not depend on the chunks before it. Slices and tiles
    (``vae.enable_slicing``, ``vae.enable_tiling``) are those that are set at the first chunk; the
    features of all of them stay on the device, where ``vae.decode`` holds those of one at a time.

    Args:
        vae: the VAE, which may be offloaded by diffusers or accelerate.

    Raises:
        ValueError: the VAE is of another class.
    """

    def __init__(self, vae: Any) -> None:
        module = getattr(vae, "_orig_mod", vae)  # of torch.compile
        if not isinstance(module, AutoencoderKLWan):
            raise ValueError(
                f"chunks are decoded with an AutoencoderKLWan, got {type(module).__name__}"
            )
        self.vae = module
        self._parts: _Parts | None = None
        self._given: dict[str, object] = {}
        self._failed = False

    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next chunk.

        Args:
            latents: normalized latents ``[B, F', C, h, w]``, of any number of latent frames.

        Returns:
            Frames in [0, 1] of the VAE's dtype, ``[B, F, 3, H, W]``: four for each latent frame of
            Wan's VAEs, and one for the first latent frame of the video.

        Raises:
            ValueError: the latents are of another shape than the VAE's, or their sizes or the VAE's
                dtype are others than at the first chunk. The next chunk may still be decoded.
            FloatingPointError: the latents or the frames hold NaN or infinity.
            RuntimeError: an earlier chunk failed while the VAE ran, so that its features are lost.
        """
        if self._failed:
            raise RuntimeError(
                "an earlier chunk of this video failed in the VAE, and the chunks after it cannot "
                "be decoded; decode the video from its first chunk with a new ChunkDecoder"
            )
        self._check(latents)
        if self._parts is None:
            self._parts = _Parts(self.vae, *latents.shape[-2:])
        self._failed = True
        frames = decode_with(self.vae, latents, self._decode)
        self._failed = False
        return frames

    def _check(self, latents: Tensor) -> None:
        channels = self.vae.config.z_dim
        if latents.ndim != 5 or 0 in latents.shape or latents.shape[2] != channels:
            raise ValueError(
                f"latents must be [B, F', C={channels}, h, w], got {tuple(latents.shape)}"
            )
        batch, _, _, height, width = latents.shape
        given = {"B": batch, "h": height, "w": width, "dtype of the VAE": self.vae.dtype}
        if not self._given:
            self._given = given
        for name, value in given.items():
            if value != self._given[name]:
                raise ValueError(
                    f"the first chunk of this video had {name}={self._given[name]}, and a later "
                    f"one must have it too, got {value}"
                )

    def _decode(self, latents: Tensor) -> Tensor:
        assert self._parts is not None
        return _run(self.vae, latents, self._parts)


@dataclass(frozen=True)
class _Axis:
    """Cut one axis into overlapping tiles, as ``AutoencoderKLWan.tiled_decode`` does.

    Args:
        length: latents of the axis.
        tile: latents of a tile.
        step: latents from one tile to the next.
        kept: values that a decoded tile adds to the result; None for all.
        blend: values over which a decoded tile is blended with the one before it.
        decoded: values of the result; None for all.
    """

    length: int
    tile: int
    step: int
    kept: int | None = None
    blend: int = 0
    decoded: int | None = None

    @classmethod
    def of_tiles(cls, length: int, tile: int, step: int, ratio: int, patch: int) -> _Axis:
        """Cut by pixels of a tile and from tile to tile, each latent being ``ratio`` pixels."""
        return cls(
            length=length,
            tile=tile // ratio,
            step=step // ratio,
            kept=step // patch,
            blend=tile // patch - step // patch,
            decoded=length * ratio // patch,
        )

    def spans(self) -> list[slice]:
        """Return the latents of each tile."""
        return [slice(i, i + self.tile) for i in range(0, self.length, self.step)]


class _Parts:
    """Hold how the VAE's settings divide a batch, and the features of each part.

    Args:
        vae: the VAE.
        height, width: latents of a frame.
    """

    def __init__(self, vae: AutoencoderKLWan, height: int, width: int) -> None:
        ratio, self.patch = vae.spatial_compression_ratio, vae.config.patch_size or 1
        tiles = (vae.tile_sample_min_height, vae.tile_sample_min_width)
        tiled = vae.use_tiling and (height > tiles[0] // ratio or width > tiles[1] // ratio)
        if tiled:
            steps = (vae.tile_sample_stride_height, vae.tile_sample_stride_width)
            self.rows, self.columns = (
                _Axis.of_tiles(length, tile, step, ratio, self.patch)
                for length, tile, step in zip((height, width), tiles, steps, strict=True)
            )
        else:
            self.rows, self.columns = _Axis(height, height, height), _Axis(width, width, width)
        self.sliced = vae.use_slicing
        self._convolutions = sum(isinstance(m, WanCausalConv3d) for m in vae.decoder.modules())
        self._features: dict[tuple[int, int, int], list[Any]] = {}

    def slices(self, latents: Tensor) -> Iterator[Tensor]:
        """Divide a batch."""
        yield from latents.split(1 if self.sliced else len(latents))

    def features(self, key: tuple[int, int, int]) -> tuple[list[Any], bool]:
        """Return the features of one tile of a slice, and whether it begins the video."""
        begins = key not in self._features
        if begins:
            self._features[key] = [None] * self._convolutions
        return self._features[key], begins


@apply_forward_hook
def _run(vae: AutoencoderKLWan, latents: Tensor, parts: _Parts) -> Tensor:
    """Decode ``latents[B, C, F', h, w]`` to frames in [-1, 1].

    The decorator brings offloaded weights to the device, as it does for ``vae.decode``.
    """
    decoded = [_decode_slice(vae, part, parts, i) for i, part in enumerate(parts.slices(latents))]
    return torch.cat(decoded)


def _decode_slice(vae: AutoencoderKLWan, latents: Tensor, parts: _Parts, index: int) -> Tensor:
    """Decode the tiles of a slice and put them together, blended where they overlap."""
    rows, columns = parts.rows, parts.columns
    above: list[Tensor] = []
    lines = []
    for i, vertical in enumerate(rows.spans()):
        line: list[Tensor] = []
        for j, horizontal in enumerate(columns.spans()):
            features, begins = parts.features((index, i, j))
            tile = _decode_tile(vae, latents[..., vertical, horizontal], features, begins)
            if i > 0:
                tile = vae.blend_v(above[j], tile, rows.blend)
            if j > 0:
                tile = vae.blend_h(line[j - 1], tile, columns.blend)
            line.append(tile)
        kept = [tile[..., : rows.kept, : columns.kept] for tile in line]
        lines.append(torch.cat(kept, dim=-1))
        above = line
    frames = torch.cat(lines, dim=-2)[..., : rows.decoded, : columns.decoded]
    return unpatchify(frames, parts.patch).clamp(-1, 1)


def _decode_tile(
    vae: AutoencoderKLWan, latents: Tensor, features: list[Any], begins: bool
) -> Tensor:
    """Decode latent frame by latent frame; the decoder replaces the features in their list."""
    frames = [
        vae.decoder(
            vae.post_quant_conv(frame),
            feat_cache=features,
            feat_idx=[0],
            first_chunk=begins and k == 0,
        )
        for k, frame in enumerate(latents.split(1, dim=2))
    ]
    return torch.cat(frames, dim=2)
