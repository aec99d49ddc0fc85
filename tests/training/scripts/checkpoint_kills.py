"""Kill saves of checkpoints: ``checkpoint_kills.py FOLDER`` prints what every kill has left.

The output is JSON: for every way to kill, a list of findings. A child is forked for each kill.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyflow.training.checkpoint import Checkpointer, complete_checkpoints

CALLS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def fork(work: Callable[[], None]) -> int:
    """Start a child that does the work and ends, and return its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


# At every call of the file system -----------------------------------------------------------------


def state(value: float) -> dict[str, Tensor]:
    weight = torch.full((64, 3), float(value))
    return {"student/w": weight, "optimizer/step": torch.tensor(float(value))}


def contents(checkpointer: Checkpointer, path: Path) -> float:
    tensors = state(0)
    value = checkpointer.load(path, tensors)["value"]
    assert all(bool((t == value).all()) for t in tensors.values())
    return value


def save_until_call(checkpointer: Checkpointer, step: int, call: int) -> None:
    """Save, and be killed by an audit hook at that call."""
    count = 0

    def hook(event: str, arguments: Any) -> None:
        nonlocal count
        if event in CALLS:
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(hook)
    checkpointer.save(step, state(step + 0.5), {"value": step + 0.5})


def kill_at_every_call(checkpoints: Path, existing: list[int], step: int) -> list[dict[str, Any]]:
    """Kill a save at its first call, at its second, and so on, until it is not killed."""
    found: list[dict[str, Any]] = []
    while not found or found[-1]["killed"]:
        shutil.rmtree(checkpoints, ignore_errors=True)
        checkpointer = Checkpointer(checkpoints, keep=2)
        for s in existing:
            checkpointer.save(s, state(s), {"value": s})
        call = len(found)
        child = fork(lambda c=checkpointer, call=call: save_until_call(c, step, call))
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        paths = complete_checkpoints(checkpoints).values()
        values = [contents(checkpointer, path) for path in paths]
        seen = {"killed": killed, "steps": checkpointer.steps(), "values": values}
        checkpointer.save(99, state(99), {"value": 99})  # nothing that was left stands in the way
        found.append({**seen, "then": sorted(p.name for p in checkpoints.iterdir())})
    return found


# At random moments --------------------------------------------------------------------------------


def large_state(step: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(step)
    tensors = {f"student/{i}": torch.randn(200, 500, generator=g) for i in range(4)}
    return {**tensors, "optimizer/step": torch.tensor(float(step))}


def save_until_killed(folder: Path, printed: int) -> None:
    """Resume from the newest checkpoint; save one after the other, and write the finished steps."""
    checkpointer = Checkpointer(folder, keep=2)
    newest = checkpointer.latest()
    step = 0 if newest is None else checkpointer.load(newest, large_state(0))["step"]
    while True:
        # the first one is in place of the newest
        checkpointer.save(step, large_state(step), {"step": step})
        os.write(printed, f"{step}\n".encode())
        step += 1


def exact(checkpointer: Checkpointer, step: int, path: Path) -> bool:
    """Tell whether a checkpoint holds all of its step."""
    tensors, want = large_state(10**6), large_state(step)
    return checkpointer.load(path, tensors) == {"step": step} and all(
        torch.equal(tensors[name], t) for name, t in want.items()
    )


def kill_at_random(folder: Path, kills: int) -> list[dict[str, Any]]:
    delays, found = random.Random(0), []
    for _ in range(kills):
        reader, writer = os.pipe()
        child = fork(lambda writer=writer: save_until_killed(folder, writer))
        os.close(writer)
        with os.fdopen(reader) as printed:
            lines = [printed.readline()]
            time.sleep(delays.uniform(0.0, 0.5))
            os.kill(child, signal.SIGKILL)
            lines += printed.readlines()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        checkpointer = Checkpointer(folder, keep=2)
        found.append(
            {
                "status": status,
                "finished": max(int(line) for line in lines if line.endswith("\n")),
                "steps": checkpointer.steps(),
                "exact": [
                    exact(checkpointer, *item) for item in complete_checkpoints(folder).items()
                ],
            }
        )
    return found


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found = {
        "new": kill_at_every_call(folder / "new", [10, 20], 30),
        "replaced": kill_at_every_call(folder / "replaced", [10, 20], 20),
        "random": kill_at_random(folder / "random", 10),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
