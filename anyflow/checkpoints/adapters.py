"""LoRA adapters in a checkpoint, merged into the weights as they are read: ``W + (alpha / r) B A``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from anyflow.checkpoints.errors import CheckpointFormatError, listed
from anyflow.checkpoints.readers import FLOATS, Reader, TensorInfo

_BASE = re.compile(r"(.+)\.base_layer\.(weight|bias)")
_LORA = re.compile(r"(.+)\.lora_([AB])\.([^.]+)\.weight")


@dataclass(frozen=True)
class Adapter:
    """One layer's adapter: the names of its ``A[r, in]`` and ``B[out, r]``, and r."""

    down: str
    up: str
    rank: int


class MergedReader:
    """A reader whose layers with adapters appear as plain layers.

    Attributes:
        adapters: by the name of the weight that they are merged into.
        alpha: numerator of the scale, needed only to read such a weight.

    Raises:
        CheckpointFormatError: an adapter is incomplete or does not fit its weight, or there is more than one kind.
    """

    def __init__(self, reader: Reader, alpha: float | None, device: torch.device) -> None:
        self._reader, self.alpha, self._device = reader, alpha, device
        self.infos: dict[str, TensorInfo] = {}
        self._stored: dict[str, str] = {}
        halves: dict[str, dict[str, str]] = {}
        kinds = set()
        for name, info in reader.infos.items():
            if match := _LORA.fullmatch(name):
                halves.setdefault(f"{match[1]}.weight", {})[match[2]] = name
                kinds.add(match[3])
                continue
            match = _BASE.fullmatch(name)
            plain = name if match is None else f"{match[1]}.{match[2]}"
            if plain in self.infos:
                raise CheckpointFormatError(f"both {plain} and {name} are in the checkpoint")
            self.infos[plain], self._stored[plain] = info, name
        if len(kinds) > 1:
            raise CheckpointFormatError(f"adapters of {len(kinds)} kinds in one checkpoint: {', '.join(sorted(kinds))}")
        self.adapters = self._paired(halves)

    def read(self, name: str) -> Tensor:
        tensor = self._reader.read(self._stored[name])
        adapter = self.adapters.get(name)
        if adapter is None:
            return tensor
        assert self.alpha is not None
        # In fp64, so that the rounding to the parameter's type is the only one.
        weight, down, up = (
            t.to(self._device, torch.float64)
            for t in (tensor, self._reader.read(adapter.down), self._reader.read(adapter.up))
        )
        return torch.addmm(weight, up, down, alpha=self.alpha / adapter.rank)

    def _paired(self, halves: Mapping[str, Mapping[str, str]]) -> dict[str, Adapter]:
        adapters, lines = {}, []
        for target, names in halves.items():
            if set(names) != {"A", "B"} or target not in self.infos:
                lines.append(f"{', '.join(names.values())}: without its other half or its weight")
                continue
            down, up = (self._reader.infos[names[half]] for half in "AB")
            weight = self.infos[target].shape
            fits = len(down.shape) == len(up.shape) == 2 and down.shape[0] == up.shape[1] > 0
            if not fits or (up.shape[0], down.shape[1]) != weight or {down.dtype, up.dtype} - set(FLOATS):
                lines.append(
                    f"{target} {list(weight)}: A is {down.dtype} {list(down.shape)}, B {up.dtype} {list(up.shape)}"
                )
                continue
            adapters[target] = Adapter(names["A"], names["B"], down.shape[0])
        if lines:
            raise CheckpointFormatError(f"adapters that cannot be merged:{listed(lines)}")
        return adapters
