"""Run parts of diffusers' transformer blocks on the fused operators.

The transformer, its weights and its names stay. A part is replaced by giving a module of diffusers
another class, one of those below: parameters, buffers, adapters and state stay where they are.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

import torch
from diffusers import AnyFlowFARTransformer3DModel, ModelMixin, WanTransformer3DModel
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models import activations, normalization
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_anyflow, transformer_wan
from torch import Tensor, nn

from anyflow.ops import (
    Linear,
    gated_residual,
    gelu,
    layer_norm_modulate,
    residual_layer_norm,
    rms_norm_rope,
)

PARTS = ("norms", "rope", "gelu", "linear")
CAUSAL_PARTS = ("gelu", "linear")
_MARK = "_anyflow_parts"  # on a transformer: the parts that have been replaced
_FUSED: dict[type, type] = {nn.Linear: Linear}  # from diffusers' classes to ours
_Class = TypeVar("_Class", bound=type)


def _stands_for(theirs: type) -> Callable[[_Class], _Class]:
    """Register a class as the fused one of diffusers', and let it have the same name."""

    def register(ours: _Class) -> _Class:
        ours.__name__ = theirs.__name__  # by which diffusers and accelerate find blocks
        _FUSED[theirs] = ours
        return ours

    return register


def replaced_parts(transformer: object) -> tuple[str, ...]:
    """Return which parts of a transformer are ours."""
    return getattr(transformer, _MARK, ())


def checked_parts(only: str | Collection[str]) -> tuple[str, ...]:
    """Return the names of parts in their order.

    Raises:
        ValueError: no name is given, or one is unknown.
    """
    names = [only] if isinstance(only, str) else list(only)
    unknown = [name for name in names if name not in PARTS]
    if unknown or not names:
        given = ", ".join(repr(name) for name in unknown) if unknown else "nothing"
        raise ValueError(f"accelerate: only= takes {', '.join(map(repr, PARTS))}; got {given}")
    return tuple(name for name in PARTS if name in names)


def replace_parts(
    transformer: ModelMixin, parts: tuple[str, ...], problem: Callable[[Any], str | None]
) -> None:
    """Give the modules of some parts our classes; a part that has them already stays as it is.

    Args:
        transformer: diffusers'.
        parts: as :func:`checked_parts` returns them; others that are ours become diffusers' again.
        problem: tells what a module has that would keep our class from running, or None.

    Raises:
        ValueError: a module is not the one that diffusers builds, or has a problem.
    """
    if replaced_parts(transformer) == parts:
        return
    if isinstance(transformer, AnyFlowFARTransformer3DModel):
        absent = [part for part in parts if part not in CAUSAL_PARTS]
        if absent:
            raise ValueError(
                f"accelerate: only={', '.join(map(repr, absent))} is not for the causal model, "
                f"which has {', '.join(map(repr, CAUSAL_PARTS))}; without only= all of it is "
                "replaced"
            )
    found = [entry for part in parts for entry in _modules(transformer, part)]
    for name, module, theirs, ours in found:
        if type(module) not in (theirs, ours):
            expected = f"only diffusers' own {theirs.__name__} can be replaced"
            raise ValueError(
                f"accelerate: {name} is a {type(module).__module__}.{type(module).__name__}; "
                f"{expected}"
            )
        reason = problem(module) if isinstance(module, nn.Module) else None
        if reason is not None:
            raise ValueError(f"accelerate: {name} has {reason}")
    restore_parts(transformer)
    for _name, module, _theirs, ours in found:
        module.__class__ = ours
    _register_blocks()
    transformer.__dict__[_MARK] = parts


def restore_parts(transformer: ModelMixin) -> None:
    """Give every module of a transformer diffusers' class again."""
    for part in transformer.__dict__.pop(_MARK, ()):
        for _name, module, theirs, ours in _modules(transformer, part):
            if type(module) is ours:
                module.__class__ = theirs


def _modules(transformer: ModelMixin, part: str) -> Iterator[tuple[str, Any, type, type]]:
    """Yield name, module, diffusers' class and our class of all that a part consists of."""
    wan = isinstance(transformer, WanTransformer3DModel)
    diffusers_ = transformer_wan if wan else transformer_anyflow
    prefix = "Wan" if wan else "AnyFlow"

    def entry(name: str, module: Any, theirs: type) -> tuple[str, Any, type, type]:
        return name, module, theirs, _FUSED[theirs]

    if part == "rope":
        yield entry("rope", transformer.rope, getattr(diffusers_, f"{prefix}RotaryPosEmbed"))
    for index, block in enumerate(transformer.blocks):
        name = f"blocks.{index}"
        if part == "norms":
            yield entry(name, block, getattr(diffusers_, f"{prefix}TransformerBlock"))
            if not isinstance(block.norm2, nn.Identity):
                yield entry(f"{name}.norm2", block.norm2, normalization.FP32LayerNorm)
        elif part == "rope":
            processor = getattr(diffusers_, f"{prefix}AttnProcessor")
            yield entry(f"{name}.attn1.processor", block.attn1.processor, processor)
            for norm in ("norm_q", "norm_k"):
                theirs = nn.RMSNorm if wan else normalization.RMSNorm
                yield entry(f"{name}.attn1.{norm}", getattr(block.attn1, norm), theirs)
        elif part == "gelu":
            yield entry(f"{name}.ffn.net.0", block.ffn.net[0], activations.GELU)
        else:
            layers = (
                (key, layer)
                for key, layer in block.named_modules()
                if type(layer) in (nn.Linear, Linear)
            )
            for key, layer in layers:
                if "lora_" not in key and type(layer.weight) is nn.Parameter:
                    yield entry(f"{name}.{key}", layer, nn.Linear)


def _run_block(
    block: Any, x: Tensor, modulation: Tensor, attention: Callable[[Tensor], Tensor], text: Any
) -> Tensor:
    """Run a block of either model on ``x[B, L, D]`` with ``modulation[B, R, 6, D]``.

    R is 1, or L with one row per token.
    """
    rows = (block.scale_shift_table + modulation.float()).unbind(2)
    shift, scale, gate, c_shift, c_scale, c_gate = rows
    a = attention(layer_norm_modulate(x, shift, scale, block.norm1.eps))
    if isinstance(block.norm2, nn.Identity):
        x = n = gated_residual(x, a, gate)
    else:
        x, n = block.norm2(x, a, gate)
    a = text(n)
    x, n = residual_layer_norm(x, a, shift=c_shift, scale=c_scale, eps=block.norm3.eps)
    return gated_residual(x, block.ffn(n), c_gate)


@_stands_for(transformer_wan.WanTransformerBlock)
class FusedWanBlock(transformer_wan.WanTransformerBlock):
    """Run Wan's block with its norms, modulations and residuals fused."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any
    ) -> Tensor:
        """Map ``hidden_states[B, L, D]``; ``temb`` is ``[B, 6, D]`` or (2.2) ``[B, L, 6, D]``."""
        return _run_block(
            self,
            hidden_states,
            temb if temb.ndim == 4 else temb.unsqueeze(1),
            lambda n: self.attn1(n, None, None, rotary_emb),
            lambda n: self.attn2(n, encoder_hidden_states, None, None),
        )


@_stands_for(transformer_anyflow.AnyFlowTransformerBlock)
class FusedAnyFlowBlock(transformer_anyflow.AnyFlowTransformerBlock):
    """Run the block of diffusers' AnyFlow transformer with its norms and residuals fused."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Any,
        attention_mask: Any,
    ) -> Tensor:
        """Map ``hidden_states[B, L, D]``; ``temb`` is ``[B, L, 6, D]``."""
        return _run_block(
            self,
            hidden_states,
            temb,
            lambda n: self.attn1(
                hidden_states=n, rotary_emb=rotary_emb, attention_mask=attention_mask
            ),
            lambda n: self.attn2(hidden_states=n, encoder_hidden_states=encoder_hidden_states),
        )


@_stands_for(normalization.FP32LayerNorm)
class FusedLayerNorm(normalization.FP32LayerNorm):
    """Add the gated branch before the norm."""

    def forward(self, x: Tensor, y: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum and its norm, both ``[B, L, D]``."""
        return residual_layer_norm(x, y, gate, weight=self.weight, bias=self.bias, eps=self.eps)


def _normalized_heads(
    norm: Any, x: Tensor, num_heads: int, rotary: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Map ``x[B, L, D]`` to ``[B, L, H, Dh]``, rotated by (cos, sin) ``[1, L, 1, Dh / 2]``."""
    cos, sin = (None, None) if rotary is None else (table[0, :, 0] for table in rotary)
    return rms_norm_rope(x, norm.weight, cos, sin, num_heads=num_heads, eps=norm.eps)


@_stands_for(nn.RMSNorm)
class FusedTorchRMSNorm(nn.RMSNorm):
    """Normalize and rotate Wan's queries and keys."""

    def forward(self, x: Tensor, num_heads: int, rotary: tuple[Tensor, Tensor] | None) -> Tensor:  # type: ignore[override]
        """Normalize, split heads and rotate."""
        return _normalized_heads(self, x, num_heads, rotary)


@_stands_for(normalization.RMSNorm)
class FusedRMSNorm(normalization.RMSNorm):
    """Normalize and rotate AnyFlow's queries and keys."""

    def forward(self, x: Tensor, num_heads: int, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Normalize, split heads and rotate."""
        return _normalized_heads(self, x, num_heads, rotary)


def _self_attention(
    processor: Any, attn: Any, x: Tensor, mask: Any, rotary: tuple[Tensor, Tensor] | None
) -> Tensor:
    if getattr(attn, "fused_projections", False):
        query, key, value = attn.to_qkv(x).chunk(3, dim=-1)
    else:
        query, key, value = attn.to_q(x), attn.to_k(x), attn.to_v(x)
    query, key = attn.norm_q(query, attn.heads, rotary), attn.norm_k(key, attn.heads, rotary)
    out = dispatch_attention_fn(
        query,
        key,
        value.unflatten(2, (attn.heads, -1)),
        attn_mask=mask,
        backend=processor._attention_backend,
        parallel_config=processor._parallel_config,
    )
    return attn.to_out[1](attn.to_out[0](out.flatten(2, 3).type_as(query)))


@_stands_for(transformer_wan.WanAttnProcessor)
class FusedWanAttention(transformer_wan.WanAttnProcessor):
    """Attend with queries and keys whose norm and rotation are fused, as diffusers chooses."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Map ``[B, L, D]`` to ``[B, L, D]``; self-attention only."""
        return _self_attention(self, attn, hidden_states, attention_mask, rotary_emb)


@_stands_for(transformer_anyflow.AnyFlowAttnProcessor)
class FusedAnyFlowAttention(transformer_anyflow.AnyFlowAttnProcessor):
    """Attend with queries and keys whose norm and rotation are fused, as diffusers chooses."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Any = None,
        rotary_emb: dict[str, tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Map ``[B, L, D]`` to ``[B, L, D]``; self-attention only."""
        rotary = None if rotary_emb is None else rotary_emb["query"]
        return _self_attention(self, attn, hidden_states, attention_mask, rotary)


@_stands_for(transformer_wan.WanRotaryPosEmbed)
class PairedWanRotary(transformer_wan.WanRotaryPosEmbed):
    """Compute Wan's rotary tables with one entry per pair."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(cos, sin)``, each ``[1, L, 1, Dh / 2]`` in fp32."""
        cos, sin = super().forward(hidden_states)
        return cos[..., 0::2].float().contiguous(), sin[..., 1::2].float().contiguous()


@_stands_for(transformer_anyflow.AnyFlowRotaryPosEmbed)
class RealAnyFlowRotary(transformer_anyflow.AnyFlowRotaryPosEmbed):
    """Compute AnyFlow's rotary tables as real numbers."""

    def forward(self, layout_cfg: Any, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
        """Return ``(cos, sin)`` for query and key, each ``[1, L, 1, Dh / 2]`` in fp32."""
        angles = super().forward(layout_cfg, device)["query"].transpose(1, 2)
        tables = angles.real.float().contiguous(), angles.imag.float().contiguous()
        return {"query": tables, "key": tables}


@_stands_for(activations.GELU)
class FusedGELU(activations.GELU):
    """Run the feed-forward's first layer with our tanh-GELU."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map ``[B, L, D]`` to ``[B, L, N]``."""
        return (
            gelu(self.proj(hidden_states))
            if self.approximate == "tanh"
            else super().forward(hidden_states)
        )


@functools.cache
def _register_blocks() -> None:
    """Tell diffusers' caches, which look up a block's class, about ours."""
    for theirs in (
        transformer_wan.WanTransformerBlock,
        transformer_anyflow.AnyFlowTransformerBlock,
    ):
        try:
            known = TransformerBlockRegistry.get(theirs)
        except ValueError:  # diffusers has no cache for this block
            continue
        TransformerBlockRegistry.register(_FUSED[theirs], copy.copy(known))
