"""Lose one rank of two: ``parallel_losses.py FOLDER PORT PORT PORT`` prints how the others end.

The output is JSON: for every case, the exit status and the errors of the rank that is left. The
ranks are forked from this process, without torchrun, which would end them.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from tiny import tiny_model

from anyflow.training.config import ParallelConfig
from anyflow.training.distributed import clip_gradients, setup, shard_network

# The signal, the sequence degree, and the timeout: with a degree of 2 both groups are in use.
CASES = {
    "killed": (signal.SIGKILL, 2, 600),
    "stopped": (signal.SIGSTOP, 1, 20),
    "stopped, sequence": (signal.SIGSTOP, 2, 20),
}
PATIENCE = 300  # seconds


def train(begun: Path, sequence: int, timeout_s: int) -> None:
    """Train until an error."""
    torch.set_num_threads(1)
    mesh = setup(ParallelConfig(sequence=sequence, timeout_s=timeout_s), "cpu")
    network = tiny_model()
    shard_network(network, mesh, trains=True)
    x, text, t = torch.ones(1, 2, 3, 4, 4), torch.ones(1, 3, 8), torch.full((1,), 500.0)
    while True:
        network(x, t, t, text).sample.square().mean().backward()
        clip_gradients(network.parameters(), 1.0)
        begun.touch()


def fork(folder: Path, case: str, rank: int, port: str) -> int:
    """Start a rank, whose errors go to a file, and return its process id."""
    child = os.fork()
    if child:
        return child
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_PORT=port)
        with (folder / f"{case} {rank}.err").open("w") as errors:
            os.dup2(errors.fileno(), 2)
            try:
                train(folder / f"{case} {rank}", *CASES[case][1:])
            except BaseException:
                traceback.print_exc(file=errors)
    finally:
        os._exit(1)


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError
        time.sleep(0.1)


def lose(folder: Path, ranks: dict[str, list[int]]) -> dict[str, tuple[int, str]]:
    """Signal rank 1 of every case once all have begun, and wait for the end of rank 0."""
    files = [folder / f"{case} {rank}" for case in CASES for rank in range(2)]
    wait_for(lambda: all(file.exists() for file in files))
    for case, (_, lost) in ranks.items():
        os.kill(lost, CASES[case][0])
    ended: dict[str, tuple[int, str]] = {}

    def all_ended() -> bool:
        for case, (left, _) in ranks.items():
            # It is not reaped, so that its id stays its own until all are killed.
            end = os.waitid(os.P_PID, left, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if end is not None:
                status = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
                ended[case] = status, (folder / f"{case} 0.err").read_text()
        return len(ended) == len(ranks)

    wait_for(all_ended)
    return ended


def main(folder: Path, ports: list[str]) -> None:
    ranks = {
        case: [fork(folder, case, rank, port) for rank in range(2)]
        for case, port in zip(CASES, ports, strict=True)
    }
    try:
        print(json.dumps(lose(folder, ranks)))
    finally:
        for rank in (rank for pair in ranks.values() for rank in pair):
            os.kill(rank, signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
