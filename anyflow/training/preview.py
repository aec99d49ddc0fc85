"""Previews: the averaged student sampled at several step counts from fixed noise, as a grid of videos."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from anyflow.checkpoints.hub import local_folder
from anyflow.data import MovingShapes, VideoDataset, pixel_shuffle_3d
from anyflow.network import has_flow_map
from anyflow.pipelines.frames import uint8_pixels
from anyflow.pipelines.wan import decode_latents, load_vae
from anyflow.rng import randn_like
from anyflow.sampling import sample
from anyflow.training.config import Recipe
from anyflow.training.distributed import Mesh, main_result
from anyflow.training.draws import draw_generator
from anyflow.training.ema import EMA
from anyflow.training.preview_grid import write_grid
from anyflow.training.steps import Step, build_scheduler

_FPS = 16.0  # of Wan2.1's videos
_LATENT_FPS = 8.0  # of latents shown as they are, and of the synthetic videos


@dataclass(frozen=True)
class Prompt:
    """A column of the grid: a caption, and ``embeds[1, S, text_dim]`` on the CPU."""

    caption: str
    embeds: Tensor


class Previews:
    """The prompts and the VAE of a run's previews, made ready before its networks are built.

    Prompts of one's own are encoded once, by the text encoder of ``preview.model``, which is then dropped; else they
    are those of rows spread evenly over the data. The VAE of ``preview.vae`` stays in the first process's host memory,
    and is on the device only while a preview is decoded.

    Args:
        recipe: the run.
        mesh: this process's place in it.
        dataset: for shapes, and for prompts where the recipe has none.

    Raises:
        ValueError: the model or the VAE cannot be loaded, or does not fit the data; on every rank.
    """

    def __init__(self, recipe: Recipe, mesh: Mesh, dataset: VideoDataset) -> None:
        self._recipe, self._mesh, self._latent_shape = recipe, mesh, dataset.latent_shape
        self._vae: Any = None
        if recipe.preview.vae is not None:
            main_result(mesh, self._load_vae)
        self.prompts = main_result(mesh, lambda: _encoded(recipe, mesh, dataset)) if recipe.preview.prompts else None
        if self.prompts is None:
            count = min(recipe.preview.num_samples, len(dataset))
            rows = [i * len(dataset) // count for i in range(count)]
            self.prompts = [Prompt(dataset.caption(row), dataset[row].prompt_embeds[None]) for row in rows]

    def write(self, step: Step, done: int, console: Console) -> Path | None:
        """Sample and write ``previews/step-….gif``, or ``.mp4`` of decoded videos. Collective; rank 0 writes.

        The synthetic videos are shown as they are, and latents without a VAE in false colors: their first three
        channels as red, green and blue. Training is left bit for bit as it was.

        Args:
            step: whose average is sampled.
            done: updates done.
            console: where messages go.

        Returns:
            The file; None on other ranks, and where values are not finite, which would be shown as black, or the VAE
            needs more memory than there is: a line says so.
        """
        suffix = "gif" if self._recipe.preview.vae is None else "mp4"
        file = Path(self._recipe.out) / "previews" / f"step-{done:08d}.{suffix}"
        try:
            rows = self.sample(step.student, step.ema)
            if not self._mesh.is_main:
                return None
            self._require_finite(rows)
            videos = self._pixels(rows.flatten(0, 1)).unflatten(0, rows.shape[:2])
        except (FloatingPointError, torch.OutOfMemoryError) as error:
            console.print(f"The preview {file} was not written: {error}", markup=False)
            return None
        labels = [f"{count} step{'s' if count > 1 else ''}" for count in self._recipe.preview.step_counts]
        captions = [prompt.caption for prompt in self.prompts or ()]
        write_grid(videos, labels, captions, file, _FPS if suffix == "mp4" else _LATENT_FPS)
        return file

    def sample(self, student: torch.nn.Module, ema: EMA) -> Tensor:
        """Sample latents ``[step counts, prompts, F, C, H, W]``, returned on the CPU. Collective.

        Raises:
            FloatingPointError: the sampler finds values that are not finite, on every rank alike.
        """
        recipe, device, prompts = self._recipe, self._mesh.device, self.prompts or []
        like = torch.empty(len(prompts), *self._latent_shape)
        noise = randn_like(like, draw_generator(recipe.seed, "preview")).to(device)
        texts = [prompt.embeds.to(device) for prompt in prompts]
        scheduler, flow_map = build_scheduler(recipe), has_flow_map(student)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16", cache_enabled=False)
        with ema.applied(student), autocast:
            rows = [
                torch.cat(
                    [
                        sample(student, scheduler, x[None], c, num_inference_steps=n, use_mean_velocity=flow_map)
                        for x, c in zip(noise, texts, strict=True)  # one at a time: a long video fills the memory
                    ]
                )
                for n in recipe.preview.step_counts
            ]
        return torch.stack(rows).float().cpu()

    def _require_finite(self, rows: Tensor) -> None:
        finite = torch.isfinite(rows).flatten(1).all(1).tolist()
        if not all(finite):
            counts = [str(n) for n, good in zip(self._recipe.preview.step_counts, finite, strict=True) if not good]
            hint = "" if self._recipe.precision == "fp32" else "; precision=fp32 may keep them finite"
            raise FloatingPointError(f"the latents of {', '.join(counts)} steps hold NaN or infinity{hint}")

    def _pixels(self, latents: Tensor) -> Tensor:
        """Show latents ``[N, F, C, H, W]`` as videos ``[N, F', H', W', 3]`` uint8."""
        if self._vae is None:
            return _gray(latents) if self._recipe.data.kind == "synthetic" else _false_colors(latents)
        vae = self._vae.to(self._mesh.device)
        try:
            return torch.cat([uint8_pixels(decode_latents(vae, video[None])).cpu() for video in latents])
        finally:
            self._vae = vae.to("cpu")

    def _load_vae(self) -> None:
        preview, on_gpu = self._recipe.preview, self._mesh.device.type == "cuda"
        assert preview.vae is not None
        dtype = torch.bfloat16 if on_gpu and self._recipe.precision == "bf16" else torch.float32
        try:
            self._vae = load_vae(local_folder(preview.vae, ("vae/*",)), dtype)
        except ValueError as error:
            raise ValueError(f"preview.vae: {error}") from None
        channels = self._latent_shape[1]
        if self._vae.config.z_dim != channels:
            raise ValueError(
                f"preview.vae: the VAE of {preview.vae} has latents of {self._vae.config.z_dim} channels, "
                f"the data {channels}"
            )
        self._vae.enable_tiling()  # training has filled the device's memory


def _encoded(recipe: Recipe, mesh: Mesh, dataset: VideoDataset) -> list[Prompt]:
    """Encode the recipe's prompts as ``anyflow preprocess`` does unless it is told otherwise."""
    from anyflow.data.encoders import TextEncoder

    preview, (length, width) = recipe.preview, dataset.text_shape
    assert preview.model is not None
    try:
        folder = local_folder(preview.model, ("text_encoder/*", "tokenizer/*"))
        encoder = TextEncoder(folder, mesh.device, dtype=torch.bfloat16, text_length=length)
    except ValueError as error:
        raise ValueError(f"preview.model: {error}") from None
    if encoder.text_dim != width:
        raise ValueError(
            f"preview.model: the text encoder of {preview.model} has width {encoder.text_dim}, "
            f"the data's prompts {width}"
        )
    prompts = []
    for prompt in preview.prompts:
        tokens = encoder(prompt)
        padded = torch.nn.functional.pad(tokens, (0, 0, 0, length - len(tokens)))
        prompts.append(Prompt(prompt, padded[None]))
    return prompts


def _gray(latents: Tensor) -> Tensor:
    """Show ``[N, F, 8, H, W]`` of the synthetic data as videos ``[N, 2F, 2H, 2W, 3]`` uint8."""
    return MovingShapes().to_uint8(pixel_shuffle_3d(latents))[..., None].expand(-1, -1, -1, -1, 3)


def _false_colors(latents: Tensor) -> Tensor:
    """Show three channels of ``[N, F, C, H, W]``, each stretched over all values, as ``[N, F, H, W, 3]`` uint8."""
    channels = latents[:, :, [c % latents.shape[2] for c in range(3)]]
    low, high = channels.amin((0, 1, 3, 4), keepdim=True), channels.amax((0, 1, 3, 4), keepdim=True)
    stretched = (channels - low) / (high - low).clamp(min=1e-6)
    return (stretched * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2)
