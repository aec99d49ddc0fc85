"""Scale the flow-map losses of an update to its diffusion losses."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from anyflow.methods.collectives import all_reduce_sum


class DiffusionBalance:
    """Scale the flow-map losses of one update to the mean of its diffusion losses.

    A flow-map sample of loss l is scaled by ``mean / (l + 1e-5)``, equation (12) of
    docs/algorithm.md, where the mean is over the diffusion samples of all ranks and micro-steps. An
    update takes one balance through all its micro-steps. No flow-map sample may come in an earlier
    micro-step than a diffusion sample of any rank: the mean is then complete wherever it is used.
    An update without a diffusion sample is left unscaled.

    Args:
        group: the ranks with samples of their own; None for all processes.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        # loss and count of the diffusion samples, then of the others
        self._sums: Tensor | None = None

    def scales(self, losses: Tensor, is_diffusion: Tensor) -> Tensor:
        """Return the factors ``[B]`` of a micro-step's losses; collective over the group.

        Args:
            losses: ``[B]``, weighted, of this rank.
            is_diffusion: ``[B]`` boolean.
        """
        losses = losses.detach()
        kinds = (is_diffusion, ~is_diffusion)
        parts = [
            part
            for kind in kinds
            for part in (losses.where(kind, 0.0).sum(), kind.sum().to(losses.dtype))
        ]
        sums = all_reduce_sum(torch.stack(parts), self._group)
        self._sums = sums if self._sums is None else self._sums + sums
        mean, count = self._sums[0] / self._sums[1].clamp(min=1), self._sums[1]
        return torch.where(
            is_diffusion | (count == 0), torch.ones_like(losses), mean / (losses + 1e-5)
        )

    def metrics(self) -> dict[str, Tensor]:
        """Return the mean losses of both kinds before scaling, over all ranks and micro-steps.

        A kind without samples has the mean 0.
        """
        assert self._sums is not None, "no micro-step has been balanced"
        diffusion, diffusions, flow_map, flow_maps = self._sums.unbind()
        return {
            "loss_diffusion": diffusion / diffusions.clamp(min=1),
            "loss_flow_map": flow_map / flow_maps.clamp(min=1),
        }
