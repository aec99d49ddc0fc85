"""Callbacks of the sampler: a bar in the terminal, and those that diffusers' pipelines take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from anyflow.sampling import Callback
from anyflow.validation import brief

_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")


@contextmanager
def progress_bar(show: bool, steps: int | None) -> Iterator[Callback | None]:
    """A callback of the sampler that moves a bar in the terminal; None if it should not be shown."""
    if not show:
        yield None
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task("sampling", total=steps)

        def step(index: int, timestep: float, latents: Tensor) -> None:
            bar.advance(task)

        yield step


def both(first: Callback | None, second: Callback | None) -> Callback | None:
    """A callback that calls both; what the first returns counts."""
    if first is None or second is None:
        return second if first is None else first

    def callback(index: int, timestep: float, latents: Tensor) -> Tensor | None:
        second(index, timestep, latents)
        return first(index, timestep, latents)

    return callback


def step_end_callback(
    pipe: Any,
    function: Callable[..., Mapping[str, Any] | None] | None,
    names: Sequence[str],
    callback: Callback | None,
    embeds: Mapping[str, Tensor | None],
) -> Callback | None:
    """Make diffusers' ``callback_on_step_end(pipe, index, timestep, tensors)`` a callback of the sampler.

    Args:
        pipe: its first argument.
        function: diffusers' callback, or an object that names its ``tensor_inputs``; None takes ``callback``.
        names: of the tensors that it gets: ``latents`` (frames first), ``prompt_embeds``, ``negative_prompt_embeds``.
        callback: the sampler's own, of which there can be only one.
        embeds: the latter two tensors.

    Raises:
        ValueError: both are given, or one that is no function, or unknown names; while sampling, for a result that
            replaces more than ``latents`` or for a pipeline that is to be interrupted.
    """
    for name, given in (("callback", callback), ("callback_on_step_end", function)):
        if given is not None and not callable(given):
            raise ValueError(f"{name} must be a function, got {brief(given)}")
    if function is None:
        return callback
    if callback is not None:
        raise ValueError("give either callback or callback_on_step_end, not both")
    names = getattr(function, "tensor_inputs", names)
    names = [] if names is None else names
    if not isinstance(names, (list, tuple)) or not all(name in _TENSORS for name in names):
        raise ValueError(f"callback_on_step_end_tensor_inputs must be of {', '.join(_TENSORS)}, got {brief(names)}")

    def after_step(index: int, timestep: float, latents: Tensor) -> Tensor | None:
        tensors = {name: latents if name == "latents" else embeds[name] for name in names}
        returned = function(pipe, index, torch.tensor(timestep, dtype=torch.float64), dict(tensors))
        if returned is not None and not isinstance(returned, Mapping):
            raise ValueError(f"callback_on_step_end must return a dict or None, got {type(returned).__name__}")
        returned = {} if returned is None else returned
        changed = [name for name, value in returned.items() if name != "latents" and value is not tensors.get(name)]
        if changed:
            raise ValueError(f"callback_on_step_end can replace latents only, not {', '.join(map(str, changed))}")
        if getattr(pipe, "_interrupt", False) or getattr(pipe, "interrupt", False):
            raise ValueError("callback_on_step_end cannot interrupt this pipeline; raise an exception instead")
        return returned.get("latents")

    return after_step
