"""Makes the tables of ``docs/performance.md`` that hold measurements; without a run, the same
without numbers.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from gpu import roofline
from gpu.floors import wrapped
from gpu.results import LARGE_COPY, NOT_MEASURED, Results, gibibytes, seconds, short, table, times
from gpu.sizes import PUBLISHED
from gpu.targets import TARGETS, share_of_copy

_PEERS = "peers' formulation"
_VARIANTS = {"triton": "Triton", "compile": "torch.compile"}


def targets(devices: list[Results]) -> list[str]:
    """Make a row for each goal, a column for each device."""
    rows = [[t.what, t.goal, *(t.cell(results) for results in devices)] for t in TARGETS]
    optional = (
        "14B with fp8 linears and fp8/int8 attention: a further factor, at ≤ 2 % relative output "
        "difference"
    )
    rows.append([optional, "≥ 1.3x (optional)", *("not built" for _ in devices)])
    return table(["what", "target", *(results.name for results in devices)], rows)


def run_of(results: Results) -> list[str]:
    """Write versions, clocks, commit and the state of every section."""
    if results.data is None:
        return []
    env, sections = results.data.get("environment", {}), results.data["sections"]
    packages = ", ".join(
        f"{name} {version}" for name, version in env.get("packages", {}).items() if version
    )
    changed = {True: "", False: " with changes", None: " (as told)"}[env.get("clean")]
    lines = [
        f"Commit `{str(env.get('commit'))[:12]}`{changed}, {packages}, CUDA {env.get('cuda')}, "
        f"driver {(env.get('gpu') or {}).get('driver')}, cuDNN "
        f"{(env.get('gpu') or {}).get('cudnn')}. "
        f"Runs: {', '.join(run['started'] for run in results.data['runs'])} (UTC).",
    ]
    if results.measured is not None:
        lines[0] += (
            f" Limits measured in the run: {results.measured.flops / 1e12:.0f} TFLOP/s (bf16 "
            "product of 8192 x 8192), "
            f"{results.measured.bandwidth / 1e12:.2f} TB/s (the fastest large copy, read plus "
            "written); the floors "
            "below are at these."
        )
    elif results.limits is not None:
        lines[0] += (
            " This run measured no limits; the floors below are at those of an "
            f"{results.limits.name} above."
        )
    else:
        lines[0] += " This run measured no limits and the card is not known: there are no floors."
    rows = [
        [
            name,
            section.get("status", "?"),
            section.get("reason") or section.get("note") or "",
            (section.get("clocks_before") or {}).get("clocks.sm", ""),
        ]
        for name, section in sections.items()
    ]
    if results.measured is not None:
        lines += ["", limits_of(results)]
    lines = [wrapped(line) for line in lines]
    return [*lines, "", *table(["section", "status", "reason", "SM clock before"], rows, right=3)]


def limits_of(results: Results) -> str:
    """Say what stands behind the limits that a run measured: rates of all copies, and of products
    over time.
    """
    limits, copies = results.measured, results.copies
    if limits is None:
        return ""
    listed = ", ".join(
        f"{moved / 1e6:.0f} MB at {rate / 1e12:.2f} TB/s" for moved, rate in copies.items()
    )
    text = (
        f"Copies, by the bytes that they move: {listed}. The fastest of those that move "
        f"{LARGE_COPY / 1e6:.0f} MB or "
        "more, four times the largest cache, is the limit."
    )
    small = [rate for moved, rate in copies.items() if moved < LARGE_COPY]
    if small and max(small) <= limits.bandwidth:
        text += (
            " Smaller copies are slower, so that the cache flatters no operator that moves as "
            "little."
        )
    fastest = _fastest_kernel(results)
    if fastest is not None and fastest[1] > limits.bandwidth:
        moved, rate, what = fastest
        text += (
            f" It is not quite the most that memory does: {what} moves its {moved / 1e6:.0f} MB at "
            f"{rate / 1e12:.2f} "
            f"TB/s, {rate / limits.bandwidth:.0%} of it."
        )
    samples = (results.entry("limits", "matmul") or {}).get("samples_ms", [])
    if samples and max(samples) > 1.05 * min(samples):
        cold = limits.flops * statistics.median(samples) / min(samples)
        text += (
            f" The product ran at {cold / 1e12:.0f} TFLOP/s in its fastest round and at "
            f"{limits.flops / 1e12:.0f} in "
            "the median one, as the clock falls under load: floors are right to some per cent."
        )
    return text


def _fastest_kernel(results: Results) -> tuple[float, float, str] | None:
    """Return the bytes moved, the bytes/s and the name of the fastest variant of an operator beyond
    any cache.
    """
    found = []
    for name, entry in results.entries("ops").items():
        for direction in ("forward", "backward"):
            moved = entry.get("bytes", {}).get(direction, 0) if isinstance(entry, dict) else 0
            timed = entry.get(direction, {}).get("ms", {}) if moved >= LARGE_COPY else {}
            for variant, ms in timed.items():
                what = f"{name} {direction} by {_VARIANTS.get(variant, variant)}"
                found.append((moved, moved / ms * 1e3, what))
    return max(found, key=lambda item: item[1], default=None)


def forwards(results: Results) -> list[str]:
    """Compare one forward of each network with diffusers' in both modes, and with the floor."""
    headings = [
        "one forward, 480x832, 81 frames",
        "ours",
        "diffusers",
        "ratio",
        "diffusers + compile",
        "ratio",
    ]
    headings += ["floor", "ours / floor", "peak, ours", "peak, diffusers"]
    rows = []
    for name, size in PUBLISHED.items():
        section = f"forward_{name.lower()}"
        compiled = "diffusers + compile"
        rows.append(
            [
                name,
                seconds(results, section, "ours"),
                seconds(results, section, "diffusers"),
                times(results, section, "diffusers", "ours"),
                seconds(results, section, compiled),
                times(results, section, compiled, f"ours, beside {compiled}"),
                *_against_floor(results, partial(roofline.forward_floor_s, size), section, "ours"),
                gibibytes(results, section, "ours"),
                gibibytes(results, section, "diffusers"),
            ]
        )
    lines = table(headings, rows)
    for name in PUBLISHED:
        chosen = results.entry(f"forward_{name.lower()}", "attention")
        if chosen is not None:
            lines += ["", _attention_note(results, name, chosen)]
    return lines


def _against_floor(
    results: Results, floor: Callable[[roofline.Limits], float], section: str, key: str
) -> list[str]:
    """Write the floor at the limits that hold for a device, and a measurement over it."""
    limits, milliseconds = results.limits, results.number(section, key)
    if limits is None:
        return [results.why("limits", "matmul_flops"), ""]
    distance = (
        NOT_MEASURED if milliseconds is None else f"{milliseconds / 1e3 / floor(limits):.2f}x"
    )
    return [f"{floor(limits):.3f} s", distance]


def _attention_note(results: Results, name: str, chosen: dict[str, str]) -> str:
    section = f"forward_{name.lower()}"
    if chosen["ours"] == chosen["torch"]:
        return f"{name}: both run attention on `{chosen['ours']}`, which is torch's own choice too."
    text = (
        f"{name}: ours runs attention on `{chosen['ours']}`, diffusers on torch's choice, "
        f"`{chosen['torch']}`."
    )
    ours, theirs = "ours, torch's attention", "diffusers, our attention"
    text += f" Ours on `{chosen['torch']}` as well: {seconds(results, section, ours)};"
    return text + f" diffusers on `{chosen['ours']}`: {seconds(results, section, theirs)}."


def sampling(results: Results) -> list[str]:
    """List the transformer's time by number of steps."""
    headings = [
        "sampling, transformer time",
        "steps",
        "ours",
        "diffusers",
        "ratio",
        "floor",
        "ours / floor",
        "peak, ours",
    ]
    rows = []
    for name, size in PUBLISHED.items():
        section = f"sampling_{name.lower()}"
        for steps in (1, 4, 8, 50):
            key, peer = f"ours NFE {steps}", f"diffusers NFE {steps}"
            skipped = "not run beyond 4 steps" if steps > 4 else None
            rows.append(
                [
                    name,
                    str(steps),
                    seconds(results, section, key),
                    skipped or seconds(results, section, peer),
                    "" if skipped else times(results, section, peer, key),
                    *_against_floor(
                        results, partial(roofline.sampling_floor_s, size, steps), section, key
                    ),
                    gibibytes(results, section, key),
                ]
            )
    return table(headings, rows)


def training(results: Results) -> list[str]:
    """Compare training steps with the peers' formulation."""
    headings = [
        "training step, 1.3B, LoRA, checkpointing",
        "ours",
        "peers' formulation",
        "time ratio",
    ]
    headings += ["floor, ours", "ours / floor", "peak, ours", "peak, peers'", "ours / peers' peak"]
    rows = []
    steps = {
        "pretrain_1.3b": ("pretrain, batch 2", roofline.pretrain_evaluations(2, 1)),
        "on_policy_1.3b": ("generator + critic, batch 1", roofline.on_policy_evaluations(1)),
    }
    for section, (name, evaluations) in steps.items():
        floor = partial(roofline.training_floor_s, PUBLISHED["1.3B"], evaluations["ours"])
        share = results.ratio(section, "ours", _PEERS, "peak_bytes")
        rows.append(
            [
                name,
                seconds(results, section, "ours"),
                seconds(results, section, _PEERS),
                times(results, section, _PEERS, "ours"),
                *_against_floor(results, floor, section, "ours"),
                gibibytes(results, section, "ours"),
                gibibytes(results, section, _PEERS),
                results.why(section, _PEERS) if share is None else f"{share:.2f}x",
            ]
        )
    return table(headings, rows)


def operators(results: Results) -> list[str]:
    """List every operator: Triton, against the copy, the eager and the compiled reference, and a
    native CUDA kernel.
    """
    headings = [
        "operator",
        "direction",
        "ms",
        "GB/s",
        "of copy",
        "eager / ours",
        "compile / ours",
        "native / ours",
    ]
    entries = {name: e for name, e in results.entries("ops").items() if isinstance(e, dict)}
    if not entries:
        return table(
            headings, [["all", "forward, backward", *[results.why("ops", "")] * 6]], right=2
        )
    rows = []
    for name, entry in entries.items():
        if "op" not in entry or "error" in entry:
            rows.append([name, "", results.why("ops", name), "", "", "", "", ""])
            continue
        for direction in ("forward", "backward"):
            rows.append([name, direction, *_operator_cells(results, entry, direction)])
    errors = _errors(entries)
    return [*table(headings, rows, right=2), *(["", *errors] if errors else [])]


def _operator_cells(results: Results, entry: dict[str, Any], direction: str) -> list[str]:
    timed = entry.get(direction, {}).get("ms", {})
    ours = timed.get("triton")
    reasons = entry.get(direction, {}).get("not_timed", {})
    if ours is None:
        return [reasons.get("triton", NOT_MEASURED), "", "", "", "", ""]
    share = share_of_copy(results, entry, direction)
    ratios = [
        f"{timed[name] / ours:.2f}x" if name in timed else _not_timed(reasons.get(name, ""))
        for name in ("eager", "compile", "native")
    ]
    rate = entry["bytes"][direction] / ours / 1e6
    return [f"{ours:.4f}", f"{rate:.0f}", "" if share is None else f"{share:.0%}", *ratios]


def _not_timed(reason: str) -> str:
    """Write why a variant has no time, in a word where there is one; errors stand below the
    table.
    """
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
                    found.setdefault(f"{_VARIANTS.get(variant, variant)}: {reason}", []).append(
                        f"{name} {direction}"
                    )
    return [
        wrapped(f"Failed: {reason} ({'; '.join(names)}).", "- ") for reason, names in found.items()
    ]


def native(results: Results) -> list[str]:
    """Compare native CUDA kernels with Triton's, forward: what would have to be above 1 for them to
    be the choice.
    """
    headings = ["native CUDA kernel, forward", "ms", "Triton, ms", "Triton / native"]
    rows = []
    for name, entry in results.entries("native").items():
        timed = entry.get("forward", {}).get("ms", {})
        if "native" in timed and "triton" in timed:
            ratio = f"{timed['triton'] / timed['native']:.2f}x"
            rows.append([name, f"{timed['native']:.4f}", f"{timed['triton']:.4f}", ratio])
        else:
            rows.append([name, results.why("native", name), "", ""])
    return table(headings, rows or [["all", results.why("native", ""), "", ""]])


def attention(results: Results) -> list[str]:
    """List the TFLOP/s of every backend at the models' shapes."""
    entries = {
        name: e
        for name, e in results.entries("attention").items()
        if isinstance(e, dict) and "ms" in e
    }
    if not entries:
        return table(
            ["attention", "TFLOP/s by backend"], [["all shapes", results.why("attention", "")]]
        )
    backends = sorted({name for entry in entries.values() for name in entry["ms"]})
    rows = []
    for name, entry in entries.items():
        cells = []
        for backend in backends:
            ms = entry["ms"].get(backend)
            rate = "–" if ms is None else f"{entry['flops'] / ms / 1e9:.0f}"
            cells.append(f"**{rate}**" if entry.get("chosen") == backend else rate)
        rows.append([name, *cells])
    return table(["attention, TFLOP/s (bold: our choice)", *backends], rows)


def profile(results: Results) -> list[str]:
    """List the time of the kernels of a forward at 1.3B by category."""
    shares = results.entry("profile_1.3b", "ms_by_category")
    headings = ["where a forward at 1.3B goes", "ms", "share"]
    if not shares:
        return table(headings, [["all kernels", results.why("profile_1.3b", "ms_by_category"), ""]])
    whole = sum(shares.values())
    rows = [
        [name, f"{ms:.1f}", f"{ms / whole:.1%}"]
        for name, ms in sorted(shares.items(), key=lambda kv: -kv[1])
    ]
    wall = results.entry("profile_1.3b", "wall_ms")
    rows.append(
        ["all kernels", f"{whole:.1f}", f"{whole / wall:.1%} of {wall:.1f} ms" if wall else ""]
    )
    graph = (
        f"as a CUDA graph: {seconds(results, 'profile_1.3b', 'CUDA graph')}, launched one by one: "
    )
    return [
        *table(headings, rows),
        "",
        f"The same forward {graph}{seconds(results, 'profile_1.3b', 'launched')}.",
    ]
