"""The targets on one H200, in bf16, all measured in one run: goals to chase, reported whatever comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpu.results import GIB, Results

LARGE = 1000  # D from which an operator is bound by memory; the timestep embedding is not, and has no target


@dataclass(frozen=True)
class Target:
    """A goal, and how it is read off a run.

    Attributes:
        what: is measured.
        goal: as text.
        measure: the number, or None.
        reached: whether a number is good enough.
        shown: how a number is written.
        source: section and key, for the reason where there is no number.
    """

    what: str
    goal: str
    measure: Callable[[Results], float | None]
    reached: Callable[[float], bool]
    shown: Callable[[float], str]
    source: tuple[str, str]

    def cell(self, results: Results) -> str:
        """What was measured and whether that is the goal, or why nothing was."""
        value = self.measure(results)
        if value is None:
            return results.why(*self.source)
        marked = " (extrapolated)" if (results.entry(*self.source) or {}).get("extrapolated") else ""
        return f"{self.shown(value)}{marked}, {'reached' if self.reached(value) else '**missed**'}"


def share_of_copy(results: Results, entry: dict[str, Any], direction: str) -> float | None:
    """Bytes that an operator must move per second, over those of a copy in the same run."""
    limits, timed = results.limits, entry.get(direction)
    milliseconds = None if timed is None else timed["ms"].get("triton")
    if limits is None or milliseconds is None:
        return None
    return float(entry["bytes"][direction] / (milliseconds / 1e3) / limits.bandwidth)


def fused_operators(results: Results) -> dict[str, dict[str, Any]]:
    """The cases that are bound by memory: the fused operators at the models' sizes."""
    entries = results.entries("ops")
    return {
        name: entry
        for name, entry in entries.items()
        if "op" in entry and entry["op"] != "dual_timestep_embedding" and entry["bytes"]["forward"] > 2**24
    }


def _least_share(direction: str) -> Callable[[Results], float | None]:
    def measure(results: Results) -> float | None:
        shares = [share_of_copy(results, entry, direction) for entry in fused_operators(results).values()]
        known = [share for share in shares if share is not None]
        return min(known) if known and len(known) == len(shares) else None

    return measure


def _seconds(what: str, goal: float, section: str, key: str = "ours") -> Target:
    return Target(
        what,
        f"≤ {goal:g} s",
        lambda r: None if (ms := r.number(section, key)) is None else ms / 1e3,
        lambda s: s <= goal,
        lambda s: f"{s:.3f} s",
        (section, key),
    )


def _ratio(
    what: str, goal: float, section: str, over: str, under: str = "ours", field: str = "ms", most: bool = False
) -> Target:
    return Target(
        what,
        f"{'≤' if most else '≥'} {goal:g}x",
        lambda r: r.ratio(section, over, under, field),
        (lambda x: x <= goal) if most else (lambda x: x >= goal),
        lambda x: f"{x:.2f}x",
        (section, under if most else over),
    )


def _share(what: str, goal: float, direction: str) -> Target:
    measure = _least_share(direction)
    return Target(what, f"≥ {goal:.0%}", measure, lambda s: s >= goal, lambda s: f"{s:.0%}", ("ops", ""))


_COMPILED = "ours, beside diffusers + compile"
_PEERS = "peers' formulation"
TARGETS = (
    _share("fused operators, forward: least share of the measured copy bandwidth", 0.85, "forward"),
    _share("fused operators, backward: likewise", 0.75, "backward"),
    _seconds("1.3B, one forward", 0.45, "forward_1.3b"),
    _ratio("1.3B, diffusers eager / ours", 1.8, "forward_1.3b", "diffusers"),
    _ratio("1.3B, diffusers + compile / ours", 1.3, "forward_1.3b", "diffusers + compile", _COMPILED),
    _seconds("14B, one forward", 2.6, "forward_14b"),
    _seconds("14B, 4 steps, transformer time", 10.5, "sampling_14b", "ours NFE 4"),
    _seconds("14B, 50 steps, transformer time", 130.0, "sampling_14b", "ours NFE 50"),
    Target(
        "14B, peak memory of sampling at 4 steps",
        "≤ 40 GB",
        lambda r: None if (b := r.number("sampling_14b", "ours NFE 4", "peak_bytes")) is None else b / 1e9,
        lambda gb: gb <= 40,
        lambda gb: f"{gb:.1f} GB ({gb * 1e9 / GIB:.1f} GiB)",
        ("sampling_14b", "ours NFE 4"),
    ),
    _ratio("1.3B pretrain step, LoRA, checkpointing: peers' time / ours", 1.8, "pretrain_1.3b", _PEERS),
    _ratio("the same step: our peak memory / peers'", 0.5, "pretrain_1.3b", "ours", _PEERS, "peak_bytes", most=True),
)
