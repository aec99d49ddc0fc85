"""Test the settings of causal training in a recipe, the networks they make, and their data."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from recipe_texts import SMALL, errors, write

from anyflow.methods import CausalConfig, OnPolicyConfig
from anyflow.models import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel
from anyflow.models.causal import CAUSAL_PARAMETERS
from anyflow.training import train
from anyflow.training.config import (
    ArchitectureConfig,
    CausalSettings,
    NetworkConfig,
    OnPolicyStageConfig,
    Recipe,
    WeightsConfig,
)
from anyflow.training.networks import build_critic, build_student, build_teacher
from anyflow.training.recipe import dump_recipe, load_recipe
from anyflow.utils.validation import SettingError

Make = Callable[..., Recipe]
SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 8,
    "out_channels": 8,
    "text_dim": 32,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
SETTINGS = CausalSettings((1, 6, 6), 2, (1, 2, 1))
METHOD = dataclasses.replace(load_recipe(Path("smoke_far_pretrain")).pretrain, prompt_dropout=0.1)


def _causal_recipe(small: Make, out: Path, student: NetworkConfig, **changes: Any) -> Recipe:
    return small(out, student=student, pretrain=METHOD, **changes)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Write a plain Wan model, and a causal one with settings of its own."""
    wan = diffusers.WanTransformer3DModel(**SIZES)
    wan.save_pretrained(tmp_path / "wan")
    far = AnyFlowFARTransformer3DModel(**SIZES, **vars(SETTINGS))
    with torch.no_grad():
        far.far_patch_embedding.weight.add_(1.0)  # not the interpolated one
    far.save_pretrained(tmp_path / "far")
    return tmp_path / "wan", tmp_path / "far"


# Recipes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "student:\n  path: m\n  causal: {chunk_partition: []}",
            ":6: student.causal.chunk_partition: must be the latent frames of each chunk, as "
            "(1, 3, 3), got ()",
        ),
        (
            "student:\n  path: m\n  causal: {chunk_partition: [1, 0]}",
            ":6: student.causal.chunk_partition: is not possible: chunk 1 must be a whole number "
            "from 1 to 4096, got 0",
        ),
        (
            "student:\n  path: m\n  causal:\n    full_chunk_limit: 0",
            ":7: student.causal.full_chunk_limit: must be a whole number from 1 to 4096, got 0",
        ),
        (
            "student:\n  path: m\n  causal:\n    compressed_patch_size: [1, 4]",
            ":7: student.causal.compressed_patch_size: has too few items, got [1, 4]",
        ),
        (
            "student:\n  architecture: {}\n  causal:\n    compressed_patch_size: [1, 3, 3]",
            ":7: student.causal.compressed_patch_size: (1, 3, 3) must be a multiple of patch_size "
            "(1, 2, 2)",
        ),
        (
            "student:\n  architecture: {patch_size: [2, 2, 2]}\n  causal: {}",
            ":6: student.causal: a causal model has one frame in a patch: patch_size and "
            "compressed_patch_size must begin with 1, got (2, 2, 2) and (1, 4, 4)",
        ),
        (
            "student: {path: m, causal: {}}",
            ": pretrain.causal: is required with student.causal; {} will do",
        ),
        (
            "student: {architecture: {}}\npretrain: {causal: {}}",
            ":4: student.causal: is required with pretrain.causal, unless student.path holds a "
            "causal model",
        ),
        (
            "student: {path: m}\npretrain:\n  causal: {chunk_partition: [3, -1]}",
            ":6: pretrain.causal.chunk_partition: is not possible: chunk 1 must be a whole number "
            "from 1 to 4096, got -1",
        ),
        (
            "student: {path: m}\npretrain:\n  causal: {bidirectional_prob: 2}",
            ":6: pretrain.causal.bidirectional_prob: must be in [0, 1], got 2.0",
        ),
        (
            "student: {path: m}\npretrain: {causal: {}}\non_policy: {teacher: {path: t}}",
            ":6: on_policy.method.causal: is required with pretrain.causal, and only then",
        ),
        (
            "student: {path: m}\non_policy:\n  teacher: {path: t}\n  method:\n    causal: {}",
            ":8: on_policy.method.causal: is required with pretrain.causal, and only then",
        ),
    ],
)
def test_a_mistake_in_causal_settings_is_a_line_with_its_place_and_key(
    text: str, problem: str, tmp_path: Path
) -> None:
    stage = "on_policy" if "on_policy:" in text else "pretrain"
    head = f"stage: {stage}\nout: runs/a\ndata: {{path: latents}}\n"
    assert errors(write(tmp_path, f"{head}{text}\n")) == [f"recipe.yaml{problem}"]


def test_the_teacher_stage_refuses_causal_settings(tmp_path: Path) -> None:
    path = write(tmp_path, SMALL.replace("pretrain", "teacher"))
    for key in ("student.causal", "pretrain.causal"):
        assert errors(path, f"{key}={{}}") == [
            f"override {key}={{}}: {key}: must be null with stage=teacher: the causal model is a "
            "flow map, and what this stage trains is none"
        ]


def test_causal_settings_of_a_teacher_say_where_they_belong(tmp_path: Path) -> None:
    text = SMALL.replace("pretrain", "on_policy") + (
        "on_policy:\n  teacher: {path: t, causal: {}}\n  critic: {path: c, causal: {}}\n"
        "causal: {}\n"
    )
    said = "teacher and critic are bidirectional: only student.causal makes a causal model"
    lines = errors(write(tmp_path, text))
    assert [line.split(",")[0] for line in lines] == [
        f"recipe.yaml:6: on_policy.teacher.causal: {said}",
        f"recipe.yaml:7: on_policy.critic.causal: {said}",
        "recipe.yaml:8: causal: give student.causal",
    ]
    causal = NetworkConfig("t", causal=SETTINGS)
    with pytest.raises(SettingError, match=r"teacher\.causal must be None: teacher and critic"):
        OnPolicyStageConfig(teacher=causal)


def test_a_causal_recipe_is_its_dump_read_again(tmp_path: Path) -> None:
    recipe = load_recipe(Path("smoke_far_onpolicy"), ["pretrain.causal.chunk_partition=[2, 2]"])
    assert recipe.pretrain.causal == CausalConfig((2, 2), 0.5, 0.0)
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


# Networks -----------------------------------------------------------------------------------------


def test_random_weights_are_those_of_the_bidirectional_model(
    small_recipe: Make, tmp_path: Path
) -> None:
    """Compare the compressed embedding with the interpolation written out: half-pixel, clamped."""
    sizes, causal = ArchitectureConfig(**SIZES), CausalSettings()
    network = NetworkConfig(architecture=sizes, causal=causal, seed=3)
    student = build_student(_causal_recipe(small_recipe, tmp_path, network))
    plain = build_student(small_recipe(tmp_path, student=NetworkConfig(None, sizes, 3)))
    assert isinstance(student, AnyFlowFARTransformer3DModel) and student.config.r_embedder
    state = student.state_dict()
    assert state.keys() == plain.state_dict().keys() | set(CAUSAL_PARAMETERS)
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
    taps = torch.tensor([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    full = state["patch_embedding.weight"]
    expected = torch.einsum("ia,jb,dcfab->dcfij", taps, taps, full)
    torch.testing.assert_close(state["far_patch_embedding.weight"], expected, rtol=0, atol=1e-7)
    assert torch.equal(state["far_patch_embedding.bias"], state["patch_embedding.bias"])


def test_a_bidirectional_folder_becomes_causal_with_its_own_weights(
    small_recipe: Make, tmp_path: Path, folders: tuple[Path, Path]
) -> None:
    network = NetworkConfig(str(folders[0]), causal=SETTINGS)
    student = build_student(_causal_recipe(small_recipe, tmp_path, network))
    wan = diffusers.WanTransformer3DModel.from_pretrained(folders[0]).state_dict()
    assert isinstance(student, AnyFlowFARTransformer3DModel) and student.config.r_embedder
    state = student.state_dict()
    assert all(torch.equal(state[name], value) for name, value in wan.items())
    assert {name: student.config[name] for name in vars(SETTINGS)} == vars(SETTINGS)
    mean = state["far_patch_embedding.weight"].mean((-2, -1))
    torch.testing.assert_close(mean, state["patch_embedding.weight"].mean((-2, -1)))


def test_a_causal_folder_keeps_its_settings_and_its_embedding(
    small_recipe: Make, tmp_path: Path, folders: tuple[Path, Path]
) -> None:
    saved = AnyFlowFARTransformer3DModel.from_pretrained(folders[1]).state_dict()
    for causal in (None, SETTINGS):
        network = NetworkConfig(str(folders[1]), causal=causal)
        student = build_student(_causal_recipe(small_recipe, tmp_path, network))
        assert isinstance(student, AnyFlowFARTransformer3DModel)
        assert {name: student.config[name] for name in vars(SETTINGS)} == vars(SETTINGS)
        assert all(torch.equal(value, saved[name]) for name, value in student.state_dict().items())


def test_a_folder_that_does_not_fit_the_causal_settings_is_refused(
    small_recipe: Make, tmp_path: Path, folders: tuple[Path, Path]
) -> None:
    wan, far = folders
    other = dataclasses.replace(SETTINGS, full_chunk_limit=3)
    recipe = _causal_recipe(small_recipe, tmp_path, NetworkConfig(str(far), causal=other))
    message = r"^student\.path: (?s:.*)full_chunk_limit: 2 in the checkpoint, 3 given"
    with pytest.raises(ValueError, match=message):
        build_student(recipe)
    with pytest.raises(ValueError, match=r"holds a bidirectional model, .*student\.causal=\{\} ma"):
        build_student(_causal_recipe(small_recipe, tmp_path, NetworkConfig(str(wan))))
    with pytest.raises(ValueError, match=r"holds a causal model.* give pretrain\.causal=\{\}, or"):
        build_student(small_recipe(tmp_path, student=NetworkConfig(str(far))))
    with pytest.raises(ValueError, match=r"=\{\} and on_policy\.method\.causal=\{\}, or train"):
        build_student(small_recipe(tmp_path, student=NetworkConfig(str(far)), stage="on_policy"))
    with pytest.raises(ValueError, match="a causal model, which stage=teacher does not train"):
        build_student(small_recipe(tmp_path, student=NetworkConfig(str(far)), stage="teacher"))


def test_teacher_and_critic_are_the_bidirectional_model_of_a_causal_folder(
    small_recipe: Make, tmp_path: Path, folders: tuple[Path, Path], generator: torch.Generator
) -> None:
    far = AnyFlowFARTransformer3DModel.from_pretrained(folders[1])
    weights = WeightsConfig(str(folders[1]))
    stage = OnPolicyStageConfig(
        weights, OnPolicyConfig(cotrain_pretrain=True, causal=CausalConfig()), weights
    )
    recipe = _causal_recipe(
        small_recipe,
        tmp_path,
        NetworkConfig(str(folders[1])),
        stage="on_policy",
        on_policy=stage,
    )
    teacher = build_teacher(recipe)
    x, text = (torch.randn(s, generator=generator) for s in ((1, 4, 8, 6, 6), (1, 3, 32)))
    t = torch.full((1,), 600.0)
    expected = far(x, t, t, text, is_causal=False).sample
    for network in (teacher, build_critic(recipe, teacher)):
        assert type(network) is AnyFlowTransformer3DModel
        torch.testing.assert_close(network(x, t, t, text).sample, expected, rtol=0, atol=1e-5)
    assert isinstance(build_student(recipe), AnyFlowFARTransformer3DModel)


# Data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "causal", "message"),
    [
        (
            CausalSettings((1, 6, 6), 2, (1, 2, 2)),
            CausalConfig(),
            r"4 frames, and the chunks \(1, 2, 2\) of the student have 5: give chunks of all "
            r"frames as pretrain\.causal\.chunk_partition",
        ),
        (SETTINGS, CausalConfig((3, 2)), r"the chunks \(3, 2\) of the pretrain\.causal have 5"),
        (
            CausalSettings((1, 4, 4), 2, (1, 2, 1)),
            CausalConfig(),
            "height 6 must be a positive multiple of 4 where a frame is compressed",
        ),
    ],
)
def test_videos_that_the_chunks_do_not_make_up_are_refused_before_the_run(
    settings: CausalSettings, causal: CausalConfig, message: str, small_recipe: Make, tmp_path: Path
) -> None:
    network = NetworkConfig(architecture=ArchitectureConfig(**SIZES), causal=settings)
    pretrain = dataclasses.replace(METHOD, causal=causal)
    with pytest.raises(ValueError, match=message):
        train(small_recipe(tmp_path / "run", student=network, pretrain=pretrain))
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_rows_need_not_fit_compressed_patches_where_all_chunks_are_full(
    small_recipe: Make, tmp_path: Path
) -> None:
    settings = CausalSettings((1, 4, 4), 3, (1, 2, 1))
    network = NetworkConfig(architecture=ArchitectureConfig(**SIZES), causal=settings)
    train(_causal_recipe(small_recipe, tmp_path / "run", network, steps=1))
    assert (tmp_path / "run" / "model" / "transformer").is_dir()
