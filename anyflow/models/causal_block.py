"""Define the block of the causal transformer: chunks attend to earlier chunks and cached keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from anyflow.models.attention import attention
from anyflow.models.blocks import AnyFlowTransformerBlock, Rotary
from anyflow.models.chunks import QueryGroup, Range
from anyflow.models.sequence_parallel import TokenSplit
from anyflow.ops import gated_residual, layer_norm_modulate, residual_layer_norm

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ChunkAttention:
    """Hold what a block of the causal model computes for the tokens that it gets.

    Args:
        groups: which queries attend to which keys, cached ones first; none means all to all.
        outputs: tokens whose output is computed, the last segment's or none; None for all.
        output_rows: their modulation rows, where there is more than one.
        keeps_keys: whether the block returns keys and values, for a cache.
        keys_apart: whether no range of keys has both cached ones and others.
    """

    groups: tuple[QueryGroup, ...]
    outputs: Range | None = None
    output_rows: Range = (0, 0)
    keeps_keys: bool = False
    keys_apart: bool = False

    def attend(self, query: Tensor, sources: Sequence[KeysValues], backend: str | None) -> Tensor:
        """Attend as the groups say: ``query[B, L, H, Dh]`` to keys ``[B, S, H, Dh]``.

        Args:
            query: of the tokens whose output is computed.
            sources: keys and values in their order, cached ones first.
            backend: of :func:`~anyflow.models.attention.attention`.
        """
        if not (self.groups and self.keys_apart):
            sources = [_joined(list(sources))]
        if not self.groups:
            return attention(query, *sources[0], attention_backend=backend)
        queries = query.split([stop - start for start, stop in self._queries], dim=1)
        keys = _ranges([key for key, _ in sources], [group.keys for group in self.groups])
        values = _ranges([value for _, value in sources], [group.keys for group in self.groups])
        parts = [
            attention(*parts, attention_backend=backend)
            for parts in zip(queries, keys, values, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    @property
    def _queries(self) -> tuple[Range, ...]:
        """Return the queries of each group, which follow one another."""
        return tuple(group.queries for group in self.groups)


class SharedContext(NamedTuple):
    """Hold context tokens that several rows of noisy tokens attend to.

    Args:
        inputs: the first six arguments of :class:`AnyFlowFARTransformerBlock` for C contexts; the
            chunks keep keys.
        rows: ``[B]``, which of the contexts each row of noisy tokens attends to.
    """

    inputs: tuple[Any, ...]
    rows: Tensor


class AnyFlowFARTransformerBlock(AnyFlowTransformerBlock):
    """Run one block of the causal model; parameters are those of the bidirectional block."""

    def forward(  # type: ignore[override]  # two more arguments decide what is returned
        self,
        x: Tensor,
        text: Tensor,
        modulation: Tensor,
        rotary: Rotary,
        split: TokenSplit | None = None,
        chunks: ChunkAttention | None = None,
        past: tuple[KeysValues, ...] = (),
        context: SharedContext | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Return the tokens after the block, and their keys and values where a cache keeps them.

        Args:
            x, text, modulation, rotary: as for the bidirectional block; rows of the modulation
                cover equally many tokens.
            split: with sequence parallelism, where this rank's tokens are among those of all
                ranks, which attend with the rank's H / s heads.
            chunks: which tokens attend to which; None runs the bidirectional block.
            past: cached keys, after rotation, and values, ``[B, S, H, Dh]`` each, which are read
                only; those of the rank's heads.
            context: tokens that the block computes first, once for all rows that attend to them.

        Returns:
            ``[B, L', D]``, the outputs; with ``chunks.keeps_keys`` also the keys and values of all
            tokens, ``[B, L, H, Dh]``, on all ranks those of the rank's heads; with ``context`` the
            outputs and those of the context.
        """
        if chunks is None:
            return super().forward(x, text, modulation, rotary, split)
        if context is None:
            return self._run(x, text, modulation, rotary, split, chunks, past)
        after, key, value = self._run(*context.inputs)
        past = ((key.index_select(0, context.rows), value.index_select(0, context.rows)),)
        del key, value
        return self._run(x, text, modulation, rotary, split, chunks, past), after

    def _run(
        self,
        x: Tensor,
        text: Tensor,
        modulation: Tensor,
        rotary: Rotary,
        split: TokenSplit | None,
        chunks: ChunkAttention,
        past: tuple[KeysValues, ...] = (),
    ) -> Any:
        """Return what :meth:`forward` returns without a context."""
        rows = self.modulation_rows(modulation)
        n = layer_norm_modulate(x, rows[0], rows[1], self.eps)
        key, value = self.attn1.keys_values(n, rotary)
        queries = split
        if chunks.outputs is not None:
            start, stop = chunks.outputs
            x, n = x[:, start:stop], n[:, start:stop]
            if start == stop:  # an encoding reads nothing else of the last layer
                return x, *((key, value) if split is None else split.to_heads(key, value))
            queries = None if split is None else split.last()
            rotary = (rotary[0][start:stop], rotary[1][start:stop])
            if rows[0].shape[1] > 1:
                rows = tuple(row[:, slice(*chunks.output_rows)] for row in rows)
        query = self.attn1.queries(n, rotary)
        if split is not None and queries is not None:
            query, key, value = split.to_heads_with_queries(query, key, value, queries)
        out = chunks.attend(query, [*past, (key, value)], self.attn1.attention_backend)
        out = out if queries is None else queries.to_tokens(out)
        kept = (key, value) if chunks.keeps_keys else ()
        del query, key, value  # the feed-forward needs their memory
        x, n = self.add_self_attention(x, self.attn1.output(out), rows[2])
        del out
        a = self.attn2(n, text)
        x, n = residual_layer_norm(x, a, shift=rows[3], scale=rows[4], eps=self.eps)
        x = gated_residual(x, self.ffn(n), rows[5])
        return (x, *kept) if kept else x


def _ranges(sources: Sequence[Tensor], groups: Sequence[tuple[Range, ...]]) -> list[Tensor]:
    """Return ranges of what lies in the sources one after the other, joined for each group.

    Keys or values, ``[B, S, H, Dh]``, are copied only where a group has several ranges. Each range
    is within one source.
    """
    starts = [0, *accumulate(source.shape[1] for source in sources)]
    taken: list[list[Range]] = [[] for _ in sources]
    places: list[list[tuple[int, int]]] = []  # of each range of a group: source, place there
    for group in groups:
        places.append([])
        for start, stop in group:
            index = max(i for i, first in enumerate(starts[:-1]) if first <= start)
            places[-1].append((index, len(taken[index])))
            taken[index].append((start - starts[index], stop - starts[index]))
    parts = [take_ranges(x, ranges) for x, ranges in zip(sources, taken, strict=True)]
    joined = [[parts[index][place] for index, place in group] for group in places]
    return [group[0] if len(group) == 1 else torch.cat(group, dim=1) for group in joined]


def take_ranges(x: Tensor, ranges: Sequence[Range]) -> tuple[Tensor, ...]:
    """Return views of ranges of ``x[B, S, H, Dh]``, which may overlap.

    Their gradients are summed in one tensor. The gradient of each slice of torch would be a tensor
    of x's size, filled with zeros.
    """
    if torch.is_grad_enabled() and x.requires_grad and len(ranges) > 1:
        return cast("tuple[Tensor, ...]", _TakeRanges.apply(x, tuple(ranges)))
    return tuple(x[:, start:stop] for start, stop in ranges)


class _TakeRanges(torch.autograd.Function):
    """Take ranges along the second dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranges: tuple[Range, ...]) -> tuple[Tensor, ...]:
        ctx.ranges, ctx.size = ranges, x.shape[1]
        ctx.set_materialize_grads(False)
        return tuple(x[:, start:stop] for start, stop in ranges)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        total: Tensor | None = None
        for (start, stop), grad in zip(ctx.ranges, grads, strict=True):
            if grad is None:
                continue
            if total is None:
                total = grad.new_zeros(grad.shape[0], ctx.size, *grad.shape[2:])
            total[:, start:stop] += grad
        return total, None


def _joined(parts: Sequence[KeysValues]) -> KeysValues:
    """Join keys and values ``[B, S, H, Dh]`` along tokens, copied only where there are several."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([key for key, _ in parts], dim=1), torch.cat([v for _, v in parts], dim=1)
