"""Test benchmarks/tune_rows.py without a GPU: candidates, wrong ones, a whole tiny run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")


import tune_rows
from tune_rows import Task

CPU = torch.device("cpu")
TODAY = {"num_warps": 2, "STAGES": 1, "TOKENS": 16}


def task(call: Any = lambda: torch.ones(4), dim: int = 1536) -> Task:
    return Task("kernel", dim, 1000, TODAY, call)


@pytest.mark.parametrize(("dim", "warps"), [(1536, {1, 2, 4}), (5120, {4, 8, 16}), (64, {1})])
def test_candidates_are_todays_options_and_what_fits_into_registers(
    dim: int, warps: set[int]
) -> None:
    candidates = tune_rows.first_round(task(dim=dim))
    assert candidates[0] == TODAY and candidates.count(TODAY) == 1
    assert {c["num_warps"] for c in candidates} == warps | {2}
    assert {c["STAGES"] for c in candidates} == set(tune_rows.STAGES)
    assert {c["TOKENS"] for c in tune_rows.second_round(TODAY)} == set(
        tune_rows.TOKENS_PER_PROGRAM
    ) - {16}


def test_what_gives_other_numbers_or_fails_is_not_timed() -> None:
    from anyflow.kernels.token_options import token_options

    def call() -> torch.Tensor:
        options = token_options(64, tokens=16, elements=24)
        if options["TOKENS"] == 32:
            raise RuntimeError("out of resource: shared memory\nand more")
        return torch.full((4,), {8: 1.01, 64: float("nan")}.get(options["TOKENS"], 1.0))

    candidates = [TODAY | {"TOKENS": n} for n in (16, 8, 32, 64)]
    times = tune_rows.measure(task(call), candidates, CPU, [torch.ones(4)])
    found = [times[tune_rows.described(c)] for c in candidates]
    assert isinstance(found[0], float)
    assert found[1:] == [
        "other numbers",
        "RuntimeError: out of resource: shared memory",
        "other numbers",
    ]


def test_the_advice_names_what_is_worth_a_change() -> None:
    entry = {"today": "a", "today_ms": 1.0, "best": "b", "share_today": 0.6, "share_best": 0.7}
    assert tune_rows.advice("k", entry | {"best_ms": 0.98}).endswith("1.0000 ms 60% (a) stays")
    assert tune_rows.advice("k", entry | {"best_ms": 0.86}).endswith("-> 0.8600 ms 70%: b")


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune_rows.parse(["--device", "cpu"])
    assert "--device cpu needs --tiny" in capsys.readouterr().err


@pytest.mark.slow
def test_a_tiny_run_times_every_candidate(tmp_path: Path) -> None:
    command = [sys.executable, tune_rows.__file__, "--device", "cpu", "--tiny"]
    command += ["--only", "layer_norm_modulate_forward", "--out", str(tmp_path / "tuned.json")]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path / "tuned.json").read_text())
    (name,) = found["tasks"]
    entry = found["tasks"][name]
    assert name == "layer_norm_modulate_forward D=64" and found["copy_bytes_per_s"] > 0
    # x and the result, shift and scale, in fp32
    assert entry["bytes"] == 4 * (2 * 64 * 5 + 2 * 64)
    assert len(entry["candidates"]) == 3 + 4 and all(
        isinstance(t, float) for t in entry["candidates"].values()
    )
    assert entry["best_ms"] == min(entry["candidates"].values()) <= entry["today_ms"]
    assert run.stdout.startswith(name)
