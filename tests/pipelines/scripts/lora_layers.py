"""Build a tiny transformer and LoRAs of its layers, and measure how far merging is off."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from anyflow.models import AnyFlowTransformer3DModel
from anyflow.pipelines.lora import merge_lora

SIZES = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 2, "out_channels": 2,
    "text_dim": 8,
    "freq_dim": 16, "ffn_dim": 32, "num_layers": 2,
}  # fmt: skip


def build(dtype: torch.dtype = torch.float32, **sizes: Any) -> AnyFlowTransformer3DModel:
    """Draw every parameter: norms of 1 and biases of 0 would hide a missing one."""
    torch.manual_seed(0)
    model = AnyFlowTransformer3DModel(**{**SIZES, **sizes}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape))
    return model.to(dtype)


def copy_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def error(model: torch.nn.Module, expected: dict[str, Tensor]) -> float:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    return max(
        float((state[name].double() - tensor.double()).abs().max())
        for name, tensor in expected.items()
    )


def refused(model: AnyFlowTransformer3DModel, path: Path, *parts: str, scale: Any = 1.0) -> str:
    """Check the message for its parts; not a bit of the model has changed."""
    before = copy_of(model)
    with pytest.raises(ValueError) as raised:
        merge_lora(model, path, scale)
    for part in parts:
        assert part in str(raised.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return str(raised.value)


def pair(shape: tuple[int, ...], rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return (
        0.3 * torch.randn(rank, *shape[1:], generator=generator),
        0.3 * torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator),
    )


def one_layer(folder: Path, generator: torch.Generator) -> tuple[Path, Tensor]:
    """Make a LoRA of ``blocks.0.attn1.to_q``, and what it adds."""
    a, b = pair((24, 24), 2, generator)
    layer = "transformer.blocks.0.attn1.to_q"
    save_file(
        {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}, folder / "one.safetensors"
    )
    return folder / "one.safetensors", b @ a
