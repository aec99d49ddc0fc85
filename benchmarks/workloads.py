"""Describe what a benchmark is, and measure one: ours against its peers, in turns."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from roofline import LimitMeter
from timing import OURS, Interleaved, Step, TimeBudget, difference, peak_memory

LAYERS = ("ops", "model", "methods", "sampling", "causal", "loading")
# in the name of a peer that `--no-compile` and `--quick` leave out: it takes minutes to build
COMPILE = "compile"
MEMORY = ", memory"  # after a peer's name: the ratio of peak memory instead of time
_HERE = Path(__file__).resolve().parent
# Ours against a peer, relative to the largest element: the same mathematics, other orders of
# summation.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Place:
    """Describe where benchmarks are built.

    Attributes:
        device: that they run on.
        folder: an empty one for files.
        compiler: torch.compile's backend for compiled peers.
    """

    device: torch.device
    folder: Path
    compiler: str = "inductor"


@dataclass(frozen=True)
class Contest:
    """Hold a benchmark that is built, but for its steps, and what one step must do.

    Attributes:
        makers: make the steps of ours (:data:`timing.OURS`) and of its peers. Each step runs once
            and returns what is compared with the others' before anything is timed.
        bytes: that a step must move at least.
        flops: of a step's matrix products.
    """

    makers: Mapping[str, Callable[[], Step]]
    bytes: float = 0
    flops: float = 0


@dataclass(frozen=True)
class Workload:
    """Describe a benchmark that is not yet built.

    Attributes:
        name: ``layer/what/shape/...``, as ``gates.toml`` spells it.
        peers: alternatives that ours is timed against.
        build: makes the contest; in the order of the table, and only for what is run.
        device: type of the device that its shapes are for.
        dtype: of its products, and of the tolerance.
        quick: whether ``--quick`` runs it.
        memory: whether the ratio of peak memory is a figure of its own, which can be gated.
        min_rounds: of a step so long that a budget of seconds means little.
        kernels: whether a step is a few kernels, which a GPU replays as a graph.
    """

    name: str
    peers: tuple[str, ...]
    build: Callable[[Place], Contest]
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    quick: bool = False
    memory: bool = False
    min_rounds: int = 5
    kernels: bool = False

    def __str__(self) -> str:
        return self.name

    def figures(self, compiled: bool = True) -> list[str]:
        """Return the names of the ratios that it gives, as ``gates.toml`` spells them."""
        kinds = ("", MEMORY) if self.memory else ("",)
        return [figure(self.name, p + kind) for p in self.opponents(compiled) for kind in kinds]

    def opponents(self, compiled: bool) -> list[str]:
        """Return the peers of a run, with or without the compiled ones."""
        return [peer for peer in self.peers if compiled or COMPILE not in peer]


@dataclass(frozen=True)
class Line:
    """Hold what was measured of a benchmark.

    Attributes:
        name: of the workload.
        milliseconds: of a step of ours.
        gigabytes_per_second, teraflops_per_second: what it moved and multiplied, None where nothing
            is counted.
        of_limit: the time that the measured limits of the machine allow, as a share of ours.
        peak: bytes that a step of ours needs beyond its inputs and weights, or None.
        ratios: how many times as long, or as much memory, each peer needs.
        rounds: that were measured.
        again: whether it was measured once more, because a gate was missed.
        busy: whether the machine was too busy with other work for figures to be relied on.
    """

    name: str
    milliseconds: float
    gigabytes_per_second: float | None
    teraflops_per_second: float | None
    of_limit: float | None
    peak: int | None
    ratios: dict[str, float]
    rounds: int
    again: bool = False
    busy: bool = False

    def lower(self, other: Line) -> Line:
        """Return this line with the lower one of each ratio, as busy as the busier of both."""
        ratios = {peer: min(ratio, other.ratios[peer]) for peer, ratio in self.ratios.items()}
        return replace(
            self, ratios=ratios, again=self.again or other.again, busy=self.busy or other.busy
        )


def figure(name: str, peer: str) -> str:
    """Return the name of a benchmark's ratio to a peer, as ``gates.toml`` spells it."""
    return f"{name} vs {peer}"


def catalogue() -> list[Workload]:
    """List every benchmark for every device; nothing is built."""
    files = [file for layer in LAYERS for file in sorted((_HERE / layer).glob("bench_*.py"))]
    modules = (importlib.import_module(f"{file.parent.name}.{file.stem}") for file in files)
    found = [workload for module in modules for workload in module.WORKLOADS]
    names = [w.name for w in found]
    assert len(set(names)) == len(names), "two benchmarks have the same name"
    return found


def measure(
    workload: Workload,
    place: Place,
    compiled: bool,
    meter: LimitMeter,
    budget: TimeBudget,
    gates: Mapping[str, float],
    benchmark: Any = None,
) -> Line:
    """Build, compare, warm up and time a workload; twice as long once more if it misses a gate.

    Args:
        workload: to measure.
        place: where it is built.
        compiled: whether compiled peers take part.
        meter: of the device's limits.
        budget: for the rounds.
        gates: least ratios by :func:`figure`.
        benchmark: the fixture of pytest-benchmark, which records ours in the first measurement.

    Raises:
        ValueError: a peer's result is not ours.
    """
    contest = workload.build(place)
    steps = {name: contest.makers[name]() for name in (OURS, *workload.opponents(compiled))}
    _compare(workload, steps)
    memory = {
        name: peak_memory(step, place.device) if workload.memory or name == OURS else None
        for name, step in steps.items()
    }
    rounds = Interleaved(steps, place.device, workload.kernels)
    budget = TimeBudget(budget.seconds, min(budget.min_rounds, workload.min_rounds))
    count = rounds.remaining_rounds(budget)
    if benchmark is None:
        rounds.run(count)
    else:
        benchmark.pedantic(rounds.time_ours, setup=rounds.time_peers, rounds=count)
    rounds.wait_for_quiet(budget)
    result = partial(_line, workload, contest, rounds, meter, memory)
    line = result()
    held = (ratio >= gates.get(figure(line.name, p), 0.0) for p, ratio in line.ratios.items())
    if not all(held):  # NaN holds nothing
        # a miss that a moment of the machine explains does not last
        rounds.run(2 * len(rounds.times[OURS]))
        rounds.wait_for_quiet(budget)
        line = replace(result(), again=True)
    line = replace(line, busy=rounds.busy(budget))
    if benchmark is not None:
        benchmark.extra_info.update(asdict(line), calls=rounds.calls[OURS])
    return line


def _compare(workload: Workload, steps: Mapping[str, Step]) -> None:
    """Raise for a result that differs from ours: what is wrong is not timed."""
    ours = steps[OURS]()
    for name, step in steps.items():
        if name == OURS:
            continue
        distance, allowed = difference(ours, step()), TOLERANCES[workload.dtype]
        if not distance <= allowed:  # NaN too
            raise ValueError(
                f"{workload.name}: ours and {name} differ by {distance:.1e}, allowed are "
                f"{allowed:.0e}"
            )


def _line(
    workload: Workload,
    contest: Contest,
    rounds: Interleaved,
    meter: LimitMeter,
    memory: Mapping[str, int | None],
) -> Line:
    ratios = {}
    for peer in rounds.peers:
        ratios[peer] = rounds.ratio(peer)
        ours, theirs = memory[OURS], memory[peer]
        if workload.memory and ours and theirs:
            ratios[peer + MEMORY] = theirs / ours
    seconds = rounds.seconds(OURS)
    return Line(
        name=workload.name,
        milliseconds=1e3 * seconds,
        gigabytes_per_second=contest.bytes / seconds / 1e9 if contest.bytes else None,
        teraflops_per_second=contest.flops / seconds / 1e12 if contest.flops else None,
        of_limit=meter.floor_s(contest.bytes, contest.flops, workload.dtype) / seconds
        if contest.bytes or contest.flops
        else None,
        peak=memory[OURS],
        ratios=ratios,
        rounds=len(rounds.times[OURS]),
    )
