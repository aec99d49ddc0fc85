"""Average an update's scalars since the last line of metrics, over updates and ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anyflow.utils.devices import widest_float


class Window:
    """Collect scalars where they are, and read the device only when a mean is wanted.

    Each update's mean over the ranks is kept, and they are added up exactly (:func:`math.fsum`), so
    that a run that is interrupted within a window reports what one does that is not.

    Args:
        device: device of the scalars.
        state: state of a window that is continued, from :meth:`state`.
    """

    def __init__(self, device: torch.device, state: Mapping[str, Any] | None = None) -> None:
        self._device = device
        self._pending: list[tuple[str, Tensor]] = []
        self._means: dict[str, list[float]] = {}
        self._settings: dict[str, float] = {}
        if state is not None:
            self._means = {name: list(values) for name, values in state["means"].items()}
            self._settings = dict(state["settings"])

    def add(self, scalars: Mapping[str, Tensor | float]) -> None:
        """Note this rank's scalars of an update: tensors are measured, plain numbers are set.

        A learning rate is such a number.
        """
        for name, value in scalars.items():
            if isinstance(value, Tensor):
                self._pending.append((name, value.detach()))
            else:
                self._settings[name] = value

    def take(self) -> dict[str, float]:
        """Return each scalar's mean over its updates and each setting's last value; start anew.

        Collective.
        """
        self._read()
        means = {name: math.fsum(values) / len(values) for name, values in self._means.items()}
        values = {**means, **self._settings}
        self._means, self._settings = {}, {}
        return values

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of a window that has not ended, as JSON values.

        Collective.
        """
        self._read()
        return {
            "means": {name: list(values) for name, values in self._means.items()},
            "settings": {**self._settings},
        }

    def _read(self) -> None:
        if not self._pending:
            return
        names, scalars = zip(*self._pending, strict=True)
        self._pending = []
        dtype = widest_float(self._device)
        values = torch.stack([scalar.to(self._device, dtype) for scalar in scalars])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(values)
            values /= dist.get_world_size()
        for name, value in zip(names, values.tolist(), strict=True):
            self._means.setdefault(name, []).append(value)
