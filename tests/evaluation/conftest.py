"""Results of runs with chosen curves."""

from collections.abc import Callable

import pytest

from anyflow.evaluation import EvaluationResults, Metrics


@pytest.fixture(scope="session")
def make_results() -> Callable[..., EvaluationResults]:
    """Build results at 1, 2 and 4 steps; the template error is a fiftieth of the distance, real
    videos move by 0.08.
    """

    def make(
        flow_matching: tuple[float, ...] = (54.0, 8.0, 0.17),
        pretrain: tuple[float, ...] = (1.95, 0.4, 0.36),
        on_policy: tuple[float, ...] = (0.82, 0.36, 0.32),
        consistency: tuple[float, ...] = (0.14, 0.2, 0.25),
        steps: tuple[int, ...] = (1, 2, 4),
        motion: tuple[float, ...] | None = (0.08,),
        seed: int = 7,
    ) -> EvaluationResults:
        def curve(fd: tuple[float, ...], tv: tuple[float, ...]) -> dict[int, Metrics]:
            moves = (None,) if motion is None else motion
            return {
                n: Metrics(f, f / 50, t, m)
                for n, f, t, m in zip(
                    steps, fd, tv, moves * (len(steps) // len(moves)), strict=True
                )
            }

        even = (0.1,) * len(steps)
        curves = {
            "flow_matching": curve(flow_matching, even),
            "pretrain": curve(pretrain, even),
            "on_policy": curve(on_policy, even),
            "consistency_sampler": curve(on_policy, consistency),
        }
        seconds = {"flow_matching": 61.0, "evaluation": 4.5}
        floor = Metrics(0.16, 0.0, 0.09, None if motion is None else 0.08)
        return EvaluationResults(floor, curves, seconds, seed, "fast")

    return make
