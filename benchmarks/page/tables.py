"""Make the tables of ``docs/performance.md`` that hold measurements; without a run, no numbers."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import roofline
from layout import paragraph, table
from sizes import PUBLISHED

from page import floors
from page.results import LARGE_COPY, NOT_MEASURED, RunResults, short
from page.targets import TARGETS, share_of_copy

_PEERS, _COMPILED = "peers' formulation", "diffusers + compile"
_SWAPPED = ("ours, torch's attention", "diffusers, our attention")
_VARIANTS = {"triton": "Triton", "compile": "torch.compile"}
# in the name of a check of more than one kernel
_NETWORK = re.compile(r"network|transformer", re.IGNORECASE)


def targets(devices: list[RunResults]) -> list[str]:
    """Make a line for each goal, a column for each device."""
    lines = [[t.what, str(t.text), *(t.cell(results) for results in devices)] for t in TARGETS]
    optional = (
        "14B with fp8 linears and fp8/int8 attention: a further factor, at ≤ 2 % relative output "
        "difference"
    )
    lines.append([optional, "≥ 1.3x (optional)", *("not built" for _ in devices)])
    return table(["what", "target", *(results.name for results in devices)], lines)


def run_of(results: RunResults) -> list[str]:
    """Write versions, clocks, commit and the state of every section."""
    if results.data is None:
        return []
    env, sections = results.data.get("environment", {}), results.data["sections"]
    packages = ", ".join(f"{name} {v}" for name, v in env.get("packages", {}).items() if v)
    changed = {True: "", False: " with changes", None: " (as told)"}[env.get("clean")]
    gpu, limits = env["gpu"] if env.get("gpu") is not None else {}, results.measured
    text = (
        f"Commit `{str(env.get('commit'))[:12]}`{changed}, {packages}, CUDA {env.get('cuda')}, "
        f"driver {gpu.get('driver')}, cuDNN {gpu.get('cudnn')}. "
        f"Runs: {', '.join(run['started'] for run in results.data['runs'])} (UTC)."
    )
    if limits is not None:
        text += (
            f" Limits measured in the run: {limits.flops / 1e12:.0f} TFLOP/s (bf16 product of 8192 "
            f"x 8192), {limits.bandwidth / 1e12:.2f} TB/s (the fastest large copy, read plus "
            "written); the floors below are at these."
        )
    elif results.limits is not None:
        text += (
            " This run measured no limits; the floors below are at those of an "
            f"{results.limits.name} above."
        )
    else:
        text += " This run measured no limits and the card is not known: floors are left out."
    found = [text] if limits is None else [text, "", limits_of(results)]
    lines = []
    for name, section in sections.items():
        reasons = [section[k] for k in ("reason", "note") if section.get(k) is not None]
        clocks = section.get("clocks_before")
        clock = "" if clocks is None else clocks["clocks.sm"]
        lines.append([name, section.get("status", "?"), "".join(reasons[:1]), clock])
    headings = ["section", "status", "reason", "SM clock before"]
    return [*(paragraph(line) for line in found), "", *table(headings, lines, right=3)]


def limits_of(results: RunResults) -> str:
    """Say what stands behind the limits of a run: rates of all copies, of products over time."""
    limits, copies = results.measured, results.copies
    if limits is None:
        return ""
    listed = ", ".join(f"{b / 1e6:.0f} MB at {rate / 1e12:.2f} TB/s" for b, rate in copies.items())
    text = (
        f"Copies, by the bytes that they move: {listed}. The fastest of those that move "
        f"{LARGE_COPY / 1e6:.0f} MB or more, four times the largest cache, is the limit."
    )
    small = [rate for moved, rate in copies.items() if moved < LARGE_COPY]
    if small and max(small) <= limits.bandwidth:
        slower = "Smaller copies are slower, so that the cache flatters no operator"
        text += f" {slower} that moves as little."
    fastest = _fastest_kernel(results)
    if fastest is not None and fastest[1] > limits.bandwidth:
        moved, rate, what = fastest
        text += (
            f" It is not quite the most that memory does: {what} moves its {moved / 1e6:.0f} MB at "
            f"{rate / 1e12:.2f} TB/s, {rate / limits.bandwidth:.0%} of it."
        )
    samples = results.entry("limits", "matmul", {}).get("samples_ms", [])
    if samples and max(samples) > 1.05 * min(samples):
        cold = limits.flops * statistics.median(samples) / min(samples)
        text += (
            f" The product ran at {cold / 1e12:.0f} TFLOP/s in its fastest round and at "
            f"{limits.flops / 1e12:.0f} in the median one, as the clock falls under load: floors "
            "are right to some per cent."
        )
    return text


def _fastest_kernel(results: RunResults) -> tuple[float, float, str] | None:
    """Return bytes, bytes/s and name of the fastest variant of an operator beyond any cache."""
    found = []
    for name, entry in results.entries("ops").items():
        for direction in ("forward", "backward"):
            moved = entry.get("bytes", {}).get(direction, 0)
            timed = entry.get(direction, {}).get("ms", {}) if moved >= LARGE_COPY else {}
            for variant, ms in timed.items():
                what = f"{name} {direction} by {_VARIANTS.get(variant, variant)}"
                found.append((moved, moved / ms * 1e3, what))
    return max(found, key=lambda item: item[1], default=None)


# Networks -----------------------------------------------------------------------------------------


def forwards(results: RunResults) -> list[str]:
    """Compare one forward of each network with diffusers' in both modes, and with the floor."""
    headings = ["one forward, 480x832, 81 frames", "ours", "diffusers", "ratio", _COMPILED, "ratio"]
    headings += ["floor", "ours / floor", "peak, ours", "peak, diffusers"]
    lines, notes = [], []
    for name, size in PUBLISHED.items():
        at = f"forward_{name.lower()}"
        cells = [results.seconds(at, "ours"), results.seconds(at, "diffusers")]
        cells += [results.times(at, "diffusers", "ours"), results.seconds(at, _COMPILED)]
        cells += [results.times(at, _COMPILED, f"ours, beside {_COMPILED}")]
        cells += _floor(results, partial(roofline.forward_floor_s, size), at, "ours")
        cells += [results.gibibytes(at, who) for who in ("ours", "diffusers")]
        lines.append([name, *cells])
        chosen = results.entry(at, "attention")
        if chosen is not None:
            notes += ["", _attention_note(results, name, at, chosen)]
    return [*table(headings, lines), *notes]


def _floor(
    results: RunResults, floor: Callable[[roofline.DeviceLimits], float], at: str, key: str
) -> list[str]:
    """Write the floor at the limits that hold for a device, and a measurement over it."""
    limits, milliseconds = results.limits, results.number(at, key)
    if limits is None:
        return [results.why("limits", "matmul_flops"), ""]
    least = floor(limits)
    over = NOT_MEASURED if milliseconds is None else f"{milliseconds / 1e3 / least:.2f}x"
    return [f"{least:.3f} s", over]


def _attention_note(results: RunResults, name: str, at: str, chosen: dict[str, str]) -> str:
    ours, default = chosen["ours"], chosen["torch"]
    if ours == default:
        return f"{name}: both run attention on `{ours}`, which is torch's own choice too."
    swapped = [results.seconds(at, key) for key in _SWAPPED]
    return (
        f"{name}: ours runs attention on `{ours}`, diffusers on torch's choice, `{default}`. Ours "
        f"on `{default}` as well: {swapped[0]}; diffusers on `{ours}`: {swapped[1]}."
    )


def sampling(results: RunResults) -> list[str]:
    """List the transformer's time by number of steps."""
    headings = ["sampling, transformer time", "steps", "ours", "diffusers", "ratio"]
    headings += ["floor", "ours / floor", "peak, ours"]
    lines = []
    for name, size in PUBLISHED.items():
        at = f"sampling_{name.lower()}"
        for steps in (1, 4, 8, 50):
            key, peer = f"ours NFE {steps}", f"diffusers NFE {steps}"
            theirs = [results.seconds(at, peer), results.times(at, peer, key)]
            theirs = ["not run beyond 4 steps", ""] if steps > 4 else theirs
            floor = partial(roofline.sampling_floor_s, size, steps)
            cells = [results.seconds(at, key), *theirs, *_floor(results, floor, at, key)]
            lines.append([name, str(steps), *cells, results.gibibytes(at, key)])
    return table(headings, lines)


def training(results: RunResults) -> list[str]:
    """Compare training steps with the peers' formulation."""
    headings = ["training step, 1.3B, LoRA, checkpointing", "ours", _PEERS, "time ratio"]
    headings += ["floor, ours", "ours / floor", "peak, ours", "peak, peers'", "ours / peers' peak"]
    lines = []
    pretrain, both = roofline.pretrain_evaluations(2, 1)["ours"], roofline.both_on_policy(1)
    steps = {"pretrain": ("pretrain, batch 2", pretrain)}
    steps["on_policy"] = ("generator + critic, batch 1", both)
    for method, (name, evaluations) in steps.items():
        at = f"{method}_1.3b"
        floor = partial(roofline.training_floor_s, PUBLISHED["1.3B"], evaluations)
        share = results.ratio(at, "ours", _PEERS, "peak_bytes")
        cells = [results.seconds(at, "ours"), results.seconds(at, _PEERS)]
        cells += [results.times(at, _PEERS, "ours"), *_floor(results, floor, at, "ours")]
        cells += [results.gibibytes(at, "ours"), results.gibibytes(at, _PEERS)]
        cells += [results.why(at, _PEERS) if share is None else f"{share:.2f}x"]
        lines.append([name, *cells])
    return table(headings, lines)


def profile(results: RunResults) -> list[str]:
    """List the time of the kernels of a forward at 1.3B by category."""
    at, headings = "profile_1.3b", ["where a forward at 1.3B goes", "ms", "share"]
    shares, wall = results.entry(at, "ms_by_category"), results.entry(at, "wall_ms")
    if not shares:
        return table(headings, [["all kernels", results.why(at, "ms_by_category"), ""]])
    whole = sum(shares.values())
    ranked = sorted(shares.items(), key=lambda kv: -kv[1])
    lines = [[name, f"{ms:.1f}", f"{ms / whole:.1%}"] for name, ms in ranked]
    of_wall = f"{whole / wall:.1%} of {wall:.1f} ms" if wall else ""
    lines.append(["all kernels", f"{whole:.1f}", of_wall])
    times = [results.seconds(at, name) for name in ("CUDA graph", "launched")]
    graph = f"The same forward as a CUDA graph: {times[0]}, launched one by one: {times[1]}."
    return [*table(headings, lines), "", graph]


# Kernels ------------------------------------------------------------------------------------------


def operators(results: RunResults) -> list[str]:
    """List every operator's Triton kernel against the copy and against every other variant."""
    headings = ["operator", "direction", "ms", "GB/s", "of copy"]
    headings += [f"{variant} / ours" for variant in ("eager", "compile", "native")]
    entries = results.entries("ops")
    if not entries:
        return table(headings, [["all", "both", *[results.why("ops")] * 6]], right=2)
    lines = []
    for name, entry in entries.items():
        if "op" not in entry or "error" in entry:
            lines.append([name, "", results.why("ops", name), *[""] * 5])
            continue
        for direction in ("forward", "backward"):
            lines.append([name, direction, *_operator_cells(results, entry, direction)])
    errors = _errors(entries)
    return [*table(headings, lines, right=2), *(["", *errors] if errors else [])]


def _operator_cells(results: RunResults, entry: dict[str, Any], direction: str) -> list[str]:
    timed, reasons = (entry.get(direction, {}).get(key, {}) for key in ("ms", "not_timed"))
    ours = timed.get("triton")
    if ours is None:
        return [reasons.get("triton", NOT_MEASURED), *[""] * 5]
    share = share_of_copy(results, entry, direction)
    ratios = [
        f"{timed[name] / ours:.2f}x" if name in timed else _not_timed(reasons.get(name, ""))
        for name in ("eager", "compile", "native")
    ]
    rate = entry["bytes"][direction] / ours / 1e6
    return [f"{ours:.4f}", f"{rate:.0f}", "" if share is None else f"{share:.0%}", *ratios]


def _not_timed(reason: str) -> str:
    """Write why a variant has no time, in a word if possible; errors stand below the table."""
    if reason.startswith("no native CUDA kernel"):
        return "none"
    kind = reason.split(":")[0]
    return f"failed ({kind})" if kind.endswith("Error") else short(reason, 60)


def _errors(entries: dict[str, dict[str, Any]]) -> list[str]:
    """List the errors of variants, each once, with what they are of."""
    found: dict[str, list[str]] = {}
    for name, entry in entries.items():
        for direction in ("forward", "backward"):
            for variant, reason in entry.get(direction, {}).get("not_timed", {}).items():
                if reason.split(":")[0].endswith("Error"):
                    text = f"{_VARIANTS.get(variant, variant)}: {reason}"
                    found.setdefault(text, []).append(f"{name} {direction}")
    return [paragraph(f"Failed: {text} ({'; '.join(of)}).", "- ") for text, of in found.items()]


def native(results: RunResults) -> list[str]:
    """Compare native CUDA kernels with Triton's, forward; above 1 they would be the choice."""
    headings = ["native CUDA kernel, forward", "ms", "Triton, ms", "Triton / native"]
    lines = []
    for name, entry in results.entries("native").items():
        timed = entry.get("forward", {}).get("ms", {})
        cells = [results.why("native", name), "", ""]
        if "native" in timed and "triton" in timed:
            ours, triton = timed["native"], timed["triton"]
            cells = [f"{ours:.4f}", f"{triton:.4f}", f"{triton / ours:.2f}x"]
        lines.append([name, *cells])
    return table(headings, lines or [["all", results.why("native"), "", ""]])


def attention(results: RunResults) -> list[str]:
    """List the TFLOP/s of every backend at the models' shapes."""
    entries = {name: e for name, e in results.entries("attention").items() if "ms" in e}
    if not entries:
        return table(["attention", "TFLOP/s"], [["all shapes", results.why("attention")]])
    backends = sorted({name for entry in entries.values() for name in entry["ms"]})
    lines = []
    for name, entry in entries.items():
        cells = []
        for backend in backends:
            ms = entry["ms"].get(backend)
            rate = "–" if ms is None else f"{entry['flops'] / ms / 1e9:.0f}"
            cells.append(f"**{rate}**" if entry.get("chosen") == backend else rate)
        lines.append([name, *cells])
    return table(["attention, TFLOP/s (bold: our choice)", *backends], lines)


def tune_rows(results: RunResults) -> list[str]:
    """List the row kernels with today's launch options and with the best ones of the device."""
    headings = ["row kernel, launch options", "today, ms", "of copy", "best, ms", "of copy"]
    headings += ["today / best", "best"]
    found = results.entries("tune_rows")
    found = found.get("tune_rows", found)  # the file that the tuner wrote, under one key
    limits, lines = results.measured, []
    for name, task in found.get("tasks", {}).items():
        today, best = task.get("today_ms"), task.get("best_ms")
        if today is None or best is None:
            reason = task.get("error") or task.get("skipped") or NOT_MEASURED
            lines.append([name, short(str(reason)), *[""] * 5])
            continue
        cells = []
        for milliseconds in (today, best):
            rate = task["bytes"] / milliseconds * 1e3
            share = "" if limits is None else f"{rate / limits.bandwidth:.0%}"
            cells += [f"{milliseconds:.4f}", share]
        lines.append([name, *cells, f"{today / best:.2f}x", short(str(task["best"]))])
    return table(headings, lines or [["all", results.why("tune_rows"), *[""] * 5]])


# Probes and checks --------------------------------------------------------------------------------


def probes(results: RunResults) -> list[str]:
    """List the probes, each with its rate and its ratio to the one that it is compared with."""
    lines = []
    for name, entry in results.entries("probes").items():
        milliseconds, against = results.number("probes", name), entry.get("against")
        if milliseconds is None:
            lines.append([name, results.why("probes", name), "", "", ""])
            continue
        rate = f"{entry['bytes'] / milliseconds / 1e6:.0f} GB/s" if "bytes" in entry else ""
        if "flops" in entry:
            rate = f"{entry['flops'] / milliseconds / 1e9:.0f} TFLOP/s"
        ratio = results.ratio("probes", name, against) if against else None
        compared = "" if against is None else against.split(": ", 1)[-1]
        known = "" if ratio is None else f"{ratio:.3f}x"
        lines.append([name, f"{milliseconds:.4f}", rate, compared, known])
    nothing = [["all", results.why("probes"), "", "", ""]]
    return table(["probe", "ms", "rate", "time over", "ratio"], lines or nothing)


def padding(results: RunResults) -> list[str]:
    """Compare what padding the tokens changed with what the tiles predict."""
    lines = []
    for name, entry in results.entries("probes").items():
        other = results.entry("probes", entry.get("against", ""))
        if other is None or entry.get("tokens") == other.get("tokens"):
            continue
        ratio = results.ratio("probes", name, entry["against"])
        measured = results.why("probes", name) if ratio is None else floors.percent(ratio - 1)
        lines.append([name, floors.predicted(name), measured])
    headings = ["padding the tokens to a multiple of 128", "predicted", "measured"]
    return table(headings, lines or [["all", "", results.why("probes")]])


def alarms(results: RunResults) -> list[str]:
    """Say loudly which checks failed, by their outcomes and by the warnings of the file."""
    warnings = [] if results.data is None else results.data.get("warnings", [])
    failed = {name: text for name, _, text in (w.partition(": ") for w in warnings)}
    outcomes = results.entry("checks", "outcomes", {})
    failed |= {name: _problem(found) for name, found in outcomes.items() if not found["ok"]}
    broken = [name for name in failed if _NETWORK.search(name)]
    others = "; ".join(name for name in failed if name not in broken)
    lines = []
    if broken:
        listed = "; ".join(f"{name}: {short(failed[name])}" for name in broken)
        lines += [f"> **WRONG: a network computed something else on this device ({listed}).**"]
        lines += ["> **The networks' times below are not evidence of anything.**", ""]
    if others:
        text = f"> **Failed checks of kernels: {others}. No time of these kernels is evidence.**"
        lines += [text, ""]
    return lines


def checks(results: RunResults) -> list[str]:
    """List every check on the device: its error and its limit, failures first."""
    headings = ["check on the device", "result", "error", "limit", "error / limit"]
    found = results.entry("checks", "outcomes", {})
    if not found:
        return table(headings, [["all", results.why("checks"), "", "", ""]])
    lines = []
    for name, check in sorted(found.items(), key=lambda item: bool(item[1]["ok"])):
        error, limit = check.get("error"), check.get("limit")
        share = f"{error / limit:.2f}" if error is not None and limit else ""
        result = "ok" if check["ok"] else f"**failed**: {_problem(check)}"
        powers = ["" if value is None else f"{value:.1e}" for value in (error, limit)]
        lines.append([name, result, *powers, share])
    passed = sum(bool(check["ok"]) for check in found.values())
    return [f"{passed} of {len(found)} checks passed.", "", *table(headings, lines, right=2)]


def _problem(check: dict[str, Any]) -> str:
    problem = check.get("problem")
    return "over its limit" if problem is None else short(str(problem))
