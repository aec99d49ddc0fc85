"""Define the block of the causal transformer: chunks attend to earlier chunks and cached keys."""

from __future__ import annotations

from dataclasses import dataclass

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
    """

    groups: tuple[QueryGroup, ...]
    outputs: Range | None = None
    output_rows: Range = (0, 0)
    keeps_keys: bool = False

    def attend(self, query: Tensor, key: Tensor, value: Tensor, backend: str | None) -> Tensor:
        """Attend as the groups say: ``query[B, L, H, Dh]`` to keys ``[B, S, H, Dh]``."""
        if not self.groups:
            return attention(query, key, value, attention_backend=backend)
        parts = [
            attention(
                query[:, slice(*group.queries)],
                _ranges(key, group.keys),
                _ranges(value, group.keys),
                attention_backend=backend,
            )
            for group in self.groups
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


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
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Return the tokens after the block, and their keys and values where a cache keeps them.

        Args:
            x, text, modulation, rotary: as for the bidirectional block; rows of the modulation
                cover equally many tokens.
            split: with sequence parallelism, where this rank's tokens are among those of all
                ranks, which attend with the rank's H / s heads.
            chunks: which tokens attend to which; None runs the bidirectional block.
            past: cached keys, after rotation, and values, ``[B, S, H, Dh]`` each, which are read
                only; those of the rank's heads.

        Returns:
            ``[B, L', D]``, the outputs; with ``chunks.keeps_keys`` also the keys and values of all
            tokens, ``[B, L, H, Dh]``, on all ranks those of the rank's heads.
        """
        if chunks is None:
            return super().forward(x, text, modulation, rotary, split)
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
        keys = torch.cat([*(pair[0] for pair in past), key], dim=1) if past else key
        values = torch.cat([*(pair[1] for pair in past), value], dim=1) if past else value
        out = chunks.attend(query, keys, values, self.attn1.attention_backend)
        out = out if queries is None else queries.to_tokens(out)
        kept = (key, value) if chunks.keeps_keys else ()
        del query, keys, values, key, value  # the feed-forward needs their memory
        x, n = self.add_self_attention(x, self.attn1.output(out), rows[2])
        del out
        a = self.attn2(n, text)
        x, n = residual_layer_norm(x, a, shift=rows[3], scale=rows[4], eps=self.eps)
        x = gated_residual(x, self.ffn(n), rows[5])
        return (x, *kept) if kept else x


def _ranges(x: Tensor, ranges: tuple[Range, ...]) -> Tensor:
    """Return ranges of ``x[B, S, H, Dh]``, copied only where there are several."""
    parts = [x[:, slice(*bounds)] for bounds in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
