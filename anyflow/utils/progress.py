"""Show how far long commands are: bars in a terminal, a line every half minute in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.markup import escape, render
from rich.progress import Progress, ProgressColumn, Task, TaskID

LINE_SECONDS = 30.0


class LoggedProgress(Progress):
    """Show rich's bars in a terminal; else print a line on the tasks every ``line_seconds``.

    Args:
        columns: columns of the bars.
        line_seconds: least time between two lines.
        settings: the other arguments of ``rich.progress.Progress``.
    """

    def __init__(
        self, *columns: str | ProgressColumn, line_seconds: float = LINE_SECONDS, **settings: Any
    ) -> None:
        super().__init__(*columns, **settings)
        self._line_seconds, self._last_line = line_seconds, time.monotonic()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Change a task; the arguments are those of rich."""
        super().update(task_id, **changes)
        now = time.monotonic()
        if not self.console.is_terminal and now - self._last_line >= self._line_seconds:
            self._last_line = now
            running = [
                describe(task)
                for task in self.tasks
                if task.started and task.visible and not task.finished
            ]
            self.console.print("; ".join(running), markup=False)


def describe(task: Task) -> str:
    """Say how far a task is: its name, its whole steps, per cent, time left, and its note."""
    parts = [f"{task.percentage:.0f} %"]
    if isinstance(task.completed, int) and isinstance(task.total, int):
        parts.insert(0, f"step {task.completed} of {task.total}")
    if task.time_remaining is not None:
        parts.append(f"{timedelta(seconds=round(task.time_remaining))} left")
    if note := task.fields.get("note"):
        parts.append(note)
    return f"{render(task.description).plain}: {', '.join(parts)}"


@contextmanager
def status(console: Console | None, text: str) -> Iterator[None]:
    """Show what is being done: by a spinner in a terminal, else by a line."""
    if console is None:
        yield
    elif console.is_terminal:
        with console.status(escape(text)):
            yield
    else:
        console.print(text, markup=False)
        yield


def counted(count: int, name: str) -> str:
    """Return a number with its noun: ``1 step``, ``2 steps``."""
    return f"{count} {name}" if count == 1 else f"{count} {name}s"
