"""Write the tables of ``docs/performance.md`` that are computed: limits by card, and floors."""

from __future__ import annotations

from collections.abc import Iterator

import roofline
from layout import table
from roofline import DeviceLimits
from sizes import PUBLISHED, NetworkSize

from page.targets import FORWARD_GOAL_S

CARDS = (roofline.H100, roofline.H200)


def cards() -> list[str]:
    """List the limits of the cards."""
    lines = [
        [c.name, f"{c.flops / 1e12:.0f} TFLOP/s", f"{c.bandwidth / 1e12:.1f} TB/s", c.source]
        for c in CARDS
    ]
    return table(["card", "bf16 product", "copy", "source"], lines, right=4)


def components() -> Iterator[list[str]]:
    """Write a table for each network: FLOPs, bytes and floors of its components."""
    for size in PUBLISHED.values():
        parts, whole = roofline.forward(size), roofline.work(size)
        headings = [f"{size.name} ({size.parameters / 1e9:.2f} B parameters)", "TFLOP", "GB"]
        last = ["all", f"{whole.flops / 1e12:.1f}", f"{whole.bytes / 1e9:.1f}"]
        lines = [[c.name, f"{c.flops / 1e12:.2f}", f"{c.bytes / 1e9:.1f}"] for c in parts]
        for card in CARDS:
            headings += [f"floor on an {card.name}, ms", "share", "bound by"]
            together = roofline.floor_s(parts, card)
            last += [f"{together * 1e3:.1f}", "100 %", ""]
            for line, c in zip(lines, parts, strict=True):
                floor = c.floor_s(card)
                line += [f"{floor * 1e3:.2f}", f"{floor / together:.1%}", c.bound(card)]
        yield table(headings, [*lines, last])


def by_card() -> list[str]:
    """List what follows from the floors for the targets, by card."""
    lines = []

    def add(what: str, shown: str, values: list[float]) -> None:
        lines.append([what, *(shown.format(value) for value in values)])

    for name, size in PUBLISHED.items():
        goal, seconds = FORWARD_GOAL_S[name], [roofline.forward_floor_s(size, c) for c in CARDS]
        add(f"{name}, one forward", "{:.3f} s", seconds)
        over = [goal / s for s in seconds]
        add(f"{name}, the target of {goal:g} s / the floor", "{:.2f}x", over)
        needed = [_attention_needed(size, card) / 1e12 for card in CARDS]
        what = "self-attention that the target needs, all else at its limit"
        add(f"{name}, {what}", "{:.0f} TFLOP/s", needed)
    for steps in (4, 50):
        seconds = [roofline.sampling_floor_s(PUBLISHED["14B"], steps, card) for card in CARDS]
        add(f"14B, {steps} steps, text and times once", "{:.2f} s", seconds)
    training = {
        f"1.3B pretrain step, {who}": evaluations
        for who, evaluations in roofline.pretrain_evaluations(2, 1).items()
    }
    training["1.3B generator and critic step, either formulation"] = roofline.both_on_policy(1)
    for what, evaluations in training.items():
        small = PUBLISHED["1.3B"]
        seconds = [roofline.training_floor_s(small, evaluations, card) for card in CARDS]
        add(what, "{:.2f} s", seconds)
    return table(["floor", *(card.name for card in CARDS)], lines)


def _attention_needed(size: NetworkSize, card: DeviceLimits) -> float:
    """Return the FLOP/s of self-attention with which a forward takes as long as its target."""
    attention, *others = roofline.forward(size)
    return attention.flops / (FORWARD_GOAL_S[size.name] - roofline.floor_s(others, card))
