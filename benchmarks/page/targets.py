"""List the targets on one GPU, in bf16, all measured in one run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import roofline
from layout import table
from sizes import PUBLISHED

from page.causal import GOAL_FPS, GOAL_STEPS, key_of
from page.causal import SECTION as CAUSAL_SECTION
from page.results import GIB, NOT_MEASURED, RunResults

# below every anchor; for either card, as their floors are nearly the same
FORWARD_GOAL_S = {"1.3B": 0.42, "14B": 2.35}
NEAR_FLOOR = 1.08  # of the floor by the measured rates, where a goal is below that floor

Measure = Callable[[RunResults], float | None]
Note = Callable[[RunResults], str]
Target = tuple[str, str, Note]  # what is measured, the goal, the cell of a run


def table_of(devices: list[RunResults]) -> list[str]:
    """Make a line for each goal, a column for each device."""
    lines = [[what, goal, *(cell(results) for results in devices)] for what, goal, cell in TARGETS]
    return table(["what", "target", *(results.name for results in devices)], lines)


def _cell(
    measure: Measure,
    goal: float,
    shown: str,
    *sources: tuple[str, str],
    least: bool = False,
    beside: Note = lambda _: "",
) -> Note:
    """Return what writes a number and whether it is the goal, or why the number is lacking.

    Args:
        measure: the number, or None.
        goal: to be reached from above, or from below with ``least``.
        shown: format of the number.
        sources: sections and keys that the number is made of; the first says what is extrapolated.
        least: whether more is better.
        beside: what to add to a number.
    """

    def write(results: RunResults) -> str:
        value = measure(results)
        if value is None:
            reasons = (results.why(*source) for source in sources)
            return next((reason for reason in reasons if reason != NOT_MEASURED), NOT_MEASURED)
        verdict = "reached" if (value >= goal if least else value <= goal) else "**missed**"
        return f"{shown.format(value)}{results.mark(*sources[0])}, {verdict}{beside(results)}"

    return write


def share_of_copy(results: RunResults, entry: dict[str, Any], direction: str) -> float | None:
    """Return the bytes/s that an operator must move, over those of a copy in the same run."""
    limits, timed = results.limits, entry.get(direction)
    milliseconds = None if timed is None else timed["ms"].get("triton")
    if limits is None or milliseconds is None:
        return None
    return float(entry["bytes"][direction] / (milliseconds / 1e3) / limits.bandwidth)


def _least_share(direction: str, results: RunResults) -> float | None:
    """Return the least share of the operators that are bound by memory, if all were timed."""
    shares = [
        share_of_copy(results, entry, direction)
        for entry in results.entries("ops").values()
        if "op" in entry
        and entry["op"] != "dual_timestep_embedding"
        and entry["bytes"]["forward"] > 2**24
    ]
    known = [share for share in shares if share is not None]
    return min(known) if known and len(known) == len(shares) else None


def measured_floor_s(results: RunResults, network: str) -> float | None:
    """Return the seconds of a forward whose kernels all run at the rates of this run, or None.

    Self-attention takes the fastest kernel's rate at this shape and cross-attention its own, if it
    was measured; products take the rate of a large one, everything else the bandwidth of a copy.
    """
    limits, rates = results.limits, {}
    for component, keys in ((roofline.SELF_ATTENTION, "self"), (roofline.CROSS_ATTENTION, "text")):
        entry = results.entry("attention", f"{network} {keys} forward", {})
        if times := entry.get("ms", {}):
            rates[component] = float(entry["flops"]) / min(times.values()) * 1e3
    if limits is None or roofline.SELF_ATTENTION not in rates:
        return None
    return roofline.forward_floor_s(PUBLISHED[network], limits, rates)


def _forward(network: str) -> tuple[Target, Target]:
    """Return the goal of a forward, and the one that counts where the rates rule that out."""
    goal, source = FORWARD_GOAL_S[network], (f"forward_{network.lower()}", "ours")

    def over_floor(results: RunResults) -> float | None:
        floor, ours = measured_floor_s(results, network), results.number(*source)
        return None if floor is None or ours is None else ours / 1e3 / floor

    def impossible(results: RunResults) -> str:
        floor, ours = measured_floor_s(results, network), results.number(*source)
        if floor is None or ours is None or floor <= goal or ours / 1e3 <= goal:
            return ""
        why = f"impossible at the measured rates, whose floor is {floor:.3f} s"
        return f" ({why}: the next row counts)"

    def possible(results: RunResults) -> str:
        floor = measured_floor_s(results, network)
        if floor is None:
            return ""
        note = "" if floor > goal else f": {goal:g} s is possible, the row before counts"
        return f" (floor {floor:.3f} s{note})"

    sources = (source, ("attention", f"{network} self forward"), ("limits", ""))
    near = (
        f"{network}, one forward / its floor by the rates measured in the run",
        f"≤ {NEAR_FLOOR:g}x if {goal:g} s is below it",
        _cell(over_floor, NEAR_FLOOR, "{:.2f}x", *sources, beside=possible),
    )
    return _seconds(f"{network}, one forward", goal, *source, impossible), near


def _seconds(what: str, goal: float, section: str, key: str, beside: Note = lambda _: "") -> Target:
    def measure(results: RunResults) -> float | None:
        milliseconds = results.number(section, key)
        return None if milliseconds is None else milliseconds / 1e3

    cell = _cell(measure, goal, "{:.3f} s", (section, key), beside=beside)
    return what, f"≤ {goal:g} s", cell


def _ratio(
    what: str, goal: float, section: str, over: str, under: str = "ours", field: str = "ms"
) -> Target:
    """Return a goal for a ratio, of times one to be exceeded, of memory one not to be."""

    def measure(results: RunResults) -> float | None:
        return results.ratio(section, over, under, field)

    least = field == "ms"
    cell = _cell(measure, goal, "{:.2f}x", (section, over if least else under), least=least)
    return what, f"{'≥' if least else '≤'} {goal:g}x", cell


def _share(what: str, goal: float, direction: str) -> Target:
    cell = _cell(partial(_least_share, direction), goal, "{:.0%}", ("ops", ""), least=True)
    return what, f"≥ {goal:.0%}", cell


def _peak(results: RunResults) -> str:
    measured = results.number("sampling_14b", "ours NFE 4", "peak_bytes")
    gib = 0.0 if measured is None else measured / GIB
    gigabytes = None if measured is None else measured / 1e9
    shown, source = f"{{:.1f}} GB ({gib:.1f} GiB)", ("sampling_14b", "ours NFE 4")
    return _cell(lambda _: gigabytes, 40.0, shown, source)(results)


def _frames_per_second() -> Target:
    source = (CAUSAL_SECTION, key_of("ours"))

    def measure(results: RunResults) -> float | None:
        return results.number(*source, "fps")

    cell = _cell(measure, GOAL_FPS, "{:.1f}/s", source, least=True)
    what = f"1.3B causal, {GOAL_STEPS} steps for each chunk: frames in a second of transformer time"
    return what, f"≥ {GOAL_FPS:g}/s", cell


_PEERS, _COMPILED = "peers' formulation", "diffusers + compile"
_OPTIONAL = (
    "14B with fp8 linears and fp8/int8 attention: a further factor, at ≤ 2 % relative output"
)
TARGETS: tuple[Target, ...] = (
    _share("fused operators, forward: least share of the measured copy bandwidth", 0.85, "forward"),
    _share("fused operators, backward: likewise", 0.75, "backward"),
    *_forward("1.3B"),
    _ratio("1.3B, diffusers eager / ours", 1.8, "forward_1.3b", "diffusers"),
    _ratio(
        *("1.3B, diffusers + compile / ours", 1.3, "forward_1.3b"),
        *(_COMPILED, f"ours, beside {_COMPILED}"),
    ),
    *_forward("14B"),
    _seconds("14B, 4 steps, transformer time", 10.5, "sampling_14b", "ours NFE 4"),
    _seconds("14B, 50 steps, transformer time", 130.0, "sampling_14b", "ours NFE 50"),
    ("14B, peak memory of sampling at 4 steps", "≤ 40 GB", _peak),
    _frames_per_second(),
    _ratio(
        *("1.3B pretrain step, LoRA, checkpointing: peers' time / ours", 1.8),
        *("pretrain_1.3b", _PEERS),
    ),
    _ratio(
        *("the same step: our peak memory / peers'", 0.5),
        *("pretrain_1.3b", "ours", _PEERS, "peak_bytes"),
    ),
    (f"{_OPTIONAL} difference", "≥ 1.3x (optional)", lambda _: "not built"),
)
