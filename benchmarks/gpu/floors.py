"""Writes what ``docs/performance.md`` computes: limits by card, floors, tiles and padding; and
others' figures.
"""

from __future__ import annotations

import textwrap

from gpu import roofline, tiles
from gpu.device_tables import percent
from gpu.results import table
from gpu.roofline import CARDS, Limits
from gpu.sizes import PUBLISHED, Size
from gpu.targets import ANCHORS, FORWARD_GOAL_S, NEAR_FLOOR

_CARDS = tuple(CARDS.values())


def wrapped(text: str, first: str = "") -> str:
    """Break a paragraph, or an item of a list, into lines."""
    return textwrap.fill(
        text, 120, initial_indent=first, subsequent_indent=" " * len(first), break_on_hyphens=False
    )


def anchors() -> list[str]:
    """Write what others published for the same forward."""
    note = (
        "What others published for one dense bf16 forward at 480x832, 81 frames, on one GPU. These "
        "figures are theirs: "
        "nothing in this project measured them, and other versions, clocks and details of the "
        "model stand behind them."
    )
    rows = [[a.network, f"{a.seconds:.2f} s", a.card, a.who, a.source] for a in ANCHORS]
    lines = table(["network", "one forward", "card", "software", "source"], rows, right=5)
    return ["### Anchors: others' published figures", "", wrapped(note), "", *lines, ""]


def floors() -> list[str]:
    """Write the roofline note: limits by card, and a table of components for each network."""
    explanation = (
        f"One forward at 480x832, 81 frames, is {PUBLISHED['1.3B'].tokens} tokens. The tables "
        "count its FLOPs and the "
        "least bytes that it must move, component by component (`benchmarks/gpu/roofline.py`; the "
        "count of FLOPs is "
        "`torch.utils.flop_counter`'s, checked on real models). A component takes at least the "
        "longer of its FLOPs at "
        "the rate of a large bf16 matrix product and its bytes at the bandwidth of a copy; "
        "components follow one "
        "another. What reaches neither limit takes longer. A run is held against the limits that "
        "it measured itself; "
        "these are for cards without a run:"
    )
    limits = [
        [c.name, f"{c.flops / 1e12:.0f} TFLOP/s", f"{c.bandwidth / 1e12:.1f} TB/s", c.source]
        for c in _CARDS
    ]
    image = "![Share of the floor by component](images/performance_floor.png)"
    lines = ["## The floor", "", wrapped(explanation), ""]
    lines += [*table(["card", "bf16 product", "copy", "source"], limits, right=4), "", image, ""]
    for name, size in PUBLISHED.items():
        lines += [
            *_components(
                f"{name} ({size.parameters / 1e9:.2f} B parameters)", roofline.forward(size)
            ),
            "",
        ]
    return [*lines, *_by_card(), "", *_reading(), ""]


def difference() -> float:
    """Return the largest difference between the cards' floors of a forward, as a share."""
    by_card = [
        [roofline.forward_floor_s(size, card) for card in _CARDS] for size in PUBLISHED.values()
    ]
    return max(max(seconds) / min(seconds) - 1 for seconds in by_card)


def _components(heading: str, components: list[roofline.Component]) -> list[str]:
    headings = [heading, "TFLOP", "GB"]
    for card in _CARDS:
        headings += [f"floor on an {card.name}, ms", "share", "bound by"]
    rows = []
    for c in components:
        row = [c.name, f"{c.flops / 1e12:.2f}", f"{c.bytes / 1e9:.1f}"]
        for card in _CARDS:
            floor = c.floor_s(card)
            row += [
                f"{floor * 1e3:.2f}",
                f"{floor / roofline.floor_s(components, card):.1%}",
                c.bound(card),
            ]
        rows.append(row)
    whole = roofline.total(components)
    last = ["all", f"{whole.flops / 1e12:.1f}", f"{whole.bytes / 1e9:.1f}"]
    for card in _CARDS:
        last += [f"{roofline.floor_s(components, card) * 1e3:.1f}", "100 %", ""]
    return table(headings, [*rows, last])


def _by_card() -> list[str]:
    """List what follows from the floors for the targets, by card."""
    small, large = PUBLISHED["1.3B"], PUBLISHED["14B"]
    rows = []
    for name, size in PUBLISHED.items():
        goal, seconds = (
            FORWARD_GOAL_S[name],
            [roofline.forward_floor_s(size, card) for card in _CARDS],
        )
        rows.append([f"{name}, one forward", *(f"{s:.3f} s" for s in seconds)])
        rows.append(
            [
                f"{name}, the target of {goal:g} s / the floor",
                *(f"{goal / s:.2f}x" for s in seconds),
            ]
        )
        needed = [f"{attention_needed(size, card) / 1e12:.0f} TFLOP/s" for card in _CARDS]
        rows.append(
            [f"{name}, self-attention that the target needs, all else at its limit", *needed]
        )
    for steps in (4, 50):
        seconds = [roofline.sampling_floor_s(large, steps, card) for card in _CARDS]
        rows.append([f"14B, {steps} steps, text and times once", *(f"{s:.2f} s" for s in seconds)])
    for who, evaluations in roofline.pretrain_evaluations(2, 1).items():
        seconds = [roofline.training_floor_s(small, evaluations, card) for card in _CARDS]
        rows.append([f"1.3B pretrain step, {who}", *(f"{s:.2f} s" for s in seconds)])
    both = roofline.on_policy_evaluations(1)["ours"]
    seconds = [roofline.training_floor_s(small, both, card) for card in _CARDS]
    rows.append(
        ["1.3B generator and critic step, either formulation", *(f"{s:.2f} s" for s in seconds)]
    )
    return table(["floor", *(card.name for card in _CARDS)], rows)


def _reading() -> list[str]:
    """Write what the tables do not say by themselves."""
    small, large = PUBLISHED["1.3B"], PUBLISHED["14B"]
    attention = {size.name: roofline.forward(size)[0].flops / 1e12 for size in PUBLISHED.values()}
    rest = {
        s.name: roofline.total(roofline.forward(s)).flops / 1e12 - attention[s.name]
        for s in PUBLISHED.values()
    }
    overcount = (
        2 * large.layers * (8 * large.dim**2 + 2 * large.dim * large.ffn_dim) * large.tokens / 1e12
    )
    ours, peers = (
        [roofline.training_floor_s(small, e, card) for card in _CARDS]
        for e in roofline.pretrain_evaluations(2, 1).values()
    )
    ratios = " and ".join(dict.fromkeys(f"{p / o:.2f}" for o, p in zip(ours, peers, strict=True)))
    notes = [
        f"1.3B: {attention['1.3B']:.0f} TFLOP of self-attention and {rest['1.3B']:.0f} of "
        "everything else. 14B: "
        f"{attention['14B']:.0f} and {rest['14B']:.0f}. (All matrices of the blocks times all "
        "tokens would be "
        f"{overcount:.0f} TFLOP outside attention at 14B: that charges every video token for the "
        "keys and values of "
        f"the text, which are computed for {large.text_tokens} tokens.)",
        "Where a run finds no attention kernel as fast as a target needs, the second form of that "
        "target counts: "
        f"within {NEAR_FLOOR - 1:.0%} of the floor by the rates of the run.",
        "The pretrain step: adapters, checkpointing, a batch of two with one sample of r = t. The "
        "peers' formulation "
        f"has {ratios} times our floor; what goes beyond that has to come from the network.",
    ]
    return [wrapped(note, "- ") for note in notes]


def attention_needed(size: Size, card: Limits) -> float:
    """Return the FLOP/s of self-attention with which a forward takes exactly as long as its
    target.
    """
    attention, *others = roofline.forward(size)
    return attention.flops / (FORWARD_GOAL_S[size.name] - roofline.floor_s(others, card))


def padding() -> list[str]:
    """Write the tiles of the models' kernels and what padding the tokens would change."""
    tokens = PUBLISHED["1.3B"].tokens
    more, rows = tiles.padded(tokens), tokens // tiles.QUERIES
    note = (
        f"{tokens} tokens are {rows} x {tiles.QUERIES} + {tokens - rows * tiles.QUERIES}, so that "
        "the last tile of "
        f"{tiles.QUERIES} rows holds {more - tokens} rows of nothing. A kernel computes that tile "
        "whole either way: "
        f"padding to {more} gives the same number of tiles, the same blocks of keys and the same "
        "waves, for every tile "
        f"of {', '.join(map(str, _same()))} rows. The prediction is therefore no change, and what "
        "moves memory moves "
        f"{more / tokens - 1:.3%} more; padded keys would have to be masked besides. A gain could "
        "only come from a "
        "kernel that takes another path where the last tile is full, which is what the probes "
        "measure: cuDNN's "
        "attention on an H200 is one, for keys (performance-log.md, experiment 4). What tiles do "
        f"cost is the last wave on {tiles.MULTIPROCESSORS} multiprocessors, the same with and "
        "without padding:"
    )
    headings = [
        "kernel, over all tokens",
        "tile",
        f"tiles at {tokens}",
        f"at {more}",
        "waves",
        "waves filled to",
    ]
    headings += ["padding, predicted"]
    cells = []
    for name, size in PUBLISHED.items():
        for pad in tiles.padding(size):
            tile = f"{pad.tile[0]} x {pad.tile[1]}" + (
                " keys" if pad.part == "self-attention" else ""
            )
            counts = [str(pad.plain.tiles), str(pad.padded.tiles), str(pad.plain.waves)]
            cells.append(
                [f"{name}, {pad.part}", tile, *counts, f"{pad.plain.fill:.1%}", percent(pad.change)]
            )
    return ["## Tiles and padding", "", wrapped(note), "", *table(headings, cells), ""]


def _same() -> list[int]:
    """List usual tile heights with as many tiles after padding; 176 and 192 do not divide the
    padded tokens.
    """
    tokens = PUBLISHED["1.3B"].tokens
    more = tiles.padded(tokens)
    return [
        h
        for h in (64, 128, 176, 192, 256)
        if tiles.Grid(-(-tokens // h)) == tiles.Grid(-(-more // h))
    ]
