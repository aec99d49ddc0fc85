"""From a text to a video: encode, sample, decode."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from anyflow.pipelines.frames import context_pixels, frames_of_type
from anyflow.pipelines.loading import ModelPaths, load_transformer, resolve_device
from anyflow.pipelines.memory import Memory, Plan, Sizes, Turns, check_options, choose_plan, free_memory
from anyflow.pipelines.plain_wan import load_scheduler, require_flow_map, require_one_transformer
from anyflow.pipelines.progress import both, progress_bar, step_end_callback
from anyflow.pipelines.request import (
    Generators,
    ModelLayout,
    VideoRequest,
    context_latents,
    count_texts,
    initial_noise,
    listed,
    require_one_length,
)
from anyflow.pipelines.wan import (
    decode_latents,
    encode_prompt,
    encode_video,
    load_text_encoder,
    load_tokenizer,
    load_vae,
)
from anyflow.sampling import Callback, Schedule, sample
from anyflow.schedulers import FlowMapEulerDiscreteScheduler
from anyflow.validation import brief

if TYPE_CHECKING:
    from PIL.Image import Image

    from anyflow.models import AnyFlowTransformer3DModel


@dataclass(frozen=True)
class VideoOutput:
    """What a call of the pipeline gives.

    Args:
        frames: by ``output_type``: ``"pil"`` a list of images for each prompt, ``"np"`` ``[B, F, H, W, 3]`` and
            ``"pt"`` ``[B, F, 3, H, W]`` fp32 in [0, 1], ``"latent"`` ``[B, F', C, h, w]``.
        seconds: of ``encode`` (loading the text encoder included where it is not kept), ``sample`` and ``decode``.
    """

    frames: list[list[Image]] | np.ndarray | Tensor
    seconds: dict[str, float] = field(default_factory=dict)


class AnyFlowPipeline:
    """A text-to-video model: ``pipe = AnyFlowPipeline.from_pretrained(path); pipe("a red panda").frames[0]``.

    The same latents and frames as diffusers' pipeline of the same name (``tests/pipelines/test_pipeline.py``), except
    that latents are frames-first, as everywhere in this library, that custom timesteps are used verbatim, and that
    noise and latents stay fp32 between the steps of a bf16 model.

    ``transformer``, ``vae``, ``scheduler``, ``tokenizer`` and ``text_encoder`` are ordinary modules, to be looked at
    and replaced. Where ``memory`` is ``"low"`` the large ones take turns on the device: the text encoder is loaded for
    each call and freed again (the attribute is None), the transformer is loaded when it is first needed and is on the
    device while it samples, and the VAE works in tiles that bound its memory. Where it is ``"stream"``, the weights of
    the transformer, and of a text encoder that does not fit, come to the device block by block, from pinned main memory
    and while the block before is at work.
    """

    def __init__(
        self,
        *,
        transformer: AnyFlowTransformer3DModel | Callable[[], AnyFlowTransformer3DModel],
        vae: Any,
        text_encoder: nn.Module | Callable[[], nn.Module],
        tokenizer: Any,
        scheduler: FlowMapEulerDiscreteScheduler,
        layout: ModelLayout,
        device: torch.device | str = "cpu",
        memory: Plan = "fast",
        cuda_graph: bool = False,
        euler: bool = False,
    ) -> None:
        """Put parts together; :meth:`from_pretrained` does it for a folder.

        Args:
            transformer, text_encoder: modules, or functions that load them on the CPU when they are needed.
            vae: ``AutoencoderKLWan``.
            tokenizer: of the text encoder.
            scheduler: gives the schedule.
            layout: of the model.
            device: to run on.
            memory: as above.
            cuda_graph, euler: see :meth:`from_pretrained`.

        Raises:
            ValueError: the device cannot do that.
        """
        self.device, self.memory, self.layout, self.euler = torch.device(device), memory, layout, euler
        check_options(memory, self.device, compile=False, cuda_graph=cuda_graph)
        self._turns = Turns(memory, self.device, cuda_graph)
        self.vae, self.tokenizer, self.scheduler = vae, tokenizer, scheduler
        self._transformer, self._text_encoder = transformer, text_encoder
        vae.use_slicing = True  # one video fills a GPU, and its numbers do not depend on others
        if memory == "fast":
            self._turns.transformer(self.transformer)
            self._turns.text_encoder(self._loaded_text_encoder())
        else:
            vae.enable_tiling()
        vae.to(self.device)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        memory: Memory = "auto",
        transformer: AnyFlowTransformer3DModel | str | Path | None = None,
        vae_dtype: torch.dtype = torch.float32,
        compile: bool = False,
        cuda_graph: bool = False,
        euler: bool = False,
    ) -> AnyFlowPipeline:
        """Load a diffusers folder with ``transformer``, ``vae``, ``text_encoder``, ``tokenizer`` and ``scheduler``.

        Args:
            path: the folder, or the name of a model on the Hugging Face Hub.
            dtype: of the transformer and the text encoder.
            device: to run on; None takes a GPU if there is one.
            memory: ``"fast"`` keeps everything on the device, ``"low"`` one part at a time, ``"stream"`` two blocks of
                one part (see the class; above 256 pixels the VAE's tiles change the decoded video slightly). ``"auto"``
                takes the first that fits, and ``"low"`` streams if a part alone does not.
            transformer: in place of the folder's: a model, or a folder with ``transformer`` and, if it has one,
                ``scheduler``, as a training run leaves it.
            vae_dtype: of the VAE. bf16 halves its time and memory, and shows.
            compile: compile the transformer's blocks with ``torch.compile``; not while they stream.
            cuda_graph: replay the transformer's evaluations from a graph; see
                :class:`anyflow.cuda_graph.CudaGraphTransformer`. Not while its blocks stream.
            euler: evaluate r = t, which is plain Euler, where a call does not say otherwise. Needed for a plain Wan
                model, as diffusers' WanPipeline and a teacher of ``anyflow train`` have it: its own scheduler's shift
                is taken (see :func:`anyflow.pipelines.plain_wan.load_scheduler`).

        Raises:
            ValueError: no such model, parts are missing or do not fit together, or an argument cannot be, which is
                found before any weight is loaded.
        """
        target = resolve_device(device)
        check_options(memory, target, compile=compile, cuda_graph=cuda_graph)
        paths = ModelPaths.find(path, transformer)
        given = transformer if isinstance(transformer, nn.Module) else None
        layout = paths.layout(given)
        require_one_transformer(paths.model)
        if not euler:
            require_flow_map(paths.transformer / "transformer", given)
        scheduler = load_scheduler(paths.scheduler, euler=euler)
        tokenizer = load_tokenizer(paths.model)
        sizes = Sizes.read(paths, given, dtype, vae_dtype)
        plan = choose_plan(memory, sizes, free_memory(target, given), compile=compile, cuda_graph=cuda_graph)

        def load() -> AnyFlowTransformer3DModel:
            network = load_transformer(paths.transformer, dtype) if given is None else given
            if compile:
                network.compile_repeated_blocks()
            return network

        return cls(
            transformer=load() if plan == "fast" else load,
            vae=load_vae(paths.model, vae_dtype),
            text_encoder=load_text_encoder(paths.model, dtype)
            if plan == "fast"
            else lambda: load_text_encoder(paths.model, dtype),
            tokenizer=tokenizer,
            scheduler=scheduler,
            layout=layout,
            device=target,
            memory=plan,
            cuda_graph=cuda_graph,
            euler=euler,
        )

    @property
    def transformer(self) -> AnyFlowTransformer3DModel:
        """The network; loaded now if it was not yet."""
        if not isinstance(self._transformer, nn.Module):
            self._transformer = self._transformer()
        return cast("AnyFlowTransformer3DModel", self._transformer)

    @transformer.setter
    def transformer(self, transformer: AnyFlowTransformer3DModel) -> None:
        self._transformer = transformer

    @property
    def text_encoder(self) -> nn.Module | None:
        """The text encoder; None where it is loaded for each call."""
        return self._text_encoder if isinstance(self._text_encoder, nn.Module) else None

    def load_lora(self, path: str | Path, scale: float = 1.0) -> None:
        """Merge a LoRA into the transformer; see :func:`anyflow.pipelines.lora.merge_lora`."""
        from anyflow.pipelines.lora import merge_lora

        self._turns.release(self.transformer)
        merge_lora(self.transformer, path, scale)

    def encode_prompts(self, prompts: Sequence[str], max_sequence_length: int = 512) -> list[Tensor]:
        """``[1, max_sequence_length, text_dim]`` fp32 on the CPU for each prompt, zero-padded after encoding."""
        text_encoder = self._turns.text_encoder(self._loaded_text_encoder())
        encoded = [encode_prompt(text_encoder, self.tokenizer, p, max_sequence_length) for p in prompts]
        return [nn.functional.pad(e, (0, 0, 0, max_sequence_length - len(e)))[None] for e in encoded]

    def decode(self, latents: Tensor) -> Tensor:
        """``latents[B, F', C, h, w]`` to a video ``[B, F, 3, H, W]`` in [0, 1] on the device, in the VAE's dtype."""
        return decode_latents(self.vae, latents)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        num_inference_steps: int | None = 4,
        sigmas: Schedule | None = None,
        timesteps: Schedule | None = None,
        guidance_scale: float = 1.0,
        num_videos_per_prompt: int = 1,
        seed: int | None = None,
        generator: Generators | None = None,
        image: Any = None,
        video: Any = None,
        video_latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: Mapping[str, Any] | None = None,
        callback: Callback | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        progress: bool = False,
        max_sequence_length: int = 512,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        use_mean_velocity: bool | None = None,
    ) -> VideoOutput:
        """Make one video for each prompt, or several.

        The arguments are those of diffusers' pipeline and some more; numbers may be of NumPy or torch.

        Args:
            prompt: one or several texts.
            negative_prompt: one, or one for each prompt; needed, and used, only when guidance_scale is not 1.
            height, width: pixels, multiples of 16.
            num_frames: 4k + 1.
            num_inference_steps: network evaluations; ignored when sigmas or timesteps are given.
            sigmas: custom schedule in [0, 1], used verbatim.
            timesteps: custom schedule in [0, 1000], used verbatim.
            guidance_scale: 1 (no guidance) for checkpoints with guidance distilled in.
            num_videos_per_prompt: videos of a prompt come one behind another.
            seed: of the noise, on any device the same; with neither seed nor generator it is fresh.
            generator: draws the noise as diffusers' pipelines do; or a list with one for each video.
            image, video: first frames to keep, 4k + 1 of them; see :func:`anyflow.pipelines.frames.context_pixels`.
            video_latents: their normalized latents ``[B or 1, F'', C, h, w]`` in place of them.
            output_type: ``"pil"``, ``"np"``, ``"pt"`` or ``"latent"``; see :class:`VideoOutput`.
            return_dict: False returns a tuple of the frames.
            attention_kwargs: None; LoRAs are merged, with their scale, by :meth:`load_lora`.
            callback: of :func:`anyflow.sampling.sample`.
            callback_on_step_end, callback_on_step_end_tensor_inputs: diffusers' form of it; it can replace latents.
            progress: show a bar of the steps.
            max_sequence_length: tokens after which prompts are cut off; trained models expect 512.
            latents: noise, ``[B, F', C, h, w]``, in place of seed and generator. Never written.
            prompt_embeds: ``[B, S, text_dim]`` in place of prompt, as :meth:`encode_prompts` gives them.
            negative_prompt_embeds: ``[B or 1, S, text_dim]`` in place of negative_prompt.
            use_mean_velocity: False evaluates r = t, plain Euler; None does so where ``euler`` was given on loading.

        Raises:
            ValueError: something cannot work; raised before any network runs.
            FloatingPointError: NaN or infinity came up, as float16 makes it: in the embeddings of a prompt, in the
                latents after a step, which is named, or in the decoded frames.
        """
        prompts = count_texts("prompt", prompt, prompt_embeds, self.layout.text_dim)
        if prompts is None:
            raise ValueError("give prompt or prompt_embeds")
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
            negatives=count_texts("negative_prompt", negative_prompt, negative_prompt_embeds, self.layout.text_dim),
        )
        request.check(self.layout, batch_size=prompts)
        schedule = request.schedule(self.scheduler)
        if attention_kwargs:
            raise ValueError(
                f"attention_kwargs must be None, got {attention_kwargs}: load_lora(path, scale) sets a LoRA's scale"
            )
        context, given_latents = self._context(request, prompts, image, video, video_latents)
        if request.guidance_scale == 1:
            negative_prompt = negative_prompt_embeds = None
        require_one_length(prompt_embeds, negative_prompt, negative_prompt_embeds, request.max_sequence_length)
        several = request.num_videos_per_prompt
        noise = initial_noise(
            request.latent_shape(self.layout, prompts * several), self.device, seed, generator, latents
        )
        after_step = partial(
            step_end_callback, self, callback_on_step_end, callback_on_step_end_tensor_inputs, callback
        )
        after_step({})  # refuses what cannot be

        seconds: dict[str, float] = {}
        with self.timed("encode", seconds):
            texts = self._texts(
                prompt, prompt_embeds, negative_prompt, negative_prompt_embeds, request.max_sequence_length
            )
            given_latents = given_latents if context is None else encode_video(self.vae, context)
        text, negative, given_latents = (_repeated(x, prompts, several) for x in (*texts, given_latents))
        assert text is not None
        embeds = {"prompt_embeds": text, "negative_prompt_embeds": negative}
        steps = len(schedule) - 1
        with self.timed("sample", seconds), self._sampling() as network, progress_bar(progress, steps) as advance:
            result = sample(
                network,
                self.scheduler,
                noise,
                text,
                sigmas=schedule,
                guidance_scale=request.guidance_scale,
                negative_prompt_embeds=negative,
                context_latents=given_latents,
                use_mean_velocity=not self.euler if use_mean_velocity is None else use_mean_velocity,
                callback=both(after_step(embeds), advance),
            )
        frames: Any = result
        if output_type != "latent":
            with self.timed("decode", seconds):
                frames = frames_of_type(self.decode(result), output_type)
        return VideoOutput(frames, seconds) if return_dict else cast(Any, (frames,))

    def _context(
        self, request: VideoRequest, prompts: int, image: Any, video: Any, latents: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The pixels of first frames, or their latents; None for what is not given."""
        if latents is not None and not (image is None and video is None):
            raise ValueError("give either video_latents or image or video, not both")
        shape = request.latent_shape(self.layout, prompts)
        pixels = context_pixels(image, video, request.height, request.width)
        if pixels is not None:
            replace(request, context_frames=pixels.shape[1]).check(self.layout, batch_size=prompts)
            if pixels.shape[0] not in (1, prompts):
                raise ValueError(f"video must be one or as many as the {prompts} prompts, got {pixels.shape[0]}")
        return pixels, context_latents(latents, shape, prompts)

    def _texts(
        self,
        prompt: str | Sequence[str] | None,
        embeds: Tensor | None,
        negative_prompt: str | Sequence[str] | None,
        negative_embeds: Tensor | None,
        max_sequence_length: int,
    ) -> tuple[Tensor, Tensor | None]:
        """What the network reads, with the text encoder loaded once at most."""
        prompts, negatives = listed(prompt), listed(negative_prompt)
        encoded = self.encode_prompts([*prompts, *negatives], max_sequence_length) if prompts or negatives else []
        for text_given, embeds_made in zip([*prompts, *negatives], encoded, strict=True):
            if not bool(torch.isfinite(embeds_made).all()):
                raise FloatingPointError(
                    f"the text encoder gives NaN or infinity for {brief(text_given)}: UMT5 overflows in float16, use "
                    "bf16 (dtype=torch.bfloat16, --dtype bf16)"
                )
        text = torch.cat(encoded[: len(prompts)]) if prompts else embeds
        negative = torch.cat(encoded[len(prompts) :]) if negatives else negative_embeds
        assert text is not None
        return text.to(self.device), None if negative is None else negative.to(self.device)

    def _loaded_text_encoder(self) -> nn.Module:
        return self._text_encoder if isinstance(self._text_encoder, nn.Module) else self._text_encoder()

    @contextmanager
    def _sampling(self) -> Iterator[Any]:
        """The transformer, or its graph, on the device."""
        transformer = self.transformer
        try:
            yield self._turns.transformer(transformer)
        finally:
            self._turns.rest(transformer)

    @contextmanager
    def timed(self, name: str, seconds: dict[str, float]) -> Iterator[None]:
        """Add the time that a block takes, until the device has done its work, to ``seconds``."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds[name] = time.perf_counter() - start


def _repeated(rows: Tensor | None, prompts: int, several: int) -> Tensor | None:
    """Repeat the row of each prompt for its videos; what is one for all prompts stays one."""
    return rows if rows is None or len(rows) < prompts else rows.repeat_interleave(several, 0)
