"""Keep the keys and values of earlier chunks, compressed and full, for the causal transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyflow.models.causal_block import KeysValues
from anyflow.models.chunks import ChunkPartition, FrameTokens
from anyflow.models.network import evaluate
from anyflow.utils.validation import whole_number


@dataclass(frozen=True)
class EncodingPlan:
    """Name the chunks that a cache encodes next: those as compressed, then these in full."""

    compressed: tuple[int, ...]
    full: tuple[int, ...]

    @property
    def chunks(self) -> tuple[int, ...]:
        """Return the chunks in the order in which their latents are given."""
        return (*self.compressed, *self.full)


class ChunkCache:
    """Hold the keys, after rotation, and values of the chunks before the one in work.

    Of the m chunks before it the last L - 1 are full and the others compressed. Compressed ones
    never change. The full ones are encoded anew for each chunk: from the second layer on they have
    seen the chunk that leaves the full part, and are to see its compressed tokens. Nothing is
    written in place, so that gradient checkpointing computes on what the forward pass has read.

    With sequence parallelism a rank keeps all tokens of its H / s heads, as it gets them to attend:
    1 / s of the memory, without padding, and nothing that is cached is communicated again. The s
    ranks' slices of tokens with all heads would take as much memory, and an all-to-all of the whole
    past in every call.

    Args:
        partition: the chunks of the video.
        full_chunk_limit: L.
        num_layers: blocks of the model.
        window: most compressed chunks that stay, the first chunk and the latest ones; None keeps
            all. Memory is then bounded for any number of chunks. A window is an approximation.
        storage: device that the tensors wait on, such as ``"cpu"``; None leaves them where they
            are computed. Numbers do not change.

    Raises:
        ValueError: the window is no whole number above 0.
    """

    def __init__(
        self,
        partition: ChunkPartition,
        full_chunk_limit: int,
        num_layers: int,
        *,
        window: int | None = None,
        storage: torch.device | str | None = None,
    ) -> None:
        self.partition, self.limit = partition, full_chunk_limit
        self.window = None if window is None else whole_number("cache_window", window)
        self.storage = None if storage is None else torch.device(storage)
        self.num_chunks = 0
        self.compressed: tuple[int, ...] = ()
        self._compressed: list[KeysValues | None] = [None] * num_layers
        self._full: list[KeysValues | None] = [None] * num_layers
        self._ahead: tuple[int, tuple[KeysValues, ...], torch.cuda.Event] | None = None

    def plan(self, num_chunks: int) -> EncodingPlan:
        """Return what must be encoded so that ``num_chunks`` chunks are in the cache."""
        first_full = max(0, num_chunks - self.limit + 1)
        wanted = self._kept(first_full)
        new = tuple(chunk for chunk in wanted if chunk not in self.compressed)
        return EncodingPlan(new, tuple(range(first_full, num_chunks)))

    def chunks_needed_later(self, num_chunks: int) -> range:
        """Return the chunks before ``num_chunks`` whose latents later encodings read."""
        return range(max(0, num_chunks - self.limit + 1), num_chunks)

    @property
    def num_bytes(self) -> int:
        """Return the bytes of what is kept."""
        kept = [pair for pair in (*self._compressed, *self._full) if pair is not None]
        return sum(tensor.nbytes for pair in kept for tensor in pair)

    # Called by the model, in this order -----------------------------------------------------------

    def num_compressed_keys(self) -> int:
        """Return the compressed keys of a layer, which an encoding attends to."""
        first = self._compressed[0]
        return 0 if first is None else first[0].shape[1]

    def drop_full(self) -> None:
        """Drop the full part, before it is encoded anew."""
        self._full = [None] * len(self._full)
        self._ahead = None

    def store(
        self, layer: int, key: Tensor, value: Tensor, plan: EncodingPlan, tokens: FrameTokens
    ) -> None:
        """Keep what a layer has encoded by a plan, ``[B, L, H, Dh]`` of the rank's heads."""
        leaving = [tokens.count(self.partition.sizes[c], True) for c in plan.compressed]
        first_full = sum(leaving)
        if leaving:
            kept = dict(zip(self.compressed, self._split(layer, tokens), strict=True))
            fresh = zip(
                key[:, :first_full].split(leaving, dim=1),
                value[:, :first_full].split(leaving, dim=1),
                strict=True,
            )
            kept.update(zip(plan.compressed, fresh, strict=True))
            pairs = [kept[chunk] for chunk in self._after(plan)]
            self._compressed[layer] = self._rested(
                torch.cat([pair[0] for pair in pairs], dim=1),
                torch.cat([pair[1] for pair in pairs], dim=1),
            )
        if plan.full:
            full = key[:, first_full:], value[:, first_full:]
            # a view would keep the compressed tokens beside it in memory
            full = (full[0].clone(), full[1].clone()) if leaving else full
            self._full[layer] = self._rested(*full)

    def end(self, plan: EncodingPlan, num_chunks: int) -> None:
        """Note that a plan has been carried out in every layer."""
        self.compressed, self.num_chunks = self._after(plan), num_chunks

    def past(self, layer: int, device: torch.device) -> tuple[KeysValues, ...]:
        """Return what a layer's queries attend to beside their own chunk; never written.

        Where the tensors wait elsewhere, the next layer's are copied meanwhile.
        """
        if self.storage is None or self.storage == device or device.type != "cuda":
            return tuple((pair[0].to(device), pair[1].to(device)) for pair in self._pairs(layer))
        stream = torch.cuda.current_stream(device)
        if self._ahead is not None and self._ahead[0] == layer:
            _, pairs, ready = self._ahead
            stream.wait_event(ready)
        else:
            pairs = self._copied(layer, device)
        for tensor in (tensor for pair in pairs for tensor in pair):
            tensor.record_stream(stream)
        following = (layer + 1) % len(self._full)
        side = _side_stream(device)
        side.wait_stream(stream)  # on which the tensors were copied to the host
        with torch.cuda.stream(side):
            self._ahead = (following, self._copied(following, device), side.record_event())
        return pairs

    # ----------------------------------------------------------------------------------------------

    def _kept(self, num_compressed: int) -> tuple[int, ...]:
        """Return the compressed chunks that stay of the first ``num_compressed``."""
        chunks = tuple(range(num_compressed))
        if self.window is None or num_compressed <= self.window:
            return chunks
        return (0, *chunks[num_compressed - self.window + 1 :])

    def _after(self, plan: EncodingPlan) -> tuple[int, ...]:
        last = (*self.compressed, *plan.compressed)
        return self._kept(max(last) + 1) if last else ()

    def _split(self, layer: int, tokens: FrameTokens) -> list[KeysValues]:
        """Return the compressed part of a layer by chunks."""
        pair = self._compressed[layer]
        if pair is None:
            return []
        counts = [tokens.count(self.partition.sizes[chunk], True) for chunk in self.compressed]
        return list(zip(pair[0].split(counts, dim=1), pair[1].split(counts, dim=1), strict=True))

    def _pairs(self, layer: int) -> tuple[KeysValues, ...]:
        return tuple(p for p in (self._compressed[layer], self._full[layer]) if p is not None)

    def _rested(self, key: Tensor, value: Tensor) -> KeysValues:
        """Bring keys and values to where they wait, pinned on the host of a CUDA device."""
        if self.storage is None or self.storage == key.device:
            return key, value
        return _copied_to(key, self.storage), _copied_to(value, self.storage)

    def _copied(self, layer: int, device: torch.device) -> tuple[KeysValues, ...]:
        return tuple(
            (k.to(device, non_blocking=True), v.to(device, non_blocking=True))
            for k, v in self._pairs(layer)
        )


def encode_chunks(
    model: Any, cache: ChunkCache, num_chunks: int, latents: Mapping[int, Tensor], text: Tensor
) -> None:
    """Bring a cache to the state before chunk ``num_chunks``, by one call of the model.

    Args:
        model: the causal model, or what wraps it.
        cache: of its ``new_cache``.
        num_chunks: chunks that the cache stands for then.
        latents: clean latents ``[B, p, C, H, W]`` of the chunks that ``cache.plan(num_chunks)``
            names.
        text: ``[B, S, text_dim]``.
    """
    plan = cache.plan(num_chunks)
    if plan.chunks:
        frames = torch.cat([latents[chunk] for chunk in plan.chunks], dim=1)
        evaluate(model, frames, encoder_hidden_states=text, cache=cache, encode=plan)
    cache.end(plan, num_chunks)


def cache_bytes(
    partition: ChunkPartition,
    full_chunk_limit: int,
    tokens: FrameTokens,
    *,
    layers: int,
    width: int,
    itemsize: int,
    batch_size: int = 1,
    window: int | None = None,
) -> int:
    """Return the most bytes that a cache takes while a video is sampled.

    Args:
        partition: the chunks of the video.
        full_chunk_limit: L.
        tokens: tokens of a frame.
        layers, width: blocks, and D of the model, or of a rank's heads.
        itemsize: bytes of a number.
        batch_size: videos; guidance doubles them.
        window: of :class:`ChunkCache`.
    """
    cache = ChunkCache(partition, full_chunk_limit, 0, window=window)
    most = 0
    for num_chunks in range(1, len(partition)):
        first_full = max(0, num_chunks - full_chunk_limit + 1)
        full = _frames(partition, range(first_full, num_chunks))
        kept = _frames(partition, cache._kept(first_full))
        most = max(most, tokens.count(full, False) + tokens.count(kept, True))
    return 2 * most * width * itemsize * layers * batch_size


def _frames(partition: ChunkPartition, chunks: Sequence[int]) -> int:
    return sum(partition.sizes[chunk] for chunk in chunks)


def _copied_to(tensor: Tensor, device: torch.device) -> Tensor:
    out = torch.empty(
        tensor.shape, dtype=tensor.dtype, device=device, pin_memory=tensor.device.type == "cuda"
    )
    return out.copy_(tensor, non_blocking=True)


_side_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _side_streams:
        _side_streams[device] = torch.cuda.Stream(device)
    return _side_streams[device]
