"""Parse the keys of LoRA files: which part of which layer's adapter a tensor is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from anyflow.formats.names import NAMINGS, ORIGINAL


class Role(Enum):
    """Name the part of an adapter that a tensor is.

    ``DOWN[r, in]`` and ``UP[out, r]`` are the factors A and B; ``ALPHA`` is the numerator of their
    scale, and ``MAGNITUDE`` the norms of DoRA. The differences are added; ``WEIGHT`` and ``BIAS``
    take the place of the model's.
    """

    DOWN = "down"
    UP = "up"
    UP_BIAS = "bias of up"
    ALPHA = "alpha"
    MAGNITUDE = "magnitude"
    WEIGHT_DIFFERENCE = "difference of the weight"
    BIAS_DIFFERENCE = "difference of the bias"
    WEIGHT = "weight"
    BIAS = "bias"


_ADAPTER = r"(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?"  # PEFT puts the adapter's name there
_ROLES: tuple[tuple[re.Pattern[str], Role], ...] = tuple(
    (re.compile(rf"(?P<layer>.+)\.{pattern}"), role)
    for pattern, role in (
        (
            rf"(?:lora_A{_ADAPTER}|lora_down|lora\.down|lora_linear_layer\.down)(?:\.weight)?",
            Role.DOWN,
        ),
        (rf"(?:lora_B{_ADAPTER}|lora_up|lora\.up|lora_linear_layer\.up)(?:\.weight)?", Role.UP),
        (rf"(?:lora_B{_ADAPTER}|lora_up)\.bias", Role.UP_BIAS),
        (r"alpha", Role.ALPHA),
        (rf"lora_magnitude_vector{_ADAPTER}(?:\.weight)?", Role.MAGNITUDE),
        (r"dora_scale", Role.MAGNITUDE),
        (r"(?:diff|w_norm)", Role.WEIGHT_DIFFERENCE),
        (r"(?:diff_b|b_norm)", Role.BIAS_DIFFERENCE),
        (r"diff_m", Role.WEIGHT_DIFFERENCE),
        (r"weight", Role.WEIGHT),
        (r"bias", Role.BIAS),
    )
)

# Keys that are no part of a transformer's LoRA, and what they are.
_REFUSED: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), what)
    for pattern, what in (
        (
            r"(?:base_model\.model\.)?(?:lora_te\d?_|text_encoders?[._]|text_encoder_\d\.|te\d?\.)",
            "of a text encoder",
        ),
        (r".*[._]hada_", "of LoHa, which is not supported"),
        (r".*[._]lokr_", "of LoKr, which is not supported"),
        (r".*[._]b?oft_", "of OFT, which is not supported"),
        (
            r".*\.lora_(?:embedding_|mid)",
            "of a LoRA of embeddings or with a middle factor, which is not supported",
        ),
    )
)
_TABLES = ("modulation", "scale_shift_table")
PEFT_PREFIX = "base_model.model."
_PREFIXES = (
    PEFT_PREFIX, "diffusion_model.", "transformer.", "pipe.dit.", "dit.", "module.", "_orig_mod.",
    "model.",
    "lora_unet_", "lora_transformer_", "lycoris_", "_",
)  # fmt: skip


@dataclass(frozen=True)
class AdapterKey:
    """Hold the parts of a tensor's key.

    Attributes:
        key: as it stands in the file.
        layer: what stands before the role, prefixes included.
        role: what the tensor is to the layer.
        adapter: the name that PEFT gave the adapter, or None.
    """

    key: str
    layer: str
    role: Role
    adapter: str | None


def parse_key(key: str) -> AdapterKey | None:
    """Take a key apart; None if it is of no form that is known."""
    for pattern, role in _ROLES:
        if match := pattern.fullmatch(key):
            layer = match["layer"].replace("._orig_mod.", ".").removesuffix(".base_layer")
            # of the table, which they leave out
            if key.endswith(".diff_m") and not layer.endswith(_TABLES):
                layer = f"{layer}{'.' if '.' in layer else '_'}modulation"
            return AdapterKey(key, layer, role, match.groupdict().get("adapter"))
    return None


def reason_to_refuse(key: str) -> str | None:
    """Say what a key is that no transformer's LoRA has, or None if nothing speaks against it."""
    return next((what for pattern, what in _REFUSED if pattern.match(key)), None)


class Layers:
    """Find the layers of a transformer by all the names that files give them.

    The names are ours, the original Wan's and FastVideo's, each with dots or with underscores and
    after any prefix.

    Args:
        shapes: shapes of the parameters, by our names.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self._ours: dict[str, str] = {}
        for naming in reversed(NAMINGS):  # our own names first
            for name in shapes:
                theirs = naming.theirs(name)
                if theirs is not None:
                    self._ours.setdefault(_module(theirs), _module(name))
        for theirs, ours in list(self._ours.items()):
            self._ours.setdefault(theirs.replace(".", "_"), ours)

    def find(self, layer: str) -> tuple[str | None, tuple[str, ...]]:
        """Find a layer.

        Args:
            layer: as a file names it, prefixes included.

        Returns:
            Our name of it, or None if the transformer has no such layer, and all names that a
            pattern may mean it by: that in the file first.
        """
        name = layer
        while name not in self._ours:
            prefix = next((p for p in _PREFIXES if name.startswith(p)), None)
            if prefix is None:
                return None, (layer.removeprefix(PEFT_PREFIX), layer)
            name = name.removeprefix(prefix)
        ours = self._ours[name]
        original = ORIGINAL.theirs(ours)
        names = (
            name,
            ours,
            *(() if original is None else (original,)),
            layer.removeprefix(PEFT_PREFIX),
            layer,
        )
        return ours, tuple(dict.fromkeys(names))

    def parameter(self, layer: str, role: Role) -> str:
        """Return our name of the parameter that a role changes, which the layer may not have."""
        if role in (Role.UP_BIAS, Role.BIAS_DIFFERENCE, Role.BIAS):
            return f"{layer}.bias"
        return layer if layer in self.shapes else f"{layer}.weight"


def _module(name: str) -> str:
    return name.removesuffix(".weight").removesuffix(".bias")
