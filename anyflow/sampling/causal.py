"""Sample by the causal model, chunk by chunk, with earlier chunks as context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from anyflow.models.causal_cache import ChunkCache, encode_chunks
from anyflow.models.chunks import ChunkPartition
from anyflow.models.network import is_causal, unwrapped
from anyflow.sampling.network import Callback, GuidedNetwork, Schedule, replacement, sigmas_of
from anyflow.schedulers import FlowMapEulerDiscreteScheduler
from anyflow.utils.transfer import to_device
from anyflow.utils.validation import batched_embeds, brief, require_finite, require_latents

Steps = int | Sequence[int]


class ChunkSampler:
    """Sample a video chunk by chunk; iterating gives each chunk as soon as it is done.

    ``for chunk, latents in ChunkSampler(...)`` yields the number of a chunk and its clean latents
    ``[B, p, C, H, W]``, in noise's dtype; chunks of the context are not among them. A chunk is
    encoded for those after it when the next one is asked for. An object is iterated once.

    Args:
        model: an :class:`~anyflow.models.AnyFlowFARTransformer3DModel`, or what wraps it.
        scheduler: gives the schedule, the same for each chunk; its state is not changed.
        noise: ``[B, F, C, H, W]`` standard normal; its dtype is the one the model sees. Never
            written.
        prompt_embeds: ``[B, S, text_dim]``.
        chunk_partition: latent frames of each chunk; None takes the model's.
        num_inference_steps: network evaluations of a chunk, or one number for each chunk (those of
            the context are not used); ignored when ``sigmas`` or ``timesteps`` are given.
        sigmas, timesteps, guidance_scale, negative_prompt_embeds, use_mean_velocity: as for
            :func:`anyflow.sampling.sample`.
        context_latents: ``[B or 1, F', C, H, W]`` clean latents of the first chunks, kept.
        use_cache: False computes everything before a chunk anew in each evaluation, with the same
            numbers within rounding.
        callback: called as ``callback(index, timestep, latents)`` after each evaluation, counted
            over all chunks, with the chunk's latents; a tensor returned replaces them.
        prompt_switches: texts ``[B, S, text_dim]`` by the number of the first chunk that they are
            for. The chunks before it are encoded again with the new text.
        cache_window: most compressed chunks that are kept, the first one and the latest; None keeps
            all, and is exact. The cache of any number of chunks is then bounded.
        cache_device: device that keys and values wait on, such as ``"cpu"``; None is the model's.
        text_may_change: True keeps the latents that :meth:`set_text` needs.

    Attributes:
        chunk, step: the chunk in work, and the number of its evaluations done before the one in
            work; for callbacks.

    Raises:
        ValueError: the model is not causal, shapes do not fit, or values are out of range; raised
            before the network runs.
    """

    def __init__(
        self,
        model: Any,
        scheduler: FlowMapEulerDiscreteScheduler,
        noise: Tensor,
        prompt_embeds: Tensor,
        *,
        chunk_partition: Sequence[int] | None = None,
        num_inference_steps: Steps | None = 4,
        sigmas: Schedule | None = None,
        timesteps: Schedule | None = None,
        guidance_scale: float = 1.0,
        negative_prompt_embeds: Tensor | None = None,
        context_latents: Tensor | None = None,
        use_mean_velocity: bool = True,
        use_cache: bool = True,
        callback: Callback | None = None,
        prompt_switches: Mapping[int, Tensor] | None = None,
        cache_window: int | None = None,
        cache_device: torch.device | str | None = None,
        text_may_change: bool = False,
    ) -> None:
        causal = require_causal(model)
        require_latents("noise", noise)
        sizes = causal.config.chunk_partition if chunk_partition is None else chunk_partition
        self.partition = ChunkPartition.of(sizes, noise.shape[1])
        self._check_size(causal, noise)
        if not use_cache and not (cache_window is None and cache_device is None):
            raise ValueError("cache_window and cache_device are of the cache: use_cache is False")
        self._use_cache, self._callback = use_cache, callback
        self._cache_options = {"window": cache_window, "storage": cache_device}
        self.cache: ChunkCache | None = self._new_cache(causal) if use_cache else None
        schedules = self._schedules(scheduler, num_inference_steps, sigmas, timesteps)

        self.network = GuidedNetwork(
            model, noise, prompt_embeds, guidance_scale, negative_prompt_embeds
        )
        self._noise, self._causal = noise, causal
        self._text_may_change, self._stopped = text_may_change, False
        self._latents: dict[int, Tensor] = self._context(context_latents)
        self.first_chunk = len(self._latents)
        self.chunk, self.step = self.first_chunk, 0
        self._switches = self._checked_switches(prompt_switches)
        scale = scheduler.config.num_train_timesteps
        self._steps = [
            list(pairwise(schedule.tolist())) for schedule in schedules[self.first_chunk :]
        ]
        pairs = [pair for steps in self._steps for pair in steps]
        self._times = [sigma * scale for sigma, _ in pairs]
        targets = [following * scale for _, following in pairs]
        self.network.set_times(self._times, targets if use_mean_velocity else None, 0)

    @property
    def num_evaluations(self) -> int:
        """Return the evaluations of all chunks, of which guidance makes one call."""
        return len(self._times)

    @property
    def context(self) -> list[Tensor]:
        """Return the latents of the chunks that were given."""
        return [self._latents[chunk] for chunk in range(self.first_chunk)]

    def stop(self) -> None:
        """End the sampling after the evaluation in work; its chunk is yielded as it is then."""
        self._stopped = True

    def set_text(
        self,
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor | None = None,
        guidance_scale: float = 1.0,
    ) -> None:
        """Take another text and guidance for what follows, in a callback or between chunks.

        Chunks that the next evaluations attend to are encoded again with them, so that the numbers
        are those of ``use_cache=False``.

        Args:
            prompt_embeds, negative_prompt_embeds: ``[B or 1, S, text_dim]``.
            guidance_scale: 1 is none.

        Raises:
            ValueError: the texts do not fit the videos, or the latents of earlier chunks were not
                kept (``text_may_change=False``).
        """
        if self._use_cache and not self._text_may_change:
            raise ValueError("set_text needs a sampler made with text_may_change=True")
        self._condition(prompt_embeds, guidance_scale, negative_prompt_embeds)

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        index = 0
        for chunk in range(self.first_chunk, len(self.partition)):
            if self._stopped:
                return
            self.chunk, self.step = chunk, 0
            with torch.no_grad():
                if chunk in self._switches:
                    self._switch(self._switches[chunk])
                latents = self._sample(chunk, index)
            index += len(self._steps[chunk - self.first_chunk])
            self._latents[chunk] = latents
            yield chunk, latents

    def _sample(self, chunk: int, index: int) -> Tensor:
        """Carry the noise of a chunk to its clean latents; ``index`` counts evaluations before."""
        noise = self._noise[:, self.partition.frames(chunk)]
        latents = noise.to(torch.promote_types(noise.dtype, torch.float32))
        for sigma, following in self._steps[chunk - self.first_chunk]:
            velocity = self._velocity(chunk, latents.to(noise.dtype), index)
            latents = latents - (sigma - following) * velocity.to(latents.dtype)
            if self._callback is not None:
                replaced = self._callback(index, self._times[index], latents.to(noise.dtype))
                latents = latents if replaced is None else replacement(replaced, latents)
            self.network.note(latents)
            index, self.step = index + 1, self.step + 1
            if self._stopped:
                break
        return latents.to(noise.dtype)

    def _velocity(self, chunk: int, latents: Tensor, index: int) -> Tensor:
        if self.cache is not None:
            if self.cache.num_chunks != chunk:
                self._encode(chunk)
            return self.network(latents, index, cache=self.cache)
        frames = torch.cat([*(self._latents[c] for c in range(chunk)), latents], dim=1)
        velocity = self.network(
            frames,
            index,
            context=self.partition.ends[chunk],
            chunk_partition=self.partition.sizes[: chunk + 1],
        )
        return velocity[:, -latents.shape[1] :]

    def _encode(self, chunk: int) -> None:
        """Encode what chunk ``chunk`` attends to, and drop latents that nothing reads again."""
        assert self.cache is not None
        plan = self.cache.plan(chunk)
        given = {c: self.network.both(self._latents[c]) for c in plan.chunks}
        encode_chunks(self.network.model, self.cache, chunk, given, self.network.text)
        needed = set(self.cache.chunks_needed_later(chunk))
        if self._text_may_change or any(switch > chunk for switch in self._switches):
            needed |= {*self.cache.compressed}
        self._latents = {c: x for c, x in self._latents.items() if c in needed}

    def _switch(self, prompt_embeds: Tensor) -> None:
        """Take another text beside the negative one and the guidance in force."""
        network = self.network
        negative = network.text[: len(self._noise)] if network.guided else None
        self._condition(prompt_embeds, network.guidance_scale, negative)

    def _condition(self, text: Tensor, guidance_scale: float, negative: Tensor | None) -> None:
        """Take texts and a guidance, and forget chunks that were encoded with those before."""
        self.network.condition(self._noise, text, guidance_scale, negative)
        if self._use_cache:
            self.cache = self._new_cache(self._causal)

    # Checks ---------------------------------------------------------------------------------------

    def _new_cache(self, causal: Any) -> ChunkCache:
        cache: ChunkCache = causal.new_cache(self.partition.sizes, **self._cache_options)
        return cache

    def _check_size(self, causal: Any, noise: Tensor) -> None:
        channels, height, width = noise.shape[2:]
        if channels != causal.config.in_channels:
            raise ValueError(
                f"noise must be [B, F, C={causal.config.in_channels}, H, W], got "
                f"{tuple(noise.shape)}"
            )
        compressed = len(self.partition) > causal.config.full_chunk_limit
        causal.check_size(height, width, compressed=compressed)
        if self.partition.num_frames > causal.config.rope_max_seq_len:
            raise ValueError(
                f"the model has {causal.config.rope_max_seq_len} positions for frames, and the "
                f"video has {self.partition.num_frames} latent frames"
            )

    def _schedules(
        self,
        scheduler: FlowMapEulerDiscreteScheduler,
        steps: Steps | None,
        sigmas: Schedule | None,
        timesteps: Schedule | None,
    ) -> list[Tensor]:
        """Return the sigmas of every chunk."""
        chunks = len(self.partition)
        several: list[Any] = [steps] * chunks
        if sigmas is None and timesteps is None and isinstance(steps, (list, tuple)):
            if len(steps) != chunks:
                raise ValueError(
                    f"num_inference_steps must be one number, or one for each of the {chunks} "
                    f"chunks, got {brief(steps)}"
                )
            several = list(steps)
        return [sigmas_of(scheduler, n, sigmas, timesteps) for n in several]

    def _context(self, context: Tensor | None) -> dict[int, Tensor]:
        """Return the given latents by chunks."""
        if context is None:
            return {}
        require_latents("context_latents", context)
        require_finite("context_latents", context)
        given, noise = context.shape, self._noise
        if given[0] not in (1, len(noise)) or given[2:] != noise.shape[2:]:
            raise ValueError(
                f"context_latents must be [B={len(noise)} or 1, F', "
                f"{', '.join(map(str, noise.shape[2:]))}], got {tuple(given)}"
            )
        chunks = self.partition.chunks_of_context(given[1])
        context = to_device(context, noise.device, noise.dtype)
        self.network.finite.note("context_latents", context)
        context = context.expand(len(noise), -1, -1, -1, -1)
        return {chunk: context[:, self.partition.frames(chunk)] for chunk in range(chunks)}

    def _checked_switches(self, switches: Mapping[int, Tensor] | None) -> Mapping[int, Tensor]:
        given = {} if switches is None else dict(switches)
        for chunk, embeds in given.items():
            name = f"prompt_switches[{brief(chunk)}]"
            if not isinstance(chunk, int) or not self.first_chunk <= chunk < len(self.partition):
                raise ValueError(
                    f"{name}: chunks that are sampled are {self.first_chunk} to "
                    f"{len(self.partition) - 1}"
                )
            batched = batched_embeds(name, embeds, len(self._noise))
            if batched.shape[1:] != self.network.text.shape[1:]:
                raise ValueError(
                    f"{name} must be [B, S, text_dim] as prompt_embeds, "
                    f"{tuple(self.network.text.shape[1:])} for a video, got "
                    f"{tuple(batched.shape[1:])}"
                )
            require_finite(name, batched)
        return given


@torch.no_grad()
def sample_causal(
    model: Any,
    scheduler: FlowMapEulerDiscreteScheduler,
    noise: Tensor,
    prompt_embeds: Tensor,
    *,
    chunk_partition: Sequence[int] | None = None,
    num_inference_steps: Steps | None = 4,
    sigmas: Schedule | None = None,
    timesteps: Schedule | None = None,
    guidance_scale: float = 1.0,
    negative_prompt_embeds: Tensor | None = None,
    context_latents: Tensor | None = None,
    use_mean_velocity: bool = True,
    use_cache: bool = True,
    callback: Callback | None = None,
    on_chunk: Callable[[int, Tensor], Any] | None = None,
    prompt_switches: Mapping[int, Tensor] | None = None,
    cache_window: int | None = None,
    cache_device: torch.device | str | None = None,
) -> Tensor:
    """Sample a video by the causal model, chunk by chunk.

    Each chunk is carried along the schedule as by :func:`anyflow.sampling.sample`, while it attends
    to the chunks before it.

    Args:
        model, scheduler, noise, prompt_embeds, chunk_partition, num_inference_steps, sigmas,
            timesteps, guidance_scale, negative_prompt_embeds, context_latents, use_mean_velocity,
            use_cache, callback, prompt_switches, cache_window, cache_device: those of
            :class:`ChunkSampler`.
        on_chunk: called as ``on_chunk(chunk, latents)`` with the number of a chunk and its clean
            latents ``[B, p, C, H, W]`` as soon as it is sampled.

    Returns:
        ``[B, F, C, H, W]`` clean latents in noise's dtype, the context included.

    Raises:
        ValueError: as :class:`ChunkSampler`, or a tensor given holds NaN or infinity.
        FloatingPointError: the latents hold NaN or infinity after a step, which is named with the
            videos; found at the end, where the host waits for the device once.
    """
    sampler = ChunkSampler(
        model,
        scheduler,
        noise,
        prompt_embeds,
        chunk_partition=chunk_partition,
        num_inference_steps=num_inference_steps,
        sigmas=sigmas,
        timesteps=timesteps,
        guidance_scale=guidance_scale,
        negative_prompt_embeds=negative_prompt_embeds,
        context_latents=context_latents,
        use_mean_velocity=use_mean_velocity,
        use_cache=use_cache,
        callback=callback,
        prompt_switches=prompt_switches,
        cache_window=cache_window,
        cache_device=cache_device,
    )
    chunks = sampler.context
    for chunk, latents in sampler:
        chunks.append(latents)
        if on_chunk is not None:
            on_chunk(chunk, latents)
    return sampler.network.checked(torch.cat(chunks, dim=1))


def require_causal(model: Any) -> Any:
    """Return the causal model that a module is or wraps, or raise a ValueError."""
    if not is_causal(model):
        raise ValueError(
            "sampling chunk by chunk needs the causal model, an "
            f"anyflow.models.AnyFlowFARTransformer3DModel, got {type(unwrapped(model)).__name__}"
        )
    return unwrapped(model)
