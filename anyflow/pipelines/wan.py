"""Load the Wan VAE and the UMT5 text encoder, and encode and decode with them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyflow.models.network import execution_device
from anyflow.utils.documents import require_content, shortened
from anyflow.utils.validation import FiniteCheck, brief, numbered, overflow_advice
from anyflow.utils.versions import require_ftfy


def load_vae(model: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Load ``AutoencoderKLWan`` of a diffusers folder, on the CPU in eval mode.

    Raises:
        ValueError: the part is missing, or weights are missing or left over.
    """
    from diffusers import AutoencoderKLWan

    return load_module(AutoencoderKLWan, part_folder(model, "vae"), dtype)


def load_text_encoder(model: Path, dtype: torch.dtype) -> Any:
    """Load ``UMT5EncoderModel`` of a diffusers folder, as :func:`load_vae` does."""
    from transformers import UMT5EncoderModel

    return load_module(UMT5EncoderModel, part_folder(model, "text_encoder"), dtype)


def load_tokenizer(model: Path) -> Any:
    """Load the tokenizer of a diffusers folder.

    Raises:
        ValueError: it is missing, or cannot be read.
    """
    from transformers import AutoTokenizer

    folder = part_folder(model, "tokenizer")
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".model", ".txt"):
            require_content(file)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises Exception itself
        raise ValueError(
            f"{folder} cannot be loaded as a tokenizer: {brief(str(error), 300)}"
        ) from error


def part_folder(model: Path, name: str) -> Path:
    """Return ``model/name``, or raise a ValueError if it is no folder."""
    folder = model / name
    if not os.path.isdir(folder):
        raise ValueError(f"{shortened(model)} is not a diffusers model folder: it has no {name}/")
    return folder


def clean_prompt(prompt: str) -> str:
    """Clean a prompt as the published models' were: ``ftfy``, HTML entities, whitespace.

    diffusers does the same where ftfy is installed, and leaves its part out where it is not.

    Raises:
        ImportError: ftfy is missing.
    """
    require_ftfy()
    from diffusers.pipelines.anyflow.pipeline_anyflow import prompt_clean

    return prompt_clean(prompt)


@torch.no_grad()
def encode_prompt(
    text_encoder: Any, tokenizer: Any, prompt: str, max_sequence_length: int
) -> Tensor:
    """Return the tokens of a prompt, ``[S, text_dim]`` fp32 on the CPU, without padding.

    S is at most ``max_sequence_length``.

    The prompt is cleaned first and encoded beside masked padding, as diffusers' pipelines do
    (``test_prompts_are_those_of_the_anyflow_pipeline``), and alone, so that the numbers do not
    depend on other prompts.

    Raises:
        ImportError: ftfy is missing.
    """
    tokens = tokenizer(
        [clean_prompt(prompt)],
        padding="max_length",
        max_length=max_sequence_length,
        truncation=True,
        return_attention_mask=True,
        return_tensors="pt",
    ).to(execution_device(text_encoder))
    embeds = text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return embeds[0, : int(tokens.attention_mask.sum())].float().cpu()


@torch.no_grad()
def encode_video(vae: Any, pixels: Tensor) -> Tensor:
    """Encode ``pixels[B, F, 3, H, W]`` in [-1, 1] to latents ``[B, 1 + (F-1)/4, C, H/8, W/8]``.

    The latents are the mean of the posterior, minus ``latents_mean`` and over ``latents_std`` of
    each channel, as in diffusers' Wan and AnyFlow pipelines
    (``test_stored_latents_are_those_of_the_anyflow_pipeline``).
    """
    latents = vae.encode(
        pixels.to(execution_device(vae), vae.dtype).transpose(1, 2)
    ).latent_dist.mode()
    mean, std = _statistics(vae, latents)
    return ((latents - mean) * (1 / std)).transpose(1, 2)


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Decode normalized latents ``[B, F', C, h, w]`` to a video ``[B, F, 3, H, W]`` in [0, 1].

    The video has the VAE's dtype.

    Raises:
        FloatingPointError: what the VAE returns holds NaN or infinity, or the latents do; the host
            waits for it.
    """
    return decode_with(vae, latents, lambda scaled: vae.decode(scaled, return_dict=False)[0])


@torch.no_grad()
def decode_with(vae: Any, latents: Tensor, decode: Callable[[Tensor], Tensor]) -> Tensor:
    """Decode latents as :func:`decode_latents` does, with a function in place of ``vae.decode``.

    Args:
        vae: VAE that the latents are of.
        latents: normalized latents ``[B, F', C, h, w]``.
        decode: makes frames ``[B, 3, F, H, W]`` in [-1, 1] of latents ``[B, C, F', h, w]`` that are
            no longer normalized.
    """
    latents = latents.to(execution_device(vae), vae.dtype).transpose(1, 2)
    mean, std = _statistics(vae, latents)
    finite = FiniteCheck()
    finite.note("latents to be decoded", latents)
    video = decode(latents * std + mean)
    finite.note("decoded frames", video)  # before the clamp, which makes infinity a 1
    if (found := finite.first()) is not None:
        name, picked, count = found
        advice = overflow_advice(vae, option="vae_dtype=torch.bfloat16") + ", or fp32"
        raise FloatingPointError(
            f"the {name} are not finite (NaN or infinity) in {numbered(picked, count)}: {advice}"
        )
    return (video * 0.5 + 0.5).clamp(0, 1).transpose(1, 2)


def _statistics(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = (
        latents.new_tensor(v).view(-1, 1, 1, 1)
        for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    return mean, std


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Hide transformers' bar, which would lie across the lines of a command."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def require_sound_folder(folder: Path) -> None:
    """Check the configuration and the headers of a part, before a library reads the weights.

    Raises:
        ValueError: a file is absent, cut off, empty, a pointer of git-lfs, a web page or no regular
            file; an index and its files do not agree; or the configuration has more layers than
            the files have tensors.
    """
    from anyflow.formats.files import find_files, read_json
    from anyflow.formats.readers import SafetensorsReader

    files = find_files(chosen_weights(folder), None)
    tensors = SafetensorsReader(files.weights, files.index).infos
    config = read_json(folder / "config.json")
    for name, value in config.items():
        counts = name.startswith("num_") and name.endswith(("_layers", "_blocks"))
        if counts and isinstance(value, int) and not 0 <= value <= len(tensors):
            raise ValueError(
                f"{folder / 'config.json'}: {name}={brief(value)}, but the files have "
                f"{len(tensors)} tensors"
            )


def chosen_weights(folder: Path) -> Path:
    """Return the file of weights, or the index, that diffusers and transformers read in a folder.

    Raises:
        ValueError: the folder has none.
    """
    for stem in ("diffusion_pytorch_model", "model"):
        for name in (f"{stem}.safetensors", f"{stem}.safetensors.index.json"):
            if os.path.lexists(folder / name):
                return folder / name
    raise ValueError(f"{shortened(folder)} has no file of weights (.safetensors)")


def load_module(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    """Load a pretrained module in eval mode, with exactly the weights of its folder.

    The global generator is left alone.

    Raises:
        ValueError: a file of the folder is damaged or is none, which is said with its name, or
            weights are missing or left over.
    """
    require_sound_folder(folder)
    try:
        # Constructors draw weights that the files then replace.
        with torch.random.fork_rng(devices=[]), _no_progress_bar():
            module, info = kind.from_pretrained(
                folder,
                torch_dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:  # of any kind: the libraries expect the files to be their own
        reason = f"{type(error).__name__}: {brief(str(error), 500)}"
        raise ValueError(f"{folder} cannot be loaded as {kind.__name__}: {reason}") from error
    faults = [f"{what}: {sorted(map(str, info[what]))}" for what in info if info[what]]
    if faults:
        raise ValueError(
            f"{folder} does not hold the weights of {kind.__name__}: {'; '.join(faults)}"
        )
    return module.eval()
