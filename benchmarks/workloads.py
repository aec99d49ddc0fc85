"""What a benchmark is, and how one is measured: ours against its peers, in turns, into one line of
the table.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from interleave import OURS, Budget, Interleaved, Step, difference, peak_memory
from limits import Limits

LAYERS = ("ops", "model", "methods", "sampling", "loading", "commands")
# a peer that `--no-compile` and `--quick` leave out: on a CPU it takes minutes to build
COMPILED = "compile"
MEMORY = ", memory"  # after a peer's name: the ratio of peak memory instead of time
# Ours against a peer, relative to the largest element: the same mathematics, other orders of
# summation.
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Setting:
    """Where benchmarks are built: the device, whether compiled peers take part, and an empty folder
    for files.
    """

    device: torch.device
    compile: bool
    folder: Path


@dataclass(frozen=True)
class Contest:
    """A benchmark, built: steps under the names of :class:`Workload`'s peers and ours, and what one
    step must do.

    Attributes:
        steps: each runs once and returns what is compared with the others' before anything is
            timed.
        bytes: that a step must move at least.
        flops: of a step's matrix products.
    """

    steps: Mapping[str, Step]
    bytes: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Workload:
    """A benchmark, not yet built.

    Attributes:
        name: ``layer/what/shape/...``, as ``gates.toml`` spells it.
        peers: alternatives that ours is timed against.
        build: makes the contest; in the order of the table, and only for what is run.
        device: type of the device that its shapes are for.
        dtype: of its products, and of the tolerance.
        quick: whether ``--quick`` runs it.
        goals: ratios to reach, by peer; they are printed beside the gates and gate nothing.
        memory: whether the ratio of peak memory is a figure of its own, which can be gated.
        min_rounds: of a step so long that a budget of seconds means little.
    """

    name: str
    peers: tuple[str, ...]
    build: Callable[[Setting], Contest]
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    quick: bool = False
    goals: Mapping[str, float] = field(default_factory=dict)
    memory: bool = False
    min_rounds: int = 5

    def __str__(self) -> str:
        return self.name

    def figures(self, compiled: bool = True) -> list[str]:
        """Names of the ratios that it gives, as ``gates.toml`` spells them."""
        peers = [p for p in self.peers if compiled or p != COMPILED]
        kinds = ("", MEMORY) if self.memory else ("",)
        return [figure(self.name, peer + kind) for peer in peers for kind in kinds]


@dataclass(frozen=True)
class Line:
    """A benchmark, measured.

    Attributes:
        name: of the workload.
        milliseconds: of a step of ours.
        gigabytes_per_second, teraflops_per_second: what it moved and multiplied, None where nothing
            is counted.
        of_limit: the time that the measured limits of the machine would allow, as a fraction of
            ours.
        peak: bytes that a step of ours needs beyond its inputs and weights, or None.
        ratios: how many times as long, or as much memory, each peer needs.
        goals: ratios to reach, by peer.
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
    goals: dict[str, float]
    rounds: int
    again: bool = False
    busy: bool = False

    def lower(self, other: Line) -> Line:
        """This line with the lower one of each ratio, and as busy as the busier one of both."""
        ratios = {peer: min(ratio, other.ratios[peer]) for peer, ratio in self.ratios.items()}
        return replace(
            self, ratios=ratios, again=self.again or other.again, busy=self.busy or other.busy
        )


def figure(name: str, peer: str) -> str:
    """The name of a ratio: of a benchmark and a peer, as ``gates.toml`` spells it."""
    return f"{name} vs {peer}"


def catalogue() -> list[Workload]:
    """Every benchmark there is, for every device; nothing is built."""
    found = [
        w for layer in LAYERS for w in importlib.import_module(f"{layer}.bench_{layer}").WORKLOADS
    ]
    names = [w.name for w in found]
    assert len(set(names)) == len(names), "two benchmarks have the same name"
    return found


def measure(
    workload: Workload,
    setting: Setting,
    limits: Limits,
    budget: Budget,
    gates: Mapping[str, float],
    benchmark: Any = None,
) -> Line:
    """Build, compare, warm up and time a workload; once more, for twice as many rounds, if a ratio
    misses its gate.

    Args:
        gates: least ratios by :func:`figure`.
        benchmark: the fixture of pytest-benchmark, which records ours in the first measurement.

    Raises:
        ValueError: a peer's result is not ours.
    """
    contest = workload.build(setting)
    expected = {OURS, *(p for p in workload.peers if setting.compile or p != COMPILED)}
    assert set(contest.steps) == expected, (
        f"{workload.name} built {sorted(contest.steps)}, not {sorted(expected)}"
    )
    _compare(workload, contest)
    memory = {
        name: peak_memory(step, setting.device) if workload.memory or name == OURS else None
        for name, step in contest.steps.items()
    }
    rounds = Interleaved(contest.steps, setting.device)
    budget = Budget(budget.seconds, min(budget.min_rounds, workload.min_rounds))
    count = rounds.remaining_rounds(budget)
    if benchmark is None:
        rounds.run(count)
    else:
        benchmark.pedantic(rounds.time_ours, setup=rounds.time_peers, rounds=count)
    rounds.wait_for_quiet(budget)
    line = _line(workload, contest, rounds, limits, memory)
    if not all(
        ratio >= gates.get(figure(line.name, peer), 0.0) for peer, ratio in line.ratios.items()
    ):
        # a miss that a moment of the machine explains does not last
        rounds.run(2 * len(rounds.times[OURS]))
        rounds.wait_for_quiet(budget)
        line = replace(_line(workload, contest, rounds, limits, memory), again=True)
    line = replace(line, busy=rounds.busy(budget))
    if benchmark is not None:
        benchmark.extra_info.update(asdict(line), calls=rounds.calls[OURS])
    return line


def _compare(workload: Workload, contest: Contest) -> None:
    """What is wrong is not timed."""
    ours = contest.steps[OURS]()
    for name, step in contest.steps.items():
        if name == OURS:
            continue
        distance, allowed = difference(ours, step()), _TOLERANCES[workload.dtype]
        if not distance <= allowed:  # NaN too
            raise ValueError(
                f"{workload.name}: ours and {name} differ by {distance:.1e}, allowed are "
                f"{allowed:.0e}"
            )


def _line(
    workload: Workload,
    contest: Contest,
    rounds: Interleaved,
    limits: Limits,
    memory: Mapping[str, int | None],
) -> Line:
    ratios = {}
    for peer in rounds.peers:
        ratios[peer] = rounds.ratio(peer)
        ours, theirs = memory[OURS], memory[peer]
        if workload.memory and ours and theirs:
            ratios[peer + MEMORY] = theirs / ours
    seconds = rounds.seconds(OURS)
    shortest = limits.shortest_time(contest.bytes, contest.flops, workload.dtype)
    return Line(
        name=workload.name,
        milliseconds=1e3 * seconds,
        gigabytes_per_second=contest.bytes / seconds / 1e9 if contest.bytes else None,
        teraflops_per_second=contest.flops / seconds / 1e12 if contest.flops else None,
        of_limit=shortest / seconds if shortest else None,
        peak=memory[OURS],
        ratios=ratios,
        goals={peer: goal for peer, goal in workload.goals.items() if peer in ratios},
        rounds=len(rounds.times[OURS]),
    )
