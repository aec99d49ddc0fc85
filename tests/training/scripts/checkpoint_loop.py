"""Run and killed by test_checkpoint.py: goes on from the newest checkpoint and writes one after the
other.
"""

import sys
from pathlib import Path

import torch

from anyflow.training.checkpoint import Checkpointer


def state(step: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    tensors = {f"student/{i}": torch.randn(200, 500, generator=g) for i in range(4)}
    return {**tensors, "optimizer/step": torch.tensor(float(step))}


def main(folder: Path) -> None:
    checkpointer = Checkpointer(folder, keep=2)
    newest = checkpointer.latest()
    step = 0 if newest is None else checkpointer.load(newest, state(0))["step"]
    while True:
        # the first one is in place of the newest
        checkpointer.save(step, state(step), {"step": step})
        print(step, flush=True)
        step += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
