"""How the formats name the same parameters. Ours are diffusers' names; the others are tables of modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

_NAME = re.compile(r"(?P<block>blocks\.\d+\.)?(?P<module>.+?)(?P<leaf>\.weight|\.bias)?")
_EMBEDDER = "condition_embedder"
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}


@dataclass(frozen=True)
class Naming:
    """A one-to-one table from a format's modules (and lone parameters) to ours, outside and inside of a block.

    Attributes:
        title: of the naming, for messages.
        marks: parts of names that no other naming has; one of them tells the naming.
        root: modules outside of the blocks.
        block: modules inside of a block; both tables are empty where the names are ours already.
    """

    title: str
    marks: tuple[str, ...]
    root: Mapping[str, str] = field(default_factory=dict)
    block: Mapping[str, str] = field(default_factory=dict)

    def ours(self, name: str) -> str | None:
        """Our name of a parameter, or None where the table has none."""
        return self._translated(name, self.root, self.block) if self.root else name

    def theirs(self, name: str) -> str | None:
        """The format's name of one of our parameters, or None where the table has none."""
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


DIFFUSERS = Naming("diffusers", marks=(f"{_EMBEDDER}.time_embedder.linear_", ".attn1.", f"{_EMBEDDER}.time_proj."))

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

# What PEFT and ComfyUI put before every name.
_PREFIXES = ("base_model.model.", "model.diffusion_model.")


def naming_of(names: Iterable[str]) -> Naming | None:
    """The naming that one of the names tells, or None."""
    names = tuple(names)
    found = (naming for naming in NAMINGS if any(mark in name for mark in naming.marks for name in names))
    return next(found, None)


def common_prefix(names: Iterable[str]) -> str:
    """The known prefix that every one of the names has, or an empty string."""
    names = tuple(names)
    return next((prefix for prefix in _PREFIXES if names and all(name.startswith(prefix) for name in names)), "")
