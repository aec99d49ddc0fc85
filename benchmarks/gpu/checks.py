"""Runs the device checks in processes beside each other, and keeps what they accuse."""

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
from gpu.context import Context, Skip, merged
from gpu.device_checks import NETWORKS, RECORD, DeviceCheck, Outcome, catalogue

LIMIT_S = 100.0
GRACE_S = 15.0  # for the check that runs at the end of the limit
PROCESSES, TINY_PROCESSES = 6, 2
WARNINGS = "warnings"  # of the file: what readers of any number must know


def run_checks(context: Context) -> None:
    """Record the outcome of every check, ``wrong`` kernels by operator, and ``wrong_numbers`` among
    them.

    The section is done when every check has an outcome, right or wrong; outcomes of an earlier run
    are kept.
    """
    checks = {check.name: check for check in catalogue(context.device, context.tiny)}
    outcomes = {
        n: o for n, o in (context.file.get(context.name, "outcomes") or {}).items() if n in checks
    }
    # at once: what an earlier run found is not forgotten meanwhile
    conclude(context, outcomes.values())
    remaining = [check for name, check in checks.items() if name not in outcomes]
    seconds = LIMIT_S * context.slowness
    deadline = time.monotonic() + min(seconds, context.remaining() - GRACE_S)
    with tempfile.TemporaryDirectory() as folder:
        count = TINY_PROCESSES if context.tiny else PROCESSES
        shares = [remaining[index::count] for index in range(count)]
        parts = [
            Part(context, Path(folder) / str(i), share, deadline)
            for i, share in enumerate(shares)
            if share
        ]
        try:
            while any(part.runs() for part in parts):
                time.sleep(0.1)
                found = {name: outcome for part in parts for name, outcome in part.outcomes.items()}
                if not found.keys() <= outcomes.keys():
                    outcomes |= found
                    context.put("outcomes", outcomes, quiet=True)
        finally:
            for part in parts:
                part.stop()
    outcomes |= {name: outcome for part in parts for name, outcome in part.outcomes.items()}
    context.put("outcomes", outcomes, quiet=True)
    conclude(context, outcomes.values())
    failed = [outcome for outcome in outcomes.values() if not outcome["ok"]]
    for outcome in failed:
        print(f"{context.name}: FAIL {outcome['name']}: {outcome['problem']}", flush=True)
    context.put("counts", {"passed": len(outcomes) - len(failed), "failed": len(failed)})
    if failed:
        context.note(f"{len(failed)} of {len(outcomes)} checks failed")
    problems = [part.problem for part in parts if part.problem is not None]
    if problems:
        raise RuntimeError(problems[0])
    if len(outcomes) < len(checks):
        raise Skip(
            f"budget: {len(checks) - len(outcomes)} of {len(checks)} checks have no outcome yet"
        )


class Part:
    """Runs some of the checks in a process; where a check takes the process down, the others run in
    another one.

    Args:
        context: of the run.
        folder: of its own.
        checks: to run, in order.
        deadline: after which no check is started.

    Attributes:
        outcomes: so far, by name.
        problem: why the process does not even start, or None.
    """

    def __init__(
        self, context: Context, folder: Path, checks: list[DeviceCheck], deadline: float
    ) -> None:
        self.checks, self.outcomes = (
            {check.name: check for check in checks},
            dict[str, dict[str, Any]](),
        )
        self._context, self._folder, self._deadline = context, folder, deadline
        folder.mkdir()
        self._out, self._log, self._read = folder / "out", folder / "log", 0
        self.problem: str | None = None
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        left = [name for name in self.checks if name not in self.outcomes]
        names = self._folder / "names"
        names.write_text(json.dumps(left))
        self._before, self._started = len(self.outcomes), ""
        seconds = max(self._deadline - time.monotonic(), 0.0)
        command = [
            sys.executable,
            "-m",
            "gpu.child",
            "gpu.device_checks",
            "--device",
            self._context.device.type,
        ]
        command += ["--names", str(names), "--out", str(self._out), "--seconds", f"{seconds:.1f}"]
        command += ["--tiny"] if self._context.tiny else []
        with self._log.open("wb") as log:
            return subprocess.Popen(
                command,
                cwd=build.workplace(),
                env=build.environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def runs(self) -> bool:
        """Read what is new, start another process where this one has crashed, and tell whether one
        runs.
        """
        status = self._process.poll()
        self._collect()
        if status is None:
            if time.monotonic() < self._deadline + GRACE_S:
                return True
            self.stop()
            self._blame(f"it still ran {GRACE_S:.0f} s after the end of the time for checks")
            return False
        if len(self.outcomes) == len(self.checks) or (
            not self._started and time.monotonic() >= self._deadline
        ):
            return False
        log = self._log.read_text(errors="replace").strip().splitlines()
        ended = (
            "its process ended with "
            f"{f'signal {-status}' if status < 0 else f'exit status {status}'}"
        )
        ended += f": {log[-1][:200] if log else 'it said nothing'}"
        if not self._started and len(self.outcomes) == self._before:
            self.problem = ended
            return False
        self._blame(ended)
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
        """Let the check that had started fail, if one had."""
        if self._started:
            check = self.checks[self._started]
            outcome = Outcome(
                check.name,
                False,
                None,
                check.limit,
                problem,
                False,
                0.0,
                check.accuses,
                check.stops,
            )
            self.outcomes[check.name] = asdict(outcome)


def conclude(context: Context, outcomes: Iterable[dict[str, Any]]) -> None:
    """Keep what failures mean for the other sections, and the warnings that stand above all
    numbers.
    """
    failed = [outcome for outcome in outcomes if not outcome["ok"]]
    stopping = [outcome for outcome in failed if outcome["stops"] != RECORD]
    numbers = [outcome for outcome in failed if outcome["stops"] == NETWORKS and outcome["numbers"]]
    context.put("wrong_numbers", merged(*(outcome["accuses"] for outcome in numbers)))
    context.put("wrong", merged(*(outcome["accuses"] for outcome in stopping)))
    context.file.data[WARNINGS] = [f"{outcome['name']}: {outcome['problem']}" for outcome in failed]
    context.file.save()
