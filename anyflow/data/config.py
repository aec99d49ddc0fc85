"""Configure a dataset and its loader."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from anyflow.utils.validation import SettingError, require_text, require_whole

_MAX_BATCH, _MAX_WORKERS = 2**16, 1024


@dataclass(frozen=True)
class DataConfig:
    """Hold the settings of a dataset and its loader.

    Args:
        kind: ``"latents"``, written by ``anyflow preprocess``; or ``"synthetic"``, the moving
            shapes of the quickstart.
        path: folder of the latents.
        batch_size: samples per step and data-parallel rank, before gradient accumulation.
        num_workers: processes that read ahead; 0 reads in the training process.
        seed: seed of the order of the samples.
    """

    kind: Literal["latents", "synthetic"] = "latents"
    path: str | None = None
    batch_size: int = 1
    num_workers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        require_whole("batch_size", self.batch_size, most=_MAX_BATCH)
        require_whole("num_workers", self.num_workers, least=0, most=_MAX_WORKERS)
        require_whole("seed", self.seed, least=-(2**63))
        if self.path is not None:
            require_text("path", self.path)
        if (self.kind == "latents") != (self.path is not None):
            raise SettingError("path", "is required with kind=latents, and only then")
