"""What a model can make and what is asked of it, checked before a weight is loaded or a network run."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from anyflow.documents import read_json, shortened
from anyflow.sampling import Schedule
from anyflow.schedulers import FlowMapEulerDiscreteScheduler
from anyflow.validation import require_whole_number, shown

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass(frozen=True)
class ModelLayout:
    """The sizes that the configuration files of a model settle.

    Args:
        channels: C of the latents.
        temporal_factor: frames for each latent frame after the first.
        spatial_factor: pixels for each latent row and column.
        patch_size: latent (frames, rows, columns) of a token.
        max_positions: most tokens along any of the three axes.
        text_dim: width of the prompt embeddings.
    """

    channels: int
    temporal_factor: int
    spatial_factor: int
    patch_size: tuple[int, int, int]
    max_positions: int
    text_dim: int

    @classmethod
    def read(cls, model: Path, transformer: Path | Mapping[str, Any] | None = None) -> ModelLayout:
        """Of a diffusers folder.

        Args:
            model: the folder.
            transformer: another transformer's folder, or its configuration; None takes the model's own.

        Raises:
            ValueError: a configuration is missing or broken, or the parts do not fit together.
        """
        vae = _config(model / "vae")
        text_encoder = _config(model / "text_encoder")
        if transformer is None:
            transformer = model / "transformer"
        config = _config(transformer) if isinstance(transformer, Path) else transformer
        patch: Any = config.get("patch_size", (1, 2, 2))
        layout = cls(
            channels=config.get("in_channels", 16),
            temporal_factor=vae.get("scale_factor_temporal", 4),
            spatial_factor=vae.get("scale_factor_spatial", 8),
            patch_size=tuple(patch) if isinstance(patch, (list, tuple)) else patch,
            max_positions=config.get("rope_max_seq_len", 1024),
            text_dim=config.get("text_dim", 4096),
        )
        layout._check(model)
        for part, given, wanted, name in (
            ("vae", vae.get("z_dim", 16), layout.channels, "channels"),
            ("text_encoder", text_encoder.get("d_model"), layout.text_dim, "text dimensions"),
        ):
            if given != wanted:
                raise ValueError(
                    f"{shortened(model)}: {part} has {shown(given)} {name}, but the transformer takes {wanted}"
                )
        return layout

    def _check(self, model: Path) -> None:
        """ValueError unless every size is a whole number that is possible."""
        try:
            if not isinstance(self.patch_size, tuple) or len(self.patch_size) != 3:
                raise ValueError(f"patch_size must be three positive integers, got {shown(self.patch_size)}")
            for name in ("channels", "temporal_factor", "spatial_factor", "max_positions", "text_dim"):
                require_whole_number(name, getattr(self, name), 1, 2**20)
            for size in self.patch_size:
                require_whole_number("patch_size", size, 1, 2**20)
        except ValueError as error:
            raise ValueError(f"the configuration files of {shortened(model)}: {error}") from None

    @property
    def pixel_multiple(self) -> tuple[int, int]:
        """What heights and widths are multiples of."""
        return self.spatial_factor * self.patch_size[1], self.spatial_factor * self.patch_size[2]

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of that many frames, 4k + 1 of them."""
        return (num_frames - 1) // self.temporal_factor + 1


@dataclass(frozen=True)
class VideoRequest:
    """One call of the pipeline, without its prompts; fields as :meth:`AnyFlowPipeline.__call__` has them.

    Args:
        negatives: number of negative prompts; None if there are none.
        context_frames: frames given to go on from.
    """

    height: int = 480
    width: int = 832
    num_frames: int = 81
    num_inference_steps: int | None = 4
    timesteps: Schedule | None = None
    guidance_scale: float = 1.0
    max_sequence_length: int = 512
    output_type: str = "pil"
    negatives: int | None = None
    context_frames: int = 0

    def check(
        self, layout: ModelLayout, scheduler: FlowMapEulerDiscreteScheduler | None = None, *, batch_size: int = 1
    ) -> None:
        """Whether a model can do it.

        Args:
            layout: of the model.
            scheduler: checks a custom schedule too.
            batch_size: number of prompts.

        Raises:
            ValueError: it cannot.
        """
        for name in ("height", "width", "num_frames", "max_sequence_length"):
            _require_positive_int(name, getattr(self, name))
        self._check_size(layout)
        if self.timesteps is None:
            self.check_steps()
        elif scheduler is not None:
            scheduler.schedule(timesteps=self.timesteps)
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale > 0):
            raise ValueError(f"guidance_scale must be > 0 (1 means no guidance), got {self.guidance_scale}")
        if self.guidance_scale != 1 and self.negatives is None:
            raise ValueError(f"guidance_scale={self.guidance_scale:g} needs a negative_prompt; '' is one")
        if self.negatives not in (None, 1, batch_size):
            raise ValueError(
                f"negative_prompt must be one or as many as the {batch_size} prompts, got {self.negatives}"
            )
        if self.output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {self.output_type!r}")

    def check_steps(self) -> None:
        """ValueError unless ``num_inference_steps`` is a whole number >= 1."""
        _require_positive_int("num_inference_steps", self.num_inference_steps)

    def _check_size(self, layout: ModelLayout) -> None:
        for name, size, multiple in zip(
            ("height", "width"), (self.height, self.width), layout.pixel_multiple, strict=True
        ):
            if size % multiple:
                raise ValueError(f"{name} must be a multiple of {multiple}, got {size}{_nearest(size, multiple, 0)}")
        step = layout.temporal_factor
        for name, frames in (("num_frames", self.num_frames), ("the number of context frames", self.context_frames)):
            if frames and frames % step != 1 % step:
                raise ValueError(f"{name} must be {step}k + 1, got {frames}{_nearest(frames, step, 1)}")
        if self.context_frames >= self.num_frames:
            raise ValueError(
                f"the context has {self.context_frames} frames, and must be shorter than num_frames={self.num_frames}"
            )
        latent = (layout.latent_frames(self.num_frames), self.height // layout.spatial_factor,
                  self.width // layout.spatial_factor)  # fmt: skip
        for name, size, patch in zip(("num_frames", "height", "width"), latent, layout.patch_size, strict=True):
            if size % patch or size // patch > layout.max_positions:
                raise ValueError(
                    f"{name}={getattr(self, name)} makes {size} latents, and the transformer takes multiples of "
                    f"{patch} up to {patch * layout.max_positions}"
                )


def listed(texts: str | Sequence[str] | None) -> list[str]:
    """A text, several or none as a list."""
    return [] if texts is None else [texts] if isinstance(texts, str) else list(texts)


def count_texts(name: str, texts: str | Sequence[str] | None, embeds: Tensor | None, text_dim: int) -> int | None:
    """Number of texts, or of embeddings ``[B, S, text_dim]``; None without any. ValueError for anything else."""
    if texts is not None and embeds is not None:
        raise ValueError(f"give either {name} or {name}_embeds, not both")
    if embeds is not None:
        if embeds.ndim != 3 or embeds.shape[0] == 0 or embeds.shape[2] != text_dim:
            raise ValueError(f"{name}_embeds must be [B, S, {text_dim}], got {tuple(embeds.shape)}")
        return embeds.shape[0]
    if texts is None:
        return None
    several = listed(texts)
    if not several or not all(isinstance(text, str) for text in several):
        raise ValueError(f"{name} must be a text or a list of texts, got {texts!r}")
    return len(several)


def require_one_length(
    embeds: Tensor | None, negative: str | Sequence[str] | None, negative_embeds: Tensor | None, encoded: int
) -> None:
    """ValueError if prompts and negative prompts cannot be one batch; texts are ``encoded`` tokens long."""
    length = encoded if embeds is None else embeds.shape[1]
    other = encoded if negative is not None else length if negative_embeds is None else negative_embeds.shape[1]
    if length != other:
        raise ValueError(f"prompts are {length} tokens long, but negative prompts {other}; make them equal")


def _nearest(size: int, multiple: int, offset: int) -> str:
    lower = (size - offset) // multiple * multiple + offset
    return "; the nearest are " + " and ".join(str(n) for n in (lower, lower + multiple) if n > 0)


def _require_positive_int(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not os.path.lexists(file):
        raise ValueError(
            f"{shortened(folder.parent)} is not a diffusers model folder: it has no {folder.name}/{file.name}"
        )
    config = read_json(file)
    if not isinstance(config, dict):
        raise ValueError(f"{shortened(file)} must hold a JSON object, not {type(config).__name__}")
    return config
