"""Read the settings of a LoRA from PEFT's ``adapter_config.json`` or from diffusers' metadata."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from anyflow.formats.errors import CheckpointFormatError

# Fields of peft.LoraConfig that change no number of adapters that are trained.
_WITHOUT_EFFECT = (
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode",
    "lora_dropout", "megatron_core", "runtime_config", "qalora_group_size", "loftq_config",
    "eva_config",
    "corda_config", "lora_ga_config", "ensure_weight_tying", "parent_library",
)  # fmt: skip
# These leave the base weights as they are; pissa, olora, corda, loftq and lora_ga change them.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# Python's search takes exponential time for nested repeats, and a power of the name's length for
# others.
_MAX_REPEATS, _REPEAT, _REPEATED_GROUP = 4, re.compile(r"(?<!\\)[*+{]"), re.compile(r"\)[*+{]")
_BIASES = ("none", "all", "lora_only")


@dataclass(frozen=True)
class AdapterConfig:
    """Hold the settings that decide the numbers of a LoRA, by the names of ``peft.LoraConfig``.

    Attributes:
        where: names the document in errors.
        r, lora_alpha: of every layer without a pattern; None where the document does not say it.
        rank_pattern, alpha_pattern: other values by a pattern of names, of which the first that
            matches counts.
        use_rslora: whether the scale is ``alpha / sqrt(r)`` rather than ``alpha / r``.
        use_dora: whether every layer has a magnitude.
        lora_bias: whether every ``B`` has a bias.
        bias: which biases of the model are replaced.
        modules_to_save: ends of the names of modules that are replaced.
        target_modules, exclude_modules: ends of the names of layers with and without adapters, or a
            regular expression.
        layers_to_transform, layers_pattern: numbers of the layers with adapters, and the name
            before the number.
    """

    where: str
    r: int | None = None
    lora_alpha: float | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    modules_to_save: tuple[str, ...] = ()
    target_modules: tuple[str, ...] | str | None = None
    exclude_modules: tuple[str, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()

    @classmethod
    def parse(cls, raw: object, where: str) -> AdapterConfig:
        """Take a JSON document apart.

        Args:
            raw: the document.
            where: names it in errors.

        Raises:
            CheckpointFormatError: it is no object, is of another method than LoRA, has a value that
                is not possible, or a field that would change numbers in a way that is not
                supported.
        """
        if not isinstance(raw, dict):
            raise CheckpointFormatError(f"{where} should hold an object, not {_shown(raw)}")
        fields = _Fields(raw, where)
        fields.require_supported()
        return cls(
            where=where,
            r=fields.rank("r", raw["r"]) if "r" in raw else None,
            lora_alpha=fields.alpha("lora_alpha", raw["lora_alpha"])
            if "lora_alpha" in raw
            else None,
            rank_pattern={
                k: fields.rank(f"rank_pattern.{k}", v)
                for k, v in fields.patterns("rank_pattern").items()
            },
            alpha_pattern={
                k: fields.alpha(f"alpha_pattern.{k}", v)
                for k, v in fields.patterns("alpha_pattern").items()
            },
            use_rslora=fields.flag("use_rslora"),
            use_dora=fields.flag("use_dora"),
            lora_bias=fields.flag("lora_bias"),
            bias=fields.choice("bias", _BIASES, "none"),
            modules_to_save=fields.names("modules_to_save"),
            target_modules=fields.names_or_pattern("target_modules"),
            exclude_modules=fields.names_or_pattern("exclude_modules"),
            layers_to_transform=fields.numbers("layers_to_transform"),
            layers_pattern=fields.list_of_patterns("layers_pattern"),
        )

    def rank_of(self, names: Sequence[str]) -> int | None:
        """Return the rank of a layer, which may have several names; None where it is not said."""
        key = _pattern_key(self.rank_pattern, names)
        return self.r if key is None else self.rank_pattern[key]

    def alpha_of(self, names: Sequence[str], default: float | None = None) -> float | None:
        """Return the alpha of a layer; ``default`` stands for a missing ``lora_alpha``."""
        key = _pattern_key(self.alpha_pattern, names)
        if key is not None:
            return self.alpha_pattern[key]
        return default if self.lora_alpha is None else self.lora_alpha

    def scale(self, alpha: float, rank: int) -> float:
        """Return what ``B A`` is multiplied by."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def has_adapter(self, names: Sequence[str]) -> bool:
        """Tell whether PEFT would put an adapter on a layer, which may have several names."""
        return any(self._has_adapter(name) for name in names)

    def is_saved(self, names: Sequence[str]) -> bool:
        """Tell whether a module is one of ``modules_to_save``, or inside of one."""
        return any(self.saved_by(end, names) for end in self.modules_to_save)

    @staticmethod
    def saved_by(end: str, names: Sequence[str]) -> bool:
        """Tell whether ``end``, one of ``modules_to_save``, is one of the names or around it."""
        return any(f".{end}." in f".{name}." for name in names)

    def _has_adapter(self, name: str) -> bool:
        if self.exclude_modules and _matches(self.exclude_modules, name):
            return False
        if self.target_modules is None:
            return True
        if isinstance(self.target_modules, str) and self.target_modules.lower() == "all-linear":
            return True
        if not _matches(self.target_modules, name):
            return False
        if isinstance(self.target_modules, str) or not self.layers_to_transform:
            return True
        patterns = [rf"(?:^|.*?\.){p}\.(?P<index>\d+)\." for p in self.layers_pattern]
        if not patterns:
            patterns = [r"(?:.*?\.)?[^.]*\.(?P<index>\d+)\."]
        found = (re.match(p, name) for p in patterns)
        match = next((m for m in found if m is not None), None)
        return match is not None and int(match["index"]) in self.layers_to_transform


class _Fields:
    """Read the fields of a document, each by its kind."""

    def __init__(self, raw: dict[str, Any], where: str) -> None:
        self._raw, self._where = raw, where

    def require_supported(self) -> None:
        method = self._raw.get("peft_type", "LORA")
        if not isinstance(method, str) or method.upper() != "LORA":
            raise self._wrong("peft_type", method, "LORA")
        init = self._raw.get("init_lora_weights", True)
        if not any(
            init is plain or (isinstance(plain, str) and init == plain) for plain in _PLAIN_INITS
        ):
            raise self._wrong(
                "init_lora_weights",
                init,
                "an initialization that leaves the base weights as they are",
            )
        if self.flag("fan_in_fan_out"):
            raise self._wrong(
                "fan_in_fan_out", True, "false, as no layer here has transposed weights"
            )
        known = {
            *AdapterConfig.__dataclass_fields__,
            *_WITHOUT_EFFECT,
            "peft_type",
            "init_lora_weights",
        }
        for name, value in self._raw.items():
            if name not in known and value not in (None, False, [], {}, ""):
                raise self._wrong(name, value, "absent: its effect on the numbers is not supported")

    def rank(self, name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
            raise self._wrong(name, value, "a whole number >= 1")
        return value

    def alpha(self, name: str, value: object) -> float:
        number = None
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:
                number = math.inf
        if number is None or not (math.isfinite(number) and number >= 0):
            raise self._wrong(name, value, "a number >= 0 and finite")
        return number

    def flag(self, name: str) -> bool:
        value = self._raw.get(name, False)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return bool(value)

    def choice(self, name: str, allowed: Sequence[str], default: str) -> str:
        value = self._raw.get(name, default)
        if value not in allowed:
            raise self._wrong(name, value, f"one of {', '.join(allowed)}")
        return str(value)

    def names(self, name: str) -> tuple[str, ...]:
        value = self._raw.get(name)
        if isinstance(value, str):
            value = [value]
        if value is not None and not (
            isinstance(value, list) and all(isinstance(v, str) for v in value)
        ):
            raise self._wrong(name, value, "a list of texts")
        return () if value is None else tuple(value)

    def names_or_pattern(self, name: str) -> tuple[str, ...] | str | None:
        value = self._raw.get(name)
        if isinstance(value, str):
            self._require_pattern(name, value)
            return value
        return None if value is None else self.names(name)

    def patterns(self, name: str) -> dict[str, Any]:
        value = self._raw.get(name)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(name, value, "an object")
        patterns = {} if value is None else value
        for pattern in patterns:
            self._require_pattern(name, pattern)
        return patterns

    def list_of_patterns(self, name: str) -> tuple[str, ...]:
        patterns = self.names(name)
        for pattern in patterns:
            self._require_pattern(name, pattern)
        return patterns

    def numbers(self, name: str) -> tuple[int, ...] | None:
        value = self._raw.get(name)
        value = [value] if isinstance(value, int) else value
        whole = isinstance(value, list) and all(
            isinstance(v, int) and not isinstance(v, bool) for v in value
        )
        if value is not None and not whole:
            raise self._wrong(name, value, "a list of whole numbers")
        return None if value is None else tuple(value)

    def _require_pattern(self, name: str, pattern: str) -> None:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise self._wrong(name, pattern, f"a regular expression ({error})") from error
        if len(_REPEAT.findall(pattern)) > _MAX_REPEATS or _REPEATED_GROUP.search(pattern):
            raise self._wrong(
                name,
                pattern,
                f"a regular expression with up to {_MAX_REPEATS} repeats, none of a group",
            )

    def _wrong(self, name: str, value: object, allowed: str) -> CheckpointFormatError:
        return CheckpointFormatError(
            f"{self._where}: {name} should be {allowed}, not {_shown(value)}"
        )


def _matches(names_or_pattern: tuple[str, ...] | str, name: str) -> bool:
    """Match as PEFT does: the whole name by a pattern, or its end by one of several names."""
    if isinstance(names_or_pattern, str):
        return re.fullmatch(names_or_pattern, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in names_or_pattern)


def _pattern_key(patterns: Mapping[str, object], names: Sequence[str]) -> str | None:
    """Return the first pattern that matches the end of a name, by the rule of PEFT."""
    return next(
        (key for name in names for key in patterns if re.match(rf"(.*\.)?({key})$", name)), None
    )


def _shown(value: object) -> str:
    """Return a value for a message, cut off: a number of 400 digits is one, too."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return "an integer of more than 40 digits"
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:80]}..."
