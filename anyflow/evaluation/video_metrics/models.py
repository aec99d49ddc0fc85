"""Describe the metrics of videos, and the packages and pretrained models that they need.

Nothing is downloaded: a model that is missing is named with the place it is expected in.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anyflow.utils.documents import shortened
from anyflow.utils.packages import is_missing, missing, module_name

DEFAULT_FOLDER = Path("~/.cache/anyflow/evaluation")


@dataclass(frozen=True)
class VideoMetric:
    """Describe a metric of videos.

    Attributes:
        title: name of the metric in a table or at an axis.
        unit: unit of the values; empty for a plain number.
        better: ``higher`` or ``lower``; None where neither is, as for the amount of motion.
        packages: packages that the metric needs beside those of a base installation.
        model: pretrained model that the metric needs.
    """

    title: str
    unit: str
    better: str | None
    packages: tuple[str, ...] = ()
    model: PretrainedModel | None = None


@dataclass(frozen=True)
class PretrainedModel:
    """Describe a pretrained model that a metric needs.

    Attributes:
        path: expected place, relative to the folder of the models.
        files: names that must be in the folder ``path``; of a tuple, one is enough. Empty where
            ``path`` is a file.
        source: address where the model is published.
    """

    path: str
    source: str
    files: tuple[str | tuple[str, ...], ...] = ()


CLIP = PretrainedModel(
    "clip-vit-base-patch32",
    "https://huggingface.co/openai/clip-vit-base-patch32",
    (
        "config.json",
        "preprocessor_config.json",
        ("tokenizer.json", "vocab.json"),
        ("model.safetensors", "pytorch_model.bin"),
    ),
)
# torch.hub's own layout: torchvision looks in `checkpoints` for this name.
ALEXNET = PretrainedModel(
    "lpips/checkpoints/alexnet-owt-7be5be79.pth",
    "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
)
I3D = PretrainedModel(
    "i3d/i3d_torchscript.pt",
    "https://huggingface.co/flateon/FVD-I3D-torchscript",
)
VIDEO_METRICS: dict[str, VideoMetric] = {
    "clip": VideoMetric(
        "CLIP similarity to the text", "", "higher", ("transformers", "pillow"), CLIP
    ),
    "psnr": VideoMetric("PSNR to the reference", "dB", "higher"),
    "lpips": VideoMetric(
        "LPIPS to the reference", "", "lower", ("torchmetrics", "torchvision"), ALEXNET
    ),
    "flicker": VideoMetric("Temporal flicker", "", None),
    "motion": VideoMetric("Motion", "pixels per frame", None),
    "dynamic_degree": VideoMetric(
        "Dynamic degree", "shorter sides per frame", None, ("opencv-python-headless",)
    ),
    "fvd": VideoMetric("Fréchet video distance", "", "lower", (), I3D),
}


def models_folder(models: Path | str | None = None) -> Path:
    """Return the folder that pretrained models are looked for in.

    Args:
        models: the folder; ``~/.cache/anyflow/evaluation`` if left out. ``~`` is the home folder.
    """
    return Path(DEFAULT_FOLDER if models is None else models).expanduser()


def model_path(metric: str, models: Path | str | None = None) -> Path:
    """Return where the pretrained model of a metric is expected: the argument of its class.

    Args:
        metric: ``clip`` (a folder, for :class:`Clip`), ``lpips`` (a file, for :class:`Lpips`) or
            ``fvd`` (a file, for :class:`I3DFeatures`).
        models: see :func:`models_folder`.

    Raises:
        ValueError: another metric.
    """
    found = VIDEO_METRICS.get(metric)
    if found is None or found.model is None:
        names = ", ".join(name for name, entry in VIDEO_METRICS.items() if entry.model is not None)
        raise ValueError(f"metric must be one with a pretrained model ({names}), got {metric!r}")
    return models_folder(models) / found.model.path


def load_network(
    metric: str, models: Path | str | None = None, *, device: torch.device | str = "cpu"
) -> Callable[..., Tensor]:
    """Load the pretrained network of a metric, and leave the global generator as it was.

    Args:
        metric: ``clip`` (:class:`Clip`), ``lpips`` (:class:`Lpips`) or ``fvd``
            (:class:`I3DFeatures`).
        models: see :func:`models_folder`.
        device: device of the network.

    Raises:
        ValueError: another metric, or weights that are missing or do not fit.
        ImportError: a package is missing.
    """
    from anyflow.evaluation.video_metrics.clip import Clip
    from anyflow.evaluation.video_metrics.fvd import I3DFeatures
    from anyflow.evaluation.video_metrics.lpips import Lpips

    path = model_path(metric, models)
    networks = {"clip": Clip, "lpips": Lpips, "fvd": I3DFeatures}
    with torch.random.fork_rng(devices=[]):  # libraries draw weights before they load others
        return networks[metric](path, device=device)


def available_metrics(models: Path | str | None = None) -> dict[str, str | None]:
    """Say for each metric whether it can be computed here.

    Args:
        models: see :func:`models_folder`.

    Returns:
        By name of the metric, in the order of :data:`VIDEO_METRICS`: None where everything is
        there, else one sentence that names each package that is missing with the command that
        installs it, and each file or folder that is missing with the place where it is published.
    """
    return {name: _lacking(name, metric, models) for name, metric in VIDEO_METRICS.items()}


def _lacking(name: str, metric: VideoMetric, models: Path | str | None) -> str | None:
    problems = [
        missing_package(metric.title, package) for package in metric.packages if is_missing(package)
    ]
    if metric.model is not None:
        problem = model_problem(metric.title, metric.model, model_path(name, models))
        problems += [] if problem is None else [problem]
    if not problems:  # importing takes seconds
        problems = [
            p
            for package in metric.packages
            if (p := package_problem(metric.title, package)) is not None
        ]
    return "; ".join(problems) or None


def missing_package(purpose: str, package: str) -> str:
    """Say that a package is not installed, and what to run."""
    return f"{missing(purpose, package)}{_build_of(package)}"


def package_problem(purpose: str, package: str) -> str | None:
    """Say why a package cannot be imported, by trying it, and what to do; None where it can."""
    if is_missing(package):
        return missing_package(purpose, package)
    try:
        importlib.import_module(module_name(package))
    except Exception as error:  # compiled for another torch or Python, it may fail in any way
        reason = " ".join(str(error).split())
        return (
            f"{purpose} needs the package {package}{_build_of(package)}; the one installed does "
            f"not import: {reason}"
        )
    return None


def _build_of(package: str) -> str:
    return f" (the build for torch {torch.__version__})" if package == "torchvision" else ""


def model_problem(purpose: str, model: PretrainedModel, path: Path) -> str | None:
    """Say which file or folder of a model is missing and where it is published, or None."""
    if not model.files:
        if path.is_file():
            return None
        return f"{purpose} needs the file {shortened(path)}, published at {model.source}"
    if not path.is_dir():
        return f"{purpose} needs the folder {shortened(path)} with the files of {model.source}"
    for entry in model.files:
        names = (entry,) if isinstance(entry, str) else entry
        if not any((path / name).is_file() for name in names):
            wanted = " or ".join(names)
            return f"{purpose} needs {wanted} in the folder {shortened(path)}, from {model.source}"
    return None
