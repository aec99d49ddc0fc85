"""Start and watch the processes of a run; this one measures nothing, so that nothing ends it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gpu.build import environment, lay_out, prepare_extension
from gpu.state import DONE, FAILED, FOLDER, RUNNING, SCHEMA, SKIPPED, RunFile, slug, source_digest

SCRIPT = Path(__file__).resolve().parents[1] / "run_gpu.py"
GRACE_S = 15.0  # a section that still runs this long after the budget is stopped
BUILD_LIMIT_S = 180.0


@dataclass(frozen=True)
class Options:
    """Hold the command line.

    Attributes:
        out: folder of the results.
        device: ``"cuda"`` or ``"cpu"``.
        tiny: tiny shapes.
        budget_s: seconds after which no section is started.
        only: part of the names of the sections to run again, or empty.
        short: whether the plan is the short one.
        fresh: keep nothing of an earlier run of the same sources.
        copies: folder of the runner's own copies of results.
    """

    out: Path
    device: str
    tiny: bool
    budget_s: float
    only: str = ""
    short: bool = False
    fresh: bool = False
    copies: Path = FOLDER / "results"


@dataclass(frozen=True)
class WorkOrder:
    """Hold what a worker is told, as the JSON of its command line.

    Attributes:
        path, copy: of the results, and of the runner's own copy.
        sections: names, in order.
        deadline: on ``time.monotonic()``, which all processes of a machine share.
        parent: the process that the worker must not outlive.
        device, tiny, short: as in :class:`Options`.
    """

    path: str
    copy: str
    sections: list[str]
    deadline: float
    parent: int
    device: str
    tiny: bool
    short: bool


def supervise(options: Options, names: list[str]) -> int:
    """Run sections in processes of their own.

    Args:
        options: of the command line.
        names: the sections that are wanted, in order; ``build`` is done here.

    Returns:
        1 if one failed or found something wrong, 2 without a GPU.
    """
    deadline = time.monotonic() + options.budget_s
    machine = _machine(options.device)
    if machine["device"] is None:
        print(f"no CUDA device: {machine['problem']}", file=sys.stderr)
        return 2
    lay_out()
    file = _open(options, machine, names)
    if "build" in names and file.status("build") is None:
        _build(file, options, deadline)
    remaining = [name for name in _order(file, names) if file.status(name) is None]
    while remaining:
        if time.monotonic() >= deadline:
            for name in remaining:
                file.mark(name, SKIPPED, "budget: used up")
            break
        problem = _work(options, file, deadline, remaining)
        file = RunFile.load(file.path, file.copy)
        left = [name for name in remaining if file.status(name) in (None, RUNNING)]
        crashed = [name for name in left if file.status(name) == RUNNING]
        # a worker that does not even start would not start again
        hopeless = not crashed and left == remaining and time.monotonic() < deadline
        for name in left if hopeless else crashed:
            file.mark(name, FAILED, problem)
        remaining = [] if hopeless else [name for name in left if name not in crashed]
    return _summary(file, names, deadline)


def _machine(device: str) -> dict[str, Any]:
    """Ask a process of its own for the device's name and torch's version."""
    code = (
        "import json, torch; ok = torch.cuda.is_available(); print(json.dumps({'torch': "
        "torch.__version__, 'device': torch.cuda.get_device_name(0) if ok else None, "
        "'problem': None if ok else 'torch.cuda.is_available() is False'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        problem = f"importing torch failed: {(done.stderr.strip() or '?').splitlines()[-1]}"
        return {"torch": None, "device": None, "problem": problem}
    machine: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return machine | {"device": "cpu"} if device == "cpu" else machine


def _open(options: Options, machine: dict[str, Any], names: list[str]) -> RunFile:
    """Open the device's file, in ``--out`` or the runner's own copy of it, and begin a run.

    What an earlier run of the same sources finished is kept unless it is asked for by name. A build
    that failed has failed for these sources: it is not tried again by itself. Other sections keep
    their data until they run again.
    """
    name = f"{slug(machine['device'], options.tiny)}.json"
    identity = {
        "schema": SCHEMA,
        "device": machine["device"],
        "kind": options.device,
        "tiny": options.tiny,
        "torch": machine["torch"],
        "source": source_digest(),
    }
    file = RunFile.open(options.out / name, options.copies / name, identity, options.fresh)
    asked, kept, again = names if options.only else [], [], []
    for section_name, section in file.data["sections"].items():
        failed = section["status"] == FAILED
        finished = section["status"] == DONE or (section_name == "build" and failed)
        if finished and section_name not in asked:
            kept.append(section_name)
        elif failed:
            again.append(section_name)
    file.data["runs"].append(
        {
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "budget_s": options.budget_s,
            "plan": "short" if options.short else "full",
            "only": options.only,
            "kept": sorted(kept),
            "again": sorted(again),
        }
    )
    file.save()
    earlier = f"; kept from earlier runs: {', '.join(kept)}" if kept else ""
    print(f"results: {file.path}{earlier}", flush=True)
    return file


def _order(file: RunFile, names: list[str]) -> list[str]:
    """Sort by the plan, what failed before after what has never run, the tests last."""
    again = file.data["runs"][-1]["again"]
    wanted = (name for name in names if name != "build")
    return sorted(wanted, key=lambda name: (name == "tests", name in again))


def _build(file: RunFile, options: Options, deadline: float) -> None:
    limit = min(BUILD_LIMIT_S, (deadline - time.monotonic()) / 2)
    if limit < 1:
        file.mark("build", SKIPPED, "budget: used up")
        return
    started = time.monotonic()
    file.mark("build", RUNNING, title="the native extension, with its CUDA kernels")
    status, reason, data = prepare_extension(options.device, limit)
    file.mark("build", status, reason, data=data, seconds=round(time.monotonic() - started, 2))
    print(f"build: {status}{f', {reason}' if reason else ''}", flush=True)


def _work(options: Options, file: RunFile, deadline: float, names: list[str]) -> str:
    """Run one worker until it ends or is overdue; the result says in words how it ended."""
    where = (options.device, options.tiny, options.short)
    order = WorkOrder(str(file.path), str(file.copy), names, deadline, os.getpid(), *where)
    variables = environment()
    if options.device == "cpu":
        variables.setdefault("OMP_WAIT_POLICY", "passive")
    else:  # what one call has compiled is there in the next one
        variables.setdefault("TRITON_CACHE_DIR", str(FOLDER / "cache" / "triton"))
        variables.setdefault("TORCHINDUCTOR_CACHE_DIR", str(FOLDER / "cache" / "inductor"))
    command = [sys.executable, str(SCRIPT), "--worker", json.dumps(asdict(order))]
    process = subprocess.Popen(command, env=variables)
    try:
        status = process.wait(timeout=max(deadline + GRACE_S - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        return f"stopped: it still ran {GRACE_S:.0f} s after the end of the budget"
    finally:
        if process.poll() is None:  # overdue, or this process is interrupted
            process.kill()
            process.wait()
    return f"its process {ended(status)}"


def ended(status: int) -> str:
    """Say how a process ended."""
    return f"ended with {f'signal {-status}' if status < 0 else f'exit status {status}'}"


def _summary(file: RunFile, names: list[str], deadline: float) -> int:
    sections, run = file.data["sections"], file.data["runs"][-1]
    print("\nsection            status   s       reason")
    for name in names:
        section = sections.get(name, {})
        seconds, status = section.get("seconds"), section.get("status") or "-"
        took = "" if seconds is None else f"{seconds:.1f}"
        print(f"{name:18s} {status:8s} {took:7s} {section.get('reason') or ''}")
    failed = [name for name in names if sections.get(name, {}).get("status") == FAILED]
    noted = [name for name in names if "note" in sections.get(name, {})]
    run["seconds"] = round(run["budget_s"] - (deadline - time.monotonic()), 1)
    file.save()
    warnings = file.data.get("warnings", [])
    for warning in warnings:
        print(f"WRONG: {warning}")
    wrong = f", {len(warnings)} things WRONG" if warnings else ""
    print(f"{file.path}: {len(failed)} failed{wrong}")
    return 1 if failed or noted or warnings else 0
