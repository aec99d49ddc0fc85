"""The files a finished quickstart leaves: metrics, animations, the curve and the report."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

import anyflow
from anyflow.demo.config import DemoConfig, Stage
from anyflow.demo.world import World
from anyflow.evaluation import (
    EvaluationResults,
    RecipeStage,
    ReportData,
    any_step_figure,
    save_animation,
    save_figure,
    tile_videos,
    write_report,
)

_UPSCALE = 8


def write_results(
    config: DemoConfig,
    world: World,
    results: EvaluationResults,
    examples: Mapping[str, Mapping[int, Tensor]],
    out: Path,
) -> None:
    """Write ``metrics.json``, ``samples/*.gif``, ``curve.png`` and ``report.html`` into ``out``."""
    classes = world.shapes.num_classes
    labels = torch.arange(classes).repeat(len(config.step_counts))
    real = world.shapes.to_uint8(world.shapes.sample(len(labels), world.generator(940), labels)[0])
    folder = out / "samples"
    folder.mkdir(exist_ok=True)
    for method, by_steps in examples.items():
        for steps, videos in by_steps.items():
            save_animation(folder / f"{method}_{steps}.gif", tile_videos(videos, 1, classes, upscale=_UPSCALE))
    save_animation(folder / "real.gif", tile_videos(real[:classes], 1, classes, upscale=_UPSCALE))
    figure = any_step_figure(
        results.values("fd"), floor=results.floor.fd, ylabel="Fréchet distance (lower is better)", size=(8.4, 4.5)
    )
    save_figure(figure, out / "curve.png", dpi=120)
    results.save(out / "metrics.json")
    data = ReportData(
        results=results,
        samples=examples,
        real_samples=real,
        recipe=_recipe(config, results.seconds),
        environment=_environment(config),
        class_names=world.shapes.class_names,
    )
    write_report(out / "report.html", data)


def _recipe(config: DemoConfig, seconds: Mapping[str, float]) -> list[RecipeStage]:
    steps = ", ".join(map(str, config.rollout_steps))
    return [
        _row("Flow matching", config.flow_matching, "trains the teacher and the starting point of everything else"),
        _row(
            "Stage 1: flow-map pretraining", config.pretrain, f"from flow matching; epsilon {config.epsilon} timesteps"
        ),
        _row("Stage 2: on-policy", config.on_policy, f"from stage 1; rollouts of {steps} steps; co-trained on data"),
        _row(
            "Baseline",
            config.baseline,
            f"flow matching continued for {seconds['baseline']:.0f} s, next to the "
            f"{seconds['pretrain'] + seconds['on_policy']:.0f} s of stages 1 and 2",
        ),
    ]


def _row(name: str, stage: Stage, notes: str) -> RecipeStage:
    rate = f"{stage.lr:g}{' cosine' if stage.cosine else ''}"
    if stage.critic_lr:
        rate += f", critic {stage.critic_lr:g}"
    return RecipeStage(name, stage.steps, stage.batch_size, rate, f"{stage.ema_decay:g}", notes)


def _environment(config: DemoConfig) -> dict[str, str]:
    return {
        "anyflow": anyflow.__version__,
        "PyTorch": torch.__version__,
        "Python": platform.python_version(),
        "device": torch.cuda.get_device_name() if config.device.startswith("cuda") else _cpu_name(),
        "threads": str(torch.get_num_threads()),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
