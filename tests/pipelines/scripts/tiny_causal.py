"""Write the tiny model with a causal transformer of diffusers in place of its own."""

import shutil
from pathlib import Path
from typing import Any

import diffusers
import torch

# Three chunks of 1, 2 and 1 latent frames are 13 frames; the first one is compressed at the end.
CHUNKS = (1, 2, 1)


def write_causal_model(model: Path, folder: Path, **settings: Any) -> Path:
    """Write a causal model beside the other parts of a folder; settings are of its class.

    Its attention is sharper than at the start of a training, so that texts and chunks matter.
    """
    shutil.copytree(model, folder)
    shutil.rmtree(folder / "transformer")
    torch.manual_seed(1)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2}
    widths = {"text_dim": 16, "freq_dim": 32, "ffn_dim": 32, "rope_max_seq_len": 32}
    transformer = diffusers.AnyFlowFARTransformer3DModel(
        **sizes, **widths, **{"chunk_partition": CHUNKS, "full_chunk_limit": 2, **settings}
    )
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if ".attn" in name and parameter.ndim > 1:
                parameter.mul_(3.0)
    transformer.save_pretrained(folder / "transformer")
    return folder
