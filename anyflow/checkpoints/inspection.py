"""What a checkpoint is, from its headers alone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from anyflow.checkpoints.architecture import Architecture
from anyflow.checkpoints.checkpoint import CheckpointFormat, ReadOptions, open_checkpoint
from anyflow.checkpoints.errors import listed


@dataclass(frozen=True)
class CheckpointInfo:
    """A summary of a checkpoint; ``str()`` of it is a table.

    Attributes:
        path: as it was given.
        format: where it comes from.
        files: that hold its tensors.
        num_tensors: of the model, with adapters counted as merged.
        num_parameters: likewise.
        num_bytes: of those tensors, as they are stored.
        dtypes: parameters by the name of their type.
        architecture: of the model; ``architecture.flow_map`` is None for a plain Wan model.
        is_causal: whether it is the causal model's.
        adapter_ranks: of the adapters that it has; empty without.
        problems: every tensor that is missing, unexpected, or of a wrong shape or type; empty for a sound checkpoint.
    """

    path: Path
    format: CheckpointFormat
    files: tuple[Path, ...]
    num_tensors: int
    num_parameters: int
    num_bytes: int
    dtypes: dict[str, int]
    architecture: Architecture
    is_causal: bool
    adapter_ranks: tuple[int, ...]
    problems: tuple[str, ...]

    @property
    def is_flow_map(self) -> bool:
        """Whether the model has a second timestep."""
        return self.architecture.flow_map is not None

    def __str__(self) -> str:
        flow_map = self.architecture.flow_map
        types = ", ".join(f"{n / self.num_parameters:.1%} {dtype}" for dtype, n in self.dtypes.items())
        rows = [
            ("path", str(self.path)),
            ("format", self.format.value),
            ("files", str(len(self.files))),
            ("tensors", f"{self.num_tensors:,}"),
            ("parameters", f"{self.num_parameters:,}"),
            ("size", _readable(self.num_bytes)),
            ("types", types),
            ("flow map", "no" if flow_map is None else ", ".join(f"{k} {v}" for k, v in vars(flow_map).items())),
            ("causal", "yes" if self.is_causal else "no"),
            ("adapters", f"rank {', '.join(map(str, self.adapter_ranks))}" if self.adapter_ranks else "no"),
            *((name.replace("_", " "), str(value)) for name, value in self.architecture.sizes().items()),
            ("complete", f"no:{listed(self.problems)}" if self.problems else "yes"),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def inspect(
    path: Path | str,
    *,
    subfolder: str | None = None,
    weights: str | None = None,
    attention_head_dim: int | None = None,
) -> CheckpointInfo:
    """Summarize a checkpoint without reading its tensors; the arguments are those of ``load_transformer``.

    Raises:
        CheckpointFormatError: it is damaged, contradicts itself, or is of no format that is understood.
    """
    options = ReadOptions(subfolder=subfolder, weights=weights, attention_head_dim=attention_head_dim)
    checkpoint = open_checkpoint(path, options)
    infos = checkpoint.reader.infos
    dtypes: Counter[str] = Counter()
    for info in infos.values():
        dtypes[info.dtype] += math.prod(info.shape)
    return CheckpointInfo(
        path=checkpoint.path,
        format=checkpoint.format,
        files=checkpoint.files.weights,
        num_tensors=len(infos),
        num_parameters=sum(dtypes.values()),
        num_bytes=sum(info.nbytes for info in infos.values()),
        dtypes=dict(dtypes.most_common()),
        architecture=checkpoint.architecture,
        is_causal=checkpoint.is_causal,
        adapter_ranks=tuple(sorted({a.rank for a in checkpoint.reader.adapters.values()})),
        problems=tuple(checkpoint.differences(checkpoint.architecture.build_empty())),
    )


def _readable(num_bytes: int) -> str:
    unit = next((i for i in range(4) if num_bytes < 1000 ** (i + 1)), 4)
    return f"{num_bytes / 1000**unit:.1f} {('B', 'kB', 'MB', 'GB', 'TB')[unit]}"
