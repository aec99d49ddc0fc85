"""Run by test_checkpoint.py: a save that is killed at its first file-system call, at its second,
and so on.

A child process is forked for each kill; an audit hook of Python counts its calls and sends it the
signal. Prints one JSON line per kill: which checkpoints are complete, what they hold, and what is
there after one more save.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from anyflow.training.checkpoint import Checkpointer, complete_checkpoints

CALLS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def state(value: float) -> dict[str, torch.Tensor]:
    weight = torch.full((64, 3), float(value))
    return {"student/w": weight, "optimizer/step": torch.tensor(float(value))}


def contents(checkpointer: Checkpointer, path: Path) -> float:
    tensors = state(0)
    value = checkpointer.load(path, tensors)["value"]
    assert all(bool((t == value).all()) for t in tensors.values())
    return value


def kill_at(call: int) -> None:
    count = 0

    def hook(event: str, arguments: Any) -> None:
        nonlocal count
        if event in CALLS:
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(hook)


def main(folder: Path, existing: list[int], step: int) -> None:
    checkpoints = folder / "checkpoints"
    killed, call = True, 0
    while killed:
        shutil.rmtree(checkpoints, ignore_errors=True)
        checkpointer = Checkpointer(checkpoints, keep=2)
        for s in existing:
            checkpointer.save(s, state(s), {"value": s})
        child = os.fork()
        if child == 0:
            kill_at(call)
            checkpointer.save(step, state(step + 0.5), {"value": step + 0.5})
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        values = [
            contents(checkpointer, path) for path in complete_checkpoints(checkpoints).values()
        ]
        seen = {"killed": killed, "steps": checkpointer.steps(), "values": values}
        checkpointer.save(99, state(99), {"value": 99})  # nothing that was left stands in the way
        seen["then"] = sorted(p.name for p in checkpoints.iterdir())
        print(json.dumps(seen), flush=True)
        call += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]))
