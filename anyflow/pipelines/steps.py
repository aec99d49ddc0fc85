"""Run the sampler's steps in a pipeline, with what diffusers' callbacks may do after each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anyflow.sampling import Callback, sample
from anyflow.schedulers import FlowMapEulerDiscreteScheduler
from anyflow.utils.validation import brief, finite_number

_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")


@dataclass(frozen=True)
class StepEnd:
    """Hold the callbacks that run after each step.

    Args:
        callback: the sampler's own.
        function: diffusers' ``callback_on_step_end(pipe, index, timestep, tensors)``, or an object
            that names its ``tensor_inputs``. It may return ``latents`` (frames first) and
            ``prompt_embeds``, set the pipeline's ``_guidance_scale``, and end the sampling by its
            ``_interrupt``.
        names: names of the tensors that ``function`` gets: ``latents``, ``prompt_embeds`` (with
            guidance the negative ones in front, as in diffusers) and ``negative_prompt_embeds``.

    Raises:
        ValueError: both are given, or one that is no function, or unknown names.
    """

    callback: Callback | None
    function: Callable[..., Mapping[str, Any] | None] | None
    names: Sequence[str]

    def __post_init__(self) -> None:
        for name, given in (("callback", self.callback), ("callback_on_step_end", self.function)):
            if given is not None and not callable(given):
                raise ValueError(f"{name} must be a function, got {brief(given)}")
        if self.callback is not None and self.function is not None:
            raise ValueError("give either callback or callback_on_step_end, not both")
        names = getattr(self.function, "tensor_inputs", self.names)
        names = [] if names is None else names
        if not isinstance(names, (list, tuple)) or not all(name in _TENSORS for name in names):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be of {', '.join(_TENSORS)}, got "
                f"{brief(names)}"
            )
        object.__setattr__(self, "names", names)

    def call(
        self, pipe: Any, index: int, timestep: float, tensors: Mapping[str, Tensor | None]
    ) -> Mapping[str, Any]:
        """Return what diffusers' callback returns; ValueError if it is no dictionary."""
        assert self.function is not None
        inputs = {name: tensors[name] for name in self.names}
        returned = self.function(pipe, index, torch.tensor(timestep, dtype=torch.float64), inputs)
        if returned is not None and not isinstance(returned, Mapping):
            raise ValueError(
                f"callback_on_step_end must return a dict or None, got {type(returned).__name__}"
            )
        return {} if returned is None else returned


class _Changed(Exception):
    """Report that a callback has changed more than the latents: the sampler must restart."""

    def __init__(self, latents: Tensor, done: int) -> None:
        super().__init__()
        self.latents, self.done = latents, done


def run_steps(
    pipe: Any,
    network: Any,
    scheduler: FlowMapEulerDiscreteScheduler,
    noise: Tensor,
    text: Tensor,
    negative: Tensor | None,
    *,
    schedule: Tensor,
    first_frames: Tensor | None,
    use_mean_velocity: bool,
    step_end: StepEnd,
    advance: Callable[[], Any],
) -> Tensor:
    """Sample, and restart after each step whose callback has changed the text or the guidance.

    Args:
        pipe: has ``guidance_scale`` and ``interrupt``, which callbacks may change.
        network, scheduler: of :func:`anyflow.sampling.sample`.
        noise: ``[B, F', C, h, w]``, fp32 at least.
        text, negative: ``[B, S, text_dim]``; ``negative`` is None without guidance.
        schedule: sigmas ``[n + 1]`` with the terminal 0.
        first_frames: their clean latents, or None.
        use_mean_velocity: of the sampler.
        step_end: the callbacks.
        advance: called after each step.

    Returns:
        ``[B, F', C, h, w]`` latents: clean, or those of the step after which a callback
        interrupted.
    """
    latents, done = noise, 0
    embeds = {"prompt_embeds": text if negative is None else torch.cat([negative, text])}
    embeds["negative_prompt_embeds"] = negative  # type: ignore[assignment]
    while done < len(schedule) - 1 and not pipe.interrupt:
        scale = pipe.guidance_scale
        text, negative = _halves(embeds["prompt_embeds"], noise, guided=scale > 1)
        try:
            return sample(
                network,
                scheduler,
                latents,
                text,
                sigmas=schedule[done:],
                guidance_scale=scale if scale > 1 else 1.0,
                negative_prompt_embeds=negative,
                context_latents=first_frames,
                use_mean_velocity=use_mean_velocity,
                callback=_after_step(pipe, step_end, embeds, done, advance),
            )
        except _Changed as changed:
            latents, done = changed.latents.to(noise), changed.done
    return latents


def _after_step(
    pipe: Any,
    step_end: StepEnd,
    embeds: dict[str, Tensor],
    first: int,
    advance: Callable[[], Any],
) -> Callback:
    """Return the sampler's callback, which raises :class:`_Changed` if a user's callback does more.

    Args:
        pipe: has ``guidance_scale`` and ``interrupt``.
        step_end: the user's callbacks.
        embeds: what the user's callback may replace; replaced in place.
        first: number of steps before the sampler's first one.
        advance: called after each step.
    """
    scale = pipe.guidance_scale

    def after_step(index: int, timestep: float, x: Tensor) -> Any:
        replaced = None
        if step_end.callback is not None:
            replaced = step_end.callback(index, timestep, x)
        elif step_end.function is not None:
            before = embeds["prompt_embeds"]
            returned = step_end.call(pipe, first + index, timestep, {"latents": x, **embeds})
            replaced = returned.get("latents")
            embeds.update({name: value for name, value in returned.items() if name in embeds})
            text_changed = embeds["prompt_embeds"] is not before
            if pipe.interrupt or pipe.guidance_scale != scale or text_changed:
                advance()
                raise _Changed(x if replaced is None else replaced, first + index + 1)
        advance()
        return replaced

    return after_step


def _halves(embeds: Tensor, noise: Tensor, *, guided: bool) -> tuple[Tensor, Tensor | None]:
    """Split a callback's embeddings into those of prompts and, with guidance, of negative ones."""
    videos = len(noise)
    if len(embeds) not in ((2 * videos,) if guided else (videos, 2 * videos)):
        raise ValueError(
            "prompt_embeds of callback_on_step_end must be of "
            f"{2 * videos if guided else videos} prompts, got {len(embeds)}"
        )
    return embeds[-videos:], embeds[:videos] if guided else None


@contextmanager
def progress_bar(pipe: Any, steps: int, show: bool | None) -> Iterator[Callable[[], Any]]:
    """Show diffusers' bar of the steps, by ``show`` or as ``set_progress_bar_config`` says."""
    before = getattr(pipe, "_progress_bar_config", None)
    if show is not None:
        pipe._progress_bar_config = {**({} if before is None else before), "disable": not show}
    try:
        opened = pipe.progress_bar(total=steps)
    finally:
        pipe._progress_bar_config = {} if before is None else before
    with opened as bar:
        yield bar.update


@contextmanager
def lora_scale(
    transformer: nn.Module | None, attention_kwargs: Mapping[str, Any] | None
) -> Iterator[None]:
    """Scale the adapters of a transformer, if it is given, by ``attention_kwargs={"scale": s}``.

    Raises:
        ValueError: something else is given.
    """
    kwargs = {} if attention_kwargs is None else attention_kwargs
    if not isinstance(kwargs, Mapping) or set(kwargs) - {"scale"}:
        raise ValueError(
            f"attention_kwargs must be None or {{'scale': s}} of LoRAs, got "
            f"{brief(attention_kwargs)}"
        )
    scale = finite_number("the scale of attention_kwargs", kwargs.get("scale", 1.0))
    if scale == 1 or transformer is None:
        yield
        return
    from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers

    scale_lora_layers(transformer, scale)
    try:
        yield
    finally:
        unscale_lora_layers(transformer, scale)
