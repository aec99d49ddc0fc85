"""The progress of sampling in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from anyflow.sampling import Callback


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
