"""Let the processes of an evaluation meet in its folder, each making what no other makes."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from anyflow.evaluation.runs.plan import covers
from anyflow.evaluation.runs.record import EvaluationRecord
from anyflow.utils.devices import local_gpu
from anyflow.utils.documents import shortened
from anyflow.utils.locking import FolderInUseError, folder_lock

POLL_SECONDS = 0.2
_START_SECONDS = 600.0  # other processes wait as long for the first one's record


@dataclass(frozen=True)
class Rank:
    """Describe one of the processes of an evaluation, which torchrun numbers.

    The processes have no process group: a video is claimed by a lock that the system ends with its
    process, so that the others make the videos that a killed process leaves.

    Args:
        rank: 0 for the one that writes the record, measures and reports.
        world_size: number of processes.
        local_rank: on this machine, which chooses the GPU.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def of_environment(cls) -> Rank:
        """Read RANK, WORLD_SIZE and LOCAL_RANK of torchrun; the default is one process."""
        return cls(
            *(
                int(os.environ.get(n, d))
                for n, d in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
            )
        )

    @property
    def is_main(self) -> bool:
        """Tell whether this is the process that writes the record."""
        return self.rank == 0

    def device(self, name: str | None) -> str | None:
        """Return the device of this process: with several, each has a GPU of its own.

        Args:
            name: given by the user, or None.

        Raises:
            ValueError: this machine has fewer GPUs than processes.
        """
        wants_gpu = torch.cuda.is_available() if name is None else name == "cuda"
        if self.world_size == 1 or not wants_gpu:
            return name
        device = local_gpu(self.local_rank)
        torch.cuda.set_device(device)
        return str(device)

    @contextmanager
    def claim(self, place: Path) -> Iterator[bool]:
        """Yield True while this process alone makes a video, or False where another one does.

        Args:
            place: path of the claim, below the folder of work.
        """
        if self.world_size == 1:
            yield True
            return
        try:
            with folder_lock(place):
                yield True
        except FolderInUseError:
            yield False

    def wait_for_record(self, file: Path, wanted: EvaluationRecord) -> None:
        """Wait until the first process has written a record of the same plan.

        Raises:
            ValueError: it has not for ten minutes.
        """
        until = time.monotonic() + _START_SECONDS
        while time.monotonic() < until:
            if file.is_file() and covers(EvaluationRecord.load(file), wanted):
                return
            time.sleep(POLL_SECONDS)
        raise ValueError(
            f"process {self.rank} has waited {_START_SECONDS:.0f} s for the first one's "
            f"{shortened(file)}"
        )
