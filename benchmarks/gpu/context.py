"""What a section gets: the device, the sizes, the time that is left, and where its measurements go."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gpu.roofline import H200
from gpu.sizes import Size, sizes
from gpu.state import RunFile


class Skip(Exception):
    """A section that cannot be measured here; the text says why."""


@dataclass
class Context:
    """A run as its sections see it.

    Attributes:
        device: that is measured.
        tiny: tiny shapes, to prove the code; their times mean nothing.
        file: of the results.
        deadline: on ``time.monotonic()``, which all processes of a machine share.
        name: of the section that runs.
    """

    device: torch.device
    tiny: bool
    file: RunFile
    deadline: float
    name: str = ""

    @property
    def cuda(self) -> bool:
        """Whether this is a GPU."""
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """That the networks run in."""
        return torch.bfloat16 if self.cuda else torch.float32

    @property
    def sizes(self) -> dict[str, Size]:
        """The networks by published name."""
        return sizes(self.tiny)

    @property
    def slowness(self) -> float:
        """How much longer than on an H200 things will take, by the rate of a matrix product in this run."""
        measured = self.file.get("limits", "matmul_flops")
        return max(1.0, H200.flops / measured) if measured and not self.tiny else 1.0

    def remaining(self) -> float:
        """Seconds of the budget."""
        return self.deadline - time.monotonic()

    def affords(self, seconds: float) -> bool:
        """Whether so many seconds of an H200 are left."""
        return (min(seconds, 1.0) if self.tiny else seconds * self.slowness) <= self.remaining()

    def put(self, key: str, value: Any) -> None:
        """Record a measurement of this section; it is on disk afterwards."""
        self.file.put(self.name, key, value)
        print(f"{self.name}: {key}: {short(value)}", flush=True)

    def fail(self, problem: str) -> None:
        """The section goes on, keeps what it has and counts as failed."""
        self.file.section(self.name)["problem"] = problem

    def wrong_kernels(self) -> dict[str, list[str]]:
        """Operator to the backends of which a test failed: these are not timed by themselves."""
        return self.file.get("tests", "wrong") or {}

    def require_right_kernels(self) -> None:
        """Skip a section whose networks would run on a kernel that computes something else."""
        backend = "triton" if self.cuda else "native"
        found = self.file.get("tests", "wrong_numbers") or {}
        wrong = sorted(op for op, backends in found.items() if backend in backends)
        if wrong:
            raise Skip(f"a wrong kernel is not timed: wrong numbers of {', '.join(wrong)}")


@dataclass(frozen=True)
class Section:
    """A part of the run, isolated from the others.

    Attributes:
        name: for ``--only``.
        title: what it measures.
        seconds: that it takes on an H200, roughly; what decides whether it still fits the budget.
        run: does it.
    """

    name: str
    title: str
    seconds: float
    run: Callable[[Context], None]


def short(value: Any, limit: int = 220) -> str:
    """One line for the console; raw samples are in the file."""
    if isinstance(value, dict):
        value = {k: v for k, v in value.items() if k != "samples_ms"}
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def last_line(error: BaseException) -> str:
    """The last line of a traceback."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}".rstrip(": ")
