"""Merge the LoRA adapters inside of a checkpoint into its weights, as they are read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from anyflow.formats.adapter_config import AdapterConfig
from anyflow.formats.adapter_keys import AdapterKey, Role, parse_key
from anyflow.formats.adapter_updates import (
    Layer,
    LowRank,
    Plan,
    Update,
    add_layer,
    require_finite,
)
from anyflow.formats.errors import CheckpointFormatError, listed
from anyflow.formats.names import prefix_of
from anyflow.formats.readers import Reader, TensorInfo

_ADAPTER_ROLES = (Role.DOWN, Role.UP, Role.UP_BIAS, Role.MAGNITUDE)
_BASE = re.compile(r"(.+)\.base_layer\.(weight|bias)")
_SAVED = re.compile(r"(.+?)\.modules_to_save\.[^.]+\.(.+)")
_ORIGINAL = re.compile(r"(.+?)\.original_module\.(.+)")


def has_adapters(names: Iterable[str]) -> bool:
    """Tell whether one of the names is of an adapter."""
    return any(
        (key := parse_key(name)) is not None and key.role in _ADAPTER_ROLES for name in names
    )


class MergedReader:
    """Read a checkpoint whose layers with adapters appear as plain layers.

    Attributes:
        infos: descriptions of the tensors, adapters merged.
        adapters: by the name of the weight that they are merged into.
        alpha: numerator of the scale of an adapter, or None where one of the adapters has none:
            then it cannot be read.

    Args:
        reader: reader of the checkpoint's files.
        alpha: alpha of the adapters where nothing else says it, or None.
        device: device to merge on.
        config: settings of the adapters, or None.

    Raises:
        CheckpointFormatError: an adapter is incomplete or does not fit its weight or its
            configuration, or the adapters are of more than one kind.
    """

    def __init__(
        self,
        reader: Reader,
        alpha: float | None,
        device: torch.device,
        config: AdapterConfig | None = None,
    ) -> None:
        self._reader, self._device = reader, device
        self.infos: dict[str, TensorInfo] = {}
        self._stored: dict[str, str] = {}
        grouped: dict[str, dict[Role, AdapterKey]] = {}
        plan = Plan()
        parsed = {name: parse_key(name) for name in reader.infos}
        adapted = {
            key.layer for key in parsed.values() if key is not None and key.role in _ADAPTER_ROLES
        }
        replaced = {f"{m[1]}.{m[2]}" for name in reader.infos if (m := _SAVED.fullmatch(name))}
        for name, info in reader.infos.items():
            key = parsed[name]
            is_alpha = key is not None and key.role is Role.ALPHA and key.layer in adapted
            if key is not None and (key.role in _ADAPTER_ROLES or is_alpha):
                before = grouped.setdefault(key.layer, {}).setdefault(key.role, key)
                kinds = "" if before.adapter == key.adapter else "adapters of 2 kinds, "
                if before is not key:
                    plan.lines.append(f"{kinds}two keys for one tensor: {before.key} and {name}")
                continue
            match = _BASE.fullmatch(name) or _SAVED.fullmatch(name)
            plain = name if match is None else f"{match[1]}.{match[2]}"
            if (
                original := _ORIGINAL.fullmatch(name)
            ) and f"{original[1]}.{original[2]}" in replaced:
                continue  # PEFT has put another module in its place
            if plain in self.infos:
                raise CheckpointFormatError(f"both {plain} and {name} are in the checkpoint")
            self.infos[plain], self._stored[plain] = info, name
        self._updates = self._planned(plan, grouped, alpha, [] if config is None else [config])
        self.adapters = {name: u for name, u in self._updates.items() if isinstance(u, LowRank)}
        scales = {u.scale for u in self.adapters.values()}
        self.alpha = None
        if self.adapters and None not in scales:
            first = next(iter(self.adapters.values()))
            assert first.scale is not None
            self.alpha = first.scale * first.rank

    def read(self, name: str) -> Tensor:
        """Read a tensor; one that an adapter changes comes in fp64, so that it is rounded once."""
        tensor = self._reader.read(self._stored[name])
        update = self._updates.get(name)
        if update is None:
            return tensor
        return update.apply(tensor.to(self._device, torch.float64), self._read_finite, strength=1.0)

    def _read_finite(self, key: str) -> Tensor:
        tensor = self._reader.read(key)
        require_finite([(key, tensor)], "adapters that cannot be merged")
        return tensor.to(self._device).to(torch.float64)

    def _planned(
        self,
        plan: Plan,
        grouped: Mapping[str, Mapping[Role, AdapterKey]],
        alpha: float | None,
        configs: Sequence[AdapterConfig],
    ) -> Mapping[str, Update]:
        keys = [key for tensors in grouped.values() for key in tensors.values()]
        kinds = {key.adapter: key.key for key in keys if key.adapter is not None}
        if len(kinds) > 1:
            plan.lines.insert(
                0, f"adapters of {len(kinds)} kinds in one checkpoint: {', '.join(kinds.values())}"
            )
        if grouped and not self.infos:
            raise CheckpointFormatError(
                f"a LoRA without the weights that it changes, as {keys[0].key}; give it as the "
                "LoRA of a pipeline"
            )
        prefix = prefix_of({name: info.shape for name, info in self.infos.items()})
        for name, tensors in grouped.items():
            names = tuple(dict.fromkeys((name.removeprefix(prefix), name)))
            parameters = {Role.DOWN: f"{name}.weight", Role.UP_BIAS: f"{name}.bias"}
            layer = Layer(name, names, parameters.__getitem__, tensors)
            add_layer(plan, layer, self._reader.infos, self._reader.read, configs, alpha, None)
        shapes = {name: info.shape for name, info in self.infos.items()}
        plan.check(self._reader.infos, shapes)
        if plan.lines:
            raise CheckpointFormatError(f"adapters that cannot be merged:{listed(plan.lines)}")
        return plan.updates
