"""The file of a run: one JSON per device, rewritten after every measurement, so that a kill loses nothing."""

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
ROOT = Path(__file__).resolve().parents[2]
DONE, FAILED, SKIPPED, RUNNING = "done", "failed", "skipped", "running"


class RunFile:
    """Sections by name, each with a status, and beside a status that is not ``done`` the reason.

    Args:
        path: of the JSON file.
        data: its content.
    """

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path, self.data = path, data

    @classmethod
    def load(cls, path: Path) -> RunFile:
        """From disk; an empty one where there is none."""
        return cls(path, json.loads(path.read_text()) if path.exists() else {"schema": SCHEMA, "sections": {}})

    def save(self) -> None:
        """Write beside it and rename: a reader, or a kill, never meets half a file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n")
        with partial.open() as file:
            os.fsync(file.fileno())
        partial.replace(self.path)

    def section(self, name: str) -> dict[str, Any]:
        """What is known of a section, empty at first; a part of :attr:`data`."""
        sections: dict[str, dict[str, Any]] = self.data["sections"]
        return sections.setdefault(name, {})

    def status(self, name: str) -> str | None:
        """``done``, ``failed``, ``skipped``, ``running``, or None."""
        return self.data["sections"].get(name, {}).get("status")

    def mark(self, name: str, status: str, reason: str | None = None, **more: Any) -> None:
        """Set a section's status, and save."""
        self.section(name).update(status=status, reason=reason, **more)
        self.save()

    def put(self, name: str, key: str, value: Any) -> None:
        """Add a measurement to a section, and save."""
        self.section(name).setdefault("data", {})[key] = value
        self.save()

    def get(self, name: str, key: str) -> Any:
        """A measurement, or None."""
        return self.data["sections"].get(name, {}).get("data", {}).get(key)


def source_digest() -> str:
    """Of every file that a measurement depends on: results of other sources are not added to."""
    digest = hashlib.sha256()
    for folder in ("anyflow", "kernels", "csrc", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def commit() -> dict[str, Any]:
    """The commit checked out, or the one that ``ANYFLOW_COMMIT`` names where there is no repository."""
    try:
        head, changed = (
            subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()
            for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except FileNotFoundError:
        head = changed = ""
    named = os.environ.get("ANYFLOW_COMMIT", "unknown")
    return {"commit": head, "clean": not changed} if head else {"commit": named, "clean": None}


def slug(device: str, tiny: bool) -> str:
    """The name of a device's file: ``nvidia-h200``; of the tiny shapes, ``nvidia-h200-tiny``."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return f"{name}-tiny" if tiny else name


def die_with_parent(parent: int | None = None) -> None:
    """A killed run leaves no process on the GPU (Linux; elsewhere this does nothing).

    Args:
        parent: the process that started this one, if known: it may be gone already.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        if parent is not None and os.getppid() != parent:
            os._exit(1)


def nvidia_smi(*fields: str) -> dict[str, str] | None:
    """The first GPU's fields, such as ``clocks.sm``; None without the tool."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return None
    return dict(zip(fields, (value.strip() for value in lines[0].split(",")), strict=False))


def clocks() -> dict[str, str] | None:
    """What says whether the GPU ran as fast as it can."""
    return nvidia_smi(
        "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "temperature.gpu", "clocks_throttle_reasons.active"
    )
