"""What the numbers of a run say, in words. Every sentence is computed; a claim the numbers do not bear is denied."""

from __future__ import annotations

from anyflow.evaluation.plots import method_style
from anyflow.evaluation.results import EvaluationResults

_SAME = 1.1  # ratios below this are within what another seed would change
_FLOW_MAPS = ("on_policy", "pretrain")


def takeaway(results: EvaluationResults) -> str:
    """The any-step claim in one sentence with this run's numbers, or the statement that they do not show it."""
    fd = results.values("fd")
    ours = next((m for m in _FLOW_MAPS if m in fd), None)
    if ours is None or "flow_matching" not in fd:
        return (
            "This run does not compare a flow map with plain flow matching, so it says nothing about any-step sampling."
        )
    first, last = results.steps[0], results.steps[-1]
    few, many, plain = fd[ours][first], fd[ours][last], fd["flow_matching"][first]
    numbers = (
        f"at {_steps(first)} the flow map's Fréchet distance is {number(few)} against {number(plain)} for plain "
        f"flow matching"
    )
    if _ratio(plain, few) < _SAME:
        return f"This run does not show the any-step property: {numbers}."
    lead = f"{numbers[0].upper()}{numbers[1:]}, {_times(plain, few)} lower"
    if first == last:
        return f"{lead}."
    if _ratio(many, few) >= _SAME:
        return f"{lead}. But more steps make it worse: {number(many)} at {last}, so this run shows half of the claim."
    best, at = min((value, n) for n, value in fd[ours].items())
    if _ratio(many, best) >= _SAME:
        return (
            f"{lead}; more steps improve it to {number(best)} at {at}, and then it rises to {number(many)} at {last}."
        )
    trend = "improve it further" if _ratio(few, many) >= _SAME else "keep it there"
    return f"{lead}; more steps {trend} ({number(many)} at {last})."


def findings(results: EvaluationResults) -> list[str]:
    """One sentence for each comparison that the curves allow, in the order of the story."""
    sentences = [
        _plain_needs_steps(results),
        _stages(results),
        _samplers(results),
        _many_steps(results),
        _distance_to_floor(results),
    ]
    return [s for s in sentences if s is not None]


def number(value: float) -> str:
    """A metric for running text: two significant digits below 10, whole numbers above."""
    if value >= 9.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 0.995 else f"{value:.2f}" if value >= 0.0995 else f"{value:.2g}"


def _plain_needs_steps(results: EvaluationResults) -> str | None:
    curve = results.values("fd").get("flow_matching")
    first, last = results.steps[0], results.steps[-1]
    if curve is None or first == last:
        return None
    if _ratio(curve[first], curve[last]) < _SAME:
        return (
            f"Plain flow matching gains nothing from steps here: {number(curve[first])} at {first}, "
            f"{number(curve[last])} at {last}."
        )
    return (
        f"Plain flow matching needs its steps: its Fréchet distance falls from {number(curve[first])} at "
        f"{_steps(first)} to {number(curve[last])} at {last}."
    )


def _stages(results: EvaluationResults) -> str | None:
    fd, first = results.values("fd"), results.steps[0]
    if not all(m in fd for m in _FLOW_MAPS):
        return None
    one, two = fd["pretrain"][first], fd["on_policy"][first]
    numbers = f"{number(one)} after stage 1, {number(two)} after stage 2"
    if _ratio(one, two) >= _SAME:
        return f"The on-policy stage helps most where steps are few; at {_steps(first)}: {numbers}."
    if _ratio(two, one) >= _SAME:
        return f"The on-policy stage made {_steps(first)} worse in this run: {numbers}."
    return f"The on-policy stage changed little at {_steps(first)}: {numbers}."


def _samplers(results: EvaluationResults) -> str | None:
    tv, first, last = results.values("coverage_tv"), results.steps[0], results.steps[-1]
    if "on_policy" not in tv or "consistency_sampler" not in tv or first == last:
        return None
    flow, renoise = tv["on_policy"], tv["consistency_sampler"]
    numbers = (
        f"coverage error from {_steps(first)} to {last}: {flow[first]:.2f} to {flow[last]:.2f} for the flow map, "
        f"{renoise[first]:.2f} to {renoise[last]:.2f} for the consistency sampler"
    )
    if _ratio(renoise[last], renoise[first]) >= _SAME and _ratio(renoise[last], flow[last]) >= _SAME:
        return f"The same weights under a consistency sampler get worse with steps ({numbers})."
    return f"The same weights under a consistency sampler do not lose coverage with steps in this run ({numbers})."


def _many_steps(results: EvaluationResults) -> str | None:
    fd, last = results.values("fd"), results.steps[-1]
    ours = next((m for m in _FLOW_MAPS if m in fd), None)
    if ours is None or "flow_matching" not in fd or last == results.steps[0]:
        return None
    flow, plain = fd[ours][last], fd["flow_matching"][last]
    numbers = f"{number(plain)} against {number(flow)} for the flow map"
    if _ratio(flow, plain) >= _SAME:
        return f"With {last} steps plain flow matching is the better sampler here: {numbers}."
    if _ratio(plain, flow) >= _SAME:
        return f"Even with {last} steps plain flow matching stays behind: {numbers}."
    return f"With {last} steps plain flow matching has caught up: {numbers}."


def _distance_to_floor(results: EvaluationResults) -> str:
    score, method, steps = min((v, m, n) for m, c in results.values("fd").items() for n, v in c.items())
    floor = results.floor.fd
    if floor == 0 or _ratio(score, floor) >= _SAME:
        return (
            f"Nothing here is perfect: the lowest distance of all is {number(score)} ({method_style(method)[0]}, "
            f"{_steps(steps)}), while real videos score {number(floor)} against each other."
        )
    return (
        f"The lowest distance of all, {number(score)} ({method_style(method)[0]}, {_steps(steps)}), cannot be told "
        f"from real videos, which score {number(floor)} against each other."
    )


def _ratio(a: float, b: float) -> float:
    return a / max(b, 1e-12)


def _times(a: float, b: float) -> str:
    ratio = _ratio(a, b)
    return f"{ratio:.0f} times" if ratio >= 9.5 else f"{ratio:.1f} times"


def _steps(n: int) -> str:
    return "1 step" if n == 1 else f"{n} steps"
