"""Provide the causal transformer behind the call of diffusers' class, whose caches are a dict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.transformers.transformer_anyflow_far import AnyFlowFARTransformerOutput
from torch import Tensor

from anyflow.models.causal import AnyFlowFARTransformer3DModel
from anyflow.models.causal_cache import ChunkCache, EncodingPlan
from anyflow.models.chunks import CHUNK_PARTITION, ChunkPartition
from anyflow.models.diffusers_typing import register_to_config

KVCache = dict[Any, Any] | list[Any]


@dataclass
class _Encoded:
    """Hold what takes the place of diffusers' tensors: a cache, and the text of its chunks."""

    cache: ChunkCache
    text: Tensor | None = None


class DiffusersFARTransformer3DModel(AnyFlowFARTransformer3DModel):
    """Run :class:`AnyFlowFARTransformer3DModel` in diffusers' ``AnyFlowFARPipeline``.

    Settings, parameter names and call are those of diffusers' ``AnyFlowFARTransformer3DModel``,
    whose name this class has where it is saved (proven by
    ``tests/pipelines/test_acceleration_causal.py``). No key is padding: diffusers' cached step
    attends to zeros unless the tokens of a chunk are a multiple of 128. Chunks are encoded once
    where they are compressed, again where they stay full, and all of them with another text.

    Raises:
        ValueError: a setting is not possible.
    """

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        compressed_patch_size: tuple[int, int, int] = (1, 4, 4),
        full_chunk_limit: int = 3,
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int | None = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        eps: float = 1e-6,
        image_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        gate_value: float = 0.25,
        deltatime_type: str = "r",
        chunk_partition: tuple[int, ...] = CHUNK_PARTITION,
    ) -> None:
        super().__init__(
            patch_size=patch_size,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            text_dim=text_dim,
            freq_dim=freq_dim,
            ffn_dim=ffn_dim,
            num_layers=num_layers,
            cross_attn_norm=cross_attn_norm,
            eps=eps,
            image_dim=image_dim,
            rope_max_seq_len=rope_max_seq_len,
            gate_value=gate_value,
            deltatime_type=deltatime_type,
            compressed_patch_size=compressed_patch_size,
            full_chunk_limit=full_chunk_limit,
            chunk_partition=chunk_partition,
        )

    def forward(  # type: ignore[override]  # the call of another class of diffusers
        self,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        r_timestep: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        chunk_partition: Sequence[int] | None = None,
        encoder_hidden_states_image: Tensor | None = None,
        clean_hidden_states: Tensor | None = None,
        clean_timestep: Tensor | None = None,
        kv_cache: KVCache | None = None,
        kv_cache_flag: dict[str, Any] | None = None,
        attention_mask: Any = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        *,
        is_causal: bool = True,
        cache: ChunkCache | None = None,
        encode: EncodingPlan | None = None,
    ) -> Any:
        """Return the average velocity of the full frames, or encode chunks for later ones.

        Args:
            hidden_states: ``[B, F, C, H, W]``: all frames; with ``kv_cache`` those of the next
                chunk, and in a cache step all frames before it.
            timestep, r_timestep: ``[B, F]``; those of a cache step are 0 and are not read.
            encoder_hidden_states: ``[B, S, text_dim]``.
            chunk_partition: latent frames of each chunk of ``hidden_states`` and before it.
            encoder_hidden_states_image, clean_hidden_states, clean_timestep, is_causal, cache,
                encode: those of :meth:`AnyFlowFARTransformer3DModel.forward`.
            kv_cache: a dict or list as diffusers' pipeline fills it with zeros, which are dropped
                from it for what is encoded; then what a cache step returned.
            kv_cache_flag: ``num_cached_chunks``, and ``is_cache_step``, which is True to encode.
            attention_mask: not read; no attention has a mask.
            attention_kwargs: ``{"scale": s}`` scales LoRA adapters.
            return_dict: False returns a tuple.

        Returns:
            Without ``kv_cache`` that of the base class; else the velocity, None in a cache step,
            and the ``kv_cache`` for later calls.

        Raises:
            ValueError: shapes do not fit, or the chunks are not given in their order.
        """
        common: dict[str, Any] = {
            "encoder_hidden_states": encoder_hidden_states,
            "encoder_hidden_states_image": encoder_hidden_states_image,
            "attention_kwargs": attention_kwargs,
        }
        if kv_cache is None:
            return super().forward(
                hidden_states,
                timestep,
                r_timestep,
                chunk_partition=chunk_partition,
                clean_hidden_states=clean_hidden_states,
                clean_timestep=clean_timestep,
                return_dict=return_dict,
                is_causal=is_causal,
                cache=cache,
                encode=encode,
                **common,
            )
        if chunk_partition is None or clean_hidden_states is not None or cache is not None:
            raise ValueError(
                "with kv_cache give chunk_partition, and neither clean_hidden_states nor cache"
            )
        flag = {} if kv_cache_flag is None else kv_cache_flag
        sample = None
        if flag.get("is_cache_step"):
            encoded = self._encode(kv_cache, hidden_states, chunk_partition, common)
        else:
            encoded = self._before(kv_cache, chunk_partition, flag.get("num_cached_chunks", 0))
            common |= {"cache": encoded.cache, "return_dict": False}
            sample = super().forward(hidden_states, timestep, r_timestep, **common)[0]
        kv_cache = _filled(kv_cache, encoded)
        if return_dict:
            return AnyFlowFARTransformerOutput(sample=sample, kv_cache=kv_cache)
        return sample, kv_cache

    def build_attention_mask(self, **arguments: Any) -> None:
        """Return None: no attention has a mask. The arguments are those of diffusers."""

    def _before(self, kv_cache: KVCache, sizes: Sequence[int], num_cached: int) -> _Encoded:
        """Return what is encoded of the chunks before the last one of a partition."""
        partition = ChunkPartition(tuple(sizes))
        encoded = _encoded(kv_cache)
        if num_cached == 0:
            encoded = _Encoded(self.new_cache(partition.sizes))
        found = None if encoded is None else encoded.cache.num_chunks
        if encoded is None or not found == num_cached == len(partition) - 1:
            held = "what no cache step of this model returned" if found is None else f"{found}"
            raise ValueError(
                f"chunk_partition {partition.sizes} is one chunk after num_cached_chunks="
                f"{num_cached}, and kv_cache holds {held}: give what the cache step returned"
            )
        encoded.cache.partition = partition
        return encoded

    def _encode(
        self, kv_cache: KVCache, frames: Tensor, sizes: Sequence[int], common: dict[str, Any]
    ) -> _Encoded:
        """Encode the chunks that the one after a partition attends to, beyond what is encoded."""
        partition, text = ChunkPartition.of(sizes, frames.shape[1]), common["encoder_hidden_states"]
        encoded = _encoded(kv_cache)
        if (
            encoded is None
            or encoded.cache.num_chunks >= len(partition)
            or (encoded.text is not None and not torch.equal(encoded.text, text))
        ):
            encoded = _Encoded(self.new_cache(partition.sizes))
        cache, encoded.text = encoded.cache, text
        cache.partition = partition
        plan = cache.plan(len(partition))
        chunks = [frames[:, partition.frames(chunk)] for chunk in plan.chunks]
        super().forward(
            torch.cat(chunks, dim=1), cache=cache, encode=plan, return_dict=False, **common
        )
        cache.end(plan, len(partition))
        return encoded


# by which diffusers names the class in the files of a pipeline
DiffusersFARTransformer3DModel.__name__ = AnyFlowFARTransformer3DModel.__name__


def _encoded(kv_cache: KVCache) -> _Encoded | None:
    """Return what this model has encoded, or None for diffusers' tensors."""
    values = list(kv_cache.values() if isinstance(kv_cache, dict) else kv_cache)
    return values[0] if len(values) == 1 and isinstance(values[0], _Encoded) else None


def _filled(kv_cache: KVCache, encoded: _Encoded) -> KVCache:
    """Put what is encoded in the place of all that is there."""
    kv_cache.clear()
    if isinstance(kv_cache, dict):
        kv_cache["encoded"] = encoded
    else:
        kv_cache.append(encoded)
    return kv_cache
