"""Turn videos and prompts into what the transformer sees, with the parts of a Wan model."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor

from anyflow.pipelines.wan import (
    encode_prompt,
    encode_video,
    load_text_encoder,
    load_tokenizer,
    load_vae,
    part_folder,
)

PARTS = ("vae", "text_encoder", "tokenizer")
_MEGABYTE = 1 << 20


class LatentEncoder:
    """Encode videos with the Wan VAE, in fp32.

    Args:
        model: diffusers folder with a ``vae`` subfolder.
        device: device to run on.

    Raises:
        ValueError: weights are missing or left over.
    """

    def __init__(self, model: Path, device: torch.device) -> None:
        self._vae = load_vae(model).to(device)
        config = self._vae.config
        self.channels: int = config.z_dim
        self.temporal_factor: int = config.scale_factor_temporal
        self.spatial_factor: int = config.scale_factor_spatial
        self.latents_mean: list[float] = list(config.latents_mean)
        self.latents_std: list[float] = list(config.latents_std)

    def __call__(self, video: Tensor) -> Tensor:
        """Encode ``video[F, 3, H, W]`` uint8.

        Returns normalized latents ``[1 + (F-1)/4, C, H/8, W/8]``, fp32 on the CPU.
        """
        pixels = video.to(self._vae.device).float().div_(127.5).sub_(1)
        return encode_video(self._vae, pixels[None])[0].cpu()


class TextEncoder:
    """Encode prompts with the UMT5 encoder and its tokenizer.

    Args:
        model: diffusers folder with ``text_encoder`` and ``tokenizer`` subfolders.
        device: device to run on.
        dtype: dtype of the weights.
        text_length: tokens after which a prompt is cut off.

    Raises:
        ValueError: weights are missing or left over.
    """

    def __init__(
        self, model: Path, device: torch.device, *, dtype: torch.dtype, text_length: int
    ) -> None:
        self._encoder = load_text_encoder(model, dtype).to(device)
        self._tokenizer = load_tokenizer(model)
        self._text_length = text_length
        self.text_dim: int = self._encoder.config.d_model

    def __call__(self, prompt: str) -> Tensor:
        """Return the tokens of a prompt, ``[S, text_dim]`` fp32 on the CPU, without padding."""
        return encode_prompt(self._encoder, self._tokenizer, prompt, self._text_length)


def model_identity(model: Path) -> dict[str, str]:
    """Hash the names, the sizes and the first and last megabytes of the files of each part.

    Raises:
        ValueError: a part is missing.
    """
    return {part: _digest(part_folder(model, part)) for part in PARTS}


def _digest(folder: Path) -> str:
    content = hashlib.blake2b(digest_size=16)
    for path in sorted(
        path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")
    ):
        size = path.stat().st_size
        content.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            content.update(file.read(_MEGABYTE))
            file.seek(max(0, size - _MEGABYTE), os.SEEK_SET)
            content.update(file.read(_MEGABYTE))
    return content.hexdigest()
