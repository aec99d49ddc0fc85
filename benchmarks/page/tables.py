"""Make the tables of ``docs/performance.md`` that hold measurements."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import roofline
from layout import paragraph, table
from sizes import PUBLISHED

from page.results import LARGE_COPY, NOT_MEASURED, RunResults, short
from page.targets import share_of_copy

_PEERS, _COMPILED = "peers' formulation", "diffusers + compile"
_SWAPPED = ("ours, torch's attention", "diffusers, our attention")
_VARIANTS = {"triton": "Triton", "compile": "torch.compile"}
# in the name of a check of more than one kernel
_NETWORK = re.compile(r"network|transformer", re.IGNORECASE)
_DIRECTIONS = ("forward", "backward")


def run_of(results: RunResults) -> list[str]:
    """Write versions, clocks, commit and the state of every section."""
    env, limits = results.data.get("environment", {}), results.limits
    packages = ", ".join(f"{name} {v}" for name, v in env.get("packages", {}).items() if v)
    changed = {True: "", False: " with changes", None: " (as told)"}[env.get("clean")]
    gpu = env["gpu"] if env.get("gpu") is not None else {}
    text = (
        f"Commit `{str(env.get('commit'))[:12]}`{changed}, {packages}, CUDA {env.get('cuda')}, "
        f"driver {gpu.get('driver')}, cuDNN {gpu.get('cudnn')}. "
        f"Runs: {', '.join(run['started'] for run in results.data['runs'])} (UTC)."
    )
    if limits is None:
        found = [f"{text} This run measured no limits: floors are left out."]
    else:
        text += (
            f" Limits measured in the run: {limits.flops / 1e12:.0f} TFLOP/s (bf16 product of 8192 "
            f"x 8192), {limits.bandwidth / 1e12:.2f} TB/s (the fastest large copy, read plus "
            "written); the floors below are at these."
        )
        found = [text, "", limits_of(results, limits)]
    lines = []
    for name, section in results.data["sections"].items():
        reasons = [section[k] for k in ("reason", "note") if section.get(k) is not None]
        clocks = section.get("clocks_before")
        clock = "" if clocks is None else clocks["clocks.sm"]
        lines.append([name, section.get("status", "?"), "".join(reasons[:1]), clock])
    headings = ["section", "status", "reason", "SM clock before"]
    return [*(paragraph(line) for line in found), "", *table(headings, lines, right=3)]


def limits_of(results: RunResults, limits: roofline.DeviceLimits) -> str:
    """Say what stands behind the limits of a run: rates of all copies, of products over time."""
    copies = results.copies
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
    found = [
        (moved, moved / ms * 1e3, f"{name} {direction} by {_VARIANTS.get(variant, variant)}")
        for name, entry in results.entries("ops").items()
        for direction in _DIRECTIONS
        if (moved := entry.get("bytes", {}).get(direction, 0)) >= LARGE_COPY
        for variant, ms in entry.get(direction, {}).get("ms", {}).items()
    ]
    return max(found, key=lambda item: item[1], default=None)


def _listed(
    results: RunResults, section: str, headings: list[str], lines: list[list[str]], right: int = 1
) -> list[str]:
    """Make a table of a section: short lines are filled up; without any, one says why."""
    filled = [[*line, *[""] * (len(headings) - len(line))] for line in lines]
    reason = ["all", *[""] * (len(headings) - 1)]
    reason[right] = results.why(section)
    return table(headings, filled if lines else [reason], right)


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
    """Write the floor at the limits that a run measured, and a measurement over it."""
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
    steps = {
        "pretrain_1.3b": ("pretrain, batch 2", roofline.pretrain_evaluations(2, 1)["ours"]),
        "on_policy_1.3b": ("generator + critic, batch 1", roofline.both_on_policy(1)),
    }
    lines = []
    for at, (name, evaluations) in steps.items():
        floor = partial(roofline.training_floor_s, PUBLISHED["1.3B"], evaluations)
        cells = [results.seconds(at, "ours"), results.seconds(at, _PEERS)]
        cells += [results.times(at, _PEERS, "ours"), *_floor(results, floor, at, "ours")]
        cells += [results.gibibytes(at, "ours"), results.gibibytes(at, _PEERS)]
        lines.append([name, *cells, results.times(at, "ours", _PEERS, "peak_bytes")])
    return table(headings, lines)


def profile(results: RunResults) -> list[str]:
    """List the time of the kernels of a forward at 1.3B by category."""
    at, headings = "profile_1.3b", ["where a forward at 1.3B goes", "ms", "share"]
    shares, wall = results.entry(at, "ms_by_category", {}), results.entry(at, "wall_ms")
    if not shares:
        return _listed(results, at, headings, [])
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
    lines: list[list[str]] = []
    errors: dict[str, list[str]] = {}
    for name, entry in results.entries("ops").items():
        if "op" not in entry or "error" in entry:
            lines.append([name, "", results.why("ops", name)])
            continue
        for direction in _DIRECTIONS:
            lines.append([name, direction, *_operator_cells(results, entry, direction)])
            for variant, reason in entry.get(direction, {}).get("not_timed", {}).items():
                if reason.split(":")[0].endswith("Error"):
                    text = f"{_VARIANTS.get(variant, variant)}: {reason}"
                    errors.setdefault(text, []).append(f"{name} {direction}")
    failed = [paragraph(f"Failed: {text} ({'; '.join(of)}).", "- ") for text, of in errors.items()]
    found = _listed(results, "ops", headings, lines, right=2)
    return [*found, "", *failed] if failed else found


def _operator_cells(results: RunResults, entry: dict[str, Any], direction: str) -> list[str]:
    timed, reasons = (entry.get(direction, {}).get(key, {}) for key in ("ms", "not_timed"))
    ours = timed.get("triton")
    if ours is None:
        return [reasons.get("triton", NOT_MEASURED)]
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


def native(results: RunResults) -> list[str]:
    """Compare native CUDA kernels with Triton's, forward; above 1 they would be the choice."""
    headings = ["native CUDA kernel, forward", "ms", "Triton, ms", "Triton / native"]
    lines = []
    for name, entry in results.entries("native").items():
        timed = entry.get("forward", {}).get("ms", {})
        cells = [results.why("native", name)]
        if "native" in timed and "triton" in timed:
            ours, triton = timed["native"], timed["triton"]
            cells = [f"{ours:.4f}", f"{triton:.4f}", f"{triton / ours:.2f}x"]
        lines.append([name, *cells])
    return _listed(results, "native", headings, lines)


def attention(results: RunResults) -> list[str]:
    """List the TFLOP/s of every backend at the models' shapes."""
    entries = {name: e for name, e in results.entries("attention").items() if "ms" in e}
    if not entries:
        return _listed(results, "attention", ["attention", "TFLOP/s"], [])
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
    limits, lines = results.limits, []
    for name, task in results.entry("tune_rows", "tune_rows", {}).get("tasks", {}).items():
        today, best = task.get("today_ms"), task.get("best_ms")
        if today is None or best is None:
            reason = task.get("error") or task.get("skipped") or NOT_MEASURED
            lines.append([name, short(str(reason))])
            continue
        cells = []
        for milliseconds in (today, best):
            rate = task["bytes"] / milliseconds * 1e3
            share = "" if limits is None else f"{rate / limits.bandwidth:.0%}"
            cells += [f"{milliseconds:.4f}", share]
        lines.append([name, *cells, f"{today / best:.2f}x", short(str(task["best"]))])
    return _listed(results, "tune_rows", headings, lines)


# Probes and checks --------------------------------------------------------------------------------


def probes(results: RunResults) -> list[str]:
    """List the probes, each with its rate and its ratio to the one that it is compared with."""
    lines = []
    for name, entry in results.entries("probes").items():
        milliseconds, against = results.number("probes", name), entry.get("against")
        if milliseconds is None:
            lines.append([name, results.why("probes", name)])
            continue
        rate = f"{entry['bytes'] / milliseconds / 1e6:.0f} GB/s" if "bytes" in entry else ""
        if "flops" in entry:
            rate = f"{entry['flops'] / milliseconds / 1e9:.0f} TFLOP/s"
        ratio = results.ratio("probes", name, against) if against else None
        compared = "" if against is None else against.split(": ", 1)[-1]
        known = "" if ratio is None else f"{ratio:.3f}x"
        lines.append([name, f"{milliseconds:.4f}", rate, compared, known])
    return _listed(results, "probes", ["probe", "ms", "rate", "time over", "ratio"], lines)


def padding(results: RunResults) -> list[str]:
    """Compare what padding the tokens changed with what the tiles predict: nothing."""
    lines = []
    for name, entry in results.entries("probes").items():
        other = results.entry("probes", entry.get("against", ""))
        if other is None or entry.get("tokens") == other.get("tokens"):
            continue
        ratio = results.ratio("probes", name, entry["against"])
        change = results.why("probes", name) if ratio is None else f"{100 * (ratio - 1):+.1f} %"
        lines.append([name, "0.0 %", change])
    headings = ["padding the tokens to a multiple of 128", "predicted", "measured"]
    return _listed(results, "probes", headings, lines)


def alarms(results: RunResults) -> list[str]:
    """Say loudly which checks failed, by their outcomes and by the warnings of the file."""
    warnings = results.data.get("warnings", [])
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
    found, lines = results.entry("checks", "outcomes", {}), []
    for name, check in sorted(found.items(), key=lambda item: bool(item[1]["ok"])):
        error, limit = check.get("error"), check.get("limit")
        share = f"{error / limit:.2f}" if error is not None and limit else ""
        result = "ok" if check["ok"] else f"**failed**: {_problem(check)}"
        powers = ["" if value is None else f"{value:.1e}" for value in (error, limit)]
        lines.append([name, result, *powers, share])
    passed = sum(bool(check["ok"]) for check in found.values())
    head = [f"{passed} of {len(found)} checks passed.", ""] if found else []
    return [*head, *_listed(results, "checks", headings, lines, right=1 + bool(found))]


def _problem(check: dict[str, Any]) -> str:
    problem = check.get("problem")
    return "over its limit" if problem is None else short(str(problem))


# of a device, in the order of the page
PARTS = (
    *(forwards, sampling, training, attention, operators, native),
    *(tune_rows, profile, probes, padding, checks),
)
