"""Train the causal model with adapters beside its compressed patch embedding, and export it."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from anyflow.models import AnyFlowFARTransformer3DModel
from anyflow.models.causal import CAUSAL_PARAMETERS
from anyflow.pipelines import AnyFlowFARPipeline
from anyflow.training import train
from anyflow.training.checkpoint import Checkpointer
from anyflow.training.config import CausalSettings, CheckpointConfig, LoRAConfig, Recipe
from anyflow.training.export import export
from anyflow.training.networks import build_student
from anyflow.training.recipe import dump_recipe, load_recipe

TARGETS = ("attn1.to_q", "ffn.net.2", "delta_embedder.linear_1")
LORA = LoRAConfig(2, 12.0, TARGETS, ("far_patch_embedding",))
PARTITION = (1, 2, 1)


def _recipe(out: Path, **student: Any) -> Recipe:
    """Return a causal recipe whose loss is on all chunks, of which one is compressed, or more."""
    overrides = ["pretrain.causal.long_context_ratio=1", "preview.every=0", "metrics.every=0"]
    overrides += [f"student.architecture.{name}" for name in ("num_layers=2", "ffn_dim=32")]
    overrides += ["data.batch_size=2", "checkpoint.every=1", "ema.start_step=0", f"out={out}"]
    recipe = load_recipe(Path("smoke_far_pretrain"), overrides)
    changed = {"lora": LORA, "causal": CausalSettings((1, 6, 6), 1, PARTITION), **student}
    return dataclasses.replace(recipe, student=dataclasses.replace(recipe.student, **changed))


def _checkpoint(out: Path, step: int, student: AnyFlowFARTransformer3DModel) -> dict[str, Tensor]:
    tensors = {
        f"{prefix}/{name}": torch.empty_like(p)
        for prefix in ("student", "ema")
        for name, p in student.named_parameters()
        if p.requires_grad
    }
    folder = out / "checkpoints"
    for prefix in ("student/", "ema/"):
        part = {name: t for name, t in tensors.items() if name.startswith(prefix)}
        Checkpointer(folder, keep=9).load(folder / f"step-{step:08d}", part, prefix=prefix)
    return tensors


def _equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _run(folder: Path, recipe: Recipe) -> tuple[Path, AnyFlowFARTransformer3DModel]:
    """Write a run with one checkpoint of drawn values, and return it and the student with them."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    student, generator = build_student(recipe), torch.Generator().manual_seed(1)
    assert isinstance(student, AnyFlowFARTransformer3DModel)
    tensors = {}
    with torch.no_grad():
        for name, p in student.named_parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn(p.shape, generator=generator)
                tensors[f"ema/{name}"] = p.detach().clone()
    Checkpointer(folder / "checkpoints", keep=1).save(1, tensors, {})
    return folder, student


def _velocity(model: Any) -> Tensor:
    """Evaluate the plain layout on all chunks."""
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 8, 6, 6, generator=g), torch.randn(2, 4, 32, generator=g)
    t = torch.tensor([[0.0, 0.0, 0.0, 70.0]] * 2)
    with torch.no_grad():
        return model.eval()(x, t, t / 3, text, list(PARTITION), return_dict=False)[0]


def test_the_compressed_embedding_trains_in_full_beside_adapters_and_resumes(
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    recipe = _recipe(out)
    train(dataclasses.replace(recipe, steps=2))
    train(dataclasses.replace(recipe, steps=3))
    start = build_student(recipe)
    assert isinstance(start, AnyFlowFARTransformer3DModel)
    trained = {name for name, p in start.named_parameters() if p.requires_grad}
    assert set(CAUSAL_PARAMETERS) < trained
    assert all("lora" in name for name in trained - set(CAUSAL_PARAMETERS))
    last = _checkpoint(out, 3, start)
    for name in CAUSAL_PARAMETERS:
        values = [start.get_parameter(name).detach(), last[f"student/{name}"], last[f"ema/{name}"]]
        assert all(torch.isfinite(value).all() for value in values)
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(values, 2))
    model = AnyFlowFARTransformer3DModel.from_pretrained(out / "model" / "transformer")
    for name in CAUSAL_PARAMETERS:
        assert torch.equal(model.get_parameter(name), last[f"ema/{name}"])
    assert tuple(model.config.chunk_partition) == PARTITION and model.config.full_chunk_limit == 1

    whole = dataclasses.replace(recipe, out=str(tmp_path / "whole"), steps=3)
    train(dataclasses.replace(whole, checkpoint=CheckpointConfig(every=3)))
    assert _equal(_checkpoint(tmp_path / "whole", 3, start), last)


def test_updates_without_a_compressed_chunk_leave_the_embedding_and_resume(tmp_path: Path) -> None:
    """Draw no long context, so that no update has a gradient of the compressed embedding."""
    recipe = _recipe(tmp_path / "run")
    causal = dataclasses.replace(recipe.pretrain.causal, long_context_ratio=0.0)
    recipe = dataclasses.replace(
        recipe, pretrain=dataclasses.replace(recipe.pretrain, causal=causal)
    )
    for steps in (1, 2):
        train(dataclasses.replace(recipe, steps=steps))
    start = build_student(recipe)
    assert isinstance(start, AnyFlowFARTransformer3DModel)
    last = _checkpoint(tmp_path / "run", 2, start)
    kept = {n for n, p in start.named_parameters() if f"ema/{n}" in last}
    same = {n for n in kept if torch.equal(start.get_parameter(n), last[f"student/{n}"])}
    assert same == set(CAUSAL_PARAMETERS)


@pytest.mark.parametrize("lora", ["merged", "separate"])
def test_an_export_is_the_student_in_both_libraries(lora: Any, tmp_path: Path) -> None:
    folder, student = _run(tmp_path / "run", _recipe(tmp_path))
    want = _velocity(student)
    export(folder, tmp_path / "model", lora=lora)
    transformer = tmp_path / "model" / "transformer"
    config = json.loads((transformer / "config.json").read_text())
    assert config["_class_name"] == "AnyFlowFARTransformer3DModel"
    for library in (AnyFlowFARTransformer3DModel, diffusers.AnyFlowFARTransformer3DModel):
        model, info = library.from_pretrained(transformer, output_loading_info=True)
        assert not any(info.values())
        for name in CAUSAL_PARAMETERS:
            assert torch.equal(model.get_parameter(name), student.get_parameter(name))
        if lora == "separate":
            assert (_velocity(model) - want).abs().max() > 0.1
            model.load_lora_adapter(tmp_path / "model" / "lora", use_safetensors=True)
        torch.testing.assert_close(_velocity(model), want, rtol=1e-4, atol=1e-4)


def test_adapters_of_the_causal_model_have_names_of_the_original_wan(tmp_path: Path) -> None:
    adapters = dataclasses.replace(LORA, target_modules=("attn1.to_q", "ffn.net.2"))
    folder, student = _run(tmp_path / "run", _recipe(tmp_path, lora=adapters))
    export(folder, tmp_path / "model", lora="separate", format="comfyui")
    state = load_file(tmp_path / "model" / "lora" / "comfyui_lora.safetensors")
    layer: Any = student.blocks[0].attn1.to_q
    for half, part in (("A", layer.lora_A), ("B", layer.lora_B)):
        name = f"diffusion_model.blocks.0.self_attn.q.lora_{half}.weight"
        assert torch.equal(state[name], part["default"].weight)
    assert not [name for name in state if "patch" in name]


def test_a_run_with_a_base_becomes_the_causal_pipeline_of_both_libraries(
    wan_model: Path, tmp_path: Path
) -> None:
    """Compare where diffusers' cached evaluations pad nothing: chunks of 128 tokens."""
    recipe = _recipe(tmp_path)
    assert recipe.student.architecture is not None
    sizes = dataclasses.replace(
        recipe.student.architecture,
        patch_size=(1, 2, 2),
        in_channels=16,
        out_channels=16,
        text_dim=16,
    )
    settings = CausalSettings((1, 4, 4), 2, (2, 2, 2))
    student = dataclasses.replace(recipe.student, architecture=sizes, causal=settings)
    folder, _ = _run(tmp_path / "run", dataclasses.replace(recipe, student=student))
    out = export(folder, tmp_path / "out", base=wan_model)
    theirs = diffusers.DiffusionPipeline.from_pretrained(out)
    ours = AnyFlowFARPipeline.from_pretrained(out, torch_dtype=torch.float32, device="cpu")
    assert type(theirs) is diffusers.AnyFlowFARPipeline
    latents: list[Callable[..., Any]] = []
    for pipe in (theirs, ours):
        pipe.set_progress_bar_config(disable=True)
        call = {"height": 128, "width": 128, "num_frames": 21, "num_inference_steps": 2}
        generator = torch.Generator().manual_seed(1)
        prompt, chunks = "a red disc moves slowly", [2, 2, 2]
        call |= {"output_type": "latent", "max_sequence_length": 12, "chunk_partition": chunks}
        latents.append(pipe(prompt, **call, generator=generator).frames)
    torch.testing.assert_close(latents[0], latents[1], rtol=0, atol=1e-4)
