"""The any-step video transformer."""

from anyflow.models.attention import AttentionChoice, attention_report, use_attention_backend
from anyflow.models.transformer import AnyFlowTransformer3DModel, TextContext, TimeEmbedding

__all__ = [
    "AnyFlowTransformer3DModel",
    "TextContext",
    "TimeEmbedding",
    "use_attention_backend",
    "attention_report",
    "AttentionChoice",
]
