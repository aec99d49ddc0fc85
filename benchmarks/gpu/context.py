"""Holds what a section gets: the device, the sizes, the time that is left, and where its
measurements go.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gpu.sizes import Size, sizes
from gpu.state import RunFile

# FLOP/s of a bf16 product on the cards that the sections' seconds are for, H100 and H200
REFERENCE_FLOPS = 790e12


class Skip(Exception):
    """Ends a section that cannot be measured here; the text says why."""


@dataclass
class Context:
    """Describes a run to its sections.

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
    def dtype(self) -> torch.dtype:
        """Return the dtype that the networks run in."""
        return torch.bfloat16 if self.cuda else torch.float32

    @property
    def sizes(self) -> dict[str, Size]:
        """Return the networks by published name."""
        return sizes(self.tiny)

    @property
    def slowness(self) -> float:
        """Estimate how much longer than on an H200 things will take, by the rate of a matrix
        product in this run.
        """
        measured = self.file.get("limits", "matmul_flops")
        return max(1.0, REFERENCE_FLOPS / measured) if measured and not self.tiny else 1.0

    def remaining(self) -> float:
        """Return the seconds of the budget that are left."""
        return self.deadline - time.monotonic()

    def affords(self, seconds: float) -> bool:
        """Tell whether so many seconds of an H200 are left."""
        return (min(seconds, 1.0) if self.tiny else seconds * self.slowness) <= self.remaining()

    def put(self, key: str, value: Any, quiet: bool = False) -> None:
        """Record a measurement of this section, which is on disk afterwards, and print it unless
        ``quiet``.
        """
        self.file.put(self.name, key, value)
        if not quiet:
            print(f"{self.name}: {key}: {short(value)}", flush=True)

    def fail(self, problem: str) -> None:
        """Let the section go on, keep what it has and count as failed."""
        self.file.section(self.name)["problem"] = problem

    def note(self, finding: str) -> None:
        """Let the section be done, and the run end with status 1 and this finding."""
        self.file.section(self.name)["note"] = finding

    def wrong_kernels(self) -> dict[str, list[str]]:
        """Return the backends of each operator that are not timed by themselves.

        A device check found them wrong, or an operator test found wrong numbers; other failures of
        tests may be of the installation.
        """
        found = (
            self.file.get("checks", "wrong") or {},
            self.file.get("tests", "wrong_numbers") or {},
        )
        return merged(*found)

    def require_right_kernels(self, operators: tuple[str, ...]) -> None:
        """Raise :class:`Skip` if one of these operators runs here on a kernel with wrong numbers.

        Only the device checks decide: the test suite has more cases than a network, and not all are
        of the kernels.
        """
        from anyflow.ops import backend_report

        wrong = self.file.get("checks", "wrong_numbers") or {}
        choices = backend_report(self.device)
        found = [op for op in operators if choices[op].backend in wrong.get(op, [])]
        if found:
            names = ", ".join(f"{op} ({choices[op].backend})" for op in found)
            raise Skip(f"a wrong kernel is not timed: wrong numbers of {names}")


def merged(*lists: dict[str, list[str]]) -> dict[str, list[str]]:
    """Join lists of backends by operator."""
    operators = sorted({op for found in lists for op in found})
    return {
        op: sorted({backend for found in lists for backend in found.get(op, [])})
        for op in operators
    }


@dataclass(frozen=True)
class Section:
    """Describes a part of the run, isolated from the others.

    Attributes:
        name: for ``--only``.
        title: what it measures.
        seconds: that it takes on an H100 or H200, roughly; they decide whether it still fits the
            budget.
        run: does it.
        operators: that its networks run: with a wrong kernel of one of them it is skipped.
        resumes: whether it goes on with its data of an earlier run that ended too early.
    """

    name: str
    title: str
    seconds: float
    run: Callable[[Context], None]
    operators: tuple[str, ...] = ()
    resumes: bool = False


def short(value: Any, limit: int = 220) -> str:
    """Format a value in one line for the console; raw samples are in the file."""
    if isinstance(value, dict):
        value = {k: v for k, v in value.items() if k != "samples_ms"}
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def last_line(error: BaseException) -> str:
    """Return the last line of a traceback."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}".rstrip(": ")
