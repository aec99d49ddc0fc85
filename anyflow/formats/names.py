"""Translate the names of parameters between the formats; ours are diffusers' names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from anyflow.formats.errors import CheckpointFormatError, listed

_NAME = re.compile(r"(?P<block>blocks\.\d+\.)?(?P<module>.+?)(?P<leaf>\.weight|\.bias)?")
_EMBEDDER = "condition_embedder"
_ATTENTION = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}


@dataclass(frozen=True)
class Naming:
    """Map a format's modules and lone parameters to ours, outside and inside of a block.

    Attributes:
        title: title of the naming, for messages.
        marks: parts of names that no other naming has; one of them tells the naming.
        root: modules outside of the blocks.
        block: modules inside of a block; both tables are empty where the names are ours already.
    """

    title: str
    marks: tuple[str, ...]
    root: Mapping[str, str] = field(default_factory=dict)
    block: Mapping[str, str] = field(default_factory=dict)

    def ours(self, name: str) -> str | None:
        """Return our name of a parameter, or None where the table has none."""
        return self._translated(name, self.root, self.block) if self.root else name

    def theirs(self, name: str) -> str | None:
        """Return the format's name of one of our parameters, or None where the table has none."""
        if not self.root:
            return name
        return self._translated(name, _inverse(self.root), _inverse(self.block))

    @staticmethod
    def _translated(name: str, root: Mapping[str, str], block: Mapping[str, str]) -> str | None:
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        prefix, module, leaf = match["block"], match["module"], match["leaf"]
        translated = (root if prefix is None else block).get(module)
        if translated is None:
            return None
        return f"{'' if prefix is None else prefix}{translated}{'' if leaf is None else leaf}"


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {ours: theirs for theirs, ours in table.items()}


DIFFUSERS = Naming(
    "diffusers", marks=(f"{_EMBEDDER}.time_embedder.linear_", ".attn1.", f"{_EMBEDDER}.time_proj.")
)

ORIGINAL = Naming(
    "the original Wan",
    marks=("time_embedding.", "time_projection.", ".self_attn.", "head.head."),
    root={
        "patch_embedding": "patch_embedding",
        "time_embedding.0": f"{_EMBEDDER}.time_embedder.linear_1",
        "time_embedding.2": f"{_EMBEDDER}.time_embedder.linear_2",
        "time_projection.1": f"{_EMBEDDER}.time_proj",
        "text_embedding.0": f"{_EMBEDDER}.text_embedder.linear_1",
        "text_embedding.2": f"{_EMBEDDER}.text_embedder.linear_2",
        "img_emb.proj.0": f"{_EMBEDDER}.image_embedder.norm1",
        "img_emb.proj.1": f"{_EMBEDDER}.image_embedder.ff.net.0.proj",
        "img_emb.proj.3": f"{_EMBEDDER}.image_embedder.ff.net.2",
        "img_emb.proj.4": f"{_EMBEDDER}.image_embedder.norm2",
        "head.head": "proj_out",
        "head.modulation": "scale_shift_table",
    },
    block={
        **{f"self_attn.{theirs}": f"attn1.{ours}" for theirs, ours in _ATTENTION.items()},
        **{f"cross_attn.{theirs}": f"attn2.{ours}" for theirs, ours in _ATTENTION.items()},
        "norm3": "norm2",  # the affine norm before cross-attention is their third and our second
        "ffn.0": "ffn.net.0.proj",
        "ffn.2": "ffn.net.2",
        "modulation": "scale_shift_table",
    },
)

FASTVIDEO = Naming(
    "FastVideo",
    marks=("patch_embedding.proj.", ".time_modulation.linear.", ".self_attn_residual_norm."),
    root={
        "patch_embedding.proj": "patch_embedding",
        f"{_EMBEDDER}.time_embedder.mlp.fc_in": f"{_EMBEDDER}.time_embedder.linear_1",
        f"{_EMBEDDER}.time_embedder.mlp.fc_out": f"{_EMBEDDER}.time_embedder.linear_2",
        f"{_EMBEDDER}.delta_embedder.mlp.fc_in": f"{_EMBEDDER}.delta_embedder.linear_1",
        f"{_EMBEDDER}.delta_embedder.mlp.fc_out": f"{_EMBEDDER}.delta_embedder.linear_2",
        f"{_EMBEDDER}.time_modulation.linear": f"{_EMBEDDER}.time_proj",
        f"{_EMBEDDER}.text_embedder.fc_in": f"{_EMBEDDER}.text_embedder.linear_1",
        f"{_EMBEDDER}.text_embedder.fc_out": f"{_EMBEDDER}.text_embedder.linear_2",
        f"{_EMBEDDER}.image_embedder.norm1": f"{_EMBEDDER}.image_embedder.norm1",
        f"{_EMBEDDER}.image_embedder.ff.fc_in": f"{_EMBEDDER}.image_embedder.ff.net.0.proj",
        f"{_EMBEDDER}.image_embedder.ff.fc_out": f"{_EMBEDDER}.image_embedder.ff.net.2",
        f"{_EMBEDDER}.image_embedder.norm2": f"{_EMBEDDER}.image_embedder.norm2",
        "proj_out": "proj_out",
        "scale_shift_table": "scale_shift_table",
    },
    block={
        **{ours.removesuffix(".0"): f"attn1.{ours}" for ours in _ATTENTION.values()},
        **{f"attn2.{ours.removesuffix('.0')}": f"attn2.{ours}" for ours in _ATTENTION.values()},
        "self_attn_residual_norm.norm": "norm2",
        "ffn.fc_in": "ffn.net.0.proj",
        "ffn.fc_out": "ffn.net.2",
        "scale_shift_table": "scale_shift_table",
    },
)

NAMINGS = (ORIGINAL, FASTVIDEO, DIFFUSERS)

# Modules that torch puts around others (torch.compile, FSDP, activation checkpointing), wherever
# they are.
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Of every transformer one, told from an image encoder's by its axes; then others, should it be
# absent.
_ANCHORS = (
    (re.compile(r"(?P<prefix>(?:.+\.)?)patch_embedding\.(?:proj\.)?weight"), 5),
    (
        re.compile(
            r"(?P<prefix>(?:.+\.)?)"
            r"(?:condition_embedder\.time_embedder\.\w|time_embedding\.0\.weight).*"
        ),
        2,
    ),
    (re.compile(r"(?P<prefix>(?:.+\.)?)blocks\.\d+\.(?:attn1|self_attn|ffn)\..+"), 2),
)
# Trained in full beside adapters, and then without the prefix that these have.
CAUSAL_KEYS = "far_patch_embedding."
# First parts of names of a pipeline's other models, in single files of ComfyUI and others.
_OTHER_PARTS = (
    "audio_encoder",
    "clip",
    "clip_vision",
    "cond_stage_model",
    "conditioner",
    "first_stage_model",
    "image_encoder",
    "text_encoder",
    "text_encoders",
    "vae",
)


def naming_of(names: Iterable[str]) -> Naming | None:
    """Return the naming that one of the names tells, or None."""
    names = tuple(names)
    found = (
        naming for naming in NAMINGS if any(mark in name for mark in naming.marks for name in names)
    )
    return next(found, None)


@dataclass(frozen=True)
class FoundTransformer:
    """Hold where the transformer is among the tensors of a file.

    Attributes:
        names: from the names without prefix and wrappers to the file's own.
        prefix: before every name of the transformer: ``module.``, ``model.diffusion_model.``.
        others: the number of tensors of each other model that the file has, by the first part of
            their names.
    """

    names: Mapping[str, str]
    prefix: str
    others: Mapping[str, int]


def locate(shapes: Mapping[str, tuple[int, ...]], where: str) -> FoundTransformer:
    """Find the one transformer among the tensors of a file, under whatever prefix.

    Args:
        shapes: shapes of the tensors by their own names.
        where: the file, for messages.

    Raises:
        CheckpointFormatError: the file holds several transformers; a tensor is neither the
            transformer's nor of another model of a pipeline; or two names are one without wrappers.
    """
    unwrapped: dict[str, str] = {}
    for own in shapes:
        name = _WRAPPERS.sub("", own)
        if name in unwrapped:
            raise CheckpointFormatError(
                f"{where}: {unwrapped[name]} and {own} are one tensor of the model"
            )
        unwrapped[name] = own
    prefixes = _prefixes({name: shapes[own] for name, own in unwrapped.items()})
    if len(prefixes) > 1:
        raise CheckpointFormatError(
            f"{where} holds {len(prefixes)} transformers, under "
            f"{', '.join(p or 'no prefix' for p in prefixes)}; "
            f"save one of them to a file of its own"
        )
    prefix = prefixes[0] if prefixes else ""
    outside = [
        name
        for name in unwrapped
        if not name.startswith((prefix, CAUSAL_KEYS)) or (prefixes and _is_of_other_part(name))
    ]
    left_out = set(outside)
    inside: dict[str, str] = {}
    for name, own in unwrapped.items():
        if name not in left_out:
            other = inside.setdefault(name.removeprefix(prefix), own)
            if other != own:
                raise CheckpointFormatError(
                    f"{where}: {other} and {own} are one tensor of the model"
                )
    if strange := [unwrapped[name] for name in outside if not _is_of_other_part(name)]:
        raise CheckpointFormatError(
            f"{where}: the transformer is under {prefix}, and these tensors are neither of it nor "
            "of another model "
            f"that is known:{listed(strange)}"
        )
    others = Counter(name.partition(".")[0] + "." for name in outside)
    return FoundTransformer(inside, prefix, dict(sorted(others.items())))


def prefix_of(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the prefix of the one transformer's names; empty for none or several.

    Args:
        shapes: shapes of the tensors by their own names.
    """
    prefixes = _prefixes(shapes)
    return prefixes[0] if len(prefixes) == 1 else ""


def _is_of_other_part(name: str) -> bool:
    return name.partition(".")[0] in _OTHER_PARTS


def _prefixes(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    own = {name: shape for name, shape in shapes.items() if not _is_of_other_part(name)}
    for pattern, axes in _ANCHORS:
        matches = (pattern.fullmatch(name) for name, shape in own.items() if len(shape) == axes)
        found = {match["prefix"] for match in matches if match is not None}
        if found:
            return sorted(found)
    return []
