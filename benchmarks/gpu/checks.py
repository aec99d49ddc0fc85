"""Run the device checks in processes beside each other, and keep what they accuse."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpu import build
from gpu.device_checks import NETWORKS, RECORD, Backends, DeviceCheck, Outcome, catalogue
from gpu.run import DeviceRun, Skip
from gpu.supervisor import ended

LIMIT_S = 100.0
GRACE_S = 15.0  # for the check that runs at the end of the limit
PROCESSES, TINY_PROCESSES = 6, 2
WARNINGS = "warnings"  # of the file: what readers of any number must know


def run_checks(run: DeviceRun) -> None:
    """Record the outcomes, the ``wrong`` kernels by operator, and those of ``wrong_numbers``.

    The section is done when every check has an outcome, right or wrong; outcomes of an earlier run
    are kept.
    """
    checks = {check.name: check for check in catalogue(run.device, run.tiny)}
    outcomes = {n: o for n, o in run.get("outcomes", {}).items() if n in checks}
    # at once: what an earlier run found is not forgotten meanwhile
    conclude(run, outcomes.values())
    remaining = [check for name, check in checks.items() if name not in outcomes]
    deadline = time.monotonic() + min(LIMIT_S * run.slowness, run.remaining() - GRACE_S)
    count = TINY_PROCESSES if run.tiny else PROCESSES
    with tempfile.TemporaryDirectory() as folder:
        shares = [share for i in range(count) if (share := remaining[i::count])]
        parts = [Part(run, Path(folder) / str(i), s, deadline) for i, s in enumerate(shares)]
        try:
            while [part for part in parts if part.runs()]:
                time.sleep(0.1)
                _keep(run, outcomes, parts)
        finally:
            for part in parts:
                part.stop()
    _keep(run, outcomes, parts)
    conclude(run, outcomes.values())
    failed = [outcome for outcome in outcomes.values() if not outcome["ok"]]
    for outcome in failed:
        print(f"{run.name}: FAIL {outcome['name']}: {outcome['problem']}", flush=True)
    run.put("counts", {"passed": len(outcomes) - len(failed), "failed": len(failed)})
    if failed:
        run.note(f"{len(failed)} of {len(outcomes)} checks failed")
    problems = [part.problem for part in parts if part.problem is not None]
    if problems:
        raise RuntimeError(problems[0])
    if len(outcomes) < len(checks):
        left = f"{len(checks) - len(outcomes)} of {len(checks)}"
        raise Skip(f"budget: {left} checks have no outcome yet")


def _keep(run: DeviceRun, outcomes: dict[str, dict[str, Any]], parts: list[Part]) -> None:
    """Record what is new of the parts' outcomes."""
    found = {name: outcome for part in parts for name, outcome in part.outcomes.items()}
    if not found.keys() <= outcomes.keys():
        outcomes |= found
        run.put("outcomes", outcomes, quiet=True)


class Part:
    """Run some of the checks in a process; where one takes it down, another process has the rest.

    Args:
        run: of the section.
        folder: of its own.
        checks: to run, in order.
        deadline: after which no check is started.

    Attributes:
        outcomes: found until now, by name.
        problem: why the process does not even start, or None.
    """

    def __init__(
        self, run: DeviceRun, folder: Path, checks: list[DeviceCheck], deadline: float
    ) -> None:
        self.checks = {check.name: check for check in checks}
        self.outcomes: dict[str, dict[str, Any]] = {}
        self.problem: str | None = None
        self._run, self._deadline = run, deadline
        folder.mkdir()
        self._names, self._out, self._log = (folder / name for name in ("names", "out", "log"))
        self._read = 0
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        self._names.write_text(json.dumps([n for n in self.checks if n not in self.outcomes]))
        self._before, self._started = len(self.outcomes), ""
        seconds = max(self._deadline - time.monotonic(), 0.0)
        command = [sys.executable, "-m", "gpu.child", "gpu.check_part"]
        command += ["--device", self._run.device.type, *(["--tiny"] if self._run.tiny else [])]
        command += ["--names", str(self._names), "--out", str(self._out)]
        with self._log.open("wb") as log:
            return subprocess.Popen(
                [*command, "--seconds", f"{seconds:.1f}"],
                cwd=build.workplace(),
                env=build.environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def runs(self) -> bool:
        """Read what is new, replace a process that has crashed, and tell whether one runs."""
        status = self._process.poll()
        self._collect()
        if status is None:
            if time.monotonic() < self._deadline + GRACE_S:
                return True
            self.stop()
            self._blame(f"it still ran {GRACE_S:.0f} s after the end of the time for checks")
            return False
        out_of_time = not self._started and time.monotonic() >= self._deadline
        if len(self.outcomes) == len(self.checks) or out_of_time:
            return False
        log = self._log.read_text(errors="replace").strip().splitlines()
        problem = f"its process {ended(status)}: {log[-1][:200] if log else 'it said nothing'}"
        if not self._started and len(self.outcomes) == self._before:
            self.problem = problem
            return False
        self._blame(problem)
        if len(self.outcomes) == len(self.checks):
            return False
        self._process = self._start()
        return True

    def stop(self) -> None:
        """End the process, if it runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._collect()

    def _collect(self) -> None:
        text = self._out.read_text() if self._out.exists() else ""
        complete = text[self._read : text.rfind("\n") + 1]
        self._read += len(complete)
        for line in complete.splitlines():
            entry = json.loads(line)
            if "started" in entry:
                self._started = entry["started"]
            else:
                self.outcomes[entry["name"]] = entry
                self._started = ""

    def _blame(self, problem: str) -> None:
        """Count the check that had started as failed, if one had."""
        if self._started:
            check = self.checks[self._started]
            rest = (check.limit, problem, False, 0.0, check.accuses, check.stops)
            self.outcomes[check.name] = asdict(Outcome(check.name, False, None, *rest))


def conclude(run: DeviceRun, outcomes: Iterable[dict[str, Any]]) -> None:
    """Keep what failures mean for other sections, and warnings that stand above all numbers."""
    failed = [outcome for outcome in outcomes if not outcome["ok"]]
    stopping = [outcome for outcome in failed if outcome["stops"] != RECORD]
    numbers = [outcome for outcome in failed if outcome["stops"] == NETWORKS and outcome["numbers"]]
    run.put("wrong_numbers", _merged(numbers))
    run.put("wrong", _merged(stopping))
    run.file.data[WARNINGS] = [f"{outcome['name']}: {outcome['problem']}" for outcome in failed]
    run.file.save()


def _merged(outcomes: list[dict[str, Any]]) -> Backends:
    """Join what outcomes accuse, by operator."""
    found: dict[str, set[str]] = {}
    for outcome in outcomes:
        for op, backends in outcome["accuses"].items():
            found.setdefault(op, set()).update(backends)
    return {op: sorted(found[op]) for op in sorted(found)}
