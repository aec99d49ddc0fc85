"""Compare the losses of two processes with one: balance, choices, number of network calls."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parent / "scripts" / "distributed_losses.py"
pytestmark = pytest.mark.slow

CASES = [(kinds, g) for kinds in ("mixed", "one_rank_without", "none", "all") for g in (1.0, 3.0)]


@pytest.fixture(scope="module")
def ranks(
    tmp_path_factory: pytest.TempPathFactory, fork_ranks: Callable[..., subprocess.Popen[str]]
) -> list[dict[str, Any]]:
    """Run both ranks, and return what they wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    job = fork_ranks(2, SCRIPT, folder)
    output, _ = job.communicate(timeout=240)
    assert job.returncode == 0, output[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("how", ["got", "sharded"])
@pytest.mark.parametrize("case", CASES)
def test_loss_over_the_ranks_is_that_of_the_whole_batch(
    how: str, case: tuple[str, float], ranks: list[dict[str, Any]]
) -> None:
    """Balance by the mean over all ranks, also if one rank, or none, has a diffusion sample."""
    want = ranks[0]["expected"][case]
    for results in ranks:
        got = results[how][case]
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-9)
        assert got["loss_diffusion"] == pytest.approx(want["loss_diffusion"], rel=1e-9)
        torch.testing.assert_close(got["gradient"], want["gradient"], rtol=1e-7, atol=1e-10)
    assert want["loss"] > 0.1 and bool(want["gradient"].any())


def test_ranks_hold_different_samples(ranks: list[dict[str, Any]]) -> None:
    own = [results["got"]["mixed", 3.0]["own_loss"] for results in ranks]
    assert own[0] != pytest.approx(own[1], rel=1e-3)


@pytest.mark.parametrize("case", CASES)
def test_every_rank_calls_the_network_as_often(
    case: tuple[str, float], ranks: list[dict[str, Any]]
) -> None:
    """Make one call without gradient and one with: each gathers parameters on all ranks."""
    for results in ranks:
        assert results["got"][case]["calls"] == [False, True]
        assert results["sharded"][case]["calls"] == [False, True]


def test_choices_agree_although_the_generators_do_not(ranks: list[dict[str, Any]]) -> None:
    first, second = (results["draws"] for results in ranks)
    assert first["own"] != second["own"]
    assert first["times"] != second["times"]  # samples are each rank's own
    for name in ("draws", "rollouts", "image_to_video"):
        assert first[name] == second[name], name
        assert len({str(choice) for choice in first[name]}) > 1, name


def test_one_sample_per_rank_takes_turns(ranks: list[dict[str, Any]]) -> None:
    first, second = (results["draws"]["kinds"] for results in ranks)
    assert [a + b for a, b in zip(first, second, strict=True)] == [1, 1, 1, 1]
    assert first == [True, False, True, False]
