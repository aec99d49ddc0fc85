"""Say what the curves of an evaluation show, by comparing the numbers drawn and no others."""

from __future__ import annotations

from collections.abc import Mapping

from anyflow.evaluation.pages.statistics import Curve, Estimate
from anyflow.evaluation.runs.record import EvaluationRecord, MetricRecord
from anyflow.evaluation.wording import FROZEN, listed, percent, steps_listed, steps_text

TOLERANCE = 0.05  # share of the best value with fewer steps; worse by more is called worse
MANY = 3  # more checkpoints than these are counted, not told one by one
_STILL = 1e-4  # shorter sides per frame: a fortieth of a pixel at 256 x 256


def figure(value: float) -> str:
    """Return a value for running text: three significant digits, whole numbers from 100 on."""
    return f"{value:.0f}" if abs(value) >= 99.95 else f"{value:.3g}"


def worse_steps(curve: Curve, better: str | None) -> list[int]:
    """Return the step counts that are worse than the best at fewer, by over ``TOLERANCE``."""
    found: list[int] = []
    best: float | None = None
    for n in sorted(curve):
        value = curve[n].value if better == "higher" else -curve[n].value
        if best is not None and value < best - TOLERANCE * abs(best):
            found.append(n)
        best = value if best is None else max(best, value)
    return found


def lead(record: EvaluationRecord, curves: Mapping[str, Mapping[str, Curve]]) -> list[str]:
    """Return in which metrics more steps hurt, over all checkpoints, for the head of the page."""
    judged = {
        name: by_model
        for name, by_model in curves.items()
        if by_model and record.metrics[name].better is not None
    }
    if len(record.step_counts) == 1 or not any(
        len(curve) > 1 for c in judged.values() for curve in c.values()
    ):
        return []
    hurt: dict[str, list[str]] = {}
    for name, by_model in judged.items():
        worse = [
            m for m, curve in by_model.items() if worse_steps(curve, record.metrics[name].better)
        ]
        if worse:
            hurt[record.metrics[name].title] = worse
    measured = listed([record.metrics[name].title for name in judged])
    if not hurt:
        return [
            f"More steps never hurt here: no value is more than {percent(TOLERANCE)} worse than "
            "the best with fewer "
            f"steps, in {measured}."
        ]
    places = [
        title if len(record.models) == 1 else f"{title} ({_some(models, len(record.models))})"
        for title, models in hurt.items()
    ]
    unhurt = [
        record.metrics[name].title for name in judged if record.metrics[name].title not in hurt
    ]
    kept = f" They do not in {listed(unhurt)}." if unhurt else ""
    return [
        f"More steps hurt, by more than {percent(TOLERANCE)} of the best with fewer, in "
        f"{listed(places)}.{kept}"
    ]


def curve_sentences(metric: MetricRecord, curves: Mapping[str, Curve]) -> list[str]:
    """Return what more steps do to a metric, a sentence per checkpoint or one that counts."""
    if len(curves) > MANY and metric.better is not None:
        hurt = [model for model, curve in curves.items() if worse_steps(curve, metric.better)]
        if all(len(curve) == 1 for curve in curves.values()):
            return []
        if not hurt:
            return [
                f"With none of {len(curves)} checkpoints is it worse with more steps, by more than "
                f"{_tolerance()}."
            ]
        return [
            f"With {_some(hurt, len(curves))} of {len(curves)} checkpoints it is worse with more "
            "steps, by more than "
            f"{_tolerance()}."
        ]
    if len(curves) > MANY:
        return []
    return [
        _sentence(metric, curve, "" if len(curves) == 1 else f"{model}: ")
        for model, curve in curves.items()
    ]


def motion_sentences(curves: Mapping[str, Curve], real: float | None) -> list[str]:
    """Return how much videos move: as a share of real ones, or of the most that any of them move.

    Args:
        curves: ``{model: {steps: estimate}}``, in shorter sides of the frame per frame.
        real: motion of real videos, if it was measured.
    """
    most = max(
        (estimate.value for curve in curves.values() for estimate in curve.values()), default=0.0
    )
    if real is not None and real <= _STILL:
        return ["The real videos do not move, so nothing is compared with them."]
    if most <= _STILL:
        return ["All videos are frozen: nothing moves at any number of steps."]
    unit, whole = (real, "real ones") if real is not None else (most, "those here that move most")
    texts = []
    for model, curve in curves.items():
        frozen = [n for n in sorted(curve) if curve[n].value < FROZEN * unit]
        if len(curves) > MANY and not frozen:
            continue
        texts.append(_moves(f"{model}: " if len(curves) > 1 else "", curve, unit, whole, frozen))
    if len(curves) > MANY and not texts:
        return [
            f"No checkpoint is frozen: each moves at least {percent(FROZEN)} as much as {whole}."
        ]
    return texts


def difference_sentences(
    metric: MetricRecord, differences: Mapping[str, Curve], first: str
) -> list[str]:
    """Return where other checkpoints are better or worse than ``first``.

    A difference counts where its interval does not hold 0, and not without an interval.
    """
    if len(differences) > MANY or metric.better is None:
        return []
    good = 1 if metric.better == "higher" else -1
    texts = []
    for model, curve in differences.items():
        better = [n for n in curve if curve[n].sign == good]
        worse = [n for n in curve if curve[n].sign == -good]
        unknown = [n for n in curve if curve[n].sign == 0 and curve[n].low is not None]
        parts = [
            f"{word} at {steps_listed(where, curve)}"
            for word, where in (("better", better), ("worse", worse), ("not told apart", unknown))
            if where
        ]
        if parts:
            texts.append(f"{model} against {first}: {', '.join(parts)}.")
    return texts


def _sentence(metric: MetricRecord, curve: Curve, name: str) -> str:
    steps = sorted(curve)
    first, last = steps[0], steps[-1]
    if first == last:
        return f"{name}{figure(curve[first].value)} at {steps_text(first)}."
    ends = (
        f"{figure(curve[first].value)} at {steps_text(first)}, {figure(curve[last].value)} at "
        f"{last}"
    )
    if metric.better is None:
        return f"{name}{ends}."
    worse = worse_steps(curve, metric.better)
    if not worse:
        return f"{name}More steps never hurt, by more than {_tolerance()}: {ends}."
    choose = max if metric.better == "higher" else min
    best = choose(steps, key=lambda n: curve[n].value)
    return (
        f"{name}Best at {steps_text(best)} ({figure(curve[best].value)}); worse at "
        f"{_values(worse, curve)}."
    )


def _values(steps: list[int], curve: Curve) -> str:
    return listed([f"{n} ({figure(curve[n].value)})" for n in steps])


def _tolerance() -> str:
    return f"{percent(TOLERANCE)} of the best with fewer"


def _moves(
    name: str, curve: Mapping[int, Estimate], unit: float, whole: str, frozen: list[int]
) -> str:
    steps = sorted(curve)
    first, last = steps[0], steps[-1]
    if len(frozen) == len(steps):
        most = percent(max(estimate.value for estimate in curve.values()) / unit)
        return (
            f"{name}Frozen at {steps_listed(frozen, curve)}: the videos move at most {most} as "
            f"much as {whole}."
        )
    text = (
        f"{name}The videos move {percent(curve[first].value / unit)} as much as {whole} at "
        f"{steps_text(first)}"
    )
    if first != last:
        text += f" and {percent(curve[last].value / unit)} at {last}"
    return f"{text}, and are frozen at {steps_listed(frozen, curve)}." if frozen else f"{text}."


def _some(models: list[str], total: int) -> str:
    return str(len(models)) if total > MANY else listed(models)
