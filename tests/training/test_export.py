"""Export what was trained, with adapters merged, separate or absent, and load it in diffusers."""

import copy
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from anyflow.formats import load_transformer
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.pipelines.lora import merge_lora
from anyflow.schedulers import FlowMapEulerDiscreteScheduler
from anyflow.training.checkpoint import Checkpointer, CheckpointError
from anyflow.training.config import (
    ArchitectureConfig,
    DataConfig,
    FlowMap,
    LoRAConfig,
    NetworkConfig,
    Recipe,
    SchedulerConfig,
)
from anyflow.training.export import export, write_model
from anyflow.training.networks import build_student
from anyflow.training.recipe import dump_recipe

TINY = ArchitectureConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=3,
    out_channels=3,
    text_dim=8,
    freq_dim=16,
    ffn_dim=32,
    num_layers=2,
    rope_max_seq_len=8,
)
SCHEDULER = FlowMapEulerDiscreteScheduler(shift=3.0, weight_type="uniform")


def recipe(lora: bool) -> Recipe:
    return Recipe(
        stage="pretrain",
        out="unused",
        student=NetworkConfig(
            architecture=TINY, seed=3, lora=LoRAConfig(rank=4, alpha=6.0) if lora else None
        ),
        data=DataConfig(kind="synthetic"),
        flow_map=FlowMap(gate_value=0.4, deltatime_type="t-r"),
        scheduler=SchedulerConfig(shift=3.0, weight_type="uniform"),
    )


def trained(student: AnyFlowTransformer3DModel, seed: int) -> dict[str, Tensor]:
    """Draw other values for everything that is trained."""
    g = torch.Generator().manual_seed(seed)
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    return {
        name: p.detach() + 0.1 * torch.randn(p.shape, generator=g) for name, p in parameters.items()
    }


def velocity(model: Any) -> Tensor:
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 2, 3, 4, 6, generator=g), torch.randn(2, 5, 8, generator=g)
    t = torch.tensor([[900.0, 900.0], [300.0, 300.0]])
    with torch.no_grad():
        return model.eval()(x, t, t / 3, text, return_dict=False)[0]


def filled(
    student: AnyFlowTransformer3DModel, tensors: Mapping[str, Tensor]
) -> AnyFlowTransformer3DModel:
    """Copy the student with what was trained, adapters and all."""
    student = copy.deepcopy(student)
    parameters = dict(student.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            parameters[name].copy_(tensor)
    return student


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """Return ``run(lora)``, which saves steps 1 and 2 with parameters from known seeds."""

    def make(lora: bool) -> Path:
        folder, r = tmp_path / "run", recipe(lora)
        folder.mkdir()
        (folder / "recipe.yaml").write_text(dump_recipe(r))
        student = build_student(r)
        checkpointer = Checkpointer(folder / "checkpoints", keep=2)
        for step in (1, 2):
            tensors = {f"student/{name}": t for name, t in trained(student, step).items()}
            tensors |= {f"ema/{name}": t for name, t in trained(student, 10 + step).items()}
            tensors |= {"optimizer/student/x/step": torch.tensor(1.0)}
            checkpointer.save(step, tensors, {})
        return folder

    return make


# Fully trained ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "seed"),
    [({}, 12), ({"weights": "raw"}, 2), ({"step": 1}, 11), ({"weights": "raw", "step": 1}, 1)],
)
def test_a_checkpoint_loads_in_diffusers_to_the_bit(
    run: Callable[..., Path], tmp_path: Path, options: dict[str, Any], seed: int
) -> None:
    assert export(run(lora=False), tmp_path / "model", **options) == tmp_path / "model"
    student = build_student(recipe(lora=False))
    want = trained(student, seed)
    theirs = diffusers.AnyFlowTransformer3DModel.from_pretrained(
        tmp_path / "model", subfolder="transformer"
    )
    ours = AnyFlowTransformer3DModel.from_pretrained(tmp_path / "model", subfolder="transformer")
    for model in (ours, theirs):
        state = model.state_dict()
        assert state.keys() == want.keys()
        assert all(
            torch.equal(state[name], tensor) and tensor.dtype == torch.float32
            for name, tensor in want.items()
        )
    assert torch.equal(velocity(ours), velocity(filled(student, want)))
    torch.testing.assert_close(velocity(theirs), velocity(ours), rtol=1e-5, atol=1e-5)


def test_settings_of_flow_map_and_scheduler_are_exported(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    export(run(lora=False), tmp_path / "model")
    config = AnyFlowTransformer3DModel.from_pretrained(
        tmp_path / "model", subfolder="transformer"
    ).config
    wanted = {
        "r_embedder": True,
        "gate_value": 0.4,
        "deltatime_type": "t-r",
        "r_embedder_fusion": "gated",
    }
    assert {key: config[key] for key in wanted} == wanted
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["scheduler", "transformer"]
    scheduler = FlowMapEulerDiscreteScheduler.from_pretrained(
        tmp_path / "model", subfolder="scheduler"
    )
    assert dict(scheduler.config.items()) == dataclasses.asdict(recipe(lora=False).scheduler)


# Adapters -----------------------------------------------------------------------------------------


def test_a_teacher_is_written_as_a_wan_model(tmp_path: Path) -> None:
    """Write the class without r: diffusers' AnyFlow class would fill that branch at random."""
    plain = dataclasses.replace(recipe(lora=False), stage="teacher")
    want = trained(build_student(plain), 3)
    write_model(build_student(plain), want, SCHEDULER, tmp_path / "model")
    theirs = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "model" / "transformer")
    ours = AnyFlowTransformer3DModel.from_pretrained(tmp_path / "model" / "transformer")
    assert (
        json.loads((tmp_path / "model/transformer/config.json").read_text())["_class_name"]
        == type(theirs).__name__
    )
    for model in (ours, theirs):
        state = model.state_dict()
        assert state.keys() == want.keys() and all(
            torch.equal(state[name], want[name]) for name in want
        )


def test_a_flow_map_that_diffusers_does_not_have_is_written_for_our_class(tmp_path: Path) -> None:
    additive = dataclasses.replace(recipe(lora=False), flow_map=FlowMap(fusion="additive"))
    write_model(
        build_student(additive), trained(build_student(additive), 3), SCHEDULER, tmp_path / "model"
    )
    assert load_transformer(tmp_path / "model").config.r_embedder_fusion == "additive"


def test_merged_adapters_compute_what_the_adapters_did(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    export(run(lora=True), tmp_path / "model")
    student = build_student(recipe(lora=True))
    want = velocity(filled(student, trained(student, 12)))
    theirs = diffusers.AnyFlowTransformer3DModel.from_pretrained(
        tmp_path / "model", subfolder="transformer"
    )
    ours = AnyFlowTransformer3DModel.from_pretrained(tmp_path / "model", subfolder="transformer")
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert not [name for name in ours.state_dict() if "lora" in name or "base_layer" in name]
    for model in (ours, theirs):
        torch.testing.assert_close(velocity(model), want, rtol=1e-5, atol=1e-5)
    assert (velocity(student) - want).abs().max() > 0.1  # what was trained matters


@pytest.mark.parametrize(
    "library", [AnyFlowTransformer3DModel, diffusers.AnyFlowTransformer3DModel]
)
def test_separate_adapters_compute_what_the_adapters_did(
    run: Callable[..., Path], tmp_path: Path, library: Any
) -> None:
    """Rank and alpha differ, so that a lost scale would show; so would lost time embedders."""
    export(run(lora=True), tmp_path / "model", lora="separate")
    student = build_student(recipe(lora=True))
    tensors = trained(student, 12)
    want = velocity(filled(student, tensors))
    model = library.from_pretrained(tmp_path / "model", subfolder="transformer")
    in_full = {name: tensor for name, tensor in tensors.items() if "lora" not in name}
    assert in_full and all(
        torch.equal(model.state_dict()[name], tensor) for name, tensor in in_full.items()
    )
    assert (velocity(model) - want).abs().max() > 0.1
    model.load_lora_adapter(tmp_path / "model" / "lora", use_safetensors=True)
    torch.testing.assert_close(velocity(model), want, rtol=1e-5, atol=1e-5)


def test_separate_adapters_load_in_pipelines(run: Callable[..., Path], tmp_path: Path) -> None:
    export(run(lora=True), tmp_path / "model", lora="separate")
    student = build_student(recipe(lora=True))
    want = velocity(filled(student, trained(student, 12)))
    pipeline = diffusers.AnyFlowPipeline(
        transformer=AnyFlowTransformer3DModel.from_pretrained(
            tmp_path / "model", subfolder="transformer"
        ),
        scheduler=FlowMapEulerDiscreteScheduler.from_pretrained(
            tmp_path / "model", subfolder="scheduler"
        ),
        vae=None,
        text_encoder=None,
        tokenizer=None,
    )
    pipeline.load_lora_weights(tmp_path / "model" / "lora")
    torch.testing.assert_close(velocity(pipeline.transformer), want, rtol=1e-5, atol=1e-5)
    (file,) = (tmp_path / "model" / "lora").iterdir()
    with safe_open(file, "pt") as adapters:
        assert all(name.startswith("transformer.blocks.") for name in adapters.keys())  # noqa: SIM118


@pytest.mark.parametrize("format", ["diffusers", "comfyui"])
def test_a_separate_lora_is_right_in_every_reader(
    format: Any, run: Callable[..., Path], tmp_path: Path
) -> None:
    """Load it in diffusers' pipeline, in ours, and by the factors as PEFT has them."""
    export(run(lora=True), tmp_path / "model", lora="separate", format=format)
    student = build_student(recipe(lora=True))
    student = filled(student, trained(student, 12))
    (file,) = (tmp_path / "model" / "lora").iterdir()
    state = load_file(file)
    layer = "blocks.0.attn1.to_q"
    name = {"diffusers": f"transformer.{layer}", "comfyui": "diffusion_model.blocks.0.self_attn.q"}[
        format
    ]
    parts = {"A": student.get_submodule(layer).lora_A, "B": student.get_submodule(layer).lora_B}
    assert all(
        torch.equal(state[f"{name}.lora_{half}.weight"], p["default"].weight)
        for half, p in parts.items()
    )
    if format == "comfyui":
        assert state[f"{name}.alpha"] == 6 and all(
            key.startswith("diffusion_model.blocks.") for key in state
        )
        assert len(state) == 3 * len({key.split(".lora_")[0] for key in state if ".lora_" in key})
    student.fuse_lora()
    student.unload_lora()
    want = student.state_dict()

    def plain() -> AnyFlowTransformer3DModel:
        return AnyFlowTransformer3DModel.from_pretrained(
            tmp_path / "model", subfolder="transformer"
        )

    ours, pipeline = (
        plain(),
        diffusers.AnyFlowPipeline(
            transformer=plain(), scheduler=SCHEDULER, vae=None, text_encoder=None, tokenizer=None
        ),
    )
    merge_lora(ours, tmp_path / "model" / "lora")
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    for state in (ours.state_dict(), pipeline.transformer.state_dict()):
        assert (
            state.keys() == want.keys()
            and max(float((state[n] - want[n]).abs().max()) for n in want) < 1e-6
        )


def test_a_layer_that_the_format_has_no_name_for(tmp_path: Path) -> None:
    lora = LoRAConfig(rank=2, target_modules=("delta_embedder.linear_1",), trained_modules=())
    other = dataclasses.replace(
        recipe(lora=True), student=NetworkConfig(architecture=TINY, lora=lora)
    )
    student = build_student(other)
    with pytest.raises(ValueError, match=r"delta_embedder\.linear_1.*no name in the original Wan"):
        write_model(
            student,
            trained(student, 1),
            SCHEDULER,
            tmp_path / "model",
            lora="separate",
            format="comfyui",
        )
    assert not (tmp_path / "model").exists()


# Mistakes -----------------------------------------------------------------------------------------


def test_mistakes_say_what_is_wrong_and_leave_nothing_behind(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    folder, out = run(lora=False), tmp_path / "model"
    for options, message in (
        ({"weights": "both"}, "weights must be ema or raw, got 'both'"),
        ({"lora": "both"}, "lora must be merged or separate, got 'both'"),
        (
            {"lora": "separate", "format": "kohya"},
            "format must be diffusers or comfyui, got 'kohya'",
        ),
        ({"format": "comfyui"}, "format='comfyui'.*needs lora='separate'"),
        ({"lora": "separate"}, "needs a student with adapters"),
        ({"step": 7}, "has no checkpoint of step 7; it has 1, 2"),
    ):
        with pytest.raises(ValueError, match=message):
            export(folder, out, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"has no recipe\.yaml"):
        export(tmp_path, out)
    (folder / "checkpoints" / "step-00000002" / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"__0_0.distcp is missing.*step-00000001"):
        export(folder, out)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_folder_with_something_in_it_is_left_alone(
    run: Callable[..., Path], tmp_path: Path
) -> None:
    folder, out = run(lora=False), tmp_path / "model"
    out.mkdir()
    export(folder, out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    with pytest.raises(ValueError, match="model exists and is not an empty folder"):
        export(folder, out)
    with pytest.raises(ValueError, match=r"recipe\.yaml exists and is not an empty folder"):
        export(folder, folder / "recipe.yaml")
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_what_a_killed_export_left_is_cleared(run: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / ".model.tmp" / "lora").mkdir(parents=True)
    export(run(lora=False), tmp_path / "model")
    assert not (tmp_path / "model" / "lora").exists() and not (tmp_path / ".model.tmp").exists()


def test_tensors_must_be_those_that_are_trained(tmp_path: Path) -> None:
    student = build_student(recipe(lora=True))
    tensors = trained(student, 1)
    tensors["proj_out.weight"] = student.proj_out.weight.detach()
    del tensors["blocks.0.attn1.to_q.lora_A.default.weight"]
    tensors["condition_embedder.time_embedder.linear_1.bias"] = torch.zeros(1)
    before = velocity(student)
    with pytest.raises(ValueError) as error:
        write_model(student, tensors, SCHEDULER, tmp_path / "model")
    for line in (
        "missing: blocks.0.attn1.to_q.lora_A.default.weight",
        "not a trained parameter: proj_out.weight",
        "condition_embedder.time_embedder.linear_1.bias: got (1,), the parameter is (24,)",
    ):
        assert f"\n  {line}" in str(error.value)
    assert torch.equal(velocity(student), before) and not list(tmp_path.iterdir())
