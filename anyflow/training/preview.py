"""Sample the averaged student at several numbers of steps, as a grid of videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from torch import Tensor

from anyflow.data import VideoDataset
from anyflow.models.network import is_causal
from anyflow.training.averaged_sampling import AveragedSampler, require_sampled
from anyflow.training.decoding import Decoder
from anyflow.training.distributed import Mesh
from anyflow.training.draws import draw_generator
from anyflow.training.ema import EMA
from anyflow.training.preview_grid import write_grid
from anyflow.training.prompts import Prompt
from anyflow.training.updates import StageUpdates
from anyflow.utils.rng import randn_like
from anyflow.utils.validation import require_text

if TYPE_CHECKING:
    from anyflow.training.config import Recipe

REAL = "real"  # label of the data's own videos


@dataclass(frozen=True)
class PreviewConfig:
    """Say when videos are sampled from the average during training, and which.

    Args:
        every: steps between previews; the last step has one, too. 0 turns them off.
        step_counts: numbers of sampling steps, of each chunk for a causal student; one row of the
            grid each.
        num_samples: prompts of the data, one column of the grid each; not used with ``prompts``.
            The data's own videos are a row of the grid, too.
        prompts: texts in place of the data's; they need ``model``.
        model: folder or hub name of a model whose text encoder encodes ``prompts``, those of
            ``metrics`` too, once, before training.
        vae: folder or hub name of a model whose VAE decodes the videos of previews and metrics;
            None shows latents in false colors.
    """

    every: int = 0
    step_counts: tuple[int, ...] = (1, 2, 4, 8)
    num_samples: int = 4
    prompts: tuple[str, ...] = ()
    model: str | None = None
    vae: str | None = None

    def __post_init__(self) -> None:
        require_sampled(self)
        for name in ("model", "vae"):
            if getattr(self, name) is not None:
                require_text(f"{name}", getattr(self, name))


class Previews:
    """Sample and show a run's previews: a column for each prompt, a row for each number of steps.

    Where the prompts are captions of the data, the data's own videos are the last row.

    Args:
        recipe: the run.
        mesh: this process's place in it.
        dataset: dataset of the prompts' samples.
        prompts: the columns.
        decoder: shows latents as videos.
    """

    def __init__(
        self,
        recipe: Recipe,
        mesh: Mesh,
        dataset: VideoDataset,
        prompts: Sequence[Prompt],
        decoder: Decoder,
    ) -> None:
        self._recipe, self._mesh, self._dataset, self._decoder = recipe, mesh, dataset, decoder
        self.prompts = tuple(prompts)

    def write(self, updates: StageUpdates, done: int, console: Console) -> Path | None:
        """Sample and write ``previews/step-….gif``, or ``.mp4`` of decoded videos.

        Collective; rank 0 writes.

        The synthetic videos are shown as they are, and latents without a VAE in false colors: their
        first three channels as red, green and blue. Training is left bit for bit as it was.

        Args:
            updates: hold the average that is sampled.
            done: updates done.
            console: where messages go.

        Returns:
            The file; None on other ranks, and where values are not finite, which would be shown as
            black, or the VAE needs more memory than there is: a line says so.
        """
        suffix = "gif" if self._recipe.preview.vae is None else "mp4"
        file = Path(self._recipe.out) / "previews" / f"step-{done:08d}.{suffix}"
        try:
            latents = self.sample(updates.student, updates.ema)
            if not self._mesh.is_main:
                return None
            self._require_finite(latents)
            unit = " a chunk" if is_causal(updates.student) else ""
            labels = [
                f"{count} step{'s' if count > 1 else ''}{unit}"
                for count in self._recipe.preview.step_counts
            ]
            real = [
                self._dataset[prompt.sample].latents
                for prompt in self.prompts
                if prompt.sample is not None
            ]
            if real:
                latents = torch.cat([latents, torch.stack(real)[None]])
                labels = [*labels, REAL]
            videos = self._decoder.pixels(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])
        except (FloatingPointError, torch.OutOfMemoryError) as error:
            console.print(f"The preview {file} was not written: {error}", markup=False)
            return None
        write_grid(
            videos, labels, [prompt.caption for prompt in self.prompts], file, self._decoder.fps
        )
        return file

    def sample(self, student: torch.nn.Module, ema: EMA) -> Tensor:
        """Sample latents ``[step counts, prompts, F, C, H, W]``, returned on the CPU. Collective.

        Raises:
            FloatingPointError: the sampler finds values that are not finite, on every rank alike.
        """
        like = torch.empty(len(self.prompts), *self._dataset.latent_shape)
        noise = randn_like(like, draw_generator(self._recipe.seed, "preview"))
        counts = self._recipe.preview.step_counts
        with AveragedSampler(self._recipe, self._mesh, student, ema) as sampler:
            videos = [
                [
                    sampler.sample(x, prompt.embeds, count)
                    for x, prompt in zip(noise, self.prompts, strict=True)
                ]
                for count in counts
            ]
        return torch.stack([torch.stack(row) for row in videos])

    def _require_finite(self, latents: Tensor) -> None:
        finite = torch.isfinite(latents).flatten(1).all(1).tolist()
        if not all(finite):
            counts = [
                str(n)
                for n, good in zip(self._recipe.preview.step_counts, finite, strict=True)
                if not good
            ]
            hint = (
                "" if self._recipe.precision == "fp32" else "; precision=fp32 may keep them finite"
            )
            raise FloatingPointError(
                f"the latents of {', '.join(counts)} steps hold NaN or infinity{hint}"
            )
