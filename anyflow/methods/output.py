"""Define what every loss returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class LossOutput:
    """Hold a loss to call backward on, and detached scalars to report.

    Scalars stay tensors on the device: reading one would wait for it.

    Args:
        loss: mean over the batch.
        metrics: scalars to report, by name.
        norms: norm of each network's output, in the order of evaluation, by a phrase such as
            ``"score of the teacher"``; the first that is not finite names the network that failed.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
