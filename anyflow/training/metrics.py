"""Write what a run reports while it runs: ``metrics.jsonl``, loggers and a progress bar."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from anyflow.training.trackers import Trackers
from anyflow.utils.documents import parse_json, read_text
from anyflow.utils.progress import LoggedProgress
from anyflow.utils.writing import write_text, writing

FILE = "metrics.jsonl"
_MAX_BYTES = 4 * 2**30


class MetricsWriter:
    """Write rank 0's reports, in a context; on other ranks do nothing.

    ``metrics.jsonl`` has one object per reported step: ``step`` (from 1); means since the last line
    of the losses and of the gradients' norms before clipping; the last learning rates; the rates
    and the memory of :class:`~anyflow.training.throughput.Throughput`; ``validation_loss`` where it
    was evaluated, and ``metrics/…`` where videos were measured; and ``seconds`` of this process. A
    run that is resumed drops the lines after the checkpoint, so that the file is that of an
    uninterrupted run.

    Args:
        folder: folder of the run.
        trackers: loggers that get the same.
        start: updates done before.
        total: updates of the whole run.
        enabled: False on all ranks but one.
        console: where the bar goes; None for the terminal.
    """

    def __init__(
        self,
        folder: Path,
        trackers: Trackers,
        *,
        start: int,
        total: int,
        enabled: bool,
        console: Console | None,
    ) -> None:
        self._enabled = enabled
        self._begin = time.monotonic()
        if not enabled:
            return
        self._path, self._trackers = folder / FILE, trackers
        keep_until(self._path, start)
        self._file = self._path.open("a", encoding="utf-8")
        self._bar = LoggedProgress(
            TextColumn("training"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            speed_estimate_period=120,
        )
        self._task = self._bar.add_task("training", total=total, completed=start, note="")

    def __enter__(self) -> MetricsWriter:
        if self._enabled:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if not self._enabled:
            return
        self._bar.stop()
        with writing(self._path):
            self._file.close()

    def advance(self, step: int) -> None:
        """Show that ``step`` updates are done."""
        if self._enabled:
            self._bar.update(self._task, completed=step)

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of the updates up to ``step`` (from 1)."""
        if not self._enabled:
            return
        line = {"step": step, **values, "seconds": time.monotonic() - self._begin}
        with writing(self._path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        self._trackers.log(step, {name: value for name, value in line.items() if name != "step"})
        shown = _shown(values)
        if not shown:
            return
        self._bar.update(self._task, note="  ".join(shown))
        if not self._bar.console.is_terminal:
            self._bar.console.print(f"step {step}: {', '.join(shown)}")

    def report_video(self, step: int, file: Path | None) -> None:
        """Hand a preview to the loggers, if one was written."""
        if self._enabled and file is not None:
            self._trackers.log_video(step, "preview", file)


def _shown(values: Mapping[str, float]) -> list[str]:
    """Choose what a line of the terminal has room for."""
    shown = []
    loss = values.get("loss", values.get("critic_loss"))
    if loss is not None:
        shown.append(f"loss {loss:#.4g}")
    if "validation_loss" in values:
        shown.append(f"validation loss {values['validation_loss']:#.4g}")
    if "samples_per_second" in values:
        shown.append(f"{values['samples_per_second']:.3g} samples/s")
    if "mfu" in values:
        shown.append(f"{100 * values['mfu']:.0f} % MFU")
    return shown


def keep_until(file: Path, step: int) -> None:
    """Cut off the lines of updates after ``step``, and a last one that a kill has torn.

    Raises:
        ValueError: it is not a file in UTF-8, or a line before the last is none of a run; the
            message names the line.
    """
    if not os.path.lexists(file):
        return
    lines = read_text(file, max_bytes=_MAX_BYTES).splitlines()
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            reported = _step_of(line, f"{file}, line {number}")
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{error}; delete the line, or the file, to resume") from None
        if reported > step:
            break
        kept.append(line + "\n")
    write_text(file, "".join(kept))


def _step_of(line: str, where: str) -> int:
    values = parse_json(line, where)
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        raise ValueError(f"{where} is no object with a whole number 'step'")
    return values["step"]
