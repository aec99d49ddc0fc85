"""Describe a run to its sections: device, sizes, the time that is left, where measurements go."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sizes import CAUSAL, PUBLISHED, TINY, TINY_CAUSAL, CausalSize, NetworkSize
from timing import Interleaved, Step
from workloads import Place

from gpu.state import RunFile


class Skip(Exception):
    """End a section that cannot be measured here; the text says why."""


@dataclass
class DeviceRun:
    """Hold what the sections of a run share.

    Attributes:
        device: that is measured.
        tiny: tiny shapes, to prove the code; their times mean nothing.
        file: of the results.
        deadline: on ``time.monotonic()``, which all processes of a machine share.
        name: of the section that runs.
        short: whether the short plan leaves out what takes long for the least news.
    """

    device: torch.device
    tiny: bool
    file: RunFile
    deadline: float
    name: str = ""
    short: bool = False

    @property
    def cuda(self) -> bool:
        """Tell whether this is a GPU."""
        return self.device.type == "cuda"

    @property
    def place(self) -> Place:
        """Return where workloads are built; a C++ compiler takes too long for a tiny run."""
        return Place(self.device, Path(), "aot_eager" if self.tiny else "inductor")

    @property
    def sizes(self) -> dict[str, NetworkSize]:
        """Return the networks by published name."""
        return TINY if self.tiny else PUBLISHED

    @property
    def causal_sizes(self) -> dict[str, CausalSize]:
        """Return the causal networks by published name."""
        return TINY_CAUSAL if self.tiny else CAUSAL

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype that the networks run in."""
        return self.sizes["1.3B"].dtype

    def remaining(self) -> float:
        """Return the seconds of the budget that are left."""
        return self.deadline - time.monotonic()

    def affords(self, seconds: float) -> bool:
        """Tell whether the time for these seconds of an H100 or H200 is left."""
        return (min(seconds, 1.0) if self.tiny else seconds) <= self.remaining()

    def put(self, key: str, value: Any, quiet: bool = False) -> None:
        """Record a measurement of this section on disk, and print it unless ``quiet``."""
        self.file.put(self.name, key, value)
        if not quiet:
            print(f"{self.name}: {key}: {one_line(value)}", flush=True)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a measurement of this section, or a default without one."""
        return self.file.get(self.name, key, default)

    def fail(self, problem: str) -> None:
        """Count the section as failed, which runs to its end and keeps what it has."""
        self.file.section(self.name)["problem"] = problem

    def note(self, finding: str) -> None:
        """Count the section as done, and end the run with status 1 and this finding."""
        self.file.section(self.name)["note"] = finding

    def time(
        self,
        steps: Mapping[str, Step],
        rounds: int,
        problems: dict[str, str],
        graphs: bool = False,
        reserve_s: float = 0.0,
    ) -> Interleaved:
        """Time steps beside each other.

        Args:
            steps: by name; they are warm.
            rounds: at most; the first one is always finished.
            problems: takes the error of a step that raises, which is then left out.
            graphs: replay CUDA graphs of several calls; only two rounds without a GPU.
            reserve_s: seconds that must be left before each further round.
        """

        def failed(name: str, error: Exception) -> None:
            problems[name] = last_line(error)
            self.recover()

        found = Interleaved(steps, self.device, graphs, failed)
        found.run(min(rounds, 2) if self.tiny else rounds, lambda: self.affords(reserve_s))
        return found

    def attempt(self, problems: dict[str, str], name: str, make: Callable[[], Any]) -> Any:
        """Return what ``make`` does; None with the problem noted by name where it raises."""
        try:
            return make()
        except Exception as error:
            problems[name] = last_line(error)
            self.recover()
            return None

    def recover(self) -> None:
        """Give memory back after an error; raise where the error has broken the device."""
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def wrong_kernels(self) -> dict[str, list[str]]:
        """Return the backends of each operator that a check found wrong: they are not timed."""
        found: dict[str, list[str]] = self.file.get("checks", "wrong", {})
        return found

    def require_right_kernels(self, operators: tuple[str, ...]) -> None:
        """Raise :class:`Skip` if an operator runs here on a kernel with wrong numbers."""
        from anyflow.ops import backend_report

        wrong = self.file.get("checks", "wrong_numbers", {})
        choices = backend_report(self.device)
        found = [op for op in operators if choices[op].backend in wrong.get(op, [])]
        if found:
            names = ", ".join(f"{op} ({choices[op].backend})" for op in found)
            raise Skip(f"a wrong kernel is not timed: wrong numbers of {names}")


@dataclass(frozen=True)
class RunSection:
    """Describe a part of a run, isolated from the others.

    Attributes:
        name: for ``--only``.
        title: what it measures.
        seconds: that it takes on an H100 or H200, roughly; they decide whether it still fits the
            budget.
        run: does it.
        operators: that its networks run: with a wrong kernel of one of them it is skipped.
        resumes: whether it adds to its data of an earlier run that ended too early.
    """

    name: str
    title: str
    seconds: float
    run: Callable[[DeviceRun], None]
    operators: tuple[str, ...] = ()
    resumes: bool = False


def one_line(value: Any, limit: int = 220) -> str:
    """Format a value for the console; raw samples are in the file."""
    if isinstance(value, dict):
        value = {k: v for k, v in value.items() if k != "samples_ms"}
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def last_line(error: BaseException) -> str:
    """Return the last line of a traceback."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}".rstrip(": ")
