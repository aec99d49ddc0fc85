"""Read the sizes of a transformer off its tensors, and compare them with its ``config.json``."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from anyflow.formats.errors import CheckpointFormatError, listed
from anyflow.formats.names import CAUSAL_KEYS
from anyflow.models.configuration import CausalSettings, FlowMap
from anyflow.utils.validation import brief, is_finite_number

if TYPE_CHECKING:
    from anyflow.models import AnyFlowTransformer3DModel

WAN_HEAD_DIM = 128
FLOW_MAP_KEYS = "condition_embedder.delta_embedder."

_Shape = tuple[int, ...]


@dataclass(frozen=True)
class CheckpointArchitecture:
    """Hold the arguments of ``AnyFlowTransformer3DModel`` that a checkpoint tells.

    ``flow_map`` is None for plain Wan, and ``causal`` for a bidirectional model; with ``causal``
    the model is an ``AnyFlowFARTransformer3DModel``.
    """

    patch_size: tuple[int, int, int]
    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    out_channels: int
    text_dim: int
    freq_dim: int
    ffn_dim: int
    num_layers: int
    cross_attn_norm: bool
    image_dim: int | None
    eps: float = 1e-6
    rope_max_seq_len: int = 1024
    flow_map: FlowMap | None = None
    causal: CausalSettings | None = None

    def sizes(self) -> dict[str, Any]:
        """Return every field but ``flow_map`` and ``causal``, as the model's arguments."""
        return {name: getattr(self, name) for name in _SIZES}

    def build_empty(self) -> AnyFlowTransformer3DModel:
        """Build the model with parameters on the meta device: no memory, no random draws.

        Raises:
            CheckpointFormatError: no such model can be built.
        """
        from anyflow.models import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel

        options: dict[str, Any] = {"r_embedder": False}
        if (flow_map := self.flow_map) is not None:
            options = {
                "gate_value": flow_map.gate_value,
                "deltatime_type": flow_map.deltatime_type,
                "r_embedder_fusion": flow_map.fusion,
            }
        cls = AnyFlowTransformer3DModel
        if self.causal is not None:
            cls = AnyFlowFARTransformer3DModel
            options |= vars(self.causal)
        try:
            with torch.device("meta"):
                return cls(**self.sizes(), **options).eval()
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise CheckpointFormatError(
                f"no model has the settings of this checkpoint: {error}"
            ) from error


@dataclass(frozen=True)
class Config:
    """Hold what a ``config.json`` says, by our names.

    Attributes:
        kind: its ``_class_name``.
        sizes: those fields of :class:`CheckpointArchitecture` that it has.
        flow_map: True or False if it says so, None if the tensors decide.
        flow_map_settings: those fields of :class:`FlowMap` that it has.
        causal: True or False if it says so, None if the tensors decide.
        causal_settings: those fields of :class:`CausalSettings` that it has.
    """

    kind: str
    sizes: Mapping[str, Any]
    flow_map: bool | None
    flow_map_settings: Mapping[str, Any]
    causal: bool | None
    causal_settings: Mapping[str, Any]


ANYFLOW, ANYFLOW_FAR = "AnyFlowTransformer3DModel", "AnyFlowFARTransformer3DModel"
WAN, FAR_WAN, ORIGINAL_WAN = "WanTransformer3DModel", "FAR_Wan_Transformer3DModel", "WanModel"
KINDS = (ANYFLOW, ANYFLOW_FAR, FAR_WAN, WAN, ORIGINAL_WAN)

_ORIGINAL_FIELDS = {
    "num_heads": "num_attention_heads",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
}
_FLOW_MAP_FIELDS = {
    "gate_value": "gate_value",
    "deltatime_type": "deltatime_type",
    "r_embedder_fusion": "fusion",
}
# Fields with one value that our model has too; another one would be a model that it is not.
_FIXED: dict[str, tuple[object, ...]] = {
    "qk_norm": ("rms_norm_across_heads", True),
    "added_kv_proj_dim": (None,),
    "pos_embed_seq_len": (None,),
    "window_size": ([-1, -1],),
    "model_type": ("t2v",),
}
_OTHER = ("text_len", "dim")
_FLAGS = ("init_far_model", "init_flowmap_model", "r_embedder")
_SIZES = tuple(
    f.name
    for f in dataclasses.fields(CheckpointArchitecture)
    if f.name not in ("flow_map", "causal")
)
_CAUSAL_FIELDS = tuple(f.name for f in dataclasses.fields(CausalSettings))
_KNOWN = (*_SIZES, *_FLOW_MAP_FIELDS, *_CAUSAL_FIELDS, *_FIXED, *_FLAGS, *_OTHER)


def parse_config(raw: Mapping[str, Any], where: str) -> Config:
    """Translate a ``config.json``.

    Raises:
        CheckpointFormatError: the class or a field is unknown, or a value is not possible.
    """
    kind = raw.get("_class_name")
    if kind not in KINDS:
        raise CheckpointFormatError(
            f"{where} is of {brief(kind)}; understood are {', '.join(KINDS)}"
        )
    fields = {
        k: _ORIGINAL_FIELDS.get(k, k) if kind == ORIGINAL_WAN else k for k in raw if k[:1] != "_"
    }
    renamed = {name: raw[k] for k, name in fields.items()}
    lines = [
        f"{k} and {name} are one setting" for k, name in fields.items() if k != name and name in raw
    ]
    for name, value in renamed.items():
        if name in _FIXED:
            if value not in _FIXED[name]:
                lines.append(f"{name}={brief(value)} is not supported, only {_FIXED[name][0]!r}")
        elif name in _POSSIBLE:
            if not _POSSIBLE[name](value):
                lines.append(f"{name}={brief(value)} is not possible")
        elif name in _FLAGS:
            if not isinstance(value, bool):
                lines.append(f"{name}={brief(value)} should be true or false")
        elif name not in _OTHER:
            near = difflib.get_close_matches(name[:80], _KNOWN, 1)
            lines.append(f"{name[:80]} is unknown{f'; did you mean {near[0]}?' if near else ''}")
    dim: Any = renamed.get("dim")
    heads: Any = renamed.get("num_attention_heads")
    whole = _positive(dim) and _positive(heads) and dim % heads == 0
    if kind == ORIGINAL_WAN and not whole:
        lines.append(f"dim={brief(dim)} should be a multiple of num_heads={brief(heads)}")
    if lines:
        raise CheckpointFormatError(
            f"{where} does not describe a model that can be loaded:{listed(lines)}"
        )

    renamed = {k: tuple(v) if isinstance(v, list) else v for k, v in renamed.items()}
    sizes = {k: v for k, v in renamed.items() if k in _SIZES}
    if kind == ORIGINAL_WAN:
        sizes["attention_head_dim"] = renamed["dim"] // renamed["num_attention_heads"]
    if sizes.get("out_channels", 0) is None:  # diffusers: as many as go in
        sizes["out_channels"] = sizes.get("in_channels")
    default = True if kind in (ANYFLOW, ANYFLOW_FAR) else None
    return Config(
        kind=kind,
        sizes=sizes,
        flow_map=bool(raw["r_embedder"])
        if "r_embedder" in raw
        else (True if raw.get("init_flowmap_model") else default),
        flow_map_settings={
            ours: renamed[k] for k, ours in _FLOW_MAP_FIELDS.items() if k in renamed
        },
        causal=raw.get("init_far_model") if kind == FAR_WAN else kind == ANYFLOW_FAR,
        causal_settings={k: v for k, v in renamed.items() if k in _CAUSAL_FIELDS and v is not None},
    )


def resolve(
    shapes: Mapping[str, _Shape],
    config: Config | None,
    head_dim: int | None,
    flow_map: FlowMap | None,
    causal: CausalSettings | None,
    where: str,
) -> CheckpointArchitecture:
    """Return the architecture of tensors that have our names.

    Args:
        shapes: shapes of every tensor.
        config: None without a ``config.json``: then heads have ``head_dim``, or Wan's 128 channels.
        head_dim: given by the user, or None.
        flow_map: what no tensor tells, given by the user, or None for the config's, or the
            defaults.
        causal: likewise for the causal model; it makes a bidirectional model a causal one.
        where: the checkpoint, for messages.

    Raises:
        CheckpointFormatError: a size cannot be known, or config, tensors and the user's values
            disagree.
    """
    seen = _sizes_of(shapes, where)
    said = {} if config is None else dict(config.sizes)
    width = seen.pop("width", None)
    lines = [
        f"{name}: {said[name]} in the config, {value} by the tensors"
        for name, value in seen.items()
        if name in said and said[name] != value
    ]
    heads, disagreements = _heads(said, width, head_dim)
    lines += disagreements
    sizes = {**heads, **said, **seen}
    absent = [
        name
        for name in _REQUIRED
        if name not in sizes or (name == "num_layers" and sizes[name] == 0)
    ]
    lines += [
        f"{name}: neither in a config nor told by a tensor ({_TELLING.get(name, 'blocks.*')})"
        for name in absent
    ]
    has_flow_map = any(name.startswith(FLOW_MAP_KEYS) for name in shapes)
    if config is not None and config.flow_map is False and has_flow_map:
        lines.append("r_embedder: False in the config, but the tensors have a delta_embedder")
    settings = None
    if has_flow_map or (config is not None and config.flow_map):
        settings, disagreements = _flow_map(config, flow_map)
        lines += disagreements
    causal, disagreements = _causal(shapes, config, causal)
    lines += disagreements
    if lines:
        raise CheckpointFormatError(
            f"{where}: the sizes of the model are not clear:{listed(lines)}"
        )
    return CheckpointArchitecture(**sizes, flow_map=settings, causal=causal)


def _heads(
    said: Mapping[str, Any], width: int | None, head_dim: int | None
) -> tuple[dict[str, int], list[str]]:
    """Return number and channels of heads by the width of the tensors, and what disagrees."""
    lines = []
    head = said.get("attention_head_dim", WAN_HEAD_DIM if head_dim is None else head_dim)
    if head_dim is not None and head != head_dim:
        lines.append(f"attention_head_dim: {head} in the config, {head_dim} given")
    if width is None:
        return {}, lines
    heads = said.get("num_attention_heads", width // head)
    if heads * head != width:
        known = "attention_head_dim" in said or head_dim is not None
        hint = "" if known else "; give attention_head_dim"
        lines.append(f"width: {heads} heads of {head}, but {width} by the tensors{hint}")
    return {"num_attention_heads": heads, "attention_head_dim": head}, lines


def _flow_map(config: Config | None, given: FlowMap | None) -> tuple[FlowMap, list[str]]:
    said = {} if config is None else dict(config.flow_map_settings)
    if given is not None:
        lines = [
            f"{k}: {v!r} in the config, {getattr(given, k)!r} given"
            for k, v in said.items()
            if getattr(given, k) != v
        ]
        return given, lines
    if config is not None and config.kind == FAR_WAN and "gate_value" not in said:
        return FlowMap(), [
            "gate_value: not in the config, whose class has another default; give flow_map"
        ]
    return FlowMap(**said), []


def _causal(
    shapes: Mapping[str, _Shape], config: Config | None, given: CausalSettings | None
) -> tuple[CausalSettings | None, list[str]]:
    """Return the settings of a causal model, None for a bidirectional one, and what disagrees."""
    has_tensors = any(name.startswith(CAUSAL_KEYS) for name in shapes)
    said = None if config is None else config.causal
    if has_tensors and said is False:
        assert config is not None
        return None, [
            f"causal: no by the {config.kind} of the config, but the tensors have a "
            "far_patch_embedding; bidirectional=True (--bidirectional) leaves it out"
        ]
    if not has_tensors and not said:
        return given, []
    settings = {} if config is None else dict(config.causal_settings)
    lines = []
    shape = shapes.get(f"{CAUSAL_KEYS}weight", ())
    if len(shape) == 5 and min(shape) > 0:
        told = settings.setdefault("compressed_patch_size", tuple(shape[2:]))
        if told != shape[2:]:
            lines.append(
                f"compressed_patch_size: {told} in the config, {tuple(shape[2:])} by the tensors"
            )
    if given is not None:
        lines += [
            f"{k}: {v!r} in the checkpoint, {getattr(given, k)!r} given"
            for k, v in settings.items()
            if getattr(given, k) != v
        ]
        return given, lines
    try:
        return CausalSettings(**settings), lines
    except ValueError as error:
        return None, [*lines, str(error)]


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _positive_list(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(_positive(n) for n in value)


_POSSIBLE: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(_SIZES, _positive),
    "patch_size": lambda v: _positive_list(v) and len(v) == 3,
    "compressed_patch_size": lambda v: _positive_list(v) and len(v) == 3,
    "full_chunk_limit": _positive,
    "chunk_partition": lambda v: v is None or _positive_list(v),  # the older layout writes null
    "cross_attn_norm": lambda v: isinstance(v, bool),
    "image_dim": lambda v: v is None or _positive(v),
    "out_channels": lambda v: v is None or _positive(v),
    "eps": lambda v: is_finite_number(v) and v > 0,
    "gate_value": is_finite_number,
    "deltatime_type": lambda v: isinstance(v, str),
    "r_embedder_fusion": lambda v: isinstance(v, str),
}

# Which tensor tells a size, how many axes it has, and how it tells.
_TOLD: dict[str, tuple[str, int, Callable[[_Shape], Any]]] = {
    "width": ("patch_embedding.weight", 5, lambda s: s[0]),
    "in_channels": ("patch_embedding.weight", 5, lambda s: s[1]),
    "patch_size": ("patch_embedding.weight", 5, lambda s: tuple(s[2:])),
    "text_dim": ("condition_embedder.text_embedder.linear_1.weight", 2, lambda s: s[1]),
    "freq_dim": ("condition_embedder.time_embedder.linear_1.weight", 2, lambda s: s[1]),
    "ffn_dim": ("blocks.0.ffn.net.0.proj.weight", 2, lambda s: s[0]),
    "image_dim": ("condition_embedder.image_embedder.norm1.weight", 1, lambda s: s[0]),
    "out_channels": ("proj_out.weight", 2, lambda s: s[0]),
}
_TELLING = {size: tensor for size, (tensor, _, _) in _TOLD.items()}
_TELLING |= dict.fromkeys(("num_attention_heads", "attention_head_dim"), _TELLING["width"])
_REQUIRED = tuple(
    f.name for f in dataclasses.fields(CheckpointArchitecture) if f.default is dataclasses.MISSING
)


def _sizes_of(shapes: Mapping[str, _Shape], where: str) -> dict[str, Any]:
    """Return the sizes that the tensors tell.

    A tensor that is absent or of another kind tells nothing, and is listed later.
    """
    sizes: dict[str, Any] = {}
    for size, (tensor, axes, tell) in _TOLD.items():
        shape = shapes.get(tensor)
        if shape is not None and len(shape) == axes and min(shape) > 0:
            sizes[size] = tell(shape)
    if not any(".image_embedder." in name for name in shapes):
        sizes["image_dim"] = None
    if "out_channels" in sizes:
        patch = math.prod(sizes["patch_size"]) if "patch_size" in sizes else None
        features = sizes.pop("out_channels")
        if patch is not None and features % patch == 0:
            sizes["out_channels"] = features // patch
    sizes["num_layers"] = _count_blocks(shapes, where)
    if sizes["num_layers"] > 0:
        sizes["cross_attn_norm"] = any(
            re.fullmatch(r"blocks\.\d+\.norm2\.\w+", name) for name in shapes
        )
    return sizes


def _count_blocks(names: Iterable[str], where: str) -> int:
    found = {match[1] for name in names if (match := re.match(r"blocks\.(\d+)\.", name))}
    expected = {str(i) for i in range(len(found))}
    if found != expected:
        lines = [f"blocks.{i}: absent" for i in sorted(expected - found)] + [
            f"blocks.{i}: there" for i in sorted(found - expected)
        ]
        raise CheckpointFormatError(
            f"{where}: the blocks are not numbered from 0 without gaps:{listed(lines)}"
        )
    return len(found)
