"""Make videos chunk by chunk by the causal model, whole or as a stream of decoded frames."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor

from anyflow.pipelines.causal_request import CausalVideoRequest
from anyflow.pipelines.causal_steps import ChunkStepEnd
from anyflow.pipelines.checked_call import CheckedCall
from anyflow.pipelines.chunk_decoder import ChunkDecoder
from anyflow.pipelines.frames import frames_of_type
from anyflow.pipelines.inputs import Generators, PromptInputs, PromptSwitches
from anyflow.pipelines.pipeline import AnyFlowPipeline, VideoOutput
from anyflow.pipelines.plain_wan import flow_map_scheduler
from anyflow.pipelines.steps import StepEnd, lora_scale, progress_bar
from anyflow.sampling import Callback, ChunkSampler, Schedule
from anyflow.utils.validation import brief

_NOT_OF_A_CALL = ("self", "return_dict")


@dataclass(frozen=True)
class VideoChunk:
    """Hold a part of a video, as a stream gives it.

    Args:
        chunk: number of the chunk, from 0; chunks of the context are among them.
        frames: as in :class:`VideoOutput`, of this chunk alone.
        seconds: seconds of ``encode`` (in the first chunk), ``sample`` and ``decode``.
    """

    chunk: int
    frames: Any
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _CausalCall:
    """Hold a checked call of the causal pipeline."""

    call: CheckedCall
    request: CausalVideoRequest
    switches: PromptSwitches


class AnyFlowFARPipeline(AnyFlowPipeline):
    """Make videos of texts, images and videos by the causal model, chunk by chunk.

    ``pipe = AnyFlowFARPipeline.from_pretrained(path); pipe("a red panda", num_inference_steps=4)``
    makes a whole video, and ``for part in pipe.stream("a red panda", num_inference_steps=4)`` gives
    the frames of each chunk as soon as it is sampled and decoded.

    Loading, parts, memory plans and LoRA are those of :class:`AnyFlowPipeline`. A call has the
    arguments of diffusers' ``AnyFlowFARPipeline``, and gives the same videos where its arithmetic
    is right (``tests/pipelines/test_causal_pipeline.py``): diffusers' cached evaluations attend to
    padding wherever the tokens of a chunk are no multiple of 128. Beside what
    :class:`AnyFlowPipeline` lists, these differ on purpose:

    - ``use_kv_cache=False`` works, and gives the same video within rounding;
    - first frames must end with a chunk, and heights and widths be multiples of 32 where frames are
      compressed;
    - a prompt that a callback changes reaches the evaluations and the cache, that of earlier chunks
      included.
    """

    _causal = True

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        video: Any = None,
        video_latents: Tensor | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        num_inference_steps: int | Sequence[int] | None = 50,
        sigmas: Schedule | None = None,
        timesteps: Schedule | None = None,
        guidance_scale: float = 1.0,
        num_videos_per_prompt: int = 1,
        generator: Generators | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        attention_kwargs: Mapping[str, Any] | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        max_sequence_length: int = 512,
        use_mean_velocity: bool | None = None,
        use_kv_cache: bool = True,
        chunk_partition: Sequence[int] | None = None,
        *,
        seed: int | None = None,
        image: Any = None,
        callback: Callback | None = None,
        progress: bool | None = None,
        use_cache: bool = True,
        prompt_switches: Mapping[int, str | Sequence[str] | Tensor] | None = None,
        cache_window: int | None = None,
        cache_device: torch.device | str | None = None,
    ) -> VideoOutput:
        """Make one video for each prompt, or several.

        Args:
            prompt, negative_prompt, sigmas, timesteps, guidance_scale, num_videos_per_prompt,
                generator, latents, prompt_embeds, negative_prompt_embeds, output_type, return_dict,
                attention_kwargs, max_sequence_length, use_mean_velocity, seed: as for
                :class:`AnyFlowPipeline`.
            video: first frames to keep, 4k + 1 of them, whose latents end with a chunk: 1, 13, 25,
                .. frames for the published partition.
            video_latents: their normalized latents ``[B or 1, F'', C, h, w]`` in place of them.
            height, width: pixels, multiples of 16, and of 32 where frames are compressed.
            num_frames: 4k + 1, as many as the chunks have.
            num_inference_steps: network evaluations of a chunk, or one number for each chunk, those
                of first frames among them; ignored when sigmas or timesteps are given.
            callback_on_step_end, callback_on_step_end_tensor_inputs: diffusers'
                ``callback_on_step_end(pipe, index, timestep, tensors)``, with the number of the
                step in its chunk, ``latents`` of the chunk (frames first), ``prompt_embeds`` and
                ``negative_prompt_embeds``. It may return them and set ``pipe._guidance_scale``;
                text and guidance are then those of everything that follows, and the chunks before
                are encoded again with them. With ``pipe._interrupt = True`` the video ends with the
                chunk in work, whose latents are those after that step.
            use_kv_cache: diffusers' name of use_cache; False in either turns the cache off.
            chunk_partition: latent frames of each chunk; None takes the model's.
            image: one first frame to keep, in place of video; the first chunk must have one latent
                frame.
            callback: called as ``callback(index, timestep, latents)`` after each evaluation,
                counted over all chunks, with the chunk's latents; a tensor returned replaces them.
            progress: show a bar of the evaluations of all chunks, or do not; None shows it as
                ``set_progress_bar_config`` says.
            use_cache: False computes everything before a chunk anew in each evaluation.
            prompt_switches: texts, or embeddings ``[B or 1, S, text_dim]``, by the number of the
                first chunk that they are for. The chunks before are encoded again with them.
            cache_window: most compressed chunks that are kept, the first one and the latest; an
                approximation, which bounds the memory of any number of chunks.
            cache_device: device that keys and values wait on, such as ``"cpu"``.

        Raises:
            ValueError: something cannot work; raised before any network runs.
            FloatingPointError: NaN or infinity, as float16 makes it, is in the embeddings of a
                prompt, in the latents after a step, which is named, or in the decoded frames.
        """
        arguments = {k: v for k, v in locals().items() if k not in _NOT_OF_A_CALL}
        call = self._checked_causal_call(arguments)
        seconds: dict[str, float] = {}
        with closing(self._sampled(call, seconds)) as chunks:
            parts = [chunk_latents for _, chunk_latents in chunks]
        return self._output(torch.cat(parts, dim=1), seconds, output_type, return_dict)

    def stream(
        self, prompt: str | Sequence[str] | None = None, **arguments: Any
    ) -> Generator[VideoChunk, None, None]:
        """Make videos, and give the frames of each chunk as soon as it is sampled and decoded.

        Chunks of first frames come first. Put together, the frames are those of the call. The
        arguments are checked, and the noise is drawn, by this method; networks run when chunks are
        asked for. Closing the generator ends the sampling, and frees the device by the memory plan.
        With ``cache_window`` the memory does not grow with the number of chunks, the noise apart.

        Args:
            prompt: one or several texts.
            arguments: those of the call by name, without ``return_dict``.

        Returns:
            A generator of :class:`VideoChunk`.

        Raises:
            TypeError: the call has no such argument.
            ValueError: as the call; raised before the generator is returned.
            FloatingPointError: as the call, for the chunk that is asked for.
        """
        given = inspect.signature(type(self).__call__).bind(self, prompt, **arguments)
        if "return_dict" in given.arguments:
            raise TypeError("stream() yields chunks, and takes no return_dict")
        given.apply_defaults()
        call = self._checked_causal_call(
            {k: v for k, v in given.arguments.items() if k not in _NOT_OF_A_CALL}
        )
        decodes = call.request.output_type != "latent"
        return self._streamed(call, ChunkDecoder(self.vae) if decodes else None)

    @torch.no_grad()
    def _streamed(
        self, call: _CausalCall, decoder: ChunkDecoder | None
    ) -> Generator[VideoChunk, None, None]:
        """Sample and decode; without a decoder the frames are latents."""
        seconds: dict[str, float] = {}
        try:
            with closing(self._sampled(call, seconds, check_each=True)) as chunks:
                for chunk, latents in chunks:
                    frames: Any = latents.transpose(1, 2)
                    if decoder is not None:
                        with self.timed("decode", seconds):
                            pixels = decoder.decode(latents)
                            frames = frames_of_type(pixels, call.request.output_type)
                    yield VideoChunk(chunk, frames, dict(seconds))
                    seconds.clear()
        finally:
            self.maybe_free_model_hooks()

    @torch.no_grad()
    def _sampled(
        self, call: _CausalCall, seconds: dict[str, float], *, check_each: bool = False
    ) -> Generator[tuple[int, Tensor], None, None]:
        """Yield the number and the clean latents ``[B, p, C, h, w]`` of each chunk.

        Args:
            call: what to sample.
            seconds: gets those of ``encode`` and ``sample``.
            check_each: look for NaN after each chunk, not only after the last one.
        """
        scheduler, transformer = flow_map_scheduler(self.scheduler), self.transformer
        checked, request = call.call, call.request
        self._begin(checked, 0)
        with self.timed("encode", seconds):
            text, negative, context, others = self._encoded(checked, call.switches.all_texts)
        switches = {
            chunk: checked.repeated(embeds.to(text.device))
            for chunk, embeds in call.switches.encoded(others).items()
        }
        schedules = request.schedules(scheduler, len(request.partition(self.layout)))
        steps = ChunkStepEnd(self, checked.step_end)
        try:
            sampler = ChunkSampler(
                self._turns.transformer(transformer),
                scheduler,
                checked.noise,
                text,
                chunk_partition=request.partition(self.layout).sizes,
                num_inference_steps=request.num_inference_steps,
                sigmas=request.sigmas,
                timesteps=request.timesteps,
                guidance_scale=request.guidance_scale if request.guided else 1.0,
                negative_prompt_embeds=negative,
                context_latents=context,
                use_mean_velocity=checked.mean_velocity,
                use_cache=request.use_cache,
                callback=steps,
                prompt_switches=cast(Mapping[int, Tensor], switches),
                cache_window=request.cache_window,
                cache_device=request.cache_device,
                text_may_change=checked.step_end.function is not None,
            )
            steps.sampler = sampler
            self._num_timesteps = sampler.num_evaluations
            yield from enumerate(sampler.context)
            with progress_bar(self, sampler.num_evaluations, checked.progress) as steps.advance:
                chunks = iter(sampler)
                for schedule in schedules[sampler.first_chunk :]:
                    scheduler.set_timesteps(sigmas=schedule, device=self._execution_device)
                    self._turns.transformer(transformer)  # other calls may have come between
                    with (
                        self.timed("sample", seconds),
                        lora_scale(transformer, checked.attention_kwargs),
                    ):
                        sampled = next(chunks, None)
                    if sampled is None:  # a callback has ended the sampling
                        break
                    if check_each:
                        sampler.network.checked(sampled[1])
                    yield sampled
            sampler.network.checked(sampled[1] if sampled is not None else checked.noise)
        finally:
            self._turns.rest(transformer)

    def _checked_causal_call(self, arguments: Mapping[str, Any]) -> _CausalCall:
        """Check the arguments of a call, by their names, and draw its noise."""
        a = dict(arguments)
        for name in ("use_cache", "use_kv_cache"):
            if not isinstance(a[name], bool):
                raise ValueError(f"{name} must be True or False, got {brief(a[name])}")
        a["use_cache"] = a["use_cache"] and a.pop("use_kv_cache")
        given = PromptInputs.checked(
            a["prompt"],
            a["prompt_embeds"],
            a["negative_prompt"],
            a["negative_prompt_embeds"],
            self.layout.text_dim,
        )
        fields = CausalVideoRequest.__dataclass_fields__
        request = CausalVideoRequest(
            **{name: value for name, value in a.items() if name in fields},
            negatives=given.negative_count,
        )
        step_end = StepEnd(
            a["callback"], a["callback_on_step_end"], a["callback_on_step_end_tensor_inputs"]
        )
        call = self._checked_call(
            request,
            given,
            first_frames=(a["image"], a["video"], a["video_latents"]),
            noise=(a["seed"], a["generator"], a["latents"]),
            use_mean_velocity=a["use_mean_velocity"],
            step_end=step_end,
            attention_kwargs=a["attention_kwargs"],
            progress=a["progress"],
        )
        chunks = range(self._given_chunks(request, call), len(request.partition(self.layout)))
        switches = PromptSwitches.checked(
            a["prompt_switches"], call.prompts, self.layout.text_dim, request.max_sequence_length,
            chunks,
        )  # fmt: skip
        return _CausalCall(call, request, switches)

    def _given_chunks(self, request: CausalVideoRequest, call: CheckedCall) -> int:
        """Return the chunks of a call's first frames; ValueError if they end inside of a chunk."""
        frames = 0 if call.pixels is None else call.pixels.shape[1]
        latents = 0 if call.first_latents is None else call.first_latents.shape[1]
        given = replace(request, context_frames=frames, context_latents=latents)
        return given.first_chunk(self.layout)
