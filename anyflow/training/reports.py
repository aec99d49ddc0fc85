"""Bring every rank's numbers to rank 0's file, loggers and progress bar."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from torch import Tensor

from anyflow.training.config import Recipe
from anyflow.training.distributed import Mesh
from anyflow.training.metrics import MetricsWriter
from anyflow.training.resuming import Position, flatten
from anyflow.training.throughput import Throughput
from anyflow.training.trackers import Trackers
from anyflow.training.window import Window


class Reports:
    """Average what updates return, and write a line of it when one is due, in a context.

    Used on every rank.

    Args:
        recipe: the run.
        mesh: this process's place in it.
        tokens: tokens of a video.
        at: where the run begins.
        console: where messages go.

    Raises:
        ValueError: ``metrics.jsonl`` cannot be continued, or a logger does not start.
    """

    def __init__(
        self, recipe: Recipe, mesh: Mesh, tokens: int, at: Position, console: Console
    ) -> None:
        self._recipe, self._open, out = recipe, ExitStack(), Path(recipe.out)
        self._window = Window(mesh.device, at.window)
        with ExitStack() as opened:
            loggers = recipe.loggers if mesh.is_main else ()
            trackers = Trackers(
                loggers, out, recipe.project, flatten(dataclasses.asdict(recipe)), at.step
            )
            self._trackers = opened.enter_context(trackers)
            self._metrics = opened.enter_context(
                MetricsWriter(
                    out,
                    trackers,
                    start=at.step,
                    total=recipe.steps,
                    enabled=mesh.is_main,
                    console=console,
                )
            )
            self._open = opened.pop_all()
        # its time begins
        self._throughput = Throughput(mesh, tokens, bf16=recipe.precision == "bf16")

    def __enter__(self) -> Reports:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, tb)

    def add(
        self, done: int, scalars: Mapping[str, Tensor | float], samples: int, flops: int
    ) -> None:
        """Note update ``done`` (from 1): this rank's scalars, and all ranks' samples and FLOPs."""
        self._window.add(scalars)
        self._throughput.add(samples, flops)
        self._metrics.advance(done)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of what is not training."""
        with self._throughput.paused():
            yield

    def report(self, done: int, more: Mapping[str, float]) -> None:
        """Write a line if one is due after update ``done``, or if ``more`` is given.

        Collective, while paused.
        """
        values = dict(more)
        if done == 1 or done % self._recipe.log_every == 0:
            values = {**self._window.take(), **values, **self._throughput.take()}
        if values:
            self._metrics.report(done, values)

    def add_charts(self, curves: Mapping[str, Sequence[str]]) -> None:
        """Show these numbers as curves of one chart, by its title, where a logger draws charts."""
        self._trackers.add_charts(curves)

    def report_video(self, done: int, file: Path | None) -> None:
        """Hand a preview to the loggers, if one was written."""
        self._metrics.report_video(done, file)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the numbers since the last line, as JSON values.

        Collective.
        """
        return self._window.state()
