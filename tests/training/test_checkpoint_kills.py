"""Kill a process that saves a checkpoint: no kill leaves half of one."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "scripts" / "checkpoint_kills.py"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, process_environment: Callable[[], dict[str, str]]
) -> dict[str, list[dict[str, Any]]]:
    """Return what every kill has left, by the way to kill."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path_factory.mktemp("kills"))],
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("save", "allowed"),
    [
        ("new", [[10, 20], [10, 20, 30.5], [20, 30.5]]),
        ("replaced", [[10, 20], [10, 20.5]]),
    ],
)
def test_a_kill_at_any_file_system_call_leaves_the_old_checkpoints_or_the_new(
    save: str, allowed: list[list[float]], found: dict[str, list[dict[str, Any]]]
) -> None:
    """Save a new step, or replace one; 10 and 20 exist and two are kept."""
    seen = found[save]
    assert [s["killed"] for s in seen] == [True] * (len(seen) - 1) + [False] and len(seen) > 10
    stages = [allowed.index(s["values"]) for s in seen]
    assert stages == sorted(stages) and set(stages) == set(range(len(allowed)))
    for s in seen:
        assert s["steps"] == [int(value) for value in s["values"]]
        assert s["then"] == [f"step-{s['steps'][-1]:08d}", "step-00000099"]


def test_kills_at_random_moments_of_many_saves_leave_complete_checkpoints(
    found: dict[str, list[dict[str, Any]]],
) -> None:
    assert len(found["random"]) == 10
    for kill in found["random"]:
        assert kill["status"] == -9
        *_, newest = steps = kill["steps"]
        assert newest in (kill["finished"], kill["finished"] + 1)
        assert steps == list(range(max(0, newest - len(steps) + 1), newest + 1))
        assert len(steps) <= 3 and kill["exact"] == [True] * len(steps)
