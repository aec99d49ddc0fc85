"""Test LoRA files of every origin: merged to what PEFT or fp64 gives, or refused by key."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from lora_layers import build, copy_of, error, one_layer, pair, refused
from peft import LoraConfig
from safetensors.torch import save_file

import anyflow
from anyflow.pipelines.lora import merge_lora

OURS = {  # the original Wan's modules with weights, and ours
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q",
    "blocks.1.self_attn.o": "blocks.1.attn1.to_out.0",
    "blocks.0.cross_attn.k": "blocks.0.attn2.to_k",
    "blocks.1.ffn.0": "blocks.1.ffn.net.0.proj",
    "blocks.0.ffn.2": "blocks.0.ffn.net.2",
    "head.head": "proj_out",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
}
UNDERSCORES = {ord("."): "_"}
# How trainers name a layer, and the two factors.
NAMES: dict[str, tuple[Callable[[str], str], str, str]] = {
    "diffusers": (lambda o: f"transformer.{OURS[o]}", "lora_A.weight", "lora_B.weight"),
    "diffusers, older": (lambda o: f"transformer.{OURS[o]}", "lora.down.weight", "lora.up.weight"),
    "our own names": (lambda o: OURS[o], "lora_A.weight", "lora_B.weight"),
    "kohya, musubi": (lambda o: f"lora_unet_{o.translate(UNDERSCORES)}", "lora_down.weight",
                      "lora_up.weight"),
    "kohya, diffusers": (
        lambda o: f"lora_unet_{OURS[o].translate(UNDERSCORES)}", "lora_down.weight",
        "lora_up.weight"
    ),
    "ComfyUI": (lambda o: f"diffusion_model.{o}", "lora_A.weight", "lora_B.weight"),
    "ComfyUI, down and up": (lambda o: f"diffusion_model.{o}", "lora_down.weight",
                             "lora_up.weight"),
    "all in one": (lambda o: f"model.diffusion_model.{o}", "lora_down.weight", "lora_up.weight"),
    "DiffSynth": (lambda o: o, "lora_A.default.weight", "lora_B.default.weight"),
    "DiffSynth, pipeline": (lambda o: f"pipe.dit.{o}", "lora_A.default.weight",
                            "lora_B.default.weight"),
    "original Wan": (lambda o: o, "lora_down.weight", "lora_up.weight"),
    "compiled": (lambda o: OURS[o].replace("blocks.0.", "blocks.0._orig_mod."), "lora_A.weight",
                 "lora_B.weight"),
    "LyCORIS": (lambda o: f"lycoris_{OURS[o].translate(UNDERSCORES)}", "lora_down.weight",
                "lora_up.weight"),
}  # fmt: skip


@pytest.mark.parametrize("alpha", [None, 2.0])
@pytest.mark.parametrize("origin", NAMES)
def test_names_of_every_trainer(
    origin: str, alpha: float | None, generator: torch.Generator, tmp_path: Path
) -> None:
    """Write a part of the layers, each of another rank, with other differences beside them."""
    name, down, up = NAMES[origin]
    model = build(image_dim=6)
    before, state, expected = copy_of(model), {}, copy_of(model)
    for i, (original, ours) in enumerate(OURS.items()):
        weight, rank, layer = before[f"{ours}.weight"], 1 + i % 5, name(original)
        a, b = pair(tuple(weight.shape), rank, generator)
        state[f"{layer}.{down}"], state[f"{layer}.{up}"] = a, b
        if alpha is not None:
            state[f"{layer}.alpha"] = torch.tensor(alpha)
        scale = 1.0 if alpha is None else alpha / rank
        expected[f"{ours}.weight"] = (weight.double() + scale * (b.double() @ a.double())).float()
        difference = state[f"{layer}.diff_b"] = torch.randn(weight.shape[0], generator=generator)
        expected[f"{ours}.bias"] = before[f"{ours}.bias"] + difference
    save_file(state, tmp_path / "lora.safetensors")
    merge_lora(model, tmp_path / "lora.safetensors")
    assert error(model, expected) < 1e-6 < 0.1 < error(model, before)


@pytest.mark.parametrize("origin", ["ComfyUI", "kohya, musubi", "original Wan"])
def test_differences_of_norms_modulations_and_convolutions(
    origin: str, generator: torch.Generator, tmp_path: Path
) -> None:
    model = build()
    before, expected, state = copy_of(model), copy_of(model), {}

    def rename(original: str) -> str:
        return {"ComfyUI": f"diffusion_model.{original}", "original Wan": original}.get(
            origin, f"lora_unet_{original.translate(UNDERSCORES)}"
        )

    for key, ours in {
        "blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
        "blocks.1.norm3.diff": "blocks.1.norm2.weight",
        "blocks.1.norm3.diff_b": "blocks.1.norm2.bias",
        "patch_embedding.diff": "patch_embedding.weight",
        "head.head.diff": "proj_out.weight",
        "blocks.0.diff_m": "blocks.0.scale_shift_table",
        "blocks.1.modulation.diff": "blocks.1.scale_shift_table",
        "head.diff_m": "scale_shift_table",
    }.items():
        layer, _, role = key.rpartition(".")
        difference = torch.randn(before[ours].shape, generator=generator)
        state[f"{rename(layer)}.{role}"] = difference
        expected[ours] = before[ours] + 0.5 * difference
    weight = before["patch_embedding.weight"]
    save_file(state, tmp_path / "lora.safetensors")
    merge_lora(model, tmp_path / "lora.safetensors", 0.5)
    assert error(model, expected) < 1e-6 < 0.1 < error(model, before)

    a, b = pair(tuple(weight.shape), 3, generator)
    layer = rename("patch_embedding")
    save_file(
        {f"{layer}.lora_down.weight": a, f"{layer}.lora_up.weight": b},
        tmp_path / "lora.safetensors",
    )
    merge_lora(model, tmp_path / "lora.safetensors")
    expected["patch_embedding.weight"] += (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)
    assert error(model, expected) < 1e-6


def test_two_keys_for_one_tensor_are_refused(generator: torch.Generator, tmp_path: Path) -> None:
    model, file = build(), tmp_path / "lora.safetensors"
    a, b = pair((24, 24), 2, generator)
    sound = {
        "transformer.blocks.0.attn1.to_q.lora_A.weight": a,
        "transformer.blocks.0.attn1.to_q.lora_B.weight": b,
    }
    for more in (
        {"diffusion_model.blocks.0.self_attn.q.lora_down.weight": a.clone()},
        {"lora_unet_blocks_0_self_attn_q.diff": torch.zeros(24, 24)},
        {"blocks.0.attn1.to_q.lora_A.default.weight": a.clone()},
    ):
        save_file(sound | more, file)
        refused(model, file, *more)
    both = {
        "blocks.0.attn1.to_q.diff_b": torch.zeros(24),
        "blocks.0.attn1.to_q.lora_B.bias": torch.zeros(24),
    }
    save_file(sound | both, file)
    refused(model, file, *both)


@pytest.mark.parametrize(
    "key",
    [
        "transformer.blocks.0.attn1.to_q.hada_w1_a", "lora_unet_blocks_0_self_attn_q.lokr_w1",
        "lora_unet_blocks_0_self_attn_q.oft_blocks",
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        "text_encoder.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight",
        "transformer_2.blocks.0.attn1.to_q.alpha",
        "diffusion_model.blocks.0.cross_attn.k_img.lora_A.weight",
        "diffusion_model.blocks.7.self_attn.q.diff_b",
        "diffusion_model.img_emb.proj.1.diff_b", "transformer.blocks.0.attn1.to_k.alpha",
        "blocks.0.attn1.to_k.bias",
        "transformer.blocks.0.attn1.to_qkv.lora_A.weight", "blocks.0.attn1.to_k.lora_embedding_A",
        "step",
        "blocks.0.attn1.to_q.lora_A.bias", "blocks.0.attn1.to_k.dora_scale",
        "blocks.0.attn1.norm_q.diff_b",
        "diffusion_model.blocks.0.self_attn.q.reshape_weight",
        "diffusion_model.blocks.0.self_attn.q.set_weight",
        "diffusion_model.blocks.0.self_attn.q.scale_weight",
        "lora_unet_blocks_0_self_attn_q.lora_mid.weight",
    ],
)  # fmt: skip
def test_no_tensor_is_left_out(key: str, generator: torch.Generator, tmp_path: Path) -> None:
    model, file = build(), tmp_path / "lora.safetensors"
    a, b = pair((24, 24), 2, generator)
    layer = "transformer.blocks.1.attn1.to_q"
    save_file(
        {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b, key: torch.zeros(24)}, file
    )
    refused(model, file, key, str(file))


@pytest.mark.parametrize(("shape", "dim"), [((24, 1), 1), ((1, 24), 0)])
def test_magnitudes_of_lycoris(
    shape: tuple[int, int], dim: int, generator: torch.Generator, tmp_path: Path
) -> None:
    """Scale by outputs, or by inputs as older files do."""
    model, file = build(), tmp_path / "lora.safetensors"
    a, b = pair((24, 24), 4, generator)
    magnitude = torch.rand(shape, generator=generator)
    layer = "lora_unet_blocks_0_self_attn_q"
    state = {
        f"{layer}.lora_down.weight": a,
        f"{layer}.lora_up.weight": b,
        f"{layer}.dora_scale": magnitude,
    }
    save_file(state | {f"{layer}.alpha": torch.tensor(2.0)}, file)
    refused(model, file, f"{layer}.dora_scale", scale=0.5)
    expected = copy_of(model)
    v = expected["blocks.0.attn1.to_q.weight"].double() + 0.5 * (b.double() @ a.double())
    expected["blocks.0.attn1.to_q.weight"] = magnitude * v / v.norm(dim=dim, keepdim=True)
    merge_lora(model, file)
    assert error(model, expected) < 1e-6


@pytest.mark.parametrize(
    "stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_only_rounding_is_to_the_weights_dtype(
    dtype: torch.dtype, stored: torch.dtype, generator: torch.Generator, tmp_path: Path
) -> None:
    model = build(dtype)
    before = copy_of(model)
    a, b = (t.to(stored) for t in pair((24, 24), 4, generator))
    layer = "blocks.0.attn1.to_q"
    save_file(
        {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}, tmp_path / "lora.safetensors"
    )
    merge_lora(model, tmp_path / "lora.safetensors", 0.7)
    exact = before[f"{layer}.weight"].double() + 0.7 * (b.double() @ a.double())
    merged = model.state_dict()[f"{layer}.weight"]
    # Sums of four in another order: fp64 differs in the last bits, so the result in at most one,
    # and seldom.
    assert merged.dtype == dtype and (merged == exact.to(dtype)).float().mean() > 0.99
    assert ((merged - exact).abs() <= torch.finfo(dtype).eps * exact.abs()).all()


def test_several_add_up_and_nothing_is_left_behind(
    generator: torch.Generator, tmp_path: Path
) -> None:
    model, layer = build(), "blocks.0.attn1.to_q"
    before, expected = copy_of(model), copy_of(model)
    for i, scale in enumerate((0.5, -2, 0)):
        a, b = pair((24, 24), i + 1, generator)
        save_file(
            {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b},
            tmp_path / f"{i}.safetensors",
        )
        merge_lora(model, tmp_path / f"{i}.safetensors", scale)
        expected[f"{layer}.weight"] += scale * b @ a
    assert list(model.state_dict()) == list(before) and error(model, expected) < 1e-6
    assert not getattr(model, "peft_config", {}) and all(
        p.requires_grad for p in model.parameters()
    )


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", None, True, 10**400])
def test_a_scale_is_a_finite_number(scale: Any, tmp_path: Path) -> None:
    refused(build(), tmp_path, "scale must be a finite number", scale=scale)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_numbers_that_are_not_finite_change_nothing(
    value: float, generator: torch.Generator, tmp_path: Path
) -> None:
    """Spoil the last layer, before or after merging, when the others could be merged."""
    model, file, state = build(), tmp_path / "lora.safetensors", {}
    for layer in ("blocks.0.attn1.to_q", "blocks.1.ffn.net.2"):
        a, b = pair(tuple(model.get_submodule(layer).weight.shape), 2, generator)
        state |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
    state["blocks.1.ffn.net.2.lora_B.weight"][0, 0] = value
    state["blocks.1.ffn.net.2.lora_A.weight"][0] += 5
    save_file(state, file)
    refused(
        model,
        file,
        "finite" if value == 3e38 else "NaN or infinity",
        "blocks.1.ffn.net.2.lora_B.weight",
    )


def test_weights_in_use_elsewhere_stay_where_they_are(
    generator: torch.Generator, tmp_path: Path
) -> None:
    """Hold the very tensors, as a pinned copy, a graph or an optimizer does."""
    file, added = one_layer(tmp_path, generator)
    with torch.inference_mode():
        made_there = build()
    for model in (build(), made_there, torch.compile(build(), backend="eager")):
        weight = model.blocks[0].attn1.to_q.weight
        place, before = weight.data_ptr(), weight.detach().clone()
        with torch.inference_mode(model is not made_there):
            merge_lora(model, file)
        assert weight is model.blocks[0].attn1.to_q.weight and weight.data_ptr() == place
        torch.testing.assert_close(weight.detach(), before + added, rtol=0, atol=1e-6)


def test_an_accelerated_pipeline_with_an_adapter(
    model: Path, generator: torch.Generator, tmp_path: Path
) -> None:
    """Merge into diffusers' own layers, under the adapter that is loaded."""
    file, added = one_layer(tmp_path, generator)
    pipe = diffusers.AnyFlowPipeline.from_pretrained(model)
    pipe.transformer.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
    )
    before = copy_of(pipe.transformer)
    anyflow.accelerate(pipe)
    merge_lora(pipe.transformer, file)
    anyflow.restore(pipe)
    before["blocks.0.attn1.to_q.base_layer.weight"] += added
    assert error(pipe.transformer, before) < 1e-6


def test_weights_that_cannot_be_changed(generator: torch.Generator, tmp_path: Path) -> None:
    file, _ = one_layer(tmp_path, generator)
    for wrong, message in (
        (build().to("meta"), "offloaded"),
        (build().to(torch.float8_e4m3fn), "cannot be changed"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_lora(wrong, file)
