"""Read the sizes of a model off its configuration files, without loading a weight."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anyflow.formats.architecture import ANYFLOW_FAR, FAR_WAN
from anyflow.formats.names import CAUSAL_KEYS
from anyflow.formats.readers import read_header
from anyflow.models.configuration import CausalSettings
from anyflow.utils.documents import read_json, shortened
from anyflow.utils.validation import brief, whole_number

_LARGEST_SIZE = 2**20  # that a configuration file may say
_SIZED_PARTS = ("transformer", "vae", "text_encoder")


@dataclass(frozen=True)
class ModelLayout:
    """Hold the sizes that the configuration files of a model settle.

    Args:
        channels: C of the latents.
        temporal_factor: frames for each latent frame after the first.
        spatial_factor: pixels for each latent row and column.
        patch_size: latent (frames, rows, columns) of a token.
        max_positions: most tokens along any of the three axes.
        text_dim: width of the prompt embeddings.
        flow_map: False for a plain Wan model, which knows r = t only.
        causal: how a causal model takes a video apart; None for a bidirectional one.
    """

    channels: int
    temporal_factor: int
    spatial_factor: int
    patch_size: tuple[int, int, int]
    max_positions: int
    text_dim: int
    flow_map: bool = True
    causal: CausalSettings | None = None

    @classmethod
    def read(
        cls, model: Path, given: Mapping[str, Path | Mapping[str, Any] | None] | None = None
    ) -> ModelLayout:
        """Read the layout off a diffusers folder.

        Args:
            model: the folder.
            given: other folders, or configurations, of ``transformer``, ``vae`` and
                ``text_encoder``; None takes the model's own.

        Raises:
            ValueError: a configuration is missing or broken, or the parts do not fit together.
        """
        parts = {} if given is None else given
        found = [parts.get(name) for name in _SIZED_PARTS]
        folders = [
            model / name if part is None else part
            for name, part in zip(_SIZED_PARTS, found, strict=True)
        ]
        transformer, *others = (
            _config(part) if isinstance(part, Path) else part for part in folders
        )
        folder = folders[0]
        undecided = (
            transformer.get("_class_name") == FAR_WAN and transformer.get("init_far_model") is None
        )
        if undecided and isinstance(folder, Path):
            transformer = {**transformer, "init_far_model": _has_causal_tensors(folder)}
        return cls.of(model, transformer, *others)

    @classmethod
    def of(
        cls,
        model: Path | str,
        transformer: Mapping[str, Any],
        vae: Mapping[str, Any],
        text_encoder: Mapping[str, Any],
    ) -> ModelLayout:
        """Read the layout off the configurations of three parts; ``model`` names them in errors.

        Raises:
            ValueError: a size is not possible, or the parts do not fit together.
        """
        patch_size = transformer.get("patch_size", (1, 2, 2))
        if not isinstance(patch_size, Sequence) or len(patch_size) != 3:
            raise ValueError(
                f"{model}: patch_size of the transformer must be three numbers, got "
                f"{brief(patch_size)}"
            )
        frames, rows, columns = (
            whole_number(f"{model}: patch_size of the transformer", p, high=_LARGEST_SIZE)
            for p in patch_size
        )
        layout = cls(
            channels=_size(model, "transformer", transformer, "in_channels", 16),
            temporal_factor=_size(model, "vae", vae, "scale_factor_temporal", 4),
            spatial_factor=_size(model, "vae", vae, "scale_factor_spatial", 8),
            patch_size=(frames, rows, columns),
            max_positions=_size(model, "transformer", transformer, "rope_max_seq_len", 1024),
            text_dim=_size(model, "transformer", transformer, "text_dim", 4096),
            causal=causal_settings(model, transformer),
        )
        for part, found, wanted, name in (
            ("vae", vae.get("z_dim", 16), layout.channels, "channels"),
            ("text_encoder", text_encoder.get("d_model"), layout.text_dim, "text dimensions"),
        ):
            if found != wanted:
                raise ValueError(
                    f"{shortened(model)}: {part} has {brief(found)} {name}, but the transformer "
                    f"takes {wanted}"
                )
        return layout

    @property
    def pixel_multiple(self) -> tuple[int, int]:
        """Return what heights and widths are multiples of."""
        return self.spatial_factor * self.patch_size[1], self.spatial_factor * self.patch_size[2]

    def latent_frames(self, num_frames: int) -> int:
        """Return the number of latent frames of ``num_frames`` frames, 4k + 1 of them."""
        return (num_frames - 1) // self.temporal_factor + 1


def causal_settings(model: Path | str, transformer: Mapping[str, Any]) -> CausalSettings | None:
    """Return the settings of a causal transformer by its configuration; None for a bidirectional.

    Args:
        model: named in errors.
        transformer: configuration of a file, or of a module, which does not name its class.

    Raises:
        ValueError: a setting is not possible.
    """
    kind = transformer.get("_class_name")
    if kind == FAR_WAN:
        causal = bool(transformer.get("init_far_model", True))
    else:
        causal = kind == ANYFLOW_FAR if kind is not None else "full_chunk_limit" in transformer
    if not causal:
        return None
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name in vars(CausalSettings())
        if (value := transformer.get(name)) is not None
    }
    try:
        return CausalSettings(**given)
    except ValueError as error:
        raise ValueError(f"{shortened(model)}: {error}") from None


def _has_causal_tensors(folder: Path) -> bool:
    files = sorted(folder.glob("*.safetensors"))
    return any(name.startswith(CAUSAL_KEYS) for file in files for name in read_header(file))


def _size(model: Path | str, part: str, config: Mapping[str, Any], name: str, default: int) -> int:
    return whole_number(
        f"{model}: {name} of the {part}", config.get(name, default), high=_LARGEST_SIZE
    )


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not os.path.lexists(file):
        raise ValueError(
            f"{shortened(folder.parent)} is not a diffusers model folder: it has no "
            f"{folder.name}/{file.name}"
        )
    config = read_json(file)
    if not isinstance(config, dict):
        raise ValueError(f"{shortened(file)} must hold a JSON object, not {type(config).__name__}")
    return config
