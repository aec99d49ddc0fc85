"""Describe a checkpoint from its headers."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from anyflow.formats.architecture import CausalSettings, CheckpointArchitecture, FlowMap
from anyflow.formats.checkpoint import (
    Checkpoint,
    CheckpointFormat,
    ReadOptions,
    open_checkpoint,
)
from anyflow.formats.errors import listed
from anyflow.formats.files import TORCH_SUFFIXES
from anyflow.formats.problems import FiniteWeights, problems_of
from anyflow.formats.readers import TorchReader


@dataclass(frozen=True)
class CheckpointInfo:
    """Summarize a checkpoint; ``str()`` of it is a table.

    Attributes:
        path: as it was given.
        format: where it comes from.
        files: files that hold its tensors.
        num_tensors: tensors of the model, with adapters counted as merged.
        num_parameters: likewise.
        num_bytes: bytes of those tensors, as they are stored.
        dtypes: parameters by the name of their type.
        architecture: architecture of the model; ``architecture.flow_map`` is None for a plain Wan
            model, and ``architecture.causal`` for a bidirectional one.
        is_causal: whether it is the causal model's.
        adapter_ranks: ranks of the adapters that it has; empty without.
        left_out: the number of tensors of other models in its file, by the first part of their
            names.
        problems: everything for which :func:`load_transformer` would refuse it; empty for a sound
            checkpoint.
    """

    path: Path
    format: CheckpointFormat
    files: tuple[Path, ...]
    num_tensors: int
    num_parameters: int
    num_bytes: int
    dtypes: dict[str, int]
    architecture: CheckpointArchitecture
    is_causal: bool
    adapter_ranks: tuple[int, ...]
    left_out: dict[str, int]
    problems: tuple[str, ...]

    @property
    def is_flow_map(self) -> bool:
        """Tell whether the model has a second timestep."""
        return self.architecture.flow_map is not None

    def __str__(self) -> str:
        flow_map, causal = self.architecture.flow_map, self.architecture.causal
        types = ", ".join(
            f"{n / max(1, self.num_parameters):.1%} {dtype}" for dtype, n in self.dtypes.items()
        )
        lines = [
            ("path", str(self.path)),
            ("format", self.format.value),
            ("files", str(len(self.files))),
            ("tensors", f"{self.num_tensors:,}"),
            ("parameters", f"{self.num_parameters:,}"),
            ("size", _readable(self.num_bytes)),
            ("types", types),
            ("flow map", "no" if flow_map is None else _settings(flow_map)),
            ("causal", "no" if causal is None else _settings(causal)),
            (
                "adapters",
                f"rank {', '.join(map(str, self.adapter_ranks))}" if self.adapter_ranks else "no",
            ),
            *[
                (
                    "left out",
                    ", ".join(f"{n} tensors of {part}" for part, n in self.left_out.items()),
                )
            ]
            * bool(self.left_out),
            *(
                (name.replace("_", " "), str(value))
                for name, value in self.architecture.sizes().items()
            ),
            ("complete", f"no:{listed(self.problems)}" if self.problems else "yes"),
        ]
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def inspect(
    path: Path | str,
    *,
    subfolder: str | None = None,
    weights: str | None = None,
    attention_head_dim: int | None = None,
    strict_values: bool = False,
) -> CheckpointInfo:
    """Summarize a checkpoint; the arguments are those of ``load_transformer``.

    Arguments of ``load_transformer`` that are not here have their defaults.

    Args:
        path: see :func:`anyflow.formats.load_transformer`, as for the following three.
        subfolder: subfolder of path.
        weights: which ones of a training file.
        attention_head_dim: where the checkpoint does not say it.
        strict_values: read every tensor, and count NaN and infinity among the problems. False reads
            no tensor, but for the comparison of torch's files with their checksums.

    Raises:
        CheckpointFormatError: it is damaged, contradicts itself, or is of no format that is
            understood.
    """
    options = ReadOptions(
        subfolder=subfolder, weights=weights, attention_head_dim=attention_head_dim
    )
    checkpoint = open_checkpoint(path, options)
    infos = {own: checkpoint.reader.infos[own] for own in _own_names(checkpoint)}
    dtypes: Counter[str] = Counter()
    for info in infos.values():
        dtypes[info.dtype] += math.prod(info.shape)
    problems = problems_of(checkpoint, checkpoint.architecture.build_empty())
    if not problems and checkpoint.files.weights[0].suffix in TORCH_SUFFIXES:
        TorchReader(checkpoint.files.weights[0], weights).verify()
    if strict_values and not problems:
        problems = [f"NaN or infinity: {own}" for own in _not_finite(checkpoint)]
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
        left_out=dict(checkpoint.others),
        problems=tuple(problems),
    )


def _own_names(checkpoint: Checkpoint) -> list[str]:
    return [*checkpoint.names.values(), *checkpoint.unknown]


def _settings(settings: FlowMap | CausalSettings) -> str:
    return ", ".join(f"{name} {value}" for name, value in vars(settings).items())


def _not_finite(checkpoint: Checkpoint) -> list[str]:
    values = FiniteWeights()
    for own in checkpoint.names.values():
        values.add(own, checkpoint.reader.read(own))
    return values.not_finite()


def _readable(num_bytes: int) -> str:
    unit = next((i for i in range(4) if num_bytes < 1000 ** (i + 1)), 4)
    return f"{num_bytes / 1000**unit:.1f} {('B', 'kB', 'MB', 'GB', 'TB')[unit]}"
