"""The native extension: built into a folder of its own where there is an nvcc, and found there by every process."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu.state import ROOT, nvidia_smi

FOLDER = ROOT / "build" / "gpu-runner"


def build_extension(limit_s: float) -> tuple[str, str | None, dict[str, Any]]:
    """Build with ``setup.py``, for this GPU's architecture alone; (status, reason, data) of the section."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        return "skipped", "there is no nvcc", {}
    lacking = [name for name in ("setuptools", "pybind11") if importlib.util.find_spec(name) is None]
    lacking += [tool for tool in ("cmake", "ninja") if shutil.which(tool, path=_path()) is None]
    if lacking:
        return "failed", f"building needs {', '.join(lacking)}", {}
    capability = nvidia_smi("compute_cap")
    target = "" if capability is None else capability["compute_cap"].replace(".", "")
    # 90 and 100 have instructions of their own, which the plain architecture leaves out.
    architecture = f"{target}a" if target.startswith(("9", "10")) else target
    # Arguments of its own give it a folder of its own, so that a build of the checkout stays as it is.
    variables = {"ANYFLOW_CUDA_ARCHS": architecture, "CUDACXX": nvcc, "ANYFLOW_CMAKE_ARGS": "-DANYFLOW_CUDA=AUTO"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", f"--build-lib={FOLDER}"]
    started = time.monotonic()
    try:
        run = subprocess.run(
            command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=limit_s
        )
    except subprocess.TimeoutExpired:
        return "failed", f"the build took more than {limit_s:.0f} s", {"architecture": architecture}
    output = (run.stdout + run.stderr).strip()
    data = {"architecture": architecture, "build_s": time.monotonic() - started, "output": output[-2000:]}
    if run.returncode:
        return "failed", output.splitlines()[-1] if output else f"exit status {run.returncode}", data
    return "done", None, data


def _path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def forget_extension() -> None:
    """Remove what was built here, for it may be of other sources."""
    shutil.rmtree(FOLDER, ignore_errors=True)


def find_package(device: str) -> None:
    """Make ``anyflow`` importable from the checkout, with its kernels, and on a GPU with the extension built here."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    import anyflow

    if device == "cuda" and any((FOLDER / "anyflow").glob("_C.*")):
        anyflow.__path__.insert(0, str(FOLDER / "anyflow"))
    if importlib.util.find_spec("anyflow.kernels") is None:  # a checkout that is not installed: the folder is kernels/
        anyflow.__path__.append(str(ROOT))


def load_operators() -> str | None:
    """Import ``anyflow.ops``; where there is no extension that loads, without it, and why."""
    try:
        import anyflow.ops
    except ImportError as error:
        if "anyflow._C" not in str(error) or "ANYFLOW_BACKEND" in os.environ:
            raise
        for name in [name for name in sys.modules if name.startswith("anyflow.ops")]:
            del sys.modules[name]
        os.environ["ANYFLOW_BACKEND"] = "triton"  # read at import: do without the extension
        try:
            import anyflow.ops  # noqa: F401
        finally:
            del os.environ["ANYFLOW_BACKEND"]  # and let every operator choose
        return str(error).split(";")[0]
    return None
