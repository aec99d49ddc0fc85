"""Configure the networks of a recipe: where each comes from, and what of it is trained."""

from __future__ import annotations

from dataclasses import dataclass

from anyflow.models.chunks import checked_settings
from anyflow.models.configuration import CausalSettings
from anyflow.training.limits import MAX_SIZE
from anyflow.utils.validation import (
    SettingError,
    in_section,
    require_positive,
    require_text,
    require_whole,
)


@dataclass(frozen=True)
class ArchitectureConfig:
    """Hold the sizes of a transformer with random weights; the defaults are Wan2.1-1.3B's.

    The arguments are those of ``AnyFlowTransformer3DModel``.

    Raises:
        SettingError: a size is not within ``anyflow.models.configuration.LIMITS``, or ``eps`` is
            not possible.
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
        require_sizes(**{name: size for name, size in vars(self).items() if name not in settings})
        require_settings(**settings)


@dataclass(frozen=True)
class LoRAConfig:
    """Hold the settings of low-rank adapters (PEFT) in place of full fine-tuning.

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
        require_whole("rank", self.rank, most=MAX_SIZE)
        require_positive("alpha", self.alpha)
        _require_names("target_modules", self.target_modules)
        _require_names("trained_modules", self.trained_modules)
        if not self.target_modules:
            raise SettingError("target_modules", "must name at least one linear layer")


@dataclass(frozen=True)
class WeightsConfig:
    """Say where a network's weights come from.

    Args:
        path: a diffusers folder with a transformer in it (or in its ``transformer`` subfolder),
            relative to where the command runs; None builds ``architecture`` with random weights.
        architecture: sizes of a network with random weights; with a path it must be None.
        seed: seed of the random weights.
    """

    path: str | None = None
    architecture: ArchitectureConfig | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.path is None) == (self.architecture is None):
            raise SettingError("", "a network needs either path or architecture, and not both")
        if self.path is not None:
            require_text("path", self.path)
        require_whole("seed", self.seed, least=-(2**63))


@dataclass(frozen=True)
class NetworkConfig(WeightsConfig):
    """Say where a trained network's weights come from, and what of it is trained.

    Args:
        lora: adapters in place of full fine-tuning.
        causal: makes the network the causal model, whose training ``pretrain.causal`` configures.
            The compressed patch embedding of random weights or of a bidirectional folder is
            interpolated from the full one. A causal folder has settings of its own, which these
            must equal; None takes them.
    """

    lora: LoRAConfig | None = None
    causal: CausalSettings | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.architecture is not None and self.causal is not None:
            causal = self.causal
            with in_section("causal"):
                checked_settings(
                    self.architecture.patch_size,
                    causal.compressed_patch_size,
                    causal.full_chunk_limit,
                )


# Networks of a recipe that have no adapters of their own, and why.
NO_ADAPTERS = {
    "teacher": "the teacher is not trained",
    "critic": "give the critic's adapters as on_policy.critic_lora",
}
# What is said of causal settings of such a network.
NOT_CAUSAL = (
    "teacher and critic are bidirectional: only student.causal makes a causal model, and a causal "
    "folder is read as its bidirectional model here"
)


def require_weights_only(**networks: WeightsConfig | None) -> None:
    """Raise a SettingError where a network of :data:`NO_ADAPTERS` has more than weights.

    That is adapters, or causal settings.
    """
    for name, network in networks.items():
        if not isinstance(network, NetworkConfig):
            continue
        if network.lora is not None:
            raise SettingError(f"{name}.lora", f"must be None: {NO_ADAPTERS[name]}")
        if network.causal is not None:
            raise SettingError(f"{name}.causal", f"must be None: {NOT_CAUSAL}")


def _require_names(name: str, value: object) -> None:
    if not isinstance(value, tuple | list):
        raise SettingError(name, f"must be a list of names, got {value!r}")
    for item in value:
        require_text(name, item)
