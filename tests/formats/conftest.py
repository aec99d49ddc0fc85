"""Make tiny checkpoints in every format, with diffusers, PEFT and renaming apart from ours."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.append(str(Path(__file__).parent / "scripts"))  # helpers of several files of tests

TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": 20,
    "freq_dim": 32,
    "ffn_dim": 80,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
# One substitution after the other, from diffusers' names.
TO_ORIGINAL = [
    (r"condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"condition_embedder\.time_proj", "time_projection.1"),
    (r"condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"^scale_shift_table", "head.modulation"),
    (r"^proj_out", "head.head"),
    (r"scale_shift_table$", "modulation"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.norm2\.", ".norm3."),
    (r"ffn\.net\.0\.proj", "ffn.0"),
    (r"ffn\.net\.2", "ffn.2"),
]
TO_FASTVIDEO = [
    (r"^patch_embedding\.", "patch_embedding.proj."),
    (r"(time|delta)_embedder\.linear_1", r"\1_embedder.mlp.fc_in"),
    (r"(time|delta)_embedder\.linear_2", r"\1_embedder.mlp.fc_out"),
    (r"text_embedder\.linear_1", "text_embedder.fc_in"),
    (r"text_embedder\.linear_2", "text_embedder.fc_out"),
    (r"time_proj\.", "time_modulation.linear."),
    (r"\.attn1\.", "."),
    (r"\.to_out\.0\.", ".to_out."),
    (r"\.norm2\.", ".self_attn_residual_norm.norm."),
    (r"ffn\.net\.0\.proj", "ffn.fc_in"),
    (r"ffn\.net\.2", "ffn.fc_out"),
]
ORIGINAL_CONFIG = {
    "_class_name": "WanModel",
    "_diffusers_version": "0.30.0",
    "dim": 48,
    "eps": 1e-6,
    "ffn_dim": 80,
    "freq_dim": 32,
    "in_dim": 3,
    "model_type": "t2v",
    "num_heads": 2,
    "num_layers": 2,
    "out_dim": 3,
    "text_len": 512,
}
LORA_ALPHA = 6.0


def renamed(state: dict[str, Tensor], table: list[tuple[str, str]]) -> dict[str, Tensor]:
    def rename(name: str) -> str:
        for pattern, replacement in table:
            name = re.sub(pattern, replacement, name)
        return name

    return {rename(name): tensor for name, tensor in state.items()}


def randomized(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draw every parameter: norms of 1 and biases of 0 would hide a missing one."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.fixture
def anyflow_model(generator: torch.Generator) -> Callable[..., nn.Module]:
    """Return ``anyflow_model(**changes)``, which makes diffusers' flow map."""
    return lambda **changes: randomized(
        diffusers.AnyFlowTransformer3DModel(**(TINY | changes)), generator
    )


@pytest.fixture
def wan_model(generator: torch.Generator) -> Callable[..., nn.Module]:
    """Return ``wan_model(**changes)``, which makes diffusers' plain Wan."""
    return lambda **changes: randomized(
        diffusers.WanTransformer3DModel(**(TINY | changes)), generator
    )


@pytest.fixture
def causal_model(generator: torch.Generator) -> nn.Module:
    """Make diffusers' causal flow map."""
    return randomized(diffusers.AnyFlowFARTransformer3DModel(**TINY), generator)


@pytest.fixture
def lora_state(
    anyflow_model: Callable[..., nn.Module], generator: torch.Generator
) -> tuple[dict, dict]:
    """Return a state dict with adapters by PEFT's names, and what PEFT merges it to.

    The adapters are called ``real`` and have rank 4.
    """
    targets = [
        "attn1.to_q",
        "attn1.to_k",
        "attn1.to_v",
        "attn1.to_out.0",
        "ffn.net.0.proj",
        "ffn.net.2",
    ]
    config = LoraConfig(r=4, lora_alpha=LORA_ALPHA, target_modules=targets)
    model = randomized(get_peft_model(anyflow_model(), config, adapter_name="real"), generator)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return state, model.merge_and_unload().state_dict()


def write_older_layout(model: nn.Module, folder: Path, **changes: Any) -> Path:
    """Write the older layout of the hub: another class, other fields, and the same names."""
    model.save_pretrained(folder / "transformer")
    file = folder / "transformer" / "config.json"
    fields = {
        "qk_norm": "rms_norm_across_heads",
        "added_kv_proj_dim": None,
        "chunk_partition": None,
    }
    flags = {
        "init_far_model": False,
        "init_flowmap_model": True,
        "compressed_patch_size": [1, 4, 4],
    }
    config = json.loads(file.read_text()) | {"full_chunk_limit": 3} | fields | flags | changes
    file.write_text(json.dumps(config | {"_class_name": "FAR_Wan_Transformer3DModel"}))
    (folder / "scheduler").mkdir()
    scheduler = {"_class_name": "FlowMapDiscreteScheduler", "num_train_timesteps": 1000, "shift": 5}
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(scheduler | {"weight_type": "gaussian"})
    )
    return folder


@pytest.fixture
def older_layout() -> Callable[..., Path]:
    """Return ``older_layout(model, folder, **config)``."""
    return write_older_layout


@pytest.fixture
def original_state() -> Callable[[nn.Module], dict[str, Tensor]]:
    """Return ``original_state(model)``, the tensors under the original Wan's names."""
    return lambda model: renamed(model.state_dict(), TO_ORIGINAL)


@pytest.fixture
def fastvideo_state() -> Callable[[nn.Module], dict[str, Tensor]]:
    """Return ``fastvideo_state(model)``, the tensors under FastVideo's names."""
    return lambda model: renamed(model.state_dict(), TO_FASTVIDEO)


@pytest.fixture
def original_folder(
    original_state: Callable[..., dict[str, Tensor]],
) -> Callable[[nn.Module, Path], Path]:
    """Return ``original_folder(model, folder)``: two files without an index, and Wan's config."""

    def write(model: nn.Module, folder: Path) -> Path:
        folder.mkdir()
        items = list(original_state(model).items())
        save_file(dict(items[::2]), folder / "part-1.safetensors")
        save_file(dict(items[1::2]), folder / "part-2.safetensors")
        (folder / "config.json").write_text(json.dumps(ORIGINAL_CONFIG))
        return folder

    return write


@pytest.fixture
def same_weights() -> Callable[[nn.Module, dict[str, Tensor]], bool]:
    """Return ``same_weights(model, state)``, which compares names, types and bits."""

    def same(model: nn.Module, state: dict[str, Tensor]) -> bool:
        ours = model.state_dict()
        alike = all(
            ours[n].dtype == t.dtype and torch.equal(ours[n], t)
            for n, t in state.items()
            if n in ours
        )
        return ours.keys() == state.keys() and alike

    return same


@pytest.fixture
def inputs(generator: torch.Generator) -> dict[str, Tensor]:
    """Draw latents ``[2, 3, 3, 4, 6]``, times ``[2]`` and text."""
    t = 1000 * torch.rand(2, generator=generator)
    return {
        "hidden_states": torch.randn(2, 3, 3, 4, 6, generator=generator),
        "timestep": t,
        "r_timestep": t / 3,
        "encoder_hidden_states": torch.randn(2, 7, 20, generator=generator),
    }


@pytest.fixture
def folder(anyflow_model: Callable, tmp_path: Path) -> Path:
    """Write a sound checkpoint in one file."""
    anyflow_model().save_pretrained(tmp_path / "sound")
    return tmp_path / "sound"


@pytest.fixture
def shards(anyflow_model: Callable, tmp_path: Path) -> Path:
    """Write a sound checkpoint in several files."""
    anyflow_model().save_pretrained(tmp_path / "shards", max_shard_size=80_000)
    return tmp_path / "shards"
