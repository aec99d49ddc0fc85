"""Previews: the averaged student sampled at several step counts from fixed noise, as an animated grid."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from anyflow.data import MovingShapes, VideoDataset, pixel_shuffle_3d
from anyflow.network import has_flow_map
from anyflow.rng import randn_like
from anyflow.sampling import sample
from anyflow.training.config import Recipe
from anyflow.training.distributed import Mesh
from anyflow.training.draws import draw_generator
from anyflow.training.ema import EMA
from anyflow.training.steps import Step, build_scheduler
from anyflow.writing import write_bytes

_FRAME_MS = 125
_MIN_HEIGHT = 96  # pixels of a cell
_GAP = 4


def preview(recipe: Recipe, mesh: Mesh, dataset: VideoDataset, step: Step, file: Path, console: Console) -> None:
    """Sample and write a GIF: one row per step count, one column per prompt. Collective; rank 0 writes.

    Latents that are not finite would be shown as black: in place of the file, a line says so.

    The prompts are those of rows spread evenly over the dataset. The synthetic videos are shown as they are; latents of
    a VAE in false colors, their first three channels as red, green and blue (no VAE is loaded in training). Training is
    left bit for bit as it was.

    Args:
        recipe: the run.
        mesh: this process's place in it.
        dataset: for prompts and shapes.
        step: whose average is sampled.
        file: to write, ``.gif``.
        console: where messages go.
    """
    try:
        rows = sample_previews(recipe, mesh, dataset, step.student, step.ema)
    except FloatingPointError as error:  # of the sampler, on every rank alike
        console.print(f"The preview {file} was not written: {error}", markup=False)
        return
    if not mesh.is_main:
        return
    finite = torch.isfinite(rows).flatten(1).all(1).tolist()
    if not all(finite):
        counts = ", ".join(str(n) for n, good in zip(recipe.preview.step_counts, finite, strict=True) if not good)
        hint = "" if recipe.precision == "fp32" else "; precision=fp32 may keep them finite"
        reason = f"the latents of {counts} steps hold NaN or infinity{hint}"
        console.print(f"The preview {file} was not written: {reason}", markup=False)
        return
    synthetic = recipe.data.kind == "synthetic"
    videos = _gray(rows.flatten(0, 1)) if synthetic else _false_colors(rows.flatten(0, 1))
    write_grid(videos.unflatten(0, rows.shape[:2]), file)


def sample_previews(recipe: Recipe, mesh: Mesh, dataset: VideoDataset, student: torch.nn.Module, ema: EMA) -> Tensor:
    """Latents ``[step counts, prompts, F, C, H, W]`` on the CPU; collective."""
    count = min(recipe.preview.num_samples, len(dataset))
    like = torch.empty(count, *dataset.latent_shape)
    noise = randn_like(like, draw_generator(recipe.seed, "preview")).to(mesh.device)
    prompts = [dataset[i * len(dataset) // count].prompt_embeds[None].to(mesh.device) for i in range(count)]
    scheduler, flow_map = build_scheduler(recipe), has_flow_map(student)
    autocast = torch.autocast(mesh.device.type, torch.bfloat16, enabled=recipe.precision == "bf16", cache_enabled=False)
    with ema.applied(student), autocast:
        rows = [
            torch.cat(
                [
                    sample(student, scheduler, x[None], c, num_inference_steps=n, use_mean_velocity=flow_map)
                    for x, c in zip(noise, prompts, strict=True)  # one at a time: a long video fills the memory
                ]
            )
            for n in recipe.preview.step_counts
        ]
    return torch.stack(rows).float().cpu()


def write_grid(videos: Tensor, file: Path) -> None:
    """``videos[rows, columns, F, H, W, 3]`` uint8 as an animated GIF that repeats."""
    from PIL import Image

    scale = max(1, -(-_MIN_HEIGHT // videos.shape[3]))
    videos = videos.repeat_interleave(scale, 3).repeat_interleave(scale, 4)
    rows, columns, frames, height, width, _ = videos.shape
    canvas = torch.full(
        (frames, rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), 255, dtype=torch.uint8
    )
    for i in range(rows):
        for j in range(columns):
            top, left = i * (height + _GAP), j * (width + _GAP)
            canvas[:, top : top + height, left : left + width] = videos[i, j]
    images = [Image.fromarray(frame.numpy()) for frame in canvas]
    buffer = BytesIO()
    images[0].save(buffer, format="GIF", save_all=True, append_images=images[1:], duration=_FRAME_MS, loop=0)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, buffer.getvalue())


def _gray(latents: Tensor) -> Tensor:
    """``[N, F, 8, H, W]`` of the synthetic data to videos ``[N, 2F, 2H, 2W, 3]`` uint8."""
    return MovingShapes().to_uint8(pixel_shuffle_3d(latents))[..., None].expand(-1, -1, -1, -1, 3)


def _false_colors(latents: Tensor) -> Tensor:
    """The first three channels of ``[N, F, C, H, W]``, each stretched over all values: ``[N, F, H, W, 3]`` uint8."""
    channels = latents[:, :, [c % latents.shape[2] for c in range(3)]]
    low, high = channels.amin((0, 1, 3, 4), keepdim=True), channels.amax((0, 1, 3, 4), keepdim=True)
    stretched = (channels - low) / (high - low).clamp(min=1e-6)
    return (stretched * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2)
