"""Time alternatives in turns in one process, so that what else the machine does hits all of them.

A round times each alternative once. On a CPU the time of an alternative is the median of its quiet
samples: those during which no thread of the process waited for a processor. On a machine that does
other work too, the threads of an operator otherwise wait for each other until the scheduler's next
slot, milliseconds for an operator of microseconds, and medians of everything measure that: an
operator that is 3.3 times as fast as its reference read 1.1 and 18 times in two runs. Where quiet
samples are lacking, the shortest sample counts, and the figure is marked as one of a busy machine.

On a GPU, kernels are timed by replaying CUDA graphs of several calls, so that launches stay out;
whole networks are timed call by call, where launches belong to what is measured.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Step = Callable[[], object]
OnError = Callable[[str, Exception], None]

OURS = "ours"
GRAPH_CALLS = 10  # per graph: the launch of a graph costs as much as a small kernel
# A sample on a CPU repeats a short step: long enough for the clock, short enough to fit between
# two interruptions.
_SAMPLE_SECONDS = 2e-4
_MAX_CALLS = 1000
_SHORT = 0.1  # seconds; the time of a shorter step is taken twice before it is trusted
_CALIBRATION = 0.2  # share of the budget after which the number of rounds is known
_PATIENCE = 4.0  # budgets to wait for this number of quiet samples:
_QUIET_SAMPLES = 5
# a sample is quiet if its threads waited no longer than this
_QUIET_SECONDS, _QUIET_SHARE = 2e-5, 0.02
_TASKS = Path("/proc/self/task")


@dataclass(frozen=True)
class TimeBudget:
    """Hold how long to measure a benchmark: about ``seconds``, and at least ``min_rounds``."""

    seconds: float
    min_rounds: int = 5


class Interleaved:
    """Time alternatives that take turns.

    Args:
        steps: ours under the name :data:`OURS` and its peers, each of which has run before: it has
            compiled and has filled caches and allocators.
        device: where they run; a sample ends when the device has finished.
        graphs: on a GPU, replay a CUDA graph of several calls; for what takes less than 10 ms.
        on_error: is told of a step that raises, which is then left out; without it, the exception
            is raised.

    Attributes:
        times: seconds of one call, by step and round.
        quiet: the quiet ones of these.
        peaks: on a GPU without graphs, the most bytes allocated during a call, weights included.
    """

    def __init__(
        self,
        steps: Mapping[str, Step],
        device: torch.device,
        graphs: bool = False,
        on_error: OnError | None = None,
    ) -> None:
        self.steps, self.device, self._on_error = dict(steps), device, on_error
        self.times: dict[str, list[float]] = {name: [] for name in steps}
        self.quiet: dict[str, list[float]] = {name: [] for name in steps}
        self.peaks: dict[str, int] = {}
        self.calls = dict.fromkeys(steps, 1)
        self._rounds = 0
        self._waiting = WaitingTime()
        for name in steps:
            if device.type == "cpu":
                self._guard(name, self._calibrate)
            elif graphs:
                self._guard(name, self._replace_by_graph)

    def run(self, count: int, goes_on: Callable[[], bool] = lambda: True) -> None:
        """Run rounds; ``goes_on`` is asked before each but the first."""
        for index in range(count):
            if index and not goes_on():
                return
            self.time_peers()
            self.time_ours()

    def time_peers(self) -> None:
        """Run the first half of a round: each peer once, in the opposite order every other time."""
        for name in self.peers if self._rounds % 2 == 0 else self.peers[::-1]:
            self._guard(name, self._sample)
        self._rounds += 1

    def time_ours(self) -> None:
        """Run the second half of a round."""
        if OURS in self.steps:
            self._guard(OURS, self._sample)

    @property
    def peers(self) -> list[str]:
        """Return the names of all steps but ours."""
        return [name for name in self.steps if name != OURS]

    def remaining_rounds(self, budget: TimeBudget) -> int:
        """Run the first rounds, and return how many more the budget has room for."""
        start, done = time.perf_counter(), 0
        while done == 0 or time.perf_counter() - start < _CALIBRATION * budget.seconds:
            self.run(1)
            done += 1
        elapsed = time.perf_counter() - start
        return max(1, budget.min_rounds - done, int((budget.seconds - elapsed) / elapsed * done))

    def wait_for_quiet(self, budget: TimeBudget) -> None:
        """Run more rounds while quiet samples are lacking, for at most a few budgets."""
        end = time.perf_counter() + _PATIENCE * budget.seconds
        while self.busy(budget) and time.perf_counter() < end:
            self.run(1)

    def busy(self, budget: TimeBudget) -> bool:
        """Tell whether other work of the machine disturbed too many samples."""
        return min(map(len, self.quiet.values())) < min(_QUIET_SAMPLES, budget.min_rounds)

    def seconds(self, name: str) -> float:
        """Return the median of the quiet samples, or the shortest sample where these are few."""
        quiet = self.quiet[name]
        return statistics.median(quiet) if len(quiet) >= 3 else min(self.times[name])

    def ratio(self, peer: str) -> float:
        """Return how many times as long as ours a peer takes."""
        return self.seconds(peer) / self.seconds(OURS)

    def milliseconds(self, name: str) -> dict[str, object]:
        """Return a step's median and samples in milliseconds, as a results file keeps them."""
        samples = [1e3 * seconds for seconds in self.times[name]]
        return {"ms": statistics.median(samples), "samples_ms": samples}

    def _guard(self, name: str, action: Callable[[str], None]) -> None:
        try:
            action(name)
        except Exception as error:
            if self._on_error is None:
                raise
            for known in (self.steps, self.times, self.quiet, self.peaks, self.calls):
                known.pop(name, None)
            self._on_error(name, error)

    def _calibrate(self, name: str) -> None:
        seconds = self._time(name)
        if seconds < _SHORT:
            seconds = min(seconds, self._time(name))
        self.calls[name] = min(_MAX_CALLS, math.ceil(_SAMPLE_SECONDS / seconds))

    def _replace_by_graph(self, name: str) -> None:
        self.steps[name], self.calls[name] = _capture(self.steps[name], GRAPH_CALLS), GRAPH_CALLS

    def _sample(self, name: str) -> None:
        before = self._waiting.seconds()
        seconds = self._time(name)
        waited = self._waiting.seconds() - before
        self.times[name].append(seconds)
        if waited <= max(_QUIET_SECONDS, _QUIET_SHARE * seconds * self.calls[name]):
            self.quiet[name].append(seconds)

    def _time(self, name: str) -> float:
        step, calls = self.steps[name], self.calls[name]
        if self.device.type == "cuda":
            return self._time_on_gpu(name, step) / calls
        start = time.perf_counter()
        for _ in range(calls):
            step()
        return (time.perf_counter() - start) / calls

    def _time_on_gpu(self, name: str, step: Step) -> float:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        result = step()
        end.record()
        end.synchronize()
        del result
        if self.calls[name] == 1:
            peak = torch.cuda.max_memory_allocated(self.device)
            self.peaks[name] = max(peak, self.peaks.get(name, 0))
        return start.elapsed_time(end) / 1e3


# CUDA graphs --------------------------------------------------------------------------------------

_streams: list[torch.cuda.Stream] = []


@contextmanager
def capture_stream(device: torch.device) -> Iterator[None]:
    """Make the stream of captures the current one; on a CPU, do nothing.

    Backward runs on the stream of its forward pass, so that a graph of a backward needs a forward
    that ran here.
    """
    if device.type != "cuda":
        yield
        return
    if not _streams:
        _streams.append(torch.cuda.Stream())
    side, outer = _streams[0], torch.cuda.current_stream()
    side.wait_stream(outer)
    with torch.cuda.stream(side):
        yield
    outer.wait_stream(side)


def captured(step: Step) -> Step:
    """Return the replay of a CUDA graph of one call, which writes where the captured call did."""
    return _capture(step, calls=1)


def _capture(step: Step, calls: int) -> Step:
    with capture_stream(torch.device("cuda")):
        for _ in range(min(calls, 3)):  # compiles, autotunes, fills the allocator
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=_streams[0]):
        for _ in range(calls):
            step()
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    return graph.replay


# Results and memory -------------------------------------------------------------------------------


def difference(ours: object, theirs: object) -> float:
    """Return the largest difference of two results of steps, relative to the largest element.

    Args:
        ours: a tensor, or tensors and None in a sequence. Anything else, such as a model, is not
            compared.
        theirs: the same of a peer.

    Returns:
        NaN where a result has one.
    """
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        wide = torch.promote_types(theirs.dtype, torch.float32)
        distance = (ours.detach().to(wide) - theirs.detach().to(wide)).abs().max()
        return float(distance / theirs.detach().abs().max().clamp(min=torch.finfo(wide).tiny))
    if isinstance(ours, (tuple, list)) and isinstance(theirs, (tuple, list)):
        found = [difference(a, b) for a, b in zip(ours, theirs, strict=True)]
        return math.nan if any(math.isnan(d) for d in found) else max(found, default=0.0)
    return 0.0


def peak_memory(step: Step, device: torch.device) -> int | None:
    """Return the bytes that a step needs at its peak beyond what is allocated before it.

    On the CPU this is the high-water mark of the process (Linux), after the allocator has given
    back what it kept; None where the system does not say.
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


def keep_freed_memory() -> None:
    """Tell the C library to keep what is freed for the next allocation.

    A long run of one shape behaves so by itself. Otherwise the library gives large pieces back and
    asks for them again, and their first touch, page by page in the kernel, is up to three times the
    time of a short operator: a ratio would tell whose turn that was. Pieces above 32 MiB, the most
    that the library can be told, are given back. Without effect where the library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    mallopt(mmap_threshold, 32 * 2**20)
    mallopt(trim_threshold, 2**31 - 1)


class WaitingTime:
    """Read how long this process's threads have waited for a processor that other work had.

    Linux counts it for every thread in ``/proc/self/task/<thread>/schedstat``, as the second
    number; elsewhere nothing does, and every sample is taken for a quiet one. Threads that start
    later than this object are not counted.
    """

    def __init__(self) -> None:
        self._files: list[int] = []
        for task in _TASKS.glob("*/schedstat"):
            try:
                self._files.append(os.open(task, os.O_RDONLY))
            except OSError:  # a thread that has just ended
                continue

    def seconds(self) -> float:
        """Return the sum over the threads."""
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
