"""How long this process has waited for a processor that other work had: what tells a disturbed
sample from a quiet one.

Linux counts it for every thread, in the second number of ``/proc/self/task/<thread>/schedstat``.
Elsewhere nothing does, and every sample is taken for a quiet one.
"""

from __future__ import annotations

import os
from pathlib import Path

_TASKS = Path("/proc/self/task")


class WaitingTime:
    """A clock of the time that the threads of this process have waited in the scheduler's queues.

    It knows the threads that exist when it is made.
    """

    def __init__(self) -> None:
        self._files: list[int] = []
        for task in _TASKS.glob("*/schedstat"):
            try:
                self._files.append(os.open(task, os.O_RDONLY))
            except OSError:  # a thread that has just ended
                continue

    def seconds(self) -> float:
        """The sum over the threads so far."""
        total = 0
        for file in self._files:
            try:
                total += int(os.pread(file, 128, 0).split()[1])
            except (OSError, IndexError):
                continue
        return 1e-9 * total

    def __del__(self) -> None:
        for file in self._files:
            os.close(file)
