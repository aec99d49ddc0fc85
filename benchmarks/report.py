"""The table of a run, and what its gates say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gates import Judgment
from workloads import Line, figure

_HEADINGS = ("benchmark", "ms", "rate", "limit", "peak MiB", "against", "ratio", "gate", "goal")
_RIGHT = ("ms", "rate", "limit", "peak MiB", "ratio", "gate", "goal")
SLOWEST = 3


def table(lines: Sequence[Line], judgments: Iterable[Judgment]) -> str:
    """One row per benchmark and peer.

    ``rate`` is what moved or was multiplied per second; ``limit`` is the time that the measured
    limits of the machine allow as a share of the time taken; ``ratio`` is how many times as long
    (or as much memory) the peer needs.
    """
    by_name = {j.name: j for j in judgments}
    rows = [_HEADINGS]
    for line in lines:
        first = (
            line.name,
            f"{line.milliseconds:.3f}",
            _rate(line),
            _percent(line.of_limit),
            _mebibytes(line.peak),
        )
        for peer, ratio in line.ratios.items():
            judgment, goal = by_name[figure(line.name, peer)], line.goals.get(peer)
            marks = ("*" if line.again else "") + ("~" if judgment.busy else "")
            rows.append((*first, peer, f"{ratio:.2f}x{marks}", _gate(judgment), _goal(goal, ratio)))
            first = ("", "", "", "", "")
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADINGS))]
    text = "\n".join(_row(row, widths) for row in rows)
    if any(line.again for line in lines):
        text += "\n* measured once more, because it was below its gate"
    if any(line.busy for line in lines):
        text += (
            "\n~ the machine was busy with other work throughout: not to be relied on, and never "
            "made a gate"
        )
    return text


def summary(
    device_class: str, judgments: Sequence[Judgment], not_run: Sequence[str], lines: Sequence[Line]
) -> str:
    """How many gates hold; what is missed, with the slowest lines; what was not checked at all."""
    gated = [j for j in judgments if j.gate is not None]
    missed = [j for j in gated if j.missed]
    goals = [(line.ratios[p], goal) for line in lines for p, goal in line.goals.items()]
    text = [f"{device_class}: {len(gated) - len(missed)} of {len(gated)} gates hold"]
    if len(gated) < len(judgments):
        text.append(
            f"{len(judgments) - len(gated)} ratios have no gate on {device_class}: nothing was "
            "checked there"
        )
    if goals:
        text.append(
            f"{sum(ratio >= goal for ratio, goal in goals)} of {len(goals)} goals are reached "
            "(they gate nothing)"
        )
    text += [f"NOT RUN, though it has a gate: {name}" for name in not_run]
    for j in missed:
        advice = "; the machine was busy: run it again with nothing beside it" if j.busy else ""
        text.append(f"MISSED: {j.name} is {j.ratio:.2f}x, the gate is {j.gate:.2f}x{advice}")
    if missed:
        text.append(f"the {SLOWEST} slowest lines against their gates:")
        slowest = sorted(gated, key=lambda j: j.margin)[:SLOWEST]
        text += [f"  {j.name}: {j.ratio:.2f}x, {100 * j.margin:.0f} % of its gate" for j in slowest]
    return "\n".join(text)


def _row(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [
        cell.rjust(width) if heading in _RIGHT else cell.ljust(width)
        for cell, width, heading in zip(row, widths, _HEADINGS, strict=True)
    ]
    return "  ".join(cells).rstrip()


def _rate(line: Line) -> str:
    if line.teraflops_per_second is not None:
        return f"{line.teraflops_per_second:.3f} TFLOP/s"
    return "" if line.gigabytes_per_second is None else f"{line.gigabytes_per_second:.1f} GB/s"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def _mebibytes(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 2**20:.1f}"


def _gate(judgment: Judgment) -> str:
    if judgment.gate is None:
        return "no gate"
    return f"{judgment.gate:.2f} {'MISSED' if judgment.missed else 'ok'}"


def _goal(goal: float | None, ratio: float) -> str:
    return "" if goal is None else f"{goal:.2f} {'ok' if ratio >= goal else 'short'}"
