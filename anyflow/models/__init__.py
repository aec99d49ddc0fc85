"""Provide the any-step video transformer and the choice of its attention."""

from anyflow.models.attention import AttentionChoice, attention_report, use_attention_backend
from anyflow.models.causal import AnyFlowFARTransformer3DModel
from anyflow.models.transformer import AnyFlowTransformer3DModel

__all__ = [
    "AnyFlowFARTransformer3DModel",
    "AnyFlowTransformer3DModel",
    "AttentionChoice",
    "attention_report",
    "use_attention_backend",
]
