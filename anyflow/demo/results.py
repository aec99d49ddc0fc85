"""Write what a finished quickstart leaves, and merge the results of several seeds."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
    SeedResults,
    any_step_animation,
    any_step_figure,
    main_methods,
    save_animation,
    save_figure,
    tile_videos,
    write_report,
)
from anyflow.formats.readers import SafetensorsReader
from anyflow.utils.documents import is_no_folder, read_json, require_content, shortened
from anyflow.utils.writing import write_bytes, write_text

METRICS_FILE, REPORT_FILE = "metrics.json", "report.html"
CURVE_FILE, ANIMATION_FILE = "curve.png", "any_step.gif"
MERGED_FILES = (METRICS_FILE, REPORT_FILE, CURVE_FILE, ANIMATION_FILE)

_VIDEOS_FILE, _ABOUT_FILE = Path("samples", "videos.safetensors"), Path("samples", "about.json")
_REAL = "real"
_UPSCALE = 8


@dataclass(frozen=True)
class _About:
    """Hold what a report says of its run besides numbers and videos."""

    recipe: list[RecipeStage]
    environment: dict[str, str]
    class_names: list[str]


def write_results(
    config: DemoConfig,
    world: World,
    results: EvaluationResults,
    examples: Mapping[str, Mapping[int, Tensor]],
    out: Path,
) -> None:
    """Write the results of a run: metrics, samples, the curve, the animation and the report.

    The files in ``out`` are ``metrics.json``, ``samples/``, ``curve.png``, ``any_step.gif`` and
    ``report.html``. ``samples`` has an animation of each method and number of steps, and what
    :func:`merge_runs` reads.

    Args:
        config: settings of the run.
        world: its data.
        results: its scores.
        examples: ``[method][steps]``, one video per class ``[N, F, H, W]`` uint8.
        out: folder of the run.
    """
    classes = world.shapes.num_classes
    labels = torch.arange(classes).repeat(len(config.step_counts))
    real = world.shapes.to_uint8(world.shapes.sample(len(labels), world.generator(940), labels)[0])
    folder = out / "samples"
    folder.mkdir(exist_ok=True)
    for method, by_steps in examples.items():
        for steps, videos in by_steps.items():
            save_animation(
                folder / f"{method}_{steps}.gif", tile_videos(videos, 1, classes, upscale=_UPSCALE)
            )
    save_animation(folder / "real.gif", tile_videos(real[:classes], 1, classes, upscale=_UPSCALE))
    about = _About(
        _recipe(config, results.seconds), environment(config), list(world.shapes.class_names)
    )
    _write_samples(out, examples, real, about)
    results.save(out / METRICS_FILE)
    _write_pictures(
        ReportData(results, examples, real, about.recipe, about.environment, about.class_names), out
    )


def merge_runs(folders: Sequence[Path], out: Path) -> SeedResults:
    """Write one report of several finished runs, with error bars over their seeds.

    The videos of the report are the first run's.

    Args:
        folders: finished runs, which differ in nothing but their seed.
        out: folder for ``report.html``, ``curve.png``, ``any_step.gif`` and ``metrics.json``; an
            earlier report there is replaced.

    Raises:
        ValueError: a folder holds no finished run, or a damaged one; the runs cannot be merged
            (:class:`SeedResults`); or ``out`` is a file or holds other files.
        OSError: the system refuses to write.
    """
    results = SeedResults(tuple(_load_results(folder) for folder in folders))
    data = replace(_load_samples(folders[0]), results=results)
    if is_no_folder(out):
        raise ValueError(f"--out {shortened(out)} is a file; name a folder")
    if out.exists() and (other := sorted({p.name for p in out.iterdir()} - set(MERGED_FILES))):
        raise ValueError(
            f"--out {shortened(out)} holds other files ({shortened(other[0])}); name another folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    results.save(out / METRICS_FILE)
    _write_pictures(data, out)
    return results


def _write_pictures(data: ReportData, out: Path) -> None:
    results = SeedResults.of(data.results)
    figure = any_step_figure(
        results.values("fd"),
        ranges=results.ranges("fd"),
        floor=results.floor.fd,
        ylabel="Fréchet distance from real videos (lower is better)",
        size=(8.4, 4.5),
    )
    save_figure(figure, out / CURVE_FILE, dpi=120)
    write_bytes(
        out / ANIMATION_FILE, any_step_animation(data.samples, methods=main_methods(results))
    )
    write_report(out / REPORT_FILE, data)


# Files of a run, from which its report can be made again ------------------------------------------


def _write_samples(
    out: Path, examples: Mapping[str, Mapping[int, Tensor]], real: Tensor, about: _About
) -> None:
    from pydantic import TypeAdapter
    from safetensors.torch import save

    videos = {_REAL: real.contiguous()}
    for method, by_steps in examples.items():
        videos |= {f"{method}/{steps}": video.contiguous() for steps, video in by_steps.items()}
    write_bytes(out / _VIDEOS_FILE, save(videos))
    write_text(out / _ABOUT_FILE, TypeAdapter(_About).dump_json(about, indent=2).decode() + "\n")


def _load_results(folder: Path) -> EvaluationResults:
    if not folder.is_dir():
        raise ValueError(
            f"{shortened(folder)} is not a folder; name the folders of finished runs of `anyflow "
            "demo`"
        )
    if not (folder / METRICS_FILE).exists():
        raise ValueError(
            f"{shortened(folder)} holds no finished run of `anyflow demo`: it has no {METRICS_FILE}"
        )
    return EvaluationResults.load(folder / METRICS_FILE)


def _load_samples(folder: Path) -> ReportData:
    """Read videos and texts of a finished run."""
    from pydantic import TypeAdapter, ValidationError

    results, examples = _load_results(folder), dict[str, dict[int, Tensor]]()
    file = require_content(folder / _VIDEOS_FILE)
    reader = SafetensorsReader((file,), None)
    for name in reader.infos:
        if name != _REAL:
            method, _, steps = name.rpartition("/")
            if not method or not steps.isdecimal():
                raise ValueError(
                    f"{shortened(file)}: {shortened(name)} should be a method and a number of steps"
                )
            examples.setdefault(method, {})[int(steps)] = reader.read(name)
    if _REAL not in reader.infos:
        raise ValueError(f"{shortened(file)} has no real videos")
    try:
        about = TypeAdapter(_About).validate_python(read_json(folder / _ABOUT_FILE))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) if first["loc"] else "it"
        raise ValueError(
            f"{shortened(folder / _ABOUT_FILE)} is damaged: {where}: {first['msg']}"
        ) from None
    examples = {m: dict(sorted(examples[m].items())) for m in results.curves if m in examples}
    return ReportData(
        results, examples, reader.read(_REAL), about.recipe, about.environment, about.class_names
    )


def _recipe(config: DemoConfig, seconds: Mapping[str, float]) -> list[RecipeStage]:
    steps = ", ".join(map(str, config.rollout_steps))
    target = (
        "velocities of the teacher"
        if config.velocity_target == "teacher"
        else "velocities of data and noise"
    )
    return [
        stage_row(
            "Flow matching",
            config.flow_matching,
            f"{seconds['flow_matching']:.0f} s; the competitor, and the teacher and the start of "
            "stage 1",
        ),
        stage_row(
            "Stage 1: flow-map pretraining",
            config.pretrain,
            f"{seconds['pretrain']:.0f} s more; on {target}; epsilon {config.epsilon} timesteps",
        ),
        stage_row(
            "Stage 2: on-policy",
            config.on_policy,
            f"{seconds['on_policy']:.0f} s more; rollouts of {steps} steps; co-trained as in stage "
            "1",
        ),
    ]


def stage_row(name: str, stage: Stage, notes: str) -> RecipeStage:
    """Return a stage as a line of the recipe table."""
    rate = f"{stage.lr:g}{' cosine' if stage.cosine else ''}"
    if stage.critic_lr:
        rate += f", critic {stage.critic_lr:g}"
    return RecipeStage(name, stage.steps, stage.batch_size, rate, f"{stage.ema_decay:g}", notes)


def environment(config: DemoConfig) -> dict[str, str]:
    """Return what a page says of the machine and the versions."""
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
