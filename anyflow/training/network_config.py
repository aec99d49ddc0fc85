"""The networks of a recipe: where each comes from, and what of it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from anyflow.utils.validation import require_number, require_positive, require_text, require_whole

# More than any machine holds; a number beyond it is a mistake that would end in an error of the
# allocator, or never.
MAX_SIZE = 2**20


@dataclass(frozen=True)
class ArchitectureConfig:
    """A transformer with random weights; the arguments are those of ``AnyFlowTransformer3DModel``,
    for Wan2.1-1.3B.

    Raises:
        ValueError: a size is not within ``anyflow.models.configuration.LIMITS``, or ``eps`` is not
            possible.
    """

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 12
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 8960
    num_layers: int = 30
    cross_attn_norm: bool = True
    eps: float = 1e-6
    rope_max_seq_len: int = 1024

    def __post_init__(self) -> None:
        from anyflow.models.configuration import require_settings, require_sizes  # loads diffusers

        settings = {"eps": self.eps, "cross_attn_norm": self.cross_attn_norm}
        try:
            require_sizes(
                **{name: size for name, size in vars(self).items() if name not in settings}
            )
            require_settings(**settings)
        except ValueError as error:
            raise ValueError(f"architecture.{error}") from None


@dataclass(frozen=True)
class FlowMapConfig:
    """The second timestep branch: arguments of ``enable_flow_map``."""

    gate_value: float = 0.25
    deltatime_type: Literal["r", "t-r"] = "r"
    fusion: Literal["gated", "additive"] = "gated"

    def __post_init__(self) -> None:
        require_number("flow_map.gate_value", self.gate_value)


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters by PEFT in place of full fine-tuning.

    Args:
        rank: r of each adapter.
        alpha: scale is alpha / rank.
        target_modules: ends of the names of the linear layers that get an adapter.
        trained_modules: ends of the names of modules that are trained in full beside the adapters.
    """

    rank: int = 256
    alpha: float = 256.0
    target_modules: tuple[str, ...] = (
        "attn1.to_q",
        "attn1.to_k",
        "attn1.to_v",
        "attn1.to_out.0",
        "ffn.net.0.proj",
        "ffn.net.2",
    )
    trained_modules: tuple[str, ...] = (
        "condition_embedder.time_embedder",
        "condition_embedder.delta_embedder",
    )

    def __post_init__(self) -> None:
        require_whole("lora.rank", self.rank, most=MAX_SIZE)
        require_positive("lora.alpha", self.alpha)
        _require_names("lora.target_modules", self.target_modules)
        _require_names("lora.trained_modules", self.trained_modules)
        if not self.target_modules:
            raise ValueError("lora.target_modules must name at least one linear layer")


@dataclass(frozen=True)
class NetworkConfig:
    """Says where a network comes from and what of it is trained.

    Args:
        path: a diffusers folder with a transformer in it (or in its ``transformer`` subfolder),
            relative to where the command runs; None builds ``architecture`` with random weights.
        architecture: of the random weights; with a path it must be None.
        seed: of the random weights.
        lora: adapters in place of full fine-tuning.
    """

    path: str | None = None
    architecture: ArchitectureConfig | None = None
    seed: int = 0
    lora: LoRAConfig | None = None

    def __post_init__(self) -> None:
        if (self.path is None) == (self.architecture is None):
            raise ValueError("a network needs either path or architecture, and not both")
        if self.path is not None:
            require_text("path", self.path)
        require_whole("seed", self.seed, least=-(2**63))


def _require_names(name: str, value: object) -> None:
    if not isinstance(value, tuple | list):
        raise ValueError(f"{name} must be a list of names, got {value!r}")
    for item in value:
        require_text(name, item)
