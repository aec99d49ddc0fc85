"""Make videos of texts: encode, sample, decode."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from diffusers.pipelines.anyflow.pipeline_output import AnyFlowPipelineOutput
from torch import Tensor, nn

from anyflow.pipelines.checked_call import CheckedCall
from anyflow.pipelines.frames import first_frame_pixels, frames_of_type
from anyflow.pipelines.inputs import (
    Generators,
    PromptInputs,
    checked_first_frames,
    initial_noise,
    listed,
)
from anyflow.pipelines.parts import PipelineParts
from anyflow.pipelines.plain_wan import flow_map_scheduler
from anyflow.pipelines.request import VideoRequest
from anyflow.pipelines.steps import StepEnd, lora_scale, progress_bar, run_steps
from anyflow.pipelines.wan import decode_latents, encode_prompt, encode_video
from anyflow.sampling import Callback, Schedule
from anyflow.utils.validation import brief


@dataclass
class VideoOutput(AnyFlowPipelineOutput):
    """Hold what a call of the pipeline gives.

    Args:
        frames: by ``output_type``: ``"np"`` ``[B, F, H, W, 3]`` and ``"pt"`` ``[B, F, 3, H, W]``
            fp32 in [0, 1], ``"pil"`` a list of images for each video, ``"latent"``
            ``[B, C, F', h, w]``.
        seconds: seconds of ``encode`` (loading the text encoder included where it is not kept),
            ``sample`` and ``decode``.
    """

    seconds: dict[str, float] = field(default_factory=dict)


class AnyFlowPipeline(PipelineParts):
    """Make videos of texts.

    ``pipe = AnyFlowPipeline.from_pretrained(path); pipe("a red panda").frames[0]``

    The class is a subclass of diffusers' ``AnyFlowPipeline``: its calls give the same videos and
    latents in the same layouts (``tests/pipelines/test_same_calls.py``), and ``to``, offloading,
    LoRA and progress bars are diffusers'. The pipelines differ on purpose in this:

    - custom ``sigmas`` and ``timesteps`` are used verbatim, where diffusers shifts them once more;
    - noise and latents stay fp32 between the steps of a bf16 model;
    - ``from_pretrained`` loads bf16 and a VAE of fp32, on a GPU if torch finds one; diffusers
      loads fp32 on the CPU;
    - PIL images of ``video`` are cut to the size, not stretched;
    - what diffusers rounds or ignores is a ``ValueError``, raised before any network runs, and NaN
      or infinity a ``FloatingPointError``;
    - first frames are clean in the latents that callbacks see; a callback may return None;
    - ``save_pretrained`` writes into a new or empty folder, completely or not at all.

    ``transformer``, ``vae``, ``scheduler``, ``tokenizer`` and ``text_encoder`` are ordinary
    modules, which may be replaced. Where ``memory`` is ``"low"`` the large ones take turns
    on the device: the text encoder is loaded for each call and freed again (the attribute is None),
    the transformer is loaded when it is first needed and is on the device while it samples, and the
    VAE works in tiles that bound its memory. Where it is ``"stream"``, the weights of the
    transformer, and of a text encoder that does not fit, come to the device block by block, from
    pinned main memory and while the block before is at work. diffusers'
    ``enable_model_cpu_offload`` and its kin take the plan's place.
    """

    def encode_prompts(
        self, prompts: Sequence[str], max_sequence_length: int = 512
    ) -> list[Tensor]:
        """Encode each prompt to ``[1, max_sequence_length, text_dim]`` fp32 on the CPU, padded."""
        text_encoder = self._turns.text_encoder(self._loaded_text_encoder())
        encoded = [
            encode_prompt(text_encoder, self.tokenizer, p, max_sequence_length) for p in prompts
        ]
        if self.memory == "low" and text_encoder is self.text_encoder:
            text_encoder.to("cpu")
        return [
            nn.functional.pad(e, (0, 0, 0, max_sequence_length - len(e)))[None] for e in encoded
        ]

    def _get_t5_prompt_embeds(
        self,
        prompt: str | list[str],
        num_videos_per_prompt: int = 1,
        max_sequence_length: int = 226,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Encode prompts for diffusers' ``encode_prompt``, under every memory plan."""
        encoded = torch.cat(self.encode_prompts(listed(prompt), max_sequence_length))
        target = self._execution_device if device is None else device
        return encoded.repeat_interleave(num_videos_per_prompt, 0).to(target, dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode ``latents[B, C, F', h, w]`` to ``[B, F, 3, H, W]`` in [0, 1] (VAE's dtype)."""
        return decode_latents(self.vae, latents.transpose(1, 2))

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
        num_inference_steps: int | None = 50,
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
        *,
        seed: int | None = None,
        image: Any = None,
        callback: Callback | None = None,
        progress: bool | None = None,
    ) -> VideoOutput:
        """Make one video for each prompt, or several.

        The arguments are those of diffusers' pipeline, in its order, followed by keyword arguments
        of this library; numbers may be of NumPy or torch.

        Args:
            prompt: one or several texts.
            video: first frames to keep, 4k + 1 of them; see
                :func:`anyflow.pipelines.frames.first_frame_pixels`.
            video_latents: their normalized latents ``[B or 1, F'', C, h, w]`` in place of them.
            negative_prompt: one, or one for each prompt, used where guidance_scale is above 1;
                ``""`` if left out.
            height, width: pixels, multiples of 16.
            num_frames: 4k + 1.
            num_inference_steps: network evaluations; ignored when sigmas or timesteps are given.
            sigmas: custom schedule in [0, 1], used verbatim.
            timesteps: custom schedule in [0, 1000], used verbatim.
            guidance_scale: up to 1 (no guidance) for checkpoints with guidance distilled in.
            num_videos_per_prompt: videos of a prompt come one behind another.
            generator: draws the noise as diffusers' pipelines do; or a list with one for each
                video.
            latents: noise, ``[B, C, F', h, w]``, in place of a draw. Never written.
            prompt_embeds: ``[B, S, text_dim]`` in place of prompt, as :meth:`encode_prompts` gives
                them.
            negative_prompt_embeds: ``[B or 1, S, text_dim]`` in place of negative_prompt.
            output_type: ``"pil"``, ``"np"``, ``"pt"`` or ``"latent"``; see :class:`VideoOutput`.
            return_dict: False returns a tuple of the frames.
            attention_kwargs: None, or ``{"scale": s}`` of LoRAs that are loaded and not merged.
            callback_on_step_end, callback_on_step_end_tensor_inputs: see
                :class:`anyflow.pipelines.steps.StepEnd`.
            max_sequence_length: tokens after which prompts are cut off; trained models expect 512.
            use_mean_velocity: False evaluates r = t, plain Euler; None does so where ``euler`` was
                given on loading.
            seed: seed of the noise, on any device the same; with neither seed, generator nor
                latents it is fresh.
            image: one first frame to keep, in place of video.
            callback: callback of :func:`anyflow.sampling.sample`.
            progress: show a bar of the steps, or do not; None shows it as
                ``set_progress_bar_config`` says.

        Raises:
            ValueError: something cannot work; raised before any network runs.
            FloatingPointError: NaN or infinity, as float16 makes it, is in the embeddings of a
                prompt, in the latents after a step, which is named, or in the decoded frames.
        """
        given = PromptInputs.checked(
            prompt, prompt_embeds, negative_prompt, negative_prompt_embeds, self.layout.text_dim
        )
        request = VideoRequest(
            height,
            width,
            num_frames,
            num_inference_steps,
            sigmas,
            timesteps,
            guidance_scale,
            num_videos_per_prompt,
            max_sequence_length,
            output_type,
            negatives=given.negative_count,
        )
        call = self._checked_call(
            request,
            given,
            first_frames=(image, video, video_latents),
            noise=(seed, generator, latents),
            use_mean_velocity=use_mean_velocity,
            step_end=StepEnd(callback, callback_on_step_end, callback_on_step_end_tensor_inputs),
            attention_kwargs=attention_kwargs,
            progress=progress,
        )
        scheduler = flow_map_scheduler(self.scheduler)
        schedule = request.schedule(scheduler)
        self._begin(call, len(schedule) - 1)
        scheduler.set_timesteps(sigmas=schedule, device=self._execution_device)

        seconds: dict[str, float] = {}
        with self.timed("encode", seconds):
            text, negative, first_latents, _ = self._encoded(call)
        with (
            self.timed("sample", seconds),
            self._sampling(attention_kwargs) as network,
            progress_bar(self, len(schedule) - 1, progress) as advance,
        ):
            result = run_steps(
                self,
                network,
                scheduler,
                call.noise,
                text,
                None if negative is None else negative.expand(len(call.noise), -1, -1),
                schedule=schedule,
                first_frames=first_latents,
                use_mean_velocity=call.mean_velocity,
                step_end=call.step_end,
                advance=advance,
            )
        return self._output(result, seconds, output_type, return_dict)

    def _checked_call(
        self,
        request: VideoRequest,
        given: PromptInputs,
        *,
        first_frames: tuple[Any, Any, Tensor | None],
        noise: tuple[int | None, Generators | None, Tensor | None],
        use_mean_velocity: bool | None,
        step_end: StepEnd,
        attention_kwargs: Mapping[str, Any] | None,
        progress: bool | None,
    ) -> CheckedCall:
        """Check the arguments of a call, and draw its noise.

        Args:
            request: sizes and settings.
            given: the prompts.
            first_frames: image, video and video_latents of the call.
            noise: seed, generator and latents of the call.
            use_mean_velocity, step_end, attention_kwargs, progress: of the call.

        Raises:
            ValueError: something cannot work.
        """
        request.check(self.layout, batch_size=given.count)
        request.require_schedule(flow_map_scheduler(self.scheduler))
        mean_velocity = self._mean_velocity(use_mean_velocity)
        pixels, first_latents = self._first_frames(request, given.count, *first_frames)
        given = given if request.guided else given.without_negatives()
        given.require_one_length(request.max_sequence_length)
        with lora_scale(None, attention_kwargs):
            pass  # refuses other arguments before a network runs
        shape = request.latent_shape(self.layout, given.count * request.num_videos_per_prompt)
        return CheckedCall(
            request,
            given,
            initial_noise(shape, self._execution_device, *noise),
            pixels,
            first_latents,
            mean_velocity,
            step_end,
            attention_kwargs,
            progress,
        )

    def _output(
        self, latents: Tensor, seconds: dict[str, float], output_type: str, return_dict: bool
    ) -> VideoOutput:
        """Decode latents ``[B, F', C, h, w]`` to what a call returns."""
        frames: Any = latents.transpose(1, 2)
        if output_type != "latent":
            with self.timed("decode", seconds):
                frames = frames_of_type(self.decode(frames), output_type)
        self.maybe_free_model_hooks()
        return VideoOutput(frames, seconds) if return_dict else cast(Any, (frames,))

    def _mean_velocity(self, given: bool | None) -> bool:
        """Tell whether the sampler uses r < t; ValueError if the model cannot."""
        mean_velocity = not self.euler if given is None else given
        if mean_velocity and not self.layout.flow_map:
            raise ValueError("a plain Wan model knows r = t only: leave out use_mean_velocity=True")
        return mean_velocity

    def _begin(self, call: CheckedCall, num_timesteps: int) -> None:
        """Set the attributes by which diffusers' callbacks and properties know a call."""
        self._guidance_scale = call.request.guidance_scale
        self._attention_kwargs = call.attention_kwargs
        self._interrupt = False
        self._num_timesteps = num_timesteps

    def _first_frames(
        self, request: VideoRequest, prompts: int, image: Any, video: Any, latents: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the pixels of first frames, or their latents; None for what is not given."""
        if latents is not None and not (image is None and video is None):
            raise ValueError("give either video_latents or image or video, not both")
        shape = request.latent_shape(self.layout, prompts)
        pixels = first_frame_pixels(image, video, request.height, request.width)
        if pixels is not None:
            replace(request, context_frames=pixels.shape[1]).check(self.layout, batch_size=prompts)
            if pixels.shape[0] not in (1, prompts):
                raise ValueError(
                    f"video must be one or as many as the {prompts} prompts, got {pixels.shape[0]}"
                )
        return pixels, checked_first_frames(latents, shape, prompts)

    def _encoded(
        self, call: CheckedCall, others: Sequence[str] = ()
    ) -> tuple[Tensor, Tensor | None, Tensor | None, list[Tensor]]:
        """Encode what the network reads, with the text encoder loaded once at most.

        Args:
            call: names the prompts and the first frames.
            others: further texts.

        Returns:
            Embeddings of the prompts for each video, of the negative prompts, latents of the first
            frames, and embeddings ``[1, S, text_dim]`` of each other text.
        """
        given, device = call.prompts, self._execution_device
        texts = [*given.prompts, *given.negative_prompts, *others]
        length = call.request.max_sequence_length
        encoded = self.encode_prompts(texts, length) if texts else []
        for written, embeds in zip(texts, encoded, strict=True):
            if not bool(torch.isfinite(embeds).all()):
                raise FloatingPointError(
                    f"the text encoder gives NaN or infinity for {brief(written)}: UMT5 overflows "
                    "in float16, use bf16 (dtype=torch.bfloat16, --dtype bfloat16)"
                )
        count, negatives = len(given.prompts), len(given.negative_prompts)
        text = torch.cat(encoded[:count]) if count else given.embeds
        negative = given.negative_embeds
        if negatives:
            negative = torch.cat(encoded[count : count + negatives])
        first = call.first_latents
        if call.pixels is not None:
            first = encode_video(self.vae, call.pixels)
        text, negative, first = (call.repeated(x) for x in (text, negative, first))
        assert text is not None
        return (
            text.to(device),
            None if negative is None else negative.to(device),
            first,
            [embeds.to(device) for embeds in encoded[count + negatives :]],
        )

    @contextmanager
    def _sampling(self, attention_kwargs: Mapping[str, Any] | None) -> Iterator[Any]:
        """Bring the transformer, or its graph, to the device."""
        transformer = self.transformer
        try:
            with lora_scale(transformer, attention_kwargs):
                yield self._turns.transformer(transformer)
        finally:
            self._turns.rest(transformer)

    @contextmanager
    def timed(self, name: str, seconds: dict[str, float]) -> Iterator[None]:
        """Add the time that a block takes, until the device has done its work, to ``seconds``."""
        start = time.perf_counter()
        yield
        if (device := self._execution_device).type == "cuda":
            torch.cuda.synchronize(device)
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
