"""List the targets on one GPU, in bf16, all measured in one run, and what others published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import roofline
from sizes import PUBLISHED

from page.results import GIB, NOT_MEASURED, RunResults

# below every anchor; for either card, as their floors are nearly the same
FORWARD_GOAL_S = {"1.3B": 0.42, "14B": 2.35}
NEAR_FLOOR = 1.08  # of the floor by the measured rates, where a goal is below that floor

_NOT_FOUND = (
    "taken over from an earlier note of this project; no public page with it was found again"
)
# Times that others published for one dense bf16 forward at 480x832, 81 frames; nobody here measured
# them: network, seconds, card, software, and where a forward's time follows from.
ANCHORS = (
    ("14B", 2.57, "H200", "SGLang", _NOT_FOUND),
    (
        *("14B", 2.59, "H100", "LightX2V"),
        "README of github.com/ModelTC/LightX2V, table of 2025-12-01, one GPU: 5.18 s a step of the "
        "image-to-video model with guidance, which is two forwards",
    ),
    ("1.3B", 0.48, "not given", "SGLang", _NOT_FOUND),
    (
        *("1.3B", 0.52, "H100", "FlashDreams"),
        "benchmarks page of nvidia.github.io/flashdreams, wan21-t2v-1.3b-480p: 1040 ms a step, "
        "which with guidance is two forwards",
    ),
)


@dataclass(frozen=True)
class Target:
    """Describe a goal, and how it is read off a run.

    Attributes:
        what: is measured.
        goal: the number to reach.
        section, key: of the measurement, for the reason where it is lacking.
        measure: the number, or None.
        least: whether more is better.
        shown: format of a number.
        text: of the goal; None for the goal as ``shown``.
        others: more sections and keys that the number is made of.
        beside: what to add to a number, if anything.
    """

    what: str
    goal: float
    section: str
    key: str
    measure: Callable[[RunResults], float | None]
    least: bool = False
    shown: str = "{:.2f}x"
    text: str | None = None
    others: tuple[tuple[str, str], ...] = ()
    beside: Callable[[RunResults], str] = lambda _: ""

    def cell(self, results: RunResults) -> str:
        """Write what was measured and whether that is the goal, or why nothing was."""
        value = self.measure(results)
        if value is None:
            sources = ((self.section, self.key), *self.others)
            reasons = [results.why(*source) for source in sources]
            return next((reason for reason in reasons if reason != NOT_MEASURED), NOT_MEASURED)
        reached = value >= self.goal if self.least else value <= self.goal
        verdict = "reached" if reached else "**missed**"
        # bytes are shown in GiB too
        shown = self.shown.format(value, value * 1e9 / GIB) + results.mark(self.section, self.key)
        return f"{shown}, {verdict}{self.beside(results)}"


def share_of_copy(results: RunResults, entry: dict[str, Any], direction: str) -> float | None:
    """Return the bytes/s that an operator must move, over those of a copy in the same run."""
    limits, timed = results.measured, entry.get(direction)
    milliseconds = None if timed is None else timed["ms"].get("triton")
    if limits is None or milliseconds is None:
        return None
    return float(entry["bytes"][direction] / (milliseconds / 1e3) / limits.bandwidth)


def _least_share(direction: str) -> Callable[[RunResults], float | None]:
    """Return what reads the least share of the operators that are bound by memory."""

    def measure(results: RunResults) -> float | None:
        shares = [
            share_of_copy(results, entry, direction)
            for entry in results.entries("ops").values()
            if "op" in entry
            and entry["op"] != "dual_timestep_embedding"
            and entry["bytes"]["forward"] > 2**24
        ]
        known = [share for share in shares if share is not None]
        return min(known) if known and len(known) == len(shares) else None

    return measure


def measured_floor_s(results: RunResults, network: str) -> float | None:
    """Return the seconds of a forward whose kernels all run at the rates of this run, or None.

    Self-attention takes the fastest kernel's rate at this shape and cross-attention its own, if it
    was measured; products take the rate of a large one, everything else the bandwidth of a copy.
    """
    limits, rates = results.measured, {}
    for component, keys in ((roofline.SELF_ATTENTION, "self"), (roofline.CROSS_ATTENTION, "text")):
        entry = results.entry("attention", f"{network} {keys} forward")
        times = entry.get("ms", {}) if isinstance(entry, dict) else {}
        if times:
            rates[component] = float(entry["flops"]) / min(times.values()) * 1e3
    if limits is None or roofline.SELF_ATTENTION not in rates:
        return None
    return roofline.forward_floor_s(PUBLISHED[network], limits, rates)


def _forward(network: str) -> tuple[Target, Target]:
    """Return the goal of a forward, and the one that counts where the rates rule that out."""
    goal, section = FORWARD_GOAL_S[network], f"forward_{network.lower()}"

    def over_floor(results: RunResults) -> float | None:
        floor, ours = measured_floor_s(results, network), results.number(section, "ours")
        return None if floor is None or ours is None else ours / 1e3 / floor

    def impossible(results: RunResults) -> str:
        floor, ours = measured_floor_s(results, network), results.number(section, "ours")
        if floor is None or ours is None or floor <= goal or ours / 1e3 <= goal:
            return ""
        return (
            f" (impossible at the measured rates, whose floor is {floor:.3f} s: the next row "
            "counts)"
        )

    def possible(results: RunResults) -> str:
        floor = measured_floor_s(results, network)
        if floor is None:
            return ""
        note = "" if floor > goal else f": {goal:g} s is possible, the row before counts"
        return f" (floor {floor:.3f} s{note})"

    near = Target(
        f"{network}, one forward / its floor by the rates measured in the run",
        NEAR_FLOOR,
        section,
        "ours",
        over_floor,
        text=f"≤ {NEAR_FLOOR:g}x if {goal:g} s is below it",
        others=(("attention", f"{network} self forward"), ("limits", "")),
        beside=possible,
    )
    return _seconds(f"{network}, one forward", goal, section, "ours", impossible), near


def _seconds(
    what: str,
    goal: float,
    section: str,
    key: str,
    beside: Callable[[RunResults], str] = lambda _: "",
) -> Target:
    def measure(results: RunResults) -> float | None:
        milliseconds = results.number(section, key)
        return None if milliseconds is None else milliseconds / 1e3

    text = f"≤ {goal:g} s"
    return Target(what, goal, section, key, measure, False, "{:.3f} s", text, beside=beside)


def _ratio(
    what: str, goal: float, section: str, over: str, under: str = "ours", field: str = "ms"
) -> Target:
    """Return a goal for a ratio, of times one to be exceeded, of memory one not to be."""
    least = field == "ms"
    measure: Callable[[RunResults], float | None] = lambda r: r.ratio(section, over, under, field)  # noqa: E731
    text = f"{'≥' if least else '≤'} {goal:g}x"
    return Target(what, goal, section, over if least else under, measure, least, text=text)


def _share(what: str, goal: float, direction: str) -> Target:
    measure, text = _least_share(direction), f"≥ {goal:.0%}"
    return Target(what, goal, "ops", "", measure, True, "{:.0%}", text)


def _peak_gb(results: RunResults) -> float | None:
    found = results.number("sampling_14b", "ours NFE 4", "peak_bytes")
    return None if found is None else found / 1e9


_COMPILED = "ours, beside diffusers + compile"
_PEERS = "peers' formulation"
_SMALL, _LARGE = (_forward(network) for network in FORWARD_GOAL_S)
_PEAK = "14B, peak memory of sampling at 4 steps"
_PRETRAIN = "1.3B pretrain step, LoRA, checkpointing: peers' time / ours"
_PRETRAIN_PEAK = "the same step: our peak memory / peers'"
TARGETS = (
    _share("fused operators, forward: least share of the measured copy bandwidth", 0.85, "forward"),
    _share("fused operators, backward: likewise", 0.75, "backward"),
    *_SMALL,
    _ratio("1.3B, diffusers eager / ours", 1.8, "forward_1.3b", "diffusers"),
    _ratio(
        "1.3B, diffusers + compile / ours", 1.3, "forward_1.3b", "diffusers + compile", _COMPILED
    ),
    *_LARGE,
    _seconds("14B, 4 steps, transformer time", 10.5, "sampling_14b", "ours NFE 4"),
    _seconds("14B, 50 steps, transformer time", 130.0, "sampling_14b", "ours NFE 50"),
    Target(
        *(_PEAK, 40, "sampling_14b", "ours NFE 4", _peak_gb),
        shown="{:.1f} GB ({:.1f} GiB)",
        text="≤ 40 GB",
    ),
    _ratio(_PRETRAIN, 1.8, "pretrain_1.3b", _PEERS),
    _ratio(_PRETRAIN_PEAK, 0.5, "pretrain_1.3b", "ours", _PEERS, "peak_bytes"),
)
