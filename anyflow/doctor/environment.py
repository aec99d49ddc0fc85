"""Find out what is installed here: versions, devices, compilers, the native extension."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import anyflow
from anyflow.utils.threads import usable_cores

_PACKAGE = Path(anyflow.__file__).parent
_SETTINGS = {
    *("OMP_WAIT_POLICY", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"),
    *("CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"),
}
_VERSION = re.compile(r"(?:\brelease |\bversion |\) |^)(\d+(?:\.\d+)+)", re.MULTILINE)


@dataclass(frozen=True)
class Program:
    """Describe a program that was found: its path, and the version it names, or None."""

    path: str
    version: str | None


@dataclass(frozen=True)
class Gpu:
    """Describe a CUDA (or ROCm) device; memory is in GiB."""

    name: str
    capability: str
    memory: float


@dataclass(frozen=True)
class Environment:
    """Hold the versions of what is installed, and the tools that were found.

    Attributes:
        anyflow, python, torch: versions.
        location: folder of the package.
        platform: operating system and processor.
        torch_built_for: such as ``CUDA 13.0``, ``ROCm 6.4`` or ``CPU``.
        commit: commit of the checkout that the package lies in, or None outside of one.
        threads: number of threads that torch computes with.
        cores: number of cores that this process may keep busy, by its affinity and its quota of CPU
            time.
        settings: environment variables that are set and change what runs here.
        triton: version, or None where it is not installed.
        driver: version of the NVIDIA driver, or None without one.
        gpus: the devices that torch finds.
        programs: ``c`` (Triton needs it at run time), ``c++``, ``nvcc``, ``cmake`` and ``ninja``
            (for building); None for what is missing.
    """

    anyflow: str
    location: str
    commit: str | None
    python: str
    platform: str
    torch: str
    torch_built_for: str
    threads: int
    cores: int
    settings: dict[str, str]
    triton: str | None
    driver: str | None
    gpus: tuple[Gpu, ...]
    programs: dict[str, Program | None]


@dataclass(frozen=True)
class NativeExtension:
    """Describe the extension module ``anyflow._C``.

    Attributes:
        file: path of the module, or None where it is not built.
        problem: why it cannot be used and what to do, or None.
        build_info: facts of the build that the module reports.
        instruction_set: name of the one that its CPU kernels use on this machine.
        warnings: sentences on what will work, but not as it should.
    """

    file: str | None
    problem: str | None
    build_info: dict[str, str]
    instruction_set: str | None
    warnings: tuple[str, ...]


def environment() -> Environment:
    """Look around; nothing is changed, and programs are only asked for their versions."""
    smi = shutil.which("nvidia-smi")
    driver = (
        None if smi is None else _output(smi, "--query-gpu=driver_version", "--format=csv,noheader")
    )
    return Environment(
        anyflow=anyflow.__version__,
        location=str(_PACKAGE),
        commit=_commit(),
        python=platform.python_version(),
        platform=platform.platform(),
        torch=torch.__version__,
        torch_built_for=_built_for(),
        threads=torch.get_num_threads(),
        cores=usable_cores(),
        settings={
            k: v
            for k, v in sorted(os.environ.items())
            if k.startswith("ANYFLOW_") or k in _SETTINGS
        },
        triton=_triton_version(),
        driver=driver.splitlines()[0] if driver else None,
        gpus=_gpus(),
        programs={
            # Triton looks for CC, else for these in this order.
            "c": _program(os.environ.get("CC"), "gcc", "clang"),
            "c++": _program(os.environ.get("CXX"), "c++", "g++", "clang++"),
            "nvcc": _nvcc(),
            # setup.py looks beside Python first.
            "cmake": _program("cmake", folder=Path(sys.executable).parent),
            "ninja": _program("ninja", folder=Path(sys.executable).parent),
        },
    )


def load_operators() -> NativeExtension:
    """Import ``anyflow.ops`` and describe its extension.

    Without a usable extension, the import is repeated as ``ANYFLOW_BACKEND=eager`` does it.
    """
    variable = os.environ.pop("ANYFLOW_BACKEND", None)
    problem = None
    try:
        try:
            from anyflow.ops.native import load

            load()  # an anyflow.ops that was imported before may have done without, by the variable
        except ImportError as error:
            problem = str(error)
            os.environ["ANYFLOW_BACKEND"] = "eager"
            importlib.import_module("anyflow.ops")
    finally:
        os.environ.pop("ANYFLOW_BACKEND", None)
        if variable is not None:
            os.environ["ANYFLOW_BACKEND"] = variable
    spec = importlib.util.find_spec("anyflow._C")
    file = None if spec is None else spec.origin
    if problem is not None:
        return NativeExtension(file, problem, {}, None, ())
    module = importlib.import_module("anyflow._C")
    info = module.build_info()
    return NativeExtension(file, None, info, module.cpu_instruction_set(), extension_warnings(info))


def extension_warnings(build_info: dict[str, str]) -> tuple[str, ...]:
    """Say what does not fit between a build of the extension and this machine."""
    from anyflow.ops.backend import OPERATORS, missing

    warnings = []
    if build_info["torch"] != torch.__version__:
        warnings.append(
            f"the extension was built for torch {build_info['torch']}, and torch "
            f"{torch.__version__} runs: rebuild it"
        )
    without = [
        op for op in sorted(OPERATORS) if missing("native", torch.device("cpu"), op) is not None
    ]
    if without:
        warnings.append(
            f"the extension has no CPU kernel of {', '.join(without)}: it is older than this "
            "anyflow, rebuild it"
        )
    return tuple(warnings)


def _built_for() -> str:
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    return "CPU" if torch.version.cuda is None else f"CUDA {torch.version.cuda}"


def _commit() -> str | None:
    """Return the commit of the checkout that the package lies in, with ``+`` where files differ."""
    git = shutil.which("git")
    if git is None or not (_PACKAGE.parent / ".git").exists():
        return None
    commit = _output(git, "-C", str(_PACKAGE.parent), "rev-parse", "--short=12", "HEAD")
    changed = _output(
        git, "-C", str(_PACKAGE.parent), "status", "--porcelain", "--untracked-files=no"
    )
    return f"{commit}{'+' if changed else ''}" if commit else None


def _triton_version() -> str | None:
    """Return Triton's version without importing Triton, which takes a second."""
    if importlib.util.find_spec("triton") is None:
        return None
    for name in ("triton", "pytorch-triton", "triton-rocm", "pytorch-triton-rocm"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"


def _gpus() -> tuple[Gpu, ...]:
    if not torch.cuda.is_available():
        return ()
    found = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return tuple(
        Gpu(p.name, f"{p.major}.{p.minor}", round(p.total_memory / 2**30, 1)) for p in found
    )


def _nvcc() -> Program | None:
    """Find nvcc in the places that the build looks in (cmake/AnyflowCuda.cmake)."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    places = [
        os.environ.get("CUDACXX"),
        *(Path(home, "bin", "nvcc") for home in homes if home),
        "nvcc",
    ]
    return _program(*places, "/usr/local/cuda/bin/nvcc")


def _program(*names: str | Path | None, folder: Path | None = None) -> Program | None:
    """Find the first of the names that is a program, in a folder or else in PATH."""
    search = os.environ.get("PATH", os.defpath)
    if folder is not None:
        search = f"{folder}{os.pathsep}{search}"
    for name in names:
        path = shutil.which(name, path=search) if name else None
        if path is not None:
            version = _VERSION.search(_output(path, "--version"))
            return Program(path, None if version is None else version[1])
    return None


def _output(*command: str) -> str:
    """Return what a program prints, or nothing where the program fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout.strip()
