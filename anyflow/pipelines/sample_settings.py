"""Hold and check what decides the videos of a folder beside prompts, steps and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from anyflow.formats.lora_file import open_lora
from anyflow.pipelines.loading import ModelPaths
from anyflow.pipelines.plain_wan import (
    is_plain_wan,
    load_scheduler,
    require_flow_map,
    require_one_transformer,
)
from anyflow.pipelines.prompts import VideoPrompt
from anyflow.pipelines.request import VideoRequest
from anyflow.utils.documents import shortened
from anyflow.utils.validation import finite_number

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class SampleSettings:
    """Hold what every video of a folder has in common.

    Args:
        model: diffusers folder, or the name of a model on the Hugging Face Hub.
        transformer: folder or name with another ``transformer`` and its ``scheduler``, or None.
        lora: file or folder of a LoRA, or None.
        height, width: in pixels.
        num_frames: 4k + 1.
        guidance_scale: 1 for none.
        negative_prompt: of prompts without one of their own, used with guidance; None is the empty
            text.
        fps: frames per second.
        dtype: dtype of the transformer and the text encoder: ``"bfloat16"``, ``"float16"`` or
            ``"float32"``.
        euler: evaluate r = t, which is plain Euler; needed for a plain Wan model.
        image, video: file whose frames the videos begin with, or None.
        video_frames: number of frames of ``video``, 4k + 1.
    """

    model: str
    transformer: str | None = None
    lora: str | None = None
    height: int = 480
    width: int = 832
    num_frames: int = 81
    guidance_scale: float = 1.0
    negative_prompt: str | None = None
    fps: float = 16.0
    dtype: str = "bfloat16"
    euler: bool = False
    image: str | None = None
    video: str | None = None
    video_frames: int | None = None

    def check(self) -> None:
        """Raise a ValueError if the model cannot make such videos; no weight is loaded."""
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if not 0.01 <= finite_number("fps", self.fps) < 1000:
            raise ValueError(f"fps must be >= 0.01 and < 1000, got {self.fps}")
        if self.lora is not None:
            open_lora(self.lora)
        VideoPrompt("", self.negative_prompt).check("")
        if self.image is not None and self.video is not None:
            raise ValueError("give either image (one frame) or video (several), not both")
        paths = ModelPaths.find(self.model, self.transformer)
        require_one_transformer(paths.model)
        if not self.euler:
            require_flow_map(paths.transformer / "transformer")
        load_scheduler(paths.scheduler, euler=self.euler)
        VideoRequest(
            height=self.height,
            width=self.width,
            num_frames=self.num_frames,
            guidance_scale=self.guidance_scale,
            negatives=1,
            context_frames=self.first_frames,
        ).check(paths.layout())

    @property
    def first_frames(self) -> int:
        """Return the number of frames that the videos begin with."""
        if self.image is not None:
            return 1
        return 0 if self.video_frames is None else self.video_frames

    def hints(self, prompts: Sequence[VideoPrompt]) -> list[str]:
        """Return what a user may not have meant, a line each."""
        lines = []
        transformer = ModelPaths.find(self.model, self.transformer).transformer / "transformer"
        if self.guidance_scale <= 1 and is_plain_wan(transformer):
            lines.append(
                f"{shortened(transformer)} is a plain Wan model, which needs guidance and many "
                "steps: --guidance 5 --steps 50"
            )
        negatives = [self.negative_prompt, *(prompt.negative for prompt in prompts)]
        if self.guidance_scale <= 1 and any(negative is not None for negative in negatives):
            lines.append(
                "negative prompts have no effect without guidance (--guidance is "
                f"{self.guidance_scale:g})"
            )
        return lines
