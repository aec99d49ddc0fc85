"""Alternatives timed in turns in one process: what else the machine does then hits all of them.

A round times each alternative once, and the time of an alternative is the median of its quiet
samples: those during which no thread of the process waited for a processor. On a machine that does
other work too, the threads of an operator otherwise wait for each other until the scheduler's next
slot, milliseconds for an operator of microseconds, and medians of everything measure that: an
operator that is 3.3 times as fast as its reference read 1.1 and 18 times in two runs. Where there
are hardly any quiet samples, it is the shortest of all, and the figure is marked as one of a busy
machine.
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from waiting import WaitingTime

Step = Callable[[], object]

OURS = "anyflow"
# A sample lasts at least so long, by repeating a short step: long enough for the clock, and on a
# GPU for the launch of a kernel; short enough to fit between two interruptions.
_SAMPLE_SECONDS = {"cpu": 2e-4, "cuda": 2e-2}
_MAX_CALLS = 1000
_SHORT = 0.1  # seconds; the time of a step that is shorter is taken twice before it is trusted
_CALIBRATION = 0.2  # share of the budget after which the number of rounds is known
_PATIENCE = 4.0  # budgets to wait for quiet samples, of which there should be so many:
_QUIET_SAMPLES = 5
# a sample is quiet if its threads waited no longer than this
_QUIET_SECONDS, _QUIET_SHARE = 2e-5, 0.02


@dataclass(frozen=True)
class Budget:
    """How long to measure one benchmark: for about ``seconds``, but at least so many rounds."""

    seconds: float
    min_rounds: int = 5


class Interleaved:
    """Alternatives that take turns.

    Args:
        steps: ours under the name :data:`OURS`, and its peers, each of which has run before: it has
            compiled and has filled caches and allocators. Here it shows how often to repeat it in a
            sample.
        device: where they run; a sample ends when the device has finished.
    """

    def __init__(self, steps: Mapping[str, Step], device: torch.device) -> None:
        self.steps, self.device = dict(steps), device
        self.peers = [name for name in steps if name != OURS]
        self.times: dict[str, list[float]] = {name: [] for name in steps}
        self.quiet: dict[str, list[float]] = {name: [] for name in steps}  # the quiet ones of these
        self.calls = dict.fromkeys(steps, 1)
        self._waiting = WaitingTime()  # of the threads that there now are
        once = {name: self._time(name) for name in self.steps}
        for name, seconds in once.items():
            if seconds < _SHORT:
                once[name] = min(seconds, self._time(name))
        shortest = _SAMPLE_SECONDS[device.type]
        self.calls = {name: min(_MAX_CALLS, math.ceil(shortest / t)) for name, t in once.items()}

    def remaining_rounds(self, budget: Budget) -> int:
        """Run the first rounds, and tell how many more the budget has room for as the machine is at
        the moment.
        """
        start, done = time.perf_counter(), 0
        while done == 0 or time.perf_counter() - start < _CALIBRATION * budget.seconds:
            self.run(1)
            done += 1
        elapsed = time.perf_counter() - start
        return max(1, budget.min_rounds - done, int((budget.seconds - elapsed) / elapsed * done))

    def run(self, count: int) -> None:
        """So many rounds."""
        for _ in range(count):
            self.time_peers()
            self.time_ours()

    def wait_for_quiet(self, budget: Budget) -> None:
        """More rounds while there are too few quiet samples, as long as a few budgets."""
        end = time.perf_counter() + _PATIENCE * budget.seconds
        while self.busy(budget) and time.perf_counter() < end:
            self.run(1)

    def busy(self, budget: Budget) -> bool:
        """Whether the machine did so much else that the times are not those of the alternatives
        alone.
        """
        return min(map(len, self.quiet.values())) < min(_QUIET_SAMPLES, budget.min_rounds)

    def time_peers(self) -> None:
        """The first half of a round: each peer once, in the opposite order every other round."""
        for name in self.peers if len(self.times[OURS]) % 2 == 0 else self.peers[::-1]:
            self._sample(name)

    def time_ours(self) -> None:
        """The second half of a round."""
        self._sample(OURS)

    def seconds(self, name: str) -> float:
        """Time of an alternative."""
        quiet = self.quiet[name]
        return statistics.median(quiet) if len(quiet) >= 3 else min(self.times[name])

    def ratio(self, peer: str) -> float:
        """How many times as long as ours a peer takes."""
        return self.seconds(peer) / self.seconds(OURS)

    def _sample(self, name: str) -> None:
        before = self._waiting.seconds()
        seconds = self._time(name)
        waited = self._waiting.seconds() - before
        self.times[name].append(seconds)
        if waited <= max(_QUIET_SECONDS, _QUIET_SHARE * seconds * self.calls[name]):
            self.quiet[name].append(seconds)

    def _time(self, name: str) -> float:
        step, calls = self.steps[name], self.calls[name]
        start = time.perf_counter()
        for _ in range(calls):
            step()
        self._synchronize()
        return (time.perf_counter() - start) / calls

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def difference(ours: object, theirs: object) -> float:
    """Largest difference of two results of steps, relative to the largest element of theirs; NaN is
    never small.

    Args:
        ours: a tensor, or tensors and None in a sequence. Anything else, such as a model, is not
            compared.
        theirs: the same of a peer.
    """
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        wide = torch.promote_types(theirs.dtype, torch.float32)
        distance = (ours.detach().to(wide) - theirs.detach().to(wide)).abs().max()
        return float(distance / theirs.detach().abs().max().clamp(min=torch.finfo(wide).tiny))
    if isinstance(ours, (tuple, list)) and isinstance(theirs, (tuple, list)):
        found = [difference(a, b) for a, b in zip(ours, theirs, strict=True)]
        return math.nan if any(math.isnan(d) for d in found) else max(found, default=0.0)
    return 0.0


def keep_freed_memory() -> None:
    """Tell the C library to keep what is freed for the next allocation, as it does in long runs of
    one shape.

    Otherwise it gives large pieces back and asks for them again when it pleases, and their first
    touch, page by page in the kernel, is up to three times the time of a short operator: a ratio
    would tell whose turn that was. Above 32 MiB, the most that the library can be told, it stays
    so. Without effect where the library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    mallopt(mmap_threshold, 32 * 2**20)
    mallopt(trim_threshold, 2**31 - 1)


def peak_memory(step: Step, device: torch.device) -> int | None:
    """Bytes that a step needs at its peak beyond what is allocated before it; None where the system
    does not say.

    On the CPU, the high-water mark of the process (Linux), after what the allocator has kept is
    given back.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        # the high-water mark falls to the present size
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        step()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError):
        return None


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024
