"""Test whole runs: what they refuse, and what they leave."""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from run_files import checkpoint, invoke_train, metrics, write_recipe
from typer.testing import CliRunner

from anyflow.cli import app
from anyflow.models import AnyFlowTransformer3DModel
from anyflow.training.config import (
    ArchitectureConfig,
    LoRAConfig,
    MetricsConfig,
    NetworkConfig,
    OptimizerConfig,
    PreviewConfig,
    Recipe,
)
from anyflow.training.recipe import dump_recipe
from anyflow.training.trainer import train

Make = Callable[..., Recipe]


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
    file = write_recipe(small_recipe(tmp_path / "run"), tmp_path / "recipe.yaml")
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["train", str(file), *arguments])
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), result.exception
    assert result.stderr.count("\n") == 1 and message in result.stderr
    assert result.stdout == "" and not (tmp_path / "run").exists()


def test_the_whole_recipe_can_be_printed(small_recipe: Make, tmp_path: Path) -> None:
    file = write_recipe(small_recipe(tmp_path / "run"), tmp_path / "recipe.yaml")
    status, printed = invoke_train(file, "steps=7", "--print-config")
    assert status == 0 and printed == dump_recipe(small_recipe(tmp_path / "run", steps=7))
    assert not (tmp_path / "run").exists()


def test_lora_checkpoints_hold_what_trains_and_the_model_has_it_merged(
    small_recipe: Make, tmp_path: Path
) -> None:
    architecture = small_recipe(tmp_path).student.architecture
    student = NetworkConfig(architecture=architecture, lora=LoRAConfig(rank=2, alpha=4.0))
    recipe = small_recipe(tmp_path, stage="pretrain", student=student, steps=2)
    train(recipe)
    names = {name for name in checkpoint(recipe, 2) if name.startswith(("student/", "ema/"))}
    assert names and all("lora_" in name or "_embedder." in name for name in names)
    model = AnyFlowTransformer3DModel.from_pretrained(tmp_path / "model" / "transformer")
    assert not any("lora" in name for name in model.state_dict())


def test_a_line_has_the_means_since_the_last_one(small_recipe: Make, tmp_path: Path) -> None:
    """Stop a run in between too; the rates are of the last update."""
    rates = OptimizerConfig(lr=1e-3, warmup_steps=5)
    train(small_recipe(tmp_path / "each", steps=5, optimizer=rates))
    train(small_recipe(tmp_path / "window", steps=3, log_every=4, optimizer=rates))
    train(small_recipe(tmp_path / "window", steps=5, log_every=4, optimizer=rates))
    each, window = metrics(tmp_path / "each"), metrics(tmp_path / "window")
    assert [line["step"] for line in window] == [1, 4] and window[0] == each[0]
    for name in set(each[1]) - {"step", "lr"}:
        assert window[1][name] == sum(line[name] for line in each[1:4]) / 3
    assert window[1]["lr"] == each[3]["lr"]


def _charts(events: Any) -> dict[str, list[str]]:
    """Return the curves of each chart under Custom Scalars, as TensorBoard reads them."""
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
    sampled = MetricsConfig(every=1, step_counts=(1, 4), num_samples=2, reference_steps=6)
    train(
        small_recipe(tmp_path, steps=2, loggers=("tensorboard",), preview=preview, metrics=sampled)
    )
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2]
    assert events.Scalars("loss")[1].value == pytest.approx(metrics(tmp_path)[1]["loss"])
    assert [e.step for e in events.Images("preview")] == [2]
    for count in (1, 4):
        name = f"metrics/psnr/{count}_steps"
        assert [(e.step, e.value) for e in events.Scalars(name)] == [
            (line["step"], pytest.approx(line[name])) for line in metrics(tmp_path)
        ]
    charts = _charts(events)
    assert charts["motion"] == [
        rf"^metrics/motion/{which}$" for which in ("1_steps", "4_steps", "real")
    ]
    assert charts["psnr"] == [rf"^metrics/psnr/{which}$" for which in ("1_steps", "4_steps")]
    (settings,) = (tmp_path / "tensorboard").glob("*/hparams.yml")
    assert "optimizer.lr: 0.001" in settings.read_text()
