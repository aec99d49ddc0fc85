"""The any-step video transformer."""

from anyflow.models.transformer import AnyFlowTransformer3DModel, TextContext, TimeEmbedding

__all__ = ["AnyFlowTransformer3DModel", "TextContext", "TimeEmbedding"]
