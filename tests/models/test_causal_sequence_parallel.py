"""Share the causal model's tokens among real ranks (gloo), and compare with one process."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parent / "scripts" / "parallel_causal.py"
LAYOUTS = ("training", "plain", "all full", "one context", "cached")
DEGREES = (2, 4)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(
    tmp_path_factory: pytest.TempPathFactory, fork_ranks: Callable[..., subprocess.Popen[str]]
) -> list[dict[Any, Any]]:
    """Return what each of four ranks wrote."""
    folder = tmp_path_factory.mktemp("causal")
    job = fork_ranks(4, SCRIPT, folder)
    output, _ = job.communicate(timeout=600)
    assert job.returncode == 0, output[-4000:]
    return [torch.load(folder / f"rank{i}.pt", weights_only=True) for i in range(4)]


@pytest.mark.parametrize(("degree", "checkpointing"), [(2, False), (2, True), (4, True)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_velocity_and_gradients_are_those_of_one_process(
    layout: str, degree: int, checkpointing: bool, ranks: list[Any], relative: Any
) -> None:
    """Compare each layout in fp64, with tokens of a frame that the ranks do not divide."""
    for results in ranks:
        got, want = results[degree, layout, checkpointing], results["whole", layout]
        for name in ("out", "gradient"):
            assert relative(got[name], want[name]) <= 1e-12, name


@pytest.mark.parametrize("degree", DEGREES)
def test_sampled_videos_are_those_of_one_process(
    degree: int, ranks: list[Any], relative: Any
) -> None:
    """Sample after a given chunk, with guidance and two steps a chunk."""
    for results in ranks:
        assert relative(results[degree, "sampled"], results["whole", "sampled"]) <= 1e-12


@pytest.mark.parametrize("degree", DEGREES)
def test_a_rank_keeps_the_cache_of_its_heads(degree: int, ranks: list[Any]) -> None:
    for results in ranks:
        kept, foretold = results[degree, "bytes"]
        assert kept == foretold == results["whole", "bytes"][0] // degree
