"""Exponential moving average of a module's parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class EMA:
    """``average <- decay * average + (1 - decay) * parameter``, in fp32 at least, on the parameters' device.

    Args:
        module: whose trainable parameters are averaged.
        decay: in [0, 1).
        warmup: with k updates done, the decay is at most ``(1 + k) / (10 + k)``, so that the start is forgotten early.

    Raises:
        ValueError: decay is out of range.
    """

    def __init__(self, module: nn.Module, decay: float, *, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self._names = [name for name, p in module.named_parameters() if p.requires_grad]
        self._averages = [_wide(p) for p in module.parameters() if p.requires_grad]

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take one step towards the module's parameters."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        self.updates += 1
        parameters = [p.detach().to(a.dtype) for p, a in zip(self._parameters(module), self._averages, strict=True)]
        torch._foreach_lerp_(self._averages, parameters, 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Write the averages into a module of the same parameters."""
        for parameter, average in zip(self._parameters(module), self._averages, strict=True):
            parameter.copy_(average)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages under the parameters' own names (dots kept)."""
        return dict(zip(self._names, self._averages, strict=True))

    def _parameters(self, module: nn.Module) -> list[Tensor]:
        by_name = dict(module.named_parameters())
        missing = [name for name in self._names if name not in by_name]
        if missing:
            raise ValueError(f"module lacks the averaged parameters {', '.join(missing)}")
        return [by_name[name] for name in self._names]


def _wide(parameter: Tensor) -> Tensor:
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
