"""Keep what a run has measured: a JSON per device, rewritten after every measurement.

A kill loses nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

SCHEMA = "anyflow-gpu-run-1"
_SOURCES = (".py", ".cpp", ".h", ".cu", ".cuh", ".cmake", ".txt")
ROOT = Path(__file__).resolve().parents[2]
DONE, FAILED, SKIPPED, RUNNING = "done", "failed", "skipped", "running"
# The runner's own folder, which stays between two calls where --out is emptied: results, the
# extension, caches.
FOLDER = Path(os.environ.get("ANYFLOW_GPU_RUNNER", ROOT / "build" / "gpu-runner")).resolve()


class RunFile:
    """Hold sections by name, each with a status, and with the reason where it is not ``done``.

    Args:
        path: of the JSON file.
        data: its content.
        copy: a second file with the same content, in the runner's own folder; None for no copy.
    """

    def __init__(self, path: Path, data: dict[str, Any], copy: Path | None = None) -> None:
        self.path, self.data, self.copy = path, data, copy

    @classmethod
    def load(cls, path: Path, copy: Path | None = None) -> RunFile:
        """Read a file; the result is empty without one."""
        data = json.loads(path.read_text()) if path.exists() else {"runs": [{}], "sections": {}}
        return cls(path, data, copy)

    @classmethod
    def open(cls, path: Path, copy: Path, identity: dict[str, Any], fresh: bool) -> RunFile:
        """Open the later of two files of this identity; else, or if ``fresh``, start anew."""
        known = []
        for candidate in (path, copy):
            try:
                data = cls.load(candidate).data
            except (json.JSONDecodeError, OSError):
                continue
            if not fresh and all(data.get(key) == value for key, value in identity.items()):
                known.append(data)
        latest = max(known, key=lambda data: data.get("revision", 0), default=None)
        anew = {**identity, "runs": [], "sections": {}}
        return cls(path, anew if latest is None else latest, copy)

    def save(self) -> None:
        """Write both files, each beside itself and renamed: nobody ever meets half a file."""
        self.data["revision"] = self.data.get("revision", 0) + 1
        text = json.dumps(self.data, indent=1, default=str) + "\n"
        for path in (self.copy, self.path):
            if path is None:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(text)
            with partial.open() as file:
                os.fsync(file.fileno())
            partial.replace(path)

    def section(self, name: str) -> dict[str, Any]:
        """Return what is known of a section, empty at first; it is a part of :attr:`data`."""
        sections: dict[str, dict[str, Any]] = self.data["sections"]
        return sections.setdefault(name, {})

    def status(self, name: str) -> str | None:
        """Return the status in the latest run, or None: it has yet to run there.

        A section that an earlier run finished, and this one keeps, counts as done.
        """
        section, runs = self.data["sections"].get(name, {}), self.data["runs"]
        kept = name in runs[-1].get("kept", ())
        return section.get("status") if kept or section.get("run") == len(runs) - 1 else None

    def mark(self, name: str, status: str, reason: str | None = None, **more: Any) -> None:
        """Set a section's status in the latest run, and save."""
        last = len(self.data["runs"]) - 1
        self.section(name).update(status=status, reason=reason, run=last, **more)
        self.save()

    def put(self, name: str, key: str, value: Any) -> None:
        """Add a measurement to a section, and save."""
        self.section(name).setdefault("data", {})[key] = value
        self.save()

    def get(self, name: str, key: str, default: Any = None) -> Any:
        """Return a measurement, or a default without one."""
        return self.data["sections"].get(name, {}).get("data", {}).get(key, default)


def source_digest() -> str:
    """Digest every file that a measurement depends on; only its sources' results are added to."""
    folders = ("anyflow", "kernels", "csrc", "benchmarks", "cmake")
    return digest_of(*folders, "CMakeLists.txt", "setup.py")


def digest_of(*names: str) -> str:
    """Digest the sources below folders, or in files, of the checkout: their names and contents."""
    digest = hashlib.sha256()
    for name in names:
        for path in sorted([ROOT / name, *(ROOT / name).rglob("*")]):
            if path.suffix in _SOURCES and path.is_file():
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> dict[str, Any]:
    """Return the commit that ``ANYFLOW_COMMIT`` names, else the one checked out.

    A copy of a checkout may have another commit in its metadata than the one of its files; who sets
    the variable knows. ``clean`` is None where nothing here can tell.
    """
    named = os.environ.get("ANYFLOW_COMMIT")
    if named:
        return {"commit": named, "clean": None}
    found = []
    for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no")):
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:
            break
        found.append(done.stdout.strip())
    head, changed = found if found and found[0] else ("unknown", None)
    return {"commit": head, "clean": None if changed is None else not changed}


def slug(device: str, tiny: bool) -> str:
    """Name a device's file: ``nvidia-h200``; for the tiny shapes, ``nvidia-h200-tiny``."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"{name}-tiny" if tiny else name


def die_with_parent(parent: int | None = None) -> None:
    """Kill this process when its parent ends, so that a killed run leaves none (Linux alone).

    Args:
        parent: the process that started this one, if known: it may be gone already.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        if parent is not None and os.getppid() != parent:
            os._exit(1)


def nvidia_smi(*fields: str) -> dict[str, str] | None:
    """Return the first GPU's fields, such as ``clocks.sm``; None without the tool."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return None
    return dict(zip(fields, (value.strip() for value in lines[0].split(",")), strict=False))


_CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu")


def clocks() -> dict[str, str] | None:
    """Return what says whether the GPU ran as fast as it can."""
    return nvidia_smi(*_CLOCKS, "clocks_throttle_reasons.active")
