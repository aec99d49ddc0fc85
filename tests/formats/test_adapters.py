"""Test adapters inside of a checkpoint: merged as PEFT does, or refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor

from anyflow.formats import CheckpointFormatError, convert, inspect, load_transformer
from anyflow.models import AnyFlowTransformer3DModel

SIZES = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 2, "out_channels": 2,
    "text_dim": 8,
    "freq_dim": 16, "ffn_dim": 32, "num_layers": 2,
}  # fmt: skip
LAYER = "base_model.model.blocks.0.attn1.to_q"


@pytest.fixture
def checkpoint(
    tmp_path: Path, generator: torch.Generator
) -> Callable[..., tuple[Path, dict[str, Tensor]]]:
    """Return ``checkpoint(**options)``: a folder with adapters, and what PEFT merges it to."""

    def make(**options: Any) -> tuple[Path, dict[str, Tensor]]:
        config = LoraConfig(
            **{"r": 4, "lora_alpha": 8, "target_modules": ["attn1.to_q", "ffn.net.2"], **options}
        )
        model = get_peft_model(AnyFlowTransformer3DModel(**SIZES), config)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
        save_file(
            {n: t.clone() for n, t in model.state_dict().items()}, tmp_path / "model.safetensors"
        )
        config.save_pretrained(tmp_path)
        return tmp_path, model.merge_and_unload().state_dict()

    return make


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def difference(model: torch.nn.Module, expected: dict[str, Tensor]) -> float:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    return max(float((state[name] - tensor).abs().max()) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "options",
    [
        {}, {"use_rslora": True}, {"alpha_pattern": {"to_q": 32}},
        {"rank_pattern": {r"1\.ffn\.net\.2": 3}},
        {"use_dora": True}, {"lora_bias": True}, {"bias": "all"},
        {"modules_to_save": ["proj_out", "time_embedder"]},
        {"target_modules": ["patch_embedding"], "use_rslora": True},
    ],
)  # fmt: skip
def test_every_field_is_obeyed(
    options: dict[str, Any], checkpoint: Callable, tmp_path: Path
) -> None:
    folder, merged = checkpoint(**options)
    assert difference(load_transformer(folder, attention_head_dim=12), merged) < 1e-6
    assert (
        difference(
            load_transformer(convert(folder, tmp_path / "out", attention_head_dim=12)), merged
        )
        < 1e-6
    )
    assert inspect(folder, attention_head_dim=12).problems == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora"), ({"lora_bias": True}, "lora_bias"), ({"r": 3}, "rank 4, "
                                                                                         "but 3"),
        ({"rank_pattern": {"to_q": 2}}, "rank 4, but 2"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "corda"}, "init_lora_weights"),
        ({"target_modules": ["to_k"]}, "without adapters"),
        ({"peft_type": "ADALORA"}, "peft_type"), ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"r": 0}, "r should be"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"), ({"lora_alpha": -1}, "lora_alpha"),
    ],
)  # fmt: skip
def test_fields_that_cannot_be_obeyed_are_refused(
    changes: dict[str, Any], message: str, checkpoint: Callable
) -> None:
    """Expect the same of ``inspect``: it never says complete of what does not load."""
    folder, _ = checkpoint()
    change_config(folder, **changes)
    for read in (load_transformer, inspect):
        with pytest.raises(CheckpointFormatError, match=message):
            read(folder, attention_head_dim=12)


def test_the_alpha_that_is_given_and_the_one_that_is_said(
    checkpoint: Callable, generator: torch.Generator
) -> None:
    folder, merged = checkpoint(use_rslora=True)
    assert difference(load_transformer(folder, attention_head_dim=12, lora_alpha=8), merged) < 1e-6
    with pytest.raises(
        CheckpointFormatError, match="lora_alpha=4 was given, but .*adapter_config.json has 8"
    ):
        load_transformer(folder, attention_head_dim=12, lora_alpha=4)
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["lora_alpha"]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointFormatError, match="not their alpha; give lora_alpha"):
        load_transformer(folder, attention_head_dim=12)
    assert difference(load_transformer(folder, attention_head_dim=12, lora_alpha=8), merged) < 1e-6


def test_tensors_of_adapters_are_never_left_out(generator: torch.Generator, tmp_path: Path) -> None:
    model = get_peft_model(
        AnyFlowTransformer3DModel(**SIZES), LoraConfig(r=2, target_modules=["attn1.to_q"])
    )
    sound = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    file = tmp_path / "model.safetensors"
    for key, tensor in {
        f"{LAYER}.lora_A.other.weight": torch.zeros(2, 24),
        f"{LAYER}.lora_down.weight": torch.zeros(2, 24),
        f"{LAYER}.lora_embedding_A": torch.zeros(2, 24), f"{LAYER}.hada_w1_a": torch.zeros(2, 24),
        f"{LAYER}.alpha": torch.tensor(float("nan")),
        f"{LAYER}.lora_magnitude_vector.default.weight": torch.ones(3),
        f"{LAYER}.diff_b": torch.zeros(24),
        f"{LAYER}.lora_A.default.weight": torch.full((2, 24), torch.nan),
    }.items():  # fmt: skip
        save_file(sound | {key: tensor}, file)
        with pytest.raises(CheckpointFormatError) as raised:
            load_transformer(file, attention_head_dim=12, lora_alpha=2)
        assert key in str(raised.value)


def test_a_lora_alone_is_no_checkpoint(tmp_path: Path) -> None:
    layer = "diffusion_model.blocks.0.self_attn.q"
    file = tmp_path / "lora.safetensors"
    save_file(
        {f"{layer}.lora_A.weight": torch.zeros(2, 4), f"{layer}.lora_B.weight": torch.zeros(4, 2)},
        file,
    )
    with pytest.raises(CheckpointFormatError, match="a LoRA without the weights that it changes"):
        load_transformer(file)
