"""Test which LoRA files and settings are read, and which are refused."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from lora_layers import build, copy_of, error, one_layer, pair, refused
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from anyflow.pipelines.lora import merge_lora

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {"to_q": 32, r"^blocks\.1\.ffn.net.2": 3}},
    "rank_pattern": {"rank_pattern": {"to_q": 2, r"blocks\.1\.ffn\.net\.2": 3}, "use_rslora": True},
    "dora": {"use_dora": True, "use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "all"},
    "lora_only": {"bias": "lora_only"},
    "modules_to_save": {
        "modules_to_save": ["proj_out", "condition_embedder.time_embedder", "norm2"]
    },
    "exclude_modules": {"exclude_modules": ["blocks.0.attn1.to_q"]},
    "layers_to_transform": {"layers_to_transform": [1], "layers_pattern": "blocks"},
    "pattern": {"target_modules": r"blocks\.\d+\.attn1\.to_(q|k)"},
    "convolution": {"target_modules": ["patch_embedding", "to_q"]},
}


def trained_by_peft(options: dict[str, Any], generator: torch.Generator) -> torch.nn.Module:
    targets = ["attn1.to_q", "attn2.to_out.0", "ffn.net.2"]
    model = get_peft_model(
        build(), LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": targets, **options})
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_what_peft_saves_is_merged_as_peft_does(
    name: str, generator: torch.Generator, tmp_path: Path
) -> None:
    theirs, model = trained_by_peft(CONFIGS[name], generator), build()
    before = copy_of(model)
    theirs.save_pretrained(tmp_path)
    merge_lora(model, tmp_path)
    assert error(model, theirs.merge_and_unload().state_dict()) < 1e-6 < 0.1 < error(model, before)


@pytest.mark.parametrize("name", ["plain", "rslora", "alpha_pattern", "rank_pattern", "dora"])
def test_metadata_of_diffusers_is_obeyed(
    name: str, generator: torch.Generator, tmp_path: Path
) -> None:
    """Read the metadata in the header of a file of any name."""
    theirs, model = trained_by_peft(CONFIGS[name], generator), build()
    diffusers.loaders.WanLoraLoaderMixin.save_lora_weights(
        tmp_path,
        transformer_lora_layers={
            k.removeprefix("base_model.model."): t
            for k, t in get_peft_model_state_dict(theirs).items()
        },
        transformer_lora_adapter_metadata=theirs.peft_config["default"].to_dict(),
    )
    merge_lora(
        model, (tmp_path / "pytorch_lora_weights.safetensors").rename(tmp_path / "mine.safetensors")
    )
    assert error(model, theirs.merge_and_unload().state_dict()) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_alpha": 10**400}, "lora_alpha should be a number >= 0 and finite"),
        ({"lora_alpha": -8}, "lora_alpha"), ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": "8"}, "lora_alpha"), ({"lora_alpha": True}, "lora_alpha"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"r": 0}, "r should be a whole number >= 1, not 0"), ({"r": 4.5}, "r should be"),
        ({"r": 8}, "rank 4, but 8"),
        ({"rank_pattern": {"to_q": 0}}, "rank_pattern.to_q"),
        ({"rank_pattern": {"to_q": 3}}, "rank 4, but 3"),
        ({"rank_pattern": []}, "rank_pattern should be an object"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern should be a regular expression"),
        ({"alpha_pattern": {"to_q": "1"}}, "alpha_pattern.to_q"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"use_dora": True}, "use_dora"), ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias='all'"),
        ({"bias": "some"}, "bias should be one of none, all, lora_only"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"modules_to_save": ["proj_out"]}, "proj_out"), ({"peft_type": "LOHA"}, "peft_type should "
                                                                                 "be LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"exclude_modules": ["to_q"]}, "a layer without adapters"),
        ({"target_modules": ["to_k"]}, "a layer without"),
        ({"layers_to_transform": [1], "layers_pattern": "("}, "layers_pattern"),
        ({"rank_pattern": {"(.*)*x": 1}}, "repeats"),
        ({"target_modules": ".*.*.*.*.*x"}, "repeats"),
        ({"layers_to_transform": [1]}, "a layer without"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora"), ({"a_new_field": 2}, "a_new_field"),
        ({"target_modules": 3}, "target"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("beside", [True, False])
def test_settings_that_cannot_be_obeyed_are_refused(
    change: dict[str, Any], message: str, beside: bool, generator: torch.Generator, tmp_path: Path
) -> None:
    """Put the settings beside the file, or in its header."""
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["to_q"]} | change
    a, b = pair((24, 24), 4, generator)
    layer = "blocks.0.attn1.to_q"
    state = {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
    model, where = build(), "adapter_config.json" if beside else "lora_adapter_metadata"
    if beside:
        save_file(
            {f"base_model.model.{k}": t for k, t in state.items()},
            tmp_path / "adapter_model.safetensors",
        )
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    else:
        text = json.dumps({f"transformer.{k}": v for k, v in config.items()})
        save_file(
            state,
            tmp_path / "pytorch_lora_weights.safetensors",
            metadata={"lora_adapter_metadata": text},
        )
    refused(model, tmp_path, message, where)


@pytest.mark.parametrize(
    "text",
    ["[]", "3", "", "{", '{"r": 1, "r": 2}', "[" * 10**5, '{"lora_alpha": ' + "9" * 5000 + "}"],
)
def test_configurations_that_are_none(
    text: str, generator: torch.Generator, tmp_path: Path
) -> None:
    a, b = pair((24, 24), 4, generator)
    layer = "blocks.0.attn1.to_q"
    state = {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(text)
    refused(build(), tmp_path, "adapter_config.json")
    save_file(state, tmp_path / "one.safetensors", metadata={"lora_adapter_metadata": text})
    refused(build(), tmp_path / "one.safetensors", "lora_adapter_metadata")


def test_alpha_is_never_guessed_and_must_agree(generator: torch.Generator, tmp_path: Path) -> None:
    a, b = pair((24, 24), 4, generator)
    layer = "base_model.model.blocks.0.attn1.to_q"
    state = {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
    save_file(state, tmp_path / "lora.safetensors")
    model = build()
    expected = copy_of(model)
    refused(model, tmp_path / "lora.safetensors", "needs adapter_config.json beside it")
    for alpha in (torch.tensor(float("inf")), torch.zeros(2), torch.tensor(True)):
        save_file(state | {f"{layer}.alpha": alpha}, tmp_path / "lora.safetensors")
        refused(model, tmp_path / "lora.safetensors", f"{layer}.alpha")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    save_file(state | {f"{layer}.alpha": torch.tensor(4)}, tmp_path / "lora.safetensors")
    refused(model, tmp_path, "scales that differ, 1 by", f"{layer}.alpha", "adapter_config.json")
    save_file(
        state | {f"{layer}.alpha": torch.tensor(8, dtype=torch.bfloat16)},
        tmp_path / "lora.safetensors",
    )
    merge_lora(model, tmp_path)
    expected["blocks.0.attn1.to_q.weight"] += 2 * b @ a
    assert error(model, expected) < 1e-6


def test_files_that_are_none(generator: torch.Generator, tmp_path: Path) -> None:
    sound, _ = one_layer(tmp_path, generator)
    content, file, model = sound.read_bytes(), tmp_path / "x.safetensors", build()
    for damaged in (
        b"", content[:5], content[:50], content[:-1], content + b"\0",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", b"\xff" * 100,
    ):  # fmt: skip
        file.write_bytes(damaged)
        refused(model, file, "x.safetensors")
    file.unlink()
    os.mkfifo(file)
    refused(model, file, "FIFO")
    file.unlink()
    file.symlink_to("/dev/zero")
    refused(model, file, "device")
    for missing in (tmp_path / "none.safetensors", tmp_path / ("a" * 300), Path("\0")):
        refused(model, missing, "LoRA")
    for odd in (3, None, b"x"):
        refused(model, odd, "the path should be")  # type: ignore[arg-type]
    save_file({}, tmp_path / "empty.safetensors")
    refused(model, tmp_path / "empty.safetensors", "empty")
    (tmp_path / "lora.txt").write_text("")
    refused(model, tmp_path / "lora.txt", "should end in")
    refused(model, tmp_path, "more than one file", "one.safetensors")
    (tmp_path / "folder").mkdir()
    refused(model, tmp_path / "folder", "but has none")
    (tmp_path / "folder" / "adapter_model.safetensors").write_bytes(content)
    (tmp_path / "folder" / "adapter_model.safetensors.index.json").write_text("{}")
    refused(model, tmp_path / "folder", "an index")


def test_files_of_torch(generator: torch.Generator, tmp_path: Path) -> None:
    """Read them without running the code in them."""
    sound, added = one_layer(tmp_path, generator)
    model = build()
    expected = copy_of(model)
    torch.save(load_file(sound), tmp_path / "pytorch_lora_weights.bin")
    merge_lora(model, tmp_path)
    expected["blocks.0.attn1.to_q.weight"] += added
    assert error(model, expected) < 1e-6
    torch.save({"lora": build()}, tmp_path / "model.pt")
    refused(model, tmp_path / "model.pt", "model.pt")


def test_a_configuration_of_another_file_is_left_alone(
    generator: torch.Generator, tmp_path: Path
) -> None:
    file, added = one_layer(tmp_path, generator)
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 64, "lora_alpha": 1}))
    model = build()
    expected = copy.deepcopy(copy_of(model))
    merge_lora(model, file)
    expected["blocks.0.attn1.to_q.weight"] += added
    assert error(model, expected) < 1e-6
