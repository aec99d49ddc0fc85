"""Count the tokens and the least work of the causal model's calls: steps, encodings, training.

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
    width, d = size.dtype.itemsize, size.dim
    layers = size.layers - 1 if call.encodes else size.layers
    block = roofline.block_on(size, call.tokens, call.pairs, call.cached + call.tokens)
    parts = [part.times(layers) for part in block]
    if call.encodes:
        products = ((call.tokens, d, d),) * 2
        parts.append(roofline.linear(LAST_KEYS, width, products))
    projected = 0 if call.encodes else call.full
    return [*parts, _ends(size, (call.full, call.compressed), projected, times=1)]


def _ends(size: CausalSize, embedded: tuple[int, int], projected: int, times: int) -> Component:
    """Count what is before and after the blocks.

    Args:
        size: of the network.
        embedded: full and compressed tokens.
        projected: tokens whose velocity is computed.
        times: pairs of t and r.
    """
    width, d, text, wide = size.dtype.itemsize, size.dim, size.text_tokens, roofline.WIDE
    ends = [(embedded[0], size.patch_values, d, width)]
    ends += [(embedded[1], size.compressed_patch_values, d, width)]
    ends += [(projected, d, size.patch_values, wide)]
    ends += [(text, size.text_dim, d, width), (text, d, d, width)]
    ends += [(times, size.freq_dim, d, wide), (times, d, d, wide)] * 2
    ends += [(times, d, 6 * d, width)]
    flops = sum(2.0 * n * i * o for n, i, o, _ in ends)
    moved = sum(w * (n * i + i * o + n * o) for n, i, o, w in ends if n)
    return Component(roofline.EMBEDDINGS, flops, float(moved))


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


# Training -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingLayout:
    """Count the tokens of an evaluation of the pretrain loss on all chunks.

    Attributes:
        compressed, clean, noisy: tokens of each kind; clean are the copies of noisy frames.
        pairs: of a query and a key that it is scored with, in a layer.
        last_pairs: the same in the last layer.
        last: tokens of the last layer that compute more than keys and values.
    """

    compressed: int
    clean: int
    noisy: int
    pairs: int
    last_pairs: int
    last: int

    @property
    def tokens(self) -> int:
        """Return the tokens of all kinds."""
        return self.compressed + self.clean + self.noisy


def training_layout(size: CausalSize) -> TrainingLayout:
    """Count ours: no copy of the last chunk, pairs as chunks see them, noisy tokens at last."""
    first = max(0, len(size.chunk_partition) - size.full_chunk_limit)
    compressed, pairs = 0, 0
    for frames in size.chunk_partition[:first]:
        compressed += frames * size.compressed_frame_tokens
        pairs += frames * size.compressed_frame_tokens * compressed
    full = [frames * size.frame_tokens for frames in size.chunk_partition[first:]]
    clean, last_pairs = 0, 0
    for tokens in full:
        last_pairs += tokens * (compressed + clean + tokens)
        clean += tokens
        pairs += tokens * (compressed + clean)
    pairs -= full[-1] * (compressed + clean)
    noisy = clean
    return TrainingLayout(
        compressed, clean - full[-1], noisy, pairs + last_pairs, last_pairs, noisy
    )


def peer_training_layout(size: CausalSize) -> TrainingLayout:
    """Count the peers': copies of all chunks, and under a dense mask all pairs in all layers."""
    ours = training_layout(size)
    tokens = ours.compressed + 2 * ours.noisy
    return TrainingLayout(ours.compressed, ours.noisy, ours.noisy, tokens**2, tokens**2, tokens)


def evaluation(size: CausalSize, layout: TrainingLayout) -> list[Component]:
    """List the components of an evaluation of one sample in training, text and times included."""
    d, tokens = size.dim, layout.tokens
    parts = [
        part.times(size.layers - 1)
        for part in roofline.block_on(size, tokens, layout.pairs, tokens)
    ]
    parts += roofline.block_on(size, layout.last, layout.last_pairs, tokens)
    products = ((tokens - layout.last, d, d),) * 2
    parts.append(roofline.linear(LAST_KEYS, size.dtype.itemsize, products))
    frames = sum(size.chunk_partition) + layout.clean // size.frame_tokens
    embedded = layout.clean + layout.noisy, layout.compressed
    return [*parts, _ends(size, embedded, layout.noisy, times=frames)]
