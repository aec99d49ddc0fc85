"""What every loss returns."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class LossOutput:
    """A scalar ``loss`` to call backward on, and detached scalars (tensors: nothing synchronizes).

    Args:
        loss: mean over the batch.
        metrics: to report.
        norms: of what each network gave, in the order of evaluation, by a phrase such as
            ``"score of the teacher"``; the first that is not finite names the network that failed.
    """

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
