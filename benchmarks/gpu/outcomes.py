"""Define a check on a device, and what becomes of it: an outcome, a line of the results."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gpu.run import last_line

SAME = 1e-6  # an error of what the same kernels compute in another order of launches

Backends = dict[str, list[str]]  # by operator
# A line of the results: name, ok, error (None where the check raised), limit, problem (None if ok),
# numbers (whether it failed by wrong numbers, not by an exception), seconds, accuses.
Outcome = dict[str, Any]


@dataclass(frozen=True)
class DeviceCheck:
    """Describe a check.

    Attributes:
        name: unique.
        limit: the largest error that passes.
        run: gives the error, or raises.
        accuses: backends by operator that are wrong if it fails, and are not timed; of wrong
            numbers, nor are networks that run them. Empty where a failure is a warning alone.
    """

    name: str
    limit: float
    run: Callable[[], float]
    accuses: Backends = field(default_factory=dict)


class WrongNumbers(Exception):
    """Say that a result is wrong in another way than by the size of its error."""


def evaluate(check: DeviceCheck) -> Outcome:
    """Run a check; an exception is its outcome."""
    started, error, problem, numbers = time.monotonic(), None, None, False
    try:
        error = check.run()
        if not error <= check.limit:  # NaN too
            problem, numbers = f"the error is {error:.1e}, allowed are {check.limit:.1e}", True
    except WrongNumbers as wrong:
        problem, numbers = str(wrong), True
    except Exception as exception:
        problem = last_line(exception)
    found = failed(check, problem, numbers, error)
    return found | {"seconds": round(time.monotonic() - started, 2)}


def failed(
    check: DeviceCheck, problem: str | None, numbers: bool = False, error: float | None = None
) -> Outcome:
    """Return the outcome of a check with a problem; without one, it passed."""
    found = {"name": check.name, "ok": problem is None, "error": error, "limit": check.limit}
    return found | {"problem": problem, "numbers": numbers, "accuses": check.accuses}


def relative(actual: Tensor, expected: Tensor) -> float:
    """Return ``||a - e|| / ||e||``, NaN where the result has one."""
    expected = expected.detach().double()
    return ((actual.detach().double() - expected).norm() / expected.norm()).item()
