"""Run ``traced_*.py``, which trace on fake CUDA tensors what a GPU would be asked to do.

A CPU build of torch cannot differentiate fake CUDA tensors until ``no_device.cpp`` is loaded before
it, hence a process of their own. A CUDA build needs a GPU for that.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]


@pytest.fixture(scope="module")
def no_device(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """Return the library that is loaded before torch, or None where a GPU is present."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is not None or torch.version.hip is not None:
        pytest.skip("this build of torch needs a GPU to differentiate fake CUDA tensors")
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    torch_folder, out = (
        Path(torch.__file__).parent,
        tmp_path_factory.mktemp("no_device") / "no_device.so",
    )
    command = [
        compiler,
        "-std=c++20",
        "-shared",
        "-fPIC",
        str(FOLDER / "no_device.cpp"),
        "-o",
        str(out),
    ]
    command += [
        f"-I{torch_folder / 'include'}",
        f"-L{torch_folder / 'lib'}",
        "-lc10",
        "-ltorch_cpu",
    ]
    subprocess.run([*command, f"-Wl,-rpath,{torch_folder / 'lib'}"], check=True)
    return out


@pytest.mark.slow
def test_traced(no_device: Path | None) -> None:
    """Run all files in one process: most of its time is spent on the packages it imports."""
    files = sorted(FOLDER.glob("traced_*.py"))
    own = {"PYTHONPATH": str(ROOT)} | ({} if no_device is None else {"LD_PRELOAD": str(no_device)})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
