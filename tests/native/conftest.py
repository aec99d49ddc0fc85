"""Find CUDA's tools, or skip the tests that need them with the reason."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "ops"))  # for the formulas

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def find(tool: str, *folders: Path) -> str | None:
    """Find a program in CUDA_HOME, in one of the folders, on the PATH, or where CUDA usually is."""
    home = [Path(os.environ["CUDA_HOME"]) / "bin"] if os.environ.get("CUDA_HOME") else []
    path = map(Path, os.environ.get("PATH", "").split(os.pathsep))
    places = [*home, *folders, *path, Path("/usr/local/cuda/bin")]
    return shutil.which(tool, path=os.pathsep.join(map(str, places)))


@pytest.fixture(scope="session")
def nvcc() -> Run:
    """Run the CUDA compiler that a build would take; what it and ptxas say is in stdout."""
    named = os.environ.get("CUDACXX")
    program = shutil.which(named) if named else find("nvcc")
    if program is None:
        pytest.skip("no nvcc in $CUDACXX, $CUDA_HOME/bin, $PATH or /usr/local/cuda/bin")

    def run(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        command = [program, *map(str, arguments)]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return run


@pytest.fixture(scope="session")
def nvdisasm() -> str:
    """Return CUDA's disassembler, or the one that Triton brings along."""
    spec = importlib.util.find_spec("triton")
    triton = [] if spec is None or spec.origin is None else [Path(spec.origin).parent]
    program = find("nvdisasm", *(folder / "backends" / "nvidia" / "bin" for folder in triton))
    if program is None:
        pytest.skip("neither CUDA nor Triton brings an nvdisasm")
    return program
