"""Make the frames of one video at a time, with prompts that were encoded ahead."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from anyflow.pipelines.causal import AnyFlowFARPipeline, VideoChunk
from anyflow.pipelines.frames import frames_of_type
from anyflow.pipelines.memory import Memory
from anyflow.pipelines.pipeline import AnyFlowPipeline
from anyflow.pipelines.prompts import VideoPrompt
from anyflow.pipelines.sample_settings import DTYPES, SampleSettings
from anyflow.pipelines.step_budgets import StepBudget
from anyflow.sampling import Callback
from anyflow.utils.writing import system_error


class Renderer:
    """Make videos of prompts that were encoded ahead, without the text encoder in memory.

    Args:
        settings: settings of every video.
        prompts: those that videos will be made of.
        first_frames: first frames of every video, as ``video`` of :meth:`AnyFlowPipeline.__call__`.
        memory, device, compile, cuda_graph: of :meth:`AnyFlowPipeline.from_pretrained`.
        cache_device: device that a causal model's keys and values of earlier chunks wait on; None
            is the model's.

    Raises:
        ValueError: the weights do not fit.
    """

    def __init__(
        self,
        settings: SampleSettings,
        prompts: Sequence[VideoPrompt],
        first_frames: Any = None,
        *,
        memory: Memory = "auto",
        device: str | None = None,
        compile: bool = False,
        cuda_graph: bool = False,
        cache_device: str | None = None,
    ) -> None:
        self.settings, self.first_frames = settings, first_frames
        self._plan, self._cache_device = settings.chunk_plan(), cache_device
        pipeline = AnyFlowPipeline if self._plan is None else AnyFlowFARPipeline
        self.pipe = pipeline.from_pretrained(
            settings.model,
            dtype=DTYPES[settings.dtype],
            device=device,
            memory=memory,
            transformer=settings.transformer,
            compile=compile,
            cuda_graph=cuda_graph,
            euler=settings.euler,
        )
        self._seconds: dict[str, float] = {}
        texts = [prompt.text for prompt in prompts]
        if settings.guidance_scale != 1:
            texts += [self._negative(prompt) for prompt in prompts]
        texts += [text for _, text in self._switches]
        texts = list(dict.fromkeys(texts))
        with self.pipe.timed("encode", self._seconds):
            self._embeds: dict[str, Tensor] = dict(
                zip(texts, self.pipe.encode_prompts(texts), strict=True)
            )
        if settings.lora is not None:
            self.pipe.load_lora(settings.lora)

    def negative(self, prompt: VideoPrompt) -> str | None:
        """Return the negative prompt of a prompt; None without guidance."""
        return None if self.settings.guidance_scale == 1 else self._negative(prompt)

    def num_evaluations(self, budget: StepBudget) -> int:
        """Return the network evaluations of a video, of which guidance makes one call."""
        if self._plan is not None:
            return self._plan.num_evaluations(budget)
        assert isinstance(budget, int)
        return budget

    def frames(
        self,
        prompt: VideoPrompt,
        budget: StepBudget,
        seed: int,
        callback: Callback | None = None,
        before_decoding: Callable[[], None] | None = None,
    ) -> tuple[list[Any], dict[str, float]]:
        """Make one video.

        Args:
            prompt: one of those given.
            budget: network evaluations; of each chunk, where the model is causal.
            seed: seed of the noise.
            callback: callback of :func:`anyflow.sampling.sample`.
            before_decoding: called between the last step and the VAE.

        Returns:
            Its frames as PIL images, and the seconds of ``encode``, ``sample`` and ``decode``.

        Raises:
            RuntimeError: out of memory.
            FloatingPointError: NaN or infinity came up.
        """
        pipe = self.pipe
        output = pipe(
            **self._arguments(prompt, budget, seed), output_type="latent", callback=callback
        )
        seconds = {"encode": self.encode_seconds, "sample": output.seconds["sample"]}
        assert isinstance(output.frames, Tensor)
        if before_decoding is not None:
            before_decoding()
        with pipe.timed("decode", seconds):
            (images,) = frames_of_type(pipe.decode(output.frames), "pil")
        return images, seconds

    def stream(
        self, prompt: VideoPrompt, budget: StepBudget, seed: int, callback: Callback | None = None
    ) -> Iterator[VideoChunk]:
        """Make one video of a causal model, and yield each chunk when it is decoded.

        Args:
            prompt, budget, seed, callback: as for :meth:`frames`.

        Yields:
            Chunks with frames as PIL images, those of the first frames that were given first.

        Raises:
            RuntimeError: out of memory.
            FloatingPointError: NaN or infinity came up.
        """
        assert isinstance(self.pipe, AnyFlowFARPipeline)
        yield from self.pipe.stream(
            **self._arguments(prompt, budget, seed), output_type="pil", callback=callback
        )

    @property
    def encode_seconds(self) -> float:
        """Return the seconds that encoding took for each text."""
        return self._seconds["encode"] / len(self._embeds)

    def _arguments(self, prompt: VideoPrompt, budget: StepBudget, seed: int) -> dict[str, Any]:
        """Return the arguments of the pipeline's call."""
        pipe, settings, negative = self.pipe, self.settings, self.negative(prompt)
        if pipe.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pipe.device)
        arguments = {
            "prompt_embeds": self._embeds[prompt.text],
            "negative_prompt_embeds": None if negative is None else self._embeds[negative],
            "height": settings.height,
            "width": settings.width,
            "num_frames": settings.num_frames,
            "num_inference_steps": budget,
            "guidance_scale": settings.guidance_scale,
            "seed": seed,
            "video": self.first_frames,
            "progress": False,
        }
        if (plan := self._plan) is None:
            return arguments
        return {
            **arguments,
            "num_inference_steps": plan.steps(budget),
            "chunk_partition": plan.partition.sizes,
            "cache_window": settings.cache_window,
            "cache_device": self._cache_device,
            "prompt_switches": {chunk: self._embeds[text] for chunk, text in self._switches},
        }

    def reason(self, error: Exception) -> str:
        """Say in one line why a video could not be made, and free the attempt's memory on a GPU."""
        if self.pipe.device.type == "cuda":
            torch.cuda.empty_cache()
        settings, found = self.settings, system_error(error)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        if isinstance(error, torch.OutOfMemoryError) or (
            isinstance(found, OSError) and found.errno == errno.ENOMEM
        ):
            size = f"{settings.num_frames} frames of {settings.height} x {settings.width} pixels"
            advice = "a smaller --height, --width or --num-frames, or --memory low, needs less"
            return f"no memory for {size}; {advice} ({reason})"
        return reason

    def _negative(self, prompt: VideoPrompt) -> str:
        given = self.settings.negative_prompt if prompt.negative is None else prompt.negative
        return "" if given is None else given

    @property
    def _switches(self) -> tuple[tuple[int, str], ...]:
        switches = self.settings.prompt_switches
        return () if switches is None else switches
