"""Check the settings of a transformer, within limits that are far from every published model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from anyflow.models.chunks import CHUNK_PARTITION, ChunkPartition, checked_settings
from anyflow.utils.validation import SettingError, brief, is_finite_number, whole_number

# Smallest and largest value of each size. A width of 2^16 is 13 times that of the published 14B
# model.
LIMITS: dict[str, tuple[int, int]] = {
    "num_attention_heads": (1, 1024),
    "attention_head_dim": (2, 1024),
    "in_channels": (1, 2**16),
    "out_channels": (1, 2**16),
    "text_dim": (1, 2**18),
    "freq_dim": (1, 2**16),
    "ffn_dim": (1, 2**20),
    "num_layers": (1, 1000),
    "image_dim": (1, 2**18),
    "rope_max_seq_len": (1, 2**20),
}
OPTIONAL = ("out_channels", "image_dim")  # None has a meaning
MAX_WIDTH, MAX_PATCH = 2**16, 64


@dataclass(frozen=True)
class FlowMap:
    """Hold how the second time enters, which no tensor tells; the defaults are the published ones.

    Args:
        gate_value: g, the share of the second time's embedding.
        deltatime_type: what the second branch embeds, ``"r"`` or ``"t-r"``.
        fusion: ``"gated"``: ``(1 - g) t + g r``; ``"additive"``: ``t + g r``.

    Raises:
        SettingError: the gate is not finite in fp32.
    """

    gate_value: float = 0.25
    deltatime_type: Literal["r", "t-r"] = "r"
    fusion: Literal["gated", "additive"] = "gated"

    def __post_init__(self) -> None:
        if not is_finite_number(self.gate_value):
            raise SettingError(
                "gate_value",
                f"must be a number that is finite in fp32, got {brief(self.gate_value)}",
            )


@dataclass(frozen=True)
class CausalSettings:
    """Hold how a causal model takes a video apart; the defaults are the published ones.

    Args:
        compressed_patch_size: (frames, height, width) of a compressed patch, of one frame.
        full_chunk_limit: L, the chunks that are full.
        chunk_partition: latent frames of each chunk, where a call does not say otherwise.

    Raises:
        ValueError: a setting is not possible.
    """

    compressed_patch_size: tuple[int, int, int] = (1, 4, 4)
    full_chunk_limit: int = 3
    chunk_partition: tuple[int, ...] = CHUNK_PARTITION

    def __post_init__(self) -> None:
        checked_settings((1, 1, 1), self.compressed_patch_size, self.full_chunk_limit)
        partition = ChunkPartition(self.chunk_partition)
        object.__setattr__(self, "compressed_patch_size", tuple(self.compressed_patch_size))
        object.__setattr__(self, "chunk_partition", partition.sizes)


def require_sizes(*, patch_size: Any, **sizes: Any) -> None:
    """Raise a ValueError unless every size of a transformer is a whole number within its limits.

    Args:
        patch_size: three numbers.
        sizes: by the names in ``LIMITS``; ``out_channels`` and ``image_dim`` may be None.
    """
    if not isinstance(patch_size, (tuple, list)) or len(patch_size) != 3:
        raise SettingError(
            "patch_size", f"must be three positive integers, got {brief(patch_size)}"
        )
    for axis, size in zip(("frames", "height", "width"), patch_size, strict=True):
        whole_number(f"patch_size ({axis})", size, 1, MAX_PATCH)
    for name, size in sizes.items():
        if size is not None or name not in OPTIONAL:
            whole_number(name, size, *LIMITS[name])
    heads, head_dim = sizes["num_attention_heads"], sizes["attention_head_dim"]
    if head_dim % 2:
        raise SettingError(
            "attention_head_dim", f"must be even for the rotary embedding, got {head_dim}"
        )
    if heads * head_dim > MAX_WIDTH:
        raise ValueError(
            f"num_attention_heads * attention_head_dim must be at most {MAX_WIDTH}, got {heads} * "
            f"{head_dim}"
        )


def require_settings(*, eps: Any, **flags: Any) -> None:
    """Raise a ValueError unless ``eps`` is in (0, 1] and every flag is True or False."""
    if not is_finite_number(eps) or not 0 < eps <= 1:
        raise SettingError("eps", f"must be a number in (0, 1], got {brief(eps)}")
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise SettingError(name, f"must be True or False, got {brief(flag)}")
