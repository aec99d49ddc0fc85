"""Test that a build which cannot succeed ends in one clear message."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CMAKE = shutil.which(
    "cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
)

pytestmark = pytest.mark.skipif(CMAKE is None, reason="cmake is not installed")


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """Make a Python with this one's packages but none of their programs."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    paths = [p for p in sys.path if Path(p).name == "site-packages"]
    (site / "dependencies.pth").write_text("\n".join(paths))
    return environment / "bin" / "python"


def build(
    python: Path, *programs: str, tmp_path: Path, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run ``setup.py build_ext`` with only the named programs on PATH, unless PATH is given."""
    path = tmp_path / "bin"
    path.mkdir()
    for name in programs:
        source = CMAKE if name == "cmake" else shutil.which(name)
        assert source is not None, name
        (path / name).write_text(f'#!/bin/sh\nexec "{source}" "$@"\n')
        (path / name).chmod(0o755)
    command = [
        python,
        "setup.py",
        "--quiet",
        "build_ext",
        "--build-lib",
        tmp_path / "lib",
        "--build-temp",
        tmp_path,
    ]
    inherited = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("ANYFLOW", "CUDA", "PYTHON", "CC", "CXX"))
    }
    inherited["PATH"] = str(path) if "PATH" not in variables else variables["PATH"]
    return subprocess.run(
        command, cwd=ROOT, env=inherited | variables, capture_output=True, text=True, timeout=300
    )


def message(done: subprocess.CompletedProcess[str]) -> str:
    """Return the last line of a build that failed without a traceback."""
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(("programs", "missing"), [((), "cmake"), (("cmake",), "ninja")])
def test_missing_tool(programs, missing, python, tmp_path) -> None:
    last = message(build(python, *programs, tmp_path=tmp_path))
    assert re.fullmatch(
        rf"anyflow: building needs {missing}, .*`pip install {missing}`, .*--no-build-isolation`\.",
        last,
    )


def test_wrong_cuda_architecture(python, tmp_path) -> None:
    path = os.pathsep.join([str(Path(CMAKE).parent), os.environ["PATH"]])
    done = build(python, tmp_path=tmp_path, PATH=path, ANYFLOW_CUDA_ARCHS="80;hopper")
    assert (
        message(done)
        == "anyflow: the native extension could not be configured; the reason is above."
    )
    assert "ANYFLOW_CUDA_ARCHS: 'hopper' is no CUDA architecture; expected" in " ".join(
        done.stderr.split()
    )


def test_no_compiler(python, tmp_path) -> None:
    done = build(python, "cmake", "ninja", tmp_path=tmp_path)
    assert (
        message(done)
        == "anyflow: the native extension could not be configured; the reason is above."
    )
    assert "No CMAKE_CXX_COMPILER could be found" in done.stderr


def cuda(
    *definitions: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Ask CMake about the CUDA kernels, on a machine whose programs CMake does not see."""
    nowhere = ["-DCMAKE_FIND_ROOT_PATH=/nonexistent", "-DCMAKE_FIND_ROOT_PATH_MODE_PROGRAM=ONLY"]
    torch = ["-DTORCH_VERSION=2.13.0", "-DTORCH_CUDA_VERSION=13.0", "-DANYFLOW_CUDA=AUTO"]
    command = [CMAKE, *nowhere, *torch, *definitions, "-P", ROOT / "cmake" / "AnyflowCuda.cmake"]
    variables = {k: v for k, v in os.environ.items() if not k.startswith("CUDA")} | (
        environment or {}
    )
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=60)


def test_without_nvcc_the_cuda_kernels_are_left_out_in_one_line() -> None:
    done = cuda()
    assert done.returncode == 0 and not done.stderr
    expected = (
        "-- anyflow: CUDA kernels left out: no CUDA compiler (nvcc) in CUDACXX, CUDA_HOME or PATH\n"
    )
    assert done.stdout == expected


def test_with_a_cpu_torch_too() -> None:
    done = cuda("-DTORCH_CUDA_VERSION=")
    assert done.returncode == 0
    assert done.stdout == "-- anyflow: CUDA kernels left out: torch 2.13.0 is built without CUDA\n"


def test_asking_for_what_cannot_be_built_is_an_error() -> None:
    done = cuda("-DANYFLOW_CUDA=ON")
    assert (
        done.returncode != 0
        and "ANYFLOW_CUDA is ON, but the CUDA kernels would be left out" in done.stderr
    )


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_architecture_that_this_nvcc_does_not_know() -> None:
    done = cuda("-DANYFLOW_CUDA_ARCHS=80;12", environment={"CUDACXX": shutil.which("nvcc")})
    assert done.returncode != 0 and "does not know '12'; it knows" in " ".join(done.stderr.split())
