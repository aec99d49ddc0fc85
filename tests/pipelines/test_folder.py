"""Test a run exported as a whole pipeline, with the parts of another model."""

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from typer.testing import CliRunner

from anyflow.cli import app
from anyflow.pipelines import AnyFlowPipeline
from anyflow.training.checkpoint import Checkpointer
from anyflow.training.config import (
    ArchitectureConfig,
    DataConfig,
    LoRAConfig,
    NetworkConfig,
    Recipe,
    SchedulerConfig,
)
from anyflow.training.export import export
from anyflow.training.networks import build_student
from anyflow.training.recipe import dump_recipe

SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
CALL: dict[str, Any] = {
    "prompt": "a red disc moves slowly",
    "height": 16,
    "width": 32,
    "num_frames": 5,
    "num_inference_steps": 2,
    "max_sequence_length": 12,
    "output_type": "latent",
}


def run(folder: Path, stage: str = "pretrain", lora: bool = False, **sizes: int) -> Path:
    """Make a run with one checkpoint, of values that are not those of the start."""
    adapters = LoRAConfig(rank=4, alpha=6.0) if lora else None
    network = NetworkConfig(
        architecture=ArchitectureConfig(**{**SIZES, **sizes}), seed=3, lora=adapters
    )
    recipe = Recipe(
        stage=stage,  # type: ignore[arg-type]
        out="unused",
        student=network,
        data=DataConfig(kind="synthetic"),
        scheduler=SchedulerConfig(shift=3.0),
    )
    folder.mkdir()
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    g = torch.Generator().manual_seed(1)
    tensors = {
        f"ema/{name}": p.detach() + 0.1 * torch.randn(p.shape, generator=g)
        for name, p in build_student(recipe).named_parameters()
        if p.requires_grad
    }
    Checkpointer(folder / "checkpoints", keep=1).save(1, tensors, {})
    return folder


def latents(pipe: Any, **call: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**CALL, **call, generator=torch.Generator().manual_seed(1)).frames


def ours(path: Path, **options: Any) -> AnyFlowPipeline:
    return AnyFlowPipeline.from_pretrained(path, torch_dtype=torch.float32, device="cpu", **options)


@pytest.mark.parametrize("copy", [False, True])
def test_a_run_becomes_a_pipeline_of_both_libraries(
    copy: bool, model: Path, tmp_path: Path
) -> None:
    arguments = ["export", str(run(tmp_path / "run")), str(tmp_path / "out"), "--base", str(model)]
    result = CliRunner().invoke(app, [*arguments, *(["--copy"] if copy else [])])
    assert result.exit_code == 0 and f"The model is {tmp_path}/out" in result.output
    assert (tmp_path / "out" / "vae").is_symlink() is not copy
    expected = latents(ours(model, transformer=tmp_path / "out"))
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert type(pipe) is diffusers.AnyFlowPipeline and pipe.scheduler.config.shift == 3.0
    torch.testing.assert_close(latents(pipe), expected, rtol=0, atol=1e-5)
    assert torch.equal(latents(ours(tmp_path / "out")), expected)
    assert (expected - latents(ours(model))).abs().max() > 0.01


def test_adapters_beside_a_pipeline_are_loaded_by_both(model: Path, tmp_path: Path) -> None:
    folder = run(tmp_path / "run", lora=True)
    merged = ours(export(folder, tmp_path / "merged", base=model))
    expected = latents(merged)
    separate = export(folder, tmp_path / "separate", lora="separate", base=model)
    for pipe in (ours(separate), diffusers.AnyFlowPipeline.from_pretrained(separate)):
        before = latents(pipe)
        pipe.load_lora_weights(separate / "lora")
        torch.testing.assert_close(latents(pipe), expected, rtol=0, atol=1e-5)
        assert (before - expected).abs().max() > 1e-3


def test_a_teacher_becomes_a_pipeline_of_wan(model: Path, tmp_path: Path) -> None:
    out = export(run(tmp_path / "run", stage="teacher"), tmp_path / "out", base=model)
    theirs = diffusers.DiffusionPipeline.from_pretrained(out)
    assert type(theirs) is diffusers.WanPipeline and theirs.scheduler.config.shift == 3.0
    expected = latents(theirs, guidance_scale=1.0)
    actual = latents(ours(out, euler=True), sigmas=theirs.scheduler.sigmas[:2])
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def test_a_base_that_does_not_do_is_refused_before_anything_is_written(
    model: Path, tmp_path: Path
) -> None:
    folder, base = run(tmp_path / "run"), tmp_path / "base"
    narrow = run(tmp_path / "narrow", text_dim=8)

    def refused(source: Path, parts: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            export(source, tmp_path / "out", base=parts)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))

    refused(narrow, model, "text_encoder has 16 text dimensions, but the transformer takes 8")
    refused(folder, tmp_path / "none", "no folder")
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(model, base, ignore=shutil.ignore_patterns(part))
        refused(folder, base, f"has no {part}/")
        shutil.rmtree(base)
    shutil.copytree(model, base, ignore=shutil.ignore_patterns("*.safetensors"))
    refused(folder, base, "has no file of weights")
    config = base / "vae" / "config.json"
    shutil.copytree(model, base, dirs_exist_ok=True)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"z_dim": 48}))
    refused(folder, base, "vae has 48 channels, but the transformer takes 16")
    with pytest.raises(ValueError, match="copy is of the parts that base gives"):
        export(folder, tmp_path / "out", copy=True)


def test_the_choices_are_those_of_the_help(tmp_path: Path) -> None:
    """Refuse a wrong choice, and name the right ones."""
    text = CliRunner().invoke(app, ["export", "--help"], env={"COLUMNS": "200"}).output
    for choices in ("ema|raw", "merged|separate", "diffusers|comfyui"):
        assert choices in text
    result = CliRunner().invoke(
        app, ["export", str(tmp_path), str(tmp_path / "out"), "--weights", "average"]
    )
    assert result.exit_code == 2 and "'average'" in result.output and "'ema'" in result.output
