"""Run callbacks after the evaluations of a chunk, with what diffusers' callbacks may do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from anyflow.pipelines.steps import StepEnd
from anyflow.sampling import ChunkSampler


class ChunkStepEnd:
    """Call a user's callback after each evaluation, and let it change the text and the guidance.

    diffusers' callback gets the number of the step in its chunk, and the chunk's latents. A text or
    a guidance that it changes is that of everything from then on: the chunks before are encoded
    again with it (:meth:`ChunkSampler.set_text`).

    Args:
        pipe: has ``guidance_scale`` and ``interrupt``, which callbacks may change.
        step_end: the callbacks.

    Attributes:
        sampler: that of the chunks; must be set before the first call, like ``advance``.
        advance: called after each step.
    """

    sampler: ChunkSampler
    advance: Callable[[], Any]

    def __init__(self, pipe: Any, step_end: StepEnd) -> None:
        self.pipe, self.step_end = pipe, step_end
        self.negative: Tensor | None = None  # of the last evaluation with guidance

    def __call__(self, index: int, timestep: float, latents: Tensor) -> Tensor | None:
        """Return what replaces the latents, or None."""
        replaced = None
        if self.step_end.callback is not None:
            replaced = self.step_end.callback(index, timestep, latents)
        elif self.step_end.function is not None:
            replaced = self._of_diffusers(timestep, latents)
        self.advance()
        if self.pipe.interrupt:
            self.sampler.stop()
        return replaced

    def _of_diffusers(self, timestep: float, latents: Tensor) -> Tensor | None:
        network, pipe = self.sampler.network, self.pipe
        videos = len(latents)
        if network.guided:
            self.negative = network.text[:videos]
        given = {
            "prompt_embeds": network.text[-videos:],
            "negative_prompt_embeds": self.negative if network.guided else None,
        }
        before = {name: _state(embeds) for name, embeds in given.items()}
        scale = pipe.guidance_scale
        returned = self.step_end.call(
            pipe, self.sampler.step, timestep, {"latents": latents, **given}
        )
        after = {name: returned.get(name, embeds) for name, embeds in given.items()}
        for name, embeds in after.items():
            if not (embeds is None and given[name] is None) and not isinstance(embeds, Tensor):
                raise ValueError(
                    f"{name} of callback_on_step_end must be a tensor, got {type(embeds).__name__}"
                )
        changed = {name: _state(embeds) for name, embeds in after.items()} != before
        if changed or pipe.guidance_scale != scale:
            self._change(after["prompt_embeds"], after["negative_prompt_embeds"])
        return returned.get("latents")

    def _change(self, text: Tensor | None, negative: Tensor | None) -> None:
        scale = self.pipe.guidance_scale
        assert text is not None
        if not scale > 1:
            self.sampler.set_text(text)
            return
        self.negative = self.negative if negative is None else negative
        if self.negative is None:
            raise ValueError(
                f"a callback has set the guidance to {scale:g}, and this call has no negative "
                "prompt: call with a guidance_scale above 1"
            )
        self.sampler.set_text(text, self.negative, scale)


def _state(embeds: Tensor | None) -> tuple[int, int]:
    """Return what differs for another tensor, and after a write in place."""
    if embeds is None:
        return 0, 0
    return id(embeds), 0 if embeds.is_inference() else embeds._version
