"""What a run reports while it runs: ``metrics.jsonl``, TensorBoard or Weights & Biases, and a progress bar."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from anyflow.documents import parse_json, read_text
from anyflow.network import widest_float
from anyflow.writing import write_text, writing

FILE = "metrics.jsonl"
_MAX_BYTES = 4 * 2**30


def check_loggers(loggers: Sequence[str]) -> None:
    """ValueError if the package of a logger is not installed."""
    for logger in loggers:
        if importlib.util.find_spec(logger) is None:  # the packages have the loggers' names
            raise ValueError(f"loggers: {logger} is not installed: pip install {logger}")


def rank_mean(scalars: Mapping[str, Tensor | float], device: torch.device) -> dict[str, float]:
    """Scalars averaged over all ranks, on the CPU. Collective, and the only read of the device beside the guard's."""
    dtype = widest_float(device)
    values = torch.stack([torch.as_tensor(v, dtype=dtype, device=device).detach() for v in scalars.values()])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    plain = values.tolist()
    floats = {name: value for name, value in scalars.items() if isinstance(value, float)}  # exactly, not through a mean
    return {**dict(zip(scalars, plain, strict=True)), **floats}


class Metrics:
    """Rank 0's reports, a context manager; on other ranks it does nothing.

    ``metrics.jsonl`` has one object per reported step: ``step`` (from 1), the losses, the gradients' norms before
    clipping, the learning rates, ``samples_per_second`` of all ranks and ``seconds`` of training in this process. A run
    that is resumed drops the lines after the checkpoint, so that the file is that of an uninterrupted run.

    Args:
        folder: of the run.
        loggers: beside the file.
        start: updates done before.
        total: updates of the whole run.
        enabled: False on all ranks but one.
        console: where the bar goes; None for the terminal.
    """

    def __init__(
        self,
        folder: Path,
        loggers: Sequence[Literal["tensorboard", "wandb"]],
        *,
        start: int,
        total: int,
        enabled: bool,
        console: Console | None,
    ) -> None:
        self._enabled = enabled
        self._begin = self._last = time.monotonic()
        if not enabled:
            return
        self._path = folder / FILE
        keep_until(self._path, start)
        self._file = self._path.open("a", encoding="utf-8")
        self._tensorboard = _tensorboard(folder, start) if "tensorboard" in loggers else None
        self._wandb = _wandb(folder) if "wandb" in loggers else None
        self._bar = Progress(
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

    def __enter__(self) -> Metrics:
        if self._enabled:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if not self._enabled:
            return
        self._bar.stop()
        with writing(self._path):
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def advance(self, step: int) -> None:
        """Show that ``step`` updates are done."""
        if self._enabled:
            self._bar.update(self._task, completed=step)

    def report(self, step: int, values: Mapping[str, float], samples: int) -> None:
        """Write the values of update ``step`` (from 1); ``samples`` are those of all ranks since the last report."""
        if not self._enabled:
            return
        now = time.monotonic()
        rate = samples / (now - self._last)
        self._last = now
        line = {"step": step, **values, "samples_per_second": rate, "seconds": now - self._begin}
        with writing(self._path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if self._tensorboard is not None:
            for name, value in line.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(line, step=step)
        loss = values.get("loss", values.get("critic_loss", math.nan))
        self._bar.update(self._task, note=f"loss {loss:.4f}  {rate:.3g} samples/s")
        if not self._bar.console.is_terminal:
            self._bar.console.print(f"step {step}: loss {loss:.4f}, {rate:.3g} samples/s")


def keep_until(file: Path, step: int) -> None:
    """Cut off the lines of updates after ``step``, and a last one that a kill has torn.

    Raises:
        ValueError: it is not a file in UTF-8, or a line before the last is none of a run; the message names the line.
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
            raise ValueError(f"{error}; delete the line, or the file, to go on") from None
        if reported > step:
            break
        kept.append(line + "\n")
    write_text(file, "".join(kept))


def _step_of(line: str, where: str) -> int:
    values = parse_json(line, where)
    if not isinstance(values, dict) or type(values.get("step")) is not int:
        raise ValueError(f"{where} is no object with a whole number 'step'")
    return values["step"]


def _tensorboard(folder: Path, start: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder / "tensorboard", purge_step=start + 1)


def _wandb(folder: Path) -> Any:
    import wandb  # type: ignore[import-not-found,unused-ignore]

    return wandb.init(dir=folder, name=folder.name, resume="allow")
