"""Cut a video into chunks, lay out their tokens, and say which tokens attend to which.

Of n chunks the last L are full, and the n_c before them are compressed. A token attends to the
tokens of its own chunk and of the chunks before it. With a clean copy of the full frames, which
training has, noisy tokens attend to the clean copies of earlier chunks in place of noisy ones. The
keys depend on the chunk alone, so that every chunk is one attention without a mask.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from anyflow.utils.validation import SettingError, brief, whole_number

MAX_CHUNK, MAX_CHUNKS = 4096, 4096
CHUNK_PARTITION = (1, 3, 3, 3, 3, 3, 3, 2)  # of the published models

Range = tuple[int, int]


@dataclass(frozen=True)
class ChunkPartition:
    """Hold the latent frames of each chunk of a video.

    Args:
        sizes: p_0, p_1, ..; at least one chunk, each of at least one frame.

    Raises:
        ValueError: the sizes are no such numbers.
    """

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.sizes, (list, tuple)) or not 0 < len(self.sizes) <= MAX_CHUNKS:
            raise SettingError(
                "chunk_partition",
                f"must be the latent frames of each chunk, as (1, 3, 3), got {brief(self.sizes)}",
            )
        object.__setattr__(self, "sizes", tuple(map(self._checked, range(len(self.sizes)))))

    def _checked(self, chunk: int) -> int:
        try:
            return whole_number(f"chunk {chunk}", self.sizes[chunk], 1, MAX_CHUNK)
        except SettingError as error:
            raise SettingError("chunk_partition", f"is not possible: {error}") from None

    @classmethod
    def of(cls, sizes: Sequence[int], num_frames: int) -> ChunkPartition:
        """Check sizes against the latent frames of a video, or raise a ValueError."""
        partition = cls(sizes)  # type: ignore[arg-type]  # a list, too
        if partition.num_frames != num_frames:
            raise ValueError(
                f"chunk_partition {partition.sizes} has {partition.num_frames} latent frames, and "
                f"the video has {num_frames}"
            )
        return partition

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def ends(self) -> tuple[int, ...]:
        """Return e_0 = 0, e_1, ..: the first frame of each chunk, and the number of frames."""
        return (0, *accumulate(self.sizes))

    @property
    def num_frames(self) -> int:
        """Return F, the latent frames of all chunks."""
        return sum(self.sizes)

    def frames(self, chunk: int) -> slice:
        """Return the frames of a chunk."""
        return slice(self.ends[chunk], self.ends[chunk + 1])

    def first(self, num_chunks: int) -> ChunkPartition:
        """Return the first chunks."""
        return ChunkPartition(self.sizes[:num_chunks])

    def num_compressed(self, full_chunk_limit: int) -> int:
        """Return n_c, the chunks that are compressed when the last L are full."""
        return max(0, len(self) - full_chunk_limit)

    def chunks_of_context(self, num_frames: int) -> int:
        """Return the number of chunks that given first frames fill, or raise a ValueError."""
        allowed = self.ends[1:-1]
        if num_frames not in allowed:
            lengths = ", ".join(map(str, allowed)) if allowed else "none, there is one chunk only"
            raise ValueError(
                f"the context must end with a chunk before the last one: got {num_frames} latent "
                f"frames, allowed are {lengths}"
            )
        return self.ends.index(num_frames)


@dataclass(frozen=True)
class FrameTokens:
    """Count the tokens of a frame.

    Args:
        height, width: rows and columns of full tokens.
        ratio: full rows and columns in one compressed row and column.
    """

    height: int
    width: int
    ratio: tuple[int, int]

    @property
    def full(self) -> int:
        """Return P, the tokens of a full frame."""
        return self.height * self.width

    @property
    def compressed(self) -> int:
        """Return P', the tokens of a compressed frame."""
        return (self.height // self.ratio[0]) * (self.width // self.ratio[1])

    def count(self, frames: int, compressed: bool) -> int:
        """Return the tokens of a number of frames."""
        return frames * (self.compressed if compressed else self.full)


@dataclass(frozen=True)
class Segment:
    """Describe consecutive frames of one kind, whose tokens run frame, row, column."""

    first_frame: int
    num_frames: int
    compressed: bool = False


@dataclass(frozen=True)
class QueryGroup:
    """Name queries that attend to the same keys.

    Args:
        queries: the first of them, and the first after them.
        keys: ranges of keys, counted from the first cached one.
    """

    queries: Range
    keys: tuple[Range, ...]


@dataclass(frozen=True)
class TokenLayout:
    """Describe the tokens of one evaluation in their order.

    Args:
        segments: the frames.
        groups: which queries attend to which keys; none means that all attend to all.
        outputs: the tokens whose output is read; the last layer computes no other.
    """

    segments: tuple[Segment, ...]
    groups: tuple[QueryGroup, ...]
    outputs: Range

    @property
    def has_compressed(self) -> bool:
        """Tell whether any frame is compressed."""
        return any(segment.compressed for segment in self.segments)

    def last_groups(self) -> tuple[QueryGroup, ...]:
        """Return the groups of the outputs alone, counted from the first output."""
        start, stop = self.outputs
        return tuple(
            QueryGroup((group.queries[0] - start, group.queries[1] - start), group.keys)
            for group in self.groups
            if start <= group.queries[0] and group.queries[1] <= stop
        )

    def apart(self) -> tuple[TokenLayout, TokenLayout]:
        """Return the layouts of the tokens before the outputs, and of the outputs.

        Keys of the first come before those of the second; the output of the first is not read.
        """
        start, stop = self.outputs
        before = tuple(group for group in self.groups if group.queries[1] <= start)
        return (
            TokenLayout(self.segments[:-1], before, (0, 0)),
            TokenLayout(self.segments[-1:], self.last_groups(), (0, stop - start)),
        )


def chunk_layout(
    partition: ChunkPartition, full_chunk_limit: int, tokens: FrameTokens, *, clean: bool
) -> TokenLayout:
    """Lay out all chunks: compressed, clean copies where training has them, and noisy.

    No token attends to a clean copy of the last chunk, so that the layout has none.

    Args:
        partition: the n chunks.
        full_chunk_limit: L.
        tokens: tokens of a frame.
        clean: True for training; False attends to the full frames themselves.
    """
    ends, compressed = partition.ends, partition.num_compressed(full_chunk_limit)
    first, last = ends[compressed], ends[-2]
    segments = [Segment(0, first, compressed=True)]
    groups, stop = _each_to_all_before(
        (tokens.count(size, compressed=True) for size in partition.sizes[:compressed]), 0
    )
    full = [tokens.count(size, compressed=False) for size in partition.sizes[compressed:]]
    start = stop
    if clean:
        segments.append(Segment(first, last - first))
        copies, start = _each_to_all_before(full[:-1], stop)
        groups += copies
    segments.append(Segment(first, partition.num_frames - first))
    outputs = (start, start + sum(full))
    if not clean:
        groups += _each_to_all_before(full, stop)[0]
    else:
        position, seen = start, stop
        for size in full:
            own = (position, position + size)
            keys = ((0, own[1]),) if seen == position else ((0, seen), own)
            groups.append(QueryGroup(own, keys if seen else (own,)))
            position, seen = own[1], seen + size
    return TokenLayout(tuple(s for s in segments if s.num_frames), tuple(groups), outputs)


def encoding_layout(
    partition: ChunkPartition,
    compressed: Sequence[int],
    full: Sequence[int],
    tokens: FrameTokens,
    past: int,
) -> TokenLayout:
    """Lay out chunks that are encoded for a cache; no output is read.

    Args:
        partition: the chunks of the video.
        compressed, full: the chunks to encode so, in their order.
        tokens: tokens of a frame.
        past: cached keys that all attend to.
    """
    segments = tuple(
        Segment(partition.ends[chunk], partition.sizes[chunk], kind)
        for kind, chunks in ((True, compressed), (False, full))
        for chunk in chunks
    )
    sizes = (tokens.count(segment.num_frames, segment.compressed) for segment in segments)
    groups = tuple(
        QueryGroup(group.queries, ((0, past + group.keys[0][1]),))
        for group in _each_to_all_before(sizes, 0)[0]
    )
    return TokenLayout(segments, groups if len(groups) > 1 else (), (0, 0))


def step_layout(partition: ChunkPartition, chunk: int, tokens: FrameTokens) -> TokenLayout:
    """Lay out one chunk, which attends to everything cached and to itself."""
    size = partition.sizes[chunk]
    return TokenLayout(
        (Segment(partition.ends[chunk], size),), (), (0, tokens.count(size, compressed=False))
    )


def _each_to_all_before(sizes: Iterable[int], start: int) -> tuple[list[QueryGroup], int]:
    """Return a group for each chunk, which attends to all tokens up to its own end; and the end."""
    groups = []
    for size in sizes:
        groups.append(QueryGroup((start, start + size), ((0, start + size),)))
        start += size
    return groups, start


def checked_settings(
    patch_size: Sequence[int], compressed_patch_size: Any, full_chunk_limit: Any
) -> tuple[int, int]:
    """Check the settings of a causal model; return the rows and columns of a compressed token.

    They are counted in full tokens.

    Raises:
        ValueError: a setting is not possible.
    """
    whole_number("full_chunk_limit", full_chunk_limit, 1, MAX_CHUNKS)
    if not isinstance(compressed_patch_size, (list, tuple)) or len(compressed_patch_size) != 3:
        raise SettingError(
            "compressed_patch_size",
            f"must be three positive integers, got {brief(compressed_patch_size)}",
        )
    for axis, size in zip(("frames", "height", "width"), compressed_patch_size, strict=True):
        whole_number(f"compressed_patch_size ({axis})", size, 1, 64)
    frames, *space = compressed_patch_size
    if patch_size[0] != 1 or frames != 1:
        raise SettingError(
            "",
            "a causal model has one frame in a patch: patch_size and compressed_patch_size must "
            f"begin with 1, got {tuple(patch_size)} and {tuple(compressed_patch_size)}",
        )
    if any(large % small for large, small in zip(space, patch_size[1:], strict=True)):
        raise SettingError(
            "compressed_patch_size",
            f"{tuple(compressed_patch_size)} must be a multiple of patch_size {tuple(patch_size)}",
        )
    return space[0] // patch_size[1], space[1] // patch_size[2]
