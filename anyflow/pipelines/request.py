"""What a model can make and what is asked of it, checked before a weight is loaded or a network
run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyflow.sampling import Schedule
from anyflow.schedulers import MAX_STEPS, FlowMapEulerDiscreteScheduler
from anyflow.utils.documents import read_json, shortened
from anyflow.utils.rng import randn_like
from anyflow.utils.validation import brief, finite_number, whole_number

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# the encoder's attention takes memory by the square of it; trained models know 512
MAX_SEQUENCE_LENGTH = 4096
MAX_SEED = 2**63 - 1
_LARGEST_SIZE = 2**20  # that a configuration file may say
_SIZED_PARTS = ("transformer", "vae", "text_encoder")

Generators = torch.Generator | Sequence[torch.Generator]


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
        flow_map: False for a plain Wan model, which knows r = t only.
    """

    channels: int
    temporal_factor: int
    spatial_factor: int
    patch_size: tuple[int, int, int]
    max_positions: int
    text_dim: int
    flow_map: bool = True

    @classmethod
    def read(
        cls, model: Path, given: Mapping[str, Path | Mapping[str, Any] | None] | None = None
    ) -> ModelLayout:
        """Read the layout off a diffusers folder.

        Args:
            model: the folder.
            given: other folders, or configurations, of ``transformer``, ``vae`` and
                ``text_encoder``; None takes the model's own.

        Raises:
            ValueError: a configuration is missing or broken, or the parts do not fit together.
        """
        parts = [(given or {}).get(part) for part in _SIZED_PARTS]
        folders = [
            model / name if part is None else part
            for name, part in zip(_SIZED_PARTS, parts, strict=True)
        ]
        return cls.of(
            model, *(_config(part) if isinstance(part, Path) else part for part in folders)
        )

    @classmethod
    def of(
        cls,
        model: Path | str,
        transformer: Mapping[str, Any],
        vae: Mapping[str, Any],
        text_encoder: Mapping[str, Any],
    ) -> ModelLayout:
        """Read the layout off the configurations of three parts; ``model`` names them in errors.

        Raises:
            ValueError: a size is not possible, or the parts do not fit together.
        """
        patch_size = transformer.get("patch_size", (1, 2, 2))
        if not isinstance(patch_size, Sequence) or len(patch_size) != 3:
            raise ValueError(
                f"{model}: patch_size of the transformer must be three numbers, got "
                f"{brief(patch_size)}"
            )
        frames, rows, columns = (
            whole_number(f"{model}: patch_size of the transformer", p, high=_LARGEST_SIZE)
            for p in patch_size
        )
        layout = cls(
            channels=_size(model, "transformer", transformer, "in_channels", 16),
            temporal_factor=_size(model, "vae", vae, "scale_factor_temporal", 4),
            spatial_factor=_size(model, "vae", vae, "scale_factor_spatial", 8),
            patch_size=(frames, rows, columns),
            max_positions=_size(model, "transformer", transformer, "rope_max_seq_len", 1024),
            text_dim=_size(model, "transformer", transformer, "text_dim", 4096),
        )
        for part, found, wanted, name in (
            ("vae", vae.get("z_dim", 16), layout.channels, "channels"),
            ("text_encoder", text_encoder.get("d_model"), layout.text_dim, "text dimensions"),
        ):
            if found != wanted:
                raise ValueError(
                    f"{shortened(model)}: {part} has {brief(found)} {name}, but the transformer "
                    f"takes {wanted}"
                )
        return layout

    @property
    def pixel_multiple(self) -> tuple[int, int]:
        """What heights and widths are multiples of."""
        return self.spatial_factor * self.patch_size[1], self.spatial_factor * self.patch_size[2]

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of that many frames, 4k + 1 of them."""
        return (num_frames - 1) // self.temporal_factor + 1


@dataclass(frozen=True)
class VideoRequest:
    """One call of the pipeline, without its prompts; fields as :meth:`AnyFlowPipeline.__call__` has
    them.

    Numbers of NumPy and torch become Python's.

    Args:
        negatives: number of negative prompts; None if there are none.
        context_frames: frames given to go on from.

    Raises:
        ValueError: a field is no such number.
    """

    height: int = 480
    width: int = 832
    num_frames: int = 81
    num_inference_steps: int | None = 50
    sigmas: Schedule | None = None
    timesteps: Schedule | None = None
    guidance_scale: float = 1.0
    num_videos_per_prompt: int = 1
    max_sequence_length: int = 512
    output_type: str = "np"
    negatives: int | None = None
    context_frames: int = 0

    def __post_init__(self) -> None:
        for name in ("height", "width", "num_frames", "num_videos_per_prompt"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        length = whole_number(
            "max_sequence_length", self.max_sequence_length, high=MAX_SEQUENCE_LENGTH
        )
        object.__setattr__(self, "max_sequence_length", length)
        object.__setattr__(
            self, "guidance_scale", finite_number("guidance_scale", self.guidance_scale)
        )
        if self.sigmas is None and self.timesteps is None:
            steps = whole_number("num_inference_steps", self.num_inference_steps, high=MAX_STEPS)
            object.__setattr__(self, "num_inference_steps", steps)

    def schedule(self, scheduler: FlowMapEulerDiscreteScheduler) -> Tensor:
        """Return the sigmas, fp64 ``[n + 1]`` with the terminal 0; ValueError for a custom schedule
        that cannot be.
        """
        custom = self.sigmas is not None or self.timesteps is not None
        steps = None if custom else self.num_inference_steps
        return scheduler.schedule(steps, sigmas=self.sigmas, timesteps=self.timesteps)

    def check(self, layout: ModelLayout, *, batch_size: int = 1) -> None:
        """Check that a model can do it.

        Args:
            layout: of the model.
            batch_size: number of prompts.

        Raises:
            ValueError: it cannot.
        """
        self._check_size(layout)
        if not self.guidance_scale >= 0:
            raise ValueError(
                "guidance_scale must be >= 0 (up to 1 means no guidance), got "
                f"{self.guidance_scale}"
            )
        if self.guided and self.negatives is None:
            raise ValueError(
                f"guidance_scale={self.guidance_scale:g} needs a negative_prompt; '' is one"
            )
        if self.negatives not in (None, 1, batch_size):
            raise ValueError(
                f"negative_prompt must be one or as many as the {batch_size} prompts, got "
                f"{self.negatives}"
            )
        if not isinstance(self.output_type, str) or self.output_type not in OUTPUT_TYPES:
            raise ValueError(
                f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got "
                f"{brief(self.output_type)}"
            )

    @property
    def guided(self) -> bool:
        """True above a scale of 1, as in diffusers: the network is then evaluated for the negative
        prompt too.
        """
        return self.guidance_scale > 1

    def latent_shape(self, layout: ModelLayout, batch_size: int) -> tuple[int, int, int, int, int]:
        """Return the shape ``[B, F', C, h, w]`` of the latents of so many videos."""
        size = (self.height // layout.spatial_factor, self.width // layout.spatial_factor)
        return (batch_size, layout.latent_frames(self.num_frames), layout.channels, *size)

    def _check_size(self, layout: ModelLayout) -> None:
        for name, size, multiple in zip(
            ("height", "width"), (self.height, self.width), layout.pixel_multiple, strict=True
        ):
            if size % multiple:
                raise ValueError(
                    f"{name} must be a multiple of {multiple}, got "
                    f"{size}{_nearest(size, multiple, 0)}"
                )
        step = layout.temporal_factor
        for name, frames in (
            ("num_frames", self.num_frames),
            ("the number of context frames", self.context_frames),
        ):
            if frames and frames % step != 1 % step:
                raise ValueError(
                    f"{name} must be {step}k + 1, got {frames}{_nearest(frames, step, 1)}"
                )
        if self.context_frames >= self.num_frames:
            raise ValueError(
                f"the context has {self.context_frames} frames, and must be shorter than "
                f"num_frames={self.num_frames}"
            )
        latent = (layout.latent_frames(self.num_frames), self.height // layout.spatial_factor,
                  self.width // layout.spatial_factor)  # fmt: skip
        for name, size, patch in zip(
            ("num_frames", "height", "width"), latent, layout.patch_size, strict=True
        ):
            given, most = getattr(self, name), patch * layout.max_positions
            if size > most:
                frames = name == "num_frames"
                limit = (
                    (most - 1) * layout.temporal_factor + 1
                    if frames
                    else most * layout.spatial_factor
                )
                raise ValueError(
                    f"{name} must be <= {limit}{'' if frames else ' pixels'} for this model, got "
                    f"{given}"
                )
            if size % patch:
                raise ValueError(
                    f"{name}={given} makes {size} latents, and the transformer takes multiples of "
                    f"{patch}"
                )


def listed(texts: str | Sequence[str] | None) -> list[str]:
    """Return a text, several or none as a list."""
    return [] if texts is None else [texts] if isinstance(texts, str) else list(texts)


def count_texts(
    name: str, texts: str | Sequence[str] | None, embeds: Tensor | None, text_dim: int
) -> int | None:
    """Count texts, or embeddings ``[B, S, text_dim]``; None without any. ValueError for anything
    else.
    """
    if texts is not None and embeds is not None:
        raise ValueError(f"give either {name} or {name}_embeds, not both")
    if embeds is not None:
        expected = f"{name}_embeds must be a floating-point tensor [B, S, {text_dim}]"
        if not isinstance(embeds, Tensor):
            raise ValueError(f"{expected}, got {brief(embeds)}")
        if (
            embeds.ndim != 3
            or embeds.numel() == 0
            or embeds.shape[2] != text_dim
            or not embeds.is_floating_point()
        ):
            raise ValueError(f"{expected}, got {tuple(embeds.shape)} {embeds.dtype}")
        require_finite_rows(f"{name}_embeds", embeds)
        return embeds.shape[0]
    if texts is None:
        return None
    several = texts if isinstance(texts, (list, tuple)) else [texts]
    if not several or not all(isinstance(text, str) for text in several):
        raise ValueError(f"{name} must be a text or a list of texts, got {brief(texts)}")
    for text in several:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"{name} has a lone surrogate, which is no character: {brief(text)}")
    return len(several)


def require_finite_rows(name: str, tensor: Tensor) -> None:
    """ValueError if a tensor, on any device, holds NaN or infinity; the host waits for it."""
    bad = (~torch.isfinite(tensor)).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"{name} holds NaN or infinity in row {bad[0] + 1} of {len(tensor)}; encoders overflow "
            "in float16: use bf16"
        )


def initial_noise(
    shape: tuple[int, int, int, int, int],
    device: torch.device,
    seed: int | None,
    generator: Generators | None,
    latents: Tensor | None,
) -> Tensor:
    """Draw or take the noise ``[B, F', C, h, w]`` that sampling starts from, fp32 at least.

    Args:
        shape: of the result, frames first.
        device: of the result.
        seed: of one generator for the batch.
        generator: one for the batch, or a list with one for each video, whose draws do not depend
            on the others. They draw on their own devices, ``[B, C, F', h, w]`` as diffusers'
            pipelines do.
        latents: ``[B, C, F', h, w]``, taken in place of a draw; a generator beside them draws
            nothing.

    Raises:
        ValueError: a seed is given beside another one, a list has another length, or one is not
            what it should be.
    """
    if seed is not None and not (generator is None and latents is None):
        raise ValueError("give one of seed, generator and latents")
    batch_size, frames, *rest = shape
    channels_first = (rest[0], frames, *rest[1:])
    if latents is not None:
        expected = (batch_size, *channels_first)
        if (
            not isinstance(latents, Tensor)
            or latents.shape != expected
            or not latents.is_floating_point()
        ):
            got = (
                f"{tuple(latents.shape)} {latents.dtype}"
                if isinstance(latents, Tensor)
                else brief(latents)
            )
            raise ValueError(
                f"latents must be [B, C, F', h, w] = {expected} (channels first) floating point, "
                f"got {got}"
            )
        return latents.to(device, torch.promote_types(latents.dtype, torch.float32)).transpose(1, 2)
    if isinstance(generator, (list, tuple)):
        if not all(isinstance(g, torch.Generator) for g in generator):
            raise ValueError(
                f"generator must be a torch.Generator or a list of them, got {brief(generator)}"
            )
        if len(generator) != batch_size:
            raise ValueError(
                f"generator is a list of {len(generator)}, but there are {batch_size} videos: give "
                "one for each"
            )
        like = torch.empty(1, *channels_first, device=device)
        return torch.cat([randn_like(like, g) for g in generator]).transpose(1, 2)
    if seed is not None:
        generator = torch.Generator().manual_seed(whole_number("seed", seed, 0, MAX_SEED))
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(
            f"generator must be a torch.Generator or a list of them, got {brief(generator)}"
        )
    return randn_like(torch.empty(batch_size, *channels_first, device=device), generator).transpose(
        1, 2
    )


def context_latents(
    latents: Tensor | None, shape: tuple[int, ...], batch_size: int
) -> Tensor | None:
    """Check the latents of first frames, ``[B or 1, fewer than F', C, h, w]`` for videos of a
    shape; None without any.

    Args:
        latents: given.
        shape: of the videos' latents.
        batch_size: number of prompts, B.

    Raises:
        ValueError: they are something else, or hold NaN or infinity.
    """
    if latents is None:
        return None
    fits = (
        isinstance(latents, Tensor)
        and latents.ndim == 5
        and latents.is_floating_point()
        and latents.numel() > 0
    )
    if not fits or latents.shape[0] not in (1, batch_size) or latents.shape[2:] != shape[2:]:
        got = (
            f"{tuple(latents.shape)} {latents.dtype}"
            if isinstance(latents, Tensor)
            else brief(latents)
        )
        raise ValueError(
            f"video_latents must be [B={batch_size} or 1, fewer than F'={shape[1]}, "
            f"{', '.join(map(str, shape[2:]))}] floating point, got {got}"
        )
    if latents.shape[1] >= shape[1]:
        raise ValueError(
            f"video_latents must have fewer than the {shape[1]} latent frames, got "
            f"{latents.shape[1]}"
        )
    require_finite_rows("video_latents", latents)
    return latents


def require_one_length(
    embeds: Tensor | None,
    negative: str | Sequence[str] | None,
    negative_embeds: Tensor | None,
    encoded: int,
) -> None:
    """ValueError if prompts and negative prompts cannot be one batch; texts are ``encoded`` tokens
    long.
    """
    length = encoded if embeds is None else embeds.shape[1]
    other = (
        encoded
        if negative is not None
        else length
        if negative_embeds is None
        else negative_embeds.shape[1]
    )
    if length != other:
        raise ValueError(
            f"prompts are {length} tokens long, but negative prompts {other}; make them equal"
        )


def _nearest(size: int, multiple: int, offset: int) -> str:
    lower = (size - offset) // multiple * multiple + offset
    return "; the nearest are " + " and ".join(str(n) for n in (lower, lower + multiple) if n > 0)


def _size(model: Path | str, part: str, config: Mapping[str, Any], name: str, default: int) -> int:
    return whole_number(
        f"{model}: {name} of the {part}", config.get(name, default), high=_LARGEST_SIZE
    )


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not os.path.lexists(file):
        raise ValueError(
            f"{shortened(folder.parent)} is not a diffusers model folder: it has no "
            f"{folder.name}/{file.name}"
        )
    config = read_json(file)
    if not isinstance(config, dict):
        raise ValueError(f"{shortened(file)} must hold a JSON object, not {type(config).__name__}")
    return config
