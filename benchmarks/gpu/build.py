"""Build the native extension, and lay out a package that every process of a run finds.

``site/anyflow`` is a folder of links: to the modules of this checkout, to its ``kernels/`` and to
the extension that was built here. With ``site`` first on Python's path, a process needs no
installation, an installed copy of the package cannot stand in for a part of this one, and nothing
is written into the checkout.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu.state import (
    DONE,
    FAILED,
    FOLDER,
    ROOT,
    SKIPPED,
    die_with_parent,
    digest_of,
    nvidia_smi,
)

SITE = FOLDER / "site"
CARRIED = FOLDER / "anyflow"
BENCHMARKS = ROOT / "benchmarks"

# The extension ------------------------------------------------------------------------------------


def prepare_extension(device: str, limit_s: float) -> tuple[str, str | None, dict[str, Any]]:
    """Use an extension that loads, else build one.

    One that was built here lies in a folder that is named by its sources. One that was carried here
    or built in the checkout is used where it loads; for a GPU it must have CUDA kernels.

    Returns:
        Status, reason and data of the section.
    """
    found = loaded()
    if "problem" not in found and (device == "cpu" or found["cuda_archs"]):
        own = any(_extensions(_built()))
        sources = "those of the checkout" if own else "not recorded"
        prebuilt = {"prebuilt": "an extension that loads was there", "sources": sources}
        return DONE, None, prebuilt | found
    status, reason, data = _build(device, limit_s)
    if status == DONE:
        found = loaded()
        if "problem" in found:
            status, reason = FAILED, f"it is built and does not load: {found['problem']}"
    return status, reason, data | found


def _build(device: str, limit_s: float) -> tuple[str, str | None, dict[str, Any]]:
    """Build with ``setup.py``: for this GPU's architecture alone, or without CUDA."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None and device == "cuda":
        return SKIPPED, "nvcc was not found", {}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    lacking = [n for n in ("setuptools", "pybind11") if importlib.util.find_spec(n) is None]
    lacking += [tool for tool in ("cmake", "ninja") if shutil.which(tool, path=path) is None]
    if lacking:
        return FAILED, f"building needs {', '.join(lacking)}", {}
    architecture = _architecture() if device == "cuda" else ""
    # Arguments of its own give the build a folder of its own; one of the checkout stays as it is.
    default = f"-DANYFLOW_CUDA={'AUTO' if device == 'cuda' else 'OFF'}"
    arguments = os.environ.get("ANYFLOW_CMAKE_ARGS", default)
    variables = {"ANYFLOW_CUDA_ARCHS": architecture, "ANYFLOW_CMAKE_ARGS": arguments}
    if nvcc is not None:
        variables["CUDACXX"] = nvcc
    command = [sys.executable, "setup.py", "--quiet", "build_ext", f"--build-lib={_built().parent}"]
    started, log = time.monotonic(), workplace() / "build.log"
    data: dict[str, Any] = {"architecture": architecture, "arguments": arguments}
    with log.open("wb") as output:
        streams = {"stdout": output, "stderr": subprocess.STDOUT}
        status, stopped = run_program(
            command, limit_s, cwd=ROOT, env=os.environ | variables, **streams
        )
    said = log.read_text(errors="replace").strip()
    if stopped:
        return FAILED, f"the build took more than {limit_s:.0f} s", data
    data |= {"build_s": time.monotonic() - started, "output": said[-2000:]}
    if status:
        return FAILED, said.splitlines()[-1] if said else f"exit status {status}", data
    return DONE, None, data


def _architecture() -> str:
    capability = nvidia_smi("compute_cap")
    target = "" if capability is None else capability["compute_cap"].replace(".", "")
    # 90 and 100 have instructions of their own, which the plain architecture leaves out.
    return f"{target}a" if target.startswith(("9", "10")) else target


def _built() -> Path:
    """Return where an extension of the sources in the checkout is built."""
    return FOLDER / digest_of("csrc", "cmake", "CMakeLists.txt", "setup.py") / "anyflow"


def _extensions(folder: Path) -> list[Path]:
    """Return the extension in a folder for this Python: one file, or none."""
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    return [path for path in folder.glob("_C.*") if path.name.endswith(suffixes)]


def loaded() -> dict[str, str]:
    """Import the extension in a process of its own, and return what it says, or the problem."""
    lay_out()
    code = (
        "import json\n"
        "from gpu import without_diffusers\n"
        "without_diffusers.install()\n"
        "import anyflow.ops, anyflow._C as extension\n"
        "info = extension.build_info()\n"
        "found = {name: info[name] for name in ('cuda', 'cuda_archs')}\n"
        "print(json.dumps(found | {'file': extension.__file__}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=workplace(),
        env=environment() | {"ANYFLOW_BACKEND": ""},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return {"problem": (done.stderr.strip() or "?").splitlines()[-1]}
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


# Processes ----------------------------------------------------------------------------------------


def run_program(
    command: list[str],
    limit_s: float,
    stop_s: float = 0.0,
    meanwhile: Callable[[], None] = lambda: None,
    **options: Any,
) -> tuple[int, bool]:
    """Run a program for a time; the result is its exit status and whether it was stopped.

    Args:
        command: to run, in a group of processes of its own, which dies with this process.
        limit_s: seconds after which it is interrupted.
        stop_s: seconds after which it is killed if the interrupt has not ended it.
        meanwhile: called twice a second, and at the end.
        options: of ``subprocess.Popen``.
    """
    options = {"cwd": workplace(), "env": environment()} | options
    process = subprocess.Popen(
        command, start_new_session=True, preexec_fn=die_with_parent, **options
    )
    deadline, stopped = time.monotonic() + limit_s, False
    try:
        while process.poll() is None and not stopped:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.5)
            meanwhile()
            stopped = process.poll() is None and time.monotonic() >= deadline
        if stopped and stop_s:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=stop_s)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # what it has started must not go on
        process.wait()
        meanwhile()
    return process.returncode, stopped


def prepare_process(device: str, parent: int | None = None) -> tuple[Any, dict[str, str | None]]:
    """Make this checkout's package importable here, with a stand-in for what is missing.

    Args:
        device: ``"cuda"`` or ``"cpu"``.
        parent: the process that this one must not outlive, or None.

    Returns:
        The torch device, made the current one, and why diffusers and the extension are missing.
    """
    if parent is not None:
        die_with_parent(parent)
    find_package(device)
    import torch

    from gpu import without_diffusers

    stand_in = without_diffusers.install()
    without_extension = load_operators()
    if device == "cpu":
        torch.set_num_threads(1)  # tiny networks, and a machine that may do other things
    else:
        torch.cuda.set_device(0)
    found = torch.device(device, 0) if device == "cuda" else torch.device("cpu")
    return found, {"diffusers_stand_in": stand_in, "extension": without_extension}


# The package --------------------------------------------------------------------------------------


def lay_out() -> None:
    """Link modules, kernels and the extension into ``site/anyflow``; any processes may at once."""
    package = SITE / "anyflow"
    package.mkdir(parents=True, exist_ok=True)
    modules = (path for path in (ROOT / "anyflow").iterdir() if path.name != "__pycache__")
    wanted = {path.name: path for path in modules} | {"kernels": ROOT / "kernels"}
    # and none beside it, whose suffix Python might prefer
    if found := _extensions(_built()) or _extensions(CARRIED):
        wanted = {name: path for name, path in wanted.items() if not name.startswith("_C.")}
        wanted |= {path.name: path for path in found}
    for link in package.iterdir():
        if link.is_symlink() and link.name not in wanted and not link.name.startswith("."):
            link.unlink(missing_ok=True)
    for name, path in wanted.items():
        link = package / name
        if not link.is_symlink() or os.readlink(link) != str(path):
            partial = package / f".{name}.{os.getpid()}"
            partial.unlink(missing_ok=True)
            partial.symlink_to(path)
            partial.replace(link)


def environment() -> dict[str, str]:
    """Return the variables of a process that must find the package and ``benchmarks/``.

    Such a process needs another working directory than the checkout's root, which Python would
    search first: see :func:`workplace`.
    """
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = dict.fromkeys([str(SITE), str(BENCHMARKS), *filter(None, before)])
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def workplace() -> Path:
    """Return an empty folder of the runner's, the working directory of processes that it starts."""
    folder = FOLDER / "work"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def find_package(device: str) -> None:
    """Make ``anyflow`` importable from this checkout, here and in child processes.

    Args:
        device: ``"cuda"``, or ``"cpu"``, where Triton kernels are interpreted.

    Raises:
        ImportError: another copy of the package has been imported already.
    """
    lay_out()
    if device == "cpu":
        # read when triton is imported, which diffusers does too
        os.environ["TRITON_INTERPRET"] = "1"
    os.environ["PYTHONPATH"] = environment()["PYTHONPATH"]
    sys.path.insert(0, str(SITE))
    import anyflow

    origin = Path(str(anyflow.__file__)).resolve().parent
    if origin != (ROOT / "anyflow").resolve():
        expected = ROOT / "anyflow"
        raise ImportError(f"anyflow is imported from {origin}, before {expected} could be found")
    if str(SITE / "anyflow") not in anyflow.__path__:  # imported from the checkout itself
        anyflow.__path__.insert(0, str(SITE / "anyflow"))


def load_operators() -> str | None:
    """Import ``anyflow.ops``, without an extension if none loads; return why, or None."""
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
