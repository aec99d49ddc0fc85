"""Say in plain words what a run shows; every sentence follows from the numbers."""

from __future__ import annotations

from collections.abc import Mapping

from anyflow.evaluation.findings import FLOW_MAPS
from anyflow.evaluation.motion_sentences import motion_sentence, motion_warning
from anyflow.evaluation.results import EvaluationResults
from anyflow.evaluation.seeds import SeedResults
from anyflow.evaluation.wording import (
    SAME,
    listed,
    look,
    named,
    number,
    ratio,
    steps_text,
    times_text,
)


def main_methods(results: EvaluationResults | SeedResults) -> tuple[str, ...]:
    """Return plain flow matching and the flow map of the story; without them, every method."""
    methods = SeedResults.of(results).methods
    flow_map = _flow_map(methods)
    return (
        tuple(methods)
        if flow_map is None or "flow_matching" not in methods
        else ("flow_matching", flow_map)
    )


def takeaway(results: EvaluationResults | SeedResults) -> str:
    """Say what plain flow matching and the flow map give in the fewest steps, and what more do."""
    seeds = SeedResults.of(results)
    fd = seeds.values("fd")
    flow_map = _flow_map(seeds.methods)
    does = "This run does" if len(seeds.runs) == 1 else "These runs do"
    if flow_map is None or "flow_matching" not in fd:
        return (
            f"{does} not compare a flow map with plain flow matching, so nothing is said here "
            "about few steps."
        )
    first = seeds.step_counts[0]
    start = f"In {steps_text(first)}"
    factor = ratio(fd["flow_matching"][first], fd[flow_map][first])
    if factor < SAME:
        compared = (
            "farther from real videos than"
            if 1 / max(factor, 1e-12) >= SAME
            else "as far from real videos as"
        )
        return (
            f"{does} not show what a flow map is for: in {steps_text(first)} its videos are "
            f"{compared} those "
            f"of plain flow matching."
        )
    plain, mapped = (
        look(seeds.score(method, first), seeds.floor) for method in ("flow_matching", flow_map)
    )
    closer = f"{times_text(fd['flow_matching'][first], fd[flow_map][first])} closer to real videos"
    if plain == mapped:
        lead = f"{start} both give {plain}; the flow map's videos are {closer}"
    else:
        lead = f"{start} plain flow matching gives {plain}; the flow map gives {mapped}, {closer}"
    sentences = (
        f"{lead}{_agreement(seeds, flow_map)}.",
        _more_steps(fd[flow_map]),
        motion_warning(seeds, flow_map),
    )
    return " ".join(sentence for sentence in sentences if sentence)


def figure_sentences(results: EvaluationResults | SeedResults) -> dict[str, str]:
    """Return one sentence for each figure, by its name.

    The names are ``"videos"`` (of the first seed), and the metric of each chart.
    """
    seeds = SeedResults.of(results)
    return {
        "videos": _videos(seeds.runs[0]),
        "fd": _distances(seeds),
        "template_mse": _trends(
            seeds, "template_mse", main_methods(seeds), "the difference to the nearest real clip"
        ),
        "coverage_tv": _trends(
            seeds, "coverage_tv", _samplers(seeds), "the unevenness of positions"
        ),
        "motion": motion_sentence(seeds, main_methods(seeds)),
    }


def trend(curve: Mapping[int, float]) -> str:
    """Say how a metric changes with the steps, as the end of a sentence about the metric.

    Changes by less than a factor of ``SAME`` do not count: another seed would change as much.
    """
    steps = sorted(curve)
    first, last, best = steps[0], steps[-1], _best(curve)
    if first == last:
        return f"is {number(curve[first])} at {steps_text(first)}"
    if ratio(max(curve.values()), curve[best]) < SAME:
        return f"stays about the same from {first} to {last} steps"
    falls, rises = ratio(curve[first], curve[best]) >= SAME, ratio(curve[last], curve[best]) >= SAME
    if falls and rises:
        return f"falls until {steps_text(best)} and rises again to {number(curve[last])} at {last}"
    if rises:
        return (
            f"rises with more steps, from {number(curve[first])} at {steps_text(first)} to "
            f"{number(curve[last])}"
        )
    if not falls:
        return f"rises between {first} and {last} steps and comes back"
    reached = next(
        n for n in steps if all(ratio(curve[m], curve[best]) < SAME for m in steps if m >= n)
    )
    return (
        f"falls up to {last} steps"
        if reached == last
        else f"falls until {steps_text(reached)} and then stays"
    )


def _flow_map(methods: tuple[str, ...]) -> str | None:
    return next((method for method in FLOW_MAPS if method in methods), None)


def _best(curve: Mapping[int, float]) -> int:
    return min(sorted(curve), key=lambda n: curve[n])


def _agreement(seeds: SeedResults, flow_map: str) -> str:
    """Say in how many of several seeds the flow map is ahead at the fewest steps."""
    if len(seeds.runs) == 1:
        return ""
    first = seeds.step_counts[0]
    curves = [run.values("fd") for run in seeds.runs]
    factors = [ratio(curve["flow_matching"][first], curve[flow_map][first]) for curve in curves]
    return (
        f" (on average; ahead in {sum(factor >= SAME for factor in factors)} of {len(factors)} "
        "seeds)"
    )


def _more_steps(curve: Mapping[int, float]) -> str:
    first, last, best = min(curve), max(curve), _best(curve)
    if first == last:
        return ""
    falls, rises = ratio(curve[first], curve[best]) >= SAME, ratio(curve[last], curve[best]) >= SAME
    if rises and ratio(curve[last], curve[first]) >= SAME:
        return f"But at {last} steps it is worse than at {first}, which a flow map should not be."
    if falls and rises:
        much = "slightly " if ratio(curve[last], curve[best]) < 1.5 else ""
        return f"More steps help up to {best}; at {last} it is {much}worse again."
    return f"More steps help further, up to {best}." if falls else "More steps keep that quality."


def _videos(run: EvaluationResults) -> str:
    """Say from which number of steps on each method's videos look like what."""
    parts = []
    for method in main_methods(run):
        words = [look(run.curves[method][n], run.floor) for n in run.step_counts]
        starts = [i for i in range(len(words)) if i == 0 or words[i] != words[i - 1]]
        told = [
            f"{words[i]} {'at' if i + 1 in starts or i + 1 == len(words) else 'from'} "
            f"{steps_text(run.step_counts[i])}"
            for i in starts
        ]
        parts.append(f"{named(method)} gives {listed(told)}")
    return _sentence("; ".join(parts))


def _distances(seeds: SeedResults) -> str:
    curves, methods = seeds.values("fd"), main_methods(seeds)
    if methods != ("flow_matching", _flow_map(seeds.methods)):
        return _trends(seeds, "fd", methods, "the distance from real videos")
    plain, mapped = (curves[method] for method in methods)
    ahead = [n for n in seeds.step_counts if ratio(plain[n], mapped[n]) >= SAME]
    behind = [n for n in seeds.step_counts if ratio(mapped[n], plain[n]) >= SAME]
    every = (
        "every number of steps" if len(seeds.step_counts) > 1 else steps_text(seeds.step_counts[0])
    )
    alike = [n for n in seeds.step_counts if n not in ahead and n not in behind]
    parts = [
        f"{text} at {listed([str(n) for n in where])}"
        if len(where) < len(seeds.step_counts)
        else f"{text} at {every}"
        for text, where in (
            ("the flow map is closer to real videos", ahead),
            ("plain flow matching is closer", behind),
            ("both are alike", alike),
        )
        if where
    ]
    unit = "" if len(parts) == 1 else " steps"
    counts = f"{', '.join(parts)}{unit}"
    return _sentence(f"{counts}; the flow map's distance {trend(mapped)}")


def _samplers(seeds: SeedResults) -> tuple[str, ...]:
    both = tuple(m for m in (_flow_map(seeds.methods), "consistency_sampler") if m in seeds.methods)
    return tuple(m for m in both if m is not None) if len(both) == 2 else main_methods(seeds)


def _trends(seeds: SeedResults, metric: str, methods: tuple[str, ...], subject: str) -> str:
    curves = seeds.values(metric)
    parts = [f"with {named(methods[0])} {subject} {trend(curves[methods[0]])}"]
    parts += [f"with {named(method)} it {trend(curves[method])}" for method in methods[1:]]
    return _sentence("; ".join(parts))


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
