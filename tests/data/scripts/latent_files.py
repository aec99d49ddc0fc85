"""Write small latent datasets, for the tests of reading and of damage."""

from pathlib import Path

import torch
from torch import Tensor

from anyflow.data.latent_dataset import (
    DatasetInfo,
    LatentWriter,
)

INFO = DatasetInfo((3, 4, 2, 2), text_length=6, text_dim=5, source={"by": "a test", "mean": [0.5]})
NEGATIVE = torch.arange(10.0).view(2, 5)
Row = tuple[str, str, Tensor, Tensor]


def write(
    folder: Path, samples: list[Row], info: DatasetInfo = INFO, samples_per_shard: int = 3
) -> Path:
    with LatentWriter(folder, info, NEGATIVE, samples_per_shard=samples_per_shard) as writer:
        for sample in samples:
            writer.add(*sample)
        writer.finish()
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
