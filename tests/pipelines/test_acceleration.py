"""Test accelerate() and restore() on diffusers' own pipelines, with real (tiny) parts."""

import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from tiny_diffusers import TINY, accelerated, assert_same, build, latents, randomized
from torch import Tensor

import anyflow
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.models.diffusers_causal import DiffusersFARTransformer3DModel
from anyflow.models.wan import WanTransformer3DModel

KINDS = ["anyflow", "causal", "wan", "wan-2.2", "wan-5b"]
OURS = {"anyflow": AnyFlowTransformer3DModel, "causal": DiffusersFARTransformer3DModel}


@pytest.mark.parametrize("kind", KINDS)
def test_same_latents_in_place_and_bit_identical_after_restore(kind) -> None:
    pipe = build(kind)
    theirs, before = pipe.transformer, latents(pipe)
    assert anyflow.accelerate(pipe) is pipe
    assert type(pipe.transformer) is OURS.get(kind, WanTransformer3DModel)
    assert_same(latents(pipe), before)
    assert anyflow.restore(pipe) is pipe
    assert pipe.transformer is theirs
    assert torch.equal(latents(pipe), before)


def test_both_transformers_of_wan_2_2_are_replaced_and_matter() -> None:
    pipe = build("wan-2.2")
    before = latents(pipe)
    anyflow.accelerate(pipe)
    assert all(type(t) is WanTransformer3DModel for t in (pipe.transformer, pipe.transformer_2))
    with torch.no_grad():
        pipe.transformer_2.proj_out.bias += 1
    assert (latents(pipe) - before).abs().max() > 0.1
    anyflow.restore(pipe)
    assert all(
        type(t) is diffusers.WanTransformer3DModel for t in (pipe.transformer, pipe.transformer_2)
    )


SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "t-r": {"deltatime_type": "t-r", "gate_value": 0.6},
    "no-norm": {"cross_attn_norm": False},
    "other-channels": {"in_channels": 4, "out_channels": 6, "patch_size": (1, 2, 2)},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize(
    "cls", [diffusers.AnyFlowTransformer3DModel, diffusers.WanTransformer3DModel]
)
def test_bare_transformer(cls, settings, generator) -> None:
    if cls is diffusers.WanTransformer3DModel and "gate_value" in settings:
        pytest.skip("Wan has no second timestep")
    theirs = randomized(cls(**(TINY | settings)))
    ours = anyflow.accelerate(theirs)
    shape = (2, 3, theirs.config.in_channels, 4, 6)
    x, text = torch.randn(shape, generator=generator), torch.randn(2, 5, 16, generator=generator)
    t = torch.tensor([[900.0], [300.0]]).expand(2, 3)
    wan = cls is diffusers.WanTransformer3DModel
    arguments = (x.transpose(1, 2), t[:, 0], text) if wan else (x, t, t / 2, text)
    with torch.no_grad():
        expected = theirs(*arguments).sample
        assert_same(ours(*arguments).sample, expected)
        assert torch.equal(ours(*arguments, return_dict=False)[0], ours(*arguments).sample)
        assert anyflow.restore(ours) is theirs
        assert torch.equal(theirs(*arguments).sample, expected)


def test_times_of_tokens_may_differ_between_frames_only(generator) -> None:
    """Run Wan 2.2's 5B model from an image: the first frame is clean."""
    theirs = randomized(diffusers.WanTransformer3DModel(**TINY))
    ours = anyflow.accelerate(theirs)
    x, text = (
        torch.randn(1, 16, 3, 4, 6, generator=generator),
        torch.randn(1, 5, 16, generator=generator),
    )
    t = torch.tensor([0.0, 700.0, 700.0]).repeat_interleave(6)[None]
    with torch.no_grad():
        assert_same(ours(x, t, text).sample, theirs(x, t, text).sample)
        t[0, 1] = 700.0
        with pytest.raises(ValueError, match="tokens of a frame must have one time"):
            ours(x, t, text)
        with pytest.raises(ValueError, match=r"\[B, L=18\], got \(1, 17\)"):
            ours(x, t[:, 1:], text)


@pytest.mark.parametrize("kind", ["anyflow", "causal", "wan"])
def test_weights_are_shared_both_ways_and_not_copied(kind) -> None:
    theirs = build(kind).transformer
    ours = accelerated(theirs)
    a, b = dict(theirs.named_parameters()), dict(ours.named_parameters())
    assert a.keys() == b.keys() and all(a[name] is b[name] for name in a)
    storages = {
        p.untyped_storage().data_ptr() for network in (theirs, ours) for p in network.parameters()
    }
    assert len(storages) == len(a)
    assert not any(tensor.is_meta for tensor in (*ours.parameters(), *ours.buffers()))
    with torch.no_grad():
        ours.proj_out.bias.fill_(3.0)
        theirs.blocks[0].attn1.norm_q.weight.fill_(4.0)
    assert theirs.proj_out.bias.eq(3).all() and ours.blocks[0].attn1.norm_q.weight.eq(4).all()


def test_what_replaces_a_dropped_transformer_lives_on() -> None:
    pipe = anyflow.accelerate(build("anyflow"))
    gc.collect()
    assert torch.isfinite(latents(pipe)).all()


def test_dtypes_are_kept_and_the_gate_stays_exact() -> None:
    theirs = build("anyflow", gate_value=0.6).transformer.to(torch.bfloat16)
    theirs.condition_embedder.time_embedder.float()
    ours = anyflow.accelerate(theirs)
    assert {n: p.dtype for n, p in ours.named_parameters()} == {
        n: p.dtype for n, p in theirs.named_parameters()
    }
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert ours.condition_embedder.delta_emb_gate.item() == pytest.approx(0.6, abs=1e-7)


@pytest.mark.parametrize("kind", ["anyflow", "causal", "wan"])
def test_moving_the_pipeline_moves_both(kind) -> None:
    pipe = build(kind)
    theirs, expected = pipe.transformer, latents(pipe)
    anyflow.accelerate(pipe).to(torch.float64)
    assert pipe.transformer.dtype == theirs.dtype == torch.float64
    torch.testing.assert_close(latents(pipe), expected, rtol=0, atol=1e-4, check_dtype=False)
    anyflow.restore(pipe.to(torch.float32))
    assert torch.equal(latents(pipe), expected)


def test_training_mode_gradients_and_checkpointing_are_kept() -> None:
    theirs = build("anyflow").transformer.train().requires_grad_(False)
    theirs.blocks.requires_grad_(True)
    theirs.enable_gradient_checkpointing()
    ours = anyflow.accelerate(theirs)
    assert ours.training and ours.is_gradient_checkpointing
    assert not any(
        module.training for module in anyflow.accelerate(build("wan").transformer).modules()
    )
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == {
        n for n, p in theirs.named_parameters() if p.requires_grad
    }


def test_global_generator_is_not_touched() -> None:
    theirs = build("wan").transformer
    state = torch.get_rng_state()
    anyflow.restore(anyflow.accelerate(theirs))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["anyflow", "causal", "wan"])
def test_a_second_accelerate_changes_nothing(kind) -> None:
    pipe = anyflow.accelerate(build(kind))
    ours = pipe.transformer
    assert anyflow.accelerate(pipe).transformer is ours
    assert anyflow.accelerate(ours) is ours
    anyflow.restore(pipe)
    with pytest.raises(ValueError, match="was not accelerated"):
        anyflow.restore(pipe)
    with pytest.raises(ValueError, match="not made by accelerate"):
        anyflow.restore(pipe.transformer)


def test_our_classes_equal_diffusers_of_their_name_only() -> None:
    pairs = [(AnyFlowTransformer3DModel, diffusers.AnyFlowTransformer3DModel)]
    pairs.append((WanTransformer3DModel, diffusers.WanTransformer3DModel))
    pairs.append((DiffusersFARTransformer3DModel, diffusers.AnyFlowFARTransformer3DModel))
    for ours, theirs in pairs:
        assert (
            ours in (theirs,) and ours == theirs and theirs == ours and hash(ours) != hash(theirs)
        )
    assert AnyFlowTransformer3DModel not in (
        WanTransformer3DModel,
        diffusers.WanTransformer3DModel,
        type,
        int,
        3,
    )


def test_a_transformer_replaced_afterwards_is_accelerated_too() -> None:
    pipe = anyflow.accelerate(build("anyflow"))
    pipe.transformer = build("anyflow").transformer
    with pytest.raises(ValueError, match="was not accelerated"):
        anyflow.restore(pipe)
    before = latents(pipe)
    assert_same(latents(anyflow.accelerate(pipe)), before)


@pytest.mark.parametrize("kind", ["anyflow", "causal", "wan"])
def test_callback_sees_every_step_and_may_replace_latents(kind) -> None:
    seen: list[float] = []

    def callback(
        pipe: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        seen.append(float(timestep))
        return {"latents": 0.9 * tensors["latents"]}

    pipe = build(kind)
    expected = latents(pipe, callback_on_step_end=callback)
    assert_same(latents(anyflow.accelerate(pipe), callback_on_step_end=callback), expected)
    evaluations = 6 if kind == "causal" else 4
    assert len(seen) == 2 * evaluations and seen[:evaluations] == seen[evaluations:]


@pytest.mark.parametrize("kind", ["anyflow", "causal", "wan"])
def test_saved_pipeline_loads_in_diffusers_alone(kind, tmp_path: Path) -> None:
    pipe = build(kind)
    expected = latents(pipe)
    anyflow.accelerate(pipe).save_pretrained(tmp_path / "pipe")
    again = type(pipe).from_pretrained(tmp_path / "pipe", tokenizer=None)
    again.set_progress_bar_config(disable=True)
    assert type(again.transformer).__module__.startswith("diffusers.")
    assert torch.equal(latents(again), expected)
    files = (
        tmp_path / "pipe" / "model_index.json",
        tmp_path / "pipe" / "transformer" / "config.json",
    )
    index, config = (json.loads(file.read_text()) for file in files)
    assert (
        index["transformer"]
        == ["diffusers", config["_class_name"]]
        == ["diffusers", type(again.transformer).__name__]
    )
    anyflow.restore(pipe)
    assert pipe.config["transformer"] == ("diffusers", config["_class_name"])


def test_our_wan_class_loads_what_diffusers_saved(tmp_path: Path) -> None:
    pipe = build("wan")
    expected = latents(pipe)
    pipe.transformer.save_pretrained(tmp_path)
    pipe.transformer = WanTransformer3DModel.from_pretrained(tmp_path)
    assert_same(latents(pipe), expected)


def test_accelerate_is_a_function_and_importing_anyflow_loads_no_diffusers() -> None:
    code = "import sys, anyflow; print('diffusers' in sys.modules, 'accelerate' in dir(anyflow))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).split() == [
        "False",
        "True",
    ]
    import anyflow.pipelines.acceleration

    assert (
        anyflow.accelerate is anyflow.pipelines.acceleration.accelerate
        and anyflow.restore is anyflow.pipelines.acceleration.restore
    )
