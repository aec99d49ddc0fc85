"""Count the tokens and the least work of the causal model's calls: cached steps and encodings.

A video of n chunks takes, for each chunk, one call that encodes what the chunk attends to beyond
what is encoded already, none before the first chunk, and one call for each step. See
:mod:`roofline` for how work becomes time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import roofline
from roofline import Component, DeviceLimits
from sizes import CausalSize

LAST_KEYS = "keys and values of the last layer"


@dataclass(frozen=True)
class ChunkCall:
    """Count the tokens of one call.

    Attributes:
        full, compressed: tokens that are computed.
        pairs: of a query and a key that it attends to, in a layer.
        cached: keys that earlier calls have left.
        encodes: whether the call only makes keys and values for a cache.
    """

    full: int
    compressed: int
    pairs: int
    cached: int
    encodes: bool

    @property
    def tokens(self) -> int:
        """Return the tokens of both kinds."""
        return self.full + self.compressed


def steps(size: CausalSize) -> list[ChunkCall]:
    """Count one step of each chunk, with everything before it cached."""
    calls = []
    for chunk, frames in enumerate(size.chunk_partition):
        tokens, cached = frames * size.frame_tokens, sum(_cached(size, chunk))
        calls.append(ChunkCall(tokens, 0, tokens * (cached + tokens), cached, encodes=False))
    return calls


def encodings(size: CausalSize) -> list[ChunkCall]:
    """Count the encodings before the chunks 1, 2, ..: what leaves the full part, and the full part.

    What is compressed stays as it is. What is full has to be encoded again, since it has attended
    to the full tokens of the chunk that leaves.
    """
    calls, kept = [], 0
    for chunk in range(1, len(size.chunk_partition)):
        first_full = max(0, chunk - size.full_chunk_limit + 1)
        calls.append(_encoding(size, range(kept, first_full), range(first_full, chunk)))
        kept = first_full
    return calls


def peer_encodings(size: CausalSize) -> list[ChunkCall]:
    """Count the encodings as diffusers makes them: of all chunks, the compressed ones again."""
    calls = []
    for chunk in range(1, len(size.chunk_partition)):
        first_full = max(0, chunk - size.full_chunk_limit + 1)
        calls.append(_encoding(size, range(first_full), range(first_full, chunk)))
    return calls


def tokens_of(calls: list[ChunkCall]) -> int:
    """Return the tokens of calls."""
    return sum(call.tokens for call in calls)


def most_keys(size: CausalSize) -> int:
    """Return the most keys of a layer that a cache holds at a time."""
    return max(sum(_cached(size, chunk)) for chunk in range(len(size.chunk_partition)))


def cache_bytes(size: CausalSize) -> int:
    """Return the most bytes of keys and values of a video that are cached at a time."""
    return 2 * most_keys(size) * size.dim * size.dtype.itemsize * size.layers


def _cached(size: CausalSize, chunk: int) -> tuple[int, int]:
    """Return the compressed and the full tokens before a chunk."""
    first_full = max(0, chunk - size.full_chunk_limit + 1)
    frames = size.chunk_partition
    compressed = sum(frames[:first_full]) * size.compressed_frame_tokens
    return compressed, sum(frames[first_full:chunk]) * size.frame_tokens


def _encoding(size: CausalSize, compressed: range, full: range) -> ChunkCall:
    """Count chunks that are encoded together, each attending to all up to its own end."""
    frames = size.chunk_partition
    cached = sum(frames[: compressed.start]) * size.compressed_frame_tokens
    keys, pairs, counts = cached, 0, []
    for chunks, of_frame in (
        (compressed, size.compressed_frame_tokens),
        (full, size.frame_tokens),
    ):
        counts.append(sum(frames[chunk] for chunk in chunks) * of_frame)
        for chunk in chunks:
            tokens = frames[chunk] * of_frame
            keys += tokens
            pairs += tokens * keys
    return ChunkCall(counts[1], counts[0], pairs, cached, encodes=True)


def forward(size: CausalSize, call: ChunkCall) -> list[Component]:
    """List the components of a call, text and times included."""
    width, d, text = size.dtype.itemsize, size.dim, size.text_tokens
    layers = size.layers - 1 if call.encodes else size.layers
    block = roofline.block_on(size, call.tokens, call.pairs, call.cached + call.tokens)
    parts = [part.times(layers) for part in block]
    if call.encodes:
        products = ((call.tokens, d, d),) * 2
        parts.append(roofline.linear(LAST_KEYS, width, products))
    wide = roofline.WIDE
    ends = [(call.full, size.patch_values, d, width)]
    ends += [(call.compressed, size.compressed_patch_values, d, width)]
    if not call.encodes:
        ends += [(call.full, d, size.patch_values, wide)]
    ends += [(text, size.text_dim, d, width), (text, d, d, width)]
    ends += [(1, size.freq_dim, d, wide), (1, d, d, wide)] * 2 + [(1, d, 6 * d, width)]
    flops = sum(2.0 * n * i * o for n, i, o, _ in ends)
    moved = sum(w * (n * i + i * o + n * o) for n, i, o, w in ends if n)
    return [*parts, Component(roofline.EMBEDDINGS, flops, float(moved))]


def video(size: CausalSize, num_steps: int) -> list[Component]:
    """List the components of a video: some steps for each chunk, one call after another."""
    calls = [*steps(size) * num_steps, *encodings(size)]
    return [part for call in calls for part in forward(size, call)]


def video_floor_s(
    size: CausalSize,
    num_steps: int,
    limits: DeviceLimits,
    rates: Mapping[str, float] | None = None,
) -> float:
    """Return the seconds of all calls of a video, with known FLOP/s by name of the component."""
    return roofline.floor_s(video(size, num_steps), limits, rates)


def expected_s(size: CausalSize, calls: list[ChunkCall], attention: float, others: float) -> float:
    """Return the seconds of calls by what a forward of the bidirectional model has measured.

    Args:
        size: of the network.
        calls: to be added up.
        attention: FLOP/s of self-attention.
        others: seconds of everything else for one token, through all layers.
    """
    flops = 4.0 * size.dim * size.layers * sum(call.pairs for call in calls)
    return flops / attention + others * tokens_of(calls)
