"""Test that the summary of a checkpoint says what is in it, and what is wrong with it."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from anyflow.formats import CausalSettings, CheckpointFormat, inspect


def test_the_summary_of_a_flow_map(anyflow_model: Callable, tmp_path: Path) -> None:
    model = anyflow_model(deltatime_type="t-r").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "transformer", max_shard_size=40_000)
    info = inspect(tmp_path)
    parameters = list(model.parameters())
    assert (
        info.format is CheckpointFormat.ANYFLOW
        and info.is_flow_map
        and not info.is_causal
        and not info.problems
    )
    assert info.num_tensors == len(parameters) and info.num_parameters == sum(
        p.numel() for p in parameters
    )
    assert info.num_bytes == sum(p.nbytes for p in parameters) and len(info.files) > 1
    assert info.dtypes == {
        str(dtype).removeprefix("torch."): sum(p.numel() for p in parameters if p.dtype == dtype)
        for dtype in {p.dtype for p in parameters}
    }
    table = str(info)
    for line in (
        "format               diffusers AnyFlow",
        "flow map             gate_value 0.25, deltatime_type t-r",
    ):
        assert line in table
    assert f"parameters           {info.num_parameters:,}" in table and table.endswith(
        "complete             yes"
    )


def test_the_summary_of_plain_causal_and_adapted_models(
    wan_model: Callable, causal_model: nn.Module, lora_state: tuple[dict, dict], tmp_path: Path
) -> None:
    wan_model().save_pretrained(tmp_path / "wan")
    plain = inspect(tmp_path / "wan")
    assert (
        plain.format is CheckpointFormat.WAN
        and not plain.is_flow_map
        and "flow map             no" in str(plain)
    )
    causal_model.save_pretrained(tmp_path / "causal")
    causal = inspect(tmp_path / "causal")
    assert causal.is_causal and causal.is_flow_map and causal.num_tensors == plain.num_tensors + 6
    assert not causal.problems and causal.architecture.causal == CausalSettings()
    assert "causal               compressed_patch_size (1, 4, 4), full_chunk_limit 3" in str(causal)
    torch.save({"ema": lora_state[0]}, tmp_path / "lora.pt")
    adapted = inspect(tmp_path / "lora.pt", attention_head_dim=24)
    assert adapted.adapter_ranks == (4,) and adapted.format is CheckpointFormat.TRAINING
    assert adapted.problems == (
        "it has 12 adapters of rank 4, but not their alpha; give lora_alpha (--lora-alpha)",
    )
    assert adapted.num_parameters == sum(t.numel() for t in lora_state[1].values())


def test_the_summary_of_an_incomplete_model_lists_what_is_wrong(
    wan_model: Callable, tmp_path: Path
) -> None:
    wan_model().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["proj_out.beta"] = tensors.pop("proj_out.bias")
    save_file(tensors, file)
    info = inspect(tmp_path)
    assert info.problems == ("missing: proj_out.bias", "unexpected: proj_out.beta")
    assert str(info).endswith(
        "complete             no:\n  missing: proj_out.bias\n  unexpected: proj_out.beta"
    )
