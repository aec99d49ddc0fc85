"""Show how far the quickstart is: bars in a terminal, lines in a log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from anyflow.utils.progress import LINE_SECONDS, LoggedProgress

TITLES = {
    "flow_matching": "flow matching (teacher)",
    "pretrain": "stage 1: flow-map pretraining",
    "on_policy": "stage 2: on-policy distillation",
    "evaluation": "evaluation",
    "causal_pretrain": "causal stage 1: pretraining",
    "causal_evaluation": "long clips",
}


class Advance(Protocol):
    """Report a finished unit of work, with its loss if it has one."""

    def __call__(self, loss: float | None, /) -> None: ...


class DemoProgress:
    """Show a bar for each stage and one for the whole run; a context manager around the run.

    Args:
        console: gets the bars, or lines if it is no terminal.
        line_seconds: least time between two lines on a stage.
    """

    def __init__(self, console: Console, line_seconds: float = LINE_SECONDS) -> None:
        self.console = console
        self._bars = LoggedProgress(
            TextColumn("{task.description:<32}"),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>4.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            line_seconds=line_seconds,
            speed_estimate_period=120,
        )
        self._total: TaskID | None = None

    def __enter__(self) -> DemoProgress:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def start(self, total_cost: float) -> None:
        """Show the bar of the whole run."""
        self._total = self._bars.add_task("[bold]everything", total=total_cost, note="")

    def skip(self, name: str, cost: float) -> None:
        """Take a stage that an earlier run has finished out of the whole."""
        assert self._total is not None
        self.console.print(f"{TITLES[name]}: done by an earlier run")
        whole = self._bars.tasks[0].total
        assert whole is not None
        self._bars.update(self._total, total=whole - cost)

    @contextmanager
    def stage(self, name: str, steps: int, cost: float) -> Iterator[Advance]:
        """Show the bar of one stage, and yield the function to call after each of its ``steps``."""
        assert self._total is not None
        total = self._total
        task = self._bars.add_task(TITLES[name], total=steps, note="")
        if not self.console.is_terminal:
            self.console.print(f"{TITLES[name]}: {steps} steps")

        def advance(loss: float | None, /) -> None:
            self._bars.update(total, advance=cost / steps)
            self._bars.update(task, advance=1, note="" if loss is None else f"loss {loss:#.3g}")

        yield advance
        if not self.console.is_terminal:
            self.console.print(f"{TITLES[name]}: done")
