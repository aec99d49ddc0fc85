"""Test runs that are finished, killed, stopped and started again in the same folder."""

import dataclasses
import importlib.util
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from run_files import checkpoint, metrics, reported, train_command, write_recipe

from anyflow.data import open_dataset
from anyflow.models import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel
from anyflow.training.checkpoint import Checkpointer
from anyflow.training.config import (
    CheckpointConfig,
    DataConfig,
    MetricsConfig,
    OptimizerConfig,
    PreviewConfig,
    Recipe,
    ValidationConfig,
)
from anyflow.training.distributed import Mesh
from anyflow.training.held_out import split_data, validation_losses
from anyflow.training.manifest import Manifest
from anyflow.training.metrics import keep_until
from anyflow.training.trainer import _build_samples, _build_updates, train

Make = Callable[..., Recipe]


def _wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("stage", ["pretrain", "on_policy"])
def test_a_run_that_was_killed_ends_bit_for_bit_as_one_that_was_not(
    stage: str,
    causal: bool,
    small_recipe: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kill a process with a worker; the other run, and the rest of this one, are made here."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    recipes = [
        small_recipe(
            tmp_path / name,
            stage=stage,
            causal=causal,
            steps=12,
            num_threads=1,
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
    process = subprocess.Popen(
        train_command(write_recipe(killed, tmp_path / "killed.yaml")),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _wait_for(lambda: reported(tmp_path / "killed") >= 3, process)  # of the steps 1, 4 and 8
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model").exists()
    here = dataclasses.replace(killed.data, num_workers=0)
    train(dataclasses.replace(killed, data=here))
    assert "Resuming after step 6" in capsys.readouterr().out
    train(dataclasses.replace(straight, data=here))

    assert [line["step"] for line in metrics(tmp_path / "straight")] == [1, 4, 8, 12]
    assert ["metrics/psnr/2_steps" in line for line in metrics(tmp_path / "straight")] == [
        False,
        True,
        True,
        True,
    ]
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "straight")
    infos = [Manifest.read(Path(r.out) / "checkpoints" / "step-00000012").info for r in recipes]
    assert infos[0]["consumed"] == infos[1]["consumed"] == 12 * 2 * 2
    one, other = (checkpoint(recipe, 12) for recipe in recipes)
    assert {name.split("/")[0] for name in one} >= {"student", "optimizer", "ema"}
    assert any(name.startswith("critic/") for name in one) == (stage == "on_policy")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    network = AnyFlowFARTransformer3DModel if causal else AnyFlowTransformer3DModel
    models = [
        network.from_pretrained(Path(r.out) / "model" / "transformer").state_dict() for r in recipes
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
    """Send SIGINT to the workers of the data too, as Ctrl-C does."""
    out = tmp_path / "run"
    recipe = small_recipe(
        out,
        steps=100_000,
        checkpoint=CheckpointConfig(every=100_000),
        data=DataConfig(kind="synthetic", batch_size=4, num_workers=2),
    )
    file = write_recipe(recipe, tmp_path / "recipe.yaml")
    process = subprocess.Popen(
        train_command(file),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    _wait_for(lambda: reported(out) >= 3, process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0 and "Traceback" not in stderr, (stdout, stderr)
    done = Checkpointer(out / "checkpoints", keep=1).steps()
    assert done == [reported(out)] and f"Stopped after step {done[0]}" in stdout
    assert not (out / "model").exists()

    here = dataclasses.replace(recipe.data, num_workers=0)
    train(dataclasses.replace(recipe, steps=done[0] + 2, data=here))
    assert [line["step"] for line in metrics(out)] == list(range(1, done[0] + 3))


@pytest.mark.slow
def test_two_processes_train_one_model_and_one_process_resumes_it(
    small_recipe: Make, tmp_path: Path, fork_ranks: Callable[..., subprocess.Popen[str]]
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
    script, file = Path(__file__).parent / "scripts" / "train_recipe.py", tmp_path / "recipe.yaml"
    job = fork_ranks(2, script, write_recipe(recipe, file))
    output, _ = job.communicate(timeout=600)
    assert job.returncode == 0 and output.count("Finished 2 steps") == 1, output
    assert (out / "previews" / "step-00000002.gif").is_file()
    average = {
        k.removeprefix("ema/"): v for k, v in checkpoint(recipe, 2).items() if k.startswith("ema/")
    }
    model = AnyFlowTransformer3DModel.from_pretrained(out / "model" / "transformer").state_dict()
    assert average and all(torch.equal(model[name], tensor) for name, tensor in average.items())

    alone = dataclasses.replace(
        recipe, steps=3, data=dataclasses.replace(recipe.data, batch_size=4)
    )
    mesh, data, line = Mesh(torch.device("cpu")), open_dataset(alone.data), metrics(out)[1]
    step = _build_updates(alone, mesh, data)
    Checkpointer(out / "checkpoints", keep=1).load(
        out / "checkpoints" / "step-00000002", step.tensors()
    )
    once = validation_losses(
        alone, mesh, split_data(alone, data), data.negative_prompt_embeds, step
    )
    assert once == pytest.approx({name: line[name] for name in once}, rel=1e-5)
    measured = {name: value for name, value in line.items() if name.startswith("metrics/")}
    samples = _build_samples(alone, mesh, data, Console(quiet=True))
    again = samples.metrics.evaluate(step, 2, Console(quiet=True))
    del again["metrics/seconds"]
    # Rounded pixels of a sharded network may be off by a level.
    assert len(measured) > 10 and measured == pytest.approx(again, rel=1e-3)
    train(alone)
    assert [line["step"] for line in metrics(out)] == [1, 2, 3]
    assert Manifest.read(out / "checkpoints" / "step-00000003").info["consumed"] == 3 * 4


def test_a_finished_run_says_so_and_one_with_more_steps_resumes(
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
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight")
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


def test_checkpoints_without_a_recipe_are_not_touched(small_recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match=r"has checkpoints but no recipe\.yaml"):
        train(small_recipe(tmp_path))
