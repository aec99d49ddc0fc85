"""Find the file of a LoRA, and read it with everything beside it that decides its numbers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from anyflow.formats.adapter_config import AdapterConfig
from anyflow.formats.adapter_keys import (
    PEFT_PREFIX,
    AdapterKey,
    Layers,
    Role,
    parse_key,
    reason_to_refuse,
)
from anyflow.formats.adapter_updates import Layer, Plan, add_layer, promised, require_finite
from anyflow.formats.errors import CheckpointFormatError, listed
from anyflow.formats.files import TORCH_SUFFIXES
from anyflow.formats.readers import Reader, SafetensorsReader, TensorInfo, TorchReader
from anyflow.utils.documents import (
    parse_json,
    read_json,
    require_regular_file,
    shortened,
    system_reason,
)

CONFIG = "adapter_config.json"
_PEFT_STEM, _DIFFUSERS_STEM = "adapter_model", "pytorch_lora_weights"
_SUFFIXES = (".safetensors", *TORCH_SUFFIXES)
# diffusers' entry in the header of a safetensors file, whose fields have the transformer's name
# before them.
_METADATA, _METADATA_PREFIX = "lora_adapter_metadata", "transformer."


@dataclass(frozen=True)
class LoRAFile:
    """Hold a LoRA whose headers are read and whose keys are understood.

    Whether it fits a transformer is decided by :meth:`plan`.

    Attributes:
        path: path of the file.
        reader: reader of its tensors.
        keys: its keys, taken apart.
        configs: all that say something of its layers.
        is_peft: whether it has PEFT's names, by which a layer has no scale but its configuration's.
    """

    path: Path
    reader: Reader
    keys: tuple[AdapterKey, ...]
    configs: tuple[AdapterConfig, ...]
    is_peft: bool

    def read_all(self) -> dict[str, Tensor]:
        """Read every tensor, by its key in the file.

        Raises:
            CheckpointFormatError: the file is damaged, or a tensor has NaN or infinity.
        """
        tensors = {}
        for name in self.reader.infos:
            tensors[name] = self.reader.read(name).clone()
        require_finite(tensors.items(), f"LoRA {self.path}")
        return tensors

    def plan(self, shapes: Mapping[str, tuple[int, ...]]) -> Plan:
        """Find what the LoRA does to each parameter of a transformer.

        Args:
            shapes: shapes of the transformer's parameters, by our names.

        Raises:
            CheckpointFormatError: a tensor of the file has no place, two have the same, a pair is
                not complete, or a shape, type or scale is not possible; each is named as in the
                file.
        """
        names, plan = Layers(shapes), Plan()
        grouped: dict[str, dict[Role, AdapterKey]] = {}
        found: dict[str, tuple[str, ...]] = {}
        for key in self.keys:
            ours, candidates = names.find(key.layer)
            if ours is None:
                plan.lines.append(
                    f"no linear layer or other part of this transformer, {key.layer}: {key.key}"
                )
                continue
            found.setdefault(ours, candidates)
            before = grouped.setdefault(ours, {}).setdefault(key.role, key)
            if before is not key:
                plan.lines.append(f"two keys for one tensor: {before.key} and {key.key}")
        layers = [
            Layer(ours, found[ours], lambda role, ours=ours: names.parameter(ours, role), tensors)  # type: ignore[misc]
            for ours, tensors in grouped.items()
        ]
        for layer in layers:
            infos, unscaled = self.reader.infos, None if self.is_peft else 1.0
            add_layer(plan, layer, infos, self.reader.read, self.configs, None, unscaled)
        plan.lines += promised(self.configs, layers)
        plan.check(self.reader.infos, shapes)
        if not plan.lines:
            plan.lines += _without_scale(plan)
        if plan.lines:
            raise CheckpointFormatError(
                f"LoRA {self.path} does not fit the transformer:{listed(plan.lines)}"
            )
        return plan


def open_lora(path: Path | str) -> LoRAFile:
    """Find a LoRA, read its headers and its configuration, and take its keys apart.

    Args:
        path: a file (``.safetensors``, or a dictionary of tensors by ``torch.save``) of any origin,
            or a folder with one: diffusers' ``pytorch_lora_weights``, PEFT's ``adapter_model``
            beside ``adapter_config.json``, or the only ``.safetensors`` file.

    Raises:
        CheckpointFormatError: no file or more than one fits, it is damaged or empty, its
            configuration is wrong or asks for what is not supported, or it has keys of another
            method or of another part than the transformer.
    """
    if not isinstance(path, (str, Path)):
        raise CheckpointFormatError(f"LoRA: the path should be a text or a Path, got {path!r}")
    file = _find(Path(path))
    reader: Reader = (
        SafetensorsReader((file,), None)
        if file.suffix == ".safetensors"
        else TorchReader(file, None)
    )
    infos = reader.infos
    if not infos:
        raise CheckpointFormatError(f"LoRA {file}: it is empty, no tensor is in it")
    keys, lines = _parse(infos)
    if lines:
        raise CheckpointFormatError(f"LoRA {file} does not fit the transformer:{listed(lines)}")
    is_peft = file.stem == _PEFT_STEM or any(key.layer.startswith(PEFT_PREFIX) for key in keys)
    configs = tuple(
        c for c in (_config_beside(file, is_peft), _config_inside(file)) if c is not None
    )
    has_alpha = any(key.role is Role.ALPHA for key in keys)
    if is_peft and not configs and not has_alpha and any(key.role is Role.DOWN for key in keys):
        raise CheckpointFormatError(
            f"LoRA: {file} needs {CONFIG} beside it, which has its rank and alpha"
        )
    return LoRAFile(file, reader, tuple(keys), configs, is_peft)


def _find(path: Path) -> Path:
    if not os.path.isdir(path):
        file = _regular(path)
        if not file.name.endswith(_SUFFIXES):
            raise CheckpointFormatError(
                f"LoRA: {shortened(path)} should end in {', '.join(_SUFFIXES)}"
            )
        return file
    try:
        names = sorted(os.listdir(path))
    except OSError as error:
        raise CheckpointFormatError(
            f"LoRA: {shortened(path)} cannot be read: {system_reason(error)}"
        ) from error
    known = [f"{stem}{suffix}" for stem in (_DIFFUSERS_STEM, _PEFT_STEM) for suffix in _SUFFIXES]
    files = [name for name in names if name in known]
    if not files:
        files = [name for name in names if name.endswith(".safetensors")]
    has_index = any(name.endswith(".index.json") for name in names)
    if has_index or len(files) != 1:
        which = (
            "none"
            if not files
            else "an index"
            if has_index
            else f"more than one file; name one:{listed(files)}"
        )
        raise CheckpointFormatError(
            f"LoRA: {shortened(path)} should hold one .safetensors file, {_DIFFUSERS_STEM} or "
            f"{_PEFT_STEM}, but has "
            f"{which}"
        )
    return _regular(path / files[0])


def _regular(path: Path) -> Path:
    try:
        return require_regular_file(path)
    except ValueError as error:
        raise CheckpointFormatError(f"LoRA: {error}") from error


def _parse(infos: Mapping[str, TensorInfo]) -> tuple[list[AdapterKey], list[str]]:
    keys, lines = [], []
    for name in infos:
        refused, key = reason_to_refuse(name), parse_key(name)
        if refused is not None:
            lines.append(f"{refused}: {name}")
        elif key is None:
            lines.append(f"not understood: {name}")
        else:
            keys.append(key)
    adapters = {key.adapter: key.key for key in keys if key.adapter is not None}
    if len(adapters) > 1:
        lines.append(
            f"adapters of {len(adapters)} kinds in one file: {', '.join(adapters.values())}"
        )
    return keys, lines


def _config_beside(file: Path, is_peft: bool) -> AdapterConfig | None:
    """Read the configuration of PEFT's file, or of the only file, in the same folder."""
    if not is_peft and any(
        n.endswith(_SUFFIXES) and n != file.name for n in os.listdir(file.parent)
    ):
        return None
    return adapter_config_beside(file)


def adapter_config_beside(file: Path) -> AdapterConfig | None:
    """Read PEFT's ``adapter_config.json`` beside a file of tensors, or return None without one.

    Raises:
        CheckpointFormatError: it cannot be read, or asks for what is not supported.
    """
    config = file.with_name(CONFIG)
    return _parsed(lambda: read_json(config), str(config)) if os.path.lexists(config) else None


def _config_inside(file: Path) -> AdapterConfig | None:
    if file.suffix != ".safetensors":
        return None
    with safe_open(file, "pt") as handle:
        metadata = handle.metadata()
        text = None if metadata is None else metadata.get(_METADATA)
    if text is None:
        return None
    where = f"{file}, {_METADATA}"

    def read() -> object:
        raw = parse_json(text, where)
        if not isinstance(raw, dict) or not any(name.startswith(_METADATA_PREFIX) for name in raw):
            return raw
        return {
            name.removeprefix(_METADATA_PREFIX): value
            for name, value in raw.items()
            if name.startswith(_METADATA_PREFIX)
        }

    return _parsed(read, where)


def _parsed(read: Callable[[], object], where: str) -> AdapterConfig:
    try:
        return AdapterConfig.parse(read(), where)
    except CheckpointFormatError:
        raise
    except ValueError as error:  # of the document itself
        raise CheckpointFormatError(f"LoRA: {error}") from error


def _without_scale(plan: Plan) -> list[str]:
    """List the updates whose scale neither a configuration nor a tensor says."""
    return [
        f"alpha is neither in the file nor in a configuration: {update.keys[0]}"
        for update in plan.updates.values()
        if getattr(update, "scale", 1.0) is None
    ]
