"""Hold and check what decides the videos of a folder beside prompts, steps and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from anyflow.formats.lora_file import open_lora
from anyflow.pipelines.causal_request import CausalVideoRequest
from anyflow.pipelines.chunk_plan import ChunkPlan
from anyflow.pipelines.loading import ModelPaths
from anyflow.pipelines.plain_wan import (
    is_plain_wan,
    load_scheduler,
    require_flow_map,
    require_one_transformer,
)
from anyflow.pipelines.prompts import VideoPrompt
from anyflow.pipelines.request import VideoRequest
from anyflow.pipelines.step_budgets import StepBudget, budget_text
from anyflow.utils.documents import shortened
from anyflow.utils.validation import brief, finite_number

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
        chunks: latent frames of each chunk of a causal model; None takes the model's.
        cache_window: most compressed chunks that a causal model attends to; None is all of them.
        prompt_switches: chunks of a causal model, each with the text that goes on from it; None is
            no switch.
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
    chunks: tuple[int, ...] | None = None
    cache_window: int | None = None
    prompt_switches: tuple[tuple[int, str], ...] | None = None

    def check(
        self, *, stream: bool = False, cache_device: str | None = None, cuda_graph: bool = False
    ) -> None:
        """Check that the model can make such videos; no weight is loaded.

        Args:
            stream: videos are written chunk by chunk.
            cache_device: device that the keys and values of earlier chunks wait on.
            cuda_graph: evaluations are replayed from a CUDA graph.

        Raises:
            ValueError: it cannot.
        """
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
        layout = paths.layout()
        if layout.causal is None:
            self._refuse_causal_options(stream=stream, cache_device=cache_device)
            VideoRequest(**self._request()).check(layout)
            return
        self._causal_request(cache_device).check(layout)
        self._check_switches(ChunkPlan.of(self._causal_request(), layout))
        if cuda_graph:
            raise ValueError(
                "cuda_graph is not available for causal models, whose caches grow with the video"
            )

    def chunk_plan(self) -> ChunkPlan | None:
        """Return the chunks of a causal model's videos, None for a bidirectional model.

        Raises:
            ValueError: the chunks do not make up the videos.
        """
        layout = ModelPaths.find(self.model, self.transformer).layout()
        return None if layout.causal is None else ChunkPlan.of(self._causal_request(), layout)

    def check_steps(self, budgets: Sequence[StepBudget]) -> None:
        """Raise a ValueError for numbers of steps that the model's videos cannot be made with."""
        plan = self.chunk_plan()
        for budget in budgets:
            if plan is not None:
                plan.steps(budget)
            elif not isinstance(budget, int):
                raise ValueError(
                    f"steps {budget_text(budget)} are for the chunks of a causal model, and "
                    f"{self._transformer()} is bidirectional: it samples all frames together, so "
                    f"give one number, as {budget[0]}"
                )

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON gives them back, sequences as lists."""
        switches = self.prompt_switches
        return {
            **asdict(self),
            "chunks": None if self.chunks is None else list(self.chunks),
            "prompt_switches": None if switches is None else [list(pair) for pair in switches],
        }

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

    def _request(self) -> dict[str, Any]:
        return {
            "height": self.height,
            "width": self.width,
            "num_frames": self.num_frames,
            "guidance_scale": self.guidance_scale,
            "negatives": 1,
            "context_frames": self.first_frames,
        }

    def _causal_request(self, cache_device: str | None = None) -> CausalVideoRequest:
        return CausalVideoRequest(
            **self._request(),
            chunk_partition=self.chunks,
            cache_window=self.cache_window,
            cache_device=cache_device,
        )

    def _transformer(self) -> str:
        paths = ModelPaths.find(self.model, self.transformer)
        return shortened(paths.transformer / "transformer")

    def _refuse_causal_options(self, *, stream: bool, cache_device: str | None) -> None:
        """Raise a ValueError, which names the options, where a bidirectional model gets any."""
        given = {
            "--chunks": self.chunks is not None,
            "--stream": stream,
            "--cache-window": self.cache_window is not None,
            "--cache-device": cache_device is not None,
            "--switch": self.prompt_switches is not None,
        }
        if names := [name for name, used in given.items() if used]:
            verb = "is" if len(names) == 1 else "are"
            raise ValueError(
                f"{', '.join(names)} {verb} for causal models, which sample chunk by chunk, and "
                f"{self._transformer()} is bidirectional"
            )

    def _check_switches(self, plan: ChunkPlan) -> None:
        switches = () if self.prompt_switches is None else self.prompt_switches
        for chunk, text in switches:
            if not plan.given <= chunk < len(plan.partition):
                raise ValueError(
                    f"a prompt cannot be switched at chunk {brief(chunk)}: the chunks that are "
                    f"sampled are {plan.given} to {len(plan.partition) - 1}"
                )
            VideoPrompt(text).check(f"switch at chunk {chunk}: ")
        if len(dict(switches)) < len(switches):
            raise ValueError("two prompts are given for one chunk to switch to")
