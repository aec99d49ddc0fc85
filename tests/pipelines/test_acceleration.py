"""accelerate() and restore() on diffusers' own pipelines, with real (tiny) parts."""

import copy
import gc
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from diffusers import AnyFlowPipeline, AutoencoderKLWan, DiffusionPipeline, ModelMixin, WanPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

import anyflow
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.models.wan import WanTransformer3DModel

TOLERANCE = 1e-5
TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
KINDS = ["anyflow", "wan", "wan-2.2", "wan-5b"]


def randomized(network: nn.Module) -> nn.Module:
    """Norm weights that start at 1 and biases at 0 would hide a missing one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def build(kind: str, **settings: Any) -> DiffusionPipeline:
    """A pipeline of diffusers without a tokenizer: prompts are given as embeddings."""
    text = UMT5Config(vocab_size=9, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    sizes = {"z_dim": 16, "dim_mult": [1, 1, 1, 1], "temperal_downsample": [False, True, True]}
    parts: dict[str, Any] = {
        "tokenizer": None,
        "text_encoder": UMT5EncoderModel(text).eval(),
        "vae": AutoencoderKLWan(base_dim=4, num_res_blocks=1, **sizes).eval(),
    }
    if kind == "anyflow":
        parts["transformer"] = randomized(diffusers.AnyFlowTransformer3DModel(**(TINY | settings)))
        pipe = AnyFlowPipeline(
            **parts, scheduler=diffusers.FlowMapEulerDiscreteScheduler(shift=5.0)
        )
    else:
        parts["transformer"] = randomized(diffusers.WanTransformer3DModel(**(TINY | settings)))
        if kind == "wan-2.2":
            parts["transformer_2"] = randomized(diffusers.WanTransformer3DModel(**TINY))
            parts["boundary_ratio"] = 0.875
        scheduler = diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        )
        pipe = WanPipeline(**parts, scheduler=scheduler, expand_timesteps=kind == "wan-5b")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: DiffusionPipeline, **arguments: Any) -> Tensor:
    """``[2, 16, 3, 4, 6]`` after four guided steps, from fixed noise and prompts."""
    generator = torch.Generator().manual_seed(7)
    prompt, negative = torch.randn(2, 2, 5, 16, generator=generator)
    settings: dict[str, Any] = {
        "prompt_embeds": prompt,
        "negative_prompt_embeds": negative,
        "guidance_scale": 3.0,
        "num_inference_steps": 4,
        "height": 32,
        "width": 48,
        "num_frames": 9,
        "generator": generator,
        "output_type": "latent",
    }
    settings |= arguments
    return pipe(**{name: value for name, value in settings.items() if value is not None}).frames


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def add_adapter(transformer: ModelMixin, targets: list[str] = TARGETS, name: str = "style") -> None:
    """Adapters that change the result, by PEFT as diffusers adds them."""
    config = LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
    transformer.add_adapter(config, adapter_name=name)


@pytest.mark.parametrize("kind", KINDS)
def test_same_latents_in_place_and_bit_identical_after_restore(kind) -> None:
    pipe = build(kind)
    theirs, before = pipe.transformer, latents(pipe)
    assert anyflow.accelerate(pipe) is pipe
    assert type(pipe.transformer) is (
        AnyFlowTransformer3DModel if kind == "anyflow" else WanTransformer3DModel
    )
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
    """Wan 2.2's 5B model, image-to-video: the first frame is clean."""
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


@pytest.mark.parametrize("kind", ["anyflow", "wan"])
def test_weights_are_shared_both_ways_and_not_copied(kind) -> None:
    theirs = build(kind).transformer
    ours = anyflow.accelerate(theirs)
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


@pytest.mark.parametrize("kind", ["anyflow", "wan"])
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


def test_adapters_around_our_own_layers_in_bf16(generator) -> None:
    """The projection out runs in fp32 there, which a plain linear layer under an adapter would
    refuse.
    """
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


def test_global_generator_is_not_touched() -> None:
    theirs = build("wan").transformer
    state = torch.get_rng_state()
    anyflow.restore(anyflow.accelerate(theirs))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["anyflow", "wan"])
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


ONE_STEP: dict[str, Any] = {
    "num_inference_steps": 1,
    "guidance_scale": 1.0,
    "negative_prompt_embeds": None,
}


def test_torch_compile_between_two_calls_and_restore_with_adapters() -> None:
    pipe = build("anyflow", num_layers=1)
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
@pytest.mark.parametrize("kind", ["anyflow", "wan-2.2"])
def test_from_pipe_shares_what_was_accelerated(kind, adapters, tmp_path: Path) -> None:
    """Each pipeline is restored for itself, and the other goes on."""
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


def test_our_classes_equal_diffusers_of_their_name_only() -> None:
    pairs = [(AnyFlowTransformer3DModel, diffusers.AnyFlowTransformer3DModel)]
    pairs.append((WanTransformer3DModel, diffusers.WanTransformer3DModel))
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


def test_from_pipe_to_another_pipeline_of_wan() -> None:
    """Video-to-video, whose signature wants diffusers' own class."""
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


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))], ids=["copy", "pickle"]
)
def test_copies_have_weights_of_their_own_and_can_be_restored(copied) -> None:
    pipe = build("anyflow")
    before = latents(pipe)
    other = copied(anyflow.accelerate(pipe))
    assert_same(latents(other), before)
    with torch.no_grad():
        other.transformer.proj_out.bias += 1
    changed = latents(other)
    assert (changed - before).abs().max() > 0.1
    assert_same(latents(anyflow.restore(other)), changed)
    assert torch.equal(latents(anyflow.restore(pipe)), before)


def test_a_transformer_replaced_afterwards_is_accelerated_too() -> None:
    pipe = anyflow.accelerate(build("anyflow"))
    pipe.transformer = build("anyflow").transformer
    with pytest.raises(ValueError, match="was not accelerated"):
        anyflow.restore(pipe)
    before = latents(pipe)
    assert_same(latents(anyflow.accelerate(pipe)), before)


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_restore_is_refused_while_weights_are_offloaded_by_groups(level) -> None:
    pipe = anyflow.accelerate(build("anyflow"))
    expected, cpu = latents(pipe), torch.device("cpu")
    blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
    pipe.transformer.enable_group_offload(cpu, cpu, level, **blocks)
    ours = pipe.transformer
    with pytest.raises(ValueError, match="restore: the transformer has a hook of diffusers"):
        anyflow.restore(pipe)
    assert anyflow.accelerate(pipe).transformer is ours
    assert torch.equal(latents(pipe), expected)


def test_restore_is_refused_where_another_pipeline_offloads() -> None:
    pipe = build("anyflow")
    pipe.enable_model_cpu_offload(device="cpu")
    other = type(pipe).from_pipe(anyflow.accelerate(pipe))
    with pytest.raises(
        ValueError, match="restore: the transformer has a hook of the package accelerate"
    ):
        anyflow.restore(other)
    anyflow.restore(pipe)


@pytest.mark.parametrize(
    "targets", [TARGETS, [*TARGETS, "proj_out", "patch_embedding", "linear_1"]], ids=len
)
@pytest.mark.parametrize("kind", ["anyflow", "wan"])
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


@pytest.mark.parametrize("kind", ["anyflow", "wan"])
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


def transformers(pipe: DiffusionPipeline) -> list[nn.Module]:
    return [
        pipe.transformer,
        *([pipe.transformer_2] if hasattr(pipe, "transformer_2") and pipe.transformer_2 else []),
    ]


@pytest.mark.parametrize("kind", ["anyflow", "wan-2.2"])
@pytest.mark.parametrize("first", ["offload", "accelerate"])
def test_model_offloading(kind, first) -> None:
    """With the CPU as its device, which takes the same hooks."""
    pipe = build(kind)
    expected = latents(pipe)
    steps: list[Callable[[], object]] = [
        lambda: pipe.enable_model_cpu_offload(device="cpu"),
        lambda: anyflow.accelerate(pipe),
    ]
    for step in steps if first == "offload" else reversed(steps):
        step()
    for _ in range(2):  # the pipeline puts its hooks on again after each call
        assert all(
            isinstance(t, AnyFlowTransformer3DModel) and hasattr(t, "_hf_hook")
            for t in transformers(pipe)
        )
        assert len(pipe._all_hooks) == 2 + len(transformers(pipe))
        assert_same(latents(pipe), expected)
    theirs = [t._accelerated_from.transformer for t in transformers(pipe)]
    assert not any(hasattr(t, "_hf_hook") for t in theirs)
    anyflow.restore(pipe)
    assert transformers(pipe) == theirs and all(hasattr(t, "_hf_hook") for t in theirs)
    assert torch.equal(latents(pipe), expected)


@pytest.mark.parametrize("kind", ["anyflow", "wan-2.2"])
def test_sequential_offloading_is_put_on_again(kind) -> None:
    """Not run under it: on a CPU diffusers asks for "cpu:0", which accelerate 1.15 fails on with
    any model.
    """
    pipe = build(kind)
    expected = latents(pipe)
    storage = pipe.transformer.proj_out.weight.data_ptr()
    pipe.enable_sequential_cpu_offload(device="cpu")
    for step in (anyflow.accelerate, anyflow.restore):
        step(pipe)
        for transformer in transformers(pipe):
            assert isinstance(transformer, AnyFlowTransformer3DModel) == (
                step is anyflow.accelerate
            )
            assert all(p.is_meta for p in transformer.parameters())
            assert all(
                hasattr(m, "_hf_hook")
                for m in transformer.modules()
                if [*m.parameters(recurse=False)]
            )
    pipe.remove_all_hooks()
    assert pipe.transformer.proj_out.weight.data_ptr() == storage
    assert torch.equal(latents(pipe), expected)
    pipe.enable_sequential_cpu_offload(device="cpu")
    anyflow.accelerate(pipe).remove_all_hooks()
    assert_same(latents(pipe), expected)


@pytest.mark.parametrize("kind", ["anyflow", "wan"])
def test_ours_runs_under_sequential_offloading(kind) -> None:
    pipe = anyflow.accelerate(build(kind))
    expected = latents(pipe)
    cpu_offload(pipe.transformer, torch.device("cpu"), offload_buffers=True)
    assert all(p.is_meta for p in pipe.transformer.parameters())
    assert torch.equal(latents(pipe), expected)
    assert all(p.is_meta for p in pipe.transformer.parameters())


def test_offloading_stays_on_when_a_pipeline_is_refused() -> None:
    pipe = build("wan")
    pipe.transformer = randomized(diffusers.WanTransformer3DModel(**TINY, added_kv_proj_dim=24))
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match="added_kv_proj_dim"):
        anyflow.accelerate(pipe)
    assert (
        hasattr(pipe.transformer, "_hf_hook")
        and type(pipe.transformer) is diffusers.WanTransformer3DModel
    )


@pytest.mark.parametrize("kind", ["anyflow", "wan"])
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
    assert len(seen) == 8 and seen[:4] == seen[4:]


@pytest.mark.parametrize("kind", ["anyflow", "wan"])
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


def refused(change: Callable[[nn.Module], object], **settings: Any) -> nn.Module:
    transformer = diffusers.WanTransformer3DModel(**(TINY | settings))
    change(transformer)
    return transformer


class OtherProcessor:
    """Whatever it does, ours would not."""


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "image-attention": (lambda: refused(lambda t: None, added_kv_proj_dim=24), ValueError,
                        "added_kv_proj_dim=24"),
    "image-positions": (
        lambda: refused(lambda t: None, image_dim=8, pos_embed_seq_len=3), ValueError,
        "pos_embed_seq_len=3"
    ),
    "fused": (lambda: refused(lambda t: t.fuse_qkv_projections()), ValueError, "attn1 has fused "
                                                                               "projections"),
    "processor": (
        lambda: refused(lambda t: t.blocks[1].attn2.set_processor(OtherProcessor())),
        ValueError,
        "blocks.1.attn2 has the attention processor OtherProcessor",
    ),
    "compiled": (
        lambda: torch.compile(refused(lambda t: None)), ValueError, "compiled by torch.compile; "
                                                                    "accelerate first"
    ),
    "offloaded": (lambda: refused(lambda t: cpu_offload(t, "cpu")), ValueError, "the transformer "
                                                                                "has a hook"),
    "cache": (
        lambda: refused(lambda t: t.enable_cache(diffusers.FirstBlockCacheConfig())), ValueError,
        "a hook of diffusers"
    ),
    "forward-hook": (
        lambda: refused(lambda t: t.norm_out.register_forward_hook(lambda *_: None)),
        ValueError,
        "norm_out has a forward hook",
    ),
    "parameter": (
        lambda: refused(lambda t: t.blocks[0].register_parameter("more",
                                                                 nn.Parameter(torch.ones(1)))),
        ValueError,
        "blocks.0.more",
    ),
    "linear": (lambda: nn.Linear(2, 2), TypeError, "Linear cannot be replaced; supported are"),
    "no-module": (lambda: "path/to/model", TypeError, "str cannot be replaced"),
    "causal": (
        lambda: diffusers.AnyFlowFARTransformer3DModel(**TINY), TypeError,
        "AnyFlowFARTransformer3DModel cannot be"
    ),
    "no-transformer": (
        lambda: diffusers.DDPMPipeline(diffusers.UNet2DModel(8, block_out_channels=(32, 32),
                                                             down_block_types=(
            "DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D")),
            diffusers.DDPMScheduler()),
        TypeError,
        "DDPMPipeline has no transformer",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(make, error, message) -> None:
    with pytest.raises(error, match=message):
        anyflow.accelerate(make())


def test_layers_with_hooks_of_their_own_keep_them() -> None:
    pipe = build("anyflow")
    pipe.transformer.blocks[0].attn1.to_q.register_forward_hook(
        lambda module, inputs, output: 0.5 * output
    )
    expected = latents(pipe)
    assert_same(latents(anyflow.accelerate(pipe)), expected)


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
