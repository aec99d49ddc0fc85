"""Test runs into values that are not finite: the network is named, and the advice helps."""

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_files import invoke_train, metrics, reported, write_recipe

from anyflow.data import Batch, SyntheticVideos
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.training.config import (
    CheckpointConfig,
    NetworkConfig,
    OptimizerConfig,
    Recipe,
    WeightsConfig,
)
from anyflow.training.distributed import Mesh
from anyflow.training.manifest import Manifest
from anyflow.training.optimization import TrainingError
from anyflow.training.trainer import _build_updates, train

Make = Callable[..., Recipe]
ADVICE = re.compile(r"[\w.]+=[\w.+-]+")


def test_weights_that_are_not_finite_stop_the_run_before_its_first_update(
    small_recipe: Make, tmp_path: Path
) -> None:
    """Train from a folder whose weights overflow."""
    sizes = dataclasses.asdict(small_recipe(tmp_path).student.architecture)
    model = AnyFlowTransformer3DModel(**sizes)
    with torch.no_grad():
        model.proj_out.weight[3, 3] = torch.inf
    model.save_pretrained(tmp_path / "model")
    recipe = small_recipe(tmp_path / "run", student=NetworkConfig(path=str(tmp_path / "model")))
    with pytest.raises(TrainingError, match="step 1: loss of the student is not finite"):
        train(recipe)
    assert (
        not list((tmp_path / "run" / "checkpoints").glob("*")) and reported(tmp_path / "run") == 0
    )


def test_a_rate_that_is_far_too_large_stops_the_run(small_recipe: Make, tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "run", steps=50, optimizer=OptimizerConfig(lr=1e30))
    with pytest.raises(TrainingError, match=r"step [2-9]: loss of the student is not finite"):
        train(recipe)


def test_what_the_guard_advises_can_be_done_in_the_same_folder(
    small_recipe: Make, tmp_path: Path
) -> None:
    """Run into infinity, and take every setting that the error names until the run ends."""
    file = write_recipe(
        small_recipe(tmp_path / "run", precision="bf16", optimizer=OptimizerConfig(lr=1e25)),
        tmp_path / "r",
    )
    status, printed = invoke_train(file)
    assert (
        status == 1
        and "step 2: loss of the student is not finite" in printed
        and "starts anew" in printed
    )
    advised = ADVICE.findall(printed.partition("The same command")[2])
    assert advised == ["optimizer.lr=1e+24", "optimizer.warmup_steps=100", "precision=fp32"]
    # still far too large a rate: the same error, not a refusal
    for number, advice in enumerate(advised, 1):
        status, printed = invoke_train(file, *advised[:number])
        assert status == 1 and f"The run resumes with {advice}" in printed.replace("e24", "e+24"), (
            printed
        )
    settings = ["precision=fp32", "optimizer.warmup_steps=100", "optimizer.lr=1e-3"]
    assert invoke_train(file, *settings)[0] == 0
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_checkpoint_that_is_past_help_is_left_as_advised(
    small_recipe: Make, tmp_path: Path
) -> None:
    """Resume from weights that are finite, and so large that no loss is."""
    recipe = small_recipe(
        tmp_path / "run", checkpoint=CheckpointConfig(every=1), optimizer=OptimizerConfig(lr=1e-3)
    )
    file = write_recipe(recipe, tmp_path / "r.yaml")
    assert invoke_train(file, "steps=1")[0] == 0
    status, printed = invoke_train(file, "optimizer.lr=1e15")
    assert (
        status == 1
        and "step 3: loss of the student is not finite" in printed
        and "resumes after step 2" in printed
    )
    status, printed = invoke_train(file, "optimizer.lr=1e-3")
    assert status == 1 and "step 3: loss" in printed
    delete = Path(re.search(r"delete (\S+), and it resumes after step 1", printed)[1])
    shutil.rmtree(delete)
    status, printed = invoke_train(file, "optimizer.lr=1e-4")
    assert status == 0 and "Resuming after step 1" in printed
    info = Manifest.read(delete.parent / "step-00000004").info
    assert info["changes"] == [{"step": 1, "settings": {"optimizer.lr": [1e-3, 1e-4]}}]
    assert info["settings"]["optimizer.lr"] == 1e-4

    status, printed = invoke_train(file, "optimizer.lr=1e-4", "precision=bf16", "steps=5")
    assert status == 0 and "The run resumes with precision=bf16 (fp32 before)" in printed
    changes = Manifest.read(delete.parent / "step-00000005").info["changes"]
    assert changes[1:] == [{"step": 4, "settings": {"precision": ["fp32", "bf16"]}}]


@pytest.mark.parametrize("network", ["student", "teacher", "critic"])
def test_a_network_of_stage_two_that_is_not_finite_is_named(
    network: str, small_recipe: Make, tmp_path: Path
) -> None:
    """Overflow the real weights of one network: its settings are advised, the data not blamed."""
    small = small_recipe(tmp_path / "run", stage="on_policy")
    model = AnyFlowTransformer3DModel(**dataclasses.asdict(small.student.architecture))
    with torch.no_grad():
        model.proj_out.weight[3, 3] = 1e38
        model.proj_out.bias[3] = 1e38
    model.save_pretrained(tmp_path / "model")
    broken = NetworkConfig(path=str(tmp_path / "model"))
    parts = {
        "student": {"student": broken},
        "teacher": {"teacher": broken},
        "critic": {"critic": broken},
    }[network]
    stage = dataclasses.replace(small.on_policy, **({} if network == "student" else parts))
    if network == "teacher":
        stage = dataclasses.replace(stage, critic=small.on_policy.teacher)
    recipe = dataclasses.replace(small, on_policy=stage, **(parts if network == "student" else {}))
    status, printed = invoke_train(write_recipe(recipe, tmp_path / "r.yaml"))
    phrase = "rollout of the student" if network == "student" else f"score of the {network}"
    assert status == 1 and f"step 1: {phrase} is not finite" in printed, printed
    advice = {
        "student": "with optimizer.lr=0.0001 or optimizer.warmup_steps=100 starts anew",
        "teacher": "The teacher does not train: give other weights as on_policy.teacher.path=",
        "critic": "with on_policy.critic_optimizer.lr=0.0001 or "
        "on_policy.critic_optimizer.warmup_steps=100 starts",
    }
    assert (
        advice[network] in printed
        and "data" not in printed
        and "first such gradient" not in printed
    )


def test_a_teacher_of_stage_one_that_is_not_finite_is_named(
    small_recipe: Make, tmp_path: Path
) -> None:
    """Blame the network that gives the target, not the student whose loss the target spoils."""
    small = small_recipe(tmp_path / "run")
    model = AnyFlowTransformer3DModel(**dataclasses.asdict(small.student.architecture))
    with torch.no_grad():
        model.proj_out.weight[3, 3] = torch.nan
    model.save_pretrained(tmp_path / "model")
    recipe = dataclasses.replace(
        small,
        teacher=WeightsConfig(path=str(tmp_path / "model")),
        pretrain=dataclasses.replace(small.pretrain, velocity_target="teacher"),
    )
    status, printed = invoke_train(write_recipe(recipe, tmp_path / "r.yaml"))
    assert status == 1 and "step 1: velocity of the teacher is not finite" in printed, printed
    assert "give other weights as teacher.path=" in printed


@pytest.mark.parametrize(("network", "phrase"), [("student", "1: rollout"), ("critic", "2: score")])
def test_a_network_that_diverges_in_stage_two_is_named_and_not_kept(
    network: str, phrase: str, small_recipe: Make, tmp_path: Path
) -> None:
    """Diverge in the rollouts after the student's update, or in the critic's next scores."""
    fast, small = OptimizerConfig(lr=1e36), small_recipe(tmp_path / "run", stage="on_policy")
    stage = (
        dataclasses.replace(small.on_policy, critic_optimizer=fast)
        if network == "critic"
        else small.on_policy
    )
    recipe = dataclasses.replace(
        small, on_policy=stage, optimizer=fast if network == "student" else small.optimizer
    )
    file = write_recipe(recipe, tmp_path / "r.yaml")
    status, printed = invoke_train(file)
    assert (
        status == 1
        and f"step {phrase} of the {network} is not finite" in printed
        and "data" not in printed
    ), printed
    status, printed = invoke_train(file, "checkpoint.every=1")
    assert status == 1 and f"of the {network} is not finite" in printed and "starts anew" in printed
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(("lr", "kept"), [(1e-3, 1), (1e25, 0), (1e39, 0)])
def test_no_checkpoint_has_weights_that_are_not_finite(
    lr: float, kept: int, small_recipe: Make, tmp_path: Path
) -> None:
    """Update by rates that leave weights finite, without a finite norm, or not finite."""
    file = write_recipe(
        small_recipe(tmp_path / "run", optimizer=OptimizerConfig(lr=lr), steps=1),
        tmp_path / "r.yaml",
    )
    status, printed = invoke_train(file)
    assert status == (0 if kept else 1)
    assert (
        "of the student is not finite, or its norm is not. No checkpoint was written" in printed
    ) == (not kept)
    assert len(list((tmp_path / "run").glob("checkpoints/step-*"))) == kept
    assert (tmp_path / "run" / "model").is_dir() == bool(kept)


def test_data_that_are_not_finite_are_to_blame_and_not_a_network(
    small_recipe: Make, tmp_path: Path
) -> None:
    step = _build_updates(small_recipe(tmp_path), Mesh(torch.device("cpu")), SyntheticVideos())
    data = SyntheticVideos()
    latents, prompts = (
        torch.stack([getattr(data[i], n) for i in (5, 6)]) for n in ("latents", "prompt_embeds")
    )
    latents[1, 0, 0, 0, 0] = torch.inf
    with pytest.raises(
        ValueError, match=r"the data's samples \[5, 6\]: latents holds NaN or infinite values"
    ):
        step.update([Batch(latents, prompts, (5, 6))], 0)
