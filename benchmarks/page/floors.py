"""Write what ``docs/performance.md`` computes: limits by card, floors, tiles; others' figures."""

from __future__ import annotations

import roofline
from layout import paragraph, table
from roofline import CARDS, DeviceLimits
from sizes import PUBLISHED, NetworkSize

from page import tiles
from page.targets import ANCHORS, FORWARD_GOAL_S, NEAR_FLOOR

_CARDS = tuple(CARDS.values())


def percent(change: float) -> str:
    """Write ``+0.4 %``."""
    return f"{100 * change:+.1f} %" if round(change, 3) else "0.0 %"


def anchors() -> list[str]:
    """Write what others published for the same forward."""
    note = (
        "What others published for one dense bf16 forward at 480x832, 81 frames, on one GPU. These "
        "figures are theirs: nothing in this project measured them, and other versions, clocks and "
        "details of the model stand behind them."
    )
    lines = [
        [network, f"{seconds:.2f} s", card, who, source]
        for network, seconds, card, who, source in ANCHORS
    ]
    found = table(["network", "one forward", "card", "software", "source"], lines, right=5)
    return ["### Anchors: others' published figures", "", paragraph(note), "", *found, ""]


def floors() -> list[str]:
    """Write the roofline note: limits by card, and a table of components for each network."""
    explanation = (
        f"One forward at 480x832, 81 frames, is {PUBLISHED['1.3B'].tokens} tokens. The tables "
        "count its FLOPs and the least bytes that it must move, component by component "
        "(`benchmarks/roofline.py`; the count of FLOPs is `torch.utils.flop_counter`'s, checked on "
        "real models). A component takes at least the longer of its FLOPs at the rate of a large "
        "bf16 matrix product and its bytes at the bandwidth of a copy; components follow one "
        "another. What reaches neither limit takes longer. A run is held against the limits that "
        "it measured itself; these are for cards without a run:"
    )
    limits = [
        [c.name, f"{c.flops / 1e12:.0f} TFLOP/s", f"{c.bandwidth / 1e12:.1f} TB/s", c.source]
        for c in _CARDS
    ]
    image = "![Share of the floor by component](images/performance_floor.png)"
    lines = ["## The floor", "", paragraph(explanation), ""]
    lines += [*table(["card", "bf16 product", "copy", "source"], limits, right=4), "", image, ""]
    for size in PUBLISHED.values():
        lines += [*_components(size), ""]
    return [*lines, *_by_card(), "", *_reading(), ""]


def difference() -> float:
    """Return the largest difference between the cards' floors of a forward, as a share."""
    seconds = [[roofline.forward_floor_s(s, c) for c in _CARDS] for s in PUBLISHED.values()]
    return max(max(by_card) / min(by_card) - 1 for by_card in seconds)


def _components(size: NetworkSize) -> list[str]:
    components, whole = roofline.forward(size), roofline.work(size)
    headings = [f"{size.name} ({size.parameters / 1e9:.2f} B parameters)", "TFLOP", "GB"]
    last = ["all", f"{whole.flops / 1e12:.1f}", f"{whole.bytes / 1e9:.1f}"]
    lines = [[c.name, f"{c.flops / 1e12:.2f}", f"{c.bytes / 1e9:.1f}"] for c in components]
    for card in _CARDS:
        headings += [f"floor on an {card.name}, ms", "share", "bound by"]
        together = roofline.floor_s(components, card)
        last += [f"{together * 1e3:.1f}", "100 %", ""]
        for line, c in zip(lines, components, strict=True):
            floor = c.floor_s(card)
            line += [f"{floor * 1e3:.2f}", f"{floor / together:.1%}", c.bound(card)]
    return table(headings, [*lines, last])


def _by_card() -> list[str]:
    """List what follows from the floors for the targets, by card."""
    small, large = PUBLISHED["1.3B"], PUBLISHED["14B"]
    lines = []
    for name, size in PUBLISHED.items():
        goal = FORWARD_GOAL_S[name]
        seconds = [roofline.forward_floor_s(size, card) for card in _CARDS]
        over = [f"{goal / s:.2f}x" for s in seconds]
        needed = [f"{attention_needed(size, card) / 1e12:.0f} TFLOP/s" for card in _CARDS]
        lines += [
            [f"{name}, one forward", *(f"{s:.3f} s" for s in seconds)],
            [f"{name}, the target of {goal:g} s / the floor", *over],
            [f"{name}, self-attention that the target needs, all else at its limit", *needed],
        ]
    for steps in (4, 50):
        seconds = [roofline.sampling_floor_s(large, steps, card) for card in _CARDS]
        lines.append([f"14B, {steps} steps, text and times once", *(f"{s:.2f} s" for s in seconds)])
    training = {
        f"1.3B pretrain step, {who}": evaluations
        for who, evaluations in roofline.pretrain_evaluations(2, 1).items()
    }
    training["1.3B generator and critic step, either formulation"] = roofline.both_on_policy(1)
    for what, evaluations in training.items():
        seconds = [roofline.training_floor_s(small, evaluations, card) for card in _CARDS]
        lines.append([what, *(f"{s:.2f} s" for s in seconds)])
    return table(["floor", *(card.name for card in _CARDS)], lines)


def _reading() -> list[str]:
    """Write what the tables do not say by themselves."""
    small, large = PUBLISHED["1.3B"], PUBLISHED["14B"]
    attention = {s.name: roofline.forward(s)[0].flops / 1e12 for s in PUBLISHED.values()}
    rest = {s.name: roofline.work(s).flops / 1e12 - attention[s.name] for s in PUBLISHED.values()}
    matrices = 8 * large.dim**2 + 2 * large.dim * large.ffn_dim
    overcount = 2 * large.layers * matrices * large.tokens / 1e12
    ours, peers = (
        [roofline.training_floor_s(small, e, card) for card in _CARDS]
        for e in roofline.pretrain_evaluations(2, 1).values()
    )
    ratios = " and ".join(dict.fromkeys(f"{p / o:.2f}" for o, p in zip(ours, peers, strict=True)))
    notes = [
        f"1.3B: {attention['1.3B']:.0f} TFLOP of self-attention and {rest['1.3B']:.0f} of "
        f"everything else. 14B: {attention['14B']:.0f} and {rest['14B']:.0f}. (All matrices of the "
        f"blocks times all tokens would be {overcount:.0f} TFLOP outside attention at 14B: that "
        "charges every video token for the keys and values of the text, which are computed for "
        f"{large.text_tokens} tokens.)",
        "Where a run finds no attention kernel as fast as a target needs, the second form of that "
        f"target counts: within {NEAR_FLOOR - 1:.0%} of the floor by the rates of the run.",
        "The pretrain step: adapters, checkpointing, a batch of two with one sample of r = t. The "
        f"peers' formulation has {ratios} times our floor; what goes beyond that has to come from "
        "the network.",
    ]
    return [paragraph(note, "- ") for note in notes]


def attention_needed(size: NetworkSize, card: DeviceLimits) -> float:
    """Return the FLOP/s of self-attention with which a forward takes as long as its target."""
    attention, *others = roofline.forward(size)
    return attention.flops / (FORWARD_GOAL_S[size.name] - roofline.floor_s(others, card))


# Tiles --------------------------------------------------------------------------------------------


def padding() -> list[str]:
    """Write the tiles of the models' kernels and what padding the tokens would change."""
    tokens, q = PUBLISHED["1.3B"].tokens, tiles.QUERIES
    more, whole = tiles.padded(tokens), tokens // q
    # usual tile heights with as many tiles after padding; 176 and 192 do not divide the padded
    # tokens
    heights = [h for h in (64, 128, 176, 192, 256) if -(-tokens // h) == -(-more // h)]
    note = (
        f"{tokens} tokens are {whole} x {q} + {tokens - whole * q}, so that the last tile of {q} "
        f"rows holds {more - tokens} rows of nothing. A kernel computes that tile whole either "
        f"way: padding to {more} gives the same number of tiles, the same blocks of keys and the "
        f"same waves, for every tile of {', '.join(map(str, heights))} rows. The prediction is "
        f"therefore no change, and what moves memory moves {more / tokens - 1:.3%} more; padded "
        "keys would have to be masked besides. A gain could only come from a kernel that takes "
        "another path where the last tile is full, which is what the probes measure: cuDNN's "
        "attention on an H200 is one, for keys (performance-log.md, experiment 4). What tiles do "
        f"cost is the last wave on {tiles.MULTIPROCESSORS} multiprocessors, the same with and "
        "without padding:"
    )
    headings = ["kernel, over all tokens", "tile", f"tiles at {tokens}", f"at {more}", "waves"]
    headings += ["waves filled to", "padding, predicted"]
    cells = []
    for name, size in PUBLISHED.items():
        for pad in tiles.padding(size):
            keys = " keys" if pad.part == "self-attention" else ""
            tile = f"{pad.tile[0]} x {pad.tile[1]}{keys}"
            counts = [str(pad.plain.tiles), str(pad.padded.tiles), str(pad.plain.waves)]
            change = [f"{pad.plain.fill:.1%}", percent(pad.change)]
            cells.append([f"{name}, {pad.part}", tile, *counts, *change])
    return ["## Tiles and padding", "", paragraph(note), "", *table(headings, cells), ""]


def predicted(probe: str) -> str:
    """Write the change of a probe's time that the tiles predict; a range if tiles differ in it."""
    network = next((name for name in PUBLISHED if f" {name}:" in probe), None)
    if network is None:
        return ""
    product = "q, k, v in one" if "in one" in probe else "q, k, v or out"
    parts = {"attention": "self-attention", "feed-forward": "feed-forward, up"}
    part = parts.get(probe.split(f" {network}")[0], product)
    changes = sorted({pad.change for pad in tiles.padding(PUBLISHED[network]) if pad.part == part})
    return " to ".join(percent(change) for change in dict.fromkeys((changes[0], changes[-1])))
