"""Test means and ranges of several seeds against numpy's, and what cannot be merged."""

import json
from dataclasses import replace

import numpy as np
import pytest

from anyflow.evaluation import EvaluationResults, SeedResults


def test_means_and_ranges(make_results) -> None:
    distances = [(0.8, 0.36, 0.32), (1.1, 0.3, 0.4), (0.5, 0.6, 0.1)]
    runs = tuple(make_results(on_policy=fd, seed=seed) for seed, fd in enumerate(distances))
    seeds = SeedResults(runs)
    table = np.array(distances)
    assert list(seeds.values("fd")["on_policy"].values()) == pytest.approx(table.mean(0))
    ranges = seeds.ranges("fd")
    assert ranges is not None
    assert list(ranges["on_policy"].values()) == list(zip(table.min(0), table.max(0), strict=True))
    assert seeds.seeds == (0, 1, 2) and seeds.step_counts == (1, 2, 4)
    assert seeds.floor.fd == pytest.approx(0.16)
    assert seeds.seconds == {
        "flow_matching": pytest.approx(183.0),
        "evaluation": pytest.approx(13.5),
    }


def test_one_run_is_itself_and_has_no_ranges(make_results) -> None:
    run = make_results()
    seeds = SeedResults.of(run)
    assert SeedResults.of(seeds) is seeds
    assert seeds.values("coverage_tv") == run.values("coverage_tv") and seeds.ranges("fd") is None


def test_saved_runs_can_be_read_again(make_results, tmp_path) -> None:
    runs = (make_results(seed=0), make_results(seed=1))
    SeedResults(runs).save(tmp_path / "metrics.json")
    content = json.loads((tmp_path / "metrics.json").read_text())
    assert tuple(EvaluationResults.from_dict(run) for run in content["runs"]) == runs


def test_runs_that_cannot_be_merged(make_results) -> None:
    run = make_results(seed=0)
    with pytest.raises(ValueError, match="at least one run"):
        SeedResults(())
    with pytest.raises(ValueError, match="two runs have the seed 0"):
        SeedResults((run, run))
    with pytest.raises(ValueError, match="different budget"):
        SeedResults((run, replace(run, seed=1, budget="full")))
    with pytest.raises(ValueError, match="different methods"):
        SeedResults((run, replace(run, seed=1, curves={"pretrain": run.curves["pretrain"]})))
    with pytest.raises(ValueError, match="different step counts"):
        SeedResults((run, make_results(*[(3.0, 2.0)] * 4, steps=(1, 2), seed=1)))
