"""The targets on one GPU, in bf16, all measured in one run: goals to chase, reported whatever comes
out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpu import roofline
from gpu.results import GIB, NOT_MEASURED, Results
from gpu.sizes import PUBLISHED

# below every anchor; for either card, as their floors are nearly the same
FORWARD_GOAL_S = {"1.3B": 0.42, "14B": 2.35}
NEAR_FLOOR = 1.08  # of the floor by the measured rates, where a goal is below that floor


@dataclass(frozen=True)
class Anchor:
    """Holds a time that others published for one dense bf16 forward at 480x832, 81 frames; nobody
    here measured it.

    Attributes:
        network: by its published name.
        seconds: of one forward.
        who: the software.
        card: that it ran on, or "not given".
        source: where the figure is, and how a forward's time follows from it.
    """

    network: str
    seconds: float
    who: str
    card: str
    source: str


_NOT_FOUND = (
    "taken over from an earlier note of this project; no public page with it was found again"
)
ANCHORS = (
    Anchor("14B", 2.57, "SGLang", "H200", _NOT_FOUND),
    Anchor(
        "14B",
        2.59,
        "LightX2V",
        "H100",
        "README of github.com/ModelTC/LightX2V, table of 2025-12-01, one GPU: 5.18 s a step of the "
        "image-to-video "
        "model with guidance, which is two forwards",
    ),
    Anchor("1.3B", 0.48, "SGLang", "not given", _NOT_FOUND),
    Anchor(
        "1.3B",
        0.52,
        "FlashDreams",
        "H100",
        "benchmarks page of nvidia.github.io/flashdreams, wan21-t2v-1.3b-480p: 1040 ms a step, "
        "which with guidance is "
        "two forwards",
    ),
)


@dataclass(frozen=True)
class Target:
    """Describes a goal, and how it is read off a run.

    Attributes:
        what: is measured.
        goal: as text.
        measure: the number, or None.
        reached: whether a number is good enough.
        shown: how a number is written.
        sources: sections and keys of what the number is made of, for the reason where there is
            none.
        beside: what to add to a number, if anything.
    """

    what: str
    goal: str
    measure: Callable[[Results], float | None]
    reached: Callable[[float], bool]
    shown: Callable[[float], str]
    sources: tuple[tuple[str, str], ...]
    beside: Callable[[Results], str] = lambda _: ""

    def cell(self, results: Results) -> str:
        """Write what was measured and whether that is the goal, or why nothing was."""
        value = self.measure(results)
        if value is None:
            reasons = [results.why(*source) for source in self.sources]
            return next((reason for reason in reasons if reason != NOT_MEASURED), NOT_MEASURED)
        marked = (
            " (extrapolated)" if (results.entry(*self.sources[0]) or {}).get("extrapolated") else ""
        )
        verdict = "reached" if self.reached(value) else "**missed**"
        return f"{self.shown(value)}{marked}, {verdict}{self.beside(results)}"


def share_of_copy(results: Results, entry: dict[str, Any], direction: str) -> float | None:
    """Return the bytes that an operator must move per second, over those of a copy in the same
    run.
    """
    limits, timed = results.measured, entry.get(direction)
    milliseconds = None if timed is None else timed["ms"].get("triton")
    if limits is None or milliseconds is None:
        return None
    return float(entry["bytes"][direction] / (milliseconds / 1e3) / limits.bandwidth)


def fused_operators(results: Results) -> dict[str, dict[str, Any]]:
    """Return the cases that are bound by memory: the fused operators at the models' sizes."""
    entries = results.entries("ops")
    return {
        name: entry
        for name, entry in entries.items()
        if "op" in entry
        and entry["op"] != "dual_timestep_embedding"
        and entry["bytes"]["forward"] > 2**24
    }


def _least_share(direction: str) -> Callable[[Results], float | None]:
    def measure(results: Results) -> float | None:
        shares = [
            share_of_copy(results, entry, direction) for entry in fused_operators(results).values()
        ]
        known = [share for share in shares if share is not None]
        return min(known) if known and len(known) == len(shares) else None

    return measure


def attention_rates(results: Results, network: str) -> dict[str, float]:
    """Return the FLOP/s of the fastest attention kernel at a network's shapes, by component; known
    ones alone.
    """
    rates = {}
    for component, keys in ((roofline.SELF_ATTENTION, "self"), (roofline.CROSS_ATTENTION, "text")):
        entry = results.entry("attention", f"{network} {keys} forward")
        times = entry.get("ms", {}) if isinstance(entry, dict) else {}
        if times:
            rates[component] = float(entry["flops"]) / min(times.values()) * 1e3
    return rates


def measured_floor_s(results: Results, network: str) -> float | None:
    """Return the seconds of a forward whose kernels all run at the rates of this run; None without
    these rates.

    Self-attention takes the fastest kernel's rate at this shape and cross-attention its own, if it
    was measured; products take the rate of a large one, everything else the bandwidth of a copy.
    """
    limits, rates = results.measured, attention_rates(results, network)
    if limits is None or roofline.SELF_ATTENTION not in rates:
        return None
    return roofline.forward_floor_s(PUBLISHED[network], limits, rates)


def _forward(network: str) -> Target:
    goal, section = FORWARD_GOAL_S[network], f"forward_{network.lower()}"

    def beside(results: Results) -> str:
        floor, ours = measured_floor_s(results, network), results.number(section, "ours")
        if floor is None or ours is None or floor <= goal or ours / 1e3 <= goal:
            return ""
        return (
            f" (impossible at the measured rates, whose floor is {floor:.3f} s: the next row "
            "counts)"
        )

    return _seconds(f"{network}, one forward", goal, section, beside=beside)


def _near_floor(network: str) -> Target:
    section = f"forward_{network.lower()}"

    def measure(results: Results) -> float | None:
        floor, ours = measured_floor_s(results, network), results.number(section, "ours")
        return None if floor is None or ours is None else ours / 1e3 / floor

    def beside(results: Results) -> str:
        floor, goal = measured_floor_s(results, network), FORWARD_GOAL_S[network]
        if floor is None:
            return ""
        return (
            f" (floor {floor:.3f} "
            f"s{'' if floor > goal else f': {goal:g} s is possible, the row before counts'})"
        )

    return Target(
        f"{network}, one forward / its floor by the rates measured in the run",
        f"≤ {NEAR_FLOOR:g}x if {FORWARD_GOAL_S[network]:g} s is below it",
        measure,
        lambda x: x <= NEAR_FLOOR,
        lambda x: f"{x:.2f}x",
        ((section, "ours"), ("attention", f"{network} self forward"), ("limits", "")),
        beside,
    )


def _seconds(
    what: str,
    goal: float,
    section: str,
    key: str = "ours",
    beside: Callable[[Results], str] = lambda _: "",
) -> Target:
    return Target(
        what,
        f"≤ {goal:g} s",
        lambda r: None if (ms := r.number(section, key)) is None else ms / 1e3,
        lambda s: s <= goal,
        lambda s: f"{s:.3f} s",
        ((section, key),),
        beside,
    )


def _ratio(
    what: str,
    goal: float,
    section: str,
    over: str,
    under: str = "ours",
    field: str = "ms",
    most: bool = False,
) -> Target:
    return Target(
        what,
        f"{'≤' if most else '≥'} {goal:g}x",
        lambda r: r.ratio(section, over, under, field),
        (lambda x: x <= goal) if most else (lambda x: x >= goal),
        lambda x: f"{x:.2f}x",
        ((section, under if most else over),),
    )


def _share(what: str, goal: float, direction: str) -> Target:
    measure = _least_share(direction)
    return Target(
        what, f"≥ {goal:.0%}", measure, lambda s: s >= goal, lambda s: f"{s:.0%}", (("ops", ""),)
    )


_COMPILED = "ours, beside diffusers + compile"
_PEERS = "peers' formulation"
TARGETS = (
    _share("fused operators, forward: least share of the measured copy bandwidth", 0.85, "forward"),
    _share("fused operators, backward: likewise", 0.75, "backward"),
    _forward("1.3B"),
    _near_floor("1.3B"),
    _ratio("1.3B, diffusers eager / ours", 1.8, "forward_1.3b", "diffusers"),
    _ratio(
        "1.3B, diffusers + compile / ours", 1.3, "forward_1.3b", "diffusers + compile", _COMPILED
    ),
    _forward("14B"),
    _near_floor("14B"),
    _seconds("14B, 4 steps, transformer time", 10.5, "sampling_14b", "ours NFE 4"),
    _seconds("14B, 50 steps, transformer time", 130.0, "sampling_14b", "ours NFE 50"),
    Target(
        "14B, peak memory of sampling at 4 steps",
        "≤ 40 GB",
        lambda r: (
            None if (b := r.number("sampling_14b", "ours NFE 4", "peak_bytes")) is None else b / 1e9
        ),
        lambda gb: gb <= 40,
        lambda gb: f"{gb:.1f} GB ({gb * 1e9 / GIB:.1f} GiB)",
        (("sampling_14b", "ours NFE 4"),),
    ),
    _ratio(
        "1.3B pretrain step, LoRA, checkpointing: peers' time / ours", 1.8, "pretrain_1.3b", _PEERS
    ),
    _ratio(
        "the same step: our peak memory / peers'",
        0.5,
        "pretrain_1.3b",
        "ours",
        _PEERS,
        "peak_bytes",
        most=True,
    ),
)
