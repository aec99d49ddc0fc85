"""Test accelerate() and restore() with adapters, compiled modules and copies."""

import copy
import pickle
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import ModelMixin
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from tiny_diffusers import assert_same, build, latents, transformers
from torch import nn

import anyflow
from anyflow.models.wan import WanTransformer3DModel

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]


def add_adapter(transformer: ModelMixin, targets: list[str] = TARGETS, name: str = "style") -> None:
    """Add adapters that change the result, by PEFT as diffusers adds them."""
    config = LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
    transformer.add_adapter(config, adapter_name=name)


def test_adapters_around_our_own_layers_in_bf16(generator) -> None:
    """Adapt the projection out, which runs in fp32: a plain linear layer would refuse."""
    theirs = build("anyflow").transformer
    add_adapter(theirs, ["proj_out", "patch_embedding"])
    theirs.to(torch.bfloat16)
    x, text = (
        torch.randn(1, 3, 16, 4, 6, generator=generator),
        torch.randn(1, 5, 16, generator=generator),
    )
    arguments = (
        x.bfloat16(),
        torch.full((1, 3), 700.0),
        torch.full((1, 3), 300.0),
        text.bfloat16(),
    )
    with torch.no_grad():
        expected = theirs(*arguments).sample
        ours = anyflow.accelerate(theirs)
        error = (ours(*arguments).sample - expected).float().norm() / expected.float().norm()
        assert 0 < error < 0.02
        anyflow.restore(ours)
        assert type(theirs.proj_out.base_layer) is nn.Linear
        assert type(theirs.patch_embedding.base_layer) is nn.Conv3d
        assert torch.equal(theirs(*arguments).sample, expected)


ONE_STEP: dict[str, Any] = {
    "num_inference_steps": 1,
    "guidance_scale": 1.0,
    "negative_prompt_embeds": None,
}


@pytest.mark.parametrize("kind", ["anyflow", "causal"])
def test_torch_compile_between_two_calls_and_restore_with_adapters(kind) -> None:
    pipe = build(kind, num_layers=1)
    add_adapter(pipe.transformer, [*TARGETS, "proj_out"])
    before, index = latents(pipe, **ONE_STEP), pipe.config["transformer"]
    anyflow.accelerate(pipe)
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    compiled = pipe.transformer
    assert (
        anyflow.accelerate(pipe).transformer is compiled
        and anyflow.accelerate(compiled) is compiled
    )
    assert pipe.config["transformer"] == index  # what is saved loads without anyflow
    assert_same(latents(pipe, **ONE_STEP), before)
    anyflow.restore(pipe)
    assert (
        pipe.get_list_adapters() == {"transformer": ["style"]}
        and pipe.config["transformer"] == index
    )
    assert torch.equal(latents(pipe, **ONE_STEP), before)


@pytest.mark.parametrize("compile", ["compile", "compile_repeated_blocks"])
def test_modules_compiled_in_place_before_give_the_same(compile) -> None:
    pipe = build("wan", num_layers=1)
    before = latents(pipe, **ONE_STEP)
    getattr(pipe.transformer, compile)(backend="eager")
    anyflow.accelerate(anyflow.accelerate(pipe))
    assert_same(latents(pipe, **ONE_STEP), before)
    assert_same(latents(anyflow.restore(pipe), **ONE_STEP), before)


@pytest.mark.parametrize(
    "adapters", [None, [*TARGETS, "proj_out", "patch_embedding"]], ids=["plain", "adapters"]
)
@pytest.mark.parametrize("kind", ["anyflow", "causal", "wan-2.2"])
def test_from_pipe_shares_what_was_accelerated(kind, adapters, tmp_path: Path) -> None:
    """Restore each pipeline for itself, while the other still runs."""
    pipe = build(kind)
    if adapters is not None:
        add_adapter(pipe.transformer, adapters)
    before, index = latents(pipe), pipe.config["transformer"]
    anyflow.accelerate(pipe)
    other = type(pipe).from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert transformers(other) == transformers(pipe) and other.config["transformer"] == index
    for both in (pipe, other):
        assert_same(latents(both), before)
    anyflow.restore(other)
    assert torch.equal(latents(other), before)
    assert_same(latents(pipe), before)
    anyflow.restore(pipe)
    assert transformers(pipe) == transformers(other) and torch.equal(latents(pipe), before)


def test_from_pipe_to_another_pipeline_of_wan() -> None:
    """Make a video-to-video pipeline, whose signature wants diffusers' own class."""
    pipe, results = build("wan"), []
    call = {"video": [Image.new("RGB", (48, 32), "red")] * 9, "strength": 0.8, "num_frames": None}
    for step in (None, anyflow.accelerate):
        if step is not None:
            step(pipe)
        other = diffusers.WanVideoToVideoPipeline.from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        results.append(latents(other, **call))
    assert type(other.transformer) is WanTransformer3DModel
    assert_same(results[1], results[0])


@pytest.mark.parametrize("kind", ["anyflow", "causal"])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))], ids=["copy", "pickle"]
)
def test_copies_have_weights_of_their_own_and_can_be_restored(copied, kind) -> None:
    pipe = build(kind)
    before = latents(pipe)
    other = copied(anyflow.accelerate(pipe))
    assert_same(latents(other), before)
    with torch.no_grad():
        other.transformer.proj_out.bias += 1
    changed = latents(other)
    assert (changed - before).abs().max() > 0.1
    assert_same(latents(anyflow.restore(other)), changed)
    assert torch.equal(latents(anyflow.restore(pipe)), before)


@pytest.mark.parametrize(
    "targets", [TARGETS, [*TARGETS, "proj_out", "patch_embedding", "linear_1"]], ids=len
)
@pytest.mark.parametrize("kind", ["anyflow", "causal", "wan"])
def test_adapters_loaded_before(kind, targets) -> None:
    pipe = build(kind)
    plain = latents(pipe)
    add_adapter(pipe.transformer, targets)
    before, names = latents(pipe), set(pipe.transformer.state_dict())
    anyflow.accelerate(pipe)
    assert_same(latents(pipe), before)
    assert set(pipe.transformer.state_dict()) == names and pipe.get_list_adapters() == {
        "transformer": ["style"]
    }
    half = latents(pipe, attention_kwargs={"scale": 0.5})
    pipe.set_adapters(["style"], [0.5])
    assert (before - plain).abs().max() > 1e-2
    assert_same(latents(pipe), half)
    pipe.disable_lora()
    assert_same(latents(pipe), plain)
    pipe.enable_lora()
    pipe.set_adapters(["style"], [1.0])
    anyflow.restore(pipe)
    assert (
        type(getattr(pipe.transformer.proj_out, "base_layer", pipe.transformer.proj_out))
        is nn.Linear
    )
    assert torch.equal(latents(pipe), before)


@pytest.mark.parametrize("kind", ["anyflow", "causal", "wan"])
def test_adapters_loaded_from_a_file_after_and_kept_by_restore(kind, tmp_path: Path) -> None:
    pipe = build(kind)
    plain = latents(pipe)
    add_adapter(pipe.transformer, [*TARGETS, "proj_out"])
    expected = latents(pipe)
    pipe.save_lora_weights(
        tmp_path, get_peft_model_state_dict(pipe.transformer, adapter_name="style")
    )
    pipe.unload_lora_weights()
    anyflow.accelerate(pipe)
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    assert_same(latents(pipe), expected)
    anyflow.restore(pipe)
    assert_same(latents(pipe), expected)
    pipe.unload_lora_weights()
    assert torch.equal(latents(pipe), plain)


def test_adapters_unloaded_in_between_are_gone_after_restore() -> None:
    pipe = build("anyflow")
    plain = latents(pipe)
    add_adapter(pipe.transformer, [*TARGETS, "proj_out"])
    anyflow.accelerate(pipe)
    pipe.unload_lora_weights()
    assert_same(latents(pipe), plain)
    anyflow.restore(pipe)
    assert not any("lora" in name for name in pipe.transformer.state_dict())
    assert torch.equal(latents(pipe), plain)
