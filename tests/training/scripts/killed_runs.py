"""Train in forked children, each killed at a random moment, then to the end.

    killed_runs.py STRAIGHT KILLED KILLS

Trains by the recipe STRAIGHT without a kill first. Prints one JSON line per kill: the steps of the
complete checkpoints, the step that the metrics had reached, the child's status, and whether it was
writing a checkpoint.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from anyflow.training.checkpoint import complete_checkpoints
from anyflow.training.recipe import load_recipe
from anyflow.training.trainer import train

# steps beyond the newest checkpoint at which a child is killed at the latest, so that no run ends
AHEAD = 6


def run(recipe_file: Path) -> int:
    """Start a child process that trains, and return its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        train(load_recipe(recipe_file))
        status = 0
    finally:
        os._exit(status)


def reached(out: Path) -> int:
    """Return the step of the last whole line of the metrics."""
    file = out / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def main() -> None:
    straight, recipe_file, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    assert os.waitpid(run(straight), 0)[1] == 0
    out = Path(load_recipe(recipe_file).out)
    moments, longest, before = random.Random(0), 1.0, 0
    for _ in range(kills):
        child, moment = run(recipe_file), time.monotonic() + moments.uniform(0.05, longest)
        while time.monotonic() < moment and reached(out) < before + AHEAD:
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        writing = any(out.glob("checkpoints/.step-*.tmp"))
        steps = list(complete_checkpoints(out / "checkpoints"))
        # On a slow machine every child would die before its first checkpoint.
        newest = max(steps, default=0)
        longest *= 2 if newest == 0 else 1.2 if newest == before else 1
        longest *= 0.6 if newest > before + 5 else 1
        before = newest
        print(
            json.dumps(
                {"steps": steps, "reached": reached(out), "writing": writing, "status": status}
            ),
            flush=True,
        )
    child = run(recipe_file)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    main()
