"""Read batches of a dataset in an order that depends on a seed and a position alone.

The samples of a run form one global stream, epoch after epoch, each a permutation of its own. A
batch of all ranks together is the stream's next stretch, whatever the number of ranks and of
workers, so a run is resumed exactly from the number of samples it has used.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Sampler

from anyflow.data.sample import Batch, Sample, VideoDataset
from anyflow.utils.versions import TEXT_PACKAGES, differences, installed_versions

if TYPE_CHECKING:
    from anyflow.data.config import DataConfig

__all__ = ["Batch", "Sample", "TrainingData", "VideoDataset", "open_dataset"]


def open_dataset(config: DataConfig) -> VideoDataset:
    """Open the dataset that a recipe names.

    A ``UserWarning`` says where its prompts may not be those that this installation would encode.

    Raises:
        ValueError: nothing usable at ``config.path``; the message names the folder, and the
            sample if one is at fault.
        ImportError: a package that training needs is missing.
    """
    if config.kind == "synthetic":
        from anyflow.data.synthetic import SyntheticVideos

        return SyntheticVideos()
    from anyflow.data.latent_dataset import LatentDataset

    assert config.path is not None
    dataset = LatentDataset(Path(config.path))
    doubt = _doubt(dataset.record.packages)
    if doubt is not None and not (dist.is_initialized() and dist.get_rank() > 0):
        warnings.warn(f"{config.path}: {doubt}", stacklevel=2)
    return dataset


def _doubt(packages: Mapping[str, list[str | None]] | None) -> str | None:
    """Say why the prompts of a dataset may not be those of this installation, or return None."""
    again = "`anyflow preprocess` into another folder makes them anew"
    if packages is None:
        return (
            "its prompts may have been encoded without ftfy, as the dataset does not say what "
            f"made it; {again}"
        )
    if None in packages.get("ftfy", [None]):
        return (
            "some of its prompts may have been encoded without ftfy, unlike those of the "
            f"published models; {again}"
        )
    here = installed_versions(TEXT_PACKAGES)
    made = [(name, version) for name in TEXT_PACKAGES for version in packages.get(name, [])]
    changed = [line for name, version in made for line in differences({name: version}, here)]
    return (
        f"its prompts were encoded with other versions ({'; '.join(changed)})" if changed else None
    )


class TrainingData:
    """Iterate without end over the :class:`Batch` objects of one data-parallel rank.

    Sample b of a batch is at position ``consumed + b * data_world + data_rank`` of the global
    stream. Epochs follow one another without a gap, also inside a batch. The order is drawn
    from generators of its own.

    Args:
        dataset: what to read.
        batch_size: samples per batch of this rank.
        data_rank: this rank among those that read different samples.
        data_world: number of those ranks.
        num_workers: processes that read ahead; 0 reads in this one.
        seed: seed of the order.
        consumed: samples that all ranks together have used already.
        picked: indices of the samples that are read; None reads all samples.

    Raises:
        ValueError: an argument out of range, an empty dataset; while iterating, whatever the
            dataset finds wrong.
    """

    def __init__(
        self,
        dataset: VideoDataset,
        *,
        batch_size: int,
        data_rank: int = 0,
        data_world: int = 1,
        num_workers: int = 0,
        seed: int = 0,
        consumed: int = 0,
        picked: Sequence[int] | None = None,
    ) -> None:
        picked = range(len(dataset)) if picked is None else picked
        if len(picked) < 1:
            raise ValueError("the dataset holds no videos")
        if min(batch_size, data_world) < 1:
            raise ValueError(
                f"batch_size and data_world must be >= 1, got {batch_size} and {data_world}"
            )
        if min(num_workers, consumed) < 0:
            raise ValueError(
                f"num_workers and consumed must be >= 0, got {num_workers} and {consumed}"
            )
        if not 0 <= data_rank < data_world:
            raise ValueError(f"data_rank must be in 0..{data_world - 1}, got {data_rank}")
        self._consumed = consumed
        self._stride = batch_size * data_world
        loader: DataLoader[Batch | ValueError] = DataLoader(
            _Batches(dataset),
            sampler=_Order(picked, batch_size, data_rank, data_world, seed, consumed),
            batch_size=None,
            num_workers=num_workers,
            # else it draws the workers' seeds from the global one
            generator=torch.Generator().manual_seed(0),
        )
        self._batches: Iterator[Batch | ValueError] = iter(loader)

    @property
    def consumed(self) -> int:
        """Count the samples that all ranks have been handed, without those that are read ahead."""
        return self._consumed

    def __iter__(self) -> TrainingData:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        if isinstance(batch, ValueError):
            self.close()
            # anew: an error that its own traceback refers to keeps the workers alive
            raise ValueError(str(batch))
        self._consumed += self._stride
        return batch

    def close(self) -> None:
        """End the iteration, and the processes that read ahead."""
        self._batches = iter(())


class _Order(Sampler[tuple[int, ...]]):
    """Yield the indices of each batch of one rank, without end."""

    def __init__(
        self,
        picked: Sequence[int],
        batch_size: int,
        rank: int,
        world: int,
        seed: int,
        consumed: int,
    ) -> None:
        self._picked = picked
        self._batch_size = batch_size
        self._rank = rank
        self._world = world
        self._seed = seed
        self._consumed = consumed

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        start, epoch, order, length = (
            self._consumed,
            -1,
            torch.empty(0, dtype=torch.int64),
            len(self._picked),
        )
        while True:
            batch = []
            for b in range(self._batch_size):
                position = start + b * self._world + self._rank
                if position // length != epoch:
                    epoch = position // length
                    order = _permutation(length, self._seed, epoch)
                batch.append(self._picked[int(order[position % length])])
            yield tuple(batch)
            start += self._batch_size * self._world


def _permutation(length: int, seed: int, epoch: int) -> torch.Tensor:
    digest = hashlib.blake2b(
        f"order of epoch {epoch}, seed {seed}".encode(), digest_size=8
    ).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    return torch.randperm(length, generator=generator)


class _Batches(Dataset["Batch | ValueError"]):
    """Read whole batches, with an error as a value: a worker would hide it in a traceback."""

    def __init__(self, dataset: VideoDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, picked: tuple[int, ...]) -> Batch | ValueError:
        try:
            samples = [self._dataset[index] for index in picked]
        except ValueError as error:
            return error
        return Batch(
            torch.stack([sample.latents for sample in samples]),
            torch.stack([sample.prompt_embeds for sample in samples]),
            picked,
        )
