"""Share a sample's tokens among ranks, and swap them for heads around self-attention (Ulysses).

Of s ranks each holds a slice of every frame, so that the number of frames is free and one
modulation row per frame still covers equally many tokens. The last slices are padded with zeros,
which no token attends to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from anyflow.models.attention import attention


class SequenceGroup:
    """Hold the ranks that share a sample's tokens; a copy of the model has the same group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.degree = dist.get_rank(group), dist.get_world_size(group)

    def __deepcopy__(self, memo: dict[int, object]) -> SequenceGroup:
        return self


@dataclass(frozen=True)
class TokenSplit:
    """Place the L = F P tokens of a forward on s ranks: n = ceil(P / s) of each frame on each.

    Args:
        ranks: the group.
        frames: F.
        positions: P, tokens of a frame.
    """

    ranks: SequenceGroup
    frames: int
    positions: int

    @property
    def share(self) -> int:
        """Return n, the tokens of a frame that a rank holds, with padding."""
        return -(-self.positions // self.ranks.degree)

    def scatter(self, x: Tensor) -> Tensor:
        """Return this rank's part of what all ranks have: ``[B, L, ...] -> [B, F n, ...]``."""
        return self._slices(x)[self.ranks.rank].contiguous()

    def gather(self, x: Tensor) -> Tensor:
        """Return all tokens on every rank: ``[B, F n, ...] -> [B, L, ...]``.

        The backward sums the ranks' gradients.
        """
        return self._tokens(_AllToAll.apply(x.expand(self.ranks.degree, *x.shape), self.ranks))

    def attention(self, query: Tensor, key: Tensor, value: Tensor, backend: str | None) -> Tensor:
        """Attend among the tokens of all ranks, with H / s heads on each rank.

        Query, key and value are ``[B, F n, H, Dh]``, the result is ``[B, F n, H Dh]``.
        """
        heads = [x.unflatten(2, (self.ranks.degree, -1)).movedim(2, 0) for x in (query, key, value)]
        query, key, value = self._tokens(
            _AllToAll.apply(torch.cat(heads, dim=1), self.ranks)
        ).chunk(3)
        out = attention(query, key, value, attention_backend=backend)
        return _AllToAll.apply(self._slices(out), self.ranks).movedim(0, 2).flatten(2)

    def _slices(self, x: Tensor) -> Tensor:
        """Cut ``[B, L, ...]`` into ``[s, B, F n, ...]``, padded."""
        x = x.unflatten(1, (self.frames, self.positions))
        if missing := self.ranks.degree * self.share - self.positions:
            x = torch.cat([x, x.new_zeros(*x.shape[:2], missing, *x.shape[3:])], dim=2)
        return x.unflatten(2, (self.ranks.degree, self.share)).movedim(2, 0).flatten(2, 3)

    def _tokens(self, x: Tensor) -> Tensor:
        """Join ``[s, B, F n, ...]`` to ``[B, L, ...]``, which undoes :meth:`_slices`."""
        x = x.unflatten(2, (self.frames, self.share)).movedim(0, 2).flatten(2, 3)
        return x[:, :, : self.positions].flatten(1, 2)


class _AllToAll(torch.autograd.Function):
    """Send ``x[j]`` of rank i to ``x[i]`` of rank j, a linear map that is its own adjoint."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: SequenceGroup) -> Tensor:
        ctx.ranks = ranks
        return _all_to_all(x, ranks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grads[0], ctx.ranks), None


def _all_to_all(x: Tensor, ranks: SequenceGroup) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=ranks.group)
    return out
