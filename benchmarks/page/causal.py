"""Make the tables of ``docs/performance.md`` on the causal model, where a run has measured it."""

from __future__ import annotations

import causal_roofline
import roofline
from layout import table
from sizes import CAUSAL

from page.results import RunResults

SECTION, TRAINING = "causal_1.3b", "pretrain_causal_1.3b"
NUM_STEPS = (1, 2, 4)
GOAL_STEPS, GOAL_FPS = 2, 25.0
_PEERS, _COMPILED = "peers' formulation", "peers' formulation + compile"
_VIDEOS = {
    "caches resident": "ours",
    "caches on the host": "caches on the host",
    "with decoding, chunk by chunk": "with decoding, chunk by chunk",
    "compiled blocks": "ours, compiled blocks",
}


def key_of(who: str, steps: int = GOAL_STEPS) -> str:
    """Return the key of a video in the results."""
    return f"{who} NFE {steps}"


def frames_per_second(results: RunResults, who: str = "ours", steps: int = GOAL_STEPS) -> str:
    """Write ``31.2``, or why it is lacking."""
    key = key_of(who, steps)
    value = results.number(SECTION, key, "fps")
    return results.why(SECTION, key) if value is None else f"{value:.1f}"


def tables_of(results: RunResults) -> list[str]:
    """Write the tables of the sections that a run has, and nothing for one that has none."""
    found = []
    if SECTION in results.data["sections"]:
        found += [*_videos(results), "", *_chunks(results), *_notes(results)]
    if TRAINING in results.data["sections"]:
        found += ["", *_training(results)] if found else _training(results)
    return found


def _videos(results: RunResults) -> list[str]:
    """List whole videos by steps and by options."""
    headings = ["causal, 1.3B, 81 frames, transformer time", "steps", "seconds", "frames/s"]
    headings += ["floor", "ours / floor", "peak"]
    rows = [("caches resident", "ours", steps) for steps in NUM_STEPS]
    rows += [(name, who, GOAL_STEPS) for name, who in _VIDEOS.items() if who != "ours"]
    lines = []
    for name, who, steps in rows:
        key, limits, least = key_of(who, steps), results.limits, None
        if limits is not None and "decoding" not in who:
            least = causal_roofline.video_floor_s(CAUSAL["1.3B"], steps, limits)
        milliseconds = results.number(SECTION, key)
        over = "" if least is None or milliseconds is None else f"{milliseconds / 1e3 / least:.2f}x"
        cells = [results.seconds(SECTION, key), frames_per_second(results, who, steps)]
        cells += ["" if least is None else f"{least:.3f} s", over]
        lines.append([name, str(steps), *cells, results.gibibytes(SECTION, key)])
    return table(headings, lines)


def _training(results: RunResults) -> list[str]:
    """Compare a pretrain step on all chunks with the peers' formulations of it."""
    headings = ["causal pretrain step, 1.3B, 8 chunks, batch 2, LoRA, checkpointing", "seconds"]
    headings += ["time / ours", "peak", "ours / its peak"]
    lines = [["ours", results.seconds(TRAINING, "ours"), "", results.gibibytes(TRAINING, "ours")]]
    for name, key, beside in (
        ("peers' formulation, dense mask", _PEERS, "ours"),
        ("the same, compiled flex attention", _COMPILED, f"ours, beside {_COMPILED}"),
    ):
        cells = [results.seconds(TRAINING, key), results.times(TRAINING, key, beside)]
        cells += [results.gibibytes(TRAINING, key)]
        lines.append([name, *cells, results.times(TRAINING, beside, key, "peak_bytes")])
    lines[0].append("")
    return table(headings, lines)


def _chunks(results: RunResults) -> list[str]:
    """List each chunk of a video of two steps: its encoding and its evaluations."""
    size, key = CAUSAL["1.3B"], key_of("ours")
    entry = results.entry(SECTION, key, {})
    headings = [f"chunk, {GOAL_STEPS} steps", "latent frames", "cached keys", "encoding, ms"]
    headings += ["evaluations, ms", "TFLOP", "frames/s"]
    calls, lines = causal_roofline.steps(size), []
    before = [None, *causal_roofline.encodings(size)]
    for chunk, measured in enumerate(entry.get("chunks", [])):
        frames = size.chunk_partition[chunk]
        done = [calls[chunk]] * GOAL_STEPS + [call for call in (before[chunk],) if call is not None]
        flops = sum(part.flops for call in done for part in causal_roofline.forward(size, call))
        encode, evaluate = measured["encode_ms"], measured["evaluate_ms"]
        pixels = 4 * frames - 3 * (chunk == 0)
        rate = 1e3 * pixels / (encode + evaluate)
        cells = [f"{encode:.1f}", f"{evaluate:.1f}", f"{flops / 1e12:.1f}", f"{rate:.1f}"]
        lines.append([str(chunk), str(frames), str(calls[chunk].cached), *cells])
    if not lines:
        lines = [["all", results.why(SECTION, key), *[""] * 5]]
    return table(headings, lines)


def _notes(results: RunResults) -> list[str]:
    """Say what caches take, what the host costs, and whether caches on it changed a bit."""
    found = []
    cache = results.entry(SECTION, "cache")
    if cache is not None:
        gib = {k: v / 2**30 for k, v in cache.items() if v is not None}
        allocated = gib.get("allocated_bytes")
        beside = "" if allocated is None else f", {allocated:.2f} GiB allocated with all else"
        found += [
            f"- Caches: {gib['predicted_bytes']:.2f} GiB predicted, {gib['kept_bytes']:.2f} GiB "
            f"kept{beside}."
        ]
    step = "step of the last chunk"
    times = {
        what: results.number(SECTION, f"{step}: {what}")
        for what in ("launched", "until enqueued", "CUDA graph")
    }
    if all(value is not None for value in times.values()):
        listed = ", ".join(f"{what} {value:.1f} ms" for what, value in times.items())
        found += [f"- One {step}: {listed}."]
    same = results.entry(SECTION, "caches on the host: the same bits")
    if same is not None:
        says = "the same video to the bit" if same else "**another video**"
        ratio = results.ratio(SECTION, key_of("caches on the host"), key_of("ours"))
        beside = "" if ratio is None else f", in {ratio:.2f} times the time"
        found += [f"- Caches on the host: {says}{beside}."]
    return ["", *found] if found else []


def counts() -> list[str]:
    """List the tokens that go through the network, by count: nothing is measured."""
    size = CAUSAL["1.3B"]
    step = causal_roofline.tokens_of(causal_roofline.steps(size))
    ours = causal_roofline.tokens_of(causal_roofline.encodings(size))
    theirs = causal_roofline.tokens_of(causal_roofline.peer_encodings(size))
    headings = ["tokens of a video, 480x832, published partition", "ours", "diffusers", "ratio"]
    lines = [["one step of all chunks", f"{step}", f"{step}", "1.00x"]]
    lines.append(["all encodings", f"{ours}", f"{theirs}", f"{theirs / ours:.2f}x"])
    for n in (1, 2, 4, 8):
        whole = [n * step + encodings for encodings in (ours, theirs)]
        name = f"everything, {n} step{'s' if n > 1 else ''} for each chunk"
        lines.append([name, *map(str, whole), f"{whole[1] / whole[0]:.2f}x"])
    return table(headings, lines)


def floors() -> list[str]:
    """List the work and the floors of a video, by count and by the limits of the cards."""
    cards = (roofline.H100, roofline.H200)
    headings = ["causal video, 480x832, 81 frames", "steps", "TFLOP", "of it self-attention"]
    headings += [f"floor on an {card.name}" for card in cards]
    headings += [f"frames/s at it, {card.name}" for card in cards]
    lines = []
    for name, size in CAUSAL.items():
        for steps in NUM_STEPS:
            parts = causal_roofline.video(size, steps)
            attention = sum(p.flops for p in parts if p.name == roofline.SELF_ATTENTION)
            seconds = [causal_roofline.video_floor_s(size, steps, card) for card in cards]
            whole = roofline.total(parts).flops
            cells = [f"{whole / 1e12:.0f}", f"{attention / whole:.0%}"]
            cells += [f"{s:.2f} s" for s in seconds] + [f"{81 / s:.0f}" for s in seconds]
            lines.append([name, str(steps), *cells])
    return table(headings, lines)
