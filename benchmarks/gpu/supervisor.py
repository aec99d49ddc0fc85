"""The process that the user starts: it measures nothing, so that nothing that is measured can take the run down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gpu.build import build_extension, forget_extension
from gpu.state import FAILED, RUNNING, SCHEMA, SKIPPED, RunFile, slug, source_digest

SCRIPT = Path(__file__).resolve().parents[1] / "run_gpu.py"
GRACE_S = 15.0  # a section that still runs so long after the budget is stopped
BUILD_LIMIT_S = 180.0


@dataclass(frozen=True)
class Options:
    """The command line.

    Attributes:
        out: folder of the results.
        device: ``"cuda"`` or ``"cpu"``.
        tiny: tiny shapes.
        budget_s: seconds after which no section is started.
        only: part of the names of the sections to run.
        skip_tests: leave out the operator tests.
        fresh: keep nothing of an earlier run of the same sources.
    """

    out: Path
    device: str
    tiny: bool
    budget_s: float
    only: str
    skip_tests: bool
    fresh: bool


def supervise(options: Options, names: list[str]) -> int:
    """Run the sections in processes of their own; 1 if one failed, 2 without a GPU.

    Args:
        options: of the command line.
        names: the sections that are wanted, in order; ``build`` is done here.
    """
    deadline = time.monotonic() + options.budget_s
    machine = _machine(options.device)
    if machine["device"] is None:
        print(f"no CUDA device: {machine['problem']}", file=sys.stderr)
        return 2
    file = _open(options, machine, names)
    if "build" in names and file.status("build") is None:
        _build(file, options, deadline)
    remaining = [name for name in names if file.status(name) is None]
    while remaining:
        if time.monotonic() >= deadline:
            for name in remaining:
                file.mark(name, SKIPPED, "budget: used up")
            break
        running = _work(options, file.path, deadline, remaining)
        file = RunFile.load(file.path)
        left = [name for name in remaining if file.status(name) in (None, RUNNING)]
        if not left:
            break
        crashed = [name for name in left if file.status(name) == RUNNING]
        for name in crashed:
            file.mark(name, FAILED, running)
        left = [name for name in left if name not in crashed]
        if not crashed and len(left) == len(remaining) and time.monotonic() < deadline:  # it does not even start
            for name in left:
                file.mark(name, FAILED, running)
            break
        remaining = left
    return _summary(file, names, deadline)


def _machine(device: str) -> dict[str, Any]:
    """The device's name and torch's version, from a process of its own."""
    code = (
        "import json, torch; ok = torch.cuda.is_available(); print(json.dumps({'torch': torch.__version__, "
        "'device': torch.cuda.get_device_name(0) if ok else None, "
        "'problem': None if ok else 'torch.cuda.is_available() is False'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        output = done.stderr.strip() or "?"
        return {"torch": None, "device": None, "problem": f"importing torch failed: {output.splitlines()[-1]}"}
    machine: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return machine | {"device": "cpu"} if device == "cpu" else machine


def _open(options: Options, machine: dict[str, Any], names: list[str]) -> RunFile:
    """The device's file; what an earlier run of the same sources finished is kept unless it is asked for by name."""
    path = options.out / f"{slug(machine['device'], options.tiny)}.json"
    identity = {
        "schema": SCHEMA,
        "device": machine["device"],
        "kind": options.device,
        "tiny": options.tiny,
        "torch": machine["torch"],
        "source": source_digest(),
    }
    try:
        file = RunFile.load(path)
    except json.JSONDecodeError:
        file = RunFile(path, {})
    if options.fresh or any(file.data.get(key) != value for key, value in identity.items()):
        file = RunFile(path, {**identity, "runs": [], "sections": {}})
        if options.device == "cuda":
            forget_extension()
    sections: dict[str, dict[str, Any]] = file.data["sections"]
    kept = {n: s for n, s in sections.items() if s["status"] == "done" and not (options.only and n in names)}
    file.data["sections"] = kept
    file.data["runs"].append(
        {
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "budget_s": options.budget_s,
            "only": options.only,
            "kept": sorted(kept),
        }
    )
    file.save()
    print(f"results: {path}" + (f"; kept from earlier runs: {', '.join(kept)}" if kept else ""), flush=True)
    return file


def _build(file: RunFile, options: Options, deadline: float) -> None:
    limit = min(BUILD_LIMIT_S, (deadline - time.monotonic()) / 2)
    run = len(file.data["runs"]) - 1
    if options.device == "cpu" or limit < 1:
        reason = "budget: used up" if limit < 1 else "a CPU's kernels come with the installation"
        file.mark("build", SKIPPED, reason, run=run)
        return
    file.mark("build", RUNNING, title="the native extension, with its CUDA kernels", run=run)
    forget_extension()
    status, reason, data = build_extension(limit)
    file.mark("build", status, reason, data=data)
    print(f"build: {status}{f', {reason}' if reason else ''}", flush=True)


def _work(options: Options, path: Path, deadline: float, names: list[str]) -> str:
    """One worker, until it ends or is overdue; how it ended, in words."""
    command = [sys.executable, str(SCRIPT), "--worker", str(path), "--deadline", repr(deadline)]
    command += ["--parent", str(os.getpid())]
    command += ["--device", options.device, "--sections", ",".join(names), *(["--tiny"] if options.tiny else [])]
    variables = dict(os.environ)
    if options.device == "cpu":
        variables["TRITON_INTERPRET"] = "1"  # read when triton is imported
        variables.setdefault("OMP_WAIT_POLICY", "passive")
    process = subprocess.Popen(command, env=variables)
    try:
        status = process.wait(timeout=max(deadline + GRACE_S - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        return f"stopped: it still ran {GRACE_S:.0f} s after the end of the budget"
    finally:
        if process.poll() is None:  # overdue, or we are interrupted
            process.kill()
            process.wait()
    return f"its process ended with {f'signal {-status}' if status < 0 else f'exit status {status}'}"


def _summary(file: RunFile, names: list[str], deadline: float) -> int:
    sections = file.data["sections"]
    print("\nsection            status   s       reason")
    for name in names:
        section = sections.get(name, {})
        seconds = section.get("seconds")
        took = "" if seconds is None else f"{seconds:.1f}"
        print(f"{name:18s} {section.get('status') or '-':8s} {took:7s} {section.get('reason') or ''}")
    failed = [name for name in names if sections.get(name, {}).get("status") == FAILED]
    file.data["runs"][-1]["seconds"] = round(file.data["runs"][-1]["budget_s"] - (deadline - time.monotonic()), 1)
    file.save()
    print(f"{file.path}: {len(failed)} failed")
    return 1 if failed else 0
