"""Import each package by what needs it, and look at the encoder of videos and the Hub's cache."""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from anyflow.utils.documents import shortened
from anyflow.utils.packages import GROUPS, OPTIONAL, is_missing, module_name
from anyflow.utils.versions import installed_versions, is_below, required_floors

# Importing these packages loads next to nothing of them, so sampling's parts are imported too.
_PARTS = {"diffusers": ("AutoencoderKLWan",), "transformers": ("AutoTokenizer", "UMT5EncoderModel")}
_MAX_BLOBS = 10_000  # files whose sizes are looked at


@dataclass(frozen=True)
class Package:
    """Describe a package that anyflow can use.

    Attributes:
        group: command that needs the package: ``sample``, ``demo``, ``train`` or ``evaluate``.
        name: on the package index.
        version: None where it is not installed.
        problem: why it cannot be used and what to do, or None.
    """

    group: str
    name: str
    version: str | None
    problem: str | None


@dataclass(frozen=True)
class VideoCodec:
    """Describe the encoder that MP4 files are written with.

    Attributes:
        name: name of the encoder in PyAV, or None where no file can be written.
        codec: codec of a file that was written and read back, such as ``h264``.
        problem: why no file can be written, or None.
        warning: sentence on what players will not like about the files, or None.
    """

    name: str | None
    codec: str | None
    problem: str | None
    warning: str | None


@dataclass(frozen=True)
class Hub:
    """Describe what is here of the Hugging Face Hub.

    Attributes:
        cache: folder of the models that were downloaded.
        models: number of models in it.
        gigabytes: size of the models in 10^9 bytes; None where the files are too many to look at.
        offline: models come from the cache only, as ``HF_HUB_OFFLINE`` says.
    """

    cache: str
    models: int
    gigabytes: float | None
    offline: bool


def packages(floors: Mapping[str, str] | None = None) -> tuple[Package, ...]:
    """Import every package that anyflow can use and describe it, grouped by what needs it.

    Args:
        floors: lowest version by package; those of the installed anyflow if left out.
    """
    floors = required_floors() if floors is None else floors
    return tuple(
        _package(group, name, floors.get(name)) for group, names in GROUPS.items() for name in names
    )


def install_commands(found: tuple[Package, ...]) -> dict[str, str]:
    """Return the command that installs what a group lacks, for each group that lacks something."""
    absent: dict[str, list[str]] = {}
    for package in found:
        if package.version is None and package.problem is not None:
            absent.setdefault(package.group, []).append(package.name)
    return {group: f"pip install {' '.join(names)}" for group, names in absent.items()}


def package_problems(installed: Iterable[Package], encoder: VideoCodec) -> list[str]:
    """List what is wrong with the packages, and with the encoder if no package explains it.

    A package that is absent is a problem of the commands that sample, not of the optional ones; a
    package that is broken is a problem of all.
    """
    broken = [package for package in installed if package.problem is not None]
    problems = [
        str(package.problem)
        for package in broken
        if package.group not in OPTIONAL or package.version is not None
    ]
    if encoder.problem is not None and "av" not in [package.name for package in broken]:
        problems.append(encoder.problem)
    return problems


def video_encoder() -> VideoCodec:
    """Write a small MP4 file, read it back, and say which encoder made it."""
    try:
        import numpy as np

        from anyflow.pipelines.video import import_av, write_video

        av = import_av()
        with tempfile.TemporaryDirectory() as folder:
            file = write_video(np.zeros((2, 16, 16, 3), np.uint8), Path(folder, "check.mp4"))
            with av.open(str(file)) as container:
                codec = container.streams.video[0].codec_context.name
                frames = sum(1 for _ in container.decode(video=0))
    # PyAV, FFmpeg and the system fail in their own ways, and would in `anyflow sample`, too
    except Exception as error:
        return VideoCodec(None, None, f"no MP4 file can be written: {_reason(error)}", None)
    if frames != 2:
        return VideoCodec(None, codec, f"an MP4 file of 2 frames was read back with {frames}", None)
    if codec == "h264":
        return VideoCodec("libx264", codec, None, None)
    return VideoCodec(
        codec,
        codec,
        None,
        f"PyAV has no H.264 encoder: files are {codec}, which browsers do not show",
    )


def hub() -> Hub:
    """Look at the cache of models and at the settings of ``huggingface_hub``, without a network."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    models, size, blobs = 0, 0, 0
    for folder in _entries(cache):
        if not folder.name.startswith("models--"):
            continue
        models += 1
        for blob in _entries(Path(folder.path, "blobs")):
            blobs += 1
            if blobs <= _MAX_BLOBS:
                size += blob.stat(follow_symlinks=False).st_size
    gigabytes = round(size / 1e9, 1) if blobs <= _MAX_BLOBS else None
    return Hub(str(cache), models, gigabytes, bool(constants.HF_HUB_OFFLINE))


def _package(group: str, name: str, floor: str | None) -> Package:
    version = installed_versions([name])[name]
    if is_missing(name):
        return Package(
            group,
            name,
            None,
            f"{name} is not installed, and anyflow {group} needs it: pip install {name}",
        )
    try:
        module = importlib.import_module(module_name(name))
        for part in _PARTS.get(name, ()):
            getattr(module, part)
    # a package that was compiled for another Python, torch or library may fail in any way
    except Exception as error:
        return Package(
            group, name, version, f"{name} is installed, but does not import: {_reason(error)}"
        )
    if version is None:
        version = str(getattr(module, "__version__", "of unknown version"))
    elif floor is not None and is_below(version, floor):
        problem = (
            f"{name} {version} is older than {floor}, and may give other numbers: pip install "
            f"--upgrade {name}"
        )
        return Package(group, name, version, problem)
    return Package(group, name, version, None)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """List a folder; one that is not there or may not be read is empty."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return shortened(text) if text else type(error).__name__
