"""Test whole runs: finished, killed, stopped, resumed, refused."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from anyflow.cli import app
from anyflow.data import Batch, SyntheticVideos, open_dataset
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.training.checkpoint import Checkpointer
from anyflow.training.config import (
    ArchitectureConfig,
    CheckpointConfig,
    DataConfig,
    LoRAConfig,
    MetricsConfig,
    NetworkConfig,
    OptimizerConfig,
    PreviewConfig,
    Recipe,
    ValidationConfig,
    WeightsConfig,
)
from anyflow.training.distributed import Mesh
from anyflow.training.held_out import split_data, validation_losses
from anyflow.training.manifest import Manifest
from anyflow.training.metrics import keep_until
from anyflow.training.optimization import TrainingError
from anyflow.training.recipe import dump_recipe
from anyflow.training.trainer import _build_samples, _build_updates, train

Make = Callable[..., Recipe]
TIMING = (
    "seconds",
    "metrics/seconds",
    "samples_per_second",
    "tokens_per_second",
    "tflops_per_second",
    "peak_memory_gb",
)


def _command(file: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "anyflow", "train", str(file), *arguments]


def _write(recipe: Recipe, file: Path) -> Path:
    file.write_text(dump_recipe(recipe))
    return file


def _metrics(out: Path) -> list[dict[str, float]]:
    """The lines without what depends on the clock."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines]


def _wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _reported(out: Path) -> int:
    file = out / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def _checkpoint(recipe: Recipe, step: int) -> dict[str, Tensor]:
    """Everything in a checkpoint of a run."""
    tensors = _build_updates(recipe, Mesh(torch.device("cpu")), open_dataset(recipe.data)).tensors()
    path = Path(recipe.out) / "checkpoints" / f"step-{step:08d}"
    Checkpointer(path.parent, keep=1).load(path, tensors)
    return tensors


def _files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.parametrize(("environment", "threads"), [({}, 1), ({"OMP_NUM_THREADS": "2"}, 2)])
def test_a_recipe_names_its_threads_and_the_environment_comes_first(
    environment: dict[str, str],
    threads: int,
    small_recipe: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Counting(Console):
        def print(self, *objects: object, **settings: object) -> None:
            found.append(torch.get_num_threads())

    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found: list[int] = []
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        train(small_recipe(tmp_path, steps=1, num_threads=1), console=Counting(quiet=True))
        assert set(found) == {threads} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# Resuming -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "on_policy"])
def test_a_run_that_was_killed_ends_bit_for_bit_as_one_that_was_not(
    stage: str, small_recipe: Make, tmp_path: Path
) -> None:
    recipes = [
        small_recipe(
            tmp_path / name,
            stage=stage,
            steps=12,
            checkpoint=CheckpointConfig(every=6),
            log_every=4,  # the checkpoint is within a window of means
            gradient_accumulation=2,
            data=DataConfig(kind="synthetic", batch_size=2, num_workers=1),
            optimizer=OptimizerConfig(lr=1e-3, schedule="cosine", warmup_steps=4),
            metrics=MetricsConfig(every=4, step_counts=(1, 2), num_samples=2, reference_steps=3),
        )
        for name in ("straight", "killed")
    ]
    straight, killed = recipes
    subprocess.run(
        _command(_write(straight, tmp_path / "straight.yaml")), check=True, capture_output=True
    )

    file = _write(killed, tmp_path / "killed.yaml")
    process = subprocess.Popen(
        _command(file), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    _wait_for(lambda: _reported(tmp_path / "killed") >= 3, process)  # of the steps 1, 4 and 8
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model").exists()
    resumed = subprocess.run(_command(file), check=True, capture_output=True, text=True)
    assert "Resuming after step 6" in resumed.stdout

    assert [line["step"] for line in _metrics(tmp_path / "straight")] == [1, 4, 8, 12]
    assert ["metrics/psnr/2_steps" in line for line in _metrics(tmp_path / "straight")] == [
        False,
        True,
        True,
        True,
    ]
    assert _metrics(tmp_path / "killed") == _metrics(tmp_path / "straight")
    infos = [Manifest.read(Path(r.out) / "checkpoints" / "step-00000012").info for r in recipes]
    assert infos[0]["consumed"] == infos[1]["consumed"] == 12 * 2 * 2
    one, other = (_checkpoint(recipe, 12) for recipe in recipes)
    assert {name.split("/")[0] for name in one} >= {"student", "optimizer", "ema"}
    assert any(name.startswith("critic/") for name in one) == (stage == "on_policy")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    models = [
        AnyFlowTransformer3DModel.from_pretrained(
            Path(r.out) / "model" / "transformer"
        ).state_dict()
        for r in recipes
    ]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert all(
        torch.equal(models[0][n.removeprefix("ema/")], t)
        for n, t in one.items()
        if n.startswith("ema/")
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_with_a_checkpoint_and_status_zero(
    number: signal.Signals, small_recipe: Make, tmp_path: Path
) -> None:
    """A Ctrl-C reaches the workers of the data too."""
    out = tmp_path / "run"
    recipe = small_recipe(
        out,
        steps=100_000,
        checkpoint=CheckpointConfig(every=100_000),
        data=DataConfig(kind="synthetic", batch_size=4, num_workers=2),
    )
    file = _write(recipe, tmp_path / "recipe.yaml")
    process = subprocess.Popen(
        _command(file),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    _wait_for(lambda: _reported(out) >= 3, process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0 and "Traceback" not in stderr, (stdout, stderr)
    done = Checkpointer(out / "checkpoints", keep=1).steps()
    assert done == [_reported(out)] and f"Stopped after step {done[0]}" in stdout
    assert not (out / "model").exists()

    train(dataclasses.replace(recipe, steps=done[0] + 2))
    assert [line["step"] for line in _metrics(out)] == list(range(1, done[0] + 3))


@pytest.mark.slow
def test_two_processes_train_one_model_and_one_process_goes_on_with_it(
    small_recipe: Make, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    recipe = small_recipe(
        out,
        steps=2,
        data=DataConfig(kind="synthetic", batch_size=2, num_workers=0),
        preview=PreviewConfig(every=2, step_counts=(1,), num_samples=1),
        # a rank evaluates one video, the other two
        validation=ValidationConfig(every=2, num_samples=3),
        metrics=MetricsConfig(every=2, step_counts=(1, 2), num_samples=3, reference_steps=4),
        loggers=("tensorboard",) if importlib.util.find_spec("tensorboard") else (),
    )
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    file = _write(recipe, tmp_path / "recipe.yaml")
    result = subprocess.run([*torchrun, *_command(file)[1:]], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("Finished 2 steps") == 1
    assert (out / "previews" / "step-00000002.gif").is_file()
    average = {
        k.removeprefix("ema/"): v for k, v in _checkpoint(recipe, 2).items() if k.startswith("ema/")
    }
    model = AnyFlowTransformer3DModel.from_pretrained(out / "model" / "transformer").state_dict()
    assert average and all(torch.equal(model[name], tensor) for name, tensor in average.items())

    alone = dataclasses.replace(
        recipe, steps=3, data=dataclasses.replace(recipe.data, batch_size=4)
    )
    step, data = (
        _build_updates(alone, Mesh(torch.device("cpu")), open_dataset(alone.data)),
        open_dataset(alone.data),
    )
    Checkpointer(out / "checkpoints", keep=1).load(
        out / "checkpoints" / "step-00000002", step.tensors()
    )
    once = validation_losses(
        *(alone, Mesh(torch.device("cpu")), split_data(alone, data), data.negative_prompt_embeds),
        step,
    )
    assert once == pytest.approx({name: _metrics(out)[1][name] for name in once}, rel=1e-5)
    measured = {
        name: value for name, value in _metrics(out)[1].items() if name.startswith("metrics/")
    }
    samples = _build_samples(alone, Mesh(torch.device("cpu")), data, Console(quiet=True))
    again = samples.metrics.evaluate(step, 2, Console(quiet=True))
    del again["metrics/seconds"]
    # Rounded pixels of a sharded network may be off by a level.
    assert len(measured) > 10 and measured == pytest.approx(again, rel=1e-3)
    train(alone)
    assert [line["step"] for line in _metrics(out)] == [1, 2, 3]
    assert Manifest.read(out / "checkpoints" / "step-00000003").info["consumed"] == 3 * 4


def test_a_finished_run_says_so_and_one_with_more_steps_goes_on(
    small_recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = small_recipe(tmp_path / "run", steps=2)
    train(recipe)
    files = {path: path.stat().st_mtime_ns for path in _files(tmp_path / "run")}
    capsys.readouterr()
    train(recipe)
    assert "finished after 2 steps" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in _files(tmp_path / "run")} == files

    longer = dataclasses.replace(recipe, steps=3, log_every=1, device=None)
    train(longer)
    assert (tmp_path / "run" / "model").is_dir() and (
        tmp_path / "run" / "model-step-00000002"
    ).is_dir()
    straight = small_recipe(tmp_path / "straight", steps=3)
    train(straight)
    assert _metrics(tmp_path / "run") == _metrics(tmp_path / "straight")
    assert "steps: 3" in (tmp_path / "run" / "recipe.yaml").read_text()

    with pytest.raises(ValueError, match=r"steps=2, but the run in .* has done 3"):
        train(recipe)


def test_a_run_killed_before_its_export_exports_when_started_again(
    small_recipe: Make, tmp_path: Path
) -> None:
    recipe = small_recipe(tmp_path, steps=1)
    train(recipe)
    model = tmp_path / "model"
    before = (model / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    model.rename(tmp_path / "elsewhere")
    train(recipe)
    assert (model / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == before


def test_metrics_after_the_step_and_torn_lines_are_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": NaN}\n{"step": 11}\n{"step": 21}\n{"step": 3')
    keep_until(file, 20)
    assert file.read_text() == '{"step": 1, "loss": NaN}\n{"step": 11}\n'
    keep_until(tmp_path / "missing.jsonl", 20)
    assert not (tmp_path / "missing.jsonl").exists()


@pytest.mark.parametrize(
    "line",
    ["", "{", "[1]", '{"loss": 1}', '{"step": "3"}', '{"step": true}', '{"step": NaN}', "\0\0"],
)
def test_a_line_of_metrics_that_is_none_is_named_unless_it_is_the_last(
    tmp_path: Path, line: str
) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"step": 1}}\n{line}\n{{"step": 21}}\n')
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        keep_until(file, 30)
    assert file.read_bytes() == before
    file.write_text(f'{{"step": 1}}\n{line or " "}\n')
    keep_until(file, 30)
    assert file.read_text() == '{"step": 1}\n'


# What is refused ----------------------------------------------------------------------------------


def test_an_existing_checkpoint_is_not_written_over_without_resume(
    small_recipe: Make, tmp_path: Path
) -> None:
    recipe = small_recipe(tmp_path, steps=1)
    train(recipe)
    files = _files(tmp_path)
    with pytest.raises(ValueError, match="has the checkpoint step-00000001; resume with --resume"):
        train(dataclasses.replace(recipe, steps=2), resume=False)
    assert _files(tmp_path) == files


def test_another_recipe_and_other_data_are_refused(small_recipe: Make, tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, steps=1)
    train(recipe)
    changed = dataclasses.replace(
        recipe, seed=1, optimizer=OptimizerConfig(lr=2e-3, eps=1e-7), log_every=5
    )
    with pytest.raises(
        ValueError, match=r"differs in optimizer\.eps \(1e-08 there, 1e-07 here\), seed \(0 there"
    ):
        train(changed)
    manifest = tmp_path / "checkpoints" / "step-00000001"
    saved = Manifest.read(manifest)
    dataclasses.replace(saved, info={**saved.info, "fingerprint": "other"}).write(manifest)
    with pytest.raises(
        ValueError, match="these are not the videos that the run .* has been trained on"
    ):
        train(dataclasses.replace(recipe, steps=2))


def _architecture(recipe: Recipe, **changes: object) -> NetworkConfig:
    assert isinstance(recipe.student.architecture, ArchitectureConfig)
    return NetworkConfig(architecture=dataclasses.replace(recipe.student.architecture, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"in_channels": 16, "out_channels": 16},
            "latents have 8 channels, the student takes 16 and gives 16",
        ),
        ({"text_dim": 64}, "prompts have width 32, the student takes text_dim=64"),
        ({"patch_size": (1, 4, 4)}, "latents have 6 rows; the student takes multiples of 4"),
        (
            {"rope_max_seq_len": 2},
            "latents have 4 frames; the student takes multiples of 1 up to 2",
        ),
    ],
)
def test_data_that_do_not_fit_the_network_are_refused(
    changes: dict[str, object], message: str, small_recipe: Make, tmp_path: Path
) -> None:
    recipe = small_recipe(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        train(dataclasses.replace(recipe, student=_architecture(recipe, **changes)))
    assert not (tmp_path / "run").exists()


def test_a_critic_that_does_not_fit_the_data_is_refused(small_recipe: Make, tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "run", stage="on_policy")
    stage = dataclasses.replace(recipe.on_policy, critic=_architecture(recipe, text_dim=64))
    with pytest.raises(ValueError, match=r"the on_policy\.critic takes text_dim=64"):
        train(dataclasses.replace(recipe, on_policy=stage))
    assert not (tmp_path / "run").exists()


def test_checkpoints_without_a_recipe_are_not_touched(small_recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"has checkpoints but no recipe\.yaml"):
        train(small_recipe(tmp_path))


def test_weights_that_are_not_finite_stop_the_run_before_its_first_update(
    small_recipe: Make, tmp_path: Path
) -> None:
    """Real ones: a folder whose weights overflow."""
    sizes = dataclasses.asdict(small_recipe(tmp_path).student.architecture)
    model = AnyFlowTransformer3DModel(**sizes)
    with torch.no_grad():
        model.proj_out.weight[3, 3] = torch.inf
    model.save_pretrained(tmp_path / "model")
    recipe = small_recipe(tmp_path / "run", student=NetworkConfig(path=str(tmp_path / "model")))
    with pytest.raises(TrainingError, match="step 1: loss of the student is not finite"):
        train(recipe)
    assert (
        not list((tmp_path / "run" / "checkpoints").glob("*")) and _reported(tmp_path / "run") == 0
    )


def test_a_rate_that_is_far_too_large_stops_the_run(small_recipe: Make, tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "run", steps=50, optimizer=OptimizerConfig(lr=1e30))
    with pytest.raises(TrainingError, match=r"step [2-9]: loss of the student is not finite"):
        train(recipe)


ADVICE = re.compile(r"[\w.]+=[\w.+-]+")


def _train(file: Path, *arguments: str) -> tuple[int, str]:
    """The command: exit status and everything printed."""
    result = CliRunner().invoke(app, ["train", str(file), *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_what_the_guard_advises_can_be_done_in_the_same_folder(
    small_recipe: Make, tmp_path: Path
) -> None:
    """A run into infinity; every setting that its error names is taken, and one after another leads
    to the end.
    """
    file = _write(
        small_recipe(tmp_path / "run", precision="bf16", optimizer=OptimizerConfig(lr=1e25)),
        tmp_path / "r",
    )
    status, printed = _train(file)
    assert (
        status == 1
        and "step 2: loss of the student is not finite" in printed
        and "starts anew" in printed
    )
    advised = ADVICE.findall(printed.partition("The same command")[2])
    assert advised == ["optimizer.lr=1e+24", "optimizer.warmup_steps=100", "precision=fp32"]
    # still far too large a rate: the same error, not a refusal
    for number, advice in enumerate(advised, 1):
        status, printed = _train(file, *advised[:number])
        assert status == 1 and f"The run resumes with {advice}" in printed.replace("e24", "e+24"), (
            printed
        )
    settings = ["precision=fp32", "optimizer.warmup_steps=100", "optimizer.lr=1e-3"]
    assert _train(file, *settings)[0] == 0
    assert [line["step"] for line in _metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_checkpoint_that_is_past_help_is_left_as_advised(
    small_recipe: Make, tmp_path: Path
) -> None:
    """Its weights are finite, and so large that every loss is not."""
    recipe = small_recipe(
        tmp_path / "run", checkpoint=CheckpointConfig(every=1), optimizer=OptimizerConfig(lr=1e-3)
    )
    file = _write(recipe, tmp_path / "r.yaml")
    assert _train(file, "steps=1")[0] == 0
    status, printed = _train(file, "optimizer.lr=1e15")
    assert (
        status == 1
        and "step 3: loss of the student is not finite" in printed
        and "resumes after step 2" in printed
    )
    status, printed = _train(file, "optimizer.lr=1e-3")
    assert status == 1 and "step 3: loss" in printed
    delete = Path(re.search(r"delete (\S+), and it resumes after step 1", printed)[1])
    shutil.rmtree(delete)
    status, printed = _train(file, "optimizer.lr=1e-4")
    assert status == 0 and "Resuming after step 1" in printed
    info = Manifest.read(delete.parent / "step-00000004").info
    assert info["changes"] == [{"step": 1, "settings": {"optimizer.lr": [1e-3, 1e-4]}}]
    assert info["settings"]["optimizer.lr"] == 1e-4

    status, printed = _train(file, "optimizer.lr=1e-4", "precision=bf16", "steps=5")
    assert status == 0 and "The run resumes with precision=bf16 (fp32 before)" in printed
    changes = Manifest.read(delete.parent / "step-00000005").info["changes"]
    assert changes[1:] == [{"step": 4, "settings": {"precision": ["fp32", "bf16"]}}]


@pytest.mark.parametrize("network", ["student", "teacher", "critic"])
def test_a_network_of_stage_two_that_is_not_finite_is_named(
    network: str, small_recipe: Make, tmp_path: Path
) -> None:
    """Real weights that overflow; the data are not blamed, and the settings are those of that
    network.
    """
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
    status, printed = _train(_write(recipe, tmp_path / "r.yaml"))
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
    status, printed = _train(_write(recipe, tmp_path / "r.yaml"))
    assert status == 1 and "step 1: velocity of the teacher is not finite" in printed, printed
    assert "give other weights as teacher.path=" in printed


@pytest.mark.parametrize(("network", "phrase"), [("student", "1: rollout"), ("critic", "2: score")])
def test_a_network_that_diverges_in_stage_two_is_named_and_not_kept(
    network: str, phrase: str, small_recipe: Make, tmp_path: Path
) -> None:
    """The student's rollouts for the critic come after its own update; the critic's scores in the
    next step.
    """
    fast, small = OptimizerConfig(lr=1e36), small_recipe(tmp_path / "run", stage="on_policy")
    stage = (
        dataclasses.replace(small.on_policy, critic_optimizer=fast)
        if network == "critic"
        else small.on_policy
    )
    recipe = dataclasses.replace(
        small, on_policy=stage, optimizer=fast if network == "student" else small.optimizer
    )
    file = _write(recipe, tmp_path / "r.yaml")
    status, printed = _train(file)
    assert (
        status == 1
        and f"step {phrase} of the {network} is not finite" in printed
        and "data" not in printed
    ), printed
    status, printed = _train(file, "checkpoint.every=1")
    assert status == 1 and f"of the {network} is not finite" in printed and "starts anew" in printed
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(("lr", "kept"), [(1e-3, 1), (1e25, 0), (1e39, 0)])
def test_no_checkpoint_has_weights_that_are_not_finite(
    lr: float, kept: int, small_recipe: Make, tmp_path: Path
) -> None:
    """The rate of the first update decides whether its weights are, have a norm that is not, or are
    not.
    """
    file = _write(
        small_recipe(tmp_path / "run", optimizer=OptimizerConfig(lr=lr), steps=1),
        tmp_path / "r.yaml",
    )
    status, printed = _train(file)
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
        ValueError, match=r"the data's rows \[5, 6\]: latents holds NaN or infinite values"
    ):
        step.update([Batch(latents, prompts, (5, 6))], 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("steps=ten",), "steps"),
        (("stpes=10",), "steps"),
        (("student.lora={target_modules: [attn9]}",), "attn9"),
        (("parallel.shard=4",), "parallel"),
        (("pretrain={diffusion_ratio: 0.8, consistency_ratio: 0.4}",), "consistency_ratio"),
        (("pretrain.epsilon=0",), "pretrain.epsilon"),
        (("data={kind: latents, path: nowhere}",), "nowhere"),
        (("student={path: missing, architecture: null}",), "missing does not exist"),
        (("loggers=[trackio]",), "pip install trackio"),
    ],
)
def test_a_mistake_is_one_line_and_status_two_and_writes_nothing(
    arguments: tuple[str, ...],
    message: str,
    small_recipe: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "trackio" in message and importlib.util.find_spec("trackio") is not None:
        pytest.skip("trackio is installed")
    file = _write(small_recipe(tmp_path / "run"), tmp_path / "recipe.yaml")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["train", str(file), *arguments])
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.exception
    assert result.stderr.count("\n") == 1 and message in result.stderr
    assert result.stdout == "" and not (tmp_path / "run").exists()


def test_the_whole_recipe_can_be_printed(small_recipe: Make, tmp_path: Path) -> None:
    file = _write(small_recipe(tmp_path / "run"), tmp_path / "recipe.yaml")
    status, printed = _train(file, "steps=7", "--print-config")
    assert status == 0 and printed == dump_recipe(small_recipe(tmp_path / "run", steps=7))
    assert not (tmp_path / "run").exists()


# What a run leaves --------------------------------------------------------------------------------


def test_lora_checkpoints_hold_what_trains_and_the_model_has_it_merged(
    small_recipe: Make, tmp_path: Path
) -> None:
    architecture = small_recipe(tmp_path).student.architecture
    student = NetworkConfig(architecture=architecture, lora=LoRAConfig(rank=2, alpha=4.0))
    recipe = small_recipe(tmp_path, stage="pretrain", student=student, steps=2)
    train(recipe)
    names = {name for name in _checkpoint(recipe, 2) if name.startswith(("student/", "ema/"))}
    assert names and all("lora_" in name or "_embedder." in name for name in names)
    model = AnyFlowTransformer3DModel.from_pretrained(tmp_path / "model" / "transformer")
    assert not any("lora" in name for name in model.state_dict())


def test_a_line_has_the_means_since_the_last_one(small_recipe: Make, tmp_path: Path) -> None:
    """Also where a run stopped and went on in between; the rates are of the last update."""
    rates = OptimizerConfig(lr=1e-3, warmup_steps=5)
    train(small_recipe(tmp_path / "each", steps=5, optimizer=rates))
    train(small_recipe(tmp_path / "window", steps=3, log_every=4, optimizer=rates))
    train(small_recipe(tmp_path / "window", steps=5, log_every=4, optimizer=rates))
    each, window = _metrics(tmp_path / "each"), _metrics(tmp_path / "window")
    assert [line["step"] for line in window] == [1, 4] and window[0] == each[0]
    for name in set(each[1]) - {"step", "lr"}:
        assert window[1][name] == sum(line[name] for line in each[1:4]) / 3
    assert window[1]["lr"] == each[3]["lr"]


def _charts(events: Any) -> dict[str, list[str]]:
    """The curves of each chart under Custom Scalars, as TensorBoard reads them."""
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    (event,) = events.Tensors("custom_scalars__config__")
    (category,) = Layout.FromString(event.tensor_proto.string_val[0]).category
    assert category.title == "metrics"
    return {chart.title: list(chart.multiline.tag) for chart in category.chart}


def test_loggers_get_the_scalars_the_recipe_and_previews(
    small_recipe: Make, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    preview = PreviewConfig(every=2, step_counts=(1,), num_samples=1)
    metrics = MetricsConfig(every=1, step_counts=(1, 4), num_samples=2, reference_steps=6)
    train(
        small_recipe(tmp_path, steps=2, loggers=("tensorboard",), preview=preview, metrics=metrics)
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2]
    assert events.Scalars("loss")[1].value == pytest.approx(_metrics(tmp_path)[1]["loss"])
    assert [e.step for e in events.Images("preview")] == [2]
    for count in (1, 4):
        name = f"metrics/psnr/{count}_steps"
        assert [(e.step, e.value) for e in events.Scalars(name)] == [
            (line["step"], pytest.approx(line[name])) for line in _metrics(tmp_path)
        ]
    charts = _charts(events)
    assert charts["motion"] == [
        rf"^metrics/motion/{which}$" for which in ("1_steps", "4_steps", "real")
    ]
    assert charts["psnr"] == [rf"^metrics/psnr/{which}$" for which in ("1_steps", "4_steps")]
    (settings,) = (tmp_path / "tensorboard").glob("*/hparams.yml")
    assert "optimizer.lr: 0.001" in settings.read_text()
