"""Test how a pipeline is loaded and run: memory, dtype, compilation, transformers, LoRA."""

import shutil
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from tiny_calls import CALL, GUIDED, PROMPTS, TOLERANCE, steps_of_ours, steps_of_peer

from anyflow.pipelines import AnyFlowPipeline


def test_low_memory_is_bit_for_bit_the_same_and_keeps_no_text_encoder(model, pipe) -> None:
    low = AnyFlowPipeline.from_pretrained(model, dtype=torch.float32, device="cpu", memory="low")
    assert (
        not isinstance(low._transformer, torch.nn.Module)
        and low.vae.use_tiling
        and low.vae.use_slicing
    )
    for call in ({}, {**GUIDED, "image": Image.new("RGB", (32, 16), "red")}):
        fast = pipe(PROMPTS, **CALL, **call, seed=1, output_type="pt").frames
        assert torch.equal(low(PROMPTS, **CALL, **call, seed=1, output_type="pt").frames, fast)
        assert low.text_encoder is None and pipe.text_encoder is not None
        assert isinstance(low._transformer, torch.nn.Module)


def test_low_memory_encodes_all_prompts_before_the_transformer_is_loaded(model) -> None:
    low = AnyFlowPipeline.from_pretrained(model, dtype=torch.float32, device="cpu", memory="low")
    assert len(low.encode_prompts(PROMPTS, 12)) == 2
    assert not isinstance(low._transformer, torch.nn.Module)


def test_bf16_stays_near_fp32_and_has_fp32_latents(model, pipe, noise) -> None:
    half = AnyFlowPipeline.from_pretrained(model, device="cpu")
    assert (
        half.transformer.patch_embedding.weight.dtype == torch.bfloat16
        and half.vae.dtype == torch.float32
    )
    call = {**CALL, "prompt": PROMPTS, "latents": noise, "output_type": "latent"}
    actual, expected = half(**call).frames, pipe(**call).frames
    assert actual.dtype == torch.float32
    assert (actual - expected).norm() < 0.05 * (expected - noise).norm()


@pytest.mark.slow
def test_compiled_blocks_give_the_same(model, pipe, noise) -> None:
    compiled = AnyFlowPipeline.from_pretrained(
        model, dtype=torch.float32, device="cpu", compile=True
    )
    call = {
        **CALL,
        "prompt": PROMPTS,
        "latents": noise,
        "output_type": "latent",
        "num_inference_steps": 2,
    }
    torch.testing.assert_close(compiled(**call).frames, pipe(**call).frames, rtol=0, atol=TOLERANCE)


def test_transformer_in_place_of_the_folders_own(model, pipe, noise, tmp_path: Path) -> None:
    """Give a model, or a folder with its own scheduler, as training leaves it."""
    call = {**CALL, "prompt": PROMPTS, "latents": noise, "output_type": "latent"}
    other = diffusers.AnyFlowTransformer3DModel.from_pretrained(model, subfolder="transformer")
    with torch.no_grad():
        other.proj_out.weight.mul_(2)
    other.save_pretrained(tmp_path / "transformer")
    pipe.scheduler.from_config(pipe.scheduler.config, shift=2.0).save_pretrained(
        tmp_path / "scheduler"
    )
    by_folder = AnyFlowPipeline.from_pretrained(
        model, dtype=torch.float32, device="cpu", transformer=tmp_path
    )
    assert by_folder.scheduler.config.shift == 2.0
    by_model = AnyFlowPipeline.from_pretrained(
        model, dtype=torch.float32, device="cpu", transformer=by_folder.transformer, memory="low"
    )
    assert by_model.scheduler.config.shift == 5.0
    by_model.scheduler = by_folder.scheduler
    assert torch.equal(by_folder(**call).frames, by_model(**call).frames)
    assert not torch.equal(by_folder(**call).frames, pipe(**call).frames)


def adapters(model: Path) -> tuple[torch.nn.Module, LoraConfig]:
    """Build diffusers' transformer with an adapter that changes it."""
    torch.manual_seed(1)
    transformer = diffusers.AnyFlowTransformer3DModel.from_pretrained(
        model, subfolder="transformer"
    )
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["to_q", "to_out.0", "net.2"], init_lora_weights=False
    )
    transformer.add_adapter(config)
    return transformer, config


@pytest.mark.parametrize("kind", ["diffusers", "diffusers-file", "peft"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_lora_is_that_of_diffusers(scale, kind, model, peer, noise, tmp_path: Path) -> None:
    transformer, config = adapters(model)
    layers = get_peft_model_state_dict(transformer)
    if kind == "peft":
        plain = diffusers.AnyFlowTransformer3DModel.from_pretrained(model, subfolder="transformer")
        wrapped = get_peft_model(plain, config)
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                saved = name.removeprefix("base_model.model.").replace(".default.", ".")
                parameter.data.copy_(layers[saved])
        wrapped.save_pretrained(tmp_path)
    else:
        diffusers.loaders.WanLoraLoaderMixin.save_lora_weights(
            tmp_path,
            transformer_lora_layers=layers,
            transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
        )
    call = {**CALL, "prompt": PROMPTS, "num_inference_steps": 2}
    merged = AnyFlowPipeline.from_pretrained(model, dtype=torch.float32, device="cpu")
    names = list(merged.transformer.state_dict())
    merged.load_lora(
        tmp_path / "pytorch_lora_weights.safetensors" if kind == "diffusers-file" else tmp_path,
        scale,
    )
    assert list(merged.transformer.state_dict()) == names
    transformer.fuse_lora(lora_scale=scale)
    transformer.unload_lora()
    theirs = diffusers.AnyFlowPipeline(**{**peer.components, "transformer": transformer})
    theirs.set_progress_bar_config(disable=True)
    expected = steps_of_peer(theirs, noise, **call)
    torch.testing.assert_close(
        steps_of_ours(merged, noise, **call)[-1], expected[-1], rtol=0, atol=TOLERANCE
    )
    assert (expected[-1] - steps_of_peer(peer, noise, **call)[-1]).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"transformer.blocks.0.attn1.to_q.lora_A.weight": (4, 24)},
          "missing: blocks.0.attn1.to_q.lora_B.weight"),
        ({"transformer.blocks.9.attn1.to_q.lora_A.weight": (4, 24),
          "transformer.blocks.9.attn1.to_q.lora_B.weight": (24, 4)},
          "no linear layer.*blocks.9.attn1.to_q"),
        ({"transformer.blocks.0.attn1.to_q.lora_A.weight": (4, 7),
          "transformer.blocks.0.attn1.to_q.lora_B.weight": (24, 4)},
          r"A \(4, 7\) and B \(24, 4\) do not make"),
        ({"transformer.blocks.0.attn1.to_q.weight": (24, 24)}, "not understood"),
    ],
)  # fmt: skip
def test_a_lora_that_does_not_fit_changes_nothing(tensors, message, model, tmp_path: Path) -> None:
    pipe = AnyFlowPipeline.from_pretrained(model, dtype=torch.float32, device="cpu")
    before = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    file = tmp_path / "lora.safetensors"
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, file)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        pipe.load_lora(file)
    after = pipe.transformer.state_dict()
    assert list(after) == list(before) and all(
        torch.equal(after[name], before[name]) for name in before
    )


def test_a_missing_lora_is_named(pipe, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}/none"):
        pipe.load_lora(tmp_path / "none")


def test_a_name_of_the_hub_is_found_in_its_cache(
    model, pipe, noise, tmp_path: Path, monkeypatch
) -> None:
    """Lay the cache out as the hub's own client does: links to content by its hash."""
    repository = tmp_path / "models--someone--anyflow"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    for number, file in enumerate(f for f in model.rglob("*") if f.is_file()):
        blob = repository / "blobs" / f"{number:040x}"
        shutil.copy(file, blob)
        link = snapshot / file.relative_to(model)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cached = AnyFlowPipeline.from_pretrained("someone/anyflow", dtype=torch.float32, device="cpu")
    call = {**CALL, "prompt": PROMPTS, "latents": noise, "output_type": "latent"}
    assert torch.equal(cached(**call).frames, pipe(**call).frames)
