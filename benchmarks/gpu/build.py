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
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu.state import DONE, FAILED, FOLDER, ROOT, SKIPPED, digest_of, nvidia_smi

SITE = FOLDER / "site"
BUILT = FOLDER / "anyflow"  # where ``setup.py --build-lib`` puts the extension
RECORD = FOLDER / "extension.json"
BENCHMARKS = ROOT / "benchmarks"

# The extension ------------------------------------------------------------------------------------


def prepare_extension(device: str, limit_s: float) -> tuple[str, str | None, dict[str, Any]]:
    """Use an extension that loads, else build one.

    One that was built here is used only while its sources are those of the checkout. One without
    such a record, carried here or built in the checkout, is used where it loads; for a GPU it must
    have CUDA kernels.

    Returns:
        Status, reason and data of the section.
    """
    if _is_outdated():
        forget_extension()
    found = loaded()
    if "problem" not in found and (device == "cpu" or found["cuda_archs"]):
        sources = "those of the checkout" if RECORD.exists() else "not recorded"
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
    command = [sys.executable, "setup.py", "--quiet", "build_ext", f"--build-lib={FOLDER}"]
    started = time.monotonic()
    data: dict[str, Any] = {"architecture": architecture, "arguments": arguments}
    for path in _built():
        path.unlink()
    # A group of its own: the compilers of a build that takes too long must not go on.
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output = process.communicate(timeout=limit_s)[0].strip()
    except subprocess.TimeoutExpired:
        return FAILED, f"the build took more than {limit_s:.0f} s", data
    finally:
        stop_group(process)
    data |= {"build_s": time.monotonic() - started, "output": output[-2000:]}
    if process.returncode:
        status = f"exit status {process.returncode}"
        return FAILED, output.splitlines()[-1] if output else status, data
    RECORD.write_text(json.dumps({"sources": _sources()}) + "\n")
    lay_out()
    return DONE, None, data


def stop_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process that leads a group, with all that it has started, and wait for it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, 9)
    process.wait()


def _architecture() -> str:
    capability = nvidia_smi("compute_cap")
    target = "" if capability is None else capability["compute_cap"].replace(".", "")
    # 90 and 100 have instructions of their own, which the plain architecture leaves out.
    return f"{target}a" if target.startswith(("9", "10")) else target


def _sources() -> str:
    return digest_of("csrc", "cmake", "CMakeLists.txt", "setup.py")


def _is_outdated() -> bool:
    """Tell whether the extension in the runner's folder is recorded to be of other sources."""
    try:
        return bool(json.loads(RECORD.read_text())["sources"] != _sources())
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError):
        return True


def _built() -> list[Path]:
    """Return the extension in the runner's folder for this Python: one file, or none."""
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    return [path for path in BUILT.glob("_C.*") if path.name.endswith(suffixes)]


def forget_extension() -> None:
    """Remove the extension from the runner's folder, with its record."""
    shutil.rmtree(BUILT, ignore_errors=True)
    RECORD.unlink(missing_ok=True)
    lay_out()


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


# The package --------------------------------------------------------------------------------------


def lay_out() -> None:
    """Link modules, kernels and the extension into ``site/anyflow``; any processes may at once."""
    package = SITE / "anyflow"
    package.mkdir(parents=True, exist_ok=True)
    modules = (path for path in (ROOT / "anyflow").iterdir() if path.name != "__pycache__")
    wanted = {path.name: path for path in modules} | {"kernels": ROOT / "kernels"}
    # and none beside it, whose suffix Python might prefer
    if not _is_outdated() and (built := _built()):
        wanted = {name: path for name, path in wanted.items() if not name.startswith("_C.")}
        wanted |= {path.name: path for path in built}
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
