"""Make the network of the scripts beside this file."""

import torch

from anyflow.models import AnyFlowTransformer3DModel


def tiny_model(seed: int = 0, num_heads: int = 4) -> AnyFlowTransformer3DModel:
    """Make a network of two layers with the same weights for a seed."""
    torch.manual_seed(seed)
    return AnyFlowTransformer3DModel(
        num_attention_heads=num_heads,
        attention_head_dim=12,
        in_channels=3,
        out_channels=3,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=8,
    )
