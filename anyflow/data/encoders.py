"""The parts of a Wan model that turn videos and prompts into what the transformer sees."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PARTS = ("vae", "text_encoder", "tokenizer")
_MEGABYTE = 1 << 20


class VideoEncoder:
    """The Wan VAE, in fp32.

    Args:
        model: diffusers folder with a ``vae`` subfolder.
        device: to run on.

    Raises:
        ValueError: weights are missing or left over.
    """

    def __init__(self, model: Path, device: torch.device) -> None:
        from diffusers import AutoencoderKLWan

        folder = _part(model, "vae")
        self._vae = _load(AutoencoderKLWan, folder, torch.float32).to(device)
        config = self._vae.config
        self.channels: int = config.z_dim
        self.temporal_factor: int = config.scale_factor_temporal
        self.spatial_factor: int = config.scale_factor_spatial
        self.latents_mean: list[float] = list(config.latents_mean)
        self.latents_std: list[float] = list(config.latents_std)

    @torch.no_grad()
    def __call__(self, video: Tensor) -> Tensor:
        """``video[F, 3, H, W]`` uint8 to normalized latents ``[1 + (F-1)/4, C, H/8, W/8]`` fp32 on the CPU.

        The mean of the posterior, minus ``latents_mean`` and over ``latents_std`` of each channel, as diffusers' Wan
        and AnyFlow pipelines do (``test_stored_latents_are_those_of_the_anyflow_pipeline``).
        """
        pixels = video.to(self._vae.device).float().div_(127.5).sub_(1)
        latents = self._vae.encode(pixels.transpose(0, 1)[None]).latent_dist.mode()[0]
        mean, std = (latents.new_tensor(values).view(-1, 1, 1, 1) for values in (self.latents_mean, self.latents_std))
        return ((latents - mean) * (1 / std)).transpose(0, 1).cpu()


class TextEncoder:
    """The UMT5 encoder and its tokenizer.

    Args:
        model: diffusers folder with ``text_encoder`` and ``tokenizer`` subfolders.
        device: to run on.
        dtype: of the weights.
        text_length: tokens after which a prompt is cut off.

    Raises:
        ValueError: weights are missing or left over.
    """

    def __init__(self, model: Path, device: torch.device, *, dtype: torch.dtype, text_length: int) -> None:
        from transformers import AutoTokenizer, UMT5EncoderModel

        self._encoder = _load(UMT5EncoderModel, _part(model, "text_encoder"), dtype).to(device)
        self._tokenizer = AutoTokenizer.from_pretrained(_part(model, "tokenizer"), local_files_only=True)
        self._text_length = text_length
        self.text_dim: int = self._encoder.config.d_model

    @torch.no_grad()
    def __call__(self, prompt: str) -> Tensor:
        """The tokens of a prompt, ``[S, text_dim]`` fp32 on the CPU, without padding.

        Encoded beside masked padding, as diffusers' pipelines do (``test_prompts_are_those_of_the_anyflow_pipeline``).
        """
        from diffusers.pipelines.anyflow.pipeline_anyflow import prompt_clean

        tokens = self._tokenizer(
            [prompt_clean(prompt)],
            padding="max_length",
            max_length=self._text_length,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self._encoder.device)
        embeds = self._encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return embeds[0, : int(tokens.attention_mask.sum())].float().cpu()


def model_identity(model: Path) -> dict[str, str]:
    """A hash of each part of a model: of its files' names, sizes, and first and last megabytes.

    Raises:
        ValueError: a part is missing.
    """
    return {part: _digest(_part(model, part)) for part in PARTS}


def _digest(folder: Path) -> str:
    content = hashlib.blake2b(digest_size=16)
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        size = path.stat().st_size
        content.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            content.update(file.read(_MEGABYTE))
            file.seek(max(0, size - _MEGABYTE), os.SEEK_SET)
            content.update(file.read(_MEGABYTE))
    return content.hexdigest()


def _part(model: Path, name: str) -> Path:
    folder = model / name
    if not folder.is_dir():
        raise ValueError(f"{model} is not a diffusers model folder: it has no {name}/ (needed: {', '.join(PARTS)})")
    return folder


def _load(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """A pretrained module in eval mode, with exactly the weights of its folder."""
    try:
        module, info = kind.from_pretrained(folder, torch_dtype=dtype, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder} cannot be loaded as {kind.__name__}: {error}") from error
    faults = [f"{what}: {sorted(map(str, info[what]))}" for what in info if info[what]]
    if faults:
        raise ValueError(f"{folder} does not hold the weights of {kind.__name__}: {'; '.join(faults)}")
    return module.eval()
