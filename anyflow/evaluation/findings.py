"""Say what the numbers of a run show, metric by metric, and deny what they do not bear."""

from __future__ import annotations

from anyflow.evaluation.motion_sentences import motion_finding
from anyflow.evaluation.plots import method_style
from anyflow.evaluation.results import EvaluationResults
from anyflow.evaluation.seeds import SeedResults
from anyflow.evaluation.wording import SAME, number, ratio, steps_text

FLOW_MAPS = ("on_policy", "pretrain")


def findings(results: EvaluationResults | SeedResults) -> list[str]:
    """Return one sentence for each comparison that the curves allow, in the order of the story."""
    results = SeedResults.of(results)
    sentences = [
        _plain_needs_steps(results),
        _stages(results),
        _samplers(results),
        _many_steps(results),
        motion_finding(results),
        _distance_to_floor(results),
    ]
    return [s for s in sentences if s is not None]


def _plain_needs_steps(results: SeedResults) -> str | None:
    curve = results.values("fd").get("flow_matching")
    first, last = results.step_counts[0], results.step_counts[-1]
    if curve is None or first == last:
        return None
    if ratio(curve[first], curve[last]) < SAME:
        return (
            f"Plain flow matching gains nothing from steps here: {number(curve[first])} at "
            f"{first}, "
            f"{number(curve[last])} at {last}."
        )
    return (
        "Plain flow matching needs its steps: its Fréchet distance falls from "
        f"{number(curve[first])} at "
        f"{steps_text(first)} to {number(curve[last])} at {last}."
    )


def _stages(results: SeedResults) -> str | None:
    fd, first = results.values("fd"), results.step_counts[0]
    if not all(m in fd for m in FLOW_MAPS):
        return None
    one, two = fd["pretrain"][first], fd["on_policy"][first]
    numbers = f"{number(one)} after stage 1, {number(two)} after stage 2"
    if ratio(one, two) >= SAME:
        return (
            f"The on-policy stage helps most where steps are few; at {steps_text(first)}: "
            f"{numbers}."
        )
    if ratio(two, one) >= SAME:
        return f"The on-policy stage made {steps_text(first)} worse in this run: {numbers}."
    return f"The on-policy stage changed little at {steps_text(first)}: {numbers}."


def _samplers(results: SeedResults) -> str | None:
    tv, first, last = results.values("coverage_tv"), results.step_counts[0], results.step_counts[-1]
    if "on_policy" not in tv or "consistency_sampler" not in tv or first == last:
        return None
    flow, renoise = tv["on_policy"], tv["consistency_sampler"]
    numbers = (
        f"coverage error from {steps_text(first)} to {last}: {flow[first]:.2f} to {flow[last]:.2f} "
        "for the flow map, "
        f"{renoise[first]:.2f} to {renoise[last]:.2f} for the consistency sampler"
    )
    if ratio(renoise[last], renoise[first]) >= SAME and ratio(renoise[last], flow[last]) >= SAME:
        return f"The same weights under a consistency sampler get worse with steps ({numbers})."
    return (
        "The same weights under a consistency sampler do not lose coverage with steps in this run "
        f"({numbers})."
    )


def _many_steps(results: SeedResults) -> str | None:
    fd, last = results.values("fd"), results.step_counts[-1]
    flow_map = next((m for m in FLOW_MAPS if m in fd), None)
    if flow_map is None or "flow_matching" not in fd or last == results.step_counts[0]:
        return None
    flow, plain = fd[flow_map][last], fd["flow_matching"][last]
    numbers = f"{number(plain)} against {number(flow)} for the flow map"
    if ratio(flow, plain) >= SAME:
        return f"With {last} steps plain flow matching is the better sampler here: {numbers}."
    if ratio(plain, flow) >= SAME:
        return f"Even with {last} steps plain flow matching stays behind: {numbers}."
    return f"With {last} steps plain flow matching has caught up: {numbers}."


def _distance_to_floor(results: SeedResults) -> str:
    score, method, steps = min(
        (v, m, n) for m, c in results.values("fd").items() for n, v in c.items()
    )
    floor = results.floor.fd
    if floor == 0 or ratio(score, floor) >= SAME:
        return (
            f"No method is perfect: the lowest distance of all is {number(score)} "
            f"({method_style(method)[0]}, "
            f"{steps_text(steps)}), while real videos score {number(floor)} against each other."
        )
    return (
        f"The lowest distance of all, {number(score)} ({method_style(method)[0]}, "
        f"{steps_text(steps)}), cannot be told "
        f"from real videos, which score {number(floor)} against each other."
    )
