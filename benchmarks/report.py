"""Write the table of a run, and what its gates say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gates import Judgment
from layout import table as write
from workloads import Line, figure

_HEADINGS = ("benchmark", "against", "ms", "rate", "limit", "peak MiB", "ratio", "gate")
SLOWEST = 3


def table(lines: Sequence[Line], judgments: Iterable[Judgment]) -> str:
    """Write a line for each benchmark and peer.

    ``rate`` is what moved or was multiplied per second; ``limit`` is the time that the measured
    limits of the machine allow as a share of the time taken; ``ratio`` is how many times as long
    (or as much memory) the peer needs.
    """
    by_name = {j.name: j for j in judgments}
    written = []
    for line in lines:
        peak = "" if line.peak is None else f"{line.peak / 2**20:.1f}"
        share = "" if line.of_limit is None else f"{line.of_limit:.0%}"
        own, name = (f"{line.milliseconds:.3f}", _rate(line), share, peak), line.name
        for peer, ratio in line.ratios.items():
            judgment = by_name[figure(line.name, peer)]
            marks = ("*" if line.again else "") + ("~" if judgment.busy else "")
            written.append((name, peer, *own, f"{ratio:.2f}x{marks}", _gate(judgment)))
            name, own = "", ("",) * 4
    text = "\n".join(write(_HEADINGS, written, right=2, padded=True))
    if any(line.again for line in lines):
        text += "\n* measured once more, because it was below its gate"
    if any(line.busy for line in lines):
        text += (
            "\n~ the machine was busy with other work throughout: not to be relied on, and never "
            "made a gate"
        )
    return text


def summary(device_class: str, judgments: Sequence[Judgment], not_run: Sequence[str]) -> str:
    """Say how many gates hold, what is missed, with the slowest lines, and what was not checked."""
    gated = [j for j in judgments if j.gate is not None]
    missed = [j for j in gated if j.missed]
    text = [f"{device_class}: {len(gated) - len(missed)} of {len(gated)} gates hold"]
    if len(gated) < len(judgments):
        without = len(judgments) - len(gated)
        text.append(f"{without} ratios have no gate on {device_class}: nothing was checked there")
    text += [f"NOT RUN, though it has a gate: {name}" for name in not_run]
    for j in missed:
        advice = "; the machine was busy: run it again with nothing beside it" if j.busy else ""
        text.append(f"MISSED: {j.name} is {j.ratio:.2f}x, the gate is {j.gate:.2f}x{advice}")
    if missed:
        text.append(f"the {SLOWEST} slowest lines against their gates:")
        slowest = sorted(gated, key=lambda j: j.margin)[:SLOWEST]
        text += [f"  {j.name}: {j.ratio:.2f}x, {100 * j.margin:.0f} % of its gate" for j in slowest]
    return "\n".join(text)


def _rate(line: Line) -> str:
    if line.teraflops_per_second is not None:
        return f"{line.teraflops_per_second:.3f} TFLOP/s"
    return "" if line.gigabytes_per_second is None else f"{line.gigabytes_per_second:.1f} GB/s"


def _gate(judgment: Judgment) -> str:
    if judgment.gate is None:
        return "no gate"
    return f"{judgment.gate:.2f} {'MISSED' if judgment.missed else 'ok'}"
