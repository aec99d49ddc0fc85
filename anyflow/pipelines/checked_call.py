"""Hold what a call of a pipeline has checked before a network runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from anyflow.pipelines.inputs import PromptInputs
from anyflow.pipelines.request import VideoRequest
from anyflow.pipelines.steps import StepEnd


@dataclass(frozen=True)
class CheckedCall:
    """Hold a call whose arguments have been checked, and whose noise is drawn.

    Args:
        request: sizes and settings.
        prompts: texts, or embeddings in their place.
        noise: ``[B, F', C, h, w]``.
        pixels: of the first frames, ``[B or 1, F, 3, H, W]`` in [-1, 1]; None without any.
        first_latents: latents of the first frames in their place, or None.
        mean_velocity: False evaluates r = t.
        step_end: the callbacks.
        attention_kwargs: None, or the scale of LoRAs.
        progress: whether a bar is shown; None leaves it to ``set_progress_bar_config``.
    """

    request: VideoRequest
    prompts: PromptInputs
    noise: Tensor
    pixels: Tensor | None
    first_latents: Tensor | None
    mean_velocity: bool
    step_end: StepEnd
    attention_kwargs: Mapping[str, Any] | None
    progress: bool | None

    def repeated(self, batch: Tensor | None) -> Tensor | None:
        """Repeat each prompt's entry for its videos; what is one for all prompts stays one."""
        if batch is None or len(batch) < self.prompts.count:
            return batch
        return batch.repeat_interleave(self.request.num_videos_per_prompt, 0)
