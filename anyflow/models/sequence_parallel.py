"""Share a sample's tokens among ranks, and swap them for heads around self-attention (Ulysses).

Of s ranks each holds a slice of every frame, so that the number of frames is free and one
modulation row per frame still covers equally many tokens. The last slices are padded with zeros,
which no token attends to. Self-attention runs on all tokens and H / s heads, so that the causal
model's chunks and caches have nothing to do with the slices.
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

    def share(self, positions: int) -> int:
        """Return the tokens of a frame on each rank, ceil(P / s)."""
        return -(-positions // self.degree)

    def __deepcopy__(self, memo: dict[int, object]) -> SequenceGroup:
        return self


@dataclass(frozen=True)
class FrameShare:
    """Hold how consecutive frames of one kind are shared.

    Args:
        frames: F, the number of frames.
        positions: P, the tokens of a frame.
        share: n, the tokens of a frame that a rank holds, with padding; s n >= P.
    """

    frames: int
    positions: int
    share: int


@dataclass(frozen=True)
class TokenSplit:
    """Place the L tokens of a forward on s ranks, of which each holds L' with its padding.

    Args:
        ranks: the group.
        kinds: frames in their order; L and L' are the sums of F P and of F n.
    """

    ranks: SequenceGroup
    kinds: tuple[FrameShare, ...]

    @classmethod
    def of_frames(cls, ranks: SequenceGroup, frames: int, positions: int) -> TokenSplit:
        """Share frames of one kind, n = ceil(P / s) tokens of a frame on each rank."""
        return cls(ranks, (FrameShare(frames, positions, ranks.share(positions)),))

    @property
    def counts(self) -> list[int]:
        """Return the tokens of this rank for each kind, F n."""
        return [kind.frames * kind.share for kind in self.kinds]

    def last(self) -> TokenSplit:
        """Return the split of the last kind of frames alone."""
        return TokenSplit(self.ranks, self.kinds[-1:])

    def scatter(self, x: Tensor) -> Tensor:
        """Return this rank's part of what all ranks have: ``[B, L, ...] -> [B, L', ...]``."""
        return self._slices(x)[self.ranks.rank].contiguous()

    def gather(self, x: Tensor) -> Tensor:
        """Return all tokens on every rank: ``[B, L', ...] -> [B, L, ...]``.

        The backward sums the ranks' gradients.
        """
        return self._tokens(_AllToAll.apply(x.expand(self.ranks.degree, *x.shape), self.ranks))

    def attention(self, query: Tensor, key: Tensor, value: Tensor, backend: str | None) -> Tensor:
        """Attend among the tokens of all ranks, with H / s heads on each rank.

        Query, key and value are ``[B, L', H, Dh]``, the result is ``[B, L', H Dh]``.
        """
        heads = [self._by_rank(x) for x in (query, key, value)]
        query, key, value = self._tokens(
            _AllToAll.apply(torch.cat(heads, dim=1), self.ranks)
        ).chunk(3)
        return self.to_tokens(attention(query, key, value, attention_backend=backend))

    def to_heads(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Swap tokens for heads: ``[B, L', H, Dh] -> [B, L, H / s, Dh]`` for both."""
        pair = torch.cat([self._by_rank(key), self._by_rank(value)], dim=1)
        key, value = self._tokens(_AllToAll.apply(pair, self.ranks)).chunk(2)
        return key, value

    def to_heads_with_queries(
        self, query: Tensor, key: Tensor, value: Tensor, queries: TokenSplit
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Swap tokens for heads as :meth:`to_heads`, where queries have a split of their own.

        One all-to-all carries all three.
        """
        sent = torch.cat([self._by_rank(x) for x in (query, key, value)], dim=2)
        received = _AllToAll.apply(sent, self.ranks)
        query, key, value = received.split([query.shape[1], key.shape[1], key.shape[1]], dim=2)
        return queries._tokens(query), self._tokens(key), self._tokens(value)

    def to_tokens(self, out: Tensor) -> Tensor:
        """Swap heads for tokens: ``[B, L, (H / s) Dh] -> [B, L', H Dh]``."""
        return _AllToAll.apply(self._slices(out), self.ranks).movedim(0, 2).flatten(2)

    def _by_rank(self, x: Tensor) -> Tensor:
        """Cut the heads of ``[B, L', H, Dh]`` into ``[s, B, L', H / s, Dh]``."""
        return x.unflatten(2, (self.ranks.degree, -1)).movedim(2, 0)

    def _slices(self, x: Tensor) -> Tensor:
        """Cut ``[B, L, ...]`` into ``[s, B, L', ...]``, padded."""
        counts = [kind.frames * kind.positions for kind in self.kinds]
        return _joined(
            [self._cut(*part) for part in zip(x.split(counts, 1), self.kinds, strict=True)], 2
        )

    def _tokens(self, x: Tensor) -> Tensor:
        """Join ``[s, B, L', ...]`` to ``[B, L, ...]``, which undoes :meth:`_slices`."""
        parts = zip(x.split(self.counts, 2), self.kinds, strict=True)
        return _joined([self._join(*part) for part in parts], 1)

    def _cut(self, x: Tensor, kind: FrameShare) -> Tensor:
        x = x.unflatten(1, (kind.frames, kind.positions))
        if missing := self.ranks.degree * kind.share - kind.positions:
            x = torch.cat([x, x.new_zeros(*x.shape[:2], missing, *x.shape[3:])], dim=2)
        return x.unflatten(2, (self.ranks.degree, kind.share)).movedim(2, 0).flatten(2, 3)

    def _join(self, x: Tensor, kind: FrameShare) -> Tensor:
        x = x.unflatten(2, (kind.frames, kind.share)).movedim(0, 2).flatten(2, 3)
        return x[:, :, : kind.positions].flatten(1, 2)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


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
