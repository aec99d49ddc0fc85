"""Lay out a call of the causal model: the latents of each segment, times and modulation rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from anyflow.models.causal_cache import ChunkCache, EncodingPlan
from anyflow.models.chunks import (
    ChunkPartition,
    FrameTokens,
    Segment,
    TokenLayout,
    chunk_layout,
    encoding_layout,
    step_layout,
)
from anyflow.models.sequence_parallel import FrameShare, SequenceGroup, TokenSplit


@dataclass(frozen=True)
class CausalCall:
    """Hold the layout of a call, and the latents ``[B, f, C, H, W]`` of each of its segments."""

    layout: TokenLayout
    latents: Sequence[Tensor]

    def parts(self) -> Iterator[tuple[Segment, Tensor, bool]]:
        """List segments with their latents, and whether they are the last."""
        last = len(self.layout.segments) - 1
        pairs = zip(self.layout.segments, self.latents, strict=True)
        for index, (segment, latents) in enumerate(pairs):
            yield segment, latents, index == last

    def times(
        self, timestep: Tensor, r_timestep: Tensor | None, clean_timestep: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return t and r of every frame in the order of the layout, or ``[B]`` where all agree.

        Args:
            timestep, r_timestep: ``[B, F]`` of the frames without clean copies, or ``[B]`` of the
                full ones.
            clean_timestep: t = r of the clean copies, ``[B, F_f]`` or ``[B]``; None is 0.

        Raises:
            ValueError: clean_timestep has another shape.
        """
        counts = [segment.num_frames for segment in self.layout.segments]
        if timestep.ndim == 1 and (len(counts) == 1 or self.layout.outputs == (0, 0)):
            return timestep, r_timestep
        batch, full = timestep.shape[0], counts[-1]
        compressed = counts[0] if self.layout.has_compressed else 0
        copies = sum(counts) - compressed - full
        clean = timestep.new_zeros(batch, copies)
        if clean_timestep is not None:
            if clean_timestep.shape not in ((batch,), (batch, full)):
                raise ValueError(
                    f"clean_timestep must be [B={batch}] or [B={batch}, F={full}], got "
                    f"{tuple(clean_timestep.shape)}"
                )
            given = clean_timestep[:, None] if clean_timestep.ndim == 1 else clean_timestep
            clean = given.to(timestep).expand(batch, full)[:, :copies]

        def arranged(time: Tensor) -> Tensor:
            if time.ndim == 1:
                before, last = time.new_zeros(batch, compressed), time[:, None].expand(-1, full)
            else:
                before, last = time[:, :compressed], time[:, compressed:]
            return torch.cat([before, clean, last], dim=1)

        return arranged(timestep), None if r_timestep is None else arranged(r_timestep)


def call_on_chunks(
    x: Tensor,
    sizes: Sequence[int],
    full_chunk_limit: int,
    tokens: FrameTokens,
    clean: Tensor | None,
    encode: EncodingPlan | None,
) -> CausalCall:
    """Lay out a call on all frames ``x[B, F, C, H, W]``, with or without their clean copies.

    Args:
        x: compressed frames first.
        sizes: latent frames of each chunk.
        full_chunk_limit: L.
        tokens: tokens of a frame.
        clean: clean copies of the full frames; those of the last chunk are not used.
        encode: must be None, since there is no cache.

    Raises:
        ValueError: the partition is another video's, or the clean copies are of other frames.
    """
    if encode is not None:
        raise ValueError("encode needs the cache that it encodes into")
    partition = ChunkPartition.of(sizes, x.shape[1])
    first = partition.ends[partition.num_compressed(full_chunk_limit)]
    full = x.shape[1] - first
    if clean is not None and clean.shape != (x.shape[0], full, *x.shape[2:]):
        raise ValueError(
            f"clean_hidden_states must be those of the {full} full frames, "
            f"{(x.shape[0], full, *x.shape[2:])}, got {tuple(clean.shape)}"
        )
    layout = chunk_layout(partition, full_chunk_limit, tokens, clean=clean is not None)
    copies = None if clean is None else clean[:, : full - partition.sizes[-1]]
    parts = (x[:, :first], copies, x[:, first:])
    return CausalCall(layout, [part for part in parts if part is not None and part.shape[1]])


def call_after_cache(
    x: Tensor,
    tokens: FrameTokens,
    cache: ChunkCache,
    encode: EncodingPlan | None,
    given: tuple[Sequence[int] | None, Tensor | None],
) -> CausalCall:
    """Lay out a call on the next chunk, or on the chunks that are encoded into the cache.

    Args:
        x: their latents ``[B, f, C, H, W]``.
        tokens: tokens of a frame.
        cache: keys and values of the chunks before.
        encode: what is encoded; None evaluates the next chunk.
        given: chunk partition and clean copies, which a cached call does not take.

    Raises:
        ValueError: one of those is given, or x has another number of frames.
    """
    if any(argument is not None for argument in given):
        raise ValueError(
            "with a cache, which has the partition, give neither clean_hidden_states nor "
            "chunk_partition"
        )
    if encode is None:
        layout = step_layout(cache.partition, cache.num_chunks, tokens)
    else:
        past = cache.num_compressed_keys()
        layout = encoding_layout(cache.partition, encode.compressed, encode.full, tokens, past)
    counts = [segment.num_frames for segment in layout.segments]
    if x.shape[1] != sum(counts):
        raise ValueError(
            f"hidden_states has {x.shape[1]} frames, and the chunk after the cache has "
            f"{sum(counts)}"
        )
    if encode is not None:
        cache.drop_full()
    return CausalCall(layout, x.split(counts, dim=1))


def rows_of_equal_length(
    modulation: Tensor, layout: TokenLayout, tokens: FrameTokens
) -> tuple[Tensor, tuple[int, int]]:
    """Repeat rows of frames ``[B, F, 6, D]`` until each covers as many tokens.

    Beside compressed frames, of P' tokens, a full frame gets P / P' equal rows.

    Returns:
        The rows, and the range of the last segment's, which are those of the outputs.
    """
    repeats = tokens.ratio[0] * tokens.ratio[1] if layout.has_compressed else 1
    counts = [segment.num_frames for segment in layout.segments]
    parts = [
        rows if repeats == 1 or segment.compressed else rows.repeat_interleave(repeats, dim=1)
        for segment, rows in zip(layout.segments, modulation.split(counts, dim=1), strict=True)
    ]
    joined = torch.cat(parts, dim=1)
    return joined, (joined.shape[1] - parts[-1].shape[1], joined.shape[1])


def split_of_layout(ranks: SequenceGroup, layout: TokenLayout, tokens: FrameTokens) -> TokenSplit:
    """Share the tokens of every frame among ranks.

    Beside compressed frames, of which a rank holds n' = ceil(P' / s) tokens, its share of a full
    frame is (P / P') n', so that modulation rows cover equally many tokens on each rank, too.
    """
    beside, repeats = ranks.share(tokens.compressed), tokens.ratio[0] * tokens.ratio[1]
    full = beside * repeats if layout.has_compressed else ranks.share(tokens.full)
    kinds = (
        FrameShare(
            segment.num_frames,
            tokens.count(1, segment.compressed),
            beside if segment.compressed else full,
        )
        for segment in layout.segments
    )
    return TokenSplit(ranks, tuple(kinds))
