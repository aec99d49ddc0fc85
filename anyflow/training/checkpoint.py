"""Save and load checkpoints that a kill cannot damage: sharded, verified, free of pickled code.

A checkpoint is written to the hidden folder ``.step-00000020.tmp`` and gets its name by one rename,
when every byte and the manifest are on the disk. Whatever has a name is complete, and whatever ends
in ``.tmp`` is litter.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from anyflow.training.manifest import MANIFEST, CheckpointError, FileRecord, Manifest
from anyflow.training.tensor_files import INDEX, TensorReader, TensorWriter, difference, read_index
from anyflow.utils.validation import require_whole
from anyflow.utils.writing import hidden, publish, system_error, take_back, writing

__all__ = ["CheckpointConfig", "CheckpointError", "Checkpointer", "complete_checkpoints"]

T = TypeVar("T")


def complete_checkpoints(folder: Path) -> dict[int, Path]:
    """Find the complete checkpoints in a folder, by step, ascending."""
    found = {}
    # An old checkpoint counts while its replacement has not taken the name.
    for pattern in (".step-*.old", "step-*"):
        for path in folder.glob(pattern):
            digits = path.name.removeprefix(".").removeprefix("step-").removesuffix(".old")
            if digits.isdecimal() and (path / MANIFEST).is_file():
                found[int(digits)] = path
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class CheckpointConfig:
    """Say when checkpoints are written, and how many are kept.

    Args:
        every: steps between checkpoints; the last step always has one.
        keep: newest ones kept.
    """

    every: int = 500
    keep: int = 3

    def __post_init__(self) -> None:
        require_whole("every", self.every)
        require_whole("keep", self.keep)


class Checkpointer:
    """Save and load the checkpoints of one folder.

    Every method is collective, and every rank gets the same result.

    Args:
        folder: folder of the checkpoints, on a file system that all ranks share; made by the first
            save.
        keep: newest checkpoints that a save leaves, with the one it wrote.
        process_group: the ranks that take part; None means all of them, or this process alone where
            torch.distributed has not been initialized.

    Raises:
        ValueError: keep is less than 1.
    """

    def __init__(
        self, folder: Path, *, keep: int, process_group: dist.ProcessGroup | None = None
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.folder, self.keep, self._group = Path(folder), keep, process_group
        self._distributed = dist.is_available() and dist.is_initialized()
        self._rank = dist.get_rank(process_group) if self._distributed else 0
        self._world_size = dist.get_world_size(process_group) if self._distributed else 1

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, ascending."""
        return self._on_rank_zero(lambda: list(complete_checkpoints(self.folder)))

    def latest(self) -> Path | None:
        """Return the newest complete checkpoint."""
        return self._on_rank_zero(
            lambda: next(reversed(complete_checkpoints(self.folder).values()), None)
        )

    def save(self, step: int, tensors: dict[str, Tensor], info: dict[str, Any]) -> Path:
        """Write a checkpoint, in place of one of the same step; delete the oldest beyond ``keep``.

        Args:
            step: at least 0.
            tensors: flat, plain (then equal on all ranks) or DTensors; the names are the same on
                all ranks.
            info: JSON values.

        Returns:
            The checkpoint's folder.

        Raises:
            ValueError: the step is negative, a value is no tensor, or info is not JSON.
            OSError: the system refuses to write, such as on a full disk; earlier checkpoints are as
                before.
            CheckpointError: another rank could not write.
        """
        if step < 0:
            raise ValueError(f"step must be at least 0, got {step}")
        if others := [name for name, value in tensors.items() if not isinstance(value, Tensor)]:
            raise ValueError(
                f"a checkpoint holds tensors only; these are none: {', '.join(others)}"
            )
        try:
            info = json.loads(json.dumps(info))
        except TypeError as error:
            raise ValueError(f"info must be JSON: {error}") from None

        final = self.folder / f"step-{step:08d}"
        partial = hidden(final)
        self._on_rank_zero(lambda: self._prepare(partial))
        try:
            with _dcp_errors(f"{partial} cannot be written"):
                dcp.save(
                    dict(tensors),
                    storage_writer=TensorWriter(partial),  # waits for the disk after each file
                    planner=dcp.DefaultSavePlanner(flatten_state_dict=False),
                    process_group=self._group,
                    no_dist=not self._distributed,
                )
            records = self._gather(self._everywhere(lambda: self._own_records(partial)))
            files = {name: record for own in records for name, record in own.items()}
            manifest = Manifest(step, self._world_size, files, info)
            self._on_rank_zero(lambda: self._commit(manifest, partial, final))
        except Exception:
            if self._rank == 0:  # half a checkpoint would keep a full disk full
                shutil.rmtree(partial, ignore_errors=True)
            raise
        return final

    def load(self, path: Path, tensors: dict[str, Tensor], *, prefix: str = "") -> dict[str, Any]:
        """Verify a checkpoint, then fill the tensors in place.

        Args:
            path: path of the checkpoint.
            tensors: those to fill, plain or DTensors, however they were sharded when saved; the
                names are exactly those of the checkpoint that start with ``prefix``.
            prefix: prefix of the names that count; the others are left aside.

        Returns:
            The info that was saved.

        Raises:
            CheckpointError: on all ranks, before any tensor has changed: the checkpoint is
                incomplete or a file of it is missing or damaged (the message names the previous
                complete checkpoint), or a name, a shape or a dtype differs. Also if a file holds
                something else than tensors, which is found while loading.
        """
        path = Path(path)
        try:
            manifest = self._on_rank_zero(lambda: Manifest.read(path))
            shares = self._gather(
                self._everywhere(lambda: manifest.problems(path, self._share(manifest)))
            )
            if problems := [problem for share in shares for problem in share]:
                raise CheckpointError(f"checkpoint {path} is damaged: {'; '.join(problems)}")
        except CheckpointError as error:
            raise CheckpointError(f"{error}{_previous(path)}") from None
        index = self._everywhere(lambda: _matching_index(path, manifest, tensors, prefix))
        with _dcp_errors(f"checkpoint {path} cannot be read"):
            dcp.load(
                dict(tensors),
                storage_reader=TensorReader(path, index),
                planner=dcp.DefaultLoadPlanner(flatten_state_dict=False),
                process_group=self._group,
                no_dist=not self._distributed,
            )
        return manifest.info

    # Files ----------------------------------------------------------------------------------------

    def _prepare(self, partial: Path) -> None:
        """Make the folder to write to, and clear what killed runs have left."""
        with writing(self.folder):
            self._clear(partial)

    def _clear(self, partial: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob(".step-*.old"):
            take_back(self.folder / old.name.removeprefix(".").removesuffix(".old"))
        for litter in self.folder.glob(".step-*.tmp"):
            shutil.rmtree(litter)
        partial.mkdir()

    def _own_records(self, partial: Path) -> dict[str, FileRecord]:
        own = sorted(partial.glob(f"__{self._rank}_*")) + (
            [partial / INDEX] if self._rank == 0 else []
        )
        return {file.name: FileRecord.of(file) for file in own}

    def _commit(self, manifest: Manifest, partial: Path, final: Path) -> None:
        manifest.write(partial)
        publish(partial, final)
        outdated = list(complete_checkpoints(self.folder).values())[: -self.keep]
        for path in outdated:
            if path != final:
                # first: half a checkpoint must not have a name
                os.rename(path, hidden(path))
                shutil.rmtree(hidden(path))

    def _share(self, manifest: Manifest) -> list[str]:
        return sorted(manifest.files)[self._rank :: self._world_size]

    # Ranks ----------------------------------------------------------------------------------------

    def _everywhere(self, work: Callable[[], T]) -> T:
        """Do something on each rank and return the rank's own result; if one fails, all raise."""
        result, error = None, None
        try:
            result = work()
        except Exception as exception:
            error = exception
        failures = self._gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise CheckpointError(f"rank {rank} failed: {failure}")
        return cast(T, result)

    def _on_rank_zero(self, work: Callable[[], T]) -> T:
        """Do something on rank 0 and return its result on every rank."""
        result = self._everywhere(work if self._rank == 0 else lambda: None)
        return cast(T, self._gather(result)[0])

    def _gather(self, value: T) -> list[T]:
        if not self._distributed:
            return [value]
        values: list[Any] = [None] * self._world_size
        dist.all_gather_object(values, value, group=self._group)
        return values


def _matching_index(
    path: Path, manifest: Manifest, tensors: dict[str, Tensor], prefix: str
) -> dcp.Metadata:
    index = read_index(path, manifest.files)
    if lines := difference(index, tensors, prefix):
        listed = "\n  ".join(lines)
        raise CheckpointError(f"checkpoint {path} does not fit, nothing was loaded:\n  {listed}")
    return index


def _previous(path: Path) -> str:
    """Name the checkpoint to offer in place of a damaged one."""
    digits = path.name.removeprefix("step-")
    if not digits.isdecimal():
        return ""
    earlier = [
        other for step, other in complete_checkpoints(path.parent).items() if step < int(digits)
    ]
    return (
        f"; the previous complete checkpoint is {earlier[-1]}"
        if earlier
        else "; there is no earlier one"
    )


@contextmanager
def _dcp_errors(what: str) -> Iterator[None]:
    """Raise DCP's failures of all ranks as one error; its own exception is no ``Exception``."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            failures = [failure for failure, _ in error.failures.values()]
            for failure in failures:
                if not isinstance(failure, Exception):
                    raise failure from error  # an interrupt of the user
            refusals = [
                found for failure in failures if (found := system_error(failure)) is not None
            ]
            if len(refusals) == len(failures):
                raise refusals[0] from error
            reasons = {f"{type(failure).__name__}: {failure}" for failure in failures}
            raise CheckpointError(f"{what}: {'; '.join(sorted(reasons))}") from error
