"""Open a checkpoint: its format, its tensors by our names, and the architecture of its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from anyflow.formats.adapters import MergedReader, has_adapters
from anyflow.formats.architecture import (
    FAR_WAN,
    FLOW_MAP_KEYS,
    KINDS,
    ORIGINAL_WAN,
    WAN,
    CausalSettings,
    CheckpointArchitecture,
    Config,
    FlowMap,
    parse_config,
    resolve,
)
from anyflow.formats.errors import CheckpointFormatError, listed
from anyflow.formats.files import TORCH_SUFFIXES, CheckpointFiles, find_files, read_json
from anyflow.formats.hub import local_checkpoint
from anyflow.formats.lora_file import adapter_config_beside
from anyflow.formats.names import (
    CAUSAL_KEYS,
    DIFFUSERS,
    FASTVIDEO,
    ORIGINAL,
    FoundTransformer,
    Naming,
    locate,
    naming_of,
)
from anyflow.formats.nvlabs import SECTIONS
from anyflow.formats.readers import FLOATS, Reader, SafetensorsReader, TorchReader
from anyflow.utils.documents import shortened
from anyflow.utils.validation import brief, is_finite_number, whole_number

if TYPE_CHECKING:
    from anyflow.models import AnyFlowTransformer3DModel


class CheckpointFormat(Enum):
    """Name the origin of a checkpoint."""

    ANYFLOW = "diffusers AnyFlow"
    WAN = "diffusers Wan"
    FAR_WAN = "older AnyFlow layout of the hub"
    TRAINING = "NVlabs training file"
    ORIGINAL = "original Wan"
    FASTVIDEO = "FastVideo"


@dataclass(frozen=True)
class ReadOptions:
    """Hold what a checkpoint does not say itself: arguments of ``load_transformer``."""

    subfolder: str | None = None
    weights: str | None = None
    lora_alpha: float | None = None
    attention_head_dim: int | None = None
    flow_map: FlowMap | None = None
    causal: CausalSettings | None = None
    bidirectional: bool = False

    def __post_init__(self) -> None:
        if self.weights is not None and self.weights not in tuple(SECTIONS):
            raise ValueError(f"weights must be {' or '.join(SECTIONS)}, got {brief(self.weights)}")
        if self.lora_alpha is not None and not is_finite_number(self.lora_alpha):
            raise ValueError(f"lora_alpha must be finite, got {brief(self.lora_alpha)}")
        if self.attention_head_dim is not None:
            whole_number("attention_head_dim", self.attention_head_dim, 2, 1024)
        if self.causal is not None and self.bidirectional:
            raise ValueError("causal=... makes a causal model, and bidirectional=True another one")


@dataclass(frozen=True)
class Checkpoint:
    """Hold an open checkpoint, of which only headers are read.

    Attributes:
        path: as the user gave it.
        format: what it was recognized as.
        files: files that hold it.
        reader: its tensors, adapters merged, by their own names.
        names: from our name of a tensor to its own.
        naming: the table between the two.
        prefix: before every name of its own.
        others: the number of tensors of each other model in its file, by the first part of their
            names; left out.
        unknown: tensors without a name of ours.
        is_causal: whether it is a checkpoint of the causal model.
        architecture: architecture of the model to load.
    """

    path: Path
    format: CheckpointFormat
    files: CheckpointFiles
    reader: MergedReader
    names: Mapping[str, str]
    naming: Naming
    prefix: str
    others: Mapping[str, int]
    unknown: tuple[str, ...]
    is_causal: bool
    architecture: CheckpointArchitecture

    def differences(self, model: AnyFlowTransformer3DModel) -> list[str]:
        """List every tensor by which the checkpoint and the model differ.

        The causal tensors of a model that is made of a bidirectional checkpoint are none of them.
        """
        expected = {
            name: tuple(p.shape)
            for name, p in model.named_parameters()
            if self.is_causal or not name.startswith(CAUSAL_KEYS)
        }
        lines = [f"missing: {self._described(name)}" for name in expected if name not in self.names]
        lines += [f"unexpected: {name}" for name in self.unknown]
        for name, own in self.names.items():
            info = self.reader.infos[own]
            if name not in expected:
                lines.append(f"unexpected: {own}")
            elif info.shape != expected[name]:
                lines.append(
                    f"shape of {own}: {list(info.shape)}, the model has {list(expected[name])}"
                )
            elif info.dtype not in FLOATS:
                lines.append(f"type of {own}: {info.dtype}, a parameter is {', '.join(FLOATS)}")
        return lines

    def _described(self, name: str) -> str:
        own = self.naming.theirs(name)
        return name if own is None or own == name else f"{self.prefix}{own} ({name})"


def open_checkpoint(path: Path | str, options: ReadOptions, merge_on: str = "cpu") -> Checkpoint:
    """Find and recognize a checkpoint and read its headers; ``merge_on`` is where adapters merge.

    Raises:
        CheckpointFormatError: it is damaged, contradicts itself, or is of no format that is
            understood.
    """
    files = find_files(local_checkpoint(path, options.subfolder), options.subfolder)
    path = Path(path)
    config = _read_config(files)
    raw = _reader_of(files, options.weights)
    reader = _with_adapters(raw, files, options, merge_on)
    located, naming = _recognized(reader, path)

    names: dict[str, str] = {}
    unknown = []
    has_causal = False
    for name, own in located.names.items():
        is_causal = name.startswith(CAUSAL_KEYS)
        has_causal |= is_causal
        if is_causal and options.bidirectional:
            continue
        ours = name if is_causal else naming.ours(name)
        if ours is None:
            unknown.append(own)
        else:
            names[ours] = own
    shapes = {name: reader.infos[own].shape for name, own in names.items()}
    is_causal = has_causal or (config is not None and bool(config.causal))
    if config is not None and options.bidirectional:
        config = replace(config, causal=None)
    return Checkpoint(
        path=path,
        format=_format_of(naming, config, files, shapes),
        files=files,
        reader=reader,
        names=names,
        naming=naming,
        prefix=located.prefix,
        others=located.others,
        unknown=tuple(unknown),
        is_causal=is_causal,
        architecture=resolve(
            shapes,
            config,
            options.attention_head_dim,
            options.flow_map,
            options.causal,
            shortened(path),
        ),
    )


def detect(path: Path | str, subfolder: str | None = None) -> CheckpointFormat:
    """Recognize the format of a checkpoint by its files, its config and the names of its tensors.

    Raises:
        CheckpointFormatError: it is damaged, or of no format that is understood.
    """
    files = find_files(local_checkpoint(path, subfolder), subfolder)
    located, naming = _recognized(_reader_of(files, None), Path(path))
    return _format_of(naming, _read_config(files), files, located.names)


def _recognized(reader: Reader, path: Path) -> tuple[FoundTransformer, Naming]:
    """Return where the transformer is among the tensors, and whose names it has."""
    where = shortened(path)
    located = locate({name: info.shape for name, info in reader.infos.items()}, where)
    naming = naming_of(located.names)
    if naming is None:
        raise CheckpointFormatError(
            f"{where}: these names are of no format that is "
            f"understood:{listed(list(located.names))}"
        )
    return located, naming


def _reader_of(files: CheckpointFiles, weights: str | None) -> Reader:
    first = files.weights[0]
    if first.suffix in TORCH_SUFFIXES:
        return TorchReader(first, weights)
    if first.suffix != ".safetensors":
        raise CheckpointFormatError(
            f"{first} should end in .safetensors or {', '.join(TORCH_SUFFIXES)}"
        )
    if weights is not None:
        raise CheckpointFormatError(
            f"weights={weights!r} is of training files, but {first} has one set of weights only"
        )
    return SafetensorsReader(files.weights, files.index)


def _read_config(files: CheckpointFiles) -> Config | None:
    if files.config is None:
        return None
    raw = read_json(files.config)
    if files.named and raw.get("_class_name") not in KINDS:
        return None  # another model's, beside a file that was named
    return parse_config(raw, str(files.config))


def _with_adapters(
    raw: Reader, files: CheckpointFiles, options: ReadOptions, merge_on: str
) -> MergedReader:
    """Merge adapters by the user's alpha, or by the ``adapter_config.json`` beside the weights."""
    config = adapter_config_beside(files.weights[0]) if has_adapters(raw.infos) else None
    given, said = options.lora_alpha, None if config is None else config.lora_alpha
    if config is not None and given is not None and said is not None and given != said:
        raise CheckpointFormatError(
            f"lora_alpha={given:g} was given, but {config.where} has {said:g}"
        )
    return MergedReader(raw, given, torch.device(merge_on), config)


def _format_of(
    naming: Naming, config: Config | None, files: CheckpointFiles, names: Mapping[str, object]
) -> CheckpointFormat:
    if naming is not DIFFUSERS:
        return {
            ORIGINAL.title: CheckpointFormat.ORIGINAL,
            FASTVIDEO.title: CheckpointFormat.FASTVIDEO,
        }[naming.title]
    if config is not None:
        kinds = {
            FAR_WAN: CheckpointFormat.FAR_WAN,
            WAN: CheckpointFormat.WAN,
            ORIGINAL_WAN: CheckpointFormat.WAN,
        }
        return kinds.get(config.kind, CheckpointFormat.ANYFLOW)
    if files.weights[0].suffix in TORCH_SUFFIXES:
        return CheckpointFormat.TRAINING
    flow_map = any(name.startswith(FLOW_MAP_KEYS) for name in names)
    return CheckpointFormat.ANYFLOW if flow_map else CheckpointFormat.WAN
