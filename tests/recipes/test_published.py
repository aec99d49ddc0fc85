"""Test the recipes that come with anyflow: the published numbers, and that each can be used."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from anyflow.methods import AnyFlowOnPolicyMethod, AnyFlowPretrainMethod
from anyflow.models import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel
from anyflow.schedulers import FlowMapEulerDiscreteScheduler
from anyflow.training.config import Recipe, WeightsConfig
from anyflow.training.networks import build_student
from anyflow.training.recipe import dump_recipe, load_recipe, print_config

SHIPPED = Path(__file__).parents[2] / "anyflow" / "recipes"
NAMES = sorted(file.name for file in SHIPPED.glob("*.yaml"))
ADAPTED = (
    "attn1.to_q",
    "attn1.to_k",
    "attn1.to_v",
    "attn1.to_out.0",
    "ffn.net.0.proj",
    "ffn.net.2",
)
EMBEDDERS = tuple(f"{name}_embedder.linear_{i}" for name in ("time", "delta") for i in (1, 2))
STAGE_1 = {
    "stage": "pretrain",
    "student.lora.rank": 256,
    "student.lora.alpha": 256.0,
    "student.lora.target_modules": ADAPTED + EMBEDDERS,
    "student.lora.trained_modules": (),
    "flow_map.gate_value": 0.25,
    "flow_map.deltatime_type": "r",
    "flow_map.fusion": "gated",
    "scheduler.num_train_timesteps": 1000,
    "scheduler.shift": 5.0,
    "scheduler.weight_type": "beta08",
    "pretrain.diffusion_ratio": 0.5,
    "pretrain.consistency_ratio": 0.25,
    "pretrain.epsilon": 5.0,
    "pretrain.fuse_guidance_scale": 3.0,
    "pretrain.prompt_dropout": 0.1,
    "pretrain.i2v_prob": 0.0,
    "optimizer.lr": 5e-5,
    "optimizer.betas": (0.9, 0.95),
    "optimizer.weight_decay": 0.0,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 1000,
    "optimizer.clip_norm": 1.0,
    "ema.decay": 0.999,
    "ema.start_step": 1000,
    "steps": 6000,
    "global_batch": 32,
}
STAGE_2 = STAGE_1 | {
    "stage": "on_policy",
    "optimizer.lr": 2e-6,
    "optimizer.betas": (0.0, 0.999),
    "optimizer.warmup_steps": 0,
    "ema.decay": 0.99,
    "ema.start_step": 200,
    "steps": 1200,
    "on_policy.method.num_steps": (2, 4, 8, 16, 50),
    "on_policy.method.timesteps": None,
    "on_policy.method.real_guidance_scale": 3.0,
    "on_policy.method.rollout": "shortcut",
    "on_policy.method.grad_through": "all",
    "on_policy.method.dmd_score_r": "t",
    "on_policy.method.cotrain_pretrain": True,
    "on_policy.critic": None,
    "on_policy.critic_lora.rank": 256,
    "on_policy.critic_lora.alpha": 256.0,
    "on_policy.critic_lora.target_modules": ADAPTED,
    "on_policy.critic_lora.trained_modules": (),
    "on_policy.critic_optimizer.lr": 2e-6,
    "on_policy.critic_optimizer.betas": (0.0, 0.999),
    "on_policy.critic_optimizer.weight_decay": 0.0,
    "on_policy.critic_optimizer.warmup_steps": 0,
    "on_policy.critic_optimizer.clip_norm": 1.0,
    "on_policy.generator_update_interval": 1,
}
FAR = {
    "student.lora.trained_modules": ("far_patch_embedding",),
    "student.causal.compressed_patch_size": (1, 4, 4),
    "student.causal.full_chunk_limit": 3,
    "student.causal.chunk_partition": (1, 3, 3, 3, 3, 3, 3, 2),
    "pretrain.causal.chunk_partition": None,
    "pretrain.causal.long_context_ratio": 0.5,
    "pretrain.causal.bidirectional_prob": 0.1,
}
FAR_2 = {
    "student.lora.trained_modules": ("far_patch_embedding",),
    "student.causal": None,
    "pretrain.causal.chunk_partition": None,
    "pretrain.causal.long_context_ratio": 0.5,
    "pretrain.causal.bidirectional_prob": 0.0,
    "on_policy.method.causal.chunk_partition": None,
}
PUBLISHED = {
    "anyflow_pretrain_t2v": STAGE_1,
    "anyflow_onpolicy_t2v": STAGE_2,
    "anyflow_pretrain_t2v_14b": STAGE_1 | {"steps": 4000, "global_batch": 16},
    "anyflow_onpolicy_t2v_14b": STAGE_2 | {"global_batch": 16},
    "anyflow_onpolicy_t2v_teacher14b": STAGE_2
    | {
        "on_policy.teacher": WeightsConfig("runs/teacher_t2v_14b/model"),
        "on_policy.critic": WeightsConfig("runs/teacher_t2v/model"),
    },
    "fastvideo_pretrain_t2v": {
        "stage": "pretrain",
        "student.lora": None,
        "optimizer.lr": 5e-5,
        "steps": 6000,
        "global_batch": 32,
        "scheduler.shift": 5.0,
        "pretrain.epsilon": 5.0,
    },
    "fastvideo_onpolicy_t2v": {
        "stage": "on_policy",
        "student.lora": None,
        "on_policy.critic_lora": None,
        "optimizer.lr": 2e-6,
        "steps": 4000,
        "on_policy.generator_update_interval": 5,
        "on_policy.method.timesteps": (999.0, 937.0, 833.0, 624.0, 0.0),
    },
    "anyflow_far_pretrain_t2v": STAGE_1 | FAR,
    "anyflow_far_onpolicy_t2v": STAGE_2 | FAR_2,
    "anyflow_far_pretrain_t2v_14b": STAGE_1 | FAR | {"steps": 4000, "global_batch": 16},
    "anyflow_far_onpolicy_t2v_14b": STAGE_2
    | FAR_2
    | {"global_batch": 16, "on_policy.teacher": WeightsConfig("runs/teacher_t2v_14b/model")},
    "teacher_t2v": STAGE_1
    | {
        "stage": "teacher",
        "student.lora.target_modules": ADAPTED,
        "scheduler.weight_type": "uniform",
    },
}


def _value(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for name in key.split("."):
        value = getattr(value, name)
    return value


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_numbers_are_in_the_recipes(name: str) -> None:
    """Compare with numbers written down here; the global batch is that of eight processes."""
    recipe = load_recipe(SHIPPED / f"{name}.yaml")
    found = {key: _value(recipe, key) for key in PUBLISHED[name] if key != "global_batch"}
    if "global_batch" in PUBLISHED[name]:
        found["global_batch"] = recipe.data.batch_size * recipe.gradient_accumulation * 8
    assert found == PUBLISHED[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_loads_and_its_dump_loads_equal(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(SHIPPED / name)
    assert recipe.out == f"runs/{Path(name).stem}"
    dumped = tmp_path / "dumped.yaml"
    dumped.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(dumped) == recipe
    assert print_config(SHIPPED / name) == dumped.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_what_a_recipe_starts_from_is_plain_wan_or_what_another_writes(name: str) -> None:
    recipe = load_recipe(SHIPPED / name)
    networks = [recipe.student]
    if recipe.on_policy is not None:
        networks += [recipe.on_policy.teacher, *filter(None, [recipe.on_policy.critic])]
    for path in [Path(network.path) for network in networks if network.path is not None]:
        assert path.parent == Path("models") or (
            path.name == "model" and f"{path.parent.name}.yaml" in NAMES
        )


def test_the_smoke_recipes_are_small_and_their_methods_accept_them() -> None:
    smoke = {"smoke_teacher": 60, "smoke_pretrain": 60, "smoke_onpolicy": 15}
    smoke |= {"smoke_far_pretrain": 60, "smoke_far_onpolicy": 15}
    for name, steps in smoke.items():
        recipe = load_recipe(SHIPPED / f"{name}.yaml")
        assert (recipe.steps, recipe.data.batch_size, recipe.data.kind) == (steps, 8, "synthetic")
        assert (recipe.device, recipe.precision, recipe.preview.step_counts) == (
            "cpu",
            "fp32",
            (1, 2, 4, 8),
        )
    for stage_1, stage_2 in (
        ("smoke_pretrain", "smoke_onpolicy"),
        ("smoke_far_pretrain", "smoke_far_onpolicy"),
    ):
        pretrain, recipe = load_recipe(stage_1), load_recipe(stage_2)
        student = build_student(pretrain)
        teacher = AnyFlowTransformer3DModel(**dataclasses.asdict(pretrain.student.architecture))
        scheduler = FlowMapEulerDiscreteScheduler(**dataclasses.asdict(recipe.scheduler))
        AnyFlowPretrainMethod(student, scheduler, pretrain.pretrain)
        AnyFlowOnPolicyMethod(student, teacher, teacher, scheduler, recipe.on_policy.method)


def test_published_on_policy_settings_are_accepted_by_the_method() -> None:
    """Build each method, which checks the pinned schedule too."""
    architecture = load_recipe(SHIPPED / "smoke_pretrain.yaml").student.architecture
    model = AnyFlowTransformer3DModel(**dataclasses.asdict(architecture))
    causal = AnyFlowFARTransformer3DModel.from_bidirectional(model)
    for name, student in (
        ("anyflow_onpolicy_t2v", model),
        ("fastvideo_onpolicy_t2v", model),
        ("anyflow_far_onpolicy_t2v", causal),
    ):
        recipe = load_recipe(SHIPPED / f"{name}.yaml")
        scheduler = FlowMapEulerDiscreteScheduler(**dataclasses.asdict(recipe.scheduler))
        AnyFlowOnPolicyMethod(student, model, model, scheduler, recipe.on_policy.method)
