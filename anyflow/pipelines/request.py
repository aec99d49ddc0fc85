"""Check what is asked of a model before a weight is loaded or a network run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from anyflow.pipelines.layout import ModelLayout
from anyflow.sampling import Schedule
from anyflow.schedulers import MAX_STEPS, FlowMapEulerDiscreteScheduler
from anyflow.utils.validation import brief, finite_number, whole_number

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# The encoder's attention takes memory by the square of the length; trained models know 512.
MAX_SEQUENCE_LENGTH = 4096
MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class VideoRequest:
    """Hold one call of the pipeline without its prompts, by the names of its arguments.

    Numbers of NumPy and torch become Python's.

    Args:
        negatives: number of negative prompts; None without one.
        context_frames: number of clean first frames that are given.

    Raises:
        ValueError: a field is no such number.
    """

    height: int = 480
    width: int = 832
    num_frames: int = 81
    num_inference_steps: int | Sequence[int] | None = 50
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
            object.__setattr__(self, "num_inference_steps", self._checked_steps())

    def _checked_steps(self) -> int | list[int]:
        return whole_number("num_inference_steps", self.num_inference_steps, high=MAX_STEPS)

    def schedule(self, scheduler: FlowMapEulerDiscreteScheduler) -> Tensor:
        """Return the sigmas, fp64 ``[n + 1]`` with the terminal 0, or raise a ValueError."""
        custom = self.sigmas is not None or self.timesteps is not None
        steps = None if custom else cast(int, self.num_inference_steps)
        return scheduler.schedule(steps, sigmas=self.sigmas, timesteps=self.timesteps)

    def require_schedule(self, scheduler: FlowMapEulerDiscreteScheduler) -> None:
        """Raise a ValueError for a schedule that is none."""
        self.schedule(scheduler)

    def check(self, layout: ModelLayout, *, batch_size: int = 1) -> None:
        """Check that a model can do it.

        Args:
            layout: layout of the model.
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
        """Tell whether the network is evaluated for the negative prompt too: above a scale of 1."""
        return self.guidance_scale > 1

    def latent_shape(self, layout: ModelLayout, batch_size: int) -> tuple[int, int, int, int, int]:
        """Return the shape ``[B, F', C, h, w]`` of the latents of ``batch_size`` videos."""
        size = (self.height // layout.spatial_factor, self.width // layout.spatial_factor)
        return (batch_size, layout.latent_frames(self.num_frames), layout.channels, *size)

    def _check_size(self, layout: ModelLayout) -> None:
        for name, size, multiple in zip(
            ("height", "width"), (self.height, self.width), layout.pixel_multiple, strict=True
        ):
            if size % multiple:
                raise ValueError(
                    f"{name} must be a multiple of {multiple}, got "
                    f"{size}{nearest_sizes(size, multiple, 0)}"
                )
        step = layout.temporal_factor
        for name, frames in (
            ("num_frames", self.num_frames),
            ("the number of first frames", self.context_frames),
        ):
            if frames and frames % step != 1 % step:
                raise ValueError(
                    f"{name} must be {step}k + 1, got {frames}{nearest_sizes(frames, step, 1)}"
                )
        if self.context_frames >= self.num_frames:
            raise ValueError(
                f"{self.context_frames} first frames are given, and must be fewer than "
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


def nearest_sizes(size: int, multiple: int, offset: int) -> str:
    """Name the nearest sizes that are a multiple and an offset, for the end of an error."""
    lower = (size - offset) // multiple * multiple + offset
    return "; the nearest are " + " and ".join(str(n) for n in (lower, lower + multiple) if n > 0)
