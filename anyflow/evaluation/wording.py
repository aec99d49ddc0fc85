"""Put numbers, step counts and methods into words for running text."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from anyflow.evaluation.metrics import Metrics
from anyflow.evaluation.plots import method_style

SAME = 1.1  # ratios below this are within what another seed would change

FROZEN = 0.05  # share of the motion of real videos; less motion cannot be seen
_STILL = 1e-6  # real videos that move less do not move

# Words for videos by their mean squared difference to the nearest real one, where 1 is the variance
# of the data.
NOISE = "noise"
FROZEN_PICTURES = "frozen pictures"
QUALITY_LEVELS = ((0.6, NOISE), (0.25, "blurred shapes"), (0.1, "shapes"), (0.0, "clear shapes"))


def number(value: float) -> str:
    """Return a metric for running text: two significant digits below 10, whole numbers above."""
    if value >= 9.95:
        return f"{value:.0f}"
    return (
        f"{value:.1f}" if value >= 0.995 else f"{value:.2f}" if value >= 0.0995 else f"{value:.2g}"
    )


def ratio(a: float, b: float) -> float:
    """Return ``a / b``, a large number where ``b`` is 0."""
    return a / max(b, 1e-12)


def times_text(a: float, b: float) -> str:
    """Return ``a / b`` in words, such as ``20 times``."""
    factor = ratio(a, b)
    return f"{factor:.0f} times" if factor >= 9.5 else f"{factor:.1f} times"


def percent(share: float) -> str:
    """Return a share in percent: whole numbers, one significant digit below 1 %."""
    value = 100 * share
    return f"{value:.0f} %" if value >= 0.95 or value == 0 else f"{value:.1g} %"


def steps_text(n: int) -> str:
    """Return a number of steps in words, such as ``1 step``."""
    return "1 step" if n == 1 else f"{n} steps"


def steps_listed(steps: Sequence[int], of: Collection[int]) -> str:
    """Return step counts in words, such as ``1 and 2 steps``.

    All of several step counts are ``every number of steps``.
    """
    if len(of) > 1 and len(steps) == len(of):
        return "every number of steps"
    return steps_text(steps[0]) if len(steps) == 1 else f"{listed([str(n) for n in steps])} steps"


def named(method: str) -> str:
    """Return the name of a method for the middle of a sentence."""
    label = method_style(method)[0]
    return label if method == "flow_matching" else f"the {label}"


def listed(items: Sequence[str]) -> str:
    """Return ``items`` as a list in a sentence: ``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def quality(template_mse: float) -> str:
    """Return a word for videos with this ``template_mse``, by ``QUALITY_LEVELS``."""
    return next(word for least, word in QUALITY_LEVELS if template_mse >= least)


def look(score: Metrics, real: Metrics) -> str:
    """Return a word for videos with this ``score``: frozen, or their :func:`quality`."""
    share = motion_share(score, real)
    return FROZEN_PICTURES if share is not None and share < FROZEN else quality(score.template_mse)


def motion_share(score: Metrics, real: Metrics) -> float | None:
    """Return the motion of videos over that of real ones.

    Returns None without motion, or where real videos do not move.
    """
    if score.motion is None or real.motion is None or real.motion <= _STILL:
        return None
    return score.motion / real.motion
