"""Prepare the tokens of the causal model for its blocks: rotations, modulation rows, attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyflow.models.blocks import Rotary
from anyflow.models.causal_block import ChunkAttention
from anyflow.models.causal_call import rows_of_equal_length, split_of_layout
from anyflow.models.chunks import FrameTokens, TokenLayout
from anyflow.models.sequence_parallel import SequenceGroup, TokenSplit
from anyflow.utils.transfer import device_tensor
from anyflow.utils.validation import brief


@dataclass(frozen=True)
class TokenStream:
    """Hold tokens that blocks run together, with what they need for it.

    Args:
        x: ``[B, L, D]``, with sequence parallelism this rank's tokens.
        text: ``[B, S, D]``.
        modulation: ``[B, R, 6, D]``, of rows that cover equally many tokens.
        rotary: of x.
        split: with sequence parallelism, where the tokens are among those of all ranks.
        inner, last: which tokens attend to which in the blocks before the last one, and in it.
    """

    x: Tensor
    text: Tensor
    modulation: Tensor
    rotary: Rotary
    split: TokenSplit | None
    inner: ChunkAttention
    last: ChunkAttention

    @classmethod
    def of(
        cls,
        layout: TokenLayout,
        tokens: FrameTokens,
        x: Tensor,
        text: Tensor,
        modulation: Tensor,
        *,
        rope: Any,
        ranks: SequenceGroup | None,
        keeps_keys: bool = False,
        num_past: int = 0,
    ) -> TokenStream:
        """Lay out all tokens ``x[B, L, D]``.

        Args:
            layout: where they are, and what they attend to.
            tokens: tokens of a frame.
            x, text: see the class.
            modulation: ``[B, F, 6, D]``, or one row for all frames.
            rope: gives the rotations.
            ranks: those that share the tokens.
            keeps_keys: whether blocks return keys and values.
            num_past: keys of a shared context, which come first.
        """
        rotary, outputs, split = _rotary(rope, layout, tokens, x), layout.outputs, None
        if ranks is not None:
            split = split_of_layout(ranks, layout, tokens)
            cos, sin = (split.scatter(table[None])[0] for table in rotary)
            x, rotary = split.scatter(x), (cos, sin)
            if outputs != (0, 0):
                outputs = (x.shape[1] - split.counts[-1], x.shape[1])
        rows = (0, 0)
        if modulation.shape[1] > 1:
            modulation, rows = rows_of_equal_length(modulation, layout, tokens)
        keys_apart = num_past > 0 and all(
            stop <= num_past or start >= num_past
            for group in layout.groups
            for start, stop in group.keys
        )
        inner = last = ChunkAttention(layout.groups, keeps_keys=keeps_keys, keys_apart=keys_apart)
        if outputs != (0, x.shape[1]):
            last = ChunkAttention(layout.last_groups(), outputs, rows, keeps_keys)
        return cls(x, text, modulation, rotary, split, inner, last)

    def inputs(self, x: Tensor | None, is_last: bool) -> tuple[Any, ...]:
        """Return the arguments of a block for the tokens ``x[B, L, D]`` before it."""
        chunks = self.last if is_last else self.inner
        return x, self.text, self.modulation, self.rotary, self.split, chunks


@dataclass(frozen=True)
class ContextRows:
    """Name the rows of a batch whose context is computed.

    Args:
        computed: ``[C]``, those rows.
        rows: ``[B]``, which of the C each row attends to.
    """

    computed: Tensor
    rows: Tensor

    @classmethod
    def of(cls, given: Sequence[int], batch_size: int, device: torch.device) -> ContextRows | None:
        """Check what a caller gives; return None where every row has a context of its own.

        Raises:
            ValueError: the rows are not B numbers of rows.
        """
        rows = list(given)
        if len(rows) != batch_size or any(
            isinstance(row, bool) or not isinstance(row, int) or not 0 <= row < batch_size
            for row in rows
        ):
            raise ValueError(
                f"context_rows must be B={batch_size} integers in [0, {batch_size}), the row whose "
                f"context each row has, got {brief(rows)}"
            )
        if rows == list(range(batch_size)):
            return None
        computed = sorted(set(rows))
        places = [computed.index(row) for row in rows]
        return cls(
            device_tensor(computed, torch.long, device), device_tensor(places, torch.long, device)
        )


def _rotary(rope: Any, layout: TokenLayout, tokens: FrameTokens, x: Tensor) -> Rotary:
    dtype = torch.promote_types(x.dtype, torch.float32)
    tables = []
    for segment in layout.segments:
        ratio = tokens.ratio if segment.compressed else (1, 1)
        grid = (segment.num_frames, tokens.height // ratio[0], tokens.width // ratio[1])
        tables.append(rope(grid, x.device, dtype, first_frame=segment.first_frame, ratio=ratio))
    if len(tables) == 1:
        return tables[0]
    return torch.cat([t[0] for t in tables]), torch.cat([t[1] for t in tables])
