"""Run the device checks in processes beside each other, and keep what they accuse."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gpu import build
from gpu.check_part import MARK
from gpu.device_checks import catalogue
from gpu.outcomes import Backends, Outcome, failed
from gpu.run import DeviceRun, Skip
from gpu.supervisor import ended

LIMIT_S = 100.0
GRACE_S = 15.0  # for the check that runs at the end of the limit
PROCESSES, TINY_PROCESSES = 6, 2


def run_checks(run: DeviceRun) -> None:
    """Record the outcomes, the ``wrong`` kernels by operator, and those of ``wrong_numbers``.

    The section is done when every check has an outcome, right or wrong; outcomes of an earlier run
    are kept.
    """
    checks = {check.name: check for check in catalogue(run.device, run.tiny)}
    outcomes = {n: o for n, o in run.get("outcomes", {}).items() if n in checks}
    # at once: what an earlier run found is not forgotten meanwhile
    conclude(run, outcomes.values())
    lock = threading.Lock()

    def keep(outcome: Outcome) -> None:
        with lock:
            outcomes[outcome["name"]] = outcome
            run.put("outcomes", outcomes, quiet=True)

    left = [name for name in checks if name not in outcomes]
    limit = run.remaining() - GRACE_S
    deadline = time.monotonic() + (limit if run.tiny else min(LIMIT_S, limit))
    count = TINY_PROCESSES if run.tiny else PROCESSES
    with ThreadPoolExecutor(count) as pool:
        shares = [left[i::count] for i in range(count)]
        parts = [pool.submit(run_part, run, share, deadline, keep) for share in shares]
    conclude(run, outcomes.values())
    wrong = [outcome for outcome in outcomes.values() if not outcome["ok"]]
    for outcome in wrong:
        print(f"{run.name}: FAIL {outcome['name']}: {outcome['problem']}", flush=True)
    run.put("counts", {"passed": len(outcomes) - len(wrong), "failed": len(wrong)})
    if wrong:
        run.note(f"{len(wrong)} of {len(outcomes)} checks failed")
    for part in parts:
        part.result()  # raises what kept a process from starting
    if len(outcomes) < len(checks):
        missing = f"{len(checks) - len(outcomes)} of {len(checks)}"
        raise Skip(f"budget: {missing} checks have no outcome yet")


def run_part(
    run: DeviceRun, names: list[str], deadline: float, keep: Callable[[Outcome], None]
) -> None:
    """Run checks in a process; where one takes it down, another process has the rest.

    Args:
        run: of the section.
        names: of the checks, in order.
        deadline: after which no check is started.
        keep: takes each outcome as soon as it is known.

    Raises:
        RuntimeError: the process does not even start a check.
    """
    known = {check.name: check for check in catalogue(run.device, run.tiny)}
    left = list(names)
    while left and time.monotonic() < deadline:
        process = _start(run, left, deadline)
        overdue = threading.Timer(deadline + GRACE_S - time.monotonic(), process.kill)
        overdue.start()
        started, said, before = "", "it said nothing", len(left)
        for line in process.stdout or ():
            if not line.startswith(MARK):
                said = line.strip() or said
                continue
            entry = json.loads(line.removeprefix(MARK))
            if isinstance(entry, str):
                started = entry
            else:
                keep(entry)
                left.remove(entry["name"])
                started = ""
        status = process.wait()
        overdue.cancel()
        if status == 0:
            return
        problem = f"its process {ended(status)}: {said[:200]}"
        if started:
            keep(failed(known[started], problem))
            left.remove(started)
        elif len(left) == before and time.monotonic() < deadline:
            raise RuntimeError(problem)


def _start(run: DeviceRun, names: list[str], deadline: float) -> subprocess.Popen[str]:
    order = {"device": run.device.type, "tiny": run.tiny, "parent": os.getpid()}
    order |= {"names": names, "deadline": deadline}
    return subprocess.Popen(
        [sys.executable, "-m", "gpu.check_part", json.dumps(order)],
        cwd=build.workplace(),
        env=build.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def conclude(run: DeviceRun, outcomes: Iterable[Outcome]) -> None:
    """Keep what failures mean for other sections, and warnings that stand above all numbers."""
    wrong = [outcome for outcome in outcomes if not outcome["ok"]]
    run.put("wrong_numbers", _merged(outcome for outcome in wrong if outcome["numbers"]))
    run.put("wrong", _merged(wrong))
    run.file.data["warnings"] = [f"{outcome['name']}: {outcome['problem']}" for outcome in wrong]
    run.file.save()


def _merged(outcomes: Iterable[dict[str, Any]]) -> Backends:
    """Join what outcomes accuse, by operator."""
    found: dict[str, set[str]] = {}
    for outcome in outcomes:
        for op, backends in outcome["accuses"].items():
            found.setdefault(op, set()).update(backends)
    return {op: sorted(found[op]) for op in sorted(found)}
