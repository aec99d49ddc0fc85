"""Run Ulysses sequence parallelism on real ranks (gloo), and compare with one process."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "training" / "scripts" / "parallel_forward.py"
WORLDS = (2, 4)
CASES = [
    (shape, per_frame, checkpointing)
    for shape in ("odd", "even", "one_token")  # 9, 8 and 1 tokens a frame, of 3, 2 and 5 frames
    for per_frame, checkpointing in ((False, False), (True, False), (True, True))
]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(
    tmp_path_factory: pytest.TempPathFactory, fork_ranks: Callable[..., subprocess.Popen[str]]
) -> dict[int, list[dict[str, Any]]]:
    """Return what every rank of every world wrote."""
    folder = tmp_path_factory.mktemp("forward")
    written = {}
    for world in WORLDS:
        job = fork_ranks(world, SCRIPT, folder)
        output, _ = job.communicate(timeout=600)
        assert job.returncode == 0, output[-4000:]
        assert "Warning" not in output, output
        written[world] = [
            torch.load(folder / f"rank{i}-of-{world}.pt", weights_only=True) for i in range(world)
        ]
    return written


@pytest.mark.parametrize(
    ("world", "case"), [*((world, case) for world in WORLDS for case in CASES), (2, "compiled")]
)
def test_velocity_and_gradients_are_those_of_the_whole_model(
    world: int, case: Any, ranks: dict[int, Any]
) -> None:
    """Compare two chained calls in fp64; gradients are the mean over the ranks."""
    for results in ranks[world]:
        got, want = results["shared"][case], results["whole"][case]
        assert bool(want["gradient"].any())
        for name in ("out", "gradient"):
            torch.testing.assert_close(
                got[name], want[name], rtol=1e-9, atol=1e-11 * want[name].abs().max().item()
            )


@pytest.mark.parametrize("world", WORLDS)
def test_every_rank_has_the_same_velocity(world: int, ranks: dict[int, Any]) -> None:
    first, *others = [results["shared"]["odd", True, False]["out"] for results in ranks[world]]
    assert all(torch.equal(other, first) for other in others)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(
    ("what", "tolerance"),
    [("copied", 1e-9), ("float32", 1e-5), ("bfloat16", 2e-2), ("off", 0.0)],
)
def test_other_ways_to_call_the_model(
    what: str, tolerance: float, world: int, ranks: dict[int, Any]
) -> None:
    """Compare a deep copy and autocast; turned off, the model is exactly as never on."""
    for results in ranks[world]:
        got, want = (x.double() for x in results[what])
        assert (got - want).norm() <= tolerance * want.norm()


@pytest.mark.parametrize("world", WORLDS)
def test_it_is_neither_config_nor_state(world: int, ranks: dict[int, Any]) -> None:
    assert all(results["unchanged"] for results in ranks[world])


@pytest.mark.parametrize("world", WORLDS)
def test_heads_that_the_ranks_do_not_divide_are_refused(world: int, ranks: dict[int, Any]) -> None:
    for results in ranks[world]:
        assert f"over {world} ranks" in results["error"] and f"got {world + 1}" in results["error"]
