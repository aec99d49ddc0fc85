"""Makes the tables of what a run says beside times of networks and operators: checks, launch
options, probes.
"""

from __future__ import annotations

import re
from typing import Any

from gpu import tiles
from gpu.results import NOT_MEASURED, Results, short, table
from gpu.sizes import PUBLISHED

# in the name of a check of more than one kernel
_NETWORK = re.compile(r"network|transformer", re.IGNORECASE)


def _checks(results: Results) -> dict[str, dict[str, Any]]:
    """Return the outcomes of the device checks by name."""
    return results.entry("checks", "outcomes") or {}


def alarms(results: Results) -> list[str]:
    """Say loudly which checks failed, by their outcomes and by the warnings of the file; nothing
    where none did.
    """
    warnings = [] if results.data is None else results.data.get("warnings", [])
    failed = dict(
        warning.split(": ", 1) if ": " in warning else (warning, "") for warning in warnings
    )
    failed |= {name: _problem(found) for name, found in _checks(results).items() if not found["ok"]}
    networks = [name for name in failed if _NETWORK.search(name)]
    others = [name for name in failed if name not in networks]
    lines = []
    if networks:
        listed = "; ".join(f"{name}: {short(failed[name])}" for name in networks)
        lines += [f"> **WRONG: a network computed something else on this device ({listed}).**"]
        lines += ["> **The networks' times below are not evidence of anything.**", ""]
    if others:
        lines += [
            f"> **Failed checks of kernels: {'; '.join(others)}. No time of these kernels is "
            "evidence.**",
            "",
        ]
    return lines


def checks(results: Results) -> list[str]:
    """List every check on the device: its error and its limit, failures first."""
    headings = ["check on the device", "result", "error", "limit", "error / limit"]
    found = _checks(results)
    if not found:
        return table(headings, [["all", results.why("checks", ""), "", "", ""]])
    rows = []
    for name, check in sorted(found.items(), key=lambda item: bool(item[1]["ok"])):
        error, limit = check.get("error"), check.get("limit")
        share = f"{error / limit:.2f}" if error is not None and limit else ""
        result = "ok" if check["ok"] else f"**failed**: {_problem(check)}"
        rows.append([name, result, _power(error), _power(limit), share])
    passed = sum(bool(check["ok"]) for check in found.values())
    return [f"{passed} of {len(found)} checks passed.", "", *table(headings, rows, right=2)]


def _problem(check: dict[str, Any]) -> str:
    problem = check.get("problem")
    return "over its limit" if problem is None else short(str(problem))


def _power(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def tune_rows(results: Results) -> list[str]:
    """List the row kernels with their launch options of today and with the best ones found on the
    device.
    """
    headings = [
        "row kernel, launch options",
        "today, ms",
        "of copy",
        "best, ms",
        "of copy",
        "today / best",
        "best",
    ]
    found = results.entries("tune_rows")
    found = found.get("tune_rows", found)  # the file that the tuner wrote, under one key
    limits = results.measured
    rows = []
    for name, task in found.get("tasks", {}).items():
        today, best = task.get("today_ms"), task.get("best_ms")
        if today is None or best is None:
            reason = task.get("error") or task.get("skipped") or NOT_MEASURED
            rows.append([name, short(str(reason)), "", "", "", "", ""])
            continue
        rates = (task["bytes"] / milliseconds * 1e3 for milliseconds in (today, best))
        shares = ["" if limits is None else f"{rate / limits.bandwidth:.0%}" for rate in rates]
        ratio = f"{today / best:.2f}x"
        rows.append(
            [
                name,
                f"{today:.4f}",
                shares[0],
                f"{best:.4f}",
                shares[1],
                ratio,
                short(str(task["best"])),
            ]
        )
    return table(headings, rows or [["all", results.why("tune_rows", ""), "", "", "", "", ""]])


def probes(results: Results) -> list[str]:
    """List the probes, each with its rate and its time over that of the one that it is compared
    with.
    """
    headings = ["probe", "ms", "rate", "time over", "ratio"]
    rows = []
    for name, entry in results.entries("probes").items():
        if not isinstance(entry, dict):
            continue
        milliseconds, against = results.number("probes", name), entry.get("against")
        if milliseconds is None:
            rows.append([name, results.why("probes", name), "", "", ""])
            continue
        ratio = results.ratio("probes", name, against) if against else None
        compared = "" if against is None else against.split(": ", 1)[-1]
        known = "" if ratio is None else f"{ratio:.3f}x"
        rows.append([name, f"{milliseconds:.4f}", _rate(entry, milliseconds), compared, known])
    return table(headings, rows or [["all", results.why("probes", ""), "", "", ""]])


def _rate(entry: dict[str, Any], milliseconds: float) -> str:
    if "flops" in entry:
        return f"{entry['flops'] / milliseconds / 1e9:.0f} TFLOP/s"
    return f"{entry['bytes'] / milliseconds / 1e6:.0f} GB/s" if "bytes" in entry else ""


def padding(results: Results) -> list[str]:
    """Compare what padding the tokens changed with what the tiles predict."""
    headings = ["padding the tokens to a multiple of 128", "predicted", "measured"]
    rows = []
    for name, entry in results.entries("probes").items():
        against = entry.get("against") if isinstance(entry, dict) else None
        if against is None:
            continue
        other = results.entry("probes", against)
        if not isinstance(other, dict) or entry.get("tokens") == other.get("tokens"):
            continue
        ratio = results.ratio("probes", name, against)
        measured = results.why("probes", name) if ratio is None else percent(ratio - 1)
        rows.append([name, predicted(name), measured])
    return table(headings, rows or [["all", "", results.why("probes", "")]])


def predicted(probe: str) -> str:
    """Write the change of a probe's time that the tiles predict; a range where it depends on the
    tile.
    """
    network = next((name for name in PUBLISHED if f" {name}:" in probe), None)
    if network is None:
        return ""
    part = {"attention": "self-attention", "feed-forward": "feed-forward, up"}.get(
        probe.split(f" {network}")[0]
    )
    if part is None:
        part = "q, k, v in one" if "in one" in probe else "q, k, v or out"
    changes = sorted({pad.change for pad in tiles.padding(PUBLISHED[network]) if pad.part == part})
    return " to ".join(percent(change) for change in dict.fromkeys((changes[0], changes[-1])))


def percent(change: float) -> str:
    """Write ``+0.4 %``."""
    return f"{100 * change:+.1f} %" if round(change, 3) else "0.0 %"
