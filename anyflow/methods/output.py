"""What every loss returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class LossOutput:
    """A scalar ``loss`` to call backward on, and detached scalar ``metrics`` (tensors: nothing synchronizes)."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
