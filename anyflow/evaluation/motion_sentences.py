"""Say how much the videos of a run move, as a share of the motion of real ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from anyflow.evaluation.seeds import SeedResults
from anyflow.evaluation.wording import (
    FROZEN,
    NOISE,
    SAME,
    listed,
    look,
    motion_share,
    named,
    percent,
    ratio,
    steps_listed,
    steps_text,
)

SLOW = 0.5  # share of the motion of real videos; the lead names videos that move less


def motion_shares(seeds: SeedResults) -> dict[str, dict[int, float]] | None:
    """Return each method's motion over that of real videos as ``{method: {steps: share}}``.

    Returns None where motion was not measured, or real videos do not move.
    """
    result: dict[str, dict[int, float]] = {}
    for method in seeds.methods:
        for n in seeds.step_counts:
            share = motion_share(seeds.score(method, n), seeds.floor)
            if share is None:
                return None
            result.setdefault(method, {})[n] = share
    return result


def motion_sentence(seeds: SeedResults, methods: Sequence[str]) -> str:
    """Return a sentence about the motion of ``methods``, in percent of that of real videos."""
    shares = motion_shares(seeds)
    if shares is None:
        return (
            "Real videos do not move here."
            if seeds.has_motion
            else "The motion of these videos was not measured."
        )
    text = "; ".join(_moves(seeds, method, shares[method]) for method in methods)
    return f"{text[0].upper()}{text[1:]}."


def motion_warning(seeds: SeedResults, method: str) -> str | None:
    """Return a sentence for the lead where a method's videos move less than half as much as real.

    Returns None for all others.
    """
    shares = motion_shares(seeds)
    if shares is None:
        return None
    if frozen := _frozen(seeds, method):
        return f"But its videos are {frozen}."
    if slow := [n for n, share in shares[method].items() if share < SLOW]:
        return (
            f"But at {steps_listed(slow, seeds.step_counts)} its videos move "
            f"{_most(shares[method], slow)}."
        )
    return None


def motion_finding(seeds: SeedResults) -> str | None:
    """Return where videos move least and most and where they are frozen, noise left out."""
    shares = motion_shares(seeds)
    if shares is None:
        return None
    points = [
        (shares[method][n], method, n) for method in seeds.methods for n in _seen(seeds, method)
    ]
    if not points:
        return None
    least, most = (
        f"{percent(share)} ({named(method)}, {steps_text(n)})"
        for share, method, n in (min(points), max(points))
    )
    frozen = [
        f"{named(method)} is {text}" for method in seeds.methods if (text := _frozen(seeds, method))
    ]
    noise = ", noise left out" if len(points) < len(seeds.methods) * len(seeds.step_counts) else ""
    sentence = f"Videos move between {least} and {most} as much as real ones{noise}"
    return f"{sentence}; {listed(frozen)} (below {percent(FROZEN)})." if frozen else f"{sentence}."


def _moves(seeds: SeedResults, method: str, curve: Mapping[int, float]) -> str:
    videos, frozen, steps = (
        f"the videos of {named(method)}",
        _frozen(seeds, method),
        _seen(seeds, method),
    )
    if frozen and max(curve.values()) < FROZEN:
        return f"{videos} are {frozen}: they move {_most(curve, seeds.step_counts)}"
    noise = [n for n in seeds.step_counts if n not in steps]
    if noise:
        videos = f"{videos} are noise at {steps_listed(noise, seeds.step_counts)}"
        if not steps:
            return videos
        videos = f"{videos}; they"
    first, last = steps[0], steps[-1]
    text = f"{videos} move {percent(curve[first])} as much as real ones at {steps_text(first)}"
    if first != last:
        text += f" and {percent(curve[last])} at {last}"
    least, most = min(steps, key=curve.__getitem__), max(steps, key=curve.__getitem__)
    if ratio(min(curve[first], curve[last]), curve[least]) >= SAME:
        text += f", least at {least} ({percent(curve[least])})"
    if ratio(curve[most], max(curve[first], curve[last])) >= SAME:
        text += f", most at {most} ({percent(curve[most])})"
    return f"{text}, and are {frozen}" if frozen else text


def _seen(seeds: SeedResults, method: str) -> list[int]:
    """Return the step counts at which more than noise, which has no motion, is to be seen."""
    return [n for n in seeds.step_counts if look(seeds.score(method, n), seeds.floor) != NOISE]


def _frozen(seeds: SeedResults, method: str) -> str | None:
    """Say at which steps a method's videos are frozen, and in how many seeds.

    A mean of seeds would hide a frozen one.
    """
    single = [motion_shares(SeedResults.of(run)) for run in seeds.runs]
    runs = [
        [n for n, share in shares[method].items() if share < FROZEN]
        for shares in single
        if shares is not None
    ]
    count = sum(1 for steps in runs if steps)
    if not count:
        return None
    steps = sorted({n for run in runs for n in run})
    text = f"frozen at {steps_listed(steps, seeds.step_counts)}"
    return text if len(single) == 1 else f"{text} in {count} of {len(single)} seeds"


def _most(curve: Mapping[int, float], steps: Sequence[int]) -> str:
    most = max(curve[n] for n in steps)
    return (
        f"{'' if len(steps) == 1 or most == 0 else 'at most '}{percent(most)} as much as real ones"
    )
